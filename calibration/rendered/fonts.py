"""Fonts from Python packages, and which split may use which: a face seen in training is never tested.

All are free: Roboto and Caladea under Apache-2.0, DejaVu (inside matplotlib) and XCharter under Bitstream's permissive
licences, Ubuntu under the Ubuntu Font Licence 1.0, the rest under the SIL Open Font License 1.1. Those of the tests
come with the extra "demo", those of calibration with "quantize", the others with "train".
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from edgevl.errors import MissingExtraError

_FACES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "font_roboto": ("Roboto-Regular", "Roboto-Medium", "Roboto-Bold"),
        "font_source_sans_pro": ("SourceSansPro-Regular", "SourceSansPro-Semibold", "SourceSansPro-Bold"),
        "font_hanken_grotesk": ("HankenGrotesk-Regular", "HankenGrotesk-Medium", "HankenGrotesk-Bold"),
        "font_caladea": ("Caladea-Regular", "Caladea-Bold"),
        "matplotlib": (
            *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold"),
            *("DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol"),
        ),
        "rendercv_fonts": tuple(
            f"{family}/{family.replace(' ', '')}-{style}"
            for family in (
                *(
                    "EB Garamond",
                    "Gentium Book Plus",
                    "Noto Sans",
                    "Open Sans",
                    "Open Sauce Sans",
                    "Poppins",
                    "Raleway",
                ),
                *("Ubuntu", "XCharter"),
            )
            for style in ("Regular", "Bold")
        ),
    },
    "calibration": {
        "font_roboto": ("Roboto-Regular", "Roboto-Medium", "Roboto-Bold"),
        "font_caladea": ("Caladea-Regular", "Caladea-Bold"),
    },
    "validation": {"font_manrope": ("Manrope-Regular", "Manrope-Medium", "Manrope-Bold")},
    "test": {
        "font_lato": ("Lato-Regular", "Lato-Bold"),
        "font_source_serif_pro": ("SourceSerifPro-Regular", "SourceSerifPro-Semibold"),
    },
}

# where a package keeps them
_FOLDERS = {"matplotlib": Path("mpl-data", "fonts", "ttf"), "rendercv_fonts": Path()}


@lru_cache(maxsize=4)
def font_files(split: str) -> tuple[Path, ...]:
    """The font files of a split, in a fixed order. Raises `MissingExtraError` when a package is not installed."""
    extra = {"test": "'edgevl[demo]'", "calibration": "'edgevl[quantize]'"}.get(split, "'edgevl[train]'")
    return tuple(_find(package, face, extra) for package, faces in _FACES[split].items() for face in faces)


@lru_cache(maxsize=512)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """The face at `size` pixels to the em."""
    return ImageFont.truetype(str(path), size)


def _find(package: str, face: str, extra: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("the rendered pictures", package.replace("_", "-"), extra)
    root = Path(spec.submodule_search_locations[0])
    folder = root / _FOLDERS.get(package, "files")
    for suffix in (".ttf", ".otf"):
        if (found := folder / (face + suffix)).is_file():
            return found
    raise MissingExtraError("the rendered pictures", f"the face {face}", extra)
