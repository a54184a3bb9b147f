"""Every weight looked at once, before hours are spent: finite, and within what int4 with f16 scales can hold.

Bits are tested, not values, so a checkpoint is read as fast as its disk is. Called by `quantize.job`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint import Checkpoint
from edgevl.errors import CheckpointError
from edgevl.safetensors_file import bf16_to_f32
from quantize.groups import BlockTable

_AT_ONCE = 1 << 24  # numbers
# the exponent's bits, all set in what is infinite or undefined
_EXPONENT: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
_LARGEST = 65504.0 * 7  # |weight| whose scale f16 still holds


def check_weights(checkpoint: Checkpoint, tables: list[BlockTable], progress: Callable[[int, int], None]) -> None:
    """Raise `CheckpointError` that names a tensor with infinite, undefined or too large values."""
    names = checkpoint.names()
    linears = {f"{module}.weight" for table in tables for module in table.linears}
    for done, name in enumerate(names):
        progress(done, len(names))
        dtype, array = checkpoint.raw(name)
        if dtype not in _EXPONENT:
            continue
        flat = array.reshape(-1)
        for begin in range(0, flat.size, _AT_ONCE):
            _check(name, dtype, flat[begin : begin + _AT_ONCE], name in linears)
        checkpoint.release()
    progress(len(names), len(names))


def _check(name: str, dtype: str, values: NDArray[Any], linear: bool) -> None:
    kind, mask = _EXPONENT[dtype]
    bits = values.view(kind)
    if ((bits & kind(mask)) == mask).any():
        raise CheckpointError(f"{name} holds infinite or undefined values; fetch the checkpoint again")
    if linear and dtype != "F16":
        most = float(np.abs(bf16_to_f32(bits) if dtype == "BF16" else values).max(initial=0))
        if most > _LARGEST:
            raise CheckpointError(
                f"{name} holds a value of {most:.3g}, and int4 with f16 scales ends at {_LARGEST:.3g}; "
                "the checkpoint cannot be stored in this layout"
            )
