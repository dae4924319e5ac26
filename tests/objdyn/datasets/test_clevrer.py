import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import zstandard
from pycocotools import mask as coco

from objdyn.clevrer import Camera, Event, Properties, look_at
from objdyn.clips import Clip
from objdyn.datasets import LAYOUTS, Cut, Found, Limits, Preprocessing, Video, VideoError, clevrer

LOOKS = (("cyan", "rubber", "cube"), ("gray", "metal", "sphere"), ("red", "metal", "cylinder"))
CAMERA = {"matrix": [[20, 0, 24, 0], [0, 20, 16, 0], [0, 0, 1, 0]], "width": 48, "height": 32}
"""A point (x, y, z) appears at u = 20 x / z + 24, v = 20 y / z + 16."""


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def annotation(number: int = 0, frames: int = 6, objects: int = 2, **state: Any) -> dict[str, Any]:
    """An annotation in the published schema: object i at (i, 0, 4), in view."""
    return {
        "scene_index": number,
        "video_filename": f"video_{number:05d}.mp4",
        "object_property": [
            {"object_id": i, **dict(zip(("color", "material", "shape"), LOOKS[i % 3], strict=True))}
            for i in range(objects)
        ],
        "motion_trajectory": [
            {
                "frame_id": t,
                "objects": [
                    {
                        "object_id": i,
                        "location": [float(i), 0.0, 4.0],
                        "orientation": [0.0, 0.0, 0.0],
                        "velocity": [0.0, 0.0, 0.0],
                        "angular_velocity": [0.0, 0.0, 0.0],
                        "inside_camera_view": True,
                    }
                    | state
                    for i in range(objects)
                ],
            }
            for t in range(frames)
        ],
        "collision": [{"object_ids": [1, 0], "frame_id": 3, "location": [0.0, 0.0, 0.0]}] if objects > 1 else [],
    }


class Folder:
    """A source with one video of 6 frames of 48x32 at 25 fps, and what else a test writes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def json(self, name: str, data: object) -> None:
        (self.root / name).write_text(json.dumps(data))

    def masks(self, masks: np.ndarray, name: str = "mask_00000.npy.zst") -> None:
        with zstandard.open(self.root / name, "wb") as file:
            np.save(cast(Any, file), masks, allow_pickle=False)

    def proposals(self, frames: Sequence[Sequence[dict[str, Any]]]) -> None:
        named = [{"frame_index": t, "objects": list(objects)} for t, objects in enumerate(frames)]
        self.json("proposal_00000.json", {"video_index": 0, "frames": named})

    def probe(self, limits: Limits = Limits()) -> Video:  # noqa: B008
        found = clevrer.find(sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.*")))
        return clevrer.probe(found.videos[0], opener(self.root), limits)

    def clip(self, start: int = 0, video: Video | None = None, **settings: Any) -> Clip:
        preprocessing = Preprocessing(**{"frames": 4, "size": None, **settings})
        video = video or self.probe()
        (clip,) = clevrer.read(video, opener(self.root), [Cut("k", start)], preprocessing)
        return clip


@pytest.fixture
def folder(tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]) -> Folder:
    write_video(tmp_path / "video_00000.mp4", counting_frames(6))
    return Folder(tmp_path)


def files(found: Found) -> dict[str, tuple[str, ...]]:
    return {video.source: video.files[1:] for video in found.videos}


# Finding and pairing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("video", "beside"),
    [
        ("video_00012.mp4", "annotation_00012.json"),
        ("train/video_00000-01000/video_00012.mp4", "train/annotation_00000-01000/annotation_00012.json"),
        ("video_train/video_00000-01000/video_00012.mp4", "annotation_train/annotation_00012.json"),
        ("videos/train/video_00012.mp4", "annotation_00000-01000/annotation_00012.json"),
    ],
)
def test_a_video_is_found_with_its_annotation_however_they_were_unpacked(video: str, beside: str) -> None:
    listing = [beside, video, "derender_proposals/proposal_00012.json", "questions/train.json", "a/video_012.mp4"]
    found = clevrer.find(listing)
    assert files(found) == {video: (beside, "derender_proposals/proposal_00012.json")}
    assert (found.ignored, found.faults) == (2, ())


def test_videos_are_in_order_of_their_numbers() -> None:
    found = clevrer.find(["b/video_00002.mp4", "a/video_00010.mp4", "c/video_00001.mp4", "a/Video_00003.mp4"])
    assert list(files(found)) == ["c/video_00001.mp4", "b/video_00002.mp4", "a/video_00010.mp4"]


def test_an_annotation_goes_with_the_nearest_video_of_its_split() -> None:
    listing = [
        *("train/video_00001.mp4", "validation/video_00001.mp4", "train/annotation_00001.json"),
        *("run-1/video_00002.mp4", "run-2/video_00002.mp4", "run-2/annotation_00002.json"),
    ]
    assert files(clevrer.find(listing)) == {
        "train/video_00001.mp4": ("train/annotation_00001.json",),
        "validation/video_00001.mp4": (),
        "run-1/video_00002.mp4": (),
        "run-2/video_00002.mp4": ("run-2/annotation_00002.json",),
    }


def test_of_two_annotations_that_fit_alike_none_is_used() -> None:
    (video,) = clevrer.find(["a/video_00001.mp4", "b/annotation_00001.json", "c/annotation_00001.json"]).videos
    assert video.files == ("a/video_00001.mp4",)
    assert video.note == "b/annotation_00001.json and c/annotation_00001.json both fit it; neither is used"


def test_an_annotation_without_its_video_is_a_fault_and_every_file_counts_once() -> None:
    listing = ["video_00001.mp4", "annotation_00001.json", "x/annotation_00007.json", "proposal_00009.json", "a.txt"]
    found = clevrer.find(listing)
    assert [(fault.source, fault.code) for fault in found.faults] == [("x/annotation_00007.json", "no-video")]
    assert "video_00007.mp4" in found.faults[0].message
    assert sum(len(video.files) for video in found.videos) + found.ignored + len(found.faults) == len(listing)


def test_folders_named_after_splits_tell_which_is_which() -> None:
    listing = [f"{split}/video_0000{i}.mp4" for split in ("train", "video_validation", "Test") for i in range(2)]
    found = clevrer.find([*listing, "train/annotation_00000.json", "train/annotation_00005.json"])
    parts = {split: clevrer.select(found, split) for split in ("train", "val", "test")}
    assert {split: sorted(files(part)) for split, part in parts.items()} == {
        "train": listing[:2],
        "val": listing[2:4],
        "test": listing[4:],
    }
    assert [parts[split].ignored for split in ("train", "val")] == [4, 6]
    assert [len(parts[split].faults) for split in ("train", "val")] == [1, 0]
    with pytest.raises(ValueError, match="is called val in every job, whatever its folder is: give val"):
        clevrer.select(found, "validation")


def test_numbers_tell_the_split_where_folders_do_not() -> None:
    listing = [f"video_{number:05d}.mp4" for number in (9_999, 10_000, 14_999, 15_000, 20_001)]
    found = clevrer.find(listing)
    assert list(files(clevrer.select(found, "train"))) == listing[:1]
    assert list(files(clevrer.select(found, "val"))) == listing[1:3]
    assert list(files(clevrer.select(found, "test"))) == listing[3:4]
    only_validation = clevrer.find(listing[1:3])
    assert clevrer.select(only_validation, "test") == only_validation  # as PROVIDE and ODDN use it
    assert list(files(clevrer.select(found, "test", numbers=range(10_000, 15_000)))) == listing[1:3]


@pytest.mark.parametrize(
    ("split", "numbers", "message"),
    [
        ("night", None, "none of 2 videos is of the split 'night'; there is train and val"),
        ("test", range(5, 8), "none of 2 videos is from 5 to 7"),
    ],
)
def test_a_split_that_is_not_there_is_refused(split: str, numbers: range | None, message: str) -> None:
    found = clevrer.find(["train/video_00001.mp4", "val/video_10000.mp4"])
    with pytest.raises(ValueError, match=message):
        clevrer.select(found, split, numbers=numbers)


# Annotations ---------------------------------------------------------------------------------------------------------


def test_a_whole_annotation_is_read_as_it_is() -> None:
    data = annotation(number=7, frames=5)
    data["motion_trajectory"][2]["objects"][1] |= {"location": [1.5, -2.0, 0.2], "inside_camera_view": False}
    data["motion_trajectory"].reverse()  # frames and objects are known by their ids
    parsed = clevrer.parse_annotation(data, 5)
    assert parsed.scene_index == 7
    assert parsed.properties == (Properties("cyan", "rubber", "cube"), Properties("gray", "metal", "sphere"))
    assert parsed.motion.location[2, 1].tolist() == [1.5, -2.0, 0.2]
    assert parsed.motion.in_view.tolist() == [[True, t != 2] for t in range(5)]
    assert parsed.collisions == (Event("collision", 3, (0, 1)),)
    assert parsed.known.all()
    assert not parsed.missing


@pytest.mark.parametrize("name", ["location", "orientation", "velocity", "angular_velocity"])
@pytest.mark.parametrize("value", [None, [1.0, None, 2.0], [1.0, 2.0], "1 2 3", [float("nan"), 0.0, 0.0], [True, 0, 0]])
def test_a_vector_that_is_none_is_nan_and_counted(name: str, value: Any) -> None:
    data = annotation(frames=4)
    data["motion_trajectory"][1]["objects"][0][name] = value
    parsed = clevrer.parse_annotation(data, 4)
    where = np.zeros((4, 2), bool)
    where[1, 0] = True
    assert np.array_equal(np.isnan(getattr(parsed.motion, name)).all(axis=-1), where)
    assert parsed.missing == {f"objects.{name}": 1}
    assert parsed.motion.in_view.all()


def test_missing_keys_are_counted_each_by_its_name() -> None:
    data = annotation(frames=4)
    del data["scene_index"]
    data["object_property"][1]["shape"] = "donut"
    data["collision"] += [None, {"object_ids": [0, 9], "frame_id": 1}, {"object_ids": [0, 1], "frame_id": None}]
    first, second, third, fourth = data["motion_trajectory"]
    del first["objects"][0]["inside_camera_view"]
    second["objects"].pop()
    third["objects"] = None
    fourth["frame_id"] = 99
    parsed = clevrer.parse_annotation(data, 4)
    assert parsed.missing == {
        "scene_index": 1,
        "object_property.shape": 1,
        "collision entry": 1,
        "collision.object_ids": 1,
        "collision.frame_id": 1,
        "objects.inside_camera_view": 1,
        "objects": 1,
        "objects entry": 3,  # one of the second frame, two of the third
        "motion_trajectory.frame_id": 1,
        "motion_trajectory frame": 1,
    }
    assert parsed.properties == (Properties("cyan", "rubber", "cube"), None)
    assert parsed.motion.in_view.tolist() == [[False, True], [True, False], [False, False], [False, False]]
    assert parsed.known.tolist() == [True, True, False, False]
    assert len(parsed.collisions) == 1


def test_an_empty_annotation_holds_nothing_but_counts() -> None:
    parsed = clevrer.parse_annotation({}, 3)
    assert parsed.motion.in_view.shape == (3, 0)
    assert not parsed.known.any()
    assert {"object_property", "motion_trajectory", "collision"} <= parsed.missing.keys()


@pytest.mark.parametrize(("data", "frames", "code"), [([], 3, "bad-layout"), (None, 3, "bad-layout")])
def test_what_is_no_annotation_is_refused(data: object, frames: int, code: str) -> None:
    with pytest.raises(VideoError) as caught:
        clevrer.parse_annotation(data, frames)
    assert caught.value.code == code


def test_a_claim_of_too_much_takes_no_memory() -> None:
    with pytest.raises(VideoError, match="10000 frames of 254 objects") as caught:
        clevrer.parse_annotation({"object_property": [{"object_id": 253}]}, 10_000)
    assert caught.value.code == "too-large"
    assert clevrer.parse_annotation({"object_property": [{"object_id": 10**9}]}, 3).properties == ()


def provide_by_hand(in_view: np.ndarray) -> list[int]:
    """The rule as the specification words it."""
    frames = len(in_view)
    begin = next((t for t in range(frames) if in_view[t].all()), None)
    if begin is None:
        return []
    end = next((t for t in range(begin, frames) if not in_view[t].all()), frames - 1)
    return list(range(begin, end)) if end - begin >= 40 else []


def test_the_all_visible_slice_follows_provides_rule() -> None:
    random = np.random.default_rng(0)
    lengths = set()
    for _ in range(300):
        in_view = np.ones((128, 4), bool)
        for i in range(4):  # enters at some frame, leaves at another
            in_view[: random.integers(0, 40) * random.integers(0, 2), i] = False
            in_view[random.integers(60, 200) :, i] = False
        expected = provide_by_hand(in_view)
        assert list(clevrer.visible_slice(in_view)) == expected
        lengths.add(len(expected))
    assert 0 in lengths
    assert len(lengths) > 50
    assert clevrer.visible_slice(np.ones((128, 3), bool)) == range(127)  # never left: the last frame does not count
    in_view = np.zeros((128, 1), bool)
    in_view[10:50] = True
    assert clevrer.visible_slice(in_view) == range(10, 50)
    in_view[49] = False
    assert clevrer.visible_slice(in_view) == range(0)
    in_view[88:] = True
    in_view[:88] = False
    assert clevrer.visible_slice(in_view) == range(0)  # 40 frames, of which the last does not count
    assert clevrer.visible_slice(np.ones((128, 0), bool)) == range(0)


def test_provide_takes_one_clip_from_where_all_are_in_view() -> None:
    video = Video("v", (), frames=128, objects=6, visible=(30, 75))
    assert clevrer.provide_starts(video, Preprocessing(40)) == range(30, 31)
    with pytest.raises(VideoError, match="all of its 6 objects are in view for less than 46 frames"):
        clevrer.provide_starts(video, Preprocessing(46))
    with pytest.raises(VideoError, match="less than 40 frames"):
        clevrer.provide_starts(Video("v", (), frames=60, objects=6, visible=(30, 75)), Preprocessing(10))
    with pytest.raises(VideoError, match="nothing says when all of its objects are in view: it has no annotation"):
        clevrer.provide_starts(Video("v", (), frames=128), Preprocessing(40))


# Clips ---------------------------------------------------------------------------------------------------------------


def test_a_video_alone_gives_clips_without_truth(folder: Folder) -> None:
    video = folder.probe()
    assert (video.frames, video.height, video.width, video.objects) == (6, 32, 48, None)
    assert video.note == "it has no annotation"
    assert folder.clip(video=video).truth == {}


def test_an_annotation_alone_tells_which_objects_are_in_view(folder: Folder) -> None:
    data = annotation()
    for t in (0, 1, 2):
        data["motion_trajectory"][t]["objects"][1]["inside_camera_view"] = False
    folder.json("annotation_00000.json", data)
    video = folder.probe()
    assert (video.note, video.objects) == ("", 2)
    clip = folder.clip(1, frames=2, stride=1, size=16, fit="center-crop")
    assert clip.truth.keys() == {"present", "num_objects"}
    assert clip.truth["present"].tolist() == [[True, False]] * 2
    assert clip.truth["num_objects"] == 1
    clip = folder.clip(1, frames=3, stride=2)
    assert clip.truth["present"].tolist() == [[True, False], [True, True], [True, True]]
    assert clip.truth["num_objects"] == 2


def test_projected_positions_and_velocities_are_those_by_hand(folder: Folder) -> None:
    data = annotation(objects=1, location=[1.0, 0.5, 4.0], velocity=[0.5, 0.0, 1.0])
    folder.json("annotation_00000.json", data)
    folder.json("scene_00000.json", {"camera": CAMERA, "objects": []})
    # u = 20 / 4 + 24 = 29, v = 10 / 4 + 16 = 18.5; u' = 20 (0.5 / 4 - 1 / 16) = 1.25, v' = -20 0.5 / 16 = -0.625
    whole = folder.clip().truth
    assert np.allclose(whole["positions"], [2 * 18 / 31 - 1, 2 * 28.5 / 47 - 1], atol=1e-6)
    assert np.allclose(whole["velocities"], [2 / 31 * -0.625 / 25, 2 / 47 * 1.25 / 25], atol=1e-8)
    squeezed = folder.clip(size=16).truth  # u 16 / 48, v 16 / 32
    assert np.allclose(squeezed["positions"], [2 * (9.25 - 0.5) / 15 - 1, 2 * (29 / 3 - 0.5) / 15 - 1], atol=1e-6)
    assert np.allclose(squeezed["velocities"], [2 / 15 * -0.3125 / 25, 2 / 15 * 1.25 / 3 / 25], atol=1e-8)
    cropped = folder.clip(size=16, fit="center-crop").truth  # (u - 8) 16 / 32, v 16 / 32
    assert np.allclose(cropped["positions"], [2 * (9.25 - 0.5) / 15 - 1, 2 * (10.5 - 0.5) / 15 - 1], atol=1e-6)
    assert np.allclose(cropped["velocities"], [2 / 15 * -0.3125 / 25, 2 / 15 * 0.625 / 25], atol=1e-8)
    assert {array.dtype for name, array in whole.items() if name in ("positions", "velocities")} == {np.dtype("f4")}


def test_velocities_are_what_positions_change_by(folder: Folder) -> None:
    data = annotation(objects=3, frames=6)
    random = np.random.default_rng(1)
    start, speed = random.normal(size=(3, 3)), random.normal(size=(3, 3))
    for t, frame in enumerate(data["motion_trajectory"]):
        for i, state in enumerate(frame["objects"]):
            state |= {"location": (start[i] + speed[i] * t / 25).tolist(), "velocity": speed[i].tolist()}
    camera = look_at((7.0, -6.0, 5.0), (0.0, 0.0, 0.0), 40.0, 96, 64)  # twice the video's size
    folder.json("annotation_00000.json", data)
    folder.json("scene_00000.json", {"camera": {"matrix": camera.matrix.tolist(), "width": 96, "height": 64}})
    truth = folder.clip(frames=6).truth
    central = (truth["positions"][2:] - truth["positions"][:-2]) / 2
    assert np.abs(central - truth["velocities"][1:-1]).max() < 1e-2 * np.abs(central).max()
    pixels = Camera(camera.matrix, 96, 64).project(start)  # of the whole picture: the outermost pixels lie differently
    half = ((pixels + 1) / 2 * (np.array([64, 96]) - 1) + 0.5) / 2
    assert np.allclose(truth["positions"][0], 2 * (half - 0.5) / (np.array([32, 48]) - 1) - 1, atol=1e-6)


def test_an_object_outside_of_the_crop_or_behind_the_camera_is_not_present(folder: Folder) -> None:
    data = annotation(objects=3)
    for frame in data["motion_trajectory"]:
        for state, location in zip(frame["objects"], ([0, 0, 4], [4, 0, 4], [0, 0, -4]), strict=True):
            state["location"] = location
    folder.json("annotation_00000.json", data)
    folder.json("scene_00000.json", {"camera": CAMERA})
    whole, cropped = folder.clip().truth, folder.clip(size=16, fit="center-crop").truth
    assert whole["present"].tolist() == [[True, True, False]] * 4
    assert cropped["present"].tolist() == [[True, False, False]] * 4  # u = 44, the crop ends at 40
    assert (whole["num_objects"], cropped["num_objects"]) == (2, 1)
    assert np.isnan(whole["positions"][:, 2]).all()
    assert np.isfinite(whole["positions"][whole["present"]]).all()


def test_clips_with_frames_that_are_not_annotated_have_no_truth(folder: Folder) -> None:
    folder.json("annotation_00000.json", annotation(frames=5))
    video = folder.probe()
    assert video.note == "annotation_00000.json lacks 1 x motion_trajectory frame"
    assert folder.clip(1, video).truth.keys() == {"present", "num_objects"}
    assert folder.clip(2, video).truth == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "holds a JSON list"),
        (json.dumps(annotation(number=5)), "it says that it is about scene 5"),
        (" " * ((16 << 20) + 1), "more than 16777216 bytes"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_noted_by_name(folder: Folder, content: str, says: str) -> None:
    (folder.root / "annotation_00000.json").write_text(content)
    video = folder.probe()
    assert video.note.startswith("annotation_00000.json is not used: ")
    assert says in video.note
    assert video.objects is None
    assert folder.clip(video=video).truth == {}


def test_an_annotation_of_a_video_that_is_cut_short_lacks_nothing(folder: Folder) -> None:
    folder.json("annotation_00000.json", annotation(frames=128))
    video = folder.probe()
    assert (video.frames, video.objects, video.note) == (6, 2, "")
    assert folder.clip(video=video).truth["present"].all()


def test_an_unreadable_video_is_an_error(folder: Folder) -> None:
    (folder.root / "video_00000.mp4").write_text("no video")
    folder.json("annotation_00000.json", annotation())
    with pytest.raises(VideoError, match="FFmpeg cannot read"):
        folder.probe()


def test_files_beyond_the_limit_of_bytes_are_not_read(folder: Folder) -> None:
    folder.json("annotation_00000.json", annotation(frames=60))
    size = (folder.root / "annotation_00000.json").stat().st_size
    assert size > (folder.root / "video_00000.mp4").stat().st_size
    assert "annotation_00000.json is not used: " in folder.probe(Limits(bytes=size - 1)).note


@pytest.mark.parametrize(
    "camera",
    [
        {},
        None,
        CAMERA | {"matrix": [[1, 2, 3, 4]] * 4},
        CAMERA | {"matrix": [[1, 2, 3]] * 3},
        CAMERA | {"matrix": [[1, 2, 3, None]] * 3},
        CAMERA | {"width": 0},
        CAMERA | {"height": 1 << 40},
    ],
)
def test_a_camera_that_is_none_is_noted(folder: Folder, camera: object) -> None:
    folder.json("annotation_00000.json", annotation())
    folder.json("scene_00000.json", {"camera": camera})
    video = folder.probe()
    assert video.note.startswith("scene_00000.json is not used: camera.")
    assert folder.clip(video=video).truth.keys() == {"present", "num_objects"}


def test_provides_crop_is_the_centre_320_pixels_of_480() -> None:
    image = np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)
    fitted = Preprocessing(1, fit="center-crop", filter="bicubic", size=64)
    cropped = Preprocessing(1, crop=(80, 0, 400, 320), filter="bicubic", size=64)
    assert fitted.box(320, 480) == (80, 0, 400, 320)
    assert np.array_equal(fitted.apply(image), cropped.apply(image))


# Masks ---------------------------------------------------------------------------------------------------------------


def test_true_masks_are_cut_like_the_frames_and_resized_to_the_nearest(folder: Folder) -> None:
    masks = np.random.default_rng(0).integers(0, 4, (6, 32, 48)).astype(np.uint8)
    folder.masks(masks)
    assert np.array_equal(folder.clip(1, frames=2, stride=3).truth["segmentation"], masks[[1, 4]])
    cropped = folder.clip(size=32, fit="center-crop").truth
    assert np.array_equal(cropped["segmentation"], masks[:4, :, 8:40])
    assert cropped["num_objects"] == 3  # without an annotation, the labels
    blocks = np.kron(masks[:, :16, :16], np.ones((1, 2, 3), np.uint8))  # 2x3 pixels of one label
    folder.masks(blocks)
    assert np.array_equal(folder.clip(size=16).truth["segmentation"], masks[:4, :16, :16])


def test_masks_for_some_frames_only_serve_the_clips_of_these(folder: Folder) -> None:
    folder.json("annotation_00000.json", annotation())
    folder.masks(np.ones((4, 32, 48), np.uint8))
    video = folder.probe()
    assert video.note == "mask_00000.npy.zst has masks of 4 of 6 frames; clips of others have no segmentation"
    assert "segmentation" in folder.clip(0, video).truth
    assert folder.clip(1, video).truth.keys() == {"present", "num_objects"}


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        (np.zeros((6, 32, 40), np.uint8), "uint8 (6, 32, 40)"),
        (np.zeros((6, 32, 48), np.int32), "more than"),
        (np.zeros((60, 32, 48), np.uint8), "more than"),
        (np.zeros(7), "float64 (7,)"),
    ],
)
def test_masks_of_another_shape_are_not_used(folder: Folder, masks: np.ndarray, says: str) -> None:
    folder.masks(masks)
    video = folder.probe()
    assert "mask_00000.npy.zst is not used: " in video.note
    assert says in video.note
    assert folder.clip(video=video).truth == {}


@pytest.mark.parametrize("damage", ["cut", "text", "bomb"])
def test_damaged_masks_are_noted_and_take_no_memory(folder: Folder, damage: str) -> None:
    path = folder.root / "mask_00000.npy.zst"
    folder.masks(np.random.default_rng(0).integers(0, 4, (6, 32, 48)).astype(np.uint8))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no masks")
    else:
        path.write_bytes(zstandard.ZstdCompressor().compress(bytes(50_000_000)))
    assert "mask_00000.npy.zst is not used: " in folder.probe().note


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    encoded: Any = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def decode_by_hand(encoded: dict[str, Any]) -> np.ndarray:
    """COCO's format as its documentation words it: column by column, runs of 0 and 1 in turn."""
    runs: list[int] = []
    letters = iter(encoded["counts"])
    for letter in letters:
        value, shift, bits = 0, 0, ord(letter) - 48
        while True:
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                break
            bits = ord(next(letters)) - 48
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    flat = [i % 2 for i, run in enumerate(runs) for _ in range(run)]
    height, width = encoded["size"]
    return np.array(flat, np.uint8).reshape(width, height).T


def proposal(mask: np.ndarray, look: Sequence[str] = LOOKS[0], score: float = 1.0) -> dict[str, Any]:
    color, material, shape = look
    return {"mask": run_lengths(mask), "score": score, "color": color, "material": material, "shape": shape}


def test_run_lengths_are_decoded_as_by_hand(folder: Folder) -> None:
    random = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        noise = random.random((32, 48)) < share
        smooth = np.zeros((32, 48), bool)
        smooth[random.integers(0, 9) : random.integers(10, 32), random.integers(0, 9) : random.integers(10, 48)] = True
        for mask in (noise, smooth, ~smooth):
            each = proposal(mask)
            assert np.array_equal(decode_by_hand(each["mask"]), mask)
            folder.proposals([[each]] * 6)
            assert np.array_equal(folder.clip().truth["segmentation"], np.stack([mask] * 4))


def test_run_lengths_that_are_numbers_are_decoded_too(folder: Folder) -> None:
    mask = np.zeros((32, 48), bool)
    mask[5:9, 7] = True
    plain = {"size": [32, 48], "counts": [7 * 32 + 5, 4, 48 * 32 - 7 * 32 - 9]}
    folder.proposals([[proposal(mask) | {"mask": plain}]] * 6)
    assert np.array_equal(folder.clip().truth["segmentation"][0], mask)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        {"size": [48, 32], "counts": [48 * 32]},
        {"size": [1 << 20, 1 << 20], "counts": "0"},
        {"size": [32, 48], "counts": ""},
        {"size": [32, 48], "counts": "0"},
        {"size": [32, 48], "counts": "P" * 500},
        {"size": [32, 48], "counts": "ooooooooooooooo0"},
        {"size": [32, 48], "counts": "\u00e9\u0000"},
        {"size": [32, 48], "counts": [48 * 32 + 1, -1]},
        {"size": [32, 48], "counts": [10]},
        {"size": [32, 48], "counts": [10.0, 48 * 32 - 10.0]},
    ],
)
def test_a_frame_with_damaged_run_lengths_has_no_masks(folder: Folder, mask: object) -> None:
    good = proposal(np.eye(32, 48) > 0)
    folder.proposals([[good]] * 5 + [[good, good | {"mask": mask}]])
    video = folder.probe()
    assert "proposal_00000.json has masks of 5 of 6 frames; clips of others have no segmentation" in video.note
    assert "segmentation" in folder.clip(1, video).truth
    assert "segmentation" not in folder.clip(2, video).truth


def test_proposals_get_the_ids_of_the_objects_that_look_like_them(folder: Folder) -> None:
    folder.json("annotation_00000.json", annotation(objects=2))
    strips = np.zeros((4, 32, 48), bool)
    for i in range(4):
        strips[i, :, 12 * i : 12 * i + 12] = True
    frames = []
    for t in range(6):  # in another order in each frame, as detectors have it
        seen = [proposal(strips[0], LOOKS[1]), proposal(strips[1], LOOKS[0]), proposal(strips[2], LOOKS[2])]
        seen.append(proposal(strips[3], LOOKS[0], score=0.5))  # a second one of the same object
        frames.append([seen[(t + i) % 4] for i in range(4)])
    frames[3] = []
    folder.proposals(frames)
    (labels,) = {tuple(map(int, folder.clip(4, frames=2).truth["segmentation"][t, 0, ::12])) for t in (0, 1)}
    assert labels[:2] == (2, 1)
    assert set(labels[2:]) == {3, 4}
    empty = folder.clip(0).truth
    assert not empty["segmentation"][3].any()  # nothing was detected, which is known
    assert tuple(empty["segmentation"][0, 0, ::12]) == labels
    assert empty["num_objects"] == 2  # as annotated


def test_where_proposals_overlap_the_more_certain_is_in_front(folder: Folder) -> None:
    left, right = np.zeros((2, 32, 48), bool)
    left[:, :30], right[:, 20:] = True, True
    folder.json("annotation_00000.json", annotation(objects=2))
    for scores, middle in (((0.9, 0.8), 1), ((0.7, 0.8), 2)):
        pair = [proposal(mask, look, s) for mask, look, s in zip((left, right), LOOKS, scores, strict=False)]
        for frame in itertools.permutations(pair):
            folder.proposals([frame] * 6)
            row = folder.clip().truth["segmentation"][0, 0]
            assert [row[10], row[25], row[40]] == [1, middle, 2]


def test_true_masks_win_over_proposals(folder: Folder) -> None:
    folder.proposals([[proposal(np.eye(32, 48) > 0)]] * 6)
    folder.masks(np.full((6, 32, 48), 2, np.uint8))
    assert (folder.clip().truth["segmentation"] == 2).all()


@pytest.mark.parametrize("data", [[], {"frames": None}, {"frames": [None, {"objects": 3}, {"frame_index": 900}]}])
def test_proposals_of_another_layout_give_no_masks(folder: Folder, data: object) -> None:
    folder.json("proposal_00000.json", data)
    video = folder.probe()
    assert "proposal_00000.json" in video.note
    assert folder.clip(video=video).truth == {}


def test_more_proposals_than_a_frame_can_have_are_not_decoded(folder: Folder) -> None:
    one = proposal(np.eye(32, 48) > 0)
    folder.proposals([[one]] * 5 + [[one] * 255])
    assert "has masks of 5 of 6 frames" in folder.probe().note


def test_the_layout_is_known_by_its_name() -> None:
    layout = LAYOUTS["clevrer"]
    assert (layout.find, layout.probe, layout.read) == (clevrer.find, clevrer.probe, clevrer.read)
    assert (layout.scan, layout.select) == (None, clevrer.select)
