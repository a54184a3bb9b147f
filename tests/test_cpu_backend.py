"""The C++ backend on whole models: it agrees with itself across chunks, slots, threads and instruction sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgevl.backends.cpu import CpuRunner
from edgevl.backends.reference import ReferenceRunner
from edgevl.config import ModelConfig, ProjectorConfig, TextConfig, TilingConfig, TokenConfig, VisionConfig
from edgevl.errors import CapacityError, UsageError
from edgevl.layouts import StoredWeight, pack
from edgevl.models.names import all_parts
from edgevl.prefill import feed
from edgevl.runner import Limits, alike_rows
from edgevl.weights import FloatWeight, quantize_int4, quantize_int8

LIMITS = Limits(context=48, slots=3, chunk=32, logit_rows=32, tiles=2, kv="f32")
V = 90


def text_config(layers: int = 2, context: int = 256) -> TextConfig:
    return TextConfig(64, 96, layers, 6, 2, 16, V, 1e-5, 1e4, None, context, True, False)


def text_model() -> ModelConfig:
    return ModelConfig("LlamaForCausalLM", text_config(), TokenConfig(V, (2,)))


def vision_model() -> ModelConfig:
    tower = VisionConfig(32, 64, 2, 2, 4, 32, 5, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))
    projector = ProjectorConfig(40)
    return ModelConfig(
        "Llama_Nemotron_Nano_VL", text_config(), TokenConfig(V, (2,), 5, 6, 7), tower, projector, TilingConfig()
    )


def random_weights(config: ModelConfig, kind: str = "int4", seed: int = 0) -> Callable[[str], StoredWeight]:
    rng = np.random.default_rng(seed)
    stored: dict[str, StoredWeight] = {}
    for part in all_parts(config):
        values = rng.standard_normal(part.shape).astype(np.float32)
        bias = (0.1 * rng.standard_normal(part.shape[0])).astype(np.float32) if part.bias else None
        if part.kind == "norm":
            stored[part.name] = pack(FloatWeight(1 + values / 10), bias)
        elif part.kind == "table":
            stored[part.name] = pack(FloatWeight(values.astype(np.float16)), bias)
        elif part.name == "head" and config.text.tied_embeddings:
            stored[part.name] = stored["embed"]
        else:
            values /= np.float32(np.sqrt(part.shape[1]))
            if kind == "int4" and part.shape[1] % 32 == 0:
                stored[part.name] = pack(quantize_int4(values, 32), bias)
            elif kind in ("int4", "int8"):
                stored[part.name] = pack(quantize_int8(values), bias)
            else:
                stored[part.name] = pack(FloatWeight(values), bias)
    return stored.__getitem__


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def prompt(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, count).astype(np.int32)


def prefill(runner: CpuRunner | ReferenceRunner, tokens: np.ndarray, slot: int = 0, start: int = 0) -> np.ndarray:
    """Logits of every token of one chunk."""
    count = tokens.size
    places = np.arange(start, start + count, dtype=np.int32)
    logits = runner.decode(tokens, places, np.full(count, slot, np.int32), None, np.arange(count, dtype=np.int32))
    return logits.copy()


def make(threads: int = 2, limits: Limits = LIMITS, config: ModelConfig | None = None) -> CpuRunner:
    config = config or text_model()
    return CpuRunner(config, limits, random_weights(config), threads)


def test_token_by_token_equals_one_chunk_and_the_reference() -> None:
    tokens = prompt(29)
    whole = prefill(make(), tokens)
    stepwise = make()
    single = np.concatenate([prefill(stepwise, tokens[i : i + 1], start=i) for i in range(29)])
    np.testing.assert_allclose(single, whole, atol=1e-4)
    in_parts = make()
    parts = [prefill(in_parts, tokens[a:b], start=a) for a, b in ((0, 3), (3, 12), (12, 29))]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)
    config = text_model()
    wanted = prefill(ReferenceRunner(config, LIMITS, random_weights(config)), tokens)
    np.testing.assert_allclose(whole, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["f32", "int8", "int4"])
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_rounded_cache_matches_the_reference(kind: str, kv: str) -> None:
    config, limits = text_model(), Limits(context=48, chunk=32, logit_rows=32, kv=kv)
    weights = random_weights(config, kind)
    found = prefill(CpuRunner(config, limits, weights, 2), prompt(20))
    wanted = prefill(ReferenceRunner(config, limits, weights), prompt(20))
    # attention of many tokens rounds to int16, and behind it a number may round the other way in the second layer: one
    # code of int8 is 0.8 % of the largest of its group
    gap = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert gap <= (1e-3 if kind == "f32" and kv == "f16" else 2e-2), gap


def test_slots_do_not_see_each_other() -> None:
    prompts = [prompt(7, 1), prompt(12, 2), prompt(3, 3)]
    together = make()
    # one step holds all three prompts, then one step holds the next token of each
    slots = np.concatenate([np.full(p.size, s, np.int32) for s, p in enumerate(prompts)])
    places = np.concatenate([np.arange(p.size, dtype=np.int32) for p in prompts])
    last = np.cumsum([p.size for p in prompts]).astype(np.int32) - 1
    first = together.decode(np.concatenate(prompts), places, slots, None, last).copy()
    second = together.decode(ints(4, 5, 6), ints(7, 12, 3), ints(0, 1, 2), None, ints(0, 1, 2)).copy()
    for s, tokens in enumerate(prompts):
        alone = make()
        np.testing.assert_allclose(prefill(alone, tokens)[-1], first[s], atol=1e-4)
        np.testing.assert_allclose(prefill(alone, ints(4 + s), start=tokens.size)[0], second[s], atol=1e-4)


def test_threads_do_not_change_a_bit() -> None:
    results = []
    for threads in (1, 2, 5):
        runner = make(threads)
        results.append((prefill(runner, prompt(30)), prefill(runner, prompt(1), start=30)))
    for chunk, step in results[1:]:
        np.testing.assert_array_equal(chunk, results[0][0])
        np.testing.assert_array_equal(step, results[0][1])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize(("kind", "kv"), [("f32", "f16"), ("f16", "f32"), ("int8", "f16"), ("int4", "int8")])
def test_a_few_tokens_of_a_step_get_the_bits_of_single_ones(
    kind: str, kv: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the checking of guesses rests on; where attention is split, just before and after too."""
    monkeypatch.setenv("EDGEVL_ISA", isa)
    config, limits = text_model(), Limits(context=600, chunk=300, logit_rows=8, kv=kv)
    try:
        runner = CpuRunner(config, limits, random_weights(config, kind), 2)
    except UsageError:
        pytest.skip(f"this machine has no {isa}")
    tokens = prompt(600)
    for depth in (0, 17, 250, 256, 509, 590):
        for begin in range(0, depth, 300):
            feed(runner, tokens[begin : min(begin + 300, depth)].tolist(), begin, None, 1)
        single = np.concatenate([prefill(runner, tokens[i : i + 1], start=i) for i in range(depth, depth + 8)])
        for count in range(2, alike_rows(runner) + 1):
            np.testing.assert_array_equal(prefill(runner, tokens[depth : depth + count], start=depth), single[:count])


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    results, names = [], []
    for isa in ("portable", "avx2", "avx512", "avx512vnni"):
        monkeypatch.setenv("EDGEVL_ISA", isa)
        try:
            runner = make()
        except UsageError:  # this processor does not have it
            continue
        names.append(runner.backend)
        results.append(np.concatenate([prefill(runner, prompt(30)), prefill(runner, prompt(1), start=30)]))
    assert names[0] == "cpu (portable, 2 threads)"
    for found in results[1:]:
        np.testing.assert_allclose(found, results[0], atol=1e-4)


def test_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVL_ISA", "sse9")
    with pytest.raises(UsageError, match=r"EDGEVL_ISA is 'sse9'; this build knows .*portable"):
        make()


def test_long_context_is_split_and_merged() -> None:
    """Decode over 700 positions takes several splits; the same position inside a long chunk takes the block path."""
    limits = Limits(context=800, slots=2, chunk=800, logit_rows=800, kv="f32")
    config = ModelConfig("LlamaForCausalLM", text_config(1, 800), TokenConfig(V, (2,)))
    tokens = prompt(700)
    whole = prefill(CpuRunner(config, limits, random_weights(config), 2), tokens)
    results = []
    for threads in (1, 3):
        runner = CpuRunner(config, limits, random_weights(config), threads)
        prefill(runner, tokens[:690])
        prefill(runner, tokens[:20], slot=1)
        # a long and a short sequence in one step: the short one has empty splits
        both = runner.decode(tokens[[690, 20]], ints(690, 20), ints(0, 1), None, ints(0, 1)).copy()
        results.append(np.concatenate([both, prefill(runner, tokens[691:692], start=691)]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], whole[[690, 20, 691]], atol=1e-4)


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    """Within 2 % in the root mean square.

    Where an activation lies between two int8 codes, the last bit of a sum decides which it becomes, and one code is
    0.8 % of the largest activation of its group.
    """
    gap = float(np.sqrt(np.mean(np.square(found - wanted)) / np.mean(np.square(wanted))))
    assert gap < 0.02, gap


def test_images_and_vision_match_the_reference() -> None:
    config = vision_model()
    weights = random_weights(config)
    cpu, reference = CpuRunner(config, LIMITS, weights, 2), ReferenceRunner(config, LIMITS, weights)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    images = cpu.vision(pixels).copy()
    near(images, reference.vision(pixels))
    np.testing.assert_allclose(cpu.vision(pixels[1:]), images[16:], atol=1e-5)
    tokens = np.concatenate([prompt(4), -1 - np.arange(20, dtype=np.int32), prompt(3)])
    step = (tokens, np.arange(27, dtype=np.int32), np.zeros(27, np.int32), images[:20], ints(26, 5))
    found = cpu.decode(*step).copy()
    near(found, reference.decode(*step))
    # the vision graph leaves the decoder's inputs, cache and results alone
    kept = cpu.decode(*step)
    cpu.vision(pixels)
    np.testing.assert_array_equal(kept, found)


def test_a_step_without_logits() -> None:
    runner, tokens = make(), prompt(10)
    nothing = runner.decode(tokens[:9], np.arange(9, dtype=np.int32), np.zeros(9, np.int32), None, ints())
    assert nothing.shape == (0, V)
    np.testing.assert_allclose(prefill(runner, tokens[9:], start=9)[0], prefill(make(), tokens)[9], atol=1e-4)


def test_tied_weights_are_counted_once() -> None:
    config = text_model()
    weights = random_weights(config)
    runner = CpuRunner(config, LIMITS, weights, 1)
    names = {part.name for part in all_parts(config)} - {"head"}
    assert runner.planned_bytes == runner.memory.total + sum(weights(name).nbytes for name in names)
    assert runner.backend.endswith(", 1 thread)")


def test_steps_over_the_limits() -> None:
    runner = make()
    with pytest.raises(CapacityError, match="33 tokens is over the plan's limit of 32"):
        prefill(runner, prompt(33))
    rows = Limits(context=48, chunk=32, logit_rows=2)
    with pytest.raises(CapacityError, match="3 rows of logits is over the plan's limit of 2"):
        prefill(make(limits=rows), prompt(3))
    tiles = make(config=vision_model())
    with pytest.raises(CapacityError, match="3 tiles are over the plan's limit of 2"):
        tiles.vision(np.zeros((3, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((ints(90), ints(0), ints(0), ints(0)), "token id 90 at place 0"),
        ((ints(-1), ints(0), ints(0), ints(0)), "token id -1 at place 0"),
        ((ints(3, 3), ints(0, 48), ints(0, 0), ints(0)), "position 48 at place 1 .* context of 48"),
        ((ints(3), ints(-1), ints(0), ints(0)), "position -1"),
        ((ints(3), ints(0), ints(3), ints(0)), "slot 3 at place 0 .* 3 slots"),
        ((ints(3), ints(0), ints(-1), ints(0)), "slot -1"),
        ((ints(3), ints(0), ints(0), ints(1)), "row 1 at place 0"),
        ((ints(3), ints(0), ints(0), ints(-1)), "row -1"),
        ((ints(3, 4), ints(5, 5), ints(1, 1), ints(0)), "two tokens of the step have position 5 of slot 1"),
        ((ints(3, 4), ints(5), ints(1, 1), ints(0)), "'positions' has 1 values"),
        ((ints(), ints(), ints(), ints()), "no tokens"),
        ((np.array([1.5]), ints(0), ints(0), ints(0)), "'tokens' is float64"),
    ],
)
def test_wrong_steps_are_refused(step: tuple[np.ndarray, ...], message: str) -> None:
    runner = make()
    tokens, positions, slots, rows = step
    with pytest.raises(UsageError, match=message):
        runner.decode(tokens, positions, slots, None, rows)
    assert np.isfinite(prefill(runner, prompt(5))).all()  # and the runner is still good


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(UsageError, match="without vision"):
        make().decode(ints(-1), ints(0), ints(0), np.zeros((1, 64), np.float32), ints(0))
    with pytest.raises(UsageError, match="no vision tower"):
        make().vision(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UsageError, match=r"must be \(n, 32, 32, 3\)"):
        make(config=vision_model()).vision(np.zeros((1, 16, 16, 3), np.uint8))
    for threads in (0, 100000):
        with pytest.raises(UsageError, match="threads"):
            make(threads)


def test_wrong_weights_are_refused() -> None:
    config = text_model()
    good = random_weights(config)

    def with_norm(values: np.ndarray, shape: tuple[int, ...] = (64,)) -> Callable[[str], StoredWeight]:
        return lambda name: StoredWeight("f32", shape, {"values": values}) if name == "norm" else good(name)

    with pytest.raises(UsageError, match=r"'norm' is .*32.*; the model needs .*64"):
        CpuRunner(config, LIMITS, with_norm(np.ones(32, np.float32), (32,)), 1)
    with pytest.raises(UsageError, match="cannot be planned"):
        CpuRunner(config, LIMITS, with_norm(np.ones(32, np.float32)), 1)  # the array is shorter than it says
    with pytest.raises(UsageError, match="f32 or f16"):
        CpuRunner(config, LIMITS, with_norm(np.ones(64, np.float64)), 1)
    with pytest.raises(UsageError, match="cannot be planned"):
        CpuRunner(config, LIMITS, with_norm(np.ones(128, np.float32)[::2]), 1)  # not contiguous


def test_read_only_weights_are_read_where_they_lie() -> None:
    config = text_model()
    stored = random_weights(config)
    for part in all_parts(config):
        for array in stored(part.name).arrays.values():
            array.flags.writeable = False
    np.testing.assert_array_equal(prefill(CpuRunner(config, LIMITS, stored, 1), prompt(9)), prefill(make(1), prompt(9)))
