"""Rendered pictures: the same every time, labelled where things are, and no split knows another's words or faces."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

from calibration.rendered import KINDS, PAGE, SPLITS, measured_pictures, rendered_picture, score
from calibration.rendered import fonts as fonts_module
from calibration.rendered.drawing import Canvas, _combinations
from calibration.rendered.fonts import font_files
from calibration.rendered.picture import CELL, CHARACTERS, COLOUR_NAMES, THINGS
from calibration.rendered.scenes import SHAPES as SCENE_SHAPES
from calibration.rendered.scoring import edits, plain
from calibration.rendered.words import words
from edgevl.errors import MissingExtraError, UsageError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("font_roboto") is None, reason="the fonts are not installed")
LISTS = ("words", "first", "last", "cities", "goods", "measures")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_every_split(kind: str, split: str) -> None:
    for seed in range(6):
        made = rendered_picture(split, seed, kind)
        assert made.kind == kind and len(made.frames) == (2 if kind == "frames" else 1)
        assert all(240 <= side <= 272 for frame in made.frames for side in frame.size)
        assert made.characters.shape == (32, 64) and made.characters.max() < len(CHARACTERS)
        assert made.things.shape == (32, 32) and made.things.max() < len(THINGS)
        assert made.colours.shape == (32, 32) and made.colours.max() < len(COLOUR_NAMES)
        assert len(made.questions) >= 2
        for question in made.questions:
            assert question.answer.strip() == question.answer and question.question[-1] in "?."
            assert set(question.answer) <= set(CHARACTERS) | {" ", "\n"}


def test_pages_are_full_of_text() -> None:
    made = [rendered_picture("train", seed, PAGE) for seed in range(6)]
    assert all(one.kind == PAGE and not one.questions for one in made)
    written = [int((one.characters > 0).sum()) for one in made]
    assert min(written) > 60 and sum(written) > 6 * 120


def test_which_ground_a_scene_stands_on_is_kept_for_tests() -> None:
    """By the number of shapes; every number and nearly every shape in every colour comes in every split."""
    grounds: dict[str, set[tuple[str, int]]] = {}
    pairs: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        made = [rendered_picture(split, seed, "scene") for seed in range(120)]
        asked = [{q.question: q.answer for q in one.questions} for one in made]
        grounds[split] = {
            (one["What colour is the background?"], int(one["How many shapes are there?"])) for one in asked
        }
        said = " ".join(answer.lower() for one in asked for answer in one.values())
        pairs[split] = set(re.findall(rf"\w+ (?:{'|'.join(SCENE_SHAPES)})", said))
    assert not (grounds["train"] & grounds["test"] or grounds["train"] & grounds["validation"])
    assert not grounds["validation"] & grounds["test"]
    assert all({count for _, count in shown} == {1, 2, 3} for shown in grounds.values())
    assert all(len(shown) > 55 for shown in pairs.values()), "of 72"


def test_which_way_a_shape_moves_on_which_ground_is_kept_for_tests() -> None:
    ways: dict[str, set[str]] = {}
    for split in ("train", "test"):
        made = [rendered_picture(split, seed, "frames") for seed in range(80)]
        ways[split] = {q.answer for one in made for q in one.questions if q.question.startswith("Which way")}
    assert ways["train"] == ways["test"] and len(ways["test"]) == 5


def test_a_seed_is_a_picture() -> None:
    first, again, other = (rendered_picture("train", seed) for seed in (7, 7, 8))
    assert first.frames[0].tobytes() == again.frames[0].tobytes()
    assert first.questions == again.questions
    assert first.frames[0].tobytes() != other.frames[0].tobytes()
    assert rendered_picture("test", 7).frames[0].tobytes() != first.frames[0].tobytes()


def test_splits_share_nothing() -> None:
    for name in LISTS:
        lists = [{word.lower() for word in words(name, split)} for split in SPLITS]
        assert all(len(part) >= 1 for part in lists), name
        assert not (lists[0] & lists[1] or lists[0] & lists[2] or lists[1] & lists[2])
    faces = [{path.stem.split("-")[0] for path in font_files(split)} for split in SPLITS]
    assert not (faces[0] & faces[1] or faces[0] & faces[2] or faces[1] & faces[2])
    for options in ((3, 4), (3, 2, 2), (2, 2, 2), (8, 9)):
        parts = [set(part) for part in _combinations(options).values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == int(np.prod(options))
        assert all(parts)
        assert all({choice[i] for choice in parts[-1]} == set(range(n)) for i, n in enumerate(options))


def test_the_label_lies_under_the_ink() -> None:
    """A character is drawn where its label says, turned or not."""
    for turned in (False, True):
        canvas = Canvas(np.random.RandomState(3), "train", (256, 256), (255, 255, 255), "white")
        canvas.text(60, 100, "#", 40, (0, 0, 0))
        if turned:
            canvas.turn(20, (0.8, 0.9), 0.1, (5, -8))
        pixels = np.asarray(canvas.image.convert("L"))
        rows, columns = np.nonzero(pixels < 128)
        (label,) = np.argwhere(canvas.maps()[0])
        middle = (label + 0.5) * CELL
        assert CHARACTERS[int(canvas.maps()[0][tuple(label)])] == "#"
        assert abs(middle[0] - rows.mean()) < 8 and abs(middle[1] - columns.mean()) < 5


def test_things_and_colours_of_a_scene() -> None:
    made = rendered_picture("train", 1, "scene")
    shapes = {THINGS[i] for i in np.unique(made.things)} - {"nothing"}
    caption = made.questions[-1].answer
    assert shapes and all(shape in caption for shape in shapes)


def test_the_measured_set_is_the_same_every_time() -> None:
    first, again = measured_pictures(40), measured_pictures(40)
    assert [p.frames[0].tobytes() for p, _ in first] == [p.frames[0].tobytes() for p, _ in again]
    assert {q.task for _, questions in first for q in questions} == {"lines", "fields", "charts", "panels", "scenes"}
    assert abs(len(measured_pictures(100)) - 100) <= 2


def test_wrong_names() -> None:
    with pytest.raises(UsageError, match="'tests'"):
        rendered_picture("tests", 1)
    with pytest.raises(UsageError, match="'photo'"):
        rendered_picture("test", 1, "photo")


def test_a_missing_font_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fonts_module._FACES, "test", {"font_nowhere": ("Nowhere",)})
    font_files.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"font-nowhere.*edgevl\[demo\]"):
            rendered_picture("test", 1)
    finally:
        font_files.cache_clear()


def test_scores() -> None:
    answers = [("fields", "12.40", "12.40."), ("fields", "Anna", "Anne"), ("lines", "abcd\nef", "abxd\n  ef \n")]
    lines, fields = score(answers)
    assert (lines.task, lines.count, lines.value) == ("lines", 1, 1 / 7)
    assert (fields.task, fields.count, fields.value) == ("fields", 2, 0.5)
    # Wilson's interval of 1 in 2, from the formula by hand: (0.5 + 1.9208/2) / 2.9208 ± …
    assert (round(fields.low, 3), round(fields.high, 3)) == (0.095, 0.905)


@pytest.mark.parametrize(("a", "b", "wanted"), [("", "", 0), ("kitten", "sitting", 3), ("ab", "", 2), ("", "abc", 3)])
def test_edits(a: str, b: str, wanted: int) -> None:
    assert edits(a, b) == wanted


def test_plain() -> None:
    assert plain("  Two  words. \n\n") == "Two words"
    assert plain("3.50") == "3.50"
