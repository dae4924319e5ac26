"""What models of binary video (``ssm``, ``ed_lstm``) know of objects: positions, motion, gaps, white pixels.

Sections 3.3 to 3.5 of Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019) show all of it in
figures; here it is measured, by ``objdyn/metrics/trajectory.py`` and ``bernoulli.py``:

    positions       the inference network's means against true positions without noise, up to one affine map per model
                    (and one similarity, which is stricter), fitted on ``MAP_CLIPS`` clips of the split ``MAP_SPLIT``
    prediction      frames after the context: distance of the mapped positions by horizon; likelihood of white pixels;
                    and for any model, where balls do not overlap, distance of k-means centres of the frames it draws
    interpolation   the frames between the first and the last ``context`` ones, of which alone the model sees any
    dynamics        the learnt gravity against the true one, how fast the filter forgets, log p(a)

Every number comes for all clips and for each number of objects N, under ``by_objects``. Distances are in pixels, and
the baselines see where balls are drawn (``rendered_positions``, with noise) in the context.

Clips are measured batch by batch, and of each some kB stay. Whatever is averaged over clips is a function of sums over
them, so that a bootstrap over clips gives its interval.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from objdyn import kalman
from objdyn.clips import Clip, collate, stack_truth, to_frames, to_model_input
from objdyn.families import Family
from objdyn.layers.binary import binary_frames
from objdyn.metrics import bernoulli, position, trajectory
from objdyn.metrics.trajectory import Map
from objdyn.models.ed_lstm import EDLSTM, EDLSTMConfig
from objdyn.models.ssm import SSM, SSMConfig
from objdyn.simulators import cannonballs
from pipeline import segments
from pipeline.reader import Source, has_split, iter_clips, open_source
from pipeline.report import ClipTracks

MAP_SPLIT, MAP_CLIPS = "val", 300
"""Split and most clips that the map is fitted on; it has six numbers, and these clips some 10,000 positions."""
FOLD = (0.2, 0.5)
"""A fold is suspected where R^2 is below the first along one axis and above the second along the other."""
DRAWN_TOGETHER = 20
"""Clips whose latent tracks share a figure."""
PAPER = {
    "ssm": 0.691,
    "ed_lstm": 0.693,
    "note": "no target: section 3.4 of Chiappa & Paquet, 25 frames after 5 at 48 pixels, in a unit that is unproven",
}
"""What may be the paper's ``BCE``; see ``bernoulli.bce_double_sigmoid``."""
TRUTH = ("positions", "present", "rendered_positions", "num_objects")

RECOVERY = tuple(f"{kind}position_{of}" for kind in ("", "similarity_") for of in ("r2", "r2_y", "r2_x", "rmse_px"))
IDENTITY = ("identity_swap_rate", "collapse_share")
PREDICTED = ("predict_error_px", "predict_rmse_px", "predict_apart_px")
"""Mean and root mean square of the distance; and its mean where no objects overlap and each frame is assigned alone, to
compare with k-means."""
COPIED, EXTRAPOLATED = (
    tuple(f"{baseline}_{key}" for key in PREDICTED) for baseline in ("copy_last", "constant_velocity")
)
KMEANS, TRUE_KMEANS = ("predict_kmeans_px", "predict_painted_share"), ("true_frames_predict_kmeans_px",)
WHITE = ("predict_white_precision", "predict_white_recall", "predict_white_f1")
NLL, BCE = ("predict_nll_pixel", "predict_nll_frame"), "predict_bce_double_sigmoid"
DRAWN = (*NLL, *WHITE, BCE)
TRIVIAL = (
    *(f"copy_last_{key}" for key in WHITE),
    *(f"constant_{key}" for key in NLL),
    *(f"{bound}_{BCE}" for bound in bernoulli.DoubleSigmoidBounds._fields),
)
"""What frames have that no model drew; ``constant`` is the share of white pixels, everywhere."""
GAP = (
    "interpolate_error_px",
    "predict_gap_error_px",
    "encode_gap_error_px",
    "interpolate_to_encode_px",
    "predict_to_encode_px",
)
"""In the frames of the gap: distances of interpolated, of predicted and of encoded positions (the means with all frames
seen) from the true ones; and of the first two from the encoded ones."""
LOG_PRIOR, LOG_PRIOR_PX = ("log_prior",), ("log_prior_px",)
"""Nats per object and frame: log p(a) in latent units, and as a density in pixels, comparable between models."""
KEYS = (
    *RECOVERY, *IDENTITY, *PREDICTED, *COPIED, *EXTRAPOLATED, *KMEANS, *TRUE_KMEANS, *DRAWN, *TRIVIAL, *GAP,
    *LOG_PRIOR, *LOG_PRIOR_PX,
)  # fmt: skip
"""Of ``metrics.json``, and of each of its ``by_objects``."""
DYNAMICS = (
    "gravity_px",
    "gravity_ratio",
    "gravity_along",
    "gravity_angle",
    "gravity_half_step",
    "gravity_world",
    "true_gravity_px",
    "true_gravity_world",
    "predictor_spectrum",
)
"""Of ``metrics.json`` alone: they are the model's."""
PER_CLIP = ("position_rmse_px", "predict_error_px", "predict_kmeans_px", "predict_nll_frame", "interpolate_error_px")

Resample = Callable[[np.ndarray], np.ndarray]
"""Column means of bootstrap samples of the rows, (draws, columns)."""


class Maps(NamedTuple):
    """From latent to true positions, one pair of maps per model."""

    affine: Map
    similarity: Map
    clips: int
    """That they were fitted on."""
    note: str
    """Where those clips are from."""


class Found(NamedTuple):
    """Tracks and sums of n clips of t frames; k slots, m objects and h predicted frames. Positions are (y, x)."""

    counts: np.ndarray
    """Objects, int (n,); -1 where the data do not say."""
    objects: np.ndarray
    """Bool (n, m): which there are true positions of."""
    partly: np.ndarray
    """Bool (n,): whether an object is in some of the frames only."""
    true: np.ndarray
    """(n, t, m, 2)."""
    rendered: np.ndarray
    """(n, t, m, 2), where objects are drawn."""
    origins: np.ndarray
    """``sim:NAME`` with the options that a clip is from; empty if it is not simulated, or leaves out frames."""
    slots: np.ndarray | None = None
    """Bool (n, k); None, as what follows, where the model has no positions."""
    encoded: np.ndarray | None = None
    """(n, t, k, 2) in latent units, all frames seen."""
    log_prior: np.ndarray | None = None
    """(n, 2): log p(a) of the encoded positions in nats, and objects times frames."""
    predicted: np.ndarray | None = None
    """(n, h, k, 2)."""
    interpolated: np.ndarray | None = None
    """(n, gap, k, 2), the frames of the gap alone; None if there is none."""
    pixels: np.ndarray | None = None
    """(n, h, 7) of the predicted frames: nats, ``bce_double_sigmoid``, white pixels hit, painted, true, and hit and
    painted by a copy of the last frame seen; None if nothing is predicted."""
    centres: np.ndarray | None = None
    """(n, h, m', 2): k-means centres of the predicted frames."""
    painted: np.ndarray | None = None
    """Bool (n, h): frames with enough white pixels."""
    true_centres: np.ndarray | None = None
    """(n, h, m', 2): k-means centres of the true frames."""


class Measure(NamedTuple):
    """A number that is a function of sums over clips."""

    sums: np.ndarray
    """(n, frames, columns)."""
    value: Callable[[np.ndarray], Any]
    """From (..., columns), or from (columns,) if it has no interval; NaN where it is not known."""
    unknown: str = "these clips hold no object with true positions"
    """Why it may not be known."""
    curve: bool = False
    """Whether it means something for each frame."""
    interval: bool = True


def applies(config: Any) -> bool:
    """Whether this is measured of a family with such a config: its frames are probabilities of white pixels."""
    return isinstance(config, SSMConfig | EDLSTMConfig)


def measure(
    model: SSM | EDLSTM,
    family: Family,
    clips: Sequence[Clip],
    video: Tensor,
    latents: Any,
    predicted: Any,
    context: int,
) -> Found:
    """What there is to know of a batch of clips.

    Args:
        model: in eval mode.
        family: of this model.
        clips: with the truth of ``TRUTH`` as far as there is any.
        video: of the clips, (b, t, c, h, w) on the model's device.
        latents: of all frames.
        predicted: latents of the frames after the context; None if nothing is predicted.
        context: frames seen.
    """
    found = _truth(clips)
    horizon = 0 if predicted is None else predicted[0].shape[1]
    if isinstance(model, SSM):
        found = found._replace(**_encoded(model, latents))
        between = interpolate(model, family, clips, video, context=context, horizon=horizon)
        if predicted is not None:
            found = found._replace(predicted=_positions(predicted))
        if between is not None:
            found = found._replace(interpolated=_positions(between)[:, context:horizon])
    if predicted is None:
        return found
    size, threshold = model.config.image_size, model.config.threshold
    seen, future = video[:, context - 1 : context], video[:, context : context + horizon]
    with torch.no_grad():
        logits = rearrange(_logits(model, predicted).float(), "b t (h w) -> b t h w", h=size)
    target, last = (
        rearrange(binary_frames(frames, size, threshold), "b t (h w) -> b t h w", h=size) for frames in (future, seen)
    )
    white = logits.nan_to_num().sigmoid()
    counts = np.maximum(found.counts, 1)
    centres = trajectory.kmeans_positions(white.cpu().numpy(), counts)
    return found._replace(
        pixels=_pixel_scores(logits, target, last),
        centres=centres.positions,
        painted=centres.painted,
        true_centres=trajectory.kmeans_positions(target.cpu().numpy(), counts).positions,
    )


def join(parts: Sequence[Found]) -> Found:
    """Batches one below the other; what some of them lack is lacking."""
    columns = zip(*parts, strict=True)
    return Found._make(None if any(part is None for part in column) else _stack(column) for column in columns)


def interpolate(model: Any, family: Family, clips: Sequence[Clip], video: Tensor, *, context: int, horizon: int) -> Any:
    """Latents of the first ``context + horizon`` frames, of which the model sees the first and the last ``context``.

    None where the family cannot, or nothing is between them.
    """
    if "interpolate" not in family.verbs or horizon <= context:
        return None
    seen = torch.ones(context + horizon, dtype=torch.bool)
    seen[context:horizon] = False
    with torch.no_grad():
        inputs = stack_truth(clips, family.inputs, video.device)
        return model.interpolate(video[:, : context + horizon], seen, **inputs)


def interpolated_frames(
    model: Any, family: Family, clips: Sequence[Clip], video: Tensor, *, context: int, horizon: int
) -> np.ndarray | None:
    """The frames of the gap as a model draws them, uint8 (b, gap, h, w, c)."""
    latents = interpolate(model, family, clips, video, context=context, horizon=horizon)
    if latents is None:
        return None
    with torch.no_grad():
        gap = segments.cut(latents, context, horizon)
        return to_frames(torch.nan_to_num(model.decode(gap).video))


def fit(model: Any, family: Family, data: str, source: Source, *, batch_size: int, limit: int | None) -> Maps | str:
    """The maps of a model, fitted on clips of ``MAP_SPLIT`` that are not measured; a string says why there are none."""
    if not isinstance(model, SSM):
        return "the model has no positions"
    if source.split == MAP_SPLIT:
        return f"split {MAP_SPLIT!r} is the one that was measured"
    if not has_split(data, MAP_SPLIT):
        return f"the data have no split {MAP_SPLIT!r}"
    other = open_source(data, MAP_SPLIT)
    if (other.height, other.width) != (source.height, source.width):
        return f"split {MAP_SPLIT!r} has frames of {other.height}x{other.width}"
    model.eval()
    device = next(model.parameters()).device
    stream = iter_clips(other, min(limit or MAP_CLIPS, MAP_CLIPS), truth=(*TRUTH, *family.inputs))
    parts = []
    while clips := list(itertools.islice(stream, batch_size)):
        with torch.no_grad():
            inputs: dict[str, Any] = {**stack_truth(clips, family.inputs, device)}
            latents = model.encode(to_model_input(collate(clips), device), **inputs)
        parts.append(_truth(clips)._replace(**_encoded(model, latents)))
    if not parts:
        return f"split {MAP_SPLIT!r} has no clips"
    found = join(parts)
    if why := _untracked(found):
        return f"of split {MAP_SPLIT!r} {why}"
    return _fit(found, f"fitted on the first {len(found.true)} clips of split {MAP_SPLIT!r}")


def own_maps(found: Found, why: str) -> Maps | str:
    """The maps fitted on the measured clips themselves, where there are no others; or why there are none at all."""
    if problem := _untracked(found):
        return problem
    return _fit(found, f"fitted on the {len(found.true)} measured clips themselves, since {why}")


def summarise(
    metrics: dict[str, Any],
    found: Found,
    maps: Maps | str,
    *,
    model: SSM | EDLSTM,
    context: int,
    horizon: int,
    frame_size: tuple[int, int],
    reasons: dict[str, str],
    resample: Resample,
) -> None:
    """Add ``KEYS`` and ``DYNAMICS`` to what is measured, with intervals, curves, and all of it by number of objects.

    Also ``num_objects`` of each clip, the ``map``, the ``paper``'s numbers, and ``warnings``, sentences.

    Args:
        metrics: has ``family``, ``interval95``, ``curves`` and ``per_clip``.
        found: of all clips.
        maps: or why there are none.
        model: whose dynamics are looked at.
        context: frames seen.
        horizon: frames predicted, 0 if none.
        frame_size: height and width in pixels.
        reasons: why a metric is null, by its key; ``predict`` says why nothing is predicted.
        resample: the bootstrap over clips.
    """
    measures, missing = _measures(found, maps, metrics["family"], context, horizon, frame_size, reasons)
    groups = {count: found.counts == count for count in sorted(set(found.counts.tolist()) - {-1})}
    every = _group(measures, missing, np.ones(len(found.counts), dtype=bool), resample)
    by_objects = {str(count): _group(measures, missing, rows, resample) for count, rows in groups.items()}
    for name in ("interval95", "curves"):
        metrics[name] |= every.pop(name)
    reasons |= every.pop("reasons")
    metrics |= every | {"by_objects": by_objects}
    metrics["num_objects"] = [None if count < 0 else count for count in found.counts.tolist()]
    for key in PER_CLIP:
        if key in measures:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = measures[key].value(measures[key].sums.sum(axis=1))
            metrics["per_clip"][key] = [_finite(value) for value in values]
    metrics["map"] = _told_map(maps) if isinstance(maps, Maps) else None
    if isinstance(maps, str):
        reasons["map"] = maps
    metrics["paper"] = {BCE: PAPER}
    metrics["warnings"] = [*metrics.get("warnings", ()), *_folds(by_objects.get("1", metrics))]
    _add_dynamics(metrics, found, maps, model, frame_size, reasons)


def clip_tracks(found: Found, maps: Maps | str, number: int, context: int) -> ClipTracks:
    """The tracks of one clip to draw, objects in the order of the truth, slots as they fit the whole clip best.

    A model without positions has those of k-means, each frame's in the order that fits it best.
    """
    one = Found._make(None if field is None else field[number : number + 1] for field in found)
    objects = np.flatnonzero(one.objects[0])
    true = one.true[0][:, objects]
    in_frame: dict[str, np.ndarray] = {"true": true} if len(objects) else {}
    latent: dict[str, np.ndarray] = {}
    if one.encoded is not None and one.slots is not None:
        chosen = np.flatnonzero(one.slots[0])
        kinds = {"inferred": one.encoded, "predicted": one.predicted, "interpolated": one.interpolated}
        found_tracks = {name: track[0] for name, track in kinds.items() if track is not None}
        if isinstance(maps, Maps) and len(objects) and not _untracked(one):
            mapped = maps.affine(one.encoded)
            chosen = trajectory.assign_slots(mapped, one.true, slots=one.slots, objects=one.objects)[0][objects]
            in_frame |= {name: maps.affine(track[:, chosen]) for name, track in found_tracks.items()}
        latent = {name: track[:, chosen] for name, track in found_tracks.items()}
    elif one.centres is not None and len(objects):
        centres, seen = one.centres, slice(context, context + one.centres.shape[1])
        order = trajectory.assign_slots(
            centres, one.true[:, seen], slots=_centre_slots(one, centres), objects=one.objects, per="frame"
        )[0][:, objects]
        in_frame["k-means"] = np.take_along_axis(centres[0], order[..., None], axis=1)
    return ClipTracks(in_frame, latent)


def latent_tracks(found: Found) -> dict[str, np.ndarray]:
    """Encoded positions of the first clips of each number of slots, (n, t, k, 2), before any map (Fig. 5a)."""
    if found.encoded is None or found.slots is None:
        return {}
    numbers = found.slots.sum(axis=1)
    return {
        f"{number} slot{'s' * (number > 1)}": found.encoded[numbers == number][:DRAWN_TOGETHER, :, :number]
        for number in sorted(set(numbers.tolist()))
    }


def told(metrics: Mapping[str, Any]) -> list[str]:
    """The numbers by number of objects as a small table, with warnings below; nothing where none were measured."""
    if "by_objects" not in metrics:
        return []
    columns = (
        ("clips", "clips", "d", 1),
        ("R2", "position_r2", ".3f", 1),
        ("R2 y", "position_r2_y", ".3f", 1),
        ("R2 x", "position_r2_x", ".3f", 1),
        ("RMSE", "position_rmse_px", ".2f", 1),
        ("swaps %", "identity_swap_rate", ".1f", 100),
        ("predicted", "predict_error_px", ".2f", 1),
        ("k-means", "predict_kmeans_px", ".2f", 1),
        ("gap: predicted", "predict_gap_error_px", ".2f", 1),
        ("interpolated", "interpolate_error_px", ".2f", 1),
        ("nats/pixel", "predict_nll_pixel", ".4f", 1),
    )
    rows = [["objects", *(head for head, *_ in columns)]]
    for name, group in {"all": metrics, **metrics["by_objects"]}.items():
        values = [(group[key], style, factor) for _, key, style, factor in columns]
        rows.append([name, *("-" if v is None else format(v * factor, style) for v, style, factor in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows]
    if metrics["map"]:
        lines += [f"Errors in pixels. Positions up to one affine map: {metrics['map']['note']}."]
    else:
        lines += [f"Errors in pixels. No map: {metrics['reasons'].get('map', 'unknown')}."]
    return ["\n".join([*lines, *(f"WARNING: {warning}" for warning in metrics["warnings"])])]


def _truth(clips: Sequence[Clip]) -> Found:
    rows = []
    for clip in clips:
        true = np.zeros((len(clip.frames), 0, 2), dtype=np.float32)
        count, present = int(clip.truth.get("num_objects", -1)), np.ones((len(clip.frames), 0), dtype=bool)
        if "positions" in clip.truth:
            true = clip.truth["positions"]
            present = clip.truth.get("present", np.ones(true.shape[:2], dtype=bool))
            count = int(present.all(axis=0).sum())
        objects: np.ndarray = np.all(present, axis=0)
        simulated = clip.source.startswith("sim:") and clip.stride == 1
        rows.append(
            Found(
                counts=np.array([count]),
                objects=objects[None],
                partly=np.array([bool((np.any(present, axis=0) & ~objects).any())]),
                true=true[None],
                rendered=clip.truth.get("rendered_positions", true)[None],
                origins=np.array([clip.source.rsplit("/", 2)[0] if simulated else ""]),
            )
        )
    return join(rows)


def _encoded(model: SSM, latents: Any) -> dict[str, np.ndarray]:
    """The fields of ``Found`` that latents of all frames give."""
    present = latents.present[:, 0]
    with torch.no_grad():
        positions = rearrange(latents.mean, "b t k p -> b k t p").double()
        nats = (kalman.log_likelihood(model.prior(), positions) * present).sum(1)
    terms = present.sum(1) * positions.shape[2]
    return {
        "slots": present.cpu().numpy().astype(bool),
        "encoded": _positions(latents),
        "log_prior": torch.stack([nats, terms], dim=1).cpu().numpy(),
    }


def _positions(latents: Any) -> np.ndarray:
    return latents.mean.double().cpu().numpy()


def _logits(model: SSM | EDLSTM, latents: Any) -> Tensor:
    """Of the pixels that ``decode`` gives as probabilities, (b, t, h * w): a likelihood needs those that round to 1."""
    if isinstance(model, SSM):
        return model.renderer(latents.location, latents.present)
    return model.decoder(latents.hidden[:, :, 0])


def _pixel_scores(logits: Tensor, target: Tensor, last: Tensor) -> np.ndarray:
    """``Found.pixels``; what is the model's is NaN for clips whose logits are not finite."""
    known = logits.isfinite().flatten(1).all(1)
    logits = logits.nan_to_num()
    white = logits.sigmoid()
    drawn = bernoulli.white_pixels(white, target)
    copied = bernoulli.white_pixels(last.expand_as(target), target)
    nats = bernoulli.bernoulli_nll(logits, target, logits=True).per_frame
    loss = bernoulli.bce_double_sigmoid(white, target)
    of_model = torch.stack([nats, loss, drawn.hits.double(), drawn.painted.double()], dim=2)
    of_frames = torch.stack([drawn.white, copied.hits, copied.painted], dim=2)
    of_model = torch.where(known[:, None, None], of_model, torch.nan)
    return torch.cat([of_model, of_frames.double()], dim=2).cpu().numpy()


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one below the other; clips with fewer objects get zeros, which are no objects."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    shape = np.max([part.shape for part in parts], axis=0)
    room = [[(0, 0), *((0, most - own) for most, own in zip(shape[1:], part.shape[1:], strict=True))] for part in parts]
    return np.concatenate([np.pad(part, pads) for part, pads in zip(parts, room, strict=True)])


def _unlocated(found: Found) -> str:
    """Why nothing can be compared with true positions; empty if it can."""
    if not found.objects.any():
        return "the clips hold no true positions"
    if partly := int(found.partly.sum()):
        return f"objects of {partly} clips are not in all of their frames, and whole tracks are compared"
    return ""


def _untracked(found: Found) -> str:
    """Why the encoded tracks cannot be compared with true ones; empty if they can."""
    if found.encoded is None or found.slots is None:
        return "the model has no positions among its latents"
    if why := _unlocated(found):
        return why
    if few := int((found.slots.sum(axis=1) < found.objects.sum(axis=1)).sum()):
        return f"{few} clips hold more objects than the model has slots"
    return _not_finite("latents", found.encoded)


def _not_finite(what: str, values: np.ndarray | None) -> str:
    if values is None:
        return ""
    broken = int((~np.isfinite(values.reshape(len(values), -1))).any(axis=1).sum())
    return f"the {what} of {broken} clips hold values that are not finite" if broken else ""


def _fit(found: Found, note: str) -> Maps:
    assert found.encoded is not None
    both = {"slots": found.slots, "objects": found.objects}
    return Maps(
        affine=trajectory.fit_affine(found.encoded, found.true, **both),
        similarity=trajectory.fit_similarity(found.encoded, found.true, **both),
        clips=len(found.true),
        note=note,
    )


class _Target(NamedTuple):
    """True positions in some frames, with which others are compared."""

    true: np.ndarray
    """(n, t, m, 2)."""
    objects: np.ndarray
    """Bool (n, m)."""
    size: tuple[int, int]

    def distances(self, positions: np.ndarray, slots: np.ndarray | None) -> tuple[Measure, Measure]:
        """Mean distance in pixels and its root mean square, slots assigned per sequence."""
        found = trajectory.position_errors(
            positions, self.true, frame_size=self.size, slots=slots, objects=self.objects
        )
        return (
            Measure(_summed(found), _ratio, curve=True),
            Measure(_summed(np.square(found)), lambda sums: np.sqrt(_ratio(sums)), curve=True),
        )

    def apart(self, positions: np.ndarray, slots: np.ndarray | None) -> Measure:
        """Mean distance in pixels in frames whose objects do not overlap, each frame assigned alone."""
        found = trajectory.position_errors(
            positions, self.true, frame_size=self.size, slots=slots, objects=self.objects, per="frame"
        )
        keep = ~trajectory.are_close(self.true, frame_size=self.size, objects=self.objects)
        return Measure(_summed(found, keep), _ratio, "no predicted frame has its objects apart", curve=True)


def _measures(
    found: Found,
    maps: Maps | str,
    family: str,
    context: int,
    horizon: int,
    size: tuple[int, int],
    reasons: Mapping[str, str],
) -> tuple[dict[str, Measure], dict[str, str]]:
    """What can be measured of ``KEYS``, and why the rest cannot."""
    without_truth, without_future = _unlocated(found), reasons.get("predict", "")
    without_latents = _not_finite("latents", found.encoded)
    if found.encoded is None:
        without_latents = f"family {family} has no positions among its latents"
    without_map = without_latents or _untracked(found) or (maps if isinstance(maps, str) else "")
    without_predicted = without_map or without_future or _not_finite("predicted latents", found.predicted)
    without_drawn = without_future or _not_finite("predicted frames", found.pixels)
    without_gap = without_predicted or _not_finite("interpolated latents", found.interpolated)
    if horizon <= context:
        without_gap = without_gap or (
            f"with {context} frames seen on both sides a gap needs a horizon of more than {context}, it is {horizon}"
        )
    without_velocity = "a velocity needs a context of at least 2 frames" if context < 2 else ""
    without_baseline = without_truth or without_future
    target = _Target(found.true[:, context : context + horizon], found.objects, size)
    pixels = size[0] * size[1]

    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    for keys, why, build in (
        ((*RECOVERY, *IDENTITY), without_map, lambda: _tracked(found, _known(maps), size)),
        (PREDICTED, without_predicted, lambda: _predicted(found, _known(maps).affine, target)),
        (COPIED, without_baseline, lambda: _baseline(position.copy_last, found, target, context)),
        (
            EXTRAPOLATED,
            without_baseline or without_velocity,
            lambda: _baseline(position.constant_velocity, found, target, context),
        ),
        (KMEANS, without_truth or without_drawn, lambda: _clustered(found, target)),
        (TRUE_KMEANS, without_baseline, lambda: _clustered_truth(found, target)),
        (DRAWN, without_drawn, lambda: _drawn(found, pixels)),
        (TRIVIAL, without_future, lambda: _trivial(found, pixels)),
        (GAP, without_gap, lambda: _gap(found, _known(maps).affine, size, context, horizon)),
        (LOG_PRIOR, without_latents, lambda: _log_prior(found, None, size)),
        (LOG_PRIOR_PX, without_map, lambda: _log_prior(found, _known(maps).affine, size)),
    ):
        if why:
            missing |= dict.fromkeys(keys, why)
        else:
            measures |= zip(keys, build(), strict=True)
    return measures, missing


def _known(maps: Maps | str) -> Maps:
    assert isinstance(maps, Maps)
    return maps


def _tracked(found: Found, maps: Maps, size: tuple[int, int]) -> Iterator[Measure]:
    assert found.encoded is not None
    assert found.slots is not None
    for each in (maps.affine, maps.similarity):
        yield from _recovered(found, each(found.encoded), size)
    given: dict[str, Any] = {"frame_size": size, "slots": found.slots, "objects": found.objects}
    mapped = maps.affine(found.encoded)
    swaps = trajectory.identity_swap_rate(mapped, found.true, **given)
    compared = swaps.compared > 0
    yield Measure(_columns((swaps.switches > 0) & compared, compared), _ratio, "a single slot has nothing to exchange")
    collapses = trajectory.collapse_share(mapped, found.true, **given)
    none = "no frame has two objects apart from each other, or there are more slots than objects"
    yield Measure(_columns(collapses.collapsed, collapses.frames), _ratio, none)


def _recovered(found: Found, mapped: np.ndarray, size: tuple[int, int]) -> Iterator[Measure]:
    """R^2 of both axes, of y and of x, and the error, as ``trajectory.recovery`` has them."""
    pixels = (np.array(size) - 1) / 2
    partner = trajectory.assign_slots(mapped, found.true, slots=found.slots, objects=found.objects)
    chosen = np.take_along_axis(mapped, np.maximum(partner, 0)[:, None, :, None], axis=2)
    there = found.objects[:, None, :, None]
    true = np.where(there, found.true, 0).astype(np.float64) * pixels
    error = np.square(np.where(there, chosen * pixels - true, 0)).sum(axis=(1, 2))
    points = found.objects.sum(axis=1) * true.shape[1]
    # Of each axis: squared error, positions, their squares; and their number.
    sums = np.concatenate([error, true.sum(axis=(1, 2)), np.square(true).sum(axis=(1, 2)), points[:, None]], axis=1)

    def share(sums: np.ndarray, axes: list[int]) -> Any:
        error, total, squares = sums[..., 0:2], sums[..., 2:4], sums[..., 4:6]
        spread = squares - np.square(total) / sums[..., 6:]
        spread = np.where(spread > 1e-9 * squares, spread, np.nan)
        return 1 - error[..., axes].sum(axis=-1) / spread[..., axes].sum(axis=-1)

    still = "true positions do not vary along an axis"
    for axes in ([0, 1], [0], [1]):
        yield Measure(sums[:, None], lambda sums, axes=axes: share(sums, axes), still)
    yield Measure(sums[:, None], lambda sums: np.sqrt(sums[..., :2].sum(axis=-1) / sums[..., 6]))


def _predicted(found: Found, affine: Map, target: _Target) -> Iterator[Measure]:
    assert found.predicted is not None
    mapped = affine(found.predicted)
    yield from target.distances(mapped, found.slots)
    yield target.apart(mapped, found.slots)


def _baseline(
    extrapolate: Callable[[np.ndarray, int], np.ndarray], found: Found, target: _Target, context: int
) -> Iterator[Measure]:
    positions = extrapolate(found.rendered[:, :context], target.true.shape[1])
    yield from target.distances(positions, found.objects)
    yield target.apart(positions, found.objects)


def _clustered(found: Found, target: _Target) -> Iterator[Measure]:
    assert found.centres is not None
    assert found.painted is not None
    yield target.apart(found.centres, _centre_slots(found, found.centres))
    yield Measure(np.stack([found.painted, np.ones_like(found.painted)], axis=-1).astype(float), _ratio, curve=True)


def _clustered_truth(found: Found, target: _Target) -> Iterator[Measure]:
    assert found.true_centres is not None
    yield target.apart(found.true_centres, _centre_slots(found, found.true_centres))


def _centre_slots(found: Found, centres: np.ndarray) -> np.ndarray:
    return np.arange(centres.shape[2]) < np.maximum(found.counts, 1)[:, None]


def _drawn(found: Found, pixels: int) -> Iterator[Measure]:
    """``DRAWN``, from ``Found.pixels``."""
    assert found.pixels is not None
    nats, loss, hits, painted, white, *_ = np.moveaxis(found.pixels, 2, 0)
    one = np.ones_like(nats)
    yield Measure(np.stack([nats, pixels * one], axis=-1), _ratio, curve=True)
    yield Measure(np.stack([nats, one], axis=-1), _ratio, curve=True)
    yield from _white(hits, painted, white)
    yield Measure(np.stack([loss, one], axis=-1), _ratio, curve=True)


def _trivial(found: Found, pixels: int) -> Iterator[Measure]:
    """``TRIVIAL``, from ``Found.pixels``."""
    assert found.pixels is not None
    *_, white, hits, painted = np.moveaxis(found.pixels, 2, 0)
    yield from _white(hits, painted, white)
    shares = np.stack([white, np.full_like(white, pixels)], axis=-1)
    for factor in (1, pixels):
        yield Measure(shares, lambda sums, f=factor: f * bernoulli.entropy(_ratio(sums)), interval=False)
    for bound in bernoulli.DoubleSigmoidBounds._fields:
        yield Measure(
            shares, lambda sums, of=bound: getattr(bernoulli.bounds_of_share(_ratio(sums)), of), interval=False
        )


def _white(hits: np.ndarray, painted: np.ndarray, white: np.ndarray) -> Iterator[Measure]:
    """Precision, recall and F1."""
    yield Measure(np.stack([hits, painted], axis=-1), _ratio, "no pixel is painted white", curve=True)
    yield Measure(np.stack([hits, white], axis=-1), _ratio, "no pixel is white", curve=True)
    yield Measure(np.stack([2 * hits, painted + white], axis=-1), _ratio, "no pixel is white", curve=True)


def _gap(found: Found, affine: Map, size: tuple[int, int], context: int, horizon: int) -> Iterator[Measure]:
    assert found.encoded is not None
    assert found.slots is not None
    assert found.predicted is not None
    assert found.interpolated is not None
    filled, ahead = affine(found.interpolated), affine(found.predicted[:, : horizon - context])
    encoded = affine(found.encoded[:, context:horizon])
    true = _Target(found.true[:, context:horizon], found.objects, size)
    for positions in (filled, ahead, encoded):
        yield true.distances(positions, found.slots)[0]
    seen = _Target(encoded, found.slots, size)
    for positions in (filled, ahead):
        yield seen.distances(positions, found.slots)[0]


def _log_prior(found: Found, affine: Map | None, size: tuple[int, int]) -> Iterator[Measure]:
    """In latent units, or by a map in pixels."""
    assert found.log_prior is not None
    volume = 0.0
    if affine is not None:
        with np.errstate(divide="ignore"):
            volume = float(np.log(abs(np.linalg.det(affine.matrix * (np.array(size)[:, None] - 1) / 2))))
    yield Measure(found.log_prior[:, None], lambda sums: _ratio(sums) - volume, "the map is singular")


def _group(
    measures: Mapping[str, Measure], missing: Mapping[str, str], rows: np.ndarray, resample: Resample
) -> dict[str, Any]:
    """The values of some clips, with ``interval95``, ``curves`` and ``reasons``."""
    group: dict[str, Any] = {"clips": int(rows.sum()), "interval95": {}, "curves": {}, "reasons": dict(missing)}
    group |= dict.fromkeys(missing)
    if not measures:
        return group
    sums = {key: measure.sums[rows].sum(axis=1) for key, measure in measures.items()}
    draws = resample(np.concatenate(list(sums.values()), axis=1))
    ends = np.cumsum([columns.shape[1] for columns in sums.values()])
    of_draws = np.split(draws, ends[:-1], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        for (key, measure), drawn in zip(measures.items(), of_draws, strict=True):
            group[key] = _finite(measure.value(sums[key].mean(axis=0)))
            if group[key] is None:
                group["reasons"][key] = measure.unknown
                continue
            if measure.interval:
                spread = measure.value(drawn)
                if len(spread := spread[np.isfinite(spread)]):
                    group["interval95"][key] = [float(v) for v in np.quantile(spread, (0.025, 0.975))]
            if measure.curve:
                group["curves"][key] = [_finite(v) for v in measure.value(measure.sums[rows].mean(axis=0))]
    return group


def _add_dynamics(
    metrics: dict[str, Any],
    found: Found,
    maps: Maps | str,
    model: SSM | EDLSTM,
    size: tuple[int, int],
    reasons: dict[str, str],
) -> None:
    metrics |= dict.fromkeys(DYNAMICS)
    if not isinstance(model, SSM):
        reasons |= dict.fromkeys(DYNAMICS, f"family {metrics['family']} has no dynamics to look at")
        return
    with torch.no_grad():
        prior = kalman.LGSSM(*(field.cpu() for field in model.prior()))
    offset, step = prior.offset.numpy(), float(prior.transition[0, 2])
    try:
        spectrum = trajectory.predictor_spectrum(step, prior.transition_cov.numpy(), prior.emission_cov.numpy())
        metrics["predictor_spectrum"] = [float(modulus) for modulus in spectrum]
    except ValueError as error:
        reasons["predictor_spectrum"] = str(error)
    of_gravity = [key for key in DYNAMICS if "gravity" in key]
    options = _cannonballs(found)
    if isinstance(maps, str) or options is None:
        why = maps if isinstance(maps, str) else "the true acceleration is known of one set of sim:cannonballs only"
        reasons |= dict.fromkeys(of_gravity, why)
        return
    pixels = (np.array(size) - 1) / 2
    true = np.array(options.acceleration)
    learnt = trajectory.gravity(offset, step, maps.affine.matrix * pixels[:, None], true * pixels)
    to_world = 1 / np.array(options.scale) / cannonballs.STEP**2
    metrics |= {
        "gravity_px": learnt.acceleration.tolist(),
        "true_gravity_px": (true * pixels).tolist(),
        "gravity_ratio": learnt.ratio,
        "gravity_along": learnt.along,
        "gravity_angle": _finite(learnt.angle),
        "gravity_half_step": _finite(learnt.half_step),
        "gravity_world": (learnt.acceleration / pixels * to_world).tolist(),
        "true_gravity_world": (true * to_world).tolist(),
    }
    reasons |= {key: "no acceleration was learnt" for key in of_gravity if metrics[key] is None}


def _cannonballs(found: Found) -> cannonballs.Options | None:
    """The options of the simulator that all clips are from."""
    name, _, options = str(found.origins[0]).partition(":cannonballs:")
    if name != "sim" or (found.origins != found.origins[0]).any():
        return None
    try:
        return cannonballs.parse(options)
    except ValueError:  # what a file says of its source may be anything
        return None


def _folds(group: Mapping[str, Any]) -> Iterator[str]:
    """What to say of a fold. Best seen in clips of a single object: slots that exchange objects cost R^2, too."""
    axes = {axis: group[f"position_r2_{axis}"] for axis in ("y", "x")}
    if None in axes.values():
        return
    low, high = FOLD
    worse, better = sorted(axes, key=lambda axis: axes[axis])
    if axes[worse] < low and axes[better] > high:
        yield (
            f"the positions look folded: R^2 is {axes[worse]:.2f} along {worse} and {axes[better]:.2f} along {better}, "
            "so two sides of the frame may share their latent positions; train with another seed"
        )


def _told_map(maps: Maps) -> dict[str, Any]:
    """What ``metrics.json`` says of the maps, from latent (y, x) to coordinates."""
    kinds = {"affine": maps.affine, "similarity": maps.similarity}
    shown = {name: {"matrix": m.matrix.tolist(), "offset": m.offset.tolist()} for name, m in kinds.items()}
    return {"clips": maps.clips, "note": maps.note, **shown}


def _columns(*columns: np.ndarray) -> np.ndarray:
    """Numbers per clip as ``Measure.sums``."""
    return np.stack(columns, axis=-1).astype(float)[:, None]


def _summed(errors: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Sum and number of the errors (n, t, m) of each frame, (n, t, 2); NaN is none, and ``keep`` (n, t) chooses."""
    counted = ~np.isnan(errors)
    if keep is not None:
        counted = counted & keep[..., None]
    return np.stack([np.where(counted, errors, 0).sum(axis=2), counted.sum(axis=2)], axis=-1)


def _ratio(sums: np.ndarray) -> Any:
    return sums[..., 0] / sums[..., 1]


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
