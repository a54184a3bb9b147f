"""The operations that models are written in: one protocol, many implementations.

`edgevl.models` calls these methods and never looks inside a tensor. An implementation is either *eager* (numpy in
`edgevl.reference`, torch in `quantize`) and returns arrays, or a *recorder* (`edgevl.recorder`) and returns handles.
`edgevl.contracts` holds shapes, tolerances and sources; the numpy twin in `edgevl.reference` is the definition.

Shape letters: T tokens of the step, L rows whose logits are wanted, n tiles, P patches of a tile, R prefix tokens,
C hidden, F feed-forward, H query heads, G KV heads, D head size, V vocabulary, N out-features, K in-features.
A leading `rows` stands for any of T, L, n·P, n·(R+P).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edgevl.config import TextConfig

X = TypeVar("X")  # a tensor of the implementation, or its handle


@dataclass(frozen=True)
class Linear(Generic[X]):
    """A linear layer as the implementation holds it: weight (N, K) of any kind, and bias (N,) or None."""

    weight: X
    bias: X | None = None


@dataclass(frozen=True)
class Norm(Generic[X]):
    """Scale (C,) and, for layer norm, shift (C,)."""

    weight: X
    bias: X | None = None


@dataclass(frozen=True)
class Step(Generic[X]):
    """The inputs of one decoder step: T tokens, each with its own sequence slot and position."""

    tokens: X  # (T,) int32; id >= 0 is a row of the embedding table, -1-r is row r of `images`
    positions: X  # (T,) int32, place of the token in its sequence
    slots: X  # (T,) int32, which sequence of the KV cache
    images: X | None  # (rows, C), image embeddings of this step; None in a text-only model
    logit_rows: X  # (L,) int32, which of the T tokens get logits


class Ops(Protocol[X]):
    """What a model may ask for. Everything is row-major; `rows` varies from step to step, the rest is fixed."""

    def linear_weight(self, name: str) -> Linear[X]:
        """The linear layer `name` of the model's own naming (see `edgevl.models.names`)."""
        ...

    def norm_weight(self, name: str) -> Norm[X]:
        """The norm `name`."""
        ...

    def table(self, name: str) -> X:
        """A plain tensor `name`: embedding table, position table, prefix tokens."""
        ...

    def embed(self, tokens: X, table: X, images: X | None) -> X:
        """(T,), (V, C), (rows, C) -> (T, C): embedding rows, or image rows where the id is negative."""
        ...

    def rms_norm(self, x: X, norm: Norm[X], eps: float) -> X:
        """(rows, C) -> (rows, C): x / sqrt(mean(x²) + eps) · weight."""
        ...

    def layer_norm(self, x: X, norm: Norm[X], eps: float) -> X:
        """(rows, C) -> (rows, C): (x - mean) / sqrt(var + eps) · weight + bias, variance over C without correction."""
        ...

    def linear(self, x: X, layer: Linear[X], activation: str | None = None, residual: X | None = None) -> X:
        """(rows, K) -> (rows, N): activation(x · Wᵀ + bias) + residual; activation is None or "gelu" (exact, erf)."""
        ...

    def rope_write(self, qkv: X, step: Step[X], layer: int, config: TextConfig) -> X:
        """(T, (H+2G)·D) -> q (T, H·D), rotated; rotated k, and v, enter the cache of `layer` at (slot, position)."""
        ...

    def attention(self, q: X, step: Step[X], layer: int, config: TextConfig) -> X:
        """(T, H·D) -> (T, H·D): each token attends to positions 0..its own of its slot, scale D^-½, GQA."""
        ...

    def silu_mul(self, gate_up: X) -> X:
        """(rows, 2F) -> (rows, F): silu(first half) · second half."""
        ...

    def gather_rows(self, x: X, rows: X) -> X:
        """(T, C), (L,) -> (L, C)."""
        ...

    def patches(self, pixels: X, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> X:
        """(n, S, S, 3) uint8 -> (n·P, 3·p²): (x/255 - mean)/std; row-major, inside a patch: channel, row, column."""
        ...

    def vision_tokens(self, x: X, positions: X, prefix: X) -> X:
        """(n·P, C), (P, C), (R, C) -> (n·(R+P), C): positions added to patches, the prefix put before each tile."""
        ...

    def full_attention(self, qkv: X, heads: int, tokens: int) -> X:
        """(n·tokens, 3C) -> (n·tokens, C): every token attends to all `tokens` of its tile; q, k, v head-major."""
        ...

    def pixel_shuffle(self, x: X, grid: int, prefix: int) -> X:
        """(n·(prefix+grid²), C) -> (n·grid²/4, 4C): prefix dropped, 2x2 patches joined in the order 00, 01, 10, 11."""
        ...
