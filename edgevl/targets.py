"""The machines that bundles are for: one table. Called by `edgevl targets` and the builder."""

from __future__ import annotations

from dataclasses import dataclass

from edgevl.errors import UsageError


@dataclass(frozen=True)
class TargetInfo:
    """One line of `edgevl targets`."""

    name: str
    machine: str
    architecture: str  # "cpu", or the SM of a GPU
    backend: str
    layout: str = "tiles"  # of the weights, see edgevl.layouts
    chunk: int = 1024  # most tokens of one prefill step
    tiles: int = 13  # most tiles of one vision run: a whole picture, thumbnail included


TARGETS = (
    TargetInfo("host", "any CPU: AVX-512, AVX2, NEON or portable, chosen at run time", "cpu", "cpu", "panels", 256, 1),
    TargetInfo("orin-nano-8gb", "Jetson Orin Nano 8 GB", "sm_87", "cuda", chunk=512, tiles=2),
    TargetInfo("orin-nx-16gb", "Jetson Orin NX 16 GB", "sm_87", "cuda", tiles=4),
    TargetInfo("agx-orin-64gb", "Jetson AGX Orin 64 GB", "sm_87", "cuda"),
    TargetInfo("rtx-30-laptop", "GeForce RTX 30 laptop", "sm_86", "cuda", tiles=4),
    TargetInfo("rtx-40-laptop", "GeForce RTX 40 laptop", "sm_89", "cuda", tiles=4),
    TargetInfo("rtx-50-laptop", "GeForce RTX 50 laptop", "sm_120", "cuda", tiles=4),
    TargetInfo("thor", "Jetson Thor", "sm_110", "cuda"),
    TargetInfo("h100", "H100", "sm_90", "cuda"),
    TargetInfo("h200", "H200", "sm_90", "cuda"),
)


def target_info(name: str) -> TargetInfo:
    """The line of the table for a name; `UsageError` when there is none."""
    known = {target.name: target for target in TARGETS}
    if name not in known:
        raise UsageError(f"--target {name} does not exist; `edgevl targets` lists {', '.join(known)}")
    return known[name]
