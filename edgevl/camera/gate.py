"""Whether a scene has changed since it was captioned: brightness of 9 x 16 blocks against a threshold.

Called by `edgevl.camera.appliance` and `edgevl.camera.files` before the model is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevl.camera.reader import converted

if TYPE_CHECKING:
    from av import VideoFrame

_ROWS, _COLUMNS, _CELL = 9, 16, 4  # blocks, and pixels of a block's side after shrinking
Signature = NDArray[np.float32]  # (9, 16) mean brightness, 0 to 100


class ChangeGate:
    """Compares with the frame of the last caption, not with the last frame, so that slow changes add up."""

    def __init__(self, threshold: float) -> None:
        """`threshold` in percent of full brightness, 0 to 100; 0 lets every frame through."""
        self._threshold = threshold
        self._captioned: Signature | None = None

    def change(self, seen: Signature) -> float:
        """The largest change of any block, in percent; 100 when nothing was captioned yet."""
        if self._captioned is None:
            return 100.0
        return float(np.abs(seen - self._captioned).max())

    def opens(self, change: float) -> bool:
        """Whether a change of that size is worth a caption."""
        return self._captioned is None or change >= self._threshold

    def captioned(self, seen: Signature) -> None:
        """The frame with this signature was captioned."""
        self._captioned = seen


def signature(frame: VideoFrame) -> Signature:
    """Mean brightness of the frame's blocks in percent, whatever its size. Raises as `converted` does."""
    small = converted(frame, width=_COLUMNS * _CELL, height=_ROWS * _CELL, format="gray", interpolation="AREA")
    blocks = small.to_ndarray().reshape(_ROWS, _CELL, _COLUMNS, _CELL)
    means: Signature = blocks.mean(axis=(1, 3), dtype=np.float32) * np.float32(100 / 255)
    return means
