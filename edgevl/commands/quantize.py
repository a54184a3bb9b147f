"""`edgevl quantize`: an int4 AWQ checkpoint from an original one. Needs torch, which is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgevl.console import note, print_json, progress
from edgevl.errors import MissingExtraError, UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@click.command(name="quantize", short_help="Make an int4 AWQ checkpoint.")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the new checkpoint.")
@click.option("--scheme", type=click.Choice(["asym", "sym"]), default="asym", show_default=True, help="Zero points.")
@click.option("--group-size", type=int, help="128, 64 or 32; default: the largest that divides all widths.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "balanced", "best"]),
    default="balanced",
    show_default=True,
    help="fast: AWQ scales and clips; balanced: then each block learns codes and scales; best: three times the steps.",
)
@click.option(
    "--calibration",
    help="text, image-text, mixed, self, a folder, or a .jsonl file; default: mixed, text without eyes.",
)
@click.option("--samples", type=int, default=32, show_default=True, help="Calibration sequences.")
@click.option("--length", type=int, default=512, show_default=True, help="Tokens of each sequence.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn at random.")
@click.option(
    "--max-memory",
    help="Most memory to hold beside Python itself and mapped files, such as 8GB; refused at once if it cannot work.",
)
@click.option(
    "--max-activations", default="2GiB", show_default=True, help="Most calibration activations to hold in memory."
)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Compare both models on a held-out text.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same settings.")
@click.option("--force", is_flag=True, help="Replace what lies at the output, once the new checkpoint is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str,
    output: Path,
    scheme: str,
    group_size: int | None,
    effort: str,
    calibration: str | None,
    samples: int,
    length: int,
    device: str,
    seed: int,
    max_memory: str | None,
    max_activations: str,
    measure: bool,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL (a directory, a GGUF file, a Hugging Face id, or "demo") to int4 with AWQ.

    The output is a Hugging Face checkpoint in AutoAWQ's GEMM layout with report.html and report.json. An interrupted
    run goes on with --resume, to the same bytes.
    """
    limit = None if max_memory is None else parse_size(max_memory)
    held = parse_size(max_activations, "--max-activations")
    try:
        from quantize.job import quantize
        from quantize.settings import QuantizeSettings
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingExtraError("edgevl quantize", "torch", "'edgevl[quantize]'") from error
        raise
    settings = QuantizeSettings(
        group_size=group_size,
        scheme=scheme,
        effort=effort,
        calibration=calibration,
        samples=samples,
        length=length,
        device=device,
        seed=seed,
        max_memory=limit,
        max_activations=held,
        measure=measure,
        resume=resume,
        force=force,
    )
    try:
        with progress() as move:
            report = quantize(model, output, settings, move)
    except KeyboardInterrupt:
        note(f"Finished blocks are kept in {output}.partial; add --resume to go on with them.")
        raise
    _summary(report, output, group_size is None)
    if as_json:
        print_json(report)
    else:
        click.echo(str(output))


def parse_size(text: str, option: str = "--max-memory") -> int:
    """Bytes of "8GB", "512MiB" or a plain number; `UsageError` for anything else."""
    words = text.strip().upper()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if words.endswith(u)), "")
    try:
        value = float(words.removesuffix(unit))
    except ValueError:
        value = -1.0
    if not 0 < value < 1e15:
        raise UsageError(f"{option} {text} is not a size; write it as 8GB, 512MiB or a number of bytes")
    return int(value * _UNITS.get(unit, 1))


def _summary(report: dict[str, Any], output: Path, chosen: bool) -> None:
    """What was quantized, what was kept and why, on stderr."""
    settings = report["settings"]
    why = ", the largest that divides all widths" if chosen else ""
    note(f"int4, {settings['scheme']}, groups of {settings['group_size']}{why}: {report['quantized']}")
    for name, reason in report["kept"].items():
        note(f"kept {name}: {reason}")
    if quality := report["quality"]:
        before, after = quality["perplexity"].values()
        note(
            f"on {quality['tokens']} held-out tokens: perplexity {before:.3f} -> {after:.3f}, KL {quality['kl']:.4f}, "
            f"top-1 {100 * quality['top1']:.1f} % the same"
        )
    note(
        f"mean error of a block's output {report['error']:.4f}, {report['seconds']:.0f} s; "
        f"details in {output / 'report.html'}"
    )
