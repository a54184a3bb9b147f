"""The user's own calibration data: a folder of texts and pictures, or a file of JSON lines.

    folder   *.txt, and pictures NAME.png with NAME.txt beside them: a caption, or "user: …" / "assistant: …" turns
    JSONL    {"text": "…"}, {"messages": [{"role": "user", "content": "…"}, …]}, either with "image": "path" too;
             paths are relative to the file, and "text" beside an image is its caption

What is wrong with words is found when the data is read, before any work; a picture that cannot be read when its sample
is made, before any block. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.random import RandomState

from calibration.manifests import SETS
from calibration.texts import Document, Turn, parse_turns, shares_held_out
from edgevl.errors import UsageError
from edgevl.image import Picture, load_image

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_CAPTION = "Describe the picture."
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Shown:
    """A picture, opened when it is needed, and what is said about it."""

    open: Callable[[], Picture]
    turns: tuple[Turn, ...]  # the picture belongs to the first user's turn


def read_own(source: Path, seed: int) -> tuple[list[Document], list[Shown]]:
    """Texts and pictures of a folder or a .jsonl file, in an order given by the seed.

    Raises `UsageError` that names the file or the line: a source that does not exist or holds nothing, a picture
    without words, text that is not UTF-8, a line that is not one of the forms above, text that `edgevl measure` scores.
    """
    if source.suffix.lower() in (".jsonl", ".ndjson") and source.is_file():
        documents, shown = _lines(source)
    elif source.is_dir():
        documents, shown = _folder(source)
    else:
        raise UsageError(
            f"the calibration set {source} does not exist; use {', '.join(SETS)}, a folder, or a .jsonl file"
        )
    random = RandomState(seed)
    return (
        [documents[int(i)] for i in random.permutation(len(documents))],
        [shown[int(i)] for i in random.permutation(len(shown))],
    )


def _folder(folder: Path) -> tuple[list[Document], list[Shown]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = [path for path in files if path.suffix.lower() in _PICTURES]
    captions = {path.with_suffix(".txt") for path in pictures}
    texts = [path for path in files if path.suffix.lower() == ".txt" and path not in captions]
    if not texts and not pictures:
        raise UsageError(f"{folder} holds no *.txt files and no pictures; calibration needs some of either")
    shown = []
    for path in pictures:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise UsageError(f"{path} has no {caption.name} beside it; write a caption there")
        words = _read(caption)
        if not words.strip():
            raise UsageError(f"{caption} is empty; write what the picture shows there")
        _not_held_out(words, str(caption))
        talks = words.lstrip().startswith(tuple(f"{role}: " for role in _ROLES))
        shown.append(_shown(path, words, _complete(parse_turns(words), str(caption)) if talks else ()))
    documents = []
    for path in texts:
        text = _read(path)
        _not_held_out(text, str(path))
        documents.append(Document(text=text))
    return documents, shown


def _lines(file: Path) -> tuple[list[Document], list[Shown]]:
    documents: list[Document] = []
    shown: list[Shown] = []
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        text, turns, image = _entry(line, where)
        _not_held_out("\n".join([text, *(turn.text for turn in turns)]), where)
        if image is not None:
            path = file.parent / image
            if not path.is_file():
                raise UsageError(f"{where} names the picture {path}, which does not exist; correct the path")
            shown.append(_shown(path, text, turns))
        else:
            documents.append(Document(text=text, turns=turns))
    if not documents and not shown:
        raise UsageError(f"{file} holds no lines; each is an object with text or messages")
    return documents, shown


def _entry(line: str, where: str) -> tuple[str, tuple[Turn, ...], str | None]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UsageError(f"{where} is not JSON ({problem}); each line is one object with text or messages") from problem
    if not isinstance(entry, dict) or ("text" in entry) == ("messages" in entry):
        raise UsageError(f"{where} must be an object with either text or messages; correct or remove it")
    text, image = entry.get("text", ""), entry.get("image")
    if not isinstance(text, str) or ("text" in entry and not text.strip()):
        raise UsageError(f"{where}: text must be a string that is not empty; correct or remove it")
    if image is not None and not isinstance(image, str):
        raise UsageError(f"{where}: image must be the path of a picture; correct or remove it")
    return text, _turns(entry["messages"], where) if "messages" in entry else (), image


def _turns(messages: Any, where: str) -> tuple[Turn, ...]:
    turns = []
    for message in messages if isinstance(messages, list) else []:
        known = isinstance(message, dict) and message.get("role") in _ROLES
        if not known or not isinstance(message.get("content"), str):
            raise UsageError(
                f"{where}: each message needs a role (system, user or assistant) and a content string; "
                'a picture goes beside messages, as "image"'
            )
        turns.append(Turn(message["role"], message["content"]))
    if len(turns) < 2:
        raise UsageError(f"{where}: messages must be a list with at least a user's and an assistant's message")
    return _complete(tuple(turns), where)


def _shown(path: Path, words: str, turns: tuple[Turn, ...]) -> Shown:
    return Shown(lambda: load_image(path), turns or (Turn("user", _CAPTION), Turn("assistant", words.strip())))


def _complete(turns: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """The turns, which end with an answer and alternate; `UsageError` otherwise."""
    if turns[-1].role != "assistant":
        raise UsageError(f"{where} ends with the {turns[-1].role}; end each conversation with the assistant")
    talk = [turn.role for turn in turns[turns[0].role == "system" :]]
    if talk != ["user", "assistant"] * (len(talk) // 2):
        raise UsageError(
            f"{where} has the turns {', '.join(turn.role for turn in turns)}; after a system's, if there is one, "
            "a user's and an assistant's take turns"
        )
    return turns


def _not_held_out(text: str, where: str) -> None:
    if line := shares_held_out(text):
        raise UsageError(
            f"{where} holds text that edgevl measure scores ({line[:40]!r}…), and a model must not be calibrated on "
            "what it is judged by; remove it"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({problem})") from problem
