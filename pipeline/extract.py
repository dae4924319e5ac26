"""Checkpoint and shards in, tables of latents out: Ray Data schedules, one model per worker, one part per shard.

    OUT/settings.json            model and its changed settings, dataset, split, context, horizon, closing, extras,
                                 samples, edits: created first, never changed
    OUT/objects/<shard>.parquet  OUT/frames/<shard>.parquet
    OUT/parts/<shard>.json       rows and SHA-256 of both; written after them, and with it the part is done
    OUT/manifest.json            settings and all parts; written when the set is complete

Every file is published atomically under a name that follows from its shard. So whatever is killed, and whenever, the
next run with the same settings redoes the parts that are not done, under the same names, and no row comes twice.

Rows are of three kinds. ``posterior`` are all frames of a clip, each looked at. ``predicted`` are the frames that
follow the first ``context`` ones. ``interpolated`` are the frames between the first ``context`` and the last
``closing`` ones, given these alone. A frame that a prediction or an interpolation did look at has no row of that kind,
so that whatever is predicted or interpolated was not seen; the row of a seen frame is its ``posterior`` one.

A clip may have many predicted futures, told apart by two more parts of the key. ``sample`` is 0 for the model's
deterministic answer, and 1 .. N for futures drawn from it (``--samples N``): from the same context, whose latents are
the means, with draws that follow from the seed, the clip's key and the sample's number alone. ``edit`` is empty for the
clip as it is, and otherwise the name of a what-if edit of its context (``--edits FILE``, ``objdyn/models/what_if.py``);
sample n of an edit has the same draws as sample n of the clip as it is, so that they differ by the edit alone.
A family whose rollout draws nothing (provide, unless its ``prediction`` does) has N equal samples.
An edited future has no true frames, hence no ``predict_mse``. An edit that does not fit a clip has no rows there: the
part's record has the reason, and the job's last lines count them.

Of a family whose object k is not the same thing in all frames, objects/ has a column ``track`` beside its latents. The
flags of a run add more columns ("extras"):

    mask_summary   mask_area, mask_y, mask_x: pixels that the object wins as a share of all, and the middle of them (of
                   the soft mask, where it wins none), in [-1, 1] with align_corners
    masks          mask: the soft mask as uint8 (h, w), 255 is 1
    components     component: the object rendered alone as uint8 (h, w, c)
    state          the family's recurrent state

Images make tables large: at 64 pixels a row's mask has 4 kB and its component 12 kB before compression. A worker holds
the rows of one part in memory about twice; where that is too much, make shards of fewer clips.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from objdyn.clips import Clip, collate, stack_truth, to_model_input
from objdyn.families import FAMILIES, Family, describe
from objdyn.interface import Scene, VideoModel
from objdyn.metrics.image import frame_mse
from objdyn.metrics.segmentation import match_tracks, segment
from objdyn.models import what_if
from objdyn.models.dlp import Particles
from objdyn.models.what_if import Edit, Edited
from pipeline import claim, cluster, segments, status, store, tables
from pipeline.checkpoint import load_model, load_weights
from pipeline.config import ExtractRun, StorageConfig, parse_model_settings, recorded_model_settings
from pipeline.reader import Source, open_source
from pipeline.tables import Block, Provenance

RESTARTS = 5
"""Times that a worker's process is started again after it died, over all of its parts."""
RECORDS_AT_ONCE = 16
"""Records of parts that are read side by side: on object storage each is a request to wait for."""
EDITS_AT_ONCE = 32
"""Edited futures that are rolled out together."""
LATER_SETTINGS: dict[str, Any] = {
    "extras": [],
    "model_settings_changed": {},
    "closing": None,
    "samples": 0,
    "sample_seed": None,
    "edits": [],
    "clip": None,
}
"""Settings that folders of earlier versions do not have, with what they are there."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; plain values, so that it travels."""

    checkpoint: str
    data: str
    out: str
    limit: int | None
    batch_size: int
    device: str
    provenance: Provenance
    extras: tuple[str, ...] = ()
    """Names of optional columns, see above."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model that are not those of its training."""
    samples: int = 0
    """Drawn futures per clip and edit, beside the deterministic one."""
    sample_seed: int = 0
    edits: tuple[Edit, ...] = ()
    clip: str | None = None
    """The only clip, of a what-if; None takes those of the parts."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    @property
    def settings(self) -> dict[str, Any]:
        """What all parts of a folder have in common."""
        return {
            "schema": tables.SCHEMA_VERSION,
            "kind": "tables",
            "family": self.provenance.family,
            "model_id": self.provenance.model_id,
            "dataset_id": self.provenance.dataset_id,
            "split": self.provenance.split,
            "object_is_track": self.provenance.object_is_track,
            "context": self.provenance.context,
            "horizon": self.provenance.horizon,
            "closing": self.provenance.closing,
            "limit": self.limit,
            "extras": list(self.extras),
            "model_settings_changed": recorded_model_settings(self.overrides),
            "samples": self.samples,
            "sample_seed": self.sample_seed if self.samples else None,
            "edits": [edit.to_json() for edit in self.edits],
            "clip": self.clip,
        }


@dataclass(frozen=True)
class Part:
    """The clips of one shard."""

    name: str
    shard: int
    clips: int


class EditNote(NamedTuple):
    """What is to be said of one edit of one clip."""

    clip: str
    edit: str
    text: str
    refused: bool
    """Whether it has no future; otherwise it has one that may not be worth much."""


@store.job_into_folder
def extract(run: ExtractRun) -> str:
    """Write the tables of a run; parts that an earlier run with the same settings finished are kept.

    Returns:
        A line that says what is where.

    Raises:
        ValueError: the checkpoint, the data and the settings do not fit together, or not with what is in the folder;
            or some parts failed (the message has the reasons, the other parts are done); or another job works there.
    """
    out = store.resolve(run.out, "--out")
    job, parts = plan(run, out)
    with claim.hold(out, "extract") as held:
        open_folder(job)
        todo = _undone(job, parts)
        if todo:
            store.remove(store.join(out, tables.MANIFEST))  # the folder is not complete until they are done
            _run(job, todo, planned=sum(part.clips for part in parts), workers=run.workers)
        held.check()
        return finish(job, parts)


def clip_blocks(
    model: VideoModel[Any],
    family: Family,
    clips: Sequence[Clip],
    *,
    context: int | None = None,
    horizon: int | None = None,
    closing: int | None = None,
    device: str | torch.device = "cpu",
    extras: Sequence[str] = (),
    samples: int = 0,
    sample_seed: int = 0,
    edits: Sequence[Edit] = (),
    notes: list[EditNote] | None = None,
) -> list[Block]:
    """Encode clips of one length; with ``context`` also predict the frames after it, or fill the gap after it.

    Gives one ``posterior`` block per clip; with ``horizon`` one ``predicted`` block of frames ``context .. context +
    horizon - 1``, and ``samples`` more of them, drawn; the same for each of the ``edits`` that is for the clip; with
    ``closing`` one ``interpolated`` block of frames ``context .. t - closing - 1``. ``extras`` names optional columns
    (see the top of the file). Tracks of frames that were not seen go on from the context.

    Edits that a clip refuses, and why others are doubtful, are added to ``notes``; without it a refusal raises.

    Raises:
        ValueError: a clip lacks the truth that the model takes as input, or the model renders no masks where the
            columns need them; or as said of ``notes``.
    """
    video = to_model_input(collate(clips), device)
    inputs = stack_truth(clips, family.inputs, device)
    with torch.no_grad():
        latents = model.encode(video, **inputs)
        scene = model.decode(latents, components=_needs_masks(family, extras))
        recon_mse = frame_mse(scene.video, video).cpu().numpy()
        dense = _dense(family, latents, scene, extras)
        blocks = _to_blocks(clips, dense, "posterior", 0, {"recon_mse": recon_mse})
        if context is not None and horizon is not None:
            # Only a causal family's latents of the first frames are free of what comes later.
            seen = segments.cut(latents, 0, context) if family.causal else model.encode(video[:, :context], **inputs)
            future = model.rollout(seen, horizon)
            blocks += _unseen_blocks(model, family, clips, video, "predicted", seen, future, extras)
            for i, clip in enumerate(clips) if samples else ():
                own = type(seen)(*(values[i : i + 1] for values in seen))
                for sample in range(1, samples + 1):
                    drawn = model.rollout(own, horizon, generator=_generator(device, sample_seed, clip.key, sample))
                    blocks += _unseen_blocks(
                        model, family, [clip], video[i : i + 1], "predicted", own, drawn, extras, sample=sample
                    )
            edited = _edit_clips(clips, seen, edits, notes) if edits else []
            blocks += _edited_blocks(model, family, edited, horizon, device, extras, samples, sample_seed)
        if context is not None and closing is not None:
            gap = slice(context, video.shape[1] - closing)
            flags = torch.ones(video.shape[1], dtype=torch.bool)
            flags[gap] = False
            filler: Any = model  # a fifth verb, which the protocol of all families does not have
            filled = filler.interpolate(video, flags, **inputs)
            seen, between = segments.cut(filled, 0, context), segments.cut(filled, gap.start, gap.stop)
            blocks += _unseen_blocks(model, family, clips, video, "interpolated", seen, between, extras)
        return blocks


def extract_part(model: VideoModel[Any], family: Family, source: Source, job: Job, part: Part) -> dict[str, Any]:
    """Encode the clips of a part and publish its two tables, then the record that it is done.

    Returns:
        What the status line is told: ``bytes`` written, and ``seconds`` by phase.
    """
    watch = status.Stopwatch()
    shard = source.open_shard(part.shard)
    blocks: list[Block] = []
    notes: list[EditNote] = []
    for first in range(0, part.clips, job.batch_size):
        clips = [shard.clip(i, truth=family.inputs) for i in range(first, min(first + job.batch_size, part.clips))]
        watch.lap("read")
        blocks += clip_blocks(
            model,
            family,
            clips,
            context=job.provenance.context,
            horizon=job.provenance.horizon,
            closing=job.provenance.closing,
            device=job.device,
            extras=job.extras,
            samples=job.samples,
            sample_seed=job.sample_seed,
            edits=job.edits,
            notes=notes,
        )
        watch.lap("model")  # its last act is to fetch the columns, so a GPU is done by now
    stored = publish_part(family, job, part, blocks, notes)
    watch.lap("write")
    return {"bytes": stored, "seconds": watch.seconds}


def publish_part(family: Family, job: Job, part: Part, blocks: Sequence[Block], notes: Sequence[EditNote]) -> int:
    """Publish the two tables of a part, then the record that it is done; return the bytes of the tables."""
    store.remove(_record_path(job, part))  # of an earlier attempt of which a table is gone
    record: dict[str, Any] = {"name": part.name, "clips": part.clips}
    if job.edits:
        refused: dict[str, dict[str, str]] = {}
        for note in notes:
            if note.refused:
                refused.setdefault(note.clip, {})[note.edit] = note.text
        doubtful = [f"clip {note.clip}, edit {note.edit}: {note.text}" for note in notes if not note.refused]
        record["edits"] = {"refused": refused, "doubtful": len(doubtful), "first_doubtful": "".join(doubtful[:1])}
    finite = {block.clip: True for block in blocks}
    for block in blocks:
        finite[block.clip] &= all(bool(np.isfinite(values).all()) for values in block.latents.values())
    record["clips_not_finite"] = len(finite) - sum(finite.values())
    of_frames = family.frame_columns
    of_objects = tuple(name for name in blocks[0].latents if name not in of_frames)
    columns: dict[tables.Table, tuple[str, ...]] = {"objects": of_objects, "frames": of_frames}
    for table, fields in columns.items():
        rows = tables.build(table, blocks, fields, job.provenance)
        record[table] = tables.publish(rows, store.join(job.out, table, f"{part.name}.parquet"))
    store.publish_json(_record_path(job, part), record)
    return sum(record[table]["bytes"] for table in columns)


class Extractor:
    """One worker of Ray Data: holds the model, does one part per call, answers with a status instead of raising.

    Everything is loaded in the first call, because Ray Data tries a constructor that raises again and again.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loaded: tuple[VideoModel[Any], Family, Source] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Take a batch of one row, the fields of a Part; return one row {name, clips, error, counts}."""
        part = Part(str(batch["name"][0]), int(batch["shard"][0]), int(batch["clips"][0]))
        error, counts, before = "", dict[str, Any](), store.retries()
        try:
            with store.using(self.job.storage):
                if self.loaded is None:
                    self.loaded = self._load()
                counts = extract_part(*self.loaded, self.job, part)
        except Exception as exception:  # any failure concerns this part alone, and the driver reports it
            error = f"{type(exception).__name__}: {' '.join(str(exception).split())}"
        counts["retries"] = status.earlier_attempts() + store.retries() - before
        return {"name": [part.name], "clips": [part.clips], "error": [error], "counts": [json.dumps(counts)]}

    def _load(self) -> tuple[VideoModel[Any], Family, Source]:
        if self.job.device == "cpu":
            torch.set_num_threads(1)
        loaded = load_model(self.job.checkpoint, device=self.job.device, overrides=self.job.overrides)
        source = open_source(self.job.data, self.job.provenance.split)
        for what, planned, found in (
            ("model", self.job.provenance.model_id, loaded.model_id),
            ("dataset", self.job.provenance.dataset_id, source.id),
        ):
            if planned != found:
                raise ValueError(
                    f"the {what} changed from {planned} to {found} while the extraction ran; start it again"
                )
        return loaded.model, describe(loaded.config), source


def plan(run: ExtractRun, out: str, *, edits: Sequence[Edit] = (), clip: str | None = None) -> tuple[Job, list[Part]]:
    """Check that checkpoint, data and settings fit together, and list the work; starts nothing.

    Args:
        run: the settings.
        out: the resolved folder.
        edits: beside those of the run's file.
        clip: key of the only clip to do.

    Raises:
        ValueError: they do not fit together.
    """
    checkpoint = store.resolve(run.checkpoint, "--checkpoint")
    data = store.resolve(run.data, "--data")
    # A run folder may be training on, so name the checkpoint that all workers are to load.
    weights = load_weights(checkpoint, which=run.which)
    overrides = parse_model_settings(run.set, weights.config)
    loaded = load_model(weights.path, overrides=overrides)
    source = open_source(data, run.split)
    family = describe(loaded.config)
    if run.horizon is not None and "rollout" not in family.verbs:
        raise ValueError(f"a {loaded.family} model cannot predict; leave out --horizon")
    if run.closing is not None and "interpolate" not in family.verbs:
        able = ", ".join(name for name, each in FAMILIES.items() if "interpolate" in each.verbs)
        raise ValueError(
            f"a {loaded.family} model cannot interpolate; give the checkpoint of a model that can ({able}), or leave "
            "out --closing"
        )
    if run.state and not family.state_columns:
        raise ValueError(f"a {loaded.family} model carries no recurrent state; leave out --state")
    edits = (*read_edits(run.edits), *edits) if run.edits else tuple(edits)
    if edits:
        _check_edits(edits, loaded.family, loaded.config, run.context or 0)
    if run.context is not None and run.context > source.num_frames:
        raise ValueError(
            f"--context {run.context} asks for more frames than a clip of {data} has ({source.num_frames}); lower it"
        )
    if run.context is not None and run.closing is not None and run.context + run.closing >= source.num_frames:
        raise ValueError(
            f"--context {run.context} and --closing {run.closing} leave nothing to interpolate in a clip of {data}, "
            f"which has {source.num_frames} frames; lower them"
        )
    side = getattr(loaded.config, "image_size", None)
    if side is not None and (source.height, source.width) != (side, side):
        raise ValueError(
            f"the frames of {data} are {source.height}x{source.width}, the model sees {side}x{side}; make shards with "
            f"--size {side}"
        )
    if wanted := [edit.clip for edit in edits if edit.clip] if clip is None else [clip]:
        _check_clips(wanted, source, data, run.limit)
    parts, left = [], sum(source.shard_sizes) if run.limit is None else run.limit
    for shard, (name, size) in enumerate(zip(source.shard_names, source.shard_sizes, strict=True)):
        if clip is not None:
            if clip in source.keys(shard):
                parts.append(Part(name, shard, 1))
            continue
        clips, left = min(size, left), left - min(size, left)
        if clips:
            parts.append(Part(name, shard, clips))
    if not parts:
        raise ValueError(f"split {run.split!r} of {data} has no clips; there is nothing to extract")
    provenance = Provenance(
        family=loaded.family,
        model_id=loaded.model_id,
        dataset_id=source.id,
        split=run.split,
        object_is_track=family.tracked,
        context=run.context,
        horizon=run.horizon,
        closing=run.closing,
    )
    job = Job(
        weights.path,
        data,
        out,
        run.limit,
        run.batch_size,
        run.device,
        provenance,
        run.extras,
        overrides,
        run.samples,
        run.sample_seed,
        edits,
        clip,
        run.storage,
    )
    return job, parts


def read_edits(path: str) -> tuple[Edit, ...]:
    """Read a JSON list of edits, local or s3://.

    Raises:
        ValueError: there is no such file, or an entry is wrong; names both.
    """
    path = store.resolve(path, "--edits")
    try:
        text = store.read_bytes(path).decode()
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"--edits {path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--edits {path}: not UTF-8 text ({error})") from None
    try:
        return what_if.parse_edits(text)
    except ValueError as error:
        raise ValueError(f"--edits {path}: {error}") from None


def can_edit(family: Family) -> bool:
    """Whether a family's latents are particles, and it predicts from them."""
    return "rollout" in family.verbs and {*Particles._fields} == {*family.object_columns, *family.frame_columns}


def _check_edits(edits: Sequence[Edit], family: str, config: Any, context: int) -> None:
    if not can_edit(FAMILIES[family]):
        able = ", ".join(name for name, each in FAMILIES.items() if can_edit(each))
        raise ValueError(f"a {family} model has no particles to edit; give the checkpoint of a model that has ({able})")
    if not describe(config).tracked:
        raise ValueError(
            "this model finds its particles anew in every frame (model.tracking=false), so no edit can follow one; "
            "give the checkpoint of a model that tracks"
        )
    count = config.num_particles
    for edit in edits:
        if missing := [index for index in edit.indices if index >= count]:
            raise ValueError(
                f"edit {edit.name} names particle {missing[0]}, but the model has {count}, 0 to {count - 1}"
            )
        if not -context <= edit.frame < context:
            raise ValueError(
                f"edit {edit.name} looks at context frame {edit.frame}, but there are {context}, 0 to {context - 1}"
            )


def _check_clips(wanted: Sequence[str], source: Source, data: str, limit: int | None) -> None:
    """Refuse clips that the split does not have, or ``limit`` leaves out."""
    keys = [key for shard in range(len(source.shard_sizes)) for key in source.keys(shard)]
    planned = set(keys[:limit])
    for clip in wanted:
        if clip in planned:
            continue
        if clip in keys:
            raise ValueError(f"clip {clip} is not among the first {limit} of {data}; raise --limit or leave it out")
        near = difflib.get_close_matches(clip, keys, n=3, cutoff=0.5) or keys[:3]
        raise ValueError(
            f"split {source.split!r} of {data} has no clip {clip!r}; it has {len(keys)}, among them {', '.join(near)}"
        )


def open_folder(job: Job) -> None:
    """Make the folder this job's, or go on in it.

    Raises:
        ValueError: it holds something else, or tables with other settings.
    """
    path = store.join(job.out, "settings.json")
    if not store.exists(path) and store.exists(store.join(job.out, tables.MANIFEST)):
        raise ValueError(f"{job.out} holds something else (a {tables.MANIFEST} without {path}); choose another --out")
    if not store.exists(path) and store.create(path, store.sealed_json(job.settings)):
        return
    found = store.read_json(path)
    for name, value in job.settings.items():
        before = found.get(name, LATER_SETTINGS.get(name))
        if before != value:
            was, now = (shorten(repr(each)) if name == "edits" else each for each in (before, value))
            raise ValueError(
                f"{job.out} holds tables with {name} {was}, but this run has {name} {now}; "
                "choose another --out, or remove the old folder"
            )


def shorten(text: str, most: int = 200) -> str:
    """The beginning of a text."""
    return text if len(text) <= most else text[:most] + " ..."


def _record_path(job: Job, part: Part) -> str:
    return store.join(job.out, "parts", f"{part.name}.json")


def _undone(job: Job, parts: Sequence[Part]) -> list[Part]:
    """Parts of which the record or a table is not there: three listings, where asking for each is three requests."""
    suffixes = {"parts": ".json", "objects": ".parquet", "frames": ".parquet"}
    there = {folder: set(store.list_names(store.join(job.out, folder))) for folder in suffixes}
    return [part for part in parts if any(part.name + suffixes[name] not in there[name] for name in suffixes)]


def _run(job: Job, todo: list[Part], planned: int, workers: int) -> None:
    returned: dict[str, str] = {}
    clips = sum(part.clips for part in todo)
    status.tag(split=job.provenance.split, family=job.provenance.family)
    with status.Status("extract", planned, "clips", done=planned - clips) as progress:
        for answer in _schedule(job, todo, workers):
            returned[answer["name"]] = answer["error"]
            done = {"done": 0, "failed": 1} if answer["error"] else {"done": int(answer["clips"])}
            progress.add(**done, **json.loads(answer["counts"]))
    missing = sorted({part.name for part in todo} - set(returned))
    if missing:
        raise ValueError(f"no answer came back for parts {', '.join(missing)}; run the same command again")
    failed = [f"{name}: {error}" for name, error in sorted(returned.items()) if error]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(todo)} parts failed; the others are done, and the same command does only the rest. "
            + "; ".join(failed[:3])
        )


def _schedule(job: Job, todo: list[Part], workers: int) -> Iterator[dict[str, Any]]:
    """Spread the parts over the workers and yield their answers as they come."""
    cluster.connect()
    cluster.require_shared([path for path in (job.checkpoint, job.data, job.out) if not path.startswith("sim:")])
    import ray
    import ray.data
    from ray.exceptions import RayError

    if job.device == "auto":
        job = dataclasses.replace(job, device="cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu")
    options: dict[str, Any] = {"num_gpus": 1} if job.device == "cuda" else {}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is reported below
    ray.data.DataContext.get_current().enable_progress_bars = False
    # from_items has no task of its own: with one, workers that hold all CPUs would wait for it for ever.
    parts = ray.data.from_items([dataclasses.asdict(part) for part in todo], override_num_blocks=len(todo))
    with warnings.catch_warnings():
        # Ray 2.60 has no other place for the two limits, and without them it restarts a worker that dies for ever.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        answers = parts.map_batches(
            Extractor,
            fn_constructor_args=(job,),
            batch_size=1,
            # One part at a time: whichever worker is free takes the next.
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo)), max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            max_restarts=RESTARTS,
            # Starts alone are limited, not trials of a part: a worker whose node was lost is tried every second until
            # there is another one.
            max_task_retries=-1,
            **options,
        )
    try:
        yield from answers.iter_rows()
    except RayError as error:
        raise ValueError(
            f"a worker's process died {RESTARTS + 1} times (out of memory? then lower --batch-size or --workers); "
            f"parts that are done are kept, run the same command again. Ray says: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def finish(job: Job, parts: list[Part]) -> str:
    """Write the manifest of a folder whose parts are all done.

    Returns:
        A line that says what is where, and warnings.

    Raises:
        ValueError: a part's record is of other clips than planned.
    """
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        records = list(pool.map(lambda part: store.read_json(_record_path(job, part)), parts))
    for part, record in zip(parts, records, strict=True):
        if (record["name"], record["clips"]) != (part.name, part.clips):
            path = _record_path(job, part)
            raise ValueError(f"{path} is of other clips ({record}) than planned ({part}); delete it and run this again")
    totals = {"clips": sum(part.clips for part in parts)}
    totals |= {table: sum(record[table]["rows"] for record in records) for table in ("objects", "frames")}
    manifest = {**job.settings, "rows": totals, "parts": records}
    store.publish_json(store.join(job.out, tables.MANIFEST), manifest)
    line = f"{totals['clips']} clips, {totals['objects']} rows of objects, {totals['frames']} rows of frames: {job.out}"
    if not_finite := sum(record["clips_not_finite"] for record in records):
        line += f"\nwarning: {not_finite} clips have latents that are not finite (NaN or infinite in the tables)"
    return "\n".join([line, *_told_of_edits([record["edits"] for record in records if "edits" in record])])


def _told_of_edits(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    refused = [
        f"clip {clip}, edit {name}: {reason}"
        for record in records
        for clip, reasons in record["refused"].items()
        for name, reason in reasons.items()
    ]
    if refused:
        yield f"warning: {len(refused)} edits do not fit their clips and have no rows; the first: {refused[0]}"
    if doubtful := sum(record["doubtful"] for record in records):
        first = next(record["first_doubtful"] for record in records if record["doubtful"])
        yield f"warning: {doubtful} edits leave what the model was trained on; the first: {first}"


def _generator(device: str | torch.device, seed: int, clip: str, sample: int) -> torch.Generator:
    """The source of one future's draws."""
    digest = hashlib.blake2b(f"{seed}/{clip}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


class _EditedClip(NamedTuple):
    clip: Clip
    edit: str
    context: Edited


def _edit_clips(
    clips: Sequence[Clip], seen: Particles, edits: Sequence[Edit], notes: list[EditNote] | None
) -> list[_EditedClip]:
    """Every clip's context after each edit that is for it."""
    found = []
    for i, clip in enumerate(clips):
        own = Particles(*(values[i : i + 1] for values in seen))
        for edit in edits:
            if not edit.is_for(clip.key):
                continue
            try:
                doubts = what_if.concerns(own, edit)
                found.append(_EditedClip(clip, edit.name, what_if.apply(own, [edit])))
            except ValueError as error:
                if notes is None:
                    raise ValueError(f"clip {clip.key}: {error}") from None
                notes.append(EditNote(clip.key, edit.name, str(error), refused=True))
            else:
                if doubts and notes is not None:
                    notes.append(EditNote(clip.key, edit.name, "; ".join(doubts), refused=False))
    return found


def _edited_blocks(
    model: VideoModel[Any],
    family: Family,
    edited: Sequence[_EditedClip],
    horizon: int,
    device: str | torch.device,
    extras: Sequence[str],
    samples: int,
    sample_seed: int,
) -> list[Block]:
    """The futures of edited contexts; those that hold a transparency need another rollout than those that do not."""
    blocks = []
    for held in (False, True):
        alike = [each for each in edited if bool(each.context.held.any()) == held]
        for first in range(0, len(alike), EDITS_AT_ONCE):
            some = alike[first : first + EDITS_AT_ONCE]
            joined = Particles(*(torch.cat(values) for values in zip(*(e.context.latents for e in some), strict=True)))
            context = Edited(joined, torch.cat([each.context.held for each in some]))
            blocks += _futures(family, model, some, what_if.rollout(model, context, horizon), extras, 0)
    for each in edited if samples else ():
        for sample in range(1, samples + 1):
            generator = _generator(device, sample_seed, each.clip.key, sample)
            drawn = what_if.rollout(model, each.context, horizon, generator=generator)
            blocks += _futures(family, model, [each], drawn, extras, sample)
    return blocks


def _futures(
    family: Family,
    model: VideoModel[Any],
    edited: Sequence[_EditedClip],
    future: Particles,
    extras: Sequence[str],
    sample: int,
) -> list[Block]:
    """Blocks of edited futures, of which there are no true frames."""
    scene = model.decode(future, components=True) if _needs_masks(family, extras) else None
    dense = _dense(family, future, scene, extras)
    context = edited[0].context.latents.depth.shape[1]
    clips, names = [each.clip for each in edited], [each.edit for each in edited]
    return _to_blocks(clips, dense, "predicted", context, {}, names, sample)


def _unseen_blocks(
    model: VideoModel[Any],
    family: Family,
    clips: Sequence[Clip],
    video: Tensor,
    kind: str,
    seen: Any,
    unseen: Any,
    extras: Sequence[str],
    sample: int = 0,
) -> list[Block]:
    """Blocks of frames that were not looked at; ``seen`` are the latents of those before, from the first one on."""
    context, count = seen[0].shape[1], unseen[0].shape[1]
    truth = video[:, context : context + count]
    known, scene, before = truth.shape[1], None, None
    if _needs_masks(family, extras):
        scene = model.decode(unseen, components=True)
        before = None if family.tracked else model.decode(seen, components=True)
    elif known:
        scene = model.decode(segments.cut(unseen, 0, known))
    errors = {"predict_mse": frame_mse(scene.video[:, :known], truth).cpu().numpy()} if scene and known else {}
    return _to_blocks(clips, _dense(family, unseen, scene, extras, before), kind, context, errors, sample=sample)


def _needs_masks(family: Family, extras: Sequence[str]) -> bool:
    return not family.tracked or bool({"mask_summary", "masks", "components"} & set(extras))


def _dense(
    family: Family, latents: Any, scene: Scene | None, extras: Sequence[str], before: Scene | None = None
) -> dict[str, np.ndarray]:
    """The columns of a batch of clips, (b, t, k, ...) of objects and (b, t, ...) of frames.

    ``scene`` is what the latents render and ``before`` what came before them, for tracks that go on.
    """
    states = family.state_columns if "state" in extras else ()
    names = (*family.object_columns, *states, *family.frame_columns)
    dense = {name: getattr(latents, name).float().cpu().numpy() for name in names}
    if not _needs_masks(family, extras):
        return dense
    objects = dense[family.object_columns[0]].shape[2]
    masks, winners = _masks(scene, objects)
    if not family.tracked:
        earlier = _masks(before, objects)[1] if before else winners[:, :0]
        video = np.concatenate([earlier, winners], axis=1)
        tracks = np.stack([match_tracks(each, objects) for each in video])
        dense["track"] = tracks[:, earlier.shape[1] :].astype(np.int32)
    if "mask_summary" in extras:
        dense |= _mask_summary(masks, winners)
    if "masks" in extras:
        dense["mask"] = _to_bytes(masks)
    if "components" in extras and scene is not None and scene.components is not None:
        components = np.nan_to_num(scene.components[:, :, -objects:].float().cpu().numpy())
        dense["component"] = _to_bytes(np.moveaxis(components, 3, 5))
    return dense


def _masks(scene: Scene | None, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Soft masks of the objects (b, t, k, h, w), and the object that wins each pixel (b, t, h, w).

    Negative where a background, which comes before the objects, wins it. NaN of a model that diverged counts as 0.
    """
    if scene is None or scene.masks is None:
        raise ValueError(
            "the model renders no masks; leave out --mask-summary, --masks and --components (a family whose objects "
            "keep no identity cannot be extracted without them)"
        )
    masks = np.nan_to_num(scene.masks.float().cpu().numpy())
    winners = segment(masks) - (masks.shape[2] - objects)
    return masks[:, :, -objects:, 0], winners


def _mask_summary(masks: np.ndarray, winners: np.ndarray) -> dict[str, np.ndarray]:
    k, h, w = masks.shape[2:]
    won = winners[:, :, None] == np.arange(k)[:, None, None]
    area: np.ndarray = np.mean(won, axis=(3, 4))
    weights = np.where(area[..., None, None] > 0, won, masks)
    whole = np.maximum(weights.sum(axis=(3, 4)), np.finfo(np.float32).tiny)
    y = weights.sum(axis=4) @ np.linspace(-1, 1, h) / whole
    x = weights.sum(axis=3) @ np.linspace(-1, 1, w) / whole
    return {"mask_area": area, "mask_y": y, "mask_x": x}


def _to_bytes(shares: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)


def _to_blocks(
    clips: Sequence[Clip],
    dense: dict[str, np.ndarray],
    kind: str,
    context: int,
    errors: dict[str, np.ndarray],
    edits: Sequence[str] = (),
    sample: int = 0,
) -> list[Block]:
    frame = context + np.arange(next(iter(dense.values())).shape[1])
    return [
        Block(
            clip=clip.key,
            kind=kind,
            frame=frame,
            source_frame=clip.start_frame + clip.stride * frame,
            latents={name: values[i] for name, values in dense.items()},
            errors={name: values[i] for name, values in errors.items()},
            context=context,
            edit=edits[i] if edits else "",
            sample=sample,
        )
        for i, clip in enumerate(clips)
    ]
