"""Options of a simulator as they stand in a data string: ``NAME:balls=6-8,size=32,seed=1``."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Option(NamedTuple):
    """How one option is read."""

    read: Callable[[str], Any]
    """Turns the text behind ``=`` into a value; raises ValueError where it cannot."""
    wanted: str
    """What a user may write, ``balls=N or balls=A-B``; part of error messages."""


def read_options(simulator: str, text: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """Read ``KEY=VALUE,KEY=VALUE``, the part of a data string behind ``NAME:``; empty text holds no option.

    Raises:
        ValueError: a key is unknown or comes twice, or a value cannot be read; the message lists what there is.
    """
    values: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if key not in options or not equals:
            known = ", ".join(option.wanted for option in options.values())
            raise ValueError(f"{simulator} has no option {part!r}; write KEY=VALUE,KEY=VALUE with {known}")
        if key in values:
            raise ValueError(f"option {key} of {simulator} is given twice; keep one")
        try:
            values[key] = options[key].read(value)
        except ValueError:
            raise ValueError(f"{simulator} wants {options[key].wanted}, got {part!r}") from None
    return values


def whole(text: str) -> int:
    """Read a whole number without a sign.

    Raises:
        ValueError: it is none, or has more than 19 digits.
    """
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(text)


def decimal(text: str) -> float:
    """Read a number without a sign or exponent.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise ValueError(f"expected a number such as 0.5, got {text!r}")
    return float(text)


def whole_range(text: str) -> tuple[int, int]:
    """Read ``A-B``, or ``N`` as ``N-N``.

    Raises:
        ValueError: a part is no whole number.
    """
    low, dash, high = text.partition("-")
    return whole(low), whole(high) if dash else whole(low)


def show_range(numbers: tuple[int, int]) -> str:
    """Write what :func:`whole_range` reads, in the shorter form."""
    return str(numbers[0]) if numbers[0] == numbers[1] else f"{numbers[0]}-{numbers[1]}"
