"""What a linear map reads from the latents of slots: ridge regression on held-out clips, against the objects' motion.

A probe is fitted on some clips and measured on others, so it cannot remember a video. Only pairs of a slot and a true
object take part that the masks match: an object without a slot, or one whose slot shows the background, is counted and
left out. A high R^2 says that the vector holds the quantity in a form that a linear reader finds.

    masks, truth --pair_objects--> Pairs --(vectors of their slots)--> fit_probe --> Probe: weight, bias, R^2

The linear probe is that of Alain & Bengio, "Understanding intermediate layers using linear classifier probes" (2016).
ODDN's paper (ICLR 2022, abstract and section 3) says that its dynamics vectors hold velocities and does not measure it;
the choices here are ours.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from objdyn.metrics.segmentation import match_objects

LEAST_IOU = 0.3
"""A slot shows an object only if their IoU is at least this; ours. Masks of objects that are a few pixels wide seldom
reach the customary 0.5."""
ALPHAS = tuple(float(10.0**power) for power in np.arange(-8, 3.5, 0.5))
"""Penalties to choose from, per training pair and standardised feature."""
FOLDS = 5
HELD_OUT = 0.3
"""Share of the clips that are held out."""
DROPPED = ("not visible", "not visible before", "no slot", "no slot before", "position unknown")
"""Why a true object in a frame gives no pair; the first reason that applies."""


class Pairs(NamedTuple):
    """Objects in frames, with the slot that shows each there and in the frame before."""

    clip: Int[np.ndarray, " p"]
    frame: Int[np.ndarray, " p"]
    """At least 1."""
    object: Int[np.ndarray, " p"]
    slot: Int[np.ndarray, " p"]
    """Of the object in ``frame``."""
    slot_before: Int[np.ndarray, " p"]
    """Of the object in ``frame - 1``; slots may change places between frames."""
    velocity: Float[np.ndarray, "p 2"]
    """Change of position since the frame before, (y, x); per sampled step, whatever the stride."""
    dropped: Mapping[str, int]
    """Objects present in frames from the second on that are in no pair, by the reasons ``DROPPED``."""


class Probe(NamedTuple):
    """A linear map ``weight @ features + bias``, fitted on the training clips, and how well it does on the others."""

    weight: Float[np.ndarray, "m d"]
    """In the units of features and targets: the standardisation is folded in."""
    bias: Float[np.ndarray, " m"]
    alpha: float
    """The chosen penalty, of ``ALPHAS``."""
    r2: Float[np.ndarray, " m"]
    """Per target: 1 - squared error / squared deviation from the mean of the held-out pairs; NaN for a target that is
    constant there. Below 0 the probe is worse than that mean."""
    r2_overall: float
    """The same with both sums taken over all targets."""
    train_pairs: int
    test_pairs: int
    train_clips: int
    test_clips: int


def pair_objects(
    true: Integer[np.ndarray, "n t h w"],
    segments: Integer[np.ndarray, "n t h w"],
    num_slots: int,
    positions: Float[np.ndarray, "n t m 2"],
    present: Bool[np.ndarray, "n t m"],
    *,
    least_iou: float = LEAST_IOU,
) -> Pairs:
    """Match slots to objects in each frame by the IoU of their masks, and take each object's velocity from the truth.

    An object gives a pair in frame t >= 1 if in t and in t - 1 it is present with at least one pixel and has a slot
    that is not the background's (``segmentation.match_objects``) with an IoU of ``least_iou`` or more.

    Args:
        true: object m has the id m + 1; 0 is the background.
        segments: slot of each pixel; negative where no slot has it.
        num_slots: slots, also those without a pixel.
        positions: (y, x) in [-1, 1]; NaN where unknown.
        present: which objects are in the frame.
        least_iou: see above.

    Raises:
        ValueError: shapes that do not belong together, or ids beyond the number of objects or slots.
    """
    if positions.shape != (*present.shape, 2) or present.shape[:2] != true.shape[:2]:
        raise ValueError(
            f"positions must be (n, t, m, 2) and present (n, t, m) for segmentation (n, t, h, w), got "
            f"{positions.shape}, {present.shape} and {true.shape}"
        )
    slots = match_objects(true, segments, present.shape[2], num_slots)
    visible = present & slots.visible
    shown = visible & (slots.iou >= least_iou) & (slots.slot >= 0)
    with np.errstate(invalid="ignore"):
        velocity = np.diff(positions.astype(np.float64), axis=1)
    known = np.isfinite(velocity).all(axis=-1)
    failing = (~visible[:, 1:], ~visible[:, :-1], ~shown[:, 1:], ~shown[:, :-1], ~known)
    left, dropped = present[:, 1:], dict[str, int]()
    for reason, fails in zip(DROPPED, failing, strict=True):
        dropped[reason] = int((left & fails).sum())
        left = left & ~fails
    clip, before, number = np.nonzero(left)
    return Pairs(
        clip=clip,
        frame=before + 1,
        object=number,
        slot=slots.slot[clip, before + 1, number],
        slot_before=slots.slot[clip, before, number],
        velocity=velocity[clip, before, number],
        dropped=dropped,
    )


def hold_out(videos: Int[np.ndarray, " n"], *, share: float = HELD_OUT, seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Choose the clips that a probe is measured on.

    All clips of one video are on one side. At least one video is held out and at least one is not.

    Args:
        videos: a number per clip, equal for clips of one video.
        share: of the videos to hold out.
        seed: of the draw.

    Raises:
        ValueError: there are fewer than two videos.
    """
    names = np.unique(videos)
    if len(names) < 2:
        raise ValueError(f"a probe needs clips of at least 2 videos, one of them held out, got {len(names)}")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = np.random.default_rng(seed).permutation(names)[:count]
    return np.isin(videos, chosen)


def fit_probe(
    features: Float[np.ndarray, "p d"],
    targets: Float[np.ndarray, "p m"],
    clips: Int[np.ndarray, " p"],
    held_out: Bool[np.ndarray, " p"],
) -> Probe:
    """Fit a ridge regression on the pairs that are not held out, and measure it on those that are.

    With features X and targets Y standardised by the training part's mean and deviation (a constant feature stays 0),
    ``W = argmin |Y - X W|^2 / p + alpha |W|^2``, in closed form (Hoerl & Kennard 1970). ``alpha`` is the one of
    ``ALPHAS`` with the least squared error in a cross-validation inside the training part, whose clips are dealt to
    ``FOLDS`` folds: frames of one clip resemble each other, so leaving out single pairs, as generalised
    cross-validation does, would choose too small a penalty. The largest of equal ones is taken.

    Args:
        features: one vector per pair.
        targets: what to read from it.
        clips: which clip (or video) a pair is of.
        held_out: pairs to measure on; a clip is wholly held out or not at all.

    Raises:
        ValueError: shapes that do not belong together, values that are not finite, a clip on both sides, fewer than two
            clips to fit on or none to measure on.
    """
    _check(features, targets, clips, held_out)
    fit = ~held_out
    x, y = features[fit].astype(np.float64), targets[fit].astype(np.float64)
    alpha = _choose_alpha(x, y, clips[fit])
    weight, bias = _ridge(x, y, np.array([alpha]))
    weight, bias = weight[0], bias[0]
    true = targets[held_out].astype(np.float64)
    error = np.square(true - features[held_out].astype(np.float64) @ weight.T - bias).sum(axis=0)
    spread = np.where(_is_constant(true), 0.0, np.square(true - true.mean(axis=0)).sum(axis=0))
    return Probe(
        weight=weight,
        bias=bias,
        alpha=alpha,
        r2=np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1.0), np.nan),
        r2_overall=float(1 - error.sum() / spread.sum()) if spread.sum() > 0 else float("nan"),
        train_pairs=int(fit.sum()),
        test_pairs=int(held_out.sum()),
        train_clips=len(np.unique(clips[fit])),
        test_clips=len(np.unique(clips[held_out])),
    )


def _choose_alpha(x: np.ndarray, y: np.ndarray, clips: np.ndarray) -> float:
    names, number = np.unique(clips, return_inverse=True)
    fold = number % min(FOLDS, len(names))
    alphas = np.array(ALPHAS)
    errors = np.zeros(len(alphas))
    scale = _scale(y)
    for left_out in range(fold.max() + 1):
        rest, test = fold != left_out, fold == left_out
        weight, bias = _ridge(x[rest], y[rest], alphas)
        found = np.einsum("amd,pd->apm", weight, x[test]) + bias[:, None]
        errors += np.square((found - y[test]) / scale).sum(axis=(1, 2))
    return float(alphas[len(alphas) - 1 - errors[::-1].argmin()])


def _ridge(x: np.ndarray, y: np.ndarray, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight (a, m, d) and bias (a, m) for each penalty, in the units of ``x`` and ``y``."""
    mean_x, scale_x, mean_y = x.mean(axis=0), _scale(x), y.mean(axis=0)
    standard = np.where(_is_constant(x), 0.0, (x - mean_x) / scale_x)
    left, singular, right = np.linalg.svd(standard, full_matrices=False)
    shrunk = singular / (singular**2 + len(x) * alphas[:, None])  # (a, r)
    weight = np.einsum("pm,pr,ar,rd->amd", y - mean_y, left, shrunk, right, optimize=True) / scale_x
    return weight, mean_y - weight @ mean_x


def _scale(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each column, 1 where it is constant."""
    return np.where(_is_constant(values), 1.0, values.std(axis=0))


def _is_constant(values: np.ndarray) -> np.ndarray:
    """Which columns are the same number throughout, up to the rounding of their mean."""
    return values.std(axis=0) <= 1e-12 * np.abs(values).max(axis=0, initial=0)


def _check(features: np.ndarray, targets: np.ndarray, clips: np.ndarray, held_out: np.ndarray) -> None:
    count = len(clips)
    if features.ndim != 2 or targets.ndim != 2 or {len(features), len(targets), len(held_out)} != {count}:
        raise ValueError(
            "features must be (p, d), targets (p, m), clips (p,) and held_out (p,), got "
            f"{features.shape}, {targets.shape}, {clips.shape} and {held_out.shape}"
        )
    for name, values in (("features", features), ("targets", targets)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity; leave out pairs of which they are not known")
    fitted, measured = np.unique(clips[~held_out]), np.unique(clips[held_out])
    if both := sorted(set(fitted.tolist()) & set(measured.tolist())):
        raise ValueError(f"clip {both[0]} has pairs on both sides; hold out whole clips (hold_out)")
    if len(fitted) < 2 or not len(measured):
        raise ValueError(
            f"a probe needs pairs of at least 2 clips to fit on and of 1 to measure on, got {len(fitted)} and "
            f"{len(measured)}; use more clips, or a model whose masks show the objects"
        )
