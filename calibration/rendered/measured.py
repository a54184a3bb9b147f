"""The held-out test set: the same few hundred pictures and questions every time, and how an answer is scored."""

from __future__ import annotations

from calibration.rendered.picture import Question, Rendered
from calibration.rendered.render import rendered_picture

TASKS = ("lines", "fields", "charts", "panels", "scenes")
# kind -> how many of a hundred pictures
_KINDS = {"lines": 15, "sign": 5, "receipt": 12, "form": 12, "table": 8, "bars": 8, "curve": 6, "pie": 4}
_KINDS |= {"display": 8, "gauge": 8, "scene": 14}
_ASKED = {"gauge": 1}  # its two questions have one answer; of other kinds the first two are asked


def measured_pictures(count: int = 300, split: str = "test") -> list[tuple[Rendered, list[Question]]]:
    """`count` pictures of a split (rounded to the shares of the kinds), each with its scored questions."""
    made = []
    for i, (kind, share) in enumerate(_KINDS.items()):
        for n in range(max(1, round(count * share / 100))):
            picture = rendered_picture(split, 1_000_000 * (i + 1) + n, kind)
            scored = [q for q in picture.questions if q.task in TASKS]
            made.append((picture, scored[: _ASKED.get(kind, 2)]))
    return made
