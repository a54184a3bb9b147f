"""`python -m benchmarks.kill_resume --times 50`: quantize, killed at random moments, always ends in the same bytes.

A process is killed with SIGKILL at a moment drawn from the length of an uninterrupted run, more often before it writes
its output, and the next one goes on with --resume; every other one, drawn too, is left to end. A run that ends is
compared, file by file, with the uninterrupted one, and what lies beside the output is looked at: nothing may be left.
The processes are forked from one that has imported torch but run nothing, so that imports do not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import TINY, write_llama


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every run that ended gave the same bytes and left nothing beside them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_resume", description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="processes to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", default="text", help="also try self")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgevl-kill-") as folder:
        result = kill_and_resume(Path(folder), options.times, options.seed, options.calibration)
    print(json.dumps(result))
    return 0 if not result["different"] and not result["left_over"] else 1


def kill_and_resume(folder: Path, times: int, seed: int = 0, calibration: str = "text") -> dict[str, Any]:
    """Kill `times` processes; returns what came of it. Works in `folder`."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["quantize.job", "matplotlib.figure", "matplotlib.backends.backend_svg"])
    model = write_llama(folder / "model", TINY)
    work = (str(model), calibration)
    began = time.monotonic()
    for _ in range(2):  # the first run also starts the fork server
        shutil.rmtree(folder / "whole", ignore_errors=True)
        began = time.monotonic()
        whole = processes.Process(target=_quantize, args=(*work, str(folder / "whole")))
        whole.start()
        whole.join()
        if whole.exitcode:
            raise RuntimeError(f"the uninterrupted run ended with {whole.exitcode}")
    length = time.monotonic() - began
    early = sum(json.loads((folder / "whole" / "report.json").read_text())["stages"].values())  # until it writes
    moments = random.Random(seed)
    killed = ended = 0
    different: list[str] = []
    left_over: list[str] = []
    stages: dict[str, int] = {}
    while killed < times or ended == 0:
        out = folder / "runs" / "out"
        out.parent.mkdir(exist_ok=True)
        process = processes.Process(target=_quantize, args=(*work, str(out)))
        process.start()
        spared = killed == times or (any(out.parent.iterdir()) and moments.random() < 0.5)
        process.join(None if spared else moments.uniform(0, early if moments.random() < 0.7 else length))
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
            stage = _stage(out)
            stages[stage] = stages.get(stage, 0) + 1
            print(f"killed {killed} of {times}: {stage}", file=sys.stderr)
            if not out.exists():
                continue
            # the output was there already; what was left to do is done by the next process
            process = processes.Process(target=_quantize, args=(*work, str(out)))
            process.start()
            process.join()
        ended += 1
        if process.exitcode not in (0, _COMPLETE):
            different.append(f"run {ended} ended with exit code {process.exitcode}")
        names = {path.name for path in (*out.iterdir(), *(folder / "whole").iterdir()) if path.stem != "report"}
        different += [
            f"run {ended}: {name}" for name in sorted(names) if not _same(out / name, folder / "whole" / name)
        ]
        left_over += [f"run {ended}: {path.name}" for path in out.parent.iterdir() if path != out]
        shutil.rmtree(out.parent)
    return {
        "command": "python -m benchmarks.kill_resume",
        "calibration": calibration,
        "killed": killed,
        "killed_when": stages,
        "runs_completed": ended,
        "seconds_uninterrupted": round(length, 2),
        "different": different,
        "left_over": left_over,
    }


_COMPLETE = 3


def _quantize(model: str, calibration: str, out: str) -> None:
    """What a process does: quantize, or go on."""
    import torch

    from edgevl.errors import UsageError
    from quantize.job import quantize
    from quantize.settings import QuantizeSettings

    torch.set_num_threads(1)
    # activations on the disk, as they are for a model too large for memory
    settings = QuantizeSettings(calibration=calibration, samples=4, length=128, max_activations=1, resume=True)
    try:
        quantize(model, Path(out), settings)
    except UsageError as error:
        if "already exists" in str(error):  # killed after the very last step
            sys.exit(_COMPLETE)
        raise


def _stage(out: Path) -> str:
    """How far a killed process had come, as the disk tells."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists():
        return "output complete"
    if not (partial / "job.json").exists():
        return "before the job was written"
    done = max((int(path.stem.split("-")[1]) for path in partial.glob("hidden-*")), default=0)
    return f"{done} blocks done" + (", writing" if any(out.parent.glob(".*.staging")) else "")


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
