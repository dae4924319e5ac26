"""The registry of model families, and the compositions of the four verbs. Read ``interface.py`` first.

Adding a family: its file under ``models/``, one line in ``FAMILIES``, one ``debug`` preset. The contract test then
covers it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from objdyn.interface import Scene, VideoModel
from objdyn.models import ddlp, dlp, ed_lstm, iodine, oddn, provide, ssm


class Family(NamedTuple):
    """What a caller may know of a family without knowing the family."""

    config: type
    """Frozen dataclass of scalars and tuples."""
    model: Callable[[Any], VideoModel[Any]]
    """Builds the model from its config; an ``nn.Module``."""
    inputs: Mapping[str, str]
    """Per-clip tensors that ``forward`` and ``encode`` need beside the video, by name; with each the bool field of the
    config that says whether it is needed, empty where it always is. ``describe`` leaves out those that are not."""
    verbs: tuple[str, ...]
    """The verbs that make sense; calling another one raises."""
    causal: bool
    """Whether a frame's latents are independent of later frames."""
    tracked: bool
    """Whether object k of a clip is the same object in all of its frames."""
    object_columns: tuple[str, ...]
    """Fields of the latents, (b, t, k, ...), that describe objects."""
    frame_columns: tuple[str, ...]
    """Fields of the latents, (b, t, ...), that describe whole frames."""
    warm_starts: Mapping[str, Callable[[Any, Any, Mapping[str, Tensor]], None]] = MappingProxyType({})
    """Other families whose weights training may start from, by name: a function of a new model, the other model's
    config and its state dict, which writes into the new model what the two have in common."""
    state_columns: tuple[str, ...] = ()
    """Fields of the latents, (b, t, k, ...), that are an object's recurrent state; tables have them on request."""


FAMILIES: dict[str, Family] = {
    "ddlp": Family(
        config=ddlp.DDLPConfig,
        model=ddlp.DDLP,
        inputs={},
        verbs=("forward", "encode", "rollout", "decode"),
        causal=True,
        tracked=True,
        object_columns=("position", "scale", "depth", "transparency", "features"),
        frame_columns=("background",),
    ),
    "dlp": Family(
        config=dlp.DLPConfig,
        model=dlp.DLP,
        inputs={},
        verbs=("forward", "encode", "decode"),
        causal=True,
        tracked=False,
        object_columns=("position", "scale", "depth", "transparency", "features"),
        frame_columns=("background",),
    ),
    "iodine": Family(
        config=iodine.IODINEConfig,
        model=iodine.IODINE,
        inputs={},
        verbs=("forward", "encode", "decode"),
        causal=True,
        tracked=False,
        object_columns=("mean", "log_var"),
        frame_columns=(),
    ),
    "provide": Family(
        config=provide.PROVIDEConfig,
        model=provide.PROVIDE,
        inputs={},
        verbs=("forward", "encode", "rollout", "decode"),
        causal=True,
        tracked=True,
        object_columns=("mean", "log_var"),
        frame_columns=(),
        warm_starts={"iodine": provide.start_from_iodine},
        state_columns=("hidden", "cell"),
    ),
    "oddn": Family(
        config=oddn.ODDNConfig,
        model=oddn.ODDN,
        inputs={},
        verbs=("forward", "encode", "rollout", "decode"),
        causal=True,  # but for the first frame's dynamics, those of the second, which no prediction looks at
        tracked=False,
        object_columns=("static", "static_log_var", "dynamics"),
        frame_columns=(),
        warm_starts={"iodine": oddn.start_from_iodine},
    ),
    "ssm": Family(
        config=ssm.SSMConfig,
        model=ssm.SSM,
        inputs={"num_objects": "known_count"},
        verbs=("forward", "encode", "rollout", "decode", "interpolate"),
        causal=True,
        tracked=True,
        object_columns=("present", "state", "state_cov", "mean", "log_var"),
        frame_columns=(),
    ),
    "ed_lstm": Family(
        config=ed_lstm.EDLSTMConfig,
        model=ed_lstm.EDLSTM,
        inputs={},
        verbs=("forward", "encode", "rollout", "decode"),
        causal=True,
        tracked=True,  # one entry, the whole frame
        object_columns=("hidden",),
        frame_columns=(),
        state_columns=("cell",),
    ),
}


def family_of(config: Any) -> str:
    """The name of the family that a config belongs to.

    Raises:
        ValueError: no family has such a config.
    """
    for name, family in FAMILIES.items():
        if type(config) is family.config:
            return name
    raise ValueError(f"{type(config).__name__} is the config of no family; known: {', '.join(FAMILIES)}")


def describe(config: Any) -> Family:
    """The family of a config, with the ``inputs`` that a model of this config needs, and whether it tracks.

    Raises:
        ValueError: no family has such a config.
    """
    family = FAMILIES[family_of(config)]
    needed = {name: field for name, field in family.inputs.items() if not field or getattr(config, field)}
    return family._replace(inputs=needed, tracked=family.tracked and getattr(config, "tracking", True))


def build(config: Any) -> Any:
    """The model of a config, with freshly initialised weights (drawn from torch's global state)."""
    return FAMILIES[family_of(config)].model(config)


def set_step(model: torch.nn.Module, step: int) -> None:
    """Tell a model with schedules how many optimiser steps are completed; others ignore it."""
    buffer = getattr(model, "step", None)
    if isinstance(buffer, Tensor):
        buffer.fill_(step)


def set_perceptual(model: torch.nn.Module, distance: Callable[[Tensor, Tensor], Tensor] | None) -> None:
    """Give a model that may train with a perceptual distance the one to use; others ignore it.

    ``distance(images, recon)`` takes (..., 3, h, w) in [0, 1] and gives (...): ``losses.vgg_distance`` with a trunk on
    the model's device. It does not become a part of the model: no parameter, nothing in the state dict.

    Raises:
        ValueError: ``distance`` is a module, which the model would take for a part of its own; wrap it in a function.
    """
    if isinstance(distance, torch.nn.Module):
        raise ValueError(f"the distance must be a function, not a module, got {type(distance).__name__}; wrap it")
    if hasattr(model, "perceptual"):
        model.perceptual = cast(Any, distance)


def reconstruct(model: VideoModel[Any], video: Float[Tensor, "b t c h w"], **inputs: Any) -> Scene:
    """Encode and decode every frame."""
    return model.decode(model.encode(video, **inputs))


def predict(
    model: VideoModel[Any],
    context: Float[Tensor, "b t c h w"],
    horizon: int,
    *,
    generator: torch.Generator | None = None,
    **inputs: Any,
) -> Scene:
    """Render the ``horizon`` frames that follow ``context``; a generator must live on the model's device."""
    latents = model.encode(context, generator=generator, **inputs)
    return model.decode(model.rollout(latents, horizon, generator=generator))
