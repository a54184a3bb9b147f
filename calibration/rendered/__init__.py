"""Labelled pictures, drawn from a seed: what the demo's eyes are trained and tested on.

`rendered_picture` draws one; `measured_pictures` is the held-out test set of `edgevl measure`. Needs the fonts of the
extras "demo" (tests), "quantize" (calibration) and "train", and nothing else beyond Pillow and numpy.
"""

from calibration.rendered.drawing import SPLITS
from calibration.rendered.measured import measured_pictures
from calibration.rendered.picture import Question, Rendered
from calibration.rendered.render import KINDS, PAGE, SHAPES, rendered_picture
from calibration.rendered.scoring import Score, score

__all__ = [
    "KINDS",
    "PAGE",
    "SHAPES",
    "SPLITS",
    "Question",
    "Rendered",
    "Score",
    "measured_pictures",
    "rendered_picture",
    "score",
]
