"""`python -m benchmarks.ablation`: what each ingredient of the quantizer, calibration set and build choice is worth.

The demo (or another checkpoint) is quantized once for each row, leaving one thing out or taking one more in, and each
result is compared with the original by `edgevl measure`: on held-out text, and on rendered pictures with `--images`.
Rows of `--what parts` quantize nothing: the same int4 checkpoint is built with another head or tower, and the bundle
itself is asked. Finished rows are kept in `--json` and not made again. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.bundles import on_pictures, on_text
from calibration import held_out_text
from deploy.build import BuildSettings, build
from edgevl.bundle import Bundle
from edgevl.checkpoint import open_checkpoint
from edgevl.console import note, table
from edgevl.files import atomic_file
from quantize.job import quantize
from quantize.measure import compare
from quantize.settings import EFFORTS, QuantizeSettings, Recipe

_CONTEXT = 2048  # tokens; no question about a picture needs more
_BALANCED = EFFORTS["balanced"]
_ROUNDED = Recipe(False, False, False, 0)
INGREDIENTS = {
    "round to nearest": _ROUNDED,
    "+ scales by activations": replace(_ROUNDED, scales=True),
    "+ v -> o": replace(_ROUNDED, scales=True, value_scale=True),
    "+ clips: fast": EFFORTS["fast"],
    "+ blocks reconstructed: balanced": _BALANCED,
    "balanced without v -> o": replace(_BALANCED, value_scale=False),
    "balanced without clips": replace(_BALANCED, clip=False),
    "balanced without AWQ scales": replace(_BALANCED, scales=False),
    "balanced, image tokens count as text": replace(_BALANCED, image_importance=1.0),
    "+ more steps: best": EFFORTS["best"],
}
CALIBRATIONS = ("text", "image-text", "mixed", "self")
PARTS = {
    "head f16, vision f16": {},
    "head int8": {"head": "int8"},
    "head int4": {"head": "int4"},
    "embedding int8": {"embed": "int8"},
    "vision int8": {"vision": "int8"},
    "head, embedding and vision int8": {"head": "int8", "embed": "int8", "vision": "int8"},
}


def main(arguments: list[str] | None = None) -> int:
    """Make the rows that are missing, print the table and one JSON document."""
    options = _options().parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    document = _document(options)
    rows: list[dict[str, Any]] = document["rows"]
    for name in _names(options):
        if any(row["name"] == name for row in rows):
            continue
        note(f"{name} …")
        out = options.work / "quantized"
        if options.what == "parts":
            rows.append({"name": name, **_built(options, PARTS[name])})
        else:
            for folder in (out, out.with_name(f"{out.name}.partial")):
                shutil.rmtree(folder, ignore_errors=True)
            rows.append({"name": name, **_quantized(options, name, out)})
        if options.json is not None:
            with atomic_file(options.json) as stream:
                stream.write(json.dumps(document, indent=1).encode())
    _print(options.what, rows)
    print(json.dumps(document))
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--what", choices=["ingredients", "calibrations", "parts"], default="ingredients")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checkpoint", help="for parts: MODEL in int4")
    parser.add_argument("--only", nargs="*", help="rows by name")
    parser.add_argument("--scheme", default="asym")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--images", type=int, default=0, help="rendered pictures to ask about")
    parser.add_argument("--work", type=Path, default=Path("ablation.work"), help="folder for all that is made")
    parser.add_argument("--json", type=Path, help="rows are kept here, and found again")
    return parser


def _names(options: argparse.Namespace) -> list[str]:
    every = {"ingredients": INGREDIENTS, "calibrations": CALIBRATIONS, "parts": PARTS}[options.what]
    if unknown := set(options.only or ()) - set(every):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: there are {', '.join(every)}")
    return [name for name in every if not options.only or name in options.only]


def _document(options: argparse.Namespace) -> dict[str, Any]:
    """What --json holds already of the same comparison, or the beginning of a new one."""
    chosen = {name: value for name, value in vars(options).items() if name not in ("only", "work", "json")}
    if options.json is not None and options.json.exists():
        found: dict[str, Any] = json.loads(options.json.read_text())
        if found["options"] != chosen:
            raise SystemExit(f"{options.json} holds rows made under other options; name another file")
        return found
    return {"command": "python -m benchmarks.ablation", "options": chosen, "rows": []}


def _quantized(options: argparse.Namespace, name: str, out: Path) -> dict[str, Any]:
    settings = QuantizeSettings(options.group_size, options.scheme, samples=options.samples, length=options.length)
    if options.what == "ingredients":
        settings = replace(settings, recipe=INGREDIENTS[name], measure=False)
    else:
        settings = replace(settings, calibration=name)
    began = time.monotonic()
    report = quantize(options.model, out, settings)
    seconds = round(time.monotonic() - began, 1)
    original, quantized = open_checkpoint(options.model), open_checkpoint(out)
    text = compare(original, quantized, held_out_text()).to_json()
    own = (report["quality"] or {}).get("kl_on_calibration")
    row = {"seconds": seconds, "text": text, "kl_on_calibration": own, "recipe": asdict(settings.chosen)}
    if options.images:
        build(str(out), options.work / "bundle", BuildSettings(context=_context(options.model), force=True))
        row["pictures"] = on_pictures(options.work / "bundle", options.images)
    return row


def _built(options: argparse.Namespace, chosen: dict[str, str]) -> dict[str, Any]:
    folder = options.work / "bundle"
    settings = BuildSettings(context=_context(options.model), force=True, **chosen)
    build(options.checkpoint or options.model, folder, settings)
    row: dict[str, Any] = {"bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file())}
    row["text"] = on_text(open_checkpoint(options.model), Bundle.open(folder), held_out_text())
    if options.images:
        row["pictures"] = on_pictures(folder, options.images)
    return row


def _context(model: str) -> int:
    return min(_CONTEXT, open_checkpoint(model).config.text.max_positions)


def _print(what: str, rows: list[dict[str, Any]]) -> None:
    tasks = list(next((row["pictures"] for row in rows if "pictures" in row), {}))
    lines = []
    for row in rows:
        text, errors = row["text"], row["text"].get("standard_errors", {})
        perplexity = text["perplexity"]["quantized"]
        kl = f"{text['kl']:.4f}" + (f" ± {errors['kl']:.4f}" if errors.get("kl") else "")
        last = f"{row['bytes'] / 1e6:.1f} MB" if what == "parts" else f"{row['seconds']:.0f} s"
        own = [f"{row['kl_on_calibration']:.4f}"] if what == "calibrations" else []
        scores = [f"{100 * row['pictures'][task]['value']:.1f} %" for task in tasks]
        lines.append([row["name"], f"{perplexity:.2f}", kl, f"{100 * text['top1']:.1f} %", *own, *scores, last])
    heads = ["", "perplexity", "mean KL", "top-1", *(["KL, its own text"] if what == "calibrations" else [])]
    table(what, [*heads, *tasks, "size" if what == "parts" else "time"], lines)


if __name__ == "__main__":
    sys.exit(main())
