"""Ray Train around ``loop.py``: the same loop on N workers, restarted by Ray when one dies.

Ray decides where workers run and when they start again; everything else is the loop's and the run folder's. Ray's own
storage is ``RUN/.ray``; it holds nothing that a run needs and may be deleted.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from pipeline import cluster, loop, report, store
from pipeline.config import TrainRun

MAX_FAILURES = 3
"""Restarts of the group of workers before the run gives up."""
FOLLOW_SECONDS = 1.0
"""How often the driver looks for new lines of metrics."""


def train(run: TrainRun) -> str:
    """Train a run to its end and return its folder; see ``loop.open_run`` for what is refused.

    Raises:
        ValueError: settings or data that cannot work.
        ChildProcessError: the workers failed more than ``MAX_FAILURES`` times.
    """
    run = loop.open_run(run)
    print(f"run folder: {run.out}", flush=True)
    cluster.connect(num_cpus=run.workers + 1)
    cluster.require_shared([path for path in (run.out, run.data) if not path.startswith("sim:")])
    # imported after Ray is up: the two together take seconds, and a refused run should not wait for them
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = _use_gpu(run)
    scratch = store.join(run.out, ".ray")
    store.remove_tree(scratch)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    path, filesystem = _ray_storage(run.out)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run": run, "use_gpu": use_gpu},
        scaling_config=ScalingConfig(num_workers=run.workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=".ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _follow(run):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ChildProcessError(_reason(error)) from error
    store.remove_tree(scratch)
    report.write_run_report(run.out)
    return run.out


def _work(config: dict[str, Any]) -> None:
    """What each worker runs."""
    import torch
    from ray.train import get_context, report
    from ray.train.torch import get_device, prepare_model

    run: TrainRun = config["run"]
    context = get_context()
    world = context.get_world_size()
    device = get_device() if config["use_gpu"] else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // run.workers))

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        return prepare_model(model) if world > 1 else model

    loop.train(run, loop.Worker(context.get_world_rank(), world, device, wrap, report))


@contextlib.contextmanager
def _follow(run: TrainRun) -> Iterator[None]:
    """Show the run's progress from its ``metrics.jsonl`` while the workers, wherever they are, write it."""
    stop = threading.Event()

    def follow(progress: loop.Progress, seen: int) -> None:
        done = False
        while not done:
            done = stop.wait(FOLLOW_SECONDS)
            lines = loop.read_metrics(run.out)
            if len(lines) < seen:  # a restarted worker dropped the lines after its checkpoint
                seen = len(lines)
            for line in lines[seen:]:
                progress.show(line)
            seen = len(lines)

    with loop.progress_of(run) as progress:
        thread = threading.Thread(target=follow, args=(progress, len(loop.read_metrics(run.out))), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _use_gpu(run: TrainRun) -> bool:
    """Whether workers take a GPU: asked of the cluster, since the driver's machine may have none."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if run.device == "cuda" and gpus < run.workers:
        raise ValueError(f"device=cuda with workers={run.workers}, but the cluster has {gpus} GPUs; lower --workers")
    return run.device == "cuda" or (run.device == "auto" and gpus >= run.workers)


def _ray_storage(out: str) -> tuple[str, Any]:
    """Ray's path and file system for the run folder; on s3:// the same s3fs as everywhere else."""
    if not store.is_url(out):
        return out, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return out.partition("://")[2], PyFileSystem(FSSpecHandler(store.filesystem()))


def _reason(error: Exception) -> str:
    """The first worker's own message, without Ray's layers around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        first = next(iter(failures.values()))
        return f"training failed on a worker: {first}"
    return f"training failed: {error}"
