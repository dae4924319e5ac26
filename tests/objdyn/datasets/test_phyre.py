import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest

from objdyn.clips import Clip
from objdyn.datasets import Cut, Limits, Preprocessing, Video, VideoError, phyre

PLAIN = Preprocessing(3, size=None)


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def rollout(frames: int = 6) -> dict[str, np.ndarray]:
    """A red square that rises a row per frame, a black one at the bottom left and a green one above it, 8x8."""
    classes, objects = np.zeros((frames, 8, 8), np.uint8), np.zeros((frames, 3, 14), np.float32)
    classes[:, :2, :2], classes[:, 2:4, :2] = phyre.BLACK, 2
    objects[:, 0, :2], objects[:, 0, 13] = (1 / 8, 1 / 8), 1
    objects[:, 1, :2], objects[:, 1, 9] = (1 / 8, 3 / 8), 1
    objects[:, 2, 8] = 1
    for t in range(frames):
        classes[t, t : t + 2, 4:6] = 1
        objects[t, 2, :2] = 5 / 8, (t + 1) / 8
    return {"frames": classes, "objects": objects, "solved": np.array(True)}


def write(root: Path, **changes: Any) -> Video:
    arrays = {**rollout(), **changes}
    np.savez_compressed(root / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    return Video("a.npz", ("a.npz",))


def one_clip(root: Path, preprocessing: Preprocessing, start: int = 0, **changes: Any) -> Clip:
    video = phyre.probe(write(root, **changes), opener(root))
    (clip,) = phyre.read(video, opener(root), [Cut("k", start)], preprocessing, fps=8.57)
    return clip


def test_frames_stand_upright_in_the_palette_of_phyre(tmp_path: Path) -> None:
    clip = one_clip(tmp_path, PLAIN)
    assert (clip.frames[0, 0, 0] == 255).all()
    assert (clip.frames[0, 7, 0] == 0).all()
    assert clip.frames[0, 7, 4].tolist() == [243, 79, 70]
    assert clip.frames[2, 4, 5].tolist() == [243, 79, 70]
    assert (clip.fps, clip.source) == (8.57, "a.npz")


def test_inverted_colours_are_255_minus_v_with_red_and_blue_swapped(tmp_path: Path) -> None:
    own = one_clip(tmp_path, PLAIN)
    inverted = one_clip(tmp_path, Preprocessing(3, size=None, inverted=True))
    assert np.array_equal(inverted.frames, 255 - own.frames[..., [2, 1, 0]])
    assert (inverted.frames[0, 0, 0] == 0).all()
    assert np.array_equal(inverted.truth["segmentation"], own.truth["segmentation"])


def test_truth_is_of_what_is_not_black(tmp_path: Path) -> None:
    clip = one_clip(tmp_path, PLAIN, start=1)
    # Centres of 2x2 squares lie on the corners of pixels: pixel coordinate p has 2 (p - 0.5) / 7 - 1.
    at = lambda y, x: [2 * (y - 0.5) / 7 - 1, 2 * (x - 0.5) / 7 - 1]  # noqa: E731
    for t in range(3):
        assert clip.truth["positions"][t] == pytest.approx(np.array([at(5, 1), at(6 - t, 5)]), abs=1e-6)
        red = (clip.frames[t] == phyre.PALETTE[1]).all(-1)
        assert np.array_equal(clip.truth["segmentation"][t] == 2, red)
    assert (clip.truth["segmentation"] == 1).sum() == 3 * 4
    assert clip.truth["present"].all()
    assert clip.truth["num_objects"] == 2


def test_an_object_is_present_while_its_centre_is_in_the_crop(tmp_path: Path) -> None:
    clip = one_clip(tmp_path, Preprocessing(6, size=None, crop=(4, 0, 8, 4)))
    assert clip.truth["present"].tolist() == [[False, t >= 3] for t in range(6)]
    assert clip.truth["num_objects"] == 1


def test_objects_of_one_colour_have_no_segmentation(tmp_path: Path) -> None:
    objects = rollout()["objects"]
    objects[:, 1, 8:] = objects[:, 2, 8:]
    clip = one_clip(tmp_path, PLAIN, objects=objects)
    assert set(clip.truth) == {"positions", "present", "num_objects"}


def test_trimmed_rollouts_repeat_the_last_frame_that_is_left(tmp_path: Path) -> None:
    trimmed = one_clip(tmp_path, Preprocessing(7, size=None, drop_last=2, pad_to=7))
    whole = one_clip(tmp_path, Preprocessing(6, size=None))
    kept = [0, 1, 2, 3, 3, 3, 3]
    assert np.array_equal(trimmed.frames, whole.frames[kept])
    for name in ("positions", "segmentation", "present"):
        assert np.array_equal(trimmed.truth[name], whole.truth[name][kept])


def test_other_archives_are_refused_with_the_reason(tmp_path: Path) -> None:
    arrays = rollout()
    states, named = arrays["objects"].copy(), arrays["objects"].copy()
    states[3, 0, 0] = np.nan
    named[3, 0, 13] = 0
    for changes, said in [
        ({"objects": None}, "objects is missing; it holds frames.npy, solved.npy"),
        ({"frames": arrays["frames"].astype(np.int64)}, "frames is int64 (6, 8, 8); uint8 (t, h, w) is wanted"),
        ({"objects": arrays["objects"][..., :13]}, "objects is float32 (6, 3, 13); float32 (t, n, 14) is wanted"),
        ({"objects": arrays["objects"][:5]}, "are not finite states of 6 frames"),
        ({"objects": states}, "are not finite states"),
        ({"objects": named}, "do not each have one colour"),
        ({"frames": arrays["frames"] + 1}, "frames have class 7"),
        ({"frames": np.array([{}], object)}, "frames holds Python objects, which are never loaded"),
    ]:
        with pytest.raises(VideoError) as caught:
            phyre.probe(write(tmp_path, **changes), opener(tmp_path))
        assert caught.value.code == "bad-layout"
        assert said in str(caught.value)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    video = write(tmp_path)
    path = tmp_path / "a.npz"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("frames.npy").header_offset + 120
    for damaged in (b"no zip", data[: len(data) // 2], data[:middle] + bytes(8) + data[middle + 8 :]):
        path.write_bytes(damaged)
        with pytest.raises(VideoError) as caught:
            phyre.probe(video, opener(tmp_path))
        assert caught.value.code in ("unreadable", "truncated"), damaged[:20]


def test_damage_in_other_compressions_is_found_too(tmp_path: Path) -> None:
    video = write(tmp_path)
    path = tmp_path / "a.npz"
    with np.load(path) as whole:
        arrays = {name: whole[name] for name in whole}
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
        data, found = path.read_bytes(), 0
        for place in range(60, len(data) // 2, 40):
            path.write_bytes(data[:place] + bytes(byte ^ 255 for byte in data[place : place + 9]) + data[place + 9 :])
            try:
                phyre.probe(video, opener(tmp_path))
            except VideoError:
                found += 1
        assert found > 0


def test_an_archive_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    video = write(tmp_path)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 256, 256), }\n"
    for frames, code in [(100, "truncated"), (10**9, "too-large"), (-1, "bad-layout")]:
        text = header % frames
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("frames.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(9))
        with pytest.raises(VideoError) as caught:
            phyre.probe(video, opener(tmp_path))
        assert caught.value.code == code


def test_limits_are_checked(tmp_path: Path) -> None:
    video = write(tmp_path)
    for limits, code in [
        (Limits(frames=5), "too-long"),
        (Limits(pixels=63), "too-large"),
        (Limits(bytes=9), "too-large"),
    ]:
        with pytest.raises(VideoError) as caught:
            phyre.probe(video, opener(tmp_path), limits)
        assert caught.value.code == code


def test_real_rollouts_have_their_objects_where_the_truth_says(shared: Path) -> None:
    root = shared / "data/phyre_rollouts"
    found = phyre.find(sorted(path.name for path in root.iterdir()))
    assert (len(found.videos), found.ignored) == (96, 2)
    video = phyre.probe(found.videos[0], opener(root))  # a green, a blue and a red ball
    assert (video.frames, video.height, video.width, video.objects) == (62, 256, 256, 3)
    (clip,) = phyre.read(video, opener(root), [Cut("k", 5)], Preprocessing(10, size=None, drop_last=30))
    rows, columns = np.mgrid[:256, :256]
    for t in range(10):
        for k in range(3):
            mask = clip.truth["segmentation"][t] == k + 1
            centre = 2 * np.array([rows[mask].mean(), columns[mask].mean()]) / 255 - 1
            assert np.abs(centre - clip.truth["positions"][t, k]).max() < 2 / 255 * 0.5


def test_inverted_rollouts_have_the_colours_of_the_published_frames(shared: Path) -> None:
    from PIL import Image

    published = np.asarray(Image.open(shared / "data/phyre_frames/0/50.png").convert("RGB")).astype(int)[24:]
    inverted = (255 - phyre.PALETTE[:, ::-1]).astype(int)
    near = np.abs(published[:, :, None] - inverted).max(-1).min(-1) <= 1
    assert near.mean() > 0.9  # the rest are edges between two colours
    present = [(np.abs(published - colour).max(-1) <= 1).any() for colour in inverted]
    assert present[0]  # the white background became black
    assert sum(present) >= 3
