"""One labelled picture: what is seen, what can be asked about it, and what lies where. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# What a 4 x 8 pixel cell of a tile can hold; index 0 is nothing. Everything that the renderer writes is here.
CHARACTERS = "\0 !\"#$%&'()*+,-./0123456789:;=?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_abcdefghijklmnopqrstuvwxyz|°€£é".replace(
    " ", ""
)
# What a patch can belong to; index 0 is background.
THINGS = (
    *("nothing", "circle", "square", "triangle", "star", "hexagon", "cross", "diamond", "ring", "paper", "sign"),
    *("bar", "line", "slice", "dial", "needle", "display", "rule", "box"),
)
# Colour names and their middle values; each use varies a little.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "yellow": (240, 210, 50),
    "orange": (240, 135, 30),
    "purple": (130, 50, 160),
    "pink": (245, 145, 185),
    "brown": (125, 75, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
}
COLOUR_NAMES = ("none", *COLOURS)
TILE = 256  # pixels; labels are for the picture as one tile
CELL = (8, 4)  # pixels, rows and columns of a character cell
PATCH = 8  # pixels


@dataclass(frozen=True)
class Question:
    """One question and its one right answer. `task` says what it is scored as; "other" is for training only."""

    task: str  # "lines" | "fields" | "charts" | "panels" | "scenes" | "other"
    question: str
    answer: str


# A line of text as it was written, and the middle of each of its characters as shares (x, y) of the picture's sides.
Text = tuple[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True)
class Rendered:
    """A picture, or a few frames of a scene, with everything known about it.

    Texts and maps are of the first frame; the maps of it as a tile of 256 x 256 pixels: `characters` (32, 64) uint8,
    the index in CHARACTERS of the character whose middle lies in the cell; `things` and `colours` (32, 32) uint8, of
    the patch's middle.
    """

    kind: str
    frames: tuple[Image.Image, ...]
    questions: tuple[Question, ...]
    texts: tuple[Text, ...]
    characters: NDArray[np.uint8]
    things: NDArray[np.uint8]
    colours: NDArray[np.uint8]
