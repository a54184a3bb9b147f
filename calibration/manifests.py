"""What the built-in sets are made of: source, licence and digest of every file, as `manifests/NAME.json` says.

Manifests are data: a set's files are checked against them before they are used, and the quantizer's report quotes them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgevl.errors import EdgevlError

SETS = ("text", "image-text", "mixed", "self")
_HERE = Path(__file__).parent


def manifest(name: str) -> dict[str, Any]:
    """The manifest of a built-in set: `name`, `what`, `pictures` (the share of samples that have one) and `sources`.

    Each source has `what`, `licence`, and `file` with `sha256` where it is a file. Raises `EdgevlError` when a file is
    not the one that the manifest promises.
    """
    content: dict[str, Any] = json.loads((_HERE / "manifests" / f"{name}.json").read_text(encoding="utf-8"))
    for source in content["sources"]:
        if "file" in source and _sha256(_HERE / source["file"]) != source["sha256"]:
            raise EdgevlError(
                f"the calibration text {_HERE / source['file']} is not what its manifest says; install edgevl again"
            )
    return content


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
