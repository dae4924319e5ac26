import math

import numpy as np
import pytest

from objdyn.clevrer import NUM_FRAMES, Properties
from objdyn.simulators import Episode, clevrer, simulator
from objdyn.simulators.clevrer import HALF, Body, Options, Scene

pytest.importorskip("mujoco")

RED, BLUE, GREEN = (Properties(color, "rubber", "sphere") for color in ("red", "blue", "green"))


def resting(look: Properties, x: float, y: float) -> Body:
    return Body(look, (x, y, HALF), 0.3, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def test_an_object_at_rest_stays() -> None:
    looks = [Properties("red", "metal", shape) for shape in ("cube", "sphere", "cylinder")]
    scene = Scene(tuple(resting(look, 2.0 * i, 0.5) for i, look in enumerate(looks)))
    run = clevrer.simulate(scene, 60)
    np.testing.assert_allclose(run.position, np.broadcast_to(run.position[0], run.position.shape), atol=3e-4)
    assert not run.touching.any()


@pytest.mark.parametrize(
    ("shape", "slowing"),
    [("cube", 0.045 * 9.81), ("cylinder", 0.045 * 9.81), ("sphere", 0.011 * 9.81 / (1.4 * 0.2))],
)
def test_friction_slows_an_object_as_coulomb_says(shape: str, slowing: float) -> None:
    # Gliding: mu g. Rolling: the torque c m g stops a momentum of m v r (1 + 2/5), so c g / (1.4 r).
    spin = (-0.6 / HALF, 0.8 / HALF, 0.0) if shape == "sphere" else (0.0, 0.0, 0.0)
    body = Body(Properties("red", "metal", shape), (0.0, 0.0, HALF), 0.0, (0.8, 0.6, 0.0), spin)
    speed = np.linalg.norm(clevrer.simulate(Scene((body,)), 26).velocity[:, 0, :2], axis=-1)
    assert speed[0] == 1
    assert speed[-1] == pytest.approx(1 - slowing, abs=0.01)


def test_videos_show_their_objects_and_collisions() -> None:
    numbers = set()
    for seed in range(6):
        scene, run = clevrer.draw_run(seed)
        n = len(scene.bodies)
        numbers.add(n)
        seen = clevrer.in_view(run.position, scene.view.camera)
        assert len(set(scene.properties)) == n
        assert seen.any(axis=0).all()
        assert len(clevrer.collisions(run.touching)) >= 1
        start = np.linalg.norm(run.position[0][:, None] - run.position[0], axis=-1)[~np.eye(n, dtype=bool)]
        assert start.min() >= 2 * math.sqrt(2) * HALF  # the diagonals of two cubes: nothing overlaps at the start
        still = np.linalg.norm(run.velocity[0], axis=-1) == 0
        assert still.any()
        assert not still.all()
        assert seen[0, still].all()
        assert not seen[0, ~still].any()
    assert numbers <= {3, 4, 5, 6}
    assert len(numbers) > 1


def test_a_video_depends_on_its_number_and_not_on_its_neighbours() -> None:
    many = clevrer.episodes(Options(objects=(3, 3)), "val", 0, 4)
    (alone,) = clevrer.episodes(Options(objects=(3, 3), size=32), "val", 2, 1)
    assert isinstance(many[2], Episode)
    assert many[2].key == "val-000002"
    assert many[2].simulated[0] == alone.simulated[0] != many[1].simulated[0]


def test_options_have_one_name_and_one_meaning() -> None:
    chosen = simulator("clevrer-sim:objects=3,size=32,stride=4")
    assert chosen.name == (
        "clevrer-sim:objects=3,size=32,stride=4,frames=32,fit=center-crop,crop=320,renderer=mujoco,seed=0"
    )
    assert (chosen.num_frames, chosen.height, chosen.width, chosen.fps) == (32, 32, 32, 6.25)
    assert clevrer.parse(chosen.name.partition(":")[2]) == clevrer.parse("objects=3,size=32,stride=4")
    assert simulator("clevrer-sim").num_frames == NUM_FRAMES


@pytest.mark.parametrize(
    "text",
    ["objects=0", "objects=4-3", "size=4", "stride=0", "stride=129", "stride=4,frames=33", "fit=whole", "crop=321"],
)
def test_impossible_options_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"got|wants"):
        clevrer.parse(text)


def test_a_clip_outside_the_episode_is_refused() -> None:
    (episode,) = clevrer.episodes(Options(stride=4, frames=8), "train", 0, 1)
    with pytest.raises(ValueError, match="8 frames"):
        episode.clip(6, 3)
    with pytest.raises(ValueError, match="10000 episodes"):
        clevrer.episodes(Options(), "train", 9_999, 2)
