"""Types of the C++ CPU backend; see edgevl/native/plan.h. Used by `edgevl.backends.cpu` alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = tuple[int, int, int, int]  # tokens, rows of logits, image rows, tiles

def isa() -> str:
    """The kernels that this processor runs: portable, avx2, avx512, avx512vnni, neon or neoni8mm."""

def int8_products(rounds: int) -> int:
    """Multiply int8 numbers in registers, as fast as these kernels can; the operations done, two a product."""

def read_memory(values: NDArray[np.float32]) -> float:
    """Read all values, a multiple of 64, as fast as these kernels can; their sum."""

class Plan:
    """Graphs of kernel calls over one arena; every wrong argument raises ValueError or TypeError."""

    def __init__(
        self,
        arena: NDArray[np.uint8],
        limits: Counts,
        threads: int,
        shared_offset: int,
        thread_offset: int,
        thread_bytes: int,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def graph(self) -> int: ...
    def buffer(self, offset: int, symbol: int, factor: int, cols: int, dtype: str, group: int) -> int: ...
    def float_weight(self, values: NDArray[Any], bias: NDArray[np.float32] | None) -> int: ...
    def int8_weight(
        self, n: int, k: int, codes: NDArray[np.int8], scales: NDArray[np.float32], bias: NDArray[np.float32] | None
    ) -> int: ...
    def int4_weight(
        self,
        n: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float16],
        zeros: NDArray[np.uint8],
        bias: NDArray[np.float32] | None,
    ) -> int: ...
    def cache(
        self,
        offset: int,
        layer_bytes: int,
        layers: int,
        slots: int,
        groups: int,
        context: int,
        size: int,
        heads: int,
        kind: str,
        frequencies: NDArray[np.float64],
    ) -> None: ...
    def embed(self, graph: int, tokens: int, images: int, table: int, out: int, /) -> None: ...
    def rms_norm(self, graph: int, x: int, weight: int, eps: float, out: int, /) -> None: ...
    def layer_norm(self, graph: int, x: int, weight: int, eps: float, out: int, /) -> None: ...
    def linear(self, graph: int, x: int, weight: int, gelu: bool, residual: int, out: int, /) -> None: ...
    def rope_write(self, graph: int, qkv: int, positions: int, slots: int, layer: int, out: int, /) -> None: ...
    def attention(self, graph: int, q: int, positions: int, slots: int, layer: int, out: int, /) -> None: ...
    def silu_mul(self, graph: int, gate_up: int, out: int, /) -> None: ...
    def gather_rows(self, graph: int, x: int, picked: int, out: int, /) -> None: ...
    def patches(
        self,
        graph: int,
        pixels: int,
        side: int,
        patch: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        out: int,
        /,
    ) -> None: ...
    def vision_tokens(self, graph: int, x: int, positions: int, prefix: int, out: int, /) -> None: ...
    def full_attention(self, graph: int, qkv: int, heads: int, tokens: int, whole: bool, out: int, /) -> None: ...
    def pixel_shuffle(self, graph: int, x: int, grid: int, prefix: int, out: int, /) -> None: ...
    def run(self, graph: int, counts: Counts) -> None: ...
