"""`python -m benchmarks.quantizers` on a tiny model: ours and rounding for real, the failures of others listed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import environments
from benchmarks.environments import PeerError
from benchmarks.quantizers import __main__ as quantizers
from benchmarks.quantizers.model import write_model
from benchmarks.quantizers.peers import PEERS
from checkpoints import tiny_llama
from edgevl.checkpoint import open_checkpoint
from edgevl.weights import dequantize, quantize_int4

SIZE = ["--group-size", "32", "--samples", "2", "--length", "64"]


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *only: str) -> dict[str, dict[str, object]]:
    text = tmp_path / "text.txt"
    text.write_text("Words that nobody has calibrated on, again and again and again. " * 20)
    model = tiny_llama(tmp_path / "m", "bf16")
    arguments = ["--model", str(model), "--work", str(tmp_path / "w"), "--text", str(text), *SIZE, "--only", *only]
    assert quantizers.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row["name"]: row for row in document["rows"]}


def test_ours_and_rounding_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, capsys, "round to nearest", "edgevl fast")
    assert set(rows) == {"round to nearest", "edgevl fast"}
    for row in rows.values():
        assert 0 < row["kl"] < 1 and row["standard_errors"]["kl"] > 0  # type: ignore[operator, index]
    name = "model.layers.0.mlp.down_proj.weight"
    original = np.asarray(open_checkpoint(tmp_path / "w" / "model").array(name))
    rounded = open_checkpoint(tmp_path / "w" / "out" / "round-to-nearest-asym").array(name)
    assert np.array_equal(rounded, dequantize(quantize_int4(original, 32, False)))


def test_a_tool_that_fails_is_listed_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(name: str, *_: object) -> Path:
        if name == "hqq":
            raise PeerError("installing failed: no such package")
        return Path(sys.executable)  # which lacks the tool

    monkeypatch.setattr(quantizers, "environment", here)
    rows = run(tmp_path, capsys, "HQQ", "AutoRound")
    assert rows["HQQ"]["failed"] == "installing failed: no such package"
    assert str(rows["AutoRound"]["failed"]).startswith("ended with exit code 1: ModuleNotFoundError")


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(
        environments,
        "call",
        lambda command, what: (tmp_path / "e" / "one").mkdir(parents=True, exist_ok=True) or calls.append(command),
    )
    for _ in range(2):
        environments.environment("one", (("a",), ("--no-deps", "b")), tmp_path / "e")
    assert [command[-1] for command in calls[1:]] == ["a", "b"]
    environments.environment("one", (("a==2",),), tmp_path / "e")
    assert calls[-1][-1] == "a==2"


def test_every_peer_has_a_runner() -> None:
    assert all((quantizers.RUNNERS / f"run_{peer.runner}.py").is_file() for peer in PEERS)


def test_a_model_can_be_cut_short(tmp_path: Path) -> None:
    made = write_model(str(tiny_llama(tmp_path / "m", layers=3)), tmp_path / "cut", 1)
    assert made.config.text.layers == 1 and not made.has("model.layers.1.mlp.up_proj.weight")
