"""The state-space family beside its equations: equal results, the targets' arithmetic, and the forms measured."""

from typing import Any

import pytest
import torch

from objdyn import kalman
from objdyn.kalman import LGSSM
from objdyn.models.ssm import InferenceNetwork, Prior, SSMConfig
from pipeline import benchmark, textbook

TINY = SSMConfig(image_size=4, inference_dim=8, max_objects=2)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textbook, "in_child", lambda function, *arguments: function(*arguments))


@pytest.mark.parametrize("frames", [1, 12])
def test_the_filter_over_frames_has_the_dense_likelihood_and_its_gradients(frames: int) -> None:
    torch.manual_seed(0)
    model = LGSSM(*(field.detach().requires_grad_() for field in Prior(SSMConfig(num_components=3))()))
    positions = 3 * torch.randn(2, 3, frames, 2, dtype=torch.float64)
    ours, loop = kalman.log_likelihood(model, positions), textbook.filter_over_frames(model, positions)
    torch.testing.assert_close(ours, loop, atol=1e-9, rtol=0)
    pairs = zip(*(torch.autograd.grad(value.sum(), model, allow_unused=True) for value in (ours, loop)), strict=True)
    for name, (one, two) in zip(LGSSM._fields, pairs, strict=True):
        if two is None:  # of one frame no motion is seen
            assert frames == 1
            assert one is None or not one.any(), name
        elif name.endswith("_cov"):  # a matrix that stays symmetric has only the symmetric part of a gradient
            torch.testing.assert_close(one + one.mT, two + two.mT, atol=1e-8, rtol=1e-7)
        else:
            torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-7)


def test_direct_inference_is_the_networks() -> None:
    torch.manual_seed(0)
    network = InferenceNetwork(16, 8, 3).double()
    frames, start = torch.rand(2, 5, 16).double().round(), torch.randn(3, 2, 8).double()
    for ours, direct in zip(network(frames, start), textbook.DirectInference(network)(frames, start), strict=True):
        torch.testing.assert_close(ours, direct, atol=1e-12, rtol=0)


def test_the_settings_are_those_of_the_targets() -> None:
    assert (textbook.BATCH, textbook.OBJECTS, textbook.PAPER.num_components) == (20, 3, 2)
    assert (textbook.FRAMES, textbook.PAPER.inference_dim, textbook.PAPER.image_size) == (30, 1024, 48)
    assert textbook.MOST_MS == {30: 1.5, 100: 8.0}


def row(ours: float, other: float, forms: tuple[str, str] = ("dense", "loop")) -> dict[str, Any]:
    def same(value: float) -> dict[str, float]:
        return {"median": value, "least": value, "most": value}

    times = {form: {"cpu_ms": same(cpu), "ms": same(2 * cpu)} for form, cpu in zip(forms, (ours, other), strict=True)}
    return {"forms": times, "ratio": same(other / ours), "difference": 2e-5}


def test_targets_are_met_at_the_limit_and_missed_beyond_it() -> None:
    rows = {"likelihood, T = 30": row(1.5, 20.0), "likelihood, T = 100": row(8.1, 64.7)}
    rows["inference network"] = row(1000.0, 1490.0, ("waves", "direct"))
    found = textbook.judge(rows)
    assert [verdict["met"] for verdict in found.values()] == [True, False, False, True, False]
    assert found["inference network: gain"] == {"found": 1.49, "least": 1.5, "met": False}
    cells, verdicts = textbook.table({"rows": rows, "verdicts": found})
    assert cells[1] == ["likelihood, T = 30", "dense", "1.5 (1.5 - 1.5)", "3", "", ""]
    assert cells[2] == ["", "loop", "20 (20 - 20)", "40", "13.3 (13.3 - 13.3)", "2.0e-05"]
    assert verdicts[2] == ["likelihood, T = 100: CPU ms", "8.10", "<= 8", "missed"]
    assert verdicts[3] == ["inference network: gain", "1.49", ">= 1.5", "missed"]


def test_all_pairs_of_forms_are_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textbook, "PAPER", TINY)
    monkeypatch.setattr(textbook, "MOST_MS", {2: 1e6, 3: 0.0})
    monkeypatch.setattr(textbook, "LEAST_GAIN", {2: 0.0, 3: 1e6})
    monkeypatch.setattr(textbook, "FRAMES", 3)
    said: list[str] = []
    report = textbook.measure(2, said.append)
    assert len(said) == 3
    for measured in report["rows"].values():
        assert all(form["cpu_ms"]["least"] > 0 for form in measured["forms"].values())
        assert measured["difference"] < 1e-3
    assert list(report["rows"]["inference network"]["forms"]) == ["waves", "direct"]
    verdicts = {name: verdict["met"] for name, verdict in report["verdicts"].items() if name.startswith("likelihood")}
    assert list(verdicts.values()) == [True, False, True, False]
    text = "\n".join(benchmark._reference_table("ssm", report))
    assert "20 clips with 3 objects, 2 components, fp32, cpu, one thread" in text
    assert "likelihood, T = 2" in text
