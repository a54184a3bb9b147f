"""Decoded frames of a camera, stream, pipeline or video file, by PyAV. Nothing is reconnected here.

Called by `edgevl.camera.capture` (live), `edgevl.camera.files` and `edgevl.video` (files).
"""

from __future__ import annotations

import atexit
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevl.camera.source import Source, without_passwords
from edgevl.errors import EdgevlError, ImageError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from av import VideoFrame
    from PIL.Image import Image

MAX_PIXELS = 8192 * 8192  # of a frame; what a stream claims beyond that is not allocated
_ABORTS = "yaf"  # formats on which FFmpeg ends the whole process
_FIRST_PICTURE = 6  # times the patience; a camera that is joined midway may send a whole picture only every minute
_BAD_PACKETS = 100  # in a row, before a source counts as lost
_LONGEST_SAID = 4096  # bytes of a pipeline's words that are kept, the last ones
_LONGEST_PIPE = 256  # reads that a full pipe takes, and some more
_LONGEST_REASON = 300  # characters of them in an event
# y4menc writes the padding of other sizes into its frames; these have none, and the next one is taken
_WHOLE = "video/x-raw,format=I420,width=[8,8192,8],height=[2,8192,2]"
_NETWORK = "rtsp,rtsps,rtp,srtp,udp,tcp,tls,http,https,httpproxy,crypto,srt"  # a playlist may not name local files
_FLAGS = {
    "fflags": "nobuffer",
    "flags": "low_delay",
    "max_pixels": str(MAX_PIXELS),
    "probesize": "1000000",  # FFmpeg keeps so many bytes; with its own 5 MB, memory would grow for minutes
    "fpsprobesize": "0",  # nobody asks for the rate; measuring it takes a second at every reconnection
}


class SourceLostError(EdgevlError):
    """A source cannot be opened, ended, or sends nothing that can be decoded; trying again may help."""


@contextmanager
def live_frames(source: Source, silence: float) -> Iterator[Iterator[VideoFrame]]:
    """Open a live source and give its frames as they come.

    Raises `SourceLostError` when it cannot be opened, sends nothing for `silence` seconds or only other things than
    pictures, or ends.
    """
    av = load_av()
    with ExitStack() as stack:
        options = dict(_FLAGS)
        where: str | _Pipeline = source.address
        pipeline: _Pipeline | None = None
        form: str | None = None
        if source.kind == "v4l2":
            form = "v4l2"
        elif source.kind == "gstreamer":
            where = pipeline = stack.enter_context(_pipeline(source, silence))
            form = "yuv4mpegpipe"
        else:
            options |= {"protocol_whitelist": _NETWORK, "rtsp_transport": "tcp"}
        try:
            container = av.open(where, format=form, options=options, timeout=silence)
        except (av.FFmpegError, OSError, ValueError) as error:
            why = (pipeline and pipeline.complaint) or _reason(error, source)
            raise SourceLostError(f"{source.name} cannot be opened ({why})") from error
        stack.enter_context(container)
        frames = _decode(container, source.name, source, silence)
        yield frames if pipeline is None else _with_complaint(frames, pipeline)


def decode_file(path: str, only_keys: bool = False) -> Iterator[VideoFrame]:
    """The frames of a video file, in order; what of a broken tail can be decoded. `only_keys`: key frames alone, fast.

    Raises `UsageError` for a file that cannot be opened or has no video.
    """
    with _open_file(path) as container:
        if only_keys and container.streams.video:
            container.streams.video[0].codec_context.skip_frame = "NONKEY"
        try:
            yield from _decode(container, path)
        except SourceLostError:
            return  # a broken tail


def frame_places(path: str) -> tuple[list[int], list[int], float]:
    """When the frames of a video file are shown, and the key frames among them, both in order; nothing is decoded.

    In units of the last result, seconds; where the file tells no times, the numbers of the frames, and 0 seconds.
    Raises like `decode_file`.
    """
    av = load_av()
    places: list[int] = []
    keys: list[int] = []
    timed = True
    with _open_file(path) as container:
        _check_video(container, path)
        stream = container.streams.video[0]
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue  # the end; what an edit list leaves out
                timed = timed and packet.pts is not None
                places.append(packet.pts if timed else len(places))
                if packet.is_keyframe:
                    keys.append(places[-1])
        except (av.FFmpegError, OSError, ValueError, IndexError):
            pass  # a broken tail
        unit = float(stream.time_base or 0)
    return (sorted(places), sorted(keys), unit) if timed else (list(range(len(places))), [], 0.0)


@contextmanager
def _open_file(path: str) -> Iterator[Any]:
    av = load_av()
    if Path(path).exists() and not Path(path).is_file():  # a pipe would keep everything waiting
        raise UsageError(f"{path} is no plain file; give a picture, a video or a folder")
    try:
        container = av.open(path, options={"protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no video that can be read ({_reason(error)}); give a picture, a video or a folder"
        ) from error
    with container:
        yield container


def to_image(frame: VideoFrame) -> Image:
    """The frame as an upright RGB picture. Raises as `converted` does."""
    image: Image = converted(frame, format="rgb24").to_image()  # type: ignore[no-untyped-call]
    turn = getattr(frame, "rotation", 0) % 360
    return image.rotate(turn, expand=True) if turn else image


def converted(frame: VideoFrame, **how: Any) -> VideoFrame:
    """`frame.reformat`, the only way in which pixels are read; `ImageError` for a format that it cannot read."""
    name = frame.format.name
    try:
        if name.startswith(_ABORTS):
            raise ValueError("not supported")
        return frame.reformat(**how)
    except (OSError, ValueError) as error:
        reason = _reason(error)
        raise ImageError(f"a frame in the format {name} cannot be made a picture ({reason}); use another") from error


def load_av() -> Any:
    """PyAV, or `MissingExtraError`."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("reading videos and cameras", "av", "'edgevl[caption]'") from error
    return av


def check_readable(sources: list[Source]) -> None:
    """Raise, before a model is loaded, what can never work: `MissingExtraError`, or `UsageError` for a pipeline."""
    load_av()
    for source in sources:
        if source.kind == "gstreamer":
            gst_launch(source)


def gst_launch(source: Source) -> str:
    """The tool that runs pipelines."""
    tool = shutil.which("gst-launch-1.0")
    if tool is None:
        raise UsageError(
            f"{source.name} needs gst-launch-1.0, which is missing; "
            "`apt install gstreamer1.0-tools gstreamer1.0-plugins-good` adds it"
        )
    return tool


def _decode(
    container: Any, name: str, source: Source | None = None, silence: float | None = None
) -> Iterator[VideoFrame]:
    """The frames of the first video stream; with `silence`, they may not stay away for longer than that."""
    av = load_av()
    _check_video(container, name)
    stream = container.streams.video[0]
    stream.thread_type = "SLICE"  # threads by frame would keep frames back
    bad = 0
    # sound beside a picture that froze is seen only where its packets come through too
    packets = container.demux(stream) if silence is None else container.demux()
    last, patience = time.monotonic(), _FIRST_PICTURE * (silence or 0.0)
    while True:
        if silence is not None and time.monotonic() - last > patience:
            raise SourceLostError(f"{name} sent no picture for {patience:g} s, only other things")
        try:
            packet = next(packets)
            if packet.stream is not stream:
                continue
            frames = packet.decode()
            bad = 0
        except StopIteration:
            break
        except (av.error.InvalidDataError, av.error.PatchWelcomeError, av.error.BugError) as error:
            bad += 1  # a damaged packet; the next key frame mends the picture
            if bad >= _BAD_PACKETS:
                raise SourceLostError(f"{name} sends nothing that can be decoded") from error
            continue
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:  # IndexError: a stream appeared midway
            raise SourceLostError(f"{name} sends nothing more ({_reason(error, source)})") from error
        for frame in frames:
            if not frame.is_corrupt:
                last, patience = time.monotonic(), silence or 0.0
                yield frame
    raise SourceLostError(f"{name} ended")


def _with_complaint(frames: Iterator[VideoFrame], pipeline: _Pipeline) -> Iterator[VideoFrame]:
    try:
        yield from frames
    except SourceLostError as error:
        if complaint := pipeline.complaint:
            raise SourceLostError(f"{error} ({complaint})") from error
        raise


def _check_video(container: Any, name: str) -> None:
    if not container.streams.video:
        raise UsageError(f"{name} has no video in it, only other streams; give one that has")


@contextmanager
def _pipeline(source: Source, silence: float) -> Iterator[_Pipeline]:
    """Run a GStreamer pipeline in a process of its own and give what it writes: YUV4MPEG, which tells sizes itself.

    Frames have a pipe of their own: elements such as nvarguscamerasrc print to stdout.
    """
    tool = gst_launch(source)
    frames, end = os.pipe()
    try:
        sink = shlex.split(f"! videoconvert ! videoscale ! {_WHOLE} ! y4menc ! fdsink fd={end}")
        process = subprocess.Popen(
            [tool, "-q", *shlex.split(source.address), *sink],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(end,),
        )
    except BaseException:
        os.close(frames)
        raise
    finally:
        os.close(end)
    atexit.register(process.kill)  # a thread that waits for frames does not see the end of this process
    try:
        assert process.stdout is not None
        yield _Pipeline(frames, process.stdout.fileno(), silence)
    finally:
        atexit.unregister(process.kill)
        process.kill()
        process.wait()
        os.close(frames)
        if process.stdout is not None:
            process.stdout.close()


class _Pipeline:
    """The frames of a pipeline, read with patience for `silence` seconds, and what it complains of meanwhile."""

    def __init__(self, frames: int, words: int, silence: float) -> None:
        self._frames, self._words, self._silence = frames, words, silence
        self._open = [frames, words]
        self._said = b""

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end."""
        until = time.monotonic() + self._silence
        while self._frames in self._open:
            ready, _, _ = select.select(self._open, [], [], max(until - time.monotonic(), 0))
            if self._words in ready:
                self._listen()
            if self._frames in ready:
                data = os.read(self._frames, count)
                if not data:
                    self._open.remove(self._frames)
                return data
            if time.monotonic() >= until:
                raise TimeoutError("Connection timed out")
        return b""

    @property
    def complaint(self) -> str:
        """The first line that names an error, without passwords; "" when none did."""
        for _ in range(_LONGEST_PIPE):  # some talk without end
            if self._words not in self._open or not select.select([self._words], [], [], 0)[0]:
                break
            self._listen()
        lines = self._said.decode("utf-8", "replace").splitlines()
        errors = [line.strip() for line in lines if "erro" in line.lower()]  # "ERROR: ...", "erroneous pipeline: ..."
        return without_passwords(errors[0])[:_LONGEST_REASON] if errors else ""

    def _listen(self) -> None:
        data = os.read(self._words, 4096)
        if not data:
            self._open.remove(self._words)
        self._said = (self._said + data)[-_LONGEST_SAID:]


def _reason(error: Exception, source: Source | None = None) -> str:
    """What went wrong, without the address, which may hold a password."""
    if type(error).__name__ == "ExitError":  # what FFmpeg calls the end of our patience
        return "no answer"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return without_passwords(str(text).replace(source.address, source.name)) if source else str(text)
