"""SSM: its networks written out, the terms of its bound, padding, and what exact inference makes of positions."""

import dataclasses
import itertools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from objdyn import kalman
from objdyn.models.ssm import MIN_STD, SSM, InferenceNetwork, Inferred, SSMConfig, SSMLatents
from pipeline import loop

TINY = SSMConfig(image_size=8, inference_dim=12, renderer_dim=10, frozen_steps=0, anneal_steps=0)
MIXED = torch.tensor([2, 1, 3])


def build(seed: int = 0, **settings: Any) -> SSM:
    """A model in float64 whose mixture has two components that differ."""
    torch.manual_seed(seed)
    model = SSM(dataclasses.replace(TINY, **settings)).double().eval()
    with torch.no_grad():
        model.prior.initial_mean.normal_()
        model.prior.force.normal_(0.0, 0.1)
        model.prior.initial_logits.copy_(torch.tensor([0.3, -0.4]))
    return model


def video(b: int = 3, t: int = 6, seed: int = 0) -> Tensor:
    frames = torch.rand(b, t, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < 0.2
    return frames.double().expand(-1, -1, 3, -1, -1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def known(length: int, *frames: int) -> Tensor:
    seen = torch.zeros(length, dtype=torch.bool)
    seen[list(frames)] = True
    return seen


# --- the inference network


class Direct(nn.Module):
    """Equations 8 and 9 as they stand: every frame, every object, the whole input at once."""

    def __init__(self, network: InferenceNetwork) -> None:
        super().__init__()
        columns = (network.past.weight, network.before.weight, network.frame.weight)
        gate, candidate = zip(*(weight.detach().chunk(2) for weight in columns), strict=True)
        self.gate, self.candidate = nn.Parameter(torch.cat(gate, 1)), nn.Parameter(torch.cat(candidate, 1))
        biases = network.frame.bias.detach().chunk(2)
        self.gate_bias, self.candidate_bias = map(nn.Parameter, biases)
        self.heads = network.heads

    def forward(self, frames: Tensor, start: Tensor) -> Inferred:
        latest, rows = list(start.unbind()), []
        for frame in frames.unbind(1):
            state = torch.zeros_like(latest[0])
            for n, before in enumerate(latest):
                c = torch.cat([before, state, frame], dim=1)
                gate = torch.sigmoid(nn.functional.linear(c, self.gate, self.gate_bias))
                candidate = torch.tanh(nn.functional.linear(c, self.candidate, self.candidate_bias))
                latest[n] = state = (1 - gate) * state + gate * candidate
            rows.append(torch.stack(latest, dim=1))
        mean, raw = self.heads(torch.stack(rows, dim=1)).chunk(2, dim=-1)
        return Inferred(mean, nn.functional.softplus(raw) + MIN_STD, torch.stack(latest))


def network(pixels: int, dim: int, dtype: torch.dtype) -> InferenceNetwork:
    torch.manual_seed(0)
    made = InferenceNetwork(pixels, dim, 3).to(dtype)
    nn.init.normal_(made.frame.bias)
    nn.init.normal_(made.heads.bias)
    return made


@pytest.mark.parametrize(("t", "n"), [(6, 3), (1, 3), (2, 3), (5, 1), (1, 1), (4, 2)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_waves_of_frames_and_objects_are_the_direct_form(t: int, n: int, dtype: torch.dtype, atol: float) -> None:
    made = network(20, 16, dtype)
    draws = generator()
    frames = torch.rand(4, t, 20, generator=draws, dtype=dtype).round()
    start = torch.randn(n, 4, 16, generator=draws, dtype=dtype)
    found, wanted = made(frames, start), Direct(made)(frames, start)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_waves_have_the_gradients_of_the_direct_form() -> None:
    made = network(20, 16, torch.float64)
    direct = Direct(made)
    draws = generator()
    frames = torch.rand(4, 6, 20, generator=draws, dtype=torch.float64).round()
    start = torch.randn(3, 4, 16, generator=draws, dtype=torch.float64, requires_grad=True)
    (of_start,) = torch.autograd.grad(made(frames, start).mean.square().sum(), start, retain_graph=True)
    (wanted,) = torch.autograd.grad(direct(frames, start).mean.square().sum(), start)
    torch.testing.assert_close(of_start, wanted, atol=1e-13, rtol=1e-10)
    made(frames, start).std.log().sum().backward()
    direct(frames, start).std.log().sum().backward()
    parts = [made.past.weight.grad, made.before.weight.grad, made.frame.weight.grad]
    gates, candidates = zip(*(part.chunk(2) for part in parts if part is not None), strict=True)
    for columns, weight in ((gates, direct.gate), (candidates, direct.candidate)):
        assert weight.grad is not None
        torch.testing.assert_close(torch.cat(columns, 1), weight.grad, atol=1e-13, rtol=1e-10)


def test_inference_goes_on_where_it_stopped() -> None:
    made = network(20, 16, torch.float64)
    frames, start = torch.rand(2, 7, 20, dtype=torch.float64).round(), torch.randn(3, 2, 16, dtype=torch.float64)
    whole, first = made(frames, start), made(frames[:, :3], start)
    rest = made(frames[:, 3:], first.state)
    torch.testing.assert_close(torch.cat([first.mean, rest.mean], 1), whole.mean, atol=1e-14, rtol=0)
    torch.testing.assert_close(rest.state, whole.state, atol=1e-14, rtol=0)


def test_first_states_depend_on_the_number_of_objects() -> None:
    made = InferenceNetwork(4, 5, 3)
    with torch.no_grad():
        made.starts.copy_(torch.arange(6.0).unsqueeze(1).expand(-1, 5) / 10)
    rows = made.start(torch.tensor([1, 2, 3]), 3)[:, :, 0].atanh().mul(10).round().int()
    assert rows.T.tolist() == [[0, 0, 0], [1, 2, 2], [3, 4, 5]]  # padding takes the row before it


@pytest.mark.slow
def test_waves_are_at_least_one_and_a_half_times_as_fast_as_the_direct_form() -> None:
    """At the paper's size, forward and backward, in CPU seconds of one thread."""
    made = network(48**2, 1024, torch.float32)
    forms = {"waves": made, "direct": Direct(made)}
    frames, start = torch.rand(20, 30, 48**2).lt(0.01).float(), torch.randn(3, 20, 1024).tanh()
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _, (name, form) in itertools.product(range(4), forms.items()):
        begin = time.process_time()
        found = form(frames, start)
        (found.mean.sum() + found.std.sum()).backward()
        seconds[name].append(time.process_time() - begin)
    assert min(seconds["direct"]) > 1.5 * min(seconds["waves"]), seconds


# --- sizes and initial values


def test_the_paper_sizes_have_eleven_million_parameters() -> None:
    with torch.device("meta"):
        model = SSM(SSMConfig())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    d, pixels = 1024, 48 * 48
    inference = 2 * d * (2 * d + pixels) + 2 * d + (1 + 2 + 3) * d + 4 * d + 4
    renderer = d + 2 * (2 * d + d) + d * pixels + pixels
    prior = 1 + 4 + 10 + 3 + 2 * (1 + 4 + 10)
    assert sizes == {"inference": inference, "renderer": renderer, "prior": prior}
    assert sum(sizes.values()) == 11_294_004


def test_weights_begin_with_the_papers_deviation_and_biases_with_zero() -> None:
    torch.manual_seed(0)
    model = SSM(dataclasses.replace(TINY, image_size=32, inference_dim=128, renderer_dim=96))
    wanted = {
        "inference.frame": (128 * (2 * 128 + 1024)) ** -0.25,
        "inference.past": (128 * (2 * 128 + 1024)) ** -0.25,
        "inference.before": (128 * (2 * 128 + 1024)) ** -0.25,
        "inference.heads": (2 * 128) ** -0.25,
        "renderer.objects": (2 * 96) ** -0.25,
        "renderer.pixels": (96 * 1024) ** -0.25,
    }
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert found.keys() == wanted.keys()
    for name, layer in found.items():
        assert float(layer.weight.detach().std()) == pytest.approx(wanted[name], rel=0.15), name
        assert layer.bias is None or not layer.bias.any()


def test_the_dynamics_begin_as_the_paper_says() -> None:
    torch.manual_seed(0)
    prior = SSM(SSMConfig(num_components=3)).prior()
    eye = torch.eye(4, dtype=torch.float64)
    wanted = eye.clone()
    wanted[0, 2] = wanted[1, 3] = 0.1
    for found, value in (
        (prior.transition, wanted),
        (prior.offset, torch.zeros(4)),
        (prior.emission, eye[:2]),
        (prior.transition_cov, 0.001 * eye),
        (prior.emission_cov, eye[:2, :2]),
        (prior.initial_cov, eye.expand(3, 4, 4)),
        (prior.initial_logits, torch.zeros(3)),
        (prior.initial_mean[:, 2:], torch.zeros(3, 2)),
    ):
        torch.testing.assert_close(found, value.double(), atol=1e-7, rtol=1e-6)
    assert prior.initial_mean[:, :2].unique().numel() == 6


@pytest.mark.parametrize("diagonal", [False, True])
def test_covariances_are_positive_definite_for_all_parameters(diagonal: bool) -> None:
    model = build(diagonal_noise=diagonal)
    for parameter in model.prior.parameters():
        nn.init.normal_(parameter, -3.0, 10.0)
    prior = model.prior()
    for cov, floor in ((prior.transition_cov, 1e-8), (prior.emission_cov, 1e-6), (prior.initial_cov, 1e-6)):
        least = torch.linalg.eigvalsh(cov)
        assert (least > 0.5 * floor - 1e-15 * least.amax()).all()
        assert torch.equal(cov, cov.mT)
    assert (prior.transition_cov.count_nonzero() == 4) == diagonal


# --- the bound


def joint(prior: kalman.LGSSM, t: int) -> list[torch.distributions.MultivariateNormal]:
    """The positions of ``t`` frames as one Gaussian per component: every source of noise pushed through the model."""
    found = []
    for k in range(len(prior.initial_logits)):
        mean, state = [], prior.initial_mean[k]
        maps = [(torch.eye(4, dtype=torch.float64), prior.initial_cov[k])]  # source -> state, and the source's noise
        blocks = []
        for _ in range(t):
            mean.append(prior.emission @ state)
            blocks.append([prior.emission @ A for A, _ in maps])
            state = prior.transition @ state + prior.offset
            maps = [(prior.transition @ A, cov) for A, cov in maps]
            maps.append((torch.eye(4, dtype=torch.float64), prior.transition_cov))
        covs = [cov for _, cov in maps]
        cov = torch.zeros(2 * t, 2 * t, dtype=torch.float64)
        for i, j in itertools.product(range(t), repeat=2):
            for s, (left, right) in enumerate(zip(blocks[i], blocks[j], strict=False)):
                cov[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += left @ covs[s] @ right.T
            if i == j:
                cov[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += prior.emission_cov
        found.append(torch.distributions.MultivariateNormal(torch.cat(mean), cov))
    return found


def render(model: SSM, location: Tensor, n: int) -> Tensor:
    """Equations 1 and 2, one object after the other: logits of frames from positions (t, n, 2)."""
    (attention, content), (b, c) = model.renderer.objects.weight.chunk(2), model.renderer.objects.bias.chunk(2)
    x = model.renderer.canvas.tanh().expand(len(location), -1)
    for a in location[:, :n].unbind(1):
        alpha = torch.sigmoid(a @ attention.T + b)
        x = (1 - alpha) * x + alpha * torch.tanh(a @ content.T + c)
    return x @ model.renderer.pixels.weight.T + model.renderer.pixels.bias


def test_the_terms_of_the_bound_are_what_distributions_say() -> None:
    model = build(kl_weight=7.0).train()
    frames, t = video(), 6
    torch.manual_seed(3)
    loss = model(frames, MIXED)
    torch.manual_seed(3)
    noise = torch.randn(3, t, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        found = model.inference(frames[:, :, 0].flatten(2), model.inference.start(MIXED, 3))
        prior = model.prior()
        components, log_pi = joint(prior, t), prior.initial_logits.log_softmax(0)
        recon = neg_entropy = log_prior = 0.0
        for clip, n in enumerate(MIXED.tolist()):
            location = found.mean[clip] + found.std[clip] * noise[clip]
            pixels = torch.distributions.Bernoulli(logits=render(model, location, n))
            recon -= float(pixels.log_prob(frames[clip, :, 0].flatten(1)).sum())
            normal = torch.distributions.Normal(found.mean[clip, :, :n], found.std[clip, :, :n])
            neg_entropy -= float(normal.entropy().sum())
            for k in range(n):
                a = location[:, k].flatten()
                each = torch.stack([w + c.log_prob(a) for w, c in zip(log_pi, components, strict=True)])
                log_prior += float(each.logsumexp(0))
    terms = {name: float(value) for name, value in loss.terms.items()}
    kl = neg_entropy - log_prior
    assert terms["recon_clip"] == pytest.approx(recon / 3, rel=1e-10)
    assert terms["kl_clip"] == pytest.approx(kl / 3, rel=1e-9)
    assert terms["neg_entropy"] == pytest.approx(neg_entropy / 3 / t, rel=1e-10)
    assert terms["neg_log_prior"] == pytest.approx(-log_prior / 3 / t, rel=1e-9)
    assert terms["kl_weight"] == 7
    assert float(loss.total.detach()) == pytest.approx((recon + 7 * kl) / 3, rel=1e-10)
    means = torch.cat([found.mean[i, :, :n].flatten(0, 1) for i, n in enumerate(MIXED.tolist())])
    assert terms["spread"] == pytest.approx(float(means.var(0, correction=0).mean()), rel=1e-9)


def test_the_loss_has_no_noise_outside_training() -> None:
    model = build()
    assert torch.equal(model(video(), MIXED).total, model(video(), MIXED).total)


def test_the_kl_weight_is_frozen_then_falls_geometrically() -> None:
    model = build(frozen_steps=10_000, anneal_steps=50_000, initial_kl_weight=100.0, frozen_kl_weight=3.0)
    wanted = {0: 3.0, 9_999: 3.0, 10_000: 100.0, 35_000: 10.0, 47_500: 10**0.5, 60_000: 1.0, 199_999: 1.0}
    assert {step: pytest.approx(model.kl_weight(step)) for step in wanted} == wanted
    for step, weight in wanted.items():
        model.step.fill_(step)
        assert float(model(video(), MIXED).terms["kl_weight"]) == pytest.approx(weight)


def test_the_dynamics_stand_still_while_they_are_frozen() -> None:
    model = build(frozen_steps=3).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for step in range(5):
        model.step.fill_(step)
        optimizer.zero_grad()
        model(video(), MIXED).total.backward()
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name in history[0]:
        stood = torch.equal(history[0][name], history[2][name])
        assert stood == name.startswith("prior."), name
    moved = [name for name in history[0] if not torch.equal(history[2][name], history[4][name])]
    assert moved == list(history[0])


def test_noise_of_states_that_is_not_learned_is_the_setting() -> None:
    model = build(learn_transition_cov=False, transition_var=0.02)
    other = build(learn_transition_cov=False, transition_var=0.5)
    other.load_state_dict(model.state_dict())
    for made, variance in ((model, 0.02), (other, 0.5)):
        torch.testing.assert_close(made.prior().transition_cov, variance * torch.eye(4, dtype=torch.float64))
    model(video(), MIXED).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name.startswith("prior."):
            assert bool(parameter.grad.any()) != name.startswith("prior.transition_cov."), name


@pytest.mark.parametrize("name", ["transition_cov", "emission_cov", "initial_cov"])
def test_a_covariance_that_breaks_is_a_skipped_step_with_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().train()
    part = getattr(model.prior, name)
    broken = -part()
    monkeypatch.setattr(part, "forward", lambda: broken)
    loss = model(video(), MIXED)
    loss.total.backward()
    assert not torch.isfinite(loss.total)
    assert [p for p, parameter in model.named_parameters() if parameter.grad is None] == []
    _, names = loop._not_finite(["clip-0"], {"loss": loss.total.detach(), **loss.terms}, model, 1)
    assert any(found.startswith(f"prior.{name}") for found in names)


@pytest.mark.parametrize("name", [name for name, _ in build().prior.named_parameters()])
def test_a_parameter_of_the_prior_that_is_not_finite_is_named_before_the_terms(name: str) -> None:
    model = build().train()
    with torch.no_grad():
        model.prior.get_parameter(name).flatten()[0] = torch.nan
    loss = model(video(), MIXED)
    loss.total.backward()
    assert not torch.isfinite(loss.total)
    assert [p for p, parameter in model.named_parameters() if parameter.grad is None] == []
    assert next(iter(loss.terms)) == f"prior.{name}"


def test_bfloat16_keeps_positions_and_the_prior_exact() -> None:
    torch.manual_seed(0)
    model = SSM(dataclasses.replace(TINY, image_size=8))
    frames = video().float()
    exact = model.eval()(frames, MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(frames, MIXED)
        latents = model.encode(frames, MIXED)
    rough.total.backward()
    assert latents.location.dtype == torch.float32
    assert float(rough.total.detach()) == pytest.approx(float(exact.total.detach()), rel=0.02)


# --- padding


def test_a_batch_of_mixed_numbers_is_its_clips_one_by_one() -> None:
    model, frames = build(kl_weight=3.0), video()
    singles = [(frames[i : i + 1], MIXED[i : i + 1]) for i in range(3)]
    losses = [model(*single) for single in singles]
    together = model(frames, MIXED)
    mean = torch.stack([loss.total.detach() for loss in losses]).mean()
    torch.testing.assert_close(together.total.detach(), mean, atol=0, rtol=1e-12)
    for name in ("recon", "kl", "neg_entropy", "neg_log_prior"):
        mean = torch.stack([loss.terms[name] for loss in losses]).mean()
        torch.testing.assert_close(together.terms[name], mean, atol=0, rtol=1e-12)
    whole = model.encode(frames, MIXED)
    for i, single in enumerate(singles):
        for a, b in zip(model.encode(*single), whole, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad(together.total, tuple(model.parameters()))
    found = [torch.autograd.grad(loss.total / 3, tuple(model.parameters())) for loss in losses]
    for whole_gradient, *parts in zip(wanted, *found, strict=True):
        torch.testing.assert_close(sum(parts), whole_gradient, atol=1e-10, rtol=1e-8)


def test_room_for_more_objects_changes_nothing() -> None:
    small, large = build(max_objects=2), build(max_objects=5)
    shared = small.state_dict()
    rows = large.inference.starts.detach().clone()
    rows[:3] = shared["inference.starts"]
    large.load_state_dict({**shared, "inference.starts": rows})
    frames, counts = video(2), torch.tensor([2, 1])
    a, b = small.encode(frames, counts), large.encode(frames, counts)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y[:, :, :2], atol=1e-13, rtol=1e-13)
        assert not y[:, :, 2:].any()
    for x, y in (
        (small(frames, counts).total, large(frames, counts).total),
        (small.decode(a).video, large.decode(b).video),
        (small.decode(small.rollout(a, 2)).video, large.decode(large.rollout(b, 2)).video),
    ):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def test_what_padding_holds_and_in_which_order_is_irrelevant() -> None:
    model = build()
    latents = model.encode(video(1), torch.tensor([1]))
    scene = model.decode(latents, components=True)
    junk = latents.location.clone()
    junk[:, :, 1:] = torch.randn(1, 6, 2, 2, dtype=torch.float64, generator=generator())
    for order in ([0, 1, 2], [0, 2, 1]):
        other = model.decode(latents._replace(location=junk[:, :, order]), components=True)
        torch.testing.assert_close(other, scene, atol=0, rtol=0)
    assert scene.masks is not None
    assert not scene.masks[:, :, 2:].any()


def test_an_unknown_number_of_objects_is_the_largest() -> None:
    model, told = build(known_count=False), build()
    told.load_state_dict(model.state_dict())
    counts = torch.full((3,), 3)
    for given in (None, MIXED):
        latents = model.encode(video(), given)
        assert latents.present.all()
        for a, b in zip(latents, told.encode(video(), counts), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(model(video()).total, told(video(), counts).total)


# --- what is made of positions


def test_states_are_filtered_and_components_judged_by_the_frames_so_far() -> None:
    model, frames = build(), video()
    latents = model.encode(frames, torch.full((3,), 3))
    prior, positions = model.prior(), latents.location.transpose(1, 2)
    torch.testing.assert_close(latents.location, latents.mean)
    filtered = kalman.filter(prior, positions)
    torch.testing.assert_close(latents.component_state, filtered.mean.permute(0, 3, 1, 2, 4))
    torch.testing.assert_close(latents.component_cov, filtered.cov.permute(0, 3, 1, 2, 4, 5))
    for t in range(6):
        posterior = kalman.component_posterior(prior, positions[:, :, : t + 1])
        torch.testing.assert_close(latents.component_logits[:, t], posterior, atol=1e-9, rtol=1e-9)
    best = latents.component_logits.argmax(-1)[..., None, None]
    torch.testing.assert_close(latents.state, latents.component_state.take_along_dim(best, 3)[..., 0, :])
    averaged = build(component="average")
    averaged.load_state_dict(model.state_dict())
    mixed = averaged.encode(frames, torch.full((3,), 3))
    weights = mixed.component_logits.exp().unsqueeze(-1)
    torch.testing.assert_close(mixed.state, (weights * mixed.component_state).sum(3))


def test_with_a_generator_positions_are_drawn_from_the_posterior() -> None:
    model = build()
    frames = video(1).expand(2000, -1, -1, -1, -1)[:, :2]
    latents = model.encode(frames, torch.ones(2000, dtype=torch.long), generator=generator())
    drawn = latents.location[:, :, 0]
    std = (0.5 * latents.log_var[0, :, 0]).exp()
    assert ((drawn.mean(0) - latents.mean[0, :, 0]).abs() < 4 * std / 2000**0.5).all()
    torch.testing.assert_close(drawn.std(0), std, atol=0, rtol=0.08)


def parabola(length: int) -> tuple[Tensor, Tensor]:
    """States (t, n, 4) of two objects under one force, and that force."""
    step, force = 0.25, torch.tensor([0.02, -0.03, 0.1, -0.2], dtype=torch.float64)
    state = torch.tensor([[-1.0, 0.5, 2.0, 1.0], [3.0, -2.0, -1.5, 2.5]], dtype=torch.float64)
    rows = []
    for _ in range(length):
        rows.append(state)
        state = torch.cat([state[:, :2] + step * state[:, 2:], state[:, 2:]], 1) + force
    return torch.stack(rows), force


def ballistic(monkeypatch: pytest.MonkeyPatch, positions: Tensor, force: Tensor) -> SSM:
    """A model with known dynamics and hardly any noise, whose inference network says ``positions`` (t, n, 2)."""
    model = build(
        max_objects=2, initial_step=0.25, initial_var=1e4, transition_var=2e-8, emission_var=2e-6, num_components=2
    )
    with torch.no_grad():
        model.prior.force.copy_(force)
    told = iter(range(len(positions)))

    def say(frames: Tensor, state: Tensor) -> Inferred:
        mean = positions[[next(told) for _ in range(frames.shape[1])]].expand(len(frames), -1, -1, -1)
        return Inferred(mean, torch.full_like(mean, 1e-3), state)

    monkeypatch.setattr(model.inference, "forward", say)
    return model


def test_a_rollout_follows_the_exact_parabola(monkeypatch: pytest.MonkeyPatch) -> None:
    states, force = parabola(30)
    model = ballistic(monkeypatch, states[..., :2], force)
    latents = model.encode(video(1, 5), torch.tensor([2]))
    torch.testing.assert_close(latents.state[0, -1], states[4], atol=1e-4, rtol=0)
    future = model.rollout(latents, 25)
    torch.testing.assert_close(future.state[0], states[5:], atol=5e-4, rtol=0)
    assert torch.equal(future.location, future.state[..., :2])
    assert torch.equal(future.location, future.mean)
    again = model.rollout(model.rollout(latents, 10), 15)
    torch.testing.assert_close(again.state, future.state[:, 10:], atol=1e-9, rtol=0)
    torch.testing.assert_close(again.state_cov, future.state_cov[:, 10:], atol=1e-9, rtol=1e-9)


def test_a_gap_in_an_exact_parabola_is_filled_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    states, force = parabola(30)
    wrong = states[..., :2].clone()
    wrong[5:25] = 100.0  # what the network says of generated frames must not count
    model = ballistic(monkeypatch, wrong, force)
    filled = model.interpolate(video(1, 30), known(30, *range(5), *range(25, 30)), torch.tensor([2]))
    torch.testing.assert_close(filled.state[0], states, atol=2e-4, rtol=0)
    torch.testing.assert_close(filled.location[0], states[..., :2], atol=2e-4, rtol=0)


@pytest.mark.parametrize("how", ["best", "average"])
def test_sampled_rollouts_have_the_moments_of_the_forecast(how: Any) -> None:
    model = build(component=how)
    latents = model.encode(video(1), torch.tensor([2]))
    best = latents.component_logits.argmax(-1, keepdim=True)
    if how == "best":  # let the draws have the one component that the moments are of
        sure = torch.full_like(latents.component_logits, -torch.inf).scatter(-1, best, 0.0)
        latents = latents._replace(component_logits=sure)
    many = SSMLatents(*(field.expand(20_000, *field.shape[1:]) for field in latents))
    drawn = model.rollout(many, 3, generator=generator()).location[:, :, :2]
    mean = model.rollout(latents, 3)
    std = (0.5 * mean.log_var[0, :, :2]).exp()
    assert ((drawn.mean(0) - mean.mean[0, :, :2]).abs() < 4 * std / 20_000**0.5).all()
    torch.testing.assert_close(drawn.std(0), std, atol=0, rtol=0.03)


def test_interpolation_is_kalmans_smoother_on_the_means_of_seen_frames() -> None:
    model, frames, seen = build(), video(3, 9), known(9, 0, 1, 2, 7, 8)
    counts = torch.full((3,), 3)
    filled = model.interpolate(frames, seen, counts)
    prior, positions = model.prior(), filled.mean.transpose(1, 2)
    smoothed = kalman.smooth(prior, positions, seen, method="dense")
    weights = kalman.component_posterior(prior, positions, seen)
    mean, cov = kalman.mix(weights, smoothed.mean, smoothed.cov)
    torch.testing.assert_close(filled.state, mean.transpose(1, 2), atol=1e-8, rtol=0)
    torch.testing.assert_close(filled.state_cov, cov.transpose(1, 2), atol=1e-8, rtol=0)
    torch.testing.assert_close(filled.component_logits[:, 4], weights)
    hidden = ~seen
    assert torch.equal(filled.location[:, hidden], filled.state[:, hidden, :, :2])
    variances = (cov[..., :2, :2] + prior.emission_cov).diagonal(dim1=-2, dim2=-1).transpose(1, 2)
    torch.testing.assert_close(filled.log_var[:, hidden].exp(), variances[:, hidden], atol=1e-8, rtol=0)
    encoded = model.encode(frames[:, :3], counts)
    torch.testing.assert_close(filled.mean[:, :3], encoded.mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(filled.log_var[:, :3], encoded.log_var, atol=1e-12, rtol=0)

    first = model.interpolate(frames, seen, counts, component="first")
    best = encoded.component_logits[:, -1].argmax(-1)[..., None, None, None]
    torch.testing.assert_close(
        first.state, smoothed.mean.take_along_dim(best, 2)[:, :, 0].transpose(1, 2), atol=1e-8, rtol=0
    )


def test_interpolation_warms_the_network_with_generated_frames() -> None:
    model, frames, seen = build(), video(2, 9), known(9, 0, 1, 2, 7, 8)
    counts = torch.tensor([3, 2])
    generated = model.decode(model.rollout(model.encode(frames[:, :3], counts), 4)).video
    shown = torch.cat([frames[:, :3], generated, frames[:, 7:]], dim=1)[:, :, 0].flatten(2)
    wanted = model.inference(shown, model.inference.start(counts, 3))
    filled = model.interpolate(frames, seen, counts)
    present = filled.present.unsqueeze(-1)
    torch.testing.assert_close(filled.mean[:, 7:], (wanted.mean * present)[:, 7:], atol=1e-12, rtol=0)


def test_several_gaps_and_a_gap_at_the_end_are_filled() -> None:
    model, frames, counts = build(), video(2, 9), torch.tensor([3, 2])
    filled = model.interpolate(frames, known(9, 0, 1, 4, 5), counts)
    assert all(field.isfinite().all() for field in filled)
    whole = model.interpolate(frames, torch.ones(9, dtype=torch.bool), counts)
    encoded = model.encode(frames, counts)
    assert torch.equal(whole.location, encoded.location)
    torch.testing.assert_close(whole.component_state[:, -1], encoded.component_state[:, -1], atol=1e-9, rtol=0)
    ahead = model.interpolate(frames, known(9, 0, 1, 2, 3), counts, component="first")
    future = model.rollout(model.encode(frames[:, :4], counts), 5)
    torch.testing.assert_close(ahead.location[:, 4:], future.location, atol=1e-9, rtol=0)


@pytest.mark.parametrize("component", ["all", "first"])
def test_interpolated_paths_follow_the_generator(component: Any) -> None:
    model, seen = build(), known(6, 0, 1, 5)
    answers = [
        model.interpolate(video(), seen, MIXED, component=component, generator=generator(seed)) for seed in (0, 0, 1)
    ]
    for a, b in zip(answers[0], answers[1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(answers[0].location[:, 2:5], answers[2].location[:, 2:5])


# --- what is rendered


def test_frames_and_components_are_the_renderers_equations() -> None:
    model = build()
    latents = model.encode(video(), MIXED)
    scene = model.decode(latents, components=True)
    assert scene.masks is not None
    assert scene.components is not None
    for clip, n in enumerate(MIXED.tolist()):
        location = latents.location[clip]
        white = render(model, location, n).sigmoid().unflatten(-1, (8, 8))
        for channel in range(3):
            torch.testing.assert_close(scene.video[clip, :, channel], white)
        torch.testing.assert_close(scene.masks[clip, :, 0, 0], 1 - white)
        empty = render(model, location, 0).sigmoid().unflatten(-1, (8, 8))
        torch.testing.assert_close(scene.components[clip, :, 0, 0], empty)
        alone = [render(model, location[:, k : k + 1], 1).sigmoid().unflatten(-1, (8, 8)) for k in range(n)]
        for k, mine in enumerate(alone, start=1):
            torch.testing.assert_close(scene.components[clip, :, k, 1], mine)
            torch.testing.assert_close(scene.masks[clip, :, k, 0], white * mine / sum(alone))


# --- bad input


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([1, 2, 4]), r"must be 1 to max_objects=3, got 4; train a model with a larger model.max_objects"),
        (torch.tensor([0, 2, 1]), "must be 1 to max_objects=3, got 0"),
        (torch.tensor([1, 2]), r"whole numbers \(3,\), one for each clip, got torch.int64 \(2,\)"),
        (torch.tensor([1.0, 2.0, 3.0]), "got torch.float32"),
        (None, r"needs num_objects.* set model.known_count=false"),
    ],
)
def test_impossible_numbers_of_objects_are_refused(counts: Tensor | None, message: str) -> None:
    model = build()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=message):
            call(video(), counts)
    with pytest.raises(ValueError, match=message):
        model.interpolate(video(), known(6, 0), counts)


def test_frames_that_are_not_binary_are_refused_unless_a_threshold_is_set() -> None:
    grey = 0.3 + 0.5 * video()
    for verb in (build(), build().encode):
        with pytest.raises(ValueError, match="frames must be binary"):
            verb(grey, MIXED)
    model = build(threshold=0.5)
    for a, b in zip(model.encode(grey, MIXED), build().encode(video(), MIXED), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (known(5, 0), r"each of the video's 6 frames .* got torch.bool \(5,\)"),
        (torch.ones(6), r"bool \(6,\), got torch.float32"),
        (known(6, 1, 2), "first frame must be seen"),
    ],
)
def test_frames_that_cannot_be_known_are_refused(seen: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().interpolate(video(), seen, MIXED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_objects": 0}, "max_objects must be at least 1, got 0"),
        ({"num_components": 0}, "num_components must be at least 1"),
        ({"initial_step": 0.0}, "initial_step must be positive and finite"),
        ({"transition_var": 1e-9}, "transition_var must be more than 1e-08, its floor"),
        ({"emission_var": math.inf}, "emission_var must be more than 1e-06, its floor, and finite"),
        ({"frozen_steps": -1}, "frozen_steps must be 0"),
        ({"kl_weight": 0.0}, "kl_weight must be positive"),
        ({"threshold": 1.0}, r"threshold is a brightness in \(0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSMConfig(**settings)
