"""The safetensors file format in numpy: a memory-mapped reader that trusts nothing, and a streaming writer.

    8 bytes      n, the header's length, unsigned little-endian
    n bytes      JSON: {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {…}}
    the rest     the tensors' bytes, little-endian, row-major; offsets count from here, leave no hole and do not overlap

bf16 has no numpy type: it is exposed as raw uint16 and converted to f32 by `bf16_to_f32`. Knows nothing of models.
Checkpoints and bundles read through `SafetensorsFile`, each with its own error class; opening costs the header alone.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import CheckpointError, UsageError
from edgevl.files import atomic_file

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER = 100_000_000  # bytes, the limit of the format's own library
_MAX_DIMS = 32  # numpy 1.x's own limit


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of one tensor. `dtype` is the format's name ("F16", "BF16", …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @staticmethod
    def of(name: str, array: Array, bf16: bool = False) -> TensorSpec:
        """The spec of an array; `bf16` marks uint16 bits that stand for bf16."""
        return TensorSpec(name, "BF16" if bf16 else dtype_name(array.dtype), tuple(array.shape))


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The format's name of a numpy dtype; uint16 is U16, never BF16."""
    for name, known in DTYPES.items():
        if name != "BF16" and known == dtype:
            return name
    raise ValueError(f"safetensors cannot store the numpy dtype {dtype}")


def bf16_to_f32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 is the upper half of an f32; exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round f32 to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


class SafetensorsFile:
    """One file, mapped read-only. Every failure is one sentence in the error class given.

    `specs` lists the tensors in header order, `header` is the raw JSON, `size` the file's bytes.
    """

    def __init__(self, path: str | Path, error: type[UsageError] = CheckpointError) -> None:
        self.path = Path(path)
        self._error = error
        try:
            with self.path.open("rb") as file:
                self.size = file.seek(0, 2)
                self.header = self._read_header(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise error(f"{self.path} cannot be read: {problem.strerror or problem}") from problem
        self._data = 8 + len(self.header)
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        try:
            self._parse()
        except BaseException:
            self._map.close()
            raise

    def raw(self, name: str) -> Array:
        """The tensor as it lies in the file, a read-only view; bf16 as uint16 bits. Unaligned data is copied."""
        spec = self.spec(name)
        start = self._data + self._offsets[name]
        count = math.prod(spec.shape)
        dtype = DTYPES[spec.dtype]
        if count == 0:
            return np.empty(spec.shape, dtype)
        flat = np.frombuffer(self._map, dtype, count, start)
        return (flat if flat.flags.aligned else flat.copy()).reshape(spec.shape)

    def array(self, name: str) -> Array:
        """The tensor in a numpy dtype: bf16 converted to f32 (a copy), everything else as `raw`."""
        raw = self.raw(name)
        return bf16_to_f32(raw) if self.specs[name].dtype == "BF16" else raw

    def release(self) -> None:
        """Give back the memory of what was read so far; views stay valid and are read again when they are used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor."""
        if name not in self.specs:
            raise self._error(f"{self.path} holds no tensor named {name!r}")
        return self.specs[name]

    def _fail(self, what: str) -> UsageError:
        return self._error(f"{self.path} is not a valid safetensors file: {what}")

    def _read_header(self, file: Any) -> bytes:
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if self.size < 8:
            raise self._fail(f"it is {self.size} bytes long and the header's length alone takes 8")
        if length > MAX_HEADER:
            raise self._fail(f"its header claims {length} bytes; the format allows {MAX_HEADER}")
        if 8 + length > self.size:
            raise self._fail(f"its header claims {length} bytes but the file ends after {self.size}; copy it again")
        header: bytes = file.read(length)
        return header

    def _parse(self) -> None:
        try:
            entries = json.loads(self.header.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as problem:
            raise self._fail(f"its header is not JSON ({problem})") from problem
        if not isinstance(entries, dict):
            raise self._fail("its header is not a JSON object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("__metadata__ must map strings to strings")
        self.metadata = metadata
        for name, entry in entries.items():
            self._parse_entry(name, entry)
        position, before = 0, "the header"
        for name in sorted(self.specs, key=lambda n: (self._offsets[n], self.specs[n].nbytes)):
            start = self._offsets[name]
            if start != position:
                what = "overlaps" if start < position else "leaves a hole after"
                raise self._fail(
                    f"tensor {name!r} begins at byte {start} and {what} {before}, which ends at {position}"
                )
            position, before = start + self.specs[name].nbytes, repr(name)
        data = self.size - self._data
        if position != data:
            way = "copy it again" if position > data else "the rest belongs to no tensor"
            raise self._fail(f"its tensors take {position} bytes but {data} follow the header; {way}")

    def _parse_entry(self, name: str, entry: object) -> None:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._fail(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._fail(f"tensor {name!r} has the dtype {dtype!r}; this version reads {', '.join(DTYPES)}")
        if not _whole_numbers(shape) or len(shape) > _MAX_DIMS:
            raise self._fail(f"tensor {name!r} has the shape {str(shape)[:80]}; whole numbers are needed")
        if not _whole_numbers(offsets) or len(offsets) != 2:
            raise self._fail(f"tensor {name!r} has the data_offsets {str(offsets)[:80]}; two whole numbers are needed")
        spec = TensorSpec(name, dtype, tuple(shape))
        start, end = offsets
        if start > end or end > self.size - self._data:
            limit = self.size - self._data
            raise self._fail(f"tensor {name!r} lies at bytes {start}..{end} but {limit} follow the header")
        if end - start != spec.nbytes:
            raise self._fail(f"tensor {name!r} takes {end - start} bytes but {dtype} {shape} needs {spec.nbytes}")
        self.specs[name] = spec
        self._offsets[name] = start


def write_safetensors(
    path: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Array]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file tensor by tensor: the header comes from `specs`, then `tensors` must yield the same names in order.

    Nothing is held but the tensor in hand. The data begin at a multiple of 64 bytes, and tensors follow each other with
    no gap, so order wide dtypes before narrow ones (`widest_first`) where readers want aligned views. A tensor that
    differs from its spec raises ValueError, and no file appears. bf16 tensors are given as uint16 bits.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in specs:
        if spec.name in entries:
            raise ValueError(f"the tensor {spec.name!r} is listed twice")
        offsets = [position, position + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % 64)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        remaining = iter(specs)
        for name, array in tensors:
            expected = next(remaining, None)
            if expected is None or expected.name != name:
                raise ValueError(f"the tensor {name!r} was given where {expected and expected.name!r} was announced")
            if array.dtype != DTYPES[expected.dtype] or tuple(array.shape) != expected.shape:
                raise ValueError(
                    f"{name!r} is {array.dtype} {array.shape}, announced as {expected.dtype} {expected.shape}"
                )
            if array.size:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        missing = next(remaining, None)
        if missing is not None:
            raise ValueError(f"the tensor {missing.name!r} was announced but not given")


def widest_first(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The specs ordered by item size, largest first, otherwise as they came: every tensor then lies aligned."""
    return sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double!r} appears twice")
    return result


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
