"""A canvas that remembers: what is drawn on the picture is drawn on its label maps too, and bent with it.

Knows fonts, colours and geometry; knows nothing of receipts or charts. Used by the drawers of this package.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from calibration.rendered.fonts import font, font_files
from calibration.rendered.picture import CELL, CHARACTERS, COLOUR_NAMES, COLOURS, PATCH, THINGS, TILE, Text

SPLITS = ("train", "validation", "test", "calibration")
RGB = tuple[int, int, int]
Point = tuple[float, float]
_INDEX = {character: i for i, character in enumerate(CHARACTERS)}


def shade(random: RandomState, name: str, spread: int = 18) -> RGB:
    """A colour that people would call by this name."""
    middle = np.array(COLOURS[name]) + random.randint(-spread, spread + 1, size=3)
    r, g, b = (int(v) for v in np.clip(middle, 0, 255))
    return r, g, b


def layout(random: RandomState, split: str, *options: int, everywhere: bool = False) -> tuple[int, ...]:
    """One choice below each of `options`; a fifth of the combinations is kept for tests, a tenth for validation.

    Every single value occurs in training; it is their combinations that are held out. Calibration uses training's. With
    `everywhere` each split has as many different values of the last option as it has room for.
    """
    allowed = _combinations(options, everywhere)["train" if split == "calibration" else split]
    return allowed[int(random.randint(len(allowed)))]


@lru_cache(maxsize=64)
def _combinations(options: tuple[int, ...], everywhere: bool = False) -> dict[str, tuple[tuple[int, ...], ...]]:
    whole = list(product(*map(range, options)))
    tests, checks = math.ceil(len(whole) / 5), math.ceil(len(whole) / 10)
    for salt in range(1000):
        every = sorted(whole, key=lambda choice: hashlib.sha256(bytes((salt, *options, *choice))).digest())
        cuts = {"test": every[:tests], "validation": every[tests : tests + checks], "train": every[tests + checks :]}
        full = (len({choice[-1] for choice in part}) == min(len(part), options[-1]) for part in cuts.values())
        if everywhere and not all(full):
            continue
        if all({choice[i] for choice in cuts["train"]} == set(range(n)) for i, n in enumerate(options)):
            return {split: tuple(part) for split, part in cuts.items()}
    raise ValueError(f"{options} are too few combinations to hold some out")


class Canvas:
    """A picture in the making. Coordinates are pixels of the picture before it is turned."""

    def __init__(self, random: RandomState, split: str, size: tuple[int, int], background: RGB, colour: str) -> None:
        self.random, self.split = random, split
        self.width, self.height = size
        self.background = background
        self.image = Image.new("RGB", size, background)
        self._things = Image.new("L", size, 0)
        self._colours = Image.new("L", size, COLOUR_NAMES.index(colour))
        self._on = (ImageDraw.Draw(self.image), ImageDraw.Draw(self._things), ImageDraw.Draw(self._colours))
        self._texts: list[tuple[str, list[Point]]] = []
        files = font_files(split)
        self.face: Path = files[int(random.randint(len(files)))]

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        """The picture's face at `size` pixels to the em."""
        return font(self.face, round(size))

    def measure(self, text: str, size: float) -> float:
        """Width of the text in pixels."""
        return float(self.font(size).getlength(text))

    def text(self, x: float, y: float, text: str, size: float, ink: RGB, align: str = "l") -> None:
        """One line of text with its vertical middle at `y`; `align` l, m, r says what `x` is."""
        face = self.font(size)
        x -= {"l": 0.0, "m": 0.5, "r": 1.0}[align] * face.getlength(text)
        self._on[0].text((x, y), text, ink, face, anchor="lm")
        ends = [face.getlength(text[:i]) for i in range(len(text) + 1)]
        self._texts.append((text, [(x + (a + b) / 2, y) for a, b in pairwise(ends)]))

    def written(self, text: str, middles: Sequence[Point]) -> None:
        """Tell of characters that were drawn by hand."""
        self._texts.append((text, list(middles)))

    def polygon(self, thing: str, colour: str, points: Sequence[Point], fill: RGB) -> None:
        """A filled polygon."""
        for draw, value in zip(self._on, self._values(thing, colour, fill), strict=True):
            draw.polygon(list(points), fill=value)  # type: ignore[arg-type]

    def box(
        self, thing: str, colour: str, area: tuple[float, float, float, float], fill: RGB, radius: float = 0
    ) -> None:
        """A filled rectangle, its corners rounded by `radius` pixels."""
        for draw, value in zip(self._on, self._values(thing, colour, fill), strict=True):
            draw.rounded_rectangle(area, radius, fill=value)  # type: ignore[arg-type]

    def disc(self, thing: str, colour: str, middle: Point, radius: float, fill: RGB) -> None:
        """A filled circle."""
        x, y = middle
        for draw, value in zip(self._on, self._values(thing, colour, fill), strict=True):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)  # type: ignore[arg-type]

    def slice(self, colour: str, middle: Point, radius: float, degrees: tuple[float, float], fill: RGB) -> None:
        """A slice of a pie, clockwise from three o'clock."""
        x, y = middle
        area = (x - radius, y - radius, x + radius, y + radius)
        for draw, value in zip(self._on, self._values("slice", colour, fill), strict=True):
            draw.pieslice(area, *degrees, fill=value)  # type: ignore[arg-type]

    def line(self, thing: str, colour: str, points: Sequence[Point], width: float, fill: RGB) -> None:
        """A line through the points."""
        for draw, value in zip(self._on, self._values(thing, colour, fill), strict=True):
            draw.line(list(points), fill=value, width=max(1, round(width)), joint="curve")  # type: ignore[arg-type]

    def rule(self, points: Sequence[Point], ink: RGB, width: float = 1) -> None:
        """A line that only separates."""
        self.line("rule", "none", points, width, ink)

    def _values(self, thing: str, colour: str, fill: RGB) -> tuple[RGB, int, int]:
        return fill, THINGS.index(thing), COLOUR_NAMES.index(colour)

    def turn(self, degrees: float, scale: Point, slant: float, shift: Point) -> None:
        """Turn, scale and slant about the middle and shift, labels and all; what comes in is background."""
        turn, (mx, my) = math.radians(degrees), (self.width / 2, self.height / 2)
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        forward = rotation @ np.array([[scale[0], slant], [0.0, scale[1]]])
        # p -> m + shift + forward (p - m); Pillow wants the way back
        inverse = np.linalg.inv(forward)
        offset = np.array([mx, my]) - inverse @ (np.array([mx, my]) + shift)
        data = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
        size, affine = (self.width, self.height), Image.Transform.AFFINE
        self.image = self.image.transform(size, affine, data, Image.Resampling.BICUBIC, fillcolor=self.background)
        self._things = self._things.transform(size, affine, data)
        colour = self._colours.getpixel((0, 0))
        self._colours = self._colours.transform(size, affine, data, fillcolor=colour)
        (a, b), (c, d) = forward.tolist()

        def moved(x: float, y: float) -> Point:
            return mx + shift[0] + a * (x - mx) + b * (y - my), my + shift[1] + c * (x - mx) + d * (y - my)

        self._texts = [(text, [moved(*middle) for middle in middles]) for text, middles in self._texts]

    def texts(self) -> tuple[Text, ...]:
        """Everything that is written, as far as it lies inside."""
        whole = []
        for text, middles in self._texts:
            places = tuple((x / self.width, y / self.height) for x, y in middles)
            if all(0 <= x < 1 and 0 <= y < 1 for x, y in places):
                whole.append((text, places))
        return tuple(whole)

    def maps(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Characters (32, 64), things (32, 32) and colours (32, 32) of the picture as one tile."""
        rows, columns = TILE // CELL[0], TILE // CELL[1]
        characters = np.zeros((rows, columns), np.uint8)
        for text, middles in self._texts:
            for character, (x, y) in zip(text, middles, strict=True):
                i, j = int(y / self.height * rows), int(x / self.width * columns)
                if character != " " and 0 <= i < rows and 0 <= j < columns:
                    characters[i, j] = _INDEX[character]
        at = (np.arange(TILE // PATCH) + 0.5) / (TILE // PATCH)
        ys, xs = (at * self.height).astype(int), (at * self.width).astype(int)
        things, colours = (np.asarray(m)[np.ix_(ys, xs)] for m in (self._things, self._colours))
        return characters, things, colours


def spoil(random: RandomState, image: Image.Image) -> Image.Image:
    """What cameras and scanners do: uneven light, blur, noise; the caller may add JPEG."""
    x = np.asarray(image, np.float32)
    if random.random_sample() < 0.5:
        height, width = x.shape[:2]
        across, down = random.uniform(-0.25, 0.25, size=2)
        light = 1 + across * np.linspace(-0.5, 0.5, width)[None, :] + down * np.linspace(-0.5, 0.5, height)[:, None]
        x = x * (light * random.uniform(0.8, 1.05)).astype(np.float32)[:, :, None]
    if random.random_sample() < 0.35:
        small = (image.height // 2, image.width // 2)
        noise: NDArray[Any] = random.standard_normal(x.shape[:2] if random.random_sample() < 0.7 else small)
        if noise.shape != x.shape[:2]:
            noise = np.kron(noise, np.ones((2, 2)))
            noise = np.pad(noise, ((0, x.shape[0] - noise.shape[0]), (0, x.shape[1] - noise.shape[1])), mode="edge")
        x = x + (noise * random.uniform(2, 8)).astype(np.float32)[:, :, None]
    return Image.fromarray(np.clip(x, 0, 255).astype(np.uint8))
