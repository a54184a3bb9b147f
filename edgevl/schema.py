"""Answers that are held to a JSON schema: what would break it is never chosen, and the document is always closed.

llguidance says which tokens may follow. What it cannot enforce is refused before the run. At every token there is a way
to close the document within what is left of the answer; a token that would leave none is not taken. What llguidance
leaves open in a `format` is closed here: 2023-02-29 is no date. Knows nothing of models. Called by the engine; verbs
make schemas.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TokenConfig
from edgevl.errors import CapacityError, MissingExtraError, UsageError
from edgevl.sampling import Sampler

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LIMIT = 1 << 20  # bytes of a schema file
# As `json.dumps` writes; with free white space a small model may write nothing else.
_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
_EXAMPLE = '{"type": "object"}'
_CLOSING = '"}],: 0[{tfnelu-'  # what to try first on the way to the end; then every other character
_TRIES = 6  # orders of trying
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # all but 0000, which most programs cannot read
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = f"({_YEAR}-((0[13-9]|1[0-2])-[0-9]{{2}}|02-([01][0-9]|2[0-8]))|{_LEAP}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][^z]+$"  # no leap seconds and no small z, for the same reason
_FORMATS: dict[str, dict[str, Any]] = {  # what a format asks beyond what llguidance makes of it
    "date": {"pattern": f"^{_DATE}$"},
    "date-time": {"pattern": f"^{_DATE}T{_TIME}"},
    "time": {"pattern": f"^{_TIME}"},
    "hostname": {"maxLength": 253},
}
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")  # hold schemas by name
_DATA = ("const", "enum", "default", "examples")  # hold no schemas
_SLACK = 64  # tokens; further from the limit than this and twice the way to the end, the way is not looked for


class Schema:
    """One schema for one tokenizer; serves any number of answers."""

    def __init__(self, document: object, tokenizer_json: bytes, tokens: TokenConfig) -> None:
        """`document`: the schema as `json.loads` gives it.

        Raises `UsageError` for a schema that cannot be enforced, `MissingExtraError` without llguidance.
        """
        llguidance = _load()
        if not isinstance(document, dict | bool):
            raise UsageError("the schema is neither a JSON object nor true; write one such as " + _EXAMPLE)
        self._size, self._stop = tokens.size, tokens.stop
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json.decode(), n_vocab=tokens.size, eos_token=list(tokens.stop)
        )
        overrides = {**_STYLE, "coerce_one_of": False}
        try:
            schema = _with_whole_formats({"allOf": [document]} if isinstance(document, bool) else document)
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
        except (ValueError, TypeError, RecursionError) as error:
            raise _refusal(str(error)) from error
        matcher = self._matcher()
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        self.digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        self._orders = self._make_orders()

    def chooser(self, sampler: Sampler, room: int) -> SchemaChooser:
        """Chooses one answer of at most `room` tokens, the stop token included.

        Raises `CapacityError` when the shortest document that was found is longer.
        """
        matcher = self._matcher()
        way = self.way_out(matcher, room - 1)
        if way is None:
            raise CapacityError(
                f"no document of this schema was found that ends within {room - 1} tokens; "
                "raise --max-tokens, or ask for less in the schema"
            )
        return SchemaChooser(self, matcher, sampler, room, way)

    def allowed(self, matcher: LLMatcher) -> NDArray[np.bool_]:
        """Which tokens may follow, (V,). Raises `UsageError` where llguidance gives up."""
        words = np.zeros(-(-self._size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise UsageError(f"the schema is too complex to go on with ({_line(matcher.get_error())}); simplify it")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return bits[: self._size].astype(np.bool_)

    def way_out(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """At most `most` tokens that end the document, or None where none were found. The matcher stays as it is."""
        for order in self._orders:
            found = self._follow(matcher.deep_copy(), order, most)
            if found is not None:
                return found
        return None

    @property
    def stop(self) -> int:
        """A token that ends an answer."""
        return self._stop[0]

    def is_stop(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token in self._stop

    def consume(self, matcher: LLMatcher, token: int) -> None:
        """Go on behind an allowed token."""
        if not matcher.consume_token(token):
            raise UsageError(f"the schema is too complex to go on with ({_line(matcher.get_error())}); simplify it")

    def _follow(self, matcher: LLMatcher, order: NDArray[np.int64], most: int) -> list[int] | None:
        """The first allowed token of `order` (ids of single characters), or any other, until the document may end."""
        way: list[int] = []
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens()
            if not step:
                try:
                    allowed = self.allowed(matcher)
                except UsageError:
                    return None
                allowed[list(self._stop)] = False
                among = allowed[order]
                token = int(order[np.argmax(among)]) if among.any() else int(np.argmax(allowed))
                if not allowed[token]:
                    return None
                step = [token]
            way += step
            if len(way) > most or not matcher.consume_tokens(step):
                return None
        return way if len(way) <= most else None

    def _matcher(self) -> LLMatcher:
        matcher: LLMatcher = _load().LLMatcher(self._tokenizer, self._grammar, log_level=0)
        return matcher

    def _make_orders(self) -> list[NDArray[np.int64]]:
        """Tokens of one character, in the orders in which they are tried: closing ones first, then shuffled."""
        texts = {i: self._tokenizer.decode_bytes([i]) for i in range(self._size) if i not in self._stop}
        single = {text: i for i, text in reversed(texts.items()) if len(text) == 1}
        first = [single.pop(c.encode()) for c in _CLOSING if c.encode() in single]
        order = [*first, *single.values()]
        random = np.random.default_rng(0)
        return [np.array(order, np.int64), *(random.permutation(order) for _ in range(_TRIES - 1))]


class SchemaChooser:
    """Chooses the tokens of one answer (see `edgevl.generation.Chooser`)."""

    def __init__(self, schema: Schema, matcher: LLMatcher, sampler: Sampler, room: int, way: list[int]) -> None:
        self._schema, self._matcher, self._sampler = schema, matcher, sampler
        self._room = room  # tokens that may still be chosen, the stop token included
        self._way: list[int] | None = way  # to the end from here, where it is known
        self._longest = len(way)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The sampler's choice among the tokens that may follow; near the limit, only what leaves a way to the end."""
        schema = self._schema
        token = self._sampler.pick(np.where(schema.allowed(self._matcher), logits, np.float32(-np.inf)))
        self._room -= 1
        if schema.is_stop(token):
            return token
        if self._room > 2 * self._longest + _SLACK:
            self._way = None
            schema.consume(self._matcher, token)
            return token
        way = self._way if self._way is not None else schema.way_out(self._matcher, self._room)
        after, rest = self._step(token, way)
        if rest is None and way is not None:
            if not way:
                return schema.stop
            token = way[0]
            after, rest = self._step(token, way)
        self._matcher, self._way = after, rest
        self._longest = max(self._longest, len(rest or ()))
        return token

    def expected(self) -> list[int]:
        """What the schema leaves no choice about, as the tokenizer would write it."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    @property
    def greedy(self) -> bool:
        """The largest logit may not be allowed."""
        return False

    def _step(self, token: int, way: list[int] | None) -> tuple[LLMatcher, list[int] | None]:
        """The matcher behind `token`, and from there a way to the end that leaves a place for the stop token."""
        after = self._matcher.deep_copy()
        self._schema.consume(after, token)
        if way and token == way[0]:
            return after, way[1:]
        return after, self._schema.way_out(after, self._room - 1)


def read_schema(path: Path) -> object:
    """The schema in a file. Raises `UsageError` for what is no JSON, `MissingExtraError` without llguidance."""
    _load()
    try:
        if path.stat().st_size > _LIMIT:
            raise UsageError(f"{path} is larger than {_LIMIT >> 20} MiB; no schema is")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a file with a JSON schema") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}); give a file with a JSON schema") from error


def _with_whole_formats(schema: Any) -> Any:
    """The schema, with what `_FORMATS` adds wherever a format is asked for."""
    if isinstance(schema, list):
        return [_with_whole_formats(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    whole = dict(schema)
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            whole[key] = {name: _with_whole_formats(item) for name, item in value.items()}
        elif key not in _DATA:
            whole[key] = _with_whole_formats(value)
    more = _FORMATS.get(str(whole.get("format")))
    if more is not None and isinstance(others := whole.get("allOf", []), list):
        whole["allOf"] = [*others, more]
    return whole


def _load() -> Any:
    """llguidance, or `MissingExtraError`."""
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError("holding answers to a schema", "llguidance", "'edgevl[schema]'") from error
    return llguidance


def _refusal(reason: str) -> UsageError:
    return UsageError(f"the schema cannot be enforced ({_line(reason)}); leave out what is named")


def _line(reason: str) -> str:
    """A library's message on one line, without its end's dot."""
    return " ".join(reason.partition("<state>")[0].split())[:300].rstrip(".")
