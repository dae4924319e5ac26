"""Simulated videos in CLEVRER's folder layout: one Ray task per video, resumable.

    OUT/<train, validation or test>/video_00000-01000/video_00000.mp4              h264
                annotation_00000-01000/annotation_00000.json   CLEVRER's schema
                mask_00000-01000/mask_00000.npy.zst            masks uint8 (t, h, w): 0 background, object i is i + 1
                scene_00000-01000/scene_00000.json             how to make the video again, all events, what if
                derender_proposals/proposal_00000.json         on demand, CLEVRER's schema

The scene file is written last and lists the others: a video without it is made again, one with it is finished.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from objdyn import figures
from objdyn.clevrer import FPS, Properties, World
from objdyn.clips import to_npy
from objdyn.simulators import clevrer, towers
from objdyn.simulators.clevrer_json import to_annotation, to_scene, to_world
from objdyn.simulators.rendering import renderer
from pipeline import claim, status, store
from pipeline.config import MakeQuestionsRun, SimulateRun

FOLDER = 1000
"""Videos of one folder."""
SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""Our names of splits, and CLEVRER's of their folders."""
CRF = 12
"""Quality of the videos, as x264 counts: hardly any loss."""

_ATTEMPTS = 20


class Made(NamedTuple):
    """What a video holds; all but the first for counting."""

    video: int
    """Its index."""
    objects: int
    collisions: int
    """In the shown frames."""
    counterfactuals: int
    """Objects without which the simulation is stable."""
    label: str
    """Of a tower: ``stand`` or ``fall``."""


@store.job_into_folder
def simulate(run: SimulateRun) -> str:
    """Make the videos that are not there yet.

    Raises:
        ValueError: a package or library is missing, ``out`` holds videos that were made with other settings, or another
            job makes videos of this split there.
    """
    folder = store.resolve(run.out, "--out")
    with claim.hold(store.join(folder, SPLITS[run.split]), "simulate_clevrer") as held:
        return _simulate(run, folder, held)


def _simulate(run: SimulateRun, folder: str, held: claim.Claim) -> str:
    from pipeline import cluster, shard

    cluster.connect(run.workers)
    cluster.require_shared([folder])
    indices = range(run.start, run.start + run.videos)
    known = {index: made for index in indices if (made := _finished(run, folder, index)) is not None}
    task = functools.partial(_make, run, folder)
    status.tag(split=run.split)
    missing = [str(index) for index in indices if index not in known]
    results = shard._run_tasks(task, missing, "simulate")
    held.check()
    made = [Made(*json.loads(result)) for result in results.values()]
    lost = sorted(set(map(int, missing)) - {each.video for each in made})
    print(_describe(len(known), made, [*known.values(), *made]))
    if lost:
        raise ValueError(
            f"{len(lost)} videos killed their process twice, first index {lost[0]}; run again to make them"
        )
    where = f"{run.videos} videos in {store.join(folder, SPLITS[run.split])}"
    if run.scene == "towers" or not run.questions:
        return where
    from pipeline.questions import ask

    asked = MakeQuestionsRun(folder, store.join(folder, f"questions/{SPLITS[run.split]}.json"), run.split)
    return f"{where}\n{ask(asked)}"


def read_worlds(out: str, split: str, faults: list[str]) -> Iterator[World]:
    """Yield the truth about each video of a written split, in order of index: what questions are made from.

    What cannot be read is named in ``faults`` and left out.

    Raises:
        ValueError: the split has no scene files.
    """
    root = store.resolve(out, "--scenes")
    folder = store.join(root, SPLITS[split])
    names = [name for name in store.list_tree(folder) if name.rpartition("/")[2].startswith("scene_")]
    if not names:
        written = " and ".join(one for one, other in SPLITS.items() if store.list_tree(store.join(root, other)))
        raise ValueError(
            f"{folder} has no scene_00000.json, which simulate_clevrer.py writes beside each video and CLEVRER's own "
            f"videos lack; there is {f'--split {written}' if written else f'no split in {root}'}"
        )
    for name in names:
        try:
            scene = store.read_json(store.join(folder, name))
            annotation = name.replace("scene_", "annotation_")
            digest = scene["made"]["files"][annotation]["sha256"]
            world = to_world(scene, store.loads(store.read_bytes(store.join(folder, annotation), digest)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{name}: {error}")
            continue
        yield world


def _path(kind: str, index: int, suffix: str) -> str:
    first = index // FOLDER * FOLDER
    folder = "derender_proposals" if kind == "proposal" else f"{kind}_{first:05d}-{first + FOLDER:05d}"
    return f"{folder}/{kind}_{index:05d}.{suffix}"


def _settings(run: SimulateRun) -> dict[str, Any]:
    """What decides what a video shows, beside its index."""
    return {
        "scene": run.scene,
        "split": SPLITS[run.split],
        "seed": run.seed,
        "objects": list(run.numbers),
        "renderer": run.renderer,
        "size": list(run.size),
    }


def _finished(run: SimulateRun, folder: str, index: int) -> Made | None:
    """What a video holds that is there whole; None if it is to be made.

    Raises:
        ValueError: it is there and was made with other settings.
    """
    split = store.join(folder, SPLITS[run.split])
    path = store.join(split, _path("scene", index, "json"))
    if not store.exists(path):
        return None
    try:
        content = store.read_json(path)
        settings, files, counts = (content["made"][name] for name in ("settings", "files", "counts"))
        whole = all(store.exists(store.join(split, name)) for name in files)
        made = Made(index, *(counts[name] for name in Made._fields[1:]))
    except (ValueError, KeyError, TypeError):
        return None
    if settings != _settings(run):
        raise ValueError(
            f"{path} was made with other settings, {json.dumps(settings)} and not {json.dumps(_settings(run))}; choose "
            "another --out, or its settings"
        )
    proposed = not run.proposals or _path("proposal", index, "json") in files
    return made if whole and proposed else None


@store.job
def _make(run: SimulateRun, folder: str, item: str) -> str:
    """Make one video and return its ``Made`` (JSON). This is the body of a Ray task."""
    import zstandard

    index = int(item)
    view = clevrer.VIEW if run.scene == "clevrer" else towers.VIEW
    width, height = run.size
    painter = renderer(run.renderer, dataclasses.replace(view, width=width, height=height))
    if run.scene == "clevrer":
        scene, world, motion = _collisions(run, index)
        content, shown = to_scene(scene, world), world.shown
        annotation = to_annotation(index, world.properties, world.motion, world.history.events, shown)
        counterfactuals, label = len(world.without), ""
    else:
        tower = towers.simulate(towers.draw_scene(clevrer.video_seed(run.seed, run.split, index), run.numbers))
        scene, motion, shown = tower.scene, tower.run, len(tower.run.position)
        world = towers.to_world(tower, index)
        label, counterfactuals = "stand" if tower.stands else "fall", 0
        content = {**to_scene(scene, world), "label": label}
        annotation = to_annotation(index, world.properties, world.motion, world.history.events, shown)
    pictures = [painter.draw(clevrer.solids(scene, motion, frame)) for frame in range(shown)]
    masks = np.stack([picture.mask for picture in pictures])
    split = store.join(folder, SPLITS[run.split])
    files = {
        _path("video", index, "mp4"): figures.mp4(np.stack([picture.frame for picture in pictures]), fps=FPS, crf=CRF),
        _path("mask", index, "npy.zst"): zstandard.ZstdCompressor(level=3, write_checksum=True).compress(to_npy(masks)),
        _path("annotation", index, "json"): json.dumps(annotation).encode(),
    }
    if run.proposals:
        files[_path("proposal", index, "json")] = json.dumps(to_proposals(index, masks, world.properties)).encode()
    made = Made(index, len(scene.bodies), len(annotation["collision"]), counterfactuals, label)
    published = {name: store.publish(store.join(split, name), data) for name, data in files.items()}
    content["made"] = {
        "settings": _settings(run),
        "files": {name: each._asdict() for name, each in published.items()},
        "counts": {name: value for name, value in made._asdict().items() if name != "video"},
    }
    store.publish_json(store.join(split, _path("scene", index, "json")), content)
    return json.dumps(made)


def _collisions(run: SimulateRun, index: int) -> tuple[clevrer.Scene, World, clevrer.Run]:
    """Draw scenes for a video until chance does not decide what happens in it; one in thirty needs a second."""
    for attempt in range(_ATTEMPTS):
        seed = clevrer.video_seed(run.seed, run.split, index, attempt)
        scene = clevrer.draw_scene(seed, run.numbers)
        imagined = clevrer.imagine(scene, index)
        if imagined is not None:
            return scene, *imagined
    raise ValueError(f"video {index}: no stable scene among {_ATTEMPTS}; choose fewer --objects")


def to_proposals(index: int, masks: np.ndarray, properties: Sequence[Properties]) -> dict[str, Any]:
    """Write masks (t, h, w) as CLEVRER's proposals: objects that are seen, in COCO's compressed run lengths.

    Raises:
        ValueError: pycocotools is not installed.
    """
    try:
        import pycocotools.mask as coco
    except ModuleNotFoundError as error:
        raise ValueError("--proposals needs the package pycocotools: pip install pycocotools") from error

    def propose(mask: np.ndarray, i: int) -> dict[str, Any]:
        counts = coco.encode(np.asfortranarray(mask == i + 1, np.uint8))["counts"]
        return {
            **properties[i]._asdict(),
            "score": 1.0,
            "mask": {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts},
        }

    frames = [
        {"frame_index": frame, "objects": [propose(mask, i) for i in range(len(properties)) if (mask == i + 1).any()]}
        for frame, mask in enumerate(masks)
    ]
    return {"video_index": index, "video_name": f"video_{index:05d}.mp4", "frames": frames}


def _describe(known: int, made: Sequence[Made], videos: Sequence[Made]) -> str:
    """Say what was made and what all videos hold in one line."""
    line = f"videos {len(videos)} = {len(made)} made + {known} there already; objects {_sum(videos, 'objects')}"
    fallen = sum(each.label == "fall" for each in videos)
    if any(each.label for each in videos):
        return f"{line}; {fallen} towers fall, {len(videos) - fallen} stand"
    return (
        f"{line}, of which {_sum(videos, 'counterfactuals')} can be taken out; collisions {_sum(videos, 'collisions')}"
    )


def _sum(videos: Sequence[Made], name: str) -> int:
    return sum(getattr(each, name) for each in videos)
