"""Devices that need no GPU: one runs kernels in Triton's interpreter, one only looks at how they are called."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before the kernels are imported

import torch

from deploy.kernels.compiler import FUNCTIONS
from deploy.kernels.tuning import tuning
from edgevl.backends.cuda_kernels import Kernel, KernelRecord
from edgevl.backends.cuda_program import Cubins

TILES = {
    "BLOCK": 64,
    "BLOCK_G": 2,
    "BLOCK_M": 16,
    "BLOCK_N": 32,
    "BLOCK_S": 16,
}  # small: the interpreter pays for every value of a block
_TORCH = {"f32": torch.float32, "f16": torch.float16, "i32": torch.int32, "u8": torch.uint8, "i8": torch.int8}


def uncompiled(kernels: Mapping[str, Kernel], architecture: str = "") -> Cubins:
    """Records as the builder leaves them, with no code behind them; small tiles unless an SM is named."""
    records = {}
    for key, kernel in kernels.items():
        tiles = dict(tuning(kernel.name, kernel.variant, architecture).tiles) if architecture else TILES
        fixed = dict(kernel.constants)
        tiles = {name: size for name, size in tiles.items() if name not in fixed}
        records[key] = KernelRecord(f"kernels/{key}.cubin", key, 4, 0, kernel.types, tiles)
    return Cubins(records, lambda file: b"")


class InterpreterDevice:
    """Memory is a torch tensor; a launch is a call of the kernel's own source."""

    name = "interpreter"

    def __init__(self, kernels: Mapping[str, Kernel], size: int = 64 << 20) -> None:
        self.kernels = dict(kernels)
        self._memory = torch.full((size,), 0xAB, dtype=torch.uint8)  # what is read before it is written is no zero
        self._start = 256

    def available(self) -> int:
        return len(self._memory) - self._start

    def allocate(self, size: int) -> int:
        address = self._start
        self._start += -(-size // 256) * 256
        return address

    def free(self, address: int) -> None:
        assert 0 < address < self._start

    def bandwidth(self) -> None:
        return None

    def zero(self, address: int, size: int) -> None:
        self._memory[address : address + size] = 0

    def write(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._memory.numpy()[address : address + array.nbytes] = array.reshape(-1).view(np.uint8)

    def read(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        array.reshape(-1).view(np.uint8)[...] = self._memory.numpy()[address : address + array.nbytes]

    def load(self, key: str, record: KernelRecord, cubin: bytes) -> Kernel:
        return self.kernels[key]

    def launch(self, kernel: Kernel, record: KernelRecord, grid: tuple[int, int, int], values: tuple[int, ...]) -> None:
        function = FUNCTIONS[kernel.name]
        names = [name for name, _ in kernel.arguments]
        assert names == function.arg_names[: len(names)], f"{kernel.name} takes {function.arg_names}"
        constants = dict(kernel.constants)
        constants |= {name: size for name, size in record.tiles.items() if name in function.arg_names}
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


class FakeDriver:
    """`cuda.bindings.driver` without a GPU: looks at every launch, and counts."""

    def __init__(self, cubins: Cubins, **facts: Any) -> None:
        self._records: dict[str, KernelRecord] = {}
        self.learn(cubins)
        self.version, self.sm, self.free, self.unified = 13000, (8, 7), 1 << 33, 0
        self.fails: dict[str, Any] = {}  # function -> status
        for name, value in facts.items():
            assert hasattr(self, name)
            setattr(self, name, value)
        self.allocated: list[tuple[int, int]] = []
        self._next = 7 << 32
        self._entered = threading.local()
        self._loaded: set[str] = set()  # functions that ran
        self.launches: list[str] = []
        self.passed: list[tuple[str, list[int]]] = []  # of every launch: function and values
        self.graphs = 0  # that were captured and not destroyed
        self.replays: list[Any] = []
        self.permissions: dict[str, int] = {}
        self._capturing = False
        self._captured: list[str] = []

    def learn(self, cubins: Cubins) -> None:
        """Kernels that may be launched."""
        self._records |= {record.symbol: record for record in cubins.records.values()}

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver

        if not name.startswith("cu") or name.startswith("cuda"):
            return getattr(driver, name)  # enumerations

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name not in ("cuInit", "cuCtxSetCurrent", "cuDriverGetVersion") and not name.startswith("cuDevice"):
                assert getattr(self._entered, "context", "") == "context", f"{name} on a thread without the context"
            if name not in ("cuLaunchKernel", "cuStreamEndCapture"):
                assert not self._capturing, name
            status = self.fails.get(name, driver.CUresult.CUDA_SUCCESS)
            found = getattr(self, f"_{name}", lambda *_: ())(*arguments)
            return (status, *found)

        return call

    def _cuDriverGetVersion(self) -> tuple[int]:  # noqa: N802
        return (self.version,)

    def _cuDeviceGet(self, index: int) -> tuple[int]:  # noqa: N802
        return (index,)

    def _cuDeviceGetName(self, length: int, device: int) -> tuple[bytes]:  # noqa: N802
        return (b"Orin\0\0",)

    def _cuDeviceGetAttribute(self, kind: Any, device: int) -> tuple[int]:  # noqa: N802
        values = {"MAJOR": self.sm[0], "MINOR": self.sm[1], "INTEGRATED": self.unified}
        return (values[kind.name.rpartition("_")[2]],)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[str]:  # noqa: N802
        return ("context",)

    def _cuCtxSetCurrent(self, context: str) -> tuple[()]:  # noqa: N802
        self._entered.context = context
        return ()

    def _cuStreamCreate(self, flags: int) -> tuple[str]:  # noqa: N802
        return ("stream",)

    def _cuMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.free, 1 << 34

    def _cuMemAlloc(self, size: int) -> tuple[int]:  # noqa: N802
        start, self._next = self._next, self._next + -(-size // 512) * 512
        self.allocated.append((start, size))
        return (start,)

    def _cuMemFree(self, address: int) -> tuple[()]:  # noqa: N802
        self.allocated.remove(next(place for place in self.allocated if place[0] == address))
        return ()

    def _inside(self, address: int, size: int = 1) -> bool:
        return any(start <= address and address + size <= start + room for start, room in self.allocated)

    def _cuMemcpyHtoDAsync(self, to: int, start: int, size: int, stream: str) -> tuple[()]:  # noqa: N802
        assert self._inside(to, size) and stream == "stream"
        return ()

    def _cuMemcpyDtoHAsync(self, to: int, start: int, size: int, stream: str) -> tuple[()]:  # noqa: N802
        assert self._inside(start, size) and stream == "stream"
        ctypes.memset(to, 0, size)
        return ()

    def _cuMemsetD8Async(self, to: int, value: int, size: int, stream: str) -> tuple[()]:  # noqa: N802
        assert self._inside(to, size)
        return ()

    def _cuModuleLoadData(self, cubin: bytes) -> tuple[str]:  # noqa: N802
        return ("module",)

    def _cuModuleGetFunction(self, module: str, symbol: bytes) -> tuple[str]:  # noqa: N802
        return (symbol.decode(),)

    def _cuFuncSetAttribute(self, function: str, kind: Any, value: int) -> tuple[()]:  # noqa: N802
        self.permissions[function] = value
        return ()

    def _cuLaunchKernel(self, function: str, *arguments: Any) -> tuple[()]:  # noqa: N802
        record = self._records[function]
        grid, block, (shared, stream, places, extra) = arguments[:3], arguments[3:6], arguments[6:]
        assert all(0 < extent < bound for extent, bound in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=True)), grid
        assert (block, shared, stream, extra) == ((32 * record.warps, 1, 1), record.shared, "stream", 0)
        cells = (ctypes.c_uint64 * (len(record.arguments) + 2)).from_address(places)
        values = [ctypes.c_uint64.from_address(place).value for place in cells]
        assert values[-2:] == [0, 0], f"{function} has no scratch"
        for kind, value in zip(record.arguments, values, strict=False):
            if kind.startswith("*"):
                assert value % 16 == 0 and self._inside(value), f"{function}: {kind} {value:#x}"
            else:
                assert 0 < value < 1 << 31, f"{function}: {kind} {value}"
        self.passed.append((function, values[:-2]))
        if self._capturing:
            assert function in self._loaded, f"{function} would be loaded while it is captured"
            self._captured.append(function)
        else:
            self._loaded.add(function)
            self.launches.append(function)
        return ()

    def _cuStreamBeginCapture(self, stream: str, mode: Any) -> tuple[()]:  # noqa: N802
        self._capturing, self._captured = True, []
        return ()

    def _cuStreamEndCapture(self, stream: str) -> tuple[list[str]]:  # noqa: N802
        self._capturing = False
        self.graphs += 1
        return (self._captured,)

    def _cuGraphDestroy(self, graph: list[str]) -> tuple[()]:  # noqa: N802
        self.graphs -= 1
        return ()

    def _cuGraphInstantiate(self, graph: list[str], flags: int) -> tuple[list[str]]:  # noqa: N802
        return (graph,)

    def _cuGraphLaunch(self, graph: list[str], stream: str) -> tuple[()]:  # noqa: N802
        self.replays.append(graph)
        return ()
