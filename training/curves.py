"""The curves of a run as one picture: `python -m training.curves FOLDER OUT.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from training.journal import read_journal

_ANSWERS = (
    ("loss", "text"),
    ("tokens",),
    ("exact_lines", "exact_fields", "exact_charts", "exact_panels", "exact_scenes", "exact_other"),
)
_COLUMNS = {
    "tower": (
        ("loss",),
        ("train_characters", "train_written", "validation_characters", "validation_written"),
        ("validation_things", "validation_colours"),
    ),
    "language": _ANSWERS,
    "reader": _ANSWERS,
}


def draw(folder: Path, out: Path) -> None:
    """One row of plots for each stage, over optimizer steps."""
    from matplotlib.figure import Figure

    reports = read_journal(folder)
    figure = Figure(figsize=(13, 10), layout="constrained")
    grid: Any = figure.subplots(len(_COLUMNS), 3)
    for row, (stage, columns) in zip(grid, _COLUMNS.items(), strict=True):
        lines = [report for report in reports if report["stage"] == stage]
        for axes, names in zip(row, columns, strict=True):
            for name in names:
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name)
            axes.set_title(f"{stage}: {', '.join(names) if len(names) < 3 else _kind(names[0])}", fontsize=9)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if names[0] != "loss":
                axes.set_ylim(0, 1)
            if axes.lines:
                axes.legend(fontsize=7)
    figure.savefig(out, dpi=80)


def _kind(name: str) -> str:
    return "held-out answers right" if name.startswith("exact") else "what is right of what is there"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(folder: Path, out: Path) -> None:
    """Draw FOLDER's log into OUT."""
    draw(folder, out)


if __name__ == "__main__":
    main()
