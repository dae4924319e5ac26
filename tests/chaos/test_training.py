"""A training whose workers, driver, nodes die, hang or are taken away."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint, failpoints, loop, stop, train
from pipeline.config import TrainRun, with_overrides
from pipeline.presets import PRESETS
from tests.processes import Driver, below, wait_for

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "tests" / "pipeline" / "training_faults.py"
EVERY = 40
SETTINGS = {
    "optim.batch_size": 1,
    "threads": 1,
    "steps": 240,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": EVERY,
    "device": "cpu",
}
RUN: TrainRun = with_overrides(PRESETS["iodine"]["debug"], SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    loop.train(loop.open_run(dataclasses.replace(RUN, out=str(folder))))
    return folder


def tensors_of(out: Path) -> dict[str, bytes]:
    """The last checkpoint's files that must be the undisturbed run's."""
    place = out / json.loads((out / "last.json").read_text())["checkpoint"]
    return {name: (place / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def step_of(out: Path) -> int:
    """The newest step with a line of metrics."""
    with contextlib.suppress(OSError, ValueError):
        return max((line["step"] for line in loop.read_metrics(str(out))), default=0)
    return 0


def trainer(out: Path, *words: str, **environment: str) -> Driver:
    settings = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return Driver("train_iodine.py", "debug", *settings, "--out", str(out), *words, **environment)


def workers(process: int) -> list[int]:
    return sorted(child for child, line in below(process).items() if b"RayTrainWorker" in line)


@pytest.mark.chaos
def test_workers_without_ray(fault: Callable[[str], Any], chance: random.Random, tmp_path: Path) -> None:
    answer = tmp_path / "counts.json"
    words = ["--times", "3", "--seed", str(chance.randrange(10**6)), "--folder", str(tmp_path), "--json", str(answer)]
    done = subprocess.run([sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE, text=True, check=False)
    for name, found in json.loads(answer.read_text()).items():
        count = fault(name)
        count.injected += found["injected"]
        count.survived += found["survived"]
        count.wrong += found["wrong"]
        count.seconds += found["seconds"]
    assert done.returncode == 0, done.stdout


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_local")
def test_a_worker_of_ray_is_killed_then_stopped(
    fault: Callable[[str], Any], chance: random.Random, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = dataclasses.replace(RUN, out=str(out), stall_seconds=10)
    names = {signal.SIGKILL: "kill -9 of a train worker (Ray)", signal.SIGSTOP: "stopped train worker (Ray)"}
    problems: list[str] = []

    def disturb() -> None:
        for number, (sign, name) in enumerate(names.items()):
            count, first = fault(name), chance.randint(1, EVERY) + number * 2 * EVERY
            try:
                wait_for(lambda first=first: step_of(out) >= first)
                (worker,) = workers(os.getpid())
                log = (out / "metrics.jsonl").stat().st_ino
                os.kill(worker, sign)
                count.injected += 1
                begin = time.monotonic()
                # a new attempt writes the log anew, then appends to it
                wait_for(lambda log=log: (out / "metrics.jsonl").stat().st_ino != log)
                lines = len(loop.read_metrics(str(out)))
                wait_for(lambda lines=lines: len(loop.read_metrics(str(out))) > lines)
                count.recovered(time.monotonic() - begin)
            except Exception as error:
                problems.append(f"{name}: {error!r}")

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    train.train(run)
    thread.join()
    assert not problems
    if tensors_of(out) != tensors_of(undisturbed):
        fault(names[signal.SIGKILL]).wrong += 1
    assert tensors_of(out) == tensors_of(undisturbed)


@pytest.mark.chaos
def test_a_worker_that_hangs_before_it_trains_is_replaced(
    fault: Callable[[str], Any], undisturbed: Path, tmp_path: Path, drivers: list[Driver]
) -> None:
    out, counts, count = tmp_path / "run", tmp_path / "counts", fault("train worker that hangs as it starts (Ray)")
    counts.mkdir()
    rules = {failpoints.VARIABLE: "meet=hang*1", failpoints.FOLDER: str(counts)}
    drivers.append(trainer(out, "--stall-seconds", "5", **rules))
    wait_for(lambda: any(counts.iterdir()), drivers[-1])
    count.injected += 1
    begin = time.monotonic()
    wait_for(lambda: step_of(out), drivers[-1])
    count.recovered(time.monotonic() - begin)
    status, said = drivers[-1].end()
    assert (status, "the workers have not met within 35 s" in said) == (0, True), said
    if tensors_of(out) != tensors_of(undisturbed):
        count.wrong += 1
    assert tensors_of(out) == tensors_of(undisturbed)


@pytest.mark.chaos
def test_a_driver_is_killed_then_preempted(
    fault: Callable[[str], Any], chance: random.Random, undisturbed: Path, tmp_path: Path, drivers: list[Driver]
) -> None:
    out = tmp_path / "run"
    killed, preempted = fault("kill -9 of a training's driver"), fault("SIGTERM to a training's driver (spot)")
    kill_at, stop_at = chance.randint(EVERY + 1, 2 * EVERY), chance.randint(2 * EVERY + 2, 3 * EVERY - 2)
    drivers.append(trainer(out))
    wait_for(lambda: step_of(out) >= kill_at, drivers[-1])
    drivers[-1].watch()
    drivers[-1].process.kill()
    killed.injected += 1
    assert len(drivers[-1].started) > 3
    wait_for(lambda: not drivers[-1].left())  # nothing of its private Ray stays
    begin, saved = time.monotonic(), checkpoint.last_step(str(out))
    assert saved is not None
    drivers[-1].end()

    drivers.append(trainer(out, "--resume"))
    wait_for(lambda: step_of(out) == saved + 1, drivers[-1])
    killed.recovered(time.monotonic() - begin)
    wait_for(lambda: step_of(out) >= stop_at, drivers[-1])
    drivers[-1].watch()
    drivers[-1].process.terminate()
    preempted.injected += 1
    begin = time.monotonic()
    status, said = drivers[-1].end()
    ended = time.monotonic()
    assert status == stop.STATUS, said
    last = checkpoint.last_step(str(out))
    assert last is not None
    assert f"error: preempted; step {last} of 240 is saved; run the same command with --resume" in said
    assert 2 * EVERY < last == step_of(out) <= 240
    assert ended - begin < 40
    wait_for(lambda: not drivers[-1].left())
    assert not (out / stop.FILE).exists()

    drivers.append(trainer(out, "--resume"))
    wait_for(lambda: step_of(out) == last + 1, drivers[-1])
    preempted.recovered(time.monotonic() - ended)
    status, said = drivers[-1].end()
    assert status == 0, said
    if tensors_of(out) != tensors_of(undisturbed):
        killed.wrong += 1
    assert tensors_of(out) == tensors_of(undisturbed)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
