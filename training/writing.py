"""How the eyes write for the language model: what each image token should be.

An image token covers 16 x 16 pixels. Where text stands, it is the sum of codes of the characters whose middles lie
there, a code for each character at each place in that order; elsewhere the sum of codes of the thing and of the colour
shown; and everywhere a code of its row and one of its column. At first the codes are the language model's own
embeddings of these names, those of second and later characters partly with their numbers in another order. While the
language model learns to read such tokens (`training.reader`; no tower takes part), the codes learn to be easy to read;
then the tower learns to give them (`training.tower`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from calibration.rendered.picture import COLOUR_NAMES, THINGS
from training.feed import LETTERS, Seen

_FAMILIAR = (0.6, 0.36, 0.2)  # of the second character and those behind it, the part that is the embedding itself
_SHARPNESS = 20.0  # of the choice among letters, given cosines
_PLACED = 0.5  # size of what tells the place, against an embedding
_WRONG = 0.04  # of written characters, in what the language model learns to read
_NOISE = 0.3  # against an embedding


@dataclass(frozen=True)
class Window:
    """A square part of a picture, counted in image tokens."""

    top: int
    left: int
    side: int

    def of(self, square: Any, grid: int) -> Any:
        """The part of an array or tensor about the whole picture, which is `grid` image tokens wide and high."""
        high, wide = square.shape[0] // grid, square.shape[1] // grid
        rows = slice(self.top * high, (self.top + self.side) * high)
        return square[rows, self.left * wide : (self.left + self.side) * wide]


@dataclass(frozen=True)
class Labels:
    """What lies where in n pictures, or in windows of them, of g x g image tokens."""

    characters: Tensor  # (n, 2g, 4g) uint8: index in CHARACTERS, of cells of 8 x 4 pixels
    things: Tensor  # (n, 2g, 2g) uint8: index in THINGS, of patches
    colours: Tensor  # (n, 2g, 2g) uint8: index in COLOUR_NAMES
    slots: Tensor  # (n·g², SLOTS) int64: index in LETTERS of the characters of an image token, in reading order
    shown: Tensor  # (n·g², 2) int64: thing and colour of an image token without any
    places: Tensor  # (n·g²,) int64: number of the image token in its whole picture

    @staticmethod
    def of(seen: Sequence[Seen], device: str, windows: Sequence[Window] | None = None) -> Labels:
        """Of each picture's first frame, or of its window."""
        grid = seen[0].things.shape[0] // 2
        windows = windows or [Window(0, 0, grid)] * len(seen)
        columns: tuple[list[NDArray[Any]], ...] = ([], [], [], [], [], [])
        numbers = np.arange(grid * grid)
        for one, window in zip(seen, windows, strict=True):
            grids = (one.slots, one.shown, numbers)
            squares = (one.characters, one.things, one.colours, *(x.reshape(grid, grid, -1) for x in grids))
            for column, square in zip(columns, squares, strict=True):
                column.append(window.of(square, grid))
        stacks = [torch.from_numpy(np.stack(column)).to(device) for column in columns]
        slots, shown, places = (x.flatten(0, 2).long() for x in stacks[3:])
        return Labels(stacks[0], stacks[1], stacks[2], slots, shown, places[:, 0])


class Writing(nn.Module):
    """Ideal image tokens, and how far others are from them. Its parameters are the codes, of about unit size."""

    def __init__(self, table: Tensor, encode: Callable[[str], Sequence[int]], grid: int) -> None:
        """`table` (V, C): the language model's embeddings; `grid`: image tokens along a side."""
        super().__init__()
        table = table.float()
        mean = table.mean(dim=0)
        self.rms = float((table - mean).square().mean().sqrt())
        random = torch.Generator().manual_seed(1)
        width = len(mean)

        def named(names: Sequence[str]) -> Tensor:
            """Unit size; nothing for the first, which names nothing."""
            rows = torch.stack([(table[list(encode(name))] - mean).mean(dim=0) for name in names[1:]])
            return torch.cat([torch.zeros(1, width), rows / rows.square().mean(dim=1, keepdim=True).sqrt()])

        codes = [letters := named(LETTERS)]
        for part in _FAMILIAR:
            moved = letters[:, torch.randperm(width, generator=random)]
            codes.append(part * letters + (1 - part**2) ** 0.5 * moved)
        rows, columns = _PLACED * torch.randn(2, grid, width, generator=random)
        self.mean = nn.Buffer(mean, persistent=False)
        self.letters = nn.Parameter(torch.stack(codes))  # (SLOTS, letters, C)
        self.things = nn.Parameter(named([f" {name}" for name in THINGS]))
        self.colours = nn.Parameter(named([f" {name}" for name in COLOUR_NAMES]))
        self.rows, self.columns = nn.Parameter(rows), nn.Parameter(columns)

    def ideal(self, labels: Labels) -> Tensor:
        """(n·g², C): what the image tokens should be."""
        return self._placed(self._content(labels.slots, labels.shown), labels.places)

    def misread(self, labels: Labels) -> Tensor:
        """The same with some wrong characters and noise, as a tower gives them."""
        slots = labels.slots
        wrong = (torch.rand(slots.shape, device=slots.device) < _WRONG) & (slots > 0)
        other = torch.randint(1, len(LETTERS), slots.shape, device=slots.device)
        content = self._content(torch.where(wrong, other, slots), labels.shown)
        noise = _NOISE * torch.rand(len(content), 1, device=slots.device) * torch.randn_like(content)
        return self._placed(content + noise, labels.places)

    def loss(self, rows: Tensor, labels: Labels, nothing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of image tokens (n·g², C), how many characters are right, out of how many).

        `nothing` (SLOTS,) is what choosing no character weighs.
        """
        unit = (rows.float() - self.mean) / self.rms
        inner = unit - self._places(labels.places)
        size = inner.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()
        logits = _SHARPNESS / inner.shape[1] * torch.einsum("nc,slc->nsl", inner / size, self.letters)
        logits = logits + functional.pad(nothing[:, None], (0, len(LETTERS) - 1))
        written = labels.slots > 0
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.slots.flatten(), reduction="none")
        reading = losses[written.flatten()].sum() / written.sum().clamp(min=1) + losses[~written.flatten()].mean()
        apart = (inner - self._content(labels.slots, labels.shown)).square().mean(dim=1)
        full, thing = written.any(dim=1), labels.shown[:, 0] > 0
        # most image tokens are empty paper
        away = sum(apart[kind].sum() / kind.sum().clamp(min=1) for kind in (full, thing, ~full & ~thing))
        right = ((logits.argmax(dim=2) == labels.slots) & written).sum()
        return reading + away, right, written.sum()

    def _content(self, slots: Tensor, shown: Tensor) -> Tensor:
        content = functional.embedding(shown[:, 0], self.things) + functional.embedding(shown[:, 1], self.colours)
        for slot, codes in zip(slots.unbind(dim=1), self.letters, strict=True):
            content = content + functional.embedding(slot, codes)
        return content / content.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()

    def _placed(self, content: Tensor, places: Tensor) -> Tensor:
        return (content + self._places(places)) * self.rms + self.mean

    def _places(self, places: Tensor) -> Tensor:
        grid = len(self.rows)
        return functional.embedding(places // grid, self.rows) + functional.embedding(places % grid, self.columns)
