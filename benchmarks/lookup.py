"""What guessing from the prompt is worth: `python -m benchmarks.lookup BUNDLE`, with the demo's own texts and pictures.

Each question is answered without and with guesses, the faster of the repeats counts, and the two answers must be the
same. The last line of stdout is one JSON document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgevl.console import note, print_json, table
from edgevl.engine import Engine, Request, Result
from edgevl.image import load_image
from edgevl.prompt import Message, Part

_ROOT = Path(__file__).parent.parent


def questions() -> dict[str, tuple[Part, ...]]:
    """Name -> what is asked: text that is copied, half copied and not copied, and pictures."""
    text = (_ROOT / "calibration/data/held_out.txt").read_text(encoding="utf-8")[:1500]
    code = (_ROOT / "calibration/data/code.txt").read_text(encoding="utf-8")[:1200]
    pictures = _ROOT / "training/pictures"
    return {
        "copy a text": (f"Repeat this text word by word:\n\n{text[:600]}",),
        "copy code": (f"Write this code again with other names:\n\n{code}",),
        "summarize": (f"Summarize:\n\n{text}",),
        "extract as JSON": (f"Extract all names and years as JSON from this text:\n\n{text}",),
        "explain": ("Why is the sky blue? Explain in a few sentences.",),
        "read a receipt": (load_image(pictures / "receipt.png"), "Read the text."),
        "read a table": (load_image(pictures / "table.png"), "Read the table."),
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", type=int, default=160, show_default=True, help="Longest answer.")
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--repeats", type=int, default=3, show_default=True)
def command(bundle: Path, tokens: int, threads: int, repeats: int) -> None:
    """Answer every question twice with BUNDLE."""
    engine = Engine.open(bundle, threads)
    rows: list[dict[str, Any]] = []
    for name, parts in questions().items():
        plain, guessed = (_fastest(engine, parts, tokens, lookup, repeats) for lookup in (False, True))
        assert plain.token_ids == guessed.token_ids, f"{name}: the answer changed"
        seconds = (plain.seconds["decode"], guessed.seconds["decode"])
        counts = {"prompt": plain.tokens["prompt"], "tokens": len(plain.token_ids), "steps": guessed.tokens["steps"]}
        rows.append({"question": name, **counts, "plain_seconds": seconds[0], "guessed_seconds": seconds[1]})
        note(f"{name}: {counts}, {seconds[0] / seconds[1]:.2f} times as fast")
    shown = [
        [*(str(row[k]) for k in ("question", "prompt", "tokens", "steps")), f"{r:.2f}"]
        for row in rows
        for r in [row["plain_seconds"] / row["guessed_seconds"]]
    ]
    table(engine.runner.backend, ["question", "prompt", "tokens", "steps", "times as fast"], shown, to_stderr=True)
    print_json({"backend": engine.runner.backend, "bundle": engine.bundle.digest, "rows": rows})


def _fastest(engine: Engine, parts: tuple[Part, ...], tokens: int, lookup: bool, repeats: int) -> Result:
    best: Result | None = None
    for _ in range(repeats):
        engine.reset()
        *_, result = engine.stream(Request((Message("user", parts),), max_tokens=tokens, lookup=lookup))
        assert isinstance(result, Result)
        if best is None or result.seconds["decode"] < best.seconds["decode"]:
            best = result
    assert best is not None
    return best


if __name__ == "__main__":
    command()
