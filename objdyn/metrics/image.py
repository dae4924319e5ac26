"""How close frames are to the true ones: squared error, PSNR and SSIM, one number per frame.

Frames are clamped to [0, 1] first. The usual summary is the plain mean of these numbers over every frame of every video
(Daniel & Tamar, "DDLP", TMLR 2024, evaluation protocol): PSNR is averaged in decibels over frames, not computed from an
averaged error.
"""

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CAP = 100.0
"""Decibels of a perfect frame. Two 8-bit frames of 64x64 RGB that differ by one grey level in one value have 89 dB."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_FRAMES = 32


def frame_mse(video: Float[Tensor, "b t c h w"], target: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t"]:
    """Mean squared error of each frame over its pixels and channels, on [0, 1]."""
    predicted, true = _flatten(video, target)
    errors = mean_squared_error(
        rearrange(predicted, "n c h w -> (c h w) n"),
        rearrange(true, "n c h w -> (c h w) n"),
        num_outputs=len(predicted),
    )
    return errors.reshape(video.shape[:2])


def frame_psnr(video: Float[Tensor, "b t c h w"], target: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t"]:
    """Peak signal-to-noise ratio of each frame in dB: ``-10 log10(MSE)`` for a data range of 1.

    Capped at ``PSNR_CAP``, so that a perfect frame is 100 dB and a mean over frames stays finite.
    """
    predicted, true = _flatten(video, target)
    decibels = peak_signal_noise_ratio(predicted, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return decibels.clamp(max=PSNR_CAP).reshape(video.shape[:2])


def frame_ssim(video: Float[Tensor, "b t c h w"], target: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t"]:
    """Structural similarity of each frame, 1 for equal frames: Gaussian window of 11 pixels, sigma 1.5, data range 1.

    Per channel, with population covariances, averaged over the windows that lie inside the frame. DDLP's evaluation
    (PIQA) and SlotFormer's (scikit-image) average over the same windows; torchmetrics' own mean also counts the
    windows that hang over the border, filled by reflection, and differs in the third decimal.

    Raises:
        ValueError: the frames are smaller than the window.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).
    """
    height, width = video.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {height}x{width}; use larger frames"
        )
    values = [
        _window_mean(predicted, true)
        for predicted, true in zip(*(frames.split(SSIM_FRAMES) for frames in _flatten(video, target)), strict=True)
    ]
    return torch.cat(values).reshape(video.shape[:2])


def _window_mean(predicted: Tensor, true: Tensor) -> Tensor:
    # Frames folded into the channel axis: the same depthwise convolution, three to ten times faster on a CPU.
    result = structural_similarity_index_measure(
        rearrange(predicted, "n c h w -> 1 (n c) h w"),
        rearrange(true, "n c h w -> 1 (n c) h w"),
        sigma=SSIM_SIGMA,
        kernel_size=SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    border = SSIM_WINDOW // 2
    height, width = true.shape[-2:]
    windows = result[1][..., border : height - border, border : width - border]
    values = reduce(windows, "1 (n c) h w -> n", "mean", n=len(true))
    # Cancellation in flat regions leaves 0.9999 for equal frames.
    return torch.where((predicted == true).flatten(1).all(dim=1), 1.0, values)


def _flatten(video: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if video.shape != target.shape:
        raise ValueError(f"a video of shape {tuple(video.shape)} has a target {tuple(target.shape)}; they must agree")
    pair = torch.stack([video, target]).float().clamp(0.0, 1.0)
    predicted, true = rearrange(pair, "two b t c h w -> two (b t) c h w")
    return predicted, true
