"""Prompt lookup: guesses the next tokens from what stands earlier in the same conversation.

Answers about documents copy: names, numbers, whole lines. Where the last tokens stood before, what followed them then
is guessed to follow now; the model checks all guesses in one step, and only those it would have chosen itself are
kept, so that the answer stays the same, token by token. Knows no model. Called by the engine. Source: Saxena, "Prompt
Lookup Decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST, _SHORTEST = 3, 2  # tokens that must stand alike before a guess; the longest match wins


class Lookup:
    """The tokens of one sequence, and where each run of a few of them ended last."""

    def __init__(self, tokens: Iterable[int]) -> None:
        """`tokens`: the prompt. Those below zero stand for rows of pictures and are never guessed."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run -> the place after its last appearance
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The sequence goes on with `token`."""
        # runs that end before this token can be looked up from now on: the last run of all must not find itself
        for size in range(_SHORTEST, _LONGEST + 1):
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that followed the last time; none where nothing like this stood before."""
        for size in range(min(_LONGEST, len(self._tokens)), _SHORTEST - 1, -1):
            place = self._after.get(tuple(self._tokens[-size:]))
            if place is not None:
                found = self._tokens[place : place + most]
                pictures = [i for i, token in enumerate(found) if token < 0]
                return found[: pictures[0]] if pictures else found
        return []
