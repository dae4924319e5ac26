import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import cluster, store
from pipeline.config import StorageConfig


def test_private_ray_is_explicit_about_authentication_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from pipeline.cluster import connect, require_shared\n"
        "connect(num_cpus=3)\n"
        "connect()\n"
        "import ray\n"
        "require_shared(['/nowhere/at/all', 's3://bucket/x'])\n"
        "print(ray.cluster_resources()['CPU'], os.environ['RAY_AUTH_MODE'], ray.nodes()[0]['NodeManagerAddress'])\n"
        "print(os.environ['RAY_TMPDIR'])\n"
        "import psutil\n"
        "processes = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "sockets = [c.laddr.ip for p in processes for c in p.net_connections('inet') if c.status == 'LISTEN']\n"
        "print({address.removeprefix('::ffff:') for address in sockets})\n"
    )
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")} | {"HOME": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, folder, listening = done.stdout.splitlines()
    assert listening == "{'127.0.0.1'}"
    assert first == "3.0 disabled 127.0.0.1"
    assert not os.path.exists(folder)
    assert not (tmp_path / ".ray").exists()


def test_a_folder_that_all_nodes_read_is_accepted(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node, {**node, "NodeID": "f" * 56, "Alive": False}])
    cluster.require_shared([str(tmp_path), str(tmp_path / "not" / "yet"), "s3://bucket/x"])
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_cannot_read_are_named(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def blind(path: str) -> None:
        return None

    def broken(path: str) -> str:
        raise OSError("stale file handle")

    (node,) = ray.nodes()
    address = re.escape(node["NodeManagerAddress"])
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    monkeypatch.setattr(cluster, "_read_probe", blind)
    with pytest.raises(ValueError, match=f"not shared by all nodes: {address}, {address} cannot read.*s3:// URL"):
        cluster.require_shared([str(tmp_path)])
    monkeypatch.setattr(cluster, "_read_probe", broken)
    with pytest.raises(ValueError, match=rf"{address} \(OSError: stale file handle\)"):
        cluster.require_shared([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_folder_that_takes_no_probe_is_named(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    with pytest.raises(ValueError, match="cannot write a probe file into /proc"):
        cluster.require_shared(["/proc/objdyn"])


def test_cluster_that_cannot_be_joined_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("no answer\nfrom GCS")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=10\.0\.0\.1:6379 \(no answer\).*RAY_AUTH_MODE"):
        cluster.connect()


@pytest.mark.parametrize("submitted", [False, True])
def test_workers_of_a_joined_cluster_are_told_the_endpoint_and_no_credentials(
    submitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    given: dict[str, Any] = {}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    if submitted:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"http://{name.lower()}")
    monkeypatch.delenv(store.PROVED, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: given.update(settings))
    with store.using(StorageConfig(endpoint_url="http://store:9000", attempts=5)):
        cluster.connect()
    told = given["runtime_env"]["env_vars"]
    assert json.loads(told.pop(store.SETTINGS)) == {"endpoint_url": "http://store:9000", "attempts": 5}
    # What a submitted job was given with its variables its workers have already, and Ray refuses to hear it twice.
    assert told == ({} if submitted else {"AWS_ENDPOINT_URL": "http://aws_endpoint_url"})
