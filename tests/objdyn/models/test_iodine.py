"""IODINE against autograd, against itself with other K, order and frames, and against published sizes."""

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from objdyn.distributions import gaussian_kl
from objdyn.layers import mixture
from objdyn.models.iodine import IODINE, IODINEConfig, Posterior, Refiner, cell_weight

TINY = IODINEConfig(
    image_size=8,
    num_slots=3,
    slot_dim=4,
    num_refinements=3,
    decoder_channels=(6, 6),
    refine_channels=(6, 6),
    refine_dim=8,
    likelihood_weight=2.0,
    kl_weight=0.7,
    entropy_weight=0.3,
)


def build(seed: int = 0, **settings: Any) -> IODINE:
    torch.manual_seed(seed)
    return IODINE(dataclasses.replace(TINY, **settings)).eval()


def video(b: int = 2, t: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(b, t, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_default_sizes_have_the_parameters_of_the_baselines_code() -> None:
    count = sum(p.numel() for p in IODINE(IODINEConfig()).parameters())
    assert count == 2_648_324


def test_the_gradient_that_refinement_sees_is_that_of_the_cells_loss() -> None:
    model = build()
    refiner, noise = model.refiner, torch.randn(2, 3, 4)
    frame = video()[:, 0]
    mean, log_var = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    prior = Posterior(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    rendering = mixture.render(refiner.logits(Posterior(mean, log_var).sample(noise)))
    e = torch.exp(-(frame.unsqueeze(1) - rendering.means).square() / (2 * TINY.likelihood_var))
    nll = -(rendering.masks * e).sum(1).log().sum()
    entropy = -(rendering.masks * rendering.masks.log()).sum()
    kl = gaussian_kl(mean, log_var, *prior).sum()
    loss = 2.0 * nll + 0.7 * kl + 0.3 * entropy
    wanted = torch.cat(torch.autograd.grad(loss, (mean, log_var)), dim=-1)
    posterior = Posterior(mean, log_var)
    sight = refiner.look(refiner.see(frame), posterior, noise, prior=prior)
    assert sight.grad_slots is not None
    found = refiner._posterior_gradient(sight.grad_slots, posterior, noise, prior)
    torch.testing.assert_close(found, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=1e-5)
    torch.testing.assert_close(sight.loss.sum(), loss, atol=0, rtol=1e-5)


class Beside(nn.Module):
    """A decoder's input that depends on a temporal state, as PROVIDE's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4 + 8, 4)

    def forward(self, slots: Tensor, state: Tensor) -> Tensor:
        return slots + self.linear(torch.cat([slots, state], dim=-1))


class Inputs(NamedTuple):
    """What a refinement is given."""

    shared: Tensor
    """Maps of the frame: frame, rows, columns, likelihood."""
    slots: Tensor
    """Maps of each slot, in the order of ``SLOT_MAPS``."""
    vector: Tensor
    """Posterior and its gradient."""


SLOT_MAPS = {
    "means": slice(0, 3),
    "masks": slice(3, 4),
    "mask logits": slice(4, 5),
    "gradient of the means": slice(5, 8),
    "gradient of the masks": slice(8, 9),
    "mask posterior": slice(9, 10),
    "likelihood without the slot": slice(10, 11),
}


def layer_norm(maps: Tensor, *axes: int) -> Tensor:
    centred = maps - maps.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()


def written_out(
    refiner: Refiner,
    frame: Tensor,
    posterior: Posterior,
    noise: Tensor,
    prior: Posterior | None = None,
    context: Tensor | None = None,
    bound: float | None = None,
) -> Inputs:
    """The refinement's inputs from their definitions, in fp64, every gradient from autograd."""
    config, networks = refiner.config, copy.deepcopy(refiner).double()
    n, k, _ = noise.shape
    x = frame.double()
    mean, log_var = (field.detach().double().requires_grad_() for field in posterior)
    z = mean + (log_var / 2).exp() * noise.double()
    vector = z if networks.vector is None else networks.vector(z, context if context is None else context.double())
    maps = networks.decoder(vector.flatten(0, 1)).unflatten(0, (n, k))
    means, logits = maps[:, :, :3].sigmoid(), maps[:, :, 3:]
    masks = logits.exp() / logits.exp().sum(1, keepdim=True)
    e = (-(x.unsqueeze(1) - means).square() / (2 * config.likelihood_var)).exp()
    alone = e.prod(2, keepdim=True)
    explained = e if config.mixture == "per_channel" else alone
    likelihood = (masks * explained).sum(1).log().sum(1, keepdim=True)
    entropy = -(masks * masks.log()).sum()
    p = Normal(torch.zeros(()).double(), 1.0)
    if prior is not None:
        p = Normal(prior.mean.double(), (prior.log_var.double() / 2).exp())
    kl = kl_divergence(Normal(mean, (log_var / 2).exp()), p).sum()
    loss = -config.likelihood_weight * likelihood.sum() + config.kl_weight * kl + config.entropy_weight * entropy
    limit = float("inf") if bound is None else bound
    of_means, of_masks, of_mean, of_log_var = (
        gradient.clamp(-limit, limit) for gradient in torch.autograd.grad(loss, (means, masks, mean, log_var))
    )
    per_slot = [
        means,
        masks,
        logits,
        layer_norm(of_means, 2, 3, 4),
        layer_norm(of_masks, 2, 3, 4),
        alone / alone.sum(1, keepdim=True) if config.mask_posterior == "log" else alone.softmax(1),
    ]
    if config.leave_one_out:
        left = [[j for j in range(k) if j != i] for i in range(k)]
        others = [(masks * explained)[:, some].sum(1) / masks[:, some].sum(1) for some in left]
        per_slot.append(layer_norm(torch.stack([each.log().sum(1, keepdim=True) for each in others], 1), 2, 3, 4))
    line = torch.linspace(-1, 1, x.shape[-1]).double()
    rows, columns = line.view(1, 1, -1, 1).expand_as(x[:, :1]), line.view(1, 1, 1, -1).expand_as(x[:, :1])
    of_posterior = layer_norm(torch.cat([of_mean, of_log_var], dim=-1), 2)
    return Inputs(
        torch.cat([x, rows, columns, layer_norm(likelihood, 1, 2, 3)], dim=1).detach(),
        torch.cat(per_slot, dim=2).detach(),
        torch.cat([mean, log_var, of_posterior], dim=-1).detach(),
    )


class Cell(NamedTuple):
    """A refiner with all that one cell depends on."""

    refiner: Refiner
    frame: Tensor
    posterior: Posterior
    noise: Tensor
    prior: Posterior
    context: Tensor
    seen: list[tuple[Tensor, Tensor]]
    """Filled with what the CNN is given."""


def cell(**settings: Any) -> Cell:
    torch.manual_seed(0)
    refiner = Refiner(dataclasses.replace(TINY, **settings), vector=Beside())
    posterior = Posterior(torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True))
    prior, noise = Posterior(torch.randn(2, 3, 4), torch.randn(2, 3, 4)), torch.randn(2, 3, 4)
    seen: list[tuple[Tensor, Tensor]] = []
    refiner.cnn.register_forward_pre_hook(lambda _, maps: seen.append(maps))
    return Cell(refiner, video()[:, 0], posterior, noise, prior, torch.randn(2, 3, 8, requires_grad=True), seen)


def assert_given(found: Tensor, wanted: Tensor) -> None:
    """In fp32 against fp64: inputs are of the order of 1, and normalising enlarges what the rounding did."""
    torch.testing.assert_close(found.double(), wanted, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("bound", [None, 0.2])
@pytest.mark.parametrize(
    "settings", [{}, {"mixture": "per_pixel", "mask_posterior": "reference", "leave_one_out": True, "recompute": True}]
)
def test_the_refinement_is_given_its_inputs_as_they_are_defined(settings: dict[str, Any], bound: float | None) -> None:
    refiner, frame, posterior, noise, prior, context, seen = cell(**settings)
    scene = refiner.see(frame)
    sight = refiner.look(scene, posterior, noise, prior=prior, context=context)
    described = refiner.describe(scene, sight, posterior, noise, prior=prior, bound=bound)
    wanted = written_out(refiner, frame, posterior, noise, prior, context, bound)
    (shared, slots), *_ = seen
    assert_given(shared, wanted.shared)
    assert_given(slots, wanted.slots)
    assert_given(described[..., :16], wanted.vector)
    torch.testing.assert_close(described[..., 16:], refiner.cnn(shared, slots))
    if bound is not None:  # not so wide that nothing is clamped
        free = written_out(refiner, frame, posterior, noise, prior, context)
        for name in ("gradient of the means", "gradient of the masks"):
            channels = SLOT_MAPS[name]
            assert not torch.allclose(free.slots[:, :, channels], wanted.slots[:, :, channels], atol=0.1)
        assert not torch.allclose(free.vector, wanted.vector, atol=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_and_likelihoods_are_given_detached_and_the_rest_is_not(recompute: bool) -> None:
    refiner, frame, posterior, noise, prior, context, seen = cell(leave_one_out=True, recompute=recompute)
    scene = refiner.see(frame)
    sight = refiner.look(scene, posterior, noise, prior=prior, context=context)
    described = refiner.describe(scene, sight, posterior, noise, prior=prior)
    (shared, slots), *_ = seen
    assert not shared.requires_grad
    weights = torch.randn_like(slots)
    detached = {"gradient of the means", "gradient of the masks", "likelihood without the slot"}
    for name, channels in SLOT_MAPS.items():
        value = (weights * slots)[:, :, channels].sum()
        for gradient in torch.autograd.grad(value, (*posterior, context), retain_graph=True):
            assert (gradient == 0).all() if name in detached else (gradient != 0).any(), name
    for channels, wanted in ((slice(0, 4), (1, 0)), (slice(4, 8), (0, 1)), (slice(8, 16), (0, 0))):
        found = torch.autograd.grad(described[..., channels].sum(), posterior, retain_graph=True)
        for gradient, value in zip(found, wanted, strict=True):
            assert (gradient == value).all()


@pytest.mark.parametrize(
    "settings", [{}, {"inference": "sequential"}, {"inference": "sequential", "sequential_clamp": 0.05}]
)
def test_every_cell_hands_the_inputs_of_its_frame_and_posterior_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**settings)
    looked: list[tuple[Any, Posterior, Tensor]] = []
    maps: list[tuple[Tensor, Tensor]] = []
    vectors: list[Tensor] = []
    look = model.refiner.look

    def note(*arguments: Any, **named: Any) -> Any:
        looked.append(arguments)
        return look(*arguments, **named)

    monkeypatch.setattr(model.refiner, "look", note)
    model.refiner.cnn.register_forward_pre_hook(lambda _, given: maps.append(given))
    model.lstm.register_forward_pre_hook(lambda _, given: vectors.append(given[0]))
    with torch.no_grad():
        model.encode(video(t=3))
    assert len(looked) == len(maps) == len(vectors) == (2 if not settings else 3)
    for (scene, posterior, noise), (shared, slots), vector in zip(looked, tuple(maps), vectors, strict=True):
        wanted = written_out(model.refiner, scene.frame, posterior, noise, bound=settings.get("sequential_clamp"))
        assert_given(shared, wanted.shared)
        assert_given(slots, wanted.slots)
        assert_given(vector[:, :16], wanted.vector.flatten(0, 1))
        torch.testing.assert_close(vector[:, 16:], model.refiner.cnn(shared, slots).flatten(0, 1))


def test_sequential_inference_clamps_its_updates() -> None:
    for bound in (None, 0.05):
        with torch.no_grad():
            latents = build(inference="sequential", sequential_clamp=bound).encode(video(t=4))
        for field in (latents.mean, latents.log_var):
            largest = float(field.diff(dim=1).abs().max())
            assert largest > 0.06 if bound is None else largest == pytest.approx(bound, rel=1e-3)


def test_permuting_the_first_draw_permutes_the_slots() -> None:
    model = build()
    noise, order = torch.randn(2, 3, 4), [2, 0, 1]
    frames = video()[:, 0]
    with torch.no_grad():
        plain = model._infer(frames, noise, None)
        permuted = model._infer(frames, noise[:, order], None)
    for a, b in zip(plain, permuted, strict=True):
        torch.testing.assert_close(a[:, order], b, atol=1e-5, rtol=1e-4)


def test_the_number_of_slots_may_change_after_training() -> None:
    model, more = build(), build(num_slots=7)
    more.load_state_dict(model.state_dict())
    with torch.no_grad():
        scene = more.decode(more.encode(video(t=2)), components=True)
    assert scene.masks is not None
    assert scene.masks.shape == (2, 2, 7, 1, 8, 8)
    torch.testing.assert_close(scene.masks.sum(2), torch.ones(2, 2, 1, 8, 8))


def test_sequential_inference_on_one_frame_repeated_is_inference_with_so_many_refinements() -> None:
    for refinements in (2, 3, 5):
        usual = build(num_refinements=refinements)
        sequential = build(num_refinements=refinements, inference="sequential")
        frame = video()
        with torch.no_grad():
            wanted = usual.encode(frame)
            found = sequential.encode(frame.expand(-1, refinements, -1, -1, -1))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a[:, -1:], b)


def test_sequential_inference_answers_before_it_sees_the_frame() -> None:
    model = build(inference="sequential")
    clip, other = video(t=3), video(t=3)
    other[:, 2] = 0
    with torch.no_grad():
        for a, b in zip(model.encode(clip), model.encode(other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [{}, {"leave_one_out": True, "refine": "strided", "mixture": "per_pixel"}])
def test_recomputation_changes_no_loss_and_no_gradient(settings: dict[str, Any]) -> None:
    results = []
    for recompute in (False, True):
        model = build(recompute=recompute, **settings).train()
        torch.manual_seed(1)
        loss = model(video())
        loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_first_draw_is_shared_by_the_frames_of_a_clip() -> None:
    model = build()
    still = video().expand(-1, 4, -1, -1, -1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        alike = model.encode(still)
        sampled = build(num_refinements=2).encode(still, generator=generator)
    torch.testing.assert_close(alike.mean[:, 0], alike.mean[:, 3])
    torch.testing.assert_close(sampled.mean[:, 0], sampled.mean[:, 3])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("ramp", [0.25, 0.5, 0.75, 1.0]),
        ("linspace", [0.0, 1 / 3, 2 / 3, 1.0]),
        ("reference", [1 / 6, 2 / 6, 0.5, 4 / 6]),
        ("uniform", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_weights_of_the_cells(kind: Any, wanted: list[float]) -> None:
    config = IODINEConfig(cell_weights=kind, num_refinements=6)
    assert [cell_weight(config, index, 4) for index in range(4)] == pytest.approx(wanted)


def test_extra_features_reach_the_refinement_and_are_not_trained() -> None:
    seen = torch.nn.Conv2d(3, 5, 3, stride=2)
    config = dataclasses.replace(TINY, extra_channels=5)
    model = IODINE(config, extra_features=seen)
    model(video()).total.backward()
    assert seen.weight.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if "extra_features" not in name)
    with pytest.raises(ValueError, match="do not fit: give both"):
        IODINE(config)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_model_infers_alike_with_and_without_gradients_enabled(recompute: bool) -> None:
    model = build(recompute=recompute)
    with torch.no_grad():
        wanted = [*model.encode(video()), model(video()).total]
    model.requires_grad_(False)
    found = [*model.encode(video()), model(video()).total]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", ["refiner.initial", "refiner.decoder", "refiner.cnn", "refiner.head", "lstm"])
def test_a_part_trained_alone_gets_the_gradient_that_it_gets_among_all(part: str, recompute: bool) -> None:
    gradients = []
    for others in (True, False):
        model = build(recompute=recompute).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(others or name.startswith(part))
        torch.manual_seed(1)
        model(video()).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if name.startswith(part)})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": "stride"}, "^refine must be 'full' or 'strided', got 'stride'$"),
        ({"refine_pool": "max"}, "^refine_pool must be 'flatten' or 'mean', got 'max'$"),
        ({"mixture": "pixel"}, "^mixture must be 'per_channel' or 'per_pixel', got 'pixel'$"),
        ({"mask_posterior": "softmax"}, "^mask_posterior must be 'log' or 'reference', got 'softmax'$"),
        ({"cell_weights": "flat"}, "^cell_weights must be 'ramp' or .* or 'uniform', got 'flat'$"),
        ({"conv_init": "fan"}, "^conv_init must be 'default' or 'fan_in', got 'fan'$"),
        ({"inference": "seq"}, "^inference must be 'per_frame' or 'sequential', got 'seq'$"),
        ({"num_slots": 1}, "num_slots must be at least 2 .* got 1"),
        ({"num_refinements": 0}, "num_refinements must be at least 1, got 0"),
        ({"image_size": 30}, "image_size must be a multiple of 4"),
        ({"likelihood_var": 0.0}, "likelihood_var must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more"),
        ({"likelihood_weight": float("nan")}, "likelihood_weight must be 0 or more and finite, got nan"),
        ({"sequential_clamp": -1.0}, "sequential_clamp must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"built for video \(b, t, 3, 8, 8\), got \(1, 1, 3, 16, 16\)"):
        build()(torch.rand(1, 1, 3, 16, 16))


def test_sequential_inference_is_not_trained() -> None:
    with pytest.raises(ValueError, match="is for test only"):
        build(inference="sequential").train()(video())
