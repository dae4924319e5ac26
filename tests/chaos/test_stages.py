"""Sharding and extraction whose workers or drivers die or are told to end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import extract, failpoints, loop, shard, stop, store, tables
from pipeline.config import ExtractRun, ShardRun, with_overrides
from pipeline.presets import PRESETS
from pipeline.quickstart import write_videos
from tests import plain
from tests.processes import Driver, wait_for

pytestmark = pytest.mark.chaos


def files_of(out: Path) -> dict[str, bytes]:
    """Every file but what a killed process left under a temporary name."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not store.is_temporary(path.name)
    }


def test_a_sharding_is_preempted_and_finished_by_the_same_command(
    fault: Callable[[str], Any], tmp_path: Path, drivers: list[Driver]
) -> None:
    videos, counts, count = tmp_path / "videos", tmp_path / "counts", fault("SIGTERM to a sharding (spot)")
    counts.mkdir()
    write_videos(str(videos), "train", count=3, frames=20)
    job = ["make_shards.py", "--source", str(videos), "--frames", "4", "--size", "32", "--clips-per-shard", "4"]
    rules = {failpoints.VARIABLE: "decode:build=hang*1", failpoints.FOLDER: str(counts)}
    drivers.append(Driver(*job, "--out", str(tmp_path / "out"), **rules))
    wait_for(lambda: any(counts.iterdir()), drivers[-1])
    drivers[-1].watch()
    drivers[-1].process.terminate()
    count.injected += 1
    begin = time.monotonic()
    status, said = drivers[-1].end()
    assert (status, "error: preempted by SIGTERM; run the same command again" in said) == (stop.STATUS, True), said
    assert time.monotonic() - begin < 40
    wait_for(lambda: not drivers[-1].left())
    for out in (tmp_path / "out", tmp_path / "undisturbed"):
        drivers.append(Driver(*job, "--out", str(out)))
        status, said = drivers[-1].end()
        assert status == 0, said
    count.recovered()
    ours, theirs = (files_of(tmp_path / name) for name in ("out", "undisturbed"))
    count.wrong += ours != theirs
    assert ours == theirs
    assert len(ours) > 3


def test_an_extraction_whose_worker_and_then_all_of_it_is_killed_is_finished_by_the_same_command(
    fault: Callable[[str], Any], tmp_path: Path, drivers: list[Driver]
) -> None:
    videos, data, run, counts = (tmp_path / name for name in ("videos", "data", "run", "counts"))
    counts.mkdir()
    write_videos(str(videos), "train", count=3, frames=20)
    settings = {"out": str(run), "steps": 1, "threads": 1, "eval_every": 0, "device": "cpu"}
    loop.train(loop.open_run(with_overrides(PRESETS["iodine"]["debug"], settings)))
    of = ExtractRun(str(run), str(data), str(tmp_path / "undisturbed"), "train", device="cpu")
    with plain.without_ray():
        shard.shard(ShardRun(source=str(videos), out=str(data), frames=4, size=32, clips_per_shard=1, split="train"))
        extract.extract(of)

    words = ["--checkpoint", of.checkpoint, "--data", of.data, "--split", of.split, "--device", of.device]
    killed, all_killed = fault("kill -9 of an extraction's worker"), fault("kill -9 of an extraction's driver")
    points = (
        "write:frames/.shard=kill*1@3; write:objects/.shard-00009=hang"  # so that it cannot end before it is killed
    )
    rules = {failpoints.VARIABLE: points, failpoints.FOLDER: str(counts)}

    def done() -> int:
        return len(list((tmp_path / "out" / "parts").glob("*.json")))

    drivers.append(Driver("extract.py", *words, "--workers", "1", "--out", str(tmp_path / "out"), **rules))
    wait_for(lambda: any(counts.iterdir()), drivers[-1])
    killed.injected += 1
    begin, before = time.monotonic(), done()
    wait_for(lambda: done() > before, drivers[-1])
    killed.recovered(time.monotonic() - begin)
    drivers[-1].watch()
    drivers[-1].process.kill()
    all_killed.injected += 1
    wait_for(lambda: not drivers[-1].left(b"MapWorker"))
    assert 0 < done() < 15
    assert not (tmp_path / "out" / tables.MANIFEST).exists()
    drivers.append(Driver("extract.py", *words, "--out", str(tmp_path / "out")))
    status, said = drivers[-1].end()
    assert status == 0, said
    all_killed.recovered()
    ours, theirs = (files_of(tmp_path / name) for name in ("out", "undisturbed"))
    all_killed.wrong += ours != theirs
    assert ours == theirs
    assert done() == 15
