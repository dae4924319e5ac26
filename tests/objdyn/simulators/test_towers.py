import numpy as np
import pytest

from objdyn.clevrer import COLORS, Properties
from objdyn.simulators import towers
from objdyn.simulators.clevrer import HALF, Body, Scene

pytest.importorskip("mujoco")

STILL = (0.0, 0.0, 0.0)


def tower(*shifts: float, turn: float = 0.0) -> Scene:
    """Cubes whose centres are ``shifts`` of half a cube from the axis."""
    return Scene(
        tuple(
            Body(
                Properties(COLORS[i], "rubber", "cube"), (HALF * shift, 0.0, HALF * (2 * i + 1)), turn * i, STILL, STILL
            )
            for i, shift in enumerate(shifts)
        )
    )


def overhang(scene: Scene) -> float:
    """How far the centre of mass of what lies on a cube is inside its upper face, at least over all cubes."""
    place = np.array([body.position[:2] for body in scene.bodies])
    margins = []
    for level, body in enumerate(scene.bodies[:-1]):
        x, y = place[level + 1 :].mean(axis=0) - place[level]
        cos, sin = np.cos(body.yaw), np.sin(body.yaw)
        margins.append(HALF - max(abs(cos * x + sin * y), abs(cos * y - sin * x)))
    return min(margins)


def test_a_straight_tower_stands() -> None:
    standing = towers.simulate(tower(0, 0, 0, 0, turn=0.2))
    assert standing.stands
    assert np.abs(standing.run.position[-1] - standing.run.position[0]).max() < 2e-3


@pytest.mark.parametrize("shifts", [(0, 1.1), (0, 0.7, 1.4), (0, -0.2, 0.9)])
def test_an_overhanging_tower_falls(shifts: tuple[float, ...]) -> None:
    fallen = towers.simulate(tower(*shifts))
    assert not fallen.stands
    assert fallen.run.position[-1, -1, 2] < fallen.run.position[0, -1, 2] - HALF / 2


def test_a_counterweight_holds_an_overhanging_cube() -> None:
    # The middle cube's centre is over the edge, but not that of both.
    assert towers.simulate(tower(0, 0.6, -0.3)).stands


def test_labels_agree_with_statics() -> None:
    labels = []
    for seed in range(30):
        scene = towers.draw_scene(seed)
        inside = overhang(scene)
        if abs(inside) > 0.01:
            labels.append(towers.simulate(scene, 51).stands)
            assert labels[-1] == (inside > 0), (seed, inside)
    assert len(labels) > 20
    assert 5 < sum(labels) < len(labels) - 5


def test_a_tower_depends_on_its_seed_alone() -> None:
    assert towers.draw_scene(7) == towers.draw_scene(7) != towers.draw_scene(8)
    assert {len(towers.draw_scene(seed, (2, 4)).bodies) for seed in range(12)} == {2, 3, 4}


def test_a_tower_is_a_world_without_a_future() -> None:
    made = towers.simulate(towers.draw_scene(1))
    world = towers.to_world(made, 4)
    assert world.shown == world.history.frames == towers.NUM_FRAMES
    assert not world.without
    assert world.motion.in_view.shape == (towers.NUM_FRAMES, len(made.scene.bodies))


def test_impossible_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 to 4 cubes"):
        towers.draw_scene(0, (1, 3))
    with pytest.raises(ValueError, match="more than 50"):
        towers.simulate(tower(0, 0), 50)
