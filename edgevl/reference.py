"""The numpy twin of every op: this is the definition, written for reading and not for speed.

Each function takes and returns plain arrays (f32 unless said). `ReferenceOps` wraps them into `Ops`, eager,
with weights by name and a KV cache in f32, or rounded to f16 or int8. `edgevl.backends.reference` runs whole models
with it; the op tests hold every other implementation against these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TextConfig
from edgevl.ops import Linear, Norm, Step
from edgevl.rope import inverse_frequencies
from edgevl.weights import INT8_GROUP, FloatWeight, Int4Weight, Weight, dequantize

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Array = NDArray[Any]

_erf = np.vectorize(math.erf, otypes=[np.float32])


def as_f32(values: Array) -> F32:
    """The same values in f32."""
    result: F32 = values.astype(np.float32)
    return result


def embed(tokens: I32, table: Array, images: F32 | None) -> F32:
    """(T,), (V, C), (rows, C) -> (T, C). Ids below zero pick image row -1-id."""
    out = np.empty((tokens.size, table.shape[1]), np.float32)
    for t, token in enumerate(tokens.reshape(-1).tolist()):
        if token >= 0:
            out[t] = table[token]
        else:
            assert images is not None
            out[t] = images[-1 - token]
    return out


def rms_norm(x: F32, weight: Array, eps: float) -> F32:
    """(rows, C): x / sqrt(mean(x²) + eps) · weight."""
    scale = 1.0 / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + eps)
    return as_f32(x * scale * weight.astype(np.float32))


def layer_norm(x: F32, weight: Array, bias: Array, eps: float) -> F32:
    """(rows, C): (x - mean) / sqrt(var + eps) · weight + bias."""
    centred = x - x.mean(axis=1, keepdims=True)
    scale = 1.0 / np.sqrt(np.mean(np.square(centred), axis=1, keepdims=True) + eps)
    return as_f32(centred * scale * weight.astype(np.float32) + bias.astype(np.float32))


def gelu(x: F32) -> F32:
    """x · Φ(x), with the exact error function."""
    return as_f32(0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))))


def in_int8(x: F32, group_size: int) -> F32:
    """(rows, K) -> the same in steps of each group's largest |value| / 127, to the nearest, halves to even."""
    rows, k = x.shape
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, -k % group_size)))
    groups = padded.reshape(rows, padded.shape[1] // group_size, group_size)
    top = np.abs(groups).max(axis=2, keepdims=True)
    codes = np.rint(groups * np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0))
    coded: F32 = (codes * (top / np.float32(127))).reshape(padded.shape)[:, :k]
    return coded


def linear(x: F32, weight: Weight, bias: Array | None, activation: str | None, residual: F32 | None) -> F32:
    """(rows, K) -> (rows, N): activation(x · Wᵀ + bias) + residual; int8 and int4 weights see x through `in_int8`."""
    if not isinstance(weight, FloatWeight):
        x = in_int8(x, weight.group_size if isinstance(weight, Int4Weight) else INT8_GROUP)
    y: F32 = x @ dequantize(weight).T
    if bias is not None:
        y = y + bias.astype(np.float32)
    if activation == "gelu":
        y = gelu(y)
    elif activation is not None:
        raise ValueError(f"unknown activation {activation!r}")
    return y if residual is None else y + residual


def rotate(x: F32, positions: I32, frequencies: NDArray[np.float64]) -> F32:
    """(T, heads, D) -> the same, each pair (d, d + D/2) turned by position · frequency[d] (half-rotation layout)."""
    angles = positions.reshape(-1, 1).astype(np.float64) * frequencies  # (T, D/2)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    half = x.shape[2] // 2
    first, second = x[:, :, :half], x[:, :, half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2).astype(np.float32)


def attention(q: F32, keys: Array, values: Array, positions: I32, slots: I32, heads: int) -> F32:
    """(T, H·D) with a cache (slots, G, S, D) -> (T, H·D); token t sees positions 0..positions[t] of its slot."""
    groups, size = keys.shape[1], keys.shape[3]
    share = heads // groups
    out = np.empty_like(q)
    for t, (position, slot) in enumerate(zip(positions.reshape(-1).tolist(), slots.reshape(-1).tolist(), strict=True)):
        k = keys[slot, :, : position + 1].astype(np.float32)  # (G, S, D)
        v = values[slot, :, : position + 1].astype(np.float32)
        query = q[t].reshape(groups, share, size)
        scores = np.einsum("ghd,gsd->ghs", query, k) / math.sqrt(size)
        out[t] = np.einsum("ghs,gsd->ghd", softmax(scores), v).reshape(-1)
    return out


def softmax(scores: Array) -> Array:
    """Along the last axis, shifted by the maximum."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Array = weights / weights.sum(axis=-1, keepdims=True)
    return result


def silu_mul(gate_up: F32) -> F32:
    """(rows, 2F) -> (rows, F): gate / (1 + e^-gate) · up."""
    gate, up = np.split(gate_up, 2, axis=1)
    # e^-|g| never overflows; the two branches are the same function
    small = np.exp(-np.abs(gate))
    sigmoid = np.where(gate >= 0, 1.0 / (1.0 + small), small / (1.0 + small))
    return (gate * sigmoid * up).astype(np.float32)


def patches(pixels: NDArray[np.uint8], patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> F32:
    """(n, S, S, 3) uint8 -> (n·P, 3·p²), normalised; inside a patch: channel slowest, then row, then column."""
    n, side = pixels.shape[0], pixels.shape[1]
    grid = side // patch_size
    x = (pixels.astype(np.float32) / 255.0 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    x = x.reshape(n, grid, patch_size, grid, patch_size, 3).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(x.reshape(n * grid * grid, 3 * patch_size**2), dtype=np.float32)


def vision_tokens(x: F32, positions: Array, prefix: Array) -> F32:
    """(n·P, C), (P, C), (R, C) -> (n·(R+P), C)."""
    count, width = positions.shape
    tiles = x.reshape(-1, count, width) + positions.astype(np.float32)
    front = np.broadcast_to(prefix.astype(np.float32), (tiles.shape[0], *prefix.shape))
    return np.concatenate([front, tiles], axis=1).reshape(-1, width).astype(np.float32)


def full_attention(qkv: F32, heads: int, tokens: int) -> F32:
    """(n·tokens, 3C) -> (n·tokens, C): softmax(q·kᵀ / sqrt(D))·v within each tile."""
    width = qkv.shape[1] // 3
    size = width // heads
    x = qkv.reshape(-1, tokens, 3, heads, size).transpose(2, 0, 3, 1, 4)  # (3, n, H, tokens, D)
    scores = (x[0] @ x[1].swapaxes(-1, -2)) / math.sqrt(size)
    out = (softmax(scores) @ x[2]).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(out.reshape(-1, width), dtype=np.float32)


def pixel_shuffle(x: F32, grid: int, prefix: int) -> F32:
    """(n·(prefix+grid²), C) -> (n·grid²/4, 4C): patches (2r,2q) (2r,2q+1) (2r+1,2q) (2r+1,2q+1) side by side."""
    width, half = x.shape[1], grid // 2
    tiles = x.reshape(-1, prefix + grid * grid, width)[:, prefix:]
    tiles = tiles.reshape(-1, half, 2, half, 2, width).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(tiles.reshape(-1, 4 * width))


class ReferenceOps:
    """`Ops` over numpy arrays: weights by the model's names, one KV cache for all slots."""

    def __init__(
        self,
        weights: Callable[[str], tuple[Weight, F32 | None]],
        cache: list[tuple[Array, Array]] | None = None,
        int8_cache: bool = False,
    ) -> None:
        """`weights(name)` gives weight and bias; `cache[layer]` is (keys, values), (slots, G, S, D) each.

        `int8_cache`: what is written goes through `in_int8`, each head of a token by a scale of its own.
        """
        self._weights = weights
        self._int8_cache = int8_cache
        self._cache = cache or []

    def linear_weight(self, name: str) -> Linear[Any]:
        weight, bias = self._weights(name)
        return Linear(weight, bias)

    def norm_weight(self, name: str) -> Norm[Any]:
        weight, bias = self._weights(name)
        return Norm(dequantize(weight), bias)

    def table(self, name: str) -> Any:
        return dequantize(self._weights(name)[0])

    def embed(self, tokens: Any, table: Any, images: Any | None) -> Any:
        return embed(tokens, table, images)

    def rms_norm(self, x: Any, norm: Norm[Any], eps: float) -> Any:
        return rms_norm(x, norm.weight, eps)

    def layer_norm(self, x: Any, norm: Norm[Any], eps: float) -> Any:
        assert norm.bias is not None
        return layer_norm(x, norm.weight, norm.bias, eps)

    def linear(self, x: Any, layer: Linear[Any], activation: str | None = None, residual: Any | None = None) -> Any:
        return linear(x, layer.weight, layer.bias, activation, residual)

    def rope_write(self, qkv: Any, step: Step[Any], layer: int, config: TextConfig) -> Any:
        h, g, d = config.heads, config.kv_heads, config.head_dim
        heads = qkv.reshape(-1, h + 2 * g, d)
        turned = rotate(heads[:, : h + g], step.positions, inverse_frequencies(config))
        keys, values = self._cache[layer]
        positions, slots = step.positions.reshape(-1), step.slots.reshape(-1)
        for place, rows in ((keys, turned[:, h:]), (values, heads[:, h + g :])):
            coded = in_int8(rows.reshape(-1, d), d).reshape(rows.shape) if self._int8_cache else rows
            place[slots, :, positions] = coded
        return np.ascontiguousarray(turned[:, :h].reshape(-1, h * d))

    def attention(self, q: Any, step: Step[Any], layer: int, config: TextConfig) -> Any:
        keys, values = self._cache[layer]
        return attention(q, keys, values, step.positions, step.slots, config.heads)

    def silu_mul(self, gate_up: Any) -> Any:
        return silu_mul(gate_up)

    def gather_rows(self, x: Any, rows: Any) -> Any:
        return x[rows.reshape(-1)]

    def patches(self, pixels: Any, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
        return patches(pixels, patch_size, mean, std)

    def vision_tokens(self, x: Any, positions: Any, prefix: Any) -> Any:
        return vision_tokens(x, positions, prefix)

    def full_attention(self, qkv: Any, heads: int, tokens: int) -> Any:
        return full_attention(qkv, heads, tokens)

    def pixel_shuffle(self, x: Any, grid: int, prefix: int) -> Any:
        return pixel_shuffle(x, grid, prefix)
