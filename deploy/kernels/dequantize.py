"""Weight tiles from the layout "tiles" of edgevl.layouts, and int8 keys and values, as f16 in registers.

A code becomes f16 without a conversion instruction (those run at a fraction of the rate) and without a shift: its
bits go into the mantissa of 1024, whose unit is 1, and 1024 goes away with the zero point, exactly. The high nibble
stays where it is, counts 16 times, and is divided as 1024 goes away, in the same instruction. Called by the linear and
attention kernels.
"""

import triton
import triton.language as tl


@triton.jit
def scale_and_zero(pair):
    """int32 that holds two f16 -> scale and zero, f16."""
    return (
        (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True),
        (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True),
    )


@triton.jit
def low_nibble(codes, zero):
    """uint8 codes -> low nibble - zero, f16, exact."""
    raised = ((codes & 0x0F).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    return raised - (zero + 1024.0)


@triton.jit
def high_nibble(codes, zero):
    """uint8 codes -> high nibble - zero, f16, exact: a sixteenth of 1024 + 16 c is 64 + c."""
    raised = ((codes & 0xF0).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    return raised * 0.0625 - (zero + 64.0)


@triton.jit
def whole_code(codes):
    """int8 codes -> f16, exact: as 128 more than they are, without a sign."""
    raised = ((codes ^ -128).to(tl.uint8, bitcast=True).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    return raised - 1152.0


@triton.jit
def scaled_sum(weights, codes, scales):
    """(M, S) f32 weights · (S, D) int8 codes with a scale for each of S -> (M, D) f32.

    Scales go into the weights. The largest stays outside, so that a weight is as exact in f16 as without them.
    """
    top = tl.max(scales, axis=0)
    shares = scales / tl.maximum(top, 1e-30)
    return tl.dot((weights * shares[None, :]).to(tl.float16), whole_code(codes)) * top
