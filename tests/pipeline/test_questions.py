"""Question files to tables and back, and question files about Worlds."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from objdyn.clevrer import Event, History, Motion, Properties, World
from objdyn.questions.executor import Executor
from objdyn.questions.generator import GeneratorConfig
from objdyn.questions.records import from_json
from pipeline.config import MakeQuestionsRun, ReadQuestionsRun
from pipeline.questions import QUARANTINE_SCHEMA, SCHEMA, make_questions, read_questions

COUNT: dict[str, Any] = {
    "question_id": 1,
    "question": "How many cubes are there?",
    "question_type": "descriptive",
    "question_subtype": "count",
    "program": ["objects", "cube", "filter_shape", "count"],
    "answer": "1",
}
NEXT: dict[str, Any] = {
    "question_id": 0,
    "question": "What will happen next?",
    "question_type": "predictive",
    "program": ["unseen_events", "belong_to"],
    "choices": [
        {"choice_id": 1, "choice": "the presence of the cube", "program": ["objects", "unique"], "answer": "wrong"},
        {"choice_id": 0, "choice": "the presence of the object", "program": ["objects", "unique"], "answer": "correct"},
    ],
}


def write(folder: Path, content: Any, name: str = "train.json") -> ReadQuestionsRun:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ReadQuestionsRun(str(path), str(folder / "out" / "train.parquet"))


def video(scene: int, *questions: dict[str, Any]) -> dict[str, Any]:
    return {"scene_index": scene, "video_filename": f"video_{scene:05d}.mp4", "questions": list(questions)}


def world(scene: int) -> World:
    """A red sphere enters and hits a gray cube, which hits a blue cylinder after the video; a green one stands by."""
    motion = np.zeros((128, 4, 3))
    motion[:, 1, 0] = 1.0
    in_view = np.ones((128, 4), dtype=bool)
    in_view[:10, 1] = False
    enter, hit, later = Event("in", 10, (1,)), Event("collision", 50, (0, 1)), Event("collision", 140, (0, 2))
    looks = ("gray metal cube", "red rubber sphere", "blue metal cylinder", "green metal cylinder")
    return World(
        scene_index=scene,
        properties=tuple(Properties(*each.split()) for each in looks),
        motion=Motion(motion, motion, motion, motion, in_view),
        history=History((enter, hit, later)),
        without={0: History((enter, Event("collision", 70, (1, 2)))), 2: History((enter, hit))},
    )


def test_the_table_has_a_sorted_row_per_thing_to_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write(tmp_path, [video(20, COUNT), video(3, COUNT, NEXT)])
    message = read_questions(run)
    assert message.startswith("4 rows of 2 videos, ")
    assert message.endswith(run.out)
    rows = pq.read_table(run.out)
    assert rows.schema.equals(SCHEMA)
    found = [(r["scene_index"], r["question_id"], r["choice_id"], r["answer"]) for r in rows.to_pylist()]
    assert found == [(3, 0, 0, "correct"), (3, 0, 1, "wrong"), (3, 1, None, "1"), (20, 1, None, "1")]
    first = rows.to_pylist()[0]
    assert (first["question"], first["choice"]) == ("What will happen next?", "the presence of the object")
    assert first["program"] == ["unseen_events", "belong_to"]
    assert first["choice_program"] == ["objects", "unique"]
    described = json.loads(rows.schema.metadata[b"objdyn"])
    assert described == {"schema": 1, "source": "train.json", "table": "questions"}
    assert capsys.readouterr().out.splitlines() == [
        "questions 3 = 3 read + 0 quarantined",
        "descriptive count, 2 answers, 1: 100 %",
        "predictive, 2 answers, correct: 50 %, wrong: 50 %",
    ]
    before = Path(run.out).read_bytes()
    read_questions(run)
    assert Path(run.out).read_bytes() == before


def test_duckdb_reads_the_genuine_questions(tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]):
    source = shared / "data/clevrer_questions/explanatory_train_small.json"
    out = tmp_path / "genuine.parquet"
    read_questions(ReadQuestionsRun(str(source), str(out)))
    told = capsys.readouterr().out
    assert "questions 564 = 564 read + 0 quarantined" in told
    assert "missing keys: scene_index 564, video_filename 564" in told
    connection = duckdb.connect()

    def rows(query: str) -> list[tuple[Any, ...]]:
        return connection.execute(query.format(out)).fetchall()

    answers = "select answer, count(*) from '{}' group by answer order by answer"
    assert rows(answers) == [("correct", 1132), ("wrong", 1124)]
    negated = "select list_contains(program, 'negate') as negated, count(*) from '{}' group by negated order by negated"
    assert rows(negated) == [(False, 302 * 4), (True, 262 * 4)]
    whole = "select distinct list_last(choice_program || program) as last from '{}' order by last"
    assert rows(whole) == [("belong_to",), ("negate",)]


def test_faulty_questions_are_quarantined_and_the_rest_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = [
        COUNT | {"question_id": 2, "program": ["objects", "filter_heavy", "count"]},
        COUNT | {"question_id": 3, "question": "How many teapots are there?"},
    ]
    run = write(tmp_path, [video(3, COUNT, *bad), video(3, COUNT, NEXT), video(4, COUNT | {"answer": None})])
    assert read_questions(run).startswith("2 rows of 2 videos, ")
    told = capsys.readouterr().out
    assert "questions 6 = 2 read + 4 quarantined\n" in told
    assert "missing keys: answer 1\n" in told
    assert "faults: duplicate 1, unknown-module 1, unknown-word 1\n" in told
    assert "note: unknown-module: train.json, scene 3, question 2: program: program token 1, 'filter_heavy', is" in told
    assert "descriptive count, 2 answers, 1: 50 %, unknown: 50 %" in told
    listed = pq.read_table(run.out.replace(".parquet", ".quarantine.parquet"))
    assert listed.schema.equals(QUARANTINE_SCHEMA)
    assert [(r["source"], r["scene"], r["question"], r["code"]) for r in listed.to_pylist()] == [
        ("train.json", "3", "2", "unknown-module"),
        ("train.json", "3", "3", "unknown-word"),
        ("train.json", "3", "", "duplicate"),
    ]


def test_many_faults_are_not_all_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = [COUNT | {"question_id": i, "answer": "many"} for i in range(2, 32)]
    read_questions(write(tmp_path, [video(1, COUNT, *bad)]))
    told = capsys.readouterr().out
    assert told.count("note: ") == 20
    assert "and 10 more; " in told


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[{", "train.json is not valid JSON"),
        ("[" * 100_000, "train.json is not valid JSON"),
        ('"text"', "train.json is no question file: wanted a list"),
        ([], "has no question that can be used"),
        (
            [video(1, COUNT | {"answer": "many"})],
            "has no question that can be used; .*train.quarantine.parquet says why",
        ),
    ],
)
def test_a_file_without_a_usable_question_is_refused(tmp_path: Path, content: Any, complaint: str):
    run = write(tmp_path, content)
    with pytest.raises(ValueError, match=complaint):
        read_questions(run)
    assert not Path(run.out).exists()


def test_the_job_says_what_it_wrote_and_fails_in_one_line(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = write(tmp_path, [video(3, COUNT)])
    monkeypatch.setattr(sys, "argv", ["read_questions.py", "--source", run.source, "--out", run.out])
    runpy.run_path(str(repository / "jobs/read_questions.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].endswith(run.out)
    monkeypatch.setattr(sys, "argv", ["read_questions.py", "--source", str(tmp_path / "no.json"), "--out", run.out])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "jobs/read_questions.py"), run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_questions_about_worlds_are_one_readable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = MakeQuestionsRun("scenes", str(tmp_path / "train.json"), questions=GeneratorConfig(descriptive=5))
    message = make_questions(run, map(world, range(20)))
    told = capsys.readouterr().out
    read = from_json(json.loads(Path(run.out).read_text()), "train.json")
    assert (read.faults, dict(read.missing)) == ((), {})
    assert [video.video_filename for video in read.videos] == [f"video_{i:05d}.mp4" for i in range(20)]
    assert message.startswith(f"{read.found} questions about 20 videos, ")
    assert "predictive, 40 answers, correct: 50 %, wrong: 50 %" in told
    assert "descriptive exist, " in told
    assert "counterfactual, " in told
    executor = Executor(world(0))
    for question in read.videos[0].questions:
        if question.type == "descriptive":
            assert executor.answer(question.program or ()) == question.answer
    before = Path(run.out).read_bytes()
    make_questions(run, map(world, range(20)))
    assert Path(run.out).read_bytes() == before


def test_what_a_perturbed_start_changes_is_not_asked_for(tmp_path: Path):
    run = MakeQuestionsRun("scenes", str(tmp_path / "train.json"))

    def missed(true: World) -> list[World]:
        return [dataclasses.replace(true, history=History(true.history.events[:2]))]

    make_questions(run, [world(0)], missed)
    (video,) = from_json(json.loads(Path(run.out).read_text()), "train.json").videos
    assert video.questions
    assert not [question for question in video.questions if question.type == "predictive"]


def test_worlds_of_one_number_or_none_are_refused(tmp_path: Path):
    run = MakeQuestionsRun("scenes", str(tmp_path / "train.json"))
    with pytest.raises(ValueError, match="scenes has two scenes 4; each video needs a number"):
        make_questions(run, [world(4), world(4)])
    with pytest.raises(ValueError, match="nothing to ask about the 0 usable videos of scenes"):
        make_questions(run, [])
    assert not Path(run.out).exists()


@pytest.mark.parametrize("make", [ReadQuestionsRun, MakeQuestionsRun])
def test_an_output_of_another_name_is_refused(make: Any):
    with pytest.raises(ValueError, match="out must name a file FILE"):
        make("a", "b.txt")
