"""AutoAWQ: its own packed checkpoint, which edgevl reads as it is."""

from awq import AutoAWQForCausalLM
from runner import load_tokenizer, read_job, timed

job = read_job()


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
