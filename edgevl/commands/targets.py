"""`edgevl targets`: the table of machines."""

from __future__ import annotations

from dataclasses import asdict

import click

from edgevl.console import print_json, table
from edgevl.targets import TARGETS


@click.command(name="targets", short_help="List what bundles can be built for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """List the targets of `edgevl build`."""
    if as_json:
        print_json([asdict(t) for t in TARGETS])
        return
    rows = [[t.name, t.machine, t.architecture, t.backend] for t in TARGETS]
    table("", ["target", "machine", "architecture", "backend"], rows)
