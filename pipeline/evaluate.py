"""Measure a checkpoint on one split: reconstruction and prediction, always beside what a trivial predictor scores.

Clips stream through in the manifest's order. A clip is encoded and decoded whole (reconstruction), and from its first
``context`` frames the next ``horizon`` are predicted. Metrics are computed per frame and averaged over every frame of
every clip, those of the baselines on the same frames; LPIPS needs ``perceptual_weights``. A metric that cannot be had
is ``null``, with its reason under ``reasons``. Clips with a true segmentation also get the metrics of ``segments.py``,
for any family that has masks, and families of binary video those of ``trajectories.py``.

Which clips are the worst, the median and the best is known only after all of them: those few are then read and encoded
again for the report.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from objdyn import figures
from objdyn.clips import Clip, collate, stack_truth, to_frames, to_model_input
from objdyn.families import Family, describe, family_of
from objdyn.layers.perceptual import Network
from objdyn.metrics import position
from objdyn.metrics.image import SSIM_WINDOW, frame_mse, frame_psnr, frame_ssim
from objdyn.metrics.perceptual import LPIPS, SMALLEST
from pipeline import claim, loop, perceptual, segments, status, store, trajectories
from pipeline.checkpoint import Loaded, code_revision, load_model, load_weights
from pipeline.cli import command
from pipeline.config import EvaluateRun, TrainRun, parse_model_settings, recorded_model_settings, torch_device
from pipeline.facts import ClipFacts, stored_facts
from pipeline.reader import Source, has_split, iter_clips, open_source
from pipeline.report import (
    LatentWalk,
    Particles,
    Parts,
    ReportClip,
    draw_strip,
    read_history,
    training_facts,
    versions,
    write_report,
)

SCHEMA = 1
FRAME_METRICS = {"mse": frame_mse, "psnr": frame_psnr, "ssim": frame_ssim}
LPIPS_KEYS: dict[Network, str] = {"vgg16": "lpips", "alexnet": "lpips_alex"}
"""Name of LPIPS by its network; VGG16's is the one that DDLP reports."""
MED_STEPS = 10
CONVENTIONS: tuple[tuple[position.Convention, str], ...] = (("published", ""), ("corrected", "_corrected"))
"""How MED is computed, and what that adds to its key."""
DEFAULT_HORIZON = 40
"""Frames predicted where none are asked for, if the clips are that long."""
BASE_SIDE = 64
"""Radii in pixels are meant for frames of this height; other frames scale them."""
BACKGROUND_SHARDS, BACKGROUND_CLIPS, BACKGROUND_FRAMES = 8, 64, 16
"""At most so many shards, clips and frames per clip are read for the constant background."""
BACKGROUND_BYTES = 256 << 20
BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 1000, 0
SAME_DB = 0.01
"""Clips that are encoded again for the report, among others than before, may differ by so much in their mean PSNR. On a
CPU 0.00002 dB were seen, from sums in another order; a report with more than this says so."""
WALK_VALUES = tuple(float(value) for value in np.linspace(-2.5, 2.5, 7))
"""What a latent walk sets a dimension to, as PROVIDE's released code does."""
WALK_DIMENSIONS = 4
"""Dimensions walked along: those that spread most over the clip's slots."""

Scores = dict[str, np.ndarray]
"""Name of a metric -> (clips, frames)."""


class Tracks(NamedTuple):
    """What MED and coverage compare; of one clip without the axis n, or of all clips that have true positions."""

    encoded: np.ndarray
    """Positions of the encoded particles, (n, t, k, 2)."""
    encoded_presence: np.ndarray
    predicted: np.ndarray | None
    """The same for the predicted frames."""
    predicted_presence: np.ndarray | None
    true: np.ndarray
    """True positions, (n, t, m, 2)."""
    present: np.ndarray


class Made(NamedTuple):
    """What a model makes of a batch."""

    latents: Any
    recon: Tensor
    predicted: Any
    """Latents of the frames after the context, with ``scene``; None where nothing is predicted."""
    scene: Tensor | None
    segments: np.ndarray | None = None
    """Component of each pixel of ``recon``, (b, t, h, w); None where masks are not asked for."""
    predicted_segments: np.ndarray | None = None
    """The same of ``scene``."""
    last_segments: np.ndarray | None = None
    """The same of the last frame of the context, encoded without those after it: (b, 1, h, w)."""


class Measured(NamedTuple):
    """What one pass over the clips found."""

    scores: Scores
    tracks: Tracks | str
    """A string says why there are none."""
    facts: ClipFacts
    segmented: segments.Scores
    """Empty where no clip has a true segmentation."""
    found: trajectories.Found | None = None
    """None where ``trajectories`` measures nothing of the family."""


class Choice(NamedTuple):
    """A clip to draw."""

    clip: int
    """Its number in the order of evaluation."""
    rank: str
    """``worst, 1st of 200`` for example; the best are counted from the best, all others from the worst."""


@store.job_into_folder
def evaluate(run: EvaluateRun) -> dict[str, Any]:
    """Evaluate a checkpoint, publish ``metrics.json`` and ``report.html`` in ``run.out``, return the metrics.

    Raises:
        ValueError: checkpoint, data and settings do not fit together; the message says what to do. Or another
            evaluation works in the folder.
    """
    run_out = store.resolve(run.out, "--out")
    with claim.hold(run_out, "evaluate", kind="evaluation") as held:  # the folder may be of a run that is training
        return _evaluate(run, run_out, held)


def _evaluate(run: EvaluateRun, run_out: str, held: claim.Claim) -> dict[str, Any]:
    checkpoint, data = store.resolve(run.checkpoint, "--checkpoint"), store.resolve(run.data, "--data")
    device = torch_device(run.device)
    source = open_source(data, run.split)
    reasons: dict[str, str] = {}
    given, lpips = _open_lpips(run, source, device, reasons)
    loaded, changed = open_model(run, checkpoint, device)
    family = describe(loaded.config)
    horizon = _horizon(run, source, family, loaded.family, reasons)
    background = _background(data, source, reasons)
    if min(source.height, source.width) < SSIM_WINDOW:
        size = f"{source.height}x{source.width}"
        reasons["ssim"] = f"SSIM needs frames of at least {SSIM_WINDOW} pixels a side, these are {size}"

    stored = stored_facts(data, source)
    maps: trajectories.Maps | str = ""
    if trajectories.applies(loaded.config):
        batch, limit = run.batch_size, run.limit
        maps = trajectories.fit(loaded.model, family, data, source, batch_size=batch, limit=limit)
    measured = _measure(run, source, loaded, family, horizon, background, "ssim" not in reasons, lpips)
    scores, tracks, facts, segmented, found = measured
    if found is not None and isinstance(maps, str):
        maps = trajectories.own_maps(found, maps)
    kind = "predict" if horizon else "recon"
    ranked_by = next((f"{kind}_{name}" for name in LPIPS_KEYS.values() if name in lpips), f"{kind}_psnr")
    higher = 1 if ranked_by.endswith("psnr") else -1
    choices = choose_clips(higher * scores[ranked_by].mean(axis=1), run.report_clips)
    drawn, notes = _draw(run, source, loaded, family, horizon, choices, measured, maps)
    metrics: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "metrics",
        "model": loaded.model_id,
        "family": loaded.family,
        "step": loaded.step,
        "dataset": source.id,
        "split": run.split,
        "clips": len(facts.keys),
        "context": run.context,
        "horizon": horizon,
        "command": command("jobs/evaluate.py", run),
        "model_settings_changed": changed,
        "code": code_revision(),
        "versions": versions(),
        "device": str(device),
        "training": training_facts(loaded.family, loaded.run, loaded.code, loaded.dataset_id),
        "data": {"clips_in_split": sum(source.shard_sizes), **facts.summary(), **stored},
        "keys": facts.keys,
        "ranked_by": ranked_by,
        "perceptual": given,
        "drawn": [{"clip": facts.keys[choice.clip], "rank": choice.rank} for choice in choices],
        "std": {},
        "interval95": {},
        "curves": {},
    }
    summarise_frames(metrics, scores, reasons)
    summarise_positions(metrics, tracks, run, source, horizon, reasons)
    summarise_segmentation(metrics, segmented, loaded.config, reasons)
    if found is not None:
        trajectories.summarise(
            metrics,
            found,
            maps,
            model=loaded.model,
            context=run.context,
            horizon=horizon,
            frame_size=(source.height, source.width),
            reasons=reasons,
            resample=_resample,
        )
    metrics["reasons"] = {name: reasons[name] for name in sorted(reasons) if name in metrics}
    history, problems = read_history(_run_folder(checkpoint))
    held.check()
    write_report(
        store.join(run_out, "report.html"),
        title=f"{loaded.family} on {run.data}",
        metrics=metrics,
        history=history,
        clips=drawn,
        latent_tracks=None if found is None else trajectories.latent_tracks(found),
        settings=loaded.run,
        notes=[*notes, *problems],
    )
    store.publish_json(store.join(run_out, "metrics.json"), metrics)
    return metrics


def open_model(
    run: EvaluateRun, checkpoint: str, device: torch.device, more: Mapping[str, Any] | None = None
) -> tuple[Loaded, dict[str, Any]]:
    """Load the model with the settings of ``run.set``, and of ``more`` over them; also those settings, by name.

    Raises:
        ValueError: there is no such checkpoint or setting, or the weights do not fit it.
    """
    changed = dict(more or {})
    if run.set:
        changed = parse_model_settings(run.set, load_weights(checkpoint, which=run.which).config) | changed
    loaded = load_model(checkpoint, device=device, which=run.which, overrides=changed)
    return loaded, recorded_model_settings(changed)


def summarise_frames(metrics: dict[str, Any], scores: Mapping[str, np.ndarray], reasons: dict[str, str]) -> None:
    """Add mean, standard deviation over frames, 95 % interval over clips and per-frame curve of every frame metric.

    LPIPS by VGG16 is always told, if only with the reason why there is none; by AlexNet where its weights were given.
    """
    names = ("recon", "predict", "copy_last_predict", "constant_background_recon", "constant_background_predict")
    measures = [*FRAME_METRICS, LPIPS_KEYS["vgg16"]]
    measures += [LPIPS_KEYS["alexnet"]] if "alexnet" in metrics.get("perceptual", {}) else []
    for name, metric in itertools.product(names, measures):
        key = f"{name}_{metric}"
        if key not in scores:
            blockers = ["background"] * name.startswith("constant") + ["predict"] * name.endswith("predict") + [metric]
            metrics[key] = None
            reasons[key] = next(reasons[blocker] for blocker in blockers if blocker in reasons)
            continue
        values = scores[key]
        metrics[key] = _finite(values.mean())
        if metrics[key] is None:
            reasons[key] = "the frames hold values that are not finite"
            continue
        metrics["std"][key] = float(values.std())
        _add_interval(metrics, key, _resample(values.mean(axis=1, keepdims=True))[:, 0])
        metrics["curves"][key] = [float(value) for value in values.mean(axis=0)]
    metrics["per_clip"] = {key: [_finite(v) for v in values.mean(axis=1)] for key, values in sorted(scores.items())}


def summarise_positions(
    metrics: dict[str, Any],
    tracks: Tracks | str,
    run: EvaluateRun,
    source: Source,
    horizon: int,
    reasons: dict[str, str],
) -> None:
    """Add MED10 with its twins and baselines, and coverage; ``tracks`` is the reason where there are none."""
    size = (source.height, source.width)
    pixel = min(size) / BASE_SIDE
    for radius in (3, 2):
        key = f"coverage_{radius}px"
        if isinstance(tracks, str):
            metrics[key], reasons[key] = None, tracks
            continue
        share = position.coverage(
            tracks.encoded, tracks.encoded_presence, tracks.true, tracks.present, radius * pixel, frame_size=size
        )
        metrics[key] = _finite(share)
        if metrics[key] is None:
            reasons[key] = "no object is present in any frame"
    predictions = _position_predictions(tracks, run, size, horizon, reasons)
    for name in ("", "copy_last_", "constant_velocity_", "constant_velocity_walls_"):
        found = predictions[name]
        for convention, suffix in CONVENTIONS:
            key = f"{name}med10{suffix}"
            if isinstance(found, str):
                metrics[key], reasons[key] = None, found
                continue
            assert not isinstance(tracks, str)
            window = slice(run.context, run.context + horizon)
            result = position.med(
                *found, tracks.true[:, window], tracks.present[:, window], frame_size=size, convention=convention
            )
            _add_med(metrics, key, result, reasons)
            if not suffix:
                metrics["curves"][f"{name}position_error"] = [_finite(v) for v in result.per_step]
            if key == "med10":
                pairs, lost = int(result.pairs[:MED_STEPS].sum()), int(result.lost[:MED_STEPS].sum())
                metrics["med10_lost_share"] = lost / (pairs + lost) if pairs + lost else None
    metrics.setdefault("med10_lost_share", None)
    if metrics["med10_lost_share"] is None:
        reasons["med10_lost_share"] = reasons.get("med10", "no object is present in the first predicted frame")


def summarise_segmentation(
    metrics: dict[str, Any], found: segments.Scores, config: Any, reasons: dict[str, str]
) -> None:
    """Add the metrics of ``segments.KEYS``, as the frame metrics have them; NaN rows are clips without truth.

    ``config`` is the model's, which says whether it tracks.
    """
    with_truth = np.zeros(0, dtype=bool)
    counted = {"segmented_clips": 0, "frames_without_objects": 0}
    if found:
        with_truth = np.isfinite(found["one_cluster_ari"]).all(axis=1)
        empty = np.isnan(found["one_cluster_matched_iou"][with_truth])
        counted = {"segmented_clips": int(with_truth.sum()), "frames_without_objects": int(empty.sum())}
    metrics |= counted
    metrics["notes"] = {}
    for key in segments.KEYS:
        metrics[key], (prefix, predicts, name) = None, _parts_of(key)
        if predicts and "predict" in reasons:
            reasons[key] = reasons["predict"]
            continue
        if not found:
            reasons[key] = "the clips hold no true segmentation"
            continue
        known = np.isfinite(found[f"{prefix}{predicts}ari"]).all(axis=1)
        if broken := int((with_truth & ~known).sum()):
            reasons[key] = f"the masks of {broken} clips hold values that are not finite"
            continue
        if name == "swap_rate":
            swaps = segments.rate(found, prefix)
            total = np.nansum(swaps, axis=0)
            if not total[1]:
                reasons[key] = "no object is visible in two frames of a clip"
                continue
            metrics[key] = float(total[0] / total[1])
            with np.errstate(invalid="ignore"):
                _add_interval(metrics, key, np.divide(*_resample(swaps).T))
            per_clip = [pair[0] / pair[1] if pair[1] > 0 else np.nan for pair in swaps]
        else:
            values = found[key]
            metrics[key] = _finite(_mean(values))
            if metrics[key] is None:
                reasons[key] = "no frame shows an object"
                continue
            per_clip = _mean(values, axis=1)
            metrics["std"][key] = float(values[np.isfinite(values)].std())
            _add_interval(metrics, key, _resample(per_clip[:, None])[:, 0])
            if name not in segments.WHOLE:
                metrics["curves"][key] = [_finite(value) for value in _mean(values, axis=0)]
        metrics["per_clip"][key] = [_finite(value) for value in per_clip]
        if name in segments.WHOLE and not prefix and not describe(config).tracked:
            metrics["notes"][key] = f"slots of family {family_of(config)} carry no identity from frame to frame"


def _parts_of(key: str) -> tuple[str, str, str]:
    """Prefix of the baseline, ``predict_`` or nothing, and name of a segmentation metric."""
    prefix = next((f"{name}_" for name in (*segments.BASELINES, "copy_last") if key.startswith(name)), "")
    name = key.removeprefix(prefix)
    return prefix, "predict_" * name.startswith("predict_"), name.removeprefix("predict_")


def _mean(values: np.ndarray, axis: int | None = None) -> Any:
    """Mean of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=axis) / np.maximum(count, 1), np.nan)


def choose_clips(scores: np.ndarray, count: int) -> list[Choice]:
    """Choose the worst, the median and the best clips by their scores, ``count`` in all, each clip once.

    What does not divide by three goes to the worst, then to the best. A score that is not finite is worse than any
    other, and of equal ones the earlier clip counts as the worse.
    """
    total = len(scores)
    count = min(count, total)
    order = [int(i) for i in np.argsort(np.where(np.isfinite(scores), scores, -np.inf), kind="stable")]
    if total == 1:
        return [Choice(0, "the only clip")] * count
    worst, median, best = (count + 2) // 3, count // 3, (count + 1) // 3
    first = min(max((total - median) // 2, worst), total - best - median)
    return [
        *(Choice(order[i], f"worst, {_ordinal(i + 1)} of {total}") for i in range(worst)),
        *(Choice(order[i], f"median, {_ordinal(i + 1)} of {total}") for i in range(first, first + median)),
        *(Choice(order[-1 - i], f"best, {_ordinal(i + 1)} of {total}") for i in range(best)),
    ]


def median_frame(source: Source) -> np.ndarray:
    """The per-pixel median, float32 (h, w, c) in [0, 255], over frames spread evenly over a split.

    At most ``BACKGROUND_CLIPS`` clips of ``BACKGROUND_SHARDS`` shards are read, and ``BACKGROUND_FRAMES`` frames of
    each are used, fewer where they would take more than ``BACKGROUND_BYTES``; always the same ones.
    """
    filled = [number for number, size in enumerate(source.shard_sizes) if size]
    if not filled:
        raise ValueError(f"split {source.split!r} of dataset {source.id} has no clips to take a background from")
    room = max(1, BACKGROUND_BYTES // (source.height * source.width * 3))
    num_clips = min(BACKGROUND_CLIPS, room)
    shards = [filled[i] for i in _even(len(filled), min(BACKGROUND_SHARDS, num_clips))]
    frames = []
    for number in shards:
        shard = source.open_shard(number)
        for i in _even(len(shard), num_clips // len(shards)):
            clip = shard.clip(i, truth=())
            frames.append(clip.frames[_even(len(clip.frames), min(BACKGROUND_FRAMES, room // num_clips))])
    pixels = np.concatenate(frames)
    # Row by row, since the median works on a copy.
    return np.stack([np.median(pixels[:, row], axis=0) for row in range(pixels.shape[1])]).astype(np.float32)


def _measure(
    run: EvaluateRun,
    source: Source,
    loaded: Loaded,
    family: Family,
    horizon: int,
    background: np.ndarray | None,
    ssim: bool,
    lpips: Mapping[str, LPIPS],
) -> Measured:
    device = next(loaded.model.parameters()).device
    loaded.model.eval()
    wanted = [name for name in FRAME_METRICS if ssim or name != "ssim"]
    flat = None if background is None else torch.from_numpy(background / 255).permute(2, 0, 1).to(device)
    parts: dict[str, list[np.ndarray]] = {}
    tracked: list[Tracks] = []
    segmented: list[tuple[int, segments.Scores]] = []
    found: list[trajectories.Found] = []
    binary = trajectories.applies(loaded.config)
    facts = ClipFacts()
    total = min(sum(source.shard_sizes), run.limit or sys.maxsize)
    progress = status.Status("evaluate", total, "clips", split=run.split, family=loaded.family)
    stream = iter_clips(source, run.limit, truth=(*_truth(family), *(trajectories.TRUTH if binary else ())))
    for clips in progress.each(batches(stream, run.batch_size)):
        masks = segments.has_truth(clips)
        video, made = _apply(loaded.model, clips, family, run.context, horizon, device, masks)
        for clip in clips:
            facts.add(clip)  # before the first number is fetched from a GPU, which works meanwhile
        pairs = {"recon": (made.recon, video)}
        if flat is not None:
            pairs["constant_background_recon"] = (flat.expand_as(video), video)
        if made.scene is not None:
            future = video[:, run.context : run.context + horizon]
            pairs["predict"] = (made.scene, future)
            pairs["copy_last_predict"] = (video[:, run.context - 1 : run.context].expand_as(future), future)
        for name, pair in pairs.items():
            for metric in wanted:
                values = FRAME_METRICS[metric](*pair).double().cpu().numpy()
                parts.setdefault(f"{name}_{metric}", []).append(values)
        for metric, network in lpips.items():
            for name, values in _distances(network, video, made, flat, run.context).items():
                parts.setdefault(f"{name}_{metric}", []).append(values.double().cpu().numpy())
        tracked += _tracks_of(clips, made.latents, made.predicted)
        segmented.append((len(clips), _segment_scores(clips, made, run.context, horizon) if masks else {}))
        if binary:
            found.append(
                trajectories.measure(loaded.model, family, clips, video, made.latents, made.predicted, run.context)
            )
    if not progress.done:
        raise ValueError(f"split {run.split!r} of {run.data} has no clips; there is nothing to evaluate")
    scores = {name: np.concatenate(values) for name, values in parts.items()}
    for metric in (*wanted, *lpips):
        # The constant background is scored once over the whole clip; its predicted frames are a part of that.
        if horizon and (whole := scores.get(f"constant_background_recon_{metric}")) is not None:
            scores[f"constant_background_predict_{metric}"] = whole[:, run.context : run.context + horizon]
    joined = _join_tracks(tracked, family, loaded.family)
    return Measured(scores, joined, facts, segments.join(segmented), trajectories.join(found) if binary else None)


def _distances(lpips: LPIPS, video: Tensor, made: Made, background: Tensor | None, context: int) -> dict[str, Tensor]:
    """LPIPS of what the model and the baselines make of a batch; the activations of a still picture are needed once."""
    whole = {"recon": made.recon}
    if background is not None:
        whole["constant_background_recon"] = background[None, None]
    found = lpips.compare(video, whole)
    if made.scene is not None:
        ahead = {"predict": made.scene, "copy_last_predict": video[:, context - 1 : context]}
        found |= lpips.compare(video[:, context : context + made.scene.shape[1]], ahead)
    return found


def _open_lpips(
    run: EvaluateRun, source: Source, device: torch.device, reasons: dict[str, str]
) -> tuple[dict[str, Any], dict[str, LPIPS]]:
    """What was given of each network, for the record; and LPIPS by its name in the metrics, or a reason without it.

    Raises:
        ValueError: a file is wrong, or holds other weights than the published ones: LPIPS is defined by them.
    """
    paths = [store.resolve(path, perceptual.FLAG) for path in run.perceptual_weights]
    read = perceptual.read_weights(paths)
    found: dict[str, LPIPS] = {}
    for network, metric in LPIPS_KEYS.items():
        if (weights := read.get(network)) is None:
            reasons[metric] = f"no weights of {network} were given ({perceptual.FLAG}); {perceptual.advice(network)}"
            continue
        if not weights.record["published"]:
            raise ValueError(
                f"{', '.join(weights.record['files'])} does not hold the published weights of {network}, and distances "
                f"by others are not LPIPS; {perceptual.advice(network)}"
            )
        missing = "trunk" if weights.trunk is None else "heads"
        side = min(source.height, source.width)
        if weights.trunk is None or not weights.heads:
            reasons[metric] = f"{perceptual.FLAG} lacks the {missing} of {network}; give its file, too"
        elif side < SMALLEST[network]:
            size = f"{source.height}x{source.width}"
            reasons[metric] = (
                f"LPIPS by {network} needs frames of at least {SMALLEST[network]} pixels a side, these are {size}"
            )
        else:
            found[metric] = LPIPS(weights.trunk, weights.heads).to(device)
    return {network: weights.record for network, weights in read.items()}, found


def _apply(
    model: Any, clips: Sequence[Clip], family: Family, context: int, horizon: int, device: torch.device, masks: bool
) -> tuple[Tensor, Made]:
    """Encode and decode clips whole, and predict from their first frames; also the video that the model was given."""
    video = to_model_input(collate(clips), device)
    inputs = stack_truth(clips, family.inputs, device)
    with torch.no_grad():
        latents = model.encode(video, **inputs)
        recon, found, _ = segments.render(model, latents, masks)
        if not horizon:
            return video, Made(latents, recon, None, None, found)
        seen = model.encode(video[:, :context], **inputs)
        predicted = model.rollout(seen, horizon)
        scene, ahead, _ = segments.render(model, predicted, masks)
        last = segments.render(model, segments.cut(seen, context - 1, context), masks).segments if masks else None
        return video, Made(latents, recon, predicted, scene, found, ahead, last)


def _segment_scores(clips: Sequence[Clip], made: Made, context: int, horizon: int) -> segments.Scores:
    assert made.segments is not None
    scores = segments.recon_scores(clips, made.segments)
    if made.predicted_segments is not None and made.last_segments is not None:
        scores |= segments.predict_scores(
            clips, made.predicted_segments, made.last_segments, context=context, horizon=horizon
        )
    return scores


def _truth(family: Family) -> tuple[str, ...]:
    return ("positions", "present", "segmentation", *family.inputs)


def _position_predictions(
    tracks: Tracks | str, run: EvaluateRun, size: tuple[int, int], horizon: int, reasons: Mapping[str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray] | str]:
    """Positions and presence over the horizon by prefix of their key, or why there are none."""
    names = ("", "copy_last_", "constant_velocity_", "constant_velocity_walls_")
    if "predict" in reasons:
        tracks = reasons["predict"]
    if isinstance(tracks, str):
        return dict.fromkeys(names, tracks)
    assert tracks.predicted is not None
    assert tracks.predicted_presence is not None
    context = tracks.true[:, : run.context]
    presence = np.repeat(tracks.present[:, run.context - 1 : run.context], horizon, axis=1)
    radius = run.wall_radius * min(size) / BASE_SIDE
    predictions: dict[str, tuple[np.ndarray, np.ndarray] | str] = {
        "": (tracks.predicted, tracks.predicted_presence),
        "copy_last_": (position.copy_last(context, horizon), presence),
    }
    if run.context < 2:
        return predictions | dict.fromkeys(names[2:], "a velocity needs a context of at least 2 frames")
    walls = position.constant_velocity_with_walls(context, horizon, radius=radius, frame_size=size)
    predictions["constant_velocity_"] = (position.constant_velocity(context, horizon), presence)
    predictions["constant_velocity_walls_"] = (walls, presence)
    return predictions


def _add_med(metrics: dict[str, Any], key: str, result: position.MED, reasons: dict[str, str]) -> None:
    steps = result.per_sequence[:, :MED_STEPS]
    if steps.shape[1] < MED_STEPS:
        metrics[key] = None
        reasons[key] = f"MED10 needs a horizon of at least {MED_STEPS} frames, this run predicts {steps.shape[1]}"
        return
    metrics[key] = _finite(position.med10(result))
    if metrics[key] is None:
        reasons[key] = f"at one of the {MED_STEPS} steps no object had a visible particle"
        return
    sums = steps.sum(axis=1)
    if len(whole := sums[np.isfinite(sums)]):
        metrics["std"][key] = float(whole.std())
    _add_interval(metrics, key, _resample(steps).sum(axis=1))


def _resample(values: np.ndarray) -> np.ndarray:
    """Column means, ignoring NaN, of bootstrap samples of the rows: (draws, columns)."""
    generator, n = np.random.default_rng(BOOTSTRAP_SEED), len(values)
    known = ~np.isnan(values)
    filled, known = np.where(known, values, 0.0), known.astype(float)
    means = np.empty((BOOTSTRAP_DRAWS, values.shape[1]))
    for row in means:
        counts = np.bincount(generator.integers(0, n, n), minlength=n).astype(float)
        with np.errstate(invalid="ignore"):
            row[:] = counts @ filled / (counts @ known)
    return means


def _add_interval(metrics: dict[str, Any], key: str, means: np.ndarray) -> None:
    finite = means[np.isfinite(means)]
    if len(finite):
        metrics["interval95"][key] = [float(v) for v in np.quantile(finite, (0.025, 0.975))]


def confidence_interval(per_clip: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of one number per clip, from a bootstrap over clips; None where no number is known."""
    metrics: dict[str, Any] = {"interval95": {}}
    _add_interval(metrics, "", _resample(per_clip[:, None])[:, 0])
    return metrics["interval95"].get("")


def _horizon(run: EvaluateRun, source: Source, family: Family, name: str, reasons: dict[str, str]) -> int:
    """Frames to predict, 0 with a reason where nothing can be predicted."""
    if "rollout" not in family.verbs:
        reasons["predict"] = f"family {name} does not predict: it has no rollout"
        return 0
    if run.horizon == 0:
        reasons["predict"] = "horizon is 0, so nothing was predicted"
        return 0
    if run.horizon is None:
        if run.context >= source.num_frames:
            reasons["predict"] = (
                f"the clips hold {source.num_frames} frames, so none is left to predict after a context of "
                f"{run.context}"
            )
            return 0
        return min(DEFAULT_HORIZON, source.num_frames - run.context)
    if run.context + run.horizon > source.num_frames:
        fitting = source.num_frames - run.context
        advice = f"use --horizon {fitting}" if fitting > 0 else "use a smaller --context and --horizon"
        raise ValueError(
            f"context {run.context} + horizon {run.horizon} = {run.context + run.horizon} frames, but the clips of "
            f"split {run.split!r} hold {source.num_frames}; {advice}, or make the dataset with longer clips "
            f"(make_shards.py --frames {run.context + run.horizon})"
        )
    return run.horizon


def _background(data: str, source: Source, reasons: dict[str, str]) -> np.ndarray | None:
    if not has_split(data, "train"):
        reasons["background"] = "the dataset has no split 'train' to take the constant background from"
        return None
    train = open_source(data, "train")
    if (train.height, train.width) != (source.height, source.width):
        reasons["background"] = (
            f"the split 'train' has frames of {train.height}x{train.width}, this one {source.height}x{source.width}"
        )
        return None
    return median_frame(train)


def _tracks_of(clips: Sequence[Clip], latents: Any, predicted: Any) -> list[Tracks]:
    """Per clip with true positions, the encoded, predicted and true ones."""
    if not hasattr(latents, "position"):
        return []
    encoded, ahead = _positions(latents), None if predicted is None else _positions(predicted)
    rows = []
    for i, clip in enumerate(clips):
        if (true := clip.truth.get("positions")) is not None:
            future = (None, None) if ahead is None else (ahead[0][i], ahead[1][i])
            present = clip.truth.get("present", np.ones(true.shape[:2], dtype=bool))
            rows.append(Tracks(encoded[0][i], encoded[1][i], *future, true, present))
    return rows


def _positions(latents: Any) -> tuple[np.ndarray, np.ndarray]:
    where = latents.position.float().cpu().numpy()
    known = np.isfinite(where).all(axis=-1).astype(np.float32)  # a particle that is nowhere is not visible
    if hasattr(latents, "transparency"):
        return where, np.where(known, latents.transparency.float().cpu().numpy(), 0)
    return where, known


def _join_tracks(rows: Sequence[Tracks], family: Family, name: str) -> Tracks | str:
    if not rows:
        return (
            "the clips hold no true positions"
            if "position" in family.object_columns
            else f"family {name} has no positions among its latents"
        )
    most = max(row.true.shape[1] for row in rows)
    predicted = [row.predicted for row in rows if row.predicted is not None]
    predicted_presence = [row.predicted_presence for row in rows if row.predicted_presence is not None]
    return Tracks(
        encoded=np.stack([row.encoded for row in rows]),
        encoded_presence=np.stack([row.encoded_presence for row in rows]),
        predicted=np.stack(predicted) if predicted else None,
        predicted_presence=np.stack(predicted_presence) if predicted_presence else None,
        # Clips may differ in their number of objects: the missing ones are absent.
        true=np.stack([pad_objects(row.true, most) for row in rows]),
        present=np.stack([pad_objects(row.present, most) for row in rows]),
    )


def pad_objects(array: np.ndarray, count: int) -> np.ndarray:
    """Truth (t, n, ...) with room for ``count`` objects; the further ones are zeros, so not present."""
    return np.pad(array, [(0, 0), (0, count - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


def _draw(
    run: EvaluateRun,
    source: Source,
    loaded: Loaded,
    family: Family,
    horizon: int,
    choices: Sequence[Choice],
    measured: Measured,
    maps: trajectories.Maps | str,
) -> tuple[list[ReportClip], list[str]]:
    """Read and encode the chosen clips again, a batch at a time; with notes where that gives other scores."""
    device = next(loaded.model.parameters()).device
    ranks = {choice.clip: choice.rank for choice in choices}
    numbers = iter(sorted(ranks))
    drawn: dict[int, ReportClip] = {}
    notes = []
    for clips in batches(_clips_at(source, sorted(ranks), _truth(family)), run.batch_size):
        masks = "position" not in family.object_columns
        video, made = _apply(loaded.model, clips, family, run.context, horizon, device, masks)
        pairs = {"recon_psnr": (made.recon, video)}
        if made.scene is not None:
            pairs["predict_psnr"] = (made.scene, video[:, run.context : run.context + horizon])
        gaps = None
        if measured.found is not None:
            gaps = trajectories.interpolated_frames(
                loaded.model, family, clips, video, context=run.context, horizon=horizon
            )
        again = {name: frame_psnr(*pair).double().mean(dim=1).cpu().numpy() for name, pair in pairs.items()}
        for i, clip in enumerate(clips):
            number = next(numbers)
            drawn[number] = _drawn(loaded.model, clip, made, i, run.context, family)._replace(
                rank=ranks[number],
                scores=_scores_of(measured.scores, number),
                predicted_scores=_predicted_scores_of(measured.scores, number),
            )
            if measured.found is not None:
                tracks = trajectories.clip_tracks(measured.found, maps, number, run.context)
                tracks = tracks._replace(interpolated=None if gaps is None else gaps[i])
                drawn[number] = drawn[number]._replace(tracks=tracks)
            if number == choices[0].clip and hasattr(made.latents, "slots"):
                drawn[number] = drawn[number]._replace(walk=_walk(loaded.model, made.latents, i, drawn[number]))
            for name, values in again.items():
                before = measured.scores[name][number].mean()
                if not (abs(values[i] - before) <= SAME_DB or np.isnan([values[i], before]).all()):
                    notes.append(
                        f"Clip {clip.key} was encoded again to be drawn, among other clips, and this time had {name} "
                        f"{values[i]:.2f} dB instead of the {before:.2f} dB that were measured; so its pictures may "
                        "differ from what was measured."
                    )
    return [drawn[choice.clip] for choice in choices], notes


def draw_first_clip(run: str, settings: TrainRun) -> bytes:
    """A PNG of the first held-out clip of a run's data as the last checkpoint of the run encodes and predicts it.

    Args:
        run: run folder.
        settings: of the run, as they were at its end.
    """
    loaded = load_model(run, device=torch.device("cpu"))
    family = describe(loaded.config)
    source = open_source(settings.data, "val", loader=settings.loader)
    context = max(1, settings.clip_frames - 1)
    horizon = min(loop.EVAL_HORIZON, source.num_frames - context) if "rollout" in family.verbs else 0
    length = max(context + horizon, settings.clip_frames)
    clip = next(iter_clips(source, 1, length=length, truth=_truth(family)))
    masks = "position" not in family.object_columns
    _, made = _apply(loaded.model, [clip], family, context, max(0, horizon), torch.device("cpu"), masks)
    return figures.png(draw_strip(_drawn(loaded.model, clip, made, 0, context, family)))


def _clips_at(source: Source, numbers: Sequence[int], truth: Sequence[str]) -> Iterator[Clip]:
    """The clips of ascending numbers; each shard is opened once."""
    ends = np.cumsum(source.shard_sizes)
    for shard, group in itertools.groupby(numbers, key=lambda number: int(np.searchsorted(ends, number, "right"))):
        opened, first = source.open_shard(shard), int(ends[shard]) - source.shard_sizes[shard]
        for number in group:
            yield opened.clip(number - first, truth=truth)


def _scores_of(scores: Scores, number: int) -> dict[str, float]:
    labels = {
        "predict_psnr": "prediction",
        "copy_last_predict_psnr": "copied last frame",
        "constant_background_predict_psnr": "constant background",
        "recon_psnr": "reconstruction",
    }
    return {label: float(scores[name][number].mean()) for name, label in labels.items() if name in scores}


def _predicted_scores_of(scores: Scores, number: int) -> dict[str, tuple[float, ...]]:
    """Of each predicted frame."""
    labels = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "lpips_alex": "LPIPS by AlexNet"}
    keys = {label: f"predict_{name}" for name, label in labels.items()}
    return {label: tuple(map(float, scores[key][number])) for label, key in keys.items() if key in scores}


def _drawn(model: Any, clip: Clip, made: Made, i: int, context: int, family: Family) -> ReportClip:
    """What the report shows of clip ``i`` of a batch."""
    total = len(clip.frames)
    shown = [min(context, total) - 1]
    if made.segments is not None:
        shown = sorted({0, *shown, total - 1})
    latents = type(made.latents)(*(field[i : i + 1, shown] for field in made.latents))
    with torch.no_grad():
        scene = model.decode(latents, components=True)
    parts: tuple[Parts, ...] = ()
    background = True
    if scene.masks is not None and scene.components is not None:
        objects = getattr(made.latents, family.object_columns[0]).shape[2]
        background = scene.masks.shape[2] > objects
        masks = scene.masks[0, :, :, 0].float().cpu().numpy()
        parts = tuple(Parts(t, masks[j], _pixels(scene.components[0, j])) for j, t in enumerate(shown))
    last = clip.start_frame + (total - 1) * clip.stride
    return ReportClip(
        key=clip.key,
        source=f"{clip.source}, frames {clip.start_frame} to {last}",
        frames=np.broadcast_to(clip.frames, (*clip.frames.shape[:3], 3)),  # as the model sees a single channel
        reconstruction=_pixels(made.recon[i]),
        fps=clip.fps / clip.stride,
        context=context if made.scene is not None else 0,
        prediction=None if made.scene is None else _pixels(made.scene[i]),
        particles=_particles(made.latents, i),
        predicted_particles=None if made.predicted is None else _particles(made.predicted, i),
        positions=clip.truth.get("positions"),
        present=clip.truth.get("present"),
        segments=None if made.segments is None else made.segments[i],
        predicted_segments=None if made.predicted_segments is None else made.predicted_segments[i],
        parts=parts,
        has_background=background,
    )


def _walk(model: Any, latents: Any, i: int, drawn: ReportClip) -> LatentWalk:
    """The last frame of clip ``i``, decoded with one dimension of one slot at other values.

    The slot is the one with the second largest segment (the largest is mostly the background); the dimensions are
    those with the largest standard deviation over the clip's frames and slots.
    """
    slots = torch.nan_to_num(latents.slots[i])  # (t, k, d)
    dimensions = slots.flatten(0, 1).std(dim=0).argsort(descending=True, stable=True)[:WALK_DIMENSIONS].tolist()
    masks = drawn.parts[-1].masks
    areas = np.bincount(np.nan_to_num(masks).argmax(axis=0).ravel(), minlength=len(masks))
    slot = int(np.argsort(-areas, kind="stable")[1])
    last = type(latents)(*(field[i : i + 1, -1:] for field in latents))
    count = len(dimensions) * len(WALK_VALUES)
    many = type(latents)(*(field.expand(count, *field.shape[1:]) for field in last))
    moved = many.slots.clone()
    for row, (dimension, value) in enumerate(itertools.product(dimensions, WALK_VALUES)):
        moved[row, 0, slot, dimension] = value
    with torch.no_grad():
        video = model.decode(many._replace(slots=moved)).video[:, 0]
    frames = _pixels(video).reshape(len(dimensions), len(WALK_VALUES), *drawn.frames.shape[1:3], -1)
    names = tuple(f"dimension {dimension}" for dimension in dimensions)
    return LatentWalk(frames, WALK_VALUES, names, slot=slot, frame=len(drawn.frames) - 1)


def _pixels(video: Tensor) -> np.ndarray:
    return to_frames(torch.nan_to_num(video))  # what is not a number is drawn black


def _particles(latents: Any, i: int) -> Particles | None:
    if not hasattr(latents, "position"):
        return None
    scale = latents.scale[i].float().sigmoid().cpu().numpy() if hasattr(latents, "scale") else None
    shown = latents.transparency[i].float().cpu().numpy() if hasattr(latents, "transparency") else None
    return Particles(latents.position[i].float().cpu().numpy(), shown, scale)


def batches(clips: Iterator[Clip], size: int) -> Iterator[list[Clip]]:
    """Group clips by ``size``; the last group may be smaller."""
    while batch := list(itertools.islice(clips, size)):
        yield batch


def _run_folder(checkpoint: str) -> str:
    parent, _, name = checkpoint.rstrip("/").rpartition("/")
    if name.startswith("step-") and parent.endswith("/checkpoints"):
        return parent.removesuffix("/checkpoints")
    return checkpoint


def _even(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total``: the middles of as many equal parts."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
