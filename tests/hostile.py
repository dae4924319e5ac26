"""Hostile files at every entrance of every job; nothing of them may run, leak or exhaust the machine.

    python tests/hostile.py              all cases
    python tests/hostile.py --quick      those of the default run
    python tests/hostile.py --only NAME  those whose name holds NAME, with what was said
    python tests/hostile.py --s3 URL     every path on object storage, a server of the tests (AWS_ENDPOINT_URL)

One process makes a small good world (videos, dataset, run, tables, sweep), then, for each case, what hostile_files.py
has for it, and forks a child that runs a job as its command line would, with loops in place of Ray, under limits of
memory and CPU time. What is hostile would leave a file in ``ran/`` if it ran, call a server that listens here, or
change a file outside of the job's own output. A case is good if none of that is seen and the job ends as it should:
what is refused with status 1 and one short line, a bad source as a row of quarantine.parquet beside its good neighbour.
"""

import argparse
import dataclasses
import functools
import gc
import importlib
import io
import json
import os
import pickle
import resource
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the folders objdyn/ and pipeline/ beside this file are not the packages
# ruff: noqa: E402

import botocore.session
import hostile_files as files
import numpy as np
import pyarrow.parquet as pq
import torch
from hostile_files import FOLDERS, FRAMES, SIZE, Bytes, Make, World

import pipeline.train
from pipeline import cli, cluster, extract, loop, shard, tables, tune
from pipeline.config import ExtractRun, ShardRun, SweepRun, with_overrides
from pipeline.presets import PRESETS
from pipeline.quickstart import write_mp4
from pipeline.study import SweepStudy

NEEDED = (
    "av", "joblib", "optuna.importance", "pandas", "PIL.ImageFile", "pipeline.evaluate", "pipeline.verify",
    "safetensors.torch", "torch.utils.tensorboard", "tyro", "typeguard", "webdataset",
)  # fmt: skip
"""What each child would import anew."""
for needed in NEEDED:
    importlib.import_module(needed)

MEMORY = 1_500_000_000
"""Bytes of address space that a job may take beyond what its process has at the start."""
SECONDS = 60
"""CPU time of a job."""
LINE = cli.LONGEST + 200
"""Longest line: what a stranger wrote is quoted, not poured out."""
DONE, REFUSED, EITHER = (0,), (1,), (0, 1)


class Case(NamedTuple):
    """One attack on one entrance."""

    name: str
    line: str
    """Job and words; {data}, {run}, ... are folders of the world, {case} is the case's own, {out} is not there yet."""
    make: Make = lambda world, case: None
    """Put the hostile files into the case's folder."""
    ends: tuple[int, ...] = REFUSED
    """Status of the job; ``EITHER`` where it may pass by what is hostile without a look."""
    quarantines: Mapping[str, str] = {}
    """Sources that must be in quarantine.parquet, and their codes (empty: any)."""
    quick: bool = True
    s3: bool = True
    """Whether it can stand on object storage."""


QUICK = {
    "a deep attribute", "a deep json", "a family that is no name", "a header of 2^63 bytes", "a model of terabytes",
    "a path", "a pickle", "a pickle as json", "a pickle of protocol 5", "a picture outside", "a torch file",
    "a webp bomb", "an npy header of minus signs", "an object array as truth", "deep", "deep metadata",
    "gigabytes of one row", "http", "members outside", "no key", "overlapping tensors", "pickled metadata", "pipe",
    "strange shapes", "tensors of 2^60 elements", "traversal", "zstd of a gigabyte of zeros",
    "zstd that claims 2^60 bytes",
}  # fmt: skip
"""What the default run tries."""


def cases(
    entrance: str,
    line: str,
    makers: Mapping[str, Make],
    ends: tuple[int, ...] = REFUSED,
    quick: bool = True,
    s3: bool = True,
) -> list[Case]:
    return [
        Case(f"{entrance}: {name}", line, make, ends, quick=quick and name.rpartition(": ")[2] in QUICK, s3=s3)
        for name, make in makers.items()
    ]


def in_checkpoint(name: str, contents: Mapping[str, Bytes]) -> dict[str, Make]:
    return {what: files.with_files(lambda w, made=made: {name: made(w)}) for what, made in contents.items()}


def in_file(name: str, contents: Mapping[str, Bytes | bytes | str]) -> dict[str, Make]:
    return {
        what: files.bytes_of(name, content) if callable(content) else files.text(name, content)
        for what, content in contents.items()
    }


SHARDS = "make_shards.py --source {case}/source --out {out} --frames 5 --size 16 --max-quarantined 1 --layout "
TRAIN = "train_ddlp.py debug --out {out} --steps 1 --optim.batch-size 1 --eval-every 0 --device cpu --threads 1 --data "
EXTRACT = "extract.py --out {out} --device cpu --checkpoint "
EVALUATE = "evaluate.py --out {out} --device cpu --context 2 --horizon 2 --limit 1 --checkpoint "
WHAT_IF = (
    "what_if.py --out {out} --clip KEY --select all --move 0.1,0 --context 2 --horizon 2 --data {data} --checkpoint "
)
RESUME = "train_ddlp.py --config {run}/config.json --out {case}/run --resume --steps 2"
PERCEPTUAL = (
    "train_ddlp.py debug --out {out} --data {data} --model.recon-loss vgg --perceptual-weights {case}/w.safetensors"
)
EDITS = EXTRACT + "{run} --data {data} --context 2 --horizon 1 --edits {case}/edits.json"
QUESTIONS = "read_questions.py --source {case}/q.json --out {out}/q.parquet"
CONFIG = "train_ddlp.py --out {out} --config {case}/"
SWEEP = (
    "sweep.py ddlp/debug --out {case}/sweep --data {data} --trials 2 --set steps=2 eval_every=1 optim.batch_size=2 "
    "--search model.kl_weight=log:0.1:1 --resume"
)
JOURNAL = SWEEP + " --study-storage {case}/s.journal"

SOURCES = [
    Case("videos", SHARDS + "videos", files.videos, DONE, files.VIDEOS),
    Case("images", SHARDS + "frames", files.images, DONE, files.IMAGES),
    Case("arrays", SHARDS + "npy --start 0 --stop 6", files.arrays, DONE, files.ARRAYS),
    Case("roll-outs", SHARDS + "phyre --drop-last 0", files.rollouts, DONE, files.ROLLOUTS),
    Case("episodes in HDF5", SHARDS + "gswm-hdf5", files.episodes, DONE, files.EPISODES),
    Case("groups in HDF5", SHARDS + "rnem-hdf5", files.groups, DONE, files.GROUPS),
    Case("tars", SHARDS + "webdataset", files.tars, DONE, files.TARS),
    Case("towers", SHARDS + "towers", files.images, DONE, {"claims": "too-large", "eps": "unreadable"}, quick=False),
    Case("annotations", SHARDS + "clevrer", files.annotated, DONE),
    Case("a FIFO and a device", SHARDS + "videos", files.fifo, DONE, files.FIFOS, s3=False),
]

ADDRESSES = ("pipe:touch {ran}/pipe", "file:///etc", "http://127.0.0.1:{port}/x", "gs://bucket/x", "memory://x")
FLAGS = {
    "--source": "make_shards.py --frames 5 --size 16 --out {out} --source",
    "--out": "make_shards.py --frames 5 --size 16 --source {videos} --out",
    "--data": "train_ddlp.py debug --out {out} --steps 1 --data",
    "--init": "train_ddlp.py debug --out {out} --steps 1 --init",
    "--config": "train_ddlp.py --out {out} --config",
    "--checkpoint": "extract.py --data {data} --out {out} --checkpoint",
    "--tables": "export.py --out {out}/x.parquet --tables",
    "PATH": "verify.py",
    "questions": "read_questions.py --out {out}/q.parquet --source",
    "--edits": EXTRACT + "{run} --data {data} --context 2 --horizon 1 --edits",
    "--perceptual-weights": "train_ddlp.py debug --data {data} --out {out} --model.recon-loss vgg --perceptual-weights",
}
URLS = [
    Case(f"{flag} {address.partition(':')[0]}", f"{line} '{address}'", s3=False, quick=flag in ("--data", "--source"))
    for flag, line in FLAGS.items()
    for address in ADDRESSES
    if flag != "--out" or "://" in address  # else it is a folder of that name, which the user has asked for
]

DATASETS: dict[str, Make] = {
    **{f"shard name: {name}": files.named_shard(value) for name, value in files.NAMES.items()},
    **files.CHECKSUMS,
    **{f"manifest: {name}": make for name, make in files.MANIFESTS.items()},
    **{f"index: {name}": files.indexed(make) for name, make in files.INDICES.items()},
    **{f"clip: {name}": lambda w, c, make=make: files.dataset(w, c, make(w)) for name, make in files.CLIPS.items()},
    **{f"key: {name}": lambda w, c, key=key: files.dataset(w, c, {}, key) for name, key in files.KEYS.items()},
}
"""Some of it only ``verify.py`` looks at: other jobs read the clips and the truth that they take."""
READ_BY_ALL = {name: make for name, make in DATASETS.items() if name.partition(":")[0] not in ("clip", "key")}
REST = {name: make for name, make in DATASETS.items() if name not in READ_BY_ALL}
STRANGE_CONFIGS = {
    "a stranger's data address": files.config(data="pipe:touch x"),
    "a stranger's start": files.config(init="http://127.0.0.1/x"),
    "stages of shell": files.config(stages=["steps=1 data=$(touch x)", ""]),
    "strange types": files.config(steps="9", seed=[1], optim={"lr": {}}),
}
STEPS = {
    "traversal": "checkpoints/../../../etc",
    "absolute": "/etc/passwd",
    "pipe": "pipe:touch x",
    "http": "http://127.0.0.1/step-00000001",
    "a number": 3,
    "long": "checkpoints/step-" + "0" * 100_000,
    "digits": "checkpoints/step-" + "9" * 5_000,
}
PIPES = {
    "data/train/manifest.json": TRAIN + "{case}/data",
    "data/train/index.parquet": TRAIN + "{case}/data",
    "data/train/shard-00000.tar": TRAIN + "{case}/data",
    "run/last.json": EXTRACT + "{case}/run --data {data}",
    "run/checkpoints/*/model.safetensors": EXTRACT + "{case}/run --data {data}",
    "run/config.json": CONFIG + "run/config.json",
    "tables/objects/*.parquet": "export.py --out {out}/x.parquet --tables {case}/tables",
}
READERS = {
    "export": "export.py --out {out}/x.parquet --tables {case}/tables",
    "export rows": "export.py --no-tensor --out {out}/x.parquet --tables {case}/tables",
    "verify": "verify.py {case}/tables",
    "iter_clips": "use iter_clips {case}/tables",
    "load_clip": "use load_clip {case}/tables",
    "ClipDataset": "use ClipDataset {case}/tables",
    "read_objects": "use read_objects {case}/tables",
}
TABLES = {
    **{name: files.part(change) for name, change in files.PARTS.items()},
    **{f"part name: {name}": files.named_part(value) for name, value in files.NAMES.items()},
    "parts that are no list": files.part(parts=3),
    "parts without tables": files.part(parts=[{"name": "shard-00000"}]),
}
NUMBERS = {name: files.part(change) for name, change in files.NUMBERS.items()}
ROWS: dict[str, tuple[int, ...]] = dict.fromkeys(("export rows", "read_objects"), DONE)
"""Readers that pass rows on as they are."""
STATES = {**files.STATES, **files.STATE_MODELS}
CASES = [
    *SOURCES,
    *URLS,
    *cases("dataset", "verify.py {case}/data", DATASETS),
    *cases("train", TRAIN + "{case}/data", READ_BY_ALL),
    *cases("train", TRAIN + "{case}/data", {"pickled metadata": files.indexed(files.pickled_index)}, DONE),
    *cases("train", TRAIN + "{case}/data", REST, EITHER, quick=False),
    *cases("extract", EXTRACT + "{run} --data {case}/data", DATASETS, EITHER, quick=False),
    *cases("evaluate", EVALUATE + "{run} --data {case}/data", READ_BY_ALL, quick=False),
    *[case for name, line in PIPES.items() for case in cases("pipe", line, {name: files.pipe_at(name)}, s3=False)],
    *cases("weights", EXTRACT + "{case}/run --data {data}", in_checkpoint("model.safetensors", files.WEIGHTS)),
    *cases("optimiser", RESUME, in_checkpoint("optimizer.safetensors", files.WEIGHTS), quick=False),
    *cases("perceptual weights", PERCEPTUAL, in_file("w.safetensors", files.WEIGHTS), quick=False),
    *cases("state", EXTRACT + "{case}/run --data {data}", in_checkpoint("state.json", STATES)),
    *cases("resumed state", RESUME, in_checkpoint("state.json", files.STATES), quick=False),
    # The run's own config.json counts.
    *cases("resumed state", RESUME, in_checkpoint("state.json", files.STATE_MODELS), EITHER, quick=False),
    *cases("last.json", EXTRACT + "{case}/run --data {data}", {n: files.last(checkpoint=v) for n, v in STEPS.items()}),
    *cases("evaluate", EVALUATE + "{case}/run --data {data}", in_checkpoint("model.safetensors", files.FOREIGN)),
    *cases("what_if", WHAT_IF + "{case}/run", in_checkpoint("model.safetensors", files.FOREIGN)),
    *cases("init", TRAIN + "{data} --init {case}/run", in_checkpoint("model.safetensors", files.FOREIGN)),
    *cases("verify", "verify.py {case}/run", in_checkpoint("model.safetensors", files.WEIGHTS), quick=False),
    *cases("verify state", "verify.py {case}/run", in_checkpoint("state.json", STATES), quick=False),
    *cases("config", CONFIG + "run/config.json", STRANGE_CONFIGS),
    *cases("config", CONFIG + "c.json", in_file("c.json", files.TEXTS)),
    *cases("edits", EDITS, in_file("edits.json", {**files.TEXTS, **files.EDITS})),
    *cases("questions", QUESTIONS, in_file("q.json", files.QUESTIONS)),
    *[case for name, line in READERS.items() for case in cases(name, line, TABLES, quick=name == "iter_clips")],
    *[
        case
        for name, line in READERS.items()
        for case in cases(name, line, NUMBERS, ROWS.get(name, REFUSED), quick=False)
    ],
    *cases("iter_clips", READERS["iter_clips"], {"pickled metadata": files.part(files.pickled_parquet)}, DONE),
    *cases("sweep", SWEEP, {"a good one": files.copied_sweep}, DONE, s3=False),
    *cases("sweep", SWEEP, files.STUDIES, s3=False),
    *cases("sweep", SWEEP, files.PASSED_OVER, EITHER, s3=False),
    *cases("journal", JOURNAL, in_file("s.journal", files.JOURNALS), quick=False, s3=False),
]


# ---------------------------------------------------------------------------------------------------------------------
# The good world


def without_ray() -> None:
    """Tasks one after the other in this process; what runs out of memory goes to a child, as with Ray."""

    def one_by_one(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
        results = {}
        for i, item in enumerate(items):
            try:
                results[i] = task(item)
            except MemoryError:
                continue
        return results

    def schedule(job: extract.Job, todo: list[extract.Part], workers: int) -> Iterator[dict[str, Any]]:
        extractor = extract.Extractor(job)
        for each in todo:
            answer = extractor({name: np.array([value]) for name, value in dataclasses.asdict(each).items()})
            yield {name: values[0] for name, values in answer.items()}

    def train(run: Any) -> str:
        return loop.train(loop.open_run(run))

    pipeline.train.train = cast(Any, train)
    shard._run_tasks = one_by_one
    extract._schedule = cast(Any, schedule)
    cluster.connect = cast(Any, lambda num_cpus=None: None)
    cluster.require_shared = lambda paths: None


def make_videos(root: Path) -> World:
    """Two videos, and nothing else yet."""
    server = socket.create_server(("127.0.0.1", 0), backlog=100)
    server.setblocking(False)
    SERVERS[:] = [server]
    world = World(root, *[root / name for name in (*FOLDERS, "ran")], port=server.getsockname()[1])
    for folder in (world.videos, world.ran):
        folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for name, frames in zip("ab", pixels, strict=True):
        write_mp4(str(world.videos / f"{name}.mp4"), frames, 10.0)
    return world


def make_sweep(world: World) -> None:
    """A sweep whose two trials are over, as far as its storage tells."""
    words = shlex.split(SWEEP.format(case=world.root, data=world.data))
    search, settings = words.index("--search") + 1, words.index("--set") + 1
    out = world.root / "sweep"
    run = SweepRun(words[1], str(world.data), str(out), 2, (words[search],), set=tuple(words[settings : search - 1]))
    base, shared, space, objectives = tune._prepare(run)
    out.mkdir()
    study = SweepStudy.open(
        f"sqlite:///{out}/study.db", run.study, plan=tune._plan(run, base, shared, space, objectives), space=space,
        objectives=objectives, wanted=2, resume=False,
    )  # fmt: skip
    for _ in range(2):
        number, _ = study.ask()
        study.complete(number, [{objective.name: 1.0 for objective in objectives}], 1.0)
        folder = out / f"trials/{number:04d}/seed-0"
        folder.mkdir(parents=True)
        shutil.copy(world.run / "config.json", folder)


def make_world(root: Path) -> World:
    """Videos, and what the jobs make of them."""
    world = make_videos(root)
    for split in ("train", "test", "val"):
        shard.shard(ShardRun(str(world.videos), str(world.data), split=split, frames=FRAMES, size=SIZE, workers=1))
    changes = {"steps": 1, "eval_every": 0, "optim.batch_size": 2, "threads": 1, "device": "cpu"}
    run = with_overrides(PRESETS["ddlp"]["debug"], changes)
    loop.train(loop.open_run(dataclasses.replace(run, data=str(world.data), out=str(world.run))))
    extract.extract(ExtractRun(str(world.run), str(world.data), str(world.tables), batch_size=2, device="cpu"))
    make_sweep(world)
    return world


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Result(NamedTuple):
    name: str
    wrong: str
    """What is not as it should be; empty where all is well."""
    ran: bool
    """Something of the input ran, called, or was written outside."""
    seconds: float
    megabytes: float
    message: str


SERVERS: list[socket.socket] = []
"""The one that counts who calls."""


def called() -> bool:
    try:
        SERVERS[0].accept()[0].close()
    except BlockingIOError:
        return False
    return True


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def snapshot(folder: Path, leaving: Sequence[Path] = ()) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if not any(path == each or each in path.parents for each in leaving):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns if path.is_file() else 0, status.st_ino)
    return found


def child(words: Sequence[str], says: Path) -> None:
    """Be the job: never returns."""
    status = 99
    try:
        os.setsid()
        sink = os.open(says, os.O_CREAT | os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.chdir(says.parent)
        limit = address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        job, *rest = words
        sys.argv = [job, *rest]
        if job == "use":
            use(*rest)
        else:
            runpy.run_path(str(ROOT / "jobs" / job), run_name="__main__")
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def use(how: str, path: str) -> None:
    """What a user's own program does with tables, told as a job would; and what no job may do."""

    def act(_: Any) -> None:
        READ[how](path)

    cli.main(act, ExtractRun, description="", args=["--checkpoint", "-", "--data", "-", "--out", "-"])


READ: dict[str, Callable[[str], Any]] = {
    "iter_clips": lambda path: list(tables.iter_clips(path)),
    "load_clip": lambda path: tables.load_clip(path, "test-v00000-c0000"),
    "ClipDataset": lambda path: list(tables.ClipDataset(path)),
    "read_objects": tables.read_objects,
    "pickle": lambda path: pickle.loads(Path(path).read_bytes()),
    "numpy": lambda path: np.load(path, allow_pickle=True),
    "torch": lambda path: torch.load(path, weights_only=False),
    "call": lambda path: socket.create_connection(("127.0.0.1", int(Path(path).read_text()))),
    "write": lambda path: Path(path).parents[2].joinpath("outside").write_text("x"),
}
LOADED = {
    "pickle": lambda w: w.trap("control"),
    "numpy": lambda w: files.object_npy(w, "control"),
    "torch": lambda w: files.torch_file(w, "control"),
    "call": lambda w: str(w.port).encode(),
    "write": lambda w: b"",
}
CONTROLS = [
    case
    for how in LOADED
    for case in cases("control", f"use {how} {{case}}/x", in_file("x", {how: LOADED[how]}), s3=False)
]
"""What must be seen, or nothing else is worth a look."""


class Remote:
    """A prefix of object storage; without s3fs, whose threads would not survive the forks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket, _, self.prefix = url.removeprefix("s3://").partition("/")
        self.client = botocore.session.get_session().create_client("s3")

    @staticmethod
    def storable(name: str) -> bool:
        """Whether the server of the tests can hold a name: a line break ends its routes."""
        return "\n" not in name

    def put(self, folder: Path, key: str) -> str:
        """Copy a folder, but for names that cannot be stored; return its URL."""
        for path in folder.rglob("*"):
            if path.is_file() and self.storable(path.name):
                place = f"{self.prefix}/{key}/{path.relative_to(folder)}"
                self.client.put_object(Bucket=self.bucket, Key=place, Body=path.read_bytes())
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")["Body"].read()


def run_case(world: World, case: Case, place: Path, remote: Remote | None = None) -> Result:
    folder, out, says = place / "case", place / "out", place / "says"
    for each in (folder, says):
        each.mkdir(parents=True)
    case.make(world, folder)
    places: dict[str, Any] = {**world._asdict(), "case": folder, "out": out}
    if remote:
        places |= {name: f"{remote.url}/world/{name}" for name in FOLDERS}
        case = case._replace(
            quarantines={name: code for name, code in case.quarantines.items() if remote.storable(name)}
        )
        places |= {"case": remote.put(folder, place.name), "out": f"{remote.url}/{place.name}-out"}
    words = [word.format(**places) for word in shlex.split(case.line)]
    # What a job may write: its own --out.
    own = [
        out,
        says,
        world.root / "cache",
        *(folder / name for name in ("run", "sweep") if f"--out {{case}}/{name}" in case.line),
    ]
    before = snapshot(world.root, own)
    pid = os.fork()
    if not pid:
        child(words, says / "text")
    ended = threading.Event()

    def watch() -> None:
        if not ended.wait(10 * SECONDS):  # a machine that is busy
            os.killpg(pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    _, status, usage = os.wait4(pid, 0)
    ended.set()
    message = (says / "text").read_text(errors="replace")
    after = snapshot(world.root, own)
    came = [f"ran: {path.name}" for path in world.ran.iterdir()]
    came += [f"wrote: {path}" for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
    came += [f"wrote: {path}" for path in says.iterdir() if path.name != "text"]
    came += ["called"] * called()
    for path in world.ran.iterdir():
        path.unlink()
    table = functools.partial(read_table, out, remote, f"{place.name}-out")
    wrong = judge(case, os.waitstatus_to_exitcode(status), message, table)
    if case in CONTROLS:
        wrong, came = ("" if came else "nothing was seen of it"), []
    for path in world.root.glob("outside*"):
        path.unlink()
    return Result(
        case.name, "; ".join([*came, *([wrong] if wrong else [])]), bool(came), usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 1024, message,
    )  # fmt: skip


def read_table(out: Path, remote: Remote | None, key: str, name: str) -> list[dict[str, Any]]:
    data = remote.get(f"{key}/train/{name}") if remote else (out / "train" / name).read_bytes()
    return pq.read_table(io.BytesIO(data)).to_pylist()


def judge(case: Case, status: int, message: str, table: Callable[[str], list[dict[str, Any]]]) -> str:
    """Say what of a job's end is not as it should be; empty where all is."""
    lines = message.splitlines() or [""]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if "Traceback" in message or "unexpected " in lines[-1]:
        return f"a traceback: {lines[-1][:300]}"
    if status not in case.ends:
        return f"status {status}: {lines[-1][:300]}"
    if status and [line.startswith("error: ") for line in lines].index(True) != len(lines) - 1:
        return f"not one line of error, the last: {message[-300:]}"
    if max(map(len, lines)) > LINE:
        return f"a line of {max(map(len, lines))} letters: {lines[-1][:100]}"
    return judge_shards(case, table) if case.quarantines else ""


def judge_shards(case: Case, table: Callable[[str], list[dict[str, Any]]]) -> str:
    rows = table("quarantine.parquet")
    found = {row["source"]: row["code"] for row in rows}
    wrong = [
        f"{name} is {found.get(name, 'taken')} and not {code or 'refused'}"
        for name, code in case.quarantines.items()
        if name not in found or code not in ("", found[name])
    ]
    wrong += [f"a reason of {len(row['message'])} letters" for row in rows if len(row["message"]) > LINE]
    written = {row["source"].partition("/")[0].partition(".")[0] for row in table("index.parquet")}
    return "; ".join(wrong if "0good" in written or not case.quarantines else [*wrong, f"only {written} written"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=[], nargs="+")
    parser.add_argument("--s3", default="")
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    remote = Remote(given.s3) if given.s3 else None
    wanted = [case for case in CASES if not given.only or any(name in case.name for name in given.only)]
    wanted = [case for case in wanted if (case.quick or not given.quick) and (case.s3 or not remote)]
    without_ray()
    results = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        world = make_world(Path(folder))
        if remote:
            for name in FOLDERS:
                remote.put(world.root / name, f"world/{name}")
        gc.freeze()  # or each child would copy all of the memory that its collector looks at
        for number, case in enumerate([*CONTROLS, *wanted]):
            result = run_case(world, case, world.root / f"{number}", remote if case.s3 else None)
            shutil.rmtree(world.root / f"{number}")
            results.append(result)
            if result.wrong or given.only:
                print(f"{result.name}: {result.wrong or 'good'} ({result.seconds:.1f} s, {result.megabytes:.0f} MB)")
                print(*[f"    {line[:300]}" for line in result.message.splitlines()[-9:]], sep="\n", flush=True)
    wrong, seconds = sum(bool(result.wrong) for result in results), sum(result.seconds for result in results)
    print(f"{len(results)} cases, {wrong} not as they should be, {seconds:.0f} CPU seconds")
    if given.json:
        Path(given.json).write_text(json.dumps([result._asdict() for result in results]))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
