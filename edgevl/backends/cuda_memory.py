"""Where everything lies on the GPU: one allocation for weights, one for the rest, both made at load.

Pure: the builder and `edgevl.backends.cuda` read it. Buffers are placed by `edgevl.memory`; this adds what only GPU
kernels need. Knows nothing of drivers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevl.backends.cuda_kernels import Region
from edgevl.backends.cuda_lowering import MORE_ROWS, SAMPLE_LEVELS, SPLITS, sample_parts
from edgevl.config import TextConfig
from edgevl.memory import aligned, max_counts, place_graphs
from edgevl.recorder import Graph
from edgevl.rope import inverse_frequencies
from edgevl.runner import Limits


@dataclass(frozen=True)
class DevicePlan:
    """All numbers are bytes from the start of the arena."""

    offsets: dict[str, tuple[int, ...]]  # graph name -> offset of each of its buffers, by Buffer.index
    regions: dict[str, tuple[int, int]]  # where a `Region` begins, and the bytes of one layer of it
    kv: int  # of the KV cache, scales included
    total: int

    def region(self, region: Region) -> int:
        """Where a kernel finds it."""
        start, layer = self.regions[region.name]
        return start + region.layer * layer


def plan_device(graphs: Sequence[Graph], limits: Limits, text: TextConfig | None, real_tokens: int = 0) -> DevicePlan:
    """Lay out the arena of narrowed graphs; `real_tokens` as for `lower`.

    Regions: "ids" (L,) the chosen tokens; "draws" and "sample_..." as in deploy/kernels/sample.py; "keys" and "values"
    (slots, G, context, D) of each layer, and with int8 "key_scales" and "value_scales" (slots, G, context); "turns",
    cosines and sines of each position; "sums" and "tops", the parts of split attention.
    """
    placed = place_graphs(graphs, max_counts(limits))
    rows, parts = limits.logit_rows, sample_parts(real_tokens)
    wanted = {  # layers, bytes of one
        "ids": (1, 4 * rows),
        "draws": (1, 12 * rows),
        "sample_tops": (1, 4 * rows * parts),
        "sample_sums": (SAMPLE_LEVELS + 1, 64 * rows * parts),
        "sample_state": (SAMPLE_LEVELS + 1, 8 * rows),
        "sample_shares": (1, 12 * rows * parts),
    }
    cache: dict[str, tuple[int, int]] = {}
    if text is not None:
        cells = limits.slots * text.kv_heads * limits.context
        numbers = (text.layers, cells * text.head_dim * (1 if limits.kv == "int8" else 2))
        cache = {"keys": numbers, "values": numbers}
        if limits.kv == "int8":
            cache |= {"key_scales": (text.layers, 4 * cells), "value_scales": (text.layers, 4 * cells)}
        parts = min(limits.chunk, MORE_ROWS) * text.heads * SPLITS
        wanted |= {
            **cache,
            "turns": (1, 4 * limits.context * text.head_dim),
            "sums": (1, 4 * parts * text.head_dim),
            "tops": (1, 4 * parts * 2),
        }
    regions, position = {}, placed.total
    for name, (layers, size) in wanted.items():
        regions[name] = (position, aligned(size))
        position += layers * aligned(size)
    kv = sum(layers * aligned(size) for layers, size in cache.values())
    return DevicePlan(placed.offsets, regions, kv, position)


def rope_turns(text: TextConfig, context: int) -> NDArray[np.float32]:
    """(context, 2, D/2) f32: cosines and sines of each position, computed in f64."""
    angles = np.arange(context, dtype=np.float64)[:, None] * inverse_frequencies(text)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def place_weights(arrays: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Offsets for arrays given as {address on the host: bytes}, and the bytes of all."""
    offsets, position = {}, 0
    for address, size in arrays.items():
        offsets[address] = position
        position += aligned(size)
    return offsets, position
