"""The state-space family beside its equations as they are written: CPU time of one forward and backward pass.

Two pairs of forms, at the paper's batch of 20 clips with three objects, fp32, one thread:

- the likelihood of positions, for 30 and 100 frames and two components: ``kalman.log_likelihood`` (dense), and the
  Kalman filter over frames in which each sequence and component has covariances of its own;
- the inference network, for 30 frames of 48 pixels and states of 1024: in waves, with gate and candidate in one product
  and the frames' product outside the loop, and frame by frame, object by object.

Each pair is measured in a process of its own, in alternating order; ratios are taken inside a pair.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from objdyn import kalman
from objdyn.kalman import LGSSM
from objdyn.models.ssm import InferenceNetwork, Prior, SSMConfig
from pipeline.timing import alternate, in_child, spread

PAPER = SSMConfig()
BATCH, OBJECTS, FRAMES = 20, 3, 30
MOST_MS = {30: 1.5, 100: 8.0}
"""CPU milliseconds that the likelihood of so many frames may take."""
LEAST_GAIN = {30: 13.0, 100: 8.0}
"""The same over the loop, which took 19.5 and 64.4 ms where they were set: for slower and for busy machines."""
LEAST_INFERENCE_GAIN = 1.5
CALLS = {"dense": 20, "loop": 3}
"""Calls of a form in one measurement, of which the mean counts."""


class Clocked(NamedTuple):
    """What a call takes, in milliseconds."""

    cpu: float
    wall: float


def measure(pairs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all pairs of forms, ``pairs`` times each after a call that is not counted."""
    rows: dict[str, Any] = {}
    for frames in MOST_MS:
        say(f"reference: likelihood of {frames} frames")
        rows[f"likelihood, T = {frames}"] = in_child(measure_likelihood, frames, pairs)
    say("reference: inference network")
    rows["inference network"] = in_child(measure_inference, PAPER, FRAMES, pairs)
    return {
        "batch": BATCH,
        "objects": OBJECTS,
        "components": PAPER.num_components,
        "threads": 1,
        "rows": rows,
        "verdicts": judge(rows),
    }


def measure_likelihood(frames: int, pairs: int, batch: int = BATCH, objects: int = OBJECTS) -> dict[str, Any]:
    """Dense likelihood beside the loop over frames: forward, and backward to positions and all parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        model = LGSSM(*(field.float() for field in Prior(PAPER)()))
        positions = kalman.sample(model, (batch, objects), frames).observations
    leaves = [tensor.requires_grad_() for tensor in (*model, positions)]

    def of(likelihood: Callable[[LGSSM, Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            value = likelihood(model, positions)
            torch.autograd.grad(value.sum(), leaves)
            return value.detach()

        return call

    calls = (CALLS["dense"], CALLS["loop"])
    return compare("dense", of(kalman.log_likelihood), "loop", of(filter_over_frames), pairs, calls)


def measure_inference(config: SSMConfig, frames: int, pairs: int, batch: int = BATCH) -> dict[str, Any]:
    """The inference network beside its direct form: forward, and backward to all weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = config.image_size**2
    network = InferenceNetwork(pixels, config.inference_dim, config.max_objects)
    direct = DirectInference(network)
    video = torch.rand(batch, frames, pixels).lt(0.01).float()
    start = network.start(torch.full((batch,), config.max_objects), config.max_objects).detach()

    def of(form: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            form.zero_grad(set_to_none=True)
            mean, std, _ = form(video, start)
            (mean.sum() + std.sum()).backward()
            return mean.detach()

        return call

    return compare("waves", of(network), "direct", of(direct), pairs)


def filter_over_frames(model: LGSSM, observations: Float[Tensor, "*batch t p"]) -> Float[Tensor, "*batch"]:
    r"""The log-likelihood as textbooks have it: all sequences at once, frame by frame, covariances for each.

    .. math::
        S = B P B^\top + \Sigma_A, \quad G = P B^\top S^{-1}, \quad m \leftarrow A (m + G r) + u, \quad
        P \leftarrow A \left( (I - G B) P (I - G B)^\top + G \Sigma_A G^\top \right) A^\top + \Sigma_H
    """
    A, u, B, Q, R, logits, mu, S = model
    p, d = B.shape
    batch = observations.shape[:-2]
    mean, cov = mu.expand(*batch, -1, -1), S.expand(*batch, -1, -1, -1)
    eye = torch.eye(d, dtype=A.dtype, device=A.device)
    total = logits.log_softmax(-1).expand(*batch, -1)
    for seen in observations.unbind(-2):
        residual = (seen.unsqueeze(-2) - mean @ B.mT).unsqueeze(-1)
        projected = B @ cov
        factor = torch.linalg.cholesky(projected @ B.mT + R)
        gain = torch.cholesky_solve(projected, factor).mT
        white = torch.linalg.solve_triangular(factor, residual, upper=False)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        total = total - 0.5 * white.square().sum((-2, -1)) - log_det - 0.5 * p * math.log(2 * math.pi)
        keep = eye - gain @ B
        mean = (mean + (gain @ residual).squeeze(-1)) @ A.mT + u
        cov = A @ (keep @ cov @ keep.mT + gain @ R @ gain.mT) @ A.mT + Q
    return total.logsumexp(-1)


class DirectInference(nn.Module):
    """An ``InferenceNetwork`` in the order of its equations: a product for the gate and one for the candidate of each
    object in each frame, with all that the object is told."""

    def __init__(self, network: InferenceNetwork) -> None:
        super().__init__()
        dim, pixels = network.past.in_features, network.frame.in_features
        columns = torch.cat([part.weight.detach() for part in (network.past, network.before, network.frame)], dim=1)
        self.gate, self.candidate = (nn.Linear(2 * dim + pixels, dim, dtype=columns.dtype) for _ in range(2))
        for half, layer in enumerate((self.gate, self.candidate)):
            with torch.no_grad():
                layer.weight.copy_(columns.chunk(2)[half])
                layer.bias.copy_(network.frame.bias.chunk(2)[half])
        self.heads = network.heads

    def forward(
        self, frames: Float[Tensor, "b t p"], state: Float[Tensor, "k b d"]
    ) -> tuple[Float[Tensor, "b t k 2"], Float[Tensor, "b t k 2"], Float[Tensor, "k b d"]]:
        """Mean and standard deviation of all positions, and the states after the last frame."""
        states, hidden = list(state.unbind()), []
        for frame in frames.unbind(1):
            before = torch.zeros_like(states[0])
            for number, past in enumerate(states):
                told = torch.cat([past, before, frame], dim=-1)
                gate, candidate = self.gate(told).sigmoid(), self.candidate(told).tanh()
                before = states[number] = (1 - gate) * before + gate * candidate
            hidden.append(torch.stack(states, dim=1))
        mean, raw = self.heads(torch.stack(hidden, dim=1)).chunk(2, dim=-1)
        return mean, nn.functional.softplus(raw) + 1e-4, torch.stack(states)


def judge(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Targets by name: what was measured, what it may be, and whether it is met."""
    verdicts = {}
    gains = {"inference network": LEAST_INFERENCE_GAIN}
    for frames, most in MOST_MS.items():
        name = f"likelihood, T = {frames}"
        found = rows[name]["forms"]["dense"]["cpu_ms"]["median"]
        verdicts[f"{name}: CPU ms"] = {"found": found, "most": most, "met": found <= most}
        gains[name] = LEAST_GAIN[frames]
    for name, least in gains.items():
        found = rows[name]["ratio"]["median"]
        verdicts[f"{name}: gain"] = {"found": found, "least": least, "met": found >= least}
    return verdicts


def table(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """Two tables of cells, headings first: the forms, the targets."""
    return [forms_table(report["rows"]), verdicts_table(report["verdicts"])]


def forms_table(pairs: Mapping[str, Any]) -> list[list[str]]:
    """Each pair of forms in two rows; the second has how often its CPU time is the first one's."""
    rows = [["", "form", "CPU ms (least - most)", "ms", "CPU ratio (least - most)", "largest difference"]]
    for name, row in pairs.items():
        for number, (form, found) in enumerate(row["forms"].items()):
            last = [_show(row["ratio"]), f"{row['difference']:.1e}"] if number else ["", ""]
            rows.append(["" if number else name, form, _show(found["cpu_ms"]), f"{found['ms']['median']:.3g}", *last])
    return rows


def verdicts_table(verdicts: Mapping[str, Any]) -> list[list[str]]:
    """What was found beside what was wanted, at most or at least."""
    rows = [["", "found", "target", ""]]
    for name, verdict in verdicts.items():
        target = f"<= {verdict['most']:g}" if "most" in verdict else f">= {verdict['least']:g}"
        rows.append([name, f"{verdict['found']:.2f}", target, "met" if verdict["met"] else "missed"])
    return rows


def compare(
    name: str,
    ours: Callable[[], Tensor],
    other_name: str,
    other: Callable[[], Tensor],
    pairs: int,
    calls: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Both forms' milliseconds, the ratio of their CPU times, and how far their results are apart.

    ``calls`` are those of either form in one measurement.
    """
    difference = (ours() - other()).abs().max().item()
    sides = (lambda: _clock(ours, calls[0])), (lambda: _clock(other, calls[1]))
    measured = alternate("reference", pairs, *sides)
    forms = dict(zip((name, other_name), zip(*measured, strict=True), strict=True))
    return {
        "forms": {form: _spreads(found) for form, found in forms.items()},
        "ratio": spread([b.cpu / a.cpu for a, b in measured])._asdict(),
        "difference": difference,
    }


def _clock(call: Callable[[], object], times: int) -> Clocked:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    return Clocked(1e3 * (time.process_time() - cpu) / times, 1e3 * (time.perf_counter() - wall) / times)


def _spreads(found: Sequence[Clocked]) -> dict[str, Any]:
    cpu, wall = (spread(values)._asdict() for values in zip(*found, strict=True))
    return {"cpu_ms": cpu, "ms": wall}


def _show(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3g} ({values['least']:.3g} - {values['most']:.3g})"
