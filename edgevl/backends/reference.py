"""The reference backend: whole models in eager numpy, slow and plain, runs anywhere numpy does.

Used to check the other backends token by token. Keeps no plan: it allocates as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.config import ModelConfig
from edgevl.errors import CapacityError
from edgevl.layouts import StoredWeight, unpack
from edgevl.models.decoder import decoder
from edgevl.models.vision import image_embeddings
from edgevl.ops import Ops, Step
from edgevl.reference import ReferenceOps
from edgevl.runner import F32, I32, Limits
from edgevl.weights import Weight


class ReferenceRunner:
    """A `Runner` over `ReferenceOps`."""

    backend = "reference (numpy)"

    def __init__(self, config: ModelConfig, limits: Limits, weights: Callable[[str], StoredWeight]) -> None:
        self.config, self.limits = config, limits
        t = config.text
        dtype = np.float16 if limits.kv == "f16" else np.float32  # int8: f32 in steps
        shape = (limits.slots, t.kv_heads, limits.context, t.head_dim)
        self._cache = [(np.zeros(shape, dtype), np.zeros(shape, dtype)) for _ in range(t.layers)]
        self._stored = weights
        self._logical: dict[str, tuple[Weight, F32 | None]] = {}
        self._ops: Ops[Any] = ReferenceOps(self._weight, list(self._cache), limits.kv == "int8")

    def _weight(self, name: str) -> tuple[Weight, F32 | None]:
        if name not in self._logical:
            stored = self._stored(name)
            self._logical[name] = (unpack(stored), stored.bias)
        return self._logical[name]

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        """See `Runner.decode`."""
        if tokens.size > self.limits.chunk or logit_rows.size > self.limits.logit_rows:
            raise CapacityError(f"a step of {tokens.size} tokens is over the plan's chunk of {self.limits.chunk}")
        step: Step[Any] = Step(tokens=tokens, positions=positions, slots=slots, images=images, logit_rows=logit_rows)
        logits: F32 = decoder(self._ops, self.config.text, step)
        return logits

    def vision(self, pixels: NDArray[np.uint8]) -> F32:
        """See `Runner.vision`."""
        assert self.config.vision is not None and self.config.projector is not None
        tiles: Any = pixels
        rows: F32 = image_embeddings(self._ops, self.config.vision, self.config.projector, tiles)
        return rows

    @property
    def planned_bytes(self) -> int:
        """Only the KV cache is planned here."""
        return sum(k.nbytes + v.nbytes for k, v in self._cache)
