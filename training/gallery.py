"""The pictures that the README shows: `python -m training.gallery FOLDER` draws one of each kind, none trained on.

With --bundle it asks that bundle about them and prints a table in Markdown, right answers beside the given ones.
"""

from __future__ import annotations

from pathlib import Path

import click

from calibration.rendered import rendered_picture
from edgevl.engine import Engine, Request, Result
from edgevl.image import load_image
from edgevl.prompt import Message

SHOWN = ("lines", "sign", "receipt", "form", "table", "bars", "curve", "pie", "display", "gauge", "scene")
_SEED = 77_000_000  # of the test split, and of nothing that is measured
_LONGEST = 64  # tokens of an answer


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), help="Ask this one.")
def main(folder: Path, bundle: Path | None) -> None:
    """Draw the pictures into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = None if bundle is None else Engine.open(bundle)
    click.echo("| picture | question | right | given |\n|---|---|---|---|")
    for kind in SHOWN:
        made = rendered_picture("test", _SEED, kind)
        path = folder / f"{kind}.png"
        made.frames[0].save(path)
        question = next(q for q in made.questions if q.task != "other")
        given = ""
        if engine is not None:
            request = Request((Message("user", (load_image(path), question.question)),), max_tokens=_LONGEST)
            result = list(engine.stream(request))[-1]
            assert isinstance(result, Result)
            given = result.text
        row = (f"![{kind}]({path})", question.question, question.answer, given)
        click.echo("| " + " | ".join(cell.replace("\n", " / ") for cell in row) + " |")


if __name__ == "__main__":
    main()
