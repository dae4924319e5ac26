import json
from pathlib import Path
from random import Random

import pytest

from objdyn.clevrer import COLORS, MATERIALS, SHAPES
from objdyn.questions.programs import (
    ANSWER,
    ANSWERS,
    CHOICE,
    MODULES,
    QUESTION_WORDS,
    WORDS,
    Type,
    UnknownTokenError,
    parse,
    published,
    tokens,
    unknown_words,
)


def random_program(random: Random, wanted: Type, depth: int) -> list[str]:
    """A well-typed program, drawn from the signatures; the shortest that there is from some depth on."""
    ends = [word for word, kind in WORDS.items() if kind & wanted]
    makers = [(name, types) for name, signatures in MODULES.items() for types, out in signatures if out & wanted]
    if ends and (depth <= 0 or not makers or random.random() < 0.3):
        return [random.choice(ends)]
    if depth <= 0:
        fewest = min(len(types) for _, types in makers)
        makers = [(name, types) for name, types in makers if len(types) == fewest and name != "negate"]
    name, types = random.choice(makers)
    return [token for each in types for token in random_program(random, each, depth - 1)] + [name]


@pytest.mark.parametrize("seed", range(300))
def test_a_random_well_typed_program_prints_as_it_was_read(seed: int):
    random = Random(seed)
    wanted = random.choice([ANSWER, CHOICE, *Type])
    program = random_program(random, wanted, random.randint(1, 6))
    tree = parse(program, wanted)
    assert tokens(tree) == tuple(program)
    assert parse(tokens(tree), wanted) == tree
    assert tree.position == len(program) - 1


def test_genuine_programs_print_as_they_were_read(shared: Path):
    videos = json.loads((shared / "data/clevrer_questions/explanatory_train_small.json").read_text())
    questions = [question for video in videos.values() for question in video["questions"]]
    assert len(questions) == 564
    for question in questions:
        assert list(tokens(parse(question["program"], Type.BOOL, choices=True))) == question["program"]
        assert not unknown_words(question["question"])
        assert len(question["choices"]) == 4
        for choice in question["choices"]:
            assert list(tokens(parse(choice["program"], CHOICE))) == choice["program"]
            assert not unknown_words(choice["choice"])
            whole = [*choice["program"], *question["program"]]
            assert list(tokens(parse(whole, Type.BOOL))) == whole


def test_a_tree_has_the_inputs_in_their_order():
    tree = parse(["objects", "cube", "filter_shape", "events", "filter_end", "query_frame", "filter_moving", "count"])
    assert (tree.token, tree.type, tree.position) == ("count", Type.COUNT, 7)
    moving = tree.inputs[0]
    assert [node.token for node in moving.inputs] == ["filter_shape", "query_frame"]
    assert [node.token for node in moving.inputs[0].inputs] == ["objects", "cube"]


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("objects cube filter_form count", r"token 2, 'filter_form', is neither a module nor a word"),
        ("objects teal filter_color count", r"token 1, 'teal', is neither"),
        (
            "objects cube filter_color count",
            r"token 2, 'filter_color', takes \(objects, color\), got \(objects, shape\)",
        ),
        ("objects unique count", r"token 2, 'count', takes \(objects or events\), got \(object\)"),
        ("events unique query_color", r"token 2, 'query_color', takes \(object\), got \(event\)"),
        ("filter_shape count", r"token 0, 'filter_shape', takes 2 inputs, 0 are there"),
        (
            "events objects filter_collision objects count",
            r"leaves 'filter_collision' \(2\) unused before 'count' \(4\)",
        ),
        ("cube unique", r"token 1, 'unique', takes \(objects\) or \(events\), got \(shape\)"),
        ("objects", r"yields objects at its end, 'objects', wanted color or material or shape or"),
        ("unseen_events belong_to", r"token 1, 'belong_to', takes 2 inputs, 1 are there"),
        ("", "the program is empty"),
        ("objects exist" + " negate" * 200, "has 202 tokens, more than the 200"),
    ],
)
def test_a_malformed_program_is_refused_with_its_token_and_position(program: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        parse(program.split())


def test_an_unknown_token_is_told_from_a_malformed_program():
    with pytest.raises(UnknownTokenError):
        parse(["objects", "weigh"])
    with pytest.raises(ValueError, match="takes 1 inputs") as caught:
        parse(["count"])
    assert not isinstance(caught.value, UnknownTokenError)


@pytest.mark.parametrize("token", [3, None, ["objects"], {}])
def test_a_token_that_is_no_text_is_unknown(token: object):
    with pytest.raises(UnknownTokenError, match="token 0"):
        parse([token])  # pyright: ignore[reportArgumentType]


def test_a_questions_program_lacks_what_its_choices_yield():
    tree = parse(["unseen_events", "belong_to"], Type.BOOL, choices=True)
    assert tokens(tree) == ("unseen_events", "belong_to")
    assert tree.inputs[0].type == CHOICE
    with pytest.raises(ValueError, match="unused"):
        parse(["objects", "count"], choices=True)


def test_names_of_the_published_files_are_those_of_the_papers_tables():
    program = ["objects", "events", "filter_end", "query_frame", "filter_moving", "count"]
    assert published(program) == ("objects", "end", "get_frame", "filter_moving", "count")
    pick = ["objects", "unique"]
    program = ["events", *pick, "filter_collision", "unique", *pick, "query_collision_partner", "query_shape"]
    assert published(program)[-2:] == ("get_col_partner", "query_shape")
    for each in (program, list(published(program))):
        assert tokens(parse(each)) == tuple(each)


def test_vocabularies_have_the_sizes_of_clevrers():
    assert len(QUESTION_WORDS) == 81
    assert len(ANSWERS) == len(set(ANSWERS)) == 21
    assert {*COLORS, *MATERIALS, *SHAPES} <= set(ANSWERS) & QUESTION_WORDS
    assert unknown_words("If the cylinder is removed, which event will not happen?") == []
    assert unknown_words("How heavy is the Teal cube?") == ["heavy", "teal"]
