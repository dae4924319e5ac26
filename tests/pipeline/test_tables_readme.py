"""The examples of the README's section "Using the tables" run as they stand, and find the motion that was planted."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store, tables
from pipeline.tables import Block, Provenance

PROVENANCE = Provenance("ddlp", "m" * 64, "d" * 64, "test", object_is_track=True, context=4, horizon=3)
FIELDS: dict[tables.Table, tuple[str, ...]] = {
    "objects": ("position", "transparency", "features"),
    "frames": ("background",),
}
FRAMES = 8
FAST, SLOW, STILL, HIDDEN = range(4)


def pixels() -> np.ndarray:
    """(y, x) of four objects in pixels, (t, k, 2): one accelerates past the still one, one creeps, one is hidden."""
    t = np.arange(FRAMES)
    path = np.zeros((FRAMES, 4, 2))
    path[:, FAST] = np.stack([np.full(FRAMES, 1.0), t**2 / 2 - 10], axis=-1)
    path[:, SLOW] = np.stack([-4 + 0.25 * t, np.full(FRAMES, -12.0)], axis=-1)
    path[:, HIDDEN] = np.stack([np.full(FRAMES, 1.0), t**2 / 2 - 10], axis=-1)
    return path


def block(clip: str, kind: str, first: int, stop: int) -> Block:
    t = stop - first
    transparency = np.ones((t, 4))
    transparency[:, HIDDEN] = 0.1
    return Block(
        clip=clip,
        kind=kind,
        frame=np.arange(first, stop),
        source_frame=np.arange(first, stop),
        latents={
            "position": pixels()[first:stop] / 31.5,
            "transparency": transparency,
            "features": np.full((t, 4, 3), len(clip)),
            "background": np.zeros((t, 2)),
        },
        errors={"recon_mse": np.full(t, 0.5)} if kind == "posterior" else {"predict_mse": np.array([0.1, 0.2])},
        context=first,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    parts = []
    for number, clip in enumerate(("road-000", "road-001")):
        blocks = [block(clip, "posterior", 0, FRAMES), block(clip, "predicted", 4, 7)]
        entry: dict[str, Any] = {"name": f"shard-{number:05d}"}
        for table, fields in FIELDS.items():
            rows = tables.build(table, blocks, fields, PROVENANCE)
            entry[table] = tables.publish(rows, str(folder / "tables" / table / f"{entry['name']}.parquet"))
        parts.append(entry)
    store.publish_json(str(folder / "tables" / "manifest.json"), {"schema": 1, "kind": "tables", "parts": parts})
    return folder


@pytest.fixture(scope="module")
def examples(folder: Path, repository: Path) -> dict[str, list[str]]:
    """The section's code blocks by language, with the folders filled in."""
    section = (repository / "README.md").read_text().split("### Using the tables")[1].split("\n##")[0]
    blocks: dict[str, list[str]] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL):
        filled = code.replace("TABLES", str(folder / "tables")).replace("EXPORTS", str(folder / "exports"))
        blocks.setdefault(language, []).append(filled)
    return blocks


def in_duckdb(examples: dict[str, list[str]]) -> dict[str, list[tuple[Any, ...]]]:
    import duckdb

    connection = duckdb.connect()
    answers = []
    for statement in connection.extract_statements(examples["sql"][0]):
        answers.append(connection.execute(statement).fetchall())
    return dict(zip(("view", "moving", "nearest", "speed", "errors"), answers, strict=True))


def in_polars(examples: dict[str, list[str]]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, Any] = {}
    exec(examples["python"][0], found)
    nearest = found["nearest"].select("clip", "frame", "object", "object_right", "pixels")
    speed = found["speed"].select("clip", "object", "frame", "speed")
    return {"moving": found["moving"].rows(), "nearest": nearest.rows(), "speed": speed.rows()}


both = pytest.mark.parametrize("tool", [in_duckdb, in_polars])


@both
def test_the_object_that_moves_is_found(tool, examples: dict[str, list[str]]):
    moving = tool(examples)["moving"]
    assert [row[:2] for row in moving] == [("road-000", FAST), ("road-001", FAST)]
    assert [row[2] for row in moving] == pytest.approx([24.5, 24.5], rel=1e-5)


@both
def test_the_nearest_pair_is_right_in_each_frame(tool, examples: dict[str, list[str]]):
    expected = []
    for frame, places in enumerate(pixels()):
        pairs = [(FAST, SLOW), (FAST, STILL), (SLOW, STILL)]
        expected.append(min((float(np.linalg.norm(places[a] - places[b])), frame, a, b) for a, b in pairs))
    assert {pair[2:] for pair in expected} == {(FAST, SLOW), (FAST, STILL), (SLOW, STILL)}
    nearest = tool(examples)["nearest"]
    assert [row[0] for row in nearest] == ["road-000"] * FRAMES + ["road-001"] * FRAMES
    for row, (distance, *pair) in zip(nearest, expected * 2, strict=True):
        assert list(row[1:4]) == pair
        assert row[4] == pytest.approx(distance, rel=1e-5)


@both
def test_speed_over_time_is_what_was_planted(tool, examples: dict[str, list[str]]):
    speed = {row[:3]: row[3] for row in tool(examples)["speed"]}
    assert len(speed) == 2 * 3 * FRAMES
    for frame in range(1, FRAMES):
        assert speed["road-001", FAST, frame] == pytest.approx(frame - 0.5, rel=1e-4)
        assert speed["road-001", SLOW, frame] == pytest.approx(0.25, rel=1e-4)
        assert speed["road-001", STILL, frame] == 0
    assert speed["road-001", FAST, 0] is None


def test_errors_are_averaged_by_predicted_step(examples: dict[str, list[str]]):
    errors = in_duckdb(examples)["errors"]
    assert errors == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (3, None)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_the_loader_gives_dense_arrays(examples: dict[str, list[str]], capsys: pytest.CaptureFixture[str]):
    found: dict[str, Any] = {}
    exec(examples["python"][1], found)
    assert capsys.readouterr().out.splitlines() == [f"road-00{i} (8, 4, 2) (8, 2)" for i in range(2)]
    assert found["future"].kind == "predicted"
    np.testing.assert_allclose(found["future"].objects["position"], pixels()[4:7] / 31.5, rtol=1e-6)
    assert tuple(found["batch"].objects["position"].shape) == (2, 8, 4, 2)
    assert sorted(found["batch"].clip) == ["road-000", "road-001"]


def test_exports_open_everywhere(
    examples: dict[str, list[str]], folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
):
    for line in examples["sh"][0].splitlines():
        python, job, *words = shlex.split(line)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [job, *words])
        runpy.run_path(str(repository / job), run_name="__main__")
    found: dict[str, Any] = {}
    exec(examples["python"][2], found)
    for name in ("position", "in_polars", "in_pandas", "in_duckdb"):
        assert found[name].shape == (2, 8, 4, 2), name
        np.testing.assert_allclose(found[name][1], pixels() / 31.5, rtol=1e-6)
    rows = tables.read_part(str(folder / "exports" / "future.parquet"))
    assert rows.schema.names[-2:] == ["position_y", "position_x"]
    assert (rows.num_rows, rows["kind"].unique().to_pylist()) == (24, ["predicted"])
