"""The layouts of DDLP's data sets through the whole stage: bare arrays split by time, PHYRE's roll-outs and frames."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from objdyn.clips import Clip, from_sample
from objdyn.datasets import Preprocessing, Video
from pipeline import shard as sharding
from pipeline import store
from pipeline.config import ShardRun
from pipeline.shard import plan_shards, shard
from tests import plain


def run_of(source: Path | str, out: Path | str, **changes: Any) -> ShardRun:
    return dataclasses.replace(ShardRun(source=str(source), out=str(out), frames=5, size=16), **changes)


def clips_of(folder: str) -> list[Clip]:
    rows = pq.read_table(io.BytesIO(store.read_bytes(store.join(folder, "index.parquet")))).to_pylist()
    clips = []
    for row in rows:
        data = store.read_bytes(store.join(folder, row["shard"]))
        members = {m["name"]: data[m["offset"] : m["offset"] + m["size"]] for m in row["members"]}
        clips.append(from_sample(row["key"], members))
    return clips


def quarantined(folder: Path) -> list[tuple[str, str, str]]:
    rows = pq.read_table(folder / "quarantine.parquet").to_pylist()
    return [(row["source"], row["stage"], row["code"]) for row in rows]


def test_a_recording_is_split_by_time_and_bad_arrays_are_quarantined(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "traffic"
    source.mkdir()
    levels = np.arange(200, dtype=np.uint8)
    np.save(source / "a.npy", np.broadcast_to(levels[:, None, None, None], (200, 16, 16, 3)))
    np.save(source / "b_float.npy", np.zeros((20, 16, 16, 3)))
    np.save(source / "c_short.npy", np.zeros((20, 16, 16, 3), np.uint8))
    data = (source / "a.npy").read_bytes()
    (source / "d_cut.npy").write_bytes(data[:-1])
    (source / "notes.txt").write_text("a note")
    shard(run_of(source, tmp_path / "data", layout="npy", split="test"))
    clips = clips_of(str(tmp_path / "data/test"))
    assert [clip.start_frame for clip in clips] == [180, 185, 190, 195]
    assert np.concatenate([clip.frames[:, 0, 0, 0] for clip in clips]).tolist() == list(range(180, 200))
    assert "videos 4 = 1 read + 3 quarantined; ignored files 1; clips written 4\n" in capsys.readouterr().out
    assert quarantined(tmp_path / "data/test") == [
        ("b_float.npy", "probe", "bad-layout"),
        ("d_cut.npy", "probe", "truncated"),
        ("c_short.npy", "plan", "too-short"),
    ]


def test_splits_by_time_share_no_frame_and_start_and_stop_override_them() -> None:
    def seen(split: str, **changes: Any) -> list[int]:
        run = run_of("a", "b", layout="npy", split=split, **changes)
        plans, _ = plan_shards(run, [Video("a.npy", ("a.npy",), frames=100, height=4, width=4)])
        cuts = [cut for plan in plans for part in plan.parts for cut in part.cuts]
        return sorted({index for cut in cuts for index in run.preprocessing().indices(cut.start)})

    for hop in (1, 5):
        assert [seen(split, hop=hop) for split in ("train", "val", "test", "all")] == [
            list(range(80)), list(range(80, 90)), list(range(90, 100)), list(range(100)),
        ]  # fmt: skip
    assert seen("val", stop=20) == list(range(20))
    assert seen("val", start=90) == list(range(90, 100))


def test_arrays_are_read_from_object_storage(
    tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch, ray_local: None
) -> None:
    monkeypatch.setattr(sharding, "_run_tasks", plain.run_tasks)  # the session's Ray workers lack this server's address
    array = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), np.uint8)
    np.save(tmp_path / "a.npy", array)
    store.publish(store.join(s3_folder, "in", "a.npy"), (tmp_path / "a.npy").read_bytes())
    shard(run_of(f"{s3_folder}/in", f"{s3_folder}/data", layout="npy", split="all"))
    assert np.array_equal(np.concatenate([clip.frames for clip in clips_of(f"{s3_folder}/data/all")]), array)


def test_real_rollouts_are_trimmed_and_padded_as_ddlp_does(
    ray_local: None, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(shared / "data/phyre_rollouts", tmp_path, layout="phyre", frames=100, limit=2, split="test")
    shard(run)
    assert "videos 2 = 2 read + 0 quarantined; ignored files 2; clips written 2\n" in capsys.readouterr().out
    short, long = clips_of(str(tmp_path / "test"))  # of 62 and 143 frames
    assert (short.frames[32:] == short.frames[31]).all()
    assert (short.frames[31] != short.frames[30]).any()
    assert (long.frames[99] != long.frames[31]).any()
    assert (short.frames[:, 0, 0] == 0).all()  # white became black
    assert short.truth["segmentation"].shape == (100, 16, 16)
    assert short.truth["positions"].shape == (100, 3, 2)
    made = json.loads((tmp_path / "test/manifest.json").read_bytes())["preprocessing"]
    assert (made["drop_last"], made["pad_to"], made["stop"], made["colours"]) == (30, 100, 100, "inverted")


def test_defaults_of_phyre_are_those_of_ddlp_and_can_be_set() -> None:
    def trimming(**changes: Any) -> Preprocessing:
        return run_of("a", "b", **changes).preprocessing()

    train, test = (trimming(layout="phyre", split=split) for split in ("train", "test"))
    assert (train.drop_last, train.pad_to, train.stop, train.inverted) == (30, 0, 100, True)
    assert (test.drop_last, test.pad_to, test.stop, test.inverted) == (30, 100, 100, True)
    own = trimming(layout="phyre", drop_last=0, pad_to=0, stop=143, colours="own")
    assert (own.drop_last, own.pad_to, own.stop, own.inverted) == (0, 0, 143, False)
    folders = trimming(layout="frames")
    assert (folders.drop_last, folders.pad_to, folders.stop, folders.inverted) == (0, 0, None, False)
    asked = trimming(layout="frames", drop_last=30, pad_to=100, stop=100, colours="inverted")
    assert asked == test


def test_too_many_objects_leave_out_the_templates_that_ddlp_leaves_out(shared: Path) -> None:
    from objdyn.datasets import phyre

    root = shared / "data/phyre_rollouts"
    found = phyre.find(sorted(path.name for path in root.glob("000[0-2]*_unsolved_0.npz")))
    videos = [
        phyre.probe(video, lambda path: (root / path).open("rb"))
        for video in found.videos
        if video.source[:5] in ("00008", "00011", "00012", "00013", "00016", "00020", "00021", "00023")
    ]
    _, unfit = plan_shards(run_of("a", "b", layout="phyre", max_objects=11), videos)
    assert {row.code for row in unfit} == {"too-many-objects"}
    assert {row.source[:5] for row in unfit} == {"00012", "00013", "00016", "00020", "00021"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "videos", "drop_last": 3}, "drop_last is for layout 'frames' or 'phyre', got layout 'videos'"),
        ({"layout": "npy", "pad_to": 3}, "pad_to is for layout 'frames' or 'phyre', got layout 'npy'"),
        ({"layout": "npy", "colours": "inverted"}, "colours is for layout 'frames' or 'phyre', got layout 'npy'"),
        ({"layout": "npy", "max_objects": 3}, "max_objects is for layout 'clevrer' or 'phyre', got layout 'npy'"),
        ({"layout": "phyre", "pad_to": -1}, "pad_to must be 0 or more, got -1"),
    ],
)
def test_settings_of_other_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of("a", "b", **changes)


def test_published_phyre_frames_go_through_the_frame_layout(
    ray_local: None, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(run_of(shared / "data/phyre_frames", tmp_path, layout="frames", frames=20, size=64))
    assert "videos 3 = 3 read + 0 quarantined; ignored files 3; clips written 15\n" in capsys.readouterr().out
