"""Ray Train around ``loop.py``: the same loop on N workers, started again when one dies.

Ray decides where workers run; everything else is the loop's and the run folder's. Ray's own storage is ``RUN/.ray``;
it holds nothing that a run needs and is removed at the end.

SIGTERM to the driver reaches the workers through ``RUN/.stop``, see ``stop.py``: they save and return, and the driver
ends as preempted. ``ray job stop`` follows with SIGKILL after 3 s unless the head was started with
``RAY_JOB_STOP_WAIT_TIME_S=30``, the time that Kubernetes and spot machines give. When Ray drains the node of a worker,
all save and return as well, and go on as soon as the cluster has as many slots again: their number is fixed.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline import checkpoint, claim, cluster, loop, perceptual, report, stop, store
from pipeline.config import TrainRun

MAX_RESTARTS = 3
"""Times that the group of workers is started again, after one of them died, without a new checkpoint between."""
FREED_SECONDS = 1.0
"""Within which Ray counts what workers that have ended held as free again."""
FOLLOW_SECONDS = 1.0
"""How often the driver looks for new lines of metrics in a local run folder."""
Show = Callable[[dict[str, Any]], None]
OWN_ERRORS = (ValueError, FloatingPointError, FileNotFoundError)
"""What a worker raises on purpose; starting it again would only raise it again."""


@store.job
def train(run: TrainRun, *, gpus: float = 1.0, show: Show | None = None) -> str:
    """Train a run to its end and return its folder; see ``loop.open_run`` for what is refused.

    Args:
        run: what to train.
        gpus: of each worker, if they take GPUs; 0.5 is half of one.
        show: called with each line of metrics, beside the progress on stderr.

    Raises:
        ValueError: settings or data that cannot work.
        FloatingPointError: the loss stayed non-finite.
        ChildProcessError: workers died more than ``MAX_RESTARTS`` times without a new checkpoint between.
        Preempted: SIGTERM arrived, or somebody made ``RUN/.stop``, and the run is not at its end.
    """
    perceptual.require(run)
    cluster.connect(num_cpus=run.workers + 1)  # before torch and the data: a cluster that is away is said at once
    with loop.opened(run) as (run, held):
        return _train(run, held, gpus, show)


def _train(run: TrainRun, held: claim.Claim, gpus: float, show: Show | None) -> str:
    print(f"run folder: {run.out}", flush=True)
    read = {run.stage(index).data for index in range(len(run.parsed_stages))} | ({run.init} if run.init else set())
    cluster.require_shared([path for path in (run.out, *sorted(read)) if not path.startswith("sim:")])
    use_gpu = _use_gpu(run)
    with _follow(run, show) as progress, stop.passed_on(run.out, run.grace_seconds) as were_told:
        _fit_to_the_end(run, held, use_gpu, gpus, were_told, progress.restarted)
    held.check()
    report.write_run_report(run.out)
    return run.out


def _fit_to_the_end(
    run: TrainRun,
    held: claim.Claim,
    use_gpu: bool,
    gpus: float,
    were_told: Callable[[], bool],
    restarted: Callable[[str], None],
) -> None:
    """Run the workers until the run is done, again after they died or had to leave a node; ``restarted`` tells why."""
    restarts, reached = 0, checkpoint.last_step(run.out) or 0
    while True:
        held.check()
        try:
            _fit(run, held, use_gpu, gpus)
        except ChildProcessError as error:
            if not were_told():
                before, reached = reached, checkpoint.last_step(run.out) or 0
                restarts = 1 if reached > before else restarts + 1
                if restarts > MAX_RESTARTS:
                    raise
                restarted(f"{error}; starting again from the last checkpoint")
                continue
        step = checkpoint.last_step(run.out) or 0
        if step >= run.steps:
            return
        if were_told():
            raise stop.Preempted(
                f"preempted; step {step} of {run.steps} is saved; run the same command with --resume to go on"
            )
        restarted(f"a node is being taken away; going on from step {step} once {run.workers} workers have a place")


def _fit(run: TrainRun, held: claim.Claim, use_gpu: bool, gpus: float) -> None:
    """Run the workers once, from the last checkpoint until they end."""
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.gloo import AddressedTorchConfig

    scratch = store.join(run.out, ".ray")
    store.remove_tree(scratch)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    # For a worker that is stopped as a whole, whose own watchdog stands still, too.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(run.stall_seconds)
    resources = {"CPU": 1.0, **({"GPU": gpus} if use_gpu else {})}
    _say_what_is_missing({name: run.workers * count for name, count in resources.items()})
    path, filesystem = ray_storage(run.out)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run": run, "use_gpu": use_gpu},
        # Not for ever, for peers that never come.
        torch_config=AddressedTorchConfig(timeout_s=max(1, round(run.stall_seconds))),
        scaling_config=ScalingConfig(
            num_workers=run.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=".ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),  # restarted by us: Ray would also repeat our own errors
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = list(getattr(error, "worker_failures", {}).values())
        for failure in failures:
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, claim.HeldError):  # an earlier writer, which the next attempt may find gone
                raise ChildProcessError(str(cause)) from error
            if isinstance(cause, OWN_ERRORS) or getattr(cause, "errno", None) == errno.ENOSPC:
                raise cause from None
        first = str(failures[0] if failures else error).strip().rpartition("\n")[2]
        raise ChildProcessError(f"a training worker failed: {first}") from error
    finally:
        if not held.lost:
            store.remove_tree(scratch)


def _say_what_is_missing(wanted: dict[str, float]) -> None:
    """Tell what of some resources the cluster does not have now: Ray waits for it without end or word."""
    import ray

    free = ray.available_resources()
    if all(free.get(name, 0) >= count for name, count in wanted.items()):
        return
    time.sleep(FREED_SECONDS)
    there, free = ray.cluster_resources(), ray.available_resources()
    for name, count in wanted.items():
        if free.get(name, 0) < count:
            print(
                f"waiting for {count:g} {name} slots; the cluster has {there.get(name, 0):g} now, of which "
                f"{free.get(name, 0):g} are free: add nodes, wait for other jobs, or start with fewer --workers",
                file=sys.stderr,
                flush=True,
            )


def _work(config: dict[str, Any]) -> None:
    """What each worker runs."""
    import torch
    from ray.train import get_context, get_preemption_info, report
    from ray.train.torch import get_device, prepare_model

    run: TrainRun = config["run"]
    context = get_context()
    world = context.get_world_size()
    with store.using(run.storage):
        seen = store.exists(store.join(run.out, "config.json"))
    if not seen:
        raise FileNotFoundError(
            f"a worker does not see {run.out}, where the run was opened; give an --out (and --data) that every node "
            "shares, or s3://"
        )

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        return prepare_model(model) if world > 1 else model

    worker = loop.Worker(
        rank=context.get_world_rank(),
        world=world,
        local_world=context.get_local_world_size(),
        device=get_device() if config["use_gpu"] else torch.device("cpu"),
        wrap=wrap,
        report=report,
        leaving=lambda: get_preemption_info() is not None,
    )
    with contextlib.suppress(stop.Preempted):  # the driver sees how far the run is
        loop.train(run, worker)


@contextlib.contextmanager
def _follow(run: TrainRun, show: Show | None = None) -> Iterator[loop.Progress]:
    """Show the run's progress from its metrics while the workers, wherever they are, write them."""
    stop = threading.Event()
    pause = loop.PUBLISH_SECONDS if store.is_url(run.out) else FOLLOW_SECONDS

    def follow(progress: loop.Progress, lines: "_Lines") -> None:
        done = False
        while not done:
            done = stop.wait(pause)
            new: list[dict[str, Any]] = []
            with contextlib.suppress(OSError, ValueError):  # the next look reads it
                new = lines.new()
            for line in new:
                progress.show(line)
                if show is not None:
                    show(line)

    with loop.progress_of(run) as progress:
        lines = _Lines(run.out)
        lines.new()
        thread = threading.Thread(target=follow, args=(progress, lines), daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            stop.set()
            thread.join()


class _Lines:
    """The lines that ``metrics.jsonl`` gained since the last look."""

    def __init__(self, out: str) -> None:
        self.path = store.join(out, "metrics.jsonl")
        self.offset = 0
        self.shown: set[tuple[Any, ...]] = set()

    def new(self) -> list[dict[str, Any]]:
        """Complete lines not returned before; those that a restarted worker repeats are left out."""
        if not store.exists(self.path):
            return []
        try:
            lines = self._read()
        except ValueError:  # it also wrote more than it dropped since the last look: that began within a line
            self.offset = 0
            lines = self._read()
        lines = [line for line in lines if _identity(line) not in self.shown]
        self.shown.update(map(_identity, lines))
        return lines

    def _read(self) -> list[dict[str, Any]]:
        with store.open_read(self.path) as file:
            if file.seek(0, os.SEEK_END) < self.offset:  # a restarted worker dropped what came after its checkpoint
                self.offset = 0
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        self.offset += len(whole)
        return lines


def _identity(line: dict[str, Any]) -> tuple[Any, ...]:
    # A step may be skipped several times, each time with other clips.
    return line["step"], line["kind"], *line.get("clips", ())


def _use_gpu(run: TrainRun) -> bool:
    """Whether workers take a GPU: asked of the cluster, since the driver's machine may have none.

    ``cuda`` asks for GPUs even where none is up yet: an autoscaling cluster starts them on demand. ``auto`` takes what
    is there now.

    Raises:
        ValueError: ``cuda`` on a private Ray of a machine without enough GPUs.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if run.device != "cuda" or gpus >= run.workers:
        return run.device == "cuda" or (run.device == "auto" and gpus >= run.workers)
    if not cluster.is_joined():
        raise ValueError(f"device=cuda with workers={run.workers}, but this machine has {gpus} GPUs; lower --workers")
    return True


def ray_storage(out: str) -> tuple[str, Any]:
    """Ray's path and file system for the run folder; on s3:// the same s3fs as everywhere else."""
    if not store.is_url(out):
        return out, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return out.partition("://")[2], PyFileSystem(FSSpecHandler(store.filesystem()))
