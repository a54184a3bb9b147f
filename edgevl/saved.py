"""A conversation as a file: JSON with the turns, the answers' token ids, and what was shown as PNG, nothing lost.

Written whole or not at all; read with suspicion. The KV cache is not in it: the first question after loading computes
it anew. Called by `edgevl.dialogue` for /save and /load.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from edgevl.config import TilingConfig, VisionConfig, from_json
from edgevl.errors import ImageError, UsageError
from edgevl.files import atomic_file
from edgevl.image import Picture, load_image
from edgevl.prompt import MAX_IMAGES, MAX_VIDEOS, Message, Part, Said
from edgevl.view import PictureView, Video, VideoView, make_video

FORMAT = 1
_HEAD = b'{"edgevl_conversation": '  # how every such file begins
_LIMIT = 1 << 30  # bytes; four pictures of 100 megapixels and a video are less


@dataclass(frozen=True)
class SavedPart:
    """One part of a message: a text, an answer, or a number in `pictures` or `videos` with how it was cut."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None  # with a text: an answer
    picture: int | None = None
    tiling: TilingConfig | None = None
    video: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class SavedMessage:
    """One message."""

    role: str
    parts: tuple[SavedPart, ...]


@dataclass(frozen=True)
class SavedVideo:
    """A video's frames, PNG in base64."""

    name: str
    seconds: float
    frames: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """The whole file."""

    edgevl_conversation: int  # the format
    model: str  # digest of the bundle; token ids are for it alone
    messages: tuple[SavedMessage, ...]
    pictures: tuple[str, ...] = ()  # PNG in base64
    videos: tuple[SavedVideo, ...] = field(default_factory=tuple)


def save(path: Path, model: str, messages: Sequence[Message]) -> None:
    """Write settled messages that end with an answer. `model` is the bundle's digest.

    Raises `UsageError` for a path that is taken by something else or cannot be written.
    """
    try:
        taken = path.exists() and not _ours(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); choose another name") from error
    if taken:
        raise UsageError(f"{path} exists and is no saved conversation; choose another name")
    pictures: dict[str, str] = {}
    videos: dict[str, SavedVideo] = {}

    def part(item: Part) -> SavedPart:
        if isinstance(item, str):
            return SavedPart(text=item)
        if isinstance(item, Said):
            return SavedPart(text=item.text, token_ids=item.token_ids)
        if isinstance(item, PictureView):
            pictures.setdefault(item.picture.digest, _png(item.picture.pixels))
            return SavedPart(picture=list(pictures).index(item.picture.digest), tiling=item.tiling)
        assert isinstance(item, VideoView), "only settled messages are saved"
        frames = tuple(_png(Image.fromarray(frame)) for frame in item.video.frames)
        videos.setdefault(item.video.digest, SavedVideo(item.video.name, item.video.seconds, frames))
        return SavedPart(video=list(videos).index(item.video.digest), frames=item.count)

    turns = tuple(SavedMessage(message.role, tuple(map(part, message.parts))) for message in messages)
    saved = Saved(FORMAT, model, turns, tuple(pictures.values()), tuple(videos.values()))
    with atomic_file(path) as file:
        file.write(json.dumps(asdict(saved), ensure_ascii=False).encode("utf-8", "surrogatepass"))


def load(path: Path, model: str, vision: VisionConfig | None, context: int) -> tuple[Message, ...]:
    """The messages of a saved conversation, settled. Under another model than `model`, answers come back as text alone.

    Raises `UsageError` in one sentence for anything that `save` did not write, and before it decodes them for frames
    that are no tiles of `vision` or more than `context` holds.
    """
    saved = from_json(Saved, _document(path), path.name)
    if saved.edgevl_conversation != FORMAT:
        raise UsageError(f"{path} has the format {saved.edgevl_conversation}; this version reads {FORMAT}")
    if len(saved.pictures) > MAX_IMAGES or len(saved.videos) > MAX_VIDEOS:
        raise UsageError(f"{path} holds more pictures or videos than a conversation can; save the conversation again")
    for video in saved.videos:
        if vision is None:
            raise UsageError(f"{path} holds a video, and this bundle a language model without eyes; use another bundle")
        most = (context - 1) // vision.tile_tokens
        if len(video.frames) > most:
            raise UsageError(
                f"{path} holds a video of {len(video.frames)} frames, this bundle's context {most} at most; "
                "use the bundle it was saved with"
            )
    pictures = [_picture(text, path) for text in saved.pictures]
    videos = [] if vision is None else [_video(video, path, vision.tile_size) for video in saved.videos]

    def part(item: SavedPart) -> Part:
        if item.text is not None:
            same = item.token_ids is not None and saved.model == model
            return Said(item.text, item.token_ids or ()) if same else item.text
        if item.picture is not None and 0 <= item.picture < len(pictures) and item.tiling is not None:
            return PictureView(pictures[item.picture], item.tiling)
        if item.video is not None and 0 <= item.video < len(videos) and item.frames is not None:
            video = videos[item.video]
            if 0 < item.frames <= len(video.frames):
                return VideoView(video, item.frames)
        raise UsageError(f"{path} is damaged: a part of a message has nothing in it; save the conversation again")

    return tuple(Message(message.role, tuple(map(part, message.parts))) for message in saved.messages)


def _ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_HEAD)) == _HEAD
    except OSError:
        return False


def _document(path: Path) -> dict[str, object]:
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a file; give the path of a saved conversation")
        if path.stat().st_size > _LIMIT:
            raise UsageError(f"{path} is larger than {_LIMIT >> 20} MiB; no saved conversation is")
        if not _ours(path):
            raise UsageError(f"{path} is no saved conversation; /save writes one")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a saved conversation") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged or cut short ({error}); save the conversation again") from error
    assert isinstance(document, dict), "it begins with a brace"
    return document


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode("ascii")


def _picture(text: str, path: Path, side: int | None = None) -> Picture:
    """Decoded; with `side`, only when both sides are as long."""
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data)) as header:
            if side is not None and header.size != (side, side):
                raise UsageError(
                    f"{path} has a frame of {header.size[0]}x{header.size[1]} pixels, this model's tiles are "
                    f"{side}x{side}; show the video again"
                )
        return load_image(data)
    except (binascii.Error, ValueError, OSError, ImageError) as error:
        raise UsageError(f"{path} is damaged: a picture in it cannot be read; save the conversation again") from error


def _video(saved: SavedVideo, path: Path, side: int) -> Video:
    """Frames of `side` pixels a side."""
    frames = [np.asarray(_picture(text, path, side).pixels) for text in saved.frames]
    if not frames:
        raise UsageError(f"{path} is damaged: a video in it has no frames; save the conversation again")
    return make_video(np.stack(frames), saved.name, saved.seconds, ())
