import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import h5py
import numpy as np
import pytest

from objdyn.clips import SINGLE_CHANNEL, Clip
from objdyn.datasets import LAYOUTS, Cut, Limits, Preprocessing, Video, VideoError, rnem_hdf5
from objdyn.simulators import simulator


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def write(path: Path, *, leave_out: tuple[str, ...] = (), **changes: np.ndarray) -> dict[str, np.ndarray]:
    """A file as R-NEM's authors store it: floats, time first, one channel."""
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.integers(0, 2, (5, 3, 16, 16, 1)).astype(np.float32),
        "groups": rng.integers(0, 5, (5, 3, 16, 16, 1)).astype(np.float32),
        "collisions": rng.integers(0, 2, (5, 3, 16, 16, 1)).astype(np.float32),
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if name not in leave_out:
                file[f"training/{name}"] = array
    return arrays


def video(number: int = 0, path: str = "a.h5", group: str = "training") -> Video:
    return Video(f"{path}/{group}/{number}", (path,), (number, 0))


def read(root: Path, number: int = 0, preprocessing: Preprocessing | None = None) -> Clip:
    probed = rnem_hdf5.probe(video(number), opener(root))
    (clip,) = rnem_hdf5.read(probed, opener(root), [Cut("k", 0)], preprocessing or Preprocessing(5, size=16))
    return clip


def faults(root: Path, path: str = "a.h5", group: str = "training", limits: Limits | None = None) -> list[str]:
    found = rnem_hdf5.scan(Video(f"{path}/{group}", (path,)), opener(root), limits or Limits())
    assert found.videos == ()
    return [f"{fault.source} {fault.code}: {fault.message}" for fault in found.faults]


def test_videos_become_clips_with_truth(tmp_path: Path) -> None:
    arrays = write(tmp_path / "a.h5")
    containers = rnem_hdf5.find(["a.h5", "b.txt", ".c.h5"])
    assert ([v.source for v in containers.videos], containers.ignored) == (
        ["a.h5/training", "a.h5/validation", "a.h5/test"],
        2,
    )
    found = rnem_hdf5.scan(containers.videos[0], opener(tmp_path))
    assert [v.source for v in found.videos] == [f"a.h5/training/{i}" for i in range(3)]
    probed = rnem_hdf5.probe(found.videos[2], opener(tmp_path))
    assert (probed.frames, probed.height, probed.width) == (5, 16, 16)
    cuts = [Cut("k", 1)]
    (clip,) = rnem_hdf5.read(probed, opener(tmp_path), cuts, Preprocessing(2, stride=3, size=16), fps=7)
    rows = [1, 4]
    assert np.array_equal(clip.frames, np.repeat(arrays["features"][rows, 2] * 255, 3, axis=-1))
    assert np.array_equal(clip.truth["segmentation"], arrays["groups"][rows, 2, ..., 0])
    assert np.array_equal(clip.truth["collisions"], arrays["collisions"][rows, 2, ..., 0] == 1)
    assert (clip.truth["num_objects"], clip.fps) == (4, 7)


@pytest.mark.parametrize(
    "features",
    [
        np.full((5, 3, 16, 16, 3), 0.2, np.float64),
        np.full((5, 3, 16, 16, 3), 51, np.uint8),
        np.full((5, 3, 16, 16, 1), 51, np.int64),
    ],
)
def test_colours_and_grey_levels_are_kept(tmp_path: Path, features: np.ndarray) -> None:
    write(tmp_path / "a.h5", features=features)
    assert (read(tmp_path).frames == 51).all()


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.float64])
def test_zero_and_one_are_black_and_white_in_any_type(tmp_path: Path, dtype: type) -> None:
    arrays = write(tmp_path / "a.h5", features=np.eye(16, dtype=dtype)[None, None, :, :, None].repeat(5, 0))
    write(tmp_path / "a.h5", features=arrays["features"], leave_out=("groups", "collisions"))
    assert np.array_equal(read(tmp_path).frames[4, :, :, 1], np.eye(16) * 255)


def test_a_single_channel_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    assert rnem_hdf5.probe(video(), opener(tmp_path)).note == SINGLE_CHANNEL
    write(tmp_path / "a.h5", features=np.zeros((5, 3, 16, 16, 3)))
    assert rnem_hdf5.probe(video(), opener(tmp_path)).note == ""


def test_without_groups_or_collisions_there_is_no_such_truth(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", leave_out=("groups",))
    assert set(read(tmp_path).truth) == {"collisions"}
    write(tmp_path / "a.h5", leave_out=("collisions", "groups"))
    assert read(tmp_path).truth == {}


def test_labels_are_cropped_and_resized_without_new_values(tmp_path: Path) -> None:
    groups = np.zeros((5, 3, 16, 16, 1))
    groups[:, :, 4:12, 4:8], groups[:, :, 4:12, 8:12] = 2, 7
    write(tmp_path / "a.h5", groups=groups)
    clip = read(tmp_path, preprocessing=Preprocessing(2, crop=(4, 4, 12, 12), size=32))
    assert clip.truth["segmentation"].shape == clip.truth["collisions"].shape == (2, 32, 32)
    assert (clip.truth["segmentation"] == np.where(np.arange(32) < 16, 2, 7)).all()
    assert clip.truth["num_objects"] == 2


@pytest.mark.parametrize("options", ["balls=3,size=16,frames=12", "balls=2-5,size=16,frames=12,colors=random8"])
def test_simulated_videos_come_back_as_they_were(tmp_path: Path, options: str) -> None:
    balls = simulator(f"bouncing-balls:{options}")
    clips = {split: [e.clip() for e in balls.episodes(split, 0, 70, None)] for split in ("train", "test")}
    rnem_hdf5.write_rnem_hdf5(tmp_path / "a.h5", clips)
    with h5py.File(tmp_path / "a.h5") as file:
        assert cast(h5py.Dataset, file["test/features"]).shape == (12, 70, 16, 16, 3 if "random" in options else 1)
    for split, group in (("train", "training"), ("test", "test")):
        found = rnem_hdf5.scan(Video(f"a.h5/{group}", ("a.h5",)), opener(tmp_path))
        assert len(found.videos) == 70
        for number in (0, 69):
            probed = rnem_hdf5.probe(found.videos[number], opener(tmp_path))
            (clip,) = rnem_hdf5.read(probed, opener(tmp_path), [Cut("k", 0)], Preprocessing(12, size=16))
            simulated = clips[split][number]
            assert np.array_equal(clip.frames, simulated.frames)
            for name in ("segmentation", "collisions"):
                assert np.array_equal(clip.truth[name], simulated.truth[name])
            assert clip.truth["num_objects"] == simulated.truth["num_objects"]
    assert "group validation is missing" in faults(tmp_path, group="validation")[0]


def test_clips_that_do_not_belong_together_are_not_written(tmp_path: Path) -> None:
    def clip(value: int = 255, size: int = 8, **truth: np.ndarray) -> Clip:
        return Clip("k", np.full((2, size, size, 3), value, np.uint8), 1.0, 0, 1, "s", truth)

    path = tmp_path / "a.h5"
    for clips, message in [
        ({"night": [clip()]}, "splits train, val, test, got 'night'"),
        ({"val": []}, "split val has no clips"),
        ({"val": [clip(), clip(7)]}, "is not white on black, as the first clip of val"),
        ({"val": [clip(), clip(size=9)]}, r"features of clip k is \(2, 9, 9, 1\)"),
        ({"val": [clip(), clip(collisions=np.zeros((2, 8, 8), bool))]}, "has features, collisions, those before"),
    ]:
        with pytest.raises(ValueError, match=message):
            rnem_hdf5.write_rnem_hdf5(path, cast(dict[str, list[Clip]], clips))


def test_files_of_another_layout_are_faults(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    assert re.match(r"text.h5/training unreadable: not an HDF5 file of R-NEM's layout", faults(tmp_path, "text.h5")[0])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"leave_out": ("features",)}, "training/features is missing"),
        ({"features": np.zeros((5, 3, 16, 16))}, r"is float64 \(5, 3, 16, 16\), not"),
        ({"features": np.zeros((5, 3, 16, 16, 2))}, "not .t, n, h, w, channels"),
        ({"groups": np.zeros((5, 2, 16, 16, 1))}, r"groups is \(5, 2, 16, 16, 1\), features are \(5, 3, 16, 16, 1\)"),
        ({"features": np.zeros((5, 0, 16, 16, 1)), "leave_out": ("groups",)}, r"is float64 \(5, 0"),
    ]
    for changes, message in wrong:
        write(tmp_path / "a.h5", **changes)
        assert re.search(f"bad-layout: .*{message}", faults(tmp_path)[0])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["training/features"] = h5py.ExternalLink("b.h5", "features")
        file["test"] = h5py.ExternalLink("b.h5", "test")
    assert "lies outside of the file" in faults(tmp_path)[0]
    assert "group test is missing" in faults(tmp_path, group="test")[0]


def test_a_file_that_is_cut_short_or_never_written_is_a_fault(tmp_path: Path) -> None:
    write(tmp_path / "whole.h5")
    (tmp_path / "a.h5").write_bytes((tmp_path / "whole.h5").read_bytes()[:20_000])
    assert "unreadable" in faults(tmp_path)[0]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("training/features", (51, 100_000, 64, 64, 1), np.float32)
    assert "it is incomplete" in faults(tmp_path)[0]


def test_limits_refuse_by_the_header_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    assert "too-long" in faults(tmp_path, limits=Limits(frames=4))[0]
    assert "too-large" in faults(tmp_path, limits=Limits(pixels=255))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.full((5, 3, 16, 16, 1), np.nan)}, "features of video 0 has values that are no pixels"),
        ({"features": np.full((5, 3, 16, 16, 1), -1)}, "no pixels"),
        ({"features": np.full((5, 3, 16, 16, 1), 1.5)}, "floats up to 1.5"),
        ({"groups": np.full((5, 3, 16, 16, 1), 256)}, "groups of video 0 has values"),
    ],
)
def test_values_that_are_no_pixels_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.h5", **changes)
    with pytest.raises(VideoError, match=message):
        rnem_hdf5.probe(video(), opener(tmp_path))


def test_a_damaged_video_leaves_the_others_readable(tmp_path: Path) -> None:
    clips = [e.clip() for e in simulator("bouncing-balls:size=16").episodes("train", 0, 3, None)]
    rnem_hdf5.write_rnem_hdf5(tmp_path / "a.h5", {"train": clips})
    with h5py.File(tmp_path / "a.h5") as file:
        place = cast(h5py.Dataset, file["training/features"]).id.get_chunk_info(1)
    data = bytearray((tmp_path / "a.h5").read_bytes())
    data[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(VideoError, match="video 1 cannot be read"):
        rnem_hdf5.probe(video(1), opener(tmp_path))
    assert rnem_hdf5.probe(video(2), opener(tmp_path)).frames == 51


def test_the_layout_names_a_group_for_each_split() -> None:
    assert LAYOUTS["rnem-hdf5"].splits == {"train": "training", "val": "validation", "test": "test"}
