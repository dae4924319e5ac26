import contextlib
import copy
import dataclasses
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from objdyn import families
from objdyn.interface import Loss
from pipeline import benchmark, checkpoint, claim, failpoints, loop, store
from pipeline.config import TrainRun, with_overrides
from pipeline.presets import ABOUT, PRESETS
from pipeline.reader import open_source

DEBUG = with_overrides(
    PRESETS["ddlp"]["debug"],
    {"optim.batch_size": 2, "threads": 1, "steps": 6, "checkpoint_every": 2, "log_every": 2, "eval_every": 4},
)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def run_in(folder: Path, **changes: Any) -> TrainRun:
    return with_overrides(dataclasses.replace(DEBUG, out=str(folder)), changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load_last(str(folder))
    assert saved is not None
    return saved.model


def sha256_of_last(folder: Path) -> dict[str, Any]:
    last = json.loads((folder / "last.json").read_text())
    return json.loads((folder / last["checkpoint"] / "COMPLETE").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    loop.train(loop.open_run(run_in(folder)))
    return folder


def test_a_run_leaves_config_metrics_events_and_checkpoints(undisturbed: Path) -> None:
    stored = json.loads((undisturbed / "config.json").read_text())
    assert stored["family"] == "ddlp"
    assert stored["run"]["optim"]["batch_size"] == 2
    lines = loop.read_metrics(str(undisturbed))
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2), ("train", 4), ("eval", 4), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    assert {"loss", "recon", "kl_static", "kl_dynamic", "lr"} | loop.CLOCK_FIELDS <= set(lines[0])
    assert {"loss", "recon_psnr", "predict_psnr", "copy_last_predict_psnr"} <= set(lines[2])
    events = EventAccumulator(str(undisturbed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/recon")] == [2, 4, 6]
    assert checkpoint.last_step(str(undisturbed)) == 6
    model = checkpoint.load_model(str(undisturbed)).model
    assert int(model.step) == 6


def test_the_time_of_a_training_is_told_by_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def delay(module: Any, name: str, seconds: float) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: [time.sleep(seconds), original(*a, **k)][1])

    delay(loop, "_loss", 0.05)
    delay(checkpoint, "save_checkpoint", 0.1)
    delay(loop, "evaluate", 0.2)
    delay(loop, "learning_rate", 0.03)
    run = loop.open_run(run_in(tmp_path / "run"))
    begin = time.monotonic()
    loop.train(run)
    whole = time.monotonic() - begin
    lines = [line for line in loop.read_metrics(run.out) if line["kind"] == "train"]
    for line in lines:
        assert line["model_seconds"] >= 2 * 0.05
        assert line["optimizer_seconds"] >= 2 * 0.03
        stepping = sum(line[f"{phase}_seconds"] for phase in ("data", "model", "optimizer"))
        assert line["steps_per_second"] == pytest.approx(2 / stepping)
    # what follows a line stands in the next one: checkpoints after 2, 4 and 6 steps, evaluations after 4 and 6
    assert lines[0]["checkpoint_seconds"] == lines[0]["eval_seconds"] == 0
    assert lines[1]["eval_seconds"] == 0
    assert min(line["checkpoint_seconds"] for line in lines[1:]) >= 0.1
    assert lines[2]["eval_seconds"] >= 0.2
    assert sum(line[f"{phase}_seconds"] for line in lines for phase in loop.PHASES) <= whole


def test_a_resumed_run_is_bit_identical(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    loop.train(loop.open_run(run_in(folder, steps=4)))
    with (folder / "metrics.jsonl").open("a") as file:  # what a run killed between two checkpoints leaves
        file.write('{"kind": "train", "step": 5, "loss": 0.0}\n{"kind": "tr')
    loop.train(loop.open_run(run_in(folder, resume=True)))
    ours, theirs = sha256_of_last(folder), sha256_of_last(undisturbed)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["optimizer.safetensors"] == theirs["optimizer.safetensors"]
    steps = [line["step"] for line in loop.read_metrics(str(folder)) if line["kind"] == "train"]
    assert steps == [2, 4, 6]


def test_resuming_a_finished_run_changes_nothing(undisturbed: Path) -> None:
    before = sha256_of_last(undisturbed)
    assert loop.train(loop.open_run(run_in(undisturbed, resume=True))).endswith("step-00000006")
    assert sha256_of_last(undisturbed) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "already holds a run; add --resume"),
        ({"resume": True, "optim.lr": 0.1}, "run.optim.lr was 0.0005 and is 0.1"),
        ({"resume": True, "model.kl_weight": 2.0}, "run.model.kl_weight was 0.1 and is 2.0"),
        ({"resume": True, "seed": 5}, "run.seed was 0 and is 5"),
    ],
)
def test_a_run_folder_is_not_mixed_with_another_run(undisturbed: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.open_run(run_in(undisturbed, **changes))


def test_a_setting_that_the_stored_run_did_not_have_yet_counts_as_its_default(
    undisturbed: Path,
) -> None:
    stored = store.read_json(str(undisturbed / "config.json"))
    assert stored["run"]["model"].pop("recon_loss") == "mse"
    assert loop.settings_difference(stored, store.read_json(str(undisturbed / "config.json"))) == []
    stored["run"]["model"]["recon_loss"] = "vgg"
    (difference,) = loop.settings_difference(stored, store.read_json(str(undisturbed / "config.json")))
    assert difference == ("run.model.recon_loss", "vgg", "mse")


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        loop.open_run(run_in(tmp_path / "none", resume=True))


def test_one_command_starts_a_run_and_goes_on_with_it(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for steps, resumed in ((4, False), (6, True)):
        run = loop.open_run(run_in(folder, steps=steps, resume_if_exists=True))
        assert (run.resume, run.resume_if_exists) == (resumed, False)
        loop.train(run)
    assert sha256_of_last(folder)["model.safetensors"] == sha256_of_last(undisturbed)["model.safetensors"]
    stored = store.read_json(str(folder / "config.json"))["run"]
    assert (stored["resume"], stored["resume_if_exists"]) == (False, False)
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        loop.open_run(run_in(folder, resume_if_exists=True, seed=5))
    assert loop.open_run(run_in(folder, resume_if_exists=True, seed=5, force=True)).resume
    assert not loop.open_run(run_in(tmp_path / "new", resume_if_exists=True, force=True)).resume
    with pytest.raises(ValueError, match="--resume-if-exists needs --out"):
        loop.open_run(dataclasses.replace(DEBUG, resume_if_exists=True))


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis.tex"):
        loop.open_run(run_in(tmp_path))


def test_wrong_data_leaves_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="balls-interaction"):
        loop.open_run(run_in(tmp_path / "run", data="sim:bals"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image_size": 128, "model.patch_size": 16}, "--size 128"),
        ({"clip_frames": 7}, "must have 3 to 6 frames"),
        ({"clip_frames": 101}, "clip_frames=101"),
    ],
)
def test_data_that_do_not_fit_the_model_leave_no_run_folder(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = dataclasses.replace(DEBUG, out=str(tmp_path / "run"))
    model = {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model))
    run = with_overrides(run, {k: v for k, v in changes.items() if not k.startswith("model.")})
    with pytest.raises(ValueError, match=message):
        loop.open_run(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [((), "^inference=.sequential"), (("steps=1", "model.inference=sequential"), "^stage 2 .*inference=.sequential")],
)
def test_inference_that_is_for_test_only_leaves_no_run_folder(
    tmp_path: Path, stages: tuple[str, ...], message: str
) -> None:
    run = dataclasses.replace(PRESETS["iodine"]["debug"], out=str(tmp_path / "run"), stages=stages)
    if not stages:
        run = with_overrides(run, {"model.inference": "sequential"})
    with pytest.raises(ValueError, match=message):
        loop.open_run(run)
    assert not (tmp_path / "run").exists()


def test_opening_a_run_draws_nothing_from_the_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    loop.open_run(dataclasses.replace(PRESETS["provide"]["debug"], out=str(tmp_path / "run")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("preset", ["debug", "bouncing-balls"])
def test_a_run_that_is_meant_to_start_from_another_family_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    monkeypatch.setattr(loop, "_try_one_clip", lambda run, distance: None)
    assert vars(PRESETS["provide"]["small"].model)["conditional_decoder"] == "residual"  # as in debug
    run = dataclasses.replace(PRESETS["provide"][preset], out=str(tmp_path / "run"))
    loop.open_run(run)
    told = capsys.readouterr().err
    if preset == "bouncing-balls":  # the paper's own recipe
        assert told == ""
        return
    assert told.startswith("note: provide begins from drawn weights, but with model.conditional_decoder=residual")
    assert told.endswith("python jobs/train_iodine.py small --out START), then --init START\n")
    assert told.count("\n") == 1
    loop.open_run(dataclasses.replace(run, resume=True))
    assert capsys.readouterr().err == ""


def test_oddn_says_what_it_is_meant_to_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "_try_one_clip", lambda run, distance: None)
    loop.open_run(dataclasses.replace(PRESETS["oddn"]["small"], out=str(tmp_path / "run")))
    told = capsys.readouterr().err
    assert told.endswith(": python jobs/train_iodine.py clevrer-small --out START, then --init START\n")
    loop.open_run(dataclasses.replace(PRESETS["oddn"]["debug"], out=str(tmp_path / "alone")))  # IODINE alone at first
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def uncounted(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """A run of the state-space model on clips that do not tell their number of objects."""
    folder = tmp_path_factory.mktemp("uncounted")
    benchmark.write_dataset(str(folder / "data"), 4, 8, 32, 4, truth=False)
    changes = {"steps": 2, "eval_every": 0, "checkpoint_every": 2, "threads": 1, "data": str(folder / "data")}
    return with_overrides(PRESETS["ssm"]["debug"], changes)


def test_data_without_counts_train_a_model_that_takes_none(uncounted: TrainRun, tmp_path: Path) -> None:
    run = with_overrides(uncounted, {"model.known_count": False, "out": str(tmp_path / "run")})
    loop.train(loop.open_run(run))
    loaded = checkpoint.load_model(str(tmp_path / "run"))
    assert (loaded.step, loaded.config.known_count) == (2, False)
    device = torch.device("cpu")
    assert "loss" in loop.evaluate(loaded.model, open_source(run.data, "train"), run, device)


def test_a_count_that_is_needed_and_missing_leaves_no_run_folder(uncounted: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no truth 'num_objects'.*model.known_count=false"):
        loop.open_run(dataclasses.replace(uncounted, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_resume_without_out_is_refused() -> None:
    with pytest.raises(ValueError, match="--resume needs --out"):
        loop.open_run(dataclasses.replace(DEBUG, resume=True))


def test_a_folder_with_only_what_a_killed_process_left_is_empty(tmp_path: Path) -> None:
    failpoints.arm("publish:config.json=full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/run/config.json'"):
        loop.open_run(run_in(tmp_path / "run"))
    failpoints.arm("")
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "run" / f".config.json.{32 * '0'}.tmp").write_text("half")
    loop.open_run(run_in(tmp_path / "run"))
    assert (tmp_path / "run/config.json").exists()


def test_without_out_the_next_free_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = loop.open_run(dataclasses.replace(DEBUG, out=""))
    second = loop.open_run(dataclasses.replace(DEBUG, out=""))
    assert [first.out, second.out] == [str(tmp_path / f"objdyn/runs/ddlp-00{n}") for n in (1, 2)]


def nan_loss(loss: Loss, model: torch.nn.Module) -> Loss:
    terms = {**loss.terms, "kl_dynamic": loss.terms["kl_dynamic"] * float("nan")}
    return Loss(loss.total * float("nan"), terms)


def infinite_loss_with_finite_gradients(loss: Loss, model: torch.nn.Module) -> Loss:
    return loss._replace(total=loss.total + float("inf"))


def finite_loss_with_a_nan_gradient(loss: Loss, model: torch.nn.Module) -> Loss:
    parameter = model.get_parameter("background_encoder.mlp.4.weight")
    return loss._replace(total=loss.total + (parameter - parameter.detach()).norm().sqrt())


def poison(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Loss], bad: set[int]) -> list[Any]:
    """Change the loss of some tries of a step; the list gets a copy of the whole state before each try."""
    optimizers, states, adam, real = [], [], torch.optim.Adam, loop._loss

    def observed(*args: Any, **kwargs: Any) -> torch.optim.Adam:
        optimizers.append(adam(*args, **kwargs))
        return optimizers[-1]

    def loss(model: torch.nn.Module, *args: Any) -> Loss:
        states.append(copy.deepcopy([model.state_dict(), optimizers[-1].state_dict()["state"]]))
        found = real(model, *args)
        return change(found, model) if len(states) - 1 in bad else found

    monkeypatch.setattr(torch.optim, "Adam", observed)
    monkeypatch.setattr(loop, "_loss", loss)
    return states


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(same, a, b))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (nan_loss, ["loss", "kl_dynamic"]),
        (infinite_loss_with_finite_gradients, ["loss"]),
        (finite_loss_with_a_nan_gradient, ["gradient of background_encoder.mlp.4.weight"]),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_says_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Loss], names: list[str]
) -> None:
    states = poison(monkeypatch, change, bad={1})
    run = loop.open_run(run_in(tmp_path / "run", steps=3, eval_every=0, **{"optim.clip_norm": 200.0}))
    shown: list[str] = []
    loop.train(run, loop.Worker(show=lambda line: shown.append(line["kind"])))
    assert len(states) == 4
    assert [same(*pair) for pair in itertools.pairwise(states)] == [False, True, False]
    lines = loop.read_metrics(run.out)
    assert [line["kind"] for line in lines] == shown == ["skipped", "train", "train"]
    skipped = lines[0]
    assert (skipped["step"], skipped["not_finite"]) == (2, names)
    assert len(skipped["clips"]) == 2
    assert [line["skipped"] for line in lines[1:]] == [1, 1]


def test_losses_that_stay_non_finite_stop_the_run_naming_terms_and_clips(tmp_path: Path) -> None:
    run = loop.open_run(run_in(tmp_path / "run", **{"optim.lr": 1e30, "steps": 20, "checkpoint_every": 20}))
    message = r"^loss, .* not finite 5 steps in a row, last in step 2 .*train-\d{6}.*optim.clip_norm"
    with pytest.raises(FloatingPointError, match=message):
        loop.train(run)
    skipped = [line for line in loop.read_metrics(run.out) if line["kind"] == "skipped"]
    assert [(line["step"], len(line["clips"])) for line in skipped] == [(2, 2)] * 5
    assert checkpoint.last_step(run.out) is None


def negate_covariance(model: torch.nn.Module) -> None:
    covariance = model.get_submodule("prior.emission_cov")
    broken = -covariance()
    covariance.forward = lambda: broken


def spoil(name: str) -> Callable[[torch.nn.Module], object]:
    return lambda model: model.get_parameter(name).data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("prior.emission_cov", negate_covariance),
        ("prior.transition_cov.raw_diagonal", spoil("prior.transition_cov.raw_diagonal")),
        ("prior.force", spoil("prior.force")),
    ],
)
def test_dynamics_that_break_are_named_in_every_skipped_step_and_stop_the_run(
    name: str, harm: Callable[[torch.nn.Module], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 9, "eval_every": 0, "checkpoint_every": 9, "threads": 1, "out": str(tmp_path / "run")}
    run = loop.open_run(with_overrides(PRESETS["ssm"]["debug"], changes))
    real, calls = loop._loss, itertools.count(1)

    def loss(model: torch.nn.Module, *args: Any) -> Loss:
        if next(calls) == 3:
            harm(model)
        return real(model, *args)

    monkeypatch.setattr(loop, "_loss", loss)
    with pytest.raises(FloatingPointError, match=f"^loss, {name}, .* not finite 5 steps in a row, last in step 3 "):
        loop.train(run)
    skipped = [line for line in loop.read_metrics(run.out) if line["kind"] == "skipped"]
    assert [(line["step"], line["not_finite"][:2]) for line in skipped] == [(3, ["loss", name])] * 5
    assert checkpoint.last_step(run.out) is None


def test_a_skipped_step_after_a_checkpoint_is_logged_once_by_a_run_killed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, nan_loss, bad={2})
    run = run_in(tmp_path / "run", steps=4, eval_every=0)
    failpoints.arm("append=full@3")  # at the line of step 4, after the checkpoint and the skipped step
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        loop.train(loop.open_run(run))
    failpoints.arm("")
    monkeypatch.undo()
    poison(monkeypatch, nan_loss, bad={0})
    loop.train(loop.open_run(dataclasses.replace(run, resume=True)))
    lines = [(line["kind"], line["step"], line.get("skipped")) for line in loop.read_metrics(run.out)]
    assert lines == [("train", 2, 0), ("skipped", 3, None), ("train", 4, 1)]


def test_weights_that_are_not_finite_end_the_run_at_the_checkpoint_before(tmp_path: Path) -> None:
    run = loop.open_run(run_in(tmp_path / "run", eval_every=0, steps=2))
    loop.train(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    # one update overflows, after a loss and gradients that are finite
    with pytest.raises(FloatingPointError, match=r"at step 3 .* values of .* no checkpoint was written"):
        loop.train(with_overrides(run, {"optim.lr": 1e39, "steps": 3}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    assert checkpoint.last_step(run.out) == 2


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    with loop.MetricsLog(str(tmp_path), 0) as log:
        log.write({"kind": "eval", "step": 1, "loss": float("inf"), "recon_psnr": float("nan")})
    assert loop.read_metrics(str(tmp_path)) == [{"kind": "eval", "step": 1, "loss": None, "recon_psnr": None}]


@pytest.mark.parametrize("ends_by", [ConnectionError("cut off"), None])
def test_a_replaced_writer_leaves_the_metrics_of_the_new_one(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch, ends_by: Exception | None
) -> None:
    lost = False

    def check() -> None:
        if lost:
            raise claim.LostError("another job has taken it over")

    line = {"kind": "eval", "step": 1, "loss": 1.0}
    path, events = store.join(s3_folder, "metrics.jsonl"), dict[str, bytes]()
    with contextlib.suppress(ConnectionError), loop.MetricsLog(s3_folder, 0, check) as log:
        log.write(line)
        log.sync()
        assert loop.read_metrics(s3_folder) == [line]
        store.publish(path, b"of the new owner")
        events = {name: store.read_bytes(store.join(s3_folder, name)) for name in store.list_tree(s3_folder)}
        lost = True
        monkeypatch.setattr(loop, "PUBLISH_SECONDS", -1.0)
        with pytest.raises(claim.LostError):
            log.write({**line, "step": 2})
        if ends_by is not None:
            raise ends_by
    assert {name: store.read_bytes(store.join(s3_folder, name)) for name in store.list_tree(s3_folder)} == events


def test_learning_rate_decays_by_steps(tmp_path: Path) -> None:
    changes = {"optim.decay": 0.5, "optim.decay_steps": 2, "log_every": 1, "eval_every": 0}
    run = loop.open_run(run_in(tmp_path / "run", **changes))
    loop.train(run)
    rates = [line["lr"] for line in loop.read_metrics(run.out)]
    assert rates == [5e-4, 5e-4, 2.5e-4, 2.5e-4, 1.25e-4, 1.25e-4]


def test_slow_parameters_move_by_their_factor(tmp_path: Path) -> None:
    changes = {"optim.slow": "pint.", "optim.slow_factor": 0.1, "steps": 2, "eval_every": 0}
    run = loop.open_run(run_in(tmp_path / "run", **changes))
    torch.manual_seed(run.seed)
    before = families.build(run.model).state_dict()
    loop.train(run)
    after = weights(tmp_path / "run")
    moved = {n: (after[n] - before[n]).abs().max().item() for n in before if n != "step"}
    # Adam moves a parameter by at most lr per step; PINT has a gradient in the second step only
    assert 3e-5 < max(v for n, v in moved.items() if n.startswith("pint.")) <= 5.01e-5
    assert 5e-4 < max(v for n, v in moved.items() if not n.startswith("pint.")) <= 1.01e-3


def test_slow_must_name_some_parameters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.slow='pin_'.*attribute_encoder., .*pint."):
        loop.open_run(run_in(tmp_path / "run", **{"optim.slow": "pin_"}))


def test_evaluation_measures_copy_last_exactly() -> None:
    source = open_source("sim:balls-interaction", "val")
    model = families.build(DEBUG.model)
    run = dataclasses.replace(DEBUG, eval_clips=1)
    values = loop.evaluate(model, source, run, torch.device("cpu"))
    frames = torch.from_numpy(source.open_shard(0).clip(0).frames[:15]).double() / 255
    errors = (frames[5:] - frames[4]).square().mean((1, 2, 3))
    assert values["copy_last_predict_psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-4)


def test_evaluation_of_masks_needs_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.ndimage", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    run = dataclasses.replace(PRESETS["iodine"]["debug"], eval_clips=1)
    values = loop.evaluate(families.build(run.model), open_source(run.data, "val"), run, torch.device("cpu"))
    assert "fg_ari" in values


def test_evaluation_on_two_workers_covers_every_clip_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("sim:balls-interaction", "val")
    torch.manual_seed(0)
    model = families.build(DEBUG.model)
    run = dataclasses.replace(DEBUG, eval_clips=3)
    alone = loop.evaluate(model, source, run, torch.device("cpu"))
    tables: list[torch.Tensor] = []
    monkeypatch.setattr(loop, "_sum_over_workers", lambda values, world: tables.append(values) or values)
    for rank in range(2):
        loop.evaluate(model, source, run, torch.device("cpu"), rank, 2)
    both = tables[0] + tables[1]
    assert set(both[:, 1].tolist()) == {3}  # clips of each metric
    assert float(both[1, 0] / both[1, 1]) == pytest.approx(alone["recon_psnr"])


def test_progress_is_one_line_per_interval_in_a_log() -> None:
    out = io.StringIO()
    progress = loop.Progress(100, file=out)
    line = {"kind": "train", "step": 10, "steps": 100, "loss": 1.5, "lr": 0.1, "steps_per_second": 2.0}
    progress.show(line)
    progress.show({"kind": "eval", "step": 10, "recon_psnr": 20.25})
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 10/100  loss 1.5  2.00 steps/s")
    assert first.endswith("left")
    assert second == "held out at step 10: recon_psnr 20.25"


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    progress = loop.Progress(100, file=out)
    progress.show({"kind": "train", "step": 50, "steps": 100, "loss": 1.5, "lr": 0.1, "steps_per_second": 2.0})
    assert "50/100" in out.getvalue()
    assert "\r" in out.getvalue()


def test_the_bare_command_line_trains_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    settings = ["--set", "optim.batch_size=2", "--set", "threads=1", "--set", "eval_every=0"]
    assert loop.main(["debug", "--out", out, "--steps", "1", *settings]) == 0
    assert capsys.readouterr().out.strip().endswith("step-00000001")
    assert loop.main(["debug", "--out", out, "--steps", "1", *settings]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert loop.main(["debug", "--out", out, "--set", "optim.lrr=1"]) == 1
    assert "has no field 'lrr'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_slots=x"], "model.num_slots=x: 'x' is not of type int"),
        (["model.num_slots=4.0"], "model.num_slots=4.0: '4.0' is not of type int"),
        (["model.refine=half"], "model.refine=half: 'half' is not of type Literal['full', 'strided']"),
        (["steps=true"], "steps=true: 'true' is not of type int"),
        (["optim.clip_norm=[1]"], "optim.clip_norm=[1]: '[1]' is not of type float | None"),
        (["threads"], "'threads' is not of the form NAME=VALUE"),
        (["threads=1", "threads=2"], "threads is given twice"),
        (["optm.lr=1"], "TrainRun has no field 'optm' (in 'optm.lr'); it has model, data, out"),
        (["seed.x=1"], "seed is a single value and has no field 'x' (in 'seed.x')"),
        (["optim=3"], "optim holds settings of its own; set them one by one: optim.lr, optim.betas"),
        (["model.num_slots=1"], "num_slots must be at least 2"),
    ],
)
def test_a_wrong_setting_of_the_bare_command_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    settings = [argument for word in words for argument in ("--set", word)]
    assert loop.main(["iodine/debug", "--out", str(tmp_path / "run"), *settings]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 3}, "do not divide optim.batch_size"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"optim.micro_batch_size": 3}, "must divide"),
        ({"optim.lr": 0.0}, "optim.lr must be positive"),
        ({"loader.window_shards": 0}, "loader.window_shards"),
    ],
)
def test_impossible_runs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_overrides(DEBUG, changes)


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, runs in PRESETS.items() for n in runs])
def test_every_preset_builds_and_is_described(family: str, name: str) -> None:
    run = PRESETS[family][name]
    with torch.device("meta"):
        families.build(run.model)
    assert family == families.family_of(run.model)
    assert ABOUT[family][name]
    assert checkpoint.config_from_json(TrainRun, json.loads(json.dumps(checkpoint.config_to_json(run)))) == run
