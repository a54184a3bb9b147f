"""From pictures and questions to regular batches: one sequence a picture, its questions side by side.

A sequence begins with the prompt up to the end of the last picture; then each question with its answer follows as a
branch that sees this beginning and itself, but no other branch. So the picture is paid for once and every answer is
learned as the product will ask for it. What an answer takes from the picture's own writing is spelled, a token a
character: so it is copied from image tokens that show characters, and words never seen in training are as easy as
others. Knows prompts and tokens; knows nothing of networks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image

from calibration.rendered import Question
from calibration.rendered.picture import Text
from edgevl.checkpoint import Checkpoint
from edgevl.demo import IMAGE_TOKENS
from edgevl.image import load_image
from edgevl.prompt import Message, PromptBuilder
from edgevl.tokenizer import Tokenizer
from training.feed import Seen

_STEP = 64  # tokens: sequences come in a few lengths only, which keeps torch's memory from falling to pieces
_MARKS = '.,:;!?"'


@dataclass(frozen=True)
class Sequences:
    """A batch of B sequences of S tokens. Ids below zero are rows: of the tiles first, then of the image tokens."""

    tokens: NDArray[np.int64]  # (B, S)
    positions: NDArray[np.int64]  # (B, S)
    branches: NDArray[np.int64]  # (B, S): 0 the shared beginning, then 1, 2, …; -1 padding
    rows: NDArray[np.int64]  # (L,) places in the flattened batch whose next token is learned
    targets: NDArray[np.int64]  # (L,)
    answers: NDArray[np.int64]  # (L,) number of the answer a target belongs to
    asked: tuple[tuple[str, Question], ...]  # kind and question of each answer
    tiles: NDArray[np.uint8]  # (n, 256, 256, 3)

    def visible(self) -> NDArray[np.bool_]:
        """(B, S, S): which token sees which."""
        b = self.branches
        causal = np.tri(b.shape[1], dtype=bool)
        sees = (b[:, None, :] == 0) | (b[:, None, :] == b[:, :, None])
        seen: NDArray[np.bool_] = causal & sees & (b[:, None, :] >= 0) | np.eye(b.shape[1], dtype=bool)
        return seen


class SequenceMaker:
    """Makes batches for one model."""

    def __init__(self, checkpoint: Checkpoint, length: int) -> None:
        self._tokenizer = Tokenizer(checkpoint.tokenizer_json())
        self._config, self._length = checkpoint.config, length
        self._builder = PromptBuilder(self._tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
        assert checkpoint.config.vision is not None
        self._tile_tokens = checkpoint.config.vision.tile_tokens
        self._stop = checkpoint.config.tokens.stop[-1]
        self._blank = load_image(Image.new("RGB", (32, 32)))
        self._ask = lru_cache(maxsize=200_000)(self._make_question)
        self._letters: dict[str, list[int]] = {}

    def batch(self, seen: Sequence[Seen], random: RandomState | None, empty: float = 1.0) -> Sequences:
        """One sequence for each picture; `random` orders the questions, and those that do not fit are left out.

        Of the first tile's image tokens that show neither writing nor a thing only the share `empty` is there, which
        makes sequences shorter; positions stay what they are.
        """
        shape = (len(seen), self._length)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        branches = np.full(shape, -1, np.int64)
        rows: list[tuple[int, int]] = []
        targets: list[int] = []
        answers: list[int] = []
        asked: list[tuple[str, Question]] = []
        tiles = sum(len(s.tiles) for s in seen)
        first_row = 0
        for i, one in enumerate(seen):
            head = self._beginning(len(one.tiles), first_row, tiles * self._tile_tokens)
            after = len(head)
            kept = np.arange(after)
            if random is not None and empty < 1:
                bare = (one.slots[:, 0] == 0) & (one.shown[:, 0] == 0) & (random.random_sample(len(one.slots)) >= empty)
                place = -1 - head - first_row  # number of the image token
                own = (head < 0) & (place < len(bare))
                kept = kept[~(own & bare[np.where(own, place, 0)])]
            first_row += len(one.tiles) * self._tile_tokens
            end = len(kept)
            tokens[i, :end], positions[i, :end], branches[i, :end] = head[kept], kept, 0
            written = _words(one.texts)
            order = random.permutation(len(one.questions)) if random else range(len(one.questions))
            for number, which in enumerate(order, 1):
                question = one.questions[int(which)]
                ask, answer = self._ask(question.question), self._answer(question.answer, written)
                ids = [*ask, *answer]
                if end + len(ids) > self._length:
                    continue
                span = slice(end, end + len(ids))
                tokens[i, span], branches[i, span] = ids, number
                positions[i, span] = after + np.arange(len(ids))
                begin = end + len(ask) - 1
                rows += [(i, place) for place in range(begin, begin + len(answer))]
                targets += answer
                answers += [len(asked)] * len(answer)
                asked.append((one.kind, question))
                end += len(ids)
        pixels = np.concatenate([s.tiles for s in seen])
        longest = int((branches >= 0).sum(axis=1).max())
        longest = min(self._length, longest + -longest % _STEP)
        places = np.array(rows)
        return Sequences(
            tokens[:, :longest],
            positions[:, :longest],
            branches[:, :longest],
            places[:, 0] * longest + places[:, 1],
            np.array(targets),
            np.array(answers),
            tuple(asked),
            pixels,
        )

    def _beginning(self, frames: int, first_row: int, special: int) -> NDArray[np.int64]:
        """The prompt up to the last </img>, with its rows."""
        ids, marks = self._head(frames)
        out = np.array(ids, np.int64)
        first = self._config.tokens.size - len(IMAGE_TOKENS)
        out = np.where(out >= first, -1 - (special + out - first), out)
        for start, count, picture in marks:
            out[start : start + count] = -1 - (first_row + picture * count + np.arange(count))
        return out

    @lru_cache(maxsize=8)  # noqa: B019
    def _head(self, frames: int) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]:
        prompt = self._builder.build([Message("user", (*[self._blank] * frames, "?"))], [self._tile_tokens] * frames)
        start, count, _ = prompt.images[-1]
        return prompt.token_ids[: start + count + 1], prompt.images

    def _make_question(self, question: str) -> tuple[int, ...]:
        prompt = self._builder.build([Message("user", (self._blank, question))], [1])
        start, count, _ = prompt.images[0]
        return prompt.token_ids[start + count + 1 :]

    def _answer(self, answer: str, written: frozenset[str]) -> list[int]:
        ids: list[int] = []
        for piece in re.findall(r"\s?\S+", answer):
            if piece.strip() in written or piece.strip().strip(_MARKS) in written:
                for letter in piece:
                    if letter not in self._letters:
                        self._letters[letter] = self._tokenizer.encode(letter, specials=False)
                    ids += self._letters[letter]
            else:
                ids += self._tokenizer.encode(piece, specials=False)
        return [*ids, self._stop]


def _words(texts: tuple[Text, ...]) -> frozenset[str]:
    """Everything that stands between two gaps, with and without punctuation marks around it."""
    whole = {word for text, _ in texts for word in text.split()}
    return frozenset(whole | {word.strip(_MARKS) for word in whole}) - {""}
