"""Marks of finished files: kept over restarts and full disks, longer than lines, and never another journal's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_camera_appliance import Stub

from edgevl.camera.appliance import Settings
from edgevl.camera.files import Done, FileJob
from edgevl.camera.ledger import Ledger
from edgevl.errors import UsageError
from edgevl.journal import Journal
from edgevl.segments import Retention

A, B, C = ("a.png", "caption", "1"), ("b.png", "caption", "2"), ("\udc80.png", "error", "3")


def marks(path: Path, fresh: bool = False) -> list[bool]:
    ledger = Ledger(path, fresh)
    try:
        return [work in ledger for work in (A, B, C)]
    finally:
        ledger.close()


def test_marks_outlive_the_process_and_what_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "out.done"
    ledger = Ledger(path, fresh=False)
    ledger.add(A)
    ledger.add(C)
    ledger.add(A)
    ledger.close()
    assert len(path.read_bytes()) == 2 * 33
    whole = path.read_bytes()
    for rest in (b"", b"0123456789abcdef", b"0" * 32, b"0" * 32 + b"\0" * 500, b"\0" * 33):
        path.write_bytes(whole + rest)
        assert marks(path) == [True, False, True]
        assert path.read_bytes() == whole
    assert marks(path, fresh=True) == [False, False, False] and path.read_bytes() == b""


def test_a_block_that_a_power_loss_zeroed_costs_its_own_marks(tmp_path: Path) -> None:
    path = tmp_path / "out.done"
    ledger = Ledger(path, fresh=False)
    for work in (A, B, C):
        ledger.add(work)
    ledger.close()
    data = bytearray(path.read_bytes())
    data[33:66] = bytes(33)
    path.write_bytes(data)
    assert marks(path) == [True, False, True]


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.done"
    path.write_text("groceries: bread")
    with pytest.raises(UsageError, match="is not what edgevl keeps there"):
        Ledger(path, fresh=True)
    assert path.read_text() == "groceries: bread"
    with pytest.raises(UsageError, match="cannot be written"):
        Ledger(tmp_path, fresh=False)


def test_a_full_disk_delays_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "out.done", os.write
    ledger = Ledger(path, fresh=False)
    ledger.add(A)

    def full(file: int, data: bytes) -> int:
        write(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    ledger.add(B)
    assert B in ledger and len(path.read_bytes()) == 33
    monkeypatch.setattr(os, "write", write)
    ledger.add(C)
    ledger.close()
    assert marks(path) == [True, True, True]


def caption(folder: Path, out: Path, retention: Retention) -> tuple[int, int]:
    """(lines written, files skipped) of one run over a folder."""
    paths = sorted(folder.iterdir())
    done = Done(paths)
    with Journal(out, retention, done.see) as journal:
        ledger = Ledger(out.with_name(f"{out.name}.done"), journal.following == 1)
        done.keep(ledger)
        job = FileJob(Stub(), journal, Settings(), done)
        assert list(job.run(paths)) == list(range(1, len(paths) + 1))
        ledger.close()
    return job.written, job.skipped


def test_files_whose_lines_made_room_are_not_captioned_again(tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out.jsonl"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)).save(folder / f"{i:02}.png")
    small = Retention(segment_bytes=600, keep_bytes=1500)
    assert caption(folder, out, small) == (12, 0)
    held = b"".join(path.read_bytes() for path in tmp_path.glob("out*.jsonl"))
    assert held.count(b"\n") < 12, "the oldest lines are gone"
    assert caption(folder, out, small) == (0, 12)
    for path in tmp_path.glob("out*.jsonl"):
        path.unlink()
    assert caption(folder, out, small) == (12, 0), "a new journal begins a new ledger"
    (tmp_path / "out.jsonl.done").unlink()
    written, skipped = caption(folder, out, small)
    assert written + skipped == 12 and skipped == held.count(b"\n"), "what the journal still holds is enough by itself"
