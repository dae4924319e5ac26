"""One HTML file that shows what a model does: numbers beside baselines, clips, curves, and what reproduces it.

A page is a list of sections, and a section is a heading with HTML: a further section is one more function. Everything
is inline (pictures as data URLs, plots as SVG); the page has no scripts, and its content policy forbids any. Every
value passes ``html.escape``.
"""

import base64
import dataclasses
import importlib.metadata
import itertools
import math
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from objdyn import figures
from pipeline import store
from pipeline.checkpoint import config_from_json
from pipeline.cli import command
from pipeline.config import TrainRun, flatten_settings
from pipeline.loop import CLOCK_FIELDS, STAGE_ENDS, read_metrics
from pipeline.presets import PRESETS
from pipeline.status import as_bytes

PNG_BYTES = 300_000
"""A still larger than this as PNG (camera footage) goes into the page as WebP."""
PLOT_POINTS = 400
"""Points of a training curve; longer ones are averaged over equal intervals."""
PLOTS_SHOWN = 4
SKIPPED_SHOWN = 10
STRIP_CONTEXT, STRIP_PREDICTED = 3, 8

METRICS = (
    # group, key, label, unit, higher is better, format
    ("Reconstruction", "recon_psnr", "PSNR", "dB", True, ".2f"),
    ("Reconstruction", "recon_ssim", "SSIM", "", True, ".3f"),
    ("Reconstruction", "recon_mse", "MSE", "", False, "#.3g"),
    ("Reconstruction", "recon_lpips", "LPIPS", "", False, ".3f"),
    ("Reconstruction", "recon_lpips_alex", "LPIPS by AlexNet", "", False, ".3f"),
    ("Prediction", "predict_psnr", "PSNR", "dB", True, ".2f"),
    ("Prediction", "predict_ssim", "SSIM", "", True, ".3f"),
    ("Prediction", "predict_mse", "MSE", "", False, "#.3g"),
    ("Prediction", "predict_lpips", "LPIPS", "", False, ".3f"),
    ("Prediction", "predict_lpips_alex", "LPIPS by AlexNet", "", False, ".3f"),
    ("Positions", "med10", "MED10", "", False, ".3f"),
    ("Positions", "med10_corrected", "MED10, half pixel corrected", "", False, ".3f"),
    ("Positions", "coverage_3px", "objects within 3 px of a particle", "%", True, ".1f"),
    ("Positions", "coverage_2px", "objects within 2 px of a particle", "%", True, ".1f"),
    ("Segmentation", "ari", "ARI per frame", "", True, ".3f"),
    ("Segmentation", "fg_ari", "foreground ARI per frame", "", True, ".3f"),
    ("Segmentation", "video_ari", "ARI over the whole clip", "", True, ".3f"),
    ("Segmentation", "video_fg_ari", "foreground ARI over the whole clip", "", True, ".3f"),
    ("Segmentation", "matched_iou", "IoU of objects and matched segments", "", True, ".3f"),
    ("Segmentation", "mean_iou", "IoU of the best segment, with background", "", True, ".3f"),
    ("Segmentation", "swap_rate", "objects that change their slot", "%", False, ".1f"),
    ("Segmentation of the prediction", "predict_ari", "ARI per frame", "", True, ".3f"),
    ("Segmentation of the prediction", "predict_fg_ari", "foreground ARI per frame", "", True, ".3f"),
)
SEGMENTATION = ("Segmentation", "Segmentation of the prediction")
BASELINES = {
    "copy_last": "copy last frame",
    "constant_background": "constant background",
    "constant_velocity": "constant velocity",
    "constant_velocity_walls": "constant velocity, walls",
    "one_cluster": "one cluster",
    "threshold": "threshold, connected components",
}
CURVE_STYLES = {name: i for i, name in enumerate(("model", *BASELINES.values()))}
STEP_PLOTS = (
    ("predict_psnr", "PSNR (higher is better)", "dB"),
    ("predict_ssim", "SSIM (higher is better)", ""),
    ("predict_mse", "MSE (lower is better)", ""),
    ("predict_lpips", "LPIPS (lower is better)", ""),
    ("predict_lpips_alex", "LPIPS by AlexNet (lower is better)", ""),
    ("position_error", "Position error (lower is better)", "share of the frame's side"),
    ("predict_error_px", "Position error up to one affine map (lower is better)", "pixels"),
    ("predict_nll_frame", "Negative log-likelihood (lower is better)", "nats per frame"),
    ("predict_fg_ari", "Foreground ARI (higher is better)", ""),
    ("predict_ari", "ARI (higher is better)", ""),
)
STEP_TABLE = (
    ("predict_psnr", "PSNR", "dB", True, ".2f"),
    ("predict_mse", "MSE", "", False, "#.3g"),
    ("predict_lpips", "LPIPS", "", False, ".3f"),
    ("position_error", "Position error", "share of the frame's side", False, ".3f"),
    ("predict_error_px", "Position error up to one affine map", "pixels", False, ".2f"),
    ("predict_fg_ari", "Foreground ARI", "", True, ".3f"),
)
STEP_VERDICTS = (
    ("predict_psnr", "PSNR", True),
    ("predict_lpips", "LPIPS", False),
    ("position_error", "Position error", False),
    ("predict_error_px", "Position error up to one affine map", False),
)
RANKED_BY = {
    "predict_psnr": "the PSNR of the prediction",
    "predict_lpips": "the LPIPS of the prediction",
    "predict_lpips_alex": "the LPIPS by AlexNet of the prediction",
    "recon_psnr": "the PSNR of the reconstruction",
    "recon_lpips": "the LPIPS of the reconstruction",
    "recon_lpips_alex": "the LPIPS by AlexNet of the reconstruction",
}
GALLERY_RANKS = ("best", "median", "worst", "")
GALLERY_SIDE = 112
"""Pixels of a small picture's side, about."""
FULL_ERROR = 0.5
"""Mean error of a pixel, as a share of the range of values, that is drawn black."""
LOOKS = {
    "brightness": "mean value of a clip's pixels, 0 black to 1 white",
    "contrast": "standard deviation inside a frame",
    "motion": "mean absolute change from frame to frame",
}
CURVE_LABELS = {"train": "training", "eval": "held out"}
FACTS = ("family", "step", "model", "dataset", "split", "clips", "context", "horizon", "device")
PACKAGES = ("objdyn", "torch", "numpy")
FIRST_CURVES = ("loss", "recon_psnr", "predict_psnr", "recon")


class Particles(NamedTuple):
    """Where the objects of a clip are, for drawing."""

    position: np.ndarray
    """(t, k, 2)."""
    transparency: np.ndarray | None
    """(t, k)."""
    scale: np.ndarray | None
    """(t, k, 2), as a share of the frame."""

    def frames(self, chosen: slice | list[int]) -> "Particles":
        """The particles of some frames."""
        position, transparency, scale = self
        return Particles(
            position[chosen],
            None if transparency is None else transparency[chosen],
            None if scale is None else scale[chosen],
        )

    def then(self, later: "Particles") -> "Particles":
        """These frames followed by those of ``later``, from the same model."""
        return Particles(
            np.concatenate([self.position, later.position]),
            _concatenate(self.transparency, later.transparency),
            _concatenate(self.scale, later.scale),
        )


class Parts(NamedTuple):
    """The components of one frame."""

    frame: int
    masks: np.ndarray
    """(k, h, w)."""
    components: np.ndarray
    """uint8 (k, h, w, c)."""


class LatentWalk(NamedTuple):
    """A frame with one dimension of a slot at other values."""

    frames: np.ndarray
    """uint8 (d, v, h, w, c)."""
    values: tuple[float, ...]
    names: tuple[str, ...]
    """Of the d dimensions."""
    slot: int
    frame: int


class ClipTracks(NamedTuple):
    """Tracks of the objects of one clip, by what they are: ``true``, ``inferred``, ``predicted``, ``interpolated``."""

    in_frame: Mapping[str, np.ndarray]
    """(t, n, 2) in [-1, 1]."""
    latent: Mapping[str, np.ndarray]
    """The same before the map to the frame, in units of the model."""
    interpolated: np.ndarray | None = None
    """uint8 (gap, h, w, c): the frames after the context that were interpolated."""


class ReportClip(NamedTuple):
    """One clip to draw."""

    key: str
    frames: np.ndarray
    """uint8 (t, h, w, c), the true ones."""
    reconstruction: np.ndarray
    """uint8 (t, h, w, c)."""
    fps: float
    context: int = 0
    """Frames seen before ``prediction``."""
    prediction: np.ndarray | None = None
    """uint8 (horizon, h, w, c)."""
    particles: Particles | None = None
    """Of every frame."""
    predicted_particles: Particles | None = None
    """Of the predicted frames."""
    positions: np.ndarray | None = None
    """True positions (t, n, 2)."""
    present: np.ndarray | None = None
    """Bool (t, n)."""
    segments: np.ndarray | None = None
    """Component of each pixel of the reconstruction, int (t, h, w); -1 is none."""
    predicted_segments: np.ndarray | None = None
    """The same of ``prediction``."""
    parts: tuple[Parts, ...] = ()
    """Components of a few frames."""
    has_background: bool = True
    """Whether component 0 is the background and not an object."""
    walk: LatentWalk | None = None
    tracks: ClipTracks | None = None
    scores: Mapping[str, float | None] = {}
    """Decibels of PSNR by what was measured; shown beside the clip."""
    predicted_scores: Mapping[str, Sequence[float]] = {}
    """Of each frame of ``prediction``, by the metric's name: PSNR in dB, SSIM, LPIPS."""
    rank: str = ""
    """``worst, 1st of 200`` for example."""
    source: str = ""
    """Where in which video it is from."""


class Section(NamedTuple):
    """A part of the page."""

    heading: str
    html: str


def write_report(
    path: str,
    *,
    title: str,
    metrics: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    clips: Sequence[ReportClip] = (),
    latent_tracks: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Publish a report and return its path; what is not given has no section.

    Args:
        path: the file to write, local or s3://.
        title: of the page.
        metrics: what ``metrics.json`` holds.
        history: the rows of a run's ``metrics.jsonl``.
        clips: to draw, in this order.
        latent_tracks: of objects in many clips, (n, t, k, 2), by what these clips have in common.
        settings: nested settings of the run.
        training: as ``training_facts`` gives it; that of ``metrics`` where not given.
        notes: sentences to show above everything else.
    """
    metrics = metrics or {}
    training = dict(training or metrics.get("training") or {})
    data = metrics.get("data") or {}
    sections = []
    if metrics:
        sections.append(Section("Results", results_table(metrics)))
    if steps := over_steps(metrics):
        sections.append(Section("Over the predicted frames", steps))
    if "by_objects" in metrics:
        from pipeline import trajectory_report  # here: it is built of this module's parts

        shown = trajectory_report.trajectories(metrics, clips, latent_tracks or {})
        sections.append(Section("Trajectories", shown))
        notes = [*metrics.get("warnings", ()), *notes]
    if shown := gallery(clips, metrics):
        sections.append(Section("Gallery", shown))
    if clips:
        sections.append(Section("Clips", clips_shown(clips, metrics)))
    if data:
        sections.append(Section("Data", data_facts(data)))
    if "quarantine" in data:
        sections.append(Section("Quarantine", quarantine(data["quarantine"])))
    if history:
        sections.append(Section("Training", stages(history) + training_curves(history) + troubles(history)))
    if metrics or settings or training:
        sections.append(Section("To reproduce this", provenance(metrics, settings or {}, training)))
    store.publish(path, render_page(title, summary(metrics), sections, notes).encode())
    return path


def write_run_report(run: str) -> str:
    """Publish ``report.html`` of a run folder from its ``config.json``, ``metrics.jsonl``, last checkpoint, if any.

    A ``metrics.json`` of an evaluation into the same folder is shown too.

    Raises:
        ValueError: the folder holds no run, or its ``config.json`` is damaged.
    """
    config = store.join(run, "config.json")
    if not store.exists(config):
        raise ValueError(f"{run} holds no config.json, so it is no run folder; give the --out of a training")
    settings = store.read_json(config)
    history, notes = read_history(run)
    state, metrics = {}, None
    try:
        state = _last_state(run)
        path = store.join(run, "metrics.json")
        metrics = store.read_json(path) if store.exists(path) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"Ids or results are missing: {error}")
    training = training_facts(
        str(settings.get("family")), settings.get("run", {}), state.get("code", {}), state.get("dataset_id")
    )
    return write_report(
        store.join(run, "report.html"),
        title=f"Training run {run.rstrip('/').rsplit('/', 1)[-1]}",
        metrics=metrics,
        history=history,
        settings=settings,
        training={**training, **{name: state[name] for name in ("step", "model") if name in state}},
        notes=notes,
    )


def training_facts(
    family: str, run: Mapping[str, Any], code: Mapping[str, Any], dataset_id: str | None
) -> dict[str, Any]:
    """What reproduces a training: its command line, seed, code and data, for ``metrics.json`` and the report."""
    facts: dict[str, Any] = {"seed": run.get("seed"), "code": dict(code), "dataset": dataset_id}
    try:
        return {**facts, "command": training_command(family, run)}
    except ValueError as error:
        return {**facts, "command": None, "problem": str(error)}


def training_command(family: str, run: Mapping[str, Any]) -> str:
    """Write the command line of a stored run: the preset that needs the fewest flags, and those flags.

    Its folder is left out, since a folder that holds a run is refused.

    Raises:
        ValueError: this version does not know the family or the settings.
    """
    if family not in PRESETS:
        raise ValueError(f"this version has no family {family!r}")
    wanted = dataclasses.replace(config_from_json(TrainRun, run), out="", resume=False, resume_if_exists=False)
    lines = [
        command(f"jobs/train_{family}.py", wanted, preset=name, default=dataclasses.replace(preset, out=""))
        for name, preset in PRESETS[family].items()
    ]
    return min(lines, key=lambda line: len(shlex.split(line)))


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"  # the working tree that Ray unpacked
    return found


def read_history(run: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the rows of a run's ``metrics.jsonl``, or a sentence that says why its curves are missing."""
    try:
        rows = read_metrics(run)
        for row in rows:
            if not isinstance(row["kind"], str) or not math.isfinite(row["step"]):
                raise ValueError(f"step {row['step']!r} of kind {row['kind']!r}")
        return rows, []
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        return [], [f"The training curves are missing: metrics.jsonl of {run} cannot be read ({error})."]


def render_page(title: str, subtitle: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """Put sections into one HTML page."""
    names = [re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-") or "section" for section in sections]
    body = "".join(
        f'<section id="{name}"><h2>{escape(section.heading)}</h2>{section.html}</section>'
        for name, section in zip(names, sections, strict=True)
    )
    links = "".join(
        f'<a href="#{name}">{escape(section.heading)}</a>' for name, section in zip(names, sections, strict=True)
    )
    notices = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f'<nav aria-label="Sections">{links}</nav></header>{notices}{body}</main></body></html>\n'
    )


def summary(metrics: Mapping[str, Any]) -> str:
    """One sentence: what was measured and how far above the trivial baselines it is."""
    if "clips" not in metrics:
        return ""
    text = f"{metrics.get('family', 'model')} on {metrics['clips']:,} clips of split {metrics.get('split', '?')}"
    parts = []
    for key, kind in (("recon_psnr", "reconstruction"), ("predict_psnr", "prediction")):
        gains = []
        for twin, against in (
            ("copy_last", "the copied last frame"),
            ("constant_background", "the constant background"),
        ):
            model, baseline = metrics.get(key), metrics.get(f"{twin}_{key}")
            if model is not None and baseline is not None:
                gain = model - baseline
                gains.append(f"{abs(gain):.1f} dB {'above' if gain >= 0 else 'below'} {against}")
        if gains:
            parts.append(f"{kind} {' and '.join(gains)}")
    return f"{text}: {'; '.join(parts)}." if parts else f"{text}."


def results_table(metrics: Mapping[str, Any]) -> str:
    """The model's metrics beside the same metrics of the trivial baselines, on the same clips."""
    reasons: dict[str, int] = {}
    rows, group, below = [], "", []
    told = [row for row in METRICS if row[1] in metrics]
    if all(metrics[row[1]] is None for row in told if row[0] in SEGMENTATION):
        told = [row for row in told if row[0] not in SEGMENTATION]
        if "ari" in metrics:
            reason = metrics.get("reasons", {}).get("ari", "no reason was recorded")
            below.append(f"Masks were not compared with true objects: {reason}.")
    baselines = {name: label for name, label in BASELINES.items() if any(f"{name}_{row[1]}" in metrics for row in told)}
    for heading, key, label, unit, higher, style in told:
        keys = [key, *(f"{baseline}_{key}" for baseline in baselines)]
        values = [metrics.get(name) for name in keys]
        numbers = [value for value in values if value is not None]
        best = (max if higher else min)(numbers) if len(numbers) > 1 else None
        marks = [value is not None and value == best for value in values]
        cells = [cell(*pair, metrics, unit, style, reasons) for pair in zip(keys, marks, strict=True)]
        if heading != group:
            rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(keys) + 1}">{escape(heading)}</th></tr>')
            group = heading
        better, sign = ("higher", "↑") if higher else ("lower", "↓")
        arrow = f'<span class="arrow" title="{better} is better">{sign}</span>'
        name = f"{escape(label)}{f' ({unit})' if unit else ''}"
        rows.append(f'<tr><th scope="row">{name} {arrow}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("model", *baselines.values()))
    table = (
        f'<table class="results"><thead><tr><th scope="col">metric</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    footnotes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    listed = f'<ol class="reasons">{footnotes}</ol>' if footnotes else ""
    explained = (
        "Frame metrics are means over every frame of every clip; small numbers are 95 % intervals from a bootstrap "
        "over clips. Bold is best. MED10 is the sum of the mean distances between followed and true centres over the "
        "first ten predicted frames, in units of the frame's side."
    )
    lost = metrics.get("med10_lost_share")
    if lost:
        explained += f" In those frames {100 * lost:.1f} % of the objects had no visible particle and are not in MED10."
    if any(row[0] in SEGMENTATION for row in told):
        explained += (
            f" Segmentation was measured on the {metrics.get('segmented_clips', 0):,} clips with true objects. Of "
            "predicted frames, the baselines are the masks of the model, or the components, of the last frame seen."
        )
    if empty := metrics.get("frames_without_objects"):
        explained += f" {empty:,} frames show no object; foreground ARI counts them as 1, as PROVIDE's protocol does."
    notes = {note: None for key, note in metrics.get("notes", {}).items() if metrics.get(key) is not None}
    explained += "".join(f" Over the whole clip: {note}." for note in notes)
    explained += "".join(f" {sentence}" for sentence in below)
    return f'<div class="wide">{table}</div>{listed}<p class="small">{escape(explained)}</p>'


def over_steps(metrics: Mapping[str, Any]) -> str:
    """How the error grows over the predicted frames, beside the baselines: in sentences, as plots, as a table."""
    curves = metrics.get("curves", {})
    sentences, marks = [], {}
    for key, label, higher in STEP_VERDICTS:
        if key in curves and f"copy_last_{key}" in curves:
            words, marks[key] = compare_steps(curves[key], curves[f"copy_last_{key}"], higher)
            sentences.append(f"<li><b>{escape(label)}</b>: {escape(words)}.</li>")
    said = f'<ul class="verdicts">{"".join(sentences)}</ul>' if sentences else ""
    return said + step_plots(curves, marks) + step_table(curves)


def compare_steps(
    model: Sequence[float | None], copied: Sequence[float | None], higher: bool
) -> tuple[str, int | None]:
    """Say where the model is worse than the copied last frame; and the step from which on it stays so, if one is."""
    pairs = enumerate(zip(model, copied, strict=True), start=1)
    known = [(step, a, b) for step, (a, b) in pairs if a is not None and b is not None]
    worse = [step for step, a, b in known if (a < b if higher else a > b)]
    if not known:
        return "not known at any step", None
    if not worse:
        equal = any(a == b for _, a, b in known)
        return f"{'never worse than' if equal else 'better than'} copying the last frame, at every step", None
    if len(worse) == len(known):
        return "worse than copying the last frame at every step", None
    fine = [step for step, _, _ in known if step not in worse]
    if max(fine) < min(worse):
        return f"worse than copying the last frame from step {worse[0]} on", worse[0]
    if max(worse) < min(fine):
        return f"worse than copying the last frame up to step {worse[-1]}, better from step {fine[0]} on", None
    return (
        f"worse than copying the last frame at {len(worse)} of {len(known)} steps, first at step {worse[0]} and last "
        f"at step {worse[-1]}"
    ), None


def step_plots(curves: Mapping[str, Sequence[float | None]], marks: Mapping[str, int | None]) -> str:
    """Each per-frame error over the predicted frames, with the baselines' curves."""
    plots = []
    for key, title, unit in STEP_PLOTS:
        series = {"model": curves[key]} if key in curves else {}
        series |= {name: curves[f"{b}_{key}"] for b, name in BASELINES.items() if f"{b}_{key}" in curves}
        if series:
            drawn = {name: (range(1, len(values) + 1), values) for name, values in series.items()}
            drawing = figures.line_plot(
                drawn,
                x_label="predicted frame",
                y_label=unit,
                styles=CURVE_STYLES,
                mark_x=marks.get(key),
                label=f"{title} over the predicted frames of {', '.join(series)}",
            )
            plots.append(plot(title, drawing))
    marked = any(mark is not None for mark in marks.values())
    explained = "The dashed line is where the model becomes worse than the copied last frame, and stays so."
    below = f'<p class="small">{explained}</p>' if marked else ""
    return f'<div class="plots">{"".join(plots)}</div>{below}' if plots else ""


def step_table(curves: Mapping[str, Sequence[float | None]]) -> str:
    """A few predicted frames of the curves as numbers, the model above the baselines."""
    horizon = max((len(curves[key]) for key, *_ in STEP_TABLE if key in curves), default=0)
    if not horizon:
        return ""
    steps = sorted({step for step in (1, 5, *(10 * 2**i for i in range(20)), horizon) if step <= horizon})
    rows = []
    for key, label, unit, higher, style in STEP_TABLE:
        lines = {"model": curves.get(key)} | {name: curves.get(f"{b}_{key}") for b, name in BASELINES.items()}
        shown = {name: [values[step - 1] for step in steps] for name, values in lines.items() if values}
        if not shown:
            continue
        better = "higher" if higher else "lower"
        heading = f"{label}{f', {unit}' if unit else ''}: {better} is better"
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(steps) + 1}">{escape(heading)}</th></tr>')
        columns = [[v for v in column if v is not None] for column in zip(*shown.values(), strict=True)]
        best = [(max if higher else min)(column) if len(column) > 1 else None for column in columns]
        for name, values in shown.items():
            cells = "".join(
                _step_cell(v, v is not None and v == top, style) for v, top in zip(values, best, strict=True)
            )
            mark = ' class="model"' if name == "model" else ""
            rows.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{step}</th>' for step in steps)
    return (
        '<div class="wide"><table class="steps"><thead><tr><th scope="col">predicted frame</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="small">Means over clips at that frame alone. Bold is best.</p>'
    )


def _step_cell(value: float | None, best: bool, style: str) -> str:
    if value is None:
        return '<td class="none">&ndash;</td>'
    text = format(value, style)
    return f'<td class="best"><b>{text}</b></td>' if best else f"<td>{text}</td>"


def gallery(clips: Sequence[ReportClip], metrics: Mapping[str, Any]) -> str:
    """The best, the median and the worst predictions at a few steps: truth, prediction, error, and what they score."""
    shown = [clip for clip in clips if clip.prediction is not None and len(clip.prediction)]
    if not shown:
        return ""
    kinds = {clip.key: clip.rank.partition(",")[0] for clip in shown}
    order = sorted(shown, key=lambda clip: [*GALLERY_RANKS, kinds[clip.key]].index(kinds[clip.key]))
    legend = (
        f"Clips are ranked{_ranked_by(metrics)}, the best first. +1 is the first frame after the context. Error is "
        f"white where both agree, and black from a mean difference of {100 * FULL_ERROR:.0f} % of the range on."
    )
    return f'<p class="small">{escape(legend)}</p>{"".join(map(_gallery_item, order))}'


def _gallery_item(clip: ReportClip) -> str:
    assert clip.prediction is not None
    horizon = len(clip.prediction)
    steps = sorted({step for step in (1, 2, 5, *(10 * 2**i for i in range(20)), horizon) if step <= horizon})
    chosen = [step - 1 for step in steps]
    truth, made = clip.frames[clip.context :][chosen], clip.prediction[chosen]
    factor = max(1, round(GALLERY_SIDE / truth.shape[1]))
    rows = []
    for label, frames in (("truth", truth), ("prediction", made), ("error", _error_map(truth, made))):
        pictures = zip(steps, figures.upscale(frames, factor), strict=True)
        cells = "".join(f"<td>{still(frame, f'{label} of {clip.key}, +{step}')}</td>" for step, frame in pictures)
        rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    for name, values in clip.predicted_scores.items():
        cells = "".join(f"<td>{_score_of(name, values[i])}</td>" for i in chosen)
        unit = ", dB" if name == "PSNR" else ""
        rows.append(f'<tr><th scope="row">{escape(name)}{unit}</th>{cells}</tr>')
    means = [f"{name} {_score_of(name, float(np.mean(values)))}" for name, values in clip.predicted_scores.items()]
    caption = f"Mean over the {horizon} predicted frames: {', '.join(means)}." if means else ""
    heads = "".join(f'<th scope="col">+{step}</th>' for step in steps)
    return (
        f'<article><h3>{_badge(clip)}{escape(clip.key)}</h3><p class="small">{escape(caption)}</p><div class="wide">'
        f'<table class="gallery"><thead><tr><th scope="col">predicted frame</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></article>"
    )


def _error_map(truth: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Grey pictures (t, h, w, 3) of the mean absolute difference over channels."""
    error = np.abs(truth.astype(np.int16) - made).mean(axis=-1, keepdims=True) / (255 * FULL_ERROR)
    return np.repeat(np.rint(255 * (1 - error.clip(0, 1))).astype(np.uint8), 3, axis=-1)


def _score_of(name: str, value: float) -> str:
    return format(value, ".2f" if name == "PSNR" else ".3f") if math.isfinite(value) else "not finite"


def _badge(clip: ReportClip) -> str:
    kind = clip.rank.partition(",")[0]
    marked = f" {kind}" if kind in ("worst", "median", "best") else ""
    return f'<span class="rank{marked}">{escape(clip.rank)}</span> ' if clip.rank else ""


def _ranked_by(metrics: Mapping[str, Any]) -> str:
    words = RANKED_BY.get(metrics.get("ranked_by", ""))
    return f" by {words}" if words else ""


def clips_shown(clips: Sequence[ReportClip], metrics: Mapping[str, Any]) -> str:
    """The clips with how to read them."""
    legend = []
    if any(clip.rank for clip in clips):
        legend.append(
            f"Clips are ranked{_ranked_by(metrics)}; the best are counted from the best, all others from the worst."
        )
    if any(clip.scores for clip in clips):
        legend.append("The numbers beside a clip are its PSNR.")
    if any(clip.particles is not None for clip in clips):
        legend.append("Dots and rings are particles, one colour per particle.")
    if any(clip.segments is not None for clip in clips):
        legend.append("Colours of masks are slots: each pixel has that of the slot with the largest mask.")
    if any(clip.positions is not None and clip.particles is not None for clip in clips):
        legend.append("White crosses are true positions.")
    if any(clip.prediction is not None for clip in clips):
        legend.append("A blue frame means that the model still sees the video, a green one that it predicts.")
    explained = f'<p class="small">{escape(" ".join(legend))}</p>' if legend else ""
    return explained + "".join(clip_figures(clip) for clip in clips)


def clip_figures(clip: ReportClip) -> str:
    """A clip moving with its scores, and as a strip of stills; the components of one frame below."""
    panels = "truth and reconstruction" if clip.prediction is None else "truth, reconstruction and prediction"
    moving = _image(_animation(clip), "webp", f"clip {clip.key} moving: {panels} side by side")
    facts = {name: _score(value) for name, value in clip.scores.items() if value is not None}
    beside = _definitions(facts) if facts else ""
    source = f'<p class="small">{escape(clip.source)}</p>' if clip.source else ""
    strip = still(draw_strip(clip), f"stills of clip {clip.key}: {panels} in rows, time to the right")
    parts = [
        f"<h3>{_badge(clip)}{escape(clip.key)}</h3>{source}",
        f'<div class="clip"><div class="wide moving">{moving}</div>{beside}</div>',
        f'<div class="wide">{strip}</div>',
    ]
    for frame, masks, components in clip.parts:
        factor = max(1, 96 // max(components.shape[1:3]))
        grid = figures.component_grid(masks, components, factor=factor, background=clip.has_background)
        parts.append(
            f"<details><summary>Components of frame {frame}: each alone, and its mask</summary>"
            f'<div class="wide">{still(grid, f"components of frame {frame} of clip {clip.key}")}</div></details>'
        )
    if (walk := clip.walk) is not None:
        factor = max(1, round(96 / walk.frames.shape[2]))
        picture = figures.latent_walk(walk.frames, walk.values, walk.names, factor=factor)
        title = f"Latent walk: slot {walk.slot} of frame {walk.frame}, one dimension at a time at the value above it"
        alt = f"latent walk of clip {clip.key}: one dimension of a slot in each row, its values to the right"
        parts.append(f'<details><summary>{title}</summary><div class="wide">{still(picture, alt)}</div></details>')
    return f"<article>{''.join(parts)}</article>"


def data_facts(data: Mapping[str, Any]) -> str:
    """What was evaluated on: counts, sizes, rates; how bright, contrasted and moving the clips are; the extremes."""
    clips, frames, fps = data["clips"], data["frames"], data["fps"]
    facts = {
        "clips": f"{clips:,} evaluated, of {data.get('clips_in_split', clips):,} in the split",
        "videos they are from": f"{data['sources']:,}",
        "frames per clip": f"{frames:,}",
        "height x width": f"{data['height']} x {data['width']} pixels, {data['channels']} channels",
        "source frame rate": _counted(fps["counts"], "fps", clips) or _spread_of(fps, "fps"),
        "stride": _counted(data["strides"], "", clips),
        "clip length": _spread_of(data["seconds"], "s"),
    }
    if stored := data.get("stored"):
        ratio = stored["raw_bytes"] / max(1, stored["bytes"])
        facts["split on disk"] = (
            f"{as_bytes(stored['bytes'])} ({stored['codec']}; shards: {stored['shards']:,}), {ratio:.1f} times smaller "
            f"than its pixels ({as_bytes(stored['raw_bytes'])})"
        )
    plots = []
    for name, meaning in LOOKS.items():
        if found := data.get(name):
            words = f"{found['mean']:.3g} ± {found['std']:.2g} over clips"
            drawing = figures.histogram(
                found["counts"],
                found["min"],
                found["max"],
                x_label=name,
                unit="clips",
                label=f"histogram of {name}: {words}",
            )
            title = f"<b>{escape(name.capitalize())}</b> {escape(words)}<br>{escape(meaning)}"
            plots.append(f"<figure><figcaption>{title}</figcaption>{drawing}</figure>")
    rows = [(row["extreme"], row["clip"], f"{row['of']} {row['value']:.3g}") for row in data["outliers"]]
    table = _text_table(("extreme", "clip", "value"), rows) if rows else ""
    below = ""
    if stored:
        shown = _definitions(flatten_settings(stored["preprocessing"]))
        below = f"<details><summary>How the clips were cut from the videos</summary>{shown}</details>"
    return f'{_definitions(facts)}<div class="thirds">{"".join(plots)}</div>{table}{below}'


def quarantine(found: Mapping[str, Any]) -> str:
    """The inputs that were left out when the split was made: the balance, counts by reason, and the first of them."""
    if "problem" in found:
        return f'<p class="note">The list of inputs that were left out is missing: {escape(found["problem"])}.</p>'
    balance = f"<p>{escape(found['balance'])}.</p>"
    if not found["rows"]:
        return f"{balance}<p>No input was left out.</p>"
    codes = ", ".join(f"{code} {count:,}" for code, count in found["codes"].items())
    names = ("source", "stage", "code", "message")
    table = _text_table(names, [[row[name] for name in names] for row in found["shown"]], "inputs")
    more = found["rows"] - len(found["shown"])
    rest = f'<p class="small">And {more:,} more: quarantine.parquet of the split lists all.</p>' if more else ""
    return f"{balance}<p>{found['rows']:,} rows by code: {escape(codes)}.</p>{table}{rest}"


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Every number of a run's log over the steps; training, held-out and baseline values of a name share a plot."""
    names: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in history:
        if row["kind"] == "stage":
            continue
        for name, value in row.items():
            if name in ("step", "steps", "kind") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            baseline = next((b for b in BASELINES if name.startswith(f"{b}_")), None)
            label = BASELINES[baseline] if baseline else CURVE_LABELS.get(row["kind"], str(row["kind"]))
            x, y = names.setdefault(name.removeprefix(f"{baseline}_"), {}).setdefault(label, ([], []))
            x.append(row["step"])
            y.append(value)
    first = {name: place for place, name in enumerate(FIRST_CURVES)}
    order = sorted(names, key=lambda n: (n in CLOCK_FIELDS, first.get(n, len(first)), n))
    plots = []
    for name in order:
        series = {label: _thin(*xy) for label, xy in sorted(names[name].items(), key=lambda item: _rank(item[0]))}
        values = [v for _, y in series.values() for v in y if v is not None]
        log_y = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
        label = f"{name} over the steps of the training"
        plots.append(plot(name, figures.line_plot(series, x_label="step", y_label="", log_y=log_y, label=label)))
    shown, rest = plots[:PLOTS_SHOWN], plots[PLOTS_SHOWN:]
    more = f'<div class="plots">{"".join(rest)}</div>'
    more = f"<details><summary>{len(rest)} more curves</summary>{more}</details>" if rest else ""
    return f'<div class="plots">{"".join(shown)}</div>{more}'


def troubles(history: Sequence[Mapping[str, Any]]) -> str:
    """What makes a run another one than its settings say: changes by force, and skipped steps."""
    rows = [(str(row["step"]), _listed(row.get("changes"))) for row in history if row["kind"] == "forced"]
    told = _text_table(("from step", "went on by force with other"), rows) if rows else ""
    return told + skipped_steps(history)


def stages(history: Sequence[Mapping[str, Any]]) -> str:
    """The stages of a curriculum: where each began, why, and its settings."""
    rows = [row for row in history if row["kind"] == "stage"]
    if not rows:
        return ""
    shown = []
    for row in rows:
        settings = row.get("settings")
        words = ", ".join(f"{k}={v}" for k, v in settings.items()) if isinstance(settings, Mapping) else str(settings)
        why = str(row.get("reason", ""))
        why = "the run began" if why == "start" else STAGE_ENDS.get(why, why)
        shown.append((str(row.get("stage", "")), str(row["step"]), why, words or "the run's own"))
    return _text_table(("stage", "first step", "because", "settings"), shown)


def skipped_steps(history: Sequence[Mapping[str, Any]]) -> str:
    """The optimiser steps that a loss or gradient without a finite value undid, and the clips they were on."""
    rows = [row for row in history if row["kind"] == "skipped"]
    if not rows:
        return ""
    shown = [(str(row["step"]), _listed(row.get("not_finite")), _listed(row.get("clips"))) for row in rows]
    rest = len(rows) - SKIPPED_SHOWN
    more = f'<p class="small">And {rest:,} more: metrics.jsonl of the run has all.</p>' if rest > 0 else ""
    return (
        f"<p>Optimiser steps that were skipped, because not every number was finite: {len(rows):,}.</p>"
        f"{_text_table(('step', 'not finite', 'clips'), shown[:SKIPPED_SHOWN])}{more}"
    )


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rank(label: str) -> int:
    order = [*CURVE_LABELS.values(), *BASELINES.values()]
    return order.index(label) if label in order else len(order)


def provenance(metrics: Mapping[str, Any], settings: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """The commands, the ids of model, data and code, the seeds, the versions, and every setting."""
    parts = []
    if "command" in metrics:
        parts.append(f'<h3>Evaluate</h3><pre class="command">{escape(str(metrics["command"]))}</pre>')
    if line := training.get("command"):
        parts.append(f'<h3>Train</h3><pre class="command">{escape(str(line))}</pre>')
    elif problem := training.get("problem"):
        words = f"The command of the training cannot be told from its settings: {problem}"
        parts.append(f'<p class="small">{escape(words)}.</p>')
    facts = {name: metrics[name] for name in FACTS if name in metrics}
    facts |= {name: training[name] for name in ("step", "model") if name in training and name not in facts}
    facts |= {"trained on": training["dataset"]} if training.get("dataset") else {}
    if changed := metrics.get("model_settings_changed"):
        facts["settings changed at test time"] = ", ".join(f"{name}={value}" for name, value in changed.items())
    if training.get("seed") is not None:
        facts["seed of the training"] = training["seed"]
    if "interval95" in metrics:
        facts["seed of the intervals"] = "0; nothing else is drawn at random"
    facts |= {"code that evaluated": _revision(metrics["code"])} if metrics.get("code") else {}
    facts |= {"code that trained": _revision(training["code"])} if training.get("code") else {}
    label = "versions" if "versions" in metrics else "versions at the time of this report"
    facts[label] = ", ".join(f"{name} {number}" for name, number in (metrics.get("versions") or versions()).items())
    parts.append(_definitions(facts))
    if settings:
        shown = _definitions(flatten_settings(settings))
        parts.append(f"<details><summary>Settings of the training</summary>{shown}</details>")
    return "".join(parts)


def _revision(code: Mapping[str, Any]) -> str:
    if not code.get("revision"):
        return "unknown: not a checkout"
    return f"{code['revision']}{' with local changes' if code.get('dirty') else ''}"


def _last_state(run: str) -> dict[str, Any]:
    """``state.json`` of a run's newest checkpoint, with the model's id; empty where there is none yet."""
    try:
        last = store.read_json(store.join(run, "last.json"))
    except FileNotFoundError:
        return {}
    folder = store.join(run, last["checkpoint"])
    complete = store.read_json(store.join(folder, "COMPLETE"))
    state = store.loads(store.read_bytes(store.join(folder, "state.json"), complete["state.json"]["sha256"]))
    return {**state, "model": complete["model.safetensors"]["sha256"]}


def cell(name: str, best: bool, metrics: Mapping[str, Any], unit: str, style: str, reasons: dict[str, int]) -> str:
    if name not in metrics:
        return "<td></td>"
    value = metrics[name]
    if value is None:
        reason = metrics.get("reasons", {}).get(name, "no reason was recorded")
        mark = reasons.setdefault(reason, len(reasons) + 1)
        return f'<td class="none" title="{escape(reason)}">&ndash;<sup>{mark}</sup></td>'
    factor = 100 if unit == "%" else 1
    text = format(value * factor, style)
    interval = metrics.get("interval95", {}).get(name)
    small = f"<small>{' … '.join(format(v * factor, style) for v in interval)}</small>" if interval else ""
    return f'<td class="best"><b>{text}</b>{small}</td>' if best else f"<td>{text}{small}</td>"


def _animation(clip: ReportClip) -> bytes:
    seen = clip.context + len(clip.prediction) if clip.prediction is not None else len(clip.frames)
    factor = max(1, round(256 / clip.frames.shape[1]))
    truth = slice(0, seen)

    def draw(frames: np.ndarray, drawn: Particles | None) -> np.ndarray:
        return figures.draw_particles(
            frames,
            None if drawn is None else drawn.position,
            transparency=None if drawn is None else drawn.transparency,
            scale=None if drawn is None else drawn.scale,
            truth=None if clip.positions is None else clip.positions[truth],
            present=None if clip.present is None else clip.present[truth],
            factor=factor,
        )

    panels = {
        "truth": figures.upscale(clip.frames[truth], factor),
        "reconstruction": draw(clip.reconstruction[truth], clip.particles and clip.particles.frames(truth)),
    }
    captions = [f"frame {t}" for t in range(seen)]
    borders = {}
    if clip.prediction is not None:
        frames = np.concatenate([clip.reconstruction[: clip.context], clip.prediction])
        panels["prediction"] = draw(frames, _followed(clip))
        borders["prediction"] = [figures.CONTEXT] * clip.context + [figures.PREDICTED] * len(clip.prediction)
        captions = [f"frame {t}: context {t + 1} of {clip.context}" for t in range(clip.context)]
        captions += [f"frame {t}: predicted +{t + 1 - clip.context}" for t in range(clip.context, seen)]
    for label, picture in _overlays(clip).items():
        panels[label] = figures.upscale(picture[truth], factor)
        if label != "masks":
            borders[label] = borders["prediction"]
    return figures.animation(panels, fps=min(clip.fps, 10.0), captions=captions, borders=borders)


def draw_strip(clip: ReportClip) -> np.ndarray:
    """Frames of a clip side by side: truth, reconstruction, prediction, and what the model sees in them, in rows."""
    total = len(clip.frames) if clip.prediction is None else clip.context + len(clip.prediction)
    if clip.prediction is None:
        columns = _spread(0, total, STRIP_CONTEXT + STRIP_PREDICTED)
    else:
        columns = _spread(0, clip.context, STRIP_CONTEXT) + _spread(clip.context, total, STRIP_PREDICTED)
    rows = {"truth": clip.frames[columns], "reconstruction": clip.reconstruction[columns]}
    if clip.prediction is not None:
        blank = np.full_like(clip.frames[: clip.context], 255)
        rows["prediction"] = np.concatenate([blank, clip.prediction])[columns]
    rows |= {label: picture[columns] for label, picture in _overlays(clip).items()}
    factor = max(1, round(128 / clip.frames.shape[1]))
    rows = {label: figures.upscale(frames, factor) for label, frames in rows.items()}
    particles = clip.particles if clip.prediction is None else _followed(clip)
    if particles is not None:
        where = particles.frames(columns)
        rows["particles on truth"] = figures.draw_particles(
            clip.frames[columns], where.position, transparency=where.transparency, scale=where.scale, factor=factor
        )
    first = None if clip.prediction is None else sum(c < clip.context for c in columns)
    return figures.strip(rows, [str(c) for c in columns], first_predicted=first)


def _overlays(clip: ReportClip) -> dict[str, np.ndarray]:
    """The reconstruction with its segments as colours, and the same going over into the prediction."""
    if clip.segments is None:
        return {}
    found = {"masks": _tinted(clip, clip.reconstruction, clip.segments)}
    if clip.prediction is not None and clip.predicted_segments is not None:
        ahead = _tinted(clip, clip.prediction, clip.predicted_segments)
        found["predicted masks"] = np.concatenate([found["masks"][: clip.context], ahead])
    return found


def _tinted(clip: ReportClip, frames: np.ndarray, segments: np.ndarray) -> np.ndarray:
    number = int(segments.max()) + 1
    masks = segments[:, None] == np.arange(max(number, 1))[:, None, None]
    return figures.mask_overlay(frames, masks.astype(np.int8), background=clip.has_background)


def _followed(clip: ReportClip) -> Particles | None:
    """Encoded particles in the context, predicted ones after it."""
    if clip.particles is None or clip.predicted_particles is None:
        return None
    return clip.particles.frames(slice(0, clip.context)).then(clip.predicted_particles)


def _concatenate(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _spread(start: int, stop: int, count: int) -> list[int]:
    """At most ``count`` whole numbers from ``start`` to ``stop - 1``, evenly, both ends included."""
    return sorted({round(float(v)) for v in np.linspace(start, stop - 1, min(count, stop - start))})


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float | None]]:
    finite: list[float | None] = [v if math.isfinite(v) else None for v in y]
    if len(x) <= PLOT_POINTS:
        return x, finite
    bounds = np.linspace(0, len(x), PLOT_POINTS + 1).astype(int)
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    groups = [[v for v in finite[span] if v is not None] for span in spans]
    return [float(np.mean(x[span])) for span in spans], [float(np.mean(g)) if g else None for g in groups]


def _score(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "not finite"


def _counted(counts: Mapping[str, int], unit: str, total: int) -> str:
    """``10 fps``, or ``10 fps (7 clips), 25 fps (5 clips)``."""
    words = {name: f"{name} {unit}".strip() for name in sorted(counts, key=float)}
    if len(words) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{word} ({counts[name]:,} of {total:,} clips)" for name, word in words.items())


def _spread_of(found: Mapping[str, float], unit: str) -> str:
    if found["min"] == found["max"]:
        return f"{found['min']:.4g} {unit}"
    return f"{found['min']:.4g} to {found['max']:.4g} {unit}, median {found['median']:.4g}"


def _text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of words, of which the first in a row says what the row is about."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(text)}</td>" for text in rest)}</tr>'
        for first, *rest in rows
    )
    table = f'<table class="text {kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _definitions(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{rows}</dl>"


def plot(title: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{drawing}</figure>"


def still(picture: np.ndarray, alt: str) -> str:
    data = figures.png(picture)
    return _image(data, "png", alt) if len(data) <= PNG_BYTES else _image(figures.webp(picture), "webp", alt)


def _image(data: bytes, encoding: str, alt: str) -> str:
    return f'<img src="data:image/{encoding};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --fill: #f5f7fa; --accent: #2563eb; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 14px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 20px 0 6px; overflow-wrap: anywhere; }
p { overflow-wrap: anywhere; }
a, summary { color: var(--accent); }
header p { font-size: 1.05rem; color: var(--soft); margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; font-size: 0.9rem; }
nav a { text-decoration: none; padding: 2px 0; }
nav a:hover { text-decoration: underline; }
article { margin: 0 0 20px; padding: 0 0 20px; border-bottom: 1px solid var(--line); }
article:last-child { border: 0; margin: 0; padding: 0; }
figure { margin: 10px 0 16px; }
figcaption, .small, small, .reasons { font-size: 0.84rem; color: var(--soft); }
figcaption b { color: var(--ink); }
img, svg { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: 0 0 12px; }
.wide > img { min-width: 760px; }
.wide.moving > img { min-width: 420px; }
.clip { display: flex; flex-wrap: wrap; gap: 4px 28px; align-items: flex-start; }
.clip .moving { flex: 0 1 auto; min-width: 0; }
.clip dl { flex: 1 1 230px; max-width: 330px; grid-template-columns: 1fr max-content; margin: 22px 0 12px; }
.clip dd { text-align: right; margin: 0; }
h3 + .small { margin: 0 0 6px; }
.rank { display: inline-block; border-radius: 4px; padding: 1px 8px; margin-right: 6px; background: var(--fill);
  color: var(--soft); font-size: 0.84rem; font-weight: 600; }
.rank.worst { background: #fde8e8; color: #9b1c1c; }
.rank.best { background: #def7ec; color: #03543f; }
.note { background: #fffbea; border-left: 4px solid #f0b429; padding: 8px 14px; }
.verdicts { margin: 0 0 8px; padding-left: 1.2em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { font-weight: 500; }
tbody th, thead th:first-child { text-align: left; }
thead th { color: var(--soft); font-size: 0.84rem; border-bottom: 2px solid var(--line); white-space: normal;
  vertical-align: bottom; min-width: 4.6em; }
td small { display: block; font-size: 0.78rem; }
.results td:nth-child(2), .steps tr.model td, .steps tr.model th { background: var(--fill); }
td.best b { color: var(--accent); }
td.none { color: var(--soft); }
tr.group th { padding-top: 18px; font-weight: 650; }
table.text { font-size: 0.9rem; }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7em; }
table.gallery { width: auto; }
table.gallery th, table.gallery td { text-align: center; padding: 3px 5px; border-bottom: 0; vertical-align: middle; }
table.gallery tbody th { text-align: right; }
table.gallery img { max-width: none; }
table.inputs th:first-child, table.inputs td:last-child { min-width: 15em; }
.arrow { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 8px 32px; }
.thirds { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 0 32px; }
.plot { width: 100%; }
pre.command { background: var(--fill); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 0.86rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 0.9rem; margin: 14px 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.86rem; }
details { margin: 10px 0; }
summary { cursor: pointer; }
@media (max-width: 600px) {
  main { padding: 20px 14px 40px; }
  h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
  th, td { padding: 6px; }
  tbody th { white-space: normal; min-width: 7.5em; }
  .clip dl { margin: 0 0 12px; gap: 2px 18px; }
}
@media (prefers-reduced-motion: reduce) { .moving { display: none; } }
@media print { nav { display: none; } article, figure, tr { break-inside: avoid; } }
"""
