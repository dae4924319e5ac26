"""Spatial mixtures: every pixel is explained by K components, each with a colour and a share of the pixel.

The decoder of a slot model gives four maps per slot: three colour logits (through a sigmoid the component's mean) and a
mask logit (through a softmax over the slots its share). Everything that iterative inference needs of the likelihood
follows in closed form from these maps, also its gradients, so that no automatic differentiation runs here.

Notation of the docstrings: pixel value x_c of channel c, mean mu_kc and mask m_k of component k, variance s2,
e_kc = exp(-(x_c - mu_kc)^2 / (2 s2)) without the Gaussian's normaliser, which is constant.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MixtureKind = Literal["per_channel", "per_pixel"]
"""Where the mixture stands: in every channel, or once per pixel over all channels together."""
MAX_LOG_RATIO = 20.0
"""Bound of log(e_k / sum_j m_j e_j): the gradient with respect to a mask near 0 has no bound of its own."""


class Mixture(NamedTuple):
    """Likelihood and mask entropy of frames under a spatial mixture, with gradients; nothing carries a graph.

    ``value`` is likelihood_weight * nll + entropy_weight * entropy, and the gradients are those of ``value``.
    """

    value: Float[Tensor, " n"]
    nll: Float[Tensor, " n"]
    """Negative log-likelihood in nats, summed over pixels (and channels, where the mixture is per channel)."""
    entropy: Float[Tensor, " n"]
    """Entropy of the masks in nats, summed over pixels."""
    log_likelihood: Float[Tensor, "n 1 h w"]
    """Log-likelihood of each pixel, summed over channels."""
    grad_logits: Float[Tensor, "n k 4 h w"]
    """With respect to the decoder's maps."""
    grad_means: Float[Tensor, "n k 3 h w"]
    """With respect to mu_k."""
    grad_masks: Float[Tensor, "n k 1 h w"]
    """With respect to m_k, each mask taken as a free variable."""


class Rendering(NamedTuple):
    """What a decoder's maps mean; differentiable."""

    means: Float[Tensor, "n k 3 h w"]
    """In (0, 1)."""
    masks: Float[Tensor, "n k 1 h w"]
    """Sum to one over k."""
    mask_logits: Float[Tensor, "n k 1 h w"]

    @property
    def frame(self) -> Float[Tensor, "n 3 h w"]:
        """The composed frame, sum_k m_k mu_k."""
        return (self.masks * self.means).sum(1)


def render(logits: Float[Tensor, "n k 4 h w"]) -> Rendering:
    """Means and masks of a decoder's maps."""
    mask_logits = logits[:, :, 3:]
    return Rendering(logits[:, :, :3].sigmoid(), mask_logits.softmax(1), mask_logits)


def log_components(
    frame: Float[Tensor, "n 3 h w"], means: Float[Tensor, "n k 3 h w"], var: float
) -> Float[Tensor, "n k 3 h w"]:
    """Log e_kc: how well each component alone explains each channel, up to a constant; at most 0."""
    return (frame.unsqueeze(1) - means).square() * (-0.5 / var)


@torch.no_grad()
def mixture(
    frame: Float[Tensor, "n 3 h w"],
    logits: Float[Tensor, "n k 4 h w"],
    *,
    var: float,
    kind: MixtureKind,
    likelihood_weight: float,
    entropy_weight: float,
) -> Mixture:
    r"""Likelihood, entropy and their gradients.

    .. math::  -\log p = -\sum_{i,c} \log \sum_k m_k e_{kc} \quad\text{(per channel)} \qquad
               -\sum_i \log \sum_k m_k \prod_c e_{kc} \quad\text{(per pixel)} \qquad  H = -\sum_{i,k} m_k \log m_k

    With responsibilities rho_kc = m_k e_kc / sum_j m_j e_jc: dNLL/dmu_kc = rho_kc (mu_kc - x_c) / s2, and with respect
    to the mask logit sum_c (m_k - rho_kc). Per pixel, rho and the sum over c are taken once.

    Source: PROVIDE (Zablotskaia et al. 2020), equation 6 for the likelihood and 7 for the entropy. Its released code
    takes the mixture per channel and 0.3 as the variance, IODINE (Greff et al. 2019) writes it per pixel.
    """
    logits, frame = _in_full(logits), _in_full(frame)
    means = logits[:, :, :3].sigmoid()
    log_masks = logits[:, :, 3:].log_softmax(1)
    masks = log_masks.exp()
    difference = means - frame.unsqueeze(1)
    log_e = difference.square() * (-0.5 / var)
    if kind == "per_pixel":
        log_e = log_e.sum(2, keepdim=True)
    joint = log_masks + log_e  # (n, k, 3 or 1, h, w)
    total = joint.logsumexp(1, keepdim=True)
    responsibility = (joint - total).exp()
    log_likelihood = total[:, 0].sum(1, keepdim=True)
    nll = -log_likelihood.flatten(1).sum(1)

    grad_means = responsibility * difference * (likelihood_weight / var)
    grad_masks = (log_e - total).clamp_max(MAX_LOG_RATIO).exp().sum(2, keepdim=True) * -likelihood_weight
    grad_mask_logits = (masks * total.shape[2] - responsibility.sum(2, keepdim=True)) * likelihood_weight
    pixel_entropy = -(masks * log_masks).sum(1, keepdim=True)
    entropy = pixel_entropy.flatten(1).sum(1)
    if entropy_weight:
        grad_masks -= entropy_weight * (log_masks + 1)
        grad_mask_logits -= entropy_weight * masks * (log_masks + pixel_entropy)
    return Mixture(
        value=likelihood_weight * nll + entropy_weight * entropy,
        nll=nll,
        entropy=entropy,
        log_likelihood=log_likelihood,
        grad_logits=torch.cat([grad_means * means * (1 - means), grad_mask_logits], dim=2),
        grad_means=grad_means,
        grad_masks=grad_masks,
    )


def mask_posterior(
    frame: Float[Tensor, "n 3 h w"], means: Float[Tensor, "n k 3 h w"], var: float, kind: Literal["log", "reference"]
) -> Float[Tensor, "n k 1 h w"]:
    """Responsibilities of the components without their masks, prod_c e_kc / sum_j prod_c e_jc.

    ``reference`` is what PROVIDE's and its baselines' released code computes instead: a softmax of the likelihood
    values themselves, which stays near 1 / K.
    """
    log_e = log_components(frame, means, var).sum(2, keepdim=True)
    return (log_e if kind == "log" else log_e.exp()).softmax(1)


@torch.no_grad()
def leave_one_out(
    frame: Float[Tensor, "n 3 h w"], logits: Float[Tensor, "n k 4 h w"], *, var: float, kind: MixtureKind
) -> Float[Tensor, "n k 1 h w"]:
    r"""Log-likelihood of each pixel without component k, the other masks renormalised (IODINE's last image input).

    .. math::  \log \sum_{j \ne k} m_j e_j - \log \sum_{j \ne k} m_j

    The sums leave k out; subtracting m_k e_k from the full sum would cancel to NaN in fp32 where m_k nears 1.
    """
    k = logits.shape[1]
    logits, frame = _in_full(logits), _in_full(frame)
    log_masks = logits[:, :, 3:].log_softmax(1)
    log_e = log_components(frame, logits[:, :, :3].sigmoid(), var)
    if kind == "per_pixel":
        log_e = log_e.sum(2, keepdim=True)
    joint = log_masks + log_e
    without = []
    for left_out in range(k):
        others = [j for j in range(k) if j != left_out]
        share = joint[:, others].logsumexp(1) - log_masks[:, others].logsumexp(1)
        without.append(share.sum(1, keepdim=True))
    return torch.stack(without, dim=1)


def _in_full(tensor: Tensor) -> Tensor:
    """In fp32 at least, whatever autocast made of it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _WithGradient(torch.autograd.Function):
    """A value (n,) of ``logits`` (n, ...) whose gradient is known."""

    @staticmethod
    def forward(ctx, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_value.view(-1, *[1] * (gradient.ndim - 1))).to(ctx.dtype), None, None


def attach(logits: Float[Tensor, "n k 4 h w"], found: Mixture) -> Float[Tensor, " n"]:
    """``found.value`` as a differentiable function of ``logits``: backward uses the gradient in closed form."""
    return _WithGradient.apply(logits, found.value, found.grad_logits)  # pyright: ignore[reportReturnType]


def normalised(gradient: Float[Tensor, "n k ..."]) -> Float[Tensor, "n k ..."]:
    """Layer normalisation of each slot's gradient or likelihood over all its own axes; eps 1e-5, nothing learned."""
    return F.layer_norm(gradient, gradient.shape[2:])
