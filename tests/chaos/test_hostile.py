"""Every hostile file at every entrance, from disk, from object storage, and on Ray's workers; see tests/hostile.py."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import store

PROGRAM = Path(__file__).parents[1] / "hostile.py"
ROW = "hostile input"


@pytest.mark.chaos
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_nothing_hostile_runs_calls_writes_elsewhere_or_exhausts(
    where: str, s3_folder: str, fault: Callable[[str], Any], tmp_path: Path
) -> None:
    count, answer = fault(f"{ROW}, from {where}"), tmp_path / "results.json"
    words = ["--s3", s3_folder, "--quick"] if where == "s3" else []
    command = [sys.executable, str(PROGRAM), *words, "--json", str(answer)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    results = json.loads(answer.read_text())
    count.injected += len(results)
    count.recovered(faults=sum(not result["wrong"] for result in results))
    count.wrong += sum(result["ran"] for result in results)
    assert {result["name"]: result["wrong"] for result in results if result["wrong"]} == {}


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    return importlib.import_module("hostile")


@pytest.mark.chaos
def test_rays_workers_refuse_it_too(
    hostile: ModuleType, s3_folder: str, repository: Path, fault: Callable[[str], Any], tmp_path: Path
) -> None:
    """The limits are set where the decoders run, and hold for what comes from object storage."""
    count, world = fault(f"{ROW}, on workers"), hostile.make_videos(tmp_path)
    remote = hostile.Remote(s3_folder)
    for name, words, make, all_of_them in (
        ("videos", ["--layout=videos"], hostile.files.videos, hostile.files.VIDEOS),
        ("arrays", ["--layout=npy", "--start=0", "--stop=6"], hostile.files.arrays, hostile.files.ARRAYS),
    ):
        expected = {source: code for source, code in all_of_them.items() if remote.storable(source)}
        folder = tmp_path / "hostile" / name
        folder.mkdir(parents=True)
        make(world, folder)
        out = f"{s3_folder}/{name}-out"
        job = [sys.executable, str(repository / "jobs" / "make_shards.py"), f"--out={out}", *words]
        job += ["--source", remote.put(folder, name) + "/source", "--frames=5", "--size=16", "--max-quarantined=1"]
        subprocess.run([*job, "--max-memory-gb=0.5", "--workers=2"], check=True)
        rows = pq.read_table(store.open_read(f"{out}/train/quarantine.parquet")).to_pylist()
        found = {row["source"]: row["code"] for row in rows}
        refused = {source: code for source, code in expected.items() if source in found and code in ("", found[source])}
        ran = [path.name for path in world.ran.iterdir()] + ["a call"] * hostile.called()
        count.injected += len(expected)
        count.recovered(faults=len(refused))
        count.wrong += len(ran)
        assert refused == expected
        assert ran == []
        index = pq.read_table(store.open_read(f"{out}/train/index.parquet")).to_pylist()
        assert {row["source"].partition(".")[0] for row in index} == {"0good"}
