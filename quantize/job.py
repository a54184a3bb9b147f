"""Quantize a checkpoint: one decoder block in memory at a time, every finished block on disk.

One of the three files to read first. The hidden states of all calibration tokens are carried from block to block; for
each block the float version is observed, AWQ chooses scales and clips, codes and scales learn to give what the float
model has there (so the calibration goes along through the float blocks too), and the quantized version makes the next
hidden states, so later blocks are fitted to what they will really be given. A held-out text goes along, through the
float and the quantized blocks, so that the report can say what was lost. An interrupted run leaves `OUT.partial/` and
goes on from there to the same bytes. Called by `edgevl quantize`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from edgevl.files import check_target, staging_directory, sweep
from edgevl.models.names import tensor_names
from edgevl.prompt import PromptBuilder
from edgevl.tokenizer import Tokenizer
from quantize.activations import Activations
from quantize.awq import BlockResult, quantize_block
from quantize.budget import check_disk, check_writing, estimate, sequences_at_once
from quantize.check import check_weights
from quantize.embed import embed_samples
from quantize.groups import BlockTable, block_table
from quantize.measure import HELD_OUT, compare_states, last_hidden, text_tokens
from quantize.observe import observe_block, run_block
from quantize.output import write_output
from quantize.pages import give_back, keep_pages
from quantize.part_tensors import JoinedTensors, to_torch
from quantize.partial import Partial
from quantize.reconstruct import reconstruct
from quantize.report import REPORT, Facts, channels, make_report, pictured, read_report, write_report
from quantize.report_page import check_plots
from quantize.rounding import Scheme
from quantize.self_text import write_text
from quantize.settings import QuantizeSettings, choose_group_size
from quantize.torch_ops import check_device, coarse_pays
from quantize.watch import Watch

Progress = Callable[[str, int, int], None]  # stage, done, total

_JUDGED = 4  # sequences on which a block's output error is reported


@dataclass
class _Run:
    """What goes from block to block."""

    activations: Activations
    importance: Tensor  # (B, S): how much each calibration token counts
    judged: Tensor | None  # (2, B, S, C) of the held-out text: through the float blocks, through the quantized ones


def quantize(model: str, out: Path, settings: QuantizeSettings, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Quantize `model` (directory, GGUF file, hub id or "demo") into the checkpoint folder `out`; returns the report.

    Raises `CheckpointError` for a checkpoint that cannot be used, `UsageError` for settings that do not fit it, and
    `EdgevlError` when numbers overflow. After an interruption the same call with `resume` goes on.
    """
    keep_pages()
    checkpoint = open_checkpoint(model)
    partial = Partial(out)
    sweep(out)
    if settings.resume and (report := _finished(checkpoint, out, partial, settings)) is not None:
        return report
    settings = settle(checkpoint, out, settings)
    assert settings.group_size is not None and settings.calibration is not None
    tables = [block_table(checkpoint.config, layer) for layer in range(checkpoint.config.text.layers)]
    ids = _held_out(checkpoint) if settings.measure else []
    with Watch() as watch, torch.inference_mode(), partial.held():
        matters = settings.that_matter()
        identity = {
            **matters,
            "checkpoint": checkpoint.digest,
            "bf16 products": coarse_pays(settings.device),
            "edgevl": __version__,
        }
        done = partial.done(identity, settings.resume)

        def check() -> None:
            with watch.stage("check"):
                check_weights(checkpoint, tables, lambda n, of: progress("check", n, of))

        writes = settings.calibration == "self"  # which takes longer than reading all weights
        if done == 0 and writes:
            check()
        with watch.stage("calibration"):
            samples = _samples(checkpoint, settings, partial, progress)
        if done == 0 and not writes:
            check()
        used = calibration.describe(settings.calibration, samples, settings.seed)
        partial.start({**identity, "samples sha256": used["sha256"]})
        shape = (settings.paths, settings.samples, settings.length, checkpoint.config.text.hidden_size)
        run = _Run(Activations(shape, settings.max_activations, partial.folder), _importance(samples, settings), None)
        with watch.stage("calibration"):
            if done == 0:
                progress("calibration", 0, 1)
                embed_samples(checkpoint, samples, settings.device, run.activations.hidden)
                run.activations.paths[1:] = run.activations.hidden
                if not _all_finite(run.activations.hidden):
                    raise CheckpointError(f"{checkpoint.path} gives infinite or undefined embeddings; fetch it again")
                if ids:
                    judged = embed_samples(checkpoint, [calibration.Sample(tuple(row)) for row in ids])
                    run.judged = torch.stack([judged, judged])
                progress("calibration", 1, 1)
            else:
                run.judged = partial.load_hidden(done, run.activations.paths)
        with watch.stage("blocks"):
            for table in tables[done:]:
                _one_block(checkpoint, table, run, settings, partial, progress, len(tables))
                checkpoint.release()
        quality = None
        if run.judged is not None:
            with watch.stage("measure"):
                held_out = [calibration.Sample(tuple(row)) for row in ids]
                own = run.activations.hidden[:_JUDGED]
                quality = _quality(
                    checkpoint, list(run.judged), held_out, own, samples[:_JUDGED], settings.device, progress
                )
        progress("writing", 0, 1)
        with watch.stage("writing"), staging_directory(out, settings.force) as stage:
            write_output(checkpoint, tables, partial, stage, settings.group_size)
            facts = Facts(matters, used, partial.job_digest(), done, watch, estimate(checkpoint.config.text, settings))
            blocks = [partial.block_report(table.layer) for table in tables]
            report = make_report(checkpoint, stage, blocks, quality, facts)
            write_report(stage, report, pictured(checkpoint, tables, report))
        partial.remove()
    progress("writing", 1, 1)
    return report


def _quality(
    checkpoint: Checkpoint,
    states: list[Tensor],
    held_out: list[calibration.Sample],
    own: Tensor,
    samples: list[calibration.Sample],
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The comparison on held-out text, and mean KL on calibration sequences of the run's own beside it.

    `states`: the original's and the quantized model's last hidden states of the held-out text; `own` (B, S, C): the
    quantized model's of the samples. How far the two figures lie apart says what the choice of samples did.
    """
    quality = compare_states(checkpoint, checkpoint, states, _ids(held_out), device, progress).to_json()
    coarse = coarse_pays(device)  # as the samples' path through the quantized blocks was
    wanted = last_hidden(checkpoint, samples, device, lambda d, n: progress("the original", d, n), coarse)
    seen = compare_states(checkpoint, checkpoint, [wanted, own], _ids(samples), device, progress)
    return {**quality, "text": "edgevl's held-out text", "kl_on_calibration": seen.kl}


def _ids(samples: list[calibration.Sample]) -> Tensor:
    """(B, S); an image's tokens count as token 0, since only KL is asked of them."""
    return torch.tensor([sample.token_ids for sample in samples]).clamp(min=0)


def _finished(checkpoint: Checkpoint, out: Path, partial: Partial, settings: QuantizeSettings) -> dict[str, Any] | None:
    """The report of `out` if it is what the run was going to make; what may be left beside it is tidied up."""
    if not (out / REPORT).is_file():
        return None
    report = read_report(out)
    if not isinstance(report.get("source"), dict):
        return None  # of a checkpoint that another tool made, and `edgevl measure` reported on
    same = report["source"]["digest"] == checkpoint.digest and report["edgevl"] == __version__
    asked = settings.that_matter().items()
    if not same or any(value not in (None, report["settings"].get(name)) for name, value in asked):
        return None
    if partial.exists():
        if report.get("job") != partial.job_digest():
            return None
        with partial.held():
            partial.remove()
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
    check_device(settings.device)
    if settings.length > checkpoint.config.text.max_positions:
        raise UsageError(
            f"sequences of {settings.length} tokens are longer than the model's {checkpoint.config.text.max_positions}"
        )
    check_plots()
    check_target(out, settings.force, checkpoint.path)
    check_disk(checkpoint, out, settings)
    sequences_at_once(checkpoint.config.text, settings)
    if settings.calibration == "self":
        check_writing(checkpoint, settings)
    return settings


def _one_block(
    checkpoint: Checkpoint,
    table: BlockTable,
    run: _Run,
    settings: QuantizeSettings,
    partial: Partial,
    progress: Progress,
    layers: int,
) -> None:
    """Read, observe, quantize and save one block; the run's hidden states become the block's quantized output."""
    assert settings.group_size is not None
    config, layer, device = checkpoint.config.text, table.layer, settings.device
    hidden, judged = run.activations.hidden, run.judged
    started = time.monotonic()
    steps = len(table.groups) + 5  # observe, the groups, clip, round, reconstruct, run
    count = layer * steps

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        progress(f"block {layer + 1} of {layers}: {what}", count, layers * steps)

    progress(f"block {layer + 1} of {layers}: observe", count, layers * steps)
    tensors = read_block(checkpoint, table, device)
    checkpoint.release()
    chunk, coarse = sequences_at_once(config, settings), coarse_pays(device)
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
        coarse,
    )
    for float_path in run.activations.paths[1:]:
        run_block(config, layer, floats, float_path, chunk, float_path, device, coarse=coarse)
    if judged is not None:
        judged_chunk = max(1, chunk * hidden.shape[1] // judged.shape[2])
        run_block(config, layer, floats, judged[0], judged_chunk, judged[0], device)
    seen_channels = {group.name: channels(group, tensors, seen) for group in table.groups}

    def store_as(name: str, tensor: Tensor) -> Tensor:
        if checkpoint.spec(name).dtype in ("F32", "F64"):
            return tensor
        return tensor.clamp(-65504.0, 65504.0).half().float()

    scheme = Scheme(settings.group_size, settings.scheme == "sym")
    result = quantize_block(config, table, tensors, seen, scheme, store_as, tick, settings.chosen, coarse)
    _check_stored(result)
    give_back()
    tick("reconstruct")
    learned = None
    for float_path in run.activations.paths[1:]:
        with torch.inference_mode(mode=False):
            learned = reconstruct(
                config,
                table,
                result,
                result.floats,
                hidden,
                float_path,
                settings.chosen.reconstruct,
                settings.seed + layer,
                device,
                coarse,
                run.importance,
            )
    _check_stored(result)
    tick("run")
    values = JoinedTensors(table.parts, result.values)
    run_block(config, layer, values, hidden, chunk, hidden, device, coarse=coarse)
    if judged is not None:
        run_block(config, layer, values, judged[1], judged_chunk, judged[1], device)
    if not _all_finite(hidden) or (judged is not None and not torch.isfinite(judged).all()):
        raise EdgevlError(
            f"layer {layer} gives infinite or undefined values on the calibration data or the held-out text; "
            "check the checkpoint, or calibrate on other data"
        )
    error = float((hidden[:_JUDGED] - wanted).square().mean() / (wanted - before).square().mean().clamp(min=1e-30))
    report = {
        "layer": layer,
        "error": error,
        "drift": None if judged is None else _drift(judged),
        **result.report(),
        "reconstruction": None if learned is None else asdict(learned),
        "channels": seen_channels,
        "seconds": round(time.monotonic() - started, 2),
    }
    partial.save_block(layer, result.linears, _changed(checkpoint, result), report)
    partial.save_hidden(layer + 1, run.activations.paths, judged)
    run.activations.release()
    tick(f"error {error:.4f}")


def _drift(judged: Tensor) -> float:
    """Of (2, B, S, C): how far the quantized path is from the float path, relative to each token's own state."""
    float_path, own = judged
    apart = (own - float_path).square().mean(dim=2)
    return float((apart / float_path.square().mean(dim=2).clamp(min=1e-30)).mean())


def _all_finite(hidden: Tensor) -> bool:
    """Of (B, S, C), which may be a mapped file: a sequence at a time, since a copy is made of what is looked at."""
    return all(bool(torch.isfinite(row).all()) for row in hidden)


def _check_stored(result: BlockResult) -> None:
    """Raise `EdgevlError` that names what f16 cannot hold: the scale of a group, a folded norm."""
    for module, weight in result.linears.items():
        if not np.isfinite(weight.scales).all():
            rows = int((~np.isfinite(weight.scales)).any(axis=1).argmax())
            raise EdgevlError(
                f"{module} row {rows} needs a scale beyond what f16 holds (65,504); the checkpoint cannot be stored in "
                "this layout, or its calibration data overflow"
            )
    for name, tensor in result.changed.items():
        if not torch.isfinite(tensor).all():
            raise EdgevlError(f"{name} is not finite once its scales are folded in; calibrate on other data")


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


def _samples(
    checkpoint: Checkpoint, settings: QuantizeSettings, partial: Partial, progress: Progress
) -> list[calibration.Sample]:
    """The calibration sequences, in the model's own tokens and template; for "self" the model writes them first."""
    assert settings.calibration is not None
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    prompts = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    chosen = (settings.samples, settings.length, settings.seed)
    written = None
    if settings.calibration == "self":
        asked = json.dumps([checkpoint.digest, *chosen])
        rows = partial.load_written(asked)
        if rows is None:
            rows = write_text(
                checkpoint, prompts, *chosen, settings.device, lambda n, of: progress("the model writes", n, of)
            )
            partial.save_written(rows, asked)
        written = iter(rows)
    return calibration.load(settings.calibration, tokenizer, prompts, checkpoint.config, *chosen, written)


def _importance(samples: list[calibration.Sample], settings: QuantizeSettings) -> Tensor:
    """(B, S): 1 for text, and what the recipe says for image tokens."""
    images = torch.tensor([sample.token_ids for sample in samples]) < 0
    return torch.where(images, settings.chosen.image_importance, 1.0)


def _held_out(checkpoint: Checkpoint) -> list[list[int]]:
    """The text that the report's figures are of: what `edgevl measure` reads by default."""
    return text_tokens(checkpoint, calibration.held_out_text())[:HELD_OUT]
