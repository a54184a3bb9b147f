"""The decoder against transformers' LlamaForCausalLM, in f32: logits over real tokens, and greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import tiny_llama
from deploy.build import BuildSettings, build
from edgevl.bundle import Bundle
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.config import TextConfig
from edgevl.engine import make_runner
from edgevl.prefill import feed

PROMPTS = (
    "What is the capital of France?",
    "Write three short sentences about the sea.",
    "def fibonacci(n):",
    "List the planets of the solar system, one on each line.",
    "Explain in one paragraph why the sky is blue.",
)


def transformers_model(checkpoint: Checkpoint) -> Any:
    """LlamaForCausalLM with the checkpoint's text tensors, f32, eager attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    t: TextConfig = checkpoint.config.text
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": t.rope_theta}
    if t.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": t.rope_scaling.factor,
            "low_freq_factor": t.rope_scaling.low_freq_factor,
            "high_freq_factor": t.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": t.rope_scaling.original_max_positions,
        }
    config = LlamaConfig(
        vocab_size=t.vocab_size,
        hidden_size=t.hidden_size,
        intermediate_size=t.intermediate_size,
        num_hidden_layers=t.layers,
        num_attention_heads=t.heads,
        num_key_value_heads=t.kv_heads,
        head_dim=t.head_dim,
        rms_norm_eps=t.rms_norm_eps,
        max_position_embeddings=t.max_positions,
        rope_parameters=rope,
        tie_word_embeddings=t.tied_embeddings,
        attention_bias=t.qkv_bias,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float().eval()
    state = {}
    for name in model.state_dict():
        source = "model.embed_tokens.weight" if name == "lm_head.weight" and t.tied_embeddings else name
        if checkpoint.has(source):
            state[name] = torch.from_numpy(np.array(checkpoint.array(source), dtype=np.float32))
        else:
            assert name.endswith("o_proj.bias"), name  # LlamaConfig gives o_proj a bias along with q, k, v
            state[name] = torch.zeros(t.hidden_size)
    model.load_state_dict(state)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # buffers made on "meta" hold nothing
    return model


def real_tokens(checkpoint: Checkpoint, count: int) -> list[int]:
    from edgevl.tokenizer import Tokenizer

    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    ids = Tokenizer(checkpoint.tokenizer_json()).encode(text * 20, specials=False)
    assert len(ids) >= count
    return ids[:count]


def check_logits(model: str, tmp_path: Path, count: int) -> None:
    checkpoint = open_checkpoint(model)
    build(model, tmp_path / "b", BuildSettings(body="f32", head="f32", vision="f32", kv="f32", context=640))
    bundle = Bundle.open(tmp_path / "b")
    runner = make_runner(bundle, 2, "cpu")
    ids = real_tokens(checkpoint, count)
    with torch.no_grad():
        wanted = transformers_model(checkpoint)(torch.tensor([ids])).logits[0].numpy()
    found = []
    step = runner.limits.logit_rows
    for start in range(0, count, step):
        piece = ids[start : start + step]
        found.append(feed(runner, piece, start, None, len(piece)).copy())
    gap = np.abs(np.concatenate(found) - wanted)
    assert gap.max() <= 2e-3, f"largest difference {gap.max():.2e} at {np.unravel_index(gap.argmax(), gap.shape)}"


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_of_a_random_model(tmp_path: Path, scaled: bool) -> None:
    tiny_llama(tmp_path / "m", llama3_rope=scaled, qkv_bias=scaled, tied=not scaled)
    check_logits(str(tmp_path / "m"), tmp_path, 300)


def test_logits_of_the_demo_over_512_real_tokens(demo_checkpoint: Path, tmp_path: Path) -> None:
    check_logits(str(demo_checkpoint), tmp_path, 512)


def test_128_greedy_tokens_of_the_demo_are_identical(demo_checkpoint: Path, tmp_path: Path) -> None:
    """The f16 bundle holds exactly the checkpoint's weights; only the KV cache rounds, so it is kept in f32 here."""
    from edgevl.tokenizer import Tokenizer

    checkpoint = open_checkpoint(str(demo_checkpoint))
    build(str(demo_checkpoint), tmp_path / "b", BuildSettings(kv="f32", context=512))
    runner = make_runner(Bundle.open(tmp_path / "b"), 2, "cpu")
    model = transformers_model(checkpoint)
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    size = checkpoint.config.tokens.size
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, specials=False)
        found: list[int] = []
        logits = feed(runner, ids, 0, None, 1)
        while len(found) < 128:
            found.append(int(np.argmax(logits[0, :size])))
            logits = feed(runner, found[-1:], len(ids) + len(found) - 1, None, 1)
        # transformers' greedy answer is the same if, token by token, its best continuation of the same beginning is:
        # one pass over the whole text asks for all 128 at once
        with torch.no_grad():
            theirs = model(torch.tensor([ids + found[:-1]])).logits[0, len(ids) - 1 :, :size]
        wanted = theirs.argmax(dim=1).tolist()
        assert found == wanted, (
            f"{prompt!r}: first difference at token {next(i for i in range(128) if found[i] != wanted[i])}"
        )


def test_the_language_model_knows_a_capital(tmp_path: Path) -> None:
    """Through template, tokenizer and engine, from text to text, with an int8 head and tower.

    Of the demo without its training: with it, the language model has forgotten such things (edgevl/DEMO.md). Germany's,
    because with int8 activations two first tokens about France's are as good as equal (LOG.md, 2026-11-26).
    """
    from edgevl.demo import build_demo_checkpoint
    from edgevl.engine import Engine, Request, Result
    from edgevl.prompt import Message

    build_demo_checkpoint(tmp_path / "untrained", trained=False)
    build(str(tmp_path / "untrained"), tmp_path / "b", BuildSettings(head="int8", vision="int8", context=512))
    request = Request((Message("user", ("What is the capital of Germany?",)),), max_tokens=24)
    result = list(Engine.open(tmp_path / "b").stream(request))[-1]
    assert isinstance(result, Result)
    assert "Berlin" in result.text
