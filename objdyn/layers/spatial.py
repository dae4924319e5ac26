"""Positions and pixels: where a coordinate is, cutting and pasting glimpses, spatial softmax.

A position is (y, x) in [-1, 1], y down, ``align_corners=True``: pixel p of n has coordinate 2 p / (n - 1) - 1. All
resampling here is bilinear and separable (scale and shift only), so a glimpse is two small matrix products, and the
same hat function serves cutting and pasting. Equal to ``affine_grid`` + ``grid_sample`` with zero padding (tested).
Everything here keeps the precision of its inputs under autocast: bf16 would blur positions.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def pixel_axis(size: int, like: Tensor) -> Float[Tensor, " n"]:
    """Coordinates of the pixels of an axis: ``size`` values from -1 to 1."""
    return torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype)


def hat_weights(coordinates: Float[Tensor, "... n"], size: int) -> Float[Tensor, "... n m"]:
    """Weights with which a bilinear sample at ``coordinates`` reads the ``m = size`` pixels of an axis.

    Zero for pixels further than one away, hence zero padding outside.
    """
    pixels = (coordinates + 1) * (0.5 * (size - 1))
    index = torch.arange(size, device=pixels.device, dtype=pixels.dtype)
    return (1 - (pixels.unsqueeze(-1) - index).abs()).clamp_min(0)


def cut_glimpses(
    images: Float[Tensor, "n c h w"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    size: int,
) -> Float[Tensor, "n k c s s"]:
    """Cut square glimpses of ``size`` pixels around each position.

    ``scale`` is the side of the glimpse over the side of the image, per axis (y, x). Differentiable in all inputs.
    """
    n, c, h, w = images.shape
    k = position.shape[1]
    axis = pixel_axis(size, images)
    centre, side = position.unsqueeze(-1), scale.unsqueeze(-1)
    with torch.autocast(images.device.type, enabled=False):
        rows = hat_weights(centre[:, :, 0] + side[:, :, 0] * axis, h)  # (n, k, s, h)
        columns = hat_weights(centre[:, :, 1] + side[:, :, 1] * axis, w)  # (n, k, s, w)
        # all row products of an image in one matrix product: (k s, h) @ (h, c w)
        cut_rows = rows.reshape(n, k * size, h) @ images.transpose(1, 2).reshape(n, h, c * w)
        cut_rows = cut_rows.view(n, k, size * c, w)
        return (cut_rows @ columns.transpose(-1, -2)).view(n, k, size, c, size).transpose(2, 3)


def paste_glimpses(
    glimpses: Float[Tensor, "n k c s s"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    height: int,
    width: int,
) -> Float[Tensor, "n k c h w"]:
    """Paste each glimpse on an empty canvas of its own: the inverse of ``cut_glimpses``.

    Pixels that the glimpse does not reach are zero. Differentiable in all inputs.
    """
    return paste_rows(glimpses, position, scale, height, width).transpose(2, 3)


def rows_reached(
    position: Float[Tensor, "n k 2"], scale: Float[Tensor, "n k 2"], height: int, size: int
) -> tuple[Int[Tensor, "n k"], int]:
    """First row of a window for each particle, and the height of all windows, so that pasting reaches no row outside.

    ``size`` is the glimpse's. The windows lie inside the image; their height is that of the largest (read from the
    device). Carries no gradient.
    """
    with torch.no_grad():
        # a glimpse's outermost pixels fade to zero one glimpse pixel outside
        reach = scale[..., 0] * ((size + 1) / (size - 1)) * (0.5 * (height - 1))
        centre = (position[..., 0] + 1) * (0.5 * (height - 1))
        largest = float(reach.max())
        rows = min(height, math.ceil(2 * largest) + 2) if math.isfinite(largest) else height
        return (centre - reach).nan_to_num().floor().clamp(0, height - rows).long(), rows


def paste_rows(
    glimpses: Float[Tensor, "n k c s s"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    height: int,
    width: int,
    first: Int[Tensor, "n k"] | None = None,
    rows: int | None = None,
) -> Float[Tensor, "n k r c w"]:
    """The ``rows`` rows from ``first`` on of what ``paste_glimpses`` gives, or all; a pixel row has all channels."""
    n, k, c, size, _ = glimpses.shape
    inverse = 1 / (scale + 1e-9)
    centre, inverse = position.unsqueeze(-1), inverse.unsqueeze(-1)
    with torch.autocast(glimpses.device.type, enabled=False):
        y, x = pixel_axis(height, glimpses), pixel_axis(width, glimpses)
        if first is not None and rows is not None:
            y = y[first.unsqueeze(-1) + torch.arange(rows, device=first.device)]  # (n, k, r)
        vertical = hat_weights((y - centre[:, :, 0]) * inverse[:, :, 0], size)  # (n, k, r, s)
        horizontal = hat_weights((x - centre[:, :, 1]) * inverse[:, :, 1], size)  # (n, k, w, s)
        pasted = vertical @ glimpses.transpose(2, 3).reshape(n, k, size, c * size)
        pasted = pasted.view(n, k, -1, size) @ horizontal.transpose(-1, -2)
        return pasted.view(n, k, -1, c, width)


def inside_squares(
    position: Float[Tensor, "n k 2"], side: int, height: int, width: int
) -> tuple[Bool[Tensor, "n k h"], Bool[Tensor, "n k w"]]:
    """Which rows and columns lie within a square of ``side`` pixels centred at each position."""
    pixels = (position + 1) * (0.5 * torch.tensor([height - 1, width - 1], device=position.device))
    rows = torch.arange(height, device=position.device) - pixels[..., 0, None]
    columns = torch.arange(width, device=position.device) - pixels[..., 1, None]
    return rows.abs() <= side / 2, columns.abs() <= side / 2


def spatial_softmax(
    maps: Float[Tensor, "n h w"],
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"], Float[Tensor, " n"]]:
    """Mean (y, x), variances (y, x) and covariance of the distribution that a softmax over each map describes.

    Variances are at least 1e-6. Source: DDLP, appendix D.2.
    """
    h, w = maps.shape[-2:]
    with torch.autocast(maps.device.type, enabled=False):
        probability = maps.flatten(1).softmax(-1).view_as(maps)
        y, x = pixel_axis(h, maps), pixel_axis(w, maps)
        rows, columns = probability.sum(2), probability.sum(1)
        mean = torch.stack([rows @ y, columns @ x], dim=-1)
        square = torch.stack([rows @ y.square(), columns @ x.square()], dim=-1)
        covariance = torch.einsum("nhw,h,w->n", probability, y, x) - mean[:, 0] * mean[:, 1]
    return mean, (square - mean.square()).clamp_min(1e-6), covariance
