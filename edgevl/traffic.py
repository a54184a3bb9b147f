"""How many bytes a decode step must read: what the bandwidth of a machine is compared with.

Called by `edgevl bench` and by the chat's /stats.
"""

from __future__ import annotations

from edgevl.bundle import Bundle
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
