"""From rendered pictures to label tensors: which character, word, thing and colour lies where."""

from __future__ import annotations

import numpy as np
import tokenizers
import torch

from calibration.rendered.picture import Text
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

    def labels(self, seen: list[Seen], device: str) -> Labels:
        """Of each picture's first frame."""
        names = ("characters", "things", "colours")
        maps = [torch.from_numpy(np.stack([getattr(one, name) for one in seen])).to(device) for name in names]
        tokens = [
            (i * self._grid**2 + place, id_) for i, one in enumerate(seen) for place, id_ in self._tokens(one.texts)
        ]
        pairs = torch.tensor(tokens, dtype=torch.int64).reshape(-1, 2).to(device)
        return Labels(maps[0], maps[1], maps[2], pairs[:, 0], pairs[:, 1])

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
