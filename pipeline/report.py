"""One HTML file that shows what a model does: numbers beside baselines, clips, curves, and what reproduces it.

A page is a list of sections, and a section is a heading with HTML: a further section is one more function. Everything
is inline (pictures as data URLs, plots as SVG); the page has no scripts, and its content policy forbids any. Every
value passes ``html.escape``.
"""

import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from objdyn import figures
from pipeline import store
from pipeline.config import flatten_settings
from pipeline.loop import read_metrics

PNG_BYTES = 300_000
"""A still larger than this as PNG (camera footage) goes into the page as WebP."""
PLOT_POINTS = 400
"""Points of a training curve; longer ones are averaged over equal intervals."""
PLOTS_SHOWN = 4
STRIP_CONTEXT, STRIP_PREDICTED = 3, 8

METRICS = (
    # group, key, label, unit, higher is better, format
    ("Reconstruction", "recon_psnr", "PSNR", "dB", True, ".2f"),
    ("Reconstruction", "recon_ssim", "SSIM", "", True, ".3f"),
    ("Reconstruction", "recon_mse", "MSE", "", False, ".3g"),
    ("Prediction", "predict_psnr", "PSNR", "dB", True, ".2f"),
    ("Prediction", "predict_ssim", "SSIM", "", True, ".3f"),
    ("Prediction", "predict_mse", "MSE", "", False, ".3g"),
    ("Positions", "med10", "MED10", "", False, ".3f"),
    ("Positions", "med10_corrected", "MED10, half pixel corrected", "", False, ".3f"),
    ("Positions", "coverage_3px", "objects within 3 px of a particle", "%", True, ".1f"),
    ("Positions", "coverage_2px", "objects within 2 px of a particle", "%", True, ".1f"),
)
BASELINES = {
    "copy_last": "copy last frame",
    "constant_background": "constant background",
    "constant_velocity": "constant velocity",
    "constant_velocity_walls": "constant velocity, walls",
}
CURVE_STYLES = {name: i for i, name in enumerate(("model", *BASELINES.values()))}
STEP_PLOTS = (
    ("predict_psnr", "PSNR (higher is better)", "dB"),
    ("predict_ssim", "SSIM (higher is better)", ""),
    ("position_error", "Position error (lower is better)", "share of the frame's side"),
)
CURVE_LABELS = {"train": "training", "eval": "held out"}
FACTS = ("family", "step", "model", "dataset", "split", "clips", "context", "horizon")
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
    masks: np.ndarray | None = None
    """(k, h, w), of frame ``component_frame``."""
    components: np.ndarray | None = None
    """uint8 (k, h, w, c)."""
    component_frame: int = 0
    scores: Mapping[str, float | None] = {}
    """Shown below the clip."""


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
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Publish a report and return its path; what is not given has no section.

    Args:
        path: the file to write, local or s3://.
        title: of the page.
        metrics: what ``metrics.json`` holds.
        history: the rows of a run's ``metrics.jsonl``.
        clips: to draw, in this order.
        settings: nested settings of the run.
        notes: sentences to show above everything else.
    """
    sections = []
    if metrics:
        sections.append(Section("Results", results_table(metrics)))
    if clips:
        sections.append(Section("Clips", "".join(clip_figures(clip) for clip in clips)))
    if metrics and (plots := step_plots(metrics)):
        sections.append(Section("Over the predicted frames", plots))
    if history:
        sections.append(Section("Training", training_curves(history)))
    if metrics or settings:
        sections.append(Section("To reproduce this", provenance(metrics or {}, settings or {})))
    store.publish(path, render_page(title, summary(metrics or {}), sections, notes).encode())
    return path


def write_run_report(run: str) -> str:
    """Publish ``report.html`` of a run folder from its ``config.json``, ``metrics.jsonl`` and ``metrics.json``.

    Raises:
        ValueError: the folder holds no run.
    """
    config = store.join(run, "config.json")
    if not store.exists(config):
        raise ValueError(f"{run} holds no config.json, so it is no run folder; give the --out of a training")
    path = store.join(run, "metrics.json")
    history, notes = read_history(run)
    return write_report(
        store.join(run, "report.html"),
        title=f"Training run {run.rstrip('/').rsplit('/', 1)[-1]}",
        metrics=store.read_json(path) if store.exists(path) else None,
        history=history,
        settings=store.read_json(config),
        notes=notes,
    )


def read_history(run: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the rows of a run's ``metrics.jsonl``, or a sentence that says why its curves are missing."""
    try:
        return read_metrics(run), []
    except (ValueError, KeyError) as error:
        return [], [f"The training curves are missing: metrics.jsonl of {run} cannot be read ({error})."]


def render_page(title: str, subtitle: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """Put sections into one HTML page."""
    body = "".join(f"<section><h2>{escape(s.heading)}</h2>{s.html}</section>" for s in sections)
    notices = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{notices}{body}</main></body></html>\n"
    )


def summary(metrics: Mapping[str, Any]) -> str:
    """One sentence: what was measured and how far above the trivial baselines it is."""
    if "clips" not in metrics:
        return ""
    text = f"{metrics.get('family', 'model')} on {metrics['clips']} clips of split {metrics.get('split', '?')}"
    gains = []
    for key, twin, against in (
        ("recon_psnr", "constant_background_recon_psnr", "the constant background in reconstruction"),
        ("predict_psnr", "copy_last_predict_psnr", "the copied last frame in prediction"),
    ):
        model, baseline = metrics.get(key), metrics.get(twin)
        if model is not None and baseline is not None:
            gain = model - baseline
            gains.append(f"{abs(gain):.1f} dB {'above' if gain >= 0 else 'below'} {against}")
    return f"{text}: {', '.join(gains)}." if gains else f"{text}."


def results_table(metrics: Mapping[str, Any]) -> str:
    """The model's metrics beside the same metrics of the trivial baselines, on the same clips."""
    reasons: dict[str, int] = {}
    rows, group = [], ""
    for heading, key, label, unit, higher, style in METRICS:
        if key not in metrics:
            continue
        keys = [key, *(f"{baseline}_{key}" for baseline in BASELINES)]
        values = [metrics.get(name) for name in keys]
        numbers = [value for value in values if value is not None]
        best = (max if higher else min)(numbers) if len(numbers) > 1 else None
        marks = [value is not None and value == best for value in values]
        cells = [_cell(*pair, metrics, unit, style, reasons) for pair in zip(keys, marks, strict=True)]
        if heading != group:
            rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(keys) + 1}">{escape(heading)}</th></tr>')
            group = heading
        better, sign = ("higher", "↑") if higher else ("lower", "↓")
        arrow = f'<span class="arrow" title="{better} is better">{sign}</span>'
        name = f"{escape(label)}{f' ({unit})' if unit else ''}"
        rows.append(f'<tr><th scope="row">{name} {arrow}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("model", *BASELINES.values()))
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
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
    return f'<div class="wide">{table}</div>{listed}<p class="small">{escape(explained)}</p>'


def clip_figures(clip: ReportClip) -> str:
    """A clip moving, and as a strip of stills; the components of one frame below."""
    parts = [f"<h3>{escape(clip.key)}</h3>"]
    if shown := {name: value for name, value in clip.scores.items() if value is not None}:
        words = ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
        parts.append(f'<p class="small">{escape(words)}</p>')
    crosses = " White crosses are true positions." if clip.positions is not None else ""
    particles = " Dots and rings are particles, one colour per particle." if clip.particles is not None else ""
    parts.append(_figure(_image(_animation(clip), "webp", f"animation of {clip.key}"), f"{particles}{crosses}".strip()))
    parts.append(_figure(f'<div class="wide">{_still(_strip(clip), f"strip of {clip.key}")}</div>', ""))
    if clip.masks is not None and clip.components is not None:
        side = max(clip.components.shape[1:3])
        grid = figures.component_grid(clip.masks, clip.components, factor=max(1, 96 // side))
        parts.append(
            f"<details><summary>Components of frame {clip.component_frame}: each alone, and its mask</summary>"
            f'<div class="wide">{_still(grid, f"components of {clip.key}")}</div></details>'
        )
    return f"<article>{''.join(parts)}</article>"


def step_plots(metrics: Mapping[str, Any]) -> str:
    """Each per-frame error over the predicted frames, with the baselines' curves."""
    curves = metrics.get("curves", {})
    plots = []
    for key, title, unit in STEP_PLOTS:
        series = {"model": curves[key]} if key in curves else {}
        series |= {name: curves[f"{b}_{key}"] for b, name in BASELINES.items() if f"{b}_{key}" in curves}
        if series:
            drawn = {name: (range(1, len(values) + 1), values) for name, values in series.items()}
            drawing = figures.line_plot(drawn, x_label="predicted frame", y_label=unit, styles=CURVE_STYLES)
            plots.append(_plot(title, drawing))
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Every number of a run's log over the steps; training, held-out and baseline values of a name share a plot."""
    names: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in history:
        for name, value in row.items():
            if name in ("step", "steps", "kind") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            baseline = next((b for b in BASELINES if name.startswith(f"{b}_")), None)
            label = BASELINES[baseline] if baseline else CURVE_LABELS.get(row["kind"], str(row["kind"]))
            x, y = names.setdefault(name.removeprefix(f"{baseline}_"), {}).setdefault(label, ([], []))
            x.append(row["step"])
            y.append(value)
    order = sorted(names, key=lambda n: (FIRST_CURVES.index(n) if n in FIRST_CURVES else len(FIRST_CURVES), n))
    plots = []
    for name in order:
        series = {label: _thin(*xy) for label, xy in sorted(names[name].items(), key=lambda item: _rank(item[0]))}
        values = [v for _, y in series.values() for v in y if v is not None]
        log_y = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
        plots.append(_plot(name, figures.line_plot(series, x_label="step", y_label="", log_y=log_y)))
    shown, rest = plots[:PLOTS_SHOWN], plots[PLOTS_SHOWN:]
    more = f'<div class="plots">{"".join(rest)}</div>'
    more = f"<details><summary>{len(rest)} more</summary>{more}</details>" if rest else ""
    return f'<div class="plots">{"".join(shown)}</div>{more}'


def _rank(label: str) -> int:
    order = [*CURVE_LABELS.values(), *BASELINES.values()]
    return order.index(label) if label in order else len(order)


def provenance(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The command, the ids of model and data, and every setting."""
    parts = []
    if "command" in metrics:
        parts.append(f'<pre class="command">{escape(str(metrics["command"]))}</pre>')
    facts = {name: metrics[name] for name in FACTS if name in metrics}
    if facts:
        parts.append(_definitions(facts))
    if settings:
        parts.append(f"<details><summary>Settings</summary>{_definitions(flatten_settings(settings))}</details>")
    return "".join(parts)


def _cell(name: str, best: bool, metrics: Mapping[str, Any], unit: str, style: str, reasons: dict[str, int]) -> str:
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
    return figures.animation(panels, fps=min(clip.fps, 10.0), captions=captions, borders=borders)


def _strip(clip: ReportClip) -> np.ndarray:
    total = len(clip.frames) if clip.prediction is None else clip.context + len(clip.prediction)
    if clip.prediction is None:
        columns = _spread(0, total, STRIP_CONTEXT + STRIP_PREDICTED)
    else:
        columns = _spread(0, clip.context, STRIP_CONTEXT) + _spread(clip.context, total, STRIP_PREDICTED)
    rows = {"truth": clip.frames[columns], "reconstruction": clip.reconstruction[columns]}
    if clip.prediction is not None:
        blank = np.full_like(clip.frames[: clip.context], 255)
        rows["prediction"] = np.concatenate([blank, clip.prediction])[columns]
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


def _definitions(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{rows}</dl>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def _plot(title: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{drawing}</figure>"


def _still(picture: np.ndarray, alt: str) -> str:
    data = figures.png(picture)
    return _image(data, "png", alt) if len(data) <= PNG_BYTES else _image(figures.webp(picture), "webp", alt)


def _image(data: bytes, encoding: str, alt: str) -> str:
    return f'<img src="data:image/{encoding};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --fill: #f5f7fa; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 14px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 4px; overflow-wrap: anywhere; }
header p { font-size: 1.05rem; color: var(--soft); margin: 0; }
article { margin: 0 0 36px; }
figure { margin: 10px 0 16px; }
figcaption, .small, small, .reasons { font-size: 0.84rem; color: var(--soft); }
img, svg { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.wide img { min-width: 760px; }
.note { background: #fffbea; border-left: 4px solid #f0b429; padding: 8px 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { font-weight: 500; }
tbody th { text-align: left; }
thead th { color: var(--soft); font-size: 0.84rem; border-bottom: 2px solid var(--line); white-space: normal;
  vertical-align: bottom; min-width: 6.2em; }
td small { display: block; font-size: 0.78rem; }
td:nth-child(2) { background: var(--fill); }
td.best b { color: var(--accent); }
td.none { color: var(--soft); }
tr.group th { padding-top: 18px; font-weight: 650; }
.arrow { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 8px 32px; }
.plot { width: 100%; }
pre.command { background: var(--fill); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 0.86rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 0.9rem; margin: 12px 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.86rem; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 600px) {
  main { padding: 20px 14px 40px; }
  h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
"""
