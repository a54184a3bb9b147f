"""Which files have their lines already: a mark for each, kept beside a journal and longer than its oldest lines.

A journal deletes old lines to make room; without their marks, the files that they were about would be captioned again.
`OUTPUT.done` holds one mark a line, 32 hexadecimal digits. It belongs to one journal: a new journal begins a new one.
Called by `edgevl.camera.files`.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from edgevl.errors import UsageError
from edgevl.files import sync_folder

_LINE = re.compile(rb"[0-9a-f]{32}\n")
_LENGTH = 33  # bytes of a line


class Ledger:
    """An open file of marks. It is named after a journal, whose lock keeps other processes away."""

    def __init__(self, path: Path, fresh: bool) -> None:
        """Open or create; with `fresh`, what is there is forgotten. What a kill or a power loss left is cut off.

        Raises `UsageError` for a file that is not ours or cannot be written.
        """
        self._marks: set[bytes] = set()
        self._waiting: list[bytes] = []  # for room on the disk
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                data = _read(self._file)
                if data and _LINE.match(data + b"\n") is None and re.fullmatch(rb"[0-9a-f]*\0*", data) is None:
                    raise UsageError(f"{path} is not what edgevl keeps there; move it away")
                whole = len(data) - len(data) % _LENGTH if not fresh else 0
                self._marks = {line for i in range(0, whole, _LENGTH) if _LINE.fullmatch(line := data[i : i + _LENGTH])}
                while whole and not _LINE.fullmatch(data, whole - _LENGTH, whole):
                    whole -= _LENGTH
                self._end = whole
                if len(data) != whole:
                    os.ftruncate(self._file, whole)
                sync_folder(path.parent)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written ({error.strerror}); name a file in a folder of yours"
            ) from error

    def __contains__(self, work: tuple[object, ...]) -> bool:
        return _mark(work) in self._marks

    def add(self, work: tuple[object, ...]) -> None:
        """Mark as done; on the disk when this returns, or with a later call once the disk has room."""
        if (mark := _mark(work)) not in self._marks:
            self._marks.add(mark)
            self._waiting.append(mark)
        data = b"".join(self._waiting)
        if not data:
            return
        try:
            if os.write(self._file, data) < len(data):
                raise OSError
            os.fsync(self._file)
        except OSError:  # the journal's lines still tell until they are deleted
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            return
        self._end += len(data)
        self._waiting.clear()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _mark(work: tuple[object, ...]) -> bytes:
    digest = hashlib.sha256(repr(work).encode("utf-8", "surrogatepass")).hexdigest()
    return digest[: _LENGTH - 1].encode("ascii") + b"\n"


def _read(file: int) -> bytes:
    size = os.fstat(file).st_size
    return b"".join(iter(lambda: os.read(file, 1 << 20), b"")) if size else b""
