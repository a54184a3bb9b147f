"""The memory plan: no two buffers that are alive together overlap, and the totals add up."""

from __future__ import annotations

import random

import pytest

from edgevl.config import ModelConfig, ProjectorConfig, TextConfig, TilingConfig, TokenConfig, VisionConfig
from edgevl.errors import UsageError
from edgevl.memory import ALIGN, buffer_bytes, lifetimes, max_counts, place, plan_memory
from edgevl.recorder import Graph, Recorder, Rows, record_decoder, record_vision
from edgevl.rounding import rounded
from edgevl.runner import Limits

LIMITS = Limits(context=100, slots=3, chunk=24, logit_rows=5, tiles=2)


def config(vision: bool) -> ModelConfig:
    text = TextConfig(48, 96, 3, 4, 2, 12, 70, 1e-5, 1e4, None, 256, False, False)
    if not vision:
        return ModelConfig("LlamaForCausalLM", text, TokenConfig(70, (2,)))
    tower = VisionConfig(32, 64, 2, 2, 4, 16, 3, 8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return ModelConfig(
        "Llama_Nemotron_Nano_VL", text, TokenConfig(70, (2,), 5, 6, 7), tower, ProjectorConfig(40), TilingConfig()
    )


def spans_with_io(graph: Graph) -> dict[int, tuple[int, int]]:
    """Lifetimes written down a second way: inputs and output for ever, the rest from first to last mention."""
    spans: dict[int, tuple[int, int]] = {}
    for i, node in enumerate(graph.nodes):
        for buffer in (*node.inputs, node.output):
            first, last = spans.get(buffer.index, (i, i))
            spans[buffer.index] = (min(first, i), max(last, i))
    for buffer in (*graph.inputs.values(), graph.output):
        assert buffer is not None
        spans[buffer.index] = (-1, len(graph.nodes))
    return spans


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("vision", [False, True])
def test_no_two_live_buffers_overlap(vision: bool, group: int) -> None:
    model = config(vision)
    graphs = [record_decoder(model), *([record_vision(model)] if vision else [])]
    plan = plan_memory(graphs, LIMITS, model.text, threads=2, group_size=lambda name: group)
    assert any(plan.groups.values()) == (group > 0)
    counts = max_counts(LIMITS)
    fixed: list[tuple[int, int]] = []
    for graph in graphs:
        spans, offsets = spans_with_io(graph), plan.offsets[graph.name]
        groups = plan.groups[graph.name]
        sizes = {b.index: buffer_bytes(b, counts, groups.get(b.index, 0)) for b in graph.buffers}
        ranges = {i: (offsets[i], offsets[i] + size) for i, size in sizes.items()}
        for i, (low, high) in ranges.items():
            assert low % ALIGN == 0
            assert high <= plan.kv_offset
            for j, (other_low, other_high) in ranges.items():
                if i < j and spans[i][0] <= spans[j][1] and spans[j][0] <= spans[i][1]:
                    assert high <= other_low or other_high <= low, f"{graph.name}: buffers {i} and {j} overlap"
        io = [ranges[b.index] for b in (*graph.inputs.values(), graph.output) if b is not None]
        # neither the other graph's inputs and output nor its temporaries touch this graph's
        others = [(a, b) for a, b in fixed]
        assert all(high <= a or b <= low for low, high in ranges.values() for a, b in others)
        fixed += io
    for graph in graphs:
        offsets = plan.offsets[graph.name]
        for index in lifetimes(graph):
            low, high = offsets[index], offsets[index] + buffer_bytes(graph.buffers[index], counts)
            assert all(high <= a or b <= low for a, b in fixed)


def test_totals_add_up() -> None:
    model = config(True)
    plan = plan_memory([record_decoder(model), record_vision(model)], LIMITS, model.text, threads=3)
    assert plan.total == sum(plan.io.values()) + plan.temporaries + plan.kv + plan.scratch
    assert plan.workspace == plan.total - plan.kv
    # by hand: 3 slots x 2 KV heads x 112 positions (100 in whole 16s) x 12 numbers x 2 bytes = 16128, a multiple of 64;
    # K and V, 3 layers
    assert plan.kv_layer == 16128
    assert plan.kv == 16128 * 2 * 3
    assert plan.kv_offset == sum(plan.io.values()) + plan.temporaries
    assert plan.thread_offset + 3 * plan.thread_bytes == plan.total
    wide = plan_memory([record_decoder(model)], Limits(100, 3, 24, 5, 2, "f32"), model.text, threads=1)
    assert wide.kv == 2 * plan.kv
    # int8: 12 bytes and a scale of 4 for each of 3 x 2 x 112 heads = 10752, a multiple of 64
    narrow = plan_memory([record_decoder(model)], Limits(100, 3, 24, 5, 2, "int8"), model.text, threads=1)
    assert narrow.kv_layer == 10752


def test_temporaries_are_reused() -> None:
    model = config(False)
    graph = record_decoder(model)
    plan = plan_memory([graph], LIMITS, model.text, threads=1)
    counts = max_counts(LIMITS)
    assert plan.temporaries < sum(buffer_bytes(graph.buffers[i], counts) for i in lifetimes(graph)) / 3


def test_random_lifetimes_never_overlap() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        spans, sizes = {}, {}
        for index in range(draw.randint(1, 25)):
            first = draw.randint(0, 20)
            spans[index] = (first, first + draw.randint(0, 8))
            sizes[index] = ALIGN * draw.randint(0, 6)
        offsets, total = place(sizes, spans)
        busiest = max(sum(sizes[i] for i, (a, b) in spans.items() if a <= t <= b) for t in range(30))
        assert busiest <= total <= sum(sizes.values())
        for i in spans:
            assert offsets[i] + sizes[i] <= total
            for j in spans:
                if i < j and spans[i][0] <= spans[j][1] and spans[j][0] <= spans[i][1]:
                    assert offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]


def test_impossible_plans_are_refused() -> None:
    model = config(False)
    graph = record_decoder(model)
    with pytest.raises(UsageError, match="at least 1"):
        plan_memory([graph], LIMITS, model.text, threads=0)
    with pytest.raises(UsageError, match="two graphs are called 'decoder'"):
        plan_memory([graph, graph], LIMITS, model.text, threads=1)


def test_what_only_linears_read_is_kept_in_int8() -> None:
    """In groups of 16: norms, SiLU and, since heads are of 12, no attention; by hand for one block."""
    model = config(False)
    graph = record_decoder(model)
    groups = rounded(graph, model.text, lambda name: 0 if name == "layers.1.qkv" else 16)
    ops = [node.op for node in graph.nodes if node.output.index in groups]
    head = ["rms_norm"]
    assert ops == [
        "rms_norm",
        "rms_norm",
        "silu_mul",
        "rms_norm",
        "silu_mul",
        "rms_norm",
        "rms_norm",
        "silu_mul",
        *head,
    ]
    assert set(groups.values()) == {16}
    assert "attention" in {n.op for n in graph.nodes if n.output.index in rounded(graph, model.text, lambda name: 12)}
    assert rounded(graph, model.text, lambda name: 0) == {}
    # by hand: 24 tokens are two tiles of 12; 48 columns are 3 groups of 16 codes and 12 bytes, 84, in whole lines 128
    norm = next(node.output for node in graph.nodes if node.op == "rms_norm")
    assert buffer_bytes(norm, max_counts(LIMITS), 16) == 24 * 128
    plain = plan_memory([graph], LIMITS, model.text, threads=1)
    small = plan_memory([graph], LIMITS, model.text, threads=1, group_size=lambda name: 32)
    assert small.temporaries < plain.temporaries


def test_a_residual_is_not_rounded() -> None:
    """Nor what two linears round in different groups, nor the output of the graph."""
    ops = Recorder("graph", {"n": (32,), "a": (32, 32), "b": (32, 32)}, frozenset())
    x = ops.input("x", Rows("tokens"), 32, "f32")
    h = ops.rms_norm(x, ops.norm_weight("n"), 1e-5)
    y = ops.linear(h, ops.linear_weight("a"))
    out = ops.rms_norm(ops.linear(y, ops.linear_weight("b"), residual=h), ops.norm_weight("n"), 1e-5)
    graph = ops.finish(out)
    assert rounded(graph, None, lambda name: 32) == {}
    ops = Recorder("graph", {"n": (32,), "a": (32, 32), "b": (32, 32)}, frozenset())
    h = ops.rms_norm(ops.input("x", Rows("tokens"), 32, "f32"), ops.norm_weight("n"), 1e-5)
    graph = ops.finish(ops.linear(h, ops.linear_weight("a"), residual=ops.linear(h, ops.linear_weight("b"))))
    assert rounded(graph, None, lambda name: {"a": 16, "b": 32}[name]) == {}
    assert list(rounded(graph, None, lambda name: 32).values()) == [32]
    ops = Recorder("graph", {"n": (32,), "a": (32, 32)}, frozenset())
    h = ops.rms_norm(ops.input("x", Rows("tokens"), 32, "f32"), ops.norm_weight("n"), 1e-5)
    ops.linear(h, ops.linear_weight("a"))
    assert rounded(ops.finish(h), None, lambda name: 32) == {}
