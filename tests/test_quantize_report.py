"""report.json and report.html: what is in them, that they need nothing else, and how measure fills them in."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from checkpoints import tiny_llama, tiny_vl
from edgevl.commands import measure
from edgevl.errors import UsageError
from quantize.job import quantize
from quantize.report import add_measurement, read_report
from quantize.settings import EFFORTS, QuantizeSettings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, quantized) of a model with eyes."""
    folder = tmp_path_factory.mktemp("report")
    model = tiny_vl(folder / "m", "bf16")
    quantize(str(model), folder / "out", QuantizeSettings(samples=4, length=128))
    return model, folder / "out"


def test_the_report_says_what_was_done(made: tuple[Path, Path]) -> None:
    report = read_report(made[1])
    assert report["settings"]["effort"] == "balanced" and len(report["blocks"]) == 2
    used = report["calibration"]
    assert (used["name"], used["samples"], used["length"], used["pictures"]) == ("mixed", 4, 128, 2)
    assert used["image_tokens"] > 0 and used["sources"]
    for block in report["blocks"]:
        learned = block["reconstruction"]
        assert learned["steps"] == EFFORTS["balanced"].reconstruct
        assert learned["kept"] == (learned["error_after"] < learned["error_before"])
        assert block["error"] > 0 and block["seconds"] > 0 and "channels" not in block
        assert 0 < block["drift"] < 1
        assert all(group["error_chosen"] <= group["error_rounded"] for group in block["groups"])
    errors = sorted((group["error_chosen"] for block in report["blocks"] for group in block["groups"]), reverse=True)
    assert [entry["error"] for entry in report["worst"]] == errors[:3]
    assert report["quality"]["kl"] > 0 and report["quality"]["standard_errors"]["kl"] > 0
    assert report["bytes"]["quantized"] < report["bytes"]["original"]
    assert set(report["stages"]) == {"calibration", "check", "blocks", "measure"}
    assert 0 < report["memory"]["peak_own_bytes"] <= report["memory"]["peak_resident_bytes"]
    for name, sha in report["sha256"].items():
        assert hashlib.sha256((made[1] / name).read_bytes()).hexdigest() == sha
    assert "model.safetensors" in report["sha256"]


def test_the_figures_are_those_of_measure(made: tuple[Path, Path]) -> None:
    """The held-out text went along block by block; measure reads both checkpoints. Same text, so the same figures."""
    from calibration import held_out_text
    from edgevl.checkpoint import open_checkpoint
    from edgevl.tokenizer import Tokenizer
    from quantize.measure import HELD_OUT, compare, text_tokens

    original, copy = (open_checkpoint(path) for path in made)
    tokenizer = Tokenizer(original.tokenizer_json())
    ids = [token for row in text_tokens(original, held_out_text())[:HELD_OUT] for token in row[1:]]
    found = compare(original, copy, tokenizer.decode(ids)) if tokenizer.decode(ids) in held_out_text() else None
    quality = read_report(made[1])["quality"]
    assert found is not None and found.tokens == quality["tokens"]
    assert found.kl == pytest.approx(quality["kl"], rel=1e-3)
    assert found.perplexity_quantized == pytest.approx(quality["perplexity"]["quantized"], rel=1e-4)


def test_the_page_needs_nothing_else(made: tuple[Path, Path]) -> None:
    page = (made[1] / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|iframe|object|embed)\b", page)
    outside = re.findall(r"""(?:href|src)\s*=\s*["'](?!#|data:)[^"']*|url\((?!#)[^)]*|@import""", page)
    assert outside == []
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'(?:href="|url\()#([^")]+)', page):
        assert name in ids
    assert "layers.0" in page and "currentColor" in page and "mixed" in page


def test_measure_fills_the_report_in(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Words that nobody has calibrated on, over and over again. " * 30)
    before = read_report(made[1])
    arguments = [*map(str, made), "--text", str(tmp_path / "mine.txt"), "--report", "--json"]
    result = CliRunner().invoke(measure.command, arguments, catch_exceptions=False)
    found, after = json.loads(result.stdout), read_report(made[1])
    own = {"kl_on_calibration": before["quality"]["kl_on_calibration"]}
    assert after["quality"] == own | found | {"text": "mine.txt"} and found["calibrated_on"] == 0
    assert {k: v for k, v in after.items() if k != "quality"} == {k: v for k, v in before.items() if k != "quality"}
    assert "mine.txt" in (made[1] / "report.html").read_text()


def test_measure_says_when_the_text_was_calibrated_on(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    text = "".join(f"Sentence number {i} is of no great interest to anybody. " for i in range(60))
    (tmp_path / "own" / "a.txt").write_text(text)
    model = tiny_llama(tmp_path / "m")
    settings = QuantizeSettings(calibration=str(tmp_path / "own"), samples=2, length=128, measure=False)
    assert quantize(str(model), tmp_path / "out", settings)["quality"] is None
    arguments = [str(model), str(tmp_path / "out"), "--text", str(tmp_path / "own" / "a.txt"), "--json"]
    result = CliRunner().invoke(measure.command, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["calibrated_on"] > 0.05
    assert "is what" in result.stderr and "was calibrated on" in result.stderr


def test_a_checkpoint_of_another_tool_gets_a_report(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "q", awq=True)
    measured = {"perplexity": {"original": 2.0, "quantized": 3.0}, "kl": 0.5, "top1": 0.9, "tokens": 10, "images": {}}
    add_measurement(folder, measured)
    assert read_report(folder)["quality"] == measured
    assert "2 → 3" in (folder / "report.html").read_text()
    (folder / "report.json").write_text("[")
    with pytest.raises(UsageError, match=r"report\.json cannot be read"):
        add_measurement(folder, measured)
