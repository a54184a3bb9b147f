"""What the runners share. Runs in a peer's environment: the standard library alone, nothing of edgevl.

A runner is called with the path of a JSON job and prints one JSON document, its last line: seconds of every repeat of
every case. Peers and edgevl get the same token ids.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

Measured = dict[str, Any]


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
        found["prefill"][str(length)] = [_seconds(model.prefill, ids) for _ in range(job.repeats)]
    following = job.tokens[: job.generate]
    for depth in job.depths:
        times = []
        for _ in range(job.repeats):
            model.prefill(job.tokens[: max(1, depth)])
            model.decode(following[:2])  # warm
            times.append(_seconds(model.decode, following))
        found["decode"][str(depth)] = times
    return found


def batched(job: Job, model: Any) -> list[float]:
    """Seconds of `generate` steps of `slots` tokens each, from empty caches."""
    ids = job.tokens[: job.generate]
    model.step(ids[:2], job.slots)
    return [_seconds(model.step, ids, job.slots) for _ in range(job.repeats)]


def report(job: Job, measured: Measured, *packages: str) -> None:
    """Print what was measured, with the versions of `packages`."""
    measured.setdefault("resident_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if packages:
        measured["versions"] = {name: version(name) for name in packages}
    print(json.dumps(measured | {"threads": job.threads}))


def _seconds(work: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start
