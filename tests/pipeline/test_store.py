import hashlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from pipeline import store


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder, on disk and on S3."""
    if request.param == "local":
        return str(tmp_path / "new" / "folder")
    return request.getfixturevalue("s3_folder")


def test_published_bytes_are_read_back(folder: str) -> None:
    path = store.join(folder, "a", "b.bin")
    published = store.publish(path, b"hello")
    assert published == (5, hashlib.sha256(b"hello").hexdigest())
    assert store.exists(path)
    assert store.exists(store.join(folder, "a"))
    assert store.read_bytes(path, expected_sha256=published.sha256) == b"hello"
    assert store.sha256_file(path) == published.sha256
    store.publish(path, b"bye")
    assert store.read_bytes(path) == b"bye"
    assert store.list_names(store.join(folder, "a")) == ["b.bin"]


def test_published_file_is_hashed_while_it_is_written(folder: str) -> None:
    path = store.join(folder, "b.bin")

    def write(file: BinaryIO) -> None:
        file.write(b"x" * 100_000)
        file.write(b"y")

    published = store.publish_file(path, write)
    assert published.size == 100_001
    assert published.sha256 == store.sha256_file(path) == hashlib.sha256(b"x" * 100_000 + b"y").hexdigest()


def test_failing_writer_leaves_nothing(folder: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        store.publish_file(store.join(folder, "b.bin"), write)
    assert store.list_names(folder) == []


def test_failing_writer_keeps_the_earlier_file(folder: str) -> None:
    path = store.join(folder, "b.bin")
    store.publish(path, b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        store.publish_file(path, write)
    assert store.read_bytes(path) == b"old"
    assert store.list_names(folder) == ["b.bin"]


@pytest.mark.parametrize("write", [store.publish, store.create])
def test_an_error_of_the_system_while_writing_names_the_file_and_leaves_nothing(
    tmp_path: Path, write: Callable[[str, bytes], object]
) -> None:
    path, limits = str(tmp_path / "b.bin"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # like a full disk, it is told without a name
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write(path, b"x" * 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == path
    assert store.list_names(str(tmp_path)) == []


def test_temporary_names_are_told_from_others(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        assert [store.is_temporary(name) for name in store.list_names(str(tmp_path))] == [True]

    store.publish_file(str(tmp_path / "b.tmp"), write)
    assert not any(map(store.is_temporary, ["b.tmp", ".b.tmp", ".config.json", "shard-00000.tar"]))


def test_killed_writer_leaves_no_final_name(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pipeline import store\n"
        "def write(file):\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"store.publish_file({str(tmp_path / 'b.bin')!r}, write)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert process.returncode == -9
    names = os.listdir(tmp_path)
    assert len(names) == 1
    assert names[0].startswith(".b.bin.")
    assert names[0].endswith(".tmp")


def test_create_has_exactly_one_winner(folder: str) -> None:
    # The mock of S3 looks and writes in two steps, so that on a busy machine two of several at once may win there.
    writers = 1 if store.is_url(folder) else 8
    for race in range(3):
        path = store.join(folder, f"lock-{race}")
        with ThreadPoolExecutor(writers) as pool:
            won = list(pool.map(lambda i, path=path: store.create(path, b"%d" % i), range(8)))
        assert sum(won) == 1
        assert store.read_bytes(path) == b"%d" % won.index(True)
    assert len(store.list_names(folder)) == 3


def test_wrong_checksum_names_the_file(folder: str) -> None:
    path = store.join(folder, "b.bin")
    store.publish(path, b"hello")
    with pytest.raises(ValueError, match=r"b\.bin is damaged"):
        store.read_bytes(path, expected_sha256="0" * 64)


def test_json_is_deterministic_and_strict(folder: str) -> None:
    first, second = store.join(folder, "1.json"), store.join(folder, "2.json")
    store.publish_json(first, {"b": 1, "a": [0.1, None]})
    store.publish_json(second, {"a": [0.1, None], "b": 1})
    assert store.read_bytes(first) == store.read_bytes(second)
    assert store.read_bytes(first).endswith(b"}\n")
    assert store.read_json(first) == {"a": [0.1, None], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        store.publish_json(first, {"a": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        store.publish_json(first, {"a": object()})
    store.publish(first, b"{")
    with pytest.raises(ValueError, match=r"1\.json is not valid JSON"):
        store.read_json(first)


def test_every_bit_flip_and_every_cut_of_sealed_json_is_found() -> None:
    value = {"schema": 1, "rate": 0.1, "name": "ä", "parts": [{"rows": 3}, None, True]}
    data = store.sealed_json(value)
    assert store.parse_json(data, "x") == value
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"^x (is not valid JSON|is damaged|has no field)"):
            store.parse_json(bytes(flipped), "x")
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"^x (is not valid JSON|is damaged|has no field)"):
            store.parse_json(data[:size], "x")


@pytest.mark.parametrize("data", [b"[1]", b"3", b"{}", b"[" * 100_000, b'{"a": 1, "a": 1}', b'{"checksum": 1}'])
def test_json_of_other_kinds_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^x "):
        store.parse_json(data, "x")


def test_missing_and_removed(folder: str) -> None:
    assert store.list_names(folder) == []
    assert not store.exists(store.join(folder, "a"))
    with pytest.raises(FileNotFoundError):
        store.read_bytes(store.join(folder, "a"))
    for name in ("t/1", "t/u/2", "k"):
        store.publish(store.join(folder, name), b"x")
    store.remove_tree(store.join(folder, "t"))
    store.remove_tree(store.join(folder, "t"))
    assert store.list_names(folder) == ["k"]
    store.remove(store.join(folder, "k"))
    store.remove(store.join(folder, "k"))
    assert store.list_names(folder) == []


def test_fetched_object_is_a_local_copy(s3_folder: str, tmp_path: Path) -> None:
    store.publish(store.join(s3_folder, "a"), b"bytes")
    store.fetch(store.join(s3_folder, "a"), str(tmp_path / "deep" / "copy"))
    assert (tmp_path / "deep" / "copy").read_bytes() == b"bytes"
    with pytest.raises(FileNotFoundError):
        store.fetch(store.join(s3_folder, "b"), str(tmp_path / "missing"))
    assert sorted(os.listdir(tmp_path)) == ["deep"]


def test_published_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store.publish(str(tmp_path / "a"), b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="file is a file, but a folder is needed"):
        store.publish(str(tmp_path / "file" / "a"), b"")


def test_tar_and_parquet_writers_can_stream(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    import webdataset as wds

    def tar(file: BinaryIO) -> None:
        with wds.TarWriter(file, mtime=0) as sink:  # pyright: ignore[reportAttributeAccessIssue]
            sink.write({"__key__": "a", "txt": b"x"})

    published = store.publish_file(str(tmp_path / "a.tar"), tar)
    assert published.sha256 == store.sha256_file(str(tmp_path / "a.tar"))
    published = store.publish_file(str(tmp_path / "a.parquet"), lambda f: pq.write_table(pa.table({"a": [1, 2]}), f))
    assert published.sha256 == store.sha256_file(str(tmp_path / "a.parquet"))
    assert pq.read_table(tmp_path / "a.parquet").to_pydict() == {"a": [1, 2]}


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.resolve("data", "--data") == str(tmp_path / "data")
    assert store.resolve("~/data", "--data") == "/home/someone/data"
    assert store.resolve("s3://bucket/data/", "--data") == "s3://bucket/data"
    assert store.resolve("sim:balls-interaction", "--data") == "sim:balls-interaction"


@pytest.mark.parametrize("path", ["", "gs://bucket/x", "s3://", "http://host/x"])
def test_unusable_paths_name_the_flag(path: str) -> None:
    with pytest.raises(ValueError, match="--data"):
        store.resolve(path, "--data")


def test_relative_path_in_a_submitted_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"--out=runs/1 is relative.*absolute"):
        store.resolve("runs/1", "--out")
    assert store.resolve("/shared/runs/1", "--out") == "/shared/runs/1"
