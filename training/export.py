"""What ships: float16 tensors in one file, under the names that `edgevl.demo` assembles from; and back again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgevl.errors import UsageError
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, write_safetensors
from training.network import Eyes, Reader


def export(path: Path, eyes: Eyes, reader: Reader) -> None:
    """Write tower, projector, image token rows and the language model's updates."""
    tensors = {name: p.detach() for name, p in eyes.tensors().items()}
    # the heads are no part of the model: with them, training can go on from this file
    tensors |= {name: p.detach() for name, p in eyes.named_parameters() if "_head" in name}
    tensors["image_token_rows"] = reader.image_token_rows.detach()
    for name, (a, b) in reader.updates().items():
        tensors[f"{name}.a"], tensors[f"{name}.b"] = a.detach(), b.detach()
    arrays = {name: t.float().cpu().numpy().astype(np.float16) for name, t in tensors.items()}
    specs = [TensorSpec(name, "F16", array.shape) for name, array in arrays.items()]
    write_safetensors(path, specs, iter(arrays.items()), {"licence": "Apache-2.0"})


def restore(path: Path, eyes: Eyes, reader: Reader | None) -> None:
    """Put what `export` wrote back, to go on from it.

    Raises `UsageError` for a file of another recipe.
    """
    file = SafetensorsFile(path)
    targets = eyes.tensors() | {name: p for name, p in eyes.named_parameters() if "_head" in name}
    if reader is not None:
        targets["image_token_rows"] = reader.image_token_rows
        for name, (a, b) in reader.updates().items():
            targets[f"{name}.a"], targets[f"{name}.b"] = a, b
    for name, target in targets.items():
        if file.spec(name).shape != tuple(target.shape):
            raise UsageError(
                f"{path} holds {name} of shape {file.spec(name).shape}; this recipe has {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(torch.from_numpy(file.array(name).astype(np.float32)))
