"""The parts of DLPv2, the single-image particle model (Daniel & Tamar, TMLR 2024, section 4 and appendix D).

    image --PatchPrior--> proposals --AttributeEncoder--> position, scale, depth, transparency
          --AppearanceEncoder--> features      --BackgroundEncoder--> background
    particles --GlimpseDecoder, stitch--> foreground over BackgroundDecoder's background

``models/dlp.py`` builds the image model from these parts and initialises their convolutions, ``models/ddlp.py`` the
video model around it. Each takes its sizes as arguments, so each can be tested alone.
Module sizes follow the authors' code where the paper's text differs (the MLPs are 256-256, not 256-128); the
parameter counts of the published settings are checked in the tests.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from objdyn.layers.convolution import MLP, ConvBlock, ConvChain, PatchCNN
from objdyn.layers.spatial import inside_squares, paste_glimpses, paste_rows, rows_reached, spatial_softmax

HIDDEN = 256
"""Width of every MLP of the image model."""
TRUNK_CHANNELS = 32
"""Maps between a trunk's CNN and its MLP, and of the first maps of the decoders."""
MIXER_DIM = 64
"""Numbers of a token of the proposal mixer that come from its glimpse, and as many from its position."""
LOG_CONCENTRATION_RANGE = (-6.0, 6.0)
"""Bounds of log a and log b of the transparency's Beta distribution."""
LOG_VAR_RANGE = (-12.0, 6.0)
"""Bounds of every log-variance."""


def log2_exact(value: int) -> int:
    """The logarithm of a power of two, by integers: ``floor(log(64) / log(2))`` is 5 in floating point.

    Raises:
        ValueError: ``value`` is not a power of two.
    """
    if value < 1 or value & (value - 1):
        raise ValueError(f"expected a power of two, got {value}")
    return value.bit_length() - 1


def bound_log_var(log_var: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Keep a log-variance inside ``LOG_VAR_RANGE``."""
    return log_var.clamp(*LOG_VAR_RANGE)


def bound_concentration(log_value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A Beta concentration from its bounded logarithm."""
    return log_value.clamp(*LOG_CONCENTRATION_RANGE).exp()


class Attributes(NamedTuple):
    """Distribution parameters of one frame's particles, as the attribute encoder or PINT gives them."""

    position: Float[Tensor, "... k 2"]
    """Mean; for the attribute encoder the offset from the glimpse's centre, in (-1, 1)."""
    position_log_var: Float[Tensor, "... k 2"]
    scale: Float[Tensor, "... k 2"]
    """Mean before the sigmoid."""
    scale_log_var: Float[Tensor, "... k 2"]
    depth: Float[Tensor, "... k"]
    depth_log_var: Float[Tensor, "... k"]
    transparency_a: Float[Tensor, "... k"]
    """First concentration of the Beta distribution, as b the second; positive."""
    transparency_b: Float[Tensor, "... k"]

    @property
    def transparency(self) -> Float[Tensor, "... k"]:
        """Mean of the Beta distribution."""
        return self.transparency_a / (self.transparency_a + self.transparency_b)


class AttributeHeads(nn.Module):
    """Linear heads from a hidden vector to ``Attributes``; the position mean passes through tanh."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.y = nn.Linear(hidden, 2)
        self.x = nn.Linear(hidden, 2)
        self.scale = nn.Linear(hidden, 4)
        self.transparency = nn.Linear(hidden, 2)
        self.depth = nn.Linear(hidden, 2)

    def forward(self, hidden: Float[Tensor, "... d"]) -> Attributes:
        """One set of attributes for each hidden vector; the other axes are kept."""
        # fp32 from here on, also under autocast: positions and the KL terms need it
        y, x = self.y(hidden).float(), self.x(hidden).float()
        position, position_log_var = torch.stack([y, x], dim=-1).unbind(-2)
        scale, scale_log_var = self.scale(hidden).float().chunk(2, dim=-1)
        depth, depth_log_var = self.depth(hidden).float().unbind(-1)
        log_a, log_b = self.transparency(hidden).float().unbind(-1)
        return Attributes(
            position=position.tanh(),
            position_log_var=bound_log_var(position_log_var),
            scale=scale,
            scale_log_var=bound_log_var(scale_log_var),
            depth=depth,
            depth_log_var=bound_log_var(depth_log_var),
            transparency_a=bound_concentration(log_a),
            transparency_b=bound_concentration(log_b),
        )


class PatchPrior(nn.Module):
    """Proposes one keypoint per patch and keeps the ``num_proposals`` most certain (appendix D.2).

    Each P x P patch goes through a small CNN and a spatial softmax. ``filter``: "variance" keeps the smallest
    var_y + var_x + cov (the signed covariance, as in the authors' code), "distance" the furthest from the patch
    centre, "random" a fresh permutation for every image in training and always the same one in evaluation mode, where
    answers must repeat. The order of the ranking is kept: the first K are anchors.
    "none" keeps every proposal in the order of the patches, row by row; ``ProposalMixer`` makes anchors of them.

    Raises:
        ValueError: ``filter`` is "none" and ``num_proposals`` is not the number of patches.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: Sequence[int],
        num_proposals: int,
        filter: Literal["variance", "distance", "random", "none"],
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        patches = (image_size // patch_size) ** 2
        if filter == "none" and num_proposals != patches:
            raise ValueError(f"without a filter all {patches} proposals are kept, got num_proposals={num_proposals}")
        self.image_size, self.patch_size = image_size, patch_size
        self.num_proposals, self.filter = num_proposals, filter
        self.cnn = PatchCNN(in_channels, channels, 1)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n l 2"]:
        """Positions of the kept proposals, best first."""
        size, side = self.patch_size, self.image_size
        per_axis = side // size
        patches = rearrange(images, "n c (i p) (j q) -> (n i j) c p q", p=size, q=size)
        local, variance, covariance = spatial_softmax(self.cnn(patches)[:, 0].float())
        origin = torch.arange(per_axis, device=images.device, dtype=images.dtype) * size
        origin = torch.stack(torch.meshgrid(origin, origin, indexing="ij"), dim=-1).reshape(-1, 2)  # (i j, 2)
        local = local.view(-1, per_axis * per_axis, 2)
        pixels = (local + 1) * (0.5 * (size - 1)) + origin
        position = pixels * (2 / (side - 1)) - 1
        if self.filter == "none":
            return position
        score = (variance.sum(-1) + covariance).view(-1, per_axis * per_axis)
        if self.filter == "distance":
            score = -local.square().sum(-1)
        elif self.filter == "random":
            score = torch.rand_like(score) if self.training else self._fixed_order(score)
        best = score.topk(self.num_proposals, dim=-1, largest=False, sorted=True).indices
        return position.gather(1, best.unsqueeze(-1).expand(-1, -1, 2))

    @staticmethod
    def _fixed_order(score: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """The same random numbers for every image."""
        generator = torch.Generator().manual_seed(0)  # on the CPU, so that the order is that of every device
        return torch.rand(score.shape[1], generator=generator, device="cpu").to(score).expand_as(score)


class ProposalMixer(nn.Module):
    r"""Makes K anchors of all N proposals: convex combinations, with weights from what each proposal looks at.

    Each proposal is a token of 128 numbers, 64 from a CNN of the glimpse around it and 64 from its position. An
    MLP-Mixer block (Tolstikhin et al., NeurIPS 2021) mixes tokens, then channels; anchor k is

    .. math::  a_k = \sum_n w_{nk} p_n, \quad w_{\cdot k} = \mathrm{softmax}_n (\ell_{nk} + b_{nk})

    with :math:`\ell` linear in the mixed tokens. The gradient reaches the proposals' positions and the glimpses' CNN.

    The paper does not describe this part; the sizes of the tokens, the block and the softmax are the authors' code's.
    Ours are the widths of the block's MLPs and the table b, without which all anchors start in the middle of the image
    and see the same. It starts as :math:`-d^2 / 2` with d the distance of patch n, in patches, from the k-th of K
    points spread over the image, so that each anchor begins with a place of its own and is free to leave it.
    """

    def __init__(
        self, per_axis: int, num_particles: int, glimpse_size: int, channels: Sequence[int], in_channels: int = 3
    ) -> None:
        super().__init__()
        proposals = per_axis**2
        side = glimpse_size // 2 ** (len(channels) - 1)
        self.cnn = PatchCNN(in_channels, channels, TRUNK_CHANNELS)
        self.project_glimpse = nn.Linear(TRUNK_CHANNELS * side * side, MIXER_DIM)
        self.project_position = nn.Linear(2, MIXER_DIM)
        self.norm_tokens = nn.LayerNorm(2 * MIXER_DIM)
        self.mix_tokens = MLP(proposals, proposals, proposals)
        self.norm_channels = nn.LayerNorm(2 * MIXER_DIM)
        self.mix_channels = MLP(2 * MIXER_DIM, HIDDEN, 2 * MIXER_DIM)
        self.norm = nn.LayerNorm(2 * MIXER_DIM)
        self.logits = nn.Linear(2 * MIXER_DIM, num_particles)
        patches = torch.cartesian_prod(*[torch.arange(per_axis) + 0.5] * 2)  # row by row
        distance = torch.cdist(patches, per_axis * spread_points(num_particles))
        self.place = nn.Parameter(-0.5 * distance.square())

    def forward(
        self, glimpses: Float[Tensor, "b n c s s"], proposals: Float[Tensor, "b n 2"]
    ) -> Float[Tensor, "b k 2"]:
        """Anchors, inside the convex hull of the proposals; ``glimpses`` are those around the proposals."""
        seen = self.project_glimpse(self.cnn(glimpses.flatten(0, 1)).flatten(1)).unflatten(0, glimpses.shape[:2])
        tokens = torch.cat([seen, self.project_position(proposals)], dim=-1)
        mixed = self.mix_tokens(self.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2)
        tokens = tokens + mixed
        tokens = tokens + self.mix_channels(self.norm_channels(tokens))
        logits = self.logits(self.norm(tokens)).float() + self.place
        with torch.autocast(logits.device.type, enabled=False):  # bf16 would blur positions
            return logits.softmax(1).transpose(1, 2) @ proposals


def spread_points(count: int) -> Float[Tensor, "n 2"]:
    """``count`` points (y, x) spread over the unit square: about sqrt(count) rows, each with points at even steps."""
    rows = max(1, round(count**0.5))
    points = []
    for row in range(rows):
        columns = count // rows + (row < count % rows)
        points += [((row + 0.5) / rows, (column + 0.5) / columns) for column in range(columns)]
    return torch.tensor(points)


class GlimpseTrunk(nn.Module):
    """A glimpse to a hidden vector of 256: PatchCNN to 32 maps, then Linear, Linear, ReLU, Linear, ReLU."""

    def __init__(self, glimpse_size: int, channels: Sequence[int], in_channels: int) -> None:
        super().__init__()
        self.cnn = PatchCNN(in_channels, channels, TRUNK_CHANNELS)
        side = glimpse_size // 2 ** (len(channels) - 1)
        self.project = nn.Linear(TRUNK_CHANNELS * side * side, HIDDEN)
        self.mlp = MLP(HIDDEN, HIDDEN, HIDDEN, final_activation=True)

    def forward(self, glimpses: Float[Tensor, "n c s s"]) -> Float[Tensor, "n d"]:
        """One hidden vector per glimpse."""
        return self.mlp(self.project(self.cnn(glimpses).flatten(1)))


class AttributeEncoder(nn.Module):
    """Glimpse (and score map, where used) to the attributes relative to the glimpse's centre (appendix D.3)."""

    def __init__(self, glimpse_size: int, channels: Sequence[int], score_map: bool) -> None:
        super().__init__()
        self.score_map = score_map
        self.trunk = GlimpseTrunk(glimpse_size, channels, in_channels=4 if score_map else 3)
        self.heads = AttributeHeads(HIDDEN)

    def forward(
        self, glimpses: Float[Tensor, "n k c s s"], score_map: Float[Tensor, "n k 1 s s"] | None = None
    ) -> Attributes:
        """Attributes of each glimpse. Without a previous frame the score map is zero."""
        n, k = glimpses.shape[:2]
        if self.score_map:
            if score_map is None:
                score_map = torch.zeros_like(glimpses[:, :, :1])
            glimpses = torch.cat([glimpses, score_map], dim=2)
        hidden = self.trunk(glimpses.flatten(0, 1))
        return self.heads(hidden.view(n, k, -1))


class AppearanceEncoder(nn.Module):
    """Glimpse to mean and log-variance of the particle's features.

    ``initial_log_var`` is added to the log-variance's bias at the start: features that are all noise teach the decoder
    nothing, and Adam needs about 1 / lr steps for each unit.
    """

    def __init__(
        self, glimpse_size: int, channels: Sequence[int], feature_dim: int, initial_log_var: float = 0.0
    ) -> None:
        super().__init__()
        self.trunk = GlimpseTrunk(glimpse_size, channels, in_channels=3)
        self.head = nn.Linear(HIDDEN, 2 * feature_dim)
        with torch.no_grad():
            self.head.bias[feature_dim:] += initial_log_var

    def forward(self, glimpses: Float[Tensor, "n c s s"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Mean and log-variance of each glimpse's features."""
        mean, log_var = self.head(self.trunk(glimpses)).float().chunk(2, dim=-1)
        return mean, bound_log_var(log_var)


class BackgroundEncoder(nn.Module):
    """An image with the particles masked out, to mean and log-variance of the background vector."""

    def __init__(self, image_size: int, channels: Sequence[int], background_dim: int) -> None:
        super().__init__()
        self.cnn = PatchCNN(3, channels, TRUNK_CHANNELS, first_kernel=7)
        side = image_size // 2 ** (len(channels) - 1)
        self.mlp = MLP(TRUNK_CHANNELS * side * side, HIDDEN, HIDDEN, 2 * background_dim)

    def forward(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Mean and log-variance of each image's background vector."""
        mean, log_var = self.mlp(self.cnn(images).flatten(1)).float().chunk(2, dim=-1)
        return mean, bound_log_var(log_var)


class GlimpseDecoder(nn.Module):
    """Features to an RGBA glimpse in [0, 1]; channel 0 is alpha."""

    def __init__(self, feature_dim: int, glimpse_size: int) -> None:
        super().__init__()
        doublings = log2_exact(glimpse_size) - 3
        widths = [TRUNK_CHANNELS] + [64] * doublings
        blocks = [ConvBlock(a, b, upsample=True) for a, b in itertools.pairwise(widths)]
        self.net = ConvChain(
            MLP(feature_dim, HIDDEN, HIDDEN, TRUNK_CHANNELS * 8 * 8, final_activation=True),
            nn.Unflatten(-1, (TRUNK_CHANNELS, 8, 8)),
            *blocks,
            ConvBlock(widths[-1], TRUNK_CHANNELS),
            nn.Conv2d(TRUNK_CHANNELS, 4, 1),
            nn.Sigmoid(),
        )

    def forward(self, features: Float[Tensor, "n m"]) -> Float[Tensor, "n 4 s s"]:
        """One RGBA glimpse, alpha first, per feature vector."""
        return self.net(features).float()


class BackgroundDecoder(nn.Module):
    """Background vector to an image in [0, 1]."""

    def __init__(self, background_dim: int, image_size: int, channels: Sequence[int]) -> None:
        super().__init__()
        first = image_size // 2 ** (len(channels) - 1)
        doublings = log2_exact(first) - 3
        blocks: list[nn.Module] = [ConvBlock(TRUNK_CHANNELS, TRUNK_CHANNELS, upsample=True) for _ in range(doublings)]
        widest = channels[-1]
        blocks += [
            nn.Conv2d(TRUNK_CHANNELS, widest, 3, padding=1, padding_mode="replicate", bias=False),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        ]
        for width in reversed(channels[1:-1]):
            blocks.append(ConvBlock(widest, width, upsample=True))
            widest = width
        self.net = ConvChain(
            MLP(background_dim, HIDDEN, HIDDEN, TRUNK_CHANNELS * 8 * 8, final_activation=True),
            nn.Unflatten(-1, (TRUNK_CHANNELS, 8, 8)),
            *blocks,
            ConvBlock(widest, channels[0]),
            nn.Conv2d(channels[0], 3, 1),
            nn.Sigmoid(),
        )

    def forward(self, background: Float[Tensor, "n m"]) -> Float[Tensor, "n 3 h w"]:
        """One image per background vector."""
        return self.net(background).float()


def background_mask(
    position: Float[Tensor, "n k 2"], transparency: Float[Tensor, "n k"], side: int, image_size: int
) -> Float[Tensor, "n 1 h w"]:
    """What the particles leave free: 1 minus the squares of ``side`` pixels around them, each times its transparency.

    The squares have a fixed size, not the learned scale. Carries no gradient.
    """
    with torch.no_grad(), torch.autocast(position.device.type, enabled=False):
        rows, columns = inside_squares(position, side, image_size, image_size)
        covered = torch.einsum("nkh,nkw->nhw", rows * transparency.unsqueeze(-1), columns.to(transparency.dtype))
        return (1 - covered.clamp(0, 1)).unsqueeze(1)


class Stitched(NamedTuple):
    """Particles and background composed into images."""

    video: Float[Tensor, "n c h w"]
    background_mask: Float[Tensor, "n 1 h w"]
    masks: Float[Tensor, "n k 1 h w"]
    """What each particle contributes to a pixel; with the background's mask they sum to one."""
    components: Float[Tensor, "n k c h w"]


CANVAS_BYTES = 4 << 20
"""Memory of the RGBA canvases of the frames that ``compose`` works on together: they should stay in a cache."""


def compose(
    glimpses: Float[Tensor, "n k 4 s s"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    depth: Float[Tensor, "n k"],
    transparency: Float[Tensor, "n k"],
    background: Float[Tensor, "n c h w"],
    alpha_noise: float = 0.0,
) -> Float[Tensor, "n c h w"]:
    """The ``video`` of ``stitch`` without what each particle contributes to it.

    A full canvas per particle would be most of a training step's memory. So a few frames are composed at a time, and in
    the backward pass again, with the same noise. On a CPU a canvas has no more rows than the glimpses of these frames
    reach, unless noise makes alpha positive everywhere.
    """
    inputs = (glimpses, position, scale, depth, transparency, background)
    wanted = torch.is_grad_enabled() and any(field.requires_grad for field in inputs)
    height, width = background.shape[-2:]
    at_once = max(1, CANVAS_BYTES // (4 * glimpses.shape[1] * height * width * glimpses.element_size()))
    pieces: list[Tensor] = []
    for piece in zip(*(field.split(at_once) for field in inputs), strict=True):
        if wanted:
            composed = checkpoint(_compose, piece, alpha_noise, use_reentrant=False, preserve_rng_state=alpha_noise > 0)
            pieces.append(cast(Tensor, composed))
        else:
            pieces.append(_compose(piece, alpha_noise))
    return torch.cat(pieces)


def _compose(inputs: Sequence[Tensor], alpha_noise: float) -> Tensor:
    glimpses, position, scale, depth, transparency, background = inputs
    height, width = background.shape[-2:]
    first = rows = None
    if glimpses.device.type == "cpu" and alpha_noise == 0:
        first, rows = rows_reached(position, scale, height, glimpses.shape[-1])
    canvas = paste_rows(glimpses, position, scale, height, width, first, rows)  # (n, k, rows, 4, w)
    alpha, rgb = canvas[:, :, :, :1], canvas[:, :, :, 1:]
    if alpha_noise > 0:
        alpha = (alpha + alpha_noise * torch.randn(alpha.shape, dtype=alpha.dtype, device=alpha.device)).clamp(0, 1)
    alpha = alpha * transparency[:, :, None, None, None]
    importance = alpha * torch.sigmoid(-depth)[:, :, None, None, None]
    shares = alpha * importance
    terms = torch.cat([importance, shares, shares * rgb], dim=3)
    sums = terms.sum(1) if first is None else _sum_rows(terms, first, height)
    of_all = (sums[:, :, 1:] / (sums[:, :, :1] + 1e-5)).transpose(1, 2)  # (n, 4, h, w)
    return (1 - of_all[:, :1]).clamp_min(0) * background + of_all[:, 1:]


def _sum_rows(terms: Float[Tensor, "n k r c w"], first: Int[Tensor, "n k"], height: int) -> Float[Tensor, "n h c w"]:
    """Sum over particles of canvases that begin at row ``first`` of the image."""
    n, _, rows, c, w = terms.shape
    image = torch.arange(n, device=first.device).view(n, 1, 1) * height
    target = image + first.unsqueeze(-1) + torch.arange(rows, device=first.device)  # (n, k, rows)
    sums = terms.new_zeros(n * height, c * w).index_add(0, target.flatten(), terms.flatten(0, 2).flatten(1))
    return sums.view(n, height, c, w)


def stitch(
    glimpses: Float[Tensor, "n k 4 s s"],
    position: Float[Tensor, "n k 2"],
    scale: Float[Tensor, "n k 2"],
    depth: Float[Tensor, "n k"],
    transparency: Float[Tensor, "n k"],
    background: Float[Tensor, "n c h w"],
    alpha_noise: float = 0.0,
) -> Stitched:
    r"""Paste RGBA glimpses (channel 0 is alpha) over a background, nearer ones (smaller depth) in front.

    .. math::  a_i = t_i \alpha_i, \quad
               w_i = \frac{a_i \sigma(-d_i)}{\sum_j a_j \sigma(-d_j) + 10^{-5}}, \quad
               x = \Big(1 - \sum_i w_i a_i\Big) x_{bg} + \sum_i w_i a_i\, x_i

    ``scale`` is the share of the image's side, after the sigmoid. ``alpha_noise`` is the standard deviation of the
    noise on alpha in DDLP's noisy stage. Source: DDLP, appendix D.4, figure 18.
    """
    canvas = paste_glimpses(glimpses, position, scale, background.shape[-2], background.shape[-1]).clamp(0, 1)
    alpha, rgb = canvas[:, :, :1], canvas[:, :, 1:]
    if alpha_noise > 0:
        alpha = (alpha + alpha_noise * torch.randn_like(alpha)).clamp(0, 1)
    alpha = alpha * transparency[:, :, None, None, None]
    importance = alpha * torch.sigmoid(-depth)[:, :, None, None, None]
    masks = alpha * importance / (importance.sum(1, keepdim=True) + 1e-5)
    background_share = (1 - masks.sum(1)).clamp_min(0)  # rounding alone could make it negative
    video = background_share * background + (masks * rgb).sum(1)
    return Stitched(video, background_share, masks, rgb)
