"""`edgevl caption`: lines as promised, pictures that fail, and runs that go on where the last one ended."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.camera.files import find_files
from edgevl.cli import main
from edgevl.engine import Delta, Engine, Request, Result
from edgevl.image import load_image


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("caption")
    tiny_vl(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=384))
    return root / "b"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, a.JPG, sub/c.png, and files that are no pictures."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.JPG", "sub/c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> object:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["caption", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, out, err

    return call


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_which_pictures_and_in_which_order(folder: Path) -> None:
    def names(*sources: str, recursive: bool = False) -> list[str]:
        found = find_files(tuple(folder / s for s in sources), recursive)
        return [p.relative_to(folder).as_posix() for p in found]

    assert names("") == ["a.JPG", "b.png"]
    assert names("", recursive=True) == ["a.JPG", "b.png", "sub/c.png"]
    assert names("sub", "b.png", "", "notes.txt") == ["sub/c.png", "b.png", "a.JPG", "notes.txt"]


def test_a_line_for_every_picture(run, bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, stdout, _ = run(bundle, folder, "-r", "-o", out, "--max-tokens", 4, "--json")
    assert code == 0
    assert json.loads(stdout) == {"output": str(out), "pictures": 3, "written": 3, "skipped": 0, "failed": 0}
    lines = read(out)
    assert [line["source"] for line in lines] == [str(folder / n) for n in ("a.JPG", "b.png", "sub/c.png")]
    digest = (bundle / "manifest.sha256").read_text().strip()
    for line in lines:
        assert isinstance(line["caption"], str)
        assert set(line["seconds"]) == {"total", "vision", "prefill", "decode"}
        assert 0 < sum(line["seconds"].values()) <= 2 * line["seconds"]["total"]
        assert line["model"] == digest
        shown = load_image(str(line["source"]))
        assert line["frame"] == {"sha256": shown.digest, "width": 64, "height": 48}
        assert datetime.datetime.fromisoformat(str(line["time"])).tzinfo is not None


def test_lines_have_the_fields_of_a_schema(run, bundle: Path, folder: Path, tmp_path: Path) -> None:
    out, rules = tmp_path / "out.jsonl", tmp_path / "rules.json"
    number = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    rules.write_text(json.dumps({**number, "additionalProperties": False}))
    asked = (bundle, folder / "b.png", "-o", out, "--max-tokens", 20)
    assert run(*asked, "--schema", rules)[0] == 0
    assert run(*asked, "--schema", rules)[0] == 0  # done already
    (line,) = read(out)
    assert isinstance(line["fields"], dict) and isinstance(line["fields"]["n"], int)
    assert "caption" not in line
    rules.write_text('{"type": "boolean"}')
    assert run(*asked, "--schema", rules)[0] == 0
    assert run(*asked)[0] == 0
    assert [type(line.get("fields")) for line in read(out)] == [dict, bool, type(None)]
    rules.write_text('{"not": {}}')
    code, _, err = run(*asked, "--schema", rules)
    assert code == 2
    assert "cannot be enforced" in err


def test_what_can_never_be_answered_is_refused_before_the_first_picture(
    run, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"const": "a rather long constant"}')
    for sources in ((folder,), (folder, "/dev/video77")):
        code, out, err = run(bundle, *sources, "--schema", rules, "--max-tokens", 5)
        assert (code, out) == (2, "")
        assert "ends within 4 tokens" in err
        code, out, err = run(bundle, *sources, "--prompt", "word " * 2000)
        assert (code, out) == (2, "")
        assert "questions" in err and "384" in err


def test_a_second_run_skips_what_is_done(run, bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(bundle, folder / "b.png", "-o", out, "--max-tokens", 4)
    with out.open("ab") as file:
        file.write(b'{"time": "2026-01-01T00:')  # killed in the middle of a line
    code, stdout, err = run(bundle, folder, "-o", out, "--max-tokens", 4, "--json")
    assert (code, json.loads(stdout)["skipped"], json.loads(stdout)["written"]) == (0, 1, 1)
    assert "skipped" in err
    assert "half a line" in err
    assert [line["source"] for line in read(out)] == [str(folder / n) for n in ("b.png", "a.JPG")]
    before = out.read_bytes()
    assert run(bundle, folder, "-o", out, "--max-tokens", 4)[0] == 0
    assert out.read_bytes() == before
    Image.new("RGB", (40, 40)).save(folder / "b.png")  # another picture of the same name is another caption
    run(bundle, folder, "-o", out, "--max-tokens", 4)
    run(bundle, folder, "-o", out, "--max-tokens", 4, "--prompt", "What colour?")
    assert [Path(str(line["source"])).name for line in read(out)[2:]] == ["b.png", "a.JPG", "b.png"]


def test_a_bad_picture_has_a_line_and_the_others_are_done(run, bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (folder / "aa.png").write_bytes(b"not a picture")
    arguments = (bundle, folder, folder / "none.png", "-o", out, "--max-tokens", 4)
    code, stdout, err = run(*arguments)
    assert (code, stdout) == (2, "")
    assert err.count("edgevl: ") == 2
    lines = read(out)
    assert ["error" in line for line in lines] == [False, True, False, True]
    assert "aa.png" in str(lines[1]["error"])
    before = out.read_bytes()
    assert run(*arguments)[0] == 2  # tried again, told again, written once
    assert out.read_bytes() == before
    Image.new("RGB", (40, 40)).save(folder / "aa.png")
    run(*arguments)
    assert read(out)[-1]["source"] == str(folder / "aa.png")
    assert "caption" in read(out)[-1]


def test_ctrl_c_keeps_what_is_done(
    run, bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def stream(self: Engine, request: Request) -> Iterator[Delta | Result]:
        asked.append(request)
        if len(asked) == 2:
            raise KeyboardInterrupt
        yield Result("a picture", (1,), "stop", {}, {})

    monkeypatch.setattr(Engine, "stream", stream)
    out = tmp_path / "out.jsonl"
    code, _, err = run(bundle, folder, "-o", out)
    assert code == 130
    assert "go on" in err
    assert [line["caption"] for line in read(out)] == ["a picture"]
    assert run(bundle, folder, "-o", out)[0] == 0
    assert len(read(out)) == 2


def test_bad_usage(run, bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "empty").mkdir()
    tiny_llama(tmp_path / "t")
    build(str(tmp_path / "t"), tmp_path / "text", BuildSettings(context=128))
    for arguments, word in (
        ((bundle, tmp_path / "empty", "-o", out), "empty"),
        ((bundle, folder, "-o", out, "--max-tokens", 0), "--max-tokens"),
        ((bundle, folder, "-o", folder / "b.png"), "b.png"),
        ((bundle, folder, "-o", folder), "pictures"),
        ((tmp_path / "text", folder, "-o", out), "eyes"),
        ((tmp_path / "none", folder, "-o", out), "none"),
    ):
        code, stdout, err = run(*arguments)
        assert (code, stdout) == (2, "")
        assert word in err
    assert run(bundle, "-o", out)[0] == 2
