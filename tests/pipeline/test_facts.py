import hashlib
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from objdyn.clips import Clip
from pipeline import facts, store
from pipeline.facts import ClipFacts, distribution, look, stored_facts
from pipeline.reader import Source
from pipeline.shard import QUARANTINE_SCHEMA


def clip(key: str, frames: np.ndarray, fps: float = 10.0, stride: int = 1, source: str = "a.mp4") -> Clip:
    return Clip(key, frames, fps, 0, stride, source)


def even(level: int, t: int = 3) -> np.ndarray:
    return np.full((t, 4, 4, 3), level, dtype=np.uint8)


@pytest.mark.parametrize("block", [1 << 21, 1500, 1])
def test_look_is_what_floating_point_says_whatever_the_block(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(facts, "BLOCK", block)
    frames = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    values = frames.astype(np.float64) / 255
    assert look(frames) == pytest.approx(
        (values.mean(), values.std(axis=(1, 2, 3)).mean(), np.abs(np.diff(values, axis=0)).mean()), rel=1e-12
    )


def test_a_still_even_clip_has_neither_contrast_nor_motion():
    assert look(even(255)) == (1.0, 0.0, 0.0)


def test_a_single_frame_has_no_motion_and_it_is_left_out():
    gathered = ClipFacts()
    gathered.add(clip("a", even(3, t=1)))
    summary = gathered.summary()
    assert summary["motion"] is None
    assert summary["per_clip"]["motion"] == [None]
    assert [row["extreme"] for row in summary["outliers"]] == ["darkest", "brightest", "lowest contrast"]


def test_summary_counts_sources_rates_and_lengths():
    gathered = ClipFacts()
    for i in range(4):
        gathered.add(clip(f"c{i}", even(10 * i), fps=(10.0, 29.97002997)[i % 2], stride=2, source=f"{i // 2}.mp4"))
    summary = gathered.summary()
    assert (summary["clips"], summary["sources"], summary["frames"]) == (4, 2, 3)
    assert (summary["height"], summary["width"], summary["channels"]) == (4, 4, 3)
    assert summary["fps"]["counts"] == {"10": 2, "29.97": 2}
    assert summary["strides"] == {"2": 4}
    assert summary["seconds"]["max"] == pytest.approx(0.6)


def test_many_frame_rates_are_told_by_their_range():
    gathered = ClipFacts()
    for i in range(9):
        gathered.add(clip(f"c{i}", even(0), fps=10.0 + i))
    assert gathered.summary()["fps"] == {"min": 10.0, "median": 14.0, "max": 18.0, "counts": {}}


def test_outliers_are_named_and_the_first_of_equal_ones_is_taken():
    gathered = ClipFacts()
    for key, level in (("grey", 100), ("dark", 5), ("dark-too", 5), ("bright", 250)):
        gathered.add(clip(key, even(level)))
    named = {row["extreme"]: row["clip"] for row in gathered.summary()["outliers"]}
    assert (named["darkest"], named["brightest"], named["stillest"]) == ("dark", "bright", "grey")


def test_distribution_counts_every_finite_value():
    found = distribution(np.array([0.0, 0.25, 1.0, np.nan]))
    assert found is not None
    assert sum(found["counts"]) == 3
    assert (found["min"], found["max"], found["quartiles"][1]) == (0.0, 1.0, 0.25)
    assert distribution(np.array([2.0, 2.0]))["counts"] == [2]  # pyright: ignore[reportOptionalSubscript]
    assert distribution(np.array([np.nan])) is None


class Opened:
    """What ``stored_facts`` asks of a source."""

    def __init__(self, folder: Path) -> None:
        self.split = "test"
        self.id = hashlib.sha256((folder / "test" / "manifest.json").read_bytes()).hexdigest()


def dataset(folder: Path, rows: int, **changes: Any) -> Source:
    """A split's manifest and quarantine.parquet, without shards."""
    table = [
        {"source": f"{i}.mp4", "stage": "probe", "code": ("unreadable", "too-short")[i % 2], "message": "m"}
        for i in range(rows)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table, schema=QUARANTINE_SCHEMA), buffer)
    manifest = {
        "clips": 4,
        "frames": 10,
        "height": 8,
        "width": 8,
        "channels": 3,
        "codec": "zstd",
        "preprocessing": {"fit": "squeeze"},
        "shards": [{"bytes": 1000}, {"bytes": 920}],
        "balance": {"videos": rows + 1, "read": 1, "quarantined": rows, "ignored": 0, "clips": 4, "lost": 0},
        "quarantine": {"rows": rows, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
    }
    store.publish(str(folder / "test" / "quarantine.parquet"), buffer.getvalue())
    store.publish_json(str(folder / "test" / "manifest.json"), {**manifest, **changes})
    return cast(Source, Opened(folder))


def test_a_dataset_tells_its_size_and_what_was_left_out(tmp_path: Path):
    found = stored_facts(str(tmp_path), dataset(tmp_path, 61))
    assert found["stored"] == {
        "shards": 2,
        "bytes": 1920,
        "raw_bytes": 7680,
        "codec": "zstd",
        "preprocessing": {"fit": "squeeze"},
    }
    left_out = found["quarantine"]
    assert (left_out["rows"], len(left_out["shown"])) == (61, 50)
    assert left_out["codes"] == {"too-short": 30, "unreadable": 31}
    assert left_out["shown"][1] == {"source": "1.mp4", "stage": "probe", "code": "too-short", "message": "m"}
    assert left_out["balance"].startswith("videos 62 = 1 read + 61 quarantined")


def test_a_simulator_has_nothing_stored():
    assert stored_facts("sim:balls-interaction", cast(Source, None)) == {}


def test_a_damaged_quarantine_table_is_said_and_not_believed(tmp_path: Path):
    source = dataset(tmp_path, 2)
    path = tmp_path / "test" / "quarantine.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = stored_facts(str(tmp_path), source)
    assert found["quarantine"].keys() == {"problem"}
    assert "is damaged" in found["quarantine"]["problem"]
    assert found["stored"]["shards"] == 2
    path.unlink()
    assert "No such file" in stored_facts(str(tmp_path), source)["quarantine"]["problem"]


def test_a_manifest_that_was_exchanged_since_is_not_believed(tmp_path: Path):
    source = dataset(tmp_path, 0)
    dataset(tmp_path, 0, clips=5)
    assert "has changed" in stored_facts(str(tmp_path), source)["quarantine"]["problem"]


def test_a_manifest_without_a_quarantine_is_said(tmp_path: Path):
    problem = stored_facts(str(tmp_path), dataset(tmp_path, 0, quarantine={}))["quarantine"]["problem"]
    assert "no 'sha256'" in problem
