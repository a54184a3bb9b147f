"""Drawers of instruments: digital displays and round gauges. Each returns the canvas and its questions."""

from __future__ import annotations

import math

from numpy.random import RandomState

from calibration.rendered.documents import Drawn, some
from calibration.rendered.drawing import RGB, Canvas, layout, shade
from calibration.rendered.picture import Question

# name on the panel, unit, word in questions, smallest, largest, decimals
_METERS = (
    *(("TEMP", "°C", "temperature", 1, 99, 1), ("HUMIDITY", "%", "humidity", 5, 99, 0)),
    *(("PRESSURE", "bar", "pressure", 1, 20, 1), ("SPEED", "km/h", "speed", 1, 250, 0)),
    *(("POWER", "kW", "power", 1, 99, 1), ("VOLTAGE", "V", "voltage", 1, 400, 0), ("LEVEL", "%", "level", 1, 99, 0)),
    *(("CURRENT", "A", "current", 1, 60, 1), ("FLOW", "L/min", "flow", 1, 99, 1), ("WEIGHT", "kg", "weight", 1, 99, 1)),
)
# largest value of a gauge's scale and the distance of its numbers; the needle stands on a number or halfway
_SCALES = ((100, 20), (10, 2), (200, 40), (60, 10))
_SEGMENTS = {  # a b c d e f g
    **{"0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc", "5": "afgcd", "6": "afgedc", "7": "abc"},
    **{"8": "abcdefg", "9": "abcdfg"},
}


def display(random: RandomState, split: str) -> Drawn:
    """One or two digital displays."""
    style, framing, naming = layout(random, split, 2, 3, 2)
    canvas = _panel(random, split)
    count = 1 + int(random.randint(2))
    meters = [_METERS[int(i)] for i in random.permutation(len(_METERS))[:count]]
    readings, asked = [], []
    room = canvas.height / count
    for i, meter in enumerate(meters):
        value = _value(random, meter)
        high = random.uniform(0.34, 0.5) * min(room, 170)
        middle = room * (i + 0.55)
        back, glow = _glass(random)
        area = (random.uniform(8, 30), middle - high * 0.85, canvas.width - random.uniform(8, 30), middle + high * 0.85)
        area = (area[0], max(area[1], room * i + 26), area[2], area[3])
        middle = (area[1] + area[3]) / 2
        canvas.box("display", "none", area, back, (0, 5, 10)[framing])
        unit = min(22.0, max(18.0, high * 0.35))
        right = area[2] - 8 - canvas.measure(meter[1], unit)
        canvas.text(right + 2, middle + high * 0.3, meter[1], unit, glow)
        if style:
            _seven(canvas, right - 4, middle, high, value, glow)
        else:
            size = min(high * 1.2, high * 1.2 * (right - area[0] - 10) / canvas.measure(value, high * 1.2))
            canvas.text(right - 4, middle, value, size, glow, "r")
        light = canvas.background[0] > 110
        y = area[1] - 12
        ink = (20, 20, 20) if light else (235, 235, 235)
        canvas.text(area[0] if naming else canvas.width / 2, y, meter[0], 17, ink, "l" if naming else "m")
        reading = f"{value} {meter[1]}"
        readings.append(f"{meter[2]} {reading}")
        asked.append(Question("panels", some(random, f"What is the {meter[2]}?", f"Read the {meter[2]}."), reading))
    if count == 1:
        whole = asked[0].answer
        asked.append(Question("panels", some(random, "What does the display show?", "Read the display."), whole))
    asked.append(Question("other", "How many displays are there?", str(count)))
    caption = f"A panel with {'a digital display' if count == 1 else 'two digital displays'}: {', '.join(readings)}."
    return canvas, caption, asked


def gauge(random: RandomState, split: str) -> Drawn:
    """A round gauge with a needle."""
    dark, ticks, labelled = layout(random, split, 2, 3, 2)
    canvas = _panel(random, split)
    meter = _METERS[int(random.randint(len(_METERS)))]
    top, step = _SCALES[int(random.randint(len(_SCALES)))]
    marks = top // step
    halves = int(random.randint(2 * marks + 1))
    value = halves * step / 2
    reading = f"{value:g} {meter[1]}"
    radius = min(canvas.width, canvas.height) / 2 * random.uniform(0.82, 0.95)
    middle = (canvas.width / 2 + random.uniform(-4, 4), canvas.height / 2 + random.uniform(-2, 6))
    face, ink = (shade(random, "black"), shade(random, "white")) if dark else (shade(random, "white", 10), (25, 25, 25))
    canvas.disc("dial", "black" if dark else "white", middle, radius + 4, shade(random, "gray"))
    canvas.disc("dial", "black" if dark else "white", middle, radius, face)
    size = 18.0
    for i in range(2 * marks + 1):
        direction = _direction(i / (2 * marks))
        major = i % 2 == 0
        if major or ticks:
            inner = radius * (0.86 if major else 0.91)
            canvas.rule([_at(middle, direction, inner), _at(middle, direction, radius * 0.97)], ink, 3 if major else 1)
        if major and (marks <= 6 or i % 4 == 0 or labelled):
            x, y = _at(middle, direction, radius * 0.68)
            canvas.text(x, y, str(i // 2 * step), size, ink, "m")
    x, y = middle
    canvas.text(x, y + radius * 0.78, meter[1], size, ink, "m")
    canvas.text(x, y + radius * 0.42, meter[0], min(18.0, 18 * radius / canvas.measure(meter[0], 18)), ink, "m")
    colour = some(random, "red", "blue", "orange", "white" if dark else "black")
    direction = _direction(value / top)
    side = (direction[1], -direction[0])
    tip, back = _at(middle, direction, radius * random.uniform(0.8, 0.9)), _at(middle, direction, -radius * 0.12)
    wide = random.uniform(2.5, 4.5)
    points = [
        tip,
        (back[0] + wide * side[0], back[1] + wide * side[1]),
        (back[0] - wide * side[0], back[1] - wide * side[1]),
    ]
    canvas.polygon("needle", colour, points, shade(random, colour, 10))
    canvas.disc("needle", colour, middle, random.uniform(5, 9), shade(random, "gray"))
    # nobody wrote it there, but eyes that see the needle may: the reading stands at its hub
    number = f"{value:g}"
    canvas.written(number, [(middle[0] + 10 * (i - (len(number) - 1) / 2), middle[1]) for i in range(len(number))])
    asked = [
        Question("panels", some(random, "What does the gauge read?", "What does the gauge show?"), reading),
        Question("panels", some(random, f"What is the {meter[2]}?", f"Read the {meter[2]}."), reading),
        Question("other", "What is the largest number on the scale?", str(top)),
        Question("other", "What colour is the needle?", colour.capitalize()),
    ]
    return canvas, f"A round gauge of the {meter[2]}, reading {reading}.", asked


def _panel(random: RandomState, split: str) -> Canvas:
    size = (int(random.randint(240, 273)), int(random.randint(240, 273)))
    colour = some(random, "gray", "white", "black", "blue", "brown", "green")
    return Canvas(random, split, size, shade(random, colour), colour)


def _glass(random: RandomState) -> tuple[RGB, RGB]:
    """Back and digits of a display."""
    pairs: tuple[tuple[RGB, RGB], ...] = (
        *(((15, 15, 15), (255, 60, 40)), ((10, 20, 10), (60, 255, 90)), ((10, 15, 30), (90, 200, 255))),
        *(((165, 185, 150), (20, 30, 20)), ((15, 15, 15), (255, 180, 40)), ((240, 240, 240), (20, 20, 20))),
    )
    return pairs[int(random.randint(len(pairs)))]


def _value(random: RandomState, meter: tuple[str, str, str, int, int, int]) -> str:
    low, high, decimals = meter[3:]
    whole = str(random.randint(low, high))
    return f"{whole}.{random.randint(10)}" if decimals else whole


def _seven(canvas: Canvas, right: float, middle: float, high: float, value: str, glow: RGB) -> None:
    """The value in seven segments, its right end at `right`."""
    digits = sum(c != "." for c in value)
    wide = min(high * 0.55, (right - 20) / (digits * 1.35 + 0.3))
    stroke = max(3.0, wide * 0.17)
    x = right
    centres: list[tuple[float, float]] = []
    for character in reversed(value):
        if character == ".":
            x -= stroke * 0.6
            canvas.box("display", "none", (x - stroke, middle + high / 2 - stroke, x, middle + high / 2), glow)
            centres.append((x - stroke / 2, middle + high / 2 - stroke / 2))
            x -= stroke * 1.4
            continue
        left, t, b = x - wide, middle - high / 2, middle + high / 2
        ends = {
            **{"a": ((left, t), (x, t)), "g": ((left, middle), (x, middle)), "d": ((left, b), (x, b))},
            **{"f": ((left, t), (left, middle)), "b": ((x, t), (x, middle))},
            **{"e": ((left, middle), (left, b)), "c": ((x, middle), (x, b))},
        }
        for segment in _SEGMENTS[character]:
            (x0, y0), (x1, y1) = ends[segment]
            gap = stroke * 0.35
            dx, dy = (gap, 0.0) if y0 == y1 else (0.0, gap)
            canvas.line("display", "none", [(x0 + dx, y0 + dy), (x1 - dx, y1 - dy)], stroke, glow)
        centres.append(((left + x) / 2, middle))
        x -= wide * 1.35
    canvas.written(value, list(reversed(centres)))


def _direction(share: float) -> tuple[float, float]:
    """Where a share of the scale points to: 240 degrees, from lower left over the top to lower right."""
    turn = math.radians(150 + 240 * share)
    return math.cos(turn), math.sin(turn)


def _at(middle: tuple[float, float], direction: tuple[float, float], distance: float) -> tuple[float, float]:
    return middle[0] + direction[0] * distance, middle[1] + direction[1] * distance
