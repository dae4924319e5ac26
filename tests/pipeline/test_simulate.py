import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from objdyn.clips import read_video
from objdyn.questions.executor import answer
from objdyn.questions.records import from_json
from objdyn.simulators import clevrer, towers
from objdyn.simulators.rendering import renderer
from pipeline import claim, cluster, simulate
from pipeline import shard as sharding
from pipeline.config import SimulateRun

pytest.importorskip("mujoco")


@pytest.fixture(autouse=True)
def opengl() -> None:
    try:
        renderer("mujoco", clevrer.parse("size=16").view)
    except ValueError as error:
        pytest.skip(f"needs OpenGL: {error}")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run tasks in this process, and return what was run."""
    done: list[str] = []

    def one_by_one(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
        done.extend(items)
        return {i: task(item) for i, item in enumerate(items)}

    monkeypatch.setattr(sharding, "_run_tasks", one_by_one)  # Ray has its tests
    monkeypatch.setattr(cluster, "connect", lambda workers: None)
    monkeypatch.setattr(cluster, "require_shared", lambda paths: None)
    return done


def run_in(folder: Path, **settings: object) -> SimulateRun:
    return dataclasses.replace(SimulateRun(str(folder), videos=2, objects="2", height=16, questions=False), **settings)  # pyright: ignore[reportArgumentType]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_written_folder_is_clevrers_and_counts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools")
    message = simulate.simulate(run_in(tmp_path, split="val", proposals=True))
    assert message == f"2 videos in {tmp_path}/validation"
    assert sorted(contents(tmp_path)) == [
        "validation/" + name
        for name in (
            "annotation_10000-11000/annotation_10000.json",
            "annotation_10000-11000/annotation_10001.json",
            "derender_proposals/proposal_10000.json",
            "derender_proposals/proposal_10001.json",
            "mask_10000-11000/mask_10000.npy.zst",
            "mask_10000-11000/mask_10001.npy.zst",
            "scene_10000-11000/scene_10000.json",
            "scene_10000-11000/scene_10001.json",
            "video_10000-11000/video_10000.mp4",
            "video_10000-11000/video_10001.mp4",
        )
    ]
    faults: list[str] = []
    worlds = list(simulate.read_worlds(str(tmp_path), "val", faults))
    assert not faults
    assert [world.scene_index for world in worlds] == [10_000, 10_001]
    collisions = sum(event.kind == "collision" and event.frame < 128 for w in worlds for event in w.history.events)
    out = sum(len(world.without) for world in worlds)
    told = f"videos 2 = 2 made + 0 there already; objects 4, of which {out} can be taken out; collisions {collisions}\n"
    assert capsys.readouterr().out == told


def test_questions_about_all_videos_are_written_in_the_same_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in(tmp_path, videos=1, objects="4", questions=True)
    simulate.simulate(run)
    message = simulate.simulate(dataclasses.replace(run, first=1))
    path = tmp_path / "questions" / "train.json"
    read = from_json(json.loads(path.read_bytes()), path.name)
    assert not read.faults
    assert [video.scene_index for video in read.videos] == [0, 1]
    assert f"{read.found} questions about 2 videos" in message
    assert "descriptive count, " in capsys.readouterr().out
    for video, world in zip(read.videos, simulate.read_worlds(str(tmp_path), "train", []), strict=True):
        for question in video.questions:
            if question.type == "descriptive":
                assert answer(question.program or (), world) == question.answer


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0.11 with numpy 2
def test_files_show_what_the_scene_file_says(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    simulate.simulate(run_in(tmp_path, videos=1, first=7, height=64, proposals=True))
    (world,) = simulate.read_worlds(str(tmp_path), "train", [])
    scene = clevrer.draw_scene(clevrer.video_seed(0, "train", 7), (2, 2))
    imagined = clevrer.imagine(scene, 7)
    assert imagined is not None
    assert world.properties == imagined[0].properties
    assert world.history == imagined[0].history
    assert world.without == imagined[0].without
    painter = renderer("mujoco", dataclasses.replace(clevrer.VIEW, width=96, height=64))
    pictures = [painter.draw(clevrer.solids(scene, imagined[1], frame)) for frame in range(128)]
    files = contents(tmp_path / "train")
    packed = files["mask_00000-01000/mask_00007.npy.zst"]
    masks = np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(packed)), allow_pickle=False)
    np.testing.assert_array_equal(masks, [picture.mask for picture in pictures])
    video = read_video(io.BytesIO(files["video_00000-01000/video_00007.mp4"]))
    error = np.square(video.frames - np.stack([p.frame for p in pictures]).astype(np.float64)).mean()
    assert video.fps == 25
    assert 10 * np.log10(255**2 / error) > 35
    proposals = json.loads(files["derender_proposals/proposal_00007.json"])["frames"]
    assert len(proposals) == 128
    for frame in (0, 60, 127):
        for found in proposals[frame]["objects"]:
            number = world.properties.index((found["color"], found["material"], found["shape"]))
            np.testing.assert_array_equal(coco.decode(found["mask"]) == 1, masks[frame] == number + 1)


def test_a_job_that_stopped_goes_on(tmp_path: Path, without_ray: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    simulate.simulate(run_in(tmp_path, videos=1))
    first = contents(tmp_path)
    simulate.simulate(run_in(tmp_path))
    assert without_ray == ["0", "1"]
    assert "videos 2 = 1 made + 1 there already" in capsys.readouterr().out
    whole = contents(tmp_path)
    assert first.items() <= whole.items()
    os.remove(tmp_path / "train/video_00000-01000/video_00001.mp4")
    os.remove(tmp_path / "train/scene_00000-01000/scene_00000.json")
    simulate.simulate(run_in(tmp_path))
    assert without_ray == ["0", "1", "0", "1"]
    assert contents(tmp_path) == whole


def test_two_jobs_do_not_make_the_same_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        claim.hold(str(tmp_path / "train"), "another"),
        pytest.raises(claim.HeldError, match="train is in use by another"),
    ):
        simulate.simulate(run_in(tmp_path))
    assert not os.listdir(tmp_path)

    def lose(task: object, items: object, label: str) -> dict[int, str]:
        for path in (tmp_path / "train").iterdir():
            path.unlink()
        return {}

    monkeypatch.setattr(sharding, "_run_tasks", lose)
    with pytest.raises(claim.LostError, match="its claim is gone"):
        simulate.simulate(run_in(tmp_path))


def test_videos_of_other_settings_are_not_overwritten(tmp_path: Path) -> None:
    simulate.simulate(run_in(tmp_path, videos=1))
    before = contents(tmp_path)
    for change in ({"objects": "3"}, {"seed": 1}, {"height": 32}, {"scene": "towers"}):
        with pytest.raises(ValueError, match="made with other settings"):
            simulate.simulate(run_in(tmp_path, **change))
    assert contents(tmp_path) == before


def test_worlds_that_cannot_be_read_are_named_and_left_out(tmp_path: Path) -> None:
    simulate.simulate(run_in(tmp_path))
    (tmp_path / "train/annotation_00000-01000/annotation_00000.json").unlink()
    scene = tmp_path / "train/scene_00000-01000/scene_00001.json"
    scene.write_text(scene.read_text()[:-20])
    faults: list[str] = []
    assert list(simulate.read_worlds(str(tmp_path), "train", faults)) == []
    assert [fault.partition(":")[0] for fault in faults] == [
        "scene_00000-01000/scene_00000.json",
        "scene_00000-01000/scene_00001.json",
    ]


def test_towers_have_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate.simulate(run_in(tmp_path, scene="towers", objects="", videos=4))
    wanted = [towers.simulate(towers.draw_scene(clevrer.video_seed(0, "train", index))).stands for index in range(4)]
    scenes = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("scene_*.json"))]
    assert [scene["label"] for scene in scenes] == ["stand" if stands else "fall" for stands in wanted]
    assert f"{4 - sum(wanted)} towers fall, {sum(wanted)} stand" in capsys.readouterr().out
    assert len(list(simulate.read_worlds(str(tmp_path), "train", []))) == 4


@pytest.mark.parametrize(
    "settings",
    [{"videos": 0}, {"first": 99_999}, {"objects": "2-9"}, {"objects": "x"}, {"height": 33}, {"seed": -1},
     {"scene": "towers", "objects": "5"}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        run_in(Path("out"), **settings)
