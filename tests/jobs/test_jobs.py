"""Every job answers --help and a flag typo; what it does is tested with the function that it calls."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import store
from pipeline.checkpoint import config_to_json
from pipeline.presets import PRESETS

JOBS = sorted((Path(__file__).resolve().parents[2] / "jobs").glob("*.py"))
POSITIONAL = {"benchmark.py": ["ddlp"], "sweep.py": ["iodine/debug"], "verify.py": ["DIR"]}
"""What a job wants before its flags; while that is missing, it speaks of nothing else."""


def start(monkeypatch: pytest.MonkeyPatch, job: Path, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [str(job), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(job), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_help_says_what_the_job_is_for(job, monkeypatch, capsys):
    assert start(monkeypatch, job, "--help") == 0
    out = capsys.readouterr().out
    assert "usage:" in out
    assert "--debug" in out


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_flag_typo_is_a_usage_error(job, monkeypatch, capsys):
    assert start(monkeypatch, job, *POSITIONAL.get(job.name, ()), "--outt", "x") == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("job", [job for job in JOBS if job.name.startswith("train_")], ids=lambda job: job.name)
def test_unknown_preset_lists_the_presets(job, monkeypatch, capsys):
    assert start(monkeypatch, job, "smal") == 2
    assert "small" in capsys.readouterr().err


@pytest.mark.parametrize("job", [job for job in JOBS if job.name.startswith("train_")], ids=lambda job: job.name)
def test_training_takes_stored_runs_of_its_family_alone(job, monkeypatch, capsys, tmp_path):
    family = job.stem.removeprefix("train_")
    other = "dlp" if family != "dlp" else "ddlp"
    for name in (family, other):
        fields = config_to_json(PRESETS[name]["debug"])
        store.publish_json(str(tmp_path / f"{name}.json"), {"family": name, "run": fields})
    assert start(monkeypatch, job, "--config", str(tmp_path / f"{family}.json"), "--help") == 0
    assert "--config FILE" in capsys.readouterr().out
    assert start(monkeypatch, job, "--config", str(tmp_path / f"{other}.json")) == 1
    assert f"is a run of {other}; give it to jobs/train_{other}.py" in capsys.readouterr().err


def test_job_runs_as_a_program_from_another_folder(tmp_path):
    job = next(job for job in JOBS if job.name == "quickstart.py")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where `env python` looks
    done = subprocess.run(
        [str(job), "--out", "gs://bucket/x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --out=gs://bucket/x is not supported")
    assert done.stderr.count("\n") == 1
