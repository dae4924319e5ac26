"""Readers of published formats: a listing and an ``open`` in, clips out.

A layout is some functions. ``find`` and ``select`` see names only; ``scan``, where one file holds several videos, opens
the file and lists them; ``probe`` decodes a video once to count its frames; ``read`` cuts clips. ``Limits`` bound what
a video may cost; beyond them it is refused by a ``VideoError``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from objdyn.clips import NO_LIMITS, Clip, Limits, VideoError
from objdyn.datasets import clevrer, frames, gswm_hdf5, npy, phyre, rnem_hdf5, towers, videos, webdataset
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Fault, Found, Open, Video

__all__ = ["LAYOUTS", "Cut", "Fault", "Found", "Layout", "Limits", "Open", "Preprocessing", "Video", "VideoError"]


class Scan(Protocol):
    """Lists the videos of one file; see ``webdataset.scan``."""

    def __call__(self, container: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Found: ...


class Probe(Protocol):
    """Counts the frames of one video; see ``videos.probe``."""

    def __call__(self, video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video: ...


class Read(Protocol):
    """Cuts clips from one video; see ``videos.read``."""

    def __call__(
        self,
        video: Video,
        open_file: Open,
        cuts: Sequence[Cut],
        preprocessing: Preprocessing,
        fps: float = 1.0,
        limits: Limits = NO_LIMITS,
    ) -> Iterator[Clip]: ...


class Select(Protocol):
    """Keeps the videos of one split, where one folder may hold several; see ``clevrer.select``, ``towers.select``."""

    def __call__(self, found: Found, split: str, seed: int = 0, numbers: range | None = None) -> Found: ...


class Layout(NamedTuple):
    """How one published format is read."""

    find: Callable[[Sequence[str]], Found]
    scan: Scan | None
    """None where a file or folder is one video."""
    probe: Probe
    read: Read
    wants: str
    """What ``find`` looks for, for messages."""
    splits: Mapping[str, str] | None = None
    """Where a file holds several splits: the last part of a container's name by split; None where all is one split."""
    select: Select | None = None
    """None where all that ``find`` finds is one split."""


LAYOUTS = {
    "clevrer": Layout(
        clevrer.find, None, clevrer.probe, clevrer.read, "files video_00000.mp4, of any number", select=clevrer.select
    ),
    "videos": Layout(videos.find, None, videos.probe, videos.read, f"files {', '.join(videos.EXTENSIONS)}"),
    "frames": Layout(
        frames.find, None, frames.probe, frames.read, f"folders of numbered images {', '.join(frames.EXTENSIONS)}"
    ),
    "npy": Layout(npy.find, None, npy.probe, npy.read, "files .npy"),
    "phyre": Layout(phyre.find, None, phyre.probe, phyre.read, "files .npz"),
    "gswm-hdf5": Layout(
        gswm_hdf5.find, gswm_hdf5.scan, gswm_hdf5.probe, gswm_hdf5.read, f"files {', '.join(gswm_hdf5.EXTENSIONS)}"
    ),
    "rnem-hdf5": Layout(
        rnem_hdf5.find,
        rnem_hdf5.scan,
        rnem_hdf5.probe,
        rnem_hdf5.read,
        f"files {', '.join(gswm_hdf5.EXTENSIONS)}",
        rnem_hdf5.SPLITS,
    ),
    "towers": Layout(
        towers.find,
        None,
        towers.probe,
        towers.read,
        f"files {', '.join(videos.EXTENSIONS)}, nor folders of numbered images {', '.join(frames.EXTENSIONS)}",
        select=towers.select,
    ),
    "webdataset": Layout(webdataset.find, webdataset.scan, webdataset.probe, webdataset.read, "files .tar"),
}
