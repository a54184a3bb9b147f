"""What a built bundle is worth: its own logits against the original's on text, its answers on rendered pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from calibration import Sample
from calibration.rendered import measured_pictures, score
from edgevl.backends.cpu import CpuRunner
from edgevl.bundle import Bundle
from edgevl.checkpoint import Checkpoint
from edgevl.commands.measure import ask
from edgevl.engine import Engine
from edgevl.runner import Limits
from quantize.measure import last_hidden, text_tokens
from quantize.part_tensors import CheckpointParts
from quantize.torch_ops import TorchOps

Progress = Callable[[str, int, int], None]  # stage, done, total

_STEP = 64  # tokens in a step of the runtime, and rows of logits


def on_text(original: Checkpoint, bundle: Bundle, text: str, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Mean KL(original ‖ bundle), perplexity and top-1 agreement of the bundle's own logits."""
    with torch.inference_mode():
        return _on_text(original, bundle, text, progress)


def _on_text(original: Checkpoint, bundle: Bundle, text: str, progress: Progress) -> dict[str, Any]:
    ids = text_tokens(original, text)
    wanted = last_hidden(original, [Sample(tuple(row)) for row in ids], "cpu", lambda d, n: progress("original", d, n))
    config, real = bundle.manifest.model, original.config.tokens.size
    limits = Limits(context=len(ids[0]), slots=1, chunk=_STEP, logit_rows=_STEP, tiles=1, kv="f16")
    runner = CpuRunner(config, limits, bundle.weight)
    parts = CheckpointParts(original)
    parts.keep(("norm", "head"))
    ops, totals = TorchOps(parts, 1), np.zeros(4)
    for row, states in zip(ids, wanted, strict=True):
        for begin in range(0, len(row), _STEP):
            tokens = np.array(row[begin : begin + _STEP], np.int32)
            places = np.arange(begin, begin + len(tokens), dtype=np.int32)
            rows = np.arange(len(tokens), dtype=np.int32)
            logits = runner.decode(tokens, places, np.zeros_like(tokens), None, rows)
            own = functional.log_softmax(torch.from_numpy(logits[:, :real].copy()).double(), dim=1)
            x = ops.rms_norm(
                states[begin : begin + len(tokens)], ops.norm_weight("norm"), original.config.text.rms_norm_eps
            )
            goal = functional.log_softmax(ops.linear(x, ops.linear_weight("head"))[:, :real].double(), dim=1)
            known = len(row) - 1 - begin  # the last token's next is not known
            own, goal = own[:known], goal[:known]
            following = torch.tensor(row[begin + 1 : begin + 1 + len(own)])
            totals += (
                float((goal.exp() * (goal - own)).sum()),
                -float(own.gather(1, following[:, None]).sum()),
                float((own.argmax(dim=1) == goal.argmax(dim=1)).sum()),
                len(own),
            )
    kl, loss, same = (float(value) for value in totals[:3] / totals[3])
    return {"perplexity": {"quantized": float(np.exp(loss))}, "kl": kl, "top1": same, "tokens": int(totals[3])}


def on_pictures(folder: Path, count: int, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Score, interval and number of questions by task, of the bundle in `folder` on the held-out test set."""
    pictures = measured_pictures(count)
    given = ask(Engine.open(folder), pictures, lambda done: progress("pictures", done, len(pictures)))
    return {
        s.task: {"metric": s.metric, "value": s.value, "low": s.low, "high": s.high, "count": s.count}
        for s in score((q.task, q.answer, text) for q, text in given)
    }
