"""Two jobs on one output folder: races of threads and of real jobs, owners that are killed, silenced and woken."""

import contextlib
import os
import random
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import claim, store

FAULT = "two jobs on one output folder"


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "disk" else request.getfixturevalue("s3_folder")


@pytest.mark.chaos
def test_at_most_one_holds_whatever_happens_to_the_others(
    fault: Callable[[str], Any], chance: random.Random, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight challengers again and again; some owners fall silent with their claim, as if their machine had died."""
    monkeypatch.setattr(claim, "BEAT", 0.25 if store.is_url(folder) else 0.05)
    monkeypatch.setattr(claim, "_place", lambda: uuid.uuid4().hex)  # nobody sees any process
    count, lock = fault(FAULT), threading.Lock()
    holders: list[claim.Claim] = []
    silent: list[tuple[claim.Claim, float]] = []
    seeds = [chance.randrange(10**6) for _ in range(8)]
    until = time.monotonic() + 25
    injected, survived = count.injected, count.survived

    def settle(taker: claim.Claim) -> None:
        """Judge what became of silent owners, once another has the folder."""
        with lock:
            judged = silent.copy()
            silent.clear()
        for old, since in judged:
            if not _lost(taker) and _lost(old):
                with lock:
                    count.recovered(time.monotonic() - since)
            else:
                with lock:
                    silent.append((old, since))

    def challenge(seed: int) -> None:
        own = random.Random(seed)
        while time.monotonic() < until:
            with contextlib.ExitStack() as stack:
                try:
                    held = stack.enter_context(claim.hold(folder, f"job {seed}"))
                except claim.HeldError as error:
                    named = re.search(r"is in use by job (\d+), process", str(error))
                    with lock:
                        if named or "an unknown job" not in str(error):  # it moved faster than it could be read
                            count.injected += 1
                            count.survived += named is not None and int(named[1]) in {*seeds} - {seed}
                    time.sleep(own.uniform(0, 0.1))
                    continue
                settle(held)
                with lock:
                    holders.append(held)
                    asked = holders.copy()
                time.sleep(own.uniform(0, 0.2))
                hold = [each for each in asked if not _lost(each)]
                # One may be replaced between its check and the next one's; who passes after another has, holds with it.
                both = len(hold) > 1 and any(not _lost(each) for each in hold[:-1])
                with lock:
                    count.wrong += both
                if own.random() < 0.3 and not _lost(held):  # dies without a word: the claim stays, nobody renews it
                    stack.pop_all()
                    with lock:
                        count.injected += 1
                    held._over.set()
                    held._thread.join()
                    with lock:
                        silent.append((held, time.monotonic()))
                else:
                    with lock:
                        holders.remove(held)
            time.sleep(own.uniform(0, 0.1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(challenge, seeds))
    with claim.hold(folder, "the last") as last:
        last.check()
        settle(last)
    assert not silent
    assert count.wrong == 0
    assert count.injected - injected > 5
    assert count.survived - survived == count.injected - injected
    assert store.list_names(folder) == []


def _lost(held: claim.Claim) -> bool:
    try:
        held.check()
    except claim.LostError:
        return True
    return False


def job(stage: str, out: Path, *more: str) -> list[str]:
    if stage == "training":
        words = ["-m", "pipeline.loop", "iodine/debug", "--steps", "6"]
        for setting in ("checkpoint_every=2", "eval_every=0", "threads=1", "device=cpu"):
            words += ["--set", setting]
    else:
        words = ["jobs/make_shards.py", "--source", "sim:balls-interaction", "--limit", "8", "--frames", "4"]
        words += ["--size", "64", "--clips-per-shard", "2", "--split", "train", "--workers", "1"]
    return [sys.executable, *words, "--out", str(out), *more]


def content(out: Path) -> dict[str, bytes]:
    paths = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".tar", ".parquet")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["shards", "training"])
def test_of_two_real_jobs_one_wins_and_when_it_is_killed_the_next_goes_on(
    fault: Callable[[str], Any], stage: str, tmp_path: Path, repository: Path
) -> None:
    count = fault(FAULT)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    alone, out, counts = tmp_path / "alone", tmp_path / "out", tmp_path / "counts"

    def finish(*words: str) -> str:
        done = subprocess.run(words, env=environment, cwd=repository, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    finish(*job(stage, alone))
    counts.mkdir()
    point = "publish:step-00000004/COMPLETE" if stage == "training" else "publish:shard-00001.tar"
    faults = {"OBJDYN_FAILPOINTS": f"{point}=hang", "OBJDYN_FAILPOINTS_DIR": str(counts)}
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    both = []
    for log in logs:
        with log.open("w") as file:
            both.append(
                subprocess.Popen(job(stage, out), env=environment | faults, cwd=repository, stdout=file, stderr=file)
            )
    try:
        deadline = time.monotonic() + 300
        while all(each.poll() is None for each in both):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ((loser, log),) = [pair for pair in zip(both, logs, strict=True) if pair[0].poll() is not None]
        (winner,) = [each for each in both if each.poll() is None]
        count.injected += 1
        told = log.read_text()
        assert loser.returncode == 1, told
        assert f"is in use by {'train' if stage == 'training' else 'make_shards'}, process {winner.pid} on" in told
        count.recovered()
        while not any(counts.iterdir()):  # in the middle of its work
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for each in both:
            each.kill()
            each.wait()
    count.injected += 1
    begin = time.monotonic()
    told = finish(*job(stage, out, *(["--resume"] if stage == "training" else [])))
    assert "watching whether it still works" not in told  # it saw at once that the owner is dead
    seconds = time.monotonic() - begin
    same = content(out) == content(alone)
    count.wrong += not same
    assert same
    count.recovered(seconds)
    assert not [path for path in out.rglob("*") if claim.is_claim(path.name)]
