"""`edgevl quantize` and `edgevl measure` through click: what goes to stdout, what to stderr, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoints import tiny_llama
from edgevl.commands import measure, quantize
from edgevl.errors import MissingExtraError, UsageError


def test_quantize_then_measure(tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "m"), tmp_path / "out"
    arguments = [str(model), "-o", str(out), "--samples", "2", "--length", "128", "--json"]
    result = CliRunner().invoke(quantize.command, arguments, catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["settings"]["group_size"] == 64 and len(report["blocks"]) == 2
    assert "groups of 64, the largest that divides all widths" in result.stderr
    assert "kept lm_head: errors in the logits" in result.stderr
    (tmp_path / "text.txt").write_text("Some words that nobody has calibrated on. " * 30)
    arguments = [str(model), str(out), "--text", str(tmp_path / "text.txt"), "--json"]
    found = json.loads(CliRunner().invoke(measure.command, arguments, catch_exceptions=False).stdout)
    assert set(found) == {"perplexity", "kl", "top1", "tokens", "images", "standard_errors", "calibrated_on"}
    assert set(found["perplexity"]) == {"original", "quantized"}
    plain = CliRunner().invoke(measure.command, arguments[:-1], catch_exceptions=False).stdout
    assert plain.splitlines()[1].startswith("perplexity  ")


@pytest.mark.parametrize(("text", "count"), [("8GB", 8_000_000_000), ("1.5 mib", 1_572_864), ("4096", 4096)])
def test_sizes(text: str, count: int) -> None:
    assert quantize.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write it as 8GB"):
        quantize.parse_size(text)


def test_without_torch_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "torch" or n.split(".")[0] == "quantize"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoTorch(), *sys.meta_path])
    for command, arguments in ((quantize.command, ["m", "-o", "out"]), (measure.command, ["m", "n"])):
        result = CliRunner().invoke(command, arguments)
        assert isinstance(result.exception, MissingExtraError)
        assert "'edgevl[quantize]'" in str(result.exception)


class _NoTorch:
    """Stands for a machine without torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
