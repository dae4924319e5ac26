import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from objdyn.families import build
from objdyn.simulators import bouncing_balls
from pipeline import protocol, store
from pipeline.checkpoint import config_to_json, save_checkpoint
from pipeline.config import EvaluateRun
from pipeline.presets import PRESETS
from pipeline.protocol import Row, Table, bouncing_balls_protocol, more_balls, render


def save(family: str, folder: Path, **changes: Any) -> str:
    run = dataclasses.replace(PRESETS[family]["debug"], **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(run.model)
    state = {"family": family, "run": config_to_json(run), "model": config_to_json(run.model)}
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(str(folder), 0, model=model, optimizer=optimizer, state=state, keep_last=1)
    return str(folder)


def measure(family: str, folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = {"limit": 1, "device": "cpu", "protocol": "bouncing-balls"} | changes
    out = str(folder / "out")
    text = bouncing_balls_protocol(EvaluateRun(save(family, folder / "run"), out=out, **settings))
    return text, store.read_json(f"{out}/protocol.json")


@pytest.fixture(scope="module")
def provide(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return measure("provide", tmp_path_factory.mktemp("provide"), set=("model.num_slots=8", "model.kl_weight=2.0"))


@pytest.fixture(scope="module")
def iodine(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return measure("iodine", tmp_path_factory.mktemp("iodine"))


def row(table: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in table["rows"] if row["name"] == name)


def test_three_tables_and_the_predictions_are_printed_and_stored(provide: tuple[str, dict[str, Any]]):
    text, stored = provide
    headings = ("Table 1.", "Table 2.", "Table 3.", "Prediction after 20 frames", "Velocity cosine")
    assert all(heading in text for heading in headings)
    assert stored["text"] == text
    ours = row(stored["tables"]["table1"], "PROVIDE")
    assert ours["origin"] == "paper"
    assert ours["values"]["ari"] == [0.7275, 0.7291, 0.7298, 0.7301]
    measured = [r for r in stored["tables"]["table1"]["rows"] if r["origin"] == "ours"]
    assert [r["name"] for r in measured] == ["PROVIDE"]
    for metric in ("ari", "fg_ari", "mse"):
        assert all(value is not None for value in measured[0]["values"][metric])


def test_the_training_data_gives_the_test_data_long_enough(provide: tuple[str, dict[str, Any]]):
    _, stored = provide
    assert stored["dataset"] == "sim:bouncing-balls:balls=2,size=32,colors=random4,frames=40,radius=rnem,seed=0/test"
    assert "Trained on videos of 12 frames, tested on 40." in stored["tables"]["table1"]["notes"]
    assert stored["colours"] == "colour"


def test_slots_of_set_are_those_of_more_balls_only(provide: tuple[str, dict[str, Any]]):
    _, stored = provide
    assert stored["config"]["num_slots"] == 3
    assert stored["model_settings_changed"] == {"model.kl_weight": 2.0}
    table = stored["tables"]["table2"]
    assert "Slots: trained with 3, tested with 8." in table["notes"]
    assert any("colors=random8" in note for note in table["notes"])
    assert {"PROVIDE, 4 colours", "PROVIDE, 8 colours"} <= {r["name"] for r in table["rows"] if r["origin"] == "ours"}


def test_predictions_have_copied_masks_beside_them(provide: tuple[str, dict[str, Any]]):
    table = provide[1]["tables"]["prediction"]
    for name in ("PROVIDE, at the frame", "PROVIDE, mean up to it", "copied last frame and masks"):
        assert all(value is not None for metric in row(table, name)["values"].values() for value in metric)
    assert row(table, "one cluster")["values"]["ari"] == [0.0] * 4
    assert row(table, "one cluster")["values"]["mse"] == [None] * 4


def test_an_image_model_has_sequential_rows_and_no_prediction(iodine: tuple[str, dict[str, Any]]):
    _, stored = iodine
    names = [(r["name"], r["origin"]) for r in stored["tables"]["table1"]["rows"]]
    assert ("SEQ-IODINE", "ours") in names
    sequential = stored["tables"]["table1"]["rows"][names.index(("SEQ-IODINE", "ours"))]
    assert all(value is not None for value in sequential["values"]["fg_ari"])
    reason = "family iodine does not predict: it has no rollout"
    assert row(stored["tables"]["prediction"], "IODINE")["reasons"] == {"*": reason}
    assert stored["velocity_cosine"]["per_frame"] is None
    assert "none of the ablations" in row(stored["tables"]["table3"], "IODINE")["reasons"]["*"]


def test_lengths_beyond_the_videos_are_null_with_a_reason(tmp_path: Path):
    data = "sim:bouncing-balls:balls=2,size=32,frames=12"
    text, stored = measure("provide", tmp_path, data=data)
    ours = next(r for r in stored["tables"]["table1"]["rows"] if r["origin"] == "ours")
    assert [value is None for value in ours["values"]["ari"]] == [False, True, True, True]
    assert ours["reasons"]["ari/20"] == "the videos have 12 frames, fewer than 20"
    assert "[1] " in text
    assert stored["colours"] == "binary"
    assert "fewer than 30" in row(stored["tables"]["prediction"], "PROVIDE")["reasons"]["*"]


def test_balls_that_do_not_fit_get_the_radii_of_the_paper():
    options = bouncing_balls.parse("balls=3,radius=1-1.5,colors=random4")
    wider, notes = more_balls(options, "random8")
    assert (wider.balls, wider.radius, wider.colors, wider.frames) == ((6, 8), None, "random8", 51)
    assert "do not fit" in notes[0]
    assert more_balls(bouncing_balls.parse("radius=0.6-1"), "binary")[1] == ()


def test_length_scores_are_those_of_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def perfect(model: Any, latents: Any, masks: bool) -> Any:
        rendered = original(model, latents, masks)
        truth = bouncing_balls.episodes(options, "test", 0, 1)[0].clip(0, rendered.video.shape[1]).truth["segmentation"]
        found = truth[None].astype(np.int64)
        found[:, 15:] = 0  # one cluster from here on: ARI 0, F-ARI 0
        return rendered._replace(segments=found)

    options = bouncing_balls.parse("balls=2,size=32,frames=20")
    original = protocol.segments.render
    monkeypatch.setattr(protocol.segments, "render", perfect)
    monkeypatch.setattr(protocol._Bench, "more_balls", lambda *_: Table("", (), ()))
    _, stored = measure("provide", tmp_path, data="sim:bouncing-balls:balls=2,size=32,frames=20")
    ours = next(r for r in stored["tables"]["table1"]["rows"] if r["origin"] == "ours")
    assert ours["values"]["ari"] == pytest.approx([1.0, 0.75, None, None])
    assert ours["values"]["fg_ari"] == pytest.approx([1.0, 0.75, None, None])


def test_checkpoint_of_other_data_asks_for_data(tmp_path: Path):
    run = save("iodine", tmp_path / "run", data="sim:balls-interaction")
    with pytest.raises(ValueError, match="not on sim:bouncing-balls; say with --data"):
        bouncing_balls_protocol(EvaluateRun(run, out=str(tmp_path / "out"), protocol="bouncing-balls"))


def test_inference_cannot_be_set(tmp_path: Path):
    run = save("iodine", tmp_path / "run")
    words = ("model.inference=sequential",)
    with pytest.raises(ValueError, match=r"leave model\.inference out"):
        bouncing_balls_protocol(EvaluateRun(run, out=str(tmp_path / "out"), protocol="bouncing-balls", set=words))


def test_tables_are_aligned_and_give_each_reason_a_number():
    rows = (
        Row("a", "ours", {"ari": [0.5, None]}, {"ari/20": "too short"}),
        Row("longer name", "paper", {"ari": [0.25, -0.125]}),
        Row("c", "baseline", {}, {"*": "too short"}),
    )
    text = render(Table("T", ("10", "20"), rows, ("A note.",), metrics=("ari",)))
    assert text.splitlines() == [
        "T",
        "                     ARI 10   ARI 20",
        "a (ours)             0.5000     -[1]",
        "longer name (paper)  0.2500  -0.1250",
        "c                      -[1]     -[1]",
        "[1] too short",
        "A note.",
    ]
