"""How close predicted object centres are to the true ones, and the trivial predictions to beat.

Positions come in the project's convention, (y, x) in [-1, 1] with ``align_corners=True``: -1 is the centre of the
first pixel, 1 that of the last. A particle is visible when its presence (DDLP's transparency) is above one half.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.optimize import linear_sum_assignment

VISIBLE = 0.5
"""A particle with more presence than this counts as there."""
MAX_SQUARED_DISTANCE = 1.0
"""Farther pairs are never matched; in units of the frame's side."""

Convention = Literal["published", "corrected"]


class MED(NamedTuple):
    """Mean Euclidean distance of followed objects, in units of the frame's side."""

    per_step: Float[np.ndarray, " t"]
    """Mean of ``per_sequence`` over the sequences that have a pair left; NaN where none has."""
    per_sequence: Float[np.ndarray, "n t"]
    """Mean distance over the pairs left; NaN where there is none."""
    pairs: Int[np.ndarray, " t"]
    """Pairs measured, over all sequences."""
    lost: Int[np.ndarray, " t"]
    """True objects without a visible partner, over all sequences: never matched, or the partner has vanished."""


def med(
    positions: Float[np.ndarray, "n t k 2"],
    presence: Shaped[np.ndarray, "n t k"],
    true_positions: Float[np.ndarray, "n t m 2"],
    true_present: Bool[np.ndarray, "n t m"],
    *,
    frame_size: tuple[int, int] = (64, 64),
    convention: Convention = "published",
) -> MED:
    """Mean Euclidean distance between predicted and true centres at each predicted step.

    Pass predicted frames only. At the first one visible particles and present objects are matched by linear assignment
    on the squared distance; the pairs stay for the whole rollout. A pair counts while both its members are there. An
    object that is absent at the first frame is not followed.

    ``"published"`` compares the particle's (z + 1) / 2 with the object's continuous pixel centre over the frame's side,
    as G-SWM and DDLP do. The two grids differ by up to half a pixel, so a perfect particle does not score 0: about
    0.0048 per step on Balls-Interaction, 0.048 in MED10. ``"corrected"`` takes (z + 1) / 2 of both; a perfect particle
    then scores 0, and one pixel is 1 / (side - 1).

    Source: the evaluation of Lin et al., G-SWM (ICML 2020), used for MED10 by Daniel & Tamar, DDLP (TMLR 2024).
    Differs: there a vanished particle makes the whole mean NaN; here it leaves the mean and is counted in ``lost``, so
    read the two together.

    Args:
        positions: particle positions.
        presence: visible where above one half; float or bool.
        true_positions: object positions.
        true_present: which objects are in the frame.
        frame_size: height and width in pixels; ``"corrected"`` does not depend on it.
        convention: see above.

    Raises:
        ValueError: shapes that do not belong together, positions that are not finite, or an unknown convention.
    """
    _check(positions, presence, true_positions, true_present)
    if convention not in ("published", "corrected"):
        raise ValueError(f"convention must be 'published' or 'corrected', got {convention!r}")
    predicted, true = (positions + 1) / 2, (true_positions + 1) / 2
    if convention == "published":
        size = np.asarray(frame_size)
        true = (true * (size - 1) + 0.5) / size
    visible = presence > VISIBLE
    partner = _match(predicted[:, 0], visible[:, 0], true[:, 0], true_present[:, 0])
    index = np.maximum(partner, 0)[:, None, :]
    gap = np.take_along_axis(predicted, index[..., None], axis=2) - true
    alive = (partner >= 0)[:, None, :] & np.take_along_axis(visible, index, axis=2) & true_present
    per_sequence = _mean(np.hypot(gap[..., 0], gap[..., 1]), alive, axis=2)
    followed = true_present & true_present[:, :1]
    return MED(
        per_step=_mean(per_sequence, ~np.isnan(per_sequence), axis=0),
        per_sequence=per_sequence,
        pairs=alive.sum(axis=(0, 2)),
        lost=(followed & ~alive).sum(axis=(0, 2)),
    )


def med10(result: MED) -> float:
    """MED10: the sum (not the mean) of the distances at the first ten predicted steps.

    NaN when no pair is left at one of them.

    Raises:
        ValueError: fewer than ten steps were predicted.
    """
    if len(result.per_step) < 10:
        raise ValueError(f"MED10 needs 10 predicted frames, got {len(result.per_step)}: predict a longer horizon")
    return float(result.per_step[:10].sum())


def coverage(
    positions: Float[np.ndarray, "n t k 2"],
    presence: Shaped[np.ndarray, "n t k"],
    true_positions: Float[np.ndarray, "n t m 2"],
    true_present: Bool[np.ndarray, "n t m"],
    radius: float,
    *,
    frame_size: tuple[int, int] = (64, 64),
) -> float:
    """Share of (object, frame) pairs with a visible particle within ``radius`` pixels; NaN without objects.

    One particle may cover several objects, and nothing asks for identity over time.

    Raises:
        ValueError: shapes that do not belong together, or positions that are not finite.
    """
    _check(positions, presence, true_positions, true_present)
    pixels = (np.asarray(frame_size) - 1) / 2
    gap = (positions[:, :, None] - true_positions[:, :, :, None]) * pixels
    near = (np.hypot(gap[..., 0], gap[..., 1]) <= radius) & (presence > VISIBLE)[:, :, None]
    objects = int(true_present.sum())
    return float((near.any(axis=-1) & true_present).sum() / objects) if objects else float("nan")


def copy_last(context: Float[np.ndarray, "n t k 2"], horizon: int) -> Float[np.ndarray, "n horizon k 2"]:
    """Predict that every object stays where the last context frame has it."""
    return np.repeat(context[:, -1:], horizon, axis=1)


def constant_velocity(context: Float[np.ndarray, "n t k 2"], horizon: int) -> Float[np.ndarray, "n horizon k 2"]:
    """Predict that every object goes on by its step between the last two context frames, through walls.

    Raises:
        ValueError: fewer than two context frames.
    """
    if context.shape[1] < 2:
        raise ValueError(f"a velocity needs 2 context frames, got {context.shape[1]}")
    steps = np.arange(1, horizon + 1, dtype=context.dtype)[:, None, None]
    return context[:, -1:] + steps * (context[:, -1:] - context[:, -2:-1])


def constant_velocity_with_walls(
    context: Float[np.ndarray, "n t k 2"],
    horizon: int,
    *,
    radius: float = 8.0,
    frame_size: tuple[int, int] = (64, 64),
) -> Float[np.ndarray, "n horizon k 2"]:
    """Predict constant velocity, reflected elastically where a disc of ``radius`` pixels meets the frame's border.

    The reflection is exact in time, not at the next frame; a bounce that waits for the frame's end is 9 % worse.

    Raises:
        ValueError: fewer than two context frames, or a disc too large for the frame.
    """
    if not 0 <= 2 * radius < min(frame_size):
        raise ValueError(f"a disc of radius {radius} does not fit into a frame of {frame_size}")
    size = np.asarray(frame_size, dtype=context.dtype)
    upper = 2 * (size - radius - 0.5) / (size - 1) - 1
    span = 2 * upper
    # Unfolded reflection: a triangle wave of the free motion, whose period is twice the room between the walls.
    phase = np.mod(constant_velocity(context, horizon) + upper, 2 * span)
    return np.minimum(phase, 2 * span - phase) - upper


def _match(predicted: np.ndarray, visible: np.ndarray, true: np.ndarray, present: np.ndarray) -> Int[np.ndarray, "n m"]:
    """Particle of each object, -1 for none."""
    partner = np.full(present.shape, -1)
    for n in range(len(partner)):
        objects, particles = np.flatnonzero(present[n]), np.flatnonzero(visible[n])
        gap = true[n][objects][:, None] - predicted[n][particles]
        squared = np.sum(gap**2, axis=-1)
        allowed = squared <= MAX_SQUARED_DISTANCE
        # A forbidden pair costs more than all allowed ones together, so as many objects as possible are matched.
        cost = np.where(allowed, squared, 1e3 * MAX_SQUARED_DISTANCE * (1 + len(objects)))
        rows, columns = linear_sum_assignment(cost)
        kept = allowed[rows, columns]
        partner[n, objects[rows[kept]]] = particles[columns[kept]]
    return partner


def _mean(values: np.ndarray, where: np.ndarray, axis: int) -> np.ndarray:
    count = where.sum(axis=axis)
    total = np.where(where, values, 0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _check(positions: np.ndarray, presence: np.ndarray, true_positions: np.ndarray, true_present: np.ndarray) -> None:
    if positions.shape[:3] != presence.shape or true_positions.shape[:3] != true_present.shape:
        raise ValueError(
            "positions (n, t, k, 2) need presence (n, t, k), got "
            f"{positions.shape} with {presence.shape} and, for the truth, {true_positions.shape} with "
            f"{true_present.shape}"
        )
    if positions.shape[:2] != true_positions.shape[:2] or positions.shape[1] == 0:
        raise ValueError(
            "prediction and truth need the same sequences and at least one common frame, got "
            f"{positions.shape[:2]} and {true_positions.shape[:2]}"
        )
    if not np.isfinite(positions[presence > VISIBLE]).all() or not np.isfinite(true_positions[true_present]).all():
        raise ValueError("visible particles and present objects need finite positions; mark the others as absent")
