"""How fast is it? The 8B's shapes with random weights, against what the GPU can copy and multiply in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgevl.backends.cuda import CudaRunner
from edgevl.backends.cuda_device import CudaDevice
from edgevl.config import ModelConfig
from edgevl.memory import kv_row_bytes
from edgevl.models.names import all_parts
from edgevl.prefill import feed
from edgevl.runner import Limits

LIMITS = Limits(context=4096, slots=8, chunk=1024, logit_rows=8, tiles=13)


def seconds(work: Callable[[], None], device: CudaDevice, repeats: int = 5) -> float:
    """Median of `repeats` runs after one to warm up, each waited for."""
    taken = []
    for _ in range(repeats + 1):
        device.wait()
        start = time.perf_counter()
        work()
        device.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def copy_bandwidth(device: CudaDevice, size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source, to = device.allocate(size), device.allocate(size)
    device.zero(source, size)
    return 2 * size / seconds(lambda: device.copy(to, source, size), device)


def step_bytes(config: ModelConfig, weight_bytes: Callable[[str], int], depth: int, slots: int, kv: str = "f16") -> int:
    """Bytes that one decode step of `slots` tokens must read: every decoder weight once, and the KV cache."""
    t = config.text
    names = [p.name for p in all_parts(config) if p.region in ("text", "head")]
    return sum(map(weight_bytes, names)) + slots * 2 * t.layers * t.kv_heads * kv_row_bytes(kv, t.head_dim) * depth


def linear_operations(config: ModelConfig, regions: tuple[str, ...]) -> int:
    """Multiplications and additions of one token (or patch) through the linears of some regions."""
    return sum(2 * int(np.prod(p.shape)) for p in all_parts(config) if p.kind == "linear" and p.region in regions)


def decode(
    runner: CudaRunner, device: CudaDevice, depth: int, slots: int, temperature: float = 0.0, steps: int = 32
) -> float:
    """Seconds of one step of `slots` sequences at `depth`, copies of tokens in and out included; greedy at 0."""
    tokens, rows = np.full(slots, 17, np.int32), np.arange(slots, dtype=np.int32)
    draws = np.array([[temperature, 0.9, 0.5]] * slots, np.float32)

    def run() -> None:
        chosen = tokens
        for step in range(steps):
            chosen = runner.choose(chosen, np.full(slots, depth + step, np.int32), rows, None, rows, draws)

    return seconds(run, device) / steps


def decoding(
    runner: CudaRunner, device: CudaDevice, config: ModelConfig, copy: float, weight_bytes: Callable[[str], int]
) -> dict[str, Any]:
    """Steps of 1 and 8 sequences at a depth of 1,024, greedy, and drawn with top-p."""
    result: dict[str, Any] = {}
    for name, slots, temperature in (("decode_1", 1, 0.0), ("decode_8", 8, 0.0), ("decode_1_top_p", 1, 0.7)):
        taken = decode(runner, device, 1024, slots, temperature)
        needed = step_bytes(config, weight_bytes, 1024, slots, runner.limits.kv)
        result[name] = {
            "tokens_per_second": round(slots / taken, 1),
            "milliseconds": round(taken * 1e3, 3),
            "gigabytes_per_second": round(needed / taken / 1e9, 1),
            "share_of_copy": round(needed / taken / copy, 3),
        }
    return result


def goals(document: dict[str, Any]) -> dict[str, str]:
    """What was aimed at on an H200 beside what was found; "not measured" without torch."""
    one, eight, limits = document["decode_1"], document["decode_8"], document["limits"]
    peer = limits["torch_int4_step_milliseconds"]
    found: dict[str, tuple[float | None, float]] = {
        "decode, share of copy bandwidth": (one["share_of_copy"], 0.7),
        "decode, times torch's int4 linears": (None if peer is None else peer / one["milliseconds"], 1.5),
        "prefill, share of matrix rate": (document["prefill_2048"]["share_of_matrix_rate"], 0.6),
        "tower, share of matrix rate": (document.get("tower", {}).get("share_of_matrix_rate"), 0.5),
        "8 slots, times one": (eight["tokens_per_second"] / one["tokens_per_second"], 5.0),
    }
    return {
        name: "not measured" if value is None else f"{value:.2f} of {goal}" for name, (value, goal) in found.items()
    }


def measure(
    runner: CudaRunner,
    device: CudaDevice,
    config: ModelConfig,
    copy: float,
    rate: float | None,
    weight_bytes: Callable[[str], int],
) -> dict[str, Any]:
    """Decode, prefill, tower, first token of a full picture; shares of `copy` (B/s) and `rate` (operations/s)."""
    result = decoding(runner, device, config, copy, weight_bytes)
    ids = np.random.default_rng(0).integers(0, config.tokens.size, 2048).tolist()
    taken = seconds(lambda: _ignore(feed(runner, ids, 0, None, 1)), device, 3)
    work = len(ids) * linear_operations(config, ("text",)) + _attention_operations(config, len(ids))
    result["prefill_2048"] = _rate(taken, work, rate) | {"tokens_per_second": round(len(ids) / taken, 1)}
    if config.vision is None:
        return result
    side, tiles = config.vision.tile_size, runner.limits.tiles
    pixels = np.zeros((tiles, side, side, 3), np.uint8)
    taken = seconds(lambda: _ignore(runner.vision(pixels)), device, 3)
    result["tower"] = _rate(taken, tiles * _tower_operations(config), rate) | {"tiles": tiles}
    count = tiles * config.vision.tile_tokens
    prompt = [*(-1 - r for r in range(count)), *ids[:16]]

    def first() -> None:
        feed(runner, prompt, 0, runner.vision(pixels), 1)

    result["first_token"] = {"tiles": tiles, "tokens": len(prompt), "seconds": round(seconds(first, device, 3), 4)}
    return result


def _ignore(_: object) -> None:
    """A result that is only waited for."""


def _rate(taken: float, work: int, rate: float | None) -> dict[str, Any]:
    share = None if rate is None else round(work / taken / rate, 3)
    return {"seconds": round(taken, 4), "teraflops": round(work / taken / 1e12, 1), "share_of_matrix_rate": share}


def _attention_operations(config: ModelConfig, tokens: int) -> int:
    """Causal: half of all pairs, scores and values."""
    t = config.text
    return t.layers * t.heads * t.head_dim * 2 * tokens * tokens


def _tower_operations(config: ModelConfig) -> int:
    """Of one tile; the projector, on a quarter of the tokens, is left out."""
    v = config.vision
    assert v is not None
    tokens = v.patches + v.prefix_tokens
    return tokens * linear_operations(config, ("vision",)) + v.layers * 4 * tokens * tokens * v.hidden_size
