import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from objdyn.metrics.probe import ALPHAS, DROPPED, Pairs, fit_probe, hold_out, pair_objects

CLIPS, PER_CLIP = 30, 12
OF_CLIP = np.repeat(np.arange(CLIPS), PER_CLIP)
HELD_OUT = hold_out(np.arange(CLIPS))[OF_CLIP]


def lines(*frames: list[int]) -> np.ndarray:
    """One video of frames that are one pixel high, (1, t, 1, w)."""
    return np.array(frames)[None, :, None, :]


def draw(seed: int, dim: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(OF_CLIP), dim))


def test_a_linear_map_is_recovered_exactly():
    features = draw(0, 5) * [1, 100, 0.01, 3, 1] + [0, 7, -2, 0, 50]
    weight, bias = np.array([[1.0, -0.02, 30.0, 0.0, 2.0], [0.0, 0.01, -10.0, 1.0, -1.0]]), np.array([3.0, -4.0])
    probe = fit_probe(features, features @ weight.T + bias, OF_CLIP, HELD_OUT)
    assert probe.r2 == pytest.approx([1.0, 1.0], abs=1e-12)
    assert probe.r2_overall == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(probe.weight, weight, atol=1e-6)  # the least penalty shrinks by 1e-8
    np.testing.assert_allclose(probe.bias, bias, atol=1e-5)
    assert (probe.train_clips, probe.test_clips, probe.test_pairs) == (21, 9, 9 * PER_CLIP)


def test_noise_explains_nothing():
    probe = fit_probe(draw(1, 16), draw(2, 2), OF_CLIP, HELD_OUT)
    assert probe.r2_overall < 0.05
    assert (probe.r2 < 0.05).all()
    assert probe.alpha >= 0.1  # and is mostly ignored


def test_r2_is_the_share_of_the_variance_that_the_features_hold():
    # Of two independent targets of variance 1 and 4, the features hold the first and half of the second's variance.
    features, rest = draw(3, 2), draw(4, 1)
    targets = np.stack([features[:, 0], np.sqrt(2) * (features[:, 1] + rest[:, 0])], axis=1)
    probe = fit_probe(features, targets, OF_CLIP, HELD_OUT)
    assert probe.r2[0] == pytest.approx(1.0, abs=1e-3)
    assert probe.r2[1] == pytest.approx(0.5, abs=0.15)
    assert probe.r2_overall == pytest.approx((1 + 2) / 5, abs=0.15)


def test_weights_and_r2_are_those_of_scikit_learn():
    features, targets = draw(5, 4) * [1, 5, 0.2, 1], draw(6, 2) + draw(5, 4)[:, :2]
    probe = fit_probe(features, targets, OF_CLIP, HELD_OUT)
    mean, scale = features[~HELD_OUT].mean(axis=0), features[~HELD_OUT].std(axis=0)
    ridge = Ridge(alpha=probe.alpha * (~HELD_OUT).sum()).fit((features[~HELD_OUT] - mean) / scale, targets[~HELD_OUT])
    predicted = ridge.predict((features[HELD_OUT] - mean) / scale)
    np.testing.assert_allclose(features[HELD_OUT] @ probe.weight.T + probe.bias, predicted, rtol=1e-9)
    np.testing.assert_allclose(probe.r2, r2_score(targets[HELD_OUT], predicted, multioutput="raw_values"), rtol=1e-9)


def test_the_penalty_is_chosen_between_clips_and_not_inside_them():
    # Each clip has one target, and features that only name the clip: they say nothing about other clips.
    names = np.random.default_rng(7).normal(size=(CLIPS, 40))[OF_CLIP] + 0.01 * draw(8, 40)
    targets = np.random.default_rng(9).normal(size=(CLIPS, 1))[OF_CLIP]
    probe = fit_probe(names, targets, OF_CLIP, HELD_OUT)
    assert probe.alpha >= 0.1
    inside = np.arange(len(OF_CLIP)) % 2 == 0  # with every other pair of a clip as its own clip the trap would work
    assert fit_probe(names, targets, np.arange(len(OF_CLIP)), inside).r2_overall > 0.9


def test_constant_features_and_targets_are_harmless():
    features = np.concatenate([draw(10, 2), np.full((len(OF_CLIP), 1), 0.1)], axis=1)
    targets = np.stack([features[:, 0], np.full(len(OF_CLIP), 0.3)], axis=1)
    probe = fit_probe(features, targets, OF_CLIP, HELD_OUT)
    assert probe.r2[0] == pytest.approx(1.0, abs=1e-12)
    assert np.isnan(probe.r2[1])
    assert probe.r2_overall == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_array_equal(probe.weight[:, 2], 0)


def test_more_features_than_pairs_still_have_an_answer():
    few = np.flatnonzero(np.isin(OF_CLIP, [0, 1, 2, 3]))[::6]
    probe = fit_probe(draw(11, 50)[few], draw(12, 2)[few], OF_CLIP[few], OF_CLIP[few] == 3)
    assert np.isfinite(probe.weight).all()
    assert probe.alpha in ALPHAS


def test_clips_of_one_video_are_held_out_together():
    videos = np.array([4, 4, 7, 9, 9, 9, 11, 12, 13, 14, 15, 16])
    chosen = hold_out(videos, share=0.4, seed=3)
    assert len(np.unique(videos[chosen])) == 4  # of 9
    assert not set(videos[chosen]) & set(videos[~chosen])
    np.testing.assert_array_equal(chosen, hold_out(videos, share=0.4, seed=3))
    assert hold_out(np.array([1, 2]), share=0.01).sum() == 1
    assert hold_out(np.array([1, 2]), share=0.99).sum() == 1


def test_pairs_follow_slots_that_change_places():
    true = lines([0, 1, 1, 0, 0, 2, 2, 0], [0, 0, 1, 1, 0, 2, 2, 0], [0, 0, 0, 1, 1, 2, 2, 0])
    # Slot of background, object 1, object 2 in each frame.
    names = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    segments = np.stack([np.array(name)[frame] for name, frame in zip(names, true[0], strict=True)])[None]
    positions = np.zeros((1, 3, 2, 2), np.float32)
    positions[0, :, 0, 1] = [-0.5, -0.25, 0.5]
    pairs = pair_objects(true, segments, 3, positions, np.ones((1, 3, 2), bool))
    assert pairs.frame.tolist() == [1, 1, 2, 2]
    assert pairs.object.tolist() == [0, 1, 0, 1]
    assert pairs.slot.tolist() == [0, 1, 2, 0]
    assert pairs.slot_before.tolist() == [1, 2, 0, 1]
    np.testing.assert_array_equal(pairs.velocity, [[0, 0.25], [0, 0], [0, 0.75], [0, 0]])
    assert sum(pairs.dropped.values()) == 0


def pair_two_frames(
    true: np.ndarray, segments: np.ndarray, *, present: bool = True, known: bool = True, slots: int = 3
) -> Pairs:
    """Two frames with one object."""
    positions = np.full((1, 2, 1, 2), 0.0 if known else np.nan, np.float32)
    return pair_objects(true, segments, slots, positions, np.array([[[True], [present]]]))


OBJECT, BACKGROUND = [0, 1, 1, 1, 0, 0, 0, 0], [0] * 8


@pytest.mark.parametrize(
    ("true", "segments", "reason"),
    [
        (lines(OBJECT, BACKGROUND), lines(OBJECT, OBJECT), "not visible"),
        (lines(BACKGROUND, OBJECT), lines(OBJECT, OBJECT), "not visible before"),
        (lines(OBJECT, OBJECT), lines(OBJECT, BACKGROUND), "no slot"),  # the background's slot took it
        (lines(OBJECT, OBJECT), lines(BACKGROUND, OBJECT), "no slot before"),
        (lines(OBJECT, OBJECT), lines(OBJECT, [0, 0, 0, 1, 1, 0, 0, 0]), "no slot"),  # IoU 1 / 4
        (lines(OBJECT, OBJECT), lines(OBJECT, [0, -1, -1, -1, 0, 0, 0, 0]), "no slot"),
    ],
)
def test_objects_without_a_slot_of_their_own_are_counted(true: np.ndarray, segments: np.ndarray, reason: str):
    pairs = pair_two_frames(true, segments)
    assert len(pairs.clip) == 0
    assert pairs.dropped == {name: int(name == reason) for name in DROPPED}


def test_unknown_positions_are_counted_and_absent_objects_are_not():
    both = lines(OBJECT, OBJECT)
    assert pair_two_frames(both, both, known=False).dropped["position unknown"] == 1
    absent = pair_two_frames(both, both, present=False)
    assert len(absent.clip) == 0
    assert sum(absent.dropped.values()) == 0
    assert len(pair_two_frames(both, both).clip) == 1


def test_a_background_that_is_split_into_slots_gives_none_to_objects():
    true = lines([1, 0, 0, 0, 0, 0, 0, 0])
    split = lines([0, 0, 0, 0, 0, 1, 1, 1])
    assert len(pair_two_frames(np.tile(true, (1, 2, 1, 1)), np.tile(split, (1, 2, 1, 1))).clip) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": np.zeros(len(OF_CLIP), int)}, "hold out whole clips"),
        ({"held_out": OF_CLIP > 0}, "at least 2 clips to fit on and of 1 to measure on, got 1 and 29"),
        ({"held_out": np.zeros(len(OF_CLIP), bool)}, "got 30 and 0"),
        ({"features": np.full((len(OF_CLIP), 2), np.nan)}, "features must be finite"),
        ({"targets": np.zeros((3, 2))}, "must be"),
    ],
)
def test_data_that_cannot_be_probed_are_refused(change: dict[str, np.ndarray], message: str):
    given = {"features": draw(0, 2), "targets": draw(1, 2), "clips": OF_CLIP, "held_out": HELD_OUT} | change
    with pytest.raises(ValueError, match=message):
        fit_probe(**given)


def test_a_single_video_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2 videos"):
        hold_out(np.array([5, 5, 5]))


def test_shapes_that_do_not_belong_together_are_refused():
    frames = lines(OBJECT, OBJECT)
    with pytest.raises(ValueError, match="positions must be"):
        pair_objects(frames, frames, 2, np.zeros((1, 3, 1, 2)), np.ones((1, 2, 1), bool))
    with pytest.raises(ValueError, match="there are 1 objects and 1 slots"):
        pair_objects(frames, frames, 1, np.zeros((1, 2, 1, 2)), np.ones((1, 2, 1), bool))
