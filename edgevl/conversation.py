"""A conversation that outlives its answers: history, attached pictures, and what leaves when no more fits.

Whole turns and whole pictures go, oldest first, and each loss is told. Answers keep their token ids, so that a turn
costs only its new tokens. Knows the engine as something that streams answers and counts; knows nothing of terminals.
Called by `edgevl chat`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from edgevl.budget import Budget
from edgevl.config import TilingConfig
from edgevl.engine import Delta, Request, Result, Sampling
from edgevl.errors import PromptError, UsageError
from edgevl.image import Picture
from edgevl.pace import Pace
from edgevl.prompt import MAX_IMAGES, MAX_VIDEOS, Message, Said
from edgevl.schema import Schema
from edgevl.view import Shown, Video, VideoView

Turn = tuple[Message, Message]  # the user's and the assistant's
_SPARE = 8  # once something must leave, a part of so many of the context becomes free beyond what is needed


class Answerer(Protocol):
    """What a conversation needs of an engine."""

    budget: Budget

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
    pace: Pace | None = None
    schema: Schema | None = None
    lookup: bool = True


class Conversation:
    """One user's talk with one engine. `notify` is given one sentence for everything that the user should know."""

    def __init__(self, engine: Answerer, settings: AnswerSettings, notify: Callable[[str], None]) -> None:
        self._engine, self.settings, self._notify = engine, settings, notify
        self._turns: list[Turn] = []
        self._pending: list[Picture | Video] = []
        self.last: Result | None = None  # of the last finished answer

    @property
    def turns(self) -> int:
        """How many questions with their answers are remembered."""
        return len(self._turns)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The system message and everything that is remembered, oldest first; what was shown is settled."""
        return (*self._system(), *(message for turn in self._turns for message in turn))

    def attach(self, shown: Picture | Video) -> None:
        """Show a picture or a video with the next question; `UsageError` for one too many."""
        most = MAX_VIDEOS if isinstance(shown, Video) else MAX_IMAGES
        kind = "video" if isinstance(shown, Video) else "picture"
        waiting = sum(isinstance(other, Video) == isinstance(shown, Video) for other in self._pending)
        if waiting == most:
            what = f"{most} {kind}s wait" if most != 1 else f"a {kind} waits"
            raise UsageError(f"{what} for a question already, which is the most; ask first")
        self._pending.append(shown)

    def detach(self) -> int:
        """Take back what waits for the next question; how many there were."""
        count, self._pending = len(self._pending), []
        return count

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns, self._pending, self.last = [], [], None
        self._engine.reset()

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on from settled messages, as `messages` gave them; their system message counts from now on.

        Raises `PromptError` for messages that are no conversation, and then nothing has changed.
        """
        first = messages[0] if messages and messages[0].role == "system" else None
        turns = messages[1:] if first is not None else messages
        if [m.role for m in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise PromptError("the saved messages are no questions with their answers; save the conversation again")
        self._engine.budget.tokens((*messages, Message("user", ("?",))))  # refuses what no question could follow
        self.reset()
        self.settings = replace(self.settings, system=None if first is None else first.text)
        self._turns = list(zip(turns[::2], turns[1::2], strict=True))

    def ask(self, text: str) -> Generator[Delta | Result, None, None]:
        """Stream the answer to `text` and the attached pictures.

        Closed early, the answer stays in the history as far as it came; without a token, or on an error, the question
        is forgotten and its pictures wait for the next one. Raises what the engine raises.
        """
        s, budget = self.settings, self._engine.budget
        asked = Message("user", (*self._pending, text) if text else tuple(self._pending))
        settled = budget.settle((*self._system(), asked), s.tiling, s.max_tokens, s.pace)
        question = settled.messages[-1]
        turns, losses = self._fitting(question)
        before = (message for turn in turns for message in turn)
        request = Request((*self._system(), *before, question), s.sampling, s.max_tokens, s.tiling, s.schema, s.lookup)
        said: list[Delta] = []
        result: Result | None = None
        try:
            with closing(_generator(self._engine.stream(request))) as stream:
                for item in stream:
                    if not said and result is None:
                        self._turns = turns
                        for loss in losses:
                            self._notify(loss)
                    if isinstance(item, Result):
                        self.last = item = result = replace(item, notes=(*settled.notes, *item.notes))
                    else:
                        said.append(item)
                    yield item
        finally:
            if said or result is not None:
                text = "".join(d.text for d in said) if result is None else result.text
                answer = Said(text, tuple(d.token_id for d in said) if result is None else result.token_ids)
                self._turns.append((question, Message("assistant", (answer,))))
                self._pending = []

    def _system(self) -> tuple[Message, ...]:
        return (Message("system", (self.settings.system,)),) if self.settings.system else ()

    def _fitting(self, question: Message) -> tuple[list[Turn], list[str]]:
        """The last turns for which there is room beside `question`, and what to tell of the others.

        When anything must leave, more leaves than needed: each time the whole cache is computed anew.
        """
        budget, losses = self._engine.budget, list[str]()
        turns = list(self._turns)
        for videos, most, noun in ((False, MAX_IMAGES, "picture"), (True, MAX_VIDEOS, "video")):
            room = most - len(_of(question, videos))
            turns, lost = _without(turns, videos, sum(len(_of(user, videos)) for user, _ in turns) - room)
            if lost:
                limit = f"{most} {noun}{'s' * (most != 1)}"
                losses.append(f"The model sees at most {limit}; the oldest {_count(lost, noun)} dropped.")
        most = budget.context - budget.room(self.settings.max_tokens)

        def tokens() -> int:
            before = (message for turn in turns for message in turn)
            return budget.tokens((*self._system(), *before, question))

        if turns and tokens() > most:
            gone = {"picture": 0, "video": 0, "question": 0}
            most -= budget.context // _SPARE
            while turns and tokens() > most:
                user, assistant = turns[0]
                oldest = user.shown[0] if user.shown else None
                rest = None if oldest is None else _less(user, oldest)
                turns = turns[1:] if rest is None else [(rest, assistant), *turns[1:]]
                gone["question" if rest is None else "video" if isinstance(oldest, VideoView) else "picture"] += 1
            counts = [_count(count, noun) for noun, count in gone.items() if count]
            losses.append(f"The conversation is full; its oldest {' and its oldest '.join(counts)} dropped.")
        return turns, losses


def _generator(stream: Iterator[Delta | Result]) -> Generator[Delta | Result, None, None]:
    """Whatever iterator an engine gives, as something that can be closed."""
    yield from stream


def _of(message: Message, videos: bool) -> list[Shown]:
    return [part for part in message.shown if isinstance(part, Video | VideoView) == videos]


def _less(user: Message, gone: Shown) -> Message | None:
    """The message without one picture or video; None when nothing is left of it."""
    rest = tuple(part for part in user.parts if part is not gone)
    return Message(user.role, rest) if rest else None


def _without(turns: list[Turn], videos: bool, excess: int) -> tuple[list[Turn], int]:
    """The turns without the oldest `excess` pictures (or videos), and how many these were.

    A question that was nothing but pictures goes with its answer.
    """
    lost = max(excess, 0)
    kept: list[Turn] = []
    for user, assistant in turns:
        rest: Message | None = user
        for gone in _of(user, videos)[: max(excess, 0)]:
            excess -= 1
            rest = _less(rest, gone) if rest is not None else None
        if rest is not None:
            kept.append((rest, assistant))
    return kept, lost


def _count(number: int, noun: str) -> str:
    return f"{noun} was" if number == 1 else f"{number} {noun}s were"
