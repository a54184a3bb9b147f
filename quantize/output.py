"""The finished checkpoint: the original's tensors and files, with the decoder's linears in AutoAWQ's GEMM layout.

Streams tensor by tensor from the original and the finished blocks into shards of at most 4 GB. Knows nothing of how the
codes were found. Called by `quantize.job`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgevl.checkpoint import Checkpoint
from edgevl.files import atomic_file
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, widest_first, write_safetensors
from quantize.groups import BlockTable
from quantize.partial import Partial, int4_names

_SHARD = 4_000_000_000  # bytes

# what stays as it was, by the region of `edgevl.models.names`, and why
KEPT = {
    "vision": ("vision_model", "the vision tower is small and 4 bits cost it accuracy; `edgevl build` can store int8"),
    "projector": ("mlp1", "the projector is small and every image token passes through it"),
    "embed": ("embed_tokens", "a table lookup gains no speed from 4 bits"),
    "head": ("lm_head", "errors in the logits are not corrected by anything after them"),
}


def write_output(
    checkpoint: Checkpoint,
    tables: list[BlockTable],
    partial: Partial,
    stage: Path,
    group_size: int,
) -> None:
    """Write the whole checkpoint into the folder `stage`."""
    blocks = [partial.open_block(table.layer) for table in tables]
    specs, sources = _plan(checkpoint, tables, blocks)
    shards = _shards(specs)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        many = len(shards) > 1
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        write_safetensors(stage / file, shard, _tensors(checkpoint, shard, sources), {"format": "pt"})
        weight_map |= {spec.name: file for spec in shard}
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs)
        _write_json(
            stage / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    _write_json(stage / "config.json", quantized_config(checkpoint, group_size))
    for name, content in {"tokenizer.json": checkpoint.tokenizer_json(), **checkpoint.extra_files()}.items():
        with atomic_file(stage / name) as stream:
            stream.write(content)


def quantized_config(checkpoint: Checkpoint, group_size: int) -> dict[str, Any]:
    """The original config.json with AutoAWQ's quantization_config, and float16 as the type to compute in.

    Scales are float16, and AutoAWQ's kernels compute in nothing else; what the file holds as bfloat16 or float32 is
    converted by who loads it.
    """
    regions = ("vision", "projector", "head", "embed") if checkpoint.config.vision else ("head", "embed")
    config = {k: _float16(v) if isinstance(v, dict) else v for k, v in _float16(checkpoint.config_json).items()}
    return {
        **config,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,  # this layout always stores zeros; a symmetric scheme stores 8
            "version": "gemm",
            "modules_to_not_convert": [KEPT[region][0] for region in regions],
        },
    }


def _float16(config: dict[str, Any]) -> dict[str, Any]:
    return {
        k: "float16" if k in ("torch_dtype", "dtype") and v in ("bfloat16", "float32") else v for k, v in config.items()
    }


_Source = tuple[str, SafetensorsFile | None]  # canonical name, and the block's file unless it is the original's


def _plan(
    checkpoint: Checkpoint, tables: list[BlockTable], blocks: list[SafetensorsFile]
) -> tuple[list[TensorSpec], dict[str, _Source]]:
    """Specs of every tensor under its stored name, in the original's order, and where each comes from."""
    module_block = {module: b for table, b in zip(tables, blocks, strict=True) for module in table.linears}
    changed = {name: block for block in blocks for name in block.specs if not name.endswith(int4_names(""))}
    specs: list[TensorSpec] = []
    sources: dict[str, _Source] = {}
    for name in checkpoint.names():
        stored = checkpoint.stored_name(name)
        module = name.removesuffix(".weight")
        if name != module and module in module_block:
            block = module_block[module]
            prefix = stored.removesuffix(".weight")
            for field in int4_names(""):
                spec = block.spec(f"{module}{field}")
                specs.append(TensorSpec(f"{prefix}{field}", spec.dtype, spec.shape))
                sources[f"{prefix}{field}"] = (f"{module}{field}", block)
        elif name in changed:
            spec = changed[name].spec(name)
            specs.append(TensorSpec(stored, spec.dtype, spec.shape))
            sources[stored] = (name, changed[name])
        else:
            specs.append(checkpoint.spec(name))
            sources[stored] = (name, None)
    return specs, sources


def _shards(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return [widest_first(shard) for shard in shards]


def _tensors(
    checkpoint: Checkpoint, specs: list[TensorSpec], sources: dict[str, _Source]
) -> Iterator[tuple[str, NDArray[Any]]]:
    for spec in specs:
        name, block = sources[spec.name]
        yield spec.name, block.raw(name) if block is not None else checkpoint.raw(name)[1]
        (checkpoint if block is None else block).release()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as stream:
        stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
