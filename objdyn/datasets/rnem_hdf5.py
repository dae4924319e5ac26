"""Bouncing Balls as R-NEM's authors store it: one HDF5 file with the groups training, validation and test.

Each group holds ``features`` (t, n, h, w, c) with values in [0, 1], time first, c = 1 (which is repeated to three) or
3, and may hold ``groups`` (t, n, h, w, 1), 0 for the background and k for ball k, and ``collisions`` (t, n, h, w, 1),
the pixels of balls that collide. One video is one index of the second axis and is read by itself: the original file has
13 GB.

Source: the data loader of R-NEM (van Steenkiste et al., ICLR 2018). Differs: a file need not have all three groups.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import h5py
import numpy as np

from objdyn.clips import MAX_BYTES, NO_LIMITS, SINGLE_CHANNEL, Clip, Limits, VideoError
from objdyn.datasets.gswm_hdf5 import EXTENSIONS, check_stored
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Fault, Found, Open, Video, cut_clips, is_hidden, natural_order

SPLITS = {"train": "training", "val": "validation", "test": "test"}
"""The group of each split."""
_DATASETS = ("features", "groups", "collisions")
_BLOCK = 64  # videos by which a growing file is extended


class _Arrays(NamedTuple):
    """One video."""

    frames: np.ndarray
    """uint8 (t, h, w, 3)."""
    channels: int
    """In the file."""
    segmentation: np.ndarray | None
    """uint8 (t, h, w)."""
    collisions: np.ndarray | None
    """bool (t, h, w)."""


def find(listing: Sequence[str]) -> Found:
    """Every group of every HDF5 file is a container of videos, see ``scan``; whether it is there, the file tells."""
    paths = sorted(
        (path for path in listing if path.lower().endswith(EXTENSIONS) and not is_hidden(path)), key=natural_order
    )
    videos = tuple(Video(f"{path}/{group}", (path,)) for path in paths for group in SPLITS.values())
    return Found(videos, ignored=len(listing) - len(paths))


def scan(container: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Found:
    """List the videos of a group; one of another layout, or of videos beyond a limit, is a fault."""
    try:
        with open_file(container.files[0]) as raw, h5py.File(raw, "r") as file:
            datasets = _datasets(file, _group(container.source))
            for name, dataset in datasets.items():
                check_stored(name, dataset)
            frames, videos, height, width, _ = datasets["features"].shape
            limits.check_frames(frames)
            limits.check_size(height, width)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        code = error.code if isinstance(error, VideoError) else "unreadable"
        message = f"{error}" if code.startswith("too-") else f"not an HDF5 file of R-NEM's layout: {error}"
        return Found((), 0, (Fault(container.source, code, message),))
    return Found(tuple(Video(f"{container.source}/{i}", container.files, (i, 0)) for i in range(videos)), ignored=0)


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Read a video once, so that damage in it is found; a single channel is noted.

    Raises:
        VideoError: it cannot be read.
    """
    frames, channels, *_ = _read(video, open_file)
    limits.on_frame()
    note = SINGLE_CHANNEL if channels == 1 else ""
    return dataclasses.replace(video, frames=len(frames), height=frames.shape[1], width=frames.shape[2], note=note)


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Cut clips, with ``segmentation``, ``num_objects`` and ``collisions`` as far as the file has them.

    ``num_objects`` counts the balls that are seen in the clip. Labels are resized to their nearest pixel. The files
    have no rate, so ``fps`` is recorded.

    Raises:
        ValueError: the video cannot be read, or the crop leaves its frames.
    """
    arrays = _read(video, open_file)
    limits.on_frame()
    nearest = dataclasses.replace(preprocessing, filter="nearest")

    def truth(indices: range) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        if arrays.segmentation is not None:
            labels = np.stack([nearest.apply(arrays.segmentation[i]) for i in indices])
            found["segmentation"] = labels
            found["num_objects"] = np.asarray(np.count_nonzero(np.unique(labels)), np.int64)
        if arrays.collisions is not None:
            found["collisions"] = np.stack([nearest.apply(arrays.collisions[i].astype(np.uint8)) > 0 for i in indices])
        return found

    def images(wanted: frozenset[int]) -> Iterator[tuple[int, np.ndarray]]:
        return ((i, arrays.frames[i]) for i in sorted(wanted) if i < len(arrays.frames))

    yield from cut_clips(video, cuts, preprocessing, fps, images, truth)


def write_rnem_hdf5(path: str | os.PathLike[str], clips: Mapping[str, Iterable[Clip]]) -> None:
    """Write clips of some splits (train, val, test) as a file of this layout, chunked by video and compressed.

    Frames of white on black become one channel of 0 and 1, others three channels of uint8. The truth ``segmentation``
    and ``collisions`` is written where the clips have it, other truth has no place in this layout.

    Raises:
        ValueError: there is no such split, a split has no clips, or its clips differ in shape or truth.
    """
    with h5py.File(path, "w") as file:
        for split, each in clips.items():
            if split not in SPLITS:
                raise ValueError(f"R-NEM's files have the splits {', '.join(SPLITS)}, got {split!r}")
            _write_group(file.create_group(SPLITS[split]), split, each)


def _write_group(group: h5py.Group, split: str, clips: Iterable[Clip]) -> None:
    datasets: dict[str, h5py.Dataset] = {}
    count = 0
    for count, clip in enumerate(clips, 1):
        arrays = {"features": clip.frames}
        for name, stored in (("segmentation", "groups"), ("collisions", "collisions")):
            if name in clip.truth:
                arrays[stored] = clip.truth[name].astype(np.uint8)[..., None]
        if not datasets:
            if np.isin(clip.frames, (0, 255)).all() and (clip.frames == clip.frames[..., :1]).all():
                channels = 1
            else:
                channels = clip.frames.shape[-1]
            for name, array in arrays.items():
                t, h, w, c = array.shape
                c = channels if name == "features" else c
                datasets[name] = group.create_dataset(
                    name, (t, 0, h, w, c), np.uint8, maxshape=(t, None, h, w, c), chunks=(t, 1, h, w, c),
                    compression="gzip", compression_opts=1,
                )  # fmt: skip
        if arrays.keys() != datasets.keys():
            raise ValueError(f"clip {clip.key} has {', '.join(arrays)}, those before have {', '.join(datasets)}")
        for name, array in arrays.items():
            dataset = datasets[name]
            if name == "features" and dataset.shape[-1] == 1:
                if not np.isin(array, (0, 255)).all() or (array != array[..., :1]).any():
                    raise ValueError(f"clip {clip.key} is not white on black, as the first clip of {split} is")
                array = array[..., :1] // 255
            if array.shape != (dataset.shape[0], *dataset.shape[2:]):
                raise ValueError(f"{name} of clip {clip.key} is {array.shape}, those before fill {dataset.shape}")
            if count > dataset.shape[1]:
                dataset.resize(count - 1 + _BLOCK, axis=1)
            dataset[:, count - 1] = array
    if not count:
        raise ValueError(f"split {split} has no clips; leave it out")
    for dataset in datasets.values():
        dataset.resize(count, axis=1)


def _read(video: Video, open_file: Open) -> _Arrays:
    number = video.part[0]
    try:
        with open_file(video.files[0]) as raw, h5py.File(raw, "r") as file:
            datasets = _datasets(file, _group(video.source.rpartition("/")[0]))
            arrays = {name: dataset[:, number] for name, dataset in datasets.items()}
    except (OSError, RuntimeError, KeyError, IndexError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError("unreadable", f"video {number} cannot be read: {error}") from error
    for name, array in arrays.items():
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise VideoError("bad-layout", f"{name} of video {number} has values that are no pixels")
    features = arrays["features"]
    # The authors store 0 and 1 as floats, others as bytes: those above 1 can only be grey levels.
    scale = 255 if features.max() <= 1 else 1
    if scale == 1 and features.dtype.kind == "f":
        raise VideoError("bad-layout", f"features of video {number} are floats up to {features.max():g}, not in [0, 1]")
    frames = np.rint(features.astype(np.float32) * scale).astype(np.uint8)
    frames = np.ascontiguousarray(np.broadcast_to(frames, (*frames.shape[:-1], 3)))
    groups, collisions = arrays.get("groups"), arrays.get("collisions")
    return _Arrays(
        frames,
        features.shape[-1],
        None if groups is None else np.rint(groups[..., 0]).astype(np.uint8),
        None if collisions is None else collisions[..., 0] > 0.5,
    )


def _group(source: str) -> str:
    return source.rpartition("/")[2]


def _datasets(file: h5py.File, group: str) -> dict[str, h5py.Dataset]:
    link = file.get(group, getlink=True)
    holder = file[group] if isinstance(link, h5py.HardLink) else None
    if not isinstance(holder, h5py.Group):
        raise VideoError("bad-layout", f"group {group} is missing; keys are {', '.join(file)}")
    found: dict[str, h5py.Dataset] = {}
    for name in _DATASETS:
        # A link or raw data outside of the file would read whatever path a stranger wrote into it.
        link = holder.get(name, getlink=True)
        if link is None and name != "features":
            continue
        dataset = holder[name] if isinstance(link, h5py.HardLink) else None
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
            raise VideoError("bad-layout", f"{group}/{name} is missing or lies outside of the file")
        shape = dataset.shape
        fits = len(shape) == 5 and dataset.dtype.kind in "uifb" and 0 not in shape
        if not fits or shape[4] not in ((1, 3) if name == "features" else (1,)):
            raise VideoError("bad-layout", f"{group}/{name} is {dataset.dtype} {shape}, not (t, n, h, w, channels)")
        if dataset.nbytes // shape[1] > MAX_BYTES or (
            dataset.chunks and np.prod(dataset.chunks, dtype=np.int64) * dataset.dtype.itemsize > MAX_BYTES
        ):
            raise VideoError("too-large", f"a video of {group}/{name} {shape} takes more than {MAX_BYTES} bytes")
        if shape[:4] != found.get("features", dataset).shape[:4]:
            raise VideoError("bad-layout", f"{group}/{name} is {shape}, features are {found['features'].shape}")
        found[name] = dataset
    return found
