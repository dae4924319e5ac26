"""PROVIDE's evaluation on Bouncing Balls: the paper's tables with a checkpoint's numbers beside the published ones.

    Table 1      decomposition of the first 10, 20, 30 and 40 frames: ARI, F-ARI, MSE
    Table 2      the same on 6 to 8 balls (or on --data), with more slots than the model was trained with
    Table 3      ablation: which of its rows the checkpoint is
    Prediction   3, 5, 7 and 10 frames after 20 that were seen (figure 5, of which no numbers are published)
    Velocity     cosine between predicted and true velocities (figure 4 of the later submission)

ARI is per frame, then a mean over frames and videos; F-ARI leaves out the true background. Every video is encoded once,
40 frames long: a causal model's first 10 frames do not depend on the others. Videos stream through in batches, and of
each only its scores are kept. Videos without a true segmentation count in MSE alone.

Beside a folder of colour videos stand the paper's numbers of colour Bouncing Balls and of CLEVRER: what it holds, its
user knows.

Source: Zablotskaia et al., "PROVIDE" (2020, arXiv 2006.14727), sections 4.2 to 4.6 and supplement A.3, C. Where the
paper is silent: Table 2 is measured at 10 frames (what the released code's README tests) and at 40.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from objdyn.clips import Clip, collate, stack_truth, to_model_input
from objdyn.families import describe
from objdyn.metrics import segmentation
from objdyn.metrics.image import frame_mse
from objdyn.simulators import bouncing_balls
from pipeline import claim, segments, status, store
from pipeline.checkpoint import Loaded, code_revision, config_from_json, config_to_json, load_weights
from pipeline.cli import command
from pipeline.config import EvaluateRun, TrainRun, torch_device
from pipeline.evaluate import batches, confidence_interval, open_model, pad_objects
from pipeline.reader import Source, iter_clips, open_source
from pipeline.report import training_facts, versions

SCHEMA = 1
LENGTHS = (10, 20, 30, 40)
SEEN, AHEAD = 20, (3, 5, 7, 10)
"""Frames seen before predicting, and the predicted frames that are reported."""
MORE_LENGTHS = (10, 40)
MORE_BALLS = (6, 8)
ABLATION_LENGTH = 20
"""Frames at which Table 3 is measured: its last row is Table 1's at 20."""
LIMIT = 200
CLAMP, CLAMP_FROM = 10.0, 20
"""SEQ-IODINE on binary videos of so many frames or more bounds gradients and updates (supplement A.3)."""
NO_FEATURES = (
    "The published numbers most likely include features of an ImageNet SqueezeNet, which the released code gives its "
    "refinement by default; ours have none."
)
NO_TRUTH = "the videos hold no true segmentation"
METRICS = ("ari", "fg_ari", "mse")
HEADS = {"ari": "ARI", "fg_ari": "F-ARI", "mse": "MSE", "r2_y": "R^2 y", "r2_x": "R^2 x", "r2": "R^2"}

Published = TypeVar("Published")

PAPER_TABLE_1: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {
    "binary": {
        "R-NEM": (
            (0.5031, 0.6199, 0.6632, 0.6833),
            (0.6259, 0.7325, 0.7708, 0.7899),
            (0.0252, 0.0138, 0.0096, 0.0076),
        ),
        "IODINE": ((0.0318,) * 4, (0.9986,) * 4, (0.0018,) * 4),
        "SEQ-IODINE": (
            (0.0230, 0.0223, 0.0021, -0.0201),
            (0.8645, 0.6028, 0.5444, 0.4063),
            (0.0385, 0.0782, 0.0846, 0.0968),
        ),
        "PROVIDE": ((0.7169, 0.7263, 0.7286, 0.7294), (0.9999,) * 4, (0.0004,) * 4),
    },
    "colour": {
        "IODINE": ((0.5841,) * 4, (0.9752,) * 4, (0.0014,) * 4),
        "SEQ-IODINE": (
            (0.3789, 0.3743, 0.3225, 0.2654),
            (0.7517, 0.8159, 0.7537, 0.6734),
            (0.0160, 0.0164, 0.0217, 0.0270),
        ),
        "PROVIDE": ((0.7275, 0.7291, 0.7298, 0.7301), (1.0, 1.0, 0.9999, 0.9999), (0.0002,) * 4),
    },
    "CLEVRER": {
        "IODINE": ((0.1791,) * 4, (0.9316,) * 4, (0.0004,) * 4),
        "SEQ-IODINE": (
            (0.1171, 0.1378, 0.1558, 0.1684),
            (0.8520, 0.8774, 0.8780, 0.8759),
            (0.0009, 0.0009, 0.0010, 0.0010),
        ),
        "PROVIDE": ((0.2220, 0.2403, 0.2555, 0.2681), (0.9182, 0.9258, 0.9309, 0.9312), (0.0003,) * 4),
    },
}
"""ARI, F-ARI and MSE at ``LENGTHS``: Table 1 of the paper, 4 balls, and 3 to 5 objects of CLEVRER. IODINE has one
number, of the longest videos."""
PAPER_TABLE_2: dict[str, dict[str, tuple[float, float, float]]] = {
    "binary": {
        "R-NEM": (0.4484, 0.6377, 0.0328),
        "IODINE": (0.0271, 0.9969, 0.0040),
        "SEQ-IODINE": (0.0263, 0.8874, 0.0521),
        "PROVIDE": (0.4453, 0.9999, 0.0008),
    },
    "colour": {
        "IODINE, 4 colours": (0.4136, 0.8211, 0.0138),
        "IODINE, 8 colours": (0.2823, 0.7197, 0.0281),
        "SEQ-IODINE, 4 colours": (0.2068, 0.5854, 0.0338),
        "SEQ-IODINE, 8 colours": (0.1571, 0.5231, 0.0433),
        "PROVIDE, 4 colours": (0.4275, 0.9998, 0.0004),
        "PROVIDE, 8 colours": (0.4317, 0.9900, 0.0114),
    },
    "CLEVRER": {
        "IODINE": (0.2205, 0.9305, 0.0006),
        "SEQ-IODINE": (0.1482, 0.8645, 0.0012),
        "PROVIDE": (0.2839, 0.9355, 0.0004),
    },
}
"""ARI, F-ARI and MSE: Table 2 of the paper, 6 to 8 balls, trained with 5 slots on 4 balls and tested with 9; CLEVRER
with 6 objects, trained with 6 slots and tested with 7."""
PAPER_TABLE_3: tuple[tuple[tuple[bool, bool, bool, int], tuple[float, float, float]], ...] = (
    ((False, False, False, 20), (0.0126, 0.7765, 0.0340)),
    ((True, True, False, 20), (0.2994, 0.9999, 0.0010)),
    ((True, True, False, 40), (0.3528, 0.9998, 0.0010)),
    ((True, True, True, 40), (0.7263, 0.9999, 0.0004)),
)
"""(grid, conditional prior and generation, entropy, training length) and ARI, F-ARI, MSE: Table 3, binary balls."""


class Row(NamedTuple):
    """A line of a table."""

    name: str
    origin: str
    """``ours``, ``paper`` or ``baseline``."""
    values: Mapping[str, Sequence[float | None]]
    """By metric, one value per column."""
    reasons: Mapping[str, str] = {}
    """Why a value is missing, by ``METRIC/LENGTH`` or ``*``."""
    interval95: Mapping[str, Sequence[Sequence[float] | None]] = {}
    """Bootstrap over videos."""


class Table(NamedTuple):
    """One table of the paper with ours."""

    title: str
    columns: tuple[str, ...]
    """Of each metric."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = METRICS
    formats: Mapping[str, str] = {}
    """How to print the values of a metric; four decimals where not given."""


class Found(NamedTuple):
    """Scores of one pass over the videos, each (videos, columns).

    ARI and F-ARI are NaN for videos without a true segmentation, and not there if no video has one.
    """

    lengths: Mapping[str, np.ndarray]
    """Mean over the first so many frames, by metric, also of the baselines (``one_cluster_ari``)."""
    ahead: Mapping[str, np.ndarray]
    """At each of ``AHEAD[-1]`` predicted frames; empty where nothing was predicted."""
    velocity: Sequence[segmentation.VelocityCosine]
    """One per batch."""


class Videos(NamedTuple):
    """Test videos."""

    data: str
    source: Source
    options: bouncing_balls.Options | None
    """None for a dataset folder."""
    notes: tuple[str, ...] = ()


@store.job_into_folder
def bouncing_balls_protocol(run: EvaluateRun) -> str:
    """Evaluate a checkpoint by the protocol, publish ``protocol.json`` in ``run.out``, return the tables as text.

    Raises:
        ValueError: checkpoint, data and settings do not fit together; the message says what to do.
    """
    out = store.resolve(run.out, "--out")
    with claim.hold(out, "evaluate", kind="evaluation") as held:
        return _protocol(run, out, held)


def _protocol(run: EvaluateRun, out: str, held: claim.Claim) -> str:
    device = torch_device(run.device)
    # The folder of one step: a run that goes on has another last checkpoint by the next pass.
    checkpoint = load_weights(store.resolve(run.checkpoint, "--checkpoint"), which=run.which).path
    base = dataclasses.replace(run, set=tuple(word for word in run.set if not word.startswith("model.num_slots=")))
    loaded, changed = open_model(base, checkpoint, device)
    slots = None
    if base.set != run.set:
        slots = open_model(run, checkpoint, device)[0].config.num_slots
    if "model.inference" in changed:
        raise ValueError("the protocol runs both ways of inference itself; leave model.inference out of --set")
    trained = trained_by(loaded)
    videos = _videos(run.data or trained.data, run, derived=not run.data)
    binary = _is_binary(videos.source)
    kind = "binary" if binary else "colour"
    bench = _Bench(base, checkpoint, device, binary)

    main = bench.measure(loaded, videos, LENGTHS, predict=True)
    first = [_ours(loaded.family.upper(), main.lengths, LENGTHS, videos), *_baselines(main.lengths, LENGTHS, videos)]
    first[1:1] = bench.sequential(loaded, videos, LENGTHS, "SEQ-IODINE")
    more = list[str]()
    if not describe(loaded.config).causal:
        more.append(f"Family {loaded.family} is not causal: the first frames were encoded together with later ones.")
    if slots is not None:
        more.append(f"Slots: {loaded.config.num_slots}, as in training; --set model.num_slots is for Table 2 alone.")
    table1 = Table(
        f"Table 1. Decomposition, {kind}, length",
        tuple(map(str, LENGTHS)),
        (*(_paper(name, rows) for name, rows in _published(PAPER_TABLE_1, kind, videos).items()), *first),
        (
            *videos.notes,
            *more,
            *unfinished(loaded),
            *_whose_numbers(kind, videos, "4 balls", "3 to 5 objects"),
            *_segmented(main.lengths),
            NO_FEATURES,
            "The paper's IODINE is one number, of the longest videos; it is repeated for every length.",
        ),
    )
    tables = {
        "table1": table1,
        "table2": bench.more_balls(loaded, videos, slots, kind),
        "table3": _ablation(loaded, trained, main, videos, binary),
        "prediction": _prediction(loaded, main, videos),
    }
    velocity = _velocity(main, loaded, videos)
    text = "\n\n".join([*(render(table) for table in tables.values()), velocity["text"]])
    held.check()
    store.publish_json(
        store.join(out, "protocol.json"),
        {
            "schema": SCHEMA,
            "kind": "protocol",
            "protocol": run.protocol,
            "paper": "arXiv 2006.14727",
            "model": loaded.model_id,
            "family": loaded.family,
            "step": loaded.step,
            "config": config_to_json(loaded.config),
            "model_settings_changed": changed,
            "data": videos.data,
            "dataset": videos.source.id,
            "videos": bench.limit(videos.source),
            "colours": kind,
            "seeds": {
                "training": loaded.run.get("seed"),
                "data": None if videos.options is None else videos.options.seed,
                "intervals": 0,
            },
            "command": command("jobs/evaluate.py", run),
            "code": code_revision(),
            "versions": versions(),
            "device": str(device),
            "training": training_facts(loaded.family, loaded.run, loaded.code, loaded.dataset_id),
            "tables": {name: to_json(table) for name, table in tables.items()},
            "velocity_cosine": velocity,
            "text": text,
        },
    )
    return text


def more_balls(options: bouncing_balls.Options, colors: str) -> tuple[bouncing_balls.Options, tuple[str, ...]]:
    """The training data's videos with 6 to 8 balls, and what else had to change for that.

    Balls that large do not always fit in; then radii and masses are those of R-NEM, which are the same for 4 balls and
    for 6 to 8.
    """
    frames = max(options.frames, LENGTHS[-1])
    try:
        return dataclasses.replace(options, balls=MORE_BALLS, colors=colors, frames=frames), ()
    except ValueError:
        assert options.radius is not None
        low, high = options.radius
        note = (
            f"{MORE_BALLS[1]} balls of the training radii {low:g} to {high:g} do not fit into the box, so these have "
            "R-NEM's radii of 0.8 and 1.0"
        )
        changed = dataclasses.replace(options, balls=MORE_BALLS, colors=colors, frames=frames, radius=None)
        return changed, (note,)


def render(table: Table) -> str:
    """A table as aligned text, with its notes and reasons."""
    heads = ["", *(f"{HEADS[metric]} {column}".strip() for metric in table.metrics for column in table.columns)]
    lines = [heads]
    reasons: dict[str, int] = {}
    for row in table.rows:
        cells = []
        for metric in table.metrics:
            values, style = row.values.get(metric, [None] * len(table.columns)), table.formats.get(metric, ".4f")
            for column, value in zip(table.columns, values, strict=True):
                reason = row.reasons.get(f"{metric}/{column.removeprefix('at ')}", row.reasons.get("*", ""))
                mark = f"[{reasons.setdefault(reason, len(reasons) + 1)}]" if value is None and reason else ""
                cells.append(f"-{mark}" if value is None else format(value, style))
        origin = "" if row.origin == "baseline" else f" ({row.origin})"
        lines.append([f"{row.name}{origin}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    below = [*(f"[{number}] {reason}" for reason, number in reasons.items()), *table.notes]
    return "\n".join([table.title, *(line.rstrip() for line in shown), *below])


class _Bench:
    """Runs models over videos with the settings of one evaluation."""

    def __init__(self, run: EvaluateRun, checkpoint: str, device: torch.device, binary: bool) -> None:
        self.run, self.checkpoint, self.device, self.binary = run, checkpoint, device, binary

    def limit(self, source: Source) -> int:
        """Videos that are evaluated."""
        return min(self.run.limit or LIMIT, sum(source.shard_sizes))

    def load(self, **more: Any) -> Loaded:
        """The model with further settings."""
        return open_model(self.run, self.checkpoint, self.device, more)[0]

    def measure(self, loaded: Loaded, videos: Videos, lengths: Sequence[int], *, predict: bool = False) -> Found:
        """Score one pass over the videos.

        Raises:
            ValueError: there is no video.
        """
        source, family = videos.source, describe(loaded.config)
        fitting = [length for length in lengths if length <= source.num_frames]
        if not fitting:
            return Found({}, {}, ())
        predict = predict and "rollout" in family.verbs and SEEN + AHEAD[-1] <= source.num_frames
        longest = max(*fitting, SEEN + AHEAD[-1]) if predict else max(fitting)
        scored: list[tuple[int, segments.Scores]] = []
        ahead: list[tuple[int, segments.Scores]] = []
        velocity: list[segmentation.VelocityCosine] = []
        progress = status.Status("protocol", self.limit(source), "videos", split=source.split, family=loaded.family)
        truth = ("segmentation", "positions", "present", *family.inputs)
        for clips in progress.each(batches(iter_clips(source, progress.total, longest, truth), self.run.batch_size)):
            video = to_model_input(collate(clips), self.device)
            inputs = stack_truth(clips, family.inputs, self.device)
            with torch.no_grad():
                whole = loaded.model.encode(video, **inputs)
                made = segments.render(loaded.model, whole, masks=True)
                per_frame = _reconstruction(clips, video, made)
                scored.append((len(clips), {name: _means(values, fitting) for name, values in per_frame.items()}))
                if predict:
                    seen = whole if family.causal else loaded.model.encode(video[:, :SEEN], **inputs)
                    errors, speeds = _future(loaded, clips, video, segments.cut(seen, 0, SEEN))
                    ahead.append((len(clips), errors))
                    velocity += speeds
        if not progress.done:
            raise ValueError(f"split {source.split!r} of {videos.data} has no videos; there is nothing to evaluate")
        return Found(segments.join(scored), segments.join(ahead), tuple(velocity))

    def sequential(self, loaded: Loaded, videos: Videos, lengths: Sequence[int], name: str, **more: Any) -> list[Row]:
        """SEQ-IODINE, if the model is an IODINE; on binary videos it is clamped from 20 frames on."""
        if not hasattr(loaded.config, "inference") or "rollout" in describe(loaded.config).verbs:
            return []
        clamped = loaded.config.sequential_clamp is None and self.binary
        short = [length for length in lengths if length < CLAMP_FROM or not clamped]
        passes = [(short, {})] if short else []
        if long := [length for length in lengths if length not in short]:
            passes.append((long, {"sequential_clamp": CLAMP}))
        parts = []
        for group, clamp in passes:
            found = self.measure(self.load(**more, **clamp, inference="sequential"), videos, group)
            parts.append(_ours(name, found.lengths, group, videos))
        return [_side_by_side(parts)]

    def more_balls(self, loaded: Loaded, videos: Videos, slots: int | None, kind: str) -> Table:
        """Table 2: on videos of the simulator with more balls, or with ``slots`` slots on the videos that there are."""
        rows = [Row(name, "paper", dict(zip(METRICS, [(v,) * 2 for v in values], strict=True)))
                for name, values in _published(PAPER_TABLE_2, kind, videos).items()]  # fmt: skip
        columns = tuple(f"at {length}" for length in MORE_LENGTHS)
        balls = f"{MORE_BALLS[0]}-{MORE_BALLS[1]} balls" if videos.options else "more objects"
        title = f"Table 2. Generalization to {balls}, {kind}"
        name = loaded.family.upper()
        whose = _whose_numbers(kind, videos, f"{MORE_BALLS[0]} to {MORE_BALLS[1]} balls", "6 objects")
        if videos.options is None and slots is None:
            reason = (
                f"{videos.data} is not sim:bouncing-balls, so videos with more balls cannot be made like it; evaluate "
                "a dataset that has them with --data DIR --set model.num_slots=9"
            )
            return Table(title, columns, (*rows, Row(name, "ours", {}, {"*": reason})), (*whose, NO_FEATURES))
        settings = {"num_slots": slots or MORE_BALLS[1] + 1} if hasattr(loaded.config, "num_slots") else {}
        wider, notes = self.load(**settings), list[str]()
        for test, label, said in self._wider_tests(videos, kind):
            found = self.measure(wider, test, MORE_LENGTHS)
            rows.append(_ours(f"{name}{label}", found.lengths, MORE_LENGTHS, test))
            rows += self.sequential(loaded, test, MORE_LENGTHS, f"SEQ-IODINE{label}", **settings)
            rows += _baselines(found.lengths, MORE_LENGTHS, test, label)
            notes += [*said, *_segmented(found.lengths)]
        if settings:
            notes.append(f"Slots: trained with {loaded.config.num_slots}, tested with {settings['num_slots']}.")
        else:
            notes.append(f"Family {loaded.family} has no number of slots to change: tested as it was trained.")
        notes += [*whose, "The paper does not say how long its videos are here; its numbers stand in both columns."]
        return Table(title, columns, tuple(rows), (*dict.fromkeys(notes), NO_FEATURES))

    def _wider_tests(self, videos: Videos, kind: str) -> list[tuple[Videos, str, tuple[str, ...]]]:
        """The videos of Table 2, a label for their rows, and notes."""
        if videos.options is None:
            return [(videos, "", (f"{videos.notes[0]} The same videos as in Table 1.",))]
        own, tests = videos.options.colors, []
        for colors in [own, own.replace("4", "8")] if own.endswith("4") else [own]:
            options, changed = more_balls(videos.options, colors)
            data = f"sim:{options.name}"
            said = (f"{data}, split {self.run.split}.", *(f"{note[0].upper()}{note[1:]}." for note in changed))
            label = "" if kind == "binary" else f", {colors[-1]} colours"
            tests.append((Videos(data, open_source(data, self.run.split), options), label, said))
        return tests


def trained_by(loaded: Loaded) -> TrainRun:
    """The run that trained the model, in the stage in which it was saved."""
    return config_from_json(TrainRun, loaded.run).stage(loaded.stage - 1)


def unfinished(loaded: Loaded) -> tuple[str, ...]:
    """A note where the training has steps to go."""
    run = config_from_json(TrainRun, loaded.run)
    if loaded.step >= run.steps:
        return ()
    stages = f", in stage {loaded.stage} of {len(run.stages)}" if run.stages else ""
    return (f"Training is not finished: step {loaded.step} of {run.steps}{stages}.",)


def _videos(data: str, run: EvaluateRun, *, derived: bool) -> Videos:
    """Open the test videos; those derived from the training data are made long enough."""
    name, _, text = data.removeprefix("sim:").partition(":")
    if not (data.startswith("sim:") and name == "bouncing-balls"):
        if derived:
            raise ValueError(f"the checkpoint was trained on {data or 'no data'}, not on sim:bouncing-balls; say with "
                             "--data what to test on, for example sim:bouncing-balls")  # fmt: skip
        path = store.resolve(data, "--data")
        return Videos(path, open_source(path, run.split), None, (f"Data: {path}, split {run.split}.",))
    options = bouncing_balls.parse(text)
    notes = []
    if derived and options.frames < LENGTHS[-1]:
        notes.append(f"Trained on videos of {options.frames} frames, tested on {LENGTHS[-1]}.")
        options = dataclasses.replace(options, frames=LENGTHS[-1])
    path = f"sim:{options.name}"
    source = open_source(path, run.split)
    return Videos(path, source, options, (f"Data: {path}, split {run.split}.", *notes))


def _is_binary(source: Source) -> bool:
    """Whether the first video has grey balls only."""
    for clip in iter_clips(source, 1, truth=()):
        return bool((clip.frames == clip.frames[..., :1]).all())
    raise ValueError(f"split {source.split!r} of {source.id} has no videos; there is nothing to evaluate")


def _published(table: Mapping[str, Mapping[str, Published]], kind: str, videos: Videos) -> dict[str, Published]:
    """The paper's rows for videos of a kind, by name; colour videos of a folder may be CLEVRER as well as balls."""
    rows = dict(table[kind])
    if videos.options is None and kind == "colour":
        rows |= {f"{name}, CLEVRER": values for name, values in table["CLEVRER"].items()}
    return rows


def _whose_numbers(kind: str, videos: Videos, balls: str, objects: str) -> tuple[str, ...]:
    """Which data the paper's rows are of, where that is not known to be like the data of ours."""
    if videos.options is not None:
        return ()
    clevrer = f", or, where the name says so, of CLEVRER with {objects}" if kind == "colour" else ""
    return (f"The paper's numbers are of its own data, {kind} Bouncing Balls with {balls}{clevrer}.",)


def _means(values: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Means over the first frames of each length, (videos, lengths)."""
    return np.stack([values[:, :length].mean(axis=1) for length in lengths], axis=1)


def _with_truth(found: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which videos have a true segmentation, as the baseline that needs no model tells; None if none has."""
    if "one_cluster_ari" not in found:
        return None
    known: np.ndarray = np.all(np.isfinite(found["one_cluster_ari"]), axis=1)
    return known


def _segmented(found: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """A note where only some of the videos have a true segmentation."""
    known = _with_truth(found)
    if known is None or known.all():
        return ()
    return (f"ARI and F-ARI are means over the {known.sum()} of {len(known)} videos that hold a true segmentation.",)


def _reconstruction(clips: Sequence[Clip], video: Tensor, made: segments.Rendered) -> segments.Scores:
    """Metrics of each frame, (videos, frames), with the baselines'."""
    assert made.segments is not None
    scores = segments.recon_scores(clips, made.segments, segments.frame_scores) if segments.has_truth(clips) else {}
    return scores | {"mse": frame_mse(made.video, video).double().cpu().numpy()}


def _future(
    loaded: Loaded, clips: Sequence[Clip], video: Tensor, seen: Any
) -> tuple[segments.Scores, list[segmentation.VelocityCosine]]:
    """Metrics of each predicted frame, (videos, frames), with the baselines'; and velocities where there is truth."""
    family, count = describe(loaded.config), AHEAD[-1]
    after, last = slice(SEEN, SEEN + count), slice(SEEN - 1, SEEN)
    context = segments.render(loaded.model, seen, masks=True)
    future = segments.render(loaded.model, loaded.model.rollout(seen, count), masks=True)
    assert context.segments is not None
    assert future.segments is not None
    scores: segments.Scores = {}
    if segments.has_truth(clips):
        of_future = segments.predict_scores(
            clips, future.segments, context.segments[:, -1:], context=SEEN, horizon=count
        )
        scores = {name.replace("predict_", ""): values for name, values in of_future.items()}
    for prefix, frames in (("", future.video), ("copy_last_", video[:, last].expand_as(future.video))):
        scores[f"{prefix}mse"] = frame_mse(frames, video[:, after]).double().cpu().numpy()
    if not (family.tracked and all("positions" in clip.truth for clip in clips)):
        return scores, []
    both = np.concatenate([context.segments, future.segments], axis=1)
    return scores, [_velocities(clips, both, future.components)]


def _velocities(clips: Sequence[Clip], found: np.ndarray, slots: int) -> segmentation.VelocityCosine:
    end = found.shape[1]
    most = max(clip.truth["positions"].shape[1] for clip in clips)
    positions = np.stack([pad_objects(clip.truth["positions"][:end], most) for clip in clips])
    present = np.stack([
        pad_objects(clip.truth.get("present", np.ones(clip.truth["positions"].shape[:2], dtype=bool))[:end], most)
        for clip in clips
    ])  # fmt: skip
    return segmentation.velocity_cosine(np.maximum(found, 0), slots, positions, present, context=SEEN)


def _paper(name: str, rows: Sequence[Sequence[float]]) -> Row:
    return Row(name, "paper", dict(zip(METRICS, rows, strict=True)))


def _ours(name: str, found: Mapping[str, np.ndarray], lengths: Sequence[int], videos: Videos, prefix: str = "") -> Row:
    """Means over videos at each length, with intervals, and reasons for what is missing.

    ARI and F-ARI are means over the videos that have a true segmentation.
    """
    with_truth = _with_truth(found)
    values: dict[str, list[float | None]] = {}
    intervals: dict[str, list[list[float] | None]] = {}
    reasons: dict[str, str] = {}
    for metric in METRICS:
        values[metric], intervals[metric] = [], []
        scores = found.get(f"{prefix}{metric}")
        if scores is not None and with_truth is not None and metric != "mse":
            scores = scores[with_truth]
        for column, length in enumerate(lengths):
            value = interval = None
            if length > videos.source.num_frames:
                reasons[f"{metric}/{length}"] = (
                    f"the videos have {videos.source.num_frames} frames, fewer than {length}"
                )
            elif scores is None:
                reasons[f"{metric}/{length}"] = "it reconstructs nothing" if metric == "mse" else NO_TRUTH
            elif not np.isfinite(scores[:, column]).all():
                reasons[f"{metric}/{length}"] = "the model gives values that are not finite"
            else:
                value = float(scores[:, column].mean())
                interval = confidence_interval(scores[:, column])
            values[metric].append(value)
            intervals[metric].append(interval)
    return Row(name, "baseline" if prefix else "ours", values, reasons, intervals)


def _baselines(found: Mapping[str, np.ndarray], lengths: Sequence[int], videos: Videos, label: str = "") -> list[Row]:
    names = (("one cluster", "one_cluster_"), ("threshold + components", "threshold_"))
    return [_ours(f"{name}{label}", found, lengths, videos, prefix) for name, prefix in names]


def _side_by_side(parts: Sequence[Row]) -> Row:
    """Rows of neighbouring columns as one."""
    first = parts[0]
    return Row(
        first.name,
        first.origin,
        {metric: [v for part in parts for v in part.values[metric]] for metric in METRICS},
        {name: reason for part in parts for name, reason in part.reasons.items()},
        {metric: [v for part in parts for v in part.interval95[metric]] for metric in METRICS},
    )


def _prediction(loaded: Loaded, found: Found, videos: Videos) -> Table:
    title = f"Prediction after {SEEN} frames (figure 5), at predicted frame"
    columns = tuple(map(str, AHEAD))
    name = loaded.family.upper()
    paper = Row("PROVIDE, R-NEM", "paper", {}, {"*": "the paper plots these curves and gives no numbers"})
    if not found.ahead:
        reason = (
            f"the videos have {videos.source.num_frames} frames, fewer than {SEEN + AHEAD[-1]}"
            if "rollout" in describe(loaded.config).verbs
            else f"family {loaded.family} does not predict: it has no rollout"
        )
        return Table(title, columns, (paper, Row(name, "ours", {}, {"*": reason})))
    at = [frame - 1 for frame in AHEAD]
    single = {key: values[:, at] for key, values in found.ahead.items()}
    means = {key: _means(values, AHEAD) for key, values in found.ahead.items()}
    rows = [
        paper,
        _ours(f"{name}, at the frame", single, AHEAD, videos),
        _ours(f"{name}, mean up to it", means, AHEAD, videos),
        _ours("copied last frame and masks", single, AHEAD, videos, "copy_last_"),
        _ours("one cluster", single, AHEAD, videos, "one_cluster_"),
        _ours("components of the last frame", single, AHEAD, videos, "threshold_"),
    ]
    note = "Baselines are at the frame; the copied masks are those of the model in the last frame that it saw."
    return Table(title, columns, tuple(rows), (note, *_segmented(found.ahead)))


def _velocity(found: Found, loaded: Loaded, videos: Videos) -> dict[str, Any]:
    """Velocity cosine at the predicted frames, the batches' means weighted by their pairs."""
    title = f"Velocity cosine after {SEEN} frames (later submission, figure 4; no numbers are published)"
    family = describe(loaded.config)
    if not found.velocity:
        reason = "the videos hold no true positions"
        if not (family.tracked and "rollout" in family.verbs):
            reason = f"family {loaded.family} does not follow objects into predicted frames"
        elif not found.ahead:
            reason = f"the videos have {videos.source.num_frames} frames, fewer than {SEEN + AHEAD[-1]}"
        return {"per_frame": None, "reason": reason, "text": f"{title}\n-: {reason}"}
    pairs = np.sum([part.pairs for part in found.velocity], axis=0)
    total = np.sum([np.nan_to_num(part.per_frame) * part.pairs for part in found.velocity], axis=0)
    per_frame = [float(t / n) if n else None for t, n in zip(total, pairs, strict=True)]
    used, dropped = (sum(getattr(part, name) for part in found.velocity) for name in ("videos_used", "videos_dropped"))
    told = ["-" if per_frame[n - 1] is None else f"{per_frame[n - 1]:.4f}" for n in (1, *AHEAD)]
    shown = "  ".join(f"{n}: {value}" for n, value in zip((1, *AHEAD), told, strict=True))
    skipped = np.sum([part.skipped for part in found.velocity], axis=0)
    words = (
        f"{used} videos used, {dropped} dropped because two balls are nearest to one slot or none is left; balls whose "
        f"slot stands still: {int(skipped.sum())} of {int((pairs + skipped).sum())}"
    )
    return {
        "per_frame": per_frame,
        "pairs": [int(n) for n in pairs],
        "skipped": [int(n) for n in skipped],
        "videos_used": used,
        "videos_dropped": dropped,
        "text": f"{title}\nat predicted frame  {shown}\n{words}",
    }


def _ablation(loaded: Loaded, trained: TrainRun, found: Found, videos: Videos, binary: bool) -> Table:
    """Table 3: the paper's rows, and the checkpoint as one of them or beside them."""
    title = "Table 3. Ablation, binary"
    rows = [
        Row(_ablation_name(*parts), "paper", {metric: [v] for metric, v in zip(METRICS, values, strict=True)})
        for parts, values in PAPER_TABLE_3
    ]
    config = loaded.config
    if not hasattr(config, "grid"):
        reason = f"family {loaded.family} has no 2D-LSTM, so it is none of the ablations"
        ours = Row(loaded.family.upper(), "ours", {}, {"*": reason})
        return Table(title, ("",), (*rows, ours), (NO_FEATURES,))
    conditional = (config.conditional_prior, config.conditional_decoder != "none")
    parts = (config.grid == "triangular", all(conditional), config.entropy_weight > 0, trained.clip_frames)
    notes = [f"The checkpoint is measured at {ABLATION_LENGTH} frames, as the paper's last row; length is training's."]
    if any(conditional) and not all(conditional):
        notes.append("The checkpoint has only one of conditional prior and conditional generation; the paper has both.")
    if parts not in [known for known, _ in PAPER_TABLE_3]:
        notes.append("The checkpoint is none of the paper's four.")
    if not binary:
        notes.append("The checkpoint was measured on colour videos; the paper's numbers are of binary ones.")
    column = LENGTHS.index(ABLATION_LENGTH)
    at = {name: values[:, column : column + 1] for name, values in found.lengths.items()}
    measured = [_ours(_ablation_name(*parts), at, (ABLATION_LENGTH,), videos)]
    measured += _baselines(at, (ABLATION_LENGTH,), videos)
    for row in measured:  # the table's one column has no heading
        without = {f"{name.partition('/')[0]}/": reason for name, reason in row.reasons.items()}
        rows.append(row._replace(reasons=without))
    return Table(title, ("",), tuple(rows), (*notes, *_segmented(found.lengths), NO_FEATURES))


def _ablation_name(grid: bool, conditional: bool, entropy: bool, length: int) -> str:
    parts = [name for name, on in (("grid", grid), ("CP+G", conditional), ("entropy", entropy)) if on]
    return f"{' + '.join(['base', *parts])}, length {length}"


def to_json(table: Table) -> dict[str, Any]:
    """A table as ``protocol.json`` has it."""
    return {
        "title": table.title,
        "columns": list(table.columns),
        "metrics": list(table.metrics),
        "rows": [
            {
                "name": row.name,
                "origin": row.origin,
                "values": {name: list(values) for name, values in row.values.items()},
                "interval95": {name: list(values) for name, values in row.interval95.items()},
                "reasons": dict(row.reasons),
            }
            for row in table.rows
        ],
        "notes": list(table.notes),
    }
