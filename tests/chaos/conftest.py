"""Figures of the promises about faults: what was injected, what survived, what was silently wrong, how long it took.

    make chaos                            every row, with a seed that is drawn and printed
    make chaos CHAOS_SEED=7               the same again
    make chaos ARGS="-k preempted"        some of it

A test marked ``chaos`` stands for one fault of a row. It asks the fixture ``fault`` to count:

    @pytest.mark.chaos
    def test_...(fault):
        count = fault("kill -9 of a train worker")
        ...
        count.injected += 1
        ...                               # looks whether the run went on
        count.recovered(seconds)
        ...                               # compares with the undisturbed run
        count.wrong += 1                  # somebody would have believed it

The table at the end has a line per name. What was injected and not recovered fails the test by an assertion of its own.
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes import Driver


@dataclasses.dataclass
class Count:
    """Figures of one fault, over all tests that inject it."""

    injected: int = 0
    survived: int = 0
    wrong: int = 0
    """Silently: a reader took for good what the undisturbed run would not have given."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """From each fault to the moment at which the work went on."""

    def recovered(self, seconds: float | None = None, faults: int = 1) -> None:
        """Count faults after which the work went on, and how long that took where it was measured."""
        self.survived += faults
        self.seconds += [] if seconds is None else [seconds]


SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
os.environ["CHAOS_SEED"] = str(SEED)  # for the processes that share the tests
_COUNTS: dict[str, Count] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = {name: dataclasses.asdict(count) for name, count in _COUNTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what one of several processes counted."""
    for name, fields in getattr(node, "workeroutput", {}).get("faults", {}).items():
        count, more = _COUNTS.setdefault(name, Count()), Count(**fields)
        count.injected += more.injected
        count.survived += more.survived
        count.wrong += more.wrong
        count.seconds += more.seconds


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _COUNTS:
        return
    line = "{:52} {:>8} {:>8} {:>14} {:>20}"
    terminalreporter.section(f"faults, CHAOS_SEED={SEED}")
    terminalreporter.write_line(line.format("fault", "injected", "survived", "silently wrong", "seconds to recover"))
    for name, count in _COUNTS.items():
        low, high = min(count.seconds, default=0.0), max(count.seconds, default=0.0)
        times = f"{low:.1f} to {high:.1f}" if count.seconds else "-"
        terminalreporter.write_line(line.format(name, count.injected, count.survived, count.wrong, times))


@pytest.fixture
def fault() -> Callable[[str], Count]:
    """Gives the figures of a fault by its name."""
    return lambda name: _COUNTS.setdefault(name, Count())


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Decides where faults fall: the same in every run with the same seed."""
    return random.Random(f"{SEED}/{request.node.name}")


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    """Drivers of a test, of which none may outlive it."""
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.process.kill()
        driver.process.wait()
        if driver.process.stderr is not None:
            driver.process.stderr.close()
