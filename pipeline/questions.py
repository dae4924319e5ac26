"""CLEVRER's questions: a question file as a table, and a question file about simulated videos.

The table has a row per thing to answer, sorted by (scene_index, question_id, choice_id): a descriptive question is one
row with a null ``choice_id``, any other one row per choice (a question without choices keeps one row). Words and
programs are text and lists of text; ``answer`` is the descriptive answer, or "correct" or "wrong", and null where the
file has none. A question that cannot be used is a row of FILE.quarantine.parquet with its reason.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from objdyn.clevrer import World
from objdyn.questions.generator import generate
from objdyn.questions.records import Fault, QuestionFile, VideoQuestions, balance, from_json, to_json
from pipeline import store
from pipeline.tables import GROUP_ROWS, METADATA_KEY

if TYPE_CHECKING:  # the dataclasses of all runs need torch
    from pipeline.config import MakeQuestionsRun, ReadQuestionsRun

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("scene_index", pa.int32(), nullable=False),
        pa.field("video_filename", pa.string()),
        pa.field("question_id", pa.int32(), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("subtype", pa.string()),
        pa.field("question", pa.string(), nullable=False),
        pa.field("program", pa.list_(pa.string())),
        pa.field("choice_id", pa.int32()),
        pa.field("choice", pa.string()),
        pa.field("choice_program", pa.list_(pa.string())),
        pa.field("answer", pa.string()),
    ]
)
QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", *Fault._fields)])
NOTES = 20
"""Faults that are printed; all are in the quarantine."""


@store.job
def read_questions(run: "ReadQuestionsRun") -> str:
    """Write a question file as a table, and the faults of its questions beside it; print what was counted.

    Returns:
        A line that says what is where.

    Raises:
        ValueError: the file is no question file, or none of its questions can be used (the quarantine says why).
    """
    source, out = store.resolve(run.source, "--source"), store.resolve(run.out, "--out")
    name = source.rpartition("/")[2]
    if not store.is_file(source):
        raise ValueError(f"--source {source} is no file; give a question file, such as questions/train.json")
    data = store.read_bytes(source)
    try:
        content = store.loads(data)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); fetch it again") from error
    read = from_json(content, name)
    quarantine = f"{out.removesuffix('.parquet')}.quarantine.parquet"
    listed = pa.Table.from_pylist([{"source": name, **fault._asdict()} for fault in read.faults], QUARANTINE_SCHEMA)
    store.publish_file(quarantine, lambda sink: _write(listed, sink))
    for line in _told(read, quarantine):
        print(line)
    table = to_table(read.videos, name)
    if not table.num_rows:
        raise ValueError(f"{source} has no question that can be used; {quarantine} says why")
    for line in describe(read.videos):
        print(line)
    published = store.publish_file(out, lambda sink: _write(table, sink))
    return f"{table.num_rows:,} rows of {len(read.videos):,} videos, {published.size:,} bytes: {out}"


@store.job
def ask(run: "MakeQuestionsRun") -> str:
    """Ask questions about the videos of a folder that ``simulate_clevrer.py`` wrote; see :func:`make_questions`.

    What would happen without an object is in a scene file only if it is the same from starts that differ by a hair, and
    so is the video itself, so that no further perturbed simulations are needed here. Scene files that cannot be read
    are named and left out.
    """
    from pipeline.simulate import read_worlds

    faults: list[str] = []
    try:
        return make_questions(run, read_worlds(run.scenes, run.split, faults))
    finally:
        for fault in faults[:NOTES]:
            print(f"note: no questions about {fault}")
        if len(faults) > NOTES:
            print(f"and {len(faults) - NOTES:,} more")


def make_questions(
    run: "MakeQuestionsRun", worlds: Iterable[World], perturbed: Callable[[World], Sequence[World]] | None = None
) -> str:
    """Ask questions about simulated videos and write them as one question file; print the balance of their answers.

    Args:
        run: where to write, and how many questions of which form.
        worlds: the videos' truth, in the order of the file.
        perturbed: gives, for a World, those simulated from starts that differ by a hair; an answer that one of them
            changes is not asked for.

    Returns:
        A line that says what is where.

    Raises:
        ValueError: there is no video, two have the same number, or there is nothing to ask about any.
    """
    out = store.resolve(run.out, "--out")
    videos: dict[int, VideoQuestions] = {}
    for world in worlds:
        if world.scene_index in videos:
            raise ValueError(f"{run.scenes} has two scenes {world.scene_index}; each video needs a number of its own")
        videos[world.scene_index] = generate(world, run.questions, perturbed(world) if perturbed else ())
    count = sum(len(video.questions) for video in videos.values())
    if not count:
        raise ValueError(
            f"there is nothing to ask about the {len(videos)} usable videos of {run.scenes}; simulate some with more "
            "objects"
        )
    for line in describe(videos.values()):
        print(line)
    text = json.dumps(to_json(videos.values()), separators=(",", ":")) + "\n"
    published = store.publish(out, text.encode())
    return f"{count:,} questions about {len(videos):,} videos, {published.size:,} bytes: {out}"


def to_table(videos: Iterable[VideoQuestions], source: str) -> pa.Table:
    """The rows of a table of questions, sorted.

    Args:
        videos: the questions.
        source: name of their file, for the metadata.
    """
    rows = [row for video in sorted(videos, key=lambda video: video.scene_index) for row in _rows(video)]
    about = {"schema": SCHEMA_VERSION, "table": "questions", "source": source}
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata({METADATA_KEY: json.dumps(about, sort_keys=True).encode()}))


def describe(videos: Iterable[VideoQuestions]) -> Iterator[str]:
    """Lines that say how the answers of each type and subtype are spread."""
    for (kind, subtype), answers in balance(videos).items():
        total = answers.total()
        shares = ", ".join(f"{answer}: {100 * n / total:.0f} %" for answer, n in sorted(answers.items()))
        print_as = f"{kind} {subtype}".strip()
        yield f"{print_as}, {total:,} answers, {shares}"


def _told(read: QuestionFile, quarantine: str) -> Iterator[str]:
    usable = sum(len(video.questions) for video in read.videos)
    yield f"questions {read.found:,} = {usable:,} read + {read.found - usable:,} quarantined"
    if read.missing:
        yield f"missing keys: {', '.join(f'{key} {n:,}' for key, n in read.missing.items())}"
    if read.faults:
        codes = Counter(fault.code for fault in read.faults)
        yield f"faults: {', '.join(f'{code} {n:,}' for code, n in sorted(codes.items()))}"
    for fault in read.faults[:NOTES]:
        yield f"note: {fault.code}: {fault.message}"
    if len(read.faults) > NOTES:
        yield f"and {len(read.faults) - NOTES:,} more; {quarantine} lists all"


def _rows(video: VideoQuestions) -> Iterator[dict[str, Any]]:
    for question in sorted(video.questions, key=lambda question: question.question_id):
        row: dict[str, Any] = {
            "scene_index": video.scene_index,
            "video_filename": video.video_filename,
            "question_id": question.question_id,
            "type": question.type,
            "subtype": question.subtype,
            "question": question.text,
            "program": question.program,
            "answer": question.answer,
        }
        if not question.choices:
            yield row
        for choice in sorted(question.choices, key=lambda choice: choice.choice_id):
            yield row | {
                "choice_id": choice.choice_id,
                "choice": choice.text,
                "choice_program": choice.program,
                "answer": choice.answer,
            }


def _write(table: pa.Table, sink: BinaryIO) -> None:
    pq.write_table(table, sink, row_group_size=GROUP_ROWS, compression="zstd", write_page_checksum=True)
