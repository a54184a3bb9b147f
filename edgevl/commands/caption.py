"""`edgevl caption`: JSON lines about pictures, videos, cameras and streams; goes on where it was interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.console import note, print_json, progress
from edgevl.errors import EdgevlError, UsageError
from edgevl.journal import Journal, encode
from edgevl.quantities import duration, size
from edgevl.segments import Retention

if TYPE_CHECKING:
    from edgevl.camera.appliance import Appliance
    from edgevl.camera.files import FileJob

_PROMPT = "Describe this picture in one or two sentences."
_LIVE = Retention(segment_bytes=16_000_000, segment_seconds=86400.0, keep_bytes=1_000_000_000, floor_bytes=200_000_000)


@click.command(name="caption", short_help="Caption pictures, videos, cameras and streams to JSON lines.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON lines; added to. Default: to stdout.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="What is asked of each picture.")
@click.option(
    "--schema",
    type=click.Path(path_type=Path),
    help="Hold captions to the JSON schema in this file; objects get the properties it names and no others.",
)
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest caption.")
@click.option("--max-tiles", type=int, help="Most tiles of a picture; default: the model's own.")
@click.option("-r", "--recursive", is_flag=True, help="Folders within folders too.")
@click.option("--every", type=duration, default="2s", show_default=True, help="Between two looks at a camera or video.")
@click.option("--change", type=float, default=4.0, show_default=True, help="Percent of change that a caption needs.")
@click.option("--heartbeat", type=duration, default="10m", show_default=True, help="Between lines of a still scene.")
@click.option("--stale", type=duration, default="10s", show_default=True, help="Silence before a camera is reopened.")
@click.option("--jpeg", is_flag=True, help="Keep captioned frames of cameras beside the output.")
@click.option("--rotate-size", type=size, help="Begin a new file at this size; cameras: 16MB.")
@click.option("--rotate-age", type=duration, help="Begin a new file at this age; cameras: 1d.")
@click.option("--keep", type=size, help="All files together; the oldest go. Cameras: 1GB.")
@click.option("--floor", type=size, help="Free space of the disk below which the oldest files go; cameras: 200MB.")
@click.option("--max-celsius", type=float, help="Space captions out while a thermal zone is hotter.")
@click.option("--status", type=click.Path(path_type=Path), help="Keep a JSON document on how cameras are here.")
@click.option("--metrics", type=click.IntRange(0, 65535), help="Serve Prometheus metrics on this port of 127.0.0.1.")
@click.option("--for", "limit", type=duration, help="End after this time; default: cameras never do.")
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda", "reference"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON; needs -o.")
def command(
    bundle: Path,
    sources: tuple[str, ...],
    output: Path | None,
    prompt: str,
    schema: Path | None,
    max_tokens: int,
    max_tiles: int | None,
    recursive: bool,
    every: float,
    change: float,
    heartbeat: float,
    stale: float,
    jpeg: bool,
    rotate_size: int | None,
    rotate_age: float | None,
    keep: int | None,
    floor: int | None,
    max_celsius: float | None,
    status: Path | None,
    metrics: int | None,
    limit: float | None,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Caption every SOURCE with BUNDLE: files, folders (in the order of names), cameras and streams.

    Cameras are /dev/videoN, csi:N, 'gst:PIPELINE', and rtsp://, http://, udp:// or tcp:// addresses, or env:VARIABLE
    that holds one, out of other users' sight; NAME= before one is what the output calls it. They are captioned until
    SIGTERM, the newest frame of each every --every, and only if the scene changed.

    Each line of the output has time, sequence, source, caption, frame (sha256, width, height), model (the bundle's
    digest), prompt, tokens, and seconds in total and for vision, prefill and decode. With --schema, it has the
    document's fields instead of a caption. A picture that cannot be read gets a line with its error, and the exit code
    is 2 at the end. What happens to a camera is a line with its event, a still scene one with unchanged_since. Run
    again with the same output, files that have their caption are skipped.
    """
    from edgevl.camera.appliance import Appliance, Settings
    from edgevl.camera.captioner import EngineCaptioner
    from edgevl.camera.capture import Capture
    from edgevl.camera.files import Done, FileJob, find_files
    from edgevl.camera.health import check_status_file, serve_metrics
    from edgevl.camera.ledger import Ledger
    from edgevl.camera.notify import Notifier
    from edgevl.camera.reader import check_readable
    from edgevl.camera.source import check_names, parse_live
    from edgevl.engine import Engine, with_max_tiles
    from edgevl.schema import Schema, read_schema

    if output is None:
        _need_output({"--json": as_json, "--jpeg": jpeg, "--rotate-size": rotate_size, "--rotate-age": rotate_age})
        _need_output({"--keep": keep, "--floor": floor})
    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}; it must be at least 1")
    rules = None if schema is None else read_schema(schema)
    live = [source for source in map(parse_live, sources) if source is not None]
    check_names(live)
    if live:
        check_readable(live)
    elif jpeg or status is not None or metrics is not None:
        raise UsageError("--jpeg, --status and --metrics are for cameras and streams; leave them out for files")
    if status is not None:
        check_status_file(status, [] if output is None else [output, _ledger(output)])
    settings = Settings(every, change, heartbeat, stale, jpeg, max_celsius, status)
    paths = list(find_files(tuple(Path(s) for s in sources if parse_live(s) is None), recursive))
    retention = _retention(_LIVE if live else Retention(), rotate_size, rotate_age, keep, floor)
    done, notifier = Done(paths), Notifier()
    with ExitStack() as stack:
        journal: Journal | Stdout = Stdout()
        if output is not None:
            journal = stack.enter_context(Journal(output, retention, done.see if paths else None))
            if paths:
                ledger = Ledger(_ledger(output), fresh=journal.following == 1)
                stack.callback(ledger.close)
                done.keep(ledger)
        stop = stack.enter_context(_sigterm())
        engine = Engine.open(bundle, threads, backend)
        if engine.config.vision is None or engine.config.tiling is None:
            raise UsageError(f"{bundle} holds a language model without eyes; captions need one that sees")
        if journal.torn:
            note(f"{output} ended in half a line, which was cut off")
        tiling = with_max_tiles(engine.config.tiling, max_tiles, None)
        held = None if rules is None else Schema(rules, engine.bundle.tokenizer_json(), engine.config.tokens)
        captioner = EngineCaptioner(engine, prompt, max_tokens, tiling, held)
        if live:
            captioner.warm_up()
        timer = threading.Timer(limit, stop.set) if limit is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
        appliance = (
            Appliance([Capture(s, stale) for s in live], captioner, journal, settings, notifier) if live else None
        )
        # beside cameras, a line about a file waits for room on the disk as theirs do
        job = FileJob(captioner, appliance or journal, settings, done, notifier.alive)
        try:
            if appliance is not None:
                stop.call(appliance.stop)
                if metrics is not None:
                    stack.callback(serve_metrics(metrics, lambda: appliance.document))
                appliance.run(job.run(paths))
            else:
                _files(job, paths, stop)
        except KeyboardInterrupt:
            way = "" if output is None else " Run the same command again to go on."
            note(f"Interrupted; captions added to {_name(output)}: {job.written}.{way}")
            raise
    _summary(job, appliance, output, len(paths), as_json)
    if job.failed:
        sys.exit(UsageError.exit_code)
    if not live and stop.is_set():
        raise EdgevlError("stopped before the last picture; run the same command again to go on")


def _files(job: FileJob, paths: list[Path], stop: Stop) -> None:
    with progress() as move:
        move("captions", 0, len(paths))
        for finished in job.run(paths):
            move("captions", finished, len(paths))
            if stop.is_set() and finished < len(paths):
                return
    stop.clear()


def _summary(job: FileJob, appliance: Appliance | None, output: Path | None, pictures: int, as_json: bool) -> None:
    if job.skipped:
        note(f"skipped, because {output} has their captions already: {job.skipped} of {pictures}")
    counts = {"written": job.written, "skipped": job.skipped, "failed": job.failed}
    if appliance is not None:
        counts |= {"live": appliance.captions, "unchanged": appliance.unchanged, "events": appliance.events}
    written = job.written + counts.get("live", 0)
    note(f"captions added to {_name(output)}: {written}; pictures that failed: {job.failed}")
    if as_json:
        print_json({"output": str(output), "pictures": pictures, **counts})


class Stdout:
    """Lines for whoever reads stdout, each at once; nothing is there to go on from."""

    torn = False

    def __init__(self) -> None:
        self._count = 0

    def append(self, line: dict[str, Any], jpeg: bytes | None = None) -> int:
        """Print one line; its number."""
        assert jpeg is None, "pictures need a file to lie beside"
        self._count += 1
        sys.stdout.buffer.write(encode(line))  # JSON is UTF-8, whatever the terminal's encoding
        sys.stdout.buffer.flush()
        return self._count


class Stop:
    """Whether to end after the caption in hand, and whom to tell."""

    def __init__(self) -> None:
        self._set = False
        self._told: Callable[[], None] = lambda: None

    def set(self) -> None:
        """End soon; may be called from a signal handler."""
        self._set = True
        self._told()

    def clear(self) -> None:
        """All work was done before it mattered."""
        self._set = False

    def is_set(self) -> bool:
        """Whether to end."""
        return self._set

    def call(self, told: Callable[[], None]) -> None:
        """Tell `told`, now if it is time already."""
        self._told = told
        if self._set:
            told()


@contextmanager
def _sigterm() -> Iterator[Stop]:
    """SIGTERM ends after the caption in hand."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # a test's thread, where signals cannot be caught
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _need_output(options: dict[str, object]) -> None:
    for name, value in options.items():
        if name == "--json" and value:
            raise UsageError(
                "--json prints its summary to stdout, where the captions go without -o; add -o with a file"
            )
        if value:
            raise UsageError(f"{name} needs a file to write to; add -o with one")


def _retention(
    base: Retention, segment_bytes: int | None, seconds: float | None, keep: int | None, floor: int | None
) -> Retention:
    largest = base.segment_bytes if segment_bytes is None else segment_bytes
    if keep is not None and segment_bytes is None and largest is not None:
        largest = min(largest, keep // 4)  # so that a small budget works without a second option
    return Retention(
        largest,
        base.segment_seconds if seconds is None else seconds,
        base.keep_bytes if keep is None else keep,
        base.floor_bytes if floor is None else floor,
    )


def _ledger(output: Path) -> Path:
    return output.with_name(f"{output.name}.done")


def _name(output: Path | None) -> str:
    return "stdout" if output is None else str(output)
