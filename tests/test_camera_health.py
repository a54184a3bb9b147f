"""Heat, power, systemd, the status file and metrics, against trees and sockets made for the test."""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from edgevl.camera import notify
from edgevl.camera.health import check_status_file, serve_metrics, write_status
from edgevl.camera.heat import Governor, power_mode, temperatures, watts
from edgevl.camera.notify import Notifier
from edgevl.errors import MissingExtraError, UsageError


def zone(root: Path, number: int, kind: str, temp: str) -> None:
    folder = root / f"sys/class/thermal/thermal_zone{number}"
    folder.mkdir(parents=True)
    (folder / "type").write_text(f"{kind}\n")
    (folder / "temp").write_text(f"{temp}\n")


def test_thermal_zones(tmp_path: Path) -> None:
    assert temperatures(tmp_path) == {}
    zone(tmp_path, 0, "cpu-thermal", "51250")
    zone(tmp_path, 1, "gpu-thermal", "48000")
    zone(tmp_path, 2, "gpu-thermal", "49500")
    zone(tmp_path, 3, "cv0-thermal", "-256000")  # switched off
    zone(tmp_path, 4, "soc-thermal", "?")
    (tmp_path / "sys/class/thermal/thermal_zone5").mkdir()
    assert temperatures(tmp_path) == {"cpu-thermal": 51.25, "gpu-thermal": 49.5}


def test_power_of_the_board(tmp_path: Path) -> None:
    assert watts(tmp_path) is None
    rail = tmp_path / "sys/class/hwmon/hwmon3"
    rail.mkdir(parents=True)
    for name, text in (
        ("in1_label", "VDD_IN"),
        ("in1_input", "19000"),
        ("curr1_input", "500"),
        ("in2_label", "VDD_CPU"),
    ):
        (rail / name).write_text(f"{text}\n")
    assert watts(tmp_path) == 9.5
    (rail / "curr1_input").unlink()
    assert watts(tmp_path) is None


def test_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_mode() is None
    tool = tmp_path / "nvpmodel"
    tool.write_text(f"#!{sys.executable}\nprint('NV Fan Mode:quiet\\nNV Power Mode: MAXN\\n0')\n")
    tool.chmod(0o755)
    assert power_mode() == "MAXN"


def test_captions_are_spaced_out_while_it_is_hot() -> None:
    governor = Governor(80.0)
    factors = []
    for celsius in (70, 80, 85, 81, 90, 99, 79, 76, 75, 70, 70, 70, 70):
        governor.look(celsius)
        factors.append(governor.factor)
    assert factors == [1, 2, 4, 8, 16, 16, 16, 16, 8, 4, 2, 1, 1]
    assert governor.look(None) is False
    assert Governor(None).look(200) is False


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        yield listener  # type: ignore[misc]


def test_what_systemd_is_told(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(notify.time, "monotonic", lambda: now[0])
    environment = {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "40000000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    told = Notifier(environment)
    told.ready("captioning")
    assert manager.recv(100) == b"READY=1\nSTATUS=captioning"
    for _ in range(1000):
        told.alive()
        now[0] += 0.1  # 100 s, a quarter of the watchdog's 40 s apart
    told.stopping()
    said = []
    while (message := manager.recv(100)) != b"STOPPING=1":
        said.append(message)
    assert said == [b"WATCHDOG=1"] * 10


def test_no_manager_an_abstract_one_and_one_that_has_gone(tmp_path: Path) -> None:
    for environment in (
        {},
        {"NOTIFY_SOCKET": str(tmp_path / "gone")},
        {"NOTIFY_SOCKET": "@edgevl", "WATCHDOG_USEC": "x"},
    ):
        told = Notifier(environment)
        told.ready("")
        told.alive()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"edgevl-test-{os.getpid()}"
        listener.bind(f"\0{name}")
        listener.settimeout(5)
        other = {"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
        Notifier(other).alive()  # the watchdog is another process's
        Notifier(other).stopping()
        assert listener.recv(100) == b"STOPPING=1"


STATUS = {
    **dict.fromkeys(("captions", "unchanged", "events", "stalled_seconds", "uptime_seconds", "resident_bytes"), 7),
    "spacing": 2.0,
    "journal": {"bytes": 1, "sequence": 2, "deleted": 3},
    "watts": None,
    "celsius": {"cpu": 51.5},
    "sources": [
        {"name": "door", "connected": True, "frames": 5, "captions": 4, "losses": 1, "age_seconds": 0.5},
        {"name": 'r"oof', "connected": False, "frames": 0, "captions": 0, "losses": 9, "age_seconds": None},
    ],
}


def test_metrics_on_loopback() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = serve_metrics(port, lambda: STATUS)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        with pytest.raises(UsageError, match="another for --metrics"):
            serve_metrics(port, lambda: STATUS)
    finally:
        end()
    for line in (
        "edgevl_captions_total 7.0",
        'edgevl_celsius{zone="cpu"} 51.5',
        'edgevl_source_connected{source="r\\"oof"} 0.0',
        'edgevl_source_frames_total{source="door"} 5.0',
        'edgevl_source_age_seconds{source="door"} 0.5',
    ):
        assert line in text.splitlines()
    assert 'age_seconds{source="r' not in text
    assert "edgevl_watts" not in text


def test_metrics_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"edgevl\[caption\]"):
        serve_metrics(0, lambda: STATUS)


def test_the_status_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert write_status(path, {"state": 1}) is None
    assert write_status(tmp_path / "none" / "status.json", {}) == "No such file or directory"
    assert json.loads(path.read_text()) == {"state": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    check_status_file(path)
    for bad in (tmp_path, tmp_path / "none" / "status.json"):
        with pytest.raises(UsageError, match="--status"):
            check_status_file(bad)


@pytest.mark.parametrize("content", [b"my notes", b'{"time": 1}\n', b'{"stat'])
def test_the_status_replaces_nothing_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="something else"):
        check_status_file(path)
    assert path.read_bytes() == content
    for ours in (b"", b"\0" * 500, b'{"state": "running"}\n'):  # also as a power loss leaves one
        path.write_bytes(ours)
        check_status_file(path)
        with pytest.raises(UsageError, match="something else"):
            check_status_file(path, [tmp_path / "." / "status.json"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="something else"):
        check_status_file(tmp_path / "pipe")
