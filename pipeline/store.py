"""The one commit primitive: a file appears under its final name whole, or not at all; on disk and on s3:// alike.

On disk: a hidden temporary name in the same folder, fsync, rename, fsync of the folder. On S3: one put (multipart for
large files), which stays invisible until it is complete. Nothing here, and nothing above it, edits a file in place.

A DIR is a string everywhere: an absolute local path or ``s3://bucket/prefix``. S3 takes its endpoint, keys and region
from the standard variables (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...) or the machine's role. A run's settings
``storage``, which hold no credentials, travel in an environment variable of ours to every process that a job starts.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, ParamSpec, TypeVar, cast

from pipeline import failpoints

if TYPE_CHECKING:
    from pipeline.config import StorageConfig

SEAL = "checksum"
"""Field of a JSON file that holds the SHA-256 of the rest of it: nothing stands above a manifest to vouch for it."""

SETTINGS = "OBJDYN_STORAGE"
"""Environment variable with the storage settings of the job that this process belongs to, as JSON."""
PROVED = "OBJDYN_STORAGE_PROVED"
"""Environment variable with the stores and buckets in which that job has seen ``create`` keep its promise, as JSON."""
ATTEMPTS = 8
"""Tries of each request to object storage, unless settings or ``AWS_MAX_ATTEMPTS`` say otherwise."""
TIMEOUT = 30.0
"""Seconds that the store may be silent during a try, unless settings say otherwise."""
WRITER = "objdyn-writer"
"""Name in an object's metadata that tells which call wrote it."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CHUNK = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Published(NamedTuple):
    """What was written."""

    size: int
    """Bytes."""
    sha256: str
    """Hex digest."""


class Upload(NamedTuple):
    """An upload in parts to object storage that was begun and is not complete; no reader sees it."""

    path: str
    id: str
    begun: float
    """Seconds since the epoch."""


class Entry(NamedTuple):
    """A name in a folder, as its storage describes it."""

    is_folder: bool
    size: int
    """Bytes of a file."""
    modified: float
    """Last change in seconds since the epoch; 0 for a folder of object storage, which keeps none."""


def is_url(path: str) -> bool:
    """Tell an object-storage URL from a local path."""
    return "://" in path


def join(folder: str, *names: str) -> str:
    """Append names to a folder, local or URL."""
    return "/".join([folder.rstrip("/"), *names]) if is_url(folder) else os.path.join(folder, *names)


def is_plain_name(name: object) -> bool:
    """Tell whether what a manifest says can only name a file in the manifest's own folder."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def in_submitted_job() -> bool:
    """Tell whether this process is the entry point of ``ray job submit``, where Ray 2.60 leaves this variable."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def resolve(path: str, flag: str) -> str:
    """Return the absolute form of a path given on the command line as ``flag``; ``sim:NAME`` passes unchanged.

    Raises:
        ValueError: the path is empty, of an unknown scheme, or relative inside a submitted Ray job (where it would
            point into Ray's upload folder, which is thrown away).
    """
    if not path:
        raise ValueError(f"{flag} needs a path: an absolute folder or an s3:// URL")
    if path.startswith("sim:"):
        return path
    if is_url(path):
        scheme, _, rest = path.partition("://")
        if scheme != "s3" or not rest.strip("/"):
            raise ValueError(f"{flag}={path} is not supported; give a local path or s3://bucket/prefix")
        return path.rstrip("/")
    path = os.path.expanduser(path)
    if not os.path.isabs(path) and in_submitted_job():
        raise ValueError(
            f"{flag}={path} is relative, and in a submitted Ray job it would land in Ray's upload folder; "
            "give an absolute path that every node can reach, or an s3:// URL"
        )
    return os.path.abspath(path)


def check_endpoint(url: str, name: str) -> None:
    """Refuse an endpoint that is no http(s) URL, or that carries a password, which would get into logs.

    Raises:
        ValueError: it is refused; the message leaves the password out.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        parts, good = None, False
    if "@" in url:
        raise ValueError(
            f"{name} carries credentials in front of an @; leave them out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if parts is None or not good or parts.query or parts.fragment:
        raise ValueError(f"{name} must be the store's URL, as https://HOST or http://HOST:PORT, got {url!r}")


@contextlib.contextmanager
def using(storage: "StorageConfig") -> Iterator[None]:
    """Reach object storage as a run says, in this process and those that it starts meanwhile.

    What ``storage`` leaves open stays as it is around: the stages of a job need not repeat it.
    """
    given = {name: value for name, value in dataclasses.asdict(storage).items() if value not in (None, "")}
    before = os.environ.get(SETTINGS)
    if given:
        os.environ[SETTINGS] = json.dumps({**_settings(), **given})
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SETTINGS, None)
        else:
            os.environ[SETTINGS] = before


_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")


def job(function: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
    """Let a function whose first argument is a run reach object storage as ``run.storage`` says."""

    @functools.wraps(function)
    def wrapped(*given: _Given.args, **named: _Given.kwargs) -> _Answer:
        with using(cast(Any, given[0]).storage):
            return function(*given, **named)

    return wrapped


def job_into_folder(function: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
    """Like ``job`` for a run whose ``out`` is a folder, which must keep the promise of ``create``."""

    @job
    @functools.wraps(function)
    def wrapped(*given: _Given.args, **named: _Given.kwargs) -> _Answer:
        if (out := cast(Any, given[0]).out).startswith("s3://"):  # any other URL is refused by ``resolve``
            require_create(out)
        return function(*given, **named)

    return wrapped


def _settings() -> dict[str, Any]:
    return json.loads(os.environ.get(SETTINGS, "{}"))


def endpoint() -> str:
    """URL of the store behind s3:// paths; empty for Amazon's own.

    Raises:
        ValueError: a variable holds something else, see ``check_endpoint``.
    """
    for name in _ENDPOINTS:
        if url := os.environ.get(name, ""):
            check_endpoint(url, name)
    found = [os.environ.get(name, "") for name in _ENDPOINTS]
    return next(filter(None, [_settings().get("endpoint_url", ""), *found]), "")


def filesystem() -> Any:
    """Return the s3fs file system behind every s3:// path here; its errors name path and answer, see ``s3.Storage``.

    Raises:
        ValueError: an environment variable that says how to reach the store makes no sense.
    """
    from pipeline import s3

    settings = _settings()
    attempts = settings.get("attempts") or os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS
    if not (isinstance(attempts, int) or attempts.isdecimal()) or int(attempts) < 1:
        raise ValueError(f"AWS_MAX_ATTEMPTS must be a whole number, at least 1, got {attempts!r}")
    return s3.open_filesystem(endpoint() or None, int(attempts), settings.get("timeout", TIMEOUT))


def retries() -> int:
    """How many requests to object storage this process has had to make again."""
    # Not imported for this: without it there has been no request.
    return sys.modules["pipeline.s3"].retries() if "pipeline.s3" in sys.modules else 0


def is_temporary(name: str) -> bool:
    """Tell the name that a local file has here while it is written; a killed process leaves it behind."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put a file's name into what the system says while it is written: for a full disk it gives none of its own."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in _FULL
        if unnamed or (isinstance(error.filename, str) and is_temporary(os.path.basename(error.filename))):
            error.filename = path
        raise


@contextlib.contextmanager
def _naming_object(path: str) -> Iterator[None]:
    """Say of a missing object what the system says of a missing file: s3fs gives its name alone."""
    try:
        yield
    except FileNotFoundError as error:
        if error.errno is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", path) from error
        raise


def exists(path: str) -> bool:
    """Tell whether a file or a folder is there."""
    return bool(filesystem().exists(path)) if is_url(path) else os.path.exists(path)


def is_file(path: str) -> bool:
    """Tell whether a file is there, and not a folder."""
    return bool(filesystem().isfile(path)) if is_url(path) else os.path.isfile(path)


def open_local(path: str) -> BinaryIO:
    """Open a local file for reading, and nothing else: a pipe would wait for ever, a device may never end.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it is no regular file.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "a pipe, a socket, a device or a folder; give a regular file", path)
    return file


def open_read(path: str) -> BinaryIO:
    """Open a file for reading.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not is_url(path):
        return open_local(path)
    with _naming_object(path):
        return cast(BinaryIO, filesystem().open(path, "rb"))


def read_bytes(path: str, expected_sha256: str | None = None) -> bytes:
    """Read a whole file, and check it against a known SHA-256.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its bytes are not the expected ones.
    """
    if is_url(path):
        with _naming_object(path):
            data = cast(bytes, filesystem().cat_file(path))
    else:
        with open_local(path) as file:
            data = file.read()
    if expected_sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != expected_sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, not {expected_sha256} as recorded; restore it")
    return data


def sha256_file(path: str) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url: str, path: str) -> None:
    """Copy an object to a local file, which appears whole."""
    with _replacing(path) as temporary:
        filesystem().get_file(url, temporary)


def publish(path: str, data: bytes) -> Published:
    """Write a file so that readers see all of it or nothing; an earlier file of that name is replaced."""
    if not is_url(path):
        return publish_file(path, lambda file: file.write(data))
    failpoints.reach("publish", path)
    with _marking(path) as metadata:
        filesystem().pipe_file(path, data, Metadata=metadata)
    failpoints.reach("published", path)
    return Published(len(data), hashlib.sha256(data).hexdigest())


def publish_file(path: str, writer: Callable[[BinaryIO], object]) -> Published:
    """Like ``publish`` for a file too large for memory: ``writer`` writes it from start to end into what it is given.

    If ``writer`` raises, nothing is left under the final name.
    """
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="objdyn-") as folder:
            temporary = os.path.join(folder, "upload")
            with naming(temporary):
                published = _write(temporary, writer)
            failpoints.reach("publish", path)
            with _marking(path) as metadata:
                filesystem().put_file(temporary, path, Metadata=metadata)
        failpoints.reach("published", path)
        return published
    with _replacing(path) as temporary:
        return _write(temporary, writer)


def create(path: str, data: bytes) -> bool:
    """Write a file only if none of that name is there; of several writers exactly one gets True.

    On S3 this is a conditional put (``If-None-Match``), which the store must support, see ``require_create``. A writer
    whose put succeeded is told so also where the answer was lost and the put, made again, was refused.
    """
    failpoints.reach("create", path)
    if is_url(path):
        created = _create_object(path, data)
        failpoints.reach("created", path)
        return created
    temporary = _temporary(path)
    try:
        with naming(path):
            _write(temporary, lambda file: file.write(data))
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        failpoints.reach("created", path)
        _sync_folder(os.path.dirname(path))
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def require_create(folder: str) -> None:
    """Refuse a folder on a store that ignores the condition of ``create``; once per job, store and bucket.

    A job calls this before it works; it costs five small requests. Local folders need no test.

    Raises:
        ValueError: the store ignores the condition.
        OSError: the folder cannot be written.
    """
    if not is_url(folder):
        return
    place = f"{endpoint()} {folder.partition('://')[2].partition('/')[0]}"
    proved = json.loads(os.environ.get(PROVED, "[]"))
    if place in proved:
        return
    try:
        kept = supports_create(folder, writers=0)
    except OSError as error:
        error.filename = folder  # and not that of a probe
        raise
    if not kept:
        raise ValueError(
            f"{folder} is on a store ({endpoint() or 'Amazon S3'}) that ignores the condition If-None-Match, so that "
            "two jobs on one folder would mix what they write; use a store that honours it (Amazon S3, MinIO, Ceph), "
            "or a local folder"
        )
    os.environ[PROVED] = json.dumps([*proved, place])


def supports_create(folder: str, writers: int = 8) -> bool:
    """Tell whether ``create`` keeps its promise in a folder that is there; leaves nothing behind.

    A second writer must lose and change nothing, and of several at once one must win: some stores take a conditional
    put and ignore the condition. Without ``writers`` nothing is tried at once.

    Raises:
        OSError: the folder cannot be written, or the store refuses conditional puts.
    """
    name = f".objdyn-probe-{uuid.uuid4().hex}"
    alone, race = join(folder, f"{name}-alone"), join(folder, f"{name}-race")
    try:
        if not create(alone, b"first") or create(alone, b"second") or read_bytes(alone) != b"first":
            return False
        if not writers:
            return True
        with ThreadPoolExecutor(writers) as pool:
            won = list(pool.map(lambda writer: create(race, b"%d" % writer), range(writers)))
        return sum(won) == 1 and read_bytes(race) == b"%d" % won.index(True)
    finally:
        for path in (alone, race) if writers else (alone,):
            remove(path)


def read_json(path: str) -> dict[str, Any]:
    """Read what ``publish_json`` wrote.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged or was edited.
    """
    return parse_json(read_bytes(path), path)


def loads(data: bytes | str) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read: {error}") from error


def parse_json(data: bytes, path: str) -> dict[str, Any]:
    """Take the value out of sealed JSON; ``path`` names it in messages.

    Raises:
        ValueError: the bytes are not exactly what ``sealed_json`` made.
    """
    remedy = "restore it from a copy, or make it again in an empty folder"
    try:
        value = loads(data)
        seal = value.pop(SEAL, None) if isinstance(value, dict) else None
        unchanged = seal is not None and sealed_json(value) == data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it is damaged or was edited: {remedy}") from error
    if seal is None:
        raise ValueError(f"{path} has no field {SEAL!r}: it is damaged, was edited or is of another software; {remedy}")
    if not unchanged:
        raise ValueError(f"{path} is damaged or was edited: its {SEAL!r} does not fit its content; {remedy}")
    return value


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """Encode JSON with the SHA-256 of its own content in the field ``checksum``; the same value gives the same bytes.

    Raises:
        ValueError: a value has no JSON form.
    """
    return json_bytes({**value, SEAL: hashlib.sha256(json_bytes(value)).hexdigest()})


def json_bytes(value: Any) -> bytes:
    """Encode JSON with sorted keys: the same value gives the same bytes.

    Raises:
        ValueError: a number is not finite (JSON has none such), or a value has no JSON form.
    """
    try:
        return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    except TypeError as error:
        raise ValueError(f"cannot be stored as JSON: {error}") from error


def publish_json(path: str, value: Mapping[str, Any]) -> Published:
    """Write an object as sealed JSON, atomically; the same value gives the same bytes."""
    return publish(path, sealed_json(value))


def list_names(folder: str, prefix: str = "") -> list[str]:
    """List the names in a folder that begin with ``prefix``, sorted; empty if there is no such folder.

    For cleaning up, for claims and for messages only: what belongs to a dataset or a run is said by its manifest.
    """
    try:
        if is_url(folder) and prefix:  # the store sends no others, of which there may be very many; no folders
            found = cast(list[str], filesystem().find(folder, maxdepth=1, prefix=prefix))
        elif is_url(folder):
            found = cast(list[str], filesystem().ls(folder, detail=False))
        else:
            return sorted(name for name in os.listdir(folder) if name.startswith(prefix))
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found})
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_folder(folder: str) -> dict[str, Entry]:
    """List the names in a folder with what the storage says of each, sorted; empty if there is no such folder.

    For verifying and cleaning up only, like ``list_names``.
    """
    try:
        found = _list_objects(folder) if is_url(folder) else _list_directory(folder)
        return dict(sorted(found))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def list_tree(folder: str) -> list[str]:
    """List all files in a folder and its sub-folders, relative to it with ``/`` between names, sorted.

    Links to folders are followed, each folder once. What is no folder holds no files.
    """
    if is_url(folder):
        prefix = folder.split("://", 1)[1].rstrip("/") + "/"
        return sorted(str(path).removeprefix(prefix) for path in filesystem().find(folder))
    return sorted(_walk(folder))


def unfinished(folder: str) -> list[Upload]:
    """List the uploads under a folder that killed jobs left behind, or that are under way; none on a disk."""
    if not is_url(folder):
        return []
    bucket, _, key = folder.partition("://")[2].rstrip("/").partition("/")
    found: list[Upload] = []
    after: dict[str, str] = {}
    while True:
        page = filesystem().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key and f"{key}/", **after)
        found += [
            Upload(f"s3://{bucket}/{each['Key']}", each["UploadId"], each["Initiated"].timestamp())
            for each in page.get("Uploads", [])
        ]
        if not page.get("IsTruncated"):
            return sorted(found)
        after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abandon(upload: Upload) -> None:
    """Free what an unfinished upload holds, if it is there."""
    bucket, _, key = upload.path.partition("://")[2].partition("/")
    with contextlib.suppress(FileNotFoundError):
        filesystem().abort_mpu(bucket, key, upload.id)


def remove(path: str) -> None:
    """Remove a file if it is there."""
    failpoints.reach("remove", path)
    with contextlib.suppress(FileNotFoundError):
        if is_url(path):
            filesystem().rm_file(path)
        else:
            os.unlink(path)
    failpoints.reach("removed", path)


def remove_tree(path: str) -> None:
    """Remove a folder and all in it, if it is there."""
    failpoints.reach("remove", path)
    with contextlib.suppress(FileNotFoundError):
        if is_url(path):
            filesystem().rm(path, recursive=True)
        else:
            shutil.rmtree(path)
    failpoints.reach("removed", path)


def _list_directory(folder: str) -> Iterator[tuple[str, Entry]]:
    with os.scandir(folder) as found:
        for entry in found:
            try:
                # A link counts as what it leads to, and as a file of its own where it leads nowhere or in a circle.
                reached = os.path.exists(entry.path)
                status = entry.stat(follow_symlinks=reached)
            except FileNotFoundError:  # gone since the folder was listed
                continue
            yield entry.name, Entry(reached and entry.is_dir(), status.st_size, status.st_mtime)


def _list_objects(folder: str) -> Iterator[tuple[str, Entry]]:
    prefix = folder.split("://", 1)[1].rstrip("/")
    for found in filesystem().ls(folder, detail=True):
        name = str(found["name"]).rstrip("/")
        if name != prefix:  # the object of that name itself, or a placeholder that a console made for the folder
            changed = found.get("LastModified")
            is_folder = found["type"] == "directory"
            modified = changed.timestamp() if changed else 0.0
            yield name.rsplit("/", 1)[-1], Entry(is_folder, int(found["size"] or 0), modified)


def _walk(root: str) -> Iterator[str]:
    seen = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True):
        # Folders are often links to another disk; a link back up would never end, and two to one folder are one.
        fresh = []
        for name in sorted(names):
            if (real := os.path.realpath(os.path.join(folder, name))) not in seen:
                seen.add(real)
                fresh.append(name)
        names[:] = fresh
        for name in files:
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _create_object(path: str, data: bytes) -> bool:
    mark = uuid.uuid4().hex
    try:
        filesystem().pipe_file(path, data, mode="create", Metadata={WRITER: mark})
        return True
    except FileExistsError:
        return _writer(path) == mark


@contextlib.contextmanager
def _marking(path: str) -> Iterator[dict[str, str]]:
    """Metadata for an object that is written inside, by which it is known to be there."""
    mark = uuid.uuid4().hex
    try:
        yield {WRITER: mark}
    except FileNotFoundError:
        # An upload in parts that is complete is not known any more: the answer was lost, and it was asked for again.
        if _writer(path) != mark:
            raise


def _writer(path: str) -> str | None:
    """Which call wrote an object, as it says itself; None if it says nothing, or is gone."""
    try:
        metadata = cast("dict[str, str]", filesystem().metadata(path))
    except FileNotFoundError:
        return None
    return next((value for name, value in metadata.items() if name.lower() == WRITER), None)


class _Hashing:
    """A write-only file that hashes what passes; without seek, so that nothing already hashed can change."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view[: len(view) // 2])
        failpoints.reach("write", self._path)
        self._file.write(view[len(view) // 2 :])
        self.digest.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Leave the file open: its owner syncs and closes it after the writer is done."""

    closed = False

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def _write(path: str, writer: Callable[[BinaryIO], object]) -> Published:
    with open(path, "wb") as file:
        hashing = _Hashing(file, path)
        writer(cast(BinaryIO, hashing))
        failpoints.reach("sync", path)
        _sync(file)
    return Published(hashing.size, hashing.digest.hexdigest())


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    _make_folder(folder)
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    temporary = _temporary(path)
    try:
        with naming(path):
            yield temporary
            failpoints.reach("publish", path)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    failpoints.reach("published", path)
    _sync_folder(os.path.dirname(path))


def _make_folder(folder: str) -> None:
    if not folder or os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    _make_folder(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is a file, but a folder is needed there; remove it or choose another place")
    _sync_folder(above)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
