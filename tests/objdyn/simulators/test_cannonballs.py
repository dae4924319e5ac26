import math

import numpy as np
import pytest

from objdyn.clips import Clip, from_sample, to_sample
from objdyn.simulators import SIMULATORS, Simulator, cannonballs, simulator
from objdyn.simulators.cannonballs import FORCE, STEP, Options

INDEX_TOLERANCE = 1e-4  # of a float32 coordinate, in pixels


def cannons(options: str = "") -> Simulator:
    return simulator(f"cannonballs:{options}" if options else "cannonballs")


def clips(options: str = "", split: str = "train", count: int = 30) -> list[Clip]:
    return [episode.clip() for episode in cannons(options).episodes(split, 0, count, None)]


def tracks(options: Options, count: int, split: str = "train") -> list[cannonballs.Tracks]:
    return [cannonballs.simulate(options, split, number) for number in range(count)]


def balls_of(options: Options, count: int) -> cannonballs.Tracks:
    """All balls of some videos, (t, balls, 2)."""
    fields = zip(*tracks(options, count), strict=True)
    return cannonballs.Tracks(*(np.concatenate(field, axis=1) for field in fields))


@pytest.fixture(scope="module")
def shots() -> cannonballs.Tracks:
    return balls_of(Options(balls=(3, 3)), 400)


def test_balls_move_by_the_papers_state_space_model(shots: cannonballs.Tracks) -> None:
    identity = np.eye(2)
    transition = np.block([[identity, STEP * identity], [0 * identity, identity]])
    state = np.concatenate([shots.positions[0], shots.velocities[0]], axis=-1)
    for position, velocity in zip(shots.positions, shots.velocities, strict=True):
        np.testing.assert_allclose(np.concatenate([position, velocity], axis=-1), state, atol=1e-12)
        state = state @ transition.T + np.array(FORCE)


def test_second_differences_are_gravity_alone(shots: cannonballs.Tracks) -> None:
    curvature = np.diff(shots.positions, n=2, axis=0)
    np.testing.assert_allclose(curvature[..., 0], 0, atol=1e-14)
    np.testing.assert_allclose(curvature[..., 1], 2 * FORCE[1], atol=1e-14)
    assert pytest.approx((0, -1.1036e-3, 0, -0.14715), rel=1e-4) == FORCE


def test_shots_are_those_of_the_paper(shots: cannonballs.Tracks) -> None:
    (x, y), (vx, vy) = shots.positions[0].T, shots.velocities[0].T
    right = vx < 0
    assert abs(right.mean() - 0.5) < 3 * 0.5 / math.sqrt(1200)
    assert np.hypot(vx, vy).min() >= 2
    assert np.hypot(vx, vy).max() <= 3
    angle = np.degrees(np.arctan2(vy, np.abs(vx)))
    assert angle.min() >= 40
    assert angle.max() <= 60
    start = x - 0.9 * right
    for values, low, high in ((start, -0.5, -0.1), (y, -0.5, 0.5), (angle, 40, 60), (np.hypot(vx, vy), 2, 3)):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        # Three standard errors of the mean of a uniform distribution.
        assert values.mean() == pytest.approx((low + high) / 2, abs=3 * (high - low) / math.sqrt(12 * 1200))


def test_noise_has_the_papers_variance_and_no_memory(shots: cannonballs.Tracks) -> None:
    noise = (shots.rendered - shots.positions).reshape(30, -1)
    assert noise.var() == pytest.approx(0.001, rel=3 * math.sqrt(2 / noise.size))
    assert noise.mean() == pytest.approx(0, abs=3 * math.sqrt(0.001 / noise.size))
    assert np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1] == pytest.approx(0, abs=3 / math.sqrt(noise.size))


@pytest.mark.parametrize(("frames", "max_x"), [(30, 1.0), (50, 1.69)])
def test_no_ball_flies_farther_than_max_x_nor_leaves_the_window_without_noise(frames: int, max_x: float) -> None:
    options = Options(frames=frames)
    assert options.distance == max_x
    positions = balls_of(options, 600).positions
    way = np.abs(positions[-1, :, 0] - positions[0, :, 0])
    longest = 3 * math.cos(math.radians(40)) * STEP * (frames - 1)
    assert 0.97 * longest < way.max() <= longest <= max_x
    for axis, (low, high) in enumerate(options.window):
        assert low < positions[..., axis].min()
        assert positions[..., axis].max() < high


def test_the_window_of_30_frames_is_fixed_and_its_sides_touch_whole_balls() -> None:
    options = Options()
    assert options.window == ((-0.7, 1.0), (-0.95, 0.95))
    corners = np.array([[-0.7, 0.95], [1.0, -0.95]])
    index = (cannonballs.to_coordinates(corners, options) + 1) / 2 * 47
    np.testing.assert_allclose(index, [[2, 2], [45, 45]], atol=1e-12)
    np.testing.assert_allclose(cannonballs.to_world(index / 47 * 2 - 1, options), corners, atol=1e-12)
    # The other reading of max_x puts starts from the right into [0.31, 0.71].
    other = balls_of(Options(max_x=0.9), 200)
    x = other.positions[0, other.velocities[0, :, 0] < 0, 0]
    assert 0.31 <= x.min() < 0.33
    assert 0.69 < x.max() <= 0.71


def test_image_rows_go_down_where_the_world_goes_up() -> None:
    for clip in clips("balls=1", count=10):
        rows = clip.truth["positions"][:, 0, 0]
        assert rows[1] < rows[0], "a ball starts upwards, to lower rows"
        assert (np.diff(rows, n=2) > 0).all(), "gravity bends it to higher rows"
        white = np.argwhere(clip.frames[0, ..., 0])[:, 0].mean()
        assert white == pytest.approx((clip.truth["rendered_positions"][0, 0, 0] + 1) / 2 * 47, abs=0.5)


def test_acceleration_in_coordinates_is_the_second_difference_of_positions() -> None:
    options = Options(size=32)
    world = cannonballs.simulate(options, "val", 2).positions
    curvature = np.diff(cannonballs.to_coordinates(world, options), n=2, axis=0)
    np.testing.assert_allclose(curvature, np.broadcast_to(options.acceleration, curvature.shape), atol=1e-13)
    assert options.acceleration[0] > 0


def test_velocities_are_the_change_of_positions_per_frame() -> None:
    for clip in clips("frames=50", count=3):
        positions, velocities = clip.truth["positions"], clip.truth["velocities"]
        # Exact at the middle of two frames, since a parabola is the sum of its tangents' means.
        np.testing.assert_allclose(np.diff(positions, axis=0), (velocities[1:] + velocities[:-1]) / 2, atol=1e-6)


def test_a_ball_covers_12_57_pixels_around_where_it_is_rendered() -> None:
    areas = []
    for clip in clips("balls=1", count=60):
        white = clip.frames[..., 0] > 0
        areas.append(white.sum(axis=(1, 2)))
        centre = np.stack([np.argwhere(frame).mean(axis=0) for frame in white])
        index = (clip.truth["rendered_positions"][:, 0] + 1) / 2 * 47
        assert np.abs(centre - index).max() < 0.5
        assert (index >= 2 - INDEX_TOLERANCE).all()
        assert (index <= 45 + INDEX_TOLERANCE).all()
    assert np.mean(areas) == pytest.approx(4 * np.pi, abs=0.05)
    assert {*np.unique(areas)} <= {*range(9, 17)}


def test_drawing_equals_a_distance_to_every_pixel() -> None:
    centres = np.random.default_rng(0).uniform(-3, 26, size=(40, 3, 2))
    drawn = cannonballs.label(centres / 23 * 2 - 1, 24)
    rows, columns = np.mgrid[:24, :24]
    for t, frame in enumerate(drawn):
        expected = np.zeros((24, 24), np.uint8)
        for ball, (y, x) in enumerate(centres[t]):
            expected[np.square(rows - y) + np.square(columns - x) <= 4] = ball + 1
        np.testing.assert_array_equal(frame, expected)


def test_balls_far_outside_of_the_frame_are_not_drawn() -> None:
    far = np.array([[[-40.0, 0.0], [0.0, 1e6]], [[0.0, -2.0], [3.0, 3.0]]])
    assert not cannonballs.label(far, 16).any()
    assert np.count_nonzero(cannonballs.label(np.zeros((1, 1, 2)), 17)) == 13


@pytest.mark.parametrize(("balls", "percent"), [(1, 0.54), (2, 1.08), (3, 1.60)])
def test_white_share_is_that_of_the_paper(balls: int, percent: float) -> None:
    white = np.mean([(clip.frames[..., 0] > 0).mean() for clip in clips(f"balls={balls}", count=100)])
    # Over 1000 videos 0.545, 1.075 and 1.596; the share of 100 has a standard error of at most 0.007.
    assert 100 * white == pytest.approx(percent, abs=0.025)


def test_numbers_of_balls_take_turns_with_room_for_the_most() -> None:
    found = clips(count=9, split="test")
    assert [int(clip.truth["num_objects"]) for clip in found] == [1, 2, 3] * 3
    for clip in found:
        number = int(clip.truth["num_objects"])
        assert clip.truth["present"].shape == (30, 3)
        assert clip.truth["present"].sum(axis=1).tolist() == [number] * 30
        for name in ("positions", "rendered_positions", "velocities"):
            assert clip.truth[name].shape == (30, 3, 2)
            assert (clip.truth[name][:, number:] == 0).all()
        assert set(np.unique(clip.truth["segmentation"])) <= {*range(number + 1)}
        np.testing.assert_array_equal(clip.truth["segmentation"] > 0, clip.frames[..., 0] > 0)


def test_splits_have_a_shots_videos_of_each_number_to_test_with() -> None:
    assert cannons().episodes_per_split == {"train": 1_000_000, "val": 3000, "test": 3000}
    assert cannons("balls=2").episodes_per_split == {"train": 1_000_000, "val": 1000, "test": 1000}


@pytest.mark.parametrize("options", ["", "balls=2,size=32,frames=50,max_x=0.9,seed=3"])
def test_an_episode_is_the_same_bytes_alone_and_among_others(options: str) -> None:
    among = cannons(options).episodes("val", 40, 30, None)[17]
    alone = cannons(options).episodes("val", 57, 1, None)[0]
    one, other = among.clip(), alone.clip()
    assert one.key == other.key == alone.key == "val-000057"
    assert one.source == other.source == f"sim:{cannons(options).name}/val/57"
    assert to_sample(one) == to_sample(other)
    cut = one.window(7, 5)
    assert to_sample(among.clip(7, 5)) == to_sample(cut)


def test_clips_survive_storage_with_all_of_their_truth() -> None:
    (clip,) = clips("balls=2,size=32", count=1)
    for codec in ("zstd", "webp-strip"):
        again = from_sample(clip.key, to_sample(clip, codec))
        np.testing.assert_array_equal(again.frames, clip.frames)
        assert again.truth.keys() == clip.truth.keys()
        for name, array in clip.truth.items():
            np.testing.assert_array_equal(again.truth[name], array)
            assert again.truth[name].dtype == array.dtype


def test_splits_seeds_and_numbers_tell_videos_apart() -> None:
    starts = {
        cannons(options).episodes(split, number, 1, seed)[0].clip(0, 1).truth["positions"].tobytes()
        for options in ("", "seed=2")
        for split in ("train", "val", "test")
        for number in (0, 3)
        for seed in (None, 5)
    }
    # --seed 5 replaces the seed of the options.
    assert len(starts) == 3 * 2 * 3


def test_size_leaves_the_motion_as_it_is_and_fewer_frames_are_the_beginning() -> None:
    whole = cannonballs.simulate(Options(), "train", 5)
    for options in (Options(size=32), Options(frames=12)):
        part = cannonballs.simulate(options, "train", 5)
        for field, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(field, expected[: options.frames])
    np.testing.assert_array_equal(
        clips("frames=12", count=3)[2].frames, clips(count=3)[2].frames[:12], err_msg="the frame shows the same window"
    )


def test_options_have_one_name_however_they_are_written() -> None:
    name = "cannonballs:balls=3,size=32,frames=30,max_x=1,seed=0"
    assert cannons("size=32,balls=3-3").name == cannons("balls=3,max_x=1.00,size=32").name == name
    assert simulator(name).name == name
    assert cannons("frames=50").name.endswith("frames=50,max_x=1.69,seed=0")
    assert simulator("cannonballs", seed=7).name.endswith("seed=7")
    assert SIMULATORS["cannonballs"].name == cannons().name


def test_the_registry_states_what_clips_have() -> None:
    for chosen in (cannons(), cannons("size=32,frames=50,balls=2-4")):
        for split, total in chosen.episodes_per_split.items():
            episode = chosen.episodes(split, total - 1, 1, None)[0]
            clip = episode.clip()
            assert clip.frames.shape == (chosen.num_frames, chosen.height, chosen.width, 3)
            assert clip.fps == chosen.fps == pytest.approx(1 / STEP)
            assert episode.num_frames == chosen.num_frames
            assert set(np.unique(clip.frames)) == {0, 255}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cannonballs:mass=3", "no option 'mass=3'; write KEY=VALUE,KEY=VALUE with balls=N or balls=A-B, size=PIXELS"),
        ("cannonballs:max_x=-1", "wants max_x=LENGTH, got 'max_x=-1'"),
        ("cannonballs:max_x=101", "max_x must be 0 to 100, got 101"),
        ("cannonballs:balls=0", "1 <= A <= B <= 10, got 0"),
        ("cannonballs:balls=3-1", "got 3-1"),
        ("cannonballs:size=7", "size must be 8 to 1024"),
        ("cannonballs:frames=0", "frames must be 1 to 1000"),
        ("cannonballs:seed=9223372036854775808", "seed must be in"),
        ("cannonballs:size=32,size=48", "size of cannonballs is given twice"),
    ],
)
def test_wrong_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulator(spec)


def test_ranges_outside_of_a_split_are_refused() -> None:
    with pytest.raises(ValueError, match="has the splits train, val, test, got 'night'"):
        cannons().episodes("night", 0, 1, None)
    with pytest.raises(ValueError, match="val has 3000 episodes, got first=2999 and count=2"):
        cannons().episodes("val", 2999, 2, None)
    with pytest.raises(ValueError, match="30 frames, got start=29 and length=2"):
        cannons().episodes("val", 0, 1, None)[0].clip(29, 2)
