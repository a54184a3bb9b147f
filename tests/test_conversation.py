"""Conversations over an engine that is played: what is sent, kept, dropped and told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from PIL import Image

from edgevl.budget import Settled
from edgevl.conversation import AnswerSettings, Conversation
from edgevl.engine import Delta, Request, Result
from edgevl.errors import CapacityError, PromptError, UsageError
from edgevl.image import Picture, load_image
from edgevl.prompt import Message, Said


class PlayedBudget:
    """Holds `context` messages, each one token; pictures count one more."""

    def __init__(self, context: int) -> None:
        self.context = context

    def room(self, max_tokens: int) -> int:
        return 0

    def tokens(self, messages: Sequence[Message]) -> int:
        return len(messages) + sum(len(m.shown) for m in messages)

    def settle(self, messages: Sequence[Message], *_: object) -> Settled:
        if self.tokens(messages) > self.context:
            raise CapacityError("too long")
        return Settled(tuple(messages), self.tokens(messages), ())


class PlayedEngine:
    """Answers "a", "b", "c"; holds `most` messages; remembers what it was asked."""

    def __init__(self, most: int = 100) -> None:
        self.budget, self.asked, self.resets, self.closed = PlayedBudget(most), list[Request](), 0, 0

    def stream(self, request: Request) -> Iterator[Delta | Result]:
        self.asked.append(request)
        try:
            for i, text in enumerate("abc"):
                yield Delta(i, text)
            yield Result("abc", (0, 1, 2), "stop", {}, {})
        finally:
            self.closed += 1

    def reset(self) -> None:
        self.resets += 1


def picture(shade: int = 0) -> Picture:
    return load_image(Image.new("RGB", (32, 32), (shade, 0, 0)))


def talk(most: int = 100, system: str | None = None) -> tuple[PlayedEngine, Conversation, list[str]]:
    engine, told = PlayedEngine(most), list[str]()
    return engine, Conversation(engine, AnswerSettings(system), told.append), told


def roles(request: Request) -> str:
    return "".join(message.role[0] for message in request.messages)


def test_history_and_system_are_sent_with_every_question() -> None:
    engine, conversation, told = talk(system="Be brief.")
    for text in ("one", "two"):
        items = list(conversation.ask(text))
        assert isinstance(items[-1], Result)
    assert [roles(r) for r in engine.asked] == ["su", "suau"]
    assert engine.asked[1].messages[1].parts == ("one",)
    assert engine.asked[1].messages[2].parts == (Said("abc", (0, 1, 2)),)
    assert conversation.last is not None
    assert (conversation.turns, told, engine.closed) == (2, [], 2)


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    engine, conversation, _ = talk()
    stream = conversation.ask("one")
    next(stream)
    next(stream)
    stream.close()
    assert engine.closed == 1
    list(conversation.ask("two"))
    assert [m.parts for m in engine.asked[1].messages] == [("one",), (Said("ab", (0, 1)),), ("two",)]


def test_a_question_that_failed_is_forgotten_and_its_pictures_wait() -> None:
    engine, conversation, _ = talk()
    list(conversation.ask("one"))
    conversation.attach(shown := picture())
    engine.budget.context = 0
    with pytest.raises(CapacityError):
        list(conversation.ask("two"))
    engine.budget.context = 100
    assert conversation.turns == 1  # what was said before survives a question that can never fit
    list(conversation.ask("three"))
    assert engine.asked[-1].messages[-1].parts == (shown, "three")
    list(conversation.ask("four"))
    assert engine.asked[-1].messages[-1].parts == ("four",)
    conversation.attach(shown)
    assert conversation.detach() == 1  # what never fits need not wait for ever
    list(conversation.ask("five"))
    assert engine.asked[-1].messages[-1].parts == ("five",)


def test_the_oldest_turns_are_dropped_when_no_more_fits() -> None:
    engine, conversation, told = talk(most=5)
    for text in ("one", "two", "three", "four"):
        list(conversation.ask(text))
    assert [m.parts for m in engine.asked[-1].messages[::2]] == [("two",), ("three",), ("four",)]
    assert told == ["The conversation is full; its oldest question was dropped."]


def test_pictures_leave_before_their_question_and_more_leaves_than_is_needed() -> None:
    engine, conversation, told = talk(most=16)
    conversation.attach(picture())
    for number in range(9):  # the ninth would be 17 messages and a picture; 14 leave room for another turn
        list(conversation.ask(f"question {number}"))
    assert told == ["The conversation is full; its oldest picture was and its oldest 2 questions were dropped."]
    assert engine.asked[-2].messages[0].text == "question 0"
    assert engine.asked[-1].messages[0].parts == ("question 2",)
    list(conversation.ask("question 9"))
    assert len(told) == 1


def test_the_oldest_pictures_are_dropped_beyond_four() -> None:
    engine, conversation, told = talk()
    shown = [picture(i) for i in range(7)]
    conversation.attach(shown[0])
    list(conversation.ask(""))  # nothing but a picture
    for p in shown[1:4]:
        conversation.attach(p)
    list(conversation.ask("two"))
    for p in shown[4:7]:
        conversation.attach(p)
    list(conversation.ask("three"))
    assert [m.parts for m in engine.asked[-1].messages[::2]] == [(shown[3], "two"), (*shown[4:], "three")]
    assert told == ["The model sees at most 4 pictures; the oldest 3 pictures were dropped."]


def test_a_fifth_picture_for_one_question_is_refused() -> None:
    _, conversation, _ = talk()
    for _ in range(4):
        conversation.attach(picture())
    with pytest.raises(UsageError, match="4 pictures wait"):
        conversation.attach(picture())


def test_reset_forgets_everything_but_the_system() -> None:
    engine, conversation, _ = talk(system="Be brief.")
    list(conversation.ask("one"))
    conversation.attach(picture())
    conversation.reset()
    assert (engine.resets, conversation.turns, conversation.last) == (1, 0, None)
    list(conversation.ask("two"))
    assert roles(engine.asked[-1]) == "su"
    assert engine.asked[-1].messages[-1].parts == ("two",)


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, conversation, _ = talk()

    def refuse(request: Request) -> Iterator[Delta | Result]:
        raise PromptError("no")
        yield

    monkeypatch.setattr(engine, "stream", refuse)
    with pytest.raises(PromptError):
        list(conversation.ask("one"))
    assert conversation.turns == 0
