"""The bundle: a directory that a device can run. Specified in FORMAT.md.

A bundle for CPUs is data, and nothing in it has to be trusted; one for GPUs holds compiled kernels, which are programs:
digests say that they arrived whole, not who made them. Opening checks everything that can be wrong before a byte of
weights is used: names, sizes, digests, tensors, shapes. `deploy.build` writes bundles with `write_manifest`;
`edgevl.engine` opens them. Knows nothing of how a model runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.backends.cuda_kernels import KernelRecord
from edgevl.cache import cache_directory
from edgevl.config import ModelConfig, from_json
from edgevl.errors import BundleError, UsageError
from edgevl.files import atomic_file, sha256_file
from edgevl.layouts import StoredWeight, fields, int4_shapes, int8_shapes
from edgevl.models.names import Part, all_parts
from edgevl.runner import Limits
from edgevl.safetensors_file import SafetensorsFile

FORMAT = 1
MANIFEST, SEAL, WEIGHTS = "manifest.json", "manifest.sha256", "weights.safetensors"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
PAD = "_pad."  # prefix of tensors that only keep the next one aligned
REQUIRED = (WEIGHTS, TOKENIZER, TEMPLATE)
_SHARED_LIMIT = 227 << 10  # bytes of shared memory that a program can have on the largest GPU
_MANIFEST_LIMIT = 64 << 20  # bytes; a real one is well below 1 MiB

# numpy dtypes of each array of a stored weight, by kind
_DTYPES: dict[str, dict[str, str]] = {
    "f32": {"values": "float32"},
    "f16": {"values": "float16"},
    "int8": {"codes": "int8", "scales": "float32"},
    "int4": {"codes": "uint8", "scales": "float16", "zeros": "uint8"},
}


@dataclass(frozen=True)
class Target:
    """What the bundle runs on."""

    name: str  # as `edgevl targets` lists it
    backend: str  # "cpu" | "cuda"
    layout: str  # of the weights, see edgevl.layouts
    architecture: str = ""  # of a GPU, such as "sm_87"; empty for CPUs


@dataclass(frozen=True)
class Source:
    """The checkpoint that the bundle was built from."""

    name: str
    digest: str
    quantization: str  # "none" or, for example, "awq int4 g64 asymmetric"


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class WeightRecord:
    """Where a weight lies in weights.safetensors: `arrays` maps a field of the kind to a tensor name."""

    kind: str
    region: str
    shape: tuple[int, ...]
    arrays: dict[str, str]
    bias: str | None = None


@dataclass(frozen=True)
class Golden:
    """A prompt whose continuation is known; see edgevl.golden."""

    prompt: tuple[int, ...]  # ids below zero pick image rows
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    tiles: int = 0


@dataclass(frozen=True)
class Manifest:
    """manifest.json. Unknown keys are refused."""

    format: int
    edgevl: str
    source: Source
    target: Target
    model: ModelConfig
    limits: Limits
    weights: dict[str, WeightRecord]
    files: dict[str, FileRecord]
    golden: Golden | None = None
    kernels: dict[str, KernelRecord] = field(default_factory=dict)  # by key; empty for CPUs

    @staticmethod
    def parse(data: bytes) -> Manifest:
        """Read manifest.json's bytes, or raise `BundleError`."""
        try:
            raw = json.loads(data)
            version = raw.get("format") if isinstance(raw, dict) else None
            if version != FORMAT:
                raise UsageError(f"the bundle has format {version!r}, this edgevl reads {FORMAT}; build it again")
            manifest = from_json(Manifest, raw, MANIFEST)
        except UsageError as error:
            raise BundleError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise BundleError(f"manifest.json is not valid: {error}; build the bundle again") from error
        return manifest


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write manifest.json and its seal into a bundle being built; returns the bundle's digest (sha256, hex)."""
    data = json.dumps(asdict(manifest), indent=1, sort_keys=True).encode() + b"\n"
    digest = hashlib.sha256(data).hexdigest()
    for name, content in ((MANIFEST, data), (SEAL, f"{digest}\n".encode())):
        with atomic_file(directory / name) as stream:
            stream.write(content)
    return digest


@dataclass
class Bundle:
    """An opened bundle: weights are mapped, not read."""

    path: Path
    manifest: Manifest
    digest: str
    fresh: bool = True  # digests were not compared on this machine since the files changed
    _golden: tuple[str, ...] = ()  # backends that gave the golden answer here
    _file: SafetensorsFile = field(repr=False, default=None)  # type: ignore[assignment]
    _parts: dict[str, Part] = field(repr=False, default_factory=dict)

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Bundle:
        """Open and check a bundle.

        Digests are compared when the files changed since the last good check on this machine (size, time, inode), and
        always with `verify`. Raises `BundleError` with one sentence that names what differs.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleError(f"{root} is not a bundle: there is no such directory; `edgevl build` makes one")
        data = _small_file(root, MANIFEST)
        digest = hashlib.sha256(data).hexdigest()
        seal = _small_file(root, SEAL).decode("ascii", "replace").strip()
        if seal != digest:
            raise BundleError(f"{root / MANIFEST} was changed after it was built (its digest is not the sealed one)")
        manifest = Manifest.parse(data)
        bundle = Bundle(root, manifest, digest)
        bundle._check_files(verify)
        bundle._parts = {part.name: part for part in all_parts(manifest.model)}
        bundle._file = SafetensorsFile(root / WEIGHTS, error=BundleError)
        bundle._check_weights()
        bundle._check_kernels()
        return bundle

    # -- what the engine reads ----------------------------------------------------------------------------------

    def weight(self, name: str) -> StoredWeight:
        """The weight `name` of the model, its arrays mapped from the file."""
        record = self.manifest.weights[name]
        arrays = {key: self._file.array(tensor) for key, tensor in record.arrays.items()}
        bias = self._file.array(record.bias) if record.bias is not None else None
        return StoredWeight(record.kind, tuple(record.shape), arrays, bias)

    def release(self) -> None:
        """Give back the memory of weights that were read, as when a GPU holds them now; they can be read again."""
        self._file.release()

    def kernel_file(self, name: str) -> bytes:
        """A file of compiled kernels."""
        return (self.path / name).read_bytes()

    def tokenizer_json(self) -> bytes:
        """tokenizer.json."""
        return (self.path / TOKENIZER).read_bytes()

    def chat_template(self) -> str:
        """The chat template, a Jinja source."""
        return (self.path / TEMPLATE).read_text(encoding="utf-8")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights.safetensors."""
        return self.manifest.files[WEIGHTS].bytes

    # -- checks -------------------------------------------------------------------------------------------------

    def _stamp_path(self) -> Path:
        return cache_directory() / "verified" / f"{self.digest}.json"

    def _state(self) -> dict[str, list[int]]:
        stats = {name: (self.path / name).stat() for name in sorted(self.manifest.files)}
        return {name: [s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats.items()}

    def needs_golden(self, backend: str) -> bool:
        """Whether this backend (`Runner.backend`) has yet to show the golden answer on this machine."""
        return self.fresh or backend not in self._golden

    def mark_verified(self, backend: str) -> None:
        """Remember here that digests were right, and the golden answer by `backend`; failing to write is no error."""
        self._golden = (*(() if self.fresh else self._golden), backend)
        self.fresh = False
        try:
            stamp = self._stamp_path()
            stamp.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(stamp) as stream:
                stream.write(json.dumps({"files": self._state(), "golden": self._golden}).encode())
        except (OSError, UsageError):
            pass

    def _check_files(self, verify: bool) -> None:
        files = self.manifest.files
        missing = [name for name in REQUIRED if name not in files]
        if missing:
            raise BundleError(f"{self.path / MANIFEST} does not list {missing[0]}; build the bundle again")
        for name, record in files.items():
            if not _plain(name):
                raise BundleError(f"{self.path / MANIFEST} lists {name!r}, which points outside the bundle; refused")
            file = self.path / name
            if file.is_symlink() or not file.is_file():
                raise BundleError(f"{file} is missing or not a plain file; copy the bundle again, whole")
            size = file.stat().st_size
            if size != record.bytes:
                raise BundleError(
                    f"{file} has {size:,} bytes, the bundle was built with {record.bytes:,}; copy it again"
                )
        try:
            stamp = json.loads(self._stamp_path().read_bytes())
            self.fresh = stamp["files"] != self._state()
            self._golden = tuple(map(str, stamp["golden"]))
        except (OSError, ValueError, KeyError, TypeError):
            self.fresh = True
        if self.fresh or verify:
            for name, record in files.items():
                if sha256_file(self.path / name) != record.sha256:
                    raise BundleError(f"{self.path / name} is damaged: its digest is not the one it was built with")

    def _check_weights(self) -> None:
        records, where = self.manifest.weights, self.path / WEIGHTS
        if set(records) != set(self._parts):
            odd = sorted(set(records) ^ set(self._parts))[0]
            raise BundleError(f"the bundle's weights are not those of its model: {odd} is there without the other")
        for name, part in self._parts.items():
            record = records[name]
            if not record.arrays or set(record.arrays) != set(fields(record.kind, self.manifest.target.layout)):
                raise BundleError(f"{name} in {where} has the unknown kind {record.kind!r}; build the bundle again")
            if tuple(record.shape) != part.shape:
                raise BundleError(f"{name} has the shape {record.shape}, its model needs {part.shape}")
            if (record.bias is not None) != part.bias:
                raise BundleError(f"{name} has a bias where its model has none, or the reverse")
            if part.kind == "norm" and record.kind != "f32":
                raise BundleError(f"{name} is a norm and must be f32, not {record.kind}")
            for key, tensor in record.arrays.items():
                self._check_array(name, tensor, _DTYPES[record.kind][key], self._array_shape(name, record, key))
            if record.bias is not None:
                self._check_array(name, record.bias, "float32", (part.shape[0],))

    def _check_kernels(self) -> None:
        for key, record in self.manifest.kernels.items():
            sizes = (record.warps, *record.tiles.values())
            if record.file not in self.manifest.files:
                raise BundleError(f"{self.path / MANIFEST} does not list {record.file} of the kernel {key}")
            if record.warps > 32 or min(sizes) < 1 or not 0 <= record.shared <= _SHARED_LIMIT:
                raise BundleError(f"the kernel {key} has sizes that no GPU can launch; build the bundle again")

    def _array_shape(self, name: str, record: WeightRecord, key: str) -> tuple[int, ...]:
        """The shape an array must have by its kind; for int4, from the group size that its scales imply."""
        if record.kind in ("f32", "f16"):
            return tuple(record.shape)
        n, k = record.shape
        if record.kind == "int8":
            return int8_shapes(n, k, self.manifest.target.layout)[key][1]
        groups = self._file.specs[record.arrays["scales"]].shape if record.arrays["scales"] in self._file.specs else ()
        count = groups[1] if len(groups) in (3, 4) else 0
        if count < 1 or k % count or k // count not in (32, 64, 128):
            raise BundleError(f"{name} has {count} groups for {k} in-features; a group must be 128, 64 or 32 of them")
        return int4_shapes(n, k, k // count, self.manifest.target.layout)[key][1]

    def _check_array(self, name: str, tensor: str, dtype: str, shape: tuple[int, ...]) -> None:
        if tensor not in self._file.specs:
            raise BundleError(f"{self.path / WEIGHTS} lacks the tensor {tensor} of {name}; build the bundle again")
        found = self._file.array(tensor)
        if found.dtype != np.dtype(dtype) or found.shape != shape:
            raise BundleError(f"{tensor} is {found.dtype} {found.shape}, its kind needs {dtype} {shape}")


def _plain(name: str) -> bool:
    """A file of the bundle itself: `name` or `kernels/name`, no way up, no absolute path."""
    pieces = name.split("/")
    if len(pieces) > 2 or (len(pieces) == 2 and pieces[0] != "kernels"):
        return False
    return all(p not in ("", ".", "..") and "\\" not in p and "\0" not in p and ":" not in p for p in pieces)


def _small_file(root: Path, name: str) -> bytes:
    file = root / name
    if not file.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {name}; `edgevl build` makes one")
    if file.stat().st_size > _MANIFEST_LIMIT:
        raise BundleError(f"{file} has {file.stat().st_size:,} bytes, a manifest has at most {_MANIFEST_LIMIT:,}")
    return file.read_bytes()


def to_dict(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON-ready data, for `inspect`."""
    return asdict(manifest)
