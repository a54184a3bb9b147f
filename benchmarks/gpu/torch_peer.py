"""torch on the same GPU in the same run: its bf16 matrix rate, and its own int4 linears over the 8B's shapes.

Optional: everything here is skipped, and said to be, where torch or its CUDA is missing.
"""

from __future__ import annotations

import importlib
import statistics
from typing import Any

from edgevl.config import ModelConfig
from edgevl.models.names import text_parts


def _torch() -> Any:
    """torch, when it is there and sees a GPU."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _seconds(work: Any, repeats: int = 10) -> float:
    torch: Any = importlib.import_module("torch")
    taken = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(taken[2:])


def matrix_rate(size: int = 8192) -> float | None:
    """Operations a second of a large bf16 matrix product; None without torch's CUDA."""
    torch = _torch()
    if torch is None:
        return None
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * float(size) ** 3 / _seconds(lambda: a @ b)


def int4_step(config: ModelConfig, group: int = 128) -> float | None:
    """Seconds of all int4 linears of one decode step with `torch._weight_int4pack_mm`, as one captured graph."""
    torch = _torch()
    if torch is None:
        return None
    calls = []
    for part in text_parts(config):
        if part.kind != "linear":
            continue
        n, k = part.shape
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.full((k // group, n, 2), 0.01, dtype=torch.bfloat16, device="cuda")
        calls.append((torch.randn(1, k, dtype=torch.bfloat16, device="cuda"), packed, scales))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x, packed, scales in calls[:2]:
            torch._weight_int4pack_mm(x, packed, group, scales)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, packed, scales in calls:
            torch._weight_int4pack_mm(x, packed, group, scales)
    return _seconds(graph.replay)
