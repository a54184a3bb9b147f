"""`python -m training OUT`: from nothing to the demo's eyes; stop it at any time, and the same command goes on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import click

from edgevl.errors import EdgevlError
from training.plan import PLANS


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--plan", "name", type=click.Choice(sorted(PLANS)), default="cpu", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--stage", type=click.Choice(["tower", "language", "reader", "all"]), default="all", show_default=True)
@click.option("--tower-steps", type=click.IntRange(min=1), help="Instead of the plan's.")
@click.option("--language-steps", type=click.IntRange(min=1), help="Instead of the plan's.")
@click.option("--reader-steps", type=click.IntRange(min=1), help="Instead of the plan's.")
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True), help="Begin with these weights, not random ones."
)
@click.option("--threads", type=int, help="Of torch; default: all cores.")
def main(
    folder: Path,
    name: str,
    device: str,
    stage: str,
    tower_steps: int | None,
    language_steps: int | None,
    reader_steps: int | None,
    start: Path | None,
    threads: int | None,
) -> None:
    """Train into FOLDER, or go on with what lies there, and write FOLDER/demo_eyes.safetensors."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from training.run import run

    if threads:
        torch.set_num_threads(threads)
    steps = {"tower_steps": tower_steps, "language_steps": language_steps, "reader_steps": reader_steps}
    plan = dataclasses.replace(PLANS[name], **{key: value for key, value in steps.items() if value})
    try:
        run(folder, plan, device, stage, start)
    except EdgevlError as error:
        click.echo(f"training: {error}", err=True)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
