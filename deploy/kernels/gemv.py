"""Linear layers for 1 to 16 tokens: bound by the bytes of the weight, each of which is read once.

One program is one panel of 16 out-features, whose codes lie one after the other. It takes several groups at once, each
a product of its own, so that the warps of a program share the in-features, and many bytes are on their way. Codes and
products are exact: a group is scaled after its sum, in f32. Launched by `edgevl.backends.cuda_lowering`.
"""

import triton
import triton.language as tl

from deploy.kernels.dequantize import high_nibble, low_nibble, scale_and_zero, whole_code
from deploy.kernels.epilogue import gelu


@triton.jit
def gemv(
    x,  # (rows, K)
    values,  # "int4", "int8": codes in tiles; "f16": (N, K)
    scales,  # "int4": (panels, K/Q, 16) int32, scale and zero; "int8": (panels, 16) f32
    bias,  # (N,) f32, or None
    residual,  # (rows, N), or None
    out,  # (rows, N)
    rows,  # at most BLOCK_M
    KIND: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,  # in-features of a group; 64 for int8 and f16
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens, filled up
    BLOCK_G: tl.constexpr,  # groups of one iteration
):
    """out = activation(x · Wᵀ + bias) + residual for one panel of out-features; grid (panels,)."""
    panel = tl.program_id(0).to(tl.int64)
    lane, m = tl.arange(0, 16), tl.arange(0, BLOCK_M)
    n = panel * 16 + lane
    GROUPS: tl.constexpr = (K + Q - 1) // Q
    HALF: tl.constexpr = Q // 2 if KIND == "int4" else Q  # values of one load of a group
    j = tl.arange(0, HALF)
    total = tl.zeros((BLOCK_G, 16, BLOCK_M), tl.float32)
    for first in range(0, GROUPS, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        inside = g[:, None, None] < GROUPS
        grid = (panel * GROUPS + g[:, None, None]) * 16 + lane[None, :, None]
        k = g[:, None, None] * Q + j[None, None, :]
        place = x + m[None, :, None] * K + k
        seen = inside & (m[None, :, None] < rows) & (k < K)
        low = tl.trans(tl.load(place, mask=seen, other=0.0).to(tl.float16), (0, 2, 1))
        if KIND == "int4":
            codes = tl.load(values + grid * HALF + j[None, None, :], mask=inside, other=0)
            scale, zero = scale_and_zero(tl.load(scales + grid, mask=inside, other=0))
            high = tl.trans(tl.load(place + HALF, mask=seen, other=0.0).to(tl.float16), (0, 2, 1))
            product = tl.dot(low_nibble(codes, zero), low)
            total += scale.to(tl.float32) * tl.dot(high_nibble(codes, zero), high, product)
        elif KIND == "int8":
            codes = tl.load(values + grid * HALF + j[None, None, :], mask=inside, other=0)
            total = tl.dot(whole_code(codes), low, total)
        else:
            row = n[None, :, None]
            w = tl.load(values + row * K + k, mask=inside & (k < K) & (row < N), other=0.0)
            total = tl.dot(w, low, total)
    y = tl.sum(total, axis=0)
    if KIND == "int8":
        y *= tl.load(scales + n)[:, None]
    kept = n < N
    if bias is not None:
        y += tl.load(bias + n, mask=kept, other=0.0)[:, None]
    if GELU:
        y = gelu(y)
    place = m[None, :] * N + n[:, None]
    both = kept[:, None] & (m[None, :] < rows)
    if residual is not None:
        y += tl.load(residual + place, mask=both, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=both)
