"""Kernel layouts: how a bundle stores a weight for the backend that will read it, to the bit.

Two layouts (FORMAT.md has the same in words): "panels" is read by the CPU kernels, "tiles" by the GPU kernels.

    f32, f16   values   (N, K), in both
    int8, int4 in panels of R = 16 out-features, the last one filled up with zeros:
      int8     scales   (N/R, R) f32, in both; in-features are filled up with zeros to K', whole groups of 64
               codes    panels: (N/R, K'/4, R, 4) int8, in-feature 4i+j at [.., i, :, j]
                        tiles:  (N/R, K'/64, R, 64) int8, in-feature 64i+j at [.., i, :, j]
      int4     codes    panels: (N/R, K/8, R, 4) uint8, in-feature 8i+j in the low nibble and 8i+4+j in the high one
                        tiles:  (N/R, K/Q, R, Q/2) uint8, in-feature Qi+j in the low nibble and Qi+Q/2+j in the high one
               scales   panels: (N/R, K/Q, R) f16, and zeros (N/R, K/Q, R) uint8
                        tiles:  (N/R, K/Q, R, 2) f16, the scale and then the zero: 4 bytes, the least a GPU copies ahead

A tile (R out-features by one group) is contiguous, so a warp that reads 16 bytes a thread reads whole cache lines.
Pure numpy; `deploy` packs, the tests unpack, the runtime maps the arrays as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.weights import INT8_GROUP, FloatWeight, Int4Weight, Int8Weight, Weight

Array = NDArray[Any]

PANEL = 16  # out-features that lie together in an int8 or int4 weight
LAYOUTS = ("panels", "tiles")
FIELDS = {"f32": ("values",), "f16": ("values",), "int8": ("codes", "scales"), "int4": ("codes", "scales", "zeros")}


def fields(kind: str, layout: str) -> tuple[str, ...]:
    """The arrays of a kind; nothing for a kind that does not exist."""
    return ("codes", "scales") if (kind, layout) == ("int4", "tiles") else FIELDS.get(kind, ())


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it lies in the bundle: `kind` one of FIELDS, logical `shape`, arrays by field name, f32 bias."""

    kind: str
    shape: tuple[int, ...]
    arrays: Mapping[str, Array]
    bias: NDArray[np.float32] | None = None

    @property
    def group_size(self) -> int:
        """Activations that are rounded by one scale: Q of an int4 weight, `INT8_GROUP`, 0 for f32 and f16."""
        if self.kind == "int8":
            return INT8_GROUP
        return self.shape[1] // int(self.arrays["scales"].shape[1]) if self.kind == "int4" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, bias included."""
        return sum(int(a.nbytes) for a in self.arrays.values()) + (self.bias.nbytes if self.bias is not None else 0)


def pack(weight: Weight, bias: NDArray[np.float32] | None = None, layout: str = "panels") -> StoredWeight:
    """Lay a logical weight out in rows, for `layout`, one of LAYOUTS."""
    if isinstance(weight, FloatWeight):
        half = weight.values.dtype == np.float16
        values = np.ascontiguousarray(weight.values, dtype=np.float16 if half else np.float32)
        return StoredWeight("f16" if half else "f32", weight.shape, {"values": values}, bias)
    n, k = weight.shape
    padded = -n % PANEL
    if isinstance(weight, Int8Weight):
        wide = INT8_GROUP if layout == "tiles" else 4
        full = np.pad(weight.codes, ((0, padded), (0, -k % INT8_GROUP)))
        panels = np.ascontiguousarray(full.reshape(-1, PANEL, full.shape[1] // wide, wide).transpose(0, 2, 1, 3))
        scales = np.pad(weight.scales, (0, padded)).reshape(-1, PANEL)
        return StoredWeight("int8", weight.shape, {"codes": panels, "scales": scales}, bias)
    half_span = weight.group_size // 2 if layout == "tiles" else 4  # in-features between the nibbles of a byte
    codes = np.pad(weight.codes, ((0, padded), (0, 0))).reshape(-1, PANEL, k // (2 * half_span), 2, half_span)
    codes = codes.transpose(0, 2, 1, 3, 4)
    arrays: dict[str, Array] = {"codes": np.ascontiguousarray(codes[:, :, :, 0] | (codes[:, :, :, 1] << 4))}
    grids: tuple[tuple[str, Array], ...] = (("scales", weight.scales), ("zeros", weight.zeros))
    for name, values in grids:
        grid = np.pad(values, ((0, padded), (0, 0))).reshape(-1, PANEL, values.shape[1])
        arrays[name] = np.ascontiguousarray(grid.transpose(0, 2, 1))
    if layout == "tiles":
        arrays["scales"] = np.stack([arrays["scales"], arrays.pop("zeros").astype(np.float16)], axis=-1)
    return StoredWeight("int4", weight.shape, arrays, bias)


def unpack(stored: StoredWeight) -> Weight:
    """The logical weight back, exactly; the arrays' shapes tell the layout."""
    if stored.kind in ("f32", "f16"):
        return FloatWeight(stored.arrays["values"])
    if stored.kind == "int8":
        (n, k), panels = stored.shape, stored.arrays["codes"]
        full = panels.transpose(0, 2, 1, 3).reshape(-1, panels.shape[1] * panels.shape[3])
        return Int8Weight(np.ascontiguousarray(full[:n, :k]), stored.arrays["scales"].reshape(-1)[:n].copy())
    (n, k), packed = stored.shape, stored.arrays["codes"]
    pairs = np.stack([packed & 15, packed >> 4], axis=3)  # (N/R, i, R, 2, j)
    codes = pairs.transpose(0, 2, 1, 3, 4).reshape(-1, k)[:n]
    grids: dict[str, Array] = dict(stored.arrays)
    if "zeros" not in grids:
        grids |= {"scales": grids["scales"][..., 0], "zeros": grids["scales"][..., 1].astype(np.uint8)}
    rows = {f: grids[f].transpose(0, 2, 1).reshape(-1, k // stored.group_size)[:n] for f in ("scales", "zeros")}
    return Int4Weight(*map(np.ascontiguousarray, (codes, rows["scales"], rows["zeros"])))


def int8_shapes(n: int, k: int, layout: str = "panels") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each array of an int8 weight (N, K)."""
    panels, deep = -(-n // PANEL), -(-k // INT8_GROUP) * INT8_GROUP
    wide = INT8_GROUP if layout == "tiles" else 4
    return {"codes": ("I8", (panels, deep // wide, PANEL, wide)), "scales": ("F32", (panels, PANEL))}


def int4_shapes(n: int, k: int, group_size: int, layout: str = "panels") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each array of an int4 weight (N, K)."""
    panels, wide = -(-n // PANEL), group_size // 2 if layout == "tiles" else 4
    grid = (panels, k // group_size, PANEL)
    codes = ("U8", (panels, k // (2 * wide), PANEL, wide))
    if layout == "tiles":
        return {"codes": codes, "scales": ("F16", (*grid, 2))}
    return {"codes": codes, "scales": ("F16", grid), "zeros": ("U8", grid)}


def relaid(stored: StoredWeight, layout: str) -> StoredWeight:
    """The same weight in another layout, copied; one that lies the same in both is returned as it is."""
    return stored if stored.kind in ("f32", "f16") else pack(unpack(stored), stored.bias, layout)
