"""Where a checkpoint's tensors lie: one folder of safetensors files, or anything else with the same five questions.

Names here are the file's own. Knows nothing of models; `Checkpoint` asks, `gguf_file` answers for GGUF.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from edgevl.errors import CheckpointError
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, bf16_to_f32

Array = NDArray[Any]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SAMPLES = 16  # places of a file's data that enter the digest
_SAMPLE = 4096  # bytes of each


class TensorStore(Protocol):
    """The tensors of a checkpoint, under the names that they are stored by."""

    def specs(self) -> Iterable[TensorSpec]: ...

    def raw(self, name: str) -> Array: ...

    def array(self, name: str, start: int, stop: int | None) -> Array: ...

    def digest(self) -> str: ...

    def release(self) -> None: ...


class SafetensorsFolder:
    """The safetensors files of a checkpoint folder: as the index names them, or the only one there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names, weight_map = _shards(folder)
        self._files = {name: SafetensorsFile(folder / name) for name in names}
        self._where: dict[str, SafetensorsFile] = {}
        for file in self._files.values():
            for tensor in file.specs:
                if tensor in self._where:
                    here, there = file.path.name, self._where[tensor].path.name
                    raise CheckpointError(f"{folder} holds the tensor {tensor} twice, in {there} and in {here}")
                self._where[tensor] = file
        for tensor, name in weight_map.items():
            if tensor not in self._files[name].specs:
                raise CheckpointError(f"{folder / INDEX} promises {tensor} in {name}, which lacks it; copy it again")

    def specs(self) -> Iterable[TensorSpec]:
        return [file.specs[name] for name, file in self._where.items()]

    def raw(self, name: str) -> Array:
        return self._where[name].raw(name)

    def array(self, name: str, start: int, stop: int | None) -> Array:
        """Rows start..stop; bf16 converted to f32, everything else a mapped view."""
        raw = self.raw(name)
        part = raw if (start, stop) == (0, None) else raw[start:stop]
        return bf16_to_f32(part) if self._where[name].specs[name].dtype == "BF16" else part

    def release(self) -> None:
        """Give back the memory of what was read."""
        for file in self._files.values():
            file.release()

    def digest(self) -> str:
        """SHA-256 over every file's size, header and 16 samples of its data: cheap, and other weights change it."""
        sha = hashlib.sha256()
        for name in sorted(self._files):
            file = self._files[name]
            sha.update(f"{name} {file.size}\n".encode())
            sha.update(file.header)
            begin = 8 + len(file.header)
            room = max(file.size - begin - _SAMPLE, 0)
            with file.path.open("rb") as stream:
                for i in range(_SAMPLES):
                    stream.seek(begin + room * i // (_SAMPLES - 1))
                    sha.update(stream.read(_SAMPLE))
        return sha.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file, or one sentence of `CheckpointError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path} is not valid JSON ({problem})") from problem
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names, and the tensor → file map of the index (empty without one)."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_plain_name, weight_map.values())):
            raise CheckpointError(f"{index} has no weight_map from tensor names to file names in the same folder")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]} of the {len(names)} files in its index; fetch it again")
        return names, weight_map
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(others) == 1:
        return others, {}
    if others:
        raise CheckpointError(f"{folder} holds {len(others)} safetensors files but no {INDEX}; download that too")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(f"{folder} holds pickled weights only, which edgevl never opens; save it as safetensors")
    raise CheckpointError(f"{folder} holds no safetensors files")


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
