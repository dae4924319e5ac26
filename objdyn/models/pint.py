"""PINT, the particle interaction transformer: what DDLP predicts with (Daniel & Tamar, TMLR 2024, section 4.4).

``PINT`` answers for all frames of a clip at once; ``PINTWindow`` steps through a rollout and computes of each step only
what is new or needed.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.layers.convolution import MLP
from objdyn.layers.particles import AttributeHeads, bound_log_var
from objdyn.models.dlp import Distribution, Gaussian, Particles

Place = Literal["relative", "learned"]
"""How a token knows its place in the sequence: by a relative bias, or by a learned vector added to it."""


class PINT(nn.Module):
    """Particle interaction transformer: the particles of frames 1 .. t from those of frames 0 .. t-1.

    Every particle and the background are tokens; a token attends to all tokens of its own and earlier frames. Position
    in the sequence enters only through a learned relative bias, b(i, t; j, u) = time[u - t] + particle[j - i], added
    to the attention logits of each head. Logits are scaled by the head's width (the paper's formula shows the model's).
    Predictions of position, scale, depth and features are changes to the input; the transparency's are absolute.
    Source: DDLP, section 4.4 and appendix D.6.

    ``place`` "learned" is the paper's ablation (table 2, "no RPE"), in which standard positional embeddings stand in
    for the bias: a vector is added to every token before the first layer, and attention is masked, no more. The paper
    does not say how it is indexed; ours is the sum of one vector per frame of the window and one per particle, as the
    bias is a sum of two tables, each from N(0, ``bias_init_std``^2). ``own_bias`` then has no meaning.
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
        place: Place = "relative",
    ) -> None:
        super().__init__()
        self.max_frames, self.place = max_frames, place
        sizes = (2, 2, 1, 1, feature_dim)  # position, scale, transparency, depth, features
        self.project_fields = nn.ModuleList(MLP(size, dim, size) for size in sizes)
        self.project_particle = MLP(sum(sizes), dim, dim)
        self.project_background = MLP(background_dim, dim, dim)
        if place == "learned":
            self.frame_place = nn.Parameter(torch.empty(max_frames, dim).normal_(0.0, bias_init_std))
            self.entity_place = nn.Parameter(torch.empty(num_particles + 1, dim).normal_(0.0, bias_init_std))
        self.blocks = nn.ModuleList(
            PINTBlock(dim, heads, num_particles + 1, max_frames, dropout, relative=place == "relative")
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.hidden = MLP(dim, dim, dim, final_activation=True)
        self.attributes = AttributeHeads(dim)
        self.features = nn.Linear(dim, 2 * feature_dim)
        self.background = nn.Linear(dim, 2 * background_dim)
        if place == "relative":
            for block in self.layers:
                block.init_biases(bias_init_std, own_bias)
        for module in [*self.blocks.modules(), self.mix]:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def layers(self) -> list["PINTBlock"]:
        """The blocks, in order."""
        return [cast(PINTBlock, block) for block in self.blocks]

    def forward(self, latents: Particles) -> Distribution:
        """One prediction per input frame, of the frame after it.

        Raises:
            ValueError: more frames than PINT's biases cover.
        """
        frames = latents.depth.shape[1]
        if frames > self.max_frames:
            raise ValueError(f"PINT was built for up to {self.max_frames} frames, got {frames}")
        tokens = self.put(self.embed(latents), 0)
        shape = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        for block, bias in zip(self.layers, self.biases(frames), strict=True):
            tokens = block(tokens, bias)
        return self.read(tokens.unflatten(1, shape), latents)

    def embed(self, latents: Particles) -> Float[Tensor, "b t e d"]:
        """A token for every particle and one for the background, which comes last."""
        fields = (latents.position, latents.scale, latents.transparency[..., None], latents.depth[..., None])
        fields = (*fields, latents.features)
        with torch.autocast(latents.position.device.type, enabled=False):  # velocities are small differences
            projected = [net(field) for net, field in zip(self.project_fields, fields, strict=True)]
            particles = self.project_particle(torch.cat(projected, dim=-1))
            background = self.project_background(latents.background).unsqueeze(2)
        return torch.cat([particles, background], dim=2)

    def put(self, tokens: Float[Tensor, "b t e d"], first: int) -> Float[Tensor, "b t e d"]:
        """Tell tokens their places where these are learned; ``first`` is the place of their first frame."""
        if self.place == "relative":
            return tokens
        frames = self.frame_place[first : first + tokens.shape[1]]
        return tokens + (frames[:, None] + self.entity_place)

    def biases(self, frames: int) -> Float[Tensor, "l 1 h n n"]:
        """What is added to the logits of each layer: its relative bias with the causal mask, or the mask alone.

        Rows are the token that looks, columns the one looked at. The tables of all layers are laid out together, once
        for a forward pass or a rollout.
        """
        layers = self.layers
        entities = layers[0].entities
        device = self.mix.weight.device
        t = torch.arange(frames, device=device)
        ahead = t[None, :] > t[:, None]
        if self.place == "learned":
            mask = torch.zeros(ahead.shape, device=device).masked_fill(ahead, float("-inf"))
            mask = mask.repeat_interleave(entities, 0).repeat_interleave(entities, 1)
            return mask.expand(len(layers), 1, 1, -1, -1)
        i = torch.arange(entities, device=device)
        time = torch.stack([block.time_bias for block in layers])
        time = time[:, :, self.max_frames - 1 + t[None, :] - t[:, None]].masked_fill(ahead, float("-inf"))  # (l h t u)
        entity = torch.stack([block.entity_bias for block in layers])
        entity = entity[:, :, entities - 1 + i[None, :] - i[:, None]]  # (l h i j)
        bias = time[:, :, :, None, :, None] + entity[:, :, None, :, None, :]
        return rearrange(bias, "l h t i u j -> l 1 h (t i) (u j)")

    def read(self, tokens: Float[Tensor, "b t e d"], latents: Particles) -> Distribution:
        """Predictions from the last layer's tokens; ``latents`` are what these frames held."""
        hidden = self.hidden(self.mix(self.norm(tokens)))
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

    def __init__(
        self, dim: int, heads: int, entities: int, max_frames: int, dropout: float, relative: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.entities, self.dropout = heads, entities, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        if relative:
            self.time_bias = nn.Parameter(torch.empty(heads, 2 * max_frames - 1))
            self.entity_bias = nn.Parameter(torch.empty(heads, 2 * entities - 1))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        if relative:
            self.init_biases(0.02, 0.0)

    def init_biases(self, std: float, own: float) -> None:
        """Draw both tables from N(0, ``std``^2); add ``own`` where a token looks at its own entity."""
        with torch.no_grad():
            self.time_bias.normal_(0.0, std)
            self.entity_bias.normal_(0.0, std)
            self.entity_bias[:, self.entities - 1] += own

    def forward(self, tokens: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h n n"]) -> Float[Tensor, "b n d"]:
        """One layer; ``bias``, with the causal mask in it, is added to the logits."""
        dropout = self.dropout if self.training else 0.0
        projected = F.linear(self.norm_attention(tokens), self.projection())
        query, key, value = rearrange(projected, "b n (p h d) -> p b h n d", p=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        mixed = self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        tokens = tokens + F.dropout(mixed, dropout, self.training)
        return tokens + F.dropout(self.mlp(self.norm_mlp(tokens)), dropout, self.training)

    def projection(self) -> Float[Tensor, "d3 d"]:
        """Weights of query, key and value as one matrix."""
        return torch.cat([self.query.weight, self.key.weight, self.value.weight])


class PINTWindow:
    """A rollout's state: predicts the next frame from the last T, again and again. Exact, for inference alone.

    Equal to ``PINT.forward`` on the last T frames, of which only the last prediction is looked at, so that

    - the last layer computes keys and values of all frames, but the rest of the last frame alone, as do the heads;
    - up to T frames no token changes when one is added: keys and values are kept, and only the new frame is computed;
    - after that the window's first frame leaves with each step, which changes every token behind it. A window is then
      computed anew but for its tokens before the first layer and, where the bias is relative, their queries, keys and
      values, which are those of the step before.

    Buffers are made once for the whole rollout; weights are read when it begins.
    """

    def __init__(self, pint: PINT, context: Particles, horizon: int) -> None:
        self.pint, self.latents = pint, context.frames(-1, None)
        context = context.frames(-pint.max_frames, None)
        self.entities = pint.layers[0].entities
        self.end = self.known = 0
        """Frames in the buffers, and of these the ones whose keys and values are kept."""
        tokens = pint.embed(context)
        b, frames, e, d = tokens.shape
        rows = b * e * min(frames, pint.max_frames)
        self.layers = [_Layer(block, rows) for block in pint.layers]
        self.room = frames + horizon - 1
        """Frames of the whole rollout that are looked at: the last predicted one is not."""
        self.widest = min(self.room, pint.max_frames)
        self.biases = pint.biases(self.widest).unbind()
        self.tokens = tokens.new_empty(b, self.room, e, d)
        self._append(tokens)
        self.kept: list[Tensor] = []

    def append(self, latents: Particles) -> None:
        """Add the frame after the last, (b, 1, ...)."""
        self.latents = latents
        self._append(self.pint.embed(latents))

    def predict(self) -> Distribution:
        """The frame after the last, (b, 1, ...)."""
        e, d, end = self.entities, self.tokens.shape[-1], self.end
        begin = max(0, end - self.pint.max_frames)
        slides = begin > 0  # else every frame before ``known`` is as it was
        first = begin if slides else self.known
        tokens = self.pint.put(self.tokens[:, first:end], first - begin).flatten(1, 2)
        reused = self.pint.place == "relative" or not slides
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            bias = self.biases[number][..., (first - begin) * e : (end - begin) * e, : (end - begin) * e]
            if number == 0 and reused:  # of every frame, in the order of frames
                self._keep(number, layer.project(tokens[:, (self.known - first) * e :]), self.room)
                projected = self.kept[0]
                query, pair = projected[:, first * e : end * e, :d], projected[:, begin * e : end * e, d:]
            else:
                query, pair = layer.project(tokens).split([d, 2 * d], dim=-1)
                if not slides:
                    self._keep(number, pair, self.widest)
                    pair = self.kept[number][:, : end * e]
            if number == last:
                tokens, query, bias = tokens[:, -e:], query[:, -e:], bias[..., -e:, :]
            tokens = layer.attend(tokens, query, *pair.chunk(2, dim=-1), bias)
        self.known = end
        return self.pint.read(tokens.unsqueeze(1), self.latents)

    def _append(self, tokens: Float[Tensor, "b t e d"]) -> None:
        if self.end < self.room:
            self.tokens[:, self.end : self.end + tokens.shape[1]] = tokens
            self.end += tokens.shape[1]

    def _keep(self, layer: int, projected: Float[Tensor, "b n c"], room: int) -> None:
        """Write what was projected of the frames after the known ones."""
        if layer == len(self.kept):
            self.kept.append(projected.new_empty(len(projected), room * self.entities, projected.shape[-1]))
        begin = self.known * self.entities
        self.kept[layer][:, begin : begin + projected.shape[1]] = projected


class _Layer:
    """A block in a rollout: without dropout, its matrices laid out for products with about ``rows`` rows."""

    def __init__(self, block: PINTBlock, rows: int) -> None:
        self.block = block
        up, down = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
        self.projection, self.out = _Matrix(block.projection(), None, rows), _Matrix(block.out.weight, None, rows)
        self.up, self.down = _Matrix(up.weight, up.bias, rows), _Matrix(down.weight, down.bias, rows)

    def project(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d3"]:
        """Query, key and value, one after the other."""
        return self.projection(self.block.norm_attention(tokens))

    def attend(
        self,
        tokens: Float[Tensor, "b n d"],
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"],
        value: Float[Tensor, "b m d"],
        bias: Float[Tensor, "1 h n m"],
    ) -> Float[Tensor, "b n d"]:
        """What becomes of ``tokens``: attention and MLP, each with its residual."""
        q, k, v = (x.unflatten(-1, (self.block.heads, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.down(F.gelu(self.up(self.block.norm_mlp(tokens))))


class _Matrix:
    """A linear map that is applied many times: in fp32 on a CPU, oneDNN's layout of the weight is made only once.

    A plain product lays out the weight anew in every call, a third of its time where there are few rows. The
    operators are those that ``torch.compile`` calls for a frozen model; without them, in other precisions and on other
    devices it is a plain product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias = weight.detach(), bias
        plain = weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        self.packed = None if plain or not _can_pack() else torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def _can_pack() -> bool:
    operators = torch.ops.mkldnn
    usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return usable and all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
