"""A camera for tests: MPEG-TS over HTTP on loopback, each frame with its number drawn in it, and faults on request.

The number grows with the time since the server began, so that no two frames that are shown apart have the same one,
over reconnects too. `Camera.fault` is what it does wrong: "cut" (says goodbye), "freeze" (says nothing), "garbage"
(random bytes), "corrupt" (damages packets), "refuse" (answers 503), "resize" (other pixels), or "" for nothing.
"""

from __future__ import annotations

import io
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS, CELL = 20, 16
FAULTS = ("cut", "freeze", "garbage", "corrupt", "refuse", "resize")
SIZE, OTHER_SIZE = (160, 96), (192, 112)  # width, height


def draw(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """RGB pixels (height, width, 3): a number in two rows of cells, its complement in two more, on a noisy ground."""
    width, height = size
    random = np.random.default_rng(number)
    pixels = random.integers(0, 40, (height, width, 3), np.uint8)
    pixels += random.integers(20, 200, 3, np.uint8)
    for i in range(BITS):
        on = number >> i & 1
        for row, value in ((i // 10, on), (2 + i // 10, 1 - on)):
            x = i % 10 * CELL
            pixels[row * CELL : (row + 1) * CELL, x : x + CELL] = 235 * value + 10
    return pixels


def read_number(image: Image.Image) -> int | None:
    """The number that was drawn, or None where it cannot be trusted."""
    pixels = np.asarray(image.convert("L")).astype(np.float32)
    number = 0
    for i in range(BITS):
        x = i % 10 * CELL + 4
        on, off = (pixels[r * CELL + 4 : r * CELL + 12, x : x + 8].mean() for r in (i // 10, 2 + i // 10))
        if abs(on - off) < 100:
            return None
        number |= int(on > off) << i
    return number


def write_clip(path: Path, frames: int, rate: int = 10, hold: int = 1, size: tuple[int, int] = SIZE) -> None:
    """A video file of numbered frames; each number is shown `hold` frames long."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(i // hold, size), format="rgb24")))
        container.mux(stream.encode())


class Camera:
    """A server with one stream; use it as a context."""

    def __init__(self, rate: int = 25, hold: int = 1, seed: int = 0, first: int = 0) -> None:
        """`rate` frames a second; a number is shown for `hold` frames; `first` is the first number."""
        self.rate, self.hold, self.first, self.fault = rate, hold, first, ""
        self.random = random.Random(seed)
        self.connections = 0
        self._begun = time.monotonic()
        self._ended = threading.Event()
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.connections += 1
                if camera.fault == "refuse":
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "video/mp2t")
                self.end_headers()
                try:
                    camera._stream(self.wfile)
                except OSError:
                    self.close_connection = True  # the reader has gone

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/live.ts"

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _stream(self, out: Any) -> None:
        """Send one size of picture after the other until the connection ends."""
        while not self._ended.is_set():
            size = OTHER_SIZE if self.fault == "resize" else SIZE
            buffer = io.BytesIO()
            options = {"mpegts_flags": "resend_headers", "flush_packets": "1"}
            with av.open(_Unseekable(buffer), "w", format="mpegts", options=options) as container:
                stream = container.add_stream("mpeg2video", rate=25)
                stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
                stream.bit_rate, stream.gop_size = 1_500_000, 5
                stream.codec_context.max_b_frames = 0
                while (OTHER_SIZE if self.fault == "resize" else SIZE) == size:
                    if self.fault in ("cut", "refuse") or self._ended.wait(1 / self.rate):
                        return
                    if self.fault == "freeze":
                        continue
                    if self.fault == "garbage":
                        out.write(self.random.randbytes(2000))
                        continue
                    number = self.first + int((time.monotonic() - self._begun) * self.rate) // self.hold
                    picture = av.VideoFrame.from_ndarray(draw(number % 2**BITS, size), format="rgb24")
                    container.mux(stream.encode(picture))
                    data = bytearray(buffer.getvalue())
                    buffer.seek(0)
                    buffer.truncate()
                    if self.fault == "corrupt":
                        for _ in range(len(data) // 100):
                            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
                    out.write(bytes(data))


class _Unseekable:
    """What a container is written to: a socket cannot be sought in."""

    def __init__(self, buffer: io.BytesIO) -> None:
        self.write = buffer.write
