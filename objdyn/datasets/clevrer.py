"""CLEVRER's folders, as its authors publish them and as our simulator writes them, however they were unpacked.

A video is found by its name at any depth, and so is what belongs to it:

    video_00000.mp4        the video; the published ones have 128 frames of 480x320
    annotation_00000.json  objects, where they are in each frame, and collisions
    proposal_00000.json    masks that a detector found in each frame (COCO's run lengths), where unpacked
    scene_00000.json       of a simulated video: its camera
    mask_00000.npy.zst     of a simulated video: its true masks, uint8 (t, h, w), 0 background, object i as i + 1

Nothing but the video must be there. What is missing or damaged in the rest is told in the video's note and left out of
the truth of its clips.

Source: Yi et al., "CLEVRER: Collision Events for Video Representation and Reasoning" (2020), and its published files.
"""

import dataclasses
import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, UInt8

from objdyn.clevrer import COLORS, MATERIALS, NUM_FRAMES, SHAPES, Camera, Event, Motion, Properties
from objdyn.clips import MAX_BYTES, NO_LIMITS, Clip, Limits, VideoError, from_npy
from objdyn.datasets import videos
from objdyn.datasets.preprocessing import Preprocessing
from objdyn.datasets.sources import Cut, Fault, Found, Open, Video, natural_order

OFFICIAL_SPLITS = {"train": range(10_000), "val": range(10_000, 15_000), "test": range(15_000, 20_000)}
"""Numbers of the published videos."""
DDLP_FRAMES = (18, 118)
"""What DDLP keeps of a video: frames 18 to 117."""
PROVIDE_FRAMES = 40
"""How long all objects must be in view for PROVIDE to test on a video."""
MAX_OBJECTS = 254
"""Of one video; a mask has object i as i + 1 in a byte."""

_T = TypeVar("_T")
_SUFFIXES = {"video": ".mp4", "annotation": ".json", "proposal": ".json", "scene": ".json", "mask": ".npy.zst"}
_NAME = re.compile(rf"({'|'.join(_SUFFIXES)})_([0-9]{{5}})(\.[a-z0-9.]+)")
_SPLIT_FOLDER = re.compile(r"(?:(?:videos?|annotations?|clevrer)[-_ ])?(train|val|test)(?:ing|id|idation)?")
_JSON_BYTES = 16 << 20  # an annotation or a proposal of the published ones has about 0.3 MB
_STATES = 1 << 20  # largest number of frames times objects of an annotation
_RUNS = re.compile(rb"(?:[P-o]{0,5}[0-O])*")  # numbers of six bits a letter, the highest bit set in all but their last


_WORDS = {"color": COLORS, "material": MATERIALS, "shape": SHAPES}
_VECTORS = ("location", "orientation", "velocity", "angular_velocity")


class Annotation(NamedTuple):
    """What an annotation says of one video of t frames with n objects."""

    scene_index: int | None
    properties: tuple[Properties | None, ...]
    """By object id; None where one of the three is not known."""
    motion: Motion
    """``in_view`` is False where the file does not say, the rest NaN."""
    known: Bool[np.ndarray, " t"]
    """Frames of which the file says which objects are in view, of at least one."""
    collisions: tuple[Event, ...]
    """In order of time."""
    missing: Counter[str]
    """How often a key was absent, null, or of a kind that cannot be meant, by the key."""


class _Truth(NamedTuple):
    annotation: Annotation | None
    camera: Camera | None
    masks: UInt8[np.ndarray, "t h w"] | None
    masked: Bool[np.ndarray, " t"]
    """Frames that have masks."""
    notes: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong together, and to which split


def find(listing: Sequence[str]) -> Found:
    """Every ``video_XXXXX.mp4`` is one video, in order of the numbers; other files of its number go with it.

    Of several files of one kind that fit, the one is taken that shares most folders with the video; one of another
    split never is. An annotation that goes with no video is a fault.
    """
    by_number: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in listing:
        if found := _role(path):
            by_number[found[1]][found[0]].append(path)
    films, faults = [], []
    for number, paths in sorted(by_number.items()):
        names = sorted(paths.pop("video", ()), key=natural_order)
        partners: dict[str, list[str]] = {name: [] for name in names}
        notes: dict[str, list[str]] = {name: [] for name in names}
        for role in [role for role in _SUFFIXES if role in paths]:
            found = _partners(names, sorted(paths[role], key=natural_order))
            for name, fitting in found.items():
                if len(fitting) > 1:
                    notes[name].append(f"{' and '.join(fitting)} both fit it; neither is used")
                partners[name] += fitting if len(fitting) == 1 else []
            if role == "annotation":
                for path in sorted(set(paths[role]) - {path for fitting in found.values() for path in fitting}):
                    faults.append(Fault(path, "no-video", f"video_{number:05d}.mp4, which it is about, is not there"))
        films += [Video(name, (name, *partners[name]), note="; ".join(notes[name])) for name in names]
    used = {path for video in films for path in video.files} | {fault.source for fault in faults}
    return Found(tuple(films), ignored=len(listing) - len(used), faults=tuple(faults))


def select(found: Found, split: str, seed: int = 0, numbers: range | None = None) -> Found:
    """Keep the videos of a split, with the annotations that lack theirs; what is of other splits counts as ignored.

    With ``numbers`` the split is the videos of these numbers. Else folders decide, where some are named after splits
    (``train``, ``video_validation``), then the published ranges of numbers, where videos of several are there. A source
    that has neither is one split, whatever its name: the published validation videos serve as PROVIDE's and ODDN's
    test split. ``seed`` is for other layouts.

    Raises:
        ValueError: no video is of this split, or it is called as CLEVRER's folders are and not as our jobs call it.
    """
    if (word := _split_word(split)) != split:
        raise ValueError(f"the dataset's split is called {word} in every job, whatever its folder is: give {word}")
    labels = {video.source: split_of(video.source) for video in found.videos}
    if numbers is None and any(labels.values()):
        wanted, label = split, split_of
    elif numbers is None and len({_official(video.source) for video in found.videos}) > 1:
        wanted, label = split, _official
    else:
        wanted, label = True, lambda path: numbers is None or _number(path) in numbers
    kept = tuple(video for video in found.videos if label(video.source) == wanted)
    if found.videos and not kept:
        which = f"of the split {split!r}" if numbers is None else f"from {numbers.start} to {numbers.stop - 1}"
        there = sorted({str(label(video.source)) for video in found.videos} - {"None", "False"})
        raise ValueError(
            f"none of {len(found.videos)} videos is {which}{'; there is ' if there else ''}{' and '.join(there)}"
        )
    faults = tuple(fault for fault in found.faults if label(fault.source) == wanted)
    before = {path for video in found.videos for path in video.files}
    after = {path for video in kept for path in video.files}
    left = len(before) - len(after) + len(found.faults) - len(faults)
    return found._replace(videos=kept, ignored=found.ignored + left, faults=faults)


def is_video(path: str) -> bool:
    """Whether a file is named like a video of CLEVRER."""
    found = _role(path)
    return found is not None and found[0] == "video"


def split_of(path: str) -> str | None:
    """Name the split (``train``, ``val``, ``test``) that a folder of the path is named after; None if none is."""
    for folder in reversed(path.lower().split("/")[:-1]):
        if found := _SPLIT_FOLDER.fullmatch(folder):
            return found[1]
    return None


def _split_word(split: str) -> str:
    found = _SPLIT_FOLDER.fullmatch(split.lower())
    return found[1] if found else split


def _official(path: str) -> str | None:
    number = _number(path)
    return next((split for split, numbers in OFFICIAL_SPLITS.items() if number in numbers), None)


def _number(path: str) -> int:
    return int(path[path.rindex("_") + 1 :][:5])


def _role(path: str) -> tuple[str, int] | None:
    found = _NAME.fullmatch(path.rsplit("/", 1)[-1])
    return (found[1], int(found[2])) if found and found[3] == _SUFFIXES[found[1]] else None


def _partners(names: Sequence[str], others: Sequence[str]) -> dict[str, list[str]]:
    """For each video the files that are nearest to it, and to which no other video is nearer."""
    near = {
        (name, other): _shared_folders(name, other)
        for name in names
        for other in others
        if None in (split_of(name), split_of(other)) or split_of(name) == split_of(other)
    }
    best: dict[str, int] = defaultdict(int)
    for pair, shared in near.items():
        for path in pair:
            best[path] = max(best[path], shared)
    return {
        name: [other for other in others if near.get((name, other), -1) == best[name] == best[other]] for name in names
    }


def _shared_folders(one: str, other: str) -> int:
    pairs = zip(one.split("/")[:-1], other.split("/")[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(one.count("/"), other.count("/")))


# ---------------------------------------------------------------------------------------------------------------------
# Videos and clips


def probe(video: Video, open_file: Open, limits: Limits = NO_LIMITS) -> Video:
    """Count the frames by decoding; read what belongs to the video once and note what of it is missing or damaged.

    Raises:
        VideoError: the video does not decode, or passes a limit; see ``videos.probe``.
    """
    probed = videos.probe(video, open_file, limits)
    truth = _truth(probed, open_file, limits)
    notes = "; ".join(note for note in (probed.note, video.note, *truth.notes) if note)
    if truth.annotation is None:
        return dataclasses.replace(probed, note=notes)
    seen = visible_slice(truth.annotation.motion.in_view)
    objects = len(truth.annotation.properties)
    return dataclasses.replace(probed, note=notes, objects=objects, visible=(seen.start, seen.stop))


def read(
    video: Video,
    open_file: Open,
    cuts: Sequence[Cut],
    preprocessing: Preprocessing,
    fps: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> Iterator[Clip]:
    """Decode and cut clips, with the truth that is there; ``fps`` stands in where the file states no rate.

    ``present`` (t, n) is the annotation's ``inside_camera_view``: of the whole frame, a crop does not change it unless
    a camera is known; then an object is present while its centre is in the stored frame too. ``num_objects`` counts the
    objects that are present in some frame of the clip; without an annotation, those that have a mask in some frame.
    Where any frame of a clip is not annotated, the clip has neither.

    With a camera there are ``positions`` (t, n, 2), the centres' projections, and ``velocities`` (t, n, 2), their
    derivative per frame of the video by the annotated velocities; NaN where the annotation does not say or the centre
    is not in front of the camera, and not present there.

    ``segmentation`` (t, h, w) has object i of the annotation as i + 1 and is resized to the nearest pixel; it is there
    where every frame of the clip has masks. Of proposals, which have no ids, a mask belongs to the object with the
    colour, material and shape that the detector saw. Others, and a second one of the same object, get labels above
    those of the objects: one label for a kind of mask, so it follows it over the frames. Where masks overlap, the more
    certain one is in front.

    Raises:
        ValueError: the video does not decode as far as it must, or the crop leaves its frames.
    """
    known = _truth(video, open_file, limits)
    nearest = dataclasses.replace(preprocessing, filter="nearest")
    states = {} if known.annotation is None else _states(known.annotation, known.camera, video, preprocessing, fps)

    def truth(indices: range) -> dict[str, np.ndarray]:
        at = slice(indices.start, indices.stop, indices.step)
        found: dict[str, np.ndarray] = {}
        if known.annotation is not None and known.annotation.known[at].all():
            found |= {name: array[at] for name, array in states.items()}
            found["num_objects"] = np.asarray(found["present"].any(axis=0).sum(), np.int64)
        if known.masks is not None and known.masked[at].all():
            labels = np.stack([nearest.apply(known.masks[i]) for i in indices])
            found["segmentation"] = labels
            if known.annotation is None:
                found["num_objects"] = np.asarray(np.count_nonzero(np.unique(labels)), np.int64)
        return found

    yield from videos.read(video, open_file, cuts, preprocessing, fps, limits, truth)


def provide_starts(video: Video, preprocessing: Preprocessing) -> range:
    """First frame of the clip that PROVIDE tests on, see ``visible_slice``: one clip of a video.

    Raises:
        VideoError: the video has no annotation, or all objects are in view too briefly.
    """
    if video.objects is None:
        raise no_annotation(video, "when all of its objects are in view")
    begin, end = video.visible[0], min(video.visible[1], video.frames)
    wanted = max(PROVIDE_FRAMES, preprocessing.span)
    if end - begin < wanted:
        raise VideoError(
            "not-all-visible", f"all of its {video.objects} objects are in view for less than {wanted} frames in a row"
        )
    return range(begin, begin + 1)


def no_annotation(video: Video, what: str) -> VideoError:
    """The error that says why nothing is known of a video's objects."""
    return VideoError("no-annotation", f"nothing says {what}: {video.note or 'it has no annotation'}")


def visible_slice(in_view: Bool[np.ndarray, "t n"]) -> range:
    """Frames from the first that has all objects in view to the last before one leaves; empty below 40 of them.

    If none leaves, the last frame of the video is left out, as in PROVIDE's code (``slice_videos_from_annotations``):
    end is the index of the last frame, and the slice ends before end. Empty where there are no objects.
    """
    everything = in_view.all(axis=1) & (in_view.shape[1] > 0)
    if not everything.any():
        return range(0)
    begin = int(everything.argmax())
    gone = np.flatnonzero(~everything[begin:])
    end = begin + int(gone[0]) if len(gone) else len(everything) - 1
    return range(begin, end) if end - begin >= PROVIDE_FRAMES else range(0)


def image_motion(camera: Camera, motion: Motion) -> tuple[Float[np.ndarray, "t n 2"], Float[np.ndarray, "t n 2"]]:
    """Where centres appear, and how fast they move there: (u, v) in the camera's pixels, and pixels per second.

    With homogeneous q = M (x, 1) and its derivative q' = M (v, 0), a pixel is q_u / q_w and moves by
    (q_u' - q_u / q_w q_w') / q_w. NaN where a centre is not in front of the camera.
    """
    q = motion.location @ camera.matrix[:, :3].T + camera.matrix[:, 3]
    dq = motion.velocity @ camera.matrix[:, :3].T
    w = np.where(q[..., 2:] > 0, q[..., 2:], np.nan)
    pixels = q[..., :2] / w
    return pixels, (dq[..., :2] - pixels * dq[..., 2:]) / w


def _states(
    annotation: Annotation, camera: Camera | None, video: Video, preprocessing: Preprocessing, fps: float
) -> dict[str, np.ndarray]:
    """Truth (t, n, ...) about the objects in every frame of the video."""
    present = annotation.motion.in_view
    if camera is None:
        return {"present": present}
    pixels, speed = image_motion(camera, annotation.motion)
    scale = np.array([video.width / camera.width, video.height / camera.height])
    positions = preprocessing.positions(pixels * scale, video.height, video.width)
    size = np.array([video.width, video.height], np.float64)
    corners = preprocessing.positions(np.stack([0 * size, size]), video.height, video.width).astype(np.float64)
    per_pixel = (corners[1] - corners[0]) / size[::-1]  # (y, x), as positions are
    velocities = ((speed * scale)[..., ::-1] * per_pixel / (video.fps or fps)).astype(np.float32)
    present = present & np.isfinite(positions).all(axis=-1)
    if preprocessing.box(video.height, video.width) != (0, 0, video.width, video.height):
        present &= (np.abs(positions) <= 1).all(axis=-1)
    return {"present": present, "positions": positions, "velocities": velocities}


# ---------------------------------------------------------------------------------------------------------------------
# What the files beside a video say


def parse_annotation(data: object, num_frames: int = NUM_FRAMES) -> Annotation:
    """Turn the content of an annotation file into our terms, whatever of it is missing.

    A key that is absent, null, or of another kind than the format has is counted in ``missing``, and so is a frame or
    an object that is not listed; what it would have said is NaN, False or None, or left out. Objects are as many as the
    largest id plus one.

    Raises:
        VideoError: it is no JSON object, or far too many objects or frames are claimed.
    """
    if not isinstance(data, dict):
        raise VideoError("bad-layout", f"it holds a JSON {type(data).__name__}, not an object with motion_trajectory")
    missing: Counter[str] = Counter()
    scene = _whole(data, "scene_index", 1 << 62, missing)
    listed: list[tuple[int, dict[str, Any]]] = []
    for entry in _entries(data, "object_property", missing):
        if (i := _whole(entry, "object_id", MAX_OBJECTS, missing, "object_property.")) is not None:
            listed.append((i, entry))
    states: dict[int, dict[int, dict[str, Any]]] = {}
    for entry in _entries(data, "motion_trajectory", missing):
        if (t := _whole(entry, "frame_id", num_frames, missing, "motion_trajectory.")) is None:
            continue
        missing["motion_trajectory.frame_id twice"] += t in states
        states[t] = {}
        for state in _entries(entry, "objects", missing):
            if (i := _whole(state, "object_id", MAX_OBJECTS, missing, "objects.")) is not None:
                missing["objects.object_id twice"] += i in states[t]
                states[t][i] = state
    n = 1 + max((i for each in ((i for i, _ in listed), *states.values()) for i in each), default=-1)
    if num_frames * n > _STATES:
        raise VideoError("too-large", f"{num_frames} frames of {n} objects are more than the {_STATES} that are read")
    properties: list[Properties | None] = [None] * n
    for i, entry in listed:
        words = [_word(entry, name, words, missing) for name, words in _WORDS.items()]
        properties[i] = Properties(words[0], words[1], words[2]) if all(words) else None
    missing["object_property entry"] += n - len({i for i, _ in listed})
    vectors = {name: np.full((num_frames, n, 3), np.nan) for name in _VECTORS}
    motion = Motion(**vectors, in_view=np.zeros((num_frames, n), bool))
    known = np.zeros(num_frames, bool)
    missing["motion_trajectory frame"] += num_frames - len(states)
    for t, objects in states.items():
        missing["objects entry"] += n - len(objects)
        known[t] = not n
        for i, state in objects.items():
            for name, array in vectors.items():
                array[t, i] = _vector(state, name, missing)
            view = state.get("inside_camera_view")
            missing["objects.inside_camera_view"] += not isinstance(view, bool)
            motion.in_view[t, i] = view is True
            known[t] |= isinstance(view, bool)
    collisions = []
    for entry in _entries(data, "collision", missing):
        t, pair = _whole(entry, "frame_id", num_frames, missing, "collision."), entry.get("object_ids")
        fits = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and 0 <= i < n for i in pair)
        if not isinstance(pair, list) or not fits or pair[0] == pair[1]:
            missing["collision.object_ids"] += 1
        elif t is not None:
            collisions.append(Event("collision", t, (min(pair), max(pair))))
    ordered = tuple(sorted(collisions, key=lambda event: (event.frame, event.objects)))
    return Annotation(scene, tuple(properties), motion, known, ordered, +missing)


def _of_frames(annotation: Annotation, count: int) -> Annotation:
    """The first ``count`` frames of an annotation."""
    motion = annotation.motion
    return annotation._replace(
        motion=Motion(**{name: getattr(motion, name)[:count] for name in (*_VECTORS, "in_view")}),
        known=annotation.known[:count],
        collisions=tuple(event for event in annotation.collisions if event.frame < count),
    )


def _entries(holder: dict[str, Any], key: str, missing: Counter[str]) -> list[dict[str, Any]]:
    listed = holder.get(key)
    if not isinstance(listed, list):
        missing[key] += 1
        return []
    entries = [entry for entry in listed if isinstance(entry, dict)]
    missing[f"{key} entry"] += len(listed) - len(entries)
    return entries


def _whole(holder: dict[str, Any], key: str, stop: int, missing: Counter[str], prefix: str = "") -> int | None:
    value = holder.get(key)
    if type(value) is int and 0 <= value < stop:
        return value
    missing[prefix + key] += 1
    return None


def _word(entry: dict[str, Any], key: str, words: Sequence[str], missing: Counter[str]) -> str:
    if entry.get(key) in words:
        return entry[key]
    missing[f"object_property.{key}"] += 1
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12  # which NaN, that Python reads from JSON, is not


def _vector(state: dict[str, Any], key: str, missing: Counter[str]) -> list[float]:
    value = state.get(key)
    if isinstance(value, list) and len(value) == 3 and all(_is_number(x) for x in value):
        return [float(x) for x in value]
    missing[f"objects.{key}"] += 1
    return [math.nan] * 3


def _truth(video: Video, open_file: Open, limits: Limits) -> _Truth:
    """Read what belongs to a probed video; a file that cannot be used is a note."""
    files = {found[0]: path for path in video.files if (found := _role(path))}
    notes: list[str] = []

    def use(role: str, parse: Callable[[str], _T]) -> _T | None:
        if role not in files:
            return None
        try:
            return parse(files[role])
        except VideoError as error:
            notes.append(f"{files[role]} is not used: {error}")
            return None

    def annotated(path: str) -> Annotation:
        data = _json(path, open_file, limits)
        listed = data.get("motion_trajectory") if isinstance(data, dict) else None
        # Of a video that is cut short the later frames are annotated, too; that lacks nothing.
        claimed = max(video.frames, len(listed) if isinstance(listed, list) else 0)
        annotation = _of_frames(parse_annotation(data, claimed), video.frames)
        if annotation.scene_index not in (None, _number(video.source)):
            raise VideoError("bad-layout", f"it says that it is about scene {annotation.scene_index}")
        return annotation

    annotation = use("annotation", annotated)
    if "annotation" not in files:
        notes.append("it has no annotation")
    elif annotation is not None and annotation.missing:
        lacks = ", ".join(f"{count} x {key}" for key, count in sorted(annotation.missing.items()))
        notes.append(f"{files['annotation']} lacks {lacks}")
    camera = use("scene", lambda path: parse_camera(_json(path, open_file, limits)))
    masks = use("mask", lambda path: _stored_masks(path, video, open_file, limits))
    source = files.get("mask")
    if masks is None:
        properties = () if annotation is None else annotation.properties
        masks = use("proposal", lambda path: proposed_masks(_json(path, open_file, limits), video, properties, limits))
        source = files.get("proposal")
    if masks is None:
        return _Truth(annotation, camera, None, np.zeros(video.frames, bool), tuple(notes))
    if not masks[1].all():
        notes.append(
            f"{source} has masks of {masks[1].sum()} of {video.frames} frames; clips of others have no segmentation"
        )
    return _Truth(annotation, camera, masks[0], masks[1], tuple(notes))


def parse_camera(data: object) -> Camera:
    """Read the camera of a scene file: ``{"camera": {"matrix": 3 rows of 4, "width": ..., "height": ...}}``.

    Raises:
        VideoError: it has none.
    """
    camera = data.get("camera") if isinstance(data, dict) else None
    camera = camera if isinstance(camera, dict) else {}
    matrix, width, height = (camera.get(name) for name in ("matrix", "width", "height"))
    rows = [row for row in matrix if isinstance(row, list) and len(row) == 4] if isinstance(matrix, list) else []
    if len(rows) != 3 or matrix != rows or not all(_is_number(x) for row in rows for x in row):
        raise VideoError("bad-layout", "camera.matrix must be three rows of four numbers")
    if not (type(width) is int and type(height) is int and 2 <= min(width, height) <= max(width, height) <= 1 << 16):
        raise VideoError("bad-layout", f"camera.width and camera.height must be pixels, got {width!r} and {height!r}")
    return Camera(np.array(rows, np.float64), width, height)


def proposed_masks(
    data: object, video: Video, properties: Sequence[Properties | None], limits: Limits = NO_LIMITS
) -> tuple[UInt8[np.ndarray, "t h w"], Bool[np.ndarray, " t"]]:
    """Draw a detector's masks as labels, see ``read``; also tell the frames that have any say, be it of no object.

    Each of ``frames`` has a ``frame_index`` (without it, its place in the list) and ``objects`` with ``mask``,
    ``score``, ``color``, ``material`` and ``shape``. A frame has no masks if one of them cannot be decoded, or if there
    are more than ``MAX_OBJECTS``; of two frames with one index the first counts.

    Raises:
        VideoError: there are no frames, or the masks take too much memory.
    """
    frames = data.get("frames") if isinstance(data, dict) else None
    if not isinstance(frames, list):
        raise VideoError("bad-layout", "it holds no list of frames")
    labels, masked = _no_masks(video)
    ids: dict[object, int] = {each: i + 1 for i, each in enumerate(properties) if each is not None}
    last, seen = len(properties), set[int]()
    for place, frame in enumerate(frames):
        t = frame.get("frame_index", place) if isinstance(frame, dict) else None
        objects = frame.get("objects") if isinstance(frame, dict) else None
        if type(t) is not int or not 0 <= t < video.frames or t in seen or not isinstance(objects, list):
            continue
        seen.add(t)
        limits.on_frame()
        if len(objects) > MAX_OBJECTS:
            continue
        named: Counter[object] = Counter()
        drawn: list[tuple[float, int, np.ndarray]] = []
        for each in sorted(objects, key=_score, reverse=True):
            mask = _run_lengths(each.get("mask") if isinstance(each, dict) else None, video.height, video.width)
            if mask is None:
                break
            kind: object = tuple(str(each.get(name)) for name in _WORDS)
            named[kind] += 1
            if named[kind] > 1:
                kind = (kind, named[kind])
            if kind not in ids:
                last += 1
                ids[kind] = last
            drawn.append((_score(each), ids[kind], mask))
        if len(drawn) < len(objects) or max((label for _, label, _ in drawn), default=0) > 255:
            continue
        labels[t], masked[t] = 0, True
        for _, label, mask in reversed(drawn):  # the more certain ones last, in front
            labels[t][mask > 0] = label
    return labels, masked


def _score(proposal: object) -> float:
    score: Any = proposal.get("score") if isinstance(proposal, dict) else None
    return float(score) if _is_number(score) else -math.inf


def _run_lengths(mask: object, height: int, width: int) -> UInt8[np.ndarray, "h w"] | None:
    """Decode COCO's run lengths, as text or as numbers; None where they are not those of one frame."""
    from pycocotools import mask as coco

    if not isinstance(mask, Mapping) or mask.get("size") != [height, width]:
        return None
    counts = mask.get("counts")
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
            return None
        uncompressed: Any = {"size": [height, width], "counts": counts}
        return _decoded(coco.frPyObjects(uncompressed, height, width))
    text = counts.encode(errors="replace") if isinstance(counts, str) else b""
    # The decoder is C code that trusts its input: a number without an end makes it read on, too few leave memory as
    # it was. So what it made must give the same text again.
    if not _RUNS.fullmatch(text):
        return None
    try:
        decoded = _decoded({"size": [height, width], "counts": text})
    except ValueError:
        return None
    return decoded if coco.encode(decoded)["counts"] == text else None


def _decoded(packed: Any) -> UInt8[np.ndarray, "h w"]:
    from pycocotools import mask as coco

    with warnings.catch_warnings():
        # Release 2.0.11 has an __array__ without the argument that NumPy 2 wants to pass.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return coco.decode(packed)


def _no_masks(video: Video) -> tuple[np.ndarray, np.ndarray]:
    size = video.frames * video.height * video.width
    if size > MAX_BYTES:
        raise VideoError("too-large", f"masks of {video.frames} such frames take more than {MAX_BYTES} bytes")
    return np.zeros((video.frames, video.height, video.width), np.uint8), np.zeros(video.frames, bool)


def _stored_masks(path: str, video: Video, open_file: Open, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Read the true masks of a simulated video: of its first frames, should there be fewer."""
    import zstandard

    labels, masked = _no_masks(video)
    most = labels.size + 16384  # a header is shorter
    try:
        with open_file(path) as file:
            limits.check_bytes(file)
            with zstandard.ZstdDecompressor().stream_reader(file) as stream:
                data = stream.read(most + 1)  # whatever the file claims to hold
        stored = from_npy(path, "masks", data) if len(data) <= most else None
    except (zstandard.ZstdError, ValueError) as error:
        raise VideoError("bad-layout", f"it holds no masks ({error})") from error
    if stored is None or stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[1:] != labels.shape[1:]:
        found = f"more than {most} bytes" if stored is None else f"{stored.dtype} {stored.shape}"
        raise VideoError("bad-layout", f"masks must be uint8 {labels.shape}, as the video is; it holds {found}")
    labels[: len(stored)], masked[: len(stored)] = stored[: len(labels)], True
    return labels, masked


def _json(path: str, open_file: Open, limits: Limits) -> Any:
    with open_file(path) as file:
        limits.check_bytes(file)
        data = file.read(_JSON_BYTES + 1)
    if len(data) > _JSON_BYTES:
        raise VideoError("too-large", f"it has more than {_JSON_BYTES} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise VideoError("bad-json", f"it is no JSON ({error})") from error
