import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import adjusted_rand_score

from objdyn.metrics import segmentation
from objdyn.metrics.segmentation import (
    Scope,
    adjusted_rand_index,
    frame_ari,
    has_foreground,
    match_objects,
    match_tracks,
    matched_iou,
    mean_iou,
    one_cluster,
    segment,
    swap_rate,
    threshold_components,
    velocity_cosine,
    video_ari,
)


def lines(*frames: list[int]) -> np.ndarray:
    """One video of frames that are one pixel high, (1, t, 1, w)."""
    return np.array(frames)[None, :, None, :]


def ari(true: list[int], predicted: list[int], *, foreground: bool = False) -> float:
    return float(adjusted_rand_index(np.array([true]), np.array([predicted]), foreground=foreground)[0])


def random_labels(shape: tuple[int, ...], groups: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(groups, size=shape)


def test_ari_of_a_hand_counted_example():
    # Ordered pairs: together in both 2, in the truth 4, in the prediction 2, all 12; chance 4 * 2 / 12 = 2/3.
    assert ari([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx((2 - 2 / 3) / (3 - 2 / 3))


def test_foreground_ari_drops_the_pixels_whose_true_id_is_zero():
    true, predicted = [0, 0, 0, 1, 1, 2, 2], [3, 1, 2, 1, 1, 2, 2]
    assert ari(true, predicted, foreground=True) == 1.0
    assert ari(true, predicted) < 0.5


def test_ari_of_one_group_on_both_sides_is_one():
    assert ari([3, 3, 3], [1, 1, 1]) == 1.0
    assert ari([0, 3, 3], [2, 1, 1], foreground=True) == 1.0


def test_ari_of_one_group_against_several_is_zero():
    assert ari([1, 1, 1, 1], [0, 0, 1, 2]) == 0.0
    assert ari([0, 0, 1, 2], [1, 1, 1, 1]) == 0.0


def test_ari_of_single_pixels_on_both_sides_is_one():
    assert ari([0, 1, 2], [2, 0, 1]) == 1.0
    assert ari([4], [0]) == 1.0


def test_frames_without_foreground_score_one_and_can_be_told():
    true = lines([0, 0, 0], [0, 1, 2])
    predicted = lines([0, 1, 2], [0, 1, 1])
    np.testing.assert_array_equal(frame_ari(true, predicted, foreground=True), [[1.0, 0.0]])
    np.testing.assert_array_equal(has_foreground(true, per="frame"), [[False, True]])
    np.testing.assert_array_equal(has_foreground(true, per="video"), [True])
    assert np.isnan(matched_iou(true, predicted, per="frame")[0, 0])


@pytest.mark.parametrize(("pixels", "groups", "segments"), [(2, 2, 2), (30, 3, 5), (500, 9, 2), (4096, 5, 11)])
def test_ari_agrees_with_scikit_learn_on_random_labels(pixels: int, groups: int, segments: int):
    true, predicted = random_labels((20, pixels), groups, 0), random_labels((20, pixels), segments, 1)
    predicted[10:] = np.where(np.random.default_rng(2).random((10, pixels)) < 0.7, true[10:], predicted[10:])
    scores = adjusted_rand_index(true, predicted, foreground=False)
    foreground = adjusted_rand_index(true, predicted, foreground=True)
    for n in range(20):
        assert scores[n] == pytest.approx(adjusted_rand_score(true[n], predicted[n]), abs=1e-12)
        kept = true[n] > 0
        assert foreground[n] == pytest.approx(adjusted_rand_score(true[n][kept], predicted[n][kept]), abs=1e-12)


def test_ari_of_a_whole_video_of_the_paper_does_not_overflow():
    shape = (1, 40, 64, 64)
    true = random_labels(shape, 4, 0)
    predicted = np.where(random_labels(shape, 2, 1) > 0, true, random_labels(shape, 5, 2))
    expected = adjusted_rand_score(true.ravel(), predicted.ravel())
    assert video_ari(true, predicted, foreground=False)[0] == pytest.approx(expected, abs=1e-12)
    assert video_ari(one_cluster(true), one_cluster(true), foreground=False)[0] == 1.0


def test_scores_do_not_depend_on_the_order_of_slots_or_objects():
    true, predicted = random_labels((2, 3, 8, 8), 4, 0), random_labels((2, 3, 8, 8), 5, 1)
    renamed_true, renamed = np.array([0, 3, 1, 2])[true], np.array([4, 2, 0, 1, 3])[predicted]
    for foreground in (False, True):
        np.testing.assert_allclose(
            video_ari(true, predicted, foreground=foreground), video_ari(renamed_true, renamed, foreground=foreground)
        )
    scopes: tuple[Scope, ...] = ("frame", "video")
    for per in scopes:
        for metric in (matched_iou, mean_iou):
            np.testing.assert_allclose(metric(true, predicted, per=per), metric(renamed_true, renamed, per=per))


def test_slots_that_swap_are_right_per_frame_and_wrong_over_the_video():
    true = lines([1, 1, 2, 2], [1, 1, 2, 2])
    predicted = lines([1, 1, 2, 2], [2, 2, 1, 1])
    np.testing.assert_array_equal(frame_ari(true, predicted, foreground=True), [[1.0, 1.0]])
    # Four cells of 2 pixels: 8 ordered pairs together, 24 in each labelling, 56 in all; chance 24 * 24 / 56 = 72/7.
    assert video_ari(true, predicted, foreground=True)[0] == pytest.approx((8 - 72 / 7) / (24 - 72 / 7))
    np.testing.assert_array_equal(matched_iou(true, predicted, per="frame"), [[1.0, 1.0]])
    # Over the video each object shares 2 of 6 pixels with either segment.
    np.testing.assert_allclose(matched_iou(true, predicted, per="video"), [1 / 3])


def test_iou_of_a_hand_counted_example():
    # Object 1 {1, 2}: segment 1 covers 1 of 2, segment 2 1 of 3. Object 2 {3}: segment 2 covers 1 of 2. Background 1/1.
    true, predicted = lines([0, 1, 1, 2]), lines([0, 1, 2, 2])
    assert matched_iou(true, predicted, per="frame")[0, 0] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert mean_iou(true, predicted, per="frame")[0, 0] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_matching_maximises_the_sum_rather_than_the_first_object():
    # Object 1 {0, 1, 2}: segment 0 {0, 1, 3, 4} 2/5, segment 1 {2} 1/3. Object 2 {3, 4}: segment 0 2/4, segment 1 0.
    # The first object's best would be segment 0: 2/5 + 0 < 1/3 + 1/2.
    score = matched_iou(lines([1, 1, 1, 2, 2]), lines([0, 0, 1, 0, 0]), per="frame")[0, 0]
    assert score == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_an_object_without_a_segment_of_its_own_counts_as_zero():
    true = lines([1, 2])
    assert matched_iou(true, one_cluster(true), per="frame")[0, 0] == pytest.approx((1 / 2 + 0) / 2)
    assert mean_iou(true, one_cluster(true), per="frame")[0, 0] == pytest.approx(1 / 2)


def test_ids_that_do_not_occur_do_not_count_as_segments():
    assert mean_iou(lines([0, 0, 7]), lines([4, 4, 2]), per="frame")[0, 0] == 1.0
    assert matched_iou(lines([0, 0, 7]), lines([4, 4, 2]), per="frame")[0, 0] == 1.0


def test_swaps_by_hand_with_an_occlusion():
    # Object 1 is hidden in frame 2: slots 1, 1, -, 2 give 2 pairs, 1 swap. Object 2: 2, 2, 2, 1 gives 3 pairs, 1 swap.
    true = lines([0, 1, 1, 2], [0, 1, 1, 2], [0, 0, 0, 2], [0, 1, 1, 2])
    predicted = lines([0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 1, 2], [0, 2, 2, 1])
    result = swap_rate(true, predicted)
    assert (result.swaps.tolist(), result.pairs.tolist()) == ([2], [5])
    assert result.rate == pytest.approx(0.4)


def test_equal_overlaps_take_the_lowest_slot_and_are_no_swap():
    true = lines([1, 1, 0], [1, 1, 0])
    assert swap_rate(true, lines([1, 2, 0], [2, 1, 0])).swaps.tolist() == [0]


def test_a_video_without_pairs_has_no_swap_rate():
    assert np.isnan(swap_rate(lines([0, 0], [0, 0]), lines([0, 1], [1, 0])).rate)
    assert np.isnan(swap_rate(lines([0, 1]), lines([0, 1])).rate)
    assert swap_rate(lines([0, 1], [0, 0]), lines([0, 1], [0, 1])).pairs.tolist() == [0]


def test_rows_counted_in_parts_equal_rows_counted_at_once(monkeypatch: pytest.MonkeyPatch):
    true, predicted = random_labels((3, 4, 5, 5), 4, 0), random_labels((3, 4, 5, 5), 6, 1)
    at_once = frame_ari(true, predicted, foreground=True)
    monkeypatch.setattr(segmentation, "PIXELS_AT_ONCE", 60)
    np.testing.assert_array_equal(frame_ari(true, predicted, foreground=True), at_once)


def test_ids_made_from_colours_need_no_large_table():
    true, predicted = random_labels((2, 3, 6, 6), 4, 0), random_labels((2, 3, 6, 6), 3, 1)
    coded = np.array([0, 16_711_680, 65_280, 255])[true]
    for foreground in (False, True):
        expected = video_ari(true, predicted, foreground=foreground)
        np.testing.assert_allclose(video_ari(coded, predicted, foreground=foreground), expected)
        np.testing.assert_allclose(video_ari(coded[:, :1] * 0 + 999, predicted[:, :1], foreground=foreground), 0.0)


def test_small_integer_types_do_not_wrap_around():
    true = (random_labels((1, 2, 8, 8), 2, 0) * 255).astype(np.uint8)
    np.testing.assert_array_equal(frame_ari(true, true, foreground=False), [[1.0, 1.0]])
    np.testing.assert_array_equal(matched_iou(true, true, per="video"), [1.0])


def test_segment_takes_the_largest_mask_and_the_first_of_equal_ones():
    masks = np.array([[0.2, 0.5, 0.4], [0.3, 0.5, 0.4], [0.5, 0.0, 0.2]]).reshape(1, 1, 3, 1, 1, 3)
    np.testing.assert_array_equal(segment(masks), [[[[2, 0, 0]]]])
    with pytest.raises(ValueError, match="NaN"):
        segment(masks * np.nan)
    with pytest.raises(ValueError, match="k, 1, h, w"):
        segment(masks[:, :, :, 0])


@pytest.mark.parametrize("metric", [frame_ari, video_ari, matched_iou, mean_iou, swap_rate])
def test_bad_segmentations_are_refused(metric):
    options = {frame_ari: {"foreground": True}, video_ari: {"foreground": True}, swap_rate: {}}
    true = np.ones((1, 2, 4, 4), dtype=int)

    def score(predicted: np.ndarray, labels: np.ndarray = true) -> None:
        metric(labels, predicted, **options.get(metric, {"per": "frame"}))

    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 2, 8, 8\).*resized"):
        score(np.ones((1, 2, 8, 8), dtype=int))
    with pytest.raises(ValueError, match="both be"):
        score(true[0], true[0])
    with pytest.raises(ValueError, match=r"float64.*segment"):
        score(true.astype(float))
    with pytest.raises(ValueError, match="predicted segmentation has the id -1"):
        score(-true)
    with pytest.raises(ValueError, match="true segmentation has the id -1"):
        score(true, -true)


def test_an_unknown_scope_is_refused():
    true = lines([0, 1])
    for metric in (matched_iou, mean_iou):
        with pytest.raises(ValueError, match="'frame' or 'video', got 'clip'"):
            metric(true, true, per="clip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got 'clip'"):
        has_foreground(true, per="clip")  # pyright: ignore[reportArgumentType]


SIDE, CONTEXT = 33, 4


def moving(centres: list[list[tuple[int, int]]], background: int = 0) -> np.ndarray:
    """Squares of 3 pixels, (1, t, SIDE, SIDE); object i, with its centre (y, x) per frame, is in slot i + 1."""
    video = np.full((1, len(centres[0]), SIDE, SIDE), background)
    for i, path in enumerate(centres):
        for t, (y, x) in enumerate(path):
            video[0, t, y - 1 : y + 2, x - 1 : x + 2] = i + 1
    return video


def truth(centres: list[list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    positions = 2 * np.array(centres, dtype=float).swapaxes(0, 1)[None] / (SIDE - 1) - 1
    return positions, np.ones(positions.shape[:3], dtype=bool)


def straight(y: int, x: int, dy: int, dx: int, frames: int = 8) -> list[tuple[int, int]]:
    return [(y + dy * t, x + dx * t) for t in range(frames)]


TWO = [straight(4, 4, 2, 1), straight(28, 6, -1, 2)]


def test_velocity_cosine_of_perfect_masks_is_one():
    result = velocity_cosine(moving(TWO), 3, *truth(TWO), context=CONTEXT)
    np.testing.assert_allclose(result.per_frame, np.ones(4))
    assert (result.pairs.tolist(), result.skipped.tolist()) == ([2, 2, 2, 2], [0, 0, 0, 0])
    assert (result.videos_used, result.videos_dropped) == (1, 0)


def test_velocity_cosine_of_motion_that_turns_back_is_minus_one():
    # Predicted frame 0 is where frame CONTEXT - 2 was: no velocity over two frames, so both objects are skipped there.
    back = [[*path[:CONTEXT], *(path[CONTEXT - 2 - i] for i in range(3))] for path in TWO]
    onward = [path[: CONTEXT + 3] for path in TWO]
    result = velocity_cosine(moving(back), 3, *truth(onward), context=CONTEXT)
    np.testing.assert_allclose(result.per_frame, [np.nan, -1, -1])
    assert (result.pairs.tolist(), result.skipped.tolist()) == ([0, 2, 2], [2, 0, 0])


def test_velocity_cosine_of_a_right_angle_is_zero():
    right, down = straight(8, 8, 0, 2), straight(8, 8, 2, 0)
    seen = straight(8, 8, 0, 0, frames=3)
    result = velocity_cosine(moving([[*seen, *down[1:]]]), 2, *truth([[*seen, *right[1:]]]), context=3)
    np.testing.assert_allclose(result.per_frame, np.zeros(7), atol=1e-12)


def test_velocity_cosine_matches_slots_in_any_order():
    result = velocity_cosine(moving(TWO[::-1]), 3, *truth(TWO), context=CONTEXT)
    np.testing.assert_allclose(result.per_frame, np.ones(4))


def test_a_video_whose_objects_share_a_slot_is_dropped():
    together = np.concatenate([moving(TWO[:1]), moving(TWO)])
    positions, present = truth(TWO)
    result = velocity_cosine(
        together, 3, np.repeat(positions, 2, axis=0), np.repeat(present, 2, axis=0), context=CONTEXT
    )
    assert (result.videos_used, result.videos_dropped) == (1, 1)
    assert result.pairs.tolist() == [2, 2, 2, 2]


def test_the_background_is_never_an_object_even_at_the_centre():
    # The object moves over the centre; its slot is a frame's third away, the background's box middle is nearer.
    path, far = straight(16, 12, 0, 1), straight(26, 12, 0, 1)
    result = velocity_cosine(moving([far]), 2, *truth([path]), context=CONTEXT)
    np.testing.assert_allclose(result.per_frame, np.ones(4))
    only_background = velocity_cosine(one_cluster(moving([path])), 2, *truth([path]), context=CONTEXT)
    assert only_background.videos_used == 1  # the empty slot is taken, and has no velocity
    assert only_background.skipped.tolist() == [1, 1, 1, 1]
    assert velocity_cosine(one_cluster(moving([path])), 1, *truth([path]), context=CONTEXT).videos_dropped == 1


def test_a_slot_that_vanishes_is_skipped_and_counted():
    vanishing = moving(TWO)
    vanishing[:, 6:][vanishing[:, 6:] == 2] = 0
    result = velocity_cosine(vanishing, 3, *truth(TWO), context=CONTEXT)
    assert (result.pairs.tolist(), result.skipped.tolist()) == ([2, 2, 1, 1], [0, 0, 1, 1])
    np.testing.assert_allclose(result.per_frame, np.ones(4))


def test_absent_and_resting_objects_have_no_velocity():
    rest = straight(20, 20, 0, 0)
    positions, present = truth([TWO[0], rest])
    present[:, 5:, 0] = False
    positions[:, 5:, 0] = np.nan
    result = velocity_cosine(moving([TWO[0], rest]), 3, positions, present, context=CONTEXT)
    assert result.pairs.tolist() == [1, 0, 0, 0]
    assert result.skipped.tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(result.per_frame, [1, np.nan, np.nan, np.nan])


def test_an_object_absent_from_the_context_is_not_followed():
    positions, present = truth(TWO)
    present[:, :CONTEXT, 1] = False
    result = velocity_cosine(moving(TWO), 3, positions, present, context=CONTEXT)
    assert result.pairs.tolist() == [1, 1, 1, 1]


def test_velocity_cosine_refuses_what_does_not_belong_together():
    segments, (positions, present) = moving(TWO), truth(TWO)
    with pytest.raises(ValueError, match=r"slot 2, but num_slots is 2; pass"):
        velocity_cosine(segments, 2, positions, present, context=CONTEXT)
    for context in (1, 8):
        with pytest.raises(ValueError, match=f"got {context} of 8"):
            velocity_cosine(segments, 3, positions, present, context=context)
    with pytest.raises(ValueError, match=r"same videos and frames, got \(1, 7\) and \(1, 8\)"):
        velocity_cosine(segments[:, 1:], 3, positions, present, context=CONTEXT)
    with pytest.raises(ValueError, match="must be"):
        velocity_cosine(segments, 3, positions, present[..., 0], context=CONTEXT)
    with pytest.raises(ValueError, match="integers from 0"):
        velocity_cosine(segments.astype(float), 3, positions, present, context=CONTEXT)
    with pytest.raises(ValueError, match="finite positions"):
        velocity_cosine(segments, 3, positions * np.nan, present, context=CONTEXT)


def painted(labels: np.ndarray, ground: int = 20) -> np.ndarray:
    """Frames (n, t, h, w, 3) with objects of different bright colours."""
    palette = np.array([[ground] * 3, [250, 30, 20], [30, 240, 30], [200, 200, 0]], dtype=np.uint8)
    return palette[labels]


def test_threshold_and_components_follow_separate_objects_over_the_video():
    true = moving(TWO)
    predicted = threshold_components(painted(true))
    np.testing.assert_array_equal(predicted > 0, true > 0)
    np.testing.assert_array_equal(video_ari(true, predicted, foreground=False), [1.0])
    assert predicted.max() == 2


def test_the_ground_may_be_grey_and_differ_between_videos():
    true = np.concatenate([moving(TWO), moving(TWO)])
    frames = np.concatenate([painted(true[:1]), painted(true[1:], ground=150)])
    np.testing.assert_array_equal(threshold_components(frames) > 0, true > 0)
    assert threshold_components(frames, threshold=120)[1].max() == 0


def test_components_touch_over_corners_but_not_over_frames():
    true = np.zeros((1, 2, 4, 4), dtype=int)
    true[0, 0, 0, 0] = true[0, 0, 1, 1] = true[0, 1, 3, 3] = 1
    # Frame 1's pixel overlaps nothing in frame 0: a new id.
    expected = np.where(true, np.array([1, 2])[None, :, None, None], 0)
    np.testing.assert_array_equal(threshold_components(painted(true)), expected)


def test_a_component_that_splits_keeps_its_id_for_the_larger_overlap():
    true = lines([1, 1, 1, 1, 1, 0, 2], [1, 0, 1, 1, 1, 0, 2], [0, 0, 1, 1, 1, 0, 0])
    expected = lines([1, 1, 1, 1, 1, 0, 2], [3, 0, 1, 1, 1, 0, 2], [0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(threshold_components(painted(true)), expected)


def test_components_are_those_of_scipy_frame_by_frame():
    bright = np.random.default_rng(0).random((3, 4, 12, 12)) < 0.25
    predicted = threshold_components(painted(bright.astype(int)))
    for n, t in np.ndindex(3, 4):
        labels = np.zeros((12, 12), dtype=np.int64)
        ndimage.label(bright[n, t], structure=np.ones((3, 3)), output=labels)
        assert ari(labels.ravel().tolist(), predicted[n, t].ravel().tolist()) == 1.0


def test_videos_without_an_object_are_all_background():
    assert threshold_components(np.full((2, 3, 4, 4, 1), 90, dtype=np.uint8)).max() == 0
    with pytest.raises(ValueError, match="uint8"):
        threshold_components(np.zeros((2, 3, 4, 4, 1)))


def test_one_cluster_has_foreground_ari_zero_and_is_an_integer_segmentation():
    true = moving(TWO)
    for labels in (true, random_labels((4, 10, 16, 16), 4, 0)):
        np.testing.assert_array_equal(frame_ari(labels, one_cluster(labels), foreground=True), 0.0)
        np.testing.assert_array_equal(frame_ari(one_cluster(labels), labels, foreground=False), 0.0)
    assert np.issubdtype(one_cluster(true).dtype, np.integer)


def slots_of(*frames: str) -> np.ndarray:
    """Frames of one row, a digit per pixel; ``.`` is a pixel of no slot."""
    return np.array([[[-1 if pixel == "." else int(pixel) for pixel in frame]] for frame in frames])


def test_tracks_follow_slots_that_change_places():
    tracks = match_tracks(slots_of("001122", "110022", "110222", "220111"), 3)
    np.testing.assert_array_equal(tracks, [[0, 1, 2], [1, 0, 2], [1, 0, 2], [1, 2, 0]])


def test_tracks_are_those_of_the_largest_sum_of_ious():
    # Slot 0 overlaps track 0 most (4 / 8); taking track 1 (2 / 6) leaves track 0 to slot 1 (2 / 6).
    tracks = match_tracks(slots_of("000000112", "110000002"), 3)
    np.testing.assert_array_equal(tracks[1], [1, 0, 2])


def test_slots_that_overlap_nothing_keep_their_tracks():
    tracks = match_tracks(slots_of("01....", "..01..", "....10"), 2)
    np.testing.assert_array_equal(tracks, [[0, 1]] * 3)
    # Also where they have changed places before.
    tracks = match_tracks(slots_of("0011..", "1100..", "....01"), 2)
    np.testing.assert_array_equal(tracks, [[0, 1], [1, 0], [1, 0]])


def test_an_empty_slot_gets_the_track_that_is_left():
    tracks = match_tracks(slots_of("001122", "110022", "000022", "002211"), 3)
    np.testing.assert_array_equal(tracks, [[0, 1, 2], [1, 0, 2], [1, 0, 2], [0, 2, 1]])


def test_a_track_is_found_again_after_an_occlusion():
    tracks = match_tracks(slots_of("00.11.22", "......22", "11.00.22"), 3)
    np.testing.assert_array_equal(tracks, [[0, 1, 2], [0, 1, 2], [1, 0, 2]])


def test_every_frame_has_every_track_once():
    segments = np.random.default_rng(0).integers(-1, 6, (9, 8, 8))
    tracks = match_tracks(segments, 7)
    np.testing.assert_array_equal(np.sort(tracks, axis=1), np.tile(np.arange(7), (9, 1)))


def test_tracks_refuse_what_is_no_segmentation():
    with pytest.raises(ValueError, match="slot 2, but num_slots is 2; pass"):
        match_tracks(slots_of("012"), 2)
    for segments in (np.zeros((2, 4, 4)), np.zeros((4, 4), int), np.zeros((0, 4, 4), int)):
        with pytest.raises(ValueError, match=r"must be integers \(t, h, w\)"):
            match_tracks(segments, 2)


def test_each_object_gets_the_slot_that_shows_it():
    true = lines([0, 0, 1, 1, 2, 2, 0, 3])
    found = match_objects(true, lines([4, 4, 2, 2, 0, 0, 4, 4]), num_objects=4, num_slots=5)
    np.testing.assert_array_equal(found.slot, [[[2, 0, -1, -1]]])  # slot 4 is the background's
    np.testing.assert_array_equal(found.iou, [[[1, 1, 0, 0]]])
    np.testing.assert_array_equal(found.visible, [[[True, True, True, False]]])


def test_matching_is_the_best_of_all_assignments():
    true, predicted = random_labels((6, 2, 5, 5), 4, seed=1), random_labels((6, 2, 5, 5), 4, seed=2)
    found = match_objects(true, predicted, 3, 4)
    for n, t in np.ndindex(6, 2):
        masks, slots = (labels[n, t] == np.arange(4)[:, None, None] for labels in (true, predicted))
        iou = np.array([[(a & b).sum() / (a | b).sum() for b in slots] for a in masks])
        iou = np.where(iou[0] >= iou[1:].max(axis=0), 0, iou[1:])
        best = max(iou[[0, 1, 2], order].sum() for order in itertools.permutations(range(4), 3))
        assert found.iou[n, t].sum() == pytest.approx(best)
        of_slot = [iou[m, k] if k >= 0 else 0 for m, k in enumerate(found.slot[n, t])]
        np.testing.assert_allclose(found.iou[n, t], of_slot)
        taken = [k for k in found.slot[n, t] if k >= 0]
        assert len(set(taken)) == len(taken)
