"""The GPU backend without a GPU: whole models in Triton's interpreter, and every call of the driver on a fake one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from cuda.bindings.driver import CUresult

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.backends.cuda import CudaRunner
from edgevl.backends.cuda_device import CudaDevice
from edgevl.backends.cuda_kernels import Choice, Kernel, WeightArray
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.backends.cuda_program import Cubins, Program
from edgevl.backends.reference import ReferenceRunner
from edgevl.bundle import Bundle
from edgevl.commands import doctor
from edgevl.config import ModelConfig
from edgevl.errors import BundleError, CapacityError, EdgevlError, UsageError
from edgevl.layouts import StoredWeight, relaid, unpack
from edgevl.memory import Placement, aligned, buffer_bytes, max_counts
from edgevl.prefill import feed
from edgevl.recorder import Buffer, Graph, Rows, record_model
from edgevl.runner import Limits
from edgevl.sampling import choose
from edgevl.weights import dequantize
from gpu_devices import FakeDriver, InterpreterDevice, uncompiled

Weights = Callable[[str], StoredWeight]
GREEDY = np.zeros((1, 3), np.float32)
LIMITS = Limits(context=128, slots=3, chunk=48, logit_rows=4, tiles=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelConfig, Weights]]:
    """Tiny models with their weights in tiles: pictures in int4 and int8, text in f16 with a tied head."""
    root = tmp_path_factory.mktemp("cuda")
    tiny_vl(root / "vl", awq=True)
    tiny_llama(root / "text", tied=True, qkv_bias=True, layers=1)
    found = {}
    for name, settings in {
        "vl": BuildSettings(context=128, head="int4", vision="int8"),
        "text": BuildSettings(context=128),
    }.items():
        build(str(root / name), root / f"{name}.bundle", settings)
        bundle = Bundle.open(root / f"{name}.bundle")
        found[name] = (bundle.manifest.model, cache(lambda name, b=bundle: relaid(b.weight(name), "tiles")))
    return found


def form_of(weights: Weights) -> Callable[[str], Form]:
    def form(name: str) -> Form:
        stored = weights(name)
        return Form(stored.kind, stored.group_size)

    return form


def kernels_of(config: ModelConfig, weights: Weights, limits: Limits = LIMITS) -> dict[str, Kernel]:
    return lower(record_model(config), config.text, limits, form_of(weights), config.tokens.size).kernels(
        max_counts(limits)
    )


def interpreted(config: ModelConfig, weights: Weights, kv: str = "f16") -> CudaRunner:
    limits = replace(LIMITS, kv=kv)
    kernels = kernels_of(config, weights, limits)
    return CudaRunner(config, limits, weights, InterpreterDevice(kernels), uncompiled(kernels))


def reference(config: ModelConfig, weights: Weights, kv: str = "f16") -> ReferenceRunner:
    """Activations are not rounded to int8 on a GPU, so the twin has float weights of the same values."""

    def plain(name: str) -> StoredWeight:
        stored = weights(name)
        return StoredWeight("f32", stored.shape, {"values": dequantize(unpack(stored))}, stored.bias)

    return ReferenceRunner(config, replace(LIMITS, kv=kv), plain)


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-2) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_model_that_sees_matches_the_reference(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    """Tower, prefill with pictures (flash attention), a chunk of few tokens, and tokens one by one."""
    config, weights = models["vl"]
    assert config.vision is not None
    gpu, twin = interpreted(config, weights), reference(config, weights)
    side = config.vision.tile_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    images = gpu.vision(pixels)
    close(images, twin.vision(pixels))
    prompt = [*range(5, 30), *(-1 - r for r in range(len(images))), 40, 41]
    found, wanted = (feed(runner, prompt, 0, images, 3) for runner in (gpu, twin))
    close(found, wanted)
    for place in range(3):
        token = int(np.argmax(wanted[-1, : config.tokens.size]))
        step = (i32(token), i32(len(prompt) + place), i32(0), None, i32(0))
        assert gpu.choose(*step, GREEDY).tolist() == [int(np.argmax(gpu.decode(*step)[0, : config.tokens.size]))]
        found, wanted = gpu.decode(*step), twin.decode(*step)
        close(found, wanted)


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_slots_are_apart_and_a_batch_is_what_each_is_alone(
    models: dict[str, tuple[ModelConfig, Weights]], kv: str
) -> None:
    config, weights = models["text"]
    gpu, twin = interpreted(config, weights, kv), reference(config, weights, kv)
    for runner in (gpu, twin):
        for slot, length in ((0, 20), (1, 5), (2, 33)):
            feed(runner, list(range(slot + 3, slot + 3 + length)), 0, None, 1, slot)
    step = (i32(7, 8, 9), i32(20, 5, 33), i32(0, 1, 2), None, i32(2, 0, 1))
    close(gpu.decode(*step), twin.decode(*step))
    mixed = (i32(*range(20)), i32(*range(34, 44), *range(6, 16)), i32(*[2] * 10, *[1] * 10), None, i32(9, 19))
    close(gpu.decode(*mixed), twin.decode(*mixed))


def test_each_slot_draws_with_its_own_temperature_and_number(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    config, weights = models["text"]
    gpu = interpreted(config, weights)
    for slot, length in ((0, 20), (1, 5), (2, 33)):
        feed(gpu, list(range(slot + 3, slot + 3 + length)), 0, None, 1, slot)
    step = (i32(7, 8, 9), i32(20, 5, 33), i32(0, 1, 2), None, i32(2, 0, 1))
    draws = np.array([[0.0, 1.0, 0.9], [60.0, 1.0, 0.7], [40.0, 0.5, 0.4]], np.float32)
    found = gpu.choose(*step, draws).tolist()
    logits = gpu.decode(*step)[:, : config.tokens.size]
    assert found == [choose(row, *draw) for row, draw in zip(logits, draws.tolist(), strict=True)]
    assert len({*found, *logits.argmax(axis=1).tolist()}) == 5  # two of them are not the likeliest
    with pytest.raises(UsageError, match="draws"):
        gpu.choose(*step, draws[:2])


def test_few_tokens_in_a_step_are_bit_by_bit_those_of_steps_of_one(
    models: dict[str, tuple[ModelConfig, Weights]],
) -> None:
    config, weights = models["text"]
    gpu = interpreted(config, weights)
    count = min(gpu.alike_rows, LIMITS.logit_rows)
    ids = i32(*range(40, 40 + count))
    feed(gpu, list(range(20)), 0, None, 1)
    together = gpu.decode(ids, i32(*range(20, 20 + count)), i32(*[0] * count), None, i32(*range(count))).copy()
    for place in range(count):
        alone = gpu.decode(ids[place : place + 1], i32(20 + place), i32(0), None, i32(0))
        assert np.array_equal(alone[0], together[place])


def test_a_tied_head_is_uploaded_once(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    config, weights = models["text"]
    program = interpreted(config, weights)._program
    places = {program.address(WeightArray(name, "values", "*f16"), "") for name in ("embed", "head")}
    assert len(places) == 1


# -- the driver ---------------------------------------------------------------------------------------------------


def driven(models: dict[str, tuple[ModelConfig, Weights]], **facts: Any) -> tuple[CudaRunner, FakeDriver]:
    config, weights = models["vl"]
    cubins = uncompiled(kernels_of(config, weights))
    driver = FakeDriver(cubins, **facts)
    device = CudaDevice("the bundle was built for orin-nano-8gb (sm_87)", "sm_87", driver)
    return CudaRunner(config, LIMITS, weights, device, cubins), driver


def test_a_step_may_run_on_another_thread(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    runner, driver = driven(models)
    for _ in range(2):
        with ThreadPoolExecutor(1) as other:
            other.submit(runner.decode, i32(5), i32(0), i32(0), None, i32(0)).result()
    assert len(driver.replays) == 2


def test_more_slots_than_rows_of_logits_are_captured_with_every_kernel_loaded(
    models: dict[str, tuple[ModelConfig, Weights]],
) -> None:
    config, weights = models["vl"]
    limits = replace(LIMITS, slots=14, logit_rows=12)
    cubins = uncompiled(kernels_of(config, weights, limits))
    driver = FakeDriver(cubins)
    runner = CudaRunner(config, limits, weights, CudaDevice("the bundle", "sm_87", driver), cubins)
    assert driver.graphs == 0  # only what is replayed is kept
    places = i32(*range(12))
    driver.launches.clear()
    runner.decode(places, places, places, None, places)
    assert (driver.launches, len(driver.replays)) == ([], 1)
    runner.close()
    assert driver.allocated == []


def test_a_step_without_a_kernel_is_no_silent_skip(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    runner, _ = driven(models)
    with pytest.raises(EdgevlError, match="49 rows at once"):
        Choice(Rows("tokens"), ((48, ()),)).calls({"tokens": 49})
    assert runner._program._calls["decoder"][0].calls({"tokens": 0}) == ()


def test_one_token_replays_a_graph_and_everything_is_allocated_at_load(
    models: dict[str, tuple[ModelConfig, Weights]],
) -> None:
    runner, driver = driven(models)
    assert len(driver.allocated) == 2
    assert sum(size for _, size in driver.allocated) == runner.planned_bytes
    assert driver.launches  # once before they are captured
    driver.launches.clear()
    runner.decode(i32(5), i32(0), i32(0), None, i32(0))
    assert driver.launches == []
    assert [len(graph) > 10 for graph in driver.replays] == [True]
    runner.choose(i32(5), i32(1), i32(0), None, i32(0), GREEDY)
    assert [name.split("-")[0] for name in driver.replays[-1]] == ["argmax"]
    runner.choose(i32(5), i32(2), i32(0), None, i32(0), np.array([[0.7, 0.9, 0.5]], np.float32))
    assert [name.split("-")[0] for name in driver.replays[-1]] == [
        "sample_top",
        *["sample_narrow"] * 8,
        "sample_tally",
        "sample_pick",
    ]
    assert driver.launches == []
    runner.decode(i32(*range(40)), i32(*range(40)), i32(*[0] * 40), None, i32(39))
    assert {"attend", "gemm"} <= {name.split("-")[0] for name in driver.launches}
    side = models["vl"][0].vision.tile_size  # type: ignore[union-attr]
    runner.vision(np.zeros((1, side, side, 3), np.uint8))
    assert len(driver.allocated) == 2
    assert "Orin, sm_87" in runner.backend


def test_shared_memory_beyond_48_kib_is_asked_for(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    config, weights = models["vl"]
    cubins = uncompiled(kernels_of(config, weights))
    large = Cubins({k: replace(r, shared=100_000) for k, r in cubins.records.items()}, cubins.read)
    driver = FakeDriver(large)
    CudaRunner(config, LIMITS, weights, CudaDevice("the bundle", "sm_87", driver), large)
    assert set(driver.permissions.values()) == {100_000}
    assert driver.permissions.keys() == large.records.keys()


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_nothing_in_memory_overlaps(models: dict[str, tuple[ModelConfig, Weights]], kv: str) -> None:
    """Regions with all their layers, and what goes in and out of each graph: apart, and inside the arena."""
    config, weights = models["vl"]
    program = interpreted(config, weights, kv)._program
    plan, counts = program.plan, max_counts(LIMITS)
    text = config.text
    layers = dict.fromkeys(plan.regions, 1)
    layers |= dict.fromkeys({"keys", "values", "key_scales", "value_scales"} & layers.keys(), text.layers)
    layers |= dict.fromkeys(("sample_sums", "sample_state"), 9)
    spans = [(start, start + layers[name] * size) for name, (start, size) in plan.regions.items()]
    for name, graph in program._graphs.items():
        for buffer in [*graph.inputs.values(), graph.output]:
            assert buffer is not None
            start = plan.offsets[name][buffer.index]
            spans.append((start, start + buffer_bytes(buffer, counts)))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(start % 16 == 0 for start, _ in spans) and spans[-1][1] <= plan.total
    cells = LIMITS.slots * text.kv_heads * LIMITS.context
    assert plan.kv >= 2 * text.layers * cells * (text.head_dim + 4 if kv == "int8" else 2 * text.head_dim)


def apart(graphs: Sequence[Graph], counts: dict[str, int]) -> Placement:
    """Every buffer in a place of its own, also those that never live at the same time."""
    offsets, position = {}, 0
    for graph in graphs:
        places = list(accumulate((spaced(buffer_bytes(b, counts)) for b in graph.buffers), initial=position))
        offsets[graph.name], position = tuple(places[:-1]), places[-1]
    return Placement(offsets, {}, 0, position)


def spaced(size: int) -> int:
    return aligned(size) + 256


def gaps(program: Program, counts: dict[str, int]) -> np.ndarray:
    """Indices of the arena's bytes that belong to nothing."""
    plan, free = program.plan, np.ones(program.plan.total, bool)
    for name, graph in program._graphs.items():
        for buffer, start in zip(graph.buffers, plan.offsets[name], strict=True):
            free[start : start + buffer_bytes(buffer, counts)] = False
    starts = [start for start, _ in plan.regions.values()]
    for (start, size), end in zip(plan.regions.values(), [*starts[1:], plan.total], strict=True):
        for layer in range(start, end, size):
            free[layer : layer + size - 256] = False
    return np.flatnonzero(free)


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_kernels_neither_write_nor_use_what_lies_between_buffers(
    models: dict[str, tuple[ModelConfig, Weights]], kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaps hold 0xFF, no number in f16 and f32: read and used, it would be seen in what comes out."""
    monkeypatch.setattr("edgevl.backends.cuda_memory.place_graphs", apart)
    monkeypatch.setattr("edgevl.backends.cuda_memory.aligned", spaced)
    config, weights = models["vl"]
    runner = interpreted(config, weights, kv)
    program, device = runner._program, runner._device
    between = gaps(program, max_counts(LIMITS))
    assert len(between) >= 256 * (len(program.plan.regions) + 20)
    arena = device._memory.numpy()[program._base : program._base + program.plan.total]  # type: ignore[attr-defined]
    arena[between] = 0xFF
    assert config.vision is not None
    side = config.vision.tile_size
    images = runner.vision(np.full((1, side, side, 3), 99, np.uint8))
    assert np.isfinite(images).all()
    prompt = [*(-1 - r for r in range(len(images))), *range(5, 30)]
    assert np.isfinite(feed(runner, prompt, 0, images, 3)).all()
    place = len(prompt)
    for draws in (GREEDY, np.array([[0.7, 0.9, 0.5]], np.float32)):
        assert 0 <= runner.choose(i32(7), i32(place), i32(0), None, i32(0), draws)[0] < config.tokens.size
    assert np.isfinite(runner.decode(i32(7, 8, 9), i32(place, 0, 0), i32(0, 1, 2), None, i32(2, 0, 1))).all()
    assert (arena[between] == 0xFF).all()


def test_the_driver_gets_each_argument_where_its_kernel_has_it(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    """What arrives, cell by cell, beside what was lowered; and every buffer ends inside what was allocated."""
    config, weights = models["vl"]
    runner, driver = driven(models)
    lowered = lower(record_model(config), config.text, LIMITS, form_of(weights), config.tokens.size)
    counts = {"tokens": 40, "logits": 1, "images": 4}
    images = np.zeros((4, config.text.hidden_size), np.float32)
    driver.passed.clear()
    runner.decode(i32(*range(40)), i32(*range(40)), i32(*[0] * 40), images, i32(39))
    wanted = [launch for choice in lowered.choices["decoder"] for launch in choice.calls(counts)]
    assert len(wanted) == len(driver.passed) > 10
    for launch, (function, values) in zip(wanted, driver.passed, strict=True):
        assert function == launch.kernel.key
        for argument, value in zip(launch.arguments, values, strict=True):
            if isinstance(argument, Rows):
                assert value == argument.factor * counts[argument.symbol]
                continue
            assert value == runner._program.address(argument, "decoder")
            if isinstance(argument, Buffer):
                assert driver._inside(value, buffer_bytes(argument, max_counts(LIMITS)))
            elif isinstance(argument, WeightArray):
                stored = weights(argument.name)
                array = stored.bias if argument.field == "bias" else stored.arrays[argument.field]
                assert array is not None and driver._inside(value, array.nbytes)


@pytest.mark.parametrize(
    ("facts", "kind", "words"),
    [
        ({"version": 11040}, EdgevlError, ("orin-nano-8gb", "CUDA 12.0", "11.4")),
        ({"fails": {"cuInit": CUresult.CUDA_ERROR_NO_DEVICE}}, EdgevlError, ("no GPU", "--target host")),
        ({"fails": {"cuInit": CUresult.CUDA_ERROR_STUB_LIBRARY}}, EdgevlError, ("NVIDIA's driver", "--target host")),
        ({"fails": {"cuInit": CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH}}, EdgevlError, ("DRIVER_MISMATCH",)),
        ({"sm": (8, 9)}, BundleError, ("sm_87", "Orin, sm_89", "edgevl targets")),
        ({"free": 1 << 10}, CapacityError, ("0.00 GB are free", "--context")),
    ],
)
def test_what_a_machine_lacks_is_one_sentence(
    models: dict[str, tuple[ModelConfig, Weights]], facts: dict[str, Any], kind: type[EdgevlError], words: tuple[str]
) -> None:
    with pytest.raises(kind) as caught:
        driven(models, **facts)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_where_memory_is_shared_the_system_says_what_is_free(
    models: dict[str, tuple[ModelConfig, Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevl.backends.cuda_device.available_memory", lambda: 1000)
    driven(models)
    with pytest.raises(CapacityError, match="free"):
        driven(models, unified=1)


def test_doctor_names_the_gpu_and_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Cubins({}, lambda file: b"")
    for facts, words in (
        ({"sm": (8, 7)}, "Orin, sm_87, 8.59 GB free; runs bundles for orin-nano-8gb, "),
        ({"sm": (5, 2)}, "no target"),
        ({"version": 11040}, "CUDA 12.0"),
    ):
        driver = FakeDriver(none, **facts)
        monkeypatch.setattr("edgevl.backends.cuda_device._bindings", lambda driver=driver: driver)
        assert words in doctor.gpu()


def test_no_driver_and_failing_calls_are_sentences(models: dict[str, tuple[ModelConfig, Weights]]) -> None:

    class Missing(FakeDriver):
        """A driver without one function: cuda-bindings raises when it is called."""

        def __init__(self, function: str) -> None:
            super().__init__(Cubins({}, lambda file: b""))
            setattr(self, function, self.missing)

        def missing(self, *arguments: Any) -> None:
            raise RuntimeError("not found")

    with pytest.raises(EdgevlError, match="needs NVIDIA's driver") as caught:
        CudaDevice("the bundle", "sm_87", Missing("cuInit"))
    assert caught.value.exit_code == 1
    with pytest.raises(EdgevlError, match=r"no cuStreamCreate .*cuda-bindings<13"):
        CudaDevice("the bundle", "sm_87", Missing("cuStreamCreate"))
    with pytest.raises(EdgevlError, match=r"cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE"):
        driven(models, fails={"cuModuleLoadData": CUresult.CUDA_ERROR_INVALID_IMAGE})
    full = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(CapacityError, match="memory"):
        driven(models, fails={"cuMemAlloc": full})
    runner, driver = driven(models)
    driver.fails["cuGraphLaunch"] = full
    with pytest.raises(EdgevlError, match="cuGraphLaunch: CUDA_ERROR_OUT_OF_MEMORY") as caught:
        runner.decode(i32(5), i32(0), i32(0), None, i32(0))
    assert not isinstance(caught.value, UsageError)  # no wrong input: a service must end, and be started again
    with pytest.raises(EdgevlError, match="cuMemGetInfo: CUDA_ERROR_DEINITIALIZED"):
        driven(models, fails={"cuMemGetInfo": CUresult.CUDA_ERROR_DEINITIALIZED})


def test_steps_beyond_the_plan_and_wrong_indices_never_reach_a_kernel(
    models: dict[str, tuple[ModelConfig, Weights]],
) -> None:
    runner, driver = driven(models)
    driver.launches.clear()
    many = i32(*range(49))
    for error, step in (
        (CapacityError, (many, many, many * 0, None, i32(0))),
        (CapacityError, (many[:9], many[:9], many[:9] * 0, None, i32(*range(5)))),
        (UsageError, (i32(), i32(), i32(), None, i32())),
        (UsageError, (i32(9999), i32(0), i32(0), None, i32(0))),
        (UsageError, (i32(-1), i32(0), i32(0), None, i32(0))),
        (UsageError, (i32(1), i32(128), i32(0), None, i32(0))),
        (UsageError, (i32(1), i32(-1), i32(0), None, i32(0))),
        (UsageError, (i32(1), i32(0), i32(3), None, i32(0))),
        (UsageError, (i32(1), i32(0), i32(0), None, i32(1))),
    ):
        with pytest.raises(error):
            runner.decode(*step)
    side = models["vl"][0].vision.tile_size  # type: ignore[union-attr]
    with pytest.raises(CapacityError, match="3 tiles"):
        runner.vision(np.zeros((3, side, side, 3), np.uint8))
    assert (driver.launches, driver.replays) == ([], [])


def test_a_bundle_without_a_kernel_is_refused(models: dict[str, tuple[ModelConfig, Weights]]) -> None:
    config, weights = models["vl"]
    cubins = uncompiled(kernels_of(config, weights))
    missing = Cubins({k: r for k, r in cubins.records.items() if not k.startswith("gemv")}, cubins.read)
    with pytest.raises(BundleError, match="has no kernel gemv"):
        CudaRunner(config, LIMITS, weights, CudaDevice("the bundle", "sm_87", FakeDriver(missing)), missing)
