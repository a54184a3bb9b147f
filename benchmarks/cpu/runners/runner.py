"""What the runners share. Runs in a peer's environment: the standard library alone, nothing of edgevl.

A runner is called with the path of a JSON job and prints one JSON document, its last line: seconds of every repeat of
every case. Peers and edgevl get the same token ids.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

Measured = dict[str, Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Job:
    """One run of one model in one runtime."""

    model: str  # a path, or a name that the runner knows
    threads: int
    tokens: list[int]
    prefill: list[int] = field(default_factory=list)  # tokens of each prompt
    depths: list[int] = field(default_factory=list)  # tokens in the cache before decoding
    generate: int = 32  # tokens to decode
    repeats: int = 1  # after a warm-up
    slots: int = 0  # also decode so many sequences at once
    tiles: int = 0  # only look at so many tiles
    blocks: int = 0  # of a model of random weights; 0: all
    clock: str = "wall"  # "cpu": the time that the process itself was given, for one thread on a busy machine

    def seconds(self, work: Callable[..., Any], *arguments: Any) -> float:
        """How long a call takes."""
        clock = CLOCKS[self.clock]
        start = clock()
        work(*arguments)
        return clock() - start


class Model(Protocol):
    """A loaded model. Prefill begins with an empty cache; decoding goes on where it ended."""

    def prefill(self, ids: list[int]) -> None: ...

    def decode(self, ids: list[int]) -> None: ...


def read_job() -> Job:
    """The job that the command line names."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def measure(job: Job, model: Model) -> Measured:
    """Seconds of each repeat: prefill by length, decoding of `generate` tokens by depth."""
    found: Measured = {"prefill": {}, "decode": {}}
    for length in job.prefill:
        ids = job.tokens[:length]
        model.prefill(ids)
        found["prefill"][str(length)] = [job.seconds(model.prefill, ids) for _ in range(job.repeats)]
    following = job.tokens[: job.generate]
    for depth in job.depths:
        times = []
        for _ in range(job.repeats):
            model.prefill(job.tokens[: max(1, depth)])
            model.decode(following[:2])  # warm
            times.append(job.seconds(model.decode, following))
        found["decode"][str(depth)] = times
    return found


def batched(job: Job, model: Any) -> list[float]:
    """Seconds of `generate` steps of `slots` tokens each, from empty caches."""
    ids = job.tokens[: job.generate]
    model.step(ids[:2], job.slots)
    return [job.seconds(model.step, ids, job.slots) for _ in range(job.repeats)]


def report(job: Job, measured: Measured, *packages: str) -> None:
    """Print what was measured, with the versions of `packages`."""
    measured.setdefault("resident_bytes", peak_bytes())
    if packages:
        measured["versions"] = {name: version(name) for name in packages}
    print(json.dumps(measured | {"threads": job.threads}))


def peak_bytes() -> int:
    """The most bytes this process had in memory; getrusage would count what the process had that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
