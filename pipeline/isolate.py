"""Bounds on what a strange video can do to the process that reads it, and a process of its own for a suspect.

A decoder is C code that works on whatever strangers wrote: it may crash, hang, or take all memory. Inside a Ray task
``guarded`` bounds the last two, and Ray survives the death of the process. What killed its worker is then read again by
``ask_child``: one video in a fresh Python process under the same bounds, so that a death has one possible cause.

The clock is the kernel's interval timer: its signal ends a process even while C code holds Python's lock. Memory is
bounded by the size of the address space, which only Linux tells.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from pipeline import store

START_SECONDS = 600.0
"""How long a child may take to import what it needs, on a machine that is busy."""
STORAGE_SECONDS = 3600.0
"""How long one read may take: storage that is slow is no fault of a video, and object storage gives up before."""

CHILD_SECONDS = 86_400.0
"""How long a child may take in all, should its own clock fail."""

_CHILD = "from pipeline.isolate import main; main()"  # not -m, which would make this module another one
_READY = b"ready\n"
_AT_STORAGE, _AT_WORK = b"storage", b"at work"  # of one length, since one overwrites the other
_PR_SET_PDEATHSIG = 1  # of Linux's prctl

_PERIOD = 1.0  # seconds between two times that the clock is wound up, since a frame may take microseconds

_stall = 0.0  # seconds that a decoder may go without giving a frame; 0 outside of guarded()
_next = 0.0  # when the clock is wound up again
_short: int | None = None  # size of the address space from which on memory counts as short
_mark: int | None = None  # a child's file for what it waits for: all of its clocks end it by the same signal


@contextlib.contextmanager
def guarded(stall_seconds: float, memory_gb: float) -> Iterator[None]:
    """Let a decoder that stalls kill this process, and one that takes too much memory raise ``MemoryError``.

    The limits of the process are afterwards as they were. A handler of SIGALRM is too, unless it is not Python's.
    """
    global _stall, _short
    before = resource.getrlimit(resource.RLIMIT_AS)
    if (sizes := _address_space()) is not None:
        size, peak = sizes
        wanted = size + int(memory_gb * 1e9)
        soft = wanted if before[0] == resource.RLIM_INFINITY else min(wanted, before[0])
        resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
        short = soft - int(memory_gb * 0.5e9)  # what was refused may have been a large piece
        _short = short if peak < short else None
    _stall = stall_seconds
    try:
        with _alarm_kills():
            yield
    finally:
        _stall, _short = 0.0, None
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _alarm_kills() -> Iterator[None]:
    """Let the clock's signal end the process, though whoever started it may have ignored or blocked the signal."""
    # Python sets handlers in the main thread only; elsewhere the one that is there stays.
    settable = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGALRM, signal.SIG_DFL) if settable else None
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Run the clock of ``guarded`` while a decoder works."""
    if not _stall:
        yield
        return
    _wind_up()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def frame_came() -> bool:
    """Wind up the clock, about once per second; True if it was done now."""
    if time.monotonic() < _next:
        return False
    _wind_up()
    return True


@contextlib.contextmanager
def storage() -> Iterator[None]:
    """Stop the clock while storage is read; another one runs, whose end is no fault of the video."""
    left = signal.setitimer(signal.ITIMER_REAL, STORAGE_SECONDS)[0] if _stall else 0.0
    _write_mark(_AT_STORAGE)
    try:
        yield
    finally:
        _write_mark(_AT_WORK)
        if _stall:
            signal.setitimer(signal.ITIMER_REAL, left)


def memory_is_short() -> bool:
    """Tell whether the process has taken more than half of the memory that ``guarded`` grants.

    Some decoders say that the data are bad when they get no memory, so an error that they give then proves nothing.
    """
    return _short is not None and (sizes := _address_space()) is not None and sizes[1] >= _short


def _write_mark(mark: bytes) -> None:
    if _mark is not None:
        os.pwrite(_mark, mark, 0)


def _wind_up() -> None:
    global _next
    _next = time.monotonic() + _PERIOD
    if _stall:
        signal.setitimer(signal.ITIMER_REAL, _stall + _PERIOD)


def _address_space() -> tuple[int, int] | None:
    """Return the size of this process's address space and its largest size so far, in bytes."""
    try:
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(status["VmSize"].split()[0]) << 10, int(status["VmPeak"].split()[0]) << 10


def ask_child(run: Mapping[str, Any], task: str, root: str, folder: str, item: str) -> str:
    """Do one task of ``shard.py`` in a fresh process; what passes between the two is JSON.

    Returns:
        ``{"result": ...}``, ``{"error": ...}`` where something else than the video is at fault, or
        ``{"fault": [code, message]}`` where the process died or ran out of memory.

    Raises:
        RuntimeError: the process did not get as far as the task.
    """
    request = {"run": dict(run), "task": task, "root": root, "folder": folder, "item": item, "parent": os.getpid()}
    # The child must find the same packages: Ray puts a job's working directory on the path at run time.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
        ) as child,
    ):
        try:
            said, _ = child.communicate(json.dumps(request).encode(), CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            return json.dumps({"fault": ("hang", f"reading it did not end within {CHILD_SECONDS / 3600:g} h")})
        finally:
            child.kill()
        if not said.startswith(_READY):
            complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 2000))
            reason = " ".join(complaints.read().decode(errors="replace").split())
            raise RuntimeError(f"a process to read a video in ended with status {child.returncode}: {reason}")
        complaints.seek(0)
        waited = child.returncode == -signal.SIGALRM and complaints.read() == _AT_STORAGE
    answer = said.removeprefix(_READY).decode()
    try:
        json.loads(answer)  # a process that is killed may have written half of it, or nothing
    except ValueError:
        if waited:
            return json.dumps({"error": f"the storage did not answer for {STORAGE_SECONDS:g} s"})
        return json.dumps({"fault": _cause_of_death(child.returncode, run["stall_seconds"])})
    return answer


def _cause_of_death(status: int, stall_seconds: float) -> tuple[str, str]:
    if status == -signal.SIGALRM:
        return "hang", f"the decoder gave no frame for {stall_seconds:g} s"
    if status >= 0:
        return "crash", f"the decoder ended its process with status {status}"
    name = signal.Signals(-status).name
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return "crash", f"the decoder's process died of {name}{hint}"


def main() -> None:
    """Be the child: read a request, do it, answer."""
    global _mark
    if sys.platform == "linux":  # a child whose parent is killed would work on for nobody
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    request = json.loads(sys.stdin.buffer.read())
    if os.getppid() != request["parent"]:  # it died before the kernel was asked to tell
        os._exit(1)
    import av  # noqa: F401  # before the limits, see shard._guarded

    from pipeline import shard
    from pipeline.config import ShardRun, StorageConfig

    run = ShardRun(**{**request["run"], "storage": StorageConfig(**request["run"]["storage"])})
    with os.fdopen(os.dup(1), "wb") as answer:
        _mark = os.dup(2)  # a file of the parent's, who reads complaints of the start only
        # Decoders may print whatever they like, as much as they like.
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.ftruncate(_mark, 0)
        _write_mark(_AT_WORK)
        _write(answer, _READY)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answer, json.dumps(_do(run, request, shard.ALONE[request["task"]])).encode())
    os._exit(0)  # a library that hangs or crashes while it is unloaded has given its answer already


@store.job
def _do(run: Any, request: dict[str, str], task: Any) -> dict[str, Any]:
    try:
        with guarded(run.stall_seconds, run.max_memory_gb):
            return {"result": task(run, request["root"], request["folder"], request["item"])}
    except MemoryError:
        return {"fault": ["memory", f"reading it takes more than {run.max_memory_gb:g} GB of memory"]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
