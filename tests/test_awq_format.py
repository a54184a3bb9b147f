"""AutoAWQ's layout: the golden word, round trips, AutoAWQ's own unpacking, and refusals."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest
import torch

from edgevl.awq_format import pack, unpack
from edgevl.errors import CheckpointError
from edgevl.weights import Int4Weight, quantize_int4

SHAPES = [(8, 32, 32), (24, 64, 32), (16, 384, 128), (40, 96, 96)]


def weight(n: int, k: int, group: int) -> Int4Weight:
    r = np.random.RandomState(n + k)
    codes = r.randint(0, 16, (n, k)).astype(np.uint8)
    zeros = r.randint(0, 16, (n, k // group)).astype(np.uint8)
    return Int4Weight(codes, r.rand(n, k // group).astype(np.float16), zeros)


def test_codes_0_to_7_pack_to_the_golden_word() -> None:
    """0x75316420 by hand: nibbles from the lowest hold out-features 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = np.arange(8, dtype=np.uint8).reshape(8, 1)
    packed = pack(Int4Weight(codes, np.ones((8, 1), np.float16), np.full((8, 1), 8, np.uint8)))
    assert packed["qweight"].view(np.uint32).tolist() == [[0x75316420]]
    assert packed["qzeros"].view(np.uint32).tolist() == [[0x88888888]]


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_unpack_gives_back_what_was_packed(n: int, k: int, group: int) -> None:
    original = weight(n, k, group)
    packed = pack(original)
    assert {f: (a.dtype.name, a.shape) for f, a in packed.items()} == {
        "qweight": ("int32", (k, n // 8)),
        "qzeros": ("int32", (k // group, n // 8)),
        "scales": ("float16", (k // group, n)),
    }
    back = unpack(packed, "m", group)
    np.testing.assert_array_equal(back.codes, original.codes)
    np.testing.assert_array_equal(back.zeros, original.zeros)
    np.testing.assert_array_equal(back.scales, original.scales)


def autoawq() -> ModuleType:
    """AutoAWQ's one file with its packing, loaded alone: importing the package would need an old transformers."""
    package = importlib.util.find_spec("awq")
    if package is None or not package.submodule_search_locations:
        pytest.skip("autoawq is not installed")
    path = f"{package.submodule_search_locations[0]}/utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("autoawq_packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_autoawq_unpacks_the_same_codes(n: int, k: int, group: int) -> None:
    """The other library is AutoAWQ 0.2.9: unpack_awq, reverse_awq_order, and the mask its dequantization applies."""
    awq = autoawq()
    original = weight(n, k, group)
    packed = {f: torch.from_numpy(a) for f, a in pack(original).items()}
    codes, zeros = awq.reverse_awq_order(*awq.unpack_awq(packed["qweight"], packed["qzeros"], 4), 4)
    np.testing.assert_array_equal((codes & 15).numpy().T, original.codes)
    np.testing.assert_array_equal((zeros & 15).numpy().T, original.zeros)
    values = awq.dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"], 4, group)
    scales = np.repeat(original.scales, group, axis=1)
    ours = (original.codes.astype(np.float16) - np.repeat(original.zeros, group, axis=1).astype(np.float16)) * scales
    np.testing.assert_array_equal(values.numpy().T, ours)


def test_bad_tensors_are_refused_by_name() -> None:
    good = pack(quantize_int4(np.random.RandomState(0).randn(16, 64).astype(np.float32), 32))
    for change, message in [
        ({"qweight": good["qweight"].astype(np.int64)}, r"m\.qweight is int64 \(64, 2\)"),
        ({"scales": good["scales"].astype(np.float32)}, r"m\.scales is float32"),
        ({"scales": good["scales"][:, :8]}, r"m\.scales has the shape \(2, 8\).*needs \(2, 16\)"),
        ({"qzeros": good["qzeros"][:1]}, r"m\.qzeros has the shape \(1, 2\)"),
        ({"qweight": good["qweight"][0]}, r"m\.qweight is int32 \(2,\)"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            unpack({**good, **change}, "m", 32)
    with pytest.raises(CheckpointError, match=r"m\.qzeros is missing"):
        unpack({f: a for f, a in good.items() if f != "qzeros"}, "m", 32)
    for group in (48, 0, -1):
        with pytest.raises(CheckpointError, match="do not divide"):
            unpack(good, "m", group)
    with pytest.raises(CheckpointError, match=r"needs \(1, 2\)"):
        unpack(good, "m", 64)
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(weight(12, 32, 32))
