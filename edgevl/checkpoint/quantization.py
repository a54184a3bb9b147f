"""The `quantization_config` of a checkpoint: AutoAWQ's GEMM layout is read, everything else refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevl.checkpoint.settings import Settings
from edgevl.errors import CheckpointError


@dataclass(frozen=True)
class Quantization:
    """How the decoder's linears are stored. `symmetric`: every zero code is 8."""

    bits: int
    group_size: int  # Q, in-features
    symmetric: bool
    not_converted: tuple[str, ...]  # module name parts that stayed float


def read_quantization(config: dict[str, Any], symmetric: bool | None = None) -> Quantization | None:
    """From config.json (top level or llm_config); None when the checkpoint is not quantized.

    `symmetric` is what the tensors themselves say; the format's own `zero_point` cannot express it.
    """
    inner = config.get("llm_config")
    found = config.get("quantization_config")
    if found is None and isinstance(inner, dict):
        found = inner.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: quantization_config is {found!r}; a JSON object is needed")
    q = Settings(found, "config.json: quantization_config")
    method = q.data.get("quant_method")
    if method != "awq":
        raise q.fail("quant_method", "edgevl reads unquantized checkpoints and AutoAWQ's (awq); quantize the original")
    version = q.data.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise q.fail("version", "of AutoAWQ's layouts only gemm is read; convert it or quantize the original")
    q.expect("bits", 4)
    skipped = q.data.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(s, str) for s in skipped):
        raise q.fail("modules_to_not_convert", "a list of module names is needed")
    zero_point = q.flag("zero_point", True)
    if not zero_point:
        raise q.fail("zero_point", "the gemm layout stores zeros even for symmetric weights, so it must be true")
    return Quantization(4, q.whole("group_size"), bool(symmetric), tuple(skipped))
