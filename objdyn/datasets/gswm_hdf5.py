"""Balls-Interaction and its sister sets as G-SWM's generator writes them: one HDF5 file per split.

``imgs`` uint8 (n, t, h, w, 3); ``positions`` (n, t, objects, 2) as (x, y), continuous in 0..w; ``present`` and
``in_camera`` (n, t, objects). Chunked and compressed files are read as well as plain ones.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import h5py
import numpy as np

from objdyn.clips import MAX_BYTES, NO_LIMITS, Clip, Limits, VideoError
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Fault, Found, Open, Video, cut_clips, is_hidden, natural_order

EXTENSIONS = (".hdf5", ".h5")


def find(listing: Sequence[str]) -> Found:
    """Every HDF5 file is a container of episodes, see ``scan``."""
    paths = sorted(
        (path for path in listing if path.lower().endswith(EXTENSIONS) and not is_hidden(path)), key=natural_order
    )
    return Found(tuple(Video(path, (path,)) for path in paths), ignored=len(listing) - len(paths))


def scan(container: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Found:
    """List the episodes of a file; a file of another layout, or of episodes beyond a limit, is a fault."""
    path = container.files[0]
    try:
        with open_file(path) as raw, h5py.File(raw, "r") as file:
            episodes, frames, height, width, _ = _dataset(file, "imgs").shape
            for name in ("imgs", "positions"):
                check_stored(name, _dataset(file, name))
            limits.check_frames(frames)
            limits.check_size(height, width)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        code = error.code if isinstance(error, VideoError) else "unreadable"
        message = f"{error}" if code.startswith("too-") else f"not an HDF5 file of G-SWM's layout: {error}"
        return Found((), 0, (Fault(path, code, message),))
    return Found(tuple(Video(f"{path}/{i}", (path,), (i, 0)) for i in range(episodes)), ignored=0)


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Read an episode once, so that damage in it is found.

    Raises:
        VideoError: it cannot be read.
    """
    imgs, _, _ = _episode(video, open_file)
    limits.on_frame()
    return dataclasses.replace(video, frames=len(imgs), height=imgs.shape[1], width=imgs.shape[2])


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Cut clips with positions, present and num_objects; the files have no rate, so ``fps`` is recorded.

    A ball counts as present where the file says so and, after a crop, while its centre is inside.

    Raises:
        ValueError: the episode cannot be read, or the crop leaves its frames.
    """
    imgs, positions, present = _episode(video, open_file)
    limits.on_frame()
    coordinates = preprocessing.positions(positions, *imgs.shape[1:3])
    if preprocessing.box(*imgs.shape[1:3]) != (0, 0, imgs.shape[2], imgs.shape[1]):
        present = present & (np.abs(coordinates) <= 1).all(axis=-1)

    def truth(indices: range) -> dict[str, np.ndarray]:
        seen = present[indices.start : indices.stop : indices.step]
        return {
            "positions": coordinates[indices.start : indices.stop : indices.step],
            "present": seen,
            "num_objects": np.asarray(seen.any(axis=0).sum(), np.int64),
        }

    yield from cut_clips(
        video, cuts, preprocessing, fps, lambda wanted: ((i, imgs[i]) for i in sorted(wanted) if i < len(imgs)), truth
    )


def _episode(video: Video, open_file: Open) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return imgs uint8 (t, h, w, 3), positions (t, n, 2) and present bool (t, n) of one episode."""
    try:
        with open_file(video.files[0]) as raw, h5py.File(raw, "r") as file:
            imgs = _dataset(file, "imgs")[video.part[0]]
            positions = _dataset(file, "positions")[video.part[0]]
            present = np.ones(positions.shape[:2], bool)
            for name in ("in_camera", "present"):
                if name in file:
                    present &= _dataset(file, name)[video.part[0]] > 0.5
    except (OSError, RuntimeError, KeyError, IndexError) as error:
        raise VideoError("unreadable", f"episode {video.part[0]} cannot be read: {error}") from error
    if not np.isfinite(positions).all():
        raise VideoError("bad-layout", f"episode {video.part[0]} has positions that are not finite")
    return imgs, positions, present


def check_stored(name: str, dataset: h5py.Dataset) -> None:
    """Raise VideoError where HDF5 would make up data that were never written: as many as the header likes to claim."""
    if dataset.chunks:
        shape = zip(dataset.shape, dataset.chunks, strict=True)
        wanted, stored = math.prod(-(-length // chunk) for length, chunk in shape), dataset.id.get_num_chunks()
    else:
        wanted, stored = dataset.nbytes, dataset.id.get_storage_size()
    if stored < wanted:
        unit = "chunks" if dataset.chunks else "bytes"
        raise VideoError("bad-layout", f"{name} {dataset.shape} holds {stored} of {wanted} {unit}; it is incomplete")


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    # A link or raw data outside of the file would read whatever path a stranger wrote into it.
    link = file.get(name, getlink=True)
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise VideoError("bad-layout", f"{name} is missing or lies outside of the file; keys are {', '.join(file)}")
    rank = {"imgs": 5, "positions": 4}.get(name, 3)
    per_episode = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
    chunk = int(np.prod(dataset.chunks or 0, dtype=np.int64)) * dataset.dtype.itemsize  # is unpacked as a whole
    if chunk > MAX_BYTES:
        raise VideoError("bad-layout", f"{name} comes in chunks of {chunk} bytes, more than {MAX_BYTES}")
    fits = dataset.ndim == rank and dataset.dtype.kind in "uifb" and per_episode <= MAX_BYTES and 0 not in dataset.shape
    if not fits or (name == "imgs" and (dataset.dtype != np.uint8 or dataset.shape[-1] != 3)):
        raise VideoError("bad-layout", f"{name} is {dataset.dtype} {dataset.shape}, which is not G-SWM's layout")
    if name != "imgs":
        frames = _dataset(file, "imgs").shape[:2]
        if dataset.shape[:2] != frames or (name == "positions" and dataset.shape[-1] != 2):
            raise VideoError("bad-layout", f"{name} is {dataset.shape}, imgs start with {frames}")
    return dataset
