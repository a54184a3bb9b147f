"""The appliance's loop on captures that the test feeds: what is captioned, what is not, and what the journal says."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from camera_faults import fill, small_disk
from camera_server import draw, read_number, write_clip
from edgevl.camera import appliance as module
from edgevl.camera import files
from edgevl.camera.appliance import Appliance, Settings
from edgevl.camera.captioner import Caption
from edgevl.camera.capture import Capture, Event, Shot
from edgevl.camera.files import Done, FileJob
from edgevl.camera.source import Source
from edgevl.errors import EdgevlError, UsageError
from edgevl.image import Picture
from edgevl.journal import Journal
from edgevl.segments import Retention


class Stub:
    """Captions a frame by the number that is drawn in it."""

    model, prompt, schema = "stub", "Which number?", None

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[int | None] = []
        self.seconds = seconds
        self.busy = threading.Event()

    def caption(self, picture: Picture, alive: Callable[[], None]) -> Caption:
        self.busy.set()
        time.sleep(self.seconds)
        self.asked.append(read_number(picture.pixels))
        return Caption(str(self.asked[-1]))


class Fed(Capture):
    """A capture that shows what it is given."""

    def __init__(self, name: str = "cam") -> None:
        super().__init__(Source(name, "v4l2", "/dev/video0"))

    def start(self) -> None: ...

    def join(self, seconds: float) -> bool:
        return True

    def show(self, number: int, age: float = 0.0, size: tuple[int, int] = (160, 96)) -> None:
        self.frames += 1
        frame = av.VideoFrame.from_ndarray(draw(number, size), format="rgb24")
        self._latest = Shot(frame, self.frames, time.monotonic() - age)


@contextmanager
def running(appliance: Appliance, background: Iterator[int] | None = None) -> Iterator[threading.Thread]:
    """The loop in a thread; stopped at the end of the block."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            appliance.run(background)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        appliance.stop()
        thread.join(10)
    if failed:
        raise failed[0]


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_the_newest_frame_wins_and_none_is_captioned_twice(path: Path) -> None:
    camera, stub = Fed(), Stub(0.1)
    with Journal(path) as journal, running(Appliance([camera], stub, journal, Settings(every=0.01, change=0))):
        for number in range(1, 61):
            camera.show(number)
            time.sleep(0.01)
        wait_until(lambda: stub.asked[-1:] == [60])
        time.sleep(0.1)
    lines = read(path)
    assert 3 < len(lines) < 12  # a queue would have made sixty
    assert [line["caption"] for line in lines] == [str(n) for n in sorted(set(filter(None, stub.asked)))]
    for line in lines:
        assert int(line["caption"]) == line["frame"]["number"]
    assert sum(line["frame"]["skipped"] + 1 for line in lines) == 60


def test_an_unchanged_scene_costs_no_run_and_is_told_at_heartbeats(path: Path) -> None:
    camera, stub = Fed(), Stub()
    appliance = Appliance([camera], stub, Journal(path), Settings(every=0.005, change=4.0, heartbeat=0.1))
    with running(appliance):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            camera.show(7)
            time.sleep(0.005)
        camera.show(8)
        wait_until(lambda: len(stub.asked) == 2)
    assert stub.asked == [7, 8]
    first, *still, last = read(path)
    assert (first["caption"], last["caption"]) == ("7", "8")
    assert 2 <= len(still) <= 5
    for line in still:
        assert (line["unchanged_since"], line["caption_sequence"]) == (first["time"], first["sequence"])
        assert "caption" not in line
    assert appliance.unchanged > 10
    assert last["frame"]["change"] >= 4.0


def test_a_stale_frame_is_marked_once_and_not_captioned(path: Path) -> None:
    camera, stub = Fed(), Stub()
    with Journal(path) as journal, running(Appliance([camera], stub, journal, Settings(every=0.01, stale=0.2))):
        camera.show(1)
        wait_until(lambda: path.read_text().count('"stale"') == 1)
        camera.show(2, age=5.0)  # it came while the model was busy, and then nothing more
        time.sleep(0.1)
        camera.show(3)
        wait_until(lambda: 3 in stub.asked)
        wait_until(lambda: path.read_text().count('"stale"') == 2)
    assert stub.asked == [1, 3]
    assert [line.get("event", line.get("caption")) for line in read(path)] == ["1", "stale", "3", "stale"]


def test_a_silent_source_stalls_no_other(path: Path) -> None:
    class Hanging(Capture):
        """A driver that never returns."""

        def _run(self) -> None:
            threading.Event().wait(4)

    hanging, camera, stub = Hanging(Source("dead", "v4l2", "/dev/video1")), Fed(), Stub()
    with Journal(path) as journal, running(Appliance([hanging, camera], stub, journal, Settings(every=0.01, change=0))):
        for number in range(1, 21):
            camera.show(number)
            wait_until(lambda number=number: number in stub.asked)  # type: ignore[misc]
    assert {line["source"] for line in read(path)} == {"cam"}


def test_sources_take_turns_while_the_model_is_slow(path: Path) -> None:
    cameras, stub = [Fed(f"cam{i}") for i in range(3)], Stub(0.02)
    with Journal(path) as journal, running(Appliance([*cameras], stub, journal, Settings(every=0.001, change=0))):
        for number in range(2000):
            for camera in cameras:
                camera.show(number)
            time.sleep(0.01)
            if len(stub.asked) >= 12:
                break
    counts = [sum(line["source"] == c.source.name for line in read(path)) for c in cameras]
    assert min(counts) >= 3
    assert max(counts) - min(counts) <= 1


def test_what_happens_to_a_source_is_in_the_journal(path: Path) -> None:
    camera = Fed()
    camera._events.extend([Event("connected", ""), Event("lost", "it ended")])
    camera.show(1, size=(16, 16))  # no model takes that
    with Journal(path) as journal, running(Appliance([camera], Stub(), journal, Settings(every=0.01))):
        for _ in range(20):
            camera.show(1, size=(16, 16))
            time.sleep(0.01)
    events = [(line["source"], line["event"]) for line in read(path)]
    assert events == [("cam", "connected"), ("cam", "lost"), ("cam", "refused")]


def test_pixels_that_no_model_takes_end_neither_cameras_nor_files(path: Path, tmp_path: Path) -> None:
    clip = tmp_path / "a.mkv"
    with av.open(str(clip), "w", format="nut") as container:
        stream = container.add_stream("rawvideo", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgr4"
        for i in range(3):
            odd = av.VideoFrame(64, 64, "bgr4")
            odd.pts = i
            container.mux(stream.encode(odd))
    Image.fromarray(draw(7)).save(tmp_path / "b.png")
    camera, stub, paths = Fed(), Stub(), [clip, tmp_path / "b.png"]
    camera._latest = Shot(av.VideoFrame(64, 64, "bgr4"), 1, time.monotonic())
    settings = Settings(every=0.01)
    with Journal(path) as journal:
        job = FileJob(stub, journal, settings, Done(paths))
        with running(Appliance([camera], stub, journal, settings), job.run(paths)):
            wait_until(lambda: job.written == 1 and '"refused"' in path.read_text())
            camera.frames = 1
            camera.show(8)
            wait_until(lambda: 8 in stub.asked)
    assert job.failed == 1
    assert sorted(filter(None, stub.asked)) == [7, 8]


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ('{"x": 1e999}', "too large a number"),
        ('{"x": -Infinity}', "too large a number"),
        ('{"x": NaN}', "too large a number"),
        ('{"x": ' + "1" * 5000 + "}", "digits"),
        ("[" * 101 + "]" * 101, "100 deep"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
    ],
)
def test_a_document_that_cannot_be_kept_is_refused(path: Path, document: str, word: str) -> None:
    class Writes(Stub):
        def caption(self, picture: Picture, alive: Callable[[], None]) -> Caption:
            super().caption(picture, alive)
            return Caption(document if len(self.asked) == 1 else '{"x": 1.5}', is_json=True)

    camera, stub = Fed(), Writes()
    with Journal(path) as journal, running(Appliance([camera], stub, journal, Settings(every=0.01, change=0))):
        camera.show(1)
        wait_until(lambda: "refused" in path.read_text())
        camera.show(2)
        wait_until(lambda: "fields" in path.read_text())
    refused, kept = read(path)
    assert word in refused["detail"]
    assert kept["fields"] == {"x": 1.5}


def test_events_tell_their_age(path: Path) -> None:
    camera = Fed()
    camera._events.append(Event("lost", "it ended", time.monotonic() - 100))
    with Journal(path) as journal, running(Appliance([camera], Stub(), journal, Settings(every=0.01))):
        wait_until(lambda: "lost" in path.read_text())
    assert read(path)[0]["age"] >= 100


def hot_zone(root: Path) -> Path:
    """A thermal zone of 91 degrees below `root`."""
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal")
    (zone / "temp").write_text("91000")
    return zone


def test_heat_that_came_while_the_disk_was_full_is_told_afterwards(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAT_SECONDS", 0.0)
    hot_zone(tmp_path)
    appliance = Appliance([], Stub(), Journal(path), Settings(max_celsius=85, root=tmp_path))
    for _ in range(9):
        appliance._look_after(journal=False)
    appliance._look_after()
    assert [(line["event"], line["spacing"]) for line in read(path)] == [("hot", 2.0)]


def test_a_status_that_cannot_be_written_is_said_once(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = iter(["MAXN", "15W", "15W"])
    monkeypatch.setattr(module, "power_mode", lambda: next(modes))
    monkeypatch.setattr(module, "_MODE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_STATUS_SECONDS", 0.0)
    appliance = Appliance([], Stub(), Journal(path), Settings(status=tmp_path / "none" / "status.json"))
    appliance._look_after()
    assert appliance.document["power_mode"] == "MAXN"
    appliance._look_after()
    assert appliance.document["power_mode"] == "15W"
    assert capsys.readouterr().err.count("cannot be written (No such file or directory)") == 1
    (tmp_path / "none").mkdir()
    appliance._look_after()
    assert (tmp_path / "none" / "status.json").exists()


def test_a_long_video_between_two_looks_keeps_nobody_waiting(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_STEP_SECONDS", 0.0)
    clip = tmp_path / "clip.mp4"
    write_clip(clip, frames=30)
    with Journal(path) as journal:
        job = FileJob(Stub(), journal, Settings(every=600.0), Done([clip]))
        assert len([*job.run([clip])]) == 31  # every frame, and the end
    assert len(read(path)) == 1


def test_a_stop_finishes_the_caption_in_hand(path: Path) -> None:
    camera, stub = Fed(), Stub(0.3)
    camera.show(1)
    appliance = Appliance([camera], stub, Journal(path), Settings(every=0.01))
    with running(appliance):
        assert stub.busy.wait(5)
        appliance.stop()
    assert [line["caption"] for line in read(path)] == ["1"]


def test_heat_spaces_captions_out_and_the_journal_says_so(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEAT_SECONDS", 0.05)
    zone = hot_zone(tmp_path)
    camera, stub = Fed(), Stub()
    settings = Settings(every=0.05, change=0, max_celsius=85, root=tmp_path)
    appliance = Appliance([camera], stub, Journal(path), settings)
    with running(appliance):
        wait_until(lambda: '"spacing": 16.0' in path.read_text())
        camera.show(1)
        wait_until(lambda: 1 in stub.asked)
        (zone / "temp").write_text("60000")
        wait_until(lambda: '"spacing": 1.0' in path.read_text())
    lines = read(path)
    events = [(line["event"], line["spacing"], line["celsius"]) for line in lines if "event" in line]
    assert events == [
        *(("hot", f, 91.0) for f in (2.0, 4.0, 8.0, 16.0)),
        *(("hot", f, 60.0) for f in (8.0, 4.0, 2.0)),
        ("cool", 1.0, 60.0),
    ]
    assert [line["spacing"] for line in lines if "caption" in line] == [16.0]


def test_a_clock_that_is_set_is_told_and_order_is_kept(path: Path) -> None:
    camera, stub, now = Fed(), Stub(), [0.0]
    appliance = Appliance(
        [camera], stub, Journal(path), Settings(every=0.01, change=0), wall=lambda: time.time() + now[0]
    )
    with running(appliance):
        for number, jump in enumerate((0, -86400.0, 3600.0), 1):
            now[0] += jump
            camera.show(number)
            wait_until(lambda number=number: number in stub.asked)  # type: ignore[misc]
    lines = read(path)
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    said = [line["detail"] for line in lines if line.get("event") == "clock"]
    assert [text.split()[-2] for text in said] == ["-86400.0", "+3600.0"]
    assert [line["caption"] for line in lines if "caption" in line] == ["1", "2", "3"]


def test_a_full_disk_holds_the_line_until_there_is_room(tmp_path: Path) -> None:
    """On a tmpfs of 64 kB where one may be mounted, else with writes that fail."""
    camera, stub, disk = Fed(), Stub(), tmp_path / "disk"
    with small_disk(disk, "64k") as how, pytest.MonkeyPatch.context() as patch:
        path = disk / "out.jsonl"
        with Journal(path, Retention(segment_bytes=10**6)) as journal:
            settings = Settings(every=0.01, change=0, retry=0.02, status=tmp_path / "status.json")
            appliance = Appliance([camera], stub, journal, settings)
            with running(appliance) as thread:
                camera.show(1)
                wait_until(lambda: len(stub.asked) == 1)
                if how == "tmpfs":
                    fill(disk / "full")
                else:
                    write = os.write
                    patch.setattr(os, "write", lambda h, d: refuse(h, d, write, journal._file))
                number = 1
                while not appliance._problem:  # what is left of a block takes some lines
                    number += 1
                    camera.show(number)
                    time.sleep(0.01)
                asked = len(stub.asked)
                camera.show(99)
                time.sleep(0.2)
                assert thread.is_alive()
                assert len(stub.asked) == asked, "captions go on although they cannot be written"
                if how == "tmpfs":
                    (disk / "full").unlink()
                else:
                    patch.undo()
                wait_until(lambda: stub.asked[-1] == 99)
        lines = read(path)
        assert [line["caption"] for line in lines] == [str(n) for n in stub.asked]
        assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))


def refuse(handle: int, data: bytes, write: Callable[[int, bytes], int], journal: int) -> int:
    if handle == journal:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(handle, data)


def test_a_stop_on_a_full_disk_says_that_a_line_is_missing(path: Path) -> None:
    class Full:
        def append(self, line: dict[str, Any], jpeg: bytes | None = None) -> int:
            raise EdgevlError("no room")

    camera, stub = Fed(), Stub()
    camera.show(1)
    appliance = Appliance([camera], stub, Full(), Settings(every=0.01, retry=0.05))
    timer = threading.Timer(0.3, appliance.stop)
    timer.start()
    with pytest.raises(EdgevlError, match="no room"):
        appliance.run()
    timer.join()
    assert stub.asked == [1]


def test_jpegs_lie_beside_the_journal(path: Path) -> None:
    camera, stub = Fed(), Stub()
    with Journal(path) as journal:
        with running(Appliance([camera], stub, journal, Settings(every=0.01, jpeg=True))):
            camera.show(5)
            wait_until(lambda: stub.asked == [5])
        (line,) = read(path)
    with Image.open(path.parent / line["jpeg"]) as image:
        assert read_number(image) == 5


def test_files_are_captioned_while_no_camera_is_due(path: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", frames=40, rate=10, hold=10)
    camera, stub = Fed(), Stub()
    paths = [tmp_path / "clip.mp4", tmp_path / "none.png"]
    settings = Settings(every=0.5, change=4.0)
    with Journal(path) as journal:
        job = FileJob(stub, journal, settings, Done(paths))
        appliance = Appliance([camera], stub, journal, settings)
        with running(appliance, job.run(paths)):
            camera.show(77)
            wait_until(lambda: job.failed == 1 and 77 in stub.asked)
    assert sorted(filter(None, stub.asked)) == [1, 2, 3, 77]  # eight looks at the clip, four scenes
    assert job.written == 4
    again = Done(paths)
    with Journal(path, seen=again.see) as journal:
        job = FileJob(stub, journal, settings, again)
        assert list(job.run(paths))[-1] == 2
    assert (job.written, job.skipped) == (0, 4)
    positions = [line["frame"]["position"] for line in read(path) if "position" in line.get("frame", {})]
    assert positions == [0.0, 1.0, 2.0, 3.0]


def test_still_parts_of_a_video_are_told_at_heartbeats_of_its_own_time(path: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, frames=100, rate=10, hold=100)
    with Journal(path) as journal:
        job = FileJob(Stub(), journal, Settings(every=0.5, heartbeat=4.0), Done([clip]))
        for _ in job.run([clip]):
            pass
    first, *still = read(path)
    assert first["frame"]["position"] == 0.0
    assert [(line["unchanged_since"], line["frame"]["position"]) for line in still] == [(0.0, 4.0), (0.0, 8.0)]


def test_the_status_of_everything(path: Path, tmp_path: Path) -> None:
    camera = Fed()
    camera.show(3)
    settings = Settings(every=0.01, status=tmp_path / "status.json")
    with Journal(path) as journal, running(Appliance([camera], Stub(), journal, settings)):
        wait_until(lambda: path.read_text().count("\n") == 1)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["captions"], status["journal"]["sequence"]) == ("stopped", 1, 1)
    assert status["sources"][0]["name"] == "cam"
    assert status["resident_bytes"] > 1_000_000


@pytest.mark.parametrize(
    ("bad", "word"), [({"every": 0.0}, "--every"), ({"change": 101.0}, "--change"), ({"stale": -1.0}, "--stale")]
)
def test_settings_that_make_no_sense(bad: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Settings(**bad)  # type: ignore[arg-type]
