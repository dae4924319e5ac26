"""Fixtures shared by every test. The environment is set before anything imports ray: each Ray process inherits it."""

import itertools
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RAY_TMPDIR = tempfile.mkdtemp(prefix="r", dir="/tmp")  # private: finds no stale cluster; short: sockets need it
os.environ.update(
    RAY_TMPDIR=RAY_TMPDIR,
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # without it 127.0.0.1 is ignored, see pipeline/cluster.py
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_metrics_report_interval_ms="2500",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    MPLBACKEND="agg",
)
for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
    os.environ.pop(name, None)

_NUMBER = itertools.count()
REPOSITORY = Path(__file__).resolve().parents[1]


LONGEST = (
    "test_hostile.py", "test_s3.py", "test_training.py", "test_train.py", "test_extract.py", "test_shard.py",
    "test_exactly_once.py", "test_poison.py", "test_tune.py", "test_quickstart.py", "test_loop.py", "test_study.py",
)  # fmt: skip
"""Files that take long, which come first: processes that share the tests then end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_unconfigure() -> None:
    shutil.rmtree(RAY_TMPDIR, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def single_torch_thread() -> None:
    """One thread: sums are then added in one order, and small tensors are faster."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real data {folder.name}/ beside the repository")
    return folder


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with four logical CPUs, one for the whole session."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=200 << 20,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    pytest.importorskip("moto", reason="needs the dev extra's moto[server]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def s3_folder(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new prefix in a bucket of the server, which this process and its children find through the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing-key-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    number = next(_NUMBER)
    if number == 0:
        s3fs.S3FileSystem().mkdir("bucket")
    return f"s3://bucket/test-{number}"


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server of the tests ended with status {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the S3 server of the tests did not answer within 30 s")
