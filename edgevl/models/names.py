"""The model's own tensor names, and the checkpoint tensors each is made of.

The model's names are short and fused where one kernel reads several projections ("qkv", "gate_up"); a bundle stores
these. A checkpoint stores Hugging Face names. This table is the only place where the two meet. The quantizer, the
builder and the reference all read it; none of them spells a checkpoint name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgevl.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One tensor group of the model. `sources` are checkpoint modules (without `.weight`), joined row after row."""

    name: str
    kind: str  # "linear" | "norm" | "table"
    sources: tuple[str, ...]
    shape: tuple[int, ...]  # (N, K) of a linear, (C,) of a norm, shape of a table as the model sees it
    bias: bool = False
    region: str = "text"  # "text" | "embed" | "head" | "vision" | "projector": what a build option is about


def text_parts(config: ModelConfig) -> Iterator[Part]:
    """The decoder's parts, in the order of the forward pass."""
    t = config.text
    c, f = t.hidden_size, t.intermediate_size
    yield Part("embed", "table", ("model.embed_tokens",), (t.vocab_size, c), region="embed")
    for i in range(t.layers):
        hf, own = f"model.layers.{i}", f"layers.{i}"
        attn, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        yield Part(f"{own}.attn_norm", "norm", (f"{hf}.input_layernorm",), (c,))
        qkv = (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj")
        yield Part(f"{own}.qkv", "linear", qkv, (t.qkv_size, c), bias=t.qkv_bias)
        yield Part(f"{own}.o", "linear", (f"{attn}.o_proj",), (c, t.heads * t.head_dim))
        yield Part(f"{own}.mlp_norm", "norm", (f"{hf}.post_attention_layernorm",), (c,))
        yield Part(f"{own}.gate_up", "linear", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (2 * f, c))
        yield Part(f"{own}.down", "linear", (f"{mlp}.down_proj",), (c, f))
    yield Part("norm", "norm", ("model.norm",), (c,))
    head = "model.embed_tokens" if t.tied_embeddings else "lm_head"
    yield Part("head", "linear", (head,), (t.vocab_size, c), region="head")


def vision_parts(config: ModelConfig) -> Iterator[Part]:
    """The vision tower's and the projector's parts; nothing for a text-only model."""
    v, p = config.vision, config.projector
    if v is None or p is None:
        return
    c, hf = v.hidden_size, "vision_model.radio_model.model"
    pixels = 3 * v.patch_size**2
    yield Part("vision.patch", "linear", (f"{hf}.patch_generator.embedder",), (c, pixels), region="vision")
    # stored as (1, grid², C) and resized to the tile's own grid by `edgevl.checkpoint.positions`
    yield Part("vision.positions", "table", (f"{hf}.patch_generator.pos_embed",), (v.patches, c), region="vision")
    prefix = (f"{hf}.patch_generator.cls_token.token",)
    yield Part("vision.prefix", "table", prefix, (v.prefix_tokens, c), region="vision")
    for i in range(v.layers):
        block, own = f"{hf}.blocks.{i}", f"vision.blocks.{i}"
        yield Part(f"{own}.norm1", "norm", (f"{block}.norm1",), (c,), bias=True, region="vision")
        yield Part(f"{own}.qkv", "linear", (f"{block}.attn.qkv",), (3 * c, c), bias=True, region="vision")
        yield Part(f"{own}.proj", "linear", (f"{block}.attn.proj",), (c, c), bias=True, region="vision")
        yield Part(f"{own}.norm2", "norm", (f"{block}.norm2",), (c,), bias=True, region="vision")
        f = v.intermediate_size
        yield Part(f"{own}.fc1", "linear", (f"{block}.mlp.fc1",), (f, c), bias=True, region="vision")
        yield Part(f"{own}.fc2", "linear", (f"{block}.mlp.fc2",), (c, f), bias=True, region="vision")
    wide, h = 4 * c, p.hidden_size
    yield Part("projector.norm", "norm", ("mlp1.0",), (wide,), bias=True, region="projector")
    yield Part("projector.fc1", "linear", ("mlp1.1",), (h, wide), bias=True, region="projector")
    yield Part("projector.fc2", "linear", ("mlp1.3",), (config.text.hidden_size, h), bias=True, region="projector")


def all_parts(config: ModelConfig) -> list[Part]:
    """Every part of the model."""
    return [*text_parts(config), *vision_parts(config)]


def tensor_names(part: Part) -> list[str]:
    """The checkpoint tensors of a part when nothing is quantized: (weight of each source), then (bias of each source).

    Tables that are bare parameters (`pos_embed`, `token`) carry no `.weight` suffix.
    """
    if part.name in ("vision.positions", "vision.prefix"):
        return list(part.sources)
    names = [f"{source}.weight" for source in part.sources]
    return names + ([f"{source}.bias" for source in part.sources] if part.bias else [])
