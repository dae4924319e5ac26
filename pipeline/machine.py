"""What this machine grants a process: cores, memory, disk; and which Rays run on it."""

import glob
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator

from pipeline import store


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where its container is granted fewer."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = read_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = read_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = read_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() else cores  # else "max" or "-1"


def available_memory() -> int:
    """Bytes that this process may still take, by the machine's account and by its container's."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    if found is None:
        raise OSError("/proc/meminfo does not tell how much memory is free on this system")
    free = int(found[1]) << 10
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        granted = read_line(os.path.join(folder, limit))
        if granted.isdigit():
            taken = int(read_line(os.path.join(folder, used)) or 0)
            # Files in the cache count as used, but give way.
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", read_text(os.path.join(folder, "memory.stat")), re.M)
            free = min(free, int(granted) - taken + (int(cache[1]) if cache else 0))
    return max(0, free)


def peak_memory() -> int:
    """Most memory that this process has held so far, in bytes.

    Linux adds up what its cores count, each a few pages at a time: a later answer may be some 100 kB below an earlier.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", read_text("/proc/self/status"), re.MULTILINE)
    if found is not None:
        return int(found[1]) << 10
    import resource

    # Where there is no /proc; on Linux a new process would start with the peak of the one that started it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def free_disk(path: str) -> int | None:
    """Free bytes where a path is or will be; None for object storage."""
    if store.is_url(path):
        return None
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def raylets() -> Iterator[tuple[int, str]]:
    """Processes that are a node of some Ray, with the folder it lives in; those that can be seen from here."""
    for file in glob.glob("/proc/[0-9]*/cmdline"):
        words = read_text(file).split("\0")
        if os.path.basename(words[0]) == "raylet":
            option = next((word for word in words if word.startswith("--raylet_socket_name=")), "")
            yield int(file.split("/")[2]), option.partition("=")[2].partition("/session_")[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def is_own_address(host: str) -> bool:
    """Whether this machine has an address: only then can a socket be bound to it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False


def listens(host: str, port: int, timeout: float = 2.0) -> bool:
    """Whether something answers at an address."""
    try:
        with socket.create_connection((host, port), timeout):
            return True
    except OSError:
        return False


def read_text(path: str) -> str:
    """Content of a small file of the system; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def read_line(path: str) -> str:
    """First line of such a file."""
    return read_text(path).partition("\n")[0].strip()
