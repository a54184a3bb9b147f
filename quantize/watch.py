"""What a run takes: seconds by stage, and the most memory it held. Called by `quantize.job`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgevl.machine import peak_resident_bytes

_EVERY = 0.05  # seconds between two looks


class Watch:
    """A context; `own_peak` is what the process held without mapped files, which the system can take back.

    Stages do not nest.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}  # bytes of its own at most, by stage
        self.base = own_bytes()  # of the interpreter and its libraries, before any work
        self._stage = "start"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage."""
        began, self._stage = time.monotonic(), name
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)

    @property
    def own_peak(self) -> int:
        """The most bytes at any time."""
        return max(self.peaks.values(), default=0)

    @property
    def peak(self) -> int:
        """The most bytes that the process ever had in memory, mapped files included."""
        return peak_resident_bytes()

    def _look(self) -> None:
        while True:
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), own_bytes())
            if self._over.wait(_EVERY):
                return


def own_bytes() -> int:
    """Bytes in memory that are no mapped file's; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(sizes) * 1024
