"""Tuning end to end: all codes fixed, scales and norms learn to give back what rounding took.

Each group scale of the decoder gets a multiplier and each norm its freedom. For one pass over the calibration
sequences they learn to bring the quantized model's next-token distribution back to the original's (KL divergence). One
block is in memory at a time: a step runs the blocks forward and keeps what enters each, then goes back through them,
computes each once more with gradients and updates it on the spot. Some sequences are kept aside; unless those gain,
nothing is changed. The state is saved every few steps, so an interrupted run ends with the same bytes. Called by
`quantize.job`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from calibration import Sample
from edgevl.awq_format import FIELDS, unpack
from edgevl.checkpoint import Checkpoint
from edgevl.errors import EdgevlError
from edgevl.models.decoder import decoder_block
from edgevl.models.names import tensor_names
from edgevl.weights import dequantize
from quantize.embed import embed_samples
from quantize.groups import BlockTable
from quantize.measure import last_hidden
from quantize.observe import run_block
from quantize.part_tensors import CheckpointParts, JoinedTensors, to_torch
from quantize.partial import Partial
from quantize.rounding import TINY, grouped
from quantize.torch_ops import TorchOps, batch_step

Progress = Callable[[str, int, int], None]  # stage, done, total

_BATCH = 4  # sequences of a step
_RATE = 1e-3  # of Adam, at its peak
_BETAS, _EPS = (0.9, 0.95), 1e-8
_ASIDE = 8  # one sequence of so many is kept for the check
_ROWS = 256  # of logits at once
_SAVED = 4  # steps between two saved states
_NORM = "norm"  # the part after the last block


@dataclass(frozen=True)
class Tuning:
    """What it came to: mean KL(original ‖ quantized) in nats on the sequences kept aside; `kept`: it was worth it."""

    kl_before: float
    kl_after: float
    steps: int
    kept: bool


def tune(
    checkpoint: Checkpoint,
    tables: list[BlockTable],
    partial: Partial,
    samples: list[Sample],
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> Tuning:
    """Tune the finished blocks of an unfinished run, whose tuned versions are left beside them.

    Raises `EdgevlError` when the loss is no number.
    """
    if (found := partial.tuning()) is not None:
        return Tuning(**found)
    apart = [s for i, s in enumerate(samples) if i % _ASIDE == _ASIDE - 1] or samples[-1:]
    taught = [s for i, s in enumerate(samples) if i % _ASIDE != _ASIDE - 1] or samples
    steps = -(-len(taught) // _BATCH)
    network = _Network(checkpoint, tables, partial, device)
    with torch.no_grad():
        wanted = last_hidden(checkpoint, [*taught, *apart], device, lambda d, n: progress("tune: the original", d, n))
        entered = embed_samples(checkpoint, [*taught, *apart], device)
    known = torch.tensor([s.token_ids for s in (*taught, *apart)])
    checks = slice(len(taught), None)
    progress("tune: check", 0, 1)
    before = network.distance(entered[checks], wanted[checks], known[checks])
    progress("tune: check", 1, 1)
    for step in range(network.load(), steps):
        progress("tune", step, steps)
        rows = slice(step * _BATCH, min((step + 1) * _BATCH, len(taught)))
        network.learn(entered[rows], wanted[rows], known[rows], step, steps)
        if (step + 1) % _SAVED == 0:
            network.save(step + 1)
    progress("tune", steps, steps)
    network.settle()
    after = network.distance(entered[checks], wanted[checks], known[checks])
    result = Tuning(before, after, steps, after < before)
    if result.kept:
        network.write()
    partial.save_tuning(asdict(result))
    return result


class _Network:
    """The quantized decoder, streamed from the unfinished run, with what is learned about each block."""

    def __init__(self, checkpoint: Checkpoint, tables: list[BlockTable], partial: Partial, device: str) -> None:
        self._checkpoint, self._tables, self._partial, self._device = checkpoint, tables, partial, device
        self._config = checkpoint.config.text
        self._ends = CheckpointParts(checkpoint, device)
        self._ends.keep((_NORM, "head"))
        # by module: log multipliers of the scales (N, K/Q), norms (C,)
        self.learned: dict[str, Tensor] = {}
        for table in tables:
            block = partial.open_block(table.layer)
            for module in table.linears:
                count, n = block.spec(f"{module}.scales").shape
                self.learned[module] = torch.zeros(n, count)
            for module in table.norms:
                self.learned[module] = to_torch(self._float(table, f"{module}.weight"))
        self._moments = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.learned.items()
        }
        self._settled = False

    # -- one step -----------------------------------------------------------------------------------------------

    def learn(self, entered: Tensor, wanted: Tensor, known: Tensor, step: int, steps: int) -> None:
        """One update of everything from B sequences: what enters the first block and leaves the original's last."""
        inputs = [entered]
        with torch.no_grad():
            for table in self._tables:
                inputs.append(self._run(table, self._values(table), inputs[-1]))
        slope, loss = self._loss(inputs.pop(), wanted, known, gradient=True)
        if not math.isfinite(loss):
            raise EdgevlError("tuning met a loss that is no number; use --effort balanced, or calibrate on other data")
        rate = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        for table in reversed(self._tables):
            own = {name: self.learned[name].requires_grad_() for name in (*table.linears, *table.norms)}
            x = inputs.pop().to(self._device).requires_grad_()
            with torch.enable_grad():
                y = self._run(table, self._values(table), x)
            slope, *slopes = torch.autograd.grad(y, [x, *own.values()], slope)
            for (name, value), found in zip(own.items(), slopes, strict=True):
                self.learned[name] = value.detach()
                self._update(name, found, rate, step)

    def distance(self, entered: Tensor, wanted: Tensor, known: Tensor) -> float:
        """Mean KL to the original on B sequences."""
        total = 0.0
        with torch.no_grad():
            for begin in range(0, len(entered), _BATCH):
                rows = slice(begin, begin + _BATCH)
                x = entered[rows]
                for table in self._tables:
                    x = self._run(table, self._values(table), x)
                total += self._loss(x, wanted[rows], known[rows], gradient=False)[1] * len(x)
        return total / len(entered)

    def _run(self, table: BlockTable, values: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.to(self._device)
        ops = TorchOps(JoinedTensors(table.parts, values), x.shape[1])
        step = batch_step(torch.zeros(x.shape[:2], dtype=torch.int64, device=self._device))
        return decoder_block(ops, self._config, x.reshape(-1, x.shape[2]), step, table.layer).reshape(x.shape)

    def _loss(self, x: Tensor, wanted: Tensor, known: Tensor, gradient: bool) -> tuple[Tensor, float]:
        """(slope (B, S, C) of the mean KL at x, mean KL) over the places after which text follows."""
        follows = functional.pad(known[:, 1:] >= 0, (0, 1))
        places = follows.reshape(-1).nonzero()[:, 0].to(self._device)
        x = x.detach().reshape(-1, x.shape[2]).to(self._device)
        wanted = wanted.reshape(-1, wanted.shape[2]).to(self._device)
        slope, total = torch.zeros_like(x), 0.0
        for some in places.split(_ROWS):  # type: ignore[no-untyped-call]
            goal = self._logs(wanted[some])
            with torch.set_grad_enabled(gradient):
                part = x[some].requires_grad_(gradient)
                lost = functional.kl_div(self._logs(part), goal, log_target=True, reduction="sum") / len(places)
            if gradient:
                slope[some] = torch.autograd.grad(lost, part)[0]
            total += float(lost.detach())
        return slope.reshape(known.shape[0], -1, x.shape[1]), total

    def _logs(self, x: Tensor) -> Tensor:
        """log p (rows, V) of the next token, padding rows left out."""
        ops = TorchOps(self._ends, 1)
        x = ops.rms_norm(x, ops.norm_weight(_NORM), self._config.rms_norm_eps)
        return functional.log_softmax(ops.linear(x, ops.linear_weight("head"))[:, : self._real], dim=1)

    @property
    def _real(self) -> int:
        return self._checkpoint.config.tokens.size

    def _update(self, name: str, slope: Tensor, rate: float, step: int) -> None:
        """Adam; a scale's multiplier and a norm's channel move by about `rate` of themselves."""
        first, second = self._moments[name]
        first.lerp_(slope, 1 - _BETAS[0])
        second.lerp_(slope.square(), 1 - _BETAS[1])
        middle, spread = first / (1 - _BETAS[0] ** (step + 1)), second / (1 - _BETAS[1] ** (step + 1))
        change = rate * middle / (spread.sqrt() + _EPS)
        value = self.learned[name]
        value -= change if value.ndim == 2 else change * value.abs().mean()

    # -- weights ------------------------------------------------------------------------------------------------

    def _values(self, table: BlockTable) -> dict[str, Tensor]:
        """The block's tensors by checkpoint names, as differentiable functions of what is learned."""
        block, values = self._partial.open_block(table.layer), {}
        for module in table.linears:
            group = self._group(table, module)
            weight = unpack({f: block.array(f"{module}.{f}") for f in FIELDS}, module, group)
            codes = grouped(torch.from_numpy(weight.codes).to(self._device).float(), group)
            apart = codes - torch.from_numpy(weight.zeros).to(self._device).float()[:, :, None]
            scales = self._scales(module, to_torch(weight.scales))
            values[f"{module}.weight"] = (apart * scales[:, :, None]).reshape(weight.shape)
        for module in table.norms:
            norm = self.learned[module]
            values[f"{module}.weight"] = to_torch(self._stored(module, norm)) if self._settled else norm
        for part in table.parts:
            for name in tensor_names(part)[len(part.sources) :]:
                values[name] = to_torch(self._float(table, name)).to(self._device)
        return values

    def _scales(self, module: str, before: Tensor) -> Tensor:
        scales = before * self.learned[module].exp()
        return scales.half().float().clamp(min=float(np.float16(TINY))) if self._settled else scales

    def _group(self, table: BlockTable, module: str) -> int:
        block = self._partial.open_block(table.layer)
        groups: int = block.spec(f"{module}.scales").shape[0]
        rows: int = block.spec(f"{module}.qweight").shape[0]
        return rows // groups

    def _float(self, table: BlockTable, name: str) -> NDArray[Any]:
        """A tensor that is not quantized: the folded one, or else the original's."""
        block = self._partial.open_block(table.layer)
        return block.array(name) if name in block.specs else self._checkpoint.array(name)

    def _stored(self, module: str, norm: Tensor) -> NDArray[Any]:
        wide = self._checkpoint.spec(f"{module}.weight").dtype in ("F32", "F64")
        return norm.numpy().astype(np.float32 if wide else np.float16)

    # -- what lasts ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """From now on everything is rounded as it will be stored."""
        self._settled = True

    def write(self) -> None:
        """Leave the tuned blocks beside the others."""
        for table in self._tables:
            block = self._partial.open_block(table.layer)
            tensors = {name: block.raw(name) for name in block.specs}
            for module in table.linears:
                scales = self._scales(module, to_torch(block.array(f"{module}.scales").T))
                tensors[f"{module}.scales"] = np.ascontiguousarray(scales.half().numpy().T)
            for module in table.norms:
                tensors[f"{module}.weight"] = self._stored(module, self.learned[module])
            self._partial.save_tuned(table.layer, tensors)

    def save(self, step: int) -> None:
        """Keep what is learned so far, to go on from."""
        tensors = {f"learned.{name}": value for name, value in self.learned.items()}
        for name, pair in self._moments.items():
            tensors |= {f"first.{name}": pair[0], f"second.{name}": pair[1]}
        self._partial.save_state({name: value.numpy() for name, value in tensors.items()}, step)

    def load(self) -> int:
        """Go on from what was kept; returns how many steps are done."""
        found = self._partial.load_state()
        if found is None:
            return 0
        arrays, step = found
        for name in self.learned:
            self.learned[name] = to_torch(arrays[f"learned.{name}"])
            self._moments[name] = (to_torch(arrays[f"first.{name}"]), to_torch(arrays[f"second.{name}"]))
        return step


def tuned_output(
    checkpoint: Checkpoint, tables: list[BlockTable], partial: Partial, samples: list[Sample], device: str = "cpu"
) -> Tensor:
    """(B, S, C): what leaves the last tuned block, for B samples of S tokens."""
    hidden = embed_samples(checkpoint, samples, device)
    for table in tables:
        block, values = partial.final_block(table.layer), {}
        for part in table.parts:
            for name in tensor_names(part):
                module = name.removesuffix(".weight")
                if module in table.linears and name != module:
                    fields = {f: block.array(f"{module}.{f}") for f in FIELDS}
                    group = block.spec(f"{module}.qweight").shape[0] // block.spec(f"{module}.scales").shape[0]
                    values[name] = to_torch(dequantize(unpack(fields, module, group))).to(device)
                else:
                    values[name] = to_torch(block.array(name) if name in block.specs else checkpoint.array(name)).to(
                        device
                    )
        run_block(
            checkpoint.config.text, table.layer, JoinedTensors(table.parts, values), hidden, _BATCH, hidden, device
        )
    return hidden
