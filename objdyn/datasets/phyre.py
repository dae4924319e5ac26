"""Roll-outs of the official PHYRE simulator (Bakhtin et al. 2019): each ``.npz`` file is one video with its truth.

``frames`` uint8 (t, h, w) are classes of colour, row 0 at the *bottom*; ``objects`` float32 (t, n, 14) are x, y, angle
and diameter in units of the frame's side, four columns that name the shape and six that name the colour. Other arrays
(``action``, ``solved``) are not read. Frames are made with PHYRE's palette; ``Preprocessing.inverted`` turns it into
that of DDLP's data, ``drop_last`` and ``pad_to`` trim as DDLP does, which drops the last 30 frames (the three seconds
after success, in which little moves) and repeats the last one left until there are 100.

Arrays are read from the archive one by one, their size known before memory is taken, and never by pickle.
"""

import dataclasses
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from objdyn.clips import MAX_BYTES, NO_LIMITS, Clip, Limits, VideoError
from objdyn.datasets import npy
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Found, Open, Video, cut_clips, is_hidden, natural_order

EXTENSIONS = (".npz",)
PALETTE = np.array(
    [(255, 255, 255), (243, 79, 70), (107, 206, 187), (24, 119, 242), (75, 74, 164), (185, 202, 210), (0, 0, 0)],
    np.uint8,
)
"""RGB of the classes: background, red, green, blue, purple, gray, black."""
BLACK = 6
"""Class of what never moves and is no goal."""
DROP_LAST, PAD_TO = 30, 100
"""DDLP's trimming."""
_COLOURS, _COLUMNS = slice(8, 14), 14


def find(listing: Sequence[str]) -> Found:
    """Every npz file is one video, in natural order of its path."""
    paths = sorted(
        (path for path in listing if path.lower().endswith(EXTENSIONS) and not is_hidden(path)), key=natural_order
    )
    return Found(tuple(Video(path, (path,)) for path in paths), ignored=len(listing) - len(paths))


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Read a roll-out once, so that damage in it is found; ``objects`` counts all, those that never move included.

    Raises:
        VideoError: it cannot be read, is of another layout, or passes a limit.
    """
    classes, objects = _rollout(video, open_file, limits)
    return dataclasses.replace(
        video, frames=len(classes), height=classes.shape[1], width=classes.shape[2], objects=objects.shape[1]
    )


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Cut clips with ``positions``, ``present`` and ``num_objects`` of the objects that are not black.

    Black objects are walls and obstacles that never move; they belong to the background. The others keep the order of
    the file. One counts as present while its centre is in the (cropped) frame. ``segmentation``, label k for object k
    of these from 1 on, is given where each of them has a colour of its own. The files have no rate, so ``fps`` is
    recorded.

    Raises:
        ValueError: the roll-out cannot be read, or the crop leaves its frames.
    """
    classes, objects = _rollout(video, open_file, limits)
    order = preprocessing.order(len(classes))
    colours = objects[0, :, _COLOURS].argmax(-1) + 1
    movable = np.flatnonzero(colours != BLACK)
    colours, height, width = colours[movable], *classes.shape[1:]
    points = objects[order][:, movable, :2].astype(np.float64) * (width, height)
    points[..., 1] = height - points[..., 1]  # y up becomes y down
    coordinates = preprocessing.positions(points, height, width)
    x0, y0, x1, y1 = preprocessing.box(height, width)
    present = np.all((points >= (x0, y0)) & (points <= (x1, y1)), axis=-1)
    labels = np.zeros(len(PALETTE), np.uint8)
    labels[colours] = np.arange(1, len(colours) + 1)
    distinct = len(set(colours.tolist())) == len(colours)
    nearest = dataclasses.replace(preprocessing, filter="nearest")

    def truth(indices: range) -> dict[str, np.ndarray]:
        cut = slice(indices.start, indices.stop, indices.step)
        found: dict[str, np.ndarray] = {
            "positions": coordinates[cut],
            "present": present[cut],
            "num_objects": np.asarray(present[cut].any(axis=0).sum(), np.int64),
        }
        if distinct:
            found["segmentation"] = np.stack([nearest.apply(labels[classes[i]]) for i in order[cut]])
        return found

    def images(wanted: frozenset[int]) -> Iterator[tuple[int, np.ndarray]]:
        return ((i, PALETTE[classes[order[i]]]) for i in sorted(wanted) if i < len(order))

    yield from cut_clips(video, cuts, preprocessing, fps, images, truth)


READING_FAILS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, RuntimeError, ValueError
)  # fmt: skip
"""What a damaged archive raises; NotImplementedError is a RuntimeError."""


def _rollout(video: Video, open_file: Open, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes uint8 (t, h, w), row 0 at the top, and objects float32 (t, n, 14) of one file."""
    try:
        with open_file(video.files[0]) as file:
            limits.check_bytes(file)
            with zipfile.ZipFile(file) as archive:
                classes = _array(archive, "frames", limits)
                objects = _array(archive, "objects", limits)
    except VideoError:
        raise
    except READING_FAILS as error:
        raise VideoError("unreadable", f"not an npz archive that can be read ({error})") from error
    if objects.shape[0] != len(classes) or not np.isfinite(objects).all():
        raise VideoError("bad-layout", f"objects {objects.shape} are not finite states of {len(classes)} frames")
    named = objects[..., _COLOURS]
    if not ((named == 0) | (named == 1)).all() or (named.sum(-1) != 1).any() or (named != named[:1]).any():
        raise VideoError("bad-layout", "objects do not each have one colour, the same in all frames")
    if classes.max() >= len(PALETTE):
        raise VideoError("bad-layout", f"frames have class {classes.max()}; PHYRE's are 0 to {len(PALETTE) - 1}")
    limits.on_frame()
    return classes[:, ::-1], objects


def _array(archive: zipfile.ZipFile, name: str, limits: Limits) -> np.ndarray:
    if f"{name}.npy" not in archive.namelist():
        raise VideoError("bad-layout", f"{name} is missing; it holds {', '.join(archive.namelist()[:5])}")
    with archive.open(f"{name}.npy") as member:
        dtype, shape = npy.read_header(member, name)
        if name == "frames":
            fits, wanted = dtype == np.uint8 and len(shape) == 3, "uint8 (t, h, w)"
        else:
            fits = dtype == np.float32 and len(shape) == 3 and shape[2] == _COLUMNS
            wanted = f"float32 (t, n, {_COLUMNS})"
        if not fits or min(shape) < 1:
            raise VideoError("bad-layout", f"{name} is {dtype} {shape}; {wanted} is wanted")
        limits.check_frames(shape[0])
        if name == "frames":
            limits.check_size(*shape[1:])
        size = math.prod(shape) * dtype.itemsize
        if size > MAX_BYTES:
            raise VideoError("too-large", f"{name} {shape} takes {size} bytes, more than {MAX_BYTES}")
        data = member.read(size)
        if len(data) < size or member.read(1):  # at the end of the member its checksum is compared
            raise VideoError("truncated", f"{name} claims {dtype} {shape}, which its data are not")
    return np.frombuffer(data, dtype).reshape(shape)
