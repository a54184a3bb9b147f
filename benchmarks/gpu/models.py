"""Models of random weights at true shapes, in the layout of GPU bundles: the 8B, and a tiny one of the same make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import cubins
from edgevl.backends.cuda_kernels import Kernel
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.backends.cuda_program import Cubins
from edgevl.config import (
    ModelConfig,
    ProjectorConfig,
    RopeScaling,
    TextConfig,
    TilingConfig,
    TokenConfig,
    VisionConfig,
)
from edgevl.layouts import StoredWeight, int4_shapes, int8_shapes
from edgevl.memory import max_counts
from edgevl.models.names import Part, all_parts
from edgevl.recorder import record_model
from edgevl.runner import Limits

Weights = Callable[[str], StoredWeight]
RandomLinear = Callable[[Part, np.random.Generator], tuple[str, dict[str, NDArray[Any]]]]  # kind, arrays
_DISTINCT = 1_000_003  # random numbers of a table; larger ones repeat them

_HALF = (0.5, 0.5, 0.5)
_SPREAD = 4.6  # standard deviation of codes 0..15 around 8


def eight_b() -> ModelConfig:
    """Llama-3.1-Nemotron-Nano-VL-8B-V1 in numbers."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    text = TextConfig(4096, 14336, 32, 32, 8, 128, 128512, 1e-5, 5e5, scaling, 16384, False, False)
    vision = VisionConfig(1280, 5120, 32, 16, 16, 512, 8, 128, _HALF, _HALF)
    tokens = TokenConfig(128265, (128009,), 128256)
    return ModelConfig("Llama_Nemotron_Nano_VL", text, tokens, vision, ProjectorConfig(4096), TilingConfig())


def tiny() -> ModelConfig:
    """The same make, for comparing answers."""
    text = TextConfig(128, 256, 2, 2, 1, 64, 320, 1e-5, 1e4, None, 1024, False, False)
    vision = VisionConfig(64, 128, 2, 2, 8, 32, 8, 8, _HALF, _HALF)
    return ModelConfig(
        "Llama_Nemotron_Nano_VL", text, TokenConfig(302, (289,), 293), vision, ProjectorConfig(64), TilingConfig(4)
    )


def random_weights(config: ModelConfig, seed: int = 0, linear: RandomLinear | None = None) -> Weights:
    """Weights by name: embedding and patches in f16, linears as `linear` makes them.

    By default that is the layout of GPU bundles: the decoder in int4 by groups of 128, the tower in int8.
    """
    parts = {part.name: part for part in all_parts(config)}
    random = np.random.default_rng(seed)
    return cache(lambda name: _weight(parts[name], random, linear or _tiles))


def _weight(part: Part, random: np.random.Generator, linear: RandomLinear) -> StoredWeight:
    bias = np.zeros(part.shape[0], np.float32) if part.bias else None
    if part.kind == "norm":
        return StoredWeight("f32", part.shape, {"values": np.ones(part.shape, np.float32)}, bias)
    if part.kind == "table" or part.name == "vision.patch":
        values = np.resize(random.standard_normal(min(math.prod(part.shape), _DISTINCT), np.float32), part.shape)
        if part.name.startswith("vision.p") and part.name != "vision.patch":
            return StoredWeight("f32", part.shape, {"values": values}, bias)
        return StoredWeight("f16", part.shape, {"values": (values * 0.05).astype(np.float16)}, bias)
    kind, arrays = linear(part, random)
    return StoredWeight(kind, part.shape, arrays, bias)


def _tiles(part: Part, random: np.random.Generator) -> tuple[str, dict[str, NDArray[Any]]]:
    n, k = part.shape
    if part.region in ("vision", "projector"):
        shapes = int8_shapes(n, k, "tiles")
        codes = random.integers(-127, 128, shapes["codes"][1], np.int8)
        return "int8", {"codes": codes, "scales": np.full(shapes["scales"][1], 1 / (73 * k**0.5), np.float32)}
    shapes = int4_shapes(n, k, 128, "tiles")
    arrays: dict[str, NDArray[Any]] = {
        "codes": np.frombuffer(random.bytes(int(np.prod(shapes["codes"][1]))), np.uint8).reshape(shapes["codes"][1]),
        "scales": np.full(shapes["scales"][1], 8, np.float16),
    }
    arrays["scales"][..., 0] = 1 / (_SPREAD * k**0.5)
    return "int4", arrays


def compiled(config: ModelConfig, weights: Weights, limits: Limits, architecture: str) -> Cubins:
    """Every kernel that the model needs, compiled here (or found in the cache)."""

    def form(name: str) -> Form:
        stored = weights(name)
        return Form(stored.kind, stored.group_size)

    lowered = lower(record_model(config), config.text, limits, form, config.tokens.size)
    return cubins_of(lowered.kernels(max_counts(limits)), architecture)


def cubins_of(kernels: Mapping[str, Kernel], architecture: str) -> Cubins:
    """Kernels compiled here (or found in the cache), as a bundle would hold them."""
    made = cubins.compile_kernels(kernels, architecture)
    files = {record.file: cubin for record, cubin in made.values()}
    return Cubins({key: record for key, (record, _) in made.items()}, files.__getitem__)
