import itertools

import h5py
import numpy as np
import pytest

from objdyn.simulators import SIMULATORS, balls

FIRST_PIXEL, LAST_PIXEL = -1.0, 1.0


def published(shared, split: str) -> dict[str, np.ndarray]:
    with h5py.File(shared / "data" / "balls_interaction" / f"{split}.hdf5") as file:
        return {name: np.asarray(file[name]) for name in ("positions", "velocities", "colors", "imgs")}


@pytest.mark.parametrize("split", ["train", "val"])
def test_trajectories_equal_the_published_episodes(shared, split):
    real = published(shared, split)
    states = balls.simulate_split(split, 0, len(real["positions"]))
    np.testing.assert_array_equal(states.colors, real["colors"][:, 0])
    # Equal bit for bit where the C library's log rounds as the authors' did; a last-bit difference in a start velocity
    # would grow with every collision, hence a tolerance of a millionth of a pixel.
    np.testing.assert_allclose(states.positions, real["positions"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(states.velocities, real["velocities"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "val"])
def test_pixels_equal_the_published_episodes(shared, split):
    real = published(shared, split)
    for positions, colors, frames in zip(real["positions"], real["colors"], real["imgs"], strict=True):
        np.testing.assert_array_equal(balls.render(positions, colors[0])[0], frames)


def test_a_head_on_collision_swaps_velocities_and_keeps_energy_and_momentum():
    positions = np.array([[[22.0, 32.0], [42.0, 32.0]]])
    velocities = np.array([[[3.0, 0.5], [-1.0, -0.5]]])
    states = balls.simulate(positions, velocities, np.ones((1, 2, 3)), num_frames=4)
    np.testing.assert_allclose(states.velocities[0, -1].sum(axis=0), velocities[0].sum(axis=0), atol=1e-12)
    assert states.velocities[0, -1, 0, 0] < 0 < states.velocities[0, -1, 1, 0]
    np.testing.assert_allclose((states.velocities[0, -1] ** 2).sum(), (velocities**2).sum(), atol=1e-12)


def test_every_collision_conserves_energy():
    states = balls.simulate_split("val", 0, 200)
    energy = (states.velocities**2).sum(axis=(2, 3))
    # 1000 sub-steps of double precision on an energy of 27.
    np.testing.assert_allclose(energy, 3 * balls.SPEED**2, rtol=0, atol=1e-11)
    speeds = np.hypot(states.velocities[..., 0], states.velocities[..., 1])
    assert (np.ptp(speeds, axis=1) > 0.1).any(axis=1).mean() > 0.9, "balls should collide in nearly every episode"


def test_balls_leave_the_canvas_by_at_most_one_substep():
    states = balls.simulate_split("test", 0, 200)
    beyond = np.maximum(balls.RADIUS - states.positions, states.positions - (balls.SIZE - balls.RADIUS)).max()
    assert 0 < beyond <= np.sqrt(3) * balls.SPEED / balls.SUBSTEPS


def test_episodes_start_apart_with_the_same_speed_in_five_colours():
    states = balls.simulate_split("train", 100, 300)
    start = states.positions[:, 0]
    for i, j in itertools.combinations(range(balls.NUM_BALLS), 2):
        assert np.linalg.norm(start[:, i] - start[:, j], axis=-1).min() >= 2 * balls.RADIUS
    np.testing.assert_allclose(np.linalg.norm(states.velocities[:, 0], axis=-1), balls.SPEED, atol=1e-12)
    assert len(np.unique(states.colors.reshape(-1, 3), axis=0)) == 5


def test_an_episode_does_not_depend_on_its_batch():
    together = balls.simulate_split("train", 0, 40, seed=3)
    for number in (0, 17, 39):
        alone = balls.simulate_split("train", number, 1, seed=3)
        for one, many in zip(alone, together, strict=True):
            assert one[0].tobytes() == many[number].tobytes()


def test_a_window_equals_the_same_frames_of_the_whole_clip():
    (episode,) = balls.episodes("val", 5, 1)
    whole, window = episode.clip(), episode.clip(start=37, length=11)
    cut = whole.window(37, 11)
    assert (window.key, window.start_frame, window.source) == (cut.key, cut.start_frame, cut.source)
    assert window.frames.tobytes() == cut.frames.tobytes()
    assert window.truth.keys() == cut.truth.keys()
    for name, array in window.truth.items():
        assert array.tobytes() == cut.truth[name].tobytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (balls.episodes("test", 2, 1, seed)[0].clip(length=2).frames for seed in (11, 11, 12))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_splits_count_on_from_the_training_seed():
    np.testing.assert_array_equal(
        balls.simulate_split("train", 0, 2, seed=balls.PUBLISHED_SEED).positions,
        balls.simulate_split("train", 0, 2).positions,
    )
    np.testing.assert_array_equal(
        balls.simulate_split("train", 0, 2, seed=balls.PUBLISHED_SEED + 2).positions,
        balls.simulate_split("test", 0, 2).positions,
    )


def test_positions_are_where_the_pixels_are():
    clip = balls.episodes("val", 0, 1)[0].clip()
    counts = [np.count_nonzero(clip.truth["segmentation"] == ball, axis=(1, 2)) for ball in (1, 2, 3)]
    for ball, count in enumerate(counts):
        for frame in np.flatnonzero(count >= 170):  # fewer pixels: partly covered
            rows, columns = np.nonzero(clip.truth["segmentation"][frame] == ball + 1)
            index = (clip.truth["positions"][frame, ball] + 1) / 2 * (balls.SIZE - 1)
            assert abs(rows.mean() - index[0]) < 0.3
            assert abs(columns.mean() - index[1]) < 0.3


def test_coordinates_are_y_x_with_aligned_corners():
    coordinates = balls.to_coordinates(np.array([[0.5, 63.5]]))
    np.testing.assert_array_equal(coordinates, [[LAST_PIXEL, FIRST_PIXEL]])
    np.testing.assert_allclose(balls.to_pixels(coordinates), [[0.5, 63.5]], atol=1e-5)


def test_the_topmost_ball_owns_the_pixel():
    colors = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    frames, segmentation = balls.render(np.array([[[30.0, 32.0], [36.0, 32.0]]]), colors)
    assert segmentation[0, 32, 32] == 2
    assert frames[0, 32, 32].tolist() == [0, 0, 255]
    assert segmentation[0, 32, 25] == 1
    assert frames[0, 32, 25].tolist() == [255, 0, 0]
    assert segmentation[0, 5, 5] == 0


def test_the_drawn_disc_is_smaller_than_the_physical_one():
    frames, _ = balls.render(np.array([[[32.0, 32.0]], [[30.3, 33.7]]]), np.ones((1, 3)))
    area = frames[..., 0].sum(axis=(1, 2)) / 255
    np.testing.assert_allclose(np.sqrt(area / np.pi), 7.5, atol=0.05)


def test_the_registry_states_what_clips_have():
    simulator = SIMULATORS["balls-interaction"]
    for split, total in simulator.episodes_per_split.items():
        episode = simulator.episodes(split, total - 1, 1, None)[0]
        clip = episode.clip()
        assert episode.key == clip.key == f"{split}-{total - 1:06d}"
        assert clip.source == f"sim:{simulator.name}/{split}/{total - 1}"
        assert clip.frames.shape == (simulator.num_frames, simulator.height, simulator.width, 3)
        assert clip.fps == simulator.fps
        assert clip.truth["present"].all()
        assert clip.truth["num_objects"] == 3
        assert set(np.unique(clip.truth["segmentation"])) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", 0, 1, None), "splits train, val, test, got 'valid'"),
        (("val", 199, 2, None), "has 200 episodes, got first=199 and count=2"),
        (("val", -1, 2, None), "got first=-1"),
        (("val", 0, 1, -3), "seed must be in"),
    ],
)
def test_impossible_episodes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        balls.episodes(*arguments)


@pytest.mark.parametrize("window", [(-1, 5), (96, 5), (0, 0), (100, None)])
def test_a_window_outside_the_episode_is_refused(window):
    (episode,) = balls.episodes("val", 0, 1)
    with pytest.raises(ValueError, match="has 100 frames, got start="):
        episode.clip(*window)


def test_balls_far_outside_are_not_drawn():
    with pytest.raises(ValueError, match="ball centres must lie in"):
        balls.render(np.array([[[2.0, 32.0]]]), np.ones((1, 3)))
