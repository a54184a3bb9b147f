"""From a conversation to token ids: the chat template, pictures' places, and the wall between user text and control.

The template is rendered with a random word in the place of every text and picture; the result is split at these words.
Only what the template itself wrote may become control tokens. Knows the template as Jinja source and a picture as the
number of tokens it takes. Called by the engine.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgevl.config import TokenConfig
from edgevl.errors import PromptError
from edgevl.tokenizer import Tokenizer
from edgevl.view import Shown, Video, VideoView

MAX_IMAGES = 4  # per request; the model card's limit
MAX_VIDEOS = 1  # per request
MAX_TEXT = 1 << 20  # characters of all texts of a request; no context holds more
_MAX_RENDERED = 1 << 16  # characters that a template may write besides the texts
_ROLES = ("system", "user", "assistant")

# Llama-3's plain chat format, which the model was trained with: no forced system block, contents trimmed.
LLAMA3_TEMPLATE = (
    "<|begin_of_text|>"
    "{%- for message in messages -%}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n\\n' }}{{ message['content'] | trim }}<|eot_id|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Said:
    """What the model answered, with its own token ids: they go back as they came, so that the KV cache still holds."""

    text: str
    token_ids: tuple[int, ...]  # without the stop token


Part = str | Said | Shown


@dataclass(frozen=True)
class Message:
    """One turn. Pictures before the first text each take a line of their own; later ones stand where they are put."""

    role: str  # "system" | "user" | "assistant"; only a user shows pictures and videos
    parts: tuple[Part, ...]

    @property
    def shown(self) -> tuple[Shown, ...]:
        """Its pictures and videos, in order."""
        return tuple(part for part in self.parts if not isinstance(part, str | Said))

    @property
    def text(self) -> str:
        """Its texts, one after the other."""
        return "".join(p if isinstance(p, str) else p.text for p in self.parts if isinstance(p, str | Said))


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens. Where an image row stands, the id is that of "<image>"."""

    token_ids: tuple[int, ...]
    images: tuple[tuple[int, int, int], ...]  # (start, count, picture) in order; pictures count through all messages


class PromptBuilder:
    """Renders conversations for one model."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str, tokens: TokenConfig) -> None:
        """Raises `PromptError` when the template does not parse."""
        self._tokenizer, self._tokens = tokenizer, tokens
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(chat_template)
        except jinja2.TemplateError as problem:
            raise PromptError(f"the chat template does not parse ({problem}); take the model's own") from problem

    def build(self, messages: Sequence[Message], image_tokens: Sequence[int]) -> Prompt:
        """The prompt up to the place where the assistant speaks.

        `image_tokens`: how many rows each picture takes, through all messages in order; `<img>` and `</img>` are added
        around them. An empty system message counts as none. Raises `PromptError` for roles out of turn, an empty
        question, too many pictures or too much text, and for a template that fails.
        """
        messages = _checked(messages)
        pictures = sum(len(message.shown) for message in messages)
        assert pictures == len(image_tokens), f"{pictures} pictures, {len(image_tokens)} costs"
        if pictures and self._tokens.image is None:
            raise PromptError("this model has no <image> token and sees no pictures; ask without them")
        slots = _Slots()
        turns = [{"role": message.role, "content": slots.content(message)} for message in messages]
        return self._assemble(slots.split(self._render(turns)), image_tokens)

    def _render(self, turns: list[dict[str, str]]) -> str:
        budget = _MAX_RENDERED + 2 * sum(len(turn["content"]) for turn in turns)
        pieces: list[str] = []
        try:
            for piece in self._template.generate(messages=turns, add_generation_prompt=True):
                pieces.append(piece)
                budget -= len(piece)
                if budget < 0:
                    raise PromptError(
                        f"the chat template adds more than {_MAX_RENDERED} characters; take the model's own template"
                    )
        except PromptError:
            raise
        except Exception as problem:  # a template can fail in any way that Python can
            raise PromptError(
                f"the chat template cannot render this conversation ({problem!s:.200}); change the messages, "
                "or take the model's own template"
            ) from problem
        return "".join(pieces)

    def _assemble(self, pieces: list[str | _Slot], image_tokens: Sequence[int]) -> Prompt:
        """Control tokens cut the text into runs; template and user text in one run are tokenized as one."""
        ids: list[int] = []
        images: list[tuple[int, int, int]] = []
        run: list[str] = []

        def close() -> None:
            ids.extend(self._tokenizer.encode("".join(run), specials=False))
            run.clear()

        for piece in pieces:
            if isinstance(piece, str):
                for token in self._tokenizer.cut(piece):
                    if isinstance(token, str):
                        run.append(token)
                    else:
                        close()
                        ids.append(token)
            elif isinstance(piece.part, str):
                run.append(piece.part)
            elif isinstance(piece.part, Said):
                close()
                if not all(0 <= token < self._tokens.size for token in piece.part.token_ids):
                    raise PromptError("an answer has token ids that this model does not know; ask without it")
                ids.extend(piece.part.token_ids)
            else:
                close()
                assert self._tokens.image is not None
                ids.extend(() if self._tokens.image_start is None else (self._tokens.image_start,))
                count = image_tokens[len(images)]
                images.append((len(ids), count, len(images)))
                ids.extend([self._tokens.image] * count)
                ids.extend(() if self._tokens.image_end is None else (self._tokens.image_end,))
        close()
        return Prompt(tuple(ids), tuple(images))


@dataclass(frozen=True)
class _Slot:
    """A place in the rendered template; `part` is None for a picture."""

    part: str | Said | None


class _Slots:
    """Stands random words in for texts and pictures, and finds them again in what the template wrote.

    The words are drawn after the template is fixed and the texts are never rendered, so neither can forge one.
    """

    def __init__(self) -> None:
        self._key = f"slot{secrets.token_hex(16)}n"
        self._slots: list[_Slot] = []

    def content(self, message: Message) -> str:
        """The message's content for the template: white space at its two ends is real, so that `trim` can trim it."""
        pieces: list[str | Said | None] = []  # None is a picture
        for part, following in zip(message.parts, [*message.parts, ""][1:], strict=True):
            if isinstance(part, str | Said):
                pieces.append(part)
                continue
            leads = not any(isinstance(piece, str) and piece.strip() for piece in pieces)
            own_line = isinstance(following, str) and following.startswith("\n")
            pieces.extend((None, "\n") if leads and not own_line else (None,))
        joined: list[str | Said | None] = []
        for piece in pieces:
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            else:
                joined.append(piece)
        content = ""
        for index, piece in enumerate(joined):
            if not isinstance(piece, str):
                content += self._word(piece)
                continue
            body = piece.lstrip() if index == 0 else piece
            head = piece[: len(piece) - len(body)]
            core = body.rstrip() if index == len(joined) - 1 else body
            content += head + (self._word(core) if core else "") + body[len(core) :]
        return content

    def _word(self, part: str | Said | None) -> str:
        self._slots.append(_Slot(part))
        return f"{self._key}{len(self._slots) - 1}e"

    def split(self, rendered: str) -> list[str | _Slot]:
        """The rendered text with its slots in place. Raises `PromptError` if one is lost, doubled or out of order."""
        parts = re.split(f"{self._key}([0-9]+)e", rendered)
        found = [int(number) for number in parts[1::2]]
        if found != list(range(len(self._slots))):
            raise PromptError(
                f"the chat template keeps {len(set(found))} of {len(self._slots)} texts and pictures in their order; "
                "each must appear once, so take the model's own template"
            )
        return [self._slots[int(part)] if index % 2 else part for index, part in enumerate(parts) if index % 2 or part]


def _checked(messages: Sequence[Message]) -> list[Message]:
    """The conversation without an empty system message. Raises `PromptError` when it is none."""
    for message in messages:
        if message.role not in _ROLES:
            raise PromptError(f"the role {message.role!r:.40} does not exist; choose {', '.join(_ROLES)}")
        if message.role != "user" and message.shown:
            raise PromptError(f"a message of the {message.role} has a picture; only the user shows pictures")
    kept = [m for i, m in enumerate(messages) if i or m.role != "system" or _says_something(m)]
    turns = kept[1:] if kept and kept[0].role == "system" else kept
    for number, message in enumerate(turns, 1):
        wanted = "user" if number % 2 else "assistant"
        if message.role != wanted:
            raise PromptError(
                f"turn {number} is the {message.role}'s where the {wanted}'s is due; after at most one system message "
                "in front, user and assistant take turns"
            )
    if not turns or turns[-1].role != "user":
        raise PromptError("the conversation does not end with the user; add a question")
    for message in turns[::2]:
        if not _says_something(message):
            raise PromptError("a message of the user is empty; write a text or add a picture")
    shown = [part for message in kept for part in message.shown]
    videos = sum(isinstance(part, Video | VideoView) for part in shown)
    if len(shown) - videos > MAX_IMAGES:
        raise PromptError(f"the conversation has {len(shown) - videos} pictures; the model takes at most {MAX_IMAGES}")
    if videos > MAX_VIDEOS:
        raise PromptError(f"the conversation has {videos} videos; the model takes at most {MAX_VIDEOS}")
    length = sum(len(message.text) for message in kept)
    if length > MAX_TEXT:
        raise PromptError(
            f"the conversation has {length} characters of text; at most {MAX_TEXT} are read, so shorten it"
        )
    return kept


def _says_something(message: Message) -> bool:
    return bool(message.shown or message.text.strip())


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attributes beyond data, no changes to what is passed in, no loader; products of texts stay small."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, int | float) and abs(value) < 1 << 31 for value in (left, right))
        if not numbers or (operator == "**" and abs(right) > 64):
            raise jinja2.TemplateRuntimeError(f"{operator} is only for small numbers in a chat template")
        return super().call_binop(context, operator, left, right)


def _refuse(reason: str) -> None:
    """`raise_exception`, with which templates refuse a conversation."""
    raise PromptError(f"the model's chat template refuses this conversation: {reason!s:.200}")
