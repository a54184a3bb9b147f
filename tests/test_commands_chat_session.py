"""`edgevl chat` as a session: videos, saving and loading, and a sentence for everything that goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from camera_server import write_clip
from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.commands.chat import command
from edgevl.errors import EdgevlError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("session")
    tiny_vl(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=384))
    tiny_llama(root / "t")
    build(str(root / "t"), root / "text", BuildSettings(context=128))
    write_clip(root / "clip.mp4", frames=40)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    (root / "bad.mp4").write_bytes(b"not a video")
    return root


def chat(bundle: Path, *arguments: object, lines: tuple[str, ...] = ()) -> Result:
    options = ["--max-tokens", "3", "--threads", "1", *map(str, arguments)]
    return CliRunner().invoke(command, [str(bundle), *options], input="\n".join(lines))


def document(result: Result) -> dict[str, dict[str, int]]:
    assert result.exit_code == 0, result.output
    found: dict[str, dict[str, int]] = json.loads(result.stdout)
    return found


def test_a_video_is_one_block_of_one_tile_a_frame(root: Path) -> None:
    result = document(chat(root / "b", "--video", root / "clip.mp4", "--frames", 5, "-p", "What?", "--json"))
    without = document(chat(root / "b", "-p", "What?", "--json"))
    assert result["tokens"]["image"] == 5 * 4
    assert result["tokens"]["prompt"] == without["tokens"]["prompt"] + 5 * 4 + 2 + 1  # <img>, </img>, a line of its own


def test_frames_come_from_what_is_left_of_the_context(root: Path) -> None:
    alone = document(chat(root / "b", "--video", root / "clip.mp4", "-p", "What?", "--json"))
    assert alone["tokens"]["image"] == 32 * 4
    lines = ("word " * 80, f"/video {root / 'clip.mp4'}", "What?", "/stats")
    result = chat(root / "b", lines=lines)
    assert result.exit_code == 0, result.output
    shown = re.search(r"clip.mp4: (\d+) frames of 3.9 s", result.stderr)
    assert shown is not None and 8 <= int(shown[1]) < 32
    assert f"video {4 * int(shown[1])}" in result.stderr
    assert "dropped" not in result.stderr and "turns: 2" in result.stderr  # there was room for the question too


def test_too_many_frames_become_fewer_and_it_is_said(root: Path) -> None:
    result = chat(root / "b", "--video", root / "clip.mp4", "--frames", 40, "-p", "word " * 80, "--json")
    assert document(result)["tokens"]["image"] < 160
    notes = json.loads(result.stdout)["notes"]
    assert any(re.fullmatch(r"clip.mp4: \d+ of 40 frames are shown to fit 384 tokens", note) for note in notes)


def test_a_session_survives_a_restart(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    shown = (f"/image {root / 'picture.png'}", f"/video {root / 'clip.mp4'}")
    whole = chat(root / "b", "--frames", 4, "--system", "Be brief.", lines=(*shown, "One?", "Two?", "Three?"))
    first = chat(root / "b", "--frames", 4, "--system", "Be brief.", lines=(*shown, "One?", "Two?", f"/save {path}"))
    second = chat(root / "b", lines=(f"/load {path}", "Three?", "/stats"))
    assert (whole.exit_code, first.exit_code, second.exit_code) == (0, 0, 0), first.stderr + second.stderr
    assert first.stdout + second.stdout == whole.stdout
    assert "turns: 3" in second.stderr
    assert re.search(r"\(system \d+, questions", second.stderr)  # the system message was loaded too


def test_stats_name_the_parts(root: Path) -> None:
    said = chat(root / "b", lines=(f"/image {root / 'picture.png'}", "What?", "/stats")).stderr
    for words in ("of 384 tokens (questions", "pictures", "answers 3", "template", "GB/s", "resident"):
        assert words in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/video", "path of a video"),
        ("/video none.mp4", "none.mp4 does not exist"),
        ("/video {root}/bad.mp4", "no video that can be read"),
        ("/video {root}", "is a folder"),
        ("/video /dev/null", "is no plain file"),
        ("/video {root}/picture.png\n/video {root}/picture.png", "a video waits for a question already"),
        ("/image {root}/clip.mp4", "is a video; show it with /video"),
        ("/save", "name of a file"),
        ("/save {root}/new.json", "nothing to save"),
        ("/load", "path of a saved conversation"),
        ("/load {root}/picture.png", "no saved conversation"),
        ("/load none.json", "not a file"),
        ("/image ~nosuchuser/x.png", "names a user who is not here"),
        ("/load /" + "x" * 5000, "too long"),
        ("/image a\0b.png", "NUL"),
    ],
)
def test_a_bad_line_is_one_sentence_and_the_session_goes_on(root: Path, line: str, words: str) -> None:
    result = chat(root / "b", lines=(line.format(root=root), "What?"))
    assert result.exit_code == 2
    sentences = [s for s in result.stderr.splitlines() if s.startswith("edgevl: ")]
    assert len(sentences) == 1 and words in sentences[0]
    assert result.stdout.endswith("\n") and len(result.stdout) > 1


@pytest.mark.parametrize(
    ("bundle", "arguments", "words"),
    [
        ("b", ("--video", "none.mp4"), "none.mp4 does not exist"),
        ("b", ("--video", "{root}/bad.mp4"), "no video that can be read"),
        ("b", ("--video", "{root}/clip.mp4", "--frames", "0"), "--frames is 0"),
        ("b", ("--video", "{root}/clip.mp4", "--frames", "1000"), "at most --frames 95"),
        ("b", ("--frames", "3"), "--video"),
        ("b", ("-i", "{root}/clip.mp4"), "is a video; show it with --video"),
        ("text", ("--video", "{root}/clip.mp4"), "eyes"),
        ("b", ("--embeddings", "{root}/picture.png"), "cannot be made"),
    ],
)
def test_bad_options_are_one_sentence(root: Path, bundle: str, arguments: tuple[str, ...], words: str) -> None:
    result = chat(root / bundle, "-p", "What?", *(a.format(root=root) for a in arguments))
    assert isinstance(result.exception, EdgevlError)
    assert result.exception.exit_code == 2
    assert words in str(result.exception)
    assert result.stdout == ""


def test_a_saved_picture_is_not_shown_to_a_model_without_eyes(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    assert chat(root / "b", lines=(f"/image {root / 'picture.png'}", "One?", f"/save {path}")).exit_code == 0
    result = chat(root / "text", lines=("Two?", f"/load {path}", "/stats"))
    assert result.exit_code == 2
    assert "eyes" in result.stderr
    assert "turns: 1" in result.stderr  # the conversation that was there is still there


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"text": "x", "token_ids": [10**9]}, "token ids that this model does not know"),
        ({"picture": 0, "tiling": {"max_tiles": 1, "thumbnail": True, "rule": "native"}}, "only the user shows"),
    ],
)
def test_an_answer_that_no_question_can_follow_is_not_loaded(
    root: Path, tmp_path: Path, last: dict[str, object], words: str
) -> None:
    path = tmp_path / "talk.json"
    assert chat(root / "b", lines=(f"/image {root / 'picture.png'}", "One?", f"/save {path}")).exit_code == 0
    saved = json.loads(path.read_bytes())
    saved["messages"][-1]["parts"] = [last]
    path.write_text(json.dumps(saved))
    result = chat(root / "b", lines=("Two?", f"/load {path}", "Three?", "/stats"))
    assert result.exit_code == 2
    assert words in result.stderr
    assert "turns: 2" in result.stderr  # the conversation that was there goes on


def test_a_first_token_that_is_wanted_soon_takes_one_tile(root: Path) -> None:
    asked = ("-i", root / "picture.png", "-p", "What?", "--json")
    soon, late = (json.loads(chat(root / "b", "--first-token", t, *asked).stdout) for t in ("0.001ms", "1h"))
    assert soon["tokens"]["image"] == 4 < late["tokens"]["image"]
    assert any("fewer is not possible" in note for note in soon["notes"])
    result = chat(root / "text", "--first-token", "1s", "-p", "What?")
    assert "--first-token" in str(result.exception)
