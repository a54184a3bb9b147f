"""JSON lines after a kill, on a full disk, on files that are not ours, and over months: rotated, within a budget."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevl.errors import EdgevlError, UsageError
from edgevl.journal import Journal, encode
from edgevl.segments import Retention, Segments


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def line(n: int, **more: object) -> dict[str, object]:
    return {"time": f"t{n}", **more}


def numbered(n: int, **more: object) -> dict[str, object]:
    return {"time": f"t{n}", "sequence": n, **more}


def read(path: Path, retention: Retention | None = None) -> list[dict[str, Any]]:
    """Every line of the journal, its rotated files included."""
    lines: list[dict[str, Any]] = []
    Journal(path, retention, lines.append).close()
    return lines


def test_lines_are_numbered_and_read_again(path: Path) -> None:
    with Journal(path) as journal:
        assert (journal.count, journal.torn, journal.following) == (0, False, 1)
        assert journal.append(line(1, caption="Zürich\n\u2028")) == 1
    with Journal(path) as journal:
        assert journal.append(line(2)) == 2
    assert read(path) == [numbered(1, caption="Zürich\n\u2028"), numbered(2)]
    assert path.read_text(encoding="utf-8").count("\n") == 2


def test_lines_of_before_there_were_numbers_are_counted(path: Path) -> None:
    path.write_bytes(encode(line(1)) + encode(line(2)))
    with Journal(path) as journal:
        assert journal.append(line(3)) == 3


def test_a_name_that_is_no_utf8_survives(path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with Journal(path) as journal:
        journal.append(line(1, source=name))
    path.read_bytes().decode("utf-8")
    assert read(path)[0]["source"] == name


texts = st.text(st.characters(codec="utf-8"), max_size=40)


@settings(max_examples=150, deadline=None)
@given(captions=st.lists(texts, min_size=1, max_size=5), data=st.data())
def test_cut_off_at_any_byte_it_goes_on(captions: list[str], data: st.DataObject) -> None:
    """A kill leaves a beginning; a power loss may leave zeros in what was not yet on the disk."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "out.jsonl"
        with Journal(path) as journal:
            for n, caption in enumerate(captions, 1):
                journal.append(line(n, caption=caption))
        content = path.read_bytes()
        keep = data.draw(st.integers(0, len(content)), "keep")
        whole = content[:keep].rfind(b"\n") + 1
        kept = content[:whole].count(b"\n")
        zeroed = data.draw(st.integers(0, keep - whole), "zeros from")
        end = keep - whole - data.draw(st.integers(0, keep - whole - zeroed), "zeros to")
        tail = content[whole : whole + zeroed] + b"\0" * (end - zeroed) + content[whole + end : keep]
        if kept == 0 and zeroed < 8 and tail[zeroed:].strip(b"\0"):
            return  # nothing whole, and its beginning lost: it can be anyone's file
        path.write_bytes(content[:whole] + tail)
        with Journal(path) as journal:
            assert journal.torn == (len(tail) > 0)
            assert journal.following == kept + 1
            assert path.read_bytes() == content[:whole]
            journal.append(line(kept + 1, caption="after"))
        lines = read(path)
        assert [entry["caption"] for entry in lines] == [*captions[:kept], "after"]
        assert [entry["sequence"] for entry in lines] == list(range(1, kept + 2))
    finally:
        shutil.rmtree(folder)


def test_zeros_in_the_last_line_with_its_newline_are_cut_off(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(line(1))
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 40 + b'rest"}\n')
    with Journal(path) as journal:
        assert (journal.torn, journal.count) == (True, 1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        *(b"\x89PNG\r\n\x1a\n", b"notes", b"notes\n", b"[1]\n", b'{"a": 1}\n', b"{}\n", b'{"time": 1}\nx', b"\n"),
        *(b"\x00\x01binary", b'{"time": 1}\n{"time"\n', b'{"time": 1}\n\0\n{"time": 2}\n'),
    ],
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
    with Journal(path, Retention(segment_bytes=60)) as journal:
        for n in (1, 2, 3):  # still the only one after a rotation
            journal.append(line(n, caption="x" * 30))
            with pytest.raises(UsageError, match="another process"):
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
        assert path.read_bytes() == whole
        monkeypatch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(EdgevlError, match="No space"):
            journal.append(line(2, caption="a long caption"))
        assert path.read_bytes() != whole  # it could not even be cut off
        monkeypatch.undo()
        assert journal.append(line(2)) == 2
    assert read(path) == [numbered(1), numbered(2)]


def test_rotated_by_size_and_kept_within_a_budget(path: Path) -> None:
    retention = Retention(segment_bytes=300, keep_bytes=1000)
    with Journal(path, retention) as journal:
        for n in range(1, 101):
            assert journal.append(line(n, caption="x" * 40), jpeg=b"j" * 60) == n
            assert journal.total_bytes <= 1000
        deleted = journal.deleted
    on_disk = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    assert 700 < on_disk <= 1000
    lines = read(path, retention)
    assert [entry["sequence"] for entry in lines] == list(range(deleted + 1, 101))
    for entry in lines:
        assert (path.parent / entry["jpeg"]).read_bytes() == b"j" * 60
    assert len([*path.parent.rglob("*.jpg")]) == len(lines)


def test_rotated_by_age_and_a_clock_set_back_does_no_harm(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("edgevl.journal.time.monotonic", lambda: now[0])
    retention = Retention(segment_seconds=60)
    path.write_bytes(encode({"time": "2999-01-01T00:00:00+00:00", "sequence": 7}))
    with Journal(path, retention) as journal:
        journal.append(line(8))
        assert len([*path.parent.iterdir()]) == 1
        now[0] += 61
        journal.append(line(9))
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.0000000007.jsonl", "out.jsonl"]
    path.write_bytes(encode({"time": "2000-01-01T00:00:00+00:00", "sequence": 9}))
    with Journal(path, retention) as journal:
        assert journal.append(line(10)) == 10
    assert (path.parent / "out.0000000009.jsonl").exists()


@settings(max_examples=60, deadline=None)
@given(stops=st.lists(st.integers(0, 12), max_size=4), jpeg=st.booleans())
def test_killed_between_any_two_steps_nothing_is_lost_or_doubled(stops: list[int], jpeg: bool) -> None:
    """Every call that changes the disk may be the last one of a process."""

    class Killed(BaseException):
        pass

    retention = Retention(segment_bytes=250)
    folder = Path(tempfile.mkdtemp())
    patch = pytest.MonkeyPatch()
    acknowledged: list[int] = []
    try:
        for stop in [*stops, 1000]:
            left = [stop]

            def killable(call: Any, left: list[int] = left) -> Any:
                def step(*arguments: Any, **named: Any) -> Any:
                    if left[0] == 0:
                        raise Killed
                    left[0] -= 1
                    return call(*arguments, **named)

                return step

            journal = None
            try:
                journal = Journal(folder / "out.jsonl", retention)
                with patch.context() as patched:
                    patched.setattr(os, "write", killable(os.write))
                    patched.setattr(os, "fsync", killable(os.fsync))
                    patched.setattr(Path, "rename", killable(Path.rename))
                    patched.setattr(Path, "replace", killable(Path.replace))
                    for _ in range(4):
                        n = journal.following
                        acknowledged.append(journal.append(line(n, caption="y" * 60), b"j" * 9 if jpeg else None))
            except Killed:
                pass
            finally:
                if journal is not None:
                    os.close(journal._file)
        lines: list[dict[str, Any]] = []
        with Journal(folder / "out.jsonl", retention, lines.append) as journal:
            numbers = [entry["sequence"] for entry in lines]
            assert numbers == list(range(1, len(numbers) + 1))
            assert set(acknowledged) <= set(numbers)
            assert len(set(acknowledged)) == len(acknowledged)
        frames = {str(f.relative_to(folder)) for f in folder.rglob("*.jpg")}
        assert frames == {entry["jpeg"] for entry in lines if "jpeg" in entry}
        assert not [*folder.rglob("*.part")]
    finally:
        patch.undo()
        shutil.rmtree(folder)


def test_the_floor_of_the_disk_drops_the_oldest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path, Retention(segment_bytes=50, floor_bytes=10_000)) as journal:
        for n in range(1, 6):
            journal.append(line(n, caption="x" * 60))
        assert journal.deleted == 0
        disk = os.statvfs_result((4096, 4096, 100, 1, 1, 10, 10, 10, 0, 255))  # one block of 4096 bytes is free
        monkeypatch.setattr(os, "fstatvfs", lambda _: disk)
        assert journal.append(line(6, caption="x" * 60)) == 6
        assert journal.deleted == 5
    with Journal(path) as journal:
        assert journal.following == 7
    # emptied, not removed, while nothing else tells the number of the last line
    assert [p.name for p in path.parent.iterdir() if p.stat().st_size] == ["out.jsonl"]


@pytest.mark.parametrize("step", ["edgevl.journal.sync_folder", "edgevl.journal.Journal._lock"])
def test_a_rotation_that_fails_after_the_new_file_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def failing(_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    retention = Retention(segment_bytes=100)
    with Journal(path, retention) as journal:
        for n in (1, 2):
            journal.append(line(n, caption="x" * 20))
        with monkeypatch.context() as patch:
            patch.setattr(step, failing)
            with pytest.raises(EdgevlError, match="Too many"):
                journal.append(line(3, caption="x" * 20))
        for n in range(3, 8):
            assert journal.append(line(n, caption="x" * 20)) == n
    assert read(path, retention) == [numbered(n, caption="x" * 20) for n in range(1, 8)]


def test_a_disk_without_room_for_another_file_drops_the_oldest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk with room, but no inode for a new file."""
    opened = os.open
    with Journal(path, Retention(segment_bytes=100)) as journal:
        for n in range(1, 11):
            journal.append(line(n, caption="x" * 20))
        before = len([*path.parent.iterdir()])

        def full(name: Any, *arguments: Any, **named: Any) -> int:
            if name == path and not path.exists() and len([*path.parent.iterdir()]) >= before:
                raise OSError(errno.ENOSPC, "No space left on device")
            return opened(name, *arguments, **named)

        monkeypatch.setattr("edgevl.journal.os.open", full)
        for n in range(11, 31):
            assert journal.append(line(n, caption="x" * 20)) == n
        assert journal.deleted > 0
        deleted = journal.deleted
    assert [entry["sequence"] for entry in read(path)] == list(range(deleted + 1, 31))


@pytest.mark.parametrize("step", [(Path, "rename"), (shutil, "rmtree"), (os, "truncate")])
def test_killed_while_the_only_file_is_emptied_no_number_comes_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with Journal(path) as journal:
        for n in (1, 2, 3):
            journal.append(line(n), b"j")
    path.rename(path.with_name("out.0000000001.jsonl"))
    segments = Segments(path)
    with monkeypatch.context() as patch:
        patch.setattr(*step, kill)
        with pytest.raises(Killed):
            segments.empty(3)
    with Journal(path) as journal:
        assert journal.following == 4


def test_a_number_that_json_has_no_word_for_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode(line(1, x=float("inf")))


def test_only_files_of_the_journal_count(path: Path) -> None:
    strange = [
        path.with_name(n) for n in ("out.1.jsonl", "out.0000000001.json", "other.0000000001.jsonl", "out.jsonl~")
    ]
    folder = path.with_name("out.frames") / "mine"
    folder.mkdir(parents=True)
    strange.append(folder / "0000000009.jpg")
    for file in strange:
        file.write_bytes(b"x" * 5000)
    with Journal(path, Retention(segment_bytes=100, keep_bytes=200)) as journal:
        for n in range(1, 20):
            journal.append(line(n, caption="x" * 50))
    assert all(file.stat().st_size == 5000 for file in strange)


def test_one_file_larger_than_all_is_refused() -> None:
    with pytest.raises(UsageError, match="rotate"):
        Retention(segment_bytes=10, keep_bytes=5)
