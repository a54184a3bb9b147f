"""Decoded frames of a camera, stream, pipeline or video file, by PyAV. Nothing is reconnected here.

Called by `edgevl.camera.capture` (live), `edgevl.camera.files` and `edgevl.video` (files).
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from edgevl.camera.source import Source
from edgevl.errors import EdgevlError, ImageError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from av import VideoFrame
    from PIL.Image import Image

MAX_PIXELS = 8192 * 8192  # of a frame; what a stream claims beyond that is not allocated
_BAD_PACKETS = 100  # in a row, before a source counts as lost
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

    Raises `SourceLostError` when it cannot be opened, sends nothing for `silence` seconds, or ends.
    """
    av = load_av()
    with ExitStack() as stack:
        options = dict(_FLAGS)
        where: str | _Pipe = source.address
        form: str | None = None
        if source.kind == "v4l2":
            form = "v4l2"
        elif source.kind == "gstreamer":
            where, form = stack.enter_context(_pipeline(source, silence)), "yuv4mpegpipe"
        else:
            options |= {"protocol_whitelist": _NETWORK, "rtsp_transport": "tcp"}
        try:
            container = av.open(where, format=form, options=options, timeout=silence)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise SourceLostError(f"{source.name} cannot be opened ({_reason(error, source)})") from error
        stack.enter_context(container)
        yield _decode(container, source.name, source)


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
    try:
        container = av.open(path, options={"protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no video that can be read ({_reason(error)}); give a picture, a video or a folder"
        ) from error
    with container:
        yield container


def to_image(frame: VideoFrame) -> Image:
    """The frame as an upright RGB picture. Raises `ImageError` for a frame that cannot be one."""
    try:
        image: Image = frame.to_image()  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ImageError(f"a frame cannot be made a picture ({_reason(error)}); look at another") from error
    turn = getattr(frame, "rotation", 0) % 360
    return image.rotate(turn, expand=True) if turn else image


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
            split_pipeline(source)


def gst_launch(source: Source) -> str:
    """The tool that runs pipelines."""
    tool = shutil.which("gst-launch-1.0")
    if tool is None:
        raise UsageError(
            f"{source.name} needs gst-launch-1.0, which is missing; "
            "`apt install gstreamer1.0-tools gstreamer1.0-plugins-good` adds it"
        )
    return tool


def split_pipeline(source: Source) -> list[str]:
    """The words of a pipeline, quoted as in a shell."""
    try:
        return shlex.split(source.address)
    except ValueError as error:
        raise UsageError(f"{source.name} is no pipeline ({error}); write it as for gst-launch-1.0") from error


def _decode(container: Any, name: str, source: Source | None = None) -> Iterator[VideoFrame]:
    av = load_av()
    _check_video(container, name)
    stream = container.streams.video[0]
    stream.thread_type = "SLICE"  # threads by frame would keep frames back
    bad = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
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
                yield frame
    raise SourceLostError(f"{name} ended")


def _check_video(container: Any, name: str) -> None:
    if not container.streams.video:
        raise UsageError(f"{name} has no video in it, only other streams; give one that has")


@contextmanager
def _pipeline(source: Source, silence: float) -> Iterator[_Pipe]:
    """Run a GStreamer pipeline in a process of its own and give what it writes: YUV4MPEG, which tells sizes itself."""
    tool = gst_launch(source)
    words = [*split_pipeline(source), *shlex.split("! videoconvert ! video/x-raw,format=I420 ! y4menc ! fdsink fd=1")]
    process = subprocess.Popen([tool, "-q", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield _Pipe(process.stdout.fileno(), silence)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class _Pipe:
    """The reading end of a pipe that gives up when nothing comes, which a plain file object never does."""

    def __init__(self, handle: int, silence: float) -> None:
        self._handle, self._silence = handle, silence

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end."""
        ready, _, _ = select.select([self._handle], [], [], self._silence)
        if not ready:
            raise TimeoutError("Connection timed out")
        return os.read(self._handle, count)


def _reason(error: Exception, source: Source | None = None) -> str:
    """What went wrong, without the address, which may hold a password."""
    if type(error).__name__ == "ExitError":  # what FFmpeg calls the end of our patience
        return "no answer"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).replace(source.address, source.name) if source else str(text)
