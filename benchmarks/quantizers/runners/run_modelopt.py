"""NVIDIA ModelOpt's AWQ lite: symmetric, with a scale on the input of each linear that is part of what it computes."""

import copy

import modelopt.torch.quantization as mtq
import torch
from runner import load_model, norms, read_job, save, timed

job = read_job()
model = load_model(job)
config = copy.deepcopy(mtq.INT4_AWQ_CFG)


def set_group(entry: object) -> None:
    """Wherever the configuration names a block size, whichever version's form it has."""
    if isinstance(entry, dict):
        if isinstance(entry.get("block_sizes"), dict) and -1 in entry["block_sizes"]:
            entry["block_sizes"][-1] = job.group_size
        for value in entry.values():
            set_group(value)
    elif isinstance(entry, list | tuple):
        for value in entry:
            set_group(value)


set_group(config)


def forward(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for begin in range(0, len(job.tokens), 4):
            network(torch.tensor(job.tokens[begin : begin + 4]))


timed(job, "nvidia-modelopt", lambda: mtq.quantize(model, config, forward))
found = norms(model)
with torch.no_grad():
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weight = module.weight_quantizer(module.weight)
            scale = getattr(module.input_quantizer, "pre_quant_scale", None)
            found[f"{name}.weight"] = weight if scale is None else weight * scale.reshape(1, -1)
save(job, found, lambda tokens: model(tokens).logits)
