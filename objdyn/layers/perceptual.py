"""The convolutional trunks of VGG16 and AlexNet, whose activations a loss and a metric compare images by.

Layers stand where torchvision has them in ``features``, so that its weights fit by name (``features.0.weight``), and a
layer is spoken of by that index. torchvision itself is not needed. Weights are never in this package: a trunk is built
from tensors that the caller has read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Network = Literal["vgg16", "alexnet"]


class Trunk(nn.Module):
    """``features`` of a network, without its classifier; frozen where it comes from ``load_trunk``."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network: Network = network
        self.features = nn.Sequential(*_LAYERS[network]())

    def forward(self, images: Float[Tensor, "n 3 h w"], taps: Sequence[int]) -> list[Float[Tensor, "n _ _ _"]]:
        """What the layers ``taps`` (ascending indices) give, in that order; nothing is computed beyond the last.

        ReLUs work in place, so a convolution's own output cannot be had where a ReLU follows.
        """
        found, wanted = [], set(taps)
        images = images.contiguous(memory_format=torch.channels_last)  # 1.4 times faster on a CPU
        for index, layer in enumerate(list(self.features)[: max(taps) + 1]):
            images = layer(images)
            if index in wanted:
                found.append(images)
        return found


def load_trunk(tensors: Mapping[str, Tensor], network: Network | None = None) -> Trunk:
    """Build a frozen trunk from ``features.N.weight`` and ``.bias`` in torchvision's layout; other names are ignored.

    Args:
        tensors: of a whole network or of its trunk, in any floating type; computed with in float32.
        network: which one it must be; None tells it from the shapes.

    Raises:
        ValueError: tensors are missing, of other shapes than the network's, or not finite.
    """
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
    found = network_of(mine)
    if network is not None and found != network:
        raise ValueError(
            f"expected the weights of {network}, got {f'those of {found}' if found else _described(mine)}; give the "
            f"file of {network}"
        )
    if found is None:
        raise ValueError(
            f"expected the weights of {' or '.join(get_args(Network))} as torchvision names them "
            f"(features.0.weight, ...), got {_described(mine)}"
        )
    with torch.device("meta"):  # no initial values are drawn
        trunk = Trunk(found)
    wanted = {name: tuple(tensor.shape) for name, tensor in trunk.state_dict().items()}
    for name, shape in wanted.items():
        if name not in mine:
            raise ValueError(f"the weights of {found} lack {name}; the file is not whole")
        if tuple(mine[name].shape) != shape:
            raise ValueError(f"{name} of {found} must have shape {shape}, got {tuple(mine[name].shape)}")
        if not mine[name].is_floating_point() or not torch.isfinite(mine[name]).all():
            raise ValueError(f"{name} of {found} holds values that are not finite numbers; the file is damaged")
    if more := sorted(mine.keys() - wanted.keys()):
        raise ValueError(f"{found} has no {more[0]}; these are the weights of another network")
    trunk.load_state_dict({name: mine[name].float() for name in wanted}, assign=True)
    return trunk.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def network_of(tensors: Mapping[str, Tensor]) -> Network | None:
    """The network whose first two convolutions have these tensors' shapes; None where none has."""
    for network, layers in _LAYERS.items():
        with torch.device("meta"):
            shapes = {
                f"features.{i}.weight": layer.weight.shape
                for i, layer in enumerate(layers()[:4])
                if isinstance(layer, nn.Conv2d)
            }
        if all(name in tensors and tensors[name].shape == shape for name, shape in shapes.items()):
            return network
    return None


def _described(tensors: Mapping[str, Tensor]) -> str:
    first = next(iter(sorted(tensors)), "")
    return f"{first} of shape {tuple(tensors[first].shape)}" if first else "no tensor named features.N"


def _vgg16() -> list[nn.Module]:
    """Simonyan & Zisserman, "Very deep convolutional networks" (2015), configuration D: 31 layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


def _alexnet() -> list[nn.Module]:
    """Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014): 13 layers."""
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
    ]


_LAYERS: dict[Network, Callable[[], list[nn.Module]]] = {"vgg16": _vgg16, "alexnet": _alexnet}
