"""The older files of a journal: which there are, how much they hold, and which go first when space runs short.

Beside `out.jsonl` lie `out.0000000001.jsonl`, `out.0000004711.jsonl`: each named by the sequence number of its first
line. Pictures of the lines lie in `out.frames/NUMBER/`, NUMBER again that of the file's first line. Nothing else is
ever counted or deleted. Called by `edgevl.journal`.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgevl.errors import UsageError
from edgevl.files import sync_folder

_DIGITS = 10


@dataclass(frozen=True)
class Retention:
    """When a journal begins a new file, and when its oldest ones go. None: never."""

    segment_bytes: int | None = None  # lines and pictures of one file
    segment_seconds: float | None = None  # age of a file's first line
    keep_bytes: int | None = None  # all files together, the one being written included
    floor_bytes: int = 0  # free space on the disk, below which the oldest files go

    def __post_init__(self) -> None:
        if self.segment_bytes is not None and self.keep_bytes is not None and self.segment_bytes > self.keep_bytes:
            raise UsageError(
                f"one file may take {self.segment_bytes} bytes, but all together only {self.keep_bytes}; "
                "rotate earlier or keep more"
            )


class Segments:
    """The rotated files of the journal `path`, oldest first."""

    def __init__(self, path: Path) -> None:
        """Look at the folder; what is no file of this journal is not touched."""
        self._path = path
        self._frames = path.with_name(f"{path.stem}.frames")
        name = re.compile(rf"{re.escape(path.stem)}\.(\d{{{_DIGITS}}}){re.escape(path.suffix)}")
        found = (name.fullmatch(entry.name) for entry in path.parent.iterdir())
        firsts = sorted(int(match[1]) for match in found if match)
        self.sizes = {first: self._size(first) for first in firsts}  # bytes of lines and pictures, oldest first

    @property
    def files(self) -> list[Path]:
        """The rotated files, oldest first."""
        return [self.file(first) for first in self.sizes]

    @property
    def total_bytes(self) -> int:
        """Lines and pictures of all rotated files."""
        return sum(self.sizes.values())

    def file(self, first: int) -> Path:
        """Where the file whose first line has that number lies once it is rotated."""
        return self._path.with_name(f"{self._path.stem}.{first:0{_DIGITS}}{self._path.suffix}")

    def folder(self, first: int) -> Path:
        """Where the pictures of that file's lines lie."""
        return self._frames / f"{first:0{_DIGITS}}"

    def frame(self, first: int, sequence: int) -> Path:
        """The picture of one line."""
        return self.folder(first) / f"{sequence:0{_DIGITS}}.jpg"

    def frame_bytes(self, first: int) -> int:
        """Bytes of the pictures of one file."""
        try:
            with os.scandir(self.folder(first)) as entries:
                return sum(entry.stat().st_size for entry in entries)
        except FileNotFoundError:
            return 0

    def add(self, first: int, size: int) -> None:
        """The journal was just renamed to `file(first)`; its lines and pictures take `size` bytes."""
        self.sizes[first] = size

    @property
    def can_drop(self) -> bool:
        """Whether deleting would free anything."""
        return any(self.sizes.values())

    def empty(self, last: int) -> None:
        """Free the only file, but name it after its last line, whose number whoever opens the journal needs.

        The name comes first, so that a kill at any moment leaves either the lines or the name.
        """
        first = next(iter(self.sizes))
        self.file(first).rename(self.file(last))
        self.sizes = {last: self.sizes[first]}
        shutil.rmtree(self.folder(first), ignore_errors=True)
        sync_folder(self._path.parent)
        os.truncate(self.file(last), 0)
        self.sizes = {last: 0}

    def drop_oldest(self) -> int:
        """Delete the oldest file, then its pictures; the number of its first line."""
        first = next(iter(self.sizes))
        self.file(first).unlink(missing_ok=True)
        shutil.rmtree(self.folder(first), ignore_errors=True)
        del self.sizes[first]
        return first

    def sweep(self, active: int, following: int) -> None:
        """Remove what a kill left: pictures of deleted files, and of lines that were never written.

        `active` is the number of the first line of the file being written, `following` that of the next line.
        """
        if not self._frames.is_dir():
            return
        for folder in self._frames.iterdir():
            if not re.fullmatch(rf"\d{{{_DIGITS}}}", folder.name) or not folder.is_dir():
                continue
            if int(folder.name) not in self.sizes and int(folder.name) != active:
                shutil.rmtree(folder, ignore_errors=True)
        if self.folder(active).is_dir():
            for file in self.folder(active).iterdir():
                number = re.fullmatch(rf"(\d{{{_DIGITS}}})\.jpg", file.name)
                torn = re.fullmatch(rf"\.\d{{{_DIGITS}}}\.jpg\..*\.part", file.name)
                if torn or (number and int(number[1]) >= following):
                    file.unlink()

    def _size(self, first: int) -> int:
        return self.file(first).stat().st_size + self.frame_bytes(first)
