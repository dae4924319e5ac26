"""Deterministic generators of clips with ground truth."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

from objdyn.clips import Clip
from objdyn.simulators import balls, bouncing_balls, cannonballs, clevrer, shapes


@runtime_checkable
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
    configure: "Callable[[str, int | None], Simulator] | None" = None
    """``(options, seed)`` to the simulator with the options of a data string; None where it takes none."""


@runtime_checkable
class _Options(Protocol):
    """A frozen dataclass of what may follow a simulator's name."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def size(self) -> int: ...


_AnyOptions = TypeVar("_AnyOptions", bound=_Options)


def _configurable(
    parse: Callable[[str], _AnyOptions],
    episodes: Callable[[_AnyOptions, str, int, int], Sequence[Episode]],
    episodes_per_split: Callable[[_AnyOptions], dict[str, int]],
    fps: float | Callable[[_AnyOptions], float],
) -> Callable[[str, int | None], Simulator]:
    """What turns the text of options, and a seed that replaces one among them, into a simulator."""

    def configure(text: str, seed: int | None = None) -> Simulator:
        options = parse(text) if seed is None else dataclasses.replace(parse(text), seed=seed)

        def draw(split: str, first: int, count: int, seed: int | None) -> Sequence[Episode]:
            return episodes(options if seed is None else dataclasses.replace(options, seed=seed), split, first, count)

        return Simulator(
            name=options.name,
            episodes_per_split=episodes_per_split(options),
            num_frames=options.frames,
            height=options.size,
            width=options.size,
            fps=fps(options) if callable(fps) else fps,
            episodes=draw,
            configure=configure,
        )

    return configure


_bouncing_balls = _configurable(
    bouncing_balls.parse, bouncing_balls.episodes, lambda _: bouncing_balls.EPISODES_PER_SPLIT, bouncing_balls.FPS
)
_cannonballs = _configurable(cannonballs.parse, cannonballs.episodes, cannonballs.episodes_per_split, cannonballs.FPS)
_clevrer = _configurable(
    clevrer.parse, clevrer.episodes, lambda _: clevrer.EPISODES_PER_SPLIT, lambda options: options.fps
)
_shapes = _configurable(shapes.parse, shapes.episodes, lambda _: shapes.EPISODES_PER_SPLIT, shapes.FPS)

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
    "bouncing-balls": _bouncing_balls("", None),
    "cannonballs": _cannonballs("", None),
    "clevrer-sim": _clevrer("", None),
    "shapes": _shapes("", None),
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
    found = SIMULATORS[name]
    if found.configure is not None:
        return found.configure(options, seed)
    if colon:
        raise ValueError(f"simulator {name} takes no options, got {options!r}; write sim:{name}")
    return found
