"""Compiles kernels, in a process of its own: one JSON job a line on stdin, one JSON answer a line on stdout.

The only program that runs Triton's compiler; needs no GPU and no driver. Started by `deploy.cubins`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deploy.kernels.attention_decode import attend_join, attend_split
from deploy.kernels.attention_prefill import attend, full_attention
from deploy.kernels.gemm import gemm
from deploy.kernels.gemv import gemv
from deploy.kernels.norms import norm
from deploy.kernels.rope import rope_write
from deploy.kernels.rows import argmax, embed, gather_rows, patches, pixel_shuffle, silu_mul, vision_tokens
from deploy.kernels.sample import sample_narrow, sample_pick, sample_tally, sample_top

FUNCTIONS: dict[str, Any] = {
    "argmax": argmax,
    "attend": attend,
    "attend_join": attend_join,
    "attend_split": attend_split,
    "embed": embed,
    "full_attention": full_attention,
    "gather_rows": gather_rows,
    "gemm": gemm,
    "gemv": gemv,
    "norm": norm,
    "patches": patches,
    "pixel_shuffle": pixel_shuffle,
    "rope_write": rope_write,
    "sample_narrow": sample_narrow,
    "sample_pick": sample_pick,
    "sample_tally": sample_tally,
    "sample_top": sample_top,
    "silu_mul": silu_mul,
    "vision_tokens": vision_tokens,
}
_TRITON_TYPES = {"*f32": "*fp32", "*f16": "*fp16"}  # the rest are called as we call them


def constants_of(pairs: list[Any]) -> dict[str, Any]:
    """Constants by name; JSON knows lists where kernels take tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in pairs}


def parameters(ptx: str) -> list[str]:
    """Types of a kernel's parameters: "u64" for addresses, "u32" for numbers."""
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None, "the compiler left no entry"
    return [f"u{bits}" for bits in re.findall(r"\.param \.[busf](\d+)", entry[1])]


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """A job of `deploy.cubins` -> symbol, shared bytes and the cubin in base64."""
    function = FUNCTIONS[job["name"]]
    given = dict(job["arguments"])
    constants = constants_of([*job["constants"], *job["tiles"]])
    order = [name for name in function.arg_names if name in given]
    assert order == list(given), f"{job['name']} takes {order}; the runtime passes {list(given)}"
    constants |= {name: None for name, kind in given.items() if kind is None}
    signature = {
        name: "constexpr" if name in constants else _TRITON_TYPES.get(given[name], given[name])
        for name in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", job["align"]]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", int(job["architecture"].removeprefix("sm_")), 32),
        options={"num_warps": job["warps"], "num_stages": job["stages"], "enable_fp_fusion": True},
    )
    scratch = getattr(compiled.metadata, "global_scratch_size", 0)
    assert not scratch, f"{job['name']} wants {scratch} bytes of global scratch; the runtime passes none"
    passed = [*("u64" if kind.startswith("*") else "u32" for kind in given.values() if kind), "u64", "u64"]
    taken = parameters(compiled.asm["ptx"])
    assert taken == passed, f"{job['name']} takes {taken}; the runtime passes {passed}"
    return {
        "symbol": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "cubin": base64.b64encode(compiled.asm["cubin"]).decode(),
    }


def main() -> None:
    """Answer jobs until stdin ends; an exception is an answer too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    for line in sys.stdin:
        try:
            answer = compile_job(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
