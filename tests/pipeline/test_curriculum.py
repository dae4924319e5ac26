"""Stages of a run, the learning rate's schedule, and starting from other weights."""

import dataclasses
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from objdyn import families
from objdyn.interface import Loss, Scene
from pipeline import benchmark, checkpoint, cli, loop, report, store, verify
from pipeline.config import OptimConfig, Stage, TrainRun, VerifyRun, learning_rate, with_overrides
from pipeline.presets import PRESETS

DEBUG = with_overrides(
    PRESETS["ddlp"]["debug"],
    {"optim.batch_size": 1, "clip_frames": 3, "threads": 1, "steps": 6, "checkpoint_every": 2, "log_every": 1,
     "eval_every": 0},
)  # fmt: skip


class ToyLatents(NamedTuple):
    colour: Tensor


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 3
    objects: int = 2
    """Changes no weight."""


class Toy(nn.Module):
    """A linear map, with noise in training so that a wrong seed would show."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.objects = config.objects
        self.inward, self.outward = nn.Linear(3, config.width), nn.Linear(config.width, 3)

    def forward(self, video: Tensor) -> Loss:
        colour = video.mean((-1, -2))
        hidden = self.inward(colour)
        noise = torch.randn_like(hidden) if self.training else 0.0
        error = (self.outward(hidden + noise / self.objects) - colour).square().mean()
        return Loss(error, {"recon": error.detach(), "kl": hidden.detach().square().mean()})

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> ToyLatents:
        return ToyLatents(self.inward(video.mean((-1, -2))))

    def rollout(self, latents: ToyLatents, horizon: int, *, generator: torch.Generator | None = None) -> ToyLatents:
        raise NotImplementedError

    def decode(self, latents: ToyLatents, components: bool = False) -> Scene:
        colour = self.outward(latents.colour)
        return Scene(colour[..., None, None].expand(*colour.shape, 64, 64))


@dataclasses.dataclass(frozen=True)
class OtherConfig(ToyConfig):
    """The same weights under the name of another family."""


def start_from_toy(model: Any, config: ToyConfig, tensors: dict[str, Tensor]) -> None:
    assert config.width == 3
    model.inward.load_state_dict({name: tensors[f"inward.{name}"] for name in ("weight", "bias")})


@pytest.fixture(autouse=True)
def toy_families(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = families.Family(ToyConfig, Toy, {}, ("forward", "encode", "decode"), True, False, (), ())
    monkeypatch.setitem(families.FAMILIES, "toy", toy)
    other = toy._replace(config=OtherConfig, warm_starts={"toy": start_from_toy})
    monkeypatch.setitem(families.FAMILIES, "other", other)


def toy_run(folder: Path, *, config: Any = None, **changes: Any) -> TrainRun:
    run = dataclasses.replace(DEBUG, model=config or ToyConfig(), out=str(folder))
    return with_overrides(run, changes)


def trained(run: TrainRun, **worker: Any) -> str:
    return loop.train(loop.open_run(run), loop.Worker(**worker))


def stage_lines(out: str) -> list[tuple[Any, ...]]:
    lines = [line for line in loop.read_metrics(out) if line["kind"] == "stage"]
    return [(line["step"], line["stage"], line["reason"], line["settings"]) for line in lines]


def hashes(folder: Path) -> dict[str, str]:
    last = json.loads((folder / "last.json").read_text())
    complete = json.loads((folder / last["checkpoint"] / "COMPLETE").read_text())
    return {name: complete[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")}


class KilledError(Exception):
    pass


def killed_after(step: int) -> Any:
    def report_checkpoint(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise KilledError

    return report_checkpoint


STAGES = ("steps=2 clip_frames=4 optim.batch_size=2 model.kl_weight=2", "steps=1 optim.lr=1e-3", "")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDLP through three stages, uninterrupted."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    trained(dataclasses.replace(DEBUG, out=str(folder), stages=STAGES))
    return folder


def test_stages_follow_one_another_and_each_is_logged(staged: Path) -> None:
    assert stage_lines(str(staged)) == [
        (1, 1, "start", {"clip_frames": 4, "optim.batch_size": 2, "model.kl_weight": 2.0}),
        (3, 2, "steps", {"optim.lr": 1e-3}),
        (4, 3, "steps", {}),
    ]
    rates = [line["lr"] for line in loop.read_metrics(str(staged)) if line["kind"] == "train"]
    assert rates == [5e-4, 5e-4, 1e-3, 5e-4, 5e-4, 5e-4]


def test_a_checkpoint_rebuilds_the_model_of_its_stage(staged: Path) -> None:
    first = checkpoint.load_model(str(staged / "checkpoints/step-00000002"))
    assert first.config.kl_weight == 2.0
    assert first.run["model"]["kl_weight"] == 0.1
    assert checkpoint.load_model(str(staged)).config.kl_weight == 0.1


def test_a_run_killed_at_the_end_of_a_stage_and_inside_another_is_bit_identical(staged: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(DEBUG, out=str(tmp_path / "run"), stages=STAGES)
    for step in (2, 4):
        with pytest.raises(KilledError):
            trained(run, report=killed_after(step))
        run = dataclasses.replace(run, resume=True)
    trained(run)
    assert hashes(tmp_path / "run") == hashes(staged)
    assert stage_lines(run.out) == stage_lines(str(staged))
    states = [json.loads((place / "checkpoints/step-00000006/state.json").read_text()) for place in
              (tmp_path / "run", staged)]  # fmt: skip
    assert states[0]["stage"] == states[1]["stage"] == {**states[0]["stage"], "number": 3, "begin": 3}
    assert [state["position"] for state in states] == [3, 3]


def test_a_run_with_stages_verifies_and_its_report_and_command_are_written(staged: Path, tmp_path: Path) -> None:
    shutil.copytree(staged, tmp_path / "run")
    assert verify.verify(VerifyRun(str(tmp_path / "run"))).startswith("ok: ")
    report.write_run_report(str(tmp_path / "run"))
    words = shlex.split(report.training_command("ddlp", json.loads((staged / "config.json").read_text())["run"]))
    run = cli.parse({"debug": ("", PRESETS["ddlp"]["debug"])}, words[2:], description="")
    assert run == dataclasses.replace(DEBUG, stages=STAGES)


def test_one_stage_without_settings_is_a_run_without_stages(tmp_path: Path) -> None:
    trained(toy_run(tmp_path / "plain"))
    trained(toy_run(tmp_path / "staged", stages=("",)))
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "staged")


def test_each_stage_draws_another_order_and_the_first_the_runs_own() -> None:
    seeds = [loop._stage_seed(7, number) for number in (1, 2, 3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


def test_stages_train_on_their_own_data_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.write_dataset(str(tmp_path / "data"), 4, 3, 64, 4)
    monkeypatch.chdir(tmp_path)
    stages = ("steps=2 data=data model.objects=3", "")
    before: list[dict[str, Tensor]] = []

    def wrap(model: nn.Module) -> nn.Module:
        before.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    run = toy_run(tmp_path / "run", stages=stages)
    trained(run, wrap=wrap)
    assert stage_lines(run.out)[0][-1] == {"data": str(tmp_path / "data"), "model.objects": 3}
    first, last = (json.loads((tmp_path / f"run/checkpoints/step-0000000{n}/state.json").read_text()) for n in (2, 6))
    assert (first["model"]["objects"], last["model"]["objects"]) == (3, 2)
    assert last["dataset_id"] == "sim:balls-interaction/train" != first["dataset_id"]
    saved = checkpoint.load_weights(str(tmp_path / "run/checkpoints/step-00000002")).tensors
    assert all(torch.equal(saved[name], before[1][name]) for name in saved)


def test_the_optimisers_averages_go_on_into_the_next_stage() -> None:
    old, new = Toy(ToyConfig()), Toy(ToyConfig(objects=3))
    optimizers = [torch.optim.Adam(model.parameters(), lr=rate, fused=True) for model, rate in ((old, 1.0), (new, 2.0))]
    old(torch.rand(1, 2, 3, 8, 8)).total.backward()
    optimizers[0].step()
    checkpoint.carry_over(old, optimizers[0], new, optimizers[1])
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert all(
        torch.equal(states[0]["state"][i][n], states[1]["state"][i][n])
        for i in range(4)
        for n in ("exp_avg_sq", "step")
    )
    assert optimizers[1].param_groups[0]["lr"] == 2.0


def test_a_stage_that_stagnates_ends_early_and_the_last_takes_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STAGNATION", 10.0)  # no loss falls by 1000 %
    run = toy_run(tmp_path / "run", stages=("steps=5 patience=2", ""), checkpoint_every=3)
    with pytest.raises(KilledError):  # between the steps that decide
        trained(run, report=killed_after(3))
    trained(dataclasses.replace(run, resume=True))
    assert [line[:3] for line in stage_lines(run.out)] == [(1, 1, "start"), (5, 2, "stagnated")]
    assert checkpoint.last_step(run.out) == 6


def feed(stage: Stage, losses: list[float], kls: list[float] | None = None, begin: int = 0) -> list[str | None]:
    clock = loop.StageClock(begin=begin, fell_at=begin)
    reasons = []
    for number, loss in enumerate(losses):
        clock.add(stage, begin + number + 1, loss, None if kls is None else kls[number])
        clock = loop.StageClock(**json.loads(json.dumps(dataclasses.asdict(clock))))  # as a resumed run has it
        reasons.append(clock.reason(stage, begin + number + 1))
    return reasons


def test_a_stage_is_over_when_its_steps_are() -> None:
    assert feed(Stage({}, steps=3), [1.0, 1.0, 1.0], begin=10) == [None, None, "steps"]


def test_a_loss_that_falls_by_less_than_a_hundredth_stagnates() -> None:
    falling = [100 * 0.98**n for n in range(12)]
    assert feed(Stage({}, patience=2), falling) == [None] * 12
    slowly = [100 * 0.998**n for n in range(5)]
    # the mean of the first two is the first that counts, two steps later it has not fallen
    assert feed(Stage({}, patience=2), slowly) == [None, None, None, "stagnated", "stagnated"]


def test_a_negative_loss_that_falls_does_not_stagnate() -> None:
    assert feed(Stage({}, patience=2), [-10.0 - n for n in range(8)]) == [None] * 8


def test_a_single_lucky_step_neither_ends_nor_prolongs_a_stage() -> None:
    stage = Stage({}, patience=4)
    assert feed(stage, [1.0, 0.2, 1.0, 1.0, 1.0, 0.5, 0.4, 0.3]) == [None] * 8


def test_a_posterior_collapses_only_after_it_was_used() -> None:
    stage = Stage({}, patience=2, min_kl=1.0)
    kls = [0.1, 0.1, 4.0, 4.0, 0.5, 0.0, 0.0]
    falling = [100 * 0.9**n for n in range(7)]
    # smoothed over two steps: .1 .1 2.05 3.0 1.8 .9 .4
    assert feed(stage, falling, kls) == [None] * 5 + ["collapsed"] * 2


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            ("steps=2 clip_frames", ""),
            r"stage 1 \('steps=2 clip_frames'\): 'clip_frames' is not of the form NAME=VALUE",
        ),
        (("steps=2", "clip_frames=x"), r"stage 2 .*clip_frames=x: 'x' is not of type int"),
        (("steps=2", "optim.lr=nan"), r"stage 2 .*'nan' is not of type float"),
        (("steps=2", "optim.lrr=1"), r"stage 2 .*OptimConfig has no field 'lrr'"),
        (("steps=2", "seed=3"), r"stage 2 .*seed cannot change within a run; a stage takes steps, patience"),
        (("steps=2", "model.particles=3"), r"stage 2 .*DDLPConfig has no field 'particles'"),
        (("steps=2", "optim.batch_size=0"), r"stage 2 .*optim.batch_size must be at least 1"),
        (("steps=2", "clip_frames=3 clip_frames=4"), r"stage 2 .*clip_frames is given twice"),
        (("steps=0", ""), r"stage 1 .*steps=0: it must be positive"),
        (("patience=5", ""), r"stage 1 .*steps= is missing"),
        (("steps=6", ""), r"stage 1 .*take 6 steps, which leaves none of the run's steps=6"),
        (("steps=2", "steps=3"), r"stage 2 .*leave 4 for the last stage"),
        (("steps=2", "patience=3"), r"stage 2 .*the last stage ends with the run"),
        (("steps=2 'data", ""), r"stage 1 .*No closing quotation"),
        ("steps=2", r"stages must be a list of strings"),
    ],
)
def test_impossible_stages_are_refused_by_number_and_word(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DEBUG, stages=stages)


def test_words_of_a_stage_have_the_types_of_their_fields() -> None:
    numbers = "optim.clip_norm=5 optim.micro_batch_size=none optim.betas=0.5,0.9 model.prior_channels=[8,4,2]"
    stage = Stage.parse(f"steps=2 {numbers} data='a b'", DEBUG)
    assert stage.settings == {
        "optim.clip_norm": 5.0,
        "optim.micro_batch_size": None,
        "optim.betas": (0.5, 0.9),
        "model.prior_channels": (8, 4, 2),
        "data": "a b",
    }
    assert isinstance(stage.settings["optim.clip_norm"], float)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "model.kl_weight=2 model.pint_dim=32",
            r"stage 2 .*: model.pint_dim changes weight pint\..* from .* to .*; set it",
        ),
        ("clip_frames=7", r"stage 2 .*must have 3 to 6 frames"),
        ("data=sim:bals", r"stage 2 .*balls-interaction"),
    ],
)
def test_a_stage_that_cannot_train_is_refused_before_anything_starts(tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.open_run(dataclasses.replace(DEBUG, out=str(tmp_path / "run"), stages=("steps=2", stage)))
    assert not (tmp_path / "run").exists()


def test_min_kl_needs_a_loss_term_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage 1 .*the loss term kl, but the model's are recon, kl_static"):
        loop.open_run(dataclasses.replace(DEBUG, out=str(tmp_path / "run"), stages=("steps=2 min_kl=1", "")))


def test_other_stages_are_refused_on_resume(staged: Path) -> None:
    with pytest.raises(ValueError, match=r"run.stages was \[.* and is \[\]"):
        loop.open_run(dataclasses.replace(DEBUG, out=str(staged), resume=True))


def test_a_run_of_a_version_without_stages_goes_on(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", steps=2)
    trained(run)
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["run"]["stages"], config["run"]["init"], config["run"]["optim"]["anneal_to"]
    store.publish_json(str(tmp_path / "run/config.json"), {n: v for n, v in config.items() if n != store.SEAL})
    assert trained(dataclasses.replace(run, resume=True, steps=3)).endswith("step-00000003")


def test_progress_says_that_a_stage_begins_and_why() -> None:
    out = io.StringIO()
    line = {"kind": "stage", "step": 6, "stage": 2, "reason": "stagnated", "settings": {"clip_frames": 6}}
    loop.Progress(10, file=out).show(line)
    assert out.getvalue() == "stage 2 begins at step 6 (the loss stagnated): clip_frames=6\n"


def test_the_learning_rate_warms_up_and_anneals() -> None:
    optim = OptimConfig(lr=1.0, decay=0.5, decay_steps=4, warmup_steps=2, anneal_steps=4, anneal_to=0.0)
    rates = [learning_rate(optim, step, 10) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 0.5, 0.5, 0.5 * 3 / 4, 0.5 * 2 / 4, 0.25 * 1 / 4, 0]


def test_a_constant_learning_rate_stays_exactly_that() -> None:
    assert [learning_rate(OptimConfig(lr=3e-4), step, 5, factor=0.1) for step in range(5)] == [3e-4 * 0.1] * 5


def test_steps_may_grow_until_annealing_has_begun(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", steps=6, **{"optim.anneal_steps": 3})
    with pytest.raises(KilledError):
        trained(run, report=killed_after(2))
    run = dataclasses.replace(run, resume=True, steps=8)
    trained(run)
    with pytest.raises(ValueError, match=r"stands at step 8 and has steps=8, of which the last 3 are annealed"):
        loop.open_run(dataclasses.replace(run, steps=12))


@pytest.fixture
def start(tmp_path: Path) -> Path:
    trained(toy_run(tmp_path / "start", steps=2))
    return tmp_path / "start"


def first_weights(run: TrainRun) -> dict[str, Tensor]:
    """The weights with which a run begins to train."""
    found: dict[str, Tensor] = {}

    def wrap(model: nn.Module) -> nn.Module:
        found.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    trained(run, wrap=wrap)
    return found


def test_a_run_starts_from_the_weights_of_another(start: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", init=str(start))
    weights, found = checkpoint.load_weights(str(start)), first_weights(run)
    assert all(torch.equal(found[name], weights.tensors[name]) for name in weights.tensors)
    recorded = {"checkpoint": weights.path, "family": "toy", "step": 2, "model_id": weights.model_id}
    assert json.loads((tmp_path / "run/config.json").read_text())["init"] == recorded
    assert json.loads((tmp_path / "run/checkpoints/step-00000006/state.json").read_text())["init"] == recorded
    assert verify.verify(VerifyRun(str(tmp_path / "run"))).startswith("ok: ")


def test_a_resumed_run_needs_its_start_no_more(start: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", init=str(start))
    with pytest.raises(KilledError):
        trained(run, report=killed_after(4))
    shutil.rmtree(start)
    assert trained(dataclasses.replace(run, resume=True)).endswith("step-00000006")


def test_a_start_that_has_changed_since_is_refused(start: Path, tmp_path: Path) -> None:
    run = loop.open_run(toy_run(tmp_path / "run", init=str(start)))
    shutil.rmtree(start)
    trained(toy_run(start, steps=2, seed=1))
    with pytest.raises(ValueError, match=r"has changed since .*/run was opened"):
        loop.train(run)


def test_another_family_starts_from_what_its_record_names(start: Path, tmp_path: Path) -> None:
    found = first_weights(toy_run(tmp_path / "run", config=OtherConfig(), init=str(start)))
    weights = checkpoint.load_weights(str(start)).tensors
    assert torch.equal(found["inward.weight"], weights["inward.weight"])
    assert not torch.equal(found["outward.weight"], weights["outward.weight"])
    trained(toy_run(tmp_path / "other", config=OtherConfig(), steps=1))
    with pytest.raises(ValueError, match=r"is of family other; toy can start from weights of toy$"):
        loop.open_run(toy_run(tmp_path / "new", init=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="is of family toy; ddlp can start from weights of ddlp"):
        loop.open_run(dataclasses.replace(DEBUG, out=str(tmp_path / "new"), init=str(start)))
    assert not (tmp_path / "new").exists()


def test_weights_of_another_size_are_no_start(start: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the weights of .*/start/checkpoints/step-00000002 do not fit this config of Toy"
    ):
        loop.open_run(toy_run(tmp_path / "run", init=str(start), **{"model.width": 5}))


def test_weights_that_are_not_finite_are_no_start(start: Path) -> None:
    weights = checkpoint.load_weights(str(start))
    weights.tensors["outward.bias"][0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite, the first outward.bias"):
        checkpoint.start_from(weights, Toy(ToyConfig()), "toy")


def test_the_bare_command_line_takes_stages_and_a_start(tmp_path: Path) -> None:
    def words(folder: str, *settings: str) -> list[str]:
        sets = ["optim.batch_size=1", "clip_frames=3", "threads=1", "eval_every=0", *settings]
        return ["debug", "--out", str(tmp_path / folder), "--steps", "2", *(w for s in sets for w in ("--set", s))]

    assert loop.main(words("first", 'stages=["steps=1 optim.lr=1e-4", "clip_frames=4"]')) == 0
    assert [line[:3] for line in stage_lines(str(tmp_path / "first"))] == [(1, 1, "start"), (2, 2, "steps")]
    assert loop.main(words("second", f"init={tmp_path / 'first'}")) == 0


def test_a_slot_model_trains_in_bf16_on_a_cpu_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"precision": "bf16", "optim.batch_size": 1, "clip_frames": 1, "threads": 1, "checkpoint_every": 2}
    run = with_overrides(PRESETS["iodine"]["debug"], {**settings, "steps": 4, "eval_every": 0, "device": "cpu"})
    whole = loop.train(loop.open_run(dataclasses.replace(run, out=str(tmp_path / "whole"))))
    half = dataclasses.replace(run, out=str(tmp_path / "half"))
    loop.train(loop.open_run(dataclasses.replace(half, steps=2)))
    resumed = loop.train(loop.open_run(dataclasses.replace(half, resume=True)))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (Path(whole) / name).read_bytes() == (Path(resumed) / name).read_bytes()


def test_the_data_of_a_stage_may_move_like_those_of_the_run() -> None:
    def stored(folder: str, more: str = "") -> dict[str, Any]:
        return {"run": {"data": folder, "stages": [f"steps=2 data={folder} clip_frames=3{more}", ""]}}

    assert loop.settings_difference(stored("/old"), stored("/new")) == []
    assert loop.settings_difference(stored("/old"), stored("/new", " optim.lr=1")) != []
