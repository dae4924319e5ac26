"""Shapes: single images of a few filled shapes on cyan that do not overlap, the data of DLPv2's ``shapes`` setting.

Re-implements the kind of image that DLP's authors draw on the fly (Daniel & Tamar, 2022 and TMLR 2024): 64 pixels, two
to five rectangles, discs, triangles or ellipses of 11 to 13 pixels in random colours, background (0, 255, 255). Their
generator is another library's and its draws are not reproduced; where it is open, here

- the four kinds are equally likely, and so are all whole sides of the range, for both sides of rectangles and ellipses;
- the boxes around two shapes do not overlap, and lie wholly in the image;
- colours are uniform, drawn again while they differ from the background by less than ``CONTRAST`` in every channel.

An image is a clip of one frame. A pixel is a shape's if its centre is; there is no anti-aliasing. A shape's position is
the middle of its box, which is where a glimpse around it has its centre; for a triangle that is not its centroid.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from objdyn.clips import Clip
from objdyn.simulators.options import Option, read_options, show_range, whole, whole_range

KINDS = ("rectangle", "disc", "triangle", "ellipse")
BACKGROUND = (0, 255, 255)
CONTRAST = 64
"""Least difference between a shape and the background in at least one channel, in levels of 255."""
EPISODES_PER_SPLIT = {"train": 40_000, "val": 2_000, "test": 2_000}
FPS = 1.0
"""Nominal: there is one frame."""
MAX_OBJECTS = 50

_PLACE_TRIES = 100
_RESTARTS = 200


@dataclass(frozen=True)
class Options:
    """What tells one set of Shapes from another.

    Raises:
        ValueError: a value is impossible.
    """

    objects: tuple[int, int] = (2, 5)
    """Fewest and most shapes of an image; each number in between is equally likely."""
    size: int = 64
    """Height and width of the image in pixels."""
    side: tuple[int, int] = (11, 13)
    """Shortest and longest side of the box around a shape, in pixels."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise ValueError(
                f"objects must be N or A-B with 1 <= A <= B <= {MAX_OBJECTS}, got {show_range(self.objects)}"
            )
        if not 8 <= self.size <= 1024:
            raise ValueError(f"size must be 8 to 1024 pixels, got {self.size}")
        shortest, longest = self.side
        if not 2 <= shortest <= longest <= self.size:
            raise ValueError(f"side must be N or A-B with 2 <= A <= B <= size={self.size}, got {show_range(self.side)}")
        # Random placement jams when aligned squares cover about 0.56 of the room; below 0.4 a restart finds a place.
        if high > 1 and high * longest**2 > 0.4 * self.size**2:
            raise ValueError(
                f"{high} shapes of {longest} pixels do not fit into {self.size} pixels without overlap; ask for fewer "
                "or smaller ones"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")

    @property
    def frames(self) -> int:
        """Frames of a clip: an image."""
        return 1

    @property
    def name(self) -> str:
        """The simulator with all options in a fixed order, so that equal data have one name."""
        return (
            f"shapes:objects={show_range(self.objects)},size={self.size},side={show_range(self.side)},seed={self.seed}"
        )


def parse(text: str) -> Options:
    """Read options as in a data string: ``objects=2-5,size=64,side=11-13``; the empty string takes the defaults.

    Raises:
        ValueError: a key is unknown or comes twice, or a value is impossible; the message lists what there is.
    """
    return Options(**read_options("shapes", text, _OPTIONS))


_OPTIONS = {
    "objects": Option(whole_range, "objects=N or objects=A-B"),
    "size": Option(whole, "size=PIXELS"),
    "side": Option(whole_range, "side=N or side=A-B"),
    "seed": Option(whole, "seed=N"),
}


@dataclass(frozen=True)
class ShapesEpisode:
    """One image; it is drawn when its clip is asked for."""

    key: str
    source: str
    options: Options
    split: str
    number: int

    @property
    def num_frames(self) -> int:
        """One."""
        return 1

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        """Draw the image, a clip of one frame.

        ``truth`` has ``positions``, ``present``, ``segmentation`` (0 background, shape k is k + 1) and ``num_objects``.
        Where the number of shapes varies, positions have room for the most, the rest not ``present``.

        Raises:
            ValueError: another window than the only frame is asked for.
        """
        if start != 0 or length not in (None, 1):
            raise ValueError(
                f"{self.source} is an image of 1 frame, got start={start} and length={length}; set clip_frames to 1"
            )
        options = self.options
        boxes, kinds, colors = draw(options, self.split, self.number)
        labels = np.zeros((options.size, options.size), np.uint8)
        for index, (box, kind) in enumerate(zip(boxes, kinds, strict=True)):
            top, left, height, width = box.tolist()
            window = labels[top : top + height, left : left + width]
            window[stencil(kind, height, width)] = index + 1
        room = options.objects[1]
        positions = np.zeros((1, room, 2), np.float32)
        # the middle of pixels top .. top + height - 1, with align_corners=True
        middle = boxes[:, :2] + (boxes[:, 2:] - 1) / 2
        positions[0, : len(boxes)] = 2 * middle / (options.size - 1) - 1
        truth = {
            "num_objects": np.array(len(boxes), dtype=np.int64),
            "positions": positions,
            "present": (np.arange(room) < len(boxes))[None],
            "segmentation": labels[None],
        }
        frames = np.concatenate([np.array([BACKGROUND], np.uint8), colors])[labels][None]
        return Clip(key=self.key, frames=frames, fps=FPS, start_frame=0, stride=1, source=self.source, truth=truth)


def episodes(options: Options, split: str, first: int, count: int) -> list[ShapesEpisode]:
    """Images ``first`` to ``first + count - 1`` of a split; each depends only on options, split and its number.

    Raises:
        ValueError: there is no such split, or the range leaves it.
    """
    if split not in EPISODES_PER_SPLIT:
        raise ValueError(f"shapes has the splits {', '.join(EPISODES_PER_SPLIT)}, got {split!r}")
    total = EPISODES_PER_SPLIT[split]
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(f"shapes/{split} has {total} images, got first={first} and count={count}; ask for less")
    return [
        ShapesEpisode(f"{split}-{number:06d}", f"sim:{options.name}/{split}/{number}", options, split, number)
        for number in range(first, first + count)
    ]


def draw(options: Options, split: str, number: int) -> tuple[Int[np.ndarray, "k 4"], list[str], np.ndarray]:
    """Boxes (top, left, height, width) in pixels, kinds and uint8 colours (k, 3) of the shapes of one image.

    Raises:
        ValueError: no place was found for the shapes.
    """
    # The legacy distributions on a counter-based generator: no numpy version changes either of them.
    counter = [0, 0, 0, list(EPISODES_PER_SPLIT).index(split)]
    random = np.random.RandomState(np.random.Philox(key=[options.seed, number], counter=counter))  # pyright: ignore[reportArgumentType]
    count = int(random.randint(options.objects[0], options.objects[1] + 1))
    kinds = [KINDS[index] for index in random.randint(0, len(KINDS), size=count)]
    sides = random.randint(options.side[0], options.side[1] + 1, size=(count, 2))
    sides[:, 1] = np.where([kind == "disc" for kind in kinds], sides[:, 0], sides[:, 1])
    colors = np.stack([_draw_color(random) for _ in range(count)])
    return np.concatenate([_place(random, sides, options.size), sides], axis=1), kinds, colors


def _draw_color(random: np.random.RandomState) -> np.ndarray:
    while True:
        color = random.randint(0, 256, size=3)
        if np.abs(color - BACKGROUND).max() >= CONTRAST:
            return color.astype(np.uint8)


def _place(random: np.random.RandomState, sides: Int[np.ndarray, "k 2"], size: int) -> Int[np.ndarray, "k 2"]:
    """Top left corners of boxes that do not overlap, one after the other, from the start where one finds no place."""
    corners = np.zeros_like(sides)
    for _ in range(_RESTARTS):
        placed = 0
        while placed < len(sides):
            for _ in range(_PLACE_TRIES):
                corner = [random.randint(0, size - side + 1) for side in sides[placed].tolist()]
                before, after = corners[:placed] + sides[:placed], corner + sides[placed]
                apart = (before <= corner) | (after <= corners[:placed])
                if apart.any(axis=1).all():
                    corners[placed], placed = corner, placed + 1
                    break
            else:
                break
        if placed == len(sides):
            return corners
    raise ValueError(f"no room for {len(sides)} shapes in {size} pixels after {_RESTARTS} tries; use another seed")


def stencil(kind: str, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Which pixels of its box a shape fills: those whose centres it holds.

    A triangle has its tip in the middle above and its base below; the tip is never thinner than a pixel, or two where
    the width is even, so that every shape touches all sides of its box.
    """
    if kind == "rectangle":
        return np.ones((height, width), bool)
    # Twice the distances of pixel centres from the middle: whole numbers, so that no rounding decides about a pixel.
    y, x = 2 * np.arange(height)[:, None] + 1 - height, np.abs(2 * np.arange(width) + 1 - width)
    if kind == "triangle":
        return 2 * height * x <= np.maximum((y + height) * width, 2 * height * x.min())
    return np.square(x * height) + np.square(y * width) <= (height * width) ** 2
