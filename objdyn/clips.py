"""Clips, and the only conversions between video files, stored samples, batches and model input.

How a datum walks:

    video file --read_video--> frames           uint8 (t, h, w, c)
    Clip --to_sample--> members --from_sample--> Clip
    clips --collate--> uint8 (b, t, c, h, w) --to_model_input--> float32 in [0, 1]
    float video --to_frames--> uint8 (..., t, h, w, c)
"""

import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

CODECS = ("zstd", "npy", "webp-strip")
MAX_BYTES = 1 << 30
"""Largest array that a sample may hold, in bytes; a sample that claims more is refused before memory is taken."""

_MEMBERS = {"zstd": "frames.npy.zst", "npy": "frames.npy", "webp-strip": "frames.webp"}
_KEY = re.compile(r"[a-z0-9_-]+")
_TRUTH_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TRUTH = {
    "segmentation": ("uint8", 3),
    "positions": ("float32", 3),
    "present": ("bool", 2),
    "num_objects": ("int64", 0),
}
_SEEK_FRAMES = 300
_WEBP_SIDE = 16383
_WEBP_PIXELS = 89_000_000  # above this Pillow takes an image for a decompression bomb
_CONTAINERS = "avi,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"


@dataclass(frozen=True)
class Clip:
    """Some frames of one video, and what is known about them.

    ``truth`` may hold ``segmentation`` uint8 (t, h, w) with 0 for the background, ``positions`` float32 (t, n, 2) as
    (y, x) in [-1, 1] with ``align_corners=True`` (y down), ``present`` bool (t, n), ``num_objects`` int64 (), and other
    arrays. An array of rank 1 or more has time as its first axis; an array of rank 0 describes the whole clip.

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
        frames = compressor.compress(_npy_bytes(clip.frames))
    elif codec == "npy":
        frames = _npy_bytes(clip.frames)
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
        members[f"{name}.npy"] = _npy_bytes(clip.truth[name])
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
        frames = _from_npy(key, "frames", raw)
    if frames.shape != shape or frames.dtype != np.uint8:
        raise ValueError(f"sample {key}: json says frames uint8 {shape}, data are {frames.dtype} {frames.shape}")
    truth = {}
    for name, data in members.items():
        if name in ("json", _MEMBERS[codecs[0]]):
            continue
        if not name.endswith(".npy"):
            raise ValueError(f"sample {key} has a member {name!r} that is neither frames, json nor <truth>.npy")
        truth[name.removesuffix(".npy")] = _from_npy(key, name, data).copy()
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
    clips: Sequence[Clip], names: Sequence[str], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Stack the truth that a family takes as input (``Family.inputs``), one row per clip, on ``device``.

    Raises:
        ValueError: a clip lacks one of ``names``, or has it in another shape than the first clip.
    """
    stacked = {}
    for name in names:
        for clip in clips:
            if name not in clip.truth:
                raise ValueError(
                    f"clip {clip.key} has no truth {name!r}, which the model takes as input; use a dataset that has it"
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

    Raises:
        ValueError: the frames are not uint8 of rank 5.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 5:
        raise ValueError(f"model input is made from uint8 (b, t, c, h, w), got {frames.dtype} {tuple(frames.shape)}")
    return frames.to(device=device, non_blocking=True).to(torch.float32) / 255


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


def read_video(file: str | BinaryIO, start: int = 0, length: int | None = None, stride: int = 1) -> Video:
    """Decode every ``stride``-th frame from ``start``, at most ``length`` of them, as RGB; one thread.

    Raises:
        ValueError: the file is no video, is damaged, or ends before ``length`` frames.
    """
    stop = None if length is None else start + (length - 1) * stride + 1
    frames, fps = [], 0.0
    for index, frame, stream in _decode(file):
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
    file: str | BinaryIO, wanted: Collection[int], keyframes: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode the frames whose index is in ``wanted``, in order: (index, uint8 (h, w, 3)); ends early if the video does.

    ``keyframes`` are those of ``probe_video``; with them frames late in a long video are reached by a seek. A seek goes
    one keyframe further back than it must, since a stream may refer across its last one, and is given up for a decode
    from the start when it does not land on the frame it should.

    Raises:
        ValueError: the file is no video or is damaged.
    """
    if not wanted:
        return
    first, last = min(wanted), max(wanted)
    for index, frame, _ in _decode(file, [entry for entry in keyframes if entry[0] <= first][-2:-1]):
        if index in wanted:
            yield index, frame.to_ndarray(format="rgb24")
        if index >= last:
            return


def probe_video(file: str | BinaryIO) -> VideoInfo:
    """Count the frames of a video by decoding all of it, since headers promise too much or too little.

    Raises:
        ValueError: the file is no video, is damaged, or holds no frame.
    """
    frames, height, width, ordered, last = 0, 0, 0, True, -math.inf
    keyframes: list[tuple[int, int]] = []
    found: _Stream | None = None
    for index, frame, stream in _decode(file):
        found = stream
        frames, height, width = index + 1, frame.height, frame.width
        pts = frame.pts
        ordered = ordered and pts is not None and pts > last
        last = pts if ordered else last
        if (
            ordered
            and pts is not None
            and frame.key_frame
            and (not keyframes or index - keyframes[-1][0] >= _SEEK_FRAMES)
        ):
            keyframes.append((index, pts))
    if found is None:
        raise ValueError("the video holds no frame that decodes")
    return VideoInfo(frames, found.promised, found.fps, height, width, tuple(keyframes) if ordered else ())


class _Stream(NamedTuple):
    fps: float
    promised: int


def _decode(file: str | BinaryIO, seek: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[int, Any, _Stream]]:
    """Yield (index, PyAV frame, stream) in display order, from the keyframe (index, pts) in ``seek`` if any."""
    import av
    from av.error import FFmpegError

    try:
        # A whitelist, since a playlist named .mp4 would make FFmpeg open the addresses written in it.
        with av.open(file, "r", container_options={"format_whitelist": _CONTAINERS}) as container:
            if not container.streams.video:
                raise ValueError("the file has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            facts = _Stream(float(stream.average_rate or stream.guessed_rate or 0), stream.frames)
            for first, pts in seek:
                container.seek(pts, stream=stream)
                frames = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= pts)
                frame = next(frames, None)
                if frame is not None and frame.pts == pts:
                    for index, each in enumerate(itertools.chain((frame,), frames), first):
                        yield index, each, facts
                    return
                container.seek(0, stream=stream)
            for index, frame in enumerate(container.decode(stream)):
                yield index, frame, facts
    except (FFmpegError, OSError) as error:  # OSError: FFmpeg seeks outside of a file that is too short
        raise ValueError(f"FFmpeg cannot read the video: {error.strerror or error}") from error


def _check_truth(key: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if not _TRUTH_NAME.fullmatch(name) or name == "frames":
        raise ValueError(f"clip {key}: {name!r} cannot name truth; use lower-case letters, digits and _")
    dtype, rank = _TRUTH.get(name, (str(array.dtype), array.ndim))
    if array.dtype != np.dtype(dtype) or array.ndim != rank or array.dtype.hasobject:
        raise ValueError(f"truth {name} of clip {key} must be {dtype} of rank {rank}, got {array.dtype} {array.shape}")
    if array.ndim and array.shape[0] != shape[0]:
        raise ValueError(f"truth {name} of clip {key} must start with {shape[0]} frames, got {array.shape}")
    if name == "segmentation" and array.shape != shape:
        raise ValueError(f"segmentation of clip {key} must be {shape}, got {array.shape}")


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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"sample {key}: its json is not a clip's description ({error!r})") from error
    if min(shape) < 1 or math.prod(shape) > MAX_BYTES:
        raise ValueError(f"sample {key} claims frames {shape}; at most {MAX_BYTES} bytes are accepted")
    return shape, rest


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # asarray with order="C" keeps rank 0, where ascontiguousarray would make it rank 1.
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _from_npy(key: str, name: str, data: bytes | memoryview) -> np.ndarray:
    # Parsed by hand because numpy would allocate what the header claims before it looks at the length of the data.
    header = io.BytesIO(data[:16384])
    try:
        if np.lib.format.read_magic(header) != (1, 0):
            raise ValueError("only npy version 1.0 is read")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    except (ValueError, EOFError) as error:
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
