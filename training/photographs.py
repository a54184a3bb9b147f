"""What the demo makes of pictures that nobody rendered: `python -m training.photographs BUNDLE`.

The photographs and scans are those that the package scikit-image carries. Prints a table in Markdown.
"""

from __future__ import annotations

from pathlib import Path

import click

from edgevl.engine import Engine, Request, Result
from edgevl.errors import MissingExtraError
from edgevl.image import load_image
from edgevl.prompt import Message

_ASKED = (
    ("page.png", "Read the text."),
    ("text.png", "Read the text."),
    ("coffee.png", "Describe the picture."),
    ("astronaut.png", "Describe the picture."),
    ("chelsea.png", "Describe the picture."),
    ("rocket.jpg", "Describe the picture."),
    ("coins.png", "Describe the picture."),
    ("color.png", "Describe the picture."),
)
_LONGEST = 48  # tokens of an answer


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
def main(bundle: Path) -> None:
    """Ask BUNDLE about eight pictures."""
    try:
        import skimage
    except ModuleNotFoundError as error:
        raise MissingExtraError("python -m training.photographs", "scikit-image", "'edgevl[train]'") from error
    engine = Engine.open(bundle)
    click.echo("| picture | question | answer |\n|---|---|---|")
    for name, question in _ASKED:
        picture = load_image(Path(skimage.__file__).parent / "data" / name)
        request = Request((Message("user", (picture, question)),), max_tokens=_LONGEST)
        result = list(engine.stream(request))[-1]
        assert isinstance(result, Result)
        click.echo(f"| {name} | {question} | {' / '.join(result.text.split(chr(10)))} |")


if __name__ == "__main__":
    main()
