"""Every stage killed, or out of disk, wherever it writes (``faults.py`` does it); and workers killed inside Ray."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import shard as sharding
from pipeline.config import ShardRun
from pipeline.quickstart import write_mp4
from tests import plain

STAGES = ["shard", "shard (mend)", "train", "extract", "extract (mend)"]


def inject(folder: Path, *words: str) -> dict[str, dict[str, int]]:
    """Run the program and return its counts by stage; fails with its table where a fault was not survived."""
    program, answer = Path(__file__).with_name("faults.py"), folder / "counts.json"
    command = [sys.executable, str(program), "--folder", str(folder), "--json", str(answer), *words]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(process.stdout)
    assert process.returncode == 0, process.stdout
    return json.loads(answer.read_text())


def total(counts: dict[str, dict[str, int]], field: str) -> int:
    return sum(count[field] for count in counts.values())


def test_a_sample_of_faults_is_survived_by_every_stage(tmp_path: Path) -> None:
    counts = inject(tmp_path)
    assert set(STAGES) <= counts.keys()
    assert sum("disk full" in name for name in counts) == 3
    assert sum("2 workers" in name for name in counts) == 5
    assert all(count["injected"] >= 2 for count in counts.values())
    assert sum(counts[name]["injected"] for name in STAGES) >= 50
    assert total(counts, "survived") == total(counts, "injected")
    assert total(counts, "wrong") == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--all",), ("--ddlp", "--each", "4")])
def test_every_fault_is_survived_by_every_stage(tmp_path: Path, words: tuple[str, ...]) -> None:
    counts = inject(tmp_path, "--seed", "1", *words)
    assert total(counts, "survived") == total(counts, "injected") >= 300
    assert total(counts, "wrong") == 0


@pytest.mark.usefixtures("ray_local")
def test_workers_killed_in_the_middle_of_a_shard_leave_the_same_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, counts = tmp_path / "videos", tmp_path / "counts"
    for folder in (source, counts):
        folder.mkdir()
    for name, length in (("a.mp4", 6), ("b.mp4", 10)):
        write_mp4(str(source / name), np.full((length, 16, 16, 3), 90, np.uint8), 25.0)
    undisturbed = ShardRun(source=str(source), out=str(tmp_path / "undisturbed"), frames=3, size=16, clips_per_shard=2)
    with plain.without_ray():
        sharding.shard(undisturbed)

    rules, folder = "write:shard-00000=kill*1; publish:shard-00002=kill*1", str(counts)

    def build_shard(*arguments: str) -> str:
        from pipeline import failpoints, shard

        failpoints.arm(rules, folder)
        try:
            return shard.build_shard(*arguments)  # pyright: ignore[reportArgumentType]
        finally:
            failpoints.arm("")

    monkeypatch.setattr(sharding, "build_shard", build_shard)
    killed = ShardRun(source=str(source), out=str(tmp_path / "killed"), frames=3, size=16, clips_per_shard=2)
    sharding.shard(killed)
    assert sorted(path.name for path in counts.iterdir()) == ["0-0", "1-0"]
    found = {path.name: path.read_bytes() for path in Path(killed.out, "train").glob("[!.]*")}
    assert found == {path.name: path.read_bytes() for path in Path(undisturbed.out, "train").iterdir()}
