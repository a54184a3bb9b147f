"""Calibration text that the model writes by itself: free text, and conversations in which it asks and answers.

Every token is sampled from the model but for a document's first, which is random, and the chat template's own. All rows
are written side by side, with the keys and values of every layer in memory, and so is the whole model. Knows
checkpoints; called by `quantize.job` for the calibration set "self".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor
from torch.nn import functional

from edgevl.checkpoint import Checkpoint
from edgevl.config import TextConfig, TokenConfig
from edgevl.errors import UsageError
from edgevl.models.decoder import decoder_block
from edgevl.models.names import text_parts
from edgevl.ops import Step
from edgevl.prompt import Message, PromptBuilder
from quantize.part_tensors import CheckpointParts
from quantize.torch_ops import PartWeight, TorchOps, batch_step

_LIKELY = 50  # tokens that are sampled from; the tail of a small model is noise
_QUESTION, _ANSWER, _TEXT = 48, 192, 192  # tokens, at most


def memory_needed(checkpoint: Checkpoint, samples: int, length: int) -> int:
    """Bytes that writing takes: the model, and keys and values of all rows."""
    t = checkpoint.config.text
    shapes = {part.sources: part.shape for part in text_parts(checkpoint.config)}  # a tied head counts once
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    return (weights + 2 * t.layers * samples * length * t.kv_heads * t.head_dim) * _dtype(checkpoint).itemsize


def write_text(
    checkpoint: Checkpoint,
    prompts: PromptBuilder,
    samples: int,
    length: int,
    seed: int,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[list[int]]:
    """`samples` rows of `length` tokens; the same every time on one machine with the same number of threads.

    Raises `UsageError` when the model's logits are not finite.
    """
    dtype = _dtype(checkpoint)
    parts = CheckpointParts(checkpoint, device)
    held: dict[str, PartWeight] = {}
    for part in text_parts(checkpoint.config):
        if part.name == "head" and checkpoint.config.text.tied_embeddings:
            held["head"] = held["embed"]
            continue
        weight, bias = parts(part.name)
        held[part.name] = (weight.to(dtype), None if bias is None else bias.to(dtype))
    config, tokens = checkpoint.config.text, checkpoint.config.tokens
    ops = _CachedOps(held.__getitem__, config, samples, length, dtype, device)
    table = held["embed"][0]
    generator = torch.Generator().manual_seed(seed)
    writers = [_Writer(prompts, tokens, RandomState([seed, row]), row % 2 == 0) for row in range(samples)]
    rows: list[list[int]] = [[] for _ in range(samples)]
    logits: Tensor | None = None
    for position in range(length):
        sampled = [0] * samples if logits is None else _sample(logits, generator)
        now = [writer.next(token) for writer, token in zip(writers, sampled, strict=True)]
        for row, token in zip(rows, now, strict=True):
            row.append(token)
        step = batch_step(torch.tensor(now, device=device)[:, None])
        step = Step(step.tokens, step.positions + position, step.slots, step.images, step.logit_rows)
        ops.position = position
        x = table[step.tokens].to(dtype)
        for layer in range(config.layers):
            x = decoder_block(ops, config, x, step, layer)
        x = ops.rms_norm(x, ops.norm_weight("norm"), config.rms_norm_eps)
        logits = ops.linear(x, ops.linear_weight("head"))[:, : tokens.size].float()
        if not torch.isfinite(logits).all():
            raise UsageError(
                f"{checkpoint.path} gives infinite or undefined logits when it writes; check it, or use the set text"
            )
        progress(position + 1, length)
    return rows


class _Writer:
    """What one row writes next: forced tokens first, then what was sampled, until a turn or a text is over."""

    def __init__(self, prompts: PromptBuilder, tokens: TokenConfig, random: RandomState, talks: bool) -> None:
        first, second = (list(prompts.build((Message("user", (t,)),), []).token_ids) for t in ("A", "Why"))
        begin = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        end = next(i for i, (a, b) in enumerate(zip(first[::-1], second[::-1], strict=False)) if a != b)
        self._asks, self._answers = first[:begin], first[len(first) - end :]
        self._tokens, self._random, self._talks = tokens, random, talks
        self._forced: list[int] = []
        self._left, self._turn = 0, "over"

    def next(self, sampled: int) -> int:
        """The row's next token, given what the model would say."""
        if not self._forced and (self._left == 0 or sampled in self._tokens.stop):
            self._advance()
        if self._forced:
            return self._forced.pop(0)
        self._left -= 1
        return sampled

    def _advance(self) -> None:
        if self._turn == "asks":
            self._turn, self._left, self._forced = "answers", _ANSWER, list(self._answers)
            return
        ending = [self._tokens.stop[-1]] if self._turn in ("answers", "text") else []
        if self._talks:
            self._turn, self._left, self._forced = "asks", _QUESTION, ending + self._asks
        else:
            ordinary = int(self._random.randint(min(self._tokens.size, 256), self._tokens.size))
            while ordinary in self._tokens.stop:
                ordinary = int(self._random.randint(self._tokens.size))
            self._turn, self._left, self._forced = "text", _TEXT, [*ending, ordinary]
        self._talks = not self._talks


class _CachedOps(TorchOps):
    """One token a row and step; keys and values (B, G, S, D) of every layer are kept."""

    def __init__(
        self,
        weights: Callable[[str], PartWeight],
        config: TextConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__(weights, 1)
        shape = (config.layers, 2, batch, config.kv_heads, length, config.head_dim)
        self._kept = torch.empty(shape, dtype=dtype, device=device)
        self.position = 0

    def rope_write(self, qkv: Tensor, step: Step[Tensor], layer: int, config: TextConfig) -> Tensor:
        query = super().rope_write(qkv, step, layer, config)
        for which, now in enumerate(self._cache[layer]):
            self._kept[layer, which, :, :, self.position] = now[:, :, 0]
        return query

    def attention(self, q: Tensor, step: Step[Tensor], layer: int, config: TextConfig) -> Tensor:
        keys, values = self._kept[layer, :, :, :, : self.position + 1]
        query = q.reshape(q.shape[0], config.kv_heads, -1, config.head_dim)  # the heads of a KV head ask together
        return functional.scaled_dot_product_attention(query, keys, values).reshape(q.shape)


def _sample(logits: Tensor, generator: torch.Generator) -> list[int]:
    best, which = logits.cpu().topk(min(_LIKELY, logits.shape[1]), dim=1)
    chosen = torch.multinomial(best.softmax(dim=1), 1, generator=generator)
    return [int(token) for token in which.gather(1, chosen)[:, 0]]


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    narrow = checkpoint.spec("model.embed_tokens.weight").dtype in ("BF16", "F16")
    return torch.bfloat16 if narrow else torch.float32
