import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objdyn.clips import Clip, collate, stack_truth, to_model_input
from objdyn.families import FAMILIES, build
from objdyn.layers.binary import binary_frames
from objdyn.metrics import bernoulli, trajectory
from objdyn.models.ssm import SSM, Inferred, SSMConfig
from objdyn.simulators import SIMULATORS, Simulator, cannonballs, simulator
from pipeline import store, trajectories
from pipeline.checkpoint import config_to_json, save_checkpoint
from pipeline.config import EvaluateRun
from pipeline.evaluate import _resample, evaluate
from pipeline.presets import PRESETS
from pipeline.report import ClipTracks, ReportClip
from pipeline.trajectory_report import trajectories as section

SIZE = 32
DATA = f"sim:cannonballs:balls=1-3,size={SIZE},frames=30"
CONTEXT, HORIZON = 5, 25
MATRIX, OFFSET = np.array([[0.2, -0.5], [0.4, 0.3]]), np.array([0.1, -0.2])
"""The map from latent to true positions."""
PIXELS = (SIZE - 1) / 2
DEBUG = PRESETS["ssm"]["debug"].model
assert isinstance(DEBUG, SSMConfig)
# A prior that knows nothing of where balls start, and next to no noise: what is seen is believed.
EXACT = replace(DEBUG, learn_transition_cov=False, transition_var=2e-8, emission_var=2e-6, initial_var=100.0)


class KnowsAll(nn.Module):
    """An inference network that looks positions up: the true ones, by the inverse of a map, in an order per clip.

    Its state (k, b, 2) is the clip and the frame to come, so that it goes on after a gap.
    """

    def __init__(self, clips: Sequence[Clip], exchange: bool = False, fold: bool = False) -> None:
        super().__init__()
        self.numbers: dict[bytes, int] = {}
        self.latents: list[np.ndarray] = []
        for number, clip in enumerate(clips):
            count = int(clip.truth["num_objects"])
            true = clip.truth["positions"][:, np.random.default_rng(number).permutation(count)]
            if exchange:
                true = np.concatenate([true[:15], true[15:, ::-1]])
            if fold:
                true = true * [1, 0] + np.abs(true - [0, 0.02]) * [0, 1]
            self.latents.append(((true - OFFSET) @ np.linalg.inv(MATRIX).T).astype(np.float32))
            self.numbers[(clip.frames[:CONTEXT, :, :, 0] > 0).tobytes()] = number

    def start(self, counts: Tensor, objects: int) -> Tensor:
        return torch.full((objects, len(counts), 2), -1.0)

    def forward(self, frames: Tensor, state: Tensor) -> Inferred:
        objects, length, state = len(state), frames.shape[1], state.clone()
        mean = torch.zeros(len(frames), length, objects, 2)
        for i, video in enumerate(frames):
            if state[0, i, 0] < 0:
                seen = video[:CONTEXT].reshape(-1, SIZE, SIZE).numpy() > 0
                state[:, i] = torch.tensor([self.numbers[seen.tobytes()], 0])
            number, time = (int(value) for value in state[0, i])
            found = torch.from_numpy(self.latents[number][time : time + length])
            mean[i, :, : found.shape[1]] = found
        state[:, :, 1] += length
        return Inferred(mean, torch.full_like(mean, 1e-3), state)


def knowing(clips: Sequence[Clip], config: SSMConfig = EXACT, **flaws: bool) -> SSM:
    """A model that has learnt Cannonballs, but for its renderer."""
    torch.manual_seed(0)
    model = SSM(config)
    give_knowledge(model, clips, **flaws)
    return model.eval()


def give_knowledge(model: SSM, clips: Sequence[Clip], **flaws: bool) -> None:
    model.inference = KnowsAll(clips, **flaws)  # pyright: ignore[reportAttributeAccessIssue]
    pull = torch.tensor(np.linalg.inv(MATRIX) @ cannonballs.Options(size=SIZE).acceleration)
    with torch.no_grad():
        step = model.prior.log_step.double().exp()
        model.prior.force.copy_(torch.cat([pull / 2, pull / step]))


def cannons(count: int, split: str = "test", data: str = DATA) -> list[Clip]:
    return [episode.clip() for episode in simulator(data.removeprefix("sim:")).episodes(split, 0, count, None)]


def found_of(
    model: Any, clips: Sequence[Clip], family: str = "ssm", context: int = CONTEXT, horizon: int = HORIZON
) -> trajectories.Found:
    video = to_model_input(collate(clips))
    inputs: dict[str, Any] = {**stack_truth(clips, FAMILIES[family].inputs)}
    with torch.no_grad():
        latents = model.encode(video, **inputs)
        seen = model.encode(video[:, :context], **inputs)
        predicted = model.rollout(seen, horizon) if horizon else None
    return trajectories.measure(model, FAMILIES[family], clips, video, latents, predicted, context)


def summary(
    model: Any,
    found: trajectories.Found,
    family: str = "ssm",
    context: int = CONTEXT,
    horizon: int = HORIZON,
    maps: trajectories.Maps | None = None,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {"family": family, "clips": len(found.true), "context": context, "horizon": horizon}
    metrics |= {"interval95": {}, "curves": {}, "per_clip": {}, "reasons": {}}
    if not horizon:
        metrics["reasons"]["predict"] = "horizon is 0, so nothing was predicted"
    trajectories.summarise(
        metrics, found, maps or trajectories.own_maps(found, "so it is tested"), model=model, context=context,
        horizon=horizon, frame_size=(SIZE, SIZE), reasons=metrics["reasons"], resample=_resample,
    )  # fmt: skip
    return metrics


def saved(config: Any, family: str, folder: Path) -> str:
    """A checkpoint of an untrained model."""
    run = replace(PRESETS[family]["debug"], model=config)
    torch.manual_seed(0)
    model = build(config)
    state = {"family": family, "run": config_to_json(run), "model": config_to_json(config)}
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(str(folder), 0, model=model, optimizer=optimizer, state=state, keep_last=1)
    return str(folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An evaluation of a model whose latents are the true positions up to a map, objects in any order."""
    out, run = tmp_path_factory.mktemp("exact"), tmp_path_factory.mktemp("run")
    checkpoint = saved(EXACT, "ssm", run)
    with pytest.MonkeyPatch.context() as patch:
        from pipeline import evaluate as module

        open_model = module.open_model

        def opened(*args: Any, **kwargs: Any) -> Any:
            loaded, changed = open_model(*args, **kwargs)
            give_knowledge(loaded.model, [*cannons(6, "val"), *cannons(6)])
            return loaded, changed

        patch.setattr(module, "open_model", opened)
        settings: dict[str, Any] = {"limit": 6, "batch_size": 4, "report_clips": 1, "device": "cpu"}
        return evaluate(EvaluateRun(checkpoint, DATA, str(out), context=CONTEXT, horizon=HORIZON, **settings)), out


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """An evaluation of an untrained ED-LSTM on the same clips, as the job does it, and what the job prints."""
    out, run = tmp_path_factory.mktemp("ed"), tmp_path_factory.mktemp("ed-run")
    checkpoint = saved(PRESETS["ed_lstm"]["debug"].model, "ed_lstm", run)
    settings = {"context": CONTEXT, "horizon": HORIZON, "limit": 6, "batch-size": 4, "report-clips": 1}
    words = ["--checkpoint", checkpoint, "--data", DATA, "--out", str(out), "--device", "cpu"]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    job = Path(__file__).resolve().parents[2] / "jobs" / "evaluate.py"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jobs/evaluate.py", *words])
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        runpy.run_path(str(job), run_name="__main__")
    return store.read_json(str(out / "metrics.json")), out, printed[-1]


def test_tracks_that_are_true_up_to_one_map_are_found_so_for_any_number_of_objects(exact: tuple[dict[str, Any], Path]):
    metrics, _ = exact
    assert metrics["by_objects"].keys() == {"1", "2", "3"}
    for group in (metrics, *metrics["by_objects"].values()):
        for key in ("position_r2", "position_r2_y", "position_r2_x"):
            assert group[key] == pytest.approx(1, abs=1e-9)
        assert group["position_rmse_px"] < 1e-5
        # The axes of the map have different scales, so no similarity is enough.
        assert group["similarity_position_r2"] < 0.999
        for key in ("predict_error_px", "predict_rmse_px", "predict_apart_px", "encode_gap_error_px"):
            assert group[key] < 1e-4
        assert group["interpolate_error_px"] < group["predict_gap_error_px"] < 1e-4
        assert group["interpolate_to_encode_px"] < 1e-4
    assert metrics["identity_swap_rate"] == metrics["collapse_share"] == 0
    assert metrics["by_objects"]["3"]["identity_swap_rate"] == 0
    assert metrics["by_objects"]["1"]["identity_swap_rate"] is None
    assert metrics["by_objects"]["1"]["reasons"]["identity_swap_rate"] == "a single slot has nothing to exchange"
    assert metrics["num_objects"] == [1, 2, 3, 1, 2, 3]
    assert [group["clips"] for group in metrics["by_objects"].values()] == [2, 2, 2]
    assert metrics["warnings"] == []
    assert metrics["map"]["note"] == "fitted on the first 6 clips of split 'val'"
    np.testing.assert_allclose(metrics["map"]["affine"]["matrix"], MATRIX, rtol=1e-5)
    np.testing.assert_allclose(metrics["map"]["affine"]["offset"], OFFSET, rtol=1e-5)


def test_learnt_gravity_is_the_true_one_in_pixels_and_in_the_world(exact: tuple[dict[str, Any], Path]):
    metrics, _ = exact
    assert (metrics["gravity_along"], metrics["gravity_ratio"]) == pytest.approx((1, 1), abs=1e-5)
    assert metrics["gravity_angle"] == pytest.approx(0, abs=1e-3)
    assert metrics["gravity_half_step"] == pytest.approx(1, abs=1e-5)
    assert metrics["gravity_world"] == pytest.approx([-9.81, 0], abs=1e-4)
    assert metrics["true_gravity_world"] == pytest.approx([-9.81, 0])
    bottom, top = cannonballs.Options(size=SIZE).window[1]
    fall = 9.81 * cannonballs.STEP**2 * (SIZE - 1 - 2 * cannonballs.RADIUS) / (top - bottom)
    assert metrics["true_gravity_px"] == pytest.approx([fall, 0])
    assert metrics["gravity_px"] == pytest.approx([fall, 0], abs=1e-6)
    assert all(0.5 < modulus < 1 for modulus in metrics["predictor_spectrum"])
    area = abs(np.linalg.det(MATRIX)) * PIXELS**2
    assert metrics["log_prior_px"] == pytest.approx(metrics["log_prior"] - np.log(area), abs=1e-4)


def test_every_key_has_a_value_or_a_reason_and_an_interval_around_it(
    exact: tuple[dict[str, Any], Path], baseline: tuple[dict[str, Any], Path, str]
):
    for metrics in (exact[0], baseline[0]):
        for group in (metrics, *metrics["by_objects"].values()):
            for key in trajectories.KEYS:
                assert group[key] is not None or group["reasons"][key]
                if key in group["interval95"]:
                    low, high = group["interval95"][key]
                    assert low - 1e-9 <= group[key] <= high + 1e-9
        assert all(metrics[key] is not None or metrics["reasons"][key] for key in trajectories.DYNAMICS)
    metrics, out = exact
    assert json.loads((out / "metrics.json").read_text())["by_objects"] == metrics["by_objects"]
    assert "predict_error_px" in metrics["interval95"]
    assert len(metrics["curves"]["predict_error_px"]) == len(metrics["curves"]["predict_nll_frame"]) == HORIZON
    assert len(metrics["curves"]["interpolate_error_px"]) == HORIZON - CONTEXT
    assert np.mean(metrics["curves"]["predict_nll_frame"]) == pytest.approx(metrics["predict_nll_frame"])
    assert np.mean(metrics["per_clip"]["predict_nll_frame"]) == pytest.approx(metrics["predict_nll_frame"])


def test_baselines_are_what_they_say_on_the_same_clips_for_both_families(
    exact: tuple[dict[str, Any], Path], baseline: tuple[dict[str, Any], Path, str]
):
    clips = cannons(6)
    copied, moved = [], []
    for clip in clips:
        drawn, true = clip.truth["rendered_positions"].astype(float), clip.truth["positions"][CONTEXT:]
        steps = np.arange(1, HORIZON + 1)[:, None, None]
        ahead = drawn[CONTEXT - 1] + steps * (drawn[CONTEXT - 1] - drawn[CONTEXT - 2])
        count = int(clip.truth["num_objects"])
        for positions, errors in ((drawn[None, CONTEXT - 1], copied), (ahead, moved)):
            gaps = (positions - true)[:, :count] * PIXELS
            errors.append(np.hypot(gaps[..., 0], gaps[..., 1]))
    for metrics in (exact[0], baseline[0]):
        # The best assignment may be a little better than the true one.
        for name, errors in (("copy_last", copied), ("constant_velocity", moved)):
            mean = np.concatenate([e.ravel() for e in errors]).mean()
            assert 0.8 * mean <= metrics[f"{name}_predict_error_px"] <= mean + 1e-6
            single = np.mean([errors[0], errors[3]])
            assert metrics["by_objects"]["1"][f"{name}_predict_error_px"] == pytest.approx(single)
    shared = [key for key in trajectories.KEYS if key.startswith(("copy_last", "constant", "true_frames", "perfect"))]
    assert {key: exact[0][key] for key in shared} == {key: baseline[0][key] for key in shared}
    # Balls are drawn with noise of about one pixel, and their discs are made of pixels.
    assert 0.3 < exact[0]["true_frames_predict_kmeans_px"] < 1.2


def test_model_without_positions_has_the_numbers_of_its_frames_and_reasons_for_the_rest(
    baseline: tuple[dict[str, Any], Path, str],
):
    metrics, _, _ = baseline
    why = "family ed_lstm has no positions among its latents"
    located = [*trajectories.RECOVERY, *trajectories.IDENTITY, *trajectories.PREDICTED, *trajectories.GAP, "log_prior"]
    assert {metrics["reasons"][key] for key in located} == {why}
    for group in (metrics, *metrics["by_objects"].values()):
        assert all(group[key] is not None for key in ("predict_kmeans_px", "predict_nll_pixel", "predict_white_recall"))
    assert metrics["map"] is None
    assert metrics["reasons"]["gravity_px"] == "family ed_lstm has no dynamics to look at"


def test_job_prints_the_numbers_by_number_of_objects(baseline: tuple[dict[str, Any], Path, str]):
    metrics, _, printed = baseline
    head, *rows = printed.splitlines()[:5]
    assert head.split()[:4] == ["objects", "clips", "R2", "R2"]
    assert [row.split()[:3] for row in rows] == [["all", "6", "-"], *([n, "2", "-"] for n in "123")]
    assert f"{metrics['predict_kmeans_px']:.2f}" in rows[0].split()
    assert printed.splitlines()[-1].startswith("report: ")


def test_likelihood_and_white_pixels_are_those_of_the_frames_that_are_decoded(
    baseline: tuple[dict[str, Any], Path, str],
):
    clips = cannons(6)
    torch.manual_seed(0)
    model = build(PRESETS["ed_lstm"]["debug"].model).eval()
    video = to_model_input(collate(clips))
    with torch.no_grad():
        decoded = model.decode(model.rollout(model.encode(video[:, :CONTEXT]), HORIZON)).video[:, :, 0]
    target = binary_frames(video[:, CONTEXT:], SIZE).unflatten(2, (SIZE, SIZE))
    nll, white = bernoulli.bernoulli_nll(decoded, target), bernoulli.white_pixels(decoded, target)
    bounds = bernoulli.double_sigmoid_bounds(target)
    expected = {
        "predict_nll_pixel": nll.per_pixel.mean().item(),
        "predict_nll_frame": nll.per_frame.mean().item(),
        "predict_white_precision": white.precision,
        "predict_white_recall": white.recall,
        "predict_white_f1": white.f1,
        "predict_bce_double_sigmoid": bernoulli.bce_double_sigmoid(decoded, target).mean().item(),
        "constant_predict_nll_pixel": bernoulli.constant_nll(target),
        **{f"{name}_predict_bce_double_sigmoid": value for name, value in bounds._asdict().items()},
    }
    assert {key: baseline[0][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert baseline[0]["paper"]["predict_bce_double_sigmoid"] == {**trajectories.PAPER}


def test_report_shows_table_tracks_and_overlays(
    exact: tuple[dict[str, Any], Path], baseline: tuple[dict[str, Any], Path, str]
):
    for out, tracks, latent in ((exact[1], "true, inferred, predicted, interpolated", 4), (baseline[1], "k-means", 0)):
        page = (out / "report.html").read_text()
        part = page[page.index('<section id="trajectories">') : page.index('<section id="clips">')]
        assert "3 objects<br>2 clips" in part
        assert "Beside the loss with a second sigmoid stand the paper&#x27;s 0.691" in part
        assert tracks in part
        assert part.count("latent tracks of") + part.count("Before the map") == latent
        assert "laid over each other: predicted 6-30, true 6-30" in part
        assert "Position error up to one affine map" in page
    assert "interpolated 6-25" not in part
    assert "Inferred positions, up to one affine map: not known, family ed_lstm has no positions" in part


def test_slots_that_exchange_their_objects_in_flight_are_counted():
    clips = cannons(3)
    model = knowing(clips, exchange=True)
    true = trajectory.Map(MATRIX, OFFSET)
    metrics = summary(model, found_of(model, clips, horizon=0), horizon=0, maps=trajectories.Maps(true, true, 0, ""))
    assert metrics["by_objects"]["2"]["identity_swap_rate"] == 1
    assert metrics["collapse_share"] == 0
    assert metrics["by_objects"]["1"]["position_r2"] == pytest.approx(1)
    assert metrics["by_objects"]["2"]["position_r2"] < 0.9
    assert metrics["warnings"] == []  # and not taken for a fold


def test_latents_that_follow_the_distance_from_the_middle_are_called_folded():
    clips = cannons(40, data=DATA.replace("1-3", "1"))
    model = knowing(clips, fold=True)
    metrics = summary(model, found_of(model, clips, horizon=0), horizon=0)
    assert metrics["map"]["note"] == "fitted on the 40 measured clips themselves, since so it is tested"
    assert metrics["position_r2_x"] < 0.2 < 0.9 < metrics["position_r2_y"]
    (warning,) = metrics["warnings"]
    assert "look folded" in warning
    assert "along x" in warning
    assert f"WARNING: {warning}" in trajectories.told(metrics)[0]


def test_recovery_and_its_bootstrap_are_those_of_the_metric():
    clips = cannons(9)
    random = np.random.default_rng(0)
    found = trajectories.join([trajectories._truth(clips)])
    slots = np.pad(found.objects, ((0, 0), (1, 0)))  # the first of four is empty
    noisy = np.pad(found.true, ((0, 0), (0, 0), (1, 0), (0, 0)))
    noisy = noisy + random.normal(size=noisy.shape) * 0.1
    found = found._replace(slots=slots, encoded=noisy, log_prior=np.ones((9, 2)))
    metrics = summary(knowing(clips), found, horizon=0)
    maps = trajectories.own_maps(found, "")
    assert isinstance(maps, trajectories.Maps)
    for rows, group in ((slice(None), metrics), (found.counts == 2, metrics["by_objects"]["2"])):
        for prefix, fitted in (("", maps.affine), ("similarity_", maps.similarity)):
            expected = trajectory.recovery(
                fitted(noisy[rows]), found.true[rows], frame_size=(SIZE, SIZE), slots=slots[rows],
                objects=found.objects[rows],
            )  # fmt: skip
            values = [group[f"{prefix}position_{name}"] for name in ("r2", "r2_y", "r2_x", "rmse_px")]
            assert values == pytest.approx([expected.r2, *expected.r2_axes, expected.rmse])
            low, high = group["interval95"][f"{prefix}position_r2"]
            assert low <= expected.r2 <= high < 1


def test_clips_measured_one_by_one_give_the_same_as_together():
    clips = cannons(3)
    model = knowing(clips)
    parts = trajectories.join([found_of(model, [clip]) for clip in clips])
    together = found_of(model, clips)
    for name, one, other in zip(together._fields, parts, together, strict=True):
        assert one is not None
        assert other is not None
        assert one.shape == other.shape, name
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)


def stripped(clips: Sequence[Clip], *names: str) -> list[Clip]:
    return [replace(clip, truth={k: v for k, v in clip.truth.items() if k not in names}) for clip in clips]


def test_data_without_positions_leave_distances_null_and_keep_likelihood_and_counts():
    clips = stripped(cannons(3), "positions", "present", "rendered_positions")
    model = knowing(cannons(3))
    metrics = summary(model, found_of(model, clips))
    for key in ("position_r2", "identity_swap_rate", "predict_error_px", "copy_last_predict_error_px",
                "predict_kmeans_px", "interpolate_error_px", "log_prior_px", "map"):  # fmt: skip
        assert metrics[key] is None
        assert metrics["reasons"][key] == "the clips hold no true positions"
    assert metrics["predict_nll_pixel"] is not None
    assert metrics["by_objects"].keys() == {"1", "2", "3"}
    assert metrics["log_prior"] is not None
    assert metrics["gravity_px"] is None
    # Where not even the number of objects is known there are no groups.
    family = "ed_lstm"
    other = build(PRESETS[family]["debug"].model).eval()
    metrics = summary(other, found_of(other, stripped(clips, "num_objects"), family), family)
    assert metrics["by_objects"] == {}
    assert metrics["num_objects"] == [None] * 3
    assert metrics["predict_nll_pixel"] is not None


@pytest.mark.parametrize(
    "origins", [["", "", ""], ["sim:cannonballs:balls=1", "sim:cannonballs:balls=1", ""], ["sim:cannonballs:x=1"] * 3]
)
def test_gravity_is_compared_only_where_all_clips_say_which_it_is(origins: list[str]):
    clips = cannons(3)
    model = knowing(clips)
    found = found_of(model, clips, horizon=0)
    assert summary(model, found, horizon=0)["gravity_along"] == pytest.approx(1, abs=1e-5)
    metrics = summary(model, found._replace(origins=np.array(origins)), horizon=0)
    assert metrics["gravity_along"] is metrics["true_gravity_px"] is None
    assert metrics["reasons"]["gravity_along"].startswith("the true acceleration is known of one set")
    assert metrics["predictor_spectrum"] is not None


def test_objects_that_come_and_go_are_not_compared():
    clips = cannons(3)
    clips[2].truth["present"][10:, 0] = False
    model = knowing(clips)
    metrics = summary(model, found_of(model, clips))
    assert metrics["reasons"]["position_r2"].startswith("objects of 1 clips are not in all of their frames")


@pytest.mark.parametrize(
    ("context", "horizon", "reasons"),
    [
        (5, 0, {"predict_error_px": "horizon is 0, so nothing was predicted", "predict_nll_pixel": "horizon is 0"}),
        (5, 5, {"interpolate_error_px": "a gap needs a horizon of more than 5, it is 5"}),
        (1, 9, {"constant_velocity_predict_error_px": "a velocity needs a context of at least 2 frames"}),
    ],
)
def test_what_the_frames_do_not_allow_is_null_with_a_reason(context: int, horizon: int, reasons: dict[str, str]):
    clips = cannons(2)
    model = SSM(EXACT).eval()
    metrics = summary(model, found_of(model, clips, context=context, horizon=horizon), context=context, horizon=horizon)
    assert metrics["position_r2"] is not None
    for key, reason in reasons.items():
        assert metrics[key] is None
        assert reason in metrics["reasons"][key]


def test_a_clip_that_is_not_finite_leaves_the_models_numbers_null_and_the_baselines_known():
    clips = cannons(3)
    model = knowing(clips)
    knowledge = model.inference
    assert isinstance(knowledge, KnowsAll)
    knowledge.latents[1][:] = np.nan
    found = found_of(model, clips)
    metrics = summary(model, found)
    for key in ("position_r2", "predict_error_px", "interpolate_error_px", "log_prior"):
        assert metrics["reasons"][key] == "the latents of 1 clips hold values that are not finite"
    assert metrics["reasons"]["predict_nll_pixel"] == "the predicted frames of 1 clips hold values that are not finite"
    assert metrics["copy_last_predict_error_px"] is not None
    assert metrics["constant_predict_nll_pixel"] is not None
    tracks = trajectories.clip_tracks(found, "there is no map", 1, CONTEXT)
    assert tracks.in_frame.keys() == {"true"}


def test_tracks_to_draw_are_in_the_order_of_the_true_objects():
    clips = cannons(3)
    model = knowing(clips)
    found = found_of(model, clips)
    tracks = trajectories.clip_tracks(found, trajectories.own_maps(found, ""), 2, CONTEXT)
    true = clips[2].truth["positions"]
    for name, cut in (("inferred", slice(None)), ("predicted", slice(5, None)), ("interpolated", slice(5, 25))):
        np.testing.assert_allclose(tracks.in_frame[name], true[cut], atol=1e-4)
        back = (true[cut] - OFFSET) @ np.linalg.inv(MATRIX).T
        np.testing.assert_allclose(tracks.latent[name], back, atol=1e-3)
    together = trajectories.latent_tracks(found)
    assert {name: track.shape for name, track in together.items()} == {
        "1 slot": (1, 30, 1, 2), "2 slots": (1, 30, 2, 2), "3 slots": (1, 30, 3, 2)
    }  # fmt: skip


def test_map_comes_from_other_clips_where_the_data_have_some(monkeypatch: pytest.MonkeyPatch):
    clips = {split: cannons(6, split) for split in ("val", "test")}
    model = knowing([*clips["val"], *clips["test"]])

    def told(splits: dict[str, int], split: str = "test") -> Any:
        from pipeline.reader import open_source

        def episodes(split: str, first: int, count: int, seed: int | None) -> Any:
            return simulator(DATA.removeprefix("sim:")).episodes(split, first, count, seed)

        monkeypatch.setitem(SIMULATORS, "toy", Simulator("toy", splits, 30, SIZE, SIZE, 10.0, episodes))
        source = open_source("sim:toy", split)
        return trajectories.fit(model, FAMILIES["ssm"], "sim:toy", source, batch_size=4, limit=6)

    fitted = told({"test": 6, "val": 6})
    assert (fitted.clips, fitted.note) == (6, "fitted on the first 6 clips of split 'val'")
    assert told({"test": 6}) == "the data have no split 'val'"
    assert told({"test": 6, "val": 6}, "val") == "split 'val' is the one that was measured"
    assert told({"test": 6, "val": 0}) == "split 'val' has no clips"


def test_text_in_the_section_is_escaped():
    clips = cannons(2)
    model = SSM(EXACT).eval()
    found = found_of(model, clips)
    metrics = summary(model, found)
    metrics["map"]["note"] = "<b>"
    metrics["paper"] = {trajectories.BCE: {**trajectories.PAPER, "note": "<b>"}}
    metrics["reasons"] = dict.fromkeys(trajectories.KEYS, "<b>")
    metrics["by_objects"]["<b>"] = metrics["by_objects"].pop("1")
    frames = clips[0].frames
    tracks = ClipTracks({"<b>": clips[0].truth["positions"]}, {})
    clip = ReportClip("<b>", frames, frames, 10.0, CONTEXT, frames[CONTEXT:], tracks=tracks, rank="<b>")
    html = section(metrics, [clip], {"<b>": np.zeros((1, 3, 1, 2))})
    assert html.count("&lt;b&gt;") > 5
    assert "<b><b>" not in html.replace("<figcaption><b>", "")
