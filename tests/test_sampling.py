"""Sampling: greedy, temperature, top-p, seeds, and refused settings."""

from __future__ import annotations

import numpy as np
import pytest

from edgevl.errors import UsageError
from edgevl.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(settings: Sampling, count: int = 4000) -> np.ndarray:
    sampler = Sampler(settings)
    return np.bincount([sampler.pick(LOGITS) for _ in range(count)], minlength=4) / count


def test_greedy_takes_the_first_best() -> None:
    assert Sampler(Sampling()).pick(np.array([1, 3, 3, 2], np.float32)) == 1


def test_temperature_one_draws_the_probabilities_themselves() -> None:
    np.testing.assert_allclose(draws(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_a_low_temperature_sharpens() -> None:
    # probabilities squared and normalised: .25 .09 .0225 .0025 over .365
    np.testing.assert_allclose(draws(Sampling(0.5)), [0.685, 0.247, 0.062, 0.007], atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    np.testing.assert_allclose(draws(Sampling(1.0, 0.75)), [0.625, 0.375, 0, 0], atol=0.03)
    assert draws(Sampling(1.0, 0.1))[0] == 1


def test_seeds_repeat() -> None:
    runs = [[s.pick(LOGITS) for _ in range(50)] for s in (Sampler(Sampling(1, 1, 7)), Sampler(Sampling(1, 1, 7)))]
    assert runs[0] == runs[1]


def test_extreme_logits_stay_finite() -> None:
    assert Sampler(Sampling(0.01, 0.9)).pick(np.array([-1e30, 1e4, 0], np.float32)) == 1


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": 99}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**bad)  # type: ignore[arg-type]
