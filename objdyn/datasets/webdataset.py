"""WebDataset tars of video files: each member with a video's extension is one video.

Members are read in place through their offset; nothing is extracted and nothing but regular files is looked at.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

from objdyn.clips import NO_LIMITS, Clip, Limits, VideoError
from objdyn.datasets import videos
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Fault, Found, Open, Video, is_hidden, natural_order

_LONGEST_HEADER = 1 << 20


def find(listing: Sequence[str]) -> Found:
    """Every tar is a container of videos, see ``scan``."""
    paths = sorted(
        (path for path in listing if path.lower().endswith(".tar") and not is_hidden(path)), key=natural_order
    )
    return Found(tuple(Video(path, (path,)) for path in paths), ignored=len(listing) - len(paths))


def scan(container: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Found:
    """List the videos of a tar in its order; a tar without its end is a fault beside what was found before.

    A tar may hold several members of one name; each is a video, the second is called ``NAME#2``.
    """
    path = container.files[0]
    found, ignored, end = [], 0, 0
    seen: Counter[str] = Counter()
    try:
        with open_file(path) as file:
            with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
                for member in tar:
                    limits.on_frame()
                    end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                    if member.isreg() and not member.issparse() and videos.is_video(member.name):
                        label = member.name.lstrip("/").encode(errors="replace").decode()
                        seen[label] += 1
                        label += f"#{seen[label]}" if seen[label] > 1 else ""
                        found.append(Video(f"{path}/{label}", (path,), (member.offset_data, member.size)))
                    else:
                        ignored += not member.isdir()
            file.seek(end)
            # Tarfile takes a missing or garbled header for the end, so a cut tar would lose its tail in silence.
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("the end of the archive is missing")
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        code = error.code if isinstance(error, VideoError) else "damaged-tar"
        return Found(tuple(found), ignored, (Fault(path, code, f"{error}; {len(found)} videos before it"),))
    return Found(tuple(found), ignored)


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Count the frames by decoding, see ``videos.probe``."""
    return videos.probe(video, _member(video, open_file), limits)


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Decode and cut clips, see ``videos.read``."""
    yield from videos.read(video, _member(video, open_file), cuts, preprocessing, fps, limits)


def _member(video: Video, open_file: Open) -> Open:
    return lambda path: cast(BinaryIO, io.BufferedReader(_Member(open_file(path), *video.part)))


class _Headers:
    """A file of which only headers are read: one with a long name may claim any size, and would be read as a whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)


class _Member(io.RawIOBase):
    """A range of a file as a file."""

    mode = "rb"
    name = ""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._file.seek(self._offset + self._position)
        data = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
