"""Cannonballs: up to three balls that fly through each other on parabolas, white on black.

Re-implements the data of Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019), section 3.1, which
was not published. Balls are shot upwards from the left or the right, positions follow Newton's law without noise, and
each frame shows them with noise of 0.7 pixels in x and 0.8 in y (at 48x48). Where the paper is silent or open:

- Gravity pulls down: the paper's force is negative on y and its balls start upwards, so y points up in the world and
  rows are flipped.
- ``max_x``, the room between left and right, is the longest way of a ball (its "maximum possible displacement").
- The world is mapped to the frame by one fixed affine map for all videos, see :attr:`Options.window`: a map per video
  would give each its own gravity. Axes have different scales, so the frame shows the world only up to an affine map.
- Left and right are equally likely, ball by ball.

In the world, positions and velocities are (x, y), y up, in the paper's units. A clip's ``positions`` follow the
project's convention, see :func:`to_coordinates`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from objdyn.clips import Clip
from objdyn.simulators.options import Option, decimal, read_options, show_range, whole, whole_range

STEP = 0.015
"""Time from one frame to the next (delta)."""
GRAVITY = 9.81
FORCE = (0.0, -GRAVITY * STEP**2 / 2, 0.0, -GRAVITY * STEP)
"""What each step adds to (x, y, vx, vy) (u)."""
NOISE_VARIANCE = 0.001
"""Of the noise on both coordinates of each rendered position, independent over frames (Sigma_A)."""
ANGLES = (40.0, 60.0)
"""Of the shot above the horizontal, in degrees."""
SPEEDS = (2.0, 3.0)
STARTS_X = (-0.5, -0.1)
"""From the left; from the right 0.9 ``max_x`` is added."""
STARTS_Y = (-0.5, 0.5)
RADIUS = 2.0
"""In pixels, at any size of the frame."""
FRAMES = 30
"""Of the paper's videos; room is made for at least as many."""
FPS = 1 / STEP
TRAIN_EPISODES = 1_000_000
TEST_EPISODES = 1000
"""Videos of ``val`` and of ``test`` for each number of balls."""
MAX_BALLS = 10

_SPLITS = ("train", "val", "test")
_MARGIN_X = 0.1
_WINDOW_Y = (-0.95, 0.95)
_MARGIN_BELOW = 0.08
_REACH = math.ceil(RADIUS)


@dataclass(frozen=True)
class Options:
    """What tells one set of Cannonballs from another.

    Raises:
        ValueError: a value is impossible.
    """

    balls: tuple[int, int] = (1, 3)
    """Fewest and most balls of a video, which take turns: video i of 1-3 balls has 1 + i % 3."""
    size: int = 48
    """Height and width of the frames in pixels; the paper has 48 and 32."""
    frames: int = FRAMES
    """Frames of a video; the paper has 30 and 50. With the same ``max_x``, fewer than 30 begin a video of 30."""
    max_x: float | None = None
    """Starts from the right are 0.9 of this from those from the left. None takes the longest way of a ball,
    :attr:`longest_way`. With 0.9 balls from the right start where those from the left end, the other reading of the
    paper for 30 frames."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.balls
        if not 1 <= low <= high <= MAX_BALLS:
            raise ValueError(f"balls must be N or A-B with 1 <= A <= B <= {MAX_BALLS}, got {show_range(self.balls)}")
        if not 8 <= self.size <= 1024:
            raise ValueError(f"size must be 8 to 1024 pixels, got {self.size}")
        if not 1 <= self.frames <= 1000:
            raise ValueError(f"frames must be 1 to 1000, got {self.frames}")
        if self.max_x is not None and not 0 <= self.max_x <= 100:
            raise ValueError(f"max_x must be 0 to 100, got {self.max_x:g}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")

    @property
    def name(self) -> str:
        """The simulator with all options in a fixed order, so that equal data have one name."""
        return (
            f"cannonballs:balls={show_range(self.balls)},size={self.size},frames={self.frames},"
            f"max_x={self.distance:g},seed={self.seed}"
        )

    @property
    def longest_way(self) -> float:
        """Most that x changes in the frames of a video, at least 30: 1 for 30 frames and 1.69 for 50.

        That is 0.99969 and 1.68914 rounded up to two digits.
        """
        fastest = SPEEDS[1] * math.cos(math.radians(ANGLES[0]))
        return math.ceil(100 * fastest * STEP * (max(self.frames, FRAMES) - 1)) / 100

    @property
    def distance(self) -> float:
        """``max_x``, with its default."""
        return self.longest_way if self.max_x is None else self.max_x

    @cached_property
    def window(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The (low, high) of x and of y that the frame shows; without noise no ball leaves it.

        For 30 frames -0.70 to 1.00 and -0.95 to 0.95: 20,000 noisy balls span -0.60 to 0.96 and -0.93 to 0.90. Rendered
        positions beyond are clipped.
        """
        right = 0.9 * self.distance
        low = min(STARTS_X[0], STARTS_X[0] + right - self.longest_way) - _MARGIN_X
        high = max(STARTS_X[1] + self.longest_way, STARTS_X[1] + right) + _MARGIN_X
        time = STEP * (max(self.frames, FRAMES) - 1)
        slowest = SPEEDS[0] * math.sin(math.radians(ANGLES[0]))
        fall = STARTS_Y[0] + slowest * time - GRAVITY * time**2 / 2 - _MARGIN_BELOW
        bottom = min(_WINDOW_Y[0], math.floor(100 * fall) / 100)
        return (round(low, 6), round(high, 6)), (bottom, _WINDOW_Y[1])

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Change of a clip's (y, x) coordinates per unit of the world; y is negative, since rows go down."""
        (left, right), (bottom, top) = self.window
        room = 2 * (self.size - 1 - 2 * RADIUS) / (self.size - 1)
        return -room / (top - bottom), room / (right - left)

    @property
    def acceleration(self) -> tuple[float, float]:
        """True change of velocity from frame to frame, (y, x) in a clip's coordinates per frame squared."""
        return -GRAVITY * STEP**2 * self.scale[0], 0.0


_OPTIONS = {
    "balls": Option(whole_range, "balls=N or balls=A-B"),
    "size": Option(whole, "size=PIXELS"),
    "frames": Option(whole, "frames=N"),
    "max_x": Option(decimal, "max_x=LENGTH"),
    "seed": Option(whole, "seed=N"),
}


def parse(text: str) -> Options:
    """Read options as in a data string: ``balls=2,size=32``; the empty string takes the defaults.

    Raises:
        ValueError: a key is unknown or comes twice, or a value is impossible; the message lists what there is.
    """
    return Options(**read_options("cannonballs", text, _OPTIONS))


class Tracks(NamedTuple):
    """Trajectories of the balls of one video, in the world."""

    positions: Float[np.ndarray, "t k 2"]
    """(x, y), without noise."""
    velocities: Float[np.ndarray, "t k 2"]
    """(x, y) per unit of time."""
    rendered: Float[np.ndarray, "t k 2"]
    """Positions with noise, (x, y)."""


@dataclass(frozen=True)
class CannonballsEpisode:
    """One video, simulated when the first clip is asked for."""

    key: str
    source: str
    options: Options
    split: str
    number: int

    @property
    def num_frames(self) -> int:
        """Frames of the whole episode."""
        return self.options.frames

    @cached_property
    def tracks(self) -> Tracks:
        """Where the balls are in each frame."""
        return simulate(self.options, self.split, self.number)

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        """Draw ``length`` frames from frame ``start``; ``None`` means until the end.

        ``truth`` has ``positions`` (without noise), ``rendered_positions`` (where the balls are drawn), ``velocities``
        (change of ``positions`` per frame at that frame), ``present``, ``segmentation`` (0 background, ball k is k + 1
        and lies over those before it) and ``num_objects``. Where the number of balls varies there is room for the
        most, the rest is not ``present`` and 0.

        Raises:
            ValueError: the window leaves the episode.
        """
        length = self.num_frames - start if length is None else length
        if start < 0 or length < 1 or start + length > self.num_frames:
            raise ValueError(
                f"{self.source} has {self.num_frames} frames, got start={start} and length={length}; ask for less"
            )
        positions, velocities, rendered = (track[start : start + length] for track in self.tracks)
        (left, right), (bottom, top) = self.options.window
        drawn = to_coordinates(np.clip(rendered, (left, bottom), (right, top)), self.options)
        segmentation = label(drawn, self.options.size)
        number, most = positions.shape[1], self.options.balls[1]
        present = np.zeros((length, most), dtype=bool)
        present[:, :number] = True
        truth = {
            "num_objects": np.array(number, dtype=np.int64),
            "positions": _padded(to_coordinates(positions, self.options), most),
            "present": present,
            "rendered_positions": _padded(drawn, most),
            "segmentation": segmentation,
            "velocities": _padded(velocities[..., ::-1] * np.array(self.options.scale) * STEP, most),
        }
        white = (segmentation > 0).astype(np.uint8) * np.uint8(255)
        frames = np.broadcast_to(white[..., None], (*white.shape, 3))  # read-only, and one byte per pixel
        return Clip(key=self.key, frames=frames, fps=FPS, start_frame=start, stride=1, source=self.source, truth=truth)


def episodes_per_split(options: Options) -> dict[str, int]:
    """As many training videos as a long training takes, ``TEST_EPISODES`` others for each number of balls."""
    numbers = options.balls[1] - options.balls[0] + 1
    return {"train": TRAIN_EPISODES, "val": TEST_EPISODES * numbers, "test": TEST_EPISODES * numbers}


def episodes(options: Options, split: str, first: int, count: int) -> list[CannonballsEpisode]:
    """Videos ``first`` to ``first + count - 1`` of a split.

    A video depends only on the options, the split and its number, never on what is simulated with it. ``size`` changes
    how it is drawn and not how the balls move.

    Raises:
        ValueError: there is no such split, or the range leaves it.
    """
    if split not in _SPLITS:
        raise ValueError(f"cannonballs has the splits {', '.join(_SPLITS)}, got {split!r}")
    total = episodes_per_split(options)[split]
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(f"cannonballs/{split} has {total} episodes, got first={first} and count={count}; ask for less")
    name = options.name
    return [
        CannonballsEpisode(f"{split}-{number:06d}", f"sim:{name}/{split}/{number}", options, split, number)
        for number in range(first, first + count)
    ]


def simulate(options: Options, split: str, number: int) -> Tracks:
    """Shoot the balls of one video.

    ``h_t = A h_{t-1} + u`` with the constants above and without noise, in closed form: a time s after the shot a ball
    is at p + v s - (0, 9.81) s^2 / 2. Frame 0 is the shot.
    """
    low, high = options.balls
    balls = low + number % (high - low + 1)
    # The legacy distributions on a counter-based generator: no numpy version changes either of them.
    counter = [0, 0, 0, _SPLITS.index(split)]
    random = np.random.RandomState(np.random.Philox(key=[options.seed, number], counter=counter))  # pyright: ignore[reportArgumentType]
    start, velocity = np.empty((balls, 2)), np.empty((balls, 2))
    for ball in range(balls):
        right = random.random_sample() < 0.5
        angle, speed = math.radians(random.uniform(*ANGLES)), random.uniform(*SPEEDS)
        start[ball] = random.uniform(*STARTS_X) + right * 0.9 * options.distance, random.uniform(*STARTS_Y)
        velocity[ball] = speed * math.cos(angle) * (-1 if right else 1), speed * math.sin(angle)
    time = STEP * np.arange(options.frames)[:, None, None]
    pull = np.array([0.0, -GRAVITY])
    positions = start + velocity * time + pull * np.square(time) / 2
    noise = math.sqrt(NOISE_VARIANCE) * random.normal(size=positions.shape)
    return Tracks(positions, velocity + pull * time, positions + noise)


def to_coordinates(positions: Float[np.ndarray, "*batch 2"], options: Options) -> Float[np.ndarray, "*batch 2"]:
    """Turn (x, y) of the world into (y, x) in [-1, 1] with ``align_corners=True``, y down.

    The window's edges are ``RADIUS`` pixels from the centres of the outermost pixels, so that balls are whole.
    """
    (left, right), (bottom, top) = options.window
    middle = np.array([(bottom + top) / 2, (left + right) / 2])
    return (positions[..., ::-1] - middle) * np.array(options.scale)


def to_world(coordinates: Float[np.ndarray, "*batch 2"], options: Options) -> Float[np.ndarray, "*batch 2"]:
    """Invert :func:`to_coordinates`."""
    (left, right), (bottom, top) = options.window
    middle = np.array([(bottom + top) / 2, (left + right) / 2])
    return (coordinates / np.array(options.scale) + middle)[..., ::-1]


def label(coordinates: Float[np.ndarray, "t k 2"], size: int) -> UInt8[np.ndarray, "t h w"]:
    """Say which ball owns each pixel of balls at (y, x) in [-1, 1]: 0 is the background, ball k is k + 1.

    A pixel belongs to a ball where its centre is at most ``RADIUS`` pixels away, 12.6 pixels on average; later balls
    lie over earlier ones. A ball that hangs over the border is cut.
    """
    centre = (coordinates + 1) / 2 * (size - 1)
    nearest = np.rint(centre).astype(np.int64)
    reach = np.arange(-_REACH, _REACH + 1)
    pixel = nearest[..., None] + reach  # t k 2 p
    squared = np.square(pixel - centre[..., None])
    inside = squared[:, :, 0, :, None] + squared[:, :, 1, None, :] <= RADIUS**2
    # A border as wide as what hangs over; balls farther outside are moved into it.
    border = 2 * _REACH + 1
    row, column = np.moveaxis(np.clip(pixel, -border, size - 1 + border), 2, 0) + border
    side = size + 2 * border
    labels = np.zeros((len(coordinates), side * side), dtype=np.uint8)
    for ball in range(coordinates.shape[1]):
        frame, dy, dx = np.nonzero(inside[:, ball])
        labels[frame, row[frame, ball, dy] * side + column[frame, ball, dx]] = ball + 1
    return labels.reshape(-1, side, side)[:, border:-border, border:-border].copy()


def _padded(values: np.ndarray, most: int) -> np.ndarray:
    """Float32 (t, most, 2), with zeros for the balls that a video lacks."""
    padded = np.zeros((len(values), most, 2), dtype=np.float32)
    padded[:, : values.shape[1]] = values
    return padded
