import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from objdyn.families import build
from objdyn.models.ddlp import DDLPConfig
from pipeline import checkpoint, store
from pipeline.checkpoint import (
    config_from_json,
    config_to_json,
    last_step,
    load_last,
    load_model,
    restore,
    save_checkpoint,
)
from pipeline.claim import LostError
from pipeline.config import OptimConfig, TrainRun
from pipeline.presets import PRESETS

RUN = PRESETS["ddlp"]["debug"]
FILES = ("COMPLETE", "model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_folder")


class Toy(nn.Module):
    """A convolution, a buffer, a parameter without gradient and one in another layout."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.head = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((-1, -2))).square().mean()


def toy(seed: int = 0) -> tuple[Toy, torch.optim.Adam]:
    model = Toy(seed)
    groups = [{"params": model.conv.parameters()}, {"params": [*model.head.parameters(), model.unused], "lr": 3e-3}]
    return model, torch.optim.Adam(groups, lr=1e-2, betas=(0.8, 0.99), eps=1e-4)


def train(model: Toy, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.zero_grad()
        model(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        model.step.fill_(step + 1)  # pyright: ignore[reportCallIssue]


def save(
    run_dir: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep_last: int = 3, best: bool = False
) -> str:
    state = {"family": "toy", "model": {}, "run": {}, "position": 8 * step}
    return save_checkpoint(run_dir, step, model=model, optimizer=optimizer, state=state, keep_last=keep_last, best=best)


def assert_same_state(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert sorted(a, key=str) == sorted(b, key=str)
        for name in a:
            assert_same_state(a[name], b[name])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def test_training_goes_on_bit_for_bit(run_dir: str) -> None:
    model, optimizer = toy()
    train(model, optimizer, 0, 3)
    path = save(run_dir, 3, model, optimizer)
    assert path == store.join(run_dir, "checkpoints", "step-00000003")
    assert store.list_names(path) == sorted(FILES)

    other, other_optimizer = toy(seed=1)
    saved = load_last(run_dir)
    assert saved is not None
    assert (saved.step, saved.path, saved.state["position"]) == (3, path, 24)
    restore(saved, other, other_optimizer)
    assert_same_state(optimizer.state_dict(), other_optimizer.state_dict())
    train(model, optimizer, 3, 5)
    train(other, other_optimizer, 3, 5)
    assert_same_state(dict(model.state_dict()), dict(other.state_dict()))
    assert_same_state(optimizer.state_dict(), other_optimizer.state_dict())


def test_restored_state_is_independent_of_training_after_it(tmp_path: Path) -> None:
    model, optimizer = toy()
    train(model, optimizer, 0, 1)
    save(str(tmp_path), 1, model, optimizer)
    before = {name: store.sha256_file(str(tmp_path / "checkpoints/step-00000001" / name)) for name in FILES}
    train(model, optimizer, 1, 2)
    saved = load_last(str(tmp_path))
    assert saved is not None
    restore(saved, model, optimizer)
    save(str(tmp_path), 1, model, optimizer)
    assert before == {name: store.sha256_file(str(tmp_path / "checkpoints/step-00000001" / name)) for name in FILES}


def test_a_new_run_has_no_checkpoint(run_dir: str) -> None:
    assert load_last(run_dir) is None
    assert last_step(run_dir) is None
    save(run_dir, 12, *toy())
    assert last_step(run_dir) == 12


def test_what_was_not_finished_does_not_count(tmp_path: Path) -> None:
    model, optimizer = toy()
    save(str(tmp_path), 1, model, optimizer)
    save(str(tmp_path), 2, model, optimizer)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    (tmp_path / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"half")
    saved = load_last(str(tmp_path))
    assert saved is not None
    assert saved.step == 2
    save(str(tmp_path), 3, model, optimizer)
    saved = load_last(str(tmp_path))
    assert saved is not None
    assert saved.step == 3


@pytest.mark.parametrize("name", [name for name in FILES if name != "COMPLETE"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = toy()
    train(model, optimizer, 0, 1)
    file = Path(save(str(tmp_path), 1, model, optimizer), name)
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is {'missing' if damage == 'remove' else 'damaged'}.*restore it"):
        load_last(str(tmp_path))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b'{"model.safetensors": 3}'])
def test_bad_complete_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = Path(save(str(tmp_path), 1, *toy()), "COMPLETE")
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match="COMPLETE"):
        load_last(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1, "checkpoint": "/etc", "best": null}'])
def test_bad_last_json_is_refused(tmp_path: Path, content: str) -> None:
    save(str(tmp_path), 1, *toy())
    (tmp_path / "last.json").write_text(content)
    with pytest.raises(ValueError, match=r"last\.json"):
        load_last(str(tmp_path))


def test_a_writer_that_was_replaced_leaves_the_other_ones_checkpoint(tmp_path: Path) -> None:
    out, stale = str(tmp_path / "run"), toy(seed=1)
    save(str(tmp_path / "other"), 7, *toy())

    def content() -> dict[str, bytes]:
        return {name: (tmp_path / "run" / name).read_bytes() for name in store.list_tree(out)}

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:  # the other one has saved the same step meanwhile
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "other", out)
            raise LostError("another job has taken it over")

    state = {"family": "toy", "model": {}, "run": {}, "position": 1}
    for allowed in range(7):  # COMPLETE goes, four files come, last.json, what is old goes
        shutil.rmtree(out, ignore_errors=True)
        save(out, 7, *toy(seed=2))
        left = allowed
        with pytest.raises(LostError):
            save_checkpoint(out, 7, model=stale[0], optimizer=stale[1], state=state, keep_last=1, check=check)
        assert sorted(content()) == sorted(["last.json", *(f"checkpoints/step-00000007/{name}" for name in FILES)])
        saved = load_last(out)
        assert saved is not None
        assert_same_state(saved.model, dict(toy()[0].state_dict()))
    left = 7
    save_checkpoint(out, 7, model=stale[0], optimizer=stale[1], state=state, keep_last=1, check=check)


def test_newest_and_best_are_kept(run_dir: str) -> None:
    model, optimizer = toy()
    for step in (10, 20, 30, 40, 50):
        save(run_dir, step, model, optimizer, keep_last=2, best=step == 20)
    names = store.list_names(store.join(run_dir, "checkpoints"))
    assert names == ["step-00000020", "step-00000040", "step-00000050"]
    last = store.read_json(store.join(run_dir, "last.json"))
    assert last == {"step": 50, "checkpoint": "checkpoints/step-00000050", "best": "checkpoints/step-00000020"}
    save(run_dir, 60, model, optimizer, keep_last=1, best=True)
    assert store.list_names(store.join(run_dir, "checkpoints")) == ["step-00000060"]


def test_what_a_killed_run_did_not_get_to_remove_goes_when_it_is_resumed(tmp_path: Path) -> None:
    model, optimizer = toy()
    for step in (1, 2):
        save(str(tmp_path), step, model, optimizer, keep_last=2)
    (tmp_path / "checkpoints/step-00000001/COMPLETE").unlink()
    checkpoint.retire(str(tmp_path), keep_last=2)
    assert store.list_names(str(tmp_path / "checkpoints")) == ["step-00000002"]
    checkpoint.retire(str(tmp_path / "none"), keep_last=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(run_dir: str, bad: float) -> None:
    model, optimizer = toy()
    train(model, optimizer, 0, 1)
    save(run_dir, 1, model, optimizer)
    before = store.list_tree(run_dir)
    with torch.no_grad():
        model.conv.weight[0, 0, 0, :2] = bad
    with pytest.raises(FloatingPointError, match=r"at step 2 2 of 108 values of conv.weight are NaN or infinite"):
        save(run_dir, 2, model, optimizer)
    assert store.list_tree(run_dir) == before
    assert last_step(run_dir) == 1


def test_optimizer_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model, optimizer = toy()
    train(model, optimizer, 0, 1)
    optimizer.state[model.head.bias]["exp_avg_sq"][0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"1 of 2 values of exp_avg_sq \(optimiser\) of head.bias"):
        save(str(tmp_path), 1, model, optimizer)
    assert store.list_names(str(tmp_path)) == []


def test_other_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = toy()
    train(model, optimizer, 0, 1)
    save(str(tmp_path), 1, model, optimizer)
    saved = load_last(str(tmp_path))
    assert saved is not None
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="do not fit this config of Linear"):
        restore(saved, other, torch.optim.Adam(other.parameters()))
    with pytest.raises(ValueError, match="optimiser of other parameters"):
        restore(saved, model, torch.optim.Adam(model.parameters()))


def test_state_must_be_json(tmp_path: Path) -> None:
    model, optimizer = toy()
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(str(tmp_path), 1, model=model, optimizer=optimizer, state={"loss": float("inf")}, keep_last=1)
    with pytest.raises(ValueError, match="must not hold step"):
        save_checkpoint(str(tmp_path), 1, model=model, optimizer=optimizer, state={"step": 1}, keep_last=1)
    assert store.list_names(str(tmp_path)) == []


# Models from checkpoints


@pytest.fixture
def trained(tmp_path: Path) -> tuple[str, nn.Module]:
    torch.manual_seed(3)
    model = build(RUN.model)
    state = {"family": "ddlp", "run": config_to_json(RUN)}
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(str(tmp_path), 5, model=model, optimizer=optimizer, state=state, keep_last=1)
    return str(tmp_path), model


def test_model_is_rebuilt_from_the_run_or_the_checkpoint(trained: tuple[str, nn.Module]) -> None:
    run_dir, model = trained
    folder = store.join(run_dir, "checkpoints", "step-00000005")
    torch.manual_seed(11)
    drawn = torch.rand(3)
    torch.manual_seed(11)
    for path in (run_dir, folder):
        loaded = load_model(path)
        assert (loaded.family, loaded.step, loaded.config) == ("ddlp", 5, RUN.model)
        assert loaded.model_id == store.sha256_file(store.join(folder, "model.safetensors"))
        assert loaded.run["seed"] == RUN.seed
        assert not loaded.model.training
        assert_same_state(dict(model.state_dict()), dict(loaded.model.state_dict()))
    assert torch.equal(torch.rand(3), drawn)


def test_best_model_must_exist(trained: tuple[str, nn.Module]) -> None:
    with pytest.raises(ValueError, match="no best checkpoint"):
        load_model(trained[0], which="best")


def test_overrides_must_fit_the_weights(trained: tuple[str, nn.Module]) -> None:
    assert isinstance(RUN.model, DDLPConfig)
    loaded = load_model(trained[0], overrides={"model.kl_weight": 0.5})
    assert loaded.config == dataclasses.replace(RUN.model, kl_weight=0.5)
    with pytest.raises(ValueError, match="do not fit this config of DDLP"):
        load_model(trained[0], overrides={"feature_dim": RUN.model.feature_dim + 1})
    with pytest.raises(ValueError, match="no field 'feature_dims'"):
        load_model(trained[0], overrides={"feature_dims": 1})


def test_path_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a run folder"):
        load_model(str(tmp_path))


# Configs


@pytest.mark.parametrize("family", PRESETS)
def test_a_run_of_an_older_version_is_of_the_family_that_knows_its_settings(family: str) -> None:
    run = PRESETS[family]["debug"]
    stored = config_to_json(run)
    newest = [field.name for field in dataclasses.fields(run.model)][-1]
    del stored["model"][newest]
    again = config_from_json(TrainRun, stored).model
    assert type(again) is type(run.model)
    assert getattr(again, newest) == getattr(type(run.model)(), newest)
    for damaged in ({**stored["model"], "shoe_size": 42}, {"image_size": 32}, {}):
        with pytest.raises(ValueError, match="fit 0 of the known configs"):
            config_from_json(TrainRun, {**stored, "model": damaged})


@pytest.mark.parametrize("name", PRESETS["ddlp"])
def test_run_survives_json_with_its_tuples(name: str) -> None:
    run = PRESETS["ddlp"][name]
    text = json.dumps(config_to_json(run))
    again = config_from_json(TrainRun, json.loads(text))
    assert again == run
    assert type(again.optim.betas) is tuple
    assert hash(again.model) == hash(run.model)


@dataclasses.dataclass(frozen=True)
class First:
    sizes: tuple[tuple[int, float], ...] = ()
    rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Second:
    crop: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    model: First | Second
    name: str = "x"


@pytest.mark.parametrize("model", [First(((1, 2.0), (3, 4.5)), 1.0), First(), Second((1, 2)), Second()])
def test_nested_configs_and_unions_survive_json(model: First | Second) -> None:
    outer = Outer(model)
    assert config_from_json(Outer, json.loads(json.dumps(config_to_json(outer)))) == outer


def test_config_of_another_version_is_refused() -> None:
    assert config_from_json(OptimConfig, {"lr": 1e-3}) == OptimConfig(lr=1e-3)
    for fields in ({"lr": 1e-3, "momentum": 1}, {"betas": [0.9]}, [1]):
        with pytest.raises(ValueError, match=r"momentum|2 values|\[1\]"):
            config_from_json(OptimConfig, fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="cannot be built"):
        config_from_json(Outer, {"name": "y"})


def test_code_revision_is_a_commit_or_null() -> None:
    revision = checkpoint.code_revision()
    assert set(revision) == {"revision", "dirty"}
    assert revision["revision"] is None or len(revision["revision"]) == 40
