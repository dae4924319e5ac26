import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from objdyn.clips import Clip, to_sample
from pipeline import reader, store
from pipeline.config import LoaderConfig
from pipeline.reader import (
    MicroBatch,
    TrainingReader,
    _EpochOrder,
    has_split,
    iter_clips,
    open_source,
    sample_order,
    window_start,
)

FRAMES = 6
SIZES = (4, 3, 4, 2, 5)


def clip(number: int, seed: int = 0) -> Clip:
    """A clip whose pixels tell its number and frame."""
    frames = np.random.default_rng([seed, number]).integers(0, 256, (FRAMES, 8, 8, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = number
    frames[:, 0, 0, 1] = np.arange(FRAMES)
    truth = {
        "positions": np.full((FRAMES, 2, 2), number / 100, dtype=np.float32),
        "num_objects": np.array(number % 4, dtype=np.int64),
    }
    return Clip(f"clip-{number:06d}", frames, 25.0, number * 10, 2, f"video-{number // 4}.mp4", truth)


def write_dataset(data: str, split: str, sizes: Sequence[int] = SIZES, codec: str = "zstd") -> str:
    """Write a dataset folder as pipeline/shard.py does, in a few lines; return its id."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import webdataset as wds

    folder, number, shards, groups = store.join(data, split), 0, [], []
    for shard, size in enumerate(sizes):
        buffer, name, rows = io.BytesIO(), f"shard-{shard:05d}.tar", []
        tar = wds.TarWriter(buffer, mtime=0, user="objdyn", group="objdyn")  # pyright: ignore[reportAttributeAccessIssue]
        clips = [clip(number + i) for i in range(size)]
        for c in clips:
            tar.write({"__key__": c.key} | to_sample(c, codec))
        tar.close()
        members: dict[str, list[dict[str, object]]] = {c.key: [] for c in clips}
        with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
            for info in tar:
                key, _, member = info.name.partition(".")
                members[key].append({"name": member, "offset": info.offset_data, "size": info.size})
        for c in clips:
            row = {"shard": name, "key": c.key, "members": members[c.key], "source": c.source}
            rows.append(row | {"start_frame": c.start_frame, "stride": c.stride, "frames": FRAMES, "fps": c.fps})
        number += size
        published = store.publish(store.join(folder, name), buffer.getvalue())
        shards.append({"name": name, "bytes": published.size, "samples": size, "sha256": published.sha256})
        groups.append(pa.Table.from_pylist(rows))
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=1 << 20)
    index = store.publish(store.join(folder, "index.parquet"), buffer.getvalue())
    manifest = {
        "schema": 1,
        "kind": "dataset",
        "name": "toy",
        "split": split,
        "frames": FRAMES,
        "height": 8,
        "width": 8,
    }
    manifest |= {"channels": 3, "codec": codec, "clips": sum(sizes), "shards": shards}
    manifest |= {"index": {"bytes": index.size, "sha256": index.sha256}}
    return store.publish_json(store.join(folder, "manifest.json"), manifest).sha256


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = str(tmp_path_factory.mktemp("data"))
    write_dataset(data, "train")
    return data


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "objdyn" / "shards"


def read(
    data: str, count: int, position: int = 0, *, rank: int = 0, world: int = 1, micro: int = 2, prefetch: int = 2,
    seed: int = 7, inputs: Sequence[str] = (),
) -> list[MicroBatch]:  # fmt: skip
    loader = LoaderConfig(window_shards=2, prefetch=prefetch)
    source = open_source(data, "train", loader=loader)
    training = TrainingReader(
        source, clip_frames=3, batch_size=8, micro_batch_size=micro, seed=seed, loader=loader, inputs=inputs,
        rank=rank, world=world,
    )  # fmt: skip
    batches = training.micro_batches(position)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def assert_equal(first: Sequence[MicroBatch], second: Sequence[MicroBatch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.keys, a.starts, a.seed) == (b.keys, b.starts, b.seed)
        assert torch.equal(a.frames, b.frames)


# The order


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("epoch", [0, 1])
def test_each_sample_comes_once_in_an_epoch(window: int, epoch: int) -> None:
    order = sample_order(SIZES, seed=3, epoch=epoch, window_shards=window)
    assert order.shape == (sum(SIZES), 2)
    assert {tuple(row) for row in order.tolist()} == {(s, i) for s, n in enumerate(SIZES) for i in range(n)}


def test_windows_hold_a_few_shards() -> None:
    sizes = (10,) * 12
    order = sample_order(sizes, seed=1, epoch=0, window_shards=4)
    windows = [set(order[first : first + 40, 0].tolist()) for first in range(0, 120, 40)]
    assert [len(window) for window in windows] == [4, 4, 4]
    assert set.union(*windows) == set(range(12))
    assert windows[0] != {0, 1, 2, 3}
    assert len(set(order[:10, 0].tolist())) > 1


def test_order_is_a_pure_function_of_its_arguments() -> None:
    arguments = {"seed": 5, "epoch": 2, "window_shards": 2}
    first = sample_order(SIZES, **arguments)
    np.random.default_rng(0).random()
    assert np.array_equal(first, sample_order(SIZES, **arguments))
    for change in ({"seed": 6}, {"epoch": 3}, {"window_shards": 3}):
        assert not np.array_equal(first, sample_order(SIZES, **arguments | change))


def test_order_is_pinned() -> None:
    """A change here changes every run: it must be made knowingly."""
    order = sample_order((2, 3, 2), seed=0, epoch=1, window_shards=2).tolist()
    assert order == [[1, 0], [2, 0], [1, 2], [2, 1], [1, 1], [0, 0], [0, 1]]
    assert [window_start(0, epoch, "a", 100, 11) for epoch in range(4)] == [48, 26, 47, 25]


def test_an_order_in_windows_is_that_of_the_whole_epoch() -> None:
    """The epoch's numbers drawn in one stream, as the order is defined, beside windows that are drawn apart."""
    rng = np.random.default_rng(0)
    for seed, window in enumerate((1, 3, 4, 50)):
        sizes = rng.integers(0, 40, 30).tolist()
        philox = np.random.Philox(key=np.array([seed, 2], dtype=np.uint64))
        shards, rows = np.argsort(philox.random_raw(30), kind="stable"), []
        for first in range(0, 30, window):
            some = [(s, i) for s in shards[first : first + window].tolist() for i in range(sizes[s])]
            rows += [some[n] for n in np.argsort(philox.random_raw(len(some)), kind="stable")]
        assert sample_order(sizes, seed, 2, window).tolist() == [list(row) for row in rows]
        order = _EpochOrder(sizes, seed, 2, window)
        for place in rng.permutation(sum(sizes)).tolist():
            assert order.sample(place) == rows[place]
            coming = order.coming(place).tolist()
            assert coming == [shard for shard, _ in rows[place : place + len(coming)]]


def test_an_epoch_of_ten_million_clips_is_opened_without_its_samples() -> None:
    order = _EpochOrder((1000,) * 10_000, seed=0, epoch=0, window_shards=8)
    shard, index = order.sample(9_999_999)
    assert 0 <= shard < 10_000
    assert 0 <= index < 1000
    assert order.window(1249).nbytes == 8 * 1000 * 16
    held = sum(each.nbytes for each in vars(order).values() if isinstance(each, np.ndarray))
    assert held < 2 * 8 * 10_000 + 64


def test_window_starts_are_uniform() -> None:
    starts = [window_start(0, epoch, f"k{n}", 12, 10) for epoch in range(30) for n in range(100)]
    counts = np.bincount(starts, minlength=3)
    assert len(counts) == 3
    assert (abs(counts - 1000) < 130).all()  # 5 standard deviations of a binomial with n=3000, p=1/3
    assert window_start(0, 0, "k", 10, 10) == 0


# Training batches


def test_batches_are_the_order(dataset: str) -> None:
    order = np.concatenate([sample_order(SIZES, 7, epoch, 2) for epoch in range(3)])
    first = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
    numbers = first[order[:, 0]] + order[:, 1]
    batches = read(dataset, 24)
    assert [key for batch in batches for key in batch.keys] == [f"clip-{n:06d}" for n in numbers[:48]]
    for position, batch in enumerate(batches):
        for row in range(2):
            epoch, number = (2 * position + row) // 18, int(numbers[2 * position + row])
            start = window_start(7, epoch, f"clip-{number:06d}", FRAMES, 3)
            assert batch.starts[row] == start
            wanted = torch.from_numpy(clip(number).frames[start : start + 3]).permute(0, 3, 1, 2)
            assert torch.equal(batch.frames[row], wanted)
    assert len({batch.seed for batch in batches}) == 24
    assert all(0 <= batch.seed < 2**63 for batch in batches)


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_same_batches(dataset: str, world: int) -> None:
    alone = read(dataset, 12)
    parts = [read(dataset, 12 // world, rank=rank, world=world) for rank in range(world)]
    merged = []
    for step in range(3):  # an optimiser step has 4 micro-batches; j belongs to rank j % world, accumulation j // world
        merged += [parts[j % world][step * (4 // world) + j // world] for j in range(4)]
    assert_equal(alone, merged)


def test_micro_batch_size_does_not_move_samples(dataset: str) -> None:
    small, large = read(dataset, 8, micro=2), read(dataset, 4, micro=4)
    assert [k for b in small for k in b.keys] == [k for b in large for k in b.keys]
    assert torch.equal(torch.cat([b.frames for b in small]), torch.cat([b.frames for b in large]))


@pytest.mark.parametrize("position", [8, 16, 24])
def test_resuming_gives_the_tail(dataset: str, position: int) -> None:
    assert_equal(read(dataset, 16)[position // 2 :], read(dataset, 16 - position // 2, position))


def test_any_number_of_workers_goes_on_at_any_step_with_the_same_samples(dataset: str) -> None:
    """Nothing twice and nothing lost, whatever trained before: 9 steps of 6 samples are 3 epochs of 18."""
    loader = LoaderConfig(window_shards=2, prefetch=0)
    source = open_source(dataset, "train", loader=loader)

    def steps(world: int, first: int) -> list[list[str]]:
        taken: list[list[str]] = [[] for _ in range(first, 9)]
        for rank in range(world):
            training = TrainingReader(
                source, clip_frames=3, batch_size=6, micro_batch_size=1, seed=7, loader=loader, rank=rank, world=world
            )
            batches = training.micro_batches(6 * first)
            for step in taken:
                step += [key for _ in range(6 // world) for key in next(batches).keys]
            batches.close()
        return [sorted(step) for step in taken]

    whole = steps(1, 0)
    for epoch in range(3):
        assert sorted(itertools.chain(*whole[3 * epoch : 3 * epoch + 3])) == [f"clip-{n:06d}" for n in range(18)]
    for world in (1, 2, 3, 6):
        for first in range(9):
            assert steps(world, first) == whole[first:], (world, first)


def test_prefetching_changes_nothing(dataset: str) -> None:
    assert_equal(read(dataset, 16, prefetch=0), read(dataset, 16, prefetch=3))


def test_codecs_give_the_same_pixels(dataset: str, tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", codec="npy")
    assert_equal(read(dataset, 9), read(str(tmp_path), 9))


def test_inputs_come_beside_the_frames(dataset: str) -> None:
    (batch,) = read(dataset, 1, inputs=("num_objects", "positions"))
    numbers = [int(key[-6:]) for key in batch.keys]
    assert batch.inputs["num_objects"].tolist() == [n % 4 for n in numbers]
    assert batch.inputs["positions"].shape == (2, 3, 2, 2)
    assert torch.equal(batch.inputs["positions"][:, 0, 0, 0], torch.tensor([n / 100 for n in numbers]))


def test_missing_input_is_named(dataset: str) -> None:
    with pytest.raises(ValueError, match="no truth 'masses'"):
        read(dataset, 1, inputs=("masses",))


def test_position_must_start_a_batch(dataset: str) -> None:
    with pytest.raises(ValueError, match="multiple of batch_size=8, got 3"):
        read(dataset, 1, position=3)


def test_window_longer_than_the_clips_is_refused(dataset: str) -> None:
    source = open_source(dataset, "train")
    with pytest.raises(ValueError, match=r"clip_frames=7 .*hold 6 frames"):
        TrainingReader(source, clip_frames=7, batch_size=2, micro_batch_size=2, seed=0, loader=LoaderConfig())
    with pytest.raises(ValueError, match="7 frames are asked"):
        next(iter_clips(source, length=7))


def test_sizes_that_do_not_divide_are_refused(dataset: str) -> None:
    with pytest.raises(ValueError, match="3 workers"):
        read(dataset, 1, world=3)


def test_few_shards_are_open_at_once(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_now, most = 0, 0
    shard_type = reader._FolderShard

    class Counted(shard_type):
        def __init__(self, *arguments: object) -> None:
            nonlocal open_now, most
            super().__init__(*arguments)  # pyright: ignore[reportArgumentType]
            open_now += 1
            most = max(most, open_now)

        def __del__(self) -> None:
            nonlocal open_now
            open_now -= 1

    monkeypatch.setattr(reader, "_FolderShard", Counted)
    read(dataset, 30, prefetch=0)
    assert most == 3
    assert open_now == 0


# The thread


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("objdyn")]


def test_closing_ends_the_threads(dataset: str) -> None:
    loader = LoaderConfig(window_shards=2, prefetch=1)
    training = TrainingReader(
        open_source(dataset, "train"), clip_frames=3, batch_size=2, micro_batch_size=2, seed=0, loader=loader
    )
    batches = training.micro_batches()
    assert prefetch_threads() == []
    next(batches)
    assert "objdyn-prefetch" in prefetch_threads()
    batches.close()
    assert prefetch_threads() == []


def test_prefetch_stays_a_few_ahead() -> None:
    made = []

    def numbers():
        for n in range(100):
            made.append(n)
            yield n

    ahead = reader._ahead(numbers(), 3)
    assert next(ahead) == 0
    for _ in range(100):
        if len(made) >= 4:
            break
        threading.Event().wait(0.02)
    threading.Event().wait(0.05)
    assert made == [0, 1, 2, 3]
    ahead.close()


def test_error_in_the_thread_reaches_the_reader(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", sizes=(4,))
    flip(tmp_path / "train" / "shard-00000.tar", 700)
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        read(str(tmp_path), 1)
    assert prefetch_threads() == []


# Damage


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_flipped_byte_is_found_with_the_shards_name(tmp_path: Path, place: float) -> None:
    write_dataset(str(tmp_path), "train", sizes=(2, 2, 2))
    path = tmp_path / "train" / "shard-00001.tar"
    flip(path, int(place * path.stat().st_size))
    clips = iter_clips(open_source(str(tmp_path), "train"))
    assert [next(clips).key for _ in range(2)] == ["clip-000000", "clip-000001"]
    with pytest.raises(ValueError, match=r"shard-00001\.tar is damaged.*restore"):
        next(clips)


def test_cut_and_missing_shards_are_named(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", sizes=(2, 2))
    source = open_source(str(tmp_path), "train")
    path = tmp_path / "train" / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-00001\.tar is damaged: it has \d+ bytes, the manifest says \d+"):
        source.open_shard(1)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.tar is missing"):
        source.open_shard(1)


def test_damaged_index_is_named(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", sizes=(2,))
    flip(tmp_path / "train" / "index.parquet", 30)
    with pytest.raises(ValueError, match=r"index\.parquet is damaged"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"schema": 1', '"schema": 9'),
        ('"clips": 4', '"clips": 5'),
        ('"frames": 6,', ""),
        ('"shard-00001.tar"', '"../shard-00001.tar"'),
        ("{", "["),
    ],
)
def test_edited_manifest_is_refused(tmp_path: Path, old: str, new: str) -> None:
    write_dataset(str(tmp_path), "train", sizes=(2, 2))
    path = tmp_path / "train" / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"manifest\.json is .*damaged or was edited"):
        open_source(str(tmp_path), "train")
    if new == "[":
        return
    sealed = json.loads(path.read_text())
    del sealed["checksum"]
    store.publish_json(str(path), sealed)  # whoever edits it may also seal it anew
    with pytest.raises(ValueError, match=r"manifest\.json is not a dataset's manifest, or damaged"):
        open_source(str(tmp_path), "train")


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", sizes=(2, 2))
    folder = tmp_path / "train"
    (folder / "shard-00000.tar").rename(folder / "x")
    (folder / "shard-00001.tar").rename(folder / "shard-00000.tar")
    (folder / "x").rename(folder / "shard-00001.tar")
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        open_source(str(tmp_path), "train").open_shard(0)


# Sources


def test_folder_is_read_in_the_manifests_order(dataset: str) -> None:
    source = open_source(dataset, "train")
    assert source.id == hashlib.sha256(Path(dataset, "train", "manifest.json").read_bytes()).hexdigest()
    assert (source.num_frames, source.height, source.width) == (FRAMES, 8, 8)
    assert source.shard_sizes == SIZES
    assert source.shard_names[1] == "shard-00001"
    clips = list(iter_clips(source))
    assert [c.key for c in clips] == [f"clip-{n:06d}" for n in range(sum(SIZES))]
    for number, found in enumerate(clips):
        wanted = clip(number)
        assert np.array_equal(found.frames, wanted.frames)
        assert (found.fps, found.start_frame, found.stride) == (25.0, number * 10, 2)
        assert found.source == wanted.source
        assert np.array_equal(found.truth["positions"], wanted.truth["positions"])
    short = list(iter_clips(source, limit=5, length=2, truth=()))
    assert [c.key for c in short] == [c.key for c in clips[:5]]
    assert np.array_equal(short[4].frames, clips[4].frames[:2])
    assert short[4].truth == {}
    assert list(iter_clips(source, limit=0)) == []


def test_extra_files_are_not_looked_at(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", sizes=(1,))
    for name in ("shard-00001.tar", ".shard-00000.tar.x.tmp", "notes.txt"):
        (tmp_path / "train" / name).write_bytes(b"junk")
    assert len(list(iter_clips(open_source(str(tmp_path), "train")))) == 1


def test_missing_dataset_says_how_to_make_one(dataset: str, tmp_path: Path) -> None:
    assert has_split(dataset, "train")
    assert not has_split(dataset, "val")
    with pytest.raises(ValueError, match="has no split 'val'; it has train"):
        open_source(dataset, "val")
    with pytest.raises(ValueError, match="one split of a dataset; give the folder above"):
        open_source(f"{dataset}/train", "train")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match=r"not a dataset folder .*make_shards\.py"):
            open_source(str(path), "train")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="not a dataset folder"):
        open_source(str(tmp_path / "file"), "train")


def test_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", sizes=(0,))
    with pytest.raises(ValueError, match="holds no clips"):
        open_source(str(tmp_path), "train")


def test_simulator_streams_without_files() -> None:
    data = "sim:balls-interaction"
    assert has_split(data, "train")
    assert not has_split(data, "nothing")
    with pytest.raises(ValueError, match="has no split 'nothing'; it has train, val, test"):
        open_source(data, "nothing")
    with pytest.raises(ValueError, match="unknown simulator 'x'; choose one of sim:balls-interaction"):
        open_source("sim:x", "train")
    source = open_source(data, "val")
    assert source.id == "sim:balls-interaction/val"
    assert sum(source.shard_sizes) == 200
    assert (source.num_frames, source.height, source.width) == (100, 64, 64)
    training = TrainingReader(
        source, clip_frames=3, batch_size=4, micro_batch_size=2, seed=0, loader=LoaderConfig(window_shards=2)
    )
    batches = training.micro_batches(4)
    batch = next(batches)
    batches.close()
    order = sample_order(source.shard_sizes, 0, 0, 2)
    whole = source.open_shard(int(order[4, 0])).clip(int(order[4, 1]))
    start = batch.starts[0]
    assert whole.key == batch.keys[0] == f"val-{50 * order[4, 0] + order[4, 1]:06d}"
    assert torch.equal(batch.frames[0], torch.from_numpy(whole.frames[start : start + 3]).permute(0, 3, 1, 2))


def test_options_of_a_simulator_are_part_of_its_identity() -> None:
    source = open_source("sim:bouncing-balls:size=16,balls=2-3,colors=random4", "test")
    name = "bouncing-balls:balls=2-3,size=16,colors=random4,frames=51,radius=rnem,seed=0"
    assert source.id == f"sim:{name}/test"
    assert (sum(source.shard_sizes), source.num_frames, source.height, source.width) == (10_000, 51, 16, 16)
    clip = source.open_shard(199).clip(49, 3, 2, ("segmentation",))
    assert (clip.key, clip.source) == ("test-009999", f"{source.id}/9999")
    assert set(clip.truth) == {"segmentation"}
    with pytest.raises(ValueError, match="no option 'balls:2'"):
        open_source("sim:bouncing-balls:balls:2", "train")


def test_simulator_needs_no_storage_libraries() -> None:
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'zstandard', 'fsspec', 's3fs', 'ray', 'webdataset'): sys.modules[name] = None\n"
        "from pipeline.reader import iter_clips, open_source\n"
        "print(next(iter_clips(open_source('sim:balls-interaction', 'val'), length=2)).key)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "val-000000\n", done.stderr


# S3


def test_s3_dataset_is_read_like_a_local_one(dataset: str, s3_folder: str, cache: Path) -> None:
    assert write_dataset(s3_folder, "train") == open_source(dataset, "train").id
    assert_equal(read(dataset, 20), read(s3_folder, 20))
    assert len(list(cache.glob("[0-9a-f]*"))) == len(SIZES) + 1
    store.remove(store.join(s3_folder, "train", "shard-00000.tar"))
    assert_equal(read(dataset, 20), read(s3_folder, 20))


def test_cache_lets_the_oldest_go(s3_folder: str, cache: Path) -> None:
    write_dataset(s3_folder, "train", sizes=(2, 2, 2, 2))
    source = open_source(s3_folder, "train", loader=LoaderConfig(cache_gb=1e-9))
    shards = [source.open_shard(number) for number in range(4)]
    assert len(list(cache.glob("[0-9a-f]*"))) == 1
    assert [shard.clip(0).key for shard in shards] == [f"clip-{n:06d}" for n in (0, 2, 4, 6)]

    size = sum(file.stat().st_size for file in cache.glob("[0-9a-f]*"))
    (cache / ".left.tmp").write_bytes(b"by a killed process")
    source = open_source(s3_folder, "train", loader=LoaderConfig(cache_gb=3.5 * size / 1e9))
    for number in (0, 1, 2, 0, 3):
        source.open_shard(number)
    names = [hashlib.sha256(store.read_bytes(store.join(s3_folder, "train", f"shard-{n:05d}.tar"))) for n in range(4)]
    kept = {file.name for file in cache.iterdir()} - {".lock"}
    assert kept >= {names[n].hexdigest() for n in (0, 2, 3)}
    assert names[1].hexdigest() not in kept
    assert ".left.tmp" not in kept


def test_files_are_fetched_side_by_side_and_each_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met, fetched = threading.Barrier(2, timeout=10), []

    def fetch(url: str, path: str) -> None:
        fetched.append(url)
        unfinished = Path(path).with_name(f".{Path(path).name}.{'1' * 32}.tmp")
        unfinished.write_bytes(b"half")
        met.wait()
        unfinished.rename(path)  # fails if the other fetch, which ended first, has taken it for a leftover
        Path(path).write_bytes(url.encode())

    monkeypatch.setattr(store, "fetch", fetch)
    held, names = reader._Cache(1000), ["a" * 64, "b" * 64]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda name: held.fetch(name[0], name), names * 2))
    assert sorted(fetched) == ["a", "b"]
    assert [Path(path).read_text() for path in paths] == ["a", "b"] * 2
    left, writing = (cache / f".{name}.{'2' * 32}.tmp" for name in names)
    left.touch()
    writing.touch()
    with held._lock(names[1]):
        held._evict(paths[0])
    assert (left.exists(), writing.exists()) == (False, True)


def test_damaged_copy_in_the_cache_is_fetched_again(s3_folder: str, cache: Path) -> None:
    write_dataset(s3_folder, "train", sizes=(2,))
    open_source(s3_folder, "train").open_shard(0)
    for file in cache.glob("[0-9a-f]*"):
        flip(file, 100)
    assert len(list(iter_clips(open_source(s3_folder, "train")))) == 2


@pytest.mark.parametrize("place", ["shards", "index"])
def test_a_checksum_that_is_a_path_reaches_no_file_beside_the_cache(s3_folder: str, cache: Path, place: str) -> None:
    """The cache names its files by the checksums of the manifest, which strangers write."""
    write_dataset(s3_folder, "train", sizes=(2,))
    precious = cache.parents[2] / "precious"
    precious.write_text("mine")
    path = store.join(s3_folder, "train", "manifest.json")
    manifest = store.read_json(path)
    (manifest["shards"][0] if place == "shards" else manifest["index"])["sha256"] = "../../../precious"
    store.publish_json(path, manifest)
    with pytest.raises(ValueError, match=r"manifest\.json is not a dataset's manifest, or damaged .*precious"):
        open_source(s3_folder, "train").open_shard(0)
    assert precious.read_text() == "mine"


def test_damaged_object_is_named(s3_folder: str, cache: Path) -> None:
    write_dataset(s3_folder, "train", sizes=(2, 2))
    path = store.join(s3_folder, "train", "shard-00001.tar")
    data = bytearray(store.read_bytes(path))
    data[600] ^= 1
    store.publish(path, bytes(data))
    with pytest.raises(ValueError, match=r"s3://.*shard-00001\.tar is damaged"):
        list(iter_clips(open_source(s3_folder, "train")))
    store.remove(path)
    with pytest.raises(ValueError, match=r"s3://.*shard-00001\.tar is missing"):
        list(iter_clips(open_source(s3_folder, "train")))
    with pytest.raises(ValueError, match="not a dataset folder"):
        open_source(store.join(s3_folder, "other"), "train")
    assert os.path.isdir(cache)
