"""A run's folder: weights, optimizer and place, saved whole and never as pickle, so that a run can be stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgevl.errors import UsageError
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, write_safetensors
from training.optimizers import Optimizers


def save(
    folder: Path, stage: str, modules: list[nn.Module], optimizers: Optimizers | None, place: dict[str, Any]
) -> None:
    """Write `<stage>.safetensors` with everything that the stage needs to go on; `place` is JSON."""
    tensors = {f"{i}/{name}": p.detach() for i, module in enumerate(modules) for name, p in module.named_parameters()}
    state = {} if optimizers is None else optimizers.state()
    tensors |= {f"optimizer/{name}": value for name, value in state.items()}
    arrays = {name: t.float().cpu().numpy() for name, t in tensors.items()}
    specs = [TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{stage}.safetensors", specs, iter(arrays.items()), {"place": json.dumps(place)})


def load(
    folder: Path, stage: str, modules: list[nn.Module], optimizers: Optimizers | None = None
) -> dict[str, Any] | None:
    """Put back what `save` wrote and return its place; None when there is nothing to go on from.

    Raises `UsageError` when it was written by another recipe.
    """
    path = folder / f"{stage}.safetensors"
    if not path.is_file():
        return None
    file = SafetensorsFile(path)
    for i, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            value = file.array(f"{i}/{name}")
            if value.shape != tuple(parameter.shape):
                raise UsageError(
                    f"{path} holds {name} of shape {value.shape}, this recipe has {tuple(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.array(value)))
    if optimizers is not None:
        names = [name for name in file.specs if name.startswith("optimizer/")]
        optimizers.restore({n.removeprefix("optimizer/"): torch.from_numpy(np.array(file.array(n))) for n in names})
    return dict(json.loads(file.metadata["place"]))
