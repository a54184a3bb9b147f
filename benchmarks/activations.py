"""What rounding activations to int8 costs: `python -m benchmarks.activations ORIGINAL CHECKPOINT`.

The same int4 weights run with activations in f32 (torch, as `edgevl measure` does) and with those of the runtime's
kernels (int8 in groups of the weights' own), over the same held-out text; both are compared with the original.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn import functional

from calibration import Sample, held_out_text
from deploy.build import BuildSettings, build
from edgevl.backends.cpu import CpuRunner
from edgevl.bundle import Bundle
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.console import progress
from edgevl.runner import Limits
from quantize.measure import compare, last_hidden, text_tokens
from quantize.part_tensors import CheckpointParts
from quantize.torch_ops import TorchOps

_STEP = 64  # tokens in a step of the runtime, and rows of logits


@click.command()
@click.argument("original")
@click.argument("checkpoint")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="A folder for the bundle; kept.")
def main(original: str, checkpoint: str, work: Path) -> None:
    """Print KL and perplexity with f32 and with int8 activations as JSON."""
    first, second = open_checkpoint(original), open_checkpoint(checkpoint)
    text = held_out_text()
    with progress() as move, torch.inference_mode():
        plain = compare(first, second, text, progress=move)
        if not (work / "manifest.json").is_file():
            build(checkpoint, work, BuildSettings(head="f16", kv="f16"), move)
        ids = text_tokens(first, text)
        wanted = last_hidden(first, [Sample(tuple(row)) for row in ids], "cpu", lambda d, n: move("original", d, n))
        kl, perplexity, top1 = _runtime(first, Bundle.open(work), ids, wanted)
    found = {
        "tokens": plain.tokens,
        "f32": {"kl": plain.kl, "perplexity": plain.perplexity_quantized, "top1": plain.top1},
        "int8": {"kl": kl, "perplexity": perplexity, "top1": top1},
        "kl_ratio": kl / plain.kl,
    }
    click.echo(json.dumps(found, indent=2))


def _runtime(
    original: Checkpoint, bundle: Bundle, ids: list[list[int]], wanted: torch.Tensor
) -> tuple[float, float, float]:
    """Mean KL(original ‖ runtime), perplexity and top-1 agreement of the runtime's own logits."""
    config, real = bundle.manifest.model, original.config.tokens.size
    limits = Limits(context=len(ids[0]), slots=1, chunk=_STEP, logit_rows=_STEP, tiles=1, kv="f16")
    runner = CpuRunner(config, limits, bundle.weight)
    parts = CheckpointParts(original)
    parts.keep(("norm", "head"))
    ops, totals = TorchOps(parts, 1), np.zeros(4)
    for row, states in zip(ids, wanted, strict=True):
        for begin in range(0, len(row), _STEP):
            tokens = np.array(row[begin : begin + _STEP], np.int32)
            places = np.arange(begin, begin + len(tokens), dtype=np.int32)
            rows = np.arange(len(tokens), dtype=np.int32)
            logits = runner.decode(tokens, places, np.zeros_like(tokens), None, rows)
            own = functional.log_softmax(torch.from_numpy(logits[:, :real].copy()).double(), dim=1)
            x = ops.rms_norm(
                states[begin : begin + len(tokens)], ops.norm_weight("norm"), original.config.text.rms_norm_eps
            )
            goal = functional.log_softmax(ops.linear(x, ops.linear_weight("head"))[:, :real].double(), dim=1)
            known = len(row) - 1 - begin  # the last token's next is not known
            own, goal = own[:known], goal[:known]
            following = torch.tensor(row[begin + 1 : begin + 1 + len(own)])
            totals += (
                float((goal.exp() * (goal - own)).sum()),
                -float(own.gather(1, following[:, None]).sum()),
                float((own.argmax(dim=1) == goal.argmax(dim=1)).sum()),
                len(own),
            )
    kl, loss, same = totals[:3] / totals[3]
    return kl, float(np.exp(loss)), same


if __name__ == "__main__":
    main()
