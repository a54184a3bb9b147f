"""Kernels of one pass over rows: embedding, gathering, vision tokens, pixel shuffle, patches, silu·mul, argmax."""

import triton
import triton.language as tl


@triton.jit
def embed(
    tokens,  # (T,) i32
    table,  # (V, C) f32 or f16; codes of int8 in tiles
    scales,  # (panels, 16) f32 of int8, or None
    images,  # (rows, C), or None
    out,  # (T, C)
    C: tl.constexpr,
    Q: tl.constexpr,  # in-features of a group of int8
    BLOCK: tl.constexpr,
):
    """out[t] = table[id], or images[-1-id] for an id below zero; grid (T, blocks of C)."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + t).to(tl.int64)
    if token >= 0:
        if scales is not None:
            GROUPS: tl.constexpr = (C + Q - 1) // Q
            place = ((token // 16 * GROUPS + c // Q) * 16 + token % 16) * Q + c % Q
            value = tl.load(table + place, mask=c < C, other=0).to(tl.float32) * tl.load(scales + token)
            value = value.to(out.dtype.element_ty)
        else:
            value = tl.load(table + token * C + c, mask=c < C, other=0.0).to(out.dtype.element_ty)
        tl.store(out + t * C + c, value, mask=c < C)
    elif images is not None:
        value = tl.load(images + (-1 - token) * C + c, mask=c < C, other=0.0).to(out.dtype.element_ty)
        tl.store(out + t * C + c, value, mask=c < C)


@triton.jit
def gather_rows(x, picked, out, C: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[picked[i]]; grid (L, blocks of C)."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(picked + i).to(tl.int64)
    tl.store(out + i * C + c, tl.load(x + row * C + c, mask=c < C), mask=c < C)


@triton.jit
def silu_mul(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, 2F) -> (rows, F): gate / (1 + e^-gate) · up; grid (rows, blocks of F)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * F + f, y.to(out.dtype.element_ty), mask=f < F)


@triton.jit
def vision_tokens(x, positions, prefix, out, P: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """(n·P, C) -> (n·(R+P), C): the prefix, then patches with their positions added; grid (n·(R+P), blocks of C)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile, token = row // (R + P), row % (R + P)
    if token < R:
        value = tl.load(prefix + token * C + c, mask=c < C, other=0.0)
        tl.store(out + row * C + c, value.to(out.dtype.element_ty), mask=c < C)
    else:
        value = tl.load(x + (tile * P + token - R) * C + c, mask=c < C, other=0.0).to(tl.float32)
        value += tl.load(positions + (token - R) * C + c, mask=c < C, other=0.0)
        tl.store(out + row * C + c, value.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def pixel_shuffle(x, out, GRID: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """(n·(R+GRID²), C) -> (n·GRID²/4, 4C): patches 00, 01, 10, 11 side by side; grid (n·GRID²/4, blocks of 4C)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    HALF: tl.constexpr = GRID // 2
    tile, place = row // (HALF * HALF), row % (HALF * HALF)
    corner = c // C
    y, across = place // HALF * 2 + corner // 2, place % HALF * 2 + corner % 2
    source = (tile * (R + GRID * GRID) + R + y * GRID + across) * C + c % C
    tl.store(out + row * 4 * C + c, tl.load(x + source, mask=c < 4 * C), mask=c < 4 * C)


@triton.jit
def patches(
    pixels,  # (n, SIDE, SIDE, 3) u8
    out,  # (n·P, 3·SIZE²)
    SIDE: tl.constexpr,
    SIZE: tl.constexpr,
    MEAN: tl.constexpr,  # three numbers, of pixels / 255
    DEVIATION: tl.constexpr,  # three numbers
    BLOCK: tl.constexpr,
):
    """Normalised patches; inside one: channel, row, column; grid (n·P, blocks of 3·SIZE²)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    GRID: tl.constexpr = SIDE // SIZE
    inside = i < 3 * SIZE * SIZE
    tile, patch = row // (GRID * GRID), row % (GRID * GRID)
    channel, y, across = i // (SIZE * SIZE), i // SIZE % SIZE, i % SIZE
    line = (tile * SIDE + patch // GRID * SIZE + y) * SIDE + patch % GRID * SIZE + across
    value = tl.load(pixels + line * 3 + channel, mask=inside, other=0).to(tl.float32) / 255.0
    mean = tl.where(channel == 0, MEAN[0], tl.where(channel == 1, MEAN[1], MEAN[2]))
    deviation = tl.where(channel == 0, DEVIATION[0], tl.where(channel == 1, DEVIATION[1], DEVIATION[2]))
    tl.store(out + row * (3 * SIZE * SIZE) + i, ((value - mean) / deviation).to(out.dtype.element_ty), mask=inside)


@triton.jit
def argmax(logits, out, V: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(L, V) -> (L,) i32: the first of the largest of the first COUNT; the rest is padding; grid (L,)."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, COUNT, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + c, mask=c < COUNT, other=float("-inf"))
        where = tl.where(value > best, c, where)
        best = tl.maximum(value, best)
    top = tl.max(best, axis=0)
    tl.store(out + row, tl.min(tl.where(best == top, where, V), axis=0))
