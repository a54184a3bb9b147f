"""What an int8 KV cache costs and saves: `python -m benchmarks.kv_cache BUNDLE`, against f16 on the same weights.

Perplexity of both on held-out text, the mean KL divergence of their logits, and a decode step at several depths. The
last line of stdout is one JSON document.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from edgevl.backends.cpu import CpuRunner
from edgevl.bundle import Bundle
from edgevl.console import note, print_json
from edgevl.prefill import feed
from edgevl.tokenizer import Tokenizer

_TEXT = Path(__file__).parent.parent / "calibration/data/held_out.txt"
_KINDS = ("f16", "int8")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), default=_TEXT, show_default=True)
@click.option("--rows", type=int, default=2048, show_default=True, help="Tokens of a sequence.")
@click.option("--step", type=int, default=7, show_default=True, help="Tokens of a step; up to 8 take the decode path.")
@click.option("--depths", multiple=True, type=int, default=(256, 2048, 6000), show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
def command(bundle: Path, text: Path, rows: int, step: int, depths: tuple[int, ...], threads: int) -> None:
    """Compare the two caches under the weights of BUNDLE."""
    opened = Bundle.open(bundle)
    ids = Tokenizer(opened.tokenizer_json()).encode(text.read_text(encoding="utf-8"), specials=False)
    runners = {kv: _runner(opened, kv, step, threads) for kv in _KINDS}
    totals = np.zeros(5)
    for begin in range(0, len(ids) - 1, rows):
        totals += _compare(runners, ids[begin : begin + rows], opened.manifest.model.tokens.size, step)
    count = totals[4]
    f16, int8 = (float(np.exp(total / count)) for total in totals[:2])
    result: dict[str, Any] = {
        "tokens": int(count),
        "perplexity": {"f16": f16, "int8": int8},
        "change_percent": 100 * (int8 / f16 - 1),
        "kl": totals[2] / count,
        "top1": totals[3] / count,
        "bytes": {kv: runner.memory.kv for kv, runner in runners.items()},
        "step_ms": {str(depth): _speeds(runners, depth) for depth in depths},
    }
    note(f"perplexity {f16:.3f} -> {int8:.3f} ({result['change_percent']:+.2f} %), KL {result['kl']:.5f}")
    print_json({"bundle": opened.digest, "backend": runners["f16"].backend, **result})


def _runner(bundle: Bundle, kv: str, step: int, threads: int) -> CpuRunner:
    limits = replace(bundle.manifest.limits, kv=kv, logit_rows=max(step, bundle.manifest.limits.logit_rows))
    return CpuRunner(bundle.manifest.model, limits, bundle.weight, threads)


def _compare(runners: dict[str, CpuRunner], ids: list[int], size: int, step: int) -> NDArray[np.float64]:
    """Sums over one sequence: -log p under each cache, KL(f16 ‖ int8), equal first choices, tokens."""
    totals = np.zeros(5)
    for begin in range(0, len(ids) - 1, step):
        part = ids[begin : min(begin + step, len(ids) - 1)]
        logs = [_log_softmax(feed(runners[kv], part, begin, None, len(part))[:, :size]) for kv in _KINDS]
        rows, following = np.arange(len(part)), np.array(ids[begin + 1 : begin + 1 + len(part)])
        divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
        same = (logs[0].argmax(axis=1) == logs[1].argmax(axis=1)).sum()
        totals += [-logs[0][rows, following].sum(), -logs[1][rows, following].sum(), divergence, same, len(part)]
    return totals


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _speeds(runners: dict[str, CpuRunner], depth: int) -> dict[str, float]:
    """Milliseconds of a step of one token at a depth: the fastest of many, taken in turn."""
    times: dict[str, list[float]] = {kv: [] for kv in runners}
    for _ in range(20):
        for kv, runner in runners.items():
            start = time.perf_counter()
            feed(runner, [1], depth, None, 1)
            times[kv].append(1000 * (time.perf_counter() - start))
    return {kv: round(min(found), 2) for kv, found in times.items()}


if __name__ == "__main__":
    command()
