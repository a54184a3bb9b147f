"""What a checkpoint's tokenizer files say: real size, special tokens, stop ids, chat template.

Reads JSON only; tokenization itself is `edgevl.tokenizer`'s. Called while a checkpoint is opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from edgevl.errors import CheckpointError
from edgevl.prompt import LLAMA3_TEMPLATE

# ends of a turn or a text in the families that are read; whichever the tokenizer has as control tokens are stop ids
_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class TokenizerFacts:
    """`size` counts real entries (highest id + 1); `added` are the tokens that never split."""

    size: int
    added: dict[str, int]
    special: frozenset[str] = field(default_factory=frozenset)

    def single_id(self, token: str) -> int:
        """The id of a token that must exist as one."""
        if token not in self.added:
            raise CheckpointError(f"tokenizer.json has no single token {token}; this is not the model's own tokenizer")
        return self.added[token]


def read_tokenizer(data: bytes) -> TokenizerFacts:
    """Facts of a tokenizer.json."""
    try:
        tree = json.loads(data)
        vocab = tree["model"]["vocab"]
        ids = [i for i in (vocab.values() if isinstance(vocab, dict) else range(len(vocab))) if type(i) is int]
        added: dict[str, int] = {}
        special: set[str] = set()
        for token in tree.get("added_tokens") or []:
            content, index = token["content"], token["id"]
            if type(index) is not int or type(content) is not str or not 0 <= index < 1 << 31:
                raise ValueError(f"the added token {content!r} has the id {index!r}")
            if content in added and added[content] != index:
                raise ValueError(f"the added token {content!r} has two ids")
            added[content] = index
            if token.get("special"):
                special.add(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"tokenizer.json is not a tokenizers file ({problem!r:.200})") from problem
    size = max([*ids, *added.values()], default=-1) + 1
    if size == 0:
        raise CheckpointError("tokenizer.json has no tokens")
    return TokenizerFacts(size, added, frozenset(special))


def stop_ids(facts: TokenizerFacts, configs: list[dict[str, Any]], eos_token: str | None) -> tuple[int, ...]:
    """Every id that ends a generation: `eos_token_id` of the configs, `eos_token`, and the families' known ends."""
    ids: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            if type(one) is not int or not 0 <= one < facts.size:
                raise CheckpointError(f"eos_token_id is {one!r}, but the tokenizer's ids are 0..{facts.size - 1}")
            ids.add(one)
    if eos_token is not None and eos_token in facts.added:
        ids.add(facts.added[eos_token])
    ids.update(facts.added[token] for token in _STOPS if token in facts.special)
    if not ids:
        raise CheckpointError("neither config.json nor the tokenizer names an end token (eos_token_id); add it")
    return tuple(sorted(ids))


def special_token(tokenizer_config: dict[str, Any], key: str) -> str | None:
    """bos_token or eos_token: a string, or an object with `content`."""
    value = tokenizer_config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def chat_template(tokenizer_config: dict[str, Any], files: dict[str, bytes], facts: TokenizerFacts) -> str:
    """The chat template as one self-contained Jinja text: bos_token and eos_token are set in it where it uses them.

    Looked up in chat_template.jinja, chat_template.json, tokenizer_config.json; without any, a tokenizer that has
    Llama-3's header tokens gets Llama-3's plain format. Raises `CheckpointError` when there is none.
    """
    template = _find_template(tokenizer_config, files)
    bos, eos = special_token(tokenizer_config, "bos_token"), special_token(tokenizer_config, "eos_token")
    if template is None and {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= set(facts.added):
        template = LLAMA3_TEMPLATE
    if template is None:
        raise CheckpointError("the checkpoint has no chat template; add chat_template.jinja to it")
    head = ""
    for name, value in (("bos_token", bos), ("eos_token", eos)):
        if name in template and f"set {name}" not in template:
            head += f"{{% set {name} = {json.dumps(value or '', ensure_ascii=False)} %}}"
    return head + template


def _find_template(tokenizer_config: dict[str, Any], files: dict[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    found: Any = tokenizer_config.get("chat_template")
    if "chat_template.json" in files:
        try:
            found = json.loads(files["chat_template.json"])["chat_template"]
        except (ValueError, KeyError, TypeError) as problem:
            raise CheckpointError(f"chat_template.json holds no chat_template ({problem!r})") from problem
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError("tokenizer_config.json: chat_template must be a text or a list with one named default")
    return found
