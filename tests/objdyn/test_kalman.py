import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from objdyn import kalman
from objdyn.kalman import LGSSM, NotFiniteError, NotPositiveDefiniteError

Form = Literal["dense", "sequential", "scan"]
FORMS: tuple[Form, ...] = ("dense", "sequential", "scan")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def eye(n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.eye(n, dtype=torch.float64)


def square(factor: Tensor) -> Tensor:
    return factor @ factor.mT


def general(d: int = 3, p: int = 2, k: int = 2, far: float = 3.0, seed: int = 0) -> LGSSM:
    """A model without any structure, stable, whose means are about ``far`` from zero."""
    source = generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    transition = draw(d, d)
    return LGSSM(
        transition=0.95 * transition / torch.linalg.matrix_norm(transition, 2),
        offset=draw(d),
        emission=draw(p, d),
        transition_cov=0.1 * square(draw(d, d)) + eye(d, 0.01),
        emission_cov=0.1 * square(draw(p, p)) + eye(p, 0.03),
        initial_logits=draw(k),
        initial_mean=far * draw(k, d),
        initial_cov=square(draw(k, d, d)) + eye(d, 0.3),
    )


def newtonian(transition_var: float, emission_var: float, initial_var: float = 1.0, k: int = 2) -> LGSSM:
    """Positions and velocities in the plane, with a force, as in the paper."""
    zero = torch.zeros(2, 2, dtype=torch.float64)
    return LGSSM(
        transition=torch.cat([torch.cat([eye(2), eye(2, 0.1)], 1), torch.cat([zero, eye(2)], 1)]),
        offset=torch.tensor([0.0, -0.001, 0.0, -0.02], dtype=torch.float64),
        emission=torch.cat([eye(2), zero], 1),
        transition_cov=eye(4, transition_var),
        emission_cov=eye(2, emission_var),
        initial_logits=torch.linspace(0, 1, k, dtype=torch.float64),
        initial_mean=torch.randn(k, 4, generator=generator(5), dtype=torch.float64),
        initial_cov=eye(4, initial_var).repeat(k, 1, 1),
    )


def joint(model: LGSSM, t: int, component: int) -> tuple[Tensor, Tensor]:
    """Mean (t d) and covariance (t d, t d) of all states, by the definition, one block at a time."""
    A, u, _, Q, _, _, mu, S = model
    d = len(A)
    mean, cov = torch.zeros(t, d, dtype=A.dtype), torch.zeros(t, d, t, d, dtype=A.dtype)
    mean[0], cov[0, :, 0] = mu[component], S[component]
    for i in range(1, t):
        mean[i] = A @ mean[i - 1] + u
        for j in range(i):
            cov[i, :, j] = A @ cov[i - 1, :, j]
            cov[j, :, i] = cov[i, :, j].T
        cov[i, :, i] = A @ cov[i - 1, :, i - 1] @ A.T + Q
    return mean.flatten(), cov.reshape(t * d, t * d)


def observed_joint(model: LGSSM, t: int, component: int, seen: Tensor | None = None) -> MultivariateNormal:
    """The distribution of the seen observations as one vector."""
    mean, cov = joint(model, t, component)
    emission = torch.block_diag(*[model.emission] * t)
    mean, cov = emission @ mean, emission @ cov @ emission.T + torch.block_diag(*[model.emission_cov] * t)
    if seen is not None:
        rows = seen.repeat_interleave(len(model.emission))
        mean, cov = mean[rows], cov[rows][:, rows]
    return MultivariateNormal(mean, cov)


def brute_force(model: LGSSM, observations: Tensor, seen: Tensor | None = None) -> Tensor:
    """log p(a | z = k) of sequences with one mask, (..., k)."""
    t = observations.shape[-2]
    values = (observations if seen is None else observations[..., seen, :]).flatten(-2)
    components = range(len(model.initial_logits))
    return torch.stack([observed_joint(model, t, k, seen).log_prob(values) for k in components], -1)


def brute_smooth(model: LGSSM, sequence: Tensor, component: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (t, d) and covariance (t, d, d) of the states of one sequence, by conditioning with an explicit inverse."""
    t, d = len(sequence), len(model.transition)
    mean, cov = joint(model, t, component)
    emission = torch.block_diag(*[model.emission] * t)[seen.repeat_interleave(len(model.emission))]
    marginal = observed_joint(model, t, component, seen)
    gain = cov @ emission.T @ torch.linalg.inv(marginal.covariance_matrix)
    smoothed = cov - gain @ emission @ cov
    mean = mean + gain @ (sequence[seen].flatten() - marginal.mean)
    return mean.reshape(t, d), torch.stack([smoothed.reshape(t, d, t, d)[i, :, i] for i in range(t)])


def parameters(model: LGSSM) -> tuple[Tensor, ...]:
    """Unconstrained: each covariance by its Cholesky factor, so that every step stays symmetric."""
    *a, transition_cov, emission_cov, logits, mean, initial_cov = model
    factors = (torch.linalg.cholesky(x) for x in (transition_cov, emission_cov))
    free = (*a, *factors, logits, mean, torch.linalg.cholesky(initial_cov))
    return tuple(x.detach().clone().requires_grad_() for x in free)


def from_parameters(free: tuple[Tensor, ...]) -> LGSSM:
    A, u, B, transition, emission, logits, mean, initial = free
    return LGSSM(A, u, B, square(transition), square(emission), logits, mean, square(initial))


def gradients(model: LGSSM, observations: Tensor, method: Form) -> tuple[Tensor, ...]:
    inputs = (*parameters(model), observations.clone().requires_grad_())
    return torch.autograd.grad(
        kalman.log_likelihood(from_parameters(inputs[:-1]), inputs[-1], None, method).sum(), inputs
    )


def gap(t: int, *missing: int) -> Tensor:
    seen = torch.ones(t, dtype=torch.bool)
    seen[list(missing)] = False
    return seen


# Likelihood


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize(("d", "p", "k", "t"), [(3, 2, 2, 7), (4, 2, 2, 30), (2, 3, 1, 8), (1, 1, 3, 5), (3, 2, 2, 1)])
def test_likelihood_equals_the_joint_gaussian_written_out(d: int, p: int, k: int, t: int, method: Form) -> None:
    model = general(d, p, k)
    observations = kalman.sample(model, (2, 3), t, generator(1)).observations
    expected = brute_force(model, observations)
    components = kalman.component_log_likelihood(model, observations, method=method)
    torch.testing.assert_close(components, expected, atol=1e-9, rtol=0)
    mixture = MixtureSameFamily(
        Categorical(logits=model.initial_logits),
        MultivariateNormal(
            torch.stack([observed_joint(model, t, j).mean for j in range(k)]),
            torch.stack([observed_joint(model, t, j).covariance_matrix for j in range(k)]),
        ),
    )
    expected_mixture = mixture.log_prob(observations.flatten(-2))
    result = kalman.log_likelihood(model, observations, method=method)
    torch.testing.assert_close(result, expected_mixture, atol=1e-9, rtol=0)
    posterior = kalman.component_posterior(model, observations, method=method)
    joint_density = expected + model.initial_logits.log_softmax(-1)
    torch.testing.assert_close(posterior, joint_density - expected_mixture.unsqueeze(-1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", FORMS)
def test_likelihood_far_from_the_origin_keeps_its_digits(method: Form) -> None:
    model = general(far=1e3)
    observations = kalman.sample(model, (4,), 20, generator(1)).observations
    torch.testing.assert_close(
        kalman.component_log_likelihood(model, observations, method=method),
        brute_force(model, observations),
        atol=1e-6,  # of up to 1e6: where the other component's mean is 1e3 away
        rtol=1e-11,
    )


@pytest.mark.parametrize("transition_var", [1e-3, 1e-8, 0.0])
@pytest.mark.parametrize(("t", "emission_var", "initial_var"), [(30, 1e-3, 100.0), (150, 1e-3, 1.0), (150, 1.0, 100.0)])
def test_forms_agree_to_1e_9(t: int, emission_var: float, initial_var: float, transition_var: float) -> None:
    model = newtonian(transition_var, emission_var, initial_var)
    observations = kalman.sample(model, (3,), t, generator(2)).observations
    dense, sequential, scan = (kalman.component_log_likelihood(model, observations, method=form) for form in FORMS)
    torch.testing.assert_close(dense, sequential, atol=1e-9, rtol=0)
    torch.testing.assert_close(scan, sequential, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("t", "transition_var"), [(1000, 1e-3), (1000, 0.0), (100, 1e-3), (100, 0.0)])
def test_forms_agree_to_1e_7_of_the_value_at_the_extremes(t: int, transition_var: float) -> None:
    model = newtonian(transition_var, 1e-6)
    observations = kalman.sample(model, (1,), t, generator(2)).observations
    dense, sequential, scan = (kalman.component_log_likelihood(model, observations, method=form) for form in FORMS)
    torch.testing.assert_close(dense, sequential, atol=0, rtol=1e-7)
    torch.testing.assert_close(scan, sequential, atol=0, rtol=1e-7)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9, 31, 33])
def test_scan_equals_sequential_at_any_length(t: int) -> None:
    model = general()
    observations = kalman.sample(model, (2,), t, generator(3)).observations
    for scanned, walked in zip(
        kalman.filter(model, observations, method="scan"), kalman.filter(model, observations), strict=True
    ):
        torch.testing.assert_close(scanned, walked, atol=1e-11, rtol=1e-11)


def test_sequences_are_independent_of_their_order_and_company() -> None:
    model = general()
    observations = kalman.sample(model, (6,), 9, generator(4)).observations
    order = torch.randperm(6, generator=generator(5))
    for form in FORMS:
        whole = kalman.log_likelihood(model, observations, method=form)
        torch.testing.assert_close(kalman.log_likelihood(model, observations[order], method=form), whole[order])
        torch.testing.assert_close(kalman.log_likelihood(model, observations[2], method=form), whole[2])
        folded = kalman.log_likelihood(model, observations.reshape(2, 3, 9, 2), method=form)
        torch.testing.assert_close(folded.flatten(), whole)


# Gradients


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("masks", ["none", "shared", "each"])
def test_likelihood_has_the_gradient_of_finite_differences(method: Form, masks: str) -> None:
    model = general(d=3 if method == "dense" else 2)  # the other forms have small parts only, and are slow to check
    t = 5 if method == "dense" else 4
    observations = kalman.sample(model, (3,), t, generator(1)).observations.requires_grad_()
    each = torch.stack([gap(t, 1), gap(t, 0, 3), gap(t, 1)])
    observed = {"none": None, "shared": gap(t, 0, 3), "each": each}[masks]

    def value(*inputs: Tensor) -> Tensor:
        return kalman.log_likelihood(from_parameters(inputs[:-1]), inputs[-1], observed, method)

    assert torch.autograd.gradcheck(value, (*parameters(model), observations))


@pytest.mark.parametrize("method", ["rts", "dense"])
def test_smoother_has_the_gradient_of_finite_differences(method: Literal["rts", "dense"]) -> None:
    model = general(d=2, p=1)
    observations = kalman.sample(model, (2,), 4, generator(1)).observations.requires_grad_()
    observed = torch.stack([gap(4, 1, 2), gap(4, 0)])

    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(kalman.smooth(from_parameters(inputs[:-1]), inputs[-1], observed, method))

    assert torch.autograd.gradcheck(value, (*parameters(model), observations))


def test_samples_forecasts_and_mixtures_have_the_gradient_of_finite_differences() -> None:
    model = general(d=2, p=1)
    observations = kalman.sample(model, (2,), 3, generator(1)).observations.requires_grad_()
    component = torch.tensor([1, 0])

    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        free = from_parameters(inputs[:-1])
        drawn = kalman.sample(free, (2,), 3, generator(2))
        _, path = kalman.sample_posterior(free, inputs[-1], None, component, generator(3))
        mean, cov = kalman.forecast(free, free.initial_mean, free.initial_cov, 3)
        return drawn.states, drawn.observations, path, *kalman.mix(free.initial_logits, mean, cov)

    assert torch.autograd.gradcheck(value, (*parameters(model), observations))


@pytest.mark.parametrize(("t", "transition_var", "emission_var"), [(30, 1e-3, 1e-3), (30, 0.0, 1.0), (100, 1e-8, 1e-3)])
def test_forms_have_one_gradient(t: int, transition_var: float, emission_var: float) -> None:
    model = newtonian(max(transition_var, 1e-12), emission_var, 100.0)
    observations = kalman.sample(model, (3,), t, generator(2)).observations
    dense, sequential, scan = (gradients(model, observations, form) for form in FORMS)
    for one, two, three in zip(dense, sequential, scan, strict=True):
        size = two.abs().max().item()
        torch.testing.assert_close(one, two, atol=1e-7 * size, rtol=0)
        torch.testing.assert_close(three, two, atol=1e-7 * size, rtol=0)


def test_float32_is_computed_in_float64() -> None:
    exact = newtonian(1e-3, 1.0)
    observations = kalman.sample(exact, (4,), 30, generator(1)).observations.float()
    model = LGSSM(*(x.float().requires_grad_() for x in exact))
    doubled = LGSSM(*(x.detach().double() for x in model))
    for form in FORMS:
        result = kalman.component_log_likelihood(model, observations, method=form)
        expected = kalman.component_log_likelihood(doubled, observations.double(), method=form)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected.float())
        grads = torch.autograd.grad(kalman.log_likelihood(model, observations, method=form).sum(), model)
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    results = (*kalman.filter(model, observations), *kalman.smooth(model, observations))
    assert all(x.dtype == torch.float32 for x in results)


def test_frozen_model_still_gives_the_observations_their_gradient() -> None:
    model = general()
    observations = kalman.sample(model, (3,), 6, generator(1)).observations.requires_grad_()
    value = kalman.component_log_likelihood(model, observations)[:, 0].sum()
    (grad,) = torch.autograd.grad(value, observations)
    marginal = observed_joint(model, 6, 0)
    expected = torch.linalg.solve(marginal.covariance_matrix, (marginal.mean - observations.flatten(1)).T).T
    torch.testing.assert_close(grad.flatten(1), expected)


def test_second_derivative_of_the_dense_form_is_refused() -> None:
    model = general()
    observations = kalman.sample(model, (3,), 6, generator(1)).observations.requires_grad_()
    for form in FORMS:
        value = kalman.log_likelihood(model, observations, method=form).sum()
        (grad,) = torch.autograd.grad(value, observations, create_graph=True)
        if form == "dense":
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()
        else:
            grad.square().sum().backward()


# Missing frames


@pytest.mark.parametrize("method", FORMS)
def test_missing_frames_are_marginalised(method: Form) -> None:
    model = general()
    t = 8
    observations = kalman.sample(model, (2, 2), t, generator(1)).observations
    for missing in ((0,), (t - 1,), (0, 1, 4, 5), tuple(range(1, t))):
        seen = gap(t, *missing)
        blanked = torch.where(seen.unsqueeze(-1), observations, math.nan)  # what stands there must not matter
        result = kalman.component_log_likelihood(model, blanked, seen, method)
        torch.testing.assert_close(result, brute_force(model, observations, seen), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", FORMS)
def test_each_sequence_may_miss_its_own_frames(method: Form) -> None:
    model = general()
    t = 6
    observations = kalman.sample(model, (2, 3), t, generator(1)).observations
    masks = [gap(t), gap(t, 0), gap(t, 2, 3), gap(t, 0), gap(t, *range(t)), gap(t, 5)]
    observed = torch.stack(masks).reshape(2, 3, t)
    blanked = torch.where(observed.unsqueeze(-1), observations, math.nan).requires_grad_()
    result = kalman.component_log_likelihood(model, blanked, observed, method)
    for sequence, mask, value in zip(observations.flatten(0, 1), masks, result.flatten(0, 1), strict=True):
        expected = brute_force(model, sequence, mask) if mask.any() else torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=0)
    (grad,) = torch.autograd.grad(result.sum(), blanked)
    assert grad.isfinite().all()
    assert (grad[~observed] == 0).all()


def test_mask_broadcasts_over_objects() -> None:
    model = general()
    observations = kalman.sample(model, (2, 3), 5, generator(1)).observations
    observed = torch.stack([gap(5, 0), gap(5, 2, 3)])
    for form in FORMS:
        result = kalman.component_log_likelihood(model, observations, observed.unsqueeze(1), form)
        expected = torch.stack([brute_force(model, observations[i], observed[i]) for i in range(2)])
        torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)


# Filter


@pytest.mark.parametrize("method", ["sequential", "scan"])
def test_filter_conditions_on_the_past_alone(method: Literal["sequential", "scan"]) -> None:
    model = general()
    t = 6
    seen = gap(t, 0, 3)
    observations = kalman.sample(model, (2,), t, generator(1)).observations
    result = kalman.filter(model, observations, seen, method)
    for frame in range(t):
        past, before = seen.clone(), seen.clone()
        past[frame + 1 :], before[frame:] = False, False
        for n in range(2):
            for k in range(2):
                mean, cov = brute_smooth(model, observations[n], k, past)
                torch.testing.assert_close(result.mean[n, k, frame], mean[frame])
                torch.testing.assert_close(result.cov[n, k, frame], cov[frame])
                mean, cov = brute_smooth(model, observations[n], k, before)
                torch.testing.assert_close(result.predicted_mean[n, k, frame], mean[frame])
                torch.testing.assert_close(result.predicted_cov[n, k, frame], cov[frame])
    torch.testing.assert_close(result.log_likelihood, brute_force(model, observations, seen))


def test_covariances_are_computed_once_where_masks_are_equal() -> None:
    model = general()
    observations = kalman.sample(model, (4, 5), 6, generator(1)).observations
    for observed in (None, gap(6, 2), gap(6, 2).expand(4, 5, 6)):
        for cov in (kalman.filter(model, observations, observed).cov, kalman.smooth(model, observations, observed).cov):
            assert cov.shape == (4, 5, 2, 6, 3, 3)
            assert cov.untyped_storage().nbytes() <= 2 * 6 * 9 * 8


# Smoother


def test_smoothers_equal_conditioning_written_out() -> None:
    model = general()
    t = 7
    observations = kalman.sample(model, (3,), t, generator(1)).observations
    masks = torch.stack([gap(t), gap(t, 0, 3, 4), gap(t, 6)])
    for result in (kalman.smooth(model, observations, masks), kalman.smooth(model, observations, masks, "dense")):
        for n in range(3):
            for k in range(2):
                mean, cov = brute_smooth(model, observations[n], k, masks[n])
                torch.testing.assert_close(result.mean[n, k], mean, atol=1e-10, rtol=0)
                torch.testing.assert_close(result.cov[n, k], cov, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "model",
    [
        newtonian(1e-3, 1.0),
        newtonian(1e-3, 1e-3, 100.0),
        newtonian(0.0, 1e-3, 100.0),
        newtonian(0.0, 1e-3, 1e-10),  # predicted covariances of 1e-10
        newtonian(1e-8, 1e-6),
        # predicted covariances without any noise, of rank 2 and of rank 0
        newtonian(0.0, 1e-3)._replace(transition=torch.diag(torch.tensor([0.9, 0.8, 0.0, 0.0], dtype=torch.float64))),
        newtonian(0.0, 1e-3)._replace(transition=torch.zeros(4, 4, dtype=torch.float64)),
    ],
    ids=["paper", "wide", "no noise", "tight", "little noise", "rank 2", "rank 0"],
)
def test_rts_equals_dense_conditioning(model: LGSSM) -> None:
    t = 30
    observations = kalman.sample(model, (3,), t, generator(1)).observations
    for observed in (None, gap(t, *range(5, 25))):
        rts = kalman.smooth(model, observations, observed)
        dense = kalman.smooth(model, observations, observed, "dense")
        torch.testing.assert_close(rts.mean, dense.mean, atol=1e-8, rtol=0)
        torch.testing.assert_close(rts.cov, dense.cov, atol=1e-8, rtol=0)


def test_smoothed_covariances_stay_positive_where_nothing_else_does() -> None:
    model = newtonian(0.0, 1e-6, 100.0)
    observations = kalman.sample(model, (2,), 150, generator(1)).observations
    cov = kalman.smooth(model, observations, gap(150, *range(5, 145))).cov
    deviation = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = cov / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))
    assert torch.linalg.eigvalsh(correlation).min() > 0.01


def test_without_noise_the_smoother_finds_the_parabola_in_the_gap() -> None:
    model = newtonian(0.0, 1e-8, 100.0, k=1)
    A, u = model.transition, model.offset
    t = 30
    states = [torch.tensor([-0.3, -0.4, 1.5, 1.2], dtype=torch.float64)]
    for _ in range(t - 1):
        states.append(A @ states[-1] + u)
    truth = torch.stack(states)
    steps = torch.arange(t, dtype=torch.float64)
    # y = y_0 + j (v_0 / 10 + u_y) + (j choose 2) u_v / 10: a parabola
    torch.testing.assert_close(truth[:, 1], -0.4 + steps * (0.12 - 0.001) - 0.002 * steps * (steps - 1) / 2)
    smoothed = kalman.smooth(model, truth[:, :2], gap(t, *range(5, 25)))
    torch.testing.assert_close(smoothed.mean[0], truth, atol=1e-6, rtol=0)
    assert smoothed.cov.diagonal(dim1=-2, dim2=-1).max() < 1e-7


# Forecast and mixture


def test_forecast_equals_a_filter_that_sees_nothing_more() -> None:
    model = general()
    observations = kalman.sample(model, (2,), 12, generator(1)).observations
    filtered = kalman.filter(model, observations, gap(12, *range(5, 12)))
    mean, cov = kalman.forecast(model, filtered.mean[:, :, 4], filtered.cov[:, :, 4], 7)
    torch.testing.assert_close(mean, filtered.mean[:, :, 5:])
    torch.testing.assert_close(cov, filtered.cov[:, :, 5:])


def test_mixture_has_the_moments_of_its_samples() -> None:
    model = general(d=2, k=3)
    mean, cov = kalman.mix(model.initial_logits, model.initial_mean, model.initial_cov)
    expected = MixtureSameFamily(
        Categorical(logits=model.initial_logits), MultivariateNormal(model.initial_mean, model.initial_cov)
    )
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(cov.diagonal(), expected.variance)
    first = kalman.sample(model, (200_000,), 1, generator(1)).states[:, 0]
    torch.testing.assert_close(cov, torch.cov(first.T), atol=0.1, rtol=0)  # entries up to 30: five standard errors


def test_mixture_of_trajectories_is_that_of_each_frame() -> None:
    model = general()
    observations = kalman.sample(model, (4,), 5, generator(1)).observations
    smoothed = kalman.smooth(model, observations)
    weights = kalman.component_posterior(model, observations)
    mean, cov = kalman.mix(weights, smoothed.mean, smoothed.cov)
    assert (mean.shape, cov.shape) == ((4, 5, 3), (4, 5, 3, 3))
    one_mean, one_cov = kalman.mix(weights[2], smoothed.mean[2, :, 3], smoothed.cov[2, :, 3])
    torch.testing.assert_close(mean[2, 3], one_mean)
    torch.testing.assert_close(cov[2, 3], one_cov)


# Samples


def test_samples_have_the_moments_of_the_joint_gaussian() -> None:
    model = general(d=2)
    drawn = kalman.sample(model, (60_000,), 3, generator(1))
    share = drawn.component.double().mean().item()
    assert share == pytest.approx(model.initial_logits.softmax(-1)[1].item(), abs=0.008)
    for k in range(2):
        of_k = drawn.observations[drawn.component == k].flatten(1)
        expected = observed_joint(model, 3, k)
        deviation = expected.variance.sqrt()
        assert ((of_k.mean(0) - expected.mean).abs() / deviation).max() < 5 / math.sqrt(len(of_k))
        off = (torch.cov(of_k.T) - expected.covariance_matrix) / (deviation.unsqueeze(1) * deviation)
        assert off.abs().max() < 5 * math.sqrt(2 / len(of_k))
    residual = drawn.observations - drawn.states @ model.emission.T
    torch.testing.assert_close(torch.cov(residual.flatten(0, 1).T), model.emission_cov, atol=0.01, rtol=0)


def test_posterior_samples_have_the_moments_of_the_smoother() -> None:
    model = general(d=2, far=0.5)
    t, n = 4, 40_000
    seen = gap(t, 0, 2)
    sequence = kalman.sample(model, (), t, generator(1)).observations
    many = sequence.expand(n, t, 2)
    component, path = kalman.sample_posterior(model, many, seen, generator=generator(2))
    posterior = kalman.component_posterior(model, sequence, seen).exp()
    assert 0.05 < posterior[1] < 0.95
    assert component.double().mean().item() == pytest.approx(posterior[1].item(), abs=0.013)
    for k in range(2):
        mean, cov = brute_smooth(model, sequence, k, seen)
        of_k = path[component == k]
        deviation = cov.diagonal(dim1=-2, dim2=-1).sqrt()
        assert ((of_k.mean(0) - mean).abs() / deviation).max() < 5 / math.sqrt(len(of_k))
        for frame in range(t):
            off = (torch.cov(of_k[:, frame].T) - cov[frame]) / (deviation[frame].unsqueeze(1) * deviation[frame])
            assert off.abs().max() < 5 * math.sqrt(2 / len(of_k))


def test_posterior_paths_obey_dynamics_without_noise() -> None:
    model = newtonian(0.0, 1e-3)
    observations = kalman.sample(model, (5,), 20, generator(1)).observations
    component = torch.tensor([0, 1, 0, 1, 1])
    kept, path = kalman.sample_posterior(model, observations, None, component, generator(2))
    assert kept is component
    torch.testing.assert_close(path[:, 1:], path[:, :-1] @ model.transition.T + model.offset, atol=1e-9, rtol=0)
    assert (path[:, :, :2] - observations).abs().max() < 0.15


def test_samples_follow_their_generator() -> None:
    model = general()
    one, two, other = (kalman.sample(model, (2,), 4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.states, two.states)
    assert torch.equal(one.observations, two.observations)
    assert not torch.equal(one.states, other.states)
    paths = [kalman.sample_posterior(model, one.observations, generator=generator(seed))[1] for seed in (1, 1, 2)]
    assert torch.equal(paths[0], paths[1])
    assert not torch.equal(paths[0], paths[2])


def test_likelihood_of_simulated_data_is_greatest_at_the_true_parameters() -> None:
    model = newtonian(0.01, 0.05, 0.5)._replace(
        initial_mean=torch.tensor([[-2.0, 0.0, 1.0, 1.0], [2.0, 0.0, -1.0, 1.0]], dtype=torch.float64)
    )
    observations = kalman.sample(model, (4000,), 20, generator(3)).observations
    best = kalman.log_likelihood(model, observations).sum()
    for index, field in enumerate(LGSSM._fields):
        value = model[index]
        for sign in (-1, 1):
            if field.endswith("cov"):
                changed = value * (1 + sign * 0.1)
            elif field in ("transition", "emission"):
                changed = value + sign * 0.02 * value.sign()
            elif field == "initial_logits":
                changed = value + sign * torch.tensor([0.0, 0.15], dtype=torch.float64)
            else:
                changed = value + sign * 0.05
            assert kalman.log_likelihood(model._replace(**{field: changed}), observations).sum() < best, field


# Bad input


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize(
    ("field", "named"), [("transition_cov", None), ("emission_cov", None), ("initial_cov", "initial_cov[1]")]
)
def test_covariance_that_is_not_positive_is_named(field: str, named: str | None, method: Form) -> None:
    model = general()
    observations = kalman.sample(model, (2,), 4, generator(1)).observations
    bad = getattr(model, field).clone()
    bad[(1, 0, 0) if field == "initial_cov" else (0, 0)] = -0.5
    broken = model._replace(**{field: bad})
    with pytest.raises(NotPositiveDefiniteError, match="least eigenvalue is -") as caught:
        kalman.log_likelihood(broken, observations, method=method)
    assert caught.value.field == (named or field)
    with pytest.raises(NotPositiveDefiniteError):
        kalman.sample(broken, (2,), 3)
    with pytest.raises(NotPositiveDefiniteError):
        kalman.smooth(broken, observations)


@pytest.mark.parametrize("field", ["emission_cov", "initial_cov"])
def test_zero_covariance_is_refused_where_it_must_be_positive(field: str) -> None:
    model = general()
    with pytest.raises(ValueError, match=field):
        kalman.log_likelihood(
            model._replace(**{field: torch.zeros_like(getattr(model, field))}), torch.zeros(4, 2).double()
        )


@pytest.mark.parametrize("method", FORMS)
def test_joint_covariance_that_rounding_makes_indefinite_is_named(method: Form) -> None:
    twice = torch.ones(2, 1, dtype=torch.float64)  # one state seen twice, almost without noise
    model = general(d=1)._replace(emission=twice, transition_cov=eye(1), emission_cov=eye(2, 1e-18))
    with pytest.raises(NotPositiveDefiniteError, match="joint covariance") as caught:
        kalman.log_likelihood(model, torch.zeros(5, 2, dtype=torch.float64), method=method)
    assert caught.value.field == "joint"


def test_parameter_that_is_not_finite_is_named() -> None:
    model = general()
    for field in ("transition", "emission_cov", "initial_cov"):
        bad = getattr(model, field).clone()
        bad.flatten()[0] = math.nan
        for form in FORMS:
            with pytest.raises(NotFiniteError, match=f"{field} has entries that are not finite") as caught:
                kalman.log_likelihood(model._replace(**{field: bad}), torch.zeros(4, 2).double(), method=form)
            assert caught.value.field == field


def test_input_that_does_not_fit_is_refused() -> None:
    model = general()
    observations = torch.zeros(3, 5, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"observations must be \(..., t, 2\)"):
        kalman.log_likelihood(model, observations[..., :1])
    with pytest.raises(ValueError, match="t at least 1"):
        kalman.log_likelihood(model, observations[:, :0])
    with pytest.raises(ValueError, match="floating point"):
        kalman.log_likelihood(model, observations.long())
    with pytest.raises(ValueError, match="observed must be bool"):
        kalman.log_likelihood(model, observations, torch.ones(5))
    with pytest.raises(ValueError, match=r"observed must broadcast to \(3, 5\), got \(4,\)"):
        kalman.log_likelihood(model, observations, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"offset must be \(3,\)"):
        kalman.log_likelihood(model._replace(offset=torch.zeros(4)), observations)
    with pytest.raises(ValueError, match="method must be one of dense, sequential, scan, got 'fast'"):
        kalman.log_likelihood(model, observations, method="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="method must be one of sequential, scan"):
        kalman.filter(model, observations, method="dense")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        kalman.sample(model, (2,), 0)
    with pytest.raises(ValueError, match="mean must be"):
        kalman.forecast(model, torch.zeros(2), torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match="component must have the leading axes"):
        kalman.sample_posterior(model, observations, component=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="cov one d more"):
        kalman.mix(torch.zeros(2), torch.zeros(2, 3), torch.zeros(3, 3))
