"""Calibration sets: token sequences, some with pictures, the same every time for the same seed.

`load` is all that a caller needs. The built-in sets are "text", "image-text" and "mixed"; a directory of texts and
pictures works as well. Knows nothing of torch or of what is done with the samples. Called by `quantize`.
"""

from calibration.samples import SETS, Sample, load
from calibration.texts import held_out_text

__all__ = ["SETS", "Sample", "held_out_text", "load"]
