"""Tiny random checkpoints in the exact layout of the real ones, for every test that needs a model on disk.

`tiny_vl` writes a `Llama_Nemotron_Nano_VL`, `tiny_llama` a plain `LlamaForCausalLM` that transformers loads too. Both
have a real tokenizer (byte-level BPE, Llama-3 control tokens, the nine image tokens) and a Llama-3 chat template.
Weights come from a seed; the same arguments give the same bytes. `text_tensors` and `vision_tensors` give the arrays as
they were before storage, for tests that compute with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.awq_format import pack
from edgevl.safetensors_file import TensorSpec, f32_to_bf16, write_safetensors
from edgevl.weights import quantize_int4

Tensors = dict[str, NDArray[Any]]

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
IMAGE_TOKENS = ("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
MERGES = [
    *("Ġ t", "h e", "i n", "Ġ a", "Ġt he", "o n", "e r", "r e", "Ġ s", "a t", "e n", "o r", "Ġ w", "Ġ o", "i s", "i t"),
    *(
        "Ġ c",
        "a l",
        "l l",
        "Ġ p",
        "in g",
        "Ġ f",
        "Ġ b",
        "e d",
        "Ġ m",
        "a n",
        "o u",
        "Ġ d",
        "Ġo f",
        "a r",
        "Ġa n",
        "e s",
    ),
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a tiny model; any of them can be given to `tiny_vl` and `tiny_llama` by name."""

    hidden: int = 64
    ff: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # hidden / heads unless given
    vocab: int = 320
    max_positions: int = 1024
    rope_theta: float = 10000.0
    llama3_rope: bool = True
    tied: bool = False
    qkv_bias: bool = False
    vision_hidden: int = 32
    vision_layers: int = 2
    vision_heads: int = 2
    tile: int = 64  # pixels
    patch: int = 16  # pixels
    prefix: int = 8
    grid: int = 8  # side of the position table
    projector: int = 64
    max_tiles: int = 4

    @property
    def d(self) -> int:
        return self.head_dim or self.hidden // self.heads


def tiny_vl(
    path: Path,
    dtype: str = "f32",
    seed: int = 0,
    *,
    shards: int = 1,
    awq: bool = False,
    group_size: int = 32,
    symmetric: bool = False,
    **sizes: Any,
) -> Path:
    """Write a tiny vision-language checkpoint into the folder `path` and return it.

    `dtype` f32, f16 or bf16; `awq` stores the decoder's linears in AutoAWQ's layout, in groups of `group_size`.
    """
    s = replace(Sizes(), **sizes)
    tensors: Tensors = {f"language_model.{name}": t for name, t in text_tensors(s, seed).items()}
    tensors |= vision_tensors(s, seed)
    path.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["Llama_Nemotron_Nano_VL"],
        "model_type": "Llama_Nemotron_Nano_VL",
        "force_image_size": s.tile,
        "patch_size": s.patch,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "projector_hidden_size": s.projector,
        "vit_hidden_size": s.vision_hidden,
        "torch_dtype": _TORCH[dtype],
        "llm_config": {**_llama_config(s, dtype), "model_type": "llama"},
        "vision_config": {
            "patch_size": s.patch,
            "args": {
                "model": "vit_tiny_patch16_224",
                "model_kwargs": {
                    "embed_dim": s.vision_hidden,
                    "depth": s.vision_layers,
                    "num_heads": s.vision_heads,
                },
                "cpe_max_size": s.grid * s.patch,
                "register_multiple": s.prefix,
            },
        },
    }
    preprocessor = {"image_size": s.tile, "max_num_tiles": s.max_tiles, "use_thumbnail": True, "do_normalize": False}
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    _write(path, config, tensors, dtype, shards, awq, group_size, symmetric)
    return path


def tiny_llama(
    path: Path,
    dtype: str = "f32",
    seed: int = 0,
    *,
    shards: int = 1,
    awq: bool = False,
    group_size: int = 32,
    symmetric: bool = False,
    **sizes: Any,
) -> Path:
    """Write a tiny plain Llama checkpoint into the folder `path` and return it; see `tiny_vl`."""
    s = replace(Sizes(), **sizes)
    path.mkdir(parents=True, exist_ok=True)
    config = {**_llama_config(s, dtype), "model_type": "llama", "torch_dtype": _TORCH[dtype]}
    _write(path, config, text_tensors(s, seed), dtype, shards, awq, group_size, symmetric)
    return path


def text_tensors(s: Sizes, seed: int = 0) -> Tensors:
    """The decoder's f32 tensors under their Hugging Face names."""
    r = np.random.RandomState(seed)
    c, f, d = s.hidden, s.ff, s.d
    tensors: Tensors = {"model.embed_tokens.weight": _normal(r, (s.vocab, c), 1.0)}
    for i in range(s.layers):
        p = f"model.layers.{i}"
        tensors[f"{p}.input_layernorm.weight"] = 1 + _normal(r, (c,), 0.1)
        for name, rows in (("q", s.heads * d), ("k", s.kv_heads * d), ("v", s.kv_heads * d)):
            tensors[f"{p}.self_attn.{name}_proj.weight"] = _linear(r, rows, c)
            if s.qkv_bias:
                tensors[f"{p}.self_attn.{name}_proj.bias"] = _normal(r, (rows,), 0.1)
        tensors[f"{p}.self_attn.o_proj.weight"] = _linear(r, c, s.heads * d)
        tensors[f"{p}.post_attention_layernorm.weight"] = 1 + _normal(r, (c,), 0.1)
        tensors[f"{p}.mlp.gate_proj.weight"] = _linear(r, f, c)
        tensors[f"{p}.mlp.up_proj.weight"] = _linear(r, f, c)
        tensors[f"{p}.mlp.down_proj.weight"] = _linear(r, c, f)
    tensors["model.norm.weight"] = 1 + _normal(r, (c,), 0.1)
    if not s.tied:
        tensors["lm_head.weight"] = _linear(r, s.vocab, c)
    return tensors


def vision_tensors(s: Sizes, seed: int = 0) -> Tensors:
    """The vision tower's and the projector's f32 tensors under their names in the checkpoint."""
    r = np.random.RandomState(seed + 1)
    c, p = s.vision_hidden, "vision_model.radio_model.model"
    tensors: Tensors = {
        "vision_model.radio_model.input_conditioner.norm_mean": np.array(CLIP_MEAN, np.float32).reshape(3, 1, 1),
        "vision_model.radio_model.input_conditioner.norm_std": np.array(CLIP_STD, np.float32).reshape(3, 1, 1),
        f"{p}.patch_generator.embedder.weight": _linear(r, c, 3 * s.patch**2),
        f"{p}.patch_generator.pos_embed": _normal(r, (1, s.grid**2, c), 0.5),
        f"{p}.patch_generator.cls_token.token": _normal(r, (s.prefix, c), 0.5),
    }
    for i in range(s.vision_layers):
        b = f"{p}.blocks.{i}"
        _norm(tensors, r, f"{b}.norm1", c)
        _biased(tensors, r, f"{b}.attn.qkv", 3 * c, c)
        _biased(tensors, r, f"{b}.attn.proj", c, c)
        _norm(tensors, r, f"{b}.norm2", c)
        _biased(tensors, r, f"{b}.mlp.fc1", 4 * c, c)
        _biased(tensors, r, f"{b}.mlp.fc2", c, 4 * c)
    _norm(tensors, r, "mlp1.0", 4 * c)
    _biased(tensors, r, "mlp1.1", s.projector, 4 * c)
    _biased(tensors, r, "mlp1.3", s.hidden, s.projector)
    return tensors


def tokenizer_json(vocab: int = 320) -> dict[str, Any]:
    """A byte-level BPE tokenizer: 256 bytes, 32 merges, then the control and image tokens."""
    pieces = [*_byte_alphabet(), *(m.replace(" ", "") for m in MERGES)]
    special = [*CONTROL_TOKENS, *IMAGE_TOKENS]
    assert len(pieces) + len(special) <= vocab, "the tiny tokenizer needs more rows"
    added = [
        {
            "id": len(pieces) + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in enumerate(special)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [m.split(" ") for m in MERGES],
        },
    }


_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def _llama_config(s: Sizes, dtype: str) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    added = {t["content"]: t["id"] for t in tokenizer_json(s.vocab)["added_tokens"]}
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": s.hidden,
        "intermediate_size": s.ff,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.d,
        "vocab_size": s.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": s.rope_theta,
        "rope_scaling": scaling if s.llama3_rope else None,
        "max_position_embeddings": s.max_positions,
        "tie_word_embeddings": s.tied,
        "attention_bias": s.qkv_bias,
        "mlp_bias": False,
        "bos_token_id": added["<|begin_of_text|>"],
        "eos_token_id": added["<|eot_id|>"],
        "torch_dtype": _TORCH[dtype],
    }


def _write(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    dtype: str,
    shards: int,
    awq: bool,
    group_size: int,
    symmetric: bool,
) -> None:
    stored: dict[str, tuple[NDArray[Any], bool]] = {}
    for name, values in tensors.items():
        if awq and name.endswith("_proj.weight"):
            for field, array in pack(quantize_int4(values, group_size, symmetric)).items():
                stored[f"{name.removesuffix('weight')}{field}"] = (array, False)
        elif dtype == "bf16":
            stored[name] = (f32_to_bf16(values), True)
        else:
            stored[name] = (values.astype(np.float16 if dtype == "f16" else np.float32), False)
    if awq:
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["vision_model", "mlp1", "lm_head"],
        }
    names = list(stored)
    weight_map = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        specs = [TensorSpec.of(n, *stored[n]) for n in mine]
        write_safetensors(path / file, specs, ((n, stored[n][0]) for n in mine), {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        total = sum(array.nbytes for array, _ in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    vocab = config.get("llm_config", config)["vocab_size"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocab), ensure_ascii=False), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": config.get("llm_config", config)["eos_token_id"]})
    )


def _normal(r: np.random.RandomState, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    return (r.standard_normal(shape) * std).astype(np.float32)


def _linear(r: np.random.RandomState, n: int, k: int) -> NDArray[np.float32]:
    return _normal(r, (n, k), k**-0.5)


def _norm(tensors: Tensors, r: np.random.RandomState, name: str, width: int) -> None:
    tensors[f"{name}.weight"] = 1 + _normal(r, (width,), 0.1)
    tensors[f"{name}.bias"] = _normal(r, (width,), 0.1)


def _biased(tensors: Tensors, r: np.random.RandomState, name: str, n: int, k: int) -> None:
    tensors[f"{name}.weight"] = _linear(r, n, k)
    tensors[f"{name}.bias"] = _normal(r, (n,), 0.1)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]
