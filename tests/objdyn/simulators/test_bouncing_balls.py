from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from objdyn.simulators import Simulator, bouncing_balls, simulator
from objdyn.simulators.bouncing_balls import BOX, KINDS, Options


def simulate(options: Options, videos: int = 40) -> tuple[bouncing_balls.Start, bouncing_balls.States]:
    start = bouncing_balls.draw(options, "train", 0, videos)
    states = bouncing_balls.simulate(start.positions, start.velocities, start.radii, start.masses, options.frames)
    return start, states


def collide(
    position: list[list[float]], velocity: list[list[float]], radii: list[float], masses: list[float], frames: int = 3
) -> bouncing_balls.States:
    arrays = [np.array([values], np.float64) for values in (position, velocity, radii, masses)]
    return bouncing_balls.simulate(*arrays, num_frames=frames)


def balls(options: str = "") -> Simulator:
    return simulator(f"bouncing-balls:{options}" if options else "bouncing-balls")


@pytest.mark.parametrize("options", [Options(), Options((6, 8)), Options((2, 12), radius=(0.3, 1.0), frames=200)])
def test_kinetic_energy_is_conserved(options: Options) -> None:
    start, states = simulate(options)
    energy = (start.masses[:, None] * np.square(states.velocities).sum(-1)).sum(-1)
    assert states.collided.any()
    assert energy == pytest.approx(np.broadcast_to(energy[:, :1], energy.shape), rel=1e-12)


def test_collisions_of_balls_conserve_momentum() -> None:
    states = collide([[3, 5], [6, 5.7]], [[0.5, 0.1], [-0.9, 0]], [0.8, 1.0], [1.0, 6.0])
    momentum = states.velocities[0, :, 0] + 6 * states.velocities[0, :, 1]
    assert states.collided[0].tolist() == [[False, False], [True, True], [False, False]]
    assert np.abs(states.velocities[0, -1] - states.velocities[0, 0]).min() > 1e-3
    assert momentum == pytest.approx(np.broadcast_to(momentum[:1], momentum.shape), abs=1e-12)


def test_equal_balls_that_meet_head_on_swap_their_velocities() -> None:
    states = collide([[3, 5], [6.5, 5]], [[1, 0], [-2, 0]], [1, 1], [3, 3], frames=2)
    assert states.velocities[0, 1] == pytest.approx(np.array([[-2, 0], [1, 0]]))
    # They touch after half a frame, at 3.5 and 5.5.
    assert states.positions[0, 1] == pytest.approx(np.array([[2.5, 5], [6, 5]]))


def test_walls_turn_one_component_of_the_velocity() -> None:
    states = collide([[8.5, 2]], [[1, -0.25]], [1], [1], frames=6)
    assert states.positions[0, :, 0] == pytest.approx(
        np.array([[8.5, 2], [8.5, 1.75], [7.5, 1.5], [6.5, 1.25], [5.5, 1], [4.5, 1.25]])
    )
    assert np.abs(states.velocities[0, :, 0]) == pytest.approx(np.broadcast_to([1, 0.25], (6, 2)))
    assert not states.collided.any()


@pytest.mark.parametrize("options", [Options(frames=300), Options((6, 8)), Options((1, 1), radius=(4.5, 4.5))])
def test_balls_never_overlap_nor_leave_the_box(options: Options) -> None:
    start, states = simulate(options)
    real, radii = start.radii > 0, start.radii[:, None, :, None]
    slack = np.minimum(states.positions - radii, BOX - radii - states.positions).min(-1)
    assert slack[np.broadcast_to(real[:, None], slack.shape)].min() > -1e-9
    one, two = np.triu_indices(real.shape[1], 1)
    distance = np.linalg.norm(states.positions[:, :, one] - states.positions[:, :, two], axis=-1)
    both = (real[:, one] & real[:, two])[:, None]
    assert np.where(both, distance - (start.radii[:, one] + start.radii[:, two])[:, None], 1).min(initial=1) > -1e-9


def test_balls_that_collide_move_apart() -> None:
    _, states = simulate(Options(frames=200), 100)
    # In the script of Sutskever a pair may stay in contact for many frames; here it leaves at once.
    twice = states.collided[:, 2:] & states.collided[:, 1:-1] & states.collided[:, :-2]
    assert states.collided.sum() > 1000
    assert twice.sum() < 0.01 * states.collided.sum()


def test_videos_begin_with_the_joint_speed_and_the_kinds_of_the_original() -> None:
    start = bouncing_balls.draw(Options((6, 8)), "val", 100, 200)
    real = start.radii > 0
    assert set(real.sum(1)) == {6, 7, 8}
    assert np.linalg.norm(start.velocities, axis=(1, 2)) == pytest.approx(1 / 3)
    assert set(zip(start.radii[real], start.masses[real], strict=True)) == set(KINDS)
    assert (start.velocities[~real] == 0).all()


def test_radii_of_a_range_weigh_their_square() -> None:
    start = bouncing_balls.draw(Options(radius=(0.5, 0.7)), "test", 0, 50)
    assert start.radii.min() >= 0.5
    assert start.radii.max() <= 0.7
    assert start.masses == pytest.approx(start.radii**2)


@pytest.mark.parametrize("options", ["", "balls=6-8,size=32,colors=random4"])
def test_an_episode_is_the_same_alone_and_among_others(options: str) -> None:
    episodes = balls(options).episodes("val", 40, 30, None)
    alone = balls(options).episodes("val", 57, 1, None)[0]
    clip, other = episodes[17].clip(), alone.clip()
    assert (clip.key, clip.source) == (other.key, other.source) == (alone.key, f"sim:{balls(options).name}/val/57")
    assert np.array_equal(clip.frames, other.frames)
    for name in clip.truth:
        assert np.array_equal(clip.truth[name], other.truth[name]), name
    assert np.array_equal(episodes[17].clip(7, 5).truth["positions"], clip.window(7, 5).truth["positions"])
    assert np.array_equal(episodes[17].clip(7, 5).frames, clip.frames[7:12])


def test_splits_seeds_and_numbers_tell_videos_apart() -> None:
    starts = {
        balls(options).episodes(split, number, 1, seed)[0].clip(0, 1).truth["positions"].tobytes()
        for options in ("", "seed=2")
        for split in ("train", "val", "test")
        for number in (0, 1)
        for seed in (None, 5)
    }
    # --seed 5 replaces the seed of the options.
    assert len(starts) == 3 * 2 * 3


def test_size_and_colours_leave_the_motion_as_it_is() -> None:
    one, other = (balls(o).episodes("train", 3, 1, None)[0].clip() for o in ("", "colors=random8,size=64"))
    assert np.array_equal(one.truth["positions"], other.truth["positions"])
    assert np.array_equal(one.truth["segmentation"], other.truth["segmentation"])
    small = balls("size=32").episodes("train", 3, 1, None)[0].clip()
    centres, small_centres = ((clip.truth["positions"] + 1) / 2 for clip in (one, small))
    assert (small_centres * 31 + 0.5) * 2 == pytest.approx(centres * 63 + 0.5, abs=1e-4)


def test_segmentation_agrees_with_frames_and_positions() -> None:
    clip = balls("balls=3-6,colors=8").episodes("train", 0, 8, None)[5].clip()
    labels, present = clip.truth["segmentation"], clip.truth["present"]
    assert np.array_equal(labels > 0, clip.frames.any(axis=-1))
    assert clip.truth["num_objects"] == present[0].sum() == labels.max()
    assert present.shape == (51, 6)
    for ball in range(1, labels.max() + 1):
        assert len(np.unique(clip.frames[labels == ball], axis=0)) == 1
        centre = np.stack([np.argwhere(frame == ball).mean(0) for frame in labels])
        assert (clip.truth["positions"][:, ball - 1] + 1) / 2 * 63 == pytest.approx(centre, abs=0.5)


def test_collisions_cover_the_balls_that_bounced_and_a_rim() -> None:
    episode = bouncing_balls.episodes(Options((6, 6)), "train", 0, 1)[0]
    clip, collided = episode.clip(), episode.block.states.collided[0]
    assert collided.any()
    for frame in range(51):
        labels, marks = clip.truth["segmentation"][frame], clip.truth["collisions"][frame]
        balls_there = np.isin(labels, np.flatnonzero(collided[frame]) + 1)
        assert marks[balls_there].all()
        assert not marks[ndimage.binary_dilation(balls_there, np.ones((3, 3)), 2) == 0].any()


def test_fixed_colours_go_with_the_ball_and_random_ones_differ_by_video() -> None:
    def colors(options: str) -> np.ndarray:
        return bouncing_balls.draw(bouncing_balls.parse(options), "train", 0, 30).colors

    fixed = colors("balls=6,colors=4")
    assert (fixed == fixed[:1]).all()
    assert np.array_equal(fixed[:, 4:], fixed[:, :2])
    assert len(np.unique(colors("balls=8,colors=8")[0], axis=0)) == 8
    for options in ("balls=4,colors=random4", "balls=4,colors=random8"):
        drawn = colors(options)
        assert all(len(np.unique(video, axis=0)) == 4 for video in drawn)
        assert len(np.unique(drawn[:, 0], axis=0)) > 3
    assert all(len(np.unique(video, axis=0)) == 4 for video in colors("balls=6,colors=random4"))


def test_options_have_one_name_however_they_are_written() -> None:
    name = "bouncing-balls:balls=3,size=32,colors=binary,frames=51,radius=rnem,seed=0"
    assert balls("size=32,balls=3-3").name == balls("balls=3,radius=rnem,size=32").name == name
    assert simulator(name).name == name
    assert balls("radius=0.50-0.6").name.endswith("radius=0.5-0.6,seed=0")
    assert simulator("bouncing-balls", seed=7).name.endswith("seed=7")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bouncing-balls:mass=3", r"no option 'mass=3'; write KEY=VALUE.* with balls=N or balls=A-B, size=PIXELS"),
        ("bouncing-balls:size", "no option 'size'"),
        ("bouncing-balls:size=x", "wants size=PIXELS, got 'size=x'"),
        ("bouncing-balls:size=4", "size must be 8 to 1024"),
        ("bouncing-balls:balls=0", "1 <= A <= B <= 20, got 0"),
        ("bouncing-balls:balls=5-3", "got 5-3"),
        ("bouncing-balls:balls=20", "20 balls of radius 1 do not fit"),
        ("bouncing-balls:colors=red", "one of binary, 4, 8, random4, random8, got 'red'"),
        ("bouncing-balls:frames=0", "frames must be 1 to 1000"),
        ("bouncing-balls:radius=2", "wants radius=rnem or radius=LOW-HIGH"),
        ("bouncing-balls:radius=1-5", "HIGH <= 4.5, got 1-5"),
        ("bouncing-balls:seed=9223372036854775808", "seed must be in"),
        ("bouncing-balls:balls=3,balls=4", "balls of bouncing-balls is given twice"),
        ("balls-interaction:balls=4", "balls-interaction takes no options, got 'balls=4'; write sim:balls-interaction"),
        ("moons:balls=4", "unknown simulator 'moons'; choose one of sim:balls-interaction, sim:bouncing-balls"),
    ],
)
def test_wrong_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulator(spec)


def test_ranges_outside_of_a_split_are_refused() -> None:
    with pytest.raises(ValueError, match="has the splits train, val, test, got 'night'"):
        balls().episodes("night", 0, 1, None)
    with pytest.raises(ValueError, match="val has 10000 episodes, got first=9999 and count=2"):
        balls().episodes("val", 9999, 2, None)
    with pytest.raises(ValueError, match="51 frames, got start=50 and length=2"):
        balls().episodes("val", 9999, 1, None)[0].clip(50, 2)


def test_the_most_crowded_box_is_filled_and_an_impossible_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.isfinite(bouncing_balls.draw(Options((14, 14), radius=(1.0, 1.0)), "train", 0, 3).positions).all()
    options = Options()
    monkeypatch.setattr(bouncing_balls, "BOX", 3.0)
    with pytest.raises(ValueError, match="no room for 4 balls after 200 starts"):
        bouncing_balls.draw(options, "train", 0, 1)


@pytest.mark.parametrize(("name", "number"), [("balls4mass_rnem1", 4), ("balls678mass_rnem2", 8)])
def test_sizes_and_speeds_are_those_of_the_original_frames(shared: Path, name: str, number: int) -> None:
    with Image.open(shared / f"data/rnem_balls/{name}.gif") as image:
        real = np.stack([_frame(image, i) for i in range(500)])
    ours = np.concatenate(
        [e.clip().frames[..., 0] > 0 for e in balls(f"balls={number}").episodes("train", 0, 10, None)]
    )
    radii, steps = _measure(real)
    our_radii, our_steps = _measure(ours)
    for kind, _ in KINDS:
        for found in (radii, our_radii):
            near = found[np.abs(found - kind * 6.4) < 0.4]
            assert np.median(near) == pytest.approx(kind * 6.4, abs=0.06)
    off = np.abs(radii[:, None] - np.array([5.12, 6.4])).min(axis=1)
    assert np.quantile(off, 0.99) < 0.15
    assert np.sqrt(np.mean(our_steps**2)) == pytest.approx(np.sqrt(np.mean(steps**2)), rel=0.2)


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("balls4mass_rnem1", 3, 1),
        ("balls4mass_rnem2", 0, 4),
        ("balls678mass_rnem1", 4, 2),
        ("balls678mass_rnem2", 7, 1),
    ],
)
def test_the_same_balls_cover_the_same_share_as_in_the_original(
    shared: Path, name: str, small: int, large: int
) -> None:
    with Image.open(shared / f"data/rnem_balls/{name}.gif") as image:
        real = np.mean([_frame(image, i) for i in range(0, 500, 5)])
    options = Options((small + large, small + large))
    radii = bouncing_balls.draw(options, "train", 0, 100).radii
    alike = int(np.argmax((radii == KINDS[1][0]).sum(axis=1) == large))
    assert (radii[alike] == KINDS[0][0]).sum() == small
    clip = bouncing_balls.episodes(options, "train", alike, 1)[0].clip()
    assert np.mean(clip.frames > 0) == pytest.approx(real, abs=5e-4)
    assert real == pytest.approx((np.square([0.8, 1.0]) @ [small, large]) * np.pi / 100, abs=5e-4)


def _frame(image: Image.Image, number: int) -> np.ndarray:
    image.seek(number)
    return np.asarray(image.convert("L"))[:64] > 127


def _measure(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radii of round spots off the border, and how far each moves to the next frame, in pixels."""
    radii, steps = [], []
    before = np.zeros((0, 3))
    for frame in video:
        spots = []
        labels = np.asarray(cast(Any, ndimage.label(frame))[0])
        for i, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
            spot = labels[rows, columns] == i
            height, width = spot.shape
            inside = rows.start > 0 and columns.start > 0 and rows.stop < 64 and columns.stop < 64
            if inside and abs(height - width) < 2 and np.pi * ((height + width) / 4) ** 2 < 1.12 * spot.sum():
                y, x = np.argwhere(spot).mean(0)
                spots.append((y + rows.start, x + columns.start, np.sqrt(spot.sum() / np.pi)))
        after = np.array(spots).reshape(-1, 3)
        radii.extend(after[:, 2])
        distance = np.linalg.norm(before[:, None, :2] - after[None, :, :2], axis=-1)
        same = np.abs(before[:, None, 2] - after[None, :, 2]) < 0.15
        nearest = np.where(same, distance, np.inf).min(axis=1, initial=np.inf)
        steps.extend(nearest[nearest < 6])
        before = after
    return np.array(radii), np.array(steps)
