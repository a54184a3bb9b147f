"""The language model learns to read image tokens: ideal ones first, then the tower's own.

The first of the two (stage "language") needs no tower: the image tokens are what `Writing` wants of one, with some
characters wrong. The second (stage "reader") goes on with those of the finished tower. What is trained are low-rank
updates of the language model and the rows of the image tokens; on plain text the updated model must stay close to the
untouched one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter, functional

from calibration.texts import documents
from edgevl.checkpoint import Checkpoint
from edgevl.ops import Step
from edgevl.prompt import Message, PromptBuilder
from edgevl.tokenizer import Tokenizer
from training.feed import Feed, Seen, held_out
from training.journal import Journal
from training.network import Eyes, Reader, working_dtype
from training.optimizers import Optimizers
from training.plan import Plan, learning_rate
from training.sequences import SequenceMaker, Sequences
from training.state import load, save
from training.writing import Labels, Writing

_TEXT = 1.0  # weight of the distance on plain text
_TEXT_EVERY = 3  # steps between looks at it, each of which counts as many times
_TEXT_TOKENS = 192  # of the plain text in each look
_CODES = 2.0  # how much faster than the language model the codes learn
_EMPTY = 0.25  # of image tokens that show neither writing nor a thing, how many are there in training
_TEXTS = 160  # documents that it is taken from

Look = Callable[[list[Seen]], Tensor]  # pictures -> the image tokens of all their tiles


def train_language(reader: Reader, writing: Writing, checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Train on ideal image tokens until `plan.language_steps`, codes and all, going on from the folder's state."""
    device = str(reader.image_token_rows.device)
    lessons = _Lessons(reader, checkpoint, plan, folder, "language", writing)
    lessons.look = lambda batch: writing.misread(Labels.of(batch, device))
    lessons.judged = lambda batch: writing.ideal(Labels.of(batch, device))
    lessons.fits = lambda seen: len(seen.tiles) == 1  # labels are of one frame
    rates = {_CODES * plan.language_rate: writing.parameters(), plan.language_rate: reader.parameters()}
    lessons.train(rates, plan.language_steps, 1 << 23)


def train_reader(eyes: Eyes, reader: Reader, checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Train on the eyes' image tokens until `plan.reader_steps`, going on from the folder's state.

    Without such state it begins with the reader as it is.
    """
    device = str(reader.image_token_rows.device)

    @torch.no_grad()
    def look(batch: list[Seen]) -> Tensor:
        rows: Tensor = eyes(torch.from_numpy(np.concatenate([one.tiles for one in batch])).to(device))[0]
        return rows

    lessons = _Lessons(reader, checkpoint, plan, folder, "reader")
    lessons.look = lessons.judged = look
    lessons.train({plan.reader_rate: reader.parameters()}, plan.reader_steps, 1 << 24)


class _Lessons:
    """What both stages share: questions about pictures, plain text beside them, reports."""

    look: Look  # image tokens to learn from
    judged: Look  # and those that held-out pictures are judged by

    def __init__(
        self, reader: Reader, checkpoint: Checkpoint, plan: Plan, folder: Path, stage: str, *others: torch.nn.Module
    ) -> None:
        """`others` are saved with the reader, before it."""
        self._reader, self._plan, self._folder, self._stage = reader, plan, folder, stage
        self._modules = [*others, reader]
        self._maker = SequenceMaker(checkpoint, plan.length)
        self._texts = _texts(checkpoint)
        self.fits: Callable[[Seen], bool] = lambda seen: True

    def train(self, rates: Mapping[float, Iterable[Parameter]], steps: int, first_picture: int) -> None:
        """Train until `steps`, from the folder's state or from the beginning."""
        plan, reader = self._plan, self._reader
        optimizers = Optimizers(rates, None, 0.0)
        place = load(self._folder, self._stage, self._modules, optimizers) or {"step": 0, "pictures": first_picture}
        if place["step"] >= steps:
            return
        checks = [seen for seen in held_out(plan.checked) if self.fits(seen)]
        journal, random = Journal(self._folder, self._stage), RandomState(place["step"])
        feed = Feed(plan.workers, place["pictures"], plan.reader_reuse)
        try:
            sums: dict[str, float] = defaultdict(float)
            began, first = time.monotonic(), place["step"]
            for step in range(place["step"], steps):
                batch = [seen for seen in feed.batch(plan.reader_batch) if self.fits(seen)]
                loss, figures = answer_loss(self.look(batch), reader, self._maker.batch(batch, random, _EMPTY))
                if step % _TEXT_EVERY == 0:
                    apart = _text_distance(reader, self._texts, random)
                    loss, figures["text"] = loss + _TEXT * _TEXT_EVERY * apart, _TEXT_EVERY * float(apart.detach())
                loss.backward()  # type: ignore[no-untyped-call]
                optimizers.step(learning_rate(step, steps))
                for name, value in figures.items():
                    sums[name] += value
                if (step + 1) % plan.report == 0 or step + 1 == steps:
                    since = step + 1 - first
                    speed = since * plan.reader_batch / (time.monotonic() - began)
                    means = {k: v / since for k, v in sums.items()}
                    exact = check(self.judged, reader, self._maker, checks)
                    save(
                        self._folder, self._stage, self._modules, optimizers, {"step": step + 1, "pictures": feed.drawn}
                    )
                    journal.write(step=step + 1, pictures_a_second=speed, **means, **exact)
                    sums, began, first = defaultdict(float), time.monotonic(), step + 1
        finally:
            feed.close()


def answer_logits(rows: Tensor, reader: Reader, batch: Sequences) -> Tensor:
    """(L, V): what the model would say at each learned place, given the tiles' embeddings `rows`."""
    device = rows.device
    special = reader.image_token_rows
    step = Step(
        tokens=torch.from_numpy(batch.tokens.reshape(-1)).to(device),
        positions=torch.from_numpy(batch.positions.reshape(-1)).to(device),
        slots=torch.zeros(0),
        images=torch.cat([rows, special.to(rows.dtype)]),
        logit_rows=torch.from_numpy(batch.rows).to(device),
    )
    hidden = torch.from_numpy(~batch.visible())[:, None].to(device)
    mask = torch.zeros(hidden.shape, dtype=working_dtype(device.type), device=device)
    mask = mask.masked_fill(hidden, float("-inf"))
    return reader(step, mask)  # type: ignore[no-any-return]


def answer_loss(rows: Tensor, reader: Reader, asked: Sequences) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross-entropy of answer tokens, and figures about it.

    An answer counts as the square root of its tokens: a page that is read aloud has fifty times those of a total.
    """
    logits = answer_logits(rows, reader, asked).float()
    targets = torch.from_numpy(asked.targets).to(rows.device)
    lengths = np.bincount(asked.answers)[asked.answers]
    weights = torch.from_numpy(lengths.astype(np.float32) ** -0.5).to(rows.device)
    loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    right = float((logits.argmax(dim=1) == targets).float().mean())
    return loss, {"loss": float(loss.detach()), "tokens": right}


@torch.no_grad()
def check(look: Look, reader: Reader, maker: SequenceMaker, pictures: list[Seen]) -> dict[str, float]:
    """Share of held-out answers that are right to the last token, by task.

    Each token is asked for after the right ones, so an answer counts when greedy decoding would give it, up to ties
    between logits; answers that do not fit a training sequence are not asked for.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(pictures), 16):
        batch = maker.batch(pictures[begin : begin + 16], None)
        rows = look(pictures[begin : begin + 16])
        same = answer_logits(rows, reader, batch).argmax(dim=1).cpu().numpy() == batch.targets
        for number, (_, question) in enumerate(batch.asked):
            right[question.task].append(bool(same[batch.answers == number].all()))
    return {f"exact_{task}": float(np.mean(values)) for task, values in sorted(right.items())}


def _texts(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Plain text and conversations of the calibration set, as stretches of one length; nothing that is held out."""
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    builder = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    ids: list[int] = []
    for document in islice(documents(0), _TEXTS):
        if document.turns:
            *asked, answer = (Message(turn.role, (turn.text,)) for turn in document.turns)
            ids += builder.build(asked, []).token_ids
            ids += [*tokenizer.encode(str(answer.parts[0]), specials=False), checkpoint.config.tokens.stop[-1]]
        else:
            ids += tokenizer.encode(document.text + "\n\n", specials=False)
    count = len(ids) // _TEXT_TOKENS
    return np.array(ids[: count * _TEXT_TOKENS], np.int64).reshape(count, _TEXT_TOKENS)


def _text_distance(reader: Reader, texts: NDArray[np.int64], random: RandomState) -> Tensor:
    """KL(untouched ‖ updated) in nats a token on one stretch of plain text."""
    device = reader.image_token_rows.device
    tokens = torch.from_numpy(texts[int(random.randint(len(texts)))]).to(device)
    places = torch.arange(len(tokens), device=device)
    step = Step(tokens, places, places * 0, None, places)
    mask = torch.full((1, 1, len(tokens), len(tokens)), float("-inf"), dtype=working_dtype(device.type)).triu(1)
    mask = mask.to(device)
    with torch.no_grad():
        before = functional.log_softmax(reader(step, mask, updated=False).float(), dim=1)
    after = functional.log_softmax(reader(step, mask).float(), dim=1)
    return functional.kl_div(after, before, log_target=True, reduction="batchmean")
