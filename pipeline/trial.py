"""Small trials of expensive work, from which its cost is estimated: some videos decoded, a few training steps taken.

Each trial runs in a process of its own, which may crash, hang or be killed for its memory without harm.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from pipeline import failpoints, isolate, store
from pipeline.config import ShardRun, TrainRun
from pipeline.machine import peak_memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from objdyn.datasets import Found, Video

SAMPLE_FILES = 8
"""Videos, or files that hold videos, of a sample."""
SAMPLE_CLIPS = 4
"""Clips that are cut from each video of a sample, spread over it."""
IMPORT_SECONDS = 60.0
"""How long a new process may take to import everything."""
LONG_STEP = 5.0
"""Seconds; a longer step is not taken again without what the first one has to set up."""
LOG_LINES = 20

Trial = Callable[..., Iterator[dict[str, Any]]]
"""A generator function of some module; what it yields must have a JSON form."""


def in_child(trial: Trial, *arguments: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield what a trial yields in a process of its own, for at most ``seconds`` after it has started.

    Raises:
        ChildProcessError: the process died.
        TimeoutError: it takes longer; it is killed.
        ValueError: the trial raised; the message is its error's.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, trial, arguments), daemon=True)
    process.start()
    theirs.close()
    deadline = time.monotonic() + IMPORT_SECONDS
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"it was not done after {seconds:.0f} s")
            try:
                kind, value = json.loads(ours.recv_bytes())  # not recv, which unpickles
            except EOFError:
                process.join()
                code = process.exitcode or 0
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                raise ChildProcessError(f"its process {how}") from None
            if kind == "start":
                deadline = time.monotonic() + seconds
            elif kind == "error":
                raise ValueError(value)
            elif kind == "end":
                return
            else:
                yield value
    finally:
        process.kill()
        process.join()
        ours.close()


def _answer(pipe: "Connection", trial: Trial, arguments: tuple[Any, ...]) -> None:
    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(json.dumps([kind, value]).encode())

    send("start", None)
    try:
        for result in trial(*arguments):
            send("result", result)
        send("end", None)
    except Exception as error:
        send("error", one_line(error))


def one_line(error: BaseException) -> str:
    """An error as a sentence, with its type where that says more than its message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


class Sample(NamedTuple):
    """Some videos of a source, decoded."""

    files: int
    """Videos of the whole source, or files that hold videos."""
    ignored: int
    """Other files."""
    videos: float
    """Videos of the whole source, estimated where files hold several."""
    read: list[dict[str, Any]]
    """What ``decode_videos`` found in each that can be used."""
    faults: list[str]
    """The others, with the reason."""
    unfinished: str
    """The video that was being decoded when the time was up; empty if all were done."""


def sample_source(run: ShardRun, seconds: float) -> Sample:
    """Decode videos spread evenly over a source with the code of ``make_shards.py``.

    Raises:
        ValueError: the source holds nothing of its layout, or a file cannot be opened.
    """
    root, found = _find_any_split(run)
    pending = _spread(found.videos, SAMPLE_FILES)
    read, faults, held, current = [], [], [], ""
    deadline = time.monotonic() + seconds
    while pending and (left := deadline - time.monotonic()) > 0:
        current, place = pending[0].source, 0
        try:
            for result in in_child(decode_videos, run, root, pending, seconds=left):
                if "begin" in result:
                    current, place = result["begin"], result["file"]
                elif "holds" in result:
                    held.append(result["holds"])
                elif "fault" in result:
                    faults.append(f"{result['video']}: {result['fault']}")
                else:
                    read.append(result)
            current, pending = "", []
        except TimeoutError:
            break
        except ChildProcessError as error:
            faults.append(f"{current}: {error}")
            current, pending = "", pending[place + 1 :]
    videos = len(found.videos) * (sum(held) / len(held) if held else 1.0)
    return Sample(len(found.videos), found.ignored, videos, read, faults, current)


def _find_any_split(run: ShardRun) -> tuple[str, "Found"]:
    """The videos of the first split that there is: any of them will do for a sample."""
    from pipeline.shard import find_videos

    failed = None
    for split in dict.fromkeys([run.split, "train", "val", "test"]):
        try:
            return find_videos(dataclasses.replace(run, split=split), run.source)
        except ValueError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def decode_videos(run: ShardRun, root: str, files: Sequence["Video"]) -> Iterator[dict[str, Any]]:
    """Trial: decode each video whole, then cut and encode some of its clips; what all of them would take."""
    import av  # noqa: F401  # before the limits, see shard._guarded

    from objdyn.datasets import LAYOUTS
    from pipeline.shard import READING_FAILS, SourceFiles, limits_of

    scan, source = LAYOUTS[run.layout].scan, SourceFiles(root)
    for place, file in enumerate(files):
        yield {"begin": file.source, "file": place}
        videos = [file]
        if scan is not None:
            try:
                with isolate.guarded(run.stall_seconds, run.max_memory_gb), isolate.decoding():
                    found = scan(file, source.open, limits_of(run))
            except (*READING_FAILS, MemoryError) as error:
                yield {"video": file.source, "fault": one_line(error)}
                continue
            finally:
                source.check()
            yield {"holds": len(found.videos)}
            yield from ({"video": fault.source, "fault": fault.message} for fault in found.faults)
            videos = _spread(found.videos, -(-SAMPLE_FILES // len(files)))
        for video in videos:
            yield {"begin": video.source, "file": place}
            try:
                with isolate.guarded(run.stall_seconds, run.max_memory_gb), isolate.decoding():
                    failpoints.reach("decode", f"probe {video.source}")
                    result = _decode(run, video, source.open)
            except (*READING_FAILS, MemoryError) as error:
                result = {"fault": one_line(error)}
            finally:
                source.check()
            yield {"video": video.source, **result}


def _decode(run: ShardRun, video: "Video", open_file: Callable[[str], BinaryIO]) -> dict[str, Any]:
    from objdyn.clips import to_sample
    from objdyn.datasets import LAYOUTS, Cut
    from pipeline.shard import limits_of

    layout, preprocessing, limits = LAYOUTS[run.layout], run.preprocessing(), limits_of(run)
    begin = time.perf_counter()
    probed = layout.probe(video, open_file, limits)
    probed_at = time.perf_counter()
    preprocessing.box(probed.height, probed.width)
    starts = preprocessing.starts(probed.frames)
    if not starts:
        raise ValueError(f"its {probed.frames} frames are too few for a clip that spans {preprocessing.span}")
    cuts = [Cut(f"sample-{number}", start) for number, start in enumerate(_spread(starts, SAMPLE_CLIPS))]
    stored = 0
    for clip in layout.read(probed, open_file, cuts, preprocessing, run.fps, limits):
        stored += sum(len(member) for member in to_sample(clip, run.codec).values())
    probe_seconds, read_seconds = probed_at - begin, time.perf_counter() - probed_at
    # Both passes decode all of it; what the second takes longer is the work on its few clips.
    per_clip = max(0.0, read_seconds - probe_seconds) / len(cuts)
    return {
        "frames": probed.frames,
        "height": probed.height,
        "width": probed.width,
        "fps": probed.fps or run.fps,
        "probe_seconds": probe_seconds,
        "clips": len(starts),
        "seconds": probe_seconds + read_seconds + per_clip * (len(starts) - len(cuts)),
        "bytes": stored / len(cuts) * len(starts),
    }


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly over their order."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def train_steps(run: TrainRun) -> Iterator[dict[str, Any]]:
    """Trial: training steps on one clip and on two, then what a checkpoint and a line of metrics take on disk.

    Two sizes tell what a further clip adds. The model is told that it is at the last step, where no part of it is left
    out any more.
    """
    import torch
    from torch import nn

    from objdyn import families
    from pipeline import perceptual
    from pipeline.config import torch_device

    device = torch_device(run.device, run.workers)
    if device.type == "cpu":
        torch.set_num_threads(run.threads or os.cpu_count() or 1)
    model = families.build(run.model).to(device).train()
    families.set_step(model, run.steps)
    distance = perceptual.open_distance(run, device)
    families.set_perceptual(model, distance and distance.distance)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.optim.lr, eps=run.optim.eps, fused=True)
    terms: dict[str, float] = {}
    for count in sorted({1, min(2, run.micro_batch_size)}):
        yield {"begin": count}
        video, inputs = _training_clips(run, count, device)
        seconds = math.inf
        while True:
            begin = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                loss = model(video, **inputs)
            loss.total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_norm or math.inf)
            optimizer.step()
            terms = {"loss": float(loss.total.detach()), **{name: float(term) for name, term in loss.terms.items()}}
            first, seconds = math.isinf(seconds), min(seconds, time.perf_counter() - begin)
            if not first or seconds > LONG_STEP:  # the first of its size also sets things up
                break
        result: dict[str, Any] = {"clips": count, "seconds": seconds, "gpu": "", "bytes": peak_memory()}
        if device.type == "cuda":
            taken = torch.cuda.max_memory_reserved(device)
            free = torch.cuda.mem_get_info(device)[0] + taken
            result |= {"gpu": torch.cuda.get_device_name(device), "bytes": taken, "free": free}
        yield result
    kept = [tensor for fields in optimizer.state_dict()["state"].values() for tensor in fields.values()]
    tensors = [tensor for tensor in [*model.state_dict().values(), *kept] if isinstance(tensor, torch.Tensor)]
    yield {"checkpoint": sum(tensor.numel() * tensor.element_size() for tensor in tensors), "line": _line_bytes(terms)}


def _training_clips(run: TrainRun, count: int, device: Any) -> tuple[Any, dict[str, Any]]:
    """Input of the model: black and white noise, or clips of the data where it takes more than frames."""
    import torch

    from objdyn import clips, families
    from pipeline.reader import iter_clips, open_source

    names = families.describe(run.model).inputs
    side = getattr(run.model, "image_size", None)
    if not names and side is not None:
        grey = 255 * torch.randint(0, 2, (count, run.clip_frames, 1, side, side), dtype=torch.uint8)
        return clips.to_model_input(grey.expand(-1, -1, 3, -1, -1), device), {}
    if not run.data:
        raise ValueError(f"the model takes {', '.join(names)} with its frames; give --data, a dataset that holds them")
    source = open_source(run.data, "train", loader=run.loader)
    chosen = list(iter_clips(source, limit=count, length=run.clip_frames, truth=names))
    return clips.to_model_input(clips.collate(chosen), device), {**clips.stack_truth(chosen, names, device)}


def _line_bytes(terms: dict[str, float]) -> float:
    """Bytes that a line of metrics adds to a run folder, in ``metrics.jsonl`` and in TensorBoard's events."""
    from pipeline.loop import CLOCK_FIELDS, MetricsLog

    line = {"kind": "train", "steps": LOG_LINES, **terms, "lr": 1e-3, **dict.fromkeys(CLOCK_FIELDS, 1.0)}
    sizes = []
    with tempfile.TemporaryDirectory(prefix="objdyn-") as folder, MetricsLog(folder, 0) as log:
        for first, last in ((0, 1), (1, 1 + LOG_LINES)):
            for step in range(first, last):
                log.write({**line, "step": step})
            log.sync()
            sizes.append(sum(os.path.getsize(os.path.join(folder, name)) for name in store.list_tree(folder)))
    return (sizes[1] - sizes[0]) / LOG_LINES
