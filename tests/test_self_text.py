"""What a model writes to be calibrated on: token by token what the whole model would say, turns in their places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import tiny_llama, tiny_vl
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.models.decoder import decoder
from edgevl.prompt import PromptBuilder
from edgevl.tokenizer import Tokenizer
from quantize import self_text
from quantize.job import quantize
from quantize.part_tensors import CheckpointParts
from quantize.self_text import write_text
from quantize.settings import QuantizeSettings
from quantize.torch_ops import TorchOps, batch_step


def prompts_of(checkpoint: Checkpoint) -> PromptBuilder:
    return PromptBuilder(Tokenizer(checkpoint.tokenizer_json()), checkpoint.chat_template(), checkpoint.config.tokens)


@torch.inference_mode()
def test_each_token_is_what_the_whole_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest instead of a sampled token: then every token but the forced ones must be the model's argmax."""
    monkeypatch.setattr(self_text, "_sample", lambda logits, _: logits.argmax(dim=1).tolist())
    checkpoint = open_checkpoint(tiny_llama(tmp_path / "m"))
    rows = write_text(checkpoint, prompts_of(checkpoint), 4, 96, 3)
    ops = TorchOps(CheckpointParts(checkpoint), 96)
    logits = decoder(ops, checkpoint.config.text, batch_step(torch.tensor(rows)))
    wanted = logits[:, : checkpoint.config.tokens.size].argmax(dim=1).reshape(4, 96)
    same = wanted[:, :-1] == torch.tensor(rows)[:, 1:]
    assert same[1::2].float().mean() > 0.9, "free text has one forced token a document"
    assert same[0::2].float().mean() > 0.6, "conversations also have the template's"


@torch.inference_mode()
def test_texts_and_conversations(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama(tmp_path / "m", "bf16"))
    rows = write_text(checkpoint, prompts_of(checkpoint), 4, 400, 0)
    assert all(len(row) == 400 for row in rows)
    assert rows == write_text(checkpoint, prompts_of(checkpoint), 4, 400, 0)
    assert rows != write_text(checkpoint, prompts_of(checkpoint), 4, 400, 1)
    text = Tokenizer(checkpoint.tokenizer_json()).decode(rows[0], specials=True)
    asks = "<|start_header_id|>user<|end_header_id|>"
    assert text.startswith(f"<|begin_of_text|>{asks}")
    assert "<|eot_id|><|start_header_id|>assistant<|end_header_id|>" in text


@pytest.mark.parametrize("eyes", [False, True])
def test_a_model_is_calibrated_on_what_it_writes(tmp_path: Path, eyes: bool) -> None:
    model = (tiny_vl if eyes else tiny_llama)(tmp_path / "m")
    settings = QuantizeSettings(calibration="self", samples=4, length=128, measure=False)
    used = quantize(str(model), tmp_path / "out", settings)["calibration"]
    assert used["name"] == "self" and used["tokens"] == 512
    assert used["pictures"] == (2 if eyes else 0)
