"""Which steps a prompt is fed in."""

from __future__ import annotations

import numpy as np
import pytest

from edgevl.prefill import feed
from edgevl.runner import F32, I32, Limits


class Noted:
    """A runner that notes (tokens, rows of logits) of every step."""

    backend, planned_bytes = "noted", 0
    limits = Limits(context=64, chunk=4)

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], list[int]]] = []

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        assert positions.tolist() == [7 + place for place in range(positions[0] - 7, positions[0] - 7 + len(tokens))]
        self.steps.append((tokens.tolist(), logit_rows.tolist()))
        return np.zeros((len(logit_rows), 3), np.float32)

    def vision(self, pixels: object) -> F32:
        raise AssertionError


@pytest.mark.parametrize(
    ("count", "last", "steps"),
    [
        (1, 1, [([0], [0])]),
        (4, 1, [([0, 1, 2], []), ([3], [0])]),
        (6, 1, [([0, 1, 2, 3], []), ([4], []), ([5], [0])]),
        (5, 2, [([0, 1, 2], []), ([3, 4], [0, 1])]),
        (3, 3, [([0, 1, 2], [0, 1, 2])]),
    ],
)
def test_only_the_last_step_computes_logits(count: int, last: int, steps: list[tuple[list[int], list[int]]]) -> None:
    runner = Noted()
    assert feed(runner, list(range(count)), 7, None, last).shape == (last, 3)
    assert runner.steps == steps
