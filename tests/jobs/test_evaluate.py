import runpy
import sys
from pathlib import Path

import pytest


def test_missing_checkpoint_ends_with_one_line_and_status_1(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = ["--checkpoint", str(tmp_path / "nothing"), "--data", "sim:balls-interaction", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "jobs" / "evaluate.py"), run_name="__main__")
    message = capsys.readouterr().err
    assert end.value.code == 1
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert "nothing" in message
    assert not out.exists()


def test_protocol_needs_only_a_checkpoint(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.protocol.bouncing_balls_protocol", lambda run: f"tables of {run.checkpoint}")
    words = ["--checkpoint", "RUN", "--protocol", "bouncing-balls", "--out", str(tmp_path)]
    words += ["--set", "model.num_slots=9", "model.num_refinements=8"]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *words])
    runpy.run_path(str(repository / "jobs" / "evaluate.py"), run_name="__main__")
    assert capsys.readouterr().out == f"tables of RUN\n\nresults: {tmp_path}/protocol.json\n"


def test_checkpoints_to_compare_come_by_name(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "pipeline.object_dynamics.object_dynamics_protocol", lambda run: f"{run.checkpoint} and {run.compared()}"
    )
    words = ["--checkpoint", "RUN", "--protocol", "object-dynamics", "--out", str(tmp_path)]
    words += ["--compare", "provide=A", "iodine-linear=B"]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *words])
    runpy.run_path(str(repository / "jobs" / "evaluate.py"), run_name="__main__")
    told = "RUN and {'provide': 'A', 'iodine-linear': 'B'}"
    assert capsys.readouterr().out == f"{told}\n\nresults: {tmp_path}/protocol.json\n"
