"""Long recordings as bare arrays: each ``.npy`` file is one video, uint8 (n, h, w, 3). DDLP's Traffic is one such file.

Frames lie in the file one after the other without compression, so a reader seeks to those it wants and holds one at a
time, from a disk or from object storage. That is what a memory map does, but of a file that has become shorter a map
kills the process. Nothing that is read runs code: arrays of Python objects (pickles) are refused by their header.

Source of the split by time: DDLP (Daniel & Tamar, TMLR 2024), released code, class ``TrafficDataset``.
"""

import dataclasses
import io
import math
import tokenize
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from objdyn.clips import NO_LIMITS, NPY_HEADER, Clip, Limits, VideoError
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Found, Open, Video, cut_clips, is_hidden, natural_order

EXTENSIONS = (".npy",)
TIMES = {"train": (0, 8), "val": (8, 9), "test": (9, 10)}
"""Tenths of a recording that each split is: where it starts, and where it stops."""


def find(listing: Sequence[str]) -> Found:
    """Every npy file is one video, in natural order of its path."""
    paths = sorted(
        (path for path in listing if path.lower().endswith(EXTENSIONS) and not is_hidden(path)), key=natural_order
    )
    return Found(tuple(Video(path, (path,)) for path in paths), ignored=len(listing) - len(paths))


def span_of(split: str, frames: int) -> tuple[int, int]:
    """First frame of a split in a recording of ``frames``, and the one after its last.

    The first 80 % are ``train``, the next 10 % ``val``, the rest ``test``; any other split is all of it.
    """
    first, last = TIMES.get(split, (0, 10))
    return first * frames // 10, last * frames // 10


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Check the header against the size of the file; bytes after the array are noted.

    Raises:
        VideoError: it is no npy file, holds something else than uint8 (n, h, w, 3) in C order or less than its header
            claims, or passes a limit.
    """
    with open_file(video.files[0]) as file:
        limits.check_bytes(file)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        shape = _header(file)
        limits.check_frames(shape[0])
        limits.check_size(*shape[1:3])
        missing = file.tell() + math.prod(shape) - size
    if missing > 0:
        raise VideoError("truncated", f"it claims uint8 {shape}, of which the last {missing} bytes are missing")
    limits.on_frame()
    note = f"{-missing} bytes follow the array" if missing else ""
    return dataclasses.replace(video, frames=shape[0], height=shape[1], width=shape[2], note=note)


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Cut clips; the files have no rate, so ``fps`` is recorded.

    Raises:
        ValueError: the array is not what ``probe`` saw, or the crop leaves its frames.
    """
    with open_file(video.files[0]) as file:
        shape = _header(file)
        if shape[:3] != (video.frames, video.height, video.width):
            raise VideoError("changed", f"it is uint8 {shape}, it had {video.frames} frames before")
        offset, size = file.tell(), math.prod(shape[1:])

        def images(wanted: frozenset[int]) -> Iterator[tuple[int, np.ndarray]]:
            for i in sorted(wanted):
                file.seek(offset + i * size)
                data = file.read(size)
                if len(data) < size:
                    raise VideoError("changed", f"frame {i} is incomplete, all were there before")
                limits.on_frame()
                yield i, np.frombuffer(data, np.uint8).reshape(shape[1:])

        yield from cut_clips(video, cuts, preprocessing, fps, images)


def read_header(file: IO[bytes], name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Read the header of an npy file: dtype and shape. ``file`` then stands at the first byte of the data.

    Raises:
        VideoError: it is damaged or no npy header, or the array holds Python objects or is in Fortran order.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, NPY_HEADER)
        elif version == (2, 0):
            if (length := int.from_bytes(file.read(4), "little")) > NPY_HEADER:  # of which numpy would read all
                raise ValueError(f"a header of {length} letters")
            file.seek(-4, io.SEEK_CUR)
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file, NPY_HEADER)
        else:
            raise ValueError(f"npy version {version[0]}.{version[1]}; 1.0 and 2.0 are read")
    except (ValueError, TypeError, EOFError, SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise VideoError("unreadable", f"{name} is no npy array ({error})") from error
    if dtype.hasobject:
        raise VideoError("bad-layout", f"{name} holds Python objects, which are never loaded; save it as an array")
    if fortran and len(shape) > 1:
        raise VideoError("bad-layout", f"{name} is in Fortran order; save np.ascontiguousarray of it")
    return dtype, shape


def _header(file: IO[bytes]) -> tuple[int, int, int, int]:
    dtype, shape = read_header(file, "it")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or min(shape) < 1:
        raise VideoError("bad-layout", f"it is {dtype} {shape}; uint8 (n, h, w, 3) is wanted")
    return shape[0], shape[1], shape[2], shape[3]
