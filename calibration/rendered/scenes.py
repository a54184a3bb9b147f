"""Drawers of simple scenes: coloured shapes, where they stand to each other, and how they move from frame to frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from numpy.random import RandomState

from calibration.rendered.documents import Drawn, some
from calibration.rendered.drawing import Canvas, layout, shade
from calibration.rendered.picture import COLOURS, Question

SHAPES = ("circle", "square", "triangle", "star", "hexagon", "cross", "diamond", "ring")
_FILLS = tuple(c for c in COLOURS if c not in ("brown", "gray"))
_BACKS = ("white", "black", "gray", "blue", "green", "yellow", "pink")
_WAYS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
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
    """One to three shapes on a plain ground; how many there are on which ground is the split's."""
    ground, more = layout(random, split, len(_BACKS), 3, everywhere=True)
    back = _BACKS[ground]
    canvas = _ground(random, split, back)
    things = _place(random, back, 1 + more, canvas)
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
    wanted = Thing(some(random, *SHAPES), some(random, *_FILLS), 0, 0, 0)
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
    """Two to five shapes, for learning them; no split is tested on them and they have no questions."""
    back = some(random, *_BACKS)
    canvas = _ground(random, split, back)
    for thing in _scatter(random, back, 2 + int(random.randint(4)), canvas, (20, 50), 4):
        _draw(canvas, thing)
    return canvas, "Shapes.", []


def frames(random: RandomState, split: str, count: int = 2) -> tuple[list[Canvas], str, list[Question]]:
    """The same shape in a few frames, moving one way or standing still; which way on which ground is the split's."""
    state = random.randint(1 << 31)
    ground, turn = layout(random, split, len(_BACKS), len(_WAYS), everywhere=True)
    back, way = _BACKS[ground], list(_WAYS)[turn]
    dx, dy = _WAYS[way]
    first = _ground(RandomState(state), split, back)
    (thing,) = _place(random, back, 1, first)
    step = random.uniform(34, 60)
    width, height = first.width, first.height
    margin = thing.radius + 4
    x = _start(random, dx, step * (count - 1), margin, width)
    y = _start(random, dy, step * (count - 1), margin, height)
    made = []
    for i in range(count):
        canvas = _ground(RandomState(state), split, back)
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


def _ground(random: RandomState, split: str, back: str) -> Canvas:
    size = (int(random.randint(240, 273)), int(random.randint(240, 273)))
    return Canvas(random, split, size, shade(random, back, 10), back)


def _place(random: RandomState, back: str, count: int, canvas: Canvas) -> list[Thing]:
    """Different shapes of which people would agree how they stand to each other."""
    while True:
        things = _scatter(random, back, count, canvas, (24, 46), 6)
        if len(things) == count and len({t.name for t in things}) == count and _clear(things):
            return things


def _scatter(
    random: RandomState, back: str, count: int, canvas: Canvas, sizes: tuple[int, int], gap: int
) -> list[Thing]:
    """Shapes that do not touch, of any colour but the ground's; fewer where there is no room."""
    fills = [colour for colour in _FILLS if colour != back]
    things: list[Thing] = []
    for _ in range(40):
        if len(things) == count:
            break
        radius = float(random.uniform(*sizes))
        x = float(random.uniform(radius + 4, canvas.width - radius - 4))
        y = float(random.uniform(radius + 4, canvas.height - radius - 4))
        if all(math.hypot(t.x - x, t.y - y) > t.radius + radius + gap for t in things):
            things.append(Thing(some(random, *SHAPES), some(random, *fills), x, y, radius))
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
