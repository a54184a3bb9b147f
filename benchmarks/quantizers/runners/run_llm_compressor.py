"""llm-compressor's AWQ modifier. Its pinned memory needs a GPU's driver; without one the call is left out."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from runner import load_model, norms, read_job, save, timed

if not torch.cuda.is_available():
    torch.Tensor.pin_memory = lambda self, *_, **__: self

job = read_job()
model = load_model(job)
arguments = QuantizationArgs(
    num_bits=4, type="int", symmetric=job.symmetric, strategy="group", group_size=job.group_size
)
recipe = AWQModifier(
    ignore=["lm_head"],
    config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)},
)
data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.tokens])


def work() -> None:
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(job.tokens[0]),
        num_calibration_samples=len(job.tokens),
    )


timed(job, "llmcompressor", work)
found = norms(model)
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
        zero = getattr(module, "weight_zero_point", None)
        found[f"{name}.weight"] = fake_quantize(
            module.weight.float(), module.weight_scale.float(), zero, module.quantization_scheme.weights
        )
save(job, found)
