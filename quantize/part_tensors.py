"""The model's parts as torch tensors: read from a checkpoint, or joined from tensors that are being worked on.

Both classes are called with a part's name and give (weight, bias), which is what `TorchOps` asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevl.checkpoint import Checkpoint, part_weight
from edgevl.models.names import Part, all_parts, tensor_names
from edgevl.weights import FloatWeight, dequantize
from quantize.torch_ops import PartWeight


def to_torch(array: NDArray[Any]) -> Tensor:
    """A float array as an f32 tensor of its own memory; what was converted for us alone is taken as it is."""
    ours = array.dtype == np.float32 and array.flags.writeable and array.flags.c_contiguous
    return torch.from_numpy(array if ours else np.array(array, dtype=np.float32))


class JoinedTensors:
    """Parts joined, row after row, from a mapping of checkpoint tensor names ("…q_proj.weight") to tensors.

    The mapping is looked at on each call, so replaced tensors are seen, and gradients reach the sources.
    """

    def __init__(self, parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> None:
        self._parts = {part.name: part for part in parts}
        self._tensors = tensors

    def __call__(self, name: str) -> PartWeight:
        part = self._parts[name]
        names, count = tensor_names(part), len(part.sources)
        bias = self._join(names[count:]) if part.bias else None
        return self._join(names[:count]), bias

    def _join(self, names: list[str]) -> Tensor:
        tensors = [self._tensors[name] for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class CheckpointParts:
    """Parts read from a checkpoint when asked for, int4 ones dequantized; f32 on `device`. Keeps nothing by itself."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._parts = {part.name: part for part in all_parts(checkpoint.config)}
        self._device = device
        self._kept: dict[str, PartWeight] = {}

    def __call__(self, name: str) -> PartWeight:
        if name in self._kept:
            return self._kept[name]
        weight, bias = part_weight(self._checkpoint, self._parts[name])
        values = weight.values if isinstance(weight, FloatWeight) else dequantize(weight)
        joined = to_torch(values).to(self._device)
        return joined, None if bias is None else to_torch(bias).to(self._device)

    def keep(self, prefix: str | tuple[str, ...]) -> None:
        """Hold the parts whose names start with `prefix`, or one of them, and only those, until the next call."""
        self._kept = {}
        self._kept = {name: self(name) for name in self._parts if name.startswith(prefix)}
