"""`python tests/on_arm.py SYSROOT`: the C++ kernels compiled for aarch64, and every op test under qemu.

SYSROOT is a folder with an aarch64 Linux that has Python 3.11, its headers and libraries: Debian's packages unpacked
with `dpkg -x` will do; numpy for aarch64 lies in SYSROOT/site. Wants qemu-aarch64 and aarch64-linux-gnu-g++ (Debian:
qemu-user, g++-aarch64-linux-gnu). A whole run takes a minute or two. Not part of `make test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(sysroot: Path) -> Path:
    """Compile the module beside a copy of nothing else; what is up to date is left."""
    folder = ROOT / "build" / "aarch64"
    settings = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "tests" / "arm_toolchain.cmake",
        "CMAKE_CXX_FLAGS": f"-isystem {sysroot}/usr/include",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysroot / "usr" / "include" / "python3.11",
    }
    cmake = str(Path(sys.executable).parent / "cmake")
    given = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *given], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(folder)], check=True, stdout=subprocess.DEVNULL)
    (module,) = folder.glob("_native*.so")
    return module


def guest(module: str) -> None:
    """Inside: all cases with NEON, with i8mm and without, and with the portable kernels."""
    import importlib.util

    import edgevl

    assert edgevl.__file__
    spec = importlib.util.spec_from_file_location("edgevl._native", module)
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    sys.modules["edgevl._native"] = native
    spec.loader.exec_module(native)
    from cpu_cases import matches, rounding_at_once, whole_numbers

    from op_cases import BY_OP

    for isa in ("neoni8mm", "neon", "portable"):
        os.environ["EDGEVL_ISA"] = isa
        began, count = time.monotonic(), 0
        for rows in (1, 2, 7, 8, 25):
            whole_numbers(rows)
        rounding_at_once()
        for cases in BY_OP.values():
            for index, case in enumerate(cases):
                matches(case, 1 + index % 2, isa)
                count += 1
        print(f"{isa}: {count} cases of {len(BY_OP)} ops, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--guest":
        guest(sys.argv[2])
        sys.exit()
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/on_arm.py SYSROOT")
    root = Path(sys.argv[1]).resolve()
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", root / "site")))
    command = ["qemu-aarch64", "-L", root, "-E", f"PYTHONPATH={path}", root / "usr" / "bin" / "python3.11", __file__]
    sys.exit(subprocess.run([*command, "--guest", build(root)], check=False).returncode)
