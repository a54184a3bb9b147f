"""First stage: tower and projector learn to read, alone.

The renderer knows which character and which thing lies under each patch; linear heads on the image tokens must say so.
No language model is needed, so this is cheap, and what the language model gets later already spells its text out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgevl.checkpoint import Checkpoint
from training.feed import Feed, Seen, held_out
from training.journal import Journal
from training.labels import LabelMaker
from training.network import MEASURED, Eyes
from training.optimizers import Optimizers
from training.plan import Plan, learning_rate
from training.state import load, save


def train_tower(eyes: Eyes, checkpoint: Checkpoint, plan: Plan, folder: Path, device: str) -> None:
    """Train until `plan.tower_steps`, going on from the folder's state; writes `tower.safetensors` there."""
    optimizers = Optimizers(eyes, (), plan.tower_rate, plan.muon_rate)
    place = load(folder, "tower", [eyes], optimizers) or {"step": 0, "pictures": 0}
    if place["step"] >= plan.tower_steps:
        return
    maker = LabelMaker(checkpoint)
    journal, checks = Journal(folder, "tower"), list(held_out(plan.checked))
    feed = Feed(plan.workers, place["pictures"], plan.tower_reuse, plan.tower_pages)
    try:
        counts, losses, began = torch.zeros(2 * len(MEASURED)), 0.0, time.monotonic()
        first = place["step"]
        for step in range(place["step"], plan.tower_steps):
            rate = learning_rate(step, plan.tower_steps)
            loss, found = dense(eyes, maker, feed.batch(plan.tower_batch), device)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers.step(rate)
            counts, losses = counts + found.cpu(), losses + float(loss.detach())
            if (step + 1) % plan.report == 0 or step + 1 == plan.tower_steps:
                since = step + 1 - first
                speed = since * plan.tower_batch / (time.monotonic() - began)
                figures = {f"train_{k}": v for k, v in shares(counts).items()}
                figures |= {f"validation_{k}": v for k, v in shares(check(eyes, maker, checks, device)).items()}
                save(folder, "tower", [eyes], optimizers, {"step": step + 1, "pictures": feed.drawn})
                journal.write(step=step + 1, loss=losses / since, rate=rate, pictures_a_second=speed, **figures)
                counts, losses, began = torch.zeros(2 * len(MEASURED)), 0.0, time.monotonic()
                first = step + 1
    finally:
        feed.close()


def dense(eyes: Eyes, maker: LabelMaker, batch: list[Seen], device: str) -> tuple[Tensor, Tensor]:
    """Loss and counts of one batch; of several frames, the first."""
    pixels = torch.from_numpy(np.stack([seen.tiles[0] for seen in batch])).to(device)
    rows, patches = eyes(pixels)
    return eyes.dense_loss(rows, patches, maker.labels(batch, device))


@torch.no_grad()
def check(eyes: Eyes, maker: LabelMaker, pictures: Iterable[Seen], device: str) -> Tensor:
    """(right, all) of each of `MEASURED` over held-out pictures."""
    pictures = list(pictures)
    counts = torch.zeros(2 * len(MEASURED))
    for begin in range(0, len(pictures), 32):
        counts += dense(eyes, maker, pictures[begin : begin + 32], device)[1].cpu()
    return counts


def shares(counts: Tensor) -> dict[str, float]:
    """Counts as shares that are right."""
    right, whole = counts[0::2], counts[1::2].clamp(min=1)
    return dict(zip(MEASURED, (right / whole).tolist(), strict=True))
