"""Block towers that fall or stand: a folder of videos, or of folders of numbered images, split at random.

The real videos are those of Lerer et al., "Learning Physical Intuition of Block Towers by Example" (2016). ODDN takes
393 of 493 for training and 100 for testing, at random. How they lie on disk and which 100 these were is not published,
so both kinds of source are read, and the split is ours: a draw that depends on names and seed alone.
"""

import hashlib
from collections.abc import Iterator, Sequence

from objdyn.clips import NO_LIMITS, Clip, Limits
from objdyn.datasets import frames, videos
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Found, Open, Video, natural_order

SPLITS = ("train", "test")
VIDEOS, TEST_VIDEOS = 493, 100
"""All videos of the paper, and those of them that are its test split."""


def find(listing: Sequence[str]) -> Found:
    """Every video file is one video, and so is every folder of numbered images, in natural order of their paths."""
    films, folders = videos.find(listing), frames.find(listing)
    found = sorted((*films.videos, *folders.videos), key=lambda video: natural_order(video.source))
    return Found(tuple(found), ignored=len(listing) - sum(len(video.files) for video in found))


def select(found: Found, split: str, seed: int = 0, numbers: range | None = None) -> Found:
    """Keep the videos of ``train`` or of ``test``; the files of the others count as ignored.

    Of V videos, round(100 V / 493) are in ``test``: those whose path gives, with the seed, the smallest SHA-256. So a
    video that is added or removed moves at most one other across the border. ``numbers`` is for other layouts.

    Raises:
        ValueError: there is no such split, or it is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"--layout towers has the splits {', '.join(SPLITS)}, not {split!r}")
    drawn = sorted(found.videos, key=lambda video: hashlib.sha256(f"{seed}/{video.source}".encode()).digest())
    count = (2 * TEST_VIDEOS * len(drawn) + VIDEOS) // (2 * VIDEOS)
    chosen = {video.source for video in (drawn[:count] if split == "test" else drawn[count:])}
    if found.videos and not chosen:
        raise ValueError(f"{len(found.videos)} towers leave none for the split {split!r}; it takes at least 3")
    kept = tuple(video for video in found.videos if video.source in chosen)
    others = sum(len(video.files) for video in found.videos) - sum(len(video.files) for video in kept)
    return found._replace(videos=kept, ignored=found.ignored + others)


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Count the frames by decoding, see ``videos.probe`` and ``frames.probe``.

    Raises:
        VideoError: as they do.
    """
    reader = videos.probe if videos.is_video(video.files[0]) else frames.probe
    return reader(video, open_file, limits)


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Decode and cut clips, see ``videos.read`` and ``frames.read``.

    Raises:
        ValueError: as they do.
    """
    reader = videos.read if videos.is_video(video.files[0]) else frames.read
    yield from reader(video, open_file, cuts, preprocessing, fps, limits)
