import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest
from PIL import Image

from objdyn.datasets import Cut, Limits, Preprocessing, VideoError, frames


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def write_images(root: Path, names: list[str], shape: tuple[int, ...] = (4, 6, 3)) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(shape, 10 * i, np.uint8)).save(root / name)


def test_find_sorts_by_the_last_integer_of_a_name() -> None:
    listing = ["10/test_2.png", "10/test_10.png", "10/test_9.png", "2/00001.png", "2/00000.jpg"]
    found = frames.find([*listing, "still_1.png", "2/README.md", "2/cover.png", "3/.1.png"])
    assert [video.source for video in found.videos] == ["2", "10"]
    assert found.videos[0].files == ("2/00000.jpg", "2/00001.png")
    assert found.videos[1].files == ("10/test_2.png", "10/test_9.png", "10/test_10.png")
    assert found.ignored == 4


def test_clips_hold_the_images_in_order(tmp_path: Path) -> None:
    names = [f"a/test_{i}.png" for i in range(12)]
    write_images(tmp_path, names)
    (found,) = frames.find(sorted(names)).videos
    video = frames.probe(found, opener(tmp_path))
    assert (video.frames, video.height, video.width, video.note) == (12, 4, 6, "")
    (clip,) = frames.read(video, opener(tmp_path), [Cut("k", 2)], Preprocessing(5, stride=2, size=4), fps=8.0)
    assert clip.frames[:, 0, 0, 0].tolist() == [20, 40, 60, 80, 100]
    assert (clip.source, clip.fps) == ("a", 8.0)


def test_gaps_in_the_numbering_are_noted(tmp_path: Path) -> None:
    names = [f"a/{i}.png" for i in (0, 7, 14, 28)]
    write_images(tmp_path, names)
    assert frames.probe(frames.find(names).videos[0], opener(tmp_path)).note == "the numbering jumps from 14 to 28"
    assert frames.probe(frames.find(names[:3]).videos[0], opener(tmp_path)).note == ""


@pytest.mark.parametrize(
    ("names", "code"), [(["a/1.png", "a/01.png"], "ambiguous-order"), (["a/1.png", "a/2.png"], "mixed-sizes")]
)
def test_folders_that_are_no_one_video_are_refused(tmp_path: Path, names: list[str], code: str) -> None:
    write_images(tmp_path, names)
    if code == "mixed-sizes":
        write_images(tmp_path, names[1:], (5, 6, 3))
    with pytest.raises(VideoError) as caught:
        frames.probe(frames.find(names).videos[0], opener(tmp_path))
    assert caught.value.code == code


def test_damaged_and_16_bit_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/0.png", "a/1.png"])
    path = tmp_path / "a/1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(VideoError, match=r"a/1\.png is no image that decodes"):
        frames.probe(frames.find(["a/0.png", "a/1.png"]).videos[0], opener(tmp_path))
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(path)
    with pytest.raises(VideoError, match="8-bit images are wanted"):
        frames.probe(frames.find(["a/0.png", "a/1.png"]).videos[0], opener(tmp_path))


@pytest.mark.parametrize("name", ["clevrer_frames", "phyre_frames"])
def test_real_frames_are_three_clips_of_a_hundred(shared: Path, name: str) -> None:
    root = shared / "data" / name
    found = frames.find([path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()])
    assert [(video.source, len(video.files)) for video in found.videos] == [("0", 100), ("1", 100), ("2", 100)]
    video = frames.probe(found.videos[0], opener(root))
    (clip,) = frames.read(video, opener(root), [Cut("k", 8)], Preprocessing(4, size=None))
    assert clip.frames.shape == (4, 128, 128, 3)
    with Image.open(root / "0" / "10.png") as image:
        assert np.array_equal(clip.frames[2], np.asarray(image.convert("RGB")))


def test_limits_refuse_before_the_pixels_are_decoded(tmp_path: Path) -> None:
    names = [f"a/{i}.png" for i in range(3)]
    write_images(tmp_path, names)
    (found,) = frames.find(names).videos
    assert frames.probe(found, opener(tmp_path), Limits(frames=3, pixels=24, bytes=1000)).frames == 3
    with pytest.raises(VideoError, match=r"at least 3 frames, more than max_frames=2"):
        frames.probe(found, opener(tmp_path), Limits(frames=2))
    with pytest.raises(VideoError, match=r"a/0\.png: a file of \d+ bytes, more than max_file_gb=1e-09"):
        frames.probe(found, opener(tmp_path), Limits(bytes=1))
    data = bytearray((tmp_path / "a/2.png").read_bytes())
    data[16:24] = (5000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a/2.png").write_bytes(data)
    with pytest.raises(VideoError, match=r"a/2\.png: its frames are 5000x5000 pixels") as caught:
        frames.probe(found, opener(tmp_path), Limits(pixels=24))
    assert caught.value.code == "too-large"


def test_obj3d_folders_are_read_in_order_and_a_truncated_image_is_named(tmp_path: Path) -> None:
    names = [f"train/{clip}/test_{i}.png" for clip in (2, 10) for i in range(100)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        i = int(name.split("_")[1].removesuffix(".png"))
        Image.fromarray(np.full((4, 4, 4), (i, 0, 200, 30), np.uint8)).save(tmp_path / name)  # RGBA, as OBJ3D has
    found = frames.find(sorted(names))
    assert [video.source for video in found.videos] == ["train/2", "train/10"]
    video = frames.probe(found.videos[0], opener(tmp_path))
    (clip,) = frames.read(video, opener(tmp_path), [Cut("k", 0)], Preprocessing(100, size=None))
    assert clip.frames.shape == (100, 4, 4, 3)
    assert clip.frames[:, 0, 0].tolist() == [[i, 0, 200] for i in range(100)]
    path = tmp_path / "train/10/test_57.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(VideoError, match=r"train/10/test_57\.png is no image that decodes"):
        frames.probe(found.videos[1], opener(tmp_path))


def test_trimmed_folders_repeat_the_last_frame_that_is_left(tmp_path: Path) -> None:
    names = [f"a/{i}.png" for i in range(6)]
    write_images(tmp_path, names)
    video = frames.probe(frames.find(names).videos[0], opener(tmp_path))
    trimmed = Preprocessing(5, size=None, drop_last=2, pad_to=7, inverted=True)
    (clip,) = frames.read(video, opener(tmp_path), [Cut("k", 2)], trimmed)
    assert clip.frames[:, 0, 0, 0].tolist() == [235, 225, 225, 225, 225]
