"""Block sizes, warps and stages of each kernel on each SM: the tuning table, and what an SM allows.

Read by `deploy.cubins`. The numbers follow from shared memory, registers and how many programs fill the chip; none of
them was tuned by measuring yet (LOG.md, "Waiting for a GPU").
"""

from __future__ import annotations

from dataclasses import dataclass

# bytes of shared memory that one program may have (CUDA C++ Programming Guide, "Technical specifications")
SHARED_LIMIT = {
    "sm_86": 99 << 10,
    "sm_87": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_110": 227 << 10,
    "sm_120": 99 << 10,
}


@dataclass(frozen=True)
class Tuning:
    """How a kernel is compiled for an SM."""

    tiles: tuple[tuple[str, int], ...] = ()  # block sizes that are free to choose
    warps: int = 4  # of 32 threads, a program
    stages: int = 3  # iterations of a loop whose loads are in flight


def _tuning(warps: int = 4, stages: int = 3, **tiles: int) -> Tuning:
    return Tuning(tuple(tiles.items()), warps, stages)


_ROWS = _tuning(4, 1, BLOCK=1024)
_ANY = {
    "argmax": _tuning(16, 1, BLOCK=8192),
    "attend": _tuning(4, 2, BLOCK_M=64, BLOCK_S=64),
    "attend_join": _tuning(4, 1),
    "attend_split": _tuning(4, 2, BLOCK_S=64),
    "embed": _ROWS,
    "full_attention": _tuning(4, 2, BLOCK_M=64, BLOCK_S=64),
    "gather_rows": _ROWS,
    "gemm": _tuning(8, 3, BLOCK_M=128, BLOCK_N=128),
    "gemv.few": _tuning(4, 4, BLOCK_M=8, BLOCK_G=4),
    "gemv.more": _tuning(4, 4, BLOCK_M=16, BLOCK_G=4),
    "norm": _tuning(8, 1),
    "patches": _ROWS,
    "pixel_shuffle": _ROWS,
    "rope_write": _tuning(1, 1),
    "sample_narrow": _tuning(4, 1),
    "sample_pick": _tuning(4, 1),
    "sample_tally": _tuning(4, 1),
    "sample_top": _tuning(4, 1),
    "silu_mul": _ROWS,
    "vision_tokens": _ROWS,
}
_LARGE = {
    "attend": _tuning(8, 3, BLOCK_M=128, BLOCK_S=64),
    "full_attention": _tuning(8, 3, BLOCK_M=128, BLOCK_S=64),
    "gemv.few": _tuning(8, 4, BLOCK_M=8, BLOCK_G=8),
    "gemv.more": _tuning(8, 4, BLOCK_M=16, BLOCK_G=8),
}
_BY_SM = {"sm_90": _LARGE, "sm_110": _LARGE}


def tuning(name: str, variant: str, architecture: str) -> Tuning:
    """The line of the table for a kernel on an SM."""
    key = f"{name}.{variant}" if variant else name
    return _BY_SM.get(architecture, {}).get(key) or _ANY[key]
