"""Calibration sets: token sequences, some with pictures, the same every time for the same seed.

`load` is all that a caller needs. The built-in sets are "text", "image-text", "mixed" and "self" (`manifests/`); a
folder of texts and pictures or a file of JSON lines works as well. Knows nothing of torch or of what is done with the
samples. Called by `quantize`.
"""

from calibration.manifests import SETS, manifest
from calibration.samples import Sample, describe, digest, load, overlap
from calibration.texts import held_out_text

__all__ = ["SETS", "Sample", "describe", "digest", "held_out_text", "load", "manifest", "overlap"]
