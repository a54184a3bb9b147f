"""From one row of logits to a token id: greedy, or temperature with top-p and a seed.

`choose` is the definition, which kernels on a GPU follow too. Knows nothing of models; padding rows are cut off by the
caller. Called by `edgevl.generation` once a token.
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


def choose(logits: NDArray[np.float32], temperature: float, top_p: float, number: float) -> int:
    """(V,) and a random `number` in [0, 1) -> a token id; the first of the largest logits at temperature 0.

    Of the tokens, top-p keeps the fewest, the likeliest first, whose probability reaches p (Holtzman et al. 2019), the
    first ids of equal ones. In the order of their ids, the first is taken at which the probability of those kept, up to
    and with it, exceeds `number` times that of all kept.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = np.arange(weights.size)
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order])
        kept = np.sort(order[: int(np.searchsorted(reached, top_p * reached[-1])) + 1])
    reached = np.cumsum(weights[kept])
    place = int(np.searchsorted(reached, number * reached[-1], side="right"))
    return int(kept[min(place, kept.size - 1)])


class Sampler:
    """One answer's stream of choices; the same seed and logits give the same tokens."""

    def __init__(self, settings: Sampling) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._numbers: list[float] = []  # drawn, not used yet

    def expected(self) -> list[int]:
        """Nothing is known of the next tokens."""
        return []

    def ahead(self, count: int) -> NDArray[np.float32]:
        """(count, 3): temperature, top-p and random number of the next choices, for a backend that chooses itself."""
        while len(self._numbers) < count:
            self._numbers.append(float(self._random.random(dtype=np.float32)))
        rows = [(self._settings.temperature, self._settings.top_p, number) for number in self._numbers[:count]]
        return np.array(rows, np.float32).reshape(count, 3)

    def took(self) -> None:
        """The next choice was made with the first row of `ahead`."""
        self._numbers = self._numbers[1:]

    def pick(self, logits: NDArray[np.float32]) -> int:
        """(V,) -> a token id."""
        number = float(self.ahead(1)[0, 2])
        self.took()
        return choose(logits, self._settings.temperature, self._settings.top_p, number)
