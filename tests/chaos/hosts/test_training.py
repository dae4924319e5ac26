"""Training over two hosts: the same as on one, also when a host dies or is cut off in the middle."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
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


def wait_for_step(program: subprocess.Popen[bytes], out: Path, step: int, log: Path) -> None:
    end = time.monotonic() + WAIT
    while (checkpoint.last_step(str(out)) or 0) < step:
        assert program.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(ray_of_two: Any, repository: Path) -> Path:
    """The run over two hosts that nothing happens to."""
    ray_of_two.wait_for_nodes(2)
    head, out = ray_of_two.hosts[0], ray_of_two.shared / "undisturbed"
    log = ray_of_two.shared / "undisturbed.log"
    program = head.start(*words_of(repository, out), log=log, RAY_ADDRESS=ray_of_two.ray)
    wait_for_step(program, out, EVERY, log)
    where = {host.name: len(host.processes("RayTrainWorker")) for host in ray_of_two.hosts}
    assert where == {"head": 1, "second": 1}
    status, text = ray_of_two.finish(program, log, WAIT)
    assert status == 0, text
    return out


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
    head, second = cluster.hosts[:2]
    count = fault("kill -9 of a raylet")
    out, log = cluster.shared / "killed", cluster.shared / "killed.log"
    program = head.start(*words_of(repository, out), log=log, RAY_ADDRESS=cluster.ray)
    for text, after in (("raylet/raylet", EVERY), ("", STEPS // 2)):  # the raylet alone, and all that the host ran
        wait_for_step(program, out, after + EVERY * chance.randrange(2), log)
        before = checkpoint.last_step(str(out))
        assert before is not None
        assert second.kill(text) > 0
        count.injected += 1
        killed = time.monotonic()
        cluster.join(second, 2)
        wait_for_step(program, out, before + EVERY, log)
        count.recovered(time.monotonic() - killed)
    status, text = cluster.finish(program, log, WAIT)
    assert status == 0, text
    count.wrong += curve(out) != curve(undisturbed)
    assert_equal(out, undisturbed)


def test_lost_network_is_noticed_and_training_goes_on_when_it_is_back(
    cluster: Any, undisturbed: Path, repository: Path, fault: Callable[[str], Any], chance: random.Random
) -> None:
    head, second = cluster.hosts[:2]
    count = fault("lost network between nodes")
    out, log = cluster.shared / "cut", cluster.shared / "cut.log"
    words = [*words_of(repository, out), "--stall-seconds=60"]
    program = head.start(*words, log=log, RAY_ADDRESS=cluster.ray)

    wait_for_step(program, out, EVERY, log)
    cluster.plug(second, False)  # for so short a time that nobody is given up
    time.sleep(chance.uniform(0.5, 2.0))
    cluster.plug(second, True)
    count.injected += 1
    plugged = time.monotonic()
    wait_for_step(program, out, 2 * EVERY, log)
    count.recovered(time.monotonic() - plugged)

    before = checkpoint.last_step(str(out))
    assert before is not None
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
    wait_for_step(program, out, before + EVERY, log)
    count.recovered(time.monotonic() - cut)

    status, text = cluster.finish(program, log, WAIT)
    assert status == 0, text
    count.wrong += curve(out) != curve(undisturbed)
    assert_equal(out, undisturbed)
