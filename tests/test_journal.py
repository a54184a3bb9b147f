"""JSON lines after a kill, on a full disk, and on files that are not ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgevl.errors import EdgevlError, UsageError
from edgevl.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def line(n: int, **more: object) -> dict[str, object]:
    return {"time": f"t{n}", **more}


def test_lines_are_added_and_read_again(path: Path) -> None:
    with Journal(path) as journal:
        assert (journal.lines, journal.torn) == ([], False)
        journal.append(line(1, caption="Zürich\n\u2028"))
    with Journal(path) as journal:
        journal.append(line(2))
    with Journal(path) as journal:
        assert journal.lines == [line(1, caption="Zürich\n\u2028"), line(2)]
    assert path.read_text(encoding="utf-8").count("\n") == 2


def test_a_name_that_is_no_utf8_survives(path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with Journal(path) as journal:
        journal.append(line(1, source=name))
    path.read_bytes().decode("utf-8")
    with Journal(path) as journal:
        assert journal.lines[0]["source"] == name


@pytest.mark.parametrize("keep", [1, 5, 8, 20])
def test_a_torn_last_line_is_cut_off(path: Path, keep: int) -> None:
    with Journal(path) as journal:
        journal.append(line(1))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(line(2, caption="a long caption")).encode()[:keep])
    with Journal(path) as journal:
        assert (journal.lines, journal.torn) == ([line(1)], True)
        assert path.read_bytes() == whole
        journal.append(line(3))
    assert [json.loads(s)["time"] for s in path.read_text().splitlines()] == ["t1", "t3"]


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n", b"notes", b"notes\n", b"[1]\n", b'{"a": 1}\n', b"{}\n", b'{"time": 1}\nx', b"\n"]
)
def test_a_file_of_something_else_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no caption"):
        Journal(path)
    assert path.read_bytes() == content


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for bad in (tmp_path / "folder", tmp_path / "no" / "out.jsonl", Path(os.devnull)):
        with pytest.raises(UsageError, match=bad.name):
            Journal(bad)


def test_one_writer_at_a_time(path: Path) -> None:
    with Journal(path), pytest.raises(UsageError, match="another process"):
        Journal(path)
    Journal(path).close()


def test_a_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path) as journal:
        journal.append(line(1))
        whole, write = path.read_bytes(), os.write

        def half(handle: int, data: bytes) -> int:
            if len(data) < 10:
                raise OSError(28, "No space left on device")
            return write(handle, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(EdgevlError, match="No space"):
            journal.append(line(2, caption="a long caption"))
        monkeypatch.undo()
        assert path.read_bytes() == whole
        journal.append(line(3))
    with Journal(path) as journal:
        assert len(journal.lines) == 2
