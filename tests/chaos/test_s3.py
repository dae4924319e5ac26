"""Stages whose object storage fails, with all data on it; and the quickstart with every path there."""

import json
import os
import random
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.flaky_s3 import FAULTS, FlakyS3

PROGRAM = Path(__file__).parents[1] / "pipeline" / "faults_s3.py"


def row(experiment: str) -> str:
    """The promise that an experiment of the program belongs to."""
    return "S3: answer lost after a successful put" if experiment == "lost" else f"S3: {experiment} of calls fail"


@pytest.mark.chaos
def test_every_stage_on_a_store_that_fails(
    fault: Callable[[str], Any], chance: random.Random, s3_folder: str, s3_endpoint: str, tmp_path: Path
) -> None:
    answer = tmp_path / "counts.json"
    words = ["--endpoint", s3_endpoint, "--seed", str(chance.randrange(10**6)), "--json", str(answer)]
    done = subprocess.run([sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    counts = json.loads(answer.read_text())
    for experiment, found in counts.items():
        count = fault(row(experiment.partition(", ")[2]))
        count.injected += found["injected"]
        count.recovered(faults=found["survived"])
        count.wrong += found["wrong"]
    assert done.returncode == 0, done.stdout
    assert sum(found["injected"] for found in counts.values()) > 100
    assert sum(found["stopped"] for found in counts.values()) > 0


@pytest.mark.chaos
def test_jobs_in_ray_on_a_store_that_fails(
    fault: Callable[[str], Any], chance: random.Random, s3_folder: str, s3_endpoint: str, repository: Path
) -> None:
    import s3fs

    count = fault(row("10 %"))
    before = count.injected
    made: list[dict[str, Any]] = []
    for number, rates in enumerate([{}, {kind: 0.1 / len(FAULTS) for kind in FAULTS}]):
        # The last name in the path is the dataset's, so it stays the same.
        out = f"{s3_folder}/{number}/data"
        with FlakyS3(s3_endpoint, rates, seed=chance.randrange(10**6), hang=4.0) as proxy:
            job = [sys.executable, str(repository / "jobs" / "make_shards.py"), "--source", "sim:balls-interaction"]
            job += ["--out", out, "--limit", "4", "--frames", "10", "--clips-per-shard", "4", "--workers", "2"]
            job += ["--storage.endpoint-url", proxy.url, "--storage.timeout", "3"]
            subprocess.run(job, check=True, env={**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
        storage = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        made.append({path.partition("/data/")[2]: storage.cat_file(path) for path in storage.find(out)})
        count.injected += proxy.faults
    assert count.injected > before
    assert made[0] == made[1]
    assert len(made[0]) > 3
    count.recovered(faults=count.injected - before)


@pytest.mark.chaos
def test_whole_quickstart_on_s3_leaves_no_credentials_anywhere(
    s3_folder: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    secrets = [f"KEYID{uuid.uuid4().hex}", f"SECRET{uuid.uuid4().hex}", f"TOKEN{uuid.uuid4().hex}"]
    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), secrets, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    said = ""

    def job(name: str, *words: str, status: int = 0) -> str:
        nonlocal said
        command = [sys.executable, str(repository / "jobs" / f"{name}.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        said += done.stdout + done.stderr
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    quick, sweep = f"{s3_folder}/quick", f"{s3_folder}/sweep"
    videos = ["--train-videos", "6", "--val-videos", "2", "--test-videos", "2", "--frames", "30", "--horizon", "10"]
    told = job("quickstart", "--out", quick, "--preset", "debug", "--steps", "6", *videos, "--promise-db", "-100")
    assert f"report: {quick}/report/report.html" in told
    for folder in ("data", "run", "tables", "report"):
        job("verify", f"{quick}/{folder}")
    data = ["--data", f"{quick}/data"]
    job("train_ddlp", "debug", *data, "--out", f"{s3_folder}/run", "--steps", "2", "--init", f"{quick}/run")
    study = [
        "--study-storage",
        str(tmp_path / "study.db"),
        "--trials",
        "2",
        "--set",
        "steps=2",
        "clip_frames=2",
        "model.image_size=64",
    ]
    job("sweep", "iodine/debug", *data, "--out", sweep, "--search", "optim.lr=log:1e-4:1e-3", *study)
    job("export", "--tables", f"{quick}/tables", "--out", f"{s3_folder}/dense.parquet")
    job("extract", "--checkpoint", f"{quick}/run", *data, "--out", f"{quick}/data/test", status=1)
    job("verify", "s3://no-such-bucket/run", status=1)

    storage = s3fs.S3FileSystem(use_listings_cache=False)
    written: dict[str, Any] = {path: storage.cat_file(path) for path in storage.find(s3_folder)}
    written |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ray = Path(os.environ["RAY_TMPDIR"])
    written |= {str(path): path.read_bytes() for path in ray.rglob("*") if path.is_file() and os.access(path, os.R_OK)}
    assert len([path for path in written if re.search(r"test-\d+/quick/", path)]) > 20
    assert any("/sweep/trials/" in path for path in written)
    written["stdout and stderr"] = said.encode()
    for secret in secrets:
        found = [path for path, data in written.items() if secret.encode() in data]
        assert found == []
