"""From a seed to a labelled picture: choose a kind, draw it, bend it, spoil it."""

from __future__ import annotations

import io

import numpy as np
from numpy.random import RandomState
from PIL import Image, ImageFilter

from calibration.rendered.documents import form, lines, receipt, sign, table
from calibration.rendered.drawing import SPLITS, Canvas, spoil
from calibration.rendered.figures import bars, curve, pie
from calibration.rendered.pages import page
from calibration.rendered.panels import display, gauge
from calibration.rendered.picture import Question, Rendered
from calibration.rendered.scenes import frames, scene, shapes
from edgevl.errors import UsageError

_DRAWERS = {
    **{"lines": lines, "sign": sign, "receipt": receipt, "form": form, "table": table},
    **{"bars": bars, "curve": curve, "pie": pie, "display": display, "gauge": gauge, "scene": scene},
}
KINDS = (*_DRAWERS, "frames")
PAGE, SHAPES = "page", "shapes"  # have no questions and come only when they are named
_UNASKED = {PAGE: page, SHAPES: shapes}
# how often each kind comes in training, out of their sum
_SHARES = (20, 8, 12, 12, 9, 8, 6, 5, 6, 10, 12, 3)
_ASKS_CAPTION = (
    "Describe the picture.",
    "Describe this picture in one or two sentences.",
    "What is in the picture?",
    "What do you see?",
    "Write a caption for this image.",
)


def rendered_picture(split: str, seed: int, kind: str | None = None) -> Rendered:
    """Picture number `seed` of a split, of a kind that the seed chooses unless one is named.

    The same arguments give the same picture with the same versions of Pillow and of the fonts. Raises `UsageError` for
    an unknown split or kind, `MissingExtraError` without the fonts.
    """
    if split not in SPLITS or (kind is not None and kind not in (*KINDS, *_UNASKED)):
        raise UsageError(f"{split!r} or {kind!r} is unknown; splits are {', '.join(SPLITS)}, kinds {', '.join(KINDS)}")
    random = RandomState(np.array([seed, SPLITS.index(split)], np.uint32))
    kind = kind or str(random.choice(KINDS, p=np.array(_SHARES) / sum(_SHARES)))
    if kind == "frames":
        canvases, caption, asked = frames(random, split)
    else:
        canvas, caption, asked = (_DRAWERS | _UNASKED)[kind](random, split)
        canvases = [canvas]
    if random.random_sample() < 0.6:
        degrees = float(random.uniform(-3, 3))
        shift = (float(random.uniform(-4, 4)), float(random.uniform(-4, 4)))
        scale = (float(random.uniform(0.92, 1.0)), float(random.uniform(0.92, 1.0)))
        slant = float(random.uniform(-0.06, 0.06))
        for canvas in canvases:
            canvas.turn(degrees, scale, slant, shift)
    characters, things, colours = canvases[0].maps()
    quality = int(random.randint(40, 96)) if random.random_sample() < 0.4 else 0
    blur = float(random.uniform(0.2, 0.7)) if random.random_sample() < 0.25 else 0.0
    pictures = tuple(_camera(random, canvas, blur, quality) for canvas in canvases)
    asks = _ASKS_CAPTION[int(random.randint(len(_ASKS_CAPTION)))]
    described = Question("other", asks, caption)
    questions = (*asked, described) if kind not in _UNASKED else ()
    return Rendered(kind, pictures, questions, canvases[0].texts(), characters, things, colours)


def _camera(random: RandomState, canvas: Canvas, blur: float, quality: int) -> Image.Image:
    image = canvas.image.filter(ImageFilter.GaussianBlur(blur)) if blur else canvas.image
    image = spoil(random, image)
    if quality:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        image = Image.open(buffer).convert("RGB")
    return image
