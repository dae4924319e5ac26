"""What a cluster of several hosts refuses: folders that they do not share, and strangers; and what the doctor says."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.chaos

# Each stage as its job starts it, in one process; prints what it refuses with.
STAGES_SCRIPT = """
import dataclasses, sys
from pipeline import cluster
cluster.connect()
from pipeline.config import ExtractRun, ShardRun
from pipeline.extract import extract
from pipeline.presets import PRESETS
from pipeline.shard import shard
from pipeline.train import train
run = dataclasses.replace(PRESETS["ddlp"]["debug"], steps=1, threads=1, workers=2, device="cpu")
stages = {
    "train": lambda: train(dataclasses.replace(run, out="/tmp/own/run")),
    "shard": lambda: shard(ShardRun(source="sim:balls-interaction", out="/tmp/own/data", frames=6, limit=2)),
    "extract": lambda: extract(ExtractRun(checkpoint=sys.argv[1], data="sim:balls-interaction", out="/tmp/own/tables")),
}
train(dataclasses.replace(run, out=sys.argv[1], workers=1))
for name, stage in stages.items():
    try:
        stage()
        print(f"{name} did not refuse")
    except ValueError as error:
        print(f"{name} refused: {error}")
"""


def test_folder_of_one_host_is_refused_with_the_name_of_the_other(cluster: Any) -> None:
    head, second = cluster.hosts[:2]
    log, run = cluster.shared / "refused.log", cluster.shared / "refused"
    words = [sys.executable, "-c", STAGES_SCRIPT, str(run)]
    status, text = head.run(*words, log=log, seconds=300, RAY_ADDRESS=cluster.ray)
    assert status == 0, text
    for name in ("train", "shard", "extract"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} refused: "))
        assert "/tmp/own/" in line
        assert f"is not shared by all nodes: {second.address} cannot read what this machine writes" in line
    assert not second.path("/tmp/own").exists()


def doctor(host: Any, log: Path, repository: Path, *words: str, **environment: str) -> tuple[int, list[str]]:
    job = [sys.executable, str(repository / "jobs" / "doctor.py"), "--no-train-step", *words]
    status, text = host.run(*job, log=log, seconds=300, **environment)
    return status, text.splitlines()


def test_doctor_finds_nothing_wrong_with_a_cluster_that_is_well(cluster: Any, repository: Path) -> None:
    log = cluster.shared / "doctor.log"
    words = [f"--out={cluster.shared / 'runs'}"]
    status, lines = doctor(cluster.hosts[0], log, repository, *words, RAY_ADDRESS=cluster.ray)
    assert status == 0, lines
    assert any(line.startswith("ok    nodes: 2 up with 2 CPUs") for line in lines), lines
    assert f"ok    open cluster: the cluster at {cluster.hosts[0].address} answers nobody without its token" in lines


def test_doctor_names_the_host_that_has_other_code_or_lacks_the_folder(cluster: Any, repository: Path) -> None:
    second, log = cluster.hosts[1], cluster.shared / "doctor-ill.log"
    words = ["--out=/tmp/own/runs", f"--data={cluster.shared}"]
    status, lines = doctor(cluster.hosts[0], log, repository, *words, RAY_ADDRESS=cluster.ray)
    assert status == 1
    (line,) = (line for line in lines if "is not shared by all nodes" in line)
    assert line.startswith("FAIL  nodes: /tmp/own/runs")
    assert second.address in line


def test_doctor_fails_where_whoever_reaches_the_cluster_may_run_code(room: Any, repository: Path) -> None:
    host, log = room.add("open"), room.shared / "open.log"
    open_to_all = {"RAY_AUTH_MODE": "disabled"}
    room.join(host, 1, "--head", "--port=6379", "--include-dashboard=false", **open_to_all)
    address = f"{host.address}:6379"
    words = [f"--out={room.shared / 'runs'}"]
    status, lines = doctor(host, log, repository, *words, RAY_ADDRESS=address, **open_to_all)
    host.kill()
    assert status == 1
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 2, lines
    assert failed[0].startswith("FAIL  ray authentication: RAY_AUTH_MODE is disabled, and the cluster listens on")
    assert f"the control store at {address} answers without a token" in failed[1]


def test_job_is_taken_from_who_has_the_token_alone(room: Any, repository: Path) -> None:
    head, friend = room.add("office"), room.add("friend")
    stranger = room.add("stranger", token=False)
    out, log = room.shared / "submitted", room.shared / "submit.log"
    room.join(head, 1, "--head", "--port=6379", f"--dashboard-host={head.address}")
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", f"--address=http://{head.address}:8265"]
    job = ["--working-dir", str(repository), "--", "jobs/train_ddlp.py", "debug", "--steps=2", "--threads=1"]

    for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 32}):
        words = [*submit, *job, f"--out={out}-stranger"]
        status, text = stranger.run(*words, log=log, seconds=120, **environment)
        assert status == 1, text
        assert "401" in text or "nauthor" in text or "nvalid" in text, text

    status, text = friend.run(*submit, *job, f"--out={out}", log=log, seconds=300)
    assert status == 0, text
    assert "succeeded" in text
    assert f"run folder: {out}" in text
    assert (out / "report.html").exists()

    status, text = friend.run(*submit[:2], "list", submit[3], log=log)
    head.kill()
    assert status == 0, text
    assert text.count("submission_id='") == 1, text  # nothing of the stranger's
    assert not Path(f"{out}-stranger").exists()
