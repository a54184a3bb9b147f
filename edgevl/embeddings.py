"""Embeddings of pictures and videos by their content, so that a second question does not look again.

In memory the last ones within a budget; in a folder too, where the user asked for it, so that they outlive the process.
What lies there damaged or with other sizes is made again. Knows nothing of models. Called by the engine.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from edgevl.errors import EdgevlError, UsageError
from edgevl.runner import F32
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, write_safetensors

_MEMORY = 64 << 20  # bytes
_NAME = "embeddings"


class Embeddings:
    """Rows of `columns` values by key; the arrays are not to be changed."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._kept: OrderedDict[str, F32] = OrderedDict()
        self._folder: Path | None = None
        self._owner = ""
        self._trouble = ""  # why the last one could not be written, until it is told

    def keep_on_disk(self, folder: Path, owner: str) -> None:
        """Keep everything from now on in `folder` too; `owner` is the digest of the model that makes them.

        Raises `UsageError` when the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made ({error.strerror}); name another folder") from error
        self._folder, self._owner = folder, owner

    def get(self, key: str, count: int) -> F32 | None:
        """The rows (count, C) kept under `key`, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            rows = SafetensorsFile(path, UsageError).array(_NAME)
        except UsageError:
            return None
        if rows.dtype != np.float32 or rows.shape != (count, self._columns) or not np.isfinite(rows).all():
            return None
        return self._remember(key, rows)

    def keep(self, key: str, rows: F32) -> F32:
        """Remember rows (n, C) under `key`; gives them back. What cannot be written is told by `troubles`."""
        self._remember(key, rows)
        path = self._path(key)
        if path is not None:
            try:
                write_safetensors(path, [TensorSpec.of(_NAME, rows)], [(_NAME, rows)])
            except (EdgevlError, OSError) as error:
                self._trouble = f"embeddings are not kept: {error}"
        return rows

    def troubles(self) -> tuple[str, ...]:
        """What went wrong since the last call, one sentence at most."""
        told, self._trouble = self._trouble, ""
        return (told,) if told else ()

    def clear(self) -> None:
        """Forget what is in memory."""
        self._kept.clear()

    def _remember(self, key: str, rows: F32) -> F32:
        self._kept[key] = rows
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _MEMORY:
            self._kept.popitem(last=False)
        return rows

    def _path(self, key: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{hashlib.sha256(f'{self._owner} {key}'.encode()).hexdigest()}.safetensors"
