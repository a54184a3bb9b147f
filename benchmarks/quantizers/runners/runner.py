"""What the runners share. Runs in a peer's environment: torch, transformers, safetensors and numpy, nothing of edgevl.

A runner is called with the path of a JSON job: model, tokens, out, group_size, symmetric, seed, options. It leaves in
`out` a checkpoint that any reader of plain Llamas opens, with the weights that the quantized model computes with, and
facts.json with the seconds that quantizing took and the versions used.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

Weights = dict[str, torch.Tensor]
_GAP = 0.05  # relative; tools that compute in 16 bits stay below


def read_job() -> Any:
    """The job, with `tokens` as a list of equal rows."""
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    job.model, job.out = Path(job.model), Path(job.out)
    job.tokens = json.loads(Path(job.tokens).read_text())
    torch.manual_seed(job.seed)
    return job


def load_model(job: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers reads it, on the CPU."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    except TypeError:  # before transformers 4.56
        return AutoModelForCausalLM.from_pretrained(job.model, torch_dtype=dtype).eval()


def load_tokenizer(job: Any) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.model)


def timed(job: Any, package: str, work: Callable[[], Any]) -> Any:
    """Run `work`, and write facts.json about it."""
    began = time.monotonic()
    result = work()
    job.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "seconds": round(time.monotonic() - began, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in (package, "torch", "transformers")},
    }
    (job.out / "facts.json").write_text(json.dumps(facts))
    return result


def save(job: Any, weights: Weights, ran: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
    """The original checkpoint with these tensors in place of its own; norms that were changed belong to them too.

    `ran`, the tool's own quantized model from tokens to logits, must agree with what is saved: no tool is judged
    by how it was read.
    """
    from safetensors.torch import load_file, save_file

    job.out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(job.model / "model.safetensors")
    unknown = set(weights) - set(tensors)
    if unknown:
        raise SystemExit(f"the runner names tensors that the model lacks: {sorted(unknown)[:3]}")
    linears = {name for name in tensors if name.endswith("_proj.weight")}
    if linears - set(weights):
        raise SystemExit(f"the runner leaves out {sorted(linears - set(weights))[:3]}")
    for name, tensor in weights.items():
        if tensor.shape != tensors[name].shape or not torch.isfinite(tensor).all():
            raise SystemExit(f"{name} is {tuple(tensor.shape)} or not finite")
        tensors[name] = tensor.detach().float().contiguous().clone()
    save_file(tensors, job.out / "model.safetensors", {"format": "pt"})
    for path in job.model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, job.out / path.name)
    if ran is not None:
        rows = torch.tensor(job.tokens[:1])
        again = SimpleNamespace(model=job.out)
        with torch.no_grad():
            own, read = ran(rows).float(), load_model(again)(rows).logits
        gap = float((own - read).norm() / read.norm())
        if gap > _GAP:
            raise SystemExit(f"the weights read are not those that the tool computes with: logits differ by {gap:.3f}")


def norms(model: Any) -> Weights:
    """The norm weights of a model, into which scales may have been folded."""
    return {name: value for name, value in model.state_dict().items() if "norm" in name and name.endswith("weight")}
