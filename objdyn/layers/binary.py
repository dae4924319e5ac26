"""What the models of binary video share: frames in and out, their likelihood, their initial weights."""

import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn


def binary_frames(
    video: Float[Tensor, "b t c h w"], size: int, threshold: float | None = None
) -> Float[Tensor, "b t p"]:
    """White (1) or black (0) for every pixel of a video, row by row; p is ``size * size``.

    The value of a pixel is the mean over its channels, which are equal in a binary frame. With a ``threshold`` any
    video is made binary: white is what is brighter.

    Raises:
        ValueError: the frames are not RGB of side ``size``; or a pixel is neither black nor white and there is no
            ``threshold``.
    """
    if video.ndim != 5 or 0 in video.shape[:2] or video.shape[2] != 3 or video.shape[3:] != (size, size):
        raise ValueError(
            f"the model was built for video (b, t, 3, {size}, {size}), got {tuple(video.shape)}; make the dataset with "
            f"make_shards.py --size {size}, or set model.image_size"
        )
    grey = reduce(video, "b t c h w -> b t (h w)", "mean")
    if threshold is not None:
        return (grey > threshold).to(video.dtype)
    odd = (grey != 0) & (grey != 1)
    if odd.any():
        raise ValueError(
            f"frames must be binary, black 0 or white 1 in all three channels, but {float(odd.float().mean()):.2%} of "
            f"the pixels are neither (the first is {float(grey[odd][0]):.3f}); set model.threshold=0.5 to make them so"
        )
    return grey


def bernoulli_nll(logits: Float[Tensor, "*batch p"], frames: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch"]:
    """-log p(frame) under independent pixels, in nats, summed over pixels."""
    return F.binary_cross_entropy_with_logits(logits, frames, reduction="none").sum(-1)


def to_video(frames: Float[Tensor, "*batch p"], size: int) -> Float[Tensor, "*batch 3 h w"]:
    """Pixels or their probabilities as frames of three equal channels (a view)."""
    return rearrange(frames, "... (h w) -> ... 1 h w", h=size).expand(*frames.shape[:-1], 3, size, size)


def init_matrix(weight: Tensor, count: int | None = None) -> None:
    r"""Draw a weight matrix from :math:`N(0, 1 / \sqrt d)` with d its number of entries: a deviation of d^(-1/4).

    ``count`` is that number where ``weight`` holds several of the paper's matrices, or a part of one.

    Source: Chiappa & Paquet, section 3.2. The paper may mean the second number as a deviation; a network that starts
    with :math:`1 / \sqrt d` would be dead (5e-4 for the largest matrix), so it is read as a variance.
    """
    nn.init.normal_(weight, 0.0, (count or weight.numel()) ** -0.25)
