"""RMS norm and layer norm, one row a program, read once. The linear in front added the residual as it stored."""

import triton
import triton.language as tl


@triton.jit
def norm(x, weight, bias, out, C: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, C) -> (rows, C): layer norm with a bias when CENTRED, RMS norm otherwise; BLOCK >= C; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    v = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        v = tl.where(inside, v - tl.sum(v, axis=0) / C, 0.0)
    y = v / tl.sqrt(tl.sum(v * v, axis=0) / C + EPS) * tl.load(weight + c, mask=inside, other=0.0)
    if bias is not None:
        y += tl.load(bias + c, mask=inside, other=0.0)
    tl.store(out + row * C + c, y.to(out.dtype.element_ty), mask=inside)
