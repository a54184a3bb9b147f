"""JSON lines that survive a kill: whole lines only, each on the disk before the next begins.

Every line gets a `sequence` number that grows by one, over restarts too. A torn last line, left by a kill, a power loss
or a full disk, is cut off at the next start. With a `Retention` the file is rotated and the oldest files go. One writer
at a time. Knows nothing of what the lines say, except that each is an object that begins with "time". Called by
`edgevl caption`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgevl.errors import EdgevlError, UsageError
from edgevl.files import atomic_file, sync_folder
from edgevl.segments import Retention, Segments

_FIRST = b'{"time":'  # how every line begins; a file that begins otherwise is not ours to change
_LONGEST = 16 << 20  # bytes of one line
_OPEN = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK


class Journal:
    """An open file of JSON lines, and the rotated ones before it."""

    def __init__(
        self,
        path: str | Path,
        retention: Retention | None = None,
        seen: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Open or create the file and cut off a torn last line. `seen` is called with every line there is, in order.

        Raises `UsageError` when the file holds anything but such lines, cannot be written, or has another writer.
        """
        self.path = Path(path)
        self.retention = retention or Retention()
        self.torn = False  # a torn last line was cut off
        self.count = 0  # lines of the open file
        self.deleted = 0  # old lines that made room
        self._last = 0  # sequence number of the last line
        self._first: int | None = None  # and of the first one in the open file
        self._begun = time.monotonic()  # when the first line of the open file was written, as far as clocks tell
        self._frames = 0  # bytes of its pictures
        self._file = self._open()
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise UsageError(f"{self.path} is not a plain file; name one that captions can be added to")
            self._lock()
            self._segments = Segments(self.path)
            if self._segments.files:
                self._last = _last_sequence(self._segments.files[-1])
            for file in self._segments.files if seen is not None else ():
                assert seen is not None
                with file.open("rb") as stream:
                    for number, data in enumerate(stream, 1):
                        seen(self._parse(data, number, file))
            self._end = self._read(seen)
            self._frames = self._segments.frame_bytes(self._start)
            self._segments.sweep(self._start, self.following)
            sync_folder(self.path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def following(self) -> int:
        """The sequence number of the next line."""
        return self._last + 1

    @property
    def total_bytes(self) -> int:
        """Lines and pictures of all files."""
        return self._segments.total_bytes + self._end + self._frames

    def append(self, line: dict[str, Any], jpeg: bytes | None = None) -> int:
        """Write one line, its picture before it, and wait until both are on the disk; the line's sequence number.

        Older files make room first, as the retention says. Raises `EdgevlError` when there is no room, with no line
        written: the same call may be made again.
        """
        line = {"time": line["time"], "sequence": self.following, **line}
        try:
            while True:
                try:
                    written = self._write(line, jpeg)
                    break
                except (OSError, EdgevlError) as error:
                    cause = error if isinstance(error, OSError) else error.__cause__
                    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
                    if not full or not self._segments.can_drop:
                        raise
                    self._drop_oldest()
        except OSError as error:
            raise EdgevlError(
                f"{self.path} cannot be written ({error.strerror}); free some space and run the same command again"
            ) from error
        if self._first is None:
            self._first, self._begun = self.following, time.monotonic()
        self._last, self._end, self.count = self.following, self._end + written, self.count + 1
        self._frames += len(jpeg or b"")
        return self._last

    def close(self) -> None:
        """Close the file; another writer may open it."""
        os.close(self._file)

    # -- writing ------------------------------------------------------------------------------------------------

    @property
    def _start(self) -> int:
        """The sequence number of the open file's first line, written or yet to be."""
        return self.following if self._first is None else self._first

    def _write(self, line: dict[str, Any], jpeg: bytes | None) -> int:
        """Write the line once, rotating before it if it is time; its bytes."""
        more = len(jpeg or b"")
        if os.fstat(self._file).st_size != self._end:  # an earlier failure could not be undone then
            os.ftruncate(self._file, self._end)
        if self._is_full(more):
            self._rotate()
        if self._first is None:  # perhaps a new file; here, since either may fail and is then tried again
            self._lock()
            sync_folder(self.path.parent)
        frame = self._segments.frame(self._start, self.following)
        if jpeg is not None:
            line = {**line, "jpeg": str(frame.relative_to(self.path.parent))}
        data = encode(line)
        assert data.startswith(_FIRST), "a line begins with its time"
        self._make_room(len(data) + more)
        if jpeg is not None:
            if not frame.parent.is_dir():
                frame.parent.mkdir(parents=True, exist_ok=True)
                sync_folder(frame.parent.parent)
                sync_folder(self.path.parent)
            with atomic_file(frame) as file:
                file.write(jpeg)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # else the next append does it
                os.ftruncate(self._file, self._end)
            raise
        return len(data)

    def _is_full(self, more: int) -> bool:
        """Whether the next line goes into a new file."""
        limits = self.retention
        if self._first is None:
            return False
        if limits.segment_bytes is not None and self._end + self._frames + more >= limits.segment_bytes:
            return True
        return limits.segment_seconds is not None and time.monotonic() - self._begun >= limits.segment_seconds

    def _rotate(self) -> None:
        """Go on in a new file, or raise with everything as it was."""
        first, size = self._start, self._end + self._frames
        self.path.rename(self._segments.file(first))
        old = self._file
        try:
            self._file = os.open(self.path, _OPEN, 0o666)
        except BaseException:
            self._segments.file(first).rename(self.path)
            raise
        self._segments.add(first, size)
        self._first, self._end, self._frames, self.count = None, 0, 0, 0
        os.close(old)

    def _make_room(self, more: int) -> None:
        """Delete the oldest files until budget and disk have room for `more` bytes, or none is left."""
        limits = self.retention
        while self._segments.can_drop:
            disk = os.fstatvfs(self._file)
            low = disk.f_bavail * disk.f_frsize < limits.floor_bytes + more
            much = limits.keep_bytes is not None and self.total_bytes + more > limits.keep_bytes
            if not (low or much):
                break
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        firsts = [*self._segments.sizes, self._start]
        if self._segments.sizes[firsts[0]]:
            self.deleted += firsts[1] - firsts[0]
        if self._first is None and len(firsts) == 2:
            self._segments.empty(self._last)
        else:
            self._segments.drop_oldest()

    # -- opening ------------------------------------------------------------------------------------------------

    def _open(self) -> int:
        try:
            return os.open(self.path, _OPEN, 0o666)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}); name a file in a folder of yours"
            ) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UsageError(f"{self.path} is being written by another process; name another file") from error
            # a file system without locks: go on without

    def _read(self, seen: Callable[[dict[str, Any]], None] | None) -> int:
        """Check the open file line by line; where its last whole line ends."""
        end = 0
        with os.fdopen(os.dup(self._file), "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            while data := stream.readline(_LONGEST):
                if end + len(data) == size and _is_torn(data, first=end == 0):
                    os.ftruncate(self._file, end)
                    os.fsync(self._file)
                    self.torn = True
                    break
                line = self._parse(data, self.count + 1, self.path)
                self.count += 1
                self._last = _sequence(line, self._last + 1)
                if self._first is None:
                    self._first = self._last
                    self._begun = time.monotonic() - _age(line)
                if seen is not None:
                    seen(line)
                end += len(data)
        return end

    def _parse(self, data: bytes, number: int, file: Path) -> dict[str, Any]:
        try:
            line = json.loads(data) if data.endswith(b"\n") else None
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or "time" not in line:
            raise UsageError(f"line {number} of {file} is no caption, so nothing is added to the file; name a new one")
        return line


def encode(line: dict[str, Any]) -> bytes:
    """One line of UTF-8 with its newline; names of files that are no UTF-8 keep their bytes as JSON escapes.

    Raises `ValueError` for a number that is none: JSON has no word for it.
    """
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line, allow_nan=False).encode("ascii") + b"\n"


def _is_torn(data: bytes, first: bool) -> bool:
    """Whether the end of a file is the rest of a line of ours.

    A kill leaves the beginning of a line. A power loss may also leave zeros where blocks did not reach the disk; JSON
    text never holds one.
    """
    if data.endswith(b"\n") and b"\0" not in data:
        return False
    head = data.split(b"\0", 1)[0]
    if first and len(head) < len(_FIRST) and data[len(head) :].strip(b"\0"):
        return False  # nothing shows that the file is ours
    return head.startswith(_FIRST) or _FIRST.startswith(head)


def _sequence(line: dict[str, Any], counted: int) -> int:
    """The line's number; lines of before there were numbers are counted."""
    number = line.get("sequence")
    return number if isinstance(number, int) and number > 0 else counted


def _last_sequence(file: Path) -> int:
    """The number of a rotated file's last line, at least that in its name."""
    last, count = b"{}", 0
    with file.open("rb") as stream:
        for count, last in enumerate(stream, 1):  # noqa: B007 (the last one is wanted)
            pass
    first = int(file.stem.rsplit(".", 1)[1])
    try:
        line = json.loads(last)
    except ValueError:
        line = {}
    return max(first, _sequence(line if isinstance(line, dict) else {}, first + count - 1))


def _age(line: dict[str, Any]) -> float:
    """Seconds since a line was written; 0 when its time cannot be read or lies ahead of a clock that was set back."""
    try:
        written = datetime.datetime.fromisoformat(line["time"])
        return max(0.0, (datetime.datetime.now(datetime.timezone.utc) - written).total_seconds())
    except (TypeError, ValueError):
        return 0.0
