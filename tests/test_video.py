"""Videos as the model is shown them: which frames, how they are turned, and every odd clip by name."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from camera_server import SIZE, draw, read_number, write_clip
from edgevl import video as module
from edgevl.camera.reader import frame_places
from edgevl.errors import UsageError
from edgevl.video import load_video
from edgevl.view import Video, VideoView, spread

SIDE = 96


def numbers(video: Video) -> list[int | None]:
    assert video.frames.shape[1:] == (SIDE, SIDE, 3)
    return [read_number(Image.fromarray(frame).resize(SIZE)) for frame in video.frames]


def write_at(path: Path, places: Sequence[int], gop: int = 12) -> None:
    """A clip of numbered frames, each shown at its own millisecond."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", gop
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.bit_rate = 20_000_000
        for number, place in enumerate(places):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def even(total: int, count: int) -> list[int]:
    """floor(linspace(0, total - 1, count)), as the model was trained."""
    return [int(np.floor(x + 1e-9)) for x in np.linspace(0, total - 1, count)]


@pytest.mark.parametrize(("total", "count"), [(30, 1), (30, 2), (30, 7), (30, 8), (30, 29), (30, 30), (7, 30), (1, 4)])
def test_frames_are_spread_as_in_training(tmp_path: Path, total: int, count: int) -> None:
    write_clip(tmp_path / "clip.mp4", frames=total)
    video = load_video(tmp_path / "clip.mp4", count, SIDE)
    assert numbers(video) == even(total, min(count, total))
    assert video.notes == ()
    assert video.seconds == pytest.approx((total - 1) / 10)
    fewer = min(3, len(video.frames))
    kept = [spread(len(video.frames), fewer)[i] for i in range(fewer)]
    assert kept == even(len(video.frames), fewer)


def test_a_variable_frame_rate_is_read_as_it_is_shown(tmp_path: Path) -> None:
    places = [*range(0, 1000, 100), *range(5000, 6000, 20)]  # ten frames, four seconds of nothing, fifty frames
    write_at(tmp_path / "clip.mkv", places)
    found = numbers(load_video(tmp_path / "clip.mkv", 7, SIDE))
    steps = [places[-1] * k / 6 for k in range(7)]
    wanted = [max(i for i, place in enumerate(places) if place <= step) for step in steps]
    assert found == sorted(set(wanted))  # what stands still is shown once
    assert (found[0], found[-1]) == (0, 59)


@pytest.mark.parametrize(("quarter", "matrix"), [(1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (3, (0, -1, 1, 0))])
def test_rotation_flags_are_obeyed(tmp_path: Path, quarter: int, matrix: tuple[int, int, int, int]) -> None:
    """`matrix` is that of the track header; the clip's top left corner is white."""
    path = tmp_path / "clip.mp4"
    pixels = np.zeros((96, 160, 3), np.uint8)
    pixels[:40, :60] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    at = data.index(upright, data.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    frame = load_video(path, 1, SIDE).frames[0].mean(axis=2)
    corners = [frame[:20, :20], frame[:20, -20:], frame[-20:, -20:], frame[-20:, :20]]  # clockwise
    assert [int(corner.mean() > 128) for corner in corners].index(1) == quarter


def test_a_clip_without_times_or_duration(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.avi"), "w", format="m4v") as container:  # a bare stream: no index, no times
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 20_000_000
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        container.mux(stream.encode(None))
    assert numbers(load_video(tmp_path / "clip.avi", 5, SIDE)) == even(20, 5)


def test_a_broken_tail_gives_what_can_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_at(path, range(0, 4000, 100))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    left = len(frame_places(str(path))[0])
    assert 10 < left < 40
    video = load_video(path, 6, SIDE)
    assert numbers(video)[:5] == even(left, 6)[:5]
    damaged = bytearray(path.read_bytes())
    damaged[-len(damaged) // 3 :] = bytes(len(damaged[-len(damaged) // 3 :]))
    path.write_bytes(damaged)
    video = load_video(path, 30, SIDE)
    found = numbers(video)
    assert found[:5] == sorted(found[:5])
    assert len({frame.tobytes() for frame in video.frames}) == len(found)


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mpeg4"), ("clip.ts", "mpeg2video"), ("clip.gif", "gif")])
def test_no_damage_ends_in_a_traceback(tmp_path: Path, name: str, codec: str) -> None:
    path, chance = tmp_path / name, random.Random(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "rgb8" if codec == "gif" else "yuv420p"
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    seen = {"whole": 0, "damaged": 0, "refused": 0}
    for _ in range(120):
        data = bytearray(whole)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        reach = chance.choice((600, len(data)))  # the header, or anywhere
        for _ in range(chance.choice((1, 5, 50)) if data else 0):
            data[chance.randrange(min(reach, len(data)))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            seen["damaged" if load_video(path, chance.choice((1, 6, 30)), SIDE).notes else "whole"] += 1
        except UsageError:
            seen["refused"] += 1
    assert seen["whole"] and seen["refused"]


def test_a_long_clip_is_decoded_at_its_key_frames_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHORT", 50)
    write_at(tmp_path / "clip.mp4", range(0, 10000, 50), gop=5)
    found = numbers(load_video(tmp_path / "clip.mp4", 10, SIDE))
    assert found == [5 * i for i in even(40, 10)]
    assert numbers(load_video(tmp_path / "clip.mp4", 11, SIDE)) == even(200, 11)  # too few key frames to choose among


def test_the_same_clip_has_the_same_digest(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=12)
    one, two, other = (load_video(tmp_path / "a.mp4", count, SIDE) for count in (4, 4, 5))
    assert one == two and one.digest != other.digest
    assert VideoView(one, 4).key != VideoView(one, 3).key


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("none.mp4", None, "does not exist"),
        (".", None, "is a folder"),
        ("empty.mp4", b"", "no video that can be read"),
        ("text.mp4", b"not a video", "no video that can be read"),
        ("head.mp4", b"\x00\x00\x00\x18ftypmp42" + b"\xff" * 500, "no video that can be read"),
        ("sound.mkv", sound, "no video in it"),
    ],
)
def test_what_is_no_video_is_refused_in_one_sentence(tmp_path: Path, name: str, content: object, word: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path)
    with pytest.raises(UsageError, match=word):
        load_video(path, 4, SIDE)


def test_a_clip_without_a_whole_frame_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_at(path, range(0, 1000, 100))
    data = bytearray(path.read_bytes())
    first = data.index(b"\x00\x00\x01\xb6")  # the first picture's header
    data[first - 300 :] = bytes(len(data) - first + 300)
    path.write_bytes(data)
    with pytest.raises(UsageError):
        load_video(path, 4, SIDE)
