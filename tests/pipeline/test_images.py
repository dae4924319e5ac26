"""Clips of one frame, and a family of images, on the whole road: shards, training, evaluation, tables."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from objdyn.families import FAMILIES
from pipeline import loop, shard
from pipeline.checkpoint import load_model
from pipeline.config import EvaluateRun, ShardRun, TrainRun, with_overrides
from pipeline.evaluate import evaluate
from pipeline.extract import clip_blocks
from pipeline.presets import PRESETS
from pipeline.reader import iter_clips, open_source

DATA = "sim:shapes:objects=2,size=32,side=7-9"


def debug(folder: Path, data: str, family: str = "dlp") -> TrainRun:
    run = dataclasses.replace(PRESETS[family]["debug"], out=str(folder), data=data)
    changes = {
        "clip_frames": 1,
        "steps": 2,
        "eval_every": 1,
        "checkpoint_every": 1,
        "optim.batch_size": 2,
        "threads": 1,
    }
    return with_overrides(run, {**changes, "log_every": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dlp"
    loop.train(loop.open_run(debug(folder, DATA)))
    return folder


@pytest.mark.parametrize("family", ["iodine", "dlp"])
def test_images_are_validated_as_they_are_trained_on(family: str, tmp_path: Path, trained: Path) -> None:
    folder = trained
    if family != "dlp":
        folder = tmp_path / family
        loop.train(loop.open_run(debug(folder, DATA, family)))
    lines = [line for line in loop.read_metrics(str(folder)) if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite([line["loss"], line["recon_psnr"], line["fg_ari"]]).all() for line in lines)
    assert "predict_psnr" not in lines[0]


def test_images_are_evaluated_without_prediction(trained: Path, tmp_path: Path) -> None:
    metrics = evaluate(EvaluateRun(str(trained), DATA, str(tmp_path), limit=3, report_clips=2, device="cpu"))
    assert metrics["horizon"] == 0
    assert metrics["family"] == "dlp"
    for key in ("recon_psnr", "constant_background_recon_psnr", "coverage_3px", "fg_ari", "matched_iou"):
        assert metrics[key] is not None, key
    assert metrics["predict_psnr"] is None
    assert metrics["reasons"]["predict_psnr"] == "family dlp does not predict: it has no rollout"
    assert metrics["reasons"]["swap_rate"] == "no object is visible in two frames of a clip"
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_particles_of_images_become_rows_with_tracks(trained: Path) -> None:
    loaded = load_model(str(trained))
    clips = list(iter_clips(open_source(DATA, "test"), limit=3))
    blocks = clip_blocks(loaded.model, FAMILIES["dlp"], clips, extras=("mask_summary",))
    assert [block.clip for block in blocks] == [clip.key for clip in clips]
    for block in blocks:
        assert block.kind == "posterior"
        assert block.latents["position"].shape == (1, 3, 2)
        assert block.latents["background"].shape == (1, 3)
        assert block.latents["track"].tolist() == [[0, 1, 2]]  # in the only frame every particle is its own track
        assert (block.latents["mask_area"] >= 0).all()


def test_shards_of_single_frames_are_read_as_the_simulator_draws_them(tmp_path: Path, ray_local: None) -> None:
    run = ShardRun(source=DATA, out=str(tmp_path), split="test", frames=1, size=32, limit=3)
    shard.shard(run)
    stored, drawn = (list(iter_clips(open_source(data, "test"), limit=3)) for data in (str(tmp_path), DATA))
    for one, other in zip(stored, drawn, strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert one.truth["positions"].tolist() == other.truth["positions"].tolist()
