"""A sweep whose trials, driver and Ray are killed, read as its user reads it: record, run folders, dashboard."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from pipeline import checkpoint, loop, store
from pipeline.config import TrainRun, with_overrides
from pipeline.presets import PRESETS
from tests.processes import below

PRESET = PRESETS["iodine"]["debug"]
SEARCH = (
    "model.likelihood_weight=log:1:100",
    "model.entropy_weight=choice:0,0.01,0.1",
    "model.num_refinements=int:1:3",
)
TRIALS = 6


def start(log: Path, out: Path, repository: Path, *flags: str, **environment: str) -> "subprocess.Popen[bytes]":
    words = [sys.executable, str(repository / "jobs" / "sweep.py"), "iodine/debug", "--trials", str(TRIALS)]
    words += ["--out", str(out), "--search", SEARCH[0], "--search", *SEARCH[1:], "--objective", "recon_psnr:max"]
    words += ["--set", "checkpoint_every=5", "--max-concurrent", "2", "--retries", "1", *flags]
    # Ray gives up at once on a cluster that was killed, instead of after a minute
    given = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3", "PYTHONPATH": str(repository), **environment}
    environ = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | given
    with open(log, "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environ)


def states(out: Path) -> list[str]:
    with contextlib.suppress(Exception):  # it is being made
        study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out}/study.db")
        return [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return []


def wait(process: "subprocess.Popen[bytes]", reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)


def last_psnr(run: Path) -> float:
    return [line["recon_psnr"] for line in loop.read_metrics(str(run)) if line["kind"] == "eval"][-1]


def dashboard(out: Path, path: str) -> Any:
    from optuna_dashboard import wsgi

    app = wsgi(f"sqlite:///{out}/study.db")
    answer: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "localhost", "SERVER_PORT": "80", "QUERY_STRING": "",
        "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(),
    }  # fmt: skip

    def begin(status: str, headers: Any, exc_info: Any = None, /) -> Callable[[bytes], object]:
        answer.append(status)
        return bytes

    body = b"".join(app(environ, begin))
    assert answer == ["200 OK"], (answer, body)
    return json.loads(body)


@pytest.mark.chaos
def test_a_sweep_survives_its_trials_its_driver_and_ray(
    fault: Callable[[str], Any], tmp_path: Path, repository: Path
) -> None:
    """Trial 1 dies once and goes on, the driver is killed, then all of Ray; the last trial dies too often."""
    count = fault("kill -9 of a sweep's trials, driver and Ray")
    out, counts = tmp_path / "sweep", tmp_path / "counts"
    counts.mkdir()
    faults = {
        "OBJDYN_FAILPOINTS": "published:trials/0001/seed-0/checkpoints/step-00000010/COMPLETE=kill*1"
        "; publish:trials/0005/seed-0/last.json=kill",
        "OBJDYN_FAILPOINTS_DIR": str(counts),
    }
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    first = start(logs[0], out, repository, **faults)
    wait(first, lambda: len(states(out)) > 3)  # of the first three at least one is over
    first.kill()
    first.wait()
    count.injected += 2
    told = logs[0].read_text()
    assert states(out).count("RUNNING") in (1, 2)
    assert "trial 1: " in told
    assert "it goes on from its checkpoint" in told

    second = start(logs[1], out, repository, "--resume", **faults)
    before = len(states(out))
    wait(second, lambda: len(states(out)) > before or len(states(out)) == TRIALS)
    for process in below(second.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    second.wait(60)
    assert second.returncode != 0
    count.injected += 1

    third = start(logs[2], out, repository, "--resume", **faults)
    assert third.wait(120) == 0, logs[2].read_text()
    told = logs[2].read_text()
    record = store.read_json(str(out / "sweep.json"))
    trials = record["trials"]
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert [trial["state"] for trial in trials] == [*["complete"] * (TRIALS - 1), "failed"]
    assert "its process died 2 times" in trials[-1]["reason"]
    count.injected += 2
    assert sum(trial["attempts"] for trial in trials) > TRIALS
    assert len({json.dumps(trial["settings"], sort_keys=True) for trial in trials}) == TRIALS
    assert not (out / ".ray").exists()

    # each value is what the run folder says; the best is the best of them, and the stored run that made it
    values = {trial["number"]: trial["values"]["recon_psnr"] for trial in trials if trial["state"] == "complete"}
    assert values == {number: last_psnr(out / trials[number]["folder"] / "seed-0") for number in values}
    best = max(values, key=lambda number: values[number])
    assert f"best: trial {best}, " in told
    stored = checkpoint.config_from_json(TrainRun, store.read_json(str(out / "best.json"))["run"])
    assert {name: getattr(stored.model, name.partition(".")[2]) for name in trials[best]["settings"]} == (
        trials[best]["settings"]
    )

    # an interrupted trial ended as one that nothing disturbed
    interrupted = next(trial for trial in trials if trial["attempts"] > 1 and trial["state"] == "complete")
    alone = with_overrides(
        PRESET, {**interrupted["settings"], "checkpoint_every": 5, "out": str(tmp_path / "alone"), "threads": 1}
    )
    alone = loop.open_run(dataclasses.replace(alone, device="cpu"))
    loop.train(alone)
    weights = [checkpoint.load_last(str(path)) for path in (tmp_path / "alone", out / interrupted["folder"] / "seed-0")]
    assert weights[0] is not None
    assert weights[1] is not None
    same = all(torch.equal(weights[0].model[name], tensor) for name, tensor in weights[1].model.items())
    count.wrong += not same
    assert same

    # optuna-dashboard lists the trials with their settings, curves, folders and pictures
    (summary,) = dashboard(out, "/api/studies")["study_summaries"]
    listed = dashboard(out, f"/api/studies/{summary['study_id']}")["trials"]
    assert [trial["state"] for trial in listed] == [
        "Complete" if trial["state"] == "complete" else "Fail" for trial in trials
    ]
    for trial, shown in zip(trials, listed, strict=True):
        assert {p["name"]: p["param_external_value"] for p in shown["params"]} == {
            name: str(value) for name, value in trial["settings"].items()
        }
        if trial["state"] == "complete":
            assert [point["step"] for point in shown["intermediate_values"]] == [10, 20]
            (picture,) = shown["artifacts"]
            assert picture["mimetype"] == "image/png"
            assert (out / "artifacts" / picture["artifact_id"]).read_bytes() == (out / trial["picture"]).read_bytes()
        assert {"key": "folder", "value": trial["folder"]} in shown["user_attrs"]
    count.recovered(faults=5)
