"""The tower and the projector learn to read, alone.

The renderer knows which character and which thing lies under each patch: linear heads on the tower's patches must say
so, and image tokens must be what `Writing` wants. No language model is needed. Reading is local, and attention grows
with the square of the tokens, so most steps see windows of a quarter of a picture, four for each picture of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

from training.feed import Feed, Seen, held_out
from training.journal import Journal
from training.network import MEASURED, Eyes
from training.optimizers import Optimizers
from training.plan import Plan, learning_rate
from training.state import load, save
from training.writing import Labels, Window

_WHOLE = 0.2  # of the steps, the last, how many see whole pictures
_TRIES = 3  # windows of which the one that shows most is taken: much of many pictures is empty


def train_tower(eyes: Eyes, plan: Plan, folder: Path, device: str) -> None:
    """Train until `plan.tower_steps`, going on from the folder's state; writes `tower.safetensors` there."""
    optimizers = Optimizers({plan.tower_rate: eyes.parameters()}, eyes, plan.muon_rate)
    place = load(folder, "tower", [eyes], optimizers) or {"step": 0, "pictures": 0}
    if place["step"] >= plan.tower_steps:
        return
    random = RandomState(place["step"])
    journal, checks = Journal(folder, "tower"), list(held_out(plan.checked))
    feed = Feed(plan.workers, place["pictures"], plan.tower_reuse, plan.tower_pages, plan.tower_large)
    try:
        counts, losses, began = torch.zeros(2 * len(MEASURED)), 0.0, time.monotonic()
        first = place["step"]
        for step in range(place["step"], plan.tower_steps):
            rate = learning_rate(step, plan.tower_steps)
            if step < (1 - _WHOLE) * plan.tower_steps:
                batch = feed.batch(4 * plan.tower_batch)
                loss, found = dense(eyes, batch, device, [_window(random, seen) for seen in batch])
            else:
                loss, found = dense(eyes, feed.batch(plan.tower_batch), device)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers.step(rate)
            counts, losses = counts + found.cpu(), losses + float(loss.detach())
            if (step + 1) % plan.report == 0 or step + 1 == plan.tower_steps:
                since = step + 1 - first
                speed = since * plan.tower_batch / (time.monotonic() - began)
                figures = {f"train_{k}": v for k, v in shares(counts).items()}
                figures |= {f"validation_{k}": v for k, v in shares(check(eyes, checks, device)).items()}
                save(folder, "tower", [eyes], optimizers, {"step": step + 1, "pictures": feed.drawn})
                journal.write(step=step + 1, loss=losses / since, rate=rate, pictures_a_second=speed, **figures)
                counts, losses, began = torch.zeros(2 * len(MEASURED)), 0.0, time.monotonic()
                first = step + 1
    finally:
        feed.close()


def _window(random: RandomState, seen: Seen) -> Window:
    """A quarter of the picture's area, where it shows something."""
    grid = seen.things.shape[0] // 2
    full = (seen.slots[:, 0] > 0) | (seen.shown[:, 0] > 0)
    corners = random.randint(grid // 2 + 1, size=(_TRIES, 2))
    windows = [Window(int(top), int(left), grid // 2) for top, left in corners]
    return max(windows, key=lambda window: int(window.of(full.reshape(grid, grid), grid).sum()))


def dense(eyes: Eyes, batch: list[Seen], device: str, windows: list[Window] | None = None) -> tuple[Tensor, Tensor]:
    """Loss and counts of one batch or of windows of it; of several frames, the first."""
    tiles, grid = [seen.tiles[0] for seen in batch], batch[0].things.shape[0] // 2
    if windows:
        tiles = [window.of(tile, grid) for window, tile in zip(windows, tiles, strict=True)]
    rows, patches = eyes(torch.from_numpy(np.stack(tiles)).to(device), windows)
    return eyes.dense_loss(rows, patches, Labels.of(batch, device, windows))


@torch.no_grad()
def check(eyes: Eyes, pictures: Iterable[Seen], device: str) -> Tensor:
    """(right, all) of each of `MEASURED` over held-out pictures."""
    pictures = list(pictures)
    counts = torch.zeros(2 * len(MEASURED))
    for begin in range(0, len(pictures), 32):
        counts += dense(eyes, pictures[begin : begin + 32], device)[1].cpu()
    return counts


def shares(counts: Tensor) -> dict[str, float]:
    """Counts as shares that are right."""
    right, whole = counts[0::2], counts[1::2].clamp(min=1)
    return dict(zip(MEASURED, (right / whole).tolist(), strict=True))
