"""`edgevl chat`: one question, conversations through a pipe and at a terminal, and what goes where."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.cli import main
from edgevl.engine import Delta, Engine, Request, Result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that sees (`b`), one that does not (`text`), and pictures."""
    root = tmp_path_factory.mktemp("chat")
    tiny_vl(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=384))
    tiny_llama(root / "t")
    build(str(root / "t"), root / "text", BuildSettings(context=128))
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"picture {i}.png")
    (root / "bad.png").write_bytes(b"not a picture")
    return root


class Input(io.TextIOWrapper):
    """A stdin that says what it is."""

    def __init__(self, data: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    def call(*arguments: object, stdin: str | bytes = b"", terminal: bool = False) -> tuple[int, str, str]:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", Input(data, terminal))
        with pytest.raises(SystemExit) as done:
            main(["chat", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, out, err

    return call


FIELDS = {
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "tokens": dict,
    "seconds": dict,
    "memory": dict,
    "backend": str,
}


def test_json_has_the_promised_fields(run, root: Path) -> None:
    pictures = ("-i", root / "picture 0.png", "-i", root / "picture 1.png")
    code, out, _ = run(root / "b", *pictures, "-p", "What?", "--max-tokens", 5, "--threads", 1, "--json")
    assert code == 0
    assert out.count("\n") == 1
    document = json.loads(out)
    for name, kind in FIELDS.items():
        assert isinstance(document[name], kind), name
    assert document["finish_reason"] in ("stop", "length")
    assert set(document["tokens"]) >= {"prompt", "image", "generated", "reused"}
    assert set(document["seconds"]) >= {"load", "vision", "prefill", "decode"}
    assert document["tokens"]["image"] > 0
    assert document["tokens"]["generated"] == len(document["token_ids"]) <= 5
    assert document["memory"]["resident_bytes"] > document["memory"]["planned_bytes"] > 0
    assert document["backend"].startswith("cpu")


def test_json_is_no_conversation_at_a_terminal(run, root: Path) -> None:
    code, out, err = run(root / "b", "--json", terminal=True)
    assert (code, out) == (2, "")
    assert "-p" in err


def test_json_through_a_pipe_is_a_document_a_line(run, root: Path) -> None:
    lines = (f"/image {root}/picture 0.png", "What?", "/nonsense", "And now?")
    code, out, err = run(root / "b", "--json", "--max-tokens", 3, stdin="\n".join(lines))
    assert code == 2  # of the nonsense
    first, second = (json.loads(line) for line in out.splitlines())
    assert set(FIELDS) <= set(first) and set(FIELDS) <= set(second)
    assert second["tokens"]["reused"] == first["tokens"]["prompt"] + 2  # the last token of a cut answer comes later
    assert err.count("edgevl: ") == 1


def test_the_same_answer_streams_as_text(run, root: Path) -> None:
    question = (root / "b", "-p", "Hello?", "--max-tokens", 8)
    expected = json.loads(run(*question, "--json")[1])
    code, out, err = run(*question)
    assert (code, out) == (0, expected["text"] + "\n")
    assert ("--max-tokens" in err) == (expected["finish_reason"] == "length")
    assert run(root / "b", "-p", "-", "--max-tokens", 8, stdin="Hello?")[1] == out
    assert run(*question, "--backend", "reference")[1] == out


def test_sampling_follows_the_seed(run, root: Path) -> None:
    def ids(seed: int) -> list[int]:
        options = ("--temperature", 2, "--top-p", 0.9, "--seed", seed, "--max-tokens", 12, "--json")
        found: list[int] = json.loads(run(root / "b", "-p", "Hello?", *options)[1])["token_ids"]
        return found

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("b", "-p", "x", *(["-i", "picture 0.png"] * 5)), ("5", "4")),
        (("b", "-p", "x", "-i", "bad.png"), ("bad.png",)),
        (("b", "-p", "x", "-i", "none.png"), ("none.png",)),
        (("b", "-p", ""), ("empty",)),
        (("b", "-p", "x", "--max-tokens", "0"), ("0", "1")),
        (("b", "-p", "x", "--max-tiles", "0"), ("--max-tiles is 0",)),
        (("b", "-p", "x", "--first-token", "0s"), ("--first-token is 0 s",)),
        (("b", "-p", "x", "--temperature", "-1"), ("-1",)),
        (("b", "-p", "x", "--top-p", "1.5"), ("1.5",)),
        (("b", "-p", "x", "--seed", "-3"), ("-3",)),
        (("b", "-p", "x", "--system", "\udcff"), ("--system", "UTF-8")),
        (("b", "-p", "\udcff"), ("UTF-8",)),
        (("b", "-p", "word " * 500), ("384", "1520", "1024")),
        (("text", "-p", "x", "-i", "picture 0.png"), ("eyes",)),
        (("text", "-p", "x", "--max-tiles", "2"), ("eyes", "--max-tiles")),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], words: tuple[str, ...], run, root: Path) -> None:
    files = {p.name: str(p) for p in root.iterdir()} | {"none.png": str(root / "none.png")}
    code, out, err = run(*(files.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    sentences = [s for s in err.splitlines() if s.startswith("edgevl: ")]
    assert len(sentences) == 1, err
    for word in words:
        assert word in sentences[0]


def test_stdin_that_is_no_text_is_refused(run, root: Path) -> None:
    code, out, err = run(root / "b", "-p", "-", stdin=b"\xff\xfe")
    assert (code, out) == (2, "")
    assert "stdin" in err
    assert run(root / "b", "-p", "-", stdin=b"")[0] == 2


def test_a_conversation_through_a_pipe(run, root: Path) -> None:
    lines = ["Hello?", "", f"/image {root}/picture 0.png", "And this?", "/stats", "/reset", "/help", "/exit", "never"]
    code, out, err = run(root / "b", "--max-tokens", 3, stdin="\n".join(lines))
    assert code == 0
    assert "> " not in out + err  # nothing is drawn for a pipe
    assert "80x60" in err
    assert "reused" in err
    assert "/image PATH" in err
    first = run(root / "b", "-p", "Hello?", "--max-tokens", 3)[1]
    assert out.startswith(first)
    assert len(out) > len(first)


def test_a_pipe_goes_on_after_errors_and_exits_with_2(run, root: Path) -> None:
    lines = [b"/image", b"/image none.png", b"/nonsense", b"\xff", f"/image '{root}/bad.png'".encode(), b"Hello?"]
    code, out, err = run(root / "b", "--max-tokens", 3, stdin=b"\n".join(lines))
    assert code == 2
    assert err.count("edgevl: ") == 5
    assert out == run(root / "b", "-p", "Hello?", "--max-tokens", 3)[1]


def test_images_of_the_command_line_belong_to_the_first_message(run, root: Path) -> None:
    code, out, _ = run(root / "b", "-i", root / "picture 0.png", "--max-tokens", 3, stdin="What?\n")
    assert code == 0
    assert out == run(root / "b", "-i", root / "picture 0.png", "-p", "What?", "--max-tokens", 3)[1]


def test_ctrl_c_stops_the_answer_and_keeps_the_session(run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def stream(self: Engine, request: Request) -> Iterator[Delta | Result]:
        asked.append(request)
        yield Delta(1, "half\x1b[2J")
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield Result("half\x1b[2J", (1,), "stop", {}, {})

    typed: list[str | type[BaseException]] = ["one", KeyboardInterrupt, "two", EOFError]

    def read(prompt: str = "") -> str:
        item = typed.pop(0)
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr(Engine, "stream", stream)
    monkeypatch.setattr("builtins.input", read)
    code, out, err = run(root / "b", terminal=True)
    assert code == 0
    assert "stopped" in err
    assert out == "half\x1b[2J\nhalf\x1b[2J\n"  # a file gets the model's own characters
    assert [m.text for m in asked[1].messages] == ["one", "half\x1b[2J", "two"]


def test_ctrl_c_ends_a_single_question_with_130(run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: Engine, request: Request) -> Iterator[Delta | Result]:
        yield Delta(1, "half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", stream)
    code, out, _ = run(root / "b", "-p", "x")
    assert (code, out) == (130, "half\n")


def test_a_terminal_is_spared_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgevl.terminal import show_text

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_text("a\x1b]0;title\x07\tb\n\x9b2J\r é")
    assert capsys.readouterr().out == "a]0;title\tb\n2J é"
