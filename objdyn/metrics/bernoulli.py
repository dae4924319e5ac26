"""How well probabilities of white pixels fit binary frames: in nats, by the loss of the paper, and as pixels hit.

Predictions and targets are (b, t, h, w), one channel of frames in which each pixel is 0 or 1. Results are per frame,
(b, t), so that they can be averaged over horizons, numbers of objects or all, and bootstrapped over clips.

The paper is Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019).
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor


class NLL(NamedTuple):
    """Negative log-likelihood of each frame, in nats."""

    per_frame: Float[Tensor, "b t"]
    """Summed over pixels."""
    per_pixel: Float[Tensor, "b t"]
    """Mean over pixels."""


class DoubleSigmoidBounds(NamedTuple):
    """What ``bce_double_sigmoid`` is of three predictions for the same frames, mean over pixels."""

    all_black: float
    """Probability 0 everywhere: ln 2, whatever the frames are. No constant is lower while black prevails."""
    perfect: float
    """The frames themselves: ln 2 minus 0.3799 times the share of white pixels; nothing is lower."""
    constant: float
    """The share of white pixels everywhere, the constant that the likelihood likes best; above ``all_black``."""


class WhitePixels(NamedTuple):
    """Counts of pixels in each frame. Ratios are of all frames together; NaN where nothing is counted."""

    hits: Int[Tensor, "b t"]
    """White in both."""
    painted: Int[Tensor, "b t"]
    """White in the prediction."""
    white: Int[Tensor, "b t"]
    """White in the target."""

    @property
    def precision(self) -> float:
        """Share of the painted pixels that are white."""
        return _ratio(self.hits, self.painted)

    @property
    def recall(self) -> float:
        """Share of the white pixels that are painted."""
        return _ratio(self.hits, self.white)

    @property
    def f1(self) -> float:
        """Harmonic mean of both, ``2 hits / (painted + white)``."""
        return _ratio(2 * self.hits, self.painted + self.white)


def bernoulli_nll(
    prediction: Float[Tensor, "b t h w"], target: Float[Tensor, "b t h w"], *, logits: bool = False
) -> NLL:
    """Negative log-likelihood of binary frames under independent pixels, Eq. (2) of the paper.

    ``prediction`` holds probabilities, or logits if ``logits``. Logits lose nothing where a probability rounds to 0 or
    1; a white pixel of probability 0 costs 100 nats, the bound that torch sets. In float64, without gradients.

    Raises:
        ValueError: shapes that differ, a target that is not binary, probabilities outside of [0, 1], or NaN.
    """
    predicted, true = _check(prediction, target, logits)
    score = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
    pixels = score(predicted, true, reduction="none")
    return NLL(reduce(pixels, "b t h w -> b t", "sum"), reduce(pixels, "b t h w -> b t", "mean"))


def constant_nll(target: Float[Tensor, "b t h w"]) -> float:
    """Nats per pixel of the best constant prediction, the share f of white pixels: ``entropy(f)``.

    A model above it has learnt less than how many pixels are white. On Cannonballs of 48x48 pixels f is 0.0054, 0.0108
    and 0.016 for 1, 2 and 3 balls.

    Raises:
        ValueError: a target that is not binary, or has no pixel.
    """
    return entropy(_white_share(target))


def entropy(share: float) -> float:
    """Nats per pixel of the best constant prediction of frames with this share of white pixels, in [0, 1]."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


def bce_double_sigmoid(
    probabilities: Float[Tensor, "b t h w"], target: Float[Tensor, "b t h w"]
) -> Float[Tensor, "b t"]:
    """Mean cross-entropy per pixel where probabilities p are taken for logits: ``softplus(p) - p v``.

    Only to compare with section 3.4 of the paper. Its losses of 0.691 (SSM) and 0.693 (ED-LSTM) cannot be proper ones,
    since the best constant has 0.059 nats per pixel; they fit this formula, a second sigmoid by mistake. That reading
    is inferred from the numbers and unproven: even balls drawn where they are without noise score 0.6922 on
    Cannonballs. Print it beside ``double_sigmoid_bounds`` and do not aim at it.

    Raises:
        ValueError: as for ``bernoulli_nll``.
    """
    predicted, true = _check(probabilities, target, logits=False)
    return reduce(F.binary_cross_entropy_with_logits(predicted, true, reduction="none"), "b t h w -> b t", "mean")


def double_sigmoid_bounds(target: Float[Tensor, "b t h w"]) -> DoubleSigmoidBounds:
    """What ``bce_double_sigmoid`` gives to trivial and to perfect predictions of these frames, mean over all of them.

    Raises:
        ValueError: a target that is not binary, or has no pixel.
    """
    return bounds_of_share(_white_share(target))


def bounds_of_share(share: float) -> DoubleSigmoidBounds:
    """The same bounds for frames with this share of white pixels, in [0, 1]."""
    black, white = math.log(2), math.log1p(math.e) - 1
    return DoubleSigmoidBounds(
        all_black=black,
        perfect=(1 - share) * black + share * white,
        constant=math.log1p(math.exp(share)) - share**2,
    )


def white_pixels(
    probabilities: Float[Tensor, "b t h w"], target: Float[Tensor, "b t h w"], threshold: float = 0.5
) -> WhitePixels:
    """Compare pixels that are painted, with a probability above ``threshold``, with those that are white.

    Raises:
        ValueError: as for ``bernoulli_nll``.
    """
    predicted, true = _check(probabilities, target, logits=False)
    painted, white = predicted > threshold, true > 0
    return WhitePixels(*(reduce(mask.long(), "b t h w -> b t", "sum") for mask in (painted & white, painted, white)))


def _check(prediction: Tensor, target: Tensor, logits: bool) -> tuple[Tensor, Tensor]:
    """Both in float64, without gradients."""
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(
            f"prediction and target must be (b, t, h, w) of one shape, got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}; of frames with equal channels take one"
        )
    predicted, true = prediction.detach().double(), target.detach().double()
    if not ((true == 0) | (true == 1)).all():
        raise ValueError("the target must be binary, each pixel 0 or 1; threshold it first, and divide bytes by 255")
    if predicted.isnan().any():
        raise ValueError("the prediction holds NaN; the model has diverged")
    if not logits and not ((predicted >= 0) & (predicted <= 1)).all():
        raise ValueError(
            f"probabilities must be in [0, 1], got {predicted.min():g} to {predicted.max():g}; say so if they "
            "are logits"
        )
    return predicted, true


def _white_share(target: Tensor) -> float:
    if target.numel() == 0:
        raise ValueError(f"there is no pixel in a target of shape {tuple(target.shape)}; give at least one frame")
    _, true = _check(target, target, logits=False)
    return float(true.mean())


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else float("nan")
