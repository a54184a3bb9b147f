"""Reconstruction of a block: rounding and scales learn together to give what the float model has at that point.

AWQ and rounding with feedback judge one linear at a time. Here the quantized block runs on the quantized path's hidden
states, and what leaves it is held against what leaves the float block on the float path, so a block also makes up for
what the blocks before it lost. Every weight keeps its place between two codes and is moved by the sign of its gradient,
every scale likewise (the idea of Cheng et al. 2023, arXiv 2309.05516); the start is the result of the steps before, so
few steps do. Errors count relative to the token's own hidden state: a few tokens have states a thousand times larger
than all others, and the next norm divides by them. Called by `quantize.job`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgevl.config import TextConfig
from edgevl.models.decoder import decoder_block
from edgevl.weights import Int4Weight
from quantize.awq import BlockResult
from quantize.groups import BlockTable
from quantize.part_tensors import JoinedTensors
from quantize.rounding import TINY, GroupGrid, decode, grouped, stored_weight
from quantize.torch_ops import TorchOps, batch_step

_TOKENS = 2048  # of a step, in whole sequences
_REACH = 0.5  # of a step of the grid: how far all updates together can move a weight
_STRETCH = 0.01  # how far they can move a scale, as a share of itself
_JUDGED = 8  # sequences on which the block is compared before and after
_EDGE = 0.499  # a weight begins within the reach of the code that it has


@dataclass(frozen=True)
class Reconstruction:
    """Mean relative squared error of what leaves the block; `kept`: it became smaller, so the block was changed."""

    error_before: float
    error_after: float
    steps: int
    kept: bool


@dataclass
class _Learned:
    """One linear while it learns."""

    place: Tensor  # (N, K/Q, Q): rounded, it is the code
    scales: Tensor  # (N, K/Q), as they were
    zeros: Tensor  # (N, K/Q)
    stretch: Tensor  # (N, K/Q): log of what the scales are multiplied by

    def grid(self) -> GroupGrid:
        """With scales as they will be stored."""
        scales = (self.scales * self.stretch.exp()).half().float().clamp(min=float(np.float16(TINY)))
        return GroupGrid(scales, self.zeros)

    def codes(self) -> Tensor:
        return self.place.round().clamp(0, 15)

    def weight(self) -> Tensor:
        return decode(self.codes(), self.grid()).flatten(1)

    def move(self, slope: Tensor, far: float) -> None:
        """One update from the gradient (N, K) of `weight`; `far` is the share of the whole way."""
        slopes = slope.float().reshape(self.place.shape)
        apart = self.codes() - self.zeros[:, :, None]
        self.stretch -= _STRETCH * far * ((slopes * apart).sum(dim=2)).sign()  # scales are positive
        inside = (self.place > -0.5) & (self.place < 15.5)
        self.place -= _REACH * far * slopes.sign() * inside


def reconstruct(
    config: TextConfig,
    table: BlockTable,
    result: BlockResult,
    floats: dict[str, Tensor],
    hidden: Tensor,
    wanted: Tensor,
    steps: int,
    seed: int,
    device: str = "cpu",
) -> Reconstruction:
    """Let the block in `result` learn from hidden states (B, S, C) before it and the float path's after it.

    `floats`: each linear's weight (N, K) before it was rounded, scales folded in; used up. `result` is changed only
    when its error became smaller.
    """
    learned = {name: _begin(result.linears[name], floats.pop(name)) for name in result.linears}
    before = _error(config, table, result.values, hidden, wanted, device)
    weights = {f"{name}.weight" for name in learned}
    # copies: what was made in inference mode cannot be differentiated through
    values = {name: tensor.clone() for name, tensor in result.values.items() if name not in weights}
    size = max(1, min(len(hidden), _TOKENS // hidden.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(len(hidden), generator=generator).tolist()
        rows = sorted(order.pop() for _ in range(size))
        for name, linear in learned.items():
            values[f"{name}.weight"] = linear.weight().bfloat16().requires_grad_()
        with torch.enable_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            _distance(config, table, values, hidden[rows], wanted[rows], device).backward()  # type: ignore[no-untyped-call]
        far = 2 * (1 - (step + 0.5) / steps) / steps  # all of them make 1
        for name, linear in learned.items():
            slope = values.pop(f"{name}.weight").grad
            assert slope is not None, name
            linear.move(slope, far)
    for name, linear in learned.items():
        values[f"{name}.weight"] = linear.weight()
    after = _error(config, table, values, hidden, wanted, device)
    if after < before:
        result.values.update(values)
        for name, linear in learned.items():
            result.linears[name] = stored_weight(linear.codes().flatten(1), linear.grid())
    return Reconstruction(before, after, steps, after < before)


def _begin(stored: Int4Weight, weight: Tensor) -> _Learned:
    """Where each weight really lies, as near to its code as rounding asks."""
    codes, scales, zeros = (
        torch.from_numpy(array.astype(np.float32)).to(weight.device)
        for array in (stored.codes, stored.scales, stored.zeros)
    )
    codes = grouped(codes, stored.group_size)
    place = grouped(weight, stored.group_size) / scales[:, :, None] + zeros[:, :, None]
    place = codes + (place - codes).clamp(-_EDGE, _EDGE)
    return _Learned(place, scales, zeros, torch.zeros_like(scales))


def _error(
    config: TextConfig, table: BlockTable, values: dict[str, Tensor], hidden: Tensor, wanted: Tensor, device: str
) -> float:
    """The mean over the first sequences, in f32, a few at a time."""
    count, size = min(_JUDGED, len(hidden)), max(1, _TOKENS // hidden.shape[1])
    total = 0.0
    with torch.no_grad():
        for begin in range(0, count, size):
            rows = slice(begin, min(begin + size, count))
            found = _distance(config, table, values, hidden[rows], wanted[rows], device)
            total += float(found) * (rows.stop - rows.start)
    return total / count


def _distance(
    config: TextConfig, table: BlockTable, values: dict[str, Tensor], hidden: Tensor, wanted: Tensor, device: str
) -> Tensor:
    """Mean over tokens of the squared error of the block's output, relative to the squared wanted output."""
    ops = TorchOps(JoinedTensors(table.parts, values), hidden.shape[1])
    step = batch_step(torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device))
    found = decoder_block(ops, config, hidden.clone().flatten(0, 1).to(device), step, table.layer)
    goal = wanted.clone().flatten(0, 1).to(device)
    return ((found - goal).square().mean(dim=1) / goal.square().mean(dim=1).clamp(min=1e-30)).mean()
