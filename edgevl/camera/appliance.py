"""Captions of live sources, for months: the newest frame of whichever source is due, through the gate to the journal.

One thread captions; each source has its own that captures. Knows nothing of models and cameras, only of a `Captioner`
and of `Capture`s. Called by `edgevl caption`.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgevl.camera.captioner import Captioner
from edgevl.camera.capture import Capture, Shot
from edgevl.camera.gate import ChangeGate, Signature, signature
from edgevl.camera.health import Status, write_status
from edgevl.camera.heat import Governor, power_mode, temperatures, watts
from edgevl.camera.notify import Notifier
from edgevl.camera.reader import to_image
from edgevl.camera.watched import Watched
from edgevl.console import note
from edgevl.errors import EdgevlError, UsageError
from edgevl.image import load_image
from edgevl.journal import Journal
from edgevl.machine import resident_bytes

_LONGEST_NAP = 1.0  # seconds; the watchdog, the status and a stop wait no longer
_STATUS_SECONDS = 5.0
_HEAT_SECONDS = 10.0
_MODE_SECONDS = 300.0  # a process of its own each time
_JUMP_SECONDS = 5.0  # between wall clock and monotonic clock, before the journal says so
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Settings:
    """How live sources are captioned."""

    every: float = 2.0  # seconds between two captions of a source
    change: float = 4.0  # percent of brightness in a block; below it a scene is unchanged
    heartbeat: float = 600.0  # seconds between two lines of an unchanged scene
    stale: float = 10.0  # seconds after which a frame is too old to caption
    jpeg: bool = False  # keep captioned frames beside the journal
    max_celsius: float | None = None  # above it captions are spaced out
    status: Path | None = None
    retry: float = 5.0  # seconds until a line that could not be written is tried again
    root: Path = Path("/")  # where sys/class/thermal lies

    def __post_init__(self) -> None:
        for name in ("every", "heartbeat", "stale"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name} is {getattr(self, name):g} s; it must be more than 0")
        if not 0 <= self.change <= 100:
            raise UsageError(f"--change is {self.change:g}; it must be a percentage from 0 to 100")


class Lines(Protocol):
    """Where lines go: a `Journal`, or stdout."""

    def append(self, line: dict[str, Any], jpeg: bytes | None = None) -> int:
        """Add one line; its number."""
        ...


class Appliance:
    """Runs until it is stopped."""

    def __init__(
        self,
        captures: list[Capture],
        captioner: Captioner,
        journal: Lines,
        settings: Settings,
        notifier: Notifier | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._watched = [Watched(capture, ChangeGate(settings.change)) for capture in captures]
        self._captioner, self._journal, self._settings = captioner, journal, settings
        self._notifier = notifier or Notifier({})
        self._wall = wall
        self._stopped = False
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put is safe in a signal handler
        self._governor = Governor(settings.max_celsius)
        self._started = time.monotonic()
        self._offset = wall() - self._started
        self._celsius: dict[str, float] = {}
        self._watts: float | None = None
        self._mode: str | None = None
        self._next_heat = self._next_mode = self._next_status = 0.0
        self._sequence = 0
        self._problem = ""  # why the journal cannot be written now
        self._status_problem: str | None = None  # and why the status file cannot
        self.captions = self.unchanged = self.events = 0
        self.stalled_seconds = 0.0  # in which no line could be written
        self.document = self._status("starting")  # of the status file; replaced, never changed

    def stop(self) -> None:
        """End after the caption in hand; may be called from a signal handler."""
        self._stopped = True
        self._bell.put(None)

    def run(self, background: Iterator[int] | None = None) -> None:
        """Caption until `stop`; `background` is work in small steps for when no source is due.

        Raises `EdgevlError` when it is stopped while a finished caption cannot be written.
        """
        for watched in self._watched:
            watched.capture.start()
        self._notifier.ready(f"captioning {len(self._watched)} sources")
        more = background is not None
        try:
            while not self._stopped:
                self._look_after()
                now = time.monotonic()
                ready = [w for w in self._watched if w.due <= now]
                if ready:
                    self._visit(min(ready, key=lambda w: w.due))
                elif background is not None and more:
                    more = next(background, None) is not None
                else:
                    wait = min((w.due for w in self._watched), default=now + _LONGEST_NAP) - now
                    self._nap(min(max(wait, 0.0), _LONGEST_NAP))
        finally:
            self._notifier.stopping()
            self._write_status("stopped")
            for watched in self._watched:
                watched.capture.stop()
            for watched in self._watched:
                watched.capture.join(2.0)

    def _nap(self, seconds: float) -> None:
        """Wait, but not for longer than until `stop`."""
        if not self._stopped:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=seconds)

    # -- one source ---------------------------------------------------------------------------------------------

    def _visit(self, watched: Watched) -> None:
        settings = self._settings
        watched.due = time.monotonic() + settings.every * self._governor.factor
        name = watched.capture.source.name
        for event in watched.capture.events():
            self._event(event.kind, event.detail, source=name, age=round(event.age, 3))
        shot = watched.capture.latest
        if shot is None:
            return
        if shot.age > settings.stale:
            if not watched.stale:
                watched.stale = True
                self._event("stale", f"no new frame for {shot.age:.1f} s", source=name)
            return
        if shot.number == watched.number:
            return  # nothing new; the next frame is worth a look as soon as the spacing allows
        watched.stale = False
        skipped, watched.number = shot.number - watched.number - 1, shot.number
        try:
            seen = signature(shot.frame)
            change = watched.gate.change(seen)
            if watched.gate.opens(change):
                self._caption(watched, shot, seen, change, skipped)
            else:
                self._still(watched, shot, change)
        except UsageError as error:  # a frame that no model takes, such as one of 16 pixels
            if str(error) != watched.refused:  # once, not at every frame
                watched.refused = str(error)
                self._event("refused", str(error), source=name)

    def _caption(self, watched: Watched, shot: Shot, seen: Signature, change: float, skipped: int) -> None:
        start, age = time.perf_counter(), shot.age
        picture = load_image(to_image(shot.frame))
        caption = self._captioner.caption(picture, self._notifier.alive)
        line: dict[str, Any] = {
            "time": self._now(),
            "source": watched.capture.source.name,
            **caption.said,
            "frame": {
                "sha256": picture.digest,
                "width": picture.size[0],
                "height": picture.size[1],
                "number": shot.number,
                "skipped": skipped,
                "age": round(age, 3),
                "change": round(change, 2),
            },
            "model": self._captioner.model,
            "prompt": self._captioner.prompt,
            "tokens": caption.tokens,
        }
        if self._captioner.schema is not None:
            line["schema"] = self._captioner.schema
        seconds = {"total": time.perf_counter() - start, **caption.seconds}
        line["seconds"] = {k: round(v, 4) for k, v in seconds.items()}
        if self._governor.factor > 1:
            line["spacing"] = self._governor.factor
        jpeg = None
        if self._settings.jpeg:
            buffer = io.BytesIO()
            picture.pixels.save(buffer, "JPEG", quality=_JPEG_QUALITY)
            jpeg = buffer.getvalue()
        watched.caption_sequence = self.append(line, jpeg)
        watched.caption_time, watched.told = line["time"], time.monotonic()
        watched.gate.captioned(seen)
        watched.captions += 1
        self.captions += 1

    def _still(self, watched: Watched, shot: Shot, change: float) -> None:
        self.unchanged += 1
        if time.monotonic() - watched.told < self._settings.heartbeat:
            return
        frame = {"number": shot.number, "age": round(shot.age, 3), "change": round(change, 2)}
        since = {"unchanged_since": watched.caption_time, "caption_sequence": watched.caption_sequence}
        self.append({"time": self._now(), "source": watched.capture.source.name, **since, "frame": frame})
        watched.told = time.monotonic()

    # -- the journal --------------------------------------------------------------------------------------------

    def _event(self, kind: str, detail: str, **more: object) -> None:
        self.events += 1
        note(f"{more.get('source', 'edgevl')}: {kind}{': ' if detail else ''}{detail}")
        self.append({"time": self._now(), **more, "event": kind, "detail": detail})

    def append(self, line: dict[str, Any], jpeg: bytes | None = None) -> int:
        """Write a line, however long it takes until there is room; nothing new is captioned meanwhile.

        Raises `EdgevlError` when it is stopped before.
        """
        began = time.monotonic()
        while True:
            try:
                self._sequence = self._journal.append(line, jpeg)
                break
            except EdgevlError as error:
                if not self._problem:
                    note(f"edgevl: {error}; the line is kept and tried again")
                self._problem = str(error)
                self._look_after(journal=False)
                self._nap(self._settings.retry)
                if self._stopped:
                    raise
        if self._problem:
            self._problem = ""
            self.stalled_seconds += time.monotonic() - began
            note(f"the journal is written again, after {time.monotonic() - began:.0f} s")
        return self._sequence

    def _now(self) -> str:
        now = datetime.datetime.fromtimestamp(self._wall(), datetime.timezone.utc)
        return now.isoformat(timespec="milliseconds")

    # -- health -------------------------------------------------------------------------------------------------

    def _look_after(self, journal: bool = True) -> None:
        """Watchdog, heat, clock and status, each as often as it needs; `journal`: lines may be written."""
        self._notifier.alive()
        now = time.monotonic()
        if now >= self._next_heat:
            self._next_heat = now + _HEAT_SECONDS
            self._celsius, self._watts = temperatures(self._settings.root), watts(self._settings.root)
            hottest = max(self._celsius.values(), default=None)
            # while no line may be written nothing is captioned either; the spacing waits with its line
            if journal and self._governor.look(hottest):
                kind = "hot" if self._governor.factor > 1 else "cool"
                detail = f"captions {self._governor.factor:g} times as far apart"
                self._event(kind, detail, celsius=hottest, spacing=self._governor.factor)
        offset = self._wall() - now
        if journal and abs(offset - self._offset) > _JUMP_SECONDS:
            by, self._offset = offset - self._offset, offset
            self._event("clock", f"the clock was set by {by:+.1f} s")
        if now >= self._next_mode:
            self._next_mode, self._mode = now + _MODE_SECONDS, power_mode()
        if now >= self._next_status:
            self._next_status = now + _STATUS_SECONDS
            self._write_status("full" if self._problem else "running")

    def _write_status(self, state: str) -> None:
        self.document = self._status(state)
        if self._settings.status is not None:
            problem = write_status(self._settings.status, self.document)
            if problem is not None and self._status_problem is None:  # once, not every five seconds
                note(f"edgevl: {self._settings.status} cannot be written ({problem}); captions go on")
            self._status_problem = problem
        what = self._problem or f"{self.captions} captions, {self.unchanged} looks at unchanged scenes"
        self._notifier.status(what)

    def _status(self, state: str) -> Status:
        journal = self._journal if isinstance(self._journal, Journal) else None
        return {
            "state": state,
            "time": self._now(),
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "captions": self.captions,
            "unchanged": self.unchanged,
            "events": self.events,
            "stalled_seconds": round(self.stalled_seconds, 1),
            "problem": self._problem,
            "journal": {
                "path": None if journal is None else str(journal.path),
                "sequence": self._sequence,
                "bytes": 0 if journal is None else journal.total_bytes,
                "deleted": 0 if journal is None else journal.deleted,
            },
            "resident_bytes": resident_bytes(),
            "celsius": self._celsius,
            "watts": self._watts,
            "power_mode": self._mode,
            "spacing": self._governor.factor,
            "sources": [w.status() for w in self._watched],
        }
