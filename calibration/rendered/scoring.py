"""How answers about the test pictures are scored, with how sure one can be of the score. Pure numpy.

Printed lines count by character error rate, everything else by being right to the last character; white space at the
ends and a final full stop do not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.random import RandomState

from calibration.rendered.measured import TASKS

_DRAWS = 2000  # bootstrap samples


@dataclass(frozen=True)
class Score:
    """Of one task: `value` and its 95 % interval as shares; `count` questions. Of "lines" less is better."""

    task: str
    value: float
    low: float
    high: float
    count: int

    @property
    def metric(self) -> str:
        """What `value` is."""
        return "character error rate" if self.task == "lines" else "exact match"


def score(answers: Iterable[tuple[str, str, str]]) -> list[Score]:
    """Scores of (task, right answer, answer given), task by task.

    Intervals: Wilson's for exact match; for the character error rate a bootstrap over pictures.
    """
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)  # wrong, out of
    for task, wanted, given in answers:
        a, b = plain(wanted), plain(given)
        found[task].append((edits(a, b), len(a)) if task == "lines" else (int(a != b), 1))
    return [_score(task, np.array(found[task])) for task in TASKS if task in found]


def plain(answer: str) -> str:
    """The answer without what does not count."""
    lines = [" ".join(line.split()) for line in answer.strip().splitlines()]
    return "\n".join(line for line in lines if line).removesuffix(".")


def edits(a: str, b: str) -> int:
    """Levenshtein's distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _score(task: str, wrong: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Score:
    count = len(wrong)
    if task == "lines":
        draws = RandomState(0).randint(count, size=(_DRAWS, count))
        sums = wrong[draws].sum(axis=1)
        low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
        return Score(task, float(wrong[:, 0].sum() / wrong[:, 1].sum()), float(low), float(high), count)
    share, z = 1 - float(wrong[:, 0].mean()), 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Score(task, share, max(0.0, middle - half), min(1.0, middle + half), count)
