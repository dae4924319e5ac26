"""The benchmark's tools on tiny things: what it measures is checked, not how fast this machine is."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from objdyn.families import FAMILIES, build
from objdyn.models.ddlp import DDLPConfig
from objdyn.simulators import SIMULATORS
from pipeline import benchmark, checkpoint, extract, loop, reader, shard, store, sweep_timing, tables, timing
from pipeline.benchmark import Arm, Task, compare, render, steady
from pipeline.config import BENCHMARK_PARTS, BenchmarkRun, OptimConfig, ShardRun, TrainRun
from pipeline.presets import PRESETS

PRESET = PRESETS["ddlp"]["debug"]
assert isinstance(PRESET.model, DDLPConfig)
PARTICLES = PRESET.model.num_particles
CLIPS, FRAMES, PER_SHARD = 8, 6, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("benchmark"))
    benchmark.write_dataset(folder, CLIPS, FRAMES, 64, PER_SHARD)
    return folder


@pytest.fixture(scope="module")
def training(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps of the debug preset."""
    out = str(tmp_path_factory.mktemp("run") / "run")
    run = dataclasses.replace(PRESET, data=data, out=out, threads=1, eval_every=0, checkpoint_every=10**6, device="cpu")
    return {"run": run, "report": benchmark.measure_training(run, 2, 100)}


def test_steps_of_the_loop_are_split(training: dict[str, Any]) -> None:
    split, model = training["report"]["split"], build(PRESET.model)
    assert set(split["parts"]) == set(timing.STEP_PARTS)
    assert set(split["forward"]) == {name for name, _ in model.named_children()} | {"other"}
    assert sum(cost["seconds"] for cost in split["parts"].values()) == pytest.approx(split["seconds"], rel=0.01)
    inside = sum(cost["seconds"] for cost in split["forward"].values())
    assert inside == pytest.approx(split["parts"]["forward"]["seconds"])
    for name in ("forward", "backward", "optimiser"):
        assert split["parts"][name]["seconds"] > 0


def test_the_loop_measured_is_the_loop(training: dict[str, Any]) -> None:
    lines = loop.read_metrics(training["run"].out)
    assert lines[-1]["step"] == 3  # one that is not counted, and two
    assert training["report"]["steps"] == 2


def test_checksums_and_syncs_of_a_checkpoint_are_told(training: dict[str, Any]) -> None:
    saved = training["report"]["checkpoint"]
    assert 0 < saved["sha256_seconds"] + saved["sync_seconds"] < saved["seconds"]
    assert saved["share"] < 0.03 or not saved["met"]


def test_a_run_starts_in_the_middle_of_its_schedule(training: dict[str, Any], tmp_path: Path) -> None:
    few = OptimConfig(batch_size=1)
    run = dataclasses.replace(training["run"], out=str(tmp_path / "run"), steps=1, clip_frames=3, optim=few)
    benchmark.train_to(run, 10)
    assert checkpoint.last_step(run.out) == 10
    benchmark.train_bare(dataclasses.replace(run, steps=14, log_every=2, resume=True))
    steps, seconds = benchmark.counted_steps(run.out, after=10)
    assert steps == 2  # of the lines of steps 12 and 14 the first has the warm-up
    assert seconds > 0


def test_verbs_are_timed(training: dict[str, Any]) -> None:
    rows = benchmark.measure_verbs(training["run"], 2, FRAMES, 3, times=1)
    assert {"encode", "rollout", "decode"} <= set(rows)
    assert rows["rollout"]["frames"] == 3
    assert rows["encode"]["frames_per_second"] == pytest.approx(FRAMES * rows["encode"]["clips_per_second"])


def test_a_missing_verb_is_left_out(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "ddlp", FAMILIES["ddlp"]._replace(verbs=("forward", "encode", "decode")))
    assert "rollout" not in benchmark.measure_verbs(training["run"], 1, FRAMES, 3, times=1)


@pytest.mark.parametrize("family", ["ssm", "ed_lstm"])
def test_a_family_is_measured_on_the_simulator_that_it_trains_on(family: str, tmp_path: Path) -> None:
    few = OptimConfig(batch_size=2)
    preset = dataclasses.replace(PRESETS[family]["debug"], threads=1, device="cpu", eval_every=0, optim=few)
    bench = benchmark._Bench(BenchmarkRun(family, "debug"), preset, torch.device("cpu"), 1, str(tmp_path))
    assert bench.source == "cannonballs:balls=1-3,size=32,frames=30"
    assert bench.describe_data().startswith(
        "sim:cannonballs:balls=1-3,size=32,frames=30, 20 frames of 32x32, in shards"
    )
    run = bench._train_run()
    source = reader.open_source(run.data, "train")
    clip = next(reader.iter_clips(source))
    assert set(np.unique(clip.frames)) == {0, 255}
    rows = benchmark.measure_verbs(run, 2, 6, 3, times=1)
    assert ("interpolate" in rows) == (family == "ssm")
    assert benchmark.measure_training(run, 1, 100)["steps"] == 1


@pytest.mark.parametrize(
    ("family", "preset", "source"),
    [
        ("ddlp", "small", "balls-interaction"),
        ("ddlp", "clevrer", ""),  # of another size than the simulator that it has by default
        ("ssm", "cannonballs", "cannonballs:balls=1-3,size=48,frames=30"),
    ],
)
def test_a_preset_of_files_gets_balls_of_its_size(family: str, preset: str, source: str) -> None:
    run = PRESETS[family][preset]
    assert benchmark.own_source(run, run.model.image_size) == source


def test_a_family_without_other_code_has_no_reference() -> None:
    with pytest.raises(
        ValueError, match="ed_lstm has no part 'reference'; only ddlp, iodine, provide, oddn, ssm are compared"
    ):
        benchmark.benchmark(BenchmarkRun("ed_lstm", "debug", parts=("reference",)))
    assert "reference" not in benchmark._parts(BenchmarkRun("ed_lstm"))
    assert "reference" in benchmark._parts(BenchmarkRun("ssm"))


def test_reader_reads_whole_epochs_and_tells_the_share_of_hashing(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_use_one_core", lambda: True)  # which would stay with the other tests
    report = benchmark.measure_reader(data, batch=4, epochs=3)
    assert report["clips"] == CLIPS
    assert report["stage"]["least"] <= report["stage"]["median"] <= report["stage"]["most"]
    assert report["target"] == 2500
    assert 0 < report["integrity"]["share"] < 1


def test_bare_extraction_writes_the_parts_of_the_pipeline(data: str, training: dict[str, Any], tmp_path: Path) -> None:
    out = str(tmp_path / "tables")
    found = benchmark.measure_extraction(training["run"].out, data, out, 2, "cpu")
    assert found["clips"] == CLIPS - PER_SHARD  # the first part is not counted
    assert 0 < found["model_seconds"] < found["seconds"]
    assert found["sync_seconds"] > 0
    record = store.read_json(os.path.join(out, "parts", "shard-00001.json"))
    part = tables.read_part(os.path.join(out, "objects", "shard-00001.parquet"), record["objects"]["sha256"])
    assert part.num_rows == PER_SHARD * FRAMES * PARTICLES
    assert extract.clip_blocks.__module__ == "pipeline.extract"


def test_sharding_runs_on_any_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "VIDEOS_DRAWN", 2)
    monkeypatch.setattr(benchmark, "VIDEO_FRAMES", 10)
    source = str(tmp_path / "videos")
    benchmark.write_videos(source, 3)
    run = ShardRun(source=source, out="", frames=5, clips_per_shard=2)
    original = shard._run_all
    with ThreadPoolExecutor(1) as pool:
        for run_all in (benchmark.in_this_process, benchmark.over_processes(pool)):
            done = benchmark.shard_once(run, str(tmp_path / "shards"), run_all, 1)
            assert (done["probe"].amount, done["build"].amount) == (3, 6)
            assert done["all"].seconds == pytest.approx(done["probe"].seconds + done["build"].seconds)
            assert done["all"].start_up > 0
    assert not (tmp_path / "shards").exists()
    assert shard._run_all is original


def test_rate_is_that_of_the_time_when_all_work() -> None:
    tasks = [
        Task("a", 10, 12, 4),  # half of it before the other one begins
        Task("b", 11, 13, 4),
        Task("a", 12.5, 14.5, 4),
        Task("b", 13.5, 19, 4),  # alone at its end
    ]
    arm = steady(tasks, begin=8, slots=2)
    assert (arm.start_up, arm.seconds) == (3, 3.5)
    assert arm.amount == pytest.approx(2 + 4 + 4 + 4 * 1 / 5.5)


def test_synthetic_clips_have_the_size_and_the_truth(tmp_path: Path) -> None:
    benchmark.write_dataset(str(tmp_path), 2, 4, 128, 2)
    source = reader.open_source(str(tmp_path), "train")
    clip = next(reader.iter_clips(source))
    assert (source.height, source.width, source.num_frames) == (128, 128, 4)
    assert clip.truth["segmentation"].shape == (4, 128, 128)
    assert {"positions", "present", "num_objects"} <= set(clip.truth)
    assert f"{benchmark.SIMULATOR}-128" not in SIMULATORS


def test_pairs_alternate() -> None:
    order: list[str] = []
    results = benchmark.alternate("x", 3, lambda: order.append("stage"), lambda: order.append("bare"))
    assert order == ["bare", "stage", "stage", "bare", "bare", "stage"]
    assert len(results) == 3


def test_ratio_is_taken_inside_pairs() -> None:
    pairs = [(Arm(10, 10, 5), Arm(10, 8, 1)), (Arm(10, 100, 7), Arm(10, 50, 2)), (Arm(10, 20, 6), Arm(10, 19, 3))]
    report = compare(pairs, "clips/s", 0.75)
    assert report["ratio"] == pytest.approx({"median": 0.8, "least": 0.5, "most": 0.95})
    assert report["met"]
    assert report["stage"]["median"] == 0.5
    assert report["start_up"] == {"stage": 6, "bare": 2}


def test_ratio_is_per_process() -> None:
    report = compare([(Arm(40, 10, slots=4), Arm(10, 10, slots=1))], "clips/s", 0.9)
    assert report["ratio"]["median"] == 1


def test_two_workers_make_the_passes_of_one_and_then_share_one_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def compared(label: str, times: int, two: Callable[[], Arm], one: Callable[[], Arm]) -> list[tuple[Arm, Arm]]:
        return [(two(), one())]

    def together(run: TrainRun, rank: int, meeting: str) -> None:
        passes.append((run.workers, run.optim.batch_size, run.micro_batch_size))

    passes: list[tuple[int, int, int]] = []
    monkeypatch.setattr(benchmark, "alternate", compared)
    monkeypatch.setattr(benchmark, "in_child", lambda function, *rest: {"seconds": {"median": 4.0}})
    monkeypatch.setattr(benchmark, "new_processes", lambda world: ThreadPoolExecutor(1))
    monkeypatch.setattr(benchmark, "train_together", together)
    monkeypatch.setattr(benchmark, "counted_steps", lambda out, after: (passes[-1][0], 1.0))
    monkeypatch.setattr(benchmark.shutil, "copytree", lambda old, new: new)
    preset = dataclasses.replace(PRESETS["iodine"]["debug"], optim=OptimConfig(batch_size=8, micro_batch_size=2))
    run = BenchmarkRun("iodine", "debug", parts=("workers",))
    report = benchmark._Bench(run, preset, torch.device("cpu"), 1, str(tmp_path)).workers()
    assert passes == [(2, 4, 2), (2, 4, 2), (1, 4, 2), (2, 2, 1), (2, 2, 1), (1, 2, 2)]
    assert (report["clips"], report["halved"]["clips"]) == (4, 2)
    assert (report["target"], report["met"], report["halved"]["met"]) == (1.6, True, None)
    assert [line.split()[0] for line in benchmark._stage_table({"workers": report}, None)[2:4]] == ["workers", "halved"]


def report_of(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    def measured(run: TrainRun, steps: int, every: int) -> dict[str, Any]:
        return training["report"]

    monkeypatch.setattr(benchmark, "in_child", lambda function, *rest: measured(*rest))
    monkeypatch.setattr(benchmark._Bench, "_from_the_middle", lambda bench: bench._train_run())
    path = tmp_path / "numbers.json"
    run = BenchmarkRun("ddlp", "debug", str(path), ("train",), steps=2, threads=1, device="cpu")
    return benchmark.benchmark(run), store.read_json(str(path))


def test_numbers_and_table_of_a_run(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, report = report_of(training, monkeypatch, tmp_path)
    assert (report["kind"], report["family"], report["preset"]) == ("benchmark", "ddlp", "debug")
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"] == torch.__version__
    assert report["train"]["split"]["parts"]["backward"]["seconds"] > 0
    assert report["train"]["peak_memory_bytes"] > report["train"]["peak_memory_before_bytes"] // 2
    assert "one optimiser step of 4 clips x 6 frames, fp32, cpu, after step 10 of the preset" in text
    for name in ("backward", "gradient clip", "  pint", "mean step", "checkpoint every 100 steps"):
        assert name in text
    assert text.endswith(f"numbers: {tmp_path / 'numbers.json'}")


def test_report_names_neither_the_machine_nor_a_path_of_it(
    training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, report = report_of(training, monkeypatch, tmp_path)
    text = json.dumps(report)
    for secret in (os.uname().nodename, str(tmp_path), str(Path.home()) + "/", str(Path(sys.prefix).parent)):
        assert secret not in text


def test_table_shows_ratios_beside_their_targets(
    training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = report_of(training, monkeypatch, tmp_path)[1]
    good, bad = [(Arm(98, 10, 3.0), Arm(100, 10, 1.0))], [(Arm(80, 10, 3.0), Arm(100, 10, 1.0))]
    parts = {"probe": compare(good, "videos/s", None), "build": compare(good, "clips/s", None)}
    report["shard"] = compare(bad, "clips/s", 0.9) | parts
    report["extract"] = compare(good, "clips/s", 0.9) | {"writing": compare(good, "clips/s", None)}
    report["ray-train"] = compare(good, "steps/s", 0.95)
    lines = {line.split()[0]: line for line in render(report).splitlines() if line}
    assert "0.800 (0.800 - 0.800)  >= 0.90  missed" in lines["shard"]
    assert "0.980 (0.980 - 0.980)  >= 0.90  met" in lines["extract"]
    assert "bare loop" in lines["ray-train"]
    assert "ray-train 3.0 s (bare loop 1.0 s)" in lines["start-up,"]
    assert "process pool" in lines["probe"]


def test_table_of_a_sweep(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With sweeps that take no time: three trainings of 2 s, trials that end every 3, 20 and 5 s."""
    ends = {"in_process": 3.0, "separate": 20.0, "at-once-1": 5.0, "at-once-2": 3.0}

    def sweep(out: str, trials: int, *_: Any) -> list[tuple[float, float]]:
        return [(0.0, 7.0 + ends[os.path.basename(out)] * n) for n in range(trials)]

    monkeypatch.setattr(sweep_timing, "in_child", lambda function, *rest: function(*rest))
    monkeypatch.setattr(sweep_timing, "_alone", lambda run: (2.0, 0.1))
    monkeypatch.setattr(sweep_timing, "_sweep", sweep)
    report = report_of(training, monkeypatch, tmp_path)[1]
    report["sweep"] = found = sweep_timing.measure(str(tmp_path))
    assert (found["in_process"]["median"], found["separate"]["median"]) == (1.0, 18.0)
    assert found["side_by_side"]["steps"] == 120  # 12 s of them
    assert found["side_by_side"]["ratio"] == pytest.approx(5 / 3 * 5 / 4 * 4 / 5)
    text = render(report)
    assert "in the trial's own process     1.00 (1.00 - 1.00)   <= 4 met, goal 2" in text
    assert "18.00 (18.00 - 18.00)   <= 16 missed" in text
    assert "1.67 times as many" in text


@pytest.mark.parametrize(
    ("family", "preset", "message"),
    [
        ("ddpl", "small", "unknown family 'ddpl'; choose from ddlp"),
        ("ddlp", "smal", "ddlp has no preset 'smal'; choose from debug, quickstart, small"),
    ],
)
def test_unknown_family_or_preset_is_refused(family: str, preset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.benchmark(BenchmarkRun(family, preset))


def test_unknown_part_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=f"unknown part 'tune' .* choose from {', '.join(BENCHMARK_PARTS)}"):
        BenchmarkRun("ddlp", parts=("tune",))  # pyright: ignore[reportArgumentType]
