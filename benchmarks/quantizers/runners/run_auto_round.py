"""AutoRound: rounding and ranges tuned block by block; its model computes with the rounded weights when it is done."""

import torch
from auto_round import AutoRound
from runner import load_model, load_tokenizer, norms, read_job, save, timed

job = read_job()


model, tokenizer = load_model(job), load_tokenizer(job)
rows = [
    {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    for row in job.tokens
]
named = {"iters": int(job.options["iters"])} if "iters" in job.options else {}
rounder = AutoRound(
    model,
    tokenizer,
    bits=4,
    group_size=job.group_size,
    sym=job.symmetric,
    dataset=rows,
    nsamples=len(rows),
    seqlen=len(job.tokens[0]),
    seed=job.seed,
    device_map="cpu",
    **named,
)
result = timed(job, "auto-round", rounder.quantize)
made = result[0] if isinstance(result, tuple) else rounder.model
found = norms(made)
for name, module in made.named_modules():
    if name.endswith("_proj"):
        found[f"{name}.weight"] = module.weight
save(job, found, lambda tokens: made(tokens).logits)
