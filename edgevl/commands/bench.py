"""`edgevl bench`: prefill and decode of a bundle, beside what memory and processor can do at that moment."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from edgevl import __version__
from edgevl.bundle import Bundle
from edgevl.commands.doctor import processor
from edgevl.console import note, print_json, progress, table
from edgevl.errors import CapacityError, UsageError
from edgevl.machine import peak_resident_bytes
from edgevl.prefill import feed
from edgevl.probes import int8_rate, read_bandwidth
from edgevl.runner import Runner, chooser_of
from edgevl.traffic import operations, step_bytes


@click.command(name="bench", short_help="Measure prefill, decode and bandwidth of a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", type=int, default=512, show_default=True, help="Tokens to prefill.")
@click.option("--generate", type=int, default=128, show_default=True, help="Tokens to decode.")
@click.option("--depth", type=int, default=0, show_default=True, help="Tokens in the cache before either begins.")
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--json", "as_json", is_flag=True, help="Print only the JSON document.")
def command(
    bundle: Path, prompt: int, generate: int, depth: int, repeats: int, threads: int | None, as_json: bool
) -> None:
    """Measure BUNDLE: medians over the repeats after one warm-up, with the spread (max - min) / median.

    The bandwidth used counts the weights and the KV cache that a decode step must read, the operations those of the
    prefill; what is available is measured in the same run, by reading memory and by multiplying int8 in registers, on a
    GPU by a copy in its memory alone. The last line of stdout is one JSON document.
    """
    from edgevl.engine import make_runner

    asked = {"prompt": (prompt, 1), "generate": (generate, 1), "depth": (depth, 0), "repeats": (repeats, 1)}
    for name, (value, least) in asked.items():
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    opened = Bundle.open(bundle)
    context = opened.manifest.limits.context
    if depth + max(prompt, generate) > context:
        raise CapacityError(
            f"depth {depth} and {max(prompt, generate)} tokens are over the bundle's context of {context}; ask for less"
        )
    runner = make_runner(opened, threads, "auto")
    document = measure(opened, runner, prompt, generate, depth, repeats)
    if not as_json:
        _show(document)
    print_json(document)


def measure(bundle: Bundle, runner: Runner, prompt: int, generate: int, depth: int, repeats: int) -> dict[str, Any]:
    """Run everything; the JSON document that DESIGN promises."""
    vocabulary = bundle.manifest.model.tokens.size
    ids = np.random.default_rng(0).integers(0, vocabulary, depth + prompt).astype(np.int32).tolist()
    if depth:
        feed(runner, ids[:depth], 0, None, 1)

    def prefill() -> None:
        feed(runner, ids[depth:], depth, None, 1)

    choose, first, greedy = chooser_of(runner), np.zeros(1, np.int32), np.zeros((1, 3), np.float32)

    def decode() -> None:
        for i in range(generate):
            token = ids[i % len(ids)]
            if choose is None:
                feed(runner, [token], depth + i, None, 1)
            else:  # as an answer is generated: the logits stay where they are
                choose(np.array([token], np.int32), first + (depth + i), first, None, first, greedy)

    own: Callable[[], float | None] | None = getattr(runner, "bandwidth", None)  # of memory that is not the machine's
    with progress() as move:
        threads, available, most = _threads(runner), None, None
        if own is None:
            available, most = read_bandwidth(threads, repeats), int8_rate(threads, repeats)
        elif (copied := own()) is not None:
            available = copied / 1e9
        prefilled = _rates(prefill, prompt, repeats, "prefill", move)
        decoded = _rates(decode, generate, repeats, "decode", move)
    step = step_bytes(bundle, depth + generate // 2)
    used = step * decoded["tokens_per_second"] / 1e9
    done = operations(bundle.manifest.model.text, prompt, depth) / prompt * prefilled["tokens_per_second"] / 1e9
    return {
        "bundle": {"path": str(bundle.path), "digest": bundle.digest, "source": bundle.manifest.source.quantization},
        "prefill": {"tokens": prompt, "depth": depth, **prefilled},
        "decode": {"tokens": generate, "depth": depth, **decoded},
        "bandwidth": {
            "bytes_per_step": step,
            "used_gb_s": round(used, 2),
            "available_gb_s": _rounded(available, 2),
            "share": _rounded(available and used / available, 3),
        },
        "operations": {
            "used_gop_s": round(done, 1),
            "available_gop_s": _rounded(most, 1),
            "share": _rounded(most and done / most, 3),
        },
        "peak_resident_bytes": peak_resident_bytes(),
        "planned_bytes": runner.planned_bytes,
        "backend": runner.backend,
        "machine": {"processor": processor(), "system": platform.platform(), "edgevl": __version__, "repeats": repeats},
    }


def _rates(
    run: Callable[[], None], tokens: int, repeats: int, stage: str, move: Callable[[str, int, int], None]
) -> dict[str, float]:
    """Tokens a second: median of the repeats after a warm-up, and the spread."""
    rates = []
    for i in range(repeats + 1):
        move(stage, i, repeats + 1)
        start = time.perf_counter()
        run()
        rates.append(tokens / (time.perf_counter() - start))
    move(stage, repeats + 1, repeats + 1)
    kept = rates[1:]
    return {"tokens_per_second": round(median(kept), 2), "spread": round((max(kept) - min(kept)) / median(kept), 3)}


def _threads(runner: Runner) -> int:
    return int(getattr(runner, "threads", 1))


def _show(d: dict[str, Any]) -> None:
    rows = [
        [name, str(d[name]["tokens"]), f"{d[name]['tokens_per_second']:.1f}", f"{100 * d[name]['spread']:.0f} %"]
        for name in ("prefill", "decode")
    ]
    table(d["backend"], ["", "tokens", "tokens/s", "spread"], rows, to_stderr=True)
    b = d["bandwidth"]
    o = d["operations"]
    note(f"bandwidth: {b['used_gb_s']:.1f} GB/s{_beside(b['available_gb_s'], b['share'])}")
    note(f"operations of the prefill: {o['used_gop_s']:.0f} GOP/s{_beside(o['available_gop_s'], o['share'])}")


def _beside(available: float | None, share: float | None) -> str:
    return "" if available is None or share is None else f" of {available:.0f} measured now ({100 * share:.0f} %)"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
