"""s3:// through s3fs, with one layer of retries around each request; imported where a path is s3:// and not before.

botocore and s3fs each bring retries of their own, the second around the first, and s3fs once more around the reading of
a body: together hundreds of tries of one request, and still none after some answers that break off. Both are switched
off here, and one loop stands in their place: a request, with the body of its answer, is tried ``attempts`` times and no
oftener, and then its error is one line that names the path and what the store said. All requests may be tried again:
they read, list or remove, or they write a whole object, or ``store.create`` asks afterwards whose object is there.
"""

import asyncio
import errno
import io
import os
import random
import time
from typing import Any

import aiohttp
import botocore.exceptions as boto
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

FIRST_WAIT, THROTTLED_WAIT, LONGEST_WAIT = 0.1, 0.5, 20.0
"""Seconds before the second try, and where the store asks for fewer requests; each further wait is twice as long at
most, and drawn."""
CONNECT_SECONDS = 10.0
"""How long a connection may take to be made."""

_BROKEN_OFF = (
    *S3_RETRYABLE_ERRORS,
    boto.ConnectionError,
    boto.IncompleteReadError,
    aiohttp.ClientError,
    ConnectionError,
)
_THROTTLED_STATUS, _PASSING_STATUS = (429, 503), (429, 500, 502, 503, 504)
_PASSING_CODES = (
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ConditionalRequestConflict",
    "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
)  # fmt: skip
"""Beside status 5xx: two requests met, or this one arrived damaged."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_retries = 0


def retries() -> int:
    """How many requests this process has had to make again."""
    return _retries


def open_filesystem(endpoint_url: str | None, attempts: int, timeout: float) -> "Storage":
    """The file system of a store; the same arguments give the same one, with its connections."""
    return Storage(
        endpoint_url=endpoint_url,
        attempts=attempts,
        config_kwargs={
            "connect_timeout": min(CONNECT_SECONDS, timeout),
            "read_timeout": timeout,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
        use_listings_cache=False,  # listings must be fresh: other processes publish into the same folders
    )


class Storage(S3FileSystem):
    """s3fs whose every request is tried ``attempts`` times.

    Raises (from every method):
        FileNotFoundError: the bucket, object or upload is not there.
        FileExistsError: a conditional put was refused.
        PermissionError: the store refuses the credentials, or there are none.
        OSError: the store gave no good answer.
    """

    retries = 1  # of s3fs's own layer

    def __init__(self, *args: Any, attempts: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attempts = attempts

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        global _retries
        begin, attempt = time.monotonic(), 1
        while True:
            try:
                answer = await super()._call_s3(method, *akwarglist, **kwargs)
                if method == "get_object" and (
                    "Range" in kwargs or answer.get("ContentLength", 0) <= self.default_block_size
                ):  # of a larger one s3fs reads the head only, and then ranges
                    async with answer["Body"] as body:
                        answer["Body"] = _Body(await body.read())
                return answer
            except Exception as error:
                wait = _wait(error)
                if wait is None or attempt == self.attempts:
                    tries = f", tried {attempt} times in {time.monotonic() - begin:.0f} s" if attempt > 1 else ""
                    raise _told(error, self._store, method, kwargs, tries) from error
            await asyncio.sleep(random.random() * min(wait * 2 ** (attempt - 1), LONGEST_WAIT))
            attempt += 1
            _retries += 1

    call_s3 = sync_wrapper(_call_s3)

    @property
    def _store(self) -> str:
        return "the store" if self._s3 is None else f"the store at {self._s3.meta.endpoint_url}"


class _Body:
    """An answer's body that is here already."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    async def read(self, size: int = -1) -> bytes:
        return self._data.read(size)

    def close(self) -> None:
        """Nothing is open."""


def _answer(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of the store's answer; 0 and empty where it gave none."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(response, dict):
        return 0, "", ""
    said = response.get("Error", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(said.get("Code", "")), " ".join(str(said.get("Message", "")).split())


def _wait(error: Exception) -> float | None:
    """Longest wait before the second try; None where another try would be answered the same."""
    status, code, _ = _answer(error)
    if status in _THROTTLED_STATUS or code == "SlowDown":
        return THROTTLED_WAIT
    if status in _PASSING_STATUS or code in _PASSING_CODES:
        return FIRST_WAIT
    broken_off = not status and isinstance(error, _BROKEN_OFF) and not isinstance(error, boto.SSLError)
    return FIRST_WAIT if broken_off else None


def _told(error: Exception, where: str, method: str, request: dict[str, Any], tries: str) -> Exception:
    """The error as one line with the path and without secrets."""
    status, code, message = _answer(error)
    path = f"s3://{request.get('Bucket', '')}/{request.get('Key', request.get('Prefix', ''))}"
    if status:
        name = " ".join(dict.fromkeys(filter(None, (str(status), code))))
        text = f"{where} answered {name}{f' ({message})' if message else ''} to {method}{tries}"
    elif isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        text = f"there are no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return PermissionError(errno.EACCES, text, path)
    elif isinstance(error, _BROKEN_OFF):
        text = f"{where} gave no whole answer to {method} ({type(error).__name__}){tries}"
    elif isinstance(error, boto.BotoCoreError):
        text = f"{method} could not be asked of {where} ({type(error).__name__}: {error})"
    else:
        return error  # a defect, or an error of the disk
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "***")
    if status == 412 or code == "PreconditionFailed":
        return FileExistsError(errno.EEXIST, text, path)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, text, path)
    if status in (401, 403):
        return PermissionError(errno.EACCES, text, path)
    return OSError(errno.EIO, text, path)
