"""Tables: columns, order, one row per key, bytes, checksums, dense arrays, readers that have neither torch nor ray."""

import dataclasses
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store, tables
from pipeline.tables import Block, ClipDataset, ClipLatents, Provenance

OBJECT_FIELDS = ("position", "scale", "depth", "features")
FRAME_FIELDS = ("background",)
FIELDS: dict[tables.Table, tuple[str, ...]] = {"objects": OBJECT_FIELDS, "frames": FRAME_FIELDS}
PROVENANCE = Provenance("ddlp", "m" * 64, "d" * 64, "test", object_is_track=True, context=2, horizon=3)


def block(clip: str, kind: str = "posterior", first: int = 0, t: int = 4, k: int = 3, **key) -> Block:
    """Random latents whose values follow from the clip's name and kind."""
    rng = np.random.default_rng([*f"{clip}{kind}".encode()])

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return Block(
        clip=clip,
        kind=kind,
        frame=np.arange(first, first + t),
        source_frame=100 + 2 * np.arange(first, first + t),
        latents={
            "position": draw(t, k, 2),
            "scale": draw(t, k, 2),
            "depth": draw(t, k),
            "features": draw(t, k, 4),
            "background": draw(t, 5),
        },
        errors={"recon_mse" if kind == "posterior" else "predict_mse": abs(draw(t - 1))},
        **key,
    )


@pytest.fixture
def blocks() -> list[Block]:
    return [
        block("clip-b"),
        block("clip-a", "predicted", first=2, context=2),
        block("clip-a"),
        block("clip-b", "predicted", first=2, context=2),
    ]


@pytest.fixture
def objects(blocks: list[Block]) -> pa.Table:
    return tables.build("objects", blocks, OBJECT_FIELDS, PROVENANCE)


@pytest.fixture
def frames(blocks: list[Block]) -> pa.Table:
    return tables.build("frames", blocks, FRAME_FIELDS, PROVENANCE)


def to_bytes(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    tables.write(rows, sink)
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path: Path, blocks: list[Block]) -> str:
    """A finished folder of two parts, as the extraction leaves it."""
    return write_folder(tmp_path, [[b for b in blocks if b.clip == clip] for clip in ("clip-a", "clip-b")])


def write_folder(
    folder: Path,
    parts: Sequence[Sequence[Block]],
    frames: Sequence[Sequence[Block]] = (),
    fields_of: Mapping[tables.Table, Sequence[str]] = FIELDS,
) -> str:
    """A finished folder of tables; ``frames`` are other blocks for frames/."""
    entries = []
    for number, blocks in enumerate(parts):
        entry: dict[str, Any] = {"name": f"shard-{number:05d}"}
        for table, fields in fields_of.items():
            rows = tables.build(table, frames[number] if frames and table == "frames" else blocks, fields, PROVENANCE)
            entry[table] = tables.publish(rows, str(folder / table / f"{entry['name']}.parquet"))
        entries.append(entry)
    store.publish_json(str(folder / "manifest.json"), {"schema": 1, "kind": "tables", "parts": entries})
    return str(folder)


def test_columns_follow_from_names_and_shapes():
    shapes = {"position": (2,), "scale": (2,), "depth": (), "features": (4,), "velocity": (2,), "covariance": (2, 3)}
    schema = tables.schema("objects", shapes, PROVENANCE)
    list4, list2, list6 = (pa.list_(pa.field("element", pa.float32()), n) for n in (4, 2, 6))
    assert list(zip(schema.names, schema.types, strict=True)) == [
        ("clip", pa.string()),
        ("kind", pa.string()),
        ("context", pa.int32()),
        ("edit", pa.string()),
        ("sample", pa.int32()),
        ("frame", pa.int32()),
        ("object", pa.int32()),
        ("source_frame", pa.int32()),
        ("position_y", pa.float32()),
        ("position_x", pa.float32()),
        ("scale_y", pa.float32()),
        ("scale_x", pa.float32()),
        ("depth", pa.float32()),
        ("features", list4),
        ("velocity", list2),
        ("covariance", list6),
    ]


def test_frames_have_no_object_and_carry_errors():
    names = tables.schema("frames", {"background": (5,)}, PROVENANCE).names
    assert names == [*tables.FRAME_KEY, "source_frame", "background", "recon_mse", "predict_mse"]


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two columns named object"):
        tables.schema("objects", {"object": ()}, PROVENANCE)


def test_metadata_survives_the_file(objects: pa.Table, tmp_path: Path):
    path = str(tmp_path / "part.parquet")
    tables.publish(objects, path)
    assert tables.provenance_of(pq.read_schema(path)) == ("objects", PROVENANCE)
    assert tables.read_part(path).equals(objects, check_metadata=True)


def test_rows_of_another_software_or_version_are_refused(tmp_path: Path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"clip": ["a"]}), path)
    with pytest.raises(ValueError, match=r"other\.parquet carries no objdyn metadata"):
        tables.read_part(str(path))
    newer = pa.schema([("clip", pa.string())], metadata={"objdyn": json.dumps({"schema": 9})})
    with pytest.raises(ValueError, match="schema 9, this version reads 1"):
        tables.provenance_of(newer)


def test_parts_of_an_earlier_version_have_fewer_settings(objects: pa.Table):
    description = json.loads(objects.schema.metadata[tables.METADATA_KEY])
    del description["closing"]
    older = objects.schema.with_metadata({tables.METADATA_KEY: json.dumps(description).encode()})
    assert tables.provenance_of(older) == ("objects", PROVENANCE)


def test_rows_are_sorted_by_a_key_that_comes_once(objects: pa.Table, frames: pa.Table):
    for rows, key, count in ((objects, tables.OBJECT_KEY, 48), (frames, tables.FRAME_KEY, 16)):
        keys = [tuple(row.values()) for row in rows.select(key).to_pylist()]
        assert keys == sorted(keys)
        assert len(set(keys)) == len(keys) == count


def test_each_row_holds_the_latents_of_its_key(blocks: list[Block], objects: pa.Table, frames: pa.Table):
    dense = {(b.clip, b.kind): b for b in blocks}
    for row in objects.to_pylist():
        source = dense[row["clip"], row["kind"]]
        at = row["frame"] - source.frame[0], row["object"]
        assert [row["position_y"], row["position_x"]] == source.latents["position"][at].tolist()
        assert [row["scale_y"], row["scale_x"]] == source.latents["scale"][at].tolist()
        assert row["depth"] == source.latents["depth"][at]
        assert row["features"] == source.latents["features"][at].tolist()
        assert row["source_frame"] == 100 + 2 * row["frame"]
        assert row["context"] == (2 if row["kind"] == "predicted" else 0)
        assert (row["edit"], row["sample"]) == ("", 0)
    for row in frames.to_pylist():
        source = dense[row["clip"], row["kind"]]
        assert row["background"] == source.latents["background"][row["frame"] - source.frame[0]].tolist()


def test_an_error_is_null_where_there_is_no_truth(blocks: list[Block], frames: pa.Table):
    rows = [row for row in frames.to_pylist() if row["clip"] == "clip-a"]
    posterior, predicted = rows[:4], rows[4:]
    assert [row["predict_mse"] for row in posterior] == [None] * 4
    assert [row["recon_mse"] for row in posterior] == [*blocks[2].errors["recon_mse"].tolist(), None]
    assert [row["predict_mse"] for row in predicted] == [*blocks[1].errors["predict_mse"].tolist(), None]
    assert [row["recon_mse"] for row in predicted] == [None] * 4


def test_a_repeated_key_is_refused(blocks: list[Block]):
    with pytest.raises(ValueError, match="clip-b has posterior frame 3 twice"):
        tables.build("frames", [*blocks, block("clip-b", first=3)], FRAME_FIELDS, PROVENANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guessed"}, "kind must be one of posterior, predicted, interpolated, got 'guessed'"),
        ({"frame": np.array([0, 1, 1, 2])}, "frame increasing"),
        ({"source_frame": np.arange(3)}, "source_frame must be"),
        ({"latents": {"depth": np.zeros((3, 2))}}, r"depth has shape \(3, 2\), wanted 4 frames first"),
        ({"errors": {"psnr": np.zeros(2)}}, "got 'psnr'"),
        ({"errors": {"recon_mse": np.zeros(5)}}, "at most 4 frames"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(block("clip-a"), **change)


def test_latents_that_disagree_are_refused():
    odd = block("clip-a")
    odd = dataclasses.replace(odd, latents={**odd.latents, "depth": np.zeros((4, 2), np.float32)})
    with pytest.raises(ValueError, match=r"disagree on the number of objects: \[\(2,\), \(3,\)\]"):
        tables.build("objects", [odd], OBJECT_FIELDS, PROVENANCE)
    wide = block("clip-b")
    wide = dataclasses.replace(wide, latents={**wide.latents, "background": np.zeros((4, 6), np.float32)})
    with pytest.raises(ValueError, match="background has different sizes in different clips"):
        tables.build("frames", [block("clip-a"), wide], FRAME_FIELDS, PROVENANCE)


def test_the_same_rows_give_the_same_bytes(blocks: list[Block], objects: pa.Table):
    again = tables.build("objects", list(reversed(blocks)), OBJECT_FIELDS, PROVENANCE)
    assert to_bytes(again) == to_bytes(objects)


def test_row_groups_hold_whole_clips(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "GROUP_ROWS", 30)
    many = [block(f"clip-{i:02d}", t=4 if i != 3 else 20) for i in range(7)]  # 12 rows each, clip 3 alone has 60
    rows = tables.build("objects", many, OBJECT_FIELDS, PROVENANCE)
    file = pq.ParquetFile(io.BytesIO(to_bytes(rows)))
    groups = [file.read_row_group(i, ["clip"])["clip"].unique().to_pylist() for i in range(file.num_row_groups)]
    assert groups == [["clip-00", "clip-01"], ["clip-02"], ["clip-03"], ["clip-04", "clip-05"], ["clip-06"]]
    assert file.read().equals(rows)


IMAGES: tuple[str, ...] = ("depth", "track", "mask", "component")


def image_blocks(*clips: str) -> list[Block]:
    """Blocks of small images, whose values follow from the clip."""
    blocks = []
    for number, clip in enumerate(clips):
        one = block(clip, t=2, k=3)
        images = np.random.default_rng(number).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
        more = {"track": images[..., 0, 0, 0].astype(np.int32), "mask": images[..., 0], "component": images}
        blocks.append(dataclasses.replace(one, latents={**one.latents, **more}))
    return blocks


def test_images_keep_their_bytes_and_their_shape(tmp_path: Path):
    blocks = image_blocks("clip-a", "clip-b")
    folder = write_folder(tmp_path, [blocks], fields_of={"objects": IMAGES, "frames": ()})
    schema = pq.read_schema(tmp_path / "objects" / "shard-00000.parquet")
    assert schema.field("component").type == pa.list_(pa.field("element", pa.uint8()), 60)
    assert schema.field("track").type == pa.int32()
    assert tables.shapes_of(schema) == {"mask": (4, 5), "component": (4, 5, 3)}
    for found in (tables.load_clips(folder), list(ClipDataset(folder)), [tables.load_clip(folder, "clip-a")]):
        for clip, written in zip(found, blocks, strict=False):
            for name in IMAGES:
                assert clip.objects[name].dtype == written.latents[name].dtype
                np.testing.assert_array_equal(clip.objects[name], written.latents[name])


def test_row_groups_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    rows = tables.build("objects", image_blocks("clip-a", "clip-b", "clip-c"), IMAGES, PROVENANCE)
    assert tables.group_rows(rows.schema) == tables.GROUP_ROWS
    row = 20 + 60 + 4 + 4 + 8 * 4  # mask, component, depth, track, ids
    monkeypatch.setattr(tables, "GROUP_BYTES", 12 * row)
    assert tables.group_rows(rows.schema) == 12
    groups = pq.ParquetFile(io.BytesIO(to_bytes(rows))).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [12, 6]


def test_the_layout_in_the_file(objects: pa.Table):
    group = pq.ParquetFile(io.BytesIO(to_bytes(objects))).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    for name in (*tables.OBJECT_KEY, "source_frame"):
        assert columns[name].has_dictionary_page, name
    for name in ("position_y", "depth", "features.list.element"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings, name
    assert [c.column_index for c in group.sorting_columns] == list(range(7))


def test_every_bit_flip_in_a_page_is_detected(objects: pa.Table, tmp_path: Path):
    data = to_bytes(objects)
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    path = tmp_path / "part.parquet"
    for i in range(group.num_columns):
        chunk = group.column(i)
        begin = chunk.dictionary_page_offset or chunk.data_page_offset
        last = begin + chunk.total_compressed_size - 1  # the chunk's last byte is page data, never a page header
        damaged = bytearray(data)
        damaged[last] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"part\.parquet is damaged"):
            tables.read_part(str(path))


def test_every_part_is_checked_against_the_manifest(folder: str, objects: pa.Table, frames: pa.Table):
    assert tables.read_objects(folder).equals(objects)
    assert tables.read_frames(folder).equals(frames)
    assert tables.read_objects(folder, ["clip", "depth"]).equals(objects.select(["clip", "depth"]))
    part = Path(folder, "objects", "shard-00001.parquet")
    data = bytearray(part.read_bytes())
    data[-20] ^= 1  # inside the footer, which page checksums do not cover
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.parquet"):
        tables.read_objects(folder)


def test_a_folder_without_manifest_is_refused(folder: str):
    Path(folder, "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"not a finished folder of tables; run jobs/extract\.py again"):
        tables.read_objects(folder)


BLOCK_TORCH_AND_RAY = """
import sys
sys.modules["torch"] = sys.modules["ray"] = None  # from here on importing them fails as if they were not installed
"""

READERS = {
    "pandas": """
import pandas
rows = pandas.read_parquet(folder + "/objects")
rows["features"] = [list(map(float, row)) for row in rows["features"]]
rows = rows.to_dict("list")
""",
    "polars": """
import polars
rows = polars.scan_parquet(folder + "/objects/*.parquet").collect().to_dict(as_series=False)
""",
    "duckdb": """
import duckdb
cursor = duckdb.sql(f"select * from read_parquet('{folder}/objects/*.parquet')")
rows = {name: list(values) for name, values in zip(cursor.columns, zip(*cursor.fetchall()))}
rows["features"] = [list(row) for row in rows["features"]]
""",
    "pyarrow": """
from pipeline import export, tables
assert [clip.objects["position"].shape for clip in tables.iter_clips(folder)] == [(4, 3, 2)] * 2
assert [clip.objects["position"].shape for clip in tables.ClipDataset(folder)] == [(4, 3, 2)] * 2
rows = tables.read_objects(folder).to_pydict()
""",
}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def assert_equal(found: ClipLatents, written: Block, objects: Sequence[str] = OBJECT_FIELDS) -> None:
    key = (written.clip, written.kind, written.context, written.edit, written.sample)
    assert found[:5] == key
    np.testing.assert_array_equal(found.frame, written.frame)
    np.testing.assert_array_equal(found.source_frame, written.source_frame)
    assert list(found.objects) == list(objects)
    for name, values in {**found.objects, **found.frames}.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, written.latents[name])
    for name in tables.ERRORS:
        known = written.errors.get(name, np.empty(0))
        unknown = [np.nan] * (len(written.frame) - len(known))
        np.testing.assert_array_equal(getattr(found, name), [*known, *unknown])


READ_ALL: dict[str, Callable[..., list[ClipLatents]]] = {
    "iter_clips": lambda *args: list(tables.iter_clips(*args)),
    "load_clips": tables.load_clips,
    "ClipDataset": lambda *args: list(ClipDataset(*args)),
    "load_clip": lambda folder, columns=None, kind="posterior": [
        tables.load_clip(folder, clip, columns, kind) for clip in ("clip-a", "clip-b")
    ],
}


@pytest.mark.parametrize("read", READ_ALL.values(), ids=READ_ALL)
def test_clips_come_back_as_the_arrays_that_were_written(read, folder: str, blocks: list[Block]):
    dense = {(b.clip, b.kind): b for b in blocks}
    for kind in ("posterior", "predicted"):
        clips = read(folder, None, kind)
        assert [clip.clip for clip in clips] == ["clip-a", "clip-b"]
        for clip in clips:
            assert list(clip.frames) == ["background"]
            assert_equal(clip, dense[clip.clip, kind])


@pytest.mark.parametrize("read", READ_ALL.values(), ids=READ_ALL)
def test_columns_choose_latents_or_single_columns(read, folder: str):
    full = tables.load_clip(folder, "clip-b")
    clip = read(folder, ["features", "position_x", "recon_mse"])[1]
    assert list(clip.objects) == ["features", "position_x"]
    np.testing.assert_array_equal(clip.objects["position_x"], full.objects["position"][..., 1])
    assert clip.frames == {}
    clip = read(folder, ["background"])[1]
    assert (clip.objects, list(clip.frames)) == ({}, ["background"])
    np.testing.assert_array_equal(clip.recon_mse, full.recon_mse)


@pytest.mark.parametrize("read", READ_ALL.values(), ids=READ_ALL)
def test_an_unknown_column_or_kind_lists_what_there_is(read, folder: str):
    with pytest.raises(
        ValueError, match=r"no column 'colour': objects/ has position \(position_y, position_x\), scale "
    ):
        read(folder, ["depth", "colour"])
    with pytest.raises(
        ValueError, match=r"no rows of kind 'interpolated', only of posterior, predicted|it has kind 'posterior'"
    ):
        read(folder, None, "interpolated")


@pytest.mark.parametrize("read", READ_ALL.values(), ids=READ_ALL)
@pytest.mark.parametrize("table", FIELDS)
def test_no_clip_comes_from_a_damaged_or_missing_part(read, table: str, folder: str):
    part = Path(folder, table, "shard-00001.parquet")
    flip(part, 40)
    with pytest.raises(ValueError, match=rf"{table}/shard-00001\.parquet is damaged"):
        read(folder)
    part.unlink()
    with pytest.raises(ValueError, match=rf"{table}/shard-00001\.parquet is missing.*run jobs/extract\.py again"):
        read(folder)


def test_clips_of_different_lengths_and_numbers_of_objects(tmp_path: Path):
    blocks = [block("clip-a", t=2, k=5), block("clip-b", t=7, k=1), block("clip-c", t=1, k=2)]
    folder = write_folder(tmp_path, [blocks])
    for found, written in zip(tables.load_clips(folder), blocks, strict=True):
        assert_equal(found, written)
    assert ClipDataset(folder).lengths == [2, 7, 1]


@pytest.mark.parametrize("read", READ_ALL.values(), ids=READ_ALL)
@pytest.mark.parametrize(
    "other",
    [block("clip-b"), block("clip-a", t=3), block("clip-a", first=1)],
    ids=["another clip", "fewer frames", "other frames"],
)
def test_objects_and_frames_that_do_not_fit_together_are_refused(read, other: Block, tmp_path: Path):
    folder = write_folder(tmp_path, [[block("clip-a")]], frames=[[other]])
    with pytest.raises(
        ValueError, match=r"in objects/ than in frames/|although its other table has|has no clip 'clip-a'"
    ):
        read(folder)


@pytest.mark.parametrize("read", list(READ_ALL.values())[:3], ids=list(READ_ALL)[:3])
def test_a_clip_in_two_parts_does_not_come_twice(read, tmp_path: Path):
    folder = write_folder(tmp_path, [[block("clip-a")], [block("clip-a"), block("clip-b")]])
    with pytest.raises(ValueError, match="rows of clip clip-a in part shard-00000 and in shard-00001; extract again"):
        read(folder)


@pytest.mark.parametrize("read", READ_ALL.values(), ids=READ_ALL)
def test_no_clip_comes_from_a_part_of_another_model(read, folder: str):
    path = Path(folder, "manifest.json")
    store.publish_json(str(path), {**store.read_json(str(path)), "model_id": "n" * 64})
    with pytest.raises(ValueError, match=r"shard-00000\.parquet has model_id m+, but its folder is of model_id n+"):
        read(folder)


def test_one_clip_is_read_without_the_parts_after_it(folder: str, blocks: list[Block]):
    for table in FIELDS:
        Path(folder, table, "shard-00001.parquet").unlink()
    assert_equal(tables.load_clip(folder, "clip-a"), blocks[2])


def test_an_unknown_clip_is_refused(folder: str):
    for clip in ("clip-0", "clip-aa", "clip-c"):
        with pytest.raises(ValueError, match=f"no clip '{clip}'; its clips lie between 'clip-a' and 'clip-b'"):
            tables.load_clip(folder, clip)


def test_a_clip_with_several_futures_asks_which(tmp_path: Path):
    futures = [block("clip-a", "predicted", context=c, sample=n) for c in (2, 3) for n in (0, 1)]
    folder = write_folder(tmp_path, [futures])
    assert_equal(tables.load_clip(folder, "clip-a", kind="predicted", context=3, sample=1), futures[3])
    assert [clip.sample for clip in tables.iter_clips(folder, kind="predicted")] == [0, 0]
    assert [clip.sample for clip in tables.iter_clips(folder, kind="predicted", sample=None)] == [0, 1, 0, 1]
    with pytest.raises(
        ValueError, match=r"2 runs of frames that fit, wanted one; it has .*context 3, edit '', sample 1"
    ):
        tables.load_clip(folder, "clip-a", kind="predicted")
    with pytest.raises(ValueError, match="0 runs of frames that fit"):
        tables.load_clip(folder, "clip-a", kind="predicted", edit="faster")


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """12 clips in 2 parts with 3 row groups of objects each."""
    monkeypatch.setattr(tables, "GROUP_ROWS", 24)
    clips = [block(f"clip-{i:02d}") for i in range(12)]
    return write_folder(tmp_path, [clips[:6], clips[6:]])


def test_a_dataset_gives_any_clip_in_any_order(many: str):
    dataset = ClipDataset(many)
    assert len(dataset) == len(dataset.keys) == len(dataset.lengths) == 12
    assert dataset.provenance == PROVENANCE
    for number in (7, 0, 11, 7, -1):
        assert_equal(dataset[number], block(dataset.keys[number].clip))
    with pytest.raises(IndexError):
        dataset[12]


def test_what_a_dataset_holds_is_bounded(many: str):
    held = {}
    for gigabytes in (0.0, 5e-6, 1.0):
        dataset = ClipDataset(many, cache_gb=gigabytes)
        list(dataset)
        held[gigabytes] = sum(runs.size for runs in dataset._cache.values())
        assert len(dataset._cache) >= 1
    assert held[0.0] < held[5e-6] <= 5_000 < held[1.0]


def test_changing_a_clip_does_not_change_the_next_read(folder: str, blocks: list[Block]):
    dataset = ClipDataset(folder)
    clip = dataset[0]
    clip.objects["depth"][:] = clip.frames["background"][:] = clip.recon_mse[:] = 0
    assert_equal(dataset[0], blocks[2])


def test_a_page_that_is_damaged_after_the_first_read_is_refused(many: str):
    dataset = ClipDataset(many, cache_gb=0)
    list(dataset)
    path = Path(many, "objects", "shard-00000.parquet")
    column = pq.read_metadata(path).row_group(2).column(10)
    flip(path, column.data_page_offset + column.total_compressed_size - 1)
    with pytest.raises(ValueError, match=r"shard-00000\.parquet cannot be read .*if it is damaged, delete it"):
        dataset[5]
    assert_equal(dataset[0], block("clip-00"))


def test_a_dataset_serves_threads(many: str):
    dataset = ClipDataset(many, cache_gb=0)
    order = [i * 7 % 12 for i in range(120)]
    with ThreadPoolExecutor(8) as pool:
        for number, clip in zip(order, pool.map(dataset.__getitem__, order), strict=True):
            assert_equal(clip, block(f"clip-{number:02d}"))


def test_a_dataset_travels_to_another_process_without_its_cache(many: str):
    dataset = ClipDataset(many)
    dataset[3]
    data = pickle.dumps(dataset)
    assert len(data) < 40_000
    assert_equal(pickle.loads(data)[3], block("clip-03"))


def test_the_data_loader_of_torch_collates_clips_in_forked_workers(many: str):
    import torch
    from torch.utils.data import DataLoader

    dataset = ClipDataset(many, ["position", "background"])
    dataset[0]
    batches = list(DataLoader(cast(Any, dataset), batch_size=8, num_workers=1, multiprocessing_context="fork"))
    assert [batch.objects["position"].shape for batch in batches] == [(8, 4, 3, 2), (4, 4, 3, 2)]
    assert list(batches[1].clip) == [f"clip-{i:02d}" for i in range(8, 12)]
    assert torch.equal(batches[1].frames["background"][0], torch.from_numpy(dataset[8].frames["background"]))


def test_clips_come_from_s3_too(folder: str, blocks: list[Block], s3_folder: str):
    remote = f"{s3_folder}/tables"
    for path in store.list_tree(folder):
        store.publish(f"{remote}/{path}", Path(folder, path).read_bytes())
    for read in READ_ALL.values():
        assert_equal(read(remote)[0], blocks[2])
    shutil.rmtree(folder)
    assert_equal(tables.load_clip(remote, "clip-b", kind="predicted"), blocks[3])


@pytest.mark.parametrize("reader", READERS)
def test_the_tables_open_where_torch_and_ray_cannot_be_imported(reader: str, folder: str, repository: Path):
    script = f"{BLOCK_TORCH_AND_RAY}\nimport json, os\nfolder = {folder!r}\n{READERS[reader]}"
    script += "\nprint(json.dumps(rows), flush=True)"
    script += "\nos._exit(0)"  # on a busy machine pyarrow 26 once aborted in a thread of its own while Python ended
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tables.read_objects(folder).to_pydict()


def test_the_blocker_blocks():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH_AND_RAY + "import torch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError: import of torch halted" in done.stderr
