"""Reconstruction and set losses; each a pure function."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

VGG_TAPS = (3, 8, 13, 22, 30)
"""Layers of VGG16 that ``vgg_distance`` compares: relu1_2, relu2_2, relu3_2, relu4_3, pool5. The released code keeps
the convolutions 2, 7, 12, 21 and pool5, but torchvision's ReLUs overwrite in place what the first four gave."""
VGG_WEIGHT = 0.12151
"""Weight of every tap beside the squared error of the pixels."""
VGG_LOSS_SCALE = 1e-3
"""Factor on the whole loss of a model, KL terms included, whose reconstruction is a VGG distance."""
VGG_SMALLEST = 32
"""Side in pixels that smaller images are enlarged to: pool5 has one value of it."""
VGG_PIXELS = 8 * 128 * 128
"""Pixels that go through the network together; bounds the memory. 8 frames of 128 pixels take about half a GB."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Taps = Callable[[Tensor, Sequence[int]], Sequence[Tensor]]
"""Images and layer indices -> what these layers give: a ``layers.perceptual.Trunk``."""


def squared_error(video: Float[Tensor, "*n c h w"], recon: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n"]:
    """Squared error of each frame, summed over pixels and channels (no 1/2): DDLP's reconstruction term for "mse"."""
    return (video - recon).square().flatten(-3).sum(-1)


def vgg_distance(
    video: Float[Tensor, "*n 3 h w"], recon: Float[Tensor, "*n 3 h w"], trunk: Taps
) -> Float[Tensor, "*n"]:
    r"""Perceptual distance of each image in [0, 1]: DDLP's reconstruction term for "vgg".

    .. math::  \|x - \hat x\|^2 + 0.12151 \sum_{l} \|f_l(x) - f_l(\hat x)\|^2

    summed, not averaged, over pixels and features; :math:`f_l` are ``VGG_TAPS`` of images normalised by ImageNet's mean
    and standard deviation. Images with a side below ``VGG_SMALLEST`` are enlarged to it first (bilinearly), as the
    released code does with glimpses; their pixels are then compared enlarged, too.

    Gradients go to ``recon`` alone. They are taken, a few images at a time, together with the values, so that no
    activation outlives its images; hence there is no second derivative. Under autocast the convolutions run in its
    type, sums in float32.

    Args:
        video: the targets; a gradient to them is not computed.
        recon: what is compared with them.
        trunk: VGG16 with frozen weights, on the images' device.

    Source: DDLP, section 4.1 and appendix D, with the released code's layers and weight.
    """
    shape = video.shape[:-3]
    target, recon = (images.flatten(0, -4).float() for images in (video.detach(), recon))
    if min(target.shape[-2:]) < VGG_SMALLEST:
        size = [max(side, VGG_SMALLEST) for side in target.shape[-2:]]
        target, recon = (F.interpolate(images, size, mode="bilinear") for images in (target, recon))
    wants_grad = torch.is_grad_enabled() and recon.requires_grad
    features: Any = _FeatureDistance.apply(recon, target, trunk, wants_grad)
    return (squared_error(target, recon) + VGG_WEIGHT * features).view(shape)


class _FeatureDistance(torch.autograd.Function):
    """Squared distance of the features of each image; the gradient is computed with it and kept for ``backward``."""

    @staticmethod
    def forward(ctx: Any, recon: Tensor, target: Tensor, trunk: Taps, wants_grad: bool) -> Tensor:
        size = max(1, VGG_PIXELS // (recon.shape[-1] * recon.shape[-2]))
        values, slopes = [], []
        for part, true in zip(recon.split(size), target.split(size), strict=True):
            with torch.no_grad():
                wanted = trunk(_normalised(true), VGG_TAPS)
            with torch.set_grad_enabled(wants_grad):
                part = part.detach().requires_grad_(wants_grad)
                pairs = zip(trunk(_normalised(part), VGG_TAPS), wanted, strict=True)
                value = torch.stack([(f.float() - w.float()).square().flatten(1).sum(1) for f, w in pairs]).sum(0)
                total = value.sum()
            values.append(value.detach())
            if wants_grad:
                slopes.append(torch.autograd.grad(total, part)[0])  # images do not touch each other
        if wants_grad:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * grads[0].view(-1, 1, 1, 1), None, None, None


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def chamfer_kl(
    posterior: Float[Tensor, "... k 2"], prior: Float[Tensor, "... n 2"], sigma: float = 1.0
) -> Float[Tensor, " ..."]:
    r"""Chamfer distance between two sets of Gaussians, with the KL as the distance between two points.

    .. math::  \sum_j \min_i KL_{ij} + \sum_i \min_j KL_{ij}, \qquad KL_{ij} = KL(N(x_i, 1) \,\|\, N(y_j, \sigma^2))

    Source: DDLP, appendix D (prior of the anchors); the posterior's variance is fixed at 1, so that with
    :math:`\sigma = 1` the KL is half the squared distance.
    """
    squared = (posterior.unsqueeze(-2) - prior.unsqueeze(-3)).square().sum(-1)  # (..., k, n)
    dims = posterior.shape[-1]
    kl = 0.5 * (squared / sigma**2 + dims * (1 / sigma**2 - 1 + 2 * math.log(sigma)))
    return kl.amin(-1).sum(-1) + kl.amin(-2).sum(-1)


def zero_gradient(module: torch.nn.Module) -> Float[Tensor, ""]:
    """Zero, with a zero gradient for every parameter of ``module``.

    Added to a loss whose present stage does not use ``module``, so that DDP needs no search for unused parameters.
    """
    return sum((p.reshape(-1)[:1].sum() * 0.0 for p in module.parameters()), torch.zeros(()))
