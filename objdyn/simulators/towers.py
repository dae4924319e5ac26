"""Block towers: two to four cubes on each other, shifted at random, that stand or fall.

After Lerer et al., "Learning Physical Intuition of Block Towers by Example" (2016), whose real videos ODDN uses and
which were not published. Cubes have CLEVR's colours and are simulated with friction 0.6 by MuJoCo. A tower is still at
first; whether it fell is read off after ``LABEL_SECONDS``.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from objdyn.clevrer import COLORS, FPS, Properties, World
from objdyn.simulators.clevrer import GRAVITY, HALF, MASS, Body, Run, Scene, history, philox, to_motion
from objdyn.simulators.rendering import View, import_extra

FRICTION = 0.6
NUM_FRAMES = 64
LABEL_SECONDS = 2.0
FALLEN = HALF / 2
"""A tower fell if the centre of a cube is this much lower than at the start."""
VIEW = View(position=(3.5, -3.1, 2.6), target=(0.0, 0.0, 0.65), fov_y=33.9)
MAX_CUBES = 4

_REST = (0.0, 0.0, 0.0)
_SUBSTEPS = 20
_SHIFT = 1.3  # of half a cube, at most, from one cube to the next


class Tower(NamedTuple):
    """A tower and how it went on."""

    scene: Scene
    run: Run
    stands: bool


def draw_scene(seed: int, cubes: tuple[int, int] = (2, 4)) -> Scene:
    """Draw a tower from its seed alone: number, colours, and the shift and turn of each cube on the one below.

    Raises:
        ValueError: the range or the seed is impossible.
    """
    low, high = cubes
    if not 2 <= low <= high <= MAX_CUBES or not 0 <= seed < 2**64:
        raise ValueError(f"a tower has 2 to {MAX_CUBES} cubes and a seed of 64 bits, got {cubes} and {seed}")
    random = np.random.RandomState(philox(seed, 0, 2))
    number = int(random.randint(low, high + 1))
    colors, facing = random.permutation(len(COLORS))[:number], random.uniform(-math.pi, math.pi)
    place, bodies = np.zeros(2), []
    for level, color in enumerate(colors):
        if level:
            heading, shift = random.uniform(-math.pi, math.pi), _SHIFT * HALF * random.random_sample()
            place = place + shift * np.array([math.cos(heading), math.sin(heading)])
        position = (float(place[0]), float(place[1]), HALF * (2 * level + 1))
        yaw = facing + random.uniform(-0.2, 0.2)
        bodies.append(Body(Properties(COLORS[color], "rubber", "cube"), position, yaw, _REST, _REST))
    return Scene(tuple(bodies), seed, VIEW)


def simulate(scene: Scene, frames: int = NUM_FRAMES) -> Tower:
    """Let a tower stand or fall for some frames, at least ``LABEL_SECONDS`` of them.

    Raises:
        ValueError: mujoco is not installed, or there are too few frames.
    """
    last = round(LABEL_SECONDS * FPS)
    if frames <= last:
        raise ValueError(f"whether a tower fell shows after {last} frames; ask for more than {frames}")
    mujoco = import_extra("mujoco", "sim3d")
    model = mujoco.MjModel.from_xml_string(_mjcf(scene))
    data, number = mujoco.MjData(model), len(scene.bodies)
    place, speed = data.qpos.reshape(number, 7), data.qvel.reshape(number, 6)
    for row, body in zip(place, scene.bodies, strict=True):
        row[:] = *body.position, math.cos(body.yaw / 2), 0, 0, math.sin(body.yaw / 2)
    run = Run(
        *(np.empty((frames, number, *rest)) for rest in ((3,), (3, 3), (3,), (3,))),
        touching=np.zeros((frames, number, number), bool),
    )
    mujoco.mj_step1(model, data)
    for frame in range(frames):
        for _ in range(_SUBSTEPS if frame else 0):
            mujoco.mj_step2(model, data)
            mujoco.mj_step1(model, data)
            pairs = data.contact.geom[data.contact.dist < 0] - 1  # the floor is the first
            pairs = pairs[(pairs >= 0).all(axis=1)]
            run.touching[frame, pairs[:, 0], pairs[:, 1]] = run.touching[frame, pairs[:, 1], pairs[:, 0]] = True
        run.position[frame], run.rotation[frame] = data.xpos[1:], data.xmat[1:].reshape(number, 3, 3)
        run.velocity[frame] = speed[:, :3]
        run.angular_velocity[frame] = np.einsum("nij,nj->ni", run.rotation[frame], speed[:, 3:])
    lower = run.position[0, :, 2] - run.position[last, :, 2]
    return Tower(scene, run, bool((lower < FALLEN).all()))


def to_world(tower: Tower, scene_index: int) -> World:
    """A tower in CLEVRER's terms; nothing is known of what happens after the shown frames or without a cube."""
    camera = tower.scene.view.camera
    happened = history(tower.run, camera)
    motion = to_motion(tower.run, camera)
    return World(scene_index, tower.scene.properties, motion, happened, {}, shown=len(tower.run.position))


def _mjcf(scene: Scene) -> str:
    shape = f'type="box" size="{HALF} {HALF} {HALF}" mass="{MASS}" contype="0" conaffinity="0"'
    number = len(scene.bodies)
    bodies = "".join(f'<body><freejoint/><geom name="{i}" {shape}/></body>' for i in range(number))
    contact = f'condim="4" friction="{FRICTION} {FRICTION} 0.005 0 0" solref="0.006 1"'
    pairs = [("floor", str(i)) for i in range(number)] + [
        (str(i), str(j)) for i, j in itertools.combinations(range(number), 2)
    ]
    contacts = "".join(f'<pair geom1="{one}" geom2="{other}" {contact}/>' for one, other in pairs)
    return (
        f'<mujoco><option timestep="{1 / FPS / _SUBSTEPS}" gravity="0 0 -{GRAVITY}" cone="elliptic" impratio="10"/>'
        f'<worldbody><geom name="floor" type="plane" size="0 0 1" contype="0" conaffinity="0"/>{bodies}</worldbody>'
        f"<contact>{contacts}</contact></mujoco>"
    )
