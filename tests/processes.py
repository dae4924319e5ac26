"""Which processes there are, who started them, and jobs that are started to be disturbed."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
WAIT = 240.0
"""Seconds within which anything must happen on a machine that is busy; a quiet one needs a tenth."""


def processes() -> dict[int, tuple[int, bytes]]:
    """Parent and command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = parent, (entry / "cmdline").read_bytes()
    return found


def below(process: int) -> dict[int, bytes]:
    """All processes that a process started, with their command lines."""
    known, ours = processes(), {process}
    while grown := {child for child, (parent, _) in known.items() if parent in ours} - ours:
        ours |= grown
    return {child: known[child][1] for child in ours - {process}}


class Driver:
    """A job as its user starts it, with a Ray of its own."""

    def __init__(self, job: str, *words: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "jobs" / job), *words],
            env={**kept, "PYTHONPATH": str(REPOSITORY), **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.started: set[int] = set()

    def watch(self) -> None:
        """Remember what it has started."""
        self.started |= set(below(self.process.pid))

    def left(self, title: bytes = b"") -> set[int]:
        """Those that still run, zombies left out, and have the title in their command line.

        Without a title Ray's agents are among them, two of which outlive a killed driver by a minute.
        """
        known = processes()
        return {child for child in self.started if child in known and known[child][1] and title in known[child][1]}

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=WAIT)[1]
        return self.process.returncode, said


def wait_for(what: Callable[[], Any], driver: Driver | None = None) -> Any:
    """What a function gives as soon as that is something; a driver must not end before."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if found := what():
            return found
        if driver is not None and driver.process.poll() is not None:
            raise ChildProcessError(f"the driver ended: {driver.end()}")
        time.sleep(0.02)
    raise TimeoutError("it did not happen")
