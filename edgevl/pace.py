"""How soon a first token comes on this machine: measured speeds, and the tiles that they leave time for.

Called by the chat for --first-token; the budget asks it for tiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edgevl.config import ModelConfig
from edgevl.golden import golden_tile
from edgevl.prefill import feed
from edgevl.runner import Runner

_TOKENS = 128  # of the prefill that is measured


@dataclass(frozen=True)
class Pace:
    """How soon the first token is wanted, and what this machine was measured to take."""

    first_token: float  # seconds
    tile_seconds: float  # of the vision tower
    token_seconds: float  # of prefill

    def tiles(self, text_tokens: int, tile_tokens: int) -> int:
        """The most tiles for which the first token comes in time; 0 when not even one."""
        left = self.first_token - text_tokens * self.token_seconds
        return max(0, int(left / (self.tile_seconds + tile_tokens * self.token_seconds)))

    def seconds(self, text_tokens: int, tiles: int, tile_tokens: int) -> float:
        """When the first token comes, roughly: prefill at depth is slower than what was measured."""
        return tiles * self.tile_seconds + (text_tokens + tiles * tile_tokens) * self.token_seconds


def measure_pace(runner: Runner, config: ModelConfig, first_token: float) -> Pace:
    """Run a tile and a short prefill, each after a warm-up, with a model that sees.

    What slot 0 of the KV cache holds is lost.
    """
    count = min(_TOKENS, runner.limits.context, runner.limits.chunk)
    tile = golden_tile(config)
    ids = [i % config.tokens.size for i in range(count)]
    tile_seconds = _second_time(lambda: runner.vision(tile))
    token_seconds = _second_time(lambda: feed(runner, ids, 0, None, 1)) / count
    return Pace(first_token, tile_seconds, token_seconds)


def _second_time(work: Callable[[], object]) -> float:
    """Seconds of the second of two runs: a large tower takes seconds for each, so that more would be felt."""
    work()
    start = time.perf_counter()
    work()
    return max(time.perf_counter() - start, 1e-9)
