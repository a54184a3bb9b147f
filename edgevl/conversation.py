"""A conversation that outlives its answers: history, attached pictures, and what is dropped when no more fits.

Whole turns and whole pictures go, oldest first, and each loss is told. Knows the engine as something that streams
answers; knows nothing of terminals. Called by `edgevl chat`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, cast

from edgevl.config import TilingConfig
from edgevl.engine import Delta, Request, Result, Sampling
from edgevl.errors import CapacityError, UsageError
from edgevl.image import Picture
from edgevl.prompt import MAX_IMAGES, Message

Turn = tuple[Message, Message]  # the user's and the assistant's


class Answerer(Protocol):
    """What a conversation needs of an engine."""

    def stream(self, request: Request) -> Iterator[Delta | Result]:
        """A `Delta` for each token, then the `Result`."""
        ...

    def reset(self) -> None:
        """Forget what the KV cache holds."""
        ...


@dataclass(frozen=True)
class AnswerSettings:
    """What holds for every answer of a conversation."""

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1024
    tiling: TilingConfig | None = None


class Conversation:
    """One user's talk with one engine. `notify` is given one sentence for everything that the user should know."""

    def __init__(self, engine: Answerer, settings: AnswerSettings, notify: Callable[[str], None]) -> None:
        self._engine, self._settings, self._notify = engine, settings, notify
        self._turns: list[Turn] = []
        self._pending: list[Picture] = []
        self.last: Result | None = None  # of the last finished answer

    @property
    def turns(self) -> int:
        """How many questions with their answers are remembered."""
        return len(self._turns)

    def attach(self, picture: Picture) -> None:
        """Show a picture with the next question; `UsageError` for one too many."""
        if len(self._pending) == MAX_IMAGES:
            raise UsageError(f"{MAX_IMAGES} pictures wait for a question already, which is the most; ask first")
        self._pending.append(picture)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns, self._pending, self.last = [], [], None
        self._engine.reset()

    def ask(self, text: str) -> Generator[Delta | Result, None, None]:
        """Stream the answer to `text` and the attached pictures.

        Closed early, the answer stays in the history as far as it came; without a token, or on an error, the question
        is forgotten and its pictures wait for the next one. Raises what the engine raises.
        """
        question = Message("user", (*self._pending, text) if text else tuple(self._pending))
        said: list[str] = []
        started = False
        try:
            with closing(self._stream(question)) as stream:
                for item in stream:
                    started = True
                    if isinstance(item, Result):
                        self.last, said = item, [item.text]
                    else:
                        said.append(item.text)
                    yield item
        finally:
            if started:
                self._turns.append((question, Message("assistant", ("".join(said),))))
                self._pending = []

    def _stream(self, question: Message) -> Generator[Delta | Result, None, None]:
        """The engine's stream after as many of the last turns as fit; the others are forgotten once it begins."""
        turns, lost = _with_room(self._turns, MAX_IMAGES - len(self._pending))
        dropped = 0
        while True:
            stream = cast("Generator[Delta | Result, None, None]", self._engine.stream(self._request(turns, question)))
            try:
                first = next(stream)
                break
            except CapacityError:
                if not turns:
                    raise
                turns, dropped = turns[1:], dropped + 1
        self._turns = turns
        with closing(stream):
            if lost:
                self._notify(
                    f"The model sees at most {MAX_IMAGES} pictures; the oldest {_count(lost, 'picture')} dropped."
                )
            if dropped:
                self._notify(f"The conversation is full; its oldest {_count(dropped, 'question')} dropped.")
            yield first
            yield from stream

    def _request(self, turns: list[Turn], question: Message) -> Request:
        s = self._settings
        system = [Message("system", (s.system,))] if s.system else []
        before = [message for turn in turns for message in turn]
        return Request((*system, *before, question), s.sampling, s.max_tokens, s.tiling)


def _with_room(turns: list[Turn], room: int) -> tuple[list[Turn], int]:
    """The turns with at most `room` pictures, the oldest removed, and how many that were.

    A question that was nothing but pictures goes with its answer.
    """
    lost = excess = max(sum(len(_pictures(user.parts)) for user, _ in turns) - room, 0)
    kept: list[Turn] = []
    for user, assistant in turns:
        drop = _pictures(user.parts)[:excess]
        excess -= len(drop)
        rest = tuple(part for part in user.parts if not any(part is d for d in drop))
        if rest:
            kept.append((Message("user", rest) if drop else user, assistant))
    return kept, lost


def _count(number: int, noun: str) -> str:
    return f"{noun} was" if number == 1 else f"{number} {noun}s were"


def _pictures(parts: Sequence[str | Picture]) -> list[Picture]:
    return [part for part in parts if isinstance(part, Picture)]
