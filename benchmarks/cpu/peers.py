"""The runtimes that are compared, the environment of each, and how each gets its model from the demo's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu.models import write_random_gguf
from benchmarks.environments import TORCH, call, environment
from benchmarks.quantizers.model import write_model
from deploy.build import BuildSettings, build
from edgevl.demo import demo_checkpoint, find_gguf
from quantize.job import quantize
from quantize.settings import QuantizeSettings

RUNNERS = Path(__file__).with_name("runners")
_PREPARE_SECONDS = 1800
CONTEXT = 4096

Packages = tuple[tuple[str, ...], ...]
_LLAMA: Packages = (("llama-cpp-python==0.3.36",),)
_ONNX: Packages = (
    (TORCH,),
    ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.5.4", "onnx-ir", "onnx", "tqdm"),
)
_OPENVINO: Packages = (
    (TORCH,),
    ("openvino-genai==2026.4.1.0", "nncf==3.4.0", "transformers==5.5.4", "onnx", "safetensors", "requests", "pillow"),
    # its torchvision is one for another torch; what else it needs stands above
    ("--no-deps", "optimum-intel==2.2.0", "optimum==2.3.0"),
)


@dataclass(frozen=True)
class Row:
    """One runtime with one model."""

    name: str
    model: str  # "demo", "8b", "tower", "demo tower": rows of one model are compared
    prepare: Callable[[Path, Path], str]  # folder of models, folder of environments -> the job's model
    runner: str | None = None  # runners/run_NAME.py; None: edgevl's own
    environment: str = ""
    packages: Packages = ()


def python_of(row: Row, environments: Path) -> Path:
    """The python of the row's environment, made when it is not there."""
    return environment(row.environment, row.packages, environments)


# -- edgevl -----------------------------------------------------------------------------------------------------------


def _plain(work: Path) -> Path:
    """The demo's language model as a plain Llama checkpoint."""
    folder = work / "model"
    if not (folder / "config.json").is_file():
        write_model("demo", folder, None)
    return folder


def _bundle(work: Path, _: Path) -> str:
    """int4 in groups of 64, the head int8. How it was calibrated changes no speed, so the quickest way is taken."""
    out = work / "edgevl-bundle"
    if not (out / "manifest.json").is_file():
        checkpoint = work / "edgevl-checkpoint"
        if not (checkpoint / "config.json").is_file():
            quantize(str(_plain(work)), checkpoint, QuantizeSettings(64, effort="fast", measure=False))
        build(str(checkpoint), out, BuildSettings(head="int8", context=CONTEXT))
    return str(out)


def _demo_tower(work: Path, _: Path) -> str:
    out = work / "edgevl-eyes"
    if not (out / "manifest.json").is_file():
        build(str(demo_checkpoint()), out, BuildSettings(head="int8", vision="int8", context=CONTEXT))
    return str(out)


# -- others -----------------------------------------------------------------------------------------------------------


def _gguf(kind: str) -> Callable[[Path, Path], str]:
    def prepare(work: Path, environments: Path) -> str:
        out = work / f"{kind}.gguf"
        if not out.is_file():
            python = environment("llama-cpp", _LLAMA, environments)
            part = out.with_suffix(".part")
            _call([str(python), str(RUNNERS / "make_gguf.py"), str(find_gguf()), str(part), kind])
            part.replace(out)
        return str(out)

    return prepare


def _random_gguf(work: Path, _: Path) -> str:
    out = work / "8b.gguf"
    if not out.is_file():
        write_random_gguf(out, 0)
    return str(out)


def _openvino(work: Path, environments: Path) -> str:
    out = work / "openvino"
    if not (out / ".ready").is_file():
        python = environment("openvino", _OPENVINO, environments)
        export = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(_plain(work))]
        kind = [
            "--task",
            "text-generation-with-past",
            "--weight-format",
            "int4",
            "--group-size",
            "64",
            "--ratio",
            "1.0",
        ]
        _call([str(python), *export, *kind, str(out)])
        (out / ".ready").touch()
    return str(out)


def _onnx(work: Path, environments: Path) -> str:
    out = work / "onnxruntime"
    if not (out / ".ready").is_file():
        python = environment("onnxruntime", _ONNX, environments)
        options = ["int4_block_size=64", "int4_accuracy_level=4"]
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-m", str(_plain(work)), "-o", str(out)]
        _call([*builder, "-p", "int4", "-e", "cpu", "-c", str(work / "onnx-cache"), "--extra_options", *options])
        (out / ".ready").touch()
    return str(out)


def _call(command: list[str]) -> None:
    call(command, "preparing its model", _PREPARE_SECONDS)


ROWS = (
    Row("edgevl int4 g64", "demo", _bundle),
    Row("llama.cpp Q4_0", "demo", _gguf("Q4_0"), "llama_cpp", "llama-cpp", _LLAMA),
    Row("llama.cpp Q4_K_M", "demo", _gguf("Q4_K_M"), "llama_cpp", "llama-cpp", _LLAMA),
    Row("onnxruntime-genai int4 b64", "demo", _onnx, "onnxruntime", "onnxruntime", _ONNX),
    Row("OpenVINO GenAI int4 g64", "demo", _openvino, "openvino", "openvino", _OPENVINO),
    Row("edgevl int4 g128, 8B", "8b", lambda *_: "8b"),
    Row("llama.cpp Q4_0, 8B", "8b", _random_gguf, "llama_cpp", "llama-cpp", _LLAMA),
    Row("edgevl int8, 8B's tower", "tower", lambda *_: "tower"),
    Row("edgevl int8, demo's tower", "demo tower", _demo_tower),
)
