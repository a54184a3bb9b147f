"""The models that are run: random ones at the 8B's true sizes, for edgevl and for llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu import models as gpu_models
from benchmarks.gpu.models import Weights
from edgevl.config import ModelConfig, ProjectorConfig
from edgevl.layouts import int4_shapes, int8_shapes
from edgevl.models.names import Part

Array = NDArray[Any]
_SPREAD = 4.6  # standard deviation of codes 0..15 around 8
_Q4_0 = gguf.GGMLQuantizationType.Q4_0
_Q6_K = gguf.GGMLQuantizationType.Q6_K


def eight_b(blocks: int) -> ModelConfig:
    """The 8B's language model with `blocks` of its 32 blocks (0: all)."""
    whole = gpu_models.eight_b()
    text = replace(whole.text, layers=blocks or whole.text.layers)
    return replace(whole, text=text, vision=None, projector=None, tiling=None)


def tower(blocks: int) -> ModelConfig:
    """The 8B's vision tower with `blocks` of its 32 blocks, behind it a language model too small to matter."""
    whole = gpu_models.eight_b()
    assert whole.vision is not None
    text = replace(whole.text, hidden_size=128, intermediate_size=256, layers=1, heads=1, kv_heads=1)
    vision = replace(whole.vision, layers=blocks or whole.vision.layers)
    return replace(whole, text=text, vision=vision, projector=ProjectorConfig(4096))  # its widest, as in the 8B


def random_weights(config: ModelConfig) -> Weights:
    """Weights by name as a bundle would store them: the body int4 in groups of 128, head and vision int8."""
    return gpu_models.random_weights(config, linear=_panels)


def _panels(part: Part, random: np.random.Generator) -> tuple[str, dict[str, Array]]:
    n, k = part.shape
    if part.region == "text":
        shapes = int4_shapes(n, k, 128)
        arrays: dict[str, Array] = {field: _bytes(random, *shapes[field]) for field in ("codes", "zeros")}
        arrays["zeros"] &= 15
        arrays["scales"] = np.full(shapes["scales"][1], 1 / (_SPREAD * k**0.5), np.float16)
        return "int4", arrays
    shapes = int8_shapes(n, k)
    codes = _bytes(random, *shapes["codes"])
    return "int8", {"codes": codes, "scales": np.full(shapes["scales"][1], 1 / (73 * k**0.5), np.float32)}


def _bytes(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    kind = {"U8": np.uint8, "I8": np.int8}[dtype]
    return (
        random.integers(0, 1 << 63, -(-int(np.prod(shape)) // 8), np.int64).view(kind)[: np.prod(shape)].reshape(shape)
    )


def write_random_gguf(path: Path, blocks: int) -> None:
    """The 8B's language model in llama.cpp's Q4_0 as its own quantizer would mix it (the head in Q6_K), random."""
    config = eight_b(blocks).text
    size, width, head_rows = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_tensor("output_norm.weight", np.ones(size, np.float32))
    shapes = {"token_embd": (config.vocab_size, size), "output": (config.vocab_size, size)}
    for i in range(config.layers):
        for name in ("attn", "ffn"):
            writer.add_tensor(f"blk.{i}.{name}_norm.weight", np.ones(size, np.float32))
        rows = {"attn_q": (size, size), "attn_k": (head_rows, size), "attn_v": (head_rows, size)}
        rows |= {"attn_output": (size, size), "ffn_gate": (width, size), "ffn_up": (width, size)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (rows | {"ffn_down": (size, width)}).items()}
    random = np.random.default_rng(0)
    made = cache(lambda shape, kind: _quantized(random, shape, kind))  # equal shapes hold equal numbers
    for name, shape in shapes.items():
        kind = _Q6_K if name == "output" else _Q4_0
        writer.add_tensor(f"{name}.weight", made(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def _quantized(random: np.random.Generator, shape: tuple[int, int], kind: gguf.GGMLQuantizationType) -> Array:
    """Random blocks (rows, bytes) with a scale of about 1/√K, where each kind keeps it."""
    values, each = gguf.GGML_QUANT_SIZES[kind]
    blocks = _bytes(random, "U8", (shape[0] * shape[1] // values, each)).copy()
    scale = 1 / (_SPREAD * shape[1] ** 0.5)
    if kind == _Q6_K:  # the last two bytes, times sixteen int8
        blocks[:, each - 2 :] = np.array([scale / 512], np.float16).view(np.uint8)
    else:
        blocks[:, :2] = np.array([scale], np.float16).view(np.uint8)
    rows: Array = blocks.reshape(shape[0], -1)
    return rows
