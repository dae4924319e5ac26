"""Convolution blocks of the particle models: replicate padding, no bias, group normalisation."""

import itertools
from collections.abc import Sequence

from torch import nn


class ConvBlock(nn.Sequential):
    """Convolution, GroupNorm, ReLU and, on request, a bilinear doubling of the size.

    Replicate padding, no bias; 4 groups (5 where 4 does not divide the channels), eps 1e-4.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, upsample: bool = False
    ) -> None:
        groups = 4 if out_channels % 4 == 0 else 5
        if out_channels % groups != 0:
            raise ValueError(f"channel counts must be divisible by 4 or 5 for GroupNorm, got {out_channels}")
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels, out_channels, kernel, stride, padding=kernel // 2, padding_mode="replicate", bias=False
            ),
            nn.GroupNorm(groups, out_channels, eps=1e-4),
            nn.ReLU(),
        ]
        if upsample:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        super().__init__(*layers)


class PatchCNN(nn.Sequential):
    """Pairs of blocks, halving the size before every pair but the first, and a 1x1 convolution to ``out_channels``.

    With channels (c1, ..., cn) an input of side s gives maps of side s / 2^(n-1).
    """

    def __init__(self, in_channels: int, channels: Sequence[int], out_channels: int, first_kernel: int = 3) -> None:
        layers: list[nn.Module] = []
        for index, width in enumerate(channels):
            kernel, stride = (first_kernel, 1) if index == 0 else (3, 2)
            layers += [ConvBlock(in_channels, width, kernel, stride), ConvBlock(width, width)]
            in_channels = width
        super().__init__(*layers, nn.Conv2d(in_channels, out_channels, 1))


class MLP(nn.Sequential):
    """Linear layers with a ReLU between them, and after the last one where ``final_activation``."""

    def __init__(self, *sizes: int, final_activation: bool = False) -> None:
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        super().__init__(*(layers if final_activation else layers[:-1]))


def init_convolutions(module: nn.Module, std: float) -> None:
    """Weights of every Conv2d from N(0, ``std``^2), biases 0; linear layers keep torch's default."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
