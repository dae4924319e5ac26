"""DDLP's tracking and prediction as they are written down: what ``models/ddlp.py`` and ``models/pint.py`` do faster.

For the benchmark, which measures both forms, and for tests, which hold that they are equal. The parts of a frame
(convolutions, pasting, cutting, masks) have theirs in ``textbook_ddlp.py``.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from objdyn.layers.particles import AppearanceEncoder
from objdyn.models.ddlp import DDLP
from objdyn.models.dlp import Particles
from objdyn.models.pint import PINT, PINTBlock


def score_maps(window: Float[Tensor, "b k c s s"], template: Float[Tensor, "b k c s s"]) -> Float[Tensor, "b k 1 s s"]:
    """``match_template`` by two grouped convolutions, one of them with ones, for all (2S + 1)^2 displacements, of which
    S^2 are kept (section 4.2, and as the released code has it but for the energy, which is each template's own)."""
    with torch.no_grad():
        b, k, _, s, _ = window.shape
        padded = F.pad(window.flatten(0, 1), (s, s, s, s), mode="replicate")
        kernel = template.flatten(0, 1).clamp(0, 1)
        product = F.conv2d(padded.flatten(0, 1).unsqueeze(0), kernel, groups=b * k)[0]
        energy = F.conv2d(padded.square().flatten(0, 1).unsqueeze(0), torch.ones_like(kernel), groups=b * k)[0]
        energy = energy * kernel.square().sum((1, 2, 3)).view(-1, 1, 1)
        kept = slice(s // 2 + 1, 2 * s + 1 - s // 2)
        score = (product / ((energy + 1e-10).sqrt() + 1e-5))[:, kept, kept]
        low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
        return ((score - low) / (high - low + 1e-5)).view(b, k, 1, s, s)


def layers(pint: PINT, tokens: Float[Tensor, "b n d"], frames: int) -> Float[Tensor, "b n d"]:
    """PINT's blocks one after the other; each lays out its own two tables, adds them to its logits and masks these."""
    for block in pint.layers:
        tokens = _block(block, tokens, frames, pint.max_frames)
    return tokens


def _block(block: PINTBlock, tokens: Float[Tensor, "b n d"], frames: int, most: int) -> Float[Tensor, "b n d"]:
    normed = block.norm_attention(tokens)
    query, key, value = (
        rearrange(net(normed), "b n (h d) -> b h n d", h=block.heads) for net in (block.query, block.key, block.value)
    )
    logits = query @ key.mT * query.shape[-1] ** -0.5
    t = torch.arange(frames, device=tokens.device)
    i = torch.arange(block.entities, device=tokens.device)
    time = block.time_bias[:, most - 1 + t[None, :] - t[:, None]]
    entity = block.entity_bias[:, block.entities - 1 + i[None, :] - i[:, None]]
    time = time.repeat_interleave(block.entities, 1).repeat_interleave(block.entities, 2)
    logits = logits + time + entity.repeat(1, frames, frames)
    ahead = t.repeat_interleave(block.entities)
    logits = logits.masked_fill(ahead[None, :] > ahead[:, None], float("-inf"))
    weights = F.dropout(logits.softmax(-1), block.dropout, block.training)
    mixed = block.out(rearrange(weights @ value, "b h n d -> b n (h d)"))
    tokens = tokens + F.dropout(mixed, block.dropout, block.training)
    return tokens + F.dropout(block.mlp(block.norm_mlp(tokens)), block.dropout, block.training)


def rollout(model: DDLP, latents: Particles, horizon: int) -> Particles:
    """The means of the next frames, one at a time; each step puts the last T frames through all of PINT (section 4.4).
    For models with relative biases."""
    pint, history = model.pint, latents
    for _ in range(horizon):
        window = history.frames(-pint.max_frames, None)
        tokens = pint.embed(window)
        shape = tokens.shape[1:3]
        tokens = layers(pint, tokens.flatten(1, 2), shape[0])
        said = pint.read(tokens.unflatten(1, shape), window)
        means = (
            said.attributes.position, said.attributes.scale, said.attributes.depth, said.attributes.transparency,
            said.features.mean, said.background.mean,
        )  # fmt: skip
        history = Particles(*(torch.cat([old, new[:, -1:]], dim=1) for old, new in zip(history, means, strict=True)))
    return history.frames(-horizon, None)


def appearance(
    encoder: AppearanceEncoder, glimpses: Float[Tensor, "b t k c s s"]
) -> tuple[Float[Tensor, "b t k m"], Float[Tensor, "b t k m"]]:
    """Mean and log-variance of the features, frame after frame as a tracking loop that encodes in each step does."""
    b, _, k = glimpses.shape[:3]
    found = [encoder(frame.flatten(0, 1)) for frame in glimpses.unbind(1)]
    mean, log_var = (
        torch.stack([field.view(b, k, -1) for field in fields], dim=1) for fields in zip(*found, strict=True)
    )
    return mean, log_var
