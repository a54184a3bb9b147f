"""Opening checkpoints: what is read, what every wrong file is answered with, and what it costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Sizes, Tensors, text_tensors, tiny_llama, tiny_vl, vision_tensors
from edgevl.awq_format import pack
from edgevl.checkpoint import Quantization, open_checkpoint, part_weight
from edgevl.checkpoint.positions import resize_positions
from edgevl.config import RopeScaling
from edgevl.errors import CheckpointError, MissingExtraError
from edgevl.models.names import all_parts, tensor_names
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, bf16_to_f32, f32_to_bf16, write_safetensors
from edgevl.weights import FloatWeight, Int4Weight, quantize_int4

Json = dict[str, Any]
TOWER = "vision_model.radio_model.model"


def edit_json(path: Path, change: Callable[[Json], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file.raw(name)) for name in file.specs}
    change(tensors)
    specs = [TensorSpec.of(n, a, n in file.specs and file.specs[n].dtype == "BF16") for n, a in tensors.items()]
    write_safetensors(path, specs, tensors.items())


def expected_tensors(seed: int = 0, **sizes: Any) -> Tensors:
    s = Sizes(**sizes)
    return text_tensors(s, seed) | vision_tensors(s, seed)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_part_comes_out_as_its_sources_row_after_row(tmp_path: Path, dtype: str, shards: int) -> None:
    checkpoint = open_checkpoint(tiny_vl(tmp_path / "m", dtype, shards=shards))
    expected = expected_tensors()
    if dtype == "f16":
        expected = {n: a.astype(np.float16) for n, a in expected.items()}
    if dtype == "bf16":
        expected = {n: bf16_to_f32(f32_to_bf16(a)) for n, a in expected.items()}
    assert set(checkpoint.names()) == set(expected)
    for part in all_parts(checkpoint.config):
        weight, bias = part_weight(checkpoint, part)
        assert isinstance(weight, FloatWeight)
        assert weight.shape == part.shape
        if part.name == "vision.positions":
            continue
        names = tensor_names(part)
        joined = np.concatenate([expected[n] for n in names[: len(part.sources)]])
        assert weight.values.dtype == joined.dtype
        np.testing.assert_array_equal(weight.values, joined)
        assert (bias is not None) == part.bias
        if bias is not None:
            assert bias.dtype == np.float32
            np.testing.assert_array_equal(bias, expected[names[-1]].astype(np.float32))


def test_names_are_canonical_and_stored_names_are_kept(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_vl(tmp_path / "m", "bf16"))
    assert checkpoint.stored_name("model.norm.weight") == "language_model.model.norm.weight"
    assert checkpoint.stored_name("mlp1.1.weight") == "mlp1.1.weight"
    dtype, raw = checkpoint.raw("lm_head.weight")
    assert (dtype, raw.dtype) == ("BF16", np.uint16)
    assert not raw.flags.writeable
    np.testing.assert_array_equal(checkpoint.rows("lm_head.weight", 3, 5), checkpoint.array("lm_head.weight")[3:5])
    assert not checkpoint.has("language_model.model.norm.weight")
    with pytest.raises(CheckpointError, match="holds no tensor named nonsense"):
        checkpoint.array("nonsense")


def test_the_configuration_is_read(tmp_path: Path) -> None:
    config = open_checkpoint(tiny_vl(tmp_path / "m")).config
    assert config.architecture == "Llama_Nemotron_Nano_VL"
    assert config.text.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 128)
    assert (config.text.qkv_size, config.text.vocab_size) == (128, 320)
    assert config.vision is not None
    assert (config.vision.heads, config.vision.layers, config.vision.position_grid) == (2, 2, 8)
    assert (config.vision.tile_tokens, config.vision.prefix_tokens) == (4, 8)
    assert config.tiling is not None
    assert (config.tiling.max_tiles, config.tiling.thumbnail) == (4, True)
    # 256 bytes, 32 merges and 5 control tokens come before the image tokens; <|end_of_text|> and <|eot_id|> stop
    assert (config.tokens.image, config.tokens.image_start, config.tokens.image_end) == (293, 294, 295)
    assert (config.tokens.size, config.tokens.stop) == (302, (289, 292))


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_sources_are_joined_into_one_int4_weight(tmp_path: Path, symmetric: bool) -> None:
    folder = tiny_vl(tmp_path / "m", "f16", awq=True, symmetric=symmetric)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization == Quantization(4, 32, symmetric, ("vision_model", "mlp1", "lm_head"))
    expected = expected_tensors()
    parts = {p.name: p for p in all_parts(checkpoint.config)}
    weight, bias = part_weight(checkpoint, parts["layers.1.qkv"])
    assert bias is None
    assert isinstance(weight, Int4Weight)
    sources = [quantize_int4(expected[f"model.layers.1.self_attn.{x}_proj.weight"], 32, symmetric) for x in "qkv"]
    np.testing.assert_array_equal(weight.codes, np.concatenate([s.codes for s in sources]))
    np.testing.assert_array_equal(weight.scales, np.concatenate([s.scales for s in sources]))
    np.testing.assert_array_equal(weight.zeros, np.concatenate([s.zeros for s in sources]))
    assert isinstance(part_weight(checkpoint, parts["head"])[0], FloatWeight)


def test_awq_biases_in_f16_are_read_as_f32(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", "f16", awq=True, qkv_bias=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.raw("model.layers.0.self_attn.q_proj.bias")[0] == "F16"
    parts = {p.name: p for p in all_parts(checkpoint.config)}
    _, bias = part_weight(checkpoint, parts["layers.0.qkv"])
    assert bias is not None
    assert (bias.dtype, bias.shape) == (np.float32, (128,))


def test_half_quantized_parts_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", awq=True)
    k = text_tensors(Sizes())["model.layers.0.self_attn.k_proj.weight"]

    def change(tensors: Tensors) -> None:
        for field in ("qweight", "qzeros", "scales"):
            del tensors[f"model.layers.0.self_attn.k_proj.{field}"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = k

    edit_tensors(folder, change)
    checkpoint = open_checkpoint(folder)
    part = next(p for p in all_parts(checkpoint.config) if p.name == "layers.0.qkv")
    with pytest.raises(CheckpointError, match=r"k_proj is not quantized but is computed together"):
        part_weight(checkpoint, part)


# -- positions --------------------------------------------------------------------------------------------------------


def test_positions_a_quarter_wide_are_means_of_the_inner_four() -> None:
    """The closed form for 128 -> 32 and any other factor of 4: rows 4i+1, 4i+2, columns 4j+1, 4j+2."""
    table = np.random.RandomState(0).standard_normal((1, 32 * 32, 5)).astype(np.float32)
    square = table.reshape(32, 32, 5)
    expected = sum(square[1 + a :: 4, 1 + b :: 4] for a in (0, 1) for b in (0, 1)) / 4
    np.testing.assert_allclose(resize_positions(table, 8, False), expected.reshape(64, 5), atol=1e-6)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(("side", "grid"), [(128, 32), (32, 16), (8, 4), (8, 8), (5, 7), (3, 1), (4, 12)])
def test_positions_agree_with_torch(side: int, grid: int, align: bool) -> None:
    table = np.random.RandomState(1).standard_normal((1, side * side, 3)).astype(np.float32)
    square = torch.from_numpy(table).reshape(1, side, side, 3).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(square, (grid, grid), mode="bilinear", align_corners=align)
    got = resize_positions(table, grid, align)
    np.testing.assert_allclose(
        got, wanted[0].permute(1, 2, 0).reshape(grid * grid, 3).numpy(), atol=1e-4
    )  # torch's coordinates are f32


def test_align_corners_reaches_the_part(tmp_path: Path) -> None:
    folder = tiny_vl(tmp_path / "m")
    table = expected_tensors()[f"{TOWER}.patch_generator.pos_embed"]
    for align in (False, True):
        checkpoint = open_checkpoint(folder, align_corners=align)
        part = next(p for p in all_parts(checkpoint.config) if p.name == "vision.positions")
        weight, _ = part_weight(checkpoint, part)
        assert isinstance(weight, FloatWeight)
        np.testing.assert_array_equal(weight.values, resize_positions(table, 4, align))


# -- refusals ---------------------------------------------------------------------------------------------------------

CONFIG: list[tuple[Callable[[Json], Any], str]] = [
    (lambda c: c.update(architectures=["QwenVL"]), r"config\.json\.architectures is \['QwenVL'\]"),
    (lambda c: c.pop("ps_version"), r"ps_version is missing; only 'v2'"),
    (lambda c: c.update(ps_version="v1"), r"ps_version is 'v1'; only 'v2'"),
    (lambda c: c.update(downsample_ratio=0.25), "downsample_ratio is 0.25; only 0.5"),
    (lambda c: c.update(image_tag_type="nvlm"), "image_tag_type is 'nvlm'; only 'internvl'"),
    (lambda c: c.update(patch_size=14), "patch_size is 14; only 8 and 16"),
    (lambda c: c.update(force_image_size=72), "a tile of 72 pixels"),
    (lambda c: c.pop("force_image_size"), "force_image_size is missing"),
    (lambda c: c.update(vit_hidden_size=48), "vit_hidden_size is 48; only 32"),
    (lambda c: c.update(projector_hidden_size=48), "projector_hidden_size is 48; only 64"),
    (lambda c: c.update(llm_config=3), "llm_config is 3; a JSON object is needed"),
    (lambda c: c["vision_config"].update(adaptor_names=["clip"]), "adaptor_names is .*must be empty"),
    (lambda c: c["vision_config"]["args"].update(model="vit_giant_patch14"), "known are vit_tiny"),
    (lambda c: c["vision_config"]["args"].update(model="vit_huge_patch14_224"), "known are vit_tiny"),
    (lambda c: c["vision_config"]["args"].pop("model_kwargs"), "that is 192 wide, but the patch embedding has 32 rows"),
    (
        lambda c: c["vision_config"]["args"]["model_kwargs"].update(depth=3),
        "that has 3 blocks, but the checkpoint has 2",
    ),
    (lambda c: c["vision_config"]["args"]["model_kwargs"].update(init_values=1), "init_values is 1; only depth"),
    (lambda c: c["vision_config"]["args"].update(cpe_max_size=2048), "cpe_max_size is 2048; .* 8x8 patches"),
    (lambda c: c["vision_config"]["args"].update(register_multiple=5), "8 prefix tokens, which is no multiple"),
    (lambda c: c["vision_config"]["args"].update(model_norm=True), "model_norm is True"),
    (lambda c: c["llm_config"].update(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
    (lambda c: c["llm_config"].update(mlp_bias=True), "mlp_bias is True"),
    (lambda c: c["llm_config"].update(num_attention_heads=3, head_dim=None), "must divide the hidden size 64"),
    (lambda c: c["llm_config"].update(hidden_size=-1), "hidden_size is -1; a whole number above zero"),
    (lambda c: c["llm_config"].update(vocab_size=384), r"embed_tokens.weight has the shape \[320, 64\]"),
    (lambda c: c["llm_config"].update(num_hidden_layers=3), "model.layers.2.input_layernorm.weight .* is missing"),
    (lambda c: c["llm_config"].update(num_hidden_layers=1), "model.layers.1.* is not known"),
    (lambda c: c["llm_config"]["rope_scaling"].update(rope_type="yarn"), "only default and llama3"),
    (lambda c: c["llm_config"]["rope_scaling"].pop("factor"), "factor is missing"),
    (lambda c: c["llm_config"].update(eos_token_id=5000), "eos_token_id is 5000"),
    (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quant_method is 'gptq'; edgevl reads"),
    (lambda c: c.update(quantization_config={"quant_method": "awq", "version": "gemv"}), "only gemm is read"),
    (lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 3}), "bits is 3; only 4"),
]


@pytest.mark.parametrize("index", range(len(CONFIG)))
def test_a_wrong_config_is_one_clear_sentence(tmp_path: Path, index: int) -> None:
    change, message = CONFIG[index]
    folder = tiny_vl(tmp_path / "m")
    edit_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


TENSORS: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda t: t.update({f"{TOWER}.blocks.0.ls1.gamma": np.ones(32, np.float32)}), r"blocks.0.ls1.gamma \[32\] is not"),
    (lambda t: t.update({f"{TOWER}.norm.weight": np.ones(32, np.float32)}), "norm.weight .* is not known"),
    (lambda t: t.update({"mlp1.4.weight": np.ones(3, np.float32)}), "mlp1.4.weight .* is not known"),
    (lambda t: t.update({"language_model.model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}), "q_norm"),
    (
        lambda t: t.update({"language_model.model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}),
        "o_proj.bias",
    ),
    (lambda t: t.pop("mlp1.3.bias"), "mlp1.3.bias .* is missing"),
    (lambda t: t.pop("mlp1.1.weight"), "mlp1.1.weight is missing"),
    (lambda t: t.pop("language_model.lm_head.weight"), "lm_head.weight .* is missing"),
    (lambda t: t.update({"mlp1.0.bias": np.ones(64, np.float32)}), r"mlp1.0.bias has the shape \[64\]; .* \[128\]"),
    (lambda t: t.update({"mlp1.0.bias": np.ones(128, np.int32)}), "mlp1.0.bias is stored as I32"),
    (
        lambda t: t.update({f"{TOWER}.patch_generator.pos_embed": np.ones((1, 63, 32), np.float32)}),
        r"\[1, side², width\]",
    ),
    (lambda t: t.update({f"{TOWER}.blocks.7.norm1.bias": np.ones(32, np.float32)}), "not numbered from 0"),
    (lambda t: t.update({"model.norm.weight": np.ones(64, np.float32)}), "stand for the same one"),
    (lambda t: t["vision_model.radio_model.input_conditioner.norm_std"].fill(0), "the std must be above zero"),
]


@pytest.mark.parametrize("index", range(len(TENSORS)))
def test_a_wrong_tensor_is_one_clear_sentence(tmp_path: Path, index: int) -> None:
    change, message = TENSORS[index]
    folder = tiny_vl(tmp_path / "m")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_harmless_tensors_are_accepted(tmp_path: Path) -> None:
    folder = tiny_vl(tmp_path / "m")

    def change(tensors: Tensors) -> None:
        tensors["vision_model.radio_model.summary_idxs"] = np.arange(3)
        tensors["language_model.model.layers.0.self_attn.o_proj.bias"] = np.zeros(64, np.float32)
        for key in ("norm_mean", "norm_std"):
            del tensors[f"vision_model.radio_model.input_conditioner.{key}"]

    edit_tensors(folder, change)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.vision is not None
    assert checkpoint.config.vision.norm_mean == (0.48145466, 0.4578275, 0.40821073)
    assert not checkpoint.has("model.layers.0.self_attn.o_proj.bias")


def test_awq_tensors_need_their_config_and_group_size(tmp_path: Path) -> None:
    folder = tiny_vl(tmp_path / "m", awq=True)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(group_size=64))
    with pytest.raises(CheckpointError, match=r"q_proj\.qzeros has the shape"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", lambda c: c.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        open_checkpoint(folder)
    wrong = pack(quantize_int4(np.ones((32, 64), np.float32), 32))
    folder = tiny_vl(tmp_path / "n", awq=True)
    name = "language_model.model.layers.0.self_attn.q_proj"
    edit_tensors(folder, lambda t: t.update({f"{name}.{f}": a for f, a in wrong.items()}))
    with pytest.raises(CheckpointError, match=r"quantized as \[32, 64\]; config.json implies \[64, 64\]"):
        open_checkpoint(folder)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no/such/folder does not exist; give a folder"):
        open_checkpoint("no/such/folder")
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "f")
    for name in ("config.json", "tokenizer.json"):
        folder = tiny_vl(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            open_checkpoint(folder)
    folder = tiny_vl(tmp_path / "damaged")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "tokenizer.json"):
        old = (folder / name).read_text()
        (folder / name).write_text(old[:-3])
        with pytest.raises(CheckpointError, match=rf"{name}.* is not"):
            open_checkpoint(folder)
        (folder / name).write_text(old)
    open_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        open_checkpoint(folder)


def test_shards_must_be_complete_and_agree(tmp_path: Path) -> None:
    folder = tiny_vl(tmp_path / "m", shards=3)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for file in ("../evil.safetensors", "/etc/passwd", 5):
        edit_json(index, lambda d, file=file: d["weight_map"].update({"mlp1.1.weight": file}))
        with pytest.raises(CheckpointError, match="no weight_map from tensor names to file names in the same folder"):
            open_checkpoint(folder)
        index.write_text(good)
    edit_json(index, lambda d: d["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="promises ghost in model-00001"):
        open_checkpoint(folder)
    index.write_text(good)
    second = folder / "model-00002-of-00003.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003"):
        open_checkpoint(folder)
    second.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds the tensor .* twice"):
        open_checkpoint(folder)
    second.write_bytes(kept[:-5])
    with pytest.raises(
        CheckpointError, match=r"model-00002.* not a valid safetensors file.*copy it again|lies at bytes"
    ):
        open_checkpoint(folder)
    second.write_bytes(kept)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"3 safetensors files but no model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_a_tokenizer_without_the_image_tokens_is_refused(tmp_path: Path) -> None:
    folder = tiny_vl(tmp_path / "m")
    edit_json(folder / "tokenizer.json", lambda t: t["added_tokens"].pop(5))
    with pytest.raises(CheckpointError, match="no single token <image>"):
        open_checkpoint(folder)


# -- digest, templates, preprocessing ---------------------------------------------------------------------------------


def test_the_digest_follows_config_and_weights(tmp_path: Path) -> None:
    digests = {
        name: open_checkpoint(tiny_vl(tmp_path / name, **options)).digest
        for name, options in {
            "a": {},
            "b": {},
            "seed": {"seed": 1},
            "dtype": {"dtype": "f16"},
            "config": {"rope_theta": 5000.0},
        }.items()
    }
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 4


def test_the_chat_template_sets_the_tokens_that_it_uses(tmp_path: Path) -> None:
    import jinja2

    folder = tiny_vl(tmp_path / "m")
    expected = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )

    def rendered() -> str:
        template = open_checkpoint(folder).chat_template()
        messages = [{"role": "user", "content": " hi "}]
        return jinja2.Template(template).render(messages=messages, add_generation_prompt=True)

    assert rendered() == expected
    # without any template, Llama 3's own format for tokenizers that have its header tokens
    edit_json(folder / "tokenizer_config.json", lambda t: t.pop("chat_template"))
    assert rendered() == expected
    edit_json(
        folder / "tokenizer_config.json", lambda t: t.update(chat_template=[{"name": "default", "template": "d"}])
    )
    assert rendered() == "d"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}!")
    assert rendered() == "<|eot_id|>!"
    assert "chat_template.jinja" in open_checkpoint(folder).extra_files()


CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        ({}, False),
        ({"do_normalize": True, **CLIP}, True),  # twice: corrected
        ({"do_normalize": True, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, False),
        ({"do_rescale": False}, True),
        ({"do_rescale": True, "rescale_factor": 1 / 255}, False),
    ],
)
def test_pixels_are_normalised_exactly_once(tmp_path: Path, change: Json, noted: bool) -> None:
    folder = tiny_vl(tmp_path / "m")
    edit_json(folder / "preprocessor_config.json", lambda p: p.update(change))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.vision is not None
    np.testing.assert_allclose(checkpoint.config.vision.norm_mean, CLIP["image_mean"], rtol=1e-6)
    np.testing.assert_allclose(checkpoint.config.vision.norm_std, CLIP["image_std"], rtol=1e-6)
    assert bool(checkpoint.notes) == noted


def test_a_normalisation_in_the_processor_alone_is_kept(tmp_path: Path) -> None:
    folder = tiny_vl(tmp_path / "m")
    edit_json(folder / "preprocessor_config.json", lambda p: p.update({"do_normalize": True, **CLIP}))
    prefix = "vision_model.radio_model.input_conditioner"
    identity = {f"{prefix}.norm_mean": np.zeros((3, 1, 1), "f4"), f"{prefix}.norm_std": np.ones((3, 1, 1), "f4")}
    edit_tensors(folder, lambda t: t.update(identity))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.vision is not None
    np.testing.assert_allclose(checkpoint.config.vision.norm_mean, CLIP["image_mean"], rtol=1e-6)
    assert checkpoint.notes == ()
    edit_json(folder / "preprocessor_config.json", lambda p: p.update(do_normalize=False))
    noted = open_checkpoint(folder)
    assert noted.config.vision is not None
    assert noted.config.vision.norm_std == (1.0, 1.0, 1.0)
    assert "not CLIP's" in noted.notes[0]


def test_preprocessor_values_are_checked(tmp_path: Path) -> None:
    for change, message in [
        ({"image_size": 512}, "image_size is 512; only 64"),
        ({"max_num_tiles": 0}, "max_num_tiles is 0"),
        ({"use_thumbnail": "yes"}, "use_thumbnail is 'yes'; true or false"),
        ({"do_normalize": True, "image_std": [0, 0, 0]}, "image_std is"),
        ({"do_normalize": True, "image_mean": [1]}, "image_mean is .*three numbers"),
    ]:
        folder = tiny_vl(tmp_path / "m")
        edit_json(folder / "preprocessor_config.json", lambda p, change=change: p.update(change))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


# -- plain Llamas -----------------------------------------------------------------------------------------------------


def test_llama_options_are_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path / "m", tied=True, qkv_bias=True, head_dim=24, llama3_rope=False))
    text = checkpoint.config.text
    assert (text.tied_embeddings, text.qkv_bias, text.head_dim, text.rope_scaling) == (True, True, 24, None)
    assert checkpoint.config.vision is None
    parts = {p.name: p for p in all_parts(checkpoint.config)}
    head, _ = part_weight(checkpoint, parts["head"])
    assert isinstance(head, FloatWeight)
    np.testing.assert_array_equal(head.values, checkpoint.array("model.embed_tokens.weight"))
    _, bias = part_weight(checkpoint, parts["layers.0.qkv"])
    expected = text_tensors(Sizes(tied=True, qkv_bias=True, head_dim=24))
    np.testing.assert_array_equal(
        bias, np.concatenate([expected[f"model.layers.0.self_attn.{x}_proj.bias"] for x in "qkv"])
    )


def test_rope_is_read_in_all_spellings(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    wanted = open_checkpoint(folder).config.text

    def old(c: Json) -> None:
        c["rope_scaling"]["type"] = c["rope_scaling"].pop("rope_type")

    def new(c: Json) -> None:
        c["rope_parameters"] = {**c.pop("rope_scaling"), "rope_theta": c.pop("rope_theta"), "rope_type": "llama3"}

    for change in (old, new):
        edit_json(folder / "config.json", change)
        assert open_checkpoint(folder).config.text == wanted
    edit_json(folder / "config.json", lambda c: c.update(rope_parameters={"rope_theta": 7.0, "rope_type": "default"}))
    text = open_checkpoint(folder).config.text
    assert (text.rope_theta, text.rope_scaling) == (7.0, None)


def test_what_transformers_saves_opens(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        attention_bias=True,  # puts a bias on o_proj too, all zero in a fresh model
        tie_word_embeddings=False,
        eos_token_id=292,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    source = tiny_llama(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.text.qkv_bias
    state = model.state_dict()
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.array(name), state[name].numpy())


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_hub_ids_fetch_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, asked = tiny_vl(tmp_path / "m"), {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("nvidia/some-model@main").path == folder
    assert (asked["name"], asked["revision"]) == ("nvidia/some-model", "main")
    assert asked["allow_patterns"] == ["*.json", "*.safetensors", "*.jinja"]


def test_hub_failures_are_one_honest_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def bare(kind: type[Exception]) -> Exception:
        return kind.__new__(kind)  # their constructors want a response of whichever HTTP library is installed

    for error, message in [
        (ConnectionError("no route"), "Hugging Face could not be reached for it"),
        (errors.LocalEntryNotFoundError("offline"), "could not be reached"),
        (bare(errors.RepositoryNotFoundError), "neither a local folder nor a repository"),
        (bare(errors.RevisionNotFoundError), "has no revision main"),
        (bare(errors.GatedRepoError), "asks for its licence"),
    ]:

        def fail(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint("org/name@main")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="huggingface_hub"):
        open_checkpoint("org/name")
