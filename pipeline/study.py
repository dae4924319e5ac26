"""A sweep's trials in an Optuna storage, which is the only record of them; everything else is made from it."""

from typing import Any, NamedTuple


class Objective(NamedTuple):
    """What a sweep optimises."""

    name: str
    """Of a held-out metric of the training (``recon_psnr``), or of its cost (``step_seconds``)."""
    direction: str
    """``maximize`` or ``minimize``."""


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
    """Objective -> field -> share of the objective's variance that it explains, by PED-ANOVA; empty with fewer than
    four complete trials."""

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """Complete trials that no other surpasses in every objective, best first by the first objective; with one
        objective the best trial alone, or trials that are equally good."""
        done = [trial for trial in self.trials if trial.state == "complete"]
        points = {trial.number: self._costs(trial) for trial in done}
        front = [
            trial
            for trial in done
            if not any(_surpasses(points[other.number], points[trial.number]) for other in done)
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
