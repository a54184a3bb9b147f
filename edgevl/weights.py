"""The kinds of weight a linear layer can have, as plain numpy arrays in their logical order.

This is what the reference computes with and what packing formats are tested against. Kernel layouts are in
`edgevl.layouts`; the AutoAWQ file format is in `edgevl.awq_format`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class FloatWeight:
    """f32 or f16 values, (N, K). Embedding tables and norms are float weights too ((V, C) and (C,))."""

    values: NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


INT8_GROUP = 64  # activations that are rounded to int8 by one scale in front of an int8 weight


@dataclass(frozen=True)
class Int8Weight:
    """w[n, k] = codes[n, k] * scales[n]."""

    codes: NDArray[np.int8]  # (N, K), -127..127
    scales: F32  # (N,)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)


@dataclass(frozen=True)
class Int4Weight:
    """w[n, k] = (codes[n, k] - zeros[n, k // Q]) * scales[n, k // Q]."""

    codes: NDArray[np.uint8]  # (N, K), 0..15, one code a byte
    scales: NDArray[np.float16]  # (N, K/Q)
    zeros: NDArray[np.uint8]  # (N, K/Q), 0..15; all 8 when symmetric

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def group_size(self) -> int:
        """Q: in-features that share a scale and a zero."""
        return int(self.codes.shape[1] // self.scales.shape[1])


Weight = FloatWeight | Int8Weight | Int4Weight


def dequantize(weight: Weight) -> F32:
    """The f32 values (N, K) that a weight stands for."""
    if isinstance(weight, FloatWeight):
        return weight.values.astype(np.float32)
    if isinstance(weight, Int8Weight):
        return weight.codes.astype(np.float32) * weight.scales[:, None]
    q = weight.group_size
    zeros = np.repeat(weight.zeros, q, axis=1).astype(np.float32)
    scales = np.repeat(weight.scales.astype(np.float32), q, axis=1)
    values: F32 = (weight.codes.astype(np.float32) - zeros) * scales
    return values


def quantize_int8(values: NDArray[np.floating]) -> Int8Weight:
    """Round (N, K) values to int8 with one scale a row: scale = max|w| / 127, a zero row keeps scale 1."""
    full = np.asarray(values, dtype=np.float32)
    scales = np.abs(full).max(axis=1) / 127.0
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
    codes = np.clip(np.rint(full / scales[:, None]), -127, 127).astype(np.int8)
    return Int8Weight(codes, scales)


def quantize_int4(values: NDArray[np.floating], group_size: int, symmetric: bool = False) -> Int4Weight:
    """Round to nearest (N, K) values to int4 in groups of `group_size` along K, without any calibration.

    Asymmetric: scale = (max - min) / 15 with 0 inside the range, zero = round(-min / scale).
    Symmetric: scale = the larger of max / 7 and -min / 8, zero 8. Codes are chosen for the scale as rounded to f16.
    """
    full = np.asarray(values, dtype=np.float32)
    n, k = full.shape
    groups = full.reshape(n, k // group_size, group_size)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    scales = np.maximum(high / 7.0, -low / 8.0) if symmetric else (high - low) / 15.0
    scales16 = np.where(scales > 0, scales, 1.0).astype(np.float16)
    tiny = np.float16(6e-8)
    scales16 = np.maximum(scales16, tiny)
    wide = scales16.astype(np.float32)
    zeros = np.full(wide.shape, 8.0, np.float32) if symmetric else np.clip(np.rint(-low / wide), 0, 15)
    codes = np.clip(np.rint(groups / wide[:, :, None]) + zeros[:, :, None], 0, 15)
    return Int4Weight(codes.reshape(n, k).astype(np.uint8), scales16, zeros.astype(np.uint8))
