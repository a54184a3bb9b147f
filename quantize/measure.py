"""How far a quantized checkpoint is from the original, on text that neither was calibrated on.

Both models run over the same tokens block by block, so only one block of each is in memory; the logits are compared a
few hundred tokens at a time. Called by `edgevl measure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calibration import Sample
from edgevl.checkpoint import Checkpoint
from edgevl.errors import UsageError
from edgevl.models.decoder import decoder_block
from edgevl.tokenizer import Tokenizer
from quantize.embed import embed_samples
from quantize.part_tensors import CheckpointParts
from quantize.torch_ops import TorchOps, batch_step

Progress = Callable[[str, int, int], None]  # stage, done, total

_LENGTH = 512  # tokens of a sequence, the first of which is not predicted
_AT_ONCE = 4  # sequences in a block together
_LOGITS = 256  # rows of logits held at once


@dataclass(frozen=True)
class Comparison:
    """Over all predicted tokens. `kl` is KL(original ‖ quantized) in nats, `top1` how often both prefer one token."""

    perplexity_original: float
    perplexity_quantized: float
    kl: float
    top1: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """The fields that scripts may rely on."""
        return {
            "perplexity": {"original": self.perplexity_original, "quantized": self.perplexity_quantized},
            "kl": self.kl,
            "top1": self.top1,
            "tokens": self.tokens,
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
        return _compare_logits(original, quantized, states, torch.tensor(ids), device, progress)


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
    checkpoint: Checkpoint, samples: list[Sample], device: str, progress: Callable[[int, int], None]
) -> Tensor:
    """(B, S, C) before the final norm, for B samples of S tokens; one block is in memory at a time."""
    config = checkpoint.config.text
    hidden = embed_samples(checkpoint, samples, device)
    parts = CheckpointParts(checkpoint, device)
    for layer in range(config.layers):
        progress(layer, config.layers)
        parts.keep(f"layers.{layer}.")
        ops = TorchOps(parts, hidden.shape[1])
        for begin in range(0, hidden.shape[0], _AT_ONCE):
            x = hidden[begin : begin + _AT_ONCE]
            step = batch_step(torch.zeros(x.shape[:2], dtype=torch.int64, device=device))
            y = decoder_block(ops, config, x.reshape(-1, x.shape[2]).to(device), step, layer)
            x.copy_(y.reshape(x.shape))
    progress(config.layers, config.layers)
    return hidden


def _compare_logits(
    original: Checkpoint,
    quantized: Checkpoint,
    states: list[Tensor],
    ids: Tensor,
    device: str,
    progress: Progress,
) -> Comparison:
    config, real = original.config.text, original.config.tokens.size
    weights = [CheckpointParts(checkpoint, device) for checkpoint in (original, quantized)]
    for parts in weights:
        parts.keep(("norm", "head"))
    targets = ids[:, 1:].reshape(-1)
    rows = [state[:, :-1].reshape(-1, config.hidden_size) for state in states]
    totals = torch.zeros(4, dtype=torch.float64)  # nll original, nll quantized, kl, agreements
    for begin in range(0, len(targets), _LOGITS):
        progress("logits", begin, len(targets))
        logs = []
        for parts, row in zip(weights, rows, strict=True):
            ops = TorchOps(parts, 1)
            x = ops.rms_norm(row[begin : begin + _LOGITS].to(device), ops.norm_weight("norm"), config.rms_norm_eps)
            # padding rows of the head are never sampled
            logs.append(functional.log_softmax(ops.linear(x, ops.linear_weight("head"))[:, :real].double(), dim=1))
        wanted = targets[begin : begin + _LOGITS, None].to(device)
        totals[0] -= logs[0].gather(1, wanted).sum().cpu()
        totals[1] -= logs[1].gather(1, wanted).sum().cpu()
        totals[2] += (logs[0].exp() * (logs[0] - logs[1])).sum().cpu()
        totals[3] += (logs[0].argmax(dim=1) == logs[1].argmax(dim=1)).sum().cpu()
    progress("logits", len(targets), len(targets))
    first, second, kl, same = (totals / len(targets)).tolist()
    return Comparison(math.exp(first), math.exp(second), kl, same, len(targets))
