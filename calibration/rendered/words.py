"""What the rendered pictures say: words, names and goods, each belonging to one split by its checksum.

`words.txt` holds the lists; the common English words and stems of the last one come from the vocabulary of SmolLM2's
tokenizer (Apache-2.0).
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path

from numpy.random import RandomState

_LISTS = Path(__file__).with_name("words.txt")
_COMMON = ("shops",)  # kinds of shops, like months and units, are the same in all splits


def belongs(word: str, split: str) -> bool:
    """Whether a word is of the split: a fifth is for tests, a tenth for validation; calibration has training's."""
    tenth = zlib.crc32(word.encode()) % 10
    return tenth > 2 if split in ("train", "calibration") else tenth == 2 if split == "validation" else tenth < 2


@lru_cache(maxsize=64)
def words(name: str, split: str) -> tuple[str, ...]:
    """The split's part of a list; `name` is "words" or one of first, last, cities, goods, shops, measures."""
    for block in _LISTS.read_text(encoding="utf-8").split("%% ")[1:]:
        title, _, content = block.partition("\n")
        if title == name:
            return tuple(w for w in content.split() if name in _COMMON or belongs(w.lower(), split))
    raise ValueError(f"there is no list {name}")


def pick(random: RandomState, name: str, split: str) -> str:
    """One word of the list."""
    options = words(name, split)
    return options[int(random.randint(len(options)))]


def pick_some(random: RandomState, name: str, split: str, count: int) -> list[str]:
    """Up to `count` different words of the list."""
    options = words(name, split)
    return [options[int(i)] for i in random.permutation(len(options))[:count]]


def code(random: RandomState) -> str:
    """Something that can only be read, not guessed: a number, a time, an amount, a part number."""
    kind = int(random.randint(6))
    if kind == 0:
        return str(random.randint(10, 10000))
    if kind == 1:
        return f"{random.randint(0, 24):02d}:{random.randint(0, 60):02d}"
    if kind == 2:
        return f"{'$€£'[int(random.randint(3))]}{money(random, 9999)}"
    if kind == 3:
        return f"{letters(random, 1)}-{random.randint(10, 1000)}"
    if kind == 4:
        return f"{random.randint(1, 100)}%"
    return letters(random, int(random.randint(2, 4))) + str(random.randint(1, 100))


def letters(random: RandomState, count: int) -> str:
    """Random capital letters."""
    return "".join(chr(65 + int(i)) for i in random.randint(26, size=count))


def money(random: RandomState, most: int) -> str:
    """An amount below `most` hundredths, as "12.40"."""
    amount = int(random.randint(50, most))
    return f"{amount // 100}.{amount % 100:02d}"
