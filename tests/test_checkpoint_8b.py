"""The real model's sizes without its 17 GB: a sparse file with every true header opens, cheaply, and only unaltered.

Names and shapes are spelled out here from NVIDIA's published conversion scripts, not taken from `edgevl.models.names`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevl.checkpoint import open_checkpoint
from edgevl.errors import CheckpointError

Json = dict[str, Any]
_IMAGE_TOKENS = ["<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def shapes() -> dict[str, list[int]]:
    c, f, v = 4096, 14336, 1280
    radio = "vision_model.radio_model"
    out = {
        f"{radio}.input_conditioner.norm_mean": [3, 1, 1],
        f"{radio}.input_conditioner.norm_std": [3, 1, 1],
        "language_model.model.embed_tokens.weight": [128512, c],
        "language_model.lm_head.weight": [128512, c],
        "language_model.model.norm.weight": [c],
        f"{radio}.model.patch_generator.embedder.weight": [v, 768],
        f"{radio}.model.patch_generator.pos_embed": [1, 16384, v],
        f"{radio}.model.patch_generator.cls_token.token": [8, v],
        "mlp1.0.weight": [5120],
        "mlp1.0.bias": [5120],
        "mlp1.1.weight": [4096, 5120],
        "mlp1.1.bias": [4096],
        "mlp1.3.weight": [4096, 4096],
        "mlp1.3.bias": [4096],
    }
    for i in range(32):
        p = f"language_model.model.layers.{i}"
        for name, rows, columns in [
            ("self_attn.q_proj", c, c),
            ("self_attn.k_proj", 1024, c),
            ("self_attn.v_proj", 1024, c),
            ("self_attn.o_proj", c, c),
            ("mlp.gate_proj", f, c),
            ("mlp.up_proj", f, c),
            ("mlp.down_proj", c, f),
        ]:
            out[f"{p}.{name}.weight"] = [rows, columns]
        out |= {f"{p}.input_layernorm.weight": [c], f"{p}.post_attention_layernorm.weight": [c]}
        b = f"{radio}.model.blocks.{i}"
        for name, rows, columns in [
            ("attn.qkv", 3840, v),
            ("attn.proj", v, v),
            ("mlp.fc1", 5120, v),
            ("mlp.fc2", v, 5120),
        ]:
            out |= {f"{b}.{name}.weight": [rows, columns], f"{b}.{name}.bias": [rows]}
        for name in ("norm1", "norm2"):
            out |= {f"{b}.{name}.weight": [v], f"{b}.{name}.bias": [v]}
    return out


def config() -> Json:
    return {
        "architectures": ["Llama_Nemotron_Nano_VL"],
        "model_type": "Llama_Nemotron_Nano_VL",
        "auto_map": {"AutoModel": "modeling.Llama_Nemotron_Nano_VL"},
        "force_image_size": 512,
        "patch_size": 16,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "projector_hidden_size": 4096,
        "vit_hidden_size": 1280,
        "torch_dtype": "bfloat16",
        "llm_config": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128512,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "eos_token_id": 128009,
        },
        "vision_config": {
            "auto_map": {"AutoModel": "nvidia/C-RADIOv2-H--hf_model.RADIOModel"},
            "patch_size": 16,
            "max_resolution": 2048,
            "preferred_resolution": [768, 768],
            "args": {
                "model": "vit_huge_patch16_224",
                "cpe_max_size": 2048,
                "cls_token_per_teacher": True,
                "register_multiple": 8,
                "dtype": "bfloat16",
            },
        },
    }


def tokenizer() -> Json:
    special = [f"<|reserved_special_token_{i}|>" for i in range(256)] + _IMAGE_TOKENS
    special[0], special[1], special[9] = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    added = [{"id": 128000 + i, "content": token, "special": True} for i, token in enumerate(special)]
    return {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(128000)}, "merges": []}, "added_tokens": added}


def write(folder: Path, change: Callable[[Json, dict[str, list[int]], Json], Any] = lambda *_: None) -> Path:
    """A checkpoint of two sparse shards; `change` edits config, shapes and tokenizer first."""
    configuration, tensors, words = config(), shapes(), tokenizer()
    change(configuration, tensors, words)
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for shard, mine in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        header, position = {}, 0
        for name in mine:
            end = position + 2 * math.prod(tensors[name])
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        path = folder / f"model-{shard:05}-of-00002.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if shard == 1:  # CLIP's mean and std, the upper halves of their f32
                clip = [0.48145466, 0.4578275, 0.40821073, 0.26862954, 0.26130258, 0.27577711]
                file.write((np.array(clip, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
            file.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(mine, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(configuration))
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


def test_opening_the_8b_costs_megabytes(tmp_path: Path) -> None:
    """Resident memory before and after, in a process of its own; the folder claims the full 17.4 GB."""
    folder = write(tmp_path / "m")
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) > 17_443_000_000
    script = (
        "import sys; from edgevl.checkpoint import open_checkpoint\n"
        "def rss(key):\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1]) / 1024\n"
        "before = rss('VmHWM')\n"
        "c = open_checkpoint(sys.argv[1])\n"
        "row = c.rows('model.embed_tokens.weight', 5, 6)\n"
        "assert row.shape == (1, 4096) and c.config.vision.tile_tokens == 256\n"
        "print(rss('VmHWM') - before)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(folder)], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 64


def test_the_8b_is_read_as_published(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    text, vision, tokens = checkpoint.config.text, checkpoint.config.vision, checkpoint.config.tokens
    assert len(checkpoint.names()) == 686  # 291 text, 387 vision, 6 projector, 2 of the conditioner
    assert (text.max_positions, text.rope_theta, text.head_dim) == (16384, 500000.0, 128)
    assert vision is not None
    assert (vision.heads, vision.layers, vision.patches, vision.prefix_tokens) == (16, 32, 1024, 8)
    assert vision.norm_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073), rel=1e-2)
    assert (tokens.image, tokens.image_start, tokens.image_end) == (128256, 128257, 128258)
    assert (tokens.size, tokens.stop) == (128265, (128001, 128009))
    assert len(checkpoint.notes) == 1
    assert "16384" in checkpoint.notes[0]


CHANGES: list[tuple[Callable[[Json, dict[str, list[int]], Json], Any], str]] = [
    (lambda c, s, t: c.update(force_image_size=448), "force_image_size is 448, but .*8B-V1 has 512"),
    (lambda c, s, t: c["llm_config"].update(rope_scaling=None), "rope_scaling is missing"),
    (lambda c, s, t: c["llm_config"].update(rope_theta=10000.0), "rope_theta is 10000.0, but"),
    (lambda c, s, t: t["added_tokens"].insert(256, {"id": 128265, "content": "<image>"}), "'<image>' has two ids"),
    (lambda c, s, t: t["added_tokens"][256].update(content="<a>") or t["added_tokens"][264].update(content="<image>"),
     "id of <image> is 128264, but"),
    (lambda c, s, t: t["added_tokens"][9].update(content="<b>"), "no single token <|eot_id|>".replace("|", "\\|")),
    (lambda c, s, t: s.update({"vision_model.radio_model.model.patch_generator.cls_token.token": [16, 1280]}),
     "prefix tokens is 16, but"),
    (lambda c, s, t: s.update({"vision_model.radio_model.model.patch_generator.pos_embed": [1, 4096, 1280]}),
     "cpe_max_size is 2048"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CHANGES)))
def test_an_8b_that_differs_is_refused(tmp_path: Path, index: int) -> None:
    change, message = CHANGES[index]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path / "m", change))
