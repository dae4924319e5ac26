r"""Exact inference in linear Gaussian state-space models whose initial state is a mixture.

.. math::
    z \sim \mathrm{Cat}(\pi), \quad h_1 \mid z = k \sim N(\mu_k, S_k), \quad
    h_t = A h_{t-1} + u + N(0, \Sigma_H), \quad a_t = B h_t + N(0, \Sigma_A)

One model (an ``LGSSM``) is shared by every sequence: leading axes of ``observations`` are sequences, objects, or both.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Form = Literal["dense", "sequential", "scan"]


class LGSSM(NamedTuple):
    r"""A linear Gaussian state-space model with k components of the initial state; any d and p, any A and B.

    Covariances are symmetric; ``emission_cov`` and ``initial_cov`` positive definite, ``transition_cov`` positive
    semi-definite (zero is allowed: motion without noise).
    """

    transition: Float[Tensor, "d d"]
    """:math:`A`"""
    offset: Float[Tensor, " d"]
    """:math:`u`, added in every step"""
    emission: Float[Tensor, "p d"]
    """:math:`B`"""
    transition_cov: Float[Tensor, "d d"]
    r""":math:`\Sigma_H`"""
    emission_cov: Float[Tensor, "p p"]
    r""":math:`\Sigma_A`"""
    initial_logits: Float[Tensor, " k"]
    r""":math:`\log \pi` up to a constant"""
    initial_mean: Float[Tensor, "k d"]
    r""":math:`\mu_k`"""
    initial_cov: Float[Tensor, "k d d"]
    """:math:`S_k`"""


class Filtered(NamedTuple):
    """The state of each frame given the frames up to it, for each component.

    Where all sequences have the same frames observed, the covariances do not depend on the sequence: they are then
    computed once and expanded (a view, not to be written to).
    """

    mean: Float[Tensor, "*batch k t d"]
    """E[h_t | a_1..a_t, z = k]"""
    cov: Float[Tensor, "*batch k t d d"]
    predicted_mean: Float[Tensor, "*batch k t d"]
    """E[h_t | a_1..a_{t-1}, z = k]; the initial mean for the first frame"""
    predicted_cov: Float[Tensor, "*batch k t d d"]
    log_likelihood: Float[Tensor, "*batch k"]
    """log p(a | z = k), nats"""


class Smoothed(NamedTuple):
    """The state of each frame given all observed frames, for each component; covariances as in ``Filtered``."""

    mean: Float[Tensor, "*batch k t d"]
    cov: Float[Tensor, "*batch k t d d"]


class Sampled(NamedTuple):
    """Sequences drawn from a model."""

    component: Int[Tensor, "*batch"]
    states: Float[Tensor, "*batch t d"]
    observations: Float[Tensor, "*batch t p"]


def component_log_likelihood(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Form = "dense",
) -> Float[Tensor, "*batch k"]:
    """log p(a | z = k) of the observed frames, in nats, summed over time."""
    raise NotImplementedError


def log_likelihood(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Form = "dense",
) -> Float[Tensor, "*batch"]:
    """log p(a) = logsumexp_k [log pi_k + log p(a | z = k)] of the observed frames, in nats, summed over time."""
    raise NotImplementedError


def component_posterior(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Form = "dense",
) -> Float[Tensor, "*batch k"]:
    """log p(z = k | a), in nats; normalised over k."""
    raise NotImplementedError


def filter(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Literal["sequential", "scan"] = "sequential",
) -> Filtered:
    """p(h_t | a_1..a_t, z = k) for every frame and component."""
    raise NotImplementedError


def smooth(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Literal["rts", "dense"] = "rts",
) -> Smoothed:
    """p(h_t | all observed frames, z = k) for every frame and component: what fills a gap."""
    raise NotImplementedError


def forecast(
    model: LGSSM, mean: Float[Tensor, "*batch d"], cov: Float[Tensor, "*batch d d"], steps: int
) -> tuple[Float[Tensor, "*batch steps d"], Float[Tensor, "*batch steps d d"]]:
    """Means and covariances of the ``steps`` states that follow a state of which ``mean`` and ``cov`` are known."""
    raise NotImplementedError


def sample(model: LGSSM, shape: tuple[int, ...], steps: int, generator: torch.Generator | None = None) -> Sampled:
    """Sequences of ``steps`` frames drawn from the model; ``shape`` are the leading axes."""
    raise NotImplementedError


def sample_posterior(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    component: Int[Tensor, "*batch"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "*batch"], Float[Tensor, "*batch t d"]]:
    """A component and a path of states drawn from p(z, h | a), or from p(h | a, z) for a ``component`` that is given."""
    raise NotImplementedError


def mix(
    log_weights: Float[Tensor, "*batch k"], mean: Float[Tensor, "..."], cov: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Mean and covariance of a mixture over k: (\\*batch, k, ..., d) and (\\*batch, k, ..., d, d) lose the axis k.

    ``log_weights`` are normalised here; its last axis says which axis is k.
    """
    raise NotImplementedError
