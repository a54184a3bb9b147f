"""Calls of every op over awkward shapes, with their twins' results: what each implementation is held against.

Needs numpy alone, so that `python -m benchmarks.gpu` can run them on a machine that has nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgevl.config import RopeScaling, TextConfig
from edgevl.contracts import CONTRACTS
from edgevl.ops import Ops, Step
from edgevl.recorder import Graph, Recorder, Rows
from edgevl.reference import ReferenceOps, in_int8
from edgevl.runner import Limits
from edgevl.weights import (
    FloatWeight,
    Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)

_DECODE_TOKENS = 8  # most tokens of a step that take the way of decoding
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
        kv: str = "f32",
    ) -> None:
        self.op, self.label, self.call, self.kv = op, label, call, kv
        self.inputs, self.counts, self.weights = inputs, counts, weights or {}
        self.config, self.cache = config, cache

    @property
    def rounded(self) -> bool:
        """Attention of more tokens than a step that decodes has, over a cache of small numbers."""
        return self.kv != "f32" and self.counts["tokens"] > _DECODE_TOKENS

    def reference(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        cache = None if self.cache is None else (self.cache[0].copy(), self.cache[1].copy())
        ops = ReferenceOps(lambda name: self.weights[name], [cache] if cache else [], self.kv == "int8")
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
            kv="f16" if self.cache is None else self.kv,
        )
        return recorder.finish(self.call(recorder, handles)), limits


def check(case: Case, found: np.ndarray, wanted: np.ndarray, what: str, half: bool = False) -> None:
    """Within the contract's tolerance of the twin, or say where the worst element is."""
    assert found.shape == wanted.shape, f"{case.label} {what}: shape {found.shape}, wanted {wanted.shape}"
    gap = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    contract = CONTRACTS[case.op]
    tolerance = max(contract.tolerance, contract.rounded if case.rounded else 0.0)
    allowed = (contract.half_tolerance if half else tolerance) * max(
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
    kinds: dict[str, Weight] = {
        "f32": FloatWeight(values),
        "f16": FloatWeight(values.astype(np.float16)),
        "int8": quantize_int8(values),
    }
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


def held(values: np.ndarray, kv: str) -> np.ndarray:
    """Keys or values (slots, G, S, D) as a cache of this kind holds them."""
    if kv == "int8":
        return in_int8(values.reshape(-1, values.shape[3]), values.shape[3]).reshape(values.shape)
    return values.astype(np.float16 if kv == "f16" else np.float32)


def attention_cases() -> list[Case]:
    """rope_write and attention over an f16, an int8 and an f32 cache: GQA shares, several slots, ragged depths."""
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
    deeper = {  # of one configuration: more than one block of keys, and few tokens whose keys are split
        "blocks": ([*range(50, 90), *range(100, 140)], [0] * 40 + [1] * 40),
        "split": ([600, 20], [0, 1]),
    }
    cases = []
    for c, config in enumerate(configs):
        for name, (positions, slots) in {**steps, **(deeper if c == 2 else {})}.items():
            for kv in ("f16", "int8", "f32"):
                count = len(positions)
                counts = {"tokens": count}
                context = max(64, -(-(max(positions) + 1) // 16) * 16)
                shape = (3, config.kv_heads, context, config.head_dim)
                cache = (held(normal(1, *shape), kv), held(normal(2, *shape), kv))
                places = {
                    "p": (np.array(positions, np.int32), Rows("tokens")),
                    "s": (np.array(slots, np.int32), Rows("tokens")),
                }

                def step(i: dict[str, Any]) -> Step[Any]:
                    return Step(tokens=None, positions=i["p"], slots=i["s"], images=None, logit_rows=None)

                label = f"config={c} {name} {kv}"
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
                        kv=kv,
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
                        kv=kv,
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
            for heads, size in ((1, 5), (3, 16), (2, 64), (2, 80)):
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


def float_twin(case: Case) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """The twin's results with float weights of the same values: GPU kernels do not round activations to int8."""
    plain = {name: (FloatWeight(dequantize(w)), b) for name, (w, b) in case.weights.items()}
    return Case(
        case.op, case.label, case.call, case.inputs, case.counts, plain, case.config, case.cache, case.kv
    ).reference()


def readable_on_gpu(case: Case) -> bool:
    """GPU bundles hold no f32 linears and no f32 cache."""
    weights = [weight for weight, _ in case.weights.values() if case.op == "linear"]
    wide = any(isinstance(w, FloatWeight) and w.values.dtype == np.float32 for w in weights)
    return not wide and (case.cache is None or case.kv != "f32")
