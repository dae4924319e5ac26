"""Training over two hosts: the same as on one, also when a host dies or is cut off in the middle."""

import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint, loop
from pipeline.config import with_overrides
from pipeline.presets import PRESETS

pytestmark = pytest.mark.chaos

STEPS, EVERY = 32, 4
WAIT = 240.0
"""Seconds within which anything must happen on a machine that is busy; a quiet one needs a tenth."""
NOTICED = 60.0
"""Seconds within which the head must give up a node that it cannot reach; a third of it by the settings of the room."""
NEWS = 6.0
"""Seconds after which every worker has heard that a node is taken away: Ray asks every 2 s, and so do the workers."""
# The batch falls into the same micro-batches, so with the same noise, on one worker and on two.
SETTINGS = {
    "optim.batch_size": 4,
    "optim.micro_batch_size": 2,
    "threads": 1,
    "steps": STEPS,
    "checkpoint_every": EVERY,
    "log_every": 1,
    "eval_every": STEPS,
}


def words_of(repository: Path, out: Path) -> list[str]:
    """The command that trains on two workers."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    return [sys.executable, str(repository / "jobs/train_ddlp.py"), "debug", f"--out={out}", "--workers=2", *flags]


def curve(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what the clock decides."""
    return [
        {name: value for name, value in line.items() if name not in loop.CLOCK_FIELDS}
        for line in loop.read_metrics(str(out))
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load_last(str(out))
    assert saved is not None
    assert saved.step == STEPS
    assert saved.state["position"] == STEPS * SETTINGS["optim.batch_size"]
    return saved.model


def assert_equal(out: Path, undisturbed: Path) -> None:
    """The same to the bit: weights, and every line of metrics once."""
    expected = weights(undisturbed)
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, expected[name]), name
    assert curve(out) == curve(undisturbed)


@dataclasses.dataclass
class Training:
    """A job that trains over both hosts of a room."""

    room: Any
    out: Path
    log: Path
    program: subprocess.Popen[bytes]

    @classmethod
    def start(cls, room: Any, name: str, repository: Path, *more: str) -> "Training":
        out, log = room.shared / name, room.shared / f"{name}.log"
        words = [*words_of(repository, out), *more]
        return cls(room, out, log, room.hosts[0].start(*words, log=log, RAY_ADDRESS=room.ray))

    @property
    def step(self) -> int:
        """The step of its last checkpoint; 0 before the first."""
        return checkpoint.last_step(str(self.out)) or 0

    def wait_for(self, step: int) -> None:
        """Wait until a step is saved."""
        end = time.monotonic() + WAIT
        while self.step < step:
            assert self.program.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        status, text = self.room.finish(self.program, self.log, WAIT)
        assert status == 0, text


@contextlib.contextmanager
def disturbed(room: Any, name: str, repository: Path, undisturbed: Path, count: Any, *more: str) -> Iterator[Training]:
    """A training to disturb within the block, which must end as if nobody had."""
    run = Training.start(room, name, repository, *more)
    yield run
    run.finish()
    count.wrong += curve(run.out) != curve(undisturbed)
    assert_equal(run.out, undisturbed)


@pytest.fixture(scope="module")
def undisturbed(ray_of_two: Any, repository: Path) -> Path:
    """The run over two hosts that nothing happens to."""
    ray_of_two.wait_for_nodes(2)
    run = Training.start(ray_of_two, "undisturbed", repository)
    run.wait_for(EVERY)
    where = {host.name: len(host.processes("RayTrainWorker")) for host in ray_of_two.hosts[:2]}
    assert where == {"head": 1, "second": 1}
    run.finish()
    return run.out


def test_two_hosts_learn_what_one_does(undisturbed: Path, tmp_path: Path) -> None:
    run = with_overrides(PRESETS["ddlp"]["debug"], SETTINGS | {"out": str(tmp_path / "alone"), "device": "cpu"})
    loop.train(loop.open_run(run))
    one, two = curve(Path(run.out)), curve(undisturbed)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for line, other in zip(one, two, strict=True):
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        assert {name: other[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=2e-4)
        assert line.keys() == other.keys()
    expected = weights(Path(run.out))
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3, msg=name)


def test_two_hosts_learn_to_the_bit_what_two_workers_of_one_do(room: Any, undisturbed: Path, repository: Path) -> None:
    out, log = room.shared / "one-host", room.shared / "one-host.log"
    status, text = room.add("alone").run(*words_of(repository, out), log=log, seconds=WAIT)
    assert status == 0, text
    assert_equal(out, undisturbed)


def test_killed_raylet_is_replaced_and_training_ends_as_if_nothing_had_happened(
    cluster: Any, undisturbed: Path, repository: Path, fault: Callable[[str], Any], chance: random.Random
) -> None:
    second, count = cluster.hosts[1], fault("kill -9 of a raylet")
    with disturbed(cluster, "killed", repository, undisturbed, count) as run:
        for text, after in (("raylet/raylet", EVERY), ("", STEPS // 2)):  # the raylet alone, and all that the host ran
            run.wait_for(after + EVERY * chance.randrange(2))
            before = run.step
            assert second.kill(text) > 0
            count.injected += 1
            killed = time.monotonic()
            cluster.join(second, 2)
            run.wait_for(before + EVERY)
            count.recovered(time.monotonic() - killed)


def test_lost_network_is_noticed_and_training_goes_on_when_it_is_back(
    cluster: Any, undisturbed: Path, repository: Path, fault: Callable[[str], Any], chance: random.Random
) -> None:
    second, count = cluster.hosts[1], fault("lost network between nodes")
    with disturbed(cluster, "cut", repository, undisturbed, count, "--stall-seconds=60") as run:
        run.wait_for(EVERY)
        cluster.plug(second, False)  # for so short a time that nobody is given up
        time.sleep(chance.uniform(0.5, 2.0))
        cluster.plug(second, True)
        count.injected += 1
        plugged = time.monotonic()
        run.wait_for(2 * EVERY)
        count.recovered(time.monotonic() - plugged)

        before = run.step
        cluster.plug(second, False)
        cut = time.monotonic()
        count.injected += 1
        cluster.wait_for_nodes(1)
        noticed = time.monotonic() - cut
        assert noticed < NOTICED, noticed
        cluster.plug(second, True)
        # A node that was given up ends itself as soon as it hears of that; an operator's service starts it again.
        end = time.monotonic() + WAIT
        while second.processes("raylet/raylet"):
            assert time.monotonic() < end
            time.sleep(0.1)
        second.kill()
        cluster.join(second, 2)
        run.wait_for(before + EVERY)
        count.recovered(time.monotonic() - cut)


def test_host_that_is_taken_away_with_notice_is_left_with_the_step_saved(
    cluster: Any, undisturbed: Path, repository: Path, fault: Callable[[str], Any]
) -> None:
    """What a spot node's notice comes to: Ray is told to drain the node, which then goes."""
    second, count = cluster.hosts[1], fault("node that is drained (spot)")
    notice = ["drain-node", f"--address={cluster.ray}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
    notice += ["--reason-message=spot", "--deadline-remaining-seconds=60"]
    with disturbed(cluster, "drained", repository, undisturbed, count) as run:
        run.wait_for(EVERY)
        (worker,) = second.processes("RayTrainWorker")
        os.kill(worker, signal.SIGSTOP)  # so that the run is not over before the news is there
        status, text = second.run(str(Path(sys.executable).parent / "ray"), *notice, log=cluster.shared / "notice.log")
        assert status == 0, text
        count.injected += 1
        time.sleep(NEWS)
        os.kill(worker, signal.SIGCONT)
        told = re.compile(r"a node is being taken away; going on from step (\d+) once 2 workers have a place")
        end = time.monotonic() + WAIT
        while not (found := told.search(run.log.read_text())):
            assert run.program.poll() is None, run.log.read_text()
            assert time.monotonic() < end, run.log.read_text()
            time.sleep(0.05)
        left = time.monotonic()
        assert int(found[1]) == run.step == curve(run.out)[-1]["step"]  # the step that it was at: none is repeated
        second.kill()
        cluster.join(second, 2)
        run.wait_for(run.step + 1)
        count.recovered(time.monotonic() - left)
    assert "starting again from the last checkpoint" not in run.log.read_text()
