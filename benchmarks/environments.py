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
        call([sys.executable, "-m", "venv", str(home)], "installing")
    constraint = home / "constraints.txt"
    for each in packages:
        constraint.write_text(f"{TORCH}\n")
        call(
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraint), *each],
            "installing",
        )
    ready.write_text(wanted)
    return python


def call(command: list[str], what: str, limit: int = _INSTALL_SECONDS) -> None:
    """Run it; `PeerError` that begins with `what` when it fails or takes more than `limit` seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as problem:
        raise PeerError(f"{what} took more than {limit} s") from problem
    if done.returncode:
        raise PeerError(f"{what} failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1][:300] if lines else "no message"
