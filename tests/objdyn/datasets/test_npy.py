import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest

from objdyn.datasets import Cut, Limits, Preprocessing, Video, VideoError, npy


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def recording(frames: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 6, 8, 3), np.uint8)


def probe(root: Path, name: str, limits: Limits | None = None) -> Video:
    return npy.probe(Video(name, (name,)), opener(root), limits or Limits())


def refused(root: Path, name: str, limits: Limits | None = None) -> str:
    with pytest.raises(VideoError) as caught:
        probe(root, name, limits)
    return f"{caught.value.code}: {caught.value}"


def test_clips_are_the_frames_of_the_array(tmp_path: Path) -> None:
    array = recording()
    np.save(tmp_path / "a.npy", array)
    video = probe(tmp_path, "a.npy")
    assert (video.frames, video.height, video.width, video.note) == (20, 6, 8, "")
    cuts = [Cut("k", 2), Cut("l", 11)]
    one, two = npy.read(video, opener(tmp_path), cuts, Preprocessing(4, stride=2, size=None), fps=12.0)
    assert np.array_equal(one.frames, array[2:10:2])
    assert np.array_equal(two.frames, array[11:19:2])
    assert (one.fps, two.start_frame, one.source, one.truth) == (12.0, 11, "a.npy", {})


def test_only_the_wanted_frames_are_read(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Counting.read_bytes += len(data)
            return data

    array = recording(1000)
    np.save(tmp_path / "a.npy", array)
    data = (tmp_path / "a.npy").read_bytes()
    video = npy.probe(Video("a.npy", ("a.npy",)), lambda path: Counting(data))
    list(npy.read(video, lambda path: Counting(data), [Cut("k", 990)], Preprocessing(5, size=None)))
    assert Counting.read_bytes < 5 * array[0].nbytes + 1000


@pytest.mark.parametrize("frames", [10, 11, 19, 1234])
def test_splits_by_time_meet_without_overlap(frames: int) -> None:
    train, val, test = (npy.span_of(split, frames) for split in ("train", "val", "test"))
    assert (train[0], test[1]) == (0, frames)
    assert (train[1], val[1]) == (val[0], test[0]) == (int(0.8 * frames), int(0.9 * frames))
    assert npy.span_of("all", frames) == (0, frames)


def test_other_arrays_are_refused_with_the_reason(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((4, 6, 8, 3), np.float32))
    np.save(tmp_path / "grey.npy", np.zeros((4, 6, 8), np.uint8))
    np.save(tmp_path / "first.npy", np.zeros((4, 3, 6, 8), np.uint8))
    np.save(tmp_path / "none.npy", np.zeros((0, 6, 8, 3), np.uint8))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(recording()))
    for name, said in [
        ("float", r"float32 \(4, 6, 8, 3\)"),
        ("grey", r"uint8 \(4, 6, 8\)"),
        ("first", r"uint8 \(4, 3, 6, 8\)"),
        ("none", r"\(0, 6, 8, 3\)"),
    ]:
        with pytest.raises(VideoError, match=f"{said}; uint8 .* is wanted"):
            probe(tmp_path, f"{name}.npy")
    assert refused(tmp_path, "fortran.npy").startswith("bad-layout: it is in Fortran order")


class Trap:
    """Leaves a file where its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Trap(tmp_path / "ran")], object), allow_pickle=True)
    assert "never loaded" in refused(tmp_path, "a.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("kept", "code"), [(0, "unreadable"), (5, "unreadable"), (60, "unreadable"), (1000, "trunc")])
def test_files_that_are_cut_short_are_refused(tmp_path: Path, kept: int, code: str) -> None:
    np.save(tmp_path / "a.npy", recording())
    path = tmp_path / "a.npy"
    path.write_bytes(path.read_bytes()[:kept])
    assert refused(tmp_path, "a.npy").startswith(code)


def test_what_follows_the_array_is_noted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", recording())
    with (tmp_path / "a.npy").open("ab") as file:
        file.write(b"more")
    assert probe(tmp_path, "a.npy").note == "4 bytes follow the array"


def test_a_recording_that_shrinks_is_found(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", recording())
    video = probe(tmp_path, "a.npy")
    path = tmp_path / "a.npy"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VideoError, match="frame 18 is incomplete"):
        list(npy.read(video, opener(tmp_path), [Cut("k", 16)], Preprocessing(4)))
    np.save(path, recording(10))
    with pytest.raises(VideoError, match="it had 20 frames before"):
        list(npy.read(video, opener(tmp_path), [Cut("k", 0)], Preprocessing(4)))


def test_limits_refuse_by_the_header_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", recording())
    assert probe(tmp_path, "a.npy", Limits(frames=20, pixels=48)).frames == 20
    for limits, code in [(Limits(frames=19), "long"), (Limits(pixels=47), "large"), (Limits(bytes=2000), "large")]:
        assert refused(tmp_path, "a.npy", limits).startswith(f"too-{code}")
