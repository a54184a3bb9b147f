"""What ships: float16 tensors in one file, under the names that `edgevl.demo` assembles from; and back again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgevl.errors import UsageError
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, write_safetensors
from training.network import Eyes, Reader
from training.writing import Writing


def export(path: Path, eyes: Eyes, reader: Reader, writing: Writing) -> None:
    """Write tower, projector, image token rows and the language model's updates; and what training goes on with."""
    tensors = {name: p.detach() for name, p in eyes.tensors().items()}
    # heads and codes are no part of the model: with them, training can go on from this file
    tensors |= {name: p.detach() for name, p in _beside(eyes, writing).items()}
    tensors["image_token_rows"] = reader.image_token_rows.detach()
    for name, (a, b) in reader.updates().items():
        tensors[f"{name}.a"], tensors[f"{name}.b"] = a.detach(), b.detach()
    arrays = {name: t.float().cpu().numpy().astype(np.float16) for name, t in tensors.items()}
    specs = [TensorSpec(name, "F16", array.shape) for name, array in arrays.items()]
    write_safetensors(path, specs, iter(arrays.items()), {"licence": "Apache-2.0"})


def restore(path: Path, eyes: Eyes, reader: Reader, writing: Writing) -> None:
    """Put what `export` wrote back, to go on from it.

    Raises `UsageError` for a file of another recipe.
    """
    file = SafetensorsFile(path)
    targets = {**eyes.tensors(), **_beside(eyes, writing), "image_token_rows": reader.image_token_rows}
    for name, (a, b) in reader.updates().items():
        targets[f"{name}.a"], targets[f"{name}.b"] = a, b
    for name, target in targets.items():
        shape = file.spec(name).shape if name in file.specs else None
        if shape != tuple(target.shape):
            raise UsageError(f"{path} holds {name} of shape {shape}; this recipe has {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(torch.from_numpy(file.array(name).astype(np.float32)))


def _beside(eyes: Eyes, writing: Writing) -> dict[str, nn.Parameter]:
    heads = {name: p for name, p in eyes.named_parameters() if "_head" in name}
    return heads | {f"writing.{name}": p for name, p in writing.named_parameters()}
