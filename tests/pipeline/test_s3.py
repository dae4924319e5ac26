"""Object storage that fails: what is tried again, how often, what is said, and that nothing is done twice."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from s3fs import S3FileSystem

from pipeline import cli, loop, store
from pipeline.config import StorageConfig
from tests.pipeline.flaky_s3 import FAULTS, FlakyS3

Flaky = Callable[..., FlakyS3]
GONE = (("POST .*uploadId=", "lost"), ("POST .*uploadId=", "404"))
"""An upload in parts is completed, but not answered, and is gone when its completion is asked for again."""


@pytest.fixture
def flaky(s3_folder: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """Puts a proxy between this process and the server, whose folder is ``flaky.folder``."""
    monkeypatch.setattr("pipeline.s3.FIRST_WAIT", 0.01)
    monkeypatch.setattr("pipeline.s3.THROTTLED_WAIT", 0.01)
    monkeypatch.delenv(store.PROVED, raising=False)
    with ExitStack() as stack:

        def start(rates: dict[str, float] | None = None, **options: Any) -> FlakyS3:
            proxy = stack.enter_context(FlakyS3(s3_endpoint, rates, **options))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            return proxy

        yield start


@pytest.fixture
def patience() -> Iterator[None]:
    """Little of it."""
    with store.using(StorageConfig(attempts=3)):
        yield


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("kind", sorted(set(FAULTS) - {"hang"}))
def test_a_passing_fault_is_tried_again_in_every_operation(kind: str, flaky: Flaky, s3_folder: str) -> None:
    proxy, path, before = flaky(), store.join(s3_folder, "a"), store.retries()
    todo = 0

    def plan(*methods: str) -> None:
        nonlocal todo
        methods = tuple(method for method in methods if kind not in ("lost", "half") or (kind, method) in HITS)
        proxy.planned = [(method, kind) for method in methods]
        todo += len(methods)

    plan("PUT", "PUT")
    store.publish(path, b"x" * 1000)
    plan("GET", "HEAD")
    assert store.read_bytes(path) == b"x" * 1000
    plan("GET")
    with store.open_read(path) as file:
        assert file.read() == b"x" * 1000
    plan("GET", "GET")
    assert store.list_names(s3_folder) == ["a"]
    plan("HEAD")
    assert store.exists(path)
    plan("PUT")
    assert store.create(store.join(s3_folder, "b"), b"y")
    plan("DELETE")
    store.remove(store.join(s3_folder, "b"))
    plan("POST")
    store.remove_tree(s3_folder)
    assert proxy.planned == []
    assert store.list_names(s3_folder) == []
    assert proxy.faults == todo
    # Of a connection that is cut while nobody is answered, aiohttp makes the request again by itself, once.
    assert store.retries() - before == todo if kind in ("500", "503", "half") else store.retries() - before <= todo


HITS = {("lost", "PUT"), ("lost", "POST"), ("half", "GET"), ("half", "POST")}
"""What the two faults that need a body can fall on."""


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    ("kind", "said"),
    [("500", "answered 500"), ("503", "answered 503"), ("reset", "no whole answer"), ("half", "no whole answer")],
)
def test_retries_end_with_one_line_that_names_path_and_answer(
    kind: str, said: str, flaky: Flaky, s3_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store.join(s3_folder, "a")
    store.publish(path, b"x" * 1000)
    proxy = flaky({kind: 1.0})
    works = [lambda: store.open_read(path).read()]
    if kind != "half":
        works += [
            lambda: store.publish(path, b"y"), lambda: store.read_bytes(path), lambda: store.create(path, b"z"),
            lambda: store.list_names(s3_folder), lambda: store.exists(path), lambda: store.remove(path),
        ]  # fmt: skip
    for work in works:
        proxy.counts.clear()
        with pytest.raises(OSError, match="tried 3 times") as error:
            work()
        # HEAD has nothing to halve; and aiohttp makes a request again by itself whose connection was cut.
        assert 3 <= proxy.counts["requests"] <= (3 if kind in ("500", "503") else 6)
        with pytest.raises(SystemExit) as end:
            cli._fail(error.value, 1, False, cli._one_line(error.value))
        assert end.value.code == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert said in line
        assert s3_folder in line
        assert "testing-" not in line  # of the credentials
    proxy.rates = {}
    assert store.read_bytes(path) == b"x" * 1000


def test_a_store_that_hangs_is_given_up_and_left(flaky: Flaky, s3_folder: str) -> None:
    path = store.join(s3_folder, "a")
    store.publish(path, b"x")
    proxy = flaky(hang=1.5)
    with store.using(StorageConfig(attempts=2, timeout=1.0)):
        proxy.planned = [("PUT", "hang")]
        store.publish(path, b"y")
        proxy.planned = [("PUT", "hang")] * 2
        with pytest.raises(OSError, match=r"no whole answer to put_object \(ReadTimeoutError\), tried 2 times in"):
            store.publish(path, b"z")
    assert store.read_bytes(path) == b"y"


def test_aws_variable_bounds_the_tries(flaky: Flaky, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy = flaky({"500": 1.0})
    with pytest.raises(OSError, match="tried 2 times"):
        store.publish(store.join(s3_folder, "a"), b"")
    assert proxy.counts["requests"] == 2
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(ValueError, match="AWS_MAX_ATTEMPTS must be a whole number"):
        store.publish(store.join(s3_folder, "a"), b"")


def test_what_is_no_passing_fault_is_not_tried_again(flaky: Flaky, s3_folder: str) -> None:
    proxy = flaky()
    for work, kind, text in (
        (lambda: store.open_read(store.join(s3_folder, "a")).read(), FileNotFoundError, f"{s3_folder}/a"),
        (lambda: store.publish("s3://no-such-bucket/a", b""), FileNotFoundError, "bucket does not exist"),
    ):
        before = store.retries()
        with pytest.raises(kind, match=text):
            work()
        assert store.retries() == before
    assert proxy.faults == 0


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("kind", ["lost", "late-reset"])
def test_create_tells_the_winner_whose_answer_was_lost(kind: str, flaky: Flaky, s3_folder: str) -> None:
    proxy, path = flaky(), store.join(s3_folder, "owner")
    proxy.planned = [("PUT", kind)]
    assert store.create(path, b"same")
    assert not store.create(path, b"same")
    proxy.planned = [("PUT", kind)]
    assert not store.create(path, b"same")
    assert store.read_bytes(path) == b"same"
    assert [count for name, count in proxy.writes.items() if name.endswith("owner")] == [1]


@pytest.mark.usefixtures("patience")
def test_upload_in_parts_survives_lost_answers_and_leaves_none_open(
    flaky: Flaky, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    data, path = os.urandom(11 << 20), store.join(s3_folder, "large")
    proxy = flaky()
    proxy.planned = [("PUT .*partNumber=2", "lost"), *GONE]
    published = store.publish_file(path, lambda file: file.write(data))
    assert proxy.planned == []
    assert store.sha256_file(path) == published.sha256
    assert store.unfinished(s3_folder) == []
    # An upload that cannot be completed is given up, and what was there stays.
    proxy.planned = [("POST .*uploadId=", "500")] * 3
    with pytest.raises(OSError, match="answered 500"):
        store.publish_file(path, lambda file: file.write(b"z" * len(data)))
    assert store.sha256_file(path) == published.sha256
    assert store.unfinished(s3_folder) == []
    # One whose begin was answered in vain stays open, for verify.py --clean.
    proxy.planned = [("POST .*uploads", "lost")]
    store.publish_file(path, lambda file: file.write(data))
    (upload,) = store.unfinished(s3_folder)
    assert upload.path == path
    store.abandon(upload)
    store.abandon(upload)
    assert store.unfinished(s3_folder) == []


@pytest.mark.usefixtures("patience")
def test_published_bytes_in_parts_survive_a_lost_answer(
    flaky: Flaky, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3FileSystem._pipe_file, "__defaults__", (5 << 20, None, "overwrite"))
    data, path, proxy = os.urandom(11 << 20), store.join(s3_folder, "large"), flaky()
    proxy.planned = [*GONE]
    published = store.publish(path, data)
    assert proxy.planned == []
    assert store.sha256_file(path) == published.sha256
    # What another writer has put there meanwhile is not this one's.
    monkeypatch.setattr(store, "_writer", lambda path: "another")
    proxy.planned = [*GONE]
    with pytest.raises(FileNotFoundError):
        store.publish(path, data)


def test_a_store_that_ignores_the_condition_is_refused_once_and_cheaply(flaky: Flaky, s3_folder: str) -> None:
    proxy = flaky(without_condition=True)
    with pytest.raises(ValueError, match=r"ignores the condition If-None-Match.*use a store that honours it"):
        store.require_create(s3_folder)
    assert proxy.counts["requests"] <= 6
    proxy = flaky()
    for _ in range(3):
        store.require_create(s3_folder)
    assert proxy.counts["requests"] <= 6
    child = f"from pipeline import store; store.require_create({s3_folder!r})"
    subprocess.run([sys.executable, "-c", child], check=True)
    assert proxy.counts["requests"] <= 6
    assert store.list_names(s3_folder) == []
    with pytest.raises(FileNotFoundError, match=r"bucket does not exist.*s3://no-such-bucket/out'$"):
        store.require_create("s3://no-such-bucket/out")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("127.0.0.1:9000", "must be the store's URL"),
        ("s3://bucket", "must be the store's URL"),
        ("http://", "must be the store's URL"),
        ("http://host:port", "must be the store's URL"),
        ("http://user:hunter2@host", "carries credentials"),
    ],
)
def test_endpoints_that_are_none_are_refused_without_their_password(
    url: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"storage\.endpoint_url {text}") as error:
        StorageConfig(endpoint_url=url)
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(ValueError, match=f"AWS_ENDPOINT_URL {text}") as error:
        store.read_bytes("s3://bucket/a")
    assert "hunter2" not in str(error.value)


def test_settings_reach_children_and_end_with_their_block(flaky: Flaky, s3_folder: str, monkeypatch: Any) -> None:
    with socket.socket() as nowhere:
        nowhere.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nowhere.getsockname()[1]}")
        proxy_url = os.environ["AWS_ENDPOINT_URL"]
        proxy = flaky()
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_url)
        with store.using(StorageConfig(endpoint_url=proxy.url)), store.using(StorageConfig(attempts=1)):
            assert store.endpoint() == proxy.url
            child = f"from pipeline import store; store.publish({store.join(s3_folder, 'a')!r}, b'x')"
            subprocess.run([sys.executable, "-c", child], check=True)
        assert store.endpoint() == proxy_url
        with (
            store.using(StorageConfig(attempts=1, timeout=1)),
            pytest.raises(OSError, match=f"at {proxy_url} gave no whole"),
        ):
            store.read_bytes(store.join(s3_folder, "a"))


def test_missing_credentials_are_said_to_be_missing(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with store.using(StorageConfig(timeout=7)), pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID"):
        store.read_bytes(store.join(s3_folder, "a"))


def test_training_on_a_store_that_fails_gives_the_same_run(
    flaky: Flaky, s3_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rates, runs = {"500": 0.05, "reset": 0.05, "late-reset": 0.05, "half": 0.05, "lost": 0.1}, []
    out = store.join(s3_folder, "run")
    for given in ({}, rates):
        proxy = flaky(given, seed=1)
        steps = ["--steps", "2", "--set", "clip_frames=2", "--set", "checkpoint_every=1", "--set", "eval_clips=1"]
        # The endpoint by its flag; the variable leads to nowhere.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            words = ["iodine/debug", "--out", out, "--storage.endpoint-url", proxy.url, *steps]
            assert loop.main(words) == 0, capsys.readouterr().err
        proxy.rates = {}
        names = [name for name in store.list_tree(out) if not name.startswith("tensorboard/")]
        runs.append({name: store.read_bytes(store.join(out, name)) for name in names})
        store.remove_tree(out)
    clock = rf'"({"|".join(sorted(loop.CLOCK_FIELDS))})": [^,}}]+'
    metrics = [re.sub(clock, "", run.pop("metrics.jsonl").decode()) for run in runs]
    assert proxy.faults > 3
    assert runs[0] == runs[1]
    assert metrics[0] == metrics[1]
    assert b"endpoint" not in runs[0]["config.json"]
