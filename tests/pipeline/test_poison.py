"""Videos that kill, hang or bloat the process that reads them: planted by failpoints, found, and quarantined alone."""

import dataclasses
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import cluster, failpoints, isolate
from pipeline import shard as sharding
from pipeline.config import ShardRun
from pipeline.quickstart import write_mp4, write_videos
from pipeline.shard import shard

RUN_TASKS = sharding._run_tasks
BOUND = 240.0
"""Seconds that a dataset with poison in it may take on a machine that is busy; a quiet one needs a tenth."""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def plant(monkeypatch: pytest.MonkeyPatch, rules: str, folder: str = "") -> None:
    """Arm failpoints in the processes that are started from here."""
    monkeypatch.setenv(failpoints.VARIABLE, rules)
    monkeypatch.setenv(failpoints.FOLDER, folder)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do tasks here, and lose those on which a worker would die: ``probe bad.mp4`` loses bad.mp4 when it is probed."""
    losses: list[str] = []

    def run_tasks(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
        if label.endswith("alone"):
            with ThreadPoolExecutor(2) as pool:
                return dict(enumerate(pool.map(task, items)))
        lost = {loss.split()[1] for loss in losses if loss.split()[0] == label}
        return {i: task(item) for i, item in enumerate(items) if not any(name in item for name in lost)}

    monkeypatch.setattr(sharding, "_run_tasks", run_tasks)
    monkeypatch.setattr(cluster, "connect", lambda num_cpus: None)
    monkeypatch.setattr(cluster, "require_shared", lambda paths: None)
    return losses


def run_of(source: Path, out: Path, **changes: object) -> ShardRun:
    run = ShardRun(
        source=str(source),
        out=str(out),
        frames=5,
        size=16,
        clips_per_shard=4,
        max_quarantined=1.0,
        stall_seconds=2.0,
        max_memory_gb=0.3,
    )
    return dataclasses.replace(run, **changes)  # pyright: ignore[reportArgumentType]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def clips(folder: Path) -> dict[tuple[str, int], tuple[str, list[bytes]]]:
    """Key, and the bytes of every member, of each clip of a dataset by its source and first frame."""
    found = {}
    for row in pq.read_table(folder / "index.parquet").to_pylist():
        data = (folder / row["shard"]).read_bytes()
        members = [data[each["offset"] : each["offset"] + each["size"]] for each in row["members"]]
        found[row["source"], row["start_frame"]] = (row["key"], members)
    return found


def quarantine(folder: Path) -> dict[str, tuple[str, str, str]]:
    rows = pq.read_table(folder / "quarantine.parquet").to_pylist()
    return {row["source"]: (row["stage"], row["code"], row["message"]) for row in rows}


def check_neighbours(good: Path, folder: Path, names: Sequence[str]) -> None:
    """Compare a dataset with one of its good videos alone; keys count the videos, the bad ones too."""
    alone, found = clips(good), clips(folder)
    assert found.keys() == alone.keys()
    for (source, start), (key, members) in found.items():
        assert members == alone[source, start][1]
        assert key.startswith(f"train-v{names.index(source):05d}-c")


def write_damaged(source: Path, template: bytes) -> None:
    (source / "cut.mp4").write_bytes(template[: len(template) // 2])
    (source / "text.mp4").write_text("no video")


def answer_here(
    monkeypatch: pytest.MonkeyPatch,
    deaths: Callable[[str], bool],
    others: Callable[[str], Callable[..., str] | None] = lambda what: None,
) -> list[str]:
    """Let children be this process, but those that ``deaths`` names; what is asked is recorded."""
    asked = []

    def ask(run: dict[str, object], task: str, root: str, folder: str, item: str) -> str:
        request = json.loads(item)
        what = f"{task} {request['plan'][0]}" if task == "build" else f"{task} {request[0]['source']}"
        asked.append(what)
        if other := others(what):
            return other(run, task, root, folder, item)
        if deaths(what):
            return json.dumps({"fault": ["crash", "the decoder's process died of SIGSEGV"]})
        run_again = ShardRun(**run)  # pyright: ignore[reportArgumentType]
        return json.dumps({"result": sharding.ALONE[task](run_again, root, folder, item)})

    monkeypatch.setattr(isolate, "ask_child", ask)
    return asked


def test_ray_loses_no_good_clip_to_poison(
    tmp_path: Path,
    ray_local: None,
    without_ray: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, good = tmp_path / "videos", tmp_path / "good"
    for folder in (source, good):
        write_videos(str(folder), "train", 3, 24)
    template = (good / "train-000000.mp4").read_bytes()
    for name in ("crasher", "sleeper", "glutton"):
        (source / f"{name}.mp4").write_bytes(template)
    write_damaged(source, template)
    rules = "decode:crasher=kill; decode:sleeper=hang; decode:glutton=hog"

    def run_tasks(task: Callable[[str], str], items: Sequence[str], label: str) -> dict[int, str]:
        def armed(item: str) -> str:  # Ray's workers have the environment of the session's start
            os.environ[failpoints.VARIABLE] = rules
            failpoints.arm(rules)
            try:
                return task(item)
            finally:
                failpoints.arm("")
                del os.environ[failpoints.VARIABLE]

        return RUN_TASKS(armed, items, label)

    with monkeypatch.context() as patched:
        patched.setattr(sharding, "_run_tasks", run_tasks)
        begin = time.monotonic()
        shard(run_of(source, tmp_path / "data"))
        assert time.monotonic() - begin < BOUND
    shard(run_of(good, tmp_path / "expected"))
    printed = capsys.readouterr().out
    assert "videos 8 = 3 read + 5 quarantined; ignored files 0; clips written 12\n" in printed
    assert quarantine(tmp_path / "data/train") == {
        "crasher.mp4": (
            "probe",
            "crash",
            "the decoder's process died of SIGKILL, as the kernel does when memory runs out",
        ),
        "sleeper.mp4": ("probe", "hang", "the decoder gave no frame for 2 s"),
        "glutton.mp4": ("probe", "memory", "reading it takes more than 0.3 GB of memory"),
        "cut.mp4": ("probe", "unreadable", "FFmpeg cannot read the video: Invalid data found when processing input"),
        "text.mp4": ("probe", "unreadable", "FFmpeg cannot read the video: Invalid data found when processing input"),
    }
    check_neighbours(tmp_path / "expected/train", tmp_path / "data/train", sorted(os.listdir(source)))


def test_real_videos_survive_poison_that_strikes_while_shards_are_built(
    shared: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, good = tmp_path / "videos", tmp_path / "good"
    folder = shared / "data/physion_dominoes"
    for where in (source, good):
        where.mkdir()
        for name in ("0003_img.mp4", "0005_img.mp4"):
            (where / name).write_bytes((folder / name).read_bytes())
    (source / "0004_poison.mp4").write_bytes((folder / "0004_img.mp4").read_bytes())
    write_damaged(source, (folder / "0000_img.mp4").read_bytes())
    plant(monkeypatch, "decode:build 0004_poison=kill")
    without_ray.append("build 0004_poison.mp4")
    ask = isolate.ask_child
    answer_here(monkeypatch, lambda *_: False, lambda what: ask if what == "read 0004_poison.mp4" else None)
    run = run_of(source, tmp_path / "data", frames=20, clips_per_shard=100)
    begin = time.monotonic()
    shard(run)
    assert time.monotonic() - begin < BOUND
    shard(run_of(good, tmp_path / "expected", frames=20, clips_per_shard=100))
    data = tmp_path / "data/train"
    assert {name: row[:2] for name, row in quarantine(data).items()} == {
        "0004_poison.mp4": ("build", "crash"),
        "cut.mp4": ("probe", "unreadable"),
        "text.mp4": ("probe", "unreadable"),
    }
    assert json.loads((data / "manifest.json").read_bytes())["balance"]["lost"] == 8
    check_neighbours(tmp_path / "expected/train", data, sorted(os.listdir(source)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Videos a.mp4, poison.mp4 and z.mp4 of 10 frames."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for level, name in enumerate(("a", "poison", "z")):
        write_mp4(str(folder / f"{name}.mp4"), np.full((10, 16, 16, 3), 50 * level, np.uint8), 25.0)
    return folder


def test_a_tar_that_kills_its_reader_is_one_row(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("good", "poison"):
        with tarfile.open(tars / f"{name}.tar", "w") as tar:
            tar.add(source / "a.mp4", "a.mp4")
    plant(monkeypatch, "decode:scan poison=hang")
    without_ray.append("scan poison.tar")
    shard(run_of(tars, tmp_path / "data", layout="webdataset"))
    assert quarantine(tmp_path / "data/train") == {
        "poison.tar": ("scan", "hang", "the decoder gave no frame for 2 s"),
    }
    assert [source for source, _ in clips(tmp_path / "data/train")] == ["good.tar/a.mp4"] * 2


@pytest.mark.parametrize(
    "gone", [[], ["shard-00000.tar"], ["shard-00001.tar", "index.parquet"], ["quarantine.parquet"]]
)
def test_a_rerun_with_poison_changes_nothing(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch, gone: list[str]
) -> None:
    asked = answer_here(monkeypatch, lambda what: what == "read poison.mp4")
    without_ray.append("build poison.mp4")
    run = run_of(source, tmp_path / "data", clips_per_shard=3)
    shard(run)
    folder = tmp_path / "data/train"
    before = files(folder)
    # Shards (a0 a1 poison0) and (poison1 z0 z1): each of the three videos is read alone for each shard it is in.
    assert sorted(asked) == sorted(
        ["read a.mp4", "read poison.mp4", "read poison.mp4", "read z.mp4", "build 0", "build 1"]
    )
    assert list(clips(folder)) == [("a.mp4", 0), ("a.mp4", 5), ("z.mp4", 0), ("z.mp4", 5)]
    rows = pq.read_table(folder / "quarantine.parquet").to_pylist()
    assert [(row["source"], row["stage"], row["code"]) for row in rows] == [("poison.mp4", "build", "crash")] * 2
    for name in gone:
        (folder / name).unlink()
    shard(run)
    assert files(folder) == before


def test_a_shard_that_dies_without_a_guilty_video_ends_the_job(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer_here(monkeypatch, lambda what: what == "build 0")
    without_ray.append("build poison.mp4")
    with pytest.raises(
        ValueError, match=r"building shard 0 ended its process again and again \(.*SIGSEGV.*a\.mp4, poison\.mp4, z\.mp4"
    ):
        shard(run_of(source, tmp_path / "data", clips_per_shard=100))
    assert asked.count("build 0") == 2
    assert not (tmp_path / "data/train/manifest.json").exists()


def test_a_shard_that_dies_once_more_is_built_in_the_end(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    asked = answer_here(monkeypatch, lambda what: what == "build 0" and asked.count(what) == 1)
    without_ray.append("build poison.mp4")
    shard(run_of(source, tmp_path / "data", clips_per_shard=100))
    assert len(clips(tmp_path / "data/train")) == 6


def test_what_fails_in_a_child_for_another_reason_is_not_blamed_on_a_video(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray.append("probe poison.mp4")
    answer = json.dumps({"error": "OSError: poison.mp4 in the source cannot be read (refused)"})
    monkeypatch.setattr(isolate, "ask_child", lambda *_: answer)
    with pytest.raises(ValueError, match=r"probe failed: OSError: poison\.mp4 in the source cannot be read"):
        shard(run_of(source, tmp_path / "data"))


def test_a_worker_that_is_lost_while_it_waits_for_a_child_ends_the_job(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sharding._run_tasks
    without_ray.append("probe poison.mp4")
    monkeypatch.setattr(
        sharding, "_run_tasks", lambda task, items, label: {} if "alone" in label else plain(task, items, label)
    )
    with pytest.raises(ValueError, match="the machine may be out of memory"):
        shard(run_of(source, tmp_path / "data"))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_frames": 9}, "too-long"),
        ({"max_pixels": 255}, "too-large"),
        ({"max_file_gb": 1e-6}, "too-large"),
        ({"max_cpu_seconds": 1e-9}, "too-slow"),
    ],
)
def test_limits_of_a_run_reach_every_video(
    source: Path,
    tmp_path: Path,
    without_ray: list[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, float],
    code: str,
) -> None:
    monkeypatch.setattr(isolate, "frame_came", lambda: True)
    with pytest.raises(ValueError, match=f"gives no clip: a.mp4 .{code}: "):
        shard(run_of(source, tmp_path / "data", **changes))
    assert {row[1] for row in quarantine(tmp_path / "data/train").values()} == {code}


def test_any_error_of_a_reader_is_a_row_but_storage_and_memory_are_not(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = sharding.LAYOUTS["videos"]

    def probe(video, open_file, limits):
        if video.source == "poison.mp4":
            raise ZeroDivisionError("rate 0")
        return layout.probe(video, open_file, limits)

    monkeypatch.setitem(sharding.LAYOUTS, "videos", layout._replace(probe=probe))
    shard(run_of(source, tmp_path / "data"))
    assert quarantine(tmp_path / "data/train") == {
        "poison.mp4": ("probe", "unreadable", "ZeroDivisionError: rate 0"),
    }


def test_damage_seen_while_memory_was_short_is_left_to_another_process(
    source: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "poison.mp4").write_text("no video")
    with monkeypatch.context() as patched:
        patched.setattr(isolate, "memory_is_short", lambda: True)
        with pytest.raises(MemoryError):  # which _run_tasks takes for the loss of the item
            shard(run_of(source, tmp_path / "data"))
    shard(run_of(source, tmp_path / "data"))
    assert quarantine(tmp_path / "data/train")["poison.mp4"][1] == "unreadable"
