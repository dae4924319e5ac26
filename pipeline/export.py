"""Tables of latents in another form: a row per clip with dense tensors, or selected long rows in one file.

One Parquet file, sorted by clip, with zstd, page checksums and the tables' provenance in its metadata. Written as a
stream: in memory are the clips of one row group and the part that they come from. Needs neither torch nor ray.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import store, tables
from pipeline.tables import ClipDataset, ClipLatents, Fields

if TYPE_CHECKING:  # the dataclasses of all runs need torch
    from pipeline.config import ExportRun

TENSORS = "tensors"
"""What the metadata calls this table."""
AXES = {"objects": ("frame", "object"), "frames": ("frame",)}
INNER_AXES = {0: (), 1: ("component",), 2: ("row", "column"), 3: ("row", "column", "channel")}
"""Names of a latent's own axes, by their number."""
_CACHE_GB = 0.5


@store.job
def export(run: "ExportRun") -> str:
    """Write the file of a run; an earlier one stays until the new one is complete.

    Returns:
        A line that says what is where.

    Raises:
        ValueError: the tables are damaged or not finished, have no such kind or column, or have clips of different
            shapes, which do not fit into one tensor column.
    """
    folder, out = store.resolve(run.tables, "--tables"), store.resolve(run.out, "--out")
    if out.startswith(folder + "/"):
        raise ValueError(
            f"--out={out} lies inside the folder of tables, which holds nothing else; choose another place"
        )
    if store.exists(out) and not store.is_file(out):
        raise ValueError(f"--out={out} is a folder; name a file in it: {store.join(out, 'export.parquet')}")
    edit, sample = None if run.edits else "", None if run.samples else 0
    clips = ClipDataset(folder, run.columns or None, run.kind, edit=edit, sample=sample, cache_gb=_CACHE_GB)
    write = _write_tensors if run.tensor else _write_rows
    written: list[str] = []
    published = store.publish_file(out, lambda sink: written.append(write(clips, run, sink)))
    return f"{written[0]}, {published.size:,} bytes: {out}"


def _write_tensors(clips: ClipDataset, run: "ExportRun", sink: BinaryIO) -> str:
    _require_one_length(clips)
    order = sorted(range(len(clips)), key=clips.keys.__getitem__)
    first = _tensors(clips, clips[order[0]])
    schema = _tensor_schema(clips, run.kind, first)
    objects = [first[name].shape[1] for name in clips.fields["objects"]]
    clips_per_group = max(1, tables.GROUP_ROWS // (clips.lengths[0] * max(objects, default=1)))
    clips_per_group = min(clips_per_group, tables.group_rows(schema))
    with tables.open_writer(sink, schema) as writer:
        for start in range(0, len(order), clips_per_group):
            group = [clips[number] for number in order[start : start + clips_per_group]]
            writer.write_table(_to_table(clips, group, schema), row_group_size=clips_per_group)
    shapes = ", ".join(f"{name} {values.shape}" for name, values in first.items())
    return f"{len(clips)} {run.kind} clips with {shapes}"


def _require_one_length(clips: ClipDataset) -> None:
    usual = Counter(clips.lengths).most_common(1)[0][0]
    others = [(key, t) for key, t in zip(clips.keys, clips.lengths, strict=True) if t != usual]
    if others:
        named = ", ".join(f"{key.clip} has {t}" for key, t in others[:5]) + (", ..." if len(others) > 5 else "")
        raise ValueError(
            f"{len(others)} of {len(clips)} clips do not have {usual} frames like the rest ({named}), so they do not "
            "fit into one tensor column; export long rows with --no-tensor, or load the clips with tables.iter_clips"
        )


def _tensors(clips: ClipDataset, clip: ClipLatents) -> dict[str, np.ndarray]:
    """What becomes tensor columns, by name."""
    frames = {**clip.frames, "recon_mse": clip.recon_mse, "predict_mse": clip.predict_mse}
    return {**clip.objects, **{name: frames[name] for name in clips.fields["frames"]}}


def _tensor_schema(clips: ClipDataset, kind: str, first: Mapping[str, np.ndarray]) -> pa.Schema:
    numbers = pa.list_(pa.field("element", pa.int32()), clips.lengths[0])
    types: dict[str, Any] = {"clip": pa.string(), "kind": pa.string(), "context": pa.int32(), "edit": pa.string()}
    types |= {"sample": pa.int32(), "frame": numbers, "source_frame": numbers}
    for table in ("objects", "frames"):
        for name in clips.fields[table]:
            shape, outer = first[name].shape, AXES[table]
            types[name] = pa.fixed_shape_tensor(
                pa.from_numpy_dtype(first[name].dtype), shape, dim_names=(*outer, *INNER_AXES[len(shape) - len(outer)])
            )
    components = {
        name: [column.removeprefix(f"{name}_") for column in columns]
        for fields in clips.fields.values()
        for name, columns in fields.items()
        if len(columns) > 1
    }
    metadata = _metadata(clips, {"table": TENSORS, "kind": kind, "components": components})
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in types.items()], metadata=metadata)


def _to_table(clips: ClipDataset, group: Sequence[ClipLatents], schema: pa.Schema) -> pa.Table:
    rows = [_tensors(clips, clip) for clip in group]
    columns: list[Any] = []
    for column in schema:
        if isinstance(column.type, pa.FixedShapeTensorType):
            values = [row[column.name] for row in rows]
            for clip, value in zip(group, values, strict=True):
                if list(value.shape) != column.type.shape:
                    raise ValueError(
                        f"clip {clip.clip} has {column.name} of shape {value.shape}, the first clip has "
                        f"{tuple(column.type.shape)}; export long rows with --no-tensor, or load the clips with "
                        "tables.iter_clips"
                    )
            flat = pa.array(np.concatenate(values, axis=None))
            storage = pa.FixedSizeListArray.from_arrays(flat, type=column.type.storage_type)
            columns.append(pa.ExtensionArray.from_storage(column.type, storage))
        elif pa.types.is_fixed_size_list(column.type):
            flat = pa.array(np.concatenate([getattr(clip, column.name) for clip in group]))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type))
        else:
            columns.append(pa.array([getattr(clip, column.name) for clip in group], column.type))
    return pa.table(columns, schema=schema)


def _write_rows(clips: ClipDataset, run: "ExportRun", sink: BinaryIO) -> str:
    table, fields = _one_table(clips, run)
    ids = (*(tables.OBJECT_KEY if table == "objects" else tables.FRAME_KEY), "source_frame")
    wanted = {**{name: (name,) for name in ids}, **fields}
    schema = _row_schema(clips, run.kind, table, wanted)
    count = 0
    with tables.open_writer(sink, schema) as writer:
        for rows in _in_groups(_rows_by_clip(clips, run, table, wanted)):
            writer.write_table(rows.select(schema.names).cast(schema), row_group_size=rows.num_rows)
            count += rows.num_rows
    return f"{count} {run.kind} rows of {table}"


def _one_table(clips: ClipDataset, run: "ExportRun") -> tuple[tables.Table, Fields]:
    objects, frames = clips.fields["objects"], clips.fields["frames"]
    if run.columns and objects and frames:
        raise ValueError(
            f"--no-tensor writes rows of one table, but {', '.join(objects)} is of objects/ and {', '.join(frames)} of "
            "frames/; name columns of one of them, or leave out --no-tensor"
        )
    return ("objects", objects) if objects else ("frames", frames)


def _row_schema(clips: ClipDataset, kind: str, table: tables.Table, wanted: Fields) -> pa.Schema:
    found = clips.open_part(table, 0).schema_arrow
    columns = [found.field(column) for names in wanted.values() for column in names]
    plain = [c.with_type(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in columns]
    shapes = {name: list(shape) for name, shape in tables.shapes_of(found).items() if name in wanted}
    return pa.schema(plain, _metadata(clips, {"table": table, "kind": kind} | ({"shapes": shapes} if shapes else {})))


def _rows_by_clip(clips: ClipDataset, run: "ExportRun", table: tables.Table, wanted: Fields) -> Iterator[pa.Table]:
    """The rows of one clip after the other, sorted over all parts.

    A part is sorted, so it is opened when its first clip comes, read once, and let go after its last clip.
    """
    places = sorted({(key.clip, part) for key, part in zip(clips.keys, clips.part_of, strict=True)})
    left = Counter(part for _, part in places)
    opened: dict[int, Iterator[pa.Table]] = {}
    for clip, part in places:
        if part not in opened:
            opened[part] = _rows_of_part(clips, run, table, wanted, part)
        rows = next(opened[part], None)
        if rows is None or rows.column("clip")[0].as_py() != clip:
            raise ValueError(f"part {clips.parts[part]['name']} of {clips.folder} lacks clip {clip} in {table}/")
        yield rows
        left[part] -= 1
        if not left[part]:
            del opened[part]


def _rows_of_part(
    clips: ClipDataset, run: "ExportRun", table: tables.Table, wanted: Fields, part: int
) -> Iterator[pa.Table]:
    file, path = clips.open_part(table, part), tables.part_path(clips.folder, table, clips.parts[part])
    for group in range(file.num_row_groups):
        rows = tables.read_group(file, group, wanted, path)
        choices = {"kind": run.kind} | ({} if run.edits else {"edit": ""}) | ({} if run.samples else {"sample": 0})
        for name, value in choices.items():
            column = rows.column(name)
            column = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
            rows = rows.filter(pc.call_function("equal", [column, pa.scalar(value)]))
        rows = rows.unify_dictionaries().combine_chunks()
        if rows.num_rows:
            codes: Any = rows.column("clip").combine_chunks()
            ends = [*np.flatnonzero(np.diff(codes.indices.to_numpy())) + 1, rows.num_rows]
            for first, stop in pairwise([0, *ends]):
                yield rows.slice(first, stop - first)


def _in_groups(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Join pieces up to the size of a row group; a piece is never cut."""
    held: list[pa.Table] = []
    for rows in pieces:
        if held and sum(piece.num_rows for piece in held) + rows.num_rows > tables.group_rows(rows.schema):
            yield pa.concat_tables(held)
            held = []
        held.append(rows)
    yield pa.concat_tables(held)


def _metadata(clips: ClipDataset, description: Mapping[str, Any]) -> dict[bytes, bytes]:
    """What a part's metadata says, and which tables these are."""
    description = {
        "schema": tables.SCHEMA_VERSION,
        **dataclasses.asdict(clips.provenance),
        "tables_id": store.sha256_file(store.join(clips.folder, tables.MANIFEST)),
        **description,
    }
    return {tables.METADATA_KEY: json.dumps(description, sort_keys=True).encode()}
