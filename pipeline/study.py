"""A sweep's trials in an Optuna storage, which is the only record of them; everything else is made from it.

``SweepStudy`` begins and ends trials; ``SweepStudy.record`` is what a report needs to know. Needs no ray.

A trial that was being trained when its driver died stays RUNNING in the storage. Whoever opens the study next takes it
over under the same number, with the same settings and in the same folder, so nothing is counted twice and no list of
trials shows what was only an interruption; ``attempts`` tells it.
"""

import contextlib
import math
import os
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import store
from pipeline.space import Distribution, Objective, Space

if TYPE_CHECKING:
    import optuna

TRIALS = 20
"""Trials of a sweep that does not say how many."""
LEAST_FOR_IMPORTANCE = 8
"""Complete trials below which no importance is told."""
PLAN, WANTED, OUT, CODE, FORCED = "plan", "wanted", "out", "code", "forced"
"""Attributes of the study: what must not change on a resume, how many trials are wanted, the sweep's folder, and
digests of the code that trains."""
PATHS = (
    "data", "run data", "run out", "run init", "settings init", "run perceptual_weights", "settings perceptual_weights",
)  # fmt: skip
"""What of a plan may change: the dataset is compared by its id, and runs compare the rest by checksums."""


class TrialRecord(NamedTuple):
    """One trial: a configuration, trained with one seed or several."""

    number: int
    """From 0, in the order in which they were begun."""
    state: str
    """``complete``, ``pruned``, ``failed`` or ``running``."""
    settings: dict[str, Any]
    """What the search chose, by dotted field of the run."""
    values: dict[str, float]
    """Objectives by name, the median over the seeds; empty unless complete."""
    seed_values: tuple[dict[str, float], ...]
    """Objectives of each seed that was trained to its end."""
    curve: tuple[tuple[int, float], ...]
    """(optimiser steps, objective) of the held-out evaluations; empty where there are several objectives."""
    seconds: float | None
    """What training took, all seeds together; None of a trial that is not over."""
    folder: str
    """Relative to the sweep's folder; it holds a run folder for each seed, ``seed-0``, ``seed-1`` and so on."""
    picture: str
    """PNG relative to the sweep's folder that shows a held-out clip, with what the first seed's model makes of it;
    empty if there is none."""
    reason: str
    """Why it failed; empty otherwise."""
    attempts: int
    """How often it was begun: more than 1 if its process or the sweep died meanwhile."""


class SweepRecord(NamedTuple):
    """A sweep as its storage knows it."""

    preset: str
    """``family/preset``."""
    data: str
    dataset_id: str | None
    objectives: tuple[Objective, ...]
    space: dict[str, str]
    """Dotted field -> distribution as written on the command line: ``log:0.01:1``."""
    settings: dict[str, Any]
    """Settings that all trials share and that differ from the preset, by dotted field."""
    sampler: str
    """``tpe``, ``nsga2`` or ``random``."""
    pruner: str
    """``none`` or ``asha``."""
    seed: int
    """Of the search."""
    seeds: int
    """Trainings of each configuration."""
    wanted: int
    """Trials asked for."""
    trials: tuple[TrialRecord, ...]
    """By number."""
    importance: dict[str, dict[str, float]]
    """Objective -> field -> its share in what tells the best quarter of the trials from all of them, by PED-ANOVA;
    empty with fewer than eight complete trials."""

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """Complete trials that no other surpasses in every objective, best first by the first objective; with one
        objective the best trial alone, or trials that are equally good."""
        done = [trial for trial in self.trials if trial.state == "complete"]
        points = {trial.number: self._costs(trial) for trial in done}
        front = [
            trial for trial in done if not any(_surpasses(points[other.number], points[trial.number]) for other in done)
        ]
        return tuple(sorted(front, key=lambda trial: (points[trial.number], trial.number)))

    @property
    def best(self) -> TrialRecord | None:
        """The first of the front."""
        return next(iter(self.front), None)

    def _costs(self, trial: TrialRecord) -> tuple[float, ...]:
        return tuple(
            -trial.values[objective.name] if objective.direction == "maximize" else trial.values[objective.name]
            for objective in self.objectives
        )


def _surpasses(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


class SweepStudy:
    """The study of one sweep, opened by its driver; there must be one driver at a time."""

    def __init__(self, study: "optuna.Study", space: Space, objectives: Sequence[Objective]) -> None:
        self._study, self._space, self._objectives = study, space, objectives
        self._live: dict[int, optuna.Trial] = {}

    @staticmethod
    def is_in(location: str, name: str) -> bool:
        """Tell whether a storage holds a study of that name; one whose creation was cut off is removed first.

        Raises:
            ValueError: the storage cannot be opened.
        """
        file = storage_file(location)
        if file is not None and not os.path.exists(file):  # to open it would make it
            return False
        storage = open_storage(location)
        _remove_unborn(storage, name)
        return name in _optuna().get_all_study_names(storage)

    @classmethod
    def open(
        cls,
        location: str,
        name: str,
        *,
        plan: Mapping[str, Any],
        space: Space,
        objectives: Sequence[Objective],
        wanted: int | None,
        resume: bool,
        out: str = "",
    ) -> "SweepStudy":
        """Create the study, or open it to go on.

        Args:
            location: ``sqlite:///FILE``, any other Optuna URL, or a file that ends in ``.journal``.
            name: of the study in its storage.
            plan: what the sweep is; it must be the same when the sweep is resumed. JSON.
            space: search space.
            objectives: one or several.
            wanted: trials of the whole sweep; it may grow. None is as many as before, or ``TRIALS``.
            resume: whether the study is there.
            out: the sweep's folder.

        Raises:
            ValueError: the storage cannot be opened; it has no such study, or one although a new one was asked for; or
                that is of another plan (the message lists what differs), or of another folder, or of more trials.
        """
        optuna = _optuna()
        storage = open_storage(location)
        _remove_unborn(storage, name)
        names = optuna.get_all_study_names(storage)
        where = f"study {name!r} in {shown(location)}"
        if resume and name not in names:
            raise ValueError(f"there is no {where} to resume; leave out --resume")
        if not resume and name in names:
            raise ValueError(f"{where} holds a sweep already; add --resume to go on with it, or choose another --out")
        directions = [objective.direction for objective in objectives]
        if resume:
            study = optuna.load_study(study_name=name, storage=storage, pruner=_pruner(plan))
            if difference := _difference(study.user_attrs.get(PLAN, {}), plan):
                raise ValueError(f"{where} is of another sweep: {difference}; repeat its settings, or choose another "
                                 "--out")  # fmt: skip
        else:
            study = optuna.create_study(
                study_name=name, storage=storage, directions=directions, pruner=_pruner(plan),
                sampler=_sampler(plan, space, wanted or TRIALS),
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # experimental since Optuna 3.2
                study.set_metric_names([objective.name for objective in objectives])
            study.set_user_attr(WANTED, wanted or TRIALS)
            study.set_user_attr(OUT, out)
            study.set_user_attr(PLAN, dict(plan))  # last: without it the study does not count
            return cls(study, space, objectives)
        before = study.user_attrs.get(OUT, out)
        if before != out and store.exists(store.join(before, "trials")):
            raise ValueError(f"{where} is of the sweep in {before}; give --out {before}, or move that folder first")
        if wanted is not None and wanted < study.user_attrs[WANTED]:
            raise ValueError(f"{where} is of {study.user_attrs[WANTED]} trials, and --trials asks for {wanted}; give as"
                             " many or more, or leave it out")  # fmt: skip
        study.set_user_attr(OUT, out)
        study.set_user_attr(WANTED, wanted or study.user_attrs[WANTED])
        study.sampler = _sampler(plan, space, study.user_attrs[WANTED])
        study.sampler.reseed_rng()  # else a resumed search would draw its random start again
        return cls(study, space, objectives)

    def require_code(self, digests: Mapping[str, str], force: bool) -> None:
        """Refuse to go on with other code than the trials so far had: each would refuse it, and count as failed.

        Raises:
            ValueError: without ``force``, naming the files that differ.
        """
        before = self._study.user_attrs.get(CODE, digests)
        if (files := sorted(name for name in before | digests if before.get(name) != digests.get(name))) and not force:
            raise ValueError(
                f"the sweep was begun with other code ({', '.join(files)}); bring it back, or add --force to go on "
                "with this one"
            )
        if files:
            self._study.set_user_attr(FORCED, True)
        self._study.set_user_attr(CODE, dict(digests))

    @property
    def forced(self) -> bool:
        """Whether the code ever changed by force: trials that were interrupted before have the earlier one."""
        return bool(self._study.user_attrs.get(FORCED, False))

    @property
    def missing(self) -> int:
        """Trials that are still to be begun or to be ended."""
        from optuna.trial import TrialState

        over = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
        return max(0, self._study.user_attrs[WANTED] - len(over))

    def interrupted(self) -> list[int]:
        """Numbers of trials that an earlier driver began and did not see end."""
        from optuna.trial import TrialState

        return [trial.number for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]

    def take_over(self, number: int) -> dict[str, Any]:
        """Go on with an interrupted trial; return its settings. Those that its driver had not drawn yet are drawn."""
        optuna = _optuna()
        frozen = self._study.get_trials(deepcopy=False)[number]
        return self._begin(optuna.Trial(self._study, frozen._trial_id))

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Begin a trial; return its number and settings."""
        trial = self._study.ask()
        return trial.number, self._begin(trial)

    def _begin(self, trial: "optuna.Trial") -> dict[str, Any]:
        self._live[trial.number] = trial
        self.count_attempt(trial.number)
        trial.set_user_attr("folder", folder_of(trial.number))
        return {name: _suggest(trial, name, distribution) for name, distribution in self._space.items()}

    def count_attempt(self, number: int) -> None:
        """Note that a trial is begun, or begun again after its process died."""
        trial = self._live[number]
        trial.set_user_attr("attempts", trial.user_attrs.get("attempts", 0) + 1)

    def report(self, number: int, step: int, value: float, *, last: bool = False) -> bool:
        """Record a held-out value of the objective after some optimiser steps; return whether to prune the trial.

        What is reported a second time, by a trial that goes on from its checkpoint, replaces the first. A trial at its
        ``last`` step is not pruned: nothing would be saved.
        """
        if len(self._objectives) > 1 or not math.isfinite(value):
            return False
        trial = self._live[number]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a step that is reported again
            trial.report(value, step)
        return not last and trial.should_prune()

    def complete(self, number: int, seed_values: Sequence[Mapping[str, float]], seconds: float) -> bool:
        """End a trial with the objectives of each seed; their medians are its values.

        Returns:
            Whether it is complete: a value that is not finite makes it a failed one.
        """
        names = [objective.name for objective in self._objectives]
        for seed, values in enumerate(seed_values):
            for name in names:
                if name not in values or not math.isfinite(values[name]):
                    self.fail(number, f"{name} of seed {seed} is {values.get(name, 'missing')}, not a number", seconds)
                    return False
        trial = self._live[number]
        trial.set_user_attr("seed_values", [dict(values) for values in seed_values])
        trial.set_user_attr("seconds", seconds)
        self._tell(number, [statistics.median(values[name] for values in seed_values) for name in names])
        return True

    def prune(self, number: int, seconds: float) -> None:
        """End a trial that the pruner stopped."""
        from optuna.trial import TrialState

        self._live[number].set_user_attr("seconds", seconds)
        self._tell(number, None, TrialState.PRUNED)

    def fail(self, number: int, reason: str, seconds: float | None = None) -> None:
        """End a trial that cannot be trained to its end."""
        from optuna.trial import TrialState

        self._live[number].set_user_attr("reason", " ".join(reason.split()))
        self._live[number].set_user_attr("seconds", seconds)
        self._tell(number, None, TrialState.FAIL)

    def _tell(self, number: int, values: Any, state: Any = None) -> None:
        self._study.tell(self._live.pop(number), values, state=state)

    def attach_picture(self, number: int, out: str, picture: str) -> None:
        """Show a PNG of the sweep's folder beside a live trial in optuna-dashboard (``--artifact-dir OUT/artifacts``).

        On object storage the dashboard finds no artifacts of ours; the picture stays in the trial's folder.
        """
        trial = self._live[number]
        trial.set_user_attr("picture", picture)
        if store.is_url(out):
            return
        import optuna.artifacts

        folder = store.join(out, "artifacts")
        os.makedirs(folder, exist_ok=True)
        optuna.artifacts.upload_artifact(
            artifact_store=optuna.artifacts.FileSystemArtifactStore(base_path=folder),
            file_path=store.join(out, picture),
            study_or_trial=trial,
        )

    def record(self, *, importance: bool = True) -> SweepRecord:
        """Everything that the storage knows of the sweep; how much each setting matters only if asked for, since that
        is computed from all trials."""
        plan = self._study.user_attrs[PLAN]
        return SweepRecord(
            preset=plan["preset"],
            data=plan["data"],
            dataset_id=plan["dataset_id"],
            objectives=tuple(self._objectives),
            space={name: distribution.text for name, distribution in self._space.items()},
            settings=plan["settings"],
            sampler=plan["sampler"],
            pruner=plan["pruner"],
            seed=plan["seed"],
            seeds=plan["seeds"],
            wanted=self._study.user_attrs[WANTED],
            trials=tuple(self._trial_record(trial) for trial in self._study.get_trials(deepcopy=False)),
            importance=self._importance() if importance else {},
        )

    def _trial_record(self, trial: "optuna.trial.FrozenTrial") -> TrialRecord:
        attrs = trial.user_attrs
        names = [objective.name for objective in self._objectives]
        return TrialRecord(
            number=trial.number,
            state={"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "running"),
            settings={name: trial.params[name] for name in self._space if name in trial.params},
            # Optuna gives a pruned trial the last value that it reported, which compares with no final one
            values=dict(zip(names, trial.values, strict=True)) if trial.state.name == "COMPLETE" else {},
            seed_values=tuple(attrs.get("seed_values", ())),
            curve=tuple(sorted(trial.intermediate_values.items())),
            seconds=attrs.get("seconds"),
            folder=folder_of(trial.number),  # not what the storage says: whoever writes to it may write anything
            picture=picture_of(trial.number) if attrs.get("picture") else "",
            reason=attrs.get("reason", ""),
            attempts=attrs.get("attempts", 0),
        )

    def _importance(self) -> dict[str, dict[str, float]]:
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
        from optuna.trial import TrialState

        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) < LEAST_FOR_IMPORTANCE:
            return {}
        found: dict[str, dict[str, float]] = {}
        for place, objective in enumerate(self._objectives):
            values = [trial.values[place] for trial in done]
            if len(set(values)) < 2:
                continue

            def target(trial: "optuna.trial.FrozenTrial", place: int = place) -> float:
                return trial.values[place]

            minimised = objective.direction == "minimize"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)  # a sweep here has dozens of trials
                shares = get_param_importances(
                    self._study, evaluator=evaluator, target=target if minimised else lambda t, f=target: -f(t)
                )
            found[objective.name] = {name: float(share) for name, share in shares.items() if math.isfinite(share)}
        return found


def folder_of(number: int) -> str:
    """Folder of a trial, relative to the sweep's."""
    return f"trials/{number:04d}"


def picture_of(number: int) -> str:
    """Picture of a trial, relative to the sweep's folder."""
    return f"{folder_of(number)}/clip.png"


@contextlib.contextmanager
def reading(location: str) -> Iterator[None]:
    """Say which storage it is that holds what no sweep has written.

    Raises:
        ValueError: what is read inside is not there, or of another kind.
    """
    optuna = _optuna()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (LookupError, TypeError, AttributeError, RecursionError, AssertionError, SQLAlchemyError,
            optuna.exceptions.OptunaError) as error:  # fmt: skip
        reason = " ".join(str(error).replace(location, shown(location)).split()).partition(" (Background")[0]
        raise ValueError(
            f"{shown(location)} holds what no sweep has written ({type(error).__name__}: {reason}); restore it, or "
            "begin another sweep in another --out"
        ) from None


def open_storage(location: str) -> "optuna.storages.BaseStorage":
    """Open an Optuna storage.

    Raises:
        ValueError: it cannot be opened; the message hides a password.
    """
    optuna = _optuna()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if location.endswith(".journal"):
            return JournalStorage(JournalFileBackend(location))
        wait = {"connect_args": {"timeout": 60}} if location.startswith("sqlite:") else {}  # for the dashboard's reads
        return RDBStorage(location, engine_kwargs=wait)
    except (OSError, SQLAlchemyError, ImportError, ValueError, optuna.exceptions.OptunaError) as error:
        reason = "it is no URL of a database" if shown(location).endswith("://***") else str(error)
        reason = " ".join(reason.replace(location, shown(location)).split()).partition(" (Background")[0]
        raise ValueError(
            f"--study-storage {shown(location)} cannot be opened ({reason}); give a file that ends in .db or .journal "
            "in a folder that is there, or the URL of a database that Optuna knows, such as postgresql://..."
        ) from None


def storage_file(location: str) -> str | None:
    """The file of a storage, or None if a server or memory has it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in location:
        return location
    try:
        url = make_url(location)
    except ArgumentError:  # open_storage says so
        return None
    name = url.database or ":memory:"
    return None if not location.startswith("sqlite") or name.startswith((":memory:", "file:")) else name


def shown(location: str) -> str:
    """A storage's location without its password, wherever in the URL that stands."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in location or location.startswith("sqlite:"):
        return location
    try:
        url = make_url(location)
        secret = [name for name in url.query if re.search("pass|pwd|secret|token|key", name, re.IGNORECASE)]
        return url.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # it is no URL, so it cannot be told what in it is secret
        return f"{location.partition('://')[0]}://***"


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: "optuna.Trial", name: str, distribution: Distribution) -> Any:
    """The value of a setting in a trial: drawn, or what was drawn of it before."""
    if distribution.kind == "choice":
        return trial.suggest_categorical(name, distribution.choices)
    low, high = distribution.low, distribution.high
    if distribution.kind in ("int", "logint"):
        return trial.suggest_int(name, int(low), int(high), log=distribution.kind == "logint")
    return trial.suggest_float(name, low, high, log=distribution.kind == "log")


def _sampler(plan: Mapping[str, Any], space: Space, wanted: int) -> "optuna.samplers.BaseSampler":
    """The sampler of a plan. Small sweeps get a random start and a population of a fitting size."""
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    seed = plan["seed"]
    if plan["sampler"] == "random":
        return RandomSampler(seed=seed)
    if plan["sampler"] == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(4, min(50, wanted // 4)))
    # Trials that run side by side are taken for bad ones until they end, so that no two look in one place.
    start = max(min(4, wanted), min(10, wanted // 3), len(space) if wanted >= 4 * len(space) else 0)
    return TPESampler(seed=seed, n_startup_trials=start, constant_liar=True)


def _pruner(plan: Mapping[str, Any]) -> "optuna.pruners.BasePruner":
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner

    if plan["pruner"] == "none":
        return NopPruner()
    # Asynchronous successive halving (ASHA) whose rungs are found from the storage alone, so it survives a restart.
    return SuccessiveHalvingPruner(
        min_resource=plan["min_steps"], reduction_factor=plan["reduction"], min_early_stopping_rate=0
    )


def _remove_unborn(storage: "optuna.storages.BaseStorage", name: str) -> None:
    """Remove a study whose driver was killed before it had said what the study is; it has no trials yet."""
    optuna = _optuna()
    if name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        if PLAN not in study.user_attrs and not study.get_trials(deepcopy=False):
            optuna.delete_study(study_name=name, storage=storage)


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What differs between two plans, as a sentence; empty if nothing does.

    A setting of the run that an older version did not know is no difference: it has its default.
    """
    old, new = _flat(before), _flat(after)
    free = {name for name in new.keys() - old.keys() if name.startswith("run ")} | set(PATHS)
    names = sorted(name for name in (old.keys() | new.keys()) - free if old.get(name) != new.get(name))
    return ", ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names)


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plan.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat
