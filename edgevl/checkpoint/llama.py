"""A Llama's settings, from the JSON that transformers 4 and 5 write, checked against what the decoder computes.

Knows the config's keys; tensor shapes are checked in `shapes`. Called by `open` for plain Llamas and for the language
model inside a vision-language one.
"""

from __future__ import annotations

from typing import Any

from edgevl.checkpoint.settings import Settings
from edgevl.config import RopeScaling, TextConfig


def text_config(config: Settings, tensors: set[str]) -> TextConfig:
    """The decoder's numbers. `tensors` are canonical names: they settle biases and what an absent key leaves open.

    Raises `CheckpointError` for an activation, rotary type or feature that the decoder does not compute.
    """
    config.expect("hidden_act", "silu", default="silu")
    config.expect("mlp_bias", False, default=False)
    config.expect_empty("num_experts", "num_local_experts", "use_qk_norm")
    heads = config.whole("num_attention_heads")
    hidden = config.whole("hidden_size")
    if config.data.get("head_dim") is None and hidden % heads:
        raise config.fail("num_attention_heads", f"without head_dim it must divide the hidden size {hidden}")
    theta, scaling = _rope(config)
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=config.whole("intermediate_size"),
        layers=config.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", heads),
        head_dim=config.whole("head_dim", hidden // heads),
        vocab_size=config.whole("vocab_size"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=config.whole("max_position_embeddings", 2048),
        tied_embeddings=config.flag("tie_word_embeddings", not _has(tensors, "lm_head")),
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
    )


def _rope(config: Settings) -> tuple[float, RopeScaling | None]:
    """θ and the scaling: `rope_scaling` with "rope_type" or "type" (transformers 4), or `rope_parameters` (5)."""
    for key in ("rope_parameters", "rope_scaling"):
        if config.data.get(key) is not None:
            rope = config.child(key)
            break
    else:
        return config.number("rope_theta", 10000.0), None
    top = config.number("rope_theta", 10000.0)
    theta = rope.number("rope_theta", top)
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise config.fail(key, "rotary settings that differ between layers are not supported")
    kind: Any = rope.data.get("rope_type", rope.data.get("type", "default"))
    if rope.data.get("partial_rotary_factor", 1.0) != 1.0:
        raise rope.fail("partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise config.fail(key, "of the rotary types only default and llama3 are supported")
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.whole("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.fail("high_freq_factor", f"it must be above low_freq_factor {scaling.low_freq_factor}")
    return theta, scaling


def _has(tensors: set[str], module: str) -> bool:
    return f"{module}.weight" in tensors or f"{module}.qweight" in tensors
