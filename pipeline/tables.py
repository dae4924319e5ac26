"""Tables of latents in Parquet: ``objects/`` (a row per object and frame) and ``frames/`` (a row per frame).

Long format with plain Arrow types, so that pandas, polars and duckdb read it without this package. The columns follow
from the shapes of a family's latents: nothing here knows a family. Needs neither torch nor ray.

A folder of tables holds one part of each table per input shard and ``manifest.json``, which lists the parts with their
SHA-256 and is written last.

Writing: ``Block`` -> ``build`` -> ``publish``. Reading rows: ``read_objects``, ``read_frames``, ``read_parts``. Reading
dense arrays, a clip at a time: ``iter_clips`` (a stream), ``load_clip`` (one), ``ClipDataset`` (any, for training).
"""

import contextlib
import dataclasses
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import store

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
METADATA_KEY = b"objdyn"
KINDS = ("posterior", "predicted", "interpolated")
GROUP_ROWS = 30_000
GROUP_BYTES = 1 << 26
"""Of a row group before compression: images make rows large."""

FRAME_KEY = ("clip", "kind", "context", "edit", "sample", "frame")
OBJECT_KEY = (*FRAME_KEY, "object")
_IDS = (*OBJECT_KEY, "source_frame")
ERRORS = ("recon_mse", "predict_mse")
"""Mean squared error of a frame over pixels and channels, in [0, 1] units; null where there is no true frame. The first
is of frames that the model saw, the second of those that it did not: predicted or interpolated."""
COMPONENTS = {("position", 2): ("y", "x"), ("scale", 2): ("y", "x")}
"""Fields whose last axis has names: they become one column per name, other vectors become one list column."""

Table = Literal["objects", "frames"]
_TABLES: tuple[Table, ...] = ("objects", "frames")
Fields = dict[str, tuple[str, ...]]
"""Latents by name, each with the columns that hold it: ``{"position": ("position_y", "position_x")}``."""
_TYPES = {"clip": pa.string(), "kind": pa.string(), "edit": pa.string()}
_KEPT_TYPES = {np.dtype(np.uint8): np.dtype(np.uint8), np.dtype(np.int32): np.dtype(np.int32)}
"""Types of latents that stay what they are; all others become float32."""


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
    """Frames seen before ``predicted`` and ``interpolated`` rows; None when there are neither."""
    horizon: int | None = None
    """Frames predicted after them; None when nothing was predicted."""
    closing: int | None = None
    """Frames seen at the end of a clip when those between were interpolated; None when none were."""


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
    """Per field of the family's latents: (t, k, ...) for objects, (t, ...) for frames. Stored as float32, but for
    int32 and uint8 (images)."""
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


class ClipKey(NamedTuple):
    """What tells one run of frames from another; its rows lie side by side in both tables."""

    clip: str
    kind: str
    context: int
    edit: str
    sample: int


class ClipLatents(NamedTuple):
    """Dense latents of one clip, all of one kind, in arrays of its own, which may be changed.

    A tuple of arrays, dicts of arrays and plain values: torch's DataLoader collates clips of equal shape as they are.
    """

    clip: str
    kind: str
    context: int
    """Frames seen before ``predicted`` or ``interpolated`` ones; 0 for ``posterior``."""
    edit: str
    sample: int
    frame: np.ndarray
    """Frame in the clip, int32 (t,)."""
    source_frame: np.ndarray
    """The same frames counted in the source video, int32 (t,)."""
    objects: dict[str, np.ndarray]
    """Per latent: float32 (t, k), or (t, k, d) for a vector; ``position`` and ``scale`` are (t, k, 2) as (y, x).
    ``track`` is int32 (t, k); ``mask`` uint8 (t, k, h, w) and ``component`` uint8 (t, k, h, w, c)."""
    frames: dict[str, np.ndarray]
    """Per latent of whole frames, ``background`` for example: float32 (t,) or (t, d)."""
    recon_mse: np.ndarray
    """Float32 (t,), NaN where the table has null."""
    predict_mse: np.ndarray
    """The same."""


def schema(
    table: Table,
    fields: Mapping[str, tuple[int, ...]],
    provenance: Provenance,
    types: Mapping[str, np.dtype[Any]] | None = None,
) -> pa.Schema:
    """The schema of a table, from the family's fields and their trailing shapes (without frame and object axes).

    ``(2,)`` of ``position`` and ``scale`` gives ``position_y, position_x``; ``()`` gives one column; any other
    shape one fixed-size list, flattened in C order. The metadata has the shapes that are more than a length.

    Args:
        table: ``objects`` or ``frames``.
        fields: names and trailing shapes.
        provenance: stored in the metadata.
        types: of fields that are not float32.
    """
    key = OBJECT_KEY if table == "objects" else FRAME_KEY
    columns = [pa.field(name, _TYPES.get(name, pa.int32()), nullable=False) for name in (*key, "source_frame")]
    for name, shape in fields.items():
        element = pa.from_numpy_dtype((types or {}).get(name, np.dtype(np.float32)))
        columns += [pa.field(column, type_, nullable=False) for column, type_ in _columns(name, shape, element)]
    if table == "frames":
        columns += [pa.field(name, pa.float32()) for name in ERRORS]
    twice = [name for name, n in Counter(column.name for column in columns).items() if n > 1]
    if twice:
        raise ValueError(f"table {table} would have two columns named {twice[0]}; rename the family's latents field")
    description: dict[str, Any] = {"schema": SCHEMA_VERSION, "table": table, **dataclasses.asdict(provenance)}
    if shapes := {name: list(shape) for name, shape in fields.items() if len(shape) > 1}:
        description["shapes"] = shapes
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
    types: dict[str, np.dtype[Any]] = {}
    for name in fields:
        arrays = [block.latents[name] for block in blocks]
        types[name] = _KEPT_TYPES.get(arrays[0].dtype, np.dtype(np.float32))
        shapes = {array.shape[axes:] for array in arrays}
        if len(shapes) > 1:
            raise ValueError(f"{name} has different sizes in different clips: {sorted(shapes)}")
        trailing[name] = shapes.pop()
        rows = np.concatenate([array.reshape(array.shape[0] * math.prod(array.shape[1:axes]), -1) for array in arrays])
        columns |= _arrays(name, trailing[name], rows.astype(types[name], copy=False))
    if table == "frames":
        columns |= {name: _errors(name, blocks) for name in ERRORS}
    wanted = schema(table, trailing, provenance, types)
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


def shapes_of(schema: pa.Schema) -> dict[str, tuple[int, ...]]:
    """Trailing shapes of the fields whose lists hold more than a vector: (h, w) of masks, (h, w, c) of components."""
    text = (schema.metadata or {}).get(METADATA_KEY)
    return {} if text is None else {name: tuple(shape) for name, shape in json.loads(text).get("shapes", {}).items()}


def group_rows(schema: pa.Schema) -> int:
    """Rows of a row group: GROUP_ROWS, or fewer where they are large (GROUP_BYTES)."""
    sizes = [math.prod(_list_shape(column)) * _width(_element_type(column)) for column in schema]
    return max(1, min(GROUP_ROWS, GROUP_BYTES // max(sum(sizes), 1)))


def write(rows: pa.Table, sink: BinaryIO) -> None:
    """Write a part: whole clips per row group, zstd, page checksums. The same rows give the same bytes."""
    with open_writer(sink, rows.schema) as writer:
        for first, stop in _row_groups(rows):
            writer.write_table(rows.slice(first, stop - first), row_group_size=stop - first)


def open_writer(sink: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a Parquet file for rows that come sorted by key: zstd, page checksums, page index."""
    key = [name for name in OBJECT_KEY if name in schema.names and not _is_list(schema.field(name))]
    floats = [_parquet_path(column) for column in schema if _element_type(column) == pa.float32()]
    ids: Any = [_parquet_path(column) for column in schema if _element_type(column) != pa.float32()]  # stubs say bool
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=ids,
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
        write_page_index=True,
        sorting_columns=pq.SortingColumn.from_ordering(schema, [(name, "ascending") for name in key]),
    )


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
    try:
        description = store.loads(text)
        if description["schema"] != SCHEMA_VERSION:
            raise ValueError(f"it has table schema {description['schema']}, this version reads {SCHEMA_VERSION}")
        for name, shape in description.get("shapes", {}).items():
            if not all(type(length) is int and length > 0 for length in shape):
                raise ValueError(f"a shape {shape}")
            size = getattr(schema.field(name).type, "list_size", 1) if name in schema.names else math.prod(shape)
            if size != math.prod(shape):
                raise ValueError(f"a shape {shape} of {name}, which has {size} numbers")
        names = [f.name for f in dataclasses.fields(Provenance) if f.name in description]  # an earlier one has fewer
        return description["table"], Provenance(**{name: description[name] for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table that this version reads ({error!r}); extract it again") from error


def check_part(schema: pa.Schema, table: Table, manifest: Mapping[str, Any], path: str) -> None:
    """Compare what a part says of its origin with the manifest of its folder.

    Raises:
        ValueError: it is of another table, model, dataset or setting: it was put there from another folder.
    """
    found, provenance = provenance_of(schema, path)
    if "clip" not in schema.names:
        raise ValueError(f"{path} has no column clip: it was not written by jobs/extract.py")
    for name in {*OBJECT_KEY, "source_frame"} & set(schema.names):
        type_ = schema.field(name).type
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        if type_ != _TYPES.get(name, pa.int32()):
            raise ValueError(f"{path} has {name} as {type_}: it was not written by jobs/extract.py")
    said = {**dataclasses.asdict(provenance), "table": found}
    for name, value in {**manifest, "table": table}.items():
        if name in said and said[name] != value:
            raise ValueError(
                f"{path} has {name} {said[name]}, but its folder is of {name} {value}; delete it and run "
                "jobs/extract.py again"
            )


def read_part(path: str, expected_sha256: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part with its page checksums verified, and the whole file against a SHA-256 if one is given.

    Raises:
        ValueError: the file is missing, damaged or no table of this software.
    """
    try:
        data = store.read_bytes(path, expected_sha256)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; run jobs/extract.py again with the same flags") from error
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
    try:
        for part in manifest["parts"]:
            if not store.is_plain_name(part["name"]):
                raise ValueError(f"{part['name']!r} cannot be a part of this folder")
            if not all(type(part[t]["rows"]) is int and type(part[t]["sha256"]) is str for t in _TABLES):
                raise ValueError(f"part {part['name']} has no rows and checksums")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or was edited ({error!r}); run jobs/extract.py again") from error
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
    part_of: dict[str, str] = {}
    wanted = None if columns is None else list(dict.fromkeys([*columns, "clip"]))
    for part in manifest["parts"]:
        path = store.join(folder, table, part["name"] + ".parquet")
        rows = read_part(path, part[table]["sha256"], wanted)
        if rows.num_rows != part[table]["rows"]:
            raise ValueError(f"{path} has {rows.num_rows} rows, its manifest says {part[table]['rows']}")
        check_part(rows.schema, table, manifest, path)
        if rows.column("clip").null_count:
            raise ValueError(f"{path} has rows without a clip: it was not written by jobs/extract.py")
        for clip in rows.column("clip").unique().to_pylist():
            if clip in part_of:
                raise ValueError(f"{path} has rows of clip {clip}, and so has part {part_of[clip]}; extract again")
            part_of[clip] = part["name"]
        yield rows if columns is None or "clip" in columns else rows.drop_columns(["clip"])


def iter_clips(
    folder: str,
    columns: Sequence[str] | None = None,
    kind: str = "posterior",
    *,
    edit: str | None = "",
    sample: int | None = 0,
) -> Iterator[ClipLatents]:
    """The clips of a folder one after the other, in the order of its parts; holds one part at a time.

    Checks what ``read_parts`` checks. A clip comes once, the unedited and deterministic one, unless told otherwise.

    Args:
        folder: finished folder of tables, local or s3://.
        columns: latents (``position``, which joins its two columns) or single columns (``position_y``) to load; None
            takes all. Frame numbers and errors always come; where nothing of ``objects/`` is wanted, only its first
            part is read.
        kind: one of ``KINDS``.
        edit: name of a what-if edit; empty takes clips as they are, None all: a clip then comes once per edit.
        sample: number of a drawn future; 0 takes the deterministic one, None all.

    Raises:
        ValueError: a part is damaged, a name does not exist, or the folder has no rows of this kind, edit and sample.
    """
    seen: set[tuple[str, str, int]] = set()
    fields: dict[Table, Fields] = {}
    part_of: dict[str, str] = {}
    manifest = read_manifest(folder)
    for part in manifest["parts"]:
        files: dict[Table, pq.ParquetFile] = {"frames": open_part(folder, "frames", part, manifest)}
        if not fields or fields["objects"]:
            files["objects"] = open_part(folder, "objects", part, manifest)
        fields = fields or _select({table: file.schema_arrow for table, file in files.items()}, columns)
        runs = [
            _iter_runs(file, part_path(folder, table, part), _wanted(table, fields[table]))
            for table, file in files.items()
            if table == "frames" or fields["objects"]
        ]
        for found in zip_longest(*runs):
            if len({run and run[0] for run in found}) > 1:
                raise ValueError(f"part {part['name']} of {folder} has other clips in objects/ than in frames/")
            key = found[0][0]
            seen.add((key.kind, key.edit, key.sample))
            _require_one_part(folder, key.clip, part["name"], part_of)
            if _is_wanted(key, kind, edit, sample):
                yield _join(key, *(rows for _, rows in found))
    _require_rows(folder, kind, edit, sample, seen)


def load_clips(
    folder: str,
    columns: Sequence[str] | None = None,
    kind: str = "posterior",
    *,
    edit: str | None = "",
    sample: int | None = 0,
) -> list[ClipLatents]:
    """All that ``iter_clips`` gives, in memory."""
    return list(iter_clips(folder, columns, kind, edit=edit, sample=sample))


def load_clip(
    folder: str,
    clip: str,
    columns: Sequence[str] | None = None,
    kind: str = "posterior",
    *,
    context: int | None = None,
    edit: str = "",
    sample: int = 0,
) -> ClipLatents:
    """One clip by its key. Reads ``frames/`` up to its part, and of ``objects/`` that part alone; checks what it reads.

    ``edit`` and ``sample`` choose among several futures: the unedited, deterministic one unless told otherwise.
    ``context`` is needed only where the clip was predicted with several. For many clips take ``ClipDataset``.

    Raises:
        ValueError: there is no such clip, or not of this kind, context, edit and sample; or as in ``iter_clips``.
    """
    first = last = None
    manifest = read_manifest(folder)
    for part in manifest["parts"]:
        frames = open_part(folder, "frames", part, manifest)
        places = _Places.of(frames.metadata)
        first, last = min(first or places.first[0], places.first[0]), max(last or places.last, places.last)
        # Most parts are passed by with a look at their footer.
        keys = _keys_of(frames, part_path(folder, "frames", part), clip)
        chosen = [
            key
            for key in keys
            if (key.kind, key.edit, key.sample) == (kind, edit, sample) and context in (None, key.context)
        ]
        if len(chosen) == 1:
            objects = open_part(folder, "objects", part, manifest)
            files: dict[Table, pq.ParquetFile] = {"frames": frames, "objects": objects}
            fields = _select({table: file.schema_arrow for table, file in files.items()}, columns)
            rows = [
                _rows_of(file, part_path(folder, table, part), _wanted(table, fields[table]), chosen[0])
                for table, file in files.items()
                if table == "frames" or fields["objects"]
            ]
            return _join(chosen[0], *rows)
        if keys:
            some = keys if len(keys) <= 8 else [key for key in keys if key.kind == kind][:8] or keys[:8]
            has = "; ".join(", ".join(f"{n} {v!r}" for n, v in key._asdict().items() if n != "clip") for key in some)
            has += f"; and {len(keys) - len(some)} more" if len(some) < len(keys) else ""
            raise ValueError(f"clip {clip} has {len(chosen)} runs of frames that fit, wanted one; it has {has}")
    raise ValueError(f"{folder} has no clip {clip!r}; its clips lie between {first!r} and {last!r}")


class ClipDataset:
    """The clips of a folder by number, in any order: a map-style dataset for torch's DataLoader, without torch.

    Reading one clip decodes the row group that holds it (about 30,000 rows), and keeps decoded groups while they fit
    into ``cache_gb``. The SHA-256 of a part is checked when it is first touched, page checksums at every read. Safe in
    threads and in processes that were forked or that unpickled it; each process has its own cache.

    Args:
        folder, columns, kind, edit, sample: as in ``iter_clips``.
        cache_gb: memory for decoded rows, in GB per process; the least recently used go first.

    Raises:
        ValueError: as ``iter_clips``; here also from ``dataset[number]``.
    """

    def __init__(
        self,
        folder: str,
        columns: Sequence[str] | None = None,
        kind: str = "posterior",
        *,
        edit: str | None = "",
        sample: int | None = 0,
        cache_gb: float = 1.0,
    ) -> None:
        self.folder = folder
        self.cache_gb = cache_gb
        self.keys: list[ClipKey] = []
        """What ``dataset[number]`` gives, in the order of the parts."""
        self.lengths: list[int] = []
        """Its number of frames."""
        self.manifest = read_manifest(folder)
        self.parts: list[dict[str, Any]] = self.manifest["parts"]
        self.part_of: list[int] = []
        """The index in ``parts`` of the part that holds it."""
        self.fields: dict[Table, Fields] = {}
        """The latents that it has."""
        self.provenance: Provenance
        """Model, dataset and what else all parts have in common."""
        self._places: dict[tuple[Table, int], _Places] = {}
        self._cache: dict[tuple[Table, int, int], _Runs] = {}
        seen: set[tuple[str, str, int]] = set()
        part_of: dict[str, str] = {}
        for number, part in enumerate(self.parts):
            frames = self.open_part("frames", number)
            if not self.fields:
                objects = self.open_part("objects", number)
                self.fields = _select({"objects": objects.schema_arrow, "frames": frames.schema_arrow}, columns)
                self.provenance = provenance_of(frames.schema_arrow)[1]
            self._places["frames", number] = _Places.of(frames.metadata)
            for key, rows in _iter_runs(frames, part_path(folder, "frames", part), {"frame": ("frame",)}):
                seen.add((key.kind, key.edit, key.sample))
                _require_one_part(folder, key.clip, part["name"], part_of)
                if _is_wanted(key, kind, edit, sample):
                    self.keys.append(key)
                    self.lengths.append(len(rows["frame"]))
                    self.part_of.append(number)
        _require_rows(folder, kind, edit, sample, seen)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> ClipLatents:
        key, part = self.keys[number], self.part_of[number]
        frames = self._rows("frames", part, key)
        return _join(key, frames, self._rows("objects", part, key)) if self.fields["objects"] else _join(key, frames)

    def __iter__(self) -> Iterator[ClipLatents]:
        return map(self.__getitem__, range(len(self)))

    def open_part(self, table: Table, number: int) -> pq.ParquetFile:
        """Read a part and check it, as ``tables.open_part`` does."""
        return open_part(self.folder, table, self.parts[number], self.manifest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def _rows(self, table: Table, number: int, key: ClipKey) -> dict[str, np.ndarray]:
        path = part_path(self.folder, table, self.parts[number])
        places = self._places.get((table, number))
        if places is None:
            places = _Places.of(self.open_part(table, number).metadata)
            self._places[table, number] = places
        group = places.group_of(key.clip)
        if group is None:
            raise ValueError(f"{path} has no rows of clip {key.clip}, although its other table has")
        # Popped and put back behind all others, so that the least recently used is first. No lock, because a fork
        # could copy it locked: each step on the dict is atomic, and two threads at worst read the same rows twice.
        runs = self._cache.pop((table, number, group), None)
        fresh = runs is None
        if runs is None:
            fields = _wanted(table, self.fields[table])
            with store.open_read(path) as source:
                file = _parquet_file(source, path, places.metadata)
                # One thread: DataLoader's workers are the parallelism, and a forked process has no pool of threads.
                runs = _to_runs(read_group(file, group, fields, path, use_threads=False), fields)
        self._cache[table, number, group] = runs
        if fresh:
            self._forget()
        return runs.of(key)

    def _forget(self) -> None:
        held = list(self._cache.items())
        size = sum(runs.size for _, runs in held)
        for place, runs in held[:-1]:
            if size <= self.cache_gb * 1e9:
                return
            self._cache.pop(place, None)
            size -= runs.size


def part_path(folder: str, table: Table, part: Mapping[str, Any]) -> str:
    """The Parquet file of a part, which is an entry of the manifest."""
    return store.join(folder, table, part["name"] + ".parquet")


def open_part(folder: str, table: Table, part: Mapping[str, Any], manifest: Mapping[str, Any]) -> pq.ParquetFile:
    """Read a part into memory and check SHA-256, origin and number of rows; ``read_group`` decodes its row groups.

    Raises:
        ValueError: it is missing or damaged, or not what the folder's manifest says.
    """
    path = part_path(folder, table, part)
    try:
        data = store.read_bytes(path, part[table]["sha256"])
    except FileNotFoundError as error:
        message = f"{path} is missing, though the manifest lists it; run jobs/extract.py again with the same flags"
        raise ValueError(message) from error
    file = _parquet_file(pa.BufferReader(data), path)
    check_part(file.schema_arrow, table, manifest, path)
    if missing := set(OBJECT_KEY if table == "objects" else FRAME_KEY) - set(file.schema_arrow.names):
        raise ValueError(f"{path} has no column {min(missing)}: it was not written by jobs/extract.py")
    if file.metadata.num_rows != part[table]["rows"]:
        raise ValueError(f"{path} has {file.metadata.num_rows} rows, its manifest says {part[table]['rows']}")
    return file


def read_group(file: pq.ParquetFile, group: int, fields: Fields, path: str, *, use_threads: bool = True) -> pa.Table:
    """Decode the key and the columns of ``fields`` of one row group, which holds whole clips; checks its pages."""
    columns = dict.fromkeys([*ClipKey._fields, *(column for names in fields.values() for column in names)])
    with _naming_damage(path):
        return file.read_row_group(group, list(columns), use_threads=use_threads)


class _Places(NamedTuple):
    """Which clips the row groups of a part hold, from its footer."""

    metadata: pq.FileMetaData
    first: list[str]
    """First clip of each group; groups are sorted and hold whole clips."""
    last: str
    """Last clip of the last group."""

    @classmethod
    def of(cls, metadata: pq.FileMetaData) -> "_Places":
        column = metadata.schema.names.index("clip")
        statistics = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
        if not statistics or any(group is None or not group.has_min_max for group in statistics):
            raise ValueError("a part of these tables says nothing of its clips: it was not written by jobs/extract.py")
        return cls(metadata, [group.min for group in statistics], statistics[-1].max)

    def group_of(self, clip: str) -> int | None:
        """The only group that can hold a clip."""
        return bisect_right(self.first, clip) - 1 if self.first[0] <= clip <= self.last else None


class _Runs(NamedTuple):
    """Dense arrays of many rows."""

    rows: dict[ClipKey, slice]
    """Which rows are a key's."""
    arrays: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        """Bytes of the arrays."""
        return sum(values.nbytes for values in self.arrays.values())

    def of(self, key: ClipKey) -> dict[str, np.ndarray]:
        """The arrays of one key."""
        if key not in self.rows:
            raise ValueError(f"clip {key.clip} has {key.kind} rows in one table and not in the other")
        return {name: values[self.rows[key]] for name, values in self.arrays.items()}


def _parquet_file(source: Any, path: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    with _naming_damage(path):
        return pq.ParquetFile(
            source,
            metadata=metadata,
            read_dictionary=["clip", "kind", "edit"],
            page_checksum_verification=True,
        )


@contextlib.contextmanager
def _naming_damage(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:  # the last: a column that is not there
        reason = " ".join(str(error).split())
        message = f"{path} cannot be read ({reason}); if it is damaged, delete it and run jobs/extract.py again"
        raise ValueError(message) from error


def _require_one_part(folder: str, clip: str, part: str, part_of: dict[str, str]) -> None:
    if part_of.setdefault(clip, part) != part:
        raise ValueError(f"{folder} has rows of clip {clip} in part {part_of[clip]} and in {part}; extract again")


def _is_wanted(key: ClipKey, kind: str, edit: str | None, sample: int | None) -> bool:
    return key.kind == kind and edit in (None, key.edit) and sample in (None, key.sample)


def _require_rows(
    folder: str, kind: str, edit: str | None, sample: int | None, seen: set[tuple[str, str, int]]
) -> None:
    """Refuse a choice that no clip has, given what there is: kind, edit and sample."""
    if kind not in {each for each, _, _ in seen}:
        raise _no_such_kind(folder, kind, {each for each, _, _ in seen})
    there = sorted((e, s) for each, e, s in seen if each == kind)
    if not any(edit in (None, e) and sample in (None, s) for e, s in there):
        edits, samples = sorted({e for e, _ in there}), sorted({s for _, s in there})
        shown = ", ".join(map(repr, edits[:8])) + (f" and {len(edits) - 8} more" if len(edits) > 8 else "")
        raise ValueError(
            f"{folder} has no {kind} rows of edit {edit!r} and sample {sample!r}; it has edits {shown} ('' is the clip "
            f"as it is) and samples {samples[0]} to {samples[-1]}"
        )


def _no_such_kind(folder: str, kind: str, kinds: set[str]) -> ValueError:
    remedies = {
        "predicted": "; jobs/extract.py predicts with --context and --horizon",
        "interpolated": "; jobs/extract.py interpolates with --context and --closing",
    }
    only = ", ".join(sorted(kinds))
    return ValueError(f"{folder} has no rows of kind {kind!r}, only of {only}{remedies.get(kind, '')}")


def _fields(names: Sequence[str]) -> Fields:
    """The latents (and errors) that columns hold."""
    joined = {}
    for name, size in COMPONENTS:
        columns = [f"{name}_{component}" for component in COMPONENTS[name, size]]
        if set(columns) <= set(names):
            joined |= dict.fromkeys(columns, name)
    fields: Fields = {}
    for column in names:
        if column not in _IDS:
            name = joined.get(column, column)
            fields[name] = (*fields.get(name, ()), column)
    return fields


def _select(schemas: Mapping[Table, pa.Schema], columns: Sequence[str] | None) -> dict[Table, Fields]:
    known: dict[Table, Fields] = {table: _fields(schemas[table].names) for table in _TABLES}
    if columns is None:
        return known
    chosen: dict[Table, Fields] = {table: {} for table in known}
    for name in columns:
        for table, fields in known.items():
            if name in fields:
                chosen[table][name] = fields[name]
                break
            if any(name in held for held in fields.values()):
                chosen[table][name] = (name,)
                break
        else:
            have = "; ".join(
                f"{table}/ has "
                + ", ".join(n if held == (n,) else f"{n} ({', '.join(held)})" for n, held in fields.items())
                for table, fields in known.items()
            )
            raise ValueError(f"these tables have no column {name!r}: {have}")
    return chosen


def _wanted(table: Table, fields: Fields) -> Fields:
    """The latents and what a clip needs besides."""
    names = ("frame", "object") if table == "objects" else ("frame", "source_frame", *ERRORS)
    return {**{name: (name,) for name in names}, **fields}


def _keys_of(file: pq.ParquetFile, path: str, clip: str) -> list[ClipKey]:
    group = _Places.of(file.metadata).group_of(clip)
    return (
        []
        if group is None
        else [key for key in _to_runs(read_group(file, group, {}, path), {}).rows if key.clip == clip]
    )


def _rows_of(file: pq.ParquetFile, path: str, fields: Fields, key: ClipKey) -> dict[str, np.ndarray]:
    group = _Places.of(file.metadata).group_of(key.clip)
    if group is None:
        raise ValueError(f"{path} has no rows of clip {key.clip}, although its other table has")
    return _to_runs(read_group(file, group, fields, path), fields).of(key)


def _iter_runs(file: pq.ParquetFile, path: str, fields: Fields) -> Iterator[tuple[ClipKey, dict[str, np.ndarray]]]:
    for group in range(file.num_row_groups):
        runs = _to_runs(read_group(file, group, fields, path), fields)
        for key in runs.rows:
            yield key, runs.of(key)


def _to_runs(rows: pa.Table, fields: Fields) -> _Runs:
    rows = rows.unify_dictionaries()
    if not rows.num_rows or any(rows.column(name).null_count for name in ClipKey._fields):
        raise ValueError("rows without a key, or no rows: these tables were not written by jobs/extract.py")
    begins = np.zeros(rows.num_rows, bool)
    begins[0] = True
    for name in ClipKey._fields:
        codes: Any = rows.column(name).combine_chunks()
        numbers = (codes.indices if pa.types.is_dictionary(codes.type) else codes).to_numpy()
        begins[1:] |= numbers[1:] != numbers[:-1]
    first = np.flatnonzero(begins)
    key_rows = rows.select(ClipKey._fields).take(pa.array(first))
    keys = map(ClipKey._make, zip(*(column.to_pylist() for column in key_rows.columns), strict=True))
    places = dict(zip(keys, map(slice, first, [*first[1:], rows.num_rows]), strict=True))
    if len(places) != len(first):
        raise ValueError("the rows of a clip do not lie side by side: these tables were not written by jobs/extract.py")
    arrays = {}
    shapes = shapes_of(rows.schema)
    for name, columns in fields.items():
        values = [_to_numpy(rows.column(column), shapes.get(column)) for column in columns]
        arrays[name] = values[0] if len(values) == 1 else np.stack(values, axis=-1)
    return _Runs(places, arrays)


def _to_numpy(column: pa.ChunkedArray, shape: tuple[int, ...] | None) -> np.ndarray:
    values: Any = column.combine_chunks()
    if pa.types.is_fixed_size_list(values.type):
        return values.flatten().to_numpy().reshape(len(values), *(shape or (-1,)))
    return values.to_numpy(zero_copy_only=False)  # null becomes NaN


def _join(
    key: ClipKey, frames: Mapping[str, np.ndarray], objects: Mapping[str, np.ndarray] | None = None
) -> ClipLatents:
    """Cut the rows of ``objects/`` into (t, k); copies, so that a clip does not hold the memory of all others."""
    t = len(frames["frame"])
    dense: dict[str, np.ndarray] = {}
    if objects is not None:
        k, left = divmod(len(objects["frame"]), t)
        if (
            left
            or np.any(objects["frame"].reshape(t, k) != frames["frame"][:, None])
            or np.any(objects["object"].reshape(t, k) != np.arange(k))
        ):
            raise ValueError(f"clip {key.clip} has other {key.kind} frames in objects/ than in frames/")
        names = [name for name in objects if name not in _IDS]
        dense = {name: objects[name].reshape(t, k, *objects[name].shape[1:]).copy() for name in names}
    whole = {name: values.copy() for name, values in frames.items()}
    return ClipLatents(
        *key,
        frame=whole.pop("frame"),
        source_frame=whole.pop("source_frame"),
        recon_mse=whole.pop("recon_mse"),
        predict_mse=whole.pop("predict_mse"),
        objects=dense,
        frames=whole,
    )


def _columns(name: str, shape: tuple[int, ...], element: pa.DataType) -> list[tuple[str, pa.DataType]]:
    if shape == ():
        return [(name, element)]
    size = math.prod(shape)
    if size == 0:
        raise ValueError(f"latents field {name} has an empty shape {shape}: it has nothing to store")
    if len(shape) == 1 and (name, size) in COMPONENTS:
        return [(f"{name}_{component}", element) for component in COMPONENTS[name, size]]
    return [(name, pa.list_(pa.field("element", element), size))]


def _arrays(name: str, shape: tuple[int, ...], rows: np.ndarray) -> dict[str, pa.Array]:
    columns = _columns(name, shape, pa.from_numpy_dtype(rows.dtype))
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


def _storage(column: pa.Field) -> Any:
    return column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type


def _is_list(column: pa.Field) -> bool:
    return pa.types.is_fixed_size_list(_storage(column))


def _element_type(column: pa.Field) -> pa.DataType:
    return _storage(column).value_type if _is_list(column) else column.type


def _list_shape(column: pa.Field) -> list[int]:
    return [_storage(column).list_size] if _is_list(column) else []


def _width(type_: pa.DataType) -> int:
    """Bytes of a value; of a string about those of its number in a dictionary."""
    return type_.bit_width // 8 if pa.types.is_primitive(type_) else 4


def _parquet_path(column: pa.Field) -> str:
    return f"{column.name}.list.element" if _is_list(column) else column.name


def _row_groups(rows: pa.Table) -> Iterator[tuple[int, int]]:
    """Ranges of whole clips with about ``group_rows`` rows each, so that one clip is read from one group."""
    most = group_rows(rows.schema)
    clips = rows.column("clip").combine_chunks().to_numpy(zero_copy_only=False)
    ends = [*(np.flatnonzero(clips[1:] != clips[:-1]) + 1).tolist(), len(clips)]
    first = previous = 0
    for end in ends:
        if end - first > most and previous > first:
            yield first, previous
            first = previous
        previous = end
    yield first, len(clips)
