"""How far a quantized checkpoint is from the original, on text that neither was calibrated on.

Both models run over the same tokens block by block, so only one block of each is in memory; the logits are compared a
few hundred tokens at a time. Called by `edgevl measure`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calibration import Sample, overlap
from edgevl.checkpoint import Checkpoint
from edgevl.errors import CheckpointError, UsageError
from edgevl.models.decoder import decoder_block
from edgevl.tokenizer import Tokenizer
from quantize.embed import embed_samples
from quantize.part_tensors import CheckpointParts
from quantize.torch_ops import TorchOps, batch_step

Progress = Callable[[str, int, int], None]  # stage, done, total

_LENGTH = 512  # tokens of a sequence, the first of which is not predicted
_AT_ONCE = 4  # sequences in a block together
LOGITS = 64  # rows of logits held at once
HELD_OUT = 8  # sequences of the held-out text that a run carries along, at most
_RUN = 64  # tokens whose mean counts as one observation


@dataclass(frozen=True)
class Comparison:
    """Over all predicted tokens. `kl` is KL(original ‖ quantized) in nats, `top1` how often both prefer one token.

    Standard errors are those of the means of runs of 64 tokens, since neighbours are alike; None of fewer than two.
    That of the perplexity is of the ratio quantized / original, which both models' tokens decide together.
    """

    perplexity_original: float
    perplexity_quantized: float
    kl: float
    top1: float
    tokens: int
    ratio_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that scripts may rely on."""
        return {
            "perplexity": {"original": self.perplexity_original, "quantized": self.perplexity_quantized},
            "kl": self.kl,
            "top1": self.top1,
            "tokens": self.tokens,
            "standard_errors": {"perplexity_ratio": self.ratio_error, "kl": self.kl_error, "top1": self.top1_error},
            "images": {},
        }


def compare(
    original: Checkpoint,
    quantized: Checkpoint,
    text: str,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Perplexity of both, KL and top-1 agreement on `text`, cut into sequences of 512 tokens.

    Raises `UsageError` when the two are not versions of one model, or the text is shorter than 32 tokens.
    """
    if original.config.text != quantized.config.text or original.config.tokens != quantized.config.tokens:
        raise UsageError(f"{quantized.path} is not a version of {original.path}: their configurations differ")
    ids = text_tokens(original, text)
    with torch.inference_mode():
        states = []
        for which, checkpoint in (("original", original), ("quantized", quantized)):
            samples = [Sample(tuple(row)) for row in ids]
            states.append(last_hidden(checkpoint, samples, device, lambda d, n, w=which: progress(w, d, n)))  # type: ignore[misc]
        return compare_states(original, quantized, states, torch.tensor(ids), device, progress)


def calibrated_on(quantized: Checkpoint, text: str) -> float:
    """The share of a text's tokens that the checkpoint was calibrated on, as far as its report tells."""
    try:
        report = json.loads((quantized.path / "report.json").read_text(encoding="utf-8"))
        known = set(report["calibration"]["fingerprints"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
    return overlap(Tokenizer(quantized.tokenizer_json()).encode(text, specials=False), known)


def text_tokens(checkpoint: Checkpoint, text: str) -> list[list[int]]:
    """The text as full sequences of one length, each begun by the token that the model's prompts begin with, if any."""
    ids = Tokenizer(checkpoint.tokenizer_json()).encode(text, specials=False)
    begin = checkpoint.config_json.get("llm_config", checkpoint.config_json).get("bos_token_id")
    head = [begin] if isinstance(begin, int) and "bos_token" in checkpoint.chat_template() else []
    length = min(_LENGTH, checkpoint.config.text.max_positions, len(ids) + len(head)) - len(head)
    if length < 32:
        raise UsageError(f"the text has {len(ids)} tokens; at least 32 are needed to say anything about a model")
    return [head + ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def last_hidden(
    checkpoint: Checkpoint,
    samples: list[Sample],
    device: str,
    progress: Callable[[int, int], None],
    coarse: bool = False,
) -> Tensor:
    """(B, S, C) before the final norm, for B samples of S tokens; one block is in memory. `coarse`: see `TorchOps`."""
    config = checkpoint.config.text
    hidden = embed_samples(checkpoint, samples, device)
    parts = CheckpointParts(checkpoint, device)
    for layer in range(config.layers):
        progress(layer, config.layers)
        parts.keep(f"layers.{layer}.")
        ops = TorchOps(parts, hidden.shape[1], coarse=coarse)
        for begin in range(0, hidden.shape[0], _AT_ONCE):
            x = hidden[begin : begin + _AT_ONCE]
            step = batch_step(torch.zeros(x.shape[:2], dtype=torch.int64, device=device))
            y = decoder_block(ops, config, x.reshape(-1, x.shape[2]).to(device), step, layer)
            x.copy_(y.reshape(x.shape))
    progress(config.layers, config.layers)
    return hidden


def compare_states(
    original: Checkpoint,
    quantized: Checkpoint,
    states: Sequence[Tensor],
    ids: Tensor,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> Comparison:
    """The comparison from both models' hidden states (B, S, C) before the final norm, on tokens `ids` (B, S)."""
    config, real = original.config.text, original.config.tokens.size
    kept = {id(checkpoint): CheckpointParts(checkpoint, device) for checkpoint in (original, quantized)}
    for parts in kept.values():
        parts.keep(("norm", "head"))
    weights = [kept[id(original)], kept[id(quantized)]]
    targets = ids[:, 1:].reshape(-1)
    rows = [state[:, :-1].reshape(-1, config.hidden_size) for state in states]
    found = torch.empty(4, len(targets), dtype=torch.float64)  # nll original, nll quantized, kl, agreements
    for begin in range(0, len(targets), LOGITS):
        progress("logits", begin, len(targets))
        logs = []
        for parts, row in zip(weights, rows, strict=True):
            ops = TorchOps(parts, 1)
            x = ops.rms_norm(row[begin : begin + LOGITS].to(device), ops.norm_weight("norm"), config.rms_norm_eps)
            # padding rows of the head are never sampled
            logs.append(functional.log_softmax(ops.linear(x, ops.linear_weight("head"))[:, :real].double(), dim=1))
        wanted = targets[begin : begin + LOGITS, None].to(device)
        now = found[:, begin : begin + LOGITS]
        now[0] = -logs[0].gather(1, wanted)[:, 0].cpu()
        now[1] = -logs[1].gather(1, wanted)[:, 0].cpu()
        now[2] = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=1).cpu()
        now[3] = (logs[0].argmax(dim=1) == logs[1].argmax(dim=1)).cpu()
    progress("logits", len(targets), len(targets))
    for checkpoint, lost in ((original, found[0]), (quantized, found[:3].sum(dim=0))):
        if not torch.isfinite(lost).all():
            raise CheckpointError(f"{checkpoint.path} gives infinite or undefined logits on this text; fetch it again")
    first, second, kl, same = found.mean(dim=1).tolist()
    ratio = math.exp(second - first)
    step = _standard_error(found[1] - found[0])
    return Comparison(
        math.exp(first),
        math.exp(second),
        kl,
        same,
        len(targets),
        None if step is None else ratio * step,
        _standard_error(found[2]),
        _standard_error(found[3]),
    )


def _standard_error(values: Tensor) -> float | None:
    runs = values[: len(values) // _RUN * _RUN].reshape(-1, _RUN).mean(dim=1)
    return float(runs.std() / math.sqrt(len(runs))) if len(runs) > 1 else None
