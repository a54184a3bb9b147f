"""The texts of the built-in sets: committed files, invented records, and the standard library's own documentation.

A committed file holds documents, each begun by a line "%% title". Documents titled "chat" hold turns ("user: …",
"assistant: …", "system: …") and are rendered with the model's chat template; the rest is plain text.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path

from numpy.random import RandomState

from calibration.records import make_record

_DATA = Path(__file__).with_name("data")
_LIBRARY: tuple[str, ...] = (
    "argparse",
    "asyncio",
    "collections",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "functools",
    "heapq",
    "io",
)
_LIBRARY += (
    "heapq",
    "io",
    "itertools",
    "json",
    "logging",
    "os",
    "pathlib",
    "random",
    "re",
    "sched",
    "statistics",
    "string",
)
_LIBRARY += ("subprocess", "tempfile", "textwrap", "threading", "unittest", "urllib.parse", "zipfile")
_ROLE = re.compile(r"^(system|user|assistant): ", re.MULTILINE)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str  # "system" | "user" | "assistant"
    text: str


@dataclass(frozen=True)
class Document:
    """A plain text, or a conversation that ends with the assistant."""

    text: str = ""
    turns: tuple[Turn, ...] = ()


def documents(seed: int) -> Iterator[Document]:
    """All built-in texts, kinds taking turns, the order within a kind by seed; never ends (invented records go on)."""
    random = RandomState(seed)
    files = [_shuffled(read_documents(_DATA / name), random) for name in ("chat.txt", "prose.txt", "code.txt")]
    library = _shuffled(list(_library()), random)
    for row in zip_longest(*files):
        yield from (document for document in row if document is not None)
        yield _record_document(random)
    for document in library:
        yield document
        yield _record_document(random)
    for _ in count():
        yield _record_document(random)


def held_out_text() -> str:
    """The text that `edgevl measure` reads by default; no calibration set contains any of it."""
    parts = read_documents(_DATA / "held_out.txt")
    return "\n\n".join(part.text for part in parts)


def read_documents(path: Path) -> list[Document]:
    """The documents of a file with "%% title" lines."""
    found = []
    for block in re.split(r"^%% ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = block.partition("\n")
        found.append(Document(turns=parse_turns(text)) if title == "chat" else Document(text=text.strip()))
    return found


def parse_turns(text: str) -> tuple[Turn, ...]:
    """Turns from "role: …" lines; a turn runs until the next such line."""
    pieces = _ROLE.split(text.strip())[1:]
    return tuple(Turn(role, words.strip()) for role, words in zip(pieces[::2], pieces[1::2], strict=True))


def _shuffled(items: list[Document], random: RandomState) -> list[Document]:
    return [items[int(i)] for i in random.permutation(len(items))]


def _record_document(random: RandomState) -> Document:
    record = make_record(random)
    question, answer = record.questions[int(random.randint(len(record.questions)))]
    if random.randint(2):
        return Document(turns=(Turn("user", f"{record.text}\n\n{question}"), Turn("assistant", answer)))
    return Document(text=record.text)


def _library() -> Iterator[Document]:
    """Docstrings of the running Python's standard library: the same for the same Python version."""
    for name in _LIBRARY:
        module = importlib.import_module(name)
        pieces = [inspect.getdoc(module) or ""]
        for attribute in sorted(vars(module)):
            value = vars(module)[attribute]
            if not attribute.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                pieces.append(inspect.getdoc(value) or "")
        text = "\n\n".join(piece for piece in pieces if len(piece) > 120)
        if text:
            yield Document(text=text[:6000])
