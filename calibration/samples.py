"""From documents and pictures to samples of exactly `length` tokens.

Text documents follow each other and are cut at the length, so no token is padding. A sample with a picture begins with
the picture, a question and its answer, and is filled up with text. Pictures get as many tiles as the sample has room
for. Negative ids are rows of the sample's own image embeddings: -1-r is row r.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from calibration.pictures import draw_record
from calibration.records import make_record
from calibration.texts import Document, Turn, documents, parse_turns
from edgevl.config import ModelConfig
from edgevl.errors import CapacityError, UsageError
from edgevl.image import Picture, cut_tiles, load_image
from edgevl.prompt import Message, PromptBuilder
from edgevl.tiling import fit_tiles, image_cost
from edgevl.tokenizer import Tokenizer

SETS = ("text", "image-text", "mixed")

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_KINDS = ("receipt", "table", "chart", "sign")
_CAPTION = "Describe the picture."


@dataclass(frozen=True)
class Sample:
    """One sequence. `tiles` (n, S, S, 3) uint8 of all its pictures in order, or None."""

    token_ids: tuple[int, ...]
    tiles: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class _Shown:
    """A picture and what is said about it."""

    picture: Picture
    turns: tuple[Turn, ...]  # the picture belongs to the first user's turn


def load(
    source: str | Path,
    tokenizer: Tokenizer,
    prompts: PromptBuilder,
    config: ModelConfig,
    samples: int,
    length: int,
    seed: int,
) -> list[Sample]:
    """`samples` sequences of `length` tokens from a built-in set or a directory of *.txt and pictures.

    A picture NAME.png belongs with NAME.txt, which holds a caption, or turns as in "user: …" and "assistant: …".
    Raises `UsageError` for a set that does not exist, a directory with too little in it, pictures for a model without
    eyes, or a length that no picture fits in; `ImageError` for a picture that cannot be read.
    """
    writer = _Writer(tokenizer, prompts, config, length)
    texts: Iterator[Document]
    if str(source) in SETS:
        texts, shown = documents(seed), _drawn(seed)
        share = {"text": 0.0, "image-text": 1.0, "mixed": 0.5}[str(source)]
    else:
        own, pictures = _directory(Path(source), seed)
        texts, shown = (iter(own) if own else documents(seed)), iter(pictures * samples)
        share = 0.5 if own and pictures else 1.0 if pictures else 0.0
    if share and config.vision is None:
        raise UsageError(f"the calibration set {source} has pictures and this model has no eyes; use the set text")
    stream = _Stream(writer.text_tokens(texts), str(source))
    result = []
    for i in range(samples):
        if int((i + 1) * share) > int(i * share):
            result.append(writer.picture_sample(next(shown), stream))
        else:
            result.append(Sample(tuple(stream.take(length, i))))
    return result


class _Stream:
    """Tokens of texts, one after the other."""

    def __init__(self, tokens: Iterator[list[int]], source: str) -> None:
        self._tokens, self._source = tokens, source
        self._held: list[int] = []

    def take(self, count: int, sample: int = 0) -> list[int]:
        while len(self._held) < count:
            more = next(self._tokens, None)
            if more is None:
                raise UsageError(
                    f"the texts in {self._source} give only {sample} sequences; add more text or lower --samples"
                )
            self._held += more
        taken, self._held = self._held[:count], self._held[count:]
        return taken


class _Writer:
    """Renders documents and pictures with the model's own template, tokenizer and tiling."""

    def __init__(self, tokenizer: Tokenizer, prompts: PromptBuilder, config: ModelConfig, length: int) -> None:
        self._tokenizer, self._prompts, self._config, self._length = tokenizer, prompts, config, length

    def text_tokens(self, texts: Iterable[Document]) -> Iterator[list[int]]:
        for document in texts:
            if document.turns:
                yield self._conversation(document.turns, None)[0]
            else:
                yield self._tokenizer.encode(document.text + "\n\n", specials=False)

    def picture_sample(self, shown: _Shown, filler: _Stream) -> Sample:
        """The picture's conversation, filled up with text to the length."""
        config = self._config
        assert config.vision is not None and config.tiling is not None, "checked by load"
        size, turns = shown.picture.size, shown.turns
        words = len(self._conversation(turns, shown.picture)[0])
        if words + config.vision.tile_tokens > self._length and len(turns) > 2:
            turns = turns[:2]
            words = len(self._conversation(turns, shown.picture)[0])
        try:
            tiling = fit_tiles([size], self._length - words, config.tiling, config.vision)
        except CapacityError as error:
            raise UsageError(
                f"a picture and its {words} tokens of text do not fit into sequences of {self._length} tokens; "
                f"one tile alone takes {config.vision.tile_tokens}, so use longer sequences or the set text"
            ) from error
        cost = image_cost(*size, tiling, config.vision)
        tiles = cut_tiles(shown.picture, cost.tiling, tiling, config.vision.tile_size)
        ids, places = self._conversation(turns, shown.picture, cost.tokens)
        for row, place in enumerate(places):
            ids[place] = -1 - row
        ids += filler.take(self._length - len(ids))
        return Sample(tuple(ids), np.asarray(tiles))

    def _conversation(
        self, turns: tuple[Turn, ...], picture: Picture | None, rows: int = 0
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation that ends with an answer, and the places of the picture's rows."""
        messages: list[Message] = []
        for turn in turns[:-1]:
            first = picture is not None and turn.role == "user" and not any(m.role == "user" for m in messages)
            parts = (picture, turn.text) if first and picture is not None else (turn.text,)
            messages.append(Message(turn.role, parts))
        prompt = self._prompts.build(tuple(messages), [rows] if picture is not None else [])
        ids = list(prompt.token_ids)
        places = [start + r for start, size, _ in prompt.images for r in range(size)]
        ends = [token for token in ids if token in self._config.tokens.stop]
        answer = self._tokenizer.encode(turns[-1].text, specials=False)
        return ids + answer + ends[-1:], places


def _drawn(seed: int) -> Iterator[_Shown]:
    """Drawn records, kinds taking turns, with one or two questions each."""
    random = RandomState(seed + 1)
    while True:
        for kind in _KINDS:
            record = make_record(random, kind)
            picture = load_image(draw_record(record, random))
            order = random.permutation(len(record.questions))[: int(random.randint(1, 3))]
            turns = [
                Turn(role, text)
                for i in order
                for role, text in zip(("user", "assistant"), record.questions[int(i)], strict=True)
            ]
            yield _Shown(picture, tuple(turns))


def _directory(folder: Path, seed: int) -> tuple[list[Document], list[_Shown]]:
    """A user's texts and pictures, in an order given by the seed."""
    if not folder.is_dir():
        raise UsageError(f"the calibration set {folder} does not exist; use {', '.join(SETS)} or a directory")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = [path for path in files if path.suffix.lower() in _PICTURES]
    captions = {path.with_suffix(".txt") for path in pictures}
    texts = [path for path in files if path.suffix.lower() == ".txt" and path not in captions]
    if not texts and not pictures:
        raise UsageError(f"{folder} holds no *.txt files and no pictures; calibration needs some of either")
    shown = []
    for path in pictures:
        if not path.with_suffix(".txt").is_file():
            raise UsageError(f"{path} has no {path.with_suffix('.txt').name} beside it; write a caption there")
        words = _read(path.with_suffix(".txt"))
        turns = parse_turns(words)
        complete = len(turns) >= 2 and turns[-1].role == "assistant" and any(t.role == "user" for t in turns)
        shown.append(
            _Shown(load_image(path), turns if complete else (Turn("user", _CAPTION), Turn("assistant", words.strip())))
        )
    random = RandomState(seed)
    documents_found = [Document(text=_read(path)) for path in texts]
    return (
        [documents_found[int(i)] for i in random.permutation(len(documents_found))],
        [shown[int(i)] for i in random.permutation(len(shown))],
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({problem})") from problem
