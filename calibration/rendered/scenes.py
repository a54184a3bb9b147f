"""Drawers of simple scenes: coloured shapes, where they stand to each other, and how they move from frame to frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from calibration.rendered.documents import Drawn, some
from calibration.rendered.drawing import Canvas, layout, layouts, shade
from calibration.rendered.picture import COLOUR_NAMES, COLOURS, THINGS, Question

SHAPES = ("circle", "square", "triangle", "star", "hexagon", "cross", "diamond", "ring")
_FILLS = tuple(c for c in COLOURS if c not in ("brown", "gray"))
_BACKS = ("white", "black", "gray", "blue", "green", "yellow", "pink")
_CORNERS = {"square": (4, 45.0), "triangle": (3, -90.0), "hexagon": (6, 0.0), "diamond": (4, 0.0)}


@dataclass(frozen=True)
class Thing:
    """One shape; pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.colour} {self.shape}"


def a(name: str) -> str:
    """With its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def scene(random: RandomState, split: str) -> Drawn:
    """One to three shapes on a plain ground."""
    canvas, back = _ground(random, split)
    things = _place(random, split, back, 1 + int(random.randint(3)), canvas)
    for thing in things:
        _draw(canvas, thing)
    colours, shapes = [t.colour for t in things], [t.shape for t in things]
    i = int(random.randint(len(things)))
    asked = [Question("scenes", "Describe the picture.", _caption(things, back))]
    asked.append(Question("other", "How many shapes are there?", str(len(things))))
    if shapes.count(shapes[i]) == 1:
        asked.append(Question("other", f"What colour is the {shapes[i]}?", colours[i].capitalize()))
    if colours.count(colours[i]) == 1:
        asked.append(Question("other", f"What shape is {colours[i]}?", f"The {shapes[i]}."))
    shape, colour = layout(random, split, len(SHAPES), len(_FILLS))
    wanted = Thing(SHAPES[shape], _FILLS[colour], 0, 0, 0)
    if random.random_sample() < 0.5:
        wanted = things[i]
    there = any(t.name == wanted.name for t in things)
    asked.append(Question("other", f"Is there {a(wanted.name)}?", "Yes." if there else "No."))
    asked.append(Question("other", "What colour is the background?", back.capitalize()))
    if len(things) == 2:
        first, second, word = _relation(things)
        opposite = {"to the left of": "to the right of", "above": "below"}[word]
        asked.append(Question("other", f"What is {word} the {second.name}?", a(first.name).capitalize() + "."))
        asked.append(Question("other", f"What is {opposite} the {first.name}?", a(second.name).capitalize() + "."))
    return canvas, _caption(things, back), asked


def shapes(random: RandomState, split: str) -> Drawn:
    """Two to five shapes, most of them gray or brown: colours that go with every shape alike, so that a shape is
    learned by its outline. No split is tested on them and they have no questions.
    """
    canvas, back = _ground(random, split)
    plain = tuple(colour for colour in ("gray", "brown") if colour != back)
    things: list[Thing] = []
    wanted = 2 + int(random.randint(4))
    for _ in range(40):
        shape, colour = layout(random, split, len(SHAPES), len(_FILLS))
        named = (SHAPES[shape], _FILLS[colour])
        if random.random_sample() < 0.7:
            named = (some(random, *SHAPES), some(random, *plain))
        radius = float(random.uniform(20, 50))
        x = float(random.uniform(radius + 2, canvas.width - radius - 2))
        y = float(random.uniform(radius + 2, canvas.height - radius - 2))
        apart = all(math.hypot(t.x - x, t.y - y) > t.radius + radius + 4 for t in things)
        if apart and named[1] != back and len(things) < wanted:
            things.append(Thing(*named, x, y, radius))
    for thing in things:
        _draw(canvas, thing)
    return canvas, "Shapes.", []


@lru_cache(maxsize=4)
def kept_apart(split: str) -> NDArray[np.bool_]:
    """(things, colours): which pairings of shape and colour a split's scenes never show, in THINGS and COLOUR_NAMES."""
    apart = np.zeros((len(THINGS), len(COLOUR_NAMES)), np.bool_)
    shown = layouts(split, len(SHAPES), len(_FILLS))
    for (i, shape), (j, colour) in product(enumerate(SHAPES), enumerate(_FILLS)):
        apart[THINGS.index(shape), COLOUR_NAMES.index(colour)] = (i, j) not in shown
    return apart


def frames(random: RandomState, split: str, count: int = 2) -> tuple[list[Canvas], str, list[Question]]:
    """The same shape in a few frames, moving one way or standing still."""
    state = random.randint(1 << 31)
    first, back = _ground(RandomState(state), split)
    (thing,) = _place(random, split, back, 1, first)
    way = some(random, "to the left", "to the right", "up", "down", "nowhere")
    dx, dy = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}[way]
    step = random.uniform(34, 60)
    width, height = first.width, first.height
    margin = thing.radius + 4
    x = _start(random, dx, step * (count - 1), margin, width)
    y = _start(random, dy, step * (count - 1), margin, height)
    made = []
    for i in range(count):
        canvas, _ = _ground(RandomState(state), split)
        _draw(canvas, replace(thing, x=x + dx * step * i, y=y + dy * step * i))
        made.append(canvas)
    does = "stands still" if way == "nowhere" else f"moves {way}"
    caption = f"{a(thing.name).capitalize()} {does}."
    asked = [
        Question("other", some(random, "What happens in these pictures?", "What happens?"), caption),
        Question("other", f"Which way does the {thing.shape} move?", f"It {does}."),
    ]
    return made, caption, asked


def _start(random: RandomState, direction: int, travel: float, margin: float, room: float) -> float:
    low, high = margin, room - margin
    if direction > 0:
        high = max(low + 1, high - travel)
    elif direction < 0:
        low = min(high - 1, low + travel)
    return float(random.uniform(low, high))


def _ground(random: RandomState, split: str) -> tuple[Canvas, str]:
    back = some(random, *_BACKS)
    size = (int(random.randint(240, 273)), int(random.randint(240, 273)))
    return Canvas(random, split, size, shade(random, back, 10), back), back


def _place(random: RandomState, split: str, back: str, count: int, canvas: Canvas) -> list[Thing]:
    """Shapes that do not touch; which shape goes with which colour is the split's."""
    things: list[Thing] = []
    while len(things) < count:
        shape, colour = layout(random, split, len(SHAPES), len(_FILLS))
        radius = float(random.uniform(24, 46))
        x = float(random.uniform(radius + 4, canvas.width - radius - 4))
        y = float(random.uniform(radius + 4, canvas.height - radius - 4))
        new = Thing(SHAPES[shape], _FILLS[colour], x, y, radius)
        apart = all(math.hypot(t.x - x, t.y - y) > t.radius + radius + 6 for t in things)
        if apart and new.colour != back and all(t.name != new.name for t in things):
            things.append(new)
        if len(things) == count and not _clear(things):
            things.clear()
    return things


def _clear(things: list[Thing]) -> bool:
    """Whether people would agree how the shapes stand to each other."""
    if len(things) != 2:
        across = sorted(t.x for t in things)
        return all(right - left > 28 for left, right in pairwise(across))
    dx, dy = abs(things[0].x - things[1].x), abs(things[0].y - things[1].y)
    return max(dx, dy) > 1.5 * min(dx, dy)


def _relation(things: list[Thing]) -> tuple[Thing, Thing, str]:
    one, two = things
    if abs(one.x - two.x) > abs(one.y - two.y):
        first, second = sorted((one, two), key=lambda t: t.x)
        return first, second, "to the left of"
    first, second = sorted((one, two), key=lambda t: t.y)
    return first, second, "above"


def _caption(things: list[Thing], back: str) -> str:
    if len(things) == 1:
        text = f"{a(things[0].name)} on {a(back)} background"
    elif len(things) == 2:
        first, second, word = _relation(things)
        text = f"{a(first.name)} {word} {a(second.name)}"
    else:
        one, two, three = (a(t.name) for t in sorted(things, key=lambda t: t.x))
        text = f"from left to right: {one}, {two} and {three}"
    return text[0].upper() + text[1:] + "."


def _draw(canvas: Canvas, thing: Thing) -> None:
    fill, middle, r = shade(canvas.random, thing.colour, 14), (thing.x, thing.y), thing.radius
    if thing.shape == "circle":
        canvas.disc("circle", thing.colour, middle, r, fill)
    elif thing.shape == "ring":
        canvas.disc("ring", thing.colour, middle, r, fill)
        canvas.disc("nothing", "none", middle, r * 0.55, canvas.background)
    elif thing.shape == "cross":
        w = r * 0.33
        canvas.box("cross", thing.colour, (thing.x - r, thing.y - w, thing.x + r, thing.y + w), fill)
        canvas.box("cross", thing.colour, (thing.x - w, thing.y - r, thing.x + w, thing.y + r), fill)
    elif thing.shape == "star":
        points = []
        for i in range(10):
            turn, reach = math.radians(-90 + 36 * i), r if i % 2 == 0 else r * 0.42
            points.append((thing.x + reach * math.cos(turn), thing.y + reach * math.sin(turn)))
        canvas.polygon("star", thing.colour, points, fill)
    else:
        corners, first = _CORNERS[thing.shape]
        turns = [math.radians(first + 360 * i / corners) for i in range(corners)]
        points = [(thing.x + r * math.cos(t), thing.y + r * math.sin(t)) for t in turns]
        canvas.polygon(thing.shape, thing.colour, points, fill)
