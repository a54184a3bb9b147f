"""Linear layers for 17 tokens and more: bound by what tensor cores multiply, f16 times f16, summed in f32.

Weights become f16 in registers, never in memory. They are the first operand (out-features are its rows), because that
is the one which tensor cores take from registers; the tile is turned when it is stored. Programs of one panel of
weights are neighbours, so that the panel is read from memory once. Launched by `edgevl.backends.cuda_lowering`.
"""

import triton
import triton.language as tl

from deploy.kernels.dequantize import high_nibble, low_nibble, scale_and_zero, whole_code
from deploy.kernels.epilogue import gelu


@triton.jit
def gemm(
    x,  # (rows, K)
    values,  # "int4", "int8": codes in tiles; "f16": (N, K)
    scales,  # "int4": (panels, K/Q, 16) int32, scale and zero; "int8": (panels, 16) f32
    bias,  # (N,) f32, or None
    residual,  # (rows, N), or None
    out,  # (rows, N)
    rows,
    KIND: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,  # in-features of a group; 64 for int8 and f16
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,  # out-features of a program, a multiple of 16
):
    """out = activation(x · Wᵀ + bias) + residual for BLOCK_M tokens; grid (token blocks, blocks of out-features)."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    GROUPS: tl.constexpr = (K + Q - 1) // Q
    PADDED: tl.constexpr = (N + 15) // 16 * 16
    HALF: tl.constexpr = Q // 2 if KIND == "int4" else Q
    j = tl.arange(0, HALF)
    mine, whole = m[:, None] < rows, n < PADDED
    panel, lane = n // 16, n % 16
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for g in range(GROUPS):
        k = g * Q + j
        grid = (panel * GROUPS + g) * 16 + lane
        tile = grid[:, None] * HALF + j[None, :]
        place = x + m[:, None] * K + k[None, :]
        low = tl.load(place, mask=mine & (k[None, :] < K), other=0.0).to(tl.float16)
        if KIND == "int4":
            scale, zero = scale_and_zero(tl.load(scales + grid, mask=whole, other=0)[:, None])
            codes = tl.load(values + tile, mask=whole[:, None], other=0)
            high = tl.load(place + HALF, mask=mine, other=0.0).to(tl.float16)
            total = tl.dot(low_nibble(codes, zero) * scale, tl.trans(low), total)
            total = tl.dot(high_nibble(codes, zero) * scale, tl.trans(high), total)
        elif KIND == "int8":
            codes = tl.load(values + tile, mask=whole[:, None], other=0)
            total = tl.dot(whole_code(codes), tl.trans(low), total)
        else:
            w = tl.load(values + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
            total = tl.dot(w, tl.trans(low), total)
    if KIND == "int8":
        total *= tl.load(scales + n, mask=whole, other=0.0)[:, None]
    kept = n < N
    if bias is not None:
        total += tl.load(bias + n, mask=kept, other=0.0)[:, None]
    if GELU:
        total = gelu(total)
    y = tl.trans(total)
    place = m[:, None] * N + n[None, :]
    kept = mine & kept[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=kept)
