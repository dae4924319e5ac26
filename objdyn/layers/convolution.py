"""Convolution blocks of the particle models: replicate padding, no bias, group normalisation.

A block is convolution, normalisation, ReLU and perhaps a doubling of the size. Run one layer after the other, each
leaves a tensor for the backward pass. A ``ConvChain`` runs its blocks shifted by one: a convolution takes in the
normalisation, ReLU and doubling before it, keeps the one tensor that those started from, and computes them again in
the backward pass, which costs little beside a convolution. On a CPU the images pass a few at a time, because maps that
stay in its caches, and whose memory is used again, take a quarter less time. Outputs and gradients are those of the
layers in sequence.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECE_BYTES = 4 << 20
"""Largest map of the images that go through a chain together on a CPU."""


class ConvChain(nn.Sequential):
    """Layers in sequence, as ``nn.Sequential``, of which convolutions with what is before them need less memory.

    Whatever is no convolution, normalisation, ReLU, doubling or chain of these is run as it is. Gradients can be taken
    once: there are none of gradients.
    """

    def forward(self, input: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The output of the last layer."""
        x = input
        links: list[_Link] = []
        waiting: list[nn.Module] = []
        for layer in _flatten(self):
            if isinstance(layer, nn.GroupNorm | nn.ReLU | nn.Upsample):
                waiting.append(layer)
            elif isinstance(layer, nn.Conv2d) and _fits(layer, waiting):
                links.append(_Link.of(waiting, layer, x))
                waiting = []
            else:
                x = layer(_run(waiting, _run_links(links, x)))
                links, waiting = [], []
        return _run(waiting, _run_links(links, x))


class ConvBlock(ConvChain):
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


class PatchCNN(ConvChain):
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


_BEFORE: tuple[list[type], ...] = (
    [],
    [nn.ReLU],
    [nn.GroupNorm, nn.ReLU],
    [nn.ReLU, nn.Upsample],
    [nn.GroupNorm, nn.ReLU, nn.Upsample],
)
"""Layers that a convolution may take in."""


def _flatten(layers: nn.Sequential) -> list[nn.Module]:
    return [inner for layer in layers for inner in (_flatten(layer) if isinstance(layer, ConvChain) else [layer])]


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _fits(conv: nn.Conv2d, before: Sequence[nn.Module]) -> bool:
    """Whether ``_ActivatedConv`` can do ``conv`` with the layers before it."""
    kinds = [type(layer) for layer in before]
    (kernel, other), (stride, other_stride), padding = conv.kernel_size, conv.stride, conv.padding
    square = kernel == other and stride == other_stride and conv.groups == 1 and conv.dilation == (1, 1)
    padded = padding == (0, 0) or (padding == (kernel // 2, kernel // 2) and conv.padding_mode == "replicate")
    doubled = nn.Upsample not in kinds or (kernel, stride, padding) == (3, 1, (1, 1))
    return kinds in _BEFORE and square and padded and doubled


class _Shape(NamedTuple):
    """What ``_ActivatedConv`` computes."""

    relu: bool
    groups: int
    """Of the normalisation; 0 where there is none."""
    eps: float
    doubled: bool
    """The weights are those of ``_mix``, and what they give is to be interleaved."""
    stride: int
    padding: int


class _Link(NamedTuple):
    """A convolution with the normalisation, ReLU and doubling before it, in the precision that it runs in."""

    gamma: Tensor | None
    beta: Tensor | None
    weight: Tensor
    bias: Tensor | None
    shape: _Shape

    @staticmethod
    def of(before: Sequence[nn.Module], conv: nn.Conv2d, x: Tensor) -> "_Link":
        norm = next((layer for layer in before if isinstance(layer, nn.GroupNorm)), None)
        doubled = any(isinstance(layer, nn.Upsample) for layer in before)
        weight, bias = conv.weight, conv.bias
        if doubled:
            weight, bias = _mix(weight), None if bias is None else bias.repeat(4)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        groups, eps = (0, 0.0) if norm is None else (norm.num_groups, norm.eps)
        gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
        shape = _Shape(bool(before), groups, eps, doubled, conv.stride[0], int(conv.padding[0]))
        return _Link(gamma, beta, weight, bias, shape)


def _run_links(links: Sequence[_Link], x: Tensor) -> Tensor:
    if not links:
        return x
    pieces = x.split(_images_at_once(links, x)) if x.device.type == "cpu" else (x,)
    results = []
    with torch.autocast(x.device.type, enabled=False):  # which would widen the padding
        for piece in pieces:
            result = piece.to(links[0].weight.dtype)
            for link in links:
                result = _ActivatedConv.apply(result, *link)
            results.append(result)
    return torch.cat(results) if len(results) > 1 else results[0]


def _images_at_once(links: Sequence[_Link], x: Tensor) -> int:
    """How many images make maps of ``PIECE_BYTES``."""
    height, width = x.shape[-2:]
    largest = x[:1].numel()
    for link in links:
        height, width = (-(-side // link.shape.stride) for side in (height, width))
        largest = max(largest, len(link.weight) * height * width)
        if link.shape.doubled:
            height, width = 2 * height, 2 * width
    return max(1, PIECE_BYTES // (largest * x.element_size()))


class _ActivatedConv(torch.autograd.Function):
    """conv(pad(double(relu(norm(x))))), which keeps ``x`` alone for the backward pass.

    A doubled input is not made: a 3x3 convolution of it is four 3x3 convolutions of what it is doubled from, one for
    each pixel of 2x2, with mixed weights (``_mix``), and replicate padding of either is the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        shape: _Shape,
    ) -> Tensor:
        padded, mean, rstd = _activate(x, gamma, beta, shape)
        out = torch.conv2d(padded, weight, bias, shape.stride)
        ctx.shape, ctx.has_bias = shape, bias is not None
        ctx.save_for_backward(x, gamma, beta, weight, mean, rstd)
        return _interleave(out) if shape.doubled else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grads[0].device.type, enabled=False):
            return _ActivatedConv._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, mean, rstd = ctx.saved_tensors
        shape: _Shape = ctx.shape
        grad = _separate(grad) if shape.doubled else grad.contiguous(memory_format=torch.channels_last)
        padded, *_ = _activate(x, gamma, beta, shape)
        wants_x = any(ctx.needs_input_grad[:3])
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, padded, weight, [len(weight)] if ctx.has_bias else None, [shape.stride] * 2, [0, 0], [1, 1], False,
            [0, 0], 1, [wants_x, ctx.needs_input_grad[3], ctx.has_bias and ctx.needs_input_grad[4]],
        )  # fmt: skip
        grad_gamma = grad_beta = None
        if wants_x:
            p = shape.padding
            inner = padded[..., p:-p, p:-p] if p else padded
            if p:
                grad_x = torch.ops.aten.replication_pad2d_backward(grad_x, x, [p] * 4)
            if shape.relu:
                grad_x = torch.ops.aten.threshold_backward(grad_x, inner, 0)
            if gamma is not None:
                grad_x, grad_gamma, grad_beta = _normalise_backward(grad_x, x, mean, rstd, gamma)
        return grad_x, grad_gamma, grad_beta, grad_weight, grad_bias, None


def _activate(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: _Shape
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """pad(relu(norm(x))), and the normalisation's statistics."""
    mean = rstd = None
    out = x
    if gamma is not None and beta is not None:
        out, mean, rstd = _normalise(x, gamma, beta, shape)
    if shape.relu:
        out = out.relu_() if out is not x else out.relu()
    if shape.padding:
        out = F.pad(out, [shape.padding] * 4, mode="replicate")
    return out.contiguous(memory_format=torch.channels_last), mean, rstd


def _normalise(x: Tensor, gamma: Tensor, beta: Tensor, shape: _Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Group normalisation of ``x``, and each group's mean and inverse deviation (n, groups)."""
    n, c, h, w = x.shape
    if _is_native(x, shape.groups):
        return torch.native_group_norm(x, gamma, beta, n, c, h * w, shape.groups, shape.eps)
    pixels = _pixels(x)
    middle = _sum_pixels(pixels) / (h * w)  # of each channel; squares are taken from there, or they cancel
    centred = pixels - middle.unsqueeze(1)
    squares = _sum_pixels(centred.square())
    of_group = middle.unflatten(1, (shape.groups, -1))
    mean = of_group.mean(-1)
    spread = squares.unflatten(1, (shape.groups, -1)).mean(-1) / (h * w) + (
        of_group - mean.unsqueeze(-1)
    ).square().mean(-1)
    rstd = (spread + shape.eps).rsqrt()
    scale = (rstd.unsqueeze(-1) * gamma.view(shape.groups, -1)).flatten(1)
    shift = beta + (middle - mean.repeat_interleave(c // shape.groups, 1)) * scale
    out = torch.addcmul(shift.unsqueeze(1), centred, scale.unsqueeze(1))
    return _maps(out, x), mean, rstd


def _normalise_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a group normalisation with respect to its input and parameters."""
    n, c, h, w = x.shape
    groups = mean.shape[1]
    if _is_native(x, groups):
        found = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(memory_format=torch.channels_last), x, mean, rstd, gamma, n, c, h * w, groups, [True] * 3
        )
        return found[0], found[1].to(gamma.dtype), found[2].to(gamma.dtype)
    pixels, slopes = _pixels(x), _pixels(grad)
    each = c // groups
    means, rstds = mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1)
    of_beta = _sum_pixels(slopes)
    of_gamma = (_sum_pixels(slopes * pixels) - of_beta * means) * rstds
    average = (of_beta * gamma).unflatten(1, (groups, -1)).mean(-1) / (h * w)
    along = (of_gamma * gamma).unflatten(1, (groups, -1)).mean(-1) / (h * w)
    factor = -(along * rstd.square()).repeat_interleave(each, 1)
    offset = -(average * rstd).repeat_interleave(each, 1) - factor * means
    found = torch.addcmul(offset.unsqueeze(1), pixels, factor.unsqueeze(1))
    found = found.addcmul_(slopes, (rstds * gamma).unsqueeze(1))
    return _maps(found, x), of_gamma.sum(0).to(gamma.dtype), of_beta.sum(0).to(gamma.dtype)


NARROW_BYTES = 16
"""Where the channels of a group take so few bytes, torch's own normalisation cannot use a CPU's vectors."""


def _is_native(x: Tensor, groups: int) -> bool:
    """Whether torch's own normalisation knows this layout, and is the faster one.

    Called without autograd it reads memory as it lies: on a GPU it knows channels first alone, and these maps have them
    last.
    """
    is_last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return is_last and x.shape[1] // groups * x.element_size() > NARROW_BYTES


def _pixels(x: Tensor) -> Float[Tensor, "n hw c"]:
    """Maps as rows of channels, in fp32 at least."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return rows.to(torch.promote_types(x.dtype, torch.float32))


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    """Rows of channels as maps of the size and precision of ``like``; channels last in memory."""
    return pixels.to(like.dtype).unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


def _sum_pixels(pixels: Float[Tensor, "n hw c"]) -> Float[Tensor, "n c"]:
    return (pixels.new_ones(1, pixels.shape[1]) @ pixels)[:, 0]


_DOUBLING = (
    ((0.75, 0.25, 0.0), (0.25, 0.75, 0.0), (0.0, 0.75, 0.25)),
    ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25), (0.0, 0.25, 0.75)),
)
"""How three taps of a kernel on a doubled axis read three pixels of the axis itself: for the first and the second of
two new pixels, one row per tap. A new pixel is 3/4 of the old one it lies in and 1/4 of the one next to it."""


def _mix(kernel: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "(2 2 o) i 3 3"]:
    """The four kernels that give the 2x2 new pixels from the old ones."""
    taps = torch.tensor(_DOUBLING, dtype=kernel.dtype, device=kernel.device)
    with torch.autocast(kernel.device.type, enabled=False):
        mixed = torch.einsum("oiab,pay,qbx->pqoiyx", kernel, taps, taps)
    return mixed.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def _interleave(parts: Float[Tensor, "n (2 2 c) h w"]) -> Float[Tensor, "n c (h 2) (w 2)"]:
    """Put the 2x2 new pixels in their places; channels last in memory."""
    n, c4, h, w = parts.shape
    out = parts.permute(0, 2, 3, 1).view(n, h, w, 2, 2, c4 // 4).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(n, 2 * h, 2 * w, c4 // 4).permute(0, 3, 1, 2)


def _separate(out: Float[Tensor, "n c (h 2) (w 2)"]) -> Float[Tensor, "n (2 2 c) h w"]:
    """Undo ``_interleave``."""
    n, c, h, w = out.shape
    parts = out.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)
