"""`edgevl build`: a bundle from a checkpoint, quantized or not."""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgevl.console import bytes_text, note, print_json, progress


@click.command(name="build", short_help="Build a bundle for a target.")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the bundle.")
@click.option("--target", default="host", show_default=True, help="See `edgevl targets`.")
@click.option("--head", type=click.Choice(["f16", "f32", "int8", "int4"]), default="f16", show_default=True)
@click.option("--embed", type=click.Choice(["f16", "int8"]), default="f16", show_default=True, help="Embedding table.")
@click.option("--vision", type=click.Choice(["f16", "f32", "int8"]), default="f16", show_default=True)
@click.option("--body", type=click.Choice(["f16", "f32"]), default="f16", show_default=True, help="If not quantized.")
@click.option("--kv", type=click.Choice(["f16", "int8", "f32"]), default="f16", show_default=True, help="The KV cache.")
@click.option("--context", type=int, help="Tokens in and out together; default: what the model handles, to 16384.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str,
    output: Path,
    target: str,
    head: str,
    embed: str,
    vision: str,
    body: str,
    kv: str,
    context: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build MODEL (a checkpoint directory, GGUF file, Hugging Face id or "demo") into a bundle."""
    from deploy.build import BuildSettings, build

    settings = BuildSettings(target, body, head, embed, vision, kv, context, force)
    start = time.perf_counter()
    with progress() as move:
        digest = build(model, output, settings, move)
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    seconds = time.perf_counter() - start
    note(f"{output}: {bytes_text(size)}, built for {target} in {seconds:.0f} s")
    if as_json:
        print_json({"bundle": str(output), "digest": digest, "bytes": size, "seconds": round(seconds, 2)})
    else:
        click.echo(str(output))
