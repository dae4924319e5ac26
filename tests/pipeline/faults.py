"""Kill every stage with SIGKILL wherever it writes, start it again, and compare with a run that nothing disturbed.

    python tests/pipeline/faults.py              a sample, as the tests run it
    python tests/pipeline/faults.py --all        every place, minutes
    python tests/pipeline/faults.py --ddlp       a small DDLP instead of a toy, four times slower

One process imports everything and forks another one for each life of a stage, which runs as its job runs it, with loops
in place of Ray. An experiment kills up to five lives at a failpoint, and lets the last one end. After each death
readers must refuse what is there with a message, or find in it only what they could find in the undisturbed run. In the
end every file must be the same, leaving out: temporary files of the dead, TensorBoard's event files, and the field
``loop.CLOCK_FIELDS`` in metrics.jsonl. The disk-full experiments do the same with an error in place of a death, which
must name the file and leave no temporary one. Last come two workers, one of which meets losses that are not finite.
"""

import argparse
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from objdyn import families
from objdyn.interface import Loss, Scene
from objdyn.models.ddlp import DDLPConfig
from pipeline import checkpoint, claim, cli, cluster, extract, failpoints, loop, shard, store, tables
from pipeline.config import ExtractRun, OptimConfig, ShardRun, TrainRun
from pipeline.quickstart import write_mp4
from pipeline.reader import iter_clips, open_source

NEEDED = ("pandas", "pyarrow.dataset", "safetensors.torch", "torch._dynamo", "torch.utils.tensorboard", "webdataset")
"""What each life would import anew."""
for name in NEEDED:
    importlib.import_module(name)
KILLS, LIVES = (1, 1, 5, 1, 2), 12
"""How often the experiments of a sample kill, in turn; and after how many lives one gives up."""
FULL_POINTS = ("write", "sync", "publish", "create", "append")
"""Points at which a disk can be full; the others are reached after the fact."""
SIZE, FRAMES = 32, 3


class ToyLatents(NamedTuple):
    position: Tensor
    background: Tensor


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    objects: int = 2


class Toy(nn.Module):
    """The smallest family: a linear map, with noise in training so that a wrong seed would show."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(3, 2 * config.objects), nn.Linear(2 * config.objects, 3)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, video: Tensor) -> Loss:
        latents = self.encode(video)
        noise = torch.randn_like(latents.position) if self.training else 0.0
        error = (self.decode(latents._replace(position=latents.position + noise)).video - video).square().mean()
        return Loss(error, {"recon": error.detach()})

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> ToyLatents:
        colour = video.mean((-1, -2))
        return ToyLatents(self.inward(colour).unflatten(-1, (-1, 2)), colour)

    def rollout(self, latents: ToyLatents, horizon: int, *, generator: torch.Generator | None = None) -> ToyLatents:
        return ToyLatents(*(field[:, -1:].repeat(1, horizon, *[1] * (field.ndim - 2)) for field in latents))

    def decode(self, latents: ToyLatents, components: bool = False) -> Scene:
        colour = self.outward(latents.position.flatten(2)).sigmoid()
        return Scene(colour[..., None, None].expand(*colour.shape, SIZE, SIZE))


families.FAMILIES["toy"] = families.Family(
    config=ToyConfig,
    model=Toy,
    inputs={},
    verbs=("forward", "encode", "rollout", "decode"),
    causal=True,
    tracked=True,
    object_columns=("position",),
    frame_columns=("background",),
)
DDLP = DDLPConfig(
    image_size=SIZE,
    patch_size=8,
    num_particles=2,
    num_proposals=4,
    prior_channels=(4, 4),
    encoder_channels=(4, 4),
    feature_dim=2,
    background_dim=2,
    max_frames=2,
    burn_in_frames=1,
    pint_dim=8,
    pint_layers=1,
    pint_heads=2,
    ramp_steps=4,
)


def without_ray() -> None:
    """Put plain loops in the places of Ray's, and leave out what only a loss of power makes necessary."""

    def schedule(job: extract.Job, todo: list[extract.Part], workers: int) -> Iterator[dict[str, Any]]:
        extractor = extract.Extractor(job)
        for part in todo:
            answer = extractor({name: np.array([value]) for name, value in dataclasses.asdict(part).items()})
            yield {name: values[0] for name, values in answer.items()}

    shard._run_tasks = lambda task, items, label: {i: task(item) for i, item in enumerate(items)}
    extract._schedule = schedule
    cluster.connect = lambda *args, **kwargs: None
    cluster.require_shared = lambda paths: None
    os.fsync = lambda descriptor: None
    claim.BEAT = 3600.0  # where a life is slow, it must not pass more places than another


# What is done, and what a reader then sees


class Stage(NamedTuple):
    name: str
    begin: Callable[[str], None]
    """Puts what is there before the first life into an empty folder."""
    run: Callable[[str], None]
    """One life: the stage with its output in the folder."""
    look: Callable[[str], set[str]]
    """What readers find in the folder; nothing where they refuse it."""


def shard_run(videos: str, out: str, split: str) -> ShardRun:
    return ShardRun(source=videos, out=out, split=split, frames=FRAMES, size=SIZE, clips_per_shard=2)


def train_run(model: Any, data: str) -> TrainRun:
    return TrainRun(
        model=model,
        data=data,
        steps=5,
        clip_frames=FRAMES,
        optim=OptimConfig(lr=5e-3, eps=1e-8, batch_size=2),
        threads=1,
        log_every=3,
        eval_every=2,
        eval_clips=2,
        checkpoint_every=2,
        keep_last=1,
    )


def train(run: TrainRun, out: str) -> None:
    """Start a run as its user would, and go on where the answer is that it has been started."""
    run = dataclasses.replace(run, out=out)
    try:
        run = loop.open_run(run)
    except ValueError as error:
        if "add --resume" not in str(error):
            raise
        run = loop.open_run(dataclasses.replace(run, resume=True))
    loop.train(run)


def look_at_shards(out: str) -> set[str]:
    source = open_source(out, "train")
    clips = iter_clips(source, limit=10**6, length=FRAMES)
    return {digest([source.id, [(clip.key, clip.frames.tobytes().hex()) for clip in clips]])}


def look_at_run(out: str) -> set[str]:
    saved = checkpoint.load_last(out)  # never refuses: a run could not go on
    found = {digest(lines_of(Path(out, "metrics.jsonl")))}
    if saved is not None:
        tensors = [item for part in (saved.model, saved.optimizer) for item in part.items()]
        content = [(name, digest(tensor.numpy().tobytes().hex())) for name, tensor in tensors]
        found |= {digest([saved.step, saved.state, content]), checkpoint.load_model(out).model_id}
    return found


def look_at_tables(out: str) -> set[str]:
    return {digest([read(out).to_pydict() for read in (tables.read_objects, tables.read_frames)])}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics without what the clock decides."""
    lines = loop.read_metrics(str(path.parent))
    return [{name: value for name, value in line.items() if name not in loop.CLOCK_FIELDS} for line in lines]


def files(out: str) -> dict[str, Any]:
    """Every file that must be the same in the end."""
    found: dict[str, Any] = {}
    for path in sorted(Path(out).rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not store.is_temporary(path.name) and not name.startswith("tensorboard/"):
            found[name] = lines_of(path) if name == "metrics.jsonl" else path.read_bytes()
    return found


# Lives and deaths


class Place(NamedTuple):
    """Where a rule fires: the nth time that a point is reached with a subject that contains a text."""

    point: str
    text: str
    nth: int


class Reference(NamedTuple):
    """What the undisturbed run did."""

    places: list[Place]
    seen: set[str]
    """Whatever a reader could find at some moment of it."""
    files: dict[str, Any]


@dataclasses.dataclass
class Count:
    experiments: int = 0
    injected: int = 0
    survived: int = 0
    wrong: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    """From a fault to the moment at which the work went on, where that is measured."""


class WrongError(Exception):
    """Silently wrong: somebody would have believed it."""


class Laboratory:
    """Runs experiments in one folder: paths of the output are part of what is compared."""

    def __init__(self, folder: str) -> None:
        self.out, self.counts = store.join(folder, "out"), store.join(folder, "counts")
        self.problems: list[str] = []

    def begin(self, stage: Stage) -> None:
        for folder in (self.out, self.counts):
            shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(self.counts)
        stage.begin(self.out)

    def live(self, work: Callable[[], object]) -> tuple[int, str]:
        """Run in a process of its own; return the signal that ended it, and what it said at its end."""
        note = Path(self.counts, "note")
        note.unlink(missing_ok=True)
        process = os.fork()
        if process:
            return os.WTERMSIG(os.waitpid(process, 0)[1]), note.read_text() if note.exists() else ""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            try:
                work()
            except BaseException as error:
                note.write_text(f"{type(error).__name__}: {cli._one_line(error)}")
            os._exit(0)

    def look(self, stage: Stage, reference: Reference) -> None:
        if strange := self.found(stage) - reference.seen:
            raise WrongError(f"a reader found {len(strange)} things that the undisturbed run never had")

    def found(self, stage: Stage) -> set[str]:
        try:
            return stage.look(self.out)
        except (ValueError, OSError) as error:
            if self.out not in str(error) or stage.look is look_at_run:
                raise WrongError(f"a reader refused without a clear message: {error}") from error
            return set()

    def observe(self, stage: Stage) -> Reference:
        """Run undisturbed, and note every place that it reaches."""
        reached: list[tuple[str, str]] = []
        seen: set[str] = set()
        path = Path(self.counts, "observed")

        def work() -> None:
            def reach(point: str, subject: str = "") -> None:
                text = re.sub(r"\.[0-9a-f]{32}\.tmp$", "", subject.removeprefix(f"{self.out}/"))
                reached.append((point, text))
                if point in ("published", "removed", "append"):
                    seen.update(self.found(stage))

            failpoints.reach = reach
            stage.run(self.out)
            path.write_text(json.dumps([reached, sorted(seen | self.found(stage))]))

        self.begin(stage)
        ended, note = self.live(work)
        assert not ended, f"{stage.name}: signal {ended}"
        assert not note, f"{stage.name}: {note}"
        pairs, found = json.loads(path.read_text())
        places = [
            Place(point, text, sum(p == point and text in t for p, t in pairs[: i + 1]))
            for i, (point, text) in enumerate(pairs)
        ]
        return Reference(places, set(found), files(self.out))

    def kill(self, stage: Stage, reference: Reference, rules: str, count: Count) -> None:
        """Live until a life ends by itself."""
        self.begin(stage)
        count.experiments += 1
        deaths = 0
        for _ in range(LIVES):
            ended, note = self.live(functools.partial(self.work, stage, reference, rules))
            if ended != signal.SIGKILL:
                break
            deaths += 1
        else:
            ended, note = 0, "it was killed without end"
        count.injected += deaths
        problem = note or (f"signal {ended}" if ended else "" if deaths else "nothing was killed")
        self.judge(stage, reference, rules, count, problem, deaths)

    def fill(self, stage: Stage, reference: Reference, place: Place, count: Count) -> None:
        """Find the disk full once, and do it again."""
        self.begin(stage)
        count.experiments += 1
        count.injected += 1
        rules = f"{place.point}:{place.text}=full*1@{place.nth}"
        ended, note = self.live(functools.partial(self.work, stage, reference, rules))
        above, name = os.path.split(place.text)
        # These two points are reached with a temporary name; claims have a dot of their own.
        final = store.join(self.out, above, name.removeprefix(".") if place.point in ("write", "sync") else name)
        kind, _, message = note.partition(": ")
        left = [path for path in Path(self.out).rglob("*") if store.is_temporary(path.name)]
        problem = ""
        if ended or kind not in ("OSError", "ValueError") or "No space left on device" not in message:
            problem = f"the full disk was answered by {note or 'nothing'!r}"
        elif final not in message or "\n" in message:
            problem = f"{message!r} does not name {final}"
        elif left:
            problem = f"{left[0]} was left behind"
        if not problem:
            ended, problem = self.live(functools.partial(self.work, stage, reference, rules))
        self.judge(stage, reference, rules, count, problem or (f"signal {ended}" if ended else ""), 1)

    def work(self, stage: Stage, reference: Reference, rules: str) -> None:
        self.look(stage, reference)
        failpoints.arm(rules, self.counts)
        stage.run(self.out)

    def judge(self, stage: Stage, reference: Reference, rules: str, count: Count, problem: str, faults: int) -> None:
        if not problem and (now := files(self.out)) != reference.files:
            differ = [name for name in now.keys() | reference.files if now.get(name) != reference.files.get(name)]
            problem = f"WrongError: {', '.join(sorted(differ))} differ in the end"
        if problem:
            self.problems.append(f"{stage.name}, {rules}: {problem}")
            count.wrong += problem.startswith(WrongError.__name__)
        else:
            count.survived += faults


def stages(folder: str, lab: Laboratory, model: Any) -> Iterator[tuple[Stage, Reference]]:
    """Each stage with its undisturbed run, on what the stages before it made."""
    videos, data, run_dir = (store.join(folder, name) for name in ("videos", "data", "run"))
    os.mkdir(videos)
    for name, length, tint in (("a.mp4", 6, 60), ("b.mp4", 10, 120)):
        frames = np.full((length, SIZE, SIZE, 3), tint, np.uint8)
        for i in range(length):
            frames[i, 4 + i : 12 + i, 8:16] = 220
        write_mp4(store.join(videos, name), frames, 25.0)

    def empty(out: str) -> None:
        """Begin with nothing."""

    def broken(kept: str, missing: Sequence[str], out: str) -> None:
        shutil.copytree(kept, out)
        for name in missing:
            os.unlink(store.join(out, name))

    def make_shards(out: str) -> None:
        shard.shard(shard_run(videos, out, "train"))

    stage = Stage("shard", empty, make_shards, look_at_shards)
    reference = lab.observe(stage)
    shutil.copytree(lab.out, data)
    yield stage, reference
    missing = ["train/shard-00001.tar", "train/index.parquet"]
    stage = stage._replace(name="shard (mend)", begin=functools.partial(broken, data, missing))
    yield stage, lab.observe(stage)

    assert lab.live(lambda: shard.shard(shard_run(videos, data, "val"))) == (0, "")
    stage = Stage("train", empty, functools.partial(train, train_run(model, data)), look_at_run)
    reference = lab.observe(stage)
    shutil.copytree(lab.out, run_dir)
    yield stage, reference

    def make_tables(out: str) -> None:
        job = ExtractRun(checkpoint=run_dir, data=data, out=out, split="val", context=2, horizon=2, device="cpu")
        extract.extract(job)

    stage = Stage("extract", empty, make_tables, look_at_tables)
    kept, reference = store.join(folder, "tables"), lab.observe(stage)
    shutil.copytree(lab.out, kept)
    yield stage, reference
    missing = ["objects/shard-00000.parquet", "parts/shard-00002.json"]
    stage = stage._replace(name="extract (mend)", begin=functools.partial(broken, kept, missing))
    yield stage, lab.observe(stage)


# Two workers, of which one meets what is not finite


def nan_loss(found: Loss, model: nn.Module) -> Loss:
    return found._replace(total=found.total * float("nan"))


def infinite_loss(found: Loss, model: nn.Module) -> Loss:
    return found._replace(total=found.total + float("inf"))  # the gradients stay finite, and say nothing


def loss_spike(found: Loss, model: nn.Module) -> Loss:
    return found._replace(total=found.total * 1e30)  # every gradient is finite, their norm is not


def nan_gradient(found: Loss, model: nn.Module) -> Loss:
    parameter = next(model.parameters())
    return found._replace(total=found.total + (parameter - parameter.detach()).norm().sqrt())  # adds 0


POISONS = {
    "NaN loss": (nan_loss, ["loss"]),
    "infinite loss": (infinite_loss, ["loss"]),
    "loss spike": (loss_spike, ["norm of all gradients"]),
    "NaN gradient": (nan_gradient, ["gradient of inward.weight"]),
}
BAD = (1, 3)
"""Tries of a step, counted from 0, that are poisoned."""


def work_in_pair(run: TrainRun, folder: str, rank: int, poison: Callable[..., Loss], bad: Sequence[int]) -> None:
    """Train as one of two workers; write the state before every try, the clips, and the error that ended it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    optimizers: list[torch.optim.Optimizer] = []
    states: list[str] = []
    keys: list[str] = []
    adam, real = torch.optim.Adam, loop._loss

    def observed_adam(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizers.append(adam(*args, **kwargs))
        return optimizers[0]

    def loss(model: Any, batch: Any, *args: Any) -> Loss:
        state = [model.module.state_dict(), optimizers[0].state_dict()["state"]]
        states.append(hashlib.sha256(repr(state).encode()).hexdigest())
        keys.extend(batch.keys)
        found = real(model, batch, *args)
        return poison(found, model.module) if rank == 1 and len(states) - 1 in bad else found

    torch.set_printoptions(profile="full", precision=17)
    torch.optim.Adam, loop._loss = observed_adam, loss
    error = ""
    try:
        loop.train(run, loop.Worker(rank=rank, world=2, wrap=nn.parallel.DistributedDataParallel))
    except FloatingPointError as stop:
        error = str(stop)
    Path(folder, f"worker-{rank}").write_text(json.dumps([states, keys, error]))


def pair(run: TrainRun, folder: str, poison: Callable[..., Loss], bad: Sequence[int]) -> list[Any]:
    """Run both workers in ``folder`` and return what each wrote."""
    os.makedirs(folder)
    run = loop.open_run(dataclasses.replace(run, out=store.join(folder, "run"), workers=2))
    processes = []
    for rank in range(2):
        processes.append(os.fork())
        if not processes[-1]:
            try:
                signal.alarm(100)  # a worker that waits for the other for ever is what this looks for
                work_in_pair(run, folder, rank, poison, bad)
            except BaseException as error:
                Path(folder, f"worker-{rank}").write_text(json.dumps([[], [], repr(error)]))
            os._exit(0)
    for process in processes:
        os.waitpid(process, 0)
    answers = [Path(folder, f"worker-{rank}") for rank in range(2)]
    return [json.loads(path.read_text()) if path.exists() else [[], [], "it waited for ever"] for path in answers]


def skip_together(run: TrainRun, folder: str) -> Iterator[tuple[str, Count, str]]:
    """Poison the loss of one worker of two; both must skip these steps and no other, and change nothing in them."""
    for number, (name, (poison, wanted)) in enumerate(POISONS.items()):
        place = store.join(folder, f"pair-{number}")
        (states, keys, error), (other_states, other_keys, other_error) = pair(run, place, poison, BAD)
        lines = [line for line in loop.read_metrics(store.join(place, "run")) if line["kind"] == "skipped"]
        unchanged = [i for i in range(len(states) - 1) if states[i] == states[i + 1]]
        clips = [set(keys[i : i + 1] + other_keys[i : i + 1]) for i in BAD]
        problem, error = "", error or other_error
        if error or states != other_states or len(states) != run.steps + len(BAD) or unchanged != list(BAD):
            problem = f"WrongError: {error or 'the workers went apart'}, unchanged in {unchanged}"
        elif [set(line["clips"]) for line in lines] != clips or any(line["not_finite"] != wanted for line in lines):
            problem = f"the log says {lines}"
        count = Count(1, len(BAD), 0 if problem else len(BAD), int(problem.startswith(WrongError.__name__)))
        yield f"2 workers, {name} on one", count, problem
    answers = pair(run, store.join(folder, "pair-stop"), nan_loss, range(100))
    errors = {error for _, _, error in answers}
    stopped = len(errors) == 1 and re.fullmatch(r"loss not finite 5 steps in a row, .*optim.clip_norm", errors.pop())
    yield "2 workers, NaN loss for ever", Count(1, 5, 5 if stopped else 0), "" if stopped else f"they said {answers}"


def rules_of(place: Place, places: Sequence[Place], kills: int, chance: random.Random) -> str:
    """Kill at a place, and again there or somewhere else, so often in all."""
    here = chance.randint(1, kills)
    other = chance.choice(places)
    rules = f"{place.point}:{place.text}=kill*{here}@{place.nth}"
    return rules if here == kills else f"{rules}; {other.point}:{other.text}=kill*{kills - here}"


def sample(places: Sequence[Place], chance: random.Random, each: int | None, ends: bool = False) -> list[Place]:
    """So many places of each point, and with ``ends`` its first or its last; or all places."""
    if each is None:
        return list(places)
    chosen: list[Place] = []
    for i, point in enumerate(dict.fromkeys(place.point for place in places)):
        here = [place for place in places if place.point == point]
        chosen += [here[-(i % 2)]] if ends else []
        chosen += chance.sample(here, min(each, len(here)))
    return list(dict.fromkeys(chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every place instead of a sample")
    parser.add_argument("--each", type=int, default=1, help="places of each point that are drawn for the sample")
    parser.add_argument("--only", default="", help="part of the names of the stages that are disturbed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample, and of where the later kills fall")
    parser.add_argument("--ddlp", action="store_true", help="train and extract with a small DDLP")
    parser.add_argument("--folder", help="where a temporary folder for all of it is made")
    parser.add_argument("--json", help="file that gets the counts")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    checkpoint.code_revision()  # of this moment, for all lives
    without_ray()
    gc.disable()  # a collection in a life would copy every page that it shares
    counts: dict[str, Count] = {}
    start = time.monotonic()
    table = "{:32} {:>12} {:>16} {:>9} {:>15}"
    print(table.format("stage", "experiments", "faults injected", "survived", "silently wrong"), flush=True)

    def done(name: str, count: Count) -> None:
        counts[name] = count
        print(table.format(name, *dataclasses.astuple(count)), flush=True)

    with tempfile.TemporaryDirectory(prefix="faults-", dir=arguments.folder) as folder:
        lab = Laboratory(folder)
        each = None if arguments.all else arguments.each
        for stage, reference in stages(folder, lab, DDLP if arguments.ddlp else ToyConfig()):
            if arguments.only not in stage.name:
                continue
            count, mends = Count(), "(mend)" in stage.name
            for i, place in enumerate(sample(reference.places, chance, each, ends=not mends)):
                kills = KILLS[i % len(KILLS)] if each else 1 + i % max(KILLS)
                lab.kill(stage, reference, rules_of(place, reference.places, kills, chance), count)
            done(stage.name, count)
            if mends and not arguments.all:
                continue
            count = Count()
            for place in sample([place for place in reference.places if place.point in FULL_POINTS], chance, each):
                lab.fill(stage, reference, place, count)
            done(f"{stage.name}, disk full", count)
        for name, count, problem in skip_together(train_run(ToyConfig(), store.join(folder, "data")), folder):
            done(name, count)
            lab.problems += [f"{name}: {problem}"] if problem else []
    print(f"{time.monotonic() - start:.0f} s, seed {arguments.seed}")
    for problem in lab.problems:
        print(f"problem: {problem}")
    if arguments.json:
        found = {name: dataclasses.asdict(count) for name, count in counts.items()}
        Path(arguments.json).write_text(json.dumps(found))
    return 1 if lab.problems else 0


if __name__ == "__main__":
    sys.exit(main())
