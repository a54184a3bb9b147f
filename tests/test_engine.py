"""The engine on a tiny random model: reuse of the KV cache, pictures, limits, the same tokens from both."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.conversation import AnswerSettings, Conversation
from edgevl.embeddings import Embeddings
from edgevl.engine import Delta, Engine, Request, Result, Sampling
from edgevl.errors import CapacityError, PromptError, UsageError
from edgevl.image import Picture, load_image
from edgevl.prompt import Message, Said
from edgevl.runner import F32, I32
from edgevl.saved import load, save
from edgevl.view import PictureView, make_video


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture model unquantized and in int4, and a text model."""
    root = tmp_path_factory.mktemp("engine")
    tiny_vl(root / "vl")
    tiny_vl(root / "vl4", awq=True)
    tiny_llama(root / "text")
    made = {}
    for name, settings in {
        "vl": BuildSettings(context=384),
        "vl4": BuildSettings(context=384, head="int8", vision="int8"),
        "text": BuildSettings(context=128),
        "kv8": BuildSettings(context=384, kv="int8"),
    }.items():
        build(str(root / ("vl" if name == "kv8" else name)), root / f"{name}.bundle", settings)
        made[name] = root / f"{name}.bundle"
    return made


def picture(seed: int = 0, size: tuple[int, int] = (70, 50)) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return load_image(Image.fromarray(pixels))


def user(*parts: str | Picture) -> Message:
    return Message("user", parts)


def ask(engine: Engine, *messages: Message, max_tokens: int = 12, sampling: Sampling | None = None) -> Result:
    items = list(engine.stream(Request(messages, sampling or Sampling(), max_tokens)))
    result = items[-1]
    assert isinstance(result, Result)
    deltas = [item for item in items[:-1] if isinstance(item, Delta)]
    assert tuple(d.token_id for d in deltas) == result.token_ids
    assert result.text.startswith("".join(d.text for d in deltas))
    return result


@pytest.mark.parametrize("name", ["vl", "vl4", "text", "kv8"])
def test_cpu_and_reference_give_the_same_tokens(bundles: dict[str, Path], name: str) -> None:
    parts = ("What is it?",) if name == "text" else (picture(), "What is it?", picture(1), "And that?")
    answers = [ask(Engine.open(bundles[name], 2, backend), user(*parts)) for backend in ("cpu", "reference")]
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].token_ids) > 0
    assert {**answers[0].tokens, "steps": 0} == {**answers[1].tokens, "steps": 0}


def test_a_second_question_costs_only_its_own_tokens(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["vl"], 1)
    first = ask(engine, user(picture(), "What is it?"))
    assert first.tokens["reused"] == 0
    second = ask(engine, user(picture(), "What is it?"), Message("assistant", ("a cat",)), user("Sure?"))
    assert second.tokens["reused"] >= first.tokens["image"]
    fresh = ask(
        Engine.open(bundles["vl"], 1), user(picture(), "What is it?"), Message("assistant", ("a cat",)), user("Sure?")
    )
    assert second.token_ids == fresh.token_ids
    engine.reset()
    assert ask(engine, user(picture(), "What is it?")).tokens["reused"] == 0


def test_another_picture_is_never_taken_for_the_first(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["vl"], 1)
    ask(engine, user(picture(0), "Describe."))
    mixed = ask(engine, user(picture(1), "Describe."))
    assert mixed.token_ids == ask(Engine.open(bundles["vl"], 1), user(picture(1), "Describe.")).token_ids
    assert mixed.tokens["reused"] < mixed.tokens["image"]


def test_an_answer_that_is_stopped_keeps_the_session_whole(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["text"], 1)
    stream = engine.stream(Request((user("Hello"),), max_tokens=30))
    next(stream)
    next(stream)
    stream.close()
    again = ask(engine, user("Hello"))
    assert again.tokens["reused"] == again.tokens["prompt"] - 1
    assert again.token_ids == ask(Engine.open(bundles["text"], 1), user("Hello")).token_ids


def test_sampling_is_repeatable_by_seed(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["text"], 1)
    hot = [ask(engine, user("Hi"), sampling=Sampling(1.5, 0.9, seed)).token_ids for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1


def test_limits_are_errors_before_any_work_and_cuts_are_said(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["text"], 1)
    with pytest.raises(CapacityError, match="128"):
        ask(engine, user("word " * 300))
    with pytest.raises(PromptError, match="eyes"):
        ask(engine, user(picture(), "What is it?"))
    with pytest.raises(UsageError, match="max tokens"):
        ask(engine, user("Hi"), max_tokens=0)
    long = ask(engine, user("Hi"), max_tokens=5000)
    if long.finish_reason == "length":
        assert long.tokens["prompt"] + long.tokens["generated"] == 129  # the last token needs no place in the cache
        assert any("cut" in note for note in long.notes)


def test_many_pictures_share_the_context(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["vl"], 1)
    wide = [picture(i, (400, 300)) for i in range(4)]  # 13 tiles of 4 tokens each, and the thumbnails
    result = ask(engine, user(*wide, "Compare."), max_tokens=2)
    assert result.tokens["prompt"] < 384
    with pytest.raises(PromptError, match="4"):
        ask(engine, user(*wide, picture(9), "Compare."))


class Counted:
    """A runner's steps, counted: tokens into the decoder, tiles into the tower."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = self.tiles = 0
        decode, vision = engine.runner.decode, engine.runner.vision

        def counted_decode(tokens: I32, *rest: Any) -> F32:
            self.tokens += tokens.size
            return decode(tokens, *rest)

        def counted_vision(pixels: Any) -> F32:
            self.tiles += len(pixels)
            return vision(pixels)

        monkeypatch.setattr(engine.runner, "decode", counted_decode)
        monkeypatch.setattr(engine.runner, "vision", counted_vision)


def test_a_turn_costs_its_new_tokens_and_no_tile(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(bundles["vl4"], 1)
    conversation = Conversation(engine, AnswerSettings("Be brief.", max_tokens=7, lookup=False), lambda text: None)
    conversation.attach(picture())
    counted = Counted(engine, monkeypatch)
    held = 0
    for question in ("What is it?", "Are you sure?", "And the colour, please?"):
        before = counted.tokens
        result = list(conversation.ask(question))[-1]
        assert isinstance(result, Result)
        assert result.tokens["reused"] == held
        # a stop token is the template's own; the last token of a cut answer goes in with the next question
        answer = result.tokens["generated"] - (result.finish_reason == "length")
        assert counted.tokens - before == result.tokens["prompt"] - held + answer
        held = result.tokens["prompt"] + answer
    assert counted.tiles == engine.budget.parts(conversation.messages)["pictures"] // 4
    assert all(isinstance(m.parts[0], Said) for m in conversation.messages if m.role == "assistant")


def test_what_the_cache_holds_is_not_looked_at_again(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(bundles["vl4"], 1)
    conversation = Conversation(engine, AnswerSettings(max_tokens=5), lambda text: None)
    counted = Counted(engine, monkeypatch)
    conversation.attach(picture(0))
    list(conversation.ask("What is it?"))
    first = counted.tiles
    engine.embeddings.clear()  # as when they are larger than what is kept
    conversation.attach(picture(1))
    result = list(conversation.ask("And this?"))[-1]
    assert isinstance(result, Result)
    assert counted.tiles == 2 * first
    fresh = ask(Engine.open(bundles["vl4"], 1), *conversation.messages[:-1], max_tokens=5)
    assert result.token_ids == fresh.token_ids


def test_reuse_changes_nothing(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["vl4"], 1)
    conversation = Conversation(engine, AnswerSettings(max_tokens=9), lambda text: None)
    conversation.attach(picture())
    first, second = (list(conversation.ask(text))[-1] for text in ("What is it?", "Are you sure?"))
    history = conversation.messages[:-1]
    fresh = ask(Engine.open(bundles["vl4"], 1), *history, max_tokens=9)
    assert isinstance(first, Result) and isinstance(second, Result)
    assert (first.tokens["reused"], fresh.tokens["reused"]) == (0, 0)
    assert second.tokens["reused"] > first.tokens["prompt"]
    assert second.token_ids == fresh.token_ids


def test_the_conversation_outgrows_the_context(bundles: dict[str, Path]) -> None:
    engine, told = Engine.open(bundles["vl"], 1), list[str]()
    conversation = Conversation(engine, AnswerSettings(max_tokens=20), told.append)
    conversation.attach(picture())
    for number in range(12):
        result = list(conversation.ask(f"This is question {number}. " * 3))[-1]
        assert isinstance(result, Result)
        assert result.tokens["prompt"] + 20 <= 384
    assert any("picture" in loss for loss in told)
    assert conversation.turns < 12
    with pytest.raises(CapacityError, match="384"):
        list(conversation.ask("word " * 300))
    assert conversation.turns > 0  # what was said before survives a question that can never fit


def test_a_picture_keeps_its_tiles_for_the_whole_conversation(bundles: dict[str, Path]) -> None:
    engine = Engine.open(bundles["vl"], 1)
    conversation = Conversation(engine, AnswerSettings(max_tokens=2), lambda text: None)
    conversation.attach(picture(0, (400, 300)))
    list(conversation.ask("What is it?"))
    conversation.attach(picture(1, (400, 300)))
    conversation.attach(picture(2, (400, 300)))
    result = list(conversation.ask("And these?"))[-1]
    assert isinstance(result, Result)
    first, second, third = (view for message in conversation.messages for view in message.shown)
    assert isinstance(first, PictureView) and isinstance(second, PictureView) and isinstance(third, PictureView)
    assert result.tokens["reused"] > 4 * first.tiles(engine.config.vision)
    assert second.tiling == third.tiling


def test_embeddings_outlive_the_engine_on_request(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, answers = [], []
    for damage in (False, False, True):
        engine = Engine.open(bundles["vl"], 1)
        engine.embeddings.keep_on_disk(tmp_path / "kept", engine.bundle.digest)
        if damage:
            for file in (tmp_path / "kept").iterdir():
                file.write_bytes(file.read_bytes()[:-8])
        counted = Counted(engine, monkeypatch)
        answers.append(ask(engine, user(picture(), "What is it?")).token_ids)
        tiles.append(counted.tiles)
    assert tiles[0] > 0 and tiles[1:] == [0, tiles[0]]
    assert answers[0] == answers[1] == answers[2]
    for rows in (
        np.zeros((3, 64), np.float32),
        np.full((64, 64), np.nan, np.float32),
    ):  # of another size, or no numbers
        kept = Embeddings(64)
        kept.keep_on_disk(tmp_path / "other", "")
        kept.keep("a", rows)
        again = Embeddings(64)
        again.keep_on_disk(tmp_path / "other", "")
        assert again.get("a", 64) is None
    shutil.rmtree(tmp_path / "other")
    kept.keep("b", rows)
    assert "not kept" in kept.troubles()[0] and kept.troubles() == () and kept.get("b", len(rows)) is rows
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        engine.embeddings.keep_on_disk(tmp_path / "file" / "x", "")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_in_a_session_the_answers_are_those_of_a_fresh_one(
    bundles: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    """Pictures, videos, answers that are stopped, refusals, evictions, restarts, in any order."""
    random = np.random.default_rng(seed)
    engine, fresh = Engine.open(bundles["vl"], 1), Engine.open(bundles["vl"], 1)
    settings = AnswerSettings("Be brief." if seed % 2 else None, max_tokens=24)
    conversation = Conversation(engine, settings, lambda text: None)
    for step in range(25):
        chance = random.random()
        with contextlib.suppress(UsageError):  # one too many
            if chance < 0.3:
                conversation.attach(picture(int(random.integers(5)), (70, 50)))
            elif chance < 0.4:
                frames = random.integers(0, 256, (6, 64, 64, 3)).astype(np.uint8)
                conversation.attach(make_video(frames, "clip", 1.0, ()))
        if chance > 0.95:
            with pytest.raises(CapacityError):
                list(conversation.ask("word " * 400))
        stream = conversation.ask("word " * int(random.integers(1, 40)) + str(step))
        if chance > 0.8:
            for _ in range(int(random.integers(1, 5))):
                next(stream, None)
            stream.close()
            continue
        *_, result = stream
        assert isinstance(result, Result)
        assert result.tokens["prompt"] < 384
        again = ask(fresh, *conversation.messages[:-1], max_tokens=24)
        fresh.reset()
        assert result.token_ids == again.token_ids
        if 0.6 < chance < 0.7:
            save(tmp_path / "talk", engine.bundle.digest, conversation.messages)
            engine = Engine.open(bundles["vl"], 1)
            conversation = Conversation(engine, settings, lambda text: None)
            conversation.restore(
                load(tmp_path / "talk", engine.bundle.digest, engine.config.vision, engine.budget.context)
            )
