"""The clocks on toys that take known times."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import nn

from pipeline import reader, store, timing
from pipeline.timing import IntegrityClock, Step, StepTimer

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        if inner is not None:
            self.inner = inner
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x * self.weight


class Toy(nn.Module):
    """A model whose children take known times; one of them holds others in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Sleeper(0.03)
        self.blocks = nn.ModuleList([Sleeper(0.01), Sleeper(0.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        x = self.slow(x)
        for block in self.blocks:
            x = block(x)
        return x.sum()


def toy_steps(model: nn.Module, timer: StepTimer, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    timer.attach(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3)).backward()
        time.sleep(0.015)
        optimizer.step()


@pytest.fixture(scope="module")
def toy() -> tuple[nn.Module, list[Step]]:
    model = Toy()
    with StepTimer(CPU) as timer:
        toy_steps(model, timer, 3)
    return model, timer.steps


def test_each_part_gets_its_own_time(toy: tuple[nn.Module, list[Step]]) -> None:
    for step in toy[1]:
        seconds = {name: cost.seconds for name, cost in step.parts.items()}
        assert seconds["forward"] == pytest.approx(0.02, abs=0.015)  # without its children
        assert seconds["forward/slow"] == pytest.approx(0.03, abs=0.015)
        assert seconds["forward/blocks.0"] == pytest.approx(0.01, abs=0.009)
        assert seconds["gradient clip"] >= 0.015
        assert {"forward/blocks.1", "backward", "optimiser", "other"} <= set(seconds)


def test_first_step_is_not_counted(toy: tuple[nn.Module, list[Step]]) -> None:
    assert len(toy[1]) == 2


def test_parts_of_a_step_sum_to_it(toy: tuple[nn.Module, list[Step]]) -> None:
    for step in toy[1]:
        assert sum(cost.seconds for cost in step.parts.values()) == pytest.approx(step.seconds, rel=0.01)
        assert sum(cost.cpu_seconds for cost in step.parts.values()) == pytest.approx(step.cpu_seconds, rel=0.05)


def test_nothing_stays_hooked(toy: tuple[nn.Module, list[Step]]) -> None:
    for module in toy[0].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert reader.TrainingReader.micro_batches.__module__ == "pipeline.reader"


def test_unsplit_steps_come_first_where_they_are_asked_for() -> None:
    with StepTimer(CPU, plain=2) as timer:
        toy_steps(nn.Linear(3, 1), timer, 0)
        model = Toy()
        toy_steps(model, timer, 4)
    assert [bool(step.parts) for step in timer.steps] == [False, False, True]
    assert timer.steps[0].seconds >= 0.07


def test_integrity_clock_sees_hashing_and_syncs(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    with IntegrityClock() as clock:
        published = store.publish(str(tmp_path / "file"), data)
    assert published.sha256 == hashlib.sha256(data).hexdigest()
    assert clock.sha256_seconds > 0
    assert clock.sync_seconds > 0
    assert os.fsync.__module__ == "posix"
    assert hashlib.sha256.__module__ == "_hashlib"


def test_peak_memory_is_that_of_the_child_alone() -> None:
    held = b"\x01" * (600 << 20)  # a new process would inherit this peak from getrusage
    code = (
        "from pipeline.machine import peak_memory\n"
        "before = peak_memory()\n"
        "held = b'\\x01' * (200 << 20)\n"
        "print(before, peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < len(held)
    assert 190 << 20 <= after - before <= 210 << 20


def test_child_that_dies_is_told() -> None:
    with pytest.raises(ChildProcessError, match=r"the process that ran _exit died \(out of memory"):
        timing.in_child(os._exit, 3)
