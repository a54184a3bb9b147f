"""Linear layers for 1 to 4 tokens: bound by the bytes of the weight, each of which is read once.

One program is one panel of 16 out-features; a weight's panel is contiguous, so the program streams it. No tensor cores:
with so few tokens they would multiply padding. Codes are exact in f32. Launched by `edgevl.backends.cuda_lowering`.
"""

import triton
import triton.language as tl

from deploy.kernels.dequantize import nibble_f32
from deploy.kernels.epilogue import gelu


@triton.jit
def gemv(
    x,  # (rows, K)
    values,  # "int4", "int8": codes in tiles; "f16": (N, K)
    scales,
    zeros,
    bias,  # (N,) f32, or None
    residual,  # (rows, N), or None
    out,  # (rows, N)
    rows,
    KIND: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,  # in-features of a group; 64 for int8 and f16
    GELU: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups of one iteration
):
    """out[m] = activation(x[m] · Wᵀ + bias) + residual[m] for one panel of one row; grid (panels, rows)."""
    panel, m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, 16)
    n = panel * 16 + lane
    GROUPS: tl.constexpr = (K + Q - 1) // Q
    HALF: tl.constexpr = Q // 2 if KIND == "int4" else Q  # values of one load of a group
    j = tl.arange(0, HALF)
    total = tl.zeros((BLOCK_G, 16, HALF), tl.float32)
    row = x + m * K
    for first in range(0, GROUPS, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        inside = g < GROUPS
        k = g[:, None] * Q + j[None, :]
        seen = inside[:, None] & (k < K)
        tile = ((panel * GROUPS + g[:, None, None]) * 16 + lane[None, :, None]) * HALF + j[None, None, :]
        low = tl.load(row + k, mask=seen, other=0.0).to(tl.float32)[:, None, :]
        if KIND == "int4":
            grid = (panel * GROUPS + g[:, None]) * 16 + lane[None, :]
            scale = tl.load(scales + grid, mask=inside[:, None], other=0.0).to(tl.float32)[:, :, None]
            zero = tl.load(zeros + grid, mask=inside[:, None], other=0)[:, :, None]
            codes = tl.load(values + tile, mask=inside[:, None, None], other=0)
            high = tl.load(row + k + HALF, mask=seen, other=0.0).to(tl.float32)[:, None, :]
            total += scale * (nibble_f32(codes & 15, zero) * low + nibble_f32(codes >> 4, zero) * high)
        elif KIND == "int8":
            codes = tl.load(values + tile, mask=inside[:, None, None], other=0)
            total += codes.to(tl.float32) * low
        else:
            place = n[None, :, None] * K + k[:, None, :]
            w = tl.load(values + place, mask=seen[:, None, :] & (n[None, :, None] < N), other=0.0)
            total += w.to(tl.float32) * low
    y = tl.sum(tl.sum(total, axis=2), axis=0)
    if KIND == "int8":
        y = y * tl.load(scales + n)
    kept = n < N
    if bias is not None:
        y += tl.load(bias + n, mask=kept, other=0.0)
    if GELU:
        y = gelu(y)
    place = m * N + n
    if residual is not None:
        y += tl.load(residual + place, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=kept)
