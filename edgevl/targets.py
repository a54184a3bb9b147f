"""The machines that bundles are for: one table. Called by `edgevl targets` and the builder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetInfo:
    """One line of `edgevl targets`."""

    name: str
    machine: str
    architecture: str  # "cpu", or the SM of a GPU
    backend: str
    ready: bool  # False: planned, cannot be built by this version


TARGETS = (
    TargetInfo("host", "any CPU: AVX-512, AVX2 or portable, chosen at run time", "cpu", "cpu", True),
    TargetInfo("orin-nano-8gb", "Jetson Orin Nano 8 GB", "sm_87", "cuda", False),
    TargetInfo("orin-nx-16gb", "Jetson Orin NX 16 GB", "sm_87", "cuda", False),
    TargetInfo("agx-orin-64gb", "Jetson AGX Orin 64 GB", "sm_87", "cuda", False),
    TargetInfo("rtx-30-laptop", "GeForce RTX 30 laptop", "sm_86", "cuda", False),
    TargetInfo("rtx-40-laptop", "GeForce RTX 40 laptop", "sm_89", "cuda", False),
    TargetInfo("rtx-50-laptop", "GeForce RTX 50 laptop", "sm_120", "cuda", False),
    TargetInfo("thor", "Jetson Thor", "sm_110", "cuda", False),
    TargetInfo("h100", "H100", "sm_90", "cuda", False),
    TargetInfo("h200", "H200", "sm_90", "cuda", False),
)
