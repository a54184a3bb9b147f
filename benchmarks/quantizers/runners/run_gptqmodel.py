"""GPTQModel, GPTQ or its AWQ. On a CPU it wants to be told how many workers to use."""

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from runner import norms, read_job, save, timed

job = read_job()


method = job.options.get("method", "gptq")
named = {"bits": 4, "group_size": job.group_size, "sym": job.symmetric, "offload_to_disk": False}
if method == "awq":
    from gptqmodel.quantization import FORMAT, METHOD

    named |= {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM}
model = GPTQModel.load(str(job.model), QuantizeConfig(**named), device="cpu")
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.tokens]
timed(job, "gptqmodel", lambda: model.quantize(data, batch_size=1))
# read back from its own files: what lies in memory after quantizing is not yet in the form that it computes with
saved = job.out.with_name(f"{job.out.name}.saved")
model.save(str(saved))
ready = GPTQModel.load(str(saved), device="cpu", backend=BACKEND.TORCH).model
found = norms(ready)
with torch.no_grad():
    for name, module in ready.named_modules():
        if name.endswith("_proj"):  # what it computes of the unit vectors
            found[f"{name}.weight"] = module(torch.eye(module.in_features, dtype=ready.dtype)).float().T
save(job, found, lambda tokens: ready(tokens).logits)
