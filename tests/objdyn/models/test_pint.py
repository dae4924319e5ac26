"""PINT: its attention, and rollouts that compute only what is new."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from objdyn.models import pint
from objdyn.models.ddlp import DDLP, DDLPConfig, _draw, _later
from objdyn.models.dlp import Particles
from objdyn.models.pint import PINT, PINTBlock, PINTWindow
from pipeline.presets import PRESETS

DEBUG = PRESETS["ddlp"]["debug"].model
T = 5


def build(**changes: Any) -> DDLP:
    assert isinstance(DEBUG, DDLPConfig)
    torch.manual_seed(0)
    model = DDLP(dataclasses.replace(DEBUG, pint_layers=3, pint_bias_init_std=1.0, **changes)).eval()
    for parameter in model.pint.parameters():  # as released, predictions hardly depend on the layers
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


def latents(frames: int, clips: int = 2, k: int = 4) -> Particles:
    shapes = ((k, 2), (k, 2), (k,), (k,), (k, 3), (3,))
    generator = torch.Generator().manual_seed(frames)
    drawn = [torch.randn(clips, frames, *shape, generator=generator) for shape in shapes]
    drawn[3] = drawn[3].sigmoid()
    return Particles(*drawn)


def encode_anew(model: DDLP, context: Particles, horizon: int, seed: int | None) -> Particles:
    """A rollout that puts the last T frames through PINT in every step."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    history = context
    for _ in range(horizon):
        last = _later(model.pint(history.frames(-T, None)), -1)
        new = _draw(last, last.attributes.position, sample=seed is not None, generator=generator)
        history = Particles(*(torch.cat(pair, dim=1) for pair in zip(history, new, strict=True)))
    return history.frames(-horizon, None)


@pytest.mark.parametrize("place", ["relative", "learned"])
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(("frames", "horizon"), [(1, 3), (2, 8), (4, 1), (5, 1), (5, 7), (8, 6)])
def test_a_rollout_equals_encoding_the_window_anew(frames: int, horizon: int, seed: int | None, place: str) -> None:
    model = build(pint_position=place)
    context = latents(frames)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = model.rollout(context, horizon, generator=generator)
        expected = encode_anew(model, context, horizon, seed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (expected.position - context.position[:, -1:]).abs().mean() > 0.01  # something moves


@pytest.mark.parametrize("layers", [1, 2])
def test_a_rollout_of_few_layers_equals_encoding_anew(layers: int) -> None:
    torch.manual_seed(0)
    assert isinstance(DEBUG, DDLPConfig)
    model = DDLP(dataclasses.replace(DEBUG, pint_layers=layers)).eval()
    with torch.no_grad():
        for a, b in zip(model.rollout(latents(3), 6), encode_anew(model, latents(3), 6, None), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_rollout_with_gradients_gives_the_same_frames_and_reaches_the_context() -> None:
    model, context = build(), latents(4)
    with torch.no_grad():
        expected = model.rollout(context, 4)
    moved = context._replace(position=context.position.clone().requires_grad_())
    found = model.rollout(moved, 4)
    torch.testing.assert_close(found.position.detach(), expected.position, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.position[:, -1].sum(), moved.position)
    assert gradient[:, 0].abs().max() > 0


def test_a_rollout_follows_the_weights_as_they_are_now() -> None:
    model, context = build(), latents(4)
    with torch.no_grad():
        model.rollout(context, 3)
        other = build(pint_dim=16)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        model.load_state_dict(other.state_dict())
        for a, b in zip(model.rollout(context, 3), encode_anew(model, context, 3, None), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_without_the_operators_that_keep_a_layout_rollouts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context = build(), latents(4)
    with torch.no_grad():
        packed = model.rollout(context, 4)
        monkeypatch.setattr(pint, "_can_pack", lambda: False)
        plain = model.rollout(context, 4)
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_rollout_under_autocast_is_near_that_in_fp32() -> None:
    model, context = build(), latents(6)
    with torch.no_grad():
        exact = model.rollout(context, 2)
        with torch.autocast("cpu", torch.bfloat16):
            coarse, expected = model.rollout(context, 2), encode_anew(model, context, 2, None)
    for a, b, c in zip(coarse, expected, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)
        torch.testing.assert_close(a, c, atol=0.2, rtol=0.1)


def test_a_step_looks_at_the_last_frames_and_no_further() -> None:
    model = build()
    with torch.no_grad():
        window = PINTWindow(model.pint, latents(8), horizon=1)
        found, expected = window.predict(), model.pint(latents(8).frames(-T, None))
    torch.testing.assert_close(found.attributes.position[:, 0], expected.attributes.position[:, -1])


def naive_block(block: PINTBlock, tokens: Tensor, entities: int, max_frames: int, frames: int) -> Tensor:
    """Attention as written: logits, then bias, then the mask, then softmax, for this layer alone."""
    b, n, d = tokens.shape
    normed = block.norm_attention(tokens)
    q, k, v = (f(normed).view(b, n, block.heads, -1).transpose(1, 2) for f in (block.query, block.key, block.value))
    logits = q @ k.transpose(-1, -2) / (d // block.heads) ** 0.5
    for row in range(n):
        for column in range(n):
            t, u, i, j = row // entities, column // entities, row % entities, column % entities
            if u > t:
                logits[:, :, row, column] = float("-inf")
            elif hasattr(block, "time_bias"):
                bias = block.time_bias[:, max_frames - 1 + u - t] + block.entity_bias[:, entities - 1 + j - i]
                logits[:, :, row, column] += bias
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
    tokens = tokens + block.out(mixed)
    return tokens + block.mlp(block.norm_mlp(tokens))


@pytest.mark.parametrize("place", ["relative", "learned"])
def test_pint_equals_its_layers_one_by_one(place: Any) -> None:
    torch.manual_seed(0)
    model = PINT(2, 4, 3, 3, dim=8, layers=2, heads=2, dropout=0.1, bias_init_std=1.0, place=place).eval()
    context = latents(3, k=2)
    with torch.no_grad():
        tokens = model.embed(context)
        if place == "learned":
            tokens = tokens + model.frame_place[:3, None] + model.entity_place
        tokens = tokens.flatten(1, 2)
        for block in model.layers:
            tokens = naive_block(block, tokens, 3, 4, 3)
        expected = model.read(tokens.unflatten(1, (3, 3)), context)
        found = model(context)
    torch.testing.assert_close(found.attributes, expected.attributes)
    torch.testing.assert_close(found.features, expected.features)


def test_learned_places_tell_frames_and_particles_apart() -> None:
    model = build(pint_position="learned").pint
    assert [name for name, _ in model.named_parameters() if name.endswith("_bias")] == []
    same = Particles(*(field[:, :1].expand(-1, 3, *field.shape[2:]) for field in latents(1)))
    with torch.no_grad():
        found = model(same).attributes.position - same.position
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3
    swapped = Particles(*(field.flip(2) for field in same[:-1]), background=same.background)
    with torch.no_grad():
        other = model(swapped).attributes.position - swapped.position
    assert (other.flip(2) - found).abs().max() > 1e-3


def test_dropout_applies_in_training_alone() -> None:
    torch.manual_seed(0)
    block = PINTBlock(dim=8, heads=2, entities=3, max_frames=2, dropout=0.5)
    tokens, bias = torch.randn(1, 6, 8), torch.zeros(1, 2, 6, 6)
    assert not torch.equal(block.train()(tokens, bias), block(tokens, bias))
    assert torch.equal(block.eval()(tokens, bias), block(tokens, bias))
