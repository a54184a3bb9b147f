"""One record for each op: what goes in, what comes out, how close an implementation must be, and where it is from.

The signatures are in `edgevl.ops`, the definitions in `edgevl.reference`. The op tests read this table and fail when an
op of the protocol has no record; a new backend passes when it meets every record.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contract:
    """The promise of one op."""

    shapes: str  # inputs -> output, in the shape letters of edgevl.ops
    dtypes: str
    tolerance: float  # largest |difference| allowed, relative to the largest |value| of the twin's result
    source: str
    rounded: float = 0.0  # the tolerance where several tokens meet an f16 or int8 cache, rounded to int16
    half: float = 0.0  # the tolerance where products take f16 (sums in f32) and activations stay as they are

    @property
    def half_tolerance(self) -> float:
        """For implementations on GPUs, whose twin is the one of a float weight of the same values."""
        return max(self.tolerance, self.half)


CONTRACTS: dict[str, Contract] = {
    "embed": Contract("(T,), (V, C), (rows, C) -> (T, C)", "i32, f32|f16|int8, f32 -> f32", 1e-6, "table lookup"),
    "rms_norm": Contract("(rows, C), (C,) -> (rows, C)", "f32", 1e-5, "Zhang and Sennrich 2019, arXiv 1910.07467"),
    "layer_norm": Contract("(rows, C), (C,), (C,) -> (rows, C)", "f32", 1e-5, "Ba et al. 2016, arXiv 1607.06450"),
    "linear": Contract(
        "(rows, K), (N, K), (N,), (rows, N) -> (rows, N)",
        "f32, f32|f16|int8|int4, f32, f32 -> f32; for int8 and int4, x in int8 by groups of 64 and Q in-features",
        2e-5,
        "x·Wᵀ",
        half=1e-3,
    ),
    "rope_write": Contract(
        "(T, (H+2G)·D), (T,), (T,) -> (T, H·D); cache (slots, G, S, D)",
        "f32, i32, i32 -> f32; cache f16|int8|f32",
        1e-5,
        "Su et al. 2021, arXiv 2104.09864, half-rotation layout; Llama-3.1 frequency scaling",
        half=1e-3,
    ),
    "attention": Contract(
        "(T, H·D), cache (slots, G, S, D) -> (T, H·D)",
        "f32, f16|int8|f32 -> f32; over f16 and int8, steps of many tokens may round all three to int16",
        2e-5,
        "Ainslie et al. 2023 (GQA)",
        rounded=5e-4,
        half=2e-3,
    ),
    "silu_mul": Contract("(rows, 2F) -> (rows, F)", "f32", 1e-5, "Shazeer 2020, arXiv 2002.05202 (SwiGLU)"),
    "gather_rows": Contract("(T, C), (L,) -> (L, C)", "f32, i32 -> f32", 0.0, "row copy"),
    "patches": Contract("(n, S, S, 3) -> (n·P, 3·p²)", "u8 -> f32", 1e-6, "RADIO: im2patches after the conditioner"),
    "vision_tokens": Contract("(n·P, C), (P, C), (R, C) -> (n·(R+P), C)", "f32", 1e-6, "RADIO: CPE and class tokens"),
    "full_attention": Contract(
        "(n·t, 3C) -> (n·t, C)",
        "f32",
        2e-5,
        "Vaswani et al. 2017, arXiv 1706.03762",
        half=2e-3,
    ),
    "pixel_shuffle": Contract("(n·(R+P), C) -> (n·P/4, 4C)", "f32", 0.0, "InternVL pixel shuffle, version 2"),
}
