"""`python tests/sanitized.py address,undefined` (or `thread`): the op tests on C++ kernels built under sanitizers.

The module is built into build/sanitize-..., and only this process uses it. Exits with 1 when a test fails or a
sanitizer has something to say. Part of `make test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_ops.py", "tests/test_cpu_backend.py")
# loaded first; the C++ library too, since Python has none when the sanitizer looks for what throws exceptions
RUNTIMES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}
# python and its libraries leak by design and were compiled without; what they do is not looked at
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode=66:ignore_noninstrumented_modules=1:suppressions={ROOT}/tests/data/thread_sanitizer.txt",
}
_RUN = """
import importlib.util, sys
import edgevl
spec = importlib.util.spec_from_file_location("edgevl._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["edgevl._native"] = module
spec.loader.exec_module(module)
import pytest
sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def build(sanitizers: str) -> Path:
    """The module, compiled with them; what is up to date is left."""
    folder = ROOT / "build" / f"sanitize-{sanitizers.replace(',', '-')}"
    cmake = str(Path(sys.executable).parent / "cmake")
    settings = [f"-DEDGEVL_SANITIZE={sanitizers}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *settings], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", str(folder), "-j", jobs], check=True, stdout=subprocess.DEVNULL)
    return folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def run(sanitizers: str, module: Path) -> int:
    """Pytest's exit code, or 66 where a sanitizer stopped it."""
    wanted = RUNTIMES[sanitizers.split(",", maxsplit=1)[0]]
    first = " ".join(subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in wanted)
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": first, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RUN, str(module), *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].split(",")[0] not in RUNTIMES:
        sys.exit("usage: python tests/sanitized.py address,undefined|thread")
    sys.exit(run(sys.argv[1], build(sys.argv[1])))
