"""The training loop: a plain function of torch, without Ray, pyarrow or a command-line library.

    python -m pipeline.loop small --data sim:balls-interaction --out RUN     (any machine with torch)

``train.py`` calls the same function inside Ray Train's workers; what differs there arrives in a ``Worker``. The run
folder is the only truth: whoever starts the loop on it goes on from ``last.json``, also after Ray restarted a worker.

What makes a resumed run bit-identical on a CPU: the order of samples and the windows inside clips follow from (seed,
position), torch is seeded before every micro-batch from the same, the optimiser's state is stored exactly, and no
other random state lives longer than one micro-batch. Whether a stage of a curriculum is over is told from numbers that
``state.json`` holds, so a run killed at the end of a stage goes on with the next.

A run that is asked to end (see ``stop.py``) saves the step that it is at, between two checkpoints if need be. Its
weights go on as if nothing had been; ``metrics.jsonl`` then has a line more, since the means begin anew.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from objdyn import clips, families
from objdyn.metrics import segmentation
from pipeline import checkpoint, claim, failpoints, perceptual, status, stop, store, watchdog
from pipeline.config import (
    Stage,
    TrainRun,
    flatten_settings,
    learning_rate,
    parse_settings,
    torch_device,
    with_overrides,
)
from pipeline.presets import PRESETS
from pipeline.reader import MicroBatch, Source, TrainingReader, has_split, iter_clips, open_source

MAX_SKIPPED = 5
"""Steps in a row with a non-finite loss or gradient after which the run stops."""
NAMES_SHOWN = 8
"""Names of clips or parameters in a message; ``metrics.jsonl`` has every clip."""
PUBLISH_SECONDS = 30.0
"""How often metrics are published where they cannot be appended."""
EVAL_HORIZON = 10
"""Predicted frames of the held-out evaluation during training, if the clips are long enough."""
SMOOTHING_STEPS = 50
"""Steps over which the loss of a stage is smoothed before it is judged; ``patience`` if that is less."""
STAGNATION = 0.01
"""Share of itself by which the smoothed loss must fall within ``patience`` steps."""
ASK_SECONDS = 2.0
"""How often workers ask together whether they must stop, where somebody can tell."""
PHASES = ("data", "model", "optimizer", "eval", "checkpoint")
"""What the time of a training goes to: waiting for data; forward, backward and, of several workers, waiting for each
other; the optimiser; held-out evaluations; checkpoints and metrics. Of a GPU, which works behind the program, a step's
time ends where the program asks whether its loss is finite, so its optimiser counts to the step that follows."""
CLOCK_FIELDS = frozenset({"steps_per_second", "retries", *(f"{phase}_seconds" for phase in PHASES)})
"""Fields of metrics that differ between two runs that do the same: the clock and the storage decide them."""
MAX_ERROR = 1e-10
"""Smallest mean squared error in a PSNR: a perfect frame counts as 100 dB."""


@dataclass(frozen=True)
class Worker:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1
    local_world: int = 1
    """Workers on this machine, which share its cores."""
    device: torch.device | None = None
    """Where to train; None decides from ``run.device``."""
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    """Wraps the model for distributed training (DDP)."""
    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    """Called on every worker with the metrics at each checkpoint."""
    show: Callable[[dict[str, Any]], None] = lambda metrics: None
    """Called on worker 0 with each line of metrics."""
    leaving: Callable[[], bool] | None = None
    """Called on all workers after the same step, every ``ASK_SECONDS``: whether they must stop."""


@store.job_into_folder
def open_run(run: TrainRun) -> TrainRun:
    """Create the run folder with its ``config.json``, or check that the run in it may be continued.

    One clip of each split goes through the model of each stage first, so that data, model and run are known to fit
    before a folder is made or a worker started.

    Returns:
        The run with every path resolved.

    Raises:
        ValueError: the data do not fit; or the folder holds a run and ``resume`` was not asked for, or holds none and
            it was; or ``force`` was asked for without either flag to resume; or the stored run has other settings, code
            or perceptual weights, without ``force``; or the folder is not empty and not a run; or the weights to
            start from do not fit; or perceptual ones are missing or wrong.
    """
    again = run.resume or run.resume_if_exists
    if again and not run.out:
        flag = "--resume" if run.resume else "--resume-if-exists"
        raise ValueError(f"{flag} needs --out, the folder of the run to continue")
    if run.force and not again:
        raise ValueError("--force needs --resume: it continues a run although its settings, code or data changed")
    perceptual.require(run)
    run = resolve_paths(run)
    if not run.out:
        run, stored = _try(run)
        run = dataclasses.replace(run, out=next_free_folder(families.family_of(run.model)))
        stored["run"]["out"] = run.out
        store.publish_json(store.join(run.out, "config.json"), stored)
        return run
    out = store.resolve(run.out, "--out")
    run = dataclasses.replace(run, out=out)
    path = store.join(out, "config.json")
    if run.resume_if_exists:
        run = dataclasses.replace(run, resume=run.resume or store.exists(path), resume_if_exists=False)
    if not run.resume:
        if store.exists(path):
            raise ValueError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
        # A run that was killed before it had a config.json leaves nothing that counts.
        if names := [n for n in store.list_names(out) if not (store.is_temporary(n) or claim.is_claim(n))]:
            raise ValueError(f"{out} is not empty (it holds {names[0]}) and holds no run; choose another --out")
        run, stored = _try(run)
        store.publish_json(path, stored)
        return run
    store.remove(store.join(out, stop.FILE))
    if not store.exists(path):
        raise ValueError(f"{out} holds no run (no config.json), so there is nothing to resume; leave out --resume")
    before = store.read_json(path)
    if (start := before.get("init")) and run.init and f"{start['checkpoint']}/".startswith(f"{run.init}/"):
        run = dataclasses.replace(run, init=start["checkpoint"])  # of the run folder given, wherever that is by now
    stored = _stored(run, start, perceptual.open_distance(run))
    differences = _differences(before, stored)
    if not run.force:
        if differences:
            raise ValueError(
                f"{out} was started with other {' and '.join(differences)}; repeat that, add --force to go on all the "
                "same, or choose another --out"
            )
        _refuse_other_annealing(run, before["run"]["steps"])
    forced = before.get(_FORCED, [])
    if differences:
        forced = [*forced, {"step": checkpoint.last_step(out) or 0, "changes": list(differences)}]
    # steps and intervals may grow
    store.publish_json(path, {**stored, _FORCED: forced} if forced else stored)
    return run


@contextlib.contextmanager
def opened(run: TrainRun) -> Iterator[tuple[TrainRun, claim.Claim]]:
    """``open_run`` with the folder held against other jobs.

    Raises:
        ValueError: as ``open_run``, or another job works in the folder.
    """
    with store.using(run.storage):
        new = not run.out  # then nobody else has the folder
        run = open_run(run) if new else dataclasses.replace(run, out=store.resolve(run.out, "--out"))
        store.require_create(run.out)
        with claim.hold(run.out, "train") as held:
            yield run if new else open_run(run), held


def resolve_paths(run: TrainRun) -> TrainRun:
    """The run with absolute paths of what it reads.

    Raises:
        ValueError: a path cannot be meant, see ``store.resolve``.
    """
    return dataclasses.replace(
        run,
        data=store.resolve(run.data, "--data"),
        stages=_resolve_stages(run),
        init=run.init and store.resolve(run.init, "--init"),
        perceptual_weights=tuple(store.resolve(path, perceptual.FLAG) for path in run.perceptual_weights),
    )


@store.job
def train(run: TrainRun, worker: Worker | None = None) -> str:
    """Train until ``run.steps`` and return the path of the last checkpoint.

    ``run`` comes from ``open_run``. Goes on from the folder's last checkpoint if it has one. Worker 0 is the only one
    to write: it holds the folder as its ``writer``, once a worker of an earlier driver or attempt is gone.

    Raises:
        ValueError: data that does not fit the model, a damaged checkpoint, another dataset than the run began with; or
            an earlier worker still writes after ``claim.PATIENCE``, or another has taken this one for dead.
        FloatingPointError: a loss or gradient was not finite ``MAX_SKIPPED`` steps in a row, or a weight or the
            optimiser's state no longer is; the last checkpoint stays as it was.
        Preempted: the run was asked to end before; all workers stopped after the same step, which is saved.
    """
    worker = worker or Worker()
    with (
        stop.requests(run.out, look=worker.rank == 0) as asked,
        watchdog.watched(f"worker {worker.rank}", run.stall_seconds) as moved,
    ):
        return _train(run, worker, asked.is_set, moved)


def _train(run: TrainRun, worker: Worker, asked: Callable[[], bool], moved: Callable[[str], None]) -> str:
    device = worker.device or torch_device(run.device, run.workers)
    if device.type == "cpu":
        torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // worker.local_world))
    with contextlib.ExitStack() as stack:
        held = None
        if worker.rank == 0:
            patience = min(claim.PATIENCE, run.stall_seconds / 2)  # the others wait for this one
            held = stack.enter_context(claim.hold(run.out, "train", kind="writer", wait=patience, moved=moved))
            moved("the folder is held")
        if worker.world > 1:
            dist.barrier()  # so that all read the checkpoint that the last writer left
        training = _Training(run, worker, device, asked, moved, held)
        if training.step >= run.steps:
            return training.path
        log = stack.enter_context(MetricsLog(run.out, training.step, training.check)) if worker.rank == 0 else None
        if run.stages and training.step == 0:
            training.tell_stage(log, "start")
        if training.forced:
            _emit(log, worker, {"kind": "forced", "step": training.step + 1, "changes": training.forced})
        while training.step < run.steps:
            if reason := training.stage_is_over():
                training.begin_next_stage()
                training.tell_stage(log, reason)
            training.train_stage(log)
        return training.path


@dataclass
class StageClock:
    """Where a run stands in a stage, and whether that is over: a function of losses that are the same on every worker.

    The fields are in ``state.json``, so that a resumed run decides as it would have.
    """

    number: int = 1
    """The stage, from 1."""
    begin: int = 0
    """Optimiser steps before it."""
    loss: float | None = None
    """Smoothed: the mean of the first ``SMOOTHING_STEPS``, from then on a moving average of the same weight."""
    kl: float | None = None
    """The same of the loss term ``kl``."""
    lowest: float | None = None
    """The smoothed loss when it had last fallen by ``STAGNATION``; None while there is none."""
    fell_at: int = 0
    """The step of that."""
    kl_rose: bool = False
    """Whether the smoothed ``kl`` has been at ``min_kl`` or above: an untrained posterior has not collapsed."""

    def add(self, stage: Stage, step: int, loss: float, kl: float | None) -> None:
        """Take in the loss of the step that made ``step`` completed ones."""
        window = min(SMOOTHING_STEPS, stage.patience or SMOOTHING_STEPS)
        count = step - self.begin
        weight = 1 / min(count, window)
        self.loss = loss if self.loss is None else self.loss + weight * (loss - self.loss)
        if kl is not None:
            self.kl = kl if self.kl is None else self.kl + weight * (kl - self.kl)
        if count < window:
            return
        if self.lowest is None or self.loss < self.lowest - STAGNATION * abs(self.lowest):
            self.lowest, self.fell_at = self.loss, step
        if stage.min_kl is not None and self.kl is not None and self.kl >= stage.min_kl:
            self.kl_rose = True

    def reason(self, stage: Stage, step: int) -> str | None:
        """Why the stage is over after ``step`` completed optimiser steps: "steps", "collapsed", "stagnated" or None."""
        if stage.steps is not None and step - self.begin >= stage.steps:
            return "steps"
        if stage.min_kl is not None and self.kl is not None and self.kl_rose and self.kl < stage.min_kl:
            return "collapsed"
        if stage.patience is not None and self.lowest is not None and step - self.fell_at >= stage.patience:
            return "stagnated"
        return None


class _Training:
    """One worker's side of a run: where it stands, and what its steps change.

    Raises:
        ValueError: as ``train``.
    """

    def __init__(
        self,
        run: TrainRun,
        worker: Worker,
        device: torch.device,
        asked: Callable[[], bool],
        moved: Callable[[str], None],
        held: claim.Claim | None = None,
    ) -> None:
        self.run, self.worker, self.device = run, worker, device
        self.asked, self.moved, self.held = asked, moved, held
        self.check: Callable[[], None] = held.check if held is not None else lambda: None
        self.asked_at = time.monotonic()
        self.step = self.position = self.skipped = 0
        self.best: float | None = None
        self.path = ""
        self.start: dict[str, Any] | None = None
        self.clock = StageClock()
        saved = checkpoint.load_last(run.out)
        if saved is not None:
            self.clock = StageClock(**saved.state.get("stage", {}))
        if self.clock.number > len(run.parsed_stages):
            raise ValueError(f"{run.out} stands in stage {self.clock.number}; the run has {len(run.parsed_stages)}")
        self._open_stage()
        family = families.family_of(self.part.model)
        if saved is not None and saved.state.get("family") != family:
            raise ValueError(
                f"{saved.path} is of family {saved.state.get('family')}, the run in {run.out} of {family}; restore the "
                "checkpoint, or choose another --out"
            )
        config = store.read_json(store.join(run.out, "config.json"))
        now = saved.step if saved is not None else 0
        self.forced = [text for entry in config.get(_FORCED, ()) if entry["step"] == now for text in entry["changes"]]
        if saved is not None and saved.state["dataset_id"] != self.source.id:
            if not run.force:
                raise ValueError(
                    f"{run.out} was trained on dataset {saved.state['dataset_id']}, but {self.part.data} is "
                    f"{self.source.id}; give the same data, add --force to go on with these, or choose another --out"
                )
            self.forced.append(f"data (dataset was {saved.state['dataset_id']} and is {self.source.id})")
        self.distance = perceptual.open_distance(run, device)
        if self.distance and not _same_weights(self.distance, config):
            raise ValueError(
                f"{', '.join(run.perceptual_weights)} has changed since {run.out} was opened with it; restore it, or "
                "choose another --out"
            )
        torch.manual_seed(run.seed)
        self._build()
        if saved is not None:
            checkpoint.restore(saved, self.model, self.optimizer)
            self.step, self.path = saved.step, saved.path
            for group in self.optimizer.param_groups:  # others than the checkpoint's only where that was forced
                group |= {"betas": self.part.optim.betas, "eps": self.part.optim.eps}
            batch = self.part.optim.batch_size
            self.position, self.best = -(-saved.state["position"] // batch) * batch, saved.state["best"]
            self.start = saved.state.get("init")
            if worker.rank == 0:
                checkpoint.retire(run.out, keep_last=run.keep_last)  # which the run may have been killed before or in
        elif run.init:
            self.start = _start_from(run, self.model)
        self.watch, self.retries = status.Stopwatch(), store.retries()

    def stage_is_over(self) -> str | None:
        """Why the next stage must begin; None while it must not."""
        return self.clock.reason(self.stage, self.step) if self.clock.number < len(self.run.stages) else None

    def begin_next_stage(self) -> None:
        """Go to the next stage: its data from the beginning, its model with these weights, Adam with its averages."""
        model, optimizer = self.model, self.optimizer
        self.clock = StageClock(self.clock.number + 1, begin=self.step, fell_at=self.step)
        self.position, self.best = 0, None
        self._open_stage()
        with torch.random.fork_rng(devices=[]):
            self._build()
        checkpoint.carry_over(model, optimizer, self.model, self.optimizer)

    def tell_stage(self, log: "MetricsLog | None", reason: str) -> None:
        """Log the stage that begins, and why the one before it ended.

        Under the first step of the stage: the last step of the one before may be saved, and its lines then stay.
        """
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in self.stage.settings.items()}
        line = {"kind": "stage", "step": self.step + 1, "stage": self.clock.number, "reason": reason}
        _emit(log, self.worker, {**line, "settings": settings})

    def train_stage(self, log: "MetricsLog | None") -> None:
        """Train until the stage or the run is over."""
        run, worker, model, optimizer = self.part, self.worker, self.model, self.optimizer
        reader = TrainingReader(
            self.source,
            clip_frames=run.clip_frames,
            batch_size=run.optim.batch_size,
            micro_batch_size=run.micro_batch_size,
            seed=_stage_seed(run.seed, self.clock.number),
            loader=run.loader,
            inputs=self.family.inputs,
            rank=worker.rank,
            world=worker.world,
        )
        wrapped = worker.wrap(model)
        accumulate = run.optim.batch_size // (run.micro_batch_size * worker.world)
        window = _Window()
        self.watch.lap("start")
        over = False
        with contextlib.closing(reader.micro_batches(self.position)) as batches:
            while self.step < run.steps and not over:
                families.set_step(model, self.step)
                model.train()
                optimizer.zero_grad()
                keys: list[str] = []
                terms: dict[str, Tensor] = {}
                for index in range(accumulate):
                    batch = next(batches)
                    self.watch.lap("data")
                    keys += batch.keys
                    with _no_sync(wrapped, index < accumulate - 1):
                        loss = _loss(wrapped, batch, run, self.device)
                        (loss.total / accumulate).backward()
                    self.moved(f"micro-batch {index + 1} of {accumulate} of step {self.step + 1}")
                    for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
                        terms[name] = terms.get(name, torch.zeros_like(value)) + value / accumulate
                    self.watch.lap("model")
                self.position += run.optim.batch_size

                norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                failpoints.reach("step", f"worker {worker.rank} step {self.step + 1:08d}")
                finite = torch.isfinite(terms["loss"]) & torch.isfinite(norm)
                ask = worker.leaving is not None and time.monotonic() - self.asked_at > ASK_SECONDS
                finite, stopping, ask = _agree(finite, self.asked(), worker.rank == 0 and ask, worker.world)
                if not finite:  # nothing that may be saved, if it was asked to
                    self._skip(log, keys, terms)
                    continue
                self.watch.lap("model")
                self.skipped = 0
                window.add(terms)
                if run.optim.clip_norm is not None:
                    nn.utils.clip_grads_with_norm_(model.parameters(), run.optim.clip_norm, norm)
                for group, factor in zip(optimizer.param_groups, self.factors, strict=True):
                    group["lr"] = learning_rate(run.optim, self.step, run.steps, factor)
                optimizer.step()
                self.step += 1
                self._watch(terms)
                self.watch.lap("optimizer")
                over = self.stage_is_over() is not None
                if ask and worker.leaving is not None:
                    self.asked_at = time.monotonic()
                    stopping |= worker.leaving()
                stopping &= self.step < run.steps
                if self._log_and_save(log, window, over, stopping):
                    window = _Window()
                if stopping:
                    raise stop.Preempted(
                        f"preempted at step {self.step} of {run.steps}, which is saved; run the same command with "
                        "--resume to go on"
                    )

    def _open_stage(self) -> None:
        self.stage = self.run.parsed_stages[self.clock.number - 1]
        run = self.part = self.run.stage(self.clock.number - 1)
        self.family = families.describe(run.model)
        self.source = open_source(run.data, "train", loader=run.loader)
        self.held_out = open_source(run.data, "val", loader=run.loader) if has_split(run.data, "val") else None
        if self.held_out is None and run.eval_every and self.worker.rank == 0:
            note = f"note: {run.data} has no split 'val', so nothing is evaluated while training"
            print(note, file=sys.stderr, flush=True)

    def _build(self) -> None:
        optim = self.part.optim
        self.model = families.build(self.part.model).to(self.device)
        families.set_perceptual(self.model, self.distance and self.distance.distance)
        self.factors, groups = _parameter_groups(self.model, self.part)
        self.optimizer = torch.optim.Adam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def _skip(self, log: "MetricsLog | None", keys: list[str], terms: Mapping[str, Tensor]) -> None:
        self.skipped += 1
        keys, names = _not_finite(keys, terms, self.model, self.worker.world)
        # The step that was tried, not the one before: that one may be saved, and its lines then stay.
        tried = self.step + 1
        _emit(log, self.worker, {"kind": "skipped", "step": tried, "not_finite": names, "clips": keys})
        if self.skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"{_listed(names)} not finite {MAX_SKIPPED} steps in a row, last in step {tried} on clips "
                f"{_listed(keys)}; start again with a lower optim.lr or with optim.clip_norm"
            )

    def _watch(self, terms: Mapping[str, Tensor]) -> None:
        """Feed the stage's clock, if the loss can end the stage, with the means over all workers."""
        if not self.stage.has_trigger:
            return
        watched = [terms[name].float() for name in ("loss", "kl") if name in terms]
        loss, *kl = (_sum_over_workers(torch.stack(watched), self.worker.world) / self.worker.world).tolist()
        self.clock.add(self.stage, self.step, loss, kl[0] if kl else None)

    def _log_and_save(self, log: "MetricsLog | None", window: "_Window", over: bool, stopping: bool) -> bool:
        """Do what is due after a step: a line of metrics, an evaluation, a checkpoint. Whether the window was told."""
        run, worker, step, model = self.part, self.worker, self.step, self.model
        last = step == run.steps
        due = step % run.checkpoint_every == 0 or last
        save = due or stopping
        if self.held is not None and (save or self.held.lost):
            self.check()  # before the metrics, too: they are another's by now
        # a run that goes on from a checkpoint, or with another stage, begins with an empty window
        told = step % run.log_every == 0 or save or over
        if told:
            line = {
                "kind": "train",
                "step": step,
                "steps": run.steps,
                **window.mean(worker.world),
                "lr": self.optimizer.param_groups[0]["lr"],
                "skipped": log.skipped if log is not None else 0,
                **self._take_times(window.steps),
            }
            _emit(log, worker, line)
            self.watch.lap("checkpoint")
        improved = False
        if self.held_out is not None and run.eval_every and (step % run.eval_every == 0 or last):
            families.set_step(model, step)
            held = evaluate(model, self.held_out, run, self.device, worker.rank, worker.world, self.moved)
            self.check()  # it took minutes
            _emit(log, worker, {"kind": "eval", "step": step, **held})
            psnr_is_known = math.isfinite(held["recon_psnr"])
            improved = due and psnr_is_known and (self.best is None or held["recon_psnr"] > self.best)
            self.best = held["recon_psnr"] if improved else self.best
            self.watch.lap("eval")
        if save:
            if log is not None:
                families.set_step(model, step)
                log.sync()  # first, so that no checkpoint is without its metrics
                self.path = checkpoint.save_checkpoint(
                    self.run.out, step, model=model, optimizer=self.optimizer, state=self._state(),
                    keep_last=run.keep_last, best=improved, passing=not due, moved=self.moved,
                    check=self.check,
                )  # fmt: skip
            worker.report({"step": step})
            self.watch.lap("checkpoint")
        self.moved(f"step {step}")
        return told

    def _take_times(self, steps: int) -> dict[str, Any]:
        """The ``CLOCK_FIELDS`` of a line about so many steps; the next line's begin at zero."""
        seconds, self.watch.seconds = {phase: self.watch.seconds.get(phase, 0.0) for phase in PHASES}, {}
        stepping = seconds["data"] + seconds["model"] + seconds["optimizer"]
        before, self.retries = self.retries, store.retries()
        return {
            "steps_per_second": steps / max(stepping, 1e-9),
            **{f"{phase}_seconds": value for phase, value in seconds.items()},
            "retries": self.retries - before,
        }

    def _state(self) -> dict[str, Any]:
        state = {
            "family": families.family_of(self.part.model),
            "run": _stored(self.run)["run"],
            "model": checkpoint.config_to_json(self.part.model),
            "dataset_id": self.source.id,
            "position": self.position,
            "best": self.best,
        }
        if self.run.stages:
            state["stage"] = dataclasses.asdict(self.clock)
        if self.start is not None:
            state["init"] = self.start
        if self.distance is not None:
            state["perceptual"] = self.distance.record
        return state


def evaluate(
    model: Any,
    source: Source,
    run: TrainRun,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    moved: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Held-out loss, reconstruction and prediction PSNR, with "copy the last frame" beside; no noise anywhere.

    Where the clips have a true segmentation, also ``fg_ari``: foreground ARI per frame of the reconstruction's masks.
    Each worker takes every ``world``-th of the first ``run.eval_clips`` clips; the means are over all of them.
    ``moved`` is called after each clip.
    """
    family = families.describe(run.model)
    context = run.clip_frames - 1 if run.clip_frames > 1 else 1
    horizon = min(EVAL_HORIZON, source.num_frames - context) if "rollout" in family.verbs else 0
    names = ["loss", "recon_psnr", "fg_ari"]
    names += ["predict_psnr", "copy_last_predict_psnr"] if horizon > 0 else []
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    model.eval()
    with torch.no_grad():
        wanted = (*family.inputs, "segmentation")
        longest = max(context + horizon, run.clip_frames)
        chosen = iter_clips(source, limit=run.eval_clips, length=longest, truth=wanted)
        for index, clip in enumerate(chosen):
            if index % world != rank:
                continue
            video = clips.to_model_input(clips.collate([clip]), device)
            inputs: dict[str, Any] = {**clips.stack_truth([clip], family.inputs, device)}
            seen = video[:, : run.clip_frames]
            truth = clip.truth.get("segmentation")
            scene = model.decode(model.encode(seen, **inputs), components=truth is not None)
            values = {"loss": float(model(seen, **inputs).total), "recon_psnr": psnr(scene.video, seen)}
            if truth is not None and scene.masks is not None:
                predicted = segmentation.segment(scene.masks.float().cpu().numpy())
                scores = segmentation.frame_ari(truth[None, : run.clip_frames], predicted, foreground=True)
                values["fg_ari"] = float(scores.mean())
            if horizon > 0:
                future = video[:, context : context + horizon]
                predicted = families.predict(model, video[:, :context], horizon, **inputs).video
                values["predict_psnr"] = psnr(predicted, future)
                values["copy_last_predict_psnr"] = psnr(video[:, context - 1 : context].expand_as(future), future)
            for name, value in values.items():
                sums[name] += value
                counts[name] += 1
            moved(f"clip {index + 1} of the evaluation")
    table = torch.tensor([[sums[name], counts[name]] for name in names], dtype=torch.float64)
    table = _sum_over_workers(table.to(device) if device.type == "cuda" else table, world)
    found = {name: (float(total), int(count)) for name, (total, count) in zip(names, table.tolist(), strict=True)}
    return {name: total / count for name, (total, count) in found.items() if count}


def reported_metrics(run: TrainRun) -> set[str]:
    """Names of the held-out metrics that a training reports at its end: one clip is evaluated by an untrained model.

    Raises:
        ValueError: it reports none, having no split ``val`` or no evaluation; the message says what to do.
    """
    last = run.stage(len(run.parsed_stages) - 1)
    if not run.eval_every:
        raise ValueError("the run evaluates nothing (eval_every=0); give eval_every=N optimiser steps")
    if not has_split(last.data, "val"):
        raise ValueError(f"{last.data} has no split 'val', so nothing is evaluated while training; make one")
    source = open_source(last.data, "val", loader=run.loader)
    distance = perceptual.open_distance(run)
    with torch.random.fork_rng(devices=[]):
        model = families.build(last.model)
    families.set_perceptual(model, distance and distance.distance)
    return set(evaluate(model, source, dataclasses.replace(last, eval_clips=1), torch.device("cpu")))


def psnr(video: Tensor, truth: Tensor) -> float:
    """PSNR of each frame in dB for values in [0, 1], then the mean; ``metrics.image`` without its library."""
    error = (video - truth).square().flatten(2).mean(-1).clamp_min(MAX_ERROR)
    return float((-10 * error.log10()).mean())


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events of a run folder.

    Lines after the step that a run resumes from are dropped first, so every step stands once. On object storage, where
    nothing can be appended, both are collected locally and published every ``PUBLISH_SECONDS`` and at each checkpoint,
    each time after ``check``, which raises when they are another writer's by now.
    """

    def __init__(self, out: str, step: int, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.path = store.join(out, "metrics.jsonl")
        self.remote = store.is_url(out)
        kept = read_metrics(out, step)
        self.lines = [json.dumps(line) for line in kept]
        self.skipped = sum(line["kind"] == "skipped" for line in kept)
        """Steps skipped since the run began."""
        store.publish(self.path, "".join(f"{line}\n" for line in self.lines).encode())
        self.out = out
        self.events = tempfile.mkdtemp(prefix="objdyn-events-") if self.remote else store.join(out, "tensorboard")
        self.writer = _summary_writer(self.events, step)
        self.published = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, claim.LostError):  # else the file is another's by now
            with contextlib.suppress(claim.LostError):  # also where what ended this writer was something else
                self.sync()
        if self.writer is not None:
            self.writer.close()

    def write(self, line: dict[str, Any]) -> None:
        """Add one line; a number that is not finite becomes null, since JSON has none such."""
        self.skipped += line["kind"] == "skipped"
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        text = json.dumps(known, allow_nan=False)
        self.lines.append(text)
        if not self.remote:
            self._append(f"{text}\n".encode())
        elif time.monotonic() - self.published > PUBLISH_SECONDS:
            self.sync()
        if self.writer is not None:
            with store.naming(self.events):
                for name, value in line.items():
                    if isinstance(value, float):
                        self.writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def sync(self) -> None:
        """Make everything so far durable, on object storage by publishing it.

        Raises:
            LostError: it would have replaced what another writer publishes.
        """
        if self.writer is not None:
            with store.naming(self.events):
                self.writer.flush()
        if not self.remote:
            with store.naming(self.path), open(self.path, "ab") as file:
                os.fsync(file.fileno())
        else:
            self.check()
            store.publish(self.path, "".join(f"{line}\n" for line in self.lines).encode())
            for name in os.listdir(self.events):
                with open(os.path.join(self.events, name), "rb") as file:
                    self.check()
                    store.publish(store.join(self.out, "tensorboard", name), file.read())
            self.published = time.monotonic()

    def _append(self, data: bytes) -> None:
        half = len(data) // 2
        with store.naming(self.path), open(self.path, "ab") as file:
            file.write(data[:half])
            file.flush()
            failpoints.reach("append", self.path)
            file.write(data[half:])


def read_metrics(out: str, step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, up to ``step`` where given; a half-written last line is left out."""
    path = store.join(out, "metrics.jsonl")
    if not store.exists(path):
        return []
    whole = store.read_bytes(path).decode().rpartition("\n")[0]
    try:
        lines = [store.loads(line) for line in whole.splitlines() if line]
        return [line for line in lines if step is None or line["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a line that is none of a run's ({error!r}); restore it from a copy") from error


STAGE_ENDS = {
    "steps": "the one before has had its steps",
    "stagnated": "the loss stagnated",
    "collapsed": "the posterior collapsed",
}
"""Why a stage ended, by the ``reason`` in the next one's line of metrics."""


class Progress:
    """The status of a training, from its lines of metrics: one line each in a log, a bar on a terminal."""

    def __init__(self, steps: int, done: int = 0, file: TextIO | None = None, family: str = "") -> None:
        self.status = status.Status("train", steps, "steps", done=done, split="train", family=family, file=file)

    def show(self, line: dict[str, Any]) -> None:
        """Show a line of metrics."""
        said = self.status
        hidden = CLOCK_FIELDS | {"lr"}
        text = "  ".join(f"{name} {v:.4g}" for name, v in line.items() if isinstance(v, float) and name not in hidden)
        text += f"  skipped {line['skipped']}" if line.get("skipped") else ""
        if line["kind"] == "forced":
            said.say(f"from step {line['step']} on by force with other {' and '.join(line['changes'])}")
        elif line["kind"] == "eval":
            said.measure(**{f"held_out_{name}": value for name, value in line.items() if isinstance(value, float)})
            said.say(f"held out at step {line['step']}: {text}")
        elif line["kind"] == "stage":
            settings = ", ".join(f"{name}={value}" for name, value in line["settings"].items())
            why = "" if line["reason"] == "start" else f" ({STAGE_ENDS.get(line['reason'], line['reason'])})"
            said.say(f"stage {line['stage']} begins at step {line['step']}{why}: {settings or 'the run as it is'}")
        elif line["kind"] == "skipped":
            names, keys = _listed(line["not_finite"]), _listed(line["clips"])
            said.add(0, tell=False, skipped=1)
            said.say(f"step {line['step']}: {names} not finite, skipped; clips {keys}")
        else:
            seconds = {phase: line.get(f"{phase}_seconds", 0.0) for phase in PHASES}
            said.measure(**{name: v for name, v in line.items() if isinstance(v, float) and name not in hidden})
            said.add(line["step"] - said.done, seconds=seconds, tell=False, retries=line.get("retries", 0))
            rate, left = line["steps_per_second"], status.duration(said.left)
            text += f"  {retries:.0f} retries" if (retries := said.counts["retries"]) else ""
            said.show(f"step {line['step']}/{said.total}  {text}  {rate:.2f} steps/s  {left} left")

    def restarted(self, why: str) -> None:
        """Say and count that workers begin again at the last checkpoint."""
        self.status.add(0, tell=False, retries=1)
        self.status.say(why)


class _Window:
    """Sums of the loss terms of the steps since the last line of metrics."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.steps += 1

    def mean(self, world: int) -> dict[str, float]:
        values = torch.stack([value.detach().float() for value in self.sums.values()]) / self.steps
        values = _sum_over_workers(values, world) / world
        return {name: float(value) for name, value in zip(self.sums, values, strict=True)}


def _loss(model: Any, batch: MicroBatch, run: TrainRun, device: torch.device) -> Any:
    torch.manual_seed(batch.seed)
    video = clips.to_model_input(batch.frames, device)
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        return model(video, **inputs)


def _parameter_groups(model: nn.Module, run: TrainRun) -> tuple[list[float], list[dict[str, Any]]]:
    """Factors on the learning rate, and the parameters that each applies to.

    Raises:
        ValueError: ``optim.slow`` names no parameter, or all of them.
    """
    named = list(model.named_parameters())
    if not run.optim.slow:
        return [1.0], [{"params": [parameter for _, parameter in named]}]
    slow = [parameter for name, parameter in named if name.startswith(run.optim.slow)]
    rest = [parameter for name, parameter in named if not name.startswith(run.optim.slow)]
    if not slow or not rest:
        raise ValueError(
            f"optim.slow={run.optim.slow!r} must be the beginning of some parameters' names and not of all; the model "
            f"has {', '.join(dict.fromkeys(name.partition('.')[0] + '.' for name, _ in named))}"
        )
    return [1.0, run.optim.slow_factor], [{"params": rest}, {"params": slow}]


def _emit(log: MetricsLog | None, worker: Worker, line: dict[str, Any]) -> None:
    if log is not None:
        log.write(line)
        worker.show(line)


def _no_sync(model: Any, active: bool) -> contextlib.AbstractContextManager[Any]:
    """Leave gradients on the worker for all but the last micro-batch of a step."""
    return model.no_sync() if active and hasattr(model, "no_sync") else contextlib.nullcontext()


def _agree(finite: Tensor, stopping: bool, ask: bool, world: int) -> tuple[bool, bool, bool]:
    """Whether the step may count on all workers, and whether one of them wants to stop, or to ask.

    Gradients are means over workers and agree, but each knows only its own loss. All three go through one reduction.
    """
    if world == 1:
        return bool(finite), stopping, ask
    flags = torch.stack([finite, *torch.tensor([not stopping, not ask], device=finite.device)]).int()
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    all_finite, none_stopping, none_ask = flags.tolist()
    return bool(all_finite), not none_stopping, not none_ask


def _not_finite(
    keys: list[str], terms: Mapping[str, Tensor], model: nn.Module, world: int
) -> tuple[list[str], list[str]]:
    """The clips of all workers, and what is not finite: loss terms of any worker, or else gradients by parameter."""
    names = [name for name, value in terms.items() if not torch.isfinite(value)]
    gathered: list[Any] = [(keys, names)]
    if world > 1:
        gathered *= world
        dist.all_gather_object(gathered, (keys, names))
    keys = [key for part, _ in gathered for key in part]
    names = list(dict.fromkeys(name for _, part in gathered for name in part))
    if not names:
        grads = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
        names = [f"gradient of {name}" for name, grad in grads if not torch.isfinite(grad).all()]
    return keys, names or ["norm of all gradients"]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _try(run: TrainRun) -> tuple[TrainRun, dict[str, Any]]:
    """Try what a new run needs; return the run with the checkpoint that it starts from, and what is stored of it."""
    start = None
    distance = perceptual.open_distance(run)
    if run.init:
        weights = checkpoint.load_weights(run.init)
        run = dataclasses.replace(run, init=weights.path)
        with torch.random.fork_rng(devices=[]):
            start = _start_from(run, families.build(run.stage(0).model), weights)
    _try_one_clip(run, distance)
    for note in (_note_on_start(run), perceptual.note_on(distance)):
        if note:
            print(note, file=sys.stderr, flush=True)
    return run, _stored(run, start, distance)


def _note_on_start(run: TrainRun) -> str:
    """What to say of a new run with drawn weights whose model is made to begin as one of another family."""
    family = families.family_of(run.model)
    known = families.FAMILIES[family].warm_starts
    if run.init or not known:
        return ""
    other = next(iter(known))
    if getattr(run.model, "alone_steps", None) == 0:
        return (
            f"note: {family} begins from drawn weights, as in the paper; {family}/small is made to begin from those "
            f"of {other}/clevrer-small: python jobs/train_{other}.py clevrer-small --out START, then --init START"
        )
    # At its start such a decoder does what that of the other family does; nothing else would ask for it.
    if getattr(run.model, "conditional_decoder", "") != "residual":
        return ""
    return (
        f"note: {family} begins from drawn weights, but with model.conditional_decoder=residual (as in {family}/small) "
        f"it is meant to begin from those of {other} with the same model settings (for {family}/small: "
        f"python jobs/train_{other}.py small --out START), then --init START"
    )


def _start_from(run: TrainRun, model: nn.Module, weights: checkpoint.Weights | None = None) -> dict[str, Any]:
    """Give a new model the weights of ``run.init``; return what identifies them.

    Raises:
        ValueError: they do not fit, or have changed since the run was opened.
    """
    opened = weights is None
    weights = weights or checkpoint.load_weights(run.init)
    start = {
        "checkpoint": weights.path,
        "family": weights.family,
        "step": weights.state["step"],
        "model_id": weights.model_id,
    }
    if opened and store.read_json(store.join(run.out, "config.json")).get("init") != start:
        raise ValueError(
            f"{weights.path} has changed since {run.out} was opened to start from it; choose another --out"
        )
    checkpoint.start_from(weights, model, families.family_of(run.model))
    return start


def _same_weights(distance: perceptual.Distance, stored: Mapping[str, Any]) -> bool:
    """Whether a run's ``config.json`` was written with these perceptual weights."""
    return stored.get("perceptual", {}).get("trunk_sha256") == distance.record["trunk_sha256"]


def _try_one_clip(run: TrainRun, distance: perceptual.Distance | None) -> None:
    """Put the first clip of each split through a fresh model of each stage, which raises where they do not fit."""
    tried: dict[str, Mapping[str, Any]] = {}
    for index, stage in enumerate(run.parsed_stages):
        part = run.stage(index)
        what = repr((part.data, part.clip_frames, part.model))
        try:
            _require_same_weights(run, stage)
            if what not in tried:
                tried[what] = _terms_of_one_clip(part, distance)
            if stage.min_kl is not None and "kl" not in tried[what]:
                raise ValueError(f"min_kl watches the loss term kl, but the model's are {', '.join(tried[what])}")
        except ValueError as error:
            if not run.stages:
                raise
            raise ValueError(f"stage {index + 1} ({run.stages[index]!r}): {error}") from error


def _require_same_weights(run: TrainRun, stage: Stage) -> None:
    """Refuse settings of a stage that give the model other weights than the run's own settings do.

    Raises:
        ValueError: naming the setting, and a weight that it changes.
    """
    settings = {name: value for name, value in stage.settings.items() if name.startswith("model.")}
    if not settings or (changed := _changed_weight(run, settings)) is None:
        return
    guilty = list(settings)
    for name, value in settings.items():
        with contextlib.suppress(ValueError):  # it may not be possible without the others
            if (alone := _changed_weight(run, {name: value})) is not None:
                guilty, changed = [name], alone
                break
    raise ValueError(
        f"{', '.join(guilty)} changes weight {changed}, but weights go on from stage to stage; set it for the whole run"
    )


def _changed_weight(run: TrainRun, settings: Mapping[str, Any]) -> str | None:
    """The first weight whose shape changes with some settings of the model, with both shapes."""
    config = with_overrides(dataclasses.replace(run, stages=()), dict(settings)).model
    with torch.device("meta"):
        before, after = (
            {name: tuple(tensor.shape) for name, tensor in families.build(model).state_dict().items()}
            for model in (run.model, config)
        )
    differ = (name for name in before | after if before.get(name) != after.get(name))
    return next((f"{name} from {before.get(name)} to {after.get(name)}" for name in differ), None)


def _terms_of_one_clip(run: TrainRun, distance: perceptual.Distance | None) -> dict[str, Tensor]:
    """The loss terms of the first clip of each split; raises where data and model do not fit."""
    with torch.random.fork_rng(devices=[]):
        model = families.build(run.model)
    families.set_perceptual(model, distance and distance.distance)
    _parameter_groups(model, run)
    names = families.describe(run.model).inputs
    terms: dict[str, Tensor] = {}
    for split in ("train", "val"):
        if split == "val" and not has_split(run.data, split):
            continue
        source = open_source(run.data, split, loader=run.loader)
        TrainingReader(
            source, clip_frames=run.clip_frames, batch_size=1, micro_batch_size=1, seed=0, loader=run.loader
        )  # refuses clips that are too short, and an empty split
        clip = next(iter_clips(source, limit=1, length=run.clip_frames, truth=names))
        inputs: dict[str, Any] = {**clips.stack_truth([clip], names)}
        model.train(split == "train")  # what is for test only is refused here, too
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            terms |= model(clips.to_model_input(clips.collate([clip])), **inputs).terms
    return terms


def _resolve_stages(run: TrainRun) -> tuple[str, ...]:
    """The stages with absolute paths; their text stays as it is where there is none to resolve."""

    def resolve(text: str) -> str:
        words = shlex.split(text)
        found = [
            f"data={store.resolve(word.removeprefix('data='), 'data')}" if word.startswith("data=") else word
            for word in words
        ]
        return text if found == words else shlex.join(found)

    return tuple(map(resolve, run.stages))


def _stage_seed(seed: int, number: int) -> int:
    """Seed of a stage's order and noise: the run's own in the first."""
    if number == 1:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/stage/{number}".encode(), digest_size=8).digest(), "big")


def _refuse_other_annealing(run: TrainRun, steps: int) -> None:
    """Refuse another number of steps once that would change the learning rate of steps already made.

    Raises:
        ValueError: with the number of steps that goes on.
    """
    done, annealed = checkpoint.last_step(run.out) or 0, run.optim.anneal_steps
    if annealed and steps != run.steps and done > min(steps, run.steps) - annealed:
        raise ValueError(
            f"{run.out} stands at step {done} and has steps={steps}, of which the last {annealed} are annealed; with "
            f"steps={run.steps} earlier steps would have had another learning rate; give --steps {steps}, or start a "
            f"new run with --init {run.out}"
        )


def _sum_over_workers(values: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(values)
    return values


def _summary_writer(folder: str, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: metrics go to metrics.jsonl only", file=sys.stderr)
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def _stored(
    run: TrainRun, start: Mapping[str, Any] | None = None, distance: perceptual.Distance | None = None
) -> dict[str, Any]:
    """What ``config.json`` holds: the run without the flags of this call, the code, the weights that it started from,
    and which ones its perceptual loss has."""
    stored = {
        "family": families.family_of(run.model),
        "run": checkpoint.config_to_json(dataclasses.replace(run, resume=False, resume_if_exists=False, force=False)),
        "code": checkpoint.code_digests(),
    }
    stored |= {"init": dict(start)} if start else {}
    return {**stored, "perceptual": distance.record} if distance else stored


_FORCED = "forced"
"""Field of ``config.json``: at which steps what was changed by force."""
FREE_TO_CHANGE = {
    "data", "out", "resume", "resume_if_exists", "force", "steps", "workers", "threads", "device", "perceptual_weights",
    "log_every", "eval_every", "eval_clips", "checkpoint_every", "keep_last", "loader.prefetch", "loader.cache_gb",
    "stall_seconds", "grace_seconds",
}  # fmt: skip
"""Fields of a run that may differ when it is resumed; the dataset is compared by its id instead of its path, perceptual
weights by their checksum."""


def settings_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings (name, before, after) that differ between two ``config.json`` and may not.

    A setting that an older version did not store has its default. A stage's data, like the run's, are compared by the
    dataset's id when the run goes on, not by their path.
    """
    family = families.FAMILIES.get(after.get("family", ""))
    model = checkpoint.config_to_json(family.config()) if family else {}
    defaults = flatten_settings({"run": {**checkpoint.config_to_json(TrainRun()), "model": model}})
    old, new = ({**defaults, **flatten_settings(settings)} for settings in (before, after))
    for settings in (old, new):
        stages = settings.get("run.stages") or ()
        settings["run.stages"] = [
            " ".join(word for word in str(stage).split() if not word.startswith("data=")) for stage in stages
        ]
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if name.removeprefix("run.") not in FREE_TO_CHANGE
        and not name.startswith(("perceptual.files.", "code.", _FORCED))
        and old.get(name) != new.get(name)
    ]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs and may not, for a message: settings, and files of code where the run has told which it had."""
    found = []
    if settings := settings_difference(before, after):
        found.append(f"settings ({', '.join(f'{name} was {old!r} and is {new!r}' for name, old, new in settings)})")
    old, new = before.get("code", after["code"]), after["code"]
    if files := sorted(name for name in old | new if old.get(name) != new.get(name)):
        found.append(f"code ({_listed(files)})")
    return found


def next_free_folder(family: str, kind: str = "runs") -> str:
    """Claim ~/objdyn/KIND/FAMILY-NNN."""
    parent = os.path.expanduser(f"~/objdyn/{kind}")
    os.makedirs(parent, exist_ok=True)
    for number in range(1, 100_000):
        folder = os.path.join(parent, f"{family}-{number:03d}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            return folder
    raise ValueError(f"{parent} is full; give --out")


def main(words: Sequence[str] | None = None) -> int:
    """Train on one device without Ray: ``python -m pipeline.loop PRESET --data DIR --out RUN``."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.loop", description=main.__doc__)
    names = {f"{family}/{name}": run for family, runs in PRESETS.items() for name, run in runs.items()}
    names |= PRESETS["ddlp"]
    parser.add_argument("preset", choices=names, metavar="PRESET", help=", ".join(names))
    parser.add_argument("--data", help="dataset folder or sim:NAME")
    parser.add_argument("--out", help="run folder")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--perceptual-weights", nargs="+", metavar="FILE", help="for model.recon_loss=vgg")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--resume-if-exists", action="store_true", help="continue the run in --out, or start it")
    parser.add_argument("--force", action="store_true", help="with --resume: although settings, code or data changed")
    parser.add_argument("--storage.endpoint-url", metavar="URL", help="of the store behind s3:// paths")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any setting, optim.lr=3e-4")
    arguments = parser.parse_args(words)
    given = {name: getattr(arguments, name) for name in ("data", "out", "steps", "seed")}
    overrides = {name: value for name, value in given.items() if value is not None}
    overrides |= {"perceptual_weights": tuple(arguments.perceptual_weights)} if arguments.perceptual_weights else {}
    if url := vars(arguments)["storage.endpoint_url"]:
        overrides["storage.endpoint_url"] = url
    try:
        preset = names[arguments.preset]
        overrides |= {name: vars(arguments)[name] for name in ("resume", "resume_if_exists", "force")}
        overrides |= parse_settings(arguments.set, preset)
        with stop.preemptible(), opened(with_overrides(preset, overrides)) as (run, _):
            print(f"run folder: {run.out}", file=sys.stderr)
            with progress_of(run) as progress:
                print(train(run, Worker(show=progress.show)))
    except (ValueError, OSError, FloatingPointError, stop.Preempted) as error:
        print(f"error: {error}", file=sys.stderr)
        return stop.STATUS if isinstance(error, stop.Preempted) else 1
    return 0


@contextlib.contextmanager
def progress_of(run: TrainRun) -> Iterator[Progress]:
    """A ``Progress`` that begins where the run folder stands."""
    saved = checkpoint.last_step(run.out)
    progress = Progress(run.steps, saved or 0, family=families.family_of(run.model))
    with progress.status:
        yield progress


if __name__ == "__main__":
    sys.exit(main())
