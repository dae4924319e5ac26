"""The command line: what is parsed, what is printed, and with which status it ends."""

import dataclasses
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import presets, store
from pipeline.checkpoint import config_to_json
from pipeline.cli import command, main, parse
from pipeline.config import TrainRun
from pipeline.status import Status


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


def test_status_lines_go_to_the_file_of_log(tmp_path, capsys):
    def stage(run: Run) -> None:
        with Status("build", 3, "shards") as progress:
            progress.add(3, quarantined=1)

    log = tmp_path / "log.jsonl"
    for words in (f"--log {log} --data d", f"--data d --log={log}", "--data d"):
        assert call(words, function=stage) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["stage"], line["done"], line["quarantined"], line["state"]) for line in lines] == [
        ("build", 3, 1, "done")
    ] * 2


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--data d --log", 2, "--log wants a FILE to add a line of JSON to"),
        ("--data d --log s3://bucket/log", 1, "object storage cannot append"),
        ("--data d --log /nowhere/log", 1, "No such file or directory: /nowhere/log"),
    ],
)
def test_a_log_that_cannot_be_is_refused(capsys, words, status, message):
    assert call(words) == status
    assert message in capsys.readouterr().err


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


# ---- settings of a stored run ------------------------------------------------------------------------------------

IODINE = {name: ("A preset.", run) for name, run in presets.PRESETS["iodine"].items()}
STORED = dataclasses.replace(
    presets.PRESETS["iodine"]["small"],
    model=dataclasses.replace(presets.PRESETS["iodine"]["small"].model, num_slots=3),
    data="/data/balls",
    out="/runs/1",
    steps=70_000,
    init="/runs/0",
)


def store_run(folder: Path | str, run: TrainRun = STORED, family: str = "iodine", **more: Any) -> str:
    """A file as a run folder's config.json."""
    path = store.join(str(folder), "best.json")
    store.publish_json(path, {"family": family, "run": config_to_json(run), **more})
    return path


def test_a_stored_run_gives_every_setting_but_its_folder(tmp_path):
    path = store_run(tmp_path, dataclasses.replace(STORED, resume=True), value=0.5)
    wanted = dataclasses.replace(STORED, out="", resume=False)
    assert parse(IODINE, ["--config", path], description="", default_preset="small") == wanted
    assert parse(IODINE, [f"--config={path}"], description="") == wanted


def test_flags_before_and_behind_override_a_stored_run(tmp_path):
    path = store_run(tmp_path)
    words = ["--out", "/runs/2", "--config", path, "--model.num-slots", "5", "--optim.lr", "1e-3", "--resume"]
    assert parse(IODINE, words, description="", default_preset="small") == dataclasses.replace(
        STORED,
        out="/runs/2",
        resume=True,
        model=dataclasses.replace(STORED.model, num_slots=5),
        optim=dataclasses.replace(STORED.optim, lr=1e-3),
    )


def test_a_stored_run_may_be_a_relative_path_or_on_s3(tmp_path, monkeypatch, s3_folder):
    wanted = dataclasses.replace(STORED, out="")
    store_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert parse(IODINE, ["--config", "best.json"], description="") == wanted
    assert parse(IODINE, ["--config", store_run(s3_folder)], description="") == wanted


def test_a_setting_that_an_older_version_did_not_store_has_its_default(tmp_path):
    fields = config_to_json(STORED)
    for owner, name in ((fields, "keep_last"), (fields["model"], "recompute"), (fields["optim"], "anneal_to")):
        del owner[name]
    path = str(tmp_path / "best.json")
    store.publish_json(path, {"family": "iodine", "run": fields})
    assert parse(IODINE, ["--config", path], description="") == dataclasses.replace(STORED, out="")


def test_help_tells_of_stored_runs_and_shows_their_settings(tmp_path, capsys):
    assert call("--help", config=IODINE, default_preset="small") == 0
    assert "--config FILE" in capsys.readouterr().out
    assert call(f"--config {store_run(tmp_path)} --help", config=IODINE, default_preset="small") == 0
    out = capsys.readouterr().out
    assert "/data/balls" in out
    assert "--model.num-slots" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("small --config {path}", "--config stands in the place of a preset, and 'small' is given, too; choose one"),
        ("--config {path} --config {path}", "--config is given 2 times; choose one"),
        ("--config", "--config wants a FILE"),
        ("--config --out x", "--config wants a FILE"),
        ("--config= --out x", "--config wants a FILE"),
    ],
)
def test_a_stored_run_given_wrongly_is_a_usage_error(tmp_path, capsys, words, message):
    assert call(words.format(path=store_run(tmp_path)), config=IODINE, default_preset="small") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_flag_typo_behind_a_stored_run_suggests_the_flag_meant(tmp_path, capsys):
    assert call(f"--config {store_run(tmp_path)} --model.num-slot 3", config=IODINE) == 2
    assert "--model.num-slots" in capsys.readouterr().err


def refusal(path: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a job of iodine ends with, given this stored run."""
    assert call(f"--config {path} --out x", config=IODINE, default_preset="small") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def test_a_stored_run_that_is_missing_or_damaged_is_refused(tmp_path, capsys):
    missing = tmp_path / "missing.json"
    assert refusal(str(missing), capsys) == f"No such file or directory: {missing}"
    path = Path(store_run(tmp_path))
    path.write_text(path.read_text().replace("70000", "70001"))
    assert "is damaged or was edited: its 'checksum' does not fit" in refusal(str(path), capsys)
    path.write_text('{"family": "iodine"}')
    assert "has no field 'checksum'" in refusal(str(path), capsys)


def test_sealed_json_that_is_no_run_is_refused(tmp_path, capsys):
    path = str(tmp_path / "best.json")
    for fields, name in (({"family": "iodine"}, "run"), ({"run": config_to_json(STORED)}, "family")):
        store.publish_json(path, fields)
        line = f"{path} holds no training run (no field '{name}'); give the config.json of a run folder"
        assert refusal(path, capsys) == line


def test_a_run_of_another_family_names_the_job_that_takes_it(tmp_path, capsys):
    path = store_run(tmp_path, presets.PRESETS["ddlp"]["small"], family="ddlp")
    assert refusal(path, capsys) == f"{path} is a run of ddlp; give it to jobs/train_ddlp.py"
    path = store_run(tmp_path, family="slots")
    assert refusal(path, capsys) == f"{path} is a run of slots; this job trains iodine"


@pytest.mark.parametrize("group", ["run", "model"])
def test_settings_of_another_version_are_refused(tmp_path, capsys, group):
    fields = config_to_json(STORED)
    (fields if group == "run" else fields["model"])["colour"] = 1
    path = str(tmp_path / "best.json")
    store.publish_json(path, {"family": "iodine", "run": fields})
    name = "TrainRun" if group == "run" else "IODINEConfig"
    line = f"{path}: {name} has no field colour; it was written by another version or was edited"
    assert refusal(path, capsys) == line


def test_importing_the_command_line_is_cheap():
    program = "import sys, pipeline.cli; print([m for m in ('torch', 'ray', 'tyro', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@dataclass(frozen=True)
class Several:
    where: str
    """Place."""
    words: tuple[str, ...] = ()
    """Words."""
    numbers: tuple[int, ...] = ()
    """Numbers."""
    last: int = 0
    """A single one."""


@pytest.mark.parametrize(
    "line",
    [
        "here --words a b --numbers 1 2 --last 3",
        "here --words a --numbers 1 --words b --last 3 --numbers 2",
        "here --last 2 --words a --words b --numbers 1 --numbers 2 --last 3",
        "here --words=a --numbers=1 --words=b --last=3 --numbers 2",
    ],
)
def test_a_flag_of_several_values_may_be_repeated(line: str) -> None:
    assert parse(Several, line.split(), description="", positional=True) == Several("here", ("a", "b"), (1, 2), 3)


def test_repeated_values_of_a_preset_replace_its_own() -> None:
    config = {"one": ("One.", Several("there", words=("x",)))}
    assert parse(config, ["one", "--words", "a", "--words", "b"], description="").words == ("a", "b")


@pytest.mark.parametrize("words", [["--storage.endpoint-url", "URL"], ["--storage.endpoint_url=URL"]])
def test_a_stored_run_is_read_from_the_store_that_the_line_names(
    words: list[str], s3_folder: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = presets.PRESETS["iodine"]["debug"]
    path = store.join(s3_folder, "config.json")
    store.publish_json(path, {"family": "iodine", "run": config_to_json(run)})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    words = ["--config", path, "--steps", "7", *[word.replace("URL", s3_endpoint) for word in words]]
    parsed = parse({"debug": ("Seconds.", run)}, words, description="A job.")
    assert (parsed.steps, parsed.storage.endpoint_url) == (7, s3_endpoint)
    assert command("jobs/train_iodine.py", parsed).endswith(f"--storage.endpoint-url {s3_endpoint}")
