"""Bouncing Balls: discs of two masses in a 10x10 box that bounce off the walls and off each other.

Re-implements the data of R-NEM (van Steenkiste et al., "Relational Neural Expectation Maximization", ICLR 2018), whose
generator was not published; PROVIDE adds the colours. Differs from the script by Sutskever from which such data derive:
collisions are computed from event to event, not at fixed sub-steps in which balls overlap and may stick.
``collisions`` are the balls that bounced off each other, drawn one pixel wider.

Sizes, masses and speeds are those of R-NEM's own animations (GIFs of 500 frames with 4, 4, 6 and 8 balls; all but the
last tracked by fitting discs). Every ball is drawn with a radius of 5.11 or 6.41 pixels, that is 0.8 or 1.0 box units,
for 4 balls and for 6-8 alike; centres come as close to walls as 0.96 and to each other as 0.98 of the drawn radii, so
the drawn radius is the physical one. Four equal balls keep a joint speed of 0.333 box units per frame (1.07 pixels per
ball), and kinetic energy stays constant over collisions if a large ball weighs 6.0 times a small one. Balls cover 9.2 %
to 17.2 % of the frame there; here, where each ball is small or large with equal chances, 10.2 % on average for 4 balls
and 17.8 % for 6-8. How often the original draws each kind is not known: 15 of those 22 balls are small.

With the same balls, videos of both cover the same share, and ours are a little faster. Root mean square in pixels per
frame of the balls that can be followed, over 500 frames: the one original, and median and range of 20 of ours:

    balls                coverage, of both   original   ours
    4 large              12.57 %             1.04       1.06  (1.05 to 1.08)
    3 small, 1 large      9.17 %             1.09       1.36  (0.95 to 2.10)
    4 small, 2 large     14.33 %             0.86       1.20  (0.85 to 1.50)
    7 small, 1 large     17.22 %             0.80       0.89  (0.72 to 1.23)

Where masses differ, a video's energy depends on the velocities that it happens to start with, so the last three may be
chance, though all of them are slower than our median; that four large balls are, by 2 %, is not. ``SPEED`` is left as
it was fitted.

Inside this module positions and velocities are (x, y) in box units and box units per frame. A clip's ``positions``
follow the project's convention, see :func:`to_coordinates`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from objdyn.clips import Clip
from objdyn.simulators.options import Option, decimal, read_options, show_range, whole, whole_range

BOX = 10.0
"""Side of the box."""
KINDS = ((0.8, 1.0), (1.0, 6.0))
"""Radius in box units and mass of R-NEM's balls."""
SPEED = 1 / 3
"""Joint norm of the velocities of all balls of a video at frame 0, in box units per frame."""
FPS = 10.0
"""Nominal: the generator has no clock."""
EPISODES_PER_SPLIT = {"train": 50_000, "val": 10_000, "test": 10_000}
MAX_BALLS = 20
COLORS = ("binary", "4", "8", "random4", "random8")

_PALETTE = np.array(
    [
        (166, 206, 227),
        (31, 120, 180),
        (178, 223, 138),
        (51, 160, 44),
        (251, 154, 153),
        (227, 26, 28),
        (253, 191, 111),
        (255, 127, 0),
    ],
    dtype=np.uint8,
)
_START_TRIES = 100
_RESTARTS = 200


@dataclass(frozen=True)
class Options:
    """What tells one set of Bouncing Balls from another.

    Raises:
        ValueError: a value is impossible.
    """

    balls: tuple[int, int] = (4, 4)
    """Fewest and most balls of a video; each number in between is equally likely."""
    size: int = 64
    """Height and width of the frames in pixels."""
    colors: str = "binary"
    """One of ``COLORS``: white balls; the first 4 or 8 colours of PROVIDE by ball, from the start again when there are
    more balls; or for each video a random draw from them, each colour once before one comes twice."""
    frames: int = 51
    """Frames of a video."""
    radius: tuple[float, float] | None = None
    """Range of the radii in box units, with the square as mass; None takes ``KINDS``, each equally likely."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.balls
        if not 1 <= low <= high <= MAX_BALLS:
            raise ValueError(f"balls must be N or A-B with 1 <= A <= B <= {MAX_BALLS}, got {show_range(self.balls)}")
        if not 8 <= self.size <= 1024:
            raise ValueError(f"size must be 8 to 1024 pixels, got {self.size}")
        if self.colors not in COLORS:
            raise ValueError(f"colors must be one of {', '.join(COLORS)}, got {self.colors!r}")
        if not 1 <= self.frames <= 1000:
            raise ValueError(f"frames must be 1 to 1000, got {self.frames}")
        small, large = self.radius or (KINDS[0][0], KINDS[-1][0])
        if not 0.05 <= small <= large <= 4.5:
            raise ValueError(f"radius must be LOW-HIGH with 0.05 <= LOW <= HIGH <= 4.5, got {small:g}-{large:g}")
        # Random placement jams when discs cover about 0.55 of the room for them; below 0.45 a restart finds a place.
        if high > 1 and high * np.pi * large**2 > 0.45 * BOX**2:
            raise ValueError(f"{high} balls of radius {large:g} do not fit into the box; ask for fewer or smaller ones")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")

    @property
    def name(self) -> str:
        """The simulator with all options in a fixed order, so that equal data have one name."""
        radius = "rnem" if self.radius is None else f"{self.radius[0]:g}-{self.radius[1]:g}"
        return (
            f"bouncing-balls:balls={show_range(self.balls)},size={self.size},colors={self.colors},frames={self.frames},"
            f"radius={radius},seed={self.seed}"
        )


def parse(text: str) -> Options:
    """Read options as in a data string: ``balls=6-8,size=32,colors=random4``; the empty string takes the defaults.

    Raises:
        ValueError: a key is unknown or comes twice, or a value is impossible; the message lists what there is.
    """
    return Options(**read_options("bouncing-balls", text, _OPTIONS))


def _lengths(text: str) -> tuple[float, float] | None:
    if text == "rnem":
        return None
    low, _, high = text.partition("-")
    return decimal(low), decimal(high)


_OPTIONS = {
    "balls": Option(whole_range, "balls=N or balls=A-B"),
    "size": Option(whole, "size=PIXELS"),
    "colors": Option(str, f"colors={'|'.join(COLORS)}"),
    "frames": Option(whole, "frames=N"),
    "radius": Option(_lengths, "radius=rnem or radius=LOW-HIGH"),
    "seed": Option(whole, "seed=N"),
}


class Start(NamedTuple):
    """What is drawn for some videos; rows beyond a video's number of balls have radius 0 and stay at 0."""

    positions: Float[np.ndarray, "n k 2"]
    velocities: Float[np.ndarray, "n k 2"]
    radii: Float[np.ndarray, "n k"]
    masses: Float[np.ndarray, "n k"]
    colors: UInt8[np.ndarray, "n k 3"]


class States(NamedTuple):
    """Trajectories of some videos."""

    positions: Float[np.ndarray, "n t k 2"]
    """Centres (x, y) in box units."""
    velocities: Float[np.ndarray, "n t k 2"]
    """(x, y) in box units per frame."""
    collided: Bool[np.ndarray, "n t k"]
    """Balls that bounced off another between the frame before and this one."""


class _Block:
    """Videos that are simulated together, when the first of them is drawn."""

    def __init__(self, options: Options, split: str, first: int, count: int) -> None:
        self.options = options
        self._rows = (split, first, count)

    @cached_property
    def start(self) -> Start:
        return draw(self.options, *self._rows)

    @cached_property
    def states(self) -> States:
        start = self.start
        return simulate(start.positions, start.velocities, start.radii, start.masses, self.options.frames)


@dataclass(frozen=True)
class BouncingBallsEpisode:
    """One video; its block is simulated when the first clip is asked for."""

    key: str
    source: str
    block: _Block
    row: int

    @property
    def num_frames(self) -> int:
        """Frames of the whole episode."""
        return self.block.options.frames

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        """Draw ``length`` frames from frame ``start``; ``None`` means until the end.

        ``truth`` has ``positions``, ``present``, ``segmentation`` (0 background, ball k is k + 1), ``num_objects`` and
        ``collisions`` (bool (t, h, w)): pixels of balls that bounced off another since the frame before, drawn one
        pixel wider. Where the number of balls varies, positions have room for the most, the rest not ``present``.

        Raises:
            ValueError: the window leaves the episode.
        """
        length = self.num_frames - start if length is None else length
        if start < 0 or length < 1 or start + length > self.num_frames:
            raise ValueError(
                f"{self.source} has {self.num_frames} frames, got start={start} and length={length}; ask for less"
            )
        size = self.block.options.size
        window = slice(start, start + length)
        positions = self.block.states.positions[self.row, window]
        radii = self.block.start.radii[self.row]
        real = radii > 0
        segmentation = label(positions, radii, size)
        colors = np.zeros((len(radii) + 1, 3), np.uint8)
        colors[1:] = self.block.start.colors[self.row]
        truth = {
            "num_objects": np.array(np.count_nonzero(real), dtype=np.int64),
            "positions": np.where(real[:, None], to_coordinates(positions, size), np.float32(0)),
            "present": np.broadcast_to(real, positions.shape[:2]).copy(),
            "segmentation": segmentation,
            "collisions": mark_collisions(positions, radii, self.block.states.collided[self.row, window], size),
        }
        frames = colors[segmentation]
        return Clip(key=self.key, frames=frames, fps=FPS, start_frame=start, stride=1, source=self.source, truth=truth)


def episodes(options: Options, split: str, first: int, count: int) -> list[BouncingBallsEpisode]:
    """Videos ``first`` to ``first + count - 1`` of a split.

    A video depends only on the options, the split and its number, never on what is simulated with it. ``size`` and
    ``colors`` change how it is drawn and not how the balls move.

    Raises:
        ValueError: there is no such split, or the range leaves it.
    """
    if split not in EPISODES_PER_SPLIT:
        raise ValueError(f"bouncing-balls has the splits {', '.join(EPISODES_PER_SPLIT)}, got {split!r}")
    total = EPISODES_PER_SPLIT[split]
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(
            f"bouncing-balls/{split} has {total} episodes, got first={first} and count={count}; ask for less"
        )
    block = _Block(options, split, first, count)
    name = options.name
    return [
        BouncingBallsEpisode(f"{split}-{first + i:06d}", f"sim:{name}/{split}/{first + i}", block, i)
        for i in range(count)
    ]


def draw(options: Options, split: str, first: int, count: int) -> Start:
    """Draw number, radii, start positions, velocities and colours of the balls of some videos.

    Positions are uniform where a ball crosses no wall, ball by ball, drawn again while two overlap. Velocities are
    normal, divided by their joint norm and multiplied by ``SPEED``: more balls are slower.

    Raises:
        ValueError: no place was found for the balls of a video.
    """
    most = options.balls[1]
    start = Start(
        positions=np.zeros((count, most, 2)),
        velocities=np.zeros((count, most, 2)),
        radii=np.zeros((count, most)),
        masses=np.ones((count, most)),
        colors=np.zeros((count, most, 3), np.uint8),
    )
    kinds = np.array(KINDS)
    for row in range(count):
        # The legacy distributions on a counter-based generator: no numpy version changes either of them.
        counter = [0, 0, 0, list(EPISODES_PER_SPLIT).index(split)]
        random = np.random.RandomState(np.random.Philox(key=[options.seed, first + row], counter=counter))  # pyright: ignore[reportArgumentType]
        balls = int(random.randint(options.balls[0], most + 1))
        if options.radius is None:
            radii, masses = kinds[random.randint(0, len(kinds), size=balls)].T
        else:
            radii = random.uniform(*options.radius, size=balls)
            masses = np.square(radii)
        start.radii[row, :balls] = radii
        start.masses[row, :balls] = masses
        start.positions[row, :balls] = _place(random, radii)
        velocities = random.normal(size=(balls, 2))
        start.velocities[row, :balls] = velocities * (SPEED / np.sqrt(np.square(velocities).sum()))
        if options.colors == "binary":
            start.colors[row, :balls] = 255
            continue
        number = int(options.colors[-1])
        rounds = -(-balls // number)
        if options.colors.startswith("random"):
            chosen = np.concatenate([random.permutation(number) for _ in range(rounds)])
        else:
            chosen = np.tile(np.arange(number), rounds)
        start.colors[row, :balls] = _PALETTE[chosen[:balls]]
    return start


def _place(random: np.random.RandomState, radii: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k 2"]:
    for _ in range(_RESTARTS):
        places: list[tuple[float, float]] = []
        for ball, radius in enumerate(radii.tolist()):
            for _ in range(_START_TRIES):
                x, y = random.uniform(radius, BOX - radius, size=2).tolist()
                if all(
                    (x - other_x) ** 2 + (y - other_y) ** 2 >= (radius + radii[other]) ** 2
                    for other, (other_x, other_y) in enumerate(places)
                ):
                    places.append((x, y))
                    break
            if len(places) == ball:
                break
        if len(places) == len(radii):
            return np.array(places)
    raise ValueError(f"no room for {len(radii)} balls after {_RESTARTS} starts; ask for fewer or smaller balls")


def simulate(
    positions: Float[np.ndarray, "n k 2"],
    velocities: Float[np.ndarray, "n k 2"],
    radii: Float[np.ndarray, "n k"],
    masses: Float[np.ndarray, "n k"],
    num_frames: int,
) -> States:
    """Move balls for ``num_frames`` frames; frame 0 is the start. Rows of radius 0 are no balls and must not move.

    From event to event, so nothing overlaps and no ball leaves the box by more than rounding: balls fly straight until
    the first of them reaches a wall, which turns that velocity component round, or two of them touch. Those exchange
    momentum along the line of centres: with n from ball j to ball i,
    v_i += 2 m_j / (m_i + m_j) ((v_j - v_i) . n) n, and j the opposite times m_i / m_j.

    Each video has its own clock and all operations are element-wise, so its result does not depend on its neighbours.
    """
    n, num_balls, _ = positions.shape
    one, two = np.triu_indices(num_balls, 1)
    real = (radii[:, one] > 0) & (radii[:, two] > 0)
    reach = np.square(radii[:, one] + radii[:, two])
    video, end = np.arange(n), float(num_frames - 1)
    clock, position, velocity = np.zeros(n), positions.astype(np.float64), velocities.astype(np.float64)
    clocks, all_positions, all_velocities = [clock], [position], [velocity]
    collided = np.zeros((n, num_frames, num_balls), bool)
    while (clock < end).any():
        walls = _until_wall(position, velocity, radii).reshape(n, -1)
        pairs = _until_touch(position[:, one] - position[:, two], velocity[:, one] - velocity[:, two], reach, real)
        waits = np.concatenate([walls, pairs], axis=1)
        event = waits.argmin(axis=1)
        wait = waits[video, event]
        happens = (clock < end) & (wait <= end - clock)
        wait = np.where(happens, wait, end - clock)
        clock = np.where(happens, clock + wait, end)
        position = position + velocity * wait[:, None, None]
        velocity = velocity.copy()
        hit = np.flatnonzero(happens & (event < 2 * num_balls))
        velocity[hit, event[hit] // 2, event[hit] % 2] *= -1
        hit = np.flatnonzero(happens & (event >= 2 * num_balls))
        if len(hit):
            i, j = one[event[hit] - 2 * num_balls], two[event[hit] - 2 * num_balls]
            gap, change = position[hit, i] - position[hit, j], velocity[hit, j] - velocity[hit, i]
            mass_i, mass_j = masses[hit, i, None], masses[hit, j, None]
            push = 2 * _dot(change, gap)[:, None] / _dot(gap, gap)[:, None] / (mass_i + mass_j) * gap
            velocity[hit, i] += mass_j * push
            velocity[hit, j] -= mass_i * push
            frame = np.ceil(clock[hit]).astype(np.int64)
            collided[hit, frame, i] = collided[hit, frame, j] = True
        clocks.append(clock)
        all_positions.append(position)
        all_velocities.append(velocity)

    times, frames = np.stack(clocks), np.arange(num_frames)
    last = np.stack([np.searchsorted(times[:, row], frames, side="right") - 1 for row in range(n)])
    video = video[:, None]
    velocity = np.stack(all_velocities)[last, video]
    position = np.stack(all_positions)[last, video] + velocity * (frames - times[last, video])[..., None, None]
    return States(position, velocity, collided)


def _until_wall(position: np.ndarray, velocity: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Time until each ball (n, k) reaches the wall that it moves to, by axis (n, k, 2); never is infinite."""
    goal = np.where(velocity > 0, BOX - radii[..., None], radii[..., None])
    waits = np.full_like(position, np.inf)
    np.divide(goal - position, velocity, out=waits, where=velocity != 0)
    return np.maximum(waits, 0)


def _until_touch(gap: np.ndarray, change: np.ndarray, reach: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Time until |gap + t * change|^2 = reach, for pairs (n, p, 2) that approach; infinite for others.

    A pair that rounding has pushed into each other touches at once.
    """
    approach, excess = -_dot(gap, change), _dot(gap, gap) - reach
    root = np.square(approach) - _dot(change, change) * excess
    touches = real & (approach > 0) & (root >= 0)
    waits = np.full_like(approach, np.inf)
    np.divide(excess, approach + np.sqrt(np.maximum(root, 0)), out=waits, where=touches)
    return np.maximum(waits, 0)


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one[..., 0] * other[..., 0] + one[..., 1] * other[..., 1]


def to_coordinates(positions: Float[np.ndarray, "*batch 2"], size: int) -> Float32[np.ndarray, "*batch 2"]:
    """Turn (x, y) in box units into (y, x) in [-1, 1] with ``align_corners=True`` for frames of ``size`` pixels.

    Pixel i covers [i, i + 1] * BOX / size, so a point p has pixel index p * size / BOX - 0.5. Index 0 is -1, the last
    index is 1.
    """
    return (2 * (positions[..., ::-1] * (size / BOX) - 0.5) / (size - 1) - 1).astype(np.float32)


def label(
    positions: Float[np.ndarray, "t k 2"], radii: Float[np.ndarray, " k"], size: int
) -> UInt8[np.ndarray, "t h w"]:
    """Say which ball owns each pixel: 0 is the background, ball k is k + 1 and lies over those before it.

    A pixel belongs to a ball where its centre is closer than the radius.
    """
    labels = np.zeros((len(positions), size, size), dtype=np.uint8)
    for ball in np.flatnonzero(radii):
        np.copyto(labels, np.uint8(ball + 1), where=_disc(positions[:, ball], radii[ball], size))
    return labels


def mark_collisions(
    positions: Float[np.ndarray, "t k 2"],
    radii: Float[np.ndarray, " k"],
    collided: Bool[np.ndarray, "t k"],
    size: int,
) -> Bool[np.ndarray, "t h w"]:
    """Mark the pixels of the balls that collided, drawn one pixel wider."""
    marks = np.zeros((len(positions), size, size), dtype=bool)
    for ball in np.flatnonzero(collided.any(axis=0)):
        hit = np.flatnonzero(collided[:, ball])
        marks[hit] |= _disc(positions[hit, ball], radii[ball] + BOX / size, size)
    return marks


def _disc(centres: Float[np.ndarray, "t 2"], radius: float, size: int) -> Bool[np.ndarray, "t h w"]:
    pixels = (np.arange(size) + 0.5) * (BOX / size)
    x, y = np.square(pixels - centres[:, :1]), np.square(pixels - centres[:, 1:])
    return x[:, None, :] < radius**2 - y[:, :, None]
