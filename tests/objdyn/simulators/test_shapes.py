import numpy as np
import pytest
from scipy import ndimage

from objdyn.clips import Clip, from_sample, to_sample
from objdyn.simulators import shapes, simulator
from objdyn.simulators.shapes import BACKGROUND, CONTRAST, KINDS, Options, stencil


def images(options: str = "", split: str = "train", first: int = 0, count: int = 60) -> list[Clip]:
    found = simulator(f"shapes:{options}" if options else "shapes")
    return [episode.clip() for episode in found.episodes(split, first, count, None)]


def boxes(clip: Clip) -> list[tuple[slice, slice]]:
    """Of the shapes, from the labels alone."""
    return ndimage.find_objects(clip.truth["segmentation"][0])


def test_images_are_those_that_the_setting_asks_for() -> None:
    clips = images()
    assert {clip.frames.shape for clip in clips} == {(1, 64, 64, 3)}
    assert {int(clip.truth["num_objects"]) for clip in clips} == {2, 3, 4, 5}
    assert simulator("shapes").episodes_per_split == {"train": 40_000, "val": 2_000, "test": 2_000}
    sides = {side.stop - side.start for clip in clips for box in boxes(clip) for side in box}
    assert sides == {11, 12, 13}


def test_the_boxes_of_shapes_do_not_overlap() -> None:
    for clip in images("objects=2-8,size=64,side=5-14", count=40):
        covered = np.zeros((64, 64), int)
        for box in boxes(clip):
            covered[box] += 1
        assert covered.max() == 1


def test_segmentation_colours_and_positions_agree() -> None:
    for clip in images(count=20):
        labels, frame = clip.truth["segmentation"][0], clip.frames[0]
        assert (frame[labels == 0] == BACKGROUND).all()
        assert clip.truth["num_objects"] == labels.max() == clip.truth["present"].sum()
        for index, (rows, columns) in enumerate(boxes(clip)):
            colors = np.unique(frame[labels == index + 1], axis=0).astype(int)
            assert len(colors) == 1
            assert np.abs(colors[0] - BACKGROUND).max() >= CONTRAST
            y, x = (clip.truth["positions"][0, index] + 1) / 2 * 63
            assert y == pytest.approx((rows.start + rows.stop - 1) / 2, abs=1e-4)
            assert x == pytest.approx((columns.start + columns.stop - 1) / 2, abs=1e-4)
        assert not clip.truth["positions"][0, labels.max() :].any()


@pytest.mark.parametrize("side", [2, 11, 12, 13, 40])
def test_every_shape_touches_the_four_sides_of_its_box_and_is_symmetric(side: int) -> None:
    for kind in KINDS:
        filled = stencil(kind, side, side)
        assert all(edge.any() for edge in (filled[0], filled[-1], filled[:, 0], filled[:, -1]))
        assert np.array_equal(filled, filled[:, ::-1])


def test_areas_are_those_of_geometry() -> None:
    areas = {kind: stencil(kind, 400, 200).mean() for kind in KINDS}
    assert areas["rectangle"] == 1
    assert areas["triangle"] == pytest.approx(1 / 2, abs=0.01)
    assert areas["disc"] == areas["ellipse"] == pytest.approx(np.pi / 4, abs=0.01)


def test_all_kinds_are_about_equally_likely() -> None:
    kinds = [kind for number in range(300) for kind in shapes.draw(Options(), "train", number)[1]]
    shares = [kinds.count(kind) / len(kinds) for kind in KINDS]
    # 1,050 shapes: three standard deviations are 0.04
    assert shares == pytest.approx([0.25] * 4, abs=0.04)


def test_an_image_depends_on_seed_split_and_number_alone() -> None:
    alone, among = images(first=7, count=1)[0], images(first=5, count=4)[2]
    assert alone.key == among.key == "train-000007"
    assert alone.source == f"sim:{simulator('shapes').name}/train/7"
    assert to_sample(alone) == to_sample(among)
    different = {
        simulator(f"shapes:{options}").episodes(split, number, 1, seed)[0].clip().frames.tobytes()
        for options in ("objects=5", "objects=5,seed=2")
        for split in ("train", "val", "test")
        for number in (0, 1)
        for seed in (None, 5)
    }
    assert len(different) == 3 * 2 * 3  # --seed 5 replaces the seed of the options


def test_a_clip_survives_storing() -> None:
    clip = images(count=1)[0]
    again = from_sample(clip.key, to_sample(clip))
    assert np.array_equal(clip.frames, again.frames)
    assert all(np.array_equal(clip.truth[name], again.truth[name]) for name in clip.truth)


def test_the_name_holds_all_options_in_one_order() -> None:
    assert simulator("shapes:size=32,objects=1-2").name == "shapes:objects=1-2,size=32,side=11-13,seed=0"
    assert simulator("shapes").name == simulator(simulator("shapes").name).name
    assert simulator("shapes").name == "shapes:objects=2-5,size=64,side=11-13,seed=0"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes:balls=3", "no option 'balls=3'; write KEY=VALUE,KEY=VALUE with objects=N or objects=A-B"),
        ("shapes:objects=0-3", "objects must be N or A-B with 1 <= A <= B <= 50, got 0-3"),
        ("shapes:objects=5,size=32", "5 shapes of 13 pixels do not fit into 32 pixels"),
        ("shapes:side=11-70", "side must be N or A-B with 2 <= A <= B <= size=64, got 11-70"),
        ("shapes:size=4", "size must be 8 to 1024 pixels, got 4"),
        ("shapes:size=x", "shapes wants size=PIXELS, got 'size=x'"),
        ("shapes:objects=2,objects=3", "option objects of shapes is given twice"),
    ],
)
def test_impossible_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulator(spec)


def test_impossible_windows_and_ranges_are_refused() -> None:
    episode = simulator("shapes").episodes("val", 0, 1, None)[0]
    assert episode.num_frames == 1
    with pytest.raises(ValueError, match="is an image of 1 frame, got start=0 and length=2; set clip_frames to 1"):
        episode.clip(0, 2)
    with pytest.raises(ValueError, match="shapes/val has 2000 images, got first=1999 and count=2"):
        simulator("shapes").episodes("val", 1999, 2, None)
    with pytest.raises(ValueError, match="shapes has the splits train, val, test, got 'dev'"):
        simulator("shapes").episodes("dev", 0, 1, None)


def test_crowded_images_find_a_place() -> None:
    # two boxes of 13 in 32 pixels fit only near opposite edges of an axis
    assert all(clip.truth["num_objects"] == 2 for clip in images("objects=2,size=32,side=13", count=30))
