"""Rounding to int4 in groups, in torch: exactly what will be stored, so that the search measures the real thing.

The twin of `edgevl.weights.quantize_int4` with a clip on top: a group's range may be shrunk before its f16 scale is
made, and values outside it saturate. Scales are held as f32 tensors whose values are f16's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgevl.weights import Int4Weight

TINY = 6e-8  # the smallest scale, near f16's smallest number
_FLOATS = 1 << 24  # f32 numbers of a weight that are worked on at once, in each of a few copies


@dataclass(frozen=True)
class Scheme:
    """How codes are made: groups of Q in-features, `symmetric` keeps every zero at 8."""

    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class GroupGrid:
    """Scale and zero of each group, (N, K/Q) f32 each."""

    scales: Tensor
    zeros: Tensor


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """(N, K) -> (N, K/Q, Q), a view."""
    return weight.reshape(weight.shape[0], -1, group_size)


def row_spans(shape: tuple[int, ...]) -> Iterator[slice]:
    """A weight (N, K) in slices of rows that are worked on one after the other, to bound the memory of copies."""
    rows = max(1, _FLOATS // shape[1])
    for begin in range(0, shape[0], rows):
        yield slice(begin, min(begin + rows, shape[0]))


def fit_grid(groups: Tensor, symmetric: bool, low: Tensor | float = 1.0, high: Tensor | float = 1.0) -> GroupGrid:
    """The grid of (N, K/Q, Q) values; `low` and `high`, numbers or (N, K/Q), shrink the range below and above zero.

    Symmetric: codes reach from 8 steps below zero to 7 above it.
    """
    least, most = groups.amin(dim=2).clamp(max=0) * low, groups.amax(dim=2).clamp(min=0) * high
    scales = torch.maximum(-least / 8.0, most / 7.0) if symmetric else (most - least) / 15.0
    scales = torch.where(scales > 0, scales, 1.0).half().float().clamp(min=float(np.float16(TINY)))
    zeros = torch.full_like(scales, 8.0) if symmetric else (-least / scales).round().clamp(0, 15)
    return GroupGrid(scales, zeros)


def encode(groups: Tensor, grid: GroupGrid) -> Tensor:
    """(N, K/Q, Q) -> the codes 0..15, f32."""
    return ((groups / grid.scales[:, :, None]).round() + grid.zeros[:, :, None]).clamp(0, 15)


def decode(codes: Tensor, grid: GroupGrid) -> Tensor:
    """(N, K/Q, Q) codes -> the values they stand for."""
    return (codes - grid.zeros[:, :, None]) * grid.scales[:, :, None]


def fake_quantize(weight: Tensor, scheme: Scheme, scale: Tensor | float = 1.0) -> Tensor:
    """(N, K) -> (N, K): what is left of the values when their columns are rounded once multiplied by `scale` (K,)."""
    out = torch.empty_like(weight)
    for rows in row_spans(weight.shape):
        groups = grouped(weight[rows] * scale, scheme.group_size)
        grid = fit_grid(groups, scheme.symmetric)
        torch.div(decode(encode(groups, grid), grid).reshape(out[rows].shape), scale, out=out[rows])
    return out


def round_weight(
    weight: Tensor, scheme: Scheme, clip: tuple[Tensor, Tensor] | None = None
) -> tuple[Int4Weight, Tensor]:
    """(N, K) -> what is stored, and the f32 values (N, K) it stands for. `clip`: (low, high) of each group."""
    groups = grouped(weight, scheme.group_size)
    low, high = clip if clip is not None else (1.0, 1.0)
    grid = fit_grid(groups, scheme.symmetric, low, high)
    codes = encode(groups, grid)
    return stored_weight(codes.reshape(weight.shape), grid), decode(codes, grid).reshape(weight.shape)


def stored_weight(codes: Tensor, grid: GroupGrid) -> Int4Weight:
    """Codes (N, K) with their grid as they are stored."""
    return Int4Weight(
        codes=codes.to(torch.uint8).cpu().numpy(),
        scales=grid.scales.half().cpu().numpy(),
        zeros=grid.zeros.to(torch.uint8).cpu().numpy(),
    )
