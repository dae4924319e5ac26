"""IODINE against autograd, against itself with other K, order and frames, and against published sizes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from objdyn.distributions import gaussian_kl
from objdyn.layers import mixture
from objdyn.models.iodine import IODINE, IODINEConfig, Posterior, cell_weight

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
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sight.loss.sum(), loss, atol=1e-3, rtol=1e-5)


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
        ({"cell_weights": "flat"}, "^cell_weights must be 'ramp' or 'linspace' or 'reference', got 'flat'$"),
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
