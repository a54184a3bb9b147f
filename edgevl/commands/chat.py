"""`edgevl chat`: one question with `-p`, or a conversation; the answer streams to stdout.

Knows terminals, pipes and the words that begin with a slash; the history is kept by `edgevl.conversation`.
"""

from __future__ import annotations

import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.console import bytes_text, note, print_json
from edgevl.errors import EdgevlError, UsageError

if TYPE_CHECKING:
    from edgevl.conversation import Conversation
    from edgevl.engine import Engine, Result

_STDIN_LIMIT = 4 << 20  # bytes of a prompt that is read from stdin; no context holds more
_HELP = """\
/image PATH...  show pictures with the next question
/reset          forget the conversation
/stats          tokens, seconds and memory of the last answer and the session
/help           this list
/exit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


@click.command(name="chat", short_help="Talk to a bundle about text and pictures.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; up to 4 times."
)
@click.option("-p", "--prompt", help='The question; "-" reads it from stdin. Without it, a conversation.')
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from this share of probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="Longest answer.")
@click.option("--max-tiles", type=int, help="Most tiles of a picture; default: the model's own.")
@click.option("--tiling", type=click.Choice(["hf", "native"]), help="How pictures are cut; default: the model's own.")
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "reference"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; needs -p.")
def command(
    bundle: Path,
    images: tuple[Path, ...],
    prompt: str | None,
    system: str | None,
    temperature: float,
    top_p: float,
    seed: int,
    max_tokens: int,
    max_tiles: int | None,
    tiling: str | None,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Ask BUNDLE about pictures and text.

    Pictures come before the prompt, in the order given. Without -p a conversation starts; /help lists its commands.
    """
    from edgevl.conversation import AnswerSettings, Conversation
    from edgevl.engine import Engine, Sampling, with_max_tiles
    from edgevl.image import load_image
    from edgevl.prompt import MAX_IMAGES

    if as_json and prompt is None:
        raise UsageError("--json prints one answer and needs -p with the question")
    if len(images) > MAX_IMAGES:
        raise UsageError(f"{len(images)} pictures were given; the model takes at most {MAX_IMAGES}")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}; it must be at least 1")
    sampling = Sampling(temperature, top_p, seed)
    text = None if prompt is None else _read_prompt(prompt)
    _check_text("--system", system or "")
    pictures = [load_image(path) for path in images]

    with _waiting("loading the model"):
        engine = Engine.open(bundle, threads, backend)
    own = engine.config.tiling
    if own is None and (max_tiles is not None or tiling is not None):
        raise UsageError("this bundle holds a language model without eyes; leave out --max-tiles and --tiling")
    cut = None if own is None else with_max_tiles(own, max_tiles, tiling)
    conversation = Conversation(engine, AnswerSettings(system, sampling, max_tokens, cut), note)
    for picture in pictures:
        conversation.attach(picture)
    if text is None:
        _Session(engine, conversation).run()
    elif as_json:
        print_json(_document(engine, _answer(conversation, text, lambda _: None)))
    else:
        _tell(_answer(conversation, text, _print), set())


def _answer(conversation: Conversation, text: str, show: Callable[[str], None]) -> Result:
    """Ask and give every piece of the answer to `show`; the line is ended however the answer ends."""
    from edgevl.engine import Result

    shown = 0
    result: Result | None = None
    with closing(conversation.ask(text)) as stream:
        try:
            with _waiting("reading the question"):
                item = next(stream)
            while True:
                if isinstance(item, Result):
                    show(item.text[shown:])
                    result = item
                    break
                show(item.text)
                shown += len(item.text)
                item = next(stream)
        finally:
            if shown or result is not None:
                show("\n")
        for _ in stream:
            raise AssertionError("the result is the last item of a stream")
    return result


def _document(engine: Engine, result: Result) -> dict[str, Any]:
    """The fields that scripts may rely on."""
    from edgevl.machine import resident_bytes

    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "tokens": result.tokens,
        "seconds": {k: round(v, 4) for k, v in {"load": engine.load_seconds, **result.seconds}.items()},
        "memory": {"resident_bytes": resident_bytes(), "planned_bytes": engine.planned_bytes},
        "backend": engine.runner.backend,
        "notes": list(result.notes),
    }


class _Session:
    """The conversation at a terminal, or line by line through a pipe."""

    def __init__(self, engine: Engine, conversation: Conversation) -> None:
        self._engine, self._conversation = engine, conversation
        self._told: set[str] = set()
        self._failed = False
        self._finished: list[Result] = []  # every finished answer, also those of forgotten conversations

    def run(self) -> None:
        """Until /exit or the end of the input. In a pipe, exit code 2 when a line failed."""
        people = sys.stdin is not None and sys.stdin.isatty()
        if people:
            note(
                f"{self._engine.runner.backend}, {self._engine.limits.context} tokens of context; /help lists commands"
            )
        for line in _typed_lines() if people else _piped_lines():
            try:
                if not self._line(line):
                    break
            except EdgevlError as error:
                self._failed = True
                note(f"edgevl: {error}")
            except KeyboardInterrupt:
                if not people:
                    raise
                note("stopped; the conversation goes on")
        if self._failed and not people:
            sys.exit(2)

    def _line(self, line: str) -> bool:
        """One line of input; False to leave."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            _check_text("the question", line)
            self._finished.append(_answer(self._conversation, line, _print))
            _tell(self._finished[-1], self._told)
            return True
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/image":
            self._attach(rest.strip())
        elif word == "/reset":
            self._conversation.reset()
            note("the conversation was forgotten")
        elif word == "/stats":
            self._stats()
        elif word == "/help":
            note(_HELP)
        else:
            raise UsageError(f"{word} is no command; /help lists them")
        return True

    def _attach(self, rest: str) -> None:
        from edgevl.image import load_image

        for path in _paths(rest):
            picture = load_image(path)
            self._conversation.attach(picture)
            note(f"{path}: {picture.size[0]}x{picture.size[1]} pixels, shown with the next question")

    def _stats(self) -> None:
        from edgevl.machine import resident_bytes

        if self._conversation.last is not None:
            _account("", [self._conversation.last])
        if self._finished:
            _account(f"session, {len(self._finished)} finished: ", self._finished)
        memory = f"{bytes_text(resident_bytes())} resident, {bytes_text(self._engine.planned_bytes)} planned"
        note(f"turns: {self._conversation.turns}; memory: {memory}; {self._engine.runner.backend}")


def _account(whose: str, results: list[Result]) -> None:
    """The tokens and seconds of answers together, each line beginning with `whose`."""
    t = {k: sum(r.tokens.get(k, 0) for r in results) for k in ("prompt", "image", "reused", "generated")}
    s = {k: sum(r.seconds.get(k, 0.0) for r in results) for k in ("vision", "prefill", "decode")}
    speed = t["generated"] / s["decode"] if s["decode"] > 0 else 0.0
    note(
        f"{whose}tokens: {t['prompt']} prompt ({t['image']} of pictures, {t['reused']} reused), "
        f"{t['generated']} generated"
    )
    note(
        f"{whose}seconds: {s['vision']:.2f} vision, {s['prefill']:.2f} prefill, {s['decode']:.2f} decode "
        f"({speed:.1f} tokens/s)"
    )


def _typed_lines() -> Iterator[str]:
    """Lines from a terminal, with editing; Ctrl-C clears the line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its line editing)
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:
                click.echo("> ", nl=False, err=True)
                yield input()
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit leaves")
        except EOFError:
            note("")
            return


def _piped_lines() -> Iterator[str]:
    if sys.stdin is not None:  # None when the process was started without one
        for line in sys.stdin.buffer:
            yield line.decode("utf-8", "surrogateescape")


def _read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for "-"."""
    if prompt != "-":
        _check_text("--prompt", prompt)
        return prompt
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(_STDIN_LIMIT + 1)
    if len(data) > _STDIN_LIMIT:
        raise UsageError(f"stdin has more than {_STDIN_LIMIT} bytes; no context holds such a prompt, so shorten it")
    text = data.decode("utf-8", "surrogateescape")
    _check_text("stdin", text)
    return text


def _check_text(where: str, text: str) -> None:
    """Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UsageError(f"{where} is not valid UTF-8 text; convert it first") from problem


def _paths(rest: str) -> list[Path]:
    """Paths as typed or dropped on a terminal: whole when that is a file, otherwise with a shell's quotes."""
    if not rest:
        raise UsageError("/image needs the path of a picture")
    whole = Path(rest).expanduser()
    if whole.exists():
        return [whole]
    try:
        return [Path(word).expanduser() for word in shlex.split(rest)]
    except ValueError:
        return [whole]


def _print(text: str) -> None:
    """A piece of the answer, at once; a terminal is spared the model's control characters."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    sys.stdout.write(text)  # click.echo would take colours out of an answer about colours
    sys.stdout.flush()


def _tell(result: Result, told: set[str]) -> None:
    """The result's notes, each once, and why a long answer ends."""
    for text in result.notes:
        if text not in told:
            note(text)
            told.add(text)
    if result.finish_reason == "length" and not result.notes:
        note(f"The answer was cut after {result.tokens['generated']} tokens; --max-tokens allows more.")


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
