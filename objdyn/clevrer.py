"""What CLEVRER's files say, in our terms: the words for objects, events, and the records of a video.

The reader (``datasets/clevrer.py``), the simulator (``simulators/clevrer.py``) and the questions (``questions.py``)
share these and import nothing of each other. Yi et al., "CLEVRER: Collision Events for Video Representation and
Reasoning" (2020).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

COLORS = ("gray", "red", "blue", "green", "brown", "cyan", "purple", "yellow")
MATERIALS = ("metal", "rubber")
SHAPES = ("cube", "sphere", "cylinder")
NUM_FRAMES = 128
"""Frames of a video."""
FUTURE_FRAMES = 51
"""Simulated frames after them, which predictive questions ask about: about two seconds."""
WIDTH, HEIGHT, FPS = 480, 320, 25.0


class Properties(NamedTuple):
    """What an object looks like; no two objects of a video have all three in common."""

    color: str
    material: str
    shape: str


class Event(NamedTuple):
    """Something that happens to one object (it enters or leaves the view) or to two (they collide)."""

    kind: Literal["in", "out", "collision"]
    frame: int
    objects: tuple[int, ...]
    """Ids, ascending."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that does not move."""

    matrix: Float[np.ndarray, "3 4"]
    """From a point (x, y, z, 1) of the world to (u w, v w, w), with u to the right and v down in pixels, (0, 0) at the
    outer corner of the first pixel, and w > 0 in front of the camera."""
    width: int = WIDTH
    height: int = HEIGHT

    def project(self, points: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 2"]:
        """Where points of the world appear: (y, x) in [-1, 1] of the whole image, with ``align_corners=True``.

        NaN where a point is not in front of the camera.
        """
        u, v, w = np.moveaxis(points @ self.matrix[:, :3].T + self.matrix[:, 3], -1, 0)
        w = np.where(w > 0, w, np.nan)
        pixel = np.stack([v / w, u / w], axis=-1) - 0.5
        return 2 * pixel / (np.array([self.height, self.width]) - 1) - 1


@dataclass(frozen=True)
class Motion:
    """Where n objects are in each of t frames; NaN where the file does not say."""

    location: Float[np.ndarray, "t n 3"]
    """Centres, in units of the world; z is up."""
    orientation: Float[np.ndarray, "t n 3"]
    """Euler angles; the unit is not documented for the original files, radians in ours."""
    velocity: Float[np.ndarray, "t n 3"]
    """Per second."""
    angular_velocity: Float[np.ndarray, "t n 3"]
    """Radians per second."""
    in_view: Bool[np.ndarray, "t n"]

    def __post_init__(self) -> None:
        shape = self.in_view.shape
        for name in ("location", "orientation", "velocity", "angular_velocity"):
            if getattr(self, name).shape != (*shape, 3):
                raise ValueError(
                    f"{name} must be {(*shape, 3)} as in_view {shape} says, got {getattr(self, name).shape}"
                )


@dataclass(frozen=True)
class History:
    """Everything that happens in one simulation."""

    events: tuple[Event, ...]
    """In order of time, over all simulated frames."""
    frames: int = NUM_FRAMES + FUTURE_FRAMES


@dataclass(frozen=True)
class World:
    """The truth about one video, from which every question about it can be answered without its pixels."""

    scene_index: int
    properties: tuple[Properties, ...]
    """By id: object i has ``properties[i]``."""
    motion: Motion
    """In the shown frames, at least; the questions look at no later ones."""
    history: History
    """The simulation that the video shows, and how it goes on after the last shown frame."""
    without: Mapping[int, History]
    """By id, the simulation from the same start without that object; other ids stay. An object is missing here if its
    simulation is not ``stable``."""
    shown: int = NUM_FRAMES
    """Frames of the video; events at this frame or later are unseen."""
    still_speed: float = 0.05
    """An object is moving in a frame if its centre is faster than this, in units of the world per second."""

    def __post_init__(self) -> None:
        n = len(self.properties)
        if len(set(self.properties)) < n:
            raise ValueError(f"scene {self.scene_index} has two objects with the same properties: {self.properties}")
        if self.motion.in_view.shape[1] != n or len(self.motion.in_view) < self.shown:
            raise ValueError(
                f"scene {self.scene_index} has {n} objects and {self.shown} frames, its motion is "
                f"{self.motion.in_view.shape}"
            )

    def moving(self, frame: int) -> Bool[np.ndarray, " n"]:
        """Which objects are moving in a frame."""
        return np.linalg.norm(self.motion.velocity[frame], axis=-1) > self.still_speed

    def names(self, index: int) -> str:
        """The object in full: ``blue metal cube``."""
        return " ".join(self.properties[index])


def look_at(
    position: tuple[float, float, float],
    target: tuple[float, float, float],
    fov_y: float,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Camera:
    """Make the camera at a position that looks at a target, with the world's z upwards in its image.

    Args:
        position: of the pinhole.
        target: what is in the middle of the image.
        fov_y: angle from the upper to the lower edge, in degrees.
        width: of the image, in pixels.
        height: of the image, in pixels.
    """
    forward = np.subtract(target, position).astype(np.float64)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    focal = 0.5 * height / math.tan(math.radians(fov_y) / 2)
    intrinsic = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(intrinsic @ np.column_stack([rotation, -rotation @ np.asarray(position)]), width, height)
