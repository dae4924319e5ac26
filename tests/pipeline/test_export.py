"""Export: dense tensors as each tool sees them, sorted rows over any parts, and what is refused."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store, tables
from pipeline.config import ExportRun
from pipeline.export import export
from pipeline.tables import Block, Provenance

PROVENANCE = Provenance("ddlp", "m" * 64, "d" * 64, "test", object_is_track=True, context=2, horizon=3)
FIELDS: dict[tables.Table, tuple[str, ...]] = {"objects": ("position", "depth"), "frames": ("background",)}
SHAPES = {"position": (5, 3, 2), "depth": (5, 3), "background": (5, 4), "recon_mse": (5,), "predict_mse": (5,)}


def block(clip: str, kind: str = "posterior", t: int = 5, k: int = 3) -> Block:
    """Random latents whose values follow from the clip's name and kind."""
    rng = np.random.default_rng([*f"{clip}{kind}".encode()])
    shapes = {"position": (t, k, 2), "depth": (t, k), "background": (t, 4)}
    return Block(
        clip=clip,
        kind=kind,
        frame=np.arange(t),
        source_frame=10 + 2 * np.arange(t),
        latents={name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        errors={"recon_mse": rng.random(t - 1)} if kind == "posterior" else {},
    )


def write_folder(
    folder: Path, parts: Sequence[Sequence[Block]], fields_of: Mapping[tables.Table, Sequence[str]] = FIELDS
) -> str:
    entries = []
    for number, blocks in enumerate(parts):
        entry: dict[str, Any] = {"name": f"shard-{number:05d}"}
        for table, fields in fields_of.items():
            rows = tables.build(table, blocks, fields, PROVENANCE)
            entry[table] = tables.publish(rows, str(folder / table / f"{entry['name']}.parquet"))
        entries.append(entry)
    store.publish_json(str(folder / "manifest.json"), {"schema": 1, "kind": "tables", "parts": entries})
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Seven clips whose order runs to and fro between two parts, each with a prediction."""
    parts = [
        [block(f"clip-{i}", kind) for i in clips for kind in ("posterior", "predicted")] for clips in ("0256", "134")
    ]
    return write_folder(tmp_path / "tables", parts)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "exports" / "clips.parquet")


def described(path: str) -> dict[str, Any]:
    return json.loads(pq.read_schema(path).metadata[tables.METADATA_KEY])


def test_a_tensor_column_holds_each_latent_of_a_clip_in_one_row(folder: str, out: str):
    line = export(ExportRun(folder, out))
    assert line.startswith("7 posterior clips with position (5, 3, 2), depth (5, 3), background (5, 4)")
    assert line.endswith(out)
    rows = pq.read_table(out, page_checksum_verification=True)
    assert rows["clip"].to_pylist() == [f"clip-{i}" for i in range(7)]
    assert rows.schema.names == ["clip", "kind", "context", "edit", "sample", "frame", "source_frame", *SHAPES]
    assert rows["source_frame"].to_pylist() == [[10, 12, 14, 16, 18]] * 7
    for name in ("position", "depth", "background"):
        written = np.stack([block(f"clip-{i}").latents[name] for i in range(7)])
        np.testing.assert_array_equal(rows[name].combine_chunks().to_numpy_ndarray(), written)
    errors = rows["recon_mse"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(errors[6, :4], block("clip-6").errors["recon_mse"].astype(np.float32))
    assert np.isnan(errors[:, 4]).all()


def test_the_schema_names_axes_components_and_provenance(folder: str, out: str):
    export(ExportRun(folder, out))
    types = {column.name: column.type for column in pq.read_schema(out)}
    assert {name: tuple(types[name].shape) for name in SHAPES} == SHAPES
    assert types["position"].dim_names == ["frame", "object", "component"]
    assert types["depth"].dim_names == ["frame", "object"]
    assert types["background"].dim_names == ["frame", "component"]
    found = described(out)
    assert found["components"] == {"position": ["y", "x"]}
    assert (found["table"], found["kind"]) == ("tensors", "posterior")
    assert found["tables_id"] == store.sha256_file(f"{folder}/manifest.json")
    assert {name: found[name] for name in dataclasses.asdict(PROVENANCE)} == dataclasses.asdict(PROVENANCE)


@pytest.mark.parametrize("tensor", [True, False])
def test_row_groups_are_bounded_and_compressed(tensor: bool, folder: str, out: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "GROUP_ROWS", 35)  # of 15 rows per clip
    export(ExportRun(folder, out, tensor=tensor))
    file = pq.ParquetFile(out)
    groups = [file.read_row_group(i, ["clip"])["clip"].unique().to_pylist() for i in range(file.num_row_groups)]
    assert groups == [["clip-0", "clip-1"], ["clip-2", "clip-3"], ["clip-4", "clip-5"], ["clip-6"]]
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    for name in ("position.list.element", "depth.list.element") if tensor else ("position_y", "depth"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings


def in_pandas(path: str) -> list[Any]:
    import pandas

    return list(pandas.read_parquet(path)["position"])


def in_polars(path: str) -> list[Any]:
    import polars

    column = polars.read_parquet(path)["position"]
    assert isinstance(column.dtype, polars.Extension)
    return column.to_list()


def in_duckdb(path: str) -> list[Any]:
    import duckdb

    rows = duckdb.connect().execute(f"select typeof(position), position from '{path}'").fetchall()
    assert {row[0] for row in rows} == {"FLOAT[]"}
    return [row[1] for row in rows]


@pytest.mark.parametrize("read", [in_pandas, in_polars, in_duckdb])
def test_tools_that_know_no_tensors_see_each_one_flat(read: Callable[[str], list[Any]], folder: str, out: str):
    export(ExportRun(folder, out, columns=("position",)))
    flat = np.asarray([np.asarray(row) for row in read(out)])
    assert flat.shape == (7, 30)
    np.testing.assert_array_equal(flat.reshape(7, 5, 3, 2)[3], block("clip-3").latents["position"])


def test_columns_choose_the_tensors(folder: str, out: str):
    export(ExportRun(folder, out, kind="predicted", columns=("recon_mse", "position_x", "background")))
    rows = pq.read_table(out)
    assert rows.schema.names[7:] == ["position_x", "recon_mse", "background"]
    written = block("clip-6", "predicted").latents["position"][..., 1]
    np.testing.assert_array_equal(rows["position_x"].combine_chunks().to_numpy_ndarray()[6], written)


def test_long_rows_are_sorted_over_parts_that_interleave(folder: str, out: str):
    assert export(ExportRun(folder, out, tensor=False, kind="predicted")).startswith("105 predicted rows of objects")
    rows = tables.read_part(out)
    every = tables.read_objects(folder).to_pylist()
    key = [tuple(row[name] for name in tables.OBJECT_KEY) for row in every]
    wanted = [row for _, row in sorted(zip(key, every, strict=True), key=lambda pair: pair[0])]
    assert rows.to_pylist() == [row for row in wanted if row["kind"] == "predicted"]
    assert tables.provenance_of(rows.schema) == ("objects", PROVENANCE)
    assert described(out)["tables_id"] == store.sha256_file(f"{folder}/manifest.json")


def test_columns_of_long_rows_choose_the_table(folder: str, out: str):
    export(ExportRun(folder, out, tensor=False, columns=("position",)))
    names = ["clip", "kind", "context", "edit", "sample", "frame", "object", "source_frame", "position_y", "position_x"]
    assert pq.read_schema(out).names == names
    export(ExportRun(folder, out, tensor=False, columns=("recon_mse",)))
    rows = pq.read_table(out)
    assert rows.schema.names == ["clip", "kind", "context", "edit", "sample", "frame", "source_frame", "recon_mse"]
    assert (rows.num_rows, rows["recon_mse"].null_count) == (35, 7)
    with pytest.raises(ValueError, match=r"position is of objects/ and background of frames/; name columns of one"):
        export(ExportRun(folder, out, tensor=False, columns=("position", "background")))


def test_parts_are_let_go_after_their_last_clip(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch):
    import weakref

    folder = write_folder(tmp_path / "tables", [[block(f"clip-{i}")] for i in range(6)])
    opened: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    real = tables.open_part

    def counted(folder: str, table: tables.Table, *args: Any) -> pq.ParquetFile:
        nonlocal most
        file = real(folder, table, *args)
        if table == "objects":
            opened.add(file)
        most = max(most, len(opened))
        return file

    monkeypatch.setattr(tables, "open_part", counted)
    export(ExportRun(folder, out, tensor=False))
    assert most == 1


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (block("clip-b", t=4), r"1 of 3 clips do not have 5 frames like the rest \(clip-b has 4\).*--no-tensor"),
        (block("clip-b", k=2), r"clip clip-b has position of shape \(5, 2, 2\), the first clip has \(5, 3, 2\)"),
    ],
    ids=["frames", "objects"],
)
def test_clips_of_other_shapes_are_refused_and_the_earlier_file_stays(odd: Block, message: str, tmp_path: Path):
    folder = write_folder(tmp_path / "tables", [[block("clip-a"), odd, block("clip-c")]])
    out = tmp_path / "clips.parquet"
    out.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=message):
        export(ExportRun(folder, str(out)))
    assert out.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.parquet", "tables"]
    export(ExportRun(folder, str(out), tensor=False))
    assert pq.read_table(out)["clip"].unique().to_pylist() == ["clip-a", "clip-b", "clip-c"]


def test_images_keep_their_axes(tmp_path: Path):
    blocks = []
    for clip in ("clip-a", "clip-b"):
        one = block(clip)
        images = np.random.default_rng([*clip.encode()]).integers(
            0, 256, (*one.latents["depth"].shape, 4, 5, 3), np.uint8
        )
        blocks.append(dataclasses.replace(one, latents={**one.latents, "component": images}))
    folder = write_folder(tmp_path / "tables", [blocks], {"objects": ("depth", "component"), "frames": ("background",)})
    out = str(tmp_path / "exports" / "out.parquet")
    export(ExportRun(folder, out, columns=("component",)))
    column = pq.read_table(out)["component"].combine_chunks()
    assert column.type.dim_names == ["frame", "object", "row", "column", "channel"]
    np.testing.assert_array_equal(column.to_numpy_ndarray(), [one.latents["component"] for one in blocks])
    export(ExportRun(folder, out, columns=("component",), tensor=False))
    assert tables.shapes_of(pq.read_schema(out)) == {"component": (4, 5, 3)}


@pytest.mark.parametrize("tensor", [True, False])
def test_what_cannot_be_exported_is_refused(tensor: bool, folder: str, out: str, tmp_path: Path):
    for change, message in (
        ({"columns": ("colour",)}, r"no column 'colour': objects/ has position \(position_y, position_x\), depth; "),
        ({"kind": "interpolated"}, "no rows of kind 'interpolated', only of posterior, predicted"),
        ({"tables": str(tmp_path / "no")}, "not a finished folder of tables"),
        ({"out": f"{folder}/objects/more.parquet"}, "lies inside the folder of tables"),
        ({"out": str(tmp_path / "new.parquet")}, r"is a folder; name a file in it: .*new\.parquet/export\.parquet"),
    ):
        (tmp_path / "new.parquet").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            export(dataclasses.replace(ExportRun(folder, out, tensor=tensor), **change))
    with pytest.raises(ValueError, match=r"out must name a file FILE\.parquet, got 'clips'"):
        ExportRun(folder, "clips")


@pytest.mark.parametrize("tensor", [True, False])
def test_damaged_tables_are_not_exported(tensor: bool, folder: str, out: str):
    part = Path(folder, "objects", "shard-00001.parquet")
    data = bytearray(part.read_bytes())
    data[60] ^= 4
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged"):
        export(ExportRun(folder, out, tensor=tensor))
    assert not Path(out).exists()


def test_the_same_tables_give_the_same_bytes(folder: str, out: str, tmp_path: Path):
    export(ExportRun(folder, out))
    export(ExportRun(folder, again := str(tmp_path / "again.parquet")))
    assert Path(again).read_bytes() == Path(out).read_bytes()


def test_export_from_s3_to_s3(folder: str, out: str, s3_folder: str):
    remote = f"{s3_folder}/tables"
    for path in store.list_tree(folder):
        store.publish(f"{remote}/{path}", Path(folder, path).read_bytes())
    export(ExportRun(remote, f"{s3_folder}/clips.parquet"))
    export(ExportRun(folder, out))
    assert store.read_bytes(f"{s3_folder}/clips.parquet") == Path(out).read_bytes()


def test_the_job_says_what_it_wrote(
    folder: str, out: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--tables", folder, "--tensor", "--out", out, "--columns", "position", "depth"]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    runpy.run_path(str(repository / "jobs" / "export.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("7 posterior clips with position (5, 3, 2), depth (5, 3), ")
    assert pa.types.is_fixed_size_list(pq.read_schema(out).field("depth").type.storage_type)
