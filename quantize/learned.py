"""A linear whose codes and scales learn: where every weight lies between the codes, and how far scales were stretched.

Rounding is stepped over by gradients as if it were not there (straight through). Called by `quantize.reconstruct`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgevl.weights import Int4Weight
from quantize.rounding import TINY, GroupGrid, decode, grouped, stored_weight

_EDGE = 0.499  # a weight begins within the reach of the code that it has
_KEPT = 0.9  # of the running means of squares, at each step
_LEAST = 1e-18  # of what is divided by, so that no slope at all is no step


class Pace:
    """Slopes relative to what is usual in their rows and columns, which differ by orders of magnitude.

    Usual is the root of running means of squares, of a row times of a column (the factored second moment of Shazeer &
    Stern 2018, arXiv 1804.04235). A step is about 1 on average, as signs are; but where a slope is small, and its sign
    so mere chance, little moves.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._rows = self._columns = torch.zeros(())

    def __call__(self, slope: Tensor) -> Tensor:
        """The step (N, ...) to be taken away, for a slope (N, ...)."""
        squares = slope.square()
        rows, columns = squares.flatten(1).mean(dim=1), squares.mean(dim=0)
        if not self._steps:
            self._rows, self._columns = torch.zeros_like(rows), torch.zeros_like(columns)
        self._steps += 1
        self._rows.lerp_(rows, 1 - _KEPT)
        self._columns.lerp_(columns, 1 - _KEPT)
        total = self._rows.mean().sqrt().clamp(min=_LEAST)
        share = (self._rows.sqrt() / total).reshape(-1, *[1] * (slope.ndim - 1))
        usual = self._columns.sqrt() / (1 - _KEPT**self._steps) ** 0.5
        step: Tensor = slope / (share * usual).clamp_(min=_LEAST)
        return step


@dataclass
class LearnedLinear:
    """One linear (N, K) in groups of Q while it learns; its zeros stay."""

    place: Tensor  # (N, K/Q, Q): rounded, it is the code
    scales: Tensor  # (N, K/Q), as they were
    zeros: Tensor  # (N, K/Q)
    stretch: Tensor  # (N, K/Q): log of what the scales are multiplied by
    paces: tuple[Pace, Pace] = field(default_factory=lambda: (Pace(), Pace()))  # of place and of stretch

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

    def learn(self, slope: Tensor, reach: float, stretch: float) -> None:
        """A step against the gradient (N, K) of `weight`: places move by about `reach`, stretches by `stretch`."""
        place_step, stretch_step = (pace(part) for pace, part in zip(self.paces, self.slopes(slope), strict=True))
        self.place -= reach * place_step
        self.stretch -= stretch * stretch_step

    def slopes(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient (N, K) of `weight`: those of `place`, up to a positive factor, and of `stretch`."""
        slopes = slope.float().reshape(self.place.shape)
        inside = (self.place > -0.5) & (self.place < 15.5)
        return slopes * inside, (slopes * (self.codes() - self.zeros[:, :, None])).sum(dim=2) * self.grid().scales
