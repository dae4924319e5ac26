r"""SSM: objects that move by linear dynamics, and a network that draws them.

Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019).

Each object has a noisy position :math:`a_t` that follows a linear Gaussian state-space model shared by all objects, and
a network renders the positions of all objects into a binary frame. Only the positions are inferred by a network;
whatever is asked about the states behind them (filter, predict, fill a gap) is exact (``objdyn/kalman.py``).

    video --InferenceNetwork--> q(a) --kalman.filter--> states --kalman.forecast--> future states
                                 a --Renderer--> frames, each object alone

Reading order: SSMConfig, SSMLatents, SSM, then Prior, Renderer and InferenceNetwork.

The model finds positions up to one affine map, the same for all videos, so nothing in the latents is in pixels.
Objects are ordered by the inference network; the renderer draws later ones over earlier ones.

Clips of different numbers of objects share a batch: objects beyond a clip's own are padding. They come last, no other
object looks at them, they leave the canvas as it is and add nothing to the loss; ``SSMLatents.present`` tells them.

What the paper leaves open is resolved so: d^(-1/4) is the deviation of initial weights (``layers.binary.init_matrix``),
also of the initial states, which the paper does not mention; the standard deviation of q is softplus + 1e-4;
covariances are Cholesky factors with a softplus on the diagonal and a floor; the KL weight falls geometrically. Where
the paper interpolates with the likeliest mixture component of the first frames, ``interpolate`` averages over the
components given all seen frames, unless asked for the former.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from objdyn import kalman
from objdyn.interface import Loss, Scene, check_choices
from objdyn.kalman import LGSSM
from objdyn.layers.binary import bernoulli_nll, binary_frames, init_matrix, to_video
from objdyn.losses import zero_gradient

MIN_STD = 1e-4
"""Smallest standard deviation of an inferred position."""
TRANSITION_FLOOR, EMISSION_FLOOR, INITIAL_FLOOR = 1e-8, 1e-6, 1e-6
"""Added to the diagonal of each covariance; the emission's bounds the condition of the likelihood."""


@dataclass(frozen=True)
class SSMConfig:
    """Settings of a state-space model of video; the defaults are the paper's."""

    image_size: int = 48
    """Side of the square binary frames, in pixels."""
    max_objects: int = 3
    """Largest number of objects N in a clip."""
    known_count: bool = True
    """Take the number of objects of each clip from ``num_objects``; otherwise every clip has ``max_objects``, of which
    some have nothing to show: for data whose counts are unknown."""
    threshold: float | None = None
    """Brightness in (0, 1) above which a pixel is white; None refuses frames that are not binary."""
    inference_dim: int = 1024
    """Width of the inference network's states s."""
    renderer_dim: int = 1024
    """Width of the renderer's states x (the paper does not say)."""
    num_components: int = 2
    """K, components of the mixture from which an object's first state is drawn."""
    component: Literal["best", "average"] = "best"
    """An object's state given its likeliest component (paper), or averaged over the components."""
    initial_step: float = 0.1
    """delta, the time between two frames, before training."""
    transition_var: float = 1e-3
    """Variance of the noise of states before training."""
    emission_var: float = 1.0
    """Variance of positions around their states before training."""
    initial_var: float = 1.0
    """Variance of first states within a component before training."""
    diagonal_noise: bool = False
    """Diagonal covariances of the noise of states and of positions."""
    learn_transition_cov: bool = True
    """Learn the noise of states; otherwise it has ``transition_var`` throughout, which a stage of a run may change."""
    frozen_steps: int = 10_000
    """Optimiser steps at the start in which the dynamics (``Prior``) are not learned."""
    frozen_kl_weight: float = 1.0
    """Weight of the KL in those steps (the paper does not say)."""
    initial_kl_weight: float = 100.0
    """Weight of the KL after them; the paper's beta."""
    anneal_steps: int = 50_000
    """Optimiser steps in which the weight then goes to ``kl_weight``, by the same factor in each (the paper gives no
    length and no shape)."""
    kl_weight: float = 1.0
    """Weight of the KL from then on; 1 is the bound."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("image_size", "max_objects", "inference_dim", "renderer_dim", "num_components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("initial_step", "frozen_kl_weight", "initial_kl_weight", "kl_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, floor in (
            ("transition_var", TRANSITION_FLOOR), ("emission_var", EMISSION_FLOOR), ("initial_var", INITIAL_FLOOR)
        ):  # fmt: skip
            if not floor < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be more than {floor}, its floor, and finite, got {getattr(self, name)}")
        for name in ("frozen_steps", "anneal_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (none) or more, got {getattr(self, name)}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a brightness in (0, 1) or None, got {self.threshold}")


class SSMLatents(NamedTuple):
    """Objects of every frame; zeros where ``present`` is false.

    The two axes of positions, and of velocities per unit of time delta, are the model's own.
    """

    location: Float[Tensor, "b t k 2"]
    """a, the position that is decoded: the mean, or a sample with a generator."""
    mean: Float[Tensor, "b t k 2"]
    """Of a: what the inference network says, or the dynamics where no frame was seen."""
    log_var: Float[Tensor, "b t k 2"]
    present: Bool[Tensor, "b t k"]
    """Whether there is such an object in the clip; the same in all frames."""
    state: Float[Tensor, "b t k 4"]
    """(position, velocity): filtered by ``encode``, predicted by ``rollout``, smoothed by ``interpolate``."""
    state_cov: Float[Tensor, "b t k 4 4"]
    component_logits: Float[Tensor, "b t k z"]
    """log p(component | positions used so far), normalised."""
    component_state: Float[Tensor, "b t k z 4"]
    """``state`` given each component of the mixture."""
    component_cov: Float[Tensor, "b t k z 4 4"]


class Inferred(NamedTuple):
    """q(a) of every frame, and where the inference network stands after the last one."""

    mean: Float[Tensor, "b t k 2"]
    std: Float[Tensor, "b t k 2"]
    state: Float[Tensor, "k b d"]


class Components(NamedTuple):
    """States given each component z of the mixture; float64."""

    logits: Float[Tensor, "*batch z"]
    """log p(z | positions), normalised."""
    mean: Float[Tensor, "*batch z 4"]
    cov: Float[Tensor, "*batch z 4 4"]

    def pick(self, how: Literal["best", "average"]) -> tuple[Float[Tensor, "*batch 4"], Float[Tensor, "*batch 4 4"]]:
        """Mean and covariance of the likeliest component, or of the whole mixture."""
        if how == "average":
            return kalman.mix(self.logits, self.mean, self.cov)
        best = self.logits.argmax(-1)[..., None, None]
        mean = self.mean.take_along_dim(best, -2).squeeze(-2)
        return mean, self.cov.take_along_dim(best.unsqueeze(-1), -3).squeeze(-3)


class SSM(nn.Module):
    """The video model. ``step`` is the number of completed optimiser steps; the training loop writes it.

    The dynamics are the parameters ``prior.*``, so that ``optim.slow="prior."`` gives them a learning rate of their
    own.
    """

    step: Tensor

    def __init__(self, config: SSMConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.image_size**2
        self.inference = InferenceNetwork(pixels, config.inference_dim, config.max_objects)
        self.renderer = Renderer(pixels, config.renderer_dim)
        self.prior = Prior(config)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, video: Float[Tensor, "b t c h w"], num_objects: Int[Tensor, " b"] | None = None) -> Loss:
        r"""The negative bound (equation 7), in nats per clip: a sum over frames and objects, a mean over clips.

        .. math::
            -E_q[\log p(v \mid a)] + \beta \left( E_q[\log q(a \mid v)] - E_q[\log p(a)] \right)

        The middle term is analytic, the others take one sample of a (its mean outside training). ``terms`` holds, in
        nats per frame, ``recon``, ``kl`` and its two parts ``neg_entropy`` and ``neg_log_prior``; the first two also
        per clip; ``kl_weight``; and what shows a drift of the latents' scale: ``smallest_std`` of q, and ``spread``,
        the variance of its means over the batch.

        Where a covariance of the prior is numerically not positive definite any more, or a parameter of the prior is
        not finite, the loss is NaN, so that a training loop skips the step, and a term that is NaN too has the name of
        what is broken: ``prior.transition_cov``, ``prior.force``.

        Raises:
            ValueError: the frames are not binary (``layers.binary.binary_frames``), or ``num_objects`` is missing or
                out of range.
        """
        frames = binary_frames(video, self.config.image_size, self.config.threshold)
        counts, most = self._counts(num_objects, video)
        present = _present(counts, most, frames.shape[1])
        found = self.inference(frames, self.inference.start(counts, most))
        location = found.mean
        if self.training:
            location = location + found.std * _noise(found.std)
        recon = bernoulli_nll(self.renderer(location, present), frames).sum(1)
        neg_entropy = -(0.5 * (1 + math.log(2 * math.pi)) + found.std.log()).sum(3).mul(present).sum((1, 2))

        frozen = int(self.step) < self.config.frozen_steps
        unused = self._unused(frozen, most)
        try:
            positions = rearrange(location, "b t k p -> b k t p").double()
            log_prior = kalman.log_likelihood(self.prior(frozen), positions).to(recon.dtype).mul(present[:, 0]).sum(1)
            broken = [] if log_prior.isfinite().all() else self._not_finite()
        except kalman.FieldError as error:
            log_prior = torch.full_like(recon, torch.nan)
            broken = self._not_finite() or [f"prior.{error.field}"]
            unused.append(self.prior)
        weight = self.kl_weight(int(self.step))
        kl = neg_entropy - log_prior
        total = (recon + weight * kl).mean() + sum(map(zero_gradient, unused))
        with torch.no_grad():
            per_clip = {"recon": recon, "kl": kl, "neg_entropy": neg_entropy, "neg_log_prior": -log_prior}
            here = present.unsqueeze(-1)
            centred = found.mean - (found.mean * here).sum((0, 1, 2)) / here.sum()
            terms = {
                **dict.fromkeys(broken, recon.new_tensor(torch.nan)),  # first, where a message lists a few
                **{name: values.mean() / frames.shape[1] for name, values in per_clip.items()},
                "recon_clip": recon.mean(),
                "kl_clip": kl.mean(),
                "kl_weight": recon.new_tensor(weight),
                "smallest_std": found.std.masked_fill(~here, torch.inf).min(),
                "spread": (centred.square() * here).sum() / (2 * here.sum()),
            }
        return Loss(total, terms)

    def encode(
        self,
        video: Float[Tensor, "b t c h w"],
        num_objects: Int[Tensor, " b"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> SSMLatents:
        """Positions of every frame from that frame and those before it, and the filtered states.

        All clips have ``max_objects`` objects here, of which ``present`` tells the true ones.

        Raises:
            ValueError: as ``forward``.
        """
        frames = binary_frames(video, self.config.image_size, self.config.threshold)
        counts, _ = self._counts(num_objects, video)
        found = self.inference(frames, self.inference.start(counts, self.config.max_objects))
        location = _draw(found, generator)
        components = filter_positions(self.prior(), location)
        present = _present(counts, self.config.max_objects, frames.shape[1])
        return _latents(location, found.mean, found.std.square(), present, components, self.config.component)

    def rollout(self, latents: SSMLatents, horizon: int, *, generator: torch.Generator | None = None) -> SSMLatents:
        """Go on from the last frame by the learned dynamics (section 3.4), without noise.

        With a generator the component, the last state and the noise of states and positions are drawn from it; the
        states drawn have no covariance.

        Raises:
            ValueError: ``horizon`` is less than 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        prior = self.prior()
        last = Components(*(field[:, -1].double() for field in latents[-3:]))
        present = latents.present[:, -1:].expand(-1, horizon, -1)
        if generator is None:
            components = forecast_components(prior, last, horizon)
        else:
            components = draw_path(prior, last, horizon, generator)
        mean, var = position_moments(prior, components, self.config.component)
        location = mean
        if generator is not None:
            location = mean + _correlated(_noise(mean, generator), prior.emission_cov)
        location = location.to(latents.location.dtype)
        return _latents(location, mean, var, present, components, self.config.component)

    def decode(self, latents: SSMLatents, components: bool = False) -> Scene:
        """White's probability in each pixel, in three equal channels.

        ``components`` are the empty canvas, entry 0, and each object rendered alone on it. Their masks divide a pixel:
        the background has what is black, 1 - p, and the objects share p in proportion to what each has there alone. The
        mask of an object that is not present is 0.
        """
        size = self.config.image_size
        white = self.renderer(latents.location, latents.present).sigmoid()
        if not components:
            return Scene(to_video(white, size))
        alone = self.renderer.alone(latents.location, latents.present)
        absent = ~latents.present.unsqueeze(-1)
        share = F.logsigmoid(alone[:, :, 1:]).masked_fill(absent, -torch.inf).softmax(2)
        masks = torch.cat([1 - white.unsqueeze(2), white.unsqueeze(2) * share], dim=2)
        masks = rearrange(masks, "b t k (h w) -> b t k 1 h w", h=size)
        return Scene(to_video(white, size), masks, to_video(alone.sigmoid(), size))

    def interpolate(
        self,
        video: Float[Tensor, "b t c h w"],
        seen: Bool[Tensor, " t"],
        num_objects: Int[Tensor, " b"] | None = None,
        *,
        component: Literal["all", "first"] = "all",
        generator: torch.Generator | None = None,
    ) -> SSMLatents:
        """Fill gaps from what was seen before and after them (section 3.5).

        The frames of a gap are first predicted from those before it, as by ``rollout``, and rendered; the inference
        network looks at these instead, so that its state is warm where the video goes on. Then the states of all frames
        are smoothed, given the positions of seen frames alone. No frame is looked at that is not ``seen``.

        Args:
            video: whole clips; hidden frames may hold anything that is binary.
            seen: which frames are known, the same for all clips. The paper knows the first and the last 5 of 30.
            num_objects: as for ``encode``.
            component: ``"all"`` averages states over the components of the mixture given all seen frames; ``"first"``
                takes the likeliest one given the frames before the first gap, as the paper does.
            generator: draws the positions of seen frames, then paths through the gaps; None takes means.

        Returns:
            Latents of all frames. States are smoothed everywhere; ``location``, ``mean`` and ``log_var`` are the
            inference network's where a frame was seen, and those of the smoothed states elsewhere.

        Raises:
            ValueError: as ``forward``; or ``seen`` does not fit the video, or hides its first frame.
        """
        frames = binary_frames(video, self.config.image_size, self.config.threshold)
        counts, _ = self._counts(num_objects, video)
        flags = _flags(seen, video.shape[1])
        prior, observed = self.prior(), seen.to(video.device)
        found, location = self._infer_across_gaps(frames, flags, counts, prior, generator)
        positions = rearrange(location, "b t k p -> b k t p").double()
        smoothed = kalman.smooth(prior, positions, observed)
        known = flags.index(False) if component == "first" and False in flags else len(flags)
        logits = kalman.component_posterior(prior, positions[..., :known, :], observed[:known])
        components = Components(
            logits.unsqueeze(1).expand(-1, len(flags), -1, -1),
            rearrange(smoothed.mean, "b k z t d -> b t k z d"),
            rearrange(smoothed.cov, "b k z t d e -> b t k z d e"),
        )
        how = "average" if component == "all" else "best"
        mean, var = position_moments(prior, components, how)
        drawn = mean
        if generator is not None:
            chosen = None if component == "all" else logits.argmax(-1)
            _, path = kalman.sample_posterior(prior, positions, observed, chosen, generator)
            drawn = rearrange(path[..., :2], "b k t p -> b t k p")
            drawn = drawn + _correlated(_noise(drawn, generator), prior.emission_cov)
        here = observed[:, None, None]
        return _latents(
            torch.where(here, location, drawn.to(location.dtype)),
            torch.where(here, found.mean, mean.to(location.dtype)),
            torch.where(here, found.std.square(), var.to(location.dtype)),
            _present(counts, self.config.max_objects, len(flags)),
            components,
            how,
        )

    def kl_weight(self, step: int) -> float:
        """The paper's beta in the optimiser step that follows ``step`` completed ones."""
        config = self.config
        after = step - config.frozen_steps
        if after < 0:
            return config.frozen_kl_weight
        if after >= config.anneal_steps:
            return config.kl_weight
        return config.initial_kl_weight * (config.kl_weight / config.initial_kl_weight) ** (after / config.anneal_steps)

    def _counts(self, num_objects: Tensor | None, video: Tensor) -> tuple[Int[Tensor, " b"], int]:
        """Objects of each clip, and the largest of these numbers."""
        most, clips = self.config.max_objects, video.shape[0]
        if not self.config.known_count:
            return torch.full((clips,), most, device=video.device), most
        if num_objects is None:
            raise ValueError(
                "the model needs num_objects, the number of objects of each clip; give it, or set "
                "model.known_count=false, which takes every clip for one of max_objects"
            )
        if num_objects.shape != (clips,) or num_objects.is_floating_point():
            raise ValueError(
                f"num_objects must be whole numbers ({clips},), one for each clip, got {num_objects.dtype} "
                f"{tuple(num_objects.shape)}"
            )
        low, high = (int(bound) for bound in num_objects.aminmax())
        if low < 1 or high > most:
            raise ValueError(
                f"num_objects must be 1 to max_objects={most}, got {low if low < 1 else high}; train a model with a "
                "larger model.max_objects, or leave such clips out"
            )
        return num_objects.to(video.device), high

    def _unused(self, frozen: bool, most: int) -> list[nn.Module]:
        """The parts that a step leaves without a gradient."""
        unused: list[nn.Module] = [self.inference.before] if most == 1 else []
        if frozen:
            return [*unused, self.prior]
        return unused if self.config.learn_transition_cov else [*unused, self.prior.transition_cov]

    def _not_finite(self) -> list[str]:
        """Names of the prior's parameters that are not finite."""
        named = self.named_parameters()
        return [name for name, parameter in named if name.startswith("prior.") and not parameter.isfinite().all()]

    def _infer_across_gaps(
        self,
        frames: Float[Tensor, "b t p"],
        flags: list[bool],
        counts: Int[Tensor, " b"],
        prior: LGSSM,
        generator: torch.Generator | None,
    ) -> tuple[Inferred, Float[Tensor, "b t k 2"]]:
        """What the inference network says of all frames, gaps filled with predicted ones, and positions drawn of it."""
        state = self.inference.start(counts, self.config.max_objects)
        parts: list[Inferred] = []
        location = frames.new_zeros(len(frames), 0, self.config.max_objects, 2)
        for known, run in itertools.groupby(flags):
            begin, length = location.shape[1], len(list(run))
            part = frames[:, begin : begin + length]
            if not known:
                past = filter_positions(prior, location, torch.tensor(flags[:begin], device=frames.device))
                ahead = forecast_components(prior, Components(*(field[:, -1] for field in past)), length)
                mean, _ = position_moments(prior, ahead, self.config.component)
                present = _present(counts, self.config.max_objects, length)
                part = self.renderer(mean.to(frames.dtype), present).sigmoid()
            parts.append(self.inference(part, state))
            state = parts[-1].state
            drawn = _draw(parts[-1], generator)
            location = torch.cat([location, drawn], dim=1)
        mean, std = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("mean", "std"))
        return Inferred(mean, std, state), location


class Prior(nn.Module):
    r"""The dynamics of one object (equations 3 and 4), shared by all: Newton's laws with a constant force.

    .. math::
        A = \begin{pmatrix} I & \delta I \\ 0 & I \end{pmatrix}, \quad B = \begin{pmatrix} I & 0 \end{pmatrix}

    Learned are :math:`\delta`, the force u, both noise covariances, and weights, means and covariances of the mixture
    for the first state. Before training the force is zero, velocities have mean zero, and positions of the components
    are drawn from N(0, I), which tells them apart.
    """

    def __init__(self, config: SSMConfig) -> None:
        super().__init__()
        components, diagonal = config.num_components, config.diagonal_noise
        self.fixed_var = None if config.learn_transition_cov else config.transition_var
        self.log_step = nn.Parameter(torch.tensor(math.log(config.initial_step)))
        self.force = nn.Parameter(torch.zeros(4))
        self.transition_cov = Covariance((), 4, config.transition_var, TRANSITION_FLOOR, diagonal)
        self.emission_cov = Covariance((), 2, config.emission_var, EMISSION_FLOOR, diagonal)
        self.initial_logits = nn.Parameter(torch.zeros(components))
        self.initial_mean = nn.Parameter(torch.cat([torch.randn(components, 2), torch.zeros(components, 2)], dim=1))
        self.initial_cov = Covariance((components,), 4, config.initial_var, INITIAL_FLOOR)

    def forward(self, frozen: bool = False) -> LGSSM:
        """The model in float64; without a gradient where it is frozen."""
        eye = torch.eye(4, dtype=torch.float64, device=self.force.device)
        moves = eye.roll(2, dims=1).triu()  # position from velocity
        model = LGSSM(
            transition=eye + self.log_step.double().exp() * moves,
            offset=self.force.double(),
            emission=eye[:2],
            transition_cov=self.transition_cov() if self.fixed_var is None else self.fixed_var * eye,
            emission_cov=self.emission_cov(),
            initial_logits=self.initial_logits.double(),
            initial_mean=self.initial_mean.double(),
            initial_cov=self.initial_cov(),
        )
        return LGSSM(*(field.detach() for field in model)) if frozen else model


class Covariance(nn.Module):
    """Covariance matrices L L^T + floor I, positive definite for all values of the parameters; float64.

    Args:
        shape: leading axes.
        dim: side of a matrix.
        variance: of every entry before training; they are not correlated then.
        floor: smallest eigenvalue.
        diagonal: never correlated.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, variance: float, floor: float, diagonal: bool = False) -> None:
        super().__init__()
        self.floor = floor
        scale = math.sqrt(variance - floor)
        self.raw_diagonal = nn.Parameter(torch.full((*shape, dim), scale + math.log(-math.expm1(-scale))))
        self.lower = None if diagonal else nn.Parameter(torch.zeros(*shape, dim * (dim - 1) // 2))

    def forward(self) -> Float[Tensor, "*shape d d"]:
        factor = F.softplus(self.raw_diagonal.double()).diag_embed()
        dim = factor.shape[-1]
        if self.lower is not None:
            row, column = torch.tril_indices(dim, dim, -1, device=factor.device)
            factor[..., row, column] = self.lower.double()
        return factor @ factor.mT + self.floor * torch.eye(dim, dtype=factor.dtype, device=factor.device)


class Renderer(nn.Module):
    r"""From positions to the logits of a frame's pixels (equations 1 and 2), frame by frame.

    .. math::
        \alpha^n = \sigma(W^\alpha a^n + b^\alpha), \quad \hat x^n = \tanh(W^x a^n + b^x), \quad
        x^n = (1 - \alpha^n) x^{n-1} + \alpha^n \hat x^n, \quad x^0 = \tanh \theta
    """

    def __init__(self, pixels: int, dim: int) -> None:
        super().__init__()
        self.canvas = nn.Parameter(torch.empty(dim))
        self.objects = nn.Linear(2, 2 * dim)
        """Of attention and content."""
        self.pixels = nn.Linear(dim, pixels)
        init_matrix(self.canvas)
        init_matrix(self.objects.weight, 2 * dim)
        init_matrix(self.pixels.weight)
        for layer in (self.objects, self.pixels):
            nn.init.zeros_(layer.bias)

    def forward(self, location: Float[Tensor, "b t k 2"], present: Bool[Tensor, "b t k"]) -> Float[Tensor, "b t p"]:
        """Logits of the frames; an object that is not present leaves the canvas as it is."""
        attention, content = self._look(location, present)
        canvas = self.canvas.tanh()
        for alpha, candidate in zip(attention.unbind(2), content.unbind(2), strict=True):
            canvas = torch.lerp(canvas, candidate, alpha)
        return self.pixels(canvas).to(location.dtype)

    def alone(self, location: Float[Tensor, "b t k 2"], present: Bool[Tensor, "b t k"]) -> Float[Tensor, "b t n p"]:
        """Logits of the empty canvas, then of each object alone on it: n = k + 1."""
        attention, content = self._look(location, present)
        canvas = self.canvas.tanh().expand_as(attention[:, :, :1])
        canvas = torch.cat([canvas, torch.lerp(canvas, content, attention)], dim=2)
        return self.pixels(canvas).to(location.dtype)

    def _look(self, location: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(location.device.type, enabled=False):  # positions in bfloat16 would jump
            attention, content = self.objects(location).chunk(2, dim=-1)
        return attention.sigmoid() * present.unsqueeze(-1), content.tanh()


class InferenceNetwork(nn.Module):
    r"""q(a), recurrent over frames and objects (equations 8 and 9).

    .. math::
        \beta_t^n = \sigma(W^\beta [s_{t-1}^n, s_t^{n-1}, v_t] + b^\beta), \quad
        \hat s_t^n = \tanh(W^s [s_{t-1}^n, s_t^{n-1}, v_t] + b^s), \quad
        s_t^n = (1 - \beta_t^n) s_t^{n-1} + \beta_t^n \hat s_t^n

    with :math:`s_t^0 = 0`, and :math:`s_0^n = \tanh \phi^n` learned for each total number of objects (footnote 2).

    Computed not in the order of frames and objects but in waves: object n of frame t needs object n of frame t - 1 and
    object n - 1 of frame t, so all n with the same t + n are one product, and T + N - 1 waves do the work of T N steps.
    Gate and candidate are one product too, and that of the frames is made once for all waves and objects.
    """

    def __init__(self, pixels: int, dim: int, max_objects: int) -> None:
        super().__init__()
        self.frame = nn.Linear(pixels, 2 * dim)
        """Columns of the frame in the weights of gate and candidate, and both biases."""
        self.past = nn.Linear(dim, 2 * dim, bias=False)
        """Columns of the same object in the frame before."""
        self.before = nn.Linear(dim, 2 * dim, bias=False)
        """Columns of the object before in the same frame."""
        self.starts = nn.Parameter(torch.empty(max_objects * (max_objects + 1) // 2, dim))
        """phi: a row for the object of clips with one, then two for clips with two, and so on."""
        self.heads = nn.Linear(dim, 4)
        """Mean, and the standard deviation before its softplus."""
        for layer in (self.frame, self.past, self.before):
            init_matrix(layer.weight, dim * (2 * dim + pixels))
        init_matrix(self.heads.weight, 2 * dim)
        for layer in (self.frame, self.heads):
            nn.init.zeros_(layer.bias)
        init_matrix(self.starts, dim)

    def start(self, counts: Int[Tensor, " b"], objects: int) -> Float[Tensor, "k b d"]:
        """The states before the first frame; objects beyond a clip's own get the last one's."""
        number = torch.arange(objects, device=counts.device).unsqueeze(-1)
        return self.starts[counts * (counts - 1) // 2 + number.minimum(counts - 1)].tanh()

    def forward(self, frames: Float[Tensor, "b t p"], state: Float[Tensor, "k b d"]) -> Inferred:
        """Distribution q of all objects in all frames, going on from ``state``."""
        length, objects = frames.shape[1], len(state)
        # Backwards in time: in a wave the frame falls as the object rises, and a slice holds what it needs in order.
        seen = rearrange(self.frame(frames).flip(1), "b t d -> t b d")
        past_weight, before_weight = self.past.weight.t(), self.before.weight.t()
        states = torch.cat([torch.zeros_like(state[:1]), state])  # of no object, then of each object's latest frame
        found: list[list[Tensor]] = [[] for _ in range(objects)]
        for wave in range(length + objects - 1):
            first, stop = max(0, wave - length + 1), min(objects, wave + 1)
            now = seen[length - 1 - wave + first : length - 1 - wave + stop]
            before = states[first:stop]
            rows = torch.addmm(now.flatten(0, 1), states[first + 1 : stop + 1].flatten(0, 1), past_weight)
            alone = len(state[0]) if first == 0 else 0  # rows of the first object, which has none before it
            if alone < len(rows):
                rest = torch.addmm(rows[alone:], before.flatten(0, 1)[alone:], before_weight)
                rows = torch.cat([rows[:alone], rest]) if alone else rest
            gate, candidate = rows.to(state.dtype).unflatten(0, before.shape[:2]).chunk(2, dim=-1)
            new = torch.lerp(before, candidate.tanh(), gate.sigmoid())
            states = torch.cat([states[: first + 1], new, states[stop + 1 :]])
            for mine, row in zip(found[first:stop], new.unbind(), strict=True):
                mine.append(row)
        hidden = torch.stack([row for mine in found for row in mine]).unflatten(0, (objects, length))
        with torch.autocast(frames.device.type, enabled=False):
            mean, raw = rearrange(self.heads(hidden), "k t b p -> b t k p").chunk(2, dim=-1)
        return Inferred(mean, F.softplus(raw) + MIN_STD, states[1:])


def filter_positions(
    prior: LGSSM, location: Float[Tensor, "b t k 2"], observed: Bool[Tensor, " t"] | None = None
) -> Components:
    """State and component of each object (b, t, k) given its positions so far; unobserved ones are left out."""
    positions = location.double()
    found = kalman.filter(prior, rearrange(positions, "b t k p -> b k t p"), observed)
    logits = torch.distributions.MultivariateNormal(
        found.predicted_mean[..., :2], found.predicted_cov[..., :2, :2] + prior.emission_cov, validate_args=False
    ).log_prob(rearrange(positions, "b t k p -> b k 1 t p"))
    if observed is not None:
        logits = logits * observed
    logits = prior.initial_logits + rearrange(logits.cumsum(-1), "b k z t -> b t k z")
    return Components(
        logits.log_softmax(-1),
        rearrange(found.mean, "b k z t d -> b t k z d"),
        rearrange(found.cov, "b k z t d e -> b t k z d e"),
    )


def forecast_components(prior: LGSSM, last: Components, horizon: int) -> Components:
    """The ``horizon`` frames (b, t, k) after states (b, k)."""
    mean, cov = kalman.forecast(prior, last.mean, last.cov, horizon)
    return Components(
        last.logits.unsqueeze(1).expand(-1, horizon, -1, -1),
        rearrange(mean, "b k z t d -> b t k z d"),
        rearrange(cov, "b k z t d e -> b t k z d e"),
    )


def draw_path(prior: LGSSM, last: Components, horizon: int, generator: torch.Generator) -> Components:
    """As ``forecast_components``, but one path drawn for each object, which all components then have."""
    weights = last.logits.exp()
    chosen = torch.multinomial(weights.flatten(0, -2), 1, generator=generator).view(*weights.shape[:-1], 1, 1)
    mean = last.mean.take_along_dim(chosen, -2).squeeze(-2)
    cov = last.cov.take_along_dim(chosen.unsqueeze(-1), -3).squeeze(-3)
    state = mean + _correlated(_noise(mean, generator), cov)
    path = []
    for _ in range(horizon):
        moved = state @ prior.transition.mT + prior.offset
        state = moved + _correlated(_noise(moved, generator), prior.transition_cov)
        path.append(state)
    states = torch.stack(path, dim=1).unsqueeze(-2).expand(-1, -1, -1, weights.shape[-1], -1)
    return Components(last.logits.unsqueeze(1).expand(-1, horizon, -1, -1), states, states.new_zeros(*states.shape, 4))


def position_moments(
    prior: LGSSM, components: Components, how: Literal["best", "average"]
) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch 2"]]:
    """Means and variances of positions a whose states are known."""
    mean, cov = components.pick(how)
    return mean[..., :2], (cov[..., :2, :2] + prior.emission_cov).diagonal(dim1=-2, dim2=-1)


def _latents(
    location: Tensor,
    mean: Tensor,
    var: Tensor,
    present: Bool[Tensor, "b t k"],
    components: Components,
    how: Literal["best", "average"],
) -> SSMLatents:
    """Latents of what was inferred, zero where no object is, in the precision of ``location``."""
    state, cov = components.pick(how)

    def of_objects(values: Tensor) -> Tensor:
        shape = (*present.shape, *[1] * (values.ndim - 3))
        return values.to(location.dtype).masked_fill(~present.view(shape), 0)

    fields = (location, mean, var.log(), state, cov, *components)
    location, mean, log_var, *states = map(of_objects, fields)
    return SSMLatents(location, mean, log_var, present, *states)


def _present(counts: Int[Tensor, " b"], objects: int, length: int) -> Bool[Tensor, "b t k"]:
    """Which of the objects are not padding, in every frame."""
    number = torch.arange(objects, device=counts.device)
    return (number < counts.unsqueeze(-1)).unsqueeze(1).expand(-1, length, -1)


def _flags(seen: Bool[Tensor, " t"], length: int) -> list[bool]:
    """``seen`` as a list, if it is possible."""
    if seen.shape != (length,) or seen.dtype != torch.bool:
        raise ValueError(
            f"seen must tell for each of the video's {length} frames whether it is known, bool ({length},), got "
            f"{seen.dtype} {tuple(seen.shape)}"
        )
    flags: list[bool] = seen.tolist()
    if not flags[0]:
        raise ValueError("the first frame must be seen, since prediction starts from it; cut the video before it")
    return flags


def _draw(found: Inferred, generator: torch.Generator | None) -> Float[Tensor, "b t k 2"]:
    return found.mean if generator is None else found.mean + found.std * _noise(found.mean, generator)


def _noise(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of a shape, from ``generator`` or from torch's global state."""
    return torch.randn(values.shape, generator=generator, device=values.device, dtype=values.dtype)


def _correlated(noise: Tensor, cov: Float[Tensor, "*batch d d"]) -> Tensor:
    """Standard normal noise (..., d) as one of this covariance, which may be singular."""
    variances, axes = torch.linalg.eigh(cov)
    return (axes @ (variances.clamp_min(0).sqrt() * noise).unsqueeze(-1)).squeeze(-1)
