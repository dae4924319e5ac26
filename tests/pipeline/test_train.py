"""The one test that starts Ray Train: two workers, one of them killed in the middle."""

import dataclasses
import json
import os
import signal
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, claim, loop, train
from pipeline.config import TrainRun, with_overrides
from pipeline.presets import PRESETS
from tests.processes import below

# the batch falls into the same micro-batches, so with the same noise, on one worker and on two
RUN = with_overrides(
    PRESETS["ddlp"]["debug"],
    {
        "optim.batch_size": 4,
        "optim.micro_batch_size": 2,
        "clip_frames": 4,
        "threads": 1,
        "steps": 8,
        "checkpoint_every": 2,
        "log_every": 2,
        "eval_every": 8,
        "device": "cpu",
    },
)


@pytest.mark.parametrize(
    ("cause", "wanted"), [(claim.HeldError("in use"), ChildProcessError), (claim.LostError("taken"), claim.LostError)]
)
def test_a_writer_that_has_not_ended_yet_is_waited_for_by_another_attempt(tmp_path, monkeypatch, cause, wanted) -> None:
    import ray.train.torch
    from ray.train import WorkerGroupError

    class Trainer:
        def __init__(self, *given: object, **named: object) -> None:
            pass

        def fit(self) -> None:
            raise WorkerGroupError(str(cause), {0: cause})

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2})
    for name in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "0")
    with claim.hold(str(tmp_path), "train") as held, pytest.raises(wanted, match=str(cause)):
        train._fit(dataclasses.replace(RUN, out=str(tmp_path)), held, use_gpu=False, gpus=1.0)


def worker_processes() -> list[int]:
    """Processes of this session's own Ray in which the training function runs."""
    return sorted(child for child, line in below(os.getpid()).items() if b"RayTrainWorker" in line)


def kill_a_worker_after_the_first_checkpoint(out: str, killed: list[int]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        if checkpoint.last_step(out) is not None:
            for process in worker_processes()[-1:]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)
        time.sleep(0.02)


def test_new_lines_of_metrics_are_shown_once_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = train._Lines(str(tmp_path))
    assert lines.new() == []
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 1, "kind": "eval"}\n{"step": 2, "ki')
    assert [line["kind"] for line in lines.new()] == ["train", "eval"]
    with path.open("a") as file:
        file.write('nd": "train"}\n')
    assert [line["step"] for line in lines.new()] == [2]
    path.write_text('{"step": 1, "kind": "train"}\n')  # back to the checkpoint at step 1
    assert lines.new() == []
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n{"step": 3, "kind": "train"}\n')
    assert [line["step"] for line in lines.new()] == [3]


def test_a_log_that_was_cut_and_has_outgrown_itself_between_two_looks_is_read_from_its_start(tmp_path: Path) -> None:
    path, lines = tmp_path / "metrics.jsonl", train._Lines(str(tmp_path))

    def write(*steps: int, rate: float) -> None:
        texts = (json.dumps({"step": step, "kind": "train", "steps_per_second": rate}) for step in steps)
        path.write_text("".join(f"{text}\n" for text in texts))

    write(1, 2, 3, rate=10.0)
    assert [line["step"] for line in lines.new()] == [1, 2, 3]
    write(1, 2, 3, 4, 5, rate=1.23456)  # another speed: lines of another length
    assert [line["step"] for line in lines.new()] == [4, 5]
    assert lines.offset == path.stat().st_size
    assert lines.new() == []


def test_restarts_are_counted_from_the_last_new_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, told, attempts = 0, list[str](), iter([0, 0, 1, 0, 0, 2, 0, 0, 0])  # new steps of each attempt

    def fit(*_: object) -> None:
        nonlocal reached
        reached += next(attempts)
        raise ChildProcessError("a training worker failed")

    monkeypatch.setattr(train, "_fit", fit)
    monkeypatch.setattr(checkpoint, "last_step", lambda out: reached or None)
    held = types.SimpleNamespace(check=lambda: None)
    with pytest.raises(ChildProcessError):
        train._fit_to_the_end(RUN, held, False, 1.0, lambda: False, told.append)  # pyright: ignore[reportArgumentType]
    # two, then three from the first new checkpoint on, then three and the one that is too much
    assert (len(told), reached, next(attempts, None)) == (8, 3, None)


def test_what_the_cluster_does_not_have_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "FREED_SECONDS", 0.0)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 5.0, "GPU": 1.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    train._say_what_is_missing({"CPU": 4.0, "GPU": 1.0})
    assert capsys.readouterr().err == ""
    train._say_what_is_missing({"CPU": 5.0, "GPU": 2.5})
    remedy = "add nodes, wait for other jobs, or start with fewer --workers"
    assert capsys.readouterr().err.splitlines() == [
        "waiting for 5 CPU slots; the cluster has 5 now, of which 4 are free: " + remedy,
        "waiting for 2.5 GPU slots; the cluster has 1 now, of which 1 are free: " + remedy,
    ]


def test_each_try_of_a_step_that_was_skipped_is_shown(tmp_path: Path) -> None:
    tries = [{"step": 3, "kind": "skipped", "not_finite": ["loss"], "clips": [key]} for key in "ab"]
    path, lines = tmp_path / "metrics.jsonl", train._Lines(str(tmp_path))
    shown = []
    for count in (1, 2, 0, 1, 2):  # the second time a restarted worker repeats them
        path.write_text("".join(f"{json.dumps(line)}\n" for line in tries[:count]))
        shown += lines.new()
    assert shown == tries


@pytest.mark.usefixtures("ray_local")
def test_two_workers_one_killed_equal_one_that_accumulates(tmp_path: Path) -> None:
    alone: TrainRun = dataclasses.replace(RUN, out=str(tmp_path / "alone"))
    loop.train(loop.open_run(alone))
    out = str(tmp_path / "together")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after_the_first_checkpoint, args=(out, killed), daemon=True)
    killer.start()
    assert train.train(dataclasses.replace(RUN, out=out, workers=2)) == out
    killer.join()
    assert killed

    one, two = checkpoint.load_last(alone.out), checkpoint.load_last(out)
    assert one is not None
    assert two is not None
    assert one.step == two.step == 8
    assert one.state["position"] == two.state["position"] == 32
    for name, tensor in one.model.items():
        # the two sum gradients in another order; Adam at lr 5e-4 turns that into at most this over 8 steps
        torch.testing.assert_close(two.model[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    steps = [line["step"] for line in loop.read_metrics(out) if line["kind"] == "train"]
    assert steps == [2, 4, 6, 8]
    assert (Path(out) / "report.html").stat().st_size > 1000
    assert not (Path(out) / ".ray").exists()
