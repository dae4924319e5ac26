import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objdyn.clips import Clip, collate, to_model_input
from objdyn.families import FAMILIES, Family, build
from objdyn.interface import Loss, Scene
from objdyn.metrics.segmentation import frame_ari, segment
from objdyn.simulators import bouncing_balls
from pipeline import object_dynamics, store
from pipeline.checkpoint import config_to_json, load_model, save_checkpoint
from pipeline.config import EvaluateRun
from pipeline.object_dynamics import CONTEXT, HORIZON, LENGTH, object_dynamics_protocol, windows
from pipeline.presets import PRESETS

OPTIONS = bouncing_balls.parse("balls=3,size=32,colors=4,frames=19")
DATA = f"sim:{OPTIONS.name}"
CLIPS, BALLS = 12, 3
MIX = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.0, 0.0], [0.0, -4.0]])
"""From a velocity (y, x) to the oracle's dynamics vector."""


@dataclass(frozen=True)
class OracleConfig:
    """A model that is told the truth."""

    noise: bool = False
    background_apart: bool = False
    """The background is a component, but no slot."""


class OracleLatents(NamedTuple):
    static: Tensor
    dynamics: Tensor
    masks: Tensor
    colors: Tensor


class Oracle(nn.Module):
    """Slots are the true objects and the background, in another order in every frame.

    ``dynamics`` is ``MIX`` times the velocity, or noise, NaN in the first frame; ``static`` is the position. Its
    predictions are black.
    """

    def __init__(self, config: OracleConfig) -> None:
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.zeros(1))

    def forward(self, video: Tensor) -> Loss:
        raise NotImplementedError

    def encode(self, video: Tensor, *, positions: Tensor, segmentation: Tensor) -> OracleLatents:
        first = int(self.config.background_apart)
        names = torch.arange(BALLS + 1)[:, None, None]
        masks = (segmentation[:, :, None] == names).float().unsqueeze(3)  # b t k 1 h w
        total = masks.sum(dim=(3, 4, 5))[..., None].clamp(min=1)
        colors = (video[:, :, None] * masks).sum(dim=(4, 5)) / total
        places = torch.cat([torch.zeros_like(positions[:, :, :1]), positions], dim=2)
        speed = torch.full_like(places, torch.nan)
        speed[:, 1:] = places[:, 1:] - places[:, :-1]
        dynamics = speed @ MIX.T
        if self.config.noise:
            dynamics = torch.randn(dynamics.shape, generator=torch.Generator().manual_seed(int(1e3 * positions.sum())))
        latents = OracleLatents(places[:, :, first:], dynamics[:, :, first:], masks, colors)
        if first:
            return latents
        order = [torch.roll(torch.arange(BALLS + 1), t) for t in range(video.shape[1])]
        return OracleLatents(*(torch.stack([f[:, t, o] for t, o in enumerate(order)], dim=1) for f in latents))

    def rollout(
        self, latents: OracleLatents, horizon: int, *, generator: torch.Generator | None = None
    ) -> OracleLatents:
        last = OracleLatents(*(field[:, -1:].repeat_interleave(horizon, dim=1) for field in latents))
        return last._replace(colors=0 * last.colors)

    def decode(self, latents: OracleLatents, components: bool = False) -> Scene:
        painted = latents.masks * latents.colors[..., None, None]
        return Scene(painted.sum(dim=2), latents.masks, painted) if components else Scene(painted.sum(dim=2))


@pytest.fixture(scope="module", autouse=True)
def oracle() -> Iterator[None]:
    """Makes the oracle a family while this file is tested."""
    family = Family(
        config=OracleConfig,
        model=Oracle,
        inputs={"positions": "", "segmentation": ""},
        verbs=("forward", "encode", "rollout", "decode"),
        causal=True,
        tracked=False,
        object_columns=("static", "dynamics"),
        frame_columns=(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "oracle", family)
        yield


def save(family: str, folder: Path, config: Any = None) -> str:
    run = PRESETS["iodine" if config else family]["debug"]
    config = config or run.model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(config)
    state = {"family": family, "run": config_to_json(run), "model": config_to_json(config)}
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(str(folder / family), 0, model=model, optimizer=optimizer, state=state, keep_last=1)
    return str(folder / family)


def measure(checkpoint: str, folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = {"limit": CLIPS, "device": "cpu", "protocol": "object-dynamics", "data": DATA} | changes
    out = str(folder / "out")
    text = object_dynamics_protocol(EvaluateRun(checkpoint, out=out, report_clips=1, **settings))
    return text, store.read_json(f"{out}/protocol.json")


def clips(count: int = CLIPS) -> list[Clip]:
    return [episode.clip() for episode in bouncing_balls.episodes(OPTIONS, "test", 0, count)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The oracle's results."""
    folder = tmp_path_factory.mktemp("oracle")
    return folder, *measure(save("oracle", folder, OracleConfig()), folder)


def row(table: dict[str, Any], name: str, origin: str = "ours") -> dict[str, Any]:
    return next(row for row in table["rows"] if (row["name"], row["origin"]) == (name, origin))


def pixels() -> np.ndarray:
    """All windows of the clips, float (clips, windows, 8, h, w, c)."""
    whole = np.stack([clip.frames for clip in clips()]) / 255
    return np.stack([whole[:, :8], whole[:, 8:16]], axis=1)


def test_a_linear_map_from_dynamics_to_velocity_is_found_under_permuted_slots(told: tuple[Path, str, dict[str, Any]]):
    _, text, stored = told
    found = stored["probes"]["oracle"]["from"]
    for name in ("dynamics", "both", "change of static"):
        assert list(found[name]["r2"].values()) == pytest.approx([1.0] * 3, abs=1e-9), name
    assert found["static"]["r2"]["overall"] < 0.5
    assert found["dynamics"]["pairs"]["held_out"] > 50
    assert found["dynamics"]["videos"] == {"fitted": 8, "held_out": 4}
    visible = [clip.window(start, 8).truth["segmentation"] for clip in clips() for start in (0, 8)]
    objects = sum(len(np.unique(frame)) - 1 for window in visible for frame in window[1:])
    probe = stored["probes"]["oracle"]
    hidden = probe["dropped"]["not visible"]
    assert objects + hidden == CLIPS * 2 * 7 * BALLS
    assert probe["pairs"] == objects - probe["dropped"]["not visible before"]
    assert "oracle, from static (ours)" in text


def test_a_background_that_is_no_slot_does_not_shift_the_others(tmp_path: Path, told: tuple[Path, str, dict[str, Any]]):
    _, stored = measure(save("oracle", tmp_path, OracleConfig(background_apart=True)), tmp_path)
    assert stored["probes"]["oracle"]["pairs"] == told[2]["probes"]["oracle"]["pairs"]
    assert stored["probes"]["oracle"]["from"]["dynamics"]["r2"]["overall"] == pytest.approx(1.0, abs=1e-9)


def test_probe_json_is_the_map_in_plain_numbers(told: tuple[Path, str, dict[str, Any]]):
    probe = json.loads((told[0] / "out" / "probe.json").read_text())
    assert (probe["column"], probe["targets"]) == ("dynamics", ["velocity_y", "velocity_x"])
    np.testing.assert_allclose(probe["weight"] @ MIX.double().numpy(), np.eye(2), atol=1e-4)
    np.testing.assert_allclose(probe["bias"], 0, atol=1e-6)
    assert probe["r2"]["overall"] == pytest.approx(1.0, abs=1e-9)


def test_noise_holds_no_velocity(tmp_path: Path):
    text, stored = measure(save("oracle", tmp_path, OracleConfig(noise=True)), tmp_path)
    assert stored["probes"]["oracle"]["from"]["dynamics"]["r2"]["overall"] < 0.1
    assert stored["verdicts"][-1] in text


def test_errors_of_each_step_are_those_worked_out_by_hand(told: tuple[Path, str, dict[str, Any]]):
    _, _, stored = told
    true = pixels()
    copied = np.square(true[:, :, 2:] - true[:, :, 1:2]).mean(axis=(0, 1, 3, 4, 5))
    black = np.square(true[:, :, 2:]).mean(axis=(0, 1, 3, 4, 5))
    table = stored["tables"]["prediction"]
    for name, origin, expected in (
        ("copied last frame", "baseline", copied),
        ("oracle, last latents decoded", "ours", copied),  # it reconstructs exactly
        ("oracle", "ours", black),
    ):
        values = row(table, name, origin)["values"]["mse"]
        assert values == pytest.approx([*expected, expected.mean()], rel=1e-5), name
    assert stored["windows"] == 2 * CLIPS
    below = [step for step in range(1, 7) if black[step - 1] < copied[step - 1]]
    assert 0 < len(below) < 6  # far from where they were, two balls in the wrong place cost more than none
    said = f"less prediction error than copied last frame at {len(below)} of 6 steps: {', '.join(map(str, below))}."
    assert f"oracle has {said}" in stored["verdicts"]


def test_true_masks_and_colours_score_perfectly_and_the_papers_numbers_stand_beside(
    told: tuple[Path, str, dict[str, Any]],
):
    _, text, stored = told
    table = stored["tables"]["table3"]
    found = row(table, "oracle")["values"]
    assert (found["ari"], found["fg_ari"]) == ([1.0], [1.0])
    assert found["mse"] == [pytest.approx(0.0, abs=1e-12)]
    assert row(table, "one cluster", "baseline")["values"]["ari"] == [0.0]
    assert row(table, "ODDN", "paper")["values"] == {"mse": [0.000075], "ari": [0.156], "fg_ari": [0.9563]}
    assert "0.000075" in text
    assert "95.63%" in text


def test_clips_with_other_truth_are_counted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: tuple[Path, str, dict[str, Any]]
):
    def some(*words: Any, **more: Any) -> Any:
        for number, clip in enumerate(original(*words, **more)):
            truth = dict(clip.truth)
            if number == 1:
                truth["segmentation"] = np.where(clip.truth["segmentation"] == 3, np.uint8(9), truth["segmentation"])
            yield dataclasses.replace(clip, truth=truth)

    original = object_dynamics.iter_clips
    run = save("oracle", tmp_path, OracleConfig())
    whole = told[2]
    assert whole["unusable_for_probes_count"] == 0
    monkeypatch.setattr(object_dynamics, "iter_clips", some)
    text, stored = measure(run, tmp_path)
    message = "test-000001: its segmentation has the id 9, its positions are of 3 objects"
    assert (stored["unusable_for_probes_count"], stored["unusable_for_probes"]) == (1, [message])
    assert message in text
    before, after = whole["probes"]["oracle"], stored["probes"]["oracle"]
    assert before["pairs"] - 2 * 7 * BALLS <= after["pairs"] < before["pairs"] - 2 * 7
    assert after["from"]["dynamics"]["r2"]["overall"] == pytest.approx(1.0, abs=1e-9)


def test_too_few_clips_for_a_probe_are_a_reason_and_an_old_map_goes(tmp_path: Path):
    run = save("oracle", tmp_path, OracleConfig())
    measure(run, tmp_path, limit=4)
    assert (tmp_path / "out" / "probe.json").exists()
    text, stored = measure(run, tmp_path, limit=1)
    assert not (tmp_path / "out" / "probe.json").exists()
    probe = stored["probes"]["oracle"]
    assert probe["reason"] == "a probe needs clips of at least 2 videos, one of them held out, got 1"
    assert probe["pairs"] + sum(probe["dropped"].values()) == 2 * 7 * BALLS
    assert "at least 2 videos" in text


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Debug models of four families on the same three clips."""
    folder = tmp_path_factory.mktemp("families")
    compare = tuple(f"{name}={save(name, folder)}" for name in ("iodine", "ssm", "ed_lstm"))
    return folder, *measure(save("provide", folder), folder, compare=compare, limit=3, batch_size=4)


def test_a_table_row_is_what_the_models_own_verbs_give(families: tuple[Path, str, dict[str, Any]]):
    folder, _, stored = families
    parts = list(windows(iter(clips(3))))
    video = to_model_input(collate(parts))
    model = load_model(str(folder / "provide")).model
    with torch.no_grad():
        whole = model.encode(video)
        scene = model.decode(whole, components=True)
        seen = model.encode(video[:, :CONTEXT])
        ahead = model.decode(model.rollout(seen, HORIZON)).video
        held = model.decode(type(seen)(*(field[:, -1:] for field in seen))).video
    true = np.stack([clip.truth["segmentation"] for clip in parts])
    ari = frame_ari(true, segment(scene.masks.numpy()), foreground=False).mean()
    found = row(stored["tables"]["table3"], "provide")["values"]
    assert found["mse"][0] == pytest.approx(float((scene.video - video).square().mean()), rel=1e-4)
    assert found["ari"][0] == pytest.approx(ari, abs=0.01)  # of an untrained model a pixel may go either way
    for name, frames in (("provide", ahead), ("provide, last latents decoded", held)):
        errors = (frames - video[:, CONTEXT:]).square().mean(dim=(0, 2, 3, 4)).tolist()
        values = row(stored["tables"]["prediction"], name)["values"]["mse"]
        assert values[:HORIZON] == pytest.approx(errors, rel=1e-3), name


def test_a_family_without_rollout_still_holds_its_last_latents(families: tuple[Path, str, dict[str, Any]]):
    _, _, stored = families
    table = stored["tables"]["prediction"]
    assert row(table, "iodine")["values"]["mse"] == [None] * (HORIZON + 1)
    assert set(row(table, "iodine")["reasons"].values()) == {"family iodine does not predict: it has no rollout"}
    assert None not in row(table, "iodine, last latents decoded")["values"]["mse"]
    for name in ("ssm", "ed_lstm"):
        assert None not in row(table, name)["values"]["mse"]
    for name in ("provide", "iodine", "ssm", "ed_lstm"):
        assert None not in [
            value for values in row(stored["tables"]["table3"], name)["values"].values() for value in values
        ]
        assert stored["models"][name]["model"] != ""
        assert row(stored["tables"]["probe"], name)["reasons"] == {
            "*": f"the latents of family {name} have no dynamics"
        }


def test_results_are_figures_and_a_page_that_needs_nothing_else(families: tuple[Path, str, dict[str, Any]]):
    folder, text, stored = families
    out = folder / "out"
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert all(name in page for name in ("Table 3", "Prediction", "Probe", "last latents decoded", "--compare"))
    assert (out / "prediction.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "prediction_mse.svg").read_text().startswith("<svg xmlns=")
    assert not (out / "probe.json").exists()
    assert stored["text"] == text
    assert stored["command"].count("--compare") == 1


def test_clips_are_cut_into_windows_that_do_not_overlap():
    parts = list(windows(iter(clips(2))))
    assert [(part.key[-1], part.start_frame, len(part.frames)) for part in parts] == [
        ("0", 0, LENGTH), ("0", 8, LENGTH), ("1", 0, LENGTH), ("1", 8, LENGTH)
    ]  # fmt: skip


def test_short_clips_and_other_sizes_are_refused(tmp_path: Path):
    run = save("iodine", tmp_path)
    with pytest.raises(ValueError, match="hold 7 frames, the protocol needs 8"):
        measure(run, tmp_path, data="sim:bouncing-balls:balls=2,size=32,frames=7")
    with pytest.raises(ValueError, match="iodine was built for frames of 32x32"):
        measure(run, tmp_path, data="sim:bouncing-balls:balls=2,size=64,frames=8")


def test_names_of_checkpoints_must_differ(tmp_path: Path):
    run = save("iodine", tmp_path)
    with pytest.raises(ValueError, match="that of --checkpoint; choose another"):
        measure(run, tmp_path, compare=(f"iodine={run}",))
    for words, message in ((("a=x", "a=y"), "twice"), (("x",), "NAME=CHECKPOINT"), (("=x",), "NAME=CHECKPOINT")):
        with pytest.raises(ValueError, match=message):
            EvaluateRun("RUN", out="OUT", protocol="object-dynamics", compare=words)
    with pytest.raises(ValueError, match="compare is for --protocol object-dynamics"):
        EvaluateRun("RUN", out="OUT", data="DIR", compare=("a=x",))


def test_the_training_data_are_taken_where_none_are_given(tmp_path: Path):
    _, stored = measure(save("iodine", tmp_path), tmp_path, data="", limit=1)
    assert stored["data"] == PRESETS["iodine"]["debug"].data
