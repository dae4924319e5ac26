from typing import NamedTuple

import pytest
import torch

from objdyn.layers.particles import (
    BackgroundDecoder,
    BackgroundEncoder,
    GlimpseDecoder,
    PatchPrior,
    Stitched,
    background_mask,
    log2_exact,
    stitch,
)


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
