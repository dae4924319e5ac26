"""Worlds made by hand, and random ones."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from objdyn.clevrer import COLORS, MATERIALS, SHAPES, Event, History, Motion, Properties, World

Make = Callable[..., World]


def make_world(
    names: Sequence[str],
    events: Sequence[tuple[str, int, Sequence[int]]] = (),
    *,
    without: Mapping[int, Sequence[tuple[str, int, Sequence[int]]]] | None = None,
    moving: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    unseen: Sequence[int] = (),
    scene: int = 7,
    shown: int = 128,
    frames: int = 179,
) -> World:
    """A World of objects like ``blue metal cube``.

    An object is in view from the start, or from its ``in`` event, until its ``out`` event, or never if ``unseen``; it
    moves in the ranges of frames of ``moving``, the stop outside, at a speed of 1, and lies still otherwise.
    """
    history = _history(events, frames)
    in_view = np.ones((shown, len(names)), dtype=bool)
    in_view[:, list(unseen)] = False
    for event in sorted(history.events, key=lambda event: -event.frame):
        if event.kind == "in":
            in_view[: event.frame, event.objects[0]] = False
        elif event.kind == "out":
            in_view[event.frame :, event.objects[0]] = False
    velocity = np.zeros((shown, len(names), 3))
    for index, ranges in (moving or {}).items():
        for start, stop in ranges:
            velocity[start:stop, index, 0] = 1.0
    zeros = np.zeros_like(velocity)
    return World(
        scene_index=scene,
        properties=tuple(Properties(*name.split()) for name in names),
        motion=Motion(np.cumsum(velocity, axis=0) / 25, zeros, velocity, zeros, in_view),
        history=history,
        without={index: _history(run, frames) for index, run in (without or {}).items()},
        shown=shown,
    )


def random_world(seed: int) -> World:
    """A World of 3 to 6 objects with random events, of which a simulation without an object keeps some."""
    random = Random(seed)
    n = random.randint(3, 6)
    looks = [f"{color} {material} {shape}" for color in COLORS for material in MATERIALS for shape in SHAPES]
    names = random.sample(looks, n)
    entering = [index for index in range(n) if random.random() < 0.5]
    leaving = [index for index in range(n) if random.random() < 0.3]
    first = {index: random.randint(1, 50) if index in entering else 0 for index in range(n)}
    last = {index: random.randint(90, 170) if index in leaving else 178 for index in range(n)}
    events: list[tuple[str, int, Sequence[int]]] = [("in", first[index], (index,)) for index in entering]
    events += [("out", last[index], (index,)) for index in leaving]
    for _ in range(random.randint(2, 6)):
        pair = sorted(random.sample(range(n), 2))
        frame = random.randint(55, 175)
        if frame < min(last[index] for index in pair):
            events.append(("collision", frame, pair))
    moving = {}
    for index in range(n):
        start = random.choice((0, 0, 40, 70, 200))
        moving[index] = [(start, random.choice((60, 110, 128)))]
    without = {}
    for removed in range(n):
        if random.random() < 0.8:
            run = [event for event in events if removed not in event[2] and random.random() < 0.7]
            others = [index for index in range(n) if index != removed]
            for _ in range(random.randint(0, 2)):
                run.append(("collision", random.randint(55, 140), sorted(random.sample(others, 2))))
            without[removed] = run
    return make_world(names, events, without=without, moving=moving, scene=seed)


@pytest.fixture
def world() -> World:
    """Five objects.

    The red sphere (1) enters at 10, hits the gray cube (0) at 30, which hits the blue cylinder (2) at 50 and, after the
    video, the green cube (3) at 140. The cylinder leaves at 80. The yellow sphere (4) rolls by alone, enters at 20 and
    leaves at 100. Without the red sphere nothing collides; without the gray cube the sphere hits the cylinder.
    """
    return make_world(
        ("gray metal cube", "red rubber sphere", "blue metal cylinder", "green rubber cube", "yellow metal sphere"),
        (
            ("in", 10, (1,)),
            ("in", 20, (4,)),
            ("collision", 30, (0, 1)),
            ("collision", 50, (0, 2)),
            ("out", 80, (2,)),
            ("out", 100, (4,)),
            ("collision", 140, (0, 3)),
        ),
        without={
            0: (("in", 10, (1,)), ("in", 20, (4,)), ("collision", 45, (1, 2)), ("out", 100, (4,))),
            1: (("in", 20, (4,)), ("out", 100, (4,))),
            2: (("in", 10, (1,)), ("in", 20, (4,)), ("collision", 30, (0, 1)), ("collision", 90, (0, 3))),
            4: (("in", 10, (1,)), ("collision", 30, (0, 1)), ("collision", 50, (0, 2)), ("collision", 140, (0, 3))),
        },
        moving={0: ((30, 128),), 1: ((0, 40),), 2: ((50, 80),), 4: ((0, 128),)},
    )


@pytest.fixture(name="make_world", scope="session")
def make() -> Make:
    return make_world


@pytest.fixture(name="random_world", scope="session")
def random() -> Callable[[int], World]:
    return random_world


def _history(events: Sequence[tuple[Any, int, Sequence[int]]], frames: int) -> History:
    ordered = sorted(events, key=lambda event: event[1])
    return History(tuple(Event(kind, frame, tuple(objects)) for kind, frame, objects in ordered), frames)
