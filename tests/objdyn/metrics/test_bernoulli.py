import math

import numpy as np
import pytest
import torch
from torch import Tensor

from objdyn.metrics.bernoulli import (
    bce_double_sigmoid,
    bernoulli_nll,
    bounds_of_share,
    constant_nll,
    double_sigmoid_bounds,
    entropy,
    white_pixels,
)
from objdyn.simulators import cannonballs, simulator


def binary(*shape: int, share: float = 0.3, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share).float()


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def cannons(count: int = 60) -> tuple[Tensor, Tensor]:
    """Frames as they are, and with balls where they are without noise."""
    episodes = simulator("cannonballs").episodes("test", 0, count, None)
    options = cannonballs.Options()
    frames = np.stack([episode.clip().frames[..., 0] > 0 for episode in episodes])
    tracks = [cannonballs.simulate(options, "test", number).positions for number in range(count)]
    clean = np.stack([cannonballs.label(cannonballs.to_coordinates(track, options), 48) > 0 for track in tracks])
    return torch.from_numpy(frames).float(), torch.from_numpy(clean).float()


def test_nll_is_that_of_independent_bernoulli_pixels() -> None:
    target, p = binary(2, 3, 4, 5), probabilities(2, 3, 4, 5)
    expected = -torch.distributions.Bernoulli(p.double()).log_prob(target.double()).sum(dim=(2, 3))
    found = bernoulli_nll(p, target)
    torch.testing.assert_close(found.per_frame, expected)
    torch.testing.assert_close(found.per_pixel, expected / 20)


def test_logits_and_probabilities_agree_and_logits_go_farther() -> None:
    target, logits = binary(1, 2, 4, 4), 6 * probabilities(1, 2, 4, 4) - 3
    torch.testing.assert_close(
        bernoulli_nll(logits, target, logits=True).per_frame, bernoulli_nll(logits.double().sigmoid(), target).per_frame
    )
    white, far = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), -500.0)
    assert bernoulli_nll(far, white, logits=True).per_frame.item() == 500
    assert bernoulli_nll(far.sigmoid(), white).per_frame.item() == 100


def test_the_best_constant_is_the_white_share() -> None:
    target = binary(2, 4, 8, 8, share=0.1)
    share = target.mean().item()
    for p, best in ((share, True), (0.9 * share, False), (1.1 * share, False)):
        value = bernoulli_nll(torch.full_like(target, p).double(), target).per_pixel.mean().item()
        assert value == pytest.approx(constant_nll(target), rel=1e-6) if best else value > constant_nll(target)
    assert constant_nll(torch.zeros(1, 1, 2, 2)) == constant_nll(torch.ones(1, 1, 2, 2)) == 0
    assert constant_nll(target) == entropy(share)


def test_double_sigmoid_takes_probabilities_for_logits() -> None:
    target, p = binary(2, 3, 4, 5), probabilities(2, 3, 4, 5).double()
    expected = bernoulli_nll(p, target, logits=True).per_pixel
    torch.testing.assert_close(bce_double_sigmoid(p, target), expected)


def test_double_sigmoid_has_the_bounds_that_its_formula_says() -> None:
    target = binary(2, 3, 16, 16, share=0.02)
    share = target.mean().item()
    bounds = double_sigmoid_bounds(target)
    for prediction, bound in (
        (torch.zeros_like(target), bounds.all_black),
        (target, bounds.perfect),
        (torch.full_like(target, share), bounds.constant),
    ):
        assert bce_double_sigmoid(prediction, target).mean().item() == pytest.approx(bound, abs=1e-7)
    assert bounds == bounds_of_share(share)
    assert bounds.all_black == pytest.approx(math.log(2))
    assert bounds.perfect == pytest.approx(math.log(2) - 0.3799 * share, abs=1e-5)
    for seed in range(20):
        assert bce_double_sigmoid(probabilities(2, 3, 16, 16, seed=seed), target).mean() > bounds.perfect
    # A pixel painted for nothing costs this much.
    wrong = bce_double_sigmoid(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item() - math.log(2)
    assert wrong == pytest.approx(0.6201, abs=1e-4)


def test_the_papers_numbers_lie_where_the_formula_puts_cannonballs() -> None:
    frames, clean = cannons()
    bounds = double_sigmoid_bounds(frames)
    assert bounds.all_black == pytest.approx(0.6931, abs=1e-4)  # the paper's ED-LSTM: 0.693
    assert bounds.perfect == pytest.approx(0.6891, abs=1e-4)
    assert bounds.perfect < 0.691 < bce_double_sigmoid(clean, frames).mean().item()  # the paper's model: 0.691
    assert bce_double_sigmoid(clean, frames).mean().item() == pytest.approx(0.6922, abs=2e-4)
    assert constant_nll(frames) == pytest.approx(0.059, abs=0.002)


def test_white_pixels_are_counted_by_frame() -> None:
    target = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    p = torch.tensor([[[[0.9, 0.5], [0.51, 0.8]], [[0.0, 0.6], [0.0, 0.0]]]])
    found = white_pixels(p, target)
    assert [counts.tolist() for counts in found] == [[[2, 0]], [[3, 1]], [[3, 0]]]
    assert (found.precision, found.recall, found.f1) == pytest.approx((2 / 4, 2 / 3, 4 / 7))
    assert white_pixels(p, target, threshold=0.4).recall == 1


def test_nothing_painted_has_no_precision_and_nothing_white_no_recall() -> None:
    black, white = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    blind, empty, both = white_pixels(black, white), white_pixels(white, black), white_pixels(black, black)
    assert math.isnan(blind.precision)
    assert (blind.recall, blind.f1) == (0, 0)
    assert math.isnan(empty.recall)
    assert (empty.precision, empty.f1) == (0, 0)
    assert math.isnan(both.f1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bernoulli_nll(binary(1, 1, 2, 2), binary(1, 1, 2, 3)), "of one shape|target"),
        (lambda: bernoulli_nll(binary(1, 1, 3, 2, 2), binary(1, 1, 3, 2, 2)), r"\(b, t, h, w\)|prediction"),
        (lambda: bernoulli_nll(binary(1, 1, 2, 2), 255 * torch.ones(1, 1, 2, 2)), "must be binary"),
        (lambda: bernoulli_nll(binary(1, 1, 2, 2) - 3, binary(1, 1, 2, 2)), r"in \[0, 1\], got"),
        (lambda: bce_double_sigmoid(binary(1, 1, 2, 2) + 1, binary(1, 1, 2, 2)), r"in \[0, 1\], got"),
        (lambda: bernoulli_nll(torch.full((1, 1, 2, 2), math.nan), binary(1, 1, 2, 2), logits=True), "holds NaN"),
        (lambda: white_pixels(binary(1, 1, 2, 2), probabilities(1, 1, 2, 2)), "must be binary"),
        (lambda: constant_nll(torch.zeros(0, 1, 2, 2)), "no pixel"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message: str) -> None:
    # TypeError where annotations are checked at run time.
    with pytest.raises((ValueError, TypeError), match=message):
        call()
