"""`edgevl caption`: a JSON line for every picture of files and folders; goes on where it was interrupted."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from edgevl.console import note, print_json, progress
from edgevl.errors import UsageError
from edgevl.journal import Journal, encode

if TYPE_CHECKING:
    from edgevl.config import TilingConfig
    from edgevl.engine import Engine, Result
    from edgevl.image import Picture

_PROMPT = "Describe this picture in one or two sentences."
_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)


@click.command(name="caption", short_help="Caption pictures and folders to JSON lines.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON lines; added to. Default: to stdout.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="What is asked of each picture.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest caption.")
@click.option("--max-tiles", type=int, help="Most tiles of a picture; default: the model's own.")
@click.option("-r", "--recursive", is_flag=True, help="Folders within folders too.")
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "reference"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON; needs -o.")
def command(
    bundle: Path,
    sources: tuple[Path, ...],
    output: Path | None,
    prompt: str,
    max_tokens: int,
    max_tiles: int | None,
    recursive: bool,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Caption every picture of SOURCE... with BUNDLE; a folder is read in the order of its names.

    Each line of the output has time, source, caption, frame (sha256, width, height), model (the bundle's digest),
    prompt, tokens, and seconds in total and for vision, prefill and decode. A picture that cannot be read gets a line
    with its error, and the exit code is 2 at the end. Run again with the same output, pictures that have their caption
    are skipped.
    """
    from edgevl.engine import Engine, with_max_tiles

    if as_json and output is None:
        raise UsageError("--json prints its summary to stdout, where the captions go without -o; add -o with a file")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}; it must be at least 1")
    paths = list(find_pictures(sources, recursive))
    where = "stdout" if output is None else str(output)
    with ExitStack() as stack:
        journal: Journal | Stdout = Stdout() if output is None else stack.enter_context(Journal(output))
        engine = Engine.open(bundle, threads, backend)
        if engine.config.vision is None or engine.config.tiling is None:
            raise UsageError(f"{bundle} holds a language model without eyes; captions need one that sees")
        tiling = with_max_tiles(engine.config.tiling, max_tiles, None)
        job = Captioner(engine, journal, prompt, max_tokens, tiling)
        if journal.torn:
            note(f"{output} ended in half a line, which was cut off")
        try:
            with progress() as move:
                for i, path in enumerate(paths):
                    move("captions", i, len(paths))
                    job.caption(path)
                move("captions", len(paths), len(paths))
        except KeyboardInterrupt:
            way = "" if output is None else " Run the same command again to go on."
            note(f"Interrupted; captions added to {where}: {job.written}.{way}")
            raise
    if job.skipped:
        note(f"skipped, because {output} has their captions already: {job.skipped} of {len(paths)}")
    note(f"captions added to {where}: {job.written}; pictures that failed: {job.failed}")
    if as_json:
        counts = {"written": job.written, "skipped": job.skipped, "failed": job.failed}
        print_json({"output": str(output), "pictures": len(paths), **counts})
    if job.failed:
        sys.exit(UsageError.exit_code)


class Lines(Protocol):
    """Where captions go: a `Journal`, or `Stdout`."""

    lines: list[dict[str, Any]]  # those that were there before

    def append(self, line: dict[str, Any]) -> None:
        """Add one line."""
        ...


class Stdout:
    """Lines for whoever reads stdout, each at once; nothing is there to go on from."""

    torn = False

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def append(self, line: dict[str, Any]) -> None:
        """Print one line."""
        sys.stdout.buffer.write(encode(line))  # JSON is UTF-8, whatever the terminal's encoding
        sys.stdout.buffer.flush()


class Captioner:
    """Asks one engine the same question of one picture after the other, and writes the answers down."""

    def __init__(
        self, engine: Engine, journal: Lines, prompt: str, max_tokens: int, tiling: TilingConfig | None = None
    ) -> None:
        self._engine, self._journal, self._prompt = engine, journal, prompt
        self._max_tokens, self._tiling = max_tokens, tiling
        self._model = engine.bundle.digest
        self._done = {_identity(line) for line in journal.lines if "caption" in line}
        self._errors = {(line.get("source"), line["error"]) for line in journal.lines if "error" in line}
        self.written = self.skipped = self.failed = 0

    def caption(self, path: Path) -> None:
        """Add a picture's line to the journal, unless it is there."""
        from edgevl.image import load_image

        start, parts = time.perf_counter(), dict[str, float]()
        line: dict[str, Any] = {"time": _now(), "source": str(path)}
        try:
            picture = load_image(path)
            line["frame"] = {"sha256": picture.digest, "width": picture.size[0], "height": picture.size[1]}
            line |= {"model": self._model, "prompt": self._prompt}
            if _identity(line) in self._done:
                self.skipped += 1
                return
            result = self._ask(picture)
            line |= {"caption": result.text.strip(), "tokens": result.tokens}
            parts = result.seconds
            for text in result.notes:
                note(f"{path.name}: {text}")
        except UsageError as error:
            self.failed += 1
            note(f"edgevl: {error}")
            line["error"] = str(error)
            if (line["source"], line["error"]) in self._errors:
                return
        line["time"] = _now()
        line["seconds"] = {k: round(v, 4) for k, v in {"total": time.perf_counter() - start, **parts}.items()}
        self._journal.append(line)
        if "caption" in line:
            self.written += 1
            self._done.add(_identity(line))

    def _ask(self, picture: Picture) -> Result:
        from edgevl.engine import Request, Result
        from edgevl.prompt import Message

        question = Message("user", (picture, self._prompt))
        request = Request((question,), max_tokens=self._max_tokens, tiling=self._tiling)
        for item in self._engine.stream(request):
            if isinstance(item, Result):
                return item
        raise AssertionError("a stream ends with its result")


def find_pictures(sources: tuple[Path, ...], recursive: bool) -> Iterator[Path]:
    """Files as they are given, and the pictures of folders by name, hidden ones left out. Each path once.

    Raises `UsageError` for a folder without pictures.
    """
    seen: set[Path] = set()
    for source in sources:
        paths = list(_pictures_of(source, recursive)) if source.is_dir() else [source]
        if not paths:
            way = "name another" if recursive else "name another, or add -r to look into its subfolders"
            raise UsageError(f"there are no pictures in the folder {source}; {way}")
        for path in paths:
            if path not in seen:
                seen.add(path)
                yield path


def _pictures_of(folder: Path, recursive: bool) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES:
                yield Path(where) / name


def _identity(line: dict[str, Any]) -> tuple[object, ...]:
    """What makes two captions the same work: source, pixels, model and question."""
    frame = line.get("frame")
    sha256 = frame.get("sha256") if isinstance(frame, dict) else None
    return tuple(str(v) for v in (line.get("source"), sha256, line.get("model"), line.get("prompt")))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
