"""A GGUF file's byte-level BPE tokenizer as tokenizer.json and tokenizer_config.json.

GGUF stores tokens, merges and the *name* of the rule that splits text into words; each known name is spelled out here
as the tokenizers library's own components. An unknown name is refused: a wrong split gives a model that half works.
"""

from __future__ import annotations

import json
from typing import Any

from edgevl.errors import CheckpointError

_CONTROL, _USER = 3, 4  # token types of GGUF; 1 is normal, 5 unused, 6 a byte

# the words of GPT-2's and of Llama 3's tokenizers
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(meta: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json from GGUF metadata; `CheckpointError` if they cannot be exact."""
    kind = meta.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r}; only gpt2 (byte-level BPE) is read")
    tokens, merges = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.merges")
    types = meta.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError("tokenizer.ggml.tokens and tokenizer.ggml.merges must both be there")
    if types is None:
        types = [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml has {len(tokens)} tokens but {len(types)} token types")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds a token twice")
    pre, ignore_merges = _pre_tokenizer(meta.get("tokenizer.ggml.pre", "default"))
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(i, token, special=types[i] == _CONTROL)
            for i, token in enumerate(tokens)
            if types[i] in (_CONTROL, _USER)
        ],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": [_merge(merge) for merge in merges],
        },
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key in ("bos", "eos"):
        value = meta.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if not 0 <= int(value) < len(tokens):
                raise CheckpointError(f"tokenizer.ggml.{key}_token_id is {value}, but there are {len(tokens)} tokens")
            config[f"{key}_token"] = tokens[int(value)]
    if isinstance(template := meta.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(tree, ensure_ascii=False).encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode("utf-8"),
    }


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """One entry of tokenizer.json's added_tokens: a token that text is never split across."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


def _pre_tokenizer(name: object) -> tuple[dict[str, Any], bool]:
    """The word splitter of that name, and whether whole words found in the vocabulary skip the merges."""
    if name in ("smollm", "starcoder", "refact", "command-r"):
        return _sequence({"type": "Digits", "individual_digits": True}, _bytes(True)), False
    if name in ("gpt-2", "gpt2"):
        return _bytes(True), False
    if name in ("llama-bpe", "llama3", "llama-v3"):
        return _sequence(_split(_LLAMA3_WORDS), _bytes(False)), True
    if name == "default":
        punctuation = r"[\p{P}\$\+<=>\^~\|]+"
        rules = (punctuation, _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")
        return _sequence(*(_split(rule) for rule in rules), _bytes(False)), False
    raise CheckpointError(
        f"tokenizer.ggml.pre is {name!r}; known are smollm, gpt-2, llama-bpe and default. Use the original checkpoint"
    )


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _merge(merge: object) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else []
    if len(pair) != 2:
        raise CheckpointError(f"tokenizer.ggml.merges holds {merge!r}; two pieces with a space between are needed")
    return pair
