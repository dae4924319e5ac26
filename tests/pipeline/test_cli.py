"""The command line: what is parsed, what is printed, and with which status it ends."""

import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.cli import command, main, parse


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    """Learning rate."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}; try 0.1")


@dataclass(frozen=True)
class Run:
    data: str
    """Folder to read."""
    max_items: int = 3
    """Items."""
    crop: tuple[int, int] | None = None
    """Corner."""
    resume: bool = False
    """Continue."""
    optim: Optim = field(default_factory=Optim)


PRESETS = {"tiny": ("Seconds.", Run(data="sim:a")), "full": ("Hours.", Run(data="sim:b", optim=Optim(lr=0.2)))}


def call(words: str, function: Any = repr, config: Any = Run, **options: Any) -> int | str | None:
    """Run ``main`` on a command line and return its status, 0 when it returned."""
    try:
        main(function, config, description="A job.", args=words.split(), **options)
    except SystemExit as end:
        return end.code
    return 0


def raising(error: BaseException):
    def function(run: Run) -> str:
        raise error

    return function


def test_result_is_printed_and_status_is_zero(capsys):
    assert call("--data d --max-items 4 --optim.lr 0.3") == 0
    assert capsys.readouterr().out == "Run(data='d', max_items=4, crop=None, resume=False, optim=Optim(lr=0.3))\n"


def test_function_without_result_prints_nothing(capsys):
    assert call("--data d", function=lambda run: None) == 0
    assert capsys.readouterr().out == ""


def test_required_flag_is_named_when_missing(capsys):
    assert call("") == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "words"), [(Run, "--data d"), (PRESETS, "tiny"), (PRESETS, "")])
def test_flag_typo_suggests_the_flag_meant(capsys, config, words):
    assert call(f"{words} --max-itens 3", config=config, default_preset="tiny") == 2
    err = capsys.readouterr().err
    assert "--max-itens" in err
    assert "--max-items" in err


def test_value_that_the_dataclass_refuses_is_a_usage_error(capsys):
    assert call("--data d --optim.lr -1") == 2
    assert "optim.lr must be positive, got -1.0; try 0.1" in capsys.readouterr().err


def test_preset_is_chosen_and_overridden(capsys):
    assert call("full --max-items 9", config=PRESETS) == 0
    assert capsys.readouterr().out == "Run(data='sim:b', max_items=9, crop=None, resume=False, optim=Optim(lr=0.2))\n"


@pytest.mark.parametrize("words", ["", "--max-items 9"])
def test_default_preset_is_taken_when_none_is_given(capsys, words):
    assert call(words, config=PRESETS, default_preset="full") == 0
    assert "sim:b" in capsys.readouterr().out


def test_preset_is_required_where_there_is_no_default(capsys):
    assert call("", config=PRESETS) == 2
    assert "tiny" in capsys.readouterr().err


def test_unknown_preset_lists_the_presets(capsys):
    assert call("tyni --max-items 3", config=PRESETS, default_preset="full") == 2
    assert capsys.readouterr().err == "error: unknown preset 'tyni'; choose from tiny, full\n"


@pytest.mark.parametrize(("words", "expected"), [("--help", ["tiny", "full"]), ("full --help", ["--optim.lr", "0.2"])])
def test_help_shows_presets_then_their_flags(capsys, words, expected):
    assert call(words, config=PRESETS, default_preset="full") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in expected)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no manifest in d:\n  run make_shards.py"), "error: no manifest in d: run make_shards.py\n"),
        (FileNotFoundError(2, "No such file or directory", "d/x"), "error: No such file or directory: d/x\n"),
        (OSError("disk full"), "error: disk full\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_expected_failure_is_one_line_and_status_one(capsys, error, line):
    assert call("--data d", function=raising(error)) == 1
    assert capsys.readouterr().err == line


def test_error_wrapped_by_ray_shows_its_cause(capsys):
    class RayTaskError(ValueError):
        cause = ValueError("clip a-1 is damaged")

    assert call("--data d", function=raising(RayTaskError("a page\nof traceback"))) == 1
    assert capsys.readouterr().err == "error: clip a-1 is damaged\n"


def test_debug_shows_the_traceback_before_the_line(capsys):
    assert call("--debug --data d", function=raising(ValueError("no"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no\n")


def test_defect_always_shows_its_traceback(capsys):
    assert call("--data d", function=raising(KeyError("x"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: unexpected KeyError: 'x'\n")


def test_interrupt_ends_with_130(capsys):
    assert call("--data d", function=raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_own_exit_status_passes_through():
    assert call("--data d", function=raising(SystemExit(5))) == 5


RUNS = [
    Run(data="a folder"),
    Run(data="d", max_items=4, crop=(1, 2), resume=True, optim=Optim(lr=0.25)),
]


@pytest.mark.parametrize("run", RUNS)
def test_command_of_a_run_parses_back_to_it(run):
    words = shlex.split(command("jobs/x.py", run))
    assert words[:2] == ["python", "jobs/x.py"]
    assert parse(Run, words[2:], description="A job.") == run


@pytest.mark.parametrize("run", RUNS)
def test_command_of_a_preset_parses_back_to_it(run):
    words = shlex.split(command("jobs/x.py", run, preset="full", default=PRESETS["full"][1]))
    assert words[:3] == ["python", "jobs/x.py", "full"]
    assert parse(PRESETS, words[2:], description="A job.") == run


def test_command_leaves_defaults_out():
    assert command("jobs/x.py", Run(data="d", optim=Optim(lr=0.5))) == "python jobs/x.py --data d --optim.lr 0.5"


def test_importing_the_command_line_is_cheap():
    program = "import sys, pipeline.cli; print([m for m in ('torch', 'ray', 'tyro', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
