"""A run that is asked to end, that hangs, or that goes on with something changed."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint, cli, failpoints, loop, report, stop, store, verify
from pipeline.config import TrainRun, VerifyRun, with_overrides
from pipeline.presets import PRESETS

RUN = with_overrides(
    PRESETS["iodine"]["debug"],
    {
        "optim.batch_size": 1,
        "threads": 1,
        "steps": 6,
        "checkpoint_every": 2,
        "log_every": 2,
        "eval_every": 3,
        "eval_clips": 1,
        "keep_last": 2,
        "device": "cpu",
    },
)


def run_in(folder: Path, **changes: Any) -> TrainRun:
    return with_overrides(dataclasses.replace(RUN, out=str(folder)), changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    loop.train(loop.open_run(run_in(folder)))
    return folder


def tensors_of(folder: Path) -> dict[str, bytes]:
    last = json.loads((folder / "last.json").read_text())
    place = folder / last["checkpoint"]
    return {name: (place / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def after_step(step: int, act: Callable[[], None]) -> loop.Worker:
    """Acts when the line of metrics of a step is there."""
    return loop.Worker(show=lambda line: act() if line["step"] == step else None)


def test_sigterm_saves_the_next_step_and_leaves_no_trace_in_what_follows(undisturbed: Path, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with pytest.raises(stop.Preempted, match=r"preempted at step 3 of 6, which is saved; .*--resume"):
        loop.train(loop.open_run(run_in(folder)), after_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) == before
    saved = checkpoint.load_last(str(folder))
    assert saved is not None
    assert (saved.step, saved.state["position"], saved.state["best"]) == (3, 3, None)
    assert loop.read_metrics(str(folder))[-1]["step"] == 3

    loop.train(loop.open_run(run_in(folder, resume=True)))
    assert tensors_of(folder) == tensors_of(undisturbed)
    assert (folder / "last.json").read_bytes() == (undisturbed / "last.json").read_bytes()
    names = [sorted(path.name for path in (place / "checkpoints").iterdir()) for place in (folder, undisturbed)]
    assert names[0] == names[1] == ["step-00000004", "step-00000006"]
    told = [[(line["kind"], line["step"]) for line in loop.read_metrics(str(p))] for p in (folder, undisturbed)]
    assert sorted(told[0]) == sorted([*told[1], ("train", 3)])


def test_the_file_stops_a_run_and_the_next_one_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stop, "LOOK_SECONDS", 0.01)

    def touch() -> None:
        (tmp_path / "run" / stop.FILE).touch()
        time.sleep(0.5)

    with pytest.raises(stop.Preempted, match="step 3 of 6"):
        loop.train(loop.open_run(run_in(tmp_path / "run", eval_every=0)), after_step(2, touch))
    with pytest.raises(ValueError, match="1 leftover"):
        verify.verify(VerifyRun(path=str(tmp_path / "run")))
    assert ".stop: asks the run to end" in capsys.readouterr().out
    loop.open_run(run_in(tmp_path / "run", eval_every=0, resume=True))
    assert not (tmp_path / "run" / stop.FILE).exists()


def test_retirement_keeps_two_regular_ones_beside_passing_ones(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def save(step: int, passing: bool = False) -> list[int]:
        state = {"family": "toy", "model": {}}
        checkpoint.save_checkpoint(
            str(tmp_path), step, model=model, optimizer=optimizer, state=state, keep_last=2, passing=passing
        )
        return sorted(int(path.name[-8:]) for path in (tmp_path / "checkpoints").iterdir())

    assert [save(step) for step in (10, 20, 30)][-1] == [20, 30]
    assert save(33, passing=True) == [20, 30, 33]
    assert save(37, passing=True) == [20, 30, 37]
    failpoints.arm("published:last.json=full")
    with pytest.raises(OSError, match=r"last\.json"):
        save(40)
    failpoints.arm("")
    checkpoint.retire(str(tmp_path), keep_last=2)  # as a run does that goes on
    assert save(50) == [40, 50]
    assert "passing" not in json.loads((tmp_path / "last.json").read_text())


@pytest.mark.parametrize(
    ("other", "answer"),
    [((1, 1, 1), (True, False, False)), ((0, 1, 1), (False, False, False)), ((1, 0, 0), (True, True, True))],
)
def test_workers_agree_in_one_reduction(
    other: tuple[int, ...], answer: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced: list[torch.Tensor] = []

    def all_reduce(flags: torch.Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MIN
        reduced.append(flags)
        flags.copy_(torch.minimum(flags, torch.tensor(other, dtype=flags.dtype)))

    monkeypatch.setattr(loop.dist, "all_reduce", all_reduce)
    assert loop._agree(torch.tensor(True), False, False, 2) == answer
    assert len(reduced) == 1


def test_a_job_ends_with_its_own_status_also_where_ray_raises_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    def waits(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    def waits_in_ray(_: Any) -> None:
        try:
            waits(None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    for function in (waits, waits_in_ray):
        with pytest.raises(SystemExit) as end:
            cli.main(function, VerifyRun, description="", positional=True, args=["x"])
        assert end.value.code == 75
        assert "error: preempted by SIGTERM; run the same command again" in capsys.readouterr().err


def test_a_driver_passes_sigterm_on_and_waits_no_longer_than_its_grace(tmp_path: Path) -> None:
    def drive() -> None:
        with stop.passed_on(str(tmp_path), 0.5) as were_told:
            assert not were_told()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # some send it twice
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not (tmp_path / stop.FILE).exists():
                time.sleep(0.01)
            assert were_told()
            time.sleep(10)

    with pytest.raises(stop.Preempted, match=r"not all workers had stopped 0\.5 s later"):
        drive()
    assert not (tmp_path / stop.FILE).exists()


def test_a_sigterm_of_its_own_that_comes_when_all_is_done_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overdue, send, on_sigterm = threading.Event(), signal.pthread_kill, stop.on_sigterm

    @contextlib.contextmanager
    def handled(act: Callable[[], None]) -> Iterator[None]:
        with on_sigterm(act):
            yield
            send(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(0.01)

    monkeypatch.setattr(signal, "pthread_kill", lambda *_: overdue.set())  # so late is the thread that sends it
    monkeypatch.setattr(stop, "on_sigterm", handled)
    with stop.passed_on(str(tmp_path), 0.05):
        os.kill(os.getpid(), signal.SIGTERM)
        assert overdue.wait(5)


def test_force_without_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--force needs --resume"):
        loop.open_run(run_in(tmp_path / "run", force=True))
    assert not (tmp_path / "run").exists()


HANGS = """
import sys
import threading
from pipeline import watchdog
with watchdog.watched("worker 3", 0.5) as moved:
    moved("step 7")
    import threading
    threading.Event().wait(30)
"""


def test_a_process_that_does_not_move_ends_and_says_where_it_stood() -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "worker 3 has not moved for 0.5 s (stall_seconds) since step 7" in done.stderr
    assert "threading.py" in done.stderr
    assert time.monotonic() - begin < 25


MOVES = """
import threading, time
from pipeline import watchdog
with watchdog.watched("worker 0", 4.0) as moved:
    for _ in range(12):
        time.sleep(0.5)
        moved("something")
deadline = time.monotonic() + 5
while threading.active_count() > 1 and time.monotonic() < deadline:
    time.sleep(0.01)
print(threading.active_count())
"""


def test_moving_in_time_keeps_a_process_alive() -> None:
    done = subprocess.run([sys.executable, "-c", MOVES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# Changed settings, code or data


def change_code(folder: Path) -> str:
    """Make the run one of another version of the software; return the file that differs."""
    path = str(folder / "config.json")
    config = store.read_json(path)
    config["code"]["objdyn/losses.py"] = "0" * 16
    store.publish_json(path, config)
    return "objdyn/losses.py"


def test_other_code_is_refused_by_name_unless_forced(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    name = change_code(folder)
    with pytest.raises(ValueError, match=rf"other code \({name}\); .*--force"):
        loop.open_run(run_in(folder, resume=True, steps=7))
    changes = {"resume": True, "force": True, "steps": 7, "optim.lr": 2e-3, "optim.eps": 1e-5, "eval_every": 0}
    loop.train(loop.open_run(run_in(folder, **changes)))
    (line,) = [line for line in loop.read_metrics(str(folder)) if line["kind"] == "forced"]
    assert line["step"] == 7
    assert "run.optim.lr was " in line["changes"][0]
    assert line["changes"][1] == f"code ({name})"
    assert "objdyn/losses.py" in report.troubles([line])
    saved = checkpoint.load_last(str(folder))
    assert saved is not None
    assert saved.state["optimizer"]["groups"][0]["eps"] == 1e-5
    verify.verify(VerifyRun(path=str(folder)))  # older checkpoints have the older settings
    again = {**changes, "force": False, "steps": 8}
    loop.open_run(run_in(folder, **again))


def test_a_run_of_a_version_without_digests_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    config = store.read_json(str(folder / "config.json"))
    del config["code"]
    store.publish_json(str(folder / "config.json"), config)
    loop.open_run(run_in(folder, resume=True))
    assert store.read_json(str(folder / "config.json"))["code"] == checkpoint.code_digests()


def test_other_data_is_refused_unless_forced_and_other_weights_always(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    other = {
        "resume": True,
        "steps": 7,
        "data": "sim:bouncing-balls:balls=3,size=32,colors=random4,frames=12",
        "eval_every": 0,
    }
    with pytest.raises(ValueError, match=r"trained on dataset sim:bouncing-balls.*--force"):
        loop.train(loop.open_run(run_in(folder, **other)))
    with pytest.raises(ValueError, match="do not fit"):
        loop.train(loop.open_run(run_in(folder, **other, force=True, **{"model.slot_dim": 7})))
    shutil.rmtree(folder)
    shutil.copytree(undisturbed, folder)
    loop.train(loop.open_run(run_in(folder, **other, force=True, **{"optim.batch_size": 4})))
    saved = checkpoint.load_last(str(folder))
    assert saved is not None
    assert saved.state["position"] == 12  # from 6 on to the next batch of four, and one of these
    (line,) = [line for line in loop.read_metrics(str(folder)) if line["kind"] == "forced"]
    assert re.fullmatch(r"data \(dataset was .*balls=2,.* and is .*balls=3,.*\)", line["changes"][-1])


def test_digests_follow_the_files_outside_a_checkout(tmp_path: Path) -> None:
    root = Path(checkpoint.__file__).parents[1]
    for name in ("objdyn", "pipeline"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert checkpoint.code_digests(str(tmp_path)) == checkpoint.code_digests()
    edited = tmp_path / "other"
    shutil.copytree(tmp_path / "objdyn", edited / "objdyn")
    shutil.copytree(tmp_path / "pipeline", edited / "pipeline")
    for name in ("objdyn/models/ddlp.py", "objdyn/datasets/npy.py", "pipeline/report.py"):
        with (edited / name).open("a") as file:
            file.write("# changed\n")
    before, after = checkpoint.code_digests(), checkpoint.code_digests(str(edited))
    assert {name for name in before if before[name] != after[name]} == {"objdyn/models/ddlp.py"}
