"""What if an object were elsewhere, larger, gone, or looked otherwise? Edits of DDLP's particles, and their futures.

    particles of the context --select, apply--> edited ones --rollout--> another future --decode--> frames

An edit is the same change in all context frames (DDLP, section 5.3; the paper takes the 4 burn-in frames and moves of
0.2, and says that small ones only are to be trusted). Positions are (y, x) in [-1, 1], y down. Which particles an edit
changes is said by its selection:

    index:3  index:1,4     by number
    nearest:y,x            the visible particle nearest to a point in one frame
    cluster:y,x            that one and all that sit on the same object
    all                    every particle

Several particles often sit on one object, equal to 3 decimals, and all of them must change, or the object stays and a
copy goes: that is what ``cluster`` is for. A particle is *visible* where its transparency is ``VISIBLE`` or more. It
sits on the same object as another if in every context frame it is no further away than ``radius``. Whether it is
visible does not matter, because the prediction may show it.

Functions of tensors alone; nothing here reads a file or knows a model beyond its ``rollout``.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from objdyn.interface import VideoModel
from objdyn.models.dlp import Particles

VISIBLE = 0.1
"""Least transparency of a particle that can be seen."""
NEAR = 0.5
"""Distance in [-1, 1] units, a quarter of the frame's side, within which a point must have a visible particle."""
RADIUS = 0.1
"""Distance in [-1, 1] units within which particles may sit on one object, unless an edit says otherwise."""
LARGEST_MOVE = 0.2
"""How far a move may go without a warning; the paper's displacement."""
SCALES = (0.5, 2.0)
"""Factors on the size that an edit may have without a warning."""
LARGEST_DEPTH_CHANGE = 3.0
"""The depth's prior is a standard normal."""
COVERS = 20.0
"""How many times the weight of what is behind a particle in front has; it then makes up 95 % of the pixel."""
LARGEST_WEIGHT = 0.9975
"""Of a particle in front: sigmoid(-depth) at a depth of -6."""
SMALLEST_WEIGHT = 1e-4
"""Of a particle behind; below, the decoder's guard against division by zero would show."""
_SIDES = (1e-4, 1 - 1e-4)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class Edit:
    """A selection and what changes: one or more of the changes below, in all context frames."""

    select: str
    """Which particles: ``index:3``, ``nearest:y,x``, ``cluster:y,x`` or ``all``."""
    move: tuple[float, float] = (0.0, 0.0)
    """Added to the position, (y, x) in [-1, 1] units, y down."""
    scale: float = 1.0
    """Factor on both sides of the particle's patch."""
    fade: float = 1.0
    """Factor in [0, 1] on the transparency, kept at its last value in the predicted frames."""
    remove: bool = False
    """Not to be seen any more: as ``fade`` 0."""
    front: bool = False
    """Draw it in front of all others: nearer than they are, and they as far back as that needs."""
    behind: bool = False
    """Draw it behind all others."""
    swap: str = ""
    """A second selection, with which features are exchanged: each then looks like the other."""
    swap_scale: bool = False
    """Exchange the sizes, too."""
    frame: int = 0
    """The context frame in which ``nearest`` and ``cluster`` look, from 0; negative ones count from the last."""
    radius: float = RADIUS
    """Of ``cluster``, in [-1, 1] units."""
    name: str = "what-if"
    """What the rows of its future are called: letters, digits, - and _."""
    clip: str = ""
    """The only clip that it is for; empty for all."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"an edit's name has 1 to 100 letters, digits, - and _, and begins with one of the first two, got "
                f"{self.name!r}"
            )
        here = f"edit {self.name}"
        for selection in (self.select, *([self.swap] if self.swap else [])):
            try:
                _parse(selection)
            except ValueError as error:
                raise ValueError(f"{here}: {error}") from None
        numbers = (*self.move, self.scale, self.fade, self.radius)
        if len(self.move) != 2 or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{here}: move takes two finite numbers (y, x), and the others one; got {numbers}")
        if self.scale <= 0 or self.radius <= 0:
            raise ValueError(f"{here}: scale and radius must be positive, got {self.scale:g} and {self.radius:g}")
        if not 0 <= self.fade <= 1:
            raise ValueError(f"{here}: fade is a factor from 0 (gone) to 1 (as it was), got {self.fade:g}")
        if self.front and self.behind:
            raise ValueError(f"{here}: front and behind exclude each other; give one of them")
        if self.swap_scale and not self.swap:
            raise ValueError(f"{here}: swap_scale needs swap, the selection to exchange sizes with")
        if not (any(self.move) or self.scale != 1 or self.fade != 1 or self.swap or self._flags):
            raise ValueError(f"{here} changes nothing; give move, scale, fade, remove, front, behind or swap")

    @property
    def _flags(self) -> bool:
        return self.remove or self.front or self.behind

    @property
    def indices(self) -> tuple[int, ...]:
        """Particles that it names by number."""
        texts = [self.select, *([self.swap] if self.swap else [])]
        return tuple(k for text in texts for k in _parse(text).indices)

    def is_for(self, clip: str) -> bool:
        """Whether it is for the clip of this key."""
        return self.clip in ("", clip)

    def to_json(self) -> dict[str, Any]:
        """Its fields that are not the defaults, and its name; ``from_json`` reads them."""
        found: dict[str, Any] = {"name": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else value
        return found

    @classmethod
    def from_json(cls, fields: Any) -> "Edit":
        """An edit from a JSON object: ``{"name": "left", "select": "cluster:0.1,0.2", "move": [0, -0.2]}``.

        Raises:
            ValueError: a field is unknown, missing, or of another type; or as the edit itself refuses.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping):
            raise ValueError(f"an edit is a JSON object with the fields {', '.join(known)}, got {fields!r}")
        values: dict[str, Any] = {}
        for name, value in fields.items():
            if name not in known:
                raise ValueError(f"an edit has no field {name!r}; it has {', '.join(known)}")
            if name == "move":
                fits = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
                wanted = "two numbers [y, x]"
            elif isinstance(known[name].default, float):
                fits, wanted = _is_number(value), "a number"
            else:
                kind = str if name == "select" else type(known[name].default)
                fits = type(value) is kind
                wanted = {str: "a string", bool: "true or false", int: "a whole number"}[kind]
            if not fits:
                raise ValueError(f"the field {name} of an edit is {wanted}, got {json.dumps(value)}")
            values[name] = tuple(map(float, value)) if name == "move" else value
        if missing := [name for name in ("name", "select") if name not in values]:
            raise ValueError(f"an edit needs {' and '.join(missing)}, got only {', '.join(fields) or 'nothing'}")
        return cls(**values)


class Edited(NamedTuple):
    """Particles of the context after an edit."""

    latents: Particles
    held: Bool[Tensor, "b k"]
    """Particles whose transparency stays in the future what it is in the last context frame (faded, removed)."""


def parse_edits(text: str) -> tuple[Edit, ...]:
    """A JSON list of edits; a name may come again only for another clip.

    Raises:
        ValueError: it is no such list; says which entry is wrong, and why.
    """
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError("wanted a JSON list of edits with one or more entries, as "
                         '[{"name": "left", "select": "cluster:0.1,0.2", "move": [0, -0.2]}]')  # fmt: skip
    edits: list[Edit] = []
    clips: dict[str, set[str]] = {}
    for number, entry in enumerate(entries):
        try:
            edit = Edit.from_json(entry)
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
        others = clips.setdefault(edit.name, set())
        if edit.clip in others or "" in others or (others and not edit.clip):
            which = f"clip {edit.clip}" if edit.clip in others and edit.clip else "the same clips"
            raise ValueError(f"entry {number}: the name {edit.name!r} comes twice for {which}; give each its own")
        others.add(edit.clip)
        edits.append(edit)
    return tuple(edits)


def select(latents: Particles, selection: str, *, frame: int = 0, radius: float = RADIUS) -> Bool[Tensor, "b k"]:
    """Which particles a selection means, for each clip.

    Args:
        latents: of the context.
        selection: ``index:3``, ``nearest:y,x``, ``cluster:y,x`` or ``all``; see the top of the file for the rules.
        frame: where ``nearest`` and ``cluster`` look.
        radius: of ``cluster``.

    Raises:
        ValueError: it is no selection, or names a particle or a frame that does not exist, or a point that has no
            visible particle within ``NEAR``; says which particles there are.
    """
    chosen = _parse(selection)
    b, t, k = latents.depth.shape
    mask = torch.zeros(b, k, dtype=torch.bool, device=latents.depth.device)
    if selection == "all":
        return ~mask
    if not -t <= frame < t:
        raise ValueError(f"there is no context frame {frame}; there are {t}, 0 to {t - 1}")
    if chosen.point is None:
        if missing := [index for index in chosen.indices if index >= k]:
            raise ValueError(f"there is no particle {missing[0]}; {_there_are(latents, 0, frame)}")
        mask[:, list(chosen.indices)] = True
        return mask
    point = torch.tensor(chosen.point, dtype=latents.position.dtype, device=mask.device)
    distance = (latents.position[:, frame] - point).norm(dim=-1)
    distance = distance.masked_fill(~(latents.transparency[:, frame] >= VISIBLE), math.inf)
    nearest = distance.argmin(dim=-1)
    clips = torch.arange(b, device=mask.device)
    for clip in torch.nonzero(~(distance[clips, nearest] <= NEAR))[:, 0].tolist():
        there = _there_are(latents, clip, frame)
        raise ValueError(f"no visible particle lies within {NEAR:g} of {chosen.point}; {there}")
    if chosen.kind == "nearest":
        mask[clips, nearest] = True
        return mask
    offset = latents.position - latents.position[clips, :, nearest].unsqueeze(2)
    return (offset.norm(dim=-1) <= radius).all(dim=1)


def apply(latents: Particles, edits: Sequence[Edit]) -> Edited:
    """Change the particles in all frames given; ``latents`` stay as they are.

    Every selection is made in ``latents``, then the changes are made in the order of the edits, and of one edit in the
    order: swap, move, scale, front or behind, fade, remove. Of a swap, the i-th particle of one selection takes the
    look of the i-th of the other, which begins again where it is the shorter one.

    Raises:
        ValueError: a selection refuses (see ``select``), a swap is with the same particles, or front or behind has no
            others to be compared with.
    """
    chosen = [(edit, select(latents, edit.select, frame=edit.frame, radius=edit.radius)) for edit in edits]
    fields = {name: field.clone() for name, field in latents._asdict().items()}
    held = torch.zeros_like(latents.depth[:, 0], dtype=torch.bool)
    for edit, mask in chosen:
        each = mask.unsqueeze(1)
        if edit.swap:
            other = select(latents, edit.swap, frame=edit.frame, radius=edit.radius)
            if bool((mask & other).any()):
                raise ValueError(f"edit {edit.name} swaps particles with themselves: {edit.select} and {edit.swap} "
                                 "have some in common; name two objects")  # fmt: skip
            for name in ("features", "scale") if edit.swap_scale else ("features",):
                _swap(fields[name], mask, other)
        if any(edit.move):
            delta = fields["position"].new_tensor(edit.move)
            fields["position"] = torch.where(each.unsqueeze(-1), fields["position"] + delta, fields["position"])
        if edit.scale != 1:
            side = (fields["scale"].sigmoid() * edit.scale).clamp(*_SIDES).logit()
            fields["scale"] = torch.where(each.unsqueeze(-1), side, fields["scale"])
        if edit.front or edit.behind:
            if bool(mask.all(dim=1).any()):
                raise ValueError(f"edit {edit.name} puts all particles {'in front' if edit.front else 'behind'}, and "
                                 "there are no others; select some of them")  # fmt: skip
            fields["depth"] = _layer(fields["depth"], each, front=edit.front)
        if edit.remove or edit.fade != 1:
            factor = 0.0 if edit.remove else edit.fade
            fields["transparency"] = torch.where(each, fields["transparency"] * factor, fields["transparency"])
            held = held | mask
    return Edited(Particles(**fields), held)


def rollout(
    model: VideoModel[Particles], edited: Edited, horizon: int, *, generator: torch.Generator | None = None
) -> Particles:
    """The next ``horizon`` frames after an edited context.

    PINT predicts transparency from nothing but what it has learnt is usual, and would show a removed particle again in
    the next frame; so those that ``edited`` holds keep theirs, in the frames that come and in what later ones are
    predicted from. An unseen particle still counts among those that PINT looks at, and others may bounce off it.

    Raises:
        ValueError: ``horizon`` is smaller than 1.
    """
    if horizon < 1 or not bool(edited.held.any()):
        return model.rollout(edited.latents, horizon, generator=generator)
    history, kept = edited.latents, edited.latents.transparency[:, -1:]
    for _ in range(horizon):
        new = model.rollout(history, 1, generator=generator)
        new = new._replace(transparency=torch.where(edited.held.unsqueeze(1), kept, new.transparency))
        history = Particles(*(torch.cat(pair, dim=1) for pair in zip(history, new, strict=True)))
    return history.frames(-horizon, None)


def concerns(latents: Particles, edit: Edit) -> list[str]:
    """Why the future of an edit may not be worth much: what leaves the distribution that the model was trained on.

    Raises:
        ValueError: as ``apply``.
    """
    mask = select(latents, edit.select, frame=edit.frame, radius=edit.radius)
    after = apply(latents, [edit]).latents
    found: list[str] = []
    distance = math.hypot(*edit.move)
    if distance > LARGEST_MOVE + 1e-6:
        found.append(f"a move by {distance:.3g} is larger than {LARGEST_MOVE:g}")
    outside = (after.position.abs() > 1).any(-1) & mask.unsqueeze(1)
    if any(edit.move) and bool(outside.any()):
        frames = int(outside.any(2).sum(1).max())
        found.append(f"{_listed(outside.any(1).any(0))} outside the frame in {frames} of {outside.shape[1]} frames")
    low, high = SCALES
    if not low <= edit.scale <= high:
        found.append(f"a factor of {edit.scale:g} on the size is outside [{low:g}, {high:g}]")
    elif edit.scale != 1 and bool((after.scale.sigmoid()[mask.unsqueeze(1).expand(after.depth.shape)] > 0.99).any()):
        found.append("a patch becomes as large as the frame")
    change = float((after.depth - latents.depth).abs().max())
    if change > LARGEST_DEPTH_CHANGE:
        found.append(f"depths change by up to {change:.1f}, more than {LARGEST_DEPTH_CHANGE:g}")
    if not bool(((latents.transparency >= VISIBLE) & mask.unsqueeze(1)).any()):
        found.append("nothing that is selected can be seen")
    if left := _left_behind(latents, mask, edit):
        found.append(f"{left} on the same object and not selected; cluster:y,x takes what is within its radius")
    return found


def describe(latents: Particles, chosen: Bool[Tensor, "b k"], *, frame: int = 0) -> list[str]:
    """A line per chosen particle of the first clip: where it is in a frame, how large, and how visible."""
    return [
        f"particle {k} at ({latents.position[0, frame, k, 0]:.3f}, {latents.position[0, frame, k, 1]:.3f}), "
        f"{latents.scale[0, frame, k].sigmoid().mean():.2f} of the frame wide, "
        f"transparency {latents.transparency[0, frame, k]:.2f}"
        for k in torch.nonzero(chosen[0])[:, 0].tolist()
    ]


class _Selection(NamedTuple):
    kind: str
    indices: tuple[int, ...] = ()
    point: tuple[float, float] | None = None


def _parse(text: str) -> _Selection:
    kind, _, rest = text.partition(":")
    words = rest.split(",")
    try:
        if text == "all":
            return _Selection("all")
        if kind == "index" and all(re.fullmatch(r"\s*\d{1,9}\s*", word) for word in words):
            return _Selection(kind, indices=tuple(map(int, words)))
        if kind in ("nearest", "cluster"):
            y, x = map(float, words)
            if math.isfinite(y) and math.isfinite(x):
                return _Selection(kind, point=(y, x))
    except ValueError:
        pass
    raise ValueError(
        f"{text!r} selects nothing; write index:3 (or index:1,4), nearest:y,x, cluster:y,x with y and x in [-1, 1], "
        "or all"
    )


def _is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that a float can hold; infinite ones are told apart later."""
    if type(value) is int:
        return abs(value) <= sys.float_info.max
    return type(value) is float


def _there_are(latents: Particles, clip: int, frame: int) -> str:
    """The particles that can be named, and where the visible ones are."""
    seen = torch.nonzero(latents.transparency[clip, frame] >= VISIBLE)[:, 0].tolist()
    places = ", ".join("{} at ({:.2f}, {:.2f})".format(k, *latents.position[clip, frame, k].tolist()) for k in seen)
    count = latents.depth.shape[2]
    return f"there are {count} (0 to {count - 1}), of which are visible in frame {frame}: {places or 'none'}"


def _listed(mask: Bool[Tensor, " k"]) -> str:
    numbers = torch.nonzero(mask)[:, 0].tolist()
    return f"particle{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _left_behind(latents: Particles, mask: Bool[Tensor, "b k"], edit: Edit) -> str:
    """Visible particles that are not selected although they sit where a selected one does; in the first clip."""
    offset = latents.position[0, :, :, None] - latents.position[0, :, None]
    close = (offset.norm(dim=-1) <= edit.radius).all(dim=0)  # (k, k), in every frame
    visible = (latents.transparency[0] >= VISIBLE).any(dim=0)
    left = (close & mask[0]).any(dim=1) & ~mask[0] & visible
    if not bool(left.any()):
        return ""
    return f"{_listed(left)} {'sit' if int(left.sum()) > 1 else 'sits'}"


def _swap(field: Float[Tensor, "b t k d"], one: Bool[Tensor, "b k"], other: Bool[Tensor, "b k"]) -> None:
    """Exchange the values of two sets of particles, in place."""
    before = field.clone()
    for clip in range(len(field)):
        a, b = (torch.nonzero(mask[clip])[:, 0] for mask in (one, other))
        for to, source in ((a, b), (b, a)):
            turns = torch.arange(len(to), device=to.device) % len(source)
            field[clip][:, to] = before[clip][:, source[turns]]


def _layer(depth: Float[Tensor, "b t k"], chosen: Bool[Tensor, "b 1 k"], *, front: bool) -> Float[Tensor, "b t k"]:
    """Depths with the chosen particles in front of, or behind, all others in each frame.

    The decoder blends by weights sigmoid(-depth) (appendix D.4), which cannot exceed 1: where the others are near
    already, they must go back. A common factor on the weights of all others leaves the blend among them as it is, and
    so does one on those of the chosen ones.
    """
    weight = torch.sigmoid(-depth)
    own = weight.masked_fill(~chosen, 0).amax(-1, keepdim=True)
    if front:
        others = weight.masked_fill(chosen, 0).amax(-1, keepdim=True)
        wanted = torch.maximum(own, COVERS * others).clamp(max=LARGEST_WEIGHT)
        retreat = (wanted / (COVERS * others)).clamp(max=1)
    else:
        others = weight.masked_fill(chosen, 1).amin(-1, keepdim=True)
        wanted = torch.minimum(own, (others / COVERS).clamp(min=SMALLEST_WEIGHT))
        retreat = torch.ones_like(others)
    factor = torch.where(chosen, wanted / own, retreat)
    return torch.where(factor == 1, depth, -(weight * factor).logit())
