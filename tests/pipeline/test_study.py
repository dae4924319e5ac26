"""A sweep's study and searcher without Ray: what survives a restart, what ends how, and that the search finds."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipeline import space, study
from pipeline.presets import PRESETS
from pipeline.searcher import StudySearcher, StudyStopper
from pipeline.space import Objective
from pipeline.study import SweepStudy, TrialRecord

RUN = PRESETS["iodine"]["debug"]
SPACE = space.parse_space(
    ["model.likelihood_weight=log:0.1:100", "model.entropy_weight=uniform:0:1", "model.num_refinements=int:1:4"], RUN
)
PLAN = {
    "preset": "iodine/debug",
    "data": "sim:balls",
    "dataset_id": "d",
    "space": {name: d.text for name, d in SPACE.items()},
    "settings": {},
    "sampler": "tpe",
    "pruner": "none",
    "seed": 0,
    "seeds": 1,
}
MEMORY = ""
ONE, TWO = (Objective("fg_ari", "maximize"),), (Objective("fg_ari", "maximize"), Objective("step_seconds", "minimize"))


def opened(
    path: Path | str, *, resume: bool = False, wanted: int | None = 6, objectives: Any = ONE, out: str = "", **plan: Any
) -> SweepStudy:
    return SweepStudy.open(
        "sqlite:///:memory:" if path == MEMORY else f"sqlite:///{path}/study.db",
        "sweep",
        plan=PLAN | {"objectives": {o.name: o.direction for o in objectives}} | plan,
        space=SPACE,
        objectives=objectives,
        wanted=wanted,
        resume=resume,
        out=out,
    )


def test_trials_end_in_every_way_and_are_recorded(tmp_path):
    found = opened(tmp_path, seeds=3)
    numbers = [found.ask()[0] for _ in range(4)]
    assert numbers == [0, 1, 2, 3]
    found.report(0, 10, 0.25)
    assert found.complete(0, [{"fg_ari": 0.5}, {"fg_ari": 0.9}, {"fg_ari": 0.6}], 12.0)
    assert not found.complete(1, [{"fg_ari": 0.5}, {"fg_ari": math.nan}], 9.0)
    found.fail(2, "a loss\nwas not finite", 3.0)
    record = found.record()
    done, nan, failed, live = record.trials
    assert done._replace(settings={}) == TrialRecord(
        number=0, state="complete", settings={}, values={"fg_ari": 0.6},
        seed_values=({"fg_ari": 0.5}, {"fg_ari": 0.9}, {"fg_ari": 0.6}), curve=((10, 0.25),), seconds=12.0,
        folder="trials/0000", picture="", reason="", attempts=1,
    )  # fmt: skip
    assert list(done.settings) == list(SPACE)
    assert (nan.state, nan.reason, nan.values) == ("failed", "fg_ari of seed 1 is nan, not a number", {})
    assert (failed.state, failed.reason, failed.seconds) == ("failed", "a loss was not finite", 3.0)
    assert live.state == "running"
    assert record.best == done
    assert found.missing == 3  # of 6, a running one among them


def test_a_killed_driver_is_followed_by_one_that_takes_its_trials_over(tmp_path):
    first = opened(tmp_path)
    settings = dict(first.ask() for _ in range(3))
    first.complete(1, [{"fg_ari": 0.5}], 1.0)
    second = opened(tmp_path, resume=True)
    assert second.interrupted() == [0, 2]
    assert {n: second.take_over(n) for n in (0, 2)} == {n: settings[n] for n in (0, 2)}
    second.complete(0, [{"fg_ari": 0.1}], 1.0)
    second.complete(2, [{"fg_ari": 0.2}], 1.0)
    while second.missing:
        second.complete(second.ask()[0], [{"fg_ari": 0.3}], 1.0)
    record = second.record()
    assert [(trial.number, trial.state) for trial in record.trials] == [(n, "complete") for n in range(6)]
    assert [trial.attempts for trial in record.trials] == [2, 1, 2, 1, 1, 1]
    assert len({tuple(trial.settings.items()) for trial in record.trials}) == 6
    assert record.best is not None
    assert record.best.number == 1
    assert opened(tmp_path, resume=True).missing == 0
    assert opened(tmp_path, resume=True, wanted=8).missing == 2


def test_a_driver_killed_while_it_draws_settings_leaves_a_trial_that_goes_on(tmp_path, monkeypatch):
    drawn = study._suggest

    def die_at_the_second(trial, name, distribution):
        if name == "model.entropy_weight":
            raise KeyboardInterrupt
        return drawn(trial, name, distribution)

    first = opened(tmp_path)
    monkeypatch.setattr(study, "_suggest", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        first.ask()
    monkeypatch.setattr(study, "_suggest", drawn)
    begun = first.record().trials[0].settings
    assert list(begun) == ["model.likelihood_weight"]
    second = opened(tmp_path, resume=True)
    assert second.interrupted() == [0]
    settings = second.take_over(0)
    assert list(settings) == list(SPACE)
    assert settings["model.likelihood_weight"] == begun["model.likelihood_weight"]


def test_a_study_that_was_never_said_what_it_is_does_not_count(tmp_path):
    optuna.create_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/study.db")  # and here its driver was killed
    assert opened(tmp_path).missing == 6


def test_trials_may_grow_and_not_shrink_and_are_remembered(tmp_path):
    opened(tmp_path, wanted=8)
    assert opened(tmp_path, resume=True, wanted=None).missing == 8
    with pytest.raises(ValueError, match="of 8 trials, and --trials asks for 7"):
        opened(tmp_path, resume=True, wanted=7)
    assert opened(tmp_path, resume=True, wanted=9).missing == 9
    (tmp_path / "other").mkdir()
    assert opened(tmp_path / "other", wanted=None).missing == study.TRIALS


def test_a_study_belongs_to_one_folder_until_that_is_moved(tmp_path):
    (tmp_path / "a" / "trials").mkdir(parents=True)
    opened(tmp_path, out=str(tmp_path / "a"))
    with pytest.raises(ValueError, match=rf"is of the sweep in {tmp_path}/a; give --out"):
        opened(tmp_path, resume=True, out=str(tmp_path / "b"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert opened(tmp_path, resume=True, out=str(tmp_path / "b")).missing == 6


def test_moved_data_are_no_other_sweep_and_other_data_are(tmp_path):
    opened(tmp_path, data="/old", run={"data": "/old", "init": "/old/run"})
    opened(tmp_path, resume=True, data="/new", run={"data": "/new", "init": "/new/run"})
    with pytest.raises(ValueError, match="dataset_id was 'd' and is 'e'"):
        opened(tmp_path, resume=True, data="/new", dataset_id="e", run={"data": "/new", "init": "/new/run"})


def test_a_resumed_search_does_not_draw_its_random_start_again(tmp_path):
    first = opened(tmp_path, sampler="random")
    drawn = first.ask()[1]
    second = opened(tmp_path, resume=True, sampler="random")
    assert second.ask()[1] != drawn


def test_the_same_seed_searches_the_same_places(tmp_path):
    drawn = []
    for name in "ab":
        (tmp_path / name).mkdir()
        found = opened(tmp_path / name, seed=3)
        drawn.append([])
        for value in (0.1, 0.5, 0.3, 0.2, 0.6, 0.4):
            number, settings = found.ask()
            drawn[-1].append(settings)
            found.complete(number, [{"fg_ari": value}], 1.0)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("resume", "changed", "message"),
    [
        (False, {}, "holds a sweep already; add --resume"),
        (True, {"space": PLAN["space"] | {"model.entropy_weight": "uniform:0:2"}},
         "space model.entropy_weight was 'uniform:0:1' and is 'uniform:0:2'"),
        (True, {"seeds": 3, "sampler": "nsga2"}, "sampler was 'tpe' and is 'nsga2', seeds was 1 and is 3"),
    ],
)  # fmt: skip
def test_another_sweep_is_refused_with_what_differs(tmp_path, resume, changed, message):
    opened(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, resume=resume, **changed)


def test_a_setting_that_an_older_version_did_not_know_is_no_other_sweep(tmp_path):
    opened(tmp_path, run={"steps": 20})
    opened(tmp_path, resume=True, run={"steps": 20, "newer": 0})
    with pytest.raises(ValueError, match="run steps was 20 and is 30"):
        opened(tmp_path, resume=True, run={"steps": 30})


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match=r"no study 'sweep'.*to resume"):
        opened(tmp_path, resume=True)


@pytest.mark.parametrize("location", ["sqlite:////nowhere/at/all/study.db", "/nowhere/at/all/s.journal"])
def test_storage_that_cannot_be_opened(location):
    with pytest.raises(ValueError, match=r"nowhere.*cannot be opened"):
        study.open_storage(location)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("postgresql://me:hunter2@db.example:1/x", "postgresql://me:***@db.example:1/x"),
        ("postgresql://db.example/x?password=hunter2&user=me", "postgresql://db.example/x?password=%2A%2A%2A&user=me"),
        ("postgresql://me:hunter2@db.example:port/x", "postgresql://***"),
        ("sqlite:////data/study.db", "sqlite:////data/study.db"),
        ("/data/study.journal", "/data/study.journal"),
    ],
)
def test_a_password_is_not_shown(location, shown):
    assert study.shown(location) == shown
    if "hunter2" in location:
        with pytest.raises(ValueError, match="cannot be opened") as error:
            study.open_storage(location.replace("postgresql", "nosuchdb"))
        assert "hunter2" not in str(error.value)


def test_a_journal_file_holds_a_study_as_well(tmp_path):
    common: dict[str, Any] = {"plan": PLAN, "space": SPACE, "objectives": ONE, "wanted": 2}
    first = SweepStudy.open(f"{tmp_path}/s.journal", "sweep", resume=False, **common)
    first.ask()
    second = SweepStudy.open(f"{tmp_path}/s.journal", "sweep", resume=True, **common)
    second.take_over(0)
    second.complete(0, [{"fg_ari": 0.5}], 1.0)
    assert second.record().trials[0].values == {"fg_ari": 0.5}


def test_the_front_holds_what_nothing_surpasses(tmp_path):
    found = opened(tmp_path, objectives=TWO, sampler="nsga2")
    for quality, cost in ((0.5, 1.0), (0.9, 3.0), (0.4, 2.0), (0.9, 2.5), (0.2, 0.5)):
        found.complete(found.ask()[0], [{"fg_ari": quality, "step_seconds": cost}], 1.0)
    assert [trial.number for trial in found.record().front] == [3, 0, 4]
    # the same as Optuna's own
    loaded = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/study.db")
    assert {trial.number for trial in loaded.best_trials} == {3, 0, 4}


def test_halving_keeps_the_better_third_and_remembers_over_a_restart(tmp_path):
    plan = {"pruner": "asha", "min_steps": 10, "reduction": 3}
    found = opened(tmp_path, wanted=9, **plan)
    for _ in range(4):
        found.ask()
    assert [found.report(n, 5, v) for n, v in enumerate((0.1, 0.2, 0.3, 0.4))] == [False] * 4  # before the first rung
    assert not found.report(3, 10, 0.9)  # nothing to compare with
    assert found.report(0, 10, 0.1)
    found.prune(0, 3.0)
    again = opened(tmp_path, resume=True, wanted=9, **plan)
    for number in again.interrupted():
        again.take_over(number)
    assert again.report(1, 10, 0.5)  # the third at this rung, and not the best: known from the storage
    assert not again.report(2, 10, 0.95)
    assert not again.report(1, 30, 0.1, last=True)  # at its last step a trial is never pruned
    pruned = again.record().trials[0]
    assert (pruned.state, pruned.values, pruned.curve) == ("pruned", {}, ((5, 0.1), (10, 0.1)))


class FakeTune:
    """What Ray Tune does with a searcher and a stopper, one trial after the other."""

    def __init__(self, found: SweepStudy, tell: Any = lambda number, what: None) -> None:
        self.searcher = StudySearcher(found, "", tell)
        self.stopper = StudyStopper(self.searcher)

    def begin(self, trial_id: str) -> Any:
        return self.searcher.suggest(trial_id)

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        stop = self.stopper(trial_id, result)
        if stop or result.get("over"):
            self.searcher.on_trial_complete(trial_id, result)
        return stop


def over(value: float, **more: Any) -> dict[str, Any]:
    return {"over": True, "step": 0, "seconds": 1.0, "seed_values": f'[{{"fg_ari": {value}}}]', **more}


def test_searcher_gives_interrupted_trials_first_and_no_more_than_wanted(tmp_path):
    first = FakeTune(opened(tmp_path, wanted=3))
    assert [first.begin(i)["number"] for i in "ab"] == [0, 1]
    first.report("b", over(0.5))
    told: list[tuple[int, str]] = []
    second = FakeTune(opened(tmp_path, resume=True, wanted=3), lambda number, what: told.append((number, what)))
    assert [second.begin(i)["number"] for i in "cd"] == [0, 2]
    assert second.begin("e") == "FINISHED"
    second.report("c", over(0.1, failed="it cannot be"))
    second.searcher.on_trial_complete("d", error=True)  # Tune says so first, the callback then why
    second.searcher.died("d", "its process died 3 times")
    assert told == [(0, "failed: it cannot be"), (2, "failed: its process died 3 times")]
    assert second.searcher.halted is None
    assert [trial.state for trial in opened(tmp_path, resume=True, wanted=3).record().trials] == [
        "failed", "complete", "failed",
    ]  # fmt: skip


def test_a_full_disk_stops_the_sweep_and_leaves_its_trials_to_be_resumed(tmp_path):
    tune = FakeTune(opened(tmp_path))
    tune.begin("a")
    tune.begin("b")
    assert not tune.stopper.stop_all()
    tune.report("a", over(0.5, halt="No space left on device: /data/x"))
    assert tune.stopper.stop_all()
    tune.searcher.on_trial_complete("b", {"step": 1, "seconds": 1.0, "value": 0.5})  # as Tune stops the others
    assert tune.begin("c") == "FINISHED"
    assert "No space left on device: /data/x" in str(tune.searcher.halted)
    assert opened(tmp_path, resume=True).interrupted() == [0, 1]


def test_a_sweep_whose_first_trials_all_fail_stops(tmp_path):
    tune = FakeTune(opened(tmp_path, wanted=20))
    begun = 0
    while not tune.stopper.stop_all():
        tune.begin(str(begun))
        tune.report(str(begun), over(0.5, failed="the data are gone"))
        begun += 1
    assert begun == 5
    assert "the first 5 trials failed, at last: the data are gone" in str(tune.searcher.halted)


def test_every_attempt_of_a_trial_is_counted(tmp_path):
    tune = FakeTune(opened(tmp_path))
    tune.begin("a")
    assert tune.searcher.began_again("a") == 0
    tune.report("a", over(0.5))
    assert opened(tmp_path, resume=True).record().trials[0].attempts == 2


def test_a_trial_that_tune_stops_for_no_reason_of_ours_is_not_over(tmp_path):
    tune = FakeTune(opened(tmp_path))
    tune.begin("a")
    tune.report("a", {"step": 1, "last": False, "seconds": 1.0, "value": 0.5})
    tune.searcher.on_trial_complete("a", {"step": 1, "last": False, "seconds": 1.0, "value": 0.5})
    assert opened(tmp_path, resume=True).interrupted() == [0]


def planted(settings: dict[str, Any]) -> float:
    """A quality whose best is 1, at beta = 3, gamma = 0.2 and R = 3."""
    beta = math.log10(settings["model.likelihood_weight"] / 3)
    return 1 - beta**2 - 4 * (settings["model.entropy_weight"] - 0.2) ** 2 - 0.05 * abs(
        settings["model.num_refinements"] - 3
    )  # fmt: skip


def found_by(sampler: str, seed: int, trials: int = 30) -> float:
    found = opened(MEMORY, wanted=trials, sampler=sampler, seed=seed)
    tune = FakeTune(found)
    while (config := tune.begin("t")) != "FINISHED":
        tune.report("t", over(planted(json.loads(config["settings"]))))
    record = found.record(importance=False)
    assert record.best is not None
    assert len(record.trials) == trials
    return record.best.values["fg_ari"]


def test_a_planted_optimum_is_found_better_than_at_random():
    regrets = {sampler: [1 - found_by(sampler, seed) for seed in range(5)] for sampler in ("tpe", "random")}
    assert statistics.median(regrets["tpe"]) < 0.5 * statistics.median(regrets["random"])
    assert sum(a < b for a, b in zip(regrets["tpe"], regrets["random"], strict=True)) >= 4
    assert max(regrets["tpe"]) < 0.1


@pytest.mark.parametrize("objective", [Objective("fg_ari", "maximize"), Objective("loss", "minimize")])
def test_importance_finds_what_the_best_trials_have_in_common(objective):
    """Good trials have beta near 0.1, and whether trials are bad is decided by gamma: taken the wrong way round, that
    would count."""
    found = opened(MEMORY, wanted=40, sampler="random", objectives=(objective,))
    assert found.record().importance == {}
    for _ in range(40):
        number, settings = found.ask()
        good = settings["model.likelihood_weight"] < 0.3
        quality = 1.0 if good else -settings["model.entropy_weight"]
        found.complete(number, [{objective.name: quality if objective.direction == "maximize" else -quality}], 1.0)
    shares = found.record().importance[objective.name]
    assert set(shares) == set(SPACE)
    assert shares["model.likelihood_weight"] > 0.6


def test_other_code_is_refused_by_name_unless_forced(tmp_path: Path) -> None:
    study, code = opened(tmp_path), {"objdyn/losses.py": "a", "pipeline/loop.py": "b"}
    study.require_code(code, force=False)
    study.require_code(code, force=False)
    changed = {**code, "objdyn/losses.py": "c"}
    with pytest.raises(ValueError, match=r"begun with other code \(objdyn/losses.py\); bring it back, or add --force"):
        study.require_code(changed, force=False)
    assert not study.forced
    study.require_code(changed, force=True)
    assert study.forced
    again = opened(tmp_path, resume=True)
    again.require_code(changed, force=False)
    assert again.forced  # of trials that were interrupted before it
