from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest

from objdyn.datasets import Cut, Preprocessing, VideoError, videos


def opener(root: Path) -> Callable[[str], BinaryIO]:
    return lambda path: cast(BinaryIO, (root / path).open("rb"))


def test_find_takes_videos_in_natural_order_and_counts_the_rest() -> None:
    found = videos.find(["b/10.mp4", "b/2.mp4", "a.AVI", "notes.txt", "b/._2.mp4", "x.webm", "c.gif"])
    assert [video.source for video in found.videos] == ["a.AVI", "b/2.mp4", "b/10.mp4", "c.gif", "x.webm"]
    assert found.ignored == 2


def test_clips_hold_the_frames_that_stride_and_hop_ask_for(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    write_video(tmp_path / "a.mp4", counting_frames(30))
    preprocessing = Preprocessing(3, stride=2, hop=4, start=1, size=16)
    video = videos.probe(videos.find(["a.mp4"]).videos[0], opener(tmp_path))
    starts = preprocessing.starts(video.frames)
    assert list(starts) == [1, 5, 9, 13, 17, 21, 25]
    cuts = [Cut(f"k{i}", start) for i, start in enumerate(starts)]
    clips = list(videos.read(video, opener(tmp_path), cuts, preprocessing))
    assert [clip.key for clip in clips] == [cut.key for cut in cuts]
    for clip, start in zip(clips, starts, strict=True):
        assert clip.frames.shape == (3, 16, 16, 3)
        assert (clip.start_frame, clip.stride, clip.fps, clip.source) == (start, 2, 25.0, "a.mp4")
        levels = clip.frames.mean(axis=(1, 2, 3))
        assert np.abs(levels - 5 * np.array([start, start + 2, start + 4])).max() < 2.5


def test_a_crop_of_one_time_range_as_for_grand_central_station(
    tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    frames = np.zeros((50, 48, 72, 3), np.uint8)
    frames[:, 16:28, 24:36] = (5 * np.arange(50, dtype=np.uint8))[:, None, None, None]
    write_video(tmp_path / "station.mp4", frames)
    video = videos.probe(videos.find(["station.mp4"]).videos[0], opener(tmp_path))
    seen = {}
    for split, (first, stop) in {"train": (0, 40), "test": (40, None)}.items():
        preprocessing = Preprocessing(5, start=first, stop=stop, crop=(24, 16, 36, 28), size=12)
        cuts = [Cut(f"{split}-{start}", start) for start in preprocessing.starts(video.frames)]
        clips = list(videos.read(video, opener(tmp_path), cuts, preprocessing))
        assert all(clip.frames.shape == (5, 12, 12, 3) for clip in clips)
        levels = np.concatenate([clip.frames[:, 2:-2, 2:-2].mean(axis=(1, 2, 3)) for clip in clips])
        seen[split] = np.rint(levels / 5).astype(int).tolist()
    assert seen == {"train": list(range(40)), "test": list(range(40, 50))}


def test_a_cut_after_the_end_names_the_missing_frame(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    write_video(tmp_path / "a.mp4", counting_frames(5))
    video = videos.probe(videos.find(["a.mp4"]).videos[0], opener(tmp_path))
    with pytest.raises(VideoError, match="frame 6 does not decode, though 5 frames were counted"):
        list(videos.read(video, opener(tmp_path), [Cut("k", 4)], Preprocessing(3)))


def test_text_named_mp4_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(VideoError, match="FFmpeg cannot read the video") as caught:
        videos.probe(videos.find(["a.mp4"]).videos[0], opener(tmp_path))
    assert caught.value.code == "unreadable"


def test_truncated_mp4_is_unreadable(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    path = write_video(tmp_path / "a.mp4", counting_frames(30))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError):
        videos.probe(videos.find(["a.mp4"]).videos[0], opener(tmp_path))


def test_header_that_promises_too_much_is_a_note(shared: Path) -> None:
    folder = shared / "data/traffic_camera"
    video = videos.probe(videos.find(["highway_b.avi"]).videos[0], opener(folder))
    assert video.frames == 1699
    assert video.note == "the header promises 1700 frames, 1699 decode"


def test_notes_say_what_is_odd(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    import av

    plain = write_video(tmp_path / "a.h264", counting_frames(5), bf="0")
    with av.open(str(plain)) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet, time in zip(source.demux(video=0), (0, 20, 40, 140, 160), strict=False):
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 1000), time, time
            target.mux(packet)
    video = videos.probe(videos.find(["a.mp4"]).videos[0], opener(tmp_path))
    assert video.frames == 5
    assert video.note == "the frame rate varies, from 20 to 100 ms between frames; clips count frames"


def test_a_video_that_decodes_otherwise_than_before_has_changed(
    tmp_path: Path, write_video: Callable[..., Path], counting_frames: Callable[[int], np.ndarray]
) -> None:
    write_video(tmp_path / "a.mp4", counting_frames(5))
    video = videos.probe(videos.find(["a.mp4"]).videos[0], opener(tmp_path))
    for frames, message in [
        (np.zeros((5, 64, 64, 3), np.uint8), "frame 1 is 64x64, it was 48x32 before"),
        (counting_frames(2), "frame 3 does not decode, though 5 frames were counted before"),
        (None, "all of it decoded before, now FFmpeg cannot read the video"),
    ]:
        if frames is None:
            (tmp_path / "a.mp4").write_text("no video")
        else:
            write_video(tmp_path / "a.mp4", frames)
        with pytest.raises(VideoError, match=message) as caught:
            list(videos.read(video, opener(tmp_path), [Cut("k", 1)], Preprocessing(3)))
        assert caught.value.code == "changed"
