"""Llama_Nemotron_Nano_VL: everything its config.json and tensor headers promise, asserted before anything is computed.

Sizes come from the headers and are held against the config; whatever would change the maths in a way that the vision
tower here does not compute (layer scale, adaptors, a final norm, the transposed pixel shuffle) is refused. No code that
a checkpoint names (`auto_map`) is looked at. Sources: the model's public files and NVlabs RADIO, see ARCHITECTURE.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.preprocessor import Affine, effective_normalisation, read_tiling, triple
from edgevl.checkpoint.settings import Settings
from edgevl.checkpoint.shapes import square_side
from edgevl.checkpoint.tokens import TokenizerFacts
from edgevl.config import ProjectorConfig, TextConfig, TilingConfig, TokenConfig, VisionConfig
from edgevl.errors import CheckpointError
from edgevl.safetensors_file import TensorSpec

ARCHITECTURE = "Llama_Nemotron_Nano_VL"
TEXT_PREFIX = "language_model."
OPTIONAL = ("vision_model.radio_model.summary_idxs", "vision_model.radio_model.input_conditioner.")

_RADIO = "vision_model.radio_model"
_TOWER = f"{_RADIO}.model"
# timm's vision transformers: (width, heads, depth); `args.model_kwargs` may override each
_TIMM = {
    "vit_tiny": (192, 3, 12),
    "vit_small": (384, 6, 12),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 16, 24),
    "vit_huge": (1280, 16, 32),
}
_KWARGS = {"embed_dim", "num_heads", "depth", "weight_init"}
_USABLE_CONTEXT = 16384  # tokens in and out, what the 8B was trained for


def vision_configs(
    config: Settings,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], NDArray[Any]],
    processor: Settings,
    align_corners: bool,
    notes: list[str],
) -> tuple[VisionConfig, ProjectorConfig, TilingConfig]:
    """The tower, the projector and the tiling. `specs` by canonical name; `read` gives small tensors.

    Raises `CheckpointError` naming file, key, value and what was expected.
    """
    patch = config.whole("patch_size", 16)
    if patch not in (8, 16):
        raise config.fail("patch_size", "only 8 and 16 are supported")
    config.expect("downsample_ratio", 0.5, default=0.5)
    config.expect("ps_version", "v2", default="v1")
    config.expect("image_tag_type", "internvl", default="internvl")
    tile = config.whole("force_image_size")
    tower = config.child("vision_config")
    tower.expect("patch_size", patch, default=patch)
    tower.expect_empty(
        *("adaptor_names", "adaptor_configs", "vitdet_window_size"),
        *("feature_normalizer_config", "inter_feature_normalizer_config"),
    )
    args = tower.child("args")
    args.expect_empty("model_norm", "adaptors", "spectral_reparam")
    width, _ = _matrix(specs, f"{_TOWER}.patch_generator.embedder.weight")
    heads = _heads(args, width, depth := _depth(specs))
    prefix, _ = _matrix(specs, f"{_TOWER}.patch_generator.cls_token.token")
    multiple = args.whole("register_multiple", 1)
    if prefix % multiple:
        raise args.fail("register_multiple", f"the checkpoint has {prefix} prefix tokens, which is no multiple of it")
    config.expect("vit_hidden_size", width, default=width)
    hidden, _ = _matrix(specs, "mlp1.1.weight")
    config.expect("projector_hidden_size", hidden, default=hidden)
    affine = effective_normalisation(processor, _conditioner(specs, read), notes)
    vision = VisionConfig(
        hidden_size=width,
        intermediate_size=_matrix(specs, f"{_TOWER}.blocks.0.mlp.fc1.weight")[0],
        layers=depth,
        heads=heads,
        patch_size=patch,
        tile_size=tile,
        prefix_tokens=prefix,
        position_grid=_position_grid(specs, args, patch),
        norm_mean=affine.mean,
        norm_std=affine.std,
        align_corners=align_corners,
    )
    return vision, ProjectorConfig(hidden), read_tiling(processor, tile)


def image_tokens(facts: TokenizerFacts, stop: tuple[int, ...]) -> TokenConfig:
    """Ids of <image>, <img> and </img>, each one token of the tokenizer."""
    return TokenConfig(
        size=facts.size,
        stop=stop,
        image=facts.single_id("<image>"),
        image_start=facts.single_id("<img>"),
        image_end=facts.single_id("</img>"),
    )


def is_eight_b(text: TextConfig) -> bool:
    """Whether the sizes are those of Llama-3.1-Nemotron-Nano-VL-8B-V1."""
    return text.hidden_size == 4096 and text.layers == 32


def check_eight_b(
    text: TextConfig,
    vision: VisionConfig,
    projector: ProjectorConfig,
    tokens: TokenConfig,
    facts: TokenizerFacts,
    specs: Mapping[str, TensorSpec],
) -> None:
    """Hold an 8B checkpoint against every number that is published of it; `CheckpointError` at the first difference."""
    published: list[tuple[str, object, object]] = [
        ("patch_size", vision.patch_size, 16),
        ("force_image_size", vision.tile_size, 512),
        ("llm_config.vocab_size", text.vocab_size, 128512),
        ("llm_config.intermediate_size", text.intermediate_size, 14336),
        ("llm_config.num_attention_heads", text.heads, 32),
        ("llm_config.num_key_value_heads", text.kv_heads, 8),
        ("llm_config head size", text.head_dim, 128),
        ("llm_config.rope_theta", text.rope_theta, 500000.0),
        ("llm_config.tie_word_embeddings", text.tied_embeddings, False),
        ("prefix tokens", vision.prefix_tokens, 8),
        ("side of the position table", vision.position_grid, 128),
        ("vision blocks", vision.layers, 32),
        ("vision width", vision.hidden_size, 1280),
        ("vision feed-forward width", vision.intermediate_size, 5120),
        ("vision heads", vision.heads, 16),
        ("mlp1.1.weight shape", specs["mlp1.1.weight"].shape, (projector.hidden_size, 5120)),
        ("projector width", projector.hidden_size, 4096),
        ("id of <image>", tokens.image, 128256),
        ("id of <img>", tokens.image_start, 128257),
        ("id of </img>", tokens.image_end, 128258),
        ("id of <|eot_id|>", facts.single_id("<|eot_id|>"), 128009),
    ]
    for name, found, expected in published:
        if found != expected:
            raise CheckpointError(f"{name} is {found}, but Llama-3.1-Nemotron-Nano-VL-8B-V1 has {expected}")
    if text.rope_scaling is None:
        raise CheckpointError("llm_config.rope_scaling is missing, but Llama-3.1-Nemotron-Nano-VL-8B-V1 has llama3's")


def usable_context(text: TextConfig, notes: list[str]) -> int:
    """The 8B's positions: its card promises 16,384 tokens even where the config allows more."""
    if text.max_positions > _USABLE_CONTEXT:
        notes.append(
            f"llm_config.max_position_embeddings is {text.max_positions}; the model was trained for {_USABLE_CONTEXT}"
        )
    return min(text.max_positions, _USABLE_CONTEXT)


def _heads(args: Settings, width: int, depth: int) -> int:
    name = args.data.get("model")
    base = name.split("_patch")[0] if isinstance(name, str) else ""
    if base not in _TIMM or not str(name).startswith(f"{base}_patch16"):
        raise args.fail("model", f"known are {', '.join(_TIMM)} with patch16")
    expected_width, heads, expected_depth = _TIMM[base]
    if args.data.get("model_kwargs"):
        kwargs = args.child("model_kwargs")
        unknown = sorted(set(kwargs.data) - _KWARGS)
        if unknown:
            raise kwargs.fail(unknown[0], f"only {', '.join(sorted(_KWARGS))} are supported")
        expected_width = kwargs.whole("embed_dim", expected_width)
        heads = kwargs.whole("num_heads", heads)
        expected_depth = kwargs.whole("depth", expected_depth)
    if width != expected_width:
        raise args.fail("model", f"that is {expected_width} wide, but the patch embedding has {width} rows")
    if depth != expected_depth:
        raise args.fail("model", f"that has {expected_depth} blocks, but the checkpoint has {depth}")
    return heads


def _depth(specs: Mapping[str, TensorSpec]) -> int:
    """Blocks counted in the headers; they must be numbered 0, 1, 2, …"""
    pattern = re.compile(re.escape(f"{_TOWER}.blocks.") + r"(\d{1,4})\.")
    found = {int(match[1]) for name in specs if (match := pattern.match(name))}
    if not found or found != set(range(len(found))):
        raise CheckpointError(f"the vision blocks {sorted(found)[:8]} are not numbered from 0 without a gap")
    return len(found)


def _position_grid(specs: Mapping[str, TensorSpec], args: Settings, patch: int) -> int:
    name = f"{_TOWER}.patch_generator.pos_embed"
    shape = specs[name].shape if name in specs else ()
    side = square_side(shape[1]) if len(shape) == 3 and shape[0] == 1 else None
    if not side:
        raise CheckpointError(f"the tensor {name} has the shape {list(shape)}; [1, side², width] is needed")
    size = args.whole("cpe_max_size", side * patch)
    if size != side * patch:
        raise args.fail("cpe_max_size", f"the stored position table is {side}x{side} patches of {patch}")
    return side


def _conditioner(specs: Mapping[str, TensorSpec], read: Callable[[str], NDArray[Any]]) -> Affine | None:
    """The tower's stored normalisation, or None."""
    values = []
    for key in ("norm_mean", "norm_std"):
        name = f"{_RADIO}.input_conditioner.{key}"
        if name not in specs:
            return None
        if specs[name].shape not in ((3, 1, 1), (3,), (1, 3, 1, 1)):
            raise CheckpointError(f"the tensor {name} has the shape {list(specs[name].shape)}; [3, 1, 1] is needed")
        values.append(np.asarray(read(name), np.float64).reshape(3))
    mean, std = values
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{_RADIO}.input_conditioner holds mean {mean} and std {std}; the std must be above zero")
    return Affine(triple(mean.tolist()), triple(std.tolist()))


def _matrix(specs: Mapping[str, TensorSpec], name: str) -> tuple[int, int]:
    if name not in specs:
        raise CheckpointError(f"the tensor {name} is missing; the checkpoint is incomplete")
    shape = specs[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"the tensor {name} has the shape {list(shape)}; a matrix is needed")
    return shape[0], shape[1]
