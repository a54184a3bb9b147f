"""Invented records of the kind that documents show: receipts, tables, charts, signs, with questions about them.

Each is drawn from a seeded stream; as text they enter the "text" set, drawn by `calibration.pictures` the "image-text"
set. Every name and number is made up.
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.random import RandomState

_SHOPS = ("Corner Bakery", "Hill Street Hardware", "Green Basket", "Luna Books", "Harbour Pharmacy", "Café Morgenrot")
_GOODS = (
    *("Rye bread", "Butter 250g", "Apples 1kg", "Coffee beans", "Oat milk", "Soap", "Batteries AA", "Notebook A5"),
    *("Light bulb E27", "Paint brush", "Olive oil", "Honey", "Envelopes", "Tomatoes", "Tea, black", "Screws M4x20"),
)
_TOWNS = ("Aldbury", "Brennfeld", "Castelmar", "Dunmore", "Elvestad", "Fontclair", "Gravina", "Highmoor")
_PEOPLE = ("N. Adeyemi", "C. Brandt", "L. Costa", "M. Duval", "S. Eriksen", "K. Fujita", "R. Gupta", "T. Horvat")
_MEASURES = ("Visitors", "Revenue (k)", "Rainfall (mm)", "Orders", "Returns", "Energy (kWh)", "Staff", "Deliveries")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_SIGNS = (
    ("CAUTION", "Wet floor", "Use other stairs"),
    ("PLATFORM {n}", "{town}", "departs {time}"),
    ("NO ENTRY", "Deliveries only", "{time} - 17:30"),
    ("ROOM {n}", "{person}", "Please knock"),
    ("OPEN", "Mon - Sat {time}", "closed on Sundays"),
    ("{town}", "{n} km", "Exit {m}"),
    ("SALE -{m}%", "until {day} {month}", "while stocks last"),
)


@dataclass(frozen=True)
class Record:
    """One record. `kind` decides how it is drawn; `text` is the same content as plain lines."""

    kind: str  # "receipt" | "table" | "chart" | "sign"
    title: str
    rows: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[str, str], ...]  # (question, answer)

    @property
    def text(self) -> str:
        """Title and rows, columns aligned as in a printed table."""
        widths = [max(len(row[i]) for row in self.rows if i < len(row)) for i in range(max(map(len, self.rows)))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in self.rows]
        return "\n".join([self.title, *lines])


def make_record(random: RandomState, kind: str | None = None) -> Record:
    """The next record of a stream, of a random kind unless one is named."""
    makers = {"receipt": _receipt, "table": _table, "chart": _chart, "sign": _sign}
    return makers[kind or _pick(random, tuple(makers))](random)


def _pick(random: RandomState, options: tuple[str, ...]) -> str:
    return options[int(random.randint(len(options)))]


def _some(random: RandomState, options: tuple[str, ...], count: int) -> list[str]:
    return [options[int(i)] for i in random.permutation(len(options))[:count]]


def _receipt(random: RandomState) -> Record:
    shop, date = _pick(random, _SHOPS), _date(random)
    goods = _some(random, _GOODS, int(random.randint(3, 8)))
    counts = [int(random.randint(1, 5)) for _ in goods]
    prices = [int(random.randint(45, 2400)) for _ in goods]
    total = sum(c * p for c, p in zip(counts, prices, strict=True))
    rows = [(f"{c} x {g}", _money(c * p)) for g, c, p in zip(goods, counts, prices, strict=True)]
    rows += [("TOTAL", _money(total)), (f"Receipt {random.randint(1000, 9999)}", date)]
    which = int(random.randint(len(goods)))
    return Record(
        "receipt",
        shop,
        tuple(rows),
        (
            ("What is the total?", _money(total)),
            (f"How much was paid for {goods[which]}?", _money(counts[which] * prices[which])),
            ("Which shop is this receipt from, and what is its date?", f"It is from {shop}, dated {date}."),
            ("How many different items were bought?", str(len(goods))),
            ("Read the receipt aloud.", "; ".join(f"{a}: {b}" for a, b in rows)),
        ),
    )


def _table(random: RandomState) -> Record:
    measures = _some(random, _MEASURES, int(random.randint(2, 4)))
    places = _some(random, _TOWNS, int(random.randint(3, 7)))
    values = [[int(random.randint(3, 9000)) for _ in measures] for _ in places]
    rows = [("Place", *measures)] + [(p, *(f"{v:,}" for v in row)) for p, row in zip(places, values, strict=True)]
    column, line = int(random.randint(len(measures))), int(random.randint(len(places)))
    best = max(range(len(places)), key=lambda i: values[i][column])
    whole = sum(row[column] for row in values)
    return Record(
        "table",
        f"Table {random.randint(1, 40)}. {measures[0]} by place, {random.randint(1995, 2025)}",
        tuple(rows),
        (
            (f"What is the value of {measures[column]} for {places[line]}?", f"{values[line][column]:,}"),
            (f"Which place has the highest {measures[column]}?", f"{places[best]}, with {values[best][column]:,}."),
            (f"What is the sum of the column {measures[column]}?", f"{whole:,}"),
            ("List the places in the table.", ", ".join(places)),
        ),
    )


def _chart(random: RandomState) -> Record:
    measure, start = _pick(random, _MEASURES), int(random.randint(6))
    labels = _MONTHS[start : start + int(random.randint(4, 7))]
    values = [int(random.randint(5, 100)) for _ in labels]
    top, low = labels[values.index(max(values))], labels[values.index(min(values))]
    change = "rises" if values[-1] > values[0] else "falls" if values[-1] < values[0] else "is the same"
    return Record(
        "chart",
        f"{measure}, {_pick(random, _TOWNS)}",
        tuple((label, str(value)) for label, value in zip(labels, values, strict=True)),
        (
            ("In which month is the value highest?", f"In {top}, with {max(values)}."),
            ("In which month is the value lowest?", f"In {low}, with {min(values)}."),
            ("What is the difference between the highest and the lowest value?", str(max(values) - min(values))),
            ("What does the chart show?", f"{measure} from {labels[0]} to {labels[-1]}; from end to end it {change}."),
            (f"What is the value in {labels[1]}?", str(values[1])),
        ),
    )


def _sign(random: RandomState) -> Record:
    fill = {
        "n": random.randint(1, 60),
        "m": random.randint(5, 75),
        "town": _pick(random, _TOWNS),
        "person": _pick(random, _PEOPLE),
        "time": f"{random.randint(6, 22):02}:{5 * random.randint(12):02}",
        "day": random.randint(1, 29),
        "month": _pick(random, _MONTHS),
    }
    template = _SIGNS[int(random.randint(len(_SIGNS)))]
    lines = [line.format(**fill) for line in template]
    return Record(
        "sign",
        lines[0],
        tuple((line,) for line in lines[1:]),
        (
            ("What does the sign say?", ". ".join(lines) + "."),
            ("What is written in the largest letters?", lines[0]),
            ("Describe the picture in one sentence.", f"A sign that reads “{lines[0]}”, and below it “{lines[1]}”."),
        ),
    )


def _date(random: RandomState) -> str:
    return f"{random.randint(1, 29):02}.{random.randint(1, 13):02}.{random.randint(2015, 2026)}"


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"
