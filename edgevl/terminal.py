"""What is typed and what is shown: lines from a terminal or a pipe, and an answer's text as it comes.

Knows no commands and no conversation. Called by `edgevl.dialogue` and `edgevl chat`.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from edgevl.console import note
from edgevl.errors import UsageError


def at_terminal() -> bool:
    """Whether a person types."""
    return sys.stdin is not None and sys.stdin.isatty()


def typed_lines() -> Iterator[str]:
    """Lines from a terminal, with editing; Ctrl-C clears the line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its line editing)
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:
                click.echo("> ", nl=False, err=True)
                yield input()
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit leaves")
        except EOFError:
            note("")
            return


def piped_lines() -> Iterator[str]:
    """Lines from a pipe or a file, until it ends; bytes that are no UTF-8 come as lone surrogates."""
    if sys.stdin is not None:  # None when the process was started without one
        for line in sys.stdin.buffer:
            yield line.decode("utf-8", "surrogateescape")


def check_text(where: str, text: str) -> None:
    """Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UsageError(f"{where} is not valid UTF-8 text; convert it first") from problem


def show_text(text: str) -> None:
    """A piece of the answer, at once; a terminal is spared the model's control characters."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    sys.stdout.write(text)  # click.echo would take colours out of an answer about colours
    sys.stdout.flush()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
