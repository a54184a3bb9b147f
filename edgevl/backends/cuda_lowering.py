"""From a recorded graph to kernel launches: which kernel an op takes, with which constants, over which grid.

Pure: the builder calls it to learn what must be compiled, the runtime to learn what must be launched, and so they
cannot differ. Activations are f16 between an op and the next, f32 in the residual stream and in results. Knows nothing
of Triton, drivers or addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgevl.backends.cuda_kernels import (
    Argument,
    Choice,
    Constant,
    Extent,
    Kernel,
    Launch,
    Region,
    WeightArray,
)
from edgevl.config import TextConfig
from edgevl.errors import UsageError
from edgevl.recorder import Buffer, Graph, Node, Rows
from edgevl.runner import Limits
from edgevl.weights import INT8_GROUP

FEW_ROWS = 8  # most tokens of the smaller gemv
MORE_ROWS = 16  # most tokens of the larger gemv, and of split attention
SPLITS = 16  # parts that the depth of a decode attention is split into, a power of two
LISTS = ("argmax", "sample")  # what chooses tokens
SAMPLE_PART = 1024  # logits of a program that draws tokens
SAMPLE_LEVELS = 8  # digits of four bits of a logit
CACHE_TYPES = {"f16": "*f16", "int8": "*i8"}  # by `Limits.kv`
_MANY = 1 << 62
_F32_RESULTS = ("embed", "vision_tokens")
_SAME_RESULTS = ("gather_rows", "pixel_shuffle")
_TYPES = {
    "f32": {"values": "*f32"},
    "f16": {"values": "*f16"},
    "int8": {"codes": "*i8", "scales": "*f32"},
    "int4": {"codes": "*u8", "scales": "*i32"},  # a scale and its zero are read as one number
}


@dataclass(frozen=True)
class Form:
    """What is compiled in about a weight."""

    kind: str  # "f32" | "f16" | "int8" | "int4"
    group_size: int = 0  # Q of int4


Forms = Callable[[str], Form]
Arguments = Mapping[str, Argument | None]


def narrow(graph: Graph) -> Graph:
    """The same graph with f16 buffers, except for inputs, results and the residual stream."""
    dtypes = {b.index: b.dtype for b in graph.buffers}
    for node in graph.nodes:
        if node.op in _SAME_RESULTS:
            kind = dtypes[node.inputs[0].index]
        else:
            wide = node.op in _F32_RESULTS or (node.op == "linear" and node.attrs["residual"])
            kind = "f32" if wide else "f16"
        dtypes[node.output.index] = kind
    if graph.output is not None:
        dtypes[graph.output.index] = "f32"
    buffers = [replace(b, dtype=dtypes[b.index]) for b in graph.buffers]
    nodes = [
        replace(n, inputs=tuple(buffers[b.index] for b in n.inputs), output=buffers[n.output.index])
        for n in graph.nodes
    ]
    inputs = {name: buffers[b.index] for name, b in graph.inputs.items()}
    return Graph(graph.name, inputs, nodes, buffers, buffers[graph.output.index] if graph.output else None)


@dataclass(frozen=True)
class Lowered:
    """Graphs as the GPU runs them. What chooses tokens from the decoder's logits are lists of their own, of `LISTS`."""

    graphs: dict[str, Graph]  # narrowed
    choices: dict[str, list[Choice[Launch]]]  # node by node

    def kernels(self, most: Mapping[str, int]) -> dict[str, Kernel]:
        """Every kernel that steps of at most these counts can need, by key."""
        found: dict[str, Kernel] = {}
        for choice in (c for choices in self.choices.values() for c in choices):
            rows, below = choice.rows.factor * most[choice.rows.symbol], 0
            for bound, launches in choice.ways:
                if below < rows and bound >= choice.rows.factor:
                    found |= {launch.kernel.key: launch.kernel for launch in launches}
                below = bound
        return found


def lower(
    graphs: Sequence[Graph], text: TextConfig | None, limits: Limits, forms: Forms, real_tokens: int = 0
) -> Lowered:
    """The launches of recorded graphs. `real_tokens`: entries of a row of logits that are no padding; 0: no choosing.

    Raises `UsageError` for an op or a weight that has no kernel.
    """
    lowering = _Lowering(text, limits, forms)
    lowered = Lowered({graph.name: narrow(graph) for graph in graphs}, {})
    for name, graph in lowered.graphs.items():
        lowered.choices[name] = [_lower_node(lowering, node) for node in graph.nodes]
        if name == "decoder" and graph.output is not None and real_tokens:
            lowered.choices["argmax"] = _largest(graph.output, real_tokens)
            lowered.choices["sample"] = _drawn(graph.output, real_tokens)
    return lowered


def _largest(logits: Buffer, real_tokens: int) -> list[Choice[Launch]]:
    arguments: Arguments = {"logits": logits, "out": Region("ids", "*i32")}
    call = _call("argmax", arguments, (_per_row(logits),), {"V": logits.cols, "COUNT": real_tokens})
    return [_always(logits.rows, call)]


def _drawn(logits: Buffer, real_tokens: int) -> list[Choice[Launch]]:
    """The kernels of deploy/kernels/sample.py: what a level knows is where the next one reads it."""
    parts = sample_parts(real_tokens)
    row, each = (_per_row(logits),), (_per_row(logits), Extent(parts))
    sizes = {"V": logits.cols, "COUNT": real_tokens, "PARTS": parts, "BLOCK": SAMPLE_PART}
    wide = {**sizes, "WHOLE": power_of_two(parts)}
    tops = Region("sample_tops", "*f32")
    seen: Arguments = {
        "logits": logits,
        "draws": Region("draws", "*f32"),
        "tops": tops,
        "totals": Region("sample_sums", "*f32", 1),
    }

    def known(level: int, prefix: str = "") -> Arguments:
        return {
            f"{prefix}sums": Region("sample_sums", "*f32", level),
            f"{prefix}state": Region("sample_state", "*i32", level),
        }

    shares: Arguments = {"shares": Region("sample_shares", "*f32")}
    last: Arguments = {**seen, **known(SAMPLE_LEVELS), **shares}
    return [
        _always(
            logits.rows,
            _call("sample_top", {"logits": logits, "tops": tops}, each, sizes),
            *(
                _call("sample_narrow", {**seen, **known(level), **known(level + 1, "next_")}, each, wide)
                for level in range(SAMPLE_LEVELS)
            ),
            _call("sample_tally", last, each, wide),
            _call("sample_pick", {**last, "out": Region("ids", "*i32")}, row, wide),
        )
    ]


def sample_parts(real_tokens: int) -> int:
    """Parts of a row of logits, one a program."""
    return -(-real_tokens // SAMPLE_PART)


def _lower_node(lowering: _Lowering, node: Node) -> Choice[Launch]:
    method = getattr(lowering, node.op, None)
    if method is None:
        raise UsageError(f"the GPU backend has no kernel for the op {node.op!r}")
    choice: Choice[Launch] = method(node)
    return choice


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count` and `least`."""
    return max(least, 1 << (count - 1).bit_length())


def _call(
    name: str,
    arguments: Arguments,
    grid: tuple[Extent, ...],
    constants: Mapping[str, Constant],
    variant: str = "",
) -> Launch:
    types = tuple((key, None if value is None else _type(value)) for key, value in arguments.items())
    kernel = Kernel(name, types, tuple(constants.items()), variant)
    return Launch(kernel, grid, tuple(value for value in arguments.values() if value is not None))


def _type(argument: Argument) -> str:
    if isinstance(argument, Buffer):
        return f"*{argument.dtype}"
    return "i32" if isinstance(argument, Rows) else argument.type


def _always(rows: Rows, *launches: Launch) -> Choice[Launch]:
    return Choice(rows, ((_MANY, launches),))


def _per_row(buffer: Buffer, tile: str = "") -> Extent:
    return Extent(buffer.rows.factor, buffer.rows.symbol, tile)


def _scale(size: int) -> float:
    """Scores are in powers of two: D^-½ · log2(e)."""
    return math.log2(math.e) / math.sqrt(size)


class _Lowering:
    """One method an op, of the op's name."""

    def __init__(self, text: TextConfig | None, limits: Limits, forms: Forms) -> None:
        self._text, self._limits, self._forms = text, limits, forms

    def _heads(self) -> TextConfig:
        assert self._text is not None
        return self._text

    def _rowwise(
        self, node: Node, name: str, arguments: Arguments, constants: Mapping[str, Constant]
    ) -> Choice[Launch]:
        """A kernel over (rows of the result, blocks of its columns)."""
        grid = (_per_row(node.output), Extent(node.output.cols, tile="BLOCK"))
        return _always(node.output.rows, _call(name, {**arguments, "out": node.output}, grid, constants))

    def _arrays(self, node: Node, index: int, kinds: tuple[str, ...]) -> dict[str, WeightArray]:
        """What a weight consists of, by field."""
        name = node.weights[index].name
        kind = self._forms(name).kind
        if kind not in kinds:
            raise UsageError(f"the weight {name!r} is {kind}; the GPU reads it as {' or '.join(kinds)}")
        return {field: WeightArray(name, field, type) for field, type in _TYPES[kind].items()}

    def _plain(self, node: Node, index: int) -> WeightArray:
        """A weight that is f32 always."""
        return self._arrays(node, index, ("f32",))["values"]

    def embed(self, node: Node) -> Choice[Launch]:
        arrays = self._arrays(node, 0, ("f16", "f32", "int8"))
        arguments: Arguments = {
            "tokens": node.inputs[0],
            "table": arrays.get("values", arrays.get("codes")),
            "scales": arrays.get("scales"),
            "images": node.inputs[1] if len(node.inputs) > 1 else None,
        }
        return self._rowwise(node, "embed", arguments, {"C": node.output.cols, "Q": INT8_GROUP})

    def _norm(self, node: Node, centred: bool) -> Choice[Launch]:
        width = node.output.cols
        arguments: Arguments = {
            "x": node.inputs[0],
            "weight": self._plain(node, 0),
            "bias": WeightArray(node.weights[0].name, "bias", "*f32") if centred else None,
            "out": node.output,
        }
        sizes = {"C": width, "EPS": float(node.attrs["eps"]), "CENTRED": centred, "BLOCK": power_of_two(width)}
        call = _call("norm", arguments, (_per_row(node.output),), sizes)
        return _always(node.output.rows, call)

    def rms_norm(self, node: Node) -> Choice[Launch]:
        return self._norm(node, centred=False)

    def layer_norm(self, node: Node) -> Choice[Launch]:
        return self._norm(node, centred=True)

    def linear(self, node: Node) -> Choice[Launch]:
        name, out = node.weights[0].name, node.output
        form, k = self._forms(name), node.inputs[0].cols
        if node.attrs["activation"] not in (None, "gelu"):
            raise UsageError(f"the activation {node.attrs['activation']!r} does not exist; a linear has none or gelu")
        arrays = self._arrays(node, 0, ("f16", "int8", "int4"))
        biased = any(w.field == "bias" for w in node.weights)
        arguments: Arguments = {
            "x": node.inputs[0],
            "values": arrays.get("values", arrays.get("codes")),
            "scales": arrays.get("scales"),
            "bias": WeightArray(name, "bias", "*f32") if biased else None,
            "residual": node.inputs[1] if node.attrs["residual"] else None,
            "out": out,
            "rows": out.rows,
        }
        constants: dict[str, Constant] = {
            "KIND": form.kind,
            "N": out.cols,
            "K": k,
            "Q": form.group_size if form.kind == "int4" else INT8_GROUP,
            "GELU": node.attrs["activation"] == "gelu",
        }
        tiles = (_per_row(out, "BLOCK_M"), Extent(out.cols, tile="BLOCK_N"))
        panels = (Extent(-(-out.cols // 16)),)
        few, more = (_call("gemv", arguments, panels, constants, variant) for variant in ("few", "more"))
        many = _call("gemm", arguments, tiles, constants)
        return Choice(out.rows, ((FEW_ROWS, (few,)), (MORE_ROWS, (more,)), (_MANY, (many,))))

    def rope_write(self, node: Node) -> Choice[Launch]:
        text, layer = self._heads(), int(node.attrs["layer"])
        qkv, positions, slots = node.inputs
        arguments: Arguments = {
            "qkv": qkv,
            "positions": positions,
            "slots": slots,
            "turns": Region("turns", "*f32"),
            **self._cache(layer),
            "out": node.output,
        }
        grid = (_per_row(qkv), Extent(text.heads + 2 * text.kv_heads))
        sizes = {**self._cache_sizes(), "BLOCK": power_of_two(text.head_dim // 2)}
        call = _call("rope_write", arguments, grid, sizes)
        return _always(qkv.rows, call)

    def _cache(self, layer: int) -> Arguments:
        """Keys and values of a layer, and their scales when they are int8."""
        kv = self._limits.kv
        if kv not in CACHE_TYPES:
            raise UsageError(f"a KV cache of {kv} cannot run on a GPU; build with --kv {' or '.join(CACHE_TYPES)}")
        scaled = kv == "int8"
        return {
            "keys": Region("keys", CACHE_TYPES[kv], layer),
            "cached": Region("values", CACHE_TYPES[kv], layer),
            "key_scales": Region("key_scales", "*f32", layer) if scaled else None,
            "cached_scales": Region("value_scales", "*f32", layer) if scaled else None,
        }

    def _cache_sizes(self) -> dict[str, int]:
        text = self._heads()
        return {"HEADS": text.heads, "GROUPS": text.kv_heads, "D": text.head_dim, "CONTEXT": self._limits.context}

    def attention(self, node: Node) -> Choice[Launch]:
        text, layer, out = self._heads(), int(node.attrs["layer"]), node.output
        q, positions, slots = node.inputs
        read: Arguments = {
            "q": q,
            "positions": positions,
            "slots": slots,
            **self._cache(layer),
        }
        parts: Arguments = {"sums": Region("sums", "*f32"), "tops": Region("tops", "*f32")}
        sizes = {**self._cache_sizes(), "SCALE": _scale(text.head_dim), "BLOCK_D": power_of_two(text.head_dim, 16)}
        share = power_of_two(text.heads // text.kv_heads, 16)
        split = _call(
            "attend_split",
            {**read, **parts},
            (_per_row(out), Extent(text.kv_heads), Extent(SPLITS)),
            {**sizes, "SPLITS": SPLITS, "BLOCK_H": share},
        )
        rows = Extent(out.rows.factor * text.heads, out.rows.symbol)
        joined = {"D": text.head_dim, "SPLITS": SPLITS, "BLOCK_D": sizes["BLOCK_D"]}
        join = _call("attend_join", {**parts, "out": out}, (rows,), joined)
        grid = (_per_row(out, "BLOCK_M"), Extent(text.heads))
        flash = _call("attend", {**read, "out": out, "rows": out.rows}, grid, sizes)
        return Choice(out.rows, ((MORE_ROWS, (split, join)), (_MANY, (flash,))))

    def silu_mul(self, node: Node) -> Choice[Launch]:
        return self._rowwise(node, "silu_mul", {"gate_up": node.inputs[0]}, {"F": node.output.cols})

    def gather_rows(self, node: Node) -> Choice[Launch]:
        x, picked = node.inputs
        return self._rowwise(node, "gather_rows", {"x": x, "picked": picked}, {"C": node.output.cols})

    def patches(self, node: Node) -> Choice[Launch]:
        a = node.attrs
        sizes: dict[str, Constant] = {"SIDE": a["side"], "SIZE": a["patch_size"]}
        colours: dict[str, Constant] = {"MEAN": tuple(a["mean"]), "DEVIATION": tuple(a["std"])}
        return self._rowwise(node, "patches", {"pixels": node.inputs[0]}, sizes | colours)

    def vision_tokens(self, node: Node) -> Choice[Launch]:
        arguments: Arguments = {
            "x": node.inputs[0],
            "positions": self._plain(node, 0),
            "prefix": self._plain(node, 1),
        }
        sizes = {"P": node.attrs["patches"], "R": node.attrs["prefix"], "C": node.output.cols}
        return self._rowwise(node, "vision_tokens", arguments, sizes)

    def full_attention(self, node: Node) -> Choice[Launch]:
        out, tokens, heads = node.output, int(node.attrs["tokens"]), int(node.attrs["heads"])
        size = out.cols // heads
        grid = (Extent(out.rows.factor // tokens, out.rows.symbol), Extent(heads), Extent(tokens, tile="BLOCK_M"))
        sizes: dict[str, Constant] = {"HEADS": heads, "D": size, "TOKENS": tokens, "SCALE": _scale(size)}
        sizes["BLOCK_D"] = power_of_two(size, 16)
        return _always(out.rows, _call("full_attention", {"qkv": node.inputs[0], "out": out}, grid, sizes))

    def pixel_shuffle(self, node: Node) -> Choice[Launch]:
        x, grid, prefix = node.inputs[0], node.attrs["grid"], node.attrs["prefix"]
        return self._rowwise(node, "pixel_shuffle", {"x": x}, {"GRID": grid, "R": prefix, "C": x.cols})
