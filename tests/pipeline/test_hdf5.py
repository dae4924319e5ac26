import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from objdyn.clips import SINGLE_CHANNEL, Clip
from pipeline import shard as sharding
from pipeline.config import Hdf5Run, ShardRun, VerifyRun
from pipeline.hdf5 import write_hdf5
from pipeline.reader import iter_clips, open_source
from pipeline.shard import shard
from pipeline.verify import verify
from tests import plain

BALLS = "sim:bouncing-balls:size=16,frames=8,colors=8,balls=2-4"


@pytest.fixture
def without_ray() -> Iterator[None]:
    with plain.without_ray():  # Ray has its tests
        yield


@pytest.mark.usefixtures("without_ray")
def test_written_videos_are_sharded_as_the_simulator_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = write_hdf5(Hdf5Run(BALLS, str(tmp_path / "in/balls.h5"), train=2, val=52, test=0))
    assert message == f"2 videos of train, 52 videos of val in {tmp_path}/in/balls.h5"
    run = ShardRun(str(tmp_path / "in"), str(tmp_path / "data"), "rnem-hdf5", "val", frames=8, size=16, limit=51)
    shard(run)
    told = capsys.readouterr().out
    assert "videos 51 = 51 read + 0 quarantined" in told
    assert "note: " not in told
    shards, simulated = (list(iter_clips(open_source(data, "val"), limit=51)) for data in (run.out, BALLS))
    assert shards[50].source == "balls.h5/validation/50"
    for clip, true in zip(shards, simulated, strict=True):
        assert np.array_equal(clip.frames, true.frames)
        assert np.array_equal(clip.truth["segmentation"], true.truth["segmentation"])
        assert np.array_equal(clip.truth["collisions"], true.truth["collisions"])
    with pytest.raises(ValueError, match=r"balls.h5/test \(bad-layout: .* group test is missing"):
        shard(dataclasses.replace(run, split="test"))


@pytest.mark.usefixtures("without_ray")
def test_a_single_channel_is_said_once_for_all_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hdf5(Hdf5Run(BALLS.replace("colors=8", "colors=binary"), str(tmp_path / "in/b.h5"), train=23, val=0, test=0))
    run = ShardRun(str(tmp_path / "in"), str(tmp_path / "data"), "rnem-hdf5", "train", frames=8, size=16)
    shard(run)
    told = capsys.readouterr().out
    assert told.count("note: ") == told.count("channel") == 1
    assert f"note: b.h5/training/0 and 22 more: {SINGLE_CHANNEL}\n" in told
    source = open_source(run.out, "train")
    assert next(iter_clips(source)).frames.shape == (8, 16, 16, 3)


@pytest.mark.usefixtures("without_ray")
def test_clips_of_a_single_channel_are_stored_as_they_are_and_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_channel(*words: Any) -> Iterator[Clip]:
        for clip in original(*words):
            yield dataclasses.replace(clip, frames=clip.frames[..., : channels[int(clip.key.split("-")[1][1:])]])

    original, channels = sharding._clips, [1, 1]
    monkeypatch.setattr(sharding, "_clips", first_channel)
    run = ShardRun(BALLS, str(tmp_path / "data"), split="test", frames=8, size=16, limit=2, clips_per_shard=1)
    for _ in range(2):  # the second time from what is there
        shard(run)
        assert [clip.frames.shape for clip in iter_clips(open_source(run.out, "test"))] == [(8, 16, 16, 1)] * 2
    assert verify(VerifyRun(run.out)).startswith("ok: dataset")
    channels[1] = 3
    with pytest.raises(ValueError, match=r"must have one number of channels, these have \[1, 3\]; make a dataset of"):
        shard(dataclasses.replace(run, out=str(tmp_path / "other")))


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
