"""The GPU backend: compiled kernels from the bundle, replayed over buffers that are allocated once; no torch.

`edgevl.backends.cuda_lowering` says what to launch, `cuda_memory` where everything lies, `cuda_device` talks to the
driver. A step copies its inputs in, launches (a decode step of one token is a captured graph, which reads position and
slot from device memory) and copies its result out. `edgevl.engine` makes a `CudaRunner`; the tests give it a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.backends.cuda_device import Device
from edgevl.backends.cuda_kernels import Argument, Kernel, KernelRecord, Launch, Region, WeightArray
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.backends.cuda_memory import DevicePlan, place_weights, plan_device, rope_turns
from edgevl.config import ModelConfig, TextConfig
from edgevl.errors import BundleError, CapacityError, UsageError
from edgevl.layouts import StoredWeight
from edgevl.memory import max_counts
from edgevl.recorder import Buffer, Graph, Rows, record_decoder, record_vision
from edgevl.runner import F32, I32, Limits

Array = NDArray[Any]
Weights = Callable[[str], StoredWeight]

_DTYPES: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "u8": np.uint8}


_LISTS = ("decoder", "argmax")  # lists of launches that a decode step replays


class Cubins:
    """Compiled kernels: their records, and a way to read each file of the bundle."""

    def __init__(self, records: Mapping[str, KernelRecord], read: Callable[[str], bytes]) -> None:
        self.records, self.read = records, read


class _Program:
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
        self._addresses: dict[tuple[str, Argument], int] = {}
        lowered = lower(graphs, text, limits, self._form, real_tokens)
        self._graphs, self._choices = lowered.graphs, lowered.choices
        self.plan: DevicePlan = plan_device(list(self._graphs.values()), limits, text)
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
            device.write(self.address(Region("turns", "*f32"), ""), rope_turns(text, limits.context))

    def _room(self, needed: int) -> None:
        free = self._device.available()
        if needed > free:
            raise CapacityError(
                f"this bundle needs {needed / 1e9:.2f} GB on the GPU, {free / 1e9:.2f} GB are free there; close other "
                "programs, or build with a smaller --context, --head int4 or --vision int8"
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
        key = (graph, argument)
        if key not in self._addresses:
            self._addresses[key] = self._find(argument, graph)
        return self._addresses[key]

    def _find(self, argument: Argument, graph: str) -> int:
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

    def launch(self, name: str, counts: Mapping[str, int], graph: str = "") -> None:
        """Every kernel of a list of choices, in order; `graph` is the one whose buffers it uses, when not its own."""
        for choice in self._choices[name]:
            for call in choice.launches(counts):
                self._launch(call, graph or name, counts)

    def _launch(self, call: Launch, graph: str, counts: Mapping[str, int]) -> None:
        function, record = self._functions[call.kernel.key]
        x, y, z, *_ = (*(extent.programs(counts, record.tiles) for extent in call.grid), 1, 1)
        values = tuple(
            a.factor * counts.get(a.symbol, 0) if isinstance(a, Rows) else self.address(a, graph)
            for a in call.arguments
        )
        self._device.launch(function, record, (x, y, z), values)

    def result(self, name: str, counts: Mapping[str, int]) -> F32:
        """The output of a graph, (rows, cols)."""
        output = self._graphs[name].output
        assert output is not None
        found = np.empty((counts.get(output.rows.symbol, 0) * output.rows.factor, output.cols), np.float32)
        self._device.read(self.address(output, name), found)
        return found

    def ids(self, count: int) -> I32:
        """What argmax chose, (count,)."""
        found = np.empty(count, np.int32)
        self._device.read(self.address(Region("ids", "*i32"), ""), found)
        return found


class CudaRunner:
    """A `Runner` on an NVIDIA GPU. Not to be called from two threads at once."""

    def __init__(self, config: ModelConfig, limits: Limits, weights: Weights, device: Device, cubins: Cubins) -> None:
        """Upload, load, allocate and capture everything; nothing is allocated afterwards.

        Raises `CapacityError` when it does not fit and `BundleError` when a kernel is missing.
        """
        self.config, self.limits, self._device = config, limits, device
        graphs = [record_decoder(config)]
        if config.vision is not None:
            graphs.append(record_vision(config))
        self._program = _Program(graphs, limits, weights, config.text, device, cubins, config.tokens.size)
        self.backend = f"cuda ({device.name})"
        # one token, or one of each slot: (list of choices, tokens) -> what replays it
        sizes = {1, limits.slots} if limits.slots <= min(limits.chunk, limits.logit_rows) else {1}
        self._captured = {(name, size): self._capture(name, size) for name in _LISTS for size in sorted(sizes)}

    @property
    def planned_bytes(self) -> int:
        """See `Runner.planned_bytes`."""
        return self._program.weight_bytes + self._program.plan.total

    def _capture(self, name: str, size: int) -> Any:
        counts = {"tokens": size, "logits": size}

        def work() -> None:
            self._program.launch(name, counts, "decoder")

        work()  # a driver may load kernels when they first run, which it cannot while it captures
        return self._device.capture(work)

    def _run(self, name: str, counts: Mapping[str, int]) -> None:
        captured = self._captured.get((name, counts["tokens"])) if counts["tokens"] == counts["logits"] else None
        if captured is None:
            self._program.launch(name, counts, "decoder")
        else:
            self._device.replay(captured)

    def _step(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> dict[str, int]:
        counts = {"tokens": tokens.size, "logits": logit_rows.size, "images": 0 if images is None else len(images)}
        self._check(counts, tokens, positions, slots, logit_rows)
        given: dict[str, Array] = {"tokens": tokens, "positions": positions, "slots": slots, "logit_rows": logit_rows}
        if images is not None:
            given["images"] = images
        self._program.fill("decoder", given, counts)
        self._run("decoder", counts)
        return counts

    def _check(self, counts: dict[str, int], tokens: I32, positions: I32, slots: I32, logit_rows: I32) -> None:
        """A kernel trusts its indices, so every one is looked at before."""
        limits = self.limits
        most = {"tokens": limits.chunk, "logits": limits.logit_rows, "images": limits.chunk}
        for what, count in counts.items():
            if count > most[what]:
                raise CapacityError(
                    f"a step has {count} {what}, the plan's limit is {most[what]}; split it into several"
                )
        if tokens.size == 0:
            raise UsageError("a step has no tokens; it needs at least one")
        if counts["images"] and self.config.vision is None:
            raise UsageError(f"{counts['images']} image rows were given to a model without vision; pass None")
        for name, values, low, end in (
            ("token", tokens, -counts["images"], self.config.text.vocab_size),
            ("position", positions, 0, limits.context),
            ("slot", slots, 0, limits.slots),
            ("row of logits", logit_rows, 0, tokens.size),
        ):
            if values.size and not low <= int(values.min()) <= int(values.max()) < end:
                wrong = int(values.min()) if int(values.min()) < low else int(values.max())
                raise UsageError(f"a step has the {name} {wrong}; it must be from {low} to {end - 1}")

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        """See `Runner.decode`. Raises `CapacityError` for a step over the limits, `UsageError` for a wrong index."""
        return self._program.result("decoder", self._step(tokens, positions, slots, images, logit_rows))

    def greedy(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> I32:
        """As `decode`, but the largest logit is found on the device: (L,) token ids are all that is copied back."""
        counts = self._step(tokens, positions, slots, images, logit_rows)
        self._run("argmax", counts)
        return self._program.ids(counts["logits"])

    def vision(self, pixels: NDArray[np.uint8]) -> F32:
        """See `Runner.vision`. Raises `CapacityError` for more tiles than the plan holds."""
        if self.config.vision is None:
            raise UsageError("this model has no vision tower; it reads text only")
        side = self.config.vision.tile_size
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
            raise UsageError(f"tiles have the shape {pixels.shape}; they must be (n, {side}, {side}, 3)")
        if len(pixels) > self.limits.tiles:
            raise CapacityError(
                f"{len(pixels)} tiles are over the plan's limit of {self.limits.tiles}; run them in several calls"
            )
        counts = {"tiles": len(pixels)}
        self._program.fill("vision", {"pixels": pixels}, counts)
        self._program.launch("vision", counts)
        return self._program.result("vision", counts)


def run_graph(
    graph: Graph,
    counts: Mapping[str, int],
    inputs: Mapping[str, Array],
    weights: Weights,
    config: TextConfig | None,
    limits: Limits,
    cache: tuple[Array, Array] | None,
    device: Device,
    cubins: Cubins,
) -> Array:
    """Lower any recorded graph, replay it once and return its output (rows, cols).

    As `edgevl.backends.cpu.run_graph`; `cache` is layer 0's keys and values, (slots, G, context, D) f16 each, read
    before and updated after the run.
    """
    program = _Program([graph], limits, weights, config, device, cubins)
    places = [program.address(Region(name, "*f16"), "") for name in ("keys", "values")] if cache else []
    for place, values in zip(places, cache or (), strict=True):
        device.write(place, values)
    program.fill(graph.name, inputs, counts)
    program.launch(graph.name, counts)
    for place, values in zip(places, cache or (), strict=True):
        device.read(place, values)
    return program.result(graph.name, counts)
