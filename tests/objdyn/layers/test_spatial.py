import torch
import torch.nn.functional as F
from torch import Tensor

from objdyn.layers.spatial import (
    cut_glimpses,
    hat_weights,
    inside_squares,
    paste_glimpses,
    pixel_axis,
    spatial_softmax,
)


def places(n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    position = torch.rand(n, k, 2, generator=generator) * 2.4 - 1.2  # also outside the frame
    scale = 0.1 + 0.5 * torch.rand(n, k, 2, generator=generator)
    return position, scale


def theta(position: Tensor, scale: Tensor) -> Tensor:
    """Affine matrices for grid_sample, which wants (x, y)."""
    matrix = torch.zeros(*position.shape[:-1], 2, 3)
    matrix[..., 0, 0], matrix[..., 1, 1] = scale[..., 1], scale[..., 0]
    matrix[..., 0, 2], matrix[..., 1, 2] = position[..., 1], position[..., 0]
    return matrix.flatten(0, 1)


def test_cut_equals_grid_sample_with_gradients() -> None:
    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    position, scale = places(2, 5)
    ours, theirs = position.clone().requires_grad_(), position.clone().requires_grad_()
    cut = cut_glimpses(images, ours, scale, 8)
    grid = F.affine_grid(theta(theirs, scale), [10, 3, 8, 8], align_corners=True)
    expected = F.grid_sample(images.repeat_interleave(5, 0), grid, align_corners=True).unflatten(0, (2, 5))
    torch.testing.assert_close(cut, expected, atol=1e-5, rtol=0)
    weights = torch.rand(cut.shape, generator=torch.Generator().manual_seed(2))
    (cut * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-4)


def test_paste_equals_grid_sample_with_gradients() -> None:
    glimpses = torch.rand(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    position, scale = places(2, 5)
    ours, theirs = position.clone().requires_grad_(), position.clone().requires_grad_()
    pasted = paste_glimpses(glimpses, ours, scale, 20, 24)
    inverse = 1 / (scale + 1e-9)
    grid = F.affine_grid(theta(-theirs * inverse, inverse), [10, 4, 20, 24], align_corners=True)
    expected = F.grid_sample(glimpses.flatten(0, 1), grid, align_corners=True).unflatten(0, (2, 5))
    torch.testing.assert_close(pasted, expected, atol=1e-4, rtol=0)
    weights = torch.rand(pasted.shape, generator=torch.Generator().manual_seed(2))
    (pasted * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-2, rtol=1e-3)


def test_cut_on_whole_pixels_then_paste_is_the_identity() -> None:
    image = torch.rand(1, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    scale = torch.full((1, 1, 2), 8 / 16)  # 9 of 17 pixels: whole-pixel steps
    glimpse = cut_glimpses(image, torch.zeros(1, 1, 2), scale, 9)
    torch.testing.assert_close(glimpse[0, 0], image[0, :, 4:13, 4:13], atol=1e-5, rtol=0)
    canvas = paste_glimpses(glimpse, torch.zeros(1, 1, 2), scale, 17, 17)[0, 0]
    torch.testing.assert_close(canvas[:, 4:13, 4:13], image[0, :, 4:13, 4:13], atol=1e-5, rtol=0)
    assert canvas[:, :3].abs().max() == 0


def test_position_is_y_then_x() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 6] = 1.0
    position = torch.tensor([[[2 * 2 / 8 - 1, 2 * 6 / 8 - 1]]])
    glimpse = cut_glimpses(image, position, torch.full((1, 1, 2), 2 / 8), 3)
    assert glimpse[0, 0, 0, 1, 1] == 1.0


def test_hat_weights_sum_to_one_inside_and_vanish_outside() -> None:
    weights = hat_weights(torch.tensor([-1.0, -0.3, 0.99, 1.5, -3.0]), 11)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))


def test_inside_squares_has_the_side_asked_for() -> None:
    rows, columns = inside_squares(torch.tensor([[[0.0, 0.5]]]), 16, 64, 64)
    assert rows.sum() == 16
    assert columns.sum() == 16
    assert rows[0, 0, 24:40].all()


def test_spatial_softmax_of_a_sharp_map_is_its_pixel() -> None:
    maps = torch.full((1, 4, 4), -50.0)
    maps[0, 3, 1] = 50.0
    mean, variance, covariance = spatial_softmax(maps)
    axis = pixel_axis(4, maps)
    torch.testing.assert_close(mean[0], torch.stack([axis[3], axis[1]]))
    torch.testing.assert_close(variance, torch.full((1, 2), 1e-6))
    assert covariance.abs().item() < 1e-6


def test_spatial_softmax_equals_direct_moments() -> None:
    maps = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance, covariance = spatial_softmax(maps)
    probability = maps.flatten(1).softmax(-1).view(3, 4, 4)
    axis = pixel_axis(4, maps)
    y, x = axis[:, None].expand(4, 4), axis[None, :].expand(4, 4)
    for n in range(3):
        expected = [(probability[n] * value).sum() for value in (y, x, y * y, x * x, y * x)]
        torch.testing.assert_close(mean[n], torch.stack(expected[:2]))
        torch.testing.assert_close(variance[n], torch.stack(expected[2:4]) - mean[n] ** 2)
        torch.testing.assert_close(covariance[n], expected[4] - mean[n, 0] * mean[n, 1])
