"""Tables of latents in Parquet: ``objects/`` (a row per object and frame) and ``frames/`` (a row per frame).

Long format with plain Arrow types, so that pandas, polars and duckdb read it without this package. The columns follow
from the shapes of a family's latents: nothing here knows a family. Needs neither torch nor ray.

A folder of tables holds one part of each table per input shard and ``manifest.json``, which lists the parts with their
SHA-256 and is written last.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import store

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
METADATA_KEY = b"objdyn"
KINDS = ("posterior", "predicted", "interpolated")
GROUP_ROWS = 30_000

FRAME_KEY = ("clip", "kind", "context", "edit", "sample", "frame")
OBJECT_KEY = (*FRAME_KEY, "object")
ERRORS = ("recon_mse", "predict_mse")
"""Mean squared error of a frame over pixels and channels, in [0, 1] units; null where there is no true frame."""
COMPONENTS = {("position", 2): ("y", "x"), ("scale", 2): ("y", "x")}
"""Fields whose last axis has names: they become one column per name, other vectors become one list column."""

Table = Literal["objects", "frames"]
_TYPES = {"clip": pa.string(), "kind": pa.string(), "edit": pa.string()}


@dataclass(frozen=True)
class Provenance:
    """Where the rows of a part come from; stored in every part."""

    family: str
    model_id: str
    """SHA-256 of the model's weights."""
    dataset_id: str
    split: str
    object_is_track: bool
    """Whether object k is the same thing in every frame of a clip."""
    context: int | None = None
    """Frames seen before ``predicted`` rows; None when nothing was predicted."""
    horizon: int | None = None
    """Frames predicted after them."""


@dataclass(frozen=True)
class Block:
    """Dense latents of consecutive frames of one clip, all of one kind: what becomes t rows, or t * k."""

    clip: str
    kind: str
    frame: np.ndarray
    """Frame in the clip, int (t,), increasing."""
    source_frame: np.ndarray
    """The same frames counted in the source video, int (t,)."""
    latents: Mapping[str, np.ndarray]
    """Per field of the family's latents: (t, k, ...) for objects, (t, ...) for frames."""
    errors: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Per name in ERRORS: the values (n,) of the first n <= t frames; the others are null, as is a missing name."""
    context: int = 0
    edit: str = ""
    sample: int = 0

    def __post_init__(self) -> None:
        t = len(self.frame)
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if t == 0 or self.source_frame.shape != (t,) or np.any(np.diff(self.frame) <= 0):
            raise ValueError(f"clip {self.clip}: frame and source_frame must be (t,) with t >= 1 and frame increasing")
        for name, values in self.latents.items():
            if values.shape[:1] != (t,):
                raise ValueError(f"clip {self.clip}: {name} has shape {values.shape}, wanted {t} frames first")
        for name, values in self.errors.items():
            if name not in ERRORS or values.ndim != 1 or len(values) > t:
                raise ValueError(f"clip {self.clip}: errors must be {ERRORS} of at most {t} frames, got {name!r}")

    @property
    def order(self) -> tuple[Any, ...]:
        """The block's key, with its first frame last: parts are sorted by it."""
        return self.clip, self.kind, self.context, self.edit, self.sample, int(self.frame[0])


def schema(table: Table, fields: Mapping[str, tuple[int, ...]], provenance: Provenance) -> pa.Schema:
    """The schema of a table, from the family's fields and their trailing shapes (without frame and object axes).

    ``(2,)`` of ``position`` and ``scale`` gives ``position_y, position_x``; ``()`` gives one float32 column; any other
    shape one fixed-size list, flattened in C order.
    """
    key = OBJECT_KEY if table == "objects" else FRAME_KEY
    columns = [pa.field(name, _TYPES.get(name, pa.int32()), nullable=False) for name in (*key, "source_frame")]
    for name, shape in fields.items():
        columns += [pa.field(column, type_, nullable=False) for column, type_ in _columns(name, shape)]
    if table == "frames":
        columns += [pa.field(name, pa.float32()) for name in ERRORS]
    twice = [name for name, n in Counter(column.name for column in columns).items() if n > 1]
    if twice:
        raise ValueError(f"table {table} would have two columns named {twice[0]}; rename the family's latents field")
    description = {"schema": SCHEMA_VERSION, "table": table, **dataclasses.asdict(provenance)}
    return pa.schema(columns, metadata={METADATA_KEY: json.dumps(description, sort_keys=True).encode()})


def build(table: Table, blocks: Sequence[Block], fields: Sequence[str], provenance: Provenance) -> pa.Table:
    """The rows of all blocks, sorted by key.

    Args:
        table: ``objects`` or ``frames``.
        blocks: what the part holds, in any order.
        fields: names of the latents that go to this table.
        provenance: stored in the schema's metadata.

    Raises:
        ValueError: no blocks, a key that comes twice, or latents whose shapes do not fit together.
    """
    if not blocks or (table == "objects" and not fields):
        raise ValueError(f"table {table} needs blocks and fields, got {len(blocks)} blocks and fields {list(fields)}")
    blocks = sorted(blocks, key=lambda block: block.order)
    for one, two in pairwise(blocks):
        if one.order[:-1] == two.order[:-1] and one.frame[-1] >= two.frame[0]:
            raise ValueError(f"clip {two.clip} has {two.kind} frame {two.frame[0]} twice; a key has one row")
    axes = 2 if table == "objects" else 1
    for block in blocks:
        shapes = {block.latents[name].shape[1:axes] for name in fields}
        if len(shapes) > 1 or any(len(shape) != axes - 1 for shape in shapes):
            raise ValueError(f"clip {block.clip}: latents disagree on the number of objects: {sorted(shapes)}")
    objects = np.array([block.latents[fields[0]].shape[1] if table == "objects" else 1 for block in blocks])
    lengths = np.array([len(block.frame) for block in blocks])

    def per_row(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
        return pa.array(values, type_).take(pa.array(np.repeat(np.arange(len(blocks)), lengths * objects)))

    def per_frame(arrays: Sequence[np.ndarray]) -> pa.Array:
        return pa.array(np.repeat(np.concatenate(arrays), np.repeat(objects, lengths)).astype(np.int32))

    columns = {
        "clip": per_row([block.clip for block in blocks], pa.string()),
        "kind": per_row([block.kind for block in blocks], pa.string()),
        "context": per_row([block.context for block in blocks], pa.int32()),
        "edit": per_row([block.edit for block in blocks], pa.string()),
        "sample": per_row([block.sample for block in blocks], pa.int32()),
        "frame": per_frame([block.frame for block in blocks]),
        "source_frame": per_frame([block.source_frame for block in blocks]),
    }
    if table == "objects":
        numbers = [np.tile(np.arange(k, dtype=np.int32), t) for k, t in zip(objects, lengths, strict=True)]
        columns["object"] = pa.array(np.concatenate(numbers))
    trailing: dict[str, tuple[int, ...]] = {}
    for name in fields:
        arrays = [block.latents[name] for block in blocks]
        shapes = {array.shape[axes:] for array in arrays}
        if len(shapes) > 1:
            raise ValueError(f"{name} has different sizes in different clips: {sorted(shapes)}")
        trailing[name] = shapes.pop()
        rows = np.concatenate([array.reshape(array.shape[0] * math.prod(array.shape[1:axes]), -1) for array in arrays])
        columns |= _arrays(name, trailing[name], rows.astype(np.float32))
    if table == "frames":
        columns |= {name: _errors(name, blocks) for name in ERRORS}
    wanted = schema(table, trailing, provenance)
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


def write(rows: pa.Table, sink: BinaryIO) -> None:
    """Write a part: whole clips per row group, zstd, page checksums. The same rows give the same bytes."""
    key = [name for name in OBJECT_KEY if name in rows.schema.names]
    ids: Any = [*key, "source_frame"]  # a list is allowed, but the stubs of pyarrow say bool
    floats = [_parquet_path(column) for column in rows.schema if column.name not in ids]
    with pq.ParquetWriter(
        sink,
        rows.schema,
        compression="zstd",
        use_dictionary=ids,
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
        write_page_index=True,
        sorting_columns=pq.SortingColumn.from_ordering(rows.schema, [(name, "ascending") for name in key]),
    ) as writer:
        for first, stop in _row_groups(rows):
            writer.write_table(rows.slice(first, stop - first), row_group_size=stop - first)


def publish(rows: pa.Table, path: str) -> dict[str, Any]:
    """Write a part so that it appears whole or not at all; return ``{"rows", "bytes", "sha256"}`` for the manifest."""
    published = store.publish_file(path, lambda sink: write(rows, sink))
    return {"rows": rows.num_rows, "bytes": published.size, "sha256": published.sha256}


def provenance_of(schema: pa.Schema, path: str = "this table") -> tuple[Table, Provenance]:
    """Read what ``schema`` wrote into a part's metadata.

    Raises:
        ValueError: the file is not a table of this software, or of a newer version of it.
    """
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} carries no objdyn metadata: it was not written by jobs/extract.py")
    description = json.loads(text)
    if description["schema"] != SCHEMA_VERSION:
        raise ValueError(f"{path} has table schema {description['schema']}, this version reads {SCHEMA_VERSION}")
    names = [f.name for f in dataclasses.fields(Provenance)]
    return description["table"], Provenance(**{name: description[name] for name in names})


def read_part(path: str, expected_sha256: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part with its page checksums verified, and the whole file against a SHA-256 if one is given.

    Raises:
        ValueError: the file is damaged or no table of this software.
    """
    data = store.read_bytes(path, expected_sha256)
    try:
        names = list(columns) if columns is not None else None
        rows = pq.read_table(pa.BufferReader(data), columns=names, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        message = f"{path} is damaged ({' '.join(str(error).split())}); delete it and run jobs/extract.py again"
        raise ValueError(message) from error
    provenance_of(rows.schema, path)
    return rows


def read_manifest(folder: str) -> dict[str, Any]:
    """Read the manifest of a finished folder of tables.

    Raises:
        ValueError: there is none, so the extraction has not finished.
    """
    path = store.join(folder, MANIFEST)
    if not store.exists(path):
        raise ValueError(
            f"{folder} has no {MANIFEST}: not a finished folder of tables; run jobs/extract.py again with the same "
            "flags, it keeps the parts that are done"
        )
    manifest = store.read_json(path)
    if manifest.get("kind") != "tables" or manifest.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{path} does not describe tables of schema {SCHEMA_VERSION}, but {manifest.get('kind')!r}")
    return manifest


def read_objects(folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of ``objects/`` that the manifest lists, every checksum verified, in the order of its parts."""
    return pa.concat_tables(read_parts(folder, "objects", columns))


def read_frames(folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of ``frames/`` that the manifest lists, every checksum verified, in the order of its parts."""
    return pa.concat_tables(read_parts(folder, "frames", columns))


def read_parts(folder: str, table: Table, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The parts of a table one after the other, for tables larger than memory; checks what ``read_objects`` checks."""
    manifest = read_manifest(folder)
    for part in manifest["parts"]:
        path = store.join(folder, table, part["name"] + ".parquet")
        rows = read_part(path, part[table]["sha256"], columns)
        if rows.num_rows != part[table]["rows"]:
            raise ValueError(f"{path} has {rows.num_rows} rows, its manifest says {part[table]['rows']}")
        yield rows


def _columns(name: str, shape: tuple[int, ...]) -> list[tuple[str, pa.DataType]]:
    if shape == ():
        return [(name, pa.float32())]
    size = math.prod(shape)
    if size == 0:
        raise ValueError(f"latents field {name} has an empty shape {shape}: it has nothing to store")
    if len(shape) == 1 and (name, size) in COMPONENTS:
        return [(f"{name}_{component}", pa.float32()) for component in COMPONENTS[name, size]]
    return [(name, pa.list_(pa.field("element", pa.float32()), size))]


def _arrays(name: str, shape: tuple[int, ...], rows: np.ndarray) -> dict[str, pa.Array]:
    columns = _columns(name, shape)
    if len(columns) > 1:
        return {column: pa.array(np.ascontiguousarray(rows[:, i])) for i, (column, _) in enumerate(columns)}
    column, type_ = columns[0]
    values = pa.array(rows.reshape(-1))
    return {column: pa.FixedSizeListArray.from_arrays(values, type=type_) if shape else values}


def _errors(name: str, blocks: Sequence[Block]) -> pa.Array:
    known = [block.errors.get(name, np.empty(0, np.float32)) for block in blocks]
    padded = [np.pad(v, (0, len(b.frame) - len(v))) for v, b in zip(known, blocks, strict=True)]
    missing = [np.arange(len(block.frame)) >= len(values) for values, block in zip(known, blocks, strict=True)]
    return pa.array(np.concatenate(padded).astype(np.float32), mask=np.concatenate(missing))


def _parquet_path(column: pa.Field) -> str:
    return f"{column.name}.list.element" if pa.types.is_fixed_size_list(column.type) else column.name


def _row_groups(rows: pa.Table) -> Iterator[tuple[int, int]]:
    """Ranges of whole clips with about GROUP_ROWS rows each, so that one clip is read from one group."""
    clips = rows.column("clip").combine_chunks().to_numpy(zero_copy_only=False)
    ends = [*(np.flatnonzero(clips[1:] != clips[:-1]) + 1).tolist(), len(clips)]
    first = previous = 0
    for end in ends:
        if end - first > GROUP_ROWS and previous > first:
            yield first, previous
            first = previous
        previous = end
    yield first, len(clips)
