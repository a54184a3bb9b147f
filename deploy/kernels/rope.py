"""Rotary embedding of q and k, and k and v into the KV cache. Positions and slots are read from device memory.

In an int8 cache the numbers of a head are whole multiples of one scale, its largest |number| / 127.
"""

import triton
import triton.language as tl


@triton.jit
def rope_write(
    qkv,  # (T, (H+2G)·D)
    positions,  # (T,) i32
    slots,  # (T,) i32
    turns,  # (context, 2, D/2) f32: cosines, then sines, of each position
    keys,  # (slots, G, context, D) f16 or i8
    cached,  # values, likewise
    key_scales,  # (slots, G, context) f32 for i8, or None
    cached_scales,  # of the values, likewise
    out,  # q (T, H·D)
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    CONTEXT: tl.constexpr,
    BLOCK: tl.constexpr,  # at least D/2
):
    """One head of one token: q is turned and stored, k turned and cached, v cached; grid (T, H+2G)."""
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D // 2
    position, slot = tl.load(positions + t).to(tl.int64), tl.load(slots + t).to(tl.int64)
    source = qkv + (t * (HEADS + 2 * GROUPS) + head) * D + d
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + GROUPS:
        turn = turns + position * D + d
        cos = tl.load(turn, mask=inside, other=0.0)
        sin = tl.load(turn + D // 2, mask=inside, other=0.0)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if head < HEADS:
        target = out + (t * HEADS + head) * D + d
        tl.store(target, first.to(out.dtype.element_ty), mask=inside)
        tl.store(target + D // 2, second.to(out.dtype.element_ty), mask=inside)
    elif head < HEADS + GROUPS:
        cell = (slot * GROUPS + head - HEADS) * CONTEXT + position
        write_cell(keys, key_scales, cell, first, second, d, inside, D)
    else:
        cell = (slot * GROUPS + head - HEADS - GROUPS) * CONTEXT + position
        write_cell(cached, cached_scales, cell, first, second, d, inside, D)


@triton.jit
def write_cell(cache, scales, cell, first, second, d, inside, D: tl.constexpr):
    """Both halves of one head to cell number `cell` of a cache."""
    target = cache + cell * D + d
    if scales is not None:
        top = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        steps = tl.where(top > 0.0, 127.0 / top, 0.0)
        # the spacing of f32 at 1.5 · 2^23 is 1: adding rounds to whole numbers, halves to even
        first = first * steps + 12582912.0 - 12582912.0
        second = second * steps + 12582912.0 - 12582912.0
        tl.store(scales + cell, top / 127.0)
    tl.store(target, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(target + D // 2, second.to(cache.dtype.element_ty), mask=inside)
