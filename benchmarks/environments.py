"""Environments of other tools: one folder of packages each, made once, from pip's configured registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
_INSTALL_SECONDS = 1800


class PeerError(Exception):
    """A peer that could not be installed or did not finish, and why."""


def environment(name: str, packages: tuple[tuple[str, ...], ...], folder: Path) -> Path:
    """The python of the environment `name` under `folder`, made when it is not there. Raises `PeerError`.

    `packages`: arguments of pip install, one call each. No call moves torch away from `TORCH`.
    """
    home = folder / name
    python = home / "bin" / "python"
    ready = home / ".ready"
    wanted = repr(packages)
    if ready.is_file() and ready.read_text() == wanted:
        return python
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(home)])
    constraint = home / "constraints.txt"
    for each in packages:
        constraint.write_text(f"{TORCH}\n")
        _call([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraint), *each])
    ready.write_text(wanted)
    return python


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired as problem:
        raise PeerError(f"installing took more than {_INSTALL_SECONDS} s") from problem
    if done.returncode:
        raise PeerError(f"installing failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1][:300] if lines else "no message"
