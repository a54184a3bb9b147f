"""AutoAWQ: its own packed checkpoint, which edgevl reads as it is.

Its search keeps the weights with `.cpu()` and restores them after each trial. Of a model that is on the CPU that is no
copy, so the first trial's scale would stay in the weights (seen: columns scaled twice, KL above 1). Here `.cpu()`
always copies, as it does from a GPU.
"""

import torch
from awq import AutoAWQForCausalLM
from runner import load_tokenizer, read_job, timed

job = read_job()
torch.Tensor.cpu = lambda self, *_, **__: self.to("cpu", copy=True)


model = AutoAWQForCausalLM.from_pretrained(str(job.model), device_map="cpu", safetensors=True)
tokenizer = load_tokenizer(job)
config = {"zero_point": True, "q_group_size": job.group_size, "w_bit": 4, "version": "GEMM"}


def work() -> None:
    model.quantize(
        tokenizer,
        quant_config=config,
        calib_data=job.tokens,
        max_calib_samples=len(job.tokens),
        max_calib_seq_len=len(job.tokens[0]),
    )


timed(job, "autoawq", work)
model.save_quantized(str(job.out), safetensors=True)
tokenizer.save_pretrained(str(job.out))
