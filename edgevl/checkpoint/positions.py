"""The vision tower's position table, resized once from its stored grid to the tile's own.

Bilinear in f32 without antialiasing, over the whole table, never a crop: reading only the corner is the mistake that
leaves a tower which sees badly. Source: RADIO's position rule, in ARCHITECTURE.md under "The model". Pure numpy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def resize_positions(table: NDArray[Any], grid: int, align_corners: bool) -> NDArray[np.float32]:
    """(1, G², C) or (G², C), row-major -> (grid², C) f32.

    align_corners True samples output i at i·(G-1)/(grid-1); False at (i + ½)·G/grid - ½, clamped at the edges, which
    for a grid a quarter of the table's is the mean of rows 4i+1, 4i+2 and columns 4j+1, 4j+2.
    """
    flat = table.reshape(-1, table.shape[-1])
    side = math.isqrt(flat.shape[0])
    low, high, weight = _samples(side, grid, align_corners)
    square = flat.reshape(side, side, -1)
    down, right = weight[:, None, None], weight[None, :, None]
    rows = square[low].astype(np.float32) * (1 - down) + square[high].astype(np.float32) * down  # (grid, G, C)
    out = rows[:, low] * (1 - right) + rows[:, high] * right  # (grid, grid, C)
    return np.asarray(out, np.float32).reshape(grid * grid, -1)


def _samples(
    side: int, grid: int, align_corners: bool
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    i = np.arange(grid, dtype=np.float64)
    source = i * ((side - 1) / max(grid - 1, 1)) if align_corners else np.maximum((i + 0.5) * (side / grid) - 0.5, 0)
    low = np.minimum(np.floor(source).astype(np.intp), side - 1)
    return low, np.minimum(low + 1, side - 1), (source - low).astype(np.float32)
