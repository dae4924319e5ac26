"""ODDN: its attention, relation and loss written out, its untrained predictions, its start from an IODINE."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from objdyn.layers import mixture
from objdyn.models.iodine import IODINE, LOG_VAR_RANGE, Fit, IODINEConfig
from objdyn.models.oddn import (
    ODDN,
    Distillation,
    LinearBaseline,
    ODDNConfig,
    ODDNLatents,
    Predictor,
    Relation,
    start_from_iodine,
)

SIZES: dict[str, Any] = {
    "image_size": 8,
    "num_slots": 3,
    "slot_dim": 4,
    "num_refinements": 3,
    "decoder_channels": (6, 6),
    "refine_channels": (6, 6),
    "refine_dim": 8,
    "likelihood_weight": 2.0,
    "kl_weight": 0.7,
}
TINY = ODDNConfig(
    **SIZES, share_first_draw=True, dynamics_dim=2, attention_dim=5, distillation_dim=7, relation_dim=6, linear_dim=9
)


def build(seed: int = 0, **settings: Any) -> ODDN:
    torch.manual_seed(seed)
    return ODDN(dataclasses.replace(TINY, **settings)).eval()


def moved(model: ODDN, seed: int = 1) -> ODDN:
    """The model with predictor weights that are no longer those of the beginning."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.predictor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def video(b: int = 2, t: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(b, t, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def predict(model: ODDN, previous: Tensor, current: Tensor) -> Tensor:
    return model.predictor(previous, current)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_code", [False, True])
def test_attention_by_pairs_of_frames_is_one_masked_attention_over_all_slots_of_the_clip(time_code: bool) -> None:
    """Written as the paper has it, an N K x N K matrix; with a time code each query sees its own entries."""
    torch.manual_seed(0)
    n, k, d = 4, 3, 5
    layer = Distillation(d, 2, 7, 4, time_code)
    if layer.time_code is not None:
        torch.nn.init.normal_(layer.time_code)
    z = torch.randn(n, k, d)
    tokens = z.flatten(0, 1)
    frame = torch.arange(n).repeat_interleave(k)
    attended = torch.zeros_like(tokens)
    for query in range(n * k):
        entries = tokens.clone()
        if layer.time_code is not None:
            entries[frame == frame[query] - 1] += layer.time_code[0].detach()
            entries[frame == frame[query]] += layer.time_code[1].detach()
        seen = (frame == frame[query]) | (frame == frame[query] - 1)
        scores = (entries @ layer.key.weight.T) @ (layer.query.weight @ tokens[query]) / 2**0.5
        alpha = torch.where(seen, scores, -torch.inf).softmax(0)
        attended[query] = sum(alpha[i] * (layer.value.weight @ entries[i]) for i in range(n * k))
    whole = layer.ffn(layer.norm(attended + tokens)).unflatten(0, (n, k))
    torch.testing.assert_close(layer(z[:-1], z[1:]), whole[1:])


def test_the_time_code_has_two_values_and_is_no_part_of_the_queries() -> None:
    """Adding c to the frame before in advance is what code (c, 0) does; the present frame's residual stays as it is."""
    torch.manual_seed(0)
    plain, coded = Distillation(4, 3, 7, 2, False), Distillation(4, 3, 7, 2, True)
    coded.load_state_dict({**plain.state_dict(), "time_code": torch.zeros(2, 4)})
    previous, current, code = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4)
    assert coded.time_code is not None
    torch.testing.assert_close(coded(previous, current), plain(previous, current))
    with torch.no_grad():
        coded.time_code[0] = code
    torch.testing.assert_close(coded(previous, current), plain(previous + code, current))
    with torch.no_grad():
        coded.time_code[1] = code
    assert not torch.allclose(coded(previous, current), plain(previous + code, current + code))
    assert not torch.allclose(coded(previous, current), plain(previous, current))


def test_without_a_time_code_still_objects_and_swapped_slots_of_the_frame_before_look_alike() -> None:
    torch.manual_seed(0)
    layer = Distillation(4, 3, 7, 2, False)
    previous, current = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(previous[:, [2, 0, 1]], current), layer(previous, current))


def test_distillation_starts_as_a_difference_of_frames() -> None:
    """With slots far apart attention is on a slot's own entries, and what is normalised is 0.55 z_n - 0.45 z_{n-1}."""
    torch.manual_seed(0)
    distillation = Distillation(6, 6, 8, 3)
    slots = 5 * torch.eye(6)[:4].expand(2, 4, 6)
    moved = slots + 0.1 * torch.randn(2, 4, 6)
    seen: list[Tensor] = []
    distillation.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    distillation(slots, moved)
    scores = torch.einsum("nqd,nid->nqi", moved, torch.cat([slots, moved], dim=1)).softmax(-1)
    torch.testing.assert_close(seen[0], moved - 0.9 * scores @ torch.cat([slots, moved], dim=1))
    own = scores.unflatten(-1, (2, 4)).diagonal(dim1=1, dim2=3)
    assert own.sum(1).min() > 0.999  # of the two frames together
    narrow = Distillation(6, 4, 8, 3)
    scores = narrow.query.weight.T @ narrow.key.weight * narrow.scale
    torch.testing.assert_close(scores, torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0])))
    assert Distillation(6, 6, 8, 3, init="default").value.weight.diagonal().min() > -0.45  # torch's, within 1 / sqrt(6)


def test_the_relation_module_is_its_sum_over_all_other_slots() -> None:
    torch.manual_seed(0)
    relation = Relation(4, 2, 6)
    torch.nn.init.normal_(relation.update.weight)
    dynamics, static = torch.randn(2, 3, 2), torch.randn(2, 3, 4)
    wanted = torch.zeros_like(dynamics)
    for n in range(2):
        for i in range(3):
            effect = torch.zeros(6)
            for j in range(3):
                if i != j:
                    pair = torch.cat([dynamics[n, i], static[n, i], dynamics[n, j], static[n, j]])
                    embedded = relation.embed(pair)
                    effect = effect + torch.sigmoid(relation.attend(embedded)) * relation.effect(embedded)
            wanted[n, i] = dynamics[n, i] + relation.update.weight @ effect
    torch.testing.assert_close(relation(dynamics, static), wanted)


def test_a_slot_alone_has_no_relations() -> None:
    torch.manual_seed(0)
    relation = Relation(4, 2, 6)
    torch.nn.init.normal_(relation.update.weight)
    dynamics = torch.randn(2, 1, 2)
    assert torch.equal(relation(dynamics, torch.randn(2, 1, 4)), dynamics)


def test_the_prediction_is_one_matrix_of_related_dynamics_and_static_latents() -> None:
    model = moved(build())
    predictor = model.predictor
    assert isinstance(predictor, Predictor)
    assert predictor.relation is not None
    assert predictor.next.weight.shape == (4, 2 + 4)
    assert predictor.next.bias is None
    previous, current = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    related = predictor.relation(predictor.distillation(previous, current), current)
    assert not torch.allclose(related, predictor.distillation(previous, current))
    wanted = torch.cat([related, current], dim=-1) @ predictor.next.weight.T
    torch.testing.assert_close(predictor(previous, current), wanted)


def test_without_the_relation_the_distilled_dynamics_are_used_as_they_are() -> None:
    model = moved(build(relation=False))
    assert isinstance(model.predictor, Predictor)
    assert not [name for name, _ in model.named_parameters() if "relation" in name]
    previous, current = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = torch.cat([model.predictor.distillation(previous, current), current], dim=-1)
    torch.testing.assert_close(model.predictor(previous, current), wanted @ model.predictor.next.weight.T)


@pytest.mark.parametrize("predictor", ["linear", "linear_joint"])
def test_the_linear_baseline_sees_slots_one_by_one_or_all_together(predictor: str) -> None:
    model = moved(build(predictor=predictor))
    assert isinstance(model.predictor, LinearBaseline)
    first, _, last = model.predictor.network
    width = 3 * 4 if predictor == "linear_joint" else 4
    assert first.weight.shape == (9, 2 * width)
    assert last.weight.shape == (width, 9)
    previous, current = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    other = previous.clone()
    other[:, 2] += 1
    changed = (predict(model, previous, current) - predict(model, other, current)).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == ([True] * 3 if predictor == "linear_joint" else [False, False, True])
    latents = model.encode(video())
    assert latents.dynamics.shape == (2, 5, 3, 2)
    assert not latents.dynamics.any()


# ---- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"relation": False}, {"time_code": True}, {"predictor": "linear"}, {"predictor": "linear_joint"}]
)
def test_an_untrained_model_predicts_that_nothing_changes(settings: dict[str, Any]) -> None:
    model = build(**settings)
    with torch.no_grad():
        latents = model.encode(video())
        future = model.rollout(latents, 3)
        wanted = model.decode(type(latents)(*(field[:, -1:] for field in latents))).video
    for t in range(3):
        assert torch.equal(future.static[:, t], latents.static[:, -1])
        torch.testing.assert_close(model.decode(future).video[:, t : t + 1], wanted)


def test_a_rollout_feeds_back_what_it_predicts() -> None:
    model = moved(build())
    predictor = model.predictor
    assert isinstance(predictor, Predictor)
    with torch.no_grad():
        latents = model.encode(video())
        future = model.rollout(latents, 3)
        z = [latents.static[:, -2], latents.static[:, -1]]
        for t in range(3):
            z.append(predictor(z[-2], z[-1]))
            torch.testing.assert_close(future.static[:, t], z[-1])
            torch.testing.assert_close(future.dynamics[:, t], predictor.distillation(z[-2], z[-1]))
    assert not torch.allclose(future.static[:, 0], future.static[:, 1])
    assert (future.static_log_var == LOG_VAR_RANGE[0]).all()


def test_a_rollout_looks_at_the_last_two_frames_and_at_no_stored_dynamics() -> None:
    model = moved(build())
    with torch.no_grad():
        latents = model.encode(video())
        last = type(latents)(*(field[:, -2:] for field in latents))
        wanted = model.rollout(latents, 3)
        for other in (last, latents._replace(dynamics=torch.zeros_like(latents.dynamics))):
            for a, b in zip(model.rollout(other, 3), wanted, strict=True):
                assert torch.equal(a, b)


def test_a_generator_draws_the_frames_that_a_rollout_starts_from() -> None:
    model = moved(build())
    with torch.no_grad():
        latents = model.encode(video())
        found = model.rollout(latents, 1, generator=torch.Generator().manual_seed(3))
        noise = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(3))
        start = latents.static_mean[:, -2:] + torch.exp(0.5 * latents.static_log_var[:, -2:]) * noise
        torch.testing.assert_close(found.static[:, 0], predict(model, start[:, 0], start[:, 1]))


def test_permuting_the_slots_of_the_last_frame_permutes_the_prediction_and_those_before_change_nothing() -> None:
    model = moved(build())
    with torch.no_grad():
        latents = model.encode(video())
        wanted = model.rollout(latents, 3)
        swapped = latents.static.clone()
        swapped[:, -1] = swapped[:, -1, [2, 0, 1]]
        swapped[:, -2] = swapped[:, -2, [1, 0, 2]]
        found = model.rollout(latents._replace(static=swapped), 3)
    for a, b in ((found.static, wanted.static), (found.dynamics, wanted.dynamics)):
        torch.testing.assert_close(a, b[:, :, [2, 0, 1]])


def test_permuting_the_first_draw_permutes_latents_and_dynamics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = moved(build()), [2, 0, 1]
    first = torch.randn(2, 3, 4)
    found = []
    for noise in (first, first[:, order]):
        monkeypatch.setattr("objdyn.models.oddn.draw", lambda *_, noise=noise: noise)
        with torch.no_grad():
            found.append(model.encode(video()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[:, :, order], b, atol=1e-4, rtol=1e-4)


# ---- inference -------------------------------------------------------------------------------------------------------


def test_the_frames_of_a_batch_are_inferred_as_each_alone_and_as_by_iodine() -> None:
    model = build()
    with torch.no_grad():
        whole = model.encode(video())
        for t in range(5):
            alone = model.iodine.encode(video()[:, t : t + 1])
            for found, wanted in zip(whole[:3], alone, strict=True):
                torch.testing.assert_close(found[:, t : t + 1], wanted, atol=1e-5, rtol=1e-4)


def test_dynamics_are_those_of_a_frame_and_the_one_before_and_the_first_repeat_the_second() -> None:
    model = build()
    assert isinstance(model.predictor, Predictor)
    with torch.no_grad():
        latents = model.encode(video())
        for t in range(1, 5):
            wanted = model.predictor.distillation(latents.static[:, t - 1], latents.static[:, t])
            torch.testing.assert_close(latents.dynamics[:, t], wanted)
    assert torch.equal(latents.dynamics[:, 0], latents.dynamics[:, 1])
    assert torch.equal(latents.static, latents.static_mean)


def test_a_draw_for_every_frame_is_another_one_and_repeats() -> None:
    still = video(t=1).expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        shared, own = build(), build(share_first_draw=False)
        alike, differ = shared.encode(still).static, own.encode(still).static
        assert torch.equal(own.encode(still).static, differ)
        torch.testing.assert_close(alike[:, 0], alike[:, 2])
        assert not torch.allclose(differ[:, 0], differ[:, 2])
        torch.testing.assert_close(differ[:, 0], alike[:, 0])
        own.train()(video()).total.isfinite()


def test_a_frozen_model_infers_alike_with_and_without_gradients_enabled() -> None:
    model = moved(build())

    def run() -> list[Tensor]:
        latents = model.encode(video())
        future = model.rollout(latents, 2)
        return [*latents, *future, model.decode(future).video, model(video()).total]

    with torch.no_grad():
        wanted = run()
    model.requires_grad_(False)
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_number_of_slots_may_change_after_training_but_for_the_joint_baseline() -> None:
    model, more = moved(build()), build(num_slots=6)
    more.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert more.rollout(more.encode(video()), 2).static.shape == (2, 2, 6, 4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(num_slots=6, predictor="linear_joint").load_state_dict(build(predictor="linear_joint").state_dict())


# ---- loss ------------------------------------------------------------------------------------------------------------


def nll(model: ODDN, frames: Tensor, slots: Tensor) -> Tensor:
    """Negative log-likelihood (n,) of a mixture in every channel, as equation 1 has it without its constant."""
    rendering = mixture.render(model.iodine.refiner.logits(slots))
    e = torch.exp(-(frames[:, None] - rendering.means).square() / (2 * model.config.likelihood_var))
    return -(rendering.masks * e).sum(1).log().flatten(1).sum(1)


@pytest.mark.parametrize("rollout_frames", [None, 2, 1])
@pytest.mark.parametrize("cell_weights", ["ramp", "uniform"])
def test_the_loss_is_the_sum_of_its_parts(
    cell_weights: str, rollout_frames: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L_r cell by cell with torch's KL; L_p frame by frame from the latents that encoding gives."""
    weights: dict[str, Any] = {"one_step_weight": 0.5, "rollout_weight": 0.25}
    model = moved(build(cell_weights=cell_weights, rollout_frames=rollout_frames, **weights))
    cells: list[tuple[Any, Any]] = []
    look = model.iodine.refiner.look

    def note(scene: Any, posterior: Any, noise: Tensor, **named: Any) -> Any:
        cells.append((posterior, look(scene, posterior, noise, **named)))
        return cells[-1][1]

    frames = video(t=6)
    with torch.no_grad():
        z = list(model.encode(frames).static.unbind(1))
        monkeypatch.setattr(model.iodine.refiner, "look", note)
        loss = model(frames)
        assert len(cells) == 3
        wanted = 0.0
        for s, (posterior, sight) in enumerate(cells, start=1):
            q = Normal(posterior.mean, (posterior.log_var / 2).exp())
            kl = kl_divergence(q, Normal(0.0, 1.0)).flatten(1).sum(1)
            likelihood = nll(model, frames.flatten(0, 1), sight.slots)
            wanted += (s / 3 if cell_weights == "ramp" else 1) * float((2 * likelihood + 0.7 * kl).mean())
        one_step = [nll(model, frames[:, n], predict(model, z[n - 2], z[n - 1])).mean() for n in range(2, 6)]
        rolled, path = [], z[:2]
        for n in range(2, 2 + (rollout_frames or 4)):
            path.append(predict(model, path[-2], path[-1]))
            rolled.append(nll(model, frames[:, n], path[-1]).mean())
        torch.testing.assert_close(loss.terms["predict"], torch.stack(one_step).mean())
        torch.testing.assert_close(loss.terms["rollout"], torch.stack(rolled).mean())
        wanted += 2 * float(0.5 * torch.stack(one_step).mean() + 0.25 * torch.stack(rolled).mean())
    assert float(loss.total) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "rendered"),
    [
        ({}, 4 + 3),  # frames 3..6 from inferred latents; the roll-out's first is one of them
        ({"rollout_frames": 2}, 4 + 1),
        ({"rollout_frames": 1}, 4),
        ({"rollout_frames": 99}, 4 + 3),
        ({"rollout_weight": 0.0}, 4),
        ({"one_step_weight": 0.0}, 4),
        ({"one_step_weight": 0.0, "rollout_frames": 1}, 1),
    ],
)
def test_student_forcing_renders_each_predicted_frame_once(
    settings: dict[str, Any], rendered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**settings)
    counts: list[int] = []
    compare = model._compare
    monkeypatch.setattr(model, "_compare", lambda frames, slots: counts.append(len(slots)) or compare(frames, slots))
    terms = model(video(b=2, t=6)).terms
    assert counts == [2 * rendered]
    weights = {**dataclasses.asdict(TINY), **settings}
    assert [name in terms for name in ("predict", "predict_mse", "rollout", "rollout_mse")] == [
        weights["one_step_weight"] > 0, weights["one_step_weight"] > 0,
        weights["rollout_weight"] > 0, weights["rollout_weight"] > 0,
    ]  # fmt: skip


def test_predicted_frames_are_compared_with_the_frames_that_they_predict() -> None:
    """An untrained model predicts the frame before: in a video that repeats itself it is right, and in no other."""
    model = build()
    still = video(t=1).expand(-1, 5, -1, -1, -1).contiguous()
    terms = model(still).terms
    torch.testing.assert_close(terms["predict"], terms["recon"])
    torch.testing.assert_close(terms["rollout"], terms["recon"])
    torch.testing.assert_close(terms["predict_mse"], terms["mse"])
    other = still.clone()
    other[:, 4] = 0
    changed = model(other).terms
    with torch.no_grad():
        shown = model.decode(model.encode(still)).video[:, 4]
        errors = torch.stack([terms["mse"], terms["mse"], (shown - other[:, 4]).square().mean()])
    torch.testing.assert_close(changed["predict_mse"], errors.mean())
    torch.testing.assert_close(changed["rollout_mse"], errors.mean())
    assert (errors.mean() - terms["mse"]).abs() > 1e-3


def test_in_training_the_static_latents_are_samples_of_the_last_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(predict_from="sample").train()
    static: list[Tensor] = []
    predicted = model._predict
    monkeypatch.setattr(model, "_predict", lambda z: static.append(z) or predicted(z))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model(video())
    assert torch.equal(static[0], static[1])
    assert not torch.allclose(static[0], static[2], atol=0.1)
    model.eval()
    model(video())
    torch.testing.assert_close(static[3], model.encode(video()).static_mean)


@pytest.mark.parametrize("source", ["sample", "mean"])
def test_training_predicts_from_a_sample_or_from_the_mean(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    model = build(predict_from=source).train()
    static: list[Tensor] = []
    fits: list[Fit] = []
    predicted, fitted = model._predict, model.iodine.fit
    monkeypatch.setattr(model, "_predict", lambda z: static.append(z) or predicted(z))
    monkeypatch.setattr(model.iodine, "fit", lambda *given: fits.append(fitted(*given)) or fits[-1])
    model(video())
    (fit,) = fits
    expected = {"sample": fit.final.slots, "mean": fit.posterior.mean}
    assert torch.equal(static[0].flatten(0, 1), expected[source])
    assert not torch.allclose(expected["sample"], expected["mean"], atol=0.1)


def gradients(model: ODDN, seed: int = 1) -> dict[str, Tensor | None]:
    torch.manual_seed(seed)
    model(video()).total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_with_its_gradient_cut_the_prediction_loss_trains_all_but_the_inference() -> None:
    """The inference then gets what IODINE alone gives it; without the flag it gets more."""
    found = {
        name: gradients(moved(build(**settings)).train())
        for name, settings in {
            "cut": {"stop_prediction_gradient": True},
            "whole": {},
            "alone": {"alone_steps": 1},
        }.items()
    }
    inference = [
        name for name in found["cut"] if name.startswith("iodine.") and not name.startswith("iodine.refiner.decoder.")
    ]
    assert len(inference) > 5
    for name, cut in found["cut"].items():
        whole, alone = found["whole"][name], found["alone"][name]
        assert cut is not None
        assert whole is not None
        assert alone is not None
        if name in inference:
            torch.testing.assert_close(cut, alone, msg=name)
            assert not torch.allclose(cut, whole, rtol=1e-4, atol=1e-7), name
        elif name.startswith("predictor."):
            torch.testing.assert_close(cut, whole, msg=name)
            assert not alone.any()
        else:
            assert not torch.allclose(cut, alone), name


def test_with_inference_frozen_the_prediction_alone_is_trained_from_what_is_inferred_at_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = moved(build(frozen_inference=True, share_first_draw=False)).train()
    inferred: list[Tensor] = []
    predicted = model._predict
    monkeypatch.setattr(model, "_predict", lambda z: inferred.append(z) or predicted(z))
    torch.manual_seed(1)
    loss = model(video())
    assert set(loss.terms) == {"predict", "predict_mse", "rollout", "rollout_mse"}
    weight = model.config.likelihood_weight
    torch.testing.assert_close(loss.total, weight * (loss.terms["predict"] + loss.terms["rollout"]))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        used = not name.startswith("iodine.") or name.startswith("iodine.refiner.decoder.")
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == used, name
    torch.manual_seed(1)
    first = torch.stack([torch.randn(2, 3, 4) for _ in range(5)], dim=1).flatten(0, 1)
    expected = model.iodine.infer(video().flatten(0, 1), first, None).mean
    torch.testing.assert_close(inferred[0].flatten(0, 1), expected.detach())
    assert not inferred[0].requires_grad
    held_out = model.eval()(video())  # of which all terms are known
    assert set(held_out.terms) > set(loss.terms)


def test_recomputation_changes_no_loss_and_no_gradient() -> None:
    found = [gradients(moved(build(recompute=recompute)).train()) for recompute in (False, True)]
    for name, wanted in found[0].items():
        again = found[1][name]
        assert wanted is not None
        assert again is not None
        torch.testing.assert_close(again, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"relation": False},
        {"time_code": True},
        {"predictor": "linear"},
        {"predictor": "linear_joint"},
        {"rollout_weight": 0.0},
        {"one_step_weight": 0.0},
        {"alone_steps": 1},
        {"stop_prediction_gradient": True},
    ],
)
def test_every_variant_trains_all_of_its_parameters(settings: dict[str, Any]) -> None:
    assert [name for name, grad in gradients(build(**settings).train()).items() if grad is None] == []


def test_iodine_alone_is_trained_first_and_on_single_frames_too() -> None:
    model = build(alone_steps=3)
    iodine = IODINE(IODINEConfig(**SIZES)).eval()
    iodine.load_state_dict(model.iodine.state_dict())
    for t in (1, 4):
        found, wanted = model(video(t=t)), iodine(video(t=t))
        torch.testing.assert_close(found.total, wanted.total)
        assert found.terms.keys() == wanted.terms.keys()
    model.step.fill_(3)
    assert model(video(t=4)).total > iodine(video(t=4)).total
    assert "predict" in model(video(t=4)).terms


def test_a_step_under_bf16_keeps_the_dynamics_in_full_precision() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(video())
        found = predict(model, torch.randn(1, 3, 4), torch.randn(1, 3, 4))
        z = torch.randn(1, 3, 4)
        assert torch.equal(predict(model, z, z), z)
    assert found.dtype == torch.float32
    assert loss.total.isfinite()


# ---- start from IODINE, and what is refused --------------------------------------------------------------------------


def test_a_start_from_iodine_infers_and_renders_as_iodine_does() -> None:
    torch.manual_seed(0)
    old = IODINE(IODINEConfig(**SIZES)).eval()
    model = build(seed=1)
    predictor = {name: value.clone() for name, value in model.predictor.state_dict().items()}
    start_from_iodine(model, old.config, old.state_dict())
    with torch.no_grad():
        found, wanted = model.encode(video()), old.encode(video())
        assert torch.equal(found.static, wanted.slots)
        assert torch.equal(model.decode(found).video, old.decode(wanted).video)
    for name, value in model.predictor.state_dict().items():
        assert torch.equal(value, predictor[name])


def test_a_start_from_an_iodine_of_other_settings_is_refused() -> None:
    small = IODINE(IODINEConfig(**{**SIZES, "slot_dim": 5}))
    other = IODINE(IODINEConfig(**SIZES, likelihood_var=0.05))
    strange = IODINE(IODINEConfig(**SIZES, leave_one_out=True))
    with pytest.raises(ValueError, match=r"trained with likelihood_var=0.05, and this one has 0.3"):
        start_from_iodine(build(), other.config, other.state_dict())
    with pytest.raises(ValueError, match=r"does not fit: refiner.initial_mean is \(5,\) there and \(4,\) here"):
        start_from_iodine(build(), small.config, small.state_dict())
    with pytest.raises(ValueError, match=r"refiner.cnn.first.weight is \(6, 17, 3, 3\) there and \(6, 16, 3, 3\) here"):
        start_from_iodine(build(), strange.config, strange.state_dict())


def test_clips_that_are_too_short_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="of a frame and the one before, got a clip of 1 frame"):
        model.encode(video(t=1))
    for t, said in ((1, "1 frame;"), (2, "2 frames;")):
        with pytest.raises(ValueError, match=f"third frame .* got {said} set clip_frames to 3"):
            model(video(t=t))
    with torch.no_grad():
        latents = model.encode(video(t=2))
        assert model.rollout(latents, 1).static.shape == (2, 1, 3, 4)
        with pytest.raises(ValueError, match="last two frames, got latents of 1; give a context of 2"):
            model.rollout(ODDNLatents(*(field[:, :1] for field in latents)), 1)
        with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
            model.rollout(latents, 0)
    with pytest.raises(ValueError, match=r"was built for video \(b, t, 3, 8, 8\), got \(2, 5, 3, 6, 6\)"):
        model(video()[..., :6, :6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predictor": "joint"}, "^predictor must be 'distilled' or 'linear' or 'linear_joint', got 'joint'$"),
        ({"inference": "sequential"}, "oddn has no such mode"),
        ({"sequential_clamp": 1.0}, "oddn has no such mode"),
        ({"dynamics_dim": 0}, "dynamics_dim must be at least 1, got 0"),
        ({"relation_dim": -1}, "relation_dim must be at least 1, got -1"),
        ({"one_step_weight": -1.0}, "one_step_weight must be 0 or more and finite, got -1.0"),
        ({"rollout_weight": float("nan")}, "rollout_weight must be 0 or more and finite, got nan"),
        ({"one_step_weight": 0.0, "rollout_weight": 0.0}, "both 0, so nothing would train the dynamics"),
        ({"rollout_frames": 0}, "rollout_frames must be at least 1 or None, got 0"),
        ({"alone_steps": -1}, "alone_steps must be 0 or more, got -1"),
        ({"alone_steps": 5, "frozen_inference": True}, "leaves nothing to train in alone_steps=5"),
        ({"num_slots": 1}, "^num_slots must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
