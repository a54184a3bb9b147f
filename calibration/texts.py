"""The texts of the built-in sets: committed files, rendered documents read aloud, and Python's own documentation.

A committed file holds documents, each begun by a line "%% title". Documents titled "chat" hold turns ("user: …",
"assistant: …", "system: …") and are rendered with the model's chat template; the rest is plain text.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, zip_longest
from pathlib import Path

from numpy.random import RandomState

from calibration.rendered import rendered_picture

_DATA = Path(__file__).with_name("data")
_LIBRARY: tuple[str, ...] = (
    *("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "difflib", "functools", "heapq"),
    *("io", "itertools", "json", "logging", "os", "pathlib", "random", "re", "sched", "statistics", "string"),
    *("subprocess", "tempfile", "textwrap", "threading", "unittest", "urllib.parse", "zipfile"),
)
# kinds of rendered pictures whose text alone answers the questions about them
_READABLE = ("receipt", "form", "table", "sign", "lines")
FIRST_READ = 2_000_000  # rendered pictures of this number and above are read aloud; those below are shown
_TELLING = 60  # characters; shorter lines may be in any two texts
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
    """All built-in texts, kinds taking turns, the order within a kind by seed; never ends (rendered ones go on).

    Raises `MissingExtraError` without the fonts of the rendered documents.
    """
    random = RandomState(seed)
    files = [_shuffled(read_documents(_DATA / name), random) for name in ("chat.txt", "prose.txt", "code.txt")]
    library = _shuffled(list(_library()), random)
    numbers = count(FIRST_READ + 10_000 * seed % FIRST_READ)
    for row in zip_longest(*files):
        yield from (document for document in row if document is not None)
        yield _read_aloud(next(numbers))
    for document in library:
        yield document
        yield _read_aloud(next(numbers))
    for number in numbers:
        yield _read_aloud(number)


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


def shares_held_out(text: str) -> str | None:
    """A line of the held-out text that is in `text` too, or None; short lines do not count."""
    lines = _held_out_lines()
    return next((line for line in map(str.strip, text.splitlines()) if line in lines), None)


@lru_cache(maxsize=1)
def _held_out_lines() -> frozenset[str]:
    return frozenset(line.strip() for line in held_out_text().splitlines() if len(line.strip()) > _TELLING)


def parse_turns(text: str) -> tuple[Turn, ...]:
    """Turns from "role: …" lines; a turn runs until the next such line."""
    pieces = _ROLE.split(text.strip())[1:]
    return tuple(Turn(role, words.strip()) for role, words in zip(pieces[::2], pieces[1::2], strict=True))


def _shuffled(items: list[Document], random: RandomState) -> list[Document]:
    return [items[int(i)] for i in random.permutation(len(items))]


def _read_aloud(number: int) -> Document:
    """What a rendered document says, every other time with a question about it and the answer."""
    made = rendered_picture("calibration", number, _READABLE[number % len(_READABLE)])
    text = "\n".join(line for line, _ in made.texts)
    asked = [question for question in made.questions if question.task != "other"]
    if number % 2 and asked:
        question = asked[number // 2 % len(asked)]
        return Document(turns=(Turn("user", f"{text}\n\n{question.question}"), Turn("assistant", question.answer)))
    return Document(text=text)


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
