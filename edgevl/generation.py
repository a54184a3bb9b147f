"""One answer's tokens, from the logits of its prompt on: a step of the decoder for each, or for several at once.

Where the backend gives a token the same logits whether it is alone in its step or not, the next tokens are guessed,
from what a schema asks for or from what stands earlier (`edgevl.lookup`), and checked together: each is chosen from its
own logits as if there had been no guess. Knows nothing of text. Called by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TokenConfig
from edgevl.lookup import Lookup
from edgevl.prefill import feed
from edgevl.runner import F32, I32, Runner, alike_rows, chooser_of

_FEW = 2  # guesses after wrong ones: they cost next to nothing; after right ones, as many as the backend checks

# What a place in the KV cache holds: a token id, or one row of one picture's embeddings.
Key = int | tuple[str, int]


class Chooser(Protocol):
    """Chooses tokens one after the other, and may remember what it chose."""

    def pick(self, logits: NDArray[np.float32]) -> int:
        """(V,) -> a token id."""
        ...

    def expected(self) -> list[int]:
        """Tokens that are likely to follow whatever the logits; none where nothing is known."""
        ...

    def ahead(self, count: int) -> F32 | None:
        """What a backend needs to make the next choices itself (see `edgevl.sampling.Sampler`); None: it cannot."""
        ...

    def took(self) -> None:
        """A backend made the next choice."""
        ...


class Generation:
    """Runs one answer; `steps` counts decoder steps, `stopped` tells whether a stop token ended it."""

    def __init__(self, runner: Runner, chooser: Chooser, tokens: TokenConfig, lookup: Lookup | None) -> None:
        """`lookup` holds the prompt; None guesses nothing."""
        self._runner, self._chooser, self._config, self._lookup = runner, chooser, tokens, lookup
        self._most = min(alike_rows(runner), runner.limits.logit_rows, runner.limits.chunk) - 1
        self._trust = min(_FEW, self._most)  # guesses of the next step
        self._backend = chooser_of(runner)
        self.steps = 0
        self.stopped = False

    def run(self, logits: F32, held: list[Key], room: int) -> Iterator[int]:
        """At most `room` tokens after `logits` (1, V), without the stop token.

        `held` is what the KV cache holds, and grows with it. What was guessed right is in it before it is given.
        """
        chosen = [self._chooser.pick(logits[0, : self._config.size])]
        for left in range(room - 1, -1, -1):
            token = chosen.pop(0)
            if token in self._config.stop:
                self.stopped = True
                return
            yield token
            if left and not chosen:
                chosen = self._step(token, held, left - 1)

    def _choices(self, tokens: list[int], start: int) -> Iterator[int]:
        """Feed a step; gives what is chosen after each of its tokens, chosen when it is asked for."""
        draws = None if self._backend is None else self._chooser.ahead(len(tokens))
        if self._backend is None or draws is None:
            logits = feed(self._runner, tokens, start, None, len(tokens))
            return (self._chooser.pick(row[: self._config.size]) for row in logits)
        places = np.arange(len(tokens), dtype=np.int32)
        ids = np.asarray(tokens, np.int32)
        return self._taken(self._backend(ids, start + places, np.zeros_like(places), None, places, draws))

    def _taken(self, ids: I32) -> Iterator[int]:
        """Choices of the backend, each counted when it is asked for."""
        for token in ids.tolist():
            self._chooser.took()
            yield token

    def _step(self, token: int, held: list[Key], most: int) -> list[int]:
        """Feed a token and at most `most` guesses of what follows; what does follow, one more than guessed right."""
        guesses: list[int] = []
        expected: list[int] = []
        if self._lookup is not None:
            self._lookup.append(token)
            expected = self._chooser.expected()[: min(most, self._most)]
            guesses = expected or self._lookup.guess(min(most, self._trust))
        choices = self._choices([token, *guesses], len(held))
        self.steps += 1
        held.append(token)
        chosen: list[int] = []
        for choice, guess in zip(choices, [*guesses, None], strict=False):
            chosen.append(choice)
            if guess is None or chosen[-1] != guess or guess in self._config.stop:
                break
            if self._lookup is not None:
                self._lookup.append(guess)
            held.append(guess)
        if guesses and not expected:
            right = len(chosen) - 1
            self._trust = self._most if right == len(guesses) else min(max(right, _FEW), self._most)
        return chosen
