"""What rounding activations to int8 costs: `python -m benchmarks.activations ORIGINAL CHECKPOINT`.

The same int4 weights run with activations in f32 (torch, as `edgevl measure` does) and with those of the runtime's
kernels (int8 in groups of the weights' own), over the same held-out text; both are compared with the original.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from benchmarks.bundles import on_text
from calibration import held_out_text
from deploy.build import BuildSettings, build
from edgevl.bundle import Bundle
from edgevl.checkpoint import open_checkpoint
from edgevl.console import progress
from quantize.measure import compare


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
        own = on_text(first, Bundle.open(work), text, move)
    found = {
        "tokens": plain.tokens,
        "f32": {"kl": plain.kl, "perplexity": plain.perplexity_quantized, "top1": plain.top1},
        "int8": {"kl": own["kl"], "perplexity": own["perplexity"]["quantized"], "top1": own["top1"]},
        "kl_ratio": own["kl"] / plain.kl,
    }
    click.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
