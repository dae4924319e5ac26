"""The quickstart: its videos, its folders, its promise, and the whole road on a handful of clips."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from objdyn.clips import probe_video, read_video
from objdyn.simulators import SIMULATORS
from pipeline import loop
from pipeline import quickstart as module
from pipeline.cli import parse
from pipeline.config import EvaluateRun, ExtractRun, QuickstartRun, ShardRun, TrainRun
from pipeline.presets import PRESETS
from pipeline.quickstart import quickstart, write_mp4, write_videos


def test_mp4_gives_back_the_simulated_pixels(tmp_path):
    write_videos(str(tmp_path / "val"), "val", count=2, frames=12)
    files = sorted((tmp_path / "val").iterdir())
    assert [file.name for file in files] == ["val-000000.mp4", "val-000001.mp4"]
    simulator = SIMULATORS[module.SIMULATOR]
    for file, episode in zip(files, simulator.episodes("val", 0, 2, None), strict=True):
        video = read_video(str(file))
        assert video.fps == simulator.fps
        np.testing.assert_array_equal(video.frames, episode.clip(0, 12).frames)


def test_mp4_keeps_frame_count_and_odd_sizes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    write_mp4(str(tmp_path / "odd.mp4"), frames, 29.97)
    assert probe_video(str(tmp_path / "odd.mp4")).frames == 5
    np.testing.assert_array_equal(read_video(str(tmp_path / "odd.mp4")).frames, frames)


def test_each_start_without_out_takes_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [Path(module._new_folder("")) for _ in range(2)] == [
        tmp_path / module.FOLDER / "1",
        tmp_path / module.FOLDER / "2",
    ]


def test_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="already holds files"):
        quickstart(QuickstartRun(out=str(tmp_path)))
    assert (tmp_path / "kept").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_preset_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'smal'; choose from debug"):
        quickstart(QuickstartRun(out=str(tmp_path / "new"), preset="smal"))
    assert not (tmp_path / "new").exists()


def test_prediction_longer_than_the_videos_is_refused():
    with pytest.raises(ValueError, match="need videos of 70 frames, got frames=60"):
        QuickstartRun(context=10, horizon=60)


@pytest.mark.parametrize(("ours", "kept"), [(21.0, True), (20.9, False)])
def test_promise_is_kept_from_six_decibels(capsys, ours, kept):
    metrics = {"recon_psnr": ours, "constant_background_recon_psnr": 15.0}
    if kept:
        module._check_promise(metrics, 6.0, "report.html")
    else:
        with pytest.raises(ValueError, match=r"5\.9 dB above .*, the quickstart promises 6\.0; train longer"):
            module._check_promise(metrics, 6.0, "report.html")
    assert f"reconstruction {ours:.1f} dB, constant background 15.0 dB" in capsys.readouterr().out


def test_promise_without_a_number_says_why():
    metrics = {"recon_psnr": None, "constant_background_recon_psnr": 15.0, "reasons": {"recon_psnr": "not finite"}}
    with pytest.raises(ValueError, match="not finite"):
        module._check_promise(metrics, 6.0, "report.html")


def test_whole_road_runs_on_a_few_clips_and_its_commands_repeat_it(tmp_path, capsys, monkeypatch, ray_local):
    """Ray Train is left to its own test: here the same loop runs in this process."""
    trained: list[TrainRun] = []

    def train(run: TrainRun) -> str:
        trained.append(run)
        return loop.train(loop.open_run(run))

    monkeypatch.setattr("pipeline.train.train", train)
    out = tmp_path / "out"
    run = QuickstartRun(
        out=str(out),
        preset="debug",
        steps=2,
        train_videos=3,
        val_videos=2,
        test_videos=2,
        frames=16,
        context=4,
        horizon=10,
        promise_db=-100.0,
    )
    assert quickstart(run) == f"report: {out}/report/report.html"
    assert (out / "report" / "report.html").stat().st_size > 10_000
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert metrics["clips"] == 2
    assert metrics["med10"] is not None
    assert len(list((out / "tables" / "objects").glob("*.parquet"))) == 1

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    words = [shlex.split(line)[1:] for line in lines]
    assert [command[:2] for command in words] == [
        *[["python", "jobs/make_shards.py"]] * 3,
        ["python", "jobs/train_ddlp.py"],
        ["python", "jobs/extract.py"],
        ["python", "jobs/evaluate.py"],
    ]
    presets = {name: ("", preset) for name, preset in PRESETS["ddlp"].items()}
    assert parse(presets, words[3][2:], description="") == trained[0]
    for command, config in ((words[0], ShardRun), (words[4], ExtractRun), (words[5], EvaluateRun)):
        assert parse(config, command[2:], description="").out.startswith(str(out))
