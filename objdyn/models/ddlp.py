"""DDLP: deep dynamic latent particles (Daniel & Tamar, TMLR 2024).

A frame is a set of K particles, each with a position, scale, depth, transparency and features, plus a background
vector. The particles of the first frame are found by a patch prior and refined; later ones are *tracked*: each
particle looks for itself around its last position, guided by a normalised cross-correlation. A transformer (PINT)
predicts the next frame's particles from those so far, and its prediction is the prior that the encoder is pulled to.

    video --encode--> particles --rollout--> future particles --decode--> frames, masks

Reading order: DDLPConfig, DDLPLatents, DDLP.forward, then the private steps in the order in which forward uses them,
then PINT. The parts of the image model are in ``dlp.py``.

Where paper and released code differ we follow the code's architecture and loss weights (they made the published
numbers) and the paper's clip lengths and particle counts in the presets named after the paper. Defects of the released
code that are mended here, because they change no architecture:

- depth log-variance of PINT is read from its own head, not from the delta of the depth;
- the background's static KL sums over dimensions and frames and averages over the batch, not the reverse;
- score maps are normalised by the particle's own template energy, not by that of the whole batch;
- log-variances and log-concentrations are bounded (``dlp.LOG_VAR_RANGE``, ``dlp.LOG_CONCENTRATION_RANGE``);
- upsampling counts come from integer logarithms, and K = 1 works;
- more particles than proposals, or proposals than patches, are refused instead of silently cut;
- the encoder is deterministic wherever no noise is asked for, validation losses included.

The reconstruction term is the squared error; the perceptual one of the 128-pixel presets is not implemented yet.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.distributions import beta_kl, beta_sample, gaussian_kl, gaussian_sample
from objdyn.interface import Loss, Scene, check_choices
from objdyn.layers.convolution import MLP, init_convolutions
from objdyn.layers.spatial import cut_glimpses
from objdyn.losses import chamfer_kl, squared_error, zero_gradient
from objdyn.models.dlp import (
    AppearanceEncoder,
    AttributeEncoder,
    AttributeHeads,
    Attributes,
    BackgroundDecoder,
    BackgroundEncoder,
    GlimpseDecoder,
    PatchPrior,
    Stitched,
    background_mask,
    bound_log_var,
    log2_exact,
    stitch,
)

FRAMES_AT_ONCE = 64
"""Frames that are rendered or background-encoded together where no gradient is kept; bounds the memory."""


@dataclass(frozen=True)
class DDLPConfig:
    """Every setting of the model. Symbols in brackets are the paper's."""

    image_size: int = 64
    """Side of the square frames, in pixels; a power of two."""
    num_particles: int = 10
    """Particles per frame (K)."""
    num_proposals: int = 12
    """Keypoint proposals kept by the prior (L); at least K, at most the number of patches."""
    patch_size: int = 8
    """Side of the prior's patches, in pixels (P)."""
    proposal_filter: Literal["variance", "distance", "random"] = "variance"
    """How the prior ranks its proposals."""
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
    max_frames: int = 20
    """Frames that PINT attends to (T); training clips have up to T + 1."""
    burn_in_frames: int = 4
    """First frames of a clip, which have the constant prior instead of PINT's (tau)."""
    use_score_map: bool = True
    """Give the tracker the cross-correlation with the particle's last glimpse."""
    pint_dim: int = 256
    """Width of PINT (D)."""
    pint_layers: int = 6
    """Layers of PINT."""
    pint_heads: int = 8
    """Attention heads of PINT."""
    pint_dropout: float = 0.1
    """Dropout in PINT: attention weights, attention output, MLP output."""
    pint_bias_init_std: float = 0.02
    """Standard deviation of PINT's relative biases at initialisation; 0.02 as released. Larger ones give each head a
    preference for some time and neighbour from the start, which Adam would need thousands of steps to grow."""
    pint_own_bias: float = 0.0
    """Added at initialisation to a token's bias towards its own particle in all frames; 0 as released."""
    recon_weight: float = 1.0
    """Weight of the reconstruction."""
    kl_weight: float = 0.1
    """Weight of the KL terms, static and dynamic (beta_KL); about 0.1 for squared error, 40 for a perceptual loss."""
    kl_balance: float = 0.001
    """Weight of depth, features, background and (halved) Chamfer inside the static KL."""
    offset_std: float = 0.2
    """Prior standard deviation of the position offset in burn-in frames."""
    scale_std: float = 0.3
    """Prior standard deviation of the scale, before the sigmoid, in burn-in frames."""
    conv_init_std: float = 0.01
    """Standard deviation of convolution weights at initialisation; the released code has 0.01."""
    initial_feature_log_var: float = 0.0
    """Added to the features' initial posterior log-variance; 0 as released, short runs want less."""
    transparency_prior: tuple[float, float] = (0.1, 0.1)
    """Prior concentrations (a, b) of the transparency in burn-in frames."""
    warmup_steps: int = 0
    """Optimiser steps at the start that reconstruct single glimpses instead of frames."""
    noisy_steps: int = 0
    """Optimiser steps after the warm-up with noisy scales and alphas; the warm-up is noisy, too."""
    ramp_steps: int = 10_000
    """Optimiser steps over which the frames after the burn-in gain weight, one after the other."""

    def __post_init__(self) -> None:
        check_choices(self)
        try:
            log2_exact(self.image_size)
            log2_exact(self.glimpse_size)
        except ValueError:
            raise ValueError(
                f"image_size and the glimpse (glimpse_ratio * (image_size - 1), rounded) must be powers of two, got "
                f"{self.image_size} and {self.glimpse_size}; try image_size 64 or 128 with glimpse_ratio 0.25"
            ) from None
        if self.glimpse_size < 8 or self.glimpse_size >= self.image_size:
            raise ValueError(f"the glimpse must have 8 pixels or more and be smaller than the frame, got "
                             f"{self.glimpse_size} of {self.image_size}; change glimpse_ratio")  # fmt: skip
        halvings = len(self.prior_channels) - 1
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
        if len(self.encoder_channels) < 2 or self.image_size // 2 ** (len(self.encoder_channels) - 1) < 8:
            raise ValueError(
                f"encoder_channels must leave maps of 8 pixels or more, got {len(self.encoder_channels)} levels for "
                f"image_size={self.image_size}"
            )
        if self.burn_in_frames < 1 or self.max_frames < self.burn_in_frames:
            raise ValueError(f"need 1 <= burn_in_frames <= max_frames, got {self.burn_in_frames} and {self.max_frames}")
        if self.pint_dim % self.pint_heads != 0:
            raise ValueError(f"pint_dim={self.pint_dim} must be divisible by pint_heads={self.pint_heads}")
        for name in ("kl_weight", "kl_balance", "recon_weight", "warmup_steps", "noisy_steps", "pint_dropout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in (
            "conv_init_std",
            "pint_bias_init_std",
            "offset_std",
            "scale_std",
            "ramp_steps",
            "feature_dim",
            "background_dim",
            "pint_layers",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.transparency_prior) <= 0:
            raise ValueError(f"transparency_prior must be two positive numbers, got {self.transparency_prior}")

    @property
    def glimpse_size(self) -> int:
        """Side of a glimpse in pixels (S)."""
        return round(self.glimpse_ratio * (self.image_size - 1))

    @property
    def num_patches(self) -> int:
        """Patches of the prior (N)."""
        return (self.image_size // self.patch_size) ** 2


class DDLPLatents(NamedTuple):
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

    def frames(self, start: int | None, stop: int | None) -> "DDLPLatents":
        """The frames ``start:stop``."""
        return DDLPLatents(*(field[:, start:stop] for field in self))


class Gaussian(NamedTuple):
    """Mean and log-variance."""

    mean: Float[Tensor, "..."]
    log_var: Float[Tensor, "..."]


class Distribution(NamedTuple):
    """What encoder or PINT says of each frame: the particles' attributes, features, and the background."""

    attributes: Attributes
    features: Gaussian
    background: Gaussian


class Posterior(NamedTuple):
    """The encoder's answer for a clip."""

    anchor: Float[Tensor, "b t k 2"]
    """Where the offset starts: frame 0 the refined anchor, later frames the last position (detached)."""
    distribution: Distribution
    """``attributes.position`` is the offset from the anchor."""
    latents: DDLPLatents
    """Samples, or means."""
    glimpses: Float[Tensor, "b t k c s s"]
    """What the appearance encoder saw."""
    proposals: Float[Tensor, "b t0 l 2"]
    """The prior's keypoints in the burn-in frames."""


class Stage(NamedTuple):
    """Where in its schedule the training is."""

    warmup: bool
    noisy: bool


class DDLP(nn.Module):
    """The video model. ``step`` is the number of completed optimiser steps; the training loop writes it."""

    step: Tensor

    def __init__(self, config: DDLPConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.prior = PatchPrior(c.image_size, c.patch_size, c.prior_channels, c.num_proposals, c.proposal_filter)
        self.attribute_encoder = AttributeEncoder(c.glimpse_size, c.prior_channels, c.use_score_map)
        self.appearance_encoder = AppearanceEncoder(
            c.glimpse_size, c.prior_channels, c.feature_dim, c.initial_feature_log_var
        )
        self.glimpse_decoder = GlimpseDecoder(c.feature_dim, c.glimpse_size)
        self.background_encoder = BackgroundEncoder(c.image_size, c.encoder_channels, c.background_dim)
        self.background_decoder = BackgroundDecoder(c.background_dim, c.image_size, c.encoder_channels)
        self.pint = PINT(
            num_particles=c.num_particles,
            max_frames=c.max_frames,
            feature_dim=c.feature_dim,
            background_dim=c.background_dim,
            dim=c.pint_dim,
            layers=c.pint_layers,
            heads=c.pint_heads,
            dropout=c.pint_dropout,
            bias_init_std=c.pint_bias_init_std,
            own_bias=c.pint_own_bias,
        )
        init_convolutions(self, c.conv_init_std)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.4 times faster on a CPU

    # ---- the four verbs ------------------------------------------------------------------------------------------

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        r"""Negative ELBO of a clip, averaged over clips and frames (section 4.4).

        .. math::  \frac{1}{t} \sum_t \gamma_t \left( \|x_t - \hat x_t\|^2 + \beta_{KL} KL(q_t \| p_t) \right)

        with the constant prior and :math:`\gamma_t = 1` in the burn-in frames, PINT's prior and the ramp's weight
        afterwards. In evaluation mode the posterior's means are decoded and every weight is 1.

        Raises:
            ValueError: the clip has another size than the model, or no frame after the burn-in, or more than T + 1.
        """
        frames = self._check(video)
        if not self.config.burn_in_frames < frames <= self.config.max_frames + 1:
            raise ValueError(
                f"a training clip must have {self.config.burn_in_frames + 1} to {self.config.max_frames + 1} frames "
                f"(burn_in_frames + 1 to max_frames + 1), got {frames}; change clip_frames or model.max_frames"
            )
        stage = self._stage()
        posterior = self._infer(video, sample=self.training, stage=stage)
        prior = self.pint(posterior.latents.frames(None, -1))  # of frames 1 .. t-1
        weights = self._frame_weights(frames, video)

        glimpses = self._decode_glimpses(posterior.latents)
        if stage.warmup:
            recon = squared_error(posterior.glimpses.flatten(2, 3), glimpses[:, :, :, 1:].flatten(2, 3))
        else:
            recon = squared_error(video, self._stitch(posterior.latents, glimpses, stage).video.view_as(video))
        kl_static = self._static_kl(posterior, stage)
        kl_dynamic = self._dynamic_kl(posterior, prior)

        recon = (recon * weights).sum(1).mean()
        kl_static = kl_static.sum(1).mean()
        kl_dynamic = (kl_dynamic * weights[self.config.burn_in_frames :]).sum(1).mean()
        total = self.config.recon_weight * recon + self.config.kl_weight * (kl_static + kl_dynamic)
        if stage.warmup:
            total = total + zero_gradient(self.background_decoder).to(total.device)
        latents = posterior.latents
        terms = {
            "recon": recon / frames,
            "kl_static": kl_static / frames,
            "kl_dynamic": kl_dynamic / frames,
            "visible_particles": latents.transparency.sum(-1).mean(),
            "glimpse_side": latents.scale.sigmoid().mean(),
        }
        return Loss(total / frames, {name: value.detach() for name, value in terms.items()})

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> DDLPLatents:
        """Particles of every frame, tracked from the first; clips may have any length.

        Causal: a frame's particles do not depend on later frames.

        Raises:
            ValueError: the frames have another size than the model was built for.
        """
        self._check(video)
        stage = Stage(warmup=False, noisy=False)
        return self._infer(video, sample=generator is not None, stage=stage, generator=generator).latents

    def rollout(self, latents: DDLPLatents, horizon: int, *, generator: torch.Generator | None = None) -> DDLPLatents:
        """The next ``horizon`` frames, one at a time from the last T (section 4.4).

        Raises:
            ValueError: ``horizon`` is smaller than 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 frame, got {horizon}")
        history = latents
        for _ in range(horizon):
            prior = self.pint(history.frames(-self.config.max_frames, None))
            last = _later(prior, -1)
            new = _draw(last, last.attributes.position, sample=generator is not None, generator=generator)
            history = DDLPLatents(*(torch.cat(pair, dim=1) for pair in zip(history, new, strict=True)))
        return history.frames(-horizon, None)

    def decode(self, latents: DDLPLatents, components: bool = False) -> Scene:
        """Render the particles over the background; component 0 is the background, particle k is component k + 1."""
        b, t = latents.depth.shape[:2]
        pieces: list[tuple[Tensor, ...]] = []
        for piece in _frame_pieces(latents):
            stitched = self._stitch(piece, self._decode_glimpses(piece), Stage(False, False))
            rendered = [stitched.video.clamp(0, 1)]
            if components:
                background = self.background_decoder(piece.background.flatten(0, 1))
                rendered.append(torch.cat([stitched.background_mask.unsqueeze(1), stitched.masks], dim=1))
                rendered.append(torch.cat([background.unsqueeze(1), stitched.components], dim=1))
            pieces.append(tuple(rendered))
        joined = [torch.cat(part).unflatten(0, (b, t)) for part in zip(*pieces, strict=True)]
        return Scene(*joined)

    # ---- inference -----------------------------------------------------------------------------------------------

    def _infer(
        self,
        video: Float[Tensor, "b t c h w"],
        *,
        sample: bool,
        stage: Stage,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """q(z_t | x_t, z_<t) for every frame (sections 4.1 and 4.2, appendix D.3)."""
        c = self.config
        b, t = video.shape[:2]
        proposals = self.prior(video[:, 0]).unsqueeze(1)
        with torch.no_grad():  # only frame 0's proposals become anchors; the others are targets without a gradient
            later = video[:, 1 : c.burn_in_frames]
            later = self.prior(later.flatten(0, 1)).unflatten(0, later.shape[:2]) if t > 1 else proposals[:, 1:]
        proposals = torch.cat([proposals, later], dim=1)
        fixed_scale = video.new_full((b, c.num_particles, 2), c.glimpse_size / c.image_size)

        # frame 0: two passes of the same network, first to refine the anchors, then for the attributes
        anchor = proposals[:, 0, : c.num_particles]
        refine = self.attribute_encoder(self._cut(video[:, 0], anchor.detach(), fixed_scale))
        anchor = anchor + refine.position
        scale = fixed_scale if stage.noisy else refine.scale.detach().sigmoid()

        anchors, attributes, drawn, glimpses = [], [], [], []
        score_map = None
        for index in range(t):
            frame = video[:, index]
            window = self._cut(frame, anchor.detach(), scale)
            if index > 0 and c.use_score_map and not stage.noisy:
                score_map = match_template(window, glimpses[-1])
            found = self.attribute_encoder(window, score_map)
            position, drawn_scale, depth, transparency = _draw_attributes(found, anchor, sample, generator)
            if stage.noisy:
                drawn_scale = _logit(c.glimpse_ratio) + 0.1 * torch.randn_like(drawn_scale)
            anchors.append(anchor)
            attributes.append(found)
            drawn.append((position, drawn_scale, depth, transparency))
            # the appearance's glimpse: gradient through the position, except in the warm-up
            centre = position.detach() if stage.warmup else position
            glimpses.append(self._cut(frame, centre, drawn_scale.detach().sigmoid()))
            anchor = position.detach()
            scale = fixed_scale if stage.noisy else drawn_scale.detach().sigmoid()

        over_time = Attributes(*(torch.stack(field, dim=1) for field in zip(*attributes, strict=True)))
        position, drawn_scale, depth, transparency = (torch.stack(f, dim=1) for f in zip(*drawn, strict=True))
        appearance = torch.stack(glimpses, dim=1)

        features = Gaussian(*(f.unflatten(0, appearance.shape[:3])
                              for f in self.appearance_encoder(appearance.flatten(0, 2))))  # fmt: skip
        free = background_mask(
            position.flatten(0, 1).detach(), transparency.flatten(0, 1).detach(), c.glimpse_size, c.image_size
        )
        masked = video.flatten(0, 1) * free
        if torch.is_grad_enabled():
            encoded = [self.background_encoder(masked)]
        else:
            encoded = [self.background_encoder(piece) for piece in masked.split(FRAMES_AT_ONCE)]
        background = Gaussian(*(torch.cat(part).unflatten(0, (b, t)) for part in zip(*encoded, strict=True)))
        latents = DDLPLatents(
            position,
            drawn_scale,
            depth,
            transparency,
            _draw_gaussian(features, sample, generator),
            _draw_gaussian(background, sample, generator),
        )
        distribution = Distribution(over_time, features, background)
        return Posterior(torch.stack(anchors, dim=1), distribution, latents, appearance, proposals)

    def _cut(self, frame: Tensor, position: Tensor, scale: Tensor) -> Float[Tensor, "b k c s s"]:
        return cut_glimpses(frame, position, scale, self.config.glimpse_size)

    # ---- rendering -----------------------------------------------------------------------------------------------

    def _decode_glimpses(self, latents: DDLPLatents) -> Float[Tensor, "b t k 4 s s"]:
        features = latents.features
        return self.glimpse_decoder(features.flatten(0, 2)).unflatten(0, features.shape[:3])

    def _stitch(self, latents: DDLPLatents, glimpses: Tensor, stage: Stage) -> Stitched:
        """Compose frames; batch and time are one axis of the result."""
        return stitch(
            glimpses.flatten(0, 1),
            latents.position.flatten(0, 1),
            latents.scale.sigmoid().flatten(0, 1),
            latents.depth.flatten(0, 1),
            latents.transparency.flatten(0, 1),
            self.background_decoder(latents.background.flatten(0, 1)),
            alpha_noise=0.1 if stage.noisy else 0.0,
        )

    # ---- loss terms ----------------------------------------------------------------------------------------------

    def _static_kl(self, posterior: Posterior, stage: Stage) -> Float[Tensor, "b t0"]:
        """KL of the burn-in frames to the constant prior, summed over particles and dimensions (appendix D.1).

        The Chamfer term compares the proposals with the refined anchors in frame 0 and with the tracked positions
        later; only the anchors carry a gradient.
        """
        c = self.config
        burn_in = c.burn_in_frames
        attributes = Attributes(*(field[:, :burn_in] for field in posterior.distribution.attributes))
        features, background = (Gaussian(*(f[:, :burn_in] for f in g)) for g in posterior.distribution[1:])
        offset_std, scale_std = (0.1, 0.1) if stage.noisy else (c.offset_std, c.scale_std)
        a, b = (0.2, 0.1) if stage.noisy else c.transparency_prior
        prior_a = torch.full_like(attributes.transparency_a, a)
        prior_b = torch.full_like(attributes.transparency_b, b)
        log_var = 2 * torch.tensor([offset_std, scale_std]).log()
        scale_mean = _logit(0.75 * c.glimpse_ratio)

        anchors = chamfer_kl(posterior.anchor[:, :burn_in], posterior.proposals.detach())
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

    def _dynamic_kl(self, posterior: Posterior, prior: Distribution) -> Float[Tensor, "b t1"]:
        """KL of the later frames to PINT's prediction, all with weight 1 and gradients to both sides (section 4.4)."""
        burn_in = self.config.burn_in_frames
        q = _later(posterior.distribution, burn_in)
        p = _later(prior, burn_in - 1)  # the prior starts at frame 1
        q_position = posterior.anchor[:, burn_in:].detach() + q.attributes.position
        return (
            gaussian_kl(
                q_position, q.attributes.position_log_var, p.attributes.position, p.attributes.position_log_var
            ).sum((-1, -2))
            + gaussian_kl(
                q.attributes.scale, q.attributes.scale_log_var, p.attributes.scale, p.attributes.scale_log_var
            ).sum((-1, -2))
            + gaussian_kl(
                q.attributes.depth, q.attributes.depth_log_var, p.attributes.depth, p.attributes.depth_log_var
            ).sum(-1)
            + beta_kl(
                q.attributes.transparency_a,
                q.attributes.transparency_b,
                p.attributes.transparency_a,
                p.attributes.transparency_b,
            ).sum(-1)
            + gaussian_kl(*q.features, *p.features).sum((-1, -2))
            + gaussian_kl(*q.background, *p.background).sum(-1)
        )

    def _frame_weights(self, frames: int, like: Tensor) -> Float[Tensor, " t"]:
        """1 for the burn-in frames; the k-th frame after it reaches 1 after (k + 1) * (ramp_steps // T) steps."""
        weights = torch.ones(frames, device=like.device)
        if self.training:
            later = torch.arange(1, frames - self.config.burn_in_frames + 1, device=like.device)
            pace = max(1, self.config.ramp_steps // self.config.max_frames)
            weights[self.config.burn_in_frames :] = (self.step / (pace * later)).clamp(0, 1)
        return weights

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


def match_template(
    window: Float[Tensor, "b k c s s"], template: Float[Tensor, "b k c s s"]
) -> Float[Tensor, "b k 1 s s"]:
    r"""Normalised cross-correlation of a particle's last glimpse with the window around it, scaled to [0, 1].

    The window is padded by replication so that displacements of -(S/2 - 1) .. S/2 pixels are scored; entry (S/2 - 1,
    S/2 - 1) is "has not moved". With window patches w and template k,

    .. math::  r = \frac{\sum w k}{\sqrt{\sum w^2 \sum k^2 + 10^{-10}} + 10^{-5}}

    and each map is then shifted and scaled to span [0, 1]. Carries no gradient. Source: DDLP, section 4.2.
    """
    with torch.no_grad(), torch.autocast(window.device.type, enabled=False):
        b, k, _, s, _ = window.shape
        before, after = s // 2 - 1, s // 2
        padded = F.pad(window.flatten(0, 1), (before, after, before, after), mode="replicate")
        kernel = template.flatten(0, 1).clamp(0, 1)
        product = F.conv2d(padded.flatten(0, 1).unsqueeze(0), kernel, groups=b * k)[0]
        window_energy = F.avg_pool2d(padded.square().sum(1, keepdim=True), s, stride=1)[:, 0] * (s * s)
        template_energy = kernel.square().sum((1, 2, 3)).view(-1, 1, 1)
        score = product / ((window_energy * template_energy + 1e-10).sqrt() + 1e-5)
        low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
        return ((score - low) / (high - low + 1e-5)).view(b, k, 1, s, s)


def _draw_gaussian(gaussian: Gaussian, sample: bool, generator: torch.Generator | None) -> Tensor:
    return gaussian_sample(*gaussian, generator) if sample else gaussian.mean


def _draw_attributes(
    found: Attributes, anchor: Tensor, sample: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, scale, depth and transparency: means, or samples. ``anchor`` is added to the position's mean."""
    position = _draw_gaussian(Gaussian(anchor + found.position, found.position_log_var), sample, generator)
    scale = _draw_gaussian(Gaussian(found.scale, found.scale_log_var), sample, generator)
    depth = _draw_gaussian(Gaussian(found.depth, found.depth_log_var), sample, generator)
    transparency = beta_sample(found.transparency_a, found.transparency_b, generator) if sample else found.transparency
    return position, scale, depth, transparency


def _draw(
    distribution: Distribution, position: Tensor, *, sample: bool, generator: torch.Generator | None
) -> DDLPLatents:
    """Latents from PINT's prediction, whose position is absolute."""
    absolute = distribution.attributes._replace(position=torch.zeros_like(position))
    return DDLPLatents(
        *_draw_attributes(absolute, position, sample, generator),
        _draw_gaussian(distribution.features, sample, generator),
        _draw_gaussian(distribution.background, sample, generator),
    )


def _later(distribution: Distribution, start: int) -> Distribution:
    """The frames from ``start`` on."""
    return Distribution(
        Attributes(*(field[:, start:] for field in distribution.attributes)),
        Gaussian(*(field[:, start:] for field in distribution.features)),
        Gaussian(*(field[:, start:] for field in distribution.background)),
    )


def _frame_pieces(latents: DDLPLatents) -> list[DDLPLatents]:
    """Batch and time as one axis, in pieces that are rendered at once (one piece where gradients are kept)."""
    flat = [field.flatten(0, 1).unsqueeze(0) for field in latents]
    total = flat[0].shape[1]
    size = total if torch.is_grad_enabled() else FRAMES_AT_ONCE
    return [DDLPLatents(*(field[:, i : i + size] for field in flat)) for i in range(0, total, size)]


def _logit(value: float) -> float:
    """log(v / (1 - v)), with the released code's guard."""
    return float(torch.tensor(value / (1 - value + 1e-5), dtype=torch.float64).log())


class PINT(nn.Module):
    """Particle interaction transformer: the particles of frames 1 .. t from those of frames 0 .. t-1.

    Every particle and the background are tokens; a token attends to all tokens of its own and earlier frames. Position
    in the sequence enters only through a learned relative bias, b(i, t; j, u) = time[u - t] + particle[j - i], added
    to the attention logits of each head. Logits are scaled by the head's width (the paper's formula shows the model's).
    Predictions of position, scale, depth and features are changes to the input; the transparency's are absolute.
    Source: DDLP, section 4.4 and appendix D.6.
    """

    def __init__(
        self,
        num_particles: int,
        max_frames: int,
        feature_dim: int,
        background_dim: int,
        dim: int,
        layers: int,
        heads: int,
        dropout: float,
        bias_init_std: float = 0.02,
        own_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.max_frames = max_frames
        sizes = (2, 2, 1, 1, feature_dim)  # position, scale, transparency, depth, features
        self.project_fields = nn.ModuleList(MLP(size, dim, size) for size in sizes)
        self.project_particle = MLP(sum(sizes), dim, dim)
        self.project_background = MLP(background_dim, dim, dim)
        self.blocks = nn.ModuleList(
            PINTBlock(dim, heads, num_particles + 1, max_frames, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.hidden = MLP(dim, dim, dim, final_activation=True)
        self.attributes = AttributeHeads(dim)
        self.features = nn.Linear(dim, 2 * feature_dim)
        self.background = nn.Linear(dim, 2 * background_dim)
        for block in self.blocks:
            cast(PINTBlock, block).init_biases(bias_init_std, own_bias)
        for module in [*self.blocks.modules(), self.mix]:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, latents: DDLPLatents) -> Distribution:
        """One prediction per input frame, of the frame after it.

        Raises:
            ValueError: more frames than PINT's biases cover.
        """
        frames = latents.depth.shape[1]
        if frames > self.max_frames:
            raise ValueError(f"PINT was built for up to {self.max_frames} frames, got {frames}")
        fields = (latents.position, latents.scale, latents.transparency[..., None], latents.depth[..., None])
        fields = (*fields, latents.features)
        with torch.autocast(latents.position.device.type, enabled=False):  # velocities are small differences
            projected = [net(field) for net, field in zip(self.project_fields, fields, strict=True)]
            particles = self.project_particle(torch.cat(projected, dim=-1))
            background = self.project_background(latents.background).unsqueeze(2)
        tokens = torch.cat([particles, background], dim=2)  # (b, t, k + 1, d)
        shape = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        for block in self.blocks:
            tokens = cast(PINTBlock, block)(tokens, frames)
        hidden = self.hidden(self.mix(self.norm(tokens))).unflatten(1, shape)
        change = self.attributes(hidden[:, :, :-1])
        attributes = change._replace(
            position=latents.position + change.position,
            scale=latents.scale + change.scale,
            depth=latents.depth + change.depth,
        )
        features, features_log_var = self.features(hidden[:, :, :-1]).float().chunk(2, dim=-1)
        background, background_log_var = self.background(hidden[:, :, -1]).float().chunk(2, dim=-1)
        return Distribution(
            attributes,
            Gaussian(latents.features + features, bound_log_var(features_log_var)),
            Gaussian(latents.background + background, bound_log_var(background_log_var)),
        )


class PINTBlock(nn.Module):
    """Pre-norm attention and MLP over (frame, entity) tokens, frames outermost."""

    def __init__(self, dim: int, heads: int, entities: int, max_frames: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.entities, self.max_frames, self.dropout = heads, entities, max_frames, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.time_bias = nn.Parameter(torch.empty(heads, 2 * max_frames - 1))
        self.entity_bias = nn.Parameter(torch.empty(heads, 2 * entities - 1))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.init_biases(0.02, 0.0)

    def init_biases(self, std: float, own: float) -> None:
        """Draw both tables from N(0, ``std``^2); add ``own`` where a token looks at its own entity."""
        with torch.no_grad():
            self.time_bias.normal_(0.0, std)
            self.entity_bias.normal_(0.0, std)
            self.entity_bias[:, self.entities - 1] += own

    def forward(self, tokens: Float[Tensor, "b n d"], frames: int) -> Float[Tensor, "b n d"]:
        dropout = self.dropout if self.training else 0.0
        normed = self.norm_attention(tokens)
        q, k, v = (
            rearrange(net(normed), "b n (h d) -> b h n d", h=self.heads) for net in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(frames), dropout_p=dropout)
        mixed = self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        tokens = tokens + F.dropout(mixed, dropout, self.training)
        return tokens + F.dropout(self.mlp(self.norm_mlp(tokens)), dropout, self.training)

    def bias(self, frames: int) -> Float[Tensor, "1 h n n"]:
        """Relative bias with the causal mask: rows are the token that looks, columns the one looked at."""
        device = self.time_bias.device
        t = torch.arange(frames, device=device)
        i = torch.arange(self.entities, device=device)
        time = self.time_bias[:, self.max_frames - 1 + t[None, :] - t[:, None]]  # (h, t, u)
        time = time.masked_fill(t[None, :] > t[:, None], float("-inf"))
        entity = self.entity_bias[:, self.entities - 1 + i[None, :] - i[:, None]]  # (h, i, j)
        bias = time[:, :, None, :, None] + entity[:, None, :, None, :]
        return rearrange(bias, "h t i u j -> 1 h (t i) (u j)")
