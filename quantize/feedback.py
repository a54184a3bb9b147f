"""Rounding that makes up for itself: what one column loses is taken back by the columns that are still to be rounded.

Source: Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), here on weights that AWQ has scaled and within the ranges that
its clips chose. Knows matrices, and nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgevl.errors import EdgevlError
from edgevl.weights import Int4Weight
from quantize.rounding import TINY, GroupGrid, Scheme, decode, fit_grid, grouped, row_spans, stored_weight

_DAMPING = 0.01  # of the mean of the diagonal, so that the inverse exists
_TOGETHER = 128  # columns whose corrections reach the rest at once
_HOLD = 0.01  # how much a fitted scale is held to the one before, against what the data say of it
_FLOATS = 1 << 26  # f32 numbers that fitting may hold at once
_BLOCK = 512  # columns of a second-moment matrix that are factored at once


@dataclass(frozen=True)
class Feedback:
    """How errors are handed on among the columns of all linears that read one input; made by `feedback`."""

    order: Tensor  # (K,) columns, the one whose input is largest first
    factor: Tensor  # (K, K), in that order: upper U with UᵀU = gram⁻¹
    gram: Tensor  # (K, K), damped, in the weights' own order


def feedback(gram: Tensor) -> Feedback:
    """From the mean (K, K) of x·xᵀ over the inputs x, which is kept and damped.

    Raises `EdgevlError` when it has no inverse even with damping.
    """
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean().clamp(min=1e-30))
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = torch.empty_like(gram)
    for begin in range(0, len(order), _BLOCK):
        rows = order[begin : begin + _BLOCK]
        factor[begin : begin + _BLOCK] = gram[rows][:, order]
    return Feedback(order, _inverse_factor(factor), gram)


def round_with_feedback(
    weight: Tensor, scheme: Scheme, clip: tuple[Tensor, Tensor] | None, given: Feedback, refit: bool = True
) -> tuple[Int4Weight, Tensor]:
    """(N, K) -> what is stored, and the f32 values (N, K) it stands for.

    What is made small is tr(Δ·gram·Δᵀ) of the error Δ. `clip`: (low, high) of each group. Scale and zero of each group
    are fixed before the first column is rounded; once all codes are known, the scales are fitted to them again.
    """
    found, values = [], torch.empty_like(weight)
    for rows in row_spans(weight.shape):
        own = None if clip is None else (clip[0][rows], clip[1][rows])
        stored, values[rows] = _round_rows(weight[rows], scheme, own, given, refit)
        found.append(stored)
    if len(found) == 1:
        return found[0], values
    codes, scales, zeros = (np.concatenate([getattr(part, f) for part in found]) for f in ("codes", "scales", "zeros"))
    return Int4Weight(codes, scales, zeros), values


def _round_rows(
    weight: Tensor, scheme: Scheme, clip: tuple[Tensor, Tensor] | None, given: Feedback, refit: bool
) -> tuple[Int4Weight, Tensor]:
    grid = fit_grid(grouped(weight, scheme.group_size), scheme.symmetric, *(clip or (1.0, 1.0)))
    order, factor = given.order, given.factor
    group = order // scheme.group_size
    scales, zeros = grid.scales[:, group], grid.zeros[:, group]  # (N, K)
    left = weight[:, order].clone()
    codes = torch.empty_like(left)
    for begin in range(0, left.shape[1], _TOGETHER):
        span = slice(begin, min(begin + _TOGETHER, left.shape[1]))
        now, inner = left[:, span], factor[span, span]
        errors = torch.empty_like(now)
        for j in range(now.shape[1]):
            scale, zero = scales[:, begin + j], zeros[:, begin + j]
            code = ((now[:, j] / scale).round() + zero).clamp(0, 15)
            codes[:, begin + j] = code
            errors[:, j] = (now[:, j] - (code - zero) * scale) / inner[j, j]
            now[:, j + 1 :] -= errors[:, j : j + 1] * inner[j, j + 1 :]
        left[:, span.stop :] -= errors @ factor[span, span.stop :]
    back = torch.empty_like(codes)
    back[:, order] = codes
    apart = grouped(back, scheme.group_size)
    if refit:
        grid = GroupGrid(refit_scales(weight, apart - grid.zeros[:, :, None], grid.scales, given.gram), grid.zeros)
    return stored_weight(back, grid), decode(apart, grid).reshape(weight.shape)


def refit_scales(weight: Tensor, steps: Tensor, scales: Tensor, gram: Tensor) -> Tensor:
    """The scales (N, K/Q) of least squared output error for codes that are fixed; f16's values, like `scales`.

    `steps` (N, K/Q, Q): codes less their zeros. A row's scales solve one small system, since the error is quadratic in
    them; a row that would not gain once they are rounded keeps `scales`.
    """
    n, groups, _ = steps.shape
    best = scales.clone()
    for begin in range(0, n, max(1, _FLOATS // (groups * weight.shape[1]))):
        rows = slice(begin, begin + max(1, _FLOATS // (groups * weight.shape[1])))
        q, old = steps[rows], scales[rows]
        reach = torch.einsum("ngq,gqk->ngk", q, gram.reshape(groups, -1, gram.shape[1]))  # each group's output at all
        system = (reach.reshape(*q.shape[:2], groups, -1) * q[:, None]).sum(dim=3)  # (n, K/Q, K/Q)
        wanted = torch.einsum("ngk,nk->ng", reach, weight[rows])
        hold = system.diagonal(dim1=1, dim2=2) * _HOLD + 1e-30
        held = system + torch.diag_embed(hold)
        found = torch.linalg.solve(held.double(), (wanted + hold * old).double()).float()
        found = found.clamp(0.5 * old, 2 * old).half().float().clamp(min=float(np.float16(TINY)))

        def lost(s: Tensor, system: Tensor = system, wanted: Tensor = wanted) -> Tensor:
            """What of the squared output error depends on the scales, (n,)."""
            s = s.double()
            return ((system.double() @ s[:, :, None])[:, :, 0] * s).sum(dim=1) - 2 * (wanted * s).sum(dim=1)

        best[rows] = torch.where((lost(found) < lost(old))[:, None], found, old)
    return best


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper U with UᵀU = gram⁻¹, in the place of `gram`. With gram = V·Vᵀ and V upper, it is V⁻¹."""
    spans = [slice(i, min(i + _BLOCK, len(gram))) for i in range(0, len(gram), _BLOCK)]
    for i in reversed(range(len(spans))):
        span, before = spans[i], slice(0, spans[i].start)
        lower, failed = torch.linalg.cholesky_ex(gram[span, span].flip(0, 1))
        if int(failed):
            raise EdgevlError(
                "the calibration inputs of a linear have no usable second moments; calibrate on more data"
            )
        corner = gram[span, span] = lower.flip(0, 1)
        panel = torch.linalg.solve_triangular(corner.T, gram[before, span], upper=False, left=False)
        gram[before, span] = panel
        for other in spans[:i]:  # what is above the diagonal; below it nothing is read
            gram[: other.stop, other] -= panel[: other.stop] @ panel[other].T
    for i, span in enumerate(spans):
        one = torch.eye(span.stop - span.start, device=gram.device)
        gram[span, span] = corner = torch.linalg.solve_triangular(gram[span, span], one, upper=True)
        above = gram[: span.start, span] @ corner
        for rows in spans[:i]:
            gram[rows, span] = -(gram[rows, rows.start : span.start] @ above[rows.start :])
    return gram.triu_()
