"""`edgevl caption`: a JSON line for every picture of files and folders; goes on where it was interrupted."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.console import note, print_json, progress
from edgevl.errors import UsageError
from edgevl.journal import Journal

if TYPE_CHECKING:
    from edgevl.engine import Engine
    from edgevl.image import Picture

_PROMPT = "Describe this picture in one or two sentences."
_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)


@click.command(name="caption", short_help="Caption pictures and folders to JSON lines.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON lines; added to.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="What is asked of each picture.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest caption.")
@click.option("-r", "--recursive", is_flag=True, help="Folders within folders too.")
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "reference"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def command(
    bundle: Path,
    sources: tuple[Path, ...],
    output: Path,
    prompt: str,
    max_tokens: int,
    recursive: bool,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Caption every picture of SOURCE... with BUNDLE; a folder is read in the order of its names.

    Each line of the output has time, source, caption, frame (sha256, width, height), model (the bundle's digest),
    prompt and seconds. A picture that cannot be read gets a line with its error, and the exit code is 2 at the end.
    Run again with the same output, pictures that have their caption are skipped.
    """
    from edgevl.engine import Engine

    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}; it must be at least 1")
    paths = list(find_pictures(sources, recursive))
    if not paths:
        way = "" if recursive else ", -r looks into their subfolders"
        raise UsageError(f"there are no pictures in {', '.join(map(str, sources))}{way}")
    with Journal(output) as journal:
        engine = Engine.open(bundle, threads, backend)
        if engine.config.vision is None:
            raise UsageError(f"{bundle} holds a language model without eyes; captions need one that sees")
        job = Captioner(engine, journal, prompt, max_tokens)
        if journal.torn:
            note(f"{output} ended in half a line, which was cut off")
        try:
            with progress() as move:
                for i, path in enumerate(paths):
                    move("captions", i, len(paths))
                    job.caption(path)
                move("captions", len(paths), len(paths))
        except KeyboardInterrupt:
            note(f"Interrupted; captions added to {output}: {job.written}. Run the same command again to go on.")
            raise
    if job.skipped:
        note(f"skipped, because {output} has their captions already: {job.skipped} of {len(paths)}")
    note(f"captions added to {output}: {job.written}; pictures that failed: {job.failed}")
    if as_json:
        counts = {"written": job.written, "skipped": job.skipped, "failed": job.failed}
        print_json({"output": str(output), "pictures": len(paths), **counts})
    if job.failed:
        sys.exit(UsageError.exit_code)


class Captioner:
    """Asks one engine the same question of one picture after the other, and keeps a journal."""

    def __init__(self, engine: Engine, journal: Journal, prompt: str, max_tokens: int) -> None:
        self._engine, self._journal, self._prompt, self._max_tokens = engine, journal, prompt, max_tokens
        self._model = engine.bundle.digest
        self._done = {_identity(line) for line in journal.lines if "caption" in line}
        self._errors = {(line.get("source"), line["error"]) for line in journal.lines if "error" in line}
        self.written = self.skipped = self.failed = 0

    def caption(self, path: Path) -> None:
        """Add a picture's line to the journal, unless it is there."""
        from edgevl.image import load_image

        start = time.perf_counter()
        line: dict[str, Any] = {"time": _now(), "source": str(path)}
        try:
            picture = load_image(path)
            line["frame"] = {"sha256": picture.digest, "width": picture.size[0], "height": picture.size[1]}
            line |= {"model": self._model, "prompt": self._prompt}
            if _identity(line) in self._done:
                self.skipped += 1
                return
            line["caption"] = self._ask(picture)
        except UsageError as error:
            self.failed += 1
            note(f"edgevl: {error}")
            line["error"] = str(error)
            if (line["source"], line["error"]) in self._errors:
                return
        line["time"] = _now()
        line["seconds"] = round(time.perf_counter() - start, 3)
        self._journal.append(line)
        if "caption" in line:
            self.written += 1
            self._done.add(_identity(line))

    def _ask(self, picture: Picture) -> str:
        from edgevl.engine import Request, Result
        from edgevl.prompt import Message

        request = Request((Message("user", (picture, self._prompt)),), max_tokens=self._max_tokens)
        for item in self._engine.stream(request):
            if isinstance(item, Result):
                return item.text.strip()
        raise AssertionError("a stream ends with its result")


def find_pictures(sources: tuple[Path, ...], recursive: bool) -> Iterator[Path]:
    """Files as they are given, and the pictures of folders by name, hidden ones left out. Each path once."""
    seen: set[Path] = set()
    for source in sources:
        for path in _pictures_of(source, recursive) if source.is_dir() else (source,):
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
