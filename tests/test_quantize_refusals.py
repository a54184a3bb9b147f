"""What can go wrong in a quantization run is one sentence, before the work where it can be known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints import tiny_llama
from edgevl.checkpoint import open_checkpoint
from edgevl.errors import CheckpointError, EdgevlError, UsageError
from edgevl.files import held_folder
from edgevl.safetensors_file import SafetensorsFile, f32_to_bf16
from quantize import job
from quantize.activations import FILE, Activations
from quantize.job import quantize
from quantize.settings import QuantizeSettings

FEW = QuantizeSettings(calibration="text", samples=2, length=64, measure=False)


def poke(model: Path, name: str, value: float) -> None:
    """Overwrite the first number of a tensor of a one-file checkpoint."""
    path = model / "model.safetensors"
    file = SafetensorsFile(path)
    entry = json.loads(file.header)[name]
    number = np.array([value], np.float32)
    stored = f32_to_bf16(number) if entry["dtype"] == "BF16" else number
    data = bytearray(path.read_bytes())
    at = 8 + len(file.header) + entry["data_offsets"][0]
    data[at : at + stored.nbytes] = stored.tobytes()
    path.write_bytes(bytes(data))


def no_block(*_: object) -> None:
    pytest.fail("a block was begun")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("model.layers.1.mlp.up_proj.weight", np.inf), ("model.embed_tokens.weight", np.nan), ("lm_head.weight", -np.inf)],
)
def test_bad_weights_are_named_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, name: str, value: float
) -> None:
    monkeypatch.setattr(job, "_one_block", no_block)
    model = tiny_llama(tmp_path / "m", dtype)
    poke(model, name, value)
    with pytest.raises(CheckpointError, match=rf"{name} holds infinite or undefined values".replace(".", r"\.")):
        quantize(str(model), tmp_path / "out", FEW)
    assert not (tmp_path / "out").exists()


def test_a_bad_weight_is_named_before_the_model_writes_its_own_text(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    poke(model, "model.layers.1.mlp.up_proj.weight", np.nan)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds infinite or undefined values"):
        quantize(str(model), tmp_path / "out", replace(FEW, calibration="self"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "an unfinished run is left where nothing was done"


def test_an_unfinished_run_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any text is written for it, and whether its files are all there."""
    model, settings = str(tiny_llama(tmp_path / "m")), replace(FEW, calibration="self")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("block 2 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", settings, stop)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out.partial").iterdir()}
    assert {"job.json", "self.safetensors", "block-00000.safetensors"} <= set(before)
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_text", no_block)
        with pytest.raises(UsageError, match="unfinished run with 1 blocks done; add --resume"):
            quantize(model, tmp_path / "out", replace(settings, seed=1))
        with pytest.raises(UsageError, match="had seed = 0, now it is 1"):
            quantize(model, tmp_path / "out", replace(settings, seed=1, resume=True))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out.partial").iterdir()} == before
    for name, content in (("block-00000.safetensors", before["block-00000.safetensors"][:-9]), ("job.json", b"[]")):
        (tmp_path / "out.partial" / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"is damaged .*; delete that folder to begin again"):
            quantize(model, tmp_path / "out", replace(settings, resume=True))
        (tmp_path / "out.partial" / name).write_bytes(before[name])
    (tmp_path / "out.partial" / "block-00000.safetensors").unlink()
    with pytest.raises(UsageError, match="is damaged"):
        quantize(model, tmp_path / "out", replace(settings, resume=True))


def test_a_weight_beyond_f16_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_one_block", no_block)
    model = tiny_llama(tmp_path / "m", "bf16")
    poke(model, "model.layers.1.mlp.gate_proj.weight", 1e7)
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight holds a value of 1e\+07, and int4 with f16 scales ends"
    ):
        quantize(str(model), tmp_path / "out", FEW)


def test_large_bf16_weights_give_finite_f16_scales(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", "bf16")
    poke(model, "model.layers.0.mlp.gate_proj.weight", 3e4)
    quantize(str(model), tmp_path / "out", FEW)
    made = open_checkpoint(tmp_path / "out")
    assert all(np.isfinite(made.array(name)).all() for name in made.names() if name.endswith(".scales"))


def test_a_scale_that_overflows_later_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AWQ multiplies may leave f16's range although the weight itself did not."""
    real = job.quantize_block

    def overflowing(*arguments: object, **named: object) -> object:
        result = real(*arguments, **named)  # type: ignore[arg-type]
        result.linears["model.layers.0.mlp.down_proj"].scales[5, 0] = np.inf
        return result

    monkeypatch.setattr(job, "quantize_block", overflowing)
    with pytest.raises(EdgevlError, match=r"layers\.0\.mlp\.down_proj row 5 needs a scale beyond what f16 holds"):
        quantize(str(tiny_llama(tmp_path / "m")), tmp_path / "out", FEW)


def test_a_shard_cut_short(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", shards=2)
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is not a valid safetensors file"):
        quantize(str(model), tmp_path / "out", FEW)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from quantize.job import quantize
from quantize.settings import QuantizeSettings
from edgevl.errors import EdgevlError
settings = QuantizeSettings(calibration="text", samples=2, length=64, measure=False, resume=True)
if sys.argv[3] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    quantize(sys.argv[1], Path(sys.argv[2]), settings)
except EdgevlError as error:
    print(error)
    sys.exit(7)
"""


def test_where_files_cannot_grow_the_run_stops_and_goes_on_later(tmp_path: Path) -> None:
    """The limit on file sizes stands for a full disk: the same calls fail, with another number."""
    model = tiny_llama(tmp_path / "m")

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", LIMITED, str(model), str(tmp_path / "out"), str(limit)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)

    stopped = run(10_000)
    assert stopped.returncode == 7, stopped.stderr
    assert "block-00000.safetensors grew beyond what the file system or the limit" in stopped.stdout
    assert not (tmp_path / "out").exists()
    assert run(0).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    (tmp_path / "out.partial").mkdir()
    with held_folder(tmp_path / "out.partial"), pytest.raises(UsageError, match="another process is working in"):
        quantize(str(model), tmp_path / "out", FEW)


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("Short.")
    settings = QuantizeSettings(calibration=str(tmp_path / "own"), samples=2, length=64)
    with pytest.raises(UsageError, match="give only 0 sequences"):
        quantize(str(tiny_llama(tmp_path / "m")), tmp_path / "out", settings)
    assert not (tmp_path / "out.partial").exists()


def test_self_needs_the_model_in_memory(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "m", hidden=256, ff=256, heads=8, kv_heads=8, vocab=262144))
    settings = QuantizeSettings(calibration="self", samples=1, length=64, max_memory=300_000_000, measure=False)
    with pytest.raises(
        UsageError, match=r"--calibration self holds the whole model in memory, 0\.\d+ GB, and there is 0\.30 GB"
    ):
        quantize(model, tmp_path / "out", settings)


# -- activations on disk ----------------------------------------------------------------------------------------------


def test_activations_on_disk_give_the_same_bytes(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "m"))
    seen: list[bool] = []

    def watch(folder: Path) -> Callable[[str, int, int], None]:
        return lambda *_: seen.append((folder / FILE).exists())

    for name, limit in (("memory", 2 << 30), ("disk", 1000)):
        seen.clear()
        settings = QuantizeSettings(calibration="text", samples=2, length=64, max_activations=limit)
        quantize(model, tmp_path / name, settings, watch(tmp_path / f"{name}.partial"))
        assert any(seen) == (name == "disk")
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.stem != "report"} for n in ("memory", "disk")
    )
    assert first == second


def test_a_disk_too_small_for_the_activations(tmp_path: Path) -> None:
    with pytest.raises(
        EdgevlError, match=r"activations\.tmp cannot take the \d+\.\d GB of the calibration activations"
    ):
        Activations((1 << 20, 1 << 12, 1 << 12), 1, tmp_path)
