"""Bundles for GPUs, built where there is none: every SM compiles, the bundle holds what the runtime launches."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.models import eight_b
from checkpoints import tiny_vl
from deploy import cubins
from deploy.build import BuildSettings, build
from deploy.cubins import compile_kernels
from deploy.kernels.tuning import SHARED_LIMIT
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.backends.cuda_program import Cubins
from edgevl.bundle import Bundle
from edgevl.cli import main
from edgevl.commands import bench
from edgevl.config import ModelConfig
from edgevl.engine import make_runner
from edgevl.errors import BundleError, EdgevlError, MissingExtraError, UsageError
from edgevl.memory import max_counts
from edgevl.prefill import feed
from edgevl.recorder import record_model
from edgevl.runner import Limits
from edgevl.targets import TARGETS
from gpu_devices import FUNCTIONS, FakeDriver


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels, shared by this module's tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vl(tmp_path_factory.mktemp("model") / "m", awq=True)


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVL_CACHE", str(cache))


@pytest.fixture
def bundle(model: Path, tmp_path: Path) -> Path:
    settings = BuildSettings("orin-nano-8gb", head="int8", embed="int8", vision="int8", kv="int8", context=256)
    build(str(model), tmp_path / "b", settings)
    return tmp_path / "b"


def test_a_gpu_bundle_is_whole_and_its_golden_prompt_is_of_the_processor(bundle: Path) -> None:
    opened = Bundle.open(bundle, verify=True)
    manifest = opened.manifest
    assert (manifest.target.backend, manifest.target.layout, manifest.target.architecture) == ("cuda", "tiles", "sm_87")
    assert manifest.golden is not None
    for record in manifest.kernels.values():
        assert opened.kernel_file(record.file)[:4] == b"\x7fELF"
        assert 0 <= record.shared <= SHARED_LIMIT["sm_87"]
    forms = {n: opened.weight(n) for n in manifest.weights}
    lowered = lower(
        record_model(manifest.model),
        manifest.model.text,
        manifest.limits,
        lambda name: Form(forms[name].kind, forms[name].group_size),
        manifest.model.tokens.size,
    )
    for key, kernel in lowered.kernels(max_counts(manifest.limits)).items():
        assert manifest.kernels[key].arguments == kernel.types


def test_the_processor_computes_the_same_from_a_gpu_bundle_as_from_its_own(
    bundle: Path, model: Path, tmp_path: Path
) -> None:
    settings = BuildSettings(head="int8", embed="int8", vision="int8", kv="int8", context=256)
    build(str(model), tmp_path / "host", settings)
    found = []
    for path in (bundle, tmp_path / "host"):
        runner = make_runner(Bundle.open(path), 1, "cpu")
        found.append(feed(runner, [5, 6, 7, 8, 9], 0, None, 2).copy())
    assert np.array_equal(*found)


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    return caught.value.code


def test_inspect_lists_kernels_and_chat_says_what_is_missing(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, kernels = run("inspect", str(bundle), "--json"), json.loads(capfd.readouterr().out)["kernels"]
    assert code == 0
    assert {k["architecture"] for k in kernels} == {"sm_87"}
    assert all(k["bytes"] > 1000 for k in kernels)
    assert any(k["name"].startswith("gemv-") for k in kernels)
    code = run("chat", str(bundle), "-p", "Hello")
    said = capfd.readouterr()
    assert (code in (1, 2), said.out) == (True, "")
    assert len(said.err.strip().splitlines()) == 1
    assert "orin-nano-8gb" in said.err


def resident(path: Path) -> int:
    """Bytes of a mapped file that are counted as this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


def on_fake_driver(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Kernels by names of their own, as many have the same symbol in different files."""
    bundle.manifest.kernels.update({k: replace(r, symbol=k) for k, r in bundle.manifest.kernels.items()})
    driver = FakeDriver(Cubins(bundle.manifest.kernels, bundle.kernel_file))
    monkeypatch.setattr("edgevl.backends.cuda_device._bindings", lambda: driver)
    return driver


def test_weights_that_a_gpu_holds_are_not_held_twice(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    on_fake_driver(opened, monkeypatch)
    for name in opened.manifest.weights:
        for array in opened.weight(name).arrays.values():
            array.max()
    assert resident(bundle / "weights.safetensors") > opened.weight_bytes // 2
    runner = make_runner(opened, None, "auto")
    assert resident(bundle / "weights.safetensors") == 0
    assert runner.planned_bytes > opened.weight_bytes // 2


def test_bench_measures_the_gpu_and_what_an_answer_does(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    driver = on_fake_driver(opened, monkeypatch)
    for name in ("read_bandwidth", "int8_rate"):
        monkeypatch.setattr(bench, name, lambda *_: pytest.fail("that is the processor's"))
    runner = make_runner(opened, None, "auto")
    found = bench.measure(opened, runner, 20, 3, 0, 1)["bandwidth"]
    assert found["available_gb_s"] > 0 and found["share"] is not None
    assert [graph for graph in driver.replays if graph[0].startswith("argmax")]
    assert len(driver.allocated) == 2
    driver.free = 1 << 20
    found = bench.measure(opened, runner, 20, 3, 0, 1)["bandwidth"]
    assert (found["available_gb_s"], found["share"]) == (None, None)


def test_a_bundle_whose_kernels_were_edited_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    key, record = next(iter(opened.manifest.kernels.items()))
    for wrong in (replace(record, warps=64), replace(record, shared=1 << 20), replace(record, file="kernels/x")):
        opened.manifest.kernels[key] = wrong
        with pytest.raises(BundleError):
            opened._check_kernels()
    (bundle / record.file).write_bytes(b"\0" * (bundle / record.file).stat().st_size)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(bundle, verify=True)


def kernels_of(config: ModelConfig, kv: str = "f16", group: int = 32) -> dict[str, cubins.Kernel]:
    """Everything that a model launches whose decoder is int4, whose tower is int8, and whose head is f16."""

    def form(name: str) -> Form:
        if "norm" in name or name in ("vision.positions", "vision.prefix"):
            return Form("f32")
        if name in ("embed", "head", "vision.patch"):
            return Form("f16")
        return Form("int8") if name.startswith(("vision", "projector")) else Form("int4", group)

    limits = Limits(context=256, chunk=64, kv=kv)
    return lower(record_model(config), config.text, limits, form, config.tokens.size).kernels(max_counts(limits))


def small_kernels(config: ModelConfig) -> dict[str, cubins.Kernel]:
    return {key: kernel for key, kernel in kernels_of(config).items() if kernel.name in ("gemv", "gemm", "attend")}


def wide_loads(cubin: bytes, folder: Path) -> int:
    """Instructions that load 16 bytes a thread from device memory, to registers or straight to shared memory."""
    (folder / "k.cubin").write_bytes(cubin)
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"  # type: ignore
    code = subprocess.run([tools / "nvdisasm", folder / "k.cubin"], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\bLDG(?:STS)?\.[.\w]*128", code))


@pytest.mark.parametrize("architecture", sorted({t.architecture for t in TARGETS} - {"cpu"}))
def test_every_kernel_compiles_for_every_sm_and_few_tokens_load_weights_16_bytes_a_thread(
    architecture: str, bundle_config: ModelConfig, tmp_path: Path
) -> None:
    every = kernels_of(bundle_config) | kernels_of(bundle_config, "int8")
    ways = {(k.name, k.variant, k.types, dict(k.constants).get("KIND")): k for k in every.values()}  # one shape of each
    large = {"K": 4096, "Q": 128}
    wide = {
        replace(kernel, constants=tuple((name, large.get(name, value)) for name, value in kernel.constants))
        for kernel in ways.values()
        if kernel.name == "gemv" and dict(kernel.constants)["KIND"] == "int4"
    }
    assert {kernel.name for kernel in ways.values()} == FUNCTIONS.keys()
    assert {kernel.variant for kernel in wide} == {"few", "more"}
    kernels = {kernel.key: kernel for kernel in (*ways.values(), *wide)}
    for key, (record, cubin) in compile_kernels(kernels, architecture).items():
        assert cubin[:4] == b"\x7fELF"
        assert record.arguments == kernels[key].types
        assert record.shared <= SHARED_LIMIT[architecture]
        if kernels[key] in wide:
            assert wide_loads(cubin, tmp_path), key


@pytest.fixture(scope="module")
def bundle_config(model: Path) -> ModelConfig:
    from edgevl.checkpoint import open_checkpoint

    return open_checkpoint(str(model)).config


def test_what_was_compiled_is_not_compiled_again(
    bundle: Path, bundle_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = small_kernels(bundle_config)
    first = compile_kernels(kernels, "sm_87")
    monkeypatch.setattr(cubins, "_compiler", lambda folder: pytest.fail("the compiler was started"))
    assert compile_kernels(kernels, "sm_87") == first


def test_a_change_of_any_kernel_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "_SOURCES", Path(shutil.copytree(cubins._SOURCES, tmp_path / "kernels")))
    job = {"name": "gemv", "architecture": "sm_87"}
    before = cubins._cache_path(job, "3.9.0")
    assert cubins._cache_path(job, "3.9.0") == before
    assert before not in (cubins._cache_path(job, "3.9.1"), cubins._cache_path({**job, "warps": 8}, "3.9.0"))
    with (tmp_path / "kernels" / "dequantize.py").open("a") as stream:
        stream.write("# changed\n")
    assert cubins._cache_path(job, "3.9.0") != before


def test_too_much_shared_memory_is_found_here_and_not_on_the_device(
    bundle_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = small_kernels(bundle_config)
    monkeypatch.setitem(SHARED_LIMIT, "sm_87", 1000)
    with pytest.raises(EdgevlError, match=r"shared memory, sm_87 has 1,000"):
        compile_kernels(kernels, "sm_87")


@pytest.mark.parametrize("said", ["", '{"symbol": "ge'])
def test_a_compiler_that_dies_is_one_sentence(
    said: str, bundle_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(folder: str, errors: Any) -> subprocess.Popen[str]:
        code = f"import sys; sys.stdout.write({said!r}); sys.exit('Killed')"
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=errors, text=True)
        process.wait()
        return process

    kernels = small_kernels(bundle_config)
    assert len(kernels) > 2
    monkeypatch.setenv("EDGEVL_CACHE", str(tmp_path))
    monkeypatch.setattr(cubins, "_compiler", dead)
    with pytest.raises(EdgevlError, match=r"does not compile for sm_87: the compiler died \(Killed\)"):
        compile_kernels(kernels, "sm_87")


@pytest.mark.parametrize("architecture", ["sm_86", "sm_120"])
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_the_largest_kernels_of_the_8b_fit_into_the_least_shared_memory(architecture: str, kv: str) -> None:
    names = ("attend", "full_attention", "gemm")
    kernels = {key: kernel for key, kernel in kernels_of(eight_b(), kv, 128).items() if kernel.name in names}
    assert {kernel.name for kernel in kernels.values()} == {*names}
    most = max(record.shared for record, _ in compile_kernels(kernels, architecture).values())
    assert 48 << 10 < most <= SHARED_LIMIT[architecture]


def test_without_a_compiler_or_for_an_unknown_sm_the_build_says_so(
    bundle_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = small_kernels(bundle_config)
    with pytest.raises(UsageError, match="sm_52"):
        compile_kernels(kernels, "sm_52")
    wrong = {key: replace(kernel, constants=()) for key, kernel in kernels.items()}
    with pytest.raises(EdgevlError, match="does not compile for sm_87"):
        compile_kernels(wrong, "sm_87")
    wrong = {key: replace(kernel, arguments=kernel.arguments[::-1]) for key, kernel in kernels.items()}
    with pytest.raises(EdgevlError, match="the runtime passes"):
        compile_kernels(wrong, "sm_87")

    def missing(name: str) -> str:
        raise cubins.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cubins.importlib.metadata, "version", lambda name: "3.5.1+old")
    with pytest.raises(EdgevlError, match=r"triton 3\.6, this is 3\.5\.1"):
        compile_kernels(kernels, "sm_87")
    monkeypatch.setattr(cubins.importlib.metadata, "version", missing)
    with pytest.raises(MissingExtraError, match=r"edgevl\[deploy\]"):
        compile_kernels(kernels, "sm_87")
