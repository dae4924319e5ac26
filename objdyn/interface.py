"""The one interface of every model family: four verbs on a plain ``nn.Module``.

    video --forward--> Loss                     what training minimises (through DDP, so always ``model(video)``)
    video --encode--> Latents                   a NamedTuple, every field (b, t, ...)
    Latents --rollout(horizon)--> Latents       the predicted future, exactly ``horizon`` frames
    Latents --decode--> Scene                   pixels, and on request masks and components

One family (``ssm``) has a fifth, ``interpolate(video, seen, **inputs) -> Latents``: all frames of a video of which only
those that the bool tensor ``seen`` (t,) names are looked at. ``Family.verbs`` says which verbs a family has.

Whatever else a caller wants (reconstruct, predict, segment) is a composition, written once in ``families.py``.
"""

from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor


class Loss(NamedTuple):
    """A training loss and its parts."""

    total: Float[Tensor, ""]
    """What ``backward()`` is called on; minimised."""
    terms: dict[str, Tensor]
    """Detached scalars to log, by name: ``recon``, ``kl``, ..."""


class Scene(NamedTuple):
    """What a decoder renders.

    ``masks`` and ``components`` are ``None`` unless ``decode(..., components=True)``. Where a family has an explicit
    background it is entry 0 of k, so that k is then one more than the number of objects.
    """

    video: Float[Tensor, "b t c h w"]
    """The composed frames, in [0, 1]."""
    masks: Float[Tensor, "b t k 1 h w"] | None = None
    """Soft responsibility of component k for a pixel; non-negative, sums to one over k."""
    components: Float[Tensor, "b t k c h w"] | None = None
    """Each component rendered alone, in [0, 1]."""


Latents = TypeVar("Latents", bound=tuple[Any, ...])


class VideoModel(Protocol[Latents]):
    """The four verbs. ``video`` is float32 (b, t, c, h, w) in [0, 1].

    ``inputs`` are the per-clip tensors that ``families.describe(config).inputs`` names (none for most families), by
    keyword.
    ``encode`` and ``rollout`` take ``generator: torch.Generator | None = None``: ``None`` asks for the reproducible
    answer (means), with a generator the latents are sampled from it. A generator must live on the model's device:
    ``torch.Generator(device)``.
    """

    def __call__(self, video: Float[Tensor, "b t c h w"], *args: Any, **inputs: Any) -> Loss: ...

    def forward(self, video: Float[Tensor, "b t c h w"], *args: Any, **inputs: Any) -> Loss: ...

    def encode(self, video: Float[Tensor, "b t c h w"], *args: Any, **inputs: Any) -> Latents: ...

    def rollout(self, latents: Latents, horizon: int, *, generator: torch.Generator | None = None) -> Latents: ...

    def decode(self, latents: Latents, components: bool = False) -> Scene: ...


def check_choices(config: object) -> None:
    """Refuse what a field's ``Literal`` does not list; a config's ``__post_init__`` calls it.

    Python itself takes any value there, and a model would fall through to whichever branch comes last.

    Raises:
        ValueError: a field has a value that is none of its choices; says which there are.
    """
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if any(kind is not NoneType and get_origin(kind) is not Literal for kind in kinds):
            continue
        choices = [choice for kind in kinds for choice in (get_args(kind) or (None,))]
        if (value := getattr(config, name)) not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
