"""One job in a folder: who wins, who is named, how the dead and the silent are replaced, and what is left behind."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint, claim, evaluate, extract, loop, protocol, shard, store, verify, watchdog
from pipeline.config import EvaluateRun, ExtractRun, ShardRun, TrainRun, VerifyRun, with_overrides
from pipeline.presets import PRESETS

HOLD = """
import sys, time
from pipeline import claim
folder, kind, elsewhere, beat = sys.argv[1:]
claim.BEAT = float(beat)
if elsewhere:
    claim._place = lambda: elsewhere
with claim.hold(folder, "someone", kind=kind) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("mine", flush=True)
        except ValueError as error:
            print(error, flush=True)
"""
RUN = with_overrides(
    PRESETS["iodine"]["debug"], {"device": "cpu", "threads": 1, "steps": 4, "checkpoint_every": 2, "eval_every": 0}
)


class Other:
    """Another process, which holds a folder."""

    def __init__(self, folder: str, repository: Path, *, kind: str = "claim", elsewhere: str = "", beat: float = 60.0):
        words = [sys.executable, "-c", HOLD, folder, kind, elsewhere, str(beat)]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.answer() == "held"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def check(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def other(repository: Path) -> Iterator[Callable[..., Other]]:
    """Starts other processes, which end with the test."""
    begun: list[Other] = []

    def start(folder: str, **options: Any) -> Other:
        begun.append(Other(folder, repository, **options))
        return begun[-1]

    yield start
    for each in begun:
        each.process.kill()
        each.process.communicate()


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue("s3_folder")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be used with owners that are silent, or move when the test says so: a machine may be slower than a beat."""
    monkeypatch.setattr(claim, "BEAT", 0.1)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No claim is renewed within a test, and nobody's patience ends."""
    monkeypatch.setattr(claim, "BEAT", 60.0)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is on another machine than the owners so far."""
    monkeypatch.setattr(claim, "_place", lambda: "another boot pid:[1]")


def silence(held: claim.Claim) -> None:
    """End an owner's renewals, as a pause of its process does."""
    held._over.set()
    held._thread.join()


def test_of_sixteen_exactly_one_wins_and_the_others_name_it(folder: str, slow: None) -> None:
    start, over = threading.Barrier(16), threading.Barrier(16)

    def challenge(number: int) -> str:
        start.wait(300)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(claim.hold(folder, f"job {number}")).check()
                told = f"job {number}"
            except claim.HeldError as error:
                told = str(error)
            over.wait(300)
        return told

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(challenge, range(16)))
    (winner,) = [text for text in told if text.startswith("job ")]
    wanted = f"{folder} is in use by {winner}, process {os.getpid()} on {os.uname().nodename}; wait for it"
    assert sum(text.startswith(wanted) for text in told) == 15
    assert store.list_names(folder) == []


def test_an_owner_that_cannot_be_seen_is_refused_while_its_numbers_move(folder, quick, monkeypatch) -> None:
    with claim.hold(folder, "first") as first:
        silence(first)
        elsewhere(monkeypatch)
        with pytest.raises(claim.HeldError, match="in use by first"):  # noqa: SIM117
            with claim.hold(folder, "second", moved=lambda what: first._renew()):
                pass
        first.check()
    assert store.list_names(folder) == []


def test_an_owner_that_cannot_be_seen_and_stands_still_is_replaced_and_knows(folder, quick, monkeypatch) -> None:
    with claim.hold(folder, "first") as first:
        silence(first)
        elsewhere(monkeypatch)
        begin = time.monotonic()
        with claim.hold(folder, "second") as second:
            assert time.monotonic() - begin >= claim.LOOKS * claim.BEAT
            silence(second)
            with pytest.raises(claim.LostError, match=f"{folder} was taken over by second, process"):
                first.check()
            first._renew()
            assert first.lost
            second.check()
        assert store.list_names(folder) == []
    assert store.list_names(folder) == []


def test_an_owner_that_slept_through_another_job_knows_though_nothing_is_left_of_it(folder, quick, monkeypatch) -> None:
    with claim.hold(folder, "first") as first:
        silence(first)
        elsewhere(monkeypatch)
        with claim.hold(folder, "second") as second:
            silence(second)
        first._renew()
        assert first.lost
        assert store.list_names(folder) == []
        with pytest.raises(claim.LostError, match="its claim is gone"):
            first.check()


@pytest.mark.parametrize("missed", [False, True])
def test_an_owner_that_moves_faster_than_it_can_be_read_is_not_overlooked(tmp_path, slow, monkeypatch, missed) -> None:
    """Each number is gone before it is read; or the first list misses it, and the look after that is as blind."""
    read, names, challenger = store.read_bytes, store.list_names, threading.get_ident()
    lists: list[str] = []
    renewing = threading.Lock()

    def read_late(path: str) -> bytes:
        if threading.get_ident() == challenger and renewing.acquire(blocking=False):
            with contextlib.ExitStack() as stack:
                stack.callback(renewing.release)
                first._renew()
        return read(path)

    def list_names(folder: str, prefix: str = "") -> list[str]:
        lists.append(folder)
        return [] if missed and len(lists) == 1 else names(folder, prefix)

    with claim.hold(str(tmp_path), "first") as first:
        for _ in range(5):
            first._renew()
        with monkeypatch.context() as patch:
            patch.setattr(store, "read_bytes", read_late)
            patch.setattr(store, "list_names", list_names)
            with pytest.raises(claim.HeldError, match="in use by"), claim.hold(str(tmp_path), "second"):
                pass
        first.check()
        assert len(os.listdir(tmp_path)) == 1


def test_of_two_that_both_hold_the_lower_number_is_told(tmp_path, slow) -> None:
    """However the lower one came to it."""
    with claim.hold(str(tmp_path), "first") as first:
        for _ in range(5):
            first._renew()
        path = tmp_path / ".claim-00000001"
        path.write_bytes(store.sealed_json(claim._me("second")._asdict()))
        second = claim.Claim(str(tmp_path), "claim", path.read_bytes(), 1)
        silence(second)
        first.check()
        with pytest.raises(claim.LostError, match="was taken over by first"):
            second.check()
        first.check()
        path.unlink()


def test_a_killed_process_of_this_machine_is_replaced_at_once(tmp_path, other, slow) -> None:
    folder = str(tmp_path)
    first = other(folder)
    with pytest.raises(claim.HeldError, match=f"someone, process {first.process.pid} on"), claim.hold(folder, "second"):
        pass
    os.kill(first.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, of which nobody has asked yet
    begin = time.monotonic()
    with claim.hold(folder, "second"):
        assert os.listdir(folder) == [".claim-00000002"]
    assert time.monotonic() - begin < claim.BEAT
    assert os.listdir(folder) == []


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path, slow) -> None:
    me = claim._me("first")
    assert me.lives()
    assert me._replace(started="1").lives() is False
    assert me._replace(place="another").lives() is None
    assert me._replace(host="another").lives() is None
    path = tmp_path / ".claim-00000007"
    path.write_bytes(store.sealed_json(me._replace(started="1")._asdict()))
    with claim.hold(str(tmp_path), "second"):
        assert os.listdir(tmp_path) == [".claim-00000008"]


def test_a_stopped_process_of_another_machine_is_replaced_and_told_when_it_wakes(tmp_path, other, quick) -> None:
    folder = str(tmp_path)
    first = other(folder, elsewhere="another boot pid:[1]", beat=0.1)
    assert first.check() == "mine"
    os.kill(first.process.pid, signal.SIGSTOP)
    with claim.hold(folder, "second") as second:
        silence(second)
        os.kill(first.process.pid, signal.SIGCONT)
        told = first.check()
        assert told.startswith(f"{folder} was taken over by second, process {os.getpid()} on")
        second.check()


def test_who_waits_comes_next(tmp_path, slow) -> None:
    folder = str(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with claim.hold(folder, "first"):

            def follow() -> float:
                with claim.hold(folder, "second", wait=300):
                    return time.monotonic()

            with pytest.raises(claim.HeldError), claim.hold(folder, "third", wait=0.3):
                pass
            answer = pool.submit(follow)
            time.sleep(0.3)
            released = time.monotonic()
        assert answer.result(300) >= released


def test_what_is_no_claim_of_ours_binds_as_long_as_it_moves(tmp_path, quick, capsys) -> None:
    (tmp_path / ".claim-00000003").write_bytes(b'{"job": "\x1b[31m')
    with claim.hold(str(tmp_path), "second") as second:
        silence(second)
        second.check()
    assert "claimed by an unknown job, process unknown on an unknown host; watching" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    assert "\x1b" not in str(claim._me("\x1b[31m"))


def test_a_reply_that_got_lost_does_not_lose_the_claim(tmp_path, slow, monkeypatch) -> None:
    create = store.create
    monkeypatch.setattr(store, "create", lambda path, data: create(path, data) and False)
    with claim.hold(str(tmp_path), "first") as first:
        first._renew()
        first.check()
        assert os.listdir(tmp_path) == [".claim-00000002"]


def test_a_storage_that_fails_for_a_while_does_not_lose_the_claim(tmp_path, quick, monkeypatch) -> None:
    tried = threading.Event()

    def fail(path: str, data: bytes) -> bool:
        tried.set()
        raise OSError("the storage is away")

    with claim.hold(str(tmp_path), "first") as first:
        with monkeypatch.context() as patch:
            patch.setattr(store, "create", fail)
            assert tried.wait(60)
        first.check()
        number = max(os.listdir(tmp_path))
        deadline = time.monotonic() + 60
        while max(os.listdir(tmp_path), default="") <= number:  # it renews again
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.check()


def test_a_folder_made_for_a_claim_goes_with_it_unless_something_is_in_it(tmp_path) -> None:
    with claim.hold(str(tmp_path / "a" / "b"), "first"):
        pass
    assert os.listdir(tmp_path) == []
    with claim.hold(str(tmp_path / "a" / "b"), "first"):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]


def test_claims_of_two_kinds_do_not_exclude_each_other(tmp_path) -> None:
    folder = str(tmp_path)
    with (
        claim.hold(folder, "train"),
        claim.hold(folder, "train", kind="writer"),
        claim.hold(folder, "evaluate", kind="evaluation"),
    ):
        assert all(claim.is_claim(name) for name in os.listdir(folder))
        assert len(os.listdir(folder)) == 3


def shards(out: str) -> object:
    return shard.shard(ShardRun(source="sim:balls-interaction", out=os.path.dirname(out), split=os.path.basename(out)))


def tables(out: str) -> object:
    return extract.extract(ExtractRun(checkpoint="nowhere", data="sim:balls-interaction", out=out))


def metrics(out: str) -> object:
    return evaluate.evaluate(EvaluateRun(checkpoint="nowhere", data="sim:balls-interaction", out=out))


def balls(out: str) -> object:
    return protocol.bouncing_balls_protocol(EvaluateRun(checkpoint="nowhere", out=out, protocol="bouncing-balls"))


def training(out: str) -> object:
    with loop.opened(dataclasses.replace(RUN, out=out)):
        raise AssertionError("it was opened")


def writing(out: str) -> object:
    return loop.train(dataclasses.replace(RUN, out=out))


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (shards, "claim"),
        (tables, "claim"),
        (metrics, "evaluation"),
        (balls, "evaluation"),
        (training, "claim"),
        (writing, "writer"),
    ],
)
def test_every_stage_refuses_a_folder_in_use_and_names_its_owner(stage, kind, tmp_path, other, monkeypatch) -> None:
    monkeypatch.setattr(extract, "plan", lambda run, out: (None, []))  # which needs a checkpoint
    monkeypatch.setattr(claim, "PATIENCE", 0.1)
    first = other(str(tmp_path), kind=kind)
    with pytest.raises(claim.HeldError, match=f"in use by someone, process {first.process.pid} on"):
        stage(str(tmp_path))
    assert os.listdir(tmp_path) == [f".{kind}-00000001"]
    assert first.check() == "mine"


def test_a_writer_that_waits_for_another_does_not_stand_still(tmp_path, other, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(watchdog, "watched", lambda who, seconds: contextlib.nullcontext(told.append))
    monkeypatch.setattr(claim, "PATIENCE", 1.0)
    other(str(tmp_path), kind="writer")
    with pytest.raises(claim.HeldError):
        writing(str(tmp_path))
    assert told.count("a look at who holds the folder") >= 2


def test_a_killed_training_leaves_a_folder_that_counts_as_empty_and_ends_as_undisturbed(tmp_path, other, slow) -> None:
    alone = dataclasses.replace(RUN, out=str(tmp_path / "alone"))
    with loop.opened(alone) as (run, _):
        loop.train(run)
    out = tmp_path / "out"
    for kind in ("claim", "writer"):
        other(str(out), kind=kind).kill()
    assert len(os.listdir(out)) == 2
    begin = time.monotonic()
    with loop.opened(dataclasses.replace(RUN, out=str(out))) as (run, _):
        assert time.monotonic() - begin < claim.BEAT * claim.LOOKS
        loop.train(run)
    assert not [name for name in os.listdir(out) if claim.is_claim(name)]
    one, two = (Path(alone.out), out)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("model.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-00000004/{name}"
        assert (one / path).read_bytes() == (two / path).read_bytes()


def test_a_writer_that_was_replaced_saves_nothing_more(tmp_path, slow) -> None:
    run: TrainRun = loop.open_run(dataclasses.replace(RUN, out=str(tmp_path), log_every=1))

    def steal(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            (mine,) = [path for path in tmp_path.iterdir() if claim.is_claim(path.name)]
            number = int(mine.name[-8:]) + 1
            path = tmp_path / f".writer-{number:08d}"
            path.write_bytes(store.sealed_json(claim._me("another")._asdict()))
            mine.unlink()

    with pytest.raises(claim.LostError, match="was taken over by another, process"):
        loop.train(run, loop.Worker(show=steal))
    assert checkpoint.last_step(run.out) == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000002"]


def test_a_checkpoint_does_not_count_when_the_folder_was_lost_while_it_was_written(tmp_path, slow, monkeypatch) -> None:
    run = loop.open_run(dataclasses.replace(RUN, out=str(tmp_path)))
    publish = store.publish

    def lose(path: str, data: bytes) -> Any:
        if path.endswith("step-00000004/COMPLETE"):
            for name in os.listdir(tmp_path):
                if claim.is_claim(name):
                    (tmp_path / name).unlink()
        return publish(path, data)

    monkeypatch.setattr(store, "publish", lose)
    with pytest.raises(claim.LostError, match="its claim is gone"):
        loop.train(run)
    assert checkpoint.last_step(run.out) == 2


def test_verify_reports_the_claims_of_the_dead_and_removes_them(tmp_path, other, capsys) -> None:
    store.publish_json(str(tmp_path / "metrics.json"), {"kind": "metrics"})
    (tmp_path / "report.html").touch()
    first = other(str(tmp_path), kind="evaluation")
    assert verify.verify(VerifyRun(path=str(tmp_path), clean=True, min_age=0)).startswith("ok: evaluation")
    told = capsys.readouterr().out
    assert f".evaluation-00000001: in use by someone, process {first.process.pid} on" in told
    assert first.check() == "mine"
    first.kill()
    with pytest.raises(ValueError, match="1 leftover"):
        verify.verify(VerifyRun(path=str(tmp_path)))
    assert f"claim of someone, process {first.process.pid} on" in capsys.readouterr().out
    assert verify.verify(VerifyRun(path=str(tmp_path), clean=True, min_age=0)).startswith("ok: evaluation")
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "report.html"]
