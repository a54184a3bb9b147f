"""The tools that are compared, and how each gets an environment of its own.

Each is installed beside the same torch. Where a tool's own pins forbid that one, it is installed without dependencies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.environments import TORCH

FIRST = ((TORCH, "numpy"),)  # what every environment begins with


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
