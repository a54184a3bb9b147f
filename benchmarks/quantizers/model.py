"""What every quantizer is given: a plain Llama checkpoint, and the calibration tokens. And round to nearest itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import calibration
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.demo import find_gguf
from edgevl.prompt import PromptBuilder
from edgevl.safetensors_file import TensorSpec, write_safetensors
from edgevl.tokenizer import Tokenizer
from edgevl.weights import dequantize, quantize_int4


def write_model(source: str, folder: Path, layers: int | None) -> Checkpoint:
    """`source` ("demo": its language model) as an f32 `LlamaForCausalLM` in `folder`; the first `layers` blocks."""
    original = open_checkpoint(find_gguf() if source == "demo" else source)
    config = {**original.config_json, "torch_dtype": "float32"}
    config.pop("dtype", None)
    if layers is not None:
        config["num_hidden_layers"] = min(layers, original.config.text.layers)
    names = [name for name in original.names() if _layer(name) < config["num_hidden_layers"]]
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _write(original, names, folder, lambda _, values: values)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_bytes(original.tokenizer_json())
    for name, content in original.extra_files().items():
        (folder / name).write_bytes(content)
    return open_checkpoint(folder)


def write_rounded(original: Checkpoint, folder: Path, group_size: int, symmetric: bool) -> None:
    """Round to nearest: the same checkpoint with every decoder linear as int4 leaves it."""
    folder.mkdir(parents=True)

    def rounded(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return dequantize(quantize_int4(values, group_size, symmetric)) if name.endswith("_proj.weight") else values

    _write(original, original.names(), folder, rounded)
    copy_small_files(original.path, folder)


def copy_small_files(source: Path, folder: Path) -> None:
    """Everything of a checkpoint but its tensors."""
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)


def calibration_tokens(checkpoint: Checkpoint, name: str, samples: int, length: int, seed: int) -> list[list[int]]:
    """What `edgevl quantize --calibration NAME` would use, as plain token ids."""
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    prompts = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    made = calibration.load(name, tokenizer, prompts, checkpoint.config, samples, length, seed)
    return [list(sample.token_ids) for sample in made]


def _write(
    original: Checkpoint,
    names: list[str],
    folder: Path,
    change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    specs = [TensorSpec(name, "F32", original.spec(name).shape) for name in names]

    def tensors() -> Iterator[tuple[str, NDArray[Any]]]:
        for name in names:
            yield name, change(name, np.asarray(original.array(name), np.float32))

    write_safetensors(folder / "model.safetensors", specs, tensors(), {"format": "pt"})


def _layer(name: str) -> int:
    pieces = name.split(".")
    return int(pieces[pieces.index("layers") + 1]) if "layers" in pieces else -1
