import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from objdyn.clips import collate, to_model_input
from objdyn.families import build
from objdyn.metrics import segmentation
from objdyn.simulators import bouncing_balls
from pipeline import protocol, store
from pipeline import shard as sharding
from pipeline.checkpoint import config_to_json, load_model, save_checkpoint
from pipeline.config import EvaluateRun, ShardRun
from pipeline.presets import PRESETS
from pipeline.protocol import Row, Table, bouncing_balls_protocol, more_balls, render
from tests import plain

OPTIONS = bouncing_balls.parse("balls=4,size=32,colors=4,frames=12")


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


def ours(table: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in table["rows"] if row["origin"] == "ours")


def test_three_tables_and_the_predictions_are_printed_and_stored(provide: tuple[str, dict[str, Any]]):
    text, stored = provide
    headings = ("Table 1.", "Table 2.", "Table 3.", "Prediction after 20 frames", "Velocity cosine")
    assert all(heading in text for heading in headings)
    assert stored["text"] == text
    paper = row(stored["tables"]["table1"], "PROVIDE")
    assert paper["origin"] == "paper"
    assert paper["values"]["ari"] == [0.7275, 0.7291, 0.7298, 0.7301]
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
    found = ours(stored["tables"]["table1"])
    assert [value is None for value in found["values"]["ari"]] == [False, True, True, True]
    assert found["reasons"]["ari/20"] == "the videos have 12 frames, fewer than 20"
    assert "[1] " in text
    assert stored["colours"] == "binary"
    assert "fewer than 30" in row(stored["tables"]["prediction"], "PROVIDE")["reasons"]["*"]


def test_balls_that_do_not_fit_get_the_radii_of_the_paper():
    options = bouncing_balls.parse("balls=3,radius=1-1.5,colors=random4")
    wider, notes = more_balls(options, "random8")
    assert (wider.balls, wider.radius, wider.colors, wider.frames) == ((6, 8), None, "random8", 51)
    assert "do not fit" in notes[0]
    assert more_balls(bouncing_balls.parse("radius=0.6-1"), "binary")[1] == ()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Two colour videos of 12 frames, as make_shards.py leaves them."""
    out = str(tmp_path / "data")
    with plain.without_ray():
        sharding.shard(ShardRun(source=f"sim:{OPTIONS.name}", out=out, split="test", frames=12, size=32, limit=2))
    return out


def test_slots_and_a_dataset_folder_give_table_2(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch):
    measured: list[int] = []

    def measure_slots(bench: Any, loaded: Any, *words: Any, **more: Any) -> Any:
        measured.append(loaded.config.num_slots)
        return original(bench, loaded, *words, **more)

    original = protocol._Bench.measure
    monkeypatch.setattr(protocol._Bench, "measure", measure_slots)
    text, stored = measure("provide", tmp_path, data=folder, set=("model.num_slots=9",))
    table = stored["tables"]["table2"]
    assert table["title"] == "Table 2. Generalization to more objects, colour"
    frames = to_model_input(collate([bouncing_balls.episodes(OPTIONS, "test", 0, 1)[0].clip(0, 10)]))
    errors = []
    for slots in (3, 9):
        model = load_model(str(tmp_path / "run"), overrides={"num_slots": slots}).model
        with torch.no_grad():
            errors.append(float((model.decode(model.encode(frames)).video - frames).square().mean()))
    assert measured == [3, 9]  # without training the two hardly differ
    assert ours(stored["tables"]["table1"])["values"]["mse"][0] == pytest.approx(errors[0], rel=1e-5)
    assert ours(table)["values"]["mse"] == [pytest.approx(errors[1], rel=1e-5), None]
    assert ours(table)["reasons"]["mse/40"] == "the videos have 12 frames, fewer than 40"
    assert row(table, "threshold + components")["values"]["fg_ari"][0] is not None
    assert "Slots: trained with 3, tested with 9." in table["notes"]
    assert "Slots: 3, as in training; --set model.num_slots is for Table 2 alone." in text
    assert "evaluate a dataset that has them" not in text


def test_a_dataset_folder_without_slots_has_no_table_2_and_stands_beside_clevrer(tmp_path: Path, folder: str):
    text, stored = measure("iodine", tmp_path, data=folder)
    assert "--data DIR --set model.num_slots=9" in ours(stored["tables"]["table2"])["reasons"]["*"]
    table1, table2 = stored["tables"]["table1"], stored["tables"]["table2"]
    assert row(table1, "PROVIDE")["values"]["ari"][0] == 0.7275
    assert row(table1, "PROVIDE, CLEVRER")["values"]["ari"] == [0.2220, 0.2403, 0.2555, 0.2681]
    assert row(table1, "SEQ-IODINE, CLEVRER")["values"]["fg_ari"] == [0.8520, 0.8774, 0.8780, 0.8759]
    assert row(table2, "SEQ-IODINE, CLEVRER")["values"]["mse"] == [0.0012, 0.0012]
    assert row(table2, "PROVIDE, 8 colours")["values"]["fg_ari"] == [0.9900, 0.9900]
    assert "colour Bouncing Balls with 4 balls, or, where the name says so, of CLEVRER with 3 to 5 objects." in text
    assert "colour Bouncing Balls with 6 to 8 balls, or, where the name says so, of CLEVRER with 6 objects." in text


def test_the_simulators_videos_have_no_clevrer_beside_them(provide: tuple[str, dict[str, Any]]):
    assert "CLEVRER" not in provide[0]


def test_table_2_takes_nine_slots_where_none_are_given(iodine: tuple[str, dict[str, Any]]):
    assert "Slots: trained with 3, tested with 9." in iodine[1]["tables"]["table2"]["notes"]


def test_each_table_with_the_papers_numbers_says_what_they_may_include(
    provide: tuple[str, dict[str, Any]], iodine: tuple[str, dict[str, Any]]
):
    for text, stored in (provide, iodine):
        assert text.count(protocol.NO_FEATURES) == 3
        assert all(protocol.NO_FEATURES in stored["tables"][name]["notes"] for name in ("table1", "table2", "table3"))


def test_table_3_has_the_trivial_baselines_at_its_length(provide: tuple[str, dict[str, Any]]):
    table1, table3 = provide[1]["tables"]["table1"], provide[1]["tables"]["table3"]
    for name in ("one cluster", "threshold + components"):
        assert row(table3, name)["origin"] == "baseline"
        for metric in ("ari", "fg_ari"):
            assert row(table3, name)["values"][metric] == [row(table1, name)["values"][metric][1]]
        assert row(table3, name)["reasons"] == {"mse/": "it reconstructs nothing"}
    for metric in ("ari", "fg_ari", "mse"):
        assert ours(table3)["values"][metric] == [ours(table1)["values"][metric][1]]


def without_truth(monkeypatch: pytest.MonkeyPatch, *videos: int) -> None:
    """Take the true segmentation from some of the videos."""

    def clips(*words: Any, **more: Any) -> Any:
        for number, clip in enumerate(original(*words, **more)):
            hidden = {"segmentation"} if number in videos else set()
            truth = {name: array for name, array in clip.truth.items() if name not in hidden}
            yield dataclasses.replace(clip, truth=truth)

    original = protocol.iter_clips
    monkeypatch.setattr(protocol, "iter_clips", clips)


def test_videos_without_true_segmentation_have_an_error_and_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_truth(monkeypatch, 0)
    monkeypatch.setattr(protocol._Bench, "more_balls", lambda *_: Table("", (), ()))
    text, stored = measure("provide", tmp_path, data="sim:bouncing-balls:balls=2,size=32,frames=30")
    for name, columns in (("table1", 3), ("prediction", 4), ("table3", 1)):
        found = ours(stored["tables"][name])
        assert None not in found["values"]["mse"][:columns]
        assert found["values"]["ari"] == found["values"]["fg_ari"] == [None] * len(found["values"]["mse"])
        assert "the videos hold no true segmentation" in found["reasons"].values()
    assert "no true segmentation" in text
    assert stored["velocity_cosine"]["per_frame"] is not None


def test_videos_with_truth_count_alone_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol._Bench, "more_balls", lambda *_: Table("", (), ()))
    data = "sim:bouncing-balls:balls=2,size=32,frames=12"
    alone = measure("iodine", tmp_path / "alone", data=data, limit=1)[1]["tables"]["table1"]
    without_truth(monkeypatch, 1, 2)
    for size in (1, 3):
        some = measure("iodine", tmp_path / str(size), data=data, limit=3, batch_size=size)[1]["tables"]["table1"]
        for metric in ("ari", "fg_ari"):
            assert ours(some)["values"][metric][0] == pytest.approx(ours(alone)["values"][metric][0], abs=1e-6)
        assert ours(some)["values"]["mse"][0] != ours(alone)["values"]["mse"][0]
        assert "ARI and F-ARI are means over the 1 of 3 videos that hold a true segmentation." in some["notes"]


@pytest.mark.parametrize(("colors", "clamps"), [("binary", [(10, None), (20, 10.0)]), ("4", [(20, None)])])
def test_sequential_inference_is_clamped_on_long_binary_videos_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colors: str, clamps: list[tuple[int, float | None]]
):
    seen: list[tuple[int, float | None]] = []

    def measured(bench: Any, loaded: Any, videos: Any, lengths: Any, **more: Any) -> Any:
        if loaded.config.inference == "sequential":
            seen.append((max(n for n in lengths if n <= videos.source.num_frames), loaded.config.sequential_clamp))
        return original(bench, loaded, videos, lengths, **more)

    original = protocol._Bench.measure
    monkeypatch.setattr(protocol._Bench, "measure", measured)
    monkeypatch.setattr(protocol._Bench, "more_balls", lambda *_: Table("", (), ()))
    measure("iodine", tmp_path, data=f"sim:bouncing-balls:balls=2,size=32,colors={colors},frames=20")
    assert seen == clamps


def test_the_sequential_row_is_that_of_sequential_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol._Bench, "more_balls", lambda *_: Table("", (), ()))
    _, stored = measure("iodine", tmp_path, data=f"sim:{OPTIONS.name}")
    clip = bouncing_balls.episodes(OPTIONS, "test", 0, 1)[0].clip(0, 10)
    model = load_model(str(tmp_path / "run"), overrides={"inference": "sequential"}).model
    video = to_model_input(collate([clip]))
    with torch.no_grad():
        scene = model.decode(model.encode(video), components=True)
    found = segmentation.segment(scene.masks.numpy())
    sequential, plain = (
        next(r for r in stored["tables"]["table1"]["rows"] if (r["name"], r["origin"]) == (name, "ours"))["values"]
        for name in ("SEQ-IODINE", "IODINE")
    )
    error = float((scene.video - video).square().mean())
    assert abs(error - plain["mse"][0]) > 1e-4 * error
    assert sequential["mse"][0] == pytest.approx(error, rel=1e-5)
    ari = segmentation.frame_ari(clip.truth["segmentation"][None], found, foreground=False).mean()
    assert sequential["ari"][0] == pytest.approx(ari, abs=1e-6)


def test_predictions_are_compared_with_the_frames_after_the_seen_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def perfect(model: Any, latents: Any, masks: bool) -> Any:
        rendered = original(model, latents, masks)
        if rendered.video.shape[1] != 10:  # of frames that are seen
            return rendered
        future = clip.window(20, 10)
        return rendered._replace(
            video=to_model_input(collate([future])), segments=future.truth["segmentation"][None].astype(np.int64)
        )

    clip = bouncing_balls.episodes(bouncing_balls.parse("balls=2,size=32,frames=30"), "test", 0, 1)[0].clip()
    original = protocol.segments.render
    monkeypatch.setattr(protocol.segments, "render", perfect)
    monkeypatch.setattr(protocol._Bench, "more_balls", lambda *_: Table("", (), ()))
    _, stored = measure("provide", tmp_path, data="sim:bouncing-balls:balls=2,size=32,frames=30")
    table = stored["tables"]["prediction"]
    for name in ("PROVIDE, at the frame", "PROVIDE, mean up to it"):
        values = row(table, name)["values"]
        assert values["ari"] == values["fg_ari"] == pytest.approx([1.0] * 4)
        assert values["mse"] == pytest.approx([0.0] * 4)
    pixels = clip.frames.astype(np.float64) / 255
    errors = [np.square(pixels[19] - pixels[19 + n]).mean() for n in (3, 5, 7, 10)]
    assert row(table, "copied last frame and masks")["values"]["mse"] == pytest.approx(errors)


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
    found = ours(stored["tables"]["table1"])
    assert found["values"]["ari"] == pytest.approx([1.0, 0.75, None, None])
    assert found["values"]["fg_ari"] == pytest.approx([1.0, 0.75, None, None])


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
