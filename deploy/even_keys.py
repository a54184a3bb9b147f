"""Keys of even size for an int8 KV cache, at no cost: rows of the key projection are scaled down, and the query's up.

An int8 cache has one scale for all numbers of a head, so a few large ones cost the others their precision. Numbers d
and d + D/2 of a head are turned together by their position, so both may be divided by one factor if the queries that
meet them are multiplied by it: scores stay the same. Factors are powers of two and change no bit of a float or of an
int4 code. How large a number gets is taken from the weights alone. Called by `deploy.build`. Source: the smoothed
attention of Lin et al. 2024, arXiv 2405.04532.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TextConfig
from edgevl.weights import F32, FloatWeight, Int4Weight, Int8Weight, Weight, dequantize

_MOST = 4.0  # factors are 2^-4 to 2^4: f16 scales beyond would lose bits


def even_keys(weight: Weight, bias: F32 | None, norm: F32, config: TextConfig) -> tuple[Weight, F32 | None]:
    """`weight` ((H+2G)·D, C) and `bias` ((H+2G)·D,) of a qkv projection with scaled rows; `norm` (C,) is before it."""
    size = _key_sizes(dequantize(weight) * norm, bias, config)  # (G, D/2)
    middle = np.median(size, axis=1, keepdims=True)
    ratio = np.divide(size, middle, out=np.ones_like(size), where=(size > 0) & (middle > 0))
    factors = np.exp2(np.clip(np.rint(np.log2(ratio)), -_MOST, _MOST))
    keys = np.tile(factors, (1, 2))  # (G, D)
    queries = np.repeat(keys, config.heads // config.kv_heads, axis=0)  # (H, D)
    rows = np.concatenate([queries.ravel(), 1 / keys.ravel(), np.ones(keys.size)]).astype(np.float32)
    return _scaled(weight, rows), None if bias is None else bias * rows


def _key_sizes(full: F32, bias: F32 | None, config: TextConfig) -> NDArray[np.float64]:
    """How large each pair of numbers of a key gets, about, (G, D/2): for inputs of even variance."""
    start, count = config.heads * config.head_dim, config.kv_heads * config.head_dim
    squares = np.square(full[start : start + count].astype(np.float64)).sum(axis=1)
    if bias is not None:
        squares += np.square(bias[start : start + count].astype(np.float64))
    result: NDArray[np.float64] = np.sqrt(squares.reshape(config.kv_heads, 2, -1).sum(axis=1))
    return result


def _scaled(weight: Weight, rows: F32) -> Weight:
    if isinstance(weight, FloatWeight):
        values = weight.values.astype(np.float32) * rows[:, None]
        return FloatWeight(values.astype(weight.values.dtype))
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.codes, weight.scales * rows)
    scales = (weight.scales.astype(np.float32) * rows[:, None]).astype(np.float16)
    return Int4Weight(weight.codes, scales, weight.zeros)
