"""IODINE: a frame as K slots, found by iterative amortised inference (Greff et al. 2019, arXiv 1903.00450).

Every slot starts from the same learned posterior. A cell samples the slots, decodes them to colours and masks, and asks
how the loss of that picture changes with them; a network turns the answer into a better posterior; and so on R times.
Only the first random draw tells the slots apart.

    frame, posterior --Refiner.look--> slots, maps, loss, gradient --Refiner.describe, LSTM, Refiner.update--> posterior

Reading order: IODINEConfig, IODINE, then Refiner, which PROVIDE shares, from its ``look`` on.

Where the paper, its code and the PyTorch code of PROVIDE's baselines differ, each convention is a field of the config.
The defaults are those under which PROVIDE's paper compares IODINE with itself; the presets ``*-released`` have those of
the baselines' code. Choices of ours, because the sources are silent or depend on the batch size:

- the gradients that the refinement sees are those of the batch's sum, so a clip is refined alike in any batch;
- log-variances stay within ``LOG_VAR_RANGE``;
- without a generator the first draw comes from a constant seed and (K, d), and later cells decode the mean;
- the first draw is one per clip, shared by its frames: slots of neighbouring frames then mostly agree, though nothing
  forces them to;
- features of a network trained with labels, which the baselines' code feeds to the refinement without saying so in the
  paper, are off (``extra_channels``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.distributions import gaussian_kl
from objdyn.interface import Loss, Scene, check_choices
from objdyn.layers import mixture
from objdyn.layers.mixture import MixtureKind
from objdyn.layers.refinement import RefinementCNN, SpatialBroadcastDecoder, coordinate_planes, recomputed

LOG_VAR_RANGE = (-10.0, 10.0)
"""Bounds of every slot's log-variance."""
DRAW_SEED = 0
"""Of the first draw where no generator is given."""
FRAMES_AT_ONCE = 64
"""Frames that are inferred or rendered together where no gradient is kept; bounds the memory."""
EXTRA_MAPS = 16
"""Maps that ``extra_features`` are reduced to, as in the baselines' code."""


@dataclass(frozen=True)
class IODINEConfig:
    """Settings of an IODINE model."""

    image_size: int = 64
    """Side of the square frames, in pixels."""
    num_slots: int = 5
    """K, background included; may differ between training and test."""
    slot_dim: int = 64
    """Size of a slot's vector z."""
    num_refinements: int = 5
    """R: decodes of a frame, R - 1 of them followed by a refinement (at least one), as PROVIDE and the baselines' code
    count; IODINE's paper calls the same R - 1."""
    decoder_channels: tuple[int, ...] = (64, 64, 64, 64)
    """Width of the decoder's hidden convolutions."""
    decoder_upsample: int = 1
    """The decoder works at 1 / this of the size and shuffles channels into pixels at its end; 1 is published."""
    refine: Literal["full", "strided"] = "full"
    """Refinement CNN at full resolution (PROVIDE, the baselines' code), or halving the size each time (IODINE)."""
    refine_channels: tuple[int, ...] = (64, 64, 64, 64)
    """Width of the refinement's convolutions."""
    refine_pool: Literal["flatten", "mean"] = "flatten"
    """How its last maps become a vector; IODINE averages."""
    refine_dim: int = 128
    """Size of that vector and of the LSTM's state."""
    likelihood_var: float = 0.3
    """Variance of a pixel around its component's mean."""
    mixture: MixtureKind = "per_channel"
    """Mixture in every channel (PROVIDE's code and baselines), or once per pixel (IODINE's paper)."""
    mask_posterior: Literal["log", "reference"] = "log"
    """Refinement input "mask posterior": responsibilities (IODINE), or the baselines' softmax of likelihood values."""
    leave_one_out: bool = False
    """Add IODINE's input of the likelihood without slot k, which the baselines' code lacks."""
    extra_channels: int = 0
    """Channels of ``extra_features`` (the ``IODINE`` class); 0 for none."""
    cell_weights: Literal["ramp", "linspace", "reference", "uniform"] = "ramp"
    """Weight of decode s of D: s / D; (s - 1) / (D - 1), IODINE's code; s / R, the released code of PROVIDE; or 1, as
    ODDN's equation 5 is printed."""
    likelihood_weight: float = 10.0
    """beta, the weight of the negative log-likelihood (summed over pixels)."""
    kl_weight: float = 1.0
    """psi, the weight of the KL."""
    entropy_weight: float = 0.0
    """gamma, the weight of the masks' entropy, which is minimised."""
    initial_log_var: float | None = None
    """Log-variance of the first posterior before training; None draws it from U(-0.5, 0.5) like the mean."""
    conv_init: Literal["default", "fan_in"] = "default"
    """Torch's initialisation of convolutions, or N(0, 1 / fan_in) with zero bias: larger, for short runs."""
    inference: Literal["per_frame", "sequential"] = "per_frame"
    """``sequential`` is SEQ-IODINE, for test only: refinement step s sees frame s, and nothing starts anew."""
    sequential_clamp: float | None = None
    """SEQ-IODINE's bound of gradients and updates (10 in PROVIDE's runs on binary balls of 20 frames and more)."""
    recompute: bool = False
    """Compute decoder and refinement CNN again in backward instead of keeping their activations."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.num_slots < 2:
            raise ValueError(f"num_slots must be at least 2 (one object and the background), got {self.num_slots}")
        for name in ("num_refinements", "slot_dim", "refine_dim", "decoder_upsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decoder_channels", "refine_channels"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be one or more positive widths, got {getattr(self, name)}")
        size, upsample = self.image_size, self.decoder_upsample
        if size % 4 or size % upsample or size // upsample < 4:
            raise ValueError(
                f"image_size must be a multiple of 4 and of decoder_upsample={upsample} and at least four times that, "
                f"got {size}"
            )
        for name in ("likelihood_var", "sequential_clamp"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("likelihood_weight", "kl_weight", "entropy_weight", "extra_channels"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if (value := self.initial_log_var) is not None and not LOG_VAR_RANGE[0] <= value <= LOG_VAR_RANGE[1]:
            raise ValueError(f"initial_log_var must be None or within {LOG_VAR_RANGE}, got {value}")


class Posterior(NamedTuple):
    """Diagonal Gaussian of every slot: the papers' lambda."""

    mean: Float[Tensor, "n k d"]
    log_var: Float[Tensor, "n k d"]

    def sample(self, noise: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        """The mean plus ``noise`` standard deviations."""
        return self.mean + torch.exp(0.5 * self.log_var) * noise


class State(NamedTuple):
    """Output and cell of an LSTM, one per slot."""

    hidden: Float[Tensor, "n k h"]
    cell: Float[Tensor, "n k h"]


class Sight(NamedTuple):
    """What one cell sees of a frame."""

    slots: Float[Tensor, "n k d"]
    """The sample z that was decoded."""
    logits: Float[Tensor, "n k 4 h w"]
    found: mixture.Mixture
    loss: Float[Tensor, " n"]
    """beta NLL + psi KL + gamma H; carries the graph."""
    kl: Float[Tensor, " n"]
    grad_slots: Float[Tensor, "n k d"] | None
    """Of beta NLL + gamma H with respect to z, the decoder's vector-Jacobian product; None in a final cell."""


class IODINELatents(NamedTuple):
    """Slots of every frame."""

    slots: Float[Tensor, "b t k d"]
    """What is decoded: the posterior's mean, or a sample with a generator."""
    mean: Float[Tensor, "b t k d"]
    log_var: Float[Tensor, "b t k d"]


class Fit(NamedTuple):
    """What training learns of frames that were inferred."""

    loss: Float[Tensor, ""]
    """The weighted sum of the losses of all cells, a mean over frames; carries the graph."""
    final: Sight
    """The last cell, whose ``slots`` are a sample of the last posterior and carry the graph."""
    posterior: Posterior
    """The last one."""


class IODINE(nn.Module):
    """Iterative variational inference of the objects of single frames; a clip's frames are inferred one by one.

    Args:
        config: settings.
        extra_features: where ``config.extra_channels`` is not 0, turns frames (n, 3, h, w) into maps
            (n, extra_channels, h', w') that the refinement sees as well; called without gradients.

    Raises:
        ValueError: ``extra_channels`` without ``extra_features``, or the reverse.
    """

    def __init__(self, config: IODINEConfig, extra_features: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.refiner = Refiner(config, extra_features)
        self.lstm = nn.LSTMCell(self.refiner.input_dim, config.refine_dim)

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        """The weighted sum of the losses of all cells, a mean over clips and frames (Greff et al.'s objective)."""
        if self.training and self.config.inference == "sequential":
            raise ValueError('inference="sequential" (SEQ-IODINE) is for test only; train with "per_frame"')
        frames, clips = flat_frames(video, self.config.image_size), video.shape[0]
        first = train_draw((clips, self.config.num_slots, self.config.slot_dim), video.device, self.training)
        fit = self.fit(frames, repeat(first, "b k d -> (b t) k d", t=video.shape[1]))
        return Loss(fit.loss, terms_of(frames, [fit.final]))

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> IODINELatents:
        """Slots of every frame; with ``inference="sequential"`` those of SEQ-IODINE (PROVIDE, section 4.1)."""
        frames, (b, t) = flat_frames(video, self.config.image_size), video.shape[:2]
        first = draw((b, self.config.num_slots, self.config.slot_dim), video.device, generator)
        if self.config.inference == "sequential":
            return self._encode_sequentially(frames.unflatten(0, (b, t)), first, generator)
        found = self.infer(frames, repeat(first, "b k d -> (b t) k d", t=t), generator)
        return IODINELatents(*(field.unflatten(0, (b, t)) for field in found))

    def rollout(
        self, latents: IODINELatents, horizon: int, *, generator: torch.Generator | None = None
    ) -> IODINELatents:
        """Nothing: the model has no dynamics.

        Raises:
            NotImplementedError: always; ``Family.verbs`` says so beforehand.
        """
        raise NotImplementedError("iodine is an image model and cannot predict; train provide for that")

    def decode(self, latents: IODINELatents, components: bool = False) -> Scene:
        """Frames, and on request the masks and colours of every slot."""
        return decode_slots(self.refiner, latents.slots, None, components)

    def fit(self, frames: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n k d"]) -> Fit:
        """The loss of frames that are inferred from a first draw ``noise``, each by itself and all together.

        ODDN trains the same way and goes on from the last cell's slots.
        """
        total = frames.new_zeros(())
        count = self._decodes
        scene = self.refiner.see(frames)
        posterior, state = self.refiner.start(noise), self.refiner.rest(noise)
        sight = None
        for index in range(count):
            sight = self.refiner.look(scene, posterior, noise, final=index == count - 1)
            total = total + cell_weight(self.config, index, count) * sight.loss.mean()
            if index < count - 1:
                posterior, state = self._refine(scene, sight, posterior, noise, state)
            noise = torch.randn_like(noise) if self.training else torch.zeros_like(noise)
        assert sight is not None
        return Fit(total, sight, posterior)

    def infer(
        self, frames: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n k d"], generator: torch.Generator | None
    ) -> IODINELatents:
        """Slots (n, k, d) of frames from a first draw ``noise``, so many at once that memory stays bounded."""
        chunk = len(frames) if torch.is_grad_enabled() else FRAMES_AT_ONCE
        parts = [
            self._infer(frames[i : i + chunk], noise[i : i + chunk], generator) for i in range(0, len(frames), chunk)
        ]
        return IODINELatents(*(torch.cat(field) for field in zip(*parts, strict=True)))

    @property
    def _decodes(self) -> int:
        return max(self.config.num_refinements, 2)

    def _infer(
        self, frames: Float[Tensor, "n c h w"], noise: Float[Tensor, "n k d"], generator: torch.Generator | None
    ) -> IODINELatents:
        scene = self.refiner.see(frames)
        posterior, state = self.refiner.start(noise), self.refiner.rest(noise)
        for _ in range(self._decodes - 1):
            sight = self.refiner.look(scene, posterior, noise)
            posterior, state = self._refine(scene, sight, posterior, noise, state)
            noise = later_draw(noise, generator)
        return IODINELatents(posterior.sample(noise), *posterior)

    def _encode_sequentially(
        self, video: Float[Tensor, "b t c h w"], noise: Float[Tensor, "b k d"], generator: torch.Generator | None
    ) -> IODINELatents:
        """Frame s is decoded before it is used, as in the baselines' code: frame 1 gets the first guess."""
        posterior, state = self.refiner.start(noise), self.refiner.rest(noise)
        found = []
        for frame in video.unbind(1):
            found.append(IODINELatents(posterior.sample(noise), *posterior))
            scene = self.refiner.see(frame)
            sight = self.refiner.look(scene, posterior, noise)
            bound = self.config.sequential_clamp
            posterior, state = self._refine(scene, sight, posterior, noise, state, bound)
            noise = later_draw(noise, generator)
        return IODINELatents(*(torch.stack(field, dim=1) for field in zip(*found, strict=True)))

    def _refine(
        self,
        scene: "Seen",
        sight: Sight,
        posterior: Posterior,
        noise: Float[Tensor, "n k d"],
        state: State,
        bound: float | None = None,
    ) -> tuple[Posterior, State]:
        described = self.refiner.describe(scene, sight, posterior, noise, bound=bound)
        flat = State(*self.lstm(described.flatten(0, 1), tuple(field.flatten(0, 1) for field in state)))
        state = State(*(field.unflatten(0, described.shape[:2]) for field in flat))
        return self.refiner.update(posterior, state.hidden, bound), state


class Seen(NamedTuple):
    """A frame, and what the refinement sees of it whatever the slots are."""

    frame: Float[Tensor, "n 3 h w"]
    maps: Float[Tensor, "n s h w"]
    """Frame, coordinates and extra features."""


class Refiner(nn.Module):
    """The parts of iterative inference that do not depend on how states recur: decoder, refinement CNN, update.

    Args:
        config: an ``IODINEConfig``; a ``PROVIDEConfig`` is one.
        extra_features: see ``IODINE``.
        vector: what the decoder takes of the slots and the temporal state (PROVIDE); None decodes the slots.
    """

    coordinates: Tensor

    def __init__(
        self,
        config: IODINEConfig,
        extra_features: Callable[[Tensor], Tensor] | None = None,
        vector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (extra_features is None) != (config.extra_channels == 0):
            raise ValueError(
                f"extra_channels={config.extra_channels} and extra_features={extra_features} do not fit: give both, in "
                "Python (no job can), or 0 and None"
            )
        self.config = config
        self._extra_features = (extra_features,)  # in a tuple: a network in there is not a part of this one
        self.initial_mean = nn.Parameter(torch.empty(config.slot_dim).uniform_(-0.5, 0.5))
        self.initial_log_var = nn.Parameter(torch.empty(config.slot_dim).uniform_(-0.5, 0.5))
        if config.initial_log_var is not None:
            nn.init.constant_(self.initial_log_var, config.initial_log_var)
        self.vector = vector
        self.decoder = SpatialBroadcastDecoder(
            config.slot_dim, config.decoder_channels, 4, config.image_size, config.decoder_upsample
        )
        self.reduce = None
        if config.extra_channels:
            self.reduce = nn.Sequential(
                nn.Conv2d(config.extra_channels, 64, 3, padding=1), nn.ELU(),
                nn.Conv2d(64, 32, 3, padding=1), nn.ELU(),
                nn.Conv2d(32, EXTRA_MAPS, 3, padding=1), nn.ELU(),
            )  # fmt: skip
        self.cnn = RefinementCNN(
            shared_channels=6 + (EXTRA_MAPS if config.extra_channels else 0),
            slot_channels=10 + config.leave_one_out,
            channels=config.refine_channels,
            out_dim=config.refine_dim,
            size=config.image_size,
            kind=config.refine,
            pool=config.refine_pool,
        )
        self.head = nn.Linear(config.refine_dim, 2 * config.slot_dim)
        if config.conv_init == "fan_in":
            for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
                nn.init.normal_(conv.weight, 0.0, conv.weight[0].numel() ** -0.5)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
            # Of the decoder's inputs the two coordinates are few beside the slot, and would hardly count.
            first = self.decoder.first.weight
            for part in (first[:, :2], first[:, 2:]):
                nn.init.normal_(part, 0.0, part[0].numel() ** -0.5)
        self.register_buffer("coordinates", coordinate_planes(config.image_size), persistent=False)

    @property
    def input_dim(self) -> int:
        """Size of what ``describe`` gives: posterior, its gradient, the CNN's code."""
        return 4 * self.config.slot_dim + self.config.refine_dim

    def start(self, noise: Float[Tensor, "n k d"]) -> Posterior:
        """The learned first posterior, the same for all slots."""
        return Posterior(self.initial_mean.expand_as(noise), self.initial_log_var.expand_as(noise))

    def rest(self, noise: Float[Tensor, "n k d"]) -> State:
        """The recurrent state before anything was seen."""
        zeros = noise.new_zeros(*noise.shape[:2], self.config.refine_dim)
        return State(zeros, zeros)

    def see(self, frame: Float[Tensor, "n 3 h w"]) -> Seen:
        """What all cells and slots share of a frame."""
        maps = [frame, self.coordinates.expand(len(frame), -1, -1, -1)]
        (extra_features,) = self._extra_features
        if self.reduce is not None and extra_features is not None:
            with torch.no_grad():
                features = extra_features(frame)
            maps.append(F.interpolate(self.reduce(features), frame.shape[-2:], mode="bilinear", align_corners=False))
        return Seen(frame, torch.cat(maps, dim=1))

    def logits(
        self, slots: Float[Tensor, "n k d"], context: Float[Tensor, "n k h"] | None = None
    ) -> Float[Tensor, "n k 4 h w"]:
        """The decoder's maps: three colour logits and a mask logit per slot."""
        vector = slots if self.vector is None else self.vector(slots, context)
        return self.decoder(vector.flatten(0, 1)).unflatten(0, slots.shape[:2]).float()

    def look(
        self,
        scene: Seen,
        posterior: Posterior,
        noise: Float[Tensor, "n k d"],
        *,
        prior: Posterior | None = None,
        context: Float[Tensor, "n k h"] | None = None,
        final: bool = False,
    ) -> Sight:
        """Sample and decode the slots and compare with the frame.

        Args:
            scene: the frame.
            posterior: of the slots.
            noise: standard normal; the sample is ``posterior.sample(noise)``.
            prior: of the slots; None is N(0, I).
            context: temporal state that the decoder sees (PROVIDE).
            final: no refinement follows, so the gradient with respect to the slots is not needed.
        """
        slots = posterior.sample(noise)
        inputs = (slots,) if context is None else (slots, context)
        weights = [p for part in (self.decoder, self.vector) if part is not None for p in part.parameters()]
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *weights))
        if training and not self.config.recompute:
            # The refinement wants the gradient also of slots that nothing else wants it of: a frozen first posterior's.
            decoded = slots if final or slots.requires_grad else slots.detach().requires_grad_()
            logits = self.logits(decoded, *inputs[1:])
            found = self._mixture(scene.frame, logits)
            grad_slots = None if final else _gradient(logits, decoded, found.grad_logits, keep=True)
        else:
            leaves = [tensor.detach() for tensor in inputs]
            with torch.set_grad_enabled(not final):
                leaves[0].requires_grad_(not final)
                known = self.logits(*leaves)
                found = self._mixture(scene.frame, known)
                grad_slots = None if final else _gradient(known, leaves[0], found.grad_logits, keep=False)
            logits = known.detach()
            if training:
                logits = recomputed(self.logits, logits, inputs, weights)
        kl = gaussian_kl(*posterior, *(prior or (0.0, 0.0))).flatten(1).sum(1)
        loss = mixture.attach(logits, found) + self.config.kl_weight * kl
        return Sight(slots, logits, found, loss, kl, grad_slots)

    def describe(
        self,
        scene: Seen,
        sight: Sight,
        posterior: Posterior,
        noise: Float[Tensor, "n k d"],
        *,
        prior: Posterior | None = None,
        blind: bool = False,
        bound: float | None = None,
    ) -> Float[Tensor, "n k i"]:
        """All that the refinement may know: posterior, its gradient, and the CNN's code of the maps.

        ``blind`` sets the three gradients to zero (PROVIDE's prediction); ``bound`` clamps them.
        """
        rendering = mixture.render(sight.logits)
        found = sight.found
        if sight.grad_slots is None or blind:
            grad_posterior = torch.zeros_like(torch.cat(posterior, dim=-1))
        else:
            grad_posterior = self._posterior_gradient(sight.grad_slots, posterior, noise, prior)
        grad_means, grad_masks = found.grad_means, found.grad_masks
        if blind:
            grad_means, grad_masks = torch.zeros_like(grad_means), torch.zeros_like(grad_masks)
        if bound is not None:
            grad_posterior, grad_means, grad_masks = (
                gradient.clamp(-bound, bound) for gradient in (grad_posterior, grad_means, grad_masks)
            )
        config = self.config
        maps = [
            *rendering,
            mixture.normalised(grad_means),
            mixture.normalised(grad_masks),
            mixture.mask_posterior(scene.frame, rendering.means, config.likelihood_var, config.mask_posterior),
        ]
        if config.leave_one_out:
            without = mixture.leave_one_out(scene.frame, sight.logits, var=config.likelihood_var, kind=config.mixture)
            maps.append(mixture.normalised(without))
        likelihood = mixture.normalised(found.log_likelihood.unsqueeze(1)).squeeze(1)
        code = self._code(torch.cat([scene.maps, likelihood], dim=1), torch.cat(maps, dim=2))
        return torch.cat([*posterior, mixture.normalised(grad_posterior.unsqueeze(2)).squeeze(2), code], dim=-1)

    def update(self, posterior: Posterior, hidden: Float[Tensor, "n k h"], bound: float | None = None) -> Posterior:
        """Add what the network says: lambda + delta."""
        delta = self.head(hidden).float()
        if bound is not None:
            delta = delta.clamp(-bound, bound)
        mean, log_var = delta.chunk(2, dim=-1)
        return Posterior(posterior.mean + mean, (posterior.log_var + log_var).clamp(*LOG_VAR_RANGE))

    def _mixture(self, frame: Float[Tensor, "n 3 h w"], logits: Float[Tensor, "n k 4 h w"]) -> mixture.Mixture:
        return mixture.mixture(
            frame,
            logits,
            var=self.config.likelihood_var,
            kind=self.config.mixture,
            likelihood_weight=self.config.likelihood_weight,
            entropy_weight=self.config.entropy_weight,
        )

    def _posterior_gradient(
        self,
        grad_slots: Float[Tensor, "n k d"],
        posterior: Posterior,
        noise: Float[Tensor, "n k d"],
        prior: Posterior | None,
    ) -> Float[Tensor, "n k e"]:
        """Gradient of the cell's loss with respect to mean and log-variance, through z = mean + std * noise."""
        with torch.no_grad():
            prior_mean, prior_log_var = prior if prior is not None else (0.0, torch.zeros(()))
            precision = torch.exp(-torch.as_tensor(prior_log_var))
            std = torch.exp(0.5 * posterior.log_var)
            mean = grad_slots + self.config.kl_weight * (posterior.mean - prior_mean) * precision
            log_var = 0.5 * (grad_slots * noise * std + self.config.kl_weight * (std.square() * precision - 1))
            return torch.cat([mean, log_var], dim=-1)

    def _code(self, shared: Float[Tensor, "n s h w"], slots: Float[Tensor, "n k c h w"]) -> Float[Tensor, "n k h"]:
        if not (self.config.recompute and torch.is_grad_enabled()):
            return self.cnn(shared, slots).float()
        with torch.no_grad():
            known = self.cnn(shared, slots)
        return recomputed(self.cnn, known, (shared, slots), list(self.cnn.parameters())).float()


def _gradient(logits: Tensor, slots: Tensor, grad_logits: Tensor, keep: bool) -> Tensor:
    """One vector-Jacobian product through the decoder."""
    (gradient,) = torch.autograd.grad(logits, slots, grad_logits.to(logits.dtype), retain_graph=keep)
    return gradient


def cell_weight(config: IODINEConfig, index: int, decodes: int) -> float:
    """Weight of decode ``index`` (from 0) of ``decodes``."""
    if config.cell_weights == "ramp":
        return (index + 1) / decodes
    if config.cell_weights == "linspace":
        return index / (decodes - 1)
    return 1.0 if config.cell_weights == "uniform" else (index + 1) / config.num_refinements


def flat_frames(video: Float[Tensor, "b t c h w"], size: int) -> Float[Tensor, "n 3 h w"]:
    """All frames of a batch of clips.

    Raises:
        ValueError: the frames are not RGB of side ``size``.
    """
    if video.ndim != 5 or 0 in video.shape[:2] or video.shape[2] != 3 or video.shape[3:] != (size, size):
        raise ValueError(
            f"the model was built for video (b, t, 3, {size}, {size}), got {tuple(video.shape)}; make the dataset with "
            f"make_shards.py --size {size}, or set model.image_size"
        )
    return video.flatten(0, 1)


def draw(
    shape: tuple[int, int, int], device: torch.device, generator: torch.Generator | None, frame: int = 0
) -> Float[Tensor, "b k d"]:
    """A first draw (b, k, d) of inference: from the generator, or the same for every clip.

    ``frame`` tells constant draws apart where every frame has its own.
    """
    if generator is not None:
        return torch.randn(shape, generator=generator, device=device)
    constant = torch.Generator().manual_seed(DRAW_SEED + frame)
    return torch.randn(shape[1:], generator=constant).to(device).expand(shape)


def train_draw(
    shape: tuple[int, int, int], device: torch.device, training: bool, frame: int = 0
) -> Float[Tensor, "b k d"]:
    """The first draw (b, k, d) of a loss: from torch's global state in training, else that of inference."""
    return torch.randn(shape, device=device) if training else draw(shape, device, None, frame)


def later_draw(noise: Float[Tensor, "n k d"], generator: torch.Generator | None) -> Float[Tensor, "n k d"]:
    """Noise of later cells: zero, which decodes the mean, without a generator."""
    if generator is None:
        return torch.zeros_like(noise)
    return torch.randn(noise.shape, generator=generator, device=noise.device)


def decode_slots(
    refiner: Refiner,
    slots: Float[Tensor, "b t k d"],
    context: Float[Tensor, "b t k h"] | None,
    components: bool,
) -> Scene:
    """Render slots, so many frames at once that memory stays bounded where no gradient is kept."""
    b, t = slots.shape[:2]
    flat = [slots.flatten(0, 1)] if context is None else [slots.flatten(0, 1), context.flatten(0, 1)]
    chunk = b * t if torch.is_grad_enabled() else FRAMES_AT_ONCE
    frames, masks, means = [], [], []
    for i in range(0, b * t, chunk):
        rendering = mixture.render(refiner.logits(*(tensor[i : i + chunk] for tensor in flat)))
        frames.append(rendering.frame)
        if components:
            masks.append(rendering.masks)
            means.append(rendering.means)
    video = torch.cat(frames).unflatten(0, (b, t))
    if not components:
        return Scene(video)
    return Scene(video, torch.cat(masks).unflatten(0, (b, t)), torch.cat(means).unflatten(0, (b, t)))


def terms_of(frames: Float[Tensor, "n 3 h w"], sights: list[Sight]) -> dict[str, Tensor]:
    """What to log of the final cells of some frames: means over frames, ``recon`` and ``kl`` in nats per frame."""
    with torch.no_grad():
        recon = torch.cat([sight.found.nll for sight in sights])
        rendered = torch.cat([mixture.render(sight.logits.detach()).frame for sight in sights])
        return {
            "recon": recon.mean(),
            "kl": torch.cat([sight.kl.detach() for sight in sights]).mean(),
            "entropy": torch.cat([sight.found.entropy for sight in sights]).mean(),
            "mse": (rendered - frames).square().mean(),
        }
