"""The GPU as the backend sees it: one stream, memory, compiled kernels, captured graphs.

`Device` is what `edgevl.backends.cuda` asks for. `CudaDevice` does it with the driver, through cuda-bindings, and says
in one sentence what a machine lacks; the tests have devices of their own. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

from numpy.typing import NDArray

from edgevl.backends.cuda_kernels import KernelRecord
from edgevl.errors import BundleError, CapacityError, EdgevlError, MissingExtraError
from edgevl.machine import available_memory

Array = NDArray[Any]


class Device(Protocol):
    """What the backend asks of a GPU: one stream, on which everything happens in order."""

    name: str  # one line for people

    def available(self) -> int:
        """Bytes that can be allocated."""
        ...

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, a multiple of 256."""
        ...

    def free(self, address: int) -> None:
        """Give back what was allocated there."""
        ...

    def zero(self, address: int, size: int) -> None:
        """Set bytes to zero."""
        ...

    def write(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device; it stays as it is until the next `read`."""
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

    def bandwidth(self) -> float | None:
        """Bytes a second, read and written, of a copy from one place to another; None without room for one."""
        ...


# CUDA versions, 1000 · major + 10 · minor: drivers run what compilers of the same major version made, and Triton
# compiles for Blackwell with CUDA 13's, for the others with CUDA 12's
_OLDEST_DRIVER = {"sm_110": 13000, "sm_120": 13000}
_DRIVER = 12000
_BLOCK = 64 << 20  # bytes of one copy of weights
_FREE_SHARED = 48 << 10  # bytes of shared memory that need no permission


class _Entered(threading.local):
    """Whether this thread works in the GPU's context; the driver remembers it for each thread."""

    yes = False


class CudaDevice:
    """The first GPU of this machine, for kernels of one SM."""

    def __init__(self, what: str, architecture: str = "", driver: Any = None) -> None:
        """`what` begins a message: "the bundle was built for ..."; `architecture` "" takes any; `driver` is the tests'.

        Raises `MissingExtraError` without cuda-bindings, `EdgevlError` without a driver that is new enough and a GPU,
        and `BundleError` when the GPU cannot run kernels of `architecture`.
        """
        self._what, self._context = what, None
        self._driver = driver or _bindings()
        results = self._driver.CUresult
        try:
            (status,) = self._driver.cuInit(0)
        except RuntimeError:  # cuda-bindings looks for the library at the first call
            status = results.CUDA_ERROR_STUB_LIBRARY  # a library without a driver behind it
        if status == results.CUDA_ERROR_STUB_LIBRARY:
            raise EdgevlError(
                f"{self._what} and needs NVIDIA's driver, which this machine lacks; run it on its device, or build "
                "with --target host"
            )
        if status == results.CUDA_ERROR_NO_DEVICE:
            raise EdgevlError(f"{self._what}, this machine has a driver but no GPU; build with --target host")
        self._done("cuInit", status)
        version, oldest = int(self._call("cuDriverGetVersion")), _OLDEST_DRIVER.get(architecture, _DRIVER)
        if version < oldest:
            raise EdgevlError(
                f"{self._what} and needs a driver for CUDA {_version(oldest)}, this machine's is for "
                f"{_version(version)}; install a newer driver"
            )
        self._device = self._call("cuDeviceGet", 0)
        kinds = self._driver.CUdevice_attribute
        major = self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self._unified = bool(self._attribute(kinds.CU_DEVICE_ATTRIBUTE_INTEGRATED))
        label = self._call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode()
        self.architecture = f"sm_{major}{minor}"
        self.name, self.driver_version = f"{label}, {self.architecture}", _version(version)
        if architecture not in ("", self.architecture):
            raise BundleError(f"{self._what}, this GPU is {self.name}; build for it (`edgevl targets`)")
        self._context, self._entered = self._call("cuDevicePrimaryCtxRetain", self._device), _Entered()
        self._stream = self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver; what it returns besides the status: nothing, a value or several."""
        if self._context is not None and not self._entered.yes:
            self._entered.yes = True
            self._call("cuCtxSetCurrent", self._context)
        try:
            status, *values = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # cuda-bindings did not find the function in the driver
            raise EdgevlError(
                f"{self._what}, this machine's driver has no {name} ({error}); install the cuda-bindings of its "
                "version of CUDA, such as `pip install 'cuda-bindings<13'`"
            ) from error
        self._done(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def _done(self, name: str, status: Any) -> None:
        """Raise for a status that is no success."""
        if name == "cuMemAlloc" and status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise CapacityError(f"{self._what}, whose plan does not fit into this GPU's memory; close other programs")
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise EdgevlError(f"the GPU's driver failed at {name}: {getattr(status, 'name', status)}")

    def _attribute(self, kind: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", kind, self._device))

    def available(self) -> int:
        """See `Device.available`. Where processor and GPU share memory, what the system can give counts."""
        if self._unified:
            return available_memory()
        return int(self._call("cuMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """See `Device.allocate`."""
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        """See `Device.free`."""
        self._call("cuMemFree", address)

    def zero(self, address: int, size: int) -> None:
        """See `Device.zero`."""
        self._call("cuMemsetD8Async", address, 0, size, self._stream)

    def write(self, address: int, array: Array) -> None:
        """See `Device.write`. A driver may read late: the array is kept until the next `read` or `wait`."""
        start = array.ctypes.data
        for offset in range(0, array.nbytes, _BLOCK):
            size = min(_BLOCK, array.nbytes - offset)
            self._call("cuMemcpyHtoDAsync", address + offset, start + offset, size, self._stream)

    def read(self, address: int, array: Array) -> None:
        """See `Device.read`."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def bandwidth(self, size: int = 256 << 20) -> float | None:
        """See `Device.bandwidth`: the median of seven copies of `size` bytes after one to warm up."""
        if 2 * size > self.available():
            return None
        source = self.allocate(2 * size)
        taken = []
        for _ in range(8):
            self.wait()
            start = time.perf_counter()
            self._call("cuMemcpyDtoDAsync", source + size, source, size, self._stream)
            self.wait()
            taken.append(time.perf_counter() - start)
        self.free(source)
        return 2 * size / median(taken[1:])

    def wait(self) -> None:
        """Until everything is done."""
        self._call("cuStreamSynchronize", self._stream)

    def load(self, key: str, record: KernelRecord, cubin: bytes) -> Any:
        """See `Device.load`."""
        function = self._call("cuModuleGetFunction", self._call("cuModuleLoadData", cubin), record.symbol.encode())
        if record.shared > _FREE_SHARED:
            kind = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, kind, record.shared)
        return function

    def launch(self, function: Any, record: KernelRecord, grid: tuple[int, int, int], values: tuple[int, ...]) -> None:
        """See `Device.launch`. Two pointers to scratch follow the arguments; no kernel of ours has any."""
        cells = (ctypes.c_uint64 * (len(values) + 2))(*values, 0, 0)  # little-endian: an i32 is a cell's first half
        first = ctypes.addressof(cells)
        places = (ctypes.c_uint64 * len(cells))(*range(first, first + 8 * len(cells), 8))
        block = (32 * record.warps, 1, 1)
        self._call("cuLaunchKernel", function, *grid, *block, record.shared, self._stream, ctypes.addressof(places), 0)

    def capture(self, work: Callable[[], None]) -> Any:
        """See `Device.capture`."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        work()
        graph = self._call("cuStreamEndCapture", self._stream)
        ready = self._call("cuGraphInstantiate", graph, 0)
        self._call("cuGraphDestroy", graph)
        return ready

    def replay(self, graph: Any) -> None:
        """See `Device.replay`."""
        self._call("cuGraphLaunch", graph, self._stream)


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingExtraError("running a bundle on a GPU", "cuda-bindings", "'edgevl[cuda]'") from error
    return driver


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
