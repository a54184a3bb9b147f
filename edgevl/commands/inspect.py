"""`edgevl inspect`: what is in a bundle, a checkpoint directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgevl.bundle import MANIFEST, Bundle, to_dict
from edgevl.console import bytes_text, print_json, table
from edgevl.errors import UsageError


@click.command(name="inspect", short_help="Show what is in a bundle or checkpoint.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare every digest of a bundle, however long it takes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(path: Path, verify: bool, as_json: bool) -> None:
    """Show the model, the weights by region and kind, limits, files and digests of PATH."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a bundle, a checkpoint directory or a GGUF file")
    found = inspect_bundle(path, verify) if (path / MANIFEST).exists() else inspect_checkpoint(path)
    if as_json:
        print_json(found)
        return
    for section, content in found.items():
        if isinstance(content, dict):
            table(section, ["", ""], [[str(k), _text(k, v)] for k, v in content.items()])
        elif isinstance(content, list):
            if content:
                table(section, list(content[0]), [[_text(k, v) for k, v in row.items()] for row in content])
        else:
            click.echo(f"{section}: {content}")


def inspect_bundle(path: Path, verify: bool) -> dict[str, Any]:
    """The bundle as JSON-ready data; opening checks it, `verify` compares all digests."""
    bundle = Bundle.open(path, verify)
    manifest = to_dict(bundle.manifest)
    groups: dict[tuple[str, str], list[int]] = {}
    seen: set[str] = set()
    for name, record in bundle.manifest.weights.items():
        tensors = [t for t in [*record.arrays.values(), record.bias] if t and t not in seen]
        seen.update(tensors)
        size = bundle.weight(name).nbytes if tensors else 0
        entry = groups.setdefault((record.region, record.kind), [0, 0])
        entry[0] += 1
        entry[1] += size
    return {
        "kind": "bundle",
        "digest": bundle.digest,
        "built by": f"edgevl {bundle.manifest.edgevl}, format {bundle.manifest.format}",
        "source": manifest["source"],
        "target": manifest["target"],
        "limits": manifest["limits"],
        "model": manifest["model"],
        "weights": [
            {"region": region, "kind": kind, "parts": count, "bytes": size}
            for (region, kind), (count, size) in sorted(groups.items())
        ],
        "kernels": [
            {
                "name": key,
                "architecture": bundle.manifest.target.architecture,
                "warps": record.warps,
                "shared bytes": record.shared,
                "bytes": bundle.manifest.files[record.file].bytes,
            }
            for key, record in bundle.manifest.kernels.items()
        ],
        "files": [{"name": n, **record} for n, record in manifest["files"].items() if not n.startswith("kernels/")],
        "golden": "recorded" if manifest["golden"] else "none",
    }


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as JSON-ready data, read from its headers."""
    from edgevl.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(path))
    groups: dict[tuple[str, str], list[int]] = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        region = "vision" if name.startswith("vision_model.") else "projector" if name.startswith("mlp1.") else "text"
        entry = groups.setdefault((region, spec.dtype), [0, 0])
        entry[0] += 1
        entry[1] += spec.nbytes
    q = checkpoint.quantization
    form = "none" if q is None else f"int{q.bits}, groups of {q.group_size}, {'sym' if q.symmetric else 'asym'}"
    return {
        "kind": "checkpoint",
        "digest": checkpoint.digest,
        "quantization": form,
        "model": checkpoint.config.to_json(),
        "weights": [
            {"region": region, "dtype": dtype, "tensors": count, "bytes": size}
            for (region, dtype), (count, size) in sorted(groups.items())
        ],
        "notes": " ".join(checkpoint.notes) or "none",
    }


def _text(key: str, value: object) -> str:
    if key == "bytes" and isinstance(value, int):
        return bytes_text(value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(k, v)}" for k, v in value.items())
    return str(value)
