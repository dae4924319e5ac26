"""A look at everything that a long run needs, before it is started: software, Ray, storage, decoders, inputs, preset.

A check is a function that takes the case and yields findings, and a line in ``CHECKS``. It looks at one thing, says
what it found and, where something is wrong, what to do. What it cannot foresee and raises becomes a ``FAIL`` as well.
Estimates come from the trials of ``trial.py``.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import importlib
import importlib.metadata
import io
import logging
import os
import platform
import shutil
import stat
import sys
import time
import tomllib
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline import cluster, failpoints, machine, nodes, store, trial
from pipeline.config import DoctorRun, ShardRun, TrainRun, with_overrides
from pipeline.status import as_bytes, as_time

AGENT_PORT = 52365
"""Where a machine's Ray listens for jobs; of two Rays only the first gets it."""
LONG_HOURS = 48.0
"""Training that is estimated to take longer is warned of."""
ANSWER_SECONDS = 60.0
"""How long Ray may take for a small task."""
SKEW_SECONDS = 2.0
"""How far a node's clock may be off before it is warned of."""
STEP_SECONDS = 300.0
"""How long the training steps may take together."""
STAGES = ("shard", "reader", "loop", "train", "extract", "evaluate", "report", "tables")
"""Modules of ``pipeline`` that together import whatever is not imported on demand."""


class Finding(NamedTuple):
    """What one check found."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    """What was looked at."""
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.name}: {' '.join(self.text.split())}"


class Case(NamedTuple):
    """What is looked at."""

    run: DoctorRun
    training: TrainRun
    """The preset."""
    source: str
    """Resolved, or empty."""
    data: str
    """Resolved, or empty."""
    out: str
    """Resolved."""
    load: float
    """Processes that wanted a core in the minute before."""


class VideoFormat(NamedTuple):
    """A way in which videos are stored."""

    name: str
    decoders: tuple[str, ...]
    """FFmpeg's decoders for it, any of which will do."""
    encoder: tuple[str, str, str] | None
    """FFmpeg's encoder, its pixel format, and a container, to try a video of it; None only looks for a decoder."""
    common: bool = True
    """Whether its absence is a failure; else it is a warning, since few sources need it."""


VIDEO_FORMATS = (
    VideoFormat("H.264 (mp4, mov, mkv)", ("h264",), ("libx264", "yuv420p", "mp4")),
    VideoFormat("MPEG-4 (avi, mp4)", ("mpeg4",), ("mpeg4", "yuv420p", "avi")),
    VideoFormat("MS MPEG-4 v2 (avi)", ("msmpeg4v2",), ("msmpeg4v2", "yuv420p", "avi")),
    VideoFormat("Motion JPEG (avi, mov)", ("mjpeg",), ("mjpeg", "yuvj420p", "avi")),
    VideoFormat("VP8 (webm)", ("vp8", "libvpx"), ("libvpx", "yuv420p", "webm")),
    VideoFormat("VP9 (webm)", ("vp9", "libvpx-vp9"), ("libvpx-vp9", "yuv420p", "webm")),
    VideoFormat("GIF", ("gif",), ("gif", "rgb8", "gif")),
    VideoFormat("PNG (mov, avi)", ("png",), ("png", "rgb24", "avi")),
    VideoFormat("H.265 (mp4, mkv)", ("hevc",), None, common=False),
    VideoFormat("AV1 (mp4, webm)", ("libdav1d", "libaom-av1"), None, common=False),
)


@store.job
def doctor(run: DoctorRun) -> str:
    """Print a line per finding and return the summary.

    Raises:
        ValueError: a check failed; or the preset is unknown, or a path is of no known kind.
    """
    # As in the benchmark: threads that wait by spinning take the cores from others, and time would measure that.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    case = _case(run)
    levels, failed = Counter[str](), []
    for check in CHECKS:
        for finding in examine(check, case):
            print(finding, flush=True)
            levels[finding.level] += 1
            if finding.level == "FAIL":
                failed.append(finding.name)
    counts = f"{levels['ok']} ok, {levels['warn']} warnings, {levels['FAIL']} failures"
    if failed:
        raise ValueError(f"{counts}: {', '.join(dict.fromkeys(failed))}; each FAIL line above says what to do")
    skipped = [flag for flag, value in {"--source": run.source, "--data": run.data}.items() if not value]
    return counts + (f"; not looked at because not given: {', '.join(skipped)}" if skipped else "")


def examine(check: "Check", case: Case) -> Iterator[Finding]:
    """Run one check; whatever it raises is its last finding."""
    try:
        yield from check(case)
    except Exception as error:  # of any type: the doctor must outlive what it looks for
        yield Finding("FAIL", check.__name__.removeprefix("check_").replace("_", " "), trial.one_line(error))


def check_python(case: Case) -> Iterator[Finding]:
    """Whether this interpreter is new enough."""
    from packaging.specifiers import SpecifierSet

    wanted, found = _needs().python, platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("ok", "python", f"{found}, {sys.executable}")
    else:
        text = f"{found} at {sys.executable}, but {wanted} is needed: make setup PY=/path/to/another/python"
        yield Finding("FAIL", "python", text)


def check_packages(case: Case) -> Iterator[Finding]:
    """Whether every dependency is installed in a version that fits."""
    packages = _needs().packages
    unmet = list(dict.fromkeys(reason for each in packages for reason in _unmet(each)))
    for reason in unmet:
        yield Finding("FAIL", "packages", f"{reason}; run `make setup`, or `pip install -e . -c constraints.txt`")
    if not unmet:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "av", "pyarrow"))
        yield Finding("ok", "packages", f"all {len(packages)} that objdyn needs fit: {shown}, ...")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        text = f"torchvision {importlib.metadata.version('torchvision')} is installed, which objdyn does not need; "
        text += "built for another torch it breaks torchmetrics: pip uninstall torchvision"
        yield Finding("warn", "packages", text)


def check_imports(case: Case) -> Iterator[Finding]:
    """Whether our own code can be imported."""
    for stage in STAGES:
        importlib.import_module(f"pipeline.{stage}")
    from pipeline.checkpoint import code_revision

    revision = code_revision()
    commit = f", commit {revision['revision'][:12]}{' with changes' if revision['dirty'] else ''}"
    yield Finding("ok", "imports", f"every stage of objdyn imports{commit if revision['revision'] else ''}")


def check_torch(case: Case) -> Iterator[Finding]:
    """Which devices torch sees."""
    import torch

    build = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
            text = f"{build}; GPU {index} is {facts.name} with {as_bytes(facts.total_memory)}, {bf16} bf16"
            yield Finding("ok", "torch", text)
    elif cards := glob.glob("/dev/nvidia[0-9]*"):
        remedy = "install torch's CUDA build" if torch.version.cuda is None else "look at nvidia-smi and the driver"
        yield Finding("warn", "torch", f"{build}; it sees none of the {len(cards)} GPUs of this machine: {remedy}")
    else:
        yield Finding("ok", "torch", f"{build}; no GPU")
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if case.training.precision == "bf16" and not has_bf16 and not cluster.is_joined():  # whose nodes may have it
        text = f"{case.run.preset} trains in bf16; on a CPU without AVX-512 BF16 or AMX --precision fp32 is faster"
        yield Finding("warn", "torch", text)


def check_machine(case: Case) -> Iterator[Finding]:
    """How many cores and how much memory a process may use."""
    cores, usable = os.cpu_count() or 1, machine.usable_cores()
    text = f"{usable} cores (load {case.load:.1f}), {as_bytes(machine.available_memory())} of memory free"
    if usable < cores:
        text += f"; the machine has {cores} cores and torch would start as many threads: train with --threads {usable}"
    yield Finding("warn" if usable < cores else "ok", "machine", text)


def check_failpoints(case: Case) -> Iterator[Finding]:
    """Whether faults are planted on purpose."""
    if rules := os.environ.get(failpoints.VARIABLE):
        yield Finding("warn", "failpoints", f"{failpoints.VARIABLE}={rules} plants faults for tests; unset it")


def check_ray_authentication(case: Case) -> Iterator[Finding]:
    """Who may give orders to Ray."""
    mode = os.environ.get("RAY_AUTH_MODE", "unset").lower()
    file = os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    there = os.path.exists(file)
    name, given = "ray authentication", f"RAY_AUTH_MODE is {mode}"
    host = _cluster_host()
    if mode not in ("unset", "token", "disabled"):
        yield Finding("FAIL", name, f"{given}, which Ray does not know; set it to token or disabled")
    elif mode == "token" and not there and "RAY_AUTH_TOKEN" not in os.environ:
        yield Finding("FAIL", name, f"{given}, but {file} is missing: ray get-auth-token --generate")
    elif mode == "token":
        yield Finding("ok", name, f"{given}, and there is one")
    elif host and not machine.is_loopback(host):
        text = f"{given}, and the cluster listens on {host}: whoever reaches it runs code there; use token on head, "
        text += "workers and clients"
        text += ", or start the head with --node-ip-address=127.0.0.1" if machine.is_own_address(host) else ""
        yield Finding("FAIL", name, text)
    elif mode == "disabled":
        where = f"the cluster at {host}" if host else "a job's private Ray"
        yield Finding("ok", name, f"{given}; {where} listens on the loopback interface only")
    else:
        text = f"{given}: a job's private Ray takes disabled, but `ray start` would take "
        text += f"token, since {file} exists, and `ray job submit` would not" if there else "no authentication"
        text += (
            "; before you start or reach a cluster, export RAY_AUTH_MODE=disabled (one machine, yours alone) or token"
        )
        yield Finding("warn", name, text)
    if there and (wide := stat.S_IMODE(os.stat(file).st_mode)) & 0o077:
        yield Finding("warn", name, f"{file} has mode {wide:04o}, so others can read the token: chmod 600 {file}")


def check_ray_network(case: Case) -> Iterator[Finding]:
    """Whether a private Ray stays off the network."""
    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    if os.environ.get(variable, "0").lower() in ("1", "true") and not cluster.is_joined():
        text = f"{variable}={os.environ[variable]} makes a private Ray listen on every interface; unset it"
        yield Finding("warn" if os.environ.get("RAY_AUTH_MODE") == "token" else "FAIL", "ray network", text)


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Whether a private Ray's object store fits."""
    if cluster.is_joined() or not os.path.isdir("/dev/shm"):
        return
    free, needed = shutil.disk_usage("/dev/shm").free, cluster.OBJECT_STORE_BYTES
    text = f"{as_bytes(free)} free in /dev/shm, a private Ray takes up to {as_bytes(needed)}"
    if free < needed:
        text += "; Ray would fall back to slow files: give a container more with --shm-size, or remove old files there"
    yield Finding("warn" if free < needed else "ok", "shared memory", text)


def check_other_rays(case: Case) -> Iterator[Finding]:
    """Whether another Ray on this machine is in the way; looked at before our own starts."""
    name, joined = "other rays", cluster.is_joined()
    rays = [f"process {pid} in {folder}" for pid, folder in machine.raylets()]
    taken = machine.listens("127.0.0.1", AGENT_PORT)
    if joined and len(rays) < 2:
        yield Finding("ok", name, "none beside the cluster's own")
    elif rays or taken:
        text = f"a Ray runs on this machine ({', '.join(rays) or 'not visible from here'})"
        text += f" and holds port {AGENT_PORT}" if taken else ""
        text += "; a cluster started beside it may answer `ray job submit` with 'No available agent': start the "
        text += "cluster first, or end what is left over by its process id"
        yield Finding("warn", name, text)
    else:
        yield Finding("ok", name, f"none; port {AGENT_PORT} is free")
    if not joined and (address := _current_cluster()) and not machine.listens(*_host_and_port(address)):
        text = f"the cluster at {address} is gone, but {_current_cluster_file()} still names it, and Ray's tools wait "
        yield Finding("warn", name, f"{text}for it: remove that file")


def check_private_ray(case: Case) -> Iterator[Finding]:
    """Whether a private Ray starts and runs a task that imports torch and decodes a video."""
    if not case.run.ray or cluster.is_joined():
        return
    ray = sys.modules.get("ray")  # not imported here: connect sets what Ray reads on import
    running = ray is not None and ray.is_initialized()
    start = time.monotonic()
    cluster.connect(2)
    import ray

    started = time.monotonic()
    try:
        answer = ray.remote(num_cpus=1, max_retries=0)(node_facts).remote(tiny_video())
        ray.get(answer, timeout=ANSWER_SECONDS)
    finally:
        answered = time.monotonic()
        if not running:
            ray.shutdown()
    text = f"Ray {ray.__version__} started in {started - start:.1f} s"
    text += f", a task imported torch and decoded a video in {answered - started:.1f} s"
    yield Finding("ok", "private ray", text)


def check_open_cluster(case: Case) -> Iterator[Finding]:
    """Whether a joined cluster answers somebody without its token, whatever this machine's settings say."""
    if not case.run.ray or not cluster.is_joined():
        return
    cluster.connect()
    import ray

    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    head, port = _host_and_port(ray.get_runtime_context().gcs_address)
    if all(map(machine.is_loopback, addresses | {head})):
        yield Finding("ok", "open cluster", f"the cluster listens on {head} only, so that no other machine reaches it")
        return
    doors = {"control store": (head, port)}
    # One that listens on the head's loopback interface, as cluster.yaml has it, is open to nobody from elsewhere.
    dashboard = _host_and_port(ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url or "")
    if not machine.is_loopback(dashboard[0]):
        doors["dashboard"] = dashboard
    answers = {f"{what} at {host}:{port}": _is_open(what, host, port) for what, (host, port) in doors.items()}
    opened = [door for door, answer in answers.items() if answer]
    silent = [door for door, answer in answers.items() if answer is None]
    if opened:
        text = f"the {' and the '.join(opened)} answers without a token: whoever reaches it runs code on every node; "
        yield Finding("FAIL", "open cluster", f"{text}start head and workers with RAY_AUTH_MODE=token")
    elif silent:
        text = f"whether the {' and the '.join(silent)} wants a token is not known: it gives no answer from here; "
        yield Finding("warn", "open cluster", f"{text}ask on the head, or look that RAY_AUTH_MODE=token is set there")
    else:
        yield Finding("ok", "open cluster", f"the cluster at {head} answers nobody without its token")


def check_nodes(case: Case) -> Iterator[Finding]:
    """Whether every node of a joined cluster has this machine's software, sees the folders and works."""
    if not case.run.ray or not cluster.is_joined():
        return
    cluster.connect()
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    read = tuple(path for path in (case.data, case.source) if path and not path.startswith("sim:"))
    alive = [node for node in ray.nodes() if node["Alive"]]
    ask, video = ray.remote(num_cpus=0, max_retries=0)(node_report), tiny_video()
    asked = time.time()
    answers = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            video, case.out, read, node.get("Resources", {}).get("GPU", 0), _session_folder(node)
        )
        for node in alive
    ]
    ready, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_SECONDS)
    here, answered = node_facts(video), time.time()
    for node, answer in zip(alive, answers, strict=True):
        address = node["NodeManagerAddress"]
        if answer not in ready:
            text = f"{address} did not answer within {ANSWER_SECONDS:.0f} s; look at `ray status`, or remove the node"
            yield Finding("FAIL", "nodes", text)
            continue
        try:
            there = ray.get(answer)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            yield Finding("FAIL", "nodes", f"{address} cannot run our code ({reason}); install this objdyn there")
            continue
        found = there["software"]
        if differ := [
            f"{name} {found.get(name)} instead of {value}" for name, value in here.items() if found.get(name) != value
        ]:
            yield Finding("FAIL", "nodes", f"{address} has {', '.join(differ)}; install the same on every node")
        for fault in there["faults"]:
            yield Finding("FAIL", "nodes", f"{address} {fault}")
        if (off := max(asked - there["time"], there["time"] - answered)) > SKEW_SECONDS:
            text = f"the clock of {address} is off by {as_time(off)} or more from this machine's, so that logs do not "
            yield Finding("warn", "nodes", f"{text}fit together and S3 may refuse what it signs; run NTP there")
    resources = ray.cluster_resources()
    text = f"{len(alive)} up with {resources.get('CPU', 0):.0f} CPUs and {resources.get('GPU', 0):.0f} GPUs; this "
    yield Finding("ok", "nodes", f"{text}machine has {', '.join(f'{name} {value}' for name, value in here.items())}")
    cluster.require_shared((case.out, *read))


def check_out(case: Case) -> Iterator[Finding]:
    """Whether results can be written, and whether of several writers exactly one creates a file."""
    folder = case.out
    if not store.is_url(folder):
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            text = f"{case.out} cannot be made: {folder} is no folder; remove it, or choose another --out"
            yield Finding("FAIL", "out", text)
            return
    try:
        probe = store.join(folder, f".objdyn-probe-{uuid.uuid4().hex}")
        try:
            for data in (b"first", b"second"):
                store.publish(probe, data)
                if store.read_bytes(probe) != data:
                    raise OSError(f"{probe} was written, and something else read back")
        finally:
            store.remove(probe)
        exclusive = store.supports_create(folder)
    except Exception as error:  # of any type: object storage has its own
        remedy = "make it writable for this user, or choose another --out"
        if store.is_url(folder):
            remedy = "check that the bucket exists, --storage.endpoint-url or AWS_ENDPOINT_URL, and that "
            remedy += "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may put, get, list and delete there"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space there, or choose another --out"
        elif isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EOPNOTSUPP):
            remedy = f"its file system may lack hard links, else {remedy}"
        yield Finding("FAIL", "out", f"{folder} cannot be written ({trial.one_line(error)}); {remedy}")
        return
    text = f"{case.out} is writable, and a file in it is replaced as a whole"
    if folder != case.out:
        text = f"{case.out} can be made: {folder} is writable, and a file in it is replaced as a whole"
    yield Finding("ok", "out", text)
    if exclusive:
        yield Finding("ok", "create", "of several writers of one file exactly one creates it")
    else:
        text = f"of several writers of one file in {folder} not exactly one created it: the storage ignores the "
        text += "condition If-None-Match, so that two jobs on one folder would mix; use a store that honours it"
        yield Finding("FAIL", "create", text)


def check_video_decoders(case: Case) -> Iterator[Finding]:
    """Whether videos of each format can be read, tried on one that is encoded here."""
    missing = {each: reason for each in VIDEO_FORMATS if (reason := _video_fault(each))}
    remedy = "pip install --force-reinstall av brings an FFmpeg that can"
    for each, reason in missing.items():
        text = f"{each.name} cannot be read ({reason}); {remedy}"
        yield Finding("FAIL" if each.common else "warn", "video decoders", text)
    if fine := [each.name for each in VIDEO_FORMATS if each not in missing]:
        yield Finding("ok", "video decoders", f"{', '.join(fine)} can be read")


def check_image_decoders(case: Case) -> Iterator[Finding]:
    """Whether numbered images can be read."""
    from PIL import Image

    from objdyn.datasets.frames import EXTENSIONS

    image = Image.fromarray(_ramp()[0])
    missing = []
    for kind in dict.fromkeys(Image.registered_extensions()[extension] for extension in EXTENSIONS):
        file = io.BytesIO()
        try:
            image.save(file, kind)
            np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
        except Exception as error:  # Pillow raises whatever the missing library makes it raise
            missing.append(f"{kind} ({trial.one_line(error)})")
    yield _decoders("image decoders", missing, f"{', '.join(EXTENSIONS)} can be read", "pillow")


def check_stored_frames(case: Case) -> Iterator[Finding]:
    """Whether a clip survives each codec of a dataset unchanged."""
    from objdyn.clips import CODECS, Clip, from_sample, to_sample

    clip = Clip(key="probe", frames=_ramp(), fps=10.0, start_frame=0, stride=1, source="probe")
    missing = []
    for codec in CODECS:
        try:
            if not np.array_equal(from_sample("probe", to_sample(clip, codec)).frames, clip.frames):
                missing.append(f"{codec} (the frames came back changed)")
        except Exception as error:  # ImportError, or whatever a library without the codec makes of it
            missing.append(f"{codec} ({trial.one_line(error)})")
    yield _decoders("stored frames", missing, f"{', '.join(CODECS)} keep every pixel", "pillow zstandard")


def check_hdf5(case: Case) -> Iterator[Finding]:
    """Whether HDF5 can be read."""
    missing = []
    try:
        import h5py

        with h5py.File(f"{uuid.uuid4().hex}.h5", "w", driver="core", backing_store=False) as file:
            file["frames"] = _ramp()
            if not np.array_equal(np.asarray(file["frames"]), _ramp()):
                missing.append("HDF5 (the frames came back changed)")
    except Exception as error:
        missing.append(f"HDF5 ({trial.one_line(error)})")
    yield _decoders("hdf5", missing, "can be read", "h5py")


def check_source(case: Case) -> Iterator[Finding]:
    """Whether the videos decode, and what sharding all of them would take."""
    if not case.source:
        return
    if case.source.startswith("sim:"):
        yield Finding("ok", "source", f"{case.source} is a simulator and needs no files")
        return
    run = ShardRun(
        source=case.source, out=case.out, layout=case.run.layout, frames=case.run.frames, stride=case.run.stride,
        size=getattr(case.training.model, "image_size", ShardRun.size),
    )  # fmt: skip
    sample = trial.sample_source(run, case.run.sample_seconds)
    read, faults = sample.read, list(sample.faults)
    if sample.unfinished:
        late = f"not done when the {case.run.sample_seconds:g} s of --sample-seconds were over"
        faults.append(f"{sample.unfinished}: {late}")
    kind = "videos" if run.layout not in ("gswm-hdf5", "rnem-hdf5", "webdataset") else f"files of {run.layout}"
    text = f"{len(read)} of {len(read) + len(faults)} sampled videos decode; there are {sample.files:,} {kind} and "
    text += f"{sample.ignored:,} other files"
    if read:
        rate = sum(each["frames"] for each in read) / sum(each["probe_seconds"] for each in read)
        spans = [_span([each[name] for each in read]) for name in ("width", "height", "frames", "fps")]
        text += ": {} wide, {} high, {} frames, {} fps".format(*spans) + f", {rate:,.0f} frames/s decoded on a core"
    elif not faults:
        text += "; none of those sampled holds a video: correct --source or --layout"
    if faults:
        text += f"; not {'; '.join(faults)}; what cannot be read goes to quarantine.parquet: mend or remove it"
    yield Finding("FAIL" if not read else "warn" if faults else "ok", "source", text)
    if read:
        yield _sharding(case, run, sample.videos * len(read) / (len(read) + len(sample.faults)), read)


def check_data(case: Case) -> Iterator[Finding]:
    """Whether the dataset can be read, and whether the preset can train on it."""
    if not case.data:
        return
    from pipeline import loop, perceptual
    from pipeline.reader import has_split, iter_clips, open_source

    splits = [split for split in ("train", "val", "test") if split == "train" or has_split(case.data, split)]
    facts = []
    for split in splits:
        source = open_source(case.data, split, loader=case.training.loader)
        for clip in iter_clips(source, limit=1):
            t, h, w, _ = clip.frames.shape
            facts.append(f"{split} {sum(source.shard_sizes)} clips of {t} frames of {h}x{w}")
    yield Finding("ok", "data", f"a clip of each split decodes: {', '.join(facts)}")
    training = dataclasses.replace(_with_weights(case), data=case.data)
    loop._try_one_clip(training, perceptual.open_distance(training))
    if "val" not in splits:
        text = "there is no split val: nothing is evaluated during training and no checkpoint is the best; shard one"
        yield Finding("warn", "data", text)
    yield Finding("ok", "data", f"{case.run.preset} can train on it")


def check_weights(case: Case) -> Iterator[Finding]:
    """Whether the weights that a preset's perceptual loss needs are there, and the right ones."""
    from pipeline import perceptual

    if not perceptual.needed(case.training):
        return
    if not case.run.perceptual_weights:
        text = f"{case.run.preset} trains with VGG16, whose weights are not given: {perceptual.advice()}; memory and "
        yield Finding("warn", "weights", f"{text}hours are estimated without them, which is too little")
        return
    try:
        distance = perceptual.open_distance(_with_weights(case))
    except ValueError as error:
        yield Finding("FAIL", "weights", str(error))
        return
    if note := perceptual.note_on(distance):
        yield Finding("warn", "weights", note.removeprefix("note: "))
        return
    yield Finding("ok", "weights", f"{', '.join(case.run.perceptual_weights)}: the published ones of VGG16")


def check_training(case: Case) -> Iterator[Finding]:
    """Whether memory, time and disk suffice for the preset, extrapolated from steps on one and two clips."""
    if not case.run.train_step:
        return
    # Of a curriculum the stage whose steps take most: an upper bound of the time, and the memory that it needs.
    whole = _with_weights(case)
    parts = [whole.stage(index) for index in range(len(whole.parsed_stages))]
    training = max(parts, key=lambda part: part.micro_batch_size * part.clip_frames)
    training = dataclasses.replace(training, data=case.data or training.data)
    clips, steps, sizes = 0, [], {}
    try:
        for result in trial.in_child(trial.train_steps, training, seconds=STEP_SECONDS):
            clips = result.get("begin", clips)
            if "seconds" in result:
                steps.append(result)
            elif "checkpoint" in result:
                sizes = result
    except (ChildProcessError, TimeoutError) as error:
        text = f"a step of {case.run.preset} on {clips} clips of {training.clip_frames} frames failed: {error}; the "
        text += (
            f"machine has {as_bytes(machine.available_memory())} of memory free: use a larger one, or another preset"
        )
        yield Finding("FAIL", "memory", text)
        return
    yield _memory(case, training, steps)
    yield _time(case, training, steps[-1])
    yield _disk(case, training, sizes)


Check = Callable[[Case], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_imports,
    check_torch,
    check_machine,
    check_failpoints,
    check_ray_authentication,
    check_ray_network,
    check_shared_memory,
    check_other_rays,
    check_private_ray,
    check_open_cluster,
    check_nodes,
    check_out,
    check_video_decoders,
    check_image_decoders,
    check_stored_frames,
    check_hdf5,
    check_source,
    check_data,
    check_weights,
    check_training,
)


def node_facts(video: bytes) -> dict[str, str]:
    """Decode a video and return the versions of what runs here; the body of a Ray task.

    Raises:
        ValueError: the video does not decode.
    """
    from objdyn.clips import read_video

    read_video(io.BytesIO(video), length=len(_ramp()))
    names = ("torch", "ray", "av", "pyarrow", "objdyn")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **versions, "code": _code_digest()}


def node_report(video: bytes, out: str, read: Sequence[str], gpus: float, folder: str) -> dict[str, Any]:
    """What a node says of itself, see ``nodes.report``, with its ``software``; the body of a Ray task.

    Raises:
        ValueError: the video does not decode.
    """
    return {"software": node_facts(video), **nodes.report(out, read, gpus, folder)}


def tiny_video() -> bytes:
    """Encode a few frames in a format that every FFmpeg writes and reads."""
    return _encode("mpeg4", "yuv420p", "mp4")


def _case(run: DoctorRun) -> Case:
    from pipeline.presets import PRESETS

    presets = {f"{family}/{name}": preset for family, named in PRESETS.items() for name, preset in named.items()}
    if run.preset not in presets:
        raise ValueError(f"--preset {run.preset} is unknown; choose from {', '.join(presets)}")
    return Case(
        run=run,
        training=presets[run.preset],
        source=run.source and store.resolve(run.source, "--source"),
        data=run.data and store.resolve(run.data, "--data"),
        out=store.resolve(run.out or "~/objdyn/runs", "--out"),
        load=os.getloadavg()[0],
    )


def _with_weights(case: Case) -> TrainRun:
    """The preset with the perceptual weights that were given; where it needs some and has none, with squared error."""
    from pipeline import perceptual

    if not perceptual.needed(case.training):
        return case.training
    if case.run.perceptual_weights:
        paths = tuple(store.resolve(path, perceptual.FLAG) for path in case.run.perceptual_weights)
        return dataclasses.replace(case.training, perceptual_weights=paths)
    return with_overrides(case.training, {"model.recon_loss": "mse"})


class _Needs(NamedTuple):
    python: str
    packages: list[str]


def _needs() -> _Needs:
    """What objdyn needs: of a checkout what it says today, else what was installed."""
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return _Needs(project["requires-python"], project["dependencies"])
    installed = importlib.metadata.distribution("objdyn")
    return _Needs(
        installed.metadata["Requires-Python"], [each for each in installed.requires or () if "extra ==" not in each]
    )


def _unmet(text: str, chosen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Say why a requirement is not met; with extras, also what of them is missing."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    marker = requirement.marker
    if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *sorted(chosen))):
        return
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        yield f"{requirement.name} is not installed"
        return
    if not requirement.specifier.contains(version, prereleases=True):
        yield f"{requirement.name} is {version}, but {requirement.specifier} is needed"
    elif requirement.extras:
        for each in importlib.metadata.requires(requirement.name) or ():
            yield from _unmet(each, frozenset(requirement.extras))


def _session_folder(node: dict[str, Any]) -> str:
    """Where Ray keeps a node's logs, sockets and spilt objects, on that node."""
    return os.path.dirname(os.path.dirname(node.get("RayletSocketName", "")))


def _is_open(what: str, host: str, port: int) -> bool | None:
    """False where there is no such door."""
    return nodes.answers_without_token(host, port, dashboard=what == "dashboard") if port else False


def _cluster_host() -> str:
    """Host of the cluster that would be joined; empty where a private Ray is started or the cluster is not known."""
    if not cluster.is_joined():
        return ""
    address = os.environ.get("RAY_ADDRESS") or "auto"
    return _host_and_port(_current_cluster() if address == "auto" else address)[0]


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0


def _current_cluster_file() -> str:
    return os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")


def _current_cluster() -> str:
    """Address of the cluster that `ray start` wrote down on this machine; empty if there is none."""
    return machine.read_line(_current_cluster_file())


def _decoders(name: str, missing: Sequence[str], found: str, packages: str) -> Finding:
    if missing:
        text = f"{', '.join(missing)} cannot be read; pip install --force-reinstall {packages}"
        return Finding("FAIL", name, text)
    return Finding("ok", name, found)


def _video_fault(form: VideoFormat) -> str:
    """Say why videos of a format cannot be read; empty if they can."""
    import av
    from av.codec.codec import UnknownCodecError

    from objdyn.clips import read_video

    def known(codec: str, mode: Literal["r", "w"]) -> bool:
        try:
            av.Codec(codec, mode)
            return True
        except UnknownCodecError:
            return False

    if not any(known(decoder, "r") for decoder in form.decoders):
        return f"FFmpeg has no decoder {' or '.join(form.decoders)}"
    if form.encoder is None or not known(form.encoder[0], "w"):
        return ""
    wanted = _ramp()
    try:
        frames = read_video(io.BytesIO(_encode(*form.encoder))).frames
    except ValueError as error:
        return trial.one_line(error)
    if frames.shape != wanted.shape:
        return f"of frames {wanted.shape} came back {frames.shape}"
    # GIF has few colours and the others lose a little; a wrong picture is further off than a step of the ramp.
    apart = np.abs(frames.mean((1, 2, 3)) - wanted.mean((1, 2, 3))).max()
    return f"pixels came back {apart:.0f} levels off" if apart > wanted[1].mean() - wanted[0].mean() else ""


def _ramp() -> np.ndarray:
    """A few grey frames, each brighter than the last: uint8 (4, 48, 64, 3)."""
    return np.broadcast_to(np.array([40, 90, 140, 190], np.uint8)[:, None, None, None], (4, 48, 64, 3)).copy()


def _encode(encoder: str, pixels: str, container: str) -> bytes:
    import av

    file, frames = io.BytesIO(), _ramp()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(encoder, rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for image in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def _sharding(case: Case, run: ShardRun, videos: float, read: Sequence[dict[str, Any]]) -> Finding:
    """Hours and bytes of the whole source, from the mean video of the sample."""
    each = videos / len(read)
    clips, stored, seconds = (each * sum(video[name] for video in read) for name in ("clips", "bytes", "seconds"))
    cores = machine.usable_cores()
    text = f"make_shards.py --frames {run.frames} --stride {run.stride} --size {run.size} writes about "
    text += f"{clips:,.0f} clips, {as_bytes(stored)}, in {as_time(seconds / cores)} on {cores} cores "
    text += f"(estimate from {len(read)} videos"
    text += f"; others keep this machine busy, load {case.load:.1f}: an upper bound)" if case.load > 1 else ")"
    free = machine.free_disk(case.out)
    if free is not None and stored > free:
        return Finding("FAIL", "sharding", f"{text}, but only {as_bytes(free)} are free at {case.out}: free some")
    return Finding("ok", "sharding", text)


def _memory(case: Case, training: TrainRun, steps: Sequence[dict[str, Any]]) -> Finding:
    """Memory for the preset's micro-batch: what one clip took, and what a second one added, as often as it must."""
    micro, workers, first = training.micro_batch_size, training.workers, steps[0]["bytes"]
    growth = max(0, steps[-1]["bytes"] - first)
    gpu = steps[-1]["gpu"]
    needed = first + growth * (micro - 1)
    if not gpu:
        side = getattr(training.model, "image_size", 0)
        ahead = training.loader.prefetch * micro * training.clip_frames * 3 * side**2
        needed = (needed + ahead) * workers
    free = steps[-1]["free"] if gpu else machine.available_memory()
    text = f"{case.run.preset} needs about {as_bytes(needed)} for micro-batches of {micro} clips of "
    text += f"{training.clip_frames} frames" + (f" in each of {workers} workers" if workers > 1 else "")
    text += (
        f" (one clip {as_bytes(first)}, each further one {as_bytes(growth)}), beside Ray itself; {as_bytes(free)} are "
    )
    text += f"free on {gpu or 'this machine'}"
    if needed > free:
        return Finding(
            "FAIL",
            "memory",
            f"{text}: train with a smaller --optim.micro-batch-size, which accumulates gradients over more passes",
        )
    return Finding("ok", "memory", text)


def _time(case: Case, training: TrainRun, step: dict[str, Any]) -> Finding:
    """Hours of training: steps as measured, in proportion to their clips; workers on one machine share its cores."""
    gpu, batch = step["gpu"], training.optim.batch_size
    seconds = step["seconds"] / step["clips"] * batch / (training.workers if gpu else 1)
    where = f"{training.workers} {gpu}" if gpu else f"{training.threads or os.cpu_count() or 1} threads"
    text = f"{training.steps:,} steps of {batch} clips at {as_time(seconds)} take {as_time(seconds * training.steps)} "
    text += f"on {where} (estimate from a step on {step['clips']} clips, without reading and evaluation"
    text += f"; others keep this machine busy, load {case.load:.1f}: an upper bound)" if case.load > 1 else ")"
    if seconds * training.steps > LONG_HOURS * 3600:
        return Finding("warn", "time", f"{text}; take a GPU, more of them with --workers, or fewer --steps")
    return Finding("ok", "time", text)


def _disk(case: Case, training: TrainRun, sizes: dict[str, Any]) -> Finding:
    """Bytes of a run folder: the checkpoints that stay, the one being written, and the logs."""
    kept = training.keep_last + 2  # the best, and the newest before the oldest goes
    lines = training.steps // training.log_every + (training.steps // training.eval_every if training.eval_every else 0)
    needed = kept * sizes["checkpoint"] + lines * sizes["line"]
    text = f"the run folder takes {as_bytes(needed)}: up to {kept} checkpoints of {as_bytes(sizes['checkpoint'])} "
    text += f"(keep_last={training.keep_last}, the best, and one more while it is written) and {lines:,} lines of logs"
    free = machine.free_disk(case.out)
    if free is None:
        return Finding("ok", "disk", text)
    text += f"; {as_bytes(free)} are free at {case.out}"
    if needed > free:
        return Finding("FAIL", "disk", f"{text}: free some, or train with a lower --keep-last")
    return Finding("ok", "disk", text)


@functools.cache
def _code_digest() -> str:
    """A hash of our own code, which versions alone do not tell apart."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(path for package in ("objdyn", "pipeline") for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
