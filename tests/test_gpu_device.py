"""The same checks on a real GPU, where there is one: `pytest -m gpu`."""

from __future__ import annotations

import pytest

from benchmarks.gpu.checks import operation, sampling, tiny_model
from edgevl.backends.cuda_device import CudaDevice
from edgevl.contracts import CONTRACTS
from edgevl.errors import EdgevlError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    try:
        return CudaDevice("this test runs kernels")
    except EdgevlError as error:
        pytest.skip(str(error))


def test_every_op_matches_its_twin(device: CudaDevice) -> None:
    found = {op: operation(device, device.architecture, op, every=3)["worst"] for op in CONTRACTS}
    assert {op: worst for op, worst in found.items() if worst is None or worst > 1} == {}


def test_tokens_are_drawn_as_the_twin_draws_them(device: CudaDevice) -> None:
    assert sampling(device, device.architecture)["wrong"] == 0


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_tiny_model_answers_as_on_the_processor(device: CudaDevice, kv: str) -> None:
    found = tiny_model(device, device.architecture, kv)
    assert found["largest_difference"] is not None and found["largest_difference"] < 0.1
    assert found["steps_alike"] and found["chosen_right"]
