"""A folder per clip of numbered images: OBJ3D (``test_12.png``), PHYRE (``00012.png``), CLEVRER frames (``7.png``)."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from objdyn.clips import NO_LIMITS, Clip, Limits, VideoError
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Found, Open, Video, cut_clips, is_hidden, natural_order

EXTENSIONS = (".png", ".jpg", ".jpeg")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # 16-bit and float images would be clipped in silence


def frame_number(path: str) -> int | None:
    """Last integer in a file's name, its place in time; None if there is none."""
    stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    numbers = re.findall(r"\d+", stem)
    return int(numbers[-1]) if numbers else None


def find(listing: Sequence[str]) -> Found:
    """Every folder with numbered images is one video; images beside the folders belong to none."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in listing:
        is_image = path.lower().endswith(EXTENSIONS) and not is_hidden(path)
        if "/" in path and is_image and frame_number(path) is not None:
            folders[path.rsplit("/", 1)[0]].append(path)
    videos = tuple(
        Video(folder, tuple(sorted(folders[folder], key=lambda path: (frame_number(path) or 0, path))))
        for folder in sorted(folders, key=natural_order)
    )
    return Found(videos, ignored=len(listing) - sum(len(video.files) for video in videos))


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Decode every image once; note it where the numbering jumps.

    Raises:
        VideoError: an image does not decode, two have one number, sizes differ, or a limit is passed.
    """
    limits.check_frames(len(video.files))
    numbers = [frame_number(path) or 0 for path in video.files]
    twice = next((i for i in range(1, len(numbers)) if numbers[i] == numbers[i - 1]), None)
    if twice is not None:
        raise VideoError(
            "ambiguous-order", f"{video.files[twice - 1]} and {video.files[twice]} both are frame {numbers[twice]}"
        )
    first = _image(video.files[0], open_file, limits).shape
    for path in video.files[1:]:
        shape = _image(path, open_file, limits).shape
        if shape != first:
            raise VideoError("mixed-sizes", f"{path} is {shape[1]}x{shape[0]}, {video.files[0]} {first[1]}x{first[0]}")
    steps = np.diff(numbers)
    jump = next((i for i in range(1, len(steps)) if steps[i] != steps[0]), None)
    note = "" if jump is None else f"the numbering jumps from {numbers[jump]} to {numbers[jump + 1]}"
    return dataclasses.replace(video, frames=len(video.files), height=first[0], width=first[1], note=note)


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Decode and cut clips of the trimmed video; images have no rate, so ``fps`` is recorded.

    Raises:
        ValueError: an image does not decode, or the crop leaves it.
    """
    order = preprocessing.order(len(video.files))
    yield from cut_clips(
        video,
        cuts,
        preprocessing,
        fps,
        lambda wanted: ((i, _image(video.files[order[i]], open_file, limits)) for i in sorted(wanted)),
    )


def _image(path: str, open_file: Open, limits: Limits) -> np.ndarray:
    try:
        with open_file(path) as file:
            limits.check_bytes(file)
            with Image.open(file, formats=["PNG", "JPEG"]) as image:
                limits.check_size(image.height, image.width)  # before the pixels are decoded
                if image.mode not in _MODES:
                    raise VideoError("unreadable", f"{path} has pixels of mode {image.mode}; 8-bit images are wanted")
                pixels = np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise VideoError("too-large", f"{path} is larger than any image should be ({error})") from error
    except VideoError as error:
        raise error if path in str(error) else VideoError(error.code, f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError("unreadable", f"{path} is no image that decodes ({error})") from error
    limits.on_frame()
    return pixels
