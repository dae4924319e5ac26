import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline import store
from pipeline.report import (
    Particles,
    ReportClip,
    Section,
    read_history,
    render_page,
    results_table,
    summary,
    training_curves,
    write_report,
    write_run_report,
)

EVIL = '<script>alert("x")</script>'


class Tags(HTMLParser):
    """Counts tags and checks that they close in order."""

    VOID = frozenset({"meta", "img", "line", "polyline", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

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
        masks=np.full((3, 16, 16), 1 / 3),
        components=np.stack([frames[0]] * 3),
        scores={EVIL: 1.0},
    )


METRICS = {
    "family": "ddlp",
    "split": "test",
    "clips": 7,
    "command": f"python jobs/evaluate.py --out '{EVIL}'",
    "recon_psnr": 30.0,
    "constant_background_recon_psnr": 11.0,
    "predict_psnr": 9.0,
    "copy_last_predict_psnr": 10.5,
    "med10": None,
    "copy_last_med10": None,
    "constant_velocity_med10": None,
    "reasons": {"med10": f"none {EVIL}", "copy_last_med10": f"none {EVIL}", "constant_velocity_med10": "another"},
    "interval95": {"recon_psnr": [29.5, 30.25]},
    "curves": {"predict_psnr": [12.0, 9.0, None], "copy_last_predict_psnr": [11.0, 10.0, 9.0]},
}
HISTORY = [
    {"kind": "train", "step": s, "steps": 9, "loss": 100.0 / (s + 1), EVIL: 1.0, "lr": 1e-3} for s in range(10)
] + [{"kind": "eval", "step": 9, "loss": 12.0, "predict_psnr": 9.0, "copy_last_predict_psnr": 8.0}]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        str(path),
        title=EVIL,
        metrics=METRICS,
        history=HISTORY,
        clips=[clip(EVIL), clip("still", prediction=False)],
        settings={"model": {EVIL: EVIL}, "steps": 9},
        notes=[EVIL],
    )
    return path.read_text()


def test_every_value_is_escaped(page: str):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_page_is_one_file_without_scripts_or_remote_references(page: str):
    tags = Tags(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert "http://" not in page
    assert "https://" not in page
    assert tags.sources
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert "default-src 'none'" in page


def test_page_has_animations_strips_tables_and_plots(page: str):
    tags = Tags(page)
    assert tags.seen.count("img") == 6
    assert tags.seen.count("table") == 1
    assert tags.seen.count("svg") >= 4
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Results",
        "Clips",
        "Over the predicted frames",
        "Training",
        "To reproduce this",
    ]


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
        "ddlp on 7 clips of split test: 19.0 dB above the constant background in reconstruction, "
        "1.5 dB below the copied last frame in prediction."
    )
    assert summary({}) == ""


def test_training_held_out_and_baseline_values_share_a_plot():
    html = training_curves(HISTORY)
    assert html.count("<b>loss</b>") == 1
    assert html.count("<b>predict_psnr</b>") == 1
    assert "<b>steps</b>" not in html
    assert "copy last frame" in html


def test_long_curves_are_thinned():
    rows = [{"kind": "train", "step": s, "loss": float(s)} for s in range(5000)]
    points = re.findall(r'points="([^"]*)"', training_curves(rows))[0].split()
    assert len(points) == 400


def test_a_further_section_is_one_more_entry():
    assert "<h2>Quarantine</h2><p>none</p>" in render_page("t", "", [Section("Quarantine", "<p>none</p>")])


def test_run_folder_gets_a_report_beside_its_metrics(tmp_path: Path):
    store.publish_json(str(tmp_path / "config.json"), {"steps": 9})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    text = Path(write_run_report(str(tmp_path))).read_text()
    assert (tmp_path / "report.html").exists()
    assert "<h2>Training</h2>" in text
    assert "<dt>steps</dt><dd>9</dd>" in text


def test_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="it is no run folder"):
        write_run_report(str(tmp_path))


def test_damaged_log_is_said_and_not_fatal(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nnot json\n{"kind"')
    rows, notes = read_history(str(tmp_path))
    assert rows == []
    assert "cannot be read" in notes[0]
