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
from edgevl.backends.cuda_lowering import MORE_ROWS, SPLITS
from edgevl.config import TextConfig
from edgevl.errors import UsageError
from edgevl.memory import aligned, max_counts, place_graphs
from edgevl.recorder import Graph
from edgevl.rope import inverse_frequencies
from edgevl.runner import Limits


@dataclass(frozen=True)
class DevicePlan:
    """All numbers are bytes from the start of the arena."""

    offsets: dict[str, tuple[int, ...]]  # graph name -> offset of each of its buffers, by Buffer.index
    regions: dict[str, int]  # where a `Region` begins
    kv_layer: int  # one tensor (slots, G, context, D) f16; keys of layer i at i times this, values likewise
    kv: int
    total: int

    def region(self, region: Region) -> int:
        """Where a kernel finds it."""
        return self.regions[region.name] + region.layer * self.kv_layer


def plan_device(graphs: Sequence[Graph], limits: Limits, text: TextConfig | None) -> DevicePlan:
    """Lay out the arena of narrowed graphs. Raises `UsageError` for a KV cache that GPU kernels do not read."""
    if limits.kv != "f16":
        raise UsageError(f"a KV cache of {limits.kv} cannot run on a GPU; build with --kv f16")
    placed = place_graphs(graphs, max_counts(limits))
    layer = sizes = 0
    wanted = {"ids": 4 * limits.logit_rows}
    if text is not None:
        layer = aligned(2 * limits.slots * text.kv_heads * limits.context * text.head_dim)
        sizes = layer * text.layers
        parts = min(limits.chunk, MORE_ROWS) * text.heads * SPLITS
        wanted |= {
            "keys": sizes,
            "values": sizes,
            "turns": 4 * limits.context * text.head_dim,
            "sums": 4 * parts * text.head_dim,
            "tops": 4 * parts * 2,
        }
    regions, position = {}, placed.total
    for name, size in wanted.items():
        regions[name] = position
        position += aligned(size)
    return DevicePlan(placed.offsets, regions, layer, 2 * sizes, position)


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
