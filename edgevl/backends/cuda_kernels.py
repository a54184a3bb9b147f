"""What a GPU kernel is called with: the words that the builder, the bundle and the runtime share.

`edgevl.backends.cuda_lowering` says which kernels a model needs and how they are launched; `deploy.cubins` compiles
them and leaves a `KernelRecord` each; `edgevl.backends.cuda` launches them. Knows nothing of Triton or of a driver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from edgevl.errors import EdgevlError
from edgevl.recorder import Buffer, Rows

T = TypeVar("T")  # a `Launch`, or what a runtime makes of it
Constant = int | float | str | bool | tuple[float, ...]
POINTER_ALIGN = 16  # bytes; every pointer that a kernel gets is a multiple, and the compiler relies on it


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: a function, the types of its arguments and what is compiled in."""

    name: str  # of the function under deploy/kernels
    arguments: tuple[tuple[str, str | None], ...]  # name, and type as "*f16" or "i32"; None: absent
    constants: tuple[tuple[str, Constant], ...]
    variant: str = ""  # which line of the tuning table, where a kernel has several

    @cached_property
    def key(self) -> str:
        """A name for files and manifests: the same for the same kernel."""
        text = repr((self.name, self.arguments, self.constants, self.variant))
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the arguments that are passed, in order."""
        return tuple(t for _, t in self.arguments if t is not None)


@dataclass(frozen=True)
class KernelRecord:
    """A compiled kernel in a bundle: how it is launched."""

    file: str  # the cubin, inside the bundle
    symbol: str
    warps: int  # of 32 threads
    shared: int  # bytes of dynamic shared memory
    arguments: tuple[str, ...]  # types in order; two pointers to scratch follow, which are null
    tiles: dict[str, int]  # block sizes that its grid depends on


@dataclass(frozen=True)
class WeightArray:
    """The address of one array of a weight: a field of its kind, or "bias"."""

    name: str
    field: str
    type: str


@dataclass(frozen=True)
class Region:
    """No buffer: `edgevl.backends.cuda_memory.plan_device` lists them. The KV cache has a place for each layer."""

    name: str
    type: str
    layer: int = 0


Argument = Buffer | WeightArray | Region | Rows  # addresses; `Rows` is passed as a number


@dataclass(frozen=True)
class Extent:
    """Programs along one dimension of a grid: ceil(factor · count of `symbol` / tile)."""

    factor: int
    symbol: str = ""  # of `Rows`; empty: count 1
    tile: str = ""  # a key of `KernelRecord.tiles`; empty: 1

    def programs(self, counts: Mapping[str, int], tiles: Mapping[str, int]) -> int:
        """How many, for a step with these counts."""
        whole = self.factor * (counts.get(self.symbol, 0) if self.symbol else 1)
        return -(-whole // (tiles[self.tile] if self.tile else 1))


@dataclass(frozen=True)
class Launch:
    """One kernel call; `arguments` in the order of `Kernel.types`."""

    kernel: Kernel
    grid: tuple[Extent, ...]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What a node does, by how many rows it has: the first entry whose bound is not exceeded."""

    rows: Rows
    ways: tuple[tuple[int, tuple[T, ...]], ...]  # (most rows, calls in order)

    def calls(self, counts: Mapping[str, int]) -> tuple[T, ...]:
        """The calls of a step with these counts; none when there are no rows. Raises `EdgevlError` for too many."""
        count = self.rows.factor * counts.get(self.rows.symbol, 0)
        if not count:
            return ()
        for most, calls in self.ways:
            if count <= most:
                return calls
        raise EdgevlError(f"no kernel was loaded for {count} rows at once; the plan's limits are too small for them")
