"""From rendered pictures to label tensors: which character, word, thing and colour lies where."""

from __future__ import annotations

import numpy as np
import tokenizers
import torch

from calibration.rendered.picture import COLOUR_NAMES, THINGS, Text
from edgevl.checkpoint import Checkpoint
from training.feed import Seen
from training.network import Labels


class LabelMaker:
    """Knows the tokenizer, and so which pieces of a text the language model would like to see."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.config.vision is not None
        self._grid = checkpoint.config.vision.grid // 2  # image tokens along a side
        json = checkpoint.tokenizer_json()
        self._tokenizer = tokenizers.Tokenizer.from_str(json.decode() if isinstance(json, bytes) else json)
        self._things = [() if name == "nothing" else self._ids(name) for name in THINGS]
        self._colours = [() if name == "none" else self._ids(name) for name in COLOUR_NAMES]

    def _ids(self, word: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(f" {word}", add_special_tokens=False).ids)

    def labels(self, seen: list[Seen], device: str) -> Labels:
        """Of each picture's first frame."""
        names = ("characters", "things", "colours")
        maps = [torch.from_numpy(np.stack([getattr(one, name) for one in seen])).to(device) for name in names]
        triples = [
            (i * self._grid**2 + place, id_, written)
            for i, one in enumerate(seen)
            for place, id_, written in self._words(one)
        ]
        table = torch.tensor(triples, dtype=torch.int64).reshape(-1, 3).to(device)
        return Labels(maps[0], maps[1], maps[2], table[:, 0], table[:, 1], table[:, 2] > 0)

    def _words(self, one: Seen) -> list[tuple[int, int, int]]:
        """(image token, id, written): what is written there, or else the names of the thing and its colour."""
        found = [(place, id_, 1) for place, id_ in self._tokens(one.texts)]
        full = {place for place, _, _ in found}
        for place in range(self._grid**2):
            if place not in full:
                i, j = 2 * (place // self._grid), 2 * (place % self._grid)
                things, colours = one.things[i : i + 2, j : j + 2].ravel(), one.colours[i : i + 2, j : j + 2].ravel()
                shown = things.max() > 0  # of a thing and background, the thing
                thing = int(things[things > 0][0]) if shown else 0
                colour = int(colours[things == thing][0])
                found += [(place, id_, 0) for id_ in (*self._things[thing], *self._colours[colour])]
        return found

    def _tokens(self, texts: tuple[Text, ...]) -> list[tuple[int, int]]:
        """(image token, id) of each piece of the texts, at the middle of its characters."""
        found = []
        for text, middles in texts:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            for id_, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
                under = [middles[i] for i in range(begin, end) if text[i] != " "]
                if under:
                    x, y = np.mean(under, axis=0)
                    found.append((int(y * self._grid) * self._grid + int(x * self._grid), id_))
        return found
