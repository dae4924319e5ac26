"""Sweeps through Ray; a trial alone; what is refused before any starts. Those that are killed: tests/chaos."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint, claim, cli, loop, store, tune
from pipeline.config import SweepRun, with_overrides
from pipeline.presets import PRESETS
from pipeline.space import Objective
from pipeline.study import SweepStudy, open_storage

PRESET = PRESETS["iodine"]["debug"]
SEARCH = (
    "model.likelihood_weight=log:1:100",
    "model.entropy_weight=choice:0,0.01,0.1",
    "model.num_refinements=int:1:3",
)


def last_psnr(out: Path, number: int) -> float:
    lines = loop.read_metrics(str(out / "trials" / f"{number:04d}" / "seed-0"))
    return [line["recon_psnr"] for line in lines if line["kind"] == "eval"][-1]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    import ray.tune

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", told.append)
    return told


def job(out: Path, seeds: int = 1, **settings: Any) -> tune.Job:
    run = with_overrides(PRESET, {"device": "cpu", "threads": 1, **settings})
    objectives = (Objective("recon_psnr", "maximize"), Objective("step_seconds", "minimize"))
    return tune.Job(run, str(out), objectives, seeds, separate=False)


def test_a_trial_trains_every_seed_and_reports_the_first_while_it_trains(tmp_path, reports):
    config = {"number": 7, "settings": json.dumps({"model.num_refinements": 1})}
    tune.train_trial(config, job(tmp_path, seeds=2, steps=4, eval_every=2, log_every=2))
    *curve, last = reports
    assert [report["step"] for report in curve] == [2, 4]
    values = json.loads(last["seed_values"])
    assert curve[-1]["value"] == values[0]["recon_psnr"]
    assert last["over"]
    assert last["picture"] == "trials/0007/clip.png"
    assert (tmp_path / last["picture"]).read_bytes().startswith(b"\x89PNG")
    runs = [store.read_json(str(tmp_path / f"trials/0007/seed-{seed}/config.json"))["run"] for seed in (0, 1)]
    assert [run["seed"] for run in runs] == [PRESET.seed, PRESET.seed + 1]
    assert values[0]["recon_psnr"] != values[1]["recon_psnr"]
    seconds = 0.0
    for seed in (0, 1):
        lines = [
            line for line in loop.read_metrics(str(tmp_path / f"trials/0007/seed-{seed}")) if line["kind"] == "train"
        ]
        rates = sorted(line["steps_per_second"] for line in lines)
        assert len(rates) == 2
        assert values[seed]["step_seconds"] == pytest.approx((1 / rates[0] + 1 / rates[1]) / 2)
        seconds += 2 / rates[0] + 2 / rates[1]
    assert last["seconds"] == pytest.approx(seconds)


def test_a_finished_trial_is_not_trained_again(tmp_path, reports):
    config = {"number": 0, "settings": "{}"}
    tune.train_trial(config, job(tmp_path, steps=2))
    lines = (tmp_path / "trials/0000/seed-0/metrics.jsonl").read_bytes()
    tune.train_trial(config, job(tmp_path, steps=2))
    assert (tmp_path / "trials/0000/seed-0/metrics.jsonl").read_bytes() == lines
    assert reports[-1]["seed_values"] == reports[0 if reports[0].get("over") else 1]["seed_values"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"optim.lr": 1e30}, "not finite 5 steps in a row"), ({"model.num_slots": 0}, "num_slots")],
)
def test_a_trial_that_cannot_work_says_why(tmp_path, reports, settings, reason):
    tune.train_trial({"number": 0, "settings": json.dumps(settings)}, job(tmp_path))
    assert reason in reports[-1]["failed"]


def test_a_sweep_that_is_forced_begins_trials_and_goes_on_with_others(tmp_path, reports):
    forced = job(tmp_path, steps=4, checkpoint_every=2)
    forced = forced._replace(run=dataclasses.replace(forced.run, force=True))
    for number in (0, 1, 0):
        tune.train_trial({"number": number, "settings": "{}"}, forced)
        assert "failed" not in reports[-1]
    store.remove_tree(str(tmp_path / "trials/0001/seed-0/checkpoints"))
    store.remove(str(tmp_path / "trials/0001/seed-0/last.json"))
    other = forced._replace(run=dataclasses.replace(forced.run, optim=dataclasses.replace(forced.run.optim, lr=1e-5)))
    tune.train_trial({"number": 1, "settings": "{}"}, other)
    assert "failed" not in reports[-1]


def test_a_trial_on_a_full_disk_halts_the_sweep(tmp_path, reports, monkeypatch):
    from pipeline import failpoints

    failpoints.arm("write:trials/0000/seed-0/checkpoints=full")
    try:
        tune.train_trial({"number": 0, "settings": "{}"}, job(tmp_path, steps=2))
    finally:
        failpoints.arm("")
    assert "No space left on device" in reports[-1]["halt"]
    assert "trials/0000/seed-0/checkpoints" in reports[-1]["halt"]


def sweep_run(folder: Path | str, **fields: Any) -> SweepRun:
    return SweepRun(**({"preset": "iodine/debug", "out": str(folder), "search": SEARCH} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "iodine/smal"}, "no preset 'iodine/smal'; choose .*iodine/small"),
        ({"preset": "iodin"}, "no preset 'iodin'; choose .*iodine/debug"),
        ({"preset": "ddlp/obj3d128"}, "no data of its own; give --data"),
        ({"search": ()}, "search space is empty"),
        ({"set": ("data=x",)}, "give --data itself"),
        ({"set": ("model.entropy_weight=1",)}, "in --search and in --set"),
        ({"set": ("model.entropyweight=1",)}, "no field 'entropyweight'"),
        ({"set": ("init=/nowhere/at/all",)}, "nowhere"),
        (
            {
                "objective": ("copy_last_predict_psnr:max",),
                "preset": "ddlp/debug",
                "search": ("optim.lr=log:1e-4:1e-3",),
            },
            "does not report it; it reports fg_ari, loss, predict_psnr, recon_psnr on",
        ),
        ({"pruner": "asha", "min_steps": 21}, "more than the 20 steps"),
        ({"objective": ("med10:min",)}, "does not report it; it reports fg_ari, loss, recon_psnr.*step_seconds"),
        ({"objective": ("predict_psnr",)}, "does not report it"),  # IODINE predicts nothing
        ({"objective": ("fg_ari", "fg_ari:min")}, "fg_ari twice"),
        ({"objective": ("step_seconds",), "pruner": "asha"}, "none; leave out --pruner"),
        ({"set": ("eval_every=0",)}, "evaluates nothing"),
        ({"out": "", "resume": True}, "--resume needs --out"),
        ({"out": "s3://bucket/sweep"}, "give --study-storage"),
        ({"study_storage": "study.sql"}, "must end in .db"),
        ({"resume": True}, r"holds no sweep .no study.db."),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        tune.sweep(sweep_run(tmp_path / "s", **fields))


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty .it holds precious.txt. and holds no sweep"):
        tune.sweep(sweep_run(tmp_path))


def test_another_study_in_the_folder_of_a_sweep_is_refused(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "study.db").touch()
    for fields in ({"study": "second"}, {"study_storage": str(tmp_path / "other.db")}):
        with pytest.raises(ValueError, match="holds another sweep; choose another --out"):
            tune.sweep(sweep_run(tmp_path, **fields))


@pytest.mark.parametrize(
    "storage",
    ["", "{}/elsewhere.db", "{}/elsewhere.journal", "{}/s/own.journal", "sqlite:///{}/s/own.db?timeout=60"],
)
def test_one_command_starts_a_sweep_and_goes_on_with_it(tmp_path, monkeypatch, storage):
    class OpenedError(Exception):
        pass

    real = SweepStudy.open

    def stop_after(*args, **named):
        real(*args, **named)
        raise OpenedError(named["resume"])

    monkeypatch.setattr(SweepStudy, "open", stop_after)
    (tmp_path / "s").mkdir()
    place = {"study_storage": storage.format(tmp_path)}
    open_storage(tune._places(sweep_run(tmp_path / "s", **place))[1])  # of a start that was killed before its study was
    for resumed in (False, True, True):
        with pytest.raises(OpenedError, match=str(resumed)):
            tune.sweep(sweep_run(tmp_path / "s", resume_if_exists=True, **place))
    with pytest.raises(ValueError, match=r"is of another sweep: .*preset was"):
        tune.sweep(sweep_run(tmp_path / "s", resume_if_exists=True, preset="iodine/small", **place))
    with pytest.raises(ValueError, match="--resume-if-exists needs --out"):
        tune.sweep(sweep_run("", resume_if_exists=True))


def test_what_is_set_is_not_searched_as_ready_made():
    _, _, found, _ = tune._prepare(SweepRun("iodine/debug", ready_made=True, set=("model.num_slots=3",)))
    assert "model.num_slots" not in found
    assert "model.kl_weight" in found


def test_the_example_of_the_readme_is_one_that_works(repository):
    text = (repository / "README.md").read_text().partition("### Sweeps")[2]
    line = text.partition("jobs/sweep.py ")[2].partition("\npython")[0].replace("\\\n", " ")
    line = line.replace("~/data/road", "sim:balls-interaction").replace("~/sweeps", "/nowhere")
    run = cli.parse(SweepRun, line.split(), description="", positional=True)
    base, _, found, objectives = tune._prepare(run)
    assert base.steps == 1200
    assert len(found) == 3
    assert [objective.name for objective in objectives] == ["recon_psnr", "step_seconds"]


def test_a_trial_waits_for_a_process_that_still_trains_it(tmp_path, monkeypatch):
    folder = str(tmp_path / "trials/0000")
    with tune._only_trainer(folder, 7):
        monkeypatch.setattr(claim, "PATIENCE", 0.3)
        with pytest.raises(ChildProcessError, match="in use by trial 7 of a sweep"), tune._only_trainer(folder, 7):
            pass
    with tune._only_trainer(folder, 7):
        assert os.listdir(folder) == [".claim-00000001"]


@pytest.mark.parametrize("error", [claim.HeldError, claim.LostError])
def test_a_trial_whose_folder_another_has_is_tried_again_and_has_not_failed(tmp_path, reports, monkeypatch, error):
    def train(*_: Any) -> None:
        raise error("the folder is in use by train, process 7")

    monkeypatch.setattr(tune, "_train", train)
    with pytest.raises(ChildProcessError, match="in use by train, process 7"):
        tune.train_trial({"number": 0, "settings": "{}"}, job(tmp_path))
    assert reports == []


def test_a_picture_that_cannot_be_drawn_costs_no_trial(tmp_path, reports, monkeypatch):
    from pipeline import evaluate

    def fail(*_: Any) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr(evaluate, "draw_first_clip", fail)
    tune.train_trial({"number": 0, "settings": "{}"}, job(tmp_path, steps=2))
    assert reports[-1]["picture"] == ""
    assert "failed" not in reports[-1]


@pytest.mark.slow
def test_trials_of_two_workers_train_by_ray_train(tmp_path, ray_local):
    fixed = ("steps=4", "eval_every=2", "log_every=2")
    run = sweep_run(tmp_path / "s", trials=1, workers=2, objective=("recon_psnr", "step_seconds"), set=fixed)
    assert "Pareto front: trial 0" in tune.sweep(run)
    (trial,) = store.read_json(str(tmp_path / "s/sweep.json"))["trials"]
    assert trial["state"] == "complete"
    path = str(tmp_path / "s/trials/0000/seed-0")
    assert store.read_json(os.path.join(path, "config.json"))["run"]["workers"] == 2
    assert checkpoint.last_step(path) == 4
    assert trial["values"]["recon_psnr"] == last_psnr(tmp_path / "s", 0)
    assert trial["values"]["step_seconds"] > 0


def test_halving_stops_trials_that_ray_trains(tmp_path, ray_local):
    fixed = ("steps=8", "eval_every=2", "log_every=2")
    run = sweep_run(
        tmp_path / "s", trials=4, search=("optim.lr=choice:0.00000001,0.003",), set=fixed, objective=("recon_psnr",),
        pruner="asha", reduction=2, sampler="random", seed=1,
    )  # fmt: skip
    told = tune.sweep(run)
    assert "3 complete, 1 pruned of 4 trials" in told
    trials = store.read_json(str(tmp_path / "s/sweep.json"))["trials"]
    assert [trial["settings"]["optim.lr"] for trial in trials] == [0.003, 0.003, 1e-8, 0.003]
    assert [trial["state"] for trial in trials] == ["complete", "complete", "pruned", "complete"]
    assert [[step for step, _ in trial["curve"]] for trial in trials] == [[2, 4, 6, 8], [2, 4, 6, 8], [2], [2, 4, 6, 8]]
    assert trials[2]["values"] == {}


def test_a_second_driver_is_refused_by_name(tmp_path):
    told = f"{tmp_path} is in use by sweep, process {os.getpid()} on"
    with claim.hold(str(tmp_path), "sweep"), pytest.raises(ValueError, match=told):
        tune.sweep(sweep_run(tmp_path))
