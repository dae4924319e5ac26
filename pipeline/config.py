"""The runs: every setting of every stage, as frozen dataclasses that any code can build and JSON can store.

A model's own settings live with the model (``objdyn/models``); here are the settings of *running* it. ``__post_init__``
refuses impossible values with a sentence and changes nothing.
"""

import dataclasses
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch

from objdyn.models.ddlp import DDLPConfig
from objdyn.models.dlp import DLPConfig
from objdyn.models.ed_lstm import EDLSTMConfig
from objdyn.models.iodine import IODINEConfig
from objdyn.models.oddn import ODDNConfig
from objdyn.models.provide import PROVIDEConfig
from objdyn.models.ssm import SSMConfig
from objdyn.models.what_if import Edit
from objdyn.questions.generator import GeneratorConfig
from pipeline import store

if TYPE_CHECKING:
    from objdyn.datasets.preprocessing import Preprocessing

ModelConfig = DDLPConfig | DLPConfig | IODINEConfig | PROVIDEConfig | ODDNConfig | SSMConfig | EDLSTMConfig


@dataclass(frozen=True)
class StorageConfig:
    """How s3:// paths are reached. Credentials and the region are no settings: they come from the standard variables
    (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_DEFAULT_REGION, ...) or the machine's role, and are written nowhere."""

    endpoint_url: str = ""
    """URL of the store behind s3:// paths, as http://HOST:PORT; empty takes AWS_ENDPOINT_URL, or else Amazon's."""
    attempts: int | None = None
    """Most tries of each request, with waits between that grow; None takes AWS_MAX_ATTEMPTS, or else 8."""
    timeout: float | None = None
    """Seconds that the store may be silent during a try; None is 30."""

    def __post_init__(self) -> None:
        if self.endpoint_url:
            store.check_endpoint(self.endpoint_url, "storage.endpoint_url")
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"storage.attempts must be at least 1, got {self.attempts}")
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"storage.timeout must be positive, got {self.timeout}")


@dataclass(frozen=True)
class LoaderConfig:
    """How clips are read for training."""

    window_shards: int = 4
    """Shards that are open at once and shuffled together; more shuffles better and holds more memory."""
    prefetch: int = 2
    """Micro-batches decoded ahead by one thread; 0 decodes in line."""
    cache_gb: float = 20.0
    """Local disk for shards fetched from object storage, in GB; least recently used shards go first."""

    def __post_init__(self) -> None:
        if self.window_shards < 1:
            raise ValueError(f"loader.window_shards must be at least 1, got {self.window_shards}")
        if self.prefetch < 0:
            raise ValueError(f"loader.prefetch must be 0 or more, got {self.prefetch}")
        if self.cache_gb <= 0:
            raise ValueError(f"loader.cache_gb must be positive, got {self.cache_gb}")


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedule, in optimiser steps."""

    lr: float = 2e-4
    """Learning rate at step 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging constants."""
    eps: float = 1e-4
    """Adam's denominator floor; DDLP trains with 1e-4."""
    slow: str = ""
    """Parameters whose names begin with this learn slower, ``pint.`` for example; empty for none."""
    slow_factor: float = 1.0
    """Factor on their learning rate."""
    decay: float = 1.0
    """Factor on the learning rate every ``decay_steps`` optimiser steps; 1 keeps it constant."""
    decay_steps: int = 10_000
    """Optimiser steps between two decays (the papers decay per epoch; a preset converts)."""
    warmup_steps: int = 0
    """Optimiser steps at the beginning of the run over which the learning rate rises linearly from almost 0."""
    anneal_steps: int = 0
    """Optimiser steps at the end of the run over which the learning rate falls linearly; 0 never anneals."""
    anneal_to: float = 0.05
    """Factor on the learning rate that annealing ends with, in the run's last step."""
    clip_norm: float | None = None
    """Largest global gradient norm; None leaves gradients alone."""
    batch_size: int = 32
    """Clips per optimiser step over all workers together."""
    micro_batch_size: int | None = None
    """Clips per forward pass on one worker; None splits the batch evenly over the workers without accumulation."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if self.slow_factor <= 0:
            raise ValueError(f"optim.slow_factor must be positive, got {self.slow_factor}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"optim.decay must be in (0, 1], got {self.decay}")
        if self.decay_steps < 1:
            raise ValueError(f"optim.decay_steps must be at least 1, got {self.decay_steps}")
        for name in ("warmup_steps", "anneal_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must be 0 (none) or more, got {getattr(self, name)}")
        if not 0 <= self.anneal_to <= 1:
            raise ValueError(f"optim.anneal_to is a factor in [0, 1], got {self.anneal_to}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optim.clip_norm must be positive or None, got {self.clip_norm}")
        if self.batch_size < 1:
            raise ValueError(f"optim.batch_size must be at least 1, got {self.batch_size}")
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size != 0
        ):
            raise ValueError(
                f"optim.micro_batch_size must divide optim.batch_size={self.batch_size}, got {self.micro_batch_size}"
            )


def learning_rate(optim: OptimConfig, step: int, steps: int, factor: float = 1.0) -> float:
    """Learning rate of the optimiser step that follows ``step`` completed ones of a run of ``steps``.

    The decay, times (step + 1) / warmup_steps in the warm-up, times a line that falls over the last ``anneal_steps``
    and is ``anneal_to`` in the very last step. ``factor`` is that of the parameters' group (``slow_factor``).
    """
    rate = optim.lr * factor * optim.decay ** (step // optim.decay_steps)
    if step < optim.warmup_steps:
        rate *= (step + 1) / optim.warmup_steps
    after = steps - 1 - step
    if after < optim.anneal_steps:
        rate *= optim.anneal_to + (1 - optim.anneal_to) * after / optim.anneal_steps
    return rate


STAGE_FIELDS = (
    "data", "clip_frames", "model.*", "optim.lr", "optim.betas", "optim.eps", "optim.slow_factor", "optim.decay",
    "optim.decay_steps", "optim.clip_norm", "optim.batch_size", "optim.micro_batch_size",
)  # fmt: skip
"""Settings that a stage of a run may change; the others belong to the whole run."""


@dataclass(frozen=True)
class Stage:
    """A part of a run with settings of its own. A curriculum is a sequence of them."""

    settings: Mapping[str, Any]
    """Dotted fields of the run that differ from its own settings while the stage lasts."""
    steps: int | None = None
    """Most optimiser steps of the stage; None only in the last one, which takes what is left."""
    patience: int | None = None
    """The stage is over when its smoothed loss has not fallen by 1 % for so many steps: it stagnates."""
    min_kl: float | None = None
    """The stage is over when its smoothed loss term ``kl`` has fallen below this: the posterior collapses."""

    @property
    def has_trigger(self) -> bool:
        """Whether the loss can end the stage before its steps are over."""
        return self.patience is not None or self.min_kl is not None

    @classmethod
    def parse(cls, text: str, run: "TrainRun") -> "Stage":
        """Read a stage from its words: ``"steps=1500 data=sim:balls-interaction optim.lr=3e-4 model.kl_weight=2"``.

        Raises:
            ValueError: a word is no NAME=VALUE, or names nothing that a stage has, or has a value of another type.
        """
        own: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for word in shlex.split(text):
            name = word.partition("=")[0]
            if name == word:
                raise ValueError(f"{word!r} is not of the form NAME=VALUE")
            if name in own or name in settings:
                raise ValueError(f"{name} is given twice")
            if name in ("steps", "patience", "min_kl"):
                own[name] = _parse_word(word, float if name == "min_kl" else int)
                if not own[name] > 0:
                    raise ValueError(f"{word}: it must be positive")
            else:
                wanted = type_of(run, name)
                if name not in STAGE_FIELDS and not name.startswith("model."):
                    raise ValueError(f"{name} cannot change within a run; a stage takes steps, patience, min_kl, and "
                                     f"of the run's settings {', '.join(STAGE_FIELDS)}")  # fmt: skip
                settings[name] = _parse_word(word, wanted)
        return cls(settings, **own)


def type_of(run: Any, name: str) -> Any:
    """The declared type of a run's field, by its dotted name.

    Raises:
        ValueError: there is none, or it is a group of settings.
    """
    owner, wanted, passed = run, cast(Any, type(run)), list[str]()
    for part in name.split("."):
        if not dataclasses.is_dataclass(owner):
            raise ValueError(f"{'.'.join(passed)} is a single value and has no field {part!r} (in {name!r})")
        hints = typing.get_type_hints(cast(Any, type(owner)))
        if part not in hints:
            raise ValueError(f"{type(owner).__name__} has no field {part!r} (in {name!r}); it has {', '.join(hints)}")
        owner, wanted = getattr(owner, part), hints[part]
        passed.append(part)
    if dataclasses.is_dataclass(owner):
        names = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(owner))
        raise ValueError(f"{name} holds settings of its own; set them one by one: {names}")
    return wanted


def _parse_word(word: str, hint: Any) -> Any:
    """The value of NAME=VALUE as a type asks for it; lists are written as JSON or with commas."""
    value = word.partition("=")[2]
    try:
        return _parse_value(value, hint)
    except ValueError:
        wanted = hint.__name__ if isinstance(hint, type) and get_args(hint) == () else str(hint)
        raise ValueError(f"{word}: {value!r} is not of type {wanted.replace('typing.', '')}") from None


def _parse_value(text: str, hint: Any) -> Any:
    kinds = get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for kind in sorted(kinds, key=lambda kind: kind is str):  # a string is what nothing else could be
            try:
                return _parse_value(text, kind)
            except ValueError:
                pass
    elif origin is Literal:
        for value in kinds:
            if text == str(value):
                return value
    elif origin is tuple:
        items = json.loads(text) if text.startswith("[") else text.split(",") if text else []
        texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
        inner = kinds[:1] * len(texts) if kinds[1:] == (Ellipsis,) else kinds
        return tuple(_parse_value(item, kind) for item, kind in zip(texts, inner, strict=True))
    elif hint is types.NoneType and text.lower() in ("none", "null"):
        return None
    elif hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif hint is int or hint is str:
        return hint(text)
    elif hint is float and math.isfinite(value := float(text)):
        return value
    raise ValueError(text)


@dataclass(frozen=True)
class TrainRun:
    """One training run: a model on a dataset into a run folder."""

    model: ModelConfig = field(default_factory=DDLPConfig)
    """The model's settings; its class says which family."""
    data: str = "sim:balls-interaction"
    """Dataset folder or s3:// URL holding ``train`` (and ``val``), or ``sim:NAME`` to stream a simulator."""
    out: str = ""
    """Run folder or s3:// URL; empty takes the next free number under ~/objdyn/runs."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint; without it a folder that holds a run is refused."""
    resume_if_exists: bool = False
    """Continue the run in ``out``, or start it where there is none: one command for schedulers that repeat a job."""
    force: bool = False
    """With resume: go on although settings, code or data have changed, as long as the weights fit; metrics.jsonl tells
    what has."""
    seed: int = 0
    """Seed of weights, sample order and noise."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    clip_frames: int = 11
    """Frames of a training clip: a window inside a stored clip (for DDLP its T + 1)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Reader."""
    workers: int = 1
    """Processes that train together (one GPU or one CPU slot each)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if the machine that starts the run has one."""
    threads: int | None = None
    """Torch threads per worker on CPU; None shares the machine's cores among its workers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; likelihood and KL terms stay in fp32. On a CPU it pays where that
    computes bf16 itself (AVX-512 BF16, AMX)."""
    log_every: int = 20
    """Optimiser steps between two lines of metrics."""
    eval_every: int = 500
    """Optimiser steps between two evaluations on held-out clips; 0 never evaluates."""
    eval_clips: int = 16
    """Held-out clips of each evaluation."""
    checkpoint_every: int = 500
    """Optimiser steps between two checkpoints; the last step always has one."""
    keep_last: int = 3
    """Newest checkpoints to keep; the best one by held-out reconstruction is kept beside them."""
    stall_seconds: float = 900.0
    """A worker ends itself, and Ray starts all of them again from the last checkpoint, when for so many seconds no
    micro-batch, evaluated clip or file of a checkpoint was done. More than a checkpoint takes to save. The workers have
    as long, and 30 s for their imports, to meet at all."""
    grace_seconds: float = 25.0
    """After SIGTERM the workers may take so long to finish their step and to save it; then the job ends without."""
    stages: tuple[str, ...] = ()
    """Curriculum: one string of words per stage, "steps=500 data=DIR clip_frames=4 optim.batch_size=32 model.X=Y", with
    settings that replace this run's while the stage lasts. steps=N ends it; earlier patience=N (the smoothed loss has
    not fallen by 1 % for N steps) or min_kl=X (the smoothed kl has fallen below X). The last stage takes the rest."""
    init: str = ""
    """Run folder or checkpoint whose weights a new run starts from; empty draws them."""
    perceptual_weights: tuple[str, ...] = ()
    """File with the weights of VGG16, local or s3://, that model.recon_loss=vgg needs; jobs/fetch_weights.py makes it.
    Its trunk alone is used; their checksum goes into the run."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        for name in ("steps", "clip_frames", "workers", "log_every", "eval_clips", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("stall_seconds", "grace_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 (never) or more, got {self.eval_every}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {self.threads}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        micro = self.optim.micro_batch_size or max(1, self.optim.batch_size // self.workers)
        if self.optim.batch_size % (micro * self.workers) != 0:
            raise ValueError(
                f"workers={self.workers} times micro-batches of {micro} clips do not divide optim.batch_size="
                f"{self.optim.batch_size}; choose a batch size or a number of workers that divides"
            )
        self._check_stages()

    @property
    def micro_batch_size(self) -> int:
        """Clips per forward pass on one worker."""
        return self.optim.micro_batch_size or self.optim.batch_size // self.workers

    @property
    def parsed_stages(self) -> tuple[Stage, ...]:
        """The stages; a run without any has one with its own settings."""
        return tuple(Stage.parse(text, self) for text in self.stages) or (Stage({}),)

    def stage(self, index: int) -> "TrainRun":
        """The run as it is in stage ``index`` (from 0): its own settings with the stage's, and no stages.

        Raises:
            ValueError: the settings cannot go together.
        """
        return self._in_stage(self.parsed_stages[index])

    def _in_stage(self, stage: Stage) -> "TrainRun":
        return with_overrides(dataclasses.replace(self, stages=()), dict(stage.settings))

    def _check_stages(self) -> None:
        given: Any = self.stages
        if not isinstance(given, tuple) or any(type(text) is not str for text in self.stages):
            raise ValueError(f"stages must be a list of strings, one for each stage, got {self.stages!r}")
        taken = 0
        for number, text in enumerate(self.stages, start=1):
            try:
                stage = Stage.parse(text, self)
                self._in_stage(stage)
                if number < len(self.stages) and stage.steps is None:
                    raise ValueError("steps= is missing: every stage but the last must say how many it may take")
                if number == len(self.stages) and stage.has_trigger:
                    raise ValueError("the last stage ends with the run; leave out patience= and min_kl=")
            except ValueError as error:
                raise ValueError(f"stage {number} ({text!r}): {error}") from error
            if number == len(self.stages) and stage.steps not in (None, self.steps - taken):
                raise ValueError(
                    f"stage {number} ({text!r}): the run's steps={self.steps} leave {self.steps - taken} for the last "
                    "stage; leave its steps= out"
                )
            taken += stage.steps or 0
            if number < len(self.stages) and taken >= self.steps:
                raise ValueError(
                    f"stage {number} ({text!r}): the first {number} stages take {taken} steps, which leaves none of "
                    f"the run's steps={self.steps} for the next; raise steps, or shorten the stages"
                )


def _check_model_words(words: Sequence[str]) -> None:
    """Refuse words that ``parse_model_settings`` cannot read, before the model is known."""
    for word in words:
        if not re.fullmatch(r"model\.\w+=.*", word):
            raise ValueError(f"set changes settings of the model, written model.NAME=VALUE, got {word!r}")


@dataclass(frozen=True)
class ExtractRun:
    """One extraction: a checkpoint over a split into tables of latents."""

    checkpoint: str
    """Run folder, or one checkpoint inside it; local or s3://."""
    data: str
    """Dataset folder or s3:// URL holding the split, or ``sim:NAME``."""
    out: str
    """Folder or s3:// URL of the tables; started again on the same folder it does only what is missing."""
    split: str = "test"
    """Split to read."""
    set: tuple[str, ...] = ()
    """Model settings to change, as ``model.num_slots=9 model.num_refinements=8``; the weights must fit."""
    context: int | None = None
    """Frames to see before predicting or interpolating; goes with horizon, or closing, or both."""
    horizon: int | None = None
    """Frames to predict after the context; they may reach beyond the clip, where errors are null."""
    closing: int | None = None
    """Frames at the end of each clip to see as well: those between the context and them are interpolated (ssm)."""
    limit: int | None = None
    """Only the first clips of the split, so many; None takes all."""
    batch_size: int = 4
    """Clips that one worker encodes together; more is faster on a GPU and takes more memory."""
    workers: int = 1
    """Processes, each with a copy of the model on one CPU slot or one GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes GPUs if the cluster has any."""
    which: Literal["last", "best"] = "last"
    """Which checkpoint of a run folder: the newest, or the best by held-out reconstruction."""
    mask_summary: bool = False
    """Add per object and frame: mask_area, the share of pixels that it wins, and mask_y, mask_x, their middle."""
    masks: bool = False
    """Add per object and frame its soft mask, uint8 (h, w); some kB a row before compression."""
    components: bool = False
    """Add per object and frame its own image, uint8 (h, w, c); three times the size of its mask."""
    state: bool = False
    """Add per object and frame the recurrent state, for families that carry one (provide)."""
    samples: int = 0
    """Futures to draw from the model per clip (and edit), beside the deterministic one: rows with sample 1 to N."""
    sample_seed: int = 0
    """Seed of the draws, which follow from it, the clip's key and the sample's number alone."""
    edits: str = ""
    """JSON file, local or s3://, with a list of what-if edits (ddlp): rows with the edit's name, of each edited clip.
    An entry is {"name": ..., "select": "cluster:0.1,0.2", "move": [0.2, 0]}; "clip" makes it one clip's."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    @property
    def extras(self) -> tuple[str, ...]:
        """The optional columns that are asked for, by the names of their fields here."""
        return tuple(name for name in ("mask_summary", "masks", "components", "state") if getattr(self, name))

    def __post_init__(self) -> None:
        given = [name for name in ("horizon", "closing") if getattr(self, name) is not None]
        if (self.context is None) == bool(given):
            one, other = ("context", "horizon") if not given else (given[0], "context")
            raise ValueError(
                f"{one} was given without {other}; give both to {'interpolate' if one == 'closing' else 'predict'} "
                "(context and horizon: see the first frames, predict those that follow; context and closing: see the "
                "first and the last frames, interpolate those between), or none of them to only encode"
            )
        _check_model_words(self.set)
        for name in ("context", "horizon", "closing", "limit", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.samples < 0:
            raise ValueError(f"samples must be 0 (none) or more, got {self.samples}")
        if (self.samples or self.edits) and self.horizon is None:
            what = "samples" if self.samples else "edits"
            raise ValueError(f"{what} are of predicted frames: give context and horizon, too")


@dataclass(frozen=True)
class InterpolateRun(ExtractRun):
    """An extraction that fills a gap in every clip; the defaults are the state-space paper's, for 30 frames."""

    context: int = 5
    """Frames to see at the beginning of each clip."""
    closing: int = 5
    """Frames to see at its end; those between are interpolated."""


@dataclass(frozen=True)
class WhatIfRun:
    """One what-if: a change of some particles in the context of one clip, and the future that follows."""

    checkpoint: str
    """Run folder of a model with particles (ddlp), or one checkpoint inside it; local or s3://."""
    data: str
    """Dataset folder or s3:// URL holding the split, or ``sim:NAME``."""
    clip: str
    """Key of the clip."""
    out: str
    """Folder or s3:// URL that gets what-if.mp4 and the tables of both predictions."""
    select: str
    """Which particles: ``cluster:y,x`` (all on the object there), ``nearest:y,x``, ``index:1,4`` or ``all``."""
    move: str = ""
    """``dy,dx`` in [-1, 1] units, y down, as ``0.2,0``; added to the position in all frames of the context."""
    scale: float = 1.0
    """Factor on the size."""
    fade: float = 1.0
    """Factor on the transparency, from 0 (gone) to 1."""
    remove: bool = False
    """Take the object away."""
    front: bool = False
    """Draw it in front of all others."""
    behind: bool = False
    """Draw it behind all others."""
    swap: str = ""
    """A second selection, with which it exchanges its look."""
    swap_scale: bool = False
    """Exchange the sizes, too."""
    frame: int = 0
    """Frame of the context in which ``nearest`` and ``cluster`` look."""
    radius: float = 0.1
    """How far from each other particles on one object may be, in [-1, 1] units."""
    name: str = "what-if"
    """What the rows of the edited future have in the column edit."""
    split: str = "test"
    """Split to read."""
    set: tuple[str, ...] = ()
    """Model settings to change, as ``model.max_frames=10``; the weights must fit."""
    context: int = 10
    """Frames that the model sees, and that are edited."""
    horizon: int = 40
    """Frames to predict; they may reach beyond the clip."""
    sample_seed: int | None = None
    """Draw both futures with this seed, the same draws for both; None shows the model's deterministic answer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    which: Literal["last", "best"] = "last"
    """Which checkpoint of a run folder: the newest, or the best by held-out reconstruction."""
    films: tuple[Literal["mp4", "gif", "png"], ...] = ("mp4",)
    """Which files to write: what-if.mp4, what-if.gif, what-if.png (some frames in one picture)."""
    fps: float = 10.0
    """Frames per second of the film."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    @property
    def edit(self) -> Edit:
        """The edit that the flags describe."""
        try:
            y, x = map(float, self.move.split(",")) if self.move else (0.0, 0.0)
        except ValueError:
            raise ValueError(f"move is dy,dx, as 0.2,0, got {self.move!r}") from None
        names = [each.name for each in dataclasses.fields(Edit) if each.name not in ("move", "clip")]
        return Edit(move=(y, x), clip=self.clip, **{name: getattr(self, name) for name in names})

    @property
    def extraction(self) -> "ExtractRun":
        """The same as an extraction of the clip, without the edit."""
        names = ("checkpoint", "data", "out", "split", "set", "context", "horizon", "device", "which")
        samples, seed = (0, 0) if self.sample_seed is None else (1, self.sample_seed)
        return ExtractRun(**{name: getattr(self, name) for name in names}, samples=samples, sample_seed=seed)

    def __post_init__(self) -> None:
        _ = self.edit, self.extraction  # refuse what they do
        if not self.films:
            raise ValueError("films must name one or more of mp4, gif, png")
        if not 0 < self.fps <= 120:
            raise ValueError(f"fps must be positive and at most 120, got {self.fps:g}")


@dataclass(frozen=True)
class EvaluateRun:
    """A checkpoint measured on one split of a dataset, beside trivial baselines: metrics.json and report.html."""

    checkpoint: str
    """Run folder, or one checkpoint inside it; local or s3://."""
    data: str = ""
    """Dataset folder or s3:// URL, or ``sim:NAME``; its ``train`` split gives the constant background. Only a protocol
    finds its data itself."""
    out: str = ""
    """Folder or s3:// URL that gets metrics.json and report.html; earlier ones there are replaced."""
    split: str = "test"
    """Split to evaluate."""
    protocol: Literal["", "bouncing-balls", "object-dynamics"] = ""
    """Print a paper's tables and write protocol.json instead, on ``data`` or else on the data that the model was
    trained on: PROVIDE's on Bouncing Balls, or ODDN's with a probe of its dynamics vectors (report.html too)."""
    compare: tuple[str, ...] = ()
    """Other checkpoints that ``object-dynamics`` measures on the same clips, as ``provide=RUN iodine-linear=RUN``;
    ``set`` does not apply to them."""
    set: tuple[str, ...] = ()
    """Model settings to change at test time, as ``model.num_slots=9 model.num_refinements=8``; the weights must fit.
    With a protocol, ``model.num_slots`` is for its table 2 only: videos with more balls, or those of ``data``."""
    context: int = 10
    """Frames of each clip that the model sees before it predicts."""
    horizon: int | None = None
    """Frames to predict; None takes what the clips hold after the context, at most 40; 0 only reconstructs."""
    limit: int | None = None
    """Clips to evaluate, the first ones of the split; None takes all, or 200 for a protocol."""
    batch_size: int = 8
    """Clips encoded together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    which: Literal["last", "best"] = "last"
    """Which checkpoint of a run folder: the newest, or the best by held-out reconstruction."""
    wall_radius: float = 8.0
    """Radius of the objects that "constant velocity with walls" reflects, in pixels of a frame 64 pixels high."""
    report_clips: int = 6
    """Clips drawn in the report: the worst, the median and the best by prediction (where nothing is predicted, by
    reconstruction), a third each; by LPIPS where that is known, else by PSNR."""
    perceptual_weights: tuple[str, ...] = ()
    """Files with the weights of LPIPS, local or s3://, as jobs/fetch_weights.py writes them: of VGG16 for lpips, of
    AlexNet for lpips_alex. Without them there is no LPIPS. Trunk and heads may be two files."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is missing; give a folder or s3:// URL for what is measured: --out DIR")
        if not (self.data or self.protocol):
            raise ValueError("data is missing; give a dataset folder, an s3:// URL or sim:NAME: --data DIR")
        _check_model_words(self.set)
        if self.compare and self.protocol != "object-dynamics":
            raise ValueError("compare is for --protocol object-dynamics; evaluate other checkpoints one by one")
        self.compared()
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("horizon", "report_clips"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 or None for all clips, got {self.limit}")
        if not 0 <= self.wall_radius < 32:
            raise ValueError(f"wall_radius must be in [0, 32), got {self.wall_radius}")

    def compared(self) -> dict[str, str]:
        """The checkpoints of ``compare`` by name.

        Raises:
            ValueError: a word is not NAME=CHECKPOINT, or a name comes twice.
        """
        found: dict[str, str] = {}
        for word in self.compare:
            name, equals, path = word.partition("=")
            if not (name and equals and path):
                raise ValueError(f"compare names other checkpoints, written NAME=CHECKPOINT, got {word!r}")
            if name in found:
                raise ValueError(f"compare has the name {name!r} twice; give each checkpoint its own")
            found[name] = path
        return found


@dataclass(frozen=True)
class QuickstartRun:
    """The whole road on simulated videos: mp4 files, shards, training, tables, evaluation, report."""

    out: str = ""
    """Folder or s3:// URL, empty or not there yet; left out, it is the next free number under ./quickstart-out."""
    preset: str = "quickstart"
    """Preset of ``train_ddlp.py`` that is trained."""
    steps: int | None = None
    """Optimiser steps; None takes the preset's, about four minutes on two cores."""
    seed: int = 0
    """Seed of weights, sample order and noise; the videos are always the same."""
    train_videos: int = 160
    """Simulated videos to train on."""
    val_videos: int = 16
    """Videos that training evaluates on."""
    test_videos: int = 16
    """Held-out episodes of the final evaluation, with true positions."""
    frames: int = 60
    """Frames of each video."""
    context: int = 10
    """Frames seen before predicting."""
    horizon: int = 20
    """Frames predicted after them."""
    promise_db: float = 6.0
    """Least gain of the reconstruction over the constant background, in dB of PSNR."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        for name in ("train_videos", "val_videos", "test_videos", "frames", "context", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1 or None, got {self.steps}")
        if self.context + self.horizon > self.frames:
            raise ValueError(
                f"context={self.context} and horizon={self.horizon} need videos of {self.context + self.horizon} "
                f"frames, got frames={self.frames}"
            )


LayoutName = Literal[
    "videos", "frames", "npy", "phyre", "gswm-hdf5", "rnem-hdf5", "webdataset", "clevrer", "towers"
]  # fmt: skip
"""How the videos of a source are stored, see ``objdyn.datasets.LAYOUTS``."""


@dataclass(frozen=True)
class ShardRun:
    """One split of a dataset, made from videos: WebDataset tars, index.parquet, manifest.json, quarantine.parquet."""

    source: str
    """Folder, file or s3:// URL of the videos, or ``sim:NAME``, or ``sim:NAME:KEY=VALUE,KEY=VALUE``."""
    out: str
    """Dataset folder or s3:// URL; the split gets a folder inside it."""
    layout: LayoutName = "videos"
    """What the source holds: video files, a folder of numbered images per video, an uint8 array (n, h, w, 3) in a .npy
    file per video, roll-outs of PHYRE's simulator in .npz files, G-SWM's HDF5, R-NEM's HDF5, tars of video files,
    CLEVRER's video_00000.mp4 with annotation_00000.json and more beside it at any depth, block towers in either of the
    first two ways."""
    split: str = "train"
    """Name of the split; of a simulator, which of its splits; of clevrer, where the source holds several, which of
    train, val and test; of towers, train or test: 393 or 100 of 493 videos, drawn with the seed; of npy without start
    and stop, the first 80 % of a recording for train, the next 10 % for val, the rest for test, all for other names."""
    video_range: str = ""
    """FIRST-LAST: of clevrer, the videos of these numbers are the split, such as 11000-11999, DDLP's test videos."""
    clips: Literal["whole", "provide", "ddlp"] = "whole"
    """Where clips are cut: all over the video, from start to stop; or, of clevrer, one clip where all objects come into
    view, of videos in which they stay for 40 frames (PROVIDE's test); or frames 18 to 117 (DDLP)."""
    min_objects: int | None = None
    """Of clevrer and phyre, leave out videos with fewer annotated objects. With max_objects, a dataset per number of
    objects, as PROVIDE groups its test videos."""
    max_objects: int | None = None
    """Of clevrer and phyre, leave out videos with more annotated objects, such as the slots of a model hold; None takes
    all. Of phyre those that never move count, too: 11 leaves out the five templates that DDLP leaves out (12, 13, 16,
    20, 21)."""
    frames: int = 20
    """Frames of a clip."""
    stride: int = 1
    """Source frames from one kept frame to the next."""
    hop: int | None = None
    """Source frames from the start of one clip to the next; None is frames * stride: no overlap."""
    start: int = 0
    """First source frame of the first clip of a video."""
    stop: int | None = None
    """Source frame before which the last clip of a video ends, to split videos by time; None is the video's end, of
    phyre at most frame 100."""
    drop_last: int | None = None
    """Of frames and phyre, frames left out at the end of a video. None is 30 of phyre, where little moves in the three
    seconds after success, and 0 of frames."""
    pad_to: int | None = None
    """Of frames and phyre, repeat a shorter video's last frame until it has so many; 0 repeats none. None is 100 of
    phyre, but 0 in its split train, whose clips shall not run past the true end, and 0 of frames."""
    colours: Literal["auto", "own", "inverted"] = "auto"
    """Of frames and phyre, the source's colours, or 255 - v with red and blue swapped, which is how DDLP has PHYRE, so
    that its white background becomes black. Auto is inverted of phyre, own of frames."""
    crop: str = ""
    """x0,y0,x1,y1 in source pixels, x1 and y1 outside; empty keeps the whole frame."""
    fit: Literal["squeeze", "center-crop"] = "squeeze"
    """How a frame becomes square: change its aspect ratio, or cut the longer side."""
    filter: Literal["area", "bilinear", "bicubic", "lanczos", "nearest"] = "area"
    """Pillow's resize filter; area is its BOX."""
    size: int = 64
    """Height and width of the stored frames."""
    fps: float = 10.0
    """Frames per second to record where the source states none (numbered images, HDF5)."""
    codec: Literal["zstd", "npy", "webp-strip"] = "zstd"
    """How frames are stored, always without loss; webp-strip is smallest for noisy real footage and slower."""
    clips_per_shard: int | None = None
    """Clips in one tar; None fills about 48 MB of pixels."""
    limit: int | None = None
    """Only the first videos, so many; None takes all."""
    seed: int | None = None
    """Seed of a simulator, None gives its published data; or of the split of towers, None is 0."""
    max_quarantined: float = 0.01
    """Share of the inputs that may be unusable; more is an error from 100 inputs on, a warning below."""
    workers: int | None = None
    """CPU slots of a Ray started by this job; None takes every core, or the cluster that is there."""
    max_frames: int = 1_000_000
    """Frames of one video; a longer one is quarantined."""
    max_pixels: int = 40_000_000
    """Pixels of one frame, width times height; a video of larger ones is quarantined. 8K has 33 to 35 million."""
    max_file_gb: float = 64.0
    """Size of the file (or tar member) of one video in GB; a larger one is quarantined."""
    max_memory_gb: float = 4.0
    """Memory that reading one video may take, in GB, on top of what its process has; on Linux."""
    max_cpu_seconds: float = 7200.0
    """CPU seconds that decoding one video may take in all."""
    stall_seconds: float = 60.0
    """Seconds that a decoder may go without giving a frame, not counting those that storage takes."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.split):
            raise ValueError(f"split must be a name of lower-case letters, digits, _ and -, got {self.split!r}")
        for name in ("max_file_gb", "max_memory_gb", "max_cpu_seconds", "stall_seconds"):
            if not 0 < getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be more than 0 and at most 1,000,000, got {getattr(self, name)}")
        if self.max_memory_gb < 0.2:
            raise ValueError(f"max_memory_gb must be at least 0.2, or no decoder can start, got {self.max_memory_gb}")
        for name in ("clips_per_shard", "limit", "workers", "max_frames", "max_pixels", "min_objects", "max_objects"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(f"max_quarantined is a share in [0, 1], got {self.max_quarantined}")
        if (self.min_objects or 0) > (self.max_objects or math.inf):
            raise ValueError(f"min_objects {self.min_objects} is more than max_objects {self.max_objects}")
        objects, trims = ("clevrer", "phyre"), ("frames", "phyre")
        for name, asked, layouts in (
            ("video_range", self.video_range, ("clevrer",)),
            ("clips", self.clips != "whole", ("clevrer",)),
            ("min_objects", self.min_objects, objects),
            ("max_objects", self.max_objects, objects),
            ("drop_last", self.drop_last, trims),
            ("pad_to", self.pad_to, trims),
            ("colours", self.colours != "auto", trims),
        ):
            if asked and self.layout not in layouts:
                wanted = " or ".join(map(repr, layouts))
                raise ValueError(f"{name} is for layout {wanted}, got layout {self.layout!r}")
        if self.clips != "whole" and (self.start, self.stop) != (0, None):
            raise ValueError(f"clips={self.clips!r} says where clips start and stop; leave start and stop as they are")
        if self.clips == "provide" and self.hop is not None:
            raise ValueError("clips='provide' takes one clip of each video; leave hop as it is")
        self.numbers()
        self._check_span()
        self.preprocessing()

    def _check_span(self) -> None:
        from objdyn.clevrer import NUM_FRAMES
        from objdyn.datasets.clevrer import DDLP_FRAMES

        # PROVIDE leaves out the last frame of a video that all objects stay in.
        longest = {"provide": NUM_FRAMES - 1, "ddlp": DDLP_FRAMES[1] - DDLP_FRAMES[0]}.get(self.clips, math.inf)
        if (span := (self.frames - 1) * self.stride + 1) > longest:
            raise ValueError(
                f"clips={self.clips!r} takes clips from at most {longest} of CLEVRER's {NUM_FRAMES} frames, and "
                f"{self.frames} frames with stride {self.stride} span {span}; give fewer frames or a smaller stride"
            )

    def numbers(self) -> range | None:
        """Return the numbers that ``video_range`` names, None where it is empty.

        Raises:
            ValueError: it is not two whole numbers in order.
        """
        if not self.video_range:
            return None
        found = re.fullmatch(r"(\d+)-(\d+)", self.video_range)
        if not found or int(found[1]) > int(found[2]):
            raise ValueError(f"video_range must be FIRST-LAST, such as 10000-10999, got {self.video_range!r}")
        return range(int(found[1]), int(found[2]) + 1)

    def preprocessing(self) -> "Preprocessing":
        """Return what a reader needs of these settings.

        Raises:
            ValueError: one of them is impossible.
        """
        from objdyn.datasets.clevrer import DDLP_FRAMES
        from objdyn.datasets.phyre import DROP_LAST, PAD_TO
        from objdyn.datasets.preprocessing import Preprocessing

        phyre = self.layout == "phyre"
        corners: tuple[int, int, int, int] | None = None
        if self.crop:
            if not re.fullmatch(r"\d+,\d+,\d+,\d+", self.crop):
                raise ValueError(f"crop must be four whole numbers x0,y0,x1,y1, got {self.crop!r}")
            x0, y0, x1, y1 = (int(number) for number in self.crop.split(","))
            corners = (x0, y0, x1, y1)
        start, stop = DDLP_FRAMES if self.clips == "ddlp" else (self.start, self.stop)
        if phyre and stop is None:
            stop = PAD_TO
        drop_last, pad_to = self.drop_last, self.pad_to
        if drop_last is None:
            drop_last = DROP_LAST if phyre else 0
        if pad_to is None:
            pad_to = PAD_TO if phyre and self.split != "train" else 0
        return Preprocessing(
            frames=self.frames,
            stride=self.stride,
            hop=1 if self.clips == "provide" else self.hop,
            start=start,
            stop=stop,
            crop=corners,
            fit=self.fit,
            filter=self.filter,
            size=self.size,
            drop_last=drop_last,
            pad_to=pad_to,
            inverted=self.colours == "inverted" or (self.colours == "auto" and phyre),
        )


@dataclass(frozen=True)
class SimulateRun:
    """Simulated videos in CLEVRER's folder layout: mp4, annotation, masks and a scene file for each."""

    out: str
    """Folder or s3:// URL; the split gets a folder inside it. Finished videos that are there stay."""
    videos: int = 100
    """How many to have, from ``first`` on."""
    first: int | None = None
    """Index of the first video; None takes CLEVRER's: 0 of train, 10000 of val, 15000 of test."""
    split: Literal["train", "val", "test"] = "train"
    """The same index is another video in another split. CLEVRER's folder of val is ``validation``."""
    scene: Literal["clevrer", "towers"] = "clevrer"
    """Objects that glide and collide, or towers of cubes that stand or fall."""
    objects: str = ""
    """N or A-B: how many objects a video has; empty is 3-6, of towers 2-4."""
    seed: int = 0
    """Of all videos; each video has a seed of its own from this, the split and its index."""
    renderer: Literal["mujoco", "mitsuba"] = "mujoco"
    """What draws; mitsuba needs no system package and is slower by far."""
    height: int | None = None
    """Of the frames in pixels, even; they are half as wide again. None is CLEVRER's 320, of mitsuba 128."""
    proposals: bool = False
    """Also write the masks as CLEVRER's derender_proposals, in COCO's run lengths."""
    questions: bool = True
    """Also write ``questions/SPLIT.json`` about all videos the split then has; not of towers. Others can be written
    by make_questions.py."""
    workers: int | None = None
    """CPU slots of a Ray started by this job; None takes every core, or the cluster that is there."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if self.videos < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"videos and workers must be at least 1, got {self.videos} and {self.workers}")
        if (self.first or 0) < 0 or self.start + self.videos > 100_000:
            raise ValueError(f"an index has five digits, got {self.start} to {self.start + self.videos - 1}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.size[1] % 2 or not 16 <= self.size[1] <= 1024:
            raise ValueError(f"height must be even and 16 to 1024, got {self.height}")
        low, high = self.numbers
        least, most = (1, 8) if self.scene == "clevrer" else (2, 4)
        if not least <= low <= high <= most:
            raise ValueError(f"objects of {self.scene} must be {least} to {most}, got {self.objects!r}")

    @property
    def start(self) -> int:
        """Index of the first video."""
        return {"train": 0, "val": 10_000, "test": 15_000}[self.split] if self.first is None else self.first

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames; a video's width is even."""
        height = self.height or (320 if self.renderer == "mujoco" else 128)
        return height * 3 // 4 * 2, height

    @property
    def numbers(self) -> tuple[int, int]:
        """Fewest and most objects of a video.

        Raises:
            ValueError: ``objects`` is neither N nor A-B.
        """
        from objdyn.simulators.options import whole_range

        try:
            return whole_range(self.objects or {"clevrer": "3-6", "towers": "2-4"}[self.scene])
        except ValueError:
            raise ValueError(f"objects must be N or A-B, got {self.objects!r}") from None


@dataclass(frozen=True)
class Hdf5Run:
    """Simulated videos in one HDF5 file of R-NEM's layout, for programs that read that."""

    source: str
    """``sim:NAME`` or ``sim:NAME:KEY=VALUE,KEY=VALUE``."""
    out: str
    """File or s3:// URL to write; an earlier one is replaced."""
    train: int = 50_000
    """Videos in the group training; 0 leaves a group out. The defaults are the sizes of R-NEM's file."""
    val: int = 10_000
    """Videos in the group validation."""
    test: int = 10_000
    """Videos in the group test."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not self.source.startswith("sim:"):
            raise ValueError(f"source must be a simulator sim:NAME, got {self.source!r}")
        if not self.out.lower().endswith((".h5", ".hdf5")):
            raise ValueError(f"out must name a file FILE.h5, got {self.out!r}")
        for name in ("train", "val", "test"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.train + self.val + self.test:
            raise ValueError("train, val and test are all 0; ask for videos of one of them")


@dataclass(frozen=True)
class ReadQuestionsRun:
    """A file of CLEVRER's questions as a table."""

    source: str
    """Question file or s3:// URL: train.json, validation.json, test.json or one of that form."""
    out: str
    """Parquet file or s3:// URL to write; an earlier one is replaced. FILE.quarantine.parquet is written beside it."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not self.out.endswith(".parquet"):
            raise ValueError(f"out must name a file FILE.parquet, got {self.out!r}")


@dataclass(frozen=True)
class MakeQuestionsRun:
    """Questions about simulated videos, in CLEVRER's question file."""

    scenes: str
    """Folder or s3:// URL that simulate_clevrer.py wrote."""
    out: str
    """Question file FILE.json or s3:// URL to write; an earlier one is replaced."""
    split: Literal["train", "val", "test"] = "train"
    """Which of its splits."""
    questions: GeneratorConfig = field(default_factory=GeneratorConfig)
    """How many, and in which form."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not self.out.endswith(".json"):
            raise ValueError(f"out must name a file FILE.json, got {self.out!r}")


@dataclass(frozen=True)
class VerifyRun:
    """A folder read again from end to end: a dataset, one split of it, a training run, or tables."""

    path: str
    """Folder or s3:// URL to verify."""
    clean: bool = False
    """Remove what no manifest names: temporary files of killed jobs, shards and parts that nothing lists."""
    min_age: float = 180.0
    """Minutes since a file's last change before ``clean`` removes it: a job that still runs writes younger ones."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not self.min_age >= 0:
            raise ValueError(f"min_age must be 0 or more minutes, got {self.min_age}")


@dataclass(frozen=True)
class ExportRun:
    """Tables of latents in another form: one row per clip with dense tensors, or selected rows in one file."""

    tables: str
    """Finished folder of tables (the --out of extract.py), local or s3://."""
    out: str
    """Parquet file or s3:// URL to write; an earlier one is replaced."""
    tensor: bool = True
    """One row per clip, with a fixed-size tensor per latent; --no-tensor writes the long rows, sorted, of one table."""
    kind: Literal["posterior", "predicted", "interpolated"] = "posterior"
    """Which rows."""
    edits: bool = False
    """Also the futures of what-if edits; without it only clips as they are."""
    samples: bool = False
    """Also the futures drawn with --samples; without it only the deterministic ones."""
    columns: tuple[str, ...] = ()
    """Latents (position, which joins position_y and position_x) or single columns (position_y) to export; none given
    takes all, or with --no-tensor those of objects/."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if not self.out.endswith(".parquet"):
            raise ValueError(f"out must name a file FILE.parquet, got {self.out!r}")


@dataclass(frozen=True)
class DoctorRun:
    """A look at this machine, its Ray, its storage and the inputs before anything long is started."""

    preset: str = "ddlp/small"
    """FAMILY/PRESET whose memory, disk and hours are estimated."""
    source: str = ""
    """Folder or s3:// URL of videos of which a sample is decoded; empty skips that."""
    data: str = ""
    """Dataset folder or s3:// URL that is to be trained on; empty skips that."""
    out: str = ""
    """Folder or s3:// URL that must be writable; empty takes the folder of runs, ~/objdyn/runs."""
    layout: LayoutName = "videos"
    """What the source holds, as for make_shards.py."""
    frames: int = 20
    """Frames of a clip, for estimating the dataset that the source gives; their size is the preset's."""
    stride: int = 1
    """Source frames from one kept frame to the next, for the same estimate."""
    sample_seconds: float = 20.0
    """Longest time spent on decoding a sample of the source."""
    ray: bool = True
    """Start Ray, or ask every node of the cluster; takes some seconds."""
    train_step: bool = True
    """Run a step of the preset on one or two clips to measure its memory and time."""
    perceptual_weights: tuple[str, ...] = ()
    """File with the weights of VGG16, for presets that train with them; without it their steps are tried without."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        for name in ("frames", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.sample_seconds > 0:
            raise ValueError(f"sample_seconds must be positive, got {self.sample_seconds}")


BenchmarkPart = Literal[
    "train", "rollout", "reader", "shard", "extract", "ray-train", "workers", "reference", "sweep", "scale"
]
BENCHMARK_PARTS: tuple[BenchmarkPart, ...] = get_args(BenchmarkPart)
"""What the benchmark can measure, in the order in which it does."""


@dataclass(frozen=True)
class SweepRun:
    """One sweep: a preset trained many times with settings that a search chooses, into one folder."""

    preset: str
    """FAMILY/PRESET, such as iodine/small."""
    data: str = ""
    """Dataset folder or s3:// URL holding train and val, or sim:NAME; empty takes the preset's."""
    out: str = ""
    """Folder or s3:// URL of the sweep; each trial has its run folders in it. Empty takes the next free number under
    ~/objdyn/sweeps."""
    trials: int | None = None
    """Trials of the whole sweep; None is 20, of a resumed one as many as before, and that may ask for more."""
    search: tuple[str, ...] = ()
    """FIELD=DISTRIBUTION of what to vary: model.kl_weight=log:0.01:1 (or uniform:0:1), model.num_slots=int:3:8 (or
    logint:8:512), model.entropy_weight=choice:0,0.01,0.1."""
    ready_made: bool = False
    """Vary what the family's papers tune by hand, in ranges around the preset; --search adds to it and replaces."""
    set: tuple[str, ...] = ()
    """Settings that all trials share, as steps=400 optim.batch_size=8."""
    objective: tuple[str, ...] = ()
    """NAME:max or NAME:min of a held-out metric at the end of training (recon_psnr, predict_psnr, fg_ari, loss) or of
    its cost (step_seconds, train_seconds, parameters). Several are optimised together, to a Pareto front. None given is
    the first of fg_ari, predict_psnr and recon_psnr that there is."""
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    """How settings are chosen."""
    seed: int = 0
    """Seed of the search. Trials train with the preset's seed, and with those after it where seeds is more than 1."""
    seeds: int = 1
    """Trainings of each configuration, with different seeds; their median counts."""
    pruner: Literal["none", "asha"] = "none"
    """asha stops trials early whose held-out objective is behind (asynchronous successive halving); one objective."""
    min_steps: int | None = None
    """Of asha, optimiser steps before a trial can be stopped; None takes the first evaluation."""
    reduction: int | None = None
    """Of asha, one trial of so many goes on at each rung, and a rung has so many times the steps of the one before;
    None is 3."""
    max_concurrent: int = 1
    """Trials that train side by side."""
    retries: int = 2
    """Times that a trial is begun again, from its checkpoint, after its process died; then it has failed."""
    workers: int = 1
    """Training workers of each trial. One trains in the trial's own process, several by Ray Train."""
    separate: bool = False
    """Train each trial by Ray Train in processes of its own also where it has one worker; that costs some 10 s a
    trial, and no trial sees what another left in its process."""
    gpus: float | None = None
    """GPUs of each worker, of which 0.5 is half of one; None is one where the cluster has any, 0 trains on CPUs."""
    threads: int | None = None
    """Torch threads of each worker on a CPU; None shares the machine's cores among the trials."""
    study_storage: str = ""
    """Where Optuna keeps the sweep: a file that ends in .db or .journal, or the URL of a database. Empty is study.db in
    the sweep's folder."""
    study: str = "sweep"
    """Name of the study, for a storage that holds several."""
    resume: bool = False
    """Go on with the sweep in --out until it has --trials."""
    resume_if_exists: bool = False
    """Go on with the sweep in --out, or start it where there is none: one command for schedulers that repeat a job."""
    force: bool = False
    """With resume: go on although the code of a training step has changed, in which trials then differ."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if store.is_url(self.out) and not self.study_storage:
            raise ValueError(
                f"--out {self.out} is object storage, where Optuna cannot keep a file; give --study-storage, the URL "
                "of a database or a file that the head node keeps"
            )
        for name in ("seeds", "max_concurrent", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.reduction is not None and self.reduction < 2:
            raise ValueError(f"reduction must be at least 2, got {self.reduction}")
        for name in ("trials", "min_steps", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        if self.gpus is not None and not (self.gpus >= 0 and (self.gpus <= 1 or self.gpus == int(self.gpus))):
            raise ValueError(f"gpus must be a share of a GPU up to 1, or a whole number, got {self.gpus}")
        if self.workers > 1 and self.gpus is not None and 0 < self.gpus < 1:
            raise ValueError(
                f"a share of a GPU (gpus={self.gpus}) is for trials of one worker, got workers={self.workers}"
            )
        for name in ("min_steps", "reduction"):
            if self.pruner == "none" and getattr(self, name) is not None:
                raise ValueError(f"{name} is of the pruner; add --pruner asha")
        if self.pruner == "asha" and len(self.objective) > 1:
            raise ValueError(
                f"pruner=asha judges trials by one objective, got {', '.join(self.objective)}; leave out --pruner, or "
                "keep one objective"
            )
        if not self.study:
            raise ValueError("study needs a name")


@dataclass(frozen=True)
class BenchmarkRun:
    """Where the time goes, for one family and preset: the model's steps, and each stage beside the same work bare."""

    family: str
    """Model family."""
    preset: str = "small"
    """Preset of that family."""
    out: str = ""
    """File or s3:// URL that gets the numbers as JSON; empty only prints them."""
    parts: tuple[BenchmarkPart, ...] = ()
    """What to measure; none given measures everything but ``workers``, what two workers of one thread are beside one,
    which takes two idle cores, and, the same for every family, ``sweep``, what a sweep adds to the training of its
    trials, and ``scale``, the constants and predictions of pipeline/SCALE.md. ``reference``, the comparison in fixed
    settings with the authors' code (ddlp, iodine, provide, oddn) or the textbook's (ddlp, ssm), is of these families
    alone."""
    pairs: int = 5
    """Alternating pairs of a stage and the same work bare, and repetitions of the rest; the median is reported."""
    steps: int = 3
    """Optimiser steps of each measurement of training, after one that is not counted."""
    threads: int | None = None
    """Torch threads on CPU; None takes every core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    scratch: str = ""
    """Folder for generated data, removed at the end; every node must see it. Empty takes the temporary one."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in BENCHMARK_PARTS]:
            raise ValueError(f"unknown part {unknown[0]!r} of the benchmark; choose from {', '.join(BENCHMARK_PARTS)}")
        for name in ("pairs", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {self.threads}")


def with_overrides(run: Any, overrides: dict[str, Any]) -> Any:
    """Return a copy of a run with dotted fields replaced: ``{"optim.lr": 3e-4, "model.num_particles": 8}``.

    Raises:
        ValueError: a name is not a field; the message lists the fields that exist there.
    """
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        head, _, rest = path.partition(".")
        names = [f.name for f in dataclasses.fields(run)]
        if head not in names:
            raise ValueError(f"{type(run).__name__} has no field {head!r} (in {path!r}); it has {', '.join(names)}")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    for head, inner in nested.items():
        changes[head] = with_overrides(changes.get(head, getattr(run, head)), inner)
    return dataclasses.replace(run, **changes)  # at once: a field may only be possible with the others


def parse_settings(words: Sequence[str], run: Any) -> dict[str, Any]:
    """Read ``NAME=VALUE`` as settings of a run, for ``with_overrides``; lists are JSON or have commas between.

    Raises:
        ValueError: a word is no NAME=VALUE, its name is no field or comes twice, or its value is of another type.
    """
    settings: dict[str, Any] = {}
    for word in words:
        name = word.partition("=")[0]
        if name == word:
            raise ValueError(f"{word!r} is not of the form NAME=VALUE")
        if name in settings:
            raise ValueError(f"{name} is given twice")
        settings[name] = _parse_word(word, type_of(run, name))
    return settings


def parse_model_settings(words: Sequence[str], config: Any) -> dict[str, Any]:
    """Read ``model.NAME=VALUE`` as settings of a model's config: ``{"num_slots": 9}``.

    Raises:
        ValueError: a name is no field of the config or comes twice, or a value is of another type.
    """
    hints = typing.get_type_hints(cast(Any, type(config)))
    settings: dict[str, Any] = {}
    for word in words:
        name = word.partition("=")[0].removeprefix("model.")
        if name not in hints:
            raise ValueError(f"{type(config).__name__} has no field {name!r} (in {word!r}); it has {', '.join(hints)}")
        if name in settings:
            raise ValueError(f"model.{name} is given twice")
        settings[name] = _parse_word(word, hints[name])
    return settings


def recorded_model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Changed settings of a model as JSON holds them beside what was made with them: ``{"model.num_slots": 9}``."""
    listed = {name: list(cast("tuple[Any, ...]", v)) if isinstance(v, tuple) else v for name, v in settings.items()}
    return {f"model.{name}": value for name, value in listed.items()}


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested settings as ``with_overrides`` does: ``{"optim": {"lr": 3e-4}}`` becomes ``{"optim.lr": 3e-4}``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


@dataclass(frozen=True)
class FetchWeightsRun:
    """The weights of a perceptual network as one safetensors file, from the official ones."""

    network: Literal["vgg16", "alexnet"] = "vgg16"
    """vgg16 serves the perceptual loss and the LPIPS that DDLP reports; alexnet LPIPS alone."""
    out: str = ""
    """File to write, local or s3://; empty is ~/weights/NETWORK.safetensors."""
    trunk: str = ""
    """Official file of the network (vgg16-397923af.pth, alexnet-owt-7be5be79.pth) that is here already, or its features
    as safetensors; empty downloads it."""
    heads: str = ""
    """Official file of LPIPS 0.1 (vgg.pth, alex.pth) that is here already, or safetensors; empty takes torchmetrics' or
    downloads it."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Object storage, wherever a path is s3://."""


def torch_device(name: str, workers: int = 1) -> torch.device:
    """The device that a run's ``device`` names; ``auto`` is the GPU if there is one and one process uses it.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available and workers == 1 else "cpu")
    if name == "cuda" and not available:
        raise ValueError("device=cuda, but torch sees no GPU on this machine; use --device cpu or install a CUDA build")
    return torch.device(name)
