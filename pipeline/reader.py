"""Shards to batches, in one deterministic order.

A ``Source`` is one split of a dataset folder (local or s3://) or of a simulator (``sim:NAME``). The order of training
samples is a function of the seed, the epoch and the manifest's counts, the same for any number of workers and on any
storage; see ``sample_order`` and ``TrainingReader``. What a manifest does not list is never looked at.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import mmap
import os
import queue
import re
import threading
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from torch import Tensor

from objdyn.clips import Clip, collate, from_sample, stack_truth
from objdyn.simulators import Episode, Simulator, simulator
from pipeline import store
from pipeline.config import LoaderConfig

SCHEMA = 1
"""Version of the dataset folder that this code reads."""
LEAST_CLIP = 1024
"""Bytes of a clip in a tar, at least: a header, and data."""
FETCHES = 4
"""Shards that a worker fetches side by side: one stream of object storage is far slower than a network."""
LOCKS = 16
"""Shards that one machine fetches side by side, at most."""
SIM_SHARD = 50
"""Episodes of one virtual shard of a simulator: its physics is computed at once."""

T = TypeVar("T")


class Shard(Protocol):
    """Some clips that are fetched together."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Key of clip ``i``."""
        ...

    def clip(self, i: int, start: int = 0, length: int | None = None, truth: Collection[str] | None = None) -> Clip:
        """Clip ``i``, or ``length`` frames of it from ``start``; ``truth`` names the truth to decode (None: all)."""
        ...


class Source(Protocol):
    """One split of a dataset."""

    @property
    def id(self) -> str:
        """SHA-256 of the manifest, or ``sim:NAME/split``."""
        ...

    @property
    def split(self) -> str: ...

    @property
    def shard_names(self) -> tuple[str, ...]:
        """Name of each shard without its suffix: ``shard-00000``."""
        ...

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Clips in each shard."""
        ...

    @property
    def num_frames(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def fetch(self, shard: int) -> None:
        """Bring a shard to the local disk, if it is not there."""
        ...

    def keys(self, shard: int) -> tuple[str, ...]:
        """Keys of the clips of a shard, in order; does not fetch it."""
        ...

    def open_shard(self, shard: int) -> Shard: ...


def open_source(data: str, split: str, *, loader: LoaderConfig | None = None) -> Source:
    """Open one split of a dataset folder, an s3:// URL or ``sim:NAME``.

    Raises:
        ValueError: there is no such dataset, split or simulator, or its manifest is damaged; the message says what to
            do.
    """
    if data.startswith("sim:"):
        return _SimSource(data, split)
    return _FolderSource(data, split, loader or LoaderConfig())


def has_split(data: str, split: str) -> bool:
    """Tell whether a dataset has a split."""
    if data.startswith("sim:"):
        return split in _simulator(data).episodes_per_split
    return store.exists(store.join(data, split, "manifest.json"))


def sample_order(shard_sizes: Sequence[int], seed: int, epoch: int, window_shards: int) -> np.ndarray:
    """Return one epoch's samples as rows (shard, index), int64 (n, 2).

    The shards are permuted and cut into windows of ``window_shards``; the samples of a window are permuted together.
    So each sample comes once, and no more than ``window_shards`` shards are in use at a time. The permutations sort raw
    output of the counter-based generator Philox with the key (seed, epoch), which no library version changes.
    """
    order = _EpochOrder(shard_sizes, seed, epoch, window_shards)
    return np.concatenate([np.zeros((0, 2), np.int64), *map(order.window, range(order.num_windows))])


class _EpochOrder:
    """``sample_order`` a window at a time: an epoch of 10^8 samples would take 1.6 GB, and its windows are independent.

    A window's raw numbers begin where those of the shards and of the windows before it end, and Philox can go there.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, epoch: int, window_shards: int) -> None:
        self._key = np.array([seed, epoch], dtype=np.uint64)
        self._window_shards = window_shards
        self._shards = np.argsort(self._raw(0, len(shard_sizes)), kind="stable")
        self._sizes = np.asarray(shard_sizes, np.int64)[self._shards]
        ends = np.cumsum(self._sizes)[window_shards - 1 :: window_shards].tolist()
        self.num_windows = -(-len(shard_sizes) // window_shards)
        self._begins = [0, *ends][: self.num_windows]
        self._recent = functools.lru_cache(maxsize=3)(self.window)

    def window(self, number: int) -> np.ndarray:
        """Samples of one window as rows (shard, index)."""
        some = slice(number * self._window_shards, (number + 1) * self._window_shards)
        shards, sizes = self._shards[some], self._sizes[some]
        firsts = np.cumsum(sizes) - sizes
        rows = np.stack([np.repeat(shards, sizes), np.arange(sizes.sum()) - np.repeat(firsts, sizes)], axis=1)
        raw = self._raw(len(self._shards) + self._begins[number], len(rows))
        return rows[np.argsort(raw, kind="stable")]

    def sample(self, place: int) -> tuple[int, int]:
        """Shard and index of a sample."""
        number = bisect_right(self._begins, place) - 1
        shard, index = self._recent(number)[place - self._begins[number]].tolist()
        return shard, index

    def coming(self, place: int) -> np.ndarray:
        """The shard of each sample from a place to the end of the window after its own."""
        number = bisect_right(self._begins, place) - 1
        here = self._recent(number)[place - self._begins[number] :, 0]
        return here if number + 1 == self.num_windows else np.concatenate([here, self._recent(number + 1)[:, 0]])

    def _raw(self, first: int, count: int) -> np.ndarray:
        philox = np.random.Philox(key=self._key)
        philox.advance(first // 4)  # a step of its counter gives four numbers
        philox.random_raw(first % 4)
        return philox.random_raw(count)


def window_start(seed: int, epoch: int, key: str, num_frames: int, length: int) -> int:
    """Return where the training window of ``length`` frames starts inside a clip: uniform, from (seed, epoch, key)."""
    return _hash(seed, epoch, key) % (num_frames - length + 1)


class MicroBatch(NamedTuple):
    """What one forward pass on one worker takes."""

    frames: Tensor
    """uint8 (b, t, c, h, w)."""
    keys: tuple[str, ...]
    starts: tuple[int, ...]
    """First frame of each window inside its clip."""
    inputs: dict[str, Tensor]
    """Truth that the family takes as input, one row per clip."""
    seed: int
    """For torch, from (seed, epoch, global position of the first sample)."""


class TrainingReader:
    """Training windows in one global order, of which each worker reads its part.

    The stream of samples is epoch 0, then epoch 1, and so on; a batch may hold the end of one epoch and the start of
    the next, so nothing is dropped. The batch of an optimiser step is the next ``batch_size`` samples; slice j of
    ``micro_batch_size`` samples in it belongs to worker j % ``world``. Hence the batches, and where each window starts,
    do not depend on the number of workers, and the position alone says where to go on.

    Args:
        source: the split to train on.
        clip_frames: length of a training window.
        batch_size: clips per optimiser step over all workers.
        micro_batch_size: clips per forward pass on one worker.
        seed: seed of the order and of the windows.
        loader: window, prefetch and cache.
        inputs: names of the truth to deliver beside the frames, as ``clips.stack_truth`` takes them.
        rank: this worker.
        world: number of workers.

    Raises:
        ValueError: the stored clips are shorter than ``clip_frames``, or the sizes do not divide.
    """

    def __init__(
        self,
        source: Source,
        *,
        clip_frames: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        loader: LoaderConfig,
        inputs: Sequence[str] | Mapping[str, str] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 1 <= clip_frames <= source.num_frames:
            raise ValueError(
                f"clip_frames={clip_frames} is asked for training windows, but the clips of split {source.split!r} "
                f"hold {source.num_frames} frames; lower clip_frames, or make the dataset with make_shards.py "
                f"--frames {clip_frames} or more"
            )
        if batch_size % (micro_batch_size * world) != 0 or not 0 <= rank < world:
            raise ValueError(
                f"{world} workers (this is {rank}) with micro-batches of {micro_batch_size} clips do not divide "
                f"batch_size={batch_size}; choose sizes that divide"
            )
        if sum(source.shard_sizes) == 0:
            raise ValueError(
                f"split {source.split!r} of dataset {source.id} has no clips; there is nothing to train on"
            )
        self._source = source
        self._num_clips = sum(source.shard_sizes)
        self._clip_frames = clip_frames
        self._batch = batch_size
        self._micro = micro_batch_size
        self._seed = seed
        self._loader = loader
        self._inputs = inputs
        self._rank = rank
        self._world = world

    @property
    def num_clips(self) -> int:
        """Clips of the split, that is samples per epoch."""
        return self._num_clips

    def micro_batches(self, position: int = 0) -> Generator[MicroBatch, None, None]:
        """Yield this worker's micro-batches for ever, from global sample ``position`` on.

        Clips are decoded by one thread, ``loader.prefetch`` micro-batches ahead; what it raises is raised here. Closing
        the iterator ends the thread.

        Raises:
            ValueError: ``position`` is not the start of a batch; a shard is damaged.
        """
        if position < 0 or position % self._batch != 0:
            raise ValueError(f"position must be a multiple of batch_size={self._batch}, got {position}")
        batches = self._read(position)
        return _ahead(batches, self._loader.prefetch) if self._loader.prefetch else batches

    def _read(self, position: int) -> Generator[MicroBatch, None, None]:
        shards = _OpenShards(self._source, self._loader.window_shards)
        epochs = functools.lru_cache(maxsize=2)(self._epoch)
        try:
            while True:
                for j in range(self._rank, self._batch // self._micro, self._world):
                    yield self._micro_batch(position + j * self._micro, shards, epochs)
                position += self._batch
        finally:
            shards.close()

    def _epoch(self, epoch: int) -> _EpochOrder:
        return _EpochOrder(self._source.shard_sizes, self._seed, epoch, self._loader.window_shards)

    def _micro_batch(self, position: int, shards: "_OpenShards", epochs: Callable[[int], _EpochOrder]) -> MicroBatch:
        clips, starts = [], []
        for sample in range(position, position + self._micro):
            epoch, place = divmod(sample, self.num_clips)
            number, i = epochs(epoch).sample(place)
            shard = shards.get(number, epochs(epoch), place)
            start = window_start(self._seed, epoch, shard.key(i), self._source.num_frames, self._clip_frames)
            clips.append(shard.clip(i, start, self._clip_frames, self._inputs))
            starts.append(start)
        return MicroBatch(
            frames=collate(clips),
            keys=tuple(clip.key for clip in clips),
            starts=tuple(starts),
            inputs=stack_truth(clips, self._inputs),
            seed=_hash(self._seed, position // self.num_clips, position) >> 1,
        )


def iter_clips(
    source: Source, limit: int | None = None, length: int | None = None, truth: Collection[str] | None = None
) -> Iterator[Clip]:
    """Yield a split's clips in the manifest's order, whole or their first ``length`` frames: for evaluation.

    ``truth`` names the truth to decode (None: all).

    Raises:
        ValueError: the clips are shorter than ``length``.
    """
    if length is not None and not 1 <= length <= source.num_frames:
        raise ValueError(
            f"{length} frames are asked of each clip, but the clips of split {source.split!r} hold {source.num_frames}"
        )
    left = sum(source.shard_sizes) if limit is None else limit
    for number, size in enumerate(source.shard_sizes):
        if left <= 0:
            return
        shard = source.open_shard(number)
        for i in range(min(size, left)):
            yield shard.clip(i, 0, length, truth)
        left -= size


class _OpenShards:
    """The shards in use, ``window`` + 1 at most; the next window is fetched ahead by threads of its own."""

    def __init__(self, source: Source, window: int) -> None:
        self._source = source
        self._window = window
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._asked: set[int] = set()
        self._fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="objdyn-fetch")

    def get(self, number: int, order: _EpochOrder, place: int) -> Shard:
        """Return a shard, for the sample at a place of an epoch's order."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) > self._window:
            self._open.popitem(last=False)
        coming = order.coming(place)
        _, first = np.unique(coming, return_index=True)
        ahead = [int(s) for s in coming[np.sort(first)] if int(s) not in self._open][1 : self._window + 1]
        for wanted in ahead:
            if wanted not in self._asked:
                # Errors are not lost: open_shard meets the same one when the shard's turn comes, and raises it.
                self._fetching.submit(self._source.fetch, wanted)
        self._asked = set(ahead)
        self._open[number] = self._source.open_shard(number)
        return self._open[number]

    def close(self) -> None:
        """End the threads and let the shards go."""
        self._fetching.shutdown(cancel_futures=True)
        self._open.clear()


def _ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Compute ``items`` in a thread, at most ``depth`` of them ahead of the one that the caller holds."""
    results: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()
    free = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            while free.acquire() and not stop.is_set():
                results.put((next(items), None))
        except BaseException as error:
            results.put((None, error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="objdyn-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            free.release()
            yield cast(T, item)
    finally:
        stop.set()
        free.release()
        thread.join()


def _hash(*parts: int | str) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def _simulator(data: str) -> Simulator:
    return simulator(data.removeprefix("sim:"))


class _SimSource:
    """One split of a simulator in virtual shards of ``SIM_SHARD`` episodes."""

    def __init__(self, data: str, split: str) -> None:
        self._simulator = _simulator(data)
        episodes = self._simulator.episodes_per_split
        if split not in episodes:
            raise ValueError(f"{data} has no split {split!r}; it has {', '.join(episodes)}")
        self.id = f"sim:{self._simulator.name}/{split}"
        self.split = split
        self.shard_sizes = tuple(
            min(SIM_SHARD, episodes[split] - first) for first in range(0, episodes[split], SIM_SHARD)
        )
        self.shard_names = tuple(f"shard-{number:05d}" for number in range(len(self.shard_sizes)))
        self.num_frames = self._simulator.num_frames
        self.height, self.width = self._simulator.height, self._simulator.width

    def fetch(self, shard: int) -> None:
        """Do nothing: there are no files."""

    def keys(self, shard: int) -> tuple[str, ...]:
        shard_of = self.open_shard(shard)
        return tuple(map(shard_of.key, range(len(shard_of))))

    def open_shard(self, shard: int) -> Shard:
        first, count = shard * SIM_SHARD, self.shard_sizes[shard]
        return _SimShard(self._simulator.episodes(self.split, first, count, None))


class _SimShard:
    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._episodes = episodes

    def __len__(self) -> int:
        return len(self._episodes)

    def key(self, i: int) -> str:
        return self._episodes[i].key

    def clip(self, i: int, start: int = 0, length: int | None = None, truth: Collection[str] | None = None) -> Clip:
        clip = self._episodes[i].clip(start, length)
        if truth is None:
            return clip
        return dataclasses.replace(clip, truth={name: clip.truth[name] for name in truth if name in clip.truth})


class _Listed(NamedTuple):
    """One file as a manifest lists it."""

    name: str
    bytes: int
    sha256: str
    samples: int


class _FolderSource:
    """One split of a dataset folder, local or s3://."""

    def __init__(self, data: str, split: str, loader: LoaderConfig) -> None:
        self._folder = store.join(data, split)
        self._cache = _Cache(int(loader.cache_gb * 1e9))
        self._verified: set[tuple[int, ...]] = set()
        self._index_lock = threading.Lock()
        path = store.join(self._folder, "manifest.json")
        try:
            manifest = store.read_bytes(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(_no_dataset(data, split)) from None
        self.id = hashlib.sha256(manifest).hexdigest()
        self.split = split
        fields = store.parse_json(manifest, path)
        try:
            if (fields["schema"], fields["kind"]) != (SCHEMA, "dataset"):
                raise ValueError(f"schema {fields['schema']} of kind {fields['kind']!r}, this version reads {SCHEMA}")
            if fields["split"] != split:
                raise ValueError(f"it is of split {fields['split']!r}")
            self.num_frames, self.height, self.width = (int(fields[name]) for name in ("frames", "height", "width"))
            self._shape = (self.num_frames, self.height, self.width, int(fields["channels"]))
            self._shards = [_listed(entry["name"], entry, int(entry["samples"])) for entry in fields["shards"]]
            index = _listed("index.parquet", fields["index"], 0)
            if sum(shard.samples for shard in self._shards) != fields["clips"]:
                raise ValueError(f"its shards do not add up to {fields['clips']} clips")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a dataset's manifest, or damaged ({error!r}); restore it or make the dataset again"
            ) from error
        if sum(shard.samples for shard in self._shards) == 0:
            raise ValueError(f"{self._folder} holds no clips; its quarantine.parquet says why inputs were left out")
        self.shard_sizes = tuple(shard.samples for shard in self._shards)
        self.shard_names = tuple(shard.name.removesuffix(".tar") for shard in self._shards)
        self._index = self._open_index(index)

    def fetch(self, shard: int) -> None:
        self._map(self._shards[shard])

    def keys(self, shard: int) -> tuple[str, ...]:
        with self._index_lock:
            return tuple(self._index.read_row_group(shard, columns=["key"])["key"].to_pylist())

    def open_shard(self, shard: int) -> Shard:
        listed = self._shards[shard]
        path = store.join(self._folder, listed.name)
        data = self._map(listed)
        with self._index_lock:
            if self._index.metadata.row_group(shard).num_rows != listed.samples:  # before it is unpacked
                raise ValueError(f"{self._folder}/index.parquet does not fit {listed.name}; make the dataset again")
            rows = self._index.read_row_group(shard, columns=["shard", "key", "members"]).to_pydict()
        members = [{m["name"]: (m["offset"], m["size"]) for m in members} for members in rows["members"]]
        inside = all(0 <= start <= start + size <= len(data) for places in members for start, size in places.values())
        if len(members) != listed.samples or set(rows["shard"]) - {listed.name} or not inside:
            raise ValueError(f"{self._folder}/index.parquet does not fit {listed.name}; make the dataset again")
        return _FolderShard(path, data, rows["key"], members, self._shape)

    def _open_index(self, listed: _Listed) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = store.join(self._folder, listed.name)
        try:
            index = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self._map(listed))))
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not a Parquet file ({error}); make the dataset again") from error
        if index.num_row_groups != len(self._shards):
            raise ValueError(
                f"{path} has {index.num_row_groups} row groups for {len(self._shards)} shards; make the dataset again"
            )
        return index

    def _map(self, listed: _Listed) -> mmap.mmap:
        """Map a file into memory, after it was checked against its size and SHA-256 once."""
        path = store.join(self._folder, listed.name)
        if not store.is_url(path):
            return self._map_local(path, path, listed)
        try:
            return self._map_local(self._cache.fetch(path, listed.sha256), path, listed)
        except ValueError:
            # The copy in the cache may be what is damaged, or another process has evicted it just now.
            self._cache.drop(listed.sha256)
            return self._map_local(self._cache.fetch(path, listed.sha256), path, listed)

    def _map_local(self, path: str, shown: str, listed: _Listed) -> mmap.mmap:
        try:
            with store.open_local(path) as file:
                status = os.fstat(file.fileno())
                if status.st_size != listed.bytes or status.st_size == 0:
                    raise ValueError(
                        f"{shown} is damaged: it has {status.st_size} bytes, the manifest says {listed.bytes}; "
                        "restore it or make the dataset again"
                    )
                state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                # What is about to be hashed is mapped at once, not by a fault for every few pages.
                populate = 0 if state in self._verified else getattr(mmap, "MAP_POPULATE", 0)
                data = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | populate, mmap.PROT_READ)
        except FileNotFoundError:
            raise ValueError(f"{shown} is missing, but the manifest lists it; restore it") from None
        if state not in self._verified:
            if hashlib.sha256(data).hexdigest() != listed.sha256:
                raise ValueError(
                    f"{shown} is damaged: its SHA-256 is not the one in the manifest; "
                    "restore it or make the dataset again"
                )
            self._verified.add(state)
        return data


class _FolderShard:
    def __init__(
        self,
        path: str,
        data: mmap.mmap,
        keys: Sequence[str],
        members: Sequence[Mapping[str, tuple[int, int]]],
        shape: tuple[int, ...],
    ) -> None:
        self._path = path
        self._data = memoryview(data)
        self._keys = keys
        self._members = members
        self._shape = shape

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def clip(self, i: int, start: int = 0, length: int | None = None, truth: Collection[str] | None = None) -> Clip:
        members = {
            name: self._data[offset : offset + size]
            for name, (offset, size) in self._members[i].items()
            if truth is None or name == "json" or name.startswith("frames.") or name.removesuffix(".npy") in truth
        }
        try:
            clip = from_sample(self._keys[i], members)
            if clip.frames.shape != self._shape:
                raise ValueError(f"clip {clip.key} is {clip.frames.shape}, the manifest says {self._shape}")
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from error
        if start == 0 and length is None:
            return clip
        return clip.window(start, len(clip.frames) - start if length is None else length)


class _Cache:
    """Files of object storage on the local disk, named by their SHA-256, shared by all processes of a user.

    Files that were used longest ago go first; the newest stays even if it is larger than the limit by itself.
    """

    def __init__(self, limit: int) -> None:
        above = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self._folder = os.path.join(above, "objdyn", "shards")
        self._limit = limit

    def fetch(self, url: str, sha256: str) -> str:
        """Return the path of a local copy."""
        path = os.path.join(self._folder, sha256)
        if not os.path.exists(path):
            os.makedirs(self._folder, exist_ok=True)
            with self._lock(sha256):
                if not os.path.exists(path):
                    try:
                        store.fetch(url, path)
                    except FileNotFoundError:
                        raise ValueError(f"{url} is missing, but the manifest lists it; restore it") from None
            with self._lock():
                self._evict(path)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))  # the time of use; not all disks keep it
        return path

    @contextlib.contextmanager
    def _lock(self, sha256: str = "", wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a file, which some share, or of the folder; False if it would have to ``wait``."""
        name = f".lock-{zlib.crc32(sha256.encode()) % LOCKS}" if sha256 else ".lock"
        with open(os.path.join(self._folder, name), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def drop(self, sha256: str) -> None:
        """Remove a copy."""
        store.remove(os.path.join(self._folder, sha256))

    def _evict(self, newest: str) -> None:
        files: list[tuple[int, int, str]] = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".tmp"):
                with self._lock(entry.name.split(".")[1], wait=False) as alone:
                    if alone:  # left by a killed process: who holds the lock is the only writer
                        store.remove(entry.path)
            elif not entry.name.startswith(".lock"):
                with contextlib.suppress(FileNotFoundError):  # dropped by another process since it was listed
                    status = entry.stat()
                    files.append((status.st_atime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > self._limit and path != newest:
                store.remove(path)
                total -= size


def _listed(name: str, entry: Mapping[str, Any], samples: int) -> _Listed:
    if not store.is_plain_name(name):
        raise ValueError(f"{name!r} cannot be a file of this folder")
    size, sha256 = entry["bytes"], entry["sha256"]
    if type(size) is not int or not re.fullmatch(r"[0-9a-f]{64}", sha256):  # which names a file of the cache
        raise ValueError(f"{name} has bytes {size!r} and sha256 {sha256!r}")
    if not 0 <= samples <= size // LEAST_CLIP:
        raise ValueError(f"{name} of {size} bytes cannot hold {samples} clips")
    return _Listed(name, size, sha256, samples)


def _no_dataset(data: str, split: str) -> str:
    if store.exists(store.join(data, "manifest.json")):
        return f"{data} is one split of a dataset; give the folder above it"
    splits = [name for name in store.list_names(data) if has_split(data, name)]
    if splits:
        return f"{data} has no split {split!r}; it has {', '.join(splits)}"
    return (
        f"{data} is not a dataset folder (no {split}/manifest.json); correct the path, or make it with "
        f"jobs/make_shards.py --source VIDEOS --out {data} --split {split}"
    )
