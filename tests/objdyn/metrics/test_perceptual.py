from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from objdyn.layers.perceptual import Network, Trunk, load_trunk
from objdyn.metrics.perceptual import CHANNELS, LPIPS, SCALE, SHIFT, SMALLEST, TAPS

NETWORKS: tuple[Network, ...] = ("vgg16", "alexnet")
REFERENCE = {"alexnet": (0.0, 0.0726, 0.1993, 0.3789, 0.5807), "vgg16": (0.0, 0.2630, 0.3602, 0.4410, 0.6171)}
"""LPIPS of noise of growing standard deviation, from the authors' own package."""
NOISE = (0.0, 0.05, 0.1, 0.2, 0.4)


def drawn(network: Network) -> LPIPS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = load_trunk(Trunk(network).state_dict(), network)
        return LPIPS(trunk, [torch.rand(1, count, 1, 1) for count in CHANNELS[network]])


def published(network: Network, shared: Path) -> LPIPS:
    names = (f"{network}_features.safetensors", f"lpips_{network}_heads.safetensors")
    paths = [shared / "weights" / name for name in names]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"needs the weights of {network}")
    trunk, heads = (load_file(path) for path in paths)
    return LPIPS(load_trunk(trunk, network), [heads[f"heads.{i}.weight"] for i in range(5)])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_published_weights_give_the_published_distances(network: Network, shared: Path) -> None:
    lpips = published(network, shared)
    g = torch.linspace(-1, 1, 64)
    image = torch.stack([g.expand(64, 64), g[:, None].expand(64, 64), g * g[:, None]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = torch.stack([(image + s * torch.randn(3, 64, 64)).clamp(-1, 1) for s in NOISE])
    video, target = ((x + 1) / 2 for x in (noisy, image.expand(5, 3, 64, 64)))
    torch.testing.assert_close(lpips(video[None], target[None])[0], torch.tensor(REFERENCE[network]), atol=1e-4, rtol=0)


def by_definition(lpips: LPIPS, image: Tensor, other: Tensor) -> float:
    """One pair at a time, layer by layer, pixel norms by torch's own function."""
    total = 0.0
    taps: Sequence[int] = TAPS[lpips.trunk.network]
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
    values = [(2 * x[None] - 1 - shift) / scale for x in (image, other)]
    for index, layer in enumerate(list(lpips.trunk.features)[: max(taps) + 1]):
        values = [layer(value) for value in values]
        if index in taps:
            a, b = (value[0] / (torch.linalg.vector_norm(value[0], dim=0) + 1e-10) for value in values)
            head = lpips.heads[taps.index(index)][0, :, 0, 0]
            total += float(torch.einsum("chw,c->hw", (a - b) ** 2, head).mean())
    return total


@pytest.mark.parametrize("network", NETWORKS)
def test_each_frame_has_the_distance_of_the_definition(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("objdyn.metrics.perceptual.PIXELS", 2 * 32 * 40)  # so that a clip takes more than one pass
    lpips = drawn(network)
    video, target = noise(2, 3, 3, 32, 40, seed=1), noise(2, 3, 3, 32, 40, seed=2)
    values = lpips(video, target)
    expected = [[by_definition(lpips, video[b, t], target[b, t]) for t in range(3)] for b in range(2)]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_equal_frames_have_no_distance_and_the_order_does_not_matter(network: Network) -> None:
    lpips = drawn(network)
    video, target = noise(1, 2, 3, 32, 32, seed=1), noise(1, 2, 3, 32, 32, seed=2)
    assert torch.equal(lpips(target, target), torch.zeros(1, 2))
    assert torch.equal(lpips(video, target), lpips(target, video))
    assert (lpips(video, target) > 0).all()
    bright = video + (video > 0.5)
    assert torch.equal(lpips(bright, target), lpips(bright.clamp(max=1), target))  # clamped to [0, 1], as shown


def test_still_pictures_are_compared_with_every_frame() -> None:
    lpips = drawn("alexnet")
    target, last, background = noise(2, 3, 3, 32, 32), noise(2, 1, 3, 32, 32, seed=1), noise(1, 1, 3, 32, 32, seed=2)
    found = lpips.compare(target, {"last": last, "background": background, "itself": target})
    torch.testing.assert_close(found["last"], lpips(last.expand(target.shape), target))
    torch.testing.assert_close(found["background"], lpips(background.expand(target.shape), target))
    assert not found["itself"].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_frames_below_the_smallest_size_are_refused_and_that_size_works(network: Network) -> None:
    lpips, side = drawn(network), SMALLEST[network]
    frames = noise(1, 1, 3, side, side)
    assert torch.isfinite(lpips(frames, 1 - frames)).all()
    with pytest.raises(ValueError, match=f"at least {side} pixels a side, got {side - 1}"):
        lpips(frames[..., 1:], frames[..., 1:])
    with pytest.raises(RuntimeError, match="too small"):
        lpips.trunk(frames[0, ..., 1:], TAPS[network])


def test_heads_of_another_network_or_broken_ones_are_refused() -> None:
    trunk = drawn("alexnet").trunk
    with pytest.raises(ValueError, match=r"heads of LPIPS by alexnet must have shapes .*got"):
        LPIPS(trunk, [torch.rand(1, count, 1, 1) for count in CHANNELS["vgg16"]])
    for wrong in (-1.0, float("nan")):
        heads = [torch.rand(1, count, 1, 1) for count in CHANNELS["alexnet"]]
        heads[2][0, 3] = wrong
        with pytest.raises(ValueError, match="head 2 of LPIPS by alexnet holds values that are negative or not finite"):
            LPIPS(trunk, heads)
