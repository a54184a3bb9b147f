"""From documents and pictures to samples of exactly `length` tokens.

Text documents follow each other and are cut at the length, so no token is padding. A sample with a picture begins with
the picture, a question and its answer, and is filled up with text. Pictures get as many tiles as the sample has room
for. Negative ids are rows of the sample's own image embeddings: -1-r is row r.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from calibration.manifests import SETS, manifest
from calibration.own import Shown, read_own
from calibration.rendered import rendered_picture
from calibration.texts import FIRST_READ, Document, Turn, documents
from edgevl.config import ModelConfig
from edgevl.errors import CapacityError, UsageError
from edgevl.image import Picture, cut_tiles, load_image
from edgevl.prompt import Message, PromptBuilder
from edgevl.tiling import fit_tiles, image_cost
from edgevl.tokenizer import Tokenizer

_RUN = 32  # tokens of a fingerprint


@dataclass(frozen=True)
class Sample:
    """One sequence. `tiles` (n, S, S, 3) uint8 of all its pictures in order, or None."""

    token_ids: tuple[int, ...]
    tiles: NDArray[np.uint8] | None = None


def load(
    source: str | Path,
    tokenizer: Tokenizer,
    prompts: PromptBuilder,
    config: ModelConfig,
    samples: int,
    length: int,
    seed: int,
    written: Iterator[list[int]] | None = None,
) -> list[Sample]:
    """`samples` sequences of `length` tokens from a built-in set, or a user's folder or .jsonl file (`own`).

    `written`: for the set "self", tokens that the model wrote. Raises `UsageError` for a set that does not exist, data
    with too little in it, pictures for a model without eyes, or a length that no picture fits in; `ImageError` for a
    picture that cannot be read.
    """
    writer = _Writer(tokenizer, prompts, config, length)
    tokens: Iterator[list[int]]
    shown: Iterator[Shown] = iter(())
    if str(source) in SETS:
        share = float(manifest(str(source))["pictures"])
        if source == "self":
            assert written is not None, "the caller lets the model write"
            tokens, share = written, share if config.vision is not None else 0.0
        else:
            tokens = writer.text_tokens(documents(seed))
        shown = _rendered(seed)
    else:
        own, pictures = read_own(Path(source), seed)
        tokens = writer.text_tokens(iter(own) if own else documents(seed))
        share = 0.5 if own and pictures else 1.0 if pictures else 0.0
        shown = cycle(pictures)
    if share and config.vision is None:
        raise UsageError(f"the calibration set {source} has pictures and this model has no eyes; use the set text")
    stream = _Stream(tokens, str(source))
    result = []
    for i in range(samples):
        if int((i + 1) * share) > int(i * share):
            result.append(writer.picture_sample(next(shown), stream))
        else:
            result.append(Sample(tuple(stream.take(length, i))))
    return result


def describe(source: str | Path, samples: list[Sample], seed: int) -> dict[str, Any]:
    """What was used, for a report: the set and its sources, counts, and a digest of all tokens and pixels."""
    if str(source) in SETS:
        known = manifest(str(source))
    else:
        filled = all(sample.tiles is not None for sample in samples)
        what = "the user's own pictures, filled up with built-in texts" if filled else "the user's own"
        known = {"name": Path(source).name, "what": what}
    return {
        **known,
        "seed": seed,
        "samples": len(samples),
        "length": len(samples[0].token_ids),
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "pictures": sum(sample.tiles is not None for sample in samples),
        "image_tokens": sum(token < 0 for sample in samples for token in sample.token_ids),
        "sha256": digest(samples),
        "fingerprints": sorted(fingerprints(samples)),
    }


def digest(samples: list[Sample]) -> str:
    """SHA-256 over all tokens and pixels."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(np.asarray(sample.token_ids, np.int64).tobytes())
        if sample.tiles is not None:
            sha.update(np.ascontiguousarray(sample.tiles).tobytes())
    return sha.hexdigest()


def fingerprints(samples: list[Sample]) -> set[str]:
    """Short digests of each 32 tokens of text, by which a text that was calibrated on is known again."""
    runs = (s.token_ids[i : i + _RUN] for s in samples for i in range(0, len(s.token_ids) - _RUN + 1, _RUN))
    return {_fingerprint(run) for run in runs if min(run) >= 0}


def overlap(token_ids: list[int], known: set[str]) -> float:
    """The share of a text's tokens that lie in a run whose fingerprint is known."""
    covered = np.zeros(len(token_ids), bool)
    for i in range(len(token_ids) - _RUN + 1):
        if _fingerprint(token_ids[i : i + _RUN]) in known:
            covered[i : i + _RUN] = True
    return float(covered.mean()) if len(covered) else 0.0


def _fingerprint(run: Iterable[int]) -> str:
    return hashlib.sha256(np.asarray(tuple(run), np.int64).tobytes()).hexdigest()[:12]


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

    def picture_sample(self, shown: Shown, filler: _Stream) -> Sample:
        """The picture's conversation, filled up with text to the length."""
        config = self._config
        assert config.vision is not None and config.tiling is not None, "checked by load"
        picture, turns = shown.open(), shown.turns
        words = len(self._conversation(turns, picture)[0])
        if words + config.vision.tile_tokens > self._length and len(turns) > 2:
            turns = turns[: [turn.role for turn in turns].index("assistant") + 1]
            words = len(self._conversation(turns, picture)[0])
        try:
            tiling = fit_tiles([picture.size], self._length - words, config.tiling, config.vision)
        except CapacityError as error:
            raise UsageError(
                f"a picture and its {words} tokens of text do not fit into sequences of {self._length} tokens; "
                f"one tile alone takes {config.vision.tile_tokens}, so use longer sequences or the set text"
            ) from error
        cost = image_cost(*picture.size, tiling, config.vision)
        tiles = cut_tiles(picture, cost.tiling, tiling, config.vision.tile_size)
        ids, places = self._conversation(turns, picture, cost.tokens)
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


def _rendered(seed: int) -> Iterator[Shown]:
    """Rendered pictures, with two of their questions each."""
    for number in count(10_000 * seed % FIRST_READ):
        made = rendered_picture("calibration", number)
        asked = [made.questions[int(i)] for i in RandomState(number).permutation(len(made.questions))[:2]]
        turns = [turn for q in asked for turn in (Turn("user", q.question), Turn("assistant", q.answer))]
        yield Shown(partial(load_image, made.frames[0]), tuple(turns))
