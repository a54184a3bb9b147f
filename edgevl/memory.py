"""Places every buffer of the recorded graphs in one arena: the plan that the runtime allocates, once, at load.

Pure Python, needs no native code. Knows row counts, lifetimes and the KV cache's layout; knows nothing of kernels
except how much scratch each needs (the native plan refuses less). Called by `edgevl.backends.cpu` and by the planner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from edgevl.config import TextConfig
from edgevl.errors import UsageError
from edgevl.recorder import Buffer, Graph, Node
from edgevl.rounding import GroupSize, rounded
from edgevl.runner import Limits

ALIGN = 64  # bytes, a cache line and an AVX-512 register
ITEM_BYTES = {"f32": 4, "f16": 2, "i32": 4, "u8": 1}

# Sizes that the native kernels are compiled with (native/types.h); the native plan checks the result against its own.
GEMV_ROWS = 7  # most rows of a linear that go the matrix-vector way
PANEL = 256 * 32  # f32 values of a dequantized weight panel
TILE_ROWS = 12  # rows of x that are multiplied together
TILE = TILE_ROWS * 32  # f32 values of a ragged output tile
QUERY_ROWS = 192  # query rows of one attention block
KEYS = 64  # keys of one attention block
KEY_LANES = 16  # keys that lie together in the KV cache
DECODE_TOKENS = 8  # most tokens of a step that go the decode path of attention
SPLIT_ITEMS = 32  # most partial results of a token's split attention, per query head
SPLIT_KEYS = 256  # fewest keys of one split


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything lies in the arena; all numbers are bytes from its start."""

    offsets: dict[str, tuple[int, ...]]  # graph name -> offset of each of its buffers, by Buffer.index
    groups: dict[str, dict[int, int]]  # graph name -> columns of a group of each buffer that is kept in int8
    io: dict[str, int]  # graph name -> inputs and output, which no other graph touches
    temporaries: int  # shared by all graphs, which never run at the same time
    kv: int  # keys and values of all layers and slots
    scratch: int  # of all threads, and what they share
    kv_offset: int  # layer i's keys at kv_offset + 2·i·kv_layer, its values kv_layer later
    kv_layer: int  # one tensor (slots, G, context, D) of one layer, the context rounded up to whole KEY_LANES
    shared_offset: int  # scratch that all threads share
    thread_offset: int  # scratch of thread i at thread_offset + i·thread_bytes
    thread_bytes: int
    total: int  # bytes of the arena

    @property
    def workspace(self) -> int:
        """Everything but the KV cache."""
        return self.total - self.kv


def aligned(size: int) -> int:
    """`size` bytes, rounded up to whole cache lines."""
    return (size + ALIGN - 1) // ALIGN * ALIGN


def max_counts(limits: Limits) -> dict[str, int]:
    """The largest count of each `Rows` symbol that a step may have."""
    return {"tokens": limits.chunk, "logits": limits.logit_rows, "images": limits.chunk, "tiles": limits.tiles}


def coded_bytes(rows: int, cols: int, group: int) -> int:
    """Bytes of activations (rows, cols) in int8: whole tiles of rows; codes, scales and sums of whole groups."""
    return -(-rows // TILE_ROWS) * TILE_ROWS * aligned(-(-cols // group) * (group + 12))


def buffer_bytes(buffer: Buffer, counts: dict[str, int], group: int = 0) -> int:
    """Bytes of a buffer (rows, cols) when its symbol counts `counts[symbol]`; `group`: columns of one, in int8."""
    if buffer.rows.symbol not in counts:
        raise UsageError(f"a buffer has rows of {buffer.rows.symbol!r}; a plan knows {', '.join(counts)}")
    rows = counts[buffer.rows.symbol] * buffer.rows.factor
    return coded_bytes(rows, buffer.cols, group) if group else rows * buffer.cols * ITEM_BYTES[buffer.dtype]


def lifetimes(graph: Graph) -> dict[int, tuple[int, int]]:
    """Buffer index -> (node that writes it, last node that reads it), temporaries only."""
    fixed = {b.index for b in graph.inputs.values()} | ({graph.output.index} if graph.output else set())
    spans: dict[int, tuple[int, int]] = {}
    for i, node in enumerate(graph.nodes):
        for buffer in node.inputs:
            if buffer.index not in fixed:
                spans[buffer.index] = (spans[buffer.index][0], i)
        if node.output.index not in fixed:
            spans[node.output.index] = (i, i)
    return spans


def place(sizes: dict[int, int], spans: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offsets for buffers of `sizes` bytes living in `spans`, and the bytes they take together.

    Greedy by size: each buffer, largest first, takes the lowest gap that no buffer alive at the same time covers.
    """
    offsets: dict[int, int] = {}
    total = 0
    for index in sorted(spans, key=lambda i: (-sizes[i], spans[i])):
        first, last = spans[index]
        busy = sorted(
            (offsets[j], offsets[j] + sizes[j]) for j in offsets if spans[j][0] <= last and first <= spans[j][1]
        )
        offset = 0
        for low, high in busy:
            if offset + sizes[index] <= low:
                break
            offset = max(offset, high)
        offsets[index] = offset
        total = max(total, offset + sizes[index])
    return offsets, total


def _attention_values(head_dim: int, rows: int) -> int:
    """f32 values of one attention block: queries, output, scores, keys and values (D padded to whole panels)."""
    padded = (head_dim + 31) // 32 * 32
    return rows * (2 * padded + KEYS + 4) + 2 * KEYS * padded


def kv_row_bytes(kv: str, size: int) -> int:
    """Bytes of the keys, or of the values, of one token and KV head of D = `size`; int8 has an f32 scale with it."""
    return {"f16": 2 * size, "int8": size + 4, "f32": 4 * size}[kv]


def split_parts(context: int) -> int:
    """The most parts that the attention of one token is split into; `split_parts` of native/types.h."""
    fair = -(-context // (SPLIT_ITEMS * KEYS)) * KEYS
    return -(-context // max(SPLIT_KEYS, fair))


def _thread_values(node: Node, text: TextConfig | None) -> int:
    """f32 values of scratch that one thread needs to run `node`."""
    if node.op == "linear":
        # rows in int8 with their scales and sums are never longer than in f32
        return max(PANEL + TILE, GEMV_ROWS * aligned(node.inputs[0].cols))
    if node.op in ("rms_norm", "layer_norm", "silu_mul"):
        return node.output.cols  # a row that is about to be rounded
    if node.op == "rope_write" and text is not None:
        return text.head_dim
    if node.op == "attention" and text is not None:
        return _attention_values(text.head_dim, max(QUERY_ROWS, text.heads // text.kv_heads))
    if node.op == "full_attention":
        return _attention_values(node.output.cols // int(node.attrs["heads"]), QUERY_ROWS)
    return 0


def _shared_bytes(
    node: Node, text: TextConfig | None, limits: Limits, group_size: GroupSize, groups: Mapping[int, int]
) -> int:
    """Scratch that all threads share: cosines and sines of the step in f64, and behind them what one node needs.

    That is partial results of attention, or in int8 the rows that go into a linear of int8 or int4 weights in f32.
    """
    turns = aligned(8 * limits.chunk * text.head_dim) if text is not None else 0
    if text is not None and node.op == "rope_write":
        return turns
    if text is not None and node.op == "attention":
        return turns + 4 * DECODE_TOKENS * split_parts(limits.context) * text.heads * (text.head_dim + 2)
    if node.op == "linear" and (group := group_size(node.weights[0].name)) and node.inputs[0].index not in groups:
        return turns + buffer_bytes(node.inputs[0], max_counts(limits), group)
    return 0


@dataclass(frozen=True)
class Placement:
    """Where the buffers of graphs lie, bytes from the start; graphs never run at the same time."""

    offsets: dict[str, tuple[int, ...]]  # graph name -> offset of each of its buffers, by Buffer.index
    io: dict[str, int]  # graph name -> inputs and output, which no other graph touches
    temporaries: int  # shared by all graphs
    total: int


def place_graphs(
    graphs: Sequence[Graph], counts: dict[str, int], groups: Mapping[str, Mapping[int, int]] | None = None
) -> Placement:
    """Inputs and outputs of all graphs one after the other, then one region for everybody's temporaries.

    `groups`: see `MemoryPlan.groups`; None where nothing is kept in int8.
    """
    offsets: dict[str, list[int]] = {}
    io: dict[str, int] = {}
    position = 0
    for graph in graphs:
        if graph.name in offsets:
            raise UsageError(f"two graphs are called {graph.name!r}; each needs a name of its own")
        offsets[graph.name] = [0] * len(graph.buffers)
        start = position
        fixed = list(graph.inputs.values()) + ([graph.output] if graph.output else [])
        for buffer in {b.index: b for b in fixed}.values():
            offsets[graph.name][buffer.index] = position
            position += aligned(buffer_bytes(buffer, counts))
        io[graph.name] = position - start
    base, temporaries = position, 0
    for graph in graphs:
        spans = lifetimes(graph)
        coded = groups[graph.name] if groups else {}
        sizes = {i: aligned(buffer_bytes(graph.buffers[i], counts, coded.get(i, 0))) for i in spans}
        placed, size = place(sizes, spans)
        temporaries = max(temporaries, size)
        for index, offset in placed.items():
            offsets[graph.name][index] = base + offset
    return Placement({name: tuple(values) for name, values in offsets.items()}, io, temporaries, base + temporaries)


def plan_memory(
    graphs: Sequence[Graph],
    limits: Limits,
    text: TextConfig | None,
    threads: int,
    group_size: GroupSize = lambda name: 0,
) -> MemoryPlan:
    """Lay out the arena of `graphs` for `limits` and a pool of `threads`.

    `text` sizes the KV cache (layers, G, D); None means there is none. `group_size(name)`: activations that an int8
    or int4 weight takes by one scale, 0 for other kinds.
    """
    if threads < 1:
        raise UsageError(f"a plan for {threads} threads cannot run; it needs at least 1")
    counts = max_counts(limits)
    groups = {graph.name: rounded(graph, text, group_size) for graph in graphs}
    placed = place_graphs(graphs, counts, groups)
    kv_layer = 0
    if text is not None:
        context = -(-limits.context // KEY_LANES) * KEY_LANES
        kv_layer = aligned(limits.slots * text.kv_heads * context * kv_row_bytes(limits.kv, text.head_dim))
    kv = 2 * kv_layer * (text.layers if text is not None else 0)
    nodes = [(node, groups[graph.name]) for graph in graphs for node in graph.nodes]
    shared = aligned(max((_shared_bytes(n, text, limits, group_size, g) for n, g in nodes), default=0))
    thread_bytes = aligned(4 * max((_thread_values(n, text) for n, _ in nodes), default=0))
    scratch = shared + threads * thread_bytes
    kv_offset, shared_offset, thread_offset, total = accumulate((placed.total, kv, shared, threads * thread_bytes))
    return MemoryPlan(
        offsets=placed.offsets,
        groups=groups,
        io=placed.io,
        temporaries=placed.temporaries,
        kv=kv,
        scratch=scratch,
        kv_offset=kv_offset,
        kv_layer=kv_layer,
        shared_offset=shared_offset,
        thread_offset=thread_offset,
        thread_bytes=thread_bytes,
        total=total,
    )
