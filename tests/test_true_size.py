"""Two decoder blocks and two vision blocks at the 8B's true sizes, random weights. Minutes: -m slow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_vl
from deploy.build import BuildSettings, build
from edgevl.engine import Engine, Request, Result
from edgevl.image import load_image
from edgevl.prompt import Message
from quantize.job import quantize
from quantize.settings import QuantizeSettings


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_blocks_of_the_8b_quantize_build_and_run(tmp_path: Path) -> None:
    sizes = {
        "hidden": 4096,
        "ff": 14336,
        "layers": 2,
        "heads": 32,
        "kv_heads": 8,
        "vocab": 128512,
        "max_positions": 16384,
        "rope_theta": 500000.0,
        "vision_hidden": 1280,
        "vision_layers": 2,
        "vision_heads": 16,
        "tile": 512,
        "grid": 128,
        "projector": 4096,
        "max_tiles": 12,
    }
    tiny_vl(tmp_path / "m", dtype="bf16", shards=3, **sizes)
    settings = QuantizeSettings(group_size=128, calibration="text", samples=2, length=128)
    report = quantize(str(tmp_path / "m"), tmp_path / "q", settings)
    assert len(report["blocks"]) == 2
    build(str(tmp_path / "q"), tmp_path / "b", BuildSettings(head="int8", vision="int8", context=1024))
    engine = Engine.open(tmp_path / "b")
    assert engine.config.text.head_dim == 128
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    message = Message("user", (load_image(Image.fromarray(noise)), "What is it?"))
    result = list(engine.stream(Request((message,), max_tokens=4)))[-1]
    assert isinstance(result, Result)
    assert result.tokens["image"] == 256
    assert np.isfinite(result.tokens["prompt"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_memory_estimate_holds(tmp_path: Path) -> None:
    """A fresh process's own memory beside the interpreter is within the estimate, and the estimate is no idle bound."""
    from benchmarks.checkpoints import Sizes, write_llama
    from benchmarks.true_size import _in_a_process

    model = write_llama(tmp_path / "m", Sizes(1024, 3584, 1, 8, 2, 16384))
    for name, settings in (
        ("plain", {"group_size": 128, "calibration": "text", "samples": 8, "length": 256}),
        ("tight", {"group_size": 128, "calibration": "text", "samples": 32, "length": 256, "max_memory": 10**9}),
        ("disk", {"group_size": 128, "calibration": "text", "samples": 32, "length": 256, "max_activations": 1 << 20}),
    ):
        memory = _in_a_process(settings, model, tmp_path / name)["memory"]
        held = memory["peak_own_bytes"] - memory["interpreter_bytes"]
        assert 0.4 * memory["estimated_bytes"] < held < 1.1 * memory["estimated_bytes"], (name, memory)
        assert name != "tight" or held < 10**9
