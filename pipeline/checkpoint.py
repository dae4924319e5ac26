"""Checkpoints of a run folder: safetensors and JSON, published whole, verified when read.

    RUN/checkpoints/step-00000100/model.safetensors, optimizer.safetensors, state.json, COMPLETE
    RUN/last.json

``COMPLETE`` holds bytes and SHA-256 of the other three and is written after them; ``last.json`` is written after it and
alone says which checkpoint counts. So a run that is killed at any moment goes on from the checkpoint before.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from objdyn.families import FAMILIES, build
from pipeline import store
from pipeline.config import with_overrides

SCHEMA = 1
"""Version of ``state.json``."""

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-\d{8,}")
_CODE: dict[str, tuple[str, ...]] = {
    "objdyn": ("clips.py", "distributions.py", "families.py", "interface.py", "kalman.py", "losses.py"),
    "objdyn/layers": (),
    "objdyn/metrics": ("segmentation.py",),
    "objdyn/models": (),
    "objdyn/simulators": (),
    "pipeline": ("checkpoint.py", "config.py", "loop.py", "perceptual.py", "reader.py"),
}
"""What a training step is made of, by folder; no names are all of it."""


class Saved(NamedTuple):
    """A checkpoint as read, for ``restore``."""

    step: int
    """Completed optimiser steps."""
    path: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Tensors of the optimiser's state by ``index/name``; the settings of its groups are in ``state``."""
    state: dict[str, Any]
    """What ``save_checkpoint`` was given, and ``schema``, ``step``, ``code``, ``optimizer``."""


class Weights(NamedTuple):
    """A checkpoint's weights as read, without a model."""

    tensors: dict[str, Tensor]
    family: str
    config: Any
    """Of the model when it was saved, which a curriculum changes during a run."""
    model_id: str
    """SHA-256 of ``model.safetensors``."""
    path: str
    """The checkpoint's folder."""
    state: dict[str, Any]


class Loaded(NamedTuple):
    """A model rebuilt from a checkpoint alone."""

    model: Any
    """In eval mode, on the device asked for."""
    family: str
    config: Any
    step: int
    model_id: str
    """SHA-256 of ``model.safetensors``."""
    run: dict[str, Any]
    """The run that trained it, as JSON; its model settings are those before any stage of a curriculum."""
    code: dict[str, Any]
    """``code_revision`` of the training."""
    dataset_id: str | None
    """Of the data it was trained on."""
    stage: int = 1
    """Stage of its curriculum in which it was saved, from 1."""


def save_checkpoint(
    run_dir: str,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep_last: int,
    best: bool = False,
    passing: bool = False,
    moved: Callable[[str], None] = lambda what: None,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Save a training state as the run's last checkpoint; return the checkpoint's folder.

    ``state`` holds ``family``, the config's fields as ``model`` (or else as ``run["model"]``), and whatever the loop
    wants back. The newest ``keep_last`` checkpoints stay, and the best one: this one if ``best``, else the best so far.
    A ``passing`` one, of a run that must stop between two others, takes no place among them and goes with the next one.
    ``moved`` is called with the name of each file that is written.
    ``check`` raises when the folder must not be changed any more; it is called before each change.

    Raises:
        ValueError: ``state`` or the optimiser's state has no exact form on disk.
        FloatingPointError: a weight or the optimiser's state is not finite; nothing was written.
    """
    import safetensors.torch

    if taken := {"schema", "step", "code", "optimizer"} & set(state):
        raise ValueError(f"state must not hold {', '.join(sorted(taken))}: save_checkpoint writes it")
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    tensors, groups = _optimizer_state(optimizer)
    content = {**state, "schema": SCHEMA, "step": step, "code": code_revision(), "optimizer": {"groups": groups}}
    weights, tensors = _on_disk(bare.state_dict()), _on_disk(tensors)
    _require_finite(step, bare, weights, optimizer, tensors)
    files = {
        _MODEL: safetensors.torch.save(weights),
        _OPTIMIZER: safetensors.torch.save(tensors),
        _STATE: store.json_bytes(content),
    }
    complete = store.sealed_json(
        {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    )
    name = f"checkpoints/step-{step:08d}"
    path = store.join(run_dir, name)
    if not (store.exists(store.join(path, "COMPLETE")) and store.read_bytes(store.join(path, "COMPLETE")) == complete):
        check()
        store.remove(store.join(path, "COMPLETE"))  # left by an attempt that got no further, or by another run
        for file, data in {**files, "COMPLETE": complete}.items():
            check()
            store.publish(store.join(path, file), data)
            moved(f"{name}/{file} was written")
    before = _read_last(run_dir) or {}
    last = {"step": step, "checkpoint": name, "best": name if best else before.get("best")}
    passed = [old for old in before.get("passing", ()) if old != name] + ([name] if passing else [])
    check()
    store.publish_json(store.join(run_dir, "last.json"), {**last, "passing": passed} if passed else last)
    check()
    retire(run_dir, keep_last=keep_last)
    if passed not in ([], [name]):  # they are gone
        check()
        store.publish_json(store.join(run_dir, "last.json"), {**last, "passing": [name]} if passing else last)
    return path


def retire(run_dir: str, *, keep_last: int) -> None:
    """Remove checkpoints older than the newest ``keep_last``, except the best, and remains of killed attempts.

    Among these are whole ones of later steps: their attempt was killed before they counted, and nothing says whether
    the replay will write the same ones.
    """
    last = _read_last(run_dir)
    if last is None:
        return
    folder = store.join(run_dir, "checkpoints")
    found = [name for name in store.list_names(folder) if _NAME.fullmatch(name)]
    regular = [
        name
        for name in found
        if _step(name) <= _step(last["checkpoint"])
        and f"checkpoints/{name}" not in last.get("passing", ())
        and store.exists(store.join(folder, name, "COMPLETE"))
    ]
    kept = {f"checkpoints/{name}" for name in sorted(regular, key=_step)[-keep_last:]}
    for name in found:
        if f"checkpoints/{name}" not in kept | {last["checkpoint"], last["best"]}:
            store.remove(store.join(folder, name, "COMPLETE"))  # first, so that no half of it looks whole
            store.remove_tree(store.join(folder, name))


def load_last(run_dir: str) -> Saved | None:
    """Read the checkpoint that ``last.json`` names; ``None`` if the run has none yet.

    Raises:
        ValueError: it is damaged or incomplete; the message names the file.
    """
    last = _read_last(run_dir)
    if last is None:
        return None
    path = store.join(run_dir, last["checkpoint"])
    files = _read_files(path, (_MODEL, _OPTIMIZER, _STATE))
    state = _parse_state(path, files[_STATE])
    return Saved(
        step=state["step"],
        path=path,
        model=_parse_tensors(path, _MODEL, files[_MODEL]),
        optimizer=_parse_tensors(path, _OPTIMIZER, files[_OPTIMIZER]),
        state=state,
    )


def last_step(run_dir: str) -> int | None:
    """Return the step of the checkpoint that ``last.json`` names, without reading it; ``None`` if there is none."""
    last = _read_last(run_dir)
    return None if last is None else _step(last["checkpoint"])


def restore(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint back into a model and its optimiser, bit for bit.

    Raises:
        ValueError: they are not built as the checkpoint's were.
    """
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    _load_weights(bare, saved.model, saved.path)
    current = optimizer.state_dict()
    groups = saved.state["optimizer"]["groups"]
    counts = [len(group["params"]) for group in current["param_groups"]]
    if [group["params"] for group in groups] != counts:
        raise ValueError(f"{saved.path} holds an optimiser of other parameters than this run's {counts}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.optimizer.items():
        index, _, field = name.partition("/")
        if tensor.ndim and tensor.shape != parameters[int(index)].shape:
            raise ValueError(f"{saved.path}: {field} of parameter {index} has shape {tuple(tensor.shape)}")
        state.setdefault(int(index), {})[field] = _laid_out(tensor, parameters[int(index)])
    for group, wanted in zip(current["param_groups"], groups, strict=True):
        for name, value in wanted.items():
            if name != "params":
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    optimizer.load_state_dict({"state": dict(sorted(state.items())), "param_groups": current["param_groups"]})


def carry_over(
    model: nn.Module, optimizer: torch.optim.Optimizer, new_model: nn.Module, new_optimizer: torch.optim.Optimizer
) -> None:
    """Give a model of other settings the weights of the one before it, and its optimiser the averages.

    The settings of the new optimiser's groups stay. Both must have the same parameters.

    Raises:
        ValueError: they have not.
    """
    _load_weights(new_model, model.state_dict(), "the stage before")
    whole = optimizer.state_dict()
    parameters = [parameter for group in new_optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: _laid_out(tensor, parameters[index]) for name, tensor in fields.items()}
        for index, fields in whole["state"].items()
    }
    new_optimizer.load_state_dict({"state": state, "param_groups": new_optimizer.state_dict()["param_groups"]})


def load_weights(path: str, *, which: Literal["last", "best"] = "last") -> Weights:
    """Read the weights of a run folder or of one checkpoint's folder, with the config that they are of.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    folder = _checkpoint_folder(path, which)
    files = _read_files(folder, (_MODEL, _STATE))
    state = _parse_state(folder, files[_STATE])
    family = state.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{folder} is of family {family!r}; this version knows {', '.join(FAMILIES)}")
    fields = state["model"] if "model" in state else state.get("run", {}).get("model")
    return Weights(
        tensors=_parse_tensors(folder, _MODEL, files[_MODEL]),
        family=family,
        config=config_from_json(FAMILIES[family].config, fields),
        model_id=hashlib.sha256(files[_MODEL]).hexdigest(),
        path=folder,
        state=state,
    )


def start_from(weights: Weights, model: nn.Module, family: str) -> None:
    """Put the weights of another run into a new model, of the same family or of one that its family can start from.

    Raises:
        ValueError: they do not fit, are not finite, or are of a family that this one cannot start from.
    """
    if names := sorted(name for name, tensor in weights.tensors.items() if not torch.isfinite(tensor).all()):
        raise ValueError(f"weights of {weights.path} are NaN or infinite, the first {names[0]}; start from another run")
    if weights.family == family:
        _load_weights(model, weights.tensors, weights.path)
        return
    known = FAMILIES[family].warm_starts
    if weights.family not in known:
        raise ValueError(
            f"{weights.path} is of family {weights.family}; {family} can start from weights of {family}"
            + "".join(f" or {name}" for name in known)
        )
    known[weights.family](model, weights.config, weights.tensors)


def load_model(
    path: str,
    *,
    device: torch.device | str = "cpu",
    which: Literal["last", "best"] = "last",
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Rebuild a model from a run folder or from one checkpoint's folder.

    ``overrides`` replaces fields of the model's config, ``{"num_particles": 12}``; ``model.`` before a name is allowed.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the overrides do not fit its weights.
    """
    weights = load_weights(path, which=which)
    replaced = {name.removeprefix("model."): value for name, value in (overrides or {}).items()}
    config = with_overrides(weights.config, replaced)
    if problem := _misfit(weights, config, replaced):
        raise ValueError(problem)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and overwritten; the caller's draws stay
        model = build(config)
    _load_weights(model, weights.tensors, weights.path)
    return Loaded(
        model=model.to(device).eval(),
        family=weights.family,
        config=config,
        step=weights.state["step"],
        model_id=weights.model_id,
        run=weights.state.get("run", {}),
        code=weights.state.get("code", {}),
        dataset_id=weights.state.get("dataset_id"),
        stage=weights.state.get("stage", {}).get("number", 1),
    )


def _misfit(weights: Weights, config: Any, replaced: Mapping[str, Any]) -> str:
    """Say which replaced setting gives which parameter another shape than the stored one; empty where all fit."""
    if not (found := _reshaped(weights, config)):
        return ""
    blamed = []
    for name, value in replaced.items():
        with contextlib.suppress(ValueError):  # not every setting can stand alone
            if alone := _reshaped(weights, with_overrides(weights.config, {name: value})):
                blamed.append(f"model.{name}={value} makes {alone}")
    why = "; ".join(blamed) or found
    name = type(config).__name__.removesuffix("Config")
    return f"the weights of {weights.path} do not fit this config of {name}: {why}"


def _reshaped(weights: Weights, config: Any) -> str:
    """The first parameter whose shape is not the stored one."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # no memory, whatever sizes the settings claim
        own = build(config).state_dict()
    stored = weights.tensors
    for name in [*own, *stored]:
        wanted, got = (tuple(tensors[name].shape) if name in tensors else "none" for tensors in (own, stored))
        if wanted != got:
            return f"{name} {wanted}, stored is {got}"
    return ""


def config_to_json(config: Any) -> dict[str, Any]:
    """Turn a config (frozen dataclass, possibly nested) into what JSON can hold; tuples become lists.

    How a run reaches object storage is left out: it belongs to a machine, and changes nothing.
    """
    fields = dataclasses.asdict(config)
    fields.pop("storage", None)
    return json.loads(store.json_bytes(fields))


def config_from_json(cls: type, fields: Mapping[str, Any]) -> Any:
    """Rebuild a config of class ``cls``; lists become tuples again, by the fields' types.

    A field that is missing takes its default, so that a config of an older version can be read.

    Raises:
        ValueError: a field is unknown, or missing without a default, or refused by the config.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, Mapping) or set(fields) - known:
        names = ", ".join(sorted(set(fields) - known)) if isinstance(fields, Mapping) else repr(fields)
        raise ValueError(f"{cls.__name__} has no field {names}; it was written by another version or was edited")
    hints = typing.get_type_hints(cls)
    try:
        return cls(**{name: _typed(hints[name], value) for name, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be built from what is stored: {error}") from error


@functools.cache
def code_digests(root: str | None = None) -> dict[str, str]:
    """A digest of each source file that may change what a training step does or measures, also outside a checkout.

    ``root`` is the folder of ``objdyn/`` and ``pipeline/``; by default that of this file.
    """
    root = root or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = {}
    for folder, wanted in _CODE.items():
        for name in sorted(os.listdir(os.path.join(root, folder))):
            if name.endswith(".py") and (not wanted or name in wanted):
                data = store.read_bytes(os.path.join(root, folder, name))
                found[f"{folder}/{name}"] = hashlib.sha256(data).hexdigest()[:16]
    return found


@functools.cache
def code_revision() -> dict[str, Any]:
    """The commit of the code that runs, and whether files differ from it; nulls outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", here, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", os.path.basename(__file__))  # not a repository that only contains the venv
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}


def _typed(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return config_from_json(hint, value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_typed(inner[0], item) for item in value)
        if len(inner) != len(value):
            raise ValueError(f"{len(inner)} values are wanted, got {value}")
        return tuple(_typed(kind, item) for kind, item in zip(inner, value, strict=True))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _member(typing.get_args(hint), value)
    return float(value) if hint is float and type(value) is int else value


def _member(hints: tuple[Any, ...], value: Any) -> Any:
    """Build a value of a union: a stored object becomes the one dataclass that knows its fields and has fewest others,
    which an older version did not store."""
    if isinstance(value, Mapping):
        others: dict[int, list[Any]] = {}
        for hint in hints:
            if dataclasses.is_dataclass(hint):
                known = {field.name for field in dataclasses.fields(hint)}
                # of a few fields alone nothing can be said
                if known >= set(value) and len(known) <= 2 * len(value):
                    others.setdefault(len(known) - len(value), []).append(hint)
        fitting = others[min(others)] if others else []
        if len(fitting) != 1:
            raise ValueError(f"fields {', '.join(value)} fit {len(fitting)} of the known configs")
        return _typed(fitting[0], value)
    if isinstance(value, list):
        return _typed(next((hint for hint in hints if typing.get_origin(hint) is tuple), Any), value)
    return _typed(float, value) if float in hints and int not in hints else value


def _on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies, because safetensors refuses tensors that share memory.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    whole = optimizer.state_dict()
    tensors = {}
    for index, fields in whole["state"].items():
        for name, value in fields.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{type(optimizer).__name__} keeps {name} as {type(value).__name__}, not as a tensor")
            tensors[f"{index}/{name}"] = value
    groups = [{**group, "params": len(group["params"])} for group in whole["param_groups"]]
    return tensors, groups


def _require_finite(
    step: int,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> None:
    for name, tensor in (*weights.items(), *tensors.items()):
        if torch.isfinite(tensor).all():
            continue
        if name not in weights:
            index, _, field = name.partition("/")
            parameter = [parameter for group in optimizer.param_groups for parameter in group["params"]][int(index)]
            name = f"{field} (optimiser) of {next(n for n, p in model.named_parameters() if p is parameter)}"
        bad = int((~torch.isfinite(tensor)).sum())
        raise FloatingPointError(
            f"at step {step} {bad} of {tensor.numel()} values of {name} are NaN or infinite; no checkpoint was "
            "written, the one before stays the last; start again with a lower optim.lr or with optim.clip_norm"
        )


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """State of the optimiser as its parameter lies, which may be channels-last: fused Adam walks both in that order."""
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor) if tensor.ndim else tensor


def _load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(
            f"the weights of {path} do not fit this config of {type(model).__name__}: {reasons}"
        ) from error


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _read_last(run_dir: str) -> dict[str, Any] | None:
    path = store.join(run_dir, "last.json")
    try:
        last = store.read_json(path)
    except FileNotFoundError:
        return None
    try:
        for name in ("checkpoint", "best"):
            folder, _, step = str(last[name]).partition("/")
            if not (folder == "checkpoints" and _NAME.fullmatch(step)) and (name, last[name]) != ("best", None):
                raise ValueError(f"{name} is {last[name]!r}")
        return last
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was edited ({error!r}); restore it") from error


def _checkpoint_folder(path: str, which: Literal["last", "best"]) -> str:
    if store.exists(store.join(path, "COMPLETE")):
        return path
    last = _read_last(path)
    if last is None:
        raise ValueError(
            f"{path} is neither a run folder (no last.json) nor a complete checkpoint (no COMPLETE); "
            "give the --out of a training run, or one of its checkpoints/step-*"
        )
    name = last["checkpoint"] if which == "last" else last["best"]
    if name is None:
        raise ValueError(f"{path} has no best checkpoint, because no held-out evaluation has run; use the last one")
    return store.join(path, name)


def _read_files(path: str, names: tuple[str, ...]) -> dict[str, bytes]:
    remedy = "restore it from a copy; other jobs than training take an older checkpoint's own folder, too"
    try:
        complete = store.read_json(store.join(path, "COMPLETE"))
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} is not complete (no COMPLETE); {remedy}") from None
    files = {}
    for name in names:
        file = store.join(path, name)
        try:
            entry = complete[name]
            size, sha256 = entry["bytes"], entry["sha256"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{store.join(path, 'COMPLETE')} does not say what {name} is; {remedy}") from error
        try:
            files[name] = store.read_bytes(file)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing; {remedy}") from None
        if len(files[name]) != size or hashlib.sha256(files[name]).hexdigest() != sha256:
            raise ValueError(f"{file} is damaged: size or SHA-256 differ from COMPLETE; {remedy}")
    return files


def _parse_state(path: str, data: bytes) -> dict[str, Any]:
    try:
        state = store.loads(data)
        if state["schema"] != SCHEMA or not isinstance(state["step"], int):
            raise ValueError(f"schema {state['schema']}, this version reads {SCHEMA}")
        name = path.rpartition("/")[2]
        if _NAME.fullmatch(name) and _step(name) != state["step"]:
            raise ValueError(f"it is of step {state['step']}, the folder was renamed")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{store.join(path, _STATE)} cannot be read: {error!r}") from error


def _parse_tensors(path: str, name: str, data: bytes) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return dict(sorted(safetensors.torch.load(data).items()))  # it comes in a random order
    except safetensors.SafetensorError as error:
        raise ValueError(f"{store.join(path, name)} is not a safetensors file: {error}") from error
