"""The Llama decoder, once, for every implementation of `Ops`.

Knows the order of the operations; knows nothing of dtypes, memory or devices.
"""

from __future__ import annotations

from edgevl.config import TextConfig
from edgevl.ops import Ops, Step, X


def decoder_block(ops: Ops[X], config: TextConfig, x: X, step: Step[X], layer: int) -> X:
    """One decoder block: x (T, C) -> (T, C). The quantizer streams these one at a time."""
    prefix = f"layers.{layer}"
    h = ops.rms_norm(x, ops.norm_weight(f"{prefix}.attn_norm"), config.rms_norm_eps)
    qkv = ops.linear(h, ops.linear_weight(f"{prefix}.qkv"))  # (T, (H+2G)·D)
    q = ops.rope_write(qkv, step, layer, config)  # (T, H·D)
    a = ops.attention(q, step, layer, config)
    x = ops.linear(a, ops.linear_weight(f"{prefix}.o"), residual=x)
    h = ops.rms_norm(x, ops.norm_weight(f"{prefix}.mlp_norm"), config.rms_norm_eps)
    gate_up = ops.linear(h, ops.linear_weight(f"{prefix}.gate_up"))  # (T, 2F)
    return ops.linear(ops.silu_mul(gate_up), ops.linear_weight(f"{prefix}.down"), residual=x)


def decoder(ops: Ops[X], config: TextConfig, step: Step[X]) -> X:
    """All blocks and the head: the step's tokens -> logits (L, V)."""
    x = ops.embed(step.tokens, ops.table("embed"), step.images)
    for layer in range(config.layers):
        x = decoder_block(ops, config, x, step, layer)
    x = ops.gather_rows(x, step.logit_rows)
    x = ops.rms_norm(x, ops.norm_weight("norm"), config.rms_norm_eps)
    return ops.linear(x, ops.linear_weight("head"))
