"""Closed forms and reparameterised samples of the distributions that the families share. Pure functions of tensors."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

BETA_EPS = 1e-6
"""Beta samples stay this far from 0 and 1, where their derivative is not finite."""


def gaussian_kl(
    mean_q: Float[Tensor, "..."],
    log_var_q: Float[Tensor, "..."],
    mean_p: Float[Tensor, "..."] | float,
    log_var_p: Float[Tensor, "..."] | float,
) -> Float[Tensor, "..."]:
    r"""KL(q || p) of univariate Gaussians, element by element, in nats.

    .. math::  \tfrac12 \left( \log\frac{\sigma_p^2}{\sigma_q^2} + \frac{\sigma_q^2 + (\mu_q - \mu_p)^2}{\sigma_p^2} - 1 \right)
    """  # noqa: E501
    log_ratio = log_var_q - log_var_p
    inverse_var_p = torch.exp(-log_var_p) if isinstance(log_var_p, Tensor) else math.exp(-log_var_p)
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + (mean_q - mean_p).square() * inverse_var_p)


def beta_kl(
    a_q: Float[Tensor, "..."], b_q: Float[Tensor, "..."], a_p: Float[Tensor, "..."], b_p: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    r"""KL(q || p) of Beta distributions with positive concentrations, element by element, in nats.

    .. math::  \log\frac{B(a_p, b_p)}{B(a_q, b_q)} + (a_q - a_p)\psi(a_q) + (b_q - b_p)\psi(b_q)
               + (a_p - a_q + b_p - b_q)\psi(a_q + b_q)
    """
    total_q, total_p = a_q + b_q, a_p + b_p
    log_beta_p = torch.lgamma(a_p) + torch.lgamma(b_p) - torch.lgamma(total_p)
    log_beta_q = torch.lgamma(a_q) + torch.lgamma(b_q) - torch.lgamma(total_q)
    return (
        log_beta_p
        - log_beta_q
        + (a_q - a_p) * torch.digamma(a_q)
        + (b_q - b_p) * torch.digamma(b_q)
        + (total_p - total_q) * torch.digamma(total_q)
    )


def gaussian_sample(
    mean: Float[Tensor, "..."], log_var: Float[Tensor, "..."], generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    """A reparameterised sample; drawn from ``generator``, or from torch's global state when it is ``None``."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * log_var) * noise


def beta_sample(
    a: Float[Tensor, "..."], b: Float[Tensor, "..."], generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    """A sample of Beta(a, b), kept inside (0, 1) by ``BETA_EPS``.

    Reparameterised (implicit derivative of the Dirichlet) when drawn from torch's global state; with a ``generator``,
    which ``torch.distributions`` does not take, it carries no gradient. How many numbers a draw takes depends on a
    and b, so it has a generator of its own, seeded by one number of ``generator``: what is drawn next stays the same.
    """
    concentration = torch.stack([a, b], dim=-1)
    if generator is None:
        sample = torch.distributions.Dirichlet(concentration, validate_args=False).rsample()
    else:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        own = torch.Generator(generator.device).manual_seed(seed)
        sample = torch._sample_dirichlet(concentration.detach(), own)  # pyright: ignore[reportPrivateImportUsage]
    return sample[..., 0].clamp(BETA_EPS, 1 - BETA_EPS)
