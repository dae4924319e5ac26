"""ED-LSTM: frames predicted by a recurrent network without objects.

The baseline in Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels" (2019), section 3.4, whose model is
``ssm``: an encoder, an LSTM over time and a decoder, each frame predicted from those before it.

    state_t = LSTM(state_{t-1}, encode(v_{t-1})),   p(v_t) = decode(state_t)

Reading order: EDLSTMConfig, EDLSTMLatents, EDLSTM.

There is no object in its latents: k is 1, the whole frame, and trivially the same thing in every frame. As every frame
is predicted, a "reconstruction" of frame t is what the frames before it promised, the first frame's a constant.

What the paper leaves open is resolved so: hidden layers are 1024 wide, the decoder mirrors the encoder, the LSTM's
first input is zero, the loss is summed over pixels and frames, and d^(-1/4) is the deviation of initial weights, with
each gate of the LSTM two matrices of its own. The convolutional variants, which the paper found no better, it does not
describe; ours are strided convolutions before the encoder's layers, mirrored after the decoder's.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from objdyn.interface import Loss, Scene
from objdyn.layers.binary import bernoulli_nll, binary_frames, init_matrix, to_video


@dataclass(frozen=True)
class EDLSTMConfig:
    """Settings of an ED-LSTM; the defaults are the paper's."""

    image_size: int = 48
    """Side of the square binary frames, in pixels."""
    threshold: float | None = None
    """Brightness in (0, 1) above which a pixel is white; None refuses frames that are not binary."""
    state_dim: int = 2048
    """Width of the LSTM's state."""
    widths: tuple[int, ...] = (1024,)
    """Fully connected layers of the encoder, one or two in the paper; the decoder has as many."""
    channels: tuple[int, ...] = ()
    """Convolutions before them, each halving the frame; none makes the model fully connected."""
    scheduled_sampling: float = 0.0
    """Probability that a frame is predicted from the model's own prediction of the frame before instead of the true one
    in training; 0 is teacher forcing (paper)."""
    free_running_weight: float = 0.0
    """Weight of the likelihood of the frames after ``context``, predicted from the model's own; 0 leaves it out."""
    context: int = 5
    """True frames before those."""

    def __post_init__(self) -> None:
        for name in ("image_size", "state_dim", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be one or more positive widths, got {self.widths}")
        if self.channels and (min(self.channels) < 1 or self.image_size % 2 ** len(self.channels)):
            raise ValueError(
                f"channels must be positive, and {len(self.channels)} of them halve image_size={self.image_size} as "
                f"often, which must come out even; got {self.channels}"
            )
        if not 0 <= self.scheduled_sampling <= 1:
            raise ValueError(f"scheduled_sampling is a probability, got {self.scheduled_sampling}")
        if not 0 <= self.free_running_weight < math.inf:
            raise ValueError(f"free_running_weight must be 0 or more and finite, got {self.free_running_weight}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a brightness in (0, 1) or None, got {self.threshold}")


class EDLSTMLatents(NamedTuple):
    """What predicts a frame, and what goes on from it; k is 1 and no object."""

    hidden: Float[Tensor, "b t k s"]
    """The LSTM's output for the frame, from the frames before it: what is decoded."""
    cell: Float[Tensor, "b t k s"]
    encoded: Float[Tensor, "b t k e"]
    """The encoder's view of the frame itself: the next step's input."""


class EDLSTM(nn.Module):
    """The video model."""

    def __init__(self, config: EDLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.image_size, config.channels, config.widths)
        self.lstm = nn.LSTM(config.widths[-1], config.state_dim, batch_first=True)
        self.decoder = Decoder(config.image_size, config.channels, config.widths, config.state_dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                init_matrix(parameter, parameter.numel() // (4 if name.startswith("lstm.") else 1))

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Loss:
        """The negative log-likelihood of every frame given those before it, in nats per clip; a mean over clips.

        ``terms`` holds it in nats per frame (``recon``) and per clip (``recon_clip``), and ``free_running``, that of
        frames after the context, per frame, where it has a weight.

        Raises:
            ValueError: the frames are not binary (``layers.binary.binary_frames``); or ``free_running_weight`` asks for
                frames after the context, and there are none.
        """
        frames = binary_frames(video, self.config.image_size, self.config.threshold)
        length = frames.shape[1]
        if self.training and self.config.scheduled_sampling:
            logits = self._predict(frames, [self.config.scheduled_sampling] * length)
        else:
            logits = self._predict(frames)
        recon = bernoulli_nll(logits, frames).sum(1).mean()
        total, terms = recon, {"recon": recon.detach() / length, "recon_clip": recon.detach()}
        if self.config.free_running_weight:
            context = self.config.context
            if length <= context:
                raise ValueError(
                    f"free_running_weight needs frames after the first context={context}, got clips of {length}; raise "
                    "clip_frames, or lower model.context"
                )
            free = self._predict(frames, [float(t >= context) for t in range(length)])[:, context:]
            nll = bernoulli_nll(free, frames[:, context:]).sum(1).mean()
            total = total + self.config.free_running_weight * nll
            terms["free_running"] = nll.detach() / (length - context)
        return Loss(total, terms)

    def encode(self, video: Float[Tensor, "b t c h w"], *, generator: torch.Generator | None = None) -> EDLSTMLatents:
        """States of every frame. Nothing in them is random, so ``generator`` changes nothing.

        Raises:
            ValueError: the frames are not binary (``layers.binary.binary_frames``).
        """
        frames = binary_frames(video, self.config.image_size, self.config.threshold)
        encoded = self.encoder(frames)
        found, state = [], None
        for step in torch.cat([torch.zeros_like(encoded[:, :1]), encoded[:, :-1]], dim=1).unbind(1):
            state = self._step(step, state)
            found.append(state)
        hidden, cell = (torch.stack(field, dim=1) for field in zip(*found, strict=True))
        return EDLSTMLatents(*(field.unsqueeze(2) for field in (hidden, cell, encoded)))

    def rollout(
        self, latents: EDLSTMLatents, horizon: int, *, generator: torch.Generator | None = None
    ) -> EDLSTMLatents:
        """Go on from the last frame, each predicted frame the input of the next.

        Without a generator that input is the probability of white in each pixel (the paper's), with one a frame drawn
        of it.

        Raises:
            ValueError: ``horizon`` is less than 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        hidden, cell, encoded = (field[:, -1, 0] for field in latents)
        found = []
        for _ in range(horizon):
            hidden, cell = self._step(encoded, (hidden, cell))
            frame = self.decoder(hidden).sigmoid()
            encoded = self.encoder(frame if generator is None else torch.bernoulli(frame, generator=generator))
            found.append((hidden, cell, encoded))
        return EDLSTMLatents(*(torch.stack(field, dim=1).unsqueeze(2) for field in zip(*found, strict=True)))

    def decode(self, latents: EDLSTMLatents, components: bool = False) -> Scene:
        """White's probability in each pixel, in three equal channels; the one component is the frame."""
        video = to_video(self.decoder(latents.hidden[:, :, 0]).sigmoid(), self.config.image_size)
        if not components:
            return Scene(video)
        return Scene(video, torch.ones_like(video[:, :, None, :1]), video.unsqueeze(2))

    def _predict(self, frames: Float[Tensor, "b t p"], own: list[float] | None = None) -> Float[Tensor, "b t p"]:
        """Logits of every frame; ``own`` is the probability that a frame t is replaced by its prediction as an input.

        Without ``own``, all true frames, the LSTM runs over the whole clip at once.
        """
        if own is None:
            encoded = self.encoder(frames[:, :-1])
            hidden, _ = self.lstm(torch.cat([encoded.new_zeros(len(frames), 1, encoded.shape[-1]), encoded], dim=1))
            return self.decoder(hidden.to(frames.dtype))
        step, state = frames.new_zeros(len(frames), self.config.widths[-1]), None
        logits = []
        for frame, share in zip(frames.unbind(1), own, strict=True):
            state = self._step(step, state)
            logits.append(self.decoder(state[0]))
            replaced = torch.rand(len(frames), 1, device=frames.device) < share
            step = self.encoder(torch.where(replaced, logits[-1].sigmoid(), frame))
        return torch.stack(logits, dim=1)

    def _step(self, encoded: Float[Tensor, "b e"], state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """One step of the LSTM: hidden and cell (b, s), from those before."""
        before = None if state is None else (state[0].unsqueeze(0), state[1].unsqueeze(0))
        _, (hidden, cell) = self.lstm(encoded.unsqueeze(1), before)
        return hidden.squeeze(0).to(encoded.dtype), cell.squeeze(0).to(encoded.dtype)


class Encoder(nn.Module):
    """Frames to vectors: convolutions if there are any, then fully connected layers, a ReLU after each."""

    def __init__(self, size: int, channels: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise((1, *channels)):
            layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        layers = []
        for inside, outside in itertools.pairwise((_features(size, channels), *widths)):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch e"]:
        maps = self.convolutions(rearrange(frames, "... (h w) -> (...) 1 h w", h=self.size))
        return self.layers(maps.flatten(1)).unflatten(0, frames.shape[:-1]).to(frames.dtype)


class Decoder(nn.Module):
    """States to logits: the encoder mirrored, as many layers, a ReLU after each but the last."""

    def __init__(self, size: int, channels: tuple[int, ...], widths: tuple[int, ...], state_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise((state_dim, *reversed(widths[:-1]), _features(size, channels))):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        self.layers = nn.Sequential(*(layers if channels else layers[:-1]))
        self.shape = (channels[-1] if channels else 1, size >> len(channels), size >> len(channels))
        layers = []
        for inside, outside in itertools.pairwise((*reversed(channels), 1)):
            layers += [nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers[:-1])

    def forward(self, states: Float[Tensor, "*batch s"]) -> Float[Tensor, "*batch p"]:
        maps = self.layers(states.flatten(0, -2)).unflatten(-1, self.shape)
        return self.convolutions(maps).flatten(1).unflatten(0, states.shape[:-1]).to(states.dtype)


def _features(size: int, channels: tuple[int, ...]) -> int:
    """Values that a frame is after the convolutions."""
    return size**2 if not channels else channels[-1] * (size >> len(channels)) ** 2
