"""A video file as frames for the model: spread evenly over the clip, one tile each, upright.

The frames are chosen by when they are shown, read from the file's packets; with a steady rate these are the frames
floor(linspace(0, N - 1, F)) that the model was trained with. Knows nothing of tokens. Called by `edgevl chat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevl.camera.reader import decode_file, frame_places, load_av, to_image
from edgevl.config import TilingConfig
from edgevl.errors import ImageError, UsageError
from edgevl.image import cut_tiles, load_image
from edgevl.tiling import Tiling
from edgevl.view import Video, make_video

if TYPE_CHECKING:
    from av import VideoFrame

Tile = NDArray[np.uint8]  # (side, side, 3)

_SHORT = 3000  # frames; such a clip is decoded whole
_KEYS_A_FRAME = 4  # a longer one only at its key frames, where there are so many for each frame that is wanted
_SQUASHED = TilingConfig(max_tiles=1, thumbnail=False, rule="native")


def load_video(path: Path, count: int, side: int) -> Video:
    """At most `count` frames of a clip, each squashed to `side` x `side` pixels.

    Rotation flags are obeyed. Times are the file's own, so a variable frame rate is read as it is shown. The first and
    the last frame that can be decoded are among the result, which has no frame twice. Raises `UsageError` for a file
    that is no video, has only sound, or no frame that can be decoded; `MissingExtraError` without PyAV.
    """
    assert count > 0
    check_file(path)
    places, keys, unit = frame_places(str(path))
    tries = [(places, False)]
    if len(places) > _SHORT and len(keys) >= _KEYS_A_FRAME * count:
        tries.insert(0, (keys, True))
    frames: list[Tile] = []
    problem = ""
    wanted: list[int] = []
    for among, only_keys in tries:
        wanted = _spread(among, count)
        for frame in _frames_at(str(path), among, wanted, only_keys):
            try:
                frames.append(_squash(frame, side))
            except ImageError as error:
                problem = f" ({error})"
        if frames:
            break
    if not frames:
        raise UsageError(f"{path} has no frame that can be shown{problem}; give a whole video")
    notes: tuple[str, ...] = ()
    if len(frames) < len(wanted):
        notes = (f"{path.name} is damaged: {len(frames)} of {len(wanted)} frames could be decoded",)
    seconds = (places[-1] - places[0]) * unit
    return make_video(np.stack(frames), path.name, seconds, notes)


def check_file(path: Path) -> None:
    """Raise, before a model is loaded, what can never work: `UsageError` for no file, `MissingExtraError`."""
    load_av()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {kind}; give the path of a video file")


def _spread(places: list[int], count: int) -> list[int]:
    """At most `count` of the ascending places: the last one not after each of as many even steps of time."""
    if not places:
        return []
    if count == 1:
        return places[:1]
    first, length = places[0], places[-1] - places[0]
    chosen: list[int] = []
    at = 0
    for step in range(count):
        while at + 1 < len(places) and (places[at + 1] - first) * (count - 1) <= length * step:
            at += 1
        if not chosen or places[at] > chosen[-1]:
            chosen.append(places[at])
    return chosen


def _frames_at(path: str, places: list[int], wanted: list[int], only_keys: bool) -> Iterator[VideoFrame]:
    """The frames shown at the wanted places; where one cannot be decoded, the last before it, once.

    Of a file that can be decoded only after the last of them, the first frame.
    """
    rest = list(wanted)
    newest: VideoFrame | None = None  # not given yet
    given = False
    if not wanted:
        return
    for number, frame in enumerate(decode_file(path, only_keys)):
        place = frame.pts if frame.pts is not None else places[min(number, len(places) - 1)]
        while rest and place > rest[0]:
            del rest[0]
            if newest is not None:
                yield newest
                newest, given = None, True
        if rest or not given:
            newest = frame
        if not rest:
            break
    if newest is not None:
        yield newest


def _squash(frame: VideoFrame, side: int) -> Tile:
    tile: Tile = cut_tiles(load_image(to_image(frame)), Tiling(1, 1, False), _SQUASHED, side)[0]
    return tile
