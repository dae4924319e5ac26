"""Bad input at the command line: each job ends with status 1 and one line that names the thing and the remedy.

What was there before stays as it was, byte for byte. In tests/pipeline: damage inside files in test_verify.py, bad
videos in test_poison.py and test_shard_faults.py, full disks and kills in test_exactly_once.py.
"""

import dataclasses
import hashlib
import json
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from objdyn import clips
from pipeline import loop, store
from pipeline import shard as sharding
from pipeline.config import EvaluateRun, ExtractRun, ShardRun, with_overrides
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.presets import PRESETS
from pipeline.quickstart import write_mp4
from pipeline.shard import shard
from tests import plain

RUN = with_overrides(
    PRESETS["ddlp"]["debug"],
    {"steps": 2, "checkpoint_every": 1, "eval_every": 0, "optim.batch_size": 2, "threads": 1, "device": "cpu"},
)

BALLISTIC = with_overrides(
    PRESETS["ssm"]["debug"], {"steps": 1, "checkpoint_every": 1, "eval_every": 0, "threads": 1, "device": "cpu"}
)


class World(NamedTuple):
    """Folders that the command lines name as {videos}, {data}, ..."""

    empty: Path
    texts: Path
    """notes.txt and a text named clip.mp4."""
    videos: Path
    """Two mp4 of 12 frames, 64 pixels."""
    data: Path
    """Split ``test`` and ``train``: clips of 6 frames."""
    short: Path
    """Split ``train``: clips of 3 frames."""
    small: Path
    """Split ``train``: frames of 32 pixels."""
    run: Path
    other_run: Path
    """The same with another seed."""
    ballistic: Path
    """A run of the state-space model on frames of 32 pixels."""
    tables: Path
    tmp: Path


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    """Tasks one after the other in this process: what is refused here is refused before or inside them."""

    with plain.without_ray():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> World:
    root = tmp_path_factory.mktemp("world")
    folders = World(*(root / name for name in World._fields))
    for folder in (folders.empty, folders.texts, folders.videos, folders.tmp):
        folder.mkdir()
    (folders.texts / "notes.txt").write_text("no video")
    (folders.texts / "clip.mp4").write_text("no video")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 12, 64, 64, 3), dtype=np.uint8)
    for name, frames in zip("ab", pixels, strict=True):
        write_mp4(str(folders.videos / f"{name}.mp4"), frames, 10.0)
    made = [(folders.data, "train", 6, 64), (folders.data, "test", 6, 64), (folders.short, "train", 3, 64)]
    for out, split, frames, size in [*made, (folders.small, "train", 6, 32)]:
        shard(ShardRun(source=str(folders.videos), out=str(out), split=split, frames=frames, size=size, workers=2))
    for out, seed in ((folders.run, 0), (folders.other_run, 1)):
        loop.train(loop.open_run(dataclasses.replace(RUN, data=str(folders.data), out=str(out), seed=seed)))
    loop.train(loop.open_run(dataclasses.replace(BALLISTIC, out=str(folders.ballistic))))
    extract(ExtractRun(str(folders.run), str(folders.data), str(folders.tables), batch_size=2, device="cpu"))
    break_copies(folders.run, folders.tmp)
    return folders


def break_copies(run: Path, tmp: Path) -> None:
    """Runs that are broken on purpose, made of the good one."""
    for name in ("incomplete", "mixed"):
        shutil.copytree(run, tmp / name)
    (tmp / "incomplete/checkpoints/step-00000002/COMPLETE").unlink()
    folder = tmp / "mixed/checkpoints/step-00000002"
    state = json.loads((folder / "state.json").read_text())
    state["model"]["pint_dim"] = 32
    data = store.json_bytes(state)
    complete = store.read_json(str(folder / "COMPLETE"))
    (folder / "state.json").write_bytes(data)
    complete["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.publish_json(str(folder / "COMPLETE"), complete)


def digests(world: World) -> dict[str, str]:
    folders = (world.videos, world.data, world.run, world.other_run, world.tables)
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def end(monkeypatch: pytest.MonkeyPatch, repository: Path, job: str, words: list[str]) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [job, *words])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(repository / "jobs" / job), run_name="__main__")
    return status.value.code


FAILURES = {
    # make_shards.py
    "source is missing": ("make_shards.py --source {tmp}/none --out {out}", ["{tmp}/none", "does not exist", "give"]),
    "source is empty": ("make_shards.py --source {empty} --out {out}", ["{empty}", "is empty", "give a folder"]),
    "no video there": ("make_shards.py --source {run} --out {out}", ["{run}", "correct the path or --layout"]),
    "nothing usable": (
        "make_shards.py --source {texts} --out {out}",
        ["clip.mp4", "{out}/train/quarantine.parquet"],
    ),
    "clips too short": ("make_shards.py --source {videos} --out {out} --frames 13", ["12 frames", "need 13"]),
    "crop leaves the frame": (
        "make_shards.py --source {videos} --out {out} --frames 2 --crop 0,0,65,64",
        ["crop 0,0,65,64", "64 wide"],
    ),
    "output holds another dataset": (
        "make_shards.py --source {videos} --out {data} --frames 5",
        ["{data}/train", "frames 6 there, 5 now", "another --out"],
    ),
    "output in the source": ("make_shards.py --source {videos} --out {videos}/o", ["{videos}", "move it out"]),
    "output below a file": ("make_shards.py --source {videos} --out {texts}/notes.txt --frames 6", ["notes.txt"]),
    # train_ddlp.py
    "training data are missing": (
        "train_ddlp.py debug --data {tmp}/none --out {out}",
        ["{tmp}/none", "make_shards.py"],
    ),
    "training on shards, not on a dataset": (
        "train_ddlp.py debug --data {data}/train --out {out}",
        ["one split", "give the folder above it"],
    ),
    "training windows longer than the clips": (
        "train_ddlp.py debug --data {short} --out {out}",
        ["clip_frames=6", "hold 3 frames", "lower clip_frames"],
    ),
    "frames of another size than the model's": (
        "train_ddlp.py debug --data {small} --out {out}",
        ["(1, 6, 3, 32, 32)", "--size 64"],
    ),
    "run folder in use": ("train_ddlp.py debug --data {data} --out {run}", ["{run}", "--resume", "another --out"]),
    "output folder holds other things": (
        "train_ddlp.py debug --data {data} --out {texts}",
        ["{texts}", "another --out"],
    ),
    "nothing to resume": (
        "train_ddlp.py debug --data {data} --out {out} --resume",
        ["{out}", "leave out --resume"],
    ),
    "resumed with another setting": (
        "train_ddlp.py debug --data {data} --out {run} --resume --seed 3",
        ["run.seed was 0 and is 3", "another --out"],
    ),
    # train_iodine.py, train_provide.py
    "a stage with windows longer than the clips": (
        "train_iodine.py debug --out {out} --stages steps=2 clip_frames=13",
        ["stage 2 ('clip_frames=13')", "clip_frames=13", "hold 12 frames", "lower clip_frames"],
    ),
    "training with what is for test only": (
        "train_iodine.py debug --out {out} --model.inference sequential",
        ["sequential", "per_frame"],
    ),
    "weights to start from are missing": (
        "train_provide.py debug --out {out} --init {tmp}/none",
        ["{tmp}/none", "give the --out"],
    ),
    "weights to start from of a family without slots": (
        "train_provide.py debug --out {out} --init {run}",
        ["{run}", "of family ddlp", "provide or iodine"],
    ),
    "unknown simulator": ("train_ddlp.py debug --data sim:moons --out {out}", ["'moons'", "sim:balls-interaction"]),
    # train_dlp.py
    "frames of an image": (
        "train_dlp.py small --out {out} --clip-frames 2",
        ["clip_frames=2", "1 frame"],
    ),
    # train_ssm.py
    "numbers of objects are missing": (
        "train_ssm.py debug --data {small} --out {out} --clip-frames 6",
        ["no truth 'num_objects'", "a dataset that has it", "model.known_count=false (--model.no-known-count)"],
    ),
    "more objects than the model has": (
        "train_ssm.py debug --data sim:cannonballs:balls=4,size=32 --out {out}",
        ["num_objects", "max_objects=3, got 4", "model.max_objects"],
    ),
    "frames that are not binary": (
        "train_ssm.py debug --data {small} --out {out} --clip-frames 6 --model.no-known-count --model.threshold None",
        ["must be binary", "model.threshold=0.5"],
    ),
    # extract.py, interpolate.py
    "checkpoint is missing": (
        "extract.py --checkpoint {tmp}/none --data {data} --out {out}",
        ["{tmp}/none", "give the --out"],
    ),
    "checkpoint without COMPLETE": (
        "extract.py --checkpoint {tmp}/incomplete --data {data} --out {out}",
        ["step-00000002", "no COMPLETE", "restore"],
    ),
    "checkpoint of another config": (
        "extract.py --checkpoint {tmp}/mixed --data {data} --out {out}",
        ["{tmp}/mixed", "do not fit this config"],
    ),
    "data to extract are missing": (
        "extract.py --checkpoint {run} --data {tmp}/none --out {out}",
        ["{tmp}/none", "correct"],
    ),
    "no such split": (
        "extract.py --checkpoint {run} --data {data} --split val --out {out}",
        ["no split 'val'", "it has test, train"],
    ),
    "context longer than the clips": (
        "extract.py --checkpoint {run} --data {data} --out {out} --context 7 --horizon 1",
        ["--context 7", "(6)", "lower it"],
    ),
    "context longer than a simulator's clips": (
        "extract.py --checkpoint {ballistic} --data sim:cannonballs:size=32 --out {out} --context 31 --horizon 1",
        ["--context 31", "(30)", "lower it"],
    ),
    "nothing between the seen frames": (
        "interpolate.py --checkpoint {ballistic} --data {data} --out {out} --context 4 --closing 2",
        ["--context 4 and --closing 2", "nothing to interpolate", "6 frames", "lower them"],
    ),
    "a gap for a family that cannot fill it": (
        "extract.py --checkpoint {run} --data {data} --out {out} --context 2 --closing 2",
        ["a ddlp model cannot interpolate", "(ssm)", "leave out --closing"],
    ),
    "frames of a size that the model cannot take": (
        "extract.py --checkpoint {ballistic} --data {data} --out {out}",
        ["64x64", "32x32", "--size 32"],
    ),
    "no edits there": (
        "extract.py --checkpoint {run} --data {data} --out {out} --context 2 --horizon 1 --edits {tmp}/none.json",
        ["--edits {tmp}/none.json", "no such file"],
    ),
    "edits are no list": (
        "extract.py --checkpoint {run} --data {data} --out {out} --context 2 --horizon 1 --edits {run}/last.json",
        ["--edits {run}/last.json", "JSON list of edits"],
    ),
    # what_if.py
    "no clip of that name": (
        "what_if.py --checkpoint {run} --data {data} --out {out} --clip nothing --select index:0 --remove --context 2",
        ["no clip 'nothing'", "among them"],
    ),
    "no particle of that number": (
        "what_if.py --checkpoint {run} --data {data} --out {out} --clip test-v00000-c0000 --select index:9 --remove "
        "--context 2",
        ["particle 9", "the model has 4"],
    ),
    "no particles to edit": (
        "what_if.py --checkpoint {ballistic} --data sim:cannonballs:size=32 --out {out} --clip test-000000 "
        "--select index:0 --remove",
        ["a ssm model has no particles", "(ddlp)"],
    ),
    "tables of another model there": (
        "extract.py --checkpoint {other_run} --data {data} --out {tables}",
        ["{tables}", "model_id", "another --out"],
    ),
    "tables of another split there": (
        "extract.py --checkpoint {run} --data {data} --split train --out {tables}",
        ["dataset_id", "another --out"],
    ),
    "output is a dataset": (
        "extract.py --checkpoint {run} --data {data} --out {data}/test",
        ["something else", "another --out"],
    ),
    # evaluate.py
    "nothing to evaluate": (
        "evaluate.py --checkpoint {tmp}/none --data {data} --out {out}",
        ["{tmp}/none", "give the --out"],
    ),
    "evaluation beyond the clips": (
        "evaluate.py --checkpoint {run} --data {data} --out {out} --context 4 --horizon 3",
        ["hold 6", "--horizon 2"],
    ),
    # verify.py, export.py, benchmark.py
    "nothing to verify": ("verify.py {tmp}/none", ["{tmp}/none"]),
    "a folder that is not ours": ("verify.py {texts}", ["{texts}"]),
    "export of what is no table": ("export.py --tables {run} --out {tmp}/x.parquet", ["{run}", "manifest.json"]),
    "export of an unknown column": (
        "export.py --tables {tables} --out {tmp}/x.parquet --columns colour",
        ["colour", "position"],
    ),
    "benchmark of an unknown family": ("benchmark.py dlpp", ["dlpp", "ddlp"]),
    "benchmark of an unknown preset": ("benchmark.py ddlp --preset ball", ["ball", "balls"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_job_names_the_thing_and_the_remedy_in_one_line(
    name: str,
    world: World,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, phrases = FAILURES[name]
    before = digests(world)
    folders = world._asdict() | {"out": tmp_path / "out"}
    job, *words = (word.format(**folders) for word in shlex.split(command))
    status = end(monkeypatch, repository, job, words)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 1, error
    assert len(lines) == 1, error
    assert error.splitlines()[-1] == lines[0]
    for phrase in phrases:
        assert phrase.format(**folders) in lines[0]
    assert "Traceback" not in error
    assert digests(world) == before
    assert [path.name for path in tmp_path.rglob("*.*")] in ([], ["quarantine.parquet"])


@pytest.mark.parametrize(
    ("command", "phrase"),
    [
        ("train_ddlp.py smal", "choose from debug, quickstart, small"),
        ("train_ddlp.py debug --optim.lrr 1", "--optim.lr"),
        ("extract.py --checkpont r --data d --out o", "--checkpoint"),
        ("extract.py --checkpoint r --data d --out o --closing 5", "closing was given without context; give both"),
        ("interpolate.py --checkpoint r --data d --out o --closing 0", "closing must be at least 1"),
        ("verify.py", "required"),
        ("make_shards.py --source a --out b --size 1", "size must be at least 2"),
        ("evaluate.py --checkpoint a --data b --out c --limit 0", "limit must be at least 1"),
        ("extract.py --checkpoint a --data b --out c --set num_slots=9", "written model.NAME=VALUE"),
        ("train_iodine.py debug --model.num-slots 1", "num_slots must be at least 2 (one object and the background)"),
        ("train_provide.py debug --model.num-refinements 0", "num_refinements must be at least 1, got 0"),
        ("train_provide.py debug --stages steps=2 model.num_slots=1", "stage 2 ('model.num_slots=1'): num_slots must"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2_and_a_hint(
    command: str, phrase: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, *words = shlex.split(command)
    assert end(monkeypatch, repository, job, words) == 2
    assert phrase in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_frames_of_a_single_channel_are_repeated_to_three_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_channel(*words: Any) -> Iterator[Any]:
        for clip in original(*words):
            yield dataclasses.replace(clip, frames=clip.frames[..., :1])

    preset = PRESETS["iodine"]["debug"]
    data, original = str(tmp_path / "data"), sharding._clips
    monkeypatch.setattr(sharding, "_clips", first_channel)
    for split in ("train", "val"):
        shard(ShardRun(source=preset.data, out=data, split=split, frames=12, size=32, limit=2))
    clips._say_once.cache_clear()
    capsys.readouterr()
    changes = {"data": data, "out": str(tmp_path / "run"), "steps": 2, "eval_every": 1, "optim.batch_size": 2}
    loop.train(loop.open_run(with_overrides(preset, {**changes, "threads": 1, "device": "cpu"})))
    settings: dict[str, Any] = {"split": "val", "context": 2, "limit": 1, "report_clips": 1, "device": "cpu"}
    metrics = evaluate(EvaluateRun(str(tmp_path / "run"), data, str(tmp_path / "out"), **settings))
    assert metrics["data"]["channels"] == 1
    assert [line for line in capsys.readouterr().err.splitlines() if "channel" in line] == [
        "note: frames of a single channel are repeated to three, red, green and blue alike"
    ]
