import pytest
import torch
from torch import nn

from objdyn.losses import chamfer_kl, squared_error, zero_gradient


def test_squared_error_sums_pixels_and_channels() -> None:
    video = torch.zeros(2, 3, 3, 4, 5)
    recon = torch.full_like(video, 0.5)
    torch.testing.assert_close(squared_error(video, recon), torch.full((2, 3), 0.25 * 3 * 4 * 5))


def test_chamfer_kl_is_half_the_squared_distance_both_ways() -> None:
    posterior = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    prior = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # each posterior point to its nearest prior: 0, 1/2; each prior point to its nearest posterior: 0, 1/2, 4/2
    assert chamfer_kl(posterior, prior).item() == pytest.approx(0 + 0.5 + 0 + 0.5 + 2.0)


def test_chamfer_kl_uses_the_gaussian_kl() -> None:
    point = torch.tensor([[0.3, -0.2]])
    q = torch.distributions.Normal(point, torch.ones(1, 2))
    p = torch.distributions.Normal(torch.zeros(1, 2), torch.full((1, 2), 0.5))
    expected = 2 * torch.distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close(chamfer_kl(point, torch.zeros(1, 2), sigma=0.5), expected)


def test_zero_gradient_touches_every_parameter_without_changing_the_loss() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    loss = torch.tensor(2.0) + zero_gradient(module)
    loss.backward()
    assert loss.item() == 2.0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
