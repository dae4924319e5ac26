"""Disturb workers that train together without Ray, start them again, and compare with a run that nothing disturbed.

    python tests/pipeline/training_faults.py                 a sample of each fault
    python tests/pipeline/training_faults.py --times 5       more of it
    python tests/pipeline/training_faults.py --only SIGTERM

As in ``faults.py`` one process imports everything and forks the workers of each life, here also two that train as one.
What disturbs them falls at steps drawn from ``--seed``: SIGKILL of one worker, SIGTERM to one, a worker that hangs in
a step or is stopped as a whole. In the end the weights and the optimiser must be the undisturbed run's, bit for bit; a
death may repeat one checkpoint interval, and a SIGTERM nothing.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from faults import FRAMES, SIZE, Count, ToyConfig, shard_run, without_ray
from torch import nn

from pipeline import checkpoint, failpoints, loop, shard, stop, store
from pipeline.config import OptimConfig, TrainRun
from pipeline.quickstart import write_mp4

STEPS, EVERY = 24, 5
STALL_SECONDS, PATIENT_SECONDS = 4.0, 60.0
"""Of the lives that stand still, and of all others: to start takes long on a busy machine."""
LIVES = 12
SLOW = 0.02
"""Seconds of a step beside its work, so that what comes from outside meets a run in the middle."""


@dataclasses.dataclass
class Life:
    """How the workers of one life ended, and what they did."""

    status: list[int]
    """Of each, as ``os.waitpid`` gives it: a signal is negative."""
    steps: list[int]
    """Optimiser steps that worker 0 took, in order."""
    first: float
    """When the first of them was taken; seconds of the clock."""
    ended: float


class Group:
    """So many workers in a folder."""

    def __init__(self, folder: str, data: str, world: int) -> None:
        self.folder, self.world = folder, world
        self.run = TrainRun(
            model=cast(Any, ToyConfig()),
            data=data,
            out=store.join(folder, "run"),
            steps=STEPS,
            clip_frames=FRAMES,
            optim=OptimConfig(lr=5e-3, eps=1e-8, batch_size=2, micro_batch_size=1),
            workers=world,
            device="cpu",
            threads=1,
            log_every=3,
            eval_every=0,
            checkpoint_every=EVERY,
            keep_last=2,
            stall_seconds=PATIENT_SECONDS,
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(store.join(folder, "counts"))

    def live(self, rules: str = "", disturb: Callable[[list[int], Path], None] | None = None, **changes: Any) -> Life:
        """One life of all workers; ``disturb`` gets their processes and the file in which the steps are counted."""
        run = dataclasses.replace(self.run, **changes)
        run = loop.open_run(dataclasses.replace(run, resume=store.exists(store.join(run.out, "config.json"))))
        marks = Path(self.folder, "marks")
        for name in ("marks", "meeting"):
            Path(self.folder, name).unlink(missing_ok=True)
        processes = []
        for rank in range(self.world):
            processes.append(os.fork())
            if not processes[-1]:
                os._exit(self.work(run, rank, rules, marks))
        if disturb is not None:
            disturb(processes, marks)
        status: list[int] = [0] * self.world
        left = dict(zip(processes, range(self.world), strict=True))
        while left:
            process, how = os.waitpid(-1, 0)
            status[left.pop(process)] = os.waitstatus_to_exitcode(how)
            if how:  # as Ray does: the others end with it, also one that is stopped
                time.sleep(0.2)
                deadline = time.monotonic() + (1.0 if status.count(stop.STATUS) else 0.0)
                while left and time.monotonic() < deadline:
                    done, how = os.waitpid(-1, os.WNOHANG)
                    if done:
                        status[left.pop(done)] = os.waitstatus_to_exitcode(how)
                    time.sleep(0.01)
                for other in left:
                    os.kill(other, signal.SIGKILL)
        lines = [line.split() for line in marks.read_text().splitlines()] if marks.exists() else []
        steps = [int(step) for step, _ in lines]
        return Life(status, steps, float(lines[0][1]) if lines else 0.0, time.monotonic())

    def work(self, run: TrainRun, rank: int, rules: str, marks: Path) -> int:
        """Train as one of the workers; the exit status."""
        with open(store.join(self.folder, f"said-{rank}"), "a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        failpoints.arm(rules, store.join(self.folder, "counts"))
        real = loop.learning_rate

        def observed(*arguments: Any) -> float:
            if rank == 0:
                with marks.open("a") as file:
                    file.write(f"{arguments[1] + 1} {time.monotonic()}\n")
            time.sleep(SLOW)
            return real(*arguments)

        loop.learning_rate = observed
        try:
            if self.world > 1:
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                meeting = f"file://{self.folder}/meeting"
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=self.world)
            wrap = nn.parallel.DistributedDataParallel if self.world > 1 else lambda model: model
            loop.train(run, loop.Worker(rank=rank, world=self.world, wrap=wrap))
            return 0
        except stop.Preempted:
            return stop.STATUS
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1

    def weights(self) -> str:
        """A digest of the last checkpoint's tensors, and of where it stands."""
        saved = checkpoint.load_last(self.run.out)
        assert saved is not None
        digest = hashlib.sha256(repr((saved.step, saved.state["position"])).encode())
        for part in (saved.model, saved.optimizer):
            for name, tensor in part.items():
                digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def step_of(rank: int, step: int) -> str:
    return f"step:worker {rank} step {step:08d}"


def kill(group: Group, chance: random.Random, count: Count) -> str:
    """SIGKILL of one worker, up to three times in a run."""
    drawn = sorted(chance.sample(range(1, STEPS + 1), chance.randint(1, 3)))
    rules = "; ".join(f"{step_of(chance.randrange(group.world), step)}=kill*1" for step in drawn)
    lives: list[Life] = []
    while not lives or any(lives[-1].status):
        if len(lives) == LIVES:
            return f"{rules}: no end after {LIVES} lives"
        lives.append(group.live(rules))
        if len(lives) > 1:
            count.seconds.append(lives[-1].first - lives[-2].ended)
    count.injected += len(drawn)
    if len(lives) != len(drawn) + 1:
        return f"{rules}: {len(lives)} lives"
    repeated = [len(set(one.steps) & set(two.steps)) for one, two in itertools.pairwise(lives)]
    if max(repeated) > EVERY:
        return f"{rules}: {max(repeated)} steps were taken twice"
    return ""


def terminate(group: Group, chance: random.Random, count: Count) -> str:
    """SIGTERM to one worker, wherever the run is, twice in a run."""
    lives: list[Life] = []
    for number in range(2):
        rank, wait = chance.randrange(group.world), chance.randint(1, STEPS // 3)

        def disturb(processes: list[int], marks: Path, rank: int = rank, wait: int = wait) -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                if marks.exists() and len(marks.read_text().splitlines()) >= wait:
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, SLOW))
            os.kill(processes[rank], signal.SIGTERM)

        lives.append(group.live("", disturb))
        count.injected += 1
        if lives[-1].status != [stop.STATUS] * group.world:
            return f"SIGTERM {number} to worker {rank} after {wait} steps: the workers ended with {lives[-1].status}"
        if checkpoint.last_step(group.run.out) != lives[-1].steps[-1]:
            return f"step {checkpoint.last_step(group.run.out)} is saved and {lives[-1].steps[-1]} was the last"
    lives.append(group.live())
    count.seconds += [two.first - one.ended for one, two in itertools.pairwise(lives)]
    if any(lives[-1].status):
        return f"it did not go on: {lives[-1].status}"
    taken = [step for life in lives for step in life.steps]
    return "" if taken == list(range(1, STEPS + 1)) else f"steps were taken as {taken}"


def hang(group: Group, chance: random.Random, count: Count) -> str:
    """A worker that hangs in a step: all end themselves within the limit."""
    return _stall(group, count, f"{step_of(chance.randrange(group.world), chance.randint(2, STEPS))}=hang*1", None)


def freeze(group: Group, chance: random.Random, count: Count) -> str:
    """A worker that is stopped as a whole: the other ends itself, and what starts them again ends the stopped one."""
    rank, wait = chance.randrange(2), chance.randint(1, STEPS // 2)

    def disturb(processes: list[int], marks: Path) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if marks.exists() and len(marks.read_text().splitlines()) >= wait:
                break
            time.sleep(0.001)
        os.kill(processes[rank], signal.SIGSTOP)

    return _stall(group, count, "", disturb)


def _stall(group: Group, count: Count, rules: str, disturb: Callable[[list[int], Path], None] | None) -> str:
    first = group.live(rules, disturb, stall_seconds=STALL_SECONDS)
    count.injected += 1
    last = float(Path(group.folder, "marks").read_text().split()[-1]) if first.steps else first.ended
    noticed, second = first.ended - last, group.live(rules)
    count.seconds.append(second.first - last)
    said = "".join(path.read_text() for path in Path(group.folder).glob("said-*"))
    if f"has not moved for {STALL_SECONDS:g} s" not in said or "in _train" not in said:
        return f"{rules}: nobody said where it stood: {said[-300:]}"
    if not any(first.status) or any(second.status):
        return f"{rules}: ended with {first.status} and {second.status}"
    if noticed > STALL_SECONDS + 8:
        return f"{rules}: it was noticed after {noticed:.1f} s"
    return ""


FAULTS: dict[str, tuple[Callable[[Group, random.Random, Count], str], tuple[int, ...]]] = {
    "kill -9 of a train worker": (kill, (1, 2)),
    "SIGTERM to a train worker (spot)": (terminate, (1, 2)),
    "hung train worker": (hang, (1, 2)),
    "stopped train worker (SIGSTOP)": (freeze, (2,)),
}


def other_worlds(folder: str, data: str, whole: dict[int, str], chance: random.Random, count: Count) -> str:
    """One worker up to some step, two from there on, and back: sums in another order, nothing else."""
    cuts = sorted(chance.sample(range(1, STEPS), 2))
    groups = [Group(store.join(folder, "worlds"), data, world) for world in (1, 2, 1)]
    for group, steps in zip(groups, (*cuts, STEPS), strict=True):
        life = group.live(steps=steps)
        count.injected += 1
        if any(life.status):
            return f"{group.world} workers to step {steps}: {life.status}"
    ours, theirs = (checkpoint.load_last(store.join(folder, name, "run")) for name in ("worlds", "whole-1"))
    assert ours is not None
    assert theirs is not None
    for name, tensor in theirs.model.items():
        if not torch.allclose(ours.model[name], tensor, atol=1e-5, rtol=1e-4):
            return f"changed at {cuts}: {name} differs by {(ours.model[name] - tensor).abs().max():.2g}"
    return "" if ours.state["position"] == theirs.state["position"] else "another position"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=1, help="runs of each fault and number of workers")
    parser.add_argument("--only", default="", help="part of the names of the faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where a temporary folder for all of it is made")
    parser.add_argument("--json", help="file that gets the counts")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    checkpoint.code_revision()
    without_ray()
    counts: dict[str, Count] = {}
    problems = []
    with tempfile.TemporaryDirectory(prefix="training-", dir=arguments.folder) as folder:
        videos, data = store.join(folder, "videos"), store.join(folder, "data")
        os.mkdir(videos)
        for name, length in (("a.mp4", 9), ("b.mp4", 12)):
            frames = np.full((length, SIZE, SIZE, 3), 90, np.uint8)
            for i in range(length):
                frames[i, 4 + i : 12 + i, 8:16] = 220
            write_mp4(store.join(videos, name), frames, 25.0)
        shard.shard(shard_run(videos, data, "train"))
        whole = {}
        for world in (1, 2):
            group = Group(store.join(folder, f"whole-{world}"), data, world)
            life = group.live()
            assert life.status == [0] * world, Path(group.folder, "said-0").read_text()
            assert life.steps == list(range(1, STEPS + 1))
            whole[world] = group.weights()
        for name, (disturb, worlds) in FAULTS.items():
            if arguments.only not in name:
                continue
            count = counts[name] = Count()
            for world in worlds:
                for _ in range(arguments.times):
                    before, group = count.injected, Group(store.join(folder, "run"), data, world)
                    problem = disturb(group, chance, count)
                    if not problem and group.weights() != whole[world]:
                        problem = "the weights are other ones in the end"
                        count.wrong += 1
                    if problem:
                        problems.append(f"{name}, {world} workers: {problem}")
                    else:
                        count.survived += count.injected - before
            print(name, dataclasses.asdict(count), flush=True)
        name = "resume with another number of workers"
        if arguments.only in name:
            count = counts[name] = Count()
            for _ in range(arguments.times):
                before = count.injected
                if problem := other_worlds(folder, data, whole, chance, count):
                    problems.append(f"{name}: {problem}")
                else:
                    count.survived += count.injected - before
            print(name, dataclasses.asdict(count), flush=True)
    for problem in problems:
        print(f"problem: {problem}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({name: dataclasses.asdict(c) for name, c in counts.items()}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
