"""`python -m benchmarks.gpu`: everything that needs a GPU, in one call: is it right, and how fast is it.

Ops against their twins, a tiny model against the CPU backend, then the 8B's shapes with random weights beside what the
same GPU copies and multiplies. Runs from a checkout with numpy, triton and cuda-bindings; torch is measured when it is
there. A table on stderr, one JSON document as the last line of stdout; exit code 1 when something was wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from benchmarks.gpu import torch_peer
from benchmarks.gpu.checks import operations, sampling, tiny_model
from benchmarks.gpu.models import compiled, eight_b, random_weights, tiny
from benchmarks.gpu.speed import LIMITS, copy_bandwidth, decoding, goals, measure
from edgevl.backends.cuda import CudaRunner
from edgevl.backends.cuda_device import CudaDevice
from edgevl.console import note, print_json, table
from edgevl.errors import CapacityError, EdgevlError

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
        document: dict[str, Any] = {"gpu": gpu.name}
        good = True
        if given.only != "speed":
            good = _check(gpu, document, given.every)
        if given.only != "checks":
            _measure(gpu, document, given.tiny)
    except EdgevlError as error:
        note(f"benchmarks.gpu: {error}")
        return error.exit_code
    rows = [[section, name, str(value)] for section, content in document.items() for name, value in _items(content)]
    table(f"{gpu.name}", ["", "", ""], rows, to_stderr=True)
    print_json(document)
    return 0 if good else 1


def _items(content: Any) -> list[tuple[str, Any]]:
    return list(content.items()) if isinstance(content, dict) else [("", content)]


def _check(gpu: CudaDevice, document: dict[str, Any], every: int) -> bool:
    note("ops against their twins …")
    document["operations"] = operations(gpu, gpu.architecture, every)
    document["sampling"] = sampling(gpu, gpu.architecture)
    note("a tiny model against the CPU …")
    models = [tiny_model(gpu, gpu.architecture, kv) for kv in ("f16", "int8")]
    document |= {"tiny_model": models[0], "tiny_model_int8_kv": models[1]}
    right = all(found["worst"] <= 1 for found in document["operations"].values())
    right &= document["sampling"]["wrong"] == 0
    return right and all(found["steps_alike"] and found["largest_difference"] <= _FAR for found in models)


def _measure(gpu: CudaDevice, document: dict[str, Any], small: bool) -> None:
    config = tiny() if small else eight_b()
    note("what the GPU can do …")
    copy, rate = copy_bandwidth(gpu, 1 << 20 if small else 1 << 30), torch_peer.matrix_rate()
    peer = None if small else torch_peer.int4_step(config)
    note("compiling and uploading …")
    weights = random_weights(config)
    runner = CudaRunner(config, LIMITS, weights, gpu, compiled(config, weights, LIMITS, gpu.architecture))
    note("measuring …")
    document["limits"] = {
        "copy_gigabytes_per_second": round(copy / 1e9, 1),
        "matrix_teraflops": None if rate is None else round(rate / 1e12, 1),
        "torch_int4_step_milliseconds": None if peer is None else round(peer * 1e3, 3),
    }
    document["planned_bytes"] = runner.planned_bytes
    document |= measure(runner, gpu, config, copy, rate, lambda name: weights(name).nbytes)
    try:
        limits = replace(LIMITS, kv="int8")
        other = CudaRunner(config, limits, weights, gpu, compiled(config, weights, limits, gpu.architecture))
        document["int8_kv"] = decoding(other, gpu, config, copy, lambda name: weights(name).nbytes)
    except CapacityError as error:  # the weights are there twice
        document["int8_kv"] = str(error)
    document["goals"] = goals(document)


if __name__ == "__main__":
    sys.exit(main())
