"""What a trial of a sweep costs beyond its training, and what two at a time gain.

Each trial of a measured sweep has the same settings but for one that changes nothing, so that all take the same work.
The training itself is the same run by ``loop.train`` in a process that has everything imported. The first trial of each
sweep, which pays for the start of Ray and of its process, is not counted.
"""

import dataclasses
import itertools
import os
import time
from typing import Any

from pipeline import loop, store
from pipeline.config import SweepRun, TrainRun, with_overrides
from pipeline.study import open_storage
from pipeline.timing import in_child, say, spread

TARGETS = {"in_process": 4.0, "separate": 16.0, "side_by_side": 1.6}
"""Most seconds per trial; least gain of two at a time."""
GOALS = {"in_process": 2.0, "separate": 10.0}
TRIALS, TRIALS_SEPARATE = 5, 3
LONG_SECONDS = 12.0
"""What one trial should take where two train side by side."""
IDLE = "model.kl_weight=log:0.999999:1.000001"
"""A setting to search that changes nothing that is measured, in ``iodine/debug``."""
PRESET = "iodine/debug"
SETTINGS = {"threads": 1, "device": "cpu", "log_every": 20, "checkpoint_every": 1000, "eval_every": 1000}

Report = dict[str, Any]


def measure(folder: str) -> Report:
    """Measure both kinds of trials, then two side by side; a folder for everything that is written."""
    from pipeline.presets import PRESETS

    family, _, name = PRESET.partition("/")
    run = with_overrides(PRESETS[family][name], {**SETTINGS, "steps": 20})
    say("sweep: the training alone")
    alone = [in_child(_alone, dataclasses.replace(run, out=os.path.join(folder, f"alone-{n}"))) for n in range(3)]
    bare, per_step = (spread([values[place] for values in alone]) for place in (0, 1))
    report: Report = {"preset": PRESET, "steps": run.steps, "training": bare._asdict()}
    for kind, trials in (("in_process", TRIALS), ("separate", TRIALS_SEPARATE)):
        say(f"sweep: {trials} trials, {kind.replace('_', ' ')}")
        out = os.path.join(folder, kind)
        gaps = in_child(_gaps, out, trials, run.steps, kind == "separate")
        overhead = spread([gap - bare.median for gap in gaps])
        report[kind] = {
            **overhead._asdict(),
            "target": TARGETS[kind],
            "goal": GOALS[kind],
            "met": overhead.median <= TARGETS[kind],
        }
    steps = max(run.steps, round(LONG_SECONDS / per_step.median))
    seconds = {}
    for count in (1, 2):
        say(f"sweep: {2 * TRIALS_SEPARATE} trials of {steps} steps, {count} at a time")
        seconds[count] = in_child(_throughput, os.path.join(folder, f"at-once-{count}"), steps, count)
    gain = seconds[1] / seconds[2]
    report["side_by_side"] = {
        "steps": steps,
        "seconds_per_trial": {str(count): value for count, value in seconds.items()},
        "ratio": gain,
        "target": TARGETS["side_by_side"],
        "met": gain >= TARGETS["side_by_side"],
    }
    return report


def table(report: Report) -> list[str]:
    """The lines of the benchmark's table."""
    bare = report["training"]["median"]
    lines = [
        f"sweep: seconds per trial of {report['preset']} beyond its training ({bare:.2f} s for {report['steps']} steps)"
    ]
    for kind, words in (("in_process", "in the trial's own process"), ("separate", "a Ray Train run for each")):
        found = report[kind]
        verdict = "met" if found["met"] else "missed"
        lines.append(
            f"  {words:28} {found['median']:6.2f} ({found['least']:.2f} - {found['most']:.2f})   "
            f"<= {found['target']:g} {verdict}, goal {found['goal']:g}"
        )
    found = report["side_by_side"]
    one, two = found["seconds_per_trial"]["1"], found["seconds_per_trial"]["2"]
    verdict = "met" if found["met"] else "missed"
    lines.append(
        f"  two one-thread trials at once end {found['ratio']:.2f} times as many ({one:.1f} s a trial one at a time, "
        f"{two:.1f} s two at a time)   >= {found['target']:g} {verdict}"
    )
    return lines


def _alone(run: TrainRun) -> tuple[float, float]:
    """Seconds of a training, and of one of its steps."""
    warm = dataclasses.replace(run, out=f"{run.out}-warm", steps=2)
    loop.train(loop.open_run(warm))
    begin = time.perf_counter()
    loop.train(loop.open_run(run))
    seconds = time.perf_counter() - begin
    rates = [line["steps_per_second"] for line in loop.read_metrics(run.out) if line["kind"] == "train"]
    return seconds, 1 / max(rates)


def _sweep(out: str, trials: int, steps: int, at_once: int, separate: bool) -> list[tuple[float, float]]:
    """Begin and end of each trial as the study has them, in seconds."""
    from pipeline.tune import sweep

    settings = tuple(f"{name}={value}" for name, value in SETTINGS.items() if name not in ("threads", "device"))
    sweep(
        SweepRun(
            PRESET,
            out=out,
            trials=trials,
            search=(IDLE,),
            set=(*settings, f"steps={steps}"),
            objective=("recon_psnr",),
            sampler="random",
            max_concurrent=at_once,
            threads=1,
            gpus=0.0,
            separate=separate,
        )
    )
    import optuna

    study = optuna.load_study(study_name="sweep", storage=open_storage(f"sqlite:///{store.join(out, 'study.db')}"))
    times = [(trial.datetime_start, trial.datetime_complete) for trial in study.trials]
    return [(begin.timestamp(), end.timestamp()) for begin, end in times if begin is not None and end is not None]


def _gaps(out: str, trials: int, steps: int, separate: bool) -> list[float]:
    """Seconds from the end of one trial to that of the next."""
    ends = sorted(end for _, end in _sweep(out, trials, steps, 1, separate))
    return [after - before for before, after in itertools.pairwise(ends)]


def _throughput(out: str, steps: int, at_once: int) -> float:
    """Seconds per trial of a sweep, from the end of the first ones on."""
    ends = sorted(end for _, end in _sweep(out, 2 * TRIALS_SEPARATE, steps, at_once, False))
    return (ends[-1] - ends[at_once - 1]) / (len(ends) - at_once)
