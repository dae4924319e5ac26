"""PROVIDE: its grid, its cell written out, its ablations, its start from an IODINE."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from objdyn.layers import mixture
from objdyn.models.iodine import IODINE, IODINEConfig, State
from objdyn.models.provide import PROVIDE, GridLSTMCell, Prior, PROVIDEConfig, light_cells, start_from_iodine

SIZES: dict[str, Any] = {
    "image_size": 8,
    "num_slots": 3,
    "slot_dim": 4,
    "decoder_channels": (6, 6),
    "refine_channels": (6, 6),
    "refine_dim": 8,
}
TINY = PROVIDEConfig(**SIZES, num_refinements=3)
SQUEEZENET_STEM = 25_632
"""Parameters of the frozen network whose features the released code adds; never built here."""


def build(seed: int = 0, **settings: Any) -> PROVIDE:
    torch.manual_seed(seed)
    return PROVIDE(dataclasses.replace(TINY, **settings)).eval()


def video(b: int = 2, t: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(b, t, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_default_sizes_with_extra_features_have_the_parameters_of_the_released_code() -> None:
    model = PROVIDE(PROVIDEConfig(extra_channels=128), extra_features=lambda frames: frames)
    assert sum(p.numel() for p in model.parameters()) == 2_977_940 - SQUEEZENET_STEM


@pytest.mark.parametrize(("r", "t"), [(5, 4), (2, 6), (3, 3), (6, 10), (1, 3)])
def test_every_frame_has_its_column_of_the_triangular_grid(r: int, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(num_refinements=r)
    looked: list[bool] = []
    look = model.refiner.look

    def count(*arguments: Any, final: bool = False, **named: Any) -> Any:
        looked.append(final)
        return look(*arguments, final=final, **named)

    monkeypatch.setattr(model.refiner, "look", count)
    model(video(t=t))
    wanted: list[bool] = []
    for frame in range(1, t + 1):
        wanted += [False] * max(r - frame, 1) + [True]
    assert looked == wanted
    if t >= r > 1:
        assert len(looked) == r * (r + 1) // 2 - 1 + 2 * (t - r + 1)
    if (r, t) == (5, 4):
        assert len(looked) == 14


def test_without_the_grid_every_frame_is_refined_alike() -> None:
    config = dataclasses.replace(TINY, grid="full", num_refinements=5)
    assert [light_cells(config, t) for t in range(4)] == [4, 4, 4, 4]


def test_the_loss_counts_the_final_cell_of_each_frame_fully() -> None:
    """Without KL, and with a decoder that shows nothing, every cell has the same loss: half of it, then all of it."""
    model = build(num_refinements=1, kl_weight=0.0)
    with torch.no_grad():
        for parameter in model.refiner.decoder.parameters():
            parameter.zero_()
    loss = model(video(b=1, t=3))
    assert float(loss.total.detach()) == pytest.approx(3 * 1.5 * 100 * float(loss.terms["recon"]), rel=1e-5)


def test_the_2d_lstm_is_its_equations() -> None:
    torch.manual_seed(0)
    cell = GridLSTMCell(5, 2)
    x, past, state = torch.randn(1, 1, 5), State(*torch.randn(2, 1, 1, 2)), State(*torch.randn(2, 1, 1, 2))
    a = cell.from_input(x) + cell.from_past(past.hidden) + cell.from_state(state.hidden)
    i, f, o, mix = (a[..., 2 * g : 2 * g + 2].sigmoid() for g in range(4))
    c = f * (mix * past.cell + (1 - mix) * state.cell) + i * a[..., 8:].tanh()
    found = cell(x, past, state)
    torch.testing.assert_close(found.cell, c)
    torch.testing.assert_close(found.hidden, o * c.tanh())


def test_the_released_prior_never_has_a_standard_deviation_below_one() -> None:
    torch.manual_seed(0)
    state = 10 * torch.randn(4, 3, 8)
    assert Prior(8, 4, "softplus_logvar")(state).log_var.min() >= 0
    assert Prior(8, 4, "linear")(state).log_var.min() < 0


def test_the_prior_network_says_log_sigma_or_in_the_released_code_the_log_variance() -> None:
    torch.manual_seed(0)
    state = torch.randn(4, 3, 8)
    for head in ("linear", "softplus_logvar"):
        prior = Prior(8, 4, head)
        hidden = prior.hidden(state).clamp_min(0)
        output = prior.spread(hidden)
        wanted = output.exp().square() if head == "linear" else F.softplus(output).exp()
        found = prior(state)
        torch.testing.assert_close(found.log_var.exp(), wanted)
        torch.testing.assert_close(found.mean, prior.mean(hidden))


class Spy:
    """Calls of a model's ``look`` and ``describe``, and inputs of its CNN and its LSTM, cell by cell."""

    def __init__(self, model: PROVIDE, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked: list[tuple[Any, Any, Any]] = []
        """Positional and named arguments, and the ``Sight``."""
        self.described: list[Any] = []
        """Named arguments."""
        self.maps: list[tuple[Tensor, Tensor]] = []
        self.states: list[tuple[Tensor, State, State]] = []
        look, describe = model.refiner.look, model.refiner.describe

        def note_look(*arguments: Any, **named: Any) -> Any:
            sight = look(*arguments, **named)
            self.looked.append((arguments, named, sight))
            return sight

        def note_describe(*arguments: Any, **named: Any) -> Any:
            self.described.append(named)
            return describe(*arguments, **named)

        monkeypatch.setattr(model.refiner, "look", note_look)
        monkeypatch.setattr(model.refiner, "describe", note_describe)
        model.refiner.cnn.register_forward_pre_hook(lambda _, given: self.maps.append(given))
        model.lstm.register_forward_pre_hook(lambda _, given: self.states.append(given))


def states_before(model: PROVIDE, frames: int) -> list[Tensor]:
    """The temporal state before each frame of ``video(t=frames)``."""
    with torch.no_grad():
        hidden = model.encode(video(t=frames)).hidden
    return [torch.zeros_like(hidden[:, 0]), *hidden.unbind(1)]


def test_the_loss_has_the_kl_to_the_prior_of_the_temporal_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of the loss added up, its KL by torch and its prior from the state that encoding leaves behind."""
    model = build(entropy_weight=0.3)
    before = states_before(model, 3)
    assert model.prior is not None
    spy = Spy(model, monkeypatch)
    with torch.no_grad():
        loss = model(video(t=3))
        cells = iter(spy.looked)
        total, last = 0.0, []
        for t in range(3):
            prior = model.prior(before[t])
            p = Normal(prior.mean, (prior.log_var / 2).exp())
            decodes = light_cells(model.config, t) + 1
            for s in range(1, decodes + 1):
                (_, posterior, _), named, sight = next(cells)
                torch.testing.assert_close(named["prior"], prior)
                kl = kl_divergence(Normal(posterior.mean, (posterior.log_var / 2).exp()), p).flatten(1).sum(1)
                total += s / decodes * float((100 * sight.found.nll + 10 * kl + 0.3 * sight.found.entropy).mean())
                last += [kl.mean()] if s == decodes else []
    assert next(cells, None) is None
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(loss.terms["kl"], torch.stack(last).mean())
    refined = [named for _, named, sight in spy.looked if sight.grad_slots is not None]
    assert all(a["prior"] is b["prior"] for a, b in zip(refined, spy.described, strict=True))


@pytest.mark.parametrize("refine_final_cell", [False, True])
def test_every_cell_sees_the_temporal_state_before_its_frame(
    refine_final_cell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(refine_final_cell=refine_final_cell)
    before = states_before(model, 3)
    spy = Spy(model, monkeypatch)
    with torch.no_grad():
        latents = model.encode(video(t=3))
    cells = [t for t in range(3) for _ in range(light_cells(model.config, t) + (refine_final_cell and t > 0))]
    assert len(spy.looked) == len(spy.states) == len(cells)
    for t, (_, named, sight), (_, past, _) in zip(cells, spy.looked, spy.states, strict=True):
        assert torch.equal(past.hidden, before[t])
        assert torch.equal(named["context"], before[t])
        torch.testing.assert_close(sight.logits, model.refiner.logits(sight.slots, before[t]))
    for t in range(3):
        assert torch.equal(latents.decoder_state[:, t], before[t])


def test_a_decoded_frame_depends_on_the_temporal_state_before_it() -> None:
    model = build()
    with torch.no_grad():
        latents = model.encode(video())
        rendering = mixture.render(model.refiner.logits(latents.slots[:, 2], latents.decoder_state[:, 2]))
        other = latents._replace(decoder_state=torch.zeros_like(latents.decoder_state))
        scene, moved = model.decode(latents), model.decode(other)
    torch.testing.assert_close(scene.video[:, 2], rendering.frame)
    torch.testing.assert_close(scene.video[:, 0], moved.video[:, 0])  # before the first frame it is zero anyway
    assert all(not torch.allclose(scene.video[:, t], moved.video[:, t]) for t in (1, 2, 3))


@pytest.mark.parametrize("prediction", ["paper", "reference"])
def test_a_prediction_depends_on_the_temporal_state(prediction: str) -> None:
    model = build(prediction=prediction)
    with torch.no_grad():
        latents = model.encode(video())
        future = model.rollout(latents, 2)
        for name in ("hidden", "cell"):
            other = latents._replace(**{name: torch.zeros_like(latents.hidden)})
            for a, b in zip(model.rollout(other, 2).hidden.unbind(1), future.hidden.unbind(1), strict=True):
                assert not torch.allclose(a, b), name
    assert torch.equal(future.decoder_state[:, 0], latents.hidden[:, -1])
    assert torch.equal(future.decoder_state[:, 1], future.hidden[:, 0])


@pytest.mark.parametrize("prediction", ["paper", "reference"])
def test_a_prediction_sees_its_own_reconstruction_and_no_gradient(
    prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its likelihood is one of the other inputs and stays. Maps of a slot: means, mask, logit, gradients, posterior."""
    model = build(prediction=prediction)
    spy = Spy(model, monkeypatch)
    with torch.no_grad():
        latents = model.encode(video())
        inferred = len(spy.maps)
        model.rollout(latents, 2)
    assert len(spy.maps) > inferred
    cells = zip(spy.looked, spy.maps, spy.states, strict=True)
    for number, ((_, _, sight), (shared, slots), (described, _, _)) in enumerate(cells):
        gradients = (slots[:, :, 5:8], slots[:, :, 8:9], described[..., 8:16])
        reconstruction = (slots[:, :, :3] * slots[:, :, 3:4]).sum(1)
        assert (shared[:, 5] != 0).any()
        torch.testing.assert_close(shared[:, 5:], F.layer_norm(sight.found.log_likelihood, (1, 8, 8)))
        if number < inferred:
            assert all(gradient.abs().amax((0, -1)).min() > 0.1 for gradient in gradients)
            assert not torch.allclose(shared[:, :3], reconstruction, atol=0.1)
        else:
            assert all((gradient == 0).all() for gradient in gradients)
            torch.testing.assert_close(shared[:, :3], reconstruction)


def test_permuting_the_first_draw_permutes_the_slots_in_every_frame() -> None:
    model, order = build(), [2, 0, 1]
    first = torch.randn(2, 3, 4)
    frames = video()

    def encode(noise: Tensor) -> list[Tensor]:
        past, found = model.refiner.rest(noise), []
        for t in range(4):
            scene = model.refiner.see(frames[:, t])
            latents, past = model._infer(scene, past, noise, t, None)
            found.append(latents.slots)
        return found

    with torch.no_grad():
        for a, b in zip(encode(first), encode(first[:, order]), strict=True):
            torch.testing.assert_close(a[:, order], b, atol=1e-4, rtol=1e-4)


def test_the_number_of_slots_may_change_after_training() -> None:
    model, more = build(), build(num_slots=6)
    more.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert more.rollout(more.encode(video()), 2).slots.shape == (2, 2, 6, 4)


@pytest.mark.parametrize("refine_final_cell", [False, True])
def test_recomputation_changes_no_loss_and_no_gradient(refine_final_cell: bool) -> None:
    results = []
    for recompute in (False, True):
        model = build(recompute=recompute, refine_final_cell=refine_final_cell).train()
        torch.manual_seed(1)
        loss = model(video())
        loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=1e-3)


class Kept:
    """A tensor that autograd keeps for backward, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(recompute: bool, frames: int) -> int:
    torch.manual_seed(0)
    model = PROVIDE(PROVIDEConfig(image_size=16, num_refinements=2, num_slots=2, recompute=recompute))
    kept: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        holder = Kept(tensor)
        kept.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = model(torch.rand(1, frames, 3, 16, 16))
    assert torch.isfinite(loss.total)
    tensors = [holder.tensor for reference in kept if (holder := reference()) is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_grows_evenly_with_frames_and_with_recomputation_by_at_most_a_third() -> None:
    """Bytes that autograd keeps, with the published widths at 16 pixels."""
    plain = [kept_bytes(recompute=False, frames=t) for t in (3, 4, 5)]
    recomputed = [kept_bytes(recompute=True, frames=t) for t in (3, 4, 5)]
    assert plain[2] - plain[1] == pytest.approx(plain[1] - plain[0], rel=0.01)
    assert recomputed[2] - recomputed[1] <= (plain[2] - plain[1]) / 3


def test_a_draw_for_every_frame_is_another_one_and_repeats() -> None:
    model = build(share_first_draw=False)
    with torch.no_grad():
        latents = model.encode(video(b=1))
        future = model.rollout(latents, 2)
    draws = [*latents.first_noise.unbind(1), *future.first_noise.unbind(1)]
    assert len({tuple(noise.flatten().tolist()) for noise in draws}) == 6
    assert torch.equal(latents.first_noise, model.encode(video(b=1)).first_noise)


@pytest.mark.parametrize("settings", [{"num_refinements": 2}, {"num_refinements": 1}, {"grid": "full"}])
def test_the_final_cell_advances_the_state_from_the_second_frame_on(settings: dict[str, Any]) -> None:
    plain, more = build(**settings), build(**settings, refine_final_cell=True)
    with torch.no_grad():
        a, b = plain.encode(video()), more.encode(video())
    assert torch.equal(a.hidden[:, 0], b.hidden[:, 0])
    assert not torch.allclose(a.hidden[:, 1], b.hidden[:, 1])


def test_a_prediction_after_few_frames_takes_its_place_on_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(num_refinements=6)
    counts: list[int] = []
    monkeypatch.setattr("objdyn.models.provide.light_cells", lambda config, t: counts.append(t) or 1)
    with torch.no_grad():
        model.rollout(model.encode(video(t=2)), 3)
    assert counts == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prediction", ["paper", "reference"])
def test_a_prediction_needs_only_what_the_latents_hold(prediction: str) -> None:
    model = build(prediction=prediction)
    with torch.no_grad():
        latents = model.encode(video())
        last = type(latents)(*(field[:, -1:] for field in latents))
        whole, part = model.rollout(latents, 3), model.rollout(last, 3)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a, b)


def test_the_released_prediction_is_the_decode_of_the_first_draw() -> None:
    model = build(prediction="reference", conditional_decoder="none")
    with torch.no_grad():
        latents = model.encode(video())
        future = model.rollout(latents, 2)
    start = model.refiner.start(latents.first_noise[:, -1]).sample(latents.first_noise[:, -1])
    torch.testing.assert_close(future.slots[:, 0], start)
    torch.testing.assert_close(future.slots[:, 1], start)


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": "full", "conditional_prior": False, "conditional_decoder": "none"},
        {"conditional_prior": False, "conditional_decoder": "none"},
        {"share_first_draw": False},
        {"refine_final_cell": True, "cell_weights": "reference", "prior_head": "softplus_logvar"},
    ],
)
def test_every_variant_trains_all_of_its_parameters(settings: dict[str, Any]) -> None:
    model = build(**settings).train()
    model(video()).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_start_from_iodine_infers_the_first_frame_as_iodine_does() -> None:
    torch.manual_seed(0)
    old = IODINE(IODINEConfig(**SIZES, num_refinements=3)).eval()
    model = build(seed=1, conditional_decoder="residual", likelihood_weight=10.0, kl_weight=1.0)
    start_from_iodine(model, old.config, old.state_dict())
    dim = TINY.refine_dim
    with torch.no_grad():
        model.lstm.from_input.bias[3 * dim : 4 * dim] = -40.0  # the mixing gate shut: the refinement's cell alone
        frame = video(t=1)
        torch.testing.assert_close(model.encode(frame).slots, old.encode(frame).slots, atol=1e-4, rtol=1e-4)
        scene, wanted = model.decode(model.encode(frame)), old.decode(old.encode(frame))
    torch.testing.assert_close(scene.video, wanted.video, atol=1e-4, rtol=1e-4)


def test_a_start_from_an_iodine_of_another_size_is_refused() -> None:
    old = IODINE(IODINEConfig(**{**SIZES, "slot_dim": 5}))
    other = IODINE(IODINEConfig(**SIZES, likelihood_var=0.05))
    with pytest.raises(ValueError, match=r"trained with likelihood_var=0.05, and this one has 0.3"):
        start_from_iodine(build(conditional_decoder="residual"), other.config, other.state_dict())
    with pytest.raises(ValueError, match=r"initial_mean is \(5,\) there and \(4,\) here"):
        start_from_iodine(build(conditional_decoder="residual"), old.config, old.state_dict())
    with pytest.raises(ValueError, match=r"set model\.conditional_decoder to"):
        start_from_iodine(build(), old.config, old.state_dict())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prediction", ["paper", "reference"])
def test_a_frozen_model_infers_alike_with_and_without_gradients_enabled(prediction: str, recompute: bool) -> None:
    model = build(prediction=prediction, recompute=recompute)

    def run() -> list[Tensor]:
        latents = model.encode(video())
        future = model.rollout(latents, 2)
        return [*latents, *future, model.decode(future).video, model(video()).total]

    with torch.no_grad():
        wanted = run()
    model.requires_grad_(False)
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


PARTS = ["refiner.initial", "refiner.vector", "refiner.decoder", "refiner.cnn", "refiner.head", "lstm", "prior"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_trained_alone_gets_the_gradient_that_it_gets_among_all(part: str, recompute: bool) -> None:
    gradients = []
    for others in (True, False):
        model = build(recompute=recompute).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(others or name.startswith(part))
        torch.manual_seed(1)
        model(video(t=3)).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if name.startswith(part)})
    for name, wanted in gradients[0].items():
        assert wanted is not None
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("settings", [{"inference": "sequential"}, {"sequential_clamp": 10.0}])
def test_settings_of_seq_iodine_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="provide has no such mode"):
        build(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "square"}, "^grid must be 'triangular' or 'full', got 'square'$"),
        ({"prior_head": "softplus"}, "^prior_head must be 'linear' or 'softplus_logvar', got 'softplus'$"),
        ({"conditional_decoder": "film"}, "^conditional_decoder must be 'mlp' or 'residual' or 'none', got 'film'$"),
        ({"prediction": "code"}, "^prediction must be 'paper' or 'reference', got 'code'$"),
        ({"refine": "stride"}, "^refine must be 'full' or 'strided', got 'stride'$"),
        ({"num_slots": 1}, "^num_slots must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
