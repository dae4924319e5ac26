"""Clocks: the parts of a training step, what SHA-256 and fsync take, calls, and what runs in a process of its own.

They watch code that knows nothing of them, through hooks and for a while replaced functions.
"""

import contextlib
import hashlib
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from pipeline.reader import TrainingReader

STEP_PARTS = ("data", "forward", "backward", "gradient clip", "optimiser", "other")

Result = TypeVar("Result")


class Spread(NamedTuple):
    """The middle of some measurements, and how far they go apart."""

    median: float
    least: float
    most: float


class Cost(NamedTuple):
    """What a part took."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""


@dataclass(frozen=True)
class Step:
    """One optimiser step; ``parts`` is empty where it was not split."""

    seconds: float
    cpu_seconds: float
    parts: dict[str, Cost]


class StepTimer:
    """Splits the steps of ``loop.train`` into parts, from outside.

        with StepTimer(device) as timer:
            loop.train(run, Worker(wrap=timer.attach))
        timer.steps

    A step reaches from the end of one ``optimizer.step()`` to the end of the next. At every moment one part, the top of
    a stack, gets the time, so that the parts sum to the step: ``data`` is the wait for the reader, ``forward/NAME``
    the model's child of that name without children that it calls in turn, ``forward/gradients`` calls of
    ``torch.autograd.grad`` in the forward pass, ``gradient clip`` all between the last
    ``backward()`` and the optimiser (norm, clipping, the check that it is finite), ``other`` the rest of the loop.
    """

    def __init__(
        self, device: torch.device, *, warm_up: int = 1, plain: int = 0, after_step: Callable[[], None] = lambda: None
    ) -> None:
        self.steps: list[Step] = []
        self._device = device
        self._plain = plain
        self._uncounted = warm_up
        self._after_step = after_step
        self._undo = contextlib.ExitStack()
        self._stack = ["other"]
        self._costs: dict[str, Cost] = {}
        self._last = self._step_begin = Cost(0.0, 0.0)
        self._splitting = plain == 0

    def attach(self, model: nn.Module) -> nn.Module:
        """Watch a model's forward pass and, inside it, that of its children."""
        self._watch(model, "forward", lambda: True)
        for name, child in _children(model):
            # The backward pass may run a forward again to save memory; that is not the forward's time.
            self._watch(child, f"forward/{name}", lambda: self._stack[1:2] == ["forward"])
        return model

    def __enter__(self) -> "StepTimer":
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        timer, micro_batches, backward = self, TrainingReader.micro_batches, torch.Tensor.backward
        gradient = torch.autograd.grad

        def timed_micro_batches(reader: TrainingReader, position: int = 0) -> Generator[Any, None, None]:
            with contextlib.closing(micro_batches(reader, position)) as batches:
                while True:
                    timer._enter("data", base="other")
                    batch = next(batches)
                    timer._leave()
                    yield batch

        def timed_backward(tensor: torch.Tensor, *arguments: Any, **named: Any) -> None:
            timer._enter("backward")
            backward(tensor, *arguments, **named)
            timer._leave(base="gradient clip")

        def timed_gradient(*arguments: Any, **named: Any) -> Any:
            inside = timer._stack[1:2] == ["forward"]  # iterative inference; backward may call it, too
            if inside:
                timer._enter("forward/gradients")
            found = gradient(*arguments, **named)
            if inside:
                timer._leave()
            return found

        self._undo.enter_context(replaced(TrainingReader, "micro_batches", timed_micro_batches))
        self._undo.enter_context(replaced(torch.Tensor, "backward", timed_backward))
        self._undo.enter_context(replaced(torch.autograd, "grad", timed_gradient))
        self._undo.callback(register_optimizer_step_pre_hook(lambda *_: self._enter("optimiser")).remove)
        self._undo.callback(register_optimizer_step_post_hook(lambda *_: self._end_of_step()).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _watch(self, module: nn.Module, name: str, wanted: Callable[[], bool]) -> None:
        entered: list[bool] = []  # a stack: a module may call itself

        def enter(*_: object) -> None:
            entered.append(wanted())
            if entered[-1]:
                self._enter(name)

        def leave(*_: object) -> None:
            if entered.pop():
                self._leave()

        self._undo.callback(module.register_forward_pre_hook(enter).remove)
        self._undo.callback(module.register_forward_hook(leave).remove)

    def _enter(self, name: str, base: str | None = None) -> None:
        self._charge()
        self._stack[0] = base or self._stack[0]
        self._stack.append(name)

    def _leave(self, base: str | None = None) -> None:
        self._charge()
        self._stack.pop()
        self._stack[0] = base or self._stack[0]

    def _charge(self) -> None:
        """Give the time since the last border to the part on top."""
        if self._splitting:
            now = self._now()
            before = self._costs.get(self._stack[-1], Cost(0.0, 0.0))
            self._costs[self._stack[-1]] = Cost(
                before.seconds + now.seconds - self._last.seconds,
                before.cpu_seconds + now.cpu_seconds - self._last.cpu_seconds,
            )
            self._last = now

    def _end_of_step(self) -> None:
        self._leave(base="other")
        now = self._last if self._splitting else self._now()
        if self._uncounted:
            self._uncounted -= 1
        else:
            begin = self._step_begin
            self.steps.append(Step(now.seconds - begin.seconds, now.cpu_seconds - begin.cpu_seconds, dict(self._costs)))
        self._costs.clear()
        self._splitting = len(self.steps) >= self._plain
        self._after_step()
        self._last = self._step_begin = self._now()

    def _now(self) -> Cost:
        _synchronize(self._device)
        return Cost(time.perf_counter(), time.process_time())


def mean_parts(steps: Sequence[Step]) -> dict[str, Any]:
    """The mean step and its parts: they sum to it. ``forward`` is the sum of its own parts, given beside."""
    names = sorted({name for step in steps for name in step.parts})

    def mean(select: Callable[[Step], float]) -> float:
        return statistics.fmean(map(select, steps))

    nothing = Cost(0.0, 0.0)
    costs = {
        name: Cost(
            mean(lambda step, name=name: step.parts.get(name, nothing).seconds),
            mean(lambda step, name=name: step.parts.get(name, nothing).cpu_seconds),
        )
        for name in names
    }
    inside = {name.removeprefix("forward/"): cost for name, cost in costs.items() if name.startswith("forward/")}
    if "forward" in costs:
        inside["other"] = costs["forward"]
        costs["forward"] = Cost(*(sum(column) for column in zip(*inside.values(), strict=True)))
    return {
        "seconds": mean(lambda step: step.seconds),
        "cpu_seconds": mean(lambda step: step.cpu_seconds),
        "parts": {name: costs.get(name, nothing)._asdict() for name in STEP_PARTS},
        "forward": {
            name: cost._asdict() for name, cost in sorted(inside.items(), key=lambda item: (item[0] == "other", item))
        },
    }


class IntegrityClock:
    """Adds up what SHA-256 and fsync take in this process while it is open.

    Hashing counts the CPU seconds of its thread, since it may run beside others; a sync the time that it waits.
    """

    def __init__(self) -> None:
        self.sha256_seconds = self.sync_seconds = 0.0
        self._undo = contextlib.ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> "IntegrityClock":
        sha256, fsync = hashlib.sha256, os.fsync

        def timed_sha256(data: Any = b"", **named: Any) -> _TimedHash:
            return _TimedHash(sha256(**named), self).extended(data)

        def timed_fsync(descriptor: Any) -> None:
            begin = time.perf_counter()
            fsync(descriptor)
            with self._lock:
                self.sync_seconds += time.perf_counter() - begin

        self._undo.enter_context(replaced(hashlib, "sha256", timed_sha256))
        self._undo.enter_context(replaced(os, "fsync", timed_fsync))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def add_hashing(self, seconds: float) -> None:
        with self._lock:
            self.sha256_seconds += seconds


class _TimedHash:
    """A SHA-256 that tells a clock what it takes."""

    def __init__(self, digest: Any, clock: IntegrityClock) -> None:
        self._digest, self._clock = digest, clock

    def extended(self, data: Any) -> "_TimedHash":
        self.update(data)
        return self

    def update(self, data: Any) -> None:
        begin = time.thread_time()
        self._digest.update(data)
        self._clock.add_hashing(time.thread_time() - begin)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._digest, name)


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def repeat(call: Callable[[], object], times: int, device: torch.device, seconds: float = 20.0) -> list[float]:
    """Time a call, ``times`` times after one that is not counted; from the third on it ends after ``seconds``."""
    measured: list[float] = []
    for number in range(1 + times):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        if number:
            measured.append(time.perf_counter() - begin)
        if len(measured) >= 3 and sum(measured) > seconds:
            break
    return measured


def alternate(
    label: str, pairs: int, stage: Callable[[], Result], bare: Callable[[], Result]
) -> list[tuple[Result, Result]]:
    """Run both sides one right after the other, ``pairs`` times, and swap the order each time."""
    results: list[tuple[Result, Result]] = []
    for number in range(pairs):
        say(f"{label}: pair {number + 1} of {pairs}")
        if number % 2 == 0:
            b, a = bare(), stage()
        else:
            a, b = stage(), bare()
        results.append((a, b))
    return results


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def new_processes(number: int, niceness: int = 0) -> ProcessPoolExecutor:
    """A pool of fresh processes, of lower priority by ``niceness``."""
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(niceness,))


def in_child(function: Callable[..., Result], *arguments: Any, niceness: int = 0) -> Result:
    """Call a function in a new process that does nothing else.

    Raises:
        ChildProcessError: the process died.
    """
    with new_processes(1, niceness) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"the process that ran {function.__name__} died (out of memory?); measure a smaller preset, or leave "
                "that part out with --parts"
            ) from error


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something else in the place of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children that have a forward pass: a list of modules, or one with other methods, has none, its members do."""
    for name, child in model.named_children():
        if type(child).forward is nn.Module.forward:
            yield from ((f"{name}.{inner}", module) for inner, module in _children(child))
        else:
            yield name, child


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
