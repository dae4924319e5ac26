from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest
from PIL import Image

from objdyn.datasets import LAYOUTS, Cut, Found, Preprocessing, towers


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def names(found: Found) -> set[str]:
    return {video.source for video in found.videos}


def test_find_takes_videos_and_folders_of_images_together() -> None:
    listing = ["10.mp4", "2.avi", "7/00000.png", "7/00001.png", "7/README.md", "labels.csv", "still.png"]
    found = towers.find(listing)
    assert [(video.source, len(video.files)) for video in found.videos] == [("2.avi", 1), ("7", 2), ("10.mp4", 1)]
    assert found.ignored == 3


@pytest.mark.parametrize(("count", "test"), [(493, 100), (986, 200), (50, 10), (5, 1), (3, 1)])
def test_the_split_has_the_papers_share(count: int, test: int) -> None:
    found = towers.find([f"tower_{i}.mp4" for i in range(count)])
    parts = {split: towers.select(found, split) for split in ("train", "test")}
    assert (len(parts["train"].videos), len(parts["test"].videos)) == (count - test, test)
    assert names(parts["train"]) | names(parts["test"]) == names(found)
    assert (parts["train"].ignored, parts["test"].ignored) == (test, count - test)


def test_the_split_depends_on_names_and_seed_not_on_the_order_of_the_listing() -> None:
    listing = [f"tower_{i}.mp4" for i in range(60)]
    first = towers.select(towers.find(listing), "test")
    assert towers.select(towers.find(listing[::-1]), "test") == first
    assert names(towers.select(towers.find(listing), "test", seed=1)) != names(first)
    numbers = [int(name[6:-4]) for name in names(first)]
    assert max(numbers) - min(numbers) > 20  # no run of neighbours


def test_a_video_more_moves_at_most_one_across_the_border() -> None:
    listing = [f"tower_{i}.mp4" for i in range(60)]
    before = names(towers.select(towers.find(listing), "test"))
    after = names(towers.select(towers.find([*listing, "more.mp4"]), "test"))
    assert len(before - after) <= 1
    assert len(after - before) <= 1


def test_other_splits_and_too_few_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="has the splits train, test, not 'val'"):
        towers.select(towers.find(["a.mp4"]), "val")
    with pytest.raises(ValueError, match="1 towers leave none for the split 'test'"):
        towers.select(towers.find(["a.mp4"]), "test")


def test_either_kind_gives_centre_square_clips(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    frames = np.zeros((6, 32, 48, 3), np.uint8)
    frames[:, :, 8:40] = 200  # what the centre square keeps
    write_video(tmp_path / "a.mp4", frames, fps=60)
    (tmp_path / "b").mkdir()
    for i, image in enumerate(frames):
        Image.fromarray(image).save(tmp_path / f"b/{i}.png")
    layout = LAYOUTS["towers"]
    found = layout.find(["a.mp4", *(f"b/{i}.png" for i in range(6))])
    preprocessing = Preprocessing(3, stride=2, fit="center-crop", size=16)
    for video, rate in zip(found.videos, (60.0, 30.0), strict=True):
        probed = layout.probe(video, opener(tmp_path))
        assert (probed.frames, probed.height, probed.width) == (6, 32, 48)
        (clip,) = layout.read(probed, opener(tmp_path), [Cut("k", 1)], preprocessing, fps=30.0)
        assert clip.frames.shape == (3, 16, 16, 3)
        assert np.abs(clip.frames[:, :, 1:-1].astype(int) - 200).max() < 8
        assert (clip.fps, clip.truth) == (rate, {})
