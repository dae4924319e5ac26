"""PINT, the particle interaction transformer: what DDLP predicts with (Daniel & Tamar, TMLR 2024, section 4.4)."""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.layers.convolution import MLP
from objdyn.layers.particles import AttributeHeads, bound_log_var
from objdyn.models.dlp import Distribution, Gaussian, Particles


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

    def forward(self, latents: Particles) -> Distribution:
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
