"""`edgevl measure`: perplexity, KL and top-1 agreement of a quantized checkpoint against its original. Needs torch."""

from __future__ import annotations

from pathlib import Path

import click

from edgevl.console import print_json, progress
from edgevl.errors import MissingExtraError, UsageError


@click.command(name="measure", short_help="Compare a quantized checkpoint with its original.")
@click.argument("model")
@click.argument("checkpoint")
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text; default: a held-out text of edgevl's own.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: str, checkpoint: str, text: Path | None, device: str, as_json: bool) -> None:
    """Compare CHECKPOINT, a quantized version of MODEL, with MODEL itself on text."""
    try:
        from quantize.measure import compare
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingExtraError("edgevl measure", "torch", "'edgevl[quantize]'") from error
        raise
    from calibration import held_out_text
    from edgevl.checkpoint import open_checkpoint

    try:
        words = held_out_text() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{text} cannot be read as UTF-8 text ({problem})") from problem
    with progress() as move:
        result = compare(open_checkpoint(model), open_checkpoint(checkpoint), words, device, move)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(f"tokens      {result.tokens}")
    click.echo(f"perplexity  {result.perplexity_original:.3f} -> {result.perplexity_quantized:.3f}")
    click.echo(f"KL          {result.kl:.4f} nats a token")
    click.echo(f"top-1       {100 * result.top1:.1f} % the same")
