"""The safetensors reader and writer: against the safetensors library both ways, and against hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from edgevl.errors import BundleError, CheckpointError
from edgevl.safetensors_file import (
    SafetensorsFile,
    TensorSpec,
    bf16_to_f32,
    f32_to_bf16,
    widest_first,
    write_safetensors,
)

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def header_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def arrays() -> dict[str, Any]:
    r = np.random.RandomState(0)
    made = {f"t.{d}": (r.standard_normal((3, 5)) * 50).astype(d) for d in DTYPES}
    return {**made, "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16), "naïve": np.arange(3)}


def test_the_library_reads_what_we_write(tmp_path: Path, arrays: dict[str, Any]) -> None:
    specs = [TensorSpec.of(n, a) for n, a in arrays.items()]
    write_safetensors(tmp_path / "a", specs, iter(arrays.items()), {"format": "pt"})
    loaded = safetensors.numpy.load_file(tmp_path / "a")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_we_read_what_the_library_writes(tmp_path: Path, arrays: dict[str, Any]) -> None:
    safetensors.numpy.save_file(arrays, tmp_path / "a", {"who": "library"})
    file = SafetensorsFile(tmp_path / "a")
    assert set(file.specs) == set(arrays)
    assert file.metadata == {"who": "library"}
    for name, array in arrays.items():
        assert file.raw(name).dtype == array.dtype
        np.testing.assert_array_equal(file.raw(name), array)
    with pytest.raises(ValueError, match="read-only"):
        file.raw("t.f4")[0, 0] = 1


def test_bf16_agrees_with_torch_both_ways(tmp_path: Path) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 10
    values[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3e38])
    safetensors.torch.save_file({"a": values.to(torch.bfloat16)}, tmp_path / "a")
    file = SafetensorsFile(tmp_path / "a")
    expected = values.to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(file.array("a"), expected)
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values.numpy())), expected)
    bits = f32_to_bf16(values.numpy())
    write_safetensors(tmp_path / "b", [TensorSpec.of("a", bits, bf16=True)], [("a", bits)])
    np.testing.assert_array_equal(safetensors.torch.load_file(tmp_path / "b")["a"].float().numpy(), expected)


def test_unaligned_tensors_are_copied_and_right(tmp_path: Path) -> None:
    specs = [TensorSpec("odd", "U8", (3,)), TensorSpec("wide", "F32", (2,))]
    write_safetensors(tmp_path / "a", specs, [("odd", np.ones(3, np.uint8)), ("wide", np.array([1, 2], np.float32))])
    wide = SafetensorsFile(tmp_path / "a").raw("wide")
    assert wide.flags.aligned
    np.testing.assert_array_equal(wide, [1, 2])
    assert [s.name for s in widest_first(specs)] == ["wide", "odd"]


A = entry("F32", [2], 0, 8)
HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "empty": (b"", b"", 0, "header is not JSON"),
    "huge length": (b"{}", b"", 1 << 62, "format allows 100000000"),
    "length past the end": (b"{}", b"", 1000, "file ends after 10"),
    "not json": (b"{nope", b"", None, "header is not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "header is not JSON"),
    "deep nesting": (b"[" * 200_000, b"", None, "header is not JSON"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None, "header is not JSON"),
    "a list": (b"[]", b"", None, "not a JSON object"),
    "duplicate": (b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), bytes(8), None, "'a' appears twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None, "must map strings to strings"),
    "entry": ({"a": 5}, b"", None, "exactly dtype, shape and data_offsets"),
    "extra key": ({"a": {**A, "code": "x"}}, bytes(8), None, "exactly dtype, shape and data_offsets"),
    "dtype": ({"a": entry("Q4", [2], 0, 8)}, bytes(8), None, "has the dtype 'Q4'"),
    "dtype list": ({"a": {**A, "dtype": []}}, bytes(8), None, "has the dtype"),
    "negative shape": ({"a": entry("F32", [-2], 0, 8)}, bytes(8), None, "whole numbers are needed"),
    "float shape": ({"a": {**A, "shape": [2.0]}}, bytes(8), None, "whole numbers are needed"),
    "bool shape": ({"a": {**A, "shape": [True, 2]}}, bytes(8), None, "whole numbers are needed"),
    "many dims": ({"a": entry("U8", [1] * 40, 0, 1)}, bytes(1), None, "whole numbers are needed"),
    "offsets": ({"a": {**A, "data_offsets": [0]}}, bytes(8), None, "two whole numbers"),
    "reversed": ({"a": entry("F32", [2], 8, 0)}, bytes(8), None, "lies at bytes 8..0"),
    "out of range": ({"a": entry("F32", [4], 0, 16)}, bytes(8), None, "but 8 follow the header"),
    "size": ({"a": entry("F32", [3], 0, 8)}, bytes(8), None, "takes 8 bytes but F32 \\[3\\] needs 12"),
    "overflow": ({"a": entry("F32", [1 << 62, 4], 0, 8)}, bytes(8), None, "takes 8 bytes"),
    "overlap": ({"a": A, "b": entry("F32", [2], 4, 12)}, bytes(12), None, "overlaps 'a'"),
    "same place": ({"a": A, "b": A}, bytes(8), None, "overlaps 'a'"),
    "hole": ({"a": A, "b": entry("F32", [2], 12, 20)}, bytes(20), None, "leaves a hole after 'a'"),
    "first hole": ({"a": entry("F32", [2], 4, 12)}, bytes(12), None, "leaves a hole after the header"),
    "left over": ({"a": A}, bytes(9), None, "take 8 bytes but 9 follow"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    header, data, length, message = HOSTILE[case]
    path = header_file(tmp_path / "x.safetensors", header, data, length)
    for error in (CheckpointError, BundleError):
        with pytest.raises(error, match=message) as caught:
            SafetensorsFile(path, error)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_short_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="4 bytes long"):
        SafetensorsFile(tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsFile(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes long"):
        SafetensorsFile(tmp_path / "c")


def test_the_writer_holds_the_caller_to_the_specs(tmp_path: Path) -> None:
    spec, one = TensorSpec("a", "F32", (2,)), np.zeros(2, np.float32)
    for specs, tensors, message in [
        ([spec, spec], [], "listed twice"),
        ([spec], [("b", one)], "'b' was given where 'a'"),
        ([spec], [("a", one.astype("f8"))], "announced as F32"),
        ([spec], [("a", one[:1])], "announced as F32"),
        ([spec], [], "announced but not given"),
        ([spec], [("a", one), ("c", one)], "'c' was given"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_safetensors(tmp_path / "x", specs, tensors)
    assert list(tmp_path.iterdir()) == []
