"""GGUF Llamas: weights, settings and tokenizer come out as the Hugging Face original has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer

from checkpoints import Sizes, text_tensors, tokenizer_json
from edgevl.checkpoint import open_checkpoint
from edgevl.checkpoint.gguf_tokenizer import tokenizer_files
from edgevl.config import RopeScaling
from edgevl.errors import CheckpointError

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        module, suffix = name.rsplit(".", 1)
        return f"{top[module]}.{suffix}"
    _, _, layer, rest = name.split(".", 3)
    module, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{suffix}"


def permuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The order that llama.cpp stores q and k in: row (h, half, d) goes to (h, d, half)."""
    out = np.empty_like(rows)
    d = rows.shape[0] // heads
    for h in range(heads):
        for half in range(2):
            for i in range(d // 2):
                out[h * d + 2 * i + half] = rows[h * d + half * (d // 2) + i]
    return out


def write(path: Path, quant: str = "F32", meta: dict[str, Any] | None = None, **sizes: Any) -> Sizes:
    s = Sizes(llama3_rope=False, **sizes)
    writer = gguf.GGUFWriter(path, "llama")
    tree = tokenizer_json(s.vocab)
    tokens = [*tree["model"]["vocab"], *(t["content"] for t in tree["added_tokens"])]
    real = len(tokens)
    tokens += [f"[PAD{i}]" for i in range(real, s.vocab)]
    types = [1] * len(tree["model"]["vocab"]) + [3] * len(tree["added_tokens"]) + [5] * (s.vocab - real)
    writer.add_context_length(s.max_positions)
    writer.add_embedding_length(s.hidden)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.ff)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(s.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre((meta or {}).pop("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(m) for m in tree["model"]["merges"]])
    writer.add_bos_token_id(288)
    writer.add_eos_token_id(292)
    writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
    for key, value in (meta or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in text_tensors(s).items():
        if ".q_proj." in name or ".k_proj." in name:
            values = permuted(values, s.heads if ".q_proj." in name else s.kv_heads)
        if quant == "F16" and values.ndim == 2:
            writer.add_tensor(gguf_name(name), values.astype(np.float16))
        elif quant != "F32" and values.ndim == 2:
            kind = gguf.GGMLQuantizationType[quant]
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return s


@pytest.mark.parametrize("quant", ["F32", "F16", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("options", [{}, {"tied": True, "qkv_bias": True}])
def test_every_tensor_comes_back(tmp_path: Path, quant: str, options: dict[str, Any]) -> None:
    s = write(tmp_path / "m.gguf", quant, **options)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    expected = text_tensors(s)
    assert set(checkpoint.names()) == set(expected)
    for name, values in expected.items():
        got = checkpoint.array(name)
        assert got.shape == values.shape == checkpoint.spec(name).shape
        if values.ndim == 2 and quant == "F16":
            values = values.astype(np.float16)
        elif values.ndim == 2 and quant != "F32":
            # quantization is along rows, so reordering rows does not change it
            kind = gguf.GGMLQuantizationType[quant]
            values = dequantize(quantize(values, kind), kind)
        np.testing.assert_array_equal(got, values)
        assert checkpoint.raw(name)[1].dtype == got.dtype
        np.testing.assert_array_equal(checkpoint.rows(name, 3, 9), values[3:9])


def test_settings_and_tokenizer_come_back(tmp_path: Path) -> None:
    s = write(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    text = checkpoint.config.text
    assert (text.hidden_size, text.layers, text.heads, text.kv_heads, text.head_dim) == (64, 2, 4, 2, 16)
    assert (text.rms_norm_eps, text.rope_theta, text.max_positions, text.vocab_size) == (1e-5, 1e4, 1024, s.vocab)
    assert checkpoint.config.tokens.stop == (289, 292)
    assert checkpoint.config.architecture == "LlamaForCausalLM"
    original = Tokenizer.from_str(json.dumps(tokenizer_json(s.vocab)))
    converted = Tokenizer.from_str(checkpoint.tokenizer_json().decode())
    for line in ("The thing is 1234, really!", "<|begin_of_text|>ünï\n\n  code<|eot_id|>", "<image> and </img>"):
        assert converted.encode(line).ids == original.encode(line).ids
        assert converted.decode(converted.encode(line).ids, skip_special_tokens=False) == line
    assert checkpoint.chat_template() == (
        '{% set bos_token = "<|begin_of_text|>" %}' + "{{ bos_token }}{{ messages[0]['content'] }}"
    )


def test_llama3_scaling_is_recognised_from_its_factors(tmp_path: Path) -> None:
    """The factors of Llama-3.1 (8, 1, 4, 8192) for θ = 500000 and heads 16 wide, by transformers' own function."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / scaled.numpy()).astype(np.float32)
    write(tmp_path / "m.gguf", meta={"rope_freqs.weight": factors}, rope_theta=500000.0)
    text = open_checkpoint(tmp_path / "m.gguf").config.text
    assert text.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    write(tmp_path / "n.gguf", meta={"rope_freqs.weight": factors + 1}, rope_theta=500000.0)
    with pytest.raises(CheckpointError, match="rotary factors of no known Llama"):
        open_checkpoint(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known are smollm"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, but heads are 16 wide"),
        ({"split.count": 2}, "one part of a split GGUF"),
        ({"blk.0.attn_gate.weight": np.ones(4, np.float32)}, "blk.0.attn_gate.weight .* is not known"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    write(tmp_path / "m.gguf", meta=meta)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "no.gguf")
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"hello" * 20,
        "cut": data[:300],
        "short": data[: len(data) // 2],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a readable GGUF file"):
            open_checkpoint(path)


def words(pre: str, text: str) -> list[str]:
    """How a rule splits a text, by a tokenizer with every byte as a token and no merges: pre-tokenization alone."""
    alphabet = list(tokenizer_json()["model"]["vocab"])[:256]
    meta = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    files = tokenizer_files({**meta, "tokenizer.ggml.tokens": alphabet, "tokenizer.ggml.merges": []})
    splitter = Tokenizer.from_str(files["tokenizer.json"].decode()).pre_tokenizer
    assert splitter is not None
    return [text[a:b] for _, (a, b) in splitter.pre_tokenize_str(text)]


def test_words_are_split_by_the_named_rule() -> None:
    """By the rules' own words: smollm takes digits one by one, Llama 3 in threes, GPT-2 a run; "default" in threes."""
    text = "It's 12345 is!!\n\nok"
    assert words("smollm", text) == ["It", "'s", " ", "1", "2", "3", "4", "5", " is", "!!", "\n", "\n", "ok"]
    assert words("llama-bpe", text) == ["It", "'s", " ", "123", "45", " is", "!!\n\n", "ok"]
    assert words("gpt-2", text) == ["It", "'s", " 12345", " is", "!!", "\n", "\n", "ok"]
    assert words("default", "a12345")[-2:] == ["123", "45"]
