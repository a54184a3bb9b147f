"""Sources as they are written, frames as they come, and what happens when they do not."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from camera_server import SIZE, Camera, draw, read_number, write_clip
from edgevl.camera.backoff import Backoff
from edgevl.camera.capture import Capture
from edgevl.camera.gate import ChangeGate, signature
from edgevl.camera.reader import SourceLostError, check_readable, decode_file, live_frames, to_image
from edgevl.camera.source import Source, check_names, parse_live
from edgevl.errors import ImageError, MissingExtraError, UsageError


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.01)


def capture(source: Source, **more: Any) -> Capture:
    return Capture(source, silence=0.5, backoff=Backoff(0.05, 0.1), **more)


def frame(pixels: np.ndarray[Any, Any]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels, np.uint8), format="rgb24")


# -- what a source is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("/dev/video0", "/dev/video0", "v4l2"),
        ("/dev/v4l/by-id/usb-cam", "/dev/v4l/by-id/usb-cam", "v4l2"),
        ("csi:1", "csi:1", "gstreamer"),
        ("gst:videotestsrc ! videoscale", "gst:videotestsrc ! videoscale", "gstreamer"),
        ("rtsp://me:secret@10.0.0.5:554/live?x=1", "rtsp://10.0.0.5:554/live?x=1", "stream"),
        ("door=rtsp://me:secret@10.0.0.5/live", "door", "stream"),
        ("roof=/dev/video2", "roof", "v4l2"),
        ("http://[::1]:80/a.ts", "http://[::1]:80/a.ts", "stream"),
        ("udp://:5000", "udp://:5000", "stream"),
        ("http://cam/live?user=me&pwd=secret&n=1", "http://cam/live?user=me&pwd=***&n=1", "stream"),
        ("srt://cam:9000?passphrase=secret", "srt://cam:9000?passphrase=***", "stream"),
        ("rtsp://user:secret's@h/l", "rtsp://h/l", "stream"),
        ('rtsp://user:secret"s@h/l', "rtsp://h/l", "stream"),
        ("rtsp://user:my secret@h/l", "rtsp://h/l", "stream"),
        ("rtsp://user:se@secret@h/l", "rtsp://h/l", "stream"),
        ("http://cam/x?pwd=my secret;secret'secret&n=1", "http://cam/x?pwd=***&n=1", "stream"),
        ("http://cam/x?auth=secret&apikey=secret", "http://cam/x?auth=***&apikey=***", "stream"),
        ("gst:rtspsrc user-pw='my secret' ! x", "gst:rtspsrc user-pw=*** ! x", "gstreamer"),
        ('gst:rtspsrc "user-pw=my secret&secret" ! x', "gst:rtspsrc user-pw=*** ! x", "gstreamer"),
        ('gst:rtspsrc user-pw = "a secret" ! x', "gst:rtspsrc user-pw=*** ! x", "gstreamer"),
        ("gst:rtspsrc location='rtsp://me:my secret@cam/x' ! x", "gst:rtspsrc location=rtsp://cam/x ! x", "gstreamer"),
        (
            "gst:rtspsrc location=rtsp://me:secret@cam/x user-pw=secret ! decodebin",
            "gst:rtspsrc location=rtsp://cam/x user-pw=*** ! decodebin",
            "gstreamer",
        ),
    ],
)
def test_live_sources(text: str, name: str, kind: str) -> None:
    source = parse_live(text)
    assert source is not None
    assert (source.name, source.kind) == (name, kind)
    assert "secret" not in source.name


@pytest.mark.parametrize("text", ["a.png", "/dev/null", "folder", "a=b.png", "clip.mp4", "./csi", "C:x"])
def test_files_are_no_live_sources(text: str) -> None:
    assert parse_live(text) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("gst:", "pipeline"),
        ("csi:front", "csi:0"),
        ("ftp://me:secret@host/x", "rtsp://"),
        ("file:///etc/passwd", "rtsp://"),
        ("http://", "host"),
        ("rtsp://host:port/x", "rtsp"),
        ("rtsp://me:secret/secret@host/x", "%2F"),
        ("rtsp://me:my secret/secret@host/x", "%2F"),
        ("rtsp://[me:secret@host/x", "no address"),
        ("gst:rtspsrc user-pw='secret", "no pipeline"),
        ("env:NOT_SET", "NOT_SET"),
        ("door=http://", "host"),
    ],
)
def test_forms_that_are_refused(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as raised:
        parse_live(text)
    assert "secret" not in str(raised.value)


def test_an_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOOR", "rtsp://me:secret@cam/x")
    assert parse_live("door=env:DOOR") == Source("door", "stream", "rtsp://me:secret@cam/x")
    assert parse_live("env:DOOR") == Source("rtsp://cam/x", "stream", "rtsp://me:secret@cam/x")
    for value in ("a.png", "env:DOOR", "x=env:DOOR"):
        monkeypatch.setenv("DOOR", value)
        with pytest.raises(UsageError, match="set the variable DOOR"):
            parse_live("env:DOOR")


def test_two_sources_of_one_name() -> None:
    with pytest.raises(UsageError, match="two sources"):
        check_names([Source("a", "v4l2", "/dev/video0"), Source("a", "v4l2", "/dev/video1")])


def test_what_a_source_needs_is_said_before_the_model_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="apt install"):
        check_readable([Source("gst:x", "gstreamer", "x")])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"edgevl\[caption\]"):
        check_readable([])


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_lost_source_names_no_password() -> None:
    source = parse_live("http://me:secret@127.0.0.1:9/x.ts")
    assert source is not None
    with pytest.raises(SourceLostError) as raised, live_frames(source, 0.5):
        pass
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("address", ["/dev/video77", "/dev/null"])
def test_a_camera_that_is_not_there(address: str) -> None:
    with pytest.raises(SourceLostError, match="cam cannot be opened"), live_frames(Source("cam", "v4l2", address), 0.5):
        pass


def fake_gst(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `gst-launch-1.0` that runs a line of Python; frames go to `out`."""
    tool = folder / "gst-launch-1.0"
    out = "out = open(int(sys.argv[-1].removeprefix('fd=')), 'wb')"
    tool.write_text(f"#!{sys.executable}\nimport sys, time\n{out}\n{script}\nout.flush()\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    luma = "bytes([200]) * 32 * 32 + bytes([128]) * 512"
    script = f"out.write(b'YUV4MPEG2 W32 H32 F10:1 C420jpeg\\n' + (b'FRAME\\n' + {luma}) * 5)"
    chatter = "print('GST_ARGUS: Creating output stream', flush=True)"  # as the element of a CSI camera does
    fake_gst(tmp_path, f"assert 'my src' in sys.argv, sys.argv\n{chatter}\n{script}", monkeypatch)
    source = parse_live("front=gst:filesrc 'my src'")
    assert source is not None
    with live_frames(source, 5.0) as stream:
        sizes = [to_image(next(stream)).size for _ in range(4)]  # the first of five was only looked at
        with pytest.raises(SourceLostError, match="front ended"):
            next(stream)
    assert sizes == [(32, 32)] * 4


def test_why_a_pipeline_fails_is_told_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("front", "gstreamer", "x")
    said = "print('Progress\\nERROR: from element src: no rtsp://me:secret@cam/x', file=sys.stderr)"
    fake_gst(tmp_path, said, monkeypatch)
    with pytest.raises(SourceLostError) as raised, live_frames(source, 5.0):
        pass
    assert str(raised.value) == "front cannot be opened (ERROR: from element src: no rtsp://cam/x)"
    frames = "out.write(b'YUV4MPEG2 W2 H2 F10:1 C420jpeg\\n' + (b'FRAME\\n' + bytes(6)) * 5); out.flush()"
    fake_gst(tmp_path, f"{frames}\n{said}", monkeypatch)
    with pytest.raises(SourceLostError, match=r"front ended \(ERROR: from element"), live_frames(source, 5.0) as stream:
        list(stream)


def test_a_pipeline_that_only_talks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gst(tmp_path, "while True: print('x' * 9999, flush=True)", monkeypatch)
    with pytest.raises(SourceLostError, match="cannot be opened"), live_frames(Source("a", "gstreamer", "x"), 0.3):
        pass


def test_a_pipeline_that_hangs_does_not_outlive_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gst(tmp_path, "import os; print(os.getpid(), file=open('pid', 'w')); time.sleep(60)", monkeypatch)
    program = """
import threading, time
from pathlib import Path
from edgevl.camera.reader import live_frames
from edgevl.camera.source import Source

threading.Thread(target=lambda: live_frames(Source("a", "gstreamer", "x"), 60).__enter__(), daemon=True).start()
while not (Path("pid").exists() and Path("pid").read_text()):
    time.sleep(0.05)
"""
    path = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", path)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    status = Path("/proc") / (tmp_path / "pid").read_text().strip() / "status"
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="GStreamer is not installed")
def test_a_real_pipeline() -> None:
    for size, nearest in (((64, 48), (64, 48)), ((322, 243), (320, 242))):
        caps = "video/x-raw,width={},height={}".format(*size)
        source = parse_live(f"test=gst:videotestsrc pattern=red num-buffers=20 ! {caps}")
        assert source is not None
        with live_frames(source, 20.0) as stream:
            picture = to_image(next(stream))
            assert picture.size == nearest
            assert np.ptp(np.asarray(picture), axis=(0, 1)).max() < 5  # red everywhere
    broken = parse_live("broken=gst:nosuchelement ! videoscale")
    assert broken is not None
    with pytest.raises(SourceLostError, match="nosuchelement"), live_frames(broken, 20.0):
        pass


def test_a_pipeline_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gst(tmp_path, "time.sleep(60)", monkeypatch)
    begun = time.monotonic()
    with pytest.raises(SourceLostError), live_frames(Source("front", "gstreamer", "x"), 0.3):
        pass
    assert time.monotonic() - begun < 30


def test_a_video_file_and_its_broken_tail(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mpg"
    write_clip(clip, frames=30)
    assert [read_number(to_image(f)) for f in decode_file(str(clip))] == list(range(30))
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    numbers = [read_number(to_image(f)) for f in decode_file(str(clip))]
    assert 5 < len(numbers) < 30
    assert numbers[:5] == list(range(5))


def test_a_rotation_flag_turns_the_picture(tmp_path: Path) -> None:
    class Turned:
        rotation = 90
        format = av.VideoFormat("rgb24", 40, 20)

        def reformat(self, **_: object) -> Turned:
            return self

        def to_image(self) -> Image.Image:
            return Image.new("RGB", (40, 20))

    assert to_image(Turned()).size == (20, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bgr4", "rgb4", "x2rgb10be", "yaf32le"])
def test_pixels_that_cannot_be_read_are_refused(kind: str) -> None:
    """In this process: FFmpeg would end it over one of them."""
    odd = av.VideoFrame(64, 64, kind)
    for read in (signature, to_image):
        with pytest.raises(ImageError, match=kind):
            read(odd)


def test_a_pipe_is_no_video_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(UsageError, match="no plain file"):
        next(decode_file(str(tmp_path / "x.mp4")))


def test_a_picture_that_froze_beside_living_sound_is_lost() -> None:
    """A clip of two seconds whose sound goes on for four times as long, sent slowly."""
    data = io.BytesIO()
    with av.open(data, "w", format="mpegts") as container:
        video, audio = container.add_stream("mpeg2video", rate=25), container.add_stream("mp2", rate=48000)
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        for i in range(50):
            container.mux(video.encode(frame(draw(i))))
        container.mux(video.encode())
        for i in range(350):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 2304), np.int16), format="s16", layout="stereo")
            sound.rate, sound.pts = 48000, 1152 * i
            container.mux(audio.encode(sound))
    sent = data.getvalue()
    begin = len(sent) // 2
    ended = threading.Event()

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(sent[:begin])
            for at in itertools.count(begin, 188):  # the end again and again, never silent
                if ended.wait(0.02):
                    return
                at = begin + (at - begin) % (len(sent) - begin) // 188 * 188
                client.sendall(sent[at : at + 188])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        source = Source("door", "stream", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        try:
            with live_frames(source, 0.5) as stream, pytest.raises(SourceLostError, match="sent no picture"):
                for _ in stream:
                    pass
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("content", [b"", b"not a video", b"\x00\x00\x00\x18ftypmp42" + b"\xff" * 500])
def test_bad_video_files(tmp_path: Path, content: bytes) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(content)
    with pytest.raises(UsageError, match="no video that can be read"):
        list(decode_file(str(clip)))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UsageError, match="no video in it"):
        list(decode_file(str(path)))


def test_a_playlist_may_not_name_local_files(tmp_path: Path) -> None:
    """What a stream sends must not make the machine read its own files."""
    import http.server

    write_clip(tmp_path / "secret.ts", frames=10)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n".encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.apple.mpegurl")
            self.end_headers()
            self.wfile.write(playlist)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            source = Source("list", "stream", f"http://127.0.0.1:{server.server_port}/list.m3u8")
            with pytest.raises(SourceLostError), live_frames(source, 2.0) as frames:
                next(frames)
        finally:
            server.shutdown()
            thread.join()


# -- capturing -------------------------------------------------------------------------------------------------------


def test_only_the_newest_frame_is_kept() -> None:
    with Camera(rate=100) as camera:
        source = parse_live(camera.url)
        assert source is not None
        one = capture(source)
        one.start()
        wait_until(lambda: one.frames >= 20)
        first = one.latest
        wait_until(lambda: one.frames >= 40)
        second = one.latest
        one.stop()
        assert one.join(5)
    assert first is not None
    assert second is not None
    assert second.number >= first.number + 19  # those in between are gone
    numbers = [read_number(to_image(shot.frame)) for shot in (first, second)]
    assert None not in numbers
    assert numbers[1] > numbers[0]  # type: ignore[operator]
    assert 0 <= second.age < 60


@pytest.mark.parametrize("fault", ["cut", "freeze", "garbage", "refuse"])
def test_a_source_comes_back_after_a_fault(fault: str) -> None:
    with Camera(rate=50) as camera:
        source = parse_live(f"door={camera.url}")
        assert source is not None
        one = capture(source)
        one.start()
        wait_until(lambda: one.frames >= 3)
        camera.fault = fault
        wait_until(lambda: not one.connected)
        losses, frames = one.losses, one.frames
        camera.fault = ""
        wait_until(lambda: one.connected and one.frames > frames)
        one.stop()
        assert one.join(5)
    assert losses >= 1
    kinds = [event.kind for event in one.events()]
    assert kinds == ["connected", "lost", "connected"], "one event however often it was tried"
    assert one.reason


def test_damage_and_another_size_do_not_end_a_stream() -> None:
    with Camera(rate=100) as camera:
        source = parse_live(camera.url)
        assert source is not None
        one = capture(source)
        one.start()
        wait_until(lambda: one.frames >= 3)
        camera.fault = "corrupt"
        time.sleep(0.3)
        camera.fault = "resize"
        wait_until(lambda: one.latest is not None and one.latest.frame.width == 192)
        one.stop()
        assert one.join(5)
    assert "resized" in [event.kind for event in one.events()]


def test_whatever_a_decoder_raises_it_is_tried_again() -> None:
    tries: list[int] = []

    @contextmanager
    def opener(source: Source, silence: float) -> Iterator[Iterator[av.VideoFrame]]:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("a bug in a driver")
        yield iter([frame(draw(5))])

    one = capture(Source("cam", "v4l2", "/dev/video0"), opener=opener)
    one.start()
    wait_until(lambda: one.frames >= 1)
    one.stop()
    assert one.join(5)
    assert [event.kind for event in one.events()][:2] == ["lost", "connected"]


def test_events_of_a_source_that_flaps_for_months_are_bounded() -> None:
    one = capture(Source("cam", "v4l2", "/dev/video0"))
    for _ in range(10_000):
        one._connect()
        one._lose("again")
    assert len(one.events()) < 100
    assert one.losses == 10_000


def test_waits_double_up_to_a_limit_and_begin_again_after_good_work() -> None:
    backoff = Backoff(1.0, 8.0, healthy=30.0)
    for expected in (1, 2, 4, 8, 8, 8):
        assert 0.75 * expected <= backoff.wait(0.0) <= min(1.25 * expected, 8)
    assert backoff.wait(31.0) <= 1.25


# -- the gate --------------------------------------------------------------------------------------------------------


def test_a_still_scene_with_noise_does_not_open_the_gate() -> None:
    random = np.random.default_rng(0)
    scene = random.integers(30, 200, (9, 16, 3)).repeat(20, 0).repeat(20, 1).astype(np.int16)
    gate = ChangeGate(4.0)
    assert gate.opens(gate.change(signature(frame(scene))))
    gate.captioned(signature(frame(scene)))
    for _ in range(20):
        noisy = np.clip(scene + random.normal(0, 12, scene.shape), 0, 255)
        assert not gate.opens(gate.change(signature(frame(noisy))))
    person = scene.copy()
    person[60:100, 100:130] = 255 - person[60:100, 100:130]  # 1.7 % of the picture
    assert gate.opens(gate.change(signature(frame(person))))
    assert gate.opens(gate.change(signature(frame(np.zeros((720, 1280, 3))))))  # of another size


def test_slow_changes_add_up() -> None:
    gate, opened = ChangeGate(4.0), 0
    for brightness in range(50, 150):  # 0.4 percent each
        seen = signature(frame(np.full((64, 64, 3), brightness)))
        if gate.opens(gate.change(seen)):
            gate.captioned(seen)
            opened += 1
    assert opened == 10  # the first one, then every 11 levels


def test_a_gate_of_zero_lets_everything_through() -> None:
    gate = ChangeGate(0.0)
    seen = signature(frame(draw(1)))
    gate.captioned(seen)
    assert gate.opens(gate.change(seen))
