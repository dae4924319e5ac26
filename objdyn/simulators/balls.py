"""Balls-Interaction: three discs that bounce off the walls of a 64x64 box and off each other.

Re-implements the physics, the random draws and the drawing of the generator of G-SWM (Lin et al., "Improving
Generative Imagination in Object-Centric World Models", ICML 2020). With ``seed=None`` the episodes are those of the
published files: on the first 24 of ``train`` and the first 8 of ``val`` positions, velocities, colours and all pixels
are equal, bit for bit.

Inside this module positions and velocities are the generator's: (x, y) in pixels and pixels per frame, continuous in
[0, 64]. A clip's ``positions`` follow the project's convention, see :func:`to_coordinates`.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from objdyn.clips import Clip

NUM_FRAMES = 100
SIZE = 64
"""Side of the square frame, in pixels."""
FPS = 10.0
"""Nominal: the generator has no clock."""
NUM_BALLS = 3
RADIUS = 8.0
"""Physical radius in pixels; the drawn disc is 7.5 pixels, so balls bounce just before they seem to touch."""
SPEED = 3.0
"""Speed of every ball at frame 0, in pixels per frame."""
SUBSTEPS = 10
EPISODES_PER_SPLIT = {"train": 5000, "val": 200, "test": 200}
PUBLISHED_SEED = 7

_COLORS = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=np.float64)
_START_TRIES = 1000
_SPRITE = 17
_STEP = 2 * _SPRITE
"""From one pixel to the next the sprite advances by 17/16 samples: 34 steps of 1/32 sample."""
_MARGIN = 4


class States(NamedTuple):
    """Trajectories of some episodes, as the generator computes them."""

    positions: Float[np.ndarray, "n t k 2"]
    """Centres (x, y) in pixels."""
    velocities: Float[np.ndarray, "n t k 2"]
    """(x, y) in pixels per frame."""
    colors: Float[np.ndarray, "n k 3"]
    """Red, green, blue in [0, 1]."""


@dataclass(frozen=True)
class BallsEpisode:
    """One episode; frames are drawn when a clip is asked for."""

    key: str
    source: str
    positions: Float[np.ndarray, "t k 2"]
    """Centres (x, y) in pixels."""
    velocities: Float[np.ndarray, "t k 2"]
    """(x, y) in pixels per frame."""
    colors: Float[np.ndarray, "k 3"]
    """Red, green, blue in [0, 1]."""

    @property
    def num_frames(self) -> int:
        """Frames of the whole episode."""
        return len(self.positions)

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        """Draw ``length`` frames from frame ``start``; ``None`` means until the end.

        ``truth`` has ``positions``, ``present``, ``segmentation`` (0 background, ball k is k + 1) and ``num_objects``.

        Raises:
            ValueError: the window leaves the episode.
        """
        length = self.num_frames - start if length is None else length
        if start < 0 or length < 1 or start + length > self.num_frames:
            raise ValueError(
                f"{self.source} has {self.num_frames} frames, got start={start} and length={length}; ask for less"
            )
        positions = self.positions[start : start + length]
        frames, segmentation = render(positions, self.colors)
        truth = {
            "num_objects": np.array(positions.shape[1], dtype=np.int64),
            "positions": to_coordinates(positions),
            "present": np.ones(positions.shape[:2], dtype=bool),
            "segmentation": segmentation,
        }
        return Clip(key=self.key, frames=frames, fps=FPS, start_frame=start, stride=1, source=self.source, truth=truth)


def episodes(split: str, first: int, count: int, seed: int | None = None) -> list[BallsEpisode]:
    """Simulate episodes ``first`` to ``first + count - 1`` of a split.

    An episode depends only on seed, split and its number, never on what is simulated with it.

    Args:
        split: ``train``, ``val`` or ``test``.
        first: number of the first episode.
        count: how many.
        seed: ``None`` for the published data. Otherwise train draws from ``seed``, val from ``seed + 1`` and test from
            ``seed + 2``, as the published data does with 7, 8, 9; so seeds three or more apart share no episode.

    Raises:
        ValueError: there is no such split, or the range leaves it, or the seed is not in [0, 2^32 - 3].
    """
    states = simulate_split(split, first, count, seed)
    return [
        BallsEpisode(
            key=f"{split}-{first + i:06d}",
            source=f"sim:balls-interaction/{split}/{first + i}",
            positions=states.positions[i],
            velocities=states.velocities[i],
            colors=states.colors[i],
        )
        for i in range(count)
    ]


def simulate_split(split: str, first: int, count: int, seed: int | None = None) -> States:
    """The trajectories behind :func:`episodes`, with the same arguments and errors."""
    if split not in EPISODES_PER_SPLIT:
        raise ValueError(f"balls-interaction has the splits {', '.join(EPISODES_PER_SPLIT)}, got {split!r}")
    total = EPISODES_PER_SPLIT[split]
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(
            f"balls-interaction/{split} has {total} episodes, got first={first} and count={count}; ask for less"
        )
    seed = PUBLISHED_SEED if seed is None else seed
    if not 0 <= seed <= 2**32 - 3:
        raise ValueError(f"seed must be in [0, {2**32 - 3}], got {seed}")
    split_seed = seed + list(EPISODES_PER_SPLIT).index(split)
    seeds = np.random.RandomState(split_seed).randint(0, 2**32 - 1, size=first + count, dtype=np.int64)[first:]
    return simulate(*_draw(seeds))


def simulate(
    positions: Float[np.ndarray, "n k 2"],
    velocities: Float[np.ndarray, "n k 2"],
    colors: Float[np.ndarray, "n k 3"],
    num_frames: int = NUM_FRAMES,
) -> States:
    """Move balls of equal mass for ``num_frames`` frames; frame 0 is the start.

    Ten sub-steps per frame. In each, on the positions of a trial step: a ball beyond a wall has that velocity component
    turned inwards; then, pair by pair (each ball with all before it), overlapping balls exchange the components of
    their velocities along the line of centres. Nobody asks whether the two approach, so a pair that still overlaps
    exchanges again and may stick for some sub-steps; the published data has that.

    Element-wise throughout, so an episode's result does not depend on its neighbours in the batch.
    """
    n, num_balls, _ = positions.shape
    position, velocity = positions.astype(np.float64), velocities.astype(np.float64)
    all_positions = np.empty((n, num_frames, num_balls, 2))
    all_velocities = np.empty_like(all_positions)
    eps = 1 / SUBSTEPS
    for frame in range(num_frames):
        for _ in range(SUBSTEPS if frame else 0):
            trial = position + eps * velocity
            velocity = np.where(trial - RADIUS < 0, np.abs(velocity), velocity)
            velocity = np.where(trial + RADIUS > SIZE, -np.abs(velocity), velocity)
            _collide(position + eps * velocity, velocity)
            position = position + eps * velocity
        all_positions[:, frame] = position
        all_velocities[:, frame] = velocity
    return States(all_positions, all_velocities, colors)


def _collide(trial: np.ndarray, velocity: np.ndarray) -> None:
    for i in range(trial.shape[1]):
        for j in range(i):
            gap = trial[:, i] - trial[:, j]
            squared = gap[:, 0] * gap[:, 0] + gap[:, 1] * gap[:, 1]
            hit = np.flatnonzero(squared < (2 * RADIUS) ** 2)
            if len(hit) == 0:
                continue
            normal = gap[hit] / np.sqrt(squared[hit])[:, None]
            along_i, along_j = normal * velocity[hit, i], normal * velocity[hit, j]
            exchange = (along_j[:, 0] + along_j[:, 1]) - (along_i[:, 0] + along_i[:, 1])
            velocity[hit, i] += normal * exchange[:, None]
            velocity[hit, j] += normal * -exchange[:, None]


def _draw(seeds: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start positions, start velocities and colours, in the generator's order of draws."""
    positions = np.empty((len(seeds), NUM_BALLS, 2))
    directions = np.empty_like(positions)
    colors = np.empty((len(seeds), NUM_BALLS, 3))
    for n, seed in enumerate(seeds):
        random = np.random.RandomState(int(seed))
        # The generator draws mass, layer and size even though each has one possible value.
        for _ in ("mass", "layer", "size"):
            random.choice(1, size=NUM_BALLS)
        colors[n] = _COLORS[random.choice(len(_COLORS), size=NUM_BALLS)]
        random.choice(1, size=NUM_BALLS)  # shape
        directions[n] = random.normal(size=(NUM_BALLS, 2))
        for ball in range(NUM_BALLS):
            positions[n, ball] = _draw_start(random, positions[n, :ball])
    length = np.sqrt(directions[..., :1] * directions[..., :1] + directions[..., 1:] * directions[..., 1:])
    return positions, directions / length * SPEED, colors


def _draw_start(random: np.random.RandomState, others: np.ndarray) -> np.ndarray:
    for _ in range(_START_TRIES):
        start = random.uniform(RADIUS, SIZE - RADIUS, size=2)
        if np.all(np.sum((others - start) ** 2, axis=-1) >= (2 * RADIUS) ** 2):
            return start
    raise ValueError(f"no room for a ball beside {len(others)} others after {_START_TRIES} tries; use another seed")


def to_coordinates(positions: Float[np.ndarray, "*batch 2"]) -> Float32[np.ndarray, "*batch 2"]:
    """Turn (x, y) in pixels, continuous in [0, 64], into (y, x) in [-1, 1] with ``align_corners=True``.

    Pixel i covers [i, i + 1], so a point p has pixel index p - 0.5, and index 0 is -1, index 63 is 1.
    """
    return (2 * (positions[..., ::-1] - 0.5) / (SIZE - 1) - 1).astype(np.float32)


def to_pixels(coordinates: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
    """Invert :func:`to_coordinates`."""
    return ((coordinates[..., ::-1].astype(np.float64) + 1) / 2) * (SIZE - 1) + 0.5


def render(
    positions: Float[np.ndarray, "t k 2"], colors: Float[np.ndarray, "k 3"]
) -> tuple[UInt8[np.ndarray, "t 64 64 3"], UInt8[np.ndarray, "t 64 64"]]:
    """Draw balls on black, later ones over earlier ones, and label the pixels that each of them owns.

    A 17x17 anti-aliased disc is warped bilinearly so that its corners meet the centre +- radius, with positions in
    steps of 1/32 sample, and blended by its opacity; fractions of a grey level are cut off. Its centre falls on pixel
    index p - 0.47 and it looks like a disc of radius 7.5. The owner of a pixel is the topmost ball that covers at least
    half of it.

    Raises:
        ValueError: a centre lies more than about three pixels outside the range that the walls allow.
    """
    num_frames, num_balls, _ = positions.shape
    corner, phase = _place(positions)
    if corner.min(initial=0) < -_MARGIN or corner.max(initial=0) + _SPRITE > SIZE + _MARGIN:
        raise ValueError(
            f"ball centres must lie in [{RADIUS}, {SIZE - RADIUS}] pixels or a sub-step beside it, got "
            f"{positions.min():.2f} to {positions.max():.2f}"
        )
    side = SIZE + 2 * _MARGIN
    canvas = np.zeros((num_frames * side * side, 3))
    labels = np.zeros(num_frames * side * side, dtype=np.uint8)
    opacities = _opacities()
    span = np.arange(_SPRITE)
    for ball in range(num_balls):
        x, y = corner[:, ball, 0, None, None] + _MARGIN, corner[:, ball, 1, None, None] + _MARGIN
        frame = np.arange(num_frames)[:, None, None]
        pixel = ((frame * side + y + span[:, None]) * side + x + span).reshape(num_frames, -1)
        opacity = opacities[phase[:, ball, 1], phase[:, ball, 0]].reshape(num_frames, -1)
        blend = opacity[..., None] / 255
        canvas[pixel] = canvas[pixel] * (1 - blend) + blend * (255 * colors[ball])
        labels[pixel] = np.where(opacity >= 128, ball + 1, labels[pixel])
    inner = slice(_MARGIN, _MARGIN + SIZE)
    # Blends are fractions over 255^k; rounding noise must not push a whole grey level below itself.
    frames = (canvas.reshape(num_frames, side, side, 3)[:, inner, inner] + 1e-6).astype(np.uint8)
    return frames, np.ascontiguousarray(labels.reshape(num_frames, side, side)[:, inner, inner])


def _place(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First pixel that a sprite touches, and which of its 34 sub-pixel phases it has there, per axis.

    Sprite coordinate 0 belongs at centre - r and 17 at centre + r. The fixed-point arithmetic (corners in float32,
    1/1024 then 1/32 sample) is that of the image library which drew the published frames.
    """
    low = (positions - RADIUS).astype(np.float32).astype(np.float64)
    high = (positions + RADIUS).astype(np.float32).astype(np.float64)
    origin = (np.rint(-_SPRITE * 1024 * low / (high - low)).astype(np.int64) + 16) >> 5
    corner = (-32 - origin) // _STEP + 1
    return corner, origin + _STEP * corner + 31


@cache
def _opacities() -> UInt8[np.ndarray, "34 34 17 17"]:
    """Opacity of the 17x17 pixels under the sprite, 0 to 255, for every sub-pixel phase in y and x."""
    centre = _SPRITE // 2
    offset = np.abs(np.arange(_SPRITE) - centre)
    sprite = np.where(np.hypot(offset[:, None], offset) < 8, 255, 0)
    # The edge of one octant, read off the published frames.
    edge = {(8, 0): 127, (8, 1): 112, (8, 2): 65, (7, 4): 111, (7, 3): 225, (6, 6): 4, (6, 5): 176}
    for (far, near), value in edge.items():
        for y, x in ((far, near), (near, far)):
            sprite[np.ix_(offset == y, offset == x)] = value
    sample = np.arange(-31, _STEP - 31)[:, None] + _STEP * np.arange(_SPRITE)
    whole, fraction = (sample >> 5)[..., None], (sample & 31)[..., None]
    index = np.arange(_SPRITE)
    weights = (whole == index) * (32 - fraction) + (whole + 1 == index) * fraction
    return ((np.einsum("qia,ab,pjb->qpij", weights, sprite, weights) + 512) >> 10).astype(np.uint8)
