"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgevl.errors import EdgevlError, UsageError
from edgevl.files import atomic_file, held_folder, sha256_file, staging_directory, sweep


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic_file(target) as file:
        file.write(b"half")
        assert not target.exists()
        file.write(b"whole")
    assert target.read_bytes() == b"halfwhole"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_file(target) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EdgevlError, match="the disk is full while writing"), atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EdgevlError, match="the disk is full"), staging_directory(tmp_path / "d"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an existing folder"), atomic_file(tmp_path / "no" / "a"):
        pass


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    with staging_directory(target) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> None:
        with staging_directory(tmp_path / "b") as stage:
            (stage / "a").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "b"
    target.mkdir()
    with staging_directory(target) as stage:  # empty: taken over
        (stage / "a").write_text("1")
    with (
        pytest.raises(UsageError, match="already exists; choose another name, or pass --force"),
        staging_directory(target),
    ):
        pass
    with pytest.raises(ZeroDivisionError), staging_directory(target, force=True):
        raise ZeroDivisionError
    assert (target / "a").read_text() == "1"
    with staging_directory(target, force=True) as stage:
        (stage / "c").write_text("2")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_force_never_replaces_a_file_or_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(UsageError, match="is not a folder"), staging_directory(tmp_path / "f", force=True):
        pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the current or the home folder"), staging_directory(tmp_path, force=True):
        pass


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


KILLED = """
import os, signal, sys
from pathlib import Path
from edgevl.files import atomic_file, staging_directory
target = Path(sys.argv[1])
if sys.argv[2] == "folder":
    with staging_directory(target) as stage:
        with atomic_file(stage / "a") as file:
            file.write(b"1")
            os.kill(os.getpid(), signal.SIGKILL)
with atomic_file(target) as file:
    file.write(b"1")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_a_killed_process_left_is_swept(tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), what], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    with staging_directory(tmp_path / "other"):  # not its business
        pass
    assert left.exists()
    if what == "folder":
        with staging_directory(target) as stage:
            (stage / "a").write_text("2")
            sweep(target)  # what is being written stays
            assert stage.is_dir()
    else:
        os.utime(left, (0, 0))
        with atomic_file(target):
            pass
    assert not left.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_replacement_that_was_never_completed_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / ".out.abcd1234.old"
    (old / "replaced").mkdir(parents=True)
    (old / "replaced" / "a").write_text("1")
    sweep(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "1" and not old.exists()


def test_a_folder_is_worked_in_by_one_process(tmp_path: Path) -> None:
    with held_folder(tmp_path):
        with pytest.raises(UsageError, match="another process is working in"), held_folder(tmp_path):
            pass
        with atomic_file(tmp_path / "a"):
            pass
    with held_folder(tmp_path):
        pass
