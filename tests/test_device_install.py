"""The installer of the caption service: what it leaves under another root, and what it refuses."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from edgevl.commands.caption import command

DEVICE = Path(__file__).parent.parent / "deploy" / "device"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A bundle, a command `edgevl` and a root to install into."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "edgevl").write_text("#!/bin/sh\n")
    (tmp_path / "edgevl").chmod(0o755)
    (tmp_path / "root").mkdir()
    return tmp_path


def run(place: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ROOT": str(place / "root"), "EDGEVL": str(place / "edgevl"), **more}
    return subprocess.run(
        [DEVICE / script, *arguments], env=env, capture_output=True, text=True, check=False, timeout=30
    )


def settings(conf: Path) -> dict[str, str]:
    """As systemd reads an EnvironmentFile: quotes around a value go."""
    lines = [line for line in conf.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.partition("=") for line in lines]
    return {name: value[1:-1] if value[:1] == '"' else value for name, _, value in pairs}


def test_installed_settings_are_a_command_line_that_works(place: Path) -> None:
    sources = ("front=csi:0", "rtsp://me:pass%20&word@10.0.0.5/live?a=1&b=2", "yard=gst:v4l2src ! videoscale")
    done = run(place, "install.sh", str(place / "bundle"), *sources)
    assert done.returncode == 0, done.stderr
    conf = place / "root/etc/edgevl/caption.conf"
    assert conf.stat().st_mode & 0o777 == 0o600
    values = settings(conf)
    assert values["BUNDLE"] == str(place / "bundle")
    assert tuple(shlex.split(values["SOURCES"])) == sources
    unit = (place / "root/etc/systemd/system/edgevl-caption.service").read_text()
    start = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    words = []
    for word in start.removeprefix("ExecStart=").split():
        name = word.strip("${}")
        words += [word] if not word.startswith("$") else [values[name]] if word[1] == "{" else shlex.split(values[name])
    assert words[:2] == [str(place / "edgevl"), "caption"]
    context = command.make_context("caption", words[2:])  # every option there is
    assert context.params["sources"] == sources
    assert context.params["keep"] == 10**9
    for line in ("Type=notify", "WatchdogSec=5min", "Restart=always"):
        assert line in unit.splitlines()


def test_settings_survive_an_update_and_an_uninstall_and_go_with_purge(place: Path) -> None:
    run(place, "install.sh", str(place / "bundle"), "/dev/video0")
    conf = place / "root/etc/edgevl/caption.conf"
    conf.write_text("mine")
    assert run(place, "install.sh", str(place / "bundle"), "/dev/video1").returncode == 0
    assert conf.read_text() == "mine"
    captions = place / "root/var/lib/edgevl/captions.jsonl"
    captions.parent.mkdir(parents=True)
    captions.write_text("{}")
    assert run(place, "uninstall.sh").returncode == 0
    assert not (place / "root/etc/systemd/system/edgevl-caption.service").exists()
    assert conf.exists()
    assert captions.exists()
    assert run(place, "uninstall.sh", "--purge").returncode == 0
    assert not conf.parent.exists()
    assert not captions.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "at least one source"),
        (("BUNDLE",), "at least one source"),
        (("/nowhere", "csi:0"), "no bundle"),
        (("BUNDLE", "gst:x location='a b'"), "caption.conf"),
        (("BUNDLE", "rtsp://a/$HOME"), "caption.conf"),
    ],
)
def test_what_the_installer_refuses(place: Path, arguments: tuple[str, ...], word: str) -> None:
    done = run(place, "install.sh", *(str(place / "bundle") if a == "BUNDLE" else a for a in arguments))
    assert done.returncode == 2
    assert word in done.stderr
    assert [*(place / "root").rglob("*")] == []


def test_the_command_must_be_there(place: Path) -> None:
    done = run(place, "install.sh", str(place / "bundle"), "csi:0", EDGEVL="/nowhere/edgevl")
    assert (done.returncode, "pip install" in done.stderr) == (2, True)
    assert run(place, "uninstall.sh", "--all").returncode == 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(place: Path) -> None:
    run(place, "install.sh", str(place / "bundle"), "csi:0")
    unit = place / "root/etc/systemd/system/edgevl-caption.service"
    tool = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False, timeout=60)
    assert "edgevl-caption" not in done.stderr, done.stderr
