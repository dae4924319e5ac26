import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from objdyn.questions.records import Choice, Question, QuestionFile, balance, check, from_json, to_json

CUBE = ["objects", "cube", "filter_shape"]
DESCRIPTIVE: dict[str, Any] = {
    "question_id": 0,
    "question": "How many cubes are there?",
    "question_type": "descriptive",
    "question_subtype": "count",
    "program": [*CUBE, "count"],
    "answer": "1",
}
PREDICTIVE: dict[str, Any] = {
    "question_id": 1,
    "question": "Which event will happen next?",
    "question_type": "predictive",
    "program": ["unseen_events", "belong_to"],
    "choices": [
        {"choice_id": 0, "choice": "the presence of the cube", "program": [*CUBE, "unique"], "answer": "correct"},
        {"choice_id": 1, "choice": "the presence of the sphere", "program": ["objects", "unique"], "answer": "wrong"},
    ],
}


def entry(*questions: dict[str, Any], scene: int = 3) -> dict[str, Any]:
    return {"scene_index": scene, "video_filename": f"video_{scene:05d}.mp4", "questions": list(questions)}


def test_the_official_layout_is_written_as_it_was_read():
    data = [entry(DESCRIPTIVE, PREDICTIVE), entry(DESCRIPTIVE, scene=4)]
    read = from_json(data, "train.json")
    assert to_json(read.videos) == data
    assert (read.faults, dict(read.missing), read.found) == ((), {}, 3)
    assert read.videos[0].questions[1].choices[1] == Choice(
        1, "the presence of the sphere", ("objects", "unique"), "wrong"
    )
    assert {key: dict(n) for key, n in balance(read.videos).items()} == {
        ("descriptive", "count"): {"1": 2},
        ("predictive", ""): {"correct": 1, "wrong": 1},
    }


def test_the_genuine_file_is_read_whole_and_its_questions_written_unchanged(shared: Path):
    data = json.loads((shared / "data/clevrer_questions/explanatory_train_small.json").read_text())
    read = from_json(data, "explanatory_train_small.json")
    assert (read.faults, read.found, len(read.videos)) == ((), 564, 564)
    assert dict(read.missing) == {"scene_index": 564, "video_filename": 564}
    assert {str(video["scene_index"]): {"questions": video["questions"]} for video in to_json(read.videos)} == data
    assert {key: dict(n) for key, n in balance(read.videos).items()} == {
        ("explanatory", ""): {"correct": 1132, "wrong": 1124}
    }


def test_a_test_split_without_programs_and_answers_is_read():
    stripped = [copy.deepcopy(DESCRIPTIVE), copy.deepcopy(PREDICTIVE)]
    for item in (*stripped, *stripped[1]["choices"]):
        for key in ("program", "answer"):
            item.pop(key, None)
    read = from_json([entry(*stripped)], "test.json")
    assert read.faults == ()
    assert dict(read.missing) == {"program": 2, "answer": 1, "choices.program": 2, "choices.answer": 2}
    assert to_json(read.videos) == [entry(*stripped)]


@pytest.mark.parametrize(
    ("change", "code", "complaint"),
    [
        ({"program": ["objects", "heavy", "filter_mass", "count"]}, "unknown-module", "token 1, 'heavy', is neither"),
        ({"question": "How many heavy cubes are there?"}, "unknown-word", "words that CLEVRER does not use: heavy"),
        ({"question_type": "causal"}, "unknown-type", "must be one of descriptive, .*, got 'causal'"),
        ({"question_type": ["causal"]}, "unknown-type", "got"),
        ({"question_type": None}, "unknown-type", "got None"),
        ({"question": None}, "bad-value", "question must be text, got None"),
        ({"program": [*CUBE, "unique", "count"]}, "bad-program", "token 4, 'count', takes"),
        ({"program": [*CUBE]}, "bad-program", "yields objects at its end"),
        ({"program": "objects count"}, "bad-value", "must be a list of texts"),
        ({"program": ["objects", 3]}, "bad-value", "must be a list of texts"),
        ({"answer": "6"}, "unknown-answer", "one of 0, 1, 2, 3, 4, 5, got '6'"),
        ({"answer": "yes"}, "unknown-answer", "got 'yes'"),
        ({"answer": True}, "bad-value", "answer is of the wrong kind"),
        ({"question_id": "0"}, "bad-value", "question_id is of the wrong kind"),
        ({"question_id": -1}, "bad-value", "must be a whole number from 0, got -1"),
        ({"question_id": 1 << 70}, "bad-value", "must be a whole number from 0"),
        ({"question_subtype": 3}, "bad-value", "question_subtype is of the wrong kind"),
        ({"question_subtype": "\ud800"}, "bad-value", "question_subtype must be text"),
        ({"question_id": 1}, "duplicate", "two questions 1"),
    ],
)
def test_a_question_that_cannot_be_used_is_told_and_the_rest_is_read(change: dict[str, Any], code: str, complaint: str):
    data = [entry(PREDICTIVE, DESCRIPTIVE | change), entry(DESCRIPTIVE, scene=4)]
    read = from_json(data, "train.json")
    (fault,) = read.faults
    assert (fault.scene, fault.code) == ("3", code)
    assert fault.message.startswith(f"train.json, scene 3, question {fault.question}: ")
    assert re.search(complaint, fault.message)
    assert [len(video.questions) for video in read.videos] == [1, 1]
    assert read.found == 3
    assert dict(read.missing) == {}


@pytest.mark.parametrize(
    ("change", "code", "complaint"),
    [
        (
            {"program": ["objects", "teal", "filter_color", "unique"]},
            "unknown-module",
            "choice 1: program token 1, 'teal'",
        ),
        ({"program": ["objects", "count"]}, "bad-program", "choice 1: the program yields count at its end"),
        ({"choice": "the presence of the pyramid"}, "unknown-word", "choice 1 has words .*: pyramid"),
        ({"answer": "maybe"}, "unknown-answer", "choice 1: answer must be correct or wrong, got 'maybe'"),
        ({"choice": None}, "bad-value", "choice 1 must be an object with its text"),
        ({"choice_id": 0}, "duplicate", "two choices 0"),
    ],
)
def test_a_faulty_choice_is_told_with_its_number(change: dict[str, Any], code: str, complaint: str):
    item = copy.deepcopy(PREDICTIVE)
    item["choices"][1] |= change
    (fault,) = from_json([entry(item, DESCRIPTIVE)], "f.json").faults
    assert (fault.code, fault.question) == (code, "1")
    assert re.search(complaint, fault.message)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (None, "wanted an object with a video's questions, got NoneType"),
        ({"questions": [DESCRIPTIVE]}, "scene_index must be a whole number"),
        (entry(DESCRIPTIVE) | {"scene_index": -4}, "scene_index must be a whole number"),
        (entry(DESCRIPTIVE) | {"questions": {}}, "questions must be a list, got dict"),
        (entry(DESCRIPTIVE) | {"video_filename": 3}, "video_filename must be text"),
        (entry(DESCRIPTIVE, scene=4), "scene 4 has two entries; its 1 questions are left out"),
    ],
)
def test_an_entry_that_cannot_be_used_is_told_and_its_questions_are_counted(bad: Any, complaint: str):
    read = from_json([entry(PREDICTIVE, scene=4), bad], "f.json")
    (fault,) = read.faults
    assert complaint in fault.message
    assert fault.message.startswith("f.json, ")
    assert [video.scene_index for video in read.videos] == [4]
    lost = bad["questions"] if isinstance(bad, dict) and isinstance(bad["questions"], list) else []
    assert read.found == 1 + len(lost)


def test_missing_keys_are_counted_and_numbers_taken_from_the_place():
    item = copy.deepcopy(PREDICTIVE)
    del item["question_id"], item["choices"][1]["choice_id"]
    read = from_json(
        {"12": {"questions": [item, DESCRIPTIVE | {"question_id": 1, "question_subtype": None}]}}, "f.json"
    )
    assert read.faults == ()
    assert read.videos[0].scene_index == 12
    assert [question.question_id for question in read.videos[0].questions] == [0, 1]
    assert [choice.choice_id for choice in read.videos[0].questions[0].choices] == [0, 1]
    assert dict(read.missing) == {
        "choices.choice_id": 1,
        "question_id": 1,
        "question_subtype": 1,
        "scene_index": 1,
        "video_filename": 1,
    }
    assert from_json([{"scene_index": 1, "video_filename": "v", "questions": None}], "f").missing == {"questions": 1}


def test_a_message_fits_every_file_and_terminal():
    (fault,) = from_json([entry(DESCRIPTIVE | {"question": "\ud800\n" + "x" * 10_000})], "f.json").faults
    assert fault.message.encode()
    assert "\n" not in fault.message
    assert len(fault.message) < 500


@pytest.mark.parametrize("data", [None, 3, "text"])
def test_what_is_no_question_file_is_refused(data: Any):
    with pytest.raises(ValueError, match="is no question file"):
        from_json(data, "f.json")


def test_a_question_made_by_hand_is_checked():
    question = Question(2, "How many cubes are there?", "descriptive", "count", (*CUBE, "count"), "2")
    check(question)
    with pytest.raises(ValueError, match="question 2: answer must be one of"):
        check(Question(2, "How many cubes are there?", "descriptive", "count", (*CUBE, "count"), "blue"))


def test_an_empty_file_has_nothing():
    assert from_json([], "f.json") == QuestionFile((), (), {}, 0)
