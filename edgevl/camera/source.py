"""What a SOURCE on the command line is: a camera, a pipeline, a stream, a video file, or a picture or folder.

Knows the forms and nothing of how they are read. Called by `edgevl caption`.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgevl.errors import UsageError

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".y4m"))
_SCHEMES = ("rtsp", "rtsps", "http", "https", "tcp", "udp", "rtp", "srt")
_NAMED = re.compile(r"([A-Za-z][\w.-]{0,63})=(.+)", re.DOTALL)
# where a password ends cannot be known, as it may hold any character: rather too much is left out than too little
_USER = re.compile(r"(?<=//).*@", re.DOTALL)  # of a URL, with its password
_HIDDEN = r"(?:\w*(?:pass|pwd|secret|token|auth)\w*|\w*key|pw)="
_IN_QUERY = re.compile(rf"\b({_HIDDEN})[^&]+", re.IGNORECASE)
_PROPERTY = re.compile(rf"\A((?:\w+-)*{_HIDDEN}).+", re.IGNORECASE | re.DOTALL)
_CSI = "nvarguscamerasrc sensor-id={} ! nvvidconv ! video/x-raw,format=I420"


@dataclass(frozen=True)
class Source:
    """One live source. `name` stands in the journal, `address` is what is opened and may hold a password."""

    name: str
    kind: str  # "v4l2" | "gstreamer" | "stream"
    address: str


def parse_live(text: str) -> Source | None:
    """The live source that `text` names, or None for a file or folder.

    `/dev/videoN` is a V4L2 camera, `gst:PIPELINE` ends in raw video, `csi:N` is a Jetson's CSI camera, and a URL is a
    stream. `NAME=` before any of them is what the journal calls it; passwords of URLs never stand in the journal.
    `env:VARIABLE` is any of them, read from the environment, since other users see command lines. Raises `UsageError`
    for a form that cannot be used.
    """
    named = _NAMED.fullmatch(text)
    if named:
        inner = parse_live(named[2])
        if inner is not None:
            return Source(named[1], inner.kind, inner.address)
    if re.fullmatch(r"/dev/video\d+", text) or text.startswith("/dev/v4l/"):
        return Source(text, "v4l2", text)
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "gst":
        if not rest.strip():
            raise UsageError("gst: needs a pipeline after it, such as 'gst:v4l2src ! videoconvert'")
        return Source(f"gst:{_pipeline_name(rest)}", "gstreamer", rest.strip())
    if colon and scheme == "env":
        value = os.environ.get(rest, "")
        inner = None if re.match("[^:]*env:", value) else parse_live(value)
        if inner is None:
            raise UsageError(f"{text} names no camera; set the variable {rest} to one, such as rtsp://HOST/PATH")
        return inner
    if colon and scheme == "csi":
        if not rest.isdecimal():
            raise UsageError(f"{text} names no camera; give the sensor's number, such as csi:0")
        return Source(text, "gstreamer", _CSI.format(rest))
    if "://" in text and not Path(text).exists():
        return _stream(text)
    return None


def _stream(text: str) -> Source:
    scheme = text.split("://", 1)[0].lower()
    if scheme not in _SCHEMES:
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        raise UsageError(f"{without_passwords(text)} is no stream that can be read; use one of {known}, or a path")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        way = "write SCHEME://HOST:PORT/PATH, and the / ? # of a password as %2F %3F %23"
        raise UsageError(f"{without_passwords(text)} is no address; {way}") from error
    if not host and scheme not in ("udp", "rtp"):
        raise UsageError(f"{without_passwords(text)} names no host; write {scheme}://HOST:PORT/PATH")
    return Source(without_passwords(text), "stream", text)


def without_passwords(text: str) -> str:
    """An address, or a sentence with one, without user and password, as it may stand in the journal."""
    return _IN_QUERY.sub(r"\1***", _USER.sub("", text))


def _pipeline_name(text: str) -> str:
    """The words of a pipeline without quotes and passwords."""
    try:
        words = shlex.split(re.sub(r"\s*=\s*", "=", text))
    except ValueError as error:
        raise UsageError(f"what follows gst: is no pipeline ({error}); write it as for gst-launch-1.0") from error
    return " ".join(without_passwords(_PROPERTY.sub(r"\1***", word)) for word in words)


def check_names(sources: list[Source]) -> None:
    """Raise `UsageError` when two sources would be called the same in the journal."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two sources are called {name}; give them names, such as door={name}")


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return path.suffix.lower() in VIDEO_SUFFIXES
