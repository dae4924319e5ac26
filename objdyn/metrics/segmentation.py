"""How well masks agree with the true objects, per frame and over a whole video, and the trivial segmentations to beat.

A segmentation is an integer per pixel. In the true one 0 is the background and the other ids are objects, each with
one id in all frames of its video; in a predicted one the integer is the slot (or component) that claims the pixel, and
0 has no special meaning. "Per frame" compares each frame alone, so slots may change places between frames; "over the
whole video" compares all pixels of a video at once, so they may not.

scipy is imported where it is used: training computes ARI alone, and does without it.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

SHIFT = 2
"""Frames between the two positions of a velocity (DDPAE's metric)."""
LEAST_NORM = 1e-4
"""Slower velocities have no direction; in [-1, 1] coordinates."""
LONGEST = 8.0
"""Squared distance between opposite corners of the frame in [-1, 1] coordinates."""
PIXELS_AT_ONCE = 1 << 22
MOST_IDS = 256
KEEP_SLOT = 1e-6
"""What an equal choice in ``match_tracks`` gains by leaving a track in its slot."""

Scope = Literal["frame", "video"]


class Swaps(NamedTuple):
    """How often objects change their slot, per video."""

    swaps: Int[np.ndarray, " n"]
    """Pairs of frames in which an object's best slot differs."""
    pairs: Int[np.ndarray, " n"]
    """Pairs of frames that were compared, over all objects."""

    @property
    def rate(self) -> float:
        """Swaps over pairs, of all videos together; NaN where there is no pair."""
        pairs = int(self.pairs.sum())
        return int(self.swaps.sum()) / pairs if pairs else float("nan")


class ObjectSlots(NamedTuple):
    """The slot that shows each object, frame by frame."""

    slot: Int[np.ndarray, "n t m"]
    """-1 where an object has no pixel, or no slot."""
    iou: Float[np.ndarray, "n t m"]
    """Intersection over union of the object and its slot; 0 where there is none."""
    visible: Bool[np.ndarray, "n t m"]
    """Whether the object has a pixel."""


class VelocityCosine(NamedTuple):
    """Cosine between predicted and true velocities of objects, at each predicted frame."""

    per_frame: Float[np.ndarray, " t"]
    """Mean over ``pairs``; NaN where there is none. The first entry is the first predicted frame."""
    pairs: Int[np.ndarray, " t"]
    """Objects measured, over all used videos."""
    skipped: Int[np.ndarray, " t"]
    """Objects that move, but whose slot stands still or has no pixel; they are not in the mean, so read both."""
    videos_used: int
    videos_dropped: int
    """Videos in which two objects are nearest to one slot, or no slot is left for an object."""


def segment(masks: Float[np.ndarray, "n t k 1 h w"]) -> Int[np.ndarray, "n t h w"]:
    """The slot with the largest mask at each pixel, the lowest of equal ones.

    Raises:
        ValueError: masks of another rank, or not finite.
    """
    if masks.ndim != 6 or masks.shape[3] != 1 or masks.shape[2] == 0:
        raise ValueError(f"masks must be (n, t, k, 1, h, w) with at least one slot, got shape {masks.shape}")
    if not np.isfinite(masks).all():
        raise ValueError("masks must be finite, got NaN or infinity; the model has diverged")
    return masks[:, :, :, 0].argmax(axis=2)


def has_foreground(true: Integer[np.ndarray, "n t h w"], *, per: Scope) -> Bool[np.ndarray, "*rows"]:
    """Whether a frame (n, t), or a video (n,), shows an object at all.

    Where not, foreground ARI is 1.0 by convention and ``matched_iou`` is NaN: use this to leave such frames out.

    Raises:
        ValueError: an unknown ``per``.
    """
    return (true != 0).any(axis=(2, 3) if _known(per) == "frame" else (1, 2, 3))


def adjusted_rand_index(
    true: Integer[np.ndarray, "n p"], predicted: Integer[np.ndarray, "n p"], *, foreground: bool
) -> Float[np.ndarray, " n"]:
    """Adjusted Rand index of two labellings of p pixels, for each of n rows: 1 agreement, 0 what chance gives.

    With S the number of ordered pairs of pixels that both labellings keep together, A and B those that each keeps
    together and T all: ``(S - A B / T) / ((A + B) / 2 - A B / T)``. The denominator is zero only if both labellings
    are one group, or both give each pixel its own; they agree, and the index is 1. If only one of them is one group
    the index is 0.

    Source: Hubert & Arabie, "Comparing partitions" (1985); equal to ``sklearn.metrics.adjusted_rand_score``.

    Args:
        true: labels; 0 is the background.
        predicted: labels.
        foreground: drop pixels whose true label is 0 (F-ARI). A row without any other pixel then scores 1.0, as in
            PROVIDE's protocol (0/0 -> 1); ``has_foreground`` tells which rows these are.

    Raises:
        ValueError: shapes that differ, labels that are not integers, or negative ones.
    """
    _check(true, predicted, axes="n p")
    counts = _contingency(true, predicted)
    if foreground:
        counts = counts[:, 1:]
    # Whole numbers until the last line: a pair count of a 40-frame video, 3e10, is exact, its square is not.
    together = _ordered_pairs(counts).sum(axis=(1, 2))
    by_truth = _ordered_pairs(counts.sum(axis=2)).sum(axis=1)
    by_prediction = _ordered_pairs(counts.sum(axis=1)).sum(axis=1)
    every = _ordered_pairs(counts.sum(axis=(1, 2)))
    degenerate = (by_truth == by_prediction) & ((by_truth == 0) | (by_truth == every))
    # In this order one group against several is 0, not 0 up to rounding.
    chance = np.minimum(by_truth, by_prediction) * (np.maximum(by_truth, by_prediction) / np.maximum(every, 1))
    spread = (by_truth + by_prediction) / 2 - chance
    return np.where(degenerate, 1.0, (together - chance) / np.where(degenerate, 1.0, spread))


def frame_ari(
    true: Integer[np.ndarray, "n t h w"], predicted: Integer[np.ndarray, "n t h w"], *, foreground: bool
) -> Float[np.ndarray, "n t"]:
    """Adjusted Rand index of each frame (PROVIDE's protocol: the mean of these over frames and videos).

    Raises:
        ValueError: as for ``adjusted_rand_index``.
    """
    _check(true, predicted)
    scores = adjusted_rand_index(_rows(true, "frame"), _rows(predicted, "frame"), foreground=foreground)
    return scores.reshape(true.shape[:2])


def video_ari(
    true: Integer[np.ndarray, "n t h w"], predicted: Integer[np.ndarray, "n t h w"], *, foreground: bool
) -> Float[np.ndarray, " n"]:
    """Adjusted Rand index over all pixels of each video: an object must keep its slot.

    Raises:
        ValueError: as for ``adjusted_rand_index``.
    """
    _check(true, predicted)
    return adjusted_rand_index(_rows(true, "video"), _rows(predicted, "video"), foreground=foreground)


def matched_iou(
    true: Integer[np.ndarray, "n t h w"], predicted: Integer[np.ndarray, "n t h w"], *, per: Scope
) -> Float[np.ndarray, "*rows"]:
    """Mean intersection over union of true objects with the segment matched to each, (n, t) or (n,).

    Each object (id above 0 with at least one pixel) gets a segment of its own, so that the sum is largest (Hungarian
    method). Every segment can be matched, also 0; an object beyond the number of segments counts as 0. NaN where there
    is no object.

    Raises:
        ValueError: as for ``adjusted_rand_index``, or an unknown ``per``.
    """
    from scipy.optimize import linear_sum_assignment

    _check(true, predicted)
    overlap, present = _iou(_contingency(_rows(true, _known(per)), _rows(predicted, per)))
    overlap, objects = overlap[:, 1:], present[:, 1:].sum(axis=1)
    total = np.array([table[linear_sum_assignment(table, maximize=True)].sum() for table in overlap])
    mean = np.where(objects > 0, total / np.maximum(objects, 1), np.nan)
    return mean.reshape(true.shape[: 2 if per == "frame" else 1])


def match_objects(
    true: Integer[np.ndarray, "n t h w"], predicted: Integer[np.ndarray, "n t h w"], num_objects: int, num_slots: int
) -> ObjectSlots:
    """Give each object of each frame a slot of its own, so that the sum of IoUs in the frame is largest.

    A slot shows the background, and is given to no object, if no object has a larger IoU with it than the true
    background has. An object that no other slot overlaps has none.

    Args:
        true: object m has the id m + 1.
        predicted: slot of each pixel; negative where no slot has it.
        num_objects: objects, also those without a pixel.
        num_slots: slots, also those without a pixel.

    Raises:
        ValueError: shapes that differ, labels that are not integers, or ids beyond the numbers given.
    """
    from scipy.optimize import linear_sum_assignment

    shifted = predicted + 1 if np.issubdtype(predicted.dtype, np.integer) else predicted  # 0 is then no slot
    _check(true, np.maximum(shifted, 0))
    if true.max(initial=0) > num_objects or predicted.max(initial=-1) >= num_slots:
        raise ValueError(
            f"the true segmentation has ids up to {true.max(initial=0)} and the slots go up to "
            f"{predicted.max(initial=-1)}, but there are {num_objects} objects and {num_slots} slots; ids of objects "
            "count from 1, those of slots from 0"
        )
    counts = _contingency(_rows(true, "frame"), _rows(np.maximum(shifted, 0), "frame"), compact=False)
    overlap, present = _iou(counts)
    whole = np.zeros((len(overlap), num_objects + 1, num_slots + 1))
    whole[:, : overlap.shape[1], : overlap.shape[2]] = overlap
    visible = np.zeros((len(overlap), num_objects), dtype=bool)
    visible[:, : present.shape[1] - 1] = present[:, 1:]
    of_background, of_objects = whole[:, :1, 1:], whole[:, 1:, 1:]
    of_objects = np.where(of_background >= of_objects.max(axis=1, keepdims=True, initial=0), 0, of_objects)
    slot, iou = np.full(visible.shape, -1), np.zeros(visible.shape)
    for row, table in enumerate(of_objects):
        objects, slots = linear_sum_assignment(table, maximize=True)
        overlaps = table[objects, slots] > 0
        slot[row, objects[overlaps]] = slots[overlaps]
        iou[row, objects] = table[objects, slots]
    shape = (*true.shape[:2], num_objects)
    return ObjectSlots(slot.reshape(shape), iou.reshape(shape), visible.reshape(shape))


def mean_iou(
    true: Integer[np.ndarray, "n t h w"], predicted: Integer[np.ndarray, "n t h w"], *, per: Scope
) -> Float[np.ndarray, "*rows"]:
    """Mean over the true segments of the best IoU that any predicted segment reaches, (n, t) or (n,).

    The background counts as one true segment; ids without a pixel do not count. One predicted segment may be the best
    of several true ones.

    Raises:
        ValueError: as for ``adjusted_rand_index``, or an unknown ``per``.
    """
    _check(true, predicted)
    overlap, present = _iou(_contingency(_rows(true, _known(per)), _rows(predicted, per)))
    mean = overlap.max(axis=2).sum(axis=1) / present.sum(axis=1)
    return mean.reshape(true.shape[: 2 if per == "frame" else 1])


def swap_rate(true: Integer[np.ndarray, "n t h w"], predicted: Integer[np.ndarray, "n t h w"]) -> Swaps:
    """How often an object's slot changes from one frame to the next in which the object is visible.

    In each frame an object's slot is the segment with the largest IoU, the lowest of equal ones. Frames in which the
    object has no pixel are skipped: the frame before an occlusion and the frame after it form a pair, so a slot that is
    lost behind another object counts. An object seen in v frames gives v - 1 pairs.

    Raises:
        ValueError: as for ``adjusted_rand_index``.
    """
    _check(true, predicted)
    videos, frames = true.shape[:2]
    overlap, present = _iou(_contingency(_rows(true, "frame"), _rows(predicted, "frame")))
    slot = overlap[:, 1:].argmax(axis=2).reshape(videos, frames, -1)
    visible = present[:, 1:].reshape(videos, frames, -1)
    last_seen = np.maximum.accumulate(np.where(visible, np.arange(frames)[:, None], -1), axis=1)[:, :-1]
    before = np.take_along_axis(slot, np.maximum(last_seen, 0), axis=1)
    pair = visible[:, 1:] & (last_seen >= 0)
    swapped = pair & (slot[:, 1:] != before)
    return Swaps(swaps=swapped.sum(axis=(1, 2)), pairs=pair.sum(axis=(1, 2)))


def match_tracks(segments: Integer[np.ndarray, "t h w"], num_slots: int) -> Int[np.ndarray, "t k"]:
    """Track of each slot in each frame of one video, for models whose slots change places between frames.

    In the first frame slot k is track k. From then on every frame's slots are matched to the tracks one to one, so that
    the sum of mask IoUs is largest (Hungarian method); the mask of a track is that of the last frame in which it had a
    pixel, so a short occlusion does not end it. Sums that differ by less than ``KEEP_SLOT`` are equal: then tracks stay
    in the slots that they had. A slot without a pixel overlaps nothing, so it gets a track that is left over, its own
    if that is free.

    Args:
        segments: slot of each pixel; negative where no slot has it.
        num_slots: slots, also those without a pixel.

    Raises:
        ValueError: segments of another rank, not integers, without a frame, or with a slot not below ``num_slots``.
    """
    from scipy.optimize import linear_sum_assignment

    if segments.ndim != 3 or len(segments) == 0 or not np.issubdtype(segments.dtype, np.integer):
        raise ValueError(
            f"segments must be integers (t, h, w) of at least one frame, got {segments.dtype} {segments.shape}"
        )
    if segments.max(initial=-1) >= num_slots:
        raise ValueError(f"segments have slot {segments.max()}, but num_slots is {num_slots}; pass the model's K")
    slots = np.arange(num_slots)
    tracks = np.empty((len(segments), num_slots), dtype=np.int64)
    tracks[0] = slots
    held = _slot_masks(segments[0], num_slots)
    for t in range(1, len(segments)):
        masks = _slot_masks(segments[t], num_slots)
        shared = masks @ held.T  # whole numbers, exact in float64
        overlap = shared / np.maximum(masks.sum(axis=1)[:, None] + held.sum(axis=1) - shared, 1)
        overlap[slots, tracks[t - 1]] += KEEP_SLOT / num_slots
        tracks[t] = linear_sum_assignment(overlap, maximize=True)[1]
        seen = masks.any(axis=1)
        held[tracks[t, seen]] = masks[seen]
    return tracks


def velocity_cosine(
    segments: Integer[np.ndarray, "n t h w"],
    num_slots: int,
    true_positions: Float[np.ndarray, "n t m 2"],
    true_present: Bool[np.ndarray, "n t m"],
    *,
    context: int,
) -> VelocityCosine:
    """Cosine similarity between the velocities of slots and of true objects at each predicted frame.

    A slot is where the middle of the bounding box of its pixels is. Each object takes the slot with the smallest sum of
    squared distances over the context frames in which the object is present; a frame in which the slot has no pixel
    counts as the frame's diagonal. A video in which two objects take one slot is dropped. The velocity at frame t is
    ``p[t] - p[t - 2]``; norms below 1e-4, in truth or prediction, are left out.

    DDPAE's slots are objects only. Here one may be the background, whose box is the whole frame and whose middle is
    near any ball at the centre, where it would stand still and drop out of the mean unseen. So a slot whose box is
    the whole frame in more than half of the context frames is never taken.

    Source: the evaluation of Hsieh et al., DDPAE (NeurIPS 2018), on boxes as in PROVIDE's later submission, figure 4.

    Args:
        segments: slot of each pixel; the first ``context`` frames were seen, the others are predicted.
        num_slots: slots, also those without a pixel.
        true_positions: (y, x) in [-1, 1].
        true_present: which objects are in the frame; one that is absent from the whole context is not followed.
        context: frames seen, at least 2.

    Raises:
        ValueError: shapes that do not belong together, a slot that is not below ``num_slots``, positions of present
            objects that are not finite, or no predicted frame.
    """
    _check_velocity(segments, num_slots, true_positions, true_present, context)
    position, whole_frame = _box_middles(segments, num_slots)
    true_positions = np.where(true_present[..., None], true_positions, 0.0)
    seen = true_present[:, :context]
    followed: np.ndarray = np.any(seen, axis=1)
    gap = position[:, :context, None] - true_positions[:, :context, :, None]
    squared = np.nan_to_num((gap**2).sum(axis=-1), nan=LONGEST)
    distance = np.where(seen[..., None], squared, 0.0).sum(axis=1)
    background: np.ndarray = np.mean(whole_frame[:, :context], axis=1) > 0.5
    distance = np.where(background[:, None], np.inf, distance)
    slot = distance.argmin(axis=2)
    taken = (slot[:, :, None] == np.arange(num_slots)) & followed[:, :, None]
    used = (taken.sum(axis=1) <= 1).all(axis=1) & ~(background.all(axis=1) & followed.any(axis=1))

    followed_slot = np.take_along_axis(position, slot[:, None, :, None], axis=2)
    velocity = (followed_slot[:, SHIFT:] - followed_slot[:, :-SHIFT])[:, context - SHIFT :]
    true_velocity = (true_positions[:, SHIFT:] - true_positions[:, :-SHIFT])[:, context - SHIFT :]
    norm, true_norm = np.linalg.norm(velocity, axis=-1), np.linalg.norm(true_velocity, axis=-1)
    there = (true_present[:, SHIFT:] & true_present[:, :-SHIFT])[:, context - SHIFT :]
    moves = there & (true_norm >= LEAST_NORM) & (followed & used[:, None])[:, None]
    measured = moves & (norm >= LEAST_NORM)  # NaN, a slot without a pixel, is not
    dot = (velocity * true_velocity).sum(axis=-1)
    cosine = np.where(measured, dot / np.where(measured, norm * true_norm, 1.0), 0.0)
    pairs = measured.sum(axis=(0, 2))
    return VelocityCosine(
        per_frame=np.where(pairs > 0, cosine.sum(axis=(0, 2)) / np.maximum(pairs, 1), np.nan),
        pairs=pairs,
        skipped=(moves & ~measured).sum(axis=(0, 2)),
        videos_used=int(used.sum()),
        videos_dropped=int((~used).sum()),
    )


def one_cluster(true: Integer[np.ndarray, "n t h w"]) -> Int[np.ndarray, "n t h w"]:
    """Predict that the whole video is one segment."""
    return np.zeros(true.shape, dtype=np.int64)


def threshold_components(frames: UInt8[np.ndarray, "n t h w c"], *, threshold: int = 32) -> Int[np.ndarray, "n t h w"]:
    """Segment bright objects on a dark ground without learning: threshold, connected components, tracking.

    A pixel's brightness is its largest channel. Pixels more than ``threshold`` levels brighter than the darkest pixel
    of their video are foreground; touching ones (8 neighbours) form a component, the others are segment 0. From frame
    to frame the pair of components with the largest IoU keeps the id, then the next, while the IoU is above 0; what is
    left gets an id that its video has not had. Two balls that touch are one component.

    Raises:
        ValueError: frames of another type or rank.
    """
    from scipy import ndimage

    if frames.ndim != 5 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (n, t, h, w, c), got {frames.dtype} {frames.shape}")
    brightness = frames.max(axis=-1)
    bright = brightness - brightness.min(axis=(1, 2, 3), keepdims=True) > threshold
    within_frame = np.zeros((3, 3, 3, 3), dtype=bool)
    within_frame[1, 1] = True
    labels = np.empty(bright.shape, dtype=np.int64)
    ndimage.label(bright, structure=within_frame, output=labels)
    # Components are numbered through; count from 1 in each frame.
    first = np.where(bright, labels, np.iinfo(np.int64).max).min(axis=(2, 3), keepdims=True)
    components = np.where(bright, labels - first + 1, 0)
    tracks = components.copy()
    next_id = components[:, :1].max(axis=(1, 2, 3)) + 1
    for t in range(1, components.shape[1]):
        ids, next_id = _continue_tracks(tracks[:, t - 1], components[:, t], next_id)
        tracks[:, t] = np.take_along_axis(ids, _rows(components[:, t], "video"), axis=1).reshape(tracks[:, t].shape)
    return tracks


def _continue_tracks(
    before: np.ndarray, components: np.ndarray, next_id: np.ndarray
) -> tuple[Int[np.ndarray, "n components"], Int[np.ndarray, " n"]]:
    """Id of each component, and the next free id of each video."""
    overlap, there = _iou(_contingency(_rows(components, "video"), _rows(before, "video"), compact=False))
    overlap[:, 0], overlap[:, :, 0] = 0, 0
    ids = np.zeros(overlap.shape[:2], dtype=np.int64)
    videos = np.arange(len(ids))
    while overlap.any():
        component, track = np.divmod(_rows(overlap, "video").argmax(axis=1), overlap.shape[2])
        matched = overlap[videos, component, track] > 0
        ids[videos[matched], component[matched]] = track[matched]
        overlap[videos[matched], component[matched]] = 0
        overlap[videos[matched], :, track[matched]] = 0
    fresh = there & (ids == 0)
    fresh[:, 0] = False
    ids = np.where(fresh, next_id[:, None] + fresh.cumsum(axis=1) - 1, ids)
    return ids, next_id + fresh.sum(axis=1)


def _slot_masks(segments: Integer[np.ndarray, "h w"], num_slots: int) -> Float[np.ndarray, "k p"]:
    return (segments.reshape(-1) == np.arange(num_slots)[:, None]).astype(np.float64)


def _box_middles(segments: Integer[np.ndarray, "n t h w"], num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Middle of each slot's bounding box (n, t, k, 2), NaN without a pixel; whether the box is the whole frame."""
    height, width = segments.shape[2:]
    middles, whole = [], []
    for slot in range(num_slots):
        mask = segments == slot
        in_row, in_column = mask.any(axis=3), mask.any(axis=2)
        (top, bottom), (left, right) = _extent(in_row), _extent(in_column)
        middle = np.stack([(top + bottom) / max(height - 1, 1), (left + right) / max(width - 1, 1)], axis=-1) - 1
        there: np.ndarray = np.any(in_row, axis=2)
        middles.append(np.where(there[..., None], middle, np.nan))
        whole.append(there & (bottom - top == height - 1) & (right - left == width - 1))
    return np.stack(middles, axis=2), np.stack(whole, axis=2)


def _extent(line: Bool[np.ndarray, "n t p"]) -> tuple[np.ndarray, np.ndarray]:
    """First and last true entry; of a line without one, the two ends."""
    return line.argmax(axis=2), line.shape[2] - 1 - line[:, :, ::-1].argmax(axis=2)


def _contingency(
    true: Integer[np.ndarray, "n p"], predicted: Integer[np.ndarray, "n p"], *, compact: bool = True
) -> Int[np.ndarray, "n groups segments"]:
    """Pixels with each pair of labels, per row. Labels above ``MOST_IDS`` are renumbered first; 0 stays 0."""
    if compact:
        true, predicted = _renumbered(true), _renumbered(predicted)
    rows, pixels = true.shape
    groups, segments = int(true.max(initial=0)) + 1, int(predicted.max(initial=0)) + 1
    counts = np.empty((rows, groups, segments), dtype=np.int64)
    step = max(1, PIXELS_AT_ONCE // max(pixels, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        cell = true[part].astype(np.int64) * segments + predicted[part].astype(np.int64)
        cell += np.arange(len(cell))[:, None] * (groups * segments)
        flat = np.bincount(cell.ravel(), minlength=len(cell) * groups * segments)
        counts[part] = flat.reshape(-1, groups, segments)
    return counts


def _renumbered(labels: np.ndarray) -> np.ndarray:
    if labels.max(initial=0) < MOST_IDS:
        return labels
    # Ids made from colours would need a table of millions of cells.
    return np.unique(np.append(0, labels.ravel()), return_inverse=True)[1].ravel()[1:].reshape(labels.shape)


def _iou(counts: Int[np.ndarray, "n groups segments"]) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union of each pair of labels, 0 where both have no pixel; which true labels have a pixel."""
    of_true = counts.sum(axis=2)
    union = of_true[:, :, None] + counts.sum(axis=1)[:, None] - counts
    return counts / np.maximum(union, 1), of_true > 0


def _ordered_pairs(count: np.ndarray) -> np.ndarray:
    return count * (count - 1)


def _rows(labels: np.ndarray, per: Scope) -> np.ndarray:
    """One row of pixels per frame or per video."""
    kept = 2 if per == "frame" else 1
    return labels.reshape(int(np.prod(labels.shape[:kept])), int(np.prod(labels.shape[kept:])))


def _known(per: Scope) -> Scope:
    if per not in ("frame", "video"):
        raise ValueError(f"per must be 'frame' or 'video', got {per!r}")
    return per


def _check(true: np.ndarray, predicted: np.ndarray, axes: str = "n t h w") -> None:
    if true.shape != predicted.shape or true.ndim != len(axes.split()):
        raise ValueError(
            f"true and predicted segmentation must both be ({axes.replace(' ', ', ')}), got {true.shape} and "
            f"{predicted.shape}; masks of another size than the frames must be resized (nearest neighbour) first"
        )
    for name, labels in (("true", true), ("predicted", predicted)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"the {name} segmentation must be integers, got {labels.dtype}; take segment() of soft masks"
            )
        if labels.min(initial=0) < 0:
            raise ValueError(
                f"the {name} segmentation has the id {labels.min()}; ids must be at least 0, 0 being the background"
            )


def _check_velocity(
    segments: np.ndarray, num_slots: int, true_positions: np.ndarray, true_present: np.ndarray, context: int
) -> None:
    if segments.ndim != 4 or true_positions.shape != (*true_present.shape, 2) or true_present.ndim != 3:
        raise ValueError(
            "segments must be (n, t, h, w), positions (n, t, m, 2) and present (n, t, m), got "
            f"{segments.shape}, {true_positions.shape} and {true_present.shape}"
        )
    if segments.shape[:2] != true_present.shape[:2]:
        raise ValueError(
            f"segments and truth need the same videos and frames, got {segments.shape[:2]} and {true_present.shape[:2]}"
        )
    if not SHIFT <= context < segments.shape[1]:
        raise ValueError(
            f"context must be at least {SHIFT} frames and leave one to predict, got {context} of {segments.shape[1]}"
        )
    if not np.issubdtype(segments.dtype, np.integer) or segments.min(initial=0) < 0:
        raise ValueError(f"segments must be integers from 0, got {segments.dtype} from {segments.min(initial=0)}")
    if segments.max(initial=0) >= num_slots:
        raise ValueError(f"segments have slot {segments.max()}, but num_slots is {num_slots}; pass the model's K")
    if not np.isfinite(true_positions[true_present]).all():
        raise ValueError("present objects need finite positions; mark the others as absent")
