"""Reconstruction and set losses; each a pure function."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def squared_error(video: Float[Tensor, "b t c h w"], recon: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t"]:
    """Squared error of each frame, summed over pixels and channels (no 1/2): DDLP's reconstruction term for "mse"."""
    return (video - recon).square().flatten(2).sum(-1)


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
