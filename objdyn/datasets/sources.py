"""What every layout shares: a video that was found, why one cannot be used, and cutting clips from decoded frames."""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from objdyn.clips import Clip, VideoError
from objdyn.datasets.preprocessing import Preprocessing

Open = Callable[[str], BinaryIO]
"""Opens a path of the listing for reading, seekable; any storage can supply one."""


@dataclass(frozen=True)
class Video:
    """One video of a source; ``frames`` and what follows are known after ``probe``."""

    source: str
    """Name of the video: its path in the listing, or container/member."""
    files: tuple[str, ...]
    """Paths in the listing that hold it, in order of time."""
    part: tuple[int, int] = (0, 0)
    """Where it lies in a file that holds several: offset and size, or the episode's number; (0, 0) is all of it."""
    frames: int = 0
    """Frames that decode."""
    height: int = 0
    width: int = 0
    fps: float = 0.0
    """Frames per second; 0 where the source does not say."""
    keyframes: tuple[tuple[int, int], ...] = ()
    """Where a decoder may seek to, see ``clips.VideoInfo``."""
    note: str = ""
    """What is odd about it without making it unusable."""
    objects: int | None = None
    """Objects that its annotation lists; None where there is none."""
    visible: tuple[int, int] = (0, 0)
    """First frame, and the one after the last, of the part in which its annotation has every object in view."""


class Fault(NamedTuple):
    """Why an input cannot be used."""

    source: str
    code: str
    message: str


class Found(NamedTuple):
    """What a listing, or one container file, holds."""

    videos: tuple[Video, ...]
    """In the order that numbers them."""
    ignored: int
    """Files or members that belong to no video."""
    faults: tuple[Fault, ...] = ()
    """Damage that hides further videos."""


class Cut(NamedTuple):
    """A clip to cut: its key and its first frame in the video."""

    key: str
    start: int


def natural_order(path: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key that puts ``2/x`` before ``10/x``; equal numbers fall back on the text."""
    parts = re.split(r"(\d+)", path)
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts), path


def is_hidden(path: str) -> bool:
    """Whether a file is one that operating systems leave behind (``.DS_Store``, ``._clip.mp4``)."""
    return path.rsplit("/", 1)[-1].startswith(".")


def cut_clips(
    video: Video,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float,
    images: Callable[[frozenset[int]], Iterable[tuple[int, np.ndarray]]],
    truth: Callable[[range], Mapping[str, np.ndarray]] = lambda indices: {},
) -> Iterator[Clip]:
    """Cut clips from one pass over a video; holds only the frames that an unfinished clip needs.

    ``images`` yields the asked-for frames in order as (index, uint8 (h, w, 3)); ``truth`` gives the truth at indices.

    Raises:
        VideoError: the video ends before the last clip is full, or its frames have another size than before.
    """
    uses = Counter(index for cut in cuts for index in preprocessing.indices(cut.start))
    kept: dict[int, np.ndarray] = {}
    waiting = deque(sorted(cuts, key=lambda cut: cut.start))
    for index, image in images(frozenset(uses)):
        if image.shape[:2] != (video.height, video.width):
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise VideoError("changed", f"frame {index} is {size}, it was {video.width}x{video.height} before")
        kept[index] = preprocessing.apply(image)
        while waiting and index >= preprocessing.indices(waiting[0].start)[-1]:
            cut = waiting.popleft()
            indices = preprocessing.indices(cut.start)
            frames = np.stack([kept[i] for i in indices])
            for i in indices:
                uses[i] -= 1
                if not uses[i]:
                    del kept[i]
            yield Clip(
                key=cut.key,
                frames=frames,
                fps=video.fps or fps,
                start_frame=cut.start,
                stride=preprocessing.stride,
                source=video.source,
                truth=truth(indices),
            )
    if waiting:
        last = preprocessing.indices(waiting[0].start)[-1]
        raise VideoError("changed", f"frame {last} does not decode, though {video.frames} frames were counted before")
