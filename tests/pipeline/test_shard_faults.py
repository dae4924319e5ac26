"""Sharding when inputs or their storage fail; the tasks run here, one by one, without Ray."""

import dataclasses
import errno
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from objdyn.clips import NO_LIMITS
from objdyn.datasets import LAYOUTS, Limits, Open, Video
from pipeline import shard as sharding
from pipeline import store
from pipeline.config import ShardRun
from pipeline.quickstart import write_mp4
from pipeline.shard import shard
from tests import plain


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    with plain.without_ray():
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Videos a.mp4 of 6 frames, b.mp4 of 10."""
    (tmp_path / "clips").mkdir()
    for name, length in [("a.mp4", 6), ("b.mp4", 10)]:
        write_mp4(str(tmp_path / "clips" / name), np.full((length, 16, 16, 3), 90, np.uint8), 25.0)
    return tmp_path / "clips"


def run_of(source: Path, out: Path, **changes: object) -> ShardRun:
    run = ShardRun(source=str(source), out=str(out), frames=2, size=16, clips_per_shard=2)
    return dataclasses.replace(run, **changes)  # pyright: ignore[reportArgumentType]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def quarantine(folder: Path) -> list[tuple[str, str, str]]:
    rows = pq.read_table(folder / "quarantine.parquet").to_pylist()
    return [(row["source"], row["stage"], row["code"]) for row in rows]


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a.mp4 count as 14 frames when it is probed, so that it ends early when it is built."""
    layout = LAYOUTS["videos"]

    def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
        probed = layout.probe(video, open_file, limits)
        return dataclasses.replace(probed, frames=14) if video.source == "a.mp4" else probed

    monkeypatch.setitem(LAYOUTS, "videos", layout._replace(probe=probe))


@pytest.mark.parametrize(
    "gone",
    [
        [],
        ["shard-00001.tar"],
        ["shard-00000.tar", "shard-00003.tar"],
        ["index.parquet"],
        ["quarantine.parquet", "shard-00005.tar"],
    ],
)
def test_a_dataset_with_videos_lost_while_building_is_mended_by_a_rerun(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shrunk: None, gone: list[str]
) -> None:
    shard(run_of(source, tmp_path))
    folder = tmp_path / "train"
    before, printed = files(folder), capsys.readouterr().out
    # a.mp4 has 3 of 7 clips planned: shards (a0 a1) (a2 lost) (lost lost) (lost b0) (b1 b2) (b3 b4).
    assert (
        "videos 2 = 1 read + 1 quarantined; ignored files 0; clips written 8, lost 4 of quarantined videos" in printed
    )
    assert quarantine(folder) == [("a.mp4", "build", "changed")] * 3
    entries = json.loads(before["manifest.json"])["shards"]
    assert [(entry["name"], entry["samples"]) for entry in entries] == [
        (f"shard-{i:05d}.tar", samples) for i, samples in [(0, 2), (1, 1), (3, 1), (4, 2), (5, 2)]
    ]
    assert {name for name in before if name.endswith(".tar")} == {entry["name"] for entry in entries}
    for name in gone:
        (folder / name).unlink()
    shard(run_of(source, tmp_path))
    assert files(folder) == before
    assert capsys.readouterr().out == printed


def test_other_losses_than_those_recorded_are_another_dataset(source: Path, tmp_path: Path, shrunk: None) -> None:
    shard(run_of(source, tmp_path))
    before = files(tmp_path / "train")
    (source / "a.mp4").rename(source / "c.mp4")
    with pytest.raises(ValueError, match="already holds a dataset of other videos"):
        shard(run_of(source, tmp_path))
    assert files(tmp_path / "train") == before


def test_a_refused_dataset_leaves_its_balance_and_the_list_of_what_is_unusable(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(98):
        (source / f"text{i}.mp4").write_text("no video")
    path = tmp_path / "train/quarantine.parquet"
    with pytest.raises(ValueError, match=rf"98 of 100 inputs cannot be used.*all are listed in {path}"):
        shard(run_of(source, tmp_path))
    out = capsys.readouterr().out
    assert "videos 100 = 2 read + 98 quarantined; ignored files 0; clips written 0\n" in out
    assert list(files(tmp_path / "train")) == ["quarantine.parquet"]
    assert len(quarantine(tmp_path / "train")) == 98
    shard(run_of(source, tmp_path, max_quarantined=1.0))
    before = files(tmp_path / "train")
    (source / "text0.mp4").unlink()
    (source / "text99.mp4").write_text("no video")
    with pytest.raises(ValueError, match="98 of 100 inputs cannot be used"):
        shard(run_of(source, tmp_path))
    assert files(tmp_path / "train") == before


def test_a_source_without_a_clip_leaves_the_list_of_what_is_unusable(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"gives no clip: a\.mp4 \(too-short.*quarantine\.parquet"):
        shard(run_of(source, tmp_path, frames=50))
    assert "videos 2 = 0 read + 2 quarantined; ignored files 0; clips written 0\n" in capsys.readouterr().out
    assert quarantine(tmp_path / "train") == [("a.mp4", "plan", "too-short"), ("b.mp4", "plan", "too-short")]


class Failing(io.RawIOBase):
    """A file whose storage fails when the reads that are left, counted over all files, are used up."""

    def __init__(self, file: BinaryIO, left: list[int], error: Callable[[], Exception]) -> None:
        self._file, self._left, self._error = file, left, error

    def read(self, size: int = -1) -> bytes:
        self._left[0] -= 1
        if self._left[0] < 0:
            raise self._error()
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def close(self) -> None:
        self._file.close()
        super().close()


def write_layout(root: Path, layout: str) -> None:
    root.mkdir()
    if layout == "frames":
        (root / "a").mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"a/{i}.png")
    elif layout == "gswm-hdf5":
        with h5py.File(root / "a.h5", "w") as file:
            file["imgs"], file["positions"] = np.zeros((2, 5, 8, 8, 3), np.uint8), np.zeros((2, 5, 3, 2))
    else:
        write_mp4(str(root / "a.mp4"), np.full((6, 16, 16, 3), 90, np.uint8), 25.0)
        if layout == "webdataset":
            with tarfile.open(root / "a.tar", "w") as tar:
                tar.add(root / "a.mp4", "a.mp4")
            (root / "a.mp4").unlink()


@pytest.mark.parametrize("layout", ["videos", "frames", "gswm-hdf5", "webdataset"])
@pytest.mark.parametrize(
    ("error", "reads"),
    [
        (lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 0),
        (lambda: TimeoutError(errno.ETIMEDOUT, "Connection timed out"), 1),
        (lambda: RuntimeError("the object storage has errors of its own"), 0),
    ],
)
def test_storage_that_fails_is_not_blamed_on_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, error: Callable[[], Exception], reads: int
) -> None:
    write_layout(tmp_path / "in", layout)
    plain, left = store.open_read, [reads]
    monkeypatch.setattr(store, "open_read", lambda path: Failing(plain(path), left, error))
    with pytest.raises(
        OSError, match=r"a(/[01]\.png|\.mp4|\.h5|\.tar) in the source cannot be read \(.*the access"
    ) as caught:
        shard(run_of(tmp_path / "in", tmp_path / "out", layout=layout))
    assert str(error().args[-1]) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("opens", [0, 2])
def test_a_file_that_cannot_be_opened_fails_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, opens: int
) -> None:
    plain, left = store.open_read, [opens]

    def open_read(path: str) -> BinaryIO:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, "refused", path)
        return plain(path)

    monkeypatch.setattr(store, "open_read", open_read)
    with pytest.raises(OSError, match=r"a\.mp4 in the source cannot be read \(refused\)"):
        shard(run_of(source, tmp_path))
    assert not (tmp_path / "train/manifest.json").exists()


def test_damaged_files_are_quarantined_without_a_path_of_this_machine(source: Path, tmp_path: Path) -> None:
    data = (source / "b.mp4").read_bytes()
    (source / "cut.mp4").write_bytes(data[: len(data) // 2])
    (source / "empty.mp4").touch()
    shard(run_of(source, tmp_path / "videos"))
    write_layout(tmp_path / "images", "frames")
    (tmp_path / "images/b").mkdir()
    (tmp_path / "images/b/0.png").write_text("no image")
    (tmp_path / "images/c").mkdir()
    (tmp_path / "images/c/0.png").write_bytes((tmp_path / "images/a/0.png").read_bytes()[:45])
    shard(run_of(tmp_path / "images", tmp_path / "frames", layout="frames"))
    write_layout(tmp_path / "hdf5", "gswm-hdf5")
    (tmp_path / "hdf5/cut.h5").write_bytes((tmp_path / "hdf5/a.h5").read_bytes()[:-500])
    (tmp_path / "hdf5/text.h5").write_text("no HDF5")
    shard(run_of(tmp_path / "hdf5", tmp_path / "episodes", layout="gswm-hdf5"))
    found = {}
    for name in ("videos", "frames", "episodes"):
        rows = pq.read_table(tmp_path / name / "train/quarantine.parquet").to_pylist()
        found |= {row["source"]: row["code"] for row in rows}
        assert not [row for row in rows if str(tmp_path) in row["message"] or not row["message"]]
    assert found == dict.fromkeys(["cut.mp4", "empty.mp4", "b", "c", "cut.h5", "text.h5"], "unreadable")


def test_tar_members_of_one_name_are_two_videos(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tars").mkdir()
    (source / "text.mp4").write_text("no video")
    with tarfile.open(tmp_path / "tars/x.tar", "w") as tar:
        for name in ("a.mp4", "text.mp4", "b.mp4"):
            tar.add(source / name, "same.mp4")
    shard(run_of(tmp_path / "tars", tmp_path, layout="webdataset"))
    assert "videos 3 = 2 read + 1 quarantined; ignored files 0; clips written 8\n" in capsys.readouterr().out
    assert quarantine(tmp_path / "train") == [("x.tar/same.mp4#2", "probe", "unreadable")]
    rows = pq.read_table(tmp_path / "train/index.parquet").to_pylist()
    assert [row["source"] for row in rows] == ["x.tar/same.mp4"] * 3 + ["x.tar/same.mp4#3"] * 5


def test_splits_share_no_key_and_every_key_fits_into_a_tar(source: Path, tmp_path: Path) -> None:
    longest = "x" * sharding.SPLIT_LETTERS
    keys = []
    for split in ("train", "val", longest):
        shard(run_of(source, tmp_path, split=split))
        rows = pq.read_table(tmp_path / split / "index.parquet").to_pylist()
        keys += [row["key"] for row in rows]
        assert keys[-8:] == [f"{split}-v00000-c{i:04d}" for i in range(3)] + [
            f"{split}-v00001-c{i:04d}" for i in range(5)
        ]
        with tarfile.open(tmp_path / split / "shard-00000.tar") as tar:
            members = {m.name: (m.offset_data, m.size) for m in tar}
        listed = {f"{r['key']}.{m['name']}": (m["offset"], m["size"]) for r in rows[:2] for m in r["members"]}
        assert listed == members
    assert len(set(keys)) == 24
    with pytest.raises(ValueError, match="is too long"):
        shard(run_of(source, tmp_path, split=longest + "x"))
