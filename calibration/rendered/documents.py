"""Drawers of documents: printed lines, signs, receipts, forms, tables. Each returns the canvas and its questions.

Text is at least 18 pixels to the em. `split` decides words, fonts and layouts.
"""

from __future__ import annotations

from numpy.random import RandomState

from calibration.rendered.drawing import RGB, Canvas, layout, shade
from calibration.rendered.picture import Question
from calibration.rendered.words import code, letters, money, pick, pick_some

Drawn = tuple[Canvas, str, list[Question]]  # the picture, its caption, what can be asked
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def some(random: RandomState, *options: str) -> str:
    """One of the options."""
    return options[int(random.randint(len(options)))]


def paper(random: RandomState, split: str) -> tuple[Canvas, RGB]:
    """A light or, now and then, dark page and its ink."""
    size = (int(random.randint(240, 273)), int(random.randint(240, 273)))
    if random.random_sample() < 0.85:
        light = int(random.randint(215, 256))
        return Canvas(random, split, size, rgb(random, light - 8, light + 1), "white"), rgb(random, 0, 80)
    return Canvas(random, split, size, rgb(random, 10, 60), "black"), rgb(random, 210, 256)


def rgb(random: RandomState, low: int, high: int) -> RGB:
    """Any colour with all of red, green and blue in [low, high)."""
    r, g, b = (int(v) for v in random.randint(low, high, size=3))
    return r, g, b


def lines(random: RandomState, split: str) -> Drawn:
    """A few printed lines."""
    canvas, ink = paper(random, split)
    align, casing = layout(random, split, 3, 4)
    size = 18 + 8 * float(random.random_sample()) ** 1.5
    pitch = size * random.uniform(1.2, 1.7)
    most = min(7, int((canvas.height - 16) // pitch))
    count = 1 + int(random.randint(most))
    margin = float(random.uniform(6, 18))
    rows = [_row(canvas, size, canvas.width - 2 * margin, casing) for _ in range(count)]
    y = pitch * 0.6 + 4 + random.random_sample() * max(0.0, canvas.height - 8 - count * pitch)
    x = (margin, canvas.width / 2, canvas.width - margin)[align]
    for i, row in enumerate(rows):
        canvas.text(x, y + i * pitch, row, size, ink, "lmr"[align])
    text = "\n".join(rows)
    asked = [
        Question("lines", some(random, "Read the text.", "What does it say?", "What is written here?"), text),
        Question("other", some(random, "Read the first line.", "What does the first line say?"), rows[0]),
        Question("other", some(random, "Read the last line.", "What does the last line say?"), rows[-1]),
        Question("other", "How many lines of text are there?", str(count)),
    ]
    return canvas, f'A printed text that begins with "{rows[0]}".', asked


def _row(canvas: Canvas, size: float, room: float, casing: int) -> str:
    """Words for one line that is at most `room` pixels wide."""
    random, words = canvas.random, ""
    wanted = room * random.uniform(0.45, 1.0)
    for _ in range(24):
        word = code(random) if random.random_sample() < 0.2 else pick(random, "words", canvas.split)
        word = (word, word.title() if word.islower() else word, word.upper(), word)[casing]
        if random.random_sample() < 0.12:
            word += some(random, ",", ".", ":", "!", "?")
        longer = f"{words} {word}".strip()
        if canvas.measure(longer, size) > (wanted if words else room):
            if words:
                break
            continue
        words = longer
    return words or str(random.randint(10, 100))


def sign(random: RandomState, split: str) -> Drawn:
    """A sign or label: one to three short lines, large, on a colour."""
    frame, shape = layout(random, split, 3, 4)
    colour = some(random, "red", "green", "blue", "yellow", "orange", "black", "white", "brown", "purple")
    back = some(random, "gray", "white", "brown", "green", "blue")
    back = "black" if back == colour else back
    size = (int(random.randint(240, 273)), int(random.randint(240, 273)))
    canvas = Canvas(random, split, size, shade(random, back), back)
    ink = shade(random, "black" if colour in ("yellow", "white", "orange") else "white")
    count = 1 + int(random.randint(3))
    rows = [_sign_row(random, split) for _ in range(count)]
    left, right = random.uniform(6, 24), canvas.width - random.uniform(6, 24)
    widest = max(canvas.measure(row, 40) for row in rows) / 40
    tall = min((right - left - 24) / widest, random.uniform(20, 32), 150 / count)
    tall = max(tall, 18)
    high = count * tall * 1.35 + random.uniform(10, 40)
    top = random.uniform(6, max(7.0, canvas.height - high - 6))
    bottom = min(top + high, canvas.height - 4)
    fill = shade(random, colour)
    canvas.box("sign", colour, (left, top, right, bottom), fill, (0, 6, 14, 24)[shape])
    if frame:
        inset = 4
        area = (left + inset, top + inset, right - inset, bottom - inset)
        canvas.box("sign", colour, area, ink if frame == 1 else fill, 4)
        area = (left + inset + 2, top + inset + 2, right - inset - 2, bottom - inset - 2)
        canvas.box("sign", colour, area, fill, 4)
    for i, row in enumerate(rows):
        y = (top + bottom) / 2 + (i - (count - 1) / 2) * tall * 1.3
        canvas.text((left + right) / 2, y, row, tall, ink, "m")
    text = "\n".join(rows)
    asked = [
        Question("lines", some(random, "What does the sign say?", "Read the sign.", "Read the text."), text),
        Question("other", "What colour is the sign?", colour.capitalize()),
    ]
    return canvas, f'{"An" if colour == "orange" else "A"} {colour} sign that says "{" ".join(rows)}".', asked


def _sign_row(random: RandomState, split: str) -> str:
    kind = int(random.randint(5))
    if kind == 0:
        return f"{pick(random, 'cities', split)} {random.randint(1, 400)}"
    if kind == 1:
        return f"{some(random, 'Room', 'Exit', 'Gate', 'Bus', 'Lot', 'No.')} {code(random)}"
    words = " ".join(pick_some(random, "words", split, int(random.randint(1, 3))))
    return words.upper() if kind < 4 else words.capitalize()


def date(random: RandomState, style: int) -> str:
    """A day in one of three common forms."""
    day, month, year = int(random.randint(1, 29)), int(random.randint(12)), int(random.randint(2001, 2030))
    return (f"{day} {_MONTHS[month]} {year}", f"{year}-{month + 1:02d}-{day:02d}", f"{day:02d}/{month + 1:02d}/{year}")[
        style
    ]


def receipt(random: RandomState, split: str) -> Drawn:
    """A shop's receipt: name, date, goods and prices, total."""
    canvas, ink = paper(random, split)
    heading, dating, sort, ruled = layout(random, split, 3, 3, 3, 2)
    shop = f"{pick(random, 'words', split).capitalize()} {some(random, *_shops(split))}"
    day = date(random, dating)
    goods = pick_some(random, "goods", split, int(random.randint(2, 5)))
    prices = [int(random.randint(50, 6000)) for _ in goods]
    sign = ("", "$", "€")[int(random.randint(3))]
    cost = [f"{sign}{p // 100}.{p % 100:02d}" for p in prices]
    total = f"{sign}{sum(prices) // 100}.{sum(prices) % 100:02d}"
    word = some(random, "Total", "TOTAL", "Total due", "Amount")
    number = str(random.randint(100, 10000))
    body = list(zip(goods, cost, strict=True))
    extra = [("Receipt", number)] if sort else []
    rows = [*extra, *body] if sort == 1 else body
    after = extra if sort == 2 else []
    size = random.uniform(18, 20)
    lines = 2.3 + len(rows) + 1.3 + len(after)
    pitch = min(canvas.height / (lines + 0.6), size * 1.6)
    size = min(size, pitch / 1.05)
    margin = float(random.uniform(8, 22))
    left, right = margin, canvas.width - margin
    y = pitch * 0.9
    big = min(size * random.uniform(1.0, 1.4), size * (right - left) / canvas.measure(shop, size))
    canvas.text((left, canvas.width / 2, canvas.width / 2)[heading], y, shop, big, ink, "lmm"[heading])
    y += pitch * 1.15
    canvas.text((left, canvas.width / 2, right)[heading], y, day, size, ink, "lmr"[heading])
    y += pitch * 1.1
    for name, value in rows:
        canvas.text(left, y, name, size, ink)
        canvas.text(right, y, value, size, ink, "r")
        y += pitch
    if ruled:
        canvas.rule([(left, y - pitch * 0.4), (right, y - pitch * 0.4)], ink)
    y += pitch * 0.2
    canvas.text(left, y, word, size, ink)
    canvas.text(right, y, total, size, ink, "r")
    for name, value in after:
        y += pitch
        canvas.text(left, y, name, size, ink)
        canvas.text(right, y, value, size, ink, "r")
    which = int(random.randint(len(goods)))
    asked = [
        Question("fields", some(random, "What is the total?", "How much is the total?", "What is the sum?"), total),
        Question(
            "fields",
            some(random, f"How much is the {goods[which]}?", f"What is the price of {goods[which]}?"),
            cost[which],
        ),
        Question("fields", some(random, "What is the date?", "When was this bought?"), day),
        Question("fields", some(random, "What is the name of the shop?", "Which shop is this from?"), shop),
        Question("other", "What was bought?", ", ".join(goods)),
    ]
    if extra:
        asked.append(Question("fields", "What is the receipt number?", number))
    return canvas, f"A receipt from {shop}, dated {day}, with a total of {total}.", asked


def _shops(split: str) -> tuple[str, ...]:
    from calibration.rendered.words import words

    return words("shops", split)


def form(random: RandomState, split: str) -> Drawn:
    """A form or label with named fields."""
    canvas, ink = paper(random, split)
    style, titled, order = layout(random, split, 3, 2, 3)
    person = f"{pick(random, 'first', split)} {pick(random, 'last', split)}"
    fields = {
        "Name": person,
        "City": pick(random, "cities", split),
        "Date": date(random, order),
        "Phone": f"{random.randint(200, 1000)} {random.randint(1000, 10000)}",
        some(random, "Order", "Invoice", "Ticket"): f"{letters(random, 1)}{random.randint(100, 10000)}",
        "Amount": money(random, 50000),
        "Item": pick(random, "goods", split),
        "Age": str(random.randint(18, 95)),
        "Weight": f"{random.randint(1, 100)} kg",
    }
    names = [list(fields)[int(i)] for i in random.permutation(len(fields))[: int(random.randint(3, 6))]]
    title = f"{pick(random, 'words', split).capitalize()} {some(random, 'Form', 'Card', 'Label', 'Pass')}"
    margin, size = float(random.uniform(8, 20)), random.uniform(18, 20)
    count = len(names) + titled
    pitch = min((canvas.height - 12) / (count + 0.2), size * random.uniform(1.5, 2.2))
    size = min(size, pitch / 1.15)
    y = pitch * 0.6 + random.random_sample() * max(0.0, canvas.height - 12 - count * pitch) + 2
    if titled:
        canvas.text(margin, y, title, size * 1.15, ink)
        y += pitch
    column = margin + max(canvas.measure(name + ": ", size) for name in names) + 4
    for name in names:
        value = fields[name]
        if style == 2:
            area = (column - 4, y - pitch * 0.44, canvas.width - margin, y + pitch * 0.44)
            canvas.box("box", "none", area, shade(random, "gray"))
            inner = (area[0] + 1, area[1] + 1, area[2] - 1, area[3] - 1)
            canvas.box("box", "none", inner, canvas.background)
        canvas.text(margin, y, name + (":" if style != 2 else ""), size, ink)
        x = margin + canvas.measure(name + ": ", size) if style == 0 else column
        canvas.text(x, y, value, size, ink)
        y += pitch
    asked = [
        Question("fields", some(random, f"What is the {n.lower()}?", f"Read the {n.lower()}.", f"{n}?"), fields[n])
        for n in names
    ]
    asked.append(Question("other", "Which fields does the form have?", ", ".join(names)))
    if titled:
        asked.append(Question("other", "What is the title?", title))
    head = f'A form titled "{title}"' if titled else "A form"
    return canvas, f"{head} with the fields {', '.join(names[:-1])} and {names[-1]}.", asked


def table(random: RandomState, split: str) -> Drawn:
    """A small table of numbers: names down, one or two measures across."""
    canvas, ink = paper(random, split)
    ruled, shaded, align = layout(random, split, 3, 2, 2)
    kind = some(random, "cities", "first", "goods")
    rows = pick_some(random, kind, split, int(random.randint(2, 6)))
    measures = pick_some(random, "measures", split, 1 + int(random.randint(2)))
    values = [[int(random.randint(1, 1000)) for _ in measures] for _ in rows]
    head = {"cities": "City", "first": "Name", "goods": "Item"}[kind]
    size = random.uniform(18, 19)
    margin, pitch = (
        float(random.uniform(6, 14)),
        min(canvas.height / (len(rows) + 2.0), size * random.uniform(1.5, 2.1)),
    )
    size = min(size, pitch / 1.15)
    needed = max(canvas.measure(t, size) for t in (head, *rows)) + sum(canvas.measure(m, size) + 12 for m in measures)
    if needed + 14 + 2 * margin > canvas.width:
        measures, values = measures[:1], [line[:1] for line in values]
    first = max(canvas.measure(t, size) for t in (head, *rows)) + 14
    wide = (canvas.width - 2 * margin - first) / len(measures)
    top = random.uniform(4, max(5.0, canvas.height - pitch * (len(rows) + 1) - 4))
    right = canvas.width - margin
    if shaded:
        canvas.box("box", "none", (margin, top, right, top + pitch), tuple(int(v * 0.82) for v in canvas.background))  # type: ignore[arg-type]
    for i in range(len(rows) + 2):
        if ruled == 1 or (ruled == 2 and i in (0, 1, len(rows) + 1)):
            canvas.rule([(margin, top + i * pitch), (right, top + i * pitch)], ink)
    if ruled == 1:
        for x in (margin, *(margin + first + j * wide for j in range(len(measures) + 1))):
            canvas.rule([(x, top), (x, top + (len(rows) + 1) * pitch)], ink)
    lines = [(head, *measures), *((r, *map(str, v)) for r, v in zip(rows, values, strict=True))]
    for i, line in enumerate(lines):
        y = top + (i + 0.5) * pitch
        canvas.text(margin + 5, y, line[0], size, ink)
        for j, cell in enumerate(line[1:]):
            x = margin + first + (j + 1) * wide - 6 if align else margin + first + j * wide + 6
            canvas.text(x, y, cell, size, ink, "r" if align else "l")
    i, j = int(random.randint(len(rows))), int(random.randint(len(measures)))
    column = [line[j] for line in values]
    asked = [
        Question(
            "charts",
            some(random, f"What is the value of {measures[j]} for {rows[i]}?", f"{measures[j]} of {rows[i]}?"),
            str(values[i][j]),
        ),
        Question("other", "How many rows does the table have?", str(len(rows))),
        Question("other", f"Which {head.lower()} names are in the table?", ", ".join(rows)),
    ]
    if len(set(column)) == len(column):
        best = rows[column.index(max(column))]
        asked.append(Question("charts", f"Which {head.lower()} has the highest {measures[j]}?", best))
    return canvas, f"A table of {' and '.join(measures)} for {', '.join(rows)}.", asked
