"""What the search needs to know of a block's activations, gathered in one pass over all calibration tokens.

For the input of each linear: the mean absolute value of each channel, the second moments inside each group, and the
inputs themselves for a sample of tokens. Memory does not grow with the number of calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgevl.config import TextConfig
from edgevl.models.decoder import decoder_block
from quantize.torch_ops import PartWeight, TorchOps, batch_step

SAMPLE_TOKENS = 1024  # tokens on which a block's best candidates are compared
TRIAL_TOKENS = 256  # tokens on which all candidates are tried first


@dataclass
class Observations:
    """By part name ("layers.3.qkv"), of the part's input with K features."""

    mean_abs: dict[str, Tensor] = field(default_factory=dict)  # (K,)
    moments: dict[str, Tensor] = field(default_factory=dict)  # (K/Q, Q, Q): mean of x·xᵀ inside each group
    sample: dict[str, Tensor] = field(default_factory=dict)  # (B, S, K); whole sequences where attention is measured
    trial: dict[str, Tensor] = field(default_factory=dict)  # a smaller one


class _Collector:
    """The observer that `TorchOps` calls; sums in f64 across chunks."""

    def __init__(self, layer: int, group_size: int, length: int, rows: Tensor) -> None:
        """`rows`: sorted indices of the sampled tokens among all of them."""
        self.seen = Observations()
        self._group, self._length, self._rows = group_size, length, rows
        self._sequences = -(-min(SAMPLE_TOKENS, rows.numel()) // length)  # whole ones, for attention
        self._attention_input = f"layers.{layer}.qkv"
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._offset: dict[str, int] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        groups = x.reshape(x.shape[0], -1, self._group).transpose(0, 1)  # (K/Q, rows, Q)
        moments = groups.transpose(1, 2) @ groups
        begin = self._offset.get(name, 0)
        self._offset[name] = end = begin + x.shape[0]
        sums = x.abs().sum(dim=0).double()
        if begin == 0:
            self._sums[name], self._squares[name], self._kept[name] = sums, moments.double(), []
        else:
            self._sums[name] += sums
            self._squares[name] += moments
        if name == self._attention_input:
            wanted = x[: max(self._sequences * self._length - begin, 0)]
        else:
            wanted = x[self._rows[(self._rows >= begin) & (self._rows < end)].to(x.device) - begin]
        if wanted.shape[0]:
            self._kept[name].append(wanted.clone())

    def finish(self) -> Observations:
        for name, total in self._offset.items():
            self.seen.mean_abs[name] = (self._sums[name] / total).float()
            self.seen.moments[name] = (self._squares[name] / total).float()
            kept = torch.cat(self._kept[name])
            if name == self._attention_input:
                x = kept.reshape(-1, self._length, kept.shape[1])
                self.seen.sample[name] = x
                self.seen.trial[name] = x[:, : max(TRIAL_TOKENS // x.shape[0], 16)]
            else:
                self.seen.sample[name] = kept[None]
                self.seen.trial[name] = kept[None, :: max(kept.shape[0] // TRIAL_TOKENS, 1)]
        return self.seen


def run_block(
    config: TextConfig,
    layer: int,
    weights: Callable[[str], PartWeight],
    hidden: Tensor,
    chunk: int,
    into: Tensor,
    device: str,
    collector: _Collector | None = None,
    coarse: bool = False,
) -> None:
    """Run hidden states (B, S, C) through one block, `chunk` sequences at a time.

    `into` takes the output of as many sequences as it has room for; it may be `hidden` itself.
    """
    ops = TorchOps(weights, hidden.shape[1], collector, coarse)
    for begin in range(0, hidden.shape[0], chunk):
        x = hidden[begin : begin + chunk]
        step = batch_step(torch.zeros(x.shape[:2], dtype=torch.int64, device=device))
        y = decoder_block(ops, config, x.reshape(-1, x.shape[2]).to(device), step, layer)
        room = into[begin : begin + chunk]
        room.copy_(y.reshape(x.shape)[: room.shape[0]])


def observe_block(
    config: TextConfig,
    layer: int,
    weights: Callable[[str], PartWeight],
    hidden: Tensor,
    group_size: int,
    chunk: int,
    seed: int,
    into: Tensor,
    device: str = "cpu",
    coarse: bool = False,
) -> Observations:
    """Run all hidden states (B, S, C) through the unquantized block and gather what the search needs.

    `into` takes the block's output for the first sequences.
    """
    total = hidden.shape[0] * hidden.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(total, generator=generator)[:SAMPLE_TOKENS].sort().values
    collector = _Collector(layer, group_size, hidden.shape[1], rows)
    run_block(config, layer, weights, hidden, chunk, into, device, collector, coarse)
    return collector.finish()
