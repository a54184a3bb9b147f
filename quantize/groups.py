"""Which scales AWQ may move where, as a table: an op, the linears that read its output, and what to measure.

A model family is added here by listing its groups; the search in `quantize.awq` only reads the table. Modules are
checkpoint modules as `edgevl.models.names` spells them, without ".weight".
"""

from __future__ import annotations

from dataclasses import dataclass

from edgevl.config import ModelConfig
from edgevl.models.names import Part, text_parts


@dataclass(frozen=True)
class ScaleGroup:
    """One scale vector over the K in-features of `linears`: their columns are multiplied, `previous` is divided."""

    name: str  # for people: "attn_norm -> q, k, v"
    previous: str  # module whose output is divided by the scale: a norm, or a linear (its rows)
    linears: tuple[str, ...]
    input_part: str  # the model's part whose input the linears read
    measure: str  # "attention" | "mlp" | "linear": the piece of the block whose output error decides
    shared_heads: bool = False  # GQA: query heads of one KV head must share their scale


@dataclass(frozen=True)
class BlockTable:
    """One decoder block, ready for AWQ."""

    layer: int
    parts: tuple[Part, ...]
    groups: tuple[ScaleGroup, ...]
    clip: dict[str, str]  # linears whose ranges are clipped, and the part whose input each reads

    @property
    def linears(self) -> tuple[str, ...]:
        """Every module that becomes int4, in the order of the forward pass."""
        return tuple(source for part in self.parts if part.kind == "linear" for source in part.sources)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norm modules, which scales are folded into."""
        return tuple(source for part in self.parts if part.kind == "norm" for source in part.sources)


def block_table(config: ModelConfig, layer: int) -> BlockTable:
    """The table of a Llama decoder block. q and k are not clipped: attention suffers more than their error shows."""
    own = f"layers.{layer}"
    parts = {part.name.removeprefix(f"{own}."): part for part in text_parts(config) if part.name.startswith(f"{own}.")}
    q, k, v = parts["qkv"].sources
    gate, up = parts["gate_up"].sources
    (o,), (down,) = parts["o"].sources, parts["down"].sources
    (attn_norm,), (mlp_norm,) = parts["attn_norm"].sources, parts["mlp_norm"].sources
    return BlockTable(
        layer=layer,
        parts=tuple(parts.values()),
        groups=(
            ScaleGroup("attn_norm -> q, k, v", attn_norm, (q, k, v), f"{own}.qkv", "attention"),
            ScaleGroup("v -> o", v, (o,), f"{own}.o", "linear", shared_heads=True),
            ScaleGroup("mlp_norm -> gate, up", mlp_norm, (gate, up), f"{own}.gate_up", "mlp"),
            ScaleGroup("up -> down", up, (down,), f"{own}.down", "linear"),
        ),
        clip={v: f"{own}.qkv", o: f"{own}.o", gate: f"{own}.gate_up", up: f"{own}.gate_up", down: f"{own}.down"},
    )
