"""Guesses from the prompt: what is guessed, and that no answer changes by it, whatever the model and the prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.config import TokenConfig
from edgevl.engine import Engine, Request, Result, Sampling
from edgevl.generation import Generation, Key
from edgevl.image import load_image
from edgevl.lookup import Lookup
from edgevl.prompt import Message
from edgevl.runner import F32, I32, Limits
from edgevl.sampling import Sampler, choose

STOP = 19


def test_what_followed_the_last_time_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 1, 2, 3, 5, 6, 9, 1, 2, 3])
    assert lookup.guess(2) == [5, 6]  # the last of two places
    assert lookup.guess(9) == [5, 6, 9, 1, 2, 3]
    assert lookup.guess(0) == []
    lookup.append(4)
    assert lookup.guess(3) == [1, 2, 3]
    lookup.append(7)
    assert lookup.guess(3) == []


def test_two_tokens_must_stand_alike_and_three_are_better() -> None:
    assert Lookup([1, 2, 3, 2]).guess(3) == []
    assert Lookup([1, 2, 3, 1, 2]).guess(1) == [3]
    assert Lookup([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]).guess(1) == [3]
    assert Lookup([]).guess(3) == Lookup([1]).guess(3) == []


def test_rows_of_pictures_are_never_guessed() -> None:
    assert Lookup([5, 6, -1, -2, 7, 5, 6]).guess(4) == []
    assert Lookup([5, 6, 8, -1, -2, 7, 5, 6]).guess(4) == [8]
    assert Lookup([-1, -2, 5, -1, -2]).guess(1) == [5]


class Copying:
    """Says again what followed the last two tokens the first time, and 0 where nothing did; remembers its steps."""

    backend, planned_bytes = "played", 0

    def __init__(self, context: int = 400, alike: int = 7) -> None:
        self.limits, self.alike_rows = Limits(context, chunk=64), alike
        self.cache: list[int] = [-1] * context
        self.steps: list[int] = []

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        self.steps.append(tokens.size)
        assert positions.max() < self.limits.context
        for token, place in zip(tokens.tolist(), positions.tolist(), strict=True):
            self.cache[place] = token
        logits = np.zeros((logit_rows.size, 20), np.float32)
        for row, i in enumerate(logit_rows):
            end = int(positions[i]) + 1
            tail = self.cache[end - 2 : end]
            places = [p for p in range(2, end) if self.cache[p - 2 : p] == tail]
            logits[row, self.cache[places[0]] if places else 0] = 1
        return logits


class OnDevice(Copying):
    """The same, but it chooses tokens itself, and fetches no logits behind the prompt."""

    fetched = 0

    def decode(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32) -> F32:
        self.fetched += 1
        return super().decode(tokens, positions, slots, images, logit_rows)

    def choose(self, tokens: I32, positions: I32, slots: I32, images: F32 | None, logit_rows: I32, draws: F32) -> I32:
        logits = super().decode(tokens, positions, slots, images, logit_rows)
        return np.array([choose(*pair) for pair in zip(logits, *draws.T, strict=True)], np.int32)


def run(
    alike: int, prompt: list[int], room: int, temperature: float = 0.0, kind: type[Copying] = Copying
) -> tuple[list[int], Copying, list[Key]]:
    runner = kind(alike=alike)
    chooser = Sampler(Sampling(temperature, 1.0, 3))
    generation = Generation(runner, chooser, TokenConfig(20, (STOP,)), Lookup(prompt))  # type: ignore[arg-type]
    held: list[Key] = list(prompt)
    first = runner.decode(*_step(prompt))
    found = list(generation.run(first, held, room))
    assert generation.steps == len(runner.steps) - 1
    assert held[: len(prompt) + len(found) - 1] == [*prompt, *found][:-1] if found else True
    assert [runner.cache[i] for i in range(len(held))] == held  # what is said to be held is in the cache
    return found, runner, held


def _step(prompt: list[int]) -> tuple[I32, I32, I32, None, I32]:
    count = len(prompt)
    places = np.arange(count, dtype=np.int32)
    return np.array(prompt, np.int32), places, np.zeros(count, np.int32), None, np.array([count - 1], np.int32)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_guesses_save_steps_and_change_nothing(temperature: float) -> None:
    saved = 0
    for seed in range(50):
        random = np.random.default_rng(seed)
        text = random.integers(0, 18, random.integers(3, 40)).tolist()
        prompt = [*text, *([STOP] if seed % 2 else []), *text[:2]]
        for room in (1, 2, 7, 30):
            plain, slow, _ = run(1, prompt, room, temperature)
            quick, fast, _ = run(7, prompt, room, temperature)
            assert quick == plain
            assert len(fast.steps) <= len(slow.steps)
            assert max(fast.steps[1:], default=0) <= 7
            saved += len(slow.steps) - len(fast.steps)
    assert saved > 500


def test_a_device_that_chooses_draws_the_same_numbers_and_fetches_no_logits() -> None:
    for alike in (1, 7):
        for temperature in (0.0, 0.2, 1.0):
            prompt = [3, 4, 5, 6, 7, STOP, 3, 4]
            plain, _, held = run(alike, prompt, 12, temperature)
            found, device, held_there = run(alike, prompt, 12, temperature, OnDevice)
            assert (found, held_there) == (plain, held) and isinstance(device, OnDevice)
            assert device.fetched == 1


def test_an_answer_fills_the_context_to_the_last_place() -> None:
    text = [1, 2, 3, 4, 5, 6]
    prompt = text * 65
    assert len(prompt) == 390
    plain, _, _ = run(1, prompt, 400 - 390 + 1)
    quick, runner, _ = run(7, prompt, 400 - 390 + 1)
    assert plain == quick and len(quick) == 11
    assert len(runner.steps) < 5


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generation")
    tiny_vl(root / "vl", awq=True)
    tiny_llama(root / "text")
    build(str(root / "vl"), root / "vl.bundle", BuildSettings(context=640, head="int8", vision="int8"))
    build(str(root / "text"), root / "text.bundle", BuildSettings(context=640))
    return {"vl": root / "vl.bundle", "text": root / "text.bundle"}


@pytest.mark.parametrize(("name", "temperature"), [("vl", 0.0), ("text", 0.0), ("text", 0.7)])
def test_fifty_prompts_are_answered_the_same(bundles: dict[str, Path], name: str, temperature: float) -> None:
    engine = Engine.open(bundles[name], 1)
    picture = load_image(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)))
    fewer = 0
    for seed in range(50):
        random = np.random.default_rng(seed)
        text = " ".join(random.choice(["the", "cat", "is", "on", "a", "mat", "and"], random.integers(1, 90)))
        parts = (picture, text) if name == "vl" and seed % 2 else (text,)
        answers = []
        for lookup in (False, True):
            sampling = Sampling(temperature, 1.0, seed)
            *_, result = engine.stream(Request((Message("user", parts),), sampling, 40, lookup=lookup))
            assert isinstance(result, Result)
            answers.append(result)
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].finish_reason == answers[1].finish_reason
        fewer += answers[0].tokens["steps"] - answers[1].tokens["steps"]
    assert fewer > 0 or temperature  # a random model that is sampled from repeats nothing
