"""The spatial mixture against autograd and against sums written out."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from objdyn.layers import mixture
from objdyn.layers.mixture import MixtureKind

KINDS: tuple[MixtureKind, ...] = ("per_channel", "per_pixel")


def draw(n: int = 2, k: int = 3, side: int = 6, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    frame = torch.rand(n, 3, side, side, generator=random)
    return frame, scale * torch.randn(n, k, 4, side, side, generator=random)


def written_out(frame: Tensor, means: Tensor, masks: Tensor, var: float, kind: MixtureKind) -> tuple[Tensor, Tensor]:
    """NLL and entropy as the docstring's sums, differentiable in means and masks."""
    e = torch.exp(-(frame.unsqueeze(1) - means).square() / (2 * var))
    if kind == "per_pixel":
        e = e.prod(2, keepdim=True)
    nll = -(masks * e).sum(1).log().flatten(1).sum(1)
    return nll, -(masks * masks.log()).flatten(1).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("var", [0.3, 0.05])
def test_gradients_in_closed_form_are_those_of_autograd(kind: MixtureKind, var: float) -> None:
    frame, logits = draw()
    frame, logits = frame.double(), logits.double().requires_grad_()
    rendering = mixture.render(logits)
    nll, entropy = written_out(frame, rendering.means, rendering.masks, var, kind)
    value = 7.0 * nll + 0.5 * entropy
    wanted = torch.autograd.grad(value.sum(), (logits, rendering.means, rendering.masks))
    found = mixture.mixture(frame, logits, var=var, kind=kind, likelihood_weight=7.0, entropy_weight=0.5)
    torch.testing.assert_close(found.nll, nll.detach(), atol=0, rtol=1e-9)
    torch.testing.assert_close(found.entropy, entropy.detach(), atol=0, rtol=1e-9)
    for got, want in zip((found.grad_logits, found.grad_means, found.grad_masks), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10 * float(want.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixture_is_computed_in_fp32_from_single_and_half_precision(kind: MixtureKind, dtype: torch.dtype) -> None:
    frame, logits = draw()
    logits = logits.to(dtype)
    settings: Any = {"var": 0.3, "kind": kind, "likelihood_weight": 7.0, "entropy_weight": 0.5}
    found = mixture.mixture(frame, logits, **settings)
    wanted = mixture.mixture(frame.double(), logits.double(), **settings)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=2e-6 * float(want.abs().max()), rtol=1e-5)
    without = [mixture.leave_one_out(f, x, var=0.3, kind=kind) for f, x in ((frame, logits), (frame, logits.float()))]
    assert torch.equal(*without)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_is_the_sum_over_all_assignments_on_2x2_images(kind: MixtureKind) -> None:
    """Every assignment of components to pixels (or to pixels and channels), enumerated."""
    frame, logits = draw(n=1, k=2, side=2)
    rendering = mixture.render(logits)
    places = [(c, y, x) for c in range(3) for y in range(2) for x in range(2)]
    cells = places if kind == "per_channel" else [(None, y, x) for y in range(2) for x in range(2)]
    total = 0.0
    for assignment in itertools.product(range(2), repeat=len(cells)):
        term = 1.0
        for (c, y, x), k in zip(cells, assignment, strict=True):
            term *= float(rendering.masks[0, k, 0, y, x])
            for channel in range(3) if c is None else (c,):
                difference = float(frame[0, channel, y, x] - rendering.means[0, k, channel, y, x])
                term *= math.exp(-(difference**2) / (2 * 0.3))
        total += term
    found = mixture.mixture(frame, logits, var=0.3, kind=kind, likelihood_weight=1.0, entropy_weight=0.0)
    assert float(found.nll) == pytest.approx(-math.log(total), abs=1e-5)


def test_the_attached_value_passes_its_gradient_on() -> None:
    frame, logits = draw()
    logits.requires_grad_()
    found = mixture.mixture(frame, logits, var=0.3, kind="per_channel", likelihood_weight=2.0, entropy_weight=0.1)
    weights = torch.tensor([1.0, -3.0])
    (weights * mixture.attach(logits, found)).sum().backward()
    torch.testing.assert_close(logits.grad, found.grad_logits * weights.view(2, 1, 1, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_one_out_is_the_likelihood_of_the_others_renormalised(kind: MixtureKind) -> None:
    frame, logits = draw(k=4)
    found = mixture.leave_one_out(frame, logits, var=0.3, kind=kind)
    for k in range(4):
        others = logits[:, [j for j in range(4) if j != k]]
        wanted = mixture.mixture(frame, others, var=0.3, kind=kind, likelihood_weight=1.0, entropy_weight=0.0)
        torch.testing.assert_close(found[:, k], wanted.log_likelihood, atol=1e-4, rtol=1e-4)


def test_nothing_overflows_where_a_mask_vanishes_and_the_variance_is_small() -> None:
    frame, logits = draw(scale=60.0)
    for kind in KINDS:
        found = mixture.mixture(frame, logits, var=0.01, kind=kind, likelihood_weight=1.0, entropy_weight=1.0)
        assert all(torch.isfinite(field).all() for field in found)
        assert torch.isfinite(mixture.leave_one_out(frame, logits, var=0.01, kind=kind)).all()


def test_the_mask_posterior_is_the_responsibility_without_masks_or_the_softmax_of_likelihoods() -> None:
    frame, logits = draw()
    means = mixture.render(logits).means
    e = torch.exp(-(frame.unsqueeze(1) - means).square() / 0.6).prod(2, keepdim=True)
    torch.testing.assert_close(mixture.mask_posterior(frame, means, 0.3, "log"), e / e.sum(1, keepdim=True))
    torch.testing.assert_close(mixture.mask_posterior(frame, means, 0.3, "reference"), e.softmax(1))


def test_normalised_gradients_have_mean_zero_and_variance_one_per_slot() -> None:
    gradient = 5 + 3 * torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = mixture.normalised(gradient).flatten(2)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(-1, correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert torch.equal(mixture.normalised(torch.zeros(1, 2, 3, 4, 4)), torch.zeros(1, 2, 3, 4, 4))
