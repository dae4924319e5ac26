import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from objdyn.families import build
from pipeline import cli, store
from pipeline.checkpoint import config_to_json, save_checkpoint
from pipeline.config import TrainRun
from pipeline.presets import PRESETS
from pipeline.report import (
    LatentWalk,
    Particles,
    Parts,
    ReportClip,
    Section,
    _error_map,
    clip_figures,
    compare_steps,
    data_facts,
    gallery,
    over_steps,
    provenance,
    quarantine,
    read_history,
    render_page,
    results_table,
    skipped_steps,
    stages,
    step_table,
    summary,
    training_command,
    training_curves,
    training_facts,
    write_report,
    write_run_report,
)

EVIL = """<script>alert(1)</script>"'&<img src=x onerror=alert(2)>"""


class Tags(HTMLParser):
    """Counts tags, checks that they close in order, and keeps what a browser would show or load."""

    VOID = frozenset({"meta", "img", "line", "polyline", "br", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    @property
    def sources(self) -> list[str]:
        return [value for _, name, value in self.attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def clip(key: str = "test-000000", prediction: bool = True) -> ReportClip:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    particles = Particles(rng.uniform(-1, 1, (8, 2, 2)), rng.uniform(0, 1, (8, 2)), None)
    return ReportClip(
        key=key,
        frames=frames,
        reconstruction=frames,
        fps=10.0,
        context=3 if prediction else 0,
        prediction=frames[3:] if prediction else None,
        particles=particles,
        predicted_particles=particles.frames(slice(3, None)) if prediction else None,
        parts=(Parts(0, np.full((3, 16, 16), 1 / 3), np.stack([frames[0]] * 3)),),
        scores={"prediction": 1.0},
        rank="worst, 1st of 7",
        source="a.mp4, frames 0 to 7",
    )


def evil(value: Any) -> Any:
    """The same value with EVIL for every text in it, and in every key that is not a name of ours."""
    if isinstance(value, str):
        return EVIL
    if isinstance(value, Mapping):
        free = not value.keys() & OUR_NAMES
        return {(EVIL + str(i) if free else name): evil(v) for i, (name, v) in enumerate(value.items())}
    return [evil(v) for v in value] if isinstance(value, list) else value


METRICS = {
    "family": "ddlp",
    "split": "test",
    "clips": 7,
    "command": "python jobs/evaluate.py --out o",
    "recon_psnr": 30.0,
    "constant_background_recon_psnr": 11.0,
    "predict_psnr": 9.0,
    "copy_last_predict_psnr": 10.5,
    "med10": None,
    "copy_last_med10": None,
    "constant_velocity_med10": None,
    "reasons": {"med10": "none", "copy_last_med10": "none", "constant_velocity_med10": "another"},
    "interval95": {"recon_psnr": [29.5, 30.25]},
    "curves": {"predict_psnr": [12.0, 9.0, None], "copy_last_predict_psnr": [11.0, 10.0, 9.0]},
    "model": "abc",
    "dataset": "def",
    "device": "cpu",
    "code": {"revision": "123", "dirty": True},
    "versions": {"torch": "2", "objdyn": "1"},
    "training": {"command": "python jobs/train_ddlp.py", "seed": 5, "code": {"revision": "4"}, "dataset": "ghi"},
    "data": {
        "clips": 7,
        "clips_in_split": 1200,
        "frames": 8,
        "height": 16,
        "width": 24,
        "channels": 3,
        "sources": 3,
        "fps": {"min": 9.0, "median": 10.0, "max": 10.0, "counts": {"10": 4, "9": 3}},
        "strides": {"2": 7},
        "seconds": {"min": 1.6, "median": 1.6, "max": 1.8},
        "brightness": {"mean": 0.5, "std": 0.1, "min": 0.1, "max": 0.9, "counts": [1, 0, 6]},
        "contrast": {"mean": 0.25, "std": 0.0, "min": 0.25, "max": 0.25, "counts": [7]},
        "motion": None,
        "outliers": [{"extreme": "darkest", "of": "brightness", "clip": "dark-clip", "value": 0.1}],
        "stored": {
            "shards": 2,
            "bytes": 2_000_000,
            "raw_bytes": 5_000_000,
            "codec": "zstd",
            "preprocessing": {"fit": "squeeze", "crop": None},
        },
        "quarantine": {
            "balance": "videos 9 = 1 read + 8 quarantined",
            "rows": 60,
            "codes": {"unreadable": 59, "too-short": 1},
            "shown": [{"source": "b.mp4", "stage": "probe", "code": "unreadable", "message": "no video"}] * 50,
        },
    },
}
OUR_NAMES = {
    *METRICS, *METRICS["curves"], *METRICS["data"], *METRICS["data"]["stored"], *METRICS["data"]["quarantine"],
    *METRICS["training"], "mean", "revision", "med10", "recon_psnr", "extreme", "source", "min",
}  # fmt: skip
HISTORY = [{"kind": "train", "step": s, "steps": 9, "loss": 100.0 / (s + 1), "lr": 1e-3} for s in range(10)] + [
    {"kind": "eval", "step": 9, "loss": 12.0, "predict_psnr": 9.0, "copy_last_predict_psnr": 8.0}
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        str(path),
        title="A model",
        metrics=METRICS,
        history=HISTORY,
        clips=[clip(), clip("still", prediction=False)],
        settings={"model": {"num_particles": 2}, "steps": 9},
    )
    return path.read_text()


def check_harmless(page: str) -> Tags:
    """Nothing in the page runs, loads or leaves its element."""
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"} & set(tags.seen)
    assert not [(name, value) for _, name, value in tags.attributes if name.startswith("on")]
    assert all(source.startswith(("data:image/", "#")) for source in tags.sources)
    assert "http://" not in page
    assert "https://" not in page
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "http-equiv", "Content-Security-Policy") in tags.attributes
    assert ("meta", "content", policy) in tags.attributes
    return tags


def test_no_text_that_reaches_the_page_becomes_markup(tmp_path: Path):
    path = tmp_path / "report.html"
    drawn = clip()._replace(key=EVIL, source=EVIL, rank=EVIL, scores={EVIL: 1.0})
    history: list[dict[str, Any]] = [{**row, EVIL: 1.0, "kind": EVIL} for row in HISTORY]
    history.append({"kind": "skipped", "step": 3, "not_finite": [EVIL], "clips": [EVIL]})
    metrics = evil(METRICS)
    metrics["data"]["fps"]["counts"] = {"10": 7}  # numbers
    metrics["data"]["strides"] = {"1": 7}
    settings = {EVIL: EVIL, "model": {EVIL: EVIL}}
    write_report(
        str(path), title=EVIL, metrics=metrics, history=history, clips=[drawn], settings=settings, notes=[EVIL]
    )
    tags = check_harmless(path.read_text())
    assert tags.seen.count("img") == 3 + 9  # the gallery has three rows of three steps
    # Everywhere the whole text is still there to be read.
    assert sum(text.count(EVIL) for text in tags.texts) >= 50 * 4 + 30
    assert not [text for text in tags.texts if "alert" in text.replace(EVIL, "")]


@pytest.mark.parametrize("found", [{"problem": EVIL}, {"balance": EVIL, "rows": 0}])
def test_no_text_of_a_short_section_becomes_markup(found: dict[str, Any]):
    tags = Tags(quarantine(found) + provenance({}, {}, {"problem": EVIL}))
    assert not {"script", "img"} & set(tags.seen)


def test_page_is_one_file_without_scripts_or_remote_references(page: str):
    assert check_harmless(page).sources


def test_every_picture_is_described_and_every_head_has_a_scope(page: str):
    tags = Tags(page)
    described = [
        value for tag, name, value in tags.attributes if (tag, name) in (("img", "alt"), ("svg", "aria-label"))
    ]
    assert len(described) == tags.seen.count("img") + tags.seen.count("svg")
    assert all(len(text) > 10 for text in described)
    assert tags.seen.count("th") == len([1 for tag, name, _ in tags.attributes if (tag, name) == ("th", "scope")])


def test_page_has_animations_strips_tables_and_plots(page: str):
    tags = Tags(page)
    assert tags.seen.count("img") == 6 + 9
    assert tags.seen.count("table") == 5
    assert tags.seen.count("svg") >= 6
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Results",
        "Over the predicted frames",
        "Gallery",
        "Clips",
        "Data",
        "Quarantine",
        "Training",
        "To reproduce this",
    ]
    assert re.findall(r'<a href="#.*?">(.*?)</a>', page) == headings


def test_the_gallery_shows_the_best_first_with_what_each_step_scores():
    ranked = {"a": "worst, 1st of 9", "b": "median, 5th of 9", "c": "best, 1st of 9"}
    clips = [
        clip(key)._replace(
            rank=rank,
            prediction=clip().frames[3:] // 2,
            predicted_scores={"PSNR": (30.0, 20.0, 15.0, 10.0, 5.0), "LPIPS": (0.1, 0.2, 0.3, 0.4, float("nan"))},
        )
        for key, rank in ranked.items()
    ]
    html = gallery([*clips, clip("d", prediction=False)], {"ranked_by": "predict_lpips"})
    tags = Tags(html)
    assert "Clips are ranked by the LPIPS of the prediction, the best first." in html
    assert re.findall(r"</span> (\w)</h3>", html) == ["c", "b", "a"]
    assert re.findall(r'<th scope="col">(.*?)</th>', html)[:4] == ["predicted frame", "+1", "+2", "+5"]
    assert re.findall(r'<th scope="row">(.*?)</th>', html)[:5] == ["truth", "prediction", "error", "PSNR, dB", "LPIPS"]
    assert html.count("<td>30.00</td><td>20.00</td><td>5.00</td>") == 3
    assert html.count("<td>0.100</td><td>0.200</td><td>not finite</td>") == 3
    assert html.count("Mean over the 5 predicted frames: PSNR 16.00, LPIPS not finite.") == 3
    assert tags.seen.count("img") == 3 * 9
    assert gallery([clip("d", prediction=False)], {}) == ""


def test_errors_are_white_where_frames_agree_and_black_from_half_the_range_on():
    truth = np.zeros((1, 1, 4, 3), dtype=np.uint8)
    made = truth.copy()
    made[0, 0, 1] = 64
    made[0, 0, 2] = 128
    made[0, 0, 3] = (255, 0, 0)  # a third of the range
    expected = [255, 255 * (1 - 64 / 127.5), 0, 255 * (1 - 85 / 127.5)]
    np.testing.assert_allclose(_error_map(truth, made)[0, 0, :, 0], expected, atol=0.5)
    assert np.array_equal(_error_map(made, truth), _error_map(truth, made))


def test_lpips_is_drawn_over_the_predicted_frames_beside_the_copied_one():
    html = over_steps({"curves": {"predict_lpips": [0.1, 0.3], "copy_last_predict_lpips": [0.2, 0.25]}})
    assert "<b>LPIPS (lower is better)</b>" in html
    assert "LPIPS (lower is better) over the predicted frames of model, copy last frame" in html
    assert "<b>LPIPS</b>: worse than copying the last frame from step 2 on" in html
    assert "LPIPS: lower is better" in html


def test_every_link_leads_to_a_section(page: str):
    tags = Tags(page)
    ids = {value for _, name, value in tags.attributes if name == "id"}
    assert {value.removeprefix("#") for tag, name, value in tags.attributes if (tag, name) == ("a", "href")} == ids


def test_same_input_gives_the_same_bytes(tmp_path: Path):
    paths = [write_report(str(tmp_path / name), title="t", metrics=METRICS, clips=[clip()]) for name in ("a", "b")]
    first, second = (Path(path).read_bytes() for path in paths)
    assert first == second


def test_best_value_is_bold_and_missing_ones_share_a_footnote_per_reason():
    table = results_table(METRICS)
    assert "<b>30.00</b><small>29.50 … 30.25</small>" in table
    assert "<b>10.50</b>" in table
    assert "<b>9.00</b>" not in table
    assert table.count("<li>") == 2
    assert table.count("<sup>1</sup>") == 2


def test_summary_says_above_or_below():
    assert summary(METRICS) == (
        "ddlp on 7 clips of split test: reconstruction 19.0 dB above the constant background; "
        "prediction 1.5 dB below the copied last frame."
    )
    assert summary({}) == ""


def test_training_held_out_and_baseline_values_share_a_plot():
    html = training_curves(HISTORY)
    assert html.count("<b>loss</b>") == 1
    assert html.count("<b>predict_psnr</b>") == 1
    assert "<b>steps</b>" not in html
    assert "copy last frame" in html


def test_skipped_steps_are_listed_with_their_clips():
    row = {"kind": "skipped", "step": 5, "not_finite": ["loss", "kl"], "clips": ["clip-a", "clip-b"]}
    html = skipped_steps([*HISTORY, *[row] * 12])
    assert html.count('<th scope="row">5</th><td>loss, kl</td><td>clip-a, clip-b</td>') == 10
    assert "And 2 more" in html
    assert skipped_steps(HISTORY) == ""


def test_long_curves_are_thinned():
    rows = [{"kind": "train", "step": s, "loss": float(s)} for s in range(5000)]
    points = re.findall(r'points="([^"]*)"', training_curves(rows))[0].split()
    assert len(points) == 400


def test_a_further_section_is_one_more_entry():
    assert "<h2>Quarantine</h2><p>none</p>" in render_page("t", "", [Section("Quarantine", "<p>none</p>")])


@pytest.mark.parametrize(
    ("model", "copied", "higher", "words", "mark"),
    [
        ([5, 4, 3], [4, 3, 2], True, "better than copying the last frame, at every step", None),
        ([5, 4, 2], [4, 4, 2], True, "never worse than copying the last frame, at every step", None),
        ([1, 1], [2, 2], True, "worse than copying the last frame at every step", None),
        ([5, 2, 1], [4, 3, 2], True, "worse than copying the last frame from step 2 on", 2),
        ([5, None, 1], [4, 3, 2], True, "worse than copying the last frame from step 3 on", 3),
        ([0.1, 0.5], [0.2, 0.3], False, "worse than copying the last frame from step 2 on", 2),
        ([1, 3, 3], [2, 2, 2], True, "worse than copying the last frame up to step 1, better from step 2 on", None),
        (
            [3, 1, 3, 1, 3],
            [2, 2, 2, 2, 2],
            True,
            "worse than copying the last frame at 2 of 5 steps, first at step 2 and last at step 4",
            None,
        ),
        ([None], [2], True, "not known at any step", None),
    ],
)
def test_steps_at_which_copying_wins_are_told(
    model: list[float | None], copied: list[float | None], higher: bool, words: str, mark: int | None
):
    assert compare_steps(model, copied, higher) == (words, mark)


def test_step_from_which_copying_wins_is_marked_in_the_plot():
    curves = {"predict_psnr": [5.0, 2.0, 1.0], "copy_last_predict_psnr": [4.0, 3.0, 2.0]}
    html = over_steps({"curves": curves})
    assert "<b>PSNR</b>: worse than copying the last frame from step 2 on." in html
    assert html.count("The dashed line") == 1
    assert "The dashed line" not in over_steps({"curves": {"predict_psnr": [5.0], "copy_last_predict_psnr": [4.0]}})
    assert over_steps({"curves": {"recon_psnr": [1.0]}}) == ""


def test_step_table_shows_a_few_steps_with_the_last_and_the_best_in_bold():
    rising = [float(step) for step in range(1, 51)]
    table = step_table({"predict_mse": rising, "copy_last_predict_mse": [2.0] * 50, "position_error": [None] * 50})
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["predicted frame", "1", "5", "10", "20", "40", "50"]
    assert re.findall(r"<b>(.*?)</b>", table) == ["1.00", "2.00", "2.00", "2.00", "2.00", "2.00"]
    assert table.count("&ndash;") == 6


def test_clip_says_its_rank_its_place_and_its_scores():
    html = clip_figures(clip()._replace(scores={"prediction": 12.345, "reconstruction": float("nan")}))
    assert '<span class="rank worst">worst, 1st of 7</span> test-000000' in html
    assert "a.mp4, frames 0 to 7" in html
    assert "<dt>prediction</dt><dd>12.35 dB</dd><dt>reconstruction</dt><dd>not finite</dd>" in html


def test_clip_of_values_that_are_no_numbers_is_drawn():
    nowhere = Particles(np.full((8, 2, 2), np.nan), np.full((8, 2), np.nan), np.full((8, 2, 2), np.nan))
    parts = (clip().parts[0]._replace(masks=np.full((3, 16, 16), np.nan)),)
    broken = clip()._replace(particles=nowhere, predicted_particles=None, parts=parts)
    assert clip_figures(broken).count("<img") == 3


def test_data_section_tells_sizes_rates_and_extremes():
    html = data_facts(METRICS["data"])
    for text in (
        "7 evaluated, of 1,200 in the split",
        "16 x 24 pixels, 3 channels",
        "9 fps (3 of 7 clips), 10 fps (4 of 7 clips)",
        "1.6 to 1.8 s, median 1.6",
        "2 MB (zstd; shards: 2), 2.5 times smaller than its pixels (5 MB)",
        '<th scope="row">darkest</th><td>dark-clip</td><td>brightness 0.1</td>',
    ):
        assert text in html
    assert html.count("<svg") == 2  # no motion was measured


def test_quarantine_shows_counts_the_first_rows_and_how_many_more():
    html = quarantine(METRICS["data"]["quarantine"])
    assert html.count('<th scope="row">b.mp4</th><td>probe</td><td>unreadable</td><td>no video</td></tr>') == 50
    assert "60 rows by code: unreadable 59, too-short 1." in html
    assert "And 10 more" in html


def test_an_empty_quarantine_says_so_and_a_simulator_has_none(tmp_path: Path):
    assert "No input was left out." in quarantine({"balance": "videos 1 = 1 read", "rows": 0, "codes": {}, "shown": []})
    data = {name: value for name, value in METRICS["data"].items() if name not in ("stored", "quarantine")}
    path = write_report(str(tmp_path / "r.html"), title="t", metrics={**METRICS, "data": data})
    assert "Quarantine" not in Path(path).read_text()


def test_commands_ids_seeds_and_versions_are_listed():
    html = provenance(METRICS, {}, METRICS["training"])
    for text in (
        "python jobs/evaluate.py --out o</pre>",
        "python jobs/train_ddlp.py</pre>",
        "<dt>model</dt><dd>abc</dd>",
        "<dt>dataset</dt><dd>def</dd>",
        "<dt>trained on</dt><dd>ghi</dd>",
        "<dt>seed of the training</dt><dd>5</dd>",
        "<dt>code that evaluated</dt><dd>123 with local changes</dd>",
        "<dt>code that trained</dt><dd>4</dd>",
        "<dt>versions</dt><dd>torch 2, objdyn 1</dd>",
    ):
        assert text in html


@pytest.mark.parametrize("name", PRESETS["ddlp"])
def test_training_command_gives_the_run_again(name: str):
    preset = PRESETS["ddlp"][name]
    model = dataclasses.replace(preset.model, num_particles=7)
    run = dataclasses.replace(preset, model=model, seed=3, threads=1, data="/d x", out="/o", resume=True)
    program, job, chosen, *words = shlex.split(training_command("ddlp", config_to_json(run)))
    assert (program, job) == ("python", "jobs/train_ddlp.py")
    assert len(words) <= 10  # the preset it was made from, or one as near
    presets = {preset: ("", run) for preset, run in PRESETS["ddlp"].items()}
    again: TrainRun = cli.parse(presets, [chosen, *words], description="")
    assert again == dataclasses.replace(run, out="", resume=False)


def test_settings_of_another_version_give_no_command_but_a_reason():
    facts = training_facts("ddlp", {"seed": 1, "colour": "red"}, {}, None)
    assert facts["command"] is None
    assert "TrainRun has no field colour" in facts["problem"]
    assert "TrainRun has no field colour" in provenance({}, {}, facts)
    assert "no family 'monet'" in training_facts("monet", {}, {}, None)["problem"]


def run_folder(folder: Path) -> Path:
    run = PRESETS["ddlp"]["debug"]
    store.publish_json(str(folder / "config.json"), {"family": "ddlp", "run": config_to_json(run)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    return folder


def test_run_folder_gets_a_report_with_what_reproduces_it(tmp_path: Path):
    run_folder(tmp_path)
    model = build(PRESETS["ddlp"]["debug"].model)
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(str(tmp_path), 7, model=model, optimizer=optimizer, state={"dataset_id": "d1"}, keep_last=1)
    text = Path(write_run_report(str(tmp_path))).read_text()
    complete = store.read_json(str(tmp_path / "checkpoints" / "step-00000007" / "COMPLETE"))
    assert "<h2>Training</h2>" in text
    assert "<dt>run.steps</dt>" in text
    assert "python jobs/train_ddlp.py debug</pre>" in text
    assert f"<dt>model</dt><dd>{complete['model.safetensors']['sha256']}</dd>" in text
    assert "<dt>step</dt><dd>7</dd>" in text
    assert "<dt>trained on</dt><dd>d1</dd>" in text
    assert "code that trained" in text
    assert f"torch {torch.__version__}" in text


def test_run_without_a_checkpoint_or_with_a_damaged_one_still_gets_a_report(tmp_path: Path):
    assert "Ids or results" not in Path(write_run_report(str(run_folder(tmp_path)))).read_text()
    (tmp_path / "last.json").write_text('{"step": 1}')
    assert "Ids or results are missing" in Path(write_run_report(str(tmp_path))).read_text()


def test_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="it is no run folder"):
        write_run_report(str(tmp_path))


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"step": 1}', '{"kind": "train", "step": "x"}', '{"kind": 1, "step": 1}', "\x80"]
)
def test_damaged_log_is_said_and_not_fatal(tmp_path: Path, line: str):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n' + line.encode("latin-1") + b'\n{"kind"')
    rows, notes = read_history(str(tmp_path))
    assert rows == []
    assert "cannot be read" in notes[0]


def test_stages_of_a_curriculum_are_listed_and_no_curve():
    history = [
        {"kind": "stage", "step": 1, "stage": 1, "reason": "start", "settings": {}},
        {"kind": "stage", "step": 7, "stage": 2, "reason": "collapsed", "settings": {"clip_frames": 6}},
        *HISTORY,
    ]
    assert re.findall(r"<td>(.*?)</td>", stages(history)) == [
        "1", "the run began", "the run&#x27;s own", "7", "the posterior collapsed", "clip_frames=6",
    ]  # fmt: skip
    assert "<b>stage</b>" not in training_curves(history)
    assert stages(HISTORY) == ""


def test_results_show_segmentation_beside_its_own_baselines_only_where_there_is_any():
    measured = {**METRICS, "ari": 0.5, "one_cluster_ari": 0.0, "threshold_ari": 0.75, "segmented_clips": 7}
    measured["notes"] = {"ari": "slots carry no identity"}
    table = results_table(measured)
    assert '<th scope="col">one cluster</th><th scope="col">threshold, connected components</th>' in table
    assert "<b>0.750</b>" in table
    assert "Over the whole clip: slots carry no identity." in table
    missing = results_table({**METRICS, "ari": None, "reasons": {**METRICS["reasons"], "ari": "no masks"}})
    assert "Masks were not compared with true objects: no masks." in missing
    assert "one cluster" not in missing + results_table(METRICS)


def test_slot_clip_shows_its_segments_and_a_walk():
    segments = np.tile(np.arange(16) // 8, (8, 16, 1))
    walk = LatentWalk(np.zeros((2, 3, 16, 16, 3), np.uint8), (-1.0, 0.0, 1.0), ("a", "b"), slot=1, frame=7)
    slot = clip()._replace(
        particles=None, predicted_particles=None, segments=segments, predicted_segments=segments[3:],
        has_background=False, walk=walk,
    )  # fmt: skip
    html = clip_figures(slot)
    assert "Latent walk: slot 1 of frame 7" in html
    assert html.count("<img") == 4
