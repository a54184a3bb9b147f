"""Keys made even for an int8 cache: the model says the same, and large numbers in a head no longer cost the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints import tiny_llama
from deploy import even_keys as module
from deploy.build import BuildSettings, build
from deploy.even_keys import even_keys
from edgevl.backends.reference import ReferenceRunner
from edgevl.bundle import Bundle
from edgevl.config import TextConfig
from edgevl.reference import in_int8
from edgevl.weights import F32, FloatWeight, Int4Weight, Int8Weight, Weight, dequantize, quantize_int4, quantize_int8

CONFIG = TextConfig(
    hidden_size=64,
    intermediate_size=64,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
    tied_embeddings=False,
    qkv_bias=True,
)


def projection(outlier: float) -> np.ndarray:
    """(128, 64): q, k, v rows; two numbers of each key are `outlier` times as large, their queries as much smaller."""
    rows = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
    for pair in (3, 3 + 8):
        rows[64 + pair : 96 : 16] *= outlier
        rows[pair:64:16] /= outlier
    return rows


def kinds(values: np.ndarray) -> dict[str, Weight]:
    return {
        "f32": FloatWeight(values),
        "f16": FloatWeight(values.astype(np.float16)),
        "int8": quantize_int8(values),
        "int4": quantize_int4(values, 32),
    }


@pytest.mark.parametrize("kind", ["f32", "f16", "int8", "int4"])
def test_scores_stay_as_they_were_and_values_are_left_alone(kind: str) -> None:
    weight, bias = kinds(projection(20.0))[kind], np.random.default_rng(1).standard_normal(128).astype(np.float32)
    even, shifted = even_keys(weight, bias, np.ones(64, np.float32), CONFIG)
    assert type(even) is type(weight) and shifted is not None
    before, after = dequantize(weight), dequantize(even)
    factors = shifted / bias
    np.testing.assert_array_equal(factors, np.exp2(np.rint(np.log2(factors))))  # powers of two
    np.testing.assert_array_equal(after, before * factors[:, None])  # no bit is lost
    keys = factors[64:96].reshape(2, 2, 8)
    np.testing.assert_array_equal(keys[:, 0], keys[:, 1])  # both numbers of a pair
    queries = factors[:64].reshape(4, 2, 8)
    np.testing.assert_array_equal(queries * np.repeat(keys, 2, axis=0), np.ones((4, 2, 8)))
    np.testing.assert_array_equal(factors[96:], np.ones(32))
    assert (keys[:, 0, 3] <= 1 / 8).all()
    for part in ("codes", "zeros"):
        if isinstance(weight, Int4Weight | Int8Weight) and hasattr(weight, part):
            np.testing.assert_array_equal(getattr(even, part), getattr(weight, part))


def test_large_numbers_cost_the_others_nothing_any_more() -> None:
    inputs = np.random.default_rng(2).standard_normal((500, 64)).astype(np.float32)
    errors = []
    for weight in (
        FloatWeight(projection(30.0)),
        even_keys(FloatWeight(projection(30.0)), None, np.ones(64), CONFIG)[0],
    ):
        rows = inputs @ dequantize(weight).T
        q, k = rows[:, :16], rows[:, 64:80]
        errors.append(np.abs(q @ (in_int8(k, 16) - k).T).mean() / np.abs(q @ k.T).mean())
    assert errors[1] < errors[0] / 5


def test_zeros_and_norms() -> None:
    rows = projection(1.0)
    rows[64:96] = 0
    even, bias = even_keys(FloatWeight(rows), None, np.ones(64, np.float32), CONFIG)
    np.testing.assert_array_equal(dequantize(even), rows)
    assert bias is None
    norm = np.zeros(64, np.float32)
    norm[0] = 1.0  # only the first in-feature reaches the projection
    rows = projection(1.0)
    rows[64:96] = 1.0
    rows[64 + 5, 0] = rows[64 + 13, 0] = 8.0
    even, _ = even_keys(FloatWeight(rows), None, norm, CONFIG)
    assert dequantize(even)[64 + 5, 0] == 1.0


def test_a_built_bundle_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tmp_path / "m", qkv_bias=True)

    def uneven(weight: Weight, bias: F32 | None, norm: F32, config: TextConfig) -> tuple[Weight, F32 | None]:
        """As if the model's keys were uneven, which those of a random one are not."""
        seen.append(weight.shape)
        size = np.exp2(np.random.default_rng(len(seen)).integers(-3, 4, (config.kv_heads, config.head_dim // 2)))
        monkeypatch.setattr(module, "_key_sizes", lambda *_: size)
        return even_keys(weight, bias, norm, config)

    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr("deploy.build.even_keys", uneven)
    logits, weights = [], []
    for kv in ("f16", "int8"):
        build(str(tmp_path / "m"), tmp_path / kv, BuildSettings(context=64, body="f32", head="f32", kv=kv))
        bundle = Bundle.open(tmp_path / kv)
        limits = replace(bundle.manifest.limits, kv="f32", logit_rows=20)
        runner = ReferenceRunner(bundle.manifest.model, limits, bundle.weight)
        places = np.arange(20, dtype=np.int32)
        logits.append(runner.decode(places + 5, places, np.zeros_like(places), None, places))
        weights.append(bundle.weight("layers.0.qkv").arrays["values"])
    assert len(seen) == 2  # layers, of the int8 bundle alone
    assert not np.array_equal(weights[0], weights[1])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
