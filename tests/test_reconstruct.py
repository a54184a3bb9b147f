"""Reconstruction of a block: what it learns, where it starts from, and that nothing is kept that does not gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration import Sample
from checkpoints import Sizes
from edgevl.weights import dequantize
from quantize import reconstruct as module
from quantize.awq import BlockResult, quantize_block
from quantize.groups import BlockTable, block_table
from quantize.job import _importance
from quantize.learned import LearnedLinear, Pace
from quantize.observe import run_block
from quantize.part_tensors import JoinedTensors
from quantize.reconstruct import reconstruct
from quantize.rounding import Scheme
from quantize.settings import QuantizeSettings, Recipe
from test_quantize import block_with_outliers, keep_f32, observed, output

ROUNDED = Recipe(False, False, False, 1)


class Case:
    """A block rounded to nearest, the hidden states before it, somewhat off, and the float path's after it."""

    def __init__(self, symmetric: bool = False) -> None:
        self.config, self.block, plain = block_with_outliers(Sizes(hidden=64, ff=128, heads=4, kv_heads=2))
        self.table: BlockTable = block_table(self.config, 0)
        self.wanted = output(self.config, self.block, plain)
        noise = torch.from_numpy(np.random.RandomState(9).standard_normal(plain.shape).astype(np.float32))
        self.hidden = plain + 0.05 * noise
        seen = observed(self.config, self.block, self.hidden, 32)
        scheme = Scheme(32, symmetric)
        self.result: BlockResult = quantize_block(
            self.config.text, self.table, dict(self.block), seen, scheme, keep_f32, recipe=ROUNDED
        )

    def learn(
        self, steps: int, seed: int = 0, coarse: bool = False, importance: torch.Tensor | None = None
    ) -> module.Reconstruction:
        floats = dict(self.result.floats)
        given = (self.config.text, self.table, self.result, floats, self.hidden, self.wanted, steps, seed)
        alike = torch.ones(self.hidden.shape[:2])
        return reconstruct(*given, "cpu", coarse, alike if importance is None else importance)

    def error(self) -> float:
        found = torch.empty_like(self.hidden)
        values = JoinedTensors(self.table.parts, self.result.values)
        run_block(self.config.text, 0, values, self.hidden, 3, found, "cpu")
        return float((found - self.wanted).square().mean())


@pytest.mark.parametrize(("symmetric", "coarse"), [(False, False), (True, False), (False, True)])
def test_the_block_comes_nearer_to_the_float_path(symmetric: bool, coarse: bool) -> None:
    case = Case(symmetric)
    before, zeros = case.error(), {name: w.zeros.copy() for name, w in case.result.linears.items()}
    done = case.learn(60, coarse=coarse)
    assert done.kept and done.error_after < 0.8 * done.error_before
    assert case.error() < 0.9 * before
    for name, weight in case.result.linears.items():
        assert np.array_equal(weight.zeros, zeros[name]), "zeros stay, so a symmetric block stays symmetric"
        assert np.array_equal(dequantize(weight), case.result.values[f"{name}.weight"].numpy()), "what is stored runs"
        assert (weight.scales > 0).all()


def test_tokens_that_count_more_lose_less() -> None:
    """Half of the tokens count a hundredth."""
    losses = []
    for weight in (1.0, 0.01):
        case = Case()
        weights = torch.ones(case.hidden.shape[:2])
        weights[:, ::2] = weight
        case.learn(60, importance=weights)
        found = torch.empty_like(case.hidden)
        values = JoinedTensors(case.table.parts, case.result.values)
        run_block(case.config.text, 0, values, case.hidden, 3, found, "cpu")
        lost = (found - case.wanted).square().mean(dim=2) / case.wanted.square().mean(dim=2)
        losses.append((float(lost[:, ::2].mean()), float(lost[:, 1::2].mean())))
    assert losses[1][0] > 1.02 * losses[0][0] and losses[1][1] < 0.98 * losses[0][1]


def test_image_tokens_count_less() -> None:
    text, picture = Sample((5, 6, 7)), Sample((5, -1, -2), np.zeros((1, 4, 4, 3), np.uint8))
    counts = _importance([text, picture], QuantizeSettings(recipe=Recipe(image_importance=0.25)))
    assert counts.tolist() == [[1, 1, 1], [1, 0.25, 0.25]]


def test_it_begins_with_the_codes_that_are_there() -> None:
    """Codes that are not the nearest, as clips leave them, are where learning starts, not undone by it."""
    case = Case()
    name = next(iter(case.result.linears))
    weight = case.result.linears[name]
    moved = (weight.codes.astype(int) + 1).clip(0, 15).astype(np.uint8)
    begun = LearnedLinear.begin(type(weight)(moved, weight.scales, weight.zeros), case.result.floats[name])
    assert np.array_equal(begun.codes().flatten(1).numpy(), moved)
    assert (begun.place - begun.codes()).abs().max() < 0.5


def test_steps_are_even_over_rows_and_columns() -> None:
    """Rows and columns of slopes from 1e-16 to 1e4 move alike; signs stay, and none at all is no step."""
    rng = np.random.RandomState(4)
    plain = rng.standard_normal((30, 2, 32)).astype(np.float32)
    sizes = (np.float32(10) ** rng.uniform(-8, 2, shape) for shape in ((30, 1, 1), (1, 2, 32)))
    slope = torch.from_numpy((plain * next(sizes) * next(sizes)).astype(np.float32))
    step = Pace()(slope)
    assert torch.equal(step.sign(), slope.sign())
    for dims in ((1, 2), (0,), (0, 1, 2)):
        size = step.square().mean(dim=dims).sqrt()
        assert size.min() > 0.1 and size.max() < 10, (dims, size)
    assert torch.equal(Pace()(torch.zeros(4, 2, 8)), torch.zeros(4, 2, 8))
    pace = Pace()
    first, second, third = pace(slope), pace(slope), pace(0.01 * slope)
    assert torch.allclose(first, second, rtol=1e-4), "the mean of what never changes"
    usual = (0.171 / 0.271) ** 0.5  # 0.9 - 0.9^3 of 1 - 0.9^3: what is remembered of the first two
    assert torch.allclose(third, 0.01 * first / usual, rtol=1e-3)


def test_the_same_seed_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 1)  # a step looks at one sequence, which the seed chooses
    codes = []
    for seed in (3, 3, 4):
        case = Case()
        case.learn(8, seed)
        codes.append(b"".join(weight.codes.tobytes() for weight in case.result.linears.values()))
    assert codes[0] == codes[1] != codes[2]


def test_what_does_not_gain_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    before = {name: weight.codes.copy() for name, weight in case.result.linears.items()}
    monkeypatch.setattr(module, "_REACH", 300.0)
    done = case.learn(4)
    assert not done.kept and done.error_after > done.error_before
    assert all(np.array_equal(case.result.linears[name].codes, codes) for name, codes in before.items())


def test_a_token_with_huge_states_does_not_decide_alone() -> None:
    """Errors are relative to each token: a token a thousand times as large changes the gain of the others little."""
    gains = []
    for factor in (1.0, 1000.0):
        case = Case()
        case.hidden[:, 0] *= factor
        case.wanted[:, 0] *= factor
        start = case.result.values
        found = torch.empty_like(case.hidden)
        errors = []
        for _ in range(2):
            values = JoinedTensors(case.table.parts, case.result.values)
            run_block(case.config.text, 0, values, case.hidden, 3, found, "cpu")
            errors.append(float((found - case.wanted)[:, 1:].square().mean()))
            if len(errors) == 1:
                case.learn(40)
        assert case.result.values is start
        gains.append(errors[1] / errors[0])
    assert gains[0] < 0.8 and gains[1] < 0.8, gains  # plain squared errors: 0.92
