import pytest
import torch
from torch.distributions import Beta, Normal, kl_divergence

from objdyn.distributions import BETA_EPS, beta_kl, beta_sample, gaussian_kl, gaussian_sample


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gaussian_kl_equals_torch_distributions() -> None:
    mean_q, log_var_q, mean_p, log_var_p = torch.randn(4, 50, generator=generator(), dtype=torch.float64)
    expected = kl_divergence(Normal(mean_q, (log_var_q / 2).exp()), Normal(mean_p, (log_var_p / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean_q, log_var_q, mean_p, log_var_p), expected)
    expected = kl_divergence(Normal(mean_q, (log_var_q / 2).exp()), Normal(0.3, 0.5))
    scalars = gaussian_kl(mean_q, log_var_q, 0.3, 2 * float(torch.tensor(0.5, dtype=torch.float64).log()))
    torch.testing.assert_close(scalars, expected)


def test_beta_kl_equals_torch_distributions() -> None:
    concentrations = torch.randn(4, 50, generator=generator(), dtype=torch.float64).mul(2).exp()
    a_q, b_q, a_p, b_p = concentrations
    expected = kl_divergence(Beta(a_q, b_q), Beta(a_p, b_p))
    torch.testing.assert_close(beta_kl(a_q, b_q, a_p, b_p), expected)


def test_beta_kl_of_equal_distributions_is_zero() -> None:
    a, b = torch.tensor([0.0025, 0.1, 30.0, 400.0]), torch.tensor([400.0, 0.1, 2.0, 0.0025])
    torch.testing.assert_close(beta_kl(a, b, a, b), torch.zeros(4), atol=1e-4, rtol=0)


def test_gaussian_sample_has_the_moments_asked_for() -> None:
    sample = gaussian_sample(torch.full((100_000,), 2.0), torch.full((100_000,), -1.0), generator())
    # three standard errors of the mean and of the variance
    assert sample.mean().item() == pytest.approx(2.0, abs=3 * 0.607 / 316)
    assert sample.var().item() == pytest.approx(0.368, abs=3 * 0.368 * 1.42 / 316)


@pytest.mark.parametrize("source", [None, 3])
def test_beta_sample_has_the_moments_asked_for(source: int | None) -> None:
    torch.manual_seed(1)
    a, b = torch.full((50_000,), 2.0), torch.full((50_000,), 6.0)
    sample = beta_sample(a, b, None if source is None else generator(source))
    assert sample.mean().item() == pytest.approx(0.25, abs=3 * 0.144 / 223)
    assert sample.std().item() == pytest.approx(0.1443, abs=0.003)


def test_beta_sample_is_finite_with_finite_gradient_at_the_bounds() -> None:
    torch.manual_seed(0)
    log = torch.tensor([[-6.0, -6.0], [-6.0, 6.0], [6.0, -6.0], [6.0, 6.0]]).repeat(200, 1).requires_grad_()
    sample = beta_sample(log[:, 0].exp(), log[:, 1].exp())
    sample.sum().backward()
    assert sample.min() >= BETA_EPS
    assert sample.max() <= 1 - BETA_EPS
    assert log.grad is not None
    assert torch.isfinite(log.grad).all()


def test_samples_follow_their_generator() -> None:
    a = torch.full((20,), 1.5)
    assert torch.equal(beta_sample(a, a, generator(5)), beta_sample(a, a, generator(5)))
    assert not torch.equal(beta_sample(a, a, generator(5)), beta_sample(a, a, generator(6)))
    assert torch.equal(gaussian_sample(a, a, generator(5)), gaussian_sample(a, a, generator(5)))


def test_a_beta_sample_takes_the_same_from_its_generator_whatever_the_concentrations() -> None:
    for seed in range(30):
        after = []
        for a in (2.0, 2.3, 0.1):
            generator = torch.Generator().manual_seed(seed)
            beta_sample(torch.full((6,), a), torch.full((6,), 3.0), generator)
            after.append(torch.rand((), generator=generator))
        assert after[0] == after[1] == after[2]
