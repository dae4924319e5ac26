"""How far a stage is: counters, a status line per interval, Prometheus metrics and a log file, all from one place.

    build: 120/400 shards  3.1/s  1m30s left  2 quarantined  4 retries  1.2 GB

In a job's log that is one line per interval, which grows with the stage, so that the longest one has a few hundred; a
terminal shows the same text behind a bar, in place. Either way the last line stays.

The driver counts, from what tasks answer and what ``metrics.jsonl`` gains: so a task that Ray repeats counts once, and
nothing is lost with a worker. No dataset, table or evaluation holds these numbers: the same inputs give the same bytes
there. They stand in a run's ``metrics.jsonl``, in the log file that ``--log FILE`` names, and in Ray's registry, from
which Prometheus takes them, as ``ray_objdyn_<stage>_<what>`` with the labels ``stage``, ``split`` and ``family``.
"""

import contextlib
import json
import math
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TextIO

LOG_SECONDS = 10.0
"""Shortest time between two status lines in a log."""
LOG_LINES = 50
"""The time between two lines is at least a stage's age divided by this: lines grow with the logarithm of its length."""
TERMINAL_SECONDS = 0.2
"""How often a terminal is drawn anew."""
EXPORT_SECONDS = 1.0
"""How often numbers go to Ray's registry, which passes them on every few seconds."""
BAR = 20
"""Letters of a bar."""
TAGS = ("stage", "split", "family")
"""Labels of every metric."""

_defaults: dict[str, str] = {}
_log: list[str] = []
_asked: list[tuple[bytes, int]] = []


class Stopwatch:
    """Splits the time of a loop into phases: what passed since the last lap belongs to the phase that a lap names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.monotonic()

    def lap(self, phase: str) -> None:
        """End a lap."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now


class Status:
    """Counts what a stage has done, and says so. A context manager: leaving it prints the last line."""

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        split: str = "",
        family: str = "",
        file: TextIO | None = None,
        brief: bool = False,
    ) -> None:
        """Begin a stage.

        Args:
            stage: its name, one word for metrics' sake.
            total: units to do in all.
            unit: what they are, a plural.
            done: how many of them were there before.
            split: label of metrics.
            family: label of metrics.
            file: where lines go, stderr unless given.
            brief: leave out the last line where no other came before it.
        """
        self.stage, self.total, self.unit, self.done, self.first = stage, total, unit, done, done
        self.counts: defaultdict[str, float] = defaultdict(float)
        """What else is counted: ``quarantined``, ``retries``, ``failed``, ..., and ``bytes``."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """By phase, added up over workers."""
        own = {"split": split, "family": family}
        self._tags = {"stage": stage, **(own if split or family else own | _defaults)}
        self._file, self._brief = file or sys.stderr, brief
        self._bar = self._file.isatty()
        self._begin = time.monotonic()
        self._next = self._begin + (TERMINAL_SECONDS if self._bar else LOG_SECONDS)
        self._export_at = self._begin + EXPORT_SECONDS
        self._record_at = self._begin + LOG_SECONDS
        self._lock = threading.RLock()
        self._said = False
        self._drawn = ""
        self._sent: dict[str, float] = {}
        self._gauges: dict[str, float] = {}

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)

    def add(
        self, done: int = 1, *, seconds: Mapping[str, float] | None = None, tell: bool = True, **counts: float
    ) -> None:
        """Count; print the line if it is due and wanted."""
        with self._lock:
            self.done += done
            for name, value in counts.items():
                self.counts[name] += value
            for phase, value in (seconds or {}).items():
                self.seconds[phase] += value
            now = time.monotonic()
            if now >= self._export_at:
                self._export_at = now + EXPORT_SECONDS
                self._export()
            if tell and now >= self._next and self.done < self.total:  # the last line says that all is done
                self.show(self.line())

    def each(self, batches: Iterable[Sized]) -> Iterator[Any]:
        """Pass batches on, and count what is in each once it has been used; the last line comes after the last."""
        with self:
            for batch in batches:
                yield batch
                self.add(len(batch))

    def measure(self, **values: float) -> None:
        """Set numbers that go up and down, which only Prometheus sees."""
        self._gauges |= values

    def show(self, text: str) -> None:
        """Show text in the place of the status line: a line of its own in a log."""
        with self._lock:
            now = time.monotonic()
            self._next = now + (TERMINAL_SECONDS if self._bar else max(LOG_SECONDS, (now - self._begin) / LOG_LINES))
            if self._bar:
                self._draw(text)
            else:
                self._said = True
                print(text, file=self._file, flush=True)
            if not self._bar or now >= self._record_at:
                self._record_at = now + max(LOG_SECONDS, (now - self._begin) / LOG_LINES)
                self._record("running")

    def say(self, text: str) -> None:
        """Print a line that stays, beside the status line."""
        with self._lock:
            drawn = self._drawn
            self._clear()
            print(text, file=self._file, flush=True)
            if drawn:
                self._draw(drawn)

    def close(self, failed: bool = False) -> None:
        """Print the last line; of a stage that failed only if others came before it, since an error follows."""
        with self._lock:
            self._said |= bool(self._drawn)
            self._clear()
            self._export()
            if self._said or not (failed or self._brief):
                print(self.line("stopped after" if failed else "in"), file=self._file, flush=True)
            self._record("failed" if failed else "done")

    def line(self, over: str = "") -> str:
        """The status line; with ``over``, the last one, of which these words come before the time it took."""
        elapsed = self.elapsed
        parts = [f"{self.stage}: {self.done}/{self.total} {self.unit}"]
        if self.rate > 0:
            parts.append(f"{self.rate:.1f}/s" if self.rate >= 1 else f"{self.rate:.2g}/s")
        if over:
            parts.append(f"{over} {duration(elapsed)}")
        elif self.rate > 0:
            parts.append(f"{duration(self.left)} left")
        parts += [f"{value:.0f} {name}" for name, value in self.counts.items() if value and name != "bytes"]
        if stored := self.counts.get("bytes"):
            parts.append(as_bytes(stored))
        if over and (whole := sum(self.seconds.values())) > 0:
            shares = (f"{phase} {100 * value / whole:.0f} %" for phase, value in self.seconds.items())
            parts.append(f"({', '.join(shares)})")
        return "  ".join(parts)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._begin

    @property
    def rate(self) -> float:
        """Units per second since the stage began."""
        return (self.done - self.first) / max(self.elapsed, 1e-9)

    @property
    def left(self) -> float:
        """Seconds that the rest takes at this rate; infinite before the first unit."""
        return (self.total - self.done) / self.rate if self.rate else float("inf")

    def _draw(self, text: str) -> None:
        filled = round(BAR * min(1.0, self.done / max(1, self.total)))
        width = shutil.get_terminal_size().columns - 1
        self._drawn = text
        whole = f"[{'#' * filled}{'.' * (BAR - filled)}] {text}"
        print(f"\r\x1b[K{whole[:width]}", end="", file=self._file, flush=True)

    def _clear(self) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=self._file, flush=True)
        self._drawn = ""

    def _record(self, state: str) -> None:
        if not _log:
            return
        record = {
            **self._tags,
            "state": state,
            "time": time.time(),
            "elapsed_seconds": self.elapsed,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            **self.counts,
            **{f"{phase}_seconds": value for phase, value in self.seconds.items()},
        }
        with contextlib.suppress(OSError), open(_log[0], "a") as file:  # a log is not worth a job
            file.write(f"{json.dumps(record)}\n")

    def _export(self) -> None:
        """Pass on what Ray's registry does not have yet, if this process is connected to Ray."""
        ray = sys.modules.get("ray")
        with contextlib.suppress(Exception):  # a metric is not worth a job
            if ray is None or not ray.is_initialized():
                return
            from ray.util import metrics

            name = f"objdyn_{self.stage.replace(' ', '_')}"
            # Not a gauge: Ray forgets one that was not set for two of its intervals, 20 s.
            counters: dict[str, float] = {"planned": self.total - self.first, "done": self.done - self.first}
            counters |= self.counts
            counters |= {f"seconds/{phase}": value for phase, value in self.seconds.items()}
            for what, value in counters.items():
                if (more := value - self._sent.get(what, 0)) > 0:
                    self._sent[what] = value
                    kind, _, phase = what.partition("/")
                    tags = self._tags | ({"phase": phase} if phase else {})
                    meaning = f"{self.unit} {kind}" if kind in ("planned", "done") else kind
                    metrics.Counter(f"{name}_{kind}", f"{self.stage}: {meaning}", tuple(tags)).inc(more, tags)
            for what, value in {"per_second": self.rate, **self._gauges}.items():
                metrics.Gauge(f"{name}_{what}", f"{self.stage}: {self.unit} {what}", TAGS).set(value, self._tags)


def tag(*, split: str = "", family: str = "") -> None:
    """Label every ``Status`` of this process that begins from now on, unless it has its own labels."""
    _defaults.update(split=split, family=family)


def log_to(path: str) -> None:
    """Add a JSON object per status line to a file, of this process's stages from now on; empty ends that.

    Raises:
        OSError: it cannot be opened.
    """
    _log.clear()
    if path:
        with open(path, "a"):
            _log.append(path)


def earlier_attempts() -> int:
    """How often Ray has tried the task that runs in this process before; 0 outside of tasks.

    Only the first to ask in a task is told, and the others 0: the items that share a task add up what they are told.
    """
    worker = sys.modules.get("ray._private.worker")
    core: Any = getattr(getattr(worker, "global_worker", None), "core_worker", None)
    count = getattr(core, "get_current_task_attempt_number", None)  # Ray has no public name for it
    if count is None:
        return 0
    attempt = core.get_current_task_id().binary(), int(count())
    first = attempt not in _asked
    _asked[:] = [attempt]
    return attempt[1] if first else 0


def duration(seconds: float) -> str:
    """``75`` as ``1m15s``; ``?`` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def as_time(seconds: float) -> str:
    """``5400`` as ``90 min``."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_three_digits(seconds / length)} {unit}"
    return f"{_three_digits(seconds)} s" if seconds >= 10 else f"{seconds:.2g} s"


def as_bytes(count: float) -> str:
    """``1200000`` as ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _three_digits(value: float) -> str:
    """Or all of those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
