import base64
import dataclasses
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from objdyn.clips import from_sample
from pipeline import shard as sharding
from pipeline import store
from pipeline.config import ShardRun
from pipeline.quickstart import write_mp4
from pipeline.shard import Quarantined, Survey, build_shard, plan_shards, shard
from tests import plain

pytestmark = pytest.mark.usefixtures("ray_local")


def write_source(root: Path) -> Path:
    """Write videos of 30, 45 and 3 frames, a text file named .mp4, and a note; frame i of a video has level 5 * i."""
    root.mkdir()
    for name, length in [("a.mp4", 30), ("b.mp4", 45), ("short.mp4", 3)]:
        levels = (5 * np.arange(length)).astype(np.uint8)
        write_mp4(str(root / name), np.broadcast_to(levels[:, None, None, None], (length, 32, 48, 3)).copy(), 25.0)
    (root / "text.mp4").write_text("no video")
    (root / "notes.txt").write_text("a note")
    return root


def run_of(source: Path | str, out: Path | str, **changes: object) -> ShardRun:
    run = ShardRun(source=str(source), out=str(out), frames=5, stride=2, size=16, clips_per_shard=3)
    return dataclasses.replace(run, **changes)  # pyright: ignore[reportArgumentType]


def survey(run: ShardRun) -> Survey:
    return sharding.survey(run, *sharding.find_videos(run, run.source))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("shard") / "clips")


@pytest.fixture(scope="module")
def dataset(source: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    out = tmp_path_factory.mktemp("shard") / "data"
    shard(run_of(source, out))
    return out / "train"


def test_counts_balance_and_are_printed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = shard(run_of(source, tmp_path))
    out = capsys.readouterr().out
    # 30 frames hold clips at 0, 10, 20; 45 frames hold those and one at 30 (span 9).
    assert "videos 4 = 2 read + 2 quarantined; ignored files 1; clips written 7\n" in out
    assert "warning: quarantined short.mp4 (plan, too-short): 3 frames" in out
    assert "warning: 2 of 4 inputs cannot be used" in out
    assert message.endswith(str(tmp_path / "train"))


def test_quarantine_says_what_was_left_out_and_why(dataset: Path) -> None:
    rows = pq.read_table(dataset / "quarantine.parquet").to_pylist()
    assert [(row["source"], row["stage"], row["code"]) for row in rows] == [
        ("text.mp4", "probe", "unreadable"),
        ("short.mp4", "plan", "too-short"),
    ]
    assert all(row["message"] for row in rows)


def test_manifest_describes_every_file_and_nothing_of_this_machine(dataset: Path, source: Path) -> None:
    found = files(dataset)
    manifest = json.loads(found["manifest.json"])
    assert [entry["samples"] for entry in manifest["shards"]] == [3, 3, 1]
    listed = {entry["name"]: entry for entry in manifest["shards"]}
    listed |= {"index.parquet": manifest["index"], "quarantine.parquet": manifest["quarantine"]}
    assert set(listed) | {"manifest.json"} == set(found)
    for name, entry in listed.items():
        assert (entry["bytes"], entry["sha256"]) == (len(found[name]), hashlib.sha256(found[name]).hexdigest())
    assert (manifest["schema"], manifest["kind"], manifest["name"], manifest["split"]) == (
        1,
        "dataset",
        "clips",
        "train",
    )
    assert [manifest[name] for name in ("frames", "height", "width", "channels", "clips")] == [5, 16, 16, 3, 7]
    assert all(str(source.parent).encode() not in data for data in found.values())


def test_index_leads_to_every_member(dataset: Path) -> None:
    index = pq.ParquetFile(dataset / "index.parquet")
    assert index.num_row_groups == 3
    keys = []
    for group in range(3):
        for row in index.read_row_group(group).to_pylist():
            assert row["shard"] == f"shard-{group:05d}.tar"
            data = (dataset / row["shard"]).read_bytes()
            members = {m["name"]: data[m["offset"] : m["offset"] + m["size"]] for m in row["members"]}
            clip = from_sample(row["key"], members)
            assert (clip.source, clip.start_frame, clip.stride, clip.fps) == (
                row["source"],
                row["start_frame"],
                row["stride"],
                row["fps"],
            )
            levels = 5 * (clip.start_frame + 2 * np.arange(5))
            assert np.abs(clip.frames.mean(axis=(1, 2, 3)) - levels).max() < 2.5
            keys.append(row["key"])
    assert keys == [f"train-v00000-c{i:04d}" for i in range(3)] + [f"train-v00001-c{i:04d}" for i in range(4)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves closing its file to the collector
def test_tars_are_readable_by_webdataset_and_belong_to_nobody(dataset: Path) -> None:
    from webdataset.compat import WebDataset

    samples = list(WebDataset(str(dataset / "shard-00001.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"train-v00001-c{i:04d}" for i in range(3)]
    assert json.loads(samples[0]["json"])["source"] == "b.mp4"
    with tarfile.open(dataset / "shard-00001.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "objdyn", "objdyn")}


def test_every_run_gives_the_same_bytes_with_ray_and_without(
    source: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(run_of(source, tmp_path / "again"))
    assert files(tmp_path / "again/train") == files(dataset)

    def one_by_one(task, items, label):
        return dict(reversed([(i, task(item)) for i, item in enumerate(items)]))

    monkeypatch.setattr(sharding, "_run_tasks", one_by_one)
    shard(run_of(source, tmp_path / "plain"))
    assert files(tmp_path / "plain/train") == files(dataset)


def test_a_rerun_mends_what_is_missing_or_damaged(source: Path, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for name, data in files(dataset).items():
        (folder / name).write_bytes(data)
    untouched = os.stat(folder / "shard-00002.tar").st_mtime_ns
    (folder / "shard-00000.tar").unlink()
    (folder / "shard-00001.tar").write_bytes(b"damaged")
    shard(run_of(source, tmp_path))
    assert files(folder) == files(dataset)
    assert os.stat(folder / "shard-00002.tar").st_mtime_ns == untouched


def test_another_dataset_in_the_folder_is_refused_and_kept(source: Path, dataset: Path, tmp_path: Path) -> None:
    before = files(dataset)
    with pytest.raises(ValueError, match=r"already holds another dataset \(stride 2 there, 3 now"):
        shard(run_of(source, dataset.parent, stride=3))
    changed = tmp_path / "clips"
    changed.mkdir()
    (changed / "a.mp4").write_bytes((source / "b.mp4").read_bytes())
    with pytest.raises(ValueError, match="of other videos than the source holds now"):
        shard(run_of(changed, dataset.parent))
    (changed / "b.mp4").write_bytes((source / "b.mp4").read_bytes())
    (changed / "a.mp4").write_bytes((source / "a.mp4").read_bytes())
    with pytest.raises(ValueError, match="of other content"):
        shard(run_of(changed, dataset.parent))
    assert files(dataset) == before


def test_a_long_video_spans_shards(source: Path) -> None:
    videos = survey(run_of(source, "/none", limit=2)).videos
    plans, _ = plan_shards(run_of(source, "/none"), videos)
    assert [[(part.video.source, len(part.cuts)) for part in plan.parts] for plan in plans] == [
        [("a.mp4", 3)],
        [("b.mp4", 3)],
        [("b.mp4", 1)],
    ]


def test_a_video_that_fails_while_building_is_quarantined_with_its_clips_lost(source: Path, tmp_path: Path) -> None:
    run = run_of(source, tmp_path, clips_per_shard=10)
    surveyed = survey(run)
    grown = [dataclasses.replace(video, frames=35 * bool(video.frames)) for video in surveyed.videos[:2]]
    (plan,), _ = plan_shards(run, grown)
    assert plan.clips == 6
    item = json.dumps({"plan": plan, "sha256": None}, default=dataclasses.asdict)
    built = json.loads(build_shard(run, str(source), str(tmp_path / "train"), item))
    assert built["clips"] == 6
    stretched = [dataclasses.replace(grown[0], frames=55), grown[1]]
    (plan,), _ = plan_shards(run, stretched)
    item = json.dumps({"plan": plan, "sha256": None}, default=dataclasses.asdict)
    built = json.loads(build_shard(run, str(source), str(tmp_path / "train"), item))
    assert [row[:3] for row in built["quarantined"]] == [["a.mp4", "build", "changed"]]
    rows = pa.ipc.open_stream(base64.b64decode(built["index"])).read_all()
    assert rows["key"].to_pylist()[-3:] == [f"train-v00001-c{i:04d}" for i in range(3)]


def test_too_large_a_quarantined_share_fails_from_100_inputs_on(source: Path, tmp_path: Path) -> None:
    run = run_of(source, tmp_path, max_quarantined=0.01)
    videos = survey(run_of(source, tmp_path, limit=1)).videos
    for inputs, unusable, fails in [(99, 2, False), (100, 2, True), (100, 1, False), (200, 2, False)]:
        rows = [Quarantined(f"bad{i}", "probe", "unreadable", "x") for i in range(unusable)]
        good = tuple(dataclasses.replace(videos[0], source=str(i)) for i in range(inputs - unusable))
        surveyed = Survey(str(source), good, tuple(rows), 0)
        reason = sharding._refusal(run, surveyed, rows, 1)
        assert bool(reason) == fails
        assert bool(sharding._excess(run, surveyed, rows)) == (unusable > 0.01 * inputs)
        if fails:
            assert reason.startswith("2 of 100 inputs cannot be used, more than --max-quarantined 0.01: bad0")


def test_items_whose_worker_dies_twice_or_lacks_memory_are_done_in_another_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(item: str) -> str:
        if item in ("crash", "hog"):
            with (tmp_path / item).open("a") as file:
                file.write("x")
        if item == "crash":
            os._exit(1)
        if item == "hog":
            raise MemoryError
        return item

    items = ["good", "crash", "fine", "hog"]
    results = sharding._run_all(fail, items, "probe", lambda lost: [f"alone {item}" for item in lost])
    assert results == ["good", "alone crash", "fine", "alone hog"]
    assert "died twice, or ran out of memory, on 2 of 4 tasks" in capsys.readouterr().out
    assert ((tmp_path / "crash").read_text(), (tmp_path / "hog").read_text()) == ("xx", "x")


def test_of_short_items_that_share_a_task_those_around_a_death_are_done_in_another_way() -> None:
    def fail(item: str) -> str:
        if item == "50":
            os._exit(1)
        return item

    items, alone = [str(n) for n in range(100)], []
    per_task = -(-100 // sharding._num_tasks("probe", 100))
    results = sharding._run_all(fail, items, "probe", lambda lost: [alone.append(item) or f"({item})" for item in lost])
    assert 1 < per_task == len(alone)
    assert "50" in alone
    assert results == [f"({item})" if item in alone else item for item in items]


def test_a_retry_of_short_items_that_share_a_task_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(item: str) -> str:
        if item == "50" and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return item

    items = [str(n) for n in range(100)]
    assert sharding._num_tasks("probe", 100) < 100
    assert sharding._run_all(fail, items, "probe", list) == items
    assert "  1 retries" in capsys.readouterr().err.splitlines()[-1]


def test_a_failing_task_says_why() -> None:
    def fail(item: str) -> str:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"build failed: OSError.*No space left"):
        sharding._run_all(fail, ["{}"], "build", list)


def test_webdataset_tars_give_the_same_clips_as_their_videos(source: Path, dataset: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "videos.tar", "w") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name)
    shard(run_of(tars, tmp_path / "data", layout="webdataset", clips_per_shard=100))
    manifest = json.loads((tmp_path / "data/train/manifest.json").read_bytes())
    assert manifest["balance"] == {
        "videos": 4,
        "read": 2,
        "quarantined": 2,
        "ignored": 1,
        "noted": 0,
        "clips": 7,
        "lost": 0,
    }
    ours, theirs = (pq.read_table(d / "index.parquet").to_pylist() for d in (tmp_path / "data/train", dataset))
    assert [row["source"] for row in ours] == [f"videos.tar/{row['source']}" for row in theirs]
    assert _frames(tmp_path / "data/train", ours) == _frames(dataset, theirs)


def _frames(folder: Path, rows: list[dict]) -> list[bytes]:
    found = []
    for row in rows:
        data = (folder / row["shard"]).read_bytes()
        member = next(m for m in row["members"] if m["name"] == "frames.npy.zst")
        found.append(data[member["offset"] : member["offset"] + member["size"]])
    return found


def test_simulated_episodes_keep_their_truth(tmp_path: Path) -> None:
    shard(run_of("sim:balls-interaction", tmp_path, split="val", frames=20, limit=2, size=64))
    from objdyn.simulators import SIMULATORS

    episode = SIMULATORS["balls-interaction"].episodes("val", 1, 1, None)[0]
    rows = pq.read_table(tmp_path / "val/index.parquet").to_pylist()
    assert [row["start_frame"] for row in rows] == [0, 40, 0, 40]
    row = rows[3]
    data = (tmp_path / "val" / row["shard"]).read_bytes()
    clip = from_sample(row["key"], {m["name"]: data[m["offset"] : m["offset"] + m["size"]] for m in row["members"]})
    expected = episode.clip(40, 39)
    assert np.array_equal(clip.frames, expected.frames[::2])
    assert np.array_equal(clip.truth["positions"], expected.truth["positions"][::2])
    assert clip.source == "sim:balls-interaction/val/1"


def test_a_url_serves_as_source_and_target(
    source: Path, dataset: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in source.iterdir():
        store.publish(store.join(s3_folder, "clips", path.name), path.read_bytes())
    monkeypatch.setattr(sharding, "_run_tasks", plain.run_tasks)  # the session's Ray workers lack this server's address
    shard(run_of(f"{s3_folder}/clips", f"{s3_folder}/data"))
    for name, data in files(dataset).items():
        assert store.read_bytes(store.join(s3_folder, "data/train", name)) == data


@pytest.mark.parametrize("layout", ["frames", "gswm-hdf5"])
def test_real_data_balance(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    name, balance = {
        "frames": ("phyre_frames", "videos 2 = 2 read + 0 quarantined; ignored files 3; clips written 4\n"),
        "gswm-hdf5": ("balls_interaction", "videos 2 = 2 read + 0 quarantined; ignored files 1; clips written 4\n"),
    }[layout]
    shard(run_of(shared / "data" / name, tmp_path, layout=layout, limit=2, frames=25))
    assert balance in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("missing", {}, "does not exist"),
        ("empty", {}, "is empty; give a folder with videos"),
        ("images", {}, r"has no files \.mp4.* among its 2 files; correct the path or --layout"),
        (
            "images",
            {"layout": "frames", "crop": "0,0,99,9"},
            r"gives no clip: folder \(bad-geometry: crop 0,0,99,9 leaves.*all are listed in .*/quarantine\.parquet",
        ),
        ("sim:nothing", {}, "choose one of sim:balls-interaction"),
        ("sim:balls-interaction", {"size": 32}, "give --size 64"),
        ("sim:balls-interaction", {"size": 64, "split": "night"}, "has the splits train, val, test"),
    ],
)
def test_useless_sources_are_refused(tmp_path: Path, source: str, changes: dict[str, object], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images/folder").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"images/folder/{i}.png")
    where = source if source.startswith("sim:") else str(tmp_path / source)
    with pytest.raises(ValueError, match=message):
        shard(run_of(where, tmp_path / "out", **changes))
    assert not (tmp_path / "out/train/manifest.json").exists()
    assert (tmp_path / "out").exists() == message.startswith("gives no clip")


def test_output_inside_the_source_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="lies inside --source"):
        shard(run_of(source, source / "data"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "1,2,3"}, "x0,y0,x1,y1"),
        ({"crop": "5,0,2,9"}, "x0 < x1"),
        ({"split": "a/b"}, "split must be a name of lower-case letters"),
        ({"split": "Val.2"}, "split must be a name of lower-case letters"),
        ({"frames": 0}, "frames"),
        ({"max_quarantined": 2.0}, "max_quarantined"),
        ({"clips_per_shard": 0}, "clips_per_shard"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
        ({"max_pixels": -5}, "max_pixels"),
        ({"stall_seconds": 0.0}, "stall_seconds must be more than 0"),
        ({"max_memory_gb": float("nan")}, "max_memory_gb"),
        ({"max_memory_gb": 0.1}, "max_memory_gb must be at least 0.2"),
        ({"max_file_gb": -1.0}, "max_file_gb"),
        ({"max_cpu_seconds": float("inf")}, "max_cpu_seconds"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of("a", "b", **changes)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.mp4").touch()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "source/linked-again").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "source")
    assert sharding.list_source(str(tmp_path / "source")) == (str(tmp_path / "source"), ["linked/a.mp4"])


def test_parquet_is_the_same_for_the_same_rows() -> None:
    rows = [{"source": "a", "stage": "probe", "code": "x", "message": "y"}]
    table = pa.Table.from_pylist(rows, schema=sharding.QUARANTINE_SCHEMA)
    first, second = (sharding._parquet(sharding.QUARANTINE_SCHEMA, [table]) for _ in range(2))
    assert first == second
    assert pq.read_table(io.BytesIO(first)).to_pylist() == rows


def test_rows_that_travelled_give_the_index_that_rows_in_memory_give() -> None:
    """As dicts, which the driver held of every shard once, and as what workers send now."""

    def row(shard: int, i: int) -> dict[str, Any]:
        names = ("frames.npy.zst", "json", "segmentation.npy")[: 2 + i % 2]
        members = [{"name": name, "offset": 512 + 7 * i, "size": 44_000 + i} for name in names]
        place = {"shard": f"shard-{shard:05d}.tar", "key": f"train-v{shard:05d}-c{i:04d}", "members": members}
        return place | {"source": f"a/{i}.mp4", "start_frame": 20 * i, "stride": 2, "frames": 20, "fps": 25.0 + i / 3}

    groups = [[row(shard, i) for i in range(50 + shard)] for shard in range(3)]
    plain = io.BytesIO()
    with pq.ParquetWriter(plain, sharding.INDEX_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for rows in groups:
            table = pa.Table.from_pylist(rows, schema=sharding.INDEX_SCHEMA)
            writer.write_table(table, row_group_size=len(rows))
    streams = [sharding._index(sharding._table(sharding.INDEX_SCHEMA, rows)) for rows in groups]
    built = [sharding.Built("x", 1, "", len(rows), s) for rows, s in zip(groups, streams, strict=True)]
    assert sharding._parquet(sharding.INDEX_SCHEMA, (each.rows for each in built)) == plain.getvalue()
    assert 4 * sum(map(len, streams)) < len(json.dumps(groups))


def test_short_tasks_share_one_only_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    counts = (1, 63, 64, 512, 10_000, 1_000_000)
    assert [sharding._num_tasks("probe", n) for n in counts] == [1, 63, 32, 32, 625, 5000]
    assert [sharding._num_tasks("build", n) for n in counts] == list(counts)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8000.0})
    assert [sharding._num_tasks("probe", n) for n in (5000, 100_000)] == [5000, 5000]
