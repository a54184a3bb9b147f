"""Who may import what: ARCHITECTURE.md's table, held against sources and a process without heavy packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("edgevl", "quantize", "deploy", "calibration")
HEAVY = {"torch", "triton", "onnx", "onnxruntime", "tensorrt", "transformers", "safetensors"}
# stage -> other stages it may import
ALLOWED = {"edgevl": set(), "calibration": {"edgevl"}, "quantize": {"edgevl", "calibration"}, "deploy": {"edgevl"}}
# verbs of a workstation stage, which import it when they are run
VERBS = {
    "edgevl/commands/quantize.py": {"quantize"},
    "edgevl/commands/measure.py": {"quantize", "calibration", "deploy"},
    "edgevl/commands/build.py": {"deploy"},
}
# folders whose modules may import a heavy package: Triton compiles in a process of its own
PLACES = {"deploy/kernels": {"triton"}}


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """Top-level package names that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("stage", STAGES)
def test_arrows_never_point_back(stage: str) -> None:
    for file in sorted((ROOT / stage).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        used = imports(file)
        others = used & set(STAGES) - {stage}
        assert others <= ALLOWED[stage] | VERBS.get(name, set()), f"{name} imports {sorted(others)}"
        assert not imports(file, top_level_only=True) & set(STAGES) - {stage} - ALLOWED[stage], name
        if stage in ("edgevl", "calibration", "deploy"):
            found = used & HEAVY - PLACES.get(name.rpartition("/")[0], set())
            assert not found, f"{name} imports {sorted(found)}"
        assert "cuda" not in used or name == "edgevl/backends/cuda_device.py", f"{name} talks to the GPU's driver"


def test_nothing_needs_the_training() -> None:
    for stage in STAGES:
        for file in sorted((ROOT / stage).rglob("*.py")):
            assert "training" not in imports(file), file


def test_the_builder_starts_the_compiler_and_never_imports_it() -> None:
    light = {"deploy/kernels/__init__.py", "deploy/kernels/tuning.py"}
    for file in sorted((ROOT / "deploy" / "kernels").glob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        assert ("triton" in imports(file)) == (name not in light), name


def test_every_module_says_what_it_is() -> None:
    for stage in (*STAGES, "training"):
        for file in sorted((ROOT / stage).rglob("*.py")):
            assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_edgevl_is_light() -> None:
    out = run(
        "import time, sys; a = time.perf_counter(); import edgevl; b = time.perf_counter() - a\n"
        "print(b, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    seconds, *modules = out.split()
    assert not {"torch", "triton", "onnx", "numpy"} & set(modules)
    assert float(seconds) < 0.3


def test_the_runtime_works_where_the_heavy_packages_cannot_be_imported(tmp_path: Path) -> None:
    from checkpoints import tiny_vl
    from deploy.build import BuildSettings, build

    tiny_vl(tmp_path / "m")
    build(str(tmp_path / "m"), tmp_path / "b", BuildSettings(context=128))
    out = run(
        "import sys\n"
        f"for name in {sorted(HEAVY | {'quantize', 'deploy', 'calibration'})}: sys.modules[name] = None\n"
        "from edgevl.cli import main\n"
        f"main(['chat', {str(tmp_path / 'b')!r}, '-p', 'Hello', '--max-tokens', '4', '--json'])\n"
    )
    assert '"token_ids"' in out


def test_listing_the_verbs_imports_none_of_them() -> None:
    out = run(
        "import sys\nfrom edgevl.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(*sorted(m for m in sys.modules if m.startswith('edgevl.commands.') or m == 'numpy'), file=sys.stdout)"
    )
    assert "edgevl.commands" not in out
    assert "numpy" not in out
