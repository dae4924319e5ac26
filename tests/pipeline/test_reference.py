"""The comparison with the authors' code: its arithmetic, and one step measured."""

import pytest

from objdyn.models.iodine import IODINEConfig
from pipeline import reference

TINY = IODINEConfig(image_size=8, slot_dim=4, decoder_channels=(4,), refine_channels=(4,), refine_dim=8)


def row(cpu: float, gb: float) -> dict[str, object]:
    times = {"median": cpu, "least": cpu, "most": cpu}
    return {
        "cpu_seconds": times,
        "seconds": times,
        "peak_memory_bytes": gb * 1e9,
        "increase_bytes": gb * 0.5e9,
    }


def test_the_settings_are_those_of_the_published_comparison() -> None:
    iodine, provide = reference.REFERENCES["iodine"], reference.REFERENCES["provide"]
    assert (iodine.batch, iodine.frames, iodine.config.num_slots, iodine.config.num_refinements) == (4, 1, 5, 5)
    assert (provide.batch, provide.frames, provide.config.num_slots, provide.config.num_refinements) == (2, 4, 5, 5)
    oddn = reference.REFERENCES["oddn"]
    assert (oddn.batch, oddn.frames, oddn.config.num_slots, oddn.config.num_refinements) == (1, 4, 7, 5)
    assert {each.config.image_size for each in (iodine, provide, oddn)} == {64}


def test_targets_are_met_at_the_limit_and_missed_above_it() -> None:
    rows = {"as published": row(5.0, 2.1), "strided": row(2.4, 1.0), "bf16 autocast": row(3.0, 1.0)}
    found = reference.judge(reference.REFERENCES["iodine"], rows)
    assert found["CPU s per step, target"] == {"found": 5.0, "most": 5.0, "met": True}
    assert not found["peak memory in GB, target"]["met"]
    assert found["CPU s per step, bf16 or strided, goal"]["met"]


def test_a_family_without_a_goal_has_targets_alone() -> None:
    rows = {"as published": row(7.0, 2.6)}
    assert reference.judge(reference.REFERENCES["oddn"], rows) == {
        "CPU s per step, target": {"found": 7.0, "most": 7.0, "met": True},
        "peak memory in GB, target": {"found": 2.6, "most": 2.5, "met": False},
    }


def test_memory_per_frame_is_the_slope_and_linear_growth_passes() -> None:
    plain = reference.growth_of({2: 1.0e9, 4: 2.0e9, 8: 4.0e9})
    assert plain["per_frame"] == pytest.approx(0.5e9)
    recompute = reference.growth_of({2: 0.5e9, 4: 0.8e9, 8: 1.4e9})
    found = reference.judge_growth({"as published": plain, "recompute": recompute})
    assert found["memory of later frames over that of earlier ones"]["met"]
    assert found["memory per frame, recompute over plain"] == pytest.approx({"found": 0.3, "most": 1 / 3, "met": True})
    steep = reference.growth_of({2: 1.0e9, 4: 2.0e9, 8: 6.0e9})
    found = reference.judge_growth({"as published": steep, "recompute": recompute})
    assert not found["memory of later frames over that of earlier ones"]["met"]


def test_a_step_is_measured_and_shown_beside_the_authors() -> None:
    measured = reference.measure_step(TINY, 1, 1, autocast=False, steps=1, threads=1)
    assert measured["cpu_seconds"]["median"] > 0
    assert measured["increase_bytes"] >= 0
    rows = {name: row(4.3, 1.6) for name in ("as published", "recompute", "strided", "bf16 autocast")}
    rows["as published"] |= {"cpu_seconds": {"median": 4.3, "least": 4.0, "most": 5.0}}
    report = {"rows": rows, "verdicts": reference.judge(reference.REFERENCES["iodine"], rows)}
    cells, verdicts = reference.table("iodine", report)
    assert cells[1] == ["as published", "4.30 (4.00 - 5.00)", "2.00", "4.30", "1.60", "1.81", "0.80"]
    assert ["CPU s per step, target", "4.30", "5.00", "met"] in verdicts
