"""The tools that are compared, and how each gets an environment of its own.

Each is installed beside the same torch. Where a tool's own pins forbid that one, it is installed without dependencies.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
_INSTALL_SECONDS = 1800


@dataclass(frozen=True)
class Peer:
    """One tool in one way of use."""

    name: str
    runner: str  # runners/run_NAME.py
    environment: str  # tools that share one share its name
    packages: tuple[tuple[str, ...], ...] = ()  # arguments of pip install, one call each
    symmetric_only: bool = False
    asymmetric_only: bool = False
    options: dict[str, str] = field(default_factory=dict)


_GPTQMODEL = (
    (
        *("transformers==5.23.0", "accelerate>=1.15.0", "safetensors>=0.8.0", "datasets>=5.1.0", "pyarrow>=26.0.0"),
        *("threadpoolctl", "packaging", "device-smi", "protobuf", "pillow", "requests", "pypcre", "logbar", "jinja2"),
        *("ninja", "maturin", "dill", "torchao", "setuptools>=84.2.1,<85", "wheel"),
    ),
    # these pin a newer torch
    ("--no-deps", "--no-build-isolation", "defuser", "tokenicer", "gptqmodel==7.7.0"),
)
PEERS = (
    Peer("HQQ", "hqq", "hqq", (("hqq==0.2.8.post1", "transformers==5.5.4", "accelerate"),), asymmetric_only=True),
    Peer("AutoAWQ", "autoawq", "autoawq", (
        ("transformers==4.51.3", "accelerate", "datasets", "zstandard", "tokenizers", "setuptools", "wheel"),
        ("--no-deps", "--no-build-isolation", "autoawq==0.2.9"),
    ), asymmetric_only=True),
    Peer("llm-compressor AWQ", "llm_compressor", "llm-compressor", (("llmcompressor==0.14.0.1",),)),
    Peer("ModelOpt AWQ lite", "modelopt", "modelopt", (
        ("nvidia-modelopt==0.47.0", "transformers==5.5.4", "accelerate", "requests"),
    ), symmetric_only=True),
    Peer("GPTQModel GPTQ", "gptqmodel", "gptqmodel", _GPTQMODEL),
    Peer("GPTQModel AWQ", "gptqmodel", "gptqmodel", _GPTQMODEL, options={"method": "awq"}),
    Peer("AutoRound", "auto_round", "auto-round", (("auto-round==0.16.1",),)),
)  # fmt: skip


class PeerError(Exception):
    """A peer that could not be installed or did not finish, and why."""


def environment(peer: Peer, folder: Path) -> Path:
    """The python of the peer's environment under `folder`, made when it is not there. Raises `PeerError`."""
    home = folder / peer.environment
    python = home / "bin" / "python"
    ready = home / ".ready"
    wanted = repr((TORCH, peer.packages))
    if ready.is_file() and ready.read_text() == wanted:
        return python
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(home)])
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _call([*pip, TORCH, "numpy"])
    constraint = home / "constraints.txt"
    constraint.write_text(f"{TORCH}\n")
    for packages in peer.packages:
        _call([*pip, "-c", str(constraint), *packages])
    ready.write_text(wanted)
    return python


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired as problem:
        raise PeerError(f"installing took more than {_INSTALL_SECONDS} s") from problem
    if done.returncode:
        raise PeerError(f"installing failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1][:300] if lines else "no message"
