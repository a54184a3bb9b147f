"""Every test gets a home and a cache of its own; the demo checkpoint is assembled once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow where the cores are shared
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HOME and the cache in a fresh directory."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("EDGEVL_CACHE", str(home / "cache"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("EDGEVL_ISA", raising=False)
    return home


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint's directory."""
    from edgevl.demo import build_demo_checkpoint

    out = tmp_path_factory.mktemp("demo") / "checkpoint"
    build_demo_checkpoint(out)
    return out
