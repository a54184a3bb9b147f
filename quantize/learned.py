"""A linear whose codes and scales learn: where every weight lies between the codes, and how far scales were stretched.

Rounding is stepped over by gradients as if it were not there (straight through). What moves is told by `Pace`, which is
Adam's rule (Kingma & Ba 2014, arXiv 1412.6980). Called by `quantize.reconstruct`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgevl.weights import Int4Weight
from quantize.rounding import TINY, GroupGrid, decode, grouped, stored_weight

_EDGE = 0.499  # a weight begins within the reach of the code that it has
_MEAN, _SQUARE = 0.6, 0.9  # what a step leaves of the running means; few steps are made, so both are short
_LEAST = 1e-18  # of a slope: below it, steps shrink with it


class Pace:
    """How far to go and where, from one slope after the other: about 1 where their signs agree, less where they do not.

    The running means of slopes and of their squares are held in bf16: there is one of each for every weight of a block.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._mean = self._square = torch.zeros(())

    def __call__(self, slope: Tensor) -> Tensor:
        """The next step, to be taken away, of the slope's shape."""
        if not self._steps:
            self._mean, self._square = (torch.zeros_like(slope, dtype=torch.bfloat16) for _ in range(2))
        self._steps += 1
        mean = self._mean.float().lerp_(slope, 1 - _MEAN)
        square = self._square.float().lerp_(slope.square(), 1 - _SQUARE)
        self._mean.copy_(mean)
        self._square.copy_(square)
        correction = (1 - _SQUARE**self._steps) ** 0.5 / (1 - _MEAN**self._steps)
        return mean.mul_(correction).div_(square.sqrt_().clamp_(min=_LEAST))


@dataclass
class LearnedLinear:
    """One linear (N, K) in groups of Q while it learns; its zeros stay."""

    start: Tensor  # (N, K/Q, Q) uint8: the codes that it begins with
    offset: Tensor  # (N, K/Q, Q) f16: how far from there a weight lies
    scales: Tensor  # (N, K/Q), as they were
    zeros: Tensor  # (N, K/Q)
    stretch: Tensor  # (N, K/Q): log of what the scales are multiplied by
    paces: tuple[Pace, Pace] = field(default_factory=lambda: (Pace(), Pace()))  # of place and of stretch

    @staticmethod
    def begin(stored: Int4Weight, weight: Tensor) -> LearnedLinear:
        """Where each weight (N, K) really lies, as near to its code as rounding asks."""
        scales, zeros = (
            torch.from_numpy(array.astype(np.float32)).to(weight.device) for array in (stored.scales, stored.zeros)
        )
        start = grouped(torch.from_numpy(stored.codes).to(weight.device), stored.group_size)
        place = grouped(weight, stored.group_size) / scales[:, :, None] + zeros[:, :, None]
        offset = (place - start).clamp(-_EDGE, _EDGE).half()
        return LearnedLinear(start, offset, scales, zeros, torch.zeros_like(scales))

    def place(self) -> Tensor:
        """(N, K/Q, Q), f32: rounded, it is the code."""
        return self.start + self.offset.float()

    def grid(self) -> GroupGrid:
        """With scales as they will be stored."""
        scales = (self.scales * self.stretch.exp()).half().float().clamp(min=float(np.float16(TINY)))
        return GroupGrid(scales, self.zeros)

    def codes(self) -> Tensor:
        """(N, K/Q, Q), f32."""
        return self.place().round().clamp(0, 15)

    def weight(self) -> Tensor:
        """(N, K): the values that would be stored now."""
        return decode(self.codes(), self.grid()).flatten(1)

    def stored(self) -> Int4Weight:
        """What would be stored now."""
        return stored_weight(self.codes().flatten(1), self.grid())

    def learn(self, slope: Tensor, reach: float, stretch: float) -> None:
        """One step down the gradient (N, K) of `weight`: places by up to about `reach`, stretches by `stretch`."""
        slopes = self.slopes(slope)
        self.offset.copy_(self.offset.float() - reach * self.paces[0](slopes[0]))
        self.stretch -= stretch * self.paces[1](slopes[1])

    def slopes(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient (N, K) of `weight`: those of `place`, up to a positive factor, and of `stretch`."""
        place = self.place()
        slopes = slope.float().reshape(place.shape)
        inside = (place > -0.5) & (place < 15.5)
        return slopes * inside, (slopes * (self.codes() - self.zeros[:, :, None])).sum(dim=2) * self.grid().scales
