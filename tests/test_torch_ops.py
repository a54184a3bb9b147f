"""The torch ops: each op against its numpy twin, whole models against transformers and the reference, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from checkpoints import tiny_llama, tiny_vl
from edgevl.checkpoint import Checkpoint, open_checkpoint, part_weight
from edgevl.models.decoder import decoder
from edgevl.models.names import all_parts, text_parts
from edgevl.models.vision import image_embeddings
from edgevl.ops import Linear, Norm, Step
from edgevl.reference import ReferenceOps
from edgevl.weights import FloatWeight, dequantize
from quantize.part_tensors import CheckpointParts, JoinedTensors, to_torch
from quantize.torch_ops import TorchOps, _coarse_attention, batch_step


def no_weights(name: str) -> Any:
    raise AssertionError(name)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def same(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    gap = np.abs(found.numpy() - wanted).max() if wanted.size else 0.0
    assert gap <= tolerance * max(np.abs(wanted).max(), 1e-6), gap


@pytest.mark.parametrize("rows", [1, 2, 17, 33])
def test_row_ops_match_their_twins(rows: int) -> None:
    ops, twin = TorchOps(no_weights, rows), ReferenceOps(no_weights)
    x, w, b = normal(0, rows, 24), normal(1, 24), normal(2, 24)
    matrix, bias, residual = normal(3, 40, 24), normal(4, 40), normal(5, rows, 40)
    t = torch.from_numpy
    same(ops.rms_norm(t(x), Norm(t(w)), 1e-5), twin.rms_norm(x, Norm(w), 1e-5))
    same(ops.layer_norm(t(x), Norm(t(w), t(b)), 1e-5), twin.layer_norm(x, Norm(w, b), 1e-5))
    for activation in (None, "gelu"):
        wanted = twin.linear(x, Linear(FloatWeight(matrix), bias), activation, residual)
        same(ops.linear(t(x), Linear(t(matrix), t(bias)), activation, t(residual)), wanted)
    same(ops.silu_mul(t(30 * x)), twin.silu_mul(30 * x))
    picked = np.array([rows - 1, 0], np.int32)
    same(ops.gather_rows(t(x), t(picked)), twin.gather_rows(x, picked))
    tokens = np.arange(rows, dtype=np.int32) - 1  # the first is image row 0
    images = normal(6, 1, 24)
    same(ops.embed(t(tokens), t(normal(7, 40, 24)), t(images)), twin.embed(tokens, normal(7, 40, 24), images))


def test_vision_ops_match_their_twins() -> None:
    ops, twin = TorchOps(no_weights, 1), ReferenceOps(no_weights)
    t = torch.from_numpy
    pixels = np.random.RandomState(0).randint(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    same(ops.patches(t(pixels), 16, mean, std), twin.patches(pixels, 16, mean, std))
    x, positions, prefix = normal(0, 48, 32), normal(1, 16, 32), normal(2, 5, 32)
    same(ops.vision_tokens(t(x), t(positions), t(prefix)), twin.vision_tokens(x, positions, prefix))
    qkv = normal(3, 3 * 21, 96)
    same(ops.full_attention(t(qkv), 4, 21), twin.full_attention(qkv, 4, 21))
    same(ops.pixel_shuffle(t(normal(4, 63, 8)), 4, 5), twin.pixel_shuffle(normal(4, 63, 8), 4, 5))


def transformers_logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return logits


@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 1, "tied": True, "llama3_rope": False}, {"head_dim": 32}])
def test_logits_of_a_batch_equal_those_of_transformers(tmp_path: Path, sizes: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path / "m", **sizes))
    ids = np.random.RandomState(0).randint(0, 300, (3, 40))
    ops = TorchOps(CheckpointParts(checkpoint), 40)
    with torch.inference_mode():
        found = decoder(ops, checkpoint.config.text, batch_step(torch.from_numpy(ids)))
    same(found.reshape(3, 40, -1), transformers_logits(checkpoint, ids), 2e-3)


def test_a_picture_model_equals_the_reference(tmp_path: Path) -> None:
    """int4 weights, qkv biases, image rows: everything that the tiny checkpoint can have, against the numpy ops."""
    checkpoint = open_checkpoint(tiny_vl(tmp_path / "m", awq=True, qkv_bias=True))
    config = checkpoint.config
    assert config.vision is not None and config.projector is not None
    pixels = np.random.RandomState(1).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    # as floats, since the twin rounds what goes into int4 weights and torch does not
    stored = {part.name: part_weight(checkpoint, part) for part in all_parts(config)}
    parts = {name: (FloatWeight(dequantize(weight)), bias) for name, (weight, bias) in stored.items()}
    shape = (1, config.text.kv_heads, 16, config.text.head_dim)
    cache = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(config.text.layers)]
    twin, ops = ReferenceOps(lambda name: parts[name], cache), TorchOps(CheckpointParts(checkpoint), 16)
    images = image_embeddings(twin, config.vision, config.projector, pixels)
    with torch.inference_mode():
        rows = image_embeddings(ops, config.vision, config.projector, torch.from_numpy(pixels))
        same(rows, images, 1e-4)
        ids = np.array([5, -1, -2, -3, -4, 7, -5, -6, -7, -8, 9, 10, 11, 12, 13, 14], np.int32)
        found = decoder(ops, config.text, batch_step(torch.from_numpy(ids[None]), rows))
    places = np.arange(16, dtype=np.int32)
    wanted = decoder(twin, config.text, Step(ids, places, np.zeros(16, np.int32), images, places))
    same(found, wanted, 2e-4)


def test_gradients_reach_the_joined_sources(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path / "m"))
    tensors = {name: to_torch(checkpoint.array(name)).requires_grad_() for name in checkpoint.names()}
    ops = TorchOps(JoinedTensors(text_parts(checkpoint.config), tensors), 8)
    ids = torch.arange(16).reshape(2, 8)
    decoder(ops, checkpoint.config.text, batch_step(ids)).square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_coarse_attention_is_attention(kv_heads: int) -> None:
    """Values and gradients against torch's own in f32, to what bf16 leaves; later tokens are not looked at."""
    batch, heads, length, size = 2, 4, 37, 16
    rows = [normal(seed, batch, count, length, size) for seed, count in enumerate((heads, kv_heads, kv_heads))]
    ours, theirs = ([torch.from_numpy(row.copy()).requires_grad_() for row in rows] for _ in range(2))
    found = _coarse_attention(*ours)
    wanted = functional.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    (found.float() * wanted.detach()).sum().backward()
    (wanted * wanted.detach()).sum().backward()
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    for got, right in pairs:
        assert got is not None and right is not None
        assert (got.float() - right).square().mean().sqrt() < 0.02 * right.square().mean().sqrt()
    changed = [x.detach().clone() for x in ours]
    for x in changed:
        x[:, :, -1] += 5.0
    assert torch.equal(_coarse_attention(*changed)[:, :, :-1], found[:, :, :-1])
