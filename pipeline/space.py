"""What a sweep varies and what it optimises, read from words and checked before anything starts.

A search space is a mapping from the dotted name of a run's field to a distribution, written ``log:0.01:1``,
``uniform:0:1``, ``int:2:8``, ``logint:8:512`` or ``choice:a,b,c``. Needs neither ray nor optuna.
"""

import dataclasses
import difflib
import json
import math
import random
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from objdyn.families import family_of
from pipeline.config import TrainRun, flatten_settings, parse_settings, type_of, with_overrides
from pipeline.store import json_bytes

Kind = Literal["log", "uniform", "int", "logint", "choice"]
FORMS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH or choice:A,B,C"
NEVER = {
    "out": "each trial has a folder of its own in the sweep's",
    "resume": "trials are resumed by the sweep's --resume",
    "seed": "give --seeds N to train each configuration with N seeds",
    "data": "results on different data cannot be compared; run one sweep for each",
    "stages": "search the settings that the stages do not change, or write presets of one stage",
    "workers": "give the sweep's --workers",
    "device": "give the sweep's --device",
    "threads": "give the sweep's --threads",
    "keep_last": "it changes no result",
    "loader.prefetch": "it changes no result",
    "loader.cache_gb": "it changes no result",
    "log_every": "it changes no result",
    "checkpoint_every": "it changes no result",
    "eval_every": "it changes when trials are judged, so they could not be compared",
    "eval_clips": "it changes what trials are judged by, so they could not be compared",
}
"""Fields that no sweep varies, with the reason."""
LETTERS = {
    "beta": "likelihood_weight", "gamma": "entropy_weight", "psi": "kl_weight", "r": "num_refinements",
    "k": "num_slots", "sigma": "likelihood_var", "beta_kl": "kl_weight",
}  # fmt: skip
"""The papers' letters and our names for them, for those who search by the paper."""
COMPLETIONS = 24
"""Random settings of the other fields with which the ends of a range are tried, if they cannot be alone."""

COSTS = {
    "step_seconds": "median seconds of an optimiser step",
    "train_seconds": "seconds of training, without evaluations and checkpoints",
    "parameters": "numbers that the model learns",
}
"""Objectives beside the held-out metrics of the training."""
DIRECTIONS = {
    "recon_psnr": "maximize", "predict_psnr": "maximize", "fg_ari": "maximize", "loss": "minimize",
    "step_seconds": "minimize", "train_seconds": "minimize", "parameters": "minimize",
}  # fmt: skip
"""Which way an objective goes where the command line does not say."""
DEFAULT_OBJECTIVES = ("fg_ari", "predict_psnr", "recon_psnr")
"""The first of these that the training reports is the objective of a sweep that names none."""
MEANS_OTHER = ("_weight", "likelihood_var", "recon_loss", "num_refinements", "cell_weights", "loss_scale")
"""Ends of the names of settings that change what a loss means."""


class Objective(NamedTuple):
    """What a sweep optimises."""

    name: str
    """Of a held-out metric of the training (``recon_psnr``), or of its cost (``step_seconds``)."""
    direction: str
    """``maximize`` or ``minimize``."""

    @classmethod
    def parse(cls, word: str) -> "Objective":
        """Read ``fg_ari:max``, ``step_seconds:min`` or ``recon_psnr``, which goes the way that improves it.

        Raises:
            ValueError: neither ``max`` nor ``min`` is said, and it is not known which way improves it.
        """
        name, _, way = word.partition(":")
        found = {"max": "maximize", "min": "minimize", "": DIRECTIONS.get(name, "")}.get(way)
        if not name or not found:
            raise ValueError(f"--objective {word!r}: write NAME:max or NAME:min, such as fg_ari:max")
        return cls(name, found)


@dataclass(frozen=True)
class Distribution:
    """Where the values of one field are drawn from."""

    kind: Kind
    text: str
    """As written: ``log:0.01:1``."""
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    """Values that JSON and Optuna can hold; those of a field that holds several are its text, ``[8, 16]``."""

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to try before a sweep: both ends of a range, every choice."""
        if self.kind == "choice":
            return self.choices
        return (int(self.low), int(self.high)) if self.kind in ("int", "logint") else (self.low, self.high)

    def draw(self, rng: random.Random) -> Any:
        """A random value."""
        if self.kind == "choice":
            return rng.choice(self.choices)
        if self.kind == "int":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return rng.uniform(self.low, self.high)
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return round(value) if self.kind == "logint" else value


Space = dict[str, Distribution]


def parse_space(words: Sequence[str], run: TrainRun) -> Space:
    """Read ``FIELD=DISTRIBUTION`` words as a search space of a run.

    Raises:
        ValueError: the space is empty; a word is not of that form; the run has no such field (the message says which
            one may have been meant), or none that a sweep may vary; a field comes twice; the range is empty, or
            logarithmic from 0 or below; values are not of the field's type, or the run refuses them.
    """
    space: Space = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--search {word!r}: write FIELD=DISTRIBUTION with {FORMS}")
        if name in space:
            raise ValueError(f"--search names {name} twice")
        space[name] = _parse(name, text, run)
    if not space:
        raise ValueError(
            "the search space is empty; give --search FIELD=DISTRIBUTION ..., such as model.kl_weight=log:0.01:1, or "
            "--ready-made for that of the family"
        )
    _try_ends(space, run)
    return space


def apply(run: TrainRun, settings: Mapping[str, Any]) -> TrainRun:
    """The run with the settings that a search chose; text stands for what a field with several values holds.

    Raises:
        ValueError: they cannot go together.
    """
    values = {
        name: next(iter(parse_settings([f"{name}={value}"], run).values())) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    return with_overrides(run, values)


def notes(space: Space, settings: Mapping[str, Any], run: TrainRun, objectives: Sequence[Objective]) -> list[str]:
    """What a user should know of a space, and of the settings that all trials share, before hours go into it."""
    found = []
    for number, stage in enumerate(run.parsed_stages, start=1):
        if fixed := sorted((space.keys() | settings.keys()) & stage.settings.keys()):
            found.append(f"note: stage {number} of {len(run.stages)} sets {', '.join(fixed)} itself, so that what the "
                         "sweep says of it holds in the other stages alone")  # fmt: skip
    changed = sorted(name for name in space if name.endswith(MEANS_OTHER))
    if changed and any(objective.name == "loss" for objective in objectives):
        found.append(f"note: {', '.join(changed)} changes what the loss means, so losses of different trials do not "
                     "compare; recon_psnr, predict_psnr and fg_ari do")  # fmt: skip
    return found


def _parse(name: str, text: str, run: TrainRun) -> Distribution:
    hint = _type(name, run)
    if all(name in stage.settings for stage in run.parsed_stages):
        raise ValueError(f"--search {name}: every stage of the run sets it itself; give other stages, such as "
                         "--set 'stages=[]' for one stage with the run's own settings")  # fmt: skip
    kind, _, rest = text.partition(":")
    if kind not in get_args(Kind) or not rest:
        raise ValueError(f"--search {name}={text!r}: a distribution is {FORMS}")
    if kind == "choice":
        return Distribution("choice", text, choices=_choices(name, rest, run))
    whole = kind in ("int", "logint")
    kinds = {part for part in (get_args(hint) or (hint,)) if part is not types.NoneType}
    if whole and not kinds & {int, float}:
        raise ValueError(f"--search {name}={text!r}: {name} is no number; give choice:A,B,C")
    if not whole and float not in kinds:
        other = "int" if int in kinds else "choice"
        raise ValueError(f"--search {name}={text!r}: {name} holds no real number; give {other}:...")
    try:
        low, high = (int(part) if whole else float(part) for part in rest.split(":"))
    except ValueError:
        example = f"{kind}:2:8" if whole else f"{kind}:0.01:1"
        raise ValueError(f"--search {name}={text!r}: give {kind} two {'whole ' * whole}numbers, {example}") from None
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise ValueError(f"--search {name}={text!r}: the least value {low:g} must be below the greatest {high:g}")
    if kind.startswith("log") and low <= 0:
        other = "int" if whole else "uniform"
        raise ValueError(
            f"--search {name}={text!r}: a logarithmic range cannot hold {low:g}; start above 0, or give "
            f"{other}:{low:g}:{high:g}, or choices with 0 among them"
        )
    return Distribution(typing.cast(Kind, kind), text, low, high)


def _type(name: str, run: TrainRun) -> Any:
    if name in NEVER:
        raise ValueError(f"--search {name}: a sweep cannot vary it; {NEVER[name]}")
    try:
        return type_of(run, name)
    except ValueError as error:
        names = list(flatten_settings(dataclasses.asdict(run)))
        last = name.rpartition(".")[2]
        meant = [other for other in names if other.rpartition(".")[2] in (last, LETTERS.get(last.lower()))]
        meant = meant or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        meant = meant or [n for n in names if difflib.SequenceMatcher(None, n.rpartition(".")[2], last).ratio() > 0.7]
        hint = f"; did you mean {' or '.join(meant[:3])}?" if meant else ""
        raise ValueError(f"--search {name}: {str(error).partition(';')[0]}{hint}") from None


def _choices(name: str, rest: str, run: TrainRun) -> tuple[Any, ...]:
    try:
        words = json.loads(f"[{rest}]") if rest.startswith("[") else rest.split(",")
    except ValueError:
        raise ValueError(f"--search {name}=choice:{rest}: write lists as choice:[8,16],[16,32]") from None
    words = [word if isinstance(word, str) else json.dumps(word) for word in words]
    values = []
    for word in words:
        try:
            value = next(iter(parse_settings([f"{name}={word}"], run).values()))
        except ValueError as error:
            raise ValueError(f"--search {name}: {error}") from None
        values.append(json.dumps(value) if isinstance(value, tuple) else value)
    if len({json_bytes(value) for value in values}) < len(values):
        raise ValueError(f"--search {name}=choice:{rest}: a choice comes twice")
    if len(values) < 2:
        raise ValueError(f"--search {name}=choice:{rest}: give two choices or more; --set {name}={rest} fixes one")
    return tuple(values)


def _try_ends(space: Space, run: TrainRun) -> None:
    """Refuse a space of which the run refuses an end, alone and with random settings of the other fields."""
    rng = random.Random(0)
    for name, distribution in space.items():
        others = {other: d for other, d in space.items() if other != name}
        for value in distribution.ends:
            drawn = [{other: d.draw(rng) for other, d in others.items()} for _ in range(COMPLETIONS if others else 0)]
            if error := _refused(run, [{name: value}, *({**settings, name: value} for settings in drawn)]):
                raise ValueError(f"--search {name}={distribution.text!r}: {value!r} cannot be: {error}")


def _refused(run: TrainRun, candidates: Sequence[Mapping[str, Any]]) -> str:
    """Why the first candidate is refused, if all are; empty otherwise."""
    first = ""
    for settings in candidates:
        try:
            apply(run, settings)
            return ""
        except ValueError as error:
            first = first or str(error)
    return first


def ready_made(run: TrainRun) -> list[str]:
    """The settings by which a family lives or dies, in ranges around those of the run, as words of a search space."""
    model: Any = run.model
    return [f"model.{name}={text}" for name, text in READY_MADE[family_of(model)](model).items()]


def _around(value: float, factor: float = 10) -> str:
    return f"log:{value / factor:.4g}:{value * factor:.4g}"


def _count(value: int, less: int, more: int, least: int = 2) -> str:
    return f"int:{max(least, value - less)}:{value + more}"


def _particles(model: Any) -> dict[str, str]:
    """DDLP's beta_KL, number of particles, balance of the position's KL, and anchor scale."""
    ratios = [ratio for ratio in (0.0625, 0.125, 0.25, 0.5) if ratio * model.image_size >= 8]
    found = {
        "kl_weight": _around(model.kl_weight),
        "num_particles": f"int:{max(2, model.num_particles - 4)}:{min(model.num_proposals, model.num_particles + 4)}",
        "kl_balance": _around(model.kl_balance),
        "glimpse_ratio": f"choice:{','.join(map(str, ratios))}",
    }
    return found if len(ratios) > 1 else {name: text for name, text in found.items() if name != "glimpse_ratio"}


def _slots(model: Any) -> dict[str, str]:
    """IODINE's and PROVIDE's beta, psi, gamma, R, K and sigma^2."""
    return {
        "likelihood_weight": _around(model.likelihood_weight),
        "kl_weight": _around(model.kl_weight),
        "entropy_weight": "choice:0,0.01,0.1,1",
        "num_refinements": _count(model.num_refinements, 2, 2, least=1),
        "num_slots": _count(model.num_slots, 1, 2),
        "likelihood_var": _around(model.likelihood_var),
    }


def _object_dynamics(model: Any) -> dict[str, str]:
    """ODDN's weights of its losses, N and R."""
    return {
        "kl_weight": _around(model.kl_weight),
        "one_step_weight": _around(model.one_step_weight),
        "rollout_weight": _around(model.rollout_weight),
        "rollout_frames": "int:1:3",
        "num_refinements": _count(model.num_refinements, 2, 2, least=1),
    }


def _state_space(model: Any) -> dict[str, str]:
    """The schedule of the KL's weight."""
    return {
        "initial_kl_weight": _around(model.initial_kl_weight),
        "kl_weight": _around(model.kl_weight),
        "frozen_steps": f"int:0:{2 * model.frozen_steps or 1000}",
        "anneal_steps": f"int:1:{2 * model.anneal_steps or 1000}",
    }


def _lstm(model: Any) -> dict[str, str]:
    """How the baseline learns to predict from its own predictions."""
    return {"scheduled_sampling": "uniform:0:1", "free_running_weight": "uniform:0:1"}


READY_MADE: dict[str, Callable[[Any], dict[str, str]]] = {
    "ddlp": _particles, "dlp": _particles, "iodine": _slots, "provide": _slots, "oddn": _object_dynamics,
    "ssm": _state_space, "ed_lstm": _lstm,
}  # fmt: skip
