"""Every op × every implementation × awkward shapes, against the numpy twins of edgevl.reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cpu_cases import ISAS, matches, on_cpu, rounding_at_once, whole_numbers

from edgevl import reference
from edgevl._native import Plan
from edgevl.config import RopeScaling
from edgevl.contracts import CONTRACTS
from edgevl.layouts import pack
from edgevl.ops import Ops, Step
from edgevl.recorder import Rows
from edgevl.reference import ReferenceOps
from edgevl.rope import inverse_frequencies
from edgevl.weights import (
    FloatWeight,
    Int4Weight,
    Int8Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)
from op_cases import BY_OP, Case, check, normal, text_config, weights_of
from quantize.torch_ops import TorchOps, batch_step


def test_every_op_of_the_protocol_has_a_contract_and_cases() -> None:
    ops = {n for n in vars(Ops) if not n.startswith("_")} - {"linear_weight", "norm_weight", "table"}
    assert ops == set(CONTRACTS)
    assert all(BY_OP.values())


def use(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plans take an instruction set, or skip the test where the processor has none of it."""
    monkeypatch.setenv("EDGEVL_ISA", isa)
    try:
        Plan(np.zeros(64, np.uint8), (1, 1, 1, 1), 1, 0, 0, 0)
    except ValueError as error:
        if "does not support" in str(error) or "this build knows" in str(error):
            pytest.skip(str(error))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 25])
@pytest.mark.parametrize("isa", ISAS)
def test_int4_is_exact_in_whole_numbers(isa: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(isa, monkeypatch)
    whole_numbers(rows)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_rounded_at_once_has_the_same_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(isa, monkeypatch)
    rounding_at_once()


@pytest.mark.parametrize("op", CONTRACTS)
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_matches_the_twin(op: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(isa, monkeypatch)
    for index, case in enumerate(BY_OP[op]):
        matches(case, 1 + index % 2, isa)


def torch_weights(case: Case) -> Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]:
    def get(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = case.weights[name]
        return torch.from_numpy(dequantize(weight)), None if bias is None else torch.from_numpy(bias)

    return get


@pytest.mark.parametrize("op", [op for op in CONTRACTS if op not in ("rope_write", "attention")])
def test_torch_matches_the_twin(op: str) -> None:
    for case in BY_OP[op]:
        if any(not isinstance(weight, FloatWeight) for weight, _ in case.weights.values()):
            continue  # torch calibrates with activations as they are; that they are rounded to int8 is the runtime's
        ops = TorchOps(torch_weights(case), 1)
        found = case.call(ops, {k: torch.from_numpy(v) for k, (v, _) in case.inputs.items()})
        check(case, found.numpy(), case.reference()[0], "torch")


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (2, 17), (3, 31), (2, 33)])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 64), (2, 2, 10)])
def test_torch_attention_of_a_batch_matches_the_twin(batch: int, length: int, heads: tuple[int, int, int]) -> None:
    """torch keeps no cache beyond a block, so rope_write and attention are compared together, sequences from 0."""
    config = text_config(*heads)
    qkv = normal(3, batch * length, config.qkv_size)
    step = batch_step(torch.zeros(batch, length, dtype=torch.int64))
    ops = TorchOps(lambda name: (torch.empty(0), None), length)
    found = ops.attention(ops.rope_write(torch.from_numpy(qkv), step, 0, config), step, 0, config)

    shape = (batch, config.kv_heads, length, config.head_dim)
    cache = (np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    twin = ReferenceOps(lambda name: (FloatWeight(normal(0, 1)), None), [cache])
    places: Step[Any] = Step(None, step.positions.numpy(), step.slots.numpy(), None, None)
    wanted = twin.attention(twin.rope_write(qkv, places, 0, config), places, 0, config)
    check(Case("attention", "attention", lambda o, i: None, {}, {}), found.numpy(), wanted, "torch")


def test_twins_agree_with_hand_computations() -> None:
    # 2-token causal attention by hand: the first token returns v0; the second mixes with softmax weights
    cache_k = np.zeros((1, 1, 4, 2), np.float32)
    cache_v = np.zeros((1, 1, 4, 2), np.float32)
    cache_k[0, 0, 1] = [np.sqrt(2) * np.log(3), 0]
    cache_v[0, 0, 0], cache_v[0, 0, 1] = [4, 0], [0, 8]
    q = np.array([[1, 0], [1, 0]], np.float32)
    out = reference.attention(q, cache_k, cache_v, np.array([0, 1], np.int32), np.zeros(2, np.int32), 1)
    np.testing.assert_allclose(out, [[4, 0], [1, 6]], rtol=1e-6)  # weights 1/4 and 3/4
    # a quarter turn: position·frequency = π/2 sends (1, 0) to (0, 1)
    turned = reference.rotate(np.array([[[1.0, 0.0]]], np.float32), np.array([1], np.int32), np.array([np.pi / 2]))
    np.testing.assert_allclose(turned[0, 0], [0, 1], atol=1e-7)
    # pixel shuffle of a 4x4 grid numbered row-major, no prefix: first token joins 0, 1, 4, 5
    shuffled = reference.pixel_shuffle(np.arange(16, dtype=np.float32)[:, None], 4, 0)
    assert shuffled.astype(int).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_llama3_frequencies_by_hand() -> None:
    """Published rule: long waves are divided by the factor, short ones kept, a linear blend between."""
    plain = inverse_frequencies(text_config(1, 1, 8, rope_theta=10000.0))
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001])
    scaled = inverse_frequencies(text_config(1, 1, 8, rope_theta=10000.0, rope_scaling=RopeScaling(8, 1, 4, 64)))
    # wavelengths 6.28, 62.8, 628, 6283; 64/4 = 16 and 64/1 = 64: keep, blend, divide, divide
    blend = (64 / (2 * np.pi / 0.1) - 1) / (4 - 1)
    np.testing.assert_allclose(scaled, [1, (1 - blend) * 0.1 / 8 + blend * 0.1, 0.01 / 8, 0.001 / 8])


def test_int_kinds_round_trip_through_their_layout() -> None:
    from edgevl.layouts import LAYOUTS, int4_shapes, int8_shapes, unpack

    for kind, weight in weights_of(33, 128).items():
        for layout in LAYOUTS:
            stored = pack(weight, layout=layout)
            back = unpack(stored)
            for name in vars(weight):
                np.testing.assert_array_equal(getattr(back, name), getattr(weight, name), err_msg=f"{kind} {layout}")
            if stored.kind in ("int8", "int4"):
                sizes = (int8_shapes(33, 128, layout), int4_shapes(33, 128, stored.group_size, layout))
                shapes = sizes[stored.kind == "int4"]
                assert {f: a.shape for f, a in stored.arrays.items()} == {f: s for f, (_, s) in shapes.items()}
    assert isinstance(unpack(pack(weights_of(3, 32)["int8"])), Int8Weight)
    assert isinstance(unpack(pack(weights_of(3, 32)["int4-g32"])), Int4Weight)


def test_tiles_lie_as_the_format_says() -> None:
    """FORMAT.md's formula, element by element."""
    n, k, q = 18, 128, 64
    weight = quantize_int4(normal(1, n, k), q)
    codes = pack(weight, layout="tiles").arrays["codes"]
    for row, column in ((0, 0), (3, 31), (3, 32), (17, 63), (17, 64), (16, 127)):
        byte = int(codes[row // 16, column // q, row % 16, column % (q // 2)])
        assert (byte & 15 if column % q < q // 2 else byte >> 4) == weight.codes[row, column]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 2, 10), (33, 3, 16), (100, 2, 80), (129, 1, 128)])
def test_attention_behind_int8_weights_is_in_whole_numbers(
    isa: str, tokens: int, heads: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys, values and weights lose no more than f16 would take from them."""
    use(isa, monkeypatch)
    width = heads * size
    values = (normal(1, 3 * width, 64) / 8).astype(np.float32)
    case = Case(
        "full_attention",
        f"whole numbers {tokens} {heads} {size}",
        lambda ops, i: ops.full_attention(ops.linear(i["x"], ops.linear_weight("w")), heads, tokens),
        {"x": (normal(3, 2 * tokens, 64), Rows("tiles", tokens))},
        {"tiles": 2},
        {"w": (quantize_int8(values), None)},
    )
    wanted = case.reference()[0]
    for threads in (1, 2):
        found = on_cpu(case, threads)[0]
        assert np.abs(found - wanted).max() <= 5e-4 * np.abs(wanted).max()
