"""A linear whose codes and scales learn: where every weight lies between the codes, and how far scales were stretched.

Rounding is stepped over by gradients as if it were not there (straight through). Called by `quantize.reconstruct`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgevl.weights import Int4Weight
from quantize.rounding import TINY, GroupGrid, decode, grouped, stored_weight

_EDGE = 0.499  # a weight begins within the reach of the code that it has


@dataclass
class LearnedLinear:
    """One linear (N, K) in groups of Q while it learns; its zeros stay."""

    place: Tensor  # (N, K/Q, Q): rounded, it is the code
    scales: Tensor  # (N, K/Q), as they were
    zeros: Tensor  # (N, K/Q)
    stretch: Tensor  # (N, K/Q): log of what the scales are multiplied by

    @staticmethod
    def begin(stored: Int4Weight, weight: Tensor) -> LearnedLinear:
        """Where each weight (N, K) really lies, as near to its code as rounding asks."""
        codes, scales, zeros = (
            torch.from_numpy(array.astype(np.float32)).to(weight.device)
            for array in (stored.codes, stored.scales, stored.zeros)
        )
        codes = grouped(codes, stored.group_size)
        place = grouped(weight, stored.group_size) / scales[:, :, None] + zeros[:, :, None]
        place = codes + (place - codes).clamp(-_EDGE, _EDGE)
        return LearnedLinear(place, scales, zeros, torch.zeros_like(scales))

    def grid(self) -> GroupGrid:
        """With scales as they will be stored."""
        scales = (self.scales * self.stretch.exp()).half().float().clamp(min=float(np.float16(TINY)))
        return GroupGrid(scales, self.zeros)

    def codes(self) -> Tensor:
        """(N, K/Q, Q), f32."""
        return self.place.round().clamp(0, 15)

    def weight(self) -> Tensor:
        """(N, K): the values that would be stored now."""
        return decode(self.codes(), self.grid()).flatten(1)

    def stored(self) -> Int4Weight:
        """What would be stored now."""
        return stored_weight(self.codes().flatten(1), self.grid())

    def slopes(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient (N, K) of `weight`: those of `place`, up to a positive factor, and of `stretch`."""
        slopes = slope.float().reshape(self.place.shape)
        inside = (self.place > -0.5) & (self.place < 15.5)
        return slopes * inside, (slopes * (self.codes() - self.zeros[:, :, None])).sum(dim=2) * self.grid().scales
