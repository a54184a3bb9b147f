"""What the engine asks of a backend: run a decoder step, run vision tiles. Nothing else crosses this line.

Implementations: `edgevl.backends.reference` (numpy, eager), `edgevl.backends.cpu` (C++) and `edgevl.backends.cuda`
(GPU kernels), both recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import UsageError

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """What a plan is sized for; a bundle carries it and the runtime never exceeds it."""

    context: int  # tokens a slot can hold, in and out together
    slots: int = 1  # sequences in the KV cache
    chunk: int = 512  # most tokens of one decoder step
    logit_rows: int = 16  # most rows of logits of one step
    tiles: int = 1  # most tiles of one vision run
    kv: str = "f16"  # "f16" | "int8" | "f32"

    def __post_init__(self) -> None:
        for name in ("context", "slots", "chunk", "logit_rows", "tiles"):
            if getattr(self, name) < 1:
                raise UsageError(f"the limit {name} is {getattr(self, name)}; it must be at least 1")
        if self.kv not in ("f16", "int8", "f32"):
            raise UsageError(f"a KV cache of {self.kv!r} is not supported; choose f16, int8 or f32")


class Runner(Protocol):
    """A model that is loaded and ready."""

    limits: Limits
    backend: str  # one line for people: "cpu (AVX-512, 2 threads)"

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        """One step: T tokens -> logits (L, V), valid until the next call. Ids below zero pick rows of `images`."""
        ...

    def vision(self, pixels: NDArray[np.uint8]) -> F32:
        """Tiles (n, S, S, 3), n within the limits -> (n·P/4, C), valid until the next call."""
        ...

    @property
    def planned_bytes(self) -> int:
        """Weights and arena, as the plan counts them."""
        ...


Greedy = Callable[[I32, I32, I32, F32 | None, I32], I32]


def largest_logits(runner: Runner) -> Greedy | None:
    """A step as `Runner.decode` that gives the ids of the largest logits, (L,), padding rows of the head left out.

    A backend whose logits are costly to fetch has it as a method `greedy`; others have none.
    """
    found: Greedy | None = getattr(runner, "greedy", None)
    return found


def alike_rows(runner: Runner) -> int:
    """The most tokens of a step whose logits are, bit by bit, those of steps of one token each.

    A backend promises it as an attribute `alike_rows`; one that says nothing promises a single token.
    """
    return int(getattr(runner, "alike_rows", 1))
