"""Every tensor of a checkpoint against the shapes that its configuration implies: none missing, none left over.

Works on headers alone, so it costs nothing on 16 GiB. Called once when a checkpoint is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from edgevl.awq_format import FIELDS, check
from edgevl.checkpoint.quantization import Quantization
from edgevl.config import ModelConfig
from edgevl.errors import CheckpointError
from edgevl.models.names import Part, all_parts
from edgevl.safetensors_file import DTYPES, TensorSpec

_FLOATS = ("F64", "F32", "F16", "BF16")
_BARE = ("vision.positions", "vision.prefix")  # parameters without a `.weight`


def check_tensors(
    specs: Mapping[str, TensorSpec], config: ModelConfig, quantization: Quantization | None, optional: tuple[str, ...]
) -> None:
    """Raise `CheckpointError` at the first tensor that is missing, misshapen, or unknown.

    `specs` by canonical name. `optional` are prefixes of names that may be there and are not part of the forward pass.
    """
    wanted: set[str] = set()
    for part in all_parts(config):
        for source, rows in _source_rows(part, config):
            wanted |= _check_source(specs, config, part, source, rows, quantization)
    for name in sorted(set(specs) - wanted):
        if name.startswith(optional) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and config.text.tied_embeddings:
            continue
        raise CheckpointError(
            f"the tensor {name} {list(specs[name].shape)} is not known in a {config.architecture}; "
            "it would change what the model computes, so the checkpoint is refused"
        )


def _source_rows(part: Part, config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Each source module of a part with its own number of rows."""
    t = config.text
    if len(part.sources) == 3:
        rows = [t.heads * t.head_dim, t.kv_heads * t.head_dim, t.kv_heads * t.head_dim]
    else:
        rows = [part.shape[0] // len(part.sources)] * len(part.sources)
    yield from zip(part.sources, rows, strict=True)


def _check_source(
    specs: Mapping[str, TensorSpec],
    config: ModelConfig,
    part: Part,
    source: str,
    rows: int,
    quantization: Quantization | None,
) -> set[str]:
    used = set()
    if part.kind == "linear" and f"{source}.qweight" in specs:
        if quantization is None:
            raise CheckpointError(f"{source}.qweight is quantized, but config.json has no quantization_config")
        found = {f: specs[f"{source}.{f}"] for f in FIELDS if f"{source}.{f}" in specs}
        described = {f: (DTYPES[s.dtype].name, s.shape) for f, s in found.items()}
        shape = check(source, described, quantization.group_size)
        if shape != (rows, part.shape[1]):
            raise CheckpointError(
                f"{source} is quantized as {list(shape)}; config.json implies {[rows, part.shape[1]]}"
            )
        used |= {f"{source}.{f}" for f in FIELDS}
    else:
        name = source if part.name in _BARE else f"{source}.weight"
        expected: tuple[int, ...] = (rows, *part.shape[1:])
        if part.name == "vision.positions" and config.vision is not None:
            expected = (1, config.vision.position_grid**2, config.vision.hidden_size)
        _expect(specs, name, expected)
        used.add(name)
    if part.bias:
        _expect(specs, f"{source}.bias", (rows,))
        used.add(f"{source}.bias")
    return used


def _expect(specs: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...]) -> None:
    if name not in specs:
        raise CheckpointError(f"the tensor {name} {list(shape)} is missing; the checkpoint is incomplete")
    spec = specs[name]
    if spec.shape != shape:
        raise CheckpointError(f"the tensor {name} has the shape {list(spec.shape)}; config.json implies {list(shape)}")
    if spec.dtype not in _FLOATS:
        raise CheckpointError(f"the tensor {name} is stored as {spec.dtype}; {', '.join(_FLOATS)} are read")


def square_side(count: int) -> int | None:
    """The side of a square of `count` cells, or None."""
    side = math.isqrt(count)
    return side if side * side == count else None
