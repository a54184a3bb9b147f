"""The vision tower against an independent one: timm's blocks, torch's convolution and interpolation, facts about RADIO.

What the independent path takes from elsewhere: patch embedding as a stride-16 convolution, the position rule as torch's
own bilinear interpolation of the stored table, prefix tokens in front, exact GELU, no final norm, and pixel shuffle by
the two transpositions that InternVL's version 2 describes (halve the width, swap, halve the height, swap back).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgevl.backends.cpu import run_graph
from edgevl.backends.reference import ReferenceRunner
from edgevl.config import ModelConfig, ProjectorConfig, TextConfig, TilingConfig, TokenConfig, VisionConfig
from edgevl.layouts import StoredWeight, pack
from edgevl.models.names import vision_parts
from edgevl.recorder import record_vision
from edgevl.runner import Limits
from edgevl.weights import FloatWeight
from timm_block import timm_block

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT = TextConfig(48, 64, 1, 2, 1, 24, 70, 1e-5, 1e4, None, 128, False, False)


def model(tile: int, width: int, heads: int, layers: int) -> ModelConfig:
    vision = VisionConfig(width, 4 * width, layers, heads, 16, tile, 8, 16, MEAN, STD)
    return ModelConfig(
        "Llama_Nemotron_Nano_VL", TEXT, TokenConfig(70, (1,), 2, 3, 4), vision, ProjectorConfig(96), TilingConfig()
    )


def stored_table(config: ModelConfig) -> torch.Tensor:
    """The checkpoint's position table (1, C, 16, 16)."""
    assert config.vision is not None
    return torch.randn(1, config.vision.hidden_size, 16, 16, generator=torch.Generator().manual_seed(9)) * 0.2


def random_weights(config: ModelConfig) -> dict[str, StoredWeight]:
    rng = np.random.default_rng(0)
    assert config.vision is not None
    weights = {}
    for part in vision_parts(config):
        values = (rng.standard_normal(part.shape) / np.sqrt(part.shape[-1])).astype(np.float32)
        if part.kind == "norm":
            values = (1 + 0.1 * values * np.sqrt(part.shape[-1])).astype(np.float32)
        if part.name == "vision.positions":
            side = config.vision.grid
            table = torch.nn.functional.interpolate(
                stored_table(config), size=(side, side), mode="bilinear", align_corners=False
            )
            values = table[0].permute(1, 2, 0).reshape(part.shape).numpy()
        bias = (0.1 * rng.standard_normal(part.shape[0])).astype(np.float32) if part.bias else None
        weights[part.name] = pack(FloatWeight(values), bias)
    return weights


def independent(
    config: ModelConfig, weights: dict[str, StoredWeight], pixels: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features after the blocks (n, P, C) and the projector's output (n, P/4, hidden), in f32 torch."""
    v = config.vision
    assert v is not None

    def t(name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(weights[name].arrays["values"]))

    def b(name: str) -> torch.Tensor:
        bias = weights[name].bias
        assert bias is not None
        return torch.from_numpy(bias)

    block_class = timm_block()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    kernel = t("vision.patch").reshape(v.hidden_size, 3, 16, 16)
    x = torch.nn.functional.conv2d(x, kernel, stride=16)
    side = v.grid
    x = x + torch.nn.functional.interpolate(
        stored_table(config), size=(side, side), mode="bilinear", align_corners=False
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([t("vision.prefix").expand(len(x), -1, -1), x], dim=1)
    for i in range(v.layers):
        block = block_class(v.hidden_size, v.heads, mlp_ratio=4.0, qkv_bias=True).eval()
        own = f"vision.blocks.{i}"
        names = {
            "norm1": "norm1",
            "attn.qkv": "qkv",
            "attn.proj": "proj",
            "norm2": "norm2",
            "mlp.fc1": "fc1",
            "mlp.fc2": "fc2",
        }
        state = {f"{theirs}.weight": t(f"{own}.{ours}") for theirs, ours in names.items()}
        state |= {f"{theirs}.bias": b(f"{own}.{ours}") for theirs, ours in names.items()}
        block.load_state_dict(state)
        x = block(x)
    features = x[:, v.prefix_tokens :]
    y = features.reshape(len(x), side, side // 2, 2 * v.hidden_size).permute(0, 2, 1, 3)
    y = y.reshape(len(x), side // 2, side // 2, 4 * v.hidden_size).permute(0, 2, 1, 3)
    y = y.reshape(len(x), -1, 4 * v.hidden_size)
    y = torch.nn.functional.layer_norm(y, y.shape[-1:], t("projector.norm"), b("projector.norm"), 1e-5)
    y = torch.nn.functional.gelu(torch.nn.functional.linear(y, t("projector.fc1"), b("projector.fc1")))
    return features, torch.nn.functional.linear(y, t("projector.fc2"), b("projector.fc2"))


@pytest.mark.parametrize(("tile", "width", "heads", "layers"), [(64, 32, 2, 3), (96, 48, 3, 2), (256, 80, 1, 2)])
def test_tower_and_projector_match_timm(tile: int, width: int, heads: int, layers: int) -> None:
    config = model(tile, width, heads, layers)
    weights = random_weights(config)
    pixels = np.random.default_rng(1).integers(0, 256, (2, tile, tile, 3)).astype(np.uint8)
    with torch.no_grad():
        wanted = independent(config, weights, pixels)[1].reshape(-1, TEXT.hidden_size).numpy()
    limits = Limits(context=128, tiles=2, kv="f32")
    reference = ReferenceRunner(config, limits, weights.__getitem__).vision(pixels)
    cpu = run_graph(record_vision(config), {"tiles": 2}, {"pixels": pixels}, weights.__getitem__, None, limits, None, 2)
    for name, found in (("reference", reference), ("cpu", cpu)):
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error <= 1e-4, f"{name}: relative error {error:.2e}"
