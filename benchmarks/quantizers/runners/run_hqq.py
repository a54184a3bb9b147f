"""HQQ: half-quadratic rounding, without data."""

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from runner import load_model, read_job, save, timed

job = read_job()
model = load_model(job)
config = BaseQuantizeConfig(nbits=4, group_size=job.group_size, axis=1)


def work() -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            layer = HQQLinear(
                module, config, compute_dtype=torch.float32, device="cpu", initialize=True, del_orig=False
            )
            found[f"{name}.weight"] = layer.dequantize()
    return found


save(job, timed(job, "hqq", work))
