"""The report beside a quantized checkpoint: report.json for scripts, report.html for people.

Gathers what the blocks, the measurement and the watch found; the page is drawn by `quantize.report_page`. Called by
`quantize.job` when a run ends and by `edgevl measure --report`, which fills in what it measured.
"""

from __future__ import annotations

import base64
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevl import __version__
from edgevl.checkpoint import Checkpoint
from edgevl.errors import UsageError
from edgevl.files import atomic_file, sha256_file
from quantize.groups import BlockTable, ScaleGroup
from quantize.observe import Observations
from quantize.output import KEPT
from quantize.report_page import Picture, draw_page
from quantize.watch import Watch

REPORT = "report.json"
PAGE = "report.html"

_BINS = 256  # channels are pooled to at most so many
_MAP = (64, 128)  # rows and columns of a weight picture
_WORST = 3  # scale groups that are shown


@dataclass(frozen=True)
class Facts:
    """What the job knows of itself."""

    settings: dict[str, Any]
    calibration: dict[str, Any]
    job: str  # digest of everything that the result depends on
    resumed: int  # blocks that an earlier process had finished
    watch: Watch
    estimate: int  # bytes of memory that were expected


def channels(group: ScaleGroup, tensors: dict[str, Tensor], seen: Observations) -> dict[str, list[float]]:
    """Of a scale group's input: the mean |activation| and the mean |weight| of each channel, pooled by maximum."""
    weights = torch.cat([tensors[f"{linear}.weight"] for linear in group.linears]).abs().mean(dim=0)
    return {"activation": _pooled(seen.mean_abs[group.input_part]), "weight": _pooled(weights)}


def make_report(
    checkpoint: Checkpoint,
    folder: Path,
    blocks: list[dict[str, Any]],
    quality: dict[str, Any] | None,
    facts: Facts,
) -> dict[str, Any]:
    """report.json of the checkpoint that lies in `folder`; `quality` is what was measured."""
    regions = ("vision", "projector", "embed", "head") if checkpoint.config.vision else ("embed", "head")
    others = sum(seconds for stage, seconds in facts.watch.seconds.items() if stage != "blocks")
    seen = {block["layer"]: block.pop("channels") for block in blocks}
    ranked = sorted(((g["error_chosen"], b["layer"], g["group"]) for b in blocks for g in b["groups"]), reverse=True)
    worst = [
        {"layer": layer, "group": group, "error": error, **seen[layer][group]}
        for error, layer, group in ranked[:_WORST]
    ]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "edgevl": __version__,
        "job": facts.job,
        "source": {"name": Path(checkpoint.path).name, "digest": checkpoint.digest},
        "settings": facts.settings,
        "calibration": facts.calibration,
        "quantized": "q, k, v, o, gate, up and down projections of every decoder block",
        "kept": {KEPT[region][0]: KEPT[region][1] for region in regions},
        "error": float(np.mean([block["error"] for block in blocks])),
        "quality": quality,
        "blocks": blocks,
        "worst": worst,
        "bytes": {
            "original": sum(checkpoint.spec(name).nbytes for name in checkpoint.names()),
            "quantized": sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
        },
        "seconds": round(sum(block["seconds"] for block in blocks) + others, 1),
        "stages": dict(facts.watch.seconds),
        "resumed_after_blocks": facts.resumed,
        "memory": {
            "estimated_bytes": facts.estimate,
            "interpreter_bytes": facts.watch.base,
            "peak_own_bytes": facts.watch.own_peak,
            "peak_own_bytes_by_stage": dict(facts.watch.peaks),
            "peak_resident_bytes": facts.watch.peak,
        },
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "sha256": {path.name: sha256_file(path) for path in files},
    }


def pictured(checkpoint: Checkpoint, tables: list[BlockTable], report: dict[str, Any]) -> list[Picture]:
    """The weights of the worst scale groups, read again from the original."""
    pictures = []
    for entry in report["worst"]:
        group = next(g for g in tables[entry["layer"]].groups if g.name == entry["group"])
        weight = np.abs(np.asarray(checkpoint.array(f"{group.linears[0]}.weight"), np.float32))
        pictures.append(Picture(entry["layer"], group.name, group.linears[0], _shrunk(weight)))
        checkpoint.release()
    return pictures


def write_report(folder: Path, report: dict[str, Any], pictures: list[Picture]) -> None:
    """Both files, each whole or not at all. The page keeps the pictures as data, so that it can be drawn again."""
    kept: list[dict[str, Any]] = [
        {"layer": p.layer, "group": p.group, "linear": p.linear, **_packed(p.map)} for p in pictures
    ]
    page = draw_page(report, pictures)
    with atomic_file(folder / REPORT) as stream:
        stream.write((json.dumps({**report, "pictures": kept}, indent=1, ensure_ascii=False) + "\n").encode())
    with atomic_file(folder / PAGE) as stream:
        stream.write(page.encode())


def add_measurement(folder: Path, measured: dict[str, Any]) -> None:
    """Put what `edgevl measure` found into the report of the checkpoint in `folder`, and draw the page again.

    A checkpoint without a report, another tool's, gets one that holds the measurement alone.
    """
    report: dict[str, Any] = (
        read_report(folder) if (folder / REPORT).is_file() else {"edgevl": __version__, "blocks": [], "worst": []}
    )
    pictures = [Picture(p["layer"], p["group"], p["linear"], _unpacked(p)) for p in report.pop("pictures", [])]
    kept = {k: v for k, v in (report.get("quality") or {}).items() if k == "kl_on_calibration"}
    write_report(folder, {**report, "quality": {**kept, **measured}}, pictures)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint; `UsageError` when it is damaged."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UsageError(f"{folder / REPORT} cannot be read ({problem}); delete it to have a new one made") from problem
    if not isinstance(report, dict):
        raise UsageError(f"{folder / REPORT} is not a report; delete it to have a new one made")
    return report


def _pooled(values: Tensor) -> list[float]:
    """At most 256 values, four digits each."""
    width = -(-values.numel() // _BINS)
    padded = torch.nn.functional.pad(values, (0, -values.numel() % width))
    return [float(f"{value:.4g}") for value in padded.reshape(-1, width).amax(dim=1).tolist()]


def _shrunk(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K) -> at most 64 x 128, pooled by maximum."""
    for axis, most in enumerate(_MAP):
        edges = np.unique(np.linspace(0, weight.shape[axis], most + 1).astype(int))[:-1]
        weight = np.maximum.reduceat(weight, edges, axis=axis)
    return weight


def _packed(values: NDArray[np.float32]) -> dict[str, Any]:
    return {"shape": list(values.shape), "float16": base64.b64encode(values.astype("<f2").tobytes()).decode()}


def _unpacked(packed: dict[str, Any]) -> NDArray[np.float32]:
    values = np.frombuffer(base64.b64decode(packed["float16"]), np.float16).astype(np.float32)
    return np.reshape(values, tuple(packed["shape"]))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"
