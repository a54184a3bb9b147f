"""The caption appliance under faults: cameras that misbehave, kill -9 at random moments, a full disk, a jumping clock.

    python tests/camera_faults.py kills --kills 200     # half an hour; --kills 10 is what the suite runs
    python tests/camera_faults.py soak --captions 5000  # resident memory of the real engine over so many captions

The appliance runs in a process of its own, which says of every line when it is on the disk. Prints one JSON document;
exit code 1 if a line was lost, doubled or broken. `--ffmpeg` adds a camera that the system's ffmpeg serves, killed and
started again at random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from camera_server import FAULTS, Camera, draw, read_number, write_clip

ROOT = Path(__file__).parent.parent
Document = dict[str, Any]

# -- the process that captions ---------------------------------------------------------------------------------------


def child(config: Document) -> None:
    """Run the appliance as `config` says; each line on the disk is one line on stdout."""
    from edgevl.camera.appliance import Appliance, Settings
    from edgevl.camera.backoff import Backoff
    from edgevl.camera.captioner import Caption, Captioner, EngineCaptioner
    from edgevl.camera.capture import Capture
    from edgevl.camera.files import Done, FileJob
    from edgevl.camera.ledger import Ledger
    from edgevl.camera.source import parse_live
    from edgevl.image import Picture
    from edgevl.journal import Journal
    from edgevl.machine import resident_bytes
    from edgevl.segments import Retention

    rng = random.Random(config["seed"])
    paths = [Path(p) for p in config["files"]]
    settings = Settings(every=config["every"], change=0, stale=1.0, jpeg=config["jpeg"], retry=0.2, heartbeat=5)
    jump = [0.0]

    class Acknowledging(Journal):
        def append(self, line: dict[str, Any], jpeg: bytes | None = None) -> int:
            number = super().append(line, jpeg)
            frames = sum(capture.frames for capture in captures)
            os.write(1, f"{number} {int('caption' in line)} {frames} {resident_bytes()}\n".encode())
            if appliance[0].captions + job.written >= config["captions"]:
                appliance[0].stop()
            if config["clock"] and rng.random() < 0.02:
                jump[0] += rng.uniform(-1e6, 1e6)
            return number

    class Stub:
        model, prompt, schema = "stub", "Which number?", None

        def caption(self, picture: Picture, alive: Callable[[], None]) -> Caption:
            time.sleep(rng.uniform(0, 0.02))
            return Caption(str(read_number(picture.pixels)))

    if config["fake_full"]:  # where no small disk can be mounted: writing fails while that file is there
        write = os.write

        def failing(handle: int, data: bytes) -> int:
            if handle > 2 and Path(config["fake_full"]).exists():
                write(handle, data[: rng.randrange(len(data))])
                raise OSError(28, "No space left on device")
            return write(handle, data)

        os.write = failing
    sources = [parse_live(f"{name}={url}") for name, url in config["sources"].items()]
    captures = [Capture(s, 1.0, backoff=Backoff(0.05, 0.3, 1.0)) for s in sources if s is not None]
    done = Done(paths)
    with Acknowledging(config["journal"], Retention(**config["retention"]), done.see) as journal:
        captioner: Captioner = Stub()
        if config["bundle"]:
            from edgevl.engine import Engine

            captioner = EngineCaptioner(Engine.open(config["bundle"], threads=1), "What?", 8)
        appliance = [Appliance(captures, captioner, journal, settings, wall=lambda: time.time() + jump[0])]
        journal_path = Path(config["journal"])
        done.keep(Ledger(journal_path.with_name(f"{journal_path.name}.done"), fresh=journal.following == 1))
        job = FileJob(captioner, appliance[0], settings, done)
        signal.signal(signal.SIGTERM, lambda *_: appliance[0].stop())
        appliance[0].run(job.run(paths))


# -- the journal as a reader finds it --------------------------------------------------------------------------------


class Findings:
    """Every line that was ever found on the disk, by its number."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.lines: dict[int, Document] = {}
        self.broken = self.doubled = self.torn = 0

    def look(self) -> int:
        """Read all files as they lie there; the number of the last whole line."""
        stem, suffix = self.journal.stem, self.journal.suffix
        files = [*sorted(self.journal.parent.glob(f"{stem}.*{suffix}")), self.journal]
        numbers: list[int] = []
        for file in files:
            if not file.exists():
                continue
            *whole, tail = file.read_bytes().split(b"\n")
            self.torn += bool(tail)
            for data in whole:
                try:
                    line = json.loads(data)
                except ValueError:
                    self.broken += 1
                    continue
                numbers.append(line["sequence"])
                before = self.lines.setdefault(line["sequence"], line)
                self.doubled += before != line
        self.doubled += len(numbers) - len(set(numbers))
        self.broken += numbers != sorted(numbers)
        return max(numbers, default=0)


def count_twice(lines: dict[int, Document], starts: list[int]) -> tuple[int, int]:
    """How many frames of a camera have two captions, and how many files."""
    frames: Counter[tuple[object, ...]] = Counter()
    files: Counter[tuple[object, ...]] = Counter()

    for number, line in lines.items():
        if "caption" not in line:
            continue
        frame = line["frame"]
        if "number" in frame:
            run = sum(start <= number for start in starts)
            frames[(run, line["source"], frame["number"])] += 1
        else:
            files[(line["source"], frame["sha256"], frame.get("position"))] += 1
    return sum(n - 1 for n in frames.values()), sum(n - 1 for n in files.values())


# -- the run ---------------------------------------------------------------------------------------------------------


def make_files(folder: Path, pictures: int) -> list[Path]:
    """Pictures and a clip, each to be captioned once whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.png" for i in range(pictures)]
    for i, path in enumerate(paths):
        Image.fromarray(draw(900_000 + i)).save(path)
    write_clip(folder / "clip.mp4", frames=100, rate=10)
    return [*paths, folder / "clip.mp4"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[str]:
    """A tmpfs on `folder` where that is permitted; gives "tmpfs" or "simulated"."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        yield "simulated"
        return
    try:
        yield "tmpfs"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\xff" * 4096)


def torment(cameras: list[Camera], rng: random.Random, ended: threading.Event) -> None:
    """One fault after the other, of whichever camera."""
    while not ended.wait(rng.uniform(0.2, 1.0)):
        camera = rng.choice(cameras)
        camera.fault = rng.choice(FAULTS)
        ended.wait(rng.uniform(0.1, 1.5))
        camera.fault = ""


@contextlib.contextmanager
def looping_ffmpeg(clip: Path, rng: random.Random) -> Iterator[str]:
    """The system's ffmpeg looping a clip over HTTP, killed and started again at random; gives its URL."""
    tool, ended, port = shutil.which("ffmpeg"), threading.Event(), rng.randrange(20000, 30000)
    assert tool is not None, "--ffmpeg needs ffmpeg"
    url = f"http://127.0.0.1:{port}/loop.ts"
    show = ["-re", "-stream_loop", "-1", "-i", str(clip), "-c:v", "mpeg2video", "-f", "mpegts", "-listen", "1", url]

    def serve() -> None:
        while not ended.is_set():
            process = subprocess.Popen([tool, "-loglevel", "quiet", *show], stdin=subprocess.DEVNULL)
            until = time.monotonic() + rng.uniform(3, 20)
            while process.poll() is None and time.monotonic() < until and not ended.wait(0.1):
                pass
            process.kill()
            process.wait()
            ended.wait(0.2)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield url
    finally:
        ended.set()
        thread.join()


class Run:
    """One child after the other over the same journal."""

    def __init__(self, config: Document) -> None:
        self.config = config
        self.acknowledged: set[int] = set()
        self.frames = 0
        self.resident: list[int] = []
        self.heard = threading.Event()  # something of the present child

    def start(self, seed: int) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        """Start a child, and a thread that reads what it says until it ends."""
        config = json.dumps({**self.config, "seed": seed})
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        self.heard.clear()
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "child", config],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "--debug" not in sys.argv else None,
        )
        thread = threading.Thread(target=self._listen, args=(process,))
        thread.start()
        return process, thread

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        frames = 0
        with process.stdout as stream:
            for said in stream:
                if said.endswith(b"\n"):
                    number, captioned, frames, resident = map(int, said.split())
                    self.acknowledged.add(number)
                    self.heard.set()
                    if captioned:
                        self.resident.append(resident)
        self.frames += frames


def config_of(journal: Path, **more: Any) -> Document:
    """What a child is told, with defaults."""
    base = {"journal": str(journal), "sources": {}, "files": [], "bundle": "", "every": 0.02, "jpeg": False}
    return {**base, "clock": False, "captions": 10**9, "fake_full": "", "retention": {}, **more}


def kills(
    folder: Path,
    count: int,
    seed: int = 0,
    pictures: int = 30,
    longest: float = 3.0,
    full: bool = True,
    ffmpeg: bool = False,
    minutes: float = 60.0,
) -> Document:
    """Kill the appliance `count` times while everything else goes wrong; what was lost, doubled and broken.

    A child lives at most `longest` seconds after its first line. After `minutes` there are no more kills.
    """
    rng, ended = random.Random(seed), threading.Event()
    files = make_files(folder / "files", pictures)
    with contextlib.ExitStack() as stack:
        disk = folder / "disk"
        how = stack.enter_context(small_disk(disk, "8m")) if full else "not filled"
        disk.mkdir(exist_ok=True)
        cameras = [stack.enter_context(Camera(25, seed=seed + i)) for i in range(3)]
        sources = {f"camera{i}": camera.url for i, camera in enumerate(cameras)}
        if ffmpeg:
            sources["ffmpeg"] = stack.enter_context(looping_ffmpeg(files[-1], rng))
        run = Run(
            config_of(
                disk / "out.jsonl",
                sources=sources,
                files=[str(f) for f in files],
                jpeg=True,
                clock=True,
                fake_full=str(disk / "full") if how == "simulated" else "",
                retention={"segment_bytes": 200_000, "keep_bytes": 4_000_000, "floor_bytes": 50_000},
            )
        )
        findings, starts, started = Findings(disk / "out.jsonl"), [], time.monotonic()
        thread = threading.Thread(target=torment, args=(cameras, random.Random(seed), ended))
        thread.start()
        exit_code, fills = None, 0
        try:
            for i in range(count + 1):
                last = i == count or time.monotonic() - started > 60 * minutes
                starts.append(findings.look() + 1)
                process, listener = run.start(seed * 100_000 + i)
                if rng.random() < 0.75 or last:
                    run.heard.wait(30)
                time.sleep(rng.uniform(0.05, longest))
                if full and rng.random() < 0.1:
                    fills += 1
                    if how == "tmpfs":
                        fill(disk / "full")
                    else:
                        (disk / "full").touch()
                    time.sleep(1)
                    (disk / "full").unlink()
                if last:
                    wait_for_files(findings, files, 60)
                    process.terminate()
                    exit_code = process.wait(30)
                else:
                    process.kill()
                    process.wait()
                listener.join()
                if last:
                    break
        finally:
            ended.set()
            thread.join()
        findings.look()
        return report(run, findings, starts, files, time.monotonic() - started) | {
            "kills": len(starts) - 1,
            "exit_code_after_sigterm": exit_code,
            "full_disk": how,
            "times_full": fills,
        }


def captioned_files(findings: Findings) -> set[str]:
    """The files that have a caption."""
    return {line["source"] for line in findings.lines.values() if "caption" in line and "number" not in line["frame"]}


def wait_for_files(findings: Findings, files: list[Path], seconds: float) -> None:
    """Give the last child time for all files."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not {str(f) for f in files} <= captioned_files(findings):
        time.sleep(0.2)
        findings.look()


def report(run: Run, findings: Findings, starts: list[int], files: list[Path], seconds: float) -> Document:
    """Counts of what happened."""
    lines = findings.lines
    frames_twice, files_twice = count_twice(lines, starts)
    gaps = set(range(min(lines, default=1), max(lines, default=0) + 1)) - set(lines)
    events = Counter(line["event"] for line in lines.values() if "event" in line)
    jpegs = {p.name for p in (findings.journal.parent / "out.frames").glob("*/*.jpg")}
    return {
        "seconds": round(seconds),
        "frames_seen": run.frames,
        "lines": len(lines),
        "captions": sum("caption" in line for line in lines.values()),
        "captions_by_camera": dict(
            Counter(line["source"] for line in lines.values() if "caption" in line and "number" in line["frame"])
        ),
        "events": dict(events),
        "acknowledged": len(run.acknowledged),
        "torn_tails": findings.torn,
        "lost": len((run.acknowledged | gaps) - set(lines)),
        "files_without_caption": len({str(f) for f in files} - captioned_files(findings)),
        "doubled": findings.doubled + frames_twice + files_twice,
        "doubled_lines_frames_files": [findings.doubled, frames_twice, files_twice],
        "broken": findings.broken,
        "pictures_kept": len(jpegs),
    }


def soak(folder: Path, captions: int, bundle: Path, cameras: int = 4) -> Document:
    """Caption healthy cameras with the real engine; how resident memory went over so many captions.

    As many captions and half as many again, of which the first third does not count: by then FFmpeg has written once to
    all of the buffer that it keeps for each source (`probesize`, 1 MB, which a test camera fills in 20 s).
    """
    with contextlib.ExitStack() as stack:
        served = [stack.enter_context(Camera(25, seed=i)) for i in range(cameras)]
        sources = {f"camera{i}": camera.url for i, camera in enumerate(served)}
        retention = {"segment_bytes": 200_000, "keep_bytes": 1_000_000}
        more = {"sources": sources, "bundle": str(bundle), "retention": retention, "every": 0.01}
        more["captions"] = captions + captions // 2
        run = Run(config_of(folder / "out.jsonl", **more))
        started = time.monotonic()
        process, listener = run.start(0)
        code = process.wait()
        listener.join()
    values = np.array(run.resident, np.float64)
    kept = values[-captions:]
    slope = float(np.polyfit(np.arange(len(kept)), kept, 1)[0]) if len(kept) > 1 else 0.0
    marks = [int(values[min(len(values) - 1, round(f * (len(values) - 1)))]) for f in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return {
        "captions": len(values),
        "captions_that_count": len(kept),
        "seconds": round(time.monotonic() - started),
        "frames_seen": run.frames,
        "exit_code": code,
        "resident_bytes_at_0_20_40_60_80_100_percent": marks,
        "bytes_per_caption": round(slope, 1),
    }


def tiny_bundle(folder: Path) -> Path:
    """A random model in the layout of the real one."""
    from checkpoints import tiny_vl
    from deploy.build import BuildSettings, build

    tiny_vl(folder / "model")
    build(str(folder / "model"), folder / "bundle", BuildSettings(context=384))
    return folder / "bundle"


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["child"]:
        child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("kills", "soak"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--captions", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more kills after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="default: a tiny random one")
    parser.add_argument("--ffmpeg", action="store_true")
    parser.add_argument("--debug", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "kills":
            found = kills(folder, given.kills, given.seed, ffmpeg=given.ffmpeg, minutes=given.minutes)
        else:
            found = soak(folder, given.captions, given.bundle or tiny_bundle(folder))
    print(json.dumps(found, indent=1))
    if any(found.get(key) for key in ("lost", "doubled", "broken", "files_without_caption")):
        sys.exit(1)


if __name__ == "__main__":
    main()
