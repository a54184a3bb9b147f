"""Every op × every implementation × awkward shapes, against the numpy twins of edgevl.reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgevl import reference
from edgevl._native import Plan
from edgevl.backends.cpu import run_graph
from edgevl.config import RopeScaling, TextConfig
from edgevl.contracts import CONTRACTS
from edgevl.layouts import StoredWeight, pack
from edgevl.ops import Ops, Step
from edgevl.recorder import Graph, Recorder, Rows
from edgevl.reference import ReferenceOps, in_int8
from edgevl.rope import inverse_frequencies
from edgevl.runner import Limits
from edgevl.weights import (
    FloatWeight,
    Int4Weight,
    Int8Weight,
    Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)
from quantize.torch_ops import TorchOps, batch_step

ISAS = ("portable", "avx2", "avx512", "avx512vnni")
ROWS = (1, 2, 7, 8, 17, 33)


def text_config(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, **more: Any) -> TextConfig:
    values: dict[str, Any] = {
        "hidden_size": heads * head_dim,
        "intermediate_size": 32,
        "layers": 1,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 50,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_positions": 256,
        "tied_embeddings": False,
        "qkv_bias": False,
    }
    return TextConfig(**{**values, **more})


class Case:
    """One call of one op: `call(ops, inputs)`, real inputs, weights, and a KV cache where the op needs one."""

    def __init__(
        self,
        op: str,
        label: str,
        call: Callable[[Ops[Any], dict[str, Any]], Any],
        inputs: dict[str, tuple[np.ndarray, Rows]],
        counts: dict[str, int],
        weights: dict[str, tuple[Weight, np.ndarray | None]] | None = None,
        config: TextConfig | None = None,
        cache: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.op, self.label, self.call = op, label, call
        self.inputs, self.counts, self.weights = inputs, counts, weights or {}
        self.config, self.cache = config, cache

    def reference(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        cache = None if self.cache is None else (self.cache[0].copy(), self.cache[1].copy())
        ops = ReferenceOps(lambda name: self.weights[name], [cache] if cache else [])
        return self.call(ops, {k: v for k, (v, _) in self.inputs.items()}), cache

    def record(self) -> tuple[Graph, Limits]:
        """The call as a graph of one node, and limits that hold it."""
        shapes = {name: w.shape for name, (w, _) in self.weights.items()}
        biases = frozenset(name for name, (_, b) in self.weights.items() if b is not None)
        recorder = Recorder(self.op, shapes, biases)
        kinds = {"float32": "f32", "int32": "i32", "uint8": "u8"}
        handles = {
            name: recorder.input(
                name,
                rows,
                int(np.prod(array.shape)) // (rows.factor * self.counts[rows.symbol]),
                kinds[array.dtype.name],
            )
            for name, (array, rows) in self.inputs.items()
        }
        slots, _, context, _ = self.cache[0].shape if self.cache else (1, 1, 64, 1)
        limits = Limits(
            context=context,
            slots=slots,
            chunk=max(self.counts.get("tokens", 1), self.counts.get("images", 1)),
            logit_rows=self.counts.get("logits", 1),
            tiles=self.counts.get("tiles", 1),
            kv="f16" if self.cache is None or self.cache[0].dtype == np.float16 else "f32",
        )
        return recorder.finish(self.call(recorder, handles)), limits

    def cpu(self, threads: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        graph, limits = self.record()
        stored: dict[str, StoredWeight] = {name: pack(w, b) for name, (w, b) in self.weights.items()}
        cache = None if self.cache is None else (self.cache[0].copy(), self.cache[1].copy())
        values = {name: array for name, (array, _) in self.inputs.items()}
        result = run_graph(
            graph, self.counts, values, stored.__getitem__, self.config, limits, {0: cache} if cache else None, threads
        )
        return result, cache


def check(case: Case, found: np.ndarray, wanted: np.ndarray, what: str, half: bool = False) -> None:
    """Within the contract's tolerance of the twin, or say where the worst element is."""
    assert found.shape == wanted.shape, f"{case.label} {what}: shape {found.shape}, wanted {wanted.shape}"
    gap = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    contract = CONTRACTS[case.op]
    allowed = (contract.half_tolerance if half else contract.tolerance) * max(
        1.0, float(np.abs(wanted.astype(np.float64)).max(initial=0))
    )
    worst = np.unravel_index(int(np.argmax(gap)), gap.shape) if gap.size else ()
    assert not gap.size or gap[worst] <= allowed, (
        f"{case.label} {what}: {tuple(map(int, worst))} is {found[worst]}, wanted {wanted[worst]} ± {allowed:.2g}"
    )


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights_of(n: int, k: int, seed: int = 1) -> dict[str, Weight]:
    """The same (N, K) numbers in every kind that K allows."""
    values = (normal(seed, n, k) / np.sqrt(k)).astype(np.float32)
    kinds: dict[str, Weight] = {
        "f32": FloatWeight(values),
        "f16": FloatWeight(values.astype(np.float16)),
        "int8": quantize_int8(values),
    }
    for q in (32, 64, 128):
        if k % q == 0:
            kinds[f"int4-g{q}"] = quantize_int4(values, q)
            kinds[f"int4-g{q}-sym"] = quantize_int4(values, q, symmetric=True)
    return kinds


def linear_cases() -> list[Case]:
    cases = []
    for rows in ROWS:
        for n, k in ((1, 32), (31, 64), (33, 160), (96, 384), (65, 128)):
            for kind, weight in weights_of(n, k).items():
                bias = normal(2, n) if n % 2 else None
                activation = "gelu" if kind in ("f32", "f16", "int8") and n == 33 else None
                inputs = {"x": (normal(3, rows, k), Rows("tokens"))}
                if n != 31:
                    inputs["residual"] = (normal(4, rows, n), Rows("tokens"))

                def call(ops: Ops[Any], i: dict[str, Any], activation: str | None = activation) -> Any:
                    return ops.linear(i["x"], ops.linear_weight("w"), activation, i.get("residual"))

                label = f"linear {kind} rows={rows} n={n} k={k} act={activation}"
                cases.append(Case("linear", label, call, inputs, {"tokens": rows}, {"w": (weight, bias)}))
    # ragged: K that is no multiple of a vector for the float kinds
    for rows in (1, 9):
        for kind in ("f32", "f16", "int8"):
            weight = weights_of(17, 27)[kind]
            cases.append(
                Case(
                    "linear",
                    f"linear {kind} rows={rows} ragged",
                    lambda ops, i: ops.linear(i["x"], ops.linear_weight("w")),
                    {"x": (normal(3, rows, 27), Rows("tokens"))},
                    {"tokens": rows},
                    {"w": (weight, None)},
                )
            )
    return cases


def simple_cases() -> list[Case]:
    cases = []
    for rows in ROWS:
        for width in (1, 2, 31, 33, 576):
            x = {"x": (3 * normal(rows, rows, width), Rows("tokens"))}
            weights: dict[str, tuple[Weight, np.ndarray | None]] = {
                "n": (FloatWeight(normal(1, width)), None),
                "b": (FloatWeight(normal(1, width)), normal(2, width)),
            }
            counts = {"tokens": rows}
            label = f"rows={rows} width={width}"
            cases.append(
                Case(
                    "rms_norm",
                    f"rms_norm {label}",
                    lambda ops, i: ops.rms_norm(i["x"], ops.norm_weight("n"), 1e-5),
                    x,
                    counts,
                    {"n": weights["n"]},
                )
            )
            cases.append(
                Case(
                    "layer_norm",
                    f"layer_norm {label}",
                    lambda ops, i: ops.layer_norm(i["x"], ops.norm_weight("b"), 1e-6),
                    x,
                    counts,
                    {"b": weights["b"]},
                )
            )
            both = {"x": (20 * normal(rows, rows, 2 * width), Rows("tokens"))}
            cases.append(Case("silu_mul", f"silu_mul {label}", lambda ops, i: ops.silu_mul(i["x"]), both, counts))
            picked = np.array([rows - 1, 0, rows // 2][: min(3, rows)], np.int32)
            gather = {**x, "rows": (picked, Rows("logits"))}
            cases.append(
                Case(
                    "gather_rows",
                    f"gather_rows {label}",
                    lambda ops, i: ops.gather_rows(i["x"], i["rows"]),
                    gather,
                    {**counts, "logits": picked.size},
                )
            )
    zero = {"x": (np.zeros((3, 33), np.float32), Rows("tokens"))}
    cases.append(
        Case(
            "rms_norm",
            "rms_norm of zeros",
            lambda ops, i: ops.rms_norm(i["x"], ops.norm_weight("n"), 1e-5),
            zero,
            {"tokens": 3},
            {"n": (FloatWeight(normal(1, 33)), None)},
        )
    )
    return cases


def embed_cases() -> list[Case]:
    cases = []
    values = normal(1, 50, 33)
    kinds: dict[str, Weight] = {"f32": FloatWeight(values), "f16": FloatWeight(values.astype(np.float16))}
    for kind, table in kinds.items():
        for rows in ROWS:
            tokens = np.random.default_rng(rows).integers(0, 50, rows).astype(np.int32)
            tokens[::3] = -1 - np.arange(tokens[::3].size)  # every third is an image row
            images = normal(5, tokens[::3].size, 33)
            cases.append(
                Case(
                    "embed",
                    f"embed {kind} rows={rows}",
                    lambda ops, i: ops.embed(i["t"], ops.table("e"), i["images"]),
                    {"t": (tokens, Rows("tokens")), "images": (images, Rows("images"))},
                    {"tokens": rows, "images": images.shape[0]},
                    {"e": (table, None)},
                )
            )
    return cases


def attention_cases() -> list[Case]:
    """rope_write and attention over an f16 and an f32 cache: GQA shares, several slots, ragged depths."""
    scaled = RopeScaling(8.0, 1.0, 4.0, 64)
    configs = [
        text_config(4, 2, 16),
        text_config(3, 1, 64),
        text_config(9, 3, 64, rope_theta=1e5),
        text_config(2, 2, 10),
        text_config(8, 2, 128, rope_theta=5e5, rope_scaling=scaled),
    ]
    steps = {
        "one": ([5], [0]),
        "first": ([0], [1]),
        "prefill": (list(range(17)), [0] * 17),
        "later": (list(range(30, 63)), [1] * 33),
        "batch": ([0, 40, 63], [2, 0, 1]),
        "mixed": ([7, 8, 9, 3, 4], [0, 0, 0, 2, 2]),
    }
    cases = []
    for c, config in enumerate(configs):
        for name, (positions, slots) in steps.items():
            for dtype in (np.float16, np.float32):
                count = len(positions)
                counts = {"tokens": count}
                shape = (3, config.kv_heads, 64, config.head_dim)
                cache = (normal(1, *shape).astype(dtype), normal(2, *shape).astype(dtype))
                places = {
                    "p": (np.array(positions, np.int32), Rows("tokens")),
                    "s": (np.array(slots, np.int32), Rows("tokens")),
                }

                def step(i: dict[str, Any]) -> Step[Any]:
                    return Step(tokens=None, positions=i["p"], slots=i["s"], images=None, logit_rows=None)

                label = f"config={c} {name} {np.dtype(dtype).name}"
                qkv = {"x": (normal(3, count, config.qkv_size), Rows("tokens")), **places}
                cases.append(
                    Case(
                        "rope_write",
                        f"rope_write {label}",
                        lambda ops, i, config=config: ops.rope_write(i["x"], step(i), 0, config),
                        qkv,
                        counts,
                        config=config,
                        cache=cache,
                    )
                )
                q = {"x": (normal(3, count, config.heads * config.head_dim), Rows("tokens")), **places}
                cases.append(
                    Case(
                        "attention",
                        f"attention {label}",
                        lambda ops, i, config=config: ops.attention(i["x"], step(i), 0, config),
                        q,
                        counts,
                        config=config,
                        cache=cache,
                    )
                )
    return cases


def vision_cases() -> list[Case]:
    cases = []
    for tiles in (1, 2, 3):
        counts = {"tiles": tiles}
        for side, patch in ((32, 16), (64, 16), (24, 4)):
            pixels = np.random.default_rng(tiles).integers(0, 256, (tiles, side, side, 3)).astype(np.uint8)
            cases.append(
                Case(
                    "patches",
                    f"patches tiles={tiles} side={side} patch={patch}",
                    lambda ops, i, patch=patch: ops.patches(i["x"], patch, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
                    {"x": (pixels, Rows("tiles"))},
                    counts,
                )
            )
        for grid, prefix, width in ((2, 1, 3), (4, 8, 33), (6, 5, 16)):
            count = grid * grid
            cases.append(
                Case(
                    "vision_tokens",
                    f"vision_tokens tiles={tiles} grid={grid}",
                    lambda ops, i: ops.vision_tokens(i["x"], ops.table("p"), ops.table("r")),
                    {"x": (normal(1, tiles * count, width), Rows("tiles", count))},
                    counts,
                    {
                        "p": (FloatWeight(normal(2, count, width)), None),
                        "r": (FloatWeight(normal(3, prefix, width)), None),
                    },
                )
            )
            total = prefix + count
            cases.append(
                Case(
                    "pixel_shuffle",
                    f"pixel_shuffle tiles={tiles} grid={grid}",
                    lambda ops, i, grid=grid, prefix=prefix: ops.pixel_shuffle(i["x"], grid, prefix),
                    {"x": (normal(1, tiles * total, width), Rows("tiles", total))},
                    counts,
                )
            )
            for heads, size in ((1, 5), (3, 16), (2, 80)):
                qkv = normal(1, tiles * total, 3 * heads * size)
                cases.append(
                    Case(
                        "full_attention",
                        f"full_attention tiles={tiles} tokens={total} heads={heads} size={size}",
                        lambda ops, i, heads=heads, total=total: ops.full_attention(i["x"], heads, total),
                        {"x": (qkv, Rows("tiles", total))},
                        counts,
                    )
                )
    return cases


ALL = [*linear_cases(), *simple_cases(), *embed_cases(), *attention_cases(), *vision_cases()]
BY_OP = {op: [case for case in ALL if case.op == op] for op in CONTRACTS}


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
        if "does not support" in str(error):
            pytest.skip(str(error))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 25])
@pytest.mark.parametrize("isa", ISAS)
def test_int4_is_exact_in_whole_numbers(isa: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole activations up to 127 in every group and scales that are powers of two leave nothing to round."""
    use(isa, monkeypatch)
    random = np.random.default_rng(rows)
    n, k, q = 37, 192, 64
    weight = Int4Weight(
        random.integers(0, 16, (n, k), np.uint8),
        np.exp2(random.integers(-3, 2, (n, k // q))).astype(np.float16),
        random.integers(0, 16, (n, k // q), np.uint8),
    )
    x = random.integers(-127, 128, (rows, k)).astype(np.float32)
    x[:, ::q] = 127
    case = Case(
        "linear",
        "whole numbers",
        lambda ops, i: ops.linear(i["x"], ops.linear_weight("w")),
        {"x": (x, Rows("tokens"))},
        {"tokens": rows},
        {"w": (weight, None)},
    )
    wanted = x.astype(np.float64) @ dequantize(weight).astype(np.float64).T
    for threads in (1, 2):
        assert np.array_equal(case.cpu(threads)[0].astype(np.float64), wanted)
    assert np.array_equal(in_int8(x, q), x)


@pytest.mark.parametrize("op", CONTRACTS)
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_matches_the_twin(op: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(isa, monkeypatch)
    for index, case in enumerate(BY_OP[op]):
        wanted, wanted_cache = case.reference()
        found, found_cache = case.cpu(threads=1 + index % 2)
        check(case, found, wanted, f"cpu {isa}")
        if found_cache is not None and wanted_cache is not None:
            for f, w in zip(found_cache, wanted_cache, strict=True):
                check(case, f.astype(np.float32), w.astype(np.float32), f"cpu {isa} cache")


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
