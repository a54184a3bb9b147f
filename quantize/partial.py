"""An unfinished run on disk, `OUT.partial/`: what is needed to go on after any interruption, to the same bytes.

    job.json                  the settings and what they were applied to
    block-00012.safetensors   a finished block: int4 tensors and changed norms by checkpoint names; report as metadata
    hidden-00013.safetensors  the calibration tokens' hidden states before block 13, and those of the held-out text
    self.safetensors          what the model wrote to be calibrated on, if it did
    activations.tmp           the hidden states in hand, if they are too many for memory
    .lock                     held by the process that works here

Every file appears whole or not at all. A block is written before the hidden states that follow it, and older hidden
states are deleted last, so that at any moment the newest hidden states are preceded by all of their blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevl.awq_format import FIELDS, pack
from edgevl.errors import UsageError
from edgevl.files import atomic_file, held_folder, make_folder, remove_folder
from edgevl.safetensors_file import SafetensorsFile, TensorSpec, widest_first, write_safetensors
from edgevl.weights import Int4Weight

_JOB = "job.json"


class Partial:
    """The folder of an unfinished run that belongs to the output `out`; it may not exist."""

    def __init__(self, out: Path) -> None:
        self._out = out.absolute()
        self.folder = self._out.parent / f"{self._out.name}.partial"

    def done(self, settings: Mapping[str, Any], resume: bool) -> int:
        """How many blocks are finished, and all there. `settings`: those of `start` that are known already.

        Raises `UsageError` when there is an unfinished run and `resume` is not set, its settings were others, or
        something of it is damaged.
        """
        if not self.exists():
            return 0
        try:
            done, before = self.finished(), json.loads((self.folder / _JOB).read_text())
            if not isinstance(before, dict):
                raise ValueError(f"{_JOB} is no object")
            if resume:
                for layer in range(done):
                    self.block_report(layer)
                if done:
                    SafetensorsFile(self._hidden(done))
                if self._written.is_file():
                    SafetensorsFile(self._written)
        except (OSError, ValueError, KeyError, UsageError) as problem:
            raise UsageError(
                f"the unfinished run in {self.folder} is damaged ({problem}); delete that folder to begin again"
            ) from problem
        if not resume:
            raise UsageError(
                f"{self.folder} holds an unfinished run with {done} blocks done; "
                "add --resume to go on with it, or delete that folder to begin again"
            )
        self._same(before, settings, settings)
        return done

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with what was begun; `UsageError` when its settings were others."""
        if not self.exists():
            with atomic_file(self.folder / _JOB) as stream:
                stream.write(json.dumps(settings, indent=2).encode())
            return
        before = json.loads((self.folder / _JOB).read_text())
        self._same(before, settings, {*before, *settings})

    def _same(self, before: Mapping[str, Any], settings: Mapping[str, Any], names: Iterable[str]) -> None:
        for name in sorted(names):
            if before.get(name) != settings.get(name):
                raise UsageError(
                    f"the unfinished run in {self.folder} had {name} = {before.get(name)}, now it is "
                    f"{settings.get(name)}; use the same settings, or delete that folder to begin again"
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it; `UsageError` when one works there already.

        What was refused before anything was kept leaves no folder behind.
        """
        make_folder(self.folder)
        with held_folder(self.folder):
            try:
                yield
            finally:
                if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {".lock"}:
                    shutil.rmtree(self.folder)

    def exists(self) -> bool:
        """Whether a run was begun and not tidied up."""
        return (self.folder / _JOB).is_file()

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    def job_digest(self) -> str:
        """SHA-256 of everything that the result depends on."""
        return hashlib.sha256((self.folder / _JOB).read_bytes()).hexdigest()

    def finished(self) -> int:
        """Blocks whose results and following hidden states are all there."""
        numbers = [int(path.stem.split("-")[1]) for path in self.folder.glob("hidden-*.safetensors")]
        return max(numbers, default=0)

    def remove(self) -> None:
        """The run is over."""
        remove_folder(self.folder, self._out)

    # -- blocks -------------------------------------------------------------------------------------------------

    def save_block(
        self,
        layer: int,
        linears: Mapping[str, Int4Weight],
        changed: Mapping[str, NDArray[Any]],
        report: Mapping[str, Any],
    ) -> None:
        """Write a finished block."""
        tensors: dict[str, NDArray[Any]] = dict(changed)
        for module, weight in linears.items():
            tensors |= {f"{module}.{field}": array for field, array in pack(weight).items()}
        _write(self._block(layer), tensors, {"report": json.dumps(report)})

    def open_block(self, layer: int) -> SafetensorsFile:
        """A finished block's file."""
        return SafetensorsFile(self._block(layer))

    def block_report(self, layer: int) -> dict[str, Any]:
        """What `save_block` was given."""
        report: dict[str, Any] = json.loads(self.open_block(layer).metadata["report"])
        return report

    def _block(self, layer: int) -> Path:
        return self.folder / f"block-{layer:05}.safetensors"

    # -- hidden states ------------------------------------------------------------------------------------------

    def save_hidden(self, layer: int, hidden: Tensor, judged: Tensor | None) -> None:
        """Write the hidden states before block `layer`, f32, and delete older ones."""
        tensors = {"hidden": hidden.numpy()} | ({} if judged is None else {"judged": judged.numpy()})
        specs = [TensorSpec(name, "F32", tuple(array.shape)) for name, array in tensors.items()]
        write_safetensors(self._hidden(layer), specs, tensors.items())
        for path in self.folder.glob("hidden-*.safetensors"):
            if path != self._hidden(layer):
                path.unlink()

    def load_hidden(self, layer: int, into: Tensor) -> Tensor | None:
        """Copy the hidden states before block `layer` (P, B, S, C), f32, `into`; returns those of the held-out text."""
        file = SafetensorsFile(self._hidden(layer))
        kept = file.array("hidden")
        for path, rows in enumerate(kept):  # a sequence at a time: all of them may not fit into memory
            for row, values in enumerate(rows):
                into[path, row] = torch.from_numpy(values.copy())
        return torch.from_numpy(file.array("judged").copy()) if "judged" in file.specs else None

    # -- what the model wrote -----------------------------------------------------------------------------------

    def save_written(self, rows: list[list[int]], asked: str) -> None:
        """Keep what the model wrote; `asked` says for which model, seed and sizes."""
        array = np.asarray(rows, np.int64)
        write_safetensors(self._written, [TensorSpec.of("tokens", array)], [("tokens", array)], {"asked": asked})

    def load_written(self, asked: str) -> list[list[int]] | None:
        """What `save_written` kept for the same, or None."""
        if not self._written.is_file():
            return None
        file = SafetensorsFile(self._written)
        rows: list[list[int]] = file.array("tokens").tolist()
        return rows if file.metadata.get("asked") == asked else None

    @property
    def _written(self) -> Path:
        return self.folder / "self.safetensors"

    def _hidden(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05}.safetensors"


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    specs = widest_first(TensorSpec.of(name, array) for name, array in tensors.items())
    write_safetensors(path, specs, ((spec.name, tensors[spec.name]) for spec in specs), metadata)


def int4_names(module: str) -> tuple[str, ...]:
    """The tensors that a quantized module is stored as."""
    return tuple(f"{module}.{field}" for field in FIELDS)
