"""Videos like CLEVRER's, simulated: coloured cubes, spheres and cylinders that glide over a floor and collide.

Yi et al., "CLEVRER: Collision Events for Video Representation and Reasoning" (2020), whose videos come from Bullet and
Blender. Here MuJoCo moves the objects, so what would happen without one of them can be simulated from the same start.
CLEVRER's generator was not published; what is ours:

- All objects weigh the same and are 0.4 wide and high. Cubes and cylinders glide over the floor with friction 0.045 and
  turn, but cannot tip over: where a slow edge rests would decide what happens next. Spheres roll, and slow down by 0.39
  per second. Pairs bounce without friction and part with six tenths of the speed at which they met.
- At first some objects rest in view and the others are out of it, fast enough to reach one of those that rest, or
  another place in view, sooner or later; see :func:`draw_run` for which starts are taken.
- The camera is chosen to show objects as large and as far apart as CLEVRER's frames do.

The world is in CLEVRER's units: z is up, the floor is z = 0, time is in seconds.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from objdyn.clevrer import (
    COLORS,
    FPS,
    FUTURE_FRAMES,
    HEIGHT,
    MATERIALS,
    NUM_FRAMES,
    SHAPES,
    Camera,
    Event,
    History,
    Motion,
    Properties,
    World,
)
from objdyn.clips import Clip
from objdyn.simulators.options import Option, read_options, show_range, whole, whole_range
from objdyn.simulators.rendering import RENDERERS, Solid, View, import_extra, renderer

HALF = 0.2
"""Half the edge of a cube, the radius of a sphere, the radius and half the height of a cylinder."""
MASS = 1.0
GRAVITY = 9.81
SUBSTEPS = 10
"""Steps of physics per frame."""
SLIDING, TURNING, ROLLING = 0.045, 0.006, 0.011
"""Friction of an object that glides, without unit, of one that turns about its vertical axis, and of a rolling sphere,
both lengths."""
APART = 5
"""Frames that two objects have to be apart before their next contact is another collision."""
MARGIN = 0.1
"""How far beyond the edge an object's centre is when the object goes out of view, about its radius; the picture reaches
from -1 to 1. It comes into view when its centre does."""
NOISE = 1e-6
"""What is added to positions at the start to see whether events are stable."""
EPISODES_PER_SPLIT = {"train": 10_000, "val": 5_000, "test": 5_000}
"""As CLEVRER's."""
VIEW = View(position=(3.5, -3.1, 3.05), target=(0.0, 0.0, 0.0), fov_y=33.9)
MAX_OBJECTS = 8

_SLOWING = {"cube": SLIDING * GRAVITY, "cylinder": SLIDING * GRAVITY, "sphere": ROLLING * GRAVITY / (1.4 * HALF)}
_RESTING = ((-0.7, 0.5), (-0.5, 0.5))  # (y, x) in the picture where objects rest
_CLEAR = 0.6  # between centres at the start; the diagonals of two cubes are 0.57
_FIRST, _NEXT, _LATE = (0.6, 1.8), (0.6, 5.0), (5.2, 6.6)  # when an object reaches what it is aimed at
_LATE_SHARE = 0.5
_ARRIVAL_SPEED = (0.5, 2.0)
_LONGEST_WAY = 12.0
_TRIES = 100
_ATTEMPTS = 200
_SIDES = {
    # Between sides that are upright, what touches is decided in the plane, where a cylinder is as round as a sphere;
    # MuJoCo finds contacts of spheres and boxes in closed form, those of cylinders by a search that jumps.
    "cube": f'type="box" size="{HALF} {HALF} {HALF}"',
    "cylinder": f'type="sphere" size="{HALF}"',
    "sphere": f'type="sphere" size="{HALF}"',
}
_BOUNCE = 'condim="1" solref="-22500 -48" solimp="0.99 0.99 0.001"'
_FOOT = 0.01  # radius
_FLOOR = 'solref="0.012 1"'


class Body(NamedTuple):
    """An object at the start."""

    properties: Properties
    position: tuple[float, float, float]
    yaw: float
    """Turned about the vertical axis, in radians."""
    velocity: tuple[float, float, float]
    angular_velocity: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """All that a simulation starts from.

    Raises:
        ValueError: there is no object, or two look alike.
    """

    bodies: tuple[Body, ...]
    """By id."""
    seed: int = 0
    """What it was drawn from."""
    view: View = VIEW

    def __post_init__(self) -> None:
        if not self.bodies or len({body.properties for body in self.bodies}) < len(self.bodies):
            raise ValueError(
                "a scene needs at least one object, and no two that look alike, got "
                f"{', '.join(' '.join(body.properties) for body in self.bodies) or 'none'}"
            )

    @property
    def properties(self) -> tuple[Properties, ...]:
        """Looks of the objects, by id."""
        return tuple(body.properties for body in self.bodies)


class Run(NamedTuple):
    """Where n objects are in each of t frames; those that were taken out are NaN and touch nothing."""

    position: Float[np.ndarray, "t n 3"]
    rotation: Float[np.ndarray, "t n 3 3"]
    """From the object's axes to the world's."""
    velocity: Float[np.ndarray, "t n 3"]
    angular_velocity: Float[np.ndarray, "t n 3"]
    """Radians per second, in the world's axes."""
    touching: Bool[np.ndarray, "t n n"]
    """Pairs with contact at any time since the frame before; none at frame 0."""


def simulate(scene: Scene, frames: int, without: Collection[int] = (), noise: int | None = None) -> Run:
    """Let physics run from the start of a scene, which is frame 0.

    Args:
        scene: the start.
        frames: how many to return, at least 1.
        without: ids of objects that are not there.
        noise: seed of the noise of size ``NOISE`` on x and y of the start; None adds none.

    Raises:
        ValueError: mujoco is not installed.
    """
    mujoco = import_extra("mujoco", "sim3d")
    ids = [i for i in range(len(scene.bodies)) if i not in without]
    run = Run(
        position=np.full((frames, len(scene.bodies), 3), np.nan),
        rotation=np.full((frames, len(scene.bodies), 3, 3), np.nan),
        velocity=np.full((frames, len(scene.bodies), 3), np.nan),
        angular_velocity=np.full((frames, len(scene.bodies), 3), np.nan),
        touching=np.zeros((frames, len(scene.bodies), len(scene.bodies)), bool),
    )
    if not ids:
        return run
    model = mujoco.MjModel.from_xml_string(_mjcf(scene, ids))
    data, both = mujoco.MjData(model), np.zeros(6)
    _start(model, data, scene, ids, noise)
    owner = np.full(model.ngeom, -1)  # of a geom; the floor and feet have none
    owner[[model.geom(str(i)).id for i in ids]] = ids
    mujoco.mj_step1(
        model, data
    )  # poses and contacts of the state that there is, after which a step has its second half
    for frame in range(frames):
        for _ in range(SUBSTEPS if frame else 0):
            mujoco.mj_step2(model, data)
            mujoco.mj_step1(model, data)
            pairs = owner[data.contact.geom[data.contact.dist < 0]]
            pairs = pairs[(pairs >= 0).all(axis=1)]
            if len(pairs):
                run.touching[frame, pairs[:, 0], pairs[:, 1]] = run.touching[frame, pairs[:, 1], pairs[:, 0]] = True
        run.position[frame, ids] = data.xpos[1:]
        run.rotation[frame, ids] = data.xmat[1:].reshape(-1, 3, 3)
        for row, i in enumerate(ids):
            mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_BODY, row + 1, both, 0)
            run.angular_velocity[frame, i], run.velocity[frame, i] = both[:3], both[3:]
    return run


def _start(model: Any, data: Any, scene: Scene, ids: Sequence[int], noise: int | None) -> None:
    """Put objects where they are at the start."""
    shift = np.zeros((len(scene.bodies), 2))
    if noise is not None:
        shift = NOISE * _random(noise, 1).uniform(-1, 1, size=shift.shape)
    for row, i in enumerate(ids):
        body = scene.bodies[i]
        joint = model.body_jntadr[row + 1]
        place, speed = data.qpos[model.jnt_qposadr[joint] :], data.qvel[model.jnt_dofadr[joint] :]
        place[:3] = body.position
        place[:2] += shift[i]
        speed[:3] = body.velocity
        if body.properties.shape != "sphere":
            place[3], speed[3] = body.yaw, body.angular_velocity[2]
            continue
        cos, sin = math.cos(body.yaw), math.sin(body.yaw)
        x, y, z = body.angular_velocity
        place[3:7] = math.cos(body.yaw / 2), 0, 0, math.sin(body.yaw / 2)
        speed[3:6] = cos * x + sin * y, cos * y - sin * x, z  # in the body's axes, unlike its velocity


def _mjcf(scene: Scene, ids: Sequence[int]) -> str:
    """MuJoCo's description of some objects on a floor; all bodies have their centre of mass in the middle."""
    off, bodies, contacts = 'contype="0" conaffinity="0"', [], []
    for i in ids:
        shape = scene.bodies[i].properties.shape
        geoms = f'<geom name="{i}" {_SIDES[shape]} mass="{MASS}" {off}/>'
        if shape == "sphere":
            joints, touches = "<freejoint/>", f'geom2="{i}" condim="6" friction="0.5 0.5 0.002 {ROLLING} {ROLLING}"'
        else:
            joints = "".join(f'<joint type="slide" axis="{axis}"/>' for axis in ("1 0 0", "0 1 0", "0 0 1"))
            joints += '<joint type="hinge" axis="0 0 1"/>'
            # Of a cube 2/3 of m r^2, of a cylinder 1/2, about each axis; only the vertical one matters.
            inertia = MASS * HALF**2 * (2 / 3 if shape == "cube" else 1 / 2)
            geoms += f'<inertial pos="0 0 0" mass="{MASS}" diaginertia="{inertia} {inertia} {inertia}"/>'
            geoms += f'<geom name="foot{i}" size="{_FOOT}" pos="0 0 {_FOOT - HALF}" {off}/>'
            touches = f'geom2="foot{i}" condim="4" friction="{SLIDING} {SLIDING} {TURNING} 0 0"'
        bodies.append(f"<body>{joints}{geoms}</body>")
        contacts.append(f'<pair geom1="floor" {touches} {_FLOOR}/>')
    contacts += [f'<pair geom1="{i}" geom2="{j}" {_BOUNCE}/>' for i, j in itertools.combinations(ids, 2)]
    return (
        f'<mujoco><option timestep="{1 / FPS / SUBSTEPS}" gravity="0 0 -{GRAVITY}" cone="elliptic" tolerance="1e-14"/>'
        f'<worldbody><geom name="floor" type="plane" size="0 0 1" {off}/>{"".join(bodies)}</worldbody>'
        f"<contact>{''.join(contacts)}</contact></mujoco>"
    )


def in_view(positions: Float[np.ndarray, "t n 3"], camera: Camera) -> Bool[np.ndarray, "t n"]:
    """Say which objects a camera sees, hidden behind others or not.

    From the frame in which the centre comes into the picture, until it is farther than ``MARGIN`` beyond an edge.
    """
    far = np.abs(camera.project(positions)).max(axis=-1)  # NaN behind the camera compares as false
    seen = np.zeros(far.shape, bool)
    now = np.zeros(far.shape[1], bool)
    for frame, distance in enumerate(far):
        now = (distance <= 1) | (now & (distance <= 1 + MARGIN))
        seen[frame] = now
    return seen


def collisions(touching: Bool[np.ndarray, "t n n"]) -> list[Event]:
    """List collisions: when a pair touches first, and whenever it does so after ``APART`` frames apart."""
    found = []
    for i, j in itertools.combinations(range(touching.shape[1]), 2):
        frames = np.flatnonzero(touching[:, i, j])
        first = np.diff(frames, prepend=-APART - 1) > APART
        found += [Event("collision", int(frame), (i, j)) for frame in frames[first]]
    return found


def passages(seen: Bool[np.ndarray, "t n"]) -> list[Event]:
    """List how objects come into view and go out of it after frame 0."""
    changes = np.diff(seen.astype(np.int8), axis=0)
    return [
        Event("in" if changes[frame, i] > 0 else "out", int(frame) + 1, (int(i),)) for frame, i in np.argwhere(changes)
    ]


def history(run: Run, camera: Camera) -> History:
    """Everything that happens in a run, in order of time."""
    events = collisions(run.touching) + passages(in_view(run.position, camera))
    return History(tuple(sorted(events, key=lambda e: (e.frame, e.kind, e.objects))), len(run.position))


def draw_scene(seed: int, objects: tuple[int, int] = (3, 6)) -> Scene:
    """Draw the start of a video from its seed alone, see :func:`draw_run`."""
    return draw_run(seed, objects)[0]


def draw_run(seed: int, objects: tuple[int, int] = (3, 6)) -> tuple[Scene, Run]:
    """Draw the start of a video from its seed alone, and return also what follows in ``NUM_FRAMES`` frames.

    Each look is equally likely. Starts are drawn until one after which, in the frames of a video, every object comes
    into view, two collide (if there are two), and none that are both out of view.

    Raises:
        ValueError: mujoco is not installed; the range or the seed is impossible; no start was found.
    """
    low, high = objects
    if not 1 <= low <= high <= MAX_OBJECTS or not 0 <= seed < 2**64:
        raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects and a seed of 64 bits, got {objects} and {seed}")
    random = _random(seed, 0)
    for _ in range(_ATTEMPTS):
        scene = _draw(random, seed, int(random.randint(low, high + 1)))
        if scene is not None:
            run = simulate(scene, NUM_FRAMES)
            if _is_worth_showing(scene, run):
                return scene, run
    raise ValueError(f"no start worth showing among {_ATTEMPTS} for seed {seed} with {show_range(objects)} objects")


def imagine(scene: Scene, scene_index: int) -> tuple[World, Run] | None:
    """Simulate all that questions about a video may ask for, and the run that the video shows.

    That is the run itself, ``FUTURE_FRAMES`` frames after the shown ones, and the run without each of the objects from
    the same start. Each is repeated with noise of ``NOISE`` on the positions at the start: if the same objects do not
    have the same events in the same order, at most a frame earlier or later and on the same side of the video's end,
    then chance decides what happens. Such a run without an object is left out of ``World.without``; if the video's own
    run is one, the result is None.

    Raises:
        ValueError: mujoco is not installed.
    """
    frames, camera = NUM_FRAMES + FUTURE_FRAMES, scene.view.camera
    run = simulate(scene, frames)
    true = history(run, camera)
    if not _same(true, history(simulate(scene, frames, noise=scene.seed), camera)):
        return None
    without = {}
    for i in range(len(scene.bodies)):
        other = history(simulate(scene, frames, [i]), camera)
        if _same(other, history(simulate(scene, frames, [i], noise=scene.seed), camera)):
            without[i] = other
    return World(scene_index, scene.properties, to_motion(run, camera), true, without), run


def to_motion(run: Run, camera: Camera) -> Motion:
    """A run in CLEVRER's terms; orientations are angles about the fixed axes x, y and z, applied in this order."""
    r = run.rotation
    roll, yaw = np.arctan2(r[..., 2, 1], r[..., 2, 2]), np.arctan2(r[..., 1, 0], r[..., 0, 0])
    pitch = np.arcsin(np.clip(-r[..., 2, 0], -1, 1))
    return Motion(
        location=run.position,
        orientation=np.stack([roll, pitch, yaw], axis=-1),
        velocity=run.velocity,
        angular_velocity=run.angular_velocity,
        in_view=in_view(run.position, camera),
    )


def _same(one: History, other: History) -> bool:
    return len(one.events) == len(other.events) and all(
        a.kind == b.kind
        and a.objects == b.objects
        and abs(a.frame - b.frame) <= 1
        and (a.frame < NUM_FRAMES) == (b.frame < NUM_FRAMES)
        for a, b in zip(one.events, other.events, strict=True)
    )


def video_seed(seed: int, split: str, number: int, attempt: int = 0) -> int:
    """Seed of a video, 64 bits, from that of a set of videos; a further attempt has another.

    Raises:
        ValueError: there is no such split.
    """
    if split not in EPISODES_PER_SPLIT:
        raise ValueError(f"clevrer-sim has the splits {', '.join(EPISODES_PER_SPLIT)}, got {split!r}")
    return int(philox(seed, number, list(EPISODES_PER_SPLIT).index(split)).random_raw(attempt + 1)[-1])


def philox(one: int, other: int, stream: int) -> np.random.Philox:
    """A counter-based generator, whose output no numpy version changes, from two numbers of 64 bits."""
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Philox(key=np.array([one, other], np.uint64), counter=counter)  # a list would go through floats


def _random(seed: int, stream: int) -> np.random.RandomState:
    # The legacy distributions: no numpy version changes them either.
    return np.random.RandomState(philox(seed, 0, stream))


def _draw(random: np.random.RandomState, seed: int, number: int) -> Scene | None:
    """Draw a start; None if there was no room."""
    looks = list(itertools.product(COLORS, MATERIALS, SHAPES))
    properties = [Properties(*looks[i]) for i in random.permutation(len(looks))[:number]]
    resting = int(random.randint(1, max(number - 1, 2))) if number > 1 else 0
    camera, places, bodies = VIEW.camera, [], []
    for i, look in enumerate(properties):
        yaw, turn = random.uniform(-math.pi, math.pi), random.uniform(-2, 2)
        if i < resting:
            place, velocity, turn = _in_picture(random, camera), np.zeros(2), 0.0
        else:
            aim = _in_picture(random, camera)
            if resting and random.random_sample() < 0.75:
                aim = places[random.randint(resting)] + random.uniform(-0.25, 0.25, size=2)
            late = random.random_sample() < _LATE_SHARE
            arrival = _FIRST if i == resting else _LATE if late else _NEXT
            entrance = _enter(random, camera, aim, arrival, _SLOWING[look.shape])
            if entrance is None:
                return None
            place, velocity = entrance
        if any(np.linalg.norm(place - other) < _CLEAR for other in places):
            return None
        places.append(place)
        rolling = look.shape == "sphere"
        spin = (-velocity[1] / HALF, velocity[0] / HALF, 0.0) if rolling else (0.0, 0.0, turn)
        bodies.append(
            Body(
                properties=look,
                position=(float(place[0]), float(place[1]), HALF),
                yaw=yaw,
                velocity=(float(velocity[0]), float(velocity[1]), 0.0),
                angular_velocity=(float(spin[0]), float(spin[1]), float(spin[2])),
            )
        )
    order = random.permutation(number)
    return Scene(tuple(bodies[i] for i in order), seed)


def _in_picture(random: np.random.RandomState, camera: Camera) -> Float[np.ndarray, "2"]:
    """Where on the floor the centre of an object stands that appears at a random place near the middle."""
    (top, bottom), (left, right) = _RESTING
    y, x = random.uniform(top, bottom), random.uniform(left, right)
    pixel = [(x + 1) / 2 * (camera.width - 1) + 0.5, (y + 1) / 2 * (camera.height - 1) + 0.5, 1]
    plane = np.column_stack([camera.matrix[:, :2], camera.matrix[:, 2] * HALF + camera.matrix[:, 3]])
    point = np.linalg.solve(plane, pixel)
    return point[:2] / point[2]


def _enter(
    random: np.random.RandomState,
    camera: Camera,
    aim: Float[np.ndarray, "2"],
    arrival: tuple[float, float],
    slowing: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Place and velocity out of view of what reaches a point in view if nothing stops it; None if none was found."""
    ways = np.linspace(0, _LONGEST_WAY, 120)[:, None]
    for _ in range(_TRIES):
        heading, speed, time = (random.uniform(*each) for each in ((-math.pi, math.pi), _ARRIVAL_SPEED, arrival))
        direction = np.array([math.cos(heading), math.sin(heading)])
        path = np.column_stack([aim - ways * direction, np.full(len(ways), HALF)])
        visible = np.abs(camera.project(path)).max(axis=-1) <= 1 + 2 * MARGIN
        way = speed * time + slowing * time**2 / 2
        if ways[visible].max() < way < _LONGEST_WAY:
            return aim - way * direction, (speed + slowing * time) * direction
    return None


def _is_worth_showing(scene: Scene, run: Run) -> bool:
    seen = in_view(run.position, scene.view.camera)
    collided = [bool(seen[event.frame, list(event.objects)].any()) for event in collisions(run.touching)]
    return bool(seen.any(axis=0).all()) and all(collided) and (bool(collided) or len(scene.bodies) == 1)


@dataclass(frozen=True)
class Options:
    """What tells one set of videos from another.

    Raises:
        ValueError: a value is impossible.
    """

    objects: tuple[int, int] = (3, 6)
    """Fewest and most objects of a video; each number in between is equally likely."""
    size: int = 64
    """Height and width of the frames in pixels."""
    stride: int = 1
    """Frames of the 25 per second from one that is kept to the next."""
    frames: int = NUM_FRAMES
    """Kept frames of a video, at most those that the stride leaves of 128; :func:`parse` takes all of them."""
    fit: str = "center-crop"
    """``center-crop`` shows the middle of CLEVRER's 480x320 pixels, as PROVIDE does; ``squeeze`` shows all of them."""
    crop: int = HEIGHT
    """Side of that middle in CLEVRER's pixels; fewer show less, larger."""
    renderer: str = "mujoco"
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise ValueError(
                f"objects must be N or A-B with 1 <= A <= B <= {MAX_OBJECTS}, got {show_range(self.objects)}"
            )
        if not 8 <= self.size <= 1024:
            raise ValueError(f"size must be 8 to 1024 pixels, got {self.size}")
        if not 1 <= self.stride <= NUM_FRAMES:
            raise ValueError(f"stride must be 1 to {NUM_FRAMES}, got {self.stride}")
        if not 1 <= self.frames <= _kept(self.stride):
            raise ValueError(f"frames must be 1 to {_kept(self.stride)} with stride={self.stride}, got {self.frames}")
        if self.fit not in ("center-crop", "squeeze"):
            raise ValueError(f"fit must be center-crop or squeeze, got {self.fit!r}")
        if not 64 <= self.crop <= HEIGHT:
            raise ValueError(f"crop must be 64 to {HEIGHT}, got {self.crop}")
        if self.renderer not in RENDERERS:
            raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {self.renderer!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")

    @property
    def name(self) -> str:
        """The simulator with all options in a fixed order, so that equal data have one name."""
        return (
            f"clevrer-sim:objects={show_range(self.objects)},size={self.size},stride={self.stride},frames={self.frames},"
            f"fit={self.fit},crop={self.crop},renderer={self.renderer},seed={self.seed}"
        )

    @property
    def fps(self) -> float:
        """Of the frames that are kept."""
        return FPS / self.stride

    @cached_property
    def view(self) -> View:
        """The square picture that is drawn."""
        if self.fit == "squeeze":
            return dataclasses.replace(VIEW, width=self.size, height=self.size)
        fov_y = 2 * math.degrees(math.atan(math.tan(math.radians(VIEW.fov_y) / 2) * self.crop / HEIGHT))
        return dataclasses.replace(VIEW, fov_y=fov_y, width=self.size, height=self.size, aspect=1.0)


_OPTIONS = {
    "objects": Option(whole_range, "objects=N or objects=A-B"),
    "size": Option(whole, "size=PIXELS"),
    "stride": Option(whole, "stride=N"),
    "frames": Option(whole, "frames=N"),
    "fit": Option(str, "fit=center-crop|squeeze"),
    "crop": Option(whole, "crop=PIXELS"),
    "renderer": Option(str, f"renderer={'|'.join(RENDERERS)}"),
    "seed": Option(whole, "seed=N"),
}


def parse(text: str) -> Options:
    """Read options as in a data string: ``objects=3,size=32,stride=4``; the empty string takes the defaults.

    Raises:
        ValueError: a key is unknown or comes twice, or a value is impossible; the message lists what there is.
    """
    values = read_options("clevrer-sim", text, _OPTIONS)
    return Options(**{"frames": _kept(values.get("stride", 1)), **values})


def _kept(stride: int) -> int:
    """Frames that a stride leaves of a video."""
    return -(-NUM_FRAMES // max(stride, 1))


@dataclass(frozen=True)
class ClevrerEpisode:
    """One video, simulated when the first clip is asked for."""

    key: str
    source: str
    options: Options
    seed: int
    """Of this video."""

    @property
    def num_frames(self) -> int:
        """Frames of the whole episode."""
        return self.options.frames

    @cached_property
    def simulated(self) -> tuple[Scene, Run]:
        """How the video starts, and how it goes on in all of the 128 frames."""
        return draw_run(self.seed, self.options.objects)

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        """Draw ``length`` frames from frame ``start``; ``None`` means until the end.

        ``truth`` is that of the reader (``objdyn.datasets.clevrer.read``) for the same video: ``positions`` of the
        centres in the square picture and ``velocities`` (their change per kept frame, at that frame, where the
        reader's are per frame of the video), also of objects out of view, NaN behind the camera; ``present``, in view
        of the whole frame (:func:`in_view`) and, where the picture is a part of it, with the centre in the picture;
        ``segmentation`` (0 background, object i is i + 1); and ``num_objects``, those present in some frame of the
        clip. Where the number of objects varies there is room for the most.

        Raises:
            ValueError: the window leaves the episode; mujoco or what it draws with is missing.
        """
        length = self.num_frames - start if length is None else length
        if start < 0 or length < 1 or start + length > self.num_frames:
            raise ValueError(
                f"{self.source} has {self.num_frames} frames, got start={start} and length={length}; ask for less"
            )
        options, view, (scene, run) = self.options, self.options.view, self.simulated
        kept = np.arange(start, start + length) * options.stride
        painter = renderer(options.renderer, view)
        pictures = [painter.draw(solids(scene, run, frame)) for frame in kept.tolist()]
        position = view.camera.project(run.position[kept])
        present = in_view(run.position, VIEW.camera)[kept]
        if options.fit != "squeeze":
            present &= (np.abs(position) <= 1).all(axis=-1)
        velocity = _projected_velocity(view.camera, run.position[kept], run.velocity[kept]) / options.fps
        number, most = len(scene.bodies), options.objects[1]
        room = ((0, 0), (0, most - number))
        truth = {
            "num_objects": np.asarray(present.any(axis=0).sum(), np.int64),
            "positions": np.pad(position, (*room, (0, 0))).astype(np.float32),
            "present": np.pad(present, room),
            "segmentation": np.stack([picture.mask for picture in pictures]),
            "velocities": np.pad(velocity, (*room, (0, 0))).astype(np.float32),
        }
        frames = np.stack([picture.frame for picture in pictures])
        return Clip(self.key, frames, fps=options.fps, start_frame=start, stride=1, source=self.source, truth=truth)


def episodes(options: Options, split: str, first: int, count: int) -> list[ClevrerEpisode]:
    """Videos ``first`` to ``first + count - 1`` of a split.

    A video depends only on the seed, the number of objects, the split and its own number; the other options change how
    it is shown and not how the objects move.

    Raises:
        ValueError: there is no such split, or the range leaves it.
    """
    if split not in EPISODES_PER_SPLIT:
        raise ValueError(f"clevrer-sim has the splits {', '.join(EPISODES_PER_SPLIT)}, got {split!r}")
    total = EPISODES_PER_SPLIT[split]
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(f"clevrer-sim/{split} has {total} episodes, got first={first} and count={count}; ask for less")
    name = options.name
    return [
        ClevrerEpisode(
            f"{split}-{number:06d}", f"sim:{name}/{split}/{number}", options, video_seed(options.seed, split, number)
        )
        for number in range(first, first + count)
    ]


def solids(scene: Scene, run: Run, frame: int) -> list[Solid]:
    """What there is to draw in a frame."""
    return [
        Solid(body.properties.shape, body.properties.color, body.properties.material, HALF, position, rotation)
        for body, position, rotation in zip(scene.bodies, run.position[frame], run.rotation[frame], strict=True)
    ]


def _projected_velocity(
    camera: Camera, points: Float[np.ndarray, "*batch 3"], velocity: Float[np.ndarray, "*batch 3"]
) -> Float[np.ndarray, "*batch 2"]:
    """Change of ``camera.project(points)`` per second, NaN where that is."""
    u, v, w = np.moveaxis(points @ camera.matrix[:, :3].T + camera.matrix[:, 3], -1, 0)
    w = np.where(w > 0, w, np.nan)
    du, dv, dw = np.moveaxis(velocity @ camera.matrix[:, :3].T, -1, 0)
    pixels = np.stack([dv / w - v * dw / w**2, du / w - u * dw / w**2], axis=-1)
    return 2 * pixels / (np.array([camera.height, camera.width]) - 1)
