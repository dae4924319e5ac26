"""The training loop: a plain function of torch, without Ray, pyarrow or a command-line library.

    python -m pipeline.loop small --data sim:balls-interaction --out RUN     (any machine with torch)

``train.py`` calls the same function inside Ray Train's workers; what differs there arrives in a ``Worker``. The run
folder is the only truth: whoever starts the loop on it goes on from ``last.json``, also after Ray restarted a worker.

What makes a resumed run bit-identical on a CPU: the order of samples and the windows inside clips follow from (seed,
position), torch is seeded before every micro-batch from the same, the optimiser's state is stored exactly, and no
other random state lives longer than one micro-batch.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
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
from pipeline import checkpoint, failpoints, store
from pipeline.config import TrainRun, flatten_settings, torch_device, with_overrides
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


def open_run(run: TrainRun) -> TrainRun:
    """Create the run folder with its ``config.json``, or check that the run in it may be continued.

    One clip of each split goes through the model first, so that data, model and run are known to fit before a folder
    is made or a worker started.

    Returns:
        The run with every path resolved.

    Raises:
        ValueError: the data do not fit; or the folder holds a run and ``resume`` was not asked for, or holds none and
            it was; or the stored run has other settings; or the folder is not empty and not a run.
    """
    if run.resume and not run.out:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    run = dataclasses.replace(run, data=store.resolve(run.data, "--data"))
    if not run.out:
        _try_one_clip(run)
        run = dataclasses.replace(run, out=_next_free_folder(families.family_of(run.model)))
        store.publish_json(store.join(run.out, "config.json"), _stored(run))
        return run
    out = store.resolve(run.out, "--out")
    run = dataclasses.replace(run, out=out)
    path = store.join(out, "config.json")
    if not run.resume:
        if store.exists(path):
            raise ValueError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
        # A run that was killed before it had a config.json leaves nothing that counts.
        if names := [name for name in store.list_names(out) if not store.is_temporary(name)]:
            raise ValueError(f"{out} is not empty (it holds {names[0]}) and holds no run; choose another --out")
        _try_one_clip(run)
        store.publish_json(path, _stored(run))
        return run
    if not store.exists(path):
        raise ValueError(f"{out} holds no run (no config.json), so there is nothing to resume; leave out --resume")
    if difference := _difference(store.read_json(path), _stored(run)):
        raise ValueError(f"{out} was started with other settings: {difference}; repeat them, or choose another --out")
    store.publish_json(path, _stored(run))  # steps and intervals may grow
    return run


def train(run: TrainRun, worker: Worker | None = None) -> str:
    """Train until ``run.steps`` and return the path of the last checkpoint.

    ``run`` comes from ``open_run``. Goes on from the folder's last checkpoint if it has one.

    Raises:
        ValueError: data that does not fit the model, a damaged checkpoint, another dataset than the run began with.
        FloatingPointError: a loss or gradient was not finite ``MAX_SKIPPED`` steps in a row, or a weight or the
            optimiser's state no longer is; the last checkpoint stays as it was.
    """
    worker = worker or Worker()
    device = worker.device or torch_device(run.device, run.workers)
    if device.type == "cpu":
        torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // worker.local_world))
        if run.precision == "bf16":
            raise ValueError("precision=bf16 needs a GPU and none was found; use --precision fp32")
    family = families.FAMILIES[families.family_of(run.model)]
    source = open_source(run.data, "train", loader=run.loader)
    held_out = open_source(run.data, "val", loader=run.loader) if has_split(run.data, "val") else None

    torch.manual_seed(run.seed)
    model = families.build(run.model).to(device)
    factors, groups = _parameter_groups(model, run)
    optimizer = torch.optim.Adam(groups, lr=run.optim.lr, betas=run.optim.betas, eps=run.optim.eps, fused=True)
    step = position = 0
    best: float | None = None
    if (saved := checkpoint.load_last(run.out)) is not None:
        if saved.state["dataset_id"] != source.id:
            raise ValueError(
                f"{run.out} was trained on dataset {saved.state['dataset_id']}, but {run.data} is {source.id}; "
                "give the same data, or choose another --out"
            )
        checkpoint.restore(saved, model, optimizer)
        step, position, best = saved.step, saved.state["position"], saved.state["best"]
        if worker.rank == 0:
            checkpoint.retire(run.out, keep_last=run.keep_last)  # which the run may have been killed before or in
    if step >= run.steps:
        return saved.path if saved else ""

    reader = TrainingReader(
        source,
        clip_frames=run.clip_frames,
        batch_size=run.optim.batch_size,
        micro_batch_size=run.micro_batch_size,
        seed=run.seed,
        loader=run.loader,
        inputs=family.inputs,
        rank=worker.rank,
        world=worker.world,
    )
    wrapped = worker.wrap(model)
    log = MetricsLog(run.out, step) if worker.rank == 0 else None
    accumulate = run.optim.batch_size // (run.micro_batch_size * worker.world)
    window = _Window()
    skipped = 0
    path = ""
    with contextlib.closing(reader.micro_batches(position)) as batches, log or contextlib.nullcontext():
        while step < run.steps:
            families.set_step(model, step)
            model.train()
            optimizer.zero_grad()
            keys: list[str] = []
            terms: dict[str, Tensor] = {}
            for index in range(accumulate):
                batch = next(batches)
                keys += batch.keys
                with _no_sync(wrapped, index < accumulate - 1):
                    loss = _loss(wrapped, batch, run, device)
                    (loss.total / accumulate).backward()
                for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
                    terms[name] = terms.get(name, torch.zeros_like(value)) + value / accumulate
            position += run.optim.batch_size

            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if not _on_all_workers(torch.isfinite(terms["loss"]) & torch.isfinite(norm), worker.world):
                skipped += 1
                keys, names = _not_finite(keys, terms, model, worker.world)
                # The step that was tried, not the one before: that one may be saved, and its lines then stay.
                _emit(log, worker, {"kind": "skipped", "step": step + 1, "not_finite": names, "clips": keys})
                if skipped == MAX_SKIPPED:
                    raise FloatingPointError(
                        f"{_listed(names)} not finite {MAX_SKIPPED} steps in a row, last in step {step + 1} on clips "
                        f"{_listed(keys)}; start again with a lower optim.lr or with optim.clip_norm"
                    )
                continue
            skipped = 0
            window.add(terms)
            if run.optim.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(model.parameters(), run.optim.clip_norm, norm)
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = run.optim.lr * factor * run.optim.decay ** (step // run.optim.decay_steps)
            optimizer.step()
            step += 1

            last = step == run.steps
            save = step % run.checkpoint_every == 0 or last
            if step % run.log_every == 0 or save:  # a run that goes on from a checkpoint begins with an empty window
                line = {
                    "kind": "train",
                    "step": step,
                    "steps": run.steps,
                    **window.mean(worker.world),
                    "lr": optimizer.param_groups[0]["lr"],
                    "steps_per_second": window.rate,
                    "skipped": log.skipped if log is not None else 0,
                }
                window = _Window()
                _emit(log, worker, line)
            improved = False
            if held_out is not None and run.eval_every and (step % run.eval_every == 0 or last):
                families.set_step(model, step)
                held = evaluate(model, held_out, run, device, worker.rank, worker.world)
                _emit(log, worker, {"kind": "eval", "step": step, **held})
                psnr_is_known = math.isfinite(held["recon_psnr"])
                improved = save and psnr_is_known and (best is None or held["recon_psnr"] > best)
                best = held["recon_psnr"] if improved else best
                window.restart_clock()
            if save:
                if log is not None:
                    families.set_step(model, step)
                    state = {
                        "family": families.family_of(run.model),
                        "run": _stored(run)["run"],
                        "dataset_id": source.id,
                        "position": position,
                        "best": best,
                    }
                    log.sync()  # first, so that no checkpoint is without its metrics
                    path = checkpoint.save_checkpoint(
                        run.out, step, model=model, optimizer=optimizer, state=state,
                        keep_last=run.keep_last, best=improved,
                    )  # fmt: skip
                worker.report({"step": step})
                window.restart_clock()
    return path


def evaluate(
    model: Any, source: Source, run: TrainRun, device: torch.device, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """Held-out loss, reconstruction and prediction PSNR, with "copy the last frame" beside; no noise anywhere.

    Each worker takes every ``world``-th of the first ``run.eval_clips`` clips; the means are over all of them.
    """
    family = families.FAMILIES[families.family_of(run.model)]
    context = run.clip_frames - 1 if run.clip_frames > 1 else 1
    horizon = min(EVAL_HORIZON, source.num_frames - context) if "rollout" in family.verbs else 0
    sums: dict[str, float] = {}
    count = 0
    model.eval()
    with torch.no_grad():
        chosen = iter_clips(source, limit=run.eval_clips, length=context + max(horizon, 1), truth=family.inputs)
        for index, clip in enumerate(chosen):
            if index % world != rank:
                continue
            video = clips.to_model_input(clips.collate([clip]), device)
            inputs: dict[str, Any] = {**clips.stack_truth([clip], family.inputs, device)}
            values = {"loss": float(model(video[:, : run.clip_frames], **inputs).total)}
            recon = families.reconstruct(model, video[:, : run.clip_frames], **inputs).video
            values["recon_psnr"] = psnr(recon, video[:, : run.clip_frames])
            if horizon > 0:
                future = video[:, context : context + horizon]
                predicted = families.predict(model, video[:, :context], horizon, **inputs).video
                values["predict_psnr"] = psnr(predicted, future)
                values["copy_last_predict_psnr"] = psnr(video[:, context - 1 : context].expand_as(future), future)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
    names = ["loss", "recon_psnr"] + (["predict_psnr", "copy_last_predict_psnr"] if horizon > 0 else [])
    table = torch.tensor([*(sums.get(name, 0.0) for name in names), count], dtype=torch.float64)
    table = _sum_over_workers(table.to(device) if device.type == "cuda" else table, world)
    return {name: float(value / table[-1]) for name, value in zip(names, table[:-1], strict=True)}


def psnr(video: Tensor, truth: Tensor) -> float:
    """PSNR of each frame in dB for values in [0, 1], then the mean; ``metrics.image`` without its library."""
    error = (video - truth).square().flatten(2).mean(-1).clamp_min(MAX_ERROR)
    return float((-10 * error.log10()).mean())


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events of a run folder.

    Lines after the step that a run resumes from are dropped first, so every step stands once. On object storage, where
    nothing can be appended, both are collected locally and published every ``PUBLISH_SECONDS`` and at each checkpoint.
    """

    def __init__(self, out: str, step: int) -> None:
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

    def __exit__(self, *_: object) -> None:
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
        """Make everything so far durable, on object storage by publishing it."""
        if self.writer is not None:
            with store.naming(self.events):
                self.writer.flush()
        if not self.remote:
            with store.naming(self.path), open(self.path, "ab") as file:
                os.fsync(file.fileno())
        else:
            store.publish(self.path, "".join(f"{line}\n" for line in self.lines).encode())
            for name in os.listdir(self.events):
                with open(os.path.join(self.events, name), "rb") as file:
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
    lines = [json.loads(line) for line in whole.splitlines() if line]
    return [line for line in lines if step is None or line["step"] <= step]


class Progress:
    """One line per interval in a log, a bar on a terminal. Feed it the lines of metrics."""

    def __init__(self, steps: int, done: int = 0, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self.steps, self.first, self.start = steps, done, time.monotonic()
        self.bar = None
        if self.file.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=done, unit="step", file=self.file, dynamic_ncols=True)

    def show(self, line: dict[str, Any]) -> None:
        """Show a line of metrics."""
        shown = {k: v for k, v in line.items() if isinstance(v, float) and k not in ("lr", "steps_per_second")}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        text += f"  skipped {line['skipped']}" if line.get("skipped") else ""
        if line["kind"] == "eval":
            self._print(f"held out at step {line['step']}: {text}")
            return
        if line["kind"] == "skipped":
            names, keys = _listed(line["not_finite"]), _listed(line["clips"])
            self._print(f"step {line['step']}: {names} not finite, skipped; clips {keys}")
            return
        if self.bar is not None:
            self.bar.update(line["step"] - self.bar.n)
            self.bar.set_postfix_str(text)
            return
        done, elapsed = line["step"] - self.first, time.monotonic() - self.start
        left = elapsed / max(done, 1) * (self.steps - line["step"])
        rate = line["steps_per_second"]
        self._print(f"step {line['step']}/{self.steps}  {text}  {rate:.2f} steps/s  {duration(left)} left")

    def close(self) -> None:
        """Finish the bar."""
        if self.bar is not None:
            self.bar.close()

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.file)
        else:
            print(text, file=self.file, flush=True)


def duration(seconds: float) -> str:
    """``75`` as ``1m15s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


class _Window:
    """Sums of the loss terms of the steps since the last line of metrics, and the time that took."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.seconds = 0.0
        self.restart_clock()

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.steps += 1
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

    def restart_clock(self) -> None:
        """Leave out what was not training: evaluation and checkpoints."""
        self.clock = time.monotonic()

    def mean(self, world: int) -> dict[str, float]:
        values = torch.stack([value.detach().float() for value in self.sums.values()]) / self.steps
        values = _sum_over_workers(values, world) / world
        return {name: float(value) for name, value in zip(self.sums, values, strict=True)}

    @property
    def rate(self) -> float:
        """Optimiser steps per second."""
        return self.steps / max(self.seconds, 1e-9)


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


def _on_all_workers(finite: Tensor, world: int) -> bool:
    """Whether a step may count. Gradients are means over workers and agree, but each knows only its own loss."""
    if world > 1:
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


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


def _try_one_clip(run: TrainRun) -> None:
    """Put the first clip of each split through a fresh model, which raises where they do not fit."""
    with torch.random.fork_rng(devices=[]):
        model = families.build(run.model).eval()
    _parameter_groups(model, run)
    names = families.FAMILIES[families.family_of(run.model)].inputs
    for split in ("train", "val"):
        if split == "val" and not has_split(run.data, split):
            continue
        source = open_source(run.data, split, loader=run.loader)
        TrainingReader(
            source, clip_frames=run.clip_frames, batch_size=1, micro_batch_size=1, seed=0, loader=run.loader
        )  # refuses clips that are too short, and an empty split
        clip = next(iter_clips(source, limit=1, length=run.clip_frames, truth=names))
        inputs: dict[str, Any] = {**clips.stack_truth([clip], names)}
        with torch.no_grad():
            model(clips.to_model_input(clips.collate([clip])), **inputs)


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


def _stored(run: TrainRun) -> dict[str, Any]:
    """What ``config.json`` holds: the run without its --resume flag."""
    return {
        "family": families.family_of(run.model),
        "run": checkpoint.config_to_json(dataclasses.replace(run, resume=False)),
    }


FREE_TO_CHANGE = {
    "data", "out", "resume", "steps", "workers", "threads", "device",
    "log_every", "eval_every", "eval_clips", "checkpoint_every", "keep_last", "loader.prefetch", "loader.cache_gb",
}  # fmt: skip
"""Fields of a run that may differ when it is resumed; the dataset is compared by its id instead of its path."""


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ, as a sentence; empty if none do."""
    before, after = flatten_settings(old), flatten_settings(new)
    return ", ".join(
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if name.removeprefix("run.") not in FREE_TO_CHANGE and before.get(name) != after.get(name)
    )


def _next_free_folder(family: str) -> str:
    """Claim ~/objdyn/runs/FAMILY-NNN."""
    parent = os.path.expanduser("~/objdyn/runs")
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
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="optim.lr=3e-4, as JSON")
    arguments = parser.parse_args(words)
    given = {name: getattr(arguments, name) for name in ("data", "out", "steps", "seed")}
    overrides = {name: value for name, value in given.items() if value is not None}
    try:
        overrides |= dict(_parse_setting(text) for text in arguments.set)
        run = open_run(dataclasses.replace(with_overrides(names[arguments.preset], overrides), resume=arguments.resume))
        print(f"run folder: {run.out}", file=sys.stderr)
        with progress_of(run) as progress:
            print(train(run, Worker(show=progress.show)))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def progress_of(run: TrainRun) -> Iterator[Progress]:
    """A ``Progress`` that begins where the run folder stands."""
    saved = checkpoint.last_step(run.out)
    progress = Progress(run.steps, saved or 0)
    try:
        yield progress
    finally:
        progress.close()


def _parse_setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed


if __name__ == "__main__":
    sys.exit(main())
