"""AutoAWQ's GEMM layout of a 4-bit Linear, to the bit, in numpy.

For a Linear with K in-features, N out-features and groups of Q in-features:

    qweight   int32 (K, N/8)     word c of row k packs the codes of out-features 8c..8c+7 for in-feature k
    qzeros    int32 (K/Q, N/8)   the zero codes, packed the same way, with no offset added
    scales    f16   (K/Q, N)

    w[n, k] = (code[k, n] - zero[k // Q, n]) * scale[k // Q, n]

Bits 4i..4i+3 of a word hold out-feature 8c + ORDER[i], ORDER = 0, 2, 4, 6, 1, 3, 5, 7: codes 0..7 of eight neighbouring
out-features make the word 0x75316420. Reading the nibbles in their natural order permutes out-features within each
eight, which leaves a model that runs and says nonsense. A symmetric weight has every zero 8, so that every word of
qzeros is 0x88888888.

Source: AutoAWQ 0.2.9 (the tests compare with its own unpacking). The checkpoint reader unpacks, the quantizer packs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import CheckpointError
from edgevl.weights import Int4Weight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # out-feature (within its eight) held by nibble i
FIELDS = ("qweight", "qzeros", "scales")


def pack(weight: Int4Weight) -> dict[str, NDArray[Any]]:
    """qweight, qzeros and scales of a weight (N, K); exact. ValueError when N is not a multiple of 8."""
    n, _ = weight.shape
    if n % 8:
        raise ValueError(f"{n} out-features cannot be packed: AutoAWQ's GEMM layout needs a multiple of 8")
    return {
        "qweight": _pack_columns(weight.codes.T),
        "qzeros": _pack_columns(weight.zeros.T),
        "scales": np.ascontiguousarray(weight.scales.T, np.float16),
    }


def unpack(tensors: Mapping[str, NDArray[Any]], module: str, group_size: int) -> Int4Weight:
    """The weight that a module's qweight, qzeros and scales hold; exact.

    Raises `CheckpointError` naming the tensor of `module` whose dtype or shape does not fit the others or `group_size`.
    """
    check(module, {f: (tensors[f].dtype.name, tuple(tensors[f].shape)) for f in FIELDS if f in tensors}, group_size)
    return Int4Weight(
        codes=np.ascontiguousarray(_unpack_columns(tensors["qweight"]).T),
        scales=np.ascontiguousarray(tensors["scales"].T),
        zeros=np.ascontiguousarray(_unpack_columns(tensors["qzeros"]).T),
    )


def check(module: str, found: Mapping[str, tuple[str, tuple[int, ...]]], group_size: int) -> tuple[int, int]:
    """(N, K) of a module, from the (dtype, shape) of its tensors alone; `CheckpointError` if they do not agree."""
    missing = [f for f in FIELDS if f not in found]
    if missing:
        raise CheckpointError(f"{module}.{missing[0]} is missing; an AWQ Linear needs {', '.join(FIELDS)}")
    for field, dtype in zip(FIELDS, ("int32", "int32", "float16"), strict=True):
        if found[field][0] != dtype or len(found[field][1]) != 2:
            kind, shape = found[field]
            raise CheckpointError(f"{module}.{field} is {kind} {shape}; AutoAWQ's GEMM layout has a {dtype} matrix")
    k, words = found["qweight"][1]
    n = 8 * words
    if group_size <= 0 or k % group_size:
        raise CheckpointError(f"{module} has {k} in-features, which groups of {group_size} do not divide")
    expected = {"qzeros": (k // group_size, words), "scales": (k // group_size, n)}
    for field, shape in expected.items():
        if found[field][1] != shape:
            raise CheckpointError(
                f"{module}.{field} has the shape {found[field][1]}; qweight {(k, words)} in groups of {group_size} "
                f"needs {shape}"
            )
    return n, k


def _pack_columns(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(R, N) codes 0..15 -> (R, N/8) words."""
    rows, n = codes.shape
    eights = codes.reshape(rows, n // 8, 8)
    words = np.zeros((rows, n // 8), np.uint32)
    for i, j in enumerate(ORDER):
        words |= (eights[:, :, j].astype(np.uint32) & 15) << (4 * i)
    return words.view(np.int32)


def _unpack_columns(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """(R, N/8) words -> (R, N) codes 0..15."""
    bits = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((*bits.shape, 8), np.uint8)
    for i, j in enumerate(ORDER):
        codes[:, :, j] = (bits >> (4 * i)) & 15
    return codes.reshape(bits.shape[0], -1)
