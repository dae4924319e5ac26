"""DDLP's comparison with its authors' code: the textbook's forms are equal, and the tables' arithmetic."""

import dataclasses
from typing import Any

import pytest
import torch

from objdyn.models.ddlp import DDLP, DDLPConfig, match_template
from pipeline import benchmark, reference_ddlp, textbook_pint
from pipeline.presets import PRESETS

DEBUG = PRESETS["ddlp"]["debug"].model
assert isinstance(DEBUG, DDLPConfig)
TINY = dataclasses.replace(DEBUG, pint_layers=2)


def build() -> DDLP:
    torch.manual_seed(0)
    return DDLP(TINY).eval()


def same(value: float) -> dict[str, float]:
    return {"median": value, "least": value, "most": value}


def row(cpu: float, gb: float) -> dict[str, Any]:
    return {"cpu_seconds": same(cpu), "seconds": same(cpu / 2), "peak_memory_bytes": gb * 1e9}


def test_textbook_score_maps_are_match_templates() -> None:
    window, template = torch.rand(2, 2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, expected = textbook_pint.score_maps(window, template), match_template(window, template)
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)


def test_textbook_layers_are_pints_with_their_gradients() -> None:
    pint = build().pint
    tokens = torch.randn(2, 3 * 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaves = [tokens, *pint.blocks.parameters()]
    fast = tokens
    for block, bias in zip(pint.layers, pint.biases(3), strict=True):
        fast = block(fast, bias)
    slow = textbook_pint.layers(pint, tokens, 3)
    torch.testing.assert_close(fast, slow)
    gradients = zip(*(torch.autograd.grad(value.square().sum(), leaves) for value in (fast, slow)), strict=True)
    for one, two in gradients:
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_the_textbooks_rollout_is_the_models() -> None:
    model = build()
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        for a, b in zip(model.rollout(latents, 6), textbook_pint.rollout(model, latents, 6), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_appearance_frame_by_frame_is_that_of_all_frames_at_once() -> None:
    encoder = build().appearance_encoder
    glimpses = torch.rand(2, 3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for a, b in zip(encoder(glimpses.flatten(0, 2)), textbook_pint.appearance(encoder, glimpses), strict=True):
        torch.testing.assert_close(a.view_as(b), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", reference_ddlp.FORMS)
def test_a_pair_of_forms_gives_equal_results(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        found = reference_ddlp.measure_form(name, TINY, pairs=1, scale=0.05)
    finally:
        torch.set_num_threads(threads)
    assert found["difference"] < 1e-3
    assert list(found["forms"]) == ["fast", "textbook"]
    assert found["ratio"]["median"] > 0


def test_the_settings_are_those_of_the_authors_measurements() -> None:
    sizes = {name: (each.batch, each.frames) for name, each in reference_ddlp.SETTINGS.items()}
    assert sizes == {"balls-released": (32, 11), "obj3d128": (4, 11), "phyre-released": (1, 16)}
    for name, setting in reference_ddlp.SETTINGS.items():
        config = reference_ddlp.config_of(name)
        assert setting.frames == config.max_frames + 1
        assert getattr(config, "recon_loss", "mse") == "mse"


def test_targets_are_met_at_the_limit_and_missed_beyond_it() -> None:
    rows = {f"{name}, {p}": row(3.5, 2.0) for name in reference_ddlp.SETTINGS for p in ("fp32", "bf16 autocast")}
    rollout = {"context": 10, "horizon": 40, "frames_per_second": 150.0, "seconds": same(0.25),
               "parts": {"encode": 0.05, "rollout": 0.1, "decode": 0.1}}  # fmt: skip
    found = reference_ddlp.judge(rows, rollout)
    assert found["balls-released: CPU s per step, bf16 autocast, goal"] == {"found": 3.5, "most": 3.5, "met": True}
    assert found["balls-released: peak memory in GB, goal"]["met"]
    assert not found["phyre-released: CPU s per step, target"]["met"]
    assert found["rollout: predicted frames/s, target"] == {"found": 150.0, "least": 150.0, "met": True}
    assert not found["rollout: predicted frames/s, goal"]["met"]
    form = {"forms": {n: {"cpu_ms": same(c), "ms": same(c)} for n, c in (("fast", 2.0), ("textbook", 9.0))},
            "ratio": same(4.5), "difference": 1e-6}  # fmt: skip
    report = {"threads": 2, "rows": rows, "rollout": rollout, "verdicts": found, "forms": {"score maps": form},
              "convolution": {"fp32": same(88.0), "bf16": same(160.0)}}  # fmt: skip
    text = "\n".join(benchmark._reference_table("ddlp", report))
    assert "balls-released, fp32" in text
    assert "6.14" in text  # 21.5 of the authors over 3.5
    assert "52 - 73" in text
    assert "50 + 100 + 100" in text
    assert "88 (88 - 88)" in text
    assert "4.5 (4.5 - 4.5)" in text


def test_everything_is_measured_in_the_main_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def here(function: Any, *arguments: Any) -> Any:
        calls.append((function.__name__, arguments))
        if function is reference_ddlp.measure_rollout:
            return function(TINY, 3, 4, 1, torch.get_num_threads())
        if function is reference_ddlp.measure_step:
            return row(1.0, 1.0)
        if function is reference_ddlp.measure_convolution:
            return function(1, torch.get_num_threads())
        return function(arguments[0], TINY, 1, 0.05)

    monkeypatch.setattr(reference_ddlp, "in_child", here)
    monkeypatch.setattr(reference_ddlp, "FORMS", dict(list(reference_ddlp.FORMS.items())[:1]))
    said: list[str] = []
    report = reference_ddlp.measure(1, 2, said.append)
    steps = [arguments for name, arguments in calls if name == "measure_step"]
    assert len(steps) == 2 * len(reference_ddlp.SETTINGS)
    config = steps[0][0]
    assert all(
        arguments[-1] > 100 * (config.warmup_steps + config.noisy_steps + config.ramp_steps) for arguments in steps
    )
    assert report["rollout"]["frames_per_second"] > 0
    assert set(report["rollout"]["parts"]) == {"encode", "rollout", "decode"}
    assert len(said) == 6 + 1 + 1 + 1
    assert all(rate["least"] > 0 for rate in report["convolution"].values())
    assert "rollout: predicted frames/s, goal" in report["verdicts"]
