"""Status lines, counters and log files; what Prometheus and a job's log see of whole stages."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
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


@pytest.mark.parametrize("out", [Terminal(), io.StringIO()])
def test_a_log_file_has_the_same_lines_whether_a_terminal_shows_them_or_not(
    clock: Clock, log: Path, out: io.StringIO
) -> None:
    with Status("build", 40, "shards", file=out) as stage:
        for _ in range(40):
            clock.now += 1
            stage.add()
    assert [json.loads(line)["done"] for line in log.read_text().splitlines()] == [10, 20, 30, 40]


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
    # a stage with a label of its own takes none of another's
    first, last, failed = map(json.loads, log.read_text().splitlines())
    assert first == {
        "stage": "build", "split": "train", "family": "", "state": "running", "time": 1011.0, "elapsed_seconds": 11.0,
        "done": 1, "total": 2, "unit": "shards", "quarantined": 1, "read_seconds": 7.5,
    }  # fmt: skip
    assert last == first | {"state": "done"}
    assert [failed[name] for name in ("stage", "split", "family", "state")] == ["train", "", "ddlp", "failed"]


def test_a_stopwatch_leaves_no_time_out(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in range(3):
        clock.now += 2
        watch.lap("data")
        clock.now += 5
        watch.lap("model")
    assert watch.seconds == {"data": 6, "model": 15}


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0m05s"), (75.4, "1m15s"), (3725, "1h02m"), (float("inf"), "?"), (float("nan"), "?")]
)
def test_duration_reads_well(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1.2e6, "1.2 MB"), (999.7e6, "1 GB"), (3e12, "3.0 TB")]
)
def test_size_reads_well(count: float, text: str) -> None:
    assert status.as_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (119, "119 s"), (5400, "90 min"), (1e4, "2.78 h"), (2e5, "2.31 d"), (1e8, "1,157 d")],
)
def test_rough_time_reads_well(seconds: float, text: str) -> None:
    assert status.as_time(seconds) == text


def samples(port: int) -> dict[tuple[str, str, str], float]:
    """What Prometheus would read from Ray: our numbers by name, split and family, and, of seconds, phase."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^ray_objdyn_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert name.startswith(label["stage"].replace(" ", "_") + "_")  # "probe alone" has probe_alone_done_total
        found[name, f"{label['split']} {label['family']}".strip(), label.get("phase", "")] = float(value)
    return found


def wait_for_sample(name: str, of: str, value: float) -> dict[tuple[str, str, str], float]:
    import ray

    deadline = time.monotonic() + 60
    while (found := samples(ray.nodes()[0]["MetricsExportPort"])).get((name, of, "")) != value:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


@pytest.mark.usefixtures("ray_local")
def test_a_jobs_log_and_prometheus_see_what_tasks_came_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline import shard

    def task(item: str) -> str:
        if item == "dies" and not (tmp_path / item).exists():
            (tmp_path / item).touch()
            os._exit(1)
        return json.dumps({"fault": ["x", "unreadable", "y"]} if item == "bad" else {"bytes": 1000})

    status.tag(split="tiny")
    assert len(shard._run_tasks(task, ["good", "dies", "bad", "good"], "probe")) == 4
    status.tag()
    last = r"probe: 4/4 videos  [\d.]+/s  in \dm\d\ds  1 quarantined  1 retries  3 kB  \(read 100 %\)"
    assert re.fullmatch(last, capsys.readouterr().err.splitlines()[-1])
    found = wait_for_sample("probe_done_total", "tiny", 4)
    assert found["probe_planned_total", "tiny", ""] == 4
    assert found["probe_quarantined_total", "tiny", ""] == 1
    assert found["probe_retries_total", "tiny", ""] == 1
    assert found["probe_bytes_total", "tiny", ""] == 3000
    assert found["probe_seconds_total", "tiny", "read"] > 0


ROAD = """
import dataclasses, json, sys
from pathlib import Path
from pipeline import tune
from pipeline.config import ExtractRun, ShardRun, SweepRun
from pipeline.extract import extract
from pipeline.presets import PRESETS
from pipeline.shard import shard
from pipeline.train import train
from tests.pipeline.test_status import wait_for_sample

out = Path(sys.argv[1])
for split in ("train", "val", "test"):
    source = ShardRun("sim:balls-interaction", str(out / "data"), split=split, frames=10, workers=2)
    shard(dataclasses.replace(source, limit=4, hop=100, clips_per_shard=2))
run = dataclasses.replace(PRESETS["ddlp"]["debug"], data=str(out / "data"), out=str(out / "run"), workers=1)
run = dataclasses.replace(run, steps=4, log_every=1, checkpoint_every=2)
train(run)
after_training = wait_for_sample("train_done_total", "train ddlp", 4)  # Ray forgets a loss in a few seconds
extract(ExtractRun(str(out / "run"), str(out / "data"), str(out / "tables"), context=4, horizon=2, workers=2))
sweep = SweepRun("iodine/debug", out=str(out / "sweep"), trials=2, set=("steps=2",))
tune.sweep(dataclasses.replace(sweep, search=("optim.lr=log:1e-4:1e-3",)))
found = after_training | wait_for_sample("sweep_done_total", "iodine", 2)
print("SAMPLES " + json.dumps([[*key, value] for key, value in found.items()]))
"""


@pytest.mark.slow
def test_no_stage_draws_bars_in_a_log_and_prometheus_sees_all(tmp_path: Path, repository: Path) -> None:
    places = {"PYTHONPATH": str(repository), "RAY_metrics_report_interval_ms": "200"}
    done = subprocess.run(
        [sys.executable, "-c", ROAD, str(tmp_path)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | places,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert not re.search(r"\r|\x1b|it/s|\d%\|", text), text
    stages = Counter(re.findall(r"^(\w+): \d+/\d+ .*  in \d+m\d\ds", done.stderr, re.MULTILINE))
    assert stages == {"build": 3, "train": 1, "extract": 1, "sweep": 1}
    assert sum(line.startswith("step ") for line in done.stderr.splitlines()) == 4
    assert len(done.stderr.splitlines()) < 30, done.stderr

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    found = {tuple(key): value for *key, value in json.loads(done.stdout.rpartition("SAMPLES ")[2])}
    assert found["build_done_total", "train", ""] == found["build_done_total", "test", ""] == 2
    assert found["build_bytes_total", "val", ""] == sum(p.stat().st_size for p in tmp_path.glob("data/val/*.tar"))
    assert found["train_done_total", "train ddlp", ""] == found["train_planned_total", "train ddlp", ""] == 4
    assert found["train_loss", "train ddlp", ""] == pytest.approx(lines[-1]["loss"])
    for phase in ("data", "model", "optimizer"):
        told = sum(line[f"{phase}_seconds"] for line in lines)
        assert found["train_seconds_total", "train ddlp", phase] == pytest.approx(told)
    assert found["extract_done_total", "test ddlp", ""] == 4
    tables = [p for name in ("objects", "frames") for p in tmp_path.glob(f"tables/{name}/*.parquet")]
    assert found["extract_bytes_total", "test ddlp", ""] == sum(path.stat().st_size for path in tables)
