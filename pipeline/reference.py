"""Iterative inference beside its authors' code: CPU time and memory of one training step in fixed settings.

The models are ``IODINEConfig()`` and ``PROVIDEConfig(num_refinements=5)``: 64 pixels, K = 5, R = 5, decoder and
refinement of four convolutions with 64 channels, full resolution. IODINE takes 4 clips of 1 frame, PROVIDE 2 of 4.
ODDN, of which there is no other code, takes 1 clip of 4 frames with K = 7; beside its step stands that of the IODINE of
the baselines' code on the same frames. A step is forward, backward and Adam on noise, fp32, 2 threads. Every row is
measured in a process of its own.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from objdyn import families
from objdyn.models.iodine import IODINEConfig
from objdyn.models.oddn import ODDNConfig
from objdyn.models.provide import PROVIDEConfig
from pipeline.machine import peak_memory
from pipeline.timing import in_child, spread

THREADS = 2
LENGTHS = (2, 4, 8)
"""Frames of the clips whose memory tells what a frame costs."""
STRAIGHT = 1.05
"""Growth of memory counts as linear where later frames cost at most so many times what earlier ones do."""
RECOMPUTED = 1 / 3
"""Largest share of the memory per frame that recomputation may need."""


class Figures(NamedTuple):
    """What a step costs: CPU seconds, and peak memory in GB."""

    cpu_seconds: float
    memory: float


class Reference(NamedTuple):
    """A family's setting, and what its step may cost."""

    config: IODINEConfig
    batch: int
    frames: int
    authors: Figures
    most: Figures
    goal: Figures | None
    cheap_goal: float | None
    """CPU seconds wanted with bf16 autocast or strided refinement."""
    growth: bool = False
    """Whether memory is measured over ``LENGTHS``, too."""
    beside: str = "the authors' code"
    """What ``authors`` are figures of."""


REFERENCES = {
    "iodine": Reference(
        IODINEConfig(), 4, 1, authors=Figures(8.6, 2.9), most=Figures(5.0, 2.0), goal=Figures(4.2, 1.0), cheap_goal=2.5
    ),
    "provide": Reference(
        PROVIDEConfig(num_refinements=5), 2, 4,
        authors=Figures(24.5, 4.9), most=Figures(9.0, 2.5), goal=Figures(5.0, 1.5), cheap_goal=None, growth=True,
    ),
    "oddn": Reference(
        ODDNConfig(), 1, 4,
        authors=Figures(12.5, 3.6), most=Figures(7.0, 2.5), goal=None, cheap_goal=None,
        beside="the authors' IODINE alone",
    ),
}  # fmt: skip


def measure(family: str, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the rows of a family; ``steps`` of each after one that is not counted."""
    reference = REFERENCES[family]
    config, batch = reference.config, reference.batch
    variants: dict[str, tuple[IODINEConfig, bool]] = {
        "as published": (config, False),
        "recompute": (replace(config, recompute=True), False),
        "strided": (replace(config, refine="strided"), False),
        "bf16 autocast": (config, True),
    }
    rows = {}
    for name, (variant, autocast) in variants.items():
        say(f"reference: {name}")
        rows[name] = in_child(measure_step, variant, batch, reference.frames, autocast, steps, THREADS)
    report: dict[str, Any] = {
        "batch": batch,
        "frames": reference.frames,
        "slots": config.num_slots,
        "refinements": config.num_refinements,
        "size": config.image_size,
        "threads": THREADS,
        "steps": steps,
        "beside": reference.beside,
        "rows": rows,
        "verdicts": judge(reference, rows),
    }
    if reference.growth:
        growth = {}
        for name in ("as published", "recompute"):
            say(f"reference: memory of {', '.join(map(str, LENGTHS))} frames, {name}")
            peaks = {
                frames: in_child(measure_step, variants[name][0], batch, frames, False, 0, THREADS)["increase_bytes"]
                for frames in LENGTHS
            }
            growth[name] = growth_of(peaks)
        report["growth"] = growth
        report["verdicts"] |= judge_growth(growth)
    return report


def measure_step(
    config: Any, batch: int, frames: int, autocast: bool, steps: int, threads: int, completed: int = 0
) -> dict[str, Any]:
    """Cost of training steps in this process, after one that is not counted; its memory counts.

    ``completed`` is the number of steps that a model with schedules has made.

    ``increase_bytes`` is the peak above that of the process with model and data, before the first step.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = families.build(config).train()
    families.set_step(model, completed)
    optimizer = torch.optim.Adam(model.parameters())
    video = torch.rand(batch, frames, 3, config.image_size, config.image_size)
    before = peak_memory()
    seconds, cpu_seconds = [], []
    for number in range(1 + steps):
        begin, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(video)
        loss.total.backward()
        optimizer.step()
        if number or not steps:
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu)
    peak = peak_memory()
    return {
        "cpu_seconds": spread(cpu_seconds)._asdict(),
        "seconds": spread(seconds)._asdict(),
        "peak_memory_bytes": peak,
        "increase_bytes": max(0, peak - before),
    }


def growth_of(peaks: Mapping[int, float]) -> dict[str, Any]:
    """Bytes per frame: between neighbouring lengths, and of the line through all (least squares)."""
    lengths = sorted(peaks)
    pieces = [(peaks[b] - peaks[a]) / (b - a) for a, b in itertools.pairwise(lengths)]
    return {
        "bytes": {str(frames): peaks[frames] for frames in lengths},
        "pieces": pieces,
        "per_frame": statistics.linear_regression(lengths, [peaks[frames] for frames in lengths]).slope,
    }


def judge(reference: Reference, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Targets by name: what was measured, what it may be at most, and whether it is met."""
    plain = rows["as published"]
    cpu, memory = plain["cpu_seconds"]["median"], plain["peak_memory_bytes"] / 1e9
    verdicts = {}
    for name, limit in (("target", reference.most), ("goal", reference.goal)):
        if limit is None:
            continue
        verdicts[f"CPU s per step, {name}"] = at_most(cpu, limit.cpu_seconds)
        verdicts[f"peak memory in GB, {name}"] = at_most(memory, limit.memory)
    if reference.cheap_goal is not None:
        cheap = min(rows[name]["cpu_seconds"]["median"] for name in ("strided", "bf16 autocast"))
        verdicts["CPU s per step, bf16 or strided, goal"] = at_most(cheap, reference.cheap_goal)
    return verdicts


def judge_growth(growth: Mapping[str, Any]) -> dict[str, Any]:
    """Whether memory is at most linear in the number of frames, and recomputation needs a third of it."""
    pieces = growth["as published"]["pieces"]
    share = growth["recompute"]["per_frame"] / growth["as published"]["per_frame"]
    return {
        "memory of later frames over that of earlier ones": at_most(pieces[-1] / pieces[0], STRAIGHT),
        "memory per frame, recompute over plain": at_most(share, RECOMPUTED),
    }


def at_most(found: float, most: float) -> dict[str, Any]:
    """What was found, what it may be, and whether it is met."""
    return {"found": found, "most": most, "met": found <= most}


def table(family: str, report: Mapping[str, Any]) -> list[list[list[str]]]:
    """Three tables of cells, headings first: the rows, the memory per frame (if measured), the targets."""
    authors = REFERENCES[family].authors
    head = ["", "CPU s (least - most)", "authors' / ours", "seconds", "peak GB", "authors' / ours", "GB above start"]
    rows = [head]
    for name, row in report["rows"].items():
        cpu, peak = row["cpu_seconds"], row["peak_memory_bytes"] / 1e9
        times = f"{cpu['median']:.2f} ({cpu['least']:.2f} - {cpu['most']:.2f})"
        rows.append(
            [name, times, f"{authors.cpu_seconds / cpu['median']:.2f}", f"{row['seconds']['median']:.2f}",
             f"{peak:.2f}", f"{authors.memory / peak:.2f}", f"{row['increase_bytes'] / 1e9:.2f}"]
        )  # fmt: skip
    tables = [rows]
    if "growth" in report:
        head = ["GB above start", *(f"T = {frames}" for frames in LENGTHS), "GB per frame", "between lengths"]
        cells = [head]
        for name, growth in report["growth"].items():
            values = [f"{growth['bytes'][str(frames)] / 1e9:.3f}" for frames in LENGTHS]
            pieces = ", ".join(f"{piece / 1e9:.3f}" for piece in growth["pieces"])
            cells.append([name, *values, f"{growth['per_frame'] / 1e9:.3f}", pieces])
        tables.append(cells)
    verdicts = [["", "found", "at most", ""]]
    for name, each in report["verdicts"].items():
        met = "met" if each["met"] else "not met"
        verdicts.append([name, f"{each['found']:.2f}", f"{each['most']:.2f}", met])
    return [*tables, verdicts]
