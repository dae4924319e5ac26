"""Deterministic generators of clips with ground truth."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from objdyn.clips import Clip
from objdyn.simulators import balls, bouncing_balls


class Episode(Protocol):
    """One simulated video; frames are drawn when asked for."""

    @property
    def key(self) -> str:
        """Unique in its split, ``train-000123``; also the key of its clips."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames of the whole episode."""
        ...

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        """Draw ``length`` frames from frame ``start``; ``None`` means until the end."""
        ...


class Simulator(NamedTuple):
    """A generator and what it generates."""

    name: str
    """What follows ``sim:``, with all options if it has any."""
    episodes_per_split: dict[str, int]
    num_frames: int
    """Frames per episode."""
    height: int
    width: int
    fps: float
    episodes: Callable[[str, int, int, int | None], Sequence[Episode]]
    """``(split, first, count, seed)``; seed ``None`` gives the published data, or takes the seed of the name."""


def _bouncing_balls(options: bouncing_balls.Options) -> Simulator:
    def episodes(split: str, first: int, count: int, seed: int | None) -> Sequence[Episode]:
        chosen = options if seed is None else dataclasses.replace(options, seed=seed)
        return bouncing_balls.episodes(chosen, split, first, count)

    return Simulator(
        name=options.name,
        episodes_per_split=bouncing_balls.EPISODES_PER_SPLIT,
        num_frames=options.frames,
        height=options.size,
        width=options.size,
        fps=bouncing_balls.FPS,
        episodes=episodes,
    )


SIMULATORS = {
    "balls-interaction": Simulator(
        name="balls-interaction",
        episodes_per_split=balls.EPISODES_PER_SPLIT,
        num_frames=balls.NUM_FRAMES,
        height=balls.SIZE,
        width=balls.SIZE,
        fps=balls.FPS,
        episodes=balls.episodes,
    ),
    "bouncing-balls": _bouncing_balls(bouncing_balls.Options()),
}
"""Simulators by name, with their default options; see :func:`simulator`."""


def simulator(spec: str, seed: int | None = None) -> Simulator:
    """Return the simulator that ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE`` asks for; ``seed`` replaces one among them.

    Raises:
        ValueError: there is no such simulator, or it has no such option; the message lists what there is.
    """
    name, colon, options = spec.partition(":")
    if name not in SIMULATORS:
        raise ValueError(f"unknown simulator {name!r}; choose one of {', '.join('sim:' + s for s in SIMULATORS)}")
    if name == "bouncing-balls":
        chosen = bouncing_balls.parse(options)
        return _bouncing_balls(chosen if seed is None else dataclasses.replace(chosen, seed=seed))
    if colon:
        raise ValueError(f"simulator {name} takes no options, got {options!r}; write sim:{name}")
    return SIMULATORS[name]
