"""DDLP: deep dynamic latent particles (Daniel & Tamar, TMLR 2024).

A frame is a set of K particles, each with a position, scale, depth, transparency and features, plus a background
vector. The particles of the first frame are found by a patch prior and refined; later ones are *tracked*: each
particle looks for itself around its last position, guided by a normalised cross-correlation. A transformer (PINT)
predicts the next frame's particles from those so far, and its prediction is the prior that the encoder is pulled to.

    video --encode--> particles --rollout--> future particles --decode--> frames, masks

Reading order: DDLPConfig, DDLP.forward, then the private steps in the order in which forward uses them,
then ``pint.py``. The image model, of which this is one, is in ``dlp.py``; its parts in ``layers/particles.py``.

Where paper and released code differ we follow the code's architecture and loss weights (they made the published
numbers) and the paper's clip lengths and particle counts in the presets named after the paper. Defects of the released
code that are mended here, because they change no architecture:

- depth log-variance of PINT is read from its own head, not from the delta of the depth;
- the background's static KL sums over dimensions and frames and averages over the batch, not the reverse;
- score maps are normalised by the particle's own template energy, not by that of the whole batch;
- log-variances and log-concentrations are bounded (``LOG_VAR_RANGE``, ``LOG_CONCENTRATION_RANGE`` of the parts);
- upsampling counts come from integer logarithms, and K = 1 works;
- the proposal mixer (``proposal_filter="none"``) works for videos as for images, where the released code stops;
- more particles than proposals, or proposals than patches, are refused instead of silently cut;
- the encoder is deterministic wherever no noise is asked for, validation losses included.

The reconstruction term is the squared error or, as in the published runs on real images, a perceptual distance
(``recon_loss``), whose weights the model does not hold.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from objdyn.distributions import beta_kl, gaussian_kl
from objdyn.interface import Loss
from objdyn.layers.particles import Attributes
from objdyn.losses import zero_gradient
from objdyn.models.dlp import (
    DLP,
    Distribution,
    DLPConfig,
    Drawn,
    Gaussian,
    Particles,
    Posterior,
    Stage,
    describe_particles,
    draw_attributes,
    draw_gaussian,
)
from objdyn.models.pint import PINT, PINTWindow

SCORED_AT_ONCE = 8192
"""Pixels of glimpses whose score maps are computed together on a CPU, so that their spectra stay in its cache."""


@dataclass(frozen=True)
class DDLPConfig(DLPConfig):
    """Every setting of the video model: the image model's, tracking and PINT."""

    tracking: bool = True
    """Find a particle where it was in the last frame. False finds the particles of every frame anew, by the image
    model: the paper's ablation "no tracking" (table 2)."""
    max_frames: int = 20
    """Frames that PINT attends to (T); training clips have up to T + 1."""
    burn_in_frames: int = 4
    """First frames of a clip, which have the constant prior instead of PINT's (tau)."""
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
    pint_position: Literal["relative", "learned"] = "relative"
    """How PINT knows a token's frame and particle: by the relative biases, or by learned vectors added to the tokens,
    the paper's ablation "no RPE" (table 2), where ``pint_own_bias`` has no meaning."""
    pint_own_bias: float = 0.0
    """Added at initialisation to a token's bias towards its own particle in all frames; 0 as released."""
    ramp_steps: int = 10_000
    """Optimiser steps over which the frames after the burn-in gain weight, one after the other."""
    frozen_inference: bool = False
    """Not in the paper: training infers the particles without gradients and teaches PINT alone, by the dynamic KL of
    all frames after the burn-in with weight 1; nothing is decoded, and ``warmup_steps`` and ``noisy_steps`` are passed
    over. Beside latents that still move, PINT did not learn to predict in short runs; a *fresh* one did from stored
    latents, in 1,400 steps of 32 clips (``LOG.md``). So hold PINT as it was drawn until then, with
    ``optim.slow="pint."`` and ``optim.slow_factor=1e-9``: a long ramp alone does not, since Adam makes full steps of
    the smallest gradients. The loss on held-out clips keeps all terms.

    All other gradients are zero. A run that starts from another (``--init``) has a fresh Adam, and leaves the other
    weights exactly as they are. In a stage that follows others Adam would move them on by its averages: with
    ``optim.slow="pint."`` give that stage ``optim.lr=1e-9 optim.slow_factor=1e6``, at which they as good as stand still
    while PINT learns at 1e-3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.burn_in_frames < 1 or self.max_frames < self.burn_in_frames:
            raise ValueError(f"need 1 <= burn_in_frames <= max_frames, got {self.burn_in_frames} and {self.max_frames}")
        if self.pint_dim % self.pint_heads != 0:
            raise ValueError(f"pint_dim={self.pint_dim} must be divisible by pint_heads={self.pint_heads}")
        if self.pint_dropout < 0:
            raise ValueError(f"pint_dropout must not be negative, got {self.pint_dropout}")
        for name in ("pint_bias_init_std", "ramp_steps", "pint_layers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.frozen_inference and not self.kl_weight:
            raise ValueError("frozen_inference trains with the dynamic KL alone, and kl_weight is 0; give it a weight")


class DDLP(DLP):
    """The video model. ``step`` is the number of completed optimiser steps; the training loop writes it."""

    def __init__(self, config: DDLPConfig) -> None:
        super().__init__(config)
        c = self.config = config
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
            place=c.pint_position,
        )

    # ---- the four verbs ------------------------------------------------------------------------------------------

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        r"""Negative ELBO of a clip, averaged over clips and frames (section 4.4).

        .. math::  \frac{1}{t} \sum_t \gamma_t \left( \|x_t - \hat x_t\|^2 + \beta_{KL} KL(q_t \| p_t) \right)

        with the constant prior and :math:`\gamma_t = 1` in the burn-in frames, PINT's prior and the ramp's weight
        afterwards; all of it times ``loss_scale``. In evaluation mode the posterior's means are decoded and every
        weight is 1. With ``frozen_inference`` training has the KL to PINT's prior alone.

        Raises:
            ValueError: the clip has another size than the model, or no frame after the burn-in, or more than T + 1; or
                ``recon_loss`` has no weights.
        """
        frames = self._check(video)
        if not self.config.burn_in_frames < frames <= self.config.max_frames + 1:
            raise ValueError(
                f"a training clip must have {self.config.burn_in_frames + 1} to {self.config.max_frames + 1} frames "
                f"(burn_in_frames + 1 to max_frames + 1), got {frames}; change clip_frames or model.max_frames"
            )
        if self.training and self.config.frozen_inference:
            return self._frozen_loss(video)
        stage = self._stage()
        posterior = self._track(video, sample=self.training, stage=stage)
        prior = self.pint(posterior.latents.frames(None, -1))  # of frames 1 .. t-1
        weights = self._frame_weights(frames, video)

        recon = self._recon_error(video, posterior, stage)
        kl_static = self._static_kl(posterior, stage)
        kl_dynamic = self._dynamic_kl(posterior, prior)

        recon = (recon * weights).sum(1).mean()
        kl_static = kl_static.sum(1).mean()
        kl_dynamic = (kl_dynamic * weights[self.config.burn_in_frames :]).sum(1).mean()
        kl = kl_static + kl_dynamic
        total = self.config.loss_scale * (self.config.recon_weight * recon + self.config.kl_weight * kl)
        if stage.warmup:
            total = total + zero_gradient(self.background_decoder).to(total.device)
        terms = {"recon": recon / frames, "kl_static": kl_static / frames, "kl_dynamic": kl_dynamic / frames}
        terms = {name: value.detach() for name, value in terms.items()} | describe_particles(posterior.latents)
        return Loss(total / frames, terms)

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> Particles:
        """Particles of every frame, tracked from the first where ``tracking`` is on; clips may have any length.

        Causal: a frame's particles do not depend on later frames.

        Raises:
            ValueError: the frames have another size than the model was built for.
        """
        self._check(video)
        stage = Stage(warmup=False, noisy=False)
        return self._track(video, sample=generator is not None, stage=stage, generator=generator).latents

    def rollout(self, latents: Particles, horizon: int, *, generator: torch.Generator | None = None) -> Particles:
        """The next ``horizon`` frames, one at a time from the last T (section 4.4).

        Without gradients each step computes only what is new (``PINTWindow``); with gradients, or in training mode,
        the window is encoded anew each time. Both give the same frames.

        Raises:
            ValueError: ``horizon`` is smaller than 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 frame, got {horizon}")
        keep_gradients = torch.is_grad_enabled() or self.training  # training draws dropout anew for every window
        window = None if keep_gradients else PINTWindow(self.pint, latents, horizon)
        history = latents.frames(-self.config.max_frames, None)
        future: list[Particles] = []
        for _ in range(horizon):
            last = window.predict() if window else _later(self.pint(history), -1)
            new = _draw(last, last.attributes.position, sample=generator is not None, generator=generator)
            future.append(new)
            if window:
                window.append(new)
            else:
                history = _joined([history, new]).frames(-self.config.max_frames, None)
        return _joined(future)

    # ---- inference -----------------------------------------------------------------------------------------------

    def _track(
        self,
        video: Float[Tensor, "b t c h w"],
        *,
        sample: bool,
        stage: Stage,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """q(z_t | x_t, z_<t) for every frame (sections 4.1 and 4.2, appendix D.3); without tracking q(z_t | x_t)."""
        c = self.config
        t = video.shape[1]
        if not c.tracking:
            found = self._find(video, sample=sample, stage=stage, generator=generator)
            return found._replace(proposals=found.proposals[:, : c.burn_in_frames])
        proposals = self.prior(video[:, 0]).unsqueeze(1)
        with torch.no_grad():  # only frame 0's proposals become anchors; the others are targets without a gradient
            later = video[:, 1 : c.burn_in_frames]
            later = self.prior(later.flatten(0, 1)).unflatten(0, later.shape[:2]) if t > 1 else proposals[:, 1:]
        proposals = torch.cat([proposals, later], dim=1)
        anchor, scale = self._refine(video[:, 0], proposals[:, 0], stage)

        anchors, attributes, drawn, glimpses = [], [], [], []
        score_map = None
        for index in range(t):
            frame = video[:, index]
            window = self._cut(frame, anchor.detach(), scale)
            if index > 0 and c.use_score_map and not stage.noisy:
                score_map = match_template(window, glimpses[-1])
            found = self.attribute_encoder(window, score_map)
            placed = self._draw_attributes(found, anchor, stage, sample, generator)
            anchors.append(anchor)
            attributes.append(found)
            drawn.append(placed)
            glimpses.append(self._cut_appearance(frame, placed, stage))
            anchor = placed.position.detach()
            scale = self._fixed_scale(frame) if stage.noisy else placed.scale.detach().sigmoid()

        return self._complete(
            video,
            torch.stack(anchors, dim=1),
            Attributes(*(torch.stack(field, dim=1) for field in zip(*attributes, strict=True))),
            Drawn(*(torch.stack(field, dim=1) for field in zip(*drawn, strict=True))),
            torch.stack(glimpses, dim=1),
            proposals,
            sample=sample,
            generator=generator,
        )

    # ---- loss terms ----------------------------------------------------------------------------------------------

    def _frozen_loss(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        """The dynamic KL with a gradient to PINT alone, and a zero gradient to all other parameters."""
        with torch.no_grad():
            posterior = self._track(video, sample=True, stage=Stage(warmup=False, noisy=False))
        prior = self.pint(posterior.latents.frames(None, -1))
        kl_dynamic = self._dynamic_kl(posterior, prior).sum(1).mean() / video.shape[1]
        total = self.config.loss_scale * self.config.kl_weight * kl_dynamic
        for part in self.children():
            if part is not self.pint:
                total = total + zero_gradient(part).to(total.device)
        return Loss(total, {"kl_dynamic": kl_dynamic.detach()} | describe_particles(posterior.latents))

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
        windows, templates = window.flatten(0, 1), template.flatten(0, 1)
        at_once = max(1, SCORED_AT_ONCE // (s * s)) if window.device.type == "cpu" else b * k
        pieces = zip(windows.split(at_once), templates.split(at_once), strict=True)
        return torch.cat([_score_maps(*piece) for piece in pieces]).view(b, k, 1, s, s)


def _score_maps(window: Float[Tensor, "n c s s"], template: Float[Tensor, "n c s s"]) -> Float[Tensor, "n s s"]:
    # How products and energies are computed is chosen by CPU milliseconds on one core (AMD EPYC, torch 2.13):
    #   side, maps     (2S+1)^2 grouped convolutions   those of the S^2 kept   Fourier, fp64   fp32   fp64 in pieces
    #    8, 200                    17                          2.5                 1.6          1.2        2.3
    #   16, 192                   350                         27                  19            4.9        7.5
    #   32, 100                 2,160                        290                  61           15         17
    # so Fourier at every size, in pieces that stay in a core's cache. Not in fp32: its error is a share of the largest
    # product, and beside a black background, where the energy is next to nothing, that is as large as a true score.
    # The energies of all windows are two products with a matrix of ones along a band (a box filter; the same in fp32:
    # it only sums what is not negative). An average pooling takes 10 times as long at 16 pixels, 60 times at 32.
    s = window.shape[-1]
    before, after = s // 2 - 1, s // 2
    padded = F.pad(window, (before, after, before, after), mode="replicate")
    kernel = template.clamp(0, 1)
    spectrum = torch.fft.rfft2(padded.double(), s=(2 * s, 2 * s))
    spectrum = torch.linalg.vecdot(torch.fft.rfft2(kernel.double(), s=(2 * s, 2 * s)), spectrum, dim=1)
    product = torch.fft.irfft2(spectrum, s=(2 * s, 2 * s))[:, :s, :s].to(window.dtype)
    band = window.new_ones(s, 2 * s - 1).triu().tril(s - 1)
    window_energy = band @ padded.square().sum(1) @ band.T
    template_energy = kernel.square().sum((1, 2, 3)).view(-1, 1, 1)
    score = product / ((window_energy * template_energy + 1e-10).sqrt() + 1e-5)
    low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
    return (score - low) / (high - low + 1e-5)


def _draw(
    distribution: Distribution, position: Tensor, *, sample: bool, generator: torch.Generator | None
) -> Particles:
    """Latents from PINT's prediction, whose position is absolute."""
    absolute = distribution.attributes._replace(position=torch.zeros_like(position))
    return Particles(
        *draw_attributes(absolute, position, sample, generator),
        draw_gaussian(distribution.features, sample, generator),
        draw_gaussian(distribution.background, sample, generator),
    )


def _joined(pieces: list[Particles]) -> Particles:
    """Frames one after the other."""
    return Particles(*(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)))


def _later(distribution: Distribution, start: int) -> Distribution:
    """The frames from ``start`` on."""
    return Distribution(
        Attributes(*(field[:, start:] for field in distribution.attributes)),
        Gaussian(*(field[:, start:] for field in distribution.features)),
        Gaussian(*(field[:, start:] for field in distribution.background)),
    )
