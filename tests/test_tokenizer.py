"""Ids of text, with and without control tokens, and text of ids, at once and token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from edgevl.errors import CheckpointError, PromptError
from edgevl.tokenizer import StreamDecoder, Tokenizer

SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_end|>", "<image>")
PLAIN_ADDED = ("<img>", "</img>", "<ref>")  # in tokenizer.json with "special": false
MERGES = [("Ġ", "t"), ("Ġt", "h"), ("e", "r"), ("Ċ", "Ċ"), ("ĊĊ", "H"), ("i", "m"), ("a", "g"), ("Ã", "©"), ("ð", "Ł")]


def byte_level(use_regex: bool = True) -> tokenizers.Tokenizer:
    """256 bytes and a few merges; without the regex, merges reach across any boundary, even into the next line."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    inner = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED])
    return inner


def made(inner: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(inner.to_str().encode())


INNER = byte_level()
TOKENIZER = made(INNER)
ADDED = {TOKENIZER.id_of(t) for t in (*SPECIAL, *PLAIN_ADDED)}
TEXTS = st.text() | st.lists(
    st.sampled_from(["<image>", "<img>", "<|eot_id|>", "<ref>", " the", "é", "😀", "\n\nH", "<", "|>", "image", " "])
).map("".join)


@pytest.mark.parametrize("token", [*SPECIAL, *PLAIN_ADDED])
def test_added_tokens_are_read_only_where_they_are_allowed(token: str) -> None:
    text = f"say {token}{token} please"
    allowed = TOKENIZER.encode(text, specials=True)
    assert allowed == INNER.encode(text, add_special_tokens=False).ids
    assert allowed.count(TOKENIZER.id_of(token)) == 2
    refused = TOKENIZER.encode(text, specials=False)
    assert ADDED.isdisjoint(refused)
    assert TOKENIZER.decode(refused) == text


@given(TEXTS)
def test_user_text_never_has_added_tokens_and_comes_back_whole(text: str) -> None:
    ids = TOKENIZER.encode(text, specials=False)
    assert ADDED.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == text


@given(st.text())
def test_without_control_tokens_in_it_both_ways_agree(text: str) -> None:
    expected = INNER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode(text, specials=True) == expected
    assert TOKENIZER.encode(text, specials=False) == expected


@given(TEXTS)
def test_cut_loses_nothing_and_gives_the_same_ids(text: str) -> None:
    pieces = TOKENIZER.cut(text)
    assert "".join(p if isinstance(p, str) else TOKENIZER.decode([p], specials=True) for p in pieces) == text
    ids = [i for p in pieces for i in ([p] if isinstance(p, int) else TOKENIZER.encode(p, specials=False))]
    assert ids == TOKENIZER.encode(text, specials=True)


def test_a_control_token_in_the_models_own_vocabulary_is_taken_apart() -> None:
    # words by white space, and the model's vocabulary knows the control token as a word: nothing to search for
    vocab = {"?": 0, "hello": 1, "<end>": 2, "X": 3, "<e": 4, "nd>": 5}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<end>"])
    inner.add_tokens([AddedToken("X", special=False)])
    tokenizer = made(inner)
    assert tokenizer.encode("hello <end>", specials=True) == [1, 2]
    assert tokenizer.encode("hello <end> hello", specials=False) == [1, 4, 5, 1]
    with pytest.raises(PromptError, match="'X' is a control token"):
        tokenizer.encode("hello X", specials=False)


def test_normalizers_prefixes_and_postprocessors() -> None:
    inner = byte_level()
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", TOKENIZER.id_of("<|begin_of_text|>"))]
    )
    inner.enable_truncation(3)
    inner.enable_padding(length=20)
    tokenizer = made(inner)
    text = "cafe\u0301 and more words than three"
    for specials in (True, False):
        ids = tokenizer.encode(text, specials)
        assert tokenizer.decode(ids) == "caf\u00e9 and more words than three"
        assert tokenizer.id_of("<|begin_of_text|>") not in ids


def test_decode_leaves_control_tokens_out_unless_asked() -> None:
    ids = TOKENIZER.encode("a<|eot_id|>b<ref>c", specials=True)
    assert TOKENIZER.decode(ids) == "ab<ref>c"
    assert TOKENIZER.decode(ids, specials=True) == "a<|eot_id|>b<ref>c"
    assert TOKENIZER.decode([*ids, 10**6, -1, 2**40]) == "ab<ref>c"  # padded rows of the head have no text


def test_text_that_is_not_unicode_is_refused() -> None:
    for read in (lambda t: TOKENIZER.encode(t, True), lambda t: TOKENIZER.encode(t, False), TOKENIZER.cut):
        with pytest.raises(PromptError, match=r"U\+DCFF\) at character 3"):
            read("abc\udcff")


# -- the stream ---------------------------------------------------------------------------------------------------


def streamed(ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> tuple[list[str], str]:
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(i) for i in ids], decoder.flush()


def test_half_a_character_waits_for_its_other_half() -> None:
    ids = TOKENIZER.encode("a😀é!", specials=False)
    pieces, tail = streamed(ids)
    assert [p for p in pieces if p] == ["a", "😀", "é", "!"] and tail == ""
    assert "".join(streamed(ids[:2])[0]) == "a" and streamed(ids[:2])[1] == "\ufffd"


@given(TEXTS)
def test_the_stream_of_a_text_is_the_text(text: str) -> None:
    pieces, tail = streamed(TOKENIZER.encode(text, specials=False))
    assert "".join(pieces) + tail == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=300)
@given(st.lists(st.integers(0, TOKENIZER.size + 3), max_size=40))
def test_the_stream_of_any_tokens_is_their_decoded_text(ids: list[int]) -> None:
    pieces, tail = streamed(ids)
    assert "".join(pieces) + tail == TOKENIZER.decode(ids)


def test_a_stream_of_rubbish_still_flows() -> None:
    rubbish = INNER.token_to_id("Ã")
    pieces, tail = streamed([rubbish] * 50)
    assert "".join(pieces) == "\ufffd" * 47 and tail == "\ufffd" * 3


def test_the_stream_keeps_the_space_of_decoders_that_strip_the_first() -> None:
    vocab = [("<unk>", 0.0), ("▁hello", -1.0), ("▁world", -1.0), ("▁", -2.0)]
    inner = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = made(inner)
    ids = tokenizer.encode("hello world world", specials=False)
    assert streamed(ids, tokenizer)[0] == ["hello", " world", " world"]


# -- the file -----------------------------------------------------------------------------------------------------


def test_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(INNER.to_str(), encoding="utf-8")
    assert (
        Tokenizer(path).encode("the é", True) == Tokenizer(str(path)).encode("the é", True) == INNER.encode("the é").ids
    )
    with pytest.raises(CheckpointError, match=r"other\.json cannot be read"):
        Tokenizer(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_ids_by_name() -> None:
    assert TOKENIZER.id_of("<image>") == INNER.token_to_id("<image>")
    with pytest.raises(CheckpointError, match="<video>"):
        TOKENIZER.id_of("<video>")
    assert TOKENIZER.size == INNER.get_vocab_size()


def _edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(INNER.to_str()), **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"not json",
        b"\xff\xfe\x00",
        INNER.to_str().encode()[:-50],
        INNER.to_str().encode()[:100],
        _edited(model=None),
        _edited(model={"type": "Soup", "vocab": {}}),
        _edited(pre_tokenizer={"type": "Python", "code": "print(1)"}),
        _edited(added_tokens=[], model={"type": "BPE", "vocab": {}, "merges": []}),
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_one_sentence(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer(data)
    assert "\n" not in str(caught.value)
