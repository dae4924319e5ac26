"""ODDN's evaluation: decomposition, prediction, and what its dynamics vectors hold, of several checkpoints at once.

    Table 3      decomposition of every frame: MSE, ARI, F-ARI (the paper's numbers of CLEVRER beside them)
    Prediction   mean squared error of each of 6 frames after 2 (figure 7, of which no numbers are published), beside
                 the copied last frame, and beside the last frame's latents held and decoded
    Probe        R^2 of a linear map from a slot's vectors to its object's velocity (``objdyn.metrics.probe``)

Every clip is cut into windows of 8 frames, what is left over is not measured; a window is encoded whole, and again
without its future where the family is not causal. All checkpoints see the same windows in one pass. A number is a mean
over the windows of a clip, then over clips; intervals are a bootstrap over clips. ARI and F-ARI are per frame, with 1
for the F-ARI of a frame without objects (PROVIDE's convention). ``protocol.json`` has fractions throughout; printed,
F-ARI is in percent as in the paper.

A family needs no more than the verbs of the interface for all this; it is probed if its latents have ``dynamics`` and
``static``. ``probe.json`` then holds the map of the first checkpoint in plain numbers, for the ``dynamics`` column of
its tables: ``velocity = weight @ dynamics + bias``.

Source: "Object Dynamics Distillation for Scene Decomposition and Representation" (ODDN, ICLR 2022), sections 4.2, 4.3,
table 3. Ours: the windows (the paper's 2 -> 6 frames say nothing on where in a video they are), ARI per frame, and the
probe, which the paper does not have.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from objdyn import figures
from objdyn.clips import Clip, collate, stack_truth, to_frames, to_model_input
from objdyn.families import Family, describe
from objdyn.metrics import segmentation
from objdyn.metrics.image import frame_mse
from objdyn.metrics.probe import DROPPED, HELD_OUT, LEAST_IOU, Probe, fit_probe, hold_out, pair_objects
from pipeline import claim, segments, status, store
from pipeline.checkpoint import Loaded, code_revision, config_to_json, load_weights
from pipeline.cli import command
from pipeline.config import EvaluateRun, torch_device
from pipeline.evaluate import batches, confidence_interval, open_model, pad_objects
from pipeline.protocol import HEADS, LIMIT, NO_TRUTH, Row, Table, render, to_json, trained_by, unfinished
from pipeline.reader import Source, iter_clips, open_source
from pipeline.report import Section, plot, provenance, render_page, still, training_facts, versions

SCHEMA = 1
CONTEXT, HORIZON = 2, 6
"""Frames seen, and frames predicted after them."""
LENGTH = CONTEXT + HORIZON
HOLD_OUT_SEED = 0
FORMATS = {"mse": ".6f", "ari": ".3f", "fg_ari": ".2%", "r2_y": ".3f", "r2_x": ".3f", "r2": ".3f"}
PAPER_TABLE_3 = {
    "IODINE": (0.000100, 0.096, 0.9555),
    "PROVIDE": (0.000148, 0.228, 0.9517),
    "ODDN": (0.000075, 0.156, 0.9563),
    "ODDN-l": (0.000103, 0.233, 0.9536),
}
"""MSE, ARI and F-ARI of CLEVRER's frames."""
FEATURES = ("dynamics", "static", "both", "change of static")
"""What is probed: the two vectors of a slot, both, and by how much the static one differs from that of the slot that
showed the object a frame earlier. All on the same pairs."""
TARGETS = ("velocity_y", "velocity_x")
UNIT = "change of position per sampled step, (y, x) in [-1, 1], y down"
FEW = 10
"""Keys named in the results, of clips that could not be used."""


class Model(NamedTuple):
    """A checkpoint that is measured."""

    name: str
    loaded: Loaded
    family: Family
    changed: Mapping[str, Any]
    """Settings changed at test time."""

    @property
    def predicts(self) -> bool:
        """Whether the family has a rollout."""
        return "rollout" in self.family.verbs


class Vectors(NamedTuple):
    """What a probe is fitted to: p pairs of a slot and an object."""

    clip: np.ndarray
    """Number of the clip, (p,)."""
    features: Mapping[str, np.ndarray]
    """By ``FEATURES``, (p, d)."""
    velocity: np.ndarray
    """(p, 2)."""
    dropped: Mapping[str, int]


class Drawn(NamedTuple):
    """A window for the figures; pictures are uint8 (8, h, w, c)."""

    key: str
    start: int
    """Its first frame in the clip."""
    rows: Mapping[str, np.ndarray]


class Found(NamedTuple):
    """Scores of one pass."""

    clips: list[str]
    """Keys, in the order of evaluation."""
    videos: list[str]
    """Which video each clip is of."""
    window_clip: np.ndarray
    """Number of the clip of each window."""
    scores: Mapping[str, segments.Scores]
    """By model, (windows, frames); and ``""`` for the baselines that need no model."""
    vectors: Mapping[str, Vectors]
    """By model; only of those that can be probed and had a clip with truth."""
    unusable: list[str]
    """Why clips were left out of the probe, with their keys."""
    probed_clips: np.ndarray
    """Numbers of the clips whose truth a probe can use."""
    empty_frames: int
    """Frames with a true segmentation that shows no object."""
    drawn: list[Drawn]


@store.job_into_folder
def object_dynamics_protocol(run: EvaluateRun) -> str:
    """Measure ``run.checkpoint`` and those of ``run.compare``, publish the results in ``run.out``, return the tables.

    Writes ``protocol.json``, ``report.html``, ``prediction_mse.svg``, ``prediction.png`` and, where the checkpoint can
    be probed, ``probe.json``.

    Raises:
        ValueError: checkpoints, data and settings do not fit together; the message says what to do.
    """
    out = store.resolve(run.out, "--out")
    with claim.hold(out, "evaluate", kind="evaluation") as held:
        return _protocol(run, out, held)


def _protocol(run: EvaluateRun, out: str, held: claim.Claim) -> str:
    device = torch_device(run.device)
    models = _open_models(run, device)
    first = models[0]
    data = store.resolve(run.data or trained_by(first.loaded).data, "--data")
    source = open_source(data, run.split)
    _check(models, source, data)
    found = measure(models, source, run, device)
    probes = {model.name: _probes(model, found) for model in models}
    tables = {
        "table3": _decomposition(models, found, data, source),
        "prediction": _prediction(models, found),
        "probe": _probe_table(models, found, probes),
    }
    verdicts = _verdicts(first.name, tables["prediction"], probes[first.name])
    text = "\n\n".join([*(render(table) for table in tables.values()), "\n".join(verdicts)]).rstrip()
    metrics: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "protocol",
        "protocol": run.protocol,
        "model": first.loaded.model_id,
        "family": first.loaded.family,
        "step": first.loaded.step,
        "data": data,
        "dataset": source.id,
        "split": run.split,
        "clips": len(found.clips),
        "windows": len(found.window_clip),
        "frames_without_objects": found.empty_frames,
        "context": CONTEXT,
        "horizon": HORIZON,
        "models": {model.name: _about(model) for model in models},
        "seeds": {"hold_out": HOLD_OUT_SEED, "intervals": 0},
        "command": command("jobs/evaluate.py", run),
        "model_settings_changed": dict(first.changed),
        "code": code_revision(),
        "versions": versions(),
        "device": str(device),
        "tables": {name: to_json(table) for name, table in tables.items()},
        "probes": {model.name: _probes_json(model, found, probes[model.name]) for model in models},
        "unusable_for_probes": found.unusable[:FEW],
        "unusable_for_probes_count": len(found.unusable),
        "verdicts": verdicts,
        "text": text,
    }
    fitted = probes[first.name]
    held.check()
    if isinstance(fitted, Mapping):
        store.publish_json(store.join(out, "probe.json"), _map_json(first, source, fitted))
    else:
        store.remove(store.join(out, "probe.json"))  # of an earlier evaluation
    _publish_figures(out, models, found, tables, verdicts, metrics)
    store.publish_json(store.join(out, "protocol.json"), metrics)
    return text


def measure(models: Sequence[Model], source: Source, run: EvaluateRun, device: torch.device) -> Found:
    """Score every window with every model in one pass over the clips.

    Raises:
        ValueError: there is no clip.
    """
    total = min(run.limit or LIMIT, sum(source.shard_sizes))
    inputs = {name: needed for model in models for name, needed in model.family.inputs.items()}
    truth = ("segmentation", "positions", "present", *inputs)
    numbers: dict[str, int] = {}
    videos, window_clip, drawn, probed = list[str](), list[int](), list[Drawn](), set[int]()
    unusable: dict[str, str] = {}
    parts: dict[str, list[tuple[int, segments.Scores]]] = {name: [] for name in ("", *(m.name for m in models))}
    vectors: dict[str, list[Vectors]] = {model.name: [] for model in models}
    empty = 0
    with status.Status("protocol", total, "clips", split=source.split) as progress:
        for clips in batches(windows(iter_clips(source, total, truth=truth)), run.batch_size):
            for clip in clips:
                if clip.key not in numbers:
                    numbers[clip.key] = len(numbers)
                    videos.append(clip.source)
                window_clip.append(numbers[clip.key])
                if reason := unusable_for_probe(clip):
                    unusable.setdefault(clip.key, f"{clip.key}: {reason}")
                if "segmentation" in clip.truth:
                    empty += int((~segmentation.has_foreground(clip.truth["segmentation"][None], per="frame")).sum())
            usable = [i for i, clip in enumerate(clips) if not unusable_for_probe(clip)]
            probed |= {numbers[clips[i].key] for i in usable}
            video = to_model_input(collate(clips), device)
            last = video[:, CONTEXT - 1 : CONTEXT].expand(-1, HORIZON, -1, -1, -1)
            parts[""].append((len(clips), {"copy_last_mse": _mse(last, video[:, CONTEXT:])}))
            pictures: dict[str, np.ndarray] = {}
            for model in models:
                with torch.no_grad():
                    latents = model.loaded.model.encode(video, **stack_truth(clips, model.family.inputs, device))
                    made = segments.render(model.loaded.model, latents, masks=True)
                    ahead = _future(model, clips, video, latents)
                assert made.segments is not None
                scores = {"mse": _mse(made.video, video)} | {
                    f"{name}_mse": _mse(frames, video[:, CONTEXT:]) for name, frames in ahead.items()
                }
                if segments.has_truth(clips):
                    of_masks = segments.recon_scores(clips, made.segments, segments.frame_scores)
                    scores |= {name: of_masks[name] for name in ("ari", "fg_ari")}
                    if model is models[0]:
                        parts[""][-1][1].update({name: of_masks[name] for name in of_masks if name not in scores})
                parts[model.name].append((len(clips), scores))
                if usable and can_be_probed(latents):
                    vectors[model.name].append(pair_vectors(clips, usable, numbers, latents, made))
                if len(drawn) < run.report_clips:
                    pictures[f"{model.name} reconstruction"] = to_frames(torch.nan_to_num(made.video))
                    pictures[f"{model.name} masks"] = _tinted(made)
                    if "predicted" in ahead:
                        future = torch.cat([torch.ones_like(video[:, :CONTEXT]), ahead["predicted"]], dim=1)
                        pictures[f"{model.name} prediction"] = to_frames(torch.nan_to_num(future))
            for i, clip in enumerate(clips):
                if len(drawn) < run.report_clips and clip.key not in {each.key for each in drawn}:
                    rows = {"truth": figures.upscale(clip.frames, 1)} | {
                        name: rows[i] for name, rows in pictures.items()
                    }
                    drawn.append(Drawn(clip.key, clip.start_frame, rows))
            progress.add(len(numbers) - progress.done, windows=len(clips))
    if not numbers:
        raise ValueError(f"split {source.split!r} of {source.id} has no clips; there is nothing to evaluate")
    return Found(
        clips=list(numbers),
        videos=videos,
        window_clip=np.array(window_clip),
        scores={name: segments.join(scores) for name, scores in parts.items()},
        vectors={name: _join(found) for name, found in vectors.items() if found},
        unusable=list(unusable.values()),
        probed_clips=np.array(sorted(probed), dtype=int),
        empty_frames=empty,
        drawn=drawn,
    )


def windows(clips: Iterator[Clip]) -> Iterator[Clip]:
    """Cut each clip into as many windows of 8 frames as it holds, from its first frame on."""
    for clip in clips:
        for start in range(0, len(clip.frames) - LENGTH + 1, LENGTH):
            yield clip.window(start, LENGTH)


def can_be_probed(latents: Any) -> bool:
    """Whether latents have the two vectors that ``FEATURES`` are made of."""
    return hasattr(latents, "dynamics") and hasattr(latents, "static")


def unusable_for_probe(clip: Clip) -> str:
    """Why no object of a clip can be paired with a slot; empty where it can."""
    missing = [name for name in ("segmentation", "positions") if name not in clip.truth]
    if missing:
        return f"it has no true {' and '.join(missing)}"
    most, objects = int(clip.truth["segmentation"].max()), clip.truth["positions"].shape[1]
    if most > objects:
        return f"its segmentation has the id {most}, its positions are of {objects} objects"
    return ""


def pair_vectors(
    clips: Sequence[Clip], usable: Sequence[int], numbers: Mapping[str, int], latents: Any, made: segments.Rendered
) -> Vectors:
    """The vectors of slots that show a true object, with the object's velocity.

    Args:
        clips: of the batch.
        usable: which of them have truth that ``unusable_for_probe`` accepts.
        numbers: of clips, by key.
        latents: of the batch, with ``static`` and ``dynamics`` (b, t, k, ...).
        made: the latents rendered with masks.
    """
    assert made.segments is not None
    chosen = [clips[i] for i in usable]
    most = max(clip.truth["positions"].shape[1] for clip in chosen)
    present = [clip.truth.get("present", np.ones(clip.truth["positions"].shape[:2], dtype=bool)) for clip in chosen]
    slots = latents.dynamics.shape[2]
    pairs = pair_objects(
        np.stack([clip.truth["segmentation"] for clip in chosen]),
        made.segments[usable] - (made.components - slots),  # an explicit background comes before the slots
        slots,
        np.stack([pad_objects(clip.truth["positions"], most) for clip in chosen]),
        np.stack([pad_objects(each, most) for each in present]),
    )
    here, before = (pairs.clip, pairs.frame, pairs.slot), (pairs.clip, pairs.frame - 1, pairs.slot_before)
    dynamics, static = (getattr(latents, name)[usable].double().cpu().numpy() for name in ("dynamics", "static"))
    features = {
        "dynamics": dynamics[here],
        "static": static[here],
        "both": np.concatenate([dynamics[here], static[here]], axis=1),
        "change of static": static[here] - static[before],
    }
    of_clip = np.array([numbers[clip.key] for clip in chosen])
    return Vectors(of_clip[pairs.clip], features, pairs.velocity, pairs.dropped)


def fit_probes(vectors: Vectors, videos: Sequence[str], probed_clips: np.ndarray) -> dict[str, Probe]:
    """A probe from each of ``FEATURES``, held-out clips being the same for all checkpoints of an evaluation.

    Raises:
        ValueError: there are too few clips or pairs, or vectors that are not finite.
    """
    of_video = np.unique(np.array(videos), return_inverse=True)[1].ravel()
    chosen = set(probed_clips[hold_out(of_video[probed_clips], share=HELD_OUT, seed=HOLD_OUT_SEED)].tolist())
    held_out = np.isin(vectors.clip, list(chosen))
    groups = of_video[vectors.clip]
    return {name: fit_probe(values, vectors.velocity, groups, held_out) for name, values in vectors.features.items()}


def _open_models(run: EvaluateRun, device: torch.device) -> list[Model]:
    models = list[Model]()
    for name, path, words in [("", run.checkpoint, run.set), *((n, p, ()) for n, p in run.compared().items())]:
        flag = "--compare" if name else "--checkpoint"
        # The folder of one step: a run that goes on has another last checkpoint by the next pass.
        checkpoint = load_weights(store.resolve(path, flag), which=run.which).path
        loaded, changed = open_model(dataclasses.replace(run, set=words), checkpoint, device)
        models.append(Model(name or loaded.family, loaded, describe(loaded.config), changed))
    names = [model.name for model in models]
    if names.count(names[0]) > 1:
        raise ValueError(f"compare has the name {names[0]!r}, which is that of --checkpoint; choose another")
    return models


def _check(models: Sequence[Model], source: Source, data: str) -> None:
    if source.num_frames < LENGTH:
        raise ValueError(
            f"the clips of split {source.split!r} of {data} hold {source.num_frames} frames, the protocol needs "
            f"{LENGTH}: {CONTEXT} seen and {HORIZON} predicted; make the dataset with make_shards.py --frames {LENGTH}"
        )
    for model in models:
        size = getattr(model.loaded.config, "image_size", None)
        if size is not None and (source.height, source.width) != (size, size):
            raise ValueError(
                f"{model.name} was built for frames of {size}x{size}, those of {data} are "
                f"{source.height}x{source.width}; all checkpoints of one evaluation need the same size"
            )


def _future(model: Model, clips: Sequence[Clip], video: Tensor, latents: Any) -> dict[str, Tensor]:
    """The frames after the seen ones: ``predicted``, where the family predicts, and with the last latents ``held``."""
    device, made = video.device, model.loaded.model
    if model.family.causal:
        seen = segments.cut(latents, 0, CONTEXT)
    else:
        seen = made.encode(video[:, :CONTEXT], **stack_truth(clips, model.family.inputs, device))
    held = made.decode(segments.cut(seen, CONTEXT - 1, CONTEXT)).video.expand(-1, HORIZON, -1, -1, -1)
    if not model.predicts:
        return {"held": held}
    return {"predicted": made.decode(made.rollout(seen, HORIZON)).video, "held": held}


def _mse(video: Tensor, target: Tensor) -> np.ndarray:
    return frame_mse(video, target).double().cpu().numpy()


def _tinted(made: segments.Rendered) -> np.ndarray:
    """Reconstructions with their segments as colours, (b, t, h, w, c)."""
    assert made.segments is not None
    frames = to_frames(torch.nan_to_num(made.video))
    masks = made.segments[:, :, None] == np.arange(max(made.components, 1))[:, None, None]
    return np.stack([
        figures.mask_overlay(each, mask.astype(np.int8), background=False)
        for each, mask in zip(frames, masks, strict=True)
    ])  # fmt: skip


def _join(parts: Sequence[Vectors]) -> Vectors:
    return Vectors(
        np.concatenate([part.clip for part in parts]),
        {name: np.concatenate([part.features[name] for part in parts]) for name in FEATURES},
        np.concatenate([part.velocity for part in parts]),
        {reason: sum(part.dropped[reason] for part in parts) for reason in DROPPED},
    )


def _per_clip(values: np.ndarray, window_clip: np.ndarray) -> np.ndarray:
    """Means over the windows of each clip, (clips, columns)."""
    counts = np.bincount(window_clip)
    return np.stack([np.bincount(window_clip, column) / counts for column in values.T], axis=1)


def _row(
    name: str, origin: str, found: Mapping[str, np.ndarray | None], columns: Sequence[str], missing: Mapping[str, str]
) -> Row:
    """Means over clips (clips, columns) with intervals; ``missing`` says by metric why there are none."""
    values, intervals, reasons = dict[str, list[float | None]](), dict[str, list[list[float] | None]](), {}
    for metric, scores in found.items():
        values[metric], intervals[metric] = [None] * len(columns), [None] * len(columns)
        for i, column in enumerate(columns):
            if scores is None or not len(scores):
                reasons[f"{metric}/{column}"] = missing[metric]
            elif not np.isfinite(scores[:, i]).all():
                reasons[f"{metric}/{column}"] = "the model gives values that are not finite"
            else:
                values[metric][i] = float(scores[:, i].mean())
                intervals[metric][i] = confidence_interval(scores[:, i])
    return Row(name, origin, values, reasons, intervals)


def _decomposition(models: Sequence[Model], found: Found, data: str, source: Source) -> Table:
    baselines = found.scores[""]
    known = np.zeros(len(found.window_clip), dtype=bool)
    if "one_cluster_ari" in baselines:
        known = np.isfinite(baselines["one_cluster_ari"]).all(axis=1)

    def means(scores: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray | None]:
        """One number per clip, (clips, 1)."""
        columns: dict[str, np.ndarray | None] = {}
        for metric in ("mse", "ari", "fg_ari"):
            values, which = scores.get(f"{prefix}{metric}"), np.ones_like(known) if metric == "mse" else known
            columns[metric] = None
            if values is not None and which.any():
                clips = np.unique(found.window_clip[which], return_inverse=True)[1].ravel()
                columns[metric] = _per_clip(values[which].mean(axis=1, keepdims=True), clips)
        return columns

    missing = {"mse": "it reconstructs nothing", "ari": NO_TRUTH, "fg_ari": NO_TRUTH}
    rows = [
        Row(name, "paper", dict(zip(("mse", "ari", "fg_ari"), [(v,) for v in values], strict=True)))
        for name, values in PAPER_TABLE_3.items()
    ]
    rows += [_row(model.name, "ours", means(found.scores[model.name]), ("",), missing) for model in models]
    for name, prefix in (("one cluster", "one_cluster_"), ("threshold + components", "threshold_")):
        rows.append(_row(name, "baseline", means(baselines, prefix), ("",), missing))
    clips = len(np.unique(found.window_clip[known]))
    notes = [
        f"Data: {data}, split {source.split}, {len(found.clips)} clips in {len(found.window_clip)} windows of {LENGTH} "
        "frames. The paper's numbers are of CLEVRER at 64x64.",
        "F-ARI is in percent, as the paper prints it; ARI is not. Both are per frame. A frame with a single object has "
        "an F-ARI of 100% if one slot has all of its pixels, as one cluster always has, and of 0% otherwise.",
    ]
    if 0 < clips < len(found.clips):
        notes.append(f"ARI and F-ARI are means over the {clips} of {len(found.clips)} clips with a true segmentation.")
    if found.empty_frames:
        notes.append(f"{found.empty_frames} frames show no object; their F-ARI counts as 100%.")
    for model in models:
        notes += [f"{model.name}: {note}" for note in unfinished(model.loaded)]
    title = "Table 3. Decomposition"
    return Table(title, ("",), tuple(rows), tuple(notes), ("mse", "ari", "fg_ari"), FORMATS)


def _prediction(models: Sequence[Model], found: Found) -> Table:
    columns = (*map(str, range(1, HORIZON + 1)), "mean")

    def steps(scores: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray | None]:
        if name not in scores:
            return {"mse": None}
        values = _per_clip(scores[name], found.window_clip)
        return {"mse": np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)}

    rows = []
    for model in models:
        missing = {"mse": f"family {model.loaded.family} does not predict: it has no rollout"}
        scores = found.scores[model.name]
        rows.append(_row(model.name, "ours", steps(scores, "predicted_mse"), columns, missing))
        rows.append(_row(f"{model.name}, last latents decoded", "ours", steps(scores, "held_mse"), columns, missing))
    rows.append(_row("copied last frame", "baseline", steps(found.scores[""], "copy_last_mse"), columns, {}))
    notes = (
        "MSE at each predicted frame, in [0, 1], a mean over pixels and channels; 'last latents decoded' is the second "
        "frame's reconstruction, held.",
    )
    title = f"Prediction of {HORIZON} frames after {CONTEXT} (figure 7; no numbers are published), at predicted frame"
    return Table(title, columns, tuple(rows), notes, ("mse",), FORMATS)


def _probes(model: Model, found: Found) -> dict[str, Probe] | str:
    """The probes of a model, or why it has none."""
    if model.name in found.vectors:
        try:
            return fit_probes(found.vectors[model.name], found.videos, found.probed_clips)
        except ValueError as error:
            return str(error)
    if not len(found.probed_clips):
        return f"no clip has the truth that a probe needs: {found.unusable[0]}"
    return f"the latents of family {model.loaded.family} have no dynamics"


def _probe_table(models: Sequence[Model], found: Found, probes: Mapping[str, dict[str, Probe] | str]) -> Table:
    rows, notes = list[Row](), list[str]()
    for model in models:
        fitted = probes[model.name]
        if isinstance(fitted, str):
            rows.append(Row(model.name, "ours", {}, {"*": fitted}))
            if model.name in found.vectors:
                vectors = found.vectors[model.name]
                notes.append(f"{model.name}: {len(vectors.clip)} pairs; left out: {_left_out(vectors)}.")
            continue
        for name, probe in fitted.items():
            values = {"r2_y": [_finite(probe.r2[0])], "r2_x": [_finite(probe.r2[1])], "r2": [_finite(probe.r2_overall)]}
            rows.append(Row(f"{model.name}, from {name}", "ours", values, {"*": "no held-out object moves along it"}))
        any_of = fitted["dynamics"]
        notes.append(
            f"{model.name}: fitted on {any_of.train_pairs} pairs of {any_of.train_clips} videos, measured on "
            f"{any_of.test_pairs} of {any_of.test_clips}; left out: {_left_out(found.vectors[model.name])}."
        )
    if found.unusable:
        notes.append(f"Clips that could not be probed, at least in part: {len(found.unusable)}. {found.unusable[0]}.")
    notes.append(
        "Of held-out clips: 1 is all of the variance of the velocity in the image plane, 0 is no better than its mean. "
        f"Slots are matched to objects by mask IoU, at least {LEAST_IOU:g} in this frame and the one before; the "
        "background's are left out."
    )
    title = "Probe. R^2 of a linear map to the object's velocity per sampled step"
    return Table(title, ("",), tuple(rows), tuple(notes), ("r2_y", "r2_x", "r2"), FORMATS)


def _left_out(vectors: Vectors) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in vectors.dropped.items() if count) or "none"


def _verdicts(name: str, prediction: Table, probes: dict[str, Probe] | str) -> list[str]:
    """Whether the first checkpoint predicts better than each other row, and reads velocity better than from static."""
    rows = {row.name: row.values["mse"][:HORIZON] for row in prediction.rows}
    own, said = rows.pop(name), list[str]()
    for other, values in rows.items():
        pairs = [(a, b) for a, b in zip(own, values, strict=True) if a is not None and b is not None]
        below = [i for i, (a, b) in enumerate(pairs, start=1) if a < b]
        if pairs:
            at = f": {', '.join(map(str, below))}" if 0 < len(below) < len(pairs) else ""
            count = f"{len(below)} of {len(pairs)}" if below else f"none of {len(pairs)}"
            said.append(f"{name} has less prediction error than {other} at {count} steps{at}.")
    if isinstance(probes, Mapping):
        gap = probes["dynamics"].r2_overall - probes["static"].r2_overall
        words = "above" if gap >= 0 else "below"
        said.append(f"{name}: R^2 of velocity from dynamics is {abs(gap):.3f} {words} that from static.")
    else:
        said.append(f"probe.json, the map from dynamics to velocity, is not written: {probes}.")
    return said


def _about(model: Model) -> dict[str, Any]:
    loaded = model.loaded
    return {
        "model": loaded.model_id,
        "family": loaded.family,
        "step": loaded.step,
        "config": config_to_json(loaded.config),
        "model_settings_changed": dict(model.changed),
        "training": training_facts(loaded.family, loaded.run, loaded.code, loaded.dataset_id),
    }


def _probes_json(model: Model, found: Found, probes: dict[str, Probe] | str) -> dict[str, Any]:
    if model.name not in found.vectors:
        return {"reason": probes}
    vectors = found.vectors[model.name]
    told: dict[str, Any] = {
        "unit": UNIT,
        "least_iou": LEAST_IOU,
        "pairs": len(vectors.clip),
        "dropped": dict(vectors.dropped),
    }
    if isinstance(probes, str):
        return told | {"reason": probes}
    speed = float(np.sqrt(np.square(vectors.velocity).sum(axis=1).mean()))
    return told | {
        "root_mean_square_speed": speed,
        "from": {name: _numbers(probe) for name, probe in probes.items()},
    }


def _numbers(probe: Probe) -> dict[str, Any]:
    r2 = {name: _finite(value) for name, value in zip(TARGETS, probe.r2, strict=True)}
    return {
        "r2": r2 | {"overall": _finite(probe.r2_overall)},
        "weight": probe.weight.tolist(),
        "bias": probe.bias.tolist(),
        "alpha": probe.alpha,
        "pairs": {"fitted": probe.train_pairs, "held_out": probe.test_pairs},
        "videos": {"fitted": probe.train_clips, "held_out": probe.test_clips},
    }


def _map_json(model: Model, source: Source, probes: Mapping[str, Probe]) -> dict[str, Any]:
    """``probe.json``: the map from the ``dynamics`` column of a table to velocity."""
    return {
        "schema": SCHEMA,
        "kind": "probe",
        "model": model.loaded.model_id,
        "dataset": source.id,
        "column": "dynamics",
        "targets": list(TARGETS),
        "unit": UNIT,
        **_numbers(probes["dynamics"]),
    }


def _publish_figures(
    out: str,
    models: Sequence[Model],
    found: Found,
    tables: Mapping[str, Table],
    verdicts: Sequence[str],
    metrics: Mapping[str, Any],
) -> None:
    curves = {row.name: (range(1, HORIZON + 1), row.values["mse"][:HORIZON]) for row in tables["prediction"].rows}
    label = "Prediction error (lower is better)"
    drawing = figures.line_plot(curves, x_label="predicted frame", y_label="MSE", label=label, log_y=True)
    standalone = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    if standalone != drawing:  # there are curves
        store.publish(store.join(out, "prediction_mse.svg"), standalone.encode())
    strips = [_strip(drawn) for drawn in found.drawn]
    if strips:
        store.publish(store.join(out, "prediction.png"), figures.png(_below(strips)))
    lines = "".join(f"<li>{escape(line)}</li>" for line in verdicts)
    sections = [Section(table.title.split(".")[0].split(" (")[0], _html(table)) for table in tables.values()]
    sections[1] = sections[1]._replace(
        html=f'<ul class="verdicts">{lines}</ul><div class="plots">{plot(label, drawing)}</div>{sections[1].html}'
    )
    shown = "".join(
        f'<h3>{escape(drawn.key)}, from frame {drawn.start}</h3><div class="wide">{still(picture, drawn.key)}</div>'
        for drawn, picture in zip(found.drawn, strips, strict=True)
    )
    if shown:
        sections.append(Section("Clips", shown))
    first = models[0]
    training = metrics["models"][first.name]["training"]
    sections.append(Section("To reproduce this", provenance(metrics, first.loaded.run, training)))
    subtitle = f"{', '.join(model.name for model in models)} on {metrics['clips']:,} clips of {metrics['data']}"
    page = render_page("Object dynamics", subtitle, sections)
    store.publish(store.join(out, "report.html"), page.encode())


def _strip(drawn: Drawn) -> np.ndarray:
    factor = max(1, round(96 / drawn.rows["truth"].shape[1]))
    return figures.strip(drawn.rows, [str(t) for t in range(LENGTH)], first_predicted=CONTEXT, factor=factor)


def _below(pictures: Sequence[np.ndarray], gap: int = 12) -> np.ndarray:
    """Pictures one below the other, on white."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(each, ((0, gap), (0, width - each.shape[1]), (0, 0)), constant_values=255) for each in pictures]
    return np.concatenate(padded)


def _html(table: Table) -> str:
    """A table with its reasons and notes."""
    heads = [f"{HEADS[metric]} {column}".strip() for metric in table.metrics for column in table.columns]
    reasons: dict[str, int] = {}
    body = ""
    for row in table.rows:
        cells = ""
        for metric in table.metrics:
            for i, column in enumerate(table.columns):
                value = row.values[metric][i] if metric in row.values else None
                interval = row.interval95[metric][i] if metric in row.interval95 else None
                if value is None:
                    reason = row.reasons.get(f"{metric}/{column}", row.reasons.get("*", ""))
                    mark = f"<sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>" if reason else ""
                    cells += f'<td class="none" title="{escape(reason)}">&ndash;{mark}</td>'
                    continue
                ends = " … ".join(format(end, table.formats[metric]) for end in interval or ())
                small = f"<small>{ends}</small>" if interval else ""
                cells += f"<td>{format(value, table.formats[metric])}{small}</td>"
        origin = "" if row.origin == "baseline" else f" ({row.origin})"
        body += f'<tr><th scope="row">{escape(row.name + origin)}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *heads))
    below = [*(f"{number}: {reason}" for reason, number in reasons.items()), *table.notes]
    said = "".join(f'<p class="small">{escape(line)}</p>' for line in below)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{said}'


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
