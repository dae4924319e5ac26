"""The contract that every family keeps, over its debug preset. A new family is covered without an edit here."""

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from objdyn import families
from objdyn.families import FAMILIES
from objdyn.interface import Loss, Scene
from pipeline.checkpoint import config_from_json
from pipeline.presets import PRESETS

INPUTS: dict[str, Callable[[int], Tensor]] = {"num_objects": lambda b: 1 + torch.arange(b) % 2}
"""What families may need of each of b clips beside its video (``Family.inputs``)."""


class Case(NamedTuple):
    name: str
    family: families.Family
    config: Any
    frames: int

    def model(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return families.build(self.config).eval()

    def video(self, b: int = 2, t: int | None = None, seed: int = 0) -> Tensor:
        size = self.config.image_size
        return torch.rand(b, t or self.frames, 3, size, size, generator=torch.Generator().manual_seed(seed))

    def inputs(self, b: int = 2) -> dict[str, Tensor]:
        return {name: INPUTS[name](b) for name in families.describe(self.config).inputs}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    run = PRESETS[request.param]["debug"]
    return Case(request.param, FAMILIES[request.param], run.model, run.clip_frames)


def assert_equal(a: Any, b: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=rtol)


def test_forward_is_a_finite_scalar_with_named_terms(case: Case) -> None:
    model = case.model().train()
    video = case.video()
    before = video.clone()
    loss = model(video, **case.inputs())
    assert isinstance(loss, Loss)
    assert loss.total.shape == ()
    assert torch.isfinite(loss.total)
    assert "recon" in loss.terms
    assert all(value.shape == () and not value.requires_grad for value in loss.terms.values())
    assert torch.equal(video, before)


def test_latents_have_batch_and_time_and_the_columns_promised(case: Case) -> None:
    with torch.no_grad():
        latents = case.model().encode(case.video(), **case.inputs())
    assert all(field.shape[:2] == (2, case.frames) and torch.isfinite(field).all() for field in latents)
    columns = (*case.family.object_columns, *case.family.frame_columns)
    assert set(columns) <= set(latents._fields)
    objects = {getattr(latents, name).shape[2] for name in case.family.object_columns}
    assert len(objects) <= 1


def test_decode_is_a_scene_in_range_whose_masks_sum_to_one(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        latents = model.encode(case.video(), **case.inputs())
        plain, full = model.decode(latents), model.decode(latents, components=True)
    assert isinstance(plain, Scene)
    assert plain.masks is None
    assert plain.components is None
    assert plain.video.shape == case.video().shape
    torch.testing.assert_close(plain.video, full.video)
    for values in (full.video, full.masks, full.components):
        assert values is not None
        assert values.min() >= 0
        assert values.max() <= 1 + 1e-6
    assert full.masks is not None
    torch.testing.assert_close(full.masks.sum(2), torch.ones_like(full.masks[:, :, 0]), atol=1e-5, rtol=0)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rollout_has_exactly_the_horizon(case: Case) -> None:
    if "rollout" not in case.family.verbs:
        pytest.skip("the family has no rollout")
    model = case.model()
    with torch.no_grad():
        latents = model.encode(case.video(), **case.inputs())
        for horizon in (1, case.frames + 2):
            future = model.rollout(latents, horizon)
            assert type(future) is type(latents)
            assert all(new.shape[1] == horizon for new in future)
            assert all(new.shape[2:] == old.shape[2:] for new, old in zip(future, latents, strict=True))
        with pytest.raises(ValueError, match="horizon must be at least 1"):
            model.rollout(latents, 0)


@pytest.mark.parametrize("verb", ["encode", "rollout"])
def test_without_a_generator_the_answer_repeats_and_with_one_it_follows_the_seed(case: Case, verb: str) -> None:
    if verb not in case.family.verbs:
        pytest.skip(f"the family has no {verb}")
    model = case.model()
    with torch.no_grad():
        latents = model.encode(case.video(), **case.inputs())

        def answer(seed: int | None) -> Any:
            chosen = None if seed is None else generator(seed)
            if verb == "encode":
                return model.encode(case.video(), **case.inputs(), generator=chosen)
            return model.rollout(latents, 3, generator=chosen)

        torch.manual_seed(0)
        first = answer(None)
        torch.manual_seed(1)
        assert_equal(first, answer(None))
        assert_equal(answer(1), answer(1))
        if verb == "encode" and "rollout" in case.family.verbs and same(answer(1), first):
            assert_equal(answer(2), first)  # nothing is random in these latents; the rollout must be
        else:
            assert not same(answer(1), answer(2))


def test_interpolation_does_not_look_at_hidden_frames(case: Case) -> None:
    if "interpolate" not in case.family.verbs:
        pytest.skip("the family has no interpolate")
    model, video = case.model(), case.video()
    seen = torch.zeros(case.frames, dtype=torch.bool)
    seen[:2] = seen[-2:] = True
    other = torch.where(seen[:, None, None, None], video, 1 - video)
    with torch.no_grad():
        latents = model.encode(video, **case.inputs())
        filled = model.interpolate(video, seen, **case.inputs())
        assert type(filled) is type(latents)
        assert [field.shape for field in filled] == [field.shape for field in latents]
        assert_equal(filled, model.interpolate(other, seen, **case.inputs()))


def test_causal_families_do_not_look_ahead(case: Case) -> None:
    if not case.family.causal:
        pytest.skip("the family does not claim to be causal")
    model = case.model()
    video = case.video()
    with torch.no_grad():
        whole, part = (model.encode(frames, **case.inputs()) for frames in (video, video[:, :-2]))
    assert_equal([field[:, :-2] for field in whole], part, atol=1e-5, rtol=1e-4)


def test_a_clip_is_encoded_alike_alone_and_among_others(case: Case) -> None:
    model = case.model()
    video = case.video(b=3)
    with torch.no_grad():
        inputs = case.inputs(b=3)
        together = model.encode(video, **inputs)
        alone = model.encode(video[1:2], **{name: values[1:2] for name, values in inputs.items()})
    assert_equal([field[1:2] for field in together], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", [0, 1_000_000], ids=["first", "last"])
@pytest.mark.parametrize("clips", [1, 2])
def test_every_parameter_gets_a_gradient(case: Case, step: int, clips: int) -> None:
    model = case.model().train()
    families.set_step(model, step)
    model(case.video(clips), **case.inputs(clips)).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_model_does_without_the_inputs_that_its_config_turns_off(case: Case) -> None:
    fields = {field: False for field in case.family.inputs.values() if field}
    if not fields:
        pytest.skip("the family has no inputs, or none that a setting turns off")
    other = case._replace(config=dataclasses.replace(case.config, **fields))
    assert set(other.inputs()) == {name for name, field in case.family.inputs.items() if not field}
    model = other.model()
    with torch.no_grad():
        assert torch.isfinite(model(other.video(), **other.inputs()).total)
        model.decode(model.encode(other.video(), **other.inputs()))


def test_weights_and_config_survive_saving(case: Case) -> None:
    model, other = case.model(0), case.model(1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert_equal(model.encode(case.video(), **case.inputs()), other.encode(case.video(), **case.inputs()))
    fields = json.loads(json.dumps(dataclasses.asdict(case.config)))
    assert config_from_json(case.family.config, fields) == case.config
    assert families.family_of(case.config) == case.name


def test_unknown_settings_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="has no field colour"):
        config_from_json(case.family.config, {"colour": 1})
    with pytest.raises(ValueError, match="str is the config of no family; known: ddlp"):
        families.family_of("dldp")


def test_a_setting_that_is_none_of_its_choices_is_refused(case: Case) -> None:
    hints = get_type_hints(type(case.config))
    for name in (name for name, hint in hints.items() if get_origin(hint) is Literal):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(case.config, **{name: "no such choice"})


def test_thirty_steps_on_one_clip_lower_the_loss(case: Case) -> None:
    model: nn.Module = case.model().train()
    video = case.video(b=1) * 0.2
    video[:, :, 0, 20:40, 20:40] = 0.9
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    recon = []
    for step in range(30):
        families.set_step(model, 1000 + step)
        torch.manual_seed(step)
        loss = model(video, **case.inputs(1))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        recon.append(float(loss.terms["recon"]))
    assert sum(recon[-5:]) < 0.9 * sum(recon[:5])


def test_verbs_run_without_gradients_and_are_the_interface(case: Case) -> None:
    model = case.model()
    assert {"forward", "encode", "decode"} <= set(case.family.verbs)
    for verb in case.family.verbs:
        assert callable(getattr(model, verb))
    assert "components" in inspect.signature(model.decode).parameters
    with torch.no_grad():
        scene = families.reconstruct(model, case.video(), **case.inputs())
    assert not scene.video.requires_grad


def test_step_is_written_from_outside(case: Case) -> None:
    model = case.model().train()
    families.set_step(model, 7)
    model(case.video(), **case.inputs())
    if isinstance(getattr(model, "step", None), Tensor):
        assert int(model.step) == 7
