"""The page about scale: its tables are what the formulas give, and its bytes are those of the code."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import scale
from pipeline.scale import CONSTANTS

PAGE = Path(scale.__file__).with_name("SCALE.md")


def test_the_page_shows_what_the_formulas_give() -> None:
    assert scale.tables_of_the_page() in PAGE.read_text()


def test_bytes_of_the_page_are_those_of_the_code() -> None:
    measured = scale.measure_constants(6000)
    bytes_of = {name: value for name, value in measured.items() if name.endswith("_bytes")}
    assert set(bytes_of) == {
        "video_bytes", "plan_bytes", "probe_bytes", "item_bytes", "built_bytes", "index_bytes", "manifest_bytes",
        "record_bytes", "order_bytes",
    }  # fmt: skip
    for name, value in bytes_of.items():
        assert value == pytest.approx(getattr(CONSTANTS, name), rel=0.25), name
    for name in ("video_seconds", "plan_seconds", "open_seconds"):  # of a machine; an order of magnitude is a defect
        assert 0 < measured[name] < 20 * getattr(CONSTANTS, name), name


def test_ten_million_clips_fit_a_small_driver_and_worker() -> None:
    """As dicts, the index alone was 12 GB; whole orders of an epoch 160 MB each."""
    assert scale.driver_bytes(1e7) < 6e9
    assert scale.shards_of(1e7) * CONSTANTS.order_bytes < 10e6
    assert scale.open_seconds(1e7) < 2


def test_tasks_saturate_where_cores_or_ray_end() -> None:
    seconds = [scale.seconds_per_task(0.4, 0.02, workers, cores=2) for workers in (1, 2, 4)]
    assert seconds == pytest.approx([0.42, 0.235, 0.2175])
    assert scale.seconds_per_task(0.4, 0.02, workers=1000, cores=8000) == 0.02
    steps = [scale.seconds_per_step(0.1, 0.05, 0.01, workers, cores=2) for workers in (1, 2, 4)]
    assert steps == pytest.approx([0.45, 0.26, 0.31])  # four workers on two cores do the optimiser's work twice


def test_table_of_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stages that take no time: one core's worth of work for each worker, and a Ray that costs 0.01 s a task."""

    def in_child(function: Any, *arguments: Any) -> Any:
        if function is scale._sharding:
            workers = arguments[-1]
            return {"task": 0.01 if workers else 0.0, "videos": 40, "probe": 10 * (workers or 1), "build": 60.0}
        if function is scale._extraction:
            return 0.5 * arguments[0]
        return {
            scale.measure_constants: {"index_bytes": 15_000.0},
            scale._extraction_bare: 2.0,
            scale._training: 2.0,
            scale._training_bare: (0.1, 0.1),
        }[function]

    monkeypatch.setattr(scale, "in_child", in_child)
    monkeypatch.setattr(scale, "_two_without_ray", lambda run, out: 0.35)  # 0.3 by the formula
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    report = scale.measure("", "", "", "", None)  # pyright: ignore[reportArgumentType]
    assert report["constants"]["task_seconds"] == {"model": CONSTANTS.task_seconds, "measured": 0.01}
    probe = report["stages"]["probe"]
    assert [round(each["predicted"], 2) for each in probe.values()] == [9.8, 15.38, 15.38]
    training = report["stages"]["train"]
    assert [1 / each["predicted"] for each in training.values()] == pytest.approx([0.5, 0.35, 0.45])
    assert probe["4"]["error"] == pytest.approx(15.38 / 40 - 1, abs=1e-3)
    lines = scale.table(report)
    assert " ".join(lines[1].split()) == "probe 1 workers predicted 9.8, measured 10 videos/s error -2 %"
    assert lines[-2].split() == ["index_bytes", "1.45e+04", "1.5e+04"]
    assert len(lines) == 2 + 4 * 3 + 2
