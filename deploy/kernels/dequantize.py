"""Weight tiles from the layout "tiles" of edgevl.layouts, in registers. Called by the linear kernels.

A code becomes f16 without a conversion instruction (those run at a fraction of the rate) and without a shift: its
bits go into the mantissa of 1024, whose unit is 1, and 1024 goes away with the zero point, exactly. The high nibble
stays where it is, counts 16 times, and is divided as 1024 goes away, in the same instruction.
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
