"""Runs a model once and keeps the list of kernel calls: the recorded half of `edgevl.ops`.

The recorder appends a `Node` for each call and hands out `Buffer`s; it computes nothing and allocates nothing.
`edgevl.memory` places the buffers in one arena, a backend lowers the nodes to its kernels. Who reads a graph:
`edgevl.backends.cpu`, later the CUDA backend and the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgevl.config import ModelConfig, TextConfig
from edgevl.models.decoder import decoder
from edgevl.models.vision import image_embeddings
from edgevl.ops import Linear, Norm, Step


@dataclass(frozen=True)
class Rows:
    """How many rows a buffer has in a step: `factor` times the step's count of `symbol`."""

    symbol: str  # "tokens" | "logits" | "images" | "tiles"
    factor: int = 1


@dataclass(frozen=True)
class Buffer:
    """An activation (rows, cols). Inputs and outputs keep their place for the whole step; the rest share memory."""

    index: int
    rows: Rows
    cols: int
    dtype: str  # "f32" | "i32" | "u8"
    name: str = ""  # of inputs and outputs


@dataclass(frozen=True)
class WeightRef:
    """A weight of the bundle by the model's own name; `field` is "weight" or "bias"."""

    name: str
    field: str
    shape: tuple[int, ...] = ()


Handle = Buffer | WeightRef


@dataclass(frozen=True)
class Node:
    """One kernel call: `op` is the method of `Ops`, `weights` in the order the op takes them."""

    op: str
    inputs: tuple[Buffer, ...]
    weights: tuple[WeightRef, ...]
    output: Buffer
    attrs: dict[str, Any]


@dataclass
class Graph:
    """What one replay does: its inputs by name, its nodes in order, its output."""

    name: str
    inputs: dict[str, Buffer] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    output: Buffer | None = None


class Recorder:
    """The `Ops` implementation that writes a `Graph`."""

    def __init__(self, name: str, shapes: dict[str, tuple[int, ...]], biases: frozenset[str]) -> None:
        """`shapes`: the shape of each part by name; `biases`: the linears that have one."""
        self.graph = Graph(name)
        self._shapes = shapes
        self._biases = biases

    def input(self, name: str, rows: Rows, cols: int, dtype: str) -> Buffer:
        """Declare an input (rows, cols) that the engine fills before each replay."""
        buffer = self._buffer(rows, cols, dtype, name)
        self.graph.inputs[name] = buffer
        return buffer

    def finish(self, output: Handle) -> Graph:
        """Name the result and return the graph."""
        assert isinstance(output, Buffer)
        self.graph.output = output
        return self.graph

    def _buffer(self, rows: Rows, cols: int, dtype: str = "f32", name: str = "") -> Buffer:
        buffer = Buffer(len(self.graph.buffers), rows, cols, dtype, name)
        self.graph.buffers.append(buffer)
        return buffer

    def _node(
        self,
        op: str,
        inputs: tuple[Handle | None, ...],
        weights: tuple[Handle | None, ...],
        rows: Rows,
        cols: int,
        **attrs: Any,
    ) -> Buffer:
        output = self._buffer(rows, cols)
        used = tuple(i for i in inputs if isinstance(i, Buffer))
        refs = tuple(w for w in weights if isinstance(w, WeightRef))
        self.graph.nodes.append(Node(op, used, refs, output, attrs))
        return output

    # -- weights ------------------------------------------------------------------------------------------------

    def linear_weight(self, name: str) -> Linear[Handle]:
        bias = WeightRef(name, "bias", self._shapes[name][:1]) if name in self._biases else None
        return Linear(WeightRef(name, "weight", self._shapes[name]), bias)

    def norm_weight(self, name: str) -> Norm[Handle]:
        bias = WeightRef(name, "bias", self._shapes[name]) if name in self._biases else None
        return Norm(WeightRef(name, "weight", self._shapes[name]), bias)

    def table(self, name: str) -> Handle:
        return WeightRef(name, "weight", self._shapes[name])

    # -- operations ---------------------------------------------------------------------------------------------

    def embed(self, tokens: Handle, table: Handle, images: Handle | None) -> Handle:
        assert isinstance(tokens, Buffer) and isinstance(table, WeightRef)
        return self._node("embed", (tokens, images), (table,), tokens.rows, table.shape[1])

    def rms_norm(self, x: Handle, norm: Norm[Handle], eps: float) -> Handle:
        assert isinstance(x, Buffer)
        return self._node("rms_norm", (x,), (norm.weight,), x.rows, x.cols, eps=eps)

    def layer_norm(self, x: Handle, norm: Norm[Handle], eps: float) -> Handle:
        assert isinstance(x, Buffer)
        return self._node("layer_norm", (x,), (norm.weight, norm.bias), x.rows, x.cols, eps=eps)

    def linear(
        self, x: Handle, layer: Linear[Handle], activation: str | None = None, residual: Handle | None = None
    ) -> Handle:
        assert isinstance(x, Buffer) and isinstance(layer.weight, WeightRef)
        n, k = layer.weight.shape
        assert x.cols == k, f"{layer.weight.name} takes {k} features, got {x.cols}"
        return self._node(
            "linear",
            (x, residual),
            (layer.weight, layer.bias),
            x.rows,
            n,
            activation=activation,
            residual=residual is not None,
        )

    def rope_write(self, qkv: Handle, step: Step[Handle], layer: int, config: TextConfig) -> Handle:
        assert isinstance(qkv, Buffer)
        inputs = (qkv, step.positions, step.slots)
        return self._node("rope_write", inputs, (), qkv.rows, config.heads * config.head_dim, layer=layer)

    def attention(self, q: Handle, step: Step[Handle], layer: int, config: TextConfig) -> Handle:
        assert isinstance(q, Buffer)
        return self._node("attention", (q, step.positions, step.slots), (), q.rows, q.cols, layer=layer)

    def silu_mul(self, gate_up: Handle) -> Handle:
        assert isinstance(gate_up, Buffer)
        return self._node("silu_mul", (gate_up,), (), gate_up.rows, gate_up.cols // 2)

    def gather_rows(self, x: Handle, rows: Handle) -> Handle:
        assert isinstance(x, Buffer) and isinstance(rows, Buffer)
        return self._node("gather_rows", (x, rows), (), rows.rows, x.cols)

    def patches(self, pixels: Handle, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Handle:
        assert isinstance(pixels, Buffer)
        side = round((pixels.cols // 3) ** 0.5)
        count = (side // patch_size) ** 2
        rows = Rows(pixels.rows.symbol, pixels.rows.factor * count)
        return self._node(
            "patches", (pixels,), (), rows, 3 * patch_size**2, side=side, patch_size=patch_size, mean=mean, std=std
        )

    def vision_tokens(self, x: Handle, positions: Handle, prefix: Handle) -> Handle:
        assert isinstance(x, Buffer) and isinstance(positions, WeightRef) and isinstance(prefix, WeightRef)
        count, extra = positions.shape[0], prefix.shape[0]
        rows = Rows(x.rows.symbol, x.rows.factor // count * (count + extra))
        return self._node("vision_tokens", (x,), (positions, prefix), rows, x.cols, patches=count, prefix=extra)

    def full_attention(self, qkv: Handle, heads: int, tokens: int) -> Handle:
        assert isinstance(qkv, Buffer)
        return self._node("full_attention", (qkv,), (), qkv.rows, qkv.cols // 3, heads=heads, tokens=tokens)

    def pixel_shuffle(self, x: Handle, grid: int, prefix: int) -> Handle:
        assert isinstance(x, Buffer)
        tiles = x.rows.factor // (prefix + grid * grid)
        rows = Rows(x.rows.symbol, tiles * grid * grid // 4)
        return self._node("pixel_shuffle", (x,), (), rows, 4 * x.cols, grid=grid, prefix=prefix)


def _recorder(name: str, config: ModelConfig) -> Recorder:
    from edgevl.models.names import all_parts

    parts = all_parts(config)
    return Recorder(name, {p.name: p.shape for p in parts}, frozenset(p.name for p in parts if p.bias))


def record_decoder(config: ModelConfig) -> Graph:
    """The decoder's graph: inputs tokens, positions, slots, logit_rows (and images); output logits (L, V)."""
    ops = _recorder("decoder", config)
    per_token = Rows("tokens")
    step = Step[Handle](
        tokens=ops.input("tokens", per_token, 1, "i32"),
        positions=ops.input("positions", per_token, 1, "i32"),
        slots=ops.input("slots", per_token, 1, "i32"),
        images=ops.input("images", Rows("images"), config.text.hidden_size, "f32") if config.vision else None,
        logit_rows=ops.input("logit_rows", Rows("logits"), 1, "i32"),
    )
    return ops.finish(decoder(ops, config.text, step))


def record_vision(config: ModelConfig) -> Graph:
    """The vision graph: input pixels (n, S·S·3) uint8; output image embeddings (n·P/4, C)."""
    assert config.vision is not None and config.projector is not None
    ops = _recorder("vision", config)
    pixels = ops.input("pixels", Rows("tiles"), 3 * config.vision.tile_size**2, "u8")
    return ops.finish(image_embeddings(ops, config.vision, config.projector, pixels))


def record_model(config: ModelConfig) -> list[Graph]:
    """The graphs that a backend replays: the decoder's, and the vision graph of a model that sees."""
    return [record_decoder(config), *([record_vision(config)] if config.vision is not None else [])]
