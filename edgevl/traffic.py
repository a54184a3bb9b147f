"""What a model must read and compute: what the bandwidth and the arithmetic of a machine are compared with.

Called by `edgevl bench`, the benchmarks and the chat's /stats.
"""

from __future__ import annotations

from edgevl.bundle import Bundle
from edgevl.config import TextConfig, VisionConfig
from edgevl.memory import kv_row_bytes


def step_bytes(bundle: Bundle, position: int) -> int:
    """Bytes that one decode step at `position` must read: each text weight once (one embedding row), and the cache."""
    model, limits = bundle.manifest.model, bundle.manifest.limits
    weights = 0
    for name, record in bundle.manifest.weights.items():
        stored = bundle.weight(name)
        if record.region in ("text", "head"):
            weights += stored.nbytes
        elif record.region == "embed":
            weights += stored.nbytes // record.shape[0]
    row = kv_row_bytes(limits.kv, model.text.head_dim)
    return weights + 2 * model.text.layers * model.text.kv_heads * row * position


def operations(config: TextConfig, tokens: int, depth: int = 0) -> int:
    """Multiplications and additions of a prompt of `tokens` behind `depth` others, the head once."""
    c, q = config.hidden_size, config.heads * config.head_dim
    block = c * (config.qkv_size + q) + 3 * c * config.intermediate_size
    seen = tokens * depth + tokens * (tokens + 1) // 2  # pairs of a token and one that it sees
    return 2 * (tokens * config.layers * block + 2 * seen * config.layers * q + c * config.vocab_size)


def tower_operations(config: VisionConfig) -> int:
    """The same of one tile: all blocks of the tower, without the projector."""
    c, tokens = config.hidden_size, config.prefix_tokens + config.patches
    block = 4 * c * c + 2 * c * config.intermediate_size
    embedding = config.patches * 3 * config.patch_size**2 * c
    return 2 * (tokens * config.layers * block + 2 * tokens * tokens * config.layers * c + embedding)
