"""Attention of many tokens at once: over the KV cache (flash prefill), and of all tokens of a tile to each other.

Scores never reach memory. Tokens of a step may belong to several slots: a block of queries goes through the slots that
it has, and through nothing for the others.
Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl

from deploy.kernels.dequantize import scaled_sum, whole_code


@triton.jit
def attend_block(query, k, v, key_scales, value_scales, seen, top, weight, total, SCALE: tl.constexpr):
    """One block of keys into the running softmax; `seen` is (queries, keys). Returns top, weight, total.

    Keys and values are f16, and scales None, or they are int8 with a scale for each key.
    """
    if key_scales is not None:
        scores = tl.dot(query, tl.trans(whole_code(k))) * key_scales[None, :]
    else:
        scores = tl.dot(query, tl.trans(k))
    scores = tl.where(seen, scores * SCALE, -1e30)
    higher = tl.maximum(top, tl.max(scores, axis=1))
    shrink = tl.exp2(top - higher)
    p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
    weight = weight * shrink + tl.sum(p, axis=1)
    if value_scales is not None:
        total = total * shrink[:, None] + scaled_sum(p, v, value_scales)
    else:
        total = tl.dot(p.to(tl.float16), v, total * shrink[:, None])
    return higher, weight, total


@triton.jit
def attend(
    q,  # (T, H·D)
    positions,  # (T,) i32
    slots,  # (T,) i32
    keys,  # (slots, G, context, D) f16 or i8
    cached,  # values, likewise
    key_scales,  # (slots, G, context) f32 for i8, or None
    cached_scales,  # of the values, likewise
    out,  # (T, H·D)
    rows,  # T
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    CONTEXT: tl.constexpr,
    SCALE: tl.constexpr,  # D^-½ · log2(e)
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_D: tl.constexpr,  # at least D
    BLOCK_S: tl.constexpr,
):
    """One query head of BLOCK_M tokens; grid (token blocks, H)."""
    t, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    mine = (t[:, None] < rows) & (d[None, :] < D)
    place = (t.to(tl.int64)[:, None] * HEADS + head) * D + d[None, :]
    query = tl.load(q + place, mask=mine, other=0.0).to(tl.float16)
    position = tl.load(positions + t, mask=t < rows, other=-1)
    slot = tl.load(slots + t, mask=t < rows, other=-1)
    first = tl.min(tl.where(t < rows, slot, 2147483647), axis=0)
    last = tl.max(slot, axis=0)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for one in range(first, last + 1):
        own = slot == one
        depth = tl.max(tl.where(own, position, -1), axis=0) + 1
        base = ((first.to(tl.int64) + (one - first)) * GROUPS + head // (HEADS // GROUPS)) * CONTEXT
        for start in range(0, depth, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            cell = (base + s[:, None]) * D + d[None, :]
            there = (s[:, None] < depth) & (d[None, :] < D)
            k = tl.load(keys + cell, mask=there, other=0)
            v = tl.load(cached + cell, mask=there, other=0)
            ks, vs = None, None
            if key_scales is not None:
                ks = tl.load(key_scales + base + s, mask=s < depth, other=0.0)
                vs = tl.load(cached_scales + base + s, mask=s < depth, other=0.0)
            seen = own[:, None] & (s[None, :] <= position[:, None])
            top, weight, total = attend_block(query, k, v, ks, vs, seen, top, weight, total, SCALE)
    tl.store(out + place, (total / tl.maximum(weight, 1e-30)[:, None]).to(out.dtype.element_ty), mask=mine)


@triton.jit
def full_attention(
    qkv,  # (n·TOKENS, 3·H·D)
    out,  # (n·TOKENS, H·D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,  # D^-½ · log2(e)
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
    BLOCK_S: tl.constexpr,
):
    """BLOCK_M tokens of one head of one tile attend to the whole tile; grid (n, H, blocks of TOKENS)."""
    tile, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    WIDE: tl.constexpr = 3 * HEADS * D
    t, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    base = qkv + tile * TOKENS * WIDE + head * D
    mine = (t[:, None] < TOKENS) & (d[None, :] < D)
    query = tl.load(base + t[:, None] * WIDE + d[None, :], mask=mine, other=0.0).to(tl.float16)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, TOKENS, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        there = (s[:, None] < TOKENS) & (d[None, :] < D)
        cell = base + s[:, None] * WIDE + d[None, :]
        k = tl.load(cell + HEADS * D, mask=there, other=0.0).to(tl.float16)
        v = tl.load(cell + 2 * HEADS * D, mask=there, other=0.0).to(tl.float16)
        seen = (t[:, None] < TOKENS) & (s[None, :] < TOKENS)
        top, weight, total = attend_block(query, k, v, None, None, seen, top, weight, total, SCALE)
    place = (tile * TOKENS + t[:, None]) * (HEADS * D) + head * D + d[None, :]
    tl.store(out + place, (total / tl.maximum(weight, 1e-30)[:, None]).to(out.dtype.element_ty), mask=mine)
