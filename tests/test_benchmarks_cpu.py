"""`python -m benchmarks.cpu` on a tiny model: ours for real, a peer that fails, rounds that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import environments
from benchmarks.cpu import __main__ as cpu
from benchmarks.cpu import models, peers
from benchmarks.cpu.peers import Row
from checkpoints import tiny_llama
from deploy.build import BuildSettings, build
from edgevl import _native
from edgevl.checkpoint import open_checkpoint
from edgevl.probes import int8_rate
from edgevl.traffic import operations
from op_cases import text_config

CASE: dict[str, Any] = {"prefill": [9, 20], "depths": [0, 20], "generate": 4, "repeats": 2}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cpu.main(arguments) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_ours_is_measured_and_a_peer_that_fails_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "m", "bf16")
    text = open_checkpoint(str(model)).config.text

    def bundle(work: Path, _: Path) -> str:
        if not (work / "b").exists():
            build(str(model), work / "b", BuildSettings(context=64))
        return str(work / "b")

    def broken(*_: Path) -> str:
        raise environments.PeerError("preparing its model failed: no such thing")

    monkeypatch.setattr(cpu, "ROWS", (Row("edgevl tiny", "demo", bundle), Row("a peer", "demo", broken)))
    monkeypatch.setattr(cpu, "CASES", {"demo": CASE})
    monkeypatch.setattr(cpu, "_VOCABULARY", text.vocab_size)
    monkeypatch.setattr(cpu, "_text", lambda *_: text)
    options = ["--work", str(tmp_path / "w"), "--threads", "1", "--json", str(tmp_path / "j.json"), "--rounds"]
    first = run([*options, "1"], capsys)
    assert first["failed"] == {"a peer": "preparing its model failed: no such thing"}
    assert len(first["runs"]) == len(first["limits"]) == 1
    (entry,) = first["summary"]
    assert set(entry["cases"]) == {"prefill 9", "prefill 20", "decode 0", "decode 20", "8 slots"}
    assert all(case["rate"] > 0 for case in entry["cases"].values())
    assert entry["planned_bytes"] > 0 and entry["load_seconds"] < entry["first_token_seconds"]
    second = run([*options, "2"], capsys)
    assert second["runs"][:1] == first["runs"] and len(second["runs"]) == 2


def test_cpu_time_is_for_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cpu.main(["--clock", "cpu", "--threads", "1", "2"])
    assert ended.value.code == 2 and "--threads 1" in capsys.readouterr().err


def test_every_peer_has_a_runner_and_every_model_its_cases() -> None:
    assert all((peers.RUNNERS / f"run_{row.runner}.py").is_file() for row in peers.ROWS if row.runner)
    assert {row.model for row in peers.ROWS} == set(cpu.CASES)


def test_operations_by_hand() -> None:
    """One block of 2 heads of 8, 1 KV head, hidden 16, feed-forward 32, vocabulary 50; three tokens see 1 + 2 + 3."""
    config = text_config(2, 1, 8)
    linears = 3 * (16 * 32 + 16 * 16 + 3 * 16 * 32)
    assert operations(config, 3) == 2 * (linears + 2 * 6 * 16 + 16 * 50)
    assert operations(config, 1, 5) == 2 * (linears // 3 + 2 * 6 * 16 + 16 * 50)


def test_random_models_have_the_true_shapes() -> None:
    config = models.eight_b(1)
    weights = models.random_weights(config)
    assert weights("layers.0.down").shape == (4096, 14336) and weights("layers.0.down").kind == "int4"
    assert weights("head").kind == "int8" and weights("head").shape[0] == config.text.vocab_size


def test_the_probes_do_what_they_say() -> None:
    assert _native.read_memory(np.arange(128, dtype=np.float32)) == 127 * 64
    assert _native.int8_products(3) % (3 * 64 * 2) == 0
    assert int8_rate(1, 1) > 0
    with pytest.raises(ValueError, match="pieces of 64"):
        _native.read_memory(np.zeros(65, np.float32))
