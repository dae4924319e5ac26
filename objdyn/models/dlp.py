"""DLP: deep latent particles of single images, in the version DLPv2 (Daniel & Tamar, TMLR 2024, sections 3 and 4.1).

An image is a set of K particles, each with a position, scale, depth, transparency and features, plus a background
vector. A patch prior proposes keypoints, the first K become anchors; a glimpse around each anchor refines it, and a
second glimpse gives the particle's attributes.

    frame --encode--> particles, background --decode--> frame, masks

Frames of a clip are independent of each other: particle k of one frame is another thing than particle k of the next,
and nothing is predicted. ``ddlp.py`` is the video model around this one. The parts are in ``layers/particles.py``.

Reading order: DLPConfig, Particles, DLP.forward, then the steps in the order in which forward uses them. Which of paper
and released code is followed, and which defects of the latter are mended, is said in ``ddlp.py`` for both models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.distributions import beta_kl, beta_sample, gaussian_kl, gaussian_sample
from objdyn.interface import Loss, Scene, check_choices
from objdyn.layers.convolution import init_convolutions
from objdyn.layers.particles import (
    AppearanceEncoder,
    AttributeEncoder,
    Attributes,
    BackgroundDecoder,
    BackgroundEncoder,
    GlimpseDecoder,
    PatchPrior,
    ProposalMixer,
    background_mask,
    compose,
    log2_exact,
    stitch,
)
from objdyn.layers.spatial import cut_glimpses
from objdyn.losses import VGG_LOSS_SCALE, chamfer_kl, squared_error, zero_gradient

FRAMES_AT_ONCE = 64
"""Frames that are rendered or background-encoded together where no gradient is kept; bounds the memory."""


@dataclass(frozen=True)
class DLPConfig:
    """Every setting of the image model. Symbols in brackets are the paper's."""

    image_size: int = 64
    """Side of the square frames, in pixels; a power of two."""
    num_particles: int = 10
    """Particles per frame (K)."""
    num_proposals: int = 12
    """Keypoint proposals kept by the prior (L); at least K, at most the number of patches, and all with the filter
    "none"."""
    patch_size: int = 8
    """Side of the prior's patches, in pixels (P)."""
    proposal_filter: Literal["variance", "distance", "random", "none"] = "variance"
    """How the prior ranks its proposals, the first K of which are the anchors; with "none" a learned mixer makes K
    anchors of all of them."""
    glimpse_ratio: float = 0.25
    """Side of a glimpse over the side of the frame; the glimpse in pixels is a power of two (S)."""
    feature_dim: int = 3
    """Appearance features of a particle (m)."""
    background_dim: int = 3
    """Features of the background (m_bg); the paper sets it to m."""
    prior_channels: tuple[int, ...] = (16, 32, 64)
    """Channels of the prior's and the glimpse encoders' CNNs."""
    encoder_channels: tuple[int, ...] = (32, 64, 128)
    """Channels of the background encoder, and reversed of its decoder."""
    use_score_map: bool = True
    """Give the attribute encoder a channel for the cross-correlation with the particle's last glimpse, by which the
    video model tracks; all zero in a single image."""
    recon_loss: Literal["mse", "vgg"] = "mse"
    """Reconstruction term: squared error, or that plus the distance of VGG16's features, which needs its weights
    (``families.set_perceptual``) and scales the whole loss by 1e-3."""
    recon_weight: float = 1.0
    """Weight of the reconstruction."""
    kl_weight: float = 0.1
    """Weight of the KL terms (beta_KL); about 0.1 for squared error, 40 for a perceptual loss."""
    kl_balance: float = 0.001
    """Weight of depth, features, background and (halved) Chamfer inside the static KL."""
    offset_std: float = 0.2
    """Prior standard deviation of the position offset; of a video in its burn-in frames, as the next two."""
    scale_std: float = 0.3
    """Prior standard deviation of the scale, before the sigmoid."""
    conv_init_std: float = 0.01
    """Standard deviation of convolution weights at initialisation; the released code has 0.01."""
    initial_feature_log_var: float = 0.0
    """Added to the features' initial posterior log-variance; 0 as released, short runs want less."""
    transparency_prior: tuple[float, float] = (0.1, 0.1)
    """Prior concentrations (a, b) of the transparency."""
    warmup_steps: int = 0
    """Optimiser steps at the start that reconstruct single glimpses instead of frames."""
    noisy_steps: int = 0
    """Optimiser steps after the warm-up with noisy scales and alphas; the warm-up is noisy, too."""

    def __post_init__(self) -> None:
        check_choices(self)
        try:
            log2_exact(self.image_size)
            log2_exact(self.glimpse_size)
        except ValueError:
            raise ValueError(
                f"image_size and the glimpse (glimpse_ratio * (image_size - 1), rounded) must be powers of two, got "
                f"{self.image_size} and {self.glimpse_size}; supported are {supported_sizes()}"
            ) from None
        if self.glimpse_size < 8 or self.glimpse_size >= self.image_size:
            raise ValueError(
                f"the glimpse must have 8 pixels or more and be smaller than the frame, got {self.glimpse_size} of "
                f"{self.image_size}; supported are {supported_sizes()}"
            )
        halvings = len(self.prior_channels) - 1
        if self.glimpse_size < 2**halvings:
            raise ValueError(
                f"prior_channels of {halvings + 1} levels need glimpses of {2**halvings} pixels or more, got "
                f"{self.glimpse_size}; give fewer levels, or a larger glimpse_ratio"
            )
        if self.image_size % self.patch_size != 0 or self.patch_size < 2 ** (halvings + 1):
            raise ValueError(
                f"patch_size must divide image_size={self.image_size} and be at least {2 ** (halvings + 1)}, "
                f"got {self.patch_size}"
            )
        if not 1 <= self.num_particles <= self.num_proposals <= self.num_patches:
            raise ValueError(
                f"need 1 <= num_particles <= num_proposals <= number of patches ({self.num_patches} of "
                f"{self.patch_size} pixels), got num_particles={self.num_particles}, num_proposals={self.num_proposals}"
            )
        if self.proposal_filter == "none" and self.num_proposals != self.num_patches:
            raise ValueError(
                f"proposal_filter 'none' keeps the proposals of all patches, so num_proposals must be "
                f"{self.num_patches}, got {self.num_proposals}"
            )
        if len(self.encoder_channels) < 2 or self.image_size // 2 ** (len(self.encoder_channels) - 1) < 8:
            raise ValueError(
                f"encoder_channels must leave maps of 8 pixels or more, got {len(self.encoder_channels)} levels for "
                f"image_size={self.image_size}"
            )
        for name in ("kl_weight", "kl_balance", "recon_weight", "warmup_steps", "noisy_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("conv_init_std", "offset_std", "scale_std", "feature_dim", "background_dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.transparency_prior) <= 0:
            raise ValueError(f"transparency_prior must be two positive numbers, got {self.transparency_prior}")

    @property
    def glimpse_size(self) -> int:
        """Side of a glimpse in pixels (S)."""
        return round(self.glimpse_ratio * (self.image_size - 1))

    @property
    def loss_scale(self) -> float:
        """Factor on the whole loss, which the released code has with the perceptual distance."""
        return VGG_LOSS_SCALE if self.recon_loss == "vgg" else 1.0

    @property
    def num_patches(self) -> int:
        """Patches of the prior (N)."""
        return (self.image_size // self.patch_size) ** 2


def supported_sizes() -> str:
    """The frames from 32 to 256 pixels and, for each, the ratios whose glimpse is a power of two from 8 pixels on."""
    sizes = {size: [ratio for ratio in (0.5, 0.25, 0.125, 0.0625) if ratio * size >= 8] for size in (32, 64, 128, 256)}
    return ", ".join(
        f"image_size {size} with glimpse_ratio {' or '.join(map(str, ratios))}" for size, ratios in sizes.items()
    )


class Particles(NamedTuple):
    """Particles and background of each frame: posterior means, or samples where a generator was given."""

    position: Float[Tensor, "b t k 2"]
    """(y, x) in [-1, 1], y down; a rollout may leave the range."""
    scale: Float[Tensor, "b t k 2"]
    """(y, x), before the sigmoid, which gives the side of the glimpse over the side of the frame."""
    depth: Float[Tensor, "b t k"]
    """Smaller is nearer: blended by sigmoid(-depth)."""
    transparency: Float[Tensor, "b t k"]
    """In [0, 1]; 1 is fully visible."""
    features: Float[Tensor, "b t k m"]
    background: Float[Tensor, "b t m_bg"]

    def frames(self, start: int | None, stop: int | None) -> "Particles":
        """The frames ``start:stop``."""
        return Particles(*(field[:, start:stop] for field in self))


class Gaussian(NamedTuple):
    """Mean and log-variance."""

    mean: Float[Tensor, "..."]
    log_var: Float[Tensor, "..."]


class Distribution(NamedTuple):
    """What an encoder, or PINT, says of each frame: the particles' attributes, features, and the background."""

    attributes: Attributes
    features: Gaussian
    background: Gaussian


class Posterior(NamedTuple):
    """The encoder's answer for the frames of a clip."""

    anchor: Float[Tensor, "b t k 2"]
    """Where the offset starts: the refined anchor; in tracked frames the last position (detached)."""
    distribution: Distribution
    """``attributes.position`` is the offset from the anchor."""
    latents: Particles
    """Samples, or means."""
    glimpses: Float[Tensor, "b t k c s s"]
    """What the appearance encoder saw."""
    proposals: Float[Tensor, "b t0 l 2"]
    """The prior's keypoints; of a tracked video in its burn-in frames."""


class Stage(NamedTuple):
    """Where in its schedule the training is."""

    warmup: bool
    noisy: bool


class DLP(nn.Module):
    """The image model. ``step`` is the number of completed optimiser steps; the training loop writes it."""

    step: Tensor
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    """Distance of images (..., 3, h, w) in [0, 1] for ``recon_loss`` "vgg"; ``families.set_perceptual`` gives it. No
    part of the module: its weights are not trained, saved or counted."""

    def __init__(self, config: DLPConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.prior = PatchPrior(c.image_size, c.patch_size, c.prior_channels, c.num_proposals, c.proposal_filter)
        self.mixer = None
        if c.proposal_filter == "none":
            per_axis = c.image_size // c.patch_size
            self.mixer = ProposalMixer(per_axis, c.num_particles, c.glimpse_size, c.prior_channels)
        self.attribute_encoder = AttributeEncoder(c.glimpse_size, c.prior_channels, c.use_score_map)
        self.appearance_encoder = AppearanceEncoder(
            c.glimpse_size, c.prior_channels, c.feature_dim, c.initial_feature_log_var
        )
        self.glimpse_decoder = GlimpseDecoder(c.feature_dim, c.glimpse_size)
        self.background_encoder = BackgroundEncoder(c.image_size, c.encoder_channels, c.background_dim)
        self.background_decoder = BackgroundDecoder(c.background_dim, c.image_size, c.encoder_channels)
        init_convolutions(self, c.conv_init_std)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.4 times faster on a CPU

    # ---- the verbs -----------------------------------------------------------------------------------------------

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        r"""Negative ELBO of the frames, averaged over them (section 4.1, appendix D).

        .. math::  \|x - \hat x\|^2 + \beta_{KL} KL(q \| p)

        with a constant prior; all of it times ``loss_scale``. In evaluation mode the posterior's means are decoded.

        Raises:
            ValueError: the frames have another size than the model, or ``recon_loss`` has no weights.
        """
        self._check(video)
        stage = self._stage()
        posterior = self._find(video, sample=self.training, stage=stage)
        recon = self._recon_error(video, posterior, stage).mean()
        kl = self._static_kl(posterior, stage).mean()
        total = self.config.loss_scale * (self.config.recon_weight * recon + self.config.kl_weight * kl)
        if stage.warmup:
            total = total + zero_gradient(self.background_decoder).to(total.device)
        return Loss(total, {"recon": recon.detach(), "kl": kl.detach(), **describe_particles(posterior.latents)})

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> Particles:
        """Particles of every frame, each frame on its own.

        Raises:
            ValueError: the frames have another size than the model was built for.
        """
        self._check(video)
        stage = Stage(warmup=False, noisy=False)
        return self._find(video, sample=generator is not None, stage=stage, generator=generator).latents

    def rollout(self, latents: Particles, horizon: int, *, generator: torch.Generator | None = None) -> Particles:
        """Not available: frames are independent.

        Raises:
            NotImplementedError: always; ``ddlp`` is the family that predicts.
        """
        raise NotImplementedError("dlp is a model of single images and predicts nothing; train ddlp for rollouts")

    def decode(self, latents: Particles, components: bool = False) -> Scene:
        """Render the particles over the background; component 0 is the background, particle k is component k + 1."""
        b, t = latents.depth.shape[:2]
        pieces: list[tuple[Tensor, ...]] = []
        for piece in _frame_pieces(latents):
            glimpses = self._decode_glimpses(piece)
            if not components:
                pieces.append((self._compose(piece, glimpses, Stage(False, False)).clamp(0, 1),))
                continue
            background = self.background_decoder(piece.background.flatten(0, 1))
            stitched = stitch(*_flat(piece, glimpses), background)
            pieces.append(
                (
                    stitched.video.clamp(0, 1),
                    torch.cat([stitched.background_mask.unsqueeze(1), stitched.masks], dim=1),
                    torch.cat([background.unsqueeze(1), stitched.components], dim=1),
                )
            )
        joined = [torch.cat(part).unflatten(0, (b, t)) for part in zip(*pieces, strict=True)]
        return Scene(*joined)

    # ---- inference -----------------------------------------------------------------------------------------------

    def _find(
        self,
        video: Float[Tensor, "b t c h w"],
        *,
        sample: bool,
        stage: Stage,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """q(z | x) of every frame on its own (section 4.1, appendix D.3)."""
        b, t = video.shape[:2]
        frames = video.flatten(0, 1)
        proposals = self.prior(frames)
        anchor, scale = self._refine(frames, proposals, stage)
        found = self.attribute_encoder(self._cut(frames, anchor.detach(), scale))
        drawn = self._draw_attributes(found, anchor, stage, sample, generator)
        glimpses = self._cut_appearance(frames, drawn, stage)

        def split(field: Tensor) -> Tensor:
            return field.unflatten(0, (b, t))

        return self._complete(
            video,
            split(anchor),
            Attributes(*map(split, found)),
            Drawn(*map(split, drawn)),
            split(glimpses),
            split(proposals),
            sample=sample,
            generator=generator,
        )

    def _refine(self, frames: Tensor, proposals: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """First pass of the attribute encoder: anchors moved to what they see, and the scale to look with next."""
        fixed_scale = self._fixed_scale(frames)
        anchor = self._anchors(frames, proposals)
        refine = self.attribute_encoder(self._cut(frames, anchor.detach(), fixed_scale))
        return anchor + refine.position, fixed_scale if stage.noisy else refine.scale.detach().sigmoid()

    def _anchors(self, frames: Tensor, proposals: Tensor) -> Float[Tensor, "n k 2"]:
        """The K best proposals, or what the mixer makes of all; the gradient goes on into the prior."""
        c = self.config
        if self.mixer is None:
            return proposals[:, : c.num_particles]
        scale = frames.new_full(proposals.shape, c.glimpse_size / c.image_size)
        return self.mixer(self._cut(frames, proposals.detach(), scale), proposals)

    def _fixed_scale(self, frames: Tensor) -> Float[Tensor, "n k 2"]:
        c = self.config
        return frames.new_full((len(frames), c.num_particles, 2), c.glimpse_size / c.image_size)

    def _draw_attributes(
        self, found: Attributes, anchor: Tensor, stage: Stage, sample: bool, generator: torch.Generator | None
    ) -> "Drawn":
        drawn = draw_attributes(found, anchor, sample, generator)
        if stage.noisy:
            scale = logit(self.config.glimpse_ratio) + 0.1 * torch.randn_like(drawn.scale)
            return drawn._replace(scale=scale)
        return drawn

    def _cut_appearance(self, frames: Tensor, drawn: "Drawn", stage: Stage) -> Float[Tensor, "n k c s s"]:
        """The appearance's glimpse: gradient through the position, except in the warm-up."""
        centre = drawn.position.detach() if stage.warmup else drawn.position
        return self._cut(frames, centre, drawn.scale.detach().sigmoid())

    def _complete(
        self,
        video: Float[Tensor, "b t c h w"],
        anchor: Float[Tensor, "b t k 2"],
        attributes: Attributes,
        drawn: "Drawn",
        glimpses: Float[Tensor, "b t k c s s"],
        proposals: Float[Tensor, "b t0 l 2"],
        *,
        sample: bool,
        generator: torch.Generator | None,
    ) -> Posterior:
        """Appearance and background of frames whose particles have been placed, all frames at once."""
        c = self.config
        b, t = video.shape[:2]
        features = Gaussian(
            *(f.unflatten(0, glimpses.shape[:3]) for f in self.appearance_encoder(glimpses.flatten(0, 2)))
        )
        free = background_mask(
            drawn.position.flatten(0, 1).detach(),
            drawn.transparency.flatten(0, 1).detach(),
            c.glimpse_size,
            c.image_size,
        )
        masked = video.flatten(0, 1) * free
        if torch.is_grad_enabled():
            encoded = [self.background_encoder(masked)]
        else:
            encoded = [self.background_encoder(piece) for piece in masked.split(FRAMES_AT_ONCE)]
        background = Gaussian(*(torch.cat(part).unflatten(0, (b, t)) for part in zip(*encoded, strict=True)))
        latents = Particles(
            *drawn,
            draw_gaussian(features, sample, generator),
            draw_gaussian(background, sample, generator),
        )
        return Posterior(anchor, Distribution(attributes, features, background), latents, glimpses, proposals)

    def _cut(self, frame: Tensor, position: Tensor, scale: Tensor) -> Float[Tensor, "b k c s s"]:
        return cut_glimpses(frame, position, scale, self.config.glimpse_size)

    # ---- rendering -----------------------------------------------------------------------------------------------

    def _decode_glimpses(self, latents: Particles) -> Float[Tensor, "b t k 4 s s"]:
        features = latents.features
        return self.glimpse_decoder(features.flatten(0, 2)).unflatten(0, features.shape[:3])

    def _compose(self, latents: Particles, glimpses: Tensor, stage: Stage) -> Float[Tensor, "n c h w"]:
        """Compose frames; batch and time are one axis of the result."""
        background = self.background_decoder(latents.background.flatten(0, 1))
        return compose(*_flat(latents, glimpses), background, alpha_noise=0.1 if stage.noisy else 0.0)

    # ---- loss terms ----------------------------------------------------------------------------------------------

    def _static_kl(self, posterior: Posterior, stage: Stage) -> Float[Tensor, "b t0"]:
        """KL to the constant prior of the frames with proposals, summed over particles and dimensions (appendix D.1).

        The Chamfer term compares the proposals with the anchors: refined ones, which carry a gradient, or tracked ones.
        """
        c = self.config
        frames = posterior.proposals.shape[1]
        attributes = Attributes(*(field[:, :frames] for field in posterior.distribution.attributes))
        features, background = (Gaussian(*(f[:, :frames] for f in g)) for g in posterior.distribution[1:])
        offset_std, scale_std = (0.1, 0.1) if stage.noisy else (c.offset_std, c.scale_std)
        a, b = (0.2, 0.1) if stage.noisy else c.transparency_prior
        prior_a = torch.full_like(attributes.transparency_a, a)
        prior_b = torch.full_like(attributes.transparency_b, b)
        log_var = 2 * torch.tensor([offset_std, scale_std]).log()
        scale_mean = logit(0.75 * c.glimpse_ratio)

        anchors = chamfer_kl(posterior.anchor[:, :frames], posterior.proposals.detach())
        offset = gaussian_kl(attributes.position, attributes.position_log_var, 0.0, float(log_var[0]))
        scale = gaussian_kl(attributes.scale, attributes.scale_log_var, scale_mean, float(log_var[1]))
        transparency = beta_kl(attributes.transparency_a, attributes.transparency_b, prior_a, prior_b)
        depth = gaussian_kl(attributes.depth, attributes.depth_log_var, 0.0, 0.0)
        return (
            0.5 * c.kl_balance * anchors
            + offset.sum((-1, -2))
            + scale.sum((-1, -2))
            + transparency.sum(-1)
            + c.kl_balance * depth.sum(-1)
            + c.kl_balance * gaussian_kl(*features, 0.0, 0.0).sum((-1, -2))
            + c.kl_balance * gaussian_kl(*background, 0.0, 0.0).sum(-1)
        )

    def _recon_error(self, video: Tensor, posterior: Posterior, stage: Stage) -> Float[Tensor, "b t"]:
        """What the decoder misses of each frame; in the warm-up, of each glimpse."""
        glimpses = self._decode_glimpses(posterior.latents)
        if stage.warmup:
            return self._image_error(posterior.glimpses, glimpses[:, :, :, 1:]).sum(-1)
        return self._image_error(video, self._compose(posterior.latents, glimpses, stage).view_as(video))

    def _image_error(self, images: Float[Tensor, "*n c h w"], recon: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n"]:
        if self.config.recon_loss == "mse":
            return squared_error(images, recon)
        if self.perceptual is None:
            raise ValueError(
                "recon_loss is 'vgg', but the model has no distance to train with; give a training run the weights of "
                "VGG16 (--perceptual-weights FILE), and a model of your own families.set_perceptual(model, distance), "
                "or set model.recon_loss=mse"
            )
        return self.perceptual(images, recon)

    def _stage(self) -> Stage:
        if not self.training:
            return Stage(warmup=False, noisy=False)
        step = int(self.step)
        return Stage(step < self.config.warmup_steps, step < self.config.warmup_steps + self.config.noisy_steps)

    def _check(self, video: Tensor) -> int:
        """The number of frames of a video that fits the model."""
        side = self.config.image_size
        if video.ndim != 5 or video.shape[2:] != (3, side, side):
            raise ValueError(
                f"expected video of shape (batch, time, 3, {side}, {side}), got {tuple(video.shape)}; make shards with "
                f"--size {side}, or set model.image_size"
            )
        return video.shape[1]


class Drawn(NamedTuple):
    """Where the particles of frames are and how they are seen: samples or means, the first fields of ``Particles``."""

    position: Float[Tensor, "... k 2"]
    scale: Float[Tensor, "... k 2"]
    depth: Float[Tensor, "... k"]
    transparency: Float[Tensor, "... k"]


def describe_particles(latents: Particles) -> dict[str, Tensor]:
    """Two numbers that tell a training gone wrong: how many particles are visible, and how large glimpses are."""
    return {
        "visible_particles": latents.transparency.detach().sum(-1).mean(),
        "glimpse_side": latents.scale.detach().sigmoid().mean(),
    }


def draw_gaussian(gaussian: Gaussian, sample: bool, generator: torch.Generator | None) -> Tensor:
    """A sample (from torch's global state where ``generator`` is None), or the mean."""
    return gaussian_sample(*gaussian, generator) if sample else gaussian.mean


def draw_attributes(found: Attributes, anchor: Tensor, sample: bool, generator: torch.Generator | None) -> Drawn:
    """Position, scale, depth and transparency: means, or samples. ``anchor`` is added to the position's mean."""
    return Drawn(
        draw_gaussian(Gaussian(anchor + found.position, found.position_log_var), sample, generator),
        draw_gaussian(Gaussian(found.scale, found.scale_log_var), sample, generator),
        draw_gaussian(Gaussian(found.depth, found.depth_log_var), sample, generator),
        beta_sample(found.transparency_a, found.transparency_b, generator) if sample else found.transparency,
    )


def _flat(latents: Particles, glimpses: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``compose`` and ``stitch`` take of the particles, batch and time as one axis."""
    return (
        glimpses.flatten(0, 1),
        latents.position.flatten(0, 1),
        latents.scale.sigmoid().flatten(0, 1),
        latents.depth.flatten(0, 1),
        latents.transparency.flatten(0, 1),
    )


def _frame_pieces(latents: Particles) -> list[Particles]:
    """Batch and time as one axis, in pieces that are rendered at once (one piece where gradients are kept)."""
    flat = [field.flatten(0, 1).unsqueeze(0) for field in latents]
    total = flat[0].shape[1]
    size = total if torch.is_grad_enabled() else FRAMES_AT_ONCE
    return [Particles(*(field[:, i : i + size] for field in flat)) for i in range(0, total, size)]


def logit(value: float) -> float:
    """log(v / (1 - v)), with the released code's guard."""
    return float(torch.tensor(value / (1 - value + 1e-5), dtype=torch.float64).log())
