"""Rotary embedding of q and k, and k and v into the KV cache. Positions and slots are read from device memory."""

import triton
import triton.language as tl


@triton.jit
def rope_write(
    qkv,  # (T, (H+2G)·D)
    positions,  # (T,) i32
    slots,  # (T,) i32
    turns,  # (context, 2, D/2) f32: cosines, then sines, of each position
    keys,  # (slots, G, context, D) f16
    cached,  # values, likewise
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
        target = keys + ((slot * GROUPS + head - HEADS) * CONTEXT + position) * D + d
        tl.store(target, first.to(keys.dtype.element_ty), mask=inside)
        tl.store(target + D // 2, second.to(keys.dtype.element_ty), mask=inside)
    else:
        target = cached + ((slot * GROUPS + head - HEADS - GROUPS) * CONTEXT + position) * D + d
        tl.store(target, first.to(cached.dtype.element_ty), mask=inside)
        tl.store(target + D // 2, second.to(cached.dtype.element_ty), mask=inside)
