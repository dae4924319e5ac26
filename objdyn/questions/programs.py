"""CLEVRER's programs: postfix lists of words and modules, read into a checked tree and printed back.

``["objects", "cube", "filter_shape", "count"]`` is count(filter_shape(objects(), "cube")): words are constants, a
module takes its inputs off the stack. The program of a multiple-choice question lacks one input, which its choices
give: a choice's program followed by the question's is one program, whose "yes" makes the choice correct.

Sources: Yi et al., "CLEVRER" (2020), Tables 4 to 6, for modules and types. Some modules have two names: one in
these tables and the published questions (``get_frame``, ``start``), one in the authors' executor (``query_frame``,
``events filter_start``). Both are read, and printed as they were read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Flag, auto

from objdyn.clevrer import COLORS, MATERIALS, SHAPES

ORDERS = ("first", "second", "last")
WHOLE_VIDEO = "null"
"""The word in the place of a frame that stands for the whole video."""

_WORDS = """
after and any are before begins between blue brown collide collides colliding collision collisions color cube cube's
cube, cubes cyan cylinder cylinder's cylinder, cylinders ends enter entering enters entrance event exit exiting exits
first following for gray green happen how if is last many material metal moving next not object object's object, objects
of presence purple red removed removed, responsible rubber scene second shape sphere sphere's sphere, spheres stationary
that the there to video what when which will with without yellow
"""
QUESTION_WORDS = frozenset(_WORDS.split())
"""Every word of CLEVRER's questions and choices: 81, with padding 82."""
ANSWERS = ("0", "1", "2", "3", "4", "5", "no", "yes", *sorted((*COLORS, *MATERIALS, *SHAPES)))
"""Every answer to its descriptive questions: 21, with padding 22."""


class Type(Flag):
    """What a word or a module yields; a combination where one of several is taken."""

    OBJECTS = auto()
    OBJECT = auto()
    EVENTS = auto()
    EVENT = auto()
    FRAME = auto()
    ORDER = auto()
    COLOR = auto()
    MATERIAL = auto()
    SHAPE = auto()
    DIRECTION = auto()
    COUNT = auto()
    BOOL = auto()

    def __str__(self) -> str:
        return " or ".join(str(each.name).lower() for each in self)


ANSWER = Type.COLOR | Type.MATERIAL | Type.SHAPE | Type.DIRECTION | Type.COUNT | Type.BOOL
"""What the program of a descriptive question yields."""
CHOICE = Type.OBJECT | Type.EVENT
"""What the program of a choice yields, and the program of its question lacks."""

_MANY = Type.OBJECTS | Type.EVENTS
_WHO = Type.OBJECTS | Type.OBJECT
_WHEN = Type.FRAME | Type.EVENT

WORDS: dict[str, Type] = {
    **dict.fromkeys(COLORS, Type.COLOR),
    **dict.fromkeys(MATERIALS, Type.MATERIAL),
    **dict.fromkeys(SHAPES, Type.SHAPE),
    **dict.fromkeys(ORDERS, Type.ORDER),
    WHOLE_VIDEO: Type.FRAME,
}
"""Constants."""

Signature = tuple[tuple[Type, ...], Type]
ALIASES = {
    "get_frame": "query_frame",
    "get_object": "query_object",
    "get_col_partner": "query_collision_partner",
    "get_counterfact": "filter_counterfact",
}
"""Names in the question files, and of the same modules in the executor."""
MODULES: dict[str, tuple[Signature, ...]] = {
    "objects": (((), Type.OBJECTS),),
    "events": (((), Type.EVENTS),),
    "all_events": (((), Type.EVENTS),),
    "unseen_events": (((), Type.EVENTS),),
    "start": (((), Type.EVENT),),
    "end": (((), Type.EVENT),),
    "unique": (((Type.OBJECTS,), Type.OBJECT), ((Type.EVENTS,), Type.EVENT)),
    "count": (((_MANY,), Type.COUNT),),
    "exist": (((_MANY,), Type.BOOL),),
    "negate": (((Type.BOOL,), Type.BOOL),),
    "belong_to": (((CHOICE, Type.EVENTS), Type.BOOL),),
    "filter_color": (((Type.OBJECTS, Type.COLOR), Type.OBJECTS),),
    "filter_material": (((Type.OBJECTS, Type.MATERIAL), Type.OBJECTS),),
    "filter_shape": (((Type.OBJECTS, Type.SHAPE), Type.OBJECTS),),
    "filter_moving": (((Type.OBJECTS, _WHEN), Type.OBJECTS),),
    "filter_stationary": (((Type.OBJECTS, _WHEN), Type.OBJECTS),),
    "filter_resting": (((Type.OBJECTS, _WHEN), Type.OBJECTS),),
    "filter_start": (((Type.EVENTS,), Type.EVENT),),
    "filter_end": (((Type.EVENTS,), Type.EVENT),),
    "filter_in": (((Type.EVENTS, _WHO), Type.EVENTS),),
    "filter_out": (((Type.EVENTS, _WHO), Type.EVENTS),),
    "filter_collision": (((Type.EVENTS, _WHO), Type.EVENTS),),
    "filter_order": (((Type.EVENTS, Type.ORDER), Type.EVENT),),
    "filter_before": (((Type.EVENTS, Type.EVENT), Type.EVENTS),),
    "filter_after": (((Type.EVENTS, Type.EVENT), Type.EVENTS),),
    "filter_ancestor": (((Type.EVENTS, Type.EVENT), Type.EVENTS),),
    "filter_counterfact": (((Type.EVENTS, Type.OBJECT), Type.EVENTS),),
    "counterfact_events": (((Type.OBJECT,), Type.EVENTS),),
    "query_color": (((Type.OBJECT,), Type.COLOR),),
    "query_material": (((Type.OBJECT,), Type.MATERIAL),),
    "query_shape": (((Type.OBJECT,), Type.SHAPE),),
    "query_direction": (((Type.OBJECT, _WHEN), Type.DIRECTION),),
    "query_frame": (((Type.EVENT,), Type.FRAME),),
    "query_object": (((Type.EVENT,), Type.OBJECT),),
    "query_collision_partner": (((Type.EVENT, Type.OBJECT), Type.OBJECT),),
}
"""By name, the types that a module takes and the one that it yields; several where these go together."""
MODULES |= {alias: MODULES[name] for alias, name in ALIASES.items()}

MAX_TOKENS = 200
"""Of a program; CLEVRER's have some forty."""
GIVEN = "the choice"
"""Token of the leaf that stands for what a choice gives to its question's program; printed as nothing."""
_LEFT_OUT = ("events", "filter_start"), ("events", "filter_end")


class UnknownTokenError(ValueError):
    """A token of a program is neither a module nor a word."""


@dataclass(frozen=True)
class Node:
    """A word, or a module with its inputs."""

    token: str
    inputs: tuple["Node", ...]
    type: Type
    position: int
    """Of the token in the program, from 0; -1 for what a choice gives."""


def parse(program: Sequence[str], wanted: Type = ANSWER, *, choices: bool = False) -> Node:
    """Read a postfix program into its tree and check the type of every input.

    Args:
        program: words and modules.
        wanted: what the program must yield.
        choices: it is that of a multiple-choice question and lacks what its choices yield.

    Raises:
        UnknownTokenError: a token is neither a module nor a word.
        ValueError: an input is missing, left over or of another type, which names the token and its position; or the
            program is empty or has more than MAX_TOKENS.
    """
    if len(program) > MAX_TOKENS:
        raise ValueError(f"the program has {len(program)} tokens, more than the {MAX_TOKENS} allowed")
    stack = [Node(GIVEN, (), CHOICE, -1)] if choices else []
    for position, token in enumerate(program):
        where = f"program token {position}, {token!r},"
        if isinstance(token, str) and token in WORDS:
            stack.append(Node(token, (), WORDS[token], position))
            continue
        signatures = MODULES.get(token) if isinstance(token, str) else None
        if signatures is None:
            raise UnknownTokenError(f"{where} is neither a module nor a word of CLEVRER's programs")
        needed = len(signatures[0][0])
        if len(stack) < needed:
            raise ValueError(f"{where} takes {needed} inputs, {len(stack)} are there")
        inputs = tuple(stack[len(stack) - needed :])
        fitting = [out for types, out in signatures if all(n.type & t for n, t in zip(inputs, types, strict=True))]
        if not fitting:
            takes = " or ".join(f"({', '.join(map(str, types))})" for types, _ in signatures)
            raise ValueError(f"{where} takes {takes}, got ({', '.join(str(node.type) for node in inputs)})")
        del stack[len(stack) - needed :]
        stack.append(Node(token, inputs, fitting[0], position))
    if not stack:
        raise ValueError("the program is empty")
    if len(stack) > 1:
        rest = ", ".join(f"{node.token!r} ({node.position})" for node in stack[:-1])
        raise ValueError(f"the program leaves {rest} unused before {stack[-1].token!r} ({stack[-1].position})")
    if not stack[0].type & wanted:
        raise ValueError(f"the program yields {stack[0].type} at its end, {stack[0].token!r}, wanted {wanted}")
    return stack[0]


def tokens(node: Node) -> tuple[str, ...]:
    """Print a tree as the postfix program that it was read from."""
    return tuple(_tokens(node))


def published(program: Sequence[str]) -> tuple[str, ...]:
    """Rename a program's modules as in CLEVRER's question files: ``get_frame``, ``start`` and so on."""
    names = {name: alias for alias, name in ALIASES.items()}
    renamed: list[str] = []
    for token in program:
        if renamed and (renamed[-1], token) in _LEFT_OUT:
            renamed[-1] = token.removeprefix("filter_")
        else:
            renamed.append(names.get(token, token))
    return tuple(renamed)


def words(text: str) -> list[str]:
    """Split a question or a choice as models of CLEVRER do: lower case, no question mark, commas kept at their word."""
    return text.lower().replace("?", "").split()


def unknown_words(text: str) -> list[str]:
    """Words of a question or a choice that CLEVRER's own do not use, in order."""
    return [word for word in words(text) if word not in QUESTION_WORDS]


def _tokens(node: Node) -> Iterator[str]:
    for each in node.inputs:
        yield from _tokens(each)
    if node.token != GIVEN:
        yield node.token
