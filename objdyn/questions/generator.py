"""New questions about a video, of CLEVRER's four types, with its wording, programs, and vocabulary of answers.

Each question is drawn as a sentence together with its program, and the executor's answer is stored. A draw is kept only
if it has an answer, if the objects that it names are told apart by the words it uses, and if the answer does not hang
on a hair: it must stay when events come three frames later, when ``still_speed`` is halved and doubled, and in every
other World that the caller gives (the same scene simulated from perturbed starts, for example). Of the draws for one
question an answer is chosen first, then a draw with that answer, so that rare answers are not drowned.

- descriptive: counts, existence and properties of objects, by looks, motion and events; 0 to 5 is counted.
- explanatory: which presences, entrances and collisions lead to a collision or an exit. The objects of that event
  are no choices, as in the published questions.
- predictive: which pair collides after the last shown frame. Nothing is asked of a video without such a collision.
- counterfactual: which pair collides in the video without an object, which is of no pair. Pairs that would collide only
  later are no choices. The choices may be all correct or all wrong if one of them collides in the video as it is; for
  the question is negated as often as not, the answers stay balanced.

Source of the forms: the explanatory ones are those of the published questions; of the other types, the examples in Yi
et al., "CLEVRER" (2020), Figures 1, 8 to 11, and the vocabulary of all published questions.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any, Literal, NamedTuple, TypeVar

from objdyn.clevrer import COLORS, MATERIALS, SHAPES, Event, History, World
from objdyn.questions.executor import Executor, NoAnswerError, Occurrence
from objdyn.questions.programs import ANSWERS, ORDERS, Type, parse, published
from objdyn.questions.records import Choice, Question, QuestionType, Verdict, VideoQuestions, check

PROPERTIES = {"color": COLORS, "material": MATERIALS, "shape": SHAPES}
SUBTYPES = ("count", "exist", "query_color", "query_material", "query_shape")
LATER = 3
"""Frames by which an event may come later without changing an answer."""
DRAWS = 24
"""Sentences drawn for one question."""

T = TypeVar("T")
Draw = tuple[str, tuple[str, ...]]
"""A sentence and its program."""


@dataclass(frozen=True)
class GeneratorConfig:
    """How many questions a video gets, at most, and in which form. The defaults are CLEVRER's mean numbers, rounded."""

    descriptive: int = 11
    """Descriptive questions of a video."""
    explanatory: int = 2
    """Explanatory ones."""
    predictive: int = 1
    """Predictive ones; 1 at most, since a second would ask the same."""
    counterfactual: int = 2
    """Counterfactual ones; each is about another object."""
    choices: int = 4
    """Choices of an explanatory or counterfactual question, at most."""
    predictive_choices: int = 2
    """Choices of a predictive question, at most."""
    modules: Literal["executor", "published"] = "executor"
    """Names of modules in the programs: the executor's (``query_frame``) or those of the published question files
    (``get_frame``)."""
    seed: int = 0
    """With a video's number it decides all that is drawn about it."""

    def __post_init__(self) -> None:
        for name in ("descriptive", "explanatory", "predictive", "counterfactual"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (none) or more, got {getattr(self, name)}")
        if self.predictive > 1:
            raise ValueError(f"predictive must be 0 or 1, a second question would ask the same, got {self.predictive}")
        for name in ("choices", "predictive_choices"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, one correct and one wrong, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


def generate(
    world: World, config: GeneratorConfig = GeneratorConfig(), perturbed: Sequence[World] = ()
) -> VideoQuestions:
    """Ask questions about a video; equal arguments give equal questions, in any process.

    Args:
        world: the truth.
        config: how many questions, and their form.
        perturbed: the same video simulated from starts that differ by a hair; an answer that differs in one of them is
            not asked for.

    Raises:
        ValueError: a perturbed World is of another scene.
    """
    for other in perturbed:
        if (other.scene_index, other.properties) != (world.scene_index, world.properties):
            raise ValueError(f"scene {world.scene_index} was given perturbed Worlds of another scene")
    asker = _Asker(world, perturbed, config, Random(f"{config.seed}/{world.scene_index}"))
    drawn = [*asker.descriptive(), *asker.explanatory(), *asker.predictive(), *asker.counterfactual()]
    questions = tuple(dataclasses.replace(question, question_id=i) for i, question in enumerate(drawn))
    for question in questions:
        check(question)
    return VideoQuestions(world.scene_index, f"video_{world.scene_index:05d}.mp4", questions)


class _Reference(NamedTuple):
    """Words that stand for objects, and what filters these."""

    noun: str
    """``blue metal cube``, without an article."""
    program: tuple[str, ...]
    """Yields objects."""

    @property
    def plural(self) -> str:
        return f"{self.noun}s"

    @property
    def unique(self) -> tuple[str, ...]:
        """Yields the one object."""
        return (*self.program, "unique")


class _Asker:
    """Draws questions about one video."""

    def __init__(self, world: World, perturbed: Sequence[World], config: GeneratorConfig, random: Random):
        self.world, self.config, self.random = world, config, random
        self.executor = Executor(world)
        self.others = [Executor(other) for other in (*_shaken(world), *perturbed)]
        self.collisions = [event for event in self.executor.events if event.kind == "collision"]
        self.passages = [event for event in self.executor.events if event.kind in ("in", "out")]

    # -- what objects are called

    def reference(self, index: int) -> _Reference:
        """Words that only this object fits, mostly no more than needed."""
        fitting = [values for values in _subsets(self.world.properties[index]) if self._fit(values) == [index]]
        least = [values for values in fitting if not any(set(other) < set(values) for other in fitting)]
        return _reference(self.random.choice(least if self.random.random() < 0.8 else fitting))

    def kind(self, without: str = "") -> _Reference:
        """Words that fit any number of objects, not naming one property."""
        if self.random.random() < 0.15:  # so that some questions are about what is not there
            values = [self.random.choice(PROPERTIES[name]) for name in PROPERTIES]
        else:
            values = list(self.world.properties[self.random.choice(self.executor.objects)])
        keep = [name != without and self.random.random() < 0.4 for name in PROPERTIES]
        return _reference(tuple(value for value, kept in zip(values, keep, strict=True) if kept))

    def _fit(self, values: Sequence[str]) -> list[int]:
        return [i for i in self.executor.objects if set(values) <= set(self.world.properties[i])]

    # -- descriptive

    def descriptive(self) -> Iterator[Question]:
        if not self.executor.objects:
            return
        order: list[str] = []
        told: set[tuple[str, ...]] = set()
        while len(order) < self.config.descriptive:
            order += self.random.sample(SUBTYPES, len(SUBTYPES))
        for subtype in order[: self.config.descriptive]:
            draws: dict[str, list[Draw]] = {}
            for _ in range(DRAWS):
                draw = self._draw(subtype)
                if draw is not None and draw[1] not in told and (answer := self._answer(draw[1])) in ANSWERS:
                    draws.setdefault(answer, []).append(draw)
            while draws:
                answer = self.random.choice(list(draws))
                text, program = draws[answer].pop()
                if not draws[answer]:
                    del draws[answer]
                if self._holds(program, answer):
                    told.add(program)
                    yield self._question(text, "descriptive", program, subtype=subtype, answer=answer)
                    break

    def _draw(self, subtype: str) -> Draw | None:
        if subtype.startswith("query_"):
            forms: list[Callable[[str], Draw | None]] = [self._passing, self._partner, self._standing]
            return self.random.choice(forms)(subtype.removeprefix("query_"))
        how_many = subtype == "count"
        forms_of_sets: list[Callable[[bool], Draw | None]] = [self._moving_set, self._passing_set, self._collision_set]
        if how_many:
            forms_of_sets.append(lambda _: self._kind_set())
        return self.random.choice(forms_of_sets)(how_many)

    def _moment(self) -> Draw:
        """``when the video ends`` or ``when the cube enters the scene``, and what yields the frame."""
        passage = self._passage() if self.random.random() < 0.5 else None
        if passage is not None:
            return f"when {passage[0]}", (*passage[1], "query_frame")
        end = self.random.choice(("begins", "ends"))
        return f"when the video {end}", ("events", {"begins": "filter_start", "ends": "filter_end"}[end], "query_frame")

    def _passage(self) -> Draw | None:
        """``the cube enters the scene``, and what yields the event."""
        if not self.passages:
            return None
        event = self.random.choice(self.passages)
        who = self.reference(event.objects[0])
        return f"the {who.noun} {_verb(event.kind)}s the scene", (*_passages(event.kind, who.unique), "unique")

    def _period(self) -> Draw:
        """Maybe ``after the cube enters the scene``, and what keeps the events of that time."""
        passage = self._passage() if self.random.random() < 0.6 else None
        if passage is None:
            return "", ()
        when = self.random.choice(("before", "after"))
        return f" {when} {passage[0]}", (*passage[1], f"filter_{when}")

    def _kind_set(self) -> Draw:
        kind = self.kind()
        return f"How many {kind.plural} are there?", (*kind.program, "count")

    def _moving_set(self, how_many: bool) -> Draw | None:
        kind, state = self.kind(), self.random.choice(("moving", "stationary"))
        moment = self._moment() if self.random.random() < 0.8 else ("", ("null",))
        when = f" {moment[0]}" if moment[0] else ""
        program = (*kind.program, *moment[1], f"filter_{state}", "count" if how_many else "exist")
        if how_many:
            form = self.random.choice(
                ("How many {kind} are {state}{when}?", "How many {state} {kind} are there{when}?")
            )
        else:
            form = self.random.choice(
                ("Are there any {state} {kind}{when}?", "Are there any {kind} that are {state}{when}?")
            )
        return form.format(kind=kind.plural, state=state, when=when), program

    def _passing_set(self, how_many: bool) -> Draw | None:
        kind, way = self.kind(), self.random.choice(("in", "out"))
        when, keep = self._period()
        program = ("events", *kind.program, f"filter_{way}", *keep, "count" if how_many else "exist")
        events = self._events(program[:-1])
        if events is None or len({event.objects for event in events}) < len(events):
            return None  # who enters twice would be counted twice
        if how_many:
            return f"How many {kind.plural} {_verb(way)} the scene{when}?", program
        return f"Are there any {kind.plural} that {_verb(way)} the scene{when}?", program

    def _collision_set(self, how_many: bool) -> Draw | None:
        when, keep = self._period()
        program = ("events", "objects", "filter_collision", *keep, "count" if how_many else "exist")
        if how_many:
            return f"How many collisions happen{when}?", program
        form = self.random.choice(("Are there any collisions{when}?", "Are there any collisions that happen{when}?"))
        return form.format(when=when), program

    def _passing(self, name: str) -> Draw | None:
        kind, way = self.kind(without=name), self.random.choice(("in", "out"))
        events = ("events", *kind.program, f"filter_{way}")
        which, choose = self._which(events)
        clause = self.random.choice((f"that {_verb(way)}s", f"to {_verb(way)}")) if which else f"that {_verb(way)}s"
        return (
            f"{self._ask(name)} the {which}{kind.noun} {clause} the scene?",
            (*events, *choose, "query_object", f"query_{name}"),
        )

    def _partner(self, name: str) -> Draw | None:
        if not self.collisions:
            return None
        index = self.random.choice(self.random.choice(self.collisions).objects)
        who = self.reference(index)
        events = ("events", *who.unique, "filter_collision")
        which, choose = self._which(events)
        clause = self.random.choice(("to collide", "that collides"))
        program = (*events, *choose, *who.unique, "query_collision_partner", f"query_{name}")
        return f"{self._ask(name)} the {which}object {clause} with the {who.noun}?", program

    def _standing(self, name: str) -> Draw | None:
        kind, state = self.kind(without=name), self.random.choice(("moving", "stationary"))
        when, frame = self._moment()
        who = (*kind.program, *frame, f"filter_{state}", "unique")
        if (index := self._object(who)) is None or index in self._objects_of(frame[:-1]):
            return None  # the name of what enters or exits would tell the answer
        form = self.random.choice(("{ask} the {state} {kind} {when}?", "{ask} the {kind} that is {state} {when}?"))
        text = form.format(ask=self._ask(name), state=state, kind=kind.noun, when=when)
        return text, (*who, f"query_{name}")

    def _ask(self, name: str) -> str:
        return self.random.choice((f"What {name} is", f"What is the {name} of"))

    def _which(self, program: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """``first `` and what takes it, or nothing and ``unique`` where there is only one."""
        events = self._events(program)
        if events is None or len(events) < 2:
            return "", ("unique",)
        order = self.random.choice(ORDERS)
        return f"{order} ", (order, "filter_order")

    # -- multiple choice

    def explanatory(self) -> Iterator[Question]:
        exits = [event for event in self.passages if event.kind == "out"]
        targets = [*self._shuffled(self.collisions), *self._shuffled(exits)]
        told = 0
        for target in targets:
            if told == self.config.explanatory:
                return
            draw = self._named(target, "events")
            negated = self.random.random() < 0.5
            text = f"Which of the following is {'not ' if negated else ''}responsible for {draw[0]}?"
            program = ("events", *draw[1], "filter_ancestor", "belong_to", *(("negate",) if negated else ()))
            choices = self._choices(self._causes(target), program, self.config.choices, "mixed")
            if choices:
                told += 1
                yield self._question(text, "explanatory", program, choices=choices)

    def _causes(self, target: Occurrence) -> list[Draw]:
        """What may be responsible for an event: presence and entrance of objects not of it, other collisions."""
        strangers = [index for index in self.executor.objects if index not in target.objects]
        draws = []
        for index in strangers:
            who = self.reference(index)
            draws.append((f"the presence of the {who.noun}", who.unique))
        for event in self.passages:
            if event.kind == "in" and event.objects[0] in strangers:
                draws.append(self._named(event, "events"))
        draws += [self._named(event, "events") for event in self.collisions if event.objects != target.objects]
        return self._shuffled(draws)

    def predictive(self) -> Iterator[Question]:
        text = self.random.choice(("Which event will happen next?", "What will happen next?"))
        program = ("unseen_events", "belong_to")
        draws = self._meetings(self._shuffled(combinations(self.executor.objects, 2)))
        choices = self._choices(draws, program, self.config.predictive_choices, "even")
        if choices and self.config.predictive:
            yield self._question(text, "predictive", program, choices=choices)

    def counterfactual(self) -> Iterator[Question]:
        removable = [index for index in self.executor.objects if index in self.world.without]
        told = 0
        for index in self._shuffled(removable):
            if told == self.config.counterfactual:
                return
            who, negated = self.reference(index), self.random.random() < 0.5
            form = self.random.choice(
                (
                    "Without the {who}, {ask} will {no}happen?",
                    "{Ask} will {no}happen without the {who}?",
                    "If the {who} is removed, {ask} will {no}happen?",
                    "{Ask} will {no}happen if the {who} is removed?",
                )
            )
            ask = self.random.choice(("what", "which event", "which of the following"))
            text = form.format(who=who.noun, ask=ask, Ask=ask.capitalize(), no="not " if negated else "")
            program = ("all_events", *who.unique, "filter_counterfact", "belong_to", *(("negate",) if negated else ()))
            pairs = self._pairs_without(index)
            changed = any(event.objects in pairs for event in self.collisions)
            choices = self._choices(self._meetings(pairs), program, self.config.choices, "any" if changed else "mixed")
            if choices:
                told += 1
                yield self._question(text, "counterfactual", program, choices=choices)

    def _pairs_without(self, removed: int) -> list[tuple[int, ...]]:
        """Pairs of the other objects; those that collide in either run first, so that they are chosen first."""
        meeting = [event for event in self.world.without[removed].events if event.kind == "collision"]
        in_time = {tuple(sorted(event.objects)) for event in meeting if event.frame < self.world.shown}
        late = {tuple(sorted(event.objects)) for event in meeting} - in_time
        relevant = in_time | {event.objects for event in self.collisions}
        rest = [index for index in self.executor.objects if index != removed]
        pairs = self._shuffled(pair for pair in combinations(rest, 2) if pair not in late)
        return sorted(pairs, key=lambda pair: pair not in relevant)

    def _meetings(self, pairs: Sequence[tuple[int, ...]]) -> list[Draw]:
        draws = []
        for pair in pairs:
            one, two = (self.reference(index) for index in self.random.sample(pair, 2))
            form = self.random.choice(("The {} collides with the {}", "The {} and the {} collide"))
            program = ("all_events", *one.unique, "filter_collision", *two.unique, "filter_collision", "unique")
            draws.append((form.format(one.noun, two.noun), program))
        return draws

    def _named(self, event: Occurrence, source: str) -> Draw:
        """``the collision between the cube and the sphere``, and what yields the event."""
        if event.kind == "collision":
            one, two = (self.reference(index) for index in self.random.sample(event.objects, 2))
            form = self.random.choice(("the collision between the {} and the {}", "the {}'s colliding with the {}"))
            program = (source, *one.unique, "filter_collision", *two.unique, "filter_collision", "unique")
            return form.format(one.noun, two.noun), program
        who = self.reference(event.objects[0])
        forms = {
            "in": ("the {}'s entrance", "the {}'s entering the scene"),
            "out": ("the {}'s exit", "the {}'s exiting the scene"),
        }
        return self.random.choice(forms[event.kind]).format(who.noun), (*_passages(event.kind, who.unique), "unique")

    def _choices(
        self, draws: list[Draw], program: tuple[str, ...], most: int, mixture: Literal["even", "mixed", "any"]
    ) -> tuple[Choice, ...]:
        """Half correct and half wrong ones where the draws allow, in random order; none if they cannot be mixed so.

        Args:
            draws: sentences and programs of choices, the preferred first.
            program: the question's.
            most: so many at most.
            mixture: ``even`` takes as many correct as wrong ones; ``mixed`` at least one of each, and fills up with the
                larger group; ``any`` two at least.
        """
        held: dict[Verdict, list[Draw]] = {"correct": [], "wrong": []}
        for text, own in draws:
            answer = self._answer((*own, *program))
            if answer is not None and self._holds((*own, *program), answer):
                held["correct" if answer == "yes" else "wrong"].append((text, own))
        counts = {verdict: min(len(held[verdict]), most // 2) for verdict in held}
        if mixture == "even":
            counts = dict.fromkeys(counts, min(counts.values()))
        else:
            for verdict in self.random.sample(list(held), 2):
                counts[verdict] += min(len(held[verdict]) - counts[verdict], most - sum(counts.values()))
        if sum(counts.values()) < 2 or (mixture == "mixed" and not all(counts.values())):
            return ()
        chosen: list[tuple[Verdict, Draw]] = []
        for verdict, own in held.items():
            chosen.extend((verdict, draw) for draw in own[: counts[verdict]])
        return tuple(
            Choice(i, text, self._renamed(own), verdict)
            for i, (verdict, (text, own)) in enumerate(self._shuffled(chosen))
        )

    # -- what draws have in common

    def _question(
        self,
        text: str,
        kind: QuestionType,
        program: tuple[str, ...],
        subtype: str | None = None,
        answer: str | None = None,
        choices: tuple[Choice, ...] = (),
    ) -> Question:
        return Question(0, text, kind, subtype, self._renamed(program), answer, choices)

    def _renamed(self, program: tuple[str, ...]) -> tuple[str, ...]:
        return published(program) if self.config.modules == "published" else program

    def _shuffled(self, items: Iterable[T]) -> list[T]:
        listed = list(items)
        return self.random.sample(listed, len(listed))

    def _answer(self, program: tuple[str, ...]) -> str | None:
        try:
            return self.executor.answer(program)
        except NoAnswerError:
            return None

    def _holds(self, program: tuple[str, ...], answer: str) -> bool:
        try:
            return all(other.answer(program) == answer for other in self.others)
        except NoAnswerError:
            return False

    def _events(self, program: tuple[str, ...]) -> tuple[Occurrence, ...] | None:
        return self._yielded(program, Type.EVENTS)

    def _object(self, program: tuple[str, ...]) -> int | None:
        return self._yielded(program, Type.OBJECT)

    def _objects_of(self, program: tuple[str, ...]) -> tuple[int, ...]:
        event: Occurrence | None = self._yielded(program, Type.EVENT)
        return () if event is None else event.objects

    def _yielded(self, program: tuple[str, ...], wanted: Type) -> Any:
        try:
            return self.executor.evaluate(parse(program, wanted))
        except NoAnswerError:
            return None


def _subsets(values: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(values) + 1):
        yield from combinations(values, size)


def _reference(values: Sequence[str]) -> _Reference:
    program = ["objects"]
    for name, known in PROPERTIES.items():
        program += [token for value in values if value in known for token in (value, f"filter_{name}")]
    words = [value for value in values if value not in SHAPES]
    noun = next((value for value in values if value in SHAPES), "object")
    return _Reference(" ".join([*words, noun]), tuple(program))


def _verb(way: str) -> str:
    return {"in": "enter", "out": "exit"}[way]


def _passages(way: str, who: tuple[str, ...]) -> tuple[str, ...]:
    return ("events", *who, f"filter_{way}")


def _shaken(world: World) -> list[World]:
    """The World with every second event three frames later, the even or the odd ones, and another limit of speed.

    Of two successive events less than three frames apart, one of these Worlds turns the order.
    """
    return [
        dataclasses.replace(
            world,
            still_speed=world.still_speed * factor,
            history=_delayed(world.history, world.shown, odd),
            without={index: _delayed(history, world.shown, odd) for index, history in world.without.items()},
        )
        for odd, factor in ((0, 0.5), (1, 2.0))
    ]


def _delayed(history: History, shown: int, odd: int) -> History:
    events = []
    for place, event in enumerate(sorted(history.events, key=lambda event: event.frame)):
        last = (shown if event.frame < shown else history.frames) - 1
        frame = event.frame if place % 2 != odd else min(event.frame + LATER, max(last, event.frame))
        events.append(Event(event.kind, frame, event.objects))
    return dataclasses.replace(history, events=tuple(sorted(events, key=lambda event: event.frame)))
