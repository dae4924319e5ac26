"""Generated questions against a reader that knows no programs: it answers the sentences from the World itself."""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from objdyn.clevrer import Event, History, World
from objdyn.questions.executor import Executor
from objdyn.questions.generator import GeneratorConfig, generate
from objdyn.questions.programs import ALIASES, ANSWERS, unknown_words
from objdyn.questions.records import VideoQuestions, balance, from_json, to_json

Random = Callable[[int], World]
SEEDS = range(40)


@pytest.fixture(scope="module")
def videos(random_world: Random) -> list[tuple[World, VideoQuestions]]:
    worlds = [random_world(seed) for seed in SEEDS]
    return [(world, generate(world)) for world in worlds]


# -- a reader of sentences


def who(phrase: str, world: World) -> list[int]:
    """Objects that the video shows and which a noun phrase fits."""
    words = [re.sub(r"s$", "", word) for word in phrase.split() if not re.fullmatch("objects?", word)]
    shown = np.any(world.motion.in_view[: world.shown], axis=0).tolist()
    return [i for i in range(len(world.properties)) if shown[i] and all(w in world.properties[i] for w in words)]


def the(phrase: str, world: World) -> int:
    found = who(phrase, world)
    assert len(found) == 1, f"{phrase!r} fits {found} of {world.properties}"
    return found[0]


def shown_events(world: World, kind: str) -> list[Event]:
    return [event for event in world.history.events if event.kind == kind and event.frame < world.shown]


def passage(clause: str, world: World) -> int:
    """Frame of ``the cube enters the scene``."""
    found = re.fullmatch(r"the (.+) (enters|exits) the scene", clause)
    assert found, clause
    kind = {"enters": "in", "exits": "out"}[found[2]]
    frames = [event.frame for event in shown_events(world, kind) if event.objects == (the(found[1], world),)]
    assert len(frames) == 1
    return frames[0]


def frame_of(clause: str, world: World) -> int:
    ends = {"the video begins": 0, "the video ends": world.shown - 1}
    return ends[clause] if clause in ends else passage(clause, world)


def in_state(ids: list[int], state: str, clause: str | None, world: World) -> list[int]:
    motion = world.motion
    speed = np.sqrt((motion.velocity**2).sum(axis=-1))
    if clause is None:
        moves = [any(motion.in_view[t, i] and speed[t, i] > world.still_speed for t in range(world.shown)) for i in ids]
        return [i for i, each in zip(ids, moves, strict=True) if each == (state == "moving")]
    t = frame_of(clause, world)
    return [i for i in ids if motion.in_view[t, i] and (speed[t, i] > world.still_speed) == (state == "moving")]


def in_period(events: list[Event], period: str | None, clause: str | None, world: World) -> list[Event]:
    if period is None or clause is None:
        return events
    frame = passage(clause, world)
    return [event for event in events if (event.frame < frame if period == "before" else event.frame > frame)]


def passing(phrase: str, verb: str, world: World) -> list[Event]:
    kind = {"enter": "in", "exit": "out"}[verb.removesuffix("s")]
    return [event for event in shown_events(world, kind) if event.objects[0] in who(phrase, world)]


PERIOD = r"(?: (before|after) (the .+ scene))?"
WHEN = r"(?: when (the .+))?"


def read_set(text: str, world: World) -> int:
    """How many a count or existence question is about."""
    start = r"(?:How many|Are there any) "
    if found := re.fullmatch(rf"{start}collisions(?: that)?(?: happen)?{PERIOD}\?", text):
        return len(in_period(shown_events(world, "collision"), found[1], found[2], world))
    if found := re.fullmatch(rf"{start}(.+?)(?: that)? (enter|exit) the scene{PERIOD}\?", text):
        return len(in_period(passing(found[1], found[2], world), found[3], found[4], world))
    if found := re.fullmatch(rf"{start}(moving|stationary) (.+?)(?: are there)?{WHEN}\?", text):
        return len(in_state(who(found[2], world), found[1], found[3], world))
    if found := re.fullmatch(rf"{start}(.+?)(?: that)? are (moving|stationary){WHEN}\?", text):
        return len(in_state(who(found[1], world), found[2], found[3], world))
    found = re.fullmatch(r"How many (.+) are there\?", text)
    assert found, text
    return len(who(found[1], world))


def chosen(events: list[Event], order: str | None) -> Event:
    if order is None:
        assert len(events) == 1
        return events[0]
    ordered = sorted(events, key=lambda event: event.frame)
    return {"first": ordered[0], "second": ordered[min(1, len(ordered) - 1)], "last": ordered[-1]}[order.strip()]


def read_query(text: str, world: World) -> int:
    """The object that is asked about."""
    found = re.fullmatch(r"What (?:\w+ is|is the \w+ of) the (first |second |last )?(.+)\?", text)
    assert found, text
    order, rest = found[1], found[2]
    if found := re.fullmatch(r"object (?:to collide|that collides) with the (.+)", rest):
        index = the(found[1], world)
        hits = [event for event in shown_events(world, "collision") if index in event.objects]
        (partner,) = set(chosen(hits, order).objects) - {index}
        return partner
    if found := re.fullmatch(r"(.+?) (?:that|to) (enters?|exits?) the scene", rest):
        return chosen(passing(found[1], found[2], world), order).objects[0]
    if found := re.fullmatch(r"(moving|stationary) (.+) when (the .+)", rest):
        (index,) = in_state(who(found[2], world), found[1], found[3], world)
        return index
    found = re.fullmatch(r"(.+) that is (moving|stationary) when (the .+)", rest)
    assert found, text
    (index,) = in_state(who(found[1], world), found[2], found[3], world)
    return index


def read_descriptive(text: str, subtype: str, world: World) -> str:
    if subtype == "count":
        return str(read_set(text, world))
    if subtype == "exist":
        return "yes" if read_set(text, world) else "no"
    return getattr(world.properties[read_query(text, world)], subtype.removeprefix("query_"))


def causes(world: World, target: Event) -> set[Event]:
    """All that leads to an event, by going back in time object by object."""
    involved, found = set(target.objects), set()
    events = [event for event in world.history.events if event.frame < target.frame]
    for event in sorted(events, key=lambda event: -event.frame):
        if involved & set(event.objects):
            involved |= set(event.objects)
            found.add(event)
    return found


def event_of(phrase: str, world: World) -> Event:
    if found := re.fullmatch(r"the collision between the (.+) and the (.+)", phrase) or re.fullmatch(
        r"the (.+)'s colliding with the (.+)", phrase
    ):
        pair = {the(found[1], world), the(found[2], world)}
        (event,) = [event for event in shown_events(world, "collision") if set(event.objects) == pair]
        return event
    found = re.fullmatch(r"the (.+)'s (ent|exit)\w*(?: the scene)?", phrase)
    assert found, phrase
    kind = {"ent": "in", "exit": "out"}[found[2]]
    (event,) = [event for event in shown_events(world, kind) if event.objects == (the(found[1], world),)]
    return event


def pair_of(text: str, world: World) -> set[int]:
    found = re.fullmatch(r"The (.+) collides with the (.+)", text) or re.fullmatch(
        r"The (.+) and the (.+) collide", text
    )
    assert found, text
    return {the(found[1], world), the(found[2], world)}


def read_choice(question: str, choice: str, world: World) -> bool:
    if found := re.fullmatch(r"Which of the following is (not )?responsible for (.+)\?", question):
        leading = causes(world, event_of(found[2], world))
        if presence := re.fullmatch(r"the presence of the (.+)", choice):
            happens = any(the(presence[1], world) in event.objects for event in leading)
        else:
            happens = event_of(choice, world) in leading
        return happens != bool(found[1])
    if re.fullmatch(r"(Which event|What) will happen next\?", question):
        later = [event for event in world.history.events if event.frame >= world.shown]
        return any(event.kind == "collision" and set(event.objects) == pair_of(choice, world) for event in later)
    what = "(?:[Ww]hat|[Ww]hich event|[Ww]hich of the following) will (not )?happen"
    for form in (rf"Without the (?P<x>.+), {what}", rf"{what} without the (?P<x>.+)"):
        if found := re.fullmatch(rf"{form}\?", question):
            break
    else:
        for form in (rf"If the (?P<x>.+) is removed, {what}", rf"{what} if the (?P<x>.+) is removed"):
            if found := re.fullmatch(rf"{form}\?", question):
                break
    assert found, question
    events = world.without[the(found["x"], world)].events
    pair = pair_of(choice, world)
    happens = any(e.kind == "collision" and set(e.objects) == pair and e.frame < world.shown for e in events)
    return happens != ("not happen" in question)


def check_by_reading(world: World, video: VideoQuestions) -> None:
    for question in video.questions:
        if question.type == "descriptive":
            assert question.answer == read_descriptive(question.text, question.subtype or "", world), question.text
        for choice in question.choices:
            expected = "correct" if read_choice(question.text, choice.text, world) else "wrong"
            assert choice.answer == expected, (question.text, choice.text)


# -- the tests


def test_answers_are_those_of_a_reader_of_the_sentences(videos: list[tuple[World, VideoQuestions]]):
    for world, video in videos:
        check_by_reading(world, video)
    kinds = Counter(question.type for _, video in videos for question in video.questions)
    assert kinds["descriptive"] == 11 * len(videos)
    assert min(kinds["explanatory"], kinds["predictive"], kinds["counterfactual"]) > 10


def test_stored_answers_are_the_executors(videos: list[tuple[World, VideoQuestions]]):
    for world, video in videos:
        executor = Executor(world)
        for question in video.questions:
            assert question.program is not None
            if question.type == "descriptive":
                assert executor.answer(question.program) == question.answer
            for choice in question.choices:
                said = executor.answer((*(choice.program or ()), *question.program))
                assert said == {"correct": "yes", "wrong": "no"}[choice.answer or ""]


def test_every_word_and_answer_is_of_clevrers_vocabulary(videos: list[tuple[World, VideoQuestions]]):
    for _, video in videos:
        for question in video.questions:
            assert not unknown_words(question.text)
            assert question.text.endswith("?")
            assert question.answer is None or question.answer in ANSWERS
            assert not any(unknown_words(choice.text) for choice in question.choices)


def test_a_written_file_is_read_without_a_fault(videos: list[tuple[World, VideoQuestions]]):
    made = tuple(video for _, video in videos)
    read = from_json(to_json(made), "made.json")
    assert read.videos == made
    assert (read.faults, dict(read.missing)) == ((), {})


def test_questions_are_numbered_and_none_comes_twice(videos: list[tuple[World, VideoQuestions]]):
    config = GeneratorConfig()
    for world, video in videos:
        assert video.video_filename == f"video_{world.scene_index:05d}.mp4"
        assert [question.question_id for question in video.questions] == list(range(len(video.questions)))
        programs = [question.program for question in video.questions]
        assert len(set(programs)) == len(programs)
        for kind, n in Counter(question.type for question in video.questions).items():
            assert n <= getattr(config, kind)
        for question in video.questions:
            assert [choice.choice_id for choice in question.choices] == list(range(len(question.choices)))
            assert len({choice.program for choice in question.choices}) == len(question.choices) <= 4


def test_answers_are_balanced(videos: list[tuple[World, VideoQuestions]]):
    counts = balance(video for _, video in videos)
    for kind in ("explanatory", "predictive", "counterfactual"):
        share = counts[kind, ""]["correct"] / counts[kind, ""].total()
        assert 0.4 < share < 0.6, (kind, share)
    assert counts["predictive", ""]["correct"] == counts["predictive", ""]["wrong"]
    assert 0.35 < counts["descriptive", "exist"]["yes"] / counts["descriptive", "exist"].total() < 0.65
    assert max(counts["descriptive", "count"].values()) < 0.5 * counts["descriptive", "count"].total()
    assert set(counts["descriptive", "query_shape"]) == {"cube", "sphere", "cylinder"}


def test_no_sentence_names_the_object_that_it_asks_about(videos: list[tuple[World, VideoQuestions]]):
    named = 0
    for world, video in videos:
        for question in video.questions:
            found = re.search(r"when the (.+) (?:enters|exits) the scene", question.text)
            if found and (question.subtype or "").startswith("query_"):
                named += 1
                assert the(found[1], world) != read_query(question.text, world)
    assert named > 5


def test_no_choice_gives_itself_away(videos: list[tuple[World, VideoQuestions]]):
    for world, video in videos:
        for question in video.questions:
            if question.type in ("explanatory", "predictive"):
                assert {choice.answer for choice in question.choices} == {"correct", "wrong"}
            if question.type == "explanatory":
                target = event_of(question.text[:-1].split("responsible for ")[1], world)
                for choice in question.choices:
                    if found := re.fullmatch(r"the presence of the (.+)|the (.+)'s ent.*", choice.text):
                        assert the(found[1] or found[2], world) not in target.objects
            if question.type == "counterfactual":
                phrases = re.findall(r"(?:[Ww]ithout|[Ii]f) the (.+?)(?:,|\?| is removed)", question.text)
                assert not any(the(phrases[0], world) in pair_of(choice.text, world) for choice in question.choices)


def test_the_removed_object_decides_the_answers(world: World):
    """The cylinder and the red sphere meet only without the gray cube between them."""
    asked = {}
    for seed in range(30):
        video = generate(
            world, GeneratorConfig(descriptive=0, explanatory=0, predictive=0, counterfactual=4, seed=seed)
        )
        check_by_reading(world, video)
        for question in video.questions:
            removed = re.findall(r"(?:[Ww]ithout|[Ii]f) the (.+?)(?:,|\?| is removed)", question.text)[0]
            for choice in question.choices:
                happens = (choice.answer == "correct") != ("not happen" in question.text)
                asked[the(removed, world), tuple(sorted(pair_of(choice.text, world)))] = happens
    assert asked[0, (1, 2)]  # removed 0: 1 hits 2
    assert not asked[4, (1, 2)]
    assert asked[4, (0, 1)]
    assert asked[4, (0, 2)]
    assert asked[2, (0, 3)]
    assert (4, (0, 3)) not in asked  # they meet after the video's span: neither yes nor no
    assert not any(removed in pair for removed, pair in asked)
    assert not asked[1, (0, 2)]  # nothing happens any more
    assert {removed for removed, _ in asked} == {0, 1, 2, 4}  # without 3 nothing is known


def test_a_video_without_later_collisions_is_asked_no_prediction(make_world):
    names = ("gray metal cube", "red rubber sphere", "blue metal cylinder")
    quiet = make_world(names, (("collision", 40, (0, 1)), ("out", 150, (2,))))
    assert not [q for q in generate(quiet).questions if q.type in ("predictive", "counterfactual")]
    later = dataclasses.replace(quiet, history=History((*quiet.history.events, Event("collision", 160, (0, 2)))))
    (question,) = [question for question in generate(later).questions if question.type == "predictive"]
    assert [pair_of(c.text, later) for c in question.choices if c.answer == "correct"] == [{0, 2}]


def test_an_answer_that_a_hair_decides_is_not_asked_for(make_world):
    """Two objects hit the third two frames apart: which was first is not asked; forty apart, it is."""
    names = ("gray metal cube", "red rubber sphere", "blue metal cylinder")

    def asked(gap: int) -> set[str]:
        texts: set[str] = set()
        for seed in range(8):
            events = (("collision", 50, (0, 1)), ("collision", 50 + gap, (0, 2)))
            texts |= {question.text for question in generate(make_world(names, events, scene=seed)).questions}
        return {text for text in texts if re.search(r"first|second|last", text)}

    assert not asked(0)
    assert not asked(2)
    assert asked(40)


def test_an_answer_that_a_perturbed_simulation_changes_is_not_asked_for(make_world):
    names = ("gray metal cube", "red rubber sphere", "blue metal cylinder", "green metal cylinder")
    world = make_world(names, (("collision", 50, (0, 1)), ("collision", 140, (0, 2))))
    missed = make_world(names, (("collision", 50, (0, 1)),))
    assert [q for q in generate(world).questions if q.type == "predictive"]
    assert not [q for q in generate(world, perturbed=[missed]).questions if q.type == "predictive"]
    with pytest.raises(ValueError, match="perturbed Worlds of another scene"):
        generate(world, perturbed=[dataclasses.replace(missed, scene_index=8)])


def test_equal_seeds_ask_the_same_in_another_process(random_world: Random, repository: Path):
    program = (
        "import sys, conftest; from objdyn.questions.generator import generate; "
        "from objdyn.questions.records import to_json; print(to_json([generate(conftest.random_world(3))]))"
    )
    folders = [str(repository), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "PYTHONHASHSEED": "5"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, cwd=repository
    )
    assert done.stdout.strip() == str(to_json([generate(random_world(3))]))
    other = generate(random_world(3), GeneratorConfig(seed=1))
    assert other != generate(random_world(3))


def test_other_names_of_modules_change_nothing_else(random_world: Random):
    named = GeneratorConfig(modules="published")
    for seed in range(3):
        plain, renamed = generate(random_world(seed)), generate(random_world(seed), named)
        tokens = {token for question in renamed.questions for token in question.program or ()}
        assert not tokens & {*ALIASES.values(), "filter_start", "filter_end"}
        assert [q.text for q in plain.questions] == [q.text for q in renamed.questions]
        executor = Executor(random_world(seed))
        for question in renamed.questions:
            if question.type == "descriptive":
                assert executor.answer(question.program or ()) == question.answer


def test_a_world_without_objects_is_asked_nothing(make_world):
    assert generate(make_world(())).questions == ()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"descriptive": -1}, "descriptive must be 0"),
        ({"predictive": 2}, "a second question would ask the same, got 2"),
        ({"choices": 1}, "choices must be at least 2"),
        ({"seed": -3}, "seed must be 0 or more, got -3"),
    ],
)
def test_an_impossible_setting_is_refused(change: dict[str, int], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        GeneratorConfig(**change)  # pyright: ignore[reportArgumentType]
