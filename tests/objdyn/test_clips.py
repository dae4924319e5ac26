import contextlib
import dataclasses
import hashlib
import io
import json
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from objdyn.clips import (
    CODECS,
    NO_LIMITS,
    SINGLE_CHANNEL,
    Clip,
    Limits,
    VideoError,
    _say_once,
    collate,
    from_sample,
    probe_video,
    read_video,
    stack_truth,
    to_frames,
    to_model_input,
    to_sample,
    video_frames,
)


def make_clip(
    shape: tuple[int, int, int, int] = (5, 8, 6, 3),
    key: str = "v00000-c0001",
    truth: dict[str, np.ndarray] | None = None,
) -> Clip:
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Clip(key, frames, fps=25.0, start_frame=30, stride=3, source="a/b.mp4", truth=truth or {})


def full_truth() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "segmentation": rng.integers(0, 3, (5, 8, 6), dtype=np.uint8),
        "positions": rng.uniform(-1, 1, (5, 2, 2)).astype(np.float32),
        "rendered_positions": rng.uniform(-1, 1, (5, 2, 2)).astype(np.float32),
        "velocities": rng.uniform(-1, 1, (5, 2, 2)).astype(np.float32),
        "present": rng.random((5, 2)) > 0.5,
        "num_objects": np.asarray(2, np.int64),
    }


def sample_of(codec: str = "zstd", **meta: Any) -> dict[str, bytes]:
    sample = to_sample(make_clip(), codec)
    sample["json"] = json.dumps({**json.loads(sample["json"]), **meta}).encode()
    return sample


@pytest.mark.parametrize("codec", CODECS)
def test_samples_round_trip_without_loss(codec: str) -> None:
    clip = make_clip(truth=full_truth())
    back = from_sample(clip.key, {name: memoryview(data) for name, data in to_sample(clip, codec).items()})
    assert np.array_equal(back.frames, clip.frames)
    assert (back.key, back.fps, back.start_frame, back.stride, back.source) == ("v00000-c0001", 25.0, 30, 3, "a/b.mp4")
    assert set(back.truth) == set(clip.truth)
    for name, array in clip.truth.items():
        assert back.truth[name].dtype == array.dtype
        assert np.array_equal(back.truth[name], array)


@pytest.mark.parametrize("codec", CODECS)
def test_equal_clips_give_equal_bytes(codec: str) -> None:
    samples = [
        to_sample(make_clip(truth=truth), codec) for truth in (full_truth(), dict(reversed(full_truth().items())))
    ]
    assert list(samples[0].items()) == list(samples[1].items())
    assert "key" not in json.loads(samples[0]["json"])


def test_zstd_frame_is_an_npy_file_with_checksum() -> None:
    clip = make_clip()
    data = to_sample(clip)["frames.npy.zst"]
    assert zstandard.get_frame_parameters(data).has_checksum
    array = np.load(io.BytesIO(zstandard.decompress(data)), allow_pickle=False)
    assert np.array_equal(array, clip.frames)


def test_webp_strip_breaks_before_the_side_limit() -> None:
    clip = make_clip((7, 5000, 4, 3))  # 35000 rows in one column would pass webp's 16383
    back = from_sample(clip.key, to_sample(clip, "webp-strip"))
    assert np.array_equal(back.frames, clip.frames)


def test_webp_strip_is_smaller_than_zstd_on_smooth_noise() -> None:
    rng = np.random.default_rng(0)
    frames = (np.linspace(50, 200, 64)[None, :, None, None] + rng.normal(0, 1, (8, 64, 64, 3))).astype(np.uint8)
    clip = Clip("a", frames, 25.0, 0, 1, "a")
    assert len(to_sample(clip, "webp-strip")["frames.webp"]) < len(to_sample(clip)["frames.npy.zst"])


def test_unsuited_codecs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown codec 'h264'; choose one of zstd"):
        to_sample(make_clip(), "h264")
    with pytest.raises(ValueError, match="3 channels"):
        to_sample(make_clip((2, 4, 4, 1)), "webp-strip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": np.zeros((2, 4, 4, 3), np.float32)}, "must be uint8"),
        ({"frames": np.zeros((4, 4, 3), np.uint8)}, "must be uint8"),
        ({"frames": np.zeros((0, 4, 4, 3), np.uint8)}, "empty axis"),
        ({"key": "a.b"}, "key"),
        ({"key": "A"}, "key"),
        ({"fps": 0.0}, "positive fps"),
        ({"stride": 0}, "stride >= 1"),
        ({"truth": {"positions": np.zeros((2, 1, 2))}}, "float32"),
        ({"truth": {"positions": np.zeros((3, 1, 2), np.float32)}}, "start with 2 frames"),
        ({"truth": {"rendered_positions": np.zeros((2, 2), np.float32)}}, "float32 of rank 3"),
        ({"truth": {"velocities": np.zeros((2, 1, 2))}}, "velocities of clip a must be float32"),
        ({"truth": {"segmentation": np.zeros((2, 4, 5), np.uint8)}}, r"must be \(2, 4, 4\).*nearest neighbour"),
        ({"truth": {"frames": np.zeros(2)}}, "cannot name truth"),
        ({"truth": {"../x": np.zeros(2)}}, "cannot name truth"),
    ],
)
def test_malformed_clips_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"key": "a", "frames": np.zeros((2, 4, 4, 3), np.uint8), "fps": 1.0, "start_frame": 0, "stride": 1}
    with pytest.raises(ValueError, match=message):
        Clip(**{**fields, "source": "s", **changes})


def test_window_cuts_frames_and_truth_alike() -> None:
    clip = make_clip(truth=full_truth())
    window = clip.window(1, 3)
    assert (window.key, window.start_frame, len(window.frames)) == (clip.key, 30 + 1 * 3, 3)
    assert np.array_equal(window.frames, clip.frames[1:4])
    assert np.array_equal(window.truth["positions"], clip.truth["positions"][1:4])
    assert window.truth["num_objects"] == 2
    with pytest.raises(ValueError, match="has 5 frames, cannot cut 3 from frame 3"):
        clip.window(3, 3)


@pytest.mark.parametrize("codec", CODECS)
def test_truncated_frames_are_refused(codec: str) -> None:
    sample = to_sample(make_clip(), codec)
    name = next(iter(sample))
    for length in (0, 1, 20, 60, len(sample[name]) // 2, len(sample[name]) - 1):
        with pytest.raises(ValueError, match="v00000-c0001"):
            from_sample("v00000-c0001", {**sample, name: sample[name][:length]})


def test_flipped_bits_under_zstd_are_refused() -> None:
    sample = to_sample(make_clip())
    data = bytearray(sample["frames.npy.zst"])
    data[len(data) // 2] ^= 4
    with pytest.raises(ValueError, match="damaged zstd frame"):
        from_sample("a", {**sample, "frames.npy.zst": bytes(data)})


@pytest.mark.parametrize("codec", CODECS)
def test_frames_that_contradict_the_json_are_refused(codec: str) -> None:
    with pytest.raises(ValueError, match="sample a"):
        from_sample("a", sample_of(codec, frames=6))


def test_claims_beyond_the_limit_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(ValueError, match="claims frames"):
        from_sample("a", sample_of(frames=2**40))
    bomb = zstandard.ZstdCompressor().compress(bytes(100_000_000))
    with pytest.raises(ValueError, match="claims 100000000 bytes for an array of 720"):
        from_sample("a", {**sample_of(), "frames.npy.zst": bomb})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (2**40,), "fortran_order": False, "descr": "|u1"})
    for name in ("frames.npy", "positions.npy"):
        with pytest.raises(ValueError, match="do not hold"):
            from_sample("a", {**sample_of("npy"), name: header.getvalue()})
    strip = bytearray(sample_of("webp-strip")["frames.webp"])
    strip[21:25] = b"\xff\xff\xff\x0f"
    with pytest.raises(ValueError, match="lossless strip"):
        from_sample("a", {**sample_of("webp-strip"), "frames.webp": bytes(strip)})


def test_pickled_arrays_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="positions"):
        from_sample("a", {**sample_of(), "positions.npy": buffer.getvalue()})


@pytest.mark.parametrize("missing", ["json", "frames.npy.zst"])
def test_incomplete_and_unknown_members_are_refused(missing: str) -> None:
    sample = sample_of()
    with pytest.raises(ValueError, match="needs json and one of"):
        from_sample("a", {name: data for name, data in sample.items() if name != missing})
    with pytest.raises(ValueError, match=r"'x\.pickle'"):
        from_sample("a", {**sample, "x.pickle": b""})


def test_pixels_survive_model_input_and_back() -> None:
    clips = [make_clip(), make_clip()]
    batch = collate(clips)
    assert batch.shape == (2, 5, 3, 8, 6)
    assert batch.is_contiguous()
    video = to_model_input(batch)
    assert video.dtype == torch.float32
    assert video.min() >= 0
    assert video.max() <= 1
    assert np.array_equal(to_frames(video)[1], clips[1].frames)
    assert np.array_equal(to_frames(video[0]), clips[0].frames)
    assert to_frames(torch.tensor([-1.0, 0.4999, 2.0]).reshape(1, 3, 1, 1)).ravel().tolist() == [0, 127, 255]


def test_single_channel_frames_are_repeated_to_three_and_it_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    grey = torch.randint(0, 256, (2, 3, 1, 4, 4), dtype=torch.uint8)
    _say_once.cache_clear()
    to_model_input(grey)
    with warnings.catch_warnings():  # after which Python shows a warning again
        warnings.simplefilter("always")
        video = to_model_input(grey)
    assert capsys.readouterr().err == f"note: {SINGLE_CHANNEL}\n"
    torch.testing.assert_close(video, (grey.float() / 255).expand(-1, -1, 3, -1, -1))


def test_batches_of_unequal_or_float_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="b is"):
        collate([make_clip(), make_clip((5, 8, 8, 3), key="b")])
    with pytest.raises(ValueError, match="no clips"):
        collate([])


def test_truth_is_stacked_by_name_in_the_clips_order() -> None:
    def with_truth(key: str, count: int, objects: int = 2) -> Clip:
        positions = np.full((5, objects, 2), count / 10, np.float32)
        return dataclasses.replace(
            make_clip(key=key), truth={"positions": positions, "num_objects": np.array(count, np.int64)}
        )

    clips = [with_truth("a", 1), with_truth("b", 2)]
    stacked = stack_truth(clips, ("num_objects", "positions"))
    assert list(stacked) == ["num_objects", "positions"]
    assert torch.equal(stacked["num_objects"], torch.tensor([1, 2]))
    assert stacked["positions"].shape == (2, 5, 2, 2)
    assert np.array_equal(stacked["positions"][1].numpy(), clips[1].truth["positions"])
    assert stack_truth(clips, ()) == {}
    with pytest.raises(ValueError, match="clip a has no truth 'present', which the model takes as input"):
        stack_truth(clips, ("present",))
    with pytest.raises(ValueError, match=r"one shape: a has \(5, 2, 2\), c has \(5, 3, 2\)"):
        stack_truth([*clips, with_truth("c", 3, objects=3)], ("positions",))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mov", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")],
)
def test_videos_decode_to_the_frames_written(
    tmp_path: Path,
    write_video: Callable[..., Path],
    counting_frames: Callable[[int], np.ndarray],
    name: str,
    codec: str,
) -> None:
    path = write_video(tmp_path / name, counting_frames(12), codec)
    info = probe_video(str(path))
    assert (info.frames, info.height, info.width, info.fps) == (12, 32, 48, 25.0)
    video = read_video(str(path), start=2, length=3, stride=4)
    assert video.frames.shape == (3, 32, 48, 3)
    assert np.abs(video.frames.mean(axis=(1, 2, 3)) - [10, 30, 50]).max() < 2.5  # half a step between two frames
    with pytest.raises(ValueError, match="ends after 2 of the 3 frames"):
        read_video(str(path), start=2, length=3, stride=5)


def test_gif_decodes(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    assert probe_video(str(write_video(tmp_path / "a.gif", counting_frames(6), "gif", 10))).frames == 6


def test_seeking_finds_the_same_frames_as_decoding_from_the_start(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    path = str(write_video(tmp_path / "long.mp4", counting_frames(1300), "libx264", g="48", bf="3"))
    info = probe_video(path)
    assert len(info.keyframes) > 3
    wanted = range(1231, 1290, 7)
    plain = list(video_frames(path, wanted))
    sought = list(video_frames(path, wanted, info.keyframes))
    assert [index for index, _ in sought] == [index for index, _ in plain] == list(wanted)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(plain, sought, strict=True))
    wrong = tuple((index, pts + 1) for index, pts in info.keyframes)
    given_up = list(video_frames(path, wanted, wrong))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(plain, given_up, strict=True))


@pytest.mark.parametrize("content", [b"", b"not a video", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"])
def test_files_that_are_no_videos_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(ValueError, match="FFmpeg cannot read"):
        probe_video(file)


def test_real_videos_count_by_decoding(shared: Path) -> None:
    folder = shared / "data/traffic_camera"
    road = probe_video(str(folder / "road_overhead.avi"))
    assert (road.frames, road.promised, road.fps) == (374, 374, 30.0)
    video = read_video(str(folder / "road_overhead.avi"), length=2)
    assert video.frames.shape == (2, 360, 640, 3)
    assert hashlib.sha256(video.frames[0]).digest() != hashlib.sha256(video.frames[1]).digest()


def remux(path: Path, sources: Sequence[Path], times: Sequence[int] | None = None) -> Path:
    """Put the packets of some videos one after the other into one stream, at times in milliseconds."""
    import av

    with av.open(str(path), "w") as target:
        stream, count = None, 0
        for source in sources:
            with av.open(str(source)) as opened:
                stream = stream or target.add_stream_from_template(opened.streams.video[0])
                for packet in opened.demux(video=0):
                    if packet.size:
                        packet.stream, packet.time_base = stream, Fraction(1, 1000)
                        packet.pts = packet.dts = 40 * count if times is None else times[count]
                        target.mux(packet)
                        count += 1
    return path


def cause(path: Path, limits: Limits = NO_LIMITS) -> tuple[str, str]:
    with path.open("rb") as file, pytest.raises(VideoError) as caught:
        probe_video(file, limits)
    return caught.value.code, str(caught.value)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert cause(tmp_path / "a.mp4") == ("no-video", "the file has no video stream, it holds audio")


def test_a_codec_without_decoder_is_told_from_damage(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    path = write_video(tmp_path / "a.avi", counting_frames(3), "mpeg4")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    assert cause(path)[0] == "no-decoder"


@pytest.mark.parametrize(
    ("name", "codec", "options", "kept", "code", "message"),
    [
        ("a.mp4", "libx264", {"movflags": "faststart"}, 0.0, "no-frames", "no frame decodes"),
        ("a.mp4", "libx264", {"movflags": "faststart"}, 0.5, "truncated", "promises 60 frames, [123]. decode; then"),
        ("a.mp4", "libx264", {"movflags": "faststart"}, 0.97, "damaged", "decoding stops after 5. frames; then FFmpeg"),
        ("a.mp4", "libx264", {"movflags": "empty_moov+frag_keyframe"}, 0.5, "truncated", "data end after"),
        ("a.avi", "mpeg4", {}, 0.5, "truncated", "promises 60 frames, .. decode"),
        ("a.webm", "libvpx-vp9", {}, 0.5, "truncated", r"promises 2\.40 s, the data end after [01]\."),
        ("a.gif", "gif", {}, 0.5, "truncated", "without its end mark"),
    ],
)
def test_truncated_videos_are_known_by_what_the_header_promises(
    tmp_path: Path,
    write_video: Callable[..., Path],
    name: str,
    codec: str,
    options: dict[str, str],
    kept: float,
    code: str,
    message: str,
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), dtype=np.uint8)
    path = write_video(tmp_path / name, frames, codec, g="10", muxer=options)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4 if kept == 0 else 0
    path.write_bytes(data[: start or int(kept * len(data))])
    found = cause(path)
    assert (found[0], len(re.findall(message, found[1]))) == (code, 1), found


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_frames_that_an_avi_file_counts_as_dropped_are_not_missing(tmp_path: Path, kept: float) -> None:
    import av

    path, rng = tmp_path / "a.avi", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index in range(0, 100, 2):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    if kept == 1:
        info = probe_video(str(path))
        assert (info.frames, info.promised) == (50, 99)
    else:
        assert cause(path)[0] == "truncated"


def test_frames_that_an_edit_list_leaves_out_are_not_missing(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    path = write_video(tmp_path / "a.mp4", counting_frames(90))
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # after version, flags and the number of entries
    (duration,) = struct.unpack(">I", data[at : at + 4])
    data[at : at + 4] = struct.pack(">I", duration // 3)
    path.write_bytes(data)
    info = probe_video(str(path))
    assert (30 <= info.frames <= 31, info.promised) == (True, 90)


def test_frames_that_ffmpeg_marks_corrupt_are_damage(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    data = write_video(tmp_path / "a.avi", rng.integers(0, 256, (20, 32, 48, 3), dtype=np.uint8), "mpeg4").read_bytes()
    found = []
    for start in range(len(data) // 3, len(data) * 2 // 3, len(data) // 30):
        damaged = bytearray(data)
        damaged[start : start + 40] = rng.bytes(40)
        with contextlib.suppress(VideoError):
            probe_video(io.BytesIO(damaged))
            continue
        (tmp_path / "b.avi").write_bytes(damaged)
        found.append(cause(tmp_path / "b.avi"))
    # Random bits may also decode without a mark: a video has no checksums.
    assert len(found) > 5
    assert {code for code, _ in found} == {"damaged"}
    assert any(re.fullmatch(r"FFmpeg marks \d+ of \d+ frames as damaged, the first is frame \d+", m) for _, m in found)


@pytest.mark.parametrize("name", ["c.mkv", "c.mp4"])
def test_a_change_of_size_inside_a_video_is_refused(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray], name: str
) -> None:
    small = write_video(tmp_path / "a.h264", counting_frames(5))
    large = write_video(tmp_path / "b.h264", np.zeros((5, 64, 64, 3), np.uint8))
    assert cause(remux(tmp_path / name, [small, large])) == (
        "bad-geometry",
        "frame 5 is 64x64, those before it 48x32",
    )


@pytest.mark.parametrize("name", ["b.mp4", "b.mkv"])
def test_a_varying_rate_is_noticed_and_rounding_is_not(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray], name: str
) -> None:
    plain = write_video(tmp_path / "a.h264", counting_frames(12), bf="0")
    steady = np.round(np.arange(12) * 1000 / 30).astype(int).tolist()
    assert probe_video(str(remux(tmp_path / name, [plain], steady))).intervals == (0.0, 0.0)
    info = probe_video(str(remux(tmp_path / name, [plain], [*range(0, 220, 20), 320])))
    assert info.intervals == pytest.approx((0.02, 0.12))


def test_a_title_in_another_encoding_says_nothing_about_the_frames(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    path = write_video(tmp_path / "a.mkv", counting_frames(4), title="caf")
    path.write_bytes(path.read_bytes().replace(b"caf", b"\xe9af"))
    assert probe_video(str(path)).frames == 4


def test_limits_refuse_before_the_cost(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    path = write_video(tmp_path / "a.mp4", counting_frames(12))
    exact = Limits(frames=12, pixels=32 * 48, bytes=path.stat().st_size)
    with path.open("rb") as file:
        assert probe_video(file, exact).frames == 12
    assert cause(path, exact._replace(frames=11)) == ("too-long", "it has at least 12 frames, more than max_frames=11")
    assert cause(path, exact._replace(pixels=1535)) == (
        "too-large",
        "its frames are 48x32 pixels, more than max_pixels=1535 in all",
    )
    assert cause(path, exact._replace(bytes=99))[0] == "too-large"
    calls = []
    probe_video(str(path), Limits(on_frame=lambda: calls.append(1)))
    assert len(calls) == 12


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mpeg4"])
def test_frames_larger_than_the_header_says_are_refused_by_the_decoder(
    tmp_path: Path, write_video: Callable[..., Path], codec: str
) -> None:
    path = write_video(tmp_path / "a.mkv", np.zeros((3, 1088, 1920, 3), np.uint8), codec, cpu_used="8")
    assert cause(path, Limits(pixels=1000)) == ("too-large", "its frames pass max_pixels=1000 by far")


def test_real_footage_is_usable_within_the_limits(shared: Path) -> None:
    folders = [shared / "data" / name for name in ("physion_dominoes", "movi_a", "rnem_balls", "phyre_frames")]
    videos = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".mp4", ".gif")]
    assert len(videos) == 15
    for path in videos:
        with path.open("rb") as file:
            info = probe_video(file, Limits(frames=1000, pixels=1 << 20, bytes=1 << 25))
        assert (info.promised, info.intervals) == (info.frames, (0.0, 0.0))
