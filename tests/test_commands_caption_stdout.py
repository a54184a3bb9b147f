"""`edgevl caption`: lines to stdout, the tokens of a line, --max-tiles, and folders without pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from checkpoints import tiny_vl
from deploy.build import BuildSettings, build
from edgevl.commands.caption import command
from edgevl.errors import UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle (`b`), a wide picture in `pictures`, a folder whose only picture is in a subfolder (`deep`)."""
    root = tmp_path_factory.mktemp("caption_stdout")
    tiny_vl(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=384))
    for folder in ("pictures", "deep/sub"):
        (root / folder).mkdir(parents=True)
        pixels = np.random.default_rng(7).integers(0, 256, (60, 240, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / folder / "wide.png")
    return root


def run(root: Path, *arguments: object) -> Result:
    given = [str(root / "b"), *map(str, arguments), "--max-tokens", "3", "--threads", "1"]
    return CliRunner().invoke(command, given)


def test_lines_go_to_stdout_without_an_output(root: Path) -> None:
    (root / "bad.png").write_bytes(b"not a picture")
    result = run(root, root / "pictures", root / "bad.png")
    assert result.exit_code == 2
    good, bad = (json.loads(line) for line in result.stdout.splitlines())
    assert good["frame"]["width"] == 240
    assert isinstance(good["caption"], str)
    assert "bad.png" in bad["error"]
    assert "caption" not in bad
    assert "stdout: 1" in result.stderr


def test_a_line_counts_its_tokens_and_max_tiles_lowers_them(root: Path) -> None:
    def image_tokens(*arguments: object) -> int:
        line = json.loads(run(root, root / "pictures", *arguments).stdout)
        assert set(line["tokens"]) == {"prompt", "image", "generated", "reused", "steps"}
        count: int = line["tokens"]["image"]
        return count

    assert 0 < image_tokens("--max-tiles", 1) < image_tokens()


def test_every_folder_needs_a_picture(root: Path) -> None:
    result = run(root, root / "pictures", root / "deep")
    assert isinstance(result.exception, UsageError)
    assert "deep" in str(result.exception)
    assert "-r" in str(result.exception)
    assert result.stdout == ""
    assert len(run(root, root / "pictures", root / "deep", "-r").stdout.splitlines()) == 2


@pytest.mark.parametrize(("option", "word"), [(("--json",), "-o"), (("--max-tiles", 0), "0")])
def test_bad_usage(root: Path, option: tuple[object, ...], word: str) -> None:
    result = run(root, root / "pictures", *option)
    assert isinstance(result.exception, UsageError)
    assert word in str(result.exception)
    assert result.stdout == ""
