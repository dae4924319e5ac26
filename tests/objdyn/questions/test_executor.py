import dataclasses

import numpy as np
import pytest

from objdyn.clevrer import Motion, World, look_at
from objdyn.questions.executor import Executor, NoAnswerError, answer
from objdyn.questions.programs import MODULES, Type, parse, published

GRAY = "objects gray filter_color unique"
RED = "objects red filter_color unique"
BLUE = "objects blue filter_color unique"
GREEN = "objects green filter_color unique"
YELLOW = "objects yellow filter_color unique"
FIRST_HIT = f"events {RED} filter_collision unique"
"""Frame 30: the red sphere and the gray cube."""
SECOND_HIT = f"events {BLUE} filter_collision unique"
"""Frame 50: the gray cube and the blue cylinder."""


def meeting(one: str, two: str, source: str = "events") -> str:
    return f"{source} {one} filter_collision {two} filter_collision unique"


ANSWERED_BY_HAND = [
    # objects by their looks
    ("objects count", "5"),
    ("objects cube filter_shape count", "2"),
    ("objects metal filter_material count", "3"),
    ("objects metal filter_material cube filter_shape count", "1"),
    ("objects red filter_color exist", "yes"),
    ("objects purple filter_color exist", "no"),
    ("objects purple filter_color exist negate", "yes"),
    (f"{BLUE} query_shape", "cylinder"),
    (f"{BLUE} query_material", "metal"),
    ("objects cylinder filter_shape unique query_color", "blue"),
    # motion: at the start 0, 2, 3 are in view and lie; at the end 0 moves, 1 and 3 lie
    ("objects events filter_start query_frame filter_moving count", "0"),
    ("objects events filter_start query_frame filter_stationary count", "3"),
    ("objects events filter_end query_frame filter_moving count", "1"),
    ("objects events filter_end query_frame filter_stationary count", "2"),
    ("objects end filter_moving unique query_color", "gray"),
    ("objects start filter_stationary count", "3"),
    (f"objects {FIRST_HIT} query_frame filter_moving count", "3"),
    (f"objects {FIRST_HIT} query_frame filter_stationary count", "2"),
    (f"objects {FIRST_HIT} filter_resting count", "2"),
    (f"objects sphere filter_shape {FIRST_HIT} filter_moving count", "2"),
    ("objects null filter_moving count", "4"),
    ("objects null filter_stationary unique query_color", "green"),
    ("objects null filter_resting count", "1"),
    # events
    ("events count", "8"),
    ("events objects filter_collision count", "2"),
    ("events objects filter_in count", "2"),
    ("events objects sphere filter_shape filter_out count", "1"),
    (f"events {GREEN} filter_collision exist", "no"),
    ("events objects filter_out first filter_order query_object query_shape", "cylinder"),
    ("events objects filter_out last filter_order query_object query_shape", "sphere"),
    ("events objects filter_in second filter_order query_object query_color", "yellow"),
    (f"events {RED} filter_collision unique {RED} query_collision_partner query_color", "gray"),
    (f"events {GRAY} filter_collision first filter_order {GRAY} query_collision_partner query_color", "red"),
    (f"events {GRAY} filter_collision last filter_order {GRAY} query_collision_partner query_color", "blue"),
    (f"events objects filter_collision events {BLUE} filter_out unique filter_before count", "2"),
    (f"events objects filter_collision events {BLUE} filter_out unique filter_after exist", "no"),
    (f"events {FIRST_HIT} filter_before count", "3"),
    (f"events {FIRST_HIT} filter_after count", "4"),
    # causes
    (f"events {SECOND_HIT} filter_ancestor count", "2"),
    (f"events events {BLUE} filter_out unique filter_ancestor count", "3"),
    (f"events events {RED} filter_in unique filter_ancestor count", "0"),
    (f"{meeting(RED, GRAY)} events {SECOND_HIT} filter_ancestor belong_to", "yes"),
    (f"{meeting(RED, GRAY)} events {SECOND_HIT} filter_ancestor belong_to negate", "no"),
    (f"{SECOND_HIT} events {SECOND_HIT} filter_ancestor belong_to", "no"),
    (f"{SECOND_HIT} events {FIRST_HIT} filter_ancestor belong_to", "no"),
    (f"events {RED} filter_in unique events {SECOND_HIT} filter_ancestor belong_to", "yes"),
    (f"events {YELLOW} filter_in unique events {SECOND_HIT} filter_ancestor belong_to", "no"),
    (f"{RED} events {SECOND_HIT} filter_ancestor belong_to", "yes"),
    (f"{YELLOW} events {SECOND_HIT} filter_ancestor belong_to", "no"),
    (f"{GREEN} events {SECOND_HIT} filter_ancestor belong_to", "no"),
    # the future
    ("unseen_events count", "1"),
    (f"{meeting(GRAY, GREEN, 'all_events')} unseen_events belong_to", "yes"),
    (f"{meeting(RED, GRAY, 'all_events')} unseen_events belong_to", "no"),
    # what if
    ("all_events count", "20"),
    ("all_events objects filter_collision count", "10"),
    (f"{GRAY} counterfact_events objects filter_collision count", "1"),
    (f"all_events {GRAY} filter_counterfact count", "4"),
    (f"all_events {RED} filter_counterfact count", "2"),
    (f"all_events {BLUE} filter_counterfact count", "4"),
    (f"all_events {YELLOW} filter_counterfact count", "3"),
    (f"{meeting(RED, BLUE, 'all_events')} all_events {GRAY} filter_counterfact belong_to", "yes"),
    (f"{meeting(GRAY, BLUE, 'all_events')} all_events {RED} filter_counterfact belong_to", "no"),
    (f"{meeting(GRAY, BLUE, 'all_events')} all_events {RED} filter_counterfact belong_to negate", "yes"),
    (f"{meeting(GRAY, GREEN, 'all_events')} all_events {BLUE} filter_counterfact belong_to", "yes"),
    (f"{meeting(GRAY, GREEN, 'all_events')} all_events {YELLOW} filter_counterfact belong_to", "no"),
]


@pytest.mark.parametrize(("program", "expected"), ANSWERED_BY_HAND)
def test_the_answer_is_the_one_worked_out_by_hand(world: World, program: str, expected: str):
    assert answer(program.split(), world) == expected
    assert answer(published(program.split()), world) == expected


def test_every_module_is_answered_by_hand():
    used = {token for program, _ in ANSWERED_BY_HAND for token in (*program.split(), *published(program.split()))}
    assert set(MODULES) - used == {"query_direction"}  # it has its own test below


def test_frames_of_events_are_those_of_the_world(world: World):
    executor = Executor(world)
    for program, frame in [
        ("events filter_start query_frame", 0),
        ("end query_frame", 127),
        (f"{SECOND_HIT} get_frame", 50),
        ("unseen_events unique query_frame", 140),
    ]:
        assert executor.evaluate(parse(program.split(), Type.FRAME)) == frame


def test_ancestors_are_found_through_other_objects(world: World):
    found = Executor(world).evaluate(parse(f"events {SECOND_HIT} filter_ancestor".split(), Type.EVENTS))
    assert [(event.kind, event.frame, event.objects) for event in found] == [
        ("in", 10, (1,)),
        ("collision", 30, (0, 1)),
    ]


def test_simultaneous_events_cause_nothing_in_each_other(make_world):
    names = ("gray metal cube", "red metal cube", "blue metal cube")
    world = make_world(names, (("collision", 30, (0, 1)), ("collision", 30, (1, 2))))
    assert answer(f"events {meeting(BLUE, RED)} filter_ancestor count".split(), world) == "0"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (
            "objects cube filter_shape unique query_color",
            "scene 7, program token 3, 'unique': 2 are there, wanted exactly",
        ),
        ("objects purple filter_color unique query_shape", "program token 3, 'unique': 0 are there"),
        (f"events {GRAY} filter_collision unique {GRAY} query_collision_partner query_color", "'unique': 2 are there"),
        (f"events {RED} filter_collision second filter_order query_object query_color", "1 events are there.*second"),
        (f"events {GREEN} filter_in last filter_order query_object query_color", "0 events are there, wanted the last"),
        (f"{FIRST_HIT} query_object query_color", "'query_object': only one that enters or exits"),
        (
            f"{FIRST_HIT} {GREEN} query_collision_partner query_color",
            r"object 3 \(green rubber cube\) does not collide",
        ),
        ("objects unseen_events unique query_frame filter_moving count", "frame 140 is none of the 128 shown"),
        (f"events {meeting(RED, GRAY, 'all_events')} filter_before count", "events that could happen have no time"),
        (f"all_events {GREEN} filter_counterfact count", r"without object 3 \(green rubber cube\) is not held"),
        (f"{GREEN} counterfact_events count", "'counterfact_events': the simulation without object 3"),
        (f"{GRAY} null query_direction", "give the executor the video's camera"),
        ("objects unseen_events filter_end filter_moving count", "0 are there, wanted exactly one end"),
    ],
)
def test_what_has_no_answer_says_why_and_where(world: World, program: str, complaint: str):
    with pytest.raises(NoAnswerError, match=complaint):
        answer(program.split(), world)


def test_objects_that_the_video_never_shows_are_none(make_world):
    names = ("gray metal cube", "red metal cube", "blue metal cube")
    world = make_world(names, (("collision", 140, (0, 2)),), unseen=(1,))
    assert answer(["objects", "count"], world) == "2"
    assert answer(["all_events", "objects", "filter_collision", "count"], world) == "1"
    assert answer(["objects", "null", "filter_stationary", "count"], world) == "2"


def test_an_unknown_velocity_of_an_object_in_view_is_no_answer(world: World):
    velocity = world.motion.velocity.copy()
    velocity[5, 1] = np.nan  # the sphere enters at 10
    motion = dataclasses.replace(world.motion, velocity=velocity)
    assert answer(["objects", "null", "filter_moving", "count"], dataclasses.replace(world, motion=motion)) == "4"
    velocity[15, 1] = np.nan
    with pytest.raises(NoAnswerError, match="no known velocity"):
        answer(["objects", "null", "filter_moving", "count"], dataclasses.replace(world, motion=motion))


@pytest.mark.parametrize(
    ("velocity", "expected"),
    [((1, 0, 0), "right"), ((-1, 0, 0), "left"), ((0, 1, 0), "up"), ((0, -1, 0), "down"), ((0.2, -1, 0), "down")],
)
def test_a_direction_is_that_in_the_image(world: World, velocity: tuple[float, float, float], expected: str):
    camera = look_at((0.0, -8.0, 6.0), (0.0, 0.0, 0.0), 50.0)
    shape = world.motion.velocity.shape
    speeds = np.broadcast_to(np.array(velocity, dtype=np.float64), shape)
    location = np.cumsum(speeds, axis=0) / 64
    motion = Motion(location, np.zeros(shape), speeds, np.zeros(shape), world.motion.in_view)
    moved = dataclasses.replace(world, motion=motion)
    for when in ("null", "start", "events filter_end query_frame"):
        assert answer(f"{GRAY} {when} query_direction".split(), moved, camera) == expected
    with pytest.raises(NoAnswerError, match="does not move in view in frame 127"):
        answer(f"{GREEN} end query_direction".split(), world, camera)
