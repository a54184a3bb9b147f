"""Captions of pictures and video files, each once: what a journal already holds is not asked again.

A video is looked at every few seconds of its own time, through the same gate as a camera. Called by `edgevl caption`.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevl.camera.appliance import Lines, Settings
from edgevl.camera.captioner import Captioner
from edgevl.camera.gate import ChangeGate, signature
from edgevl.camera.ledger import Ledger
from edgevl.camera.reader import decode_file, to_image
from edgevl.camera.source import VIDEO_SUFFIXES, is_video
from edgevl.console import note
from edgevl.errors import UsageError
from edgevl.image import Picture, load_image

if TYPE_CHECKING:
    from av import VideoFrame

_PICTURES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
_STEP_SECONDS = 1.0  # of looking for the next frame of a video


class Done:
    """What was done of the files that are asked for: what the journal holds, and what it held (`Ledger`)."""

    def __init__(self, paths: list[Path]) -> None:
        self._sources = {str(path) for path in paths}
        self._lines: set[tuple[object, ...]] = set()
        self._ledger: Ledger | None = None

    def __contains__(self, work: tuple[object, ...]) -> bool:
        return work in self._lines or (self._ledger is not None and work in self._ledger)

    def add(self, work: tuple[object, ...]) -> None:
        """A line about it is on the disk."""
        self._lines.add(work)
        if self._ledger is not None:
            self._ledger.add(work)

    def keep(self, ledger: Ledger) -> None:
        """From now on remember beyond the journal's lines."""
        self._ledger = ledger
        for work in sorted(self._lines, key=repr):
            ledger.add(work)

    def see(self, line: dict[str, Any]) -> None:
        """Take a line of the journal into account."""
        if line.get("source") in self._sources:
            self._lines.add(identity(line))


class FileJob:
    """Captions files one after the other."""

    def __init__(
        self,
        captioner: Captioner,
        journal: Lines,
        settings: Settings,
        done: Done,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._captioner, self._journal, self._settings, self._alive = captioner, journal, settings, alive
        self._done = done
        self.written = self.skipped = self.failed = 0

    def run(self, paths: list[Path]) -> Iterator[int]:
        """Caption all files; gives the number of finished ones after every step of work."""
        for i, path in enumerate(paths):
            try:
                if is_video(path):
                    for _ in self._video(path):
                        yield i
                else:
                    self._picture(path)
            except UsageError as error:
                self.failed += 1
                note(f"edgevl: {error}")
                self._write({"source": str(path), "error": str(error)}, time.perf_counter(), {})
            yield i + 1

    def _picture(self, path: Path) -> None:
        start = time.perf_counter()
        self._ask({"source": str(path)}, load_image(path), start, {})

    def _video(self, path: Path) -> Iterator[None]:
        gate = ChangeGate(self._settings.change)
        captioned, told = 0.0, float("-inf")
        looked = False
        for sample in _samples(str(path), self._settings.every):
            if sample is None:
                yield
                continue
            position, frame = sample
            looked = True
            start = time.perf_counter()
            seen = signature(frame)
            change = gate.change(seen)
            if gate.opens(change):
                more = {"position": position, "change": round(change, 2)}
                self._ask({"source": str(path)}, load_image(to_image(frame)), start, more)
                gate.captioned(seen)
                captioned = told = position
            elif position - told >= self._settings.heartbeat:
                line = {"source": str(path), "unchanged_since": captioned, "frame": {"position": position}}
                self._write({**line, "model": self._captioner.model, "prompt": self._captioner.prompt}, start, {})
                told = position
            yield
        if not looked:
            raise UsageError(f"{path} has no frame that can be decoded; give a whole video")

    def _ask(self, line: dict[str, Any], picture: Picture, start: float, more: dict[str, Any]) -> None:
        size = {"width": picture.size[0], "height": picture.size[1]}
        line |= {"frame": {"sha256": picture.digest, **size, **more}}
        line |= {"model": self._captioner.model, "prompt": self._captioner.prompt}
        if self._captioner.schema is not None:
            line["schema"] = self._captioner.schema
        if identity(line) in self._done:
            self.skipped += 1
            return
        caption = self._captioner.caption(picture, self._alive)
        for text in caption.notes:
            note(f"{Path(line['source']).name}: {text}")
        self._write({**line, **caption.said, "tokens": caption.tokens}, start, caption.seconds)
        self.written += 1

    def _write(self, line: dict[str, Any], start: float, parts: dict[str, float]) -> None:
        if identity(line) in self._done:
            return
        seconds = {"total": time.perf_counter() - start, **parts}
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._journal.append({"time": now, **line, "seconds": {k: round(v, 4) for k, v in seconds.items()}})
        self._done.add(identity(line))


def find_files(sources: tuple[Path, ...], recursive: bool) -> Iterator[Path]:
    """Files as they are given, and pictures and videos of folders by name, hidden ones left out. Each path once.

    Raises `UsageError` for a folder without any.
    """
    seen: set[Path] = set()
    for source in sources:
        paths = list(_files_of(source, recursive)) if source.is_dir() else [source]
        if not paths:
            way = "name another" if recursive else "name another, or add -r to look into its subfolders"
            raise UsageError(f"there are no pictures in the folder {source}; {way}")
        for path in paths:
            if path not in seen:
                seen.add(path)
                yield path


def identity(line: dict[str, Any]) -> tuple[object, ...]:
    """What makes two lines the same work: source, kind, pixels, place in a video, model, question; or the error."""
    if "error" in line:
        return (line.get("source"), "error", str(line["error"]))
    frame = line.get("frame")
    frame = frame if isinstance(frame, dict) else {}
    kind = "caption" if "caption" in line or "unchanged_since" not in line else "unchanged"
    where = (frame.get("sha256"), frame.get("position"))
    return (line.get("source"), kind, *map(str, (*where, line.get("model"), line.get("prompt"), line.get("schema"))))


def _files_of(folder: Path, recursive: bool) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in _PICTURES | VIDEO_SUFFIXES:
                yield Path(where) / name


def _samples(path: str, every: float) -> Iterator[tuple[float, VideoFrame] | None]:
    """A frame every so many seconds of the video's own time, with its place in seconds from the first frame.

    None about once a second on the way, so that nobody waits for a long video.
    """
    first: float | None = None
    wanted = place = 0.0
    given = time.monotonic()
    for frame in decode_file(path):
        if frame.time is not None:
            first = frame.time if first is None else first
            place = max(place, frame.time - first)
        if place >= wanted:
            yield round(place, 3), frame
            wanted = (place // every + 1) * every
        elif time.monotonic() - given >= _STEP_SECONDS:
            yield None
        else:
            continue
        given = time.monotonic()
