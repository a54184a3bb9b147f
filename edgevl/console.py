"""How verbs talk to people: notes and progress on stderr, one JSON document on stdout. Called by `edgevl.commands`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

Progress = Callable[[str, int, int], None]  # stage, done, total

_LINE_SECONDS = 10.0  # between two lines of progress where no bar can be drawn


def note(text: str) -> None:
    """One line for people, on stderr."""
    click.echo(text, err=True)


def print_json(document: object) -> None:
    """One JSON document, on stdout, on a line of its own."""
    click.echo(json.dumps(document, ensure_ascii=False))


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress with the time left on stderr; gives the function (stage, done, total) that moves it.

    On a terminal each stage has a bar; stages that differ only after their first word share one ("block 3", "block 4").
    Anywhere else each new stage is a line, and so is where a long one stands every ten seconds.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def move(stage: str, done: int, total: int) -> None:
            key = stage.split(" ")[0]
            if key not in tasks:
                tasks[key] = bar.add_task(stage, total=total)
            bar.update(tasks[key], description=stage, completed=done, total=total)

        yield move


def _progress_lines() -> Progress:
    """The same for logs and pipes."""
    begun: dict[str, float] = {}
    last = 0.0

    def move(stage: str, done: int, total: int) -> None:
        nonlocal last
        key, now = stage.split(" ")[0], time.monotonic()
        if key not in begun:
            begun[key], last = now, now
            note(f"{stage} …")
        elif now - last >= _LINE_SECONDS and 0 < done < total:
            last = now
            left = (now - begun[key]) / done * (total - done)
            note(f"{stage}: {100 * done // total} %, about {left:.0f} s left")

    return move


def table(title: str, headings: list[str], rows: list[list[str]], to_stderr: bool = False) -> None:
    """A table for people; without a heading line when all headings are empty."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(title=title or None, title_justify="left", show_header=any(headings))
    for heading in headings:
        view.add_column(heading, overflow="fold")
    for row in rows:
        view.add_row(*map(Text, row))  # plain text: a path may hold what rich takes for markup
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
