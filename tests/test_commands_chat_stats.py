"""`edgevl chat`: what /stats says of the last answer and of the whole session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoints import tiny_vl
from deploy.build import BuildSettings, build
from edgevl.commands.chat import command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat_stats")
    tiny_vl(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=384))
    return root / "b"


def talk(bundle: Path, *lines: str) -> str:
    """What a session says on stderr."""
    arguments = [str(bundle), "--max-tokens", "3", "--threads", "1"]
    result = CliRunner().invoke(command, arguments, input="\n".join(lines))
    assert result.exit_code == 0, result.output
    return result.stderr


def numbers(pattern: str, text: str) -> list[int]:
    return [int(n) for n in re.findall(pattern, text, re.MULTILINE)]


def test_stats_before_an_answer_are_of_the_memory_only(bundle: Path) -> None:
    said = talk(bundle, "/stats")
    assert "resident" in said
    assert "tokens:" not in said


def test_stats_add_up_over_the_session(bundle: Path) -> None:
    said = talk(bundle, "Hello?", "/stats", "And more?", "/stats")
    last = numbers(r"^tokens: (\d+) prompt", said)
    session = numbers(r"^session, \d+ finished: tokens: (\d+) prompt", said)
    assert numbers(r"^session, (\d+) finished: tokens", said) == [1, 2]
    assert session == [last[0], last[0] + last[1]]
    assert len(re.findall(r"tokens/s\)$", said, re.MULTILINE)) == 4


def test_the_session_outlives_a_reset(bundle: Path) -> None:
    said = talk(bundle, "Hello?", "/reset", "/stats")
    assert numbers(r"^session, (\d+) finished: tokens", said) == [1]
    assert not numbers(r"^tokens: (\d+) prompt", said)
