"""Devices that need no GPU: one runs kernels in Triton's interpreter, one only looks at how they are called."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before the kernels are imported

import torch

from deploy.kernels.compiler import FUNCTIONS
from edgevl.backends.cuda import Cubins
from edgevl.backends.cuda_kernels import Kernel, KernelRecord

TILES = {
    "BLOCK": 64,
    "BLOCK_G": 2,
    "BLOCK_M": 16,
    "BLOCK_N": 32,
    "BLOCK_S": 16,
}  # small: the interpreter pays for every value of a block
_TORCH = {"f32": torch.float32, "f16": torch.float16, "i32": torch.int32, "u8": torch.uint8, "i8": torch.int8}


def uncompiled(kernels: Mapping[str, Kernel]) -> Cubins:
    """Records as the builder leaves them, with no code behind them."""
    records = {
        key: KernelRecord(f"kernels/{key}.cubin", kernel.name, 4, 0, kernel.types, dict(TILES))
        for key, kernel in kernels.items()
    }
    return Cubins(records, lambda file: b"")


class InterpreterDevice:
    """Memory is a torch tensor; a launch is a call of the kernel's own source."""

    name = "interpreter"

    def __init__(self, kernels: Mapping[str, Kernel], size: int = 64 << 20) -> None:
        self._kernels = kernels
        self._memory = torch.full((size,), 0xAB, dtype=torch.uint8)  # what is read before it is written is no zero
        self._start = 256

    def available(self) -> int:
        return len(self._memory) - self._start

    def allocate(self, size: int) -> int:
        address = self._start
        self._start += -(-size // 256) * 256
        return address

    def zero(self, address: int, size: int) -> None:
        self._memory[address : address + size] = 0

    def write(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._memory.numpy()[address : address + array.nbytes] = array.reshape(-1).view(np.uint8)

    def read(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        array.reshape(-1).view(np.uint8)[...] = self._memory.numpy()[address : address + array.nbytes]

    def load(self, key: str, record: KernelRecord, cubin: bytes) -> Kernel:
        return self._kernels[key]

    def launch(self, kernel: Kernel, record: KernelRecord, grid: tuple[int, int, int], values: tuple[int, ...]) -> None:
        function = FUNCTIONS[kernel.name]
        constants = dict(kernel.constants)
        free = set(function.arg_names) - set(constants)
        constants |= {name: size for name, size in TILES.items() if name in free}
        order = iter(values)
        arguments: dict[str, Any] = {}
        for name, kind in kernel.arguments:
            if kind is None:
                arguments[name] = None
            elif kind.startswith("*"):
                arguments[name] = _typed(self._memory[next(order) :], _TORCH[kind[1:]])
            else:
                arguments[name] = next(order)
        function[grid](**arguments, **constants)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def replay(self, graph: Callable[[], None]) -> None:
        graph()


def _typed(memory: torch.Tensor, item: torch.dtype) -> torch.Tensor:
    whole = len(memory) // item.itemsize * item.itemsize
    return memory[:whole].view(item)
