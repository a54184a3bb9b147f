"""A thread for each source that keeps its newest frame and nothing else, and opens the source again when it is lost.

Knows nothing of captions: whoever asks gets the newest frame with its age, and what happened since it last asked.
Called by `edgevl.camera.appliance`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgevl.camera.backoff import Backoff
from edgevl.camera.reader import live_frames
from edgevl.camera.source import Source
from edgevl.errors import EdgevlError

if TYPE_CHECKING:
    from av import VideoFrame

Opener = Callable[[Source, float], AbstractContextManager[Iterator["VideoFrame"]]]

_EVENTS = 64  # kept between two looks; a source that flaps faster than that is told by its count


@dataclass(frozen=True)
class Shot:
    """One frame of a source."""

    frame: VideoFrame
    number: int  # of this source's frames since the start, from 1
    taken: float  # seconds of the monotonic clock

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self.taken


@dataclass(frozen=True)
class Event:
    """Something that happened to a source: "connected", "lost" or "resized"."""

    kind: str
    detail: str
    happened: float = field(default_factory=time.monotonic)  # seconds of the monotonic clock

    @property
    def age(self) -> float:
        """Seconds since it happened."""
        return time.monotonic() - self.happened


class Capture:
    """The newest frame of one source."""

    def __init__(
        self, source: Source, silence: float = 10.0, opener: Opener = live_frames, backoff: Backoff | None = None
    ) -> None:
        """`silence`: seconds without a frame after which the source is opened again."""
        self.source = source
        self.connected = False
        self.frames = self.losses = 0
        self.reason = ""  # of the last loss
        self._silence, self._opener, self._backoff = silence, opener, backoff or Backoff()
        self._latest: Shot | None = None
        self._size: tuple[int, int] | None = None
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._stop = threading.Event()
        # a daemon: a driver that never returns must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name=f"capture {source.name}", daemon=True)

    def start(self) -> None:
        """Begin to capture."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; `join` waits for it."""
        self._stop.set()

    def join(self, seconds: float) -> bool:
        """Wait for the end of the thread; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def latest(self) -> Shot | None:
        """The newest frame that ever came."""
        return self._latest

    def events(self) -> list[Event]:
        """What happened since the last call."""
        happened: list[Event] = []
        while self._events:
            happened.append(self._events.popleft())
        return happened

    def _run(self) -> None:
        while not self._stop.is_set():
            begun: float | None = None
            try:
                with self._opener(self.source, self._silence) as frames:
                    for frame in frames:
                        if begun is None:
                            begun = time.monotonic()
                            self._connect()
                        self._keep(frame)
                        if self._stop.is_set():
                            return
                self._lose("it ended")
            except EdgevlError as error:
                self._lose(str(error))
            except Exception as error:  # whatever a decoder raises, this source is tried again and the others go on
                self._lose(f"{type(error).__name__}: {error}")
            self._stop.wait(self._backoff.wait(0.0 if begun is None else time.monotonic() - begun))

    def _connect(self) -> None:
        self.connected = True
        self._events.append(Event("connected", ""))

    def _keep(self, frame: VideoFrame) -> None:
        size = (frame.width, frame.height)
        if self._size is not None and size != self._size:
            self._events.append(Event("resized", f"{self._size[0]}x{self._size[1]} to {size[0]}x{size[1]}"))
        self._size = size
        self.frames += 1
        self._latest = Shot(frame, self.frames, time.monotonic())

    def _lose(self, reason: str) -> None:
        if self.connected or self.losses == 0:  # one event however often it is tried again
            self._events.append(Event("lost", reason))
        self.connected = False
        self.losses += 1
        self.reason = reason
