"""LPIPS: how different two frames look, by the activations of a trained network. 0 for equal frames; lower is better.

Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (2018), version 0.1 of
its weights. DDLP and SlotFormer report it with VGG16, SRVP with AlexNet.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.layers.perceptual import Network, Trunk

TAPS: dict[Network, tuple[int, ...]] = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
"""Layers that are compared: VGG16's relu1_2, relu2_2, relu3_3, relu4_3, relu5_3; AlexNet's five ReLUs."""
CHANNELS: dict[Network, tuple[int, ...]] = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}
"""Channels of these layers, one weight each in a head."""
SMALLEST: dict[Network, int] = {"vgg16": 16, "alexnet": 31}
"""Side in pixels of the smallest frames that have a value in every layer."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Frames in [-1, 1] are normalised with these."""
EPS = 1e-10
PIXELS = 8 * 128 * 128
"""Pixels that go through the network together; bounds the memory."""


class LPIPS(nn.Module):
    """The distance, with the weights that it was given; nothing in it is trained.

    Args:
        trunk: VGG16 or AlexNet.
        heads: weights of the five layers' channels, (1, c, 1, 1), not negative.

    Raises:
        ValueError: the heads are of another network, or hold values that are negative or not finite.
    """

    def __init__(self, trunk: Trunk, heads: Sequence[Float[Tensor, "1 _ 1 1"]]) -> None:
        super().__init__()
        check_heads(trunk.network, heads)
        self.trunk = trunk
        self.heads = nn.ParameterList([nn.Parameter(head.float(), requires_grad=False) for head in heads])

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b t 3 h w"], target: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t"]:
        """Distance of each frame, in [0, 1] and clamped to it, from the same one of ``target``.

        Raises:
            ValueError: shapes differ, or the frames are smaller than ``SMALLEST``.
        """
        if video.shape != target.shape:
            raise ValueError(
                f"a video of shape {tuple(video.shape)} has a target {tuple(target.shape)}; they must agree"
            )
        return self.compare(target, {"video": video})["video"]

    @torch.no_grad()
    def compare(
        self, target: Float[Tensor, "b t 3 h w"], videos: Mapping[str, Float[Tensor, "_b _t 3 h w"]]
    ) -> dict[str, Float[Tensor, "b t"]]:
        """Distances of several videos from one target, whose activations are computed once.

        A video of one frame (or of one clip) is compared with every frame (every clip): a still picture costs one pass.

        Raises:
            ValueError: the frames are smaller than ``SMALLEST``.
        """
        smallest, side = SMALLEST[self.trunk.network], min(target.shape[-2:])
        if side < smallest:
            raise ValueError(
                f"LPIPS by {self.trunk.network} needs frames of at least {smallest} pixels a side, got {side}; use "
                "larger frames"
            )
        found: dict[str, list[Tensor]] = {name: [] for name in videos}
        size = max(1, PIXELS // (target.shape[-1] * target.shape[-2]))
        for i, clip in enumerate(target):
            others = {name: video[min(i, len(video) - 1)] for name, video in videos.items()}
            still = {name: self._features(other) for name, other in others.items() if len(other) == 1}
            for start in range(0, len(clip), size):
                span = slice(start, start + size)
                true = self._features(clip[span])
                for name, other in others.items():
                    features = still[name] if name in still else self._features(other[span])
                    found[name].append(self._distance(true, features))
        return {name: torch.cat(values).view(target.shape[:2]) for name, values in found.items()}

    def _features(self, frames: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        """Activations of unit length over channels."""
        shift, scale = (frames.new_tensor(values).float().view(3, 1, 1) for values in (SHIFT, SCALE))
        layers = self.trunk((2 * frames.float().clamp(0, 1) - 1 - shift) / scale, TAPS[self.trunk.network])
        return [layer / (layer.square().sum(1, keepdim=True).sqrt() + EPS) for layer in layers]

    def _distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, " n"]:
        layers = [(x - y).square().mul(head).sum(1).mean((1, 2)) for x, y, head in zip(a, b, self.heads, strict=True)]
        return torch.stack(layers).sum(0)


def check_heads(network: Network, heads: Sequence[Tensor]) -> None:
    """Refuse heads that do not belong to a network.

    Raises:
        ValueError: they have other shapes than its, or hold values that are negative or not finite.
    """
    shapes, wanted = [tuple(head.shape) for head in heads], [(1, count, 1, 1) for count in CHANNELS[network]]
    if shapes != wanted:
        raise ValueError(f"the heads of LPIPS by {network} must have shapes {wanted}, got {shapes}")
    for i, head in enumerate(heads):
        if not torch.isfinite(head).all() or (head < 0).any():
            raise ValueError(f"head {i} of LPIPS by {network} holds values that are negative or not finite")
