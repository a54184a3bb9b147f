"""Calibration sets: exact lengths, the same for the same seed, pictures in their places, a user's own directory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import calibration
from calibration import SETS, manifest, manifests
from calibration.samples import Sample, describe, overlap
from calibration.texts import documents, parse_turns, read_documents
from checkpoints import tiny_llama, tiny_vl
from edgevl.checkpoint import Checkpoint, open_checkpoint
from edgevl.errors import EdgevlError, ImageError, UsageError
from edgevl.prompt import PromptBuilder
from edgevl.tokenizer import Tokenizer

DATA = Path(calibration.__file__).with_name("data")


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_vl(tmp_path_factory.mktemp("calibration") / "vl"))


def load(
    checkpoint: Checkpoint, source: str | Path, samples: int = 4, length: int = 256, seed: int = 0
) -> list[Sample]:
    tokenizer = Tokenizer(checkpoint.tokenizer_json())
    prompts = PromptBuilder(tokenizer, checkpoint.chat_template(), checkpoint.config.tokens)
    return calibration.load(source, tokenizer, prompts, checkpoint.config, samples, length, seed)


@pytest.mark.parametrize(("name", "pictures"), [("text", 0), ("image-text", 4), ("mixed", 2)])
def test_built_in_sets(eyes: Checkpoint, name: str, pictures: int) -> None:
    samples = load(eyes, name)
    assert len(samples) == 4
    assert sum(sample.tiles is not None for sample in samples) == pictures
    assert eyes.config.vision is not None
    for sample in samples:
        assert len(sample.token_ids) == 256
        rows = [-1 - token for token in sample.token_ids if token < 0]
        if sample.tiles is None:
            assert not rows
        else:
            assert sample.tiles.dtype == np.uint8
            assert sample.tiles.shape[1:] == (64, 64, 3)
            assert rows == list(range(len(sample.tiles) * eyes.config.vision.tile_tokens))
    assert all(token < eyes.config.tokens.size for sample in samples for token in sample.token_ids)


def test_the_seed_decides(eyes: Checkpoint) -> None:
    first, again, other = load(eyes, "mixed"), load(eyes, "mixed"), load(eyes, "mixed", seed=1)
    assert [s.token_ids for s in first] == [s.token_ids for s in again]
    assert all(np.array_equal(a.tiles, b.tiles) for a, b in zip(first, again, strict=True) if a.tiles is not None)  # type: ignore[arg-type]
    assert [s.token_ids for s in first] != [s.token_ids for s in other]


def test_any_seed_will_do(eyes: Checkpoint) -> None:
    assert load(eyes, "mixed", 2, seed=(1 << 31) - 1)[0].token_ids != load(eyes, "mixed", 2, seed=500_000)[0].token_ids


def test_an_answer_ends_with_the_end_of_its_turn(eyes: Checkpoint) -> None:
    ids = load(eyes, "image-text", 1)[0].token_ids
    assert sum(token in eyes.config.tokens.stop for token in ids) >= 2  # the user's and the assistant's


def test_own_directory(eyes: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A plain text that is long enough. " * 40)
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "red.png")
    (tmp_path / "red.txt").write_text("A red rectangle.")
    samples = load(eyes, tmp_path, 2)
    assert [sample.tiles is not None for sample in samples] == [False, True]
    (tmp_path / "red.txt").unlink()
    with pytest.raises(UsageError, match=r"red\.png has no red\.txt beside it"):
        load(eyes, tmp_path, 2)
    held_out = calibration.held_out_text()[2000:4000]
    for words, says in (
        (" ", r"red\.txt is empty; write what the picture shows"),
        ("user: What is it?", r"red\.txt ends with the user"),
        (held_out, r"red\.txt holds text that edgevl measure scores"),
    ):
        (tmp_path / "red.txt").write_text(words)
        with pytest.raises(UsageError, match=says):
            load(eyes, tmp_path, 2)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "red.txt").write_text("A red rectangle.")
    alone = load(eyes, tmp_path, 2)
    assert "filled up with built-in texts" in describe(tmp_path, alone, 0)["what"]
    (tmp_path / "red.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"red\.png is damaged, or not a picture"):
        load(eyes, tmp_path, 2)


def test_own_lines(eyes: Checkpoint, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "red.png")
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Red."}]
    lines = [{"text": "A long line. " * 60}, {"messages": talk * 8}, {"messages": talk, "image": "red.png"}]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    samples = load(eyes, file, 2)
    assert [sample.tiles is not None for sample in samples] == [False, True]
    used = describe(file, samples, 0)
    assert (used["name"], used["tokens"], used["pictures"]) == ("mine.jsonl", 512, 1) and used["image_tokens"] > 0
    assert overlap(list(samples[0].token_ids), set(used["fingerprints"])) == 1
    form = {"text": "A login form.\nuser: bob", "image": "red.png"}
    system = [{"role": "system", "content": "Be brief."}, *talk, {"role": "user", "content": "Why? " * 200}, talk[1]]
    file.write_text("\n".join(json.dumps(line) for line in (form, {"messages": system, "image": "red.png"})))
    assert all(sample.tiles is not None for sample in load(eyes, file, 2)), "a caption, and turns cut after an answer"
    assert overlap([5] * 100, set(used["fingerprints"])) == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 must be an object with either text or messages"),
        ('{"text": "a", "messages": []}', "line 3 must be an object with either"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "image": "mine.jsonl"}',
            "line 3 ends with the user",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, '
            '{"role": "assistant", "content": "c"}]}',
            "line 3 has the turns assistant, user, assistant",
        ),
        ('{"text": 5}', "line 3: text must be a string that is not empty"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "line 3: messages must be a list with at least"),
        ('{"messages": [{"role": "bot", "content": "hello"}]}', "line 3: each message needs a role"),
        ('{"text": "a caption", "image": "gone.png"}', r"line 3 names the picture .*gone\.png, which does not exist"),
        ('{"text": "a caption", "image": 1}', "line 3: image must be the path of a picture"),
    ],
)
def test_a_bad_line_is_named(eyes: Checkpoint, tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UsageError, match=says):
        load(eyes, file)


def test_what_is_scored_is_never_calibrated_on(eyes: Checkpoint, tmp_path: Path) -> None:
    held_out = calibration.held_out_text()
    (tmp_path / "a.txt").write_text("Something else. " * 50 + "\n" + held_out[2000:6000])
    with pytest.raises(UsageError, match=r"a\.txt holds text that edgevl measure scores"):
        load(eyes, tmp_path)
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"text": held_out}))
    with pytest.raises(UsageError, match=r"mine\.jsonl line 1 holds text that edgevl measure scores"):
        load(eyes, file)
    scored = Tokenizer(eyes.tokenizer_json()).encode(held_out, specials=False)
    for name in ("text", "mixed"):
        assert overlap(scored, set(describe(name, load(eyes, name, 16, 512), 0)["fingerprints"])) == 0


@pytest.mark.parametrize("name", SETS)
def test_manifests_say_where_everything_comes_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = manifest(name)
    assert content["name"] == name and content["sources"]
    assert all({"what", "source", "licence"} <= set(source) for source in content["sources"])
    if any("file" in source for source in content["sources"]):
        monkeypatch.setattr(manifests, "_sha256", lambda _: "0" * 64)
        with pytest.raises(EdgevlError, match="is not what its manifest says"):
            manifest(name)


def test_what_cannot_work_is_refused(eyes: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nosuchset does not exist; use text, image-text, mixed, self, a folder, or"):
        load(eyes, "nosuchset")
    (tmp_path / "own").mkdir()
    with pytest.raises(UsageError, match=r"holds no \*\.txt files and no pictures"):
        load(eyes, tmp_path / "own")
    (tmp_path / "own" / "short.txt").write_text("Too short.")
    with pytest.raises(UsageError, match="give only 0 sequences"):
        load(eyes, tmp_path / "own")
    (tmp_path / "own" / "short.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        load(eyes, tmp_path / "own")
    with pytest.raises(UsageError, match="do not fit into sequences of 32 tokens"):
        load(eyes, "image-text", length=32)
    blind = open_checkpoint(tiny_llama(tmp_path / "text"))
    with pytest.raises(UsageError, match="has pictures and this model has no eyes"):
        load(blind, "mixed")


def test_texts_never_run_out_and_never_meet_the_held_out_ones() -> None:
    stream = documents(0)
    assert all(d.text or d.turns[-1].role == "assistant" for d in (next(stream) for _ in range(150)))
    held_out = calibration.held_out_text()
    assert len(held_out) > 10_000
    for name in ("prose.txt", "code.txt", "chat.txt"):
        for document in read_documents(DATA / name):
            for text in (document.text, *(turn.text for turn in document.turns)):
                assert not any(line in held_out for line in text.splitlines() if len(line) > 60)


def test_turns() -> None:
    turns = parse_turns("user: one\nmore\nassistant: two: three\n")
    assert [(turn.role, turn.text) for turn in turns] == [("user", "one\nmore"), ("assistant", "two: three")]
