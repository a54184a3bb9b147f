"""Kernel layouts: how a bundle stores a weight for the backend that will read it, to the bit.

The one layout so far is "rows", read by the CPU kernels (see FORMAT.md for the same in words):

    f32, f16   values   (N, K)
    int8       codes    (N, K) int8; scales (N,) f32
    int4       codes    (N, K/2) uint8, in-feature 2j in the low nibble of byte j and 2j+1 in the high one;
               scales   (N, K/Q) f16; zeros (N, K/Q) uint8

Pure numpy; `deploy` packs, the tests unpack, the runtime maps the arrays as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.weights import FloatWeight, Int4Weight, Int8Weight, Weight

Array = NDArray[Any]

FIELDS = {"f32": ("values",), "f16": ("values",), "int8": ("codes", "scales"), "int4": ("codes", "scales", "zeros")}


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it lies in the bundle: `kind` one of FIELDS, logical `shape`, arrays by field name, f32 bias."""

    kind: str
    shape: tuple[int, ...]
    arrays: Mapping[str, Array]
    bias: NDArray[np.float32] | None = None

    @property
    def group_size(self) -> int:
        """Q of an int4 weight; 0 for the other kinds."""
        return self.shape[1] // int(self.arrays["scales"].shape[1]) if self.kind == "int4" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, bias included."""
        return sum(int(a.nbytes) for a in self.arrays.values()) + (self.bias.nbytes if self.bias is not None else 0)


def pack(weight: Weight, bias: NDArray[np.float32] | None = None) -> StoredWeight:
    """Lay a logical weight out in rows."""
    if isinstance(weight, FloatWeight):
        half = weight.values.dtype == np.float16
        values = np.ascontiguousarray(weight.values, dtype=np.float16 if half else np.float32)
        return StoredWeight("f16" if half else "f32", weight.shape, {"values": values}, bias)
    if isinstance(weight, Int8Weight):
        return StoredWeight("int8", weight.shape, {"codes": weight.codes, "scales": weight.scales}, bias)
    codes = weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4)
    arrays: dict[str, Array] = {"codes": codes, "scales": weight.scales, "zeros": weight.zeros}
    return StoredWeight("int4", weight.shape, arrays, bias)


def unpack(stored: StoredWeight) -> Weight:
    """The logical weight back, exactly."""
    if stored.kind in ("f32", "f16"):
        return FloatWeight(stored.arrays["values"])
    if stored.kind == "int8":
        return Int8Weight(stored.arrays["codes"], stored.arrays["scales"])
    packed = stored.arrays["codes"]
    codes = np.empty(stored.shape, np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return Int4Weight(codes, stored.arrays["scales"], stored.arrays["zeros"])
