"""The command line of every job: parse flags into a run with tyro, call one function, end with a status to test.

Status 0: done. Status 1: failed, with one line ``error: ...`` on stderr that says what to do (``--debug`` adds the
traceback). Status 2: the command line itself was wrong. Status 75: asked to end by SIGTERM, or by a run's ``.stop``
file, and ended within its grace; the same command goes on (with ``--resume``, if it trains). Status 130: interrupted.
"""

import dataclasses
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pipeline import stop

DEBUG = "--debug"
CONFIG = "--config"
LOG = "--log"
ENDPOINT = "--storage.endpoint-url"
LONGEST = 4000
"""Letters of a message: what it quotes may come from a stranger's file."""


def main(
    function: Callable[[Any], str | None],
    config: Any,
    *,
    description: str,
    default_preset: str | None = None,
    positional: bool = False,
    args: Sequence[str] | None = None,
) -> None:
    """Parse the command line into a run, call ``function(run)``, print what it returns, and exit if that failed.

    Args:
        function: does the work; a string that it returns is printed as the last line of stdout.
        config: the run's dataclass, whose fields become flags (a field without a default is a required flag), or
            presets ``{name: (description, run)}`` of training runs of one family, which become sub-commands:
            ``PRESET --flag VALUE ...``, or ``--config FILE --flag VALUE ...`` with the settings of a stored run.
        description: first paragraph of ``--help``.
        default_preset: the preset taken when the command line does not begin with one.
        positional: fields without a default are given by position instead of by a flag: ``verify.py PATH``.
        args: the command line without the program's name; the process's own by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in words
    words, log = _without(LOG, [word for word in words if word != DEBUG], "to add a line of JSON to per status line")
    try:
        _log_to(log)
        run = parse(config, words, description=description, default_preset=default_preset, positional=positional)
    except (ValueError, OSError) as error:  # of the files of --config and --log
        _fail(error, 1, debug, _one_line(error))
    try:
        with stop.preemptible():
            result = function(run)
        if result is not None:
            print(result, flush=True)
    except stop.Preempted as error:
        _fail(error, stop.STATUS, debug, _one_line(error))
    except KeyboardInterrupt as error:
        _fail(error, 130, debug, "interrupted")
    except (ValueError, OSError, FloatingPointError) as error:  # the last: a loss that is not finite
        _fail(error, 1, debug, _one_line(error))
    except MemoryError as error:
        message = "memory ran out: a file claims more than this machine has, or other work takes it"
        _fail(error, 1, debug, f"{message} ({_one_line(error)})")
    except Exception as error:  # a defect: hiding its traceback would cost the user a second run
        _fail(error, 1, True, f"unexpected {type(error).__name__}: {_one_line(error)}")


def parse(
    config: Any,
    words: Sequence[str],
    *,
    description: str,
    default_preset: str | None = None,
    positional: bool = False,
) -> Any:
    """Turn a command line into a run.

    Raises:
        SystemExit: with 2 for a usage error or a value that the run's dataclass refuses (the message is on stderr),
            with 0 after ``--help``.
        OSError: the file of ``--config`` cannot be read.
        ValueError: it holds no run that these presets could be.
    """
    import tyro

    description += (
        f"\n\n{DEBUG} anywhere on the line shows the traceback when the job fails; {LOG} FILE adds a line of JSON to a "
        "local file for every status line: counters, and seconds by phase."
    )
    words = _joined(words, config)
    flat = (tyro.conf.AvoidSubcommands,)  # the preset has chosen the model family; it is no sub-command of its own
    if not isinstance(config, Mapping):
        chosen = (*flat, tyro.conf.PositionalRequiredArgs) if positional else flat
        return tyro.cli(config, args=words, description=description, config=chosen)
    if default_preset is not None:
        description += f" A preset comes before all flags; without one the job runs '{default_preset}'."
    description += (
        f"\n\n{CONFIG} FILE in the place of a preset takes every setting of a stored run but --out, --resume and "
        "--resume-if-exists, of a run folder's config.json for example (a path or s3:// URL)."
    )
    words, path = _without(CONFIG, words, "that holds a stored run, such as the config.json of a run folder")
    if path is not None:
        from pipeline import store
        from pipeline.config import StorageConfig

        if words and not words[0].startswith("-"):
            _refuse(f"{CONFIG} stands in the place of a preset, and {words[0]!r} is given, too; choose one")
        with store.using(StorageConfig(endpoint_url=_value_of(ENDPOINT, words))):
            run = _stored_run(path, config)
        prog, description = f"{sys.argv[0]} {CONFIG} {path}", f"The settings of {path}.\n\n{description}"
        return tyro.cli(type(run), args=words, default=run, prog=prog, description=description, config=flat)
    if words and words[0] in config:
        preset, words = words[0], words[1:]
    elif words and not words[0].startswith("-"):
        _refuse(f"unknown preset {words[0]!r}; choose from {', '.join(config)}")
    elif default_preset is None or words[:1] in (["-h"], ["--help"]):
        return tyro.extras.overridable_config_cli(config, args=words, description=description)
    else:
        preset = default_preset
    about, run = config[preset]
    # Parsed as one flat command and not as tyro's sub-command: a typo is then explained by this preset's flags alone.
    prog = f"{sys.argv[0]} {preset}"
    return tyro.cli(type(run), args=words, default=run, prog=prog, description=f"{about}\n\n{description}", config=flat)


def _joined(words: Sequence[str], config: Any) -> list[str]:
    """Put the values of a repeated flag that takes several behind its first place: ``--set A --set B``."""
    kinds = [type(run) for _, run in config.values()] if isinstance(config, Mapping) else [config]
    several = {
        f"--{field.name.replace('_', '-')}"
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.default == () and isinstance(field.default, tuple)
    }
    current: list[str] = []
    groups, begun = [current], dict[str, list[str]]()
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in several:
            if flag not in begun:
                begun[flag] = [flag]
                groups.append(begun[flag])
            current = begun[flag]
            current += [value] if equals else []
        elif word.startswith("--"):
            current = [word]
            groups.append(current)
        else:
            current.append(word)
    return [word for group in groups for word in group]


def _without(flag: str, words: Sequence[str], what: str) -> tuple[list[str], str | None]:
    """The words without ``flag FILE``, and FILE; ``what`` it is, for whoever leaves it out."""
    rest, found, remaining = list[str](), list[str](), iter(words)
    for word in remaining:
        name, equals, path = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        path = path if equals else next(remaining, "")
        if not path or path.startswith("-"):
            _refuse(f"{flag} wants a FILE {what}")
        found.append(path)
    if len(found) > 1:
        _refuse(f"{flag} is given {len(found)} times; choose one")
    return rest, found[0] if found else None


def _value_of(flag: str, words: Sequence[str]) -> str:
    """What a command line gives for a flag; empty if nothing."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else "".join(words[i + 1 : i + 2])
    return ""


def _log_to(path: str | None) -> None:
    """Add status lines to a file, or to none.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no local file.
    """
    from pipeline import status, store

    if path is not None and store.is_url(path):
        raise ValueError(f"{LOG} {path}: object storage cannot append; give a local file")
    status.log_to("" if path is None else store.resolve(path, LOG))


def _stored_run(path: str, presets: Mapping[str, tuple[str, Any]]) -> Any:
    """The settings of a stored training run, to begin another in a folder of its own.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, holds no run, or one of another family than the presets or of another version.
    """
    from objdyn.families import FAMILIES, family_of
    from pipeline import store
    from pipeline.checkpoint import config_from_json

    path = store.resolve(path, CONFIG)
    stored = store.read_json(path)
    family, fields = stored.get("family"), stored.get("run")
    if not isinstance(family, str) or not isinstance(fields, dict):
        missing = "run" if isinstance(family, str) else "family"
        raise ValueError(f"{path} holds no training run (no field {missing!r}); give the config.json of a run folder")
    _, preset = next(iter(presets.values()))
    wanted = family_of(preset.model)
    if family != wanted:
        remedy = f"give it to jobs/train_{family}.py" if family in FAMILIES else f"this job trains {wanted}"
        raise ValueError(f"{path} is a run of {family}; {remedy}")
    try:
        # The model by its family and not by its fields, of which an older version stored fewer.
        model = config_from_json(type(preset.model), fields.get("model", {}))
        run = config_from_json(type(preset), {**fields, "model": model})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dataclasses.replace(run, out="", resume=False, resume_if_exists=False)


def command(job: str, run: Any, *, preset: str | None = None, default: Any = None) -> str:
    """Write the command line that ``parse`` turns into this run: the flags that differ from the preset or the defaults.

    Args:
        job: path of the job's file.
        run: the run's dataclass.
        preset: name of the preset that the job takes, with ``default``, the preset's run.
    """
    return shlex.join(["python", job, *([] if preset is None else [preset]), *_flags(run, default, "--")])


def _flags(run: Any, default: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(run):
        value, flag = getattr(run, field.name), prefix + field.name.replace("_", "-")
        if default is not None:
            base = getattr(default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            base = field.default_factory()
        else:
            base = field.default
        if value == base:
            continue
        if dataclasses.is_dataclass(value):
            yield from _flags(value, base if type(base) is type(value) else None, f"{flag}.")
        elif isinstance(value, bool):
            yield flag if value else f"{prefix}no-{field.name.replace('_', '-')}"
        else:
            yield from (flag, *map(str, value if isinstance(value, tuple) else (value,)))


def _refuse(message: str) -> NoReturn:
    """End with a usage error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _fail(error: BaseException, status: int, debug: bool, message: str) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _one_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None)  # Ray wraps a task's error in a page of traceback and keeps the original here
    if isinstance(cause, BaseException):
        error = cause
    if isinstance(error, OSError) and error.strerror and error.filename:
        error = ValueError(f"{error.strerror}: {error.filename}")
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST else f"{message[: LONGEST * 3 // 4]} ... {message[-LONGEST // 4 :]}"
