"""Deterministic generators of clips with ground truth."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from objdyn.clips import Clip
from objdyn.simulators import balls


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
    episodes_per_split: dict[str, int]
    num_frames: int
    """Frames per episode."""
    height: int
    width: int
    fps: float
    episodes: Callable[[str, int, int, int | None], Sequence[Episode]]
    """``(split, first, count, seed)``; seed ``None`` gives the published data."""


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
}
