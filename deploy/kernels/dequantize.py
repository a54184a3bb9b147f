"""Weight tiles from the layout "tiles" of edgevl.layouts, in registers. Called by the linear kernels.

A nibble becomes a float without a conversion instruction (those run at a quarter of the rate): its bits go into the
mantissa of a power of two whose unit is 1, and the power of two goes away with the zero point, exactly.
"""

import triton
import triton.language as tl


@triton.jit
def nibble_f16(nibble, zero):
    """uint8 0..15 and its zero point -> the difference, f16, exact: 1024 + c has c in its last bits."""
    raised = (nibble.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    return raised - (zero.to(tl.float16) + 1024.0)


@triton.jit
def nibble_f32(nibble, zero):
    """uint8 0..15 and its zero point -> the difference, f32, exact: 2^23 + c has c in its last bits."""
    raised = (nibble.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return raised - (zero.to(tl.float32) + 8388608.0)
