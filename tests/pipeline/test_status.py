"""Status lines, counters and log files; what Prometheus and a job's log see of whole stages."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import status
from pipeline.status import Status, Stopwatch


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(status, "time", clock)
    return clock


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    status.log_to(str(tmp_path / "log.jsonl"))
    yield tmp_path / "log.jsonl"
    status.log_to("")


def test_a_log_has_a_line_per_interval_and_the_last_one(clock: Clock) -> None:
    out = io.StringIO()
    with Status("build", 40, "shards", file=out) as stage:
        for i in range(40):
            clock.now += 1
            stage.add(quarantined=i % 20 == 3, retries=2 * (i == 8), bytes=50_000_000)
    assert out.getvalue().splitlines() == [
        "build: 10/40 shards  1.0/s  0m30s left  1 quarantined  2 retries  500 MB",
        "build: 20/40 shards  1.0/s  0m20s left  1 quarantined  2 retries  1 GB",
        "build: 30/40 shards  1.0/s  0m10s left  2 quarantined  2 retries  1.5 GB",
        "build: 40/40 shards  1.0/s  in 0m40s  2 quarantined  2 retries  2 GB",
    ]


def test_what_was_there_before_counts_as_done_but_not_for_the_rate(clock: Clock) -> None:
    out = io.StringIO()
    with Status("extract", 100, "clips", done=90, file=out) as stage:
        clock.now += 20
        stage.add(2, seconds={"read": 1.0, "model": 3.0})
        assert out.getvalue() == "extract: 92/100 clips  0.1/s  1m20s left\n"
        clock.now += 1
        stage.add(8)
    assert out.getvalue().splitlines()[1:] == ["extract: 100/100 clips  0.48/s  in 0m21s  (read 25 %, model 75 %)"]


def test_lines_in_a_log_grow_with_the_logarithm_of_a_stages_length(clock: Clock) -> None:
    out = io.StringIO()
    day = 24 * 3600
    with Status("build", 4 * day, "shards", file=out) as stage:
        for _ in range(4 * day):
            clock.now += 0.25
            stage.add()
    assert 100 < out.getvalue().count("\n") < 400  # every ten seconds would be 8640


def test_a_terminal_shows_one_line_in_place_and_keeps_what_is_said(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    with Status("probe", 4, "videos", file=out) as stage:
        for i in range(4):
            clock.now += 1
            stage.add()
            if i == 1:
                stage.say("half")
    shown = out.getvalue()
    assert shown.count("\n") == 2
    assert shown.endswith("\r\x1b[Kprobe: 4/4 videos  1.0/s  in 0m04s\n")
    assert "\r\x1b[Khalf\n\r\x1b[K[##########..........] probe: 2/4 videos" in shown
    assert max(map(len, re.split(r"\r\x1b\[K|\n", shown))) <= 59


def test_a_stage_that_failed_adds_no_line_to_its_error_unless_it_was_long(clock: Clock) -> None:
    for seconds, lines in ((1, 0), (30, 2)):
        out = io.StringIO()
        with contextlib.suppress(ValueError), Status("build", 9, "shards", file=out) as stage:
            clock.now += seconds
            stage.add()
            raise ValueError
        assert out.getvalue().count("\n") == lines
    assert out.getvalue().endswith("build: 1/9 shards  0.033/s  stopped after 0m30s\n")


def test_a_brief_stage_ends_without_a_line(clock: Clock) -> None:
    out = io.StringIO()
    with Status("verify", 3, "files", file=out, brief=True) as stage:
        stage.add(3)
    assert out.getvalue() == ""


def test_batches_count_once_they_have_been_used(clock: Clock) -> None:
    stage = Status("evaluate", 5, "clips", file=io.StringIO())
    assert [stage.done for _ in stage.each(["abc", "de"])] == [0, 3]
    assert stage.done == 5


def test_the_log_file_has_counters_and_seconds_of_every_line(clock: Clock, log: Path) -> None:
    status.tag(split="train")
    with Status("build", 2, "shards", file=io.StringIO()) as stage:
        clock.now += 11
        stage.add(seconds={"read": 7.5}, quarantined=1)
    with contextlib.suppress(ValueError), Status("train", 1, "steps", family="ddlp", file=io.StringIO()):
        raise ValueError
    status.tag()
    first, last, failed = map(json.loads, log.read_text().splitlines())
    assert first == {
        "stage": "build", "split": "train", "family": "", "state": "running", "time": 1011.0, "elapsed_seconds": 11.0,
        "done": 1, "total": 2, "unit": "shards", "quarantined": 1, "read_seconds": 7.5,
    }  # fmt: skip
    assert last == first | {"state": "done"}
    assert (failed["stage"], failed["family"], failed["state"]) == ("train", "ddlp", "failed")


def test_a_stopwatch_leaves_no_time_out(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in range(3):
        clock.now += 2
        watch.lap("data")
        clock.now += 5
        watch.lap("model")
    assert watch.seconds == {"data": 6, "model": 15}


@pytest.mark.parametrize(("seconds", "text"), [(5, "0m05s"), (75.4, "1m15s"), (3725, "1h02m")])
def test_duration_reads_well(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1.2e6, "1.2 MB"), (3e12, "3.0 TB")])
def test_size_reads_well(count: float, text: str) -> None:
    assert status.size(count) == text
