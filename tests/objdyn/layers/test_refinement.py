"""Decoder and refinement CNN: what is computed once and spread equals what is computed everywhere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from objdyn.layers.refinement import RefinementCNN, SpatialBroadcastDecoder, coordinate_planes, recomputed


@pytest.mark.parametrize(("size", "upsample"), [(8, 1), (12, 2)])
def test_the_decoder_equals_convolving_the_tiled_vector(size: int, upsample: int) -> None:
    torch.manual_seed(0)
    decoder = SpatialBroadcastDecoder(5, (6, 7), 4, size, upsample)
    vector = torch.randn(3, 5, requires_grad=True)
    side = size // upsample
    tiled = vector[:, :, None, None].expand(-1, -1, side, side)
    maps = torch.cat([coordinate_planes(side).expand(3, -1, -1, -1), tiled], dim=1)
    for conv in (decoder.first, *decoder.rest[:-1]):
        maps = F.elu(conv(maps))
    plain = F.pixel_shuffle(decoder.rest[-1](maps), upsample)
    fast = decoder(vector)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    weights = [vector, *decoder.parameters()]
    seen = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(fast, weights, seen), torch.autograd.grad(plain, weights, seen), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "strided"])
@pytest.mark.parametrize("pool", ["flatten", "mean"])
def test_shared_maps_convolved_once_equal_maps_copied_to_every_slot(kind: Any, pool: Any) -> None:
    torch.manual_seed(0)
    cnn = RefinementCNN(2, 3, (4, 5), 6, 8, kind, pool)
    shared, slots = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 3, 8, 8)
    maps = torch.cat([shared.unsqueeze(1).expand(-1, 3, -1, -1, -1), slots], dim=2).flatten(0, 1)
    for conv in (cnn.first, *cnn.rest):
        maps = F.elu(conv(maps))
    if kind == "full":
        maps = F.avg_pool2d(maps, 4)
    code = maps.flatten(1) if pool == "flatten" else maps.mean((2, 3))
    torch.testing.assert_close(cnn(shared, slots), F.elu(cnn.linear(code)).unflatten(0, (2, 3)), atol=1e-5, rtol=1e-5)


def test_what_is_recomputed_has_the_gradients_of_what_is_kept() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(3, 4, requires_grad=True)
    weights = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x).square().sum(), weights)
    known = layer(x).detach()
    found = torch.autograd.grad(recomputed(layer, known, (x,), list(layer.parameters())).square().sum(), weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_recomputed_holds_no_activation() -> None:
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    layer = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 2))
    x = torch.randn(3, 4, requires_grad=True)
    known = layer(x).detach()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        recomputed(layer, known, (x,), list(layer.parameters()))
    assert sum(kept) == x.numel()
