"""Whether latent tracks are the true ones up to one map, whether slots keep their object, what dynamics were learnt.

For models whose positions are known only up to a map (``ssm``). One map is fitted per model, on validation data, for
all objects and frames; slots are assigned to objects sequence by sequence. With the map, latent tracks become positions
as the project has them, (y, x) in [-1, 1] with ``align_corners=True``, and everything after the fit measures those:

    fit_affine(latents, true) -> Map;  Map(latents) -> positions -> recovery, position_errors, identity_swap_rate, ...

Tracks are (n, t, k, 2) for n sequences, t frames and k slots, the true ones (n, t, m, 2). ``slots`` and ``objects``,
both bool, say which of them a sequence has, all where not given; positions of the others do not matter. A sequence
needs at least as many slots as objects. Results are in pixels where ``frame_size``, (height, width), is asked for.

Sources: Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019), sections 3.3 to 3.5, who show such
tracks but measure none; the similarity is that of Umeyama, "Least-squares estimation of transformation parameters
between two point patterns" (1991), with reflections allowed.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

ROTATIONS = 8
"""Starts of a fit, each once more with a reflection."""
ITERATIONS = 10
RADIUS = 2.0
"""Of a ball, in pixels; discs of balls closer than two radii may overlap."""
FRAMES_AT_ONCE = 256
KMEANS_ITERATIONS = 100
BRUTE_FORCE = 24
"""Most assignments of slots to objects that are tried one by one; 3 to 3 are 6."""
LEAST_VARIANCE = 1e-12
"""Of a direction of the latents, as a share of the largest; below it the map ignores that direction."""

Scope = Literal["sequence", "frame"]


class Map(NamedTuple):
    """From latent positions p to positions in the frame, ``matrix p + offset``."""

    matrix: Float[np.ndarray, "2 2"]
    offset: Float[np.ndarray, " 2"]

    def __call__(self, latents: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Map positions."""
        return latents @ self.matrix.T + self.offset


class Recovery(NamedTuple):
    """How well mapped tracks agree with the true ones, over all objects and frames."""

    r2: float
    """1 - squared error / squared deviation of the true positions from their mean, over both axes together."""
    r2_axes: tuple[float, float]
    """The same of y and of x. A fold (the latent follows the distance from the middle) leaves one of them near 0 while
    the total is near 0.5. NaN where the true positions do not vary."""
    rmse: float
    """Root of the mean squared distance, in pixels; R^2 per axis goes with ``rmse_axes``."""
    rmse_axes: tuple[float, float]
    points: int
    """Objects times frames."""


class IdentitySwaps(NamedTuple):
    """How often slots exchange their objects, per sequence."""

    switches: Int[np.ndarray, " n"]
    """Frames in which the best assignment is not that of the compared frame before."""
    compared: Int[np.ndarray, " n"]
    """Pairs of frames that were compared; 0 for a sequence with a single slot, which cannot switch."""

    @property
    def rate(self) -> float:
        """Share of sequences with at least one switch, of those with a compared pair; NaN where there is none."""
        counted = int((self.compared > 0).sum())
        return int((self.switches > 0).sum()) / counted if counted else float("nan")


class Collapses(NamedTuple):
    """How often two slots follow one object, per sequence."""

    collapsed: Int[np.ndarray, " n"]
    """Frames in which one object is the nearest of two slots."""
    frames: Int[np.ndarray, " n"]
    """Frames that were looked at; 0 for a sequence with one object, or with more slots than objects."""

    @property
    def share(self) -> float:
        """Share of the frames, of all sequences together; NaN where there is none."""
        frames = int(self.frames.sum())
        return int(self.collapsed.sum()) / frames if frames else float("nan")


class Centres(NamedTuple):
    """Where objects are in frames, in no order that means anything."""

    positions: Float[np.ndarray, "n t k 2"]
    """(y, x) in [-1, 1], from the top down; 0 beyond a sequence's number of objects."""
    painted: Bool[np.ndarray, "n t"]
    """Whether the frame has at least as many white pixels as objects; else its brightest pixels were taken."""


class Gravity(NamedTuple):
    """The constant acceleration of a learnt state-space model beside the true one."""

    acceleration: Float[np.ndarray, " 2"]
    """Learnt, in the units of the true one."""
    along: float
    """Its component along the true one over the true one's length: 1 is right, negative pulls the wrong way."""
    ratio: float
    """Its length over the true one's."""
    angle: float
    """Degrees between the two, 0 to 180; NaN where nothing was learnt."""
    half_step: float
    """Offset of the positions over that of a constant force (d u_v / 2, or u_v / u_p = 2 / d), along that: 1 is Newton.
    Not identified by data where start velocities are free, since a constant can move from those to the offset."""


def fit_affine(
    latents: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
    iterations: int = ITERATIONS,
) -> Map:
    """The affine map from latent to true positions with the least squared error, slots assigned per sequence.

    Alternates between the best assignment in each sequence (on squared distances summed over frames) and the
    least-squares map of all pairs, from ``ROTATIONS`` rotations with and without a reflection between the whitened
    point clouds; the best result counts. Two whitened clouds of an exact affine map differ by such a rotation, so one
    start is at most 22.5 degrees off.

    Where the latents do not vary in some direction the map ignores it; constant latents map to the mean of the true
    positions, so that ``recovery`` gives an R^2 of 0.

    Raises:
        ValueError: shapes that do not belong together, positions that are not finite, a sequence with more objects than
            slots, no object at all, or no iteration.
    """
    return _fit(latents, true, slots, objects, iterations, _affine, whiten=True)


def fit_similarity(
    latents: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
    iterations: int = ITERATIONS,
) -> Map:
    """The best map of rotation, reflection, one scale and shift (Procrustes analysis); otherwise as ``fit_affine``.

    The paper's "up to re-scaling and rotation". It is the stricter of the two, and unfair where the axes of the frame
    have different scales, as those of Cannonballs have. In units of half a side: for frames that are not square it
    differs from a similarity in pixels.

    Raises:
        ValueError: as for ``fit_affine``.
    """
    return _fit(latents, true, slots, objects, iterations, _similarity, whiten=False)


def assign_slots(
    positions: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
    per: Scope = "sequence",
) -> Int[np.ndarray, "*rows m"]:
    """The slot of each object, (n, m), or of each object in each frame, (n, t, m); -1 where there is no object.

    Each object gets a slot of its own, so that the sum of squared distances is least: over all frames of a sequence, or
    in each frame alone.

    Raises:
        ValueError: as for ``recovery``.
    """
    tracks = _check(positions, true, slots, objects)
    squared = _squared(tracks, _known(per))
    return _assign(squared, *_rows(tracks, per))


def recovery(
    positions: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    frame_size: tuple[int, int],
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
) -> Recovery:
    """R^2 and error of mapped tracks, with slots assigned per sequence; all NaN where there is no object.

    The best assignment flatters: tracks that know nothing have an R^2 above 0 with two objects or more.

    Raises:
        ValueError: shapes that do not belong together, positions that are not finite, or a sequence with more objects
            than slots.
    """
    gaps = _gaps(_check(positions, true, slots, objects), "sequence") * _pixels(frame_size)
    there = ~np.isnan(gaps[..., 0])
    points = int(there.sum())
    if points == 0:
        nan = float("nan")
        return Recovery(nan, (nan, nan), nan, (nan, nan), 0)
    where = (true * _pixels(frame_size))[there].astype(np.float64)
    error = np.square(gaps[there]).sum(axis=0)
    spread = np.square(where - where.mean(axis=0)).sum(axis=0)
    spread[np.ptp(where, axis=0) == 0] = 0  # not what rounding the mean leaves
    y, x = (_share(e, s) for e, s in zip(error.tolist(), spread.tolist(), strict=True))
    rmse_y, rmse_x = np.sqrt(error / points).tolist()
    total = _share(float(error.sum()), float(spread.sum()))
    return Recovery(total, (y, x), math.hypot(rmse_y, rmse_x), (rmse_y, rmse_x), points)


def position_errors(
    positions: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    frame_size: tuple[int, int],
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
    per: Scope = "sequence",
) -> Float[np.ndarray, "n t m"]:
    """Distance of each object from its slot in each frame, in pixels; NaN where there is no object.

    ``per="frame"`` assigns each frame alone: for positions without identity (``kmeans_positions``), and for whatever is
    compared with those.

    Raises:
        ValueError: as for ``recovery``.
    """
    gaps = _gaps(_check(positions, true, slots, objects), _known(per)) * _pixels(frame_size)
    return np.hypot(gaps[..., 0], gaps[..., 1])


def mean_by_frame(
    errors: Float[np.ndarray, "n t m"], keep: Bool[np.ndarray, "n t"] | None = None
) -> Float[np.ndarray, " t"]:
    """Mean of ``position_errors`` over sequences and objects, by frame (by horizon if given predicted frames only).

    ``keep`` says which frames count, ``~are_close(...)`` for example; pass the same for all models that are compared.
    NaN where nothing is left.

    Raises:
        ValueError: ``keep`` has another shape.
    """
    if keep is not None and keep.shape != errors.shape[:2]:
        raise ValueError(f"keep must be {errors.shape[:2]} as the errors are, got {keep.shape}")
    counted = ~np.isnan(errors) & (True if keep is None else keep[..., None])
    number = counted.sum(axis=(0, 2))
    total = np.where(counted, errors, 0).sum(axis=(0, 2))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def are_close(
    true: Float[np.ndarray, "n t m 2"],
    *,
    frame_size: tuple[int, int],
    objects: Bool[np.ndarray, "n m"] | None = None,
    radius: float = RADIUS,
) -> Bool[np.ndarray, "n t"]:
    """Frames in which two objects are closer than two radii, so that their discs may overlap.

    Raises:
        ValueError: positions that are not finite, or ``objects`` of another shape.
    """
    _, true, _, objects = _check(true, true, objects, objects)
    one, two = np.triu_indices(true.shape[2], 1)
    gap = (true[:, :, one] - true[:, :, two]) * _pixels(frame_size)
    distance = np.where((objects[:, one] & objects[:, two])[:, None], np.hypot(gap[..., 0], gap[..., 1]), np.inf)
    return distance.min(axis=2, initial=np.inf) < 2 * radius


def identity_swap_rate(
    positions: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    frame_size: tuple[int, int],
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
    radius: float = RADIUS,
) -> IdentitySwaps:
    """How often slots exchange their objects in flight, as in the paper's Fig. 5(b), where each slot owns a region.

    Each frame is assigned alone and compared with the frame before. Frames with two objects closer than two radii are
    ignored, there the assignment hangs on noise; the frames on both sides of such a gap form a pair. A sequence whose
    frames are all assigned alike has no switch.

    Raises:
        ValueError: as for ``recovery``.
    """
    tracks = _check(positions, true, slots, objects)
    partner = _assign(_squared(tracks, "frame"), *_rows(tracks, "frame"))
    kept = ~are_close(true, frame_size=frame_size, objects=tracks.objects, radius=radius)
    kept = kept & ((tracks.slots.sum(axis=1) > 1) & tracks.objects.any(axis=1))[:, None]
    last = np.maximum.accumulate(np.where(kept, np.arange(true.shape[1]), -1), axis=1)[:, :-1]
    before = np.take_along_axis(partner, np.maximum(last, 0)[..., None], axis=1)
    pair = kept[:, 1:] & (last >= 0)
    changed = pair & np.any(partner[:, 1:] != before, axis=2)
    return IdentitySwaps(changed.sum(axis=1), pair.sum(axis=1))


def collapse_share(
    positions: Float[np.ndarray, "n t k 2"],
    true: Float[np.ndarray, "n t m 2"],
    *,
    frame_size: tuple[int, int],
    slots: Bool[np.ndarray, "n k"] | None = None,
    objects: Bool[np.ndarray, "n m"] | None = None,
    radius: float = RADIUS,
) -> Collapses:
    """How often two slots are nearest to one object, so that another one has none.

    Frames with two objects closer than two radii are ignored, and sequences with one object, or with more slots than
    objects, where two must share one.

    Raises:
        ValueError: as for ``recovery``.
    """
    tracks = _check(positions, true, slots, objects)
    gap = (tracks.positions[:, :, :, None] - tracks.true[:, :, None]) * _pixels(frame_size)
    squared = np.where(tracks.objects[:, None, None], np.square(gap).sum(axis=-1), np.inf)
    nearest = squared.argmin(axis=3)
    followed = (nearest[..., None] == np.arange(tracks.true.shape[2])) & tracks.slots[:, None, :, None]
    shared = (followed.sum(axis=2) > 1).any(axis=2)
    number = tracks.objects.sum(axis=1)
    looked = ~are_close(true, frame_size=frame_size, objects=tracks.objects, radius=radius)
    looked &= ((number > 1) & (number == tracks.slots.sum(axis=1)))[:, None]
    return Collapses((shared & looked).sum(axis=1), looked.sum(axis=1))


def kmeans_positions(
    frames: Float[np.ndarray, "n t h w"],
    counts: Integer[np.ndarray, " n"],
    *,
    threshold: float = 0.5,
    radius: float = RADIUS,
) -> Centres:
    """Positions of balls in frames of a model that has none: the means of ``counts`` clusters of white pixels.

    Pixels of at least ``threshold`` are white and weigh their value. A frame with fewer of them than balls takes its
    brightest pixels above 0 instead, as many as its balls would cover and all that equal the last of them, and is not
    ``painted``; if that is too little, or the frame has one value only, all its balls are in the middle. So each frame
    has positions, and a model that paints nothing is not spared the error.

    k-means from the outermost pixel on each side of the frame, with further centres where the farthest pixel is; the
    result with the least squared distance counts. Nothing is drawn at random. Discs that overlap cannot be told apart:
    leave out such frames (``are_close`` of the true positions), for each model that is compared.

    Raises:
        ValueError: frames that are not finite or outside of [0, 1], or a count below 1 or without pixels.
    """
    n, t, height, width = frames.shape
    inside = np.isfinite(frames).all() and 0 <= frames.min(initial=0) <= frames.max(initial=0) <= 1
    if not inside or min(height, width) < 2:
        raise ValueError(
            f"frames must be finite, in [0, 1] and larger than one pixel, got shape {frames.shape}; give "
            "probabilities, not logits, and divide bytes by 255"
        )
    if counts.shape != (n,) or (n and not 1 <= counts.min() <= counts.max() <= height * width):
        raise ValueError(f"counts must be a number of balls from 1 up for each of {n} sequences, got {counts.tolist()}")
    flat, numbers = frames.reshape(n * t, height * width), np.repeat(counts, t)
    last = np.array([height, width]) - 1
    index = np.tile(last / 2, (n * t, int(counts.max(initial=1)), 1))
    painted = np.zeros(n * t, dtype=bool)
    for number in np.unique(counts).tolist():
        rows = np.flatnonzero(numbers == number)
        for first in range(0, len(rows), FRAMES_AT_ONCE):
            some = rows[first : first + FRAMES_AT_ONCE]
            pixels = flat[some].astype(np.float64)
            weights = pixels * (pixels >= threshold)
            enough = (weights > 0).sum(axis=1) >= number
            if not enough.all():
                weights[~enough] = _brightest(pixels[~enough], round(number * math.pi * radius**2))
            shown = ((weights > 0).sum(axis=1) >= number) & (np.ptp(pixels, axis=1) > 0)
            painted[some] = enough & shown
            if shown.any():
                index[some[shown], :number] = _kmeans(weights[shown], number, width)
    real = np.arange(index.shape[1]) < numbers[:, None]
    positions = np.where(real[..., None], 2 * index / last - 1, 0)
    return Centres(positions.reshape(n, t, -1, 2), painted.reshape(n, t))


def gravity(
    offset: Float[np.ndarray, " 4"],
    step: float,
    matrix: Float[np.ndarray, "2 2"],
    true: Float[np.ndarray, " 2"],
) -> Gravity:
    """The acceleration that a state-space model learnt, mapped by the fitted map, against the true one.

    With A = [[I, d I], [0, I]] the positions B h_t of ``h_t = A h_{t-1} + u`` have the second difference d u_v per
    frame squared, whatever u_p is. Latent scale, rotation, d and the unit of velocity are not identified; that product
    is, up to the map.

    Args:
        offset: u, of (p_1, p_2, v_1, v_2) in latent units.
        step: d.
        matrix: of the ``Map`` from latent positions to the units of ``true``. A map to [-1, 1] becomes one to pixels
            when its rows are multiplied by (height - 1) / 2 and (width - 1) / 2, and one to the world of Cannonballs
            when they are divided by ``Options.scale``; angles differ between the two, since the axes do.
        true: (y, x) per frame squared.

    Raises:
        ValueError: there is no true acceleration, or a number is not finite.
    """
    offset, matrix, true = (np.asarray(a, dtype=np.float64) for a in (offset, matrix, true))
    if not all(np.isfinite(a).all() for a in (offset, matrix, true)) or not math.isfinite(step):
        raise ValueError(f"offset, step, matrix and true must be finite, got {offset}, {step}, {matrix}, {true}")
    size = math.hypot(*true)
    if size == 0:
        raise ValueError("the true acceleration is zero, so it has no direction to compare with; give that of the data")
    learnt = matrix @ (step * offset[2:])
    length = math.hypot(*learnt)
    along, across = float(learnt @ true) / size, float(true[0] * learnt[1] - true[1] * learnt[0]) / size
    half = step * offset[2:] / 2
    squared = float(half @ half)
    return Gravity(
        acceleration=learnt,
        along=along / size,
        ratio=length / size,
        angle=math.degrees(math.atan2(abs(across), along)) if length else float("nan"),
        half_step=float(offset[:2] @ half) / squared if squared else float("nan"),
    )


def predictor_spectrum(
    step: float, state_noise: Float[np.ndarray, "4 4"], position_noise: Float[np.ndarray, "2 2"]
) -> Float[np.ndarray, " 4"]:
    """Moduli of the eigenvalues of the steady one-step predictor, largest first.

    In the steady state the Kalman filter predicts h_{t+1} = A (I - G B) h_t + A G a_t + u. The eigenvalues of
    A (I - G B) say how fast it forgets: after 1 / -log(modulus) frames an error has shrunk to 1/e. They depend neither
    on latent scale nor on rotation. Near 1: nearly noise-free motion, fitted to the whole past; near 0: only the last
    frames count.

    Args:
        step: d of A = [[I, d I], [0, I]].
        state_noise: Sigma_H.
        position_noise: Sigma_A.

    Raises:
        ValueError: the filter has no steady state, as without state noise.
    """
    from scipy.linalg import solve_discrete_are

    eye = np.eye(2)
    transition = np.block([[eye, step * eye], [0 * eye, eye]])
    observe = np.concatenate([eye, 0 * eye], axis=1)
    try:
        covariance = solve_discrete_are(transition.T, observe.T, state_noise, position_noise)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise ValueError(
            f"the filter has no steady state for step {step:g} and these noise covariances ({error}); both covariances "
            "must be positive definite and the step not zero"
        ) from error
    innovation = observe @ covariance @ observe.T + position_noise
    gain = np.linalg.solve(innovation, observe @ covariance).T
    moduli = np.abs(np.linalg.eigvals(transition @ (np.eye(4) - gain @ observe)))
    return np.sort(moduli)[::-1]


class _Tracks(NamedTuple):
    """Checked arrays in float64, with at least as many slots as objects and zeros where there is none."""

    positions: Float[np.ndarray, "n t k 2"]
    true: Float[np.ndarray, "n t m 2"]
    slots: Bool[np.ndarray, "n k"]
    objects: Bool[np.ndarray, "n m"]


class _Sums(NamedTuple):
    """Sums over frames of products of slots p and objects x: all that squared errors of any map depend on."""

    frames: int
    p: Float[np.ndarray, "n k 2"]
    pp: Float[np.ndarray, "n k 2 2"]
    x: Float[np.ndarray, "n m 2"]
    xx: Float[np.ndarray, "n m"]
    """Squared length."""
    xp: Float[np.ndarray, "n k m 2 2"]


def _check(positions: np.ndarray, true: np.ndarray, slots: np.ndarray | None, objects: np.ndarray | None) -> _Tracks:
    if positions.ndim != 4 or true.ndim != 4 or positions.shape[3] != 2 or true.shape[3] != 2:
        raise ValueError(f"tracks must be (n, t, k, 2), got {positions.shape} and, for the truth, {true.shape}")
    if positions.shape[:2] != true.shape[:2] or true.shape[1] == 0:
        raise ValueError(
            "tracks and truth need the same sequences and at least one common frame, got "
            f"{positions.shape[:2]} and {true.shape[:2]}"
        )
    slots = np.ones((len(true), positions.shape[2]), dtype=bool) if slots is None else slots
    objects = np.ones((len(true), true.shape[2]), dtype=bool) if objects is None else objects
    if slots.shape != (len(true), positions.shape[2]) or objects.shape != (len(true), true.shape[2]):
        raise ValueError(
            f"slots must be {(len(true), positions.shape[2])} and objects {(len(true), true.shape[2])}, got "
            f"{slots.shape} and {objects.shape}"
        )
    few = np.flatnonzero(slots.sum(axis=1) < objects.sum(axis=1))
    if len(few):
        raise ValueError(
            f"sequence {few[0]} has {objects[few[0]].sum()} objects and {slots[few[0]].sum()} slots; each object needs "
            "a slot of its own"
        )
    positions = np.where(slots[:, None, :, None], positions, 0).astype(np.float64)
    true = np.where(objects[:, None, :, None], true, 0).astype(np.float64)
    if not np.isfinite(positions).all() or not np.isfinite(true).all():
        raise ValueError("slots and objects need finite positions; leave out sequences in which the model has diverged")
    spare = max(0, true.shape[2] - positions.shape[2])
    positions = np.pad(positions, ((0, 0), (0, 0), (0, spare), (0, 0)))
    return _Tracks(positions, true, np.pad(slots, ((0, 0), (0, spare))), objects)


def _known(per: Scope) -> Scope:
    if per not in ("sequence", "frame"):
        raise ValueError(f"per must be 'sequence' or 'frame', got {per!r}")
    return per


def _rows(tracks: _Tracks, per: Scope) -> tuple[np.ndarray, np.ndarray]:
    """``slots`` and ``objects`` for each row of ``_squared``."""
    if per == "sequence":
        return tracks.slots, tracks.objects
    n, t = tracks.true.shape[:2]
    slots, objects = tracks.slots[:, None], tracks.objects[:, None]
    return np.broadcast_to(slots, (n, t, slots.shape[2])), np.broadcast_to(objects, (n, t, objects.shape[2]))


def _squared(tracks: _Tracks, per: Scope) -> np.ndarray:
    """Squared distances of slots and objects, (n, k, m) summed over frames, or (n, t, k, m)."""
    squared = np.square(tracks.positions[:, :, :, None] - tracks.true[:, :, None]).sum(axis=-1)
    return squared.sum(axis=1) if per == "sequence" else squared


def _assign(cost: np.ndarray, slots: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Slot of each object, (..., m), at the least sum of costs (..., k, m); -1 where there is no object."""
    *_, k, m = cost.shape
    cost = np.where(objects[..., None, :], np.where(slots[..., None], cost, np.inf), 0)
    if math.perm(k, m) <= BRUTE_FORCE:
        orders = np.array(list(itertools.permutations(range(k), m))).reshape(-1, m)
        partner = orders[cost[..., orders, np.arange(m)].sum(axis=-1).argmin(axis=-1)]
    else:
        from scipy.optimize import linear_sum_assignment  # here: the bare training loop runs without scipy

        flat = cost.reshape(-1, k, m)
        partner = np.empty((len(flat), m), dtype=np.int64)
        for row, table in enumerate(flat):
            chosen, columns = linear_sum_assignment(table)
            partner[row, columns] = chosen
        partner = partner.reshape(*cost.shape[:-2], m)
    return np.where(objects, partner, -1)


def _gaps(tracks: _Tracks, per: Scope) -> np.ndarray:
    """Each object's slot minus the object, (n, t, m, 2); NaN where there is no object."""
    partner = _assign(_squared(tracks, per), *_rows(tracks, per))
    index = np.maximum(partner, 0) if per == "frame" else np.maximum(partner, 0)[:, None]
    chosen = np.take_along_axis(tracks.positions, index[..., None], axis=2)
    return np.where(tracks.objects[:, None, :, None], chosen - tracks.true, np.nan)


def _share(error: float, spread: float) -> float:
    return 1 - error / spread if spread > 0 else float("nan")


def _pixels(frame_size: tuple[int, int]) -> np.ndarray:
    """Pixels per unit of (y, x)."""
    if min(frame_size) < 2:
        raise ValueError(f"frame_size must be (height, width) of at least 2 pixels, got {frame_size}")
    return (np.array(frame_size) - 1) / 2


def _fit(
    latents: np.ndarray,
    true: np.ndarray,
    slots: np.ndarray | None,
    objects: np.ndarray | None,
    iterations: int,
    solve: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    whiten: bool,
) -> Map:
    tracks = _check(latents, true, slots, objects)
    if not tracks.objects.any() or iterations < 1:
        raise ValueError(
            f"a map is fitted to at least one object in at least one iteration, got {int(tracks.objects.sum())} "
            f"objects and {iterations} iterations"
        )
    positions, latent_mean, latent_covariance = _centred(tracks.positions, tracks.slots)
    true, true_mean, true_covariance = _centred(tracks.true, tracks.objects)
    sums = _sums(positions, true)
    matrix = _starts(latent_covariance, true_covariance, whiten)
    offset, error = np.zeros((len(matrix), 2)), np.zeros(len(matrix))
    every = np.broadcast_to(tracks.objects, (len(matrix), *tracks.objects.shape))
    for _ in range(iterations):
        partner = _assign(_costs(sums, matrix, offset), tracks.slots, every)
        matrix, offset, error = _solve(sums, partner, tracks.objects, solve)
    best = int(error.argmin())
    return Map(matrix[best], true_mean + offset[best] - matrix[best] @ latent_mean)


def _centred(points: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, t, k, 2) around the mean of those that are there, that mean, and the covariance.

    Around means second moments lose no digits. What rounding leaves of points that are all equal is set to 0.
    """
    number = there.sum() * points.shape[1]
    mean = points.sum(axis=(0, 1, 2)) / number  # the others are 0
    centred = (points - mean) * there[:, None, :, None]
    centred[np.abs(centred) <= 1e-12 * np.abs(mean)] = 0
    return centred, mean, np.einsum("ntki,ntkj->ij", centred, centred) / number


def _starts(latent: np.ndarray, true: np.ndarray, whiten: bool) -> np.ndarray:
    """Matrices (s, 2, 2): rotations and reflections between the two clouds, whitened or of one scale each."""
    angle = 2 * np.pi / ROTATIONS * np.arange(ROTATIONS)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    rotation = np.concatenate([rotation, rotation * np.array([1, -1])])
    if not whiten:
        return rotation * math.sqrt(np.trace(true) / np.trace(latent) if np.trace(latent) > 0 else 0)
    values, vectors = np.linalg.eigh(latent)
    kept = values > LEAST_VARIANCE * values.max()
    inverse = np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0)[:, None] * vectors.T
    values, vectors = np.linalg.eigh(true)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ rotation @ inverse


def _sums(positions: np.ndarray, true: np.ndarray) -> _Sums:
    return _Sums(
        frames=true.shape[1],
        p=positions.sum(axis=1),
        pp=np.einsum("ntki,ntkj->nkij", positions, positions),
        x=true.sum(axis=1),
        xx=np.square(true).sum(axis=(1, 3)),
        xp=np.einsum("ntmi,ntkj->nkmij", true, positions),
    )


def _costs(sums: _Sums, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Squared errors (s, n, k, m) of each pair over all frames, |M p + o - x|^2 multiplied out."""
    of_slot = np.einsum("sji,sjh,nkih->snk", matrix, matrix, sums.pp)
    of_slot += 2 * np.einsum("si,sij,nkj->snk", offset, matrix, sums.p)
    of_object = sums.xx - 2 * np.einsum("si,nmi->snm", offset, sums.x)
    of_object += sums.frames * np.square(offset).sum(axis=1)[:, None, None]
    return of_slot[..., None] + of_object[:, :, None] - 2 * np.einsum("sij,nkmij->snkm", matrix, sums.xp)


def _solve(
    sums: _Sums, partner: np.ndarray, objects: np.ndarray, solve: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares matrices (s, 2, 2), offsets (s, 2), squared errors (s,) of the pairs of ``partner`` (s, n, m)."""
    row, column = np.nonzero(objects)
    slot = partner[:, row, column]
    points = len(row) * sums.frames
    mean_p, mean_x = sums.p[row, slot].sum(axis=1) / points, sums.x[row, column].sum(axis=0) / points
    pp = sums.pp[row, slot].sum(axis=1) - points * mean_p[:, :, None] * mean_p[:, None]
    xp = sums.xp[row, slot, column].sum(axis=1) - points * mean_x[:, None] * mean_p[:, None]
    xx = sums.xx[row, column].sum() - points * np.square(mean_x).sum()
    matrix = solve(xp, pp)
    error = xx - 2 * (matrix * xp).sum(axis=(1, 2)) + np.einsum("sji,sjh,sih->s", matrix, matrix, pp)
    return matrix, mean_x - np.einsum("sij,sj->si", matrix, mean_p), error


def _affine(xp: np.ndarray, pp: np.ndarray) -> np.ndarray:
    return xp @ np.linalg.pinv(pp, rcond=LEAST_VARIANCE, hermitian=True)


def _similarity(xp: np.ndarray, pp: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(xp)
    variance = np.trace(pp, axis1=1, axis2=2)
    scale = np.where(variance > 0, values.sum(axis=1) / np.where(variance > 0, variance, 1), 0)
    return scale[:, None, None] * (left @ right)


def _brightest(pixels: np.ndarray, number: int) -> np.ndarray:
    """Pixels (f, p) with all but the ``number`` brightest, and those that equal the last of them, set to 0."""
    number = min(number, pixels.shape[1])
    return np.where(pixels >= np.partition(pixels, -number, axis=1)[:, -number, None], pixels, 0)


def _kmeans(weights: np.ndarray, number: int, width: int) -> np.ndarray:
    """Pixel indices (f, number, 2) of the centres of weighted pixels (f, h * w), from the top down."""
    frame, pixel = np.nonzero(weights)
    counts = (weights > 0).sum(axis=1)
    # Each frame's pixels in a row of its own, the rest of weight 0 at the first of them.
    slot = np.arange(len(frame)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = pixel[np.cumsum(counts) - counts]
    chosen = np.repeat(first[:, None], counts.max(), axis=1)
    chosen[frame, slot] = pixel
    mass = np.zeros(chosen.shape)
    mass[frame, slot] = weights[frame, pixel]
    points = np.stack([chosen // width, chosen % width], axis=-1).astype(np.float64)
    y, x = points[..., 0], points[..., 1]
    ends = (y.argmin(axis=1), y.argmax(axis=1), x.argmin(axis=1), x.argmax(axis=1))
    results = [_lloyd(points, mass, _spread(points, end, number)) for end in ends]
    best = np.stack([inertia for _, inertia in results]).argmin(axis=0)
    centres = np.stack([centre for centre, _ in results])[best, np.arange(len(weights))]
    order = np.lexsort((centres[..., 1], centres[..., 0]))
    return np.take_along_axis(centres, order[..., None], axis=1)


def _spread(points: np.ndarray, first: np.ndarray, number: int) -> np.ndarray:
    """Centres (f, number, 2): a first point, then each time the point farthest from those chosen."""
    rows = np.arange(len(points))
    centres = [points[rows, first]]
    squared = np.full(points.shape[:2], np.inf)
    for _ in range(1, number):
        squared = np.minimum(squared, np.square(points - centres[-1][:, None]).sum(axis=-1))
        centres.append(points[rows, squared.argmax(axis=1)])
    return np.stack(centres, axis=1)


def _lloyd(points: np.ndarray, mass: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres (f, number, 2) after k-means, and the squared distances (f,) to them; an empty cluster stays in place."""
    owner = np.full(points.shape[:2], -1)
    for _ in range(KMEANS_ITERATIONS):
        squared = np.square(points[:, :, None] - centres[:, None]).sum(axis=-1)
        now = squared.argmin(axis=2)
        if (now == owner).all():
            break
        owner = now
        share = mass[..., None] * (owner[..., None] == np.arange(centres.shape[1]))
        total = share.sum(axis=1)
        moved = np.einsum("fpk,fpi->fki", share, points) / np.where(total > 0, total, 1)[..., None]
        centres = np.where(total[..., None] > 0, moved, centres)
    squared = np.square(points[:, :, None] - centres[:, None]).sum(axis=-1)
    return centres, (squared.min(axis=2) * mass).sum(axis=1)
