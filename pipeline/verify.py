"""Read a dataset, run, sweep, checkpoint, tables or evaluation again from end to end, and say what is wrong where.

    damaged    it is not what was recorded of it, or it contradicts itself
    missing    it is recorded, and not there
    extra      nothing records it, and whoever reads by listing (``*.tar``, ``*.parquet``) would take it for data
    leftover   of a job that was killed, or that is writing it now

Bytes are compared with what was recorded when they were written (manifest, ``COMPLETE``, records of parts). Then the
content is compared with itself: clips with the index, rows with the settings, weights with the config. So what was
edited and sealed again is found too, wherever the content contradicts it. pipeline/README.md says what a folder holds.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import mmap
import operator
import os
import re
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import IO, Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from objdyn.clips import CODECS, Clip, from_sample, to_sample
from objdyn.families import FAMILIES
from pipeline import checkpoint, claim, loop, reader, status, stop, store, tables
from pipeline.config import VerifyRun
from pipeline.shard import INDEX_SCHEMA, OWNER, QUARANTINE_SCHEMA
from pipeline.status import as_bytes

Kind = Literal["damaged", "missing", "extra", "leftover"]
DEPTH = 2
"""How far below PATH, and below the trials of a sweep, folders are looked for."""
SHOWN = 5
"""Most names that a note lists."""

REMAKE = "restore it from a copy, or run jobs/make_shards.py again with the same flags: it mends what is damaged"
ANEW = "restore it from a copy, or make the dataset again in an empty folder"
DELETE = "delete it and "
REPEAT = DELETE + "run jobs/extract.py again with the same flags: it keeps the parts that are done"
RESTORE = "restore it from a copy; until then jobs can be given the folder of an older checkpoint"
REMEASURE = "run jobs/evaluate.py again"
GO_ON = "run jobs/sweep.py again with the same flags and --resume: it writes what its storage knows"
UNNAMED = "nothing names it: verify.py --clean removes it"
FOREIGN = "nothing names it, and it is not named as this software does: move it elsewhere"
KILLED = "of a job that was killed or is writing it now: verify.py --clean removes it once it is old"

_SHARD = re.compile(r"shard-\d{5,}")
_STEP = re.compile(r"step-(\d{8,})")
_LONGEST = 1000  # letters of a finding: what it quotes may come from a stranger's file
_PROBE = re.compile(r"\.objdyn-probe-[0-9a-f]{32}(-\w+)?")  # of cluster.require_shared and store.supports_create
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TABLES: tuple[tables.Table, ...] = ("objects", "frames")
_CHECKPOINT = ("model.safetensors", "optimizer.safetensors", "state.json")
_FILES: dict[str, set[str]] = {
    "split": {"manifest.json", "index.parquet", "quarantine.parquet"},
    "run": {"config.json", "metrics.jsonl", "last.json", "report.html", "metrics.json", stop.FILE},
    "sweep": {"sweep.json", "sweep.parquet", "best.json", "report.html", "study.db", "study.db-journal", ".lock"},
    "checkpoint": {"COMPLETE", *_CHECKPOINT},
    "tables": {"settings.json", "manifest.json", "what-if.mp4", "what-if.gif", "what-if.png"},
    "evaluation": {"metrics.json", "report.html"},
}
_FOLDERS: dict[str, set[str]] = {
    "run": {"checkpoints", "tensorboard", ".ray"},
    "sweep": {"artifacts", ".ray"},
    "tables": {*_TABLES, "parts"},
}

R = TypeVar("R")
T = TypeVar("T")


class FaultError(ValueError):
    """What is wrong with a file: what was found, what was recorded, what to do."""

    def __init__(self, text: str, kind: Kind = "damaged") -> None:
        super().__init__(text)
        self.kind: Kind = kind


class Finding(NamedTuple):
    """A fault, and where it is."""

    kind: Kind
    path: str
    """Relative to its folder."""
    text: str
    removable: bool = False
    """Whether ``clean`` may remove it: this software gives such names, and nothing that says what counts names it."""


@dataclass
class Folder:
    """A folder of a known kind, and what was found in it."""

    path: str
    kind: str
    entries: dict[str, store.Entry]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is odd and not wrong."""

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Turn a fault of one file into a finding."""
        try:
            yield
        except FaultError as fault:
            self.find(fault.kind, path, str(fault))

    def find(self, kind: Kind, path: str, text: str, removable: bool = False) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, path, text, removable))

    def at(self, *names: str) -> str:
        """Path of something in this folder."""
        return store.join(self.path, *names)


class Part(NamedTuple):
    """What was read of one part of the tables."""

    clips: list[str]
    schemas: dict[str, list[tuple[str, pa.DataType]]]
    """Columns of each table."""
    findings: list[Finding]


@store.job
def verify(run: VerifyRun) -> str:
    """Verify all that a folder holds and print what is wrong; with ``clean`` remove what nothing names.

    Returns:
        One line that says what was read.

    Raises:
        ValueError: something is wrong (it has been printed, a line each), or there is nothing to verify.
    """
    begin = time.monotonic()
    root = store.resolve(run.path, "PATH")
    folders = find_folders(root)
    inside = {above for folder in folders for above in _ancestors(folder.path)}
    counts: Counter[str] = Counter()
    summaries = []
    with _Work() as work:
        for folder in folders:
            summaries.append(_VERIFIERS[folder.kind](folder, work))
            known = _FILES[folder.kind] | _FOLDERS.get(folder.kind, set())
            _note_others(folder, "", [n for n in folder.entries if n not in known and folder.at(n) not in inside])
            counts += _report(folder, root, run)
    counts += _report_uploads(root, run)
    if root not in {folder.path for folder in folders}:
        _say("note", _foreign([name for name in store.list_names(root) if store.join(root, name) not in inside]))
    if total := sum(counts.values()):
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        raise ValueError(f"{total} finding{'s' * (total > 1)} in {root} ({kinds}); the lines above say what to do")
    return f"ok: {'; '.join(summaries)}; read in {time.monotonic() - begin:.1f} s"


def find_folders(path: str) -> list[Folder]:
    """Find what can be verified: the folder itself, and what is one or two levels below it.

    Raises:
        ValueError: there is nothing; the message says what to give.
    """
    if path.startswith("sim:"):
        raise ValueError(f"{path} is a simulator and has no files; give the --out of a job")
    if store.is_file(path):
        raise ValueError(f"{path} is a file; give the folder that it belongs to")
    found = list(_search(path, DEPTH, given=True))
    if not found:
        what = "holds no dataset, run, sweep, checkpoint, tables or evaluation, nor do the folders up to two levels in"
        raise ValueError(f"{path} {what if store.exists(path) else 'does not exist'}; give the --out of a job")
    return found


def verify_shard(
    path: str, listed: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None, shape: tuple[int, ...]
) -> None:
    """Compare a shard with its entry in the manifest and its rows of the index, and decode every clip.

    Args:
        path: of the tar.
        listed: its ``bytes``, ``sha256`` and ``samples``.
        rows: of the index; None where the index cannot be used.
        shape: frames, height, width and channels of every clip.

    Raises:
        FaultError: they differ.
    """
    with _mapped(path) as data:
        if len(data) != listed["bytes"]:
            lost = _wrong_clips(data, rows or (), shape)
            raise FaultError(f"{len(data)} bytes, {listed['bytes']} recorded{lost}; {REMAKE}")
        if (digest := hashlib.sha256(data).hexdigest()) != listed["sha256"]:
            lost = _wrong_clips(data, rows or (), shape)
            raise FaultError(f"SHA-256 {digest[:16]}..., {listed['sha256'][:16]}... recorded{lost}; {REMAKE}")
        members = _members(data)
        rows = _by_key(members) if rows is None else rows
        places = [(f"{row['key']}.{m['name']}", m["offset"], m["size"]) for row in rows for m in row["members"]]
        if members != places:
            tar, index = next(pair for pair in itertools.zip_longest(members, places) if pair[0] != pair[1])
            raise FaultError(f"the tar holds {_place(tar)} where the index says {_place(index)}; {REMAKE}")
        if len(rows) != listed["samples"]:
            raise FaultError(f"{len(rows)} clips, {listed['samples']} recorded; {REMAKE}")
        if wrong := _wrong_clips(data, rows, shape):
            raise FaultError(f"bytes as recorded{wrong}; {REMAKE}")


def verify_checkpoint(path: str) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Read the files that ``COMPLETE`` lists and rebuild the model; return the state, and what is wrong."""
    try:
        complete = _sealed(store.join(path, "COMPLETE"), RESTORE)
        if set(complete) != set(_CHECKPOINT):
            raise FaultError(f"lists {', '.join(complete)} instead of {', '.join(_CHECKPOINT)}; {RESTORE}")
        for entry in complete.values():
            _check_entry(entry)
    except FaultError as fault:
        return None, [Finding(fault.kind, "COMPLETE", str(fault))]
    state: dict[str, Any] | None = None
    findings: list[Finding] = []
    moments: list[str] = []
    for name, entry in complete.items():
        try:
            data = _recorded(store.join(path, name), entry, RESTORE)
            if name == "state.json":
                state = _parse_state(data, path)
            elif name == "model.safetensors":
                _finite_tensors(data)
            else:
                moments = _finite_tensors(data)
        except FaultError as fault:
            findings.append(Finding(fault.kind, name, str(fault)))
    if findings or state is None:
        return state, findings
    try:
        parameters = len(list(checkpoint.load_model(path).model.parameters()))
    except Exception as error:  # of any type: code is given what it did not write
        return state, [Finding("damaged", "model.safetensors", f"{_one_line(error)}; {RESTORE}")]
    held = sum(group["params"] for group in state["optimizer"]["groups"])
    if held != parameters or {name.partition("/")[0] for name in moments} - set(map(str, range(parameters))):
        text = f"is the optimiser of {held} parameters, and the model has {parameters}; {RESTORE}"
        return state, [Finding("damaged", "optimizer.safetensors", text)]
    return state, []


def verify_part(folder: str, record: Mapping[str, Any], settings: Mapping[str, Any]) -> Part:
    """Read both tables of a part; compare them with its record, with the settings and with each other."""
    rows: dict[str, pa.Table] = {}
    findings = []
    for table in _TABLES:
        try:
            rows[table] = verify_table(folder, table, record, settings)
        except FaultError as fault:
            findings.append(Finding(fault.kind, f"{table}/{record['name']}.parquet", str(fault)))
    if not findings:
        try:
            _check_objects(rows["objects"], rows["frames"])
            _check_counts(rows, record)
            _check_futures(rows["frames"], settings, record)
        except FaultError as fault:
            findings.append(Finding(fault.kind, f"objects/{record['name']}.parquet", str(fault)))
    clips = rows["frames"]["clip"].unique().to_pylist() if "frames" in rows else []
    schemas = {table: list(zip(r.schema.names, r.schema.types, strict=True)) for table, r in rows.items()}
    return Part(clips, schemas, findings)


def verify_table(folder: str, table: tables.Table, record: Mapping[str, Any], settings: Mapping[str, Any]) -> pa.Table:
    """Read one table of a part with its page checksums; compare it with the part's record and the settings.

    Raises:
        FaultError: they differ, or its keys are not sorted or come twice.
    """
    data = _recorded(store.join(folder, table, f"{record['name']}.parquet"), record[table], REPEAT)
    rows = _read_rows(data, table, settings)
    if rows.num_rows != record[table]["rows"]:
        raise FaultError(f"{rows.num_rows} rows, {record[table]['rows']} recorded; {REPEAT}")
    _check_keys(rows, table)
    if table == "frames":
        _check_frames(rows, settings)
    return rows


# Which folders there are


def _search(path: str, depth: int, given: bool = False) -> Iterator[Folder]:
    entries = store.list_folder(path)
    kind = _kind_of(path, entries, given)
    if kind:
        yield Folder(path, kind, entries)
    for name, entry in entries.items():
        if entry.is_folder and depth and not name.startswith(".") and name not in _FOLDERS.get(kind, ()):
            yield from _search(store.join(path, name), DEPTH if kind == "sweep" else depth - 1)


def _kind_of(path: str, entries: Mapping[str, store.Entry], given: bool) -> str:
    """Tell by names what a folder is; empty if it is nothing of ours.

    Any name speaks for a folder that was ``given``, since what is missing there is to be found. Of other folders a
    file must show that it is ours: other software uses such names, too.
    """
    files = {name for name, entry in entries.items() if not entry.is_folder}
    folders = set(entries) - files
    tars = sorted(filter(_is_shard, files))

    def ours(name: str, mark: bytes = f'"{store.SEAL}"'.encode()) -> bool:
        if name not in files or given:
            return name in files
        with contextlib.suppress(FaultError), _access(""), store.open_read(store.join(path, name)) as file:
            return mark in file.read(1 << 20)
        return False

    held = files & _FILES["checkpoint"]
    if len(held) > 1 or (held and (given or _step(path) is not None)):
        return "checkpoint"
    if (given and len(folders & _FOLDERS["tables"]) > 1) or ours("settings.json"):
        return "tables"
    if ours("config.json") or ours("last.json") or ({"checkpoints", "metrics.jsonl"} & set(entries) and given):
        return "run"
    if ours("manifest.json"):
        return "tables" if b'"kind": "tables"' in _bytes(store.join(path, "manifest.json"), "") else "split"
    if files & {"index.parquet", "quarantine.parquet"} or any(ours(name, OWNER.encode()) for name in tars[:1]):
        return "split"
    begun = "trials" in folders and any(name == ".lock" or claim.is_claim(name) for name in files)
    if ours("sweep.json") or (given and ("study.db" in files or begun)):
        return "sweep"
    return "evaluation" if ours("metrics.json") else ""


def _ancestors(path: str) -> Iterator[str]:
    """A path and everything above it that a search from PATH can have passed, through a sweep if there is one."""
    for _ in range(2 * DEPTH + 2):
        yield path
        path = path.rpartition("/")[0]


# Datasets


def _verify_split(folder: Folder, work: "_Work") -> str:
    _find_temporaries(folder, "", folder.entries)
    tars = [name for name, entry in folder.entries.items() if name.endswith(".tar") and not entry.is_folder]
    try:
        unfinished = f"unfinished, {len(tars)} shards are there; run jobs/make_shards.py again with the same flags"
        data = _bytes(folder.at("manifest.json"), unfinished)
        manifest = _parse(data, folder.at("manifest.json"), ANEW)
        _check_manifest(manifest, folder.path.rpartition("/")[2])
    except FaultError as fault:
        # Nothing says now what belongs here, so no shard is extra: a job may be writing them.
        folder.find(fault.kind, "manifest.json", str(fault))
        return ""
    shards: list[dict[str, Any]] = manifest["shards"]
    shape = tuple(manifest[name] for name in ("frames", "height", "width", "channels"))
    groups: _Index | None = None
    with folder.reading("index.parquet"):
        groups = _read_index(folder, manifest)
    with folder.reading("quarantine.parquet"):
        _check_quarantine(folder, manifest, groups)

    def check(number: int) -> FaultError | None:
        rows = None if groups is None else groups[number].to_pylist()
        try:
            verify_shard(folder.at(shards[number]["name"]), shards[number], rows, shape)
        except FaultError as fault:
            return fault
        return None

    for listed, fault in zip(shards, work.map("shards", check, range(len(shards))), strict=True):
        if fault is not None:
            folder.find(fault.kind, listed["name"], str(fault))
    for name in sorted(set(tars) - {listed["name"] for listed in shards}):
        text = f"{folder.entries[name].size} bytes; {UNNAMED if _is_shard(name) else FOREIGN}"
        folder.find("extra", name, text, removable=_is_shard(name))
    size = as_bytes(sum(listed["bytes"] for listed in shards))
    identity = hashlib.sha256(data).hexdigest()[:12]
    return f"dataset {identity} {manifest['split']}: {len(shards)} shards, {manifest['clips']} clips, {size}"


def _check_manifest(fields: Mapping[str, Any], folder: str) -> None:
    """Compare the fields of a manifest with each other, and its split with the folder's name.

    Raises:
        FaultError: they contradict each other.
    """
    try:
        shards, preprocessing, balance = fields["shards"], fields["preprocessing"], fields["balance"]
        shape = [fields[axis] for axis in ("frames", "height", "width", "channels")]
        names = [entry["name"] for entry in shards]
        for entry in (*shards, fields["index"], fields["quarantine"]):
            _check_entry(entry)
        clips = sum(entry["samples"] for entry in shards)
        videos = balance["read"] + balance["quarantined"]
        said = [
            ("schema", (fields["schema"], fields["kind"]), (reader.SCHEMA, "dataset")),
            ("split and the folder's name", fields["split"], folder),
            ("shards and their names in order", names, sorted({n for n in names if _is_shard(n)}, key=_by_number)),
            ("clips of all shards and clips", clips, fields["clips"]),
            ("clips and balance.clips", fields["clips"], balance["clips"]),
            ("balance.videos and those read or quarantined", balance["videos"], videos),
            ("frames and preprocessing.frames", fields["frames"], preprocessing["frames"]),
            ("height and preprocessing.size", fields["height"], preprocessing["size"]),
            ("width and preprocessing.size", fields["width"], preprocessing["size"]),
            ("sizes and positive numbers", [n for n in shape if type(n) is int and n > 0], shape),
            ("codec and those known", fields["codec"] in CODECS, True),
            ("preprocessing and numbers", {type(preprocessing[n]) for n in ("start", "hop", "stride")}, {int}),
            ("preprocessing.hop and 1 or more", preprocessing["hop"], max(1, preprocessing["hop"])),
        ]  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FaultError(f"is not a dataset's manifest ({_one_line(error)}); {ANEW}") from error
    for what, one, other in said:
        if one != other:
            raise FaultError(f"{what} contradict each other ({_shorten(one)} and {_shorten(other)}); {ANEW}")


class _Index:
    """The rows of each shard, decoded when they are asked for: those of 10^7 clips would take 2 GB. Safe in threads."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file, self._lock = file, threading.Lock()

    def __getitem__(self, shard: int) -> pa.Table:
        with self._lock:
            return self._file.read_row_group(shard)

    def __iter__(self) -> Iterator[pa.Table]:
        return map(self.__getitem__, range(self._file.num_row_groups))


def _read_index(folder: Folder, manifest: Mapping[str, Any]) -> _Index:
    """Read the index, the rows of each shard apart.

    Raises:
        FaultError: it is not as recorded, or contradicts the manifest or itself.
    """
    shards, preprocessing = manifest["shards"], manifest["preprocessing"]
    file = _parquet(folder.at("index.parquet"), manifest["index"], INDEX_SCHEMA)
    if file.num_row_groups != len(shards):
        raise FaultError(f"{file.num_row_groups} row groups for {len(shards)} shards; {REMAKE}")
    groups, last, in_order = _Index(file), "", True
    for listed, rows in zip(shards, groups, strict=True):
        name = listed["name"]
        if rows.num_rows != listed["samples"]:
            raise FaultError(f"{rows.num_rows} clips of {name}, {listed['samples']} recorded; {REMAKE}")
        keys = [last, *rows["key"].to_pylist()]
        in_order, last = in_order and all(map(operator.lt, keys, keys[1:])), keys[-1]
        starts = rows["start_frame"].to_numpy() - preprocessing["start"]
        said = [
            ("shard", rows["shard"].unique().to_pylist(), [name]),
            ("frames", rows["frames"].unique().to_pylist(), [manifest["frames"]]),
            ("stride", rows["stride"].unique().to_pylist(), [preprocessing["stride"]]),
            ("(start_frame - start) modulo hop", np.unique(starts % preprocessing["hop"]).tolist(), [0]),
            ("start_frame before the first", starts[starts < 0].tolist(), []),
        ]
        for what, found, wanted in said:
            if found != wanted:
                raise FaultError(f"{what} of the clips of {name} is {_shorten(found)}, recorded {wanted}; {REMAKE}")
    if not in_order:  # else they are distinct
        _check_keys_once(shards, groups)
    blank = Clip("x", np.zeros((1, 1, 1, 3), np.uint8), 1.0, 0, 1, "x")
    member = next(iter(to_sample(blank, manifest["codec"])))
    found = [m["name"] for m in groups[0]["members"][0].as_py()]
    if member not in found:
        raise FaultError(f"clips have {', '.join(found)}, but the manifest's codec {manifest['codec']} writes {member}")
    return groups


def _check_keys_once(shards: Sequence[Mapping[str, Any]], groups: _Index) -> None:
    """Compare all keys with each other, which takes memory for every one.

    Raises:
        FaultError: a key comes twice.
    """
    keys: dict[str, str] = {}
    for listed, rows in zip(shards, groups, strict=True):
        for key in rows["key"].to_pylist():
            if key in keys:
                raise FaultError(
                    f"clip {key} is in {keys[key]} and again in {listed['name']}; a key comes once; {REMAKE}"
                )
            keys[key] = listed["name"]


def _check_quarantine(folder: Folder, manifest: Mapping[str, Any], groups: _Index | None) -> None:
    """Read the inputs that could not be used, and count sources in both tables again.

    Raises:
        FaultError: the file is not as recorded, or the counts are not the manifest's.
    """
    rows = _parquet(folder.at("quarantine.parquet"), manifest["quarantine"], QUARANTINE_SCHEMA).read()
    if rows.num_rows != manifest["quarantine"]["rows"]:
        raise FaultError(f"{rows.num_rows} rows, {manifest['quarantine']['rows']} recorded; {REMAKE}")
    unusable = set(rows["source"].to_pylist())
    found, wanted = {"quarantined": len(unusable)}, manifest["balance"]
    if groups is not None:
        found["read"] = len({name for group in groups for name in group["source"].unique().to_pylist()} - unusable)
    for name, number in found.items():
        if number != wanted[name]:
            raise FaultError(f"{number} sources are {name}, the manifest's balance says {wanted[name]}; {REMAKE}")


def _parquet(path: str, entry: Mapping[str, Any], schema: pa.Schema) -> pq.ParquetFile:
    data = _recorded(path, entry, REMAKE)
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise FaultError(f"is not a Parquet file ({_one_line(error)}); {REMAKE}") from error
    if not file.schema_arrow.equals(schema):
        raise FaultError(f"has other columns than {', '.join(schema.names)}; {REMAKE}")
    return file


def _members(data: bytes | mmap.mmap) -> list[tuple[str, int, int]]:
    """Name, offset and size of each member of a tar, which is read and never extracted."""
    try:
        with tarfile.open(fileobj=cast(IO[bytes], data if len(data) else io.BytesIO()), mode="r:") as tar:
            infos = tar.getmembers()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise FaultError(f"is not a tar ({_one_line(error)}); {REMAKE}") from error
    end = max((info.offset_data + -(-info.size // 512) * 512 for info in infos), default=0)
    rest = data[end:]
    if len(rest) < 1024 or rest.count(0) != len(rest):  # else it was cut, or a damaged header hides what follows
        raise FaultError(f"the tar has no end after its last member, at byte {end} of {len(data)}; {REMAKE}")
    if strange := [info.name for info in infos if not info.isreg()]:
        raise FaultError(f"the tar's member {strange[0]} is no file; {REMAKE}")
    return [(info.name, info.offset_data, info.size) for info in infos]


def _by_key(members: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Group the members of a tar as the index does."""
    rows: list[dict[str, Any]] = []
    for key, group in itertools.groupby(members, key=lambda member: member[0].partition(".")[0]):
        places = [{"name": name.partition(".")[2], "offset": offset, "size": size} for name, offset, size in group]
        rows.append({"key": key, "members": places})
    return rows


def _wrong_clips(data: bytes | mmap.mmap, rows: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> str:
    """Decode every clip where the index says it is; say how many are not as recorded, empty if all are."""
    view, wrong = memoryview(data), []
    for row in rows:
        try:
            members = {m["name"]: view[m["offset"] : m["offset"] + m["size"]] for m in row["members"]}
            clip = from_sample(row["key"], members)
        except Exception as error:  # of any type: these bytes may be known to be damaged
            wrong.append(_one_line(error))
            continue
        found = {name: getattr(clip, name) for name in ("source", "start_frame", "stride", "fps") if name in row}
        differ = [f"{name} {found[name]!r}, not {row[name]!r}" for name in found if found[name] != row[name]]
        if clip.frames.shape != shape:
            differ.append(f"frames {clip.frames.shape}, not {shape}")
        if differ:
            wrong.append(f"{clip.key} has {differ[0]}")
    return f"; {len(wrong)} of {len(rows)} clips are not as recorded, the first: {_shorten(wrong[0])}" if wrong else ""


def _place(member: tuple[str, int, int] | None) -> str:
    return "nothing" if member is None else f"{member[0]} ({member[2]} bytes at {member[1]})"


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[bytes | mmap.mmap]:
    """Map a file into memory; one of object storage by way of the local disk, so that memory does not hold it."""
    with contextlib.ExitStack() as stack:
        with _access(REMAKE):
            if store.is_url(path):
                copy = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="objdyn-")), "shard")
                store.fetch(path, copy)
                path = copy
            file = stack.enter_context(store.open_read(path))
            empty = os.fstat(file.fileno()).st_size == 0
            data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield data


# Runs and checkpoints


def _verify_run(folder: Folder, work: "_Work") -> str:
    _find_temporaries(folder, "", folder.entries)
    config: dict[str, Any] | None = None
    with folder.reading("config.json"):
        config = _sealed(folder.at("config.json"), "restore it from a copy; each state.json holds its settings, too")
    names, last, contents = _read_last(folder)
    complete = [name for name, entries in contents.items() if "COMPLETE" in entries]

    found = work.map(
        "checkpoints",
        lambda name: verify_checkpoint(folder.at("checkpoints", name)),
        complete,
        threads=False,  # one model in memory at a time
    )
    for name, (state, findings) in zip(complete, found, strict=True):
        if findings and _is_retired(folder, name):
            folder.notes.append(f"checkpoints/{name}: retired by its training while it was read")
            continue
        folder.findings += [finding._replace(path=f"checkpoints/{name}/{finding.path}") for finding in findings]
        if state is not None and config is not None and (differ := _difference(config, state)):
            text = f"is of a run with other settings than config.json: {differ}; move the checkpoint elsewhere"
            folder.find("damaged", f"checkpoints/{name}/state.json", text)
    for name in sorted(names - set(complete)):
        there = "has no COMPLETE" if name in contents else "is not there"
        others = ", ".join(other for other in complete if other not in names) or "none"
        text = f"last.json names it, but it {there}; restore it from a copy; other complete checkpoints: {others}"
        folder.find("damaged" if name in contents else "missing", f"checkpoints/{name}", text)
    # Without the run's own config these may be another program's checkpoints.
    sure = config is not None and (last or not (complete or "last.json" in folder.entries))
    for name, entries in contents.items():
        if name not in complete and name not in names:
            now = store.list_folder(folder.at("checkpoints", name))
            if "COMPLETE" in now or not now:
                folder.notes.append(f"checkpoints/{name}: written or retired by its training meanwhile")
                continue
            others = [file for file in now if file not in _FILES["checkpoint"] and not _is_temporary(file)]
            folder.find("leftover", f"checkpoints/{name}", f"has no COMPLETE, {KILLED}", removable=sure and not others)
            _note_others(folder, f"checkpoints/{name}/", others)
            continue
        _find_temporaries(folder, f"checkpoints/{name}/", entries)
        _note_others(folder, f"checkpoints/{name}/", set(entries) - _FILES["checkpoint"])
    if ".ray" in folder.entries:
        folder.find("leftover", ".ray", f"Ray's own storage, {KILLED}", removable=config is not None)
    if stop.FILE in folder.entries:
        text = "asks the run to end; the next --resume removes it, too"
        folder.find("leftover", stop.FILE, text, removable=config is not None)
    if complete or "metrics.jsonl" in folder.entries:
        with folder.reading("metrics.jsonl"):
            _read_metrics(folder)
    if "metrics.json" in folder.entries:
        with folder.reading("metrics.json"):
            _sealed(folder.at("metrics.json"), REMEASURE)
    if not contents:
        folder.notes.append("checkpoints: there is none yet")
    size = as_bytes(sum(entry.size for name in complete for entry in contents[name].values()))
    newest = f", the newest of step {max(filter(None, map(_step, complete)), default=0)}" if complete else ""
    return f"run {folder.path.rpartition('/')[2]}: {len(complete)} checkpoints{newest}, {size}"


def _read_last(folder: Folder) -> tuple[set[str], bool, dict[str, dict[str, store.Entry]]]:
    """List the checkpoints: names that last.json gives, whether it was read, and the content of each that is there.

    Looks again where the two do not fit, since the run may be training: it writes a checkpoint, then last.json.
    """
    names: set[str] = set()
    fault: FaultError | None = None
    steps: dict[str, store.Entry] = {}
    contents: dict[str, dict[str, store.Entry]] = {}
    for _ in range(2):
        names, fault = set(), None
        try:
            names = _names_in_last(_sealed(folder.at("last.json"), RESTORE))
        except FaultError as error:
            fault = error
        steps = store.list_folder(folder.at("checkpoints"))
        contents = {name: store.list_folder(folder.at("checkpoints", name)) for name in steps if _STEP.fullmatch(name)}
        if fault is None and all("COMPLETE" in contents.get(name, ()) for name in names):
            break
    complete = [name for name, entries in contents.items() if "COMPLETE" in entries]
    if fault is not None and (complete or fault.kind != "missing"):
        killed = "; a run that was killed before it wrote its first one goes on with --resume"
        text = f"{fault}{killed if fault.kind == 'missing' else ''}; complete are {_some(complete) or 'no checkpoints'}"
        folder.find(fault.kind, "last.json", text)
    _note_others(folder, "checkpoints/", [name for name in steps if name not in contents])
    return names, fault is None, contents


def _is_retired(folder: Folder, name: str) -> bool:
    """Whether a run that is training has removed a checkpoint since its folder was listed."""
    if store.exists(folder.at("checkpoints", name, "COMPLETE")):
        return False
    try:
        return name not in _names_in_last(_sealed(folder.at("last.json"), ""))
    except FaultError:
        return False


def _names_in_last(last: Mapping[str, Any]) -> set[str]:
    try:
        named = {which: last[which] for which in ("checkpoint", "best") if (which, last[which]) != ("best", None)}
        if last["step"] != _step(named["checkpoint"]) or last["step"] is None:
            raise ValueError(f"step {last['step']!r} of {named['checkpoint']!r}")
        names = [re.fullmatch(rf"checkpoints/({_STEP.pattern})", str(name)) for name in named.values()]
        return {match[1] for match in names if match is not None}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FaultError(f"does not say which checkpoint counts ({_one_line(error)}); {RESTORE}") from error


def _step(path: str) -> int | None:
    """The step in the name of a checkpoint's folder; None if it has another name."""
    match = _STEP.fullmatch(path.rpartition("/")[2])
    return int(match[1]) if match else None


def _parse_state(data: bytes, path: str) -> dict[str, Any]:
    try:
        state = store.loads(data)
        if state["schema"] != checkpoint.SCHEMA:
            raise ValueError(f"schema {state['schema']}, this version reads {checkpoint.SCHEMA}")
        if not isinstance(state["family"], str) or state["family"] not in FAMILIES:
            raise ValueError(f"family {state['family']!r}, this version knows {', '.join(FAMILIES)}")
        if not sum(group["params"] for group in state["optimizer"]["groups"]):
            raise ValueError("the optimiser has no parameters")
        step = state["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise FaultError(f"is no state of a run ({_one_line(error)}); {RESTORE}") from error
    if _step(path) not in (None, step):
        raise FaultError(
            f"is of step {step}, but the folder is called {path.rpartition('/')[2]}; give it its name back"
        )
    return state


def _finite_tensors(data: bytes) -> list[str]:
    """Read a safetensors file and return the tensors' names.

    Raises:
        FaultError: it does not parse, or holds numbers that are not finite.
    """
    import safetensors
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise FaultError(f"is not a safetensors file ({_one_line(error)}); {RESTORE}") from error
    if wrong := sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())):
        text = f"{len(wrong)} of {len(tensors)} tensors hold numbers that are not finite, the first {wrong[0]}"
        raise FaultError(f"{text}; start a new run with a lower optim.lr or with optim.clip_norm")
    return sorted(tensors)


def _difference(config: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Settings of a checkpoint that differ from the run's and may not; empty if none do, or if it is from before they
    were changed by force."""
    if any(entry["step"] >= state["step"] for entry in config.get("forced", ())):
        return ""
    stored = [{name: settings.get(name, {}) for name in ("family", "run")} for settings in (config, state)]
    differ = loop.settings_difference(*stored)
    return ", ".join(f"{name} is {after!r} and was {before!r}" for name, before, after in differ)


def _read_metrics(folder: Folder) -> None:
    """Parse every line of metrics.jsonl; a last line that is not finished is a note, as readers leave it out.

    Raises:
        FaultError: a line is not one of the loop's, or goes back in steps.
    """
    remedy = "restore it from a copy; nothing but reports needs it"
    whole, _, rest = _bytes(folder.at("metrics.jsonl"), remedy).rpartition(b"\n")
    if rest:
        folder.notes.append("metrics.jsonl: the last line is half-written, as a killed run leaves it; it is not read")
    before = 0
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            step = store.loads(line)["step"]
            if type(step) is not int:
                raise ValueError(f"step {step!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise FaultError(f"line {number} is no line of metrics ({_one_line(error)}); {remedy}") from error
        if step < before:
            raise FaultError(f"line {number} is of step {step} and comes after step {before}; {remedy}")
        before = step


def _verify_checkpoint(folder: Folder, work: "_Work") -> str:
    _find_temporaries(folder, "", folder.entries)
    if "COMPLETE" in folder.entries:
        folder.findings += verify_checkpoint(folder.path)[1]
    else:
        folder.find("missing", "COMPLETE", "the checkpoint was not finished; give another, or its run's folder")
    size = as_bytes(sum(entry.size for entry in folder.entries.values()))
    return f"checkpoint {folder.path.rpartition('/')[2]}, {size}"


# Tables


def _verify_tables(folder: Folder, work: "_Work") -> str:
    inside = {name: store.list_folder(folder.at(name)) for name in sorted(_FOLDERS["tables"])}
    _find_temporaries(folder, "", folder.entries)
    for name, entries in inside.items():
        _find_temporaries(folder, f"{name}/", entries)
    settings: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    with folder.reading("settings.json"):
        elsewhere = "restore it from a copy, or extract again into another folder"
        found = _sealed(folder.at("settings.json"), elsewhere)
        if (found.get("kind"), found.get("schema")) != ("tables", tables.SCHEMA_VERSION):
            raise FaultError(f"does not describe tables of schema {tables.SCHEMA_VERSION}; {elsewhere}")
        settings = found
    done = {name.removesuffix(".json") for name in inside["parts"] if _SHARD.fullmatch(name.removesuffix(".json"))}
    unfinished = f"unfinished: {len(done)} parts are done; run jobs/extract.py again with the same flags"
    try:
        found = _sealed(folder.at("manifest.json"), unfinished)
        _check_tables_manifest(found, settings)
        manifest, sure = found, True
    except FaultError as fault:
        folder.find(fault.kind, "manifest.json", str(fault))
        sure = fault.kind == "missing"
    records = _read_records(folder, sorted(done), manifest)
    # Without both, these may be the tables of somebody who copied the Parquet files alone.
    sure = sure and (manifest is not None or (settings is not None and bool(records)))
    named = done if manifest is None else {record["name"] for record in records}
    _find_other_parts(folder, inside, named, finished=manifest is not None, sure=sure)
    basis = settings or manifest
    if basis is None:
        return ""
    parts = work.map("parts", lambda r: verify_part(folder.path, r, basis), records)
    clips: dict[str, str] = {}
    for record, part in zip(records, parts, strict=True):
        name = record["name"]
        folder.findings += part.findings
        for table, columns in part.schemas.items():
            if columns != parts[0].schemas.get(table, columns):
                text = f"has other columns than the same table of {records[0]['name']}; {REPEAT}"
                folder.find("damaged", f"{table}/{name}.parquet", text)
        if twice := [clip for clip in part.clips if clip in clips]:
            text = f"{len(twice)} clips are in {clips[twice[0]]} too, the first {twice[0]}, and a clip is in one part"
            again = "delete the records of both and run jobs/extract.py again with the same flags"
            folder.find("damaged", f"parts/{name}.json", f"{text}; {again}")
        clips |= dict.fromkeys(part.clips, str(name))
    rows, size = (sum(record[table][what] for record in records for table in _TABLES) for what in ("rows", "bytes"))
    text = f"{len(records)} parts, {len(clips)} clips, {rows} rows, {as_bytes(size)}"
    return f"tables {folder.path.rpartition('/')[2]}: {text}"


def _check_tables_manifest(manifest: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    try:
        parts = manifest["parts"]
        for part in parts:
            _check_record(part)
        if len({part["name"] for part in parts}) != len(parts):
            raise ValueError("a part is listed twice")
        totals = {"clips": sum(part["clips"] for part in parts)}
        totals |= {table: sum(part[table]["rows"] for part in parts) for table in _TABLES}
        if totals != manifest["rows"]:
            raise ValueError(f"its parts add up to {totals}, it says {manifest['rows']}")
    except (KeyError, TypeError, ValueError) as error:
        raise FaultError(f"is no manifest of tables ({_one_line(error)}); {REPEAT}") from error
    for name, value in (settings or {}).items():
        if manifest.get(name) != value:
            raise FaultError(f"has {name} {manifest.get(name)}, settings.json has {value}; {REPEAT}")


def _check_record(record: Mapping[str, Any]) -> None:
    """Check the form of a part's record.

    Raises:
        FaultError: a field is missing or cannot be.
        KeyError, TypeError: the same.
    """
    if not _SHARD.fullmatch(record["name"]) or record["clips"] < 1 or record["clips_not_finite"] < 0:
        raise FaultError(f"name {record['name']!r}, clips {record['clips']!r}")
    edits = record.get("edits", {"refused": {}, "doubtful": 0})
    reasons = [reason for each in edits["refused"].values() for reason in each.values()]
    if edits["doubtful"] < 0 or not all(isinstance(reason, str) for reason in reasons):
        raise FaultError(f"edits {_shorten(edits)}")
    for table in _TABLES:
        _check_entry(record[table])
        if record[table]["rows"] < 1:
            raise FaultError(f"{record[table]['rows']!r} rows")


def _read_records(folder: Folder, names: Sequence[str], manifest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Read the records of parts; what a manifest lists counts, and each record must say the same."""
    listed = None if manifest is None else {part["name"]: part for part in manifest["parts"]}
    records: list[dict[str, Any]] = []
    for name in names if listed is None else listed:
        path = f"parts/{name}.json"
        with folder.reading(path):
            record = _sealed(folder.at(path), REPEAT)
            try:
                _check_record(record)
            except (KeyError, TypeError, ValueError) as error:
                raise FaultError(f"is no record of a part ({_one_line(error)}); {REPEAT}") from error
            if record["name"] != name:
                raise FaultError(f"is the record of {record['name']}; {REPEAT}")
            if listed is not None and record != listed[name]:
                raise FaultError(f"says something else of its part than manifest.json; {REPEAT}")
            records.append(record)
    return records if listed is None else list(listed.values())


def _find_other_parts(
    folder: Folder, inside: Mapping[str, Mapping[str, store.Entry]], named: set[str], finished: bool, sure: bool
) -> None:
    """Find files of parts that no manifest names or, while there is none, no record."""
    for above, entries in inside.items():
        suffix = ".json" if above == "parts" else ".parquet"
        for name, entry in entries.items():
            stem = name.removesuffix(suffix)
            if not name.endswith(suffix) or stem in named or entry.is_folder:
                continue
            if not _SHARD.fullmatch(stem):
                folder.find("extra", f"{above}/{name}", f"{entry.size} bytes; {FOREIGN}")
            elif finished:
                folder.find("extra", f"{above}/{name}", f"{entry.size} bytes; {UNNAMED}", removable=True)
            else:
                folder.find("leftover", f"{above}/{name}", f"no record of its part, {KILLED}", removable=sure)
        _note_others(folder, f"{above}/", [name for name in entries if not name.endswith(suffix)])


def _read_rows(data: bytes, table: tables.Table, settings: Mapping[str, Any]) -> pa.Table:
    """Read one table of a part with its page checksums; compare metadata and columns with what they must be.

    Raises:
        FaultError: it is of another table, model, dataset or setting, or is no table.
    """
    try:
        rows = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise FaultError(f"is no Parquet file ({_one_line(error)}); {REPEAT}") from error
    try:
        _, provenance = tables.provenance_of(rows.schema, "it")
        tables.check_part(rows.schema, table, settings, "it")
    except (ValueError, KeyError, TypeError) as error:
        raise FaultError(f"does not belong here: {_one_line(error)}") from error
    for column in tables.schema(table, {}, provenance):
        if column.name not in rows.schema.names or not rows.schema.field(column.name).equals(column):
            raise FaultError(f"has no column {column.name} of type {column.type}; {REPEAT}")
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        if name not in tables.ERRORS and column.null_count + _values(column).null_count:
            raise FaultError(f"has nulls in column {name}; {REPEAT}")
    return rows


def _check_keys(rows: pa.Table, table: tables.Table) -> None:
    """Compare each row's key with the one before it: where keys increase, they are sorted and come once.

    Raises:
        FaultError: a key comes twice or out of order.
    """
    names = tables.OBJECT_KEY if table == "objects" else tables.FRAME_KEY
    later, equal = _compare([_codes(rows[name]) for name in names])
    if not later.all():
        row = int(np.flatnonzero(~later)[0])
        how = "twice" if equal[row] else "out of order"
        raise FaultError(f"row {row + 1} has a key that comes {how}: {_key(rows, names, row + 1)}; {REPEAT}")


def _check_frames(frames: pa.Table, settings: Mapping[str, Any]) -> None:
    """Compare the frames of each clip with the settings: encoded from first to last, predicted, interpolated.

    Raises:
        FaultError: there are more or fewer.
    """
    columns = {name: _codes(frames[name]) for name in tables.FRAME_KEY}
    frame = columns.pop("frame")
    _, same = _compare(list(columns.values()))
    kinds = np.array(frames["kind"].to_pylist())
    if (gaps := np.flatnonzero(same & (np.diff(frame) != 1))).size:
        raise FaultError(f"a frame is missing before {_key(frames, tables.FRAME_KEY, int(gaps[0]) + 1)}; {REPEAT}")
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    lengths = np.diff(np.append(starts, len(frame)))
    spans = np.stack([columns["context"][starts], frame[starts], lengths], axis=1)
    context, horizon, closing = (settings.get(name) for name in ("context", "horizon", "closing"))
    length = int(lengths[kinds[starts] == "posterior"].max(initial=0))
    gap = None if context is None or closing is None else length - context - closing
    asked = {"predicted": horizon, "interpolated": gap}
    for kind in sorted({"posterior", *kinds.tolist(), *(kind for kind in asked if asked[kind] is not None)}):
        chosen = kinds[starts] == kind
        found = np.unique(spans[chosen], axis=0).tolist()
        wanted = {
            "posterior": [[0, 0, length]],
            "predicted": [] if horizon is None else [[context, context, horizon]],
            "interpolated": [] if gap is None else [[context, context, gap]],
        }
        if found != wanted.get(kind):
            rows = f"{kind} rows with [context, first frame, frames] {_shorten(found)}"
            raise FaultError(f"has {rows}, wanted {wanted.get(kind)}; {REPEAT}")
        if chosen.any() and len(np.unique(columns["clip"][starts[chosen]])) != len(np.unique(columns["clip"])):
            raise FaultError(f"some clips have no {kind} rows; {REPEAT}")


def _check_objects(objects: pa.Table, frames: pa.Table) -> None:
    """Compare the two tables: the same frames, and over the frames of a clip the same objects 0, 1, ...

    Raises:
        FaultError: they differ.
    """
    columns = [_codes(objects[name]) for name in tables.FRAME_KEY]
    _, same = _compare(columns)
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    names = [*tables.FRAME_KEY, "source_frame"]
    if not objects.select(names).take(pa.array(starts)).equals(frames.select(names)):
        raise FaultError(
            f"objects have {len(starts)} frames, not the same as the {frames.num_rows} of frames/; {REPEAT}"
        )
    counts = np.diff(np.append(starts, objects.num_rows))
    first = np.repeat(starts, counts)
    if (objects["object"].to_numpy() != np.arange(objects.num_rows) - first).any():
        raise FaultError(f"the objects of a frame are not numbered 0, 1, ...; {REPEAT}")
    if (objects["source_frame"].to_numpy() != objects["source_frame"].to_numpy()[first]).any():
        raise FaultError(f"the objects of a frame are of different source frames; {REPEAT}")
    if ((np.diff(counts) != 0) & (np.diff(columns[0][starts]) == 0)).any():
        raise FaultError(f"a clip has more objects in one frame than in another; {REPEAT}")


def _check_counts(rows: Mapping[str, pa.Table], record: Mapping[str, Any]) -> None:
    """Count clips, and those whose latents are not finite, again.

    Raises:
        FaultError: the record says something else.
    """
    not_finite: set[str] = set()
    for part in rows.values():
        wrong = np.zeros(part.num_rows, bool)
        for name, column in zip(part.schema.names, part.columns, strict=True):
            if name not in tables.ERRORS and pa.types.is_floating((values := _values(column)).type):
                wrong |= ~np.isfinite(values.to_numpy()).reshape(part.num_rows, -1).all(axis=1)
        not_finite |= set(part["clip"].filter(pa.array(wrong)).unique().to_pylist())
    found = {"clips": len(rows["frames"]["clip"].unique()), "clips_not_finite": len(not_finite)}
    for name, number in found.items():
        if number != record[name]:
            raise FaultError(f"{name} is {number} in the rows, {record[name]} is recorded; {REPEAT}")


def _check_futures(frames: pa.Table, settings: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Compare the futures of each clip with the settings: every edit that was not refused, every sample.

    Raises:
        FaultError: there are more or fewer.
    """
    chosen = pc.call_function("equal", [frames["kind"].cast(pa.string()), pa.scalar("predicted")])
    keys = frames.filter(chosen).select(["clip", "edit", "sample"])
    keys = keys.group_by(keys.column_names).aggregate([])
    found = set(zip(*(keys[name].to_pylist() for name in ("clip", "edit", "sample")), strict=True))
    edits, refused = settings.get("edits", []), record.get("edits", {}).get("refused", {})
    samples = range(settings.get("samples", 0) + 1)
    wanted: set[tuple[str, str, int]] = set()
    for clip in frames["clip"].unique().to_pylist() if settings.get("horizon") is not None else ():
        names = {edit["name"] for edit in edits if edit.get("clip", clip) == clip} - set(refused.get(clip, ()))
        wanted |= {(clip, name, sample) for name in ("", *names) for sample in samples}
    if missing := sorted(wanted - found):
        raise FaultError(f"{len(missing)} futures are missing, the first (clip, edit, sample) {missing[0]}; {REPEAT}")
    if more := sorted(found - wanted):
        raise FaultError(f"{len(more)} futures that the settings do not ask for, the first {more[0]}; {REPEAT}")


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Integers in the order of a column's values."""
    if not pa.types.is_string(column.type):
        return column.to_numpy()
    encoded = column.combine_chunks().dictionary_encode()
    order = np.argsort(np.array(encoded.dictionary.to_pylist(), dtype=object), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()]


def _compare(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each row but the first: whether it comes after the row before, and whether it equals that."""
    later = np.zeros(max(0, len(columns[0]) - 1), bool)
    equal = ~later
    for column in columns:
        step = np.diff(column)
        later |= equal & (step > 0)
        equal &= step == 0
    return later, equal


def _key(rows: pa.Table, names: Sequence[str], row: int) -> str:
    return ", ".join(f"{name} {rows[name][row].as_py()!r}" for name in names)


def _values(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.flatten() if pa.types.is_fixed_size_list(array.type) else array


# Evaluations


def _verify_evaluation(folder: Folder, work: "_Work") -> str:
    _find_temporaries(folder, "", folder.entries)
    with folder.reading("metrics.json"):
        if (kind := _sealed(folder.at("metrics.json"), REMEASURE).get("kind")) != "metrics":
            raise FaultError(f"is of kind {kind!r}; {REMEASURE}")
    if "report.html" not in folder.entries:
        folder.find("missing", "report.html", f"belongs to metrics.json; {REMEASURE}")
    return f"evaluation {folder.path.rpartition('/')[2]}"


# Sweeps; the runs of their trials are folders of their own


def _verify_sweep(folder: Folder, work: "_Work") -> str:
    _find_temporaries(folder, "", folder.entries)
    for name in store.list_names(folder.at("trials")):
        _find_temporaries(folder, f"trials/{name}/", store.list_folder(folder.at("trials", name)))
    trials: list[dict[str, Any]] = []
    with folder.reading("sweep.json"):
        found = _sealed(folder.at("sweep.json"), GO_ON)
        if found.get("kind") != "sweep":
            raise FaultError(f"is of kind {found.get('kind')!r}; {GO_ON}")
        trials = found["trials"]
        with folder.reading("sweep.parquet"):
            _check_sweep_table(_bytes(folder.at("sweep.parquet"), GO_ON), found)
        if any(trial["state"] == "complete" for trial in trials):
            with folder.reading("best.json"):
                _sealed(folder.at("best.json"), GO_ON)
    if "report.html" not in folder.entries:
        folder.find("missing", "report.html", f"belongs to sweep.json; {GO_ON}")
    for trial in trials:
        for seed in range(len(trial["seed_values"])):
            path = f"{trial['folder']}/seed-{seed}"
            if not store.exists(folder.at(path, "last.json")):
                folder.find("missing", path, "the trial is complete, and its run is not there; restore it from a copy")
        if trial["picture"] and not store.exists(folder.at(trial["picture"])):
            folder.find("missing", trial["picture"], "sweep.json names it; restore it from a copy")
    over = Counter(trial["state"] for trial in trials)
    told = ", ".join(f"{over[state]} {state}" for state in sorted(over)) or "no"
    return f"sweep {folder.path.rpartition('/')[2]}: {told} trials"


def _check_sweep_table(data: bytes, found: Mapping[str, Any]) -> None:
    """Compare the table with the record.

    Raises:
        FaultError: they differ.
    """
    try:
        rows = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        names = [objective["name"] for objective in found["objectives"]]
        table = rows.select(["number", "state", "folder", *names]).to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise FaultError(f"cannot be read ({_one_line(error)}); {GO_ON}") from error
    wanted = [
        {**{name: trial[name] for name in ("number", "state", "folder")}, **{n: trial["values"].get(n) for n in names}}
        for trial in found["trials"]
    ]
    if table != wanted:
        differ = next((n for n, pair in enumerate(zip(table, wanted, strict=False)) if pair[0] != pair[1]), "some")
        raise FaultError(f"says other things of trial {differ} than sweep.json; {GO_ON}")


# Reading


@contextlib.contextmanager
def _access(remedy: str) -> Iterator[None]:
    """Turn what the storage answers into a fault."""
    try:
        yield
    except FileNotFoundError:
        raise FaultError(f"is not there; {remedy.removeprefix(DELETE)}", "missing") from None
    except OSError as error:
        raise FaultError(f"cannot be read ({error.strerror or error}); mend the storage or the access to it") from error


def _bytes(path: str, remedy: str) -> bytes:
    with _access(remedy):
        return store.read_bytes(path)


def _sealed(path: str, remedy: str) -> dict[str, Any]:
    """Read sealed JSON.

    Raises:
        FaultError: it is missing, or not as it was written.
    """
    return _parse(_bytes(path, remedy), path, remedy)


def _parse(data: bytes, path: str, remedy: str) -> dict[str, Any]:
    try:
        return store.parse_json(data, path)
    except ValueError as error:
        why = error.__cause__ or f"its {store.SEAL} does not fit its content"
        raise FaultError(f"is damaged or was edited ({why}); {remedy}") from error


def _recorded(path: str, entry: Mapping[str, Any], remedy: str) -> bytes:
    """Read a file of which size and SHA-256 are recorded.

    Raises:
        FaultError: it is missing, or other than recorded.
    """
    data = _bytes(path, remedy)
    if len(data) != entry["bytes"]:
        raise FaultError(f"{len(data)} bytes, {entry['bytes']} recorded; {remedy}")
    if (digest := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise FaultError(f"SHA-256 {digest[:16]}..., {entry['sha256'][:16]}... recorded; {remedy}")
    return data


def _check_entry(entry: Any) -> None:
    """Check what is recorded of a file.

    Raises:
        FaultError: it is not a size and a SHA-256.
    """
    good = isinstance(entry, Mapping) and type(entry.get("bytes")) is int and entry["bytes"] > 0
    if not good or not _SHA256.fullmatch(str(entry.get("sha256"))):
        raise FaultError(f"does not record bytes and sha256 of every file ({_shorten(entry)})")


# Cleaning, and saying what was found


def _find_temporaries(folder: Folder, above: str, entries: Mapping[str, store.Entry]) -> None:
    for name, entry in entries.items():
        if entry.is_folder or not _is_temporary(name):
            continue
        if not claim.is_claim(name):
            folder.find("leftover", above + name, f"{entry.size} bytes, {KILLED}", removable=True)
        elif (owner := claim.owner_of(folder.at(*above.split("/")[:-1], name))) is not None:
            if owner.lives():
                folder.notes.append(f"{above}{name}: in use by {owner}")
            else:
                folder.find("leftover", above + name, f"claim of {owner}, {KILLED}", removable=True)


def _note_others(folder: Folder, above: str, names: Collection[str]) -> None:
    tars = folder.kind == "split"  # those are findings
    others = [above + n for n in names if not (_is_temporary(n) or (tars and n.endswith(".tar")))]
    if others:
        folder.notes.append(_foreign(others))


def _report(folder: Folder, root: str, run: VerifyRun) -> Counter[str]:
    """Print what was found in a folder, remove what may and should be, and count the rest."""
    place = folder.path.removeprefix(root).strip("/")
    counts: Counter[str] = Counter()
    age = _ages(folder)
    for finding in folder.findings:
        path, text = f"{place}/{finding.path}".lstrip("/"), finding.text
        if run.clean and finding.removable:
            if not (kept := _remove(folder, finding, age, run.min_age)):
                _say("removed", f"{path} ({finding.kind})")
                continue
            text = f"{text}; kept: {kept}"
        _say(finding.kind, f"{path}: {text}")
        counts[finding.kind] += 1
    for note in folder.notes:
        _say("note", f"{place}/: {note}" if place else note)
    return counts


def _report_uploads(root: str, run: VerifyRun) -> Counter[str]:
    """Print the uploads to object storage that nobody finished, abandon those that may be, and count the rest."""
    counts: Counter[str] = Counter()
    try:
        uploads = store.unfinished(root)
    except OSError as error:  # who may read need not be allowed to ask
        _say("note", f"unfinished uploads are not known: {_one_line(error)}")
        return counts
    for upload in uploads:
        path, seconds = upload.path.removeprefix(root).strip("/"), time.time() - upload.begun
        text = f"an upload that is not finished, {KILLED}"
        if run.clean and seconds >= 60 * run.min_age:
            store.abandon(upload)
            _say("removed", f"{path} (unfinished upload)")
            continue
        if run.clean:
            text += f"; kept: begun {status.duration(max(0, seconds))} ago, less than --min-age {run.min_age:g} minutes"
        _say("leftover", f"{path}: {text}")
        counts["leftover"] += 1
    return counts


def _ages(folder: Folder) -> Callable[[str], float]:
    """Seconds since the last change of something in a folder and of all that is in it, as the storage says now."""
    list_once = functools.cache(store.list_folder)
    now = time.time()

    seen: set[str] = set()  # a link may lead back up

    def newest(path: str) -> float:
        inside = list_once(path)
        if inside and (real := path if store.is_url(path) else os.path.realpath(path)) not in seen:
            seen.add(real)
            return max(newest(store.join(path, n)) if e.is_folder else e.modified for n, e in inside.items())
        above, _, name = path.rpartition("/")
        entry = list_once(above).get(name)
        return now if entry is None else entry.modified  # what cannot be told is taken for young, and kept

    def age(path: str) -> float:
        seen.clear()
        return now - newest(path)

    return age


def _remove(folder: Folder, finding: Finding, age: Callable[[str], float], min_age: float) -> str:
    """Remove what a finding names, or say why it was kept."""
    path = folder.at(*finding.path.split("/"))
    # Ray's storage lies still while a run trains, so the whole run must.
    seconds = age(folder.path if finding.path == ".ray" else path)
    if min_age and seconds < 60 * min_age:
        return f"changed {status.duration(max(0, seconds))} ago, which is less than --min-age {min_age:g} minutes"
    if _STEP.fullmatch(path.rpartition("/")[2]) and store.exists(store.join(path, "COMPLETE")):
        return "it is complete by now"
    try:
        if finding.path == ".ray" or _STEP.fullmatch(path.rpartition("/")[2]):
            store.remove_tree(path)
        else:
            store.remove(path)
    except OSError as error:
        return f"it cannot be removed ({error.strerror or error})"
    return ""


def _say(kind: str, text: str) -> None:
    """Print one line, whatever a name or a damaged file holds."""
    if text:
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        print(f"{kind:<8}  {shown}", flush=True)


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _foreign(names: Collection[str]) -> str:
    return f"not of this software, left alone: {_some(names)}" if names else ""


def _is_temporary(name: str) -> bool:
    return store.is_temporary(name) or claim.is_claim(name) or _PROBE.fullmatch(name) is not None


def _is_shard(name: str) -> bool:
    return name.endswith(".tar") and _SHARD.fullmatch(name.removesuffix(".tar")) is not None


def _by_number(name: str) -> tuple[int, str]:
    return len(name), name


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"no field {text}"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__} {text}".strip()


class _Work:
    """Threads that read files, and word at intervals of how far they are."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="objdyn-verify")

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, unit: str, function: Callable[[T], R], items: Sequence[T], threads: bool = True) -> list[R]:
        """Call a function on every item and return the results in order."""
        with status.Status("verify", len(items), unit, brief=True) as progress:
            if not threads:
                found = []
                for item in items:
                    found.append(function(item))
                    progress.add()
                return found
            futures = [self._pool.submit(function, item) for item in items]
            for future in as_completed(futures):
                future.result()
                progress.add()
            return [future.result() for future in futures]


_VERIFIERS: dict[str, Callable[[Folder, _Work], str]] = {
    "split": _verify_split,
    "run": _verify_run,
    "checkpoint": _verify_checkpoint,
    "tables": _verify_tables,
    "evaluation": _verify_evaluation,
    "sweep": _verify_sweep,
}
