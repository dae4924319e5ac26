import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from objdyn.clips import Clip, from_sample
from objdyn.datasets import Found, Video, clevrer
from pipeline import shard as sharding
from pipeline.config import ShardRun, VerifyRun
from pipeline.quickstart import write_mp4
from pipeline.shard import Survey, plan_shards, shard
from pipeline.verify import verify
from tests import plain

FRAMES = 60


def write_annotation(path: Path, number: int, objects: int, enters: int = 0) -> None:
    """The last object is in view from frame ``enters`` on, the others always."""
    state = {"location": [0, 0, 1], "orientation": [0, 0, 0], "velocity": [0, 0, 0], "angular_velocity": None}
    motion = [
        {
            "frame_id": t,
            "objects": [
                {"object_id": i, **state, "inside_camera_view": i < objects - 1 or t >= enters} for i in range(objects)
            ],
        }
        for t in range(FRAMES)
    ]
    looks = [{"object_id": i, "color": "red", "material": None, "shape": "cube"} for i in range(objects)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({
            "scene_index": number, "video_filename": f"video_{number:05d}.mp4", "object_property": looks,
            "motion_trajectory": motion, "collision": [],
        })
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLEVRER's folders with everything that can be wrong: frame i of a video has level 4 * i."""
    root = tmp_path_factory.mktemp("clevrer") / "CLEVRER"
    levels = (4 * np.arange(FRAMES)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (FRAMES, 32, 48, 3)).copy()
    for split, number in [("train", 3), ("validation", 10_006), *(("validation", i) for i in range(10_000, 10_005))]:
        path = root / f"{split}/video_{number:05d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(str(path), frames, 25.0)
    write_annotation(root / "train/annotation_00003.json", 3, 3)
    for number, objects, enters in [(10_006, 3, 10), (10_000, 6, 0), (10_001, 7, 0), (10_002, 3, 30), (10_009, 3, 0)]:
        write_annotation(root / f"validation/annotation_{number:05d}.json", number, objects, enters)
    (root / "validation/annotation_10003.json").write_text("null")
    (root / "validation/video_10005.mp4").write_text("no video")
    (root / "questions").mkdir()
    (root / "questions/validation.json").write_text("[]")
    return root


def run_of(source: Path | str, out: Path | str, **changes: Any) -> ShardRun:
    settings = {"layout": "clevrer", "split": "test", "frames": 40, "size": 16, "fit": "center-crop"}
    return ShardRun(source=str(source), out=str(out), **{**settings, **changes})


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    """Tasks one after the other, in this process: test_shard.py has them done by Ray."""
    with plain.without_ray():
        yield


def survey(run: ShardRun) -> Survey:
    return sharding.survey(run, *sharding.find_videos(run, run.source))


def read_clips(folder: Path) -> dict[str, Clip]:
    clips = {}
    for row in pq.read_table(folder / "index.parquet").to_pylist():
        data = (folder / row["shard"]).read_bytes()
        members = {m["name"]: data[m["offset"] : m["offset"] + m["size"]] for m in row["members"]}
        clips[row["source"]] = from_sample(row["key"], members)
    return clips


def test_provides_test_split_is_made_and_its_counts_add_up(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(source / "validation", tmp_path, clips="provide", max_objects=6, filter="bicubic")
    shard(run)
    out = capsys.readouterr().out
    clips = read_clips(tmp_path / "test")
    assert {name: clip.start_frame for name, clip in clips.items()} == {"video_10000.mp4": 0, "video_10006.mp4": 10}
    assert {name: int(clip.truth["num_objects"]) for name, clip in clips.items()} == {
        "video_10000.mp4": 6,
        "video_10006.mp4": 3,
    }
    assert all(clip.truth["present"].all() for clip in clips.values())
    assert np.abs(clips["video_10006.mp4"].frames.mean(axis=(1, 2, 3)) - 4 * np.arange(10, 50)).max() < 2.5
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "test/quarantine.parquet").to_pylist()}
    assert {name: (row["stage"], row["code"]) for name, row in rows.items()} == {
        "annotation_10009.json": ("find", "no-video"),
        "video_10005.mp4": ("probe", "unreadable"),
        "video_10001.mp4": ("select", "too-many-objects"),
        "video_10002.mp4": ("select", "not-all-visible"),
        "video_10003.mp4": ("plan", "no-annotation"),
        "video_10004.mp4": ("plan", "no-annotation"),
    }
    assert rows["video_10003.mp4"]["message"] == (
        "nothing says how many objects it has: annotation_10003.json is not used: it holds a JSON NoneType, not an "
        "object with motion_trajectory"
    )
    assert rows["video_10001.mp4"]["message"] == "it has 7 objects, more than --max-objects 6"
    # 7 videos and an annotation without one; all files are annotations of these.
    assert "videos 8 = 2 read + 6 quarantined; ignored files 0; clips written 2\n" in out
    assert "note: video_10003.mp4: annotation_10003.json is not used: it holds a JSON NoneType" in out
    assert "note: video_10004.mp4: it has no annotation\n" in out
    assert "note: video_10006.mp4: annotation_10006.json lacks 3 x object_property.material, 180 x objects.ang" in out
    manifest = json.loads((tmp_path / "test/manifest.json").read_bytes())
    assert (manifest["preprocessing"]["clips"], manifest["preprocessing"]["max_objects"]) == ("provide", 6)
    assert "test" in verify(VerifyRun(path=str(tmp_path)))


def test_real_clevrer_frames_go_through_the_frame_layout(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(run_of(shared / "data/clevrer_frames", tmp_path, layout="frames", fit="squeeze", frames=20, size=64))
    assert "videos 3 = 3 read + 0 quarantined; ignored files 2; clips written 15\n" in capsys.readouterr().out
    clips = read_clips(tmp_path / "test")
    assert {name: clip.start_frame for name, clip in clips.items()} == {"0": 80, "1": 80, "2": 80}  # the last of each


def test_a_split_is_what_its_folder_holds_or_what_a_range_names(source: Path) -> None:
    found = {
        name: {video.source for video in survey(run_of(source, "/none", **changes)).videos}
        for name, changes in {
            "train": {"split": "train"},
            "val": {"split": "val"},
            "range": {"split": "test", "video_range": "10001-10002"},
        }.items()
    }
    assert found["train"] == {"train/video_00003.mp4"}
    assert len(found["val"]) == 7
    assert found["range"] == {"validation/video_10001.mp4", "validation/video_10002.mp4"}
    run = run_of(source, "/none", split="train")
    surveyed = survey(run)
    # Everything of the other split: 7 videos, 5 annotations that go with them, one that goes with none; the questions.
    assert (surveyed.ignored, surveyed.quarantined) == (14, ())


def test_a_split_that_no_video_is_of_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="none of 8 videos is of the split 'test'; there is train and val"):
        survey(run_of(source, "/none"))


def test_ddlp_takes_frames_18_to_117() -> None:
    videos = [Video("a", ("a",), frames=128), Video("b", ("b",), frames=117), Video("c", ("c",), frames=40)]
    (plan,), unfit = plan_shards(run_of("a", "b", clips="ddlp", frames=100), videos)
    assert [(part.video.source, [cut.start for cut in part.cuts]) for part in plan.parts] == [("a", [18])]
    assert [(row.source, row.stage, row.code) for row in unfit] == [
        ("b", "plan", "too-short"),
        ("c", "plan", "too-short"),
    ]
    (plan,), _ = plan_shards(run_of("a", "b", clips="ddlp", frames=20), videos[:1])
    assert [cut.start for cut in plan.parts[0].cuts] == [18, 38, 58, 78, 98]
    whole = plan_shards(run_of("a", "b", frames=20), videos[:1])[0][0].parts[0].cuts
    assert [cut.start for cut in whole] == [0, 20, 40, 60, 80, 100]


def test_what_the_settings_leave_out_is_no_unusable_share() -> None:
    videos = tuple(Video(f"v{i}", ("v",), frames=128, objects=3, visible=(0, 100 * (i % 2))) for i in range(200))
    run = run_of("a", "b", clips="provide")
    plans, left = plan_shards(run, videos)
    orphans = [sharding._quarantined(fault, "find") for fault in clevrer.find(["annotation_00001.json"]).faults]
    assert (sum(plan.clips for plan in plans), len(left), len(orphans)) == (100, 100, 1)
    surveyed = Survey("", videos, tuple(orphans), 0)
    assert sharding._refusal(run, surveyed, [*orphans, *left], 100) == ""
    broken = [sharding.Quarantined(f"v{i}", "probe", "unreadable", "x") for i in range(2)]
    assert sharding._refusal(run, surveyed, [*orphans, *broken, *left[2:]], 98).startswith("2 of 102 inputs")


def test_videos_with_damaged_annotations_count_as_unusable_where_the_number_of_objects_is_asked_for() -> None:
    videos = [Video(f"v{i}", ("v",), frames=128, objects=None if i == 5 else i, note="torn") for i in range(1, 7)]
    run = run_of("a", "b", min_objects=3, max_objects=4)
    (plan,), left = plan_shards(run, videos)
    assert [part.video.source for part in plan.parts] == ["v3", "v4"]
    assert [(row.source, row.stage, row.code) for row in left] == [
        ("v1", "select", "too-few-objects"),
        ("v2", "select", "too-few-objects"),
        ("v5", "plan", "no-annotation"),
        ("v6", "select", "too-many-objects"),
    ]
    assert sharding._excess(run, Survey("", tuple(videos), (), 0), left).startswith("1 of 3 inputs cannot be used")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "videos", "clips": "ddlp"}, "clips is for layout 'clevrer', got layout 'videos'"),
        ({"layout": "towers", "video_range": "1-2"}, "video_range is for layout 'clevrer'"),
        ({"layout": "frames", "max_objects": 3}, "max_objects is for layout 'clevrer'"),
        ({"max_objects": 0}, "max_objects must be at least 1"),
        ({"clips": "provide", "start": 5}, "leave start and stop"),
        ({"clips": "ddlp", "stop": 90}, "leave start and stop"),
        (
            {"clips": "ddlp", "frames": 101},
            "at most 100 of CLEVRER's 128 frames, and 101 frames with stride 1 span 101",
        ),
        ({"clips": "provide", "frames": 40, "stride": 4}, "40 frames with stride 4 span 157; give fewer frames or a"),
        ({"min_objects": 4, "max_objects": 3}, "min_objects 4 is more than max_objects 3"),
        ({"clips": "provide", "hop": 5}, "one clip of each video; leave hop"),
        ({"video_range": "5"}, "video_range must be FIRST-LAST"),
        ({"video_range": "9-5"}, "video_range must be FIRST-LAST"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of("a", "b", **changes)


def test_towers_are_split_by_the_seed(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"tower_{i}.mp4").touch()

    def found(**changes: Any) -> Found:
        run = run_of(tmp_path, "/none", layout="towers", **changes)
        return sharding.find_videos(run, run.source)[1]

    first, again, other = found(), found(seed=0), found(seed=7)
    assert (len(first.videos), first.ignored) == (10, 40)
    assert first == again
    assert first != other
    assert {video.source for video in first.videos} & {video.source for video in found(split="train").videos} == set()
    with pytest.raises(ValueError, match="has the splits train, test, not 'val'"):
        found(split="val")
