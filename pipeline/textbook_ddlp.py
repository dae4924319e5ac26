"""The image side of DDLP as its equations read, for tests and the benchmark: what the fast forms must be equal to.

Every function takes what the fast one of the same name takes (``conv_chain`` what ``ConvChain.forward`` does) and gives
the same result, at the price of full-size copies for every particle. ``textbook_pint.py`` has the other side.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.layers.particles import Stitched


def conv_chain(layers: nn.Sequential, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """One layer after the other, each keeping for the backward pass what it needs."""
    for layer in _layers(layers):
        x = layer(x)
    return x


def cut_glimpses(
    images: Float[Tensor, "n c h w"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    size: int,
) -> Float[Tensor, "n k c s s"]:
    """A copy of the image for each glimpse, sampled on the glimpse's grid (DDLP's spatial transformer)."""
    n, k = position.shape[:2]
    copies = images.unsqueeze(1).expand(-1, k, -1, -1, -1).flatten(0, 1).contiguous()
    theta = _affine(scale.flatten(0, 1), position.flatten(0, 1))
    grid = F.affine_grid(theta, [n * k, images.shape[1], size, size], align_corners=True)
    return F.grid_sample(copies, grid, align_corners=True).unflatten(0, (n, k))


def paste_glimpses(
    glimpses: Float[Tensor, "n k c s s"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    height: int,
    width: int,
) -> Float[Tensor, "n k c h w"]:
    """A canvas for each glimpse, sampled from it on the inverse grid."""
    n, k, c = glimpses.shape[:3]
    inverse = 1 / (scale + 1e-9)
    theta = _affine(inverse.flatten(0, 1), (-position * inverse).flatten(0, 1))
    grid = F.affine_grid(theta, [n * k, c, height, width], align_corners=True)
    return F.grid_sample(glimpses.flatten(0, 1), grid, align_corners=True).unflatten(0, (n, k))


def stitch(
    glimpses: Float[Tensor, "n k 4 s s"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    depth: Float[Tensor, "n k"],
    transparency: Float[Tensor, "n k"],
    background: Float[Tensor, "n c h w"],
    alpha_noise: float = 0.0,
    noise: Float[Tensor, "n k 1 h w"] | None = None,
) -> Stitched:
    """Every particle on a full canvas of its own, then the sums over particles (DDLP, appendix D.4); ``noise`` may be
    given."""
    canvas = paste_glimpses(glimpses, position, scale, background.shape[-2], background.shape[-1]).clamp(0, 1)
    alpha, rgb = canvas[:, :, :1], canvas[:, :, 1:]
    if alpha_noise > 0:
        alpha = (alpha + alpha_noise * (torch.randn_like(alpha) if noise is None else noise)).clamp(0, 1)
    visible = transparency[:, :, None, None, None] * alpha
    importance = visible * torch.sigmoid(-depth)[:, :, None, None, None]
    masks = visible * (importance / (importance.sum(1, keepdim=True) + 1e-5))
    free = (1 - masks.sum(1)).clamp_min(0)
    return Stitched(free * background + (masks * rgb).sum(1), free, masks, rgb)


def background_mask(
    position: Float[Tensor, "n k 2"], transparency: Float[Tensor, "n k"], side: int, image_size: int
) -> Float[Tensor, "n 1 h w"]:
    """A canvas with one square for each particle, and one minus their sum."""
    with torch.no_grad():
        covered = torch.zeros(len(position), 1, image_size, image_size)
        axis = torch.arange(image_size, dtype=position.dtype)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        for particle in range(position.shape[1]):
            centre = (position[:, particle] + 1) * (0.5 * (image_size - 1))
            inside = ((y - centre[:, 0, None, None]).abs() <= side / 2) & (
                (x - centre[:, 1, None, None]).abs() <= side / 2
            )
            covered = covered + (inside * transparency[:, particle, None, None]).unsqueeze(1)
        return 1 - covered.clamp(0, 1)


def _affine(scale: Tensor, shift: Tensor) -> Tensor:
    """Matrices (n, 2, 3) of ``affine_grid``, which wants x before y."""
    theta = scale.new_zeros(len(scale), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 1], scale[:, 0]
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 1], shift[:, 0]
    return theta


def _layers(layers: nn.Sequential) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _layers(layer)
        else:
            yield layer
