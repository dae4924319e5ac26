import numpy as np
import pytest

from objdyn.metrics.position import (
    constant_velocity,
    constant_velocity_with_walls,
    copy_last,
    coverage,
    med,
    med10,
)
from objdyn.simulators import balls

CONTEXT, HORIZON = 10, 10


def tracks(n: int = 3, t: int = 12, k: int = 4, seed: int = 0) -> np.ndarray:
    """Objects that stay far apart: one per corner of the frame, jittering by up to 0.1."""
    corners = np.array([[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]])[:k]
    return corners + np.random.default_rng(seed).uniform(-0.1, 0.1, size=(n, t, k, 2))


def everywhere(positions: np.ndarray) -> np.ndarray:
    return np.ones(positions.shape[:3], dtype=bool)


def score(positions: np.ndarray, true: np.ndarray, **options):
    return med(positions, everywhere(positions), true, everywhere(true), **options)


@pytest.fixture(scope="module")
def episodes() -> np.ndarray:
    return balls.to_coordinates(balls.simulate_split("test", 0, 200).positions[:, : CONTEXT + HORIZON])


def test_equal_tracks_have_distance_zero():
    true = tracks()
    result = score(true, true, convention="corrected")
    np.testing.assert_array_equal(result.per_step, np.zeros(12))
    np.testing.assert_array_equal(result.pairs, np.full(12, 12))
    np.testing.assert_array_equal(result.lost, np.zeros(12))
    assert med10(result) == 0


def test_a_constant_offset_is_measured_in_sides_of_the_frame():
    true = tracks()
    result = score(true + np.array([0.06, -0.08]), true, convention="corrected")
    np.testing.assert_allclose(result.per_step, 0.05, atol=1e-12)
    assert med10(result) == pytest.approx(0.5)


def test_particles_in_another_order_are_matched_once_for_all():
    true = tracks()
    order = [2, 0, 3, 1]
    assert med10(score(true[:, :, order], true, convention="corrected")) == 0


def test_ids_that_swap_later_stay_with_their_first_partner():
    true = tracks(n=1)
    swapped = true.copy()
    swapped[:, 5:, [0, 1]] = true[:, 5:, [1, 0]]
    result = score(swapped, true, convention="corrected")
    expected = np.linalg.norm(true[0, 5:, 0] - true[0, 5:, 1], axis=-1) / 2 * 2 / 4  # two of four objects are wrong
    np.testing.assert_allclose(result.per_step[:5], 0, atol=1e-12)
    np.testing.assert_allclose(result.per_step[5:], expected, atol=1e-12)


def test_a_vanished_particle_leaves_the_mean_and_is_counted():
    true = tracks(n=2)
    positions, presence = true.copy(), np.ones((2, 12, 4), dtype=np.float32)
    positions[:, :, 3] += 0.02
    presence[0, 7:, 3] = 0.5  # not above one half
    result = med(positions, presence, true, everywhere(true), convention="corrected")
    step = np.hypot(0.01, 0.01) / 4
    np.testing.assert_allclose(result.per_step[:7], step, atol=1e-12)
    np.testing.assert_allclose(result.per_step[7:], step / 2, atol=1e-12)
    assert result.pairs.tolist() == [8] * 7 + [7] * 5
    assert result.lost.tolist() == [0] * 7 + [1] * 5


def test_an_object_without_particle_is_lost_from_the_start():
    true = tracks(n=1)
    result = med(true[:, :, :3], everywhere(true)[:, :, :3], true, everywhere(true), convention="corrected")
    assert result.pairs.tolist() == [3] * 12
    assert result.lost.tolist() == [1] * 12
    assert med10(result) == 0


def test_an_object_that_leaves_is_not_lost_and_one_that_enters_is_not_followed():
    true = tracks(n=1)
    present = everywhere(true)
    present[0, 4:, 0] = False
    present[0, :4, 1] = False
    result = med(true, everywhere(true), true, present)
    assert result.pairs.tolist() == [3] * 4 + [2] * 8
    assert result.lost.tolist() == [0] * 12


def test_nothing_visible_gives_nan_and_counts():
    true = tracks(n=2)
    result = med(true, np.zeros(true.shape[:3]), true, everywhere(true))
    assert np.isnan(result.per_step).all()
    assert np.isnan(med10(result))
    assert result.lost.tolist() == [8] * 12


def test_pairs_farther_than_the_side_never_match():
    true = np.array([[[[-1.0, -1.0], [0.9, 0.9]]]])
    particle = np.array([[[[0.8, 0.8]]]])
    assert score(particle, true, convention="corrected").pairs.tolist() == [1]
    lonely = score(particle, true[:, :, :1], convention="corrected")
    assert lonely.pairs.tolist() == [0]
    assert lonely.lost.tolist() == [1]


def test_matching_prefers_the_smaller_sum_of_squares():
    true = np.array([[[[0.0, 0.0], [0.0, 0.4]]]])
    particles = np.array([[[[0.0, 0.3], [0.0, -0.5]]]])
    # Greedy and optimal agree on object 1 - particle 0: 0.01 + 0.25 against 0.09 + 0.81 (in z units).
    result = score(particles, true, convention="corrected")
    np.testing.assert_allclose(result.per_step, [(0.05 + 0.25) / 2])


def test_the_published_formula_charges_a_perfect_particle_half_pixels():
    corner = np.full((1, 10, 1, 2), 1.0)
    expected = 10 * np.hypot(0.5 / 64, 0.5 / 64)
    assert med10(score(corner, corner)) == pytest.approx(expected)
    assert med10(score(corner * 0, corner * 0)) == pytest.approx(0, abs=1e-12)


def test_a_perfect_particle_on_balls_scores_0_048_uncorrected_and_0_corrected(episodes):
    true = episodes[:, CONTEXT:]
    # 0.0480 over 5000 episodes, with a standard error of 0.0004 for 200.
    assert med10(score(true, true)) == pytest.approx(0.0480, abs=0.0012)
    assert med10(score(true, true, convention="corrected")) == 0


@pytest.mark.parametrize(
    ("baseline", "anchor", "tolerance"),
    [  # known from independent simulations; three standard errors of a set of 200 episodes
        (copy_last, 1.75, 0.08),
        (constant_velocity, 1.81, 0.16),
        (constant_velocity_with_walls, 1.00, 0.15),
    ],
)
def test_trivial_predictions_score_their_anchors_on_balls(episodes, baseline, anchor, tolerance):
    predicted = baseline(episodes[:, :CONTEXT], HORIZON)
    assert med10(score(predicted, episodes[:, CONTEXT:])) == pytest.approx(anchor, abs=tolerance)


def test_sequences_are_scored_alone(episodes):
    true, predicted = episodes[:4, CONTEXT:], copy_last(episodes[:4, :CONTEXT], HORIZON)
    together = score(predicted, true)
    for n in range(4):
        alone = score(predicted[n : n + 1], true[n : n + 1])
        np.testing.assert_array_equal(alone.per_sequence[0], together.per_sequence[n])
    np.testing.assert_allclose(together.per_step, together.per_sequence.mean(axis=0))


def test_copy_last_and_constant_velocity_continue_a_line():
    context = np.array([[[[0.0, 0.5]], [[0.1, 0.3]]]])
    np.testing.assert_array_equal(copy_last(context, 3), [[[[0.1, 0.3]]] * 3])
    np.testing.assert_allclose(constant_velocity(context, 2), [[[[0.2, 0.1]], [[0.3, -0.1]]]], atol=1e-12)


def test_walls_reflect_at_the_disc_radius():
    pixels = np.array([[[[50.0, 20.0]], [[54.0, 17.0]]]])  # (x, y)
    predicted = constant_velocity_with_walls(balls.to_coordinates(pixels), 5)
    # x: 58 -> 54, then back; y: 14, 11, 8, then off the wall at 8.
    expected = [[54, 14], [50, 11], [46, 8], [42, 11], [38, 14]]
    np.testing.assert_allclose(balls.to_pixels(predicted)[0, :, 0], expected, atol=1e-4)


def test_walls_change_nothing_far_from_them():
    context = np.array([[[[0.0, 0.0]], [[0.02, -0.01]]]])
    np.testing.assert_allclose(
        constant_velocity_with_walls(context, 10), constant_velocity(context, 10), rtol=0, atol=1e-12
    )


def test_coverage_counts_objects_near_a_visible_particle():
    pixel = 2 / 63
    true = tracks(n=1, t=4)
    presence = np.ones((1, 4, 4))
    presence[0, 0, 0] = 0.2
    shifted = true + np.array([0, 2.5 * pixel])
    present = everywhere(true)
    assert coverage(shifted, presence, true, present, 3.0) == 15 / 16
    assert coverage(shifted, presence, true, present, 2.0) == 0
    present[0, 0, 0] = False
    assert coverage(shifted, presence, true, present, 3.0) == 1
    assert np.isnan(coverage(shifted, presence, true, np.zeros_like(present), 3.0))


def test_one_particle_may_cover_two_objects():
    true = np.array([[[[0.0, 0.0], [0.0, 0.02]]]])
    assert coverage(np.zeros((1, 1, 1, 2)), np.ones((1, 1, 1)), true, everywhere(true), 3.0) == 1


def test_too_short_a_horizon_is_refused():
    true = tracks(t=9)
    with pytest.raises(ValueError, match="MED10 needs 10 predicted frames, got 9"):
        med10(score(true, true))


def test_positions_that_are_not_finite_are_refused_where_they_count():
    true = tracks()
    broken, presence = true.copy(), everywhere(true)
    broken[1, 3, 2] = np.nan
    with pytest.raises(ValueError, match="finite positions"):
        med(broken, presence, true, everywhere(true))
    presence[1, 3, 2] = False
    assert med(broken, presence, true, everywhere(true)).lost.tolist() == [0] * 3 + [1] + [0] * 8


def test_shapes_that_do_not_belong_together_are_refused():
    true = tracks()
    refused = (ValueError, TypeError)  # TypeError where annotations are checked at run time
    with pytest.raises(refused, match="presence"):
        med(true, everywhere(true)[:, :, :2], true, everywhere(true))
    with pytest.raises(refused, match=r"same sequences|true_positions"):
        score(true, true[:, :5])
    with pytest.raises(refused, match="convention"):
        score(true, true, convention="exact")
    with pytest.raises(ValueError, match="2 context frames, got 1"):
        constant_velocity(true[:, :1], 3)
    with pytest.raises(ValueError, match="does not fit"):
        constant_velocity_with_walls(true, 3, radius=40.0)
