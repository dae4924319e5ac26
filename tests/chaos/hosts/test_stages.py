"""Sharding and extraction over two hosts: the same bytes as on one, also when a host dies in the middle of a task.

And who sees which clip in training.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import extract, loop, shard, store, tables
from pipeline.config import ExtractRun, ShardRun, with_overrides
from pipeline.presets import PRESETS
from pipeline.quickstart import write_mp4
from pipeline.reader import iter_clips, open_source
from tests import plain

pytestmark = pytest.mark.chaos

VIDEOS, FRAMES = 8, 6
DEATHS = 2


class Made:
    """What the stages need and what they make, on one host and without Ray."""

    def __init__(self, folder: Path) -> None:
        self.videos, self.data, self.run, self.tables = (folder / name for name in ("videos", "data", "run", "tables"))

    def words(self, stage: str, repository: Path, out: Path) -> list[str]:
        """The command of a stage over two hosts."""
        flags = {
            "shard": [f"--source={self.videos}", f"--frames={FRAMES}", "--clips-per-shard=1", "--split=train"],
            "extract": [
                f"--checkpoint={self.run}", f"--data={self.data}", "--split=train", "--context=3", "--horizon=2",
                "--workers=2", "--device=cpu", "--batch-size=1",
            ],
        }[stage]  # fmt: skip
        job = {"shard": "make_shards.py", "extract": "extract.py"}[stage]
        return [sys.executable, str(repository / "jobs" / job), f"--out={out}", *flags]


@pytest.fixture(scope="module")
def made(room: Any) -> Made:
    """A dataset, a run and tables made by plain loops in this process."""

    made = Made(room.shared / "stages")
    made.videos.mkdir(parents=True)
    for number in range(VIDEOS):
        frames = np.full((2 * FRAMES, 64, 64, 3), 20 * number, np.uint8)
        for i in range(len(frames)):
            frames[i, 4 + i : 20 + i, 8 : 24 + number] = 220
        write_mp4(str(made.videos / f"video-{number}.mp4"), frames, 25.0)
    with plain.without_ray():
        videos, data = str(made.videos), str(made.data)
        shard.shard(ShardRun(source=videos, out=data, frames=FRAMES, clips_per_shard=1, split="train"))
        settings = {"out": str(made.run), "data": str(made.data), "steps": 2, "threads": 1, "eval_every": 0}
        loop.train(loop.open_run(with_overrides(PRESETS["ddlp"]["debug"], settings | {"device": "cpu"})))
        extract.extract(
            ExtractRun(
                checkpoint=str(made.run), data=str(made.data), out=str(made.tables), split="train", context=3,
                horizon=2, device="cpu", batch_size=1,
            )
        )  # fmt: skip
    return made


def files(folder: Path) -> dict[str, bytes]:
    """Every file that is not a leftover of somebody who died."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not store.is_temporary(path.name)
    }


def assert_exactly_once(stage: str, out: Path, made: Made) -> None:
    keys = [clip.key for clip in iter_clips(open_source(str(made.data), "train"), limit=10**6)]
    assert len(keys) == len(set(keys)) == 2 * VIDEOS
    if stage == "shard":
        assert [clip.key for clip in iter_clips(open_source(str(out), "train"), limit=10**6)] == keys
    else:
        rows = tables.read_frames(str(out)).select(["clip", "kind", "frame"]).to_pylist()
        expected = [(key, "posterior", frame) for key in keys for frame in range(FRAMES)]
        expected += [(key, "predicted", frame) for key in keys for frame in (3, 4)]
        assert sorted(tuple(row.values()) for row in rows) == sorted(expected)


def watch(room: Any, program: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> set[str]:
    """Wait for a stage; returns the hosts on which its tasks were seen to run."""
    seen: set[str] = set()
    end = time.monotonic() + seconds
    while program.poll() is None:
        assert time.monotonic() < end, log.read_text()
        seen |= {host.name for host in room.hosts if host.processes("ray::Map")}
        time.sleep(0.05)
    return seen


def test_epoch_over_two_hosts_shows_each_clip_once(cluster: Any, made: Made, repository: Path) -> None:
    """With a loss that is never finite every step is skipped, and the log says which clips both workers had."""
    out, log = cluster.shared / "epoch", cluster.shared / "epoch.log"
    words = [sys.executable, str(repository / "jobs/train_ddlp.py"), "debug", f"--out={out}", f"--data={made.data}"]
    words += ["--workers=2", "--threads=1", "--model.recon-weight=1e39", "--optim.micro-batch-size=2"]
    status, text = cluster.hosts[0].run(*words, log=log, seconds=240, RAY_ADDRESS=cluster.ray)
    assert status == 1, text
    lines = [line["clips"] for line in loop.read_metrics(str(out)) if line["kind"] == "skipped"]
    assert [len(clips) for clips in lines] == [4] * 5
    keys = [clip.key for clip in iter_clips(open_source(str(made.data), "train"), limit=10**6)]
    assert sorted(key for clips in lines[:4] for key in clips) == sorted(keys)  # 16 clips in batches of 4


@pytest.mark.parametrize("stage", ["shard", "extract"])
def test_stage_over_two_hosts_gives_the_bytes_of_one(stage: str, cluster: Any, made: Made, repository: Path) -> None:
    out, log = cluster.shared / f"{stage}-both", cluster.shared / f"{stage}-both.log"
    program = cluster.hosts[0].start(*made.words(stage, repository, out), log=log, RAY_ADDRESS=cluster.ray)
    seen = watch(cluster, program, log)
    assert program.returncode == 0, log.read_text()
    assert seen == {"head", "second"}
    assert files(out) == files(made.data if stage == "shard" else made.tables)
    assert_exactly_once(stage, out, made)


@pytest.mark.parametrize("stage", ["shard", "extract"])
def test_host_that_dies_in_a_task_of_a_stage_leaves_no_trace(
    stage: str, cluster: Any, made: Made, repository: Path, fault: Callable[[str], Any]
) -> None:
    head, second = cluster.hosts[:2]
    count = fault(f"kill -9 of a raylet, {stage}")
    out, log = cluster.shared / f"{stage}-killed", cluster.shared / f"{stage}-killed.log"
    counted = cluster.shared / f"{stage}-counted"
    counted.mkdir()
    point = "publish:/train/shard-" if stage == "shard" else "publish:/objects/"
    # Whatever publishes a file there on the second host hangs, so that it is in the middle of a task when it dies.
    planted = {"OBJDYN_FAILPOINTS": f"{point}=hang*{DEATHS}", "OBJDYN_FAILPOINTS_DIR": str(counted)}
    second.kill()
    cluster.join(second, 2, **planted)
    program = head.start(*made.words(stage, repository, out), log=log, RAY_ADDRESS=cluster.ray)
    held: set[int] = set()
    before, killed = 0, 0.0

    def until(reached: Callable[[], object]) -> None:
        end = time.monotonic() + 240
        while not reached():
            assert program.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.01)

    def hangs(death: int) -> bool:
        # The head shall not do all the work meanwhile: what has begun there stands still.
        for process in set(head.processes("ray::Map")) - held:
            os.kill(process, signal.SIGSTOP)
            held.add(process)
        return len(list(counted.iterdir())) > death

    until(lambda: list(out.rglob("shard-*")))  # the stage is at its files
    for death in range(DEATHS):
        until(lambda death=death: hangs(death))
        if death:
            count.recovered(time.monotonic() - killed)
        before = len(files(out))
        assert second.kill() > 0
        count.injected += 1
        killed = time.monotonic()
        cluster.join(second, 2, **planted)
    until(lambda: len(files(out)) > before)
    count.recovered(time.monotonic() - killed)
    for process in held:
        os.kill(process, signal.SIGCONT)
    watch(cluster, program, log)
    second.kill()
    cluster.join(second, 2)  # without what was planted
    assert program.returncode == 0, log.read_text()
    expected = files(made.data if stage == "shard" else made.tables)
    count.wrong += files(out) != expected
    assert files(out) == expected
    assert_exactly_once(stage, out, made)
