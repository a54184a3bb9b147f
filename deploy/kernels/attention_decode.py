"""Attention of a few tokens over the KV cache: the depth is split over programs, whose results are joined afterwards.

All query heads that share a KV head are one tile, so the cache is read once; int8 becomes f16 in registers. The number
of splits is fixed and each takes its share of the token's own depth, read from device memory: one captured graph serves
every depth.
Source: flash decoding (Dao et al. 2023); online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

import triton
import triton.language as tl

from deploy.kernels.dequantize import scaled_sum, whole_code


@triton.jit
def attend_split(
    q,  # (T, H·D)
    positions,  # (T,) i32
    slots,  # (T,) i32
    keys,  # (slots, G, context, D) f16 or i8
    cached,  # values, likewise
    key_scales,  # (slots, G, context) f32 for i8, or None
    cached_scales,  # of the values, likewise
    sums,  # (T, H, SPLITS, D) f32: sum of weights times values
    tops,  # (T, H, SPLITS, 2) f32: largest score in powers of two, sum of weights
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    CONTEXT: tl.constexpr,
    SCALE: tl.constexpr,  # D^-½ · log2(e)
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H/G, and what a tensor core takes
    BLOCK_D: tl.constexpr,  # at least D
    BLOCK_S: tl.constexpr,
):
    """Token t, KV head g, one part of the depth; grid (T, G, SPLITS)."""
    t, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    SHARE: tl.constexpr = HEADS // GROUPS
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    head = g * SHARE + h
    mine = (h[:, None] < SHARE) & (d[None, :] < D)
    query = tl.load(q + (t * HEADS + head[:, None]) * D + d[None, :], mask=mine, other=0.0).to(tl.float16)
    depth = tl.load(positions + t) + 1
    base = (tl.load(slots + t).to(tl.int64) * GROUPS + g) * CONTEXT
    span = (depth + SPLITS * BLOCK_S - 1) // (SPLITS * BLOCK_S) * BLOCK_S
    end = tl.minimum(depth, (part + 1) * span)
    top = tl.full((BLOCK_H,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(part * span, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        place = (base + s[:, None]) * D + d[None, :]
        seen = (s[:, None] < end) & (d[None, :] < D)
        k = tl.load(keys + place, mask=seen, other=0)
        if key_scales is not None:
            scale = tl.load(key_scales + base + s, mask=s < end, other=0.0)
            scores = tl.dot(query, tl.trans(whole_code(k))) * scale[None, :]
        else:
            scores = tl.dot(query, tl.trans(k))
        scores = tl.where(s[None, :] < end, scores * SCALE, -1e30)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink, p = tl.exp2(top - higher), tl.exp2(scores - higher[:, None])
        weight = weight * shrink + tl.sum(p, axis=1)
        v = tl.load(cached + place, mask=seen, other=0)
        if cached_scales is not None:
            scale = tl.load(cached_scales + base + s, mask=s < end, other=0.0)
            total = total * shrink[:, None] + scaled_sum(p, v, scale)
        else:
            total = tl.dot(p.to(tl.float16), v, total * shrink[:, None])
        top = higher
    slot = (t * HEADS + head) * SPLITS + part
    tl.store(sums + slot[:, None] * D + d[None, :], total, mask=mine)
    tl.store(tops + slot * 2, top, mask=h < SHARE)
    tl.store(tops + slot * 2 + 1, weight, mask=h < SHARE)


@triton.jit
def attend_join(
    sums,  # as above
    tops,
    out,  # (T, H·D)
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Joins the parts of one head of one token; SPLITS is a power of two; grid (T·H,)."""
    row = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(tops + (row * SPLITS + part) * 2)
    share = tl.exp2(top - tl.max(top, axis=0))
    weight = tl.sum(share * tl.load(tops + (row * SPLITS + part) * 2 + 1), axis=0)
    place = (row * SPLITS + part[:, None]) * D + d[None, :]
    total = tl.sum(share[:, None] * tl.load(sums + place, mask=d[None, :] < D, other=0.0), axis=0)
    tl.store(out + row * D + d, (total / weight).to(out.dtype.element_ty), mask=d < D)
