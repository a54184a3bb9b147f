"""The stages in order: language, tower, reader, export. Called by `python -m training`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgevl.checkpoint import open_checkpoint
from edgevl.demo import IMAGE_TOKENS, demo_checkpoint
from edgevl.errors import UsageError
from edgevl.tokenizer import Tokenizer
from quantize.part_tensors import CheckpointParts
from training.export import export, restore
from training.network import Eyes, Reader
from training.plan import Plan
from training.reader import train_language, train_reader
from training.state import load
from training.tower import train_tower
from training.writing import Writing


def run(folder: Path, plan: Plan, device: str, stage: str = "all", start: Path | None = None) -> None:
    """Train what is missing in `folder`; begin with random weights, or with `start`, which an earlier run exported.

    Raises `UsageError` when one stage is asked for and what it begins with is missing.
    """
    torch.manual_seed(0)
    checkpoint = open_checkpoint(str(demo_checkpoint(trained=False)))
    assert checkpoint.config.vision is not None
    weights, tokenizer = CheckpointParts(checkpoint), Tokenizer(checkpoint.tokenizer_json())
    table = weights("embed")[0][: checkpoint.config.tokens.size - len(IMAGE_TOKENS)]
    writing = Writing(table, lambda text: tokenizer.encode(text, specials=False), checkpoint.config.vision.grid // 2)
    writing = writing.to(device)
    eyes = Eyes(checkpoint.config, writing).to(device)
    reader = Reader(checkpoint.config, weights, plan.rank, device).to(device)
    if start is not None:
        restore(start, eyes, reader, writing)
    if stage in ("language", "all"):
        train_language(reader, writing, checkpoint, plan, folder)
    if stage in ("tower", "all"):
        _finished(folder, "language", plan.language_steps, [writing], start)
        train_tower(eyes, plan, folder, device)
    if stage in ("reader", "all"):
        _finished(folder, "language", plan.language_steps, [writing, reader], start)
        _finished(folder, "tower", plan.tower_steps, [eyes], start)
        train_reader(eyes, reader, checkpoint, plan, folder)
        export(folder / "demo_eyes.safetensors", eyes, reader, writing)


def _finished(folder: Path, stage: str, steps: int, modules: list[nn.Module], start: Path | None) -> None:
    """Put in place what the stage came to; without it, things stay as `start` has them."""
    place = load(folder, stage, modules)
    if (place is None and start is None) or (place is not None and place["step"] < steps):
        raise UsageError(f"{folder} holds no finished {stage}; run --stage {stage} first, or name its steps")
