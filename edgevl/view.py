"""What the model is shown: a picture or a video, and from when it is asked about, how it is cut into tiles.

A view is fixed once its question is asked: its tokens stay the same for the whole conversation, so that what the KV
cache holds of it stays right. Sizes are enough for the cost; pixels are touched by `cut` alone. Knows no tokens of
text and no budget (`edgevl.budget` chooses views). Called by the prompt, the budget and the engine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TilingConfig, VisionConfig
from edgevl.errors import PromptError
from edgevl.image import Picture, cut_tiles
from edgevl.tiling import image_cost


@dataclass(frozen=True)
class Video:
    """Frames of a clip, evenly spread over it; two with the same frames are equal."""

    frames: NDArray[np.uint8] = field(compare=False)  # (F, S, S, 3), each squashed to one tile; F at least 1
    name: str = field(compare=False)
    seconds: float = field(compare=False)  # of the whole clip, 0 when nothing tells
    notes: tuple[str, ...] = field(compare=False)
    digest: str  # sha256 of the frames


@dataclass(frozen=True)
class PictureView:
    """A picture that is cut by one tiling."""

    picture: Picture
    tiling: TilingConfig

    @property
    def key(self) -> str:
        """The same for the same pixels, cut the same way."""
        return f"{self.picture.digest}:{self.tiling.rule}:{self.tiling.max_tiles}:{self.tiling.thumbnail}"

    def tiles(self, vision: VisionConfig) -> int:
        """How many tiles, the thumbnail included; from the size alone."""
        return image_cost(*self.picture.size, self.tiling, vision).tiles

    def cut(self, vision: VisionConfig) -> NDArray[np.uint8]:
        """The tiles, (tiles, S, S, 3)."""
        cost = image_cost(*self.picture.size, self.tiling, vision)
        return cut_tiles(self.picture, cost.tiling, self.tiling, vision.tile_size)


@dataclass(frozen=True)
class VideoView:
    """Some of a video's frames, one tile each, together in one image block (the model's own training format)."""

    video: Video
    count: int

    @property
    def key(self) -> str:
        """The same for the same frames."""
        return f"{self.video.digest}:frames:{self.count}"

    def tiles(self, vision: VisionConfig) -> int:
        """How many tiles: one a frame. Raises `PromptError` for frames of another model's tile size."""
        side = self.video.frames.shape[1]
        if side != vision.tile_size:
            raise PromptError(
                f"the frames of {self.video.name} have {side} pixels a side, this model's tiles {vision.tile_size}; "
                "show the video again"
            )
        return self.count

    def cut(self, vision: VisionConfig) -> NDArray[np.uint8]:
        """The tiles, (count, S, S, 3)."""
        return self.video.frames[spread(len(self.video.frames), self.count)]


def make_video(frames: NDArray[np.uint8], name: str, seconds: float, notes: tuple[str, ...]) -> Video:
    """A video of frames (F, S, S, 3)."""
    digest = hashlib.sha256(f"{frames.shape} RGB ".encode())
    digest.update(frames.tobytes())
    return Video(frames, name, seconds, notes, digest.hexdigest())


View = PictureView | VideoView
Shown = Picture | Video | View


def spread(total: int, count: int) -> list[int]:
    """`count` places evenly over 0..total-1, the first and the last among them: floor(linspace(0, total - 1, count)).

    The indices that the model was trained with; a single one is the first.
    """
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]
