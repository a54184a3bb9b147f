"""From picture sizes to tiles and tokens."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevl.config import TilingConfig, VisionConfig
from edgevl.errors import CapacityError, ImageError
from edgevl.tiling import Tiling, fit_tiles, image_cost, tile_grid

HF, NATIVE = TilingConfig(), TilingConfig(rule="native")
VISION = VisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    layers=32,
    heads=16,
    patch_size=16,
    tile_size=512,
    prefix_tokens=8,
    position_grid=128,
    norm_mean=(0.5, 0.5, 0.5),
    norm_std=(0.5, 0.5, 0.5),
)

# (width, height): grid, tiles under "hf"; grid, tiles under "native". Worked out once from the description of the
# model's image processor by a separate script, before this code was written.
GOLDEN = {
    (32, 32): ("1x1", 1, "1x1", 1),
    (256, 256): ("1x1", 1, "1x1", 1),
    (512, 512): ("2x2", 5, "1x1", 1),
    (600, 400): ("3x2", 7, "3x2", 7),
    (640, 480): ("4x3", 13, "4x3", 13),
    (800, 600): ("4x3", 13, "4x3", 13),
    (1024, 768): ("4x3", 13, "4x3", 13),
    (1024, 1024): ("3x3", 10, "2x2", 5),
    (1280, 720): ("4x2", 9, "4x2", 9),
    (720, 1280): ("2x4", 9, "2x4", 9),
    (1920, 1080): ("4x3", 13, "4x2", 9),
    (1080, 1920): ("3x4", 13, "2x4", 9),
    (2048, 1536): ("4x3", 13, "4x3", 13),
    (1536, 2048): ("3x4", 13, "3x4", 13),
    (1024, 3072): ("2x6", 13, "2x6", 13),
    (3072, 1024): ("6x2", 13, "6x2", 13),
    (1700, 2200): ("3x4", 13, "3x4", 13),
    (2480, 3508): ("3x4", 13, "3x4", 13),
    (4000, 3000): ("4x3", 13, "4x3", 13),
    (3000, 500): ("8x1", 9, "6x1", 7),
    (500, 3000): ("1x8", 9, "1x6", 7),
    (4096, 2160): ("4x3", 13, "4x3", 13),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_grids_and_tokens(size: tuple[int, int]) -> None:
    hf_grid, hf_tiles, native_grid, native_tiles = GOLDEN[size]
    for config, grid, tiles in ((HF, hf_grid, hf_tiles), (NATIVE, native_grid, native_tiles)):
        cost = image_cost(*size, config, VISION)
        assert f"{cost.tiling.columns}x{cost.tiling.rows}" == grid
        assert (cost.tiles, cost.tokens, cost.placeholder_tokens) == (tiles, tiles * 256, tiles * 256 + 2)


def test_the_largest_square_that_stays_one_tile() -> None:
    for config, side in ((HF, 330), (NATIVE, 660)):
        assert tile_grid(side, side, config, 512).tiles == 1
        assert tile_grid(side + 1, side + 1, config, 512).tiles > 1


def test_squares_decided_by_rounding_follow_the_measured_order() -> None:
    # the smallest size, as seen by the scorer, at which 3x4 and 4x3 beat 3x3 by float rounding: 2296 px
    assert tile_grid(1148, 1148, HF, 512) == Tiling(3, 4, True)
    assert tile_grid(2296, 2296, NATIVE, 512) == Tiling(3, 4, True)
    assert tile_grid(1147, 1147, HF, 512) == Tiling(3, 3, True)


def test_no_thumbnail_for_one_tile_or_when_switched_off() -> None:
    assert tile_grid(100, 100, HF, 512) == Tiling(1, 1, False)
    assert tile_grid(1024, 768, TilingConfig(thumbnail=False), 512) == Tiling(4, 3, False)
    assert tile_grid(1024, 768, TilingConfig(max_tiles=1), 512) == Tiling(1, 1, False)


@given(
    st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 30), st.sampled_from(["hf", "native"]), st.booleans()
)
def test_the_grid_is_a_best_one_and_within_the_limit(
    width: int, height: int, most: int, rule: str, thumbnail: bool
) -> None:
    tiling = tile_grid(width, height, TilingConfig(most, thumbnail, rule), 512)
    factor = 2 if rule == "hf" else 1

    def score(i: int, j: int) -> float:
        fill = min(i * j * 512 * 512 / (factor * factor * width * height), 0.6)
        return fill * min(i * height / (j * width), j * width / (i * height))

    pairs = [(i, j) for i, j in itertools.product(range(1, most + 1), repeat=2) if i * j <= most]
    best = max(score(*pair) for pair in pairs)
    assert math.isclose(score(tiling.columns, tiling.rows), best, rel_tol=1e-12)
    assert tiling.columns * tiling.rows <= most
    assert tiling.thumbnail == (thumbnail and (tiling.columns, tiling.rows) != (1, 1))


def test_fit_tiles_takes_the_most_that_fits() -> None:
    sizes = [(1024, 768)] * 4
    assert fit_tiles(sizes, 4 * 13 * 256, HF, VISION) == HF
    assert fit_tiles(sizes, 4 * 13 * 256 - 1, HF, VISION).max_tiles == 8
    assert fit_tiles(sizes, 4 * 256, HF, VISION).max_tiles == 1
    # never above the maximum that was given, which need not be a step itself
    assert fit_tiles(sizes, 10**6, TilingConfig(max_tiles=4), VISION).max_tiles == 4
    assert fit_tiles(sizes, 10**6, TilingConfig(max_tiles=10), VISION).max_tiles == 10
    assert fit_tiles(sizes, 4 * 256, TilingConfig(3, rule="native"), VISION) == TilingConfig(1, rule="native")
    assert fit_tiles([], 0, HF, VISION) == HF


@pytest.mark.parametrize("budget", [4 * 256 - 1, 0, -50])
def test_what_cannot_fit_is_refused_with_the_numbers(budget: int) -> None:
    with pytest.raises(CapacityError, match=rf"4 pictures .* 1024 tokens, but only {max(budget, 0)} are left"):
        fit_tiles([(1024, 768)] * 4, budget, HF, VISION)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="0x5"):
        tile_grid(0, 5, HF, 512)
