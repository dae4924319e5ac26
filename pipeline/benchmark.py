"""Where the time goes: a family's training step and verbs part by part, and each stage beside the same work bare.

Nothing is copied to be measured: the training step is that of ``loop.train``, watched through hooks; sharding and
extraction call the functions of their stages. What is generated (videos, shards, checkpoints) lies in a temporary
folder. Everything that runs a model runs in a process of its own, so that its peak memory is its own.

A comparison is a number of pairs, the stage and the same work without Ray one right after the other, in alternating
order, because the speed of a machine drifts; the ratio is taken inside a pair. Start-up (processes, imports, models) is
left out of the rates and stated beside them.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from objdyn import clips, families, simulators
from objdyn.clips import Clip
from objdyn.simulators import SIMULATORS, Episode, Simulator
from pipeline import (
    checkpoint,
    cluster,
    extract,
    loop,
    quickstart,
    reference,
    reference_ddlp,
    scale,
    shard,
    store,
    sweep_timing,
    tables,
    textbook,
)
from pipeline.config import (
    BENCHMARK_PARTS,
    BenchmarkRun,
    ExtractRun,
    LoaderConfig,
    OptimConfig,
    ShardRun,
    TrainRun,
    torch_device,
    with_overrides,
)
from pipeline.machine import peak_memory
from pipeline.presets import PRESETS
from pipeline.reader import TrainingReader, iter_clips, open_source
from pipeline.status import as_bytes
from pipeline.timing import (
    IntegrityClock,
    Spread,
    StepTimer,
    alternate,
    in_child,
    mean_parts,
    new_processes,
    repeat,
    replaced,
    say,
    spread,
)

SCHEMA = 1
TARGETS = {"ray-train": 0.95, "workers": 1.6, "extract": 0.90, "shard": 0.90, "reader": 2500.0, "integrity": 0.03}
"""Least ratio to the same work bare, or to one worker; least clips per second; largest share of SHA-256 and fsync."""

SIMULATOR = "balls-interaction"
FRAMES = 20
"""Frames of a stored clip, or more where the preset's clips are longer."""
HORIZON = 10
"""Frames of a rollout."""
READER_CLIPS, READER_BATCH, READER_SHARD = 1152, 32, 192
VIDEO_SIDE, VIDEO_FRAMES, VIDEOS_DRAWN = 256, 100, 8
"""Of the mp4 files to shard; a few are drawn and copied under many names."""
SHARDS_PER_SLOT = 2
EXTRACT_PARTS = 5
"""Parts of an extraction; the first one has the start-up and is not counted."""
ARM_SECONDS = 6.0
"""What one side of a pair should take, so that five pairs stay within minutes."""

REFERENCES = ("ddlp", *reference.REFERENCES, "ssm")
"""Families that have a part ``reference``."""

Report = dict[str, Any]


class Arm(NamedTuple):
    """One side of a pair."""

    amount: float
    """Clips, videos or steps."""
    seconds: float
    """What they took, without the start-up."""
    start_up: float = 0.0
    slots: int = 1
    """Processes that worked side by side."""

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


@store.job
def benchmark(run: BenchmarkRun) -> str:
    """Measure the parts of a run, publish the numbers as JSON after each part, and return the table.

    Raises:
        ValueError: unknown family or preset, or a place to write to that cannot be.
        ChildProcessError: a measuring process died.
    """
    preset = _preset(run)
    out = store.resolve(run.out, "--out") if run.out else ""
    if store.is_url(run.scratch):
        raise ValueError(f"--scratch {run.scratch} must be a local folder; videos are written into it")
    # Threads that wait by spinning take the cores from whoever they wait for, as soon as two processes share a machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    device = torch_device(run.device)
    threads = run.threads or preset.threads or os.cpu_count() or 1
    report: Report = {
        "schema": SCHEMA,
        "kind": "benchmark",
        "family": run.family,
        "preset": run.preset,
        "pairs": run.pairs,
        "code": checkpoint.code_revision(),
        "machine": machine(device, threads),
    }
    with tempfile.TemporaryDirectory(prefix="objdyn-benchmark-", dir=run.scratch or None) as folder:
        bench = _Bench(run, preset, device, threads, folder)
        report["data"] = bench.describe_data()
        for part in _parts(run):
            begin = time.monotonic()
            report[part] = bench.measure(part)
            say(f"{part}: done in {time.monotonic() - begin:.0f} s")
            report["machine"] |= {"load_after": _load(), "ray_start_seconds": bench.ray_start_seconds}
            if out:
                store.publish_json(out, report)
    return render(report) + (f"\nnumbers: {out}" if out else "")


class _Bench:
    """The parts of one run, and what they share: a folder, a dataset, a checkpoint."""

    def __init__(self, run: BenchmarkRun, preset: TrainRun, device: torch.device, threads: int, folder: str) -> None:
        self.run, self.preset, self.device, self.threads, self.folder = run, preset, device, threads, folder
        self.side = int(getattr(preset.model, "image_size", SIMULATORS[SIMULATOR].height))
        self.source = own_source(preset, self.side)
        self.frames = max(FRAMES, preset.clip_frames)
        if self.source:
            self.frames = min(self.frames, simulators.simulator(self.source).num_frames)
        self.device_name: Literal["cpu", "cuda"] = cast(Literal["cpu", "cuda"], device.type)
        self.middle = max(1, preset.steps // 2)
        self.step_seconds: float | None = None
        self.ray_start_seconds: float | None = None
        self.niceness = 0
        self._number = itertools.count()

    def describe_data(self) -> str:
        size = f"{self.frames} frames of {self.side}x{self.side}, in shards on the local disk"
        if not self.source:
            return f"sim:{SIMULATOR}, {size}, in place of the preset's own data"
        others = "" if self.source == SIMULATOR else f"; those of reader and shard are of {SIMULATOR}"
        return f"sim:{self.source}, {size}{others}"

    def measure(self, part: str) -> Report:
        return {
            "train": self.train,
            "rollout": self.rollout,
            "reader": self.reader,
            "shard": self.shard,
            "extract": self.extract,
            "ray-train": self.ray_train,
            "workers": self.workers,
            "reference": self.reference,
            "sweep": lambda: sweep_timing.measure(self.folder),
            "scale": self.scale,
        }[part]()

    def train(self) -> Report:
        run = self._from_the_middle()
        say(f"train: {1 + self.run.steps} steps of {run.optim.batch_size} clips of {run.clip_frames} frames")
        measured = in_child(measure_training, run, self.run.steps, self.preset.checkpoint_every)
        self.step_seconds = measured["seconds"]["median"]
        return {
            "batch_size": run.optim.batch_size,
            "micro_batch_size": run.micro_batch_size,
            "frames": run.clip_frames,
            "precision": run.precision,
            "threads": self.threads,
            "after_step": self.middle,
            **measured,
        }

    def rollout(self) -> Report:
        batches = sorted({1, self.preset.micro_batch_size})
        say(f"rollout: encode, rollout and decode of {' and '.join(map(str, batches))} clips")
        run = self._train_run()
        rows = {
            str(size): in_child(measure_verbs, run, size, run.clip_frames, HORIZON, self.run.pairs) for size in batches
        }
        return {"context": run.clip_frames, "horizon": HORIZON, "threads": self.threads, "batches": rows}

    def reader(self) -> Report:
        say(f"reader: {self.run.pairs} epochs of {READER_CLIPS} clips")
        data = self._new("reader")
        # Without truth, like videos: segmentations would be most of the bytes that are hashed.
        write_dataset(data, READER_CLIPS, FRAMES, SIMULATORS[SIMULATOR].height, READER_SHARD, truth=False)
        return in_child(measure_reader, data, READER_BATCH, self.run.pairs)

    def shard(self) -> Report:
        slots = self._connect("shard")
        say("shard: writing videos")
        source = self._new("videos")
        sharding = ShardRun(source=source, out="", frames=FRAMES, size=self.side)
        videos_per_shard = max(1, shard.clips_per_shard(sharding) // (VIDEO_FRAMES // FRAMES))
        write_videos(source, videos_per_shard * SHARDS_PER_SLOT * slots)
        processes = min(slots, os.cpu_count() or 1)  # of a cluster the pool has this machine alone
        with new_processes(processes, self.niceness) as pool:
            sides = {
                "stage": lambda: shard_once(sharding, self._new("shards"), None, slots),
                "bare": lambda: shard_once(sharding, self._new("shards"), over_processes(pool), processes),
            }
            first = {side: run() for side, run in sides.items()}
            pairs = alternate("shard", self.run.pairs, sides["stage"], sides["bare"])
        report = compare([(a["all"], b["all"]) for a, b in pairs], "clips/s", TARGETS["shard"])
        report["start_up"] = {side: done["all"].start_up for side, done in first.items()}
        for phase, unit in (("probe", "videos/s"), ("build", "clips/s")):
            report[phase] = compare([(a[phase], b[phase]) for a, b in pairs], unit, None)
        limited = dataclasses.replace(sharding, limit=videos_per_shard)
        return report | {"integrity": measure_shard_integrity(limited, self._new("shards"))}

    def extract(self) -> Report:
        self._connect("extract")
        model, batch = self._checkpoint(), ExtractRun.batch_size
        say("extract: trial")
        few = self._new("data")
        self._write_dataset(few, 3 * batch, batch)
        trial = in_child(measure_extraction, model, few, self._new("tables"), batch, self.device_name)
        wanted = ARM_SECONDS / (EXTRACT_PARTS - 1) * trial["clips"] / trial["seconds"]
        usual = shard.clips_per_shard(ShardRun(source="", out="", frames=self.frames, size=self.side))
        size = min(max(1, round(wanted / batch)) * batch, max(usual, batch))
        data = self._new("data")
        self._write_dataset(data, EXTRACT_PARTS * size, size)
        details: list[Report] = []

        def bare() -> Arm:
            begin = time.monotonic()
            out = self._new("tables")
            found = in_child(measure_extraction, model, data, out, batch, self.device_name, niceness=self.niceness)
            details.append(found)
            start_up = time.monotonic() - begin - found["seconds"] * EXTRACT_PARTS / (EXTRACT_PARTS - 1)
            return Arm(found["clips"], found["seconds"], start_up)

        def stage() -> Arm:
            out = self._new("tables")
            return extract_once(ExtractRun(model, data, out, "train", batch_size=batch, device=self.device_name))

        pairs = alternate("extract", self.run.pairs, stage, bare)
        encoders = [Arm(found["clips"], found["model_seconds"]) for found in details]
        report = compare(
            [(a, encoder) for (a, _), encoder in zip(pairs, encoders, strict=True)], "clips/s", TARGETS["extract"]
        )
        same_work = compare(pairs, "clips/s", None)
        report["start_up"] = same_work["start_up"]
        # Syncs are per part and hashing is per byte: stated for parts as large as those of a usual dataset.
        larger = usual / size
        middle = sorted(details, key=lambda found: found["seconds"])[len(details) // 2]
        part = {name: value / (EXTRACT_PARTS - 1) for name, value in middle.items()}
        integrity = _integrity(
            part["sha256_seconds"] * larger,
            part["sync_seconds"],
            (part["seconds"] - part["sync_seconds"]) * larger + part["sync_seconds"],
        )
        integrity["clips_per_part"] = usual
        return report | {
            "threads": 1 if self.device.type == "cpu" else None,
            "batch_size": batch,
            "clips_per_part": size,
            "writing": same_work,
            "integrity": integrity,
        }

    def ray_train(self) -> Report:
        from pipeline import train

        self._connect("ray-train")
        if self.step_seconds is None:
            say("ray-train: trial")
            trial = in_child(measure_training, self._from_the_middle(), 1, 1)
            self.step_seconds = float(trial["seconds"]["median"])
        interval = max(1, round(ARM_SECONDS / 2 / self.step_seconds))
        intervals = 2 if interval > 1 else max(1, round(ARM_SECONDS / self.step_seconds))
        steps = interval * (1 + intervals)

        def side(function: Callable[[TrainRun], object]) -> Arm:
            run = dataclasses.replace(self._from_the_middle(), steps=self.middle + steps, log_every=interval)
            begin = time.monotonic()
            with _silence():
                function(run)
            whole = time.monotonic() - begin
            counted, seconds = counted_steps(run.out, self.middle)
            return Arm(counted, seconds, whole - seconds * steps / counted)

        say(f"ray-train: {steps} steps a time, of which {interval * intervals} are counted")
        pairs = alternate(
            "ray-train",
            self.run.pairs,
            lambda: side(train.train),
            lambda: side(lambda run: in_child(train_bare, run, niceness=self.niceness)),
        )
        return compare(pairs, "steps/s", TARGETS["ray-train"]) | {"steps": steps, "counted_steps": interval * intervals}

    def workers(self) -> Report:
        """Two workers beside one that makes the same passes in turn, and, as ``halved``, one pass that two share.

        On a CPU a pass of half the clips takes more than half the time, most so through a small model, so that the
        second ratio stays below 2 however well the workers are joined.
        """
        clips = self.preset.micro_batch_size
        found = self._compare_workers(2 * clips, clips, TARGETS["workers"])
        return found if clips % 2 else found | {"halved": self._compare_workers(clips, None, None)}

    def _compare_workers(self, clips: int, micro_batch_size: int | None, target: float | None) -> Report:
        """Compare steps of ``clips`` clips, in passes of ``micro_batch_size`` or, if None, one pass per worker."""

        def run_of(world: int) -> TrainRun:
            optim = dataclasses.replace(self.preset.optim, batch_size=clips, micro_batch_size=micro_batch_size)
            return dataclasses.replace(self._from_the_middle(optim), threads=1, device="cpu", workers=world)

        say(f"workers: trial of a step of {clips} clips")
        trial = in_child(measure_training, run_of(1), 1, 1)
        steps = 1 + max(2, round(ARM_SECONDS / trial["seconds"]["median"]))

        def side(world: int) -> Arm:
            run = dataclasses.replace(run_of(world), steps=self.middle + steps, log_every=1)
            begin = time.monotonic()
            train_without_ray(run, self._new("meeting"))
            counted, seconds = counted_steps(run.out, self.middle)
            return Arm(counted, seconds, time.monotonic() - begin - seconds * steps / counted)

        say(f"workers: {steps} steps a time, by one and by two workers of one thread")
        pairs = alternate("workers", self.run.pairs, lambda: side(2), lambda: side(1))
        return compare(pairs, "steps/s", target) | {"steps": steps, "clips": clips}

    def reference(self) -> Report:
        if self.run.family == "ssm":
            return textbook.measure(self.run.pairs, say)
        if self.run.family == "ddlp":
            return reference_ddlp.measure(self.run.steps, self.run.pairs, say)
        return reference.measure(self.run.family, self.run.steps, say)

    def scale(self) -> Report:
        videos, data = self._new("videos"), self._new("data")
        write_videos(videos, 3 * max(scale.WORKERS) * scale.SHARD_CLIPS * FRAMES // VIDEO_FRAMES)
        self._write_dataset(data, scale.PARTS * scale.PART_CLIPS, scale.PART_CLIPS)
        run = dataclasses.replace(self._train_run(), steps=self.run.steps * 30, log_every=self.run.steps * 5, threads=1)
        micro = run.micro_batch_size
        optim = dataclasses.replace(run.optim, batch_size=scale.MICRO_BATCHES * micro, micro_batch_size=micro)
        return scale.measure(self.folder, videos, data, self._checkpoint(), dataclasses.replace(run, optim=optim))

    def _train_run(self, optim: OptimConfig | None = None) -> TrainRun:
        """The preset on generated data, with nothing but steps and the last checkpoint."""
        data = os.path.join(self.folder, "train-data")
        if not os.path.exists(data):
            batch = self.preset.optim.batch_size
            self._write_dataset(data, max(2 * batch, 32), max(batch, 16))
        return dataclasses.replace(
            self.preset,
            optim=optim or self.preset.optim,
            data=data,
            out=self._new("run"),
            steps=1,
            threads=self.threads,
            device=self.device_name,
            workers=1,
            eval_every=0,
            checkpoint_every=1_000_000_000,
        )

    def _from_the_middle(self, optim: OptimConfig | None = None) -> TrainRun:
        """A run to resume after half of the preset's steps: schedules change what a step computes."""
        run = dataclasses.replace(self._train_run(optim), resume=True)
        start = os.path.join(self.folder, f"run-start-{run.optim.batch_size}-{run.optim.micro_batch_size}")
        if not os.path.exists(start):
            say("one step, for a checkpoint to go on from")
            in_child(train_to, dataclasses.replace(run, resume=False, out=start), self.middle)
        shutil.copytree(start, run.out)
        return run

    def _checkpoint(self) -> str:
        model = families.build(self.preset.model)
        state = {"family": self.run.family, "model": checkpoint.config_to_json(self.preset.model)}
        return checkpoint.save_checkpoint(
            self._new("run"), 0, model=model, optimizer=torch.optim.Adam(model.parameters()), state=state, keep_last=1
        )

    def _write_dataset(self, folder: str, count: int, clips_per_shard: int) -> None:
        write_dataset(folder, count, self.frames, self.side, clips_per_shard, source=self.source)

    def _connect(self, part: str) -> int:
        """Connect to Ray; return its CPU slots."""
        begin = time.monotonic()
        say(f"{part}: connecting to Ray")
        cluster.connect(max(2, os.cpu_count() or 1))  # Ray Train wants one beside its worker's
        if self.ray_start_seconds is None:
            self.ray_start_seconds = time.monotonic() - begin
        import ray

        # Ray lowers the priority of its workers, which on a busy machine is another speed: the bare side gets the same.
        self.niceness = ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0)
        return int(ray.cluster_resources()["CPU"])

    def _new(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}-{next(self._number)}")


# ---- one measurement each; those that take a model run in a child process --------------------------------------------


def measure_training(run: TrainRun, steps: int, checkpoint_every: int) -> Report:
    """Seconds, CPU seconds and memory of ``steps`` optimiser steps of ``loop.train``, after one that is not counted.

    On a GPU the split needs the device to finish at every border between parts, which costs time; so as many steps
    before them are measured whole, and give the step's own seconds.
    """
    device = torch_device(run.device)
    before = peak_memory()
    plain = steps if device.type == "cuda" else 0
    memory = 0
    saved: list[float] = []
    with IntegrityClock() as integrity:
        hashed = synced = begin = 0.0

        def after_step() -> None:
            nonlocal memory, hashed, synced, begin
            memory, hashed, synced = peak_memory(), integrity.sha256_seconds, integrity.sync_seconds
            begin = time.perf_counter()

        def after_checkpoint(metrics: dict[str, Any]) -> None:
            saved.append(time.perf_counter() - begin)

        first = (checkpoint.last_step(run.out) or 0) if run.resume else 0
        opened = loop.open_run(dataclasses.replace(run, steps=first + 1 + plain + steps))
        with StepTimer(device, plain=plain, after_step=after_step) as timer:
            loop.train(opened, loop.Worker(device=device, wrap=timer.attach, report=after_checkpoint))
        hashed, synced = integrity.sha256_seconds - hashed, integrity.sync_seconds - synced
    split = [step for step in timer.steps if step.parts]
    whole = timer.steps[:plain] or split
    seconds = spread([step.seconds for step in whole])
    report = {
        "device": device.type,
        "steps": len(whole),
        "seconds": seconds._asdict(),
        "cpu_seconds": spread([step.cpu_seconds for step in whole])._asdict(),
        "split": mean_parts(split),
        "peak_memory_bytes": memory,
        "peak_memory_before_bytes": before,
        "checkpoint": {
            "seconds": saved[-1],
            "every": checkpoint_every,
            **_integrity(hashed, synced, seconds.median * checkpoint_every + saved[-1]),
        },
    }
    if device.type == "cuda":
        report["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return report


def measure_verbs(run: TrainRun, batch: int, context: int, horizon: int, times: int) -> Report:
    """Clips and frames per second of encode, rollout, interpolate (of the middle third) and decode, for the verbs that
    the family has."""
    device = torch_device(run.device)
    if device.type == "cpu" and run.threads:
        torch.set_num_threads(run.threads)
    family = families.describe(run.model)
    torch.manual_seed(run.seed)
    model = families.build(run.model).to(device).eval()
    source = open_source(run.data, "train")
    some = list(iter_clips(source, limit=batch, length=context, truth=family.inputs))
    some = list(itertools.islice(itertools.cycle(some), batch))
    video = clips.to_model_input(clips.collate(some), device)
    inputs: dict[str, Any] = {**clips.stack_truth(some, family.inputs, device)}
    seen = torch.ones(context, dtype=torch.bool)
    seen[context // 3 : context - context // 3] = False
    seen[0] = True
    rows: Report = {}
    with torch.no_grad():
        latents = model.encode(video, **inputs)
        calls: dict[str, tuple[int, Callable[[], object]]] = {
            "encode": (context, lambda: model.encode(video, **inputs)),
            "rollout": (horizon, lambda: model.rollout(latents, horizon)),
            "interpolate": (context, lambda: model.interpolate(video, seen, **inputs)),
            "decode": (context, lambda: model.decode(latents)),
        }
        for verb, (frames, call) in calls.items():
            if verb in family.verbs:
                seconds = spread(repeat(call, times, device))
                rows[verb] = {
                    "frames": frames,
                    "seconds": seconds._asdict(),
                    "clips_per_second": batch / seconds.median,
                    "frames_per_second": batch * frames / seconds.median,
                }
    rows["peak_memory_bytes"] = peak_memory()
    if device.type == "cuda":
        rows["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return rows


def measure_reader(data: str, batch: int, epochs: int) -> Report:
    """Clips per second of whole epochs on one core; each opens the dataset anew, so each verifies every shard."""
    pinned = _use_one_core()
    torch.set_num_threads(1)
    rates: list[float] = []
    shares: list[Report] = []
    count = 0
    for epoch in range(1 + epochs):
        with IntegrityClock() as integrity:
            begin = time.perf_counter()
            source = open_source(data, "train")
            reader = TrainingReader(
                source,
                clip_frames=source.num_frames,
                batch_size=batch,
                micro_batch_size=batch,
                seed=epoch,
                loader=LoaderConfig(),
            )
            count = reader.num_clips // batch
            with contextlib.closing(reader.micro_batches()) as batches:
                for _ in range(count):
                    next(batches)
            seconds = time.perf_counter() - begin
        if epoch:  # the first one has the imports
            rates.append(count * batch / seconds)
            shares.append(_integrity(integrity.sha256_seconds, integrity.sync_seconds, seconds))
    rate = spread(rates)
    shares.sort(key=lambda share: share["share"])
    return {
        "unit": "clips/s",
        "one_core": pinned,
        "clips": count * batch,
        "stage": rate._asdict(),
        "target": TARGETS["reader"],
        "met": rate.median >= TARGETS["reader"],
        "integrity": shares[len(shares) // 2],
    }


def measure_shard_integrity(run: ShardRun, folder: str) -> Report:
    """What SHA-256 and fsync take of probing and building shards, in this process alone."""
    with IntegrityClock() as integrity:
        done = shard_once(run, folder, in_this_process, 1)
    return _integrity(integrity.sha256_seconds, integrity.sync_seconds, done["all"].seconds)


def measure_extraction(path: str, data: str, out: str, batch: int, device: str) -> Report:
    """The loop of an extraction worker without Ray: the same model, clips, batches and parts; the first is not counted.

    ``model_seconds`` are those of the model alone: encoding, and decoding for the errors.
    """
    if device == "cpu":
        torch.set_num_threads(1)  # as a worker of extract.py has
    loaded = checkpoint.load_model(path, device=device)
    family = families.describe(loaded.config)
    source = open_source(data, "train")
    provenance = tables.Provenance(loaded.family, loaded.model_id, source.id, "train", family.tracked)
    job = extract.Job(path, data, out, None, batch, device, provenance)
    model_seconds = seconds = hashed = synced = 0.0
    counted = 0
    original = extract.clip_blocks

    def clip_blocks(*arguments: Any, **named: Any) -> Any:
        nonlocal model_seconds
        begin = time.perf_counter()
        blocks = original(*arguments, **named)  # they lie in main memory: a GPU has finished
        model_seconds += time.perf_counter() - begin
        return blocks

    with replaced(extract, "clip_blocks", clip_blocks):
        for number, (name, size) in enumerate(zip(source.shard_names, source.shard_sizes, strict=True)):
            if number == 1:
                model_seconds = 0.0
            with IntegrityClock() as integrity:
                begin = time.perf_counter()
                extract.extract_part(loaded.model, family, source, job, extract.Part(name, number, size))
                took = time.perf_counter() - begin
            if number:
                counted, seconds = counted + size, seconds + took
                hashed, synced = hashed + integrity.sha256_seconds, synced + integrity.sync_seconds
    return {"clips": counted, "seconds": seconds, "model_seconds": model_seconds, "sha256_seconds": hashed,
            "sync_seconds": synced}  # fmt: skip


def extract_once(run: ExtractRun) -> Arm:
    """Run an extraction through Ray Data; from the first part's record on it is counted, before that is start-up."""
    begin = time.time()
    with _silence():
        extract.extract(run)
    whole = time.time() - begin
    records = os.path.join(run.out, "parts")
    done = sorted(os.stat(entry.path).st_mtime for entry in os.scandir(records))
    sizes = open_source(run.data, run.split).shard_sizes
    seconds = done[-1] - done[0]
    return Arm(sum(sizes[1:]), seconds, whole - seconds * sum(sizes) / sum(sizes[1:]))


class Task(NamedTuple):
    """What one process was at, from when to when, and what came of it."""

    worker: str
    begin: float
    end: float
    amount: float


def shard_once(run: ShardRun, folder: str, run_all: Callable[..., list[str]] | None, slots: int) -> dict[str, Arm]:
    """Probe and build a dataset with the functions of ``shard.py``; ``run_all`` takes the place of Ray Data."""
    root, found = shard.find_videos(run, run.source)
    schedule = run_all or shard._run_all
    clocked: list[list[dict[str, Any]]] = []
    begins: list[float] = []

    def run_clocked(task: Callable[[str], str], items: Sequence[str], *rest: Any) -> list[str]:
        begins.append(time.time())
        clocked.append([json.loads(answer) for answer in schedule(functools.partial(clock, task), items, *rest)])
        return [answer["result"] for answer in clocked[-1]]

    with _silence(), replaced(shard, "_run_all", run_clocked):
        surveyed = shard.survey(run, root, found)
        plans, _ = shard.plan_shards(run, surveyed.videos)
        built = shard.build_shards(run, surveyed.root, folder, plans, None)
    shutil.rmtree(folder)
    amounts = [[1.0] * len(surveyed.videos), [float(each.clips) for each in built]]
    probe, build = (
        steady([Task(each["worker"], each["begin"], each["end"], amount) for each, amount in zip(*both, strict=True)],
               begin, slots)
        for both, begin in zip(zip(clocked, amounts, strict=True), begins, strict=True)
    )  # fmt: skip
    clips = sum(amounts[1])
    seconds = len(surveyed.videos) / probe.rate + clips / build.rate
    return {"probe": probe, "build": build, "all": Arm(clips, seconds, probe.start_up + build.start_up, slots)}


def clock(task: Callable[[str], str], item: str) -> str:
    """Do a task of ``shard.py``, and tell where and when."""
    begin = time.time()
    result = task(item)
    worker = f"{platform.node()}/{os.getpid()}"
    return json.dumps({"worker": worker, "begin": begin, "end": time.time(), "result": result})


def steady(tasks: Sequence[Task], begin: float, slots: int) -> Arm:
    """What was done while every worker was at work: from when the last of them began to when the first one ended.

    Of a task that reaches beyond that time the part inside counts. Before it is the start-up.
    """
    workers = {task.worker: [each for each in tasks if each.worker == task.worker] for task in tasks}
    first = max(min(task.begin for task in own) for own in workers.values())
    last = min(max(task.end for task in own) for own in workers.values())
    if last <= first:
        raise ValueError("too few tasks to keep every worker busy for a while; nothing can be said of their rate")
    inside = sum(
        task.amount * max(0.0, min(task.end, last) - max(task.begin, first)) / (task.end - task.begin) for task in tasks
    )
    return Arm(inside, last - first, first - begin, slots)


def train_bare(run: TrainRun) -> None:
    """Train in this process, as a worker of Ray Train does."""
    loop.train(loop.open_run(run))


def train_without_ray(run: TrainRun, meeting: str) -> None:
    """Train by as many processes as the run has workers, which meet at a file."""
    with new_processes(run.workers) as pool, _silence():
        for done in [pool.submit(train_together, run, rank, meeting) for rank in range(run.workers)]:
            done.result()


def train_together(run: TrainRun, rank: int, meeting: str) -> None:
    """Train as one of the run's workers, which meet at a file, as Ray Train lets them."""
    if run.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=run.workers)
    wrap = nn.parallel.DistributedDataParallel if run.workers > 1 else lambda model: model
    opened = loop.open_run(run) if rank == 0 else run
    loop.train(opened, loop.Worker(rank=rank, world=run.workers, local_world=run.workers, wrap=wrap))


def train_to(run: TrainRun, step: int) -> None:
    """Train one step and save it as if it were another one."""
    save = checkpoint.save_checkpoint
    with replaced(checkpoint, "save_checkpoint", lambda out, _, **named: save(out, step, **named)):
        train_bare(run)


def counted_steps(out: str, after: int = 0) -> tuple[int, float]:
    """Steps and seconds that a run's metrics tell after a step, without the first line's, which has the warm-up."""
    lines = [line for line in loop.read_metrics(out) if line["kind"] == "train" and line["step"] > after]
    steps = [after["step"] - before["step"] for before, after in itertools.pairwise(lines)]
    return sum(steps), sum(n / line["steps_per_second"] for n, line in zip(steps, lines[1:], strict=True))


# ---- pairs -----------------------------------------------------------------------------------------------------------


def compare(pairs: Sequence[tuple[Arm, Arm]], unit: str, target: float | None) -> Report:
    """The rates of a stage and of the same work bare, and their ratio, per process, inside each pair."""
    ratio = spread([(a.rate / a.slots) / (b.rate / b.slots) for a, b in pairs])
    return {
        "unit": unit,
        "stage": spread([a.rate for a, _ in pairs])._asdict(),
        "bare": spread([b.rate for _, b in pairs])._asdict(),
        "ratio": ratio._asdict(),
        "target": target,
        "met": None if target is None else ratio.median >= target,
        "slots": {"stage": pairs[0][0].slots, "bare": pairs[0][1].slots},
        "start_up": {
            "stage": statistics.median(a.start_up for a, _ in pairs),
            "bare": statistics.median(b.start_up for _, b in pairs),
        },
        "pairs": [{"stage": a._asdict(), "bare": b._asdict()} for a, b in pairs],
    }


def machine(device: torch.device, threads: int) -> Report:
    """What a number was measured on; no name and no path of the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": importlib.metadata.version("ray"),
        "load_before": _load(),
    }


# ---- what is measured on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Redrawn:
    """An episode at another size, pixels repeated, with or without its truth."""

    episode: Episode
    side: int
    truth: bool

    @property
    def key(self) -> str:
        return self.episode.key

    @property
    def num_frames(self) -> int:
        return self.episode.num_frames

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        clip = self.episode.clip(start, length)
        h, w = clip.frames.shape[1:3]
        rows, columns = np.arange(self.side) * h // self.side, np.arange(self.side) * w // self.side
        truth = {
            name: array[:, rows][:, :, columns] if name == "segmentation" else array
            for name, array in clip.truth.items()
            if self.truth
        }
        return dataclasses.replace(clip, frames=clip.frames[:, rows][:, :, columns], truth=truth)


def redrawn(side: int, truth: bool = True) -> Simulator:
    """The simulator of bouncing balls with frames of another size."""
    simulator = SIMULATORS[SIMULATOR]

    def episodes(split: str, first: int, count: int, seed: int | None) -> list[Episode]:
        return [_Redrawn(episode, side, truth) for episode in simulator.episodes(split, first, count, seed)]

    return simulator._replace(name=f"{SIMULATOR}-{side}", height=side, width=side, episodes=episodes)


def own_source(preset: TrainRun, side: int) -> str:
    """The simulator that a preset trains on, as ``simulators.simulator`` takes it; empty where it trains on files."""
    name, _, spec = preset.data.partition(":")
    return spec if name == "sim" and simulators.simulator(spec).height == side else ""


def write_dataset(
    folder: str, count: int, frames: int, side: int, clips_per_shard: int, *, source: str = "", truth: bool = True
) -> None:
    """Write a split ``train`` of simulated clips, one of each episode, in this process and without Ray.

    ``source`` is the simulator; without one the bouncing balls are drawn at the size that is wanted, with ``truth`` or
    without.
    """
    simulator = simulators.simulator(source) if source else redrawn(side, truth)
    run = ShardRun(
        source=f"sim:{simulator.name}",
        out=folder,
        frames=frames,
        hop=simulator.num_frames,
        size=side,
        limit=count,
        clips_per_shard=clips_per_shard,
    )
    with contextlib.ExitStack() as undo:
        if not source:
            SIMULATORS[simulator.name] = simulator
            undo.callback(SIMULATORS.pop, simulator.name)
        undo.enter_context(_silence())
        undo.enter_context(replaced(shard, "_run_all", in_this_process))
        undo.enter_context(replaced(cluster, "connect", lambda *_: None))
        undo.enter_context(replaced(cluster, "require_shared", lambda *_: None))
        shard.shard(run)


def write_videos(folder: str, count: int) -> None:
    """Write mp4 files, of which only a few differ."""
    os.makedirs(folder)
    drawn = []
    for number, episode in enumerate(redrawn(VIDEO_SIDE).episodes("train", 0, VIDEOS_DRAWN, None)):
        clip = episode.clip(0, VIDEO_FRAMES)
        drawn.append(os.path.join(folder, f"video-{number:06d}.mp4"))
        quickstart.write_mp4(drawn[-1], clip.frames, clip.fps)
    for number in range(VIDEOS_DRAWN, count):
        shutil.copyfile(drawn[number % VIDEOS_DRAWN], os.path.join(folder, f"video-{number:06d}.mp4"))


def in_this_process(task: Callable[[str], str], items: Sequence[str], *_: object) -> list[str]:
    """Take the place of Ray Data in ``shard.py``: one task after the other."""
    return [task(item) for item in items]


def over_processes(pool: Executor) -> Callable[..., list[str]]:
    """Take the place of Ray Data in ``shard.py``: a plain pool of processes."""
    return lambda task, items, *_: list(pool.map(task, items))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallow the progress of a stage that runs many times; what goes wrong is raised."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _preset(run: BenchmarkRun) -> TrainRun:
    if run.family not in families.FAMILIES:
        raise ValueError(f"unknown family {run.family!r}; choose from {', '.join(families.FAMILIES)}")
    if "reference" in run.parts and run.family not in REFERENCES:
        raise ValueError(
            f"{run.family} has no part 'reference'; only {', '.join(REFERENCES)} are compared with other code"
        )
    presets = PRESETS[run.family]
    if run.preset not in presets:
        raise ValueError(f"{run.family} has no preset {run.preset!r}; choose from {', '.join(presets)}")
    preset = presets[run.preset].stage(-1)  # a curriculum's last stage is the model at its full size
    if getattr(preset.model, "recon_loss", "mse") == "vgg":  # measured with squared error, which needs no weights
        return with_overrides(preset, {"model.recon_loss": "mse"})
    return preset


def _parts(run: BenchmarkRun) -> list[str]:
    """What to measure, in the order of ``BENCHMARK_PARTS``."""
    if run.parts:
        return [part for part in BENCHMARK_PARTS if part in run.parts]
    left_out = {"sweep", "scale", "workers"} | (set() if run.family in REFERENCES else {"reference"})
    return [part for part in BENCHMARK_PARTS if part not in left_out]


def _integrity(sha256: float, sync: float, whole: float) -> Report:
    share = (sha256 + sync) / whole
    return {"sha256_seconds": sha256, "sync_seconds": sync, "of_seconds": whole, "share": share,
            "target": TARGETS["integrity"], "met": share < TARGETS["integrity"]}  # fmt: skip


def _use_one_core() -> bool:
    """Keep this process to one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return True


def _load() -> float | None:
    """Runnable processes in the last minute, where the system counts them."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---- the table -------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """Show the JSON of a benchmark as text."""
    on = report["machine"]
    gpu = "" if on["device"] == "cpu" else f"{on['device']}; "
    lines = [
        f"{report['family']} {report['preset']}",
        f"machine   {gpu}{on['processor']}, {on['cores']} cores, {as_bytes(on['memory_bytes'])}; {on['threads']} "
        f"threads (OMP_WAIT_POLICY {on['omp_wait_policy']}); torch {on['torch']}, Ray {on['ray']}, "
        f"Python {on['python']}",
    ]
    if on["load_before"] is not None:
        busy = on["load_before"] > on["cores"] / 2
        lines.append(f"load      {on['load_before']} before, {on.get('load_after', on['load_before'])} after")
        lines[-1] += "; other work is running, so times are too long" if busy else ""
    lines += [f"data      {report['data']}"]
    if "train" in report:
        lines += ["", *_train_table(report["train"])]
    if "rollout" in report:
        lines += ["", *_rollout_table(report["rollout"])]
    if "reference" in report:
        lines += ["", *_reference_table(report["family"], report["reference"])]
    if "sweep" in report:
        lines += ["", *sweep_timing.table(report["sweep"])]
    if "scale" in report:
        lines += ["", *scale.table(report["scale"])]
    stages = [part for part in ("reader", "shard", "extract", "ray-train", "workers") if part in report]
    if stages:
        lines += ["", *_stage_table({part: report[part] for part in stages}, on.get("ray_start_seconds"))]
    if integrity := {part: report[part]["integrity"] for part in stages if "integrity" in report[part]} | (
        {"train": report["train"]["checkpoint"]} if "train" in report else {}
    ):
        lines += ["", *_integrity_table(integrity)]
    return "\n".join(lines)


def _train_table(train: Report) -> list[str]:
    split = train["split"]
    whole = split["seconds"]

    def row(name: str, cost: Report) -> list[str]:
        share = f"{100 * cost['seconds'] / whole:.1f} %"
        return [name, f"{cost['seconds']:.4f}", share, f"{cost['cpu_seconds']:.4f}"]

    rows = [["", "seconds", "share", "CPU seconds"]]
    for name, cost in split["parts"].items():
        rows.append(row(name, cost))
        if name == "forward":
            rows += [row(f"  {inner}", each) for inner, each in split["forward"].items()]
    rows.append(row("mean step", split))
    seconds, cpu = train["seconds"], train["cpu_seconds"]
    micro = "" if train["micro_batch_size"] == train["batch_size"] else f" ({train['micro_batch_size']} at a time)"
    memory = f"{as_bytes(train['peak_memory_bytes'])}, of which {as_bytes(train['peak_memory_before_bytes'])} before it"
    if "peak_gpu_memory_bytes" in train:
        memory += f"; on the GPU {as_bytes(train['peak_gpu_memory_bytes'])}"
    return [
        f"train: one optimiser step of {train['batch_size']} clips{micro} x {train['frames']} frames, "
        f"{train['precision']}, {train['device']}, after step {train['after_step']} of the preset",
        f"  step         {_spread(seconds, '.4g')} s, {1 / seconds['median']:.3g} steps/s; CPU {cpu['median']:.4g} s; "
        f"median of {train['steps']} (least - most)",
        f"  peak memory  {memory}",
        *_align(rows),
    ]


def _rollout_table(rollout: Report) -> list[str]:
    rows = [["", "batch", "frames", "clips/s", "frames/s", "seconds (least - most)"]]
    memory = []
    for batch, measured in rollout["batches"].items():
        for verb in ("encode", "rollout", "interpolate", "decode"):
            if verb in measured:
                m = measured[verb]
                numbers = [f"{m['clips_per_second']:.4g}", f"{m['frames_per_second']:.4g}"]
                rows.append([verb, batch, str(m["frames"]), *numbers, _spread(m["seconds"], ".3g")])
        memory.append(f"{as_bytes(measured.get('peak_gpu_memory_bytes', measured['peak_memory_bytes']))} at {batch}")
    return ["rollout: the verbs without gradients", f"  peak memory  {', '.join(memory)} clips", *_align(rows)]


def _reference_table(family: str, measured: Report) -> list[str]:
    if family == "ssm":
        return [
            f"reference: forward and backward of {measured['batch']} clips with {measured['objects']} objects, "
            f"{measured['components']} components, fp32, cpu, one thread; beside the equations as they are written",
            *itertools.chain.from_iterable(_align(cells) for cells in textbook.table(measured)),
        ]
    if family == "ddlp":
        return [
            f"reference: training steps of the main phase with the squared error, cpu, {measured['threads']} threads, "
            "and a whole rollout, beside the authors' code; fast forms beside the textbook's, fp32, one thread",
            *itertools.chain.from_iterable(_align(cells) for cells in reference_ddlp.table(measured)),
        ]
    size = f"{measured['size']} pixels, K = {measured['slots']}, R = {measured['refinements']}, fp32"
    return [
        f"reference: one training step of {measured['batch']} clips x {measured['frames']} frames, {size}, cpu, "
        f"{measured['threads']} threads; ratios to {measured['beside']}",
        *itertools.chain.from_iterable(_align(cells) for cells in reference.table(family, measured)),
    ]


def _stage_table(stages: dict[str, Report], ray_start_seconds: float | None) -> list[str]:
    rows = [["", "unit", "rate (least - most)", "beside", "rate (least - most)", "ratio (least - most)", "target", ""]]
    starts = []
    besides = {
        "shard": "process pool",
        "extract": "bare encoder",
        "ray-train": "bare loop",
        "workers": "one worker, its passes in turn",
        "halved": "one worker, one pass",
        "probe": "process pool",
        "build": "process pool",
        "writing": "the same loop, writing",
    }

    def row(name: str, stage: Report, indent: str = "") -> list[str]:
        verdict = {True: "met", False: "missed", None: ""}[stage.get("met")]
        beside, ratio, target = ["", ""], "", ""
        if "ratio" in stage:
            beside, ratio = [besides[name], _spread(stage["bare"], ".4g")], _spread(stage["ratio"], ".3f")
        if stage.get("target") is not None:
            target = f">= {stage['target']:.2f}" if "ratio" in stage else f">= {stage['target']:.0f}"
        return [indent + name, stage["unit"], _spread(stage["stage"], ".4g"), *beside, ratio, target, verdict]

    for name, stage in stages.items():
        rows.append(row(name, stage))
        rows += [row(inner, stage[inner], "  ") for inner in ("probe", "build", "writing", "halved") if inner in stage]
        if "start_up" in stage:
            start = stage["start_up"]
            starts.append(f"{name} {start['stage']:.1f} s ({besides[name]} {start['bare']:.1f} s)")
    table = ["stages: through the pipeline, and beside it the same work without Ray", *_align(rows)]
    if ray_start_seconds is not None:
        starts.insert(0, f"Ray itself {ray_start_seconds:.1f} s")
    return table + ([f"  start-up, not counted above: {'; '.join(starts)}"] if starts else [])


def _integrity_table(parts: dict[str, Report]) -> list[str]:
    rows = [["", "share", "SHA-256", "syncs", "of", "target", ""]]
    for name, part in parts.items():
        of = f"{part['of_seconds']:.3g} s"
        label = f"{name} (checkpoint every {part['every']} steps)" if "every" in part else name
        label += f" (parts of {part['clips_per_part']} clips)" if "clips_per_part" in part else ""
        label += " (an epoch, each shard's first)" if name == "reader" else ""
        times = [f"{part['sha256_seconds']:.3g} s", f"{part['sync_seconds']:.3g} s"]
        verdict = "met" if part["met"] else "missed"
        rows.append([label, f"{100 * part['share']:.2f} %", *times, of, f"< {100 * part['target']:.0f} %", verdict])
    return ["checksums and syncs", *_align(rows)]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; numbers to the right, where a column's heading says that it has some."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [all(not row[i][:1].isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def _spread(values: Report, form: str) -> str:
    median, least, most = (format(values[name], form) for name in Spread._fields)
    return f"{median} ({least} - {most})"
