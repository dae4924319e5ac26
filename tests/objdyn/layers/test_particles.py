from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from objdyn.layers import particles as particles_module
from objdyn.layers.particles import (
    BackgroundDecoder,
    BackgroundEncoder,
    GlimpseDecoder,
    PatchPrior,
    Stitched,
    background_mask,
    compose,
    log2_exact,
    stitch,
)
from objdyn.layers.spatial import cut_glimpses, paste_glimpses
from pipeline import textbook_ddlp


@pytest.mark.parametrize(("size", "power"), [(1, 0), (8, 3), (64, 6), (1024, 10)])
def test_log2_is_exact(size: int, power: int) -> None:
    assert log2_exact(size) == power


@pytest.mark.parametrize("size", [0, 15, 48])
def test_log2_refuses_other_numbers(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two, got {size}"):
        log2_exact(size)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_glimpse_decoder_has_the_size_asked_for(size: int) -> None:
    assert GlimpseDecoder(3, size)(torch.zeros(2, 3)).shape == (2, 4, size, size)


@pytest.mark.parametrize(("size", "levels"), [(32, 3), (64, 3), (128, 4), (256, 5)])
def test_background_goes_in_and_out_at_the_same_size(size: int, levels: int) -> None:
    channels = (4, 8, 8, 8, 8)[:levels]
    mean, log_var = BackgroundEncoder(size, channels, 5)(torch.rand(1, 3, size, size))
    assert mean.shape == log_var.shape == (1, 5)
    assert BackgroundDecoder(5, size, channels)(mean).shape == (1, 3, size, size)


def test_proposals_lie_in_their_patches_ranked_by_certainty() -> None:
    torch.manual_seed(0)
    prior = PatchPrior(32, 8, (4, 4, 4), 16, "variance")
    torch.nn.init.normal_(prior.cnn[-1].weight, 0, 5)  # type: ignore[arg-type]
    proposals = prior(torch.rand(2, 3, 32, 32))
    assert proposals.shape == (2, 16, 2)
    pixels = (proposals + 1) / 2 * 31
    patches = (pixels / 8).floor().long()
    for one in patches:
        assert len({tuple(p.tolist()) for p in one}) == 16  # one proposal in each patch
    few = PatchPrior(32, 8, (4, 4, 4), 5, "variance")
    few.load_state_dict(prior.state_dict())
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(few(images), prior(images)[:, :5])


def test_background_mask_removes_squares() -> None:
    position = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    mask = background_mask(position, torch.tensor([[0.25, 0.5]]), 16, 64)
    assert mask.shape == (1, 1, 64, 64)
    torch.testing.assert_close(mask[0, 0, 24:40, 24:40], torch.full((16, 16), 0.25))
    assert (mask == 1).sum() == 64 * 64 - 16 * 16


class Particles(NamedTuple):
    glimpses: torch.Tensor
    position: torch.Tensor
    scale: torch.Tensor
    depth: torch.Tensor
    transparency: torch.Tensor

    def over(self, background: torch.Tensor) -> Stitched:
        return stitch(self.glimpses, self.position, self.scale, self.depth, self.transparency, background)


def one_particle(alpha: float, depth: float = 0.0, transparency: float = 1.0, value: float = 1.0) -> Particles:
    return Particles(
        torch.cat([torch.full((1, 1, 1, 8, 8), alpha), torch.full((1, 1, 3, 8, 8), value)], dim=2),
        torch.zeros(1, 1, 2),
        torch.full((1, 1, 2), 0.5),
        torch.full((1, 1), depth),
        torch.full((1, 1), transparency),
    )


def test_stitch_of_an_opaque_particle_covers_the_background() -> None:
    result = one_particle(1.0).over(torch.full((1, 3, 32, 32), 0.2))
    assert result.video[0, 0, 16, 16].item() == pytest.approx(1.0, abs=1e-4)
    assert result.video[0, 0, 0, 0].item() == pytest.approx(0.2)


def test_stitch_follows_the_equation_for_two_overlapping_particles() -> None:
    first, second = one_particle(0.9, depth=-1.0, value=1.0), one_particle(0.6, 0.5, 0.5, value=0.4)
    both = Particles(*(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)))
    result = both.over(torch.full((1, 3, 32, 32), 0.2))
    a = torch.tensor([0.9, 0.6 * 0.5])
    importance = a * torch.sigmoid(torch.tensor([1.0, -0.5]))
    share = a * importance / (importance.sum() + 1e-5)
    expected = (1 - share.sum()) * 0.2 + share[0] * 1.0 + share[1] * 0.4
    assert result.video[0, 0, 16, 16].item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(result.masks.sum(1) + result.background_mask, torch.ones(1, 1, 32, 32))


def test_invisible_particles_leave_the_background() -> None:
    background = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = one_particle(1.0, transparency=0.0).over(background)
    torch.testing.assert_close(result.video, background)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def particles(n: int = 3, k: int = 4, spread: float = 0.8) -> Inputs:
    """Glimpses, position, scale, depth, transparency and a background, which all want a gradient."""
    g = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    fields = (
        uniform(n, k, 4, 8, 8),
        spread * (2 * uniform(n, k, 2) - 1),
        0.1 + 0.4 * uniform(n, k, 2),
        uniform(n, k) - 0.5,
        uniform(n, k),
        uniform(n, 3, 32, 32),
    )
    for field in fields:
        field.requires_grad_(True)
    return fields


@pytest.mark.parametrize("n", [1, 8, 19])
@pytest.mark.parametrize("spread", [0.8, 1.5, 4.0])
def test_composing_a_few_frames_at_a_time_equals_full_canvases_with_all_gradients(
    n: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(particles_module, "CANVAS_BYTES", 8 * 4 * 4 * 32 * 32 * 8)  # of 8 frames
    inputs = particles(n, spread=spread)
    weights = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def outcome(video: torch.Tensor) -> list[torch.Tensor]:
        return [video, *torch.autograd.grad((weights * video).sum(), inputs)]

    slow = outcome(textbook_ddlp.stitch(*inputs).video)
    torch.testing.assert_close(stitch(*inputs).video, slow[0])
    for a, b in zip(outcome(compose(*inputs)), slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_composing_with_noise_on_alpha_equals_full_canvases_with_the_same_noise() -> None:
    inputs = particles(3)

    def outcome(video: torch.Tensor) -> list[torch.Tensor]:
        return [video, *torch.autograd.grad(video.square().sum(), inputs)]

    torch.manual_seed(0)
    fast = outcome(compose(*inputs, alpha_noise=0.1))
    torch.manual_seed(0)
    noise = torch.randn(3, 4, 32, 1, 32, dtype=torch.float64).transpose(2, 3)
    slow = outcome(textbook_ddlp.stitch(*inputs, alpha_noise=0.1, noise=noise).video)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_composing_keeps_no_canvas_of_a_particle_for_the_backward_pass() -> None:
    inputs = particles(16, 6)

    def kept(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        return sum(seen.values()), out

    canvas = 16 * 6 * 4 * 32 * 32 * 8
    assert kept(lambda: compose(*inputs))[0] < canvas < kept(lambda: textbook_ddlp.stitch(*inputs).video)[0]


def test_background_mask_equals_squares_drawn_one_by_one() -> None:
    _, position, _, _, transparency, _ = particles(4, 5, spread=1.2)
    fast = background_mask(position.float(), transparency.float(), 8, 32)
    torch.testing.assert_close(fast, textbook_ddlp.background_mask(position.float(), transparency.float(), 8, 32))


def test_cutting_and_pasting_equal_a_spatial_transformer_of_copies() -> None:
    glimpses, position, scale, _, _, images = particles(3, 5, spread=1.2)
    torch.testing.assert_close(
        cut_glimpses(images, position, scale, 8), textbook_ddlp.cut_glimpses(images, position, scale, 8)
    )
    torch.testing.assert_close(
        paste_glimpses(glimpses, position, scale, 32, 24),
        textbook_ddlp.paste_glimpses(glimpses, position, scale, 32, 24),
    )


def test_background_mask_stays_in_fp32_under_autocast() -> None:
    _, position, _, _, transparency, _ = particles(2, 3)
    arguments = (position.float(), transparency.float(), 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mask = background_mask(*arguments)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, background_mask(*arguments))
