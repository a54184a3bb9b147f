"""Draws the records of `calibration.records` as small pictures, with Pillow's built-in font alone.

The pixels depend on the Pillow version (its font renderer), so a run that must be repeated exactly keeps Pillow pinned;
the quantizer's resume check notices a difference.
"""

from __future__ import annotations

from numpy.random import RandomState
from PIL import Image, ImageDraw, ImageFont

from calibration.records import Record

_PAPER = ((255, 255, 255), (250, 247, 238), (240, 244, 248), (228, 228, 228))
_INK = ((20, 20, 20), (30, 30, 90), (70, 30, 20))
_STRONG = ((178, 34, 34), (24, 78, 140), (30, 110, 60), (200, 140, 20), (90, 50, 120), (60, 60, 60))


def draw_record(record: Record, random: RandomState) -> Image.Image:
    """An RGB picture of the record, about 300 to 600 pixels wide; paper, ink and size vary with the stream."""
    drawers = {"receipt": _receipt, "table": _table, "chart": _chart, "sign": _sign}
    return drawers[record.kind](record, random)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _colour(random: RandomState, options: tuple[tuple[int, int, int], ...]) -> tuple[int, int, int]:
    return options[int(random.randint(len(options)))]


def _receipt(record: Record, random: RandomState) -> Image.Image:
    size = int(random.randint(14, 20))
    line, width = int(size * 1.5), size * 20
    image = Image.new("RGB", (width, line * (len(record.rows) + 4)), _colour(random, _PAPER))
    draw, ink = ImageDraw.Draw(image), _colour(random, _INK)
    draw.text((width / 2, line), record.title, ink, _font(size + 5), anchor="mm")
    for i, (left, right) in enumerate(record.rows):
        y = line * (2.5 + i)
        if left == "TOTAL":
            draw.line((size, y - size * 0.3, width - size, y - size * 0.3), ink, 2)
        draw.text((size, y), left, ink, _font(size))
        draw.text((width - size, y), right, ink, _font(size), anchor="ra")
    return image


def _table(record: Record, random: RandomState) -> Image.Image:
    size = int(random.randint(13, 19))
    line, columns = int(size * 1.7), len(record.rows[0])
    cell = size * 8
    width, height = cell * columns + 2 * size, line * (len(record.rows) + 3)
    image = Image.new("RGB", (width, height), _colour(random, _PAPER))
    draw, ink = ImageDraw.Draw(image), _colour(random, _INK)
    draw.text((size, line * 0.6), record.title, ink, _font(size + 2))
    top = line * 2
    draw.rectangle((size, top, width - size, top + line), fill=(205, 212, 222))
    for i, row in enumerate(record.rows):
        y = top + i * line
        draw.line((size, y, width - size, y), ink, 1)
        for j, text in enumerate(row):
            draw.text((size * 1.5 + j * cell, y + size * 0.3), text, ink, _font(size))
    bottom = top + len(record.rows) * line
    for j in range(columns + 1):
        draw.line((size + j * cell, top, size + j * cell, bottom), ink, 1)
    draw.line((size, bottom, width - size, bottom), ink, 1)
    return image


def _chart(record: Record, random: RandomState) -> Image.Image:
    width, height = int(random.randint(360, 560)), int(random.randint(260, 380))
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw, ink, fill = ImageDraw.Draw(image), _colour(random, _INK), _colour(random, _STRONG)
    draw.text((width / 2, 18), record.title, ink, _font(18), anchor="mm")
    left, base, top = 44, height - 34, 44
    draw.line((left, top, left, base), ink, 2)
    draw.line((left, base, width - 16, base), ink, 2)
    step = (width - 16 - left) / len(record.rows)
    as_line = random.randint(2) == 1
    points = []
    for i, (label, text) in enumerate(record.rows):
        x, y = left + step * (i + 0.5), base - int(text) * (base - top - 14) / 100
        points.append((x, y))
        if not as_line:
            draw.rectangle((x - step * 0.32, y, x + step * 0.32, base), fill=fill)
        draw.text((x, base + 14), label, ink, _font(14), anchor="mm")
        draw.text((x, y - 10), text, ink, _font(13), anchor="mm")
    if as_line:
        draw.line(points, fill, 3)
    for value in (0, 50, 100):
        draw.text((left - 6, base - value * (base - top - 14) / 100), str(value), ink, _font(12), anchor="rm")
    return image


def _sign(record: Record, random: RandomState) -> Image.Image:
    size = int(random.randint(34, 52))
    width, height = size * 9, size * (3 + len(record.rows))
    back, front = _colour(random, _STRONG), (255, 255, 255)
    image = Image.new("RGB", (width, height), back)
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 6, width - 7, height - 7), outline=front, width=4)
    draw.text((width / 2, size * 1.2), record.title, front, _font(size), anchor="mm")
    for i, (text,) in enumerate(record.rows):
        draw.text((width / 2, size * (2.4 + i)), text, front, _font(int(size * 0.6)), anchor="mm")
    return image
