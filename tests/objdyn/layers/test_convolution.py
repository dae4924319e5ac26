"""The convolution chains against the same layers one after the other (``pipeline.textbook_ddlp``)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from objdyn.layers import convolution
from objdyn.layers.convolution import MLP, ConvBlock, ConvChain, PatchCNN
from objdyn.layers.particles import BackgroundDecoder, GlimpseDecoder
from pipeline import textbook_ddlp

IMAGE, VECTOR = (3, 3, 32, 32), (3, 3)
CHAINS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "trunk": (lambda: PatchCNN(3, (8, 12, 16), 5), IMAGE),
    "trunk with a wide first kernel": (lambda: PatchCNN(3, (8, 12), 5, first_kernel=7), IMAGE),
    "five groups": (lambda: PatchCNN(3, (10, 15), 2), IMAGE),
    "background decoder, two doublings": (lambda: BackgroundDecoder(3, 64, (8, 12, 16)).net, VECTOR),
    "background decoder, from 8 pixels": (lambda: BackgroundDecoder(3, 64, (8, 12, 16, 16)).net, VECTOR),
    "glimpse decoder": (lambda: GlimpseDecoder(3, 32).net, VECTOR),
    "glimpse decoder without doubling": (lambda: GlimpseDecoder(3, 8).net, VECTOR),
    "doubled at the end": (lambda: ConvChain(ConvBlock(3, 8, upsample=True)), IMAGE),
    "1x1 of a doubled map": (lambda: ConvChain(ConvBlock(3, 8, upsample=True), nn.Conv2d(8, 2, 1)), IMAGE),
    "strided convolution of a doubled map": (
        lambda: ConvChain(ConvBlock(3, 8, upsample=True), ConvBlock(8, 8, stride=2), nn.Conv2d(8, 2, 1)),
        IMAGE,
    ),
    "zero padding, dilation, groups": (
        lambda: ConvChain(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, dilation=2),
            nn.GroupNorm(4, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2, bias=False),
        ),
        IMAGE,
    ),
    "bias after a doubled map": (
        lambda: ConvChain(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="replicate"),
        ),
        IMAGE,
    ),
    "no padding after a doubled map": (
        lambda: ConvChain(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 3)
        ),
        IMAGE,
    ),
}


def example(name: str, dtype: torch.dtype, spread: float = 0.3) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    build, shape = CHAINS[name]
    chain = build().to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in chain.parameters():
        nn.init.normal_(parameter, 0, spread)
    return chain, torch.randn(shape, dtype=dtype, requires_grad=True)


def outcome(run: Callable[[Tensor], Tensor], chain: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of input and parameters."""
    out = run(x)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *chain.parameters()], gradient)]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_equals_its_layers_in_sequence_with_all_gradients(name: str) -> None:
    chain, x = example(name, torch.float64)
    fast = outcome(chain, chain, x)
    slow = outcome(lambda v: textbook_ddlp.conv_chain(chain, v), chain, x)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["trunk", "background decoder, two doublings"])
def test_under_autocast_a_chain_is_as_close_to_fp32_as_its_layers_are(name: str) -> None:
    chain, x = example(name, torch.float32, spread=0.1)
    exact = outcome(lambda v: textbook_ddlp.conv_chain(chain, v), chain, x)
    with torch.autocast("cpu", torch.bfloat16):
        fast = outcome(chain, chain, x)
        slow = outcome(lambda v: textbook_ddlp.conv_chain(chain, v), chain, x)
    assert fast[0].dtype == slow[0].dtype
    for a, b, c in zip(fast, slow, exact, strict=True):
        error, usual = ((v.float() - c).norm() / c.norm() for v in (a, b))
        assert error <= 1.5 * usual + 0.01


def test_a_chain_runs_without_gradients_and_with_those_of_the_weights_alone() -> None:
    chain, x = example("trunk", torch.float64)
    with torch.no_grad():
        plain = chain(x)
        torch.testing.assert_close(plain, textbook_ddlp.conv_chain(chain, x))
    gradients = torch.autograd.grad(chain(x.detach()).square().sum(), list(chain.parameters()))
    wanted = torch.autograd.grad(textbook_ddlp.conv_chain(chain, x.detach()).square().sum(), list(chain.parameters()))
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for parameter in chain.parameters():
        parameter.requires_grad_(False)
    (gradient,) = torch.autograd.grad(chain(x).square().sum(), [x])
    torch.testing.assert_close(gradient, torch.autograd.grad(textbook_ddlp.conv_chain(chain, x).square().sum(), [x])[0])


@pytest.mark.parametrize("kernel", [1, 3])
def test_maps_with_channels_first_have_the_same_gradients(kernel: int) -> None:
    torch.manual_seed(0)
    convolve = nn.Conv2d(32, 4, kernel, padding=kernel // 2, padding_mode="replicate")
    chain = ConvChain(nn.GroupNorm(4, 32), nn.ReLU(), convolve).double()
    x = torch.randn(3, 32, 6, 6, dtype=torch.float64, requires_grad=True)
    assert x.is_contiguous()
    for a, b in zip(
        outcome(chain, chain, x), outcome(lambda v: textbook_ddlp.conv_chain(chain, v), chain, x), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["trunk", "background decoder, two doublings", "five groups"])
@pytest.mark.parametrize("native", [False, True])
def test_both_forms_of_the_normalisation_are_exact(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_is_native", lambda x, groups: native)
    chain, x = example(name, torch.float64)
    for a, b in zip(
        outcome(chain, chain, x), outcome(lambda v: textbook_ddlp.conv_chain(chain, v), chain, x), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_torchs_own_normalisation_is_left_to_the_layout_that_it_knows() -> None:
    last = torch.empty(2, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    assert convolution._is_native(last, 4)
    assert not convolution._is_native(last.contiguous(), 4)  # channels first
    assert not convolution._is_native(last[:, :16], 4)
    assert not convolution._is_native(last.to("meta"), 4)  # as on a GPU


def test_normalisation_of_far_away_values_does_not_cancel() -> None:
    torch.manual_seed(0)
    chain = ConvChain(nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    x = 1000 + torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    exact = textbook_ddlp.conv_chain(chain.double(), x.double())
    torch.testing.assert_close(chain.float()(x).double(), exact, atol=2e-3, rtol=0)


def test_a_chain_keeps_one_tensor_for_each_convolution() -> None:
    chain, x = example("background decoder, two doublings", torch.float32)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in chain.modules())

    def kept(run: Callable[[Tensor], Tensor]) -> list[int]:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            size = tensor.untyped_storage().nbytes()
            if tensor.ndim == 4 and len(tensor) == len(x) and size > 1000:  # no weights
                seen[tensor.data_ptr()] = size
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held.append(run(x))
        return list(seen.values())

    held: list[Tensor] = []
    fast, slow = kept(chain), kept(lambda v: textbook_ddlp.conv_chain(chain, v))
    assert len(fast) <= convolutions + 1  # and the sigmoid's output
    assert sum(fast) < sum(slow) / 3


def test_many_images_pass_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, _ = example("background decoder, two doublings", torch.float64)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    whole = outcome(chain, chain, x)
    seen: list[int] = []
    activate = convolution._activate
    monkeypatch.setattr(convolution, "_activate", lambda x, *rest: seen.append(len(x)) or activate(x, *rest))
    monkeypatch.setattr(convolution, "PIECE_BYTES", 3 * 8 * 16 * 64 * 64 // 2)
    for a, b in zip(outcome(chain, chain, x), whole, strict=True):
        torch.testing.assert_close(a, b)
    assert set(seen) == {3, 1}


def test_mlp_has_no_activation_after_its_last_layer() -> None:
    assert [type(layer) for layer in MLP(2, 3, 4)] == [nn.Linear, nn.ReLU, nn.Linear]
