"""Sweeps: Ray Tune trains the trials, an Optuna study says which and remembers them.

Why this shape. Ray's own ``OptunaSearch`` over a storage cannot be restored after a kill: the storage is ahead of what
Tune last saved of itself, and Tune then replays a trial that Optuna has closed (``UpdateFinishedTrialError``; tried on
Ray 2.60 with Optuna 5). ``Tuner.restore`` is a second truth beside the study, kept in pickles at intervals. So there is
one truth, the study, and three things that hold no state: a searcher that asks the study for the next trial and tells
it the end of each (``searcher.py``), a stopper that asks it whether to prune, and a new ``Tuner`` at every start for
the trials that are missing. What each of them would have remembered follows from the storage:

- which trials are missing: those asked for less those that are complete, pruned or failed;
- what an interrupted trial was: it is RUNNING in the study, with its settings; the next driver takes it over under its
  number. Failing it and enqueuing its settings again, as Optuna's own retry does, would list every interruption as a
  failed trial;
- how far it was: its run folder goes on from its own last checkpoint, as any run does (``loop.py``);
- what ASHA has seen: Optuna's ``SuccessiveHalvingPruner`` is asynchronous successive halving over the intermediate
  values in the storage. Tune's ``ASHAScheduler`` keeps its rungs in memory and would judge a resumed sweep by half of
  its trials;
- what the search has learnt: the samplers read the study. Only its random numbers are new after a restart.

Tune's folder, ``OUT/.ray``, holds pickles; it is never read and removed at the end. A trial of one worker trains in its
own process, which Tune keeps for the next one. A trial of several workers runs Ray Train inside, and its process takes
0.01 CPU: with a whole one, two trials on two cores would wait for each other for ever.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline import checkpoint, claim, cluster, loop, perceptual, space, status, store, sweep_report
from pipeline.cli import command
from pipeline.config import SweepRun, TrainRun, flatten_settings, parse_settings, torch_device, with_overrides
from pipeline.presets import PRESETS
from pipeline.space import COSTS, Objective
from pipeline.study import (
    SweepRecord,
    SweepStudy,
    TrialRecord,
    folder_of,
    picture_of,
    reading,
    shown,
    storage_file,
)
from pipeline.train import OWN_ERRORS, Show, ray_storage

PLAN_SCHEMA = 1
REDUCTION = 3
"""ASHA: one trial of so many goes on at each rung."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DRIVER_CPUS = 0.01
"""What the process of a trial takes that waits for its Ray Train workers."""


class Job(NamedTuple):
    """What every trial of a sweep is given."""

    run: TrainRun
    """The preset with the settings that all trials share."""
    out: str
    objectives: tuple[Objective, ...]
    seeds: int
    separate: bool
    """Whether a trial is a run of Ray Train in processes of its own."""
    gpus: float = 0.0
    """Of each worker; 0 trains on CPUs."""


@store.job_into_folder
def sweep(run: SweepRun) -> str:
    """Run a sweep, or what is missing of it, and return a summary for the terminal.

    Leaves ``sweep.json``, ``sweep.parquet``, ``best.json``, ``report.html`` and a run folder for each training in the
    sweep's folder.

    Raises:
        ValueError: settings that cannot work; a storage that cannot be opened; a folder that holds a sweep already, or
            another one than is resumed, or none.
        OSError: a disk is full, or a folder cannot be written; ``--resume`` goes on.
    """
    if run.force and not (run.resume or run.resume_if_exists):
        raise ValueError("--force goes with --resume: there is nothing yet that could have changed")
    base, shared, job_space, objectives = _prepare(run)
    out, location = _places(run)
    run = dataclasses.replace(run, out=out)
    with claim.hold(out, "sweep") as held:
        if run.resume_if_exists:
            with reading(location):
                run = dataclasses.replace(run, resume=run.resume or SweepStudy.is_in(location, run.study))
        _require_free(run, out, location)
        plan = _plan(run, base, shared, job_space, objectives)
        with reading(location):
            study = SweepStudy.open(
                location,
                run.study,
                plan=plan,
                space=job_space,
                objectives=objectives,
                wanted=run.trials,
                resume=run.resume,
                out=out,
            )
            study.require_code(checkpoint.code_digests(), run.force)
            _ = study.record(importance=False).best  # what is there must be a sweep's, before any of it is used
        print(f"sweep folder: {out}\nstorage: {shown(location)}", flush=True)
        for note in space.notes(job_space, shared, base, objectives):
            print(note, file=sys.stderr, flush=True)

        def write() -> SweepRecord:
            held.check()
            record = study.record()
            sweep_report.write_sweep(out, record, _best_run(out, record, base), commands=_commands(run, location))
            return record

        if study.missing:
            try:
                of_ray_train = run.separate or run.workers > 1
                forced = run.force or study.forced
                job = Job(dataclasses.replace(base, force=forced), out, objectives, run.seeds, of_ray_train)
                _run_trials(run, study, job, held)
            except BaseException:
                with contextlib.suppress(Exception):  # what stopped the sweep is what the user must hear of
                    write()
                raise
        record = write()
    if record.best is None:
        reason = next((trial.reason for trial in reversed(record.trials) if trial.reason), "all were pruned")
        raise ValueError(
            f"none of {record.wanted} trials is complete ({reason}); see {store.join(out, 'report.html')}, and start "
            "again in another --out"
        )
    return _summary(out, record)


def _prepare(run: SweepRun) -> tuple[TrainRun, dict[str, Any], space.Space, tuple[Objective, ...]]:
    """The run that trials vary, the settings in which it differs from its preset, the search space and the objectives,
    all checked."""
    family, _, name = run.preset.partition("/")
    if name not in PRESETS.get(family, {}):
        names = [f"{family}/{other}" for other in PRESETS.get(family, {})]
        names = names or [f"{other}/{next(iter(PRESETS[other]))}" for other in PRESETS]
        raise ValueError(f"there is no preset {run.preset!r}; choose FAMILY/PRESET, such as {', '.join(names)}")
    base = PRESETS[family][name]
    shared = parse_settings(run.set, base)
    own = {"data", "out", "resume", "resume_if_exists", "workers", "threads", "device"}
    if taken := sorted(name for name in shared if name in own or name.startswith("storage.")):
        raise ValueError(f"--set {taken[0]}: give --{taken[0]} itself")
    if not (run.data or base.data):
        raise ValueError(f"{run.preset} has no data of its own; give --data, a dataset folder or sim:NAME")
    base = with_overrides(base, {**shared, "data": run.data or base.data, "workers": run.workers})
    base = loop.resolve_paths(dataclasses.replace(base, storage=run.storage))
    words = list(run.search)
    if run.ready_made:
        given = {word.partition("=")[0] for word in words} | shared.keys()
        words += [word for word in space.ready_made(base) if word.partition("=")[0] not in given]
    perceptual.require(base)
    if base.init:
        checkpoint.load_weights(base.init)  # which raises where there are none, before any trial does
    found = space.parse_space(words, base)
    if run.min_steps is not None and run.min_steps > base.steps:
        raise ValueError(f"--min-steps {run.min_steps} is more than the {base.steps} steps of a trial; lower it")
    if both := sorted(found.keys() & shared.keys()):
        raise ValueError(f"{both[0]} is in --search and in --set; leave it out of one")
    return base, shared, found, _objectives(run, base)


def _objectives(run: SweepRun, base: TrainRun) -> tuple[Objective, ...]:
    reported = {name for name in loop.reported_metrics(base) if not name.startswith("copy_last")}
    words = run.objective or (next(name for name in space.DEFAULT_OBJECTIVES if name in reported),)
    objectives = tuple(Objective.parse(word) for word in words)
    names = [objective.name for objective in objectives]
    if len(set(names)) < len(names):
        raise ValueError(f"--objective names {next(n for n in names if names.count(n) > 1)} twice")
    for name in names:
        if name not in reported and name not in COSTS:
            known = ", ".join(sorted(reported))
            raise ValueError(
                f"--objective {name}: {run.preset} on {base.data} does not report it; it reports {known} on held-out "
                f"clips, and what it costs as {', '.join(COSTS)}"
            )
    if run.pruner == "asha" and names[0] in COSTS:
        raise ValueError(f"pruner=asha compares held-out metrics, and {names[0]} is none; leave out --pruner")
    return objectives


def _places(run: SweepRun) -> tuple[str, str]:
    """The sweep's folder and the location of its storage."""
    if (run.resume or run.resume_if_exists) and not run.out:
        flag = "--resume" if run.resume else "--resume-if-exists"
        raise ValueError(f"{flag} needs --out, the folder of the sweep to go on with")
    out = store.resolve(run.out, "--out") if run.out else loop.next_free_folder(run.preset.replace("/", "-"), "sweeps")
    location = run.study_storage or store.join(out, "study.db")
    if "://" not in location:
        location = store.resolve(location, "--study-storage")
        if location.endswith(".db"):
            location = f"sqlite:///{location}"
        elif not location.endswith(".journal"):
            raise ValueError(
                f"--study-storage {run.study_storage}: a file must end in .db (SQLite) or .journal, or be a URL"
            )
    if run.resume and not run.study_storage and not store.exists(store.join(out, "study.db")):
        raise ValueError(f"{out} holds no sweep (no study.db), so there is nothing to resume; leave out --resume")
    return out, location


def _require_free(run: SweepRun, out: str, location: str) -> None:
    """Refuse a folder that holds something else than the sweep that is asked for.

    Raises:
        ValueError: it does.
    """
    others = [n for n in store.list_names(out) if not (store.is_temporary(n) or claim.is_claim(n))]
    known = "study.db" in others and not run.study_storage and run.study == "sweep"  # SweepStudy.open says more of it
    if (file := storage_file(location)) and os.path.dirname(file) == out:  # of a start that was cut off, if alone
        name = os.path.basename(file)
        others = [other for other in others if other != name and not other.startswith((f"{name}-", f"{name}."))]
    if others and not run.resume and not known:
        there = {"trials", "sweep.json"} & set(others)
        what = "holds another sweep" if there else f"is not empty (it holds {others[0]}) and holds no sweep"
        raise ValueError(f"{out} {what}; choose another --out")


def _plan(
    run: SweepRun,
    base: TrainRun,
    shared: Mapping[str, Any],
    found: space.Space,
    objectives: Sequence[Objective],
) -> dict[str, Any]:
    """What a sweep is: all that must not change while it is under way. JSON."""
    from pipeline.reader import open_source

    first = base.eval_every if run.min_steps is None else run.min_steps
    pruned = {"min_steps": first, "reduction": run.reduction or REDUCTION} if run.pruner == "asha" else {}
    plan = {
        "schema": PLAN_SCHEMA,
        "preset": run.preset,
        "data": base.data,
        "dataset_id": open_source(base.data, "train", loader=base.loader).id,
        "space": {name: distribution.text for name, distribution in found.items()},
        "objectives": {objective.name: objective.direction for objective in objectives},
        "settings": shared,
        "run": flatten_settings(checkpoint.config_to_json(dataclasses.replace(base, out="", workers=1))),
        "sampler": run.sampler,
        "pruner": run.pruner,
        **pruned,
        "seed": run.seed,
        "seeds": run.seeds,
    }
    return json.loads(store.json_bytes(plan))


def _run_trials(run: SweepRun, study: SweepStudy, job: Job, held: claim.Claim) -> None:
    """Let Ray Tune train the trials that are missing."""
    slots = run.max_concurrent * run.workers
    cluster.connect(num_cpus=slots + 1)
    read = {job.run.stage(index).data for index in range(len(job.run.parsed_stages))}
    read |= {path for path in (job.run.init, *job.run.perceptual_weights) if path}
    cluster.require_shared([job.out, *sorted(path for path in read if not path.startswith("sim:"))])
    gpus = _gpus(run)
    threads = run.threads or job.run.threads or max(1, (os.cpu_count() or 1) // slots)
    job = job._replace(gpus=gpus, run=dataclasses.replace(job.run, threads=threads, device="cuda" if gpus else "cpu"))
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_RESULT_BUFFER_LENGTH": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    from ray import tune
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    # Ray would write the driver's keys into its logs, with each trial's environment. Nodes have their own.
    ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # of trials that fail the sweep says more itself

    from pipeline.searcher import StudyCallback, StudySearcher, StudyStopper

    teller = _Teller(study, run.preset.partition("/")[0])
    searcher = StudySearcher(study, job.out, teller, held.check)
    scratch = store.join(job.out, ".ray")
    store.remove_tree(scratch)
    resources = {"cpu": DRIVER_CPUS} if job.separate else {"cpu": 1, **({"gpu": gpus} if gpus else {})}
    trainable = tune.with_resources(tune.with_parameters(train_trial, job=job), resources)
    path, filesystem = ray_storage(job.out)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=study.missing,
            max_concurrent_trials=run.max_concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=".ray",
            storage_path=path,
            storage_filesystem=filesystem,
            stop=StudyStopper(searcher),
            callbacks=[StudyCallback(searcher, run.retries, teller.began_again)],
            failure_config=tune.FailureConfig(max_failures=run.retries),
            verbose=0,
        ),
    )
    with teller.status:
        try:
            tuner.fit()
        finally:
            if not held.lost:
                with contextlib.suppress(OSError):
                    store.remove_tree(scratch)
        if searcher.halted is not None:
            raise _plain(searcher.halted) from searcher.halted
    if study.missing:
        raise ChildProcessError(
            f"Ray ended with {study.missing} trials missing; what is there is kept: repeat the command with --resume"
        )


def train_trial(config: Mapping[str, Any], job: Job) -> None:
    """Train one configuration with each seed and report to Tune; see ``StudySearcher`` for what."""
    from ray import tune

    number, settings = config["number"], json.loads(config["settings"])
    folder = store.join(job.out, folder_of(number))
    seed_values: list[dict[str, float]] = []
    answer: dict[str, Any] = {"over": True, "step": 0, "value": math.nan, "seconds": 0.0}
    with store.using(job.run.storage), _only_trainer(folder, number):
        try:
            run = space.apply(job.run, settings)
            for index in range(job.seeds):
                path = store.join(folder, f"seed-{index}")
                resume = store.exists(store.join(path, "config.json"))
                one = dataclasses.replace(
                    run, out=path, seed=run.seed + index, resume=resume, force=run.force and resume
                )
                try:
                    _train(one, job, _reporter(one, job.objectives[0].name) if index == 0 else _silent)
                finally:
                    answer["seconds"] += _cost(path, "train_seconds")
                seed_values.append(_values(path, job.objectives))
                if index == 0:
                    answer["picture"] = _picture(one, folder, picture_of(number))
        except (claim.HeldError, claim.LostError) as error:  # says nothing of the settings: try again
            raise ChildProcessError(str(error)) from error
        except OWN_ERRORS as error:
            answer["failed"] = " ".join(str(error).split())
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            answer["halt"] = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    tune.report({**answer, "seed_values": json.dumps(seed_values)})


def _reporter(run: TrainRun, name: str) -> Show:
    """Tells Tune the objective of each held-out evaluation."""
    from ray import tune

    def show(line: Mapping[str, Any]) -> None:
        if line["kind"] == "eval" and name in line:
            seconds, last = _cost(run.out, "train_seconds"), line["step"] >= run.steps
            tune.report({"step": line["step"], "last": last, "value": line[name], "seconds": seconds})

    return show


def _silent(line: Mapping[str, Any]) -> None:
    """Later seeds of a configuration are not judged before they are done."""


def _train(run: TrainRun, job: Job, show: Show) -> None:
    if job.separate:
        # How often Ray Train looks after its workers, and so when it sees that they are done: 2 s of a short trial.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        from pipeline.train import train

        train(run, gpus=job.gpus, show=show)
        return
    from pipeline import report

    run = loop.open_run(run)
    with loop.progress_of(run) as progress:  # its lines go to the log that Ray keeps of this process

        def tell(line: dict[str, Any]) -> None:
            progress.show(line)
            show(line)

        loop.train(run, loop.Worker(device=torch_device(run.device), show=tell))
    report.write_run_report(run.out)


def _values(path: str, objectives: Sequence[Objective]) -> dict[str, float]:
    """A finished run's objectives. What it did not report is missing."""
    last = next((line for line in reversed(loop.read_metrics(path)) if line["kind"] == "eval"), {})
    found = {}
    for name in [objective.name for objective in objectives]:
        value = _cost(path, name) if name in COSTS else last.get(name)
        found[name] = math.nan if value is None else float(value)
    return found


def _cost(path: str, name: str) -> float:
    """One of ``COSTS`` of a run, from its lines of metrics."""
    if name == "parameters":
        import torch

        from objdyn import families

        run = checkpoint.config_from_json(TrainRun, store.read_json(store.join(path, "config.json"))["run"])
        with torch.device("meta"):
            return float(sum(p.numel() for p in families.build(run.model).parameters()))
    lines = [line for line in loop.read_metrics(path) if line["kind"] == "train"]
    rates = [line["steps_per_second"] for line in lines]
    if name == "step_seconds":
        return statistics.median(1 / rate for rate in rates) if rates else math.nan
    steps = [line["step"] for line in lines]
    return sum((after - before) / rate for before, after, rate in zip([0, *steps], steps, rates, strict=False))


def _picture(run: TrainRun, folder: str, name: str) -> str:
    """Draw what the model of a run makes of its first held-out clip; return the PNG's name in the sweep's folder.

    Empty if it cannot be drawn: a picture is not worth a trial.
    """
    from pipeline.evaluate import draw_first_clip

    try:
        picture = draw_first_clip(run.out, run.stage(len(run.parsed_stages) - 1))
    except Exception as error:
        print(f"no picture of {run.out}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return ""
    store.publish(store.join(folder, "clip.png"), picture)
    return name


def _gpus(run: SweepRun) -> float:
    """GPUs of each worker."""
    import ray

    if run.gpus is not None:
        found = ray.cluster_resources().get("GPU", 0)
        if run.gpus > 0 and found < run.gpus * run.workers and not cluster.is_joined():
            raise ValueError(f"--gpus {run.gpus:g} with --workers {run.workers}, but this machine has {found:g} GPUs")
        return run.gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= run.workers else 0.0


class _Teller:
    """Counts trials, and prints a line for each that is over."""

    def __init__(self, study: SweepStudy, family: str) -> None:
        self._study = study
        record = study.record(importance=False)
        over = sum(trial.state != "running" for trial in record.trials)
        self.status = status.Status("sweep", record.wanted, "trials", done=over, family=family)

    def __call__(self, number: int, what: str) -> None:
        record = self._study.record(importance=False)
        trial, best = record.trials[number], record.best
        if trial.state != "complete":
            self.status.counts[trial.state] += 1
        self.status.add(tell=False)
        left = status.duration(self.status.left)
        parts = [f"trial {number} {what}", *(f"{name} {value:.4g}" for name, value in trial.values.items())]
        if best is not None and len(record.objectives) == 1:
            parts.append(f"(best {best.values[record.objectives[0].name]:.4g}, trial {best.number})")
        parts += [_settings(trial), f"[{self.status.done}/{record.wanted}, {left} left]"]
        self.status.say("  ".join(parts))

    def began_again(self, number: int | None) -> None:
        """Count a trial whose process died, and say that another goes on with it."""
        self.status.add(0, tell=False, retries=1)
        self.status.say(f"trial {number}: its process died; it goes on from its checkpoint")


def _settings(trial: TrialRecord) -> str:
    return " ".join(f"{name}={_short(value)}" for name, value in trial.settings.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best_run(out: str, record: SweepRecord, base: TrainRun) -> dict[str, Any] | None:
    """The best trial's run as its folder has it, its first seed's, to be trained wherever the preset would be."""
    if record.best is None:
        return None
    stored = store.read_json(store.join(out, record.best.folder, "seed-0", "config.json"))
    return {"family": stored["family"], "run": stored["run"] | {"device": base.device, "threads": base.threads}}


def _commands(run: SweepRun, location: str) -> list[str]:
    """The command lines of this sweep, of a training with its best settings, and of the dashboard."""
    family = run.preset.partition("/")[0]
    again = dataclasses.replace(run, resume=False, resume_if_exists=False, study_storage=shown(run.study_storage))
    lines = [
        command("jobs/sweep.py", again, preset=run.preset, default=SweepRun(run.preset)),
        shlex.join(["python", f"jobs/train_{family}.py", "--config", store.join(run.out, "best.json"), "--out", "RUN"]),
    ]
    if location.startswith("sqlite:") or location.endswith(".journal"):
        lines.append(shlex.join(["optuna-dashboard", location, "--artifact-dir", store.join(run.out, "artifacts")]))
    return lines


def _summary(out: str, record: SweepRecord) -> str:
    counts = {state: sum(t.state == state for t in record.trials) for state in ("complete", "pruned", "failed")}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"{told} of {record.wanted} trials"]
    several = len(record.objectives) > 1
    for trial in record.front if several else record.front[:1]:
        values = ", ".join(f"{name} {value:.4g}" for name, value in trial.values.items())
        lines.append(f"{'Pareto front' if several else 'best'}: trial {trial.number}, {values}, {_settings(trial)}")
    lines.append(f"report: {store.join(out, 'report.html')}")
    return "\n".join(lines)


def _plain(error: Exception) -> Exception:
    """A reason to stop as one that the command line tells in a line."""
    text = " ".join(str(error).split()).partition(" (Background")[0]
    after = "what is complete is kept; repeat the command with --resume"
    if isinstance(error, ValueError):
        return error
    if "disk is full" in text or getattr(error, "errno", None) in NO_SPACE:
        return OSError(f"the disk is full ({text}); free some of it: {after}")
    return ValueError(f"the sweep stopped ({type(error).__name__}: {text}): {after}")


@contextlib.contextmanager
def _only_trainer(folder: str, number: int) -> Iterator[None]:
    """Hold a trial's folder, once a process that may still train it is gone, such as one whose driver was killed.

    Raises:
        ChildProcessError: it is not gone in time; another attempt may find it gone.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claim.hold(folder, f"trial {number} of a sweep", wait=claim.PATIENCE))
        except claim.HeldError as error:
            raise ChildProcessError(str(error)) from error
        yield


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['number']}-{trial.trial_id}"
