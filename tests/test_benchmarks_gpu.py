"""`python -m benchmarks.gpu` without a GPU: it runs from end to end, and counts what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import speed
from benchmarks.gpu.checks import operation, sampling, tiny_model
from benchmarks.gpu.models import eight_b, random_weights, tiny
from benchmarks.gpu.speed import linear_operations, step_bytes
from edgevl.backends.cuda import CudaRunner
from edgevl.backends.cuda_device import CudaDevice
from edgevl.backends.cuda_kernels import Kernel, KernelRecord
from edgevl.backends.cuda_program import Cubins
from edgevl.contracts import CONTRACTS
from edgevl.errors import EdgevlError
from edgevl.models.names import all_parts
from gpu_devices import FakeDriver, InterpreterDevice, uncompiled

ROOT = Path(__file__).parent.parent


def pretend(monkeypatch: pytest.MonkeyPatch, device: InterpreterDevice | None, driver: FakeDriver | None) -> None:
    """No compiler is started; the device is told of the kernels instead."""

    def compile_kernels(kernels: Mapping[str, Kernel], architecture: str) -> dict[str, tuple[KernelRecord, bytes]]:
        made = uncompiled(kernels)
        if device is not None:
            device.kernels |= kernels
        if driver is not None:
            driver.learn(made)
        return {key: (record, b"") for key, record in made.records.items()}

    monkeypatch.setattr("deploy.cubins.compile_kernels", compile_kernels)


def test_checks_pass_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    device = InterpreterDevice({}, 128 << 20)
    pretend(monkeypatch, device, None)
    found = {op: operation(device, "sm_90", op, every=60) for op in CONTRACTS}
    assert all(entry["cases"] > 0 and entry["worst"] <= 1 for entry in found.values()), found
    result = tiny_model(device, "sm_90", tokens=2)
    assert result["largest_difference"] < 0.1 and result["steps_alike"] and result["chosen_right"]
    wrong = result | {"chosen_right": False}
    for model, good in ((result, True), (wrong, False), (result | {"largest_difference": None}, False)):
        assert command._good({"failed": {}, "operations": found, "tiny_model": model}) is good


@pytest.mark.parametrize("drawn", [False, True])
def test_a_token_that_the_logits_do_not_say_is_found(monkeypatch: pytest.MonkeyPatch, drawn: bool) -> None:
    device = InterpreterDevice({}, 128 << 20)
    pretend(monkeypatch, device, None)
    right = CudaRunner.choose

    def choose(self: CudaRunner, *step: Any) -> Any:
        found = right(self, *step)
        return found - (found > 0) if bool(step[-1].any()) == drawn else found

    monkeypatch.setattr(CudaRunner, "choose", choose)
    monkeypatch.setattr("benchmarks.gpu.checks._alike", lambda gpu, place: True)  # not what this is about
    assert not tiny_model(device, "sm_90", tokens=1)["chosen_right"]


def test_tokens_are_drawn_as_the_twin_draws_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = InterpreterDevice({})
    pretend(monkeypatch, device, None)
    found = sampling(device, "sm_90")
    assert found["cases"] > 20 and found["wrong"] == 0


def test_the_command_prints_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    driver = FakeDriver(Cubins({}, lambda file: b""), sm=(9, 0))
    pretend(monkeypatch, None, driver)
    device = CudaDevice("this test runs kernels", "", driver)
    assert command.main(["--only", "speed", "--tiny"], device) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"decode_1", "decode_8", "decode_1_top_p", "prefill_2048", "tower", "first_token"} <= document.keys()
    assert {"decode_1", "decode_8"} <= document["int8_kv"].keys()
    assert len(document["goals"]) == 5
    assert document["gpu"] == "Orin, sm_90"
    assert driver.launches
    assert driver.allocated == []
    assert document["failed"] == {}


def test_what_fails_late_loses_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    driver = FakeDriver(Cubins({}, lambda file: b""), sm=(9, 0))
    pretend(monkeypatch, None, driver)
    device = CudaDevice("this test runs kernels", "", driver)

    def matrix_rate() -> float:
        raise RuntimeError("out of memory")

    right = command.operation

    def operation(device: Any, architecture: str, op: str, every: int) -> Any:
        if op == "linear":
            raise EdgevlError("the GPU's driver failed")
        return right(device, architecture, op, 90)

    def tower(self: speed.Meter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.torch_peer, "matrix_rate", matrix_rate)
    monkeypatch.setattr(command, "operation", operation)
    monkeypatch.setattr(speed.Meter, "tower", tower)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--tiny"], device)
    line = capsys.readouterr().out.splitlines()[-1]
    document = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["failed"]["linear"] == "EdgevlError: the GPU's driver failed"
    assert "out of memory" in document["failed"]["torch's matrix product"]
    assert document["operations"].keys() == CONTRACTS.keys() - {"linear"}
    assert document["prefill_2048"]["share_of_matrix_rate"] is None
    assert {"spread", "milliseconds"} <= document["decode_1"].keys()
    assert document["versions"]["driver"] == "13.0"
    assert not command._good(document)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, None, None)
    if command.main(["--tiny", "--only", "speed"]) == 0:
        pytest.skip("there is a GPU here")
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1


def test_what_a_step_must_read_and_compute() -> None:
    """The 8B has 8.03 thousand million decoder weights, 0.53 of them in the table that a step reads one row of."""
    config = eight_b()
    decoder = sum(int(np.prod(p.shape)) for p in all_parts(config) if p.region in ("text", "head"))
    assert decoder == 8_032_358_400 - 128_512 * 4096
    nothing = step_bytes(config, lambda name: 0, 1024, 1)
    assert nothing == 2 * 2 * 32 * 8 * 128 * 1024  # keys and values, f16
    assert step_bytes(config, lambda name: 0, 1024, 1, "int8") == 2 * 32 * 8 * (128 + 4) * 1024
    assert linear_operations(config, ("text", "head")) == 2 * (decoder - 65 * 4096)  # without norms
    weights = random_weights(tiny())
    assert weights("layers.0.qkv").kind == "int4"
    assert weights("vision.blocks.0.fc1").kind == "int8"
    assert weights("embed").arrays["values"].dtype == np.float16


def test_it_runs_from_a_checkout_without_the_rest_of_us() -> None:
    """Where a GPU is lent there may be no native extension, and none of the packages that tokens and pictures need."""
    code = (
        "import sys\n"
        "for name in ('torch', 'tokenizers', 'PIL', 'jinja2', 'edgevl._native'): sys.modules[name] = None\n"
        "sys.path.insert(0, 'tests')\n"
        "import benchmarks.gpu.__main__, op_cases\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
