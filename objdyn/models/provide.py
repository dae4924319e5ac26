"""PROVIDE: IODINE over time, spatio-temporal iterative inference (Zablotskaia et al. 2020, arXiv 2006.14727).

A two-dimensional LSTM carries what was found in frame t - 1 into every refinement of frame t, the
prior of the slots and the decoder depend on it, and so frame 1 takes R - 1 refinements but later frames take fewer.

                 frame 1        frame 2       ...      frame t
    refinements  R - 1          R - 2                  max(R - t, 1)      light cells of the paper's figure 2
    then         one final decode of each frame                           dark cells

The posterior starts anew in every frame from the same learned vector and, in all frames of a clip, from the same random
draw; identity over time comes from that draw and from the temporal state.

Reading order: PROVIDEConfig, PROVIDELatents, PROVIDE, then the modules that IODINE does not have. ``iodine.py`` has the
rest. Conventions on which paper and released code differ are fields: the defaults are the paper's, the presets
``*-released`` take the code's. Two things of the code are not here:

- its schedule of beta on colour data;
- its gradient in the first cell of a frame. The code draws z once and reuses that draw, so there the gradient with
  respect to the posterior holds only what the KL gives. Here z is the posterior's sample in every cell, so that the
  refinement always sees the full gradient.

The later submission compares a second grid in its table 5, whose formula is not in the text that we have; it is not
here. The entropy term is minimised, as the paper's equation 7 and the code do; its text says the opposite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.interface import Loss, Scene
from objdyn.layers import mixture
from objdyn.losses import zero_gradient
from objdyn.models.iodine import (
    LOG_VAR_RANGE,
    IODINEConfig,
    Posterior,
    Refiner,
    Seen,
    Sight,
    State,
    cell_weight,
    decode_slots,
    draw,
    flat_frames,
    later_draw,
    terms_of,
    train_draw,
)

WARM_MIX_BIAS = -1.0
"""Of its gate that mixes temporal and refinement cell: mostly the refinement's, as in IODINE."""


@dataclass(frozen=True)
class PROVIDEConfig(IODINEConfig):
    """Settings of a PROVIDE model: those of IODINE, with other weights, and those of time."""

    num_refinements: int = 6
    """R of the grid max(R - t, 1): frame t is refined so often and then decoded once more."""
    likelihood_weight: float = 100.0
    """beta"""
    kl_weight: float = 10.0
    """psi"""
    grid: Literal["triangular", "full"] = "triangular"
    """Refinements of later frames: max(R - t, 1), or R - 1 in every frame (the ablation's base)."""
    conditional_prior: bool = True
    """Prior of the slots from the temporal state; otherwise N(0, I) (ablation)."""
    prior_head: Literal["linear", "softplus_logvar"] = "linear"
    """The prior network's second output: log sigma (paper), or a softplus taken as log sigma^2, so that the standard
    deviation is at least 1 (released code)."""
    conditional_decoder: Literal["mlp", "residual", "none"] = "mlp"
    """The decoder sees MLP(z, h) (paper), z + MLP(z, h) that begins as z (``DecoderInput``), or z alone (ablation)."""
    share_first_draw: bool = True
    """One random draw per clip starts every frame (released code); otherwise each frame draws its own, as the paper
    writes it, and nothing keeps slots in order but the temporal state."""
    refine_final_cell: bool = False
    """From frame 2 on, let the final cell advance the temporal state by one more refinement (released code)."""
    prediction: Literal["paper", "reference"] = "paper"
    """A predicted frame: the whole grid on its own reconstruction without gradients (paper); or one decode of the first
    draw is the frame, and one refinement on it gives the next state (released code)."""

    inference: Literal["per_frame"] = "per_frame"
    """No choice here: SEQ-IODINE is a mode of iodine."""
    sequential_clamp: None = None
    """No choice here: a setting of SEQ-IODINE."""

    def __post_init__(self) -> None:
        if self.inference != "per_frame" or self.sequential_clamp is not None:
            raise ValueError("inference and sequential_clamp are settings of SEQ-IODINE; provide has no such mode")
        super().__post_init__()


class PROVIDELatents(NamedTuple):
    """Slots of every frame with the state that decoding them and going on needs."""

    slots: Float[Tensor, "b t k d"]
    """What is decoded: the posterior's mean, or a sample with a generator."""
    mean: Float[Tensor, "b t k d"]
    log_var: Float[Tensor, "b t k d"]
    hidden: Float[Tensor, "b t k h"]
    """Temporal state after the frame."""
    cell: Float[Tensor, "b t k h"]
    decoder_state: Float[Tensor, "b t k h"]
    """Temporal state before the frame, which its decoder saw."""
    first_noise: Float[Tensor, "b t k d"]
    """The random draw that started the frame."""


class PROVIDE(nn.Module):
    """Spatio-temporal iterative inference of the objects of a clip.

    Args:
        config: settings.
        extra_features: see ``IODINE``.
    """

    def __init__(self, config: PROVIDEConfig, extra_features: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        vector = None
        if config.conditional_decoder != "none":
            vector = DecoderInput(config.slot_dim, config.refine_dim, residual=config.conditional_decoder == "residual")
        self.refiner = Refiner(config, extra_features, vector)
        self.lstm = GridLSTMCell(self.refiner.input_dim, config.refine_dim)
        self.prior = Prior(config.refine_dim, config.slot_dim, config.prior_head) if config.conditional_prior else None

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        """The weighted sum of the losses of all cells, summed over frames, a mean over clips (equations 3 and 7)."""
        frames = flat_frames(video, self.config.image_size).unflatten(0, video.shape[:2])
        shape = (video.shape[0], self.config.num_slots, self.config.slot_dim)
        first = train_draw(shape, video.device, self.training)
        past = self.refiner.rest(first)
        total = video.new_zeros(())
        finals: list[Sight] = []
        for t, frame in enumerate(frames.unbind(1)):
            if t and not self.config.share_first_draw:
                first = train_draw(shape, video.device, self.training, t)
            loss, final, past = self._fit(self.refiner.see(frame), past, first, t)
            total = total + loss
            finals.append(final)
        if video.shape[1] == 1 and self.prior is not None:
            total = total + zero_gradient(self.prior)
        return Loss(total, terms_of(frames.transpose(0, 1).flatten(0, 1), finals))

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> PROVIDELatents:
        """Slots of every frame, each from that frame and those before it."""
        frames = flat_frames(video, self.config.image_size).unflatten(0, video.shape[:2])
        shape = (video.shape[0], self.config.num_slots, self.config.slot_dim)
        first = draw(shape, video.device, generator)
        past = self.refiner.rest(first)
        found = []
        for t, frame in enumerate(frames.unbind(1)):
            if t and not self.config.share_first_draw:
                first = draw(shape, video.device, generator, t)
            latents, past = self._infer(self.refiner.see(frame), past, first, t, generator)
            found.append(latents)
        return PROVIDELatents(*(torch.stack(field, dim=1) for field in zip(*found, strict=True)))

    def rollout(
        self, latents: PROVIDELatents, horizon: int, *, generator: torch.Generator | None = None
    ) -> PROVIDELatents:
        """Go on without frames: each is replaced by its own reconstruction, and no gradient is given (section 3.2.3).

        ``latents`` are of all frames seen: their number says where on the grid the next one is.

        Raises:
            ValueError: ``horizon`` is less than 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        past = State(latents.hidden[:, -1], latents.cell[:, -1])
        first = latents.first_noise[:, -1]
        found = []
        for t in range(latents.mean.shape[1], latents.mean.shape[1] + horizon):
            if not self.config.share_first_draw:
                first = draw((first.shape[0], first.shape[1], first.shape[2]), first.device, generator, t)
            if self.config.prediction == "reference":
                future, past = self._imagine_once(past, first)
            else:
                future, past = self._infer(None, past, first, t, generator)
            found.append(future)
        return PROVIDELatents(*(torch.stack(field, dim=1) for field in zip(*found, strict=True)))

    def decode(self, latents: PROVIDELatents, components: bool = False) -> Scene:
        """Frames, and on request the masks and colours of every slot."""
        context = None if self.config.conditional_decoder == "none" else latents.decoder_state
        return decode_slots(self.refiner, latents.slots, context, components)

    def _fit(self, scene: Seen, past: State, first: Tensor, t: int) -> tuple[Tensor, Sight, State]:
        """One column of the grid in training: its loss, the final cell and the new temporal state."""
        posterior, state, noise = self.refiner.start(first), self.refiner.rest(first), first
        prior, context, light = self._prior(past), self._context(past), light_cells(self.config, t)
        total = first.new_zeros(())
        for index in range(light):
            sight = self.refiner.look(scene, posterior, noise, prior=prior, context=context)
            total = total + cell_weight(self.config, index, light + 1) * sight.loss.mean()
            posterior, state = self._refine(scene, sight, posterior, noise, prior, past, state)
            noise = torch.randn_like(first) if self.training else torch.zeros_like(first)
        more = self.config.refine_final_cell and t > 0
        final = self.refiner.look(scene, posterior, noise, prior=prior, context=context, final=not more)
        total = total + cell_weight(self.config, light, light + 1) * final.loss.mean()
        if more:
            _, state = self._refine(scene, final, posterior, noise, prior, past, state)
        return total, final, state

    def _infer(
        self, scene: Seen | None, past: State, first: Tensor, t: int, generator: torch.Generator | None
    ) -> tuple[PROVIDELatents, State]:
        """One column of the grid without a loss; without a scene each cell sees its own reconstruction, blindly."""
        posterior, state, noise = self.refiner.start(first), self.refiner.rest(first), first
        prior, context = self._prior(past), self._context(past)
        for _ in range(light_cells(self.config, t)):
            shown, sight = self._look(scene, posterior, noise, prior, context)
            posterior, state = self._refine(shown, sight, posterior, noise, prior, past, state, blind=scene is None)
            noise = later_draw(first, generator)
        if self.config.refine_final_cell and t > 0:
            shown, sight = self._look(scene, posterior, noise, prior, context)
            _, state = self._refine(shown, sight, posterior, noise, prior, past, state, blind=scene is None)
        slots = posterior.sample(noise)
        return PROVIDELatents(slots, *posterior, *state, past.hidden, first), state

    def _imagine_once(self, past: State, first: Tensor) -> tuple[PROVIDELatents, State]:
        """The released code's predicted frame: the decode of the first draw."""
        start = self.refiner.start(first)
        prior, context = self._prior(past), self._context(past)
        shown, sight = self._look(None, start, first, prior, context)
        posterior, state = self._refine(shown, sight, start, first, prior, past, self.refiner.rest(first), blind=True)
        return PROVIDELatents(sight.slots, *posterior, *state, past.hidden, first), state

    def _look(
        self, scene: Seen | None, posterior: Posterior, noise: Tensor, prior: Posterior | None, context: Tensor | None
    ) -> tuple[Seen, Sight]:
        if scene is None:
            logits = self.refiner.logits(*(t for t in (posterior.sample(noise), context) if t is not None))
            scene = self.refiner.see(mixture.render(logits).frame)
        return scene, self.refiner.look(scene, posterior, noise, prior=prior, context=context)

    def _refine(
        self,
        scene: Seen,
        sight: Sight,
        posterior: Posterior,
        noise: Tensor,
        prior: Posterior | None,
        past: State,
        state: State,
        blind: bool = False,
    ) -> tuple[Posterior, State]:
        described = self.refiner.describe(scene, sight, posterior, noise, prior=prior, blind=blind)
        state = self.lstm(described, past, state)
        return self.refiner.update(posterior, state.hidden), state

    def _prior(self, past: State) -> Posterior | None:
        return None if self.prior is None else self.prior(past.hidden)

    def _context(self, past: State) -> Tensor | None:
        return None if self.config.conditional_decoder == "none" else past.hidden


class GridLSTMCell(nn.Module):
    r"""LSTM cell with two pasts, the frame and the refinement before (arXiv 1810.03975; PROVIDE's released code).

    .. math::  a = W_x x + W_T h_T + W_R h_R, \quad (i, f, o, l) = \sigma(a_{1..4}), \quad g = \tanh(a_5)

               c = f (l c_T + (1 - l) c_R) + i g, \qquad h = o \tanh(c)

    One output serves as both pasts of what follows.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(in_dim, 5 * dim)
        self.from_past = nn.Linear(dim, 5 * dim)
        self.from_state = nn.Linear(dim, 5 * dim)

    def forward(self, described: Float[Tensor, "n k i"], past: State, state: State) -> State:
        gates = self.from_input(described) + self.from_past(past.hidden) + self.from_state(state.hidden)
        i, f, o, mix, g = gates.chunk(5, dim=-1)
        mix = mix.sigmoid()
        cell = f.sigmoid() * (mix * past.cell + (1 - mix) * state.cell) + i.sigmoid() * g.tanh()
        return State(o.sigmoid() * cell.tanh(), cell)


class Prior(nn.Module):
    """Prior of the slots from the temporal state: a hidden layer of the state's size with ReLU, then two heads.

    Before the first frame the state is zero, so that prior is a learned constant.
    """

    def __init__(self, in_dim: int, slot_dim: int, head: Literal["linear", "softplus_logvar"]) -> None:
        super().__init__()
        self.head = head
        self.hidden = nn.Linear(in_dim, in_dim)
        self.mean = nn.Linear(in_dim, slot_dim)
        self.spread = nn.Linear(in_dim, slot_dim)

    def forward(self, state: Float[Tensor, "n k h"]) -> Posterior:
        hidden = F.relu(self.hidden(state))
        spread = self.spread(hidden).float()
        log_var = 2 * spread if self.head == "linear" else F.softplus(spread)
        return Posterior(self.mean(hidden).float(), log_var.clamp(*LOG_VAR_RANGE))


class DecoderInput(nn.Module):
    """What the decoder takes of a slot and the temporal state.

    The paper's MLP has two ELU layers of the slot's size. The residual one, which is ours, adds to the slot what a
    hidden layer of the state's size says: slots of eight numbers would otherwise see the state through eight units.
    It adds nothing before training.
    """

    def __init__(self, slot_dim: int, state_dim: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        hidden = state_dim if residual else slot_dim
        self.first = nn.Linear(slot_dim + state_dim, hidden)
        self.second = nn.Linear(hidden, slot_dim)
        if residual:
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    def forward(self, slots: Float[Tensor, "n k d"], state: Float[Tensor, "n k h"]) -> Float[Tensor, "n k d"]:
        found = self.second(F.elu(self.first(torch.cat([slots, state], dim=-1))))
        return slots + found if self.residual else F.elu(found)


def light_cells(config: PROVIDEConfig, t: int) -> int:
    """Refinements of frame ``t``, from 0: the paper's max(R - t, 1) with t from 1."""
    return max(config.num_refinements - 1 - (t if config.grid == "triangular" else 0), 1)


def start_from_iodine(model: PROVIDE, config: IODINEConfig, weights: Mapping[str, Tensor]) -> None:
    """Give a fresh PROVIDE the weights of a trained IODINE, so that it infers the first frame nearly as IODINE does.

    The LSTM's gates go to the 2D cell, which reads the frame before as IODINE reads the refinement before, and whose
    mixing gate prefers the refinement's cell; the prior starts at N(0, I). Needs ``conditional_decoder`` "residual" or
    "none".

    Raises:
        ValueError: the models' parts differ in size, or the decoder cannot begin as IODINE's.
    """
    if model.config.conditional_decoder == "mlp":
        raise ValueError(
            'a provide model with conditional_decoder="mlp" cannot begin as an iodine does; '
            'set model.conditional_decoder to "residual" or "none"'
        )
    for name in ("likelihood_var", "mixture", "mask_posterior"):
        if getattr(config, name) != getattr(model.config, name):
            raise ValueError(
                f"the iodine model was trained with {name}={getattr(config, name)!r}, and this one has "
                f"{getattr(model.config, name)!r}: its refinement would read its inputs wrongly; give both the same"
            )
    own: dict[str, Any] = dict(model.state_dict())
    common = {name: value for name, value in weights.items() if name.startswith("refiner.")}
    for name, value in common.items():
        if name not in own or own[name].shape != value.shape:
            wanted = tuple(own[name].shape) if name in own else "no such parameter"
            raise ValueError(
                f"the iodine model does not fit: {name} is {tuple(value.shape)} there and {wanted} here; give both the "
                "same model settings"
            )
    dim = model.config.refine_dim
    with torch.no_grad():
        model.load_state_dict({**own, **common})
        # Torch's LSTM keeps (i, f, g, o); the 2D cell (i, f, o, mix, g).
        for kind, target in (("ih", model.lstm.from_input), ("hh", model.lstm.from_state)):
            i, f, g, o = weights[f"lstm.weight_{kind}"].chunk(4)
            target.weight.copy_(torch.cat([i, f, o, torch.zeros_like(o), g]))
            i, f, g, o = weights[f"lstm.bias_{kind}"].chunk(4)
            target.bias.copy_(torch.cat([i, f, o, torch.zeros_like(o), g]))
        model.lstm.from_input.bias[3 * dim : 4 * dim] = WARM_MIX_BIAS
        model.lstm.from_past.weight.copy_(model.lstm.from_state.weight)
        nn.init.zeros_(model.lstm.from_past.bias)
        if model.prior is not None:
            for head in (model.prior.mean, model.prior.spread):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
