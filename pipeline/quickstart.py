"""The quickstart: what a user does with videos of their own, done on simulated ones in a few minutes.

    OUT/videos/{train,val}/*.mp4    lossless H.264, as videos come: without any truth
    OUT/data/{train,val,test}       shards; test comes from the simulator itself, whose true positions no mp4 can carry
    OUT/run  OUT/tables  OUT/report

Every stage is a call of the function that its job calls, and prints that job's command line.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from objdyn.simulators import SIMULATORS
from pipeline import cluster, store
from pipeline.cli import command
from pipeline.config import EvaluateRun, ExtractRun, QuickstartRun, ShardRun

SIMULATOR = "balls-interaction"
STAGES = 5
FOLDER = "quickstart-out"


@store.job_into_folder
def quickstart(run: QuickstartRun) -> str:
    """Simulate, shard, train, extract and evaluate into one folder.

    Returns:
        The line with the report's absolute path.

    Raises:
        ValueError: the folder is in use, or the reconstruction misses ``promise_db``.
    """
    from pipeline.evaluate import evaluate
    from pipeline.extract import extract
    from pipeline.presets import PRESETS
    from pipeline.shard import shard
    from pipeline.train import train

    presets = PRESETS["ddlp"]
    if run.preset not in presets:
        raise ValueError(f"unknown preset {run.preset!r}; choose from {', '.join(presets)}")
    out = _new_folder(run.out)
    videos, data, folder, tables, report = (
        store.join(out, name) for name in ("videos", "data", "run", "tables", "report")
    )

    workers = min(2, os.cpu_count() or 1)  # two with a thread each are faster than one with two
    cluster.connect(workers + 1)  # once for all stages; Ray Train wants a slot beside its workers'
    with _stage(1, f"simulate {run.train_videos} + {run.val_videos} videos of bouncing balls into {videos}"):
        for split, count in (("train", run.train_videos), ("val", run.val_videos)):
            write_videos(store.join(videos, split), split, count, run.frames)

    with _stage(2, "cut videos into clips and shards"):
        shards = ShardRun(source="", out=data, frames=run.frames, storage=run.storage)
        for split in ("train", "val"):
            files = replace(shards, source=store.join(videos, split), split=split)
            _say(shard, "make_shards.py", files)
        # One clip per episode: the first frames, as in the videos.
        hop = SIMULATORS[SIMULATOR].num_frames
        truth = replace(shards, source=f"sim:{SIMULATOR}", split="test", limit=run.test_videos, hop=hop)
        _say(shard, "make_shards.py", truth)

    with _stage(3, "train DDLP"):
        preset = presets[run.preset]
        steps = run.steps or preset.steps
        training = replace(preset, data=data, out=folder, seed=run.seed, steps=steps, workers=workers)
        training = replace(training, storage=run.storage)
        print(f"$ {command('jobs/train_ddlp.py', training, preset=run.preset, default=preset)}", flush=True)
        train(training)

    seen = {"checkpoint": folder, "data": data, "context": run.context, "horizon": run.horizon, "storage": run.storage}
    with _stage(4, "extract tables of object latents and predicted futures"):
        _say(extract, "extract.py", ExtractRun(**seen, out=tables))
    with _stage(5, "evaluate beside trivial baselines, and report"):
        measured = _say(evaluate, "evaluate.py", EvaluateRun(**seen, out=report))
        _check_promise(measured, run.promise_db, store.join(report, "report.html"))
    return f"report: {store.join(report, 'report.html')}"


def write_videos(folder: str, split: str, count: int, frames: int) -> None:
    """Write the first episodes of a simulated split as mp4 files."""
    for episode in SIMULATORS[SIMULATOR].episodes(split, 0, count, None):
        clip = episode.clip(0, frames)
        with tempfile.TemporaryDirectory(prefix="objdyn-") as scratch:
            path = os.path.join(scratch, "video.mp4")
            write_mp4(path, clip.frames, clip.fps)
            with open(path, "rb") as file:
                store.publish(store.join(folder, f"{clip.key}.mp4"), file.read())


def write_mp4(path: str, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (t, h, w, 3) frames as H.264 in RGB without loss, so that decoding gives back the same pixels."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.options = {"qp": "0", "preset": "veryfast"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _new_folder(out: str) -> str:
    if out:
        folder = store.resolve(out, "--out")
        if store.list_names(folder):
            raise ValueError(f"--out={folder} already holds files; name an empty folder or one that does not exist")
        return folder
    parent = store.resolve(FOLDER, "--out")
    os.makedirs(parent, exist_ok=True)
    number = 1
    while True:
        folder = os.path.join(parent, str(number))
        try:
            os.mkdir(folder)
        except FileExistsError:
            number += 1
        else:
            return folder


@contextlib.contextmanager
def _stage(number: int, title: str) -> Iterator[None]:
    print(f"[{number}/{STAGES}] {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"      {time.monotonic() - start:.0f} s\n", flush=True)


def _say(function: Callable[[Any], Any], job: str, run: Any) -> Any:
    print(f"$ {command(f'jobs/{job}', run)}", flush=True)
    result = function(run)
    if isinstance(result, str):
        print(result, flush=True)
    return result


def _check_promise(metrics: dict[str, Any], promise_db: float, report: str) -> None:
    ours, background = metrics["recon_psnr"], metrics["constant_background_recon_psnr"]
    if ours is None or background is None:
        raise ValueError(f"the promise cannot be checked: {metrics['reasons']}; look at {report}")
    gain = ours - background
    print(f"reconstruction {ours:.1f} dB, constant background {background:.1f} dB: {gain:+.1f} dB", flush=True)
    if gain < promise_db:
        raise ValueError(
            f"reconstruction is {gain:.1f} dB above the constant background, the quickstart promises {promise_db:.1f}; "
            f"train longer with --steps, and look at {report}"
        )
