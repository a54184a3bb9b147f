"""From the size of a picture to tiles, tokens and placeholders: arithmetic only, the same for every caller.

Knows no pixels and no Pillow; `edgevl.image` cuts exactly what is computed here. Called by the engine, the planner and
the HTTP API, which all cost a picture from its width and height alone, before anything is decoded or resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from edgevl.config import TilingConfig, VisionConfig
from edgevl.errors import CapacityError, ImageError

# The order in which the model's own processor tries grids of up to 12 tiles, as (columns, rows). The first of equal
# scores wins, so the order inside a group of equal area decides a few exact squares (from 1148 px on under "hf").
_MEASURED_ORDER = (
    *((1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (5, 1), (1, 5), (1, 6), (6, 1), (3, 2), (2, 3)),
    *((7, 1), (1, 7), (4, 2), (2, 4), (1, 8), (8, 1), (1, 9), (3, 3), (9, 1), (2, 5), (5, 2), (10, 1), (1, 10)),
    *((11, 1), (1, 11), (12, 1), (3, 4), (4, 3), (1, 12), (6, 2), (2, 6)),
)
_MEASURED_MAX = 12
_AREA_CAP = 0.6  # beyond this share of the picture's area more tiles earn nothing
_LADDER = (12, 8, 6, 4, 2, 1)  # the training recipe's steps when pictures do not fit


@dataclass(frozen=True)
class Tiling:
    """The grid of one picture. `thumbnail`: one more tile, last, with the whole picture."""

    columns: int
    rows: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """All tiles, the thumbnail included."""
        return self.columns * self.rows + int(self.thumbnail)

    def tokens(self, vision: VisionConfig) -> int:
        """Rows of the language model's input that the picture takes, without `<img>` and `</img>`."""
        return self.tiles * vision.tile_tokens


@dataclass(frozen=True)
class ImageCost:
    """What one picture costs."""

    tiling: Tiling
    tiles: int
    tokens: int  # rows of image embeddings
    placeholder_tokens: int  # the same with `<img>` and `</img>` around them


@lru_cache(maxsize=64)
def _candidates(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids of at most `max_tiles`, fewest tiles first: the measured order, then by (area, columns)."""
    known = [grid for grid in _MEASURED_ORDER if grid[0] * grid[1] <= max_tiles]
    more = [
        (i, j)
        for i in range(1, max_tiles + 1)
        for j in range(1, max_tiles // i + 1)
        if i * j > _MEASURED_MAX  # never reached for max_tiles <= 12
    ]
    return (*known, *sorted(more, key=lambda grid: (grid[0] * grid[1], grid[0])))


def tile_grid(width: int, height: int, config: TilingConfig, tile_size: int) -> Tiling:
    """The grid for a picture of `width` x `height` pixels.

    Each candidate (i columns, j rows) scores min(i·j·S²/area, 0.6) · min(t/a, a/t), with t = i/j, a the picture's
    aspect ratio and area its pixels, both taken after doubling under the rule "hf"; the first best one wins. Computed
    in float64 in this order of operations, because exact squares are decided by rounding. Source: the model's image
    processor. Raises `ImageError` for a size below one pixel.
    """
    if width < 1 or height < 1:
        raise ImageError(f"a picture of {width}x{height} pixels has no content; both sides must be at least 1")
    factor = upscale(config)
    w, h = width * factor, height * factor
    aspect, area = w / h, w * h
    best, chosen = float("-inf"), (1, 1)
    for columns, rows in _candidates(config.max_tiles):
        target = columns / rows
        fill = min(columns * rows * tile_size * tile_size / area, _AREA_CAP)
        score = fill * min(target / aspect, aspect / target)
        if score > best:
            best, chosen = score, (columns, rows)
    return Tiling(*chosen, thumbnail=config.thumbnail and chosen != (1, 1))


def upscale(config: TilingConfig) -> int:
    """How many times wider and higher the picture is made before its grid is chosen."""
    return 2 if config.rule == "hf" else 1


def image_cost(width: int, height: int, config: TilingConfig, vision: VisionConfig) -> ImageCost:
    """Size -> tiles -> tokens -> placeholders, the one place where this is computed. Raises like `tile_grid`."""
    tiling = tile_grid(width, height, config, vision.tile_size)
    tokens = tiling.tokens(vision)
    return ImageCost(tiling, tiling.tiles, tokens, tokens + 2)


def ladder(config: TilingConfig) -> tuple[int, ...]:
    """Most tiles of a picture to try, in order: the given maximum, then 12, 8, 6, 4, 2, 1 below it."""
    return (config.max_tiles, *(step for step in _LADDER if step < config.max_tiles))


def fit_tiles(
    sizes: Sequence[tuple[int, int]], budget_tokens: int, config: TilingConfig, vision: VisionConfig
) -> TilingConfig:
    """The same tiling with the most tiles per picture for which all pictures fit together.

    `sizes` are (width, height) in pixels; `budget_tokens` is what is left for rows of image embeddings once the text
    and each picture's `<img>` and `</img>` are counted. Tried: the given maximum, then 12, 8, 6, 4, 2, 1 below it, the
    training recipe's own steps. Raises `CapacityError` when one tile each is still too much.
    """
    needed = 0
    for most in ladder(config):
        tried = replace(config, max_tiles=most)
        needed = sum(image_cost(w, h, tried, vision).tokens for w, h in sizes)
        if needed <= budget_tokens:
            return tried
    raise CapacityError(
        f"{len(sizes)} picture{'s' * (len(sizes) != 1)} of one tile each need {needed} tokens, but only "
        f"{max(budget_tokens, 0)} are left beside the text; send fewer pictures or less text, "
        "or build with a larger --context"
    )
