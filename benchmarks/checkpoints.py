"""Random Llama checkpoints of any size, written tensor by tensor: bf16, a byte-level tokenizer, a chat template.

Nothing in them means anything; they are as large as the real thing and run through the same code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.prompt import LLAMA3_TEMPLATE
from edgevl.safetensors_file import TensorSpec, f32_to_bf16, write_safetensors

_CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Sizes:
    """The 8B's, unless said otherwise."""

    hidden: int = 4096
    ff: int = 14336
    layers: int = 4
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128512


TINY = Sizes(hidden=64, ff=128, layers=3, heads=4, kv_heads=2, vocab=320)


def write_llama(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    """A `LlamaForCausalLM` checkpoint of random bf16 weights in `folder`, made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in _shapes(sizes).items()]
    write_safetensors(folder / "model.safetensors", specs, _tensors(specs, seed), {"format": "pt"})
    tokens = _alphabet()
    special = {token: len(tokens) + i for i, token in enumerate(_CONTROL)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ff,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "vocab_size": sizes.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": special["<|begin_of_text|>"],
        "eos_token_id": special["<|eot_id|>"],
        "torch_dtype": "bfloat16",
    }
    files: dict[str, Any] = {
        "config.json": config,
        "tokenizer.json": _tokenizer(tokens, special),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "chat_template": LLAMA3_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def _shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    d = s.hidden // s.heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s.vocab, s.hidden)}
    for i in range(s.layers):
        block = f"model.layers.{i}"
        shapes[f"{block}.input_layernorm.weight"] = (s.hidden,)
        for name, rows in (("q", s.heads * d), ("k", s.kv_heads * d), ("v", s.kv_heads * d)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, s.hidden)
        shapes[f"{block}.self_attn.o_proj.weight"] = (s.hidden, s.heads * d)
        shapes[f"{block}.post_attention_layernorm.weight"] = (s.hidden,)
        shapes[f"{block}.mlp.gate_proj.weight"] = (s.ff, s.hidden)
        shapes[f"{block}.mlp.up_proj.weight"] = (s.ff, s.hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (s.hidden, s.ff)
    shapes["model.norm.weight"] = (s.hidden,)
    shapes["lm_head.weight"] = (s.vocab, s.hidden)
    return shapes


def _tensors(specs: list[TensorSpec], seed: int) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    random = np.random.default_rng(seed)
    for spec in specs:
        if len(spec.shape) == 1:
            values = np.ones(spec.shape, np.float32)
        else:
            values = random.standard_normal(spec.shape, np.float32)
            values *= 1.0 if "embed" in spec.name else spec.shape[1] ** -0.5
        yield spec.name, f32_to_bf16(values)


def _tokenizer(tokens: dict[str, int], special: dict[str, int]) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": tokens, "merges": []}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": at, "content": token, **flags} for token, at in special.items()],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def _alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level tokenizers for the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return {chr(byte) if byte in printable else chr(next(shifted)): byte for byte in range(256)}
