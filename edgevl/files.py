"""Files that appear whole or not at all, and their digests.

Everything edgevl writes goes through here: beside its target, to the disk, then renamed into place. Knows nothing of
what is in the files. Called by every stage that leaves something on disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgevl.errors import EdgevlError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 1 << 20


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` only when the block ends without an exception.

    Raises `EdgevlError` when the disk is full and `UsageError` when the folder cannot be written.
    """
    target = Path(path)
    with _plain_errors(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
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
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".staging", dir=final.parent))
        try:
            staging.chmod(0o777 & ~_umask())
            yield staging
            _sync_tree(staging)
            check_target(final, force)
            _swap(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(final.parent)


def check_target(target: Path, force: bool = False) -> None:
    """Raise `UsageError` if `staging_directory(target, force)` would refuse; for verbs that work long first."""
    if not os.path.lexists(target):
        return
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


@contextlib.contextmanager
def _plain_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EdgevlError(f"the disk is full while writing {target}; free some space or write elsewhere") from error
        ours = error.filename is None or str(error.filename).startswith(str(target.parent))
        if ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"{target} cannot be written ({error.strerror}); choose a folder that you own") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not target.parent.is_dir():
            raise UsageError(f"{target} cannot be written: {target.parent} is not an existing folder") from error
        raise


def _swap(staging: Path, final: Path) -> None:
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
