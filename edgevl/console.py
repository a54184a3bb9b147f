"""How verbs talk to people: notes and progress on stderr, one JSON document on stdout. Called by `edgevl.commands`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

Progress = Callable[[str, int, int], None]  # stage, done, total


def note(text: str) -> None:
    """One line for people, on stderr."""
    click.echo(text, err=True)


def print_json(document: object) -> None:
    """One JSON document, on stdout, on a line of its own."""
    click.echo(json.dumps(document, ensure_ascii=False))


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars with the time left on stderr, one for each stage; gives the function (stage, done, total) that moves them.

    Stages that differ only after their first word share a bar ("block 3", "block 4").
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def move(stage: str, done: int, total: int) -> None:
            key = stage.split(" ")[0]
            if key not in tasks:
                tasks[key] = bar.add_task(stage, total=total)
            bar.update(tasks[key], description=stage, completed=done, total=total)

        yield move


def table(title: str, headings: list[str], rows: list[list[str]], to_stderr: bool = False) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title or None, title_justify="left")
    for heading in headings:
        view.add_column(heading, overflow="fold")
    for row in rows:
        view.add_row(*row)
    stream = sys.stderr if to_stderr else sys.stdout
    Console(file=stream, width=None if stream.isatty() else 120).print(view)


def bytes_text(count: int) -> str:
    """ "12.3 MB": decimal units, three figures."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
