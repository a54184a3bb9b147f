"""One part of the model, read from a checkpoint: its sources joined row after row, in whatever kind they are stored.

The only reader of weights for the builder, the quantizer and the reference. Knows names and formats; computes nothing
but the resized position table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.awq_format import FIELDS, unpack
from edgevl.checkpoint.checkpoint import Checkpoint
from edgevl.checkpoint.positions import resize_positions
from edgevl.errors import CheckpointError
from edgevl.models.names import Part, tensor_names
from edgevl.weights import FloatWeight, Int4Weight, Weight


def part_weight(checkpoint: Checkpoint, part: Part) -> tuple[Weight, NDArray[np.float32] | None]:
    """The part's weight in `part.shape`, and its bias (N,) f32 or None.

    Float parts keep f16 and f32 as stored (a mapped view when one source suffices), bf16 becomes f32. Quantized sources
    give an `Int4Weight`. A part of which only some sources are quantized raises `CheckpointError`.
    """
    bias = _bias(checkpoint, part)
    if part.name == "vision.positions":
        vision = checkpoint.config.vision
        assert vision is not None, "a part of the vision tower belongs to a model that has one"
        table = checkpoint.array(part.sources[0])
        return FloatWeight(resize_positions(table, vision.grid, vision.align_corners)), None
    quantized = [checkpoint.has(f"{source}.qweight") for source in part.sources]
    if part.kind == "linear" and any(quantized):
        if not all(quantized):
            odd = part.sources[quantized.index(False)]
            raise CheckpointError(f"{odd} is not quantized but is computed together with others that are")
        return _join_int4([_int4(checkpoint, source) for source in part.sources]), bias
    names = tensor_names(part)[: len(part.sources)]
    arrays = [checkpoint.array(name) for name in names]
    values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    assert values.shape == part.shape, f"{part.name} came out as {values.shape}, not {part.shape}"
    return FloatWeight(values), bias


def _bias(checkpoint: Checkpoint, part: Part) -> NDArray[np.float32] | None:
    if not part.bias:
        return None
    found: list[NDArray[Any]] = [checkpoint.array(f"{source}.bias") for source in part.sources]
    return np.concatenate([np.asarray(one, np.float32) for one in found])


def _int4(checkpoint: Checkpoint, source: str) -> Int4Weight:
    assert checkpoint.quantization is not None, "opening refuses quantized tensors without a quantization_config"
    tensors = {field: checkpoint.array(f"{source}.{field}") for field in FIELDS}
    return unpack(tensors, source, checkpoint.quantization.group_size)


def _join_int4(weights: list[Int4Weight]) -> Int4Weight:
    if len(weights) == 1:
        return weights[0]
    return Int4Weight(
        np.concatenate([w.codes for w in weights]),
        np.concatenate([w.scales for w in weights]),
        np.concatenate([w.zeros for w in weights]),
    )
