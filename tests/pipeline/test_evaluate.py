import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from objdyn.clips import Clip
from objdyn.families import FAMILIES, build
from objdyn.layers.perceptual import Network, Trunk, load_trunk
from objdyn.metrics import segmentation
from objdyn.metrics.perceptual import CHANNELS, LPIPS, SMALLEST
from objdyn.simulators import SIMULATORS, Simulator
from pipeline import cli, perceptual, segments, store
from pipeline.checkpoint import config_to_json, save_checkpoint
from pipeline.config import EvaluateRun, ShardRun
from pipeline.evaluate import LPIPS_KEYS, MED_STEPS, Made, choose_clips, evaluate, median_frame
from pipeline.presets import PRESETS
from pipeline.reader import open_source
from pipeline.report import ReportClip

FRAME_KEYS = [
    f"{name}_{metric}"
    for name in ("recon", "predict", "copy_last_predict", "constant_background_recon", "constant_background_predict")
    for metric in ("mse", "psnr", "ssim")
]
MED_KEYS = [
    f"{name}med10{suffix}"
    for name in ("", "copy_last_", "constant_velocity_", "constant_velocity_walls_")
    for suffix in ("", "_corrected")
]
KEYS = [*FRAME_KEYS, *MED_KEYS, "coverage_3px", "coverage_2px", "med10_lost_share"]


class Toy:
    """Episodes made by hand: ``draw(split, number)`` gives frames and truth."""

    def __init__(self, split: str, number: int, frames: np.ndarray, truth: dict[str, np.ndarray]) -> None:
        self.key, self.num_frames = f"{split}-{number:06d}", len(frames)
        self._clip = Clip(self.key, frames, 10.0, 0, 1, f"sim:toy/{split}/{number}", truth)

    def clip(self, start: int = 0, length: int | None = None) -> Clip:
        return self._clip.window(start, self.num_frames - start if length is None else length)


def register(monkeypatch: pytest.MonkeyPatch, draw: Any, splits: dict[str, int], frames: int = 14) -> str:
    def episodes(split: str, first: int, count: int, seed: int | None) -> Sequence[Toy]:
        return [Toy(split, number, *draw(split, number)) for number in range(first, first + count)]

    monkeypatch.setitem(SIMULATORS, "toy", Simulator("toy", splits, frames, 64, 64, 10.0, episodes))
    return "sim:toy"


def static(split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A still picture whose bright square stands elsewhere in each episode, without any truth."""
    frames = np.full((14, 64, 64, 3), 20, dtype=np.uint8)
    frames[:, 8 * number : 8 * number + 8, :8] = 200
    return frames, {}


def gliding(split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One object that moves by 0.02 per frame, far from any wall."""
    frames = np.zeros((14, 64, 64, 3), dtype=np.uint8)
    positions = np.stack([np.full(14, 0.1 * number), np.linspace(0, 0.26, 14)], axis=-1)[:, None].astype(np.float32)
    return frames, {"positions": positions, "present": np.ones((14, 1), dtype=bool)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return untrained("ddlp", str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def provide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return untrained("provide", str(tmp_path_factory.mktemp("provide")))


@pytest.fixture(scope="module")
def iodine(tmp_path_factory: pytest.TempPathFactory) -> str:
    return untrained("iodine", str(tmp_path_factory.mktemp("iodine")))


def untrained(family: str, folder: str, **model_settings: Any) -> str:
    run = PRESETS[family]["debug"]
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model_settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(run.model)
    state = {"family": family, "run": config_to_json(run), "model": config_to_json(run.model)}
    save_checkpoint(folder, 0, model=model, optimizer=torch.optim.Adam(model.parameters()), state=state, keep_last=1)
    return folder


def balls_run(checkpoint: str, out: Path) -> EvaluateRun:
    return EvaluateRun(
        checkpoint, "sim:balls-interaction", str(out), context=4, horizon=10, limit=2, report_clips=1, device="cpu"
    )


@pytest.fixture(scope="module")
def balls(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate(balls_run(checkpoint, out)), out


def test_clips_without_counts_are_evaluated_by_a_model_that_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = register(monkeypatch, static, {"train": 1, "test": 2})
    settings: dict[str, Any] = {"out": str(tmp_path / "out"), "context": 4, "horizon": 2, "report_clips": 1}
    unknown, known = (
        untrained("ssm", str(tmp_path / str(count)), image_size=64, known_count=count) for count in (False, True)
    )
    assert evaluate(EvaluateRun(unknown, data, **settings))["predict_mse"] is not None
    with pytest.raises(ValueError, match=r"no truth 'num_objects'.*model.known_count=false"):
        evaluate(EvaluateRun(known, data, **settings))


def test_every_key_is_written_with_a_value_or_a_reason(balls: tuple[dict[str, Any], Path]):
    returned, out = balls
    metrics = store.read_json(str(out / "metrics.json"))
    assert metrics == returned
    assert all(metrics[key] is not None or metrics["reasons"][key] for key in KEYS)
    assert all(metrics[key] is not None for key in FRAME_KEYS)
    assert {"model", "dataset", "split", "clips", "context", "horizon", "command"} <= metrics.keys()
    assert metrics["dataset"] == "sim:balls-interaction/test"
    assert metrics["clips"] == 2


def test_without_weights_lpips_is_null_with_a_reason_that_names_the_option(balls: tuple[dict[str, Any], Path]):
    metrics, _ = balls
    keys = [key.replace("_mse", "_lpips") for key in FRAME_KEYS if key.endswith("_mse")]
    assert len(keys) == 5
    for key in keys:
        assert metrics[key] is None
        assert "--perceptual-weights" in metrics["reasons"][key]
        assert "fetch_weights.py" in metrics["reasons"][key]
    assert metrics["perceptual"] == {}
    assert not [key for key in metrics if "lpips_alex" in key]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[Network, tuple[str, LPIPS]]:
    """A file with random weights of each network, and LPIPS by them."""
    found: dict[Network, tuple[str, LPIPS]] = {}
    for network, counts in CHANNELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trunk = dict(Trunk(network).state_dict())
            heads = {f"heads.{i}.weight": torch.rand(1, count, 1, 1) for i, count in enumerate(counts)}
        path = str(tmp_path_factory.mktemp("weights") / f"{network}.safetensors")
        save_file(trunk | heads, path)
        found[network] = path, LPIPS(load_trunk(trunk), list(heads.values()))
    return found


@pytest.fixture
def published(networks: dict[Network, tuple[str, LPIPS]], monkeypatch: pytest.MonkeyPatch) -> None:
    """These weights count as the published ones."""
    for network, (path, _) in networks.items():
        record = perceptual.read_weights([path])[network].record
        trunk, heads = perceptual.SOURCES[network]
        known = perceptual.Sources(
            trunk._replace(tensors_sha256=record["trunk_sha256"]), heads._replace(tensors_sha256=record["heads_sha256"])
        )
        monkeypatch.setitem(perceptual.SOURCES, network, known)


def test_lpips_by_both_networks_is_measured_beside_the_baselines(
    checkpoint: str,
    networks: dict[Network, tuple[str, LPIPS]],
    published: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    paths = tuple(path for path, _ in networks.values())
    data = register(monkeypatch, static, {"train": 3, "test": 1})
    metrics = run_on(checkpoint, data, tmp_path, horizon=2, report_clips=1, perceptual_weights=paths)
    truth = torch.from_numpy(static("test", 0)[0]).permute(0, 3, 1, 2)[None] / 255
    background = torch.from_numpy(median_frame(open_source(data, "train"))).permute(2, 0, 1) / 255
    for network, suffix in LPIPS_KEYS.items():
        lpips = networks[network][1]
        expected = float(lpips(background.expand_as(truth[:, :1]), truth[:, :1]))  # every frame is the same
        assert metrics[f"constant_background_recon_{suffix}"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"constant_background_predict_{suffix}"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"copy_last_predict_{suffix}"] == pytest.approx(0, abs=1e-9)
        assert metrics[f"predict_{suffix}"] > 0
        assert len(metrics["curves"][f"predict_{suffix}"]) == 2
        assert np.mean(metrics["curves"][f"recon_{suffix}"]) == pytest.approx(metrics[f"recon_{suffix}"])
        assert metrics["per_clip"][f"recon_{suffix}"] == [pytest.approx(metrics[f"recon_{suffix}"])]
        assert {f"predict_{suffix}"} <= metrics["std"].keys() & metrics["interval95"].keys()
        assert metrics["perceptual"][network]["published"] is True
    html = (tmp_path / "out" / "report.html").read_text()
    assert "LPIPS (lower is better)" in html
    assert "Clips are ranked by the LPIPS of the prediction" in html


def test_clips_are_ranked_by_lpips_where_it_is_known(
    checkpoint: str,
    networks: dict[Network, tuple[str, LPIPS]],
    published: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    given = drawn_of(monkeypatch)
    data = register(monkeypatch, static, {"test": 4})
    weights = (networks["alexnet"][0],)
    metrics = run_on(checkpoint, data, tmp_path, horizon=3, report_clips=2, perceptual_weights=weights)
    assert metrics["ranked_by"] == "predict_lpips_alex"
    values = metrics["per_clip"]["predict_lpips_alex"]
    worst, best = (metrics["keys"].index(clip.key) for clip in given["clips"])
    assert (worst, best) == (int(np.argmax(values)), int(np.argmin(values)))
    scores = given["clips"][0].predicted_scores
    assert list(scores) == ["PSNR", "SSIM", "LPIPS by AlexNet"]
    assert np.mean(scores["LPIPS by AlexNet"]) == pytest.approx(values[worst])
    assert metrics["predict_lpips"] is None
    assert "no weights of vgg16 were given" in metrics["reasons"]["predict_lpips"]


def test_weights_that_make_no_lpips_are_refused_or_give_a_reason(
    checkpoint: str,
    networks: dict[Network, tuple[str, LPIPS]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    path, _ = networks["alexnet"]
    data = register(monkeypatch, static, {"test": 1})
    with pytest.raises(ValueError, match=r"alexnet.safetensors does not hold the published weights of alexnet"):
        run_on(checkpoint, data, tmp_path, perceptual_weights=(path,))
    request.getfixturevalue("published")
    trunk = tmp_path / "trunk.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name.startswith("features.")}, trunk)
    metrics = run_on(checkpoint, data, tmp_path, horizon=0, perceptual_weights=(str(trunk),))
    assert metrics["recon_lpips_alex"] is None
    assert "lacks the heads of alexnet" in metrics["reasons"]["recon_lpips_alex"]
    monkeypatch.setitem(SMALLEST, "alexnet", 65)
    metrics = run_on(checkpoint, data, tmp_path, horizon=0, perceptual_weights=(path,))
    assert metrics["recon_lpips_alex"] is None
    assert "frames of at least 65 pixels a side, these are 64x64" in metrics["reasons"]["recon_lpips_alex"]


def test_the_stored_command_gives_the_same_run(balls: tuple[dict[str, Any], Path], checkpoint: str):
    metrics, out = balls
    program, job, *words = shlex.split(metrics["command"])
    assert (program, job) == ("python", "jobs/evaluate.py")
    assert cli.parse(EvaluateRun, words, description="") == balls_run(checkpoint, out)


def test_curves_average_to_the_summary_and_intervals_hold_it(balls: tuple[dict[str, Any], Path]):
    metrics, _ = balls
    assert len(metrics["curves"]["predict_psnr"]) == 10
    assert len(metrics["curves"]["recon_psnr"]) == 100
    for key in FRAME_KEYS:
        assert np.mean(metrics["curves"][key]) == pytest.approx(metrics[key])
        assert np.mean(metrics["per_clip"][key]) == pytest.approx(metrics[key])
        low, high = metrics["interval95"][key]
        assert low - 1e-9 <= metrics[key] <= high + 1e-9
    assert sum(metrics["curves"]["copy_last_position_error"]) == pytest.approx(metrics["copy_last_med10"])


def test_constant_background_of_balls_is_black(balls: tuple[dict[str, Any], Path]):
    metrics, _ = balls
    frames = np.concatenate(
        [e.clip().frames for e in SIMULATORS["balls-interaction"].episodes("test", 0, 2, None)]
    ).astype(np.float64)
    errors = (frames / 255) ** 2
    expected = float(np.mean(-10 * np.log10(errors.mean(axis=(1, 2, 3)))))
    assert metrics["constant_background_recon_psnr"] == pytest.approx(expected, abs=1e-3)


def test_report_is_written_beside_the_metrics(balls: tuple[dict[str, Any], Path]):
    _, out = balls
    page = (out / "report.html").read_text()
    assert "test-000000" in page
    assert "data:image/webp;base64," in page
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "report.html"]


def run_on(checkpoint: str, data: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    settings = {"context": 4, "horizon": 10, "report_clips": 0, "device": "cpu"} | changes
    return evaluate(EvaluateRun(checkpoint, data, str(tmp_path / "out"), **settings))


def test_still_video_makes_copy_last_perfect_and_lack_of_truth_null(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    metrics = run_on(checkpoint, register(monkeypatch, static, {"train": 5, "test": 2}), tmp_path)
    assert metrics["copy_last_predict_mse"] == 0
    assert metrics["copy_last_predict_psnr"] == 100
    assert metrics["copy_last_predict_ssim"] == 1
    # The median over five episodes is the plain ground; the square covers 64 of 4096 pixels.
    error = (180 / 255) ** 2 * 64 / 4096
    assert metrics["constant_background_recon_mse"] == pytest.approx(error, rel=1e-5)
    assert metrics["constant_background_predict_psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    for key in [*MED_KEYS, "coverage_3px", "coverage_2px"]:
        assert metrics[key] is None
        assert metrics["reasons"][key] == "the clips hold no true positions"


def test_position_baselines_on_a_gliding_object(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metrics = run_on(checkpoint, register(monkeypatch, gliding, {"train": 1, "test": 3}), tmp_path)
    # It is 0.01, 0.02 ... 0.1 of the frame's side away from where it was last seen.
    assert metrics["copy_last_med10_corrected"] == pytest.approx(0.55, abs=1e-5)
    assert metrics["constant_velocity_med10_corrected"] == pytest.approx(0, abs=1e-5)
    assert metrics["constant_velocity_walls_med10_corrected"] == pytest.approx(0, abs=1e-5)


def test_without_a_training_split_the_background_is_null(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    metrics = run_on(checkpoint, register(monkeypatch, static, {"test": 1}), tmp_path)
    assert metrics["constant_background_recon_psnr"] is None
    assert "no split 'train'" in metrics["reasons"]["constant_background_predict_psnr"]


def test_a_short_horizon_leaves_med10_null_and_keeps_the_curve(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    metrics = run_on(checkpoint, register(monkeypatch, gliding, {"test": 1}), tmp_path, horizon=5, context=1)
    assert metrics["copy_last_med10"] is None
    assert "at least 10 frames, this run predicts 5" in metrics["reasons"]["copy_last_med10"]
    assert "at least 2 frames" in metrics["reasons"]["constant_velocity_med10"]
    assert len(metrics["curves"]["copy_last_position_error"]) == 5


def test_horizon_zero_measures_reconstruction_only(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metrics = run_on(checkpoint, register(monkeypatch, gliding, {"test": 1}), tmp_path, horizon=0, report_clips=1)
    assert metrics["recon_psnr"] is not None
    assert metrics["coverage_3px"] is not None
    assert metrics["predict_psnr"] is None
    assert metrics["reasons"]["copy_last_med10"] == "horizon is 0, so nothing was predicted"


@pytest.mark.parametrize(
    ("frames", "horizon", "reason"),
    [
        (14, 4, None),
        (60, 40, None),
        (10, 0, "the clips hold 10 frames, so none is left to predict after a context of 10"),
    ],
)
def test_without_a_horizon_the_rest_of_the_clip_is_predicted(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, horizon: int, reason: str | None
):
    def still(split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return np.zeros((frames, 64, 64, 3), dtype=np.uint8), {}

    data = register(monkeypatch, still, {"test": 1}, frames)
    metrics = run_on(checkpoint, data, tmp_path, context=10, horizon=None)
    assert metrics["horizon"] == horizon
    assert len(metrics["curves"].get("predict_psnr", ())) == horizon
    assert metrics["recon_psnr"] is not None
    assert metrics["reasons"].get("predict_psnr") == reason


def test_default_clips_fill_med10_after_the_default_context():
    assert ShardRun(source="s", out="o").frames - EvaluateRun("c", "d", "o").context >= MED_STEPS


def test_family_without_rollout_has_null_predictions(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "ddlp", FAMILIES["ddlp"]._replace(verbs=("forward", "encode", "decode")))
    metrics = run_on(checkpoint, register(monkeypatch, static, {"test": 1}), tmp_path, horizon=99)
    assert metrics["recon_psnr"] is not None
    assert metrics["reasons"]["predict_psnr"] == "family ddlp does not predict: it has no rollout"


def test_context_and_horizon_beyond_the_clip_are_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = register(monkeypatch, static, {"test": 1})
    with pytest.raises(ValueError, match=r"4 \+ horizon 11 = 15 frames, but .* hold 14; use --horizon 10"):
        run_on(checkpoint, data, tmp_path, horizon=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context must be at least 1"),
        ({"horizon": -1}, "horizon must be 0 or more"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"wall_radius": 40.0}, "wall_radius"),
        ({"out": ""}, "out is missing"),
        ({"data": ""}, "data is missing"),
        ({"set": ("optim.lr=1",)}, "written model.NAME=VALUE"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str):
    settings: dict[str, Any] = {"checkpoint": "c", "data": "d", "out": "o"}
    with pytest.raises(ValueError, match=message):
        EvaluateRun(**{**settings, **change})


def test_same_evaluation_gives_the_same_bytes_whatever_the_batch(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = register(monkeypatch, gliding, {"test": 2})
    run_on(checkpoint, data, tmp_path)
    first = (tmp_path / "out" / "metrics.json").read_bytes()
    run_on(checkpoint, data, tmp_path)
    assert (tmp_path / "out" / "metrics.json").read_bytes() == first
    one, many = json.loads(first), run_on(checkpoint, data, tmp_path, batch_size=1)
    assert many["recon_mse"] == pytest.approx(one["recon_mse"], rel=1e-5)
    assert many["med10"] == pytest.approx(one["med10"], rel=1e-4)


def test_median_frame_reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch):
    def draw(split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return np.full((14, 64, 64, 3), 100 if number % 3 else 0, dtype=np.uint8), {}

    source = open_source(register(monkeypatch, draw, {"train": 500}), "train")
    whole = median_frame(source)
    read: list[str] = []
    clip = Toy.clip
    monkeypatch.setattr(Toy, "clip", lambda self, *window: read.append(self.key) or clip(self, *window))
    monkeypatch.setattr("pipeline.evaluate.BACKGROUND_BYTES", 64 * 64 * 3 * 40)
    bounded = median_frame(source)
    assert len(set(read)) == len(read) == 40
    assert bounded.shape == (64, 64, 3)
    assert bounded.dtype == np.float32
    for median in (whole, bounded):
        assert (median == 100).all()


def test_split_without_clips_has_no_background(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no clips to take a background from"):
        median_frame(open_source(register(monkeypatch, static, {"train": 0}), "train"))


def ranks(scores: list[float], count: int) -> list[tuple[int, str]]:
    return [(choice.clip, choice.rank) for choice in choose_clips(np.array(scores), count)]


def test_worst_median_and_best_are_chosen_by_score():
    assert ranks([30, 10, 50, 20, 40, 70, 60, 80, 90], 6) == [
        (1, "worst, 1st of 9"),
        (3, "worst, 2nd of 9"),
        (4, "median, 4th of 9"),
        (2, "median, 5th of 9"),
        (8, "best, 1st of 9"),
        (7, "best, 2nd of 9"),
    ]


@pytest.mark.parametrize("total", range(1, 12))
@pytest.mark.parametrize("count", range(9))
def test_each_clip_is_chosen_at_most_once_and_as_many_as_asked(total: int, count: int):
    chosen = ranks([1.0] * total, count)
    assert len({clip for clip, _ in chosen}) == len(chosen) == min(total, count)


def test_shares_that_do_not_divide_go_to_the_worst_and_then_to_the_best():
    groups = [[rank.partition(",")[0] for _, rank in ranks(list(range(20)), count)] for count in (1, 2, 4, 5)]
    assert groups == [
        ["worst"],
        ["worst", "best"],
        ["worst", "worst", "median", "best"],
        ["worst", "worst", "median", "best", "best"],
    ]


def test_the_median_of_many_is_in_the_middle():
    chosen = ranks([float(i) for i in range(200)], 6)
    assert chosen[2:4] == [(99, "median, 100th of 200"), (100, "median, 101st of 200")]


def test_scores_that_are_not_finite_are_worst_and_ties_go_by_order():
    chosen = ranks([3.0, float("nan"), 3.0, 3.0, float("-inf"), 3.0, float("inf")], 7)
    assert [clip for clip, _ in chosen] == [1, 4, 6, 0, 2, 5, 3]


def test_a_single_clip_has_no_rank():
    assert ranks([1.0], 6) == [(0, "the only clip")]


def drawn_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is handed to the report, without writing one."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("pipeline.evaluate.write_report", lambda path, **parts: given.update(parts))
    return given


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    errors = ((made / 255.0 - true / 255.0) ** 2).mean(axis=(1, 2, 3))
    return float((-10 * np.log10(errors)).mean())


def test_what_is_drawn_is_what_was_measured(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = drawn_of(monkeypatch)
    data = register(monkeypatch, static, {"test": 7})
    metrics = run_on(checkpoint, data, tmp_path, report_clips=3, batch_size=2)
    drawn: list[ReportClip] = given["clips"]
    measured = metrics["per_clip"]["predict_psnr"]
    by_score = sorted(range(7), key=lambda i: measured[i])
    numbers = [metrics["keys"].index(clip.key) for clip in drawn]
    assert numbers == [by_score[0], by_score[3], by_score[6]]
    assert [clip.rank for clip in drawn] == ["worst, 1st of 7", "median, 4th of 7", "best, 1st of 7"]
    assert metrics["drawn"] == [{"clip": clip.key, "rank": clip.rank} for clip in drawn]
    assert metrics["ranked_by"] == "predict_psnr"
    for number, clip in zip(numbers, drawn, strict=True):
        np.testing.assert_array_equal(clip.frames, static("test", number)[0])
        assert clip.source == f"sim:toy/test/{number}, frames 0 to 13"
        assert clip.scores["prediction"] == measured[number]
        # The picture has 8 bits per value, the measurement was made before rounding.
        assert clip.prediction is not None
        assert psnr(clip.prediction, clip.frames[4:]) == pytest.approx(measured[number], abs=0.02)
        recon = metrics["per_clip"]["recon_psnr"][number]
        assert psnr(clip.reconstruction, clip.frames) == pytest.approx(recon, abs=0.02)
    assert given["notes"] == []


def test_a_second_encoding_that_differs_is_said(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = drawn_of(monkeypatch)
    monkeypatch.setattr("pipeline.evaluate.SAME_DB", -1.0)
    run_on(checkpoint, register(monkeypatch, static, {"test": 1}), tmp_path, report_clips=1)
    assert len(given["notes"]) == 2
    assert "may differ from what was measured" in given["notes"][0]


def test_without_prediction_clips_are_ranked_by_reconstruction(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = drawn_of(monkeypatch)
    metrics = run_on(checkpoint, register(monkeypatch, static, {"test": 3}), tmp_path, horizon=0, report_clips=1)
    values = metrics["per_clip"]["recon_psnr"]
    assert metrics["ranked_by"] == "recon_psnr"
    assert metrics["keys"].index(given["clips"][0].key) == values.index(min(values))


def test_a_clip_whose_output_is_not_finite_is_the_worst_and_the_rest_is_measured(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pipeline import evaluate as module

    apply = module._apply

    def broken(model: Any, clips: Sequence[Clip], *rest: Any) -> Any:
        video, made = apply(model, clips, *rest)
        assert made.scene is not None
        for i, clip in enumerate(clips):
            if clip.key == "test-000002":
                for field in (made.recon, made.scene, *made.latents, *made.predicted):
                    field[i] = float("nan")
        return video, Made(*made)

    monkeypatch.setattr(module, "_apply", broken)
    data = register(monkeypatch, gliding, {"train": 1, "test": 3})
    metrics = run_on(checkpoint, data, tmp_path, report_clips=1)
    assert metrics["drawn"][0] == {"clip": "test-000002", "rank": "worst, 1st of 3"}
    assert metrics["predict_psnr"] is None
    assert metrics["reasons"]["predict_psnr"] == "the frames hold values that are not finite"
    assert [value is None for value in metrics["per_clip"]["predict_psnr"]] == [False, False, True]
    assert metrics["copy_last_predict_psnr"] is not None
    assert metrics["med10_lost_share"] >= 1 / 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("not finite</dd>") == 2


def test_metrics_say_what_the_data_are_and_what_reproduces_them(balls: tuple[dict[str, Any], Path]):
    metrics, out = balls
    data = metrics["data"]
    assert (data["clips"], data["clips_in_split"], data["frames"]) == (2, 200, 100)
    assert "quarantine" not in data
    assert len(data["per_clip"]["brightness"]) == 2
    assert metrics["keys"] == ["test-000000", "test-000001"]
    assert metrics["training"]["command"] == "python jobs/train_ddlp.py debug"
    assert {"python", "torch", "objdyn"} <= metrics["versions"].keys()
    assert metrics["code"].keys() == {"revision", "dirty"}
    page = (out / "report.html").read_text()
    assert "<h2>Data</h2>" in page
    assert "<h2>Quarantine</h2>" not in page
    assert "2 evaluated, of 200 in the split" in page


SLOT_DATA = "sim:bouncing-balls:balls=2,size=32,colors=random4,frames=12"


@pytest.fixture(scope="module")
def tracked(provide: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("tracked")
    run = EvaluateRun(provide, SLOT_DATA, str(out), context=6, limit=3, batch_size=2, report_clips=2, device="cpu")
    return evaluate(run), out


def test_slot_family_gets_every_segmentation_metric_with_its_baselines(tracked: tuple[dict[str, Any], Path]):
    metrics, _ = tracked
    assert all(metrics[key] is not None for key in segments.KEYS)
    assert metrics["segmented_clips"] == 3
    assert metrics["one_cluster_ari"] == 0
    assert metrics["one_cluster_swap_rate"] == 0
    assert metrics["threshold_fg_ari"] > 0.9
    assert metrics["notes"] == {}
    for key in segments.KEYS:
        low, high = metrics["interval95"][key]
        assert low - 1e-9 <= metrics[key] <= high + 1e-9
    assert len(metrics["curves"]["fg_ari"]) == 12
    assert len(metrics["curves"]["copy_last_predict_ari"]) == 6
    assert len(metrics["per_clip"]["swap_rate"]) == 3
    assert metrics["reasons"]["med10"] == "family provide has no positions among its latents"


def test_segmentation_metrics_are_those_of_the_masks_that_the_model_decodes(
    provide: str, tracked: tuple[dict[str, Any], Path]
):
    from objdyn.clips import collate, to_model_input
    from pipeline.checkpoint import load_model
    from pipeline.reader import iter_clips

    metrics, _ = tracked
    clips = list(iter_clips(open_source(SLOT_DATA, "test"), 3))
    model = load_model(provide).model
    with torch.no_grad():
        video = to_model_input(collate(clips))
        masks = model.decode(model.encode(video), components=True).masks
        future = model.decode(model.rollout(model.encode(video[:, :6]), 6), components=True).masks
    true, found = np.stack([clip.truth["segmentation"] for clip in clips]), segmentation.segment(masks.numpy())
    expected = {
        "fg_ari": segmentation.frame_ari(true, found, foreground=True).mean(),
        "video_ari": segmentation.video_ari(true, found, foreground=False).mean(),
        "matched_iou": segmentation.matched_iou(true, found, per="frame").mean(),
        "swap_rate": segmentation.swap_rate(true, found).rate,
        "predict_ari": segmentation.frame_ari(
            true[:, 6:], segmentation.segment(future.numpy()), foreground=False
        ).mean(),
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=2e-3)


def test_report_of_a_slot_family_shows_masks_components_and_a_latent_walk(tracked: tuple[dict[str, Any], Path]):
    _, out = tracked
    page = (out / "report.html").read_text()
    assert page.count("Latent walk: slot") == 1
    assert page.count("Components of frame") == 2 * 3
    assert "Segmentation of the prediction" in page
    assert "threshold, connected components" in page
    assert "Colours of masks are slots" in page


def test_image_model_is_measured_over_clips_with_a_note_and_predicts_nothing(iodine: str, tmp_path: Path):
    metrics = run_on(iodine, SLOT_DATA, tmp_path, context=6, horizon=None, limit=1, report_clips=1)
    assert metrics["video_fg_ari"] is not None
    assert metrics["notes"]["swap_rate"] == "slots of family iodine carry no identity from frame to frame"
    for key in ("predict_ari", "threshold_predict_fg_ari", "predict_mse"):
        assert metrics[key] is None
        assert metrics["reasons"][key] == "family iodine does not predict: it has no rollout"
    assert metrics["reasons"]["coverage_3px"] == "family iodine has no positions among its latents"


def test_videos_without_masks_have_null_segmentation_with_a_reason(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    metrics = run_on(checkpoint, register(monkeypatch, gliding, {"test": 1}), tmp_path, report_clips=1)
    assert metrics["segmented_clips"] == 0
    for key in segments.KEYS:
        assert metrics[key] is None
        assert metrics["reasons"][key] == "the clips hold no true segmentation"
    assert "Masks were not compared with true objects" in (tmp_path / "out" / "report.html").read_text()


def masked(split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A square in every second frame; only even episodes say where it is."""
    frames = np.zeros((14, 64, 64, 3), dtype=np.uint8)
    frames[::2, 8:16, 8:16] = 255
    return frames, {} if number % 2 else {"segmentation": (frames[..., 0] > 0).astype(np.uint8)}


def test_clips_without_masks_among_others_and_frames_without_objects_are_counted(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = register(monkeypatch, masked, {"test": 3})
    metrics = run_on(checkpoint, data, tmp_path, batch_size=1)
    assert metrics["segmented_clips"] == 2
    assert metrics["frames_without_objects"] == 14
    assert metrics["threshold_matched_iou"] == 1
    assert metrics["threshold_swap_rate"] > 0  # the component that comes back has a new number
    assert [value is None for value in metrics["per_clip"]["ari"]] == [False, True, False]


def test_masks_of_another_size_than_the_frames_end_the_job_with_a_sentence(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return static(split, number)[0], {"segmentation": np.zeros((14, 32, 32), dtype=np.uint8)}

    with pytest.raises(
        ValueError, match=r"segmentation of clip test-000000 must be \(14, 64, 64\), got \(14, 32, 32\)"
    ):
        run_on(checkpoint, register(monkeypatch, wrong, {"test": 1}), tmp_path)


def test_masks_that_are_not_finite_leave_segmentation_null(
    provide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    render = segments.render

    def broken(model: Any, latents: Any, masks: bool) -> segments.Rendered:
        rendered = render(model, latents, masks)
        assert rendered.segments is not None
        rendered.segments[0] = segments.UNKNOWN
        return rendered

    monkeypatch.setattr(segments, "render", broken)
    metrics = run_on(provide, SLOT_DATA, tmp_path, horizon=2, limit=2)
    assert metrics["reasons"]["fg_ari"] == "the masks of 1 clips hold values that are not finite"
    assert metrics["reasons"]["predict_ari"] == "the masks of 1 clips hold values that are not finite"
    assert metrics["threshold_fg_ari"] is not None


def test_settings_changed_at_test_time_are_used_recorded_and_in_the_command(provide: str, tmp_path: Path):
    words = ("model.num_slots=5", "model.num_refinements=4")
    metrics = run_on(provide, SLOT_DATA, tmp_path, set=words, horizon=0, limit=1, report_clips=1)
    assert metrics["model_settings_changed"] == {"model.num_slots": 5, "model.num_refinements": 4}
    assert "--set model.num_slots=5 model.num_refinements=4" in metrics["command"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "model.num_slots=5, model.num_refinements=4" in page


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.slot_dim=9", r"do not fit .*: model.slot_dim=9 makes refiner\.initial_mean \(9,\), stored is \(8,\)"),
        ("model.num_particles=9", "PROVIDEConfig has no field 'num_particles'"),
        ("model.num_slots=many", "'many' is not of type int"),
        ("model.num_slots=1", "num_slots must be at least 2"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(provide: str, tmp_path: Path, word: str, message: str):
    with pytest.raises(ValueError, match=message):
        run_on(provide, SLOT_DATA, tmp_path, set=(word,))
