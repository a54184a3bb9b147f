"""Pictures: from a file, bytes or a Pillow image to upright RGB pixels, and from there to the model's tiles.

Decides which pictures are accepted and what becomes of greyscale, transparency, 16 bits and orientation; every change
that a user would want to know of becomes a note. How many tiles a picture gets is computed in `edgevl.tiling` from its
size alone; this module only cuts them. Called by the engine, the command line, the HTTP API and the calibration.
"""

from __future__ import annotations

import hashlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.config import TilingConfig
from edgevl.errors import ImageError
from edgevl.tiling import Tiling, upscale

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MIN_SIDE = 32  # pixels; the model card's rule
MAX_PIXELS = 100_000_000  # checked in the header, before anything is decoded

_DETOUR = 4  # how much larger a strip may grow between the two passes of a resize
_BAND = 16 << 20  # pixels of the enlarged picture that are held at once while it is resized
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_Box = tuple[float, float, float, float]  # left, top, right, bottom
_WHITE = (255, 255, 255)
_WARNINGS = threading.Lock()  # `warnings.catch_warnings` changes state of the whole process


@dataclass(frozen=True)
class Picture:
    """An accepted picture; two with the same pixels are equal."""

    pixels: Image.Image = field(compare=False)  # mode RGB, upright; never changed after loading
    notes: tuple[str, ...] = field(compare=False)  # what was done to it, one sentence each
    digest: str  # sha256 of the size and the RGB pixels

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.size


def load_image(source: str | Path | bytes | Image.Image) -> Picture:
    """Decode a picture: a path (str or Path), an encoded file (bytes), or a Pillow image.

    The first frame is taken. EXIF orientation is applied, since a phone's photo must be read upright; the model's own
    processor does not do so, so its tiles of a rotated photo differ. Transparency is laid on white. 16 bits become 8
    by v/257; ICC profiles are not applied. Raises `ImageError` naming the picture: missing, not one of `FORMATS`,
    damaged or cut short, a side below 32 px, more than 100 megapixels.
    """
    if isinstance(source, Image.Image):
        with _quiet():
            return _accept(source, "the picture", first_frame=False)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(source), f"the picture ({len(source)} bytes)")
    path = Path(source)
    try:
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
            raise ImageError(f"{path} {kind}; give the path of a picture file")
        with path.open("rb") as file:
            return _open(file, str(path))
    except (OSError, ValueError) as problem:  # not readable; a path with a NUL byte
        reason = getattr(problem, "strerror", None) or problem
        raise ImageError(f"{str(path)!r:.200} cannot be read ({reason}); give the path of a picture file") from problem


def _open(file: io.BufferedReader | io.BytesIO, name: str) -> Picture:
    known = ", ".join(FORMATS)
    head = file.read(16)
    if not head:
        raise ImageError(f"{name} is empty; give a picture in one of the formats {known}")
    if head.startswith(b"%PDF"):
        raise ImageError(f"{name} is a PDF, which is not read; save its pages as pictures ({known})")
    file.seek(0)
    with _quiet():
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as problem:
            raise ImageError(f"{name} has more than {MAX_PIXELS / 1e6:g} megapixels; scale it down first") from problem
        except Exception as problem:  # Pillow's readers raise nearly anything on hostile headers
            raise ImageError(f"{name} is damaged, or not a picture in one of the formats {known}") from problem
        with image:
            return _accept(image, name, first_frame=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large and odd files; this module refuses or notes them itself."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _accept(image: Image.Image, name: str, first_frame: bool) -> Picture:
    """Check, decode and convert; `first_frame`: the image stands on the first of perhaps several frames."""
    _check_size(image, name)
    notes: list[str] = []
    try:
        if first_frame and getattr(image, "is_animated", False):
            notes.append(f"{name} has several frames; only the first one is read")
        orientation = _orientation(image)
        image.load()
        turned = _TURNS.get(_orientation(image))  # none left in a TIFF: its reader has turned the pixels
        if turned is not None:
            image = image.transpose(turned)
        rgb = _to_rgb(image, name, notes)
        if rgb is image and turned is None:
            rgb = image.copy()
    except ImageError:
        raise
    except MemoryError as problem:
        raise ImageError(f"{name} does not fit into memory; scale it down first") from problem
    except Exception as problem:  # as above; a truncated file is an OSError, a damaged one may be anything
        raise ImageError(f"{name} is damaged or cut short ({problem!s:.120}); save or download it again") from problem
    _check_size(rgb, name)
    if orientation in _TURNS:
        notes.append(f"{name} was turned upright by its EXIF orientation ({orientation})")
    return Picture(rgb, tuple(notes), _digest(rgb))


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{name} has {width}x{height} pixels; both sides must be at least {MIN_SIDE} by the model card, "
            "so scale it up or crop less"
        )
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width}x{height} pixels, {width * height / 1e6:.1f} megapixels; at most "
            f"{MAX_PIXELS / 1e6:g} are read, so scale it down first"
        )


def _orientation(image: Image.Image) -> int:
    """1 (upright) when there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Any mode that Pillow decodes to, as RGB; an RGB image comes back itself."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _scale_to_bytes(image, name, notes).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image, name, notes)
    if mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return image if mode == "RGB" else image.convert("RGB")
    raise ImageError(f"{name} has the pixel format {mode}, which is not read; save it as an RGB picture")


def _on_white(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Lay a picture with transparency on white, in bands so that only one more copy is held."""
    result = Image.new("RGB", image.size, _WHITE)
    seen = False
    for top, bottom in _row_bands(image):
        band = image.crop((0, top, image.width, bottom))
        band.info = image.info  # a palette's or a key colour's transparency lives here
        rgba = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        alpha = rgba.getchannel("A")
        extrema = alpha.getextrema()
        seen = seen or extrema[0] != 255
        result.paste(rgba.convert("RGB"), (0, top), alpha)
    if seen:
        notes.append(f"transparent parts of {name} were laid on white")
    return result


def _scale_to_bytes(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """16-bit, 32-bit and float greyscale to 8 bits.

    0..65535 becomes v/257 rounded, whatever the brightest pixel is. Floats in 0..1 become v·255; in 0..255 they are
    rounded. Any other range is stretched from its own minimum and maximum, and noted.
    """
    low, high = math.inf, -math.inf
    for top, bottom in _row_bands(image):
        band = np.asarray(image.crop((0, top, image.width, bottom)))
        low, high = min(low, float(band.min())), max(high, float(band.max()))
        if not (math.isfinite(low) and math.isfinite(high) and not np.isnan(band).any()):
            raise ImageError(f"{name} has pixels that are not numbers (NaN or infinite); write them as plain values")
    known = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if low >= 0 and high <= known:
        low, high = 0.0, known
    else:
        notes.append(f"{name} has pixel values from {low:g} to {high:g}; they were stretched to 0..255")
    result = Image.new("L", image.size)
    for top, bottom in _row_bands(image):
        band = np.asarray(image.crop((0, top, image.width, bottom))).astype(np.float64)
        band = np.rint((band - low) * (255.0 / max(high - low, 1e-300)))
        result.paste(Image.fromarray(np.clip(band, 0, 255).astype(np.uint8)), (0, top))
    return result


def _row_bands(image: Image.Image) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about a million pixels."""
    step = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, step):
        yield top, min(top + step, image.height)


def _digest(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.width}x{image.height} RGB ".encode())
    for top, bottom in _row_bands(image):
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.hexdigest()


def cut_tiles(picture: Picture, tiling: Tiling, config: TilingConfig, tile_size: int) -> NDArray[np.uint8]:
    """The picture's tiles (tiles, S, S, 3), S = `tile_size`: the grid row by row, then the thumbnail.

    The picture is resized to the grid without keeping its proportions, by antialiased bilinear filtering in uint8;
    under the rule "hf" it is doubled first (bilinear), and grid and thumbnail are made from the doubled picture, as the
    model's processor does. `tiling` is `tile_grid` of this picture's size. Against torchvision's resize a value differs
    by at most 1; by 2 at no more than one in 10,000, where a ratio such as 5:4 makes rounding ties. A doubled picture
    of more than 16 megapixels is never held whole, but in bands; this changes a value by at most 1.
    """
    sizes = [(tiling.columns * tile_size, tiling.rows * tile_size)]
    if tiling.thumbnail:
        sizes.append((tile_size, tile_size))
    grid, *rest = _resample(picture.pixels, upscale(config), sizes, tile_size)
    tiles = np.asarray(grid).reshape(tiling.rows, tile_size, tiling.columns, tile_size, 3)
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, tile_size, tile_size, 3)
    return np.ascontiguousarray(np.concatenate([tiles, *(np.asarray(r)[None] for r in rest)]))


def _resample(image: Image.Image, factor: int, sizes: list[tuple[int, int]], unit: int) -> list[Image.Image]:
    """Enlarge `factor` times, then resize to each of `sizes` (multiples of `unit` in both directions)."""
    width, height = image.width * factor, image.height * factor
    widest = max(width, max(w for w, _ in sizes))
    if widest * height <= _BAND:
        large = _enlarge(image, factor)
        return [_resize(large, size, (0, 0, *large.size)) for size in sizes]

    # Bands across the longer side. A band is `count` of the `unit` equal parts of that side: whole rows (or columns) of
    # every target, so the enlarged band serves them all.
    along = 0 if width > height else 1
    length, across = (width, height) if along == 0 else (height, width)
    part = length / unit
    reach = math.ceil(max(part, 1.0)) + 2  # of the filter, in enlarged pixels
    longest = _BAND // max(across, min(_DETOUR * across, max(size[1 - along] for size in sizes)))
    count = min(unit, max(1, int((longest - 2 * reach - 4 * factor) / part)))
    results = [Image.new("RGB", size) for size in sizes]
    for first in range(0, unit, count):
        last = min(first + count, unit)
        begin = max(0, math.floor((first * part - reach) / factor) - 2)  # in source pixels, 2 more for the enlarging
        end = min(length // factor, math.ceil((last * part + reach) / factor) + 2)
        band = _enlarge(image.crop(_rectangle(along, begin, end, across // factor)), factor)
        start, stop = first * part - begin * factor, last * part - begin * factor
        box = _rectangle(along, start, min(stop, float((end - begin) * factor)), across)
        for result, size in zip(results, sizes, strict=True):
            scale = size[along] // unit
            shape = ((last - first) * scale, size[1]) if along == 0 else (size[0], (last - first) * scale)
            place = (first * scale, 0) if along == 0 else (0, first * scale)
            result.paste(_resize(band, shape, box), place)
    return results


def _enlarge(image: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return image
    return _resize(image, (image.width * factor, image.height * factor), (0, 0, *image.size))


def _resize(image: Image.Image, size: tuple[int, int], box: _Box) -> Image.Image:
    """Bilinear, antialiased where it reduces, rows first and columns after.

    The order shows in the last bit. torchvision always has this one, Pillow's single call takes the cheaper one; so
    does this where a strip would grow much larger on the way than it is before and after.
    """
    left, top, right, bottom = box
    if size[0] * image.height > _DETOUR * max(image.width * image.height, size[0] * size[1]):
        low = image.resize((image.width, size[1]), Image.Resampling.BILINEAR, box=(0, top, image.width, bottom))
        return low.resize(size, Image.Resampling.BILINEAR, box=(left, 0, right, size[1]))
    wide = image.resize((size[0], image.height), Image.Resampling.BILINEAR, box=(left, 0, right, image.height))
    return wide.resize(size, Image.Resampling.BILINEAR, box=(0, top, size[0], bottom))


def _rectangle(along: int, begin: float, end: float, across: float) -> _Box:
    """(left, top, right, bottom) of a band across the x (0) or y (1) direction."""
    return (begin, 0, end, across) if along == 0 else (0, begin, across, end)
