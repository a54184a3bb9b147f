"""AWQ of one decoder block: find the scales and clips that lose least, fold them, round.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978); the grouped-query rule for
v -> o averages the scale over the query heads that share a KV head. What is different here: candidates are first tried
on few tokens and the best of them on more, and clips are chosen by the second moments of *all* calibration tokens,
which give the exact squared error of every row and group without keeping the tokens.

Knows one block in memory; `quantize.job` streams the blocks and keeps the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgevl.config import TextConfig
from edgevl.errors import EdgevlError
from edgevl.weights import Int4Weight
from quantize.groups import BlockTable, ScaleGroup
from quantize.observe import Observations
from quantize.part_tensors import JoinedTensors
from quantize.rounding import Scheme, decode, encode, fake_quantize, fit_grid, grouped, round_weight, row_spans
from quantize.settings import Recipe
from quantize.torch_ops import TorchOps, batch_step

_RATIOS = 10  # exponents tried: 0, which is no scale, to 0.9
_FINALISTS = 4  # of the candidates tried on few tokens, those tried again on all sample tokens
_SHRINKS = 10  # steps of 5 % of the range: 0..45 %


_ALL = Recipe()


@dataclass(frozen=True)
class GroupReport:
    """What was chosen for one scale group. Errors are relative: squared error / squared output."""

    group: str
    ratio: float  # exponent of the scale; 0: none
    error_rounded: float  # round to nearest, no scale
    error_chosen: float


@dataclass(frozen=True)
class ClipReport:
    """What clipping did to one linear: mean share of the range that was cut, error before and after (relative)."""

    linear: str
    shrink: float
    error_before: float
    error_after: float


@dataclass
class BlockResult:
    """A quantized block: int4 linears and changed float tensors by checkpoint names, and the report's entries."""

    linears: dict[str, Int4Weight]
    changed: dict[str, Tensor]  # norms and biases with scales folded in, rounded as they will be stored
    values: dict[str, Tensor]  # every tensor of the block as the quantized model computes with it
    floats: dict[str, Tensor]  # each linear's weight before rounding, scales folded in
    groups: list[GroupReport] = field(default_factory=list)
    clips: list[ClipReport] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """The block's entry of report.json."""
        return {"groups": [asdict(g) for g in self.groups], "clips": [asdict(c) for c in self.clips]}


@dataclass(frozen=True)
class _Candidate:
    ratio: float
    scale: Tensor  # (K,)


def quantize_block(
    config: TextConfig,
    table: BlockTable,
    tensors: dict[str, Tensor],
    seen: Observations,
    scheme: Scheme,
    store_as: Callable[[str, Tensor], Tensor],
    tick: Callable[[str], None] = lambda _: None,
    recipe: Recipe = _ALL,
    coarse: bool = False,
) -> BlockResult:
    """Quantize one block. `tensors` by checkpoint names, f32; `seen` was collected with them. `coarse`: see `TorchOps`.

    The mapping is used up: its tensors give way, one after the other, to those that the quantized block computes with.

    `store_as(name, tensor)` rounds a float tensor to the dtype that it will be stored in. `tick(name)` is called before
    each of the table's groups, before the clips and before the rounding.
    """
    now = tensors
    result = BlockResult({}, {}, now, {})
    divisors: dict[str, Tensor] = {}
    for group in table.groups:
        tick(group.name)
        # later groups measure no linear that an earlier one changed, so what is in `now` is still the original
        best, report = _search_scale(config, table, group, now, seen, scheme, recipe, coarse)
        result.groups.append(report)
        if best.ratio:
            divisors[group.input_part] = _fold(config, group, best.scale, now, result.changed, store_as)
    tick("clip")
    clips: dict[str, tuple[Tensor, Tensor]] = {}
    for linear, part in table.clip.items():
        moments = _divided(seen.moments[part], divisors.get(part), scheme.group_size)
        if recipe.clip:
            clips[linear], clip_report = _search_clip(linear, now[f"{linear}.weight"], moments, scheme)
            result.clips.append(clip_report)
    tick("round")
    for linear in table.linears:
        name = f"{linear}.weight"
        if recipe.reconstruct:
            result.floats[linear] = now[name]
        result.linears[linear], now[name] = round_weight(now[name], scheme, clips.get(linear))
    return result


# -- scales -----------------------------------------------------------------------------------------------------------


def _search_scale(
    config: TextConfig,
    table: BlockTable,
    group: ScaleGroup,
    tensors: dict[str, Tensor],
    seen: Observations,
    scheme: Scheme,
    recipe: Recipe,
    coarse: bool,
) -> tuple[_Candidate, GroupReport]:
    """The candidate of least output error, measured on the sample; the first candidate is no scale at all."""
    candidates = list(_candidates(config, group, seen, recipe))
    trial = _measure(config, table, group, tensors, seen.trial[group.input_part], scheme, coarse)
    full = _measure(config, table, group, tensors, seen.sample[group.input_part], scheme, coarse)
    order = sorted(range(1, len(candidates)), key=lambda i: (trial(candidates[i].scale), i))
    errors = {i: full(candidates[i].scale) for i in (0, *order[:_FINALISTS])}
    if not torch.isfinite(torch.tensor(errors[0])):
        raise EdgevlError(
            f"layer {table.layer}: the output of {group.name} is not finite even without any scale; "
            "the checkpoint's weights or the calibration data overflow"
        )
    best = min(errors, key=lambda i: (errors[i], i))
    chosen = candidates[best]
    return chosen, GroupReport(group.name, chosen.ratio, errors[0], errors[best])


def _candidates(
    config: TextConfig,
    group: ScaleGroup,
    seen: Observations,
    recipe: Recipe,
) -> Iterator[_Candidate]:
    """No scale, then x^r: x the mean |activation| of each channel."""
    x = seen.mean_abs[group.input_part]
    yield _Candidate(0.0, torch.ones_like(x))
    if not recipe.scales or (group.shared_heads and not recipe.value_scale):
        return
    for step in range(1, _RATIOS):
        ratio = step / _RATIOS
        scale = x.pow(ratio)
        if group.shared_heads:
            share, d = config.heads // config.kv_heads, config.head_dim
            scale = scale.reshape(-1, share, d).mean(dim=1, keepdim=True).expand(-1, share, d).reshape(-1)
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        # f16 holds what is divided and multiplied by it; an idle channel must not push the others out of range
        scale = torch.where(torch.isfinite(scale), scale, 1.0).clamp(1e-3, 1e3)
        yield _Candidate(ratio, scale)


def _measure(
    config: TextConfig,
    table: BlockTable,
    group: ScaleGroup,
    tensors: dict[str, Tensor],
    x: Tensor,
    scheme: Scheme,
    coarse: bool,
) -> Callable[[Tensor], float]:
    """A function from a scale (K,) to the relative output error on the inputs x (B, S, K); infinite if not finite."""
    trial = dict(tensors)
    ops = TorchOps(JoinedTensors(table.parts, trial), x.shape[1], coarse=coarse)
    step = batch_step(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
    rows = x.reshape(-1, x.shape[2])

    def output() -> Tensor:
        y = ops.linear(rows, ops.linear_weight(group.input_part))
        if group.measure == "attention":
            y = ops.attention(ops.rope_write(y, step, table.layer, config), step, table.layer, config)
            return ops.linear(y, ops.linear_weight(f"layers.{table.layer}.o"))
        if group.measure == "mlp":
            return ops.linear(ops.silu_mul(y), ops.linear_weight(f"layers.{table.layer}.down"))
        return y

    expected = output()
    size = expected.square().mean().clamp(min=1e-30)

    def error(scale: Tensor) -> float:
        for linear in group.linears:
            name = f"{linear}.weight"
            trial[name] = fake_quantize(tensors[name], scheme, scale)
        found = float((output() - expected).square().mean() / size)
        return found if found == found else float("inf")

    return error


def _fold(
    config: TextConfig,
    group: ScaleGroup,
    scale: Tensor,
    now: dict[str, Tensor],
    changed: dict[str, Tensor],
    store_as: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Divide `previous`, multiply the linears' columns; returns what the linears' inputs were really divided by.

    A folded norm is rounded to its stored dtype, and the columns take what that rounding left: nothing is lost there.
    """
    name = f"{group.previous}.weight"
    before = now[name]
    if before.ndim == 1:
        now[name] = changed[name] = store_as(name, before / scale)
        exact = before / now[name]
        scale = torch.where(torch.isfinite(exact) & (exact > 0), exact, scale)
    else:
        divisor = scale
        if group.shared_heads:  # one of the equal scales of each KV head
            divisor = scale.reshape(config.kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
        now[name] = before / divisor[:, None]
        bias = f"{group.previous}.bias"
        if bias in now:
            now[bias] = changed[bias] = store_as(bias, now[bias] / divisor)
    for linear in group.linears:
        now[f"{linear}.weight"] = now[f"{linear}.weight"] * scale
    return scale


# -- clips ------------------------------------------------------------------------------------------------------------


def _divided(moments: Tensor, divisor: Tensor | None, group_size: int) -> Tensor:
    """Second moments (K/Q, Q, Q) of the inputs once they are divided by `divisor` (K,)."""
    if divisor is None:
        return moments
    inverse = (1.0 / divisor).reshape(-1, group_size)
    return moments * inverse[:, :, None] * inverse[:, None, :]


def _search_clip(
    linear: str, weight: Tensor, moments: Tensor, scheme: Scheme
) -> tuple[tuple[Tensor, Tensor], ClipReport]:
    """For each row and group the shrink of its range with the least squared output error, from 0 to 45 %."""
    found = [_clip_rows(grouped(weight[rows], scheme.group_size), moments, scheme) for rows in row_spans(weight.shape)]
    low, high = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
    size, before, after = (sum(part[2][i] for part in found) for i in range(3))
    return (low, high), ClipReport(
        linear, float(1 - (low + high).mean() / 2), before / max(size, 1e-30), after / max(size, 1e-30)
    )


def _clip_rows(groups: Tensor, moments: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, tuple[float, float, float]]:
    """low and high (n, K/Q) of rows (n, K/Q, Q), and squared: their output, its error without clips and with them."""
    by_group = groups.transpose(0, 1)  # (K/Q, n, Q)
    size = float(((by_group @ moments) * by_group).sum())

    def error(low: Tensor | float, high: Tensor | float) -> Tensor:
        grid = fit_grid(groups, scheme.symmetric, low, high)
        lost = (decode(encode(groups, grid), grid) - groups).transpose(0, 1)
        return ((lost @ moments) * lost).sum(dim=2).T  # (N, K/Q)

    least = before = error(1.0, 1.0)
    low = torch.ones_like(least)
    high = torch.ones_like(least)
    steps = [1.0 - 0.05 * step for step in range(1, _SHRINKS)]
    for factor in steps:
        least, low, high = _keep_better(least, low, high, error(factor, factor), factor, factor)
    if not scheme.symmetric:  # then each end by itself, the other one as found
        for factor in [1.0, *steps]:
            least, low, high = _keep_better(least, low, high, error(low, factor), low, factor)
        for factor in [1.0, *steps]:
            least, low, high = _keep_better(least, low, high, error(factor, high), factor, high)
    return low, high, (size, float(before.sum()), float(least.sum()))


def _keep_better(
    least: Tensor, low: Tensor, high: Tensor, error: Tensor, new_low: Tensor | float, new_high: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    better = error < least
    return torch.where(better, error, least), torch.where(better, new_low, low), torch.where(better, new_high, high)
