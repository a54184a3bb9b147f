"""JSON lines that survive a kill: whole lines only, each on the disk before the next begins.

A torn last line, left by a kill or a full disk, is cut off at the next start. One writer at a time. Knows nothing of
what the lines say, except that each is an object that begins with "time". Called by `edgevl caption`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

from edgevl.errors import EdgevlError, UsageError

_FIRST = b'{"time":'  # how every line begins; a file that begins otherwise is not ours to change
_BLOCK = 1 << 20
_LONGEST = 16 << 20  # bytes of one line


class Journal:
    """An open file of JSON lines. `lines` are those that it held when it was opened."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the file and cut off a torn last line.

        Raises `UsageError` when the file holds anything but such lines, cannot be written, or has another writer.
        """
        self.path = Path(path)
        self.torn = False  # a torn last line was cut off
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}); name a file in a folder of yours"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise UsageError(f"{self.path} is not a plain file; name one that captions can be added to")
            self._lock()
            self.lines = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and wait until it is on the disk; `EdgevlError` when it cannot be, with nothing written."""
        data = encode(line)
        assert data.startswith(_FIRST), "a line begins with its time"
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise EdgevlError(
                f"{self.path} cannot be written ({error.strerror}); free some space and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the file; another writer may open it."""
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UsageError(f"{self.path} is being written by another process; name another file") from error
            # a file system without locks: go on without

    def _read(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        end = 0  # of the last whole line
        with os.fdopen(os.dup(self._file), "rb") as stream:
            stream.seek(0)
            while data := stream.readline(_LONGEST):
                if not data.endswith(b"\n"):
                    if not (data.startswith(_FIRST) or _FIRST.startswith(data)):
                        raise self._foreign(len(lines) + 1)
                    os.ftruncate(self._file, end)
                    os.fsync(self._file)
                    self.torn = True
                    break
                lines.append(self._parse(data, len(lines) + 1))
                end += len(data)
        return lines

    def _parse(self, data: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._foreign(number) from error
        if not isinstance(line, dict) or "time" not in line:
            raise self._foreign(number)
        return line

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"line {number} of {self.path} is no caption, so nothing is added to the file; name a new one"
        )


def encode(line: dict[str, Any]) -> bytes:
    """One line of UTF-8 with its newline; names of files that are no UTF-8 keep their bytes as JSON escapes."""
    try:
        return json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode("ascii") + b"\n"
