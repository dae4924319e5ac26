import itertools
import math

import numpy as np
import pytest
from scipy.spatial import procrustes

from objdyn.metrics import trajectory
from objdyn.metrics.trajectory import (
    Map,
    are_close,
    assign_slots,
    collapse_share,
    fit_affine,
    fit_similarity,
    gravity,
    identity_swap_rate,
    kmeans_positions,
    mean_by_frame,
    position_errors,
    predictor_spectrum,
    recovery,
)
from objdyn.simulators import cannonballs, simulator

SIZE = (48, 48)
PIXEL = 2 / 47


def flights(balls: int = 3, n: int = 12, seed: int = 0) -> np.ndarray:
    """True positions (n, 30, balls, 2) of Cannonballs."""
    options = cannonballs.Options(balls=(balls, balls), seed=seed)
    worlds = [cannonballs.simulate(options, "test", number).positions for number in range(n)]
    return np.stack([cannonballs.to_coordinates(world, options) for world in worlds])


def shuffled(tracks: np.ndarray, seed: int = 0) -> np.ndarray:
    """Objects of each sequence in an order of its own."""
    random = np.random.default_rng(seed)
    return np.stack([sequence[:, random.permutation(sequence.shape[1])] for sequence in tracks])


def rotation(degrees: float) -> np.ndarray:
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def pixels(rows: list[list[tuple[float, float]]]) -> np.ndarray:
    """One sequence (1, t, k, 2) from pixel indices (y, x) in a frame of 48x48."""
    return np.array([rows], dtype=np.float64) * PIXEL - 1


@pytest.mark.parametrize("balls", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_any_affine_map_is_undone_with_objects_in_any_order(balls: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix, offset = random.normal(size=(2, 2)) * 10 ** random.uniform(-2, 2), 10 * random.normal(size=2)
    true = flights(balls, seed=seed)
    latents = shuffled((true - offset) @ np.linalg.inv(matrix).T, seed)
    fit = fit_affine(latents, true)
    # Latents of size |offset / matrix| lose as many digits as the map is ill-conditioned.
    np.testing.assert_allclose(fit.matrix, matrix, rtol=1e-6, atol=1e-6 * np.abs(matrix).max())
    np.testing.assert_allclose(fit.offset, offset, atol=1e-6)
    found = recovery(fit(latents), true, frame_size=SIZE)
    assert (found.r2, *found.r2_axes) == pytest.approx((1, 1, 1), abs=1e-12)
    assert found.rmse < 1e-6
    assert found.points == 12 * 30 * balls


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("degrees", [0, 22.5, 100, 200, 301])
def test_any_similarity_is_undone_with_objects_in_any_order(degrees: float, reflected: bool) -> None:
    matrix = 0.07 * rotation(degrees) @ np.diag([1, -1 if reflected else 1])
    true = flights(3)
    latents = shuffled((true - [0.3, -2.0]) @ np.linalg.inv(matrix).T)
    for fit in (fit_similarity(latents, true), fit_affine(latents, true)):
        np.testing.assert_allclose(fit.matrix, matrix, atol=1e-9)
        np.testing.assert_allclose(fit.offset, [0.3, -2.0], atol=1e-9)


def test_of_one_object_the_affine_map_is_least_squares() -> None:
    random = np.random.default_rng(3)
    true, latents = flights(1), random.normal(size=(12, 30, 1, 2))
    design = np.concatenate([latents.reshape(-1, 2), np.ones((360, 1))], axis=1)
    solution, residual, *_ = np.linalg.lstsq(design, true.reshape(-1, 2))
    fit = fit_affine(latents, true)
    np.testing.assert_allclose(np.vstack([fit.matrix.T, fit.offset]), solution, atol=1e-12)
    found = recovery(fit(latents), true, frame_size=SIZE)
    spread = np.square(true - true.mean(axis=(0, 1, 2))).sum(axis=(0, 1, 2))
    assert found.r2_axes == pytest.approx(tuple(1 - residual / spread))
    assert found.r2 == pytest.approx(1 - residual.sum() / spread.sum())


def test_of_one_object_the_similarity_is_procrustes_analysis() -> None:
    random = np.random.default_rng(4)
    true = flights(1)
    latents = true @ np.array([[0.5, 2.0], [1.0, 0.2]]) + random.normal(size=true.shape)
    *_, disparity = procrustes(true.reshape(-1, 2), latents.reshape(-1, 2))
    found = recovery(fit_similarity(latents, true)(latents), true, frame_size=SIZE)
    # Their disparity is the squared error as a share of the truth's squared deviations.
    assert found.r2 == pytest.approx(1 - disparity, abs=1e-12)
    assert found.r2 < recovery(fit_affine(latents, true)(latents), true, frame_size=SIZE).r2


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_the_best_over_all_assignments(seed: int) -> None:
    random = np.random.default_rng(seed)
    true = flights(2, n=5, seed=seed)
    latents = shuffled(true @ random.normal(size=(2, 2)), seed) + random.normal(size=true.shape) * 0.3
    errors = []
    for swaps in itertools.product([False, True], repeat=5):
        ordered = np.where(np.array(swaps)[:, None, None, None], latents[:, :, ::-1], latents)
        design = np.concatenate([ordered.reshape(-1, 2), np.ones((300, 1))], axis=1)
        errors.append(np.linalg.lstsq(design, true.reshape(-1, 2))[1].sum())
    mapped = fit_affine(latents, true)(latents)
    mse = recovery(mapped, true, frame_size=(3, 3)).rmse ** 2  # 3 pixels: a pixel is a unit
    assert mse * 300 == pytest.approx(min(errors), rel=1e-9)


def test_a_fold_leaves_one_axis_near_zero_and_the_total_near_one_half() -> None:
    true = flights(1, n=60)
    folded = np.stack([true[..., 0], np.abs(true[..., 1] - true[..., 1].mean())], axis=-1)
    found = recovery(fit_affine(folded, true)(folded), true, frame_size=SIZE)
    assert found.r2_axes[0] > 0.99
    assert abs(found.r2_axes[1]) < 0.1
    assert found.r2 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("fit", [fit_affine, fit_similarity])
def test_constant_latents_map_to_the_mean_and_explain_nothing(fit) -> None:
    true = flights(2)
    constant = np.full_like(true, 0.1) * [1, 3]
    found = recovery(fit(constant, true)(constant), true, frame_size=SIZE)
    assert (found.r2, *found.r2_axes) == pytest.approx((0, 0, 0), abs=1e-12)
    np.testing.assert_allclose(fit(constant, true)(constant)[0, 0, 0], true.mean(axis=(0, 1, 2)), atol=1e-12)


def test_latents_on_a_line_explain_one_axis() -> None:
    true = flights(1)
    line = true[..., 1:] * [2.0, 1.0]
    found = recovery(fit_affine(line, true)(line), true, frame_size=SIZE)
    assert found.r2_axes[1] == pytest.approx(1, abs=1e-9)
    assert found.r2_axes[0] < 0.2


def test_of_a_truth_that_stands_still_r2_is_not_a_number() -> None:
    true = np.tile([0.1, 0.3], (2, 4, 1, 1))
    still = recovery(true, true, frame_size=SIZE)
    assert np.isnan([still.r2, *still.r2_axes]).all()
    assert still.rmse == 0
    level = true + np.linspace(0, 1, 4)[:, None, None] * [0, 1]
    found = recovery(level + np.array([0.1, 0]), level, frame_size=SIZE)
    assert np.isnan(found.r2_axes[0])
    assert found.r2_axes[1] == 1
    assert found.r2 == pytest.approx(1 - 4 * 0.1**2 / np.square(level[0, :, 0, 1] - 0.8).sum())
    nothing = recovery(true, true, frame_size=SIZE, objects=np.zeros((2, 1), bool))
    assert nothing.points == 0
    assert np.isnan([nothing.r2, nothing.rmse, *nothing.r2_axes]).all()


def test_errors_are_in_pixels_of_each_axis() -> None:
    true = flights(1)
    found = recovery(true + np.array([0.25, 0.125]), true, frame_size=(33, 65))
    assert found.rmse_axes == pytest.approx((4, 4))
    assert found.rmse == pytest.approx(math.sqrt(32))
    errors = position_errors(true + np.array([0.1875, 0.125]), true, frame_size=(33, 65))
    np.testing.assert_allclose(errors, 5)


def test_what_a_sequence_lacks_does_not_matter() -> None:
    counts = np.array([1, 2, 3] * 4)
    there = np.arange(3) < counts[:, None]
    true = flights(3)
    latents = true @ rotation(40) * 3
    for sequence, count in enumerate(counts):
        latents[sequence, :, :count] = latents[sequence, :, :count][:, ::-1]
        latents[sequence, :, count:] = np.nan
        true[sequence, :, count:] = np.inf
    fit = fit_affine(latents, true, slots=there, objects=there)
    np.testing.assert_allclose(fit.matrix, rotation(40) / 3, atol=1e-12)
    mapped = fit(latents)
    partner = assign_slots(mapped, true, slots=there, objects=there)
    assert partner[:3].tolist() == [[0, -1, -1], [1, 0, -1], [2, 1, 0]]
    found = recovery(mapped, true, frame_size=SIZE, slots=there, objects=there)
    assert found.points == 30 * counts.sum()
    assert found.r2 == pytest.approx(1)
    errors = position_errors(mapped, true, frame_size=SIZE, slots=there, objects=there)
    np.testing.assert_array_equal(np.isnan(errors).any(axis=1), ~there)


@pytest.mark.parametrize("most", [24, 0])
def test_spare_slots_may_be_anywhere(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(trajectory, "BRUTE_FORCE", most)  # 0: by the Hungarian method
    true = flights(2)
    spare = np.random.default_rng(1).uniform(-1, 1, size=(12, 30, 2, 2))
    latents = np.concatenate([spare[:, :, :1], true[:, :, ::-1], spare[:, :, 1:]], axis=2) @ np.diag([2.0, -5.0])
    fit = fit_affine(latents, true)
    np.testing.assert_allclose(fit.matrix, np.diag([0.5, -0.2]), atol=1e-12)
    assert assign_slots(fit(latents), true).tolist() == [[2, 1]] * 12
    assert assign_slots(fit(latents), true, per="frame").shape == (12, 30, 2)


def test_hungarian_and_brute_force_assign_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    cost = random.uniform(size=(200, 4, 3))
    objects = random.uniform(size=(200, 3)) < 0.7
    slots = np.arange(4) < np.maximum(objects.sum(axis=1), random.integers(1, 5, size=200))[:, None]
    brute = trajectory._assign(cost, slots, objects)
    monkeypatch.setattr(trajectory, "BRUTE_FORCE", 0)
    np.testing.assert_array_equal(trajectory._assign(cost, slots, objects), brute)


def test_each_frame_alone_is_assigned_at_most_as_far() -> None:
    true = pixels([[(14, 14), (26, 26)], [(12, 12), (28, 28)], [(10, 10), (30, 30)]])
    swapped = true[:, :, ::-1].copy()
    swapped[:, 0] = true[:, 0]
    per_frame = position_errors(swapped, true, frame_size=SIZE, per="frame")
    np.testing.assert_allclose(per_frame, 0, atol=1e-12)
    # Two of three frames decide for the whole sequence, so frame 0 is wrong by the distance of the balls.
    per_sequence = position_errors(swapped, true, frame_size=SIZE)
    np.testing.assert_allclose(per_sequence[0], [[math.hypot(12, 12)] * 2, [0, 0], [0, 0]], atol=1e-12)


def test_means_by_frame_leave_out_what_is_not_kept() -> None:
    errors = np.array([[[1.0, 3.0], [2.0, np.nan]], [[5.0, np.nan], [np.nan, np.nan]]])
    np.testing.assert_allclose(mean_by_frame(errors), [3, 2])
    np.testing.assert_allclose(mean_by_frame(errors, np.array([[True, False], [False, True]])), [2, np.nan])
    with pytest.raises((ValueError, TypeError), match="keep"):
        mean_by_frame(errors, np.ones((2, 3), bool))


def test_balls_are_close_below_two_radii() -> None:
    true = pixels([[(10, 10), (10, 13.9), (30, 30)], [(10, 10), (10, 14.1), (30, 30)]])
    assert are_close(true, frame_size=SIZE).tolist() == [[True, False]]
    assert are_close(true, frame_size=SIZE, radius=3.0).tolist() == [[True, True]]
    assert are_close(true, frame_size=SIZE, objects=np.array([[True, False, True]])).tolist() == [[False, False]]
    assert not are_close(true[:, :, :1], frame_size=SIZE).any()


def test_a_swap_in_flight_is_one_switch_and_a_constant_order_none() -> None:
    true = pixels([[(10, 4 * t), (30, 40 - 4 * t)] for t in range(10)])
    assert identity_swap_rate(true[:, :, ::-1], true, frame_size=SIZE).rate == 0
    swapped = true.copy()
    swapped[:, 6:] = true[:, 6:, ::-1]
    twice = swapped.copy()
    twice[:, 8:] = true[:, 8:]
    found = identity_swap_rate(
        np.concatenate([true, swapped, twice, true]), np.concatenate([true] * 4), frame_size=SIZE
    )
    assert found.switches.tolist() == [0, 1, 2, 0]
    assert found.compared.tolist() == [9] * 4
    assert found.rate == 0.5


def test_frames_with_close_balls_cannot_swap_but_what_they_hide_can() -> None:
    true = pixels([[(20, 10), (20, 30)], [(20, 18), (20, 21)], [(20, 26), (20, 14)]])
    inside = true.copy()
    inside[:, 1] = true[:, 1, ::-1]
    across = true.copy()
    across[:, 2] = true[:, 2, ::-1]
    found = identity_swap_rate(np.concatenate([inside, across]), np.concatenate([true, true]), frame_size=SIZE)
    assert found.switches.tolist() == [0, 1]
    assert found.compared.tolist() == [1, 1]
    every = identity_swap_rate(inside, true, frame_size=SIZE, radius=0.0)
    assert every.switches.tolist() == [2]


def test_a_region_split_is_counted_in_most_sequences() -> None:
    true = flights(2, n=200)
    # Slot 0 owns the left half of the frame, slot 1 the right one (the paper's Fig. 5(b)).
    order = true[..., 1].argsort(axis=2)
    split = np.take_along_axis(true, order[..., None], axis=2)
    crossing = (np.diff(np.sign(true[:, :, 0, 1] - true[:, :, 1, 1]), axis=1) != 0).any(axis=1)
    found = identity_swap_rate(split, true, frame_size=SIZE)
    assert 0.2 < crossing.mean() < 0.8
    # A crossing at the clip's very end may be seen in close frames only.
    assert found.rate == pytest.approx(crossing.mean(), abs=0.05)
    assert ((found.switches > 0) <= crossing).all()
    assert recovery(split, true, frame_size=SIZE).r2 < 0.95


def test_one_ball_cannot_swap_or_collapse_and_has_no_rate() -> None:
    true = flights(1)
    swaps, collapses = identity_swap_rate(true, true, frame_size=SIZE), collapse_share(true, true, frame_size=SIZE)
    assert swaps.compared.tolist() == [0] * 12
    assert math.isnan(swaps.rate)
    assert collapses.frames.tolist() == [0] * 12
    assert math.isnan(collapses.share)
    # With a spare slot it can be followed by one slot and then by the other.
    both = np.concatenate([true, np.full_like(true, 3)], axis=2)
    both[:, 10:] = both[:, 10:, ::-1]
    assert identity_swap_rate(both, true, frame_size=SIZE).rate == 1
    assert math.isnan(collapse_share(both, true, frame_size=SIZE).share)


def test_collapsed_frames_are_those_with_two_slots_nearest_to_one_ball() -> None:
    true = pixels([[(10, 10), (30, 30)], [(10, 10), (30, 30)], [(10, 10), (12, 12)]])
    slots = pixels([[(11, 10), (29, 30)], [(28, 30), (31, 30)], [(10, 10), (10, 10)]])
    found = collapse_share(slots, true, frame_size=SIZE)
    assert (found.collapsed.tolist(), found.frames.tolist(), found.share) == ([1], [2], 0.5)
    assert collapse_share(slots, true, frame_size=SIZE, radius=1.0).share == 2 / 3
    there = np.array([[True, False]])
    assert collapse_share(slots, true, frame_size=SIZE, slots=there, objects=there).frames.tolist() == [0]


def frames_of(count: int, balls: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """White pixels (n, t, h, w), number of balls (n,) and where they are drawn (n, t, k, 2)."""
    clips = [episode.clip() for episode in simulator(f"cannonballs:balls={balls}").episodes("test", 0, count, None)]
    return (
        np.stack([clip.frames[..., 0] / np.float32(255) for clip in clips]),
        np.stack([clip.truth["num_objects"] for clip in clips]),
        np.stack([clip.truth["rendered_positions"] for clip in clips]).astype(np.float64),
    )


def test_clusters_of_white_pixels_are_where_the_balls_are() -> None:
    frames, counts, drawn = frames_of(60, "1-3")
    there = np.arange(3) < counts[:, None]
    found = kmeans_positions(frames, counts)
    assert found.painted.all()
    assert (found.positions[~np.broadcast_to(there[:, None], found.positions.shape[:3])] == 0).all()
    options = {"frame_size": SIZE, "objects": there}
    errors = position_errors(found.positions, drawn, slots=there, per="frame", **options)
    apart = ~are_close(drawn, **options)
    assert 0.8 < apart.mean() < 0.95
    # The centre of 12.6 pixels is 0.14 pixels from that of the disc on average.
    assert np.nanmean(mean_by_frame(errors, apart)) == pytest.approx(0.14, abs=0.02)
    assert np.nanmax(errors[apart]) < 0.5
    assert np.nanmax(errors[~apart]) > 1, "balls that overlap cannot be told apart"


def test_clusters_do_not_depend_on_other_frames_and_go_from_the_top_down() -> None:
    frames, counts, _ = frames_of(4, "3")
    together = kmeans_positions(frames, counts).positions
    alone = kmeans_positions(frames[2:3, 7:8], counts[2:3]).positions
    np.testing.assert_array_equal(together[2, 7], alone[0, 0])
    assert (np.diff(together[..., 0], axis=2) >= 0).all()
    assert (frames == frames_of(4, "3")[0]).all()


@pytest.mark.parametrize("seed", range(6))
def test_clusters_are_the_best_partition_of_pixels_that_weigh_their_value(seed: int) -> None:
    random = np.random.default_rng(seed)
    frame = np.zeros((9, 11))
    for corner in ((0, 0), (3, 6)):  # two clouds of five pixels or fewer
        frame[corner[0] + random.integers(0, 5, size=5), corner[1] + random.integers(0, 4, size=5)] = random.uniform(
            0.5, 1, size=5
        )
    points, weights = np.argwhere(frame).astype(float), frame[frame > 0]
    best, centres = np.inf, np.zeros((2, 2))
    for mask in itertools.product([False, True], repeat=len(points)):
        sides = [np.array(mask), ~np.array(mask)]
        if all(side.any() for side in sides):
            means = [np.average(points[side], axis=0, weights=weights[side]) for side in sides]
            pairs = zip(sides, means, strict=True)
            cost = sum((np.square(points[s] - m).sum(axis=1) * weights[s]).sum() for s, m in pairs)
            if cost < best:
                best, centres = cost, np.array(sorted(means, key=tuple))
    found = kmeans_positions(frame[None, None], np.array([2])).positions[0, 0]
    np.testing.assert_allclose((found + 1) / 2 * [8, 10], centres, atol=1e-12)


def test_faint_frames_take_their_brightest_pixels_and_are_told() -> None:
    frame = np.full((1, 1, 20, 20), 0.01, np.float32)
    frame[0, 0, 4:7, 4:7], frame[0, 0, 14:17, 12:15] = 0.3, 0.2
    # Two balls cover 25 pixels: 9 + 9 bright ones, and all others equal the 25th.
    dim = kmeans_positions(np.where(frame > 0.1, frame, 0), np.array([2]))
    assert not dim.painted.any()
    np.testing.assert_allclose((dim.positions[0, 0] + 1) / 2 * 19, [[5, 5], [15, 13]], atol=1e-5)
    assert kmeans_positions(frame, np.array([2]), threshold=0.1).painted.all()
    whole = kmeans_positions(frame, np.array([2]))
    assert not whole.painted.any()
    assert np.abs(whole.positions).max() < 1


def test_frames_without_information_have_all_balls_in_the_middle() -> None:
    frames = np.zeros((1, 4, 8, 8))
    frames[0, 1] = 1
    frames[0, 2] = 0.3
    frames[0, 3, 2, 2] = 0.9  # one pixel for two balls
    found = kmeans_positions(frames, np.array([2]))
    assert not found.painted.any()
    assert (found.positions == 0).all()
    assert kmeans_positions(frames, np.array([1])).painted.tolist() == [[False, False, False, True]]


def test_gravity_is_found_through_the_fitted_map() -> None:
    options = cannonballs.Options()
    true = flights(2)
    # Latents are the positions under some map; u and d are those of the generator, carried along with it.
    step = 0.4
    to_latent = np.array([[3.0, -1.0], [0.5, 2.0]])
    latents = true @ to_latent.T + [4, 4]
    fit = fit_affine(latents, true)
    acceleration = to_latent @ np.array(options.acceleration)
    offset = np.concatenate([acceleration / 2, acceleration / step])
    found = gravity(offset, step, fit.matrix, np.array(options.acceleration))
    np.testing.assert_allclose(found.acceleration, options.acceleration, atol=1e-12)
    assert (found.along, found.ratio, found.half_step) == pytest.approx((1, 1, 1))
    assert found.angle == pytest.approx(0, abs=1e-6)
    world = fit.matrix / np.array(options.scale)[:, None]
    in_world = gravity(offset, step, world, np.array([-cannonballs.GRAVITY * cannonballs.STEP**2, 0]))
    np.testing.assert_allclose(in_world.acceleration / cannonballs.STEP**2, [-9.81, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("velocity", "along", "ratio", "angle"),
    [((2.0, 0.0), 1, 1, 0), ((0.0, 2.0), 0, 1, 90), ((-1.0, 0.0), -0.5, 0.5, 180), ((4.0, -4.0), 2, math.sqrt(8), 45)],
)
def test_gravity_is_told_by_direction_and_size(velocity, along, ratio, angle) -> None:
    found = gravity(np.array([0.5, 0.5, *velocity]), 0.5, 3 * np.eye(2), np.array([3.0, 0.0]))
    assert (found.along, found.ratio, found.angle) == pytest.approx((along, ratio, angle), abs=1e-12)


def test_without_force_nothing_was_learnt_and_without_truth_nothing_is_asked() -> None:
    none = gravity(np.zeros(4), 0.1, np.eye(2), np.array([1.0, 0.0]))
    assert (none.along, none.ratio) == (0, 0)
    assert math.isnan(none.angle)
    assert math.isnan(none.half_step)
    with pytest.raises(ValueError, match="true acceleration is zero"):
        gravity(np.ones(4), 0.1, np.eye(2), np.zeros(2))
    with pytest.raises(ValueError, match="must be finite"):
        gravity(np.ones(4), math.nan, np.eye(2), np.ones(2))


def test_spectrum_is_that_of_a_filter_that_ran_long() -> None:
    step = 0.3
    random = np.random.default_rng(0)
    state_noise = np.diag([0.01, 0.02, 0.03, 0.001])
    root = random.normal(size=(2, 2))
    position_noise = root @ root.T + 0.1 * np.eye(2)
    transition = np.eye(4) + step * np.eye(4, k=2)
    observe = np.eye(2, 4)
    covariance, predictor = np.eye(4), np.eye(4)
    for _ in range(3000):
        gain = covariance @ observe.T @ np.linalg.inv(observe @ covariance @ observe.T + position_noise)
        predictor = transition @ (np.eye(4) - gain @ observe)
        covariance = transition @ covariance @ (np.eye(4) - gain @ observe).T @ transition.T + state_noise
    expected = np.sort(np.abs(np.linalg.eigvals(predictor)))[::-1]
    np.testing.assert_allclose(predictor_spectrum(step, state_noise, position_noise), expected, atol=1e-9)
    # Another latent scale and rotation: the same memory.
    turn = 7 * rotation(20)
    both = np.kron(np.eye(2), turn)
    turned = predictor_spectrum(step, both @ state_noise @ both.T, turn @ position_noise @ turn.T)
    np.testing.assert_allclose(turned, expected, atol=1e-7)


def test_a_noise_free_motion_is_fitted_to_a_longer_past() -> None:
    short, long = (predictor_spectrum(0.1, noise * np.eye(4), np.eye(2)) for noise in (1.0, 1e-6))
    assert short[0] < long[0] < 1
    with pytest.raises(ValueError, match="no steady state"):
        predictor_spectrum(0.0, np.zeros((4, 4)), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_affine(np.zeros((2, 3, 1, 2)), np.zeros((2, 4, 1, 2))), "same sequences|true"),
        (lambda: fit_affine(np.zeros((2, 3, 1, 3)), np.zeros((2, 3, 1, 2))), r"\(n, t, k, 2\)|latents"),
        (lambda: fit_affine(np.zeros((2, 3, 1, 2)), np.zeros((2, 3, 2, 2))), "sequence 0 has 2 objects and 1 slots"),
        (lambda: fit_affine(np.full((1, 3, 1, 2), np.nan), np.zeros((1, 3, 1, 2))), "need finite positions"),
        (lambda: fit_affine(np.zeros((0, 3, 1, 2)), np.zeros((0, 3, 1, 2))), "at least one object"),
        (lambda: fit_similarity(flights(1), flights(1), iterations=0), "got 12 objects and 0 iterations"),
        (lambda: fit_affine(flights(1), flights(1), slots=np.ones((12, 2), bool)), "slots"),
        (lambda: assign_slots(flights(1), flights(1), per="video"), "per"),  # pyright: ignore[reportArgumentType]
        (lambda: recovery(flights(1), flights(1), frame_size=(1, 9)), "at least 2 pixels, got"),
        (lambda: kmeans_positions(np.full((1, 1, 4, 4), 255.0), np.array([1])), "divide bytes by 255"),
        (lambda: kmeans_positions(np.zeros((1, 1, 4, 4)), np.array([0])), r"from 1 up .* got \[0\]"),
        (lambda: kmeans_positions(np.zeros((2, 1, 4, 4)), np.array([1])), "counts"),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message: str) -> None:
    # TypeError where annotations are checked at run time.
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_map_applies_to_any_number_of_axes() -> None:
    fit = Map(np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([1.0, -1.0]))
    np.testing.assert_array_equal(fit(np.array([3.0, 5.0])), [11, 2])
    assert fit(np.zeros((4, 3, 2, 2))).shape == (4, 3, 2, 2)
