"""Clips, and the only conversions between video files, stored samples, batches and model input.

How a datum walks:

    video file --read_video--> frames           uint8 (t, h, w, c)
    Clip --to_sample--> members --from_sample--> Clip
    clips --collate--> uint8 (b, t, c, h, w) --to_model_input--> float32 in [0, 1]
    float video --to_frames--> uint8 (..., t, h, w, c)
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import re
import sys
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

SINGLE_CHANNEL = "frames of a single channel are repeated to three, red, green and blue alike"
"""What is said where that happens."""
CODECS = ("zstd", "npy", "webp-strip")
MAX_BYTES = 1 << 30
"""Largest array that a sample may hold, in bytes; a sample that claims more is refused before memory is taken."""

NPY_HEADER = 1000
"""Longest header of an npy file, in letters; numpy parses it as Python, which takes the whole stack for a long one."""

_MEMBERS = {"zstd": "frames.npy.zst", "npy": "frames.npy", "webp-strip": "frames.webp"}
_KEY = re.compile(r"[a-z0-9_-]+")
_TRUTH_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TRUTH = {
    "segmentation": ("uint8", 3),
    "positions": ("float32", 3),
    "rendered_positions": ("float32", 3),
    "velocities": ("float32", 3),
    "present": ("bool", 2),
    "num_objects": ("int64", 0),
}
_SEEK_FRAMES = 300
_WHOLE = 0.9  # share of the promised frames or seconds from which on a video counts as whole
_WEBP_SIDE = 16383
_WEBP_PIXELS = 89_000_000  # above this Pillow takes an image for a decompression bomb
_CONTAINERS = "avi,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"


@dataclass(frozen=True)
class Clip:
    """Some frames of one video, and what is known about them.

    ``truth`` may hold ``segmentation`` uint8 (t, h, w) with 0 for the background, ``positions`` float32 (t, n, 2) as
    (y, x) in [-1, 1] with ``align_corners=True`` (y down), ``present`` bool (t, n), ``num_objects`` int64 (), and other
    arrays. Where objects are drawn with noise, ``positions`` are those without it and ``rendered_positions`` float32
    (t, n, 2) those drawn; ``velocities`` float32 (t, n, 2) are the change of ``positions`` per frame, (y, x). An array
    of rank 1 or more has time as its first axis; an array of rank 0 describes the whole clip.

    Raises:
        ValueError: a shape, a dtype or the key breaks these rules.
    """

    key: str
    """Unique in its dataset; lower-case letters, digits, ``_`` and ``-``; assigned by position, never by arrival."""
    frames: np.ndarray
    """uint8 (t, h, w, c)."""
    fps: float
    """Frames per second of the source video; the kept frames come at ``fps / stride``."""
    start_frame: int
    """Index of the first kept frame in the source video."""
    stride: int
    """Source frames from one kept frame to the next."""
    source: str
    """Path relative to the source folder, or ``sim:NAME/split/episode``."""
    truth: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"a clip's key may hold lower-case letters, digits, _ and - only, got {self.key!r}")
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or 0 in self.frames.shape:
            raise ValueError(
                f"frames of clip {self.key} must be uint8 (t, h, w, c) without an empty axis, got "
                f"{self.frames.dtype} {self.frames.shape}"
            )
        if self.start_frame < 0 or self.stride < 1 or not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(
                f"clip {self.key} needs start_frame >= 0, stride >= 1 and a positive fps, got "
                f"{self.start_frame}, {self.stride}, {self.fps}"
            )
        for name, array in self.truth.items():
            _check_truth(self.key, name, array, self.frames.shape[:3])

    def window(self, start: int, length: int) -> "Clip":
        """Cut ``length`` frames from frame ``start`` of this clip, with their truth; the key stays.

        Raises:
            ValueError: the window leaves the clip.
        """
        total = len(self.frames)
        if start < 0 or length < 1 or start + length > total:
            raise ValueError(f"clip {self.key} has {total} frames, cannot cut {length} from frame {start}")
        cut = slice(start, start + length)
        return dataclasses.replace(
            self,
            frames=self.frames[cut],
            start_frame=self.start_frame + start * self.stride,
            truth={name: array[cut] if array.ndim else array for name, array in self.truth.items()},
        )


def to_sample(clip: Clip, codec: str = "zstd") -> dict[str, bytes]:
    """Encode a clip as the members of one WebDataset sample: extension without the key -> bytes.

    ``frames.npy.zst`` (npy under zstd level 3 with content checksum), ``frames.npy`` or ``frames.webp`` (frames stacked
    into one lossless image), then ``json``, then ``<truth>.npy`` by name. The same clip gives the same bytes.

    Raises:
        ValueError: the codec is unknown or cannot hold this clip.
    """
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; choose one of {', '.join(CODECS)}")
    t, h, w, c = clip.frames.shape
    if clip.frames.nbytes > MAX_BYTES:
        raise ValueError(f"clip {clip.key} holds {clip.frames.nbytes} bytes, more than {MAX_BYTES}: store fewer frames")
    if codec == "zstd":
        import zstandard

        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True)
        frames = compressor.compress(to_npy(clip.frames))
    elif codec == "npy":
        frames = to_npy(clip.frames)
    else:
        frames = _webp_bytes(clip)
    meta = {
        "channels": c,
        "fps": clip.fps,
        "frames": t,
        "height": h,
        "source": clip.source,
        "start_frame": clip.start_frame,
        "stride": clip.stride,
        "width": w,
    }
    members = {_MEMBERS[codec]: frames, "json": json.dumps(meta, sort_keys=True).encode()}
    for name in sorted(clip.truth):
        members[f"{name}.npy"] = to_npy(clip.truth[name])
    return members


def from_sample(key: str, members: Mapping[str, bytes | memoryview]) -> Clip:
    """Decode what ``to_sample`` wrote; ``frames`` may be a read-only view of the bytes.

    Every size is checked against the json and ``MAX_BYTES`` before memory is taken.

    Raises:
        ValueError: a member is missing, unknown, damaged, or of another dtype, rank or size than the json says.
    """
    codecs = [codec for codec, name in _MEMBERS.items() if name in members]
    if len(codecs) != 1 or "json" not in members:
        raise ValueError(
            f"sample {key} needs json and one of {', '.join(_MEMBERS.values())}, got {', '.join(sorted(members))}"
        )
    shape, meta = _meta(key, members["json"])
    data = members[_MEMBERS[codecs[0]]]
    if codecs[0] == "webp-strip":
        frames = _from_webp(key, data, shape)
    else:
        raw = _unzstd(key, data, math.prod(shape)) if codecs[0] == "zstd" else data
        frames = from_npy(key, "frames", raw)
    if frames.shape != shape or frames.dtype != np.uint8:
        raise ValueError(f"sample {key}: json says frames uint8 {shape}, data are {frames.dtype} {frames.shape}")
    truth = {}
    for name, data in members.items():
        if name in ("json", _MEMBERS[codecs[0]]):
            continue
        if not name.endswith(".npy"):
            raise ValueError(f"sample {key} has a member {name!r} that is neither frames, json nor <truth>.npy")
        truth[name.removesuffix(".npy")] = from_npy(key, name, data).copy()
    return Clip(key=key, frames=frames, truth=truth, **meta)


def collate(clips: Sequence[Clip]) -> UInt8[Tensor, "b t c h w"]:
    """Stack clips of equal shape into one batch.

    Raises:
        ValueError: there is no clip, or two differ in shape.
    """
    if not clips:
        raise ValueError("cannot make a batch of no clips")
    for clip in clips:
        if clip.frames.shape != clips[0].frames.shape:
            raise ValueError(
                f"clips of one batch must have one shape: {clips[0].key} is {clips[0].frames.shape}, "
                f"{clip.key} is {clip.frames.shape}"
            )
    t, h, w, c = clips[0].frames.shape
    batch = np.empty((len(clips), t, c, h, w), np.uint8)
    for row, clip in zip(batch, clips, strict=True):
        np.copyto(row, clip.frames.transpose(0, 3, 1, 2))
    return torch.from_numpy(batch)


def stack_truth(
    clips: Sequence[Clip], names: Sequence[str] | Mapping[str, str], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Stack the truth that a model takes as input, one row per clip, on ``device``.

    A mapping of names (``Family.inputs``) also has the model's setting that says whether an input is needed, for the
    message.

    Raises:
        ValueError: a clip lacks one of ``names``, or has it in another shape than the first clip.
    """
    stacked = {}
    for name in names:
        for clip in clips:
            if name not in clip.truth:
                setting = names[name] if isinstance(names, Mapping) else ""
                without = f", or set model.{setting}=false (--model.no-{setting.replace('_', '-')})" if setting else ""
                raise ValueError(
                    f"clip {clip.key} has no truth {name!r}, which the model takes as input; use a dataset that has "
                    f"it{without}"
                )
            if clip.truth[name].shape != clips[0].truth[name].shape:
                raise ValueError(
                    f"truth {name!r} of one batch must have one shape: {clips[0].key} has "
                    f"{clips[0].truth[name].shape}, {clip.key} has {clip.truth[name].shape}"
                )
        stacked[name] = torch.from_numpy(np.stack([clip.truth[name] for clip in clips])).to(device)
    return stacked


def to_model_input(
    frames: UInt8[Tensor, "b t c h w"], device: torch.device | str | None = None
) -> Float[Tensor, "b t c h w"]:
    """Turn stored pixels into a model's ``video``: float32 in [0, 1], on ``device``.

    Frames of a single channel are repeated to three, which a process says once on stderr.

    Raises:
        ValueError: the frames are not uint8 of rank 5.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 5:
        raise ValueError(f"model input is made from uint8 (b, t, c, h, w), got {frames.dtype} {tuple(frames.shape)}")
    if frames.shape[2] == 1:
        _say_once(f"note: {SINGLE_CHANNEL}")
        frames = frames.expand(-1, -1, 3, -1, -1)
    return frames.to(device=device, non_blocking=True).to(torch.float32) / 255


@functools.cache
def _say_once(line: str) -> None:
    """Print a line once in a process. A Python warning would come again whenever anything changes the filters."""
    print(line, file=sys.stderr, flush=True)


def to_frames(video: Float[Tensor, "*batch t c h w"]) -> np.ndarray:
    """Turn float video (t, c, h, w) or (b, t, c, h, w) into uint8 (..., t, h, w, c): clamped to [0, 1], rounded."""
    pixels = video.detach().to(torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c").contiguous().cpu().numpy()


class Video(NamedTuple):
    """A decoded video, or a range of it."""

    frames: np.ndarray
    """uint8 (t, h, w, 3)."""
    fps: float


class VideoInfo(NamedTuple):
    """What decoding a whole video found."""

    frames: int
    """Frames that decode."""
    promised: int
    """Frames that the container's header promises; 0 where it says nothing."""
    fps: float
    height: int
    width: int
    keyframes: tuple[tuple[int, int], ...]
    """(frame, pts) of keyframes to seek to, some hundreds of frames apart; empty where pts do not increase."""
    intervals: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time between two frames in seconds, where the rate varies; else zeros."""


class VideoError(ValueError):
    """A video that cannot be used; ``code`` sorts the reasons, the message explains."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Limits(NamedTuple):
    """What reading one video may cost; more is refused before it is spent. None sets no limit."""

    frames: int | None = None
    """Frames of a video."""
    pixels: int | None = None
    """Pixels of one frame."""
    bytes: int | None = None
    """Size of a file."""
    on_frame: Callable[[], object] = lambda: None
    """Called after each decoded frame, so that a caller can tell a slow decoder from one that hangs."""

    def check_frames(self, frames: int) -> None:
        """Raise VideoError where a video has too many frames."""
        if self.frames is not None and frames > self.frames:
            raise VideoError("too-long", f"it has at least {frames} frames, more than max_frames={self.frames}")

    def check_size(self, height: int, width: int) -> None:
        """Raise VideoError where a frame has too many pixels."""
        if self.pixels is not None and height * width > self.pixels:
            raise VideoError(
                "too-large", f"its frames are {width}x{height} pixels, more than max_pixels={self.pixels} in all"
            )

    def check_bytes(self, file: BinaryIO) -> None:
        """Raise VideoError where a file is too large; else it is as it was, at its start."""
        if self.bytes is not None:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if size > self.bytes:
                raise VideoError("too-large", f"a file of {size} bytes, more than max_file_gb={self.bytes / 1e9:g}")


NO_LIMITS = Limits()


def read_video(
    file: str | BinaryIO, start: int = 0, length: int | None = None, stride: int = 1, limits: Limits = NO_LIMITS
) -> Video:
    """Decode every ``stride``-th frame from ``start``, at most ``length`` of them, as RGB; one thread.

    Raises:
        ValueError: the file is no video, is damaged, or ends before ``length`` frames.
    """
    stop = None if length is None else start + (length - 1) * stride + 1
    frames, fps = [], 0.0
    for index, frame, stream in _decode(file, limits):
        fps = stream.fps
        if stop is not None and index >= stop:
            break
        if index >= start and (index - start) % stride == 0:
            frames.append(frame.to_ndarray(format="rgb24"))
    if not frames or (length is not None and len(frames) < length):
        raise ValueError(
            f"video ends after {len(frames)} of the {length or 'one or more'} frames asked for from frame {start}"
        )
    return Video(np.stack(frames), fps)


def video_frames(
    file: str | BinaryIO,
    wanted: Collection[int],
    keyframes: Sequence[tuple[int, int]] = (),
    limits: Limits = NO_LIMITS,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode the frames whose index is in ``wanted``, in order: (index, uint8 (h, w, 3)); ends early if the video does.

    ``keyframes`` are those of ``probe_video``; with them frames late in a long video are reached by a seek. A seek goes
    one keyframe further back than it must, since a stream may refer across its last one, and is given up for a decode
    from the start when it does not land on the frame it should.

    Raises:
        ValueError: the file is no video, is damaged, or passes a limit.
    """
    if not wanted:
        return
    first, last = min(wanted), max(wanted)
    for index, frame, _ in _decode(file, limits, [entry for entry in keyframes if entry[0] <= first][-2:-1]):
        if index in wanted:
            if frame.is_corrupt:
                raise VideoError("damaged", f"FFmpeg marks frame {index} as damaged")
            yield index, frame.to_ndarray(format="rgb24")
        if index >= last:
            return


def probe_video(file: str | BinaryIO, limits: Limits = NO_LIMITS) -> VideoInfo:
    """Count the frames of a video by decoding all of it, since headers promise too much or too little.

    Raises:
        VideoError: with code ``unreadable``, ``no-video`` (only sound), ``no-decoder``, ``no-frames``, ``truncated``
            (less than 90 % of what the header promises, in frames and in the time that they cover), ``damaged``,
            ``bad-geometry`` (frames differ in size), ``too-long`` or ``too-large``.
    """
    frames, height, width, ordered, start, last = 0, 0, 0, True, 0, -math.inf
    step, shortest, longest = 0.0, math.inf, 0.0
    most = math.inf if limits.frames is None else limits.frames
    corrupt, first_corrupt = 0, 0
    keyframes: list[tuple[int, int]] = []
    stream = _Stream()
    ended = ""
    try:
        for index, frame, found in _decode(file, limits):
            if not frames:
                stream, height, width = found, frame.height, frame.width
                limits.check_size(height, width)
                limits.check_frames(stream.promised)
            elif frame.height != height or frame.width != width:
                raise VideoError(
                    "bad-geometry", f"frame {index} is {frame.width}x{frame.height}, those before it {width}x{height}"
                )
            frames = index + 1
            if frames > most:
                limits.check_frames(frames)
            if frame.is_corrupt:
                corrupt, first_corrupt = corrupt + 1, first_corrupt if corrupt else index
            pts = frame.pts
            ordered = ordered and pts is not None and pts > last
            if ordered and pts is not None:
                if pts - last != step and index:
                    step = pts - last
                    shortest, longest = min(shortest, step), max(longest, step)
                start, last = start if index else pts, pts
                if frame.key_frame and (not keyframes or index - keyframes[-1][0] >= _SEEK_FRAMES):
                    keyframes.append((index, pts))
    except _StreamError as error:
        stream, ended = error.stream, f"; then {error}"
    if not frames:
        promise = f", though the header promises {stream.promised}" if stream.promised else ""
        raise VideoError("no-frames", f"no frame decodes{promise}{ended}")
    stream.check_whole(frames, (last - start) * stream.tick if ordered else 0.0, ended)
    if ended:
        raise VideoError("damaged", f"decoding stops after {frames} frames{ended}")
    if corrupt:
        raise VideoError(
            "damaged", f"FFmpeg marks {corrupt} of {frames} frames as damaged, the first is frame {first_corrupt}"
        )
    if stream.gif:
        _check_gif_end(file)
    # One of many ticks is rounding: 30 frames per second come in milliseconds at 33 and 34.
    varies = ordered and longest > 1.1 * shortest and (longest - shortest > 1 or shortest == 1)
    return VideoInfo(
        frames,
        stream.promised,
        stream.fps,
        height,
        width,
        tuple(keyframes) if ordered else (),
        (shortest * stream.tick, longest * stream.tick) if varies else (0.0, 0.0),
    )


@dataclass
class _Stream:
    """What a container says about its video."""

    fps: float = 0.0
    promised: int = 0
    expected: float = 0.0
    """Frames that should decode; fewer than promised where an edit list leaves some out, 0 if unknown."""
    seconds: float = 0.0
    """Length that the container states; 0 if unknown."""
    end: float = 0.0
    """When the last packet of any stream ends, in seconds; known after decoding, where no number of frames is."""
    tick: float = 0.0
    """Unit of pts in seconds."""
    gif: bool = False

    def check_whole(self, frames: int, covered: float, ended: str) -> None:
        """Raise VideoError if much less was found than the header promises.

        ``covered`` are the seconds from the first frame to the last, 0 if unknown: an AVI file counts frames that its
        camera dropped, so few frames that cover all of the time are whole.
        """
        if max(frames, covered * self.fps + 1) < _WHOLE * self.expected:
            raise VideoError("truncated", f"the header promises {self.promised} frames, {frames} decode{ended}")
        if not self.promised and self.end < _WHOLE * self.seconds:
            raise VideoError(
                "truncated", f"the header promises {self.seconds:.2f} s, the data end after {self.end:.2f} s{ended}"
            )


class _StreamError(VideoError):
    """Decoding failed; ``stream`` is what the header says."""

    def __init__(self, stream: _Stream, message: str) -> None:
        super().__init__("unreadable", message)
        self.stream = stream


def _decode(
    file: str | BinaryIO, limits: Limits, seek: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[int, Any, _Stream]]:
    """Yield (index, PyAV frame, stream) in display order, from the keyframe (index, pts) in ``seek`` if any."""
    import av
    from av.error import ArgumentError, FFmpegError

    facts, sized = None, True
    if not isinstance(file, str):
        limits.check_bytes(file)
    # FFmpeg counts padding, hence twice the limit; it refuses before it takes memory, whatever the header says.
    options = {} if limits.pixels is None else {"max_pixels": str(min(2**31 - 1, 2 * limits.pixels + (1 << 20)))}
    try:
        with av.open(
            file,
            "r",
            options=options,  # for FFmpeg's own look at the streams; the decoder gets them below
            # A whitelist, since a playlist named .mp4 would make FFmpeg open the addresses written in it.
            container_options={"format_whitelist": _CONTAINERS},
            metadata_errors="replace",  # a title in another encoding says nothing about the frames
        ) as container:
            stream = _video_stream(container)
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            stream.codec_context.options = options
            facts = _facts(container, stream)
            limits.check_size(stream.codec_context.height, stream.codec_context.width)
            sized = stream.codec_context.width > 0
            for first, pts in seek:
                container.seek(pts, stream=stream)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= pts)
                frame = next(frames, None)
                if frame is not None and frame.pts == pts:
                    for index, each in enumerate(itertools.chain((frame,), frames), first):
                        limits.on_frame()
                        yield index, each, facts
                    return
                container.seek(0, stream=stream)
            for index, frame in enumerate(_frames(container, stream, facts)):
                limits.on_frame()
                yield index, frame, facts
    except MemoryError:
        raise
    except (FFmpegError, OSError) as error:  # OSError: FFmpeg seeks outside of a file that is too short
        if isinstance(error, ArgumentError) and not sized and limits.pixels is not None:
            raise VideoError("too-large", f"its frames pass max_pixels={limits.pixels} by far") from error
        message = f"FFmpeg cannot read the video: {error.strerror or error}"
        raise VideoError("unreadable", message) if facts is None else _StreamError(facts, message) from error


def _video_stream(container: Any) -> Any:
    from av.stream import Disposition

    # An album cover is a stream of video with one frame.
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not container.streams:
        raise VideoError("unreadable", "FFmpeg finds no stream in the file; it was cut, or never finished")
    if not streams:
        others = ", ".join(sorted({str(stream.type) for stream in container.streams}))
        raise VideoError("no-video", f"the file has no video stream, it holds {others}")
    if streams[0].codec_context is None:
        raise VideoError("no-decoder", "FFmpeg here has no decoder for its video; convert it to a common codec")
    return streams[0]


def _facts(container: Any, stream: Any) -> _Stream:
    tick = float(stream.time_base or 0)
    seconds = stream.duration * tick if stream.duration else (container.duration or 0) / 1e6
    rate = float(stream.average_rate or 0)
    # The number of frames in an mp4 counts those that its edit list leaves out, the duration does not.
    expected = min(stream.frames, seconds * rate) if stream.duration and rate else stream.frames
    return _Stream(
        fps=float(stream.average_rate or stream.guessed_rate or 0),
        promised=stream.frames,
        expected=expected,
        seconds=seconds,
        tick=tick,
        gif=container.format.name == "gif",
    )


def _frames(container: Any, stream: Any, facts: _Stream) -> Iterator[Any]:
    """Decode all frames; where the header counts none, the end of the data is noted for a check of its length."""
    if facts.promised or not facts.seconds:
        yield from container.decode(stream)
        return
    ticks = [float(each.time_base or 0) for each in container.streams]
    for packet in container.demux():
        index = packet.stream.index
        if packet.pts is not None:
            facts.end = max(facts.end, (packet.pts + (packet.duration or 0)) * ticks[index])
        if index == stream.index:
            yield from packet.decode()


def _check_gif_end(file: str | BinaryIO) -> None:
    """Raise VideoError where a GIF lacks its last byte: it promises nothing, and what is missing would be blank."""
    with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as opened:
        opened.seek(max(0, opened.seek(0, io.SEEK_END) - 4096))
        if not opened.read().rstrip(b"\0\r\n ").endswith(b"\x3b"):
            raise VideoError("truncated", "the GIF ends without its end mark, so its last frames are missing")


def _check_truth(key: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if not _TRUTH_NAME.fullmatch(name) or name == "frames":
        raise ValueError(f"clip {key}: {name!r} cannot name truth; use lower-case letters, digits and _")
    dtype, rank = _TRUTH.get(name, (str(array.dtype), array.ndim))
    if array.dtype != np.dtype(dtype) or array.ndim != rank or array.dtype.hasobject:
        raise ValueError(f"truth {name} of clip {key} must be {dtype} of rank {rank}, got {array.dtype} {array.shape}")
    if array.ndim and array.shape[0] != shape[0]:
        raise ValueError(f"truth {name} of clip {key} must start with {shape[0]} frames, got {array.shape}")
    if name == "segmentation" and array.shape != shape:
        raise ValueError(
            f"segmentation of clip {key} must be {shape}, got {array.shape}; resize masks with nearest neighbour"
        )


def _meta(key: str, data: bytes | memoryview) -> tuple[tuple[int, ...], dict[str, Any]]:
    try:
        meta = json.loads(bytes(data))
        shape = tuple(int(meta[axis]) for axis in ("frames", "height", "width", "channels"))
        rest = {
            "fps": float(meta["fps"]),
            "start_frame": int(meta["start_frame"]),
            "stride": int(meta["stride"]),
            "source": str(meta["source"]),
        }
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"sample {key}: its json is not a clip's description ({error!r})") from error
    if min(shape) < 1 or math.prod(shape) > MAX_BYTES:
        raise ValueError(f"sample {key} claims frames {shape}; at most {MAX_BYTES} bytes are accepted")
    return shape, rest


def to_npy(array: np.ndarray) -> bytes:
    """Encode an array as ``.npy`` bytes, without any pickle; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    # asarray with order="C" keeps rank 0, where ascontiguousarray would make it rank 1.
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(key: str, name: str, data: bytes | memoryview) -> np.ndarray:
    """Decode ``.npy`` bytes of array ``name`` of sample ``key``, a read-only view of them.

    Raises:
        ValueError: they are damaged, or hold Python objects or another number of bytes than their header claims.
    """
    # Parsed by hand because numpy would allocate what the header claims before it looks at the length of the data.
    header = io.BytesIO(data[:16384])
    try:
        if np.lib.format.read_magic(header) != (1, 0):
            raise ValueError("only npy version 1.0 is read")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header, NPY_HEADER)
    except (ValueError, TypeError, EOFError, SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"sample {key}: {name} is not an npy array ({error})") from error
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or fortran or size > MAX_BYTES or header.tell() + size != len(data):
        raise ValueError(
            f"sample {key}: {name} claims {dtype} {shape}, which its {len(data)} bytes do not hold; it is damaged"
        )
    return np.frombuffer(data, dtype=dtype, offset=header.tell(), count=math.prod(shape)).reshape(shape)


def _unzstd(key: str, data: bytes | memoryview, pixels: int) -> bytes:
    import zstandard

    try:
        size = zstandard.frame_content_size(data)
        if not pixels < size <= pixels + 16384:
            raise ValueError(f"sample {key}: its zstd frame claims {size} bytes for an array of {pixels}")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"sample {key}: damaged zstd frame ({error})") from error


def _strip(t: int, h: int, w: int) -> tuple[int, int]:
    """Frames per column, and columns, of the strip that holds a clip."""
    rows = min(t, max(1, _WEBP_SIDE // h))
    return rows, -(-t // rows)


def _webp_bytes(clip: Clip) -> bytes:
    from PIL import Image

    t, h, w, c = clip.frames.shape
    rows, columns = _strip(t, h, w)
    if c != 3 or h > _WEBP_SIDE or columns * w > _WEBP_SIDE or rows * h * columns * w > _WEBP_PIXELS:
        raise ValueError(
            f"webp-strip cannot hold clip {clip.key} of shape {clip.frames.shape}: it needs 3 channels and at most "
            f"{_WEBP_PIXELS} pixels with sides up to {_WEBP_SIDE}; use codec zstd or fewer frames"
        )
    padded = np.zeros((rows * columns, h, w, c), np.uint8)
    padded[:t] = clip.frames
    image = rearrange(padded, "(columns rows) h w c -> (rows h) (columns w) c", rows=rows)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=0, quality=80)
    return buffer.getvalue()


def _from_webp(key: str, data: bytes | memoryview, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    t, h, w, _ = shape
    rows, columns = _strip(t, h, w)
    head = bytes(data[:25])
    # The size is read from the lossless header here because Pillow's decoder takes memory for it on opening.
    bits = int.from_bytes(head[21:25], "little")
    size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8L" or size != (columns * w, rows * h):
        raise ValueError(f"sample {key}: frames.webp is not the lossless strip of a clip {shape}")
    try:
        image = np.asarray(Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"sample {key}: damaged webp strip ({error})") from error
    return rearrange(image, "(rows h) (columns w) c -> (columns rows) h w c", h=h, w=w)[:t]
