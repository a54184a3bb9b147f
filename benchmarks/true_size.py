"""`python -m benchmarks.true_size`: quantize a few blocks at the 8B's true sizes, and say what the whole would take.

Random bf16 weights of 4096 / 14336 with a vocabulary of 128,512 are written to disk, then quantized in a process of its
own, whose memory and seconds count. Every block takes as long as the next, so the time of all 32 follows. The defaults
need about 12 GB of disk and, on two cores, most of an hour; `--hidden 512 --ff 1792 --vocab 4096` is a try.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Sizes, write_llama
from edgevl.console import bytes_text, note, table

_LAYERS = 32  # of the 8B


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table and one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.true_size", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=Sizes.hidden)
    parser.add_argument("--ff", type=int, default=Sizes.ff)
    parser.add_argument("--vocab", type=int, default=Sizes.vocab)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--max-memory", type=float, help="GB")
    parser.add_argument("--max-activations", type=float, default=2.0, help="GB; more go to the disk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--work", type=Path, help="where the checkpoint is kept and found again; default: a temporary folder"
    )
    options = parser.parse_args(arguments)
    sizes = Sizes(
        options.hidden, options.ff, options.layers, options.hidden // 128, options.hidden // 512, options.vocab
    )
    with tempfile.TemporaryDirectory(prefix="edgevl-size-", dir=options.work) as folder:
        model = (options.work or Path(folder)) / "model-{hidden}-{ff}-{layers}-{vocab}".format(**vars(sizes))
        if not (model / "tokenizer_config.json").is_file():
            note(f"writing {model} …")
            write_llama(model, sizes)
        report = _in_a_process(_settings(options), model, Path(folder) / "out")
    result = _result(options, report)
    rows = [
        ["peak of its own memory", bytes_text(result["memory"]["peak_own_bytes"])],
        ["peak with mapped files", bytes_text(result["memory"]["peak_resident_bytes"])],
        ["of it the interpreter and its libraries", bytes_text(result["memory"]["interpreter_bytes"])],
        ["estimated for the rest", bytes_text(result["memory"]["estimated_bytes"])],
        ["a block", f"{result['seconds_a_block']:.1f} s"],
        [f"all {_LAYERS} blocks, predicted", f"{result['predicted_seconds'] / 60:.1f} min"],
    ]
    table(f"{options.layers} blocks of {options.hidden} / {options.ff}", ["", ""], rows)
    print(json.dumps(result))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "group_size": options.group_size,
        "effort": options.effort,
        "calibration": "text",
        "samples": options.samples,
        "length": options.length,
        "device": options.device,
        "max_memory": None if options.max_memory is None else int(options.max_memory * 1e9),
        "max_activations": int(options.max_activations * 1e9),
    }


def _in_a_process(settings: dict[str, Any], model: Path, out: Path) -> dict[str, Any]:
    """The report of a run in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_quantize, (settings, str(model), str(out)))


def _quantize(settings: dict[str, Any], model: str, out: str) -> dict[str, Any]:
    from edgevl.console import progress
    from quantize.job import quantize
    from quantize.settings import QuantizeSettings

    with progress() as move:
        return quantize(model, Path(out), QuantizeSettings(**settings), move)


def _result(options: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """What was measured. The prediction is a lower bound: comparing and writing at the end grow with the blocks."""
    each = statistics.median(block["seconds"] for block in report["blocks"])
    stages = report["stages"]
    others = stages["calibration"] + stages["measure"] + stages["check"] * _LAYERS / options.layers
    return {
        "command": "python -m benchmarks.true_size",
        "options": {k: v for k, v in vars(options).items() if k != "work"},
        "cpus": os.cpu_count(),
        "machine": report["machine"],
        "memory": report["memory"],
        "seconds_a_block": each,
        "stages": stages,
        "predicted_seconds": round(each * _LAYERS + others, 1),
    }


if __name__ == "__main__":
    main()
