"""What the rendered pictures say: words, names and goods, each belonging to one split by its checksum.

`words.txt` holds common English words and a few stems, taken from the vocabulary of SmolLM2's tokenizer (Apache-2.0).
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path

from numpy.random import RandomState

_FIRST = (
    *"Anna Ben Clara David Elena Frank Grace Henry Iris Jack Karen Leo Maria Noah Olga Paul Rosa Sam Tina Victor".split(),
    *"Wendy Yusuf Zoe Amir Bella Carl Dora Emil Fiona Greta Hugo Ines Jonas Kim Lena Mark Nina Oscar Petra Quinn".split(),
    *"Ruth Simon Tom Ursula Vera Walter Alice Bruno Cora Dan Eva Felix Gina Hans Ida John Kate Luis Mona Nick".split(),
)
_LAST = (
    *"Adams Baker Clark Dixon Evans Foster Green Hill Irwin Jones King Lane Moore Nolan Owens Price Quill Reed".split(),
    *"Scott Turner Unger Voss Ward Young Zeller Abbott Brown Cole Drake Ellis Ford Grant Hayes Ivers Jensen Klein".split(),
    *"Lopez Miller Nash Ortiz Parker Rossi Silva Taylor Vance Weber Bauer Costa Diaz Fischer Gupta Haas Kumar".split(),
)
_CITIES = (
    *"London Paris Berlin Rome Madrid Vienna Oslo Dublin Lisbon Athens Prague Warsaw Boston Denver Austin Miami".split(),
    *"Tokyo Delhi Cairo Lima Quito Sydney Perth Toronto Chicago Dallas Seattle Geneva Zurich Milan Turin Naples".split(),
    *"Porto Seville Lyon Nice Bonn Essen Bremen Bergen Malmo Turku Riga Vilnius Krakow Brno Graz Linz Basel Bern".split(),
)
_GOODS = (
    *"Bread Butter Milk Cheese Eggs Apples Bananas Rice Pasta Coffee Tea Sugar Salt Pepper Honey Jam Flour Oil".split(),
    *"Soap Shampoo Towel Candle Battery Lamp Cable Paper Pencil Notebook Stapler Folder Scissors Tape Glue Ruler".split(),
    *"Shirt Socks Gloves Scarf Hat Belt Shoes Boots Jacket Umbrella Wallet Watch Mug Plate Bowl Fork Spoon Knife".split(),
    *"Hammer Nails Screws Drill Paint Brush Ladder Bucket Hose Seeds Soil Pot Rope Chain Lock Key Hinge Bolt".split(),
    *"Sandwich Salad Soup Pizza Burger Fries Cake Cookie Muffin Juice Water Soda Beer Wine Yogurt Cereal Grapes".split(),
)
_SHOPS = "Bakery Market Store Cafe Books Pharmacy Hardware Garden Foods Deli Shop Bistro Grill Motors Tools Toys".split()
_MEASURES = (
    *"Sales Visitors Orders Returns Staff Rain Energy Output Profit Costs Users Trips Points Goals Stock Units".split(),
    *"Exports Members Tickets Calls Clicks Births Weight Height Speed Power Budget Income Loans Trees Cars Bikes".split(),
)
_LISTS = {
    "first": _FIRST,
    "last": _LAST,
    "cities": _CITIES,
    "goods": _GOODS,
    "shops": tuple(_SHOPS),
    "measures": _MEASURES,
}


def belongs(word: str, split: str) -> bool:
    """Whether a word is of the split: one fifth is for tests, one tenth for validation, the rest for training."""
    tenth = zlib.crc32(word.encode()) % 10
    return split == ("test" if tenth < 2 else "validation" if tenth == 2 else "train")


@lru_cache(maxsize=64)
def words(name: str, split: str) -> tuple[str, ...]:
    """The split's part of a list; `name` is "words" or one of first, last, cities, goods, shops, measures."""
    if name == "words":
        whole = tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())
    else:
        whole = _LISTS[name]
    return tuple(word for word in whole if belongs(word, split))


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
