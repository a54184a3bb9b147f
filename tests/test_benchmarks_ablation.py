"""`python -m benchmarks.ablation` on a tiny model with eyes: rows are made once, and each says what it cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ablation
from checkpoints import tiny_vl
from edgevl.weights import Int4Weight
from quantize.settings import Recipe


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, object]]:
    model = tmp_path / "m"
    if not model.exists():
        tiny_vl(model, "bf16")
    arguments = ["--model", str(model), "--work", str(tmp_path / "w"), "--samples", "2", "--length", "256", *more]
    assert ablation.main(arguments) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    return found


def test_rows_are_compared_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["--json", str(tmp_path / "rows.json")]
    first = run(tmp_path, capsys, *kept, "--only", "round to nearest")
    assert first[0]["recipe"] == vars(Recipe(False, False, False, 0))
    both = run(tmp_path, capsys, *kept, "--only", "round to nearest", "+ clips: fast")
    assert [row["name"] for row in both] == ["round to nearest", "+ clips: fast"] and both[0] == first[0]
    assert all(0 < row["text"]["kl"] < 1 for row in both)  # type: ignore[index]
    with pytest.raises(SystemExit, match="other options"):
        run(tmp_path, capsys, *kept, "--scheme", "sym")


def test_every_choice_leaves_its_own_mark(tmp_path: Path) -> None:
    """Leaving something out changes the codes or the scales: no row is another one under a second name."""
    from edgevl.checkpoint import open_checkpoint, part_weight
    from edgevl.models.names import text_parts
    from quantize.job import quantize
    from quantize.settings import QuantizeSettings

    model, seen = tiny_vl(tmp_path / "m", "bf16"), {}
    for i, (name, recipe) in enumerate(ablation.INGREDIENTS.items()):
        settings = QuantizeSettings(samples=4, length=256, measure=False, recipe=recipe)
        quantize(str(model), tmp_path / str(i), settings)
        checkpoint = open_checkpoint(tmp_path / str(i))
        marks = []
        for part in text_parts(checkpoint.config):
            weight, _ = part_weight(checkpoint, part)
            if isinstance(weight, Int4Weight):
                marks += [weight.codes.tobytes(), weight.scales.tobytes()]
        seen[name] = hash(tuple(marks))
    twins = {mark for mark in seen.values() if list(seen.values()).count(mark) > 1}
    assert {name for name, mark in seen.items() if mark in twins} <= {"+ v -> o"}, seen


def test_build_choices_of_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, capsys, "--what", "parts", "--only", "head f16, vision f16", "head int8", "--images", "1")
    plain, small = rows
    assert plain["text"]["kl"] < 1e-3 < 0.5  # type: ignore[index]
    assert small["text"]["kl"] > plain["text"]["kl"]  # type: ignore[index]
    assert set(plain["pictures"]) == set(small["pictures"]) and plain["pictures"]  # type: ignore[call-overload]


def test_calibrations_say_what_they_lose_on_their_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(tmp_path, capsys, "--what", "calibrations", "--only", "text")
    assert 0 < row["kl_on_calibration"] < 1  # type: ignore[operator]
