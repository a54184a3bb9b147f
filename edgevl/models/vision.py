"""The RADIO vision tower, pixel shuffle and projector, once, for every implementation of `Ops`.

Source: the model's card and NVlabs RADIO (ViT with class tokens and registers in front, no final norm, exact GELU),
as recorded in ARCHITECTURE.md under "The model". Tiles are independent of each other.
"""

from __future__ import annotations

from edgevl.config import ProjectorConfig, VisionConfig
from edgevl.ops import Ops, X


def vision_tower(ops: Ops[X], config: VisionConfig, pixels: X) -> X:
    """Tiles (n, S, S, 3) uint8 -> features of all tokens (n·(R+P), C), prefix still in front of each tile."""
    x = ops.patches(pixels, config.patch_size, config.norm_mean, config.norm_std)
    x = ops.linear(x, ops.linear_weight("vision.patch"))
    x = ops.vision_tokens(x, ops.table("vision.positions"), ops.table("vision.prefix"))
    tokens = config.prefix_tokens + config.patches
    for i in range(config.layers):
        block = f"vision.blocks.{i}"
        h = ops.layer_norm(x, ops.norm_weight(f"{block}.norm1"), config.norm_eps)
        h = ops.full_attention(ops.linear(h, ops.linear_weight(f"{block}.qkv")), config.heads, tokens)
        x = ops.linear(h, ops.linear_weight(f"{block}.proj"), residual=x)
        h = ops.layer_norm(x, ops.norm_weight(f"{block}.norm2"), config.norm_eps)
        h = ops.linear(h, ops.linear_weight(f"{block}.fc1"), activation="gelu")
        x = ops.linear(h, ops.linear_weight(f"{block}.fc2"), residual=x)
    return x


def image_embeddings(ops: Ops[X], vision: VisionConfig, projector: ProjectorConfig, pixels: X) -> X:
    """Tiles (n, S, S, 3) uint8 -> (n·P/4, hidden size of the language model)."""
    x = vision_tower(ops, vision, pixels)
    x = ops.pixel_shuffle(x, vision.grid, vision.prefix_tokens)
    x = ops.layer_norm(x, ops.norm_weight("projector.norm"), projector.norm_eps)
    x = ops.linear(x, ops.linear_weight("projector.fc1"), activation="gelu")
    return ops.linear(x, ops.linear_weight("projector.fc2"))
