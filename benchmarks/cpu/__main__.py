"""`python -m benchmarks.cpu`: edgevl and the other runtimes on this processor, the same tokens, several rounds in turn.

Installs each runtime into an environment of its own, makes each one's model from the demo's language model, and runs
them one after the other, every run in a fresh process. What memory can deliver and what the int8 instructions can
compute is measured in every round beside them. A runtime that cannot be installed or fails is listed with the reason.
An interrupted run goes on where it stopped. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.models import eight_b, tower
from benchmarks.cpu.peers import ROWS, RUNNERS, Row, python_of
from benchmarks.cpu.runners.runner import CLOCKS, Job
from benchmarks.environments import PeerError, last_line
from edgevl.backends.cpu import available_threads
from edgevl.checkpoint import open_checkpoint
from edgevl.commands.doctor import processor
from edgevl.console import bytes_text, note, table
from edgevl.demo import demo_checkpoint, find_gguf
from edgevl.errors import EdgevlError
from edgevl.files import atomic_file
from edgevl.probes import int8_rate, read_bandwidth
from edgevl.traffic import operations, tower_operations

_VOCABULARY = 49152  # of the demo; ids below it are words for every model here
# what is asked of each model
CASES: dict[str, dict[str, Any]] = {
    "demo": {"prefill": [64, 512, 2048], "depths": [0, 2048], "generate": 32, "repeats": 2},
    "8b": {"prefill": [128], "depths": [0], "generate": 12, "repeats": 1},
    "tower": {"tiles": 1, "repeats": 2},
    "demo tower": {"tiles": 1, "repeats": 5},
}
_SLOTS = 8  # of batched decoding, edgevl only


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; exit code 0 when ours ran, whatever became of the others."""
    parser = _options()
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu counts the time of a whole process; it goes with --threads 1")
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    document = _begin(options)
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    ready = {row.name: found for row in rows if (found := _prepare(row, options, document)) is not None}
    for number in range(options.rounds):
        for threads in options.threads:
            _limits(options, document, number, threads)
            for row in rows:
                if row.name in ready and (row.model == "demo" or threads == max(options.threads)):
                    _one(row, number, threads, ready[row.name], options, document)
    _print(document)
    print(json.dumps(document | {"summary": _summary(document)}))
    return 1 if any(name.startswith("edgevl") for name in document["failed"]) else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--rounds", type=int, default=3)
    every = available_threads()
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, every}))
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for one thread, beside other work"
    )
    parser.add_argument("--blocks", type=int, default=0, help="of the 8B's 32 blocks, where memory is short; 0: all")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each run")
    parser.add_argument("--work", type=Path, default=Path("cpu.work"), help="folder for all that is made; kept")
    parser.add_argument("--environments", type=Path, help="folder of the environments; default: in --work")
    parser.add_argument("--json", type=Path, help="written after every run, and gone on with when it is there")
    return parser


def _begin(options: argparse.Namespace) -> dict[str, Any]:
    asked = {"blocks": options.blocks, "clock": options.clock}
    document = {
        "command": "python -m benchmarks.cpu",
        "options": asked,
        "machine": {"processor": processor(), "cpus": os.cpu_count()},
        "limits": [],
        "runs": [],
        "failed": {},
    }
    if options.json is None or not options.json.exists():
        return document
    before: dict[str, Any] = json.loads(options.json.read_text())
    if before["options"] != asked:
        raise SystemExit(f"{options.json} holds a comparison under other options ({before['options']})")
    before["failed"] = {}
    return before


def _save(options: argparse.Namespace, document: dict[str, Any]) -> None:
    if options.json is not None:
        with atomic_file(options.json) as stream:
            stream.write(json.dumps(document, indent=1).encode())


def _prepare(row: Row, options: argparse.Namespace, document: dict[str, Any]) -> tuple[str, Path] | None:
    """The job's model and the python that runs it; None when it cannot be had."""
    note(f"{row.name}: preparing …")
    environments = (options.environments or options.work / "environments").absolute()
    try:
        python = python_of(row, environments) if row.runner else Path(sys.executable)
        return row.prepare(options.work.absolute(), environments), python
    except (EdgevlError, PeerError) as problem:
        document["failed"][row.name] = str(problem)
        note(f"{row.name}: {problem}")
        return None


def _limits(options: argparse.Namespace, document: dict[str, Any], number: int, threads: int) -> None:
    """What the machine can do at most, now."""
    if any((found["round"], found["threads"]) == (number, threads) for found in document["limits"]):
        return
    clock = CLOCKS[options.clock]
    found = {"read_gb_s": read_bandwidth(threads, 3, clock), "int8_gop_s": int8_rate(threads, 3, clock)}
    document["limits"].append({"round": number, "threads": threads, **found})


def _one(
    row: Row, number: int, threads: int, ready: tuple[str, Path], options: argparse.Namespace, document: dict[str, Any]
) -> None:
    if any((r["name"], r["round"], r["threads"]) == (row.name, number, threads) for r in document["runs"]):
        return
    note(f"round {number + 1}, {threads} threads: {row.name} …")
    model, python = ready
    ids = np.random.default_rng(0).integers(0, _VOCABULARY, 2048 + 256).tolist()
    job = Job(model, threads, ids, **CASES[row.model], clock=options.clock)
    if row.runner is None and row.model == "demo":
        job.slots = _SLOTS
    if row.runner is None and row.model in ("8b", "tower"):
        job.blocks = options.blocks
    path = options.work.absolute() / "job.json"
    path.write_text(json.dumps(asdict(job)))
    program = ["-m", "benchmarks.cpu.own"] if row.runner is None else [str(RUNNERS / f"run_{row.runner}.py")]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if row.runner is None:
        kept["PYTHONPATH"] = str(Path(__file__).parents[2])
    try:
        done = subprocess.run(
            [str(python), *program, str(path)],
            capture_output=True,
            text=True,
            cwd=options.work,
            env=kept | {"HF_HUB_OFFLINE": "1"},
            timeout=options.limit,
            check=False,
        )
        if done.returncode:
            raise PeerError(f"ended with exit code {done.returncode}: {last_line(done.stderr)}")
        measured = json.loads(done.stdout.splitlines()[-1])
    except (PeerError, subprocess.TimeoutExpired, json.JSONDecodeError, IndexError) as problem:
        document["failed"][row.name] = str(problem)
        note(f"{row.name}: {problem}")
        return
    document["runs"].append({"name": row.name, "model": row.model, "round": number, **measured})
    _save(options, document)


# -- what comes of it -------------------------------------------------------------------------------------------------


def _summary(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each row and number of threads: rates (median, spread), shares of the limits of the same run."""
    found = []
    for name, threads in dict.fromkeys((run["name"], run["threads"]) for run in document["runs"]):
        runs = [r for r in document["runs"] if (r["name"], r["threads"]) == (name, threads)]
        limits = [limit for limit in document["limits"] if limit["threads"] == threads]
        entry: dict[str, Any] = {"name": name, "model": runs[0]["model"], "threads": threads, "rounds": len(runs)}
        entry["limits"] = {key: _median([limit[key] for limit in limits]) for key in ("read_gb_s", "int8_gop_s")}
        entry["cases"] = _cases(runs, entry["limits"], document["options"]["blocks"])
        for key in ("load_seconds", "first_token_seconds", "resident_bytes", "model_bytes", "planned_bytes"):
            if key in runs[0]:
                entry[key] = _median([run[key] for run in runs])
        found.append(entry)
    return found


def _cases(runs: list[dict[str, Any]], limits: dict[str, float], blocks: int) -> dict[str, dict[str, float]]:
    model, first = runs[0]["model"], runs[0]
    generate = CASES[model].get("generate", 0)
    cases: dict[str, dict[str, float]] = {}
    for length in first.get("prefill", {}):
        case = cases[f"prefill {length}"] = _rate(int(length), [run["prefill"][length] for run in runs])
        used = operations(_text(model, blocks), int(length)) / int(length) * case["rate"] / 1e9
        case |= {"gop_s": used, "share": used / limits["int8_gop_s"]}
    for depth in first.get("decode", {}):
        case = cases[f"decode {depth}"] = _rate(generate, [run["decode"][depth] for run in runs])
        if "step_bytes" in first:
            used = first["step_bytes"][depth] * case["rate"] / 1e9
            # memory varies from minute to minute: its limit is measured right after, in the same process
            case |= {"gb_s": used, "share": used / _median([run["read_gb_s"] for run in runs])}
    if "batched" in first:
        cases[f"{_SLOTS} slots"] = _rate(generate * _SLOTS, [run["batched"] for run in runs])
    if "tile_seconds" in first:
        case = cases["tiles"] = _rate(1, [run["tile_seconds"] for run in runs])
        used = tower_operations(_vision(model, blocks)) * case["rate"] / 1e9
        case |= {"gop_s": used, "share": used / limits["int8_gop_s"]}
    return cases


def _text(model: str, blocks: int) -> Any:
    return eight_b(blocks).text if model == "8b" else open_checkpoint(find_gguf()).config.text


def _vision(model: str, blocks: int) -> Any:
    return (tower(blocks) if model == "tower" else open_checkpoint(demo_checkpoint()).config).vision


def _rate(count: int, seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Units a second: the median of all repeats, and (highest - lowest) / median."""
    rates = [count / each for times in seconds for each in times]
    return {"rate": _median(rates), "spread": (max(rates) - min(rates)) / _median(rates)}


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _print(document: dict[str, Any]) -> None:
    summary = _summary(document)
    for model, threads in dict.fromkeys((entry["model"], entry["threads"]) for entry in summary):
        entries = [e for e in summary if (e["model"], e["threads"]) == (model, threads)]
        columns = list(dict.fromkeys(case for entry in entries for case in entry["cases"]))
        lines = []
        for entry in entries:
            cells = [_cell(entry["cases"].get(column)) for column in columns]
            load = f"{entry['load_seconds']:.2f} s" if "load_seconds" in entry else ""
            lines.append([entry["name"], *cells, load, _memory(entry) if load else ""])
        ours = entries[0]
        for other in entries[1:]:
            if ours["name"].startswith("edgevl"):
                cells = [_ratio(ours["cases"].get(c), other["cases"].get(c)) for c in columns]
                lines.append([f"edgevl / {other['name']}", *cells, "", ""])
        limit = entries[0]["limits"]
        title = (
            f"{model}, {threads} thread{'s' * (threads > 1)}; measured beside it: memory {limit['read_gb_s']:.1f} GB/s"
        )
        title += f", int8 {limit['int8_gop_s']:.0f} GOP/s"
        table(title, ["per second", *columns, "load", "memory"], lines)
    for name, reason in document["failed"].items():
        note(f"{name}: {reason}")


def _memory(entry: dict[str, Any]) -> str:
    """What the process holds, and for ours how much of it came with the model, of what was planned."""
    text = bytes_text(int(entry["resident_bytes"]))
    if "model_bytes" not in entry:
        return text
    return f"{text}; {bytes_text(int(entry['model_bytes']))} of {bytes_text(int(entry['planned_bytes']))} planned"


def _cell(case: dict[str, float] | None) -> str:
    if case is None:
        return "–"
    text = f"{case['rate']:.{0 if case['rate'] >= 100 else 2}f} ± {100 * case['spread'] / 2:.0f} %"
    if "share" in case:
        unit = f"{case['gb_s']:.1f} GB/s" if "gb_s" in case else f"{case['gop_s']:.0f} GOP/s"
        text += f" ({unit}, {100 * case['share']:.0f} %)"
    return text


def _ratio(ours: dict[str, float] | None, other: dict[str, float] | None) -> str:
    return f"{ours['rate'] / other['rate']:.2f}" if ours and other else "–"


if __name__ == "__main__":
    sys.exit(main())
