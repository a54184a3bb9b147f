"""How long to wait before a source is tried again. Called by `edgevl.camera.capture`."""

from __future__ import annotations

import random


class Backoff:
    """Doubling waits with jitter, so that many cameras behind one switch do not come back in step."""

    def __init__(self, first: float = 1.0, longest: float = 60.0, healthy: float = 30.0) -> None:
        """Seconds of the first wait, of the longest, and of good work after which the first one counts again."""
        self._first, self._longest, self._healthy = first, longest, healthy
        self._next = first
        self._random = random.Random()

    def wait(self, worked: float) -> float:
        """Seconds to wait now that the source failed after `worked` seconds of frames."""
        if worked >= self._healthy:
            self._next = self._first
        seconds = self._next * self._random.uniform(0.75, 1.25)
        self._next = min(2 * self._next, self._longest)
        return min(seconds, self._longest)
