"""Reconstruction of a block: rounding and scales learn together to give what the float model has at that point.

AWQ judges one linear at a time. Here the quantized block runs on the quantized path's hidden
states, and what leaves it is held against what leaves the float block on the float path, so a block also makes up for
what the blocks before it lost. Every weight has its place between two codes and moves against its gradient, every scale
likewise, by steps that shrink to nothing (the idea of Cheng et al. 2023, arXiv 2309.05516, who go by signs alone); the
start is the result of the steps before, so few steps do. Errors count relative to the token's own hidden state: a few
tokens have states a thousand times larger than all others, and the next norm divides by them. Tokens may count
differently: those of images count less than words, which answers are made of. Called by `quantize.job`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgevl.config import TextConfig
from edgevl.models.decoder import decoder_block
from edgevl.weights import dequantize
from quantize.awq import BlockResult
from quantize.groups import BlockTable
from quantize.learned import LearnedLinear
from quantize.part_tensors import JoinedTensors
from quantize.torch_ops import TorchOps, batch_step

STEP_TOKENS = 2048  # of a step, in whole sequences
_REACH = 0.25  # of a step of the grid: how far all updates together can move a weight
_STRETCH = 0.05  # how far they can move a scale, as a share of itself
_JUDGED = 8  # sequences on which the block is compared before and after


@dataclass(frozen=True)
class Reconstruction:
    """Weighted relative squared error of what leaves the block; `kept`: it became smaller, so the block was changed."""

    error_before: float
    error_after: float
    steps: int
    kept: bool


def reconstruct(
    config: TextConfig,
    table: BlockTable,
    result: BlockResult,
    floats: dict[str, Tensor],
    hidden: Tensor,
    wanted: Tensor,
    steps: int,
    seed: int,
    device: str,
    coarse: bool,
    importance: Tensor,
) -> Reconstruction:
    """Let the block in `result` learn from hidden states (B, S, C) before it and the float path's after it.

    `importance` (B, S): how much each token counts. `floats`: each linear's weight (N, K) before it was rounded, scales
    folded in; used up. `result` is changed only when its error became smaller.
    """
    distance = _Distance(config, table, device, coarse)
    before = distance.of_first(result.values, hidden, wanted, importance)
    learned = {name: LearnedLinear.begin(result.linears[name], floats.pop(name)) for name in result.linears}
    for name in learned:
        del result.values[f"{name}.weight"]
    # copies: what was made in inference mode cannot be differentiated through
    values = {name: tensor.clone() for name, tensor in result.values.items()}
    size = max(1, min(len(hidden), STEP_TOKENS // hidden.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(len(hidden), generator=generator).tolist()
        rows = sorted(order.pop() for _ in range(size))
        for name, linear in learned.items():
            weight = linear.weight()
            values[f"{name}.weight"] = (weight.bfloat16() if coarse else weight).requires_grad_()
        with torch.enable_grad():
            distance(values, hidden[rows], wanted[rows], importance[rows]).backward()  # type: ignore[no-untyped-call]
        far = 2 * (1 - (step + 0.5) / steps) / steps  # all of them make 1
        for name, linear in learned.items():
            slope = values.pop(f"{name}.weight").grad
            assert slope is not None, name
            linear.learn(slope, _REACH * far, _STRETCH * far)
    for name, linear in learned.items():
        values[f"{name}.weight"] = linear.weight()
    after = distance.of_first(values, hidden, wanted, importance)
    for name, linear in learned.items():
        if after < before:
            result.linears[name] = linear.stored()
        else:
            values[f"{name}.weight"] = torch.from_numpy(dequantize(result.linears[name])).to(device)
    result.values.update(values)
    return Reconstruction(before, after, steps, after < before)


@dataclass(frozen=True)
class _Distance:
    """How far the block's output is from what is wanted."""

    config: TextConfig
    table: BlockTable
    device: str
    coarse: bool

    def __call__(self, values: dict[str, Tensor], hidden: Tensor, wanted: Tensor, importance: Tensor) -> Tensor:
        """Weighted mean over tokens of the squared error, relative to the squared wanted output."""
        ops = TorchOps(JoinedTensors(self.table.parts, values), hidden.shape[1], coarse=self.coarse)
        step = batch_step(torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device))
        found = decoder_block(ops, self.config, hidden.clone().flatten(0, 1).to(self.device), step, self.table.layer)
        goal = wanted.clone().flatten(0, 1).to(self.device)
        errors = (found - goal).square().mean(dim=1) / goal.square().mean(dim=1).clamp(min=1e-30)
        counts = importance.flatten().to(self.device)
        return (errors * counts).sum() / counts.sum()

    def of_first(self, values: dict[str, Tensor], hidden: Tensor, wanted: Tensor, importance: Tensor) -> float:
        """The mean over the first sequences, a few at a time."""
        count, size = min(_JUDGED, len(hidden)), max(1, STEP_TOKENS // hidden.shape[1])
        total = 0.0
        with torch.no_grad():
            for begin in range(0, count, size):
                rows = slice(begin, min(begin + size, count))
                error = self(values, hidden[rows], wanted[rows], importance[rows])
                total += float(error) * (rows.stop - rows.start)
        return total / count
