"""What a request costs, and how its pictures and videos are cut so that it fits: arithmetic on sizes alone.

Knows the prompt's tokens and the plan's context; touches no pixels and runs no model. Called by the engine for every
request and by `edgevl.conversation`, which lets old turns leave when a new one needs their room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgevl.config import ModelConfig, TilingConfig, VisionConfig
from edgevl.errors import CapacityError, PromptError
from edgevl.image import Picture
from edgevl.pace import Pace
from edgevl.prompt import Message, Part, PromptBuilder, Said
from edgevl.tiling import image_cost, ladder
from edgevl.tokenizer import Tokenizer
from edgevl.view import PictureView, Shown, Video, VideoView, View

_BLIND = "this bundle holds a language model without eyes; ask without pictures"
_FEWEST_FRAMES, _MOST_FRAMES = 8, 32  # of a video, unless the user says
_ANSWER_SHARE = 4  # at most one part of so many of the context is kept free for the answer
_QUESTION_SHARE = 16  # and one of so many for the question about a video


@dataclass(frozen=True)
class Settled:
    """Messages in which every picture and video is cut in a fixed way."""

    messages: tuple[Message, ...]
    tokens: int  # of the whole prompt
    notes: tuple[str, ...]


class Budget:
    """Counts the tokens of requests to one bundle."""

    def __init__(self, prompts: PromptBuilder, tokenizer: Tokenizer, config: ModelConfig, context: int) -> None:
        self._prompts, self._tokenizer, self._config, self.context = prompts, tokenizer, config, context

    def room(self, max_tokens: int) -> int:
        """Tokens that are kept free for the answer where that is possible."""
        return min(max_tokens, max(1, self.context // _ANSWER_SHARE))

    def settle(
        self, messages: Sequence[Message], tiling: TilingConfig | None, max_tokens: int, pace: Pace | None = None
    ) -> Settled:
        """Cut what is not cut yet so that the messages and an answer fit, and as finely as `tiling` allows.

        All new pictures share one number of tiles: `tiling`'s, or 12, 8, 6, 4, 2, 1 below it. A video keeps all its
        frames or as many as fit, and its share falls with the pictures' tiles. `pace` bounds tiles and frames together.
        Raises `CapacityError` when one tile and one frame each are still too much, with the tokens of each part;
        `PromptError` for pictures shown to a model without eyes.
        """
        shown = [part for message in messages for part in message.shown]
        vision, tiling = self._config.vision, tiling or self._config.tiling
        if shown and vision is None:
            raise PromptError(_BLIND)
        text = len(self._prompts.build(messages, [0] * len(shown)).token_ids)
        if not shown or vision is None or tiling is None:
            if text >= self.context:
                raise self._refusal(messages, text)
            return Settled(tuple(messages), text, ())
        fixed = sum(_rows(part, vision) for part in shown if isinstance(part, View))
        left = self.context - text - fixed
        most = (left - self.room(max_tokens)) // vision.tile_tokens
        intime = most if pace is None else min(most, max(pace.tiles(text, vision.tile_tokens), 1))
        views = _views(shown, tiling, *(_finest(shown, tiling, vision, intime) or (1, 1)))
        settled = _replaced(messages, views)
        tokens = text + sum(_rows(view, vision) for view in views)
        if tokens >= self.context:
            raise self._refusal(settled, tokens)
        return Settled(settled, tokens, tuple(_notes(shown, views, tiling, vision, self.context, pace, text)))

    def frames(self, asked: int | None, held: Sequence[Message], max_tokens: int) -> int:
        """Frames to take of a video that is shown after the settled messages `held`.

        As many as were `asked` for; otherwise what is left of the context beside a question and its answer, at least 8
        (old turns leave for them) and at most 32. Raises `CapacityError` for more than the whole context holds.
        """
        assert self._config.vision is not None
        each = self._config.vision.tile_tokens
        if asked is None:
            used = self.tokens((*held, Message("user", ("?",)))) + self.context // _QUESTION_SHARE
            left = self.context - used - self.room(max_tokens)
            return max(min(left // each, _MOST_FRAMES), _FEWEST_FRAMES)
        if asked * each >= self.context:
            raise CapacityError(
                f"{asked} frames need {asked * each} tokens, this bundle holds {self.context} in and out together; "
                f"at most --frames {(self.context - 1) // each}, or build with a larger --context"
            )
        return asked

    def tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt of settled messages. Raises `PromptError` like `PromptBuilder.build`."""
        return len(self._prompts.build(messages, self.rows(messages)).token_ids)

    def rows(self, messages: Sequence[Message]) -> list[int]:
        """Rows of embeddings that each view of settled messages takes, in order. Raises `PromptError` without eyes."""
        vision = self._config.vision
        shown = [part for message in messages for part in message.shown]
        if shown and vision is None:
            raise PromptError(_BLIND)
        return [] if vision is None else [_rows(part, vision) for part in shown]

    def parts(self, messages: Sequence[Message]) -> dict[str, int]:
        """Tokens of settled messages by part, for people; each text is counted for itself, the rest is the template's.

        A conversation that ends with an answer is counted too.
        """
        asked = messages[:-1] if messages and messages[-1].role == "assistant" else messages
        counts = self._counts(messages)
        template = self.tokens(asked) - sum(self._counts(asked).values()) if any(m.role == "user" for m in asked) else 0
        return {**counts, "template": max(0, template)}

    def _counts(self, messages: Sequence[Message]) -> dict[str, int]:
        counts = {"system": 0, "questions": 0, "pictures": 0, "video": 0, "answers": 0}
        rows = iter(self.rows(messages))
        for message in messages:
            role = {"system": "system", "user": "questions", "assistant": "answers"}[message.role]
            for part in message.parts:
                if isinstance(part, str):
                    counts[role] += len(self._tokenizer.encode(part, specials=False))
                elif isinstance(part, Said):
                    counts[role] += len(part.token_ids)
                else:
                    counts["video" if isinstance(part, VideoView) else "pictures"] += next(rows)
        return counts

    def _refusal(self, messages: Sequence[Message], tokens: int) -> CapacityError:
        parts = ", ".join(f"{name} {count}" for name, count in self.parts(messages).items() if count)
        needed = -(-(tokens + 1) // 64) * 64
        trained = self._config.text.max_positions
        shorter = "shorten the text" if not any(m.shown for m in messages) else "send less text or fewer pictures"
        way = f", or build with --context {needed} or more" if needed <= trained else f"; the model ends at {trained}"
        return CapacityError(
            f"the prompt needs {tokens} tokens ({parts}), this bundle holds {self.context} in and out together; "
            f"{shorter}{way}"
        )


def _rows(part: Shown, vision: VisionConfig) -> int:
    assert isinstance(part, View), "a picture that nobody has cut"
    return part.tiles(vision) * vision.tile_tokens


def _finest(shown: list[Shown], tiling: TilingConfig, vision: VisionConfig, most: int) -> tuple[int, int] | None:
    """Tiles a picture and frames a video for at most `most` new tiles together, or None when there is no way."""
    frames = [len(part.frames) for part in shown if isinstance(part, Video)]
    for step in ladder(tiling):
        cut = replace(tiling, max_tiles=step)
        left = most - sum(image_cost(*part.size, cut, vision).tiles for part in shown if isinstance(part, Picture))
        if left >= sum(count * step // tiling.max_tiles if step > 1 else 1 for count in frames):
            return step, max(left, 1)
    return None


def _views(shown: list[Shown], tiling: TilingConfig, step: int, frames: int) -> list[View]:
    """Everything as views; those that were cut before stay as they are."""
    views: list[View] = []
    for part in shown:
        if isinstance(part, Picture):
            views.append(PictureView(part, replace(tiling, max_tiles=step)))
        elif isinstance(part, Video):
            views.append(VideoView(part, min(len(part.frames), frames)))
        else:
            views.append(part)
    return views


def _replaced(messages: Sequence[Message], views: list[View]) -> tuple[Message, ...]:
    rest = iter(views)

    def view(part: Part) -> Part:
        return part if isinstance(part, str | Said) else next(rest)

    return tuple(Message(message.role, tuple(view(part) for part in message.parts)) for message in messages)


def _notes(
    shown: list[Shown],
    views: list[View],
    tiling: TilingConfig,
    vision: VisionConfig,
    context: int,
    pace: Pace | None,
    text: int,
) -> list[str]:
    """What the user should know of how new pictures and videos were cut."""
    notes: list[str] = []
    why = f"to fit {context} tokens"
    new = [view for view, part in zip(views, shown, strict=True) if not isinstance(part, View)]
    if pace is not None and new:
        tiles = sum(view.tiles(vision) for view in new)
        seconds = pace.seconds(text, tiles, vision.tile_tokens)
        why = f"for a first token in {pace.first_token:g} s"
        late = "; fewer is not possible" if seconds > pace.first_token else ""
        notes.append(f"{tiles} tile{'s' * (tiles != 1)}: the first token is expected after {seconds:.1f} s{late}")
    for view, part in zip(views, shown, strict=True):
        if isinstance(part, Picture | Video):
            notes += part.notes
        if isinstance(part, Video) and isinstance(view, VideoView) and view.count < len(part.frames):
            notes.append(f"{part.name}: {view.count} of {len(part.frames)} frames are shown {why}")
    fewer = [v.tiling.max_tiles for v in new if isinstance(v, PictureView) and v.tiling.max_tiles < tiling.max_tiles]
    if fewer:
        notes.append(f"pictures were cut into at most {fewer[0]} tile{'s' * (fewer[0] != 1)} {why}")
    return notes
