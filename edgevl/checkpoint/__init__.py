"""Checkpoints in: Hugging Face folders, GGUF files, hub ids and the demo, opened cheaply and checked completely."""

from edgevl.checkpoint.checkpoint import Checkpoint
from edgevl.checkpoint.open import open_checkpoint
from edgevl.checkpoint.parts import part_weight
from edgevl.checkpoint.quantization import Quantization

__all__ = ["Checkpoint", "Quantization", "open_checkpoint", "part_weight"]
