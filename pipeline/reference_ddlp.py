"""DDLP beside its authors' code, and each of its faster forms beside the textbook's.

Steps are those of the main phase (no warm-up, no noise, every frame at full weight), forward, backward and Adam on
noise, with the squared error, in fp32 and under bf16 autocast; the rollout is the whole call, encode, rollout and
decode, in fp32. Every row is measured in a process of its own.

A pair of forms computes the same from the same tensors, on one thread, in alternating order; ratios are of CPU seconds
and taken inside a pair. With gradients means forward and backward to inputs and weights.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from objdyn import families
from objdyn.layers import convolution, particles, spatial
from objdyn.models import ddlp, dlp
from objdyn.models.ddlp import DDLP, DDLPConfig, match_template
from objdyn.models.dlp import Particles
from pipeline import textbook_ddlp, textbook_pint
from pipeline.presets import PRESETS
from pipeline.reference import THREADS, Figures, at_most, measure_step
from pipeline.textbook import compare, forms_table, verdicts_table
from pipeline.timing import in_child, repeat, replaced, spread

MAIN_PHASE = 1_000_000_000
"""A step after every schedule."""
CONTEXT, HORIZON = 10, 40
"""Frames of the rollout that are seen, and predicted."""
FORMS_OF = "balls-released"
"""The preset whose sizes the forms have, but for one of obj3d128."""
CONVOLUTIONS = 20
"""Convolutions in one measurement of the machine."""
ISSUE_RATE = 170
"""GFLOP per CPU second of the machine on which the targets were set."""


class Setting(NamedTuple):
    """A preset's training step, and what it may cost."""

    batch: int
    frames: int
    authors: Figures
    most: Figures
    goal: Figures
    bf16_goal: float
    """CPU seconds wanted under bf16 autocast."""


SETTINGS = {
    "balls-released": Setting(
        32, 11, Figures(21.5, 8.2), most=Figures(8.0, 3.5), goal=Figures(6.0, 2.0), bf16_goal=3.5
    ),
    "obj3d128": Setting(4, 11, Figures(18.0, 5.6), most=Figures(6.0, 3.0), goal=Figures(4.5, 2.0), bf16_goal=3.0),
    "phyre-released": Setting(1, 16, Figures(4.4, 2.9), most=Figures(2.2, 1.5), goal=Figures(1.7, 1.0), bf16_goal=1.2),
}
"""The published batches, but for PHYRE's (3), with figures of issue and specification."""
AUTHORS_RATE = (52.0, 73.0)
"""Predicted frames per second of wall time of the authors' rollout of balls, least and most."""
LEAST_RATE, GOAL_RATE = 150.0, 250.0


def measure(steps: int, pairs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the steps (``steps`` of each after one that is not counted), the rollout, and all pairs of forms."""
    rows: dict[str, Any] = {}
    for preset, setting in SETTINGS.items():
        for precision in ("fp32", "bf16 autocast"):
            say(f"reference: {preset}, {precision}")
            arguments = (config_of(preset), setting.batch, setting.frames, precision != "fp32", steps, THREADS)
            rows[f"{preset}, {precision}"] = in_child(measure_step, *arguments, MAIN_PHASE)
    say("reference: rollout")
    rollout = in_child(measure_rollout, config_of(FORMS_OF), CONTEXT, HORIZON, pairs, THREADS)
    forms = {}
    for name in FORMS:
        say(f"reference: {name}")
        forms[name] = in_child(measure_form, name, config_of(FORMS_OF), pairs)
    say("reference: convolution on this machine")
    return {
        "threads": THREADS,
        "steps": steps,
        "convolution": in_child(measure_convolution, pairs, THREADS),
        "rows": rows,
        "rollout": rollout,
        "forms": forms,
        "verdicts": judge(rows, rollout),
    }


def config_of(preset: str) -> DDLPConfig:
    """A preset's model with the squared error, in which the authors' code was measured."""
    return replace(cast(DDLPConfig, PRESETS["ddlp"][preset].model), recon_loss="mse")


def measure_convolution(times: int, threads: int) -> dict[str, Any]:
    """GFLOP per CPU second of a 3x3 convolution, 64 channels to 64, of 8 maps of 64 x 64: what bounds a step here."""
    torch.set_num_threads(threads)
    maps = torch.randn(8, 64, 66, 66).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    gflop = CONVOLUTIONS * 2 * 9 * 64 * 64 * 64 * 64 * len(maps) / 1e9
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, weight = maps.to(dtype), kernel.to(dtype)
        found = []
        for number in range(1 + times):
            begin = time.process_time()
            for _ in range(CONVOLUTIONS):
                torch.conv2d(x, weight)
            if number:
                found.append(gflop / (time.process_time() - begin))
        rates[name] = spread(found)._asdict()
    return rates


def measure_rollout(config: DDLPConfig, context: int, horizon: int, times: int, threads: int) -> dict[str, Any]:
    """Predicted frames per second of wall time, batch 1: encode the context, roll out, decode what was predicted."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = families.build(config).eval()
    video = torch.rand(1, context, 3, config.image_size, config.image_size)
    seconds: dict[str, list[float]] = {}
    device = torch.device("cpu")
    with torch.no_grad():
        whole = repeat(lambda: model.decode(model.rollout(model.encode(video), horizon)), times, device)
        latents = model.encode(video)
        future = model.rollout(latents, horizon)
        verbs = {
            "encode": lambda: model.encode(video),
            "rollout": lambda: model.rollout(latents, horizon),
            "decode": lambda: model.decode(future),
        }
        for verb, call in verbs.items():
            seconds[verb] = repeat(call, times, device)
    return {
        "context": context,
        "horizon": horizon,
        "seconds": spread(whole)._asdict(),
        "frames_per_second": horizon / statistics.median(whole),
        "parts": {verb: statistics.median(values) for verb, values in seconds.items()},
    }


def measure_form(name: str, config: DDLPConfig, pairs: int, scale: float = 1.0) -> dict[str, Any]:
    """One pair of forms; ``scale`` shrinks its batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DDLP(config).eval()
    ours, textbook = FORMS[name](model, lambda number: max(1, round(scale * number)))
    return compare("fast", ours, "textbook", textbook, pairs)


# ---- pairs of forms: of a model and a function that shrinks a batch, what to call ------------------------------------

Calls = tuple[Callable[[], Tensor], Callable[[], Tensor]]
Shrink = Callable[[int], int]


def _score_maps(maps: int, side: int) -> Callable[[DDLP, Shrink], Calls]:
    def calls(model: DDLP, shrink: Shrink) -> Calls:
        window, template = torch.rand(2, 1, shrink(maps), 3, side, side)
        return lambda: match_template(window, template), lambda: textbook_pint.score_maps(window, template)

    return calls


def _blocks(model: DDLP, shrink: Shrink) -> Calls:
    net = model.background_encoder.cnn
    images = torch.rand(shrink(32), 3, model.config.image_size, model.config.image_size, requires_grad=True)
    leaves = [images, *net.parameters()]
    return (
        _with_gradients(lambda: net(images), leaves),
        _with_gradients(lambda: textbook_ddlp.conv_chain(net, images), leaves),
    )


def _stitch(model: DDLP, shrink: Shrink) -> Calls:
    n, k, side, size = shrink(32), model.config.num_particles, model.config.glimpse_size, model.config.image_size
    leaves = [
        torch.rand(n, k, 4, side, side), _positions(n, k), torch.full((n, k, 2), 0.25), torch.randn(n, k),
        torch.rand(n, k), torch.rand(n, 3, size, size),
    ]  # fmt: skip
    leaves = [leaf.requires_grad_() for leaf in leaves]
    glimpses, position, scale, depth, transparency, background = leaves
    arguments = (glimpses, position, scale, depth, transparency, background)
    return (
        _with_gradients(lambda: particles.compose(*arguments), leaves),
        _with_gradients(lambda: textbook_ddlp.stitch(*arguments).video, leaves),
    )


def _cut(model: DDLP, shrink: Shrink) -> Calls:
    n, k, side, size = shrink(32), model.config.num_particles, model.config.glimpse_size, model.config.image_size
    images, position = torch.rand(n, 3, size, size), _positions(n, k).requires_grad_()
    scale = torch.full((n, k, 2), 0.25)
    return (
        _with_gradients(lambda: spatial.cut_glimpses(images, position, scale, side), [position]),
        _with_gradients(lambda: textbook_ddlp.cut_glimpses(images, position, scale, side), [position]),
    )


def _masks(model: DDLP, shrink: Shrink) -> Calls:
    n, k, side, size = shrink(352), model.config.num_particles, model.config.glimpse_size, model.config.image_size
    arguments = (_positions(n, k), torch.rand(n, k), side, size)
    return lambda: particles.background_mask(*arguments), lambda: textbook_ddlp.background_mask(*arguments)


def _attention(model: DDLP, shrink: Shrink) -> Calls:
    pint, frames = model.pint, model.config.max_frames
    tokens = torch.randn(shrink(32), frames * (model.config.num_particles + 1), model.config.pint_dim)
    tokens.requires_grad_()
    leaves = [tokens, *pint.blocks.parameters()]

    def fast() -> Tensor:
        found = tokens
        for block, bias in zip(pint.layers, pint.biases(frames), strict=True):
            found = block(found, bias)
        return found

    return _with_gradients(fast, leaves), _with_gradients(lambda: textbook_pint.layers(pint, tokens, frames), leaves)


def _rollout(model: DDLP, shrink: Shrink) -> Calls:
    size = model.config.image_size
    with torch.no_grad():
        latents: Particles = model.encode(torch.rand(1, CONTEXT, 3, size, size))

    def of(function: Callable[[Particles, int], Particles]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(latents, shrink(HORIZON)).position

        return call

    return of(model.rollout), of(lambda latents, horizon: textbook_pint.rollout(model, latents, horizon))


def _appearance(model: DDLP, shrink: Shrink) -> Calls:
    side, encoder = model.config.glimpse_size, model.appearance_encoder
    glimpses = torch.rand(shrink(4), 11, model.config.num_particles, 3, side, side, requires_grad=True)
    leaves = [glimpses, *encoder.parameters()]
    return (
        _with_gradients(
            lambda: torch.cat(encoder(glimpses.flatten(0, 2)), dim=-1).view(*glimpses.shape[:3], -1), leaves
        ),
        _with_gradients(lambda: torch.cat(textbook_pint.appearance(encoder, glimpses), dim=-1), leaves),
    )


def _step(model: DDLP, shrink: Shrink) -> Calls:
    """Forward and backward of the loss, with every form that has a textbook's exchanged for it."""
    size = model.config.image_size
    video = torch.rand(shrink(4), model.config.max_frames + 1, 3, size, size)
    fast = _with_gradients(lambda: model(video).total, list(model.parameters()), allow_unused=True)
    exchanged: list[tuple[Any, str, Any]] = [
        (convolution.ConvChain, "forward", textbook_ddlp.conv_chain),
        (dlp, "compose", lambda *arguments, **named: textbook_ddlp.stitch(*arguments, **named).video),
        (dlp, "cut_glimpses", textbook_ddlp.cut_glimpses),
        (dlp, "background_mask", textbook_ddlp.background_mask),
        (ddlp, "match_template", textbook_pint.score_maps),
    ]

    def textbook() -> Tensor:
        with contextlib.ExitStack() as stack:
            for owner, name, function in exchanged:
                stack.enter_context(replaced(owner, name, function))
            return fast()

    return fast, textbook


def _positions(n: int, k: int) -> Tensor:
    return 1.6 * torch.rand(n, k, 2) - 0.8


def _with_gradients(
    function: Callable[[], Tensor], leaves: Iterable[Tensor], allow_unused: bool = False
) -> Callable[[], Tensor]:
    leaves = list(leaves)

    def call() -> Tensor:
        value = function()
        torch.autograd.grad(value.square().sum(), leaves, allow_unused=allow_unused)
        return value.detach()

    return call


FORMS: dict[str, Callable[[DDLP, Shrink], Calls]] = {
    "score maps, 192 of 16 pixels": _score_maps(192, 16),
    "score maps, 48 of 32 pixels": _score_maps(48, 32),
    "background CNN, 32 frames, with gradients": _blocks,
    "paste and compose, 32 frames, with gradients": _stitch,
    "cut glimpses, 32 frames, with gradients": _cut,
    "background masks, 352 frames": _masks,
    "PINT's layers, 32 clips, with gradients": _attention,
    "rollout, 10 + 40 frames": _rollout,
    "appearance of 4 clips x 11 frames, with gradients": _appearance,
    "whole step of 4 clips x 11 frames, with gradients": _step,
}
"""By name, what each optimisation is measured on."""


def judge(rows: Mapping[str, Any], rollout: Mapping[str, Any]) -> dict[str, Any]:
    """Targets by name: what was measured, what it may be at most or at least, and whether it is met."""
    verdicts = {}
    for preset, setting in SETTINGS.items():
        plain, coarse = rows[f"{preset}, fp32"], rows[f"{preset}, bf16 autocast"]
        cpu, memory = plain["cpu_seconds"]["median"], plain["peak_memory_bytes"] / 1e9
        for name, limit in (("target", setting.most), ("goal", setting.goal)):
            verdicts[f"{preset}: CPU s per step, {name}"] = at_most(cpu, limit.cpu_seconds)
            verdicts[f"{preset}: peak memory in GB, {name}"] = at_most(memory, limit.memory)
        found = coarse["cpu_seconds"]["median"]
        verdicts[f"{preset}: CPU s per step, bf16 autocast, goal"] = at_most(found, setting.bf16_goal)
    for name, least in (("target", LEAST_RATE), ("goal", GOAL_RATE)):
        verdicts[f"rollout: predicted frames/s, {name}"] = _at_least(rollout["frames_per_second"], least)
    return verdicts


def _at_least(found: float, least: float) -> dict[str, Any]:
    return {"found": found, "least": least, "met": found >= least}


def table(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """Five tables of cells, headings first: the steps, the rollout, the machine, the targets, the pairs of forms."""
    head = [
        "step",
        "clips x frames",
        "CPU s (least - most)",
        "authors",
        "authors' / ours",
        "seconds",
        "peak GB",
        "authors",
    ]
    rows = [head]
    for name, row in report["rows"].items():
        setting = SETTINGS[name.partition(",")[0]]
        cpu, authors = row["cpu_seconds"], setting.authors
        times = f"{cpu['median']:.2f} ({cpu['least']:.2f} - {cpu['most']:.2f})"
        rows.append(
            [name, f"{setting.batch} x {setting.frames}", times, f"{authors.cpu_seconds:.1f}",
             f"{authors.cpu_seconds / cpu['median']:.2f}", f"{row['seconds']['median']:.2f}",
             f"{row['peak_memory_bytes'] / 1e9:.2f}", f"{authors.memory:.1f}"]
        )  # fmt: skip
    rollout = report["rollout"]
    least, most = AUTHORS_RATE
    times = " + ".join(f"{1e3 * seconds:.0f}" for seconds in rollout["parts"].values())
    rates = [
        ["rollout, batch 1", "predicted frames/s", "authors", f"ms of {' + '.join(rollout['parts'])}"],
        [f"{rollout['context']} + {rollout['horizon']} frames", f"{rollout['frames_per_second']:.0f}",
         f"{least:.0f} - {most:.0f}", times],
    ]  # fmt: skip
    machine = [["3x3 convolution on this machine", "GFLOP per CPU s (least - most)", "where the targets were set"]]
    for name, rate in report["convolution"].items():
        found = f"{rate['median']:.0f} ({rate['least']:.0f} - {rate['most']:.0f})"
        machine.append([name, found, str(ISSUE_RATE) if name == "fp32" else ""])
    return [rows, rates, machine, verdicts_table(report["verdicts"]), forms_table(report["forms"])]
