"""The GPU backend: compiled kernels from the bundle, replayed over buffers that are allocated once; no torch.

A step copies its inputs in, launches, and copies its result out; a decode step of few tokens, or of one of each slot,
is a captured graph, which reads positions and slots from device memory. `cuda_program` holds what is launched.
`edgevl.engine` makes a `CudaRunner`; the tests give it a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.backends.cuda_device import Device
from edgevl.backends.cuda_kernels import Region
from edgevl.backends.cuda_lowering import FEW_ROWS, LISTS
from edgevl.backends.cuda_program import Cubins, Program, Weights
from edgevl.config import ModelConfig, TextConfig
from edgevl.errors import UsageError
from edgevl.recorder import Graph, record_model
from edgevl.runner import F32, I32, Limits, check_step, check_tiles

Array = NDArray[Any]


class CudaRunner:
    """A `Runner` on an NVIDIA GPU. Not to be called from two threads at once."""

    # a step of as many tokens launches the kernels of a step of one, in which tokens do not meet: the same bits
    alike_rows = FEW_ROWS

    def __init__(self, config: ModelConfig, limits: Limits, weights: Weights, device: Device, cubins: Cubins) -> None:
        """Upload, load, allocate and capture everything; nothing is allocated afterwards.

        Raises `CapacityError` when it does not fit and `BundleError` when a kernel is missing.
        """
        self.config, self.limits, self._device = config, limits, device
        self._program = Program(record_model(config), limits, weights, config.text, device, cubins, config.tokens.size)
        self.backend = f"cuda ({device.name})"
        # steps of few tokens that all get logits, or of one token of each slot: (list, tokens) -> what replays it
        most = min(limits.chunk, limits.logit_rows)
        sizes = {*range(1, min(self.alike_rows, most) + 1), min(limits.slots, most)}
        names = ("decoder", *LISTS)
        warm = (1, min(limits.slots, most))  # a driver may load kernels when they first run, but not while it captures
        for name, size in product(names, warm):
            self._program.launch(name, {"tokens": size, "logits": size})
        self._captured = {key: self._capture(*key) for key in product(names, sorted(sizes))}

    @property
    def planned_bytes(self) -> int:
        """See `Runner.planned_bytes`."""
        return self._program.weight_bytes + self._program.plan.total

    def _capture(self, name: str, size: int) -> Any:
        counts = {"tokens": size, "logits": size}
        return self._device.capture(lambda: self._program.launch(name, counts))

    def _run(self, name: str, counts: Mapping[str, int]) -> None:
        captured = self._captured.get((name, counts["tokens"])) if counts["tokens"] == counts["logits"] else None
        if captured is None:
            self._program.launch(name, counts)
        else:
            self._device.replay(captured)

    def _step(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> dict[str, int]:
        counts = check_step(self.config, self.limits, tokens, images, logit_rows)
        self._check_indices(counts["images"], tokens, positions, slots, logit_rows)
        given: dict[str, Array] = {"tokens": tokens, "positions": positions, "slots": slots, "logit_rows": logit_rows}
        if images is not None:
            given["images"] = images
        self._program.fill("decoder", given, counts)
        self._run("decoder", counts)
        return counts

    def _check_indices(self, images: int, tokens: I32, positions: I32, slots: I32, logit_rows: I32) -> None:
        """A kernel trusts its indices, so every one is looked at before."""
        limits = self.limits
        for name, values, low, end in (
            ("token", tokens, -images, self.config.text.vocab_size),
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

    def choose(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32, draws: F32) -> I32:
        """See `edgevl.runner.Choose`: tokens are chosen on the device, and (L,) ids are all that is copied back."""
        if draws.shape != (logit_rows.size, 3):
            raise UsageError(f"draws have the shape {draws.shape}; this step needs {(logit_rows.size, 3)}")
        counts = self._step(tokens, positions, slots, images, logit_rows)
        drawn = bool(draws[:, 0].any())
        if drawn:
            self._program.set_draws(draws)
        self._run("sample" if drawn else "argmax", counts)
        return self._program.ids(counts["logits"])

    def vision(self, pixels: NDArray[np.uint8]) -> F32:
        """See `Runner.vision`. Raises `CapacityError` for more tiles than the plan holds."""
        counts = check_tiles(self.config, self.limits, pixels)
        self._program.fill("vision", {"pixels": pixels}, counts)
        self._program.launch("vision", counts)
        return self._program.result("vision", counts)

    def bandwidth(self) -> float | None:
        """Bytes a second that this GPU reads and writes when it copies; None where it has no room to try."""
        return self._device.bandwidth()

    def close(self) -> None:
        """Free the GPU's memory; nothing can be run afterwards."""
        self._program.close()


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

    As `edgevl.backends.cpu.run_graph`; `cache` is layer 0's keys and values, (slots, G, context, D) each: f16, or
    f32 in steps for an int8 cache; read before and updated after the run.
    """
    program = Program([graph], limits, weights, config, device, cubins)
    held = dict(zip(("keys", "values"), cache or (), strict=False))
    if limits.kv == "int8":
        pairs = {name: _codes(values) for name, values in held.items()}
        held = {name: codes for name, (codes, _) in pairs.items()}
        held |= {f"{name[:-1]}_scales": scales for name, (_, scales) in pairs.items()}
    for name, values in held.items():
        device.write(program.address(Region(name, ""), ""), values)
    program.fill(graph.name, inputs, counts)
    program.launch(graph.name, counts)
    for name, values in held.items():
        device.read(program.address(Region(name, ""), ""), values)
    for name, given in zip(("keys", "values"), cache or (), strict=False):
        given[...] = held[name] * held[f"{name[:-1]}_scales"][..., None] if limits.kv == "int8" else held[name]
    result = program.result(graph.name, counts)
    program.close()
    return result


def _codes(values: Array) -> tuple[Array, Array]:
    """Keys or values (slots, G, S, D) as codes and their scales (slots, G, S)."""
    scales = (np.abs(values).max(axis=3) / np.float32(127)).astype(np.float32)
    return np.rint(values / np.maximum(scales, np.float32(1e-30))[..., None]).astype(np.int8), scales
