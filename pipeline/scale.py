"""Scale on paper: what each stage costs at sizes that fit no test, by formulas of a few constants.

``SCALE.md`` shows ``tables_of_the_page``. ``jobs/benchmark.py ssm --preset debug --parts scale`` measures the constants
again, and sets predicted rates of sharding, training and extraction by 1, 2 and 4 workers beside measured ones.
"""

import base64
import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from objdyn.datasets import Video
from pipeline import reader, shard, store
from pipeline.config import ExtractRun, LoaderConfig, ShardRun, TrainRun
from pipeline.status import as_bytes, as_time
from pipeline.timing import in_child, say

SIZES = (10**4, 10**6, 10**7, 10**8)
"""Clips of the page's tables."""
GPUS = (1, 10, 1000)
WORKERS = (1, 2, 4)
TRIED_CLIPS, TRIED_PER_SHARD = 24_000, 1000
"""What the constants are measured on."""
TASKS = 300
"""Empty tasks of which Ray's own time is measured."""
MICRO_BATCHES = 4
"""Of a step whose workers are counted."""
SHARD_CLIPS, PART_CLIPS, PARTS = 60, 8, 100
"""Of what is sharded and extracted while workers are counted."""
LOOK_SECONDS = 0.05
"""What one of several workers waits before it is given more: Ray Data 2.60 looks when all have ended, or each 0.1 s."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Constants:
    """What the formulas are made of; a test compares the measured bytes with what is measured there."""

    clips_per_shard: int = 1000
    """Assumed; 195 is the default at 64 pixels and 20 frames, ``--clips-per-shard`` sets it."""
    clips_per_video: int = 6
    """Assumed: 120 frames, 20 a clip."""
    clip_bytes: float = 45_000
    """Assumed: 20 frames of 64 pixels in zstd."""
    rows_per_clip: tuple[int, int] = (480, 20)
    """Assumed: of objects (24 particles) and frames."""
    parameters: float = 10e6
    """Assumed."""
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    """Assumed; shards are made on these."""
    train_rate: float = 100.0
    """Assumed: clips/s that a GPU trains on, whatever the number of GPUs (batch of 32 a GPU)."""
    extract_rate: float = 200.0
    """Assumed: clips/s that a GPU encodes."""
    probe_seconds: float = 0.05
    """Assumed: CPU seconds of a video's first decoding."""
    build_seconds: float = 0.01
    """Assumed: CPU seconds of a clip: second decoding, resizing, zstd."""

    manifest_bytes: float = 161.0
    """Measured, per shard."""
    index_bytes: float = 14_500.0
    """Measured, per shard of 1000 clips: 13.3 a clip, and 1.2 kB of footer."""
    record_bytes: float = 369.0
    """Measured, per part of the tables' manifest."""
    video_bytes: float = 490.0
    """Measured, of the driver's memory per video (one keyframe; 110 for each more)."""
    probe_bytes: float = 670.0
    """Measured, per video that is probed at a time: request and answer."""
    plan_bytes: float = 177.0
    """Measured, per clip: key and first frame until its shard is built."""
    item_bytes: float = 70.0
    """Measured, per clip: the request for its shard; Ray holds it once more."""
    built_bytes: float = 22.0
    """Measured, per clip: its row of the index, held twice while answers are read."""
    video_seconds: float = 34e-6
    """Measured, of the driver per video: its request, its answer."""
    plan_seconds: float = 12e-6
    """Measured, of the driver per clip: plan, request, answer, balance, index."""
    open_seconds: float = 40e-6
    """Measured, per shard: reading manifest and index, hashing both, drawing an epoch's order."""
    order_bytes: float = 370.0
    """Measured, of a worker's memory per shard: manifest, sizes, order."""
    task_seconds: float = 0.016
    """Measured: Ray's own time for a task of one item, whatever the number of CPUs."""
    task_bytes: float = 7_000.0
    """Measured, of the driver's memory per task."""


CONSTANTS = Constants()


# ---- the formulas ----------------------------------------------------------------------------------------------------


def shards_of(clips: float, c: Constants = CONSTANTS) -> int:
    return math.ceil(clips / c.clips_per_shard)


def driver_bytes(clips: float, c: Constants = CONSTANTS) -> float:
    """Most memory of the driver of make_shards.py beyond its start (0.3 GB)."""
    videos = clips / c.clips_per_video
    held = videos * c.video_bytes + clips * c.plan_bytes
    probing = min(videos, shard.VIDEOS_AT_ONCE) * c.probe_bytes
    building = clips * (2 * c.item_bytes + 2 * c.built_bytes) + shards_of(clips, c) * c.task_bytes
    return held + max(probing, building)


def shard_seconds(clips: float, cpus: int, c: Constants = CONSTANTS) -> tuple[float, float, float]:
    """Seconds of the driver alone, of handing tasks to Ray, and of the work on all CPUs; the latter two overlap."""
    videos = clips / c.clips_per_video
    at_once = min(math.ceil(videos), shard.VIDEOS_AT_ONCE)
    alone = videos * c.video_seconds + clips * c.plan_seconds
    handing = (videos / shard.items_per_task(at_once, cpus) + shards_of(clips, c)) * c.task_seconds
    return alone, handing, (videos * c.probe_seconds + clips * c.build_seconds) / cpus


def open_seconds(clips: float, c: Constants = CONSTANTS) -> float:
    """Seconds from a worker's start to its first shard, without what fetching the index takes."""
    return shards_of(clips, c) * c.open_seconds


def reading(clips: float, gpus: int, c: Constants = CONSTANTS) -> tuple[float, float]:
    """GET requests per second in all, and bytes per second of each node, while training from object storage.

    The order is global, so a shard's clips go to all workers: each node fetches every shard once an epoch, unless its
    cache holds them all.
    """
    nodes, rate = math.ceil(gpus / c.gpus_per_node), gpus * c.train_rate
    if clips * c.clip_bytes <= LoaderConfig.cache_gb * 1e9:
        return 0.0, 0.0  # from the second epoch on
    return nodes * rate / c.clips_per_shard, rate * c.clip_bytes


def checkpoint_bytes(c: Constants = CONSTANTS) -> float:
    """Weights and Adam's two averages."""
    return 3 * 4 * c.parameters


def extracting(clips: float, gpus: int, c: Constants = CONSTANTS) -> tuple[float, float]:
    """Seconds of an extraction, and its requests per second: a shard in, two tables and a record out, one removed."""
    parts = shards_of(clips, c)
    seconds = max(clips / (gpus * c.extract_rate), parts * c.task_seconds, c.clips_per_shard / c.extract_rate)
    return seconds, 5 * parts / seconds


def seconds_per_task(work: float, task: float, workers: int, cores: int) -> float:
    """What a task takes of a stage's time: ``work`` in a worker and ``task`` in Ray, on cores that both share.

    A worker has no second task to begin with while it waits for Ray.
    """
    wait = task + (LOOK_SECONDS if workers > 1 else 0.0)
    return max(work / min(workers, cores) + wait / workers, task, (work + task) / cores)


def seconds_per_step(micro_batch: float, rest: float, exchange: float, workers: int, cores: int) -> float:
    """What a step of ``MICRO_BATCHES`` takes: they are shared out, ``rest`` (the optimiser) is done by every worker.

    ``exchange`` is for gradients and, most of it, for waiting until the slowest worker has its own.
    """
    at_once = min(workers, cores)
    return MICRO_BATCHES * micro_batch / at_once + rest * workers / at_once + (exchange if workers > 1 else 0.0)


# ---- the page's tables -----------------------------------------------------------------------------------------------


def tables_of_the_page(c: Constants = CONSTANTS) -> str:
    """The two tables of SCALE.md, in Markdown."""
    head = [
        "clips",
        "shards",
        "manifest",
        "index",
        "driver memory",
        "driver alone",
        "Ray's tasks",
        "open",
        "worker memory",
    ]
    rows = [[*head, "rows of objects", "tables' manifest"]]
    for clips in SIZES:
        alone, handing, _ = shard_seconds(clips, c.cpus_per_gpu, c)
        n = shards_of(clips, c)
        rows.append(
            [
                _power(clips), f"{n:,}", as_bytes(n * c.manifest_bytes), as_bytes(n * c.index_bytes),
                as_bytes(driver_bytes(clips, c)), as_time(alone), as_time(handing), as_time(open_seconds(clips, c)),
                as_bytes(n * c.order_bytes), f"{clips * c.rows_per_clip[0]:.1e}", as_bytes(n * c.record_bytes),
            ]
        )  # fmt: skip
    head = ["clips", "GPUs", "sharding", "epoch", "reading, GET/s", "reading, per node", "checkpoints", "resume"]
    more = [[*head, "extraction", "its requests/s"]]
    for clips in SIZES:
        for gpus in GPUS:
            alone, handing, work = shard_seconds(clips, gpus * c.cpus_per_gpu, c)
            requests, traffic = reading(clips, gpus, c)
            seconds, asked = extracting(clips, gpus, c)
            steps_a_second = c.train_rate / 32
            saved = checkpoint_bytes(c) * steps_a_second / TrainRun.checkpoint_every
            more.append(
                [
                    _power(clips), str(gpus), as_time(alone + max(handing, work)),
                    as_time(clips / (gpus * c.train_rate)), f"{requests:.3g}", f"{as_bytes(traffic)}/s",
                    f"{as_bytes(saved)}/s", as_bytes(checkpoint_bytes(c) * gpus), as_time(seconds), f"{asked:.3g}",
                ]
            )  # fmt: skip
    return "\n".join([*_markdown(rows), "", *_markdown(more)])


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _power(clips: int) -> str:
    return f"10^{round(math.log10(clips))}"


# ---- the constants, measured -----------------------------------------------------------------------------------------


def measure_constants(clips: int = TRIED_CLIPS) -> dict[str, float]:
    """Measure what needs neither Ray nor videos: the stages' own functions on made-up videos and answers."""
    c = CONSTANTS
    run = ShardRun(source="/videos", out="/data", frames=20, clips_per_shard=TRIED_PER_SHARD)
    names = [f"clips/part-{i // 1000:05d}/video-{i:08d}.mp4" for i in range(clips // c.clips_per_video)]
    found: dict[str, float] = {}

    tracemalloc.start()
    videos, found["video_bytes"] = _grown(lambda: [_made_up(name) for name in names], len(names))
    (plans, _), found["plan_bytes"] = _grown(lambda: shard.plan_shards(run, videos), clips)
    _, found["probe_bytes"] = _grown(lambda: [(shard._to_json(v), _probed(v)) for v in videos], len(names))
    tracemalloc.stop()

    clock = _Clock()
    for video in videos:
        shard._video(json.loads(_probed(video))["video"])
        shard._to_json(video)
    found["video_seconds"] = clock.lap() / len(videos)

    shard.plan_shards(run, videos)
    items = [json.dumps({"plan": plan, "sha256": None}, default=vars) for plan in plans]
    planning = clock.lap()
    found["item_bytes"] = sum(map(len, items)) / clips
    answers = [_answer(plan) for plan in plans]
    clock.lap()
    built = [
        shard.Built(**{**(b := json.loads(a)), "index": pa.py_buffer(base64.b64decode(b["index"]))}) for a in answers
    ]
    surveyed = shard.Survey("/videos", tuple(videos), (), 0)
    balance = shard._balance(surveyed, plans, built, [])
    shard._check_balance(balance, plans, built)
    index = shard._parquet(shard.INDEX_SCHEMA, (each.rows for each in built))
    found["plan_seconds"] = (planning + clock.lap()) / clips
    found["built_bytes"] = sum(each.index.size for each in built) / clips
    found["index_bytes"] = len(index) / len(plans)

    entries = [{"name": b.name, "bytes": b.bytes, "samples": b.clips, "sha256": b.sha256} for b in built]
    manifests = [store.sealed_json({"shards": entries[:n]}) for n in (0, len(entries))]
    found["manifest_bytes"] = (len(manifests[1]) - len(manifests[0])) / len(entries)
    entry = {"rows": 480_000, "bytes": 61_234_567, "sha256": "0" * 64}
    record = {"name": "shard-00000", "clips": 1000, "clips_not_finite": 0, "objects": entry, "frames": entry}
    records = [store.sealed_json({"parts": [record] * n}) for n in (0, 100)]
    found["record_bytes"] = (len(records[1]) - len(records[0])) / 100

    many = 4000 // len(plans) * len(plans)  # a few shards would show what opening costs by itself
    index = shard._parquet(shard.INDEX_SCHEMA, (each.rows for _ in range(many // len(plans)) for each in built))
    manifest = store.sealed_json({"shards": entries * (many // len(plans))})
    clock.lap()
    tracemalloc.start()
    opened, found["order_bytes"] = _grown(lambda: _open(manifest, index, many), many)
    tracemalloc.stop()
    del opened
    clock.lap()
    _open(manifest, index, many)
    found["open_seconds"] = clock.lap() / many
    return found


# ---- rates, predicted and measured -----------------------------------------------------------------------------------


def measure(folder: str, videos: str, data: str, checkpoint: str, run: TrainRun) -> Report:
    """Measure the constants, and each stage by 1, 2 and 4 workers beside what the formulas make of the same work bare.

    Args:
        folder: for what is written.
        videos: to shard.
        data: with ``PARTS`` shards in its split ``train``, to extract.
        checkpoint: of the model to extract with.
        run: to train, with ``MICRO_BATCHES`` micro-batches in a batch.
    """
    say("scale: constants")
    found = in_child(measure_constants)
    stages: dict[str, dict[str, Report]] = {"probe": {}, "build": {}, "train": {}, "extract": {}}
    cores = os.cpu_count() or 1
    waits = []
    for workers in WORKERS:  # each beside the same work bare, since machines are of another speed by the minute
        say("scale: the same work bare")
        bare = in_child(_sharding, videos, os.path.join(folder, "shards"), 0)
        part = in_child(_extraction_bare, checkpoint, data, os.path.join(folder, f"tables-bare-{workers}"))
        micro_batch, rest = in_child(_training_bare, run, os.path.join(folder, f"run-bare-{workers}"))
        together = _two_without_ray(run, os.path.join(folder, f"run-two-{workers}"))
        exchange = max(0.0, together - seconds_per_step(micro_batch, rest, 0.0, 2, cores))
        say(f"scale: {workers} workers")
        sharded = in_child(_sharding, videos, os.path.join(folder, "shards"), workers)
        waits.append(sharded["task"])
        rates = {name: sharded[name] for name in ("probe", "build")}
        rates["train"] = in_child(_training, workers, run, os.path.join(folder, f"run-{workers}"))
        rates["extract"] = in_child(_extraction, workers, checkpoint, data, os.path.join(folder, f"tables-{workers}"))
        items = shard.items_per_task(sharded["videos"], workers)
        work = {"probe": items / bare["probe"], "build": SHARD_CLIPS / bare["build"], "extract": part}
        predicted = {
            name: seconds_per_task(work[name], sharded["task"], workers, cores)
            / {"probe": items, "build": SHARD_CLIPS}.get(name, 1)
            for name in work
        }
        predicted["train"] = seconds_per_step(micro_batch, rest, exchange, workers, cores)
        for name, seconds in predicted.items():
            error = 1 / seconds / rates[name] - 1
            stages[name][str(workers)] = {"predicted": 1 / seconds, "measured": rates[name], "error": error}
    found["task_seconds"] = statistics.median(waits)
    constants = {name: {"model": getattr(CONSTANTS, name), "measured": value} for name, value in found.items()}
    return {"cores": cores, "constants": constants, "stages": stages}


def table(report: Report) -> list[str]:
    """The lines of the benchmark's table."""
    lines = [
        f"scale: rates that the formulas of pipeline/SCALE.md predict on {report['cores']} cores, and measured ones"
    ]
    units = {"probe": "videos/s", "build": "clips/s", "train": "steps/s", "extract": "parts/s"}
    for name, rows in report["stages"].items():
        for workers, each in rows.items():
            rates = f"predicted {each['predicted']:8.3g}, measured {each['measured']:8.3g} {units[name]:9}"
            lines.append(f"  {name:8} {workers} workers   {rates} error {100 * each['error']:+.0f} %")
    lines.append("  constants, as the page has them and as they are here")
    for name, each in report["constants"].items():
        lines.append(f"  {name:16} {each['model']:10.4g} {each['measured']:10.4g}")
    return lines


def _sharding(videos: str, out: str, workers: int) -> Report:
    """Videos and clips per second of both passes, and seconds of an empty task; 0 workers do it in this process."""
    from pipeline import benchmark, cluster

    run = ShardRun(source=videos, out="", frames=benchmark.FRAMES, clips_per_shard=SHARD_CLIPS)
    task = 0.0
    if workers:
        cluster.connect(workers)
        shard._run_tasks(_answer_nothing, [""] * 50, "start")
        begin = time.perf_counter()
        shard._run_tasks(_answer_nothing, [""] * TASKS, "nothing")
        task = (time.perf_counter() - begin) / TASKS
    done = benchmark.shard_once(run, out, None if workers else benchmark.in_this_process, workers or 1)
    found = len(shard.find_videos(run, run.source)[1].videos)
    return {"task": task, "videos": found, **{name: done[name].rate for name in ("probe", "build")}}


def _answer_nothing(item: str) -> str:
    return item


def _training_bare(run: TrainRun, out: str) -> tuple[float, float]:
    """Seconds of a micro-batch, and of the rest of a step."""
    seconds = []
    for count in (1, MICRO_BATCHES):
        optim = dataclasses.replace(run.optim, batch_size=count * run.micro_batch_size)
        seconds.append(_step(dataclasses.replace(run, optim=optim, out=f"{out}-{count}"), None))
    micro_batch = (seconds[1] - seconds[0]) / (MICRO_BATCHES - 1)
    return micro_batch, max(0.0, seconds[0] - micro_batch)


def _two_without_ray(run: TrainRun, out: str) -> float:
    """Seconds of a step that two workers share."""
    from pipeline import benchmark

    run = dataclasses.replace(run, out=out, workers=2)
    benchmark.train_without_ray(run, f"{out}-meeting")
    steps, seconds = benchmark.counted_steps(out)
    return seconds / steps


def _step(run: TrainRun, train: Callable[[TrainRun], object] | None) -> float:
    from pipeline import benchmark

    with benchmark._silence():
        (train or benchmark.train_bare)(run)
    steps, seconds = benchmark.counted_steps(run.out)
    return seconds / steps


def _extraction_bare(checkpoint: str, data: str, out: str) -> float:
    """Seconds of a part."""
    from pipeline import benchmark

    found = benchmark.measure_extraction(checkpoint, data, out, PART_CLIPS, "cpu")
    return found["seconds"] / (PARTS - 1)


def _training(workers: int, run: TrainRun, out: str) -> float:
    """Steps per second."""
    from pipeline import cluster, train

    cluster.connect(workers + 1)  # Ray Train wants one beside its workers'
    return 1 / _step(dataclasses.replace(run, out=out, workers=workers), train.train)


def _extraction(workers: int, checkpoint: str, data: str, out: str) -> float:
    """Parts per second."""
    from pipeline import benchmark, cluster, extract

    cluster.connect(workers)
    with benchmark._silence():
        extract.extract(
            ExtractRun(checkpoint, data, out, "train", batch_size=PART_CLIPS, workers=workers, device="cpu")
        )
    done = sorted(os.stat(entry.path).st_mtime for entry in os.scandir(os.path.join(out, "parts")))
    # Workers that are up first do many parts before the others have imported torch, which takes the cores, too.
    done = done[len(done) // 2 :]
    return (len(done) - 1) / (done[-1] - done[0])


def _open(manifest: bytes, index: bytes, shards: int) -> tuple[Any, ...]:
    """What a worker does with a manifest and an index before its first shard."""
    for data in (manifest, index):
        hashlib.sha256(data).hexdigest()
    fields = store.parse_json(manifest, "manifest.json")
    listed = [reader._listed(entry["name"], entry, int(entry["samples"])) for entry in fields["shards"]]
    del fields
    order = reader._EpochOrder([each.samples for each in listed], 0, 0, LoaderConfig.window_shards)
    order.sample(0)
    return listed, order, pq.ParquetFile(pa.BufferReader(index)), shards


class _Clock:
    """CPU seconds between calls: other work on the machine does not count."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        before, self._last = self._last, time.process_time()
        return self._last - before


def _grown(call: Callable[[], Any], count: int) -> tuple[Any, float]:
    """What a call gives, and the bytes that this holds, per item."""
    before = tracemalloc.get_traced_memory()[0]
    result = call()
    return result, (tracemalloc.get_traced_memory()[0] - before) / count


def _made_up(name: str) -> Video:
    name = name[:-1] + name[-1]  # a string of its own, as parsed JSON has
    return Video(name, (name[:-1] + name[-1],), (0, 0), 120, 320, 480, 25.0 + 0, ((0, 1000 + len(name)),))


def _probed(video: Video) -> str:
    return json.dumps({"video": vars(video)})


def _answer(plan: shard.Plan) -> str:
    """What a worker would answer that has built a shard."""
    rows: list[dict[str, Any]] = []
    offset = 0
    for part in plan.parts:
        for cut in part.cuts:
            members = []
            for name, size in (("frames.npy.zst", 44_000 + 31 * len(rows) % 1709), ("json", 219 + len(rows) % 3)):
                members.append({"name": name, "offset": offset + 512, "size": size})
                offset += 512 + -(-size // 512) * 512
            place = {"shard": plan.name, "key": cut.key, "members": members, "source": part.video.source}
            rows.append(place | {"start_frame": cut.start, "stride": 1, "frames": 20, "fps": 25.0})
    index = shard._index(shard._table(shard.INDEX_SCHEMA, rows))
    built = shard.Built(plan.name, offset, f"{plan.shard:064x}", len(rows), index, 3)
    return json.dumps({**vars(built), "index": base64.b64encode(index).decode()})
