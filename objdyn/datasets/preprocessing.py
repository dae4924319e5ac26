"""From decoded frames to stored ones: which frames, which part of them, which size."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

FILTERS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
"""Pillow's filters; all but ``nearest`` average over the source pixels when shrinking."""
FITS = ("squeeze", "center-crop")


@dataclass(frozen=True)
class Preprocessing:
    """How clips are cut from a video and their frames brought to one size.

    Raises:
        ValueError: a setting is impossible.
    """

    frames: int
    """Frames of a clip."""
    stride: int = 1
    """Source frames from one kept frame to the next."""
    hop: int | None = None
    """Source frames from the start of one clip to the next; None is ``frames * stride``: no overlap."""
    start: int = 0
    """First source frame of the first clip."""
    stop: int | None = None
    """Source frame before which the last clip ends; None is the end of the video."""
    crop: tuple[int, int, int, int] | None = None
    """x0, y0, x1, y1 in source pixels, x1 and y1 outside; None keeps the frame."""
    fit: str = "squeeze"
    """``squeeze`` changes the aspect ratio, ``center-crop`` cuts the longer side."""
    filter: str = "area"
    """One of ``FILTERS``."""
    size: int | None = 64
    """Height and width of the stored frames; None keeps the source's."""
    drop_last: int = 0
    """Frames left out at the end of a video, before any clip is cut."""
    pad_to: int = 0
    """Frames that a video has at least: its last one left is repeated until there are so many; 0 repeats none."""
    inverted: bool = False
    """Whether colours become 255 - v with red and blue swapped, which is how DDLP has PHYRE: white becomes black."""

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "hop", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.size == 1:
            raise ValueError("size must be at least 2, got 1")
        for name in ("start", "drop_last", "pad_to"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.stop is not None and self.stop < self.start + self.span:
            raise ValueError(
                f"a clip spans {self.span} frames, so from start={self.start} stop must be {self.start + self.span} "
                f"or more, got {self.stop}"
            )
        if self.fit not in FITS:
            raise ValueError(f"unknown fit {self.fit!r}; choose one of {', '.join(FITS)}")
        if self.filter not in FILTERS:
            raise ValueError(f"unknown filter {self.filter!r}; choose one of {', '.join(FILTERS)}")
        if self.crop is not None:
            x0, y0, x1, y1 = self.crop
            if not (0 <= x0 < x1 and 0 <= y0 < y1):
                raise ValueError(f"crop must be x0,y0,x1,y1 with 0 <= x0 < x1 and 0 <= y0 < y1, got {self.crop}")

    @property
    def span(self) -> int:
        """Source frames from the first kept frame of a clip to its last, both counted."""
        return (self.frames - 1) * self.stride + 1

    def indices(self, start: int) -> range:
        """Source frames that a clip keeps."""
        return range(start, start + self.span, self.stride)

    def order(self, num_frames: int) -> np.ndarray:
        """Frames of a video of ``num_frames`` that it shows once trimmed, int64 (n,).

        The last ``drop_last`` are left out, then the last one is repeated as ``pad_to`` asks; empty if none is left.
        """
        left = max(0, num_frames - self.drop_last)
        return np.minimum(np.arange(max(left, self.pad_to) if left else 0), left - 1)

    def starts(self, num_frames: int) -> range:
        """First frames of the clips that a video of ``num_frames`` holds; empty if it is too short for one.

        They count frames of the trimmed video, see ``order``.
        """
        shown = len(self.order(num_frames))
        end = shown if self.stop is None else min(shown, self.stop)
        return range(self.start, end - self.span + 1, self.hop or self.frames * self.stride)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Part of a frame that is kept: x0, y0, x1, y1 in its pixels.

        Raises:
            ValueError: the crop does not lie inside the frame.
        """
        x0, y0, x1, y1 = self.crop or (0, 0, width, height)
        if x1 > width or y1 > height:
            raise ValueError(f"crop {x0},{y0},{x1},{y1} leaves the frame, which is {width} wide and {height} high")
        if self.fit == "center-crop" and self.size is not None:
            side = min(x1 - x0, y1 - y0)
            x0, y0 = x0 + (x1 - x0 - side) // 2, y0 + (y1 - y0 - side) // 2
            x1, y1 = x0 + side, y0 + side
        return x0, y0, x1, y1

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Crop and resize one frame, uint8 (h, w, 3), then invert its colours where asked; or labels, uint8 (h, w)."""
        x0, y0, x1, y1 = self.box(*image.shape[:2])
        size = (x1 - x0, y1 - y0) if self.size is None else (self.size, self.size)
        image = image[y0:y1, x0:x1]
        if size != (x1 - x0, y1 - y0):
            image = np.asarray(Image.fromarray(image).resize(size, FILTERS[self.filter]))
        return 255 - image[..., ::-1] if self.inverted and image.ndim == 3 else image

    def positions(self, points: np.ndarray, height: int, width: int) -> np.ndarray:
        """Turn points (..., 2) from source pixels to coordinates in the stored frames.

        ``points`` are (x, y) with pixel i covering [i, i + 1]; the result is float32 (y, x) in [-1, 1] between the
        centres of the outermost pixels (``align_corners=True``): coordinate = 2 * (p - 0.5) / (size - 1) - 1.
        """
        x0, y0, x1, y1 = self.box(height, width)
        kept = np.array([x1 - x0, y1 - y0], np.float64)
        stored = kept if self.size is None else np.full(2, self.size, np.float64)
        scaled = (np.asarray(points, np.float64) - (x0, y0)) * (stored / kept)
        return (2 * (scaled - 0.5) / (stored - 1) - 1)[..., ::-1].astype(np.float32)
