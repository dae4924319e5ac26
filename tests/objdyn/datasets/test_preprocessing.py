from typing import Any

import numpy as np
import pytest
from PIL import Image

from objdyn.datasets.preprocessing import Preprocessing


@pytest.mark.parametrize(
    ("frames", "stride", "hop", "start", "length", "expected"),
    [
        (20, 3, None, 0, 1699, list(range(0, 1641, 60))),
        (20, 3, None, 0, 58, [0]),
        (20, 3, None, 0, 57, []),
        (4, 1, 2, 1, 9, [1, 3, 5]),
        (1, 5, None, 0, 6, [0, 5]),
    ],
)
def test_starts_are_the_clips_that_fit(
    frames: int, stride: int, hop: int | None, start: int, length: int, expected: list[int]
) -> None:
    preprocessing = Preprocessing(frames, stride, hop, start)
    assert list(preprocessing.starts(length)) == expected
    assert all(preprocessing.indices(first)[-1] < length for first in expected)


def test_a_time_split_shares_no_frame() -> None:
    before = Preprocessing(4, stride=2, hop=3, stop=24)
    after = Preprocessing(4, stride=2, hop=3, start=24)
    assert [before.indices(first)[-1] for first in before.starts(100)] == list(range(6, 24, 3))
    assert after.starts(100)[0] == 24
    # A shorter video ends where it ends.
    assert list(before.starts(10)) == [0, 3]
    with pytest.raises(ValueError, match="a clip spans 7 frames, so from start=5 stop must be 12 or more, got 11"):
        Preprocessing(4, stride=2, start=5, stop=11)


def test_squeeze_keeps_all_and_center_crop_cuts_the_longer_side() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 100
    squeezed = Preprocessing(1, size=4).apply(image)
    assert squeezed[0, :, 0].tolist() == [0, 100, 100, 0]
    assert Preprocessing(1, fit="center-crop", size=4).apply(image)[0, :, 0].tolist() == [100] * 4


def test_area_filter_averages_blocks() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    expected = image.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(Preprocessing(1, size=2).apply(image) - expected).max() <= 0.5


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_filters_are_pillows(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((4, 4), Image.Resampling[name.upper()])
    assert np.array_equal(Preprocessing(1, filter=name, size=4).apply(image), np.asarray(expected))


def test_frames_of_the_right_size_stay_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(Preprocessing(1, crop=(2, 1, 6, 5), filter="lanczos", size=4).apply(image), image[1:5, 2:6])


def test_positions_follow_crop_and_size() -> None:
    whole = Preprocessing(1, size=64)
    assert whole.positions(np.array([0.5, 63.5]), 64, 64).tolist() == [1.0, -1.0]  # (x, y) in, (y, x) out
    index = 10.0
    assert whole.positions(np.array([index + 0.5, 0.5]), 64, 64)[1] == pytest.approx(2 * index / 63 - 1)
    half = Preprocessing(1, crop=(32, 0, 64, 32), size=64)
    # The crop doubles pixels: the one at x index 32 covers the stored ones 0 and 1, its centre lies between them.
    assert half.positions(np.array([32.5, 16.0]), 64, 64) == pytest.approx([0.0, 2 * 0.5 / 63 - 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"stride": 0}, "stride"),
        ({"hop": 0}, "hop"),
        ({"size": 1}, "size"),
        ({"start": -1}, "start"),
        ({"fit": "crop"}, "choose one of squeeze, center-crop"),
        ({"filter": "best"}, "unknown filter"),
        ({"crop": (4, 0, 4, 2)}, "x0 < x1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"frames": 1, **changes})  # pyright: ignore[reportArgumentType]


def test_crop_outside_of_the_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the frame, which is 8 wide and 6 high"):
        Preprocessing(1, crop=(0, 0, 9, 6)).apply(np.zeros((6, 8, 3), np.uint8))


def test_trimming_drops_the_end_then_repeats_what_is_last() -> None:
    trimmed = Preprocessing(2, drop_last=3, pad_to=6)
    assert trimmed.order(12).tolist() == list(range(9))
    assert trimmed.order(7).tolist() == [0, 1, 2, 3, 3, 3]
    assert trimmed.order(3).tolist() == []  # nothing is left that could be repeated
    assert list(trimmed.starts(7)) == [0, 2, 4]
    assert list(Preprocessing(2, drop_last=3, pad_to=6, stop=5).starts(7)) == [0, 2]
    assert Preprocessing(2).order(4).tolist() == [0, 1, 2, 3]


def test_inverted_colours_are_those_of_the_resized_frame_and_labels_stay() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    plain, inverted = Preprocessing(1, size=2), Preprocessing(1, size=2, inverted=True)
    assert np.array_equal(inverted.apply(image), 255 - plain.apply(image)[..., [2, 1, 0]])
    assert np.array_equal(inverted.apply(image[..., 0]), plain.apply(image[..., 0]))


@pytest.mark.parametrize("name", ["start", "drop_last", "pad_to"])
def test_negative_numbers_of_frames_are_refused(name: str) -> None:
    changes: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got -1"):
        Preprocessing(2, **changes)
