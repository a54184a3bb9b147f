"""Drawers of charts: bars, lines, pies, their values printed beside them. Each returns the canvas and its questions."""

from __future__ import annotations

import math

from numpy.random import RandomState

from calibration.rendered.documents import Drawn, paper, some
from calibration.rendered.drawing import RGB, Canvas, layout, shade
from calibration.rendered.picture import Question
from calibration.rendered.words import pick, pick_some

_FILLS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "gray")
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def _labels(canvas: Canvas, count: int, size: float, room: float) -> list[str]:
    """Names for the horizontal axis, each at most `room` pixels wide."""
    random = canvas.random
    kind, first = int(random.randint(4)), int(random.randint(12))
    if kind == 0:
        return [_MONTHS[(first + i) % 12] for i in range(count)]
    if kind == 1 and canvas.measure("2020", size) < room - 2:
        return [str(2010 + first + i) for i in range(count)]
    if kind == 2:
        return [chr(65 + first + i) for i in range(count)]
    names = [n for n in pick_some(random, "first", canvas.split, 60) if canvas.measure(n, size) < room]
    return names[:count] if len(names) >= count else [chr(65 + i) for i in range(count)]


def _values(random: RandomState, count: int) -> list[int]:
    """Different numbers below 100."""
    return [int(v) for v in 4 + random.permutation(96)[:count]]


def bars(random: RandomState, split: str) -> Drawn:
    """A bar chart."""
    canvas, ink = paper(random, split)
    coloured, titled, axis = layout(random, split, 2, 2, 3)
    count, size = int(random.randint(3, 6)), random.uniform(18, 19)
    left, right = random.uniform(10, 20), canvas.width - random.uniform(6, 14)
    step = (right - left) / count
    labels, values = _labels(canvas, count, size, step - 4), _values(random, count)
    measure = pick(random, "measures", split)
    top, base = (44.0 if titled else 24.0), canvas.height - size - 10
    if titled:
        canvas.text(canvas.width / 2, 14, measure, size * 1.1, ink, "m")
    one = some(random, *_FILLS)
    fills = [_FILLS[int(i)] for i in random.permutation(len(_FILLS))[:count]] if coloured else [one] * count
    wide, scale = random.uniform(0.5, 0.85), (base - top - size) / max(values)
    for i, (label, value, fill) in enumerate(zip(labels, values, fills, strict=True)):
        x, y = left + (i + 0.5) * step, base - value * scale
        canvas.box("bar", fill, (x - step * wide / 2, y, x + step * wide / 2, base), shade(random, fill))
        canvas.text(x, base + size * 0.65 + 2, label, size, ink, "m")
        canvas.text(x, y - size * 0.62, str(value), size, ink, "m")
    if axis:
        canvas.rule([(left - 4, base), (right, base)], ink, axis)
        if axis == 2:
            canvas.rule([(left - 4, top), (left - 4, base)], ink)
    asked = _lookups(random, labels, values, "bar")
    tall = labels[values.index(max(values))]
    asked += [
        Question("charts", some(random, "Which bar is the tallest?", "Which bar is the largest?"), tall),
        Question("other", "Which bar is the shortest?", labels[values.index(min(values))]),
        Question("other", "How many bars are there?", str(count)),
    ]
    if coloured:
        i = int(random.randint(count))
        asked.append(Question("other", f"What colour is the bar of {labels[i]}?", fills[i].capitalize()))
    of = f" of {measure}" if titled else ""
    return canvas, f"A bar chart{of} with {count} bars; {tall} is the tallest at {max(values)}.", asked


def curve(random: RandomState, split: str) -> Drawn:
    """A line chart."""
    canvas, ink = paper(random, split)
    marked, titled, axis = layout(random, split, 3, 2, 3)
    count, size = int(random.randint(3, 6)), random.uniform(18, 19)
    left, right = random.uniform(10, 20), canvas.width - random.uniform(6, 14)
    step = (right - left) / count
    labels, values = _labels(canvas, count, size, step - 4), _values(random, count)
    measure = pick(random, "measures", split)
    top, base = (64.0 if titled else 40.0), canvas.height - 2 * size - 18
    if titled:
        canvas.text(canvas.width / 2, 14, measure, size * 1.1, ink, "m")
    low, high = min(values), max(values)
    fill = some(random, *(f for f in _FILLS if f not in ("yellow", "pink")))
    tint = shade(random, fill)
    points = [(left + (i + 0.5) * step, base - (v - low) / (high - low) * (base - top)) for i, v in enumerate(values)]
    canvas.line("line", fill, points, random.uniform(2, 4), tint)
    foot = canvas.height - size - 18
    for i, ((x, y), label, value) in enumerate(zip(points, labels, values, strict=True)):
        valley = all(value < v for v in values[max(0, i - 1) : i + 2] if v != value)
        if marked:
            canvas.disc("line", fill, (x, y), 2 + marked, tint)
        canvas.text(x, foot + size * 0.65 + 8, label, size, ink, "m")
        canvas.text(x, y + size * (0.75 if valley else -0.75), str(value), size, ink, "m")
    if axis:
        canvas.rule([(left - 4, foot + 6), (right, foot + 6)], ink, axis)
    asked = _lookups(random, labels, values, "point")
    best = labels[values.index(high)]
    change = "It rises." if values[-1] > values[0] else "It falls."
    asked += [
        Question("charts", some(random, "Where is the highest point?", "Where is the line highest?"), best),
        Question("other", "Does the line rise or fall from first to last?", change),
        Question("other", "What colour is the line?", fill.capitalize()),
    ]
    of = f" of {measure}" if titled else ""
    return canvas, f"A line chart{of} with {count} points, highest at {best} with {high}.", asked


def pie(random: RandomState, split: str) -> Drawn:
    """A pie chart, each slice's name beside it."""
    canvas, ink = paper(random, split)
    named, bordered, percent = layout(random, split, 2, 2, 2)
    count, size = int(random.randint(2, 5)), 18.0
    while True:
        cuts = sorted(int(v) for v in random.randint(5, 96, size=count - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        first, second = sorted(shares, reverse=True)[:2]
        if min(shares) >= 10 and len(set(shares)) == count and first - second >= 5:
            break
    names = pick_some(random, "goods" if named else "first", split, count)
    fills = [_FILLS[int(i)] for i in random.permutation(len(_FILLS))[:count]]
    tints: list[RGB] = [shade(random, fill) for fill in fills]
    legend = canvas.height - count * 21 - 4
    radius = min(legend / 2 - 6, canvas.width / 2 - 8) * random.uniform(0.85, 1.0)
    middle = (canvas.width * random.uniform(0.4, 0.6), 4 + radius)
    start = float(random.uniform(0, 360))
    for share, fill, tint in zip(shares, fills, tints, strict=True):
        end = start + 3.6 * share
        canvas.slice(fill, middle, radius, (start, end), tint)
        if bordered:
            for turn in (start, end):
                edge = (
                    middle[0] + radius * math.cos(math.radians(turn)),
                    middle[1] + radius * math.sin(math.radians(turn)),
                )
                canvas.rule([middle, edge], canvas.background, 2)
        start = end
    for i, (name, share, fill, tint) in enumerate(zip(names, shares, fills, tints, strict=True)):
        y = legend + i * 21 + 10
        canvas.box("slice", fill, (14, y - 7, 28, y + 7), tint)
        canvas.text(36, y, name + (f" {share}%" if percent else ""), size, ink)
    best = names[shares.index(max(shares))]
    i = int(random.randint(count))
    asked = [
        Question("charts", some(random, "Which slice is the largest?", "What is the largest slice?"), best),
        Question("other", f"What colour is {names[i]}?", fills[i].capitalize()),
        Question("other", "How many slices are there?", str(count)),
    ]
    if percent:
        asked.append(Question("charts", f"What is the share of {names[i]}?", f"{shares[i]}%"))
    return canvas, f"A pie chart of {', '.join(names[:-1])} and {names[-1]}; {best} is the largest.", asked


def _lookups(random: RandomState, labels: list[str], values: list[int], thing: str) -> list[Question]:
    i, j = (int(v) for v in random.permutation(len(labels))[:2])
    return [
        Question(
            "charts", some(random, f"What is the value of {labels[i]}?", f"How high is {labels[i]}?"), str(values[i])
        ),
        Question("other", f"Which {thing} has the value {values[j]}?", labels[j]),
    ]
