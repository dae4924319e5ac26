"""The networks of iterative amortised inference, shared by the slot families, and their recomputation."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class SpatialBroadcastDecoder(nn.Module):
    """A vector per slot to maps: tiled over the image beside two coordinate planes, then 3x3 convolutions with ELU.

    The tiled vector is constant over the image, so its first convolution takes only nine different values (corners,
    edges, inside): they are computed on a 3x3 image and spread. The coordinates are convolved once for all slots. Both
    give what convolving the tiled image gives.

    Source: Watters et al. 2019, "Spatial Broadcast Decoder"; sizes of IODINE's and PROVIDE's released code.

    Args:
        in_dim: size of the vector.
        channels: width of every hidden convolution.
        out_channels: maps per slot.
        size: side of the image.
        upsample: the convolutions run at 1 / ``upsample`` of the size and the last one's channels are shuffled into
            pixels; 1 is the published decoder.
    """

    coordinates: Tensor

    def __init__(self, in_dim: int, channels: Sequence[int], out_channels: int, size: int, upsample: int = 1) -> None:
        super().__init__()
        self.side, self.upsample = size // upsample, upsample
        widths = [in_dim + 2, *channels, out_channels * upsample**2]
        self.first = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.rest = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths[1:]))
        self.register_buffer("coordinates", coordinate_planes(self.side), persistent=False)

    def forward(self, vector: Float[Tensor, "n d"]) -> Float[Tensor, "n c h w"]:
        weight = self.first.weight
        inside = F.conv2d(vector[:, :, None, None].expand(-1, -1, 3, 3), weight[:, 2:], padding=1)
        maps = F.conv2d(self.coordinates, weight[:, :2], self.first.bias, padding=1)
        maps = F.elu(maps + _spread(_spread(inside, self.side, 2), self.side, 3), inplace=True)
        for conv in self.rest[:-1]:
            maps = F.elu(conv(maps), inplace=True)
        maps = self.rest[-1](maps)
        return maps if self.upsample == 1 else F.pixel_shuffle(maps, self.upsample)


class RefinementCNN(nn.Module):
    """Maps that describe how well a slot explains the frame, to one vector per slot.

    ``full`` runs four 3x3 convolutions at full resolution and pools 4x4 (PROVIDE's and its baselines' code);
    ``strided`` halves the size in every convolution (IODINE's own CLEVR network), about 20 times cheaper.
    Inputs that are the same for all slots of a frame (``shared``) are convolved once and spread over the slots.

    Args:
        shared_channels: maps that all slots of a frame share.
        slot_channels: maps of each slot.
        channels: width of every convolution.
        out_dim: size of the vector.
        size: side of the maps.
        kind: ``full`` or ``strided``.
        pool: ``flatten`` keeps the places, ``mean`` averages over them.
    """

    def __init__(
        self,
        shared_channels: int,
        slot_channels: int,
        channels: Sequence[int],
        out_dim: int,
        size: int,
        kind: Literal["full", "strided"],
        pool: Literal["flatten", "mean"],
    ) -> None:
        super().__init__()
        self.shared_channels, self.kind, self.pool = shared_channels, kind, pool
        self.stride = 2 if kind == "strided" else 1
        widths = [shared_channels + slot_channels, *channels]
        self.first, *rest = (nn.Conv2d(a, b, 3, stride=self.stride, padding=1) for a, b in itertools.pairwise(widths))
        self.rest = nn.ModuleList(rest)
        side = size // 4 if kind == "full" else size
        if kind == "strided":
            for _ in channels:
                side = (side + 1) // 2
        self.linear = nn.Linear(channels[-1] * (side**2 if pool == "flatten" else 1), out_dim)

    def forward(self, shared: Float[Tensor, "n s h w"], slots: Float[Tensor, "n k c h w"]) -> Float[Tensor, "n k d"]:
        n, k = slots.shape[:2]
        of_frame, of_slot = self.first.weight.split([self.shared_channels, slots.shape[2]], dim=1)
        common = F.conv2d(shared, of_frame, self.first.bias, self.stride, padding=1)
        maps = F.conv2d(slots.flatten(0, 1), of_slot, None, self.stride, padding=1)
        maps = maps.view(n, k, *maps.shape[1:]) + common.unsqueeze(1)
        maps = F.elu(maps.flatten(0, 1), inplace=True)
        for conv in self.rest:
            maps = F.elu(conv(maps), inplace=True)
        if self.kind == "full":
            maps = F.avg_pool2d(maps, 4)
        code = maps.mean((2, 3)) if self.pool == "mean" else maps.flatten(1)
        return rearrange(F.elu(self.linear(code)), "(n k) d -> n k d", n=n)


def coordinate_planes(side: int) -> Float[Tensor, "1 2 h w"]:
    """Rows and columns as two planes with values in [-1, 1]."""
    line = torch.linspace(-1, 1, side)
    return torch.stack(torch.meshgrid(line, line, indexing="ij")).unsqueeze(0)


def recomputed(
    run: Callable[..., Tensor], known: Tensor, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """``known``, which is ``run(*inputs)`` without a graph, as a function that backward computes again.

    Keeps ``inputs`` and no activation. Unlike checkpointing with a nested backward it hands every gradient to the outer
    graph, so DDP's hooks see each parameter once.
    """
    return _Recomputed.apply(run, known, len(inputs), *inputs, *parameters)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, known, count, *tensors):  # pyright: ignore
        ctx.run = run
        ctx.autocast = (torch.is_autocast_enabled(known.device.type), torch.get_autocast_dtype(known.device.type))
        ctx.device = known.device.type
        ctx.save_for_backward(*tensors[:count])
        ctx.parameters = tensors[count:]  # leaves of their modules, which the graph of the second run ends in
        return known.clone()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled=enabled):
            again = ctx.run(*inputs)
        tensors = (*inputs, *ctx.parameters)
        wanted = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad(again, wanted, gradient.to(again.dtype), allow_unused=True))
        gradients = [next(found) if t.requires_grad else None for t in tensors]
        return None, None, None, *gradients


def _spread(maps: Tensor, side: int, axis: int) -> Tensor:
    """Three values along an axis (first border, inside, last border) spread over ``side`` pixels."""
    first, inside, last = maps.split(1, dim=axis)
    shape = list(maps.shape)
    shape[axis] = side - 2
    return torch.cat([first, inside.expand(shape), last], dim=axis)
