"""From calibration samples to the hidden states that enter the first decoder block.

Each picture goes through the vision tower once, tile by tile; its embeddings take the places of the negative ids. The
embedding table is read row by row, never as a whole. Called by `quantize.job` and `quantize.measure`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration import Sample
from edgevl.checkpoint import Checkpoint
from edgevl.models.names import Part, all_parts, tensor_names
from edgevl.models.vision import image_embeddings
from edgevl.safetensors_file import bf16_to_f32
from quantize.part_tensors import CheckpointParts, to_torch
from quantize.torch_ops import TorchOps

_TILES = 2  # in the vision tower at once


def embed_samples(
    checkpoint: Checkpoint, samples: list[Sample], device: str = "cpu", into: Tensor | None = None
) -> Tensor:
    """(B, S, C) f32 on the CPU for B samples of S tokens each, in `into` if that is given."""
    length = len(samples[0].token_ids)
    hidden = torch.empty(len(samples), length, checkpoint.config.text.hidden_size) if into is None else into
    parts = CheckpointParts(checkpoint, device)
    if any(sample.tiles is not None for sample in samples):
        parts.keep(("vision.", "projector."))
    for row, sample in zip(hidden, samples, strict=True):
        ids = np.asarray(sample.token_ids, np.int64)
        row.copy_(_token_rows(checkpoint, np.maximum(ids, 0)))
        if sample.tiles is not None:
            images = embed_tiles(checkpoint, parts, sample.tiles, device)
            places = torch.from_numpy(np.flatnonzero(ids < 0))
            row[places] = images[-1 - torch.from_numpy(ids)[places]]
    return hidden


def embed_tiles(checkpoint: Checkpoint, parts: CheckpointParts, tiles: NDArray[Any], device: str) -> Tensor:
    """Tiles (n, S, S, 3) uint8 -> (n·P/4, C) f32 on the CPU."""
    config = checkpoint.config
    assert config.vision is not None and config.projector is not None, "samples with tiles need a tower"
    ops = TorchOps(parts, 1)
    rows = []
    for begin in range(0, len(tiles), _TILES):
        pixels = torch.from_numpy(np.ascontiguousarray(tiles[begin : begin + _TILES])).to(device)
        rows.append(image_embeddings(ops, config.vision, config.projector, pixels).cpu())
    return torch.cat(rows)


def _token_rows(checkpoint: Checkpoint, ids: NDArray[Any]) -> Tensor:
    """Rows (S, C) f32 of the embedding table; only these rows are read and converted."""
    part: Part = next(p for p in all_parts(checkpoint.config) if p.name == "embed")
    dtype, table = checkpoint.raw(tensor_names(part)[0])
    rows = table[ids]
    return to_torch(bf16_to_f32(rows) if dtype == "BF16" else rows)
