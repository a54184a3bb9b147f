"""From one row of logits to a token id: greedy, or temperature with top-p and a seed.

Knows nothing of models; padding rows are cut off by the caller. Called by `edgevl.engine` once a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"the temperature is {self.temperature}; it must be between 0 and 10")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}; it must be zero or more")


class Sampler:
    """One answer's stream of choices; the same seed and logits give the same tokens."""

    def __init__(self, settings: Sampling) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    def expected(self) -> list[int]:
        """Nothing is known of the next tokens."""
        return []

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken, always."""
        return self._settings.temperature == 0

    def pick(self, logits: NDArray[np.float32]) -> int:
        """(V,) -> a token id. Top-p keeps the fewest tokens whose probability reaches p (Holtzman et al. 2019)."""
        if self._settings.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self._settings.temperature
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        if self._settings.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            reached = np.cumsum(weights[order])
            kept = order[: int(np.searchsorted(reached, self._settings.top_p)) + 1]
            weights = weights[kept]
            return int(self._random.choice(kept, p=weights / weights.sum()))
        return int(self._random.choice(weights.size, p=weights))
