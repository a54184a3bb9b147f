"""`edgevl caption` on streams, as a service manager runs it: READY when warm, SIGTERM, status; and bad sources."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from camera_faults import kills, soak, tiny_bundle
from camera_server import Camera, write_clip
from edgevl.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("live"))


@pytest.fixture
def camera() -> Iterator[Camera]:
    with Camera(rate=25) as one:
        yield one


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_as_a_service(bundle: Path, camera: Camera, tmp_path: Path) -> None:
    out, status, port = tmp_path / "out.jsonl", tmp_path / "status.json", free_port()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        arguments = [bundle, f"door={camera.url}", "-o", out, "--every", "50ms", "--change", "0", "--max-tokens", "4"]
        arguments += ["--status", status, "--metrics", port, "--jpeg", "--threads", "1", "--json"]
        watchdog = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        process = subprocess.Popen(
            [sys.executable, "-c", "from edgevl.cli import main; main()", "caption", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **watchdog},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            first = manager.recv(1000).decode()
            assert first.startswith("READY=1\n"), first  # nothing was said before the model was warm
            said = [manager.recv(1000).decode() for _ in range(10)]
            assert "WATCHDOG=1" in said
            end = time.monotonic() + 30
            while out.read_text().count('"caption"') < 5:
                assert time.monotonic() < end
                time.sleep(0.05)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                assert b'edgevl_source_frames_total{source="door"}' in answer.read()
            assert json.loads(status.read_text())["state"] == "running"
        finally:
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    captions = [line for line in lines if "caption" in line]
    summary = json.loads(stdout)
    assert (summary["live"], summary["events"]) == (len(captions), len(lines) - len(captions))
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    digest = (bundle / "manifest.sha256").read_text().strip()
    for line in captions:
        assert (line["source"], line["model"]) == ("door", digest)
        assert set(line["seconds"]) == {"total", "vision", "prefill", "decode"}
        assert (tmp_path / line["jpeg"]).exists()
    assert json.loads(status.read_text())["state"] == "stopped"


def test_for_a_time_to_stdout(bundle: Path, camera: Camera, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            ["caption", str(bundle), camera.url, "--for", "1.5s", "--every", "100ms", "--change", "0", "--threads", "1"]
        )
    out, _ = capfd.readouterr()
    assert done.value.code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert sum("caption" in line for line in lines) >= 2
    assert {line["source"] for line in lines} == {camera.url}


def test_a_video_file(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "clip.mp4", frames=30, rate=10, hold=10)
    arguments = ["caption", str(bundle), str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--every", "500ms", "--json"]
    for written, skipped in ((3, 0), (0, 3)):
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--max-tokens", "3"])
        summary = json.loads(capfd.readouterr().out)
        assert (done.value.code, summary["written"], summary["skipped"]) == (0, written, skipped)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        # sources that can never work are refused before the bundle is opened
        (("ftp://host/x",), 2, "rtsp://"),
        (("file:///etc/passwd",), 2, "rtsp://"),
        (("http://",), 2, "names no host"),
        (("csi:front",), 2, "csi:0"),
        (("gst:",), 2, "pipeline"),
        (("gst:a 'b",), 2, "gst-launch-1.0"),
        (("/dev/video0", "/dev/video0"), 2, "two sources"),
        (("a=/dev/video0", "a=/dev/video1"), 2, "two sources"),
        # files that cannot be read get a line and exit code 2
        (("none.png",), 2, "does not exist"),
        (("none.mp4",), 2, "no video that can be read"),
        (("NOT_A_VIDEO.mp4",), 2, "no video that can be read"),
        (("EMPTY_FOLDER",), 2, "no pictures"),
        # options
        (("/dev/video0", "--every", "soon"), 2, "a time such as"),
        (("/dev/video0", "--every", "0"), 2, "--every"),
        (("/dev/video0", "--change", "200"), 2, "--change"),
        (("/dev/video0", "--keep", "1 apple", "-o", "OUT"), 2, "a size such as"),
        (("/dev/video0", "--rotate-size", "2GB", "--keep", "1GB", "-o", "OUT"), 2, "rotate"),
        (("/dev/video0", "--jpeg"), 2, "-o"),
        (("/dev/video0", "--keep", "1GB"), 2, "-o"),
        (("/dev/video0", "--status", "NOWHERE/status.json"), 2, "--status"),
        (("/dev/video0", "--status", "OUT", "-o", "OUT"), 2, "another file for --status"),
        (("/dev/video0", "--status", "OUT.done", "-o", "OUT"), 2, "another file for --status"),
        (("a.png", "--metrics", "9000"), 2, "cameras"),
        (("/dev/video0", "--metrics", "70000"), 2, "65535"),
    ],
)
def test_bad_sources_and_options(
    bundle: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    word: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "EMPTY_FOLDER").mkdir()
    (tmp_path / "NOT_A_VIDEO.mp4").write_bytes(b"not a video")
    tool = tmp_path / "bin" / "gst-launch-1.0"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["caption", str(bundle), *arguments])
    _, err = capfd.readouterr()
    assert done.value.code == code
    assert word in err
    assert "Traceback" not in err


@pytest.mark.timeout(200)
def test_killed_ten_times_while_everything_goes_wrong(tmp_path: Path) -> None:
    ffmpeg = shutil.which("ffmpeg") is not None
    found = kills(tmp_path, count=10, pictures=10, longest=1.5, full=False, ffmpeg=ffmpeg)
    assert (found["lost"], found["doubled"], found["broken"], found["files_without_caption"]) == (0, 0, 0, 0), found
    assert found["exit_code_after_sigterm"] == 0
    assert found["captions"] > 100
    assert found["frames_seen"] > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_flat_over_five_thousand_captions(tmp_path: Path, bundle: Path) -> None:
    found = soak(tmp_path, 5000, bundle)
    assert found["exit_code"] == 0
    assert found["captions_that_count"] == 5000
    assert abs(found["bytes_per_caption"]) < 100, found
