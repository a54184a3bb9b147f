"""`edgevl measure`: text and pictures, what goes where, and wrong input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_llama, tiny_vl
from edgevl.cli import main

FONTS = importlib.util.find_spec("font_lato") is not None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measure")
    tiny_vl(root / "a")
    tiny_vl(root / "b", awq=True)
    tiny_llama(root / "blind")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return root


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["measure", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert isinstance(done.value.code, int)
    return done.value.code, out, err


@pytest.mark.skipif(not FONTS, reason="the fonts are not installed")
def test_text_and_pictures(capfd: pytest.CaptureFixture[str], root: Path) -> None:
    said = root / "answers.jsonl"
    where = ("--text", root / "text.txt", "--images", 11, "--answers", said)
    code, out, err = run(capfd, root / "a", root / "b", *where, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["perplexity"]["original"] > 1 and document["tokens"] > 32
    tasks = document["images"]
    assert set(tasks) == {"lines", "fields", "charts", "panels", "scenes"}
    for task in tasks.values():
        assert task["count"] > 0
        assert task["original_interval"][0] <= task["original"] <= task["original_interval"][1]
    lines = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2 * sum(task["count"] for task in tasks.values())
    assert set(lines[0]) == {"model", "task", "question", "right", "given"}

    code, out, _ = run(capfd, root / "a", root / "a", "--text", root / "text.txt")
    assert code == 0
    assert "top-1       100.0 ± 0.0 % the same" in out


def test_wrong_input(capfd: pytest.CaptureFixture[str], root: Path) -> None:
    code, _, err = run(capfd, root / "blind", root / "blind", "--images", 11)
    assert code == 2 and "without eyes" in err
    if not torch.cuda.is_available():
        code, _, err = run(capfd, root / "a", root / "b", "--device", "cuda")
        assert code == 2 and "needs a GPU" in err
    code, _, err = run(capfd, root / "a", root / "b", "--answers", root / "x")
    assert code == 2 and "add --images" in err
    code, _, err = run(capfd, root / "a", root / "b", "--images", 11, "--answers", root / "no" / "x")
    assert code == 2 and "does not exist" in err
    code, _, err = run(capfd, root / "a", root / "b", "--images", -1)
    assert code == 2
