"""Quantize a checkpoint: one decoder block in memory at a time, every finished block on disk.

One of the three files to read first. The hidden states of all calibration tokens are carried from block to block; for
each block the float version is observed, AWQ chooses scales and clips, and the quantized version makes the next hidden
states, so later blocks are fitted to what they will really be given. An interrupted run leaves `OUT.partial/` and goes
on from there to the same bytes. Called by `edgevl quantize`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import calibration
from edgevl import __version__
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.errors import CheckpointError, EdgevlError, UsageError
from edgevl.files import check_target, staging_directory
from edgevl.models.names import tensor_names
from edgevl.prompt import PromptBuilder
from edgevl.tokenizer import Tokenizer
from quantize.awq import BlockResult, quantize_block
from quantize.budget import check_disk, sequences_at_once
from quantize.embed import embed_samples
from quantize.groups import BlockTable, block_table
from quantize.observe import input_gram, observe_block, run_block
from quantize.output import KEPT, write_output
from quantize.part_tensors import JoinedTensors, to_torch
from quantize.partial import Partial
from quantize.rounding import Scheme
from quantize.settings import QuantizeSettings, choose_group_size
from quantize.tune import tune

Progress = Callable[[str, int, int], None]  # stage, done, total

TUNED = 4  # times as many sequences are tuned on as scales and clips are searched on
_JUDGED = 4  # sequences on which a block's output error is reported


def quantize(model: str, out: Path, settings: QuantizeSettings, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Quantize `model` (directory, GGUF file, hub id or "demo") into the checkpoint folder `out`; returns the report.

    Raises `CheckpointError` for a checkpoint that cannot be used, `UsageError` for settings that do not fit it, and
    `EdgevlError` when numbers overflow. After an interruption the same call with `resume` goes on.
    """
    checkpoint = open_checkpoint(model)
    settings = settle(checkpoint, out, settings)
    assert settings.group_size is not None and settings.calibration is not None
    samples = _samples(checkpoint, settings)
    partial = Partial.of(out)
    matters = settings.that_matter()
    identity = {**matters, "checkpoint": checkpoint.digest, "samples sha256": _digest(samples), "edgevl": __version__}
    done = partial.start(identity, settings.resume)
    tables = [block_table(checkpoint.config, layer) for layer in range(checkpoint.config.text.layers)]

    with torch.inference_mode():
        if done == 0:
            progress("calibration", 0, 1)
            hidden = embed_samples(checkpoint, samples, settings.device)
            progress("calibration", 1, 1)
        else:
            hidden = partial.load_hidden(done)
        for table in tables[done:]:
            _one_block(checkpoint, table, hidden, settings, partial, progress, len(tables))

    tuning = None
    if settings.effort == "best":
        more = _samples(checkpoint, replace(settings, samples=TUNED * settings.samples))
        tuning = tune(checkpoint, tables, partial, more, settings.device, progress)
    report = _report(checkpoint, settings, samples, [partial.block_report(table.layer) for table in tables])
    progress("writing", 0, 1)
    if tuning is not None:
        report["tuning"] = asdict(tuning)
    with staging_directory(out) as stage:
        write_output(checkpoint, tables, partial, stage, settings.group_size, report)
    partial.remove()
    progress("writing", 1, 1)
    return report


def settle(checkpoint: Checkpoint, out: Path, settings: QuantizeSettings) -> QuantizeSettings:
    """Fill in what the user left open, and refuse what cannot work, before any work."""
    if checkpoint.quantization is not None:
        raise UsageError(
            f"{checkpoint.path} is quantized already ({checkpoint.quantization.bits} bits); give the original"
        )
    group_size = choose_group_size(checkpoint.config, settings.group_size)
    default = "mixed" if checkpoint.config.vision is not None else "text"
    settings = replace(settings, group_size=group_size, calibration=settings.calibration or default)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU that torch can use, and it sees none; use --device cpu")
    if settings.length > checkpoint.config.text.max_positions:
        raise UsageError(
            f"sequences of {settings.length} tokens are longer than the model's {checkpoint.config.text.max_positions}"
        )
    check_target(out)
    check_disk(checkpoint, out, settings)
    sequences_at_once(checkpoint.config.text, settings)
    return settings


def _one_block(
    checkpoint: Checkpoint,
    table: BlockTable,
    hidden: Tensor,
    settings: QuantizeSettings,
    partial: Partial,
    progress: Progress,
    layers: int,
) -> None:
    """Read, observe, quantize and save one block; `hidden` (B, S, C) is replaced by the block's quantized output."""
    assert settings.group_size is not None
    config, layer, device = checkpoint.config.text, table.layer, settings.device
    started = time.monotonic()
    steps = len(table.groups) + 4  # observe, the groups, clip, round, run
    count = layer * steps

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        progress(f"block {layer + 1} of {layers}: {what}", count, layers * steps)

    progress(f"block {layer + 1} of {layers}: observe", count, layers * steps)
    tensors = read_block(checkpoint, table, device)
    chunk = sequences_at_once(config, settings)
    before = hidden[:_JUDGED].clone()
    wanted = torch.empty_like(before)
    floats = JoinedTensors(table.parts, tensors)
    seen = observe_block(
        config,
        layer,
        floats,
        hidden,
        settings.group_size,
        chunk,
        settings.seed + layer,
        wanted,
        device,
    )
    tick("search")

    def store_as(name: str, tensor: Tensor) -> Tensor:
        if checkpoint.spec(name).dtype in ("F32", "F64"):
            return tensor
        return tensor.clamp(-65504.0, 65504.0).half().float()

    def gram_of(part: str, values: dict[str, Tensor]) -> Tensor:
        return input_gram(config, layer, JoinedTensors(table.parts, values), hidden, chunk, part, device)

    scheme = Scheme(settings.group_size, settings.scheme == "sym")
    result = quantize_block(
        config, table, tensors, seen, scheme, store_as, tick, None if settings.effort == "fast" else gram_of
    )
    run_block(config, layer, JoinedTensors(table.parts, result.values), hidden, chunk, hidden, device)
    if not torch.isfinite(hidden).all():
        raise EdgevlError(
            f"layer {layer} gives infinite or undefined values on the calibration data; "
            "check the checkpoint, or calibrate on other data"
        )
    error = float((hidden[:_JUDGED] - wanted).square().mean() / (wanted - before).square().mean().clamp(min=1e-30))
    report = {"layer": layer, "error": error, **result.report(), "seconds": round(time.monotonic() - started, 2)}
    partial.save_block(layer, result.linears, _changed(checkpoint, result), report)
    partial.save_hidden(layer + 1, hidden)
    tick(f"error {error:.4f}")


def read_block(checkpoint: Checkpoint, table: BlockTable, device: str) -> dict[str, Tensor]:
    """Every tensor of a block by checkpoint name, f32. Infinite weights raise `CheckpointError`."""
    tensors = {}
    for part in table.parts:
        for name in tensor_names(part):
            tensor = to_torch(checkpoint.array(name))
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} holds infinite or undefined values; fetch the checkpoint again")
            tensors[name] = tensor.to(device)
    return tensors


def _changed(checkpoint: Checkpoint, result: BlockResult) -> dict[str, NDArray[Any]]:
    """Folded norms and biases as they are stored: f32 stays f32, everything else becomes f16."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in result.changed.items():
        dtype = np.float32 if checkpoint.spec(name).dtype in ("F32", "F64") else np.float16
        arrays[name] = tensor.cpu().numpy().astype(dtype)
    return arrays


def _samples(checkpoint: Checkpoint, settings: QuantizeSettings) -> list[calibration.Sample]:
    """The calibration sequences, in the model's own tokens and template."""
    assert settings.calibration is not None
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    prompts = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    return calibration.load(
        settings.calibration, tokenizer, prompts, checkpoint.config, settings.samples, settings.length, settings.seed
    )


def _report(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    samples: list[calibration.Sample],
    blocks: list[dict[str, Any]],
) -> dict[str, Any]:
    """quantization_report.json."""
    regions = ("vision", "projector", "embed", "head") if checkpoint.config.vision else ("embed", "head")
    images = sum(token < 0 for sample in samples for token in sample.token_ids)
    return {
        "edgevl": __version__,
        "source": {"name": Path(checkpoint.path).name, "digest": checkpoint.digest},
        "settings": settings.that_matter(),
        "calibration": {"tokens": settings.samples * settings.length, "image_tokens": images},
        "quantized": "q, k, v, o, gate, up and down projections of every decoder block",
        "kept": {KEPT[region][0]: KEPT[region][1] for region in regions},
        "error": float(np.mean([block["error"] for block in blocks])),
        "blocks": blocks,
        "seconds": round(sum(block["seconds"] for block in blocks), 1),
    }


def _digest(samples: list[calibration.Sample]) -> str:
    """Which tokens and pixels a run was calibrated on."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(np.asarray(sample.token_ids, np.int64).tobytes())
        if sample.tiles is not None:
            sha.update(np.ascontiguousarray(sample.tiles).tobytes())
    return sha.hexdigest()
