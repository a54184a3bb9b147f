"""The stages in order: tower, reader, export. Called by `python -m training`."""

from __future__ import annotations

from pathlib import Path

import torch

from edgevl.checkpoint import open_checkpoint
from edgevl.demo import demo_checkpoint
from quantize.part_tensors import CheckpointParts
from training.export import export, restore
from training.network import Eyes
from training.plan import Plan
from training.tower import train_tower


def run(folder: Path, plan: Plan, device: str, stage: str = "all", start: Path | None = None) -> None:
    """Train what is missing in `folder`; begin with random weights, or with `start`, which an earlier run exported."""
    torch.manual_seed(0)
    checkpoint = open_checkpoint(str(demo_checkpoint(trained=False)))
    weights = CheckpointParts(checkpoint)
    table = weights("embed")[0][: checkpoint.config.tokens.size]
    eyes = Eyes(checkpoint.config, table).to(device)
    if start is not None:
        restore(start, eyes, None)
    if stage in ("tower", "all"):
        train_tower(eyes, checkpoint, plan, folder, device)
    if stage == "tower":
        export(folder / "tower_eyes.safetensors", eyes, None)
    if stage in ("reader", "all"):
        from training.reader import train_reader

        reader = train_reader(eyes, checkpoint, plan, folder, device, start)
        export(folder / "demo_eyes.safetensors", eyes, reader)
