"""What ships: float16 tensors in one file, under the names that `edgevl.demo` assembles from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgevl.safetensors_file import TensorSpec, write_safetensors
from training.network import Eyes, Reader


def export(path: Path, eyes: Eyes, reader: Reader) -> None:
    """Write tower, projector, image token rows and the language model's updates."""
    tensors = {name: p.detach() for name, p in eyes.tensors().items()}
    tensors["image_token_rows"] = eyes.image_token_rows.detach()
    for name, (a, b) in reader.updates().items():
        tensors[f"{name}.a"], tensors[f"{name}.b"] = a.detach(), b.detach()
    arrays = {name: t.float().cpu().numpy().astype(np.float16) for name, t in tensors.items()}
    specs = [TensorSpec(name, "F16", array.shape) for name, array in arrays.items()]
    write_safetensors(path, specs, iter(arrays.items()), {"licence": "Apache-2.0"})
