"""Videos to shards: Ray Data as the scheduler, our own writer inside its tasks.

Three passes. *Scan* opens files that hold several videos and lists them; *probe* decodes every video once to count its
frames, since headers lie; then keys and shards are assigned by position and *build* writes one tar per task. So what a
shard holds depends on the inputs and settings alone, and the same inputs give the same bytes on any number of workers.

An input that cannot be used becomes a row of ``quarantine.parquet``; the counts must balance. A video may also kill,
hang or bloat the process that reads it: Ray gives such a task a second try, then each of its videos is read in a
process of its own (``isolate.py``), which tells the guilty one from its neighbours.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from objdyn.clips import Clip, to_sample
from objdyn.datasets import LAYOUTS, Cut, Fault, Found, Limits, Preprocessing, Video, VideoError, clevrer, npy
from objdyn.simulators import Simulator, simulator
from pipeline import claim, failpoints, isolate, status, store
from pipeline.config import ShardRun

SCHEMA = 1
SPLIT_LETTERS = 48
"""Longest name of a split: it starts every key, and a tar member's name beyond 100 letters takes a second header."""
SHARD_BYTES = 48_000_000
"""Pixels of a shard where ``clips_per_shard`` is not given, in bytes before compression."""
STRICT_INPUTS = 100
"""From this many inputs on too large an unusable share is an error; below it is a warning."""
_OR_LIMITS = (
    "; or a video ran out of time or memory in one of the two runs (see its quarantine.parquet): choose another --out"
)
UNITS = {"scan": "files", "probe": "videos", "build": "shards", "simulate": "videos"}
"""What is counted, by stage."""
OWNER = "objdyn"
"""Owner of every tar member; a fixed one, so that tars do not depend on who wrote them."""

LONGEST = 1000
"""Letters of a reason in quarantine.parquet: what it quotes comes from a stranger's file."""

LEFT_OUT = ("too-few-objects", "too-many-objects", "not-all-visible")
"""Codes of what the run's own settings leave out."""
NOT_DAMAGED = ("find", "select")
"""Stages whose rows are no damage, so they do not count against ``max_quarantined``: what belongs to no video, and what
the run's own settings leave out."""

READING_FAILS = (ValueError, ArithmeticError, LookupError, RuntimeError, TypeError, EOFError)
"""What readers raise on bad input; the storage's errors, and those of this program, are none of a video's."""

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("members", pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))),
        ("source", pa.string()),
        ("start_frame", pa.int32()),
        ("stride", pa.int32()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
    ]
)
SHORT = ("scan", "probe")
"""Tasks that take a fraction of a second."""
ITEMS_PER_TASK, TASKS = 16, 5000
"""Most short items in a task; more than that where it takes more to have at most so many tasks."""
VIDEOS_AT_ONCE = 1_000_000
"""Videos whose requests and answers the driver holds at a time while it probes."""
SHARDS_AT_ONCE = 8
"""Shards of an earlier run that the driver hashes side by side."""
QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "stage", "code", "message")])


class Quarantined(NamedTuple):
    """An input that could not be used; a row of quarantine.parquet."""

    source: str
    stage: str
    """``find``, ``scan``, ``probe``, ``select``, ``plan`` or ``build``."""
    code: str
    message: str


class Survey(NamedTuple):
    """What a source holds."""

    root: str
    """Folder or URL that the videos' paths are relative to; empty for a simulator."""
    videos: tuple[Video, ...]
    """Every video, in the order that numbers them; one that could not be probed has no frames."""
    quarantined: tuple[Quarantined, ...]
    ignored: int
    """Files that belong to no video."""


class Planned(NamedTuple):
    """A range of one video: the clips of it that go into one shard."""

    video: Video
    cuts: tuple[Cut, ...]


class Plan(NamedTuple):
    """One shard to write."""

    shard: int
    parts: tuple[Planned, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.shard:05d}.tar"

    @property
    def clips(self) -> int:
        return sum(len(part.cuts) for part in self.parts)


@dataclass(frozen=True)
class Built:
    """What building one shard gave."""

    name: str
    bytes: int
    sha256: str
    clips: int
    index: pa.Buffer
    """Rows of the index as a compressed Arrow stream, since the driver holds those of all shards: 10^7 dicts of Python
    are 12 GB. ``rows`` reads it."""
    channels: int = 0
    """Of every clip; 0 where there is none."""
    quarantined: list[Quarantined] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    """Spent on reading videos and on writing, for the status line alone: no dataset holds a time."""

    @property
    def rows(self) -> pa.Table:
        """Rows of the index."""
        return pa.ipc.open_stream(self.index).read_all()


@store.job_into_folder
def shard(run: ShardRun) -> str:
    """Make one split of a dataset; started again on a finished one it mends what is missing or damaged.

    Raises:
        ValueError: the source holds nothing usable, too much of it is unusable (quarantine.parquet then says what and
            why, without a manifest), or ``out`` holds another dataset, which stays as it is; or it is in use.
        OSError: a file of the source cannot be opened or read.
    """
    source, folder = store.resolve(run.source, "--source"), store.join(store.resolve(run.out, "--out"), run.split)
    if len(run.split) > SPLIT_LETTERS:
        raise ValueError(f"--split {run.split} starts every key and is too long for it; use {SPLIT_LETTERS} letters")
    _check_places(source, folder)
    with claim.hold(folder, "make_shards") as held:
        return _shard(run, source, folder, held)


def _shard(run: ShardRun, source: str, folder: str, held: claim.Claim) -> str:
    from pipeline import cluster

    settings = _settings(run, source)
    previous = _previous(folder, settings)
    status.tag(split=run.split)
    root, found = find_videos(run, source)
    if run.layout == "videos" and (like := next((v.source for v in found.videos if clevrer.is_video(v.source)), "")):
        print(f"note: {like} is named like CLEVRER's; --layout clevrer would read annotations, masks and splits, too")
    cluster.connect(run.workers)
    cluster.require_shared([path for path in (source, folder) if not path.startswith("sim:")])

    surveyed = survey(run, root, found)
    plans, unfit = plan_shards(run, surveyed.videos)
    quarantined = [*surveyed.quarantined, *unfit]
    built: list[Built] = []
    reason = _refusal(run, surveyed, quarantined, sum(plan.clips for plan in plans))
    if not reason:
        built = build_shards(run, surveyed.root, folder, plans, previous)
        quarantined += [row for each in built for row in each.quarantined]
        reason = _refusal(run, surveyed, quarantined, sum(each.clips for each in built))
    balance = _balance(surveyed, plans, built, quarantined)
    for line in _notes(surveyed, quarantined):
        print(line)
    held.check()
    if reason:
        print(describe(balance))
        raise ValueError(reason + _publish_reasons(folder, quarantined, previous))
    _check_balance(balance, plans, built)
    manifest = _publish(folder, settings, balance, built, quarantined, previous)
    if warning := _excess(run, surveyed, quarantined):
        print(f"warning: {warning}")
    print(describe(balance))
    return f"dataset {manifest.sha256[:12]} in {folder}"


def find_videos(run: ShardRun, source: str) -> tuple[str, Found]:
    """List what a source holds by names alone: its root, and its videos or the files that hold several.

    Raises:
        ValueError: nothing of the layout is there.
    """
    if source.startswith("sim:"):
        return "", Found(tuple(_episodes(run)), 0)
    splits = LAYOUTS[run.layout].splits
    if splits and run.split not in splits:
        raise ValueError(f"--layout {run.layout} has the splits {', '.join(splits)}, not {run.split!r}")
    root, listing = list_source(source)
    found, select = LAYOUTS[run.layout].find(listing), LAYOUTS[run.layout].select
    if select:
        found = select(found, run.split, run.seed or 0, run.numbers())
    if splits:
        found = found._replace(videos=tuple(v for v in found.videos if v.source.endswith(f"/{splits[run.split]}")))
    if not found.videos:
        raise ValueError(
            f"--source {run.source} has no {LAYOUTS[run.layout].wants} among its {len(listing)} files; correct the "
            "path or --layout"
        )
    return root, found


def survey(run: ShardRun, root: str, found: Found) -> Survey:
    """Open files that hold several videos, and count the frames of every video by decoding."""
    if run.source.startswith("sim:"):
        return Survey(root, found.videos, (), 0)
    videos, ignored, quarantined = found.videos, found.ignored, [_quarantined(fault, "find") for fault in found.faults]
    if LAYOUTS[run.layout].scan is not None:
        items = [_to_json(video) for video in videos]
        scanned = _run_all(
            functools.partial(_guarded, run, functools.partial(_scan, run, root)),
            items,
            "scan",
            functools.partial(_survey_alone, run, root, "scan"),
        )
        parts = [json.loads(result) for result in scanned]
        videos = tuple(_video(video) for part in parts for video in part["videos"])
        ignored += sum(part["ignored"] for part in parts)
        quarantined += [_quarantined(Fault(*fault), "scan") for part in parts for fault in part["faults"]]
    videos = videos[: run.limit]
    probed = []
    for first in range(0, len(videos), VIDEOS_AT_ONCE):
        some = videos[first : first + VIDEOS_AT_ONCE]
        results = _run_all(
            functools.partial(_guarded, run, functools.partial(_probe, run, root)),
            [_to_json(video) for video in some],
            "probe",
            functools.partial(_survey_alone, run, root, "probe"),
        )
        for video, result in zip(some, map(json.loads, results), strict=True):
            if "fault" in result:
                quarantined.append(_quarantined(Fault(*result["fault"]), "probe"))
            probed.append(video if "fault" in result else _video(result["video"]))
    return Survey(root, tuple(probed), tuple(quarantined), ignored)


def plan_shards(run: ShardRun, videos: Sequence[Video]) -> tuple[list[Plan], list[Quarantined]]:
    """Assign keys and shards by position; also name the videos that give no clip: too short, or left out."""
    preprocessing = run.preprocessing()
    starts: list[range] = []
    unfit = []
    for video in videos:
        first = range(0)
        try:
            first = _starts(run, preprocessing, video) if video.frames else first
        except VideoError as error:
            stage = "select" if error.code in LEFT_OUT else "plan"
            unfit.append(Quarantined(video.source, stage, error.code, str(error)))
        starts.append(first)
    v = max(5, len(str(len(videos) - 1)))
    c = max(4, len(str(max(map(len, starts), default=1) - 1)))
    # The split's name comes first, so that tables of several splits can be joined.
    clips = (
        (i, Cut(f"{run.split}-v{i:0{v}d}-c{j:0{c}d}", start))
        for i, each in enumerate(starts)
        for j, start in enumerate(each)
    )
    per_shard, plans = clips_per_shard(run), []
    while chunk := list(itertools.islice(clips, per_shard)):
        parts = [
            Planned(videos[i], tuple(cut for _, cut in group))
            for i, group in itertools.groupby(chunk, key=lambda entry: entry[0])
        ]
        plans.append(Plan(len(plans), tuple(parts)))
    return plans, unfit


def _starts(run: ShardRun, preprocessing: Preprocessing, video: Video) -> range:
    """First frames of a video's clips.

    Raises:
        VideoError: it is too short for one, or the run's settings leave it out.
    """
    if run.min_objects or run.max_objects:
        if video.objects is None:
            raise clevrer.no_annotation(video, "how many objects it has")
        if video.objects < (run.min_objects or 0):
            raise VideoError(
                "too-few-objects", f"it has {video.objects} objects, fewer than --min-objects {run.min_objects}"
            )
        if video.objects > (run.max_objects or math.inf):
            raise VideoError(
                "too-many-objects", f"it has {video.objects} objects, more than --max-objects {run.max_objects}"
            )
    if run.clips == "provide":
        return clevrer.provide_starts(video, preprocessing)
    frames, start, which = len(preprocessing.order(video.frames)), preprocessing.start, ""
    starts = preprocessing.starts(video.frames)
    if run.layout == "npy" and (run.start, run.stop) == (0, None):
        start, stop = npy.span_of(run.split, frames)
        which = f", of which {run.split} has {start} to {stop - 1}" if stop > start else f", none of them {run.split}"
        starts = range(start, stop - preprocessing.span + 1, starts.step)
    if starts:
        return starts
    left = f" without the last {preprocessing.drop_last}" if preprocessing.drop_last else ""
    wanted = f"{run.frames} with stride {run.stride} from frame {start} on need {start + preprocessing.span}"
    raise VideoError("too-short", f"{frames} frames{left}{which}; {wanted}")


def clips_per_shard(run: ShardRun) -> int:
    """Clips of a full shard."""
    return run.clips_per_shard or max(1, min(4096, SHARD_BYTES // (run.frames * run.size * run.size * 3)))


def build_shards(
    run: ShardRun, root: str, folder: str, plans: Sequence[Plan], previous: Mapping[str, Any] | None
) -> list[Built]:
    """Write all shards; on a finished dataset only those that are not as its manifest says.

    Raises:
        ValueError: the dataset that is there came from other videos.
    """
    kept = {} if previous is None else _intact(folder, previous, plans)
    missing = [plan for plan in plans if plan.shard not in kept]
    expected = {} if previous is None else {entry["name"]: entry["sha256"] for entry in previous["shards"]}
    task = functools.partial(_guarded, run, functools.partial(build_shard, run, root, folder))
    items = [json.dumps({"plan": plan, "sha256": expected.get(plan.name)}, default=vars) for plan in missing]
    results = _run_all(task, items, "build", functools.partial(_build_alone, run, root, folder))
    for plan, result in zip(missing, map(json.loads, results), strict=True):
        quarantined = [Quarantined(*row) for row in result["quarantined"]]
        index = pa.py_buffer(base64.b64decode(result["index"]))
        kept[plan.shard] = Built(**{**result, "index": index, "quarantined": quarantined})
    return [kept[plan.shard] for plan in plans]


def build_shard(run: ShardRun, root: str, folder: str, item: str) -> str:
    """Write one shard from its plan (JSON) and return its ``Built`` (JSON). This is the body of a Ray task.

    A video that fails here decoded when it was probed, so this is rare; it is quarantined and its other clips stay. If
    each video has been read in a process of its own, ``guilty`` has the code and message of those that killed it; they
    are not touched.
    """
    from webdataset.writer import TarWriter

    request = json.loads(item)
    shard, parts = request["plan"]
    plan = Plan(shard, tuple(Planned(_video(v), tuple(Cut(*cut) for cut in cuts)) for v, cuts in parts))
    rows: list[dict[str, Any]] = []
    quarantined: list[Quarantined] = []
    channels: set[int] = set()
    watch = status.Stopwatch()
    guilty = None
    if "guilty" in request:
        guilty = {source: Fault(source, *reason) for source, reason in request["guilty"].items()}

    def write(stream: BinaryIO) -> None:
        offset = 0
        with TarWriter(stream, user=OWNER, group=OWNER, mtime=0, encoder=False) as tar:
            for clip in _clips(run, root, plan.parts, quarantined, guilty):
                watch.lap("read")
                sample = to_sample(clip, run.codec)
                tar.write({"__key__": clip.key, **sample})
                members = []
                for name in sorted(sample):  # TarWriter's order; each member is a header of 512 bytes and padded data
                    members.append({"name": name, "offset": offset + 512, "size": len(sample[name])})
                    offset += 512 + -(-len(sample[name]) // 512) * 512
                rows.append(_index_row(plan.name, clip, members))
                channels.add(clip.frames.shape[-1])
                watch.lap("write")

    published = store.publish_file(store.join(folder, plan.name), _unchanged(write, request["sha256"], plan.name))
    watch.lap("write")
    index = _index(_table(INDEX_SCHEMA, rows))
    built = Built(plan.name, *published, len(rows), index, _one_number(channels), quarantined, watch.seconds)
    return json.dumps({**vars(built), "index": base64.b64encode(index).decode()})


def describe(balance: Mapping[str, int]) -> str:
    """Say what went in and what came out in one line."""
    line = f"videos {balance['videos']} = {balance['read']} read + {balance['quarantined']} quarantined; "
    line += f"ignored files {balance['ignored']}; clips written {balance['clips']}"
    return line + (f", lost {balance['lost']} of quarantined videos" if balance["lost"] else "")


def list_source(source: str) -> tuple[str, list[str]]:
    """List all files under a folder or URL, relative to it, sorted; a single file is listed in its folder.

    Raises:
        ValueError: there is nothing.
    """
    if store.is_file(source):
        folder, name = source.rsplit("/", 1)
        return folder or "/", [name]
    if not store.is_url(source) and not os.path.isdir(source):
        raise ValueError(f"--source {source} does not exist; give a folder, a file, an s3:// URL or sim:NAME")
    listing = store.list_tree(source)
    strange = [path for path in listing if not path.isascii() and path != path.encode(errors="replace").decode()]
    if strange:
        raise ValueError(f"the name of {strange[0]!r} under --source is not UTF-8 and cannot be recorded; rename it")
    if not listing:
        raise ValueError(f"--source {source} is empty; give a folder with videos")
    return source, listing


class SourceFiles:
    """Opens a task's input files and remembers a read that the storage refused.

    A decoder reports such a read like damage in the file, or passes over it, so its error cannot tell the two apart.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._failed = ""

    def open(self, path: str) -> BinaryIO:
        where = store.join(self._root, path)
        if not store.is_url(where) and os.path.exists(where) and not os.path.isfile(where):
            raise VideoError("no-file", f"{path} is a pipe, a socket or a device")
        with self.watch(path):
            return cast(BinaryIO, io.BufferedReader(_SourceFile(self, path, store.open_read(where))))

    @contextlib.contextmanager
    def watch(self, path: str) -> Iterator[None]:
        try:
            with isolate.storage():
                yield
        except MemoryError:  # the decoder has asked for more than there is
            raise
        except Exception as error:  # of any type: object storage has its own
            # Kept as text: the error holds its frames, and HDF5 crashes at exit when a file of its lives on in one.
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._failed = self._failed or f"{path} in the source cannot be read ({reason})"
            raise

    def check(self) -> None:
        """Raise what the storage answered.

        Raises:
            OSError: a file could not be opened or read, whatever it holds.
        """
        if self._failed:
            raise OSError(f"{self._failed}; that says nothing about the video: mend the access and run again")


class _SourceFile(io.RawIOBase):
    """A file known by its path in the source: decoders put a file's name into messages that are stored."""

    mode = "rb"

    def __init__(self, source: SourceFiles, path: str, file: BinaryIO) -> None:
        self.name, self._source, self._file = path, source, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        # Not watched: a damaged file makes its decoder seek to where nothing is.
        return self._file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        with self._source.watch(self.name):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@store.job
def _guarded(run: ShardRun, task: Callable[[str], str], item: str) -> str:
    """Do a task under the limits that are the process's."""
    import av  # noqa: F401  # its libraries are none of a video's memory, and their loading none of its time

    with isolate.guarded(run.stall_seconds, run.max_memory_gb):
        return task(item)


def limits_of(run: ShardRun) -> Limits:
    """Bound what one video may cost, from now on."""
    begin = time.thread_time()

    def on_frame() -> None:
        if isolate.frame_came() and time.thread_time() - begin > run.max_cpu_seconds:
            raise VideoError("too-slow", f"decoding it takes more than {run.max_cpu_seconds:g} s of CPU time")

    return Limits(run.max_frames, run.max_pixels, int(run.max_file_gb * 1e9), on_frame)


def _scan(run: ShardRun, root: str, item: str) -> str:
    scan = LAYOUTS[run.layout].scan
    assert scan is not None
    container, source = _video(json.loads(item)), SourceFiles(root)
    try:
        with isolate.decoding():
            failpoints.reach("decode", f"scan {container.source}")
            found = scan(container, source.open, limits_of(run))
        if found.faults and isolate.memory_is_short():
            raise MemoryError
    except READING_FAILS as error:
        found = Found((), 0, (_fault(container, error),))
    finally:
        source.check()
    return json.dumps({"videos": found.videos, "ignored": found.ignored, "faults": found.faults}, default=vars)


def _probe(run: ShardRun, root: str, item: str) -> str:
    video, source = _video(json.loads(item)), SourceFiles(root)
    try:
        with isolate.decoding():
            failpoints.reach("decode", f"probe {video.source}")
            probed = LAYOUTS[run.layout].probe(video, source.open, limits_of(run))
        try:
            run.preprocessing().box(probed.height, probed.width)
        except ValueError as error:
            raise VideoError("bad-geometry", str(error)) from error
        result = {"video": vars(probed)}
    except READING_FAILS as error:
        result = {"fault": _fault(video, error)}
    finally:
        source.check()
    return json.dumps(result)


def _clips(
    run: ShardRun,
    root: str,
    parts: Sequence[Planned],
    quarantined: list[Quarantined],
    guilty: Mapping[str, Fault] | None,
) -> Iterator[Clip]:
    """Cut the clips of a shard; only reading is guarded, so that a full disk is not blamed on a video."""
    if run.source.startswith("sim:"):
        yield from _simulate(run, parts)
        return
    source = SourceFiles(root)
    for part in parts:
        if guilty and part.video.source in guilty:
            quarantined.append(_quarantined(guilty[part.video.source], "build"))
            continue
        clips = LAYOUTS[run.layout].read(
            part.video, source.open, part.cuts, run.preprocessing(), run.fps, limits_of(run)
        )
        first = True
        while True:
            try:
                with isolate.decoding():
                    if first:
                        failpoints.reach("decode", f"build {part.video.source}")
                    first, clip = False, next(clips, None)
            except READING_FAILS as error:
                quarantined.append(_quarantined(_fault(part.video, error, certain=guilty is not None), "build"))
                clip = None
            finally:
                source.check()
            if clip is None:
                break
            yield clip


def _fault(video: Video, error: Exception, certain: bool = False) -> Fault:
    """Say why a video cannot be used.

    Raises:
        MemoryError: memory was short, so that the error may come of that; a process of its own has told or will tell.
    """
    if isolate.memory_is_short() and not certain:
        raise MemoryError from error
    code = error.code if isinstance(error, VideoError) else "unreadable"
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    message = " ".join(message.split())
    return Fault(video.source, code, message if len(message) <= LONGEST else f"{message[:LONGEST]} ...")


def _quarantined(fault: Fault, stage: str) -> Quarantined:
    return Quarantined(fault.source, stage, fault.code, fault.message)


def _simulator(run: ShardRun) -> Simulator:
    return simulator(run.source.removeprefix("sim:"), run.seed)


def _episodes(run: ShardRun) -> Iterator[Video]:
    simulator = _simulator(run)
    where = f"sim:{simulator.name}"
    if run.split not in simulator.episodes_per_split:
        raise ValueError(f"{where} has the splits {', '.join(simulator.episodes_per_split)}, not {run.split!r}")
    if run.crop or (run.size, run.size) != (simulator.height, simulator.width):
        raise ValueError(f"{where} draws frames of {simulator.height}; give --size {simulator.height} and no --crop")
    for i in range(simulator.episodes_per_split[run.split])[: run.limit]:
        yield Video(
            source=f"{where}/{run.split}/{i}",
            files=(),
            part=(i, 0),
            frames=simulator.num_frames,
            height=simulator.height,
            width=simulator.width,
            fps=simulator.fps,
        )


def _simulate(run: ShardRun, parts: Sequence[Planned]) -> Iterator[Clip]:
    episodes = _simulator(run).episodes(run.split, parts[0].video.part[0], len(parts), run.seed)
    for part, episode in zip(parts, episodes, strict=True):
        for cut in part.cuts:
            clip = episode.clip(cut.start, run.preprocessing().span)
            yield dataclasses.replace(
                clip,
                key=cut.key,
                frames=clip.frames[:: run.stride],
                stride=run.stride,
                truth={name: array[:: run.stride] if array.ndim else array for name, array in clip.truth.items()},
            )


def _run_all(
    task: Callable[[str], str], items: Sequence[str], label: str, alone: Callable[[Sequence[str]], list[str]]
) -> list[str]:
    """Run a task on every item through Ray Data and return the results in order.

    What comes back is compared with what went in, because Ray drops an item whose worker died twice without a word;
    ``alone`` does those in another way.

    Raises:
        ValueError: a task failed.
    """
    results = _run_tasks(task, items, label)
    lost = [i for i in range(len(items)) if i not in results]
    if lost:
        print(
            f"{label}: the worker process died twice, or ran out of memory, on {len(lost)} of {len(items)} tasks; "
            "each of their videos is now read in a process of its own",
            flush=True,
        )
        results |= zip(lost, alone([items[i] for i in lost]), strict=True)
    return [results[i] for i in range(len(items))]


def _survey_alone(run: ShardRun, root: str, stage: str, items: Sequence[str]) -> list[str]:
    """Scan or probe each video in a process of its own; one that kills it is unusable."""
    results = []
    for item, answer in zip(items, _ask_children(run, stage, root, "", items), strict=True):
        if "fault" in answer:
            fault = Fault(json.loads(item)["source"], *answer["fault"])
            empty = {"videos": [], "ignored": 0, "faults": [fault]}
            results.append(json.dumps(empty if stage == "scan" else {"fault": fault}))
        else:
            results.append(answer["result"])
    return results


def _build_alone(run: ShardRun, root: str, folder: str, items: Sequence[str]) -> list[str]:
    """Read each video of the plans in a process of its own, then build each shard in one without those that killed it.

    Raises:
        ValueError: building a shard kills its process twice, though each of its videos can be read.
    """
    requests = [json.loads(item) | {"guilty": {}} for item in items]
    parts = [(request, part) for request in requests for part in request["plan"][1] if part[0]["files"]]
    answers = _ask_children(run, "read", root, "", [json.dumps(part) for _, part in parts])
    for (request, (video, _)), answer in zip(parts, answers, strict=True):
        if "fault" in answer:
            request["guilty"][video["source"]] = answer["fault"]
    results: dict[int, str] = {}
    deaths: dict[int, tuple[str, str]] = {}
    for _ in range(2):
        todo = [i for i in range(len(requests)) if i not in results]
        answers = _ask_children(run, "build", root, folder, [json.dumps(requests[i]) for i in todo])
        results |= {i: answer["result"] for i, answer in zip(todo, answers, strict=True) if "result" in answer}
        deaths = {i: answer["fault"] for i, answer in zip(todo, answers, strict=True) if "fault" in answer}
    if deaths:
        i, (_, reason) = next(iter(deaths.items()))
        guilty = requests[i]["guilty"]
        sources = [video["source"] for video, _ in requests[i]["plan"][1] if video["source"] not in guilty]
        raise ValueError(
            f"building shard {requests[i]['plan'][0]} ended its process again and again ({reason}), though each of its "
            f"videos can be read: {', '.join(sources[:10])}; if the machine runs out of memory use fewer --workers, "
            "else move these videos out of the source"
        )
    return [results[i] for i in range(len(requests))]


def _read_only(run: ShardRun, root: str, folder: str, item: str) -> str:
    """Cut the clips of one video and drop them; a fault that is told, not died of, is for the build to find again."""
    video, cuts = json.loads(item)
    for _ in _clips(run, root, [Planned(_video(video), tuple(Cut(*cut) for cut in cuts))], [], None):
        pass
    return ""


ALONE: dict[str, Callable[[ShardRun, str, str, str], str]] = {
    "scan": lambda run, root, folder, item: _scan(run, root, item),
    "probe": lambda run, root, folder, item: _probe(run, root, item),
    "read": _read_only,
    "build": build_shard,
}
"""What a process of its own can be asked to do, see ``isolate.ask_child``: (run, root, folder, item) to a result."""


def _ask_children(run: ShardRun, task: str, root: str, folder: str, items: Sequence[str]) -> list[dict[str, Any]]:
    """Do a task on each item in a process of its own, through Ray; an answer has ``result`` or ``fault``.

    Raises:
        ValueError: a task failed, or Ray lost the worker that waited for such a process.
    """
    ask = functools.partial(isolate.ask_child, dataclasses.asdict(run), task, root, folder)
    answers = {i: json.loads(answer) for i, answer in _run_tasks(ask, items, f"{task} alone").items()}
    lost = [i for i in range(len(items)) if i not in answers]
    if lost:
        raise ValueError(
            f"{task}: the worker process died twice on {len(lost)} of {len(items)} tasks, though it only waited for "
            "another one; the machine may be out of memory: use fewer --workers and start again"
        )
    for answer in answers.values():
        if "error" in answer:
            raise ValueError(f"{task} failed: {answer['error']}")
    return [answers[i] for i in range(len(items))]


def _run_tasks(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
    """Run a task on every item; items whose worker died twice or that ran out of memory are absent from the result.

    One block per task and one retry, since Ray would retry a task whose process dies for ever. A kill by Ray's memory
    monitor has a count of its own, which ``cluster.connect`` bounds. Short items share a task, since Ray Data starts no
    more than some fifty in a second; they are then lost together.
    """
    if not items:
        return {}
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    def attempt(row: dict[str, Any]) -> dict[str, Any]:
        before, begin = store.retries(), time.monotonic()
        answer = {"id": row["id"], "result": "", "error": "", "lost": False, "counts": "{}"}
        try:
            answer["result"] = task(row["item"])
            answer["counts"] = json.dumps(_counts(answer["result"], time.monotonic() - begin, before))
        except MemoryError:
            answer["lost"] = True
        except Exception as error:  # Ray would retry nothing and drop the reason; raised again below
            answer["error"] = f"{type(error).__name__}: {error}"
        return answer

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is reported by the caller
    rows = [{"id": i, "item": item} for i, item in enumerate(items)]
    context = ray.data.DataContext.get_current()
    before = context.max_errored_blocks, context.enable_progress_bars
    context.max_errored_blocks, context.enable_progress_bars = -1, False
    results: dict[int, str] = {}
    try:
        blocks = ray.data.from_items(rows, override_num_blocks=_num_tasks(label, len(rows)))
        with warnings.catch_warnings():
            # Ray 2.60 means to replace this argument by a named one, but has none for retries yet.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            mapped = blocks.map(attempt, num_cpus=1, max_retries=1)
        with status.Status(label, len(rows), UNITS.get(label, "tasks")) as progress:
            for row in mapped.iter_rows():
                if row["error"]:
                    raise ValueError(f"{label} failed: {row['error']}")
                if not row["lost"]:
                    results[int(row["id"])] = row["result"]
                    progress.add(**json.loads(row["counts"]))
                else:
                    progress.add(0, died=1)
            progress.add(0, died=len(rows) - progress.done - progress.counts["died"])
    finally:
        context.max_errored_blocks, context.enable_progress_bars = before
    return results


def _num_tasks(label: str, items: int) -> int:
    """Into how many tasks to put some items: each its own, unless there are more short ones than keep all CPUs busy."""
    if label not in SHORT:
        return items
    import ray

    return -(-items // items_per_task(items, int(ray.cluster_resources().get("CPU", 1))))


def items_per_task(items: int, cpus: int) -> int:
    """How many short items share a task."""
    return max(1, min(items // (8 * cpus), ITEMS_PER_TASK), -(-items // TASKS))


def _counts(result: str, seconds: float, retries_before: int) -> dict[str, Any]:
    """What the status line is told of a task's result, in the process that made it."""
    answer = json.loads(result) if result[:1] == "{" else {}
    if isinstance(inner := answer.get("result"), str):  # of a process of its own
        answer = json.loads(inner) if inner[:1] == "{" else {}
    counts = {
        "quarantined": len(answer.get("quarantined") or answer.get("faults") or ()) + ("fault" in answer),
        "retries": status.earlier_attempts() + store.retries() - retries_before,
        "bytes": answer.get("bytes", 0),
    }
    return {**counts, "seconds": answer.get("seconds") or {"read": seconds}}


def _to_json(video: Video) -> str:
    return json.dumps(vars(video))


def _video(fields: dict[str, Any]) -> Video:
    part, keyframes = tuple(fields["part"]), tuple((int(index), int(pts)) for index, pts in fields["keyframes"])
    return Video(**{**fields, "files": tuple(fields["files"]), "part": (part[0], part[1]), "keyframes": keyframes})


def _one_number(channels: set[int]) -> int:
    """The number of channels that all clips have; 0 where there is no clip.

    Raises:
        ValueError: they differ.
    """
    if len(channels) > 1:
        raise ValueError(
            f"clips of one dataset must have one number of channels, these have {sorted(channels)}; make a dataset of "
            "each"
        )
    return next(iter(channels), 0)


def _index_row(shard: str, clip: Clip, members: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "shard": shard,
        "key": clip.key,
        "members": members,
        "source": clip.source,
        "start_frame": clip.start_frame,
        "stride": clip.stride,
        "frames": len(clip.frames),
        "fps": clip.fps,
    }


def _unchanged(write: Callable[[BinaryIO], None], sha256: str | None, name: str) -> Callable[[BinaryIO], None]:
    """Make a writer that refuses to replace a shard by one of other content."""
    if sha256 is None:
        return write

    def checked(stream: BinaryIO) -> None:
        buffer = io.BytesIO()
        write(buffer)
        if hashlib.sha256(buffer.getvalue()).hexdigest() != sha256:
            raise ValueError(f"{name} was made from other videos than the source holds now{_OR_LIMITS}")
        stream.write(buffer.getvalue())

    return checked


def _check_places(source: str, folder: str) -> None:
    if folder == source or folder.startswith(source.rstrip("/") + "/"):
        raise ValueError(f"--out {folder} lies inside --source {source}, where it would be read as input; move it out")


def _settings(run: ShardRun, source: str) -> dict[str, Any]:
    """What of a run decides the bytes of a dataset."""
    preprocessing = run.preprocessing()
    name = _simulator(run).name if source.startswith("sim:") else source.rsplit("/", 1)[-1]
    return {
        "name": name,
        "split": run.split,
        "codec": run.codec,
        "preprocessing": {
            "layout": "sim" if run.source.startswith("sim:") else run.layout,
            "frames": run.frames,
            "stride": run.stride,
            "hop": preprocessing.hop or run.frames * run.stride,
            "start": preprocessing.start,
            **({} if preprocessing.stop is None else {"stop": preprocessing.stop}),
            **({"drop_last": preprocessing.drop_last} if preprocessing.drop_last else {}),
            **({"pad_to": preprocessing.pad_to} if preprocessing.pad_to else {}),
            **({"colours": "inverted"} if preprocessing.inverted else {}),
            **({} if run.clips == "whole" else {"clips": run.clips}),
            **({"video_range": run.video_range} if run.video_range else {}),
            **({} if run.min_objects is None else {"min_objects": run.min_objects}),
            **({} if run.max_objects is None else {"max_objects": run.max_objects}),
            "crop": preprocessing.crop and list(preprocessing.crop),
            "fit": run.fit,
            "filter": run.filter,
            "size": run.size,
            "fps": run.fps,
            "clips_per_shard": clips_per_shard(run),
            "limit": run.limit,
            "seed": run.seed,
        },
    }


def _previous(folder: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the manifest that is there, if any.

    Raises:
        ValueError: it is of other settings.
    """
    path = store.join(folder, "manifest.json")
    if not store.exists(path):
        return None
    manifest = store.read_json(path)
    there = {**manifest.get("preprocessing", {}), **{name: manifest.get(name) for name in ("name", "split", "codec")}}
    wanted = {**settings["preprocessing"], **{name: settings[name] for name in ("name", "split", "codec")}}
    differ = [
        f"{name} {there.get(name)} there, {wanted[name]} now" for name in wanted if there.get(name) != wanted[name]
    ]
    if differ:
        raise ValueError(
            f"{folder} already holds another dataset ({'; '.join(differ)}); choose another --out or --split"
        )
    return manifest


def _intact(folder: str, previous: Mapping[str, Any], plans: Sequence[Plan]) -> dict[int, Built]:
    """Find the shards of an earlier run that are as its manifest says, with what could not be built into them.

    Raises:
        ValueError: its index lists other clips than the plans, so the source has changed.
    """
    try:
        index = store.read_bytes(store.join(folder, "index.parquet"), previous["index"]["sha256"])
        failures = _build_failures(folder, previous)
        file, groups = pq.ParquetFile(pa.BufferReader(index)), {e["name"]: i for i, e in enumerate(previous["shards"])}
        if file.num_row_groups != len(groups):
            raise ValueError("the index has another number of shards than the manifest")
    except (FileNotFoundError, ValueError):
        return {}  # every shard is built again and compared with the manifest
    failed, done = {row.source for row in failures}, 0
    intact: dict[int, Built] = {}
    for plan in plans:
        group = groups.get(plan.name)
        rows = INDEX_SCHEMA.empty_table() if group is None else file.read_row_group(group)
        found = list(zip(*(rows[name].to_pylist() for name in ("key", "source", "start_frame")), strict=True))
        keys = {key for key, _, _ in found}
        wanted = [
            (cut.key, part.video.source, cut.start)
            for part in plan.parts
            for cut in part.cuts
            if cut.key in keys or part.video.source not in failed
        ]
        lost = [part.video.source for part in plan.parts if any(cut.key not in keys for cut in part.cuts)]
        # The table lists failures by shard, then by place in the shard.
        here = failures[done : done + len(lost)]
        done += len(lost)
        if found != wanted or [row.source for row in here] != lost:
            raise ValueError(
                f"{folder} already holds a dataset of other videos than the source holds now ({plan.name} differs)"
                f"{_OR_LIMITS}"
            )
        if group is None:
            intact[plan.shard] = Built(plan.name, 0, "", 0, _index(rows), 0, here)  # all its clips were lost
        else:
            size, sha256 = (previous["shards"][group][name] for name in ("bytes", "sha256"))
            intact[plan.shard] = Built(plan.name, size, sha256, len(found), _index(rows), previous["channels"], here)

    def is_whole(built: Built) -> bool:
        path = store.join(folder, built.name)
        return not built.clips or (store.exists(path) and store.sha256_file(path) == built.sha256)

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        whole = list(pool.map(is_whole, intact.values()))
    return {number: built for (number, built), good in zip(intact.items(), whole, strict=True) if good}


def _build_failures(folder: str, previous: Mapping[str, Any]) -> list[Quarantined]:
    """Read what an earlier run could not build.

    Raises:
        FileNotFoundError: quarantine.parquet is missing, though clips were lost.
        ValueError: it is not as the manifest says.
    """
    if not previous["balance"]["lost"]:
        return []
    table = store.read_bytes(store.join(folder, "quarantine.parquet"), previous["quarantine"]["sha256"])
    rows = [Quarantined(**row) for row in pq.read_table(io.BytesIO(table)).to_pylist()]
    return [row for row in rows if row.stage == "build"]


def _refusal(run: ShardRun, survey: Survey, quarantined: Sequence[Quarantined], clips: int) -> str:
    """Say why there can be no dataset: too large a share is unusable, or no clip is left; empty if there can be one."""
    excess = _excess(run, survey, quarantined)
    if excess and _inputs(survey) >= STRICT_INPUTS:
        return f"{excess}: {_summary(quarantined)}. Mend or remove them, or allow a larger share"
    return "" if clips else f"{run.source} gives no clip: {_summary(quarantined) or 'it holds no video'}"


def _excess(run: ShardRun, survey: Survey, quarantined: Sequence[Quarantined]) -> str:
    """Say by how much the unusable share passes the limit; empty if it does not."""
    left = {row.source for row in quarantined if row.stage in NOT_DAMAGED}
    inputs, unusable = _inputs(survey) - len(left), len({row.source for row in quarantined} - left)
    if unusable <= run.max_quarantined * inputs:
        return ""
    return f"{unusable} of {inputs} inputs cannot be used, more than --max-quarantined {run.max_quarantined}"


def _inputs(survey: Survey) -> int:
    """Videos, and the damaged containers among the quarantined that are no video themselves."""
    return len({video.source for video in survey.videos} | {row.source for row in survey.quarantined})


def _summary(quarantined: Sequence[Quarantined]) -> str:
    shown = [f"{row.source} ({row.code}: {row.message})" for row in quarantined[:5]]
    return "; ".join(shown) + (f"; and {len(quarantined) - 5} more" if len(quarantined) > 5 else "")


def _notes(survey: Survey, quarantined: Sequence[Quarantined]) -> Iterator[str]:
    notes: dict[str, list[str]] = {}
    for video in survey.videos:
        notes.setdefault(video.note, []).append(video.source)
    noted = [
        f"note: {sources[0]}{f' and {len(sources) - 1} more' if len(sources) > 1 else ''}: {note}"
        for note, sources in notes.items()
        if note
    ]
    by_reason: dict[tuple[str, str, str], list[str]] = {}
    for row in quarantined:
        by_reason.setdefault((row.stage, row.code, row.message), []).append(row.source)
    for (stage, code, message), sources in by_reason.items():
        what = "note: left out" if stage == "select" else "warning: quarantined"
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        noted.append(f"{what} {sources[0]}{more} ({stage}, {code}): {message}")
    yield from noted[:20]
    if len(noted) > 20:
        yield f"and {len(noted) - 20} more; quarantine.parquet lists all that is quarantined"


def _balance(
    survey: Survey, plans: Sequence[Plan], built: Sequence[Built], quarantined: Sequence[Quarantined]
) -> dict[str, int]:
    """Count inputs and outputs independently of each other."""
    unusable = {row.source for row in quarantined}
    read = {part.video.source for plan in plans for part in plan.parts} - unusable
    lost = 0
    for plan, shard in itertools.zip_longest(plans, built):
        failed = [part for part in plan.parts if part.video.source in unusable]
        written = _keys(shard) if failed and shard is not None else set[str]()
        lost += sum(cut.key not in written for part in failed for cut in part.cuts)
    return {
        "videos": _inputs(survey),
        "read": len(read),
        "quarantined": len(unusable),
        "ignored": survey.ignored,
        "noted": sum(bool(video.note) for video in survey.videos),
        "clips": sum(shard.clips for shard in built),
        "lost": lost,
    }


def _check_balance(balance: Mapping[str, int], plans: Sequence[Plan], built: Sequence[Built]) -> None:
    """Compare what went in with what came out.

    Raises:
        ValueError: they do not add up.
    """
    planned = sum(plan.clips for plan in plans)
    strange = any(
        _keys(shard) - {cut.key for part in plan.parts for cut in part.cuts}
        for plan, shard in zip(plans, built, strict=True)
    )
    closes = balance["videos"] == balance["read"] + balance["quarantined"]
    if not closes or planned != balance["clips"] + balance["lost"] or strange:
        raise ValueError(f"the counts do not add up, nothing was published: {balance}, clips planned {planned}")


def _publish_reasons(folder: str, quarantined: Sequence[Quarantined], previous: Mapping[str, Any] | None) -> str:
    """Leave the list of unusable inputs in the folder of a dataset that is not made, and say where it is."""
    table = _quarantine_table(quarantined)
    if not quarantined or (previous is not None and previous["quarantine"]["sha256"] != _entry(table)["sha256"]):
        return ""  # the finished dataset that is there keeps its own list
    path = store.join(folder, "quarantine.parquet")
    store.publish(path, table)
    return f"; all are listed in {path}"


def _publish(
    folder: str,
    settings: Mapping[str, Any],
    balance: Mapping[str, int],
    built: Sequence[Built],
    quarantined: Sequence[Quarantined],
    previous: Mapping[str, Any] | None,
) -> store.Published:
    shards = [shard for shard in built if shard.clips]
    index = _parquet(INDEX_SCHEMA, (shard.rows for shard in shards))
    table = _quarantine_table(quarantined)
    size = settings["preprocessing"]["size"]
    manifest = {
        **settings,
        "schema": SCHEMA,
        "kind": "dataset",
        "frames": settings["preprocessing"]["frames"],
        "height": size,
        "width": size,
        "channels": _one_number({shard.channels for shard in shards}),
        "clips": balance["clips"],
        "balance": dict(balance),
        "index": _entry(index),
        "quarantine": {"rows": len(quarantined), **_entry(table)},
        "shards": [
            {"name": shard.name, "bytes": shard.bytes, "samples": shard.clips, "sha256": shard.sha256}
            for shard in shards
        ],
    }
    if previous is not None and previous != manifest:
        raise ValueError(
            f"{folder} already holds a dataset of other content (the source has changed since); choose another --out"
        )
    for shard in built:
        if not shard.clips:
            store.remove(store.join(folder, shard.name))
    store.publish(store.join(folder, "index.parquet"), index)
    store.publish(store.join(folder, "quarantine.parquet"), table)
    return store.publish_json(store.join(folder, "manifest.json"), manifest)


def _quarantine_table(quarantined: Sequence[Quarantined]) -> bytes:
    return _parquet(QUARANTINE_SCHEMA, [_table(QUARANTINE_SCHEMA, [row._asdict() for row in quarantined])])


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _table(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(cast(Any, rows), schema=schema)


def _index(rows: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)
    return sink.getvalue()


def _keys(shard: Built) -> set[str]:
    return set(shard.rows["key"].to_pylist())


def _parquet(schema: pa.Schema, groups: Iterable[pa.Table]) -> bytes:
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd", write_page_checksum=True) as writer:
        for rows in groups:
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    return buffer.getvalue()
