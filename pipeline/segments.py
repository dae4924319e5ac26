"""Masks of a model against the true objects, a batch of clips at a time, beside segmentations that need no model.

Scores are kept per clip, (clips, frames) or (clips, 1), so that intervals over clips can be had; masks and segments
live as long as their batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from objdyn.clips import Clip
from objdyn.metrics import segmentation

FRAMES_AT_ONCE = 64
"""Frames whose components are rendered together."""
UNKNOWN = -1
"""Segment of every pixel of a clip whose masks are not finite."""
RECON = ("ari", "fg_ari", "video_ari", "video_fg_ari", "matched_iou", "mean_iou", "swap_rate")
PREDICT = ("predict_ari", "predict_fg_ari")
BASELINES = ("one_cluster", "threshold")
"""Prefixes of what is measured of every reconstruction and prediction. Of the predicted frames, ``threshold`` has the
components of the last frame that was seen."""
KEYS = (
    *(f"{baseline}{name}" for baseline in ("", "one_cluster_", "threshold_") for name in RECON),
    *(f"{baseline}{name}" for baseline in ("", "one_cluster_", "threshold_", "copy_last_") for name in PREDICT),
)
"""Of ``metrics.json``."""
WHOLE = ("video_ari", "video_fg_ari", "swap_rate")
"""Metrics that ask whether an object keeps its slot."""

Scores = dict[str, np.ndarray]
"""Name of a score -> (clips, frames), or (clips, 1) for one number per clip; NaN where it is not known."""


class Rendered(NamedTuple):
    """Decoded frames."""

    video: Tensor
    """(b, t, c, h, w)."""
    segments: np.ndarray | None
    """Component with the largest mask at each pixel, int (b, t, h, w); None where masks were not asked for."""
    components: int = 0
    """How many there are, the background included."""


def render(model: Any, latents: Any, masks: bool) -> Rendered:
    """Decode latents, and on request find the segments, of which no more than ``FRAMES_AT_ONCE`` have soft masks."""
    if not masks:
        return Rendered(model.decode(latents).video, None)
    clips, frames = latents[0].shape[:2]
    step = max(1, FRAMES_AT_ONCE // clips)
    videos, segments, components = [], [], 0
    for start in range(0, frames, step):
        scene = model.decode(cut(latents, start, start + step), components=True)
        videos.append(scene.video)
        soft = scene.masks.float().cpu().numpy()
        components = soft.shape[2]
        finite = np.isfinite(soft).all(axis=(1, 2, 3, 4, 5))
        found = segmentation.segment(np.nan_to_num(soft))
        found[~finite] = UNKNOWN
        segments.append(found)
    return Rendered(torch.cat(videos, dim=1), np.concatenate(segments, axis=1), components)


def cut(latents: Any, start: int, stop: int) -> Any:
    """Some frames of latents."""
    return type(latents)(*(field[:, start:stop] for field in latents))


def has_truth(clips: Sequence[Clip]) -> bool:
    """Whether a clip of these has a true segmentation."""
    return any("segmentation" in clip.truth for clip in clips)


def frame_scores(true: np.ndarray, predicted: np.ndarray) -> Scores:
    """ARI and foreground ARI of each frame."""
    return {
        "ari": segmentation.frame_ari(true, predicted, foreground=False),
        "fg_ari": segmentation.frame_ari(true, predicted, foreground=True),
    }


def all_scores(true: np.ndarray, predicted: np.ndarray) -> Scores:
    """What ``RECON`` names; ``swap_rate`` comes as ``swaps`` and ``swap_pairs``."""
    swapped = segmentation.swap_rate(true, predicted)
    return {
        **frame_scores(true, predicted),
        "video_ari": segmentation.video_ari(true, predicted, foreground=False)[:, None],
        "video_fg_ari": segmentation.video_ari(true, predicted, foreground=True)[:, None],
        "matched_iou": segmentation.matched_iou(true, predicted, per="frame"),
        "mean_iou": segmentation.mean_iou(true, predicted, per="frame"),
        "swaps": swapped.swaps[:, None].astype(float),
        "swap_pairs": swapped.pairs[:, None].astype(float),
    }


def recon_scores(
    clips: Sequence[Clip], segments: np.ndarray, scores: Callable[[np.ndarray, np.ndarray], Scores] = all_scores
) -> Scores:
    """Scores of each clip, with the baselines: NaN for those without truth; at least one must have it."""
    true, which = _truth(clips, slice(None))
    frames = np.stack([clip.frames for clip, chosen in zip(clips, which, strict=True) if chosen])
    found = {
        "": segments[which],
        "one_cluster_": segmentation.one_cluster(true),
        "threshold_": segmentation.threshold_components(frames),
    }
    return {
        f"{prefix}{name}": _spread(values, which)
        for prefix, predicted in found.items()
        for name, values in _known(true, predicted, scores).items()
    }


def predict_scores(
    clips: Sequence[Clip], predicted: np.ndarray, last: np.ndarray, *, context: int, horizon: int
) -> Scores:
    """``PREDICT`` of each clip, with the baselines; as ``recon_scores``.

    Args:
        clips: which hold ``context + horizon`` frames or more.
        predicted: segments of the predicted frames, (b, horizon, h, w).
        last: segments of the model in the last frame that it saw, (b, 1, h, w).
        context: frames seen.
        horizon: frames predicted.
    """
    true, which = _truth(clips, slice(context, context + horizon))
    seen = np.stack([clip.frames[context - 1 : context] for clip, chosen in zip(clips, which, strict=True) if chosen])
    found = {
        "": predicted[which],
        "copy_last_": np.repeat(last[which], horizon, axis=1),
        "one_cluster_": segmentation.one_cluster(true),
        "threshold_": np.repeat(segmentation.threshold_components(seen), horizon, axis=1),
    }
    return {
        f"{prefix}predict_{name}": _spread(values, which)
        for prefix, segments in found.items()
        for name, values in _known(true, segments, frame_scores).items()
    }


def join(parts: Sequence[tuple[int, Scores]]) -> Scores:
    """Scores of batches one below the other; a batch of so many clips without scores has rows of NaN."""
    columns = {name: values.shape[1] for _, scores in parts for name, values in scores.items()}
    return {
        name: np.concatenate([scores.get(name, np.full((count, width), np.nan)) for count, scores in parts])
        for name, width in columns.items()
    }


def rate(scores: Mapping[str, np.ndarray], prefix: str) -> np.ndarray:
    """Swaps and pairs of each clip, (clips, 2), of which the sums' ratio is the swap rate."""
    return np.concatenate([scores[f"{prefix}swaps"], scores[f"{prefix}swap_pairs"]], axis=1)


def _known(true: np.ndarray, predicted: np.ndarray, scores: Callable[[np.ndarray, np.ndarray], Scores]) -> Scores:
    """Scores with NaN for clips without a known segmentation."""
    known = (predicted != UNKNOWN).all(axis=(1, 2, 3))
    found = scores(true, np.where(known[:, None, None, None], predicted, 0))
    return {name: np.where(known[:, None], values, np.nan) for name, values in found.items()}


def _truth(clips: Sequence[Clip], frames: slice) -> tuple[np.ndarray, np.ndarray]:
    """True segmentation of the clips that have one, and which these are."""
    which = np.array(["segmentation" in clip.truth for clip in clips])
    return np.stack([clip.truth["segmentation"][frames] for clip in clips if "segmentation" in clip.truth]), which


def _spread(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Rows of the chosen clips among rows of NaN for the others."""
    rows = np.full((len(which), *values.shape[1:]), np.nan)
    rows[which] = values
    return rows
