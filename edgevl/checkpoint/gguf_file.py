"""Llama language models in GGUF files, presented as if they lay in Hugging Face's layout.

Tensors are dequantized one at a time when read; llama.cpp's reordering of q and k rows is undone. Metadata becomes the
config.json that transformers would have written. The only user of the gguf package, imported when first needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.checkpoint.gguf_tokenizer import tokenizer_files
from edgevl.checkpoint.store import Array
from edgevl.config import RopeScaling, TextConfig
from edgevl.errors import CheckpointError, MissingExtraError
from edgevl.rope import inverse_frequencies
from edgevl.safetensors_file import TensorSpec

_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_TOP["output.weight"] = "lm_head.weight"
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# llama3 scaling is stored as its result only; these are the published settings that it is recognised by
_LLAMA3 = (RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192))
_DIGEST_HEAD = 16 << 20  # bytes of the file that enter the digest: metadata and the first tensors


class GgufStore:
    """The tensors of a GGUF Llama under Hugging Face names. `heads`: (query heads, KV heads), to order q and k rows."""

    def __init__(self, path: Path, tensors: dict[str, Any], heads: tuple[int, int]) -> None:
        self.path = path
        self._tensors = tensors
        self._heads = heads

    def specs(self) -> Iterable[TensorSpec]:
        return [
            TensorSpec(name, _stored_dtype(t), tuple(int(d) for d in reversed(t.shape)))
            for name, t in self._tensors.items()
        ]

    def raw(self, name: str) -> Array:
        """As `array`: a quantized GGUF block has no meaning outside its file."""
        return self.array(name, 0, None)

    def array(self, name: str, start: int, stop: int | None) -> Array:
        """Rows start..stop, dequantized: f16 tensors stay f16, everything else is f32."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        permuted = name.endswith((".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias"))
        data = np.asarray(tensor.data) if permuted else np.asarray(tensor.data)[start:stop]
        if data.dtype not in (np.float16, np.float32):
            try:
                data = dequantize(data, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(f"{self.path}: the tensor {tensor.name} is in {error}") from error
        if permuted:
            data = _undo_permutation(data, self._heads[".k_proj." in name])[start:stop]
        return data

    def digest(self) -> str:
        sha = hashlib.sha256(f"{self.path.stat().st_size}\n".encode())
        with self.path.open("rb") as file:
            sha.update(file.read(_DIGEST_HEAD))
        return sha.hexdigest()

    def release(self) -> None:
        """Nothing is kept here."""


def read_gguf(path: Path) -> tuple[GgufStore, dict[str, bytes]]:
    """The tensors, and config.json, tokenizer.json, tokenizer_config.json as they would lie in a folder.

    Raises `CheckpointError` for a file that is damaged, not a Llama, or has a tokenizer that cannot be converted.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        from gguf import GGUFReader
    except ImportError as missing:
        raise MissingExtraError(f"reading {path.name}", "gguf", "'edgevl[deploy]'") from missing
    try:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader trusts its input: a damaged file fails in any way
        raise CheckpointError(f"{path} is not a readable GGUF file ({type(error).__name__}: {error})") from error
    tensors = {t.name: t for t in reader.tensors}
    try:
        config = _config(meta, tensors)
        files = {"config.json": json.dumps(config, indent=2).encode(), **tokenizer_files(meta)}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    renamed = {_name(name): t for name, t in tensors.items() if name != _ROPE_FACTORS}
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    return GgufStore(path, renamed, heads), files


def _config(meta: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json's content from GGUF metadata."""
    kind = meta.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"general.architecture is {kind!r}; of GGUF files only llama is read")
    if meta.get("split.count", 1) > 1:
        raise CheckpointError("this is one part of a split GGUF file; merge the parts with llama-gguf-split first")
    if meta.get("llama.expert_count"):
        raise CheckpointError("llama.expert_count is set; mixtures of experts are not supported")
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"llama.rope.scaling.type is {meta['llama.rope.scaling.type']!r}; only none is supported")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("the tensor token_embd.weight is missing")
    hidden, heads = _whole(meta, "llama.embedding_length"), _whole(meta, "llama.attention.head_count")
    head_dim = _whole(meta, "llama.attention.key_length", hidden // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if meta.get(key, head_dim) != head_dim:
            raise CheckpointError(f"{key} is {meta[key]!r}, but heads are {head_dim} wide; they must agree")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _whole(meta, "llama.feed_forward_length"),
        "num_hidden_layers": _whole(meta, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(meta, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_act": "silu",
        # the file holds an f32; its shortest decimal is what the original config said
        "rms_norm_eps": float(str(np.float32(meta.get("llama.attention.layer_norm_rms_epsilon", 1e-5)))),
        "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "max_position_embeddings": _whole(meta, "llama.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "torch_dtype": "float16",
    }
    for key in ("bos", "eos"):
        if (value := meta.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{key}_token_id"] = int(value)
    if _ROPE_FACTORS in tensors:
        config["rope_scaling"] = _recognise_scaling(config, np.asarray(tensors[_ROPE_FACTORS].data, np.float64))
    return config


def _recognise_scaling(config: dict[str, Any], factors: Array) -> dict[str, Any]:
    """Which published llama3 scaling gives the stored divisors of the frequencies."""
    for scaling in _LLAMA3:
        text = TextConfig(2, 1, 1, 1, 1, config["head_dim"], 1, 1e-5, config["rope_theta"], None, 1, False, False)
        scaled = TextConfig(2, 1, 1, 1, 1, config["head_dim"], 1, 1e-5, config["rope_theta"], scaling, 1, False, False)
        expected = inverse_frequencies(text) / inverse_frequencies(scaled)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    raise CheckpointError(f"{_ROPE_FACTORS} holds rotary factors of no known Llama; convert it from the original again")


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _BLOCK:
        return name  # refused by name when the tensors are checked
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def _undo_permutation(rows: Array, heads: int) -> Array:
    """llama.cpp interleaves the two rotated halves of each head, (heads, D/2, 2, …); back to (heads, 2, D/2, …)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _stored_dtype(tensor: Any) -> str:
    return "F16" if np.asarray(tensor.data).dtype == np.float16 else "F32"


def _whole(meta: dict[str, Any], key: str, default: int | None = None) -> int:
    value = meta.get(key, default)
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{key} is {value!r}; a whole number above zero is needed")
    return value
