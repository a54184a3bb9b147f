"""The GPU as the backend sees it: one stream, memory, compiled kernels, captured graphs.

`CudaDevice` talks to the driver through cuda-bindings and says in one sentence what a machine lacks; the tests have
devices of their own. Knows nothing of models. Called by `edgevl.backends.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from edgevl.backends.cuda_kernels import KernelRecord

Array = NDArray[Any]


class Device(Protocol):
    """What the backend asks of a GPU: one stream, on which everything happens in order."""

    name: str  # one line for people

    def available(self) -> int:
        """Bytes that can be allocated."""
        ...

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, a multiple of 256. They are freed with the device."""
        ...

    def zero(self, address: int, size: int) -> None:
        """Set bytes to zero."""
        ...

    def write(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device; it may be reused at once."""
        ...

    def read(self, address: int, array: Array) -> None:
        """Wait for everything before it, then copy from the device into a contiguous array."""
        ...

    def load(self, key: str, record: KernelRecord, cubin: bytes) -> Any:
        """Something that `launch` takes."""
        ...

    def launch(self, function: Any, record: KernelRecord, grid: tuple[int, int, int], values: tuple[int, ...]) -> None:
        """Run a kernel; `values` are addresses and numbers, in the order of `record.arguments`."""
        ...

    def capture(self, work: Callable[[], None]) -> Any:
        """Remember what `work` launches, without running it; something that `replay` takes."""
        ...

    def replay(self, graph: Any) -> None:
        """Run what was captured."""
        ...
