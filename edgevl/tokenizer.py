"""Text to token ids and back, over the `tokenizers` library.

Two ways in: with the added tokens recognised (the chat template's own text) and without (everything a user or the model
wrote), so that no user can write a control token. Knows no roles, no template and no pictures. Called by
`edgevl.prompt`, the engine, the builder and the quality measurements.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from edgevl.errors import CheckpointError, PromptError

# With one, the library may end the process over a damaged file instead of raising (seen with 0.23).
_WORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet


class Tokenizer:
    """The tokenizer of one checkpoint or bundle."""

    def __init__(self, source: bytes | str | Path) -> None:
        """`source`: the bytes of a tokenizer.json, or its path. Raises `CheckpointError` when it is none."""
        data = source if isinstance(source, bytes) else _read(source)
        if _WORD_PREFIX.search(data):
            raise CheckpointError("tokenizer.json has a continuing_subword_prefix, which is not supported; use null")
        try:
            self._inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            self._inner.no_truncation()
            self._inner.no_padding()
            self.size = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        except Exception as problem:  # the library raises plain Exception
            raise CheckpointError(
                f"tokenizer.json ({len(data)} bytes) is damaged or of a newer format ({problem!s:.120}); copy it again"
            ) from problem
        if not self.size:
            raise CheckpointError("tokenizer.json has no tokens; copy it again")
        self._reserved = frozenset(self._inner.get_added_tokens_decoder())

    def encode(self, text: str, specials: bool) -> list[int]:
        """Token ids of `text`; nothing is put before or after it.

        `specials`: whether added tokens ("<image>", "<|eot_id|>", …) in the text become their ids. Without, the text
        never yields the id of any added token, be it marked special or not. Raises `PromptError` for text that is not
        valid Unicode.
        """
        _check(text)
        if specials:
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """The library's own steps except the first, the search for added tokens: normalize, split, model."""
        if not text:
            return []
        normalizer, splitter, model = self._inner.normalizer, self._inner.pre_tokenizer, self._inner.model
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        ids: list[int] = []
        for word in words:
            found = [token.id for token in model.tokenize(word)]
            ids.extend(found if self._reserved.isdisjoint(found) else self._without_reserved(word))
        return ids

    def _without_reserved(self, word: str) -> list[int]:
        """A word of which the model's own vocabulary would make an added token: taken apart until it does not."""
        found = [token.id for token in self._inner.model.tokenize(word)]
        if self._reserved.isdisjoint(found):
            return found
        if len(word) == 1:
            raise PromptError(f"the character {word!r} is a control token of this model; leave it out of the text")
        half = len(word) // 2
        return self._without_reserved(word[:half]) + self._without_reserved(word[half:])

    def cut(self, text: str) -> list[int | str]:
        """`text` in order, as ids of added tokens and the plain strings between them."""
        _check(text)
        encoding = self._inner.encode(text, add_special_tokens=False)
        pieces: list[int | str] = []
        done = 0
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._reserved:
                if begin > done:
                    pieces.append(text[done:begin])
                pieces.append(token)
                done = end
        return [*pieces, text[done:]] if done < len(text) else pieces

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of `ids`; control tokens are left out unless `specials`. Ids beyond the vocabulary have no text."""
        known = [i for i in ids if 0 <= i < self.size]
        return str(self._inner.decode(known, skip_special_tokens=not specials))

    def id_of(self, token: str) -> int:
        """The id of one token by its exact text. Raises `CheckpointError` when the tokenizer has none."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"tokenizer.json has no single token {token!r}; this is not the model's own tokenizer"
            )
        return int(found)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read ({problem.strerror}); give a tokenizer.json") from problem


def _check(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise PromptError(
            f"the text has a lone surrogate (U+{ord(text[problem.start]):04X}) at character {problem.start}; "
            "it is not valid Unicode, so decode it as UTF-8 first"
        ) from problem


class StreamDecoder:
    """Decodes an answer token by token: no half characters, and together the same text as `decode` of all tokens.

    The tokens since the last whole character are decoded together, behind the tokens before them for decoders that
    look back. Bytes that are no character (yet) come out as U+FFFD, at most 3 of them while a character is incomplete:
    these are held back.
    """

    def __init__(self, tokenizer: Tokenizer, specials: bool = False) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        self._context: list[int] = []  # decoded and given out
        self._open: list[int] = []  # not yet all given out
        self._given = 0  # characters of `_open`'s text that were

    def push(self, token: int) -> str:
        """What can be shown now that `token` is there; may be empty."""
        self._open.append(token)
        text = self._text()
        whole = text.rstrip(_BROKEN)
        end = len(whole) + max(0, len(text) - len(whole) - 3)
        piece, self._given = text[self._given : end], max(self._given, end)
        if len(whole) == len(text):
            self._context, self._open, self._given = self._open if text else self._context, [], 0
        return piece

    def flush(self) -> str:
        """What is left at the end: the replacement characters of an unfinished character, or nothing."""
        piece = self._text()[self._given :] if self._open else ""
        self._context, self._open, self._given = self._open, [], 0
        return piece

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context, self._specials)
        return self._tokenizer.decode(self._context + self._open, self._specials)[len(before) :]
