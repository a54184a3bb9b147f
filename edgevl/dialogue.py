"""A chat at a terminal, or line by line through a pipe: the answers on stdout, the words that begin with a slash.

The history is kept by `edgevl.conversation`. Called by `edgevl chat`, for single questions too.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from edgevl.camera.source import is_video
from edgevl.console import bytes_text, note, print_json
from edgevl.conversation import Conversation
from edgevl.engine import Engine, Result
from edgevl.errors import EdgevlError, ImageError, PromptError, UsageError
from edgevl.image import Picture, load_image
from edgevl.machine import resident_bytes
from edgevl.saved import load, save
from edgevl.terminal import at_terminal, check_text, piped_lines, show_text, typed_lines, waiting
from edgevl.traffic import step_bytes
from edgevl.view import Video

_HELP = """\
/image PATH...  show pictures with the next question
/video PATH     show a video with the next question
/drop           take back what waits for the next question
/reset          forget the conversation
/save FILE      keep the conversation in a file
/load FILE      go on with a conversation from a file
/stats          tokens, seconds, bandwidth and memory
/help           this list
/exit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Dialogue:
    """The conversation at a terminal, or line by line through a pipe."""

    def __init__(
        self, engine: Engine, conversation: Conversation, frames: int | None = None, as_json: bool = False
    ) -> None:
        """`frames`: of a video; None takes what the context has room for. `as_json`: a document a line."""
        self._engine, self._conversation, self._frames, self._as_json = engine, conversation, frames, as_json
        self._told: set[str] = set()
        self._failed = False
        self._finished: list[Result] = []  # every finished answer, also those of forgotten conversations

    def run(self) -> None:
        """Until /exit or the end of the input. In a pipe, exit code 2 when a line failed."""
        people = at_terminal()
        if people:
            note(
                f"{self._engine.runner.backend}, {self._engine.limits.context} tokens of context; /help lists commands"
            )
        for line in typed_lines() if people else piped_lines():
            try:
                if not self._line(line):
                    break
            except (EdgevlError, OSError) as error:
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
            check_text("the question", line)
            self._answer(line)
            return True
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        rest = rest.strip()
        if word in _NEEDED and not rest:
            raise UsageError(f"{word} needs {_NEEDED[word]}")
        if word == "/image":
            self._show_pictures(rest)
        elif word == "/video":
            video = open_video(self._engine, self._conversation, _path(rest), self._frames)
            self._conversation.attach(video)
            note(f"{video.name}: {len(video.frames)} frames of {video.seconds:.1f} s, shown with the next question")
        elif word == "/drop":
            note(f"pictures and videos that were taken back: {self._conversation.detach()}")
        elif word == "/reset":
            self._conversation.reset()
            note("the conversation was forgotten")
        elif word == "/save":
            self._save(_path(rest))
        elif word == "/load":
            engine = self._engine
            messages = load(_path(rest), engine.bundle.digest, engine.config.vision, engine.budget.context)
            self._conversation.restore(messages)
            note(f"turns that were loaded: {self._conversation.turns}; this conversation takes the place of the other")
        elif word == "/stats":
            self._stats()
        elif word == "/help":
            note(_HELP)
        else:
            raise UsageError(f"{word} is no command; /help lists them")
        return True

    def _answer(self, question: str) -> None:
        result = answer_to(self._conversation, question, (lambda _: None) if self._as_json else show_text)
        self._finished.append(result)
        if self._as_json:
            print_json(document(self._engine, result))
        else:
            tell(result, self._told)

    def _show_pictures(self, rest: str) -> None:
        for path in _paths(rest):
            picture = load_picture(path, "/video")
            self._conversation.attach(picture)
            note(f"{path}: {picture.size[0]}x{picture.size[1]} pixels, shown with the next question")

    def _save(self, path: Path) -> None:
        if not self._conversation.turns:
            raise UsageError("there is nothing to save yet; ask a question first")
        save(path, self._engine.bundle.digest, self._conversation.messages)
        note(f"turns that were saved in {path}: {self._conversation.turns}")

    def _stats(self) -> None:
        last = self._conversation.last
        if last is not None:
            _account("", [last])
            used = step_bytes(self._engine.bundle, last.tokens["prompt"] + last.tokens["generated"] // 2)
            if last.seconds["decode"] > 0:
                rate = used * last.tokens["steps"] / last.seconds["decode"]
                note(f"bandwidth used in decoding: {rate / 1e9:.1f} GB/s")
        if self._finished:
            _account(f"session, {len(self._finished)} finished: ", self._finished)
        counts = self._engine.budget.parts(self._conversation.messages)
        parts = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        note(f"context: {sum(counts.values())} of {self._engine.limits.context} tokens{f' ({parts})' if parts else ''}")
        memory = f"{bytes_text(resident_bytes())} resident, {bytes_text(self._engine.planned_bytes)} planned"
        note(f"turns: {self._conversation.turns}; memory: {memory}; {self._engine.runner.backend}")


_NEEDED = {
    "/image": "the path of a picture",
    "/video": "the path of a video",
    "/save": "the name of a file",
    "/load": "the path of a saved conversation",
}


def _account(whose: str, results: list[Result]) -> None:
    """The tokens and seconds of answers together, each line beginning with `whose`."""
    t = {k: sum(r.tokens.get(k, 0) for r in results) for k in ("prompt", "image", "reused", "generated", "steps")}
    s = {k: sum(r.seconds.get(k, 0.0) for r in results) for k in ("vision", "prefill", "decode")}
    speed = t["generated"] / s["decode"] if s["decode"] > 0 else 0.0
    note(
        f"{whose}tokens: {t['prompt']} prompt ({t['image']} of pictures, {t['reused']} reused), "
        f"{t['generated']} generated in {t['steps']} steps"
    )
    note(
        f"{whose}seconds: {s['vision']:.2f} vision, {s['prefill']:.2f} prefill, {s['decode']:.2f} decode "
        f"({speed:.1f} tokens/s)"
    )


def answer_to(conversation: Conversation, text: str, show: Callable[[str], None]) -> Result:
    """Ask and give every piece of the answer to `show`; the line is ended however the answer ends."""
    shown = 0
    result: Result | None = None
    with closing(conversation.ask(text)) as stream:
        try:
            with waiting("reading the question"):
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


def document(engine: Engine, result: Result) -> dict[str, Any]:
    """An answer as JSON: the fields that scripts may rely on."""
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


def open_video(engine: Engine, conversation: Conversation, path: Path, frames: int | None) -> Video:
    """A video with as many frames as were asked for, or as the context has room for beside the conversation.

    Raises like `load_video`; `CapacityError` for more frames than can ever fit, `PromptError` without eyes.
    """
    from edgevl.video import load_video

    vision = engine.config.vision
    if vision is None:
        raise PromptError("this bundle holds a language model without eyes; ask without videos")
    count = engine.budget.frames(frames, conversation.messages, conversation.settings.max_tokens)
    return load_video(path, count, vision.tile_size)


def load_picture(path: Path, way: str) -> Picture:
    """A picture; `way` is how a video is shown instead. Raises `ImageError`."""
    if is_video(path) and path.is_file():
        raise ImageError(f"{path} is a video; show it with {way}")
    return load_image(path)


def _path(rest: str) -> Path:
    """One path, whole or with a shell's quotes."""
    paths = _paths(rest)
    return paths[0] if len(paths) == 1 else _expanded(rest)


def _paths(rest: str) -> list[Path]:
    """Paths as typed or dropped on a terminal: whole when that is a file, otherwise with a shell's quotes."""
    whole = _expanded(rest)
    if whole.exists():
        return [whole]
    try:
        words = shlex.split(rest)
    except ValueError:
        return [whole]
    return [_expanded(word) for word in words]


def _expanded(word: str) -> Path:
    """With the home folder that ~ stands for; raises `UsageError` for what can be no path."""
    if "\0" in word:
        raise UsageError("a path has the character NUL in it; type it again")
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{word} names a user who is not here; write the folder out") from error


def tell(result: Result, told: set[str]) -> None:
    """The result's notes, each once, and why a long answer ends."""
    for text in result.notes:
        if text not in told:
            note(text)
            told.add(text)
    if result.finish_reason == "length" and not result.notes:
        note(f"The answer was cut after {result.tokens['generated']} tokens; --max-tokens allows more.")
