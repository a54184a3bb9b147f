"""Rendered pictures in arrays, made by worker processes while the network computes.

A picture is shown a few times before it is thrown away, so that rendering never holds training up. Knows nothing of
networks.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from calibration.rendered import PAGE, SHAPES, Question, Rendered, rendered_picture
from calibration.rendered.fonts import font_files
from calibration.rendered.picture import CHARACTERS, PATCH, TILE, Text
from edgevl.config import TilingConfig
from edgevl.errors import EdgevlError
from edgevl.image import cut_tiles, load_image
from edgevl.tiling import tile_grid

_ONE_TILE = TilingConfig(max_tiles=1)
_CHUNK = 16  # pictures that a worker hands over together
LETTERS = (*CHARACTERS, " ")  # what an image token can show; index 0 is nothing
SLOTS = 4  # characters of an image token; more do not fit at the sizes that are written
_TOKEN = 2 * PATCH  # pixels
_LARGE = (SHAPES, "display", "scene", "gauge", SHAPES, "sign", "scene", SHAPES)
_INDEX = {letter: i for i, letter in enumerate(LETTERS)}


@dataclass(frozen=True)
class Seen:
    """A rendered picture as the network gets it: tiles (frames, 256, 256, 3) uint8, and its labels.

    `slots` (256, SLOTS) uint8, the index in LETTERS of the characters of each image token in reading order; `shown`
    (256, 2) uint8, thing and colour of an image token without any. The others are as in `Rendered`.
    """

    kind: str
    tiles: NDArray[np.uint8]
    questions: tuple[Question, ...]
    texts: tuple[Text, ...]
    characters: NDArray[np.uint8]
    things: NDArray[np.uint8]
    colours: NDArray[np.uint8]
    slots: NDArray[np.uint8]
    shown: NDArray[np.uint8]


def see(rendered: Rendered, tile_size: int = 256) -> Seen:
    """The picture by the very path that the product takes: one tile for each frame."""
    tiles = []
    for frame in rendered.frames:
        picture = load_image(frame)
        tiles.append(cut_tiles(picture, tile_grid(*picture.size, _ONE_TILE, tile_size), _ONE_TILE, tile_size))
    labels = (rendered.characters, rendered.things, rendered.colours)
    slots = _slots(rendered.texts)
    shown = _shown(rendered.things, rendered.colours) * (slots[:, :1] == 0)
    return Seen(rendered.kind, np.concatenate(tiles), rendered.questions, rendered.texts, *labels, slots, shown)


def _slots(texts: tuple[Text, ...]) -> NDArray[np.uint8]:
    side = TILE // _TOKEN
    slots = np.zeros((side * side, SLOTS), np.uint8)
    filled = [0] * (side * side)
    for text, middles in texts:
        for letter, (x, y) in zip(text, middles, strict=True):
            place = int(y * side) * side + int(x * side)
            if filled[place] < SLOTS:
                slots[place, filled[place]] = _INDEX[letter]
                filled[place] += 1
    return slots


def _shown(things: NDArray[np.uint8], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(256, 2): of an image token's four patches the first that shows a thing, or else the first."""
    side = TILE // _TOKEN
    patches = [m.reshape(side, 2, side, 2).swapaxes(1, 2).reshape(side * side, 4) for m in (things, colours)]
    first = (patches[0] > 0).argmax(axis=1)
    return np.stack([m[np.arange(side * side), first] for m in patches], axis=1)


class Feed:
    """Endless batches of training pictures.

    `first` is the number of the first picture, for resuming. Of five pictures, `pages` are pages full of text and
    `large` are of the kinds that show large things, which are learned slowest.
    """

    def __init__(self, workers: int, first: int, reuse: int, pages: int = 0, large: int = 0, keep: int = 4096) -> None:
        context = multiprocessing.get_context("fork")
        self._queue: Queue[list[Seen]] = context.Queue(maxsize=4 * workers)
        self._processes = [
            context.Process(
                target=_work, args=(self._queue, first + i * _CHUNK, workers * _CHUNK, pages, large), daemon=True
            )
            for i in range(workers)
        ]
        font_files("train")  # says here what is missing, not in a worker
        for process in self._processes:
            process.start()
        self._reuse, self._keep = reuse, keep
        self._pool: list[Seen] = []
        self._random = RandomState(first % (1 << 31))
        self._owed = 0.0
        self.drawn = first  # pictures rendered so far

    def batch(self, size: int) -> list[Seen]:
        """The next batch."""
        while len(self._pool) < max(size, 16 * _CHUNK):
            self._take()
        self._owed += size / self._reuse
        while self._owed >= _CHUNK:
            self._take()
            self._owed -= _CHUNK
        return [self._pool[int(i)] for i in self._random.randint(len(self._pool), size=size)]

    def _take(self) -> None:
        while True:
            try:
                new = self._queue.get(timeout=5)
                break
            except Empty:
                if not all(process.is_alive() for process in self._processes):
                    raise EdgevlError("a process that renders pictures has died; its error stands above") from None
        self.drawn += len(new)
        if len(self._pool) + len(new) <= self._keep:
            self._pool += new
        else:
            for seen in new:
                self._pool[int(self._random.randint(len(self._pool)))] = seen

    def close(self) -> None:
        """Stop the workers."""
        for process in self._processes:
            process.terminate()


def _work(queue: Queue[Any], first: int, stride: int, pages: int, large: int) -> None:
    os.nice(5)
    named = [PAGE] * pages + [""] * (5 - pages - large)
    while True:
        pictures = []
        for number in range(first, first + _CHUNK):
            turn, place = divmod(number, 5)
            kind = named[place] if place < len(named) else _LARGE[turn % len(_LARGE)]
            pictures.append(see(rendered_picture("train", number, kind or None)))
        queue.put(pictures)
        first += stride


def held_out(count: int, split: str = "validation") -> Iterator[Seen]:
    """The first `count` pictures of a split that is not trained on."""
    return (see(rendered_picture(split, seed)) for seed in range(count))
