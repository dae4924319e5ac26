import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import h5py
import numpy as np
import pytest

from objdyn.datasets import Cut, Limits, Preprocessing, Video, VideoError, gswm_hdf5


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def write(path: Path, *, compressed: bool = False, **changes: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "imgs": rng.integers(0, 256, (2, 6, 64, 64, 3), dtype=np.uint8),
        "positions": rng.uniform(8, 56, (2, 6, 3, 2)),
        "in_camera": np.ones((2, 6, 3)),
        "present": np.ones((2, 6, 3)),
        **changes,
    }
    arrays["in_camera"][1, 2:, 2] = 0
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **({"compression": "gzip", "chunks": True} if compressed else {}))


@pytest.mark.parametrize("compressed", [False, True])
def test_episodes_become_clips_with_truth(tmp_path: Path, compressed: bool) -> None:
    write(tmp_path / "train.hdf5", compressed=compressed)
    (container,) = gswm_hdf5.find(["train.hdf5"]).videos
    found = gswm_hdf5.scan(container, opener(tmp_path))
    assert [video.source for video in found.videos] == ["train.hdf5/0", "train.hdf5/1"]
    video = gswm_hdf5.probe(found.videos[1], opener(tmp_path))
    assert (video.frames, video.height, video.width) == (6, 64, 64)
    (clip,) = gswm_hdf5.read(video, opener(tmp_path), [Cut("k", 1)], Preprocessing(2, stride=3, size=64))
    with h5py.File(tmp_path / "train.hdf5") as file:
        assert np.array_equal(clip.frames, cast(h5py.Dataset, file["imgs"])[1][[1, 4]])
        pixels = cast(h5py.Dataset, file["positions"])[1][[1, 4]]
    assert clip.truth["positions"].dtype == np.float32
    assert clip.truth["positions"] == pytest.approx(2 * (pixels[..., ::-1] - 0.5) / 63 - 1, abs=1e-6)
    assert clip.truth["present"].tolist() == [[True, True, True], [True, True, False]]
    assert clip.truth["num_objects"] == 3


def test_balls_outside_of_a_crop_are_not_present(tmp_path: Path) -> None:
    positions = np.full((2, 6, 3, 2), 20.0)
    positions[:, :, 1] = 50.0
    write(tmp_path / "a.h5", positions=positions)
    video = gswm_hdf5.probe(Video("a.h5/0", ("a.h5",), (0, 0)), opener(tmp_path))
    (clip,) = gswm_hdf5.read(video, opener(tmp_path), [Cut("k", 0)], Preprocessing(1, crop=(0, 0, 40, 40), size=40))
    assert clip.truth["present"].tolist() == [[True, False, True]]
    assert clip.truth["positions"][0, 0] == pytest.approx(2 * 19.5 / 39 - 1)


def test_files_of_another_layout_are_faults(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    write(tmp_path / "shape.h5", positions=np.zeros((2, 5, 3, 2)))
    write(tmp_path / "float.h5", imgs=np.zeros((2, 6, 8, 8, 3), np.float32))
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file["imgs"] = h5py.ExternalLink("shape.h5", "imgs")
    for name, code in [
        ("text", "unreadable"),
        ("shape", "bad-layout"),
        ("float", "bad-layout"),
        ("outside", "bad-layout"),
    ]:
        path = f"{name}.h5"
        found = gswm_hdf5.scan(Video(path, (path,)), opener(tmp_path))
        assert found.videos == ()
        assert [(fault.source, fault.code) for fault in found.faults] == [(path, code)], json.dumps(found.faults)


def test_positions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", positions=np.full((2, 6, 3, 2), np.nan))
    with pytest.raises(VideoError, match="not finite"):
        gswm_hdf5.probe(Video("a.h5/0", ("a.h5",), (0, 0)), opener(tmp_path))


def test_real_positions_lie_on_the_balls(shared: Path) -> None:
    root = shared / "data/balls_interaction"
    found = gswm_hdf5.scan(Video("val.hdf5", ("val.hdf5",)), opener(root))
    assert len(found.videos) == 8
    video = gswm_hdf5.probe(found.videos[3], opener(root))
    (clip,) = gswm_hdf5.read(video, opener(root), [Cut("k", 50)], Preprocessing(3, size=64))
    assert clip.truth["present"].all()
    pixels = np.rint((clip.truth["positions"] + 1) / 2 * 63).astype(int).clip(0, 63)
    for frame, points in zip(clip.frames, pixels, strict=True):
        assert all(frame[y, x].max() == 255 for y, x in points)


@pytest.mark.parametrize("chunks", [None, (1, 6, 8, 8, 3)])
def test_episodes_that_were_never_written_are_a_fault(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        imgs = file.create_dataset("imgs", (1000, 6, 8, 8, 3), np.uint8, chunks=chunks)
        file["positions"] = np.zeros((1000, 6, 1, 2))
        if chunks:
            imgs[:2] = 1
    found = gswm_hdf5.scan(Video("a.h5", ("a.h5",)), opener(tmp_path))
    assert found.videos == ()
    assert [fault.code for fault in found.faults] == ["bad-layout"]
    assert re.search(r"imgs .* holds (2 of 1000 chunks|0 of 1152000 bytes); it is incomplete", found.faults[0].message)


def test_limits_refuse_by_the_header_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    container = Video("a.h5", ("a.h5",))
    assert len(gswm_hdf5.scan(container, opener(tmp_path), Limits(frames=6, pixels=64 * 64)).videos) == 2
    for limits, code in [(Limits(frames=5), "too-long"), (Limits(pixels=64 * 63), "too-large")]:
        found = gswm_hdf5.scan(container, opener(tmp_path), limits)
        assert ([fault.code for fault in found.faults], found.videos) == ([code], ())
