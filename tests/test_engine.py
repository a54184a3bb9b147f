"""The engine on a tiny random model: reuse of the KV cache, pictures, limits, the same tokens from both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.engine import Delta, Engine, Request, Result, Sampling
from edgevl.errors import CapacityError, PromptError, UsageError
from edgevl.image import Picture, load_image
from edgevl.prompt import Message


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
    }.items():
        build(str(root / name), root / f"{name}.bundle", settings)
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


@pytest.mark.parametrize("name", ["vl", "vl4", "text"])
def test_cpu_and_reference_give_the_same_tokens(bundles: dict[str, Path], name: str) -> None:
    parts = ("What is it?",) if name == "text" else (picture(), "What is it?", picture(1), "And that?")
    answers = [ask(Engine.open(bundles[name], 2, backend), user(*parts)) for backend in ("cpu", "reference")]
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].token_ids) > 0
    assert answers[0].tokens == answers[1].tokens


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
