"""What answers a program from the truth about a video.

Semantics follow Tables 4 and 5 of Yi et al., "CLEVRER" (2020). Where the paper is silent:

- *objects* are those in view in at least one shown frame; others are never named, counted or chosen.
- *events* are those before frame ``shown``, with a *start* at frame 0 and an *end* at the last shown frame; *unseen
  events* are those from frame ``shown`` on.
- *all events* are what could happen: each object may enter and exit, each pair may collide. They have no time.
- An object is *moving* or *stationary* in a frame only if it is in view there. Over the whole video (``null``) it is
  moving if it moves in a frame in which it is in view, and stationary if it does so in none.
- *before* and *after* are strict: events of one frame are neither.
- The *ancestors* of an event are the earlier events that share an object with it, their ancestors, and so on. An object
  belongs to a set of events if it takes part in one: so is its presence responsible.
- An event belongs to a set of events if one of that kind with these objects is in it, whenever that happens.
- *Counterfactual* events are those of the simulation without the object, before frame ``shown``: the question is about
  the same span of time as the video.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from objdyn.clevrer import Camera, History, World
from objdyn.questions.programs import ALIASES, WHOLE_VIDEO, WORDS, Node, parse

HALF_ANGLE = 42.0
"""A motion has a direction if it is less than this off left, right, up or down, in degrees."""


class NoAnswerError(ValueError):
    """The program is well formed but the video has no answer to it."""


class Occurrence(NamedTuple):
    """An event of a program: one of ``clevrer.Event``, the start or end of the video, or one that could happen."""

    kind: Literal["in", "out", "collision", "start", "end"]
    frame: int | None
    """None for one that could happen."""
    objects: tuple[int, ...]
    """Ids, ascending; none for start and end."""


class Executor:
    """Answers programs about one video.

    Args:
        world: the truth.
        camera: that of the video; only ``query_direction``, which no question of CLEVRER uses, needs it.
    """

    def __init__(self, world: World, camera: Camera | None = None):
        self.world = world
        self.camera = camera
        self.objects = tuple(np.flatnonzero(world.motion.in_view[: world.shown].any(axis=0)).tolist())
        """Ids of all objects that the video shows."""
        seen = _occurrences(world.history, 0, world.shown)
        self.events = (Occurrence("start", 0, ()), *seen, Occurrence("end", world.shown - 1, ()))
        """In order of time."""
        self._modules: dict[str, Callable[..., Any]] = {
            "objects": lambda: self.objects,
            "events": lambda: self.events,
            "all_events": self._all_events,
            "unseen_events": lambda: _occurrences(world.history, world.shown, math.inf),
            "start": lambda: self.events[0],
            "end": lambda: self.events[-1],
            "count": len,
            "exist": bool,
            "negate": lambda value: not value,
            "belong_to": _belong_to,
            "filter_color": self._filter_property,
            "filter_material": self._filter_property,
            "filter_shape": self._filter_property,
            "filter_moving": lambda objects, when: self._filter_motion(objects, when, True),
            "filter_stationary": lambda objects, when: self._filter_motion(objects, when, False),
            "filter_resting": lambda objects, when: self._filter_motion(objects, when, False),
            "filter_start": lambda events: _only([event for event in events if event.kind == "start"], "start"),
            "filter_end": lambda events: _only([event for event in events if event.kind == "end"], "end"),
            "filter_in": lambda events, who: _filter_kind(events, "in", who),
            "filter_out": lambda events, who: _filter_kind(events, "out", who),
            "filter_collision": lambda events, who: _filter_kind(events, "collision", who),
            "filter_order": _filter_order,
            "filter_before": lambda events, event: tuple(each for each in events if _time(each) < _time(event)),
            "filter_after": lambda events, event: tuple(each for each in events if _time(each) > _time(event)),
            "filter_ancestor": self._filter_ancestor,
            "filter_counterfact": self._filter_counterfact,
            "counterfact_events": self._counterfact_events,
            "query_color": lambda index: world.properties[index].color,
            "query_material": lambda index: world.properties[index].material,
            "query_shape": lambda index: world.properties[index].shape,
            "query_direction": self._query_direction,
            "query_frame": _time,
            "query_object": _query_object,
            "query_collision_partner": self._query_collision_partner,
            "unique": lambda many: _only(many, "one"),
        }

    def answer(self, program: Sequence[str]) -> str:
        """Answer a whole program: of a descriptive question, or of a choice followed by its question's.

        Returns:
            A number, a property, a direction, or "yes" or "no", as text.

        Raises:
            NoAnswerError: the video has no answer: ``unique`` of none or several, an order that is not reached, a
                simulation without an object that is not held, and the like. It names the module and its position.
            ValueError: the program is malformed; see ``programs.parse``.
        """
        value = self.evaluate(parse(program))
        return ("no", "yes")[value] if isinstance(value, bool) else str(value)

    def evaluate(self, node: Node) -> Any:
        """What a tree yields, as ``node.type`` says: ids or an id, occurrences or one, a number, a word or a bool.

        Raises:
            NoAnswerError: the video has no answer.
        """
        if node.token in WORDS:
            return node.token
        inputs = [self.evaluate(each) for each in node.inputs]
        try:
            return self._modules[ALIASES.get(node.token, node.token)](*inputs)
        except NoAnswerError as error:
            where = f"scene {self.world.scene_index}, program token {node.position}, {node.token!r}"
            raise NoAnswerError(f"{where}: {error}") from error

    def _all_events(self) -> tuple[Occurrence, ...]:
        alone = [Occurrence(kind, None, (index,)) for index in self.objects for kind in ("in", "out")]
        return (*alone, *(Occurrence("collision", None, pair) for pair in combinations(self.objects, 2)))

    def _filter_property(self, objects: Sequence[int], value: str) -> tuple[int, ...]:
        return tuple(index for index in objects if value in self.world.properties[index])

    def _filter_motion(self, objects: Sequence[int], when: Any, moving: bool) -> tuple[int, ...]:
        if when == WHOLE_VIDEO:
            moves = np.any(self._moves, axis=0).tolist()
            return tuple(index for index in objects if moves[index] == moving)
        frame = self._frame(when)
        shown = self.world.motion.in_view[frame]
        return tuple(index for index in objects if shown[index] and self._moves[frame, index] == moving)

    @cached_property
    def _moves(self) -> Bool[np.ndarray, "t n"]:
        """Whether an object moves in a shown frame and is in view there."""
        shown = np.asarray(self.world.motion.in_view[: self.world.shown])
        if np.isnan(self.world.motion.velocity[: self.world.shown][shown]).any():
            raise NoAnswerError("an object in view has no known velocity")
        return shown & np.stack([self.world.moving(frame) for frame in range(self.world.shown)])

    def _frame(self, when: Occurrence | int) -> int:
        frame = _time(when) if isinstance(when, Occurrence) else when
        if not 0 <= frame < self.world.shown:
            raise NoAnswerError(f"frame {frame} is none of the {self.world.shown} shown ones")
        return frame

    def _filter_ancestor(self, events: Sequence[Occurrence], event: Occurrence) -> tuple[Occurrence, ...]:
        found: set[Occurrence] = set()
        open_ = [event]
        while open_:
            child = open_.pop()
            for each in self.events:
                if each not in found and _time(each) < _time(child) and set(each.objects) & set(child.objects):
                    found.add(each)
                    open_.append(each)
        return tuple(each for each in events if each in found)

    def _counterfact_events(self, removed: int) -> tuple[Occurrence, ...]:
        history = self.world.without.get(removed)
        if history is None:
            raise NoAnswerError(
                f"the simulation without object {removed} ({self.world.names(removed)}) is not held, or was not stable"
            )
        return _occurrences(history, 0, self.world.shown)

    def _filter_counterfact(self, events: Sequence[Occurrence], removed: int) -> tuple[Occurrence, ...]:
        happening = {(event.kind, event.objects) for event in self._counterfact_events(removed)}
        return tuple(event for event in events if (event.kind, event.objects) in happening)

    def _query_collision_partner(self, event: Occurrence, index: int) -> int:
        if event.kind != "collision" or index not in event.objects:
            raise NoAnswerError(f"object {index} ({self.world.names(index)}) does not collide in this event: {event}")
        one, two = event.objects
        return two if index == one else one

    def _query_direction(self, index: int, when: Any) -> str:
        if self.camera is None:
            raise NoAnswerError("directions are those in the image; give the executor the video's camera")
        motion = self.world.motion
        if when == WHOLE_VIDEO:
            frames = np.flatnonzero(motion.in_view[: self.world.shown, index])
            track = motion.location[frames[[0, -1]], index] if len(frames) else np.full((2, 3), np.nan)
        else:
            frame = self._frame(when)
            if not self._moves[frame, index]:
                raise NoAnswerError(
                    f"object {index} ({self.world.names(index)}) does not move in view in frame {frame}"
                )
            track = motion.location[frame, index] + np.array([[0.0], [1e-3]]) * motion.velocity[frame, index]
        start, stop = self.camera.project(track) * np.array([self.camera.height - 1, self.camera.width - 1])
        down, right = stop - start
        for name, along, across in (
            ("left", -right, down),
            ("right", right, down),
            ("up", -down, right),
            ("down", down, right),
        ):
            if along > 0 and math.degrees(math.atan2(abs(across), along)) < HALF_ANGLE:
                return name
        raise NoAnswerError(f"object {index} ({self.world.names(index)}) moves in none of the four directions")


def answer(program: Sequence[str], world: World, camera: Camera | None = None) -> str:
    """Answer one program; see ``Executor.answer``."""
    return Executor(world, camera).answer(program)


def _occurrences(history: History, first: float, stop: float) -> tuple[Occurrence, ...]:
    events = sorted(history.events, key=lambda event: event.frame)
    return tuple(Occurrence(e.kind, e.frame, tuple(sorted(e.objects))) for e in events if first <= e.frame < stop)


def _only(many: Sequence[Any], what: str) -> Any:
    if len(many) != 1:
        raise NoAnswerError(f"{len(many)} are there, wanted exactly {what if what == 'one' else f'one {what}'}")
    return many[0]


def _time(event: Occurrence) -> int:
    if event.frame is None:
        raise NoAnswerError("events that could happen have no time")
    return event.frame


def _filter_kind(events: Sequence[Occurrence], kind: str, who: int | Sequence[int]) -> tuple[Occurrence, ...]:
    wanted = {who} if isinstance(who, int) else set(who)
    return tuple(event for event in events if event.kind == kind and wanted & set(event.objects))


def _filter_order(events: Sequence[Occurrence], order: str) -> Occurrence:
    place = {"first": 0, "second": 1, "last": -1}[order]
    if len(events) <= max(place, 0):
        raise NoAnswerError(f"{len(events)} events are there, wanted the {order}")
    return sorted(events, key=_time)[place]


def _belong_to(entry: Occurrence | int, events: Sequence[Occurrence]) -> bool:
    if isinstance(entry, int):
        return any(entry in event.objects for event in events)
    return any((event.kind, event.objects) == (entry.kind, entry.objects) for event in events)


def _query_object(event: Occurrence) -> int:
    if event.kind not in ("in", "out"):
        raise NoAnswerError(f"only one that enters or exits is the object of an event, not that of this one: {event}")
    return event.objects[0]
