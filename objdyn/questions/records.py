"""CLEVRER's question files: JSON, read with every fault told, and written.

The published files are a list with one entry per video. A dict from the video's number to its entry is read too, as are
files without programs and answers (the test split). Source: the data set's README; the fields are in ``Question``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

from objdyn.clevrer import COLORS, MATERIALS, SHAPES
from objdyn.questions.programs import ANSWERS, CHOICE, Node, Type, UnknownTokenError, parse, unknown_words

QuestionType = Literal["descriptive", "explanatory", "predictive", "counterfactual"]
QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)
Verdict = Literal["correct", "wrong"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

MESSAGE_LENGTH = 400
"""Characters of a fault's message."""

_ANSWERS_OF = {
    Type.COUNT: ANSWERS[:6],
    Type.BOOL: ("no", "yes"),
    Type.COLOR: COLORS,
    Type.MATERIAL: MATERIALS,
    Type.SHAPE: SHAPES,
}


@dataclass(frozen=True)
class Choice:
    """One statement of a multiple-choice question."""

    choice_id: int
    text: str
    program: tuple[str, ...] | None = None
    """Yields an object or an event; None where the file has none."""
    answer: Verdict | None = None
    """None where the file has none."""


@dataclass(frozen=True)
class Question:
    """One question about a video."""

    question_id: int
    """Counts within the video."""
    text: str
    type: QuestionType
    subtype: str | None = None
    """Of descriptive ones: count, exist, query_color, query_material or query_shape."""
    program: tuple[str, ...] | None = None
    """None where the file has none; of a multiple-choice question it lacks what the choice's program yields."""
    answer: str | None = None
    """Of descriptive ones, one of ``programs.ANSWERS``; None where the file has none."""
    choices: tuple[Choice, ...] = ()
    """Of the others; any number of them may be correct."""


@dataclass(frozen=True)
class VideoQuestions:
    """All questions about one video."""

    scene_index: int
    video_filename: str | None
    questions: tuple[Question, ...]


class Fault(NamedTuple):
    """Why a question, or all of a video's, cannot be used."""

    scene: str
    """The scene's number, or ``entry N`` of the file where it has none."""
    question: str
    """The question's number, or empty if the fault is the entry's."""
    code: str
    """``bad-entry``, ``bad-value``, ``unknown-type``, ``unknown-word``, ``unknown-module``, ``bad-program``,
    ``unknown-answer`` or ``duplicate``."""
    message: str


@dataclass(frozen=True)
class QuestionFile:
    """What a file holds: the usable questions, the faults of the others, and what is missing from the usable ones."""

    videos: tuple[VideoQuestions, ...]
    faults: tuple[Fault, ...]
    missing: Mapping[str, int] = field(default_factory=dict)
    """How often a key is absent or null, by its name; ``choices.answer`` is that of a choice."""
    found: int = 0
    """Questions in the file: those of ``videos`` and the faulty ones."""


class _Unusable(Exception):  # noqa: N818 - it never leaves this module
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def from_json(data: Any, source: str) -> QuestionFile:
    """Read what ``json.loads`` made of a question file.

    A question that names an unknown module, word, type or answer, whose program is malformed, or which has a value of
    another kind than CLEVRER's becomes a fault, and the rest is read. A missing key is counted; only a question without
    its text or its type is a fault. An absent number of a question or a choice is its place in the list.

    Args:
        data: a list of entries, or a dict from a video's number to its entry.
        source: the file's name, for messages.

    Raises:
        ValueError: the file is neither.
    """
    if isinstance(data, Mapping):
        entries: list[tuple[Any, Any]] = list(data.items())
    elif isinstance(data, list):
        entries = [(None, entry) for entry in data]
    else:
        kind = type(data).__name__
        raise ValueError(f"{source} is no question file: wanted a list or an object of videos, got {kind}")
    missing: Counter[str] = Counter()
    videos: dict[int, VideoQuestions] = {}
    faults: list[Fault] = []
    found = 0
    for place, (key, entry) in enumerate(entries):
        scene = f"entry {place}"
        try:
            index, name, items = _entry(key, entry, missing)
            scene = str(index)
            if index in videos:
                raise _Unusable("duplicate", f"scene {index} has two entries; its {len(items)} questions are left out")
        except _Unusable as error:
            faults.append(_fault(source, scene, "", error))
            found += len(_questions_of(entry))
            continue
        questions: dict[int, Question] = {}
        for number, item in enumerate(items):
            found += 1
            label, absent = str(number), Counter[str]()
            try:
                if isinstance(item, Mapping) and "question_id" in item:
                    label = str(item["question_id"])
                question = _question(item, number, absent)
                if question.question_id in questions:
                    raise _Unusable("duplicate", f"the video has two questions {question.question_id}")
            except _Unusable as error:
                faults.append(_fault(source, scene, label, error))
                continue
            questions[question.question_id] = question
            missing += absent
        videos[index] = VideoQuestions(index, name, tuple(questions.values()))
    return QuestionFile(tuple(videos.values()), tuple(faults), dict(sorted(missing.items())), found)


def to_json(videos: Iterable[VideoQuestions]) -> list[dict[str, Any]]:
    """Turn questions into the published layout: a list for ``json.dumps``, without the keys that are None."""
    return [
        _without_none(
            {
                "scene_index": video.scene_index,
                "video_filename": video.video_filename,
                "questions": [_question_json(question) for question in video.questions],
            }
        )
        for video in videos
    ]


def balance(videos: Iterable[VideoQuestions]) -> dict[tuple[str, str], Counter[str]]:
    """Count the answers by type and subtype; of multiple-choice questions those of the choices, with subtype ""."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for video in videos:
        for question in video.questions:
            answers = [choice.answer for choice in question.choices] if question.choices else [question.answer]
            kind = (question.type, question.subtype or "")
            counts.setdefault(kind, Counter()).update(answer or "unknown" for answer in answers)
    return dict(sorted(counts.items(), key=lambda item: (QUESTION_TYPES.index(cast(Any, item[0][0])), item[0][1])))


def check(question: Question) -> None:
    """Check a question's and its choices' words, programs and answers against CLEVRER's vocabularies.

    Raises:
        ValueError: the first fault, with the token and its position if it is in a program.
    """
    try:
        _check(question)
    except _Unusable as error:
        raise ValueError(f"question {question.question_id}: {error}") from error


def _fault(source: str, scene: str, question: str, error: _Unusable) -> Fault:
    where = f"{source}, {scene if scene.startswith('entry') else f'scene {scene}'}"
    message = f"{where}, question {question}: {error}" if question else f"{where}: {error}"
    return Fault(scene, _printable(question), error.code, _printable(message))


def _printable(text: str) -> str:
    """The text as every file and terminal takes it: on one line, not endless, without halves of characters."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


def _entry(key: Any, entry: Any, missing: Counter[str]) -> tuple[int, str | None, list[Any]]:
    if not isinstance(entry, Mapping):
        raise _Unusable("bad-entry", f"wanted an object with a video's questions, got {type(entry).__name__}")
    name = entry.get("video_filename")
    if name is None:
        missing["video_filename"] += 1
    elif not _is_text(name):
        raise _Unusable("bad-entry", f"video_filename must be text, got {name!r}")
    index: Any = entry.get("scene_index")
    if index is None:
        missing["scene_index"] += 1
        index = int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) else key
    if not _is_number(index):
        raise _Unusable("bad-entry", f"scene_index must be a whole number from 0, got {index!r}")
    items = entry.get("questions")
    if items is None:
        missing["questions"] += 1
        items = []
    if not isinstance(items, list):
        raise _Unusable("bad-entry", f"questions must be a list, got {type(items).__name__}")
    return int(index), name, items


def _questions_of(entry: Any) -> Sequence[Any]:
    items = entry.get("questions") if isinstance(entry, Mapping) else None
    return items if isinstance(items, list) else ()


def _question(item: Any, number: int, missing: Counter[str]) -> Question:
    if not isinstance(item, Mapping):
        raise _Unusable("bad-value", f"wanted an object, got {type(item).__name__}")
    kind = item.get("question_type")
    if kind not in QUESTION_TYPES:
        raise _Unusable("unknown-type", f"question_type must be one of {', '.join(QUESTION_TYPES)}, got {kind!r}")
    descriptive = kind == "descriptive"
    text = item.get("question")
    if not isinstance(text, str) or not text.strip():
        raise _Unusable("bad-value", f"question must be text, got {text!r}")
    choices = () if descriptive else _choices(_value(item, "choices", list, missing) or [], missing)
    answer = _value(item, "answer", (str, int), missing) if descriptive else None
    question = Question(
        question_id=_number(item, "question_id", number, missing),
        text=text,
        type=cast(QuestionType, kind),
        subtype=_value(item, "question_subtype", str, missing) if descriptive else item.get("question_subtype"),
        program=_program(item, missing, "program"),
        answer=None if answer is None else str(answer),
        choices=choices,
    )
    if not (question.subtype is None or _is_text(question.subtype)):
        raise _Unusable("bad-value", f"question_subtype must be text, got {question.subtype!r}")
    _check(question)
    return question


def _choices(items: list[Any], missing: Counter[str]) -> tuple[Choice, ...]:
    choices: dict[int, Choice] = {}
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or not isinstance(item.get("choice"), str):
            raise _Unusable("bad-value", f"choice {number} must be an object with its text under 'choice'")
        choice = Choice(
            choice_id=_number(item, "choice_id", number, missing, "choices."),
            text=item["choice"],
            program=_program(item, missing, "choices.program"),
            answer=_value(item, "answer", str, missing, "choices."),
        )
        if choice.choice_id in choices:
            raise _Unusable("duplicate", f"the question has two choices {choice.choice_id}")
        choices[choice.choice_id] = choice
    return tuple(choices.values())


def _check(question: Question) -> None:
    _check_words(question.text, "question")
    if question.type == "descriptive":
        root = None if question.program is None else _parsed(question.program, "program")
        wanted = ANSWERS if root is None else _ANSWERS_OF.get(root.type, ())
        if question.answer is not None and question.answer not in wanted:
            raise _Unusable("unknown-answer", f"answer must be one of {', '.join(wanted)}, got {question.answer!r}")
    elif question.program is not None:
        _parsed(question.program, "program", Type.BOOL, choices=True)
    for choice in question.choices:
        where = f"choice {choice.choice_id}"
        _check_words(choice.text, where)
        if choice.program is not None:
            _parsed(choice.program, where, CHOICE)
        if choice.answer is not None and choice.answer not in VERDICTS:
            raise _Unusable("unknown-answer", f"{where}: answer must be correct or wrong, got {choice.answer!r}")


def _check_words(text: str, where: str) -> None:
    if unknown := unknown_words(text):
        raise _Unusable("unknown-word", f"{where} has words that CLEVRER does not use: {', '.join(unknown)} ({text!r})")


def _parsed(program: Sequence[str], where: str, *wanted: Type, choices: bool = False) -> Node:
    try:
        return parse(program, *wanted, choices=choices)
    except UnknownTokenError as error:
        raise _Unusable("unknown-module", f"{where}: {error}") from error
    except ValueError as error:
        raise _Unusable("bad-program", f"{where}: {error}") from error


def _value(
    item: Mapping[str, Any], key: str, kind: type | tuple[type, ...], missing: Counter[str], prefix: str = ""
) -> Any:
    value = item.get(key)
    if value is None:
        missing[prefix + key] += 1
    elif not isinstance(value, kind) or isinstance(value, bool):
        raise _Unusable("bad-value", f"{prefix}{key} is of the wrong kind: {value!r}")
    return value


def _number(item: Mapping[str, Any], key: str, place: int, missing: Counter[str], prefix: str = "") -> int:
    value = _value(item, key, int, missing, prefix)
    if value is None:
        return place
    if not _is_number(value):
        raise _Unusable("bad-value", f"{prefix}{key} must be a whole number from 0, got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _program(item: Mapping[str, Any], missing: Counter[str], label: str) -> tuple[str, ...] | None:
    program = item.get("program")
    if program is None:
        missing[label] += 1
        return None
    if not isinstance(program, list) or not all(isinstance(token, str) for token in program):
        raise _Unusable("bad-value", f"{label} must be a list of texts, got {program!r}")
    return tuple(program)


def _question_json(question: Question) -> dict[str, Any]:
    item: dict[str, Any] = {
        "question_id": question.question_id,
        "question": question.text,
        "question_type": question.type,
        "question_subtype": question.subtype,
        "program": None if question.program is None else list(question.program),
        "answer": question.answer,
    }
    if question.type != "descriptive":
        item["choices"] = [
            _without_none(
                {
                    "choice_id": choice.choice_id,
                    "choice": choice.text,
                    "program": None if choice.program is None else list(choice.program),
                    "answer": choice.answer,
                }
            )
            for choice in question.choices
        ]
    return _without_none(item)


def _without_none(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value is not None}
