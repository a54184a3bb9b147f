"""What a run tells: one JSON line for each report, kept beside the weights, and the same on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to `<folder>/log.jsonl`."""

    def __init__(self, folder: Path, stage: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._stage = folder / "log.jsonl", stage

    def write(self, **figures: Any) -> None:
        """One report; floats are rounded to four places."""
        line = {"stage": self._stage, "time": round(time.time()), **_rounded(figures)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(f"{k} {v}" for k, v in _rounded(figures).items()), file=sys.stderr, flush=True)


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """All reports of a run, oldest first."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a run killed while it wrote leaves half a line


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
