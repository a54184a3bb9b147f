"""`python -m benchmarks.quantizers`: every int4 quantizer that can be installed, and ours, compared by one evaluator.

All get the same model (the demo's language model as a plain Llama), the same calibration tokens, 4 bits, the same group
size; head and embedding stay as they are. What each leaves is read as the weights that its model computes with, and
`quantize.measure` compares that with the f32 original: perplexity, mean KL, top-1, with standard errors. A tool that
cannot be installed or does not finish in time is listed with the reason. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environments import PeerError, environment, last_line
from benchmarks.quantizers.model import calibration_tokens, write_model, write_rounded
from benchmarks.quantizers.peers import FIRST, PEERS, Peer
from calibration import held_out_text
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.console import bytes_text, note, table
from edgevl.errors import EdgevlError
from edgevl.files import atomic_file
from quantize.job import quantize
from quantize.measure import compare
from quantize.settings import EFFORTS, QuantizeSettings

RUNNERS = Path(__file__).with_name("runners")
ROUND = "round to nearest"
SCHEMES = ("asym", "sym")
# no tool asks a hub for anything; GPTQModel wants to be told how many workers a CPU gets
_PLAIN = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_PLAIN |= {"GPTQMODEL_CPU_WORKERS": "2"}


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; exit code 0 when ours ran, whatever became of the others."""
    options = _options().parse_args(arguments)
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    original = write_model(options.model, work / "model", options.layers)
    tokens = calibration_tokens(original, options.calibration, options.samples, options.length, options.seed)
    (work / "tokens.json").write_text(json.dumps(tokens))
    text = held_out_text() if options.text is None else options.text.read_text(encoding="utf-8")
    rows = _finished(options)
    for name, scheme in _wanted(options):
        if any((row["name"], row["scheme"]) == (name, scheme) for row in rows):
            continue
        note(f"{name}, {scheme} …")
        row: dict[str, Any] = {"name": name, "scheme": scheme}
        try:
            out = work / "out" / f"{name.replace(' ', '-')}-{scheme}"
            row |= _one(name, scheme, original, out, options)
            row |= compare(original, open_checkpoint(out), text).to_json()
        except (EdgevlError, PeerError) as problem:
            row["failed"] = str(problem)
            note(f"{name}: {problem}")
        rows.append(row)
        _save(options, rows)
    _print(rows)
    print(json.dumps(_document(options, rows)))
    return 0 if not any("failed" in row for row in rows if row["name"].startswith("edgevl")) else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizers", description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, or a plain Llama checkpoint")
    parser.add_argument("--layers", type=int, help="only the first so many blocks, for a try")
    parser.add_argument("--only", nargs="*", help=f"of {', '.join((ROUND, *(p.name for p in PEERS), *_ours()))}")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=["asym"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="text", help="a set of edgevl's, a folder of texts, a .jsonl file")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="what is scored; default: edgevl's held-out text")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for each tool")
    parser.add_argument("--iters", help="AutoRound's iterations, for a try")
    parser.add_argument("--work", type=Path, default=Path("quantizers.work"), help="folder for all that is made")
    parser.add_argument("--environments", type=Path, help="folder of the tools' environments; default: in --work")
    parser.add_argument("--json", type=Path, help="also write the JSON here, after every tool")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds already, and go on with ours")
    return parser


def _finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """With --resume, the rows of an earlier run that compared under the same options and did not fail."""
    if not options.resume or options.json is None or not options.json.exists():
        return []
    before = json.loads(options.json.read_text())
    free = ("only", "schemes", "limit", "resume")
    wanted = {name: value for name, value in _document(options, [])["options"].items() if name not in free}
    found = {name: value for name, value in before["options"].items() if name not in free}
    if wanted != found:
        raise SystemExit(f"{options.json} holds a comparison under other options ({found}); name another file")
    return [row for row in before["rows"] if "failed" not in row]


def _ours() -> list[str]:
    return [f"edgevl {effort}" for effort in EFFORTS]


def _wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, scheme); a tool that knows one scheme runs with that one, once."""
    found: list[tuple[str, str]] = []
    for scheme in options.schemes:
        found += [(ROUND, scheme)]
        for peer in PEERS:
            own = "sym" if peer.symmetric_only else "asym" if peer.asymmetric_only else scheme
            if (peer.name, own) not in found:
                found.append((peer.name, own))
        found += [(name, scheme) for name in _ours()]
    return [(name, scheme) for name, scheme in found if not options.only or name in options.only]


def _one(name: str, scheme: str, original: Checkpoint, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize into `out`; with --resume, where an interrupted run of ours stopped. Seconds, memory, versions."""
    if not (options.resume and name in _ours()):
        for folder in (out, out.with_name(f"{out.name}.partial")):
            shutil.rmtree(folder, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    if name == ROUND:
        write_rounded(original, out, options.group_size, scheme == "sym")
        return {"seconds": round(time.monotonic() - began, 1)}
    if name in _ours():
        settings = QuantizeSettings(
            options.group_size,
            scheme,
            name.removeprefix("edgevl "),
            options.calibration,
            options.samples,
            options.length,
            seed=options.seed,
            measure=False,
            resume=options.resume,
        )
        report = quantize(str(original.path), out, settings)
        resumed = report["resumed_after_blocks"]  # then the seconds are not those of one run
        return {"seconds": report["seconds"], "resumed_after_blocks": resumed, "versions": {"edgevl": report["edgevl"]}}
    return _peer(next(peer for peer in PEERS if peer.name == name), scheme, original, out, options)


def _peer(peer: Peer, scheme: str, original: Checkpoint, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder = (options.environments or options.work / "environments").absolute()
    python = environment(peer.environment, FIRST + peer.packages, folder)
    extra = {"iters": options.iters} if options.iters and peer.runner == "auto_round" else {}
    job = {
        "model": str(original.path),
        "tokens": str(options.work.absolute() / "tokens.json"),
        "out": str(out),
        "group_size": options.group_size,
        "symmetric": scheme == "sym",
        "seed": options.seed,
        "options": {**peer.options, **extra},
    }
    path = out.with_name(f"{out.name}.job.json")
    path.write_text(json.dumps(job))
    log = out.with_name(f"{out.name}.log")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | _PLAIN
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [str(python), str(RUNNERS / f"run_{peer.runner}.py"), str(path)],
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                cwd=out.parent,
                env=kept,
                timeout=options.limit,
                check=False,
            )
        except subprocess.TimeoutExpired as problem:
            raise PeerError(f"did not finish in {options.limit:.0f} s") from problem
    if done.returncode:
        raise PeerError(f"ended with exit code {done.returncode}: {last_line(log.read_text(errors='replace'))}")
    facts: dict[str, Any] = json.loads((out / "facts.json").read_text())
    return facts


def _print(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in sorted(rows, key=lambda row: row.get("kl", float("inf"))):
        if "failed" in row:
            lines.append([row["name"], row["scheme"], row["failed"], "", "", "", ""])
            continue
        error = row["standard_errors"]
        perplexity = row["perplexity"]["quantized"]
        lines.append(
            [
                row["name"],
                row["scheme"],
                f"{perplexity:.2f} ± {(error['perplexity_ratio'] or 0) * row['perplexity']['original']:.2f}",
                f"{row['kl']:.4f} ± {error['kl'] or 0:.4f}",
                f"{100 * row['top1']:.1f} ± {100 * (error['top1'] or 0):.1f} %",
                f"{row['seconds']:.1f} s",
                bytes_text(row["peak_resident_bytes"]) if "peak_resident_bytes" in row else "",
            ]
        )
    original = next((row["perplexity"]["original"] for row in rows if "kl" in row), None)
    title = "int4 quantizers" + (f"; perplexity of the original {original:.2f}" if original else "")
    table(title, ["", "scheme", "perplexity", "mean KL", "top-1", "time", "memory"], lines)


def _document(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    chosen = {name: value for name, value in vars(options).items() if name not in ("work", "environments", "json")}
    chosen["text"] = "held out" if options.text is None else options.text.name
    return {"command": "python -m benchmarks.quantizers", "options": chosen, "cpus": os.cpu_count(), "rows": rows}


def _save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.json is not None:
        with atomic_file(options.json) as stream:
            stream.write(json.dumps(_document(options, rows), indent=1).encode())


if __name__ == "__main__":
    sys.exit(main())
