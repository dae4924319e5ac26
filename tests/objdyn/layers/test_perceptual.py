from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from objdyn.layers.perceptual import Network, Trunk, load_trunk, network_of


def drawn(network: Network, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(Trunk(network).state_dict())


@pytest.mark.parametrize(("network", "layers", "convolutions"), [("vgg16", 31, 13), ("alexnet", 13, 5)])
def test_layers_stand_at_torchvisions_indices(network: Network, layers: int, convolutions: int) -> None:
    trunk = Trunk(network)
    assert len(trunk.features) == layers
    assert len(list(trunk.parameters())) == 2 * convolutions
    assert network_of(drawn(network)) == network


@pytest.mark.parametrize(
    ("network", "tap", "shape"),
    [
        ("vgg16", 3, (64, 64, 64)),
        ("vgg16", 30, (512, 2, 2)),
        ("alexnet", 1, (64, 15, 15)),
        ("alexnet", 12, (256, 1, 1)),
    ],
)
def test_a_tap_is_the_composition_of_the_layers_up_to_it(network: Network, tap: int, shape: tuple[int, ...]) -> None:
    trunk = load_trunk(drawn(network))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, last = trunk(images.clone(), (1, tap)) if tap > 1 else (None, *trunk(images.clone(), (tap,)))
    expected = trunk.features[: tap + 1](images.clone())
    assert last.shape == (2, *shape)
    torch.testing.assert_close(last, expected)
    if first is not None:
        torch.testing.assert_close(first, trunk.features[:2](images.clone()))


def test_a_loaded_trunk_is_frozen_and_draws_nothing() -> None:
    tensors = drawn("vgg16")
    torch.manual_seed(5)
    trunk = load_trunk(tensors | {"classifier.0.weight": torch.zeros(1), "heads.0.weight": torch.zeros(1)}, "vgg16")
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert all(torch.equal(value, tensors[name]) for name, value in trunk.state_dict().items())


def test_weights_of_another_network_or_broken_ones_are_refused() -> None:
    vgg, alex = drawn("vgg16"), drawn("alexnet")
    with pytest.raises(ValueError, match="expected the weights of vgg16, got those of alexnet; give the file of vgg16"):
        load_trunk(alex, "vgg16")
    with pytest.raises(ValueError, match=r"vgg16 or alexnet .*got no tensor named features.N"):
        load_trunk({"layer1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"expected the weights of vgg16, got features.0.weight of shape \(3, 3\)"):
        load_trunk({"features.0.weight": torch.zeros(3, 3)}, "vgg16")
    with pytest.raises(ValueError, match=r"lack features.28.bias"):
        load_trunk({name: tensor for name, tensor in vgg.items() if name != "features.28.bias"})
    with pytest.raises(ValueError, match=r"features.5.bias of vgg16 must have shape \(128,\), got \(64,\)"):
        load_trunk(vgg | {"features.5.bias": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"features.5.bias of vgg16 holds values that are not finite"):
        load_trunk(vgg | {"features.5.bias": torch.full((128,), torch.nan)})
    with pytest.raises(ValueError, match=r"vgg16 has no features.31.weight; these are the weights of another network"):
        load_trunk(vgg | {"features.31.weight": torch.zeros(1)})


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_the_published_weights_load(network: Network, shared: Path) -> None:
    path = shared / "weights" / f"{network}_features.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    assert load_trunk(load_file(path), network).network == network
