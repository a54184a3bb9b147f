"""Files that appear whole or not at all, and their digests.

Everything edgevl writes goes through here: beside its target, to the disk, then renamed into place. What a killed
process left beside the same target is swept away by the next one that writes there: while a process lives, it holds a
lock on what it writes. Knows nothing of what is in the files. Called by every stage that leaves something on disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgevl.errors import EdgevlError, UsageError

try:
    import fcntl
except ImportError:  # no such locks on this system: nothing is swept
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 1 << 20
_FRESH = 600.0  # seconds in which an unfinished file may belong to a process that has not locked it yet
_MADE = re.compile(r"[a-z0-9_]{8}")  # what tempfile puts into a name


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` only when the block ends without an exception.

    Raises `EdgevlError` when the disk is full and `UsageError` when the folder cannot be written.
    """
    target = Path(path)
    with _plain_errors(target):
        _sweep(target, ".part", _FRESH)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        _lock(handle)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o666 & ~_umask())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


@contextlib.contextmanager
def staging_directory(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `target` that becomes `target` when the block ends without an exception.

    An existing empty folder is taken over; anything else is refused with `UsageError` unless `force`, which replaces it
    after the new one is complete. On an exception the staging folder is removed and `target` stays as it was.
    """
    final = Path(target).absolute()
    check_target(final, force)
    with _plain_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _folder_locked(final.parent):
            _sweep_all(final)
            staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".staging", dir=final.parent))
            handle = os.open(staging, os.O_RDONLY)
            _lock(handle)
        try:
            staging.chmod(0o777 & ~_umask())
            yield staging
            _sync_tree(staging)
            check_target(final, force)
            _swap(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(handle)
        sync_folder(final.parent)


def sweep(target: str | Path) -> None:
    """Remove what killed processes left beside `target`: staging folders, unfinished files, replaced folders.

    A folder whose replacement was never completed is put back. What a living process writes is left alone.
    """
    final = Path(target).absolute()
    with _folder_locked(final.parent):
        _sweep_all(final)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; `UsageError` where that cannot be, `EdgevlError` when the disk is full."""
    with _plain_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"{folder} cannot be made: a file stands where a folder must be") from error


def remove_folder(folder: Path, target: Path) -> None:
    """Remove a folder that belongs to `target`, at once for all who look; a killed removal is swept later."""
    gone = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".staging", dir=folder.parent))
    folder.rename(gone)
    shutil.rmtree(gone)


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from working in `folder` at the same time; `UsageError` when one already does."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _lock(handle) is False:
            raise UsageError(f"another process is working in {folder}; wait for it, or stop it first")
        yield
    finally:
        os.close(handle)


def check_target(target: Path, force: bool = False, source: Path | None = None) -> None:
    """Raise `UsageError` if `staging_directory(target, force)` would refuse; for verbs that work long first.

    `source` is read meanwhile, and so cannot be replaced.
    """
    if not os.path.lexists(target):
        return
    if source is not None and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"{target} holds {source}, which is read; write elsewhere")
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if not force:
        raise UsageError(f"{target} already exists; choose another name, or pass --force to replace it")
    if not target.is_dir() or target.is_symlink():
        raise UsageError(f"{target} is not a folder, so --force will not replace it; choose another name")
    resolved = target.resolve()
    if any(here == resolved or resolved in here.parents for here in (Path.cwd(), Path.home().resolve())):
        raise UsageError(f"{target} holds the current or the home folder, so --force will not replace it")


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file in hex, read block by block."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sweep_all(final: Path) -> None:
    for old in _leftovers(final, ".old"):
        if (old / "replaced").is_dir() and not os.path.lexists(final):
            (old / "replaced").rename(final)
        shutil.rmtree(old, ignore_errors=True)
    _sweep(final, ".staging")
    _sweep(final, ".part", _FRESH)


def _sweep(target: Path, suffix: str, older_than: float = 0.0) -> None:
    for path in _leftovers(target, suffix):
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            elif time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def _leftovers(target: Path, suffix: str) -> list[Path]:
    """Our own files beside `target` that no living process holds."""
    found: list[Path] = []
    start = f".{target.name}."
    with contextlib.suppress(OSError):
        for path in sorted(target.parent.iterdir()):
            middle = path.name.removeprefix(start).removesuffix(suffix)
            if path.name != f"{start}{middle}{suffix}" or not _MADE.fullmatch(middle) or path.is_symlink():
                continue
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                if _lock(handle):
                    found.append(path)
                os.close(handle)
    return found


def _lock(handle: int) -> bool | None:
    """Hold an open file or folder until it is closed or the process dies; False when another holds it, None unknown."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Between making something in the folder and locking it, nobody sweeps there; waits a second at most."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # what is done in it says why
        yield
        return
    try:
        for _ in range(100):
            if _lock(handle) is not False:
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _plain_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EdgevlError(f"the disk is full while writing {target}; free some space or write elsewhere") from error
        if error.errno == errno.EFBIG:
            raise EdgevlError(
                f"{target} grew beyond what the file system or the limit on file sizes allows (`ulimit -f` shows it); "
                "raise it or write elsewhere"
            ) from error
        ours = error.filename is None or str(error.filename).startswith(str(target.parent))
        if ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"{target} cannot be written ({error.strerror}); choose a folder that you own") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not target.parent.is_dir():
            raise UsageError(f"{target} cannot be written: {target.parent} is not an existing folder") from error
        raise


def _swap(staging: Path, final: Path) -> None:
    with _folder_locked(final.parent):
        _swap_locked(staging, final)


def _swap_locked(staging: Path, final: Path) -> None:
    if not final.exists():
        staging.rename(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
    final.rename(old / "replaced")
    try:
        staging.rename(final)
    except BaseException:
        (old / "replaced").rename(final)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for where, _, names in os.walk(folder):
        for name in names:
            with (Path(where) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(where))


def sync_folder(folder: Path) -> None:
    """Wait until names that were made or changed in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
