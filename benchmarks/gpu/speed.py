"""How fast is it? The 8B's shapes with random weights, against what the GPU can copy and multiply in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.models import Weights
from edgevl.backends.cuda import CudaRunner
from edgevl.backends.cuda_device import CudaDevice
from edgevl.config import ModelConfig
from edgevl.memory import kv_row_bytes
from edgevl.models.names import all_parts
from edgevl.prefill import feed
from edgevl.runner import Limits

LIMITS = Limits(context=4096, slots=8, chunk=1024, logit_rows=8, tiles=13)


@dataclass(frozen=True)
class Taken:
    """How long something took: the median, and (max - min) / median."""

    seconds: float
    spread: float


def timed(work: Callable[[], object], device: CudaDevice, repeats: int = 5) -> Taken:
    """`repeats` runs after one to warm up, each waited for."""
    taken = []
    for _ in range(repeats + 1):
        device.wait()
        start = time.perf_counter()
        work()
        device.wait()
        taken.append(time.perf_counter() - start)
    kept = taken[1:]
    middle = statistics.median(kept)
    return Taken(middle, round((max(kept) - min(kept)) / middle, 3))


def step_bytes(config: ModelConfig, weight_bytes: Callable[[str], int], depth: int, slots: int, kv: str = "f16") -> int:
    """Bytes that one decode step of `slots` tokens must read: every decoder weight once, and the KV cache."""
    t = config.text
    names = [p.name for p in all_parts(config) if p.region in ("text", "head")]
    return sum(map(weight_bytes, names)) + slots * 2 * t.layers * t.kv_heads * kv_row_bytes(kv, t.head_dim) * depth


def linear_operations(config: ModelConfig, regions: tuple[str, ...]) -> int:
    """Multiplications and additions of one token (or patch) through the linears of some regions."""
    return sum(2 * int(np.prod(p.shape)) for p in all_parts(config) if p.kind == "linear" and p.region in regions)


class Meter:
    """Measures one runner; `limits` is what the GPU can do, as in the command's document."""

    def __init__(
        self,
        runner: CudaRunner,
        device: CudaDevice,
        config: ModelConfig,
        weights: Weights,
        limits: Mapping[str, float | None],
    ) -> None:
        self.runner, self._device, self._config, self._weights = runner, device, config, weights
        self._limits = limits
        self._ids = np.random.default_rng(0).integers(0, config.tokens.size, 2048).tolist()

    def decode(self, slots: int, temperature: float = 0.0, depth: int = 1024, steps: int = 32) -> dict[str, Any]:
        """Steps of `slots` sequences at `depth`, copies of tokens in and out included; greedy at temperature 0."""
        tokens, rows = np.full(slots, 17, np.int32), np.arange(slots, dtype=np.int32)
        draws = np.array([[temperature, 0.9, 0.5]] * slots, np.float32)

        def run() -> None:
            chosen = tokens
            for step in range(steps):
                chosen = self.runner.choose(chosen, np.full(slots, depth + step, np.int32), rows, None, rows, draws)

        taken = timed(run, self._device)
        needed = step_bytes(self._config, lambda n: self._weights(n).nbytes, depth, slots, self.runner.limits.kv)
        each = taken.seconds / steps
        return {
            "tokens_per_second": round(slots / each, 1),
            "spread": taken.spread,
            "milliseconds": round(each * 1e3, 3),
            "gigabytes_per_second": round(needed / each / 1e9, 1),
            "share_of_copy": _share(needed / each / 1e9, self._limits.get("copy_gigabytes_per_second")),
        }

    def prefill(self) -> dict[str, Any]:
        """2,048 tokens of one sequence."""
        taken = timed(lambda: feed(self.runner, self._ids, 0, None, 1), self._device, 3)
        count = len(self._ids)
        work = count * linear_operations(self._config, ("text",)) + _attention_operations(self._config, count)
        return self._rate(taken, work) | {"tokens_per_second": round(count / taken.seconds, 1)}

    def _pixels(self) -> NDArray[np.uint8]:
        assert self._config.vision is not None
        side = self._config.vision.tile_size
        return np.zeros((self.runner.limits.tiles, side, side, 3), np.uint8)

    def tower(self) -> dict[str, Any]:
        """Every tile of a full picture at once."""
        pixels = self._pixels()
        taken = timed(lambda: self.runner.vision(pixels), self._device, 3)
        return self._rate(taken, len(pixels) * _tower_operations(self._config)) | {"tiles": len(pixels)}

    def first_token(self) -> dict[str, Any]:
        """From a full picture and a short question to the logits of the first token."""
        assert self._config.vision is not None
        pixels = self._pixels()
        prompt = [*(-1 - r for r in range(len(pixels) * self._config.vision.tile_tokens)), *self._ids[:16]]
        taken = timed(lambda: feed(self.runner, prompt, 0, self.runner.vision(pixels), 1), self._device, 3)
        found = {"tiles": len(pixels), "tokens": len(prompt)}
        return {**found, "seconds": round(taken.seconds, 4), "spread": taken.spread}

    def _rate(self, taken: Taken, work: int) -> dict[str, Any]:
        rate = work / taken.seconds / 1e12
        return {
            "seconds": round(taken.seconds, 4),
            "spread": taken.spread,
            "teraflops": round(rate, 1),
            "share_of_matrix_rate": _share(rate, self._limits.get("matrix_teraflops")),
        }


def _share(value: float, whole: float | None) -> float | None:
    return None if not whole else round(value / whole, 3)


def goals(document: dict[str, Any]) -> dict[str, str]:
    """What was aimed at on an H200 beside what was found; "not measured" for what failed, or without torch."""

    def of(section: str, name: str) -> float | None:
        return document.get(section, {}).get(name)  # type: ignore[no-any-return]

    found: dict[str, tuple[float | None, float]] = {
        "decode, share of copy bandwidth": (of("decode_1", "share_of_copy"), 0.7),
        "decode, times torch's int4 linears": (
            _share(of("limits", "torch_int4_step_milliseconds") or 0.0, of("decode_1", "milliseconds")) or None,
            1.5,
        ),
        "prefill, share of matrix rate": (of("prefill_2048", "share_of_matrix_rate"), 0.6),
        "tower, share of matrix rate": (of("tower", "share_of_matrix_rate"), 0.5),
        "8 slots, times one": (
            _share(of("decode_8", "tokens_per_second") or 0.0, of("decode_1", "tokens_per_second")) or None,
            5.0,
        ),
    }
    return {
        name: "not measured" if value is None else f"{value:.2f} of {goal}" for name, (value, goal) in found.items()
    }


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
