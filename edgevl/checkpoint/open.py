"""From what the user typed to an opened checkpoint: a folder, a .gguf file, a Hugging Face id, or "demo"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.checkpoint import hub, nemotron_vl
from edgevl.checkpoint.checkpoint import CONFIG, TOKENIZER, Checkpoint
from edgevl.checkpoint.llama import text_config
from edgevl.checkpoint.quantization import read_quantization
from edgevl.checkpoint.settings import Settings
from edgevl.checkpoint.shapes import check_tensors
from edgevl.checkpoint.store import SafetensorsFolder, TensorStore, read_json
from edgevl.checkpoint.tokens import read_tokenizer, special_token, stop_ids
from edgevl.config import ModelConfig, TokenConfig
from edgevl.errors import CheckpointError, UsageError
from edgevl.safetensors_file import TensorSpec

_CARRIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_FILE_LIMIT = 256 << 20  # bytes; the real tokenizer.json is 17 MB
_LLAMA = "LlamaForCausalLM"


def open_checkpoint(model: str | Path, align_corners: bool = False) -> Checkpoint:
    """Open and check a checkpoint; reads headers and small files only.

    `model` is a folder in Hugging Face's layout, a Llama in a .gguf file, a hub id `org/name[@revision]`, or "demo".
    `align_corners` picks how the vision tower's positions are resized (upstream changed it once; False is current).
    Raises `CheckpointError` for anything that is missing or not as its architecture promises.
    """
    path = Path(model)
    # `make demo` leaves a folder of that name in the checkout; only one that is a checkpoint itself takes precedence
    if str(model) == "demo" and not (path / "config.json").exists():
        from edgevl.demo import demo_checkpoint

        path = demo_checkpoint()
    elif path.suffix == ".gguf":
        from edgevl.checkpoint.gguf_file import read_gguf

        store, files = read_gguf(path)
        return _assemble(path, store, files, align_corners)
    elif not path.exists():
        if not hub.is_hub_id(str(model)):
            raise CheckpointError(f"{model} does not exist; give a folder, a .gguf file, a Hugging Face id, or demo")
        path = hub.fetch(str(model))
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is the folder that holds config.json, or a .gguf file")
    files = _read_files(path)
    return _assemble(path, SafetensorsFolder(path), files, align_corners)


def _read_files(folder: Path) -> dict[str, bytes]:
    files = {}
    for name in (CONFIG, TOKENIZER, *_CARRIED):
        path = folder / name
        if path.is_file():
            if path.stat().st_size > _FILE_LIMIT:
                raise CheckpointError(f"{path} is {path.stat().st_size} bytes; {_FILE_LIMIT} is the limit")
            files[name] = path.read_bytes()
    for name in (CONFIG, TOKENIZER):
        if name not in files:
            raise CheckpointError(f"{folder} has no {name}; a checkpoint needs it beside its safetensors files")
    for name in files:
        if name.endswith(".json") and name != TOKENIZER:
            read_json(folder / name)  # refuse damaged JSON here, with the file's name
    return files


def _assemble(path: Path, store: TensorStore, files: Mapping[str, bytes], align_corners: bool) -> Checkpoint:
    try:
        return _checked(path, store, files, align_corners)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except UsageError as error:  # a config class refused a number
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def _checked(path: Path, store: TensorStore, files: Mapping[str, bytes], align_corners: bool) -> Checkpoint:
    config = Settings(_parse(files, CONFIG), CONFIG)
    architecture = _architecture(config)
    vl = architecture == nemotron_vl.ARCHITECTURE
    names, specs = _canonical(store, nemotron_vl.TEXT_PREFIX if vl else "")
    notes: list[str] = []
    facts = read_tokenizer(files[TOKENIZER])
    tokenizer_config, generation = _parse(files, "tokenizer_config.json"), _parse(files, "generation_config.json")
    llm = config.child("llm_config") if vl else config
    stop = stop_ids(facts, [generation, config.data, llm.data], special_token(tokenizer_config, "eos_token"))
    text = text_config(llm, set(specs))
    symmetric = _all_eights(store, names)
    quantization = read_quantization(config.data, symmetric)
    if vl:
        processor = Settings(_parse(files, "preprocessor_config.json"), "preprocessor_config.json")
        vision, projector, tiling = nemotron_vl.vision_configs(
            config, specs, lambda name: store.array(names[name], 0, None), processor, align_corners, notes
        )
        tokens = nemotron_vl.image_tokens(facts, stop)
        if nemotron_vl.is_eight_b(text):
            nemotron_vl.check_eight_b(text, vision, projector, tokens, facts, specs)
            text = replace(text, max_positions=nemotron_vl.usable_context(text, notes))
        model = ModelConfig(architecture, text, tokens, vision, projector, tiling)
    else:
        model = ModelConfig(architecture, text, TokenConfig(facts.size, stop))
    _drop_zero_biases(store, names, specs)
    check_tensors(specs, model, quantization, nemotron_vl.OPTIONAL if vl else ())
    return Checkpoint(path, model, quantization, store, names, files, facts, notes)


def _architecture(config: Settings) -> str:
    found = config.data.get("architectures")
    for name in (nemotron_vl.ARCHITECTURE, _LLAMA):
        if isinstance(found, list) and found and found[0] == name:
            return name
    raise config.fail("architectures", f"edgevl runs {nemotron_vl.ARCHITECTURE} and {_LLAMA}")


def _canonical(store: TensorStore, prefix: str) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """Stored names and specs by canonical name: without the language model's prefix."""
    names: dict[str, str] = {}
    specs: dict[str, TensorSpec] = {}
    for spec in store.specs():
        name = spec.name[len(prefix) :] if prefix and spec.name.startswith(prefix) else spec.name
        if name in names:
            raise CheckpointError(f"the tensors {names[name]} and {spec.name} stand for the same one")
        names[name], specs[name] = spec.name, spec
    return names, specs


def _all_eights(store: TensorStore, names: Mapping[str, str]) -> bool | None:
    """Whether the first quantized linear has only zero codes of 8, as a symmetric scheme writes them."""
    first = next((stored for name, stored in names.items() if name.endswith(".qzeros")), None)
    if first is None:
        return None
    words = store.raw(first)
    return words.dtype == np.int32 and bool((words.view(np.uint32) == 0x88888888).all())


def _drop_zero_biases(store: TensorStore, names: dict[str, str], specs: dict[str, TensorSpec]) -> None:
    """Llama's attention_bias adds one to o_proj too; all zero, it changes nothing and is left out."""
    for name in [n for n in names if n.endswith(".self_attn.o_proj.bias")]:
        if not np.any(store.array(names[name], 0, None)):
            del names[name], specs[name]


def _parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files.get(name, b"{}"))
    return data
