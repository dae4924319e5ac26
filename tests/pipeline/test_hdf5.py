import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline import cluster
from pipeline import shard as sharding
from pipeline.config import Hdf5Run, ShardRun
from pipeline.hdf5 import write_hdf5
from pipeline.reader import iter_clips, open_source
from pipeline.shard import shard

BALLS = "sim:bouncing-balls:size=16,frames=8,colors=8,balls=2-4"


def test_written_videos_are_sharded_as_the_simulator_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_by_one(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
        return {i: task(item) for i, item in enumerate(items)}

    monkeypatch.setattr(sharding, "_run_tasks", one_by_one)  # Ray has its tests
    monkeypatch.setattr(cluster, "connect", lambda workers: None)
    monkeypatch.setattr(cluster, "require_shared", lambda paths: None)
    message = write_hdf5(Hdf5Run(BALLS, str(tmp_path / "in/balls.h5"), train=2, val=52, test=0))
    assert message == f"2 videos of train, 52 videos of val in {tmp_path}/in/balls.h5"
    run = ShardRun(str(tmp_path / "in"), str(tmp_path / "data"), "rnem-hdf5", "val", frames=8, size=16, limit=51)
    shard(run)
    assert "videos 51 = 51 read + 0 quarantined" in capsys.readouterr().out
    shards, simulated = (list(iter_clips(open_source(data, "val"), limit=51)) for data in (run.out, BALLS))
    assert shards[50].source == "balls.h5/validation/50"
    for clip, true in zip(shards, simulated, strict=True):
        assert np.array_equal(clip.frames, true.frames)
        assert np.array_equal(clip.truth["segmentation"], true.truth["segmentation"])
        assert np.array_equal(clip.truth["collisions"], true.truth["collisions"])
    with pytest.raises(ValueError, match=r"balls.h5/test \(bad-layout: .* group test is missing"):
        shard(dataclasses.replace(run, split="test"))


def test_a_split_that_the_layout_does_not_have_is_refused(tmp_path: Path) -> None:
    run = ShardRun(str(tmp_path), str(tmp_path / "data"), "rnem-hdf5", "night")
    with pytest.raises(ValueError, match="--layout rnem-hdf5 has the splits train, val, test, not 'night'"):
        sharding.find_videos(run, run.source)


def test_shards_of_a_simulator_carry_its_options_and_seed() -> None:
    run = ShardRun(BALLS, "out", split="test", size=16, frames=8, seed=3, limit=2)
    _, found = sharding.find_videos(run, run.source)
    name = "bouncing-balls:balls=2-4,size=16,colors=8,frames=8,radius=rnem,seed=3"
    assert [video.source for video in found.videos] == [f"sim:{name}/test/{i}" for i in range(2)]
    assert sharding._settings(run, run.source)["name"] == name
    plans, _ = sharding.plan_shards(run, found.videos)
    assert [clip.source for clip in sharding._clips(run, "", plans[0].parts, [], None)] == [
        f"sim:{name}/test/{i}" for i in range(2)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "videos"}, "source must be a simulator sim:NAME, got 'videos'"),
        ({"out": "a.mp4"}, "out must name a file FILE.h5"),
        ({"val": -1}, "val must be 0 or more, got -1"),
        ({"train": 0, "val": 0, "test": 0}, "are all 0"),
        ({"train": 60_000}, "has 50000 videos of train, not 60000"),
        ({"source": "sim:moons"}, "unknown simulator 'moons'"),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    chosen = {"source": BALLS, "out": str(tmp_path / "a.h5"), **settings}
    with pytest.raises(ValueError, match=message):
        write_hdf5(Hdf5Run(**chosen))  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []
