"""Answers that are held to a JSON schema: what would break it is never chosen, and the document is always closed.

llguidance says which tokens may follow. What it cannot enforce is refused before the run. At every token there is a way
to close the document within what is left of the answer; a token that would leave none is not taken. Knows nothing of
models. Called by the engine; verbs make schemas.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TokenConfig
from edgevl.errors import CapacityError, MissingExtraError, UsageError
from edgevl.sampling import Sampler
from edgevl.schema_gaps import completed

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LIMIT = 1 << 20  # bytes of a schema file
# As `json.dumps` writes; with free white space a small model may write nothing else.
_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
_EXAMPLE = '{"type": "object"}'
_BETWEEN = '}]",: 0[{tfn-'  # what to try first on the way to the end, outside texts, where there is nothing else
_WITHIN = '"}],: 0[{tfnelu-'  # and within texts; then signs, then letters and digits
_CIRCLE = 40  # times in a row that there is the same choice, before a way is given up
_PATIENCE = (1, 3, 10, 40)  # times that one character is taken at the same choice, before others get their turn


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
            schema = completed({"allOf": [document]} if isinstance(document, bool) else document)
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _refusal(str(error)) from error
        matcher = self._matcher()
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        self.digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        texts = {i: self._tokenizer.decode_bytes([i]) for i in range(self._size) if i not in self._stop}
        self._quotes = frozenset(i for i, text in texts.items() if b'"' in text)
        single = {text: i for i, text in reversed(texts.items()) if len(text) == 1}
        rest = sorted(single, key=lambda c: (c == b"\\", c.isalnum(), c))  # behind a backslash a quote ends no text
        self._known = sum(c.encode() in single for c in _WITHIN)
        # tokens of one character, as they are tried
        self._within = _tokens(single, [*map(str.encode, _WITHIN), *rest])
        self._between = _tokens(single, [*map(str.encode, _BETWEEN), *rest])

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
        bits = np.unpackbits(self._mask(matcher).view(np.uint8), bitorder="little")
        return bits[: self._size].astype(np.bool_)

    def way_out(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """At most `most` tokens that end the document, or None where none were found. The matcher stays as it is."""
        for patience in (0, *_PATIENCE):
            found = self._follow(matcher.deep_copy(), patience, most)
            if found is not None:
                return found
        return None

    def ends(self, matcher: LLMatcher, way: list[int]) -> bool:
        """Whether the tokens end the document. The matcher stays as it is."""
        after = matcher.deep_copy()
        return bool(after.try_consume_tokens(way) == len(way) and after.is_accepting())

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

    def _follow(self, matcher: LLMatcher, patience: int, most: int) -> list[int] | None:
        """The first allowed single character, or any other token, until the document may end.

        Where that leads round in circles (an address needs its @ at some time), others get their turn by `patience`; 0
        gives up.
        """
        way: list[int] = []
        taken: Counter[tuple[bytes, int]] = Counter()
        circle = (b"", 0)  # the last choice, and how often it came in a row
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens()
            if not step:
                try:
                    mask = self._mask(matcher)
                except UsageError:
                    return None
                allowed = _bits(mask, self._within)
                order = self._within if allowed[self._known :].any() else self._between
                among = _bits(mask, order)
                places: list[int] = np.flatnonzero(among).tolist()
                if places:
                    choice = among.tobytes()
                    place = places[0] if not patience else min(places, key=lambda i: (taken[choice, i] // patience, i))
                    taken[choice, place] += 1
                    circle = (choice, circle[1] + 1 if circle[0] == choice else 1)
                    if not patience and circle[1] > _CIRCLE:
                        return None
                    step = [int(order[place])]
                else:
                    others = self.allowed(matcher)
                    others[list(self._stop)] = False
                    if not others.any():
                        return None
                    step = [int(np.argmax(others))]
            way += step
            if not self._quotes.isdisjoint(step):
                taken.clear()
            if len(way) > most or not matcher.consume_tokens(step):
                return None
        return way if len(way) <= most else None

    def _mask(self, matcher: LLMatcher) -> NDArray[np.int32]:
        """A bit for each token that may follow. Raises `UsageError` where llguidance gives up."""
        words = np.zeros(-(-self._size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise UsageError(f"the schema is too complex to go on with ({_line(matcher.get_error())}); simplify it")
        return words

    def _matcher(self) -> LLMatcher:
        matcher: LLMatcher = _load().LLMatcher(self._tokenizer, self._grammar, log_level=0)
        return matcher


class SchemaChooser:
    """Chooses the tokens of one answer (see `edgevl.generation.Chooser`)."""

    def __init__(self, schema: Schema, matcher: LLMatcher, sampler: Sampler, room: int, way: list[int]) -> None:
        self._schema, self._matcher, self._sampler = schema, matcher, sampler
        self._room = room  # tokens that may still be chosen, the stop token included
        self._way = way  # to the end from here; with the stop token no longer than the room

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The sampler's choice among the tokens that may follow, if it leaves a way to the end."""
        schema = self._schema
        token = self._sampler.pick(np.where(schema.allowed(self._matcher), logits, np.float32(-np.inf)))
        self._room -= 1
        if schema.is_stop(token):
            return token
        after, way = self._step(token)
        if way is None:
            if not self._way:
                return schema.stop
            token = self._way[0]
            after, way = self._step(token)
            assert way is not None
        self._matcher, self._way = after, way
        return token

    def expected(self) -> list[int]:
        """What the schema leaves no choice about, as the tokenizer would write it."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def ahead(self, count: int) -> None:
        """A backend does not know which tokens are allowed."""

    def took(self) -> None:
        """Never called."""

    def _step(self, token: int) -> tuple[LLMatcher, list[int] | None]:
        """The matcher behind `token`, and from there a way to the end that leaves a place for the stop token.

        Behind a piece of a text it is mostly the same as before.
        """
        after = self._matcher.deep_copy()
        self._schema.consume(after, token)
        if self._way and token == self._way[0]:
            return after, self._way[1:]
        if len(self._way) < self._room and self._schema.ends(after, self._way):
            return after, self._way
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


def _tokens(single: dict[bytes, int], characters: list[bytes]) -> NDArray[np.int64]:
    """The tokens of the characters, each once, in that order."""
    return np.array([single[c] for c in dict.fromkeys(characters) if c in single], np.int64)


def _bits(mask: NDArray[np.int32], tokens: NDArray[np.int64]) -> NDArray[np.int32]:
    """1 for each of the tokens that the mask allows."""
    found: NDArray[np.int32] = mask[tokens >> 5] >> (tokens & 31) & 1
    return found


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
