"""Processes killed while they quantize; `python -m benchmarks.kill_resume` kills fifty."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill_resume import kill_and_resume


@pytest.mark.parametrize("calibration", ["text", pytest.param("self", marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bytes(tmp_path: Path, calibration: str) -> None:
    result = kill_and_resume(tmp_path, 2, seed=1, calibration=calibration)
    assert result["killed"] == 2 and result["runs_completed"] >= 1
    assert not result["different"] and not result["left_over"]
