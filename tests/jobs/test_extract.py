"""The command line of extract.py; what it does is in tests/pipeline/test_extract.py."""

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("given", "missing"), [("context", "horizon"), ("horizon", "context")])
def test_context_and_horizon_come_together(
    given: str, missing: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--checkpoint", "r", "--data", "d", "--out", "o", f"--{given}", "3"]
    monkeypatch.setattr(sys, "argv", ["extract.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "jobs" / "extract.py"), run_name="__main__")
    assert end.value.code == 2
    assert f"{given} was given without {missing}" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_missing_checkpoint_is_one_line(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--checkpoint", str(tmp_path / "run"), "--data", "sim:balls-interaction", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["extract.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "jobs" / "extract.py"), run_name="__main__")
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/run is neither a run folder")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
