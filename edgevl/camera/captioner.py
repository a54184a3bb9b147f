"""One question asked of one picture after the other. Called by `edgevl caption`, for files and live sources alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edgevl.engine import Engine, Request, Result
from edgevl.errors import UsageError
from edgevl.image import Picture, load_image
from edgevl.prompt import Message
from edgevl.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from edgevl.config import TilingConfig
    from edgevl.schema import Schema

_DEEPEST = 100  # levels of a document


@dataclass(frozen=True)
class Caption:
    """What a model said of a picture."""

    text: str
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_json: bool = False  # a document of a schema

    @property
    def said(self) -> dict[str, Any]:
        """What stands in the journal: the caption, or the schema's fields.

        Raises `UsageError` for a document that is valid but cannot be kept: numbers too large, nested too deeply.
        """
        if not self.is_json:
            return {"caption": self.text}
        try:
            fields = json.loads(self.text, parse_float=_finite, parse_constant=_finite)
            if _depth(fields) > _DEEPEST:
                raise ValueError(f"nested more than {_DEEPEST} deep")
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the document cannot be kept ({error}); bound its numbers and its depth") from error
        return {"fields": fields}


class Captioner(Protocol):
    """Whoever captions pictures."""

    model: str  # the bundle's digest
    prompt: str
    schema: str | None  # digest of the schema that captions are held to

    def caption(self, picture: Picture, alive: Callable[[], None]) -> Caption:
        """Caption one picture; `alive` is called whenever work went on, at every token at least."""
        ...


class EngineCaptioner:
    """Captions by an engine. Nothing of a picture is kept once it is captioned."""

    def __init__(
        self,
        engine: Engine,
        prompt: str,
        max_tokens: int,
        tiling: TilingConfig | None = None,
        schema: Schema | None = None,
    ) -> None:
        """Raises `CapacityError`, before any picture is looked at, for a prompt or a schema without room."""
        self.model = engine.bundle.digest
        self.prompt = prompt
        self.schema = None if schema is None else schema.digest
        self._engine, self._max_tokens, self._tiling, self._rules = engine, max_tokens, tiling, schema
        engine.budget.settle((self._question(_blank()),), tiling, max_tokens)
        if schema is not None:
            schema.chooser(Sampler(Sampling()), max_tokens)

    def caption(self, picture: Picture, alive: Callable[[], None]) -> Caption:
        """Caption one picture; raises `UsageError` for one that cannot be asked about."""
        question = self._question(picture)
        request = Request((question,), max_tokens=self._max_tokens, tiling=self._tiling, schema=self._rules)
        for item in self._engine.stream(request):
            alive()
            if isinstance(item, Result):
                self._forget()
                if self._rules is not None and item.finish_reason != "stop":
                    raise UsageError(f"the document was not closed after {item.tokens['generated']} tokens; allow more")
                return Caption(item.text.strip(), item.tokens, item.seconds, item.notes, self._rules is not None)
        raise AssertionError("a stream ends with its result")

    def _question(self, picture: Picture) -> Message:
        return Message("user", (picture, self.prompt))

    def _forget(self) -> None:
        """No frame of a camera comes twice, so that keeping its embeddings would only fill memory."""
        self._engine.embeddings.clear()

    def warm_up(self) -> None:
        """Run every part of the model once, so that the first caption is as fast as the others."""
        request = Request((self._question(_blank()),), max_tokens=2, tiling=self._tiling)
        for _ in self._engine.stream(request):
            pass
        self._engine.reset()
        self._forget()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large a number")
    return value


def _depth(value: object) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, parts), default=0)


def _blank() -> Picture:
    """The smallest question there is: a picture of one tile."""
    from PIL import Image

    return load_image(Image.new("RGB", (64, 64)))
