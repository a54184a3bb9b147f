"""Second stage: the language model learns to read the image tokens, and the eyes to write them for it.

Tower, projector and low-rank updates of the language model are trained together on the answers to questions. Meanwhile
the tower goes on with the label maps, of these pictures and of others beside them, which cost a tenth as much; and on
plain text the updated model must stay close to the untouched one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from calibration.texts import documents
from edgevl.checkpoint import Checkpoint
from edgevl.errors import UsageError
from edgevl.ops import Step
from edgevl.prompt import Message, PromptBuilder
from edgevl.tokenizer import Tokenizer
from quantize.part_tensors import CheckpointParts
from training.export import restore
from training.feed import Feed, Seen, held_out
from training.journal import Journal
from training.labels import LabelMaker
from training.network import Eyes, Labels, Reader
from training.optimizers import Optimizers
from training.plan import Plan, learning_rate
from training.sequences import SequenceMaker, Sequences
from training.state import load, save
from training.tower import shares

_DENSE = 0.3  # weight of the label maps
_CALMER = 0.3  # steps of tower and projector, as a share of the first stage's
_TEXT = 0.5  # weight of the distance on plain text
_TEXT_EVERY = 8  # steps between looks at it, each of which counts as many times
_TEXT_TOKENS = 192  # of the plain text in each look
_TEXTS = 160  # documents that it is taken from


def train_reader(
    eyes: Eyes, checkpoint: Checkpoint, plan: Plan, folder: Path, device: str, start: Path | None = None
) -> Reader:
    """Train until `plan.reader_steps`, going on from the folder's state, and give the updated language model.

    Without such state it begins with the folder's finished tower, or else with `start`, what an earlier run exported.
    """
    reader = Reader(checkpoint.config, CheckpointParts(checkpoint), plan.rank, device).to(device)
    modules = [eyes, reader]
    optimizers = Optimizers(eyes, reader.parameters(), plan.reader_rate, _CALMER * plan.muon_rate)
    place = load(folder, "reader", modules, optimizers)
    if place is None:
        if start is not None:
            restore(start, eyes, reader)
        tower_place = load(folder, "tower", [eyes])
        if (tower_place is None and start is None) or (tower_place and tower_place["step"] < plan.tower_steps):
            raise UsageError(f"{folder} holds no finished tower; run --stage tower first, or name its --tower-steps")
        place = {"step": 0, "pictures": 1 << 24}
    labels = LabelMaker(checkpoint)
    maker, journal = SequenceMaker(checkpoint, plan.length), Journal(folder, "reader")
    if place["step"] >= plan.reader_steps:
        return reader
    checks = list(held_out(plan.checked))
    texts = _texts(checkpoint)
    feed, random = Feed(plan.workers, place["pictures"], plan.reader_reuse), RandomState(place["step"])
    beside = Feed(1, place["pictures"] + (1 << 28), plan.tower_reuse, plan.tower_pages)
    try:
        sums: dict[str, float] = defaultdict(float)
        began, first = time.monotonic(), place["step"]
        for step in range(place["step"], plan.reader_steps):
            batch, more = feed.batch(plan.reader_batch), beside.batch(plan.reader_beside)
            maps = labels.labels([*batch, *more], device)
            loss, figures = answer_loss(eyes, reader, maker.batch(batch, random), more, maps)
            if step % _TEXT_EVERY == 0:
                apart = _text_distance(eyes, reader, texts, random, device)
                loss, figures["text"] = loss + _TEXT * _TEXT_EVERY * apart, _TEXT_EVERY * float(apart.detach())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers.step(learning_rate(step, plan.reader_steps))
            for name, value in figures.items():
                sums[name] += value
            if (step + 1) % plan.report == 0 or step + 1 == plan.reader_steps:
                since = step + 1 - first
                speed = since * plan.reader_batch / (time.monotonic() - began)
                means = {k: v / since for k, v in sums.items()}
                exact = check(eyes, reader, maker, checks, device)
                save(folder, "reader", modules, optimizers, {"step": step + 1, "pictures": feed.drawn})
                journal.write(step=step + 1, pictures_a_second=speed, **means, **exact)
                sums, began, first = defaultdict(float), time.monotonic(), step + 1
    finally:
        feed.close()
        beside.close()
    return reader


def answer_logits(rows: Tensor, eyes: Eyes, reader: Reader, batch: Sequences) -> Tensor:
    """(L, V): what the model would say at each learned place, given the tiles' embeddings `rows` (n·64, C)."""
    device = rows.device
    step = Step(
        tokens=torch.from_numpy(batch.tokens.reshape(-1)).to(device),
        positions=torch.from_numpy(batch.positions.reshape(-1)).to(device),
        slots=torch.zeros(0),
        images=torch.cat([rows, eyes.image_token_rows.to(rows.dtype)]),
        logit_rows=torch.from_numpy(batch.rows).to(device),
    )
    hidden = torch.from_numpy(~batch.visible())[:, None].to(device)
    mask = torch.zeros(hidden.shape, dtype=rows.dtype, device=device).masked_fill(hidden, float("-inf"))
    return reader(step, mask, eyes.image_token_rows)  # type: ignore[no-any-return]


def answer_loss(
    eyes: Eyes, reader: Reader, asked: Sequences, beside: list[Seen], labels: Labels
) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross-entropy of answer tokens plus a part of the labels' loss; and both as numbers.

    An answer counts as the square root of its tokens: a page that is read aloud has fifty times those of a total.
    Of the pictures `beside` only the labels are learned; `labels` are first of the pictures asked about, then of these.
    """
    device = labels.things.device
    tiles = len(asked.tiles)
    pixels = np.concatenate([asked.tiles, *(one.tiles[:1] for one in beside)])
    rows, patches = eyes(torch.from_numpy(pixels).to(device))
    logits = answer_logits(rows[: tiles * len(rows) // len(pixels)], eyes, reader, asked).float()
    targets = torch.from_numpy(asked.targets).to(device)
    lengths = np.bincount(asked.answers)[asked.answers]
    weights = torch.from_numpy(lengths.astype(np.float32) ** -0.5).to(device)
    loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    right = float((logits.argmax(dim=1) == targets).float().mean())
    first = torch.from_numpy(np.concatenate([asked.first_tiles, np.arange(tiles, len(pixels))])).to(device)
    first_rows, first_patches = (x.reshape(len(pixels), -1, x.shape[1])[first].flatten(0, 1) for x in (rows, patches))
    maps, counts = eyes.dense_loss(first_rows, first_patches, labels)
    figures = {"loss": float(loss.detach()), "tokens": right, "maps": float(maps.detach())}
    figures |= shares(counts)
    return loss + _DENSE * maps, figures


@torch.no_grad()
def check(eyes: Eyes, reader: Reader, maker: SequenceMaker, pictures: list[Seen], device: str) -> dict[str, float]:
    """Share of held-out answers that are right to the last token, by task.

    Each token is asked for after the right ones, so an answer counts when greedy decoding would give it, up to ties
    between logits; answers that do not fit a training sequence are not asked for.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(pictures), 16):
        batch = maker.batch(pictures[begin : begin + 16], None)
        rows, _ = eyes(torch.from_numpy(batch.tiles).to(device))
        same = answer_logits(rows, eyes, reader, batch).argmax(dim=1).cpu().numpy() == batch.targets
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


def _text_distance(eyes: Eyes, reader: Reader, texts: NDArray[np.int64], random: RandomState, device: str) -> Tensor:
    """KL(untouched ‖ updated) in nats a token on one stretch of plain text."""
    tokens = torch.from_numpy(texts[int(random.randint(len(texts)))]).to(device)
    places = torch.arange(len(tokens), device=device)
    step = Step(tokens, places, places * 0, None, places)
    mask = torch.full((len(tokens), len(tokens)), float("-inf"), dtype=torch.bfloat16, device=device).triu(1)[
        None, None
    ]
    with torch.no_grad():
        before = functional.log_softmax(reader(step, mask).float(), dim=1)
    after = functional.log_softmax(reader(step, mask, eyes.image_token_rows).float(), dim=1)
    return functional.kl_div(after, before, log_target=True, reduction="batchmean")
