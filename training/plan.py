"""How much of everything a training run takes: the recipe in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One run. Steps are optimizer steps; `reuse` says how often a rendered picture is shown."""

    tower_steps: int
    tower_batch: int  # pictures
    tower_rate: float
    tower_reuse: int
    language_steps: int
    language_rate: float
    reader_steps: int
    reader_batch: int  # pictures, each with as many questions as fit
    reader_rate: float
    reader_reuse: int
    muon_rate: float = 0.02  # of the tower
    tower_pages: int = 2  # of five pictures, how many are pages full of text
    tower_large: int = 1  # and how many show large things
    length: int = 576  # tokens of a training sequence
    rank: int = 32  # of the language model's updates
    workers: int = 1  # processes that render
    report: int = 100  # steps between reports, each of which saves
    checked: int = 128  # held-out pictures looked at in a report


PLANS = {
    # two cores with bf16, a stage each at first: about six core-hours
    "cpu": Plan(6000, 6, 2e-3, 2, 1000, 2e-3, 400, 6, 1e-3, 1, report=50, checked=64),
    # one data-centre GPU and 16 cores, about half an hour
    "gpu": Plan(12000, 128, 2e-3, 4, 4000, 2e-3, 8000, 32, 6e-4, 2, workers=14),
    # the test suite's: seconds
    "tiny": Plan(4, 2, 1e-3, 8, 2, 1e-3, 3, 2, 1e-3, 8, rank=2, report=2, checked=4),
}


def learning_rate(step: int, steps: int) -> float:
    """As a share of the highest: warm-up over the first 4 %, then half a cosine down to a fiftieth."""
    warm = max(1, steps // 25)
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
