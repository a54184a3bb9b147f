"""`python -m benchmarks.gpu`: everything that needs a GPU, in one call: is it right, and how fast is it.

Ops against their twins, a tiny model against the CPU backend, then the 8B's shapes with random weights beside what the
same GPU copies and multiplies. Runs from a checkout with numpy, triton and cuda-bindings; torch is measured when it is
there. A table on stderr, one JSON document as the last line of stdout, also of a run that is stopped; what failed is in
its `failed`. Exit code 1 when something was wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from benchmarks.gpu import speed, torch_peer
from benchmarks.gpu.checks import operation, sampling, tiny_model
from benchmarks.gpu.models import compiled, eight_b, random_weights, tiny
from edgevl import __version__
from edgevl.backends.cuda import CudaRunner
from edgevl.backends.cuda_device import CudaDevice
from edgevl.console import note, print_json, table
from edgevl.contracts import CONTRACTS
from edgevl.errors import EdgevlError

_FAR = 0.1  # of the largest logit; the CPU rounds activations to int8


def main(arguments: list[str] | None = None, device: CudaDevice | None = None) -> int:
    """Check, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", choices=["checks", "speed"], help="half of it")
    parser.add_argument("--every", type=int, default=1, help="take every n-th case of each op")
    parser.add_argument("--tiny", action="store_true", help="the tiny model's shapes: a try of the command")
    given = parser.parse_args(arguments)
    try:
        gpu = device or CudaDevice("this benchmark runs kernels")
    except EdgevlError as error:
        note(f"benchmarks.gpu: {error}")
        return error.exit_code
    document: dict[str, Any] = {"gpu": gpu.name, "versions": _versions(gpu), "failed": {}}
    try:
        if given.only != "speed":
            _check(gpu, document, given.every)
        if given.only != "checks":
            _measure(gpu, document, given.tiny)
    finally:
        rows = [[section, name, str(value)] for section, content in document.items() for name, value in _items(content)]
        table(f"{gpu.name}", ["", "", ""], rows, to_stderr=True)
        print_json(document)
    return 0 if _good(document) else 1


def _versions(gpu: CudaDevice) -> dict[str, str]:
    """Of what the figures depend on; "driver" is the newest CUDA that it runs."""
    found = {"edgevl": __version__, "driver": gpu.driver_version}
    for name in ("triton", "cuda-bindings", "torch"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextmanager
def _section(document: dict[str, Any], name: str) -> Iterator[None]:
    """Whatever fails is written down, and the next section has its turn."""
    note(f"{name} …")
    try:
        yield
    except Exception as error:
        document["failed"][name] = f"{type(error).__name__}: {error}"


def _items(content: Any) -> list[tuple[str, Any]]:
    return list(content.items()) if isinstance(content, dict) else [("", content)]


def _check(gpu: CudaDevice, document: dict[str, Any], every: int) -> None:
    done: dict[str, Any] = {}
    document["operations"] = done
    for op in CONTRACTS:
        with _section(document, op):
            done[op] = operation(gpu, gpu.architecture, op, every)
    with _section(document, "sampling"):
        document["sampling"] = sampling(gpu, gpu.architecture)
    for name, kv in (("tiny_model", "f16"), ("tiny_model_int8_kv", "int8")):
        with _section(document, name):
            document[name] = tiny_model(gpu, gpu.architecture, kv)


def _good(document: dict[str, Any]) -> bool:
    """Whether nothing failed and nothing was wrong; a figure that is None was not finite."""
    models = [document[name] for name in ("tiny_model", "tiny_model_int8_kv") if name in document]
    within = [(entry["worst"], 1.0) for entry in document.get("operations", {}).values()]
    within += [(found["largest_difference"], _FAR) for found in models]
    right = [found[name] for found in models for name in ("steps_alike", "chosen_right")]
    right.append(document.get("sampling", {"wrong": 0})["wrong"] == 0)
    return not document["failed"] and all(right) and all(v is not None and v <= most for v, most in within)


def _measure(gpu: CudaDevice, document: dict[str, Any], small: bool) -> None:
    config = tiny() if small else eight_b()
    limits: dict[str, float | None] = {}
    document["limits"] = limits
    with _section(document, "copy"):
        copy = gpu.bandwidth(1 << 20 if small else 1 << 30)
        limits["copy_gigabytes_per_second"] = None if copy is None else round(copy / 1e9, 1)
    with _section(document, "torch's matrix product"):
        rate = torch_peer.matrix_rate()
        limits["matrix_teraflops"] = None if rate is None else round(rate / 1e12, 1)
    if not small:
        with _section(document, "torch's int4 linears"):
            peer = torch_peer.int4_step(config)
            limits["torch_int4_step_milliseconds"] = None if peer is None else round(peer * 1e3, 3)
    weights = random_weights(config)
    for kv in ("f16", "int8"):
        with _section(document, f"compiling and uploading, KV in {kv}"):
            most = replace(speed.LIMITS, kv=kv)
            code = compiled(config, weights, most, gpu.architecture)
            meter = speed.Meter(CudaRunner(config, most, weights, gpu, code), gpu, config, weights, limits)
            _run(meter, document, kv)
            meter.runner.close()
    document["goals"] = speed.goals(document)


def _run(meter: speed.Meter, document: dict[str, Any], kv: str) -> None:
    """Decoding with either cache; everything else with f16."""
    into = document if kv == "f16" else document.setdefault("int8_kv", {})
    into["planned_bytes"] = meter.runner.planned_bytes
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "decode_1": lambda: meter.decode(1),
        "decode_8": lambda: meter.decode(8),
        "decode_1_top_p": lambda: meter.decode(1, 0.7),
    }
    if kv == "f16":
        work |= {"prefill_2048": meter.prefill, "tower": meter.tower, "first_token": meter.first_token}
    for name, measure in work.items():
        with _section(document, name if kv == "f16" else f"int8_kv {name}"):
            into[name] = measure()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit: what was found until then is printed
    sys.exit(main())
