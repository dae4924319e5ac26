"""A folder of video files, in any sub-folders: mp4, avi, webm, mov, gif, mkv."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np

from objdyn.clips import NO_LIMITS, Clip, Limits, VideoError, probe_video, video_frames
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Found, Open, Video, cut_clips, is_hidden, natural_order

EXTENSIONS = (".mp4", ".avi", ".webm", ".mov", ".gif", ".mkv")


def is_video(path: str) -> bool:
    """Whether a path names a video file by its extension."""
    return path.lower().endswith(EXTENSIONS) and not is_hidden(path)


def find(listing: Sequence[str]) -> Found:
    """Every video file of a listing is one video, in natural order of its path."""
    paths = sorted((path for path in listing if is_video(path)), key=natural_order)
    return Found(tuple(Video(path, (path,)) for path in paths), ignored=len(listing) - len(paths))


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Count the frames by decoding; note what the header says wrongly, and frames at unequal times.

    Raises:
        VideoError: it does not decode, holds much less than its header promises, or passes a limit.
    """
    with open_file(video.files[0]) as file:
        info = probe_video(file, limits)
    notes = []
    if info.promised not in (0, info.frames):
        notes.append(f"the header promises {info.promised} frames, {info.frames} decode")
    if info.intervals[1]:
        shortest, longest = (1000 * seconds for seconds in info.intervals)
        notes.append(
            f"the frame rate varies, from {shortest:.4g} to {longest:.4g} ms between frames; clips count frames"
        )
    return dataclasses.replace(
        video,
        frames=info.frames,
        height=info.height,
        width=info.width,
        fps=info.fps,
        keyframes=info.keyframes,
        note="; ".join(notes),
    )


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
    truth: Callable[[range], Mapping[str, np.ndarray]] = lambda indices: {},
) -> Iterator[Clip]:
    """Decode and cut clips; ``fps`` stands in where the file states no rate, ``truth`` gives what is known of frames.

    Raises:
        ValueError: the video does not decode as far as it must, or the crop leaves its frames.
    """
    with open_file(video.files[0]) as file:
        yield from cut_clips(
            video, cuts, preprocessing, fps, lambda wanted: _frames(file, wanted, video.keyframes, limits), truth
        )


def _frames(
    file: BinaryIO, wanted: Collection[int], keyframes: Sequence[tuple[int, int]], limits: Limits
) -> Iterator[tuple[int, np.ndarray]]:
    from av.error import FFmpegError

    try:
        yield from video_frames(file, wanted, keyframes, limits)
    except MemoryError:
        raise
    except FFmpegError as error:  # some are OSErrors too, but all that FFmpeg sees is the data
        raise VideoError("unreadable", f"FFmpeg cannot convert a frame: {error.strerror}") from error
    except VideoError as error:
        if error.code not in ("unreadable", "damaged", "no-video"):
            raise
        raise VideoError("changed", f"all of it decoded before, now {error}") from error
