"""Where the hidden states of all calibration tokens are: in memory, or in a mapped file when they are many.

Every block reads and replaces all of them, in order, so a file costs one pass over the disk a block. Called by
`quantize.job`.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import numpy as np
import torch

from edgevl.errors import EdgevlError

FILE = "activations.tmp"


class Activations:
    """`paths` (P, B, S, C) f32 on the CPU, in memory if it takes at most `limit` bytes, else in `folder`.

    The first of the P paths is that of the quantized blocks, the second, if there is one, that of the float blocks.
    """

    def __init__(self, shape: tuple[int, int, int, int], limit: int, folder: Path) -> None:
        """Raises `EdgevlError` when the disk cannot hold them."""
        size = math.prod(shape) * 4
        self._map: mmap.mmap | None = None
        if size <= limit:
            self.paths = torch.empty(shape)
            return
        path = folder / FILE
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            # every byte now: a full disk met later, through the map, would end the process
            os.posix_fallocate(handle, 0, size)
            self._map = mmap.mmap(handle, size)
        except OSError as problem:
            raise EdgevlError(
                f"{path} cannot take the {size / 1e9:.1f} GB of the calibration activations ({problem.strerror}); "
                "free some space, write elsewhere, or lower --samples"
            ) from problem
        finally:
            os.close(handle)
        self.paths = torch.from_numpy(np.frombuffer(self._map, np.float32).reshape(shape))

    @property
    def hidden(self) -> torch.Tensor:
        """(B, S, C): what enters the quantized block in hand."""
        return self.paths[0]

    @property
    def on_disk(self) -> bool:
        return self._map is not None

    def release(self) -> None:
        """Give back the memory of the mapped pages; the file keeps what was written."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
