"""Graphs on a GPU: weights uploaded, kernels loaded, every argument resolved to an address, then launched.

`cuda_lowering` says what to launch, `cuda_memory` where everything lies, `cuda_device` talks to the driver. Knows
nothing of steps and tokens. Called by `edgevl.backends.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.backends.cuda_device import Device
from edgevl.backends.cuda_kernels import (
    Argument,
    Choice,
    Extent,
    Kernel,
    KernelRecord,
    Launch,
    Region,
    WeightArray,
)
from edgevl.backends.cuda_lowering import LISTS, Form, lower
from edgevl.backends.cuda_memory import DevicePlan, place_weights, plan_device, rope_turns
from edgevl.config import TextConfig
from edgevl.errors import BundleError, CapacityError, UsageError
from edgevl.layouts import StoredWeight
from edgevl.memory import max_counts
from edgevl.recorder import Buffer, Graph, Rows
from edgevl.runner import F32, I32, Limits

Array = NDArray[Any]
Weights = Callable[[str], StoredWeight]

_LEAST = np.float32(1e-30)  # in place of zero: as a temperature, and as the weight that is kept of a greedy row
_DTYPES: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "u8": np.uint8}


class Cubins:
    """Compiled kernels: their records, and a way to read each file of the bundle."""

    def __init__(self, records: Mapping[str, KernelRecord], read: Callable[[str], bytes]) -> None:
        self.records, self.read = records, read


@dataclass(frozen=True)
class _Call:
    """A launch with everything resolved but the counts."""

    function: Any
    record: KernelRecord
    grid: tuple[Extent, ...]
    values: tuple[int | Rows, ...]


class Program:
    """Graphs on a device: weights uploaded, kernels loaded, arguments resolved."""

    def __init__(
        self,
        graphs: Sequence[Graph],
        limits: Limits,
        weights: Weights,
        text: TextConfig | None,
        device: Device,
        cubins: Cubins,
        real_tokens: int = 0,
    ) -> None:
        self._device, self._cubins, self._weights = device, cubins, weights
        self._given: dict[str, Array] = {}  # the inputs of the last step
        lowered = lower(graphs, text, limits, self._form, real_tokens)
        self._graphs = lowered.graphs
        self.plan: DevicePlan = plan_device(list(self._graphs.values()), limits, text, real_tokens)
        arrays = self._arrays()
        self._places, self.weight_bytes = place_weights({a: array.nbytes for a, array in arrays.items()})
        self._functions = {key: self._load(key, kernel) for key, kernel in lowered.kernels(max_counts(limits)).items()}
        self._room(self.weight_bytes + self.plan.total)
        self._weight_base = device.allocate(max(self.weight_bytes, 1))
        for address, array in arrays.items():
            device.write(self._weight_base + self._places[address], array)
        self._base = device.allocate(self.plan.total)
        device.zero(self._base, self.plan.total)
        if text is not None:
            turns = rope_turns(text, limits.context)
            device.write(self.address(Region("turns", "*f32"), ""), turns)
        self.set_draws(np.zeros((limits.logit_rows, 3), np.float32))
        device.read(self._base, np.empty(1, np.uint8))  # everything that was written may go from here on
        self._calls = {name: self._prepare_all(choices, name) for name, choices in lowered.choices.items()}

    def _room(self, needed: int) -> None:
        free = self._device.available()
        if needed > free:
            raise CapacityError(
                f"this bundle needs {needed / 1e9:.2f} GB on the GPU, {free / 1e9:.2f} GB are free there; close other "
                "programs, or build with a smaller --context, --kv int8, --head int4, --embed int8 or --vision int8"
            )

    def _form(self, name: str) -> Form:
        stored = self._weights(name)
        return Form(stored.kind, stored.group_size)

    def _arrays(self) -> dict[int, Array]:
        """Every array of every weight that the graphs use, once, by its address on the host."""
        found: dict[int, Array] = {}
        for name in dict.fromkeys(w.name for g in self._graphs.values() for n in g.nodes for w in n.weights):
            stored = self._weights(name)
            for array in (*stored.arrays.values(), *([] if stored.bias is None else [stored.bias])):
                found[array.ctypes.data] = array
        return found

    def _load(self, key: str, kernel: Kernel) -> tuple[Any, KernelRecord]:
        record = self._cubins.records.get(key)
        if record is None or record.arguments != kernel.types:
            raise BundleError(f"the bundle has no kernel {key}, which this version launches; build the bundle again")
        return self._device.load(key, record, self._cubins.read(record.file)), record

    def address(self, argument: Argument, graph: str) -> int:
        """Where a kernel finds an argument of a graph's node."""
        if isinstance(argument, Buffer):
            return self._base + self.plan.offsets[graph][argument.index]
        if isinstance(argument, Region):
            return self._base + self.plan.region(argument)
        assert isinstance(argument, WeightArray)
        stored = self._weights(argument.name)
        array = stored.bias if argument.field == "bias" else stored.arrays[argument.field]
        assert array is not None
        return self._weight_base + self._places[array.ctypes.data]

    def fill(self, name: str, inputs: Mapping[str, Array], counts: Mapping[str, int]) -> None:
        """Copy the inputs of a graph to the device; raises `UsageError` for one that is missing or misshapen."""
        for key, buffer in self._graphs[name].inputs.items():
            size = counts.get(buffer.rows.symbol, 0) * buffer.rows.factor * buffer.cols
            if size == 0:
                continue
            if key not in inputs:
                raise UsageError(f"the {name} graph needs the input {key!r}, which was not given")
            array = np.ascontiguousarray(inputs[key], dtype=_DTYPES[buffer.dtype])
            if array.size != size:
                raise UsageError(f"the input {key!r} has {array.size} values; this step needs {size}")
            self._device.write(self.address(buffer, name), array)
            self._given[key] = array  # a driver may read late; what is given next comes after a `read`

    def _prepare_all(self, choices: Sequence[Choice[Launch]], name: str) -> list[Choice[_Call]]:
        """Addresses instead of names; ways that no step can take are left out."""
        graph = "decoder" if name in LISTS else name
        return [
            Choice(
                choice.rows,
                tuple(
                    (most, tuple(self._prepare(launch, graph) for launch in launches))
                    for most, launches in choice.ways
                    if all(launch.kernel.key in self._functions for launch in launches)
                ),
            )
            for choice in choices
        ]

    def _prepare(self, launch: Launch, graph: str) -> _Call:
        function, record = self._functions[launch.kernel.key]
        if any(extent.tile and extent.tile not in record.tiles for extent in launch.grid):
            raise BundleError(f"the kernel {launch.kernel.key} lacks its block sizes; build the bundle again")
        values = tuple(a if isinstance(a, Rows) else self.address(a, graph) for a in launch.arguments)
        return _Call(function, record, launch.grid, values)

    def launch(self, name: str, counts: Mapping[str, int]) -> None:
        """Every kernel of a graph, or of one of `LISTS`, in order."""
        for choice in self._calls[name]:
            for call in choice.calls(counts):
                x, y, z, *_ = (*(extent.programs(counts, call.record.tiles) for extent in call.grid), 1, 1)
                values = tuple(v if isinstance(v, int) else v.factor * counts.get(v.symbol, 0) for v in call.values)
                self._device.launch(call.function, call.record, (x, y, z), values)

    def result(self, name: str, counts: Mapping[str, int]) -> F32:
        """The output of a graph, (rows, cols)."""
        output = self._graphs[name].output
        assert output is not None
        found = np.empty((counts.get(output.rows.symbol, 0) * output.rows.factor, output.cols), np.float32)
        self._device.read(self.address(output, name), found)
        return found

    def set_draws(self, draws: F32) -> None:
        """Temperatures, top-p and random numbers, (L, 3), for "sample", as its kernels read them."""
        temperature, top_p, number = draws.astype(np.float32).T
        factor = np.float32(np.log2(np.e)) / np.maximum(temperature, _LEAST)
        share = np.where(temperature == 0, _LEAST, np.where(top_p < 1, top_p, np.float32(2)))
        array = np.ascontiguousarray(np.stack([factor, share, number], axis=1), np.float32)
        self._device.write(self.address(Region("draws", "*f32"), ""), array)
        self._given["draws"] = array

    def close(self) -> None:
        """Free the device's memory; nothing can be launched afterwards."""
        for address in (self._weight_base, self._base):
            self._device.free(address)

    def ids(self, count: int) -> I32:
        """The tokens that were chosen, (count,)."""
        found = np.empty(count, np.int32)
        self._device.read(self.address(Region("ids", "*i32"), ""), found)
        return found
