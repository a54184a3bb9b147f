"""Pages full of text in many faces, sizes and inks: for learning to read, since other pictures hold few characters.

They have no questions; no split is tested on them.
"""

from __future__ import annotations

from numpy.random import RandomState

from calibration.rendered.documents import Drawn, rgb
from calibration.rendered.drawing import RGB, Canvas
from calibration.rendered.fonts import font_files
from calibration.rendered.picture import CHARACTERS
from calibration.rendered.words import code, pick

_LETTERS = CHARACTERS[1:]


def page(random: RandomState, split: str) -> Drawn:
    """Bands of text from the top to the bottom, each with its own face, size, ink and ground."""
    size = (int(random.randint(240, 273)), int(random.randint(240, 273)))
    ground, own_ink = _contrast(random)
    canvas = Canvas(random, split, size, ground, "none")
    files = font_files(split)
    y = float(random.uniform(0, 8))
    while y < canvas.height - 20:
        canvas.face = files[int(random.randint(len(files)))]
        height = 17.5 + 10 * float(random.random_sample()) ** 2
        pitch = height * random.uniform(1.05, 1.5)
        count, ink = 1 + int(random.randint(4)), own_ink
        if random.random_sample() < 0.4:
            ground, ink = _contrast(random)
            canvas.box("paper", "none", (0, y, canvas.width, min(canvas.height, y + count * pitch)), ground)
        for _ in range(count):
            if y + pitch > canvas.height:
                return canvas, "A page of text.", []
            _fill(canvas, y + pitch / 2, height, ink)
            y += pitch
    return canvas, "A page of text.", []


def _fill(canvas: Canvas, y: float, height: float, ink: RGB) -> None:
    """Words from the left edge to the right, with a wide gap here and there as between columns."""
    random, x = canvas.random, float(canvas.random.uniform(2, 24))
    while True:
        word = _word(random, canvas.split)
        wide = canvas.measure(word, height)
        if x + wide > canvas.width - 2:
            return
        canvas.text(x, y, word, height, ink)
        x += wide + height * (random.uniform(1, 3) if random.random_sample() < 0.1 else 0.28)


def _word(random: RandomState, split: str) -> str:
    """A word, a code, or letters that no language model can guess."""
    choice = random.random_sample()
    if choice < 0.25:
        return code(random)
    if choice < 0.45:
        places = random.randint(len(_LETTERS), size=int(random.randint(1, 8)))
        return "".join(_LETTERS[int(i)] for i in places)
    word = pick(random, "words", split)
    word = (word, word, word.title(), word.upper())[int(random.randint(4))]
    return word + (",.:;!?"[int(random.randint(6))] if random.random_sample() < 0.12 else "")


def _contrast(random: RandomState) -> tuple[RGB, RGB]:
    """Ground and ink, light and dark or the other way round, tinted now and then."""
    tint = int(random.randint(6, 70 if random.random_sample() < 0.3 else 12))
    light, dark = rgb(random, 256 - tint, 256), rgb(random, 0, tint + 30)
    return (light, dark) if random.random_sample() < 0.75 else (dark, light)
