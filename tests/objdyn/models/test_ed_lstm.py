"""ED-LSTM: teacher forcing and free running written out step by step, its sizes, its options."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from objdyn.models.ed_lstm import EDLSTM, EDLSTMConfig

TINY = EDLSTMConfig(image_size=8, state_dim=12, widths=(10,))
CONVOLUTIONAL: dict[str, Any] = {"channels": (4, 6), "widths": (10, 7)}


def build(seed: int = 0, **settings: Any) -> EDLSTM:
    torch.manual_seed(seed)
    model = EDLSTM(dataclasses.replace(TINY, **settings)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.0, 0.3)
    return model


def video(b: int = 3, t: int = 6, seed: int = 0) -> Tensor:
    frames = torch.rand(b, t, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < 0.3
    return frames.double().expand(-1, -1, 3, -1, -1)


def pixels(frames: Tensor) -> Tensor:
    return frames[:, :, 0].flatten(2)


def run_by_hand(model: EDLSTM, frames: Tensor, context: int, length: int) -> Tensor:
    """Logits of ``length`` frames: the LSTM's equations, true frames in for the first ``context``, then its own."""
    of_input, of_hidden, *biases = model.lstm.parameters()
    hidden = cell = torch.zeros(len(frames), 12, dtype=torch.float64)
    encoded = torch.zeros(len(frames), model.config.widths[-1], dtype=torch.float64)
    logits = []
    for t in range(length):
        gates = encoded @ of_input.T + hidden @ of_hidden.T + sum(biases)
        i, f, g, o = gates.chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        logits.append(model.decoder(hidden))
        encoded = model.encoder(pixels(frames)[:, t] if t < context else logits[-1].sigmoid())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("settings", [{}, CONVOLUTIONAL], ids=["connected", "convolutional"])
def test_every_frame_is_predicted_from_the_true_ones_before_it(settings: dict[str, Any]) -> None:
    model, frames = build(**settings), video()
    logits = run_by_hand(model, frames, context=6, length=6)
    nll = -torch.distributions.Bernoulli(logits=logits).log_prob(pixels(frames)).sum((1, 2)).mean()
    loss = model(frames)
    torch.testing.assert_close(loss.total, nll)
    torch.testing.assert_close(loss.terms["recon"], nll.detach() / 6)
    scene = model.decode(model.encode(frames), components=True)
    torch.testing.assert_close(pixels(scene.video), logits.sigmoid())
    assert torch.equal(scene.masks, torch.ones(3, 6, 1, 1, 8, 8))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("settings", [{}, CONVOLUTIONAL], ids=["connected", "convolutional"])
def test_a_rollout_feeds_on_its_own_frames(settings: dict[str, Any]) -> None:
    model, frames = build(**settings), video()
    logits = run_by_hand(model, frames, context=2, length=6)
    latents = model.encode(frames[:, :2])
    future = model.rollout(latents, 4)
    torch.testing.assert_close(pixels(model.decode(future).video), logits[:, 2:].sigmoid())
    again = model.rollout(model.rollout(latents, 1), 3)
    for a, b in zip(again, future, strict=True):
        torch.testing.assert_close(a, b[:, 1:])


def test_with_a_generator_a_rollout_feeds_on_drawn_frames() -> None:
    model = build()
    latents = model.encode(video(1, 2))
    drawn = model.rollout(latents, 2, generator=torch.Generator().manual_seed(0))
    white = model.decode(drawn).video[:, 0, 0].flatten(1)
    frame = torch.bernoulli(white, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.encoded[:, 0, 0], model.encoder(frame))


def test_the_first_frame_is_a_constant() -> None:
    model = build()
    first = model.decode(model.encode(video(4))).video[:, 0]
    torch.testing.assert_close(first, first[:1].expand_as(first), atol=0, rtol=0)


def test_frames_after_the_context_may_be_learned_running_free() -> None:
    model, frames = build(free_running_weight=0.5, context=2), video()
    logits = run_by_hand(model, frames, context=2, length=6)[:, 2:]
    free = -torch.distributions.Bernoulli(logits=logits).log_prob(pixels(frames)[:, 2:]).sum((1, 2)).mean()
    loss, forced = model(frames), build()(frames).total
    torch.testing.assert_close(loss.total, forced + 0.5 * free)
    torch.testing.assert_close(loss.terms["free_running"], free.detach() / 4)


def test_scheduled_sampling_replaces_frames_in_training_only() -> None:
    model, frames = build(scheduled_sampling=1.0), video()
    own = run_by_hand(model, frames, context=0, length=6)
    wanted = -torch.distributions.Bernoulli(logits=own).log_prob(pixels(frames)).sum((1, 2)).mean()
    torch.testing.assert_close(model.train()(frames).total, wanted)
    torch.testing.assert_close(model.eval()(frames).total, build()(frames).total)
    rare = build(scheduled_sampling=1e-9)
    torch.testing.assert_close(rare.train()(frames).total, build()(frames).total)


def test_a_single_frame_has_a_loss_and_all_gradients() -> None:
    model = build(**CONVOLUTIONAL).train()
    model(video(2, 1)).total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_papers_sizes() -> None:
    with torch.device("meta"):
        model = EDLSTM(EDLSTMConfig())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes == {
        "encoder": 2304 * 1024 + 1024,
        "lstm": 4 * 2048 * (1024 + 2048 + 2),
        "decoder": 2048 * 2304 + 2304,
    }


def test_one_or_two_layers_in_encoder_and_decoder() -> None:
    one, two = EDLSTM(TINY), EDLSTM(dataclasses.replace(TINY, widths=(10, 7)))
    layers = [[str(layer) for layer in part.layers] for part in (one.encoder, one.decoder, two.encoder, two.decoder)]
    assert [len(part) for part in layers] == [2, 1, 4, 3]
    assert [part[-1] == "ReLU()" for part in layers] == [True, False, True, False]
    assert "in_features=12, out_features=10" in layers[3][0]


def test_weights_begin_as_those_of_the_state_space_model() -> None:
    torch.manual_seed(0)
    model = EDLSTM(dataclasses.replace(TINY, image_size=16, state_dim=96, widths=(80,)))
    wanted = {
        "encoder.layers.0.weight": (256 * 80) ** -0.25,
        "lstm.weight_ih_l0": (96 * 80) ** -0.25,
        "lstm.weight_hh_l0": (96 * 96) ** -0.25,
        "decoder.layers.0.weight": (96 * 256) ** -0.25,
    }
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert float(parameter.detach().std()) == pytest.approx(wanted[name], rel=0.05), name
        else:
            assert not parameter.any(), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "widths must be one or more positive widths"),
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
        ({"image_size": 12, "channels": (4, 4, 4)}, r"3 of them halve image_size=12 .* got \(4, 4, 4\)"),
        ({"scheduled_sampling": 1.5}, "scheduled_sampling is a probability, got 1.5"),
        ({"free_running_weight": -1.0}, "free_running_weight must be 0 or more"),
        ({"threshold": 0.0}, r"threshold is a brightness in \(0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


def test_clips_without_frames_after_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames after the first context=5, got clips of 5; raise clip_frames"):
        build(free_running_weight=1.0)(video(1, 5))


def test_frames_that_are_not_binary_are_refused() -> None:
    for verb in (build(), build().encode):
        with pytest.raises(ValueError, match="frames must be binary"):
            verb(0.5 * video())
