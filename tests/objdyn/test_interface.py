"""What every family's config shares."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from objdyn.interface import check_choices


@dataclass(frozen=True)
class Settings:
    colour: Literal["red", "blue"] = "red"
    sides: Literal[3, 4] | None = None
    name: str = "any"
    width: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)


@pytest.mark.parametrize("settings", [{"colour": "blue"}, {"sides": 4}, {"name": "green", "width": 7}])
def test_every_choice_is_taken_and_other_fields_are_free(settings: dict[str, Any]) -> None:
    assert dataclasses.replace(Settings(), **settings) != Settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": "re"}, "^colour must be 'red' or 'blue', got 're'$"),
        ({"colour": None}, "^colour must be 'red' or 'blue', got None$"),
        ({"colour": ["red"]}, r"got \['red'\]$"),
        ({"sides": 5}, "^sides must be 3 or 4 or None, got 5$"),
    ],
)
def test_what_is_no_choice_is_refused_with_those_that_are(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Settings(), **settings)
