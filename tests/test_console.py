"""Notes, tables and progress: stdout for answers only, nothing that a path could break."""

from __future__ import annotations

import json

import pytest

from edgevl import console


def test_json_is_one_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("for people")
    console.print_json({"text": "a\nbé"})
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == {"text": "a\nbé"}
    assert err == "for people\n"


def test_tables_take_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("", ["", ""], [["path", "/tmp/[/b]x[red]"]])
    out, err = capsys.readouterr()
    assert "/tmp/[/b]x[red]" in out
    assert err == ""
    console.table("", ["a"], [["b"]], to_stderr=True)
    out, err = capsys.readouterr()
    assert (out, "b" in err) == ("", True)


def test_progress_without_a_terminal_is_a_line_a_stage_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 5.0, 20.0, 21.0, 22.0])
    with console.progress() as move:
        monkeypatch.setattr("edgevl.console.time.monotonic", lambda: next(now))
        move("block 1 of 4", 0, 4)
        move("block 1 of 4", 0, 4)
        move("block 2 of 4", 1, 4)
        move("block 3 of 4", 2, 4)
        move("writing", 0, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["block 1 of 4 …", "block 2 of 4: 25 %, about 60 s left", "writing …"]


def test_progress_on_a_terminal_draws_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as move:
        for done in range(3):
            move(f"block {done} [x]", done, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "block" in err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345_678, "12.3 MB"),
        (270_000_000, "270 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert console.bytes_text(count) == text
