"""Which pictures are accepted, what becomes of their pixels, and the tiles that are cut from them."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFile

from edgevl import image as image_module
from edgevl.config import TilingConfig, VisionConfig
from edgevl.errors import ImageError
from edgevl.image import FORMATS, MAX_PIXELS, Picture, cut_tiles, load_image
from edgevl.tiling import Tiling, image_cost, tile_grid

U8 = NDArray[np.uint8]
HF, NATIVE = TilingConfig(), TilingConfig(rule="native")


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def page(width: int, height: int) -> U8:
    """Black text on white, the pictures that the model is for."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for y in range(2, height, 13):
        draw.text((3, y), "Invoice 2024-117  total 1,234.56  " * (width // 190 + 1), fill=(10, 10, 30))
    return np.asarray(image)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(picture: Picture) -> NDArray[np.int16]:
    assert picture.pixels.mode == "RGB"
    return np.asarray(picture.pixels).astype(np.int16)


# -- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_from_bytes_and_from_a_file(kind: str, tmp_path: Path) -> None:
    lossless = {"WEBP": {"lossless": True}}.get(kind, {})
    source = Image.fromarray(page(90, 70)).convert("P") if kind == "GIF" else Image.fromarray(page(90, 70))
    data = encoded(source, kind, **lossless)
    (tmp_path / "x").write_bytes(data)
    pictures = [load_image(data), load_image(tmp_path / "x"), load_image(str(tmp_path / "x"))]
    assert len({p.digest for p in pictures}) == 1
    assert pictures[0].size == (90, 70) and pictures[0].notes == ()
    close = 60 if kind == "JPEG" else 0
    assert np.abs(array(pictures[0]) - np.asarray(source.convert("RGB"))).max() <= close


def test_the_digest_is_of_pixels_and_size() -> None:
    pixels = noise(40, 60)
    same = [load_image(encoded(Image.fromarray(pixels), kind)).digest for kind in ("PNG", "BMP", "TIFF", "PPM")]
    same.append(load_image(Image.fromarray(pixels)).digest)
    assert len(set(same)) == 1
    turned = pixels.reshape(40, 60, 3)  # the same bytes in another shape
    changed = pixels.copy()
    changed[59, 39, 2] ^= 1
    assert len({same[0], load_image(Image.fromarray(turned)).digest, load_image(Image.fromarray(changed)).digest}) == 3


def test_a_given_image_is_neither_kept_nor_changed() -> None:
    image = Image.fromarray(noise(40, 40))
    picture = load_image(image)
    before = array(picture).copy()
    image.paste((0, 0, 0), (0, 0, 40, 40))
    assert np.array_equal(array(picture), before)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_and_said(kind: str, orientation: int) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)  # red left of the middle, blue corner at the top right
    upright[:, :32, 0] = 255
    upright[:24, 48:, 2] = 255
    # how a camera stores it, by the EXIF standard's table (row 0 is the visual ..., column 0 the visual ...)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # row 0 is the right side, column 0 the top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"exif": exif}
    options |= {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = load_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, **options))
    assert picture.size == (64, 48)
    assert np.abs(array(picture) - upright).max() <= (12 if kind == "JPEG" else 0)
    assert [note for note in picture.notes if "upright" in note] == list(picture.notes)
    assert len(picture.notes) == (orientation > 1)


def test_damaged_exif_does_not_refuse_the_pixels() -> None:
    data = encoded(Image.fromarray(noise(40, 40)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert load_image(data).size == (40, 40)


# -- pixel formats ------------------------------------------------------------------------------------------------


def test_grey_and_palette() -> None:
    grey = noise(40, 40, channels=1)[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(array(load_image(encoded(Image.fromarray(grey), "PNG"))), expected)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(array(load_image(encoded(bits, "PNG"))))) == {0, 255}
    palette = Image.fromarray(page(60, 60)).quantize(8)
    assert np.array_equal(array(load_image(encoded(palette, "PNG"))), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGBa", "La"])
def test_transparency_is_laid_on_white_and_said(mode: str) -> None:
    rgba = Image.fromarray(noise(40, 40, channels=4))
    image = rgba.quantize(200, method=Image.Quantize.FASTOCTREE) if mode == "P" else None
    if mode in ("LA", "La"):
        rgba = rgba.convert("LA").convert("RGBA")
    if image is None and mode == "PA":
        image = Image.fromarray(page(40, 40)).convert("P").convert("PA")
        image.putalpha(128)
    if image is None:
        image = rgba.convert("LA").convert("La") if mode == "La" else rgba.convert(mode)
    full = np.asarray(image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")).astype(float)
    alpha = full[:, :, 3:] / 255
    expected = full[:, :, :3] * alpha + 255 * (1 - alpha)
    picture = load_image(encoded(image, "PNG") if mode in ("RGBA", "LA", "P") else image)
    assert np.abs(array(picture) - expected).max() <= 1
    assert len(picture.notes) == 1 and "white" in picture.notes[0]


def test_a_colour_key_is_transparency_and_full_alpha_is_not() -> None:
    pixels = page(40, 40).copy()
    pixels[:10] = (1, 2, 3)
    keyed = load_image(encoded(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3)))
    assert array(keyed)[:10].min() == 255 and len(keyed.notes) == 1
    opaque = Image.fromarray(pixels).convert("RGBA")
    assert load_image(opaque).notes == () and np.array_equal(array(load_image(opaque)), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_become_8_by_257(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (40, 50)).astype(np.uint16)
    values[0, :3] = 0, 128, 65535
    picture = load_image(encoded(Image.fromarray(values), kind))
    expected = np.rint(values / 257.0)
    assert np.array_equal(array(picture), np.repeat(expected[:, :, None], 3, axis=2))
    assert picture.notes == ()


def test_a_dark_16_bit_picture_stays_dark() -> None:
    values = np.full((40, 40), 2570, np.uint16)
    assert array(load_image(Image.fromarray(values))).max() == 10


@pytest.mark.parametrize(
    ("values", "expected", "notes"),
    [
        ([0.0, 0.25, 1.0], [0, 64, 255], 0),
        ([0.0, 100.4, 255.0], [0, 100, 255], 0),
        ([-10.0, 0.0, 30.0], [0, 64, 255], 1),
        ([0.0, 1e6, 4e6], [0, 64, 255], 1),
        ([-3.0, -3.0, -3.0], [0, 0, 0], 1),
    ],
)
def test_floats(values: list[float], expected: list[int], notes: int) -> None:
    pixels = np.tile(np.array(values, np.float32), (40, 20))
    picture = load_image(Image.fromarray(pixels))
    assert array(picture)[7, :3, 0].tolist() == expected
    assert len(picture.notes) == notes
    with pytest.raises(ImageError, match="NaN"):
        load_image(Image.fromarray(np.where(pixels == pixels[0, 0], np.float32("nan"), pixels)))


def test_32_bit_integers_beyond_16_bits_are_stretched() -> None:
    pixels = np.tile(np.array([0, 1 << 18, 1 << 20], np.int32), (40, 20))
    picture = load_image(encoded(Image.fromarray(pixels), "TIFF"))
    assert array(picture)[0, :3, 0].tolist() == [0, 64, 255] and len(picture.notes) == 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_colour_spaces(mode: str) -> None:
    smooth = Image.fromarray(page(64, 64)).resize((40, 40), Image.Resampling.BOX)
    image = smooth.convert(mode)
    assert np.abs(array(load_image(image)) - np.asarray(smooth)).max() <= 8
    if mode == "CMYK":
        jpeg = load_image(encoded(image, "JPEG", quality=100))
        assert np.abs(array(jpeg) - np.asarray(smooth)).mean() < 8


def test_an_unknown_colour_space_is_refused() -> None:
    with pytest.raises(ImageError, match="LAB"):
        load_image(Image.new("LAB", (40, 40)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_read_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert array(picture).reshape(-1, 3).max(axis=0).tolist() == [255, 0, 0]
    assert any("first" in note for note in picture.notes)


def test_a_frame_that_the_caller_chose_is_the_one_that_is_read() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    image = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    picture = load_image(image)
    assert array(picture)[0, 0].tolist() == [0, 255, 0] and picture.notes == ()


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(31, 32), (32, 31), (1, 500), (500, 1)])
def test_smaller_than_32_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=rf"{size[0]}x{size[1]} .* at least 32"):
        load_image(Image.new("RGB", size))
    with pytest.raises(ImageError, match="at least 32"):
        load_image(encoded(Image.new("RGB", size), "PNG"))
    assert load_image(Image.new("RGB", (32, 32))).size == (32, 32)


def _png_header(width: int, height: int) -> bytes:
    """A valid PNG head of this size in which no pixel follows: decoding it would fail."""
    data = encoded(Image.new("1", (32, 32)), "PNG")
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:8] + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize("size", [(10001, 10000), (12000, 12000), (20000, 20000), (1 << 20, 1 << 20)])
def test_more_than_100_megapixels_is_refused_by_the_header(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="megapixels"):
            load_image(_png_header(*size))


def test_the_limit_does_not_touch_pillow_for_others() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_image(Image.new("RGB", (40, 40)))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


_LARGEST = """
import io, warnings
warnings.simplefilter("error")
from PIL import Image
from edgevl.config import TilingConfig
from edgevl.image import cut_tiles, load_image
from edgevl.tiling import tile_grid
file = io.BytesIO()
Image.new("1", (10000, 10000), 1).save(file, "PNG", compress_level=1)
picture = load_image(file.getvalue())
tiling = tile_grid(*picture.size, TilingConfig(rule="native"), 64)
tiles = cut_tiles(picture, tiling, TilingConfig(rule="native"), 64)
assert tiles.min() == 255
status = open("/proc/self/status").read()  # ru_maxrss would count what the parent held before exec
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_exactly_100_megapixels_in_bounded_memory() -> None:
    assert MAX_PIXELS == 100_000_000
    done = subprocess.run(
        [sys.executable, "-c", _LARGEST], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    # RGB at Pillow's 4 bytes a pixel is 381 MiB, one bit picture 95, one band 64, the interpreter about 60
    assert int(done.stdout) < 800


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_file_that_is_cut_short_is_refused_by_name(kind: str, share: float, tmp_path: Path) -> None:
    source = Image.fromarray(noise(200, 200))
    data = encoded(source.convert("P") if kind == "GIF" else source, kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: max(1, int(len(data) * share))])
    with pytest.raises(ImageError, match=r"cut\.bin") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files_are_pictures_or_image_errors_never_more(kind: str, data: st.DataObject) -> None:
    source = Image.fromarray(page(48, 48))
    broken = bytearray(encoded(source.convert("P") if kind == "GIF" else source, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        # half of the damage in the header, where it matters most
        limit = data.draw(st.sampled_from([min(120, len(broken)), len(broken)]))
        broken[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = load_image(bytes(broken))
    except ImageError:
        return
    assert min(picture.size) >= 32


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is not a picture at all", "not a picture in one of the formats JPEG"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not a picture"),  # Pillow would start Ghostscript
    ],
)
def test_what_is_not_a_picture(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        load_image(data)
    with pytest.raises(ImageError, match=rf"file\.png.*{reason}"):
        load_image(tmp_path / "file.png")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        load_image(tmp_path / "no.png")
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError):
        load_image("a\0b.png")
    with pytest.raises(ImageError):
        load_image("x" * 5000)
    if Path("/dev/null").exists():
        with pytest.raises(ImageError, match="is not a file"):
            load_image("/dev/null")


# -- tiles --------------------------------------------------------------------------------------------------------


def by_torch(pixels: U8, tiling: Tiling, config: TilingConfig, side: int) -> U8:
    """The steps of the model's processor: PIL doubling, then torch's antialiased bilinear resize of uint8."""
    image = Image.fromarray(pixels)
    if config.rule == "hf":
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]

    def resized(width: int, height: int) -> U8:
        out = torch.nn.functional.interpolate(
            tensor, size=(height, width), mode="bilinear", antialias=True, align_corners=False
        )
        return np.asarray(out[0].permute(1, 2, 0).numpy())

    grid = resized(tiling.columns * side, tiling.rows * side)
    tiles = [
        grid[r * side : (r + 1) * side, c * side : (c + 1) * side]
        for r in range(tiling.rows)
        for c in range(tiling.columns)
    ]
    if tiling.thumbnail:
        tiles.append(resized(side, side))
    return np.stack(tiles)


@pytest.mark.parametrize("config", [HF, NATIVE], ids=["hf", "native"])
@pytest.mark.parametrize("size", [(32, 32), (200, 150), (333, 777), (777, 333), (1024, 60), (40, 900), (640, 480)])
@pytest.mark.parametrize("kind", [noise, page])
def test_tiles_are_those_of_the_models_processor(kind: object, size: tuple[int, int], config: TilingConfig) -> None:
    pixels = kind(*size)  # type: ignore[operator]
    side = 128
    tiling = tile_grid(*size, config, side)
    tiles = cut_tiles(load_image(Image.fromarray(pixels)), tiling, config, side)
    expected = by_torch(pixels, tiling, config, side)
    assert tiles.shape == (tiling.tiles, side, side, 3) and tiles.dtype == np.uint8 and tiles.flags.c_contiguous
    apart = np.abs(tiles.astype(int) - expected)
    if config.rule == "native" and size == (640, 480):
        # 5:4 makes weights of tenths and so rounding ties; both are equally far from the exact result, each in its way
        assert apart.max() <= 2 and (apart > 1).mean() < 1e-4 and (apart > 0).mean() < 0.1
    else:
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


@pytest.mark.parametrize("config", [HF, NATIVE], ids=["hf", "native"])
@pytest.mark.parametrize("size", [(700, 333), (333, 700), (1500, 70), (70, 1500), (511, 513)])
@pytest.mark.parametrize("band", [1, 70_000, 250_000])
def test_bands_change_a_value_by_at_most_one(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], config: TilingConfig, band: int
) -> None:
    for pixels in (noise(*size), page(*size)):
        picture = load_image(Image.fromarray(pixels))
        tiling = tile_grid(*size, config, 96)
        monkeypatch.setattr(image_module, "_BAND", 1 << 40)
        whole = cut_tiles(picture, tiling, config, 96).astype(int)
        monkeypatch.setattr(image_module, "_BAND", band)
        banded = cut_tiles(picture, tiling, config, 96)
        assert np.abs(banded - whole).max() <= 1
        assert (banded != whole).mean() < 0.02


def test_a_strip_beyond_all_proportion_takes_no_detour() -> None:
    pixels = page(32, 20000)  # rows first would hold it 128 wide and 40,000 high
    tiling = tile_grid(32, 20000, HF, 128)
    tiles = cut_tiles(load_image(Image.fromarray(pixels)), tiling, HF, 128)
    assert np.abs(tiles.astype(int) - by_torch(pixels, tiling, HF, 128)).max() <= 1


def test_tiles_lie_row_by_row_and_the_thumbnail_is_last() -> None:
    colours = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[90, 90, 0], [0, 90, 90], [90, 0, 90]]], np.uint8)
    pixels = np.repeat(np.repeat(colours, 64, axis=0), 64, axis=1)  # 192 x 128
    tiles = cut_tiles(load_image(Image.fromarray(pixels)), Tiling(3, 2, True), HF, 64)
    assert tiles.shape == (7, 64, 64, 3)
    centres = tiles[:6, 32, 32].tolist()
    assert centres == colours.reshape(6, 3).tolist()
    assert tiles[6, 16, 10].tolist() == [250, 0, 0] and tiles[6, 48, 53].tolist() == [90, 0, 90]


SIDE = 32
VISION = VisionConfig(32, 64, 1, 2, 8, SIDE, 4, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(32, 700),
    st.floats(-4, 4),
    st.integers(1, 14),
    st.sampled_from(["hf", "native"]),
    st.booleans(),
)
def test_what_is_cut_is_what_was_costed(short: int, log_aspect: float, most: int, rule: str, thumbnail: bool) -> None:
    long = min(int(short * 2 ** abs(log_aspect)), 3000)
    width, height = (long, short) if log_aspect > 0 else (short, long)
    config = TilingConfig(most, thumbnail, rule)
    cost = image_cost(width, height, config, VISION)
    tiles = cut_tiles(load_image(Image.new("RGB", (width, height), (9, 99, 199))), cost.tiling, config, SIDE)
    assert tiles.shape == (cost.tiles, SIDE, SIDE, 3)
    assert cost.tokens == cost.tiles * 4 and cost.placeholder_tokens == cost.tokens + 2
    assert (tiles == np.array([9, 99, 199])).all()
