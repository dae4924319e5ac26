"""A simulated video as JSON: the annotation in CLEVRER's schema, and a scene file from which it can be made again.

An annotation says what the shown frames hold, as CLEVRER's do. The scene file adds what those cannot say: the start of
the simulation, the camera, all events, those after the last frame too, and those without each object.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from objdyn.clevrer import COLORS, MATERIALS, SHAPES, Camera, Event, History, Motion, Properties, World
from objdyn.simulators.clevrer import Body, Scene
from objdyn.simulators.rendering import View

SCHEMA = 1
"""Version of the scene file."""

_VECTORS = ("location", "orientation", "velocity", "angular_velocity")


def to_annotation(
    scene_index: int, properties: Sequence[Properties], motion: Motion, events: Sequence[Event], shown: int
) -> dict[str, Any]:
    """Write what ``shown`` frames hold in CLEVRER's schema; a collision's place is between the two centres."""
    frames = [
        {
            "frame_id": frame,
            "objects": [
                {"object_id": i}
                | {name: getattr(motion, name)[frame, i].tolist() for name in _VECTORS}
                | {"inside_camera_view": bool(motion.in_view[frame, i])}
                for i in range(len(properties))
            ],
        }
        for frame in range(shown)
    ]
    collisions = [
        {
            "object_ids": list(event.objects),
            "frame_id": event.frame,
            "location": motion.location[event.frame, list(event.objects)].mean(axis=0).tolist(),
        }
        for event in events
        if event.kind == "collision" and event.frame < shown
    ]
    return {
        "scene_index": scene_index,
        "video_filename": f"video_{scene_index:05d}.mp4",
        "object_property": [{"object_id": i} | look._asdict() for i, look in enumerate(properties)],
        "motion_trajectory": frames,
        "collision": collisions,
    }


@dataclass(frozen=True)
class SceneFile:
    """What a scene file holds."""

    scene: Scene
    scene_index: int
    camera: Camera
    history: History
    without: Mapping[int, History]
    shown: int


def to_scene(scene: Scene, world: World) -> dict[str, Any]:
    """Write the start of a simulation and what came of it."""
    view, camera = scene.view, scene.view.camera
    return {
        "schema": SCHEMA,
        "scene_index": world.scene_index,
        "seed": scene.seed,
        "objects": [
            body.properties._asdict() | {name: list(getattr(body, name)) for name in _STARTS} | {"yaw": body.yaw}
            for body in scene.bodies
        ],
        "view": dataclasses.asdict(view),
        "camera": {"matrix": camera.matrix.tolist(), "width": camera.width, "height": camera.height},
        "shown_frames": world.shown,
        "simulated_frames": world.history.frames,
        "events": _events(world.history),
        "without": {str(i): _events(history) for i, history in sorted(world.without.items())},
    }


def from_scene(content: Mapping[str, Any]) -> SceneFile:
    """Read what :func:`to_scene` wrote.

    Raises:
        ValueError: a field is missing or impossible; the message names it.
    """
    reading = ""
    try:
        reading = "schema"
        if content["schema"] != SCHEMA:
            raise ValueError(f"this program reads version {SCHEMA}, the file has {content['schema']!r}")
        reading = "objects"
        bodies = tuple(_body(each) for each in content["objects"])
        reading = "view"
        fields = {f.name: content["view"][f.name] for f in dataclasses.fields(View)}
        view = View(**{k: _numbers(v, 3) if isinstance(v, list | tuple) else v for k, v in fields.items()})  # pyright: ignore[reportArgumentType]
        reading = "seed"
        scene = Scene(bodies, _whole(content["seed"]), view)
        reading = "camera"
        matrix = np.array([_numbers(row, 4) for row in content["camera"]["matrix"]])
        if matrix.shape != (3, 4):
            raise ValueError(f"a camera's matrix has 3 rows, got {len(matrix)}")
        camera = Camera(matrix, _whole(content["camera"]["width"]), _whole(content["camera"]["height"]))
        reading = "simulated_frames"
        frames = _whole(content["simulated_frames"])
        reading = "events"
        history = _history(content["events"], len(bodies), frames)
        reading = "without"
        without = {int(i): _history(events, len(bodies), frames) for i, events in content["without"].items()}
        if not set(without) <= set(range(len(bodies))):
            raise ValueError(f"there are {len(bodies)} objects, got the ids {sorted(without)}")
        reading = "shown_frames"
        shown = _whole(content["shown_frames"])
        reading = "scene_index"
        return SceneFile(scene, _whole(content["scene_index"]), camera, history, without, shown)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"a scene file's {reading} cannot be read: {what}; make the video again") from error


def to_world(content: Mapping[str, Any], annotation: Mapping[str, Any]) -> World:
    """Join a scene file and its annotation to the truth about a video.

    Raises:
        ValueError: either cannot be read, or they are not of one video.
    """
    file = from_scene(content)
    try:
        frames = annotation["motion_trajectory"]
        vectors = {
            name: np.array([[each[name] for each in frame["objects"]] for frame in frames], np.float64)
            for name in _VECTORS
        }
        seen = np.array([[each["inside_camera_view"] for each in frame["objects"]] for frame in frames], bool)
        motion = Motion(**vectors, in_view=seen)
        other = annotation["scene_index"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"an annotation cannot be read ({type(error).__name__}: {error})") from error
    if other != file.scene_index:
        raise ValueError(f"the scene file is of video {file.scene_index}, the annotation of {other}")
    return World(file.scene_index, file.scene.properties, motion, file.history, file.without, file.shown)


_STARTS = ("position", "velocity", "angular_velocity")


def _events(history: History) -> list[dict[str, Any]]:
    return [{"kind": event.kind, "frame": event.frame, "objects": list(event.objects)} for event in history.events]


def _history(events: Sequence[Mapping[str, Any]], number: int, frames: int) -> History:
    found = []
    for each in events:
        event = Event(each["kind"], _whole(each["frame"]), tuple(_whole(i) for i in each["objects"]))
        wanted = {"in": 1, "out": 1, "collision": 2}.get(event.kind)
        if len(event.objects) != wanted or event.frame >= frames or max(event.objects) >= number:
            raise ValueError(f"there is no such event among {number} objects in {frames} frames: {each}")
        found.append(event)
    return History(tuple(found), frames)


def _body(content: Mapping[str, Any]) -> Body:
    look = Properties(content["color"], content["material"], content["shape"])
    if look.color not in COLORS or look.material not in MATERIALS or look.shape not in SHAPES:
        raise ValueError(f"there is no {' '.join(map(str, look))}")
    position, velocity, spin = (_numbers(content[name], 3) for name in _STARTS)
    (yaw,) = _numbers([content["yaw"]], 1)
    return Body(look, position, yaw, velocity, spin)  # pyright: ignore[reportArgumentType]


def _numbers(values: Sequence[Any], count: int) -> tuple[float, ...]:
    if len(values) != count or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise ValueError(f"expected {count} finite numbers, got {values!r}")
    return tuple(float(v) for v in values)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value
