"""An opened checkpoint: what the model is, and its tensors one at a time.

Opening reads headers and small JSON files; tensors are mapped or converted when asked for. Knows nothing of what is
done with them: `parts` joins them for the model, the quantizer copies and replaces them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgevl.checkpoint.quantization import Quantization
from edgevl.checkpoint.store import Array, TensorStore
from edgevl.checkpoint.tokens import TokenizerFacts, chat_template
from edgevl.config import ModelConfig
from edgevl.errors import CheckpointError
from edgevl.safetensors_file import TensorSpec

TOKENIZER = "tokenizer.json"
CONFIG = "config.json"


class Checkpoint:
    """A checkpoint whose every promise was checked. Made by `open_checkpoint`.

    Tensor names are Hugging Face's, those of the language model without the `language_model.` of a vision-language
    checkpoint, as `edgevl.models.names` spells them.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        quantization: Quantization | None,
        store: TensorStore,
        names: Mapping[str, str],
        files: Mapping[str, bytes],
        facts: TokenizerFacts,
        notes: Sequence[str],
    ) -> None:
        self.path = path
        self.config = config
        self.quantization = quantization
        self.notes = tuple(notes)  # sentences worth telling the user, never printed here
        self._store = store
        self._names = dict(names)  # canonical -> stored
        self._files = dict(files)
        self._facts = facts
        self._specs = {spec.name: spec for spec in store.specs()}
        sha = hashlib.sha256(self._files[CONFIG])
        sha.update(store.digest().encode())
        self.digest = sha.hexdigest()

    def names(self) -> list[str]:
        """Canonical names of all tensors, in file order."""
        return list(self._names)

    def has(self, name: str) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        """Stored name, dtype ("F32", "F16", "BF16", "I32", …) and shape, from the header."""
        return self._specs[self.stored_name(name)]

    def stored_name(self, name: str) -> str:
        """The tensor's name in the file, which a rewritten checkpoint must keep."""
        if name not in self._names:
            raise CheckpointError(f"{self.path} holds no tensor named {name}")
        return self._names[name]

    def array(self, name: str) -> Array:
        """The whole tensor: f32 and f16 as read-only mapped views, bf16 converted to f32 in memory."""
        return self._store.array(self.stored_name(name), 0, None)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows start..stop of a tensor, converted like `array`: for tables too large to convert whole."""
        return self._store.array(self.stored_name(name), start, stop)

    def raw(self, name: str) -> tuple[str, Array]:
        """(dtype, array) as stored, bf16 as uint16 bits: what `write_safetensors` copies without change."""
        stored = self.stored_name(name)
        return self._specs[stored].dtype, self._store.raw(stored)

    def release(self) -> None:
        """Give back the memory of the mapped tensors that were read; they are read again when they are needed."""
        self._store.release()

    @property
    def config_json(self) -> dict[str, Any]:
        """A copy of config.json, for a checkpoint derived from this one."""
        data: dict[str, Any] = json.loads(self._files[CONFIG])
        return data

    def tokenizer_json(self) -> bytes:
        """tokenizer.json as it is."""
        return self._files[TOKENIZER]

    def token_id(self, token: str) -> int:
        """The id of an added token such as "<ref>"; `CheckpointError` if it is not a single one."""
        return self._facts.single_id(token)

    def chat_template(self) -> str:
        """The Jinja chat template, self-contained: it sets bos_token and eos_token itself where it uses them."""
        tokenizer_config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        return chat_template(tokenizer_config, self._files, self._facts)

    def extra_files(self) -> dict[str, bytes]:
        """The small files besides config.json and tokenizer.json that a derived checkpoint carries along, by name."""
        return {name: data for name, data in self._files.items() if name not in (CONFIG, TOKENIZER)}
