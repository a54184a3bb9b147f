"""Conversations in files: what is read back is what was written, and what was not written by us is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgevl.config import TilingConfig, VisionConfig
from edgevl.errors import UsageError
from edgevl.image import load_image
from edgevl.prompt import Message, Said
from edgevl.saved import load, save
from edgevl.view import PictureView, VideoView, make_video

MODEL = "a" * 64
VISION = VisionConfig(32, 64, 2, 2, 16, 64, 3, 8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))  # 4 tokens a tile of 64 pixels


def read(path: Path, vision: VisionConfig | None = VISION) -> tuple[Message, ...]:
    """With a context for three frames."""
    return load(path, MODEL, vision, 13)


def conversation() -> tuple[Message, ...]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    picture = load_image(Image.fromarray(pixels))
    video = make_video(np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8), "clip.mp4", 2.5, ())
    view = PictureView(picture, TilingConfig(4, True, "native"))
    return (
        Message("system", ("Be brief.",)),
        Message("user", (view, VideoView(video, 2), "Was ist das?\n")),
        Message("assistant", (Said("Ein Bär \ufffd", (5, 6, 7)),)),
        Message("user", (view, "And this?")),
        Message("assistant", (Said("", ()),)),
    )


def test_nothing_is_lost(tmp_path: Path) -> None:
    save(tmp_path / "talk", MODEL, conversation())
    found = read(tmp_path / "talk")
    assert found == conversation()
    for found_part, written in zip(found[1].shown, conversation()[1].shown, strict=True):
        assert type(found_part) is type(written)
        assert found_part.key == written.key  # type: ignore[union-attr]
    save(tmp_path / "talk", MODEL, found[:3])  # in the place of the other
    assert read(tmp_path / "talk") == conversation()[:3]
    assert [p.name for p in tmp_path.iterdir()] == ["talk"]


def test_another_model_gets_answers_as_text(tmp_path: Path) -> None:
    save(tmp_path / "talk", MODEL, conversation())
    assert load(tmp_path / "talk", "b" * 64, VISION, 13)[2].parts == ("Ein Bär \ufffd",)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="no saved conversation"):
        save(tmp_path / "photo.png", MODEL, conversation())
    assert (tmp_path / "photo.png").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="not an existing folder"):
        save(tmp_path / "none" / "talk", MODEL, conversation())


def changed(key: str, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        document[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (changed("edgevl_conversation", 2), "format 2"),
        (changed("more", 1), "unknown key 'more'"),
        (changed("pictures", ["x"]), "picture"),
        (changed("pictures", []), "nothing in it"),
        (changed("messages", [{"role": "user", "parts": [{}]}]), "nothing in it"),
        (changed("messages", 3), "messages"),
        (changed("messages", [{"role": "user", "parts": [{"picture": -1}]}]), "nothing in it"),
        (changed("messages", [{"role": "user", "parts": [{"video": 0, "frames": 9}]}]), "nothing in it"),
        (changed("videos", [{"name": "x", "seconds": 1.0, "frames": []}]), "video"),
        (lambda d: d["messages"][1]["parts"][0]["tiling"].update(max_tiles=0), "max_tiles"),
        (lambda d: d["messages"][1]["parts"][0]["tiling"].update(max_tiles=10**9), "tiles"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path: Path, change: Any, word: str) -> None:
    path = tmp_path / "talk"
    save(path, MODEL, conversation())
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=word):
        read(path)


def begun(width: int, height: int) -> str:
    """A picture of which there is no more than its size."""
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return base64.b64encode(out.getvalue()[:50]).decode()


@pytest.mark.parametrize(
    ("frames", "vision", "words"),
    [
        (["x"] * 4, VISION, "a video of 4 frames, this bundle's context 3 at most"),
        ([begun(1024, 1024)], VISION, "1024x1024 pixels, this model's tiles are 64x64"),
        ([begun(64, 32)], VISION, "64x32 pixels"),
        ([begun(64, 64)], VISION, "a picture in it cannot be read"),
        (["x"], None, "without eyes"),
    ],
)
def test_frames_that_can_never_be_shown_are_not_decoded(
    tmp_path: Path, frames: list[str], vision: VisionConfig | None, words: str
) -> None:
    path = tmp_path / "talk"
    save(path, MODEL, conversation())
    document = json.loads(path.read_bytes())
    document["videos"][0]["frames"] = frames
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=words):
        read(path, vision)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"edgevl_conversation": ', b'{"edgevl_conversation": \xff', b"[1]"])
def test_what_is_no_conversation_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "talk").write_bytes(content)
    with pytest.raises(UsageError, match="talk"):
        read(tmp_path / "talk")
    with pytest.raises(UsageError, match="is not a file"):
        read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(24, 4000), flip=st.integers(0, 255))
def test_no_damage_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "talk"
    save(path, MODEL, conversation())
    data = bytearray(path.read_bytes())
    data[min(cut, len(data) - 1)] ^= flip
    path.write_bytes(data)
    with contextlib.suppress(UsageError):
        read(path)
