import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest

from objdyn.datasets import Cut, Preprocessing, Video, webdataset


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tar(tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]) -> Path:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, length in [("one.mp4", 6), ("two.mp4", 9)]:
            add(tar, f"x/{name}", write_video(tmp_path / "videos" / name, counting_frames(length)).read_bytes())
            add(tar, f"x/{name.removesuffix('.mp4')}.json", b"{}")
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return tmp_path / "a.tar"


def test_members_are_videos_and_links_are_not_followed(tar: Path) -> None:
    (container,) = webdataset.find(["a.tar", "readme.txt"]).videos
    found = webdataset.scan(container, opener(tar.parent))
    assert [video.source for video in found.videos] == ["a.tar/x/one.mp4", "a.tar/x/two.mp4"]
    assert (found.ignored, found.faults) == (3, ())
    videos = [webdataset.probe(video, opener(tar.parent)) for video in found.videos]
    assert [video.frames for video in videos] == [6, 9]
    (clip,) = webdataset.read(videos[1], opener(tar.parent), [Cut("k", 3)], Preprocessing(2, stride=5, size=8))
    assert np.abs(clip.frames.mean(axis=(1, 2, 3)) - [15, 40]).max() < 2.5


@pytest.mark.parametrize("blocks", [1, 3, 5, 9])
def test_a_cut_tar_is_a_fault(tar: Path, blocks: int) -> None:
    data = tar.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 + 1
    tar.write_bytes(data[: 512 * (end - blocks)])
    found = webdataset.scan(Video("a.tar", ("a.tar",)), opener(tar.parent))
    assert [fault.code for fault in found.faults] == ["damaged-tar"]


def test_a_garbled_header_is_a_fault(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    found = webdataset.scan(Video("a.tar", ("a.tar",)), opener(tar.parent))
    data[found.videos[1].part[0] - 512] ^= 1
    tar.write_bytes(data)
    garbled = webdataset.scan(Video("a.tar", ("a.tar",)), opener(tar.parent))
    assert garbled.videos == found.videos[:1]
    assert [fault.code for fault in garbled.faults] == ["damaged-tar"]
