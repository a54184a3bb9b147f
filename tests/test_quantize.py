"""The quantizer on tiny models: rounding against the numpy twin, AWQ against round to nearest, resuming, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Sizes, Tensors, text_tensors, tiny_llama, tiny_vl
from edgevl.awq_format import FIELDS, unpack
from edgevl.checkpoint import Checkpoint, open_checkpoint, part_weight
from edgevl.config import ModelConfig
from edgevl.errors import EdgevlError, UsageError
from edgevl.models.names import text_parts
from edgevl.safetensors_file import SafetensorsFile
from edgevl.weights import FloatWeight, Int4Weight, dequantize, quantize_int4
from quantize import job, rounding
from quantize.awq import quantize_block
from quantize.groups import block_table
from quantize.job import quantize
from quantize.measure import compare
from quantize.observe import Observations, observe_block, run_block
from quantize.part_tensors import JoinedTensors
from quantize.reconstruct import reconstruct
from quantize.rounding import Scheme, fake_quantize, round_weight
from quantize.settings import QuantizeSettings, choose_group_size

FEW = {"samples": 4, "length": 256}


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounding_without_a_clip_is_the_numpy_twin(symmetric: bool, group_size: int) -> None:
    values = np.random.RandomState(0).standard_normal((24, 256)).astype(np.float32)
    values[3] = 0.0
    values[4] = np.abs(values[4])
    values[5, :64] *= 1e-9
    wanted = quantize_int4(values, group_size, symmetric)
    found, stands_for = round_weight(torch.from_numpy(values), Scheme(group_size, symmetric))
    for field in ("codes", "scales", "zeros"):
        assert np.array_equal(getattr(found, field), getattr(wanted, field)), field
    assert np.array_equal(stands_for.numpy(), dequantize(wanted))
    unscaled = fake_quantize(torch.from_numpy(values), Scheme(group_size, symmetric))
    assert np.array_equal(unscaled.numpy(), stands_for)


def test_a_clip_shrinks_the_range_and_saturates() -> None:
    """Range 0..15 shrunk to half has the scale 0.5, so 7.5 and everything above it get the code 15."""
    values = torch.arange(32, dtype=torch.float32)[None] * (15 / 31)
    half = torch.full((1, 1), 0.5)
    stored, stands_for = round_weight(values, Scheme(32, False), (half, half))
    assert stored.scales[0, 0] == 0.5 and stored.zeros[0, 0] == 0
    assert stored.codes[0, -1] == 15 and stands_for[0, -1] == 7.5


# -- one block --------------------------------------------------------------------------------------------------------


def block_with_outliers(sizes: Sizes) -> tuple[ModelConfig, dict[str, torch.Tensor], torch.Tensor]:
    """A block whose norms make a few channels fifty times larger than the rest, as large models have them."""
    from edgevl.config import TextConfig, TokenConfig

    tensors: Tensors = text_tensors(sizes)
    text = TextConfig(
        sizes.hidden, sizes.ff, 1, sizes.heads, sizes.kv_heads, sizes.d, sizes.vocab, 1e-5, 1e4, None, 512, False, False
    )
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"][[3, 17, 40]] *= 50
    config = ModelConfig("LlamaForCausalLM", text, TokenConfig(sizes.vocab, (1,)))
    block = {n: torch.from_numpy(t) for n, t in tensors.items() if n.startswith("model.layers.0.")}
    hidden = torch.from_numpy(np.random.RandomState(5).standard_normal((8, 64, sizes.hidden)).astype(np.float32))
    return config, block, hidden


def observed(config: ModelConfig, block: dict[str, torch.Tensor], hidden: torch.Tensor, group: int) -> Observations:
    weights = JoinedTensors(block_table(config, 0).parts, block)
    return observe_block(config.text, 0, weights, hidden, group, 3, 0, torch.empty_like(hidden))


def output(config: ModelConfig, block: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(hidden)
    run_block(config.text, 0, JoinedTensors(block_table(config, 0).parts, block), hidden, 3, result, "cpu")
    return result


def keep_f32(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.mark.parametrize("symmetric", [False, True])
@torch.inference_mode()
def test_awq_beats_round_to_nearest_where_channels_stick_out(symmetric: bool) -> None:
    config, block, hidden = block_with_outliers(Sizes(hidden=128, ff=256, heads=4, kv_heads=2))
    scheme = Scheme(64, symmetric)
    table = block_table(config, 0)
    result = quantize_block(config.text, table, dict(block), observed(config, block, hidden, 64), scheme, keep_f32)
    rounded = {n: fake_quantize(t, scheme) if t.ndim == 2 else t for n, t in block.items()}
    held_out = torch.from_numpy(np.random.RandomState(6).standard_normal((4, 64, 128)).astype(np.float32))
    wanted = output(config, block, held_out)
    errors = {
        name: float((output(config, tensors, held_out) - wanted).square().mean())
        for name, tensors in (("awq", result.values), ("rounded", rounded))
    }
    assert errors["awq"] < 0.7 * errors["rounded"], errors
    assert [g.error_chosen <= g.error_rounded for g in result.groups] == [True] * 4
    assert all(c.error_after <= c.error_before for c in result.clips)
    assert len(result.linears) == 7
    for module, weight in result.linears.items():
        assert np.array_equal(dequantize(weight), result.values[f"{module}.weight"].numpy())
        assert not symmetric or (weight.zeros == 8).all()


@torch.inference_mode()
def test_scales_alone_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rounding switched off at the end, folded scales leave the block's output as it was, biases included."""
    import quantize.awq as awq

    def unrounded(weight: torch.Tensor, scheme: Scheme, clip: Any) -> tuple[Int4Weight, torch.Tensor]:
        return round_weight(weight, scheme)[0], weight

    monkeypatch.setattr(awq, "round_weight", unrounded)
    config, block, hidden = block_with_outliers(Sizes(hidden=96, ff=160, heads=6, kv_heads=2))
    for name, rows in (("q", 96), ("k", 32), ("v", 32)):
        block[f"model.layers.0.self_attn.{name}_proj.bias"] = torch.linspace(-1, 1, rows)
    config = replace(config, text=replace(config.text, qkv_bias=True))
    seen = observed(config, block, hidden, 32)
    wanted = output(config, block, hidden)
    # a norm that is stored in f16 costs nothing, because the columns take what its rounding left; v's bias does
    for store_as, tolerance in ((keep_f32, 2e-5), (lambda _, tensor: tensor.half().float(), 1e-3)):
        result = awq.quantize_block(config.text, block_table(config, 0), dict(block), seen, Scheme(32, False), store_as)
        assert any(group.ratio for group in result.groups)
        gap = (output(config, result.values, hidden) - wanted).abs().max() / wanted.abs().max()
        assert gap < tolerance, gap


@torch.inference_mode()
def test_observations_are_the_plain_sums() -> None:
    config, block, hidden = block_with_outliers(Sizes())
    seen = observed(config, block, hidden, 32)
    x = hidden.reshape(-1, 64)
    x = x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * block["model.layers.0.input_layernorm.weight"]
    assert torch.allclose(seen.mean_abs["layers.0.qkv"], x.abs().mean(dim=0), rtol=1e-4)
    second = x[:, 32:].T @ x[:, 32:] / len(x)
    assert torch.allclose(seen.moments["layers.0.qkv"][1], second, rtol=1e-3, atol=1e-4)
    assert seen.sample["layers.0.qkv"].shape == (8, 64, 64)
    assert torch.allclose(seen.sample["layers.0.qkv"].reshape(-1, 64), x, rtol=1e-4, atol=1e-5)


def test_weights_that_overflow_are_named(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    file = SafetensorsFile(path)
    entry = json.loads(file.header)["model.layers.1.mlp.up_proj.weight"]
    at = 8 + len(file.header) + entry["data_offsets"][0]
    data[at : at + 4] = np.float32(np.inf).tobytes()
    path.write_bytes(bytes(data))
    with pytest.raises(EdgevlError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds infinite"):
        quantize(str(model), tmp_path / "out", QuantizeSettings(calibration="text", **FEW))


# -- the job ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.stem != "report"}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_output_is_an_awq_checkpoint_of_the_same_model(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoConfig

    model = tiny_llama(tmp_path / "m", dtype)
    report = quantize(str(model), tmp_path / "out", QuantizeSettings(group_size=32, **FEW))
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    assert after.quantization is not None
    assert (after.quantization.group_size, after.quantization.symmetric) == (32, False)
    assert after.config == before.config
    found = AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    assert (found["quant_method"], found["bits"], found["group_size"], found["version"]) == ("awq", 4, 32, "gemm")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert stored == "float16", "scales are float16, and so AWQ's kernels compute"
    assert found["zero_point"] is True and found["modules_to_not_convert"] == ["lm_head", "embed_tokens"]
    for part in text_parts(before.config):
        weight, _ = part_weight(after, part)
        quantized = part.kind == "linear" and part.region == "text"
        assert isinstance(weight, Int4Weight if quantized else FloatWeight), part.name
        if part.region != "text" or part.name == "norm":
            assert np.array_equal(weight.values, part_weight(before, part)[0].values)  # type: ignore[union-attr]
    assert after.tokenizer_json() == before.tokenizer_json()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["blocks"] == report["blocks"]
    assert not (tmp_path / "out.partial").exists()


def test_a_picture_model_keeps_its_eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vl(tmp_path / "m", shards=3)
    counted: list[torch.Tensor] = []

    def watched(*given: Any) -> Any:
        counted.append(given[-1])
        return reconstruct(*given)

    monkeypatch.setattr(job, "reconstruct", watched)
    report = quantize(str(model), tmp_path / "out", QuantizeSettings(scheme="sym", **FEW))
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    assert after.quantization is not None and after.quantization.symmetric
    assert report["settings"]["calibration"] == "mixed" and report["calibration"]["image_tokens"] > 0
    counts = [float(c) for c in counted[0].unique()]
    assert counts == [pytest.approx(0.2), 1] and (counted[0] < 1).sum() == report["calibration"]["image_tokens"]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["llm_config"]["torch_dtype"] == "float16"
    assert set(report["kept"]) == {"vision_model", "mlp1", "embed_tokens", "lm_head"}
    for name in after.names():
        if name.endswith(".qzeros"):
            assert (after.array(name).view(np.uint32) == 0x88888888).all(), name
        if name.startswith(("vision_model", "mlp1", "lm_head", "model.embed_tokens")):
            assert np.array_equal(after.raw(name)[1], before.raw(name)[1])
    module = "model.layers.0.self_attn.q_proj"
    assert after.stored_name(f"{module}.qweight") == f"language_model.{module}.qweight"


class StoppedError(Exception):
    """Stands for a killed process."""


def stop_at(count: int) -> Callable[[str, int, int], None]:
    calls = iter(range(count))

    def progress(stage: str, done: int, total: int) -> None:
        if next(calls, None) is None:
            raise StoppedError

    return progress


@pytest.mark.parametrize("calls", [34, 36, 43, 52, 61])  # calibrating, three blocks, measuring
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, calls: int) -> None:
    model = str(tiny_llama(tmp_path / "m", layers=3))
    settings = QuantizeSettings(**FEW)
    quantize(model, tmp_path / "whole", settings)
    with pytest.raises(StoppedError):
        quantize(model, tmp_path / "out", settings, stop_at(calls))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="add --resume to go on with it, or delete that folder"):
        quantize(model, tmp_path / "out", settings)
    with pytest.raises(UsageError, match="had scheme = asym, now it is sym; use the same settings, or delete"):
        quantize(model, tmp_path / "out", QuantizeSettings(scheme="sym", resume=True, **FEW))
    quantize(model, tmp_path / "out", QuantizeSettings(resume=True, **FEW))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_run_is_found_by_resume_and_replaced_by_force(tmp_path: Path) -> None:
    model, out = str(tiny_llama(tmp_path / "m", layers=1)), tmp_path / "out"
    first = quantize(model, out, QuantizeSettings(**FEW))
    before = contents(out)
    calls: list[str] = []
    again = quantize(model, out, QuantizeSettings(resume=True, **FEW), lambda stage, *_: calls.append(stage))
    assert again["sha256"] == first["sha256"] and not calls, "nothing was done again"
    with pytest.raises(UsageError, match="already exists"):
        quantize(model, out, QuantizeSettings(scheme="sym", resume=True, **FEW))
    quantize(model, out, QuantizeSettings(scheme="sym", force=True, **FEW))
    assert contents(out) != before
    with pytest.raises(UsageError, match="which is read; write elsewhere"):
        quantize(model, Path(model), QuantizeSettings(force=True, **FEW))


def test_what_cannot_work_is_refused_before_work(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "m", hidden=96, ff=160, heads=3, kv_heads=3))
    with pytest.raises(UsageError, match=r"q_proj has 96 in-features, which groups of 64 cannot divide.*choose 32"):
        quantize(model, tmp_path / "out", QuantizeSettings(group_size=64, **FEW))
    with pytest.raises(UsageError, match="choose 128, 64 or 32"):
        QuantizeSettings(group_size=48)
    with pytest.raises(UsageError, match=r"--max-memory 0\.0 MB is too little"):
        quantize(model, tmp_path / "out", QuantizeSettings(max_memory=1000, **FEW))
    quantized = str(tiny_llama(tmp_path / "q", awq=True))
    with pytest.raises(UsageError, match="is quantized already"):
        quantize(quantized, tmp_path / "out", QuantizeSettings(**FEW))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UsageError, match="already exists"):
        quantize(model, tmp_path / "taken", QuantizeSettings(**FEW))
    assert not list(tmp_path.glob("*.partial"))
    assert choose_group_size(open_checkpoint(model).config, None) == 32


def test_outputs_without_a_place(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "m"))
    with pytest.raises(UsageError, match="write elsewhere"):
        quantize(model, Path("/"), QuantizeSettings(**FEW))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a file stands where a folder must be"):
        quantize(model, tmp_path / "file" / "out", QuantizeSettings(**FEW))


# -- measuring --------------------------------------------------------------------------------------------------------


def test_measure_is_zero_for_the_same_and_small_for_a_good_copy(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    quantize(str(model), tmp_path / "out", QuantizeSettings(group_size=32, **FEW))
    original, copy = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 20
    same = compare(original, original, text)
    assert same.kl == 0 and same.top1 == 1 and same.perplexity_original == same.perplexity_quantized
    other = compare(original, copy, text)
    assert 0 < other.kl < 0.1 and other.top1 > 0.7
    assert set(other.to_json()) >= {"perplexity", "kl", "top1", "images"}
    with pytest.raises(UsageError, match="at least 32 are needed"):
        compare(original, copy, "Short.")
    with pytest.raises(UsageError, match="their configurations differ"):
        compare(original, open_checkpoint(tiny_llama(tmp_path / "n", hidden=96, heads=3, kv_heads=3)), text)


def plain(made: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    """A tensor of the original, f32, as the quantized checkpoint has it."""
    module = name.removesuffix(".weight")
    if f"{module}.qweight" not in made.names():
        return made.array(name)
    assert made.quantization is not None
    tensors = {field: made.array(f"{module}.{field}") for field in FIELDS}
    return dequantize(unpack(tensors, module, made.quantization.group_size))


def test_measures_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from quantize.measure import text_tokens

    model = tiny_llama(tmp_path / "m")
    checkpoint = open_checkpoint(model)
    text = "It was a dark and stormy night; the rain fell in torrents. " * 8
    ids = torch.tensor(text_tokens(checkpoint, text))
    assert (ids[:, 0] == checkpoint.token_id("<|begin_of_text|>")).all()
    judge = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = judge(ids).logits[:, :-1, : checkpoint.config.tokens.size]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[2]), ids[:, 1:].reshape(-1))
    assert compare(checkpoint, checkpoint, text).perplexity_original == pytest.approx(float(loss.exp()), rel=1e-4)

    quantize(str(model), tmp_path / "q", QuantizeSettings(calibration="text", samples=2, length=64, measure=False))
    made = open_checkpoint(tmp_path / "q")
    judge.load_state_dict({name: torch.tensor(plain(made, name)) for name in checkpoint.names()})
    with torch.no_grad():
        found = judge(ids).logits[:, :-1, : checkpoint.config.tokens.size].log_softmax(2)
    before = logits.log_softmax(2)
    same = compare(checkpoint, made, text)
    assert same.kl == pytest.approx(float((before.exp() * (before - found)).sum(2).mean()), rel=1e-3)
    assert same.top1 == pytest.approx(float((before.argmax(2) == found.argmax(2)).float().mean()), abs=1e-6)


# -- memory -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_rows_in_slices_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = torch.randn(40, 96, generator=torch.Generator().manual_seed(5)), torch.rand(96) + 0.5
    whole = fake_quantize(weight, Scheme(32, False), scale)
    monkeypatch.setattr(rounding, "_FLOATS", 7 * 96)
    assert torch.equal(fake_quantize(weight, Scheme(32, False), scale), whole)
