import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.ndimage import correlate1d

from objdyn.metrics.image import PSNR_CAP, frame_mse, frame_psnr, frame_ssim


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_constant_error_of_a_tenth_is_20_db():
    target = torch.full((1, 2, 3, 16, 16), 0.4)
    video = torch.stack([target[:, 0] + 0.1, target[:, 1] - 0.2], dim=1)
    torch.testing.assert_close(frame_mse(video, target), torch.tensor([[0.01, 0.04]]))
    expected = torch.tensor([[20.0, -10 * math.log10(0.04)]])
    torch.testing.assert_close(frame_psnr(video, target), expected, atol=1e-3, rtol=0)


def test_each_frame_of_each_video_is_scored_alone():
    target = torch.zeros(2, 3, 3, 12, 12)
    video = torch.zeros_like(target)
    video[1, 2] = 0.5
    errors = frame_mse(video, target)
    assert errors.shape == (2, 3)
    assert errors[1, 2] == 0.25
    assert errors.sum() == 0.25
    assert frame_psnr(video, target)[0, 0] == PSNR_CAP


def test_a_perfect_frame_is_the_cap_and_one_grey_level_stays_below_it():
    target = torch.zeros(1, 1, 3, 64, 64)
    video = target.clone()
    assert frame_psnr(video, target).item() == PSNR_CAP == 100.0
    video[0, 0, 0, 5, 5] = 1 / 255
    expected = 20 * math.log10(255) + 10 * math.log10(3 * 64 * 64)
    assert frame_psnr(video, target).item() == pytest.approx(expected, abs=1e-3)
    assert expected < 90


def test_values_outside_the_range_are_clamped_first():
    target = torch.ones(1, 1, 1, 11, 11)
    assert frame_mse(target + 3, target).item() == 0
    assert frame_psnr(target + 3, target).item() == PSNR_CAP


def test_a_single_frame_and_the_mean_of_db_is_not_the_db_of_the_mean():
    target = torch.zeros(1, 2, 1, 12, 12)
    video = torch.tensor([0.1, 0.01]).reshape(1, 2, 1, 1, 1).expand(1, 2, 1, 12, 12)
    assert frame_psnr(video, target).mean().item() == pytest.approx(30.0, abs=1e-3)
    assert frame_mse(video[:, :1], target[:, :1]).shape == (1, 1)


def test_ssim_of_constant_frames_is_the_luminance_term():
    a, b = 0.3, 0.5
    video, target = torch.full((1, 1, 3, 16, 16), a), torch.full((1, 1, 3, 16, 16), b)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert frame_ssim(video, target).item() == pytest.approx(expected, abs=1e-4)
    assert frame_ssim(video, video).item() == pytest.approx(1.0, abs=1e-6)


def test_ssim_equals_the_definition_over_windows_inside_the_frame():
    video, target = noise(1, 2, 3, 20, 24, seed=1), noise(1, 2, 3, 20, 24, seed=2)
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        smooth = correlate1d(correlate1d(x, kernel, axis=-1), kernel, axis=-2)
        return smooth[..., 5:-5, 5:-5]

    x, y = video.double().numpy(), target.double().numpy()
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    index = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    np.testing.assert_allclose(frame_ssim(video, target).numpy(), index.mean(axis=(2, 3, 4)), atol=1e-5)


def test_frames_smaller_than_the_window_are_refused():
    small = torch.zeros(1, 1, 3, 10, 64)
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 10x64"):
        frame_ssim(small, small)


def test_shapes_that_differ_are_refused():
    # With shapes checked at run time (see the README) the annotation refuses first.
    with pytest.raises((ValueError, TypeCheckError), match=r"they must agree|Type-check error"):
        frame_mse(torch.zeros(1, 2, 3, 12, 12), torch.zeros(1, 3, 3, 12, 12))
