"""ODDN: dynamics of every object, distilled from slots of two frames (Object Dynamics Distillation Network, ICLR 2022).

IODINE turns each frame by itself into K static latents. Attention over the slots of a frame and of the one before
distils four numbers of dynamics per slot; a relation module lets slots act on each other's dynamics; and one matrix
predicts the slots of the next frame, which IODINE's decoder renders.

    frames --IODINE--> static --Distillation--> dynamics --Relation, W_pred--> static of the next frame --> frame

The loss is IODINE's of every frame and the likelihood of predicted frames. It compares pictures, so slots need no
matching: those of a predicted frame stand in the order of the frame that they were predicted from.

Reading order: ODDNConfig, ODDNLatents, ODDN, then its parts in the order of the arrows. ``iodine.py`` has the rest.

No code of this paper is public, and the paper's appendix is not in the text that we have. Fields whose docstring begins
with "Ours" are choices that the text leaves open. Further choices of ours:

- the loss is a mean over the frames that a term counts and over clips, where equations 5 and 6 sum;
- the relation's last matrix starts at zero and W_pred at [0 | I], so that an untrained model predicts that nothing
  changes; these two and the matrices of the attention have no bias;
- distillation, relation and prediction run in fp32 also where the rest runs in bf16: what moves is a small difference;
- the dynamics of a clip's first frame, which has none before it, repeat those of the second;
- equation 8 is followed where the text ("only attend to ones one frame before") says otherwise: a slot attends to both
  frames. The index under the sum of equation 12 is taken as j.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.interface import Loss, Scene
from objdyn.layers import mixture
from objdyn.layers.refinement import recomputed
from objdyn.losses import zero_gradient
from objdyn.models.iodine import (
    IODINE,
    LOG_VAR_RANGE,
    IODINEConfig,
    Posterior,
    decode_slots,
    draw,
    flat_frames,
    terms_of,
    train_draw,
)


@dataclass(frozen=True)
class ODDNConfig(IODINEConfig):
    """Settings of an ODDN model: those of its IODINE, and those of dynamics and prediction.

    The weights of the likelihood and the KL, the variance and the number of refinements are not in the paper; they are
    those of IODINE as PROVIDE's paper compares with it. The paper's letters: beta multiplies the KL.
    """

    num_slots: int = 7
    """K. Ours: CLEVRER's at most six objects and the background."""
    slot_dim: int = 16
    """L, size of a static latent."""
    dynamics_dim: int = 4
    """l, size of the dynamics."""
    share_first_draw: bool = False
    """Each frame draws its own start of IODINE, so that slots stand in another order in every frame, as in the paper.
    Ours: True draws one for a clip, so that slots of neighbouring frames mostly agree."""
    attention_dim: int = 16
    """Ours: size of the queries and keys of distillation, whose scores are scaled by its square root; one head."""
    distillation_dim: int = 64
    """Ours: hidden size of the feed-forward network (ReLU) that ends in the dynamics."""
    distillation_init: Literal["difference", "default"] = "difference"
    """Ours: start where attention finds a slot's own entries in both frames and equation 9 sums little more than their
    difference (``Distillation``), or with torch's initialisation, from which a predictor on frozen slots found no
    motion in 600 steps, where the baseline ``linear`` had in 200 (LOG.md)."""
    time_code: bool = False
    """Ours: add a learned vector to the slots of the frame before and another to those of the present one, as keys and
    values; without it only the residual tells which frame is which."""
    relation: bool = True
    """Slots act on each other's dynamics; False is the paper's "ODDN w/o relation"."""
    relation_dim: int = 64
    """Ours: width of the relation module's networks: two hidden layers of a pair's embedding, one of its effect."""
    predictor: Literal["distilled", "linear", "linear_joint"] = "distilled"
    """The paper's, or its baseline "IODINE linear": static latents of two frames through a feed-forward network, with
    neither dynamics nor relation. Ours: it takes each slot by itself, or (``linear_joint``) all together, which fixes
    K."""
    linear_dim: int = 256
    """Ours: hidden size (ReLU) of that baseline, which adds what it says to the present latents and starts with
    nothing."""
    one_step_weight: float = 1.0
    """Ours: weight of L_p of frames predicted from inferred latents, n = 3..N."""
    rollout_weight: float = 1.0
    """Ours: weight of L_p of frames predicted from predicted latents, from the first two frames on (student forcing);
    0 leaves them out."""
    rollout_frames: int | None = None
    """Ours: frames of that roll-out; None goes to the clip's end."""
    predict_from: Literal["mean", "sample"] = "mean"
    """Ours: what training predicts from, the posterior's mean, as at test, or a sample of every slot. In a sample the
    numbers of a slot that the decoder does not use are noise as wide as the prior, beside which what an object moves
    in one frame is small."""
    stop_prediction_gradient: bool = False
    """Ours: cut the gradient of L_p behind the last refinement, so that it trains distillation, relation, prediction
    and decoder, but not the inference. The paper trains end to end."""
    frozen_inference: bool = False
    """Ours: training infers the frames without gradients and learns from L_p alone: a cheap first stage for the
    dynamics of an IODINE that is trained. Its decoder still learns; ``optim.slow`` can hold it. The loss on held-out
    clips keeps all terms. A stage that follows begins with a moderate ``optim.slow_factor``: Adam knows nothing of the
    inference's gradients by then, and takes larger first steps than in a new run."""
    alone_steps: int = 0
    """Ours: so many optimiser steps train IODINE alone, on clips of any length; 0 is the paper's end to end."""

    inference: Literal["per_frame"] = "per_frame"
    """No choice here: SEQ-IODINE is a mode of iodine."""
    sequential_clamp: None = None
    """No choice here: a setting of SEQ-IODINE."""

    def __post_init__(self) -> None:
        if self.inference != "per_frame" or self.sequential_clamp is not None:
            raise ValueError("inference and sequential_clamp are settings of SEQ-IODINE; oddn has no such mode")
        super().__post_init__()
        for name in ("dynamics_dim", "attention_dim", "distillation_dim", "relation_dim", "linear_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("one_step_weight", "rollout_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if not self.one_step_weight and not self.rollout_weight:
            raise ValueError("one_step_weight and rollout_weight are both 0, so nothing would train the dynamics")
        if self.rollout_frames is not None and self.rollout_frames < 1:
            raise ValueError(f"rollout_frames must be at least 1 or None, got {self.rollout_frames}")
        if self.alone_steps < 0:
            raise ValueError(f"alone_steps must be 0 or more, got {self.alone_steps}")
        if self.alone_steps and self.frozen_inference:
            raise ValueError(
                f"frozen_inference leaves nothing to train in alone_steps={self.alone_steps}; give one of them"
            )


class ODDNLatents(NamedTuple):
    """Static latents and dynamics of the slots of every frame."""

    static: Float[Tensor, "b t k d"]
    """What is decoded: the posterior's mean, or a sample with a generator, or what was predicted."""
    static_mean: Float[Tensor, "b t k d"]
    static_log_var: Float[Tensor, "b t k d"]
    """Of the posterior; a predicted frame has none, and then it is the least that a posterior may have."""
    dynamics: Float[Tensor, "b t k l"]
    """Distilled from the frame and the one before, before the relation acts on them; the first frame's repeat those of
    the second, which no prediction looks at. Zero with a ``linear`` predictor, which has none."""


class ODDN(nn.Module):
    """Slots of every frame by IODINE, their dynamics, and the frames that follow.

    Args:
        config: settings.
        extra_features: see ``IODINE``.
    """

    step: Tensor

    def __init__(self, config: ODDNConfig, extra_features: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.iodine = IODINE(config, extra_features)
        static, dynamics = config.slot_dim, config.dynamics_dim
        if config.predictor == "distilled":
            self.predictor = Predictor(
                Distillation(
                    static,
                    config.attention_dim,
                    config.distillation_dim,
                    dynamics,
                    config.time_code,
                    config.distillation_init,
                ),
                Relation(static, dynamics, config.relation_dim) if config.relation else None,
                static,
                dynamics,
            )
        else:
            joint = config.num_slots if config.predictor == "linear_joint" else None
            self.predictor = LinearBaseline(static, config.linear_dim, dynamics, joint)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        r"""IODINE's loss of every frame and the likelihood of predicted frames (equations 5 and 6).

        .. math::  L = \frac 1N \sum_{n=1}^{N} \sum_s w_s [-\beta_x \log p(x_n | z_n^s) + \beta KL]
                   - \frac{a \beta_x}{N - 2} \sum_{n=3}^{N} \log p(x_n | \hat z_n)
                   - \frac{b \beta_x}{M} \sum_{n=3}^{M + 2} \log p(x_n | \tilde z_n)

        with w the weights of the cells, :math:`\beta_x` ``likelihood_weight``, a ``one_step_weight``, b
        ``rollout_weight`` and M ``rollout_frames``. :math:`\hat z_n` is predicted from the inferred latents of frames
        n - 2 and n - 1, :math:`\tilde z_n` from those of frames 1 and 2 alone.

        Terms: those of IODINE; ``predict`` and ``rollout``, the two negative log-likelihoods in nats per frame; and
        ``predict_mse`` and ``rollout_mse`` of the frames themselves.

        Raises:
            ValueError: a clip has fewer than three frames, and IODINE is not trained alone.
        """
        frames, (b, t) = flat_frames(video, self.config.image_size), video.shape[:2]
        shape = (b, self.config.num_slots, self.config.slot_dim)
        first = [
            train_draw(shape, video.device, self.training, n) for n in range(1 if self.config.share_first_draw else t)
        ]
        noise = self._spread(first, t)
        alone = int(self.step) < self.config.alone_steps
        if t < 3 and not alone:
            raise ValueError(
                f"oddn predicts the third frame of a clip from the first two, got {t} frame{'s' if t > 1 else ''}; set "
                "clip_frames to 3 or more (5 in the presets), or train IODINE alone (model.alone_steps)"
            )
        if self.training and self.config.frozen_inference:
            static = self._infer_frozen(frames, noise).unflatten(0, (b, t))
            return self._add_predictions(video, static, zero_gradient(self.iodine), {})
        fit = self.iodine.fit(frames, noise)
        terms = terms_of(frames, [fit.final])
        if alone:
            return Loss(fit.loss + zero_gradient(self.predictor), terms)
        slots = fit.final.slots if self.config.predict_from == "sample" else fit.posterior.mean
        static = slots.unflatten(0, (b, t))
        return self._add_predictions(
            video, static.detach() if self.config.stop_prediction_gradient else static, fit.loss, terms
        )

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> ODDNLatents:
        """Static latents of every frame by itself, and dynamics of every frame and the one before.

        Raises:
            ValueError: a clip of one frame, which has no dynamics.
        """
        frames, (b, t) = flat_frames(video, self.config.image_size), video.shape[:2]
        if t < 2:
            raise ValueError(
                "dynamics are of a frame and the one before, got a clip of 1 frame; give two or more, or use a model "
                "of family iodine for single images"
            )
        shape = (b, self.config.num_slots, self.config.slot_dim)
        first = [draw(shape, video.device, generator, n) for n in range(1 if self.config.share_first_draw else t)]
        found = self.iodine.infer(frames, self._spread(first, t), generator)
        static, mean, log_var = (field.unflatten(0, (b, t)) for field in found)
        dynamics = self._over_pairs(self.predictor.dynamics, static)
        return ODDNLatents(static, mean, log_var, torch.cat([dynamics[:, :1], dynamics], dim=1))

    def rollout(self, latents: ODDNLatents, horizon: int, *, generator: torch.Generator | None = None) -> ODDNLatents:
        """The frames after the last two of ``latents``, each predicted from the two before it.

        Slots keep the order of the last frame. The prediction itself has no noise; a generator draws the two frames
        that it starts from out of their posteriors.

        Raises:
            ValueError: ``horizon`` is less than 1, or there is but one frame to start from.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        if latents.static.shape[1] < 2:
            raise ValueError("oddn predicts from the last two frames, got latents of 1; give a context of 2 or more")
        start = latents.static[:, -2:]
        if generator is not None:
            noise = torch.randn(start.shape, generator=generator, device=start.device)
            start = latents.static_mean[:, -2:] + torch.exp(0.5 * latents.static_log_var[:, -2:]) * noise
        found = list(start.unbind(1))
        for _ in range(horizon):
            found.append(self.predictor(found[-2], found[-1]))
        static = torch.stack(found[2:], dim=1)
        dynamics = self._over_pairs(self.predictor.dynamics, torch.stack(found[1:], dim=1))
        return ODDNLatents(static, static, torch.full_like(static, LOG_VAR_RANGE[0]), dynamics)

    def decode(self, latents: ODDNLatents, components: bool = False) -> Scene:
        """Frames, and on request the masks and colours of every slot; dynamics are not rendered."""
        return decode_slots(self.iodine.refiner, latents.static, None, components)

    def _spread(self, first: list[Tensor], frames: int) -> Float[Tensor, "n k d"]:
        """First draws (b, k, d) of every frame, or one for all, for the frames of a batch of clips."""
        return repeat(torch.stack(first, dim=1), "b s k d -> (b s t) k d", t=frames // len(first))

    def _over_pairs(
        self, run: Callable[[Tensor, Tensor], Tensor], static: Float[Tensor, "b t k d"]
    ) -> Float[Tensor, "b s k e"]:
        """``run`` on all neighbouring frames of a batch of clips at once; one less than there are frames."""
        shape = (static.shape[0], static.shape[1] - 1)
        return run(static[:, :-1].flatten(0, 1), static[:, 1:].flatten(0, 1)).unflatten(0, shape)

    def _predict(self, static: Float[Tensor, "b t k d"]) -> tuple[Float[Tensor, "b s k d"], Float[Tensor, "b m k d"]]:
        """Static latents of frame 3 and on from inferred ones, and of frame 4 and on from predicted ones.

        The first of them also begins the roll-out; where that alone counts, there is no other.
        """
        count = static.shape[1] - 2
        one_step = self._over_pairs(self.predictor, static[:, : count + 1 if self.config.one_step_weight else 2])
        found = [static[:, 1], one_step[:, 0]]
        for _ in range(min(count, self.config.rollout_frames or count) - 1 if self.config.rollout_weight else 0):
            found.append(self.predictor(found[-2], found[-1]))
        return one_step, torch.stack(found, dim=1)[:, 2:]

    def _infer_frozen(self, frames: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        """Slots as at test, or samples of their posteriors, without gradients."""
        with torch.no_grad():
            found = self.iodine.infer(frames, noise, None)
            slots = found.mean
            if self.config.predict_from == "sample":
                slots = Posterior(found.mean, found.log_var).sample(torch.randn_like(slots))
        torch.clear_autocast_cache()  # casts of weights that were made without gradients would be used again
        return slots

    def _add_predictions(
        self,
        video: Float[Tensor, "b t c h w"],
        static: Float[Tensor, "b t k d"],
        total: Tensor,
        terms: dict[str, Tensor],
    ) -> Loss:
        """``total`` and L_p of the frames that are predicted from static latents."""
        b = video.shape[0]
        one_step, rolled = self._predict(static)
        # The third frame is predicted alike by both, and rendered once.
        targets = torch.cat([video[:, 2 : 2 + one_step.shape[1]], video[:, 3 : 3 + rolled.shape[1]]], dim=1)
        value, nll, error = (
            each.unflatten(0, (b, -1))
            for each in self._compare(targets.flatten(0, 1), torch.cat([one_step, rolled], dim=1).flatten(0, 1))
        )
        count = one_step.shape[1]
        later = [0, *range(count, value.shape[1])]
        terms = dict(terms)
        for name, weight, counted in (
            ("predict", self.config.one_step_weight, list(range(count))),
            ("rollout", self.config.rollout_weight, later),
        ):
            if weight:
                total = total + weight * value[:, counted].mean()
                terms |= {name: nll[:, counted].mean(), f"{name}_mse": error[:, counted].mean()}
        return Loss(total, terms)

    def _compare(
        self, frames: Float[Tensor, "n 3 h w"], slots: Float[Tensor, "n k d"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Of frames given slots: weighted negative log-likelihood, the same without graph and weight, squared error."""
        refiner, config = self.iodine.refiner, self.config
        if config.recompute and torch.is_grad_enabled():
            with torch.no_grad():
                known = refiner.logits(slots)
            logits = recomputed(refiner.logits, known, (slots,), list(refiner.decoder.parameters()))
        else:
            logits = refiner.logits(slots)
        found = mixture.mixture(
            frames,
            logits,
            var=config.likelihood_var,
            kind=config.mixture,
            likelihood_weight=config.likelihood_weight,
            entropy_weight=0.0,
        )
        with torch.no_grad():
            error = (mixture.render(logits.detach()).frame - frames).square().flatten(1).mean(1)
        return mixture.attach(logits, found), found.nll, error


class Predictor(nn.Module):
    """The paper's: distillation, relation, and one matrix W_pred from (dynamics, static) to the next static latents.

    Args:
        distillation: gives the dynamics.
        relation: changes them; None leaves them as they are.
        slot_dim: size of a static latent.
        dynamics_dim: size of the dynamics.
    """

    def __init__(
        self, distillation: "Distillation", relation: "Relation | None", slot_dim: int, dynamics_dim: int
    ) -> None:
        super().__init__()
        self.distillation, self.relation = distillation, relation
        self.next = nn.Linear(dynamics_dim + slot_dim, slot_dim, bias=False)
        with torch.no_grad():
            self.next.weight.copy_(torch.cat([torch.zeros(slot_dim, dynamics_dim), torch.eye(slot_dim)], dim=1))

    def dynamics(self, previous: Float[Tensor, "n k d"], current: Float[Tensor, "n k d"]) -> Float[Tensor, "n k l"]:
        """Dynamics of the slots of the current frame."""
        with torch.autocast(current.device.type, enabled=False):
            return self.distillation(previous.float(), current.float())

    def forward(self, previous: Float[Tensor, "n k d"], current: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        """Static latents of the frame after the current one, in the order of its slots."""
        dynamics = self.dynamics(previous, current)
        with torch.autocast(current.device.type, enabled=False):
            current = current.float()
            if self.relation is not None:
                dynamics = self.relation(dynamics, current)
            return self.next(torch.cat([dynamics, current], dim=-1))


class Distillation(nn.Module):
    r"""Dynamics of slots from two frames: attention, then a feed-forward network (equations 7 to 9).

    .. math::  z'_k = \sum_i \alpha_{ki} W_v v_i, \quad
               \alpha_{ki} \propto \exp\left((W_q z_{n,k})^T W_k v_i / \sqrt d\right), \quad
               v = \{z_{n-1}\} \cup \{z_n\}

               z^{dyn}_{n,k} = FFN(LayerNorm(z'_k + z_{n,k}))

    A clip's pairs of frames are rows of the batch, so that no N K x N K mask is needed.

    Args:
        slot_dim: size of a slot.
        attention_dim: d, size of queries and keys.
        hidden_dim: of the feed-forward network.
        out_dim: size of the dynamics.
        time_code: add a learned vector per frame to what is attended to.
        init: ``default`` is torch's. ``difference`` starts with :math:`W_q^T W_k / \sqrt d = I`, so that a slot attends
            to what is like it, above all to itself in both frames where slots are long beside their products, and
            :math:`W_v = -0.9 I`, so that the sum of equation 9 is about :math:`0.1 z_n + 0.45 (z_n - z_{n-1})`:
            motion and content are of one size in it, where motion is a tenth of content in a slot. d of the slots'
            numbers are compared where d is less than theirs.
    """

    def __init__(
        self,
        slot_dim: int,
        attention_dim: int,
        hidden_dim: int,
        out_dim: int,
        time_code: bool = False,
        init: Literal["difference", "default"] = "difference",
    ) -> None:
        super().__init__()
        self.scale = attention_dim**-0.5
        self.query = nn.Linear(slot_dim, attention_dim, bias=False)
        self.key = nn.Linear(slot_dim, attention_dim, bias=False)
        self.value = nn.Linear(slot_dim, slot_dim, bias=False)
        if init == "difference":
            with torch.no_grad():
                for like in (self.query, self.key):
                    nn.init.eye_(like.weight).mul_(attention_dim**0.25)
                nn.init.eye_(self.value.weight).mul_(-0.9)
        self.norm = nn.LayerNorm(slot_dim)
        self.ffn = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
        self.time_code = nn.Parameter(torch.empty(2, slot_dim).normal_(0.0, 0.02)) if time_code else None

    def forward(self, previous: Float[Tensor, "n k d"], current: Float[Tensor, "n k d"]) -> Float[Tensor, "n k l"]:
        entries = torch.stack([previous, current], dim=1)
        if self.time_code is not None:
            entries = entries + self.time_code[:, None]
        entries = rearrange(entries, "n s k d -> n (s k) d")
        scores = torch.einsum("nqd,nid->nqi", self.query(current), self.key(entries)) * self.scale
        attended = torch.einsum("nqi,nid->nqd", scores.softmax(-1), self.value(entries))
        return self.ffn(self.norm(attended + current))


class Relation(nn.Module):
    r"""Effects of all other slots on a slot's dynamics (equations 10 to 13).

    .. math::  e_{ij} = W_{emb}[dyn_i, sta_i, dyn_j, sta_j], \quad
               E_i = \sum_{j \neq i} \sigma(W_{attn} e_{ij}) W_{eff} e_{ij}, \quad dyn'_i = dyn_i + W_{dyn} E_i

    :math:`W_{emb}` and :math:`W_{eff}` are networks with ReLU. The background's slot is one like the others.

    Args:
        slot_dim: size of a static latent.
        dynamics_dim: size of the dynamics.
        dim: width of the networks.
    """

    def __init__(self, slot_dim: int, dynamics_dim: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(2 * (dynamics_dim + slot_dim), dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()
        )
        self.attend = nn.Linear(dim, 1)
        self.effect = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.update = nn.Linear(dim, dynamics_dim, bias=False)
        nn.init.zeros_(self.update.weight)

    def forward(self, dynamics: Float[Tensor, "n k l"], static: Float[Tensor, "n k d"]) -> Float[Tensor, "n k l"]:
        each = torch.cat([dynamics, static], dim=-1)
        k = each.shape[1]
        pairs = torch.cat([repeat(each, "n i e -> n i j e", j=k), repeat(each, "n j e -> n i j e", i=k)], dim=-1)
        embedded = self.embed(pairs)
        effects = self.attend(embedded).sigmoid() * self.effect(embedded)
        others = 1 - torch.eye(k, device=each.device)
        return dynamics + self.update(torch.einsum("nije,ij->nie", effects, others))


class LinearBaseline(nn.Module):
    """The paper's "IODINE linear": the next static latents from those of two frames, without dynamics.

    Per slot it takes slot k of both frames for the same object, which nothing promises.

    Args:
        slot_dim: size of a static latent.
        hidden_dim: of the network.
        dynamics_dim: size of the zeros that stand for dynamics.
        joint: K slots go through the network together; None takes each by itself.
    """

    def __init__(self, slot_dim: int, hidden_dim: int, dynamics_dim: int, joint: int | None) -> None:
        super().__init__()
        self.joint, self.dynamics_dim = joint is not None, dynamics_dim
        size = slot_dim * (joint or 1)
        last = nn.Linear(hidden_dim, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(2 * size, hidden_dim), nn.ReLU(), last)

    def dynamics(self, previous: Float[Tensor, "n k d"], current: Float[Tensor, "n k d"]) -> Float[Tensor, "n k l"]:
        """Zeros: there are none."""
        return current.new_zeros(*current.shape[:-1], self.dynamics_dim)

    def forward(self, previous: Float[Tensor, "n k d"], current: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        """Static latents of the frame after the current one, in the order of its slots."""
        with torch.autocast(current.device.type, enabled=False):
            previous, current = previous.float(), current.float()
            if not self.joint:
                return current + self.network(torch.cat([previous, current], dim=-1))
            found = self.network(torch.cat([previous.flatten(1), current.flatten(1)], dim=-1))
            return current + found.unflatten(1, current.shape[1:])


def start_from_iodine(model: ODDN, config: IODINEConfig, weights: Mapping[str, Tensor]) -> None:
    """Give a fresh ODDN the weights of a trained IODINE, so that it infers and renders every frame as that does.

    Raises:
        ValueError: the models' parts differ in size, or in what their refinement reads.
    """
    for name in ("likelihood_var", "mixture", "mask_posterior"):
        if getattr(config, name) != getattr(model.config, name):
            raise ValueError(
                f"the iodine model was trained with {name}={getattr(config, name)!r}, and this one has "
                f"{getattr(model.config, name)!r}: its refinement would read its inputs wrongly; give both the same"
            )
    own: dict[str, Any] = dict(model.iodine.state_dict())
    for name in (*own, *(name for name in weights if name not in own)):
        here, there = (tuple(each[name].shape) if name in each else "missing" for each in (own, weights))
        if here != there:
            raise ValueError(
                f"the iodine model does not fit: {name} is {there} there and {here} here; give both the same model "
                "settings"
            )
    model.iodine.load_state_dict(dict(weights))
