"""Binary frames in and out, their likelihood, the initial weights."""

import pytest
import torch

from objdyn.layers.binary import bernoulli_nll, binary_frames, init_matrix, to_video


def test_one_of_three_equal_channels_is_taken_row_by_row() -> None:
    frames = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    video = to_video(frames.view(1, 1, 4), 2)
    assert video.shape == (1, 1, 3, 2, 2)
    assert video[0, 0, 1].tolist() == [[0, 1], [0, 0]]
    assert torch.equal(binary_frames(video, 2), frames.view(1, 1, 4))


def test_every_byte_of_black_and_white_is_taken_for_binary() -> None:
    video = torch.tensor([0, 255], dtype=torch.uint8).float().div(255).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
    assert binary_frames(video, 4).unique().tolist() == [0, 1]


def test_grey_and_coloured_frames_are_refused_unless_a_threshold_is_given() -> None:
    grey = torch.zeros(1, 1, 3, 2, 2)
    grey[..., 0, 0] = 0.25
    red = torch.zeros(1, 1, 3, 2, 2)
    red[:, :, 0, 0, 0] = 1
    for video, first in ((grey, "0.250"), (red, "0.333")):
        with pytest.raises(ValueError, match=rf"25.00% of the pixels .* first is {first}.* set model.threshold=0.5"):
            binary_frames(video, 2)
    assert binary_frames(grey, 2, threshold=0.2).flatten().tolist() == [1, 0, 0, 0]
    assert binary_frames(red, 2, threshold=0.5).flatten().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(1, 2, 1, 4, 4), (1, 2, 3, 4, 5), (2, 3, 4, 4), (0, 2, 3, 4, 4), (1, 0, 3, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"built for video \(b, t, 3, 4, 4\).* set model.image_size"):
        binary_frames(torch.zeros(shape), 4)


def test_the_likelihood_is_that_of_independent_pixels() -> None:
    draws = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(2, 3, 9, generator=draws, dtype=torch.float64)
    frames = torch.randint(0, 2, (2, 3, 9), generator=draws).double()
    wanted = -torch.distributions.Bernoulli(logits=logits).log_prob(frames).sum(-1)
    torch.testing.assert_close(bernoulli_nll(logits, frames), wanted)


def test_initial_weights_deviate_by_the_fourth_root_of_their_number() -> None:
    torch.manual_seed(0)
    weight = torch.empty(400, 225)
    init_matrix(weight)
    assert float(weight.std()) == pytest.approx(90_000**-0.25, rel=0.01)
    init_matrix(weight, 10_000)
    assert float(weight.std()) == pytest.approx(0.1, rel=0.01)
