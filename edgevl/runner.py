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

from edgevl.config import ModelConfig
from edgevl.errors import CapacityError, UsageError

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


# A step as `Runner.decode` that chooses a token for each row of logits itself, padding rows of the head left out: its
# last argument is `Sampler.ahead`'s, it returns (L,) ids, and each is what `edgevl.sampling.choose` takes, to rounding.
Choose = Callable[[I32, I32, I32, F32 | None, I32, F32], I32]


def chooser_of(runner: Runner) -> Choose | None:
    """The method `choose` of a backend whose logits are costly to fetch; others have none."""
    found: Choose | None = getattr(runner, "choose", None)
    return found


def alike_rows(runner: Runner) -> int:
    """The most tokens of a step whose logits are, bit by bit, those of steps of one token each.

    A backend promises it as an attribute `alike_rows`; one that says nothing promises a single token.
    """
    return int(getattr(runner, "alike_rows", 1))


def check_step(config: ModelConfig, limits: Limits, tokens: I32, images: F32 | None, logit_rows: I32) -> dict[str, int]:
    """The counts of a step, by the symbols of a recorded graph.

    Raises `CapacityError` for a step over the limits, `UsageError` for one without tokens or with images for no eyes.
    """
    rows = 0 if images is None else len(images)
    for what, found, most in (
        ("tokens", tokens.size, limits.chunk),
        ("rows of logits", logit_rows.size, limits.logit_rows),
        ("image rows", rows, limits.chunk),
    ):
        if found > most:
            raise CapacityError(f"a step of {found} {what} is over the plan's limit of {most}; split it into several")
    if tokens.size == 0:
        raise UsageError("a step has no tokens; it needs at least one")
    if rows and config.vision is None:
        raise UsageError(f"{rows} image rows were given to a model without vision; pass None")
    return {"tokens": tokens.size, "logits": logit_rows.size, "images": rows}


def check_tiles(config: ModelConfig, limits: Limits, pixels: NDArray[np.uint8]) -> dict[str, int]:
    """The counts of a vision run, likewise; raises `UsageError` for other shapes, `CapacityError` for too many."""
    if config.vision is None:
        raise UsageError("this model has no vision tower; it reads text only")
    side = config.vision.tile_size
    if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
        raise UsageError(f"tiles have the shape {pixels.shape}; they must be (n, {side}, {side}, 3)")
    if len(pixels) > limits.tiles:
        raise CapacityError(
            f"{len(pixels)} tiles are over the plan's limit of {limits.tiles}; run them in several calls"
        )
    return {"tiles": len(pixels)}
