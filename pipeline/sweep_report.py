"""What a sweep leaves behind: ``sweep.json``, ``sweep.parquet``, ``best.json`` and ``report.html``.

All four are made from a ``SweepRecord`` alone, with the pictures of the best trials, and hold neither a time nor a
host: the same record gives the same bytes.
"""

import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from objdyn import figures
from objdyn.figures import Point
from pipeline import store
from pipeline.report import METRICS, Section, plot, render_page, still
from pipeline.study import Objective, SweepRecord, TrialRecord
from pipeline.tables import METADATA_KEY

SCHEMA_VERSION = 1
STATES = ("complete", "pruned", "running", "failed")
"""In the order in which the page lists them."""
TYPES = {"log": pa.float64(), "uniform": pa.float64(), "int": pa.int64(), "logint": pa.int64()}
"""Of a searched field, by the kind of its distribution; the values of choices tell their own."""
ROWS_SHOWN = 50
CURVES_SHOWN, CURVES_BOLD = 12, 3
SPREADS_SHOWN = 20
PICTURES_SHOWN = 4
REASON_SHOWN = 120
"""Letters of a reason in the table of all trials."""
REASON_STYLE = "min-width: 18em; text-align: left; white-space: normal; overflow-wrap: anywhere"
UNITS = {key: unit for _, key, _, unit, _, _ in METRICS if unit != "%"} | {"step_seconds": "s"}
"""Values here are as the training logs them: shares, where reports of an evaluation give per cent."""


class Ranking(NamedTuple):
    """Trials of a sweep in order."""

    done: tuple[TrialRecord, ...]
    """Complete ones, the front first, each part by the first objective."""
    rest: tuple[TrialRecord, ...]
    """The others: pruned, running and failed ones, by number."""
    front: frozenset[int]
    """Numbers of the trials of the Pareto front, or of the best one."""

    @classmethod
    def of(cls, sweep: SweepRecord) -> "Ranking":
        """Order the trials of a sweep."""
        front = sweep.front
        numbers = frozenset(trial.number for trial in front)
        others = [trial for trial in sweep.trials if trial.state == "complete" and trial.number not in numbers]
        others.sort(key=lambda trial: (_cost(trial, sweep.objectives[0]), trial.number))
        rest = [trial for state in STATES[1:] for trial in sweep.trials if trial.state == state]
        return cls((*front, *others), tuple(rest), numbers)


def write_sweep(out: str, sweep: SweepRecord, best_run: Mapping[str, Any] | None, commands: Sequence[str] = ()) -> None:
    """Publish everything that is made from a sweep's record; may be called again while the sweep goes on.

    Args:
        out: the sweep's folder, local or s3://, which holds the pictures.
        sweep: its record.
        best_run: ``family`` and ``run`` of the best trial in the form of a run folder's ``config.json``; None if there
            is none yet, and then there is no ``best.json``.
        commands: command lines to show for reproducing the sweep.
    """
    store.publish_json(store.join(out, "sweep.json"), sweep_json(sweep))
    buffer = io.BytesIO()
    pq.write_table(sweep_table(sweep), buffer, compression="zstd", write_page_checksum=True, write_page_index=True)
    store.publish(store.join(out, "sweep.parquet"), buffer.getvalue())
    if best_run is not None:
        store.publish_json(store.join(out, "best.json"), best_run)
    store.publish(store.join(out, "report.html"), render_sweep(out, sweep, commands).encode())


def sweep_json(sweep: SweepRecord) -> dict[str, Any]:
    """The whole record as JSON takes it; numbers that are not finite are None."""
    counts = Counter(trial.state for trial in sweep.trials)
    return _plain(
        {
            **sweep._asdict(),
            "schema": SCHEMA_VERSION,
            "kind": "sweep",
            "objectives": [objective._asdict() for objective in sweep.objectives],
            "counts": {state: counts[state] for state in STATES},
            "front": [trial.number for trial in sweep.front],
            "trials": [trial._asdict() for trial in sweep.trials],
        }
    )


def sweep_table(sweep: SweepRecord) -> pa.Table:
    """One row per trial: its settings and objectives as columns under their own names.

    With several seeds an objective has ``NAME_min`` and ``NAME_max`` over them besides its median. What a trial does
    not have is null.
    """
    trials = sweep.trials
    front = {trial.number for trial in sweep.front}
    columns: dict[str, pa.Array] = {
        "number": pa.array([trial.number for trial in trials], pa.int64()),
        "state": pa.array([trial.state for trial in trials], pa.string()),
    }
    columns |= {name: _settings_column(sweep, name) for name in sweep.space}
    for name, _ in sweep.objectives:
        found = {name: [trial.values.get(name) for trial in trials]}
        if sweep.seeds > 1:
            spreads = [_spread(trial, name) for trial in trials]
            found |= {f"{name}_min": [s and s[0] for s in spreads], f"{name}_max": [s and s[1] for s in spreads]}
        columns |= {key: pa.array(_plain(values), pa.float64()) for key, values in found.items()}
    columns |= {
        "on_front": pa.array([trial.number in front for trial in trials], pa.bool_()),
        "seconds": pa.array(_plain([trial.seconds for trial in trials]), pa.float64()),
        "folder": pa.array([trial.folder for trial in trials], pa.string()),
        "reason": pa.array([trial.reason for trial in trials], pa.string()),
        "attempts": pa.array([trial.attempts for trial in trials], pa.int64()),
    }
    description = {
        "schema": SCHEMA_VERSION,
        "table": "sweep",
        "preset": sweep.preset,
        "dataset_id": sweep.dataset_id,
        "objectives": {objective.name: objective.direction for objective in sweep.objectives},
        "seed": sweep.seed,
        "seeds": sweep.seeds,
    }
    return pa.table(columns, metadata={METADATA_KEY: json.dumps(description, sort_keys=True).encode()})


def render_sweep(out: str, sweep: SweepRecord, commands: Sequence[str] = ()) -> str:
    """The page of a sweep; arguments as of ``write_sweep``. What there is nothing of has no section."""
    ranking = Ranking.of(sweep)
    sections = [
        Section("Trials", trials_table(sweep, ranking)),
        Section("History", history(sweep)),
        Section("During training", curves(sweep, ranking)),
        Section("Which settings matter", importance(sweep)),
        Section("Settings and objectives", slices(sweep, ranking)),
        Section("Pareto front", pareto(sweep, ranking)),
        Section("Seeds", seeds(sweep, ranking)),
        Section("Best trials", pictures(out, sweep, ranking)),
        Section("Failed trials", failures(sweep)),
        Section("To reproduce this", provenance(sweep, commands)),
    ]
    return render_page(f"Sweep of {sweep.preset}", verdict(sweep, ranking), [s for s in sections if s.html])


def verdict(sweep: SweepRecord, ranking: Ranking) -> str:
    """One sentence: how many trials ended how, and what the best one is worth."""
    counts = Counter(trial.state for trial in sweep.trials)
    told = [f"{counts['complete']} of {sweep.wanted} trials {'is' if counts['complete'] == 1 else 'are'} complete"]
    told += [f"{counts[state]} {state}" for state in ("pruned", "failed", "running") if counts[state]]
    if (waiting := sweep.wanted - len(sweep.trials)) > 0:
        told.append(f"{waiting} not begun")
    said = ", ".join(told)
    if not ranking.done:
        return f"{said}; there is no best one yet."
    best, (first, *others) = ranking.done[0], sweep.objectives
    settings = _settings_text(best)
    if others:
        rest = ", ".join(f"{name} {_with_unit(best.values.get(name), name)}" for name, _ in others)
        front = f"{len(ranking.front)} {'is' if len(ranking.front) == 1 else 'are'} on the Pareto front"
        return (
            f"{said}; {front}; the best by {first.name} is trial {best.number} ({settings}) with "
            f"{_with_unit(best.values.get(first.name), first.name)}, and {rest}."
        )
    value = best.values.get(first.name)
    return (
        f"{said}; the best is trial {best.number} ({settings}), whose {first.name} is {_with_unit(value, first.name)}"
        f"{_gain(ranking, first)}."
    )


def trials_table(sweep: SweepRecord, ranking: Ranking) -> str:
    """All trials with settings and objectives: the best first, failed ones last."""
    has_reasons = any(trial.reason for trial in sweep.trials)
    heads = ["trial", "state", *(escape(name) for name in sweep.space)]
    heads += [_objective_head(objective) for objective in sweep.objectives]
    heads += ["seconds", "folder", *(["reason"] if has_reasons else [])]
    rows = []
    for trial in (*ranking.done, *ranking.rest):
        chosen = trial.number in ranking.front
        row = [f"<b>{trial.number}</b>" if chosen else str(trial.number), escape(trial.state)]
        row += [_setting(trial, name) for name in sweep.space]
        values = [_value_text(trial, name, sweep.seeds) for name, _ in sweep.objectives]
        row += [f"<b>{value}</b>" if chosen else value for value in values]
        row += [_seconds(trial.seconds), escape(trial.folder)]
        if has_reasons:
            short = trial.reason[:REASON_SHOWN] + ("\u2026" if len(trial.reason) > REASON_SHOWN else "")
            row.append(f'<div style="{REASON_STYLE}">{escape(short)}</div>')
        rows.append(row)
    bold = "the best trial" if len(sweep.objectives) == 1 else "trials that no other surpasses in every objective"
    explained = f"Bold: {bold}."
    if sweep.seeds > 1:
        explained += f" Objectives are the median of {sweep.seeds} seeds (lowest to highest)."
    more = ""
    if len(rows) > ROWS_SHOWN:
        rest = _table(heads, rows[ROWS_SHOWN:], "results")
        more = f"<details><summary>{len(rows) - ROWS_SHOWN} more trials</summary>{rest}</details>"
    return f'{_table(heads, rows[:ROWS_SHOWN], "results")}{more}<p class="small">{escape(explained)}</p>'


def history(sweep: SweepRecord) -> str:
    """Objectives in the order in which trials were begun, with the best so far."""
    done = [trial for trial in sweep.trials if trial.state == "complete"]
    if not done:
        return ""
    plots = []
    for objective in sweep.objectives:
        line, bold, best = [], set(), None
        for trial in done:
            if not math.isfinite(_cost(trial, objective)):
                continue
            if best is None or _cost(trial, objective) < _cost(best, objective):
                # The old best holds up to this trial: a step and not a slope.
                line += [] if best is None else [(trial.number, best.values[objective.name])]
                best = trial
                bold.add(trial.number)
            line.append((trial.number, best.values[objective.name]))
        points = [_point(trial, trial.number, objective, trial.number in bold) for trial in done]
        drawing = figures.scatter_plot(
            points,
            x_label="trial",
            y_label=UNITS.get(objective.name, ""),
            log_y=_is_wide(point.y for point in points),
            line=line,
            line_label="best so far",
            label=f"{objective.name} of the trials in the order in which they were begun",
        )
        plots.append(plot(_better(objective), drawing))
    explained = f"Complete trials; blue: better than all before.{_bars(sweep)}"
    return f'{_grid(plots)}<p class="small">{escape(explained)}</p>'


def curves(sweep: SweepRecord, ranking: Ranking) -> str:
    """The objective over the optimiser steps, of the best trials and some that were stopped."""
    done = [trial for trial in ranking.done if trial.curve]
    rest = [trial for trial in ranking.rest if trial.curve]
    if not done and not rest:
        return ""
    # Room for some that did not end: what a pruner stopped is only to be judged beside what it kept.
    room = max(CURVES_SHOWN - len(rest), CURVES_SHOWN * 2 // 3)
    shown = [*done[:room], *rest][:CURVES_SHOWN]
    names = [f"trial {t.number}{'' if t.state == 'complete' else f' ({t.state})'}" for t in shown]
    series = {
        name: ([step for step, _ in trial.curve], [value for _, value in trial.curve])
        for name, trial in zip(names, shown, strict=True)
    }
    objective = sweep.objectives[0]
    drawing = figures.line_plot(
        series,
        x_label="optimiser step",
        y_label=UNITS.get(objective.name, ""),
        log_y=_is_wide(value for _, y in series.values() for value in y),
        bold=names[: min(CURVES_BOLD, len(done))],
        size=(920, 340),
        label=f"{objective.name} during training",
    )
    explained = f"{len(shown)} of the {len(done) + len(rest)} trials with held-out values during training."
    explained += f" Bold: the best {min(CURVES_BOLD, len(done))}." if done else ""
    return f'{plot(_better(objective), drawing)}<p class="small">{escape(explained)}</p>'


def importance(sweep: SweepRecord) -> str:
    """How much of each objective's differences each setting explains."""
    done = sum(trial.state == "complete" for trial in sweep.trials)
    plots = []
    for name, _ in sweep.objectives:
        if shares := sweep.importance.get(name):
            ordered = sorted(shares.items(), key=lambda share: (-share[1], share[0]))
            drawing = figures.bar_plot(
                dict(ordered), x_label="share explained", label=f"importance of settings for {name}"
            )
            plots.append(plot(name, drawing))
    if not plots:
        return ""
    explained = (
        f"How much each setting tells the best quarter of {done} complete trials from all of them, by PED-ANOVA: "
        "a hint where trials are few, and nothing about whether more or less of a setting is better."
    )
    return f'{_grid(plots)}<p class="small">{escape(explained)}</p>'


def slices(sweep: SweepRecord, ranking: Ranking) -> str:
    """Each objective over each searched field."""
    plots = []
    for objective in sweep.objectives:
        for name, text in sweep.space.items():
            done = [trial for trial in ranking.done if name in trial.settings]
            if not done:
                continue
            values = [trial.settings[name] for trial in done]
            numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            categories = None
            if text.startswith("choice") or not numeric:
                ordered = sorted(values) if numeric else sorted(values, key=str)
                categories = list(dict.fromkeys(str(value) for value in ordered))
            points = [
                _point(t, v if categories is None else str(v), objective, t.number in ranking.front)
                for t, v in zip(done, values, strict=True)
            ]
            drawing = figures.scatter_plot(
                points,
                x_label=name,
                y_label=UNITS.get(objective.name, ""),
                log_x=categories is None and text.startswith("log"),
                log_y=_is_wide(point.y for point in points),
                categories=categories,
                label=f"{objective.name} over {name}",
            )
            plots.append(plot(f"{_better(objective)} over {name}", drawing))
    if not plots:
        return ""
    blue = "the best trial" if len(sweep.objectives) == 1 else "the Pareto front"
    explained = f"Complete trials, whose other settings differ too; blue: {blue}.{_bars(sweep)}"
    return f'{_grid(plots)}<p class="small">{escape(explained)}</p>'


def pareto(sweep: SweepRecord, ranking: Ranking) -> str:
    """The second objective over the first, with the trials that no other surpasses."""
    if len(sweep.objectives) < 2 or not ranking.done:
        return ""
    first, second, *others = sweep.objectives
    points, line = [], []
    for trial in ranking.done:
        x = trial.values.get(first.name)
        if x is None or not math.isfinite(x):
            continue
        points.append(_point(trial, x, second, trial.number in ranking.front))
        y = trial.values.get(second.name)
        if trial.number in ranking.front and y is not None:
            line.append((x, y))
    drawing = figures.scatter_plot(
        points,
        x_label=" ".join(filter(None, (first.name, UNITS.get(first.name, "")))),
        y_label=UNITS.get(second.name, ""),
        line=[] if others else sorted(line),
        line_label="Pareto front",
        size=(620, 380),
        label=f"{second.name} over {first.name}",
    )
    explained = "Blue: trials that no other surpasses in every objective."
    if others:
        names = ", ".join(objective.name for objective in others)
        explained += f" They are not joined: the front has further objectives, which this picture leaves out ({names})."
    explained += _bars(sweep)
    shown = plot(f"{_better(second)} over {_better(first)}", drawing)
    return f'{shown}<p class="small">{escape(explained)}</p>'


def seeds(sweep: SweepRecord, ranking: Ranking) -> str:
    """Whether the best trial may owe its place to luck: in a sentence, and as the spread of each trial."""
    if sweep.seeds == 1:
        return (
            "<p>Each configuration was trained with one seed, and one seed per configuration cannot tell a setting's "
            "effect from luck. Train the best ones again with several seeds before relying on their order.</p>"
        )
    sentences, plots = [], []
    for objective in sweep.objectives:
        order = sorted(ranking.done, key=lambda trial: (_cost(trial, objective), trial.number))
        sentences.append(f"<li>{escape(_lead(order, objective))}</li>")
        shown = [trial for trial in order if _spread(trial, objective.name)][:SPREADS_SHOWN]
        if not shown:
            continue
        drawing = figures.scatter_plot(
            [_point(trial, str(trial.number), objective, trial is order[0]) for trial in shown],
            x_label="trial, best first",
            y_label=UNITS.get(objective.name, ""),
            categories=[str(trial.number) for trial in shown],
            label=f"{objective.name} over the seeds of each trial",
        )
        plots.append(plot(f"{_better(objective)}: lowest, median and highest of {sweep.seeds} seeds", drawing))
    return f'<ul class="verdicts">{"".join(sentences)}</ul>{_grid(plots)}'


def pictures(out: str, sweep: SweepRecord, ranking: Ranking) -> str:
    """What the models of the best trials make of a held-out clip; a picture that is lost is said and not fatal."""
    shown, notes, wide = [], [], False
    for trial in ranking.done[:PICTURES_SHOWN]:
        if not trial.picture:
            continue
        title = f"trial {trial.number}: {_values_text(trial, sweep.objectives)}"
        try:
            with Image.open(io.BytesIO(store.read_bytes(store.join(out, trial.picture))), formats=["PNG"]) as image:
                picture = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError):  # the last is Pillow's for a PNG whose chunks are broken
            note = f"The picture of trial {trial.number}, {trial.picture}, is missing or damaged."
            notes.append(f'<p class="note">{escape(note)}</p>')
            continue
        wide |= picture.shape[1] > 2 * picture.shape[0]
        drawn = still(picture, f"a held-out clip with what {title} makes of it")
        shown.append(plot(title, f'<p class="small">{escape(_settings_text(trial))}</p>{drawn}'))
    # Strips of frames go one below the other: beside each other they would be small, and equal times lie in a column.
    return "".join(notes) + ("".join(shown) if wide else _grid(shown))


def failures(sweep: SweepRecord) -> str:
    """The trials that failed, with the whole reasons."""
    failed = [trial for trial in sweep.trials if trial.state == "failed"]
    if not failed:
        return ""
    rows = [
        [
            str(trial.number),
            escape(trial.reason or "no reason was recorded"),
            escape(_settings_text(trial)),
            str(trial.attempts),
            escape(trial.folder),
        ]
        for trial in failed
    ]
    return _table(["trial", "reason", "settings", "attempts", "folder"], rows, "text")


def provenance(sweep: SweepRecord, commands: Sequence[str] = ()) -> str:
    """Command lines, data, search space and search of a sweep."""
    facts = {
        "preset": sweep.preset,
        "data": sweep.data,
        "dataset": sweep.dataset_id or "none: not a dataset folder",
        "objectives": ", ".join(f"{name} ({direction})" for name, direction in sweep.objectives),
        "sampler": f"{sweep.sampler}, seed {sweep.seed}",
        "pruner": sweep.pruner,
        "seeds per configuration": sweep.seeds,
        "trials wanted": sweep.wanted,
        "settings of all trials": _pairs(sweep.settings) or "the preset's",
    }
    parts = [f'<pre class="command">{escape(chr(10).join(commands))}</pre>'] if commands else []
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    parts.append(f"<dl>{rows}</dl>")
    space = [[escape(name), escape(text)] for name, text in sweep.space.items()]
    parts.append(_table(["searched field", "distribution"], space, "text"))
    return "".join(parts)


def _cost(trial: TrialRecord, objective: Objective) -> float:
    """What is to be small; infinite where there is no finite value."""
    value = trial.values.get(objective.name)
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if objective.direction == "maximize" else value


def _spread(trial: TrialRecord, name: str) -> tuple[float, float] | None:
    """Lowest and highest value of an objective over the seeds of a trial."""
    values = [values[name] for values in trial.seed_values if name in values and math.isfinite(values[name])]
    return (min(values), max(values)) if values else None


def _gain(ranking: Ranking, objective: Objective) -> str:
    """How far the best trial is from the median one."""
    values = [trial.values[objective.name] for trial in ranking.done if math.isfinite(_cost(trial, objective))]
    if len(values) < 2:
        return ""
    difference = ranking.done[0].values[objective.name] - statistics.median(values)
    if difference == 0:
        return f", which is also the median of the {len(values)} complete trials"
    way = "above" if difference > 0 else "below"
    return f", {_with_unit(abs(difference), objective.name)} {way} the median of the {len(values)} complete trials"


def _lead(order: Sequence[TrialRecord], objective: Objective) -> str:
    """Whether the best trial's worst seed beats the second best trial's median."""
    name = objective.name
    ranked = [trial for trial in order if math.isfinite(_cost(trial, objective))]
    spread = _spread(ranked[0], name) if ranked else None
    if len(ranked) < 2 or spread is None:
        return f"{name}: fewer than two trials are complete, so there is nothing to compare."
    best, second = ranked[:2]
    worst, median = spread[0 if objective.direction == "maximize" else 1], second.values[name]
    beats = worst > median if objective.direction == "maximize" else worst < median
    verb = "beats" if beats else "does not beat"
    meaning = "its lead is more than the spread of its seeds" if beats else "its lead may be luck"
    return (
        f"{name}: the worst seed of the best trial, {best.number}, {verb} the median of the second best, "
        f"{second.number} ({_with_unit(worst, name)} against {_with_unit(median, name)}): {meaning}."
    )


def _point(trial: TrialRecord, x: int | float | str, objective: Objective, bold: bool) -> Point:
    value = trial.values.get(objective.name)
    spread = _spread(trial, objective.name) if len(trial.seed_values) > 1 else None
    title = f"trial {trial.number}: {objective.name} {_with_unit(value, objective.name)}; {_settings_text(trial)}"
    return Point(x, value, title, bold, *(spread or (None, None)))


def _settings_column(sweep: SweepRecord, name: str) -> pa.Array:
    values = [trial.settings.get(name) for trial in sweep.trials]
    kinds = {type(value) for value in values if value is not None}
    known = TYPES.get(sweep.space[name].partition(":")[0])
    if known is not None and kinds <= ({int} if known == pa.int64() else {int, float}):
        return pa.array(_plain(values), known)
    for type_, allowed in ((pa.bool_(), {bool}), (pa.int64(), {int}), (pa.float64(), {int, float})):
        if kinds and kinds <= allowed:
            return pa.array(_plain(values), type_)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _plain(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_wide(values: Iterable[int | float | None]) -> bool:
    """Whether values need a logarithmic axis."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) > 30 * min(known)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _setting(trial: TrialRecord, name: str) -> str:
    """A cell of a setting; its exact value shows when it is pointed at."""
    if name not in trial.settings:
        return "&ndash;"
    value = trial.settings[name]
    shown = escape(_text(value))
    return f'<span title="{escape(repr(value))}">{shown}</span>' if isinstance(value, float) else shown


def _pairs(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in settings.items())


def _settings_text(trial: TrialRecord) -> str:
    return _pairs(trial.settings) or "no settings"


def _with_unit(value: float | None, name: str) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g} {UNITS.get(name, '')}".rstrip()


def _values_text(trial: TrialRecord, objectives: Sequence[Objective]) -> str:
    return ", ".join(f"{name} {_with_unit(trial.values.get(name), name)}" for name, _ in objectives)


def _value_text(trial: TrialRecord, name: str, seeds: int) -> str:
    value, spread = trial.values.get(name), _spread(trial, name)
    if value is None:
        return "&ndash;"
    return f"{value:.4g} ({spread[0]:.4g} to {spread[1]:.4g})" if seeds > 1 and spread else f"{value:.4g}"


def _seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "&ndash;"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _better(objective: Objective) -> str:
    return f"{objective.name} ({'higher' if objective.direction == 'maximize' else 'lower'} is better)"


def _objective_head(objective: Objective) -> str:
    better, sign = ("higher", "\u2191") if objective.direction == "maximize" else ("lower", "\u2193")
    unit = UNITS.get(objective.name, "")
    name = f"{objective.name} ({unit})" if unit else objective.name
    return f'{escape(name)} <span class="arrow" title="{better} is better">{sign}</span>'


def _bars(sweep: SweepRecord) -> str:
    return f" Bars: lowest to highest of {sweep.seeds} seeds." if sweep.seeds > 1 else ""


def _grid(plots: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table of cells that are HTML already; the first in a row says what the row is about."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{text}</td>" for text in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
