"""How pictures become numbers, as a checkpoint's preprocessor_config.json and its own input conditioner say it.

The original's image processor and its vision tower both have a normalisation; the two in a row must amount to one.
Where they do not, the single one is used and a note says so. Called by `nemotron_vl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgevl.checkpoint.settings import Settings
from edgevl.config import TilingConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLOSE = 1 / 128  # what rounding the stored values to bf16 can move them

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Affine:
    """(x - mean) / std for each colour channel, x in 0..1."""

    mean: Triple
    std: Triple

    def then(self, after: Affine) -> Affine:
        """This normalisation followed by another, as one."""
        mean = tuple(m + s * m2 for m, s, m2 in zip(self.mean, self.std, after.mean, strict=True))
        std = tuple(s * s2 for s, s2 in zip(self.std, after.std, strict=True))
        return Affine(triple(mean), triple(std))

    def is_clip(self) -> bool:
        """Whether it is OpenAI CLIP's, up to the rounding of a 16-bit file."""
        pairs = zip((*self.mean, *self.std), (*CLIP_MEAN, *CLIP_STD), strict=True)
        return all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in pairs)


CLIP = Affine(CLIP_MEAN, CLIP_STD)
IDENTITY = Affine((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def read_tiling(processor: Settings, tile_size: int) -> TilingConfig:
    """Tile limits; absent keys have the original processor's defaults."""
    processor.expect("image_size", tile_size, default=tile_size)
    return TilingConfig(processor.whole("max_num_tiles", 12), processor.flag("use_thumbnail", True))


def effective_normalisation(processor: Settings, conditioner: Affine | None, notes: list[str]) -> Affine:
    """The one normalisation that pixels in 0..1 must get.

    `conditioner` is the vision tower's own, None when the checkpoint does not store it (it is CLIP's then). Anything
    that is not a single CLIP normalisation adds a sentence to `notes`.
    """
    own = conditioner or CLIP
    processed = _processor_affine(processor)
    if processed is None:
        if not own.is_clip():
            notes.append(f"the checkpoint normalises pixels by mean {own.mean}, std {own.std}, which is not CLIP's")
        return own
    both = processed.then(own)
    if both.is_clip():
        return both
    chosen = own if own.is_clip() else CLIP
    notes.append(
        f"{processor.where} and the vision tower together do not normalise pixels once by CLIP's mean and std; "
        "edgevl normalises them once"
    )
    return chosen


def _processor_affine(processor: Settings) -> Affine | None:
    """What the processor does to pixels in 0..1, or None for nothing."""
    result = IDENTITY
    factor = 255.0
    if processor.flag("do_rescale", True):
        factor *= processor.number("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1.0, rel_tol=1e-4):
        result = Affine((0.0, 0.0, 0.0), (1 / factor,) * 3)
    if processor.flag("do_normalize", False):
        mean, std = _triple(processor, "image_mean", CLIP_MEAN), _triple(processor, "image_std", CLIP_STD)
        if min(std) <= 0:
            raise processor.fail("image_std", "three numbers above zero are needed")
        result = result.then(Affine(mean, std))
    return None if result == IDENTITY else result


def _triple(processor: Settings, key: str, default: Triple) -> Triple:
    value = processor.data.get(key)
    if value is None:
        return default
    if isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value):
        return triple(value)
    raise processor.fail(key, "three numbers are needed")


def triple(values: Sequence[float]) -> Triple:
    """Three floats."""
    r, g, b = values
    return float(r), float(g), float(b)
