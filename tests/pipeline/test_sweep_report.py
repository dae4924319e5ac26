import io
import json
import math
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from objdyn import figures
from pipeline import store
from pipeline.checkpoint import config_to_json
from pipeline.config import flatten_settings
from pipeline.presets import PRESETS
from pipeline.study import Objective, SweepRecord, TrialRecord
from pipeline.sweep_report import ROWS_SHOWN, render_sweep, sweep_json, sweep_table, write_sweep
from pipeline.tables import METADATA_KEY

EVIL = """<script>alert(1)</script>"'&<img src=x onerror=alert(2)>"""
PSNR, SECONDS = Objective("recon_psnr", "maximize"), Objective("step_seconds", "minimize")
FOREST = {"model.kl_weight": "log:0.01:1", "model.num_particles": "int:4:16", "model.prior": "choice:a,b"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps texts by section, tags and what a browser would load."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = ""
        self.texts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = found["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[self.section][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def trial(number: int, state: str = "complete", **fields: Any) -> TrialRecord:
    settings = {"model.kl_weight": 0.01 * 2**number, "model.num_particles": 4 + number, "model.prior": "ab"[number % 2]}
    record = TrialRecord(
        number=number,
        state=state,
        settings=settings,
        values={},
        seed_values=(),
        curve=(),
        seconds=60.5 + number,
        folder=f"trials/{number:04d}",
        picture="",
        reason="",
        attempts=1,
    )
    return record._replace(**fields)


def sweep(*trials: TrialRecord, **fields: Any) -> SweepRecord:
    record = SweepRecord(
        preset="ddlp/debug",
        data="sim:balls-interaction",
        dataset_id=None,
        objectives=(PSNR,),
        space=FOREST,
        settings={"steps": 40},
        sampler="tpe",
        pruner="asha",
        seed=3,
        seeds=1,
        wanted=6,
        trials=trials,
        importance={},
    )
    return record._replace(**fields)


def psnr(number: int, value: float, **fields: Any) -> TrialRecord:
    one = ({"recon_psnr": value},)
    return trial(number, values={"recon_psnr": value}, **{"seed_values": one, **fields})


SINGLE = sweep(
    psnr(0, 20.0, curve=((10, 15.0), (20, 20.0))),
    trial(1, "pruned", curve=((10, 12.0),)),
    psnr(2, 26.5, curve=((10, 18.0), (20, math.nan), (30, 26.5)), picture="trials/0002/picture.png"),
    trial(3, "failed", reason=f"loss is not finite {EVIL}", attempts=2),
    psnr(4, 23.0),
    trial(5, "running", settings={"model.kl_weight": 0.5}, seconds=None),
    importance={"recon_psnr": {"model.kl_weight": 0.25, "model.num_particles": 0.625, "model.prior": 0.125}},
)


def two(number: int, quality: float, seconds: float) -> TrialRecord:
    values = {"recon_psnr": quality, "step_seconds": seconds}
    return trial(number, values=values, seed_values=(values,))


TWO = sweep(two(0, 30.0, 2.0), two(1, 20.0, 0.5), two(2, 19.0, 1.0), two(3, 25.0, 1.5), objectives=(PSNR, SECONDS))


def seeded(number: int, *values: float) -> TrialRecord:
    return psnr(number, sorted(values)[1], seed_values=tuple({"recon_psnr": value} for value in values))


SEEDS = sweep(seeded(0, 24.0, 20.0, 22.0), seeded(1, 31.0, 25.0, 28.0), trial(2, "failed"), seeds=3, wanted=3)
EMPTY = sweep(wanted=4)
UNFINISHED = sweep(trial(0, "failed", reason="no memory"), trial(1, "running"), wanted=4)
ONE = sweep(psnr(0, 20.0), wanted=1)
ALL = {"single": SINGLE, "two": TWO, "seeds": SEEDS, "empty": EMPTY, "unfinished": UNFINISHED, "one": ONE}
BEST = {"family": "ddlp", "run": {"steps": 40, "model": {"kl_weight": 0.04}}}


def page_of(record: SweepRecord, out: str = "/nowhere", commands: tuple[str, ...] = ()) -> Page:
    return Page(render_sweep(out, record, commands))


def subtitle(record: SweepRecord) -> str:
    html = render_sweep("/nowhere", record)
    return html.partition("</h1><p>")[2].partition("</p>")[0]


@pytest.mark.parametrize("name", ALL)
def test_page_is_wellformed_harmless_and_every_link_leads_to_a_section(name: str):
    html = render_sweep("/nowhere", ALL[name], ("python jobs/sweep.py",))
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"} & set(tags)
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not [a["src"] for _, a in page.tags if not a.get("src", "data:image/").startswith("data:image/")]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert links == [f"#{section}" for section in sections]
    assert len(set(sections)) == len(sections)
    for svg in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")


@pytest.mark.parametrize("name", ALL)
def test_same_record_gives_the_same_bytes(name: str, tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_sweep(str(folder), ALL[name], BEST, ["python jobs/sweep.py"])
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert sorted(files[0]) == ["best.json", "report.html", "sweep.json", "sweep.parquet"]
    assert files[0] == files[1]


def test_best_json_is_the_run_as_given_and_absent_without_one(tmp_path: Path):
    write_sweep(str(tmp_path), UNFINISHED, None)
    assert not (tmp_path / "best.json").exists()
    write_sweep(str(tmp_path), SINGLE, BEST)
    assert store.read_json(str(tmp_path / "best.json")) == BEST


def test_json_holds_the_whole_record(tmp_path: Path):
    write_sweep(str(tmp_path), SINGLE, None)
    found = store.read_json(str(tmp_path / "sweep.json"))
    trials = found.pop("trials")
    assert found == {
        "schema": 1,
        "kind": "sweep",
        "preset": "ddlp/debug",
        "data": "sim:balls-interaction",
        "dataset_id": None,
        "objectives": [{"name": "recon_psnr", "direction": "maximize"}],
        "space": FOREST,
        "settings": {"steps": 40},
        "sampler": "tpe",
        "pruner": "asha",
        "seed": 3,
        "seeds": 1,
        "wanted": 6,
        "importance": SINGLE.importance,
        "counts": {"complete": 3, "pruned": 1, "running": 1, "failed": 1},
        "front": [2],
    }
    assert [each["number"] for each in trials] == [0, 1, 2, 3, 4, 5]
    assert trials[2] == {
        "number": 2,
        "state": "complete",
        "settings": {"model.kl_weight": 0.04, "model.num_particles": 6, "model.prior": "a"},
        "values": {"recon_psnr": 26.5},
        "seed_values": [{"recon_psnr": 26.5}],
        "curve": [[10, 18.0], [20, None], [30, 26.5]],
        "seconds": 62.5,
        "folder": "trials/0002",
        "picture": "trials/0002/picture.png",
        "reason": "",
        "attempts": 1,
    }
    assert trials[3]["reason"] == f"loss is not finite {EVIL}"
    assert trials[5]["seconds"] is None


def test_json_of_several_objectives_names_the_front_best_first():
    assert sweep_json(TWO)["front"] == [0, 3, 1]
    assert sweep_json(UNFINISHED)["front"] == []


def in_pyarrow(path: str) -> dict[str, list[Any]]:
    return pq.ParquetFile(path, page_checksum_verification=True).read().to_pydict()


def in_pandas(path: str) -> dict[str, list[Any]]:
    import pandas

    return pandas.read_parquet(path).astype(object).to_dict("list")


def in_polars(path: str) -> dict[str, list[Any]]:
    import polars

    return polars.read_parquet(path).to_dict(as_series=False)


@pytest.mark.parametrize("read", [in_pyarrow, in_pandas, in_polars])
def test_parquet_has_a_row_per_trial(read: Callable[[str], dict[str, list[Any]]], tmp_path: Path):
    write_sweep(str(tmp_path), SINGLE, None)
    found = {
        name: [None if isinstance(value, float) and math.isnan(value) else value for value in values]
        for name, values in read(str(tmp_path / "sweep.parquet")).items()
    }
    assert found == {
        "number": [0, 1, 2, 3, 4, 5],
        "state": ["complete", "pruned", "complete", "failed", "complete", "running"],
        "model.kl_weight": [0.01, 0.02, 0.04, 0.08, 0.16, 0.5],
        "model.num_particles": [4, 5, 6, 7, 8, None],
        "model.prior": ["a", "b", "a", "b", "a", None],
        "recon_psnr": [20.0, None, 26.5, None, 23.0, None],
        "on_front": [False, False, True, False, False, False],
        "seconds": [60.5, 61.5, 62.5, 63.5, 64.5, None],
        "folder": [f"trials/000{n}" for n in range(6)],
        "reason": ["", "", "", f"loss is not finite {EVIL}", "", ""],
        "attempts": [1, 1, 1, 2, 1, 1],
    }


def test_parquet_is_compressed_typed_and_says_what_it_is(tmp_path: Path):
    write_sweep(str(tmp_path), SINGLE, None)
    file = pq.ParquetFile(tmp_path / "sweep.parquet")
    group = file.metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    assert file.schema_arrow.types[2:6] == [pa.float64(), pa.int64(), pa.string(), pa.float64()]
    assert json.loads((file.schema_arrow.metadata or {})[METADATA_KEY]) == {
        "schema": 1,
        "table": "sweep",
        "preset": "ddlp/debug",
        "dataset_id": None,
        "objectives": {"recon_psnr": "maximize"},
        "seed": 3,
        "seeds": 1,
    }


def test_parquet_keeps_the_types_of_an_empty_sweep():
    table = sweep_table(EMPTY)
    assert table.num_rows == 0
    assert table.schema.types == sweep_table(SINGLE).schema.types


@pytest.mark.parametrize(
    ("text", "values", "type_", "stored"),
    [
        ("choice:true,false", [True, False], pa.bool_(), [True, False]),
        ("choice:8,16", [8, 16], pa.int64(), [8, 16]),
        ("choice:0,0.5", [0, 0.5], pa.float64(), [0.0, 0.5]),
        ("choice:0.125,none", [0.125, "none"], pa.string(), ["0.125", "none"]),
        ("choice:true,1", [True, 1], pa.string(), ["True", "1"]),
        ("choice:a,b", [None, None], pa.string(), [None, None]),
        ("uniform:0:1", [0, 1], pa.float64(), [0.0, 1.0]),
        ("log:1:9", [None, 2.5], pa.float64(), [None, 2.5]),
        ("logint:1:9", [None, 2], pa.int64(), [None, 2]),
        ("int:1:9", [None, "odd"], pa.string(), [None, "odd"]),
    ],
)
def test_settings_columns_have_the_narrowest_type(text: str, values: list[Any], type_: pa.DataType, stored: list[Any]):
    trials = [trial(i, settings={} if value is None else {"f": value}) for i, value in enumerate(values)]
    table = sweep_table(sweep(*trials, space={"f": text}, objectives=()))
    assert table.schema.field("f").type == type_
    assert table.column("f").to_pylist() == stored


def test_parquet_has_the_ends_of_the_seeds_where_there_are_several():
    found = sweep_table(SEEDS).to_pydict()
    assert found["recon_psnr"] == [22.0, 28.0, None]
    assert found["recon_psnr_min"] == [20.0, 25.0, None]
    assert found["recon_psnr_max"] == [24.0, 31.0, None]
    assert "recon_psnr_min" not in sweep_table(SINGLE).column_names
    both = sweep_table(TWO).to_pydict()
    assert both["step_seconds"] == [2.0, 0.5, 1.0, 1.5]
    assert both["on_front"] == [True, True, False, True]


def test_numbers_that_are_not_finite_are_null():
    record = sweep(psnr(0, 20.0, seconds=math.inf, seed_values=({"recon_psnr": math.nan},)), seeds=2)
    stored = sweep_json(record)["trials"][0]
    assert (stored["seconds"], stored["seed_values"]) == (None, [{"recon_psnr": None}])
    row = sweep_table(record).to_pylist()[0]
    assert (row["seconds"], row["recon_psnr_min"], row["recon_psnr"]) == (None, None, 20.0)


def test_no_field_of_a_run_is_named_as_a_column():
    ours = set(sweep_table(sweep(space={})).column_names)
    for presets in PRESETS.values():
        for run in presets.values():
            assert not ours & flatten_settings(config_to_json(run)).keys()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "single",
            "3 of 6 trials are complete, 1 pruned, 1 failed, 1 running; the best is trial 2 (model.kl_weight=0.04, "
            "model.num_particles=6, model.prior=a), whose recon_psnr is 26.5 dB, 3.5 dB above the median of the 3 "
            "complete trials.",
        ),
        (
            "two",
            "4 of 6 trials are complete, 2 not begun; 3 are on the Pareto front; the best by recon_psnr is trial 0 "
            "(model.kl_weight=0.01, model.num_particles=4, model.prior=a) with 30 dB, and step_seconds 2 s.",
        ),
        ("empty", "0 of 4 trials are complete, 4 not begun; there is no best one yet."),
        ("unfinished", "0 of 4 trials are complete, 1 failed, 1 running, 2 not begun; there is no best one yet."),
        (
            "one",
            "1 of 1 trials is complete; the best is trial 0 (model.kl_weight=0.01, model.num_particles=4, "
            "model.prior=a), whose recon_psnr is 20 dB.",
        ),
    ],
)
def test_the_verdict_says_how_many_and_what_the_best_is_worth(name: str, said: str):
    assert subtitle(ALL[name]) == said


def test_a_lower_best_is_below_the_median_and_equal_ones_are_said():
    trials = [trial(n, values={"step_seconds": float(n + 1)}) for n in range(3)]
    assert ", 1 s below the median of the 3" in subtitle(sweep(*trials, objectives=(SECONDS,)))
    assert "which is also the median of the 2 complete" in subtitle(sweep(psnr(0, 20.0), psnr(1, 20.0)))


def test_table_has_the_best_first_and_failed_ones_last_with_reasons():
    head, *rows = page_of(SINGLE).rows["trials"]
    assert head == ["trial", "state", *FOREST, "recon_psnr (dB) \u2191", "seconds", "folder", "reason"]
    assert [row[0] for row in rows] == ["2", "4", "0", "1", "5", "3"]
    assert rows[0] == ["2", "complete", "0.04", "6", "a", "26.5", "62.5", "trials/0002", ""]
    assert rows[4] == ["5", "running", "0.5", "\u2013", "\u2013", "\u2013", "\u2013", "trials/0005", ""]
    assert rows[5][-1] == f"loss is not finite {EVIL}"
    assert "reason" not in page_of(TWO).rows["trials"][0]


def test_table_shows_the_spread_of_seeds_and_folds_long_sweeps():
    rows = page_of(SEEDS).rows["trials"]
    assert [row[5] for row in rows] == ["recon_psnr (dB) \u2191", "28 (25 to 31)", "22 (20 to 24)", "\u2013"]
    long = sweep(*(psnr(n % 12, float(n))._replace(number=n) for n in range(ROWS_SHOWN + 3)))
    html = render_sweep("/nowhere", long)
    assert "<summary>3 more trials</summary>" in html
    assert len(Page(html).rows["trials"]) == 2 + ROWS_SHOWN + 3


def svgs(html: str, label: str) -> list[ElementTree.Element]:
    drawn = [ElementTree.fromstring("<svg" + s.partition("</svg>")[0] + "</svg>") for s in html.split("<svg")[1:]]
    return [svg for svg in drawn if svg.attrib["aria-label"].startswith(label)]


def titles(svg: ElementTree.Element) -> list[str]:
    return [(circle.findtext("title") or "").partition(";")[0] for circle in svg.findall("circle")]


def test_history_draws_each_complete_trial_and_a_stair_of_the_best_so_far():
    (svg,) = svgs(render_sweep("/nowhere", SINGLE), "recon_psnr of the trials in the order")
    at = {
        title: (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for title, c in zip(titles(svg), svg.findall("circle"), strict=True)
    }
    zero, second, fourth = (at[f"trial {n}: recon_psnr {v} dB"] for n, v in ((0, 20), (2, 26.5), (4, 23)))
    corners = [zero, (second[0], zero[1]), second, (fourth[0], second[1])]
    line = svg.find("polyline")
    assert line is not None
    assert line.attrib["points"] == " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def test_curves_show_at_most_twelve_trials_with_stopped_ones_among_them_and_the_best_bold():
    (svg,) = svgs(render_sweep("/nowhere", SINGLE), "recon_psnr during training")
    texts = [text.text for text in svg.iter("text")]
    assert [text for text in texts if (text or "").startswith("trial")] == ["trial 2", "trial 0", "trial 1 (pruned)"]
    many = [psnr(n, float(n), curve=((1, 1.0), (2, 2.0))) for n in range(20)]
    many += [trial(20 + n, "pruned", curve=((1, 0.5), (2, 0.6))) for n in range(20)]
    html = render_sweep("/nowhere", sweep(*many, wanted=40))
    (svg,) = svgs(html, "recon_psnr during training")
    shown = [text.text or "" for text in svg.iter("text") if (text.text or "").startswith("trial")]
    assert shown == [f"trial {n}" for n in range(19, 11, -1)] + [f"trial {n} (pruned)" for n in range(20, 24)]
    widths = [float(line.attrib["stroke-width"]) for line in svg.findall("polyline")]
    assert [width == max(widths) for width in widths] == [False] * 9 + [True] * 3
    assert "12 of the 40 trials with held-out values during training. Bold: the best 3." in html
    assert "during-training" not in page_of(TWO).texts


def test_importance_has_a_bar_per_field_the_longest_first():
    (svg,) = svgs(render_sweep("/nowhere", SINGLE), "importance of settings for recon_psnr")
    bars = [rect.findtext("title") for rect in svg.iter("rect")]
    assert bars == ["model.num_particles: 0.625", "model.kl_weight: 0.25", "model.prior: 0.125"]
    assert "the best quarter of 3 complete trials" in page_of(SINGLE).texts["which-settings-matter"]
    assert "which-settings-matter" not in page_of(TWO).texts


def test_slices_have_a_log_axis_for_log_and_places_for_choices():
    trials = [psnr(n, 20.0 + n)._replace(settings={"f": 10.0**n, "g": ["b", "a", True][n]}) for n in range(3)]
    html = render_sweep("/nowhere", sweep(*trials, space={"f": "log:1:100", "g": "choice:b,a,true"}))
    (svg,) = svgs(html, "recon_psnr over f")
    across = sorted(float(circle.attrib["cx"]) for circle in svg.findall("circle"))
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.11)
    (svg,) = svgs(html, "recon_psnr over g")
    labels = [text.text for text in svg.iter("text") if text.attrib.get("text-anchor") == "middle"]
    assert labels == ["True", "a", "b"]
    assert len(svgs(render_sweep("/nowhere", TWO), "step_seconds over model")) == 3


def test_choices_of_numbers_are_places_in_the_order_of_their_size():
    trials = [psnr(n, 20.0 + n)._replace(settings={"f": [16, 128, 8][n]}) for n in range(3)]
    (svg,) = svgs(render_sweep("/nowhere", sweep(*trials, space={"f": "choice:16,128,8"})), "recon_psnr over f")
    labels = [text.text for text in svg.iter("text") if text.attrib.get("text-anchor") == "middle"]
    assert labels == ["8", "16", "128"]


def test_the_front_is_joined_along_the_first_objective():
    html = render_sweep("/nowhere", TWO)
    (svg,) = svgs(html, "step_seconds over recon_psnr")
    (line,) = svg.findall("polyline")
    at = {
        title: f"{float(c.attrib['cx']):.1f},{float(c.attrib['cy']):.1f}"
        for title, c in zip(titles(svg), svg.findall("circle"), strict=True)
    }
    assert line.attrib["points"].split() == [
        at["trial 1: step_seconds 0.5 s"],
        at["trial 3: step_seconds 1.5 s"],
        at["trial 0: step_seconds 2 s"],
    ]
    assert "pareto-front" not in page_of(SINGLE).texts


def test_a_front_of_three_objectives_is_not_joined_in_a_picture_of_two():
    third = Objective("loss", "minimize")
    trials = [t._replace(values={**t.values, "loss": float(t.number)}) for t in TWO.trials]
    html = render_sweep("/nowhere", sweep(*trials, objectives=(PSNR, SECONDS, third)))
    (svg,) = svgs(html, "step_seconds over recon_psnr")
    assert not svg.findall("polyline")
    assert "further objectives, which this picture leaves out (loss)" in html


def test_one_seed_is_said_to_tell_nothing_from_luck():
    assert "one seed per configuration cannot tell a setting's effect from luck" in page_of(SINGLE).texts["seeds"]


@pytest.mark.parametrize(
    ("best", "objective", "said"),
    [
        ((31.0, 25.0, 28.0), PSNR, "1, beats the median of the second best, 0 (25 dB against 22 dB): its lead is more"),
        ((31.0, 21.0, 28.0), PSNR, "1, does not beat the median of the second best, 0 (21 dB against 22 dB): its lead"),
        ((11.0, 21.0, 15.0), SECONDS, "1, beats the median of the second best, 0 (21 s against 22 s): its lead is mo"),
        ((11.0, 25.0, 15.0), SECONDS, "1, does not beat the median of the second best, 0 (25 s against 22 s): its le"),
    ],
)
def test_seeds_say_whether_the_worst_of_the_best_beats_the_second(
    best: tuple[float, ...], objective: Objective, said: str
):
    trials = [seeded(0, 24.0, 20.0, 22.0), seeded(1, *best)]
    named = [
        t._replace(
            values={objective.name: t.values["recon_psnr"]},
            seed_values=tuple({objective.name: v["recon_psnr"]} for v in t.seed_values),
        )
        for t in trials
    ]
    page = page_of(sweep(*named, objectives=(objective,), seeds=3))
    assert f"the worst seed of the best trial, {said}" in page.texts["seeds"]


def test_seeds_have_a_bar_per_trial_best_first():
    (svg,) = svgs(render_sweep("/nowhere", SEEDS), "recon_psnr over the seeds")
    labels = [text.text for text in svg.iter("text") if text.attrib.get("text-anchor") == "middle"]
    assert labels == ["1", "0"]
    long = [abs(float(line.attrib["y1"]) - float(line.attrib["y2"])) for line in svg.findall("line")]
    assert len(long) == 2
    assert page_of(SEEDS).texts["history"].endswith("blue: better than all before. Bars: lowest to highest of 3 seeds.")
    assert max(long) * 4 == pytest.approx(min(long) * 6, rel=0.01), "25 to 31 and 20 to 24"


def test_several_seeds_of_one_trial_have_nothing_to_compare_with():
    page = page_of(sweep(seeded(0, 1.0, 2.0, 3.0), seeds=3))
    assert "fewer than two trials are complete" in page.texts["seeds"]


def picture(folder: Path, name: str, shape: tuple[int, int]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figures.png(np.full((*shape, 3), 90, np.uint8)))


def test_pictures_of_the_best_are_shown_and_lost_ones_are_notes(tmp_path: Path):
    names = [f"trials/{n:04d}/picture.png" for n in range(6)]
    trials = [psnr(n, 30.0 - n, picture=name) for n, name in enumerate(names)]
    picture(tmp_path, names[0], (8, 8))
    picture(tmp_path, names[2], (8, 8))
    picture(tmp_path, names[4], (8, 8))
    (tmp_path / names[3]).parent.mkdir()
    (tmp_path / names[3]).write_bytes(b"no picture")
    page = page_of(sweep(*trials), str(tmp_path))
    images = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert images == [f"a held-out clip with what trial {n}: recon_psnr {30 - n} dB makes of it" for n in (0, 2)], (
        "at most four are looked for"
    )
    text = page.texts["best-trials"]
    assert "The picture of trial 1, trials/0001/picture.png, is missing or damaged." in text
    assert "The picture of trial 3, trials/0003/picture.png, is missing or damaged." in text
    assert "trial 5" not in text
    assert "best-trials" not in page_of(TWO).texts


@pytest.mark.parametrize("cut", [30, 45])
def test_a_picture_cut_short_is_a_note(cut: int, tmp_path: Path):
    picture(tmp_path, "trials/0002/picture.png", (8, 8))
    path = tmp_path / "trials/0002/picture.png"
    path.write_bytes(path.read_bytes()[:cut])
    assert "is missing or damaged" in page_of(SINGLE, str(tmp_path)).texts["best-trials"]


def test_failed_trials_have_their_whole_reasons():
    reason = "out of memory: " + "x" * 500
    page = page_of(sweep(trial(0, "failed", reason=reason, attempts=3), trial(1, "failed")))
    settings = "model.kl_weight=0.01, model.num_particles=4, model.prior=a"
    _, first, second = page.rows["failed-trials"]
    assert first == ["0", reason, settings, "3", "trials/0000"]
    assert second[1] == "no reason was recorded"
    assert page.rows["trials"][1][-1] == reason[:120] + "\u2026"
    assert "failed-trials" not in page_of(TWO).texts


def test_commands_and_the_search_are_told():
    text = page_of(SINGLE, commands=("python jobs/sweep.py --out 'a b'", "python jobs/train_ddlp.py <x>")).texts
    told = text["to-reproduce-this"]
    assert told.startswith("To reproduce thispython jobs/sweep.py --out 'a b'\npython jobs/train_ddlp.py <x>")
    for words in ("sim:balls-interaction", "tpe, seed 3", "asha", "steps=40", "recon_psnr (maximize)", "log:0.01:1"):
        assert words in told


def evil(value: Any) -> Any:
    """The same value with EVIL behind every text in it."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, Mapping):
        return {evil(name): evil(each) for name, each in value.items()}
    return tuple(evil(each) for each in value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("record", [SINGLE, TWO, SEEDS], ids=["single", "two", "seeds"])
def test_no_text_that_reaches_the_page_becomes_markup(record: SweepRecord, tmp_path: Path):
    trials = [
        t._replace(
            settings=evil(t.settings),
            values=evil(t.values),
            seed_values=evil(t.seed_values),
            folder=evil(t.folder),
            picture=evil("p"),
            reason=EVIL,
        )
        for t in record.trials
    ]
    hostile = record._replace(
        preset=EVIL,
        data=EVIL,
        dataset_id=EVIL,
        objectives=tuple(Objective(evil(name), direction) for name, direction in record.objectives),
        space=evil(record.space),
        settings=evil(record.settings),
        sampler=EVIL,
        pruner=EVIL,
        importance=evil(record.importance),
        trials=tuple(trials),
    )
    page = Page(render_sweep(str(tmp_path), hostile, (EVIL,)))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.texts["trials"].count("<script>alert(1)</script>") > 5
    stored = io.BytesIO()
    pq.write_table(sweep_table(hostile), stored)
    assert pq.read_table(io.BytesIO(stored.getvalue())).column("reason").to_pylist() == [EVIL] * len(trials)
