from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

if TYPE_CHECKING:
    from av.video.stream import VideoStream


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """``write(path, frames, codec, fps)`` encodes uint8 (t, h, w, 3) into the container that the name asks for.

    ``muxer`` and ``title`` go to the container, further options to the codec.
    """
    import av

    def write(
        path: Path,
        frames: np.ndarray,
        codec: str = "libx264",
        fps: int = 25,
        muxer: dict[str, str] | None = None,
        title: str = "",
        **options: str,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", container_options=muxer or {}) as container:
            if title:
                container.metadata["title"] = title
            stream = cast("VideoStream", container.add_stream(codec, rate=fps, options=options))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def counting_frames() -> Callable[[int], np.ndarray]:
    """``frames(t)``: uint8 (t, 32, 48, 3), flat, frame i of level 5 * (i % 50): a decoded frame tells its index."""

    def frames(length: int) -> np.ndarray:
        levels = (5 * (np.arange(length) % 50)).astype(np.uint8)
        return np.broadcast_to(levels[:, None, None, None], (length, 32, 48, 3)).copy()

    return frames
