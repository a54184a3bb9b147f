"""Compiles GPU kernels ahead of time for a target's SM: cubins and how each is launched. Needs no GPU and no driver.

The compiler runs in processes of its own (`deploy.kernels.compiler`); what it made is kept in the cache, under a digest
of the kernels' sources, the compiler's version and the job. Called by `deploy.build`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from deploy.kernels.tuning import SHARED_LIMIT, tuning
from edgevl.backends.cuda_kernels import POINTER_ALIGN, Kernel, KernelRecord
from edgevl.cache import cache_directory
from edgevl.errors import EdgevlError, MissingExtraError, UsageError
from edgevl.files import atomic_file

Progress = Callable[[str, int, int], None]  # stage, done, total
Job = dict[str, Any]

_OLDEST = (3, 6)  # of Triton: before, kernels took their arguments otherwise
_SOURCES = Path(__file__).parent / "kernels"


def compile_kernels(
    kernels: Mapping[str, Kernel], architecture: str, progress: Progress = lambda *_: None
) -> dict[str, tuple[KernelRecord, bytes]]:
    """Record and cubin of each kernel, by key, for an SM such as "sm_87".

    Raises `MissingExtraError` without Triton, `UsageError` for an unknown SM, and `EdgevlError` when a kernel does not
    compile or needs more shared memory than the SM has, or Triton is too old.
    """
    if architecture not in SHARED_LIMIT:
        raise UsageError(f"there are no kernels for {architecture}; they are compiled for {', '.join(SHARED_LIMIT)}")
    version = compiler_version()
    jobs = {key: _job(kernel, architecture) for key, kernel in kernels.items()}
    places = {key: _cache_path(job, version) for key, job in jobs.items()}
    answers = {key: answer for key, path in places.items() if (answer := _cached(path)) is not None}
    pending = {key: job for key, job in jobs.items() if key not in answers}
    for key, answer in _run(pending, lambda done: progress("kernels", len(answers) + done, len(jobs))).items():
        answers[key] = answer
        places[key].parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(places[key]) as stream:
            stream.write(json.dumps(answer).encode())
    progress("kernels", len(jobs), len(jobs))
    return {key: _finish(key, kernel, jobs[key], answers[key]) for key, kernel in kernels.items()}


def compiler_version() -> str:
    """The version of Triton, which is not imported here; `EdgevlError` for one that is too old."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("building GPU kernels", "triton", "'edgevl[deploy]'") from error
    if tuple(int(number) for number in version.split(".")[:2]) < _OLDEST:
        raise EdgevlError(
            f"building GPU kernels needs triton {_OLDEST[0]}.{_OLDEST[1]}, this is {version}; "
            "`pip install 'edgevl[deploy]'` brings a newer one"
        )
    return version


def _job(kernel: Kernel, architecture: str) -> Job:
    """What the compiler is told."""
    tuned = tuning(kernel.name, kernel.variant, architecture)
    return {
        "name": kernel.name,
        "arguments": kernel.arguments,
        "constants": kernel.constants,
        "tiles": tuned.tiles,
        "warps": tuned.warps,
        "stages": tuned.stages,
        "architecture": architecture,
        "align": POINTER_ALIGN,
    }


def _cache_path(job: Job, version: str) -> Path:
    digest = hashlib.sha256(version.encode())
    for source in sorted(_SOURCES.glob("*.py")):
        if source.name != "tuning.py":  # its numbers are in the job
            digest.update(source.read_bytes())
    digest.update(json.dumps(job, sort_keys=True).encode())
    return cache_directory() / "kernels" / f"{digest.hexdigest()}.json"


def _cached(path: Path) -> Job | None:
    with suppress(OSError, ValueError):
        answer: Job = json.loads(path.read_bytes())
        return answer if {"symbol", "shared", "cubin"} <= answer.keys() else None
    return None


def _run(jobs: Mapping[str, Job], moved: Callable[[int], None]) -> dict[str, Job]:
    """Answers to jobs, from as many compilers as there are processors."""
    waiting: queue.SimpleQueue[tuple[str, Job]] = queue.SimpleQueue()
    for item in jobs.items():
        waiting.put(item)
    answers: dict[str, Job] = {}
    with tempfile.TemporaryDirectory(prefix="edgevl-triton-") as folder:

        def work(_: int) -> None:
            with tempfile.TemporaryFile(dir=folder) as said, _compiler(folder, said) as process:
                assert process.stdin is not None and process.stdout is not None
                while True:
                    try:
                        key, job = waiting.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        process.stdin.write(json.dumps(job) + "\n")
                        process.stdin.flush()
                        answers[key] = json.loads(process.stdout.readline())
                    except (BrokenPipeError, ValueError):  # it died, before it answered or in the middle
                        with suppress(BrokenPipeError):
                            process.stdin.close()
                        process.wait()
                        answers[key] = {"error": f"the compiler died ({_last_line(said)})"}
                        return
                    moved(len(answers))

        count = min(len(jobs), os.cpu_count() or 1)
        with ThreadPoolExecutor(max(count, 1)) as pool:
            list(pool.map(work, range(count)))
    for key, answer in answers.items():
        if "error" in answer:
            raise EdgevlError(f"the kernel {key} does not compile for {jobs[key]['architecture']}: {answer['error']}")
    return answers


def _compiler(folder: str, said: IO[bytes]) -> subprocess.Popen[str]:
    root = str(_SOURCES.parent.parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {
        "TRITON_CACHE_DIR": folder,
        "TRITON_DISABLE_LINE_INFO": "1",  # a third of the size
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "deploy.kernels.compiler"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
    )


def _last_line(said: IO[bytes]) -> str:
    """What a process that died said last."""
    said.seek(0)
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _finish(key: str, kernel: Kernel, job: Job, answer: Job) -> tuple[KernelRecord, bytes]:
    """Check what came out against what the SM has; the compiler does not."""
    limit = SHARED_LIMIT[job["architecture"]]
    if answer["shared"] > limit:
        raise EdgevlError(
            f"the kernel {key} needs {answer['shared']:,} bytes of shared memory, {job['architecture']} has {limit:,}; "
            "give it smaller blocks or fewer stages in deploy/kernels/tuning.py"
        )
    tiles = {name: size for name, size in (*kernel.constants, *job["tiles"]) if name.startswith("BLOCK")}
    record = KernelRecord(f"kernels/{key}.cubin", answer["symbol"], job["warps"], answer["shared"], kernel.types, tiles)
    return record, base64.b64decode(answer["cubin"])
