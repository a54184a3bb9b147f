"""The CPU backend: lowers recorded graphs to the native plan and replays them.

Knows where buffers lie (`edgevl.memory`) and how each op is called in C++ (`edgevl._native`); knows nothing of kernels
or instruction sets. `edgevl.engine` makes a `CpuRunner`; the op tests call `run_graph`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl._native import Plan
from edgevl.config import ModelConfig, TextConfig
from edgevl.errors import UsageError
from edgevl.layouts import StoredWeight
from edgevl.memory import ALIGN, GEMV_ROWS, KEY_LANES, MemoryPlan, max_counts, plan_memory
from edgevl.recorder import Buffer, Graph, Node, WeightRef, record_model
from edgevl.rope import inverse_frequencies
from edgevl.runner import F32, I32, Limits, check_step, check_tiles

Array = NDArray[Any]
Weights = Callable[[str], StoredWeight]

SYMBOLS = ("tokens", "logits", "images", "tiles")  # in the order of the native Symbol
ISA_NAMES = {
    "portable": "portable",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512vnni": "AVX-512 VNNI",
    "neon": "NEON",
    "neoni8mm": "NEON i8mm",
}
DTYPES: dict[str, type[np.generic]] = {"f32": np.float32, "i32": np.int32, "u8": np.uint8}


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Program:
    """An arena and the graphs lowered onto it; `memory` says where everything is."""

    def __init__(
        self, graphs: Sequence[Graph], limits: Limits, weights: Weights, text: TextConfig | None, threads: int
    ) -> None:
        self.memory: MemoryPlan = plan_memory(graphs, limits, text, threads, lambda name: weights(name).group_size)
        self._limits, self._text, self._weights = limits, text, weights
        room = np.zeros(self.memory.total + ALIGN, np.uint8)
        start = -room.ctypes.data % ALIGN
        self._arena: NDArray[np.uint8] = room[start : start + self.memory.total]
        most = max_counts(limits)
        self._most = (most["tokens"], most["logits"], most["images"], most["tiles"])
        m = self.memory
        self._graphs = {graph.name: graph for graph in graphs}
        self._index: dict[str, int] = {}
        self._handles: dict[str, int] = {}
        self._arrays: dict[int, int] = {}  # address -> bytes of each weight array
        try:
            self.plan = Plan(self._arena, self._most, threads, m.shared_offset, m.thread_offset, m.thread_bytes)
            if text is not None:
                self._add_cache(text)
            for graph in graphs:
                self._lower(graph)
        except (ValueError, TypeError) as error:
            raise UsageError(f"this model cannot be planned for the CPU: {error}") from error

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; arrays that two names share are counted once."""
        return sum(self._arrays.values())

    def view(self, name: str, buffer: Buffer, count: int) -> Array:
        """The first rows of a buffer, for `count` of its symbol: (rows, cols), inside the arena."""
        dtype = np.dtype(DTYPES[buffer.dtype])
        rows, start = count * buffer.rows.factor, self.memory.offsets[name][buffer.index]
        view = self._arena[start : start + rows * buffer.cols * dtype.itemsize].view(dtype)
        return view.reshape(rows, buffer.cols)

    def _cache(self, layer: int) -> list[tuple[Array, Array | None]]:
        """Views into the arena of keys and values with their scales (slots, G, blocks · KEY_LANES), for int8.

        Keys are (slots, G, blocks, D, KEY_LANES), values (slots, G, context, D).
        """
        assert self._text is not None
        kv, size, context = self._limits.kv, self._text.head_dim, self._limits.context
        dtype = np.dtype({"f16": np.float16, "int8": np.int8, "f32": np.float32}[kv])
        heads, blocks = (self._limits.slots, self._text.kv_heads), -(-context // KEY_LANES)
        start = self.memory.kv_offset + 2 * layer * self.memory.kv_layer
        views: list[tuple[Array, Array | None]] = []
        for shape in ((*heads, blocks, size, KEY_LANES), (*heads, context, size)):
            end = start + int(np.prod(shape)) * dtype.itemsize
            numbers = self._arena[start:end].view(dtype).reshape(shape)
            scales = None
            if kv == "int8":
                rows = int(np.prod(heads)) * blocks * KEY_LANES
                at = start + rows * size
                scales = self._arena[at : at + 4 * rows].view(np.float32).reshape(*heads, blocks * KEY_LANES)
            views.append((numbers, scales))
            start += self.memory.kv_layer
        return views

    def read_cache(self, layer: int) -> tuple[Array, Array]:
        """Keys and values of a layer, (slots, G, context, D) each, copied; f32 for an int8 cache."""
        (keys, key_scales), (values, value_scales) = self._cache(layer)
        slots, groups, blocks, size, lanes = keys.shape
        context = self._limits.context
        plain = keys.transpose(0, 1, 2, 4, 3).reshape(slots, groups, blocks * lanes, size)[:, :, :context]
        found = []
        for numbers, scales in ((plain, key_scales), (values, value_scales)):
            found.append(numbers.copy() if scales is None else numbers * scales[:, :, :context, None])
        return found[0], found[1]

    def write_cache(self, layer: int, keys: Array, values: Array) -> None:
        """Set what `read_cache` gives."""
        (own, key_scales), (place, value_scales) = self._cache(layer)
        slots, groups, blocks, size, lanes = own.shape
        context = self._limits.context
        codes = []
        for given, scales in ((keys, key_scales), (values, value_scales)):
            if scales is not None:
                top = np.abs(given).max(axis=3)
                scales[:, :, :context] = top / np.float32(127)
                given = np.rint(given / np.maximum(scales[:, :, :context, None], np.float32(1e-30)))
            codes.append(given)
        padded = np.zeros((slots, groups, blocks * lanes, size), own.dtype)
        padded[:, :, :context] = codes[0]
        own[...] = padded.reshape(slots, groups, blocks, lanes, size).transpose(0, 1, 2, 4, 3)
        place[...] = codes[1]

    def fill(self, name: str, inputs: Mapping[str, Array], counts: Mapping[str, int]) -> None:
        """Copy the inputs of a graph into the arena; raises `UsageError` for one that is missing or misshapen."""
        for key, buffer in self._graphs[name].inputs.items():
            count = counts.get(buffer.rows.symbol, 0)
            if count == 0:
                continue
            if key not in inputs:
                raise UsageError(f"the {name} graph needs the input {key!r}, which was not given")
            target, given = self.view(name, buffer, count), np.asarray(inputs[key])
            if given.size != target.size:
                raise UsageError(
                    f"the input {key!r} has {given.size} values; {count} {buffer.rows.symbol} need {target.size}"
                )
            if not np.can_cast(given.dtype, target.dtype, "same_kind"):
                raise UsageError(f"the input {key!r} is {given.dtype}; it must be {target.dtype}")
            target[...] = given.reshape(target.shape)

    def run(self, name: str, counts: Mapping[str, int]) -> Array:
        """Replay a graph; the output is a view into the arena, valid until the next run."""
        order = (counts.get("tokens", 0), counts.get("logits", 0), counts.get("images", 0), counts.get("tiles", 0))
        try:
            self.plan.run(self._index[name], order)
        except ValueError as error:
            raise UsageError(f"the {name} step cannot run: {error}") from error
        output = self._graphs[name].output
        assert output is not None
        return self.view(name, output, counts.get(output.rows.symbol, 0))

    def _add_cache(self, text: TextConfig) -> None:
        self.plan.cache(
            offset=self.memory.kv_offset,
            layer_bytes=self.memory.kv_layer,
            layers=text.layers,
            slots=self._limits.slots,
            groups=text.kv_heads,
            context=self._limits.context,
            size=text.head_dim,
            heads=text.heads,
            kind=self._limits.kv,
            frequencies=inverse_frequencies(text),
        )

    def _weight(self, ref: WeightRef) -> int:
        if ref.name in self._handles:
            return self._handles[ref.name]
        stored = self._weights(ref.name)
        if tuple(stored.shape) != tuple(ref.shape):
            raise UsageError(f"the weight {ref.name!r} is {stored.shape}; the model needs {ref.shape}")
        a, bias = stored.arrays, stored.bias
        if stored.kind in ("f32", "f16"):
            handle = self.plan.float_weight(a["values"], bias)
        elif stored.kind == "int8":
            handle = self.plan.int8_weight(stored.shape[0], stored.shape[1], a["codes"], a["scales"], bias)
        elif stored.kind == "int4":
            handle = self.plan.int4_weight(stored.shape[0], a["codes"], a["scales"], a["zeros"], bias)
        else:
            raise UsageError(
                f"the weight {ref.name!r} is of kind {stored.kind!r}; the CPU reads f32, f16, int8 and int4"
            )
        for array in (*a.values(), *([] if bias is None else [bias])):
            self._arrays[array.ctypes.data] = array.nbytes
        self._handles[ref.name] = handle
        return handle

    def _lower(self, graph: Graph) -> None:
        offsets, groups = self.memory.offsets[graph.name], self.memory.groups[graph.name]
        buffers = []
        for b in graph.buffers:
            group = groups.get(b.index, 0)
            dtype, symbol = "coded" if group else b.dtype, SYMBOLS.index(b.rows.symbol)
            buffers.append(self.plan.buffer(offsets[b.index], symbol, b.rows.factor, b.cols, dtype, group))
        # a tower of int8 weights rounds its activations anyway
        self._whole = any(self._weights(w.name).kind == "int8" for node in graph.nodes for w in node.weights)
        index = self.plan.graph()
        self._index[graph.name] = index
        for node in graph.nodes:
            inputs = [buffers[b.index] for b in node.inputs]
            weights = [self._weight(w) for w in node.weights if w.field == "weight"]
            self._lower_node(index, node, inputs, weights, buffers[node.output.index])

    def _lower_node(self, graph: int, node: Node, inputs: list[int], weights: list[int], out: int) -> None:
        plan, a = self.plan, node.attrs
        if node.op == "embed":
            plan.embed(graph, inputs[0], inputs[1] if len(inputs) > 1 else -1, weights[0], out)
        elif node.op == "rms_norm":
            plan.rms_norm(graph, inputs[0], weights[0], a["eps"], out)
        elif node.op == "layer_norm":
            plan.layer_norm(graph, inputs[0], weights[0], a["eps"], out)
        elif node.op == "linear":
            if a["activation"] not in (None, "gelu"):
                raise UsageError(f"the activation {a['activation']!r} does not exist; a linear has none or gelu")
            residual = inputs[1] if a["residual"] else -1
            plan.linear(graph, inputs[0], weights[0], a["activation"] == "gelu", residual, out)
        elif node.op == "rope_write":
            qkv, positions, slots = inputs
            plan.rope_write(graph, qkv, positions, slots, a["layer"], out)
        elif node.op == "attention":
            q, positions, slots = inputs
            plan.attention(graph, q, positions, slots, a["layer"], out)
        elif node.op == "silu_mul":
            plan.silu_mul(graph, inputs[0], out)
        elif node.op == "gather_rows":
            plan.gather_rows(graph, inputs[0], inputs[1], out)
        elif node.op == "patches":
            plan.patches(graph, inputs[0], a["side"], a["patch_size"], a["mean"], a["std"], out)
        elif node.op == "vision_tokens":
            plan.vision_tokens(graph, inputs[0], weights[0], weights[1], out)
        elif node.op == "full_attention":
            plan.full_attention(graph, inputs[0], a["heads"], a["tokens"], self._whole, out)
        elif node.op == "pixel_shuffle":
            plan.pixel_shuffle(graph, inputs[0], a["grid"], a["prefix"], out)
        else:
            raise UsageError(f"the CPU backend has no kernel for the op {node.op!r}")


class CpuRunner:
    """A `Runner` on the processor's own cores. Not to be called from two threads at once."""

    alike_rows = GEMV_ROWS  # so many tokens take the same kernels, and the same sums, as a single one

    def __init__(self, config: ModelConfig, limits: Limits, weights: Weights, threads: int | None = None) -> None:
        """Plan, allocate and lower everything; nothing is allocated afterwards.

        `weights(name)` gives the stored weight of a part, whose arrays are read where they lie; `threads` defaults to
        the processors of this process. Raises `UsageError` for weights or an EDGEVL_ISA that do not fit.
        """
        self.config, self.limits = config, limits
        count = available_threads() if threads is None else threads
        self.threads = count
        self._program = _Program(record_model(config), limits, weights, config.text, count)
        plural = "" if count == 1 else "s"
        self.backend = f"cpu ({ISA_NAMES[self._program.plan.isa]}, {count} thread{plural})"

    @property
    def memory(self) -> MemoryPlan:
        """Where the arena's bytes go."""
        return self._program.memory

    @property
    def planned_bytes(self) -> int:
        """See `Runner.planned_bytes`."""
        return self._program.weight_bytes + self.memory.total

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        """See `Runner.decode`. Raises `CapacityError` for a step over the limits, `UsageError` for a wrong index."""
        counts = check_step(self.config, self.limits, tokens, images, logit_rows)
        given: dict[str, Array] = {
            "tokens": tokens,
            "positions": positions,
            "slots": slots,
            "logit_rows": logit_rows,
        }
        if images is not None:
            given["images"] = images
        self._program.fill("decoder", given, counts)
        return self._program.run("decoder", counts)

    def vision(self, pixels: NDArray[np.uint8]) -> F32:
        """See `Runner.vision`. Raises `CapacityError` for more tiles than the plan holds."""
        counts = check_tiles(self.config, self.limits, pixels)
        self._program.fill("vision", {"pixels": pixels}, counts)
        return self._program.run("vision", counts)


def run_graph(
    graph: Graph,
    counts: Mapping[str, int],
    inputs: Mapping[str, Array],
    weights: Weights | Mapping[str, StoredWeight],
    config: TextConfig | None,
    limits: Limits,
    cache: Mapping[int, tuple[Array, Array]] | None = None,
    threads: int = 1,
) -> Array:
    """Lower any recorded graph, replay it once and return a copy of its output (rows, cols).

    `counts` by symbol ("tokens", "logits", "images", "tiles"); `inputs` by name. `config` is needed by the ops with a
    KV cache; `cache[layer]` is (keys, values), (slots, G, context, D) each, read before and updated after the run.
    """
    read = weights.__getitem__ if isinstance(weights, Mapping) else weights
    program = _Program([graph], limits, read, config, threads)
    for layer, pair in (cache or {}).items():
        program.write_cache(layer, *pair)
    program.fill(graph.name, inputs, counts)
    result: Array = program.run(graph.name, counts).copy()
    for layer, pair in (cache or {}).items():
        for given, found in zip(pair, program.read_cache(layer), strict=True):
            given[...] = found
    return result
