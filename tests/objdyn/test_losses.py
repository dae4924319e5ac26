import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from objdyn import losses
from objdyn.layers.perceptual import Trunk, load_trunk
from objdyn.losses import chamfer_kl, squared_error, vgg_distance, zero_gradient


@pytest.fixture(scope="module")
def vgg() -> Trunk:
    """Random weights of a variance that keeps the activations' size from layer to layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_trunk({name: 6**0.5 * tensor for name, tensor in Trunk("vgg16").state_dict().items()})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_squared_error_sums_pixels_and_channels() -> None:
    video = torch.zeros(2, 3, 3, 4, 5)
    recon = torch.full_like(video, 0.5)
    torch.testing.assert_close(squared_error(video, recon), torch.full((2, 3), 0.25 * 3 * 4 * 5))


def hooked(trunk: Trunk, images: Tensor) -> list[Tensor]:
    """What hooks on torchvision's modules 2, 7, 12, 21 and 30 hold after a pass: the ReLUs have written over four."""
    held: dict[int, Tensor] = {}

    def hook(index: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        held[index] = output

    handles = [trunk.features[i].register_forward_hook(partial(hook, i)) for i in (2, 7, 12, 21, 30)]
    trunk.features(images)
    for handle in handles:
        handle.remove()
    return list(held.values())


def by_definition(video: Tensor, recon: Tensor, trunk: Trunk) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    sides = [hooked(trunk, (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)) for x in (video, recon)]
    assert [tuple(f.shape[1:]) for f in sides[0]] == [
        (64, 40, 32), (128, 20, 16), (256, 10, 8), (512, 5, 4), (512, 1, 1),
    ]  # fmt: skip
    assert all(f.min() >= 0 for f in sides[0])
    features = sum(((a - b) ** 2).sum((1, 2, 3)) for a, b in zip(*sides, strict=True))
    return ((video - recon) ** 2).sum((1, 2, 3)) + 0.12151 * features


def test_vgg_distance_and_its_gradient_equal_the_definition_with_hooks(
    vgg: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "VGG_PIXELS", 2 * 40 * 32)  # three images in two passes
    video, recon = noise(3, 3, 40, 32), noise(3, 3, 40, 32, seed=1).requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.5])  # of frames
    expected = by_definition(video, recon, vgg)
    (slope,) = torch.autograd.grad((expected * weights).sum(), recon)
    found = vgg_distance(video, recon, vgg)
    (found_slope,) = torch.autograd.grad((found * weights).sum(), recon)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_slope, slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()))
    pixels = squared_error(video, recon)
    assert (found > 1.5 * pixels).all()  # the features count
    assert not found_slope[1].any()


def test_vgg_distance_takes_any_leading_axes_and_is_zero_for_equal_images(vgg: Trunk) -> None:
    video, recon = noise(2, 3, 3, 32, 32), noise(2, 3, 3, 32, 32, seed=1)
    found = vgg_distance(video, recon, vgg)
    assert found.shape == (2, 3)
    assert not found.requires_grad
    torch.testing.assert_close(found[1, 2], vgg_distance(video[1, 2][None], recon[1, 2][None], vgg)[0])
    assert torch.equal(vgg_distance(video, video, vgg), torch.zeros(2, 3))


def test_small_images_are_enlarged_to_32_pixels_first(vgg: Trunk) -> None:
    video, recon = noise(2, 4, 3, 16, 16), noise(2, 4, 3, 16, 16, seed=1).requires_grad_()

    def enlarged(images: Tensor) -> Tensor:
        return nn.functional.interpolate(images.flatten(0, 1), 32, mode="bilinear").unflatten(0, (2, 4))

    expected = vgg_distance(enlarged(video), enlarged(recon), vgg)
    found = vgg_distance(video, recon, vgg)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value.sum(), recon)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].shape == recon.shape


def test_vgg_distance_keeps_no_activation_for_backward(vgg: Trunk) -> None:
    saved: list[weakref.ref[Tensor]] = []

    def watch(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    recon = noise(4, 3, 32, 32, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        distance = vgg_distance(noise(4, 3, 32, 32), recon, vgg)
    weights = {parameter.data_ptr() for parameter in vgg.parameters()}
    alive = [tensor for reference in saved if (tensor := reference()) is not None]
    kept = sum(tensor.numel() for tensor in alive if tensor.data_ptr() not in weights)
    assert distance.requires_grad
    assert len(saved) > 30  # the network's own were watched, too
    assert 0 < kept <= 4 * recon.numel()  # one layer of 64 channels alone would be 21 times the images


def test_vgg_distance_trains_nothing_but_the_reconstruction(vgg: Trunk) -> None:
    video = noise(1, 3, 32, 32).requires_grad_()
    recon = noise(1, 3, 32, 32, seed=1).requires_grad_()
    vgg_distance(video, recon, vgg).sum().backward()
    assert recon.grad is not None
    assert video.grad is None
    assert all(parameter.grad is None for parameter in vgg.parameters())


def test_under_autocast_convolutions_are_bf16_and_sums_fp32(vgg: Trunk) -> None:
    video, recon = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1).requires_grad_()
    exact = vgg_distance(video, recon, vgg)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vgg_distance(video, recon, vgg)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    slopes = [torch.autograd.grad(value.sum(), recon)[0].flatten() for value in (exact, rounded)]
    assert torch.nn.functional.cosine_similarity(*slopes, dim=0) > 0.98


def test_chamfer_kl_is_half_the_squared_distance_both_ways() -> None:
    posterior = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    prior = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # each posterior point to its nearest prior: 0, 1/2; each prior point to its nearest posterior: 0, 1/2, 4/2
    assert chamfer_kl(posterior, prior).item() == pytest.approx(0 + 0.5 + 0 + 0.5 + 2.0)


def test_chamfer_kl_uses_the_gaussian_kl() -> None:
    point = torch.tensor([[0.3, -0.2]])
    q = torch.distributions.Normal(point, torch.ones(1, 2))
    p = torch.distributions.Normal(torch.zeros(1, 2), torch.full((1, 2), 0.5))
    expected = 2 * torch.distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close(chamfer_kl(point, torch.zeros(1, 2), sigma=0.5), expected)


def test_zero_gradient_touches_every_parameter_without_changing_the_loss() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    loss = torch.tensor(2.0) + zero_gradient(module)
    loss.backward()
    assert loss.item() == 2.0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
