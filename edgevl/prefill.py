"""Prefill: many tokens of one sequence into the KV cache, in steps that the plan allows.

Called by the engine for every prompt and by the golden check. Knows nothing of text or pictures.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from edgevl.runner import F32, I32, Runner


def feed(runner: Runner, ids: list[int], start: int, images: F32 | None, last: int, slot: int = 0) -> F32:
    """Prefill `ids` into `slot` from position `start`, in chunks; logits of the last `last` tokens, (last, V).

    Ids below zero pick rows of `images`. The tokens whose logits are wanted go in a step of their own, so
    that they get the same bits when the next prompt reuses what is before them. The steps before compute no logits.
    """
    head = len(ids) - last
    bounds = [*range(0, head, runner.limits.chunk), head, len(ids)]
    logits = np.empty((0, 0), np.float32)
    for begin, end in pairwise(bounds):
        tokens = np.asarray(ids[begin:end], np.int32)
        picked = -1 - tokens[tokens < 0]
        rows = images[picked] if images is not None and picked.size else None
        tokens[tokens < 0] = -1 - np.arange(picked.size, dtype=np.int32)
        positions = np.arange(start + begin, start + end, dtype=np.int32)
        wanted: I32 = np.arange(end - begin - (last if end == len(ids) else 0), end - begin, dtype=np.int32)
        logits = runner.decode(tokens, positions, np.full(end - begin, slot, np.int32), rows, wanted)
    return logits
