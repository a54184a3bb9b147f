"""From a checkpoint to a bundle: lay every weight out for the target, write, try it, seal it.

One of the three files to read first. Needs no device: the bundle is written to a staging directory beside its final
place and renamed when the golden prompt has been recorded. Parts are read, packed and written one at a time, so memory
stays at the largest single weight. Called by `edgevl build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.cubins import compile_kernels
from deploy.even_keys import even_keys
from edgevl import __version__
from edgevl.backends.cuda_kernels import KernelRecord
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.bundle import (
    PAD,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    FileRecord,
    Golden,
    Manifest,
    Source,
    Target,
    WeightRecord,
    write_manifest,
)
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.checkpoint.parts import part_weight
from edgevl.config import ModelConfig
from edgevl.errors import UsageError
from edgevl.files import atomic_file, check_target, sha256_file, staging_directory
from edgevl.layouts import int4_shapes, int8_shapes, pack
from edgevl.memory import max_counts
from edgevl.models.names import Part, all_parts
from edgevl.recorder import record_model
from edgevl.runner import Limits
from edgevl.safetensors_file import TensorSpec, write_safetensors
from edgevl.targets import target_info
from edgevl.weights import FloatWeight, Weight, dequantize, quantize_int4, quantize_int8

Progress = Callable[[str, int, int], None]  # stage, done, total

_GOLDEN_TEXT = "The capital of France is a city on the river Seine, and"
_ALIGN = 64  # bytes; every tensor of a bundle begins at a multiple


@dataclass(frozen=True)
class BuildSettings:
    """What the user may choose. `body` is for weights that the checkpoint holds unquantized."""

    target: str = "host"
    body: str = "f16"  # f16 | f32
    head: str = "f16"  # f16 | f32 | int8 | int4
    embed: str = "f16"  # f16 | int8; f32 where the head is
    vision: str = "f16"  # f16 | f32 | int8; the projector follows
    kv: str = "f16"  # f16 | int8 | f32
    context: int | None = None  # tokens; None: what the model was trained for, at most 16,384
    force: bool = False  # replace an existing bundle

    def __post_init__(self) -> None:
        allowed = {
            "body": ("f16", "f32"),
            "head": ("f16", "f32", "int8", "int4"),
            "embed": ("f16", "int8"),
            "vision": ("f16", "f32", "int8"),
            "kv": ("f16", "int8", "f32"),
        }
        gpu = target_info(self.target).backend == "cuda"
        for name, values in allowed.items():
            chosen = tuple(v for v in values if not (gpu and v == "f32"))
            if getattr(self, name) not in chosen:
                where = f" for {self.target}" if gpu else ""
                raise UsageError(f"--{name} {getattr(self, name)} cannot be built{where}; choose {' or '.join(chosen)}")


def build(model: str, out: Path, settings: BuildSettings, progress: Progress = lambda *_: None) -> str:
    """Build `model` (directory, GGUF file, hub id or "demo") into the bundle directory `out`; returns its digest.

    Raises `CheckpointError` for a checkpoint that cannot be used and `UsageError` for settings that do not go together.
    """
    checkpoint = open_checkpoint(model)
    check_target(out, settings.force, checkpoint.path)
    config = checkpoint.config
    limits = _limits(config, settings)
    parts = all_parts(config)
    _check_shapes(parts, settings)
    kernels = _kernels(checkpoint, parts, limits, settings, progress)
    with staging_directory(out, force=settings.force) as stage:
        records = _write_weights(checkpoint, parts, settings, stage / WEIGHTS, progress)
        for name, content in (
            (TOKENIZER, checkpoint.tokenizer_json()),
            (TEMPLATE, checkpoint.chat_template().encode("utf-8")),
        ):
            with atomic_file(stage / name) as stream:
                stream.write(content)
        for record, cubin in kernels.values():
            (stage / record.file).parent.mkdir(exist_ok=True)
            with atomic_file(stage / record.file) as stream:
                stream.write(cubin)
        progress("digests", 0, 1)
        names = (WEIGHTS, TOKENIZER, TEMPLATE, *(record.file for record, _ in kernels.values()))
        files = {n: FileRecord((stage / n).stat().st_size, sha256_file(stage / n)) for n in names}
        progress("digests", 1, 1)

        def manifest(golden: Golden | None) -> Manifest:
            source = Source(Path(checkpoint.path).name, checkpoint.digest, _describe(checkpoint))
            records_of = {key: record for key, (record, _) in kernels.items()}
            target = _target(settings.target)
            return Manifest(1, __version__, source, target, config, limits, records, files, golden, records_of)

        write_manifest(stage, manifest(None))
        progress("golden prompt", 0, 1)
        digest = write_manifest(stage, manifest(_golden(stage)))
        progress("golden prompt", 1, 1)
    return digest


def _target(name: str) -> Target:
    info = target_info(name)
    return Target(name, info.backend, info.layout, info.architecture if info.backend == "cuda" else "")


def _kernels(
    checkpoint: Checkpoint, parts: list[Part], limits: Limits, settings: BuildSettings, progress: Progress
) -> dict[str, tuple[KernelRecord, bytes]]:
    """Compiled GPU kernels of this model, by key; none for a CPU."""
    info, config = target_info(settings.target), checkpoint.config
    if info.backend != "cuda":
        return {}
    forms = {part.name: _form(checkpoint, part, settings) for part in parts}
    lowered = lower(record_model(config), config.text, limits, forms.__getitem__, config.tokens.size)
    return compile_kernels(lowered.kernels(max_counts(limits)), info.architecture, progress)


def _form(checkpoint: Checkpoint, part: Part, settings: BuildSettings) -> Form:
    kind, arrays = _plan_part(checkpoint, part, settings)
    return Form(kind, part.shape[1] // arrays["scales"][1][1] if kind == "int4" else 0)


def _golden(stage: Path) -> Golden:
    """Open the bundle and record what it says; the processor computes, also for a GPU that need not be here."""
    from edgevl.engine import make_runner
    from edgevl.golden import make_golden
    from edgevl.tokenizer import Tokenizer

    bundle = Bundle.open(stage)
    text = Tokenizer(bundle.tokenizer_json()).encode(_GOLDEN_TEXT, specials=False)
    return make_golden(make_runner(bundle, None, "cpu"), bundle.manifest.model, text)


def _limits(config: ModelConfig, settings: BuildSettings) -> Limits:
    trained = min(config.text.max_positions, 16384)
    context = settings.context or trained
    if context > trained:
        raise UsageError(f"--context {context} is over the {trained} tokens that this model handles")
    if context < 64:
        raise UsageError(f"--context {context} is too small to answer anything; use at least 64")
    info = target_info(settings.target)
    tiles = 1 if config.tiling is None else min(info.tiles, config.tiling.max_tiles + 1)
    return Limits(context=context, chunk=min(info.chunk, context), tiles=tiles, kv=settings.kv)


def _describe(checkpoint: Checkpoint) -> str:
    q = checkpoint.quantization
    return "none" if q is None else f"awq int4 g{q.group_size} {'symmetric' if q.symmetric else 'asymmetric'}"


# -- weights ----------------------------------------------------------------------------------------------------------


def _kind(part: Part, settings: BuildSettings) -> str:
    """How a part that the checkpoint left unquantized is stored."""
    if part.kind == "norm" or part.name in ("vision.positions", "vision.prefix"):
        return "f32"
    if part.region in ("vision", "projector"):
        # the patch embedding is the first thing that pixels meet and is tiny: it stays f16
        return "f16" if part.name == "vision.patch" and settings.vision == "int8" else settings.vision
    if part.region == "head":
        return settings.head
    if part.region == "embed":
        return _embed_kind(settings)
    return settings.body


def _embed_kind(settings: BuildSettings) -> str:
    return "f32" if settings.head == "f32" else settings.embed


def _convert(part: Part, weight: Weight, kind: str) -> Weight:
    """The weight in the kind it is stored as."""
    if not isinstance(weight, FloatWeight):
        return weight
    values = weight.values
    if kind == "int8":
        return quantize_int8(values)
    if kind == "int4":
        return quantize_int4(values, _head_group(part.shape[1]))
    if kind == "f32":
        return FloatWeight(np.ascontiguousarray(values, dtype=np.float32))
    if values.dtype != np.float16 and float(np.abs(values).max(initial=0)) > 65504:
        raise UsageError(f"{part.name} has values beyond the range of f16 (65,504); build it with f32 for that part")
    return FloatWeight(np.ascontiguousarray(values, dtype=np.float16))


def _head_group(k: int) -> int:
    return next((g for g in (128, 64, 32) if k % g == 0), 0)


def _check_shapes(parts: list[Part], settings: BuildSettings) -> None:
    head = next(p for p in parts if p.region == "head")
    if settings.head == "int4" and not _head_group(head.shape[1]):
        raise UsageError(f"--head int4 needs a hidden size divisible by 32, this model's is {head.shape[1]}; use int8")


def _write_weights(
    checkpoint: Checkpoint, parts: list[Part], settings: BuildSettings, path: Path, progress: Progress
) -> dict[str, WeightRecord]:
    """Stream every part into weights.safetensors; returns the manifest's index."""
    records: dict[str, WeightRecord] = {}
    shared = _shared_head(checkpoint.config, settings)
    written = [p for p in parts if not (shared and p.name == "head")]
    specs: list[TensorSpec] = []
    for part in written:
        # a safetensors header comes before the data, so shapes are needed first: they follow from kinds alone
        kind, arrays = _plan_part(checkpoint, part, settings)
        names = {key: f"{part.name}.{key}" for key in arrays}
        bias = f"{part.name}.bias" if part.bias else None
        records[part.name] = WeightRecord(kind, part.region, part.shape, names, bias)
        for key, (dtype, shape) in arrays.items():
            _append_aligned(specs, TensorSpec(names[key], dtype, shape))
        if bias is not None:
            _append_aligned(specs, TensorSpec(bias, "F32", (part.shape[0],)))
    if shared:
        embed = records["embed"]
        records["head"] = WeightRecord(embed.kind, "head", embed.shape, embed.arrays, None)

    norms = {part.name: part for part in parts if part.kind == "norm"}

    def tensors() -> Iterator[tuple[str, NDArray[Any]]]:
        order = iter(specs)
        for done, part in enumerate(written):
            progress("weights", done, len(written))
            weight, bias = part_weight(checkpoint, part)
            if settings.kv == "int8" and part.region == "text" and part.name.endswith(".qkv"):
                norm, _ = part_weight(checkpoint, norms[part.name.removesuffix("qkv") + "attn_norm"])
                weight, bias = even_keys(weight, bias, dequantize(norm), checkpoint.config.text)
            kind = records[part.name].kind
            stored = pack(_convert(part, weight, kind), bias, target_info(settings.target).layout)
            assert stored.kind == kind, f"{part.name} was planned as {kind} and came out as {stored.kind}"
            arrays = {f"{part.name}.{key}": array for key, array in stored.arrays.items()}
            if stored.bias is not None:
                arrays[f"{part.name}.bias"] = np.ascontiguousarray(stored.bias, dtype=np.float32)
            while arrays:
                spec = next(order)
                yield spec.name, np.zeros(spec.shape, np.uint8) if spec.name.startswith(PAD) else arrays.pop(spec.name)
        progress("weights", len(written), len(written))

    write_safetensors(path, specs, tensors())
    return records


def _append_aligned(specs: list[TensorSpec], spec: TensorSpec) -> None:
    """Add a tensor, and before it a padding tensor when it would not begin at a multiple of 64 bytes."""
    gap = -specs[-1].nbytes % _ALIGN if specs else 0  # the one before begins aligned
    if gap:
        specs.append(TensorSpec(f"{PAD}{len(specs)}", "U8", (gap,)))
    specs.append(spec)


def _shared_head(config: ModelConfig, settings: BuildSettings) -> bool:
    """A tied head that is stored as the embedding is needs no bytes of its own."""
    return config.text.tied_embeddings and settings.head == _embed_kind(settings)


def _plan_part(
    checkpoint: Checkpoint, part: Part, settings: BuildSettings
) -> tuple[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """A part's kind, and dtype and shape of each of its arrays, without reading it."""
    quantized = checkpoint.quantization is not None and checkpoint.has(f"{part.sources[0]}.qweight")
    group = checkpoint.quantization.group_size if quantized and checkpoint.quantization else 0
    kind = "int4" if quantized else _kind(part, settings)
    if kind in ("f16", "f32"):
        return kind, {"values": (kind.upper(), part.shape)}
    (n, k), layout = part.shape, target_info(settings.target).layout
    if kind == "int8":
        return kind, dict(int8_shapes(n, k, layout))
    return kind, dict(int4_shapes(n, k, group or _head_group(k), layout))
