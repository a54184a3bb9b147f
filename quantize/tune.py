"""Tuning end to end: codes, scales and norms learn together to give back what rounding took.

The places of all weights between their codes, each group scale of the decoder and each norm learn to bring the
quantized model's next-token distribution back to the original's (KL divergence), in a few passes over the calibration
sequences. Places are moved by the sign of their slopes, as in `quantize.reconstruct`; scales and norms by Adam. One
block is in memory at a time: a step runs the blocks forward and keeps what enters each, then goes back through them,
computes each once more with gradients and updates it on the spot; the places are a mapped file. Some sequences are kept
aside; unless those gain, nothing is changed. The state is saved every few steps, so an interrupted run ends with the
same bytes. Called by `quantize.job`.
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
from edgevl.awq_format import FIELDS, pack, unpack
from edgevl.checkpoint import Checkpoint
from edgevl.errors import EdgevlError
from edgevl.models.decoder import decoder_block
from edgevl.models.names import tensor_names
from edgevl.weights import dequantize
from quantize.embed import embed_samples
from quantize.groups import BlockTable
from quantize.learned import LearnedLinear
from quantize.measure import last_hidden
from quantize.observe import run_block
from quantize.part_tensors import CheckpointParts, JoinedTensors, to_torch
from quantize.partial import Partial
from quantize.rounding import grouped
from quantize.torch_ops import TorchOps, batch_step, coarse_pays

Progress = Callable[[str, int, int], None]  # stage, done, total

BATCH = 4  # sequences of a step
_RATE = 1e-3  # of Adam, at its peak
_REACH = 0.25  # of a step of the grid: how far all updates together can move a weight
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
    passes: int,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> Tuning:
    """Tune the finished blocks of an unfinished run, in `passes` over the samples; what comes of them is left beside.

    Raises `EdgevlError` when the loss is no number.
    """
    if (found := partial.tuning()) is not None:
        return Tuning(**found)
    apart = [s for i, s in enumerate(samples) if i % _ASIDE == _ASIDE - 1] or samples[-1:]
    taught = [s for i, s in enumerate(samples) if i % _ASIDE != _ASIDE - 1] or samples
    each = -(-len(taught) // BATCH)
    steps = passes * each
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
        order = torch.randperm(len(taught), generator=torch.Generator().manual_seed(step // each))
        rows = order[step % each * BATCH :][:BATCH].sort().values
        network.learn(entered[rows], wanted[rows], known[rows], step, steps)
        if (step + 1) % _SAVED == 0:
            network.save(step + 1)
    progress("tune", steps, steps)
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
        shapes = {}
        for table in tables:
            block = partial.open_block(table.layer)
            for module in table.linears:
                groups, n = block.spec(f"{module}.scales").shape
                self.learned[module] = torch.zeros(n, groups)
                shapes[module] = (n, block.spec(f"{module}.qweight").shape[0])
            for module in table.norms:
                self.learned[module] = to_torch(self._float(table, f"{module}.weight"))
        self._moments = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.learned.items()
        }
        # by module: where each weight (N, K) lies, less the code it began with
        self.moved = partial.moved(shapes)
        self._coarse = coarse_pays(device)

    # -- one step -----------------------------------------------------------------------------------------------

    def learn(self, entered: Tensor, wanted: Tensor, known: Tensor, step: int, steps: int) -> None:
        """One update of everything from B sequences: what enters the first block and leaves the original's last."""
        inputs = [entered]
        with torch.no_grad():
            for table in self._tables:
                values = self._values(table, self._linears(table))
                inputs.append(self._run(table, values, inputs[-1], self._coarse))
        slope, loss = self._loss(inputs.pop(), wanted, known, gradient=True)
        if not math.isfinite(loss):
            raise EdgevlError("tuning met a loss that is no number; use --effort balanced, or calibrate on other data")
        rate = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        far = 2 * (1 - (step + 0.5) / steps) / steps
        for table in reversed(self._tables):
            linears = self._linears(table)
            values = self._values(table, linears)
            own = {name: values[f"{name}.weight"].requires_grad_() for name in (*table.linears, *table.norms)}
            x = inputs.pop().to(self._device).requires_grad_()
            with torch.enable_grad():
                y = self._run(table, values, x, self._coarse)
            slope, *slopes = torch.autograd.grad(y, [x, *own.values()], slope)
            for name, found in zip(own, slopes, strict=True):
                if name not in linears:
                    self._update(name, found, rate, step)
                    continue
                place, stretch = linears[name].slopes(found)
                self._update(name, stretch.cpu(), rate, step)
                self.moved[name] -= (_REACH * far * place.sign()).flatten(1).cpu().numpy().astype(np.float16)

    def distance(self, entered: Tensor, wanted: Tensor, known: Tensor) -> float:
        """Mean KL to the original on B sequences."""
        total = 0.0
        with torch.no_grad():
            for begin in range(0, len(entered), BATCH):
                rows = slice(begin, begin + BATCH)
                x = entered[rows]
                for table in self._tables:
                    x = self._run(table, self._values(table, self._linears(table)), x)
                total += self._loss(x, wanted[rows], known[rows], gradient=False)[1] * len(x)
        return total / len(entered)

    def _run(self, table: BlockTable, values: dict[str, Tensor], x: Tensor, coarse: bool = False) -> Tensor:
        x = x.to(self._device)
        ops = TorchOps(JoinedTensors(table.parts, values), x.shape[1], coarse=coarse)
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

    def _linears(self, table: BlockTable) -> dict[str, LearnedLinear]:
        """The block's linears as they are by now."""
        block, linears = self._partial.open_block(table.layer), {}
        for module in table.linears:
            weight = unpack({f: block.array(f"{module}.{f}") for f in FIELDS}, module, self._group(table, module))
            codes, moved, scales, zeros = (
                torch.from_numpy(array.astype(np.float32)).to(self._device)
                for array in (weight.codes, self.moved[module], weight.scales, weight.zeros)
            )
            place = grouped(codes.add_(moved), weight.group_size)
            linears[module] = LearnedLinear(place, scales, zeros, self.learned[module].to(self._device))
        return linears

    def _values(self, table: BlockTable, linears: dict[str, LearnedLinear]) -> dict[str, Tensor]:
        """The block's tensors by checkpoint names, as they would be stored by now."""
        values = {f"{module}.weight": linear.weight() for module, linear in linears.items()}
        for module in table.norms:
            values[f"{module}.weight"] = to_torch(self._stored(module, self.learned[module])).to(self._device)
        for part in table.parts:
            for name in tensor_names(part)[len(part.sources) :]:
                values[name] = to_torch(self._float(table, name)).to(self._device)
        return values

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

    def write(self) -> None:
        """Leave the tuned blocks beside the others."""
        for table in self._tables:
            block = self._partial.open_block(table.layer)
            tensors = {name: block.raw(name) for name in block.specs}
            for module, linear in self._linears(table).items():
                tensors |= {f"{module}.{field}": array for field, array in pack(linear.stored()).items()}
            for module in table.norms:
                tensors[f"{module}.weight"] = self._stored(module, self.learned[module])
            self._partial.save_tuned(table.layer, tensors)

    def save(self, step: int) -> None:
        """Keep what is learned so far, to go on from."""
        tensors = {f"learned.{name}": value.numpy() for name, value in self.learned.items()}
        for name, pair in self._moments.items():
            tensors |= {f"first.{name}": pair[0].numpy(), f"second.{name}": pair[1].numpy()}
        tensors |= {f"moved.{name}": array for name, array in self.moved.items()}
        self._partial.save_state(tensors, step)

    def load(self) -> int:
        """Go on from what was kept, or begin; returns how many steps are done."""
        found = self._partial.load_state()
        if found is None:
            for table in self._tables:
                for module, array in self._partial.load_places(table.layer).items():
                    self.moved[module][:] = array
            return 0
        arrays, step = found
        for name in self.learned:
            self.learned[name] = to_torch(arrays[f"learned.{name}"])
            self._moments[name] = (to_torch(arrays[f"first.{name}"]), to_torch(arrays[f"second.{name}"]))
        for name, array in self.moved.items():
            array[:] = arrays[f"moved.{name}"]
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
            checkpoint.config.text, table.layer, JoinedTensors(table.parts, values), hidden, BATCH, hidden, device
        )
    return hidden
